//! Reading weights: every layout gives the same bytes, and damaged files are refused with clear words.
#![expect(clippy::unwrap_used, reason = "helpers of tests may panic")]

use epsmoe_base::{DType, Mix, env};
use epsmoe_model::{
    Checkpoint, LayerPart, Map, ModelSpec, PRESETS, Part, Synthetic, Tensor, TensorNames, WeightSource,
    Window, config, preset,
};
use half::bf16;
use safetensors::tensor::{Dtype, TensorView, serialize};
use std::collections::{BTreeMap, HashMap, HashSet};
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use tempfile::TempDir;

const FIXTURES: [&str; 21] = [
    "arctic",
    "glm4_moe",
    "glm4_moe_lite",
    "dots1",
    "minimax_m2",
    "bailing_moe_v2",
    "ernie4_5_moe",
    "hunyuan_v1_moe",
    "dbrx",
    "dbrx_clip",
    "deepseek_v2",
    "deepseek_v2_lite",
    "deepseek_v2_yarn",
    "deepseek_v3",
    "mixtral",
    "mixtral_f16",
    "olmoe",
    "qwen2_moe",
    "qwen3_moe",
    "qwen3_moe_merged",
    "qwen3_moe_sparse",
];

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures").join(name)
}

fn open(name: &str) -> (ModelSpec, Checkpoint) {
    (config::read(&fixture(name)).unwrap(), Checkpoint::open(&fixture(name)).unwrap())
}

fn whole(source: &dyn WeightSource, spec: &ModelSpec, part: Part) -> Tensor {
    source.read(&spec.locate(part), &Window::whole()).unwrap()
}

/// Stored tensors by name.
type Stored = BTreeMap<String, (DType, Vec<usize>, Vec<u8>)>;

fn write(path: &Path, stored: &Stored) {
    let dtype = |dtype| match dtype {
        DType::BF16 => Dtype::BF16,
        DType::F16 => Dtype::F16,
        _ => Dtype::F32,
    };
    let views = stored.iter().map(|(name, (format, shape, bytes))| {
        (name, TensorView::new(dtype(*format), shape.clone(), bytes).unwrap())
    });
    fs::write(path, serialize(views, None).unwrap()).unwrap();
}

/// The same model in another family's layout: each part is put where that family looks first.
fn stored_as(naming: TensorNames, spec: &ModelSpec, source: &dyn WeightSource) -> Stored {
    let spec = ModelSpec { naming, ..spec.clone() };
    let mut stored = Stored::new();
    for part in spec.parts() {
        let to = &spec.locate(part).sources[0];
        let tensor = whole(source, &spec, part);
        let tensor = if to.transposed { tensor.transposed() } else { tensor };
        let row = tensor.dtype.bytes() * tensor.shape.get(1).copied().unwrap_or(1);
        let size = tensor.dtype.bytes() * to.shape.iter().product::<usize>();
        let (_, _, bytes) =
            stored.entry(to.name.clone()).or_insert_with(|| (tensor.dtype, to.shape.clone(), vec![0; size]));
        bytes[to.first_row * row..][..tensor.bytes.len()].copy_from_slice(&tensor.bytes);
    }
    stored
}

#[test]
fn every_layout_gives_the_same_bytes() {
    for name in FIXTURES {
        let (spec, checkpoint) = open(name);
        for naming in [
            TensorNames::Common,
            TensorNames::Qwen,
            TensorNames::Mixtral,
            TensorNames::Dbrx,
            TensorNames::Merged,
        ] {
            let folder = TempDir::new().unwrap();
            write(&folder.path().join("model.safetensors"), &stored_as(naming, &spec, &checkpoint));
            let rewritten = Checkpoint::open(folder.path()).unwrap();
            for part in spec.parts() {
                assert_eq!(
                    whole(&rewritten, &spec, part),
                    whole(&checkpoint, &spec, part),
                    "{name} as {naming:?}: {part:?}"
                );
            }
        }
    }
}

#[test]
fn parts_are_exactly_the_tensors_of_a_checkpoint() {
    for name in FIXTURES {
        let (spec, checkpoint) = open(name);
        let mut read = HashSet::new();
        for part in spec.parts() {
            let located = spec.locate(part);
            let found =
                located.sources.iter().find(|source| checkpoint.find(&source.name).unwrap().is_some());
            read.insert(found.unwrap_or_else(|| panic!("{name}: {located:?}")).name.clone());
        }
        // Layers beyond the last one predict further tokens, which nothing here does.
        let beyond = format!("model.layers.{}.", spec.layers.len());
        let there = checkpoint.names().filter(|name| !name.starts_with(&beyond));
        assert_eq!(there.map(str::to_owned).collect::<HashSet<_>>(), read, "{name}");
    }
}

#[test]
fn windows_are_pieces_of_the_whole() {
    let seed = env::test_seed();
    println!("EPSMOE_TEST_SEED={seed}");
    let mut random = Mix::new(seed);
    for name in ["dbrx_clip", "qwen3_moe_merged", "mixtral_f16", "deepseek_v2_lite", "gpt_oss"] {
        let (spec, checkpoint) = open(name);
        for part in spec.parts() {
            let tensor = whole(&checkpoint, &spec, part);
            let [n, k] = [tensor.shape[0], tensor.shape.get(1).copied().unwrap_or(1)];
            let mut range = |width: usize| {
                let [a, b] = [random.below(width + 1), random.below(width + 1)];
                a.min(b)..a.max(b)
            };
            let (rows, columns) = (range(n), range(k));
            let window = Window { rows: Some(rows.clone()), columns: Some(columns.clone()) };
            let piece = checkpoint.read(&spec.locate(part), &window).unwrap();
            let size = tensor.dtype.bytes();
            let expected: Vec<u8> = rows
                .flat_map(|row| {
                    &tensor.bytes[(row * k + columns.start) * size..(row * k + columns.end) * size]
                })
                .copied()
                .collect();
            assert_eq!(piece.bytes, expected, "{name}: {part:?} {window:?}");
        }
    }
}

/// DBRX by hand: expert 2's down projection is rows 48..72 of `w2`, transposed.
#[test]
fn a_transposed_expert_by_hand() {
    let (spec, checkpoint) = open("dbrx_clip");
    let mut stored = vec![0; 144 * 32 * 2];
    checkpoint.fill("transformer.blocks.1.ffn.experts.mlp.w2", 0, &mut stored).unwrap();
    let part = LayerPart::Expert(epsmoe_base::Expert(2), Map::DownProj).of(epsmoe_base::Layer(1));
    let down = whole(&checkpoint, &spec, part);
    assert_eq!(down.shape, [32, 24]);
    for (output, input) in [(0, 0), (31, 0), (5, 23)] {
        let (at, from) = ((output * 24 + input) * 2, ((48 + input) * 32 + output) * 2);
        assert_eq!(down.bytes[at..at + 2], stored[from..from + 2]);
    }
}

#[test]
fn a_written_synthetic_model_reads_as_it_was() {
    for name in ["mixtral", "dbrx", "qwen2_moe", "arctic", "deepseek_v3"] {
        let spec = config::read(&fixture(name)).unwrap();
        let synthetic = Synthetic::new(&spec, 7);
        let mut stored = Stored::new();
        for (name, shape) in synthetic.tensors() {
            let mut bytes = vec![0; 2 * shape.iter().product::<usize>()];
            synthetic.fill(name, 0, &mut bytes).unwrap();
            stored.insert(name.to_owned(), (DType::BF16, shape.to_vec(), bytes));
        }
        let (_, published) = open(name);
        let names: HashSet<&str> = published.names().filter(|name| !name.contains("layers.3.")).collect();
        let made: HashSet<&str> = stored.keys().map(String::as_str).collect();
        assert!(name == "arctic" || names == made, "{name}");
        let folder = TempDir::new().unwrap();
        write(&folder.path().join("model.safetensors"), &stored);
        let checkpoint = Checkpoint::open(folder.path()).unwrap();
        for part in spec.parts() {
            assert_eq!(whole(&checkpoint, &spec, part), whole(&synthetic, &spec, part), "{name}: {part:?}");
        }
    }
}

/// Weights are known by their places, so no two parts may share one, but for tied embeddings.
#[test]
fn no_two_parts_have_one_place() {
    let fixtures = FIXTURES.iter().map(|name| (*name, open(name).0));
    let presets = PRESETS.iter().map(|(name, _)| (*name, preset(name).unwrap()));
    // A layer of LongCat-Flash is half of one that is published, under names that other families give to a whole one.
    let whole = |(name, _): &(&str, ModelSpec)| !name.starts_with("longcat");
    for (name, spec) in fixtures.chain(presets).filter(whole) {
        let mut places = HashMap::new();
        for part in spec.parts() {
            for (way, source) in spec.locate(part).sources.iter().enumerate() {
                let other = places.insert((way, source.place()), part);
                let tied = [Some(part), other].contains(&Some(Part::LmHead)) && spec.tie_embeddings;
                assert!(other.is_none() || tied, "{name}: {} is {part:?} and {other:?}", source.place());
            }
        }
    }
}

/// What a processor makes out of places alone are the numbers that are read.
#[test]
fn drawn_numbers_are_those_that_are_read() {
    let seed = env::test_seed();
    println!("EPSMOE_TEST_SEED={seed}");
    let mut random = Mix::new(seed);
    for name in ["dbrx", "qwen3_moe", "deepseek_v3", "gpt_oss", "arctic"] {
        let spec = config::read(&fixture(name)).unwrap();
        let synthetic = Synthetic::new(&spec, seed);
        for part in spec.parts() {
            let located = spec.locate(part);
            let tensor = whole(&synthetic, &spec, part);
            let [n, k] = [tensor.shape[0], tensor.shape.get(1).copied().unwrap_or(1)];
            let first = [random.below(n), random.below(k)];
            let window = Window { rows: Some(first[0]..n), columns: Some(first[1]..k) };
            let Some(drawn) = synthetic.drawn(&located, &window).unwrap() else {
                assert!(tensor.floats().iter().all(|&value| value == 1.0), "{name}: {part:?}");
                continue;
            };
            let piece = synthetic.read(&located, &window).unwrap().floats();
            for (at, value) in piece.into_iter().enumerate() {
                // Vectors are rows.
                let width = if tensor.shape.len() == 1 { n } else { k - first[1] };
                let [row, column] = [at / width, at % width].map(|at| at as u64);
                let index = drawn.first + row * drawn.row_step + column * drawn.column_step;
                let word = drawn.numbers.at(index / 4);
                let number = f32::from((word >> (16 * (index % 4))) as i16) * drawn.step;
                assert_eq!(value, bf16::from_f32(number).to_f32(), "{name}: {part:?}, element {at}");
            }
        }
    }
}

#[test]
fn synthetic_numbers_do_not_depend_on_the_range_asked_for() {
    let spec = preset("mixtral-mini").unwrap();
    let synthetic = Synthetic::new(&spec, 3);
    let name = "model.layers.1.self_attn.q_proj.weight";
    let mut all = vec![0; 2 * 64];
    synthetic.fill(name, 0, &mut all).unwrap();
    for first in 0..64 {
        for last in first..=64 {
            let mut piece = vec![0; 2 * (last - first)];
            synthetic.fill(name, first, &mut piece).unwrap();
            assert_eq!(piece, all[2 * first..2 * last], "{first}..{last}");
        }
    }
}

#[test]
fn synthetic_numbers_spread_as_their_layer_needs() {
    let spec = preset("mixtral-mini").unwrap();
    let synthetic = Synthetic::new(&spec, 3);
    let numbers = |part: Part| -> Vec<f64> {
        let tensor = whole(&synthetic, &spec, part);
        tensor.bytes.chunks_exact(2).map(|b| bf16::from_le_bytes([b[0], b[1]]).to_f64()).collect()
    };
    let deviation = |numbers: Vec<f64>| {
        let count = numbers.len() as f64;
        let mean = numbers.iter().sum::<f64>() / count;
        assert!(mean.abs() < 0.01, "{mean}");
        (numbers.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / count).sqrt()
    };
    let down = LayerPart::Expert(epsmoe_base::Expert(3), Map::DownProj).of(epsmoe_base::Layer(2));
    assert!((deviation(numbers(down)) * 1024f64.sqrt() - 1.0).abs() < 0.01);
    assert!((deviation(numbers(Part::Embedding)) - 1.0).abs() < 0.01);
    assert!(numbers(Part::FinalNorm).iter().all(|&x| x == 1.0));
    assert_ne!(
        numbers(down),
        numbers(LayerPart::Expert(epsmoe_base::Expert(4), Map::DownProj).of(epsmoe_base::Layer(2)))
    );
}

/// Three numbers that must never change, computed by a second implementation: checkpoints made from a seed are
/// made again from it, on any device.
#[test]
fn synthetic_numbers_are_stable() {
    let spec = preset("mixtral-mini").unwrap();
    let mut bytes = [0; 6];
    Synthetic::new(&spec, 3).fill("model.embed_tokens.weight", 1000, &mut bytes).unwrap();
    assert_eq!(bytes, [171, 191, 66, 63, 41, 62]);
}

// ---- refusals ----------------------------------------------------------------------------------------

/// A folder with one safetensors file of a header and zeros.
fn crafted(header: &str, data: usize) -> TempDir {
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend_from_slice(header.as_bytes());
    bytes.resize(bytes.len() + data, 0);
    with_file("model.safetensors", &bytes)
}

fn with_file(name: &str, bytes: &[u8]) -> TempDir {
    let folder = TempDir::new().unwrap();
    fs::write(folder.path().join(name), bytes).unwrap();
    folder
}

#[track_caller]
fn refused(folder: &TempDir, expected: &str) {
    let message = Checkpoint::open(folder.path()).unwrap_err().to_string();
    let message = message.replace(&folder.path().display().to_string(), "DIR");
    assert_eq!(message, format!("DIR{expected}"));
}

const DAMAGED: &str = "the file is damaged or incomplete: fetch it again";

#[track_caller]
fn header_refused(header: &str, data: usize, expected: &str) {
    refused(&crafted(header, data), &format!("/model.safetensors: {expected}; {DAMAGED}"));
}

#[test]
fn a_folder_without_weights() {
    refused(
        &TempDir::new().unwrap(),
        ": there is neither model.safetensors nor model.safetensors.index.json; give a folder with safetensors \
         weights, and convert other formats to safetensors first",
    );
}

#[test]
fn header_lengths() {
    refused(
        &with_file("model.safetensors", b"abc"),
        &format!("/model.safetensors: 3 bytes are too few for a header; {DAMAGED}"),
    );
    refused(
        &with_file("model.safetensors", &[0xff; 64]),
        &format!(
            "/model.safetensors: the header claims 18446744073709551615 bytes, of at most 56; {DAMAGED}"
        ),
    );
    let folder = with_file("model.safetensors", &200_000_000u64.to_le_bytes());
    let file = fs::OpenOptions::new().write(true).open(folder.path().join("model.safetensors")).unwrap();
    file.set_len(1 << 30).unwrap();
    refused(
        &folder,
        &format!("/model.safetensors: the header claims 200000000 bytes, of at most 100000000; {DAMAGED}"),
    );
}

#[test]
fn headers_that_are_no_headers() {
    header_refused("{", 0, "the header is not valid: EOF while parsing an object at line 1 column 1");
    header_refused(
        "[]",
        0,
        "the header is not valid: invalid type: sequence, expected tensors by name at line 1 column 0",
    );
    header_refused(
        r#"{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}"#,
        4,
        "the header is not valid: invalid value: integer `-1`, expected usize at line 1 column 31",
    );
    let one = r#""a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}"#;
    header_refused(
        &format!("{{{one},{one}}}"),
        4,
        "the header is not valid: tensor `a` is there twice at line 1 column 107",
    );
}

#[test]
fn an_unknown_format() {
    let folder = crafted(r#"{"a":{"dtype":"F31","shape":[1],"data_offsets":[0,4]}}"#, 4);
    let message = Checkpoint::open(folder.path()).unwrap_err().to_string();
    assert!(message.contains("the header is not valid: unknown variant `F31`, expected one of"), "{message}");
}

#[test]
fn offsets() {
    let two = |second: &str| {
        format!(
            r#"{{"a":{{"dtype":"F32","shape":[2],"data_offsets":[0,8]}},"b":{{"dtype":"F32","shape":[2],"data_offsets":{second}}}}}"#
        )
    };
    header_refused(
        &two("[4,12]"),
        12,
        "tensor `b` overlaps the one before it: it starts at byte 4, where 8 is due",
    );
    header_refused(
        &two("[12,20]"),
        20,
        "tensor `b` leaves a hole before it: it starts at byte 12, where 8 is due",
    );
    header_refused(&two("[8,12]"), 12, "tensor `b` has bytes 8..12, but shape [2] of F32 takes 8");
    header_refused(&two("[8,4]"), 12, "tensor `b` has bytes 8..4, but shape [2] of F32 takes 8");
    header_refused(&two("[8,16]"), 12, "its tensors take 16 bytes, but 12 follow the header");
    header_refused(&two("[8,16]"), 17, "its tensors take 16 bytes, but 17 follow the header");
}

#[test]
fn shapes_that_overflow() {
    header_refused(
        r#"{"a":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,0]}}"#,
        0,
        "tensor `a` has the impossible shape [4294967296, 4294967296]",
    );
    header_refused(
        r#"{"a":{"dtype":"F64","shape":[576460752303423488],"data_offsets":[0,0]}}"#,
        0,
        "tensor `a` has the impossible shape [576460752303423488]",
    );
}

#[test]
fn files_that_are_no_files() {
    let folder = TempDir::new().unwrap();
    symlink("/dev/zero", folder.path().join("model.safetensors")).unwrap();
    let message = Checkpoint::open(folder.path()).unwrap_err().to_string();
    assert!(message.ends_with("/model.safetensors: this is not a plain file"), "{message}");
    // What points to nothing is named, not passed over.
    let folder = TempDir::new().unwrap();
    symlink("/nowhere/blob", folder.path().join("model.safetensors")).unwrap();
    let message = Checkpoint::open(folder.path()).unwrap_err().to_string();
    assert!(message.contains("/model.safetensors: No such file"), "{message}");
    refused(
        &with_file(
            "model.safetensors",
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n",
        ),
        "/model.safetensors: this is a pointer to the weights, not the weights: fetch them with `git lfs pull`",
    );
}

/// A file of one tensor.
fn one(name: &str) -> Vec<u8> {
    let header = format!(r#"{{"{name}":{{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}}}"#);
    [&(header.len() as u64).to_le_bytes(), header.as_bytes(), &[0; 4]].concat()
}

/// A folder of files with one tensor each.
fn shards(files: &[(&str, &str)]) -> TempDir {
    let folder = TempDir::new().unwrap();
    for (file, tensor) in files {
        fs::write(folder.path().join(file), one(tensor)).unwrap();
    }
    folder
}

#[test]
fn shards_without_an_index() {
    let names = |files: &[(&str, &str)]| -> Vec<String> {
        let checkpoint = Checkpoint::open(shards(files).path()).unwrap();
        let mut names: Vec<String> = checkpoint.names().map(str::to_owned).collect();
        names.sort();
        names
    };
    // Files of anything else beside them are none of the model's.
    let beside = ("expected.safetensors", "b");
    assert_eq!(names(&[("model-00001-of-00001.safetensors", "a"), beside]), ["a"]);
    assert_eq!(
        names(&[
            ("model-00002-of-00002.safetensors", "a"),
            beside,
            ("model-00001-of-00002.safetensors", "c")
        ]),
        ["a", "c"]
    );
    assert_eq!(names(&[("whatever.safetensors", "a")]), ["a"]);
    assert_eq!(names(&[("model.safetensors", "a"), ("model-00001-of-00001.safetensors", "b")]), ["a"]);
    refused(
        &shards(&[("model-00001-of-00003.safetensors", "a"), ("model-00003-of-00003.safetensors", "b")]),
        ": shard 2 of 3 is missing: of `model` there are 2, and no model.safetensors.index.json; fetch what is missing",
    );
    refused(
        &shards(&[("a-00001-of-00001.safetensors", "a"), ("b-00001-of-00001.safetensors", "b")]),
        ": there are shards of `a` and of `b`, but no model.safetensors.index.json: fetch it",
    );
    refused(
        &shards(&[("a.safetensors", "a"), ("b.safetensors", "b")]),
        ": there are 2 safetensors files, but neither model.safetensors nor model.safetensors.index.json that says \
         which are the model's: fetch it",
    );
    let twice =
        shards(&[("model-00001-of-00002.safetensors", "a"), ("model-00002-of-00002.safetensors", "a")]);
    let message = Checkpoint::open(twice.path()).unwrap_err().to_string();
    assert!(
        message.contains("00002.safetensors: tensor `a` is in ") && message.contains("too; fetch both"),
        "{message}"
    );
}

#[test]
fn weights_of_other_formats_are_named() {
    refused(
        &with_file("mixtral.Q4_K_M.gguf", b"GGUF"),
        "/mixtral.Q4_K_M.gguf: the version takes 4 bytes, but there are 0 left; the file is damaged or incomplete: fetch \
         it again",
    );
    refused(
        &with_file("pytorch_model.bin", b"PK"),
        ": there is neither model.safetensors nor model.safetensors.index.json; `pytorch_model.bin` is not read: \
         convert it to safetensors first",
    );
    let folder = with_file("pytorch_model.bin", b"PK");
    let message = config::read(folder.path()).unwrap_err().to_string();
    assert!(message.contains(": there is no config.json; `pytorch_model.bin` is not read"), "{message}");
}

/// A fixture in one file, with other tensors.
fn spoilt(name: &str, spoil: impl FnOnce(&mut Stored)) -> (ModelSpec, Checkpoint, TempDir) {
    let (spec, checkpoint) = open(name);
    let mut stored = Stored::new();
    for name in checkpoint.names() {
        let found = checkpoint.find(name).unwrap().unwrap();
        let dtype = found.dtype.plain().unwrap();
        let mut bytes = vec![0; dtype.bytes() * found.shape.iter().product::<usize>()];
        checkpoint.fill(name, 0, &mut bytes).unwrap();
        stored.insert(name.to_owned(), (dtype, found.shape.to_vec(), bytes));
    }
    spoil(&mut stored);
    let folder = TempDir::new().unwrap();
    write(&folder.path().join("model.safetensors"), &stored);
    (spec, Checkpoint::open(folder.path()).unwrap(), folder)
}

#[test]
fn tensors_that_are_not_used_are_named_in_a_line() {
    for name in FIXTURES {
        let (spec, checkpoint) = open(name);
        let said = checkpoint.check(&spec).unwrap();
        let beyond = checkpoint.names().any(|name| name.contains(&format!("layers.{}.", spec.layers.len())));
        assert_eq!(said.is_some(), beyond, "{name}: {said:?}");
        assert!(said.is_none_or(|said| said.contains("layers after the last, from 3 on")));
    }
    let vector = || (DType::BF16, vec![2], vec![0; 4]);
    let said = |name: &str, extra: &[&str]| {
        let spoil =
            |stored: &mut Stored| stored.extend(extra.iter().map(|name| ((*name).to_owned(), vector())));
        let (spec, checkpoint, folder) = spoilt(name, spoil);
        let said = checkpoint.check(&spec).unwrap().unwrap_or_default();
        said.replace(&folder.path().display().to_string(), "DIR")
    };
    assert_eq!(
        said("qwen3_moe", &["lm_head.weight"]),
        "DIR: 1 tensor of the weights is not used by this model: `lm_head.weight`"
    );
    assert_eq!(
        said(
            "mixtral",
            &["model.layers.0.self_attn.q_proj.bias", "model.layers.1.self_attn.q_proj.bias", "a.b"]
        ),
        "DIR: 3 tensors of the weights are not used by this model: `a.b`, `model.layers.*.self_attn.q_proj.bias` (2)"
    );
    assert!(
        said("mixtral", &["a", "b", "c", "d", "e", "f"]).ends_with("`a`, `b`, `c`, `d` and 2 more kinds")
    );
    assert_eq!(said("mixtral", &["model.layers.1.self_attn.rotary_emb.inv_freq"]), "");
    let evil = said("mixtral", &["\u{1b}[2J", &"x".repeat(100_000)]);
    assert!(evil.contains("`\\u{1b}[2J`") && !evil.contains('\u{1b}') && evil.len() < 600, "{evil}");
}

#[test]
fn a_model_is_looked_for_before_it_is_read() {
    let checked = |spoil: &dyn Fn(&mut Stored)| {
        let (spec, checkpoint, folder) = spoilt("mixtral", spoil);
        let refused = checkpoint.check(&spec).unwrap_err().to_string();
        refused.replace(&folder.path().display().to_string(), "DIR")
    };
    let expert = "model.layers.1.block_sparse_moe.experts.3.w2.weight";
    let missing = checked(&|stored| drop(stored.remove(expert)));
    assert!(missing.starts_with(&format!("DIR: there is no tensor `{expert}` nor ")), "{missing}");
    let quantised = checked(&|stored| {
        let tensor = stored.remove(expert).unwrap();
        stored.insert(expert.replace(".weight", ".qweight"), tensor);
    });
    assert_eq!(
        quantised,
        format!(
            "DIR/model.safetensors: tensor `{expert}`: `{}` is BF16 of shape [64, 112], where weights [64, 112] need I32 of shape \
             [112, 8]; config.json and weights are of different models, or the file is damaged or incomplete: fetch it \
             again",
            expert.replace(".weight", ".qweight")
        )
    );
    let other =
        checked(&|stored| stored.get_mut("model.norm.weight").unwrap().1 = [vec![64], vec![1; 69]].concat());
    assert!(other.contains("`model.norm.weight` has shape [64, 1, 1, 1, 1, 1, 1, 1] and 62 more"), "{other}");
    let (spec, checkpoint) = open("mixtral_f16");
    assert_eq!(checkpoint.dtype(&spec), Some(DType::F16));
}

#[test]
fn names_from_files_do_no_harm_in_messages() {
    let (escape, long) = ("\\u001b[31m", "y".repeat(1 << 20));
    for name in [escape, &long] {
        let header = format!(
            r#"{{"{name}":{{"dtype":"F32","shape":[1],"data_offsets":[4,8]}},"a":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}}}"#
        );
        let index = format!(r#"{{"weight_map":{{"a":"{name}/.."}}}}"#);
        for folder in [
            crafted(&header, 8),
            crafted(&format!(r#"{{"a":{{"dtype":"{name}"}}}}"#), 0),
            with_file("model.safetensors.index.json", index.as_bytes()),
        ] {
            let message = Checkpoint::open(folder.path()).unwrap_err().to_string();
            assert!(
                !message.contains('\u{1b}') && message.len() < 1000,
                "{}",
                &message[..1000.min(message.len())]
            );
        }
    }
}

#[track_caller]
fn index_refused(weight_map: &str, expected: &str) {
    let folder =
        with_file("model.safetensors.index.json", format!(r#"{{"weight_map":{weight_map}}}"#).as_bytes());
    let one = r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}"#;
    fs::copy(crafted(one, 4).path().join("model.safetensors"), folder.path().join("one.safetensors"))
        .unwrap();
    refused(&folder, expected);
}

#[test]
fn indices() {
    for name in ["../one.safetensors", "/etc/passwd", "sub/one.safetensors", "one.safetensors/", ".", ""] {
        index_refused(
            &format!(r#"{{"a":"{name}"}}"#),
            &format!(
                "/model.safetensors.index.json: `{name}` is not the name of a file in this folder; do not trust this \
                 model"
            ),
        );
    }
    index_refused(
        r#"{"a":"one.safetensors","b":"two.safetensors"}"#,
        "/two.safetensors: the file is missing, but model.safetensors.index.json puts tensors there; fetch it",
    );
    index_refused(
        r#"{"a":"one.safetensors","b":"one.safetensors"}"#,
        "/one.safetensors: there is no tensor `b`, which model.safetensors.index.json puts here; fetch both again",
    );
    // What an index leaves out counts all the same.
    let folder = shards(&[("one.safetensors", "a")]);
    let index = folder.path().join("model.safetensors.index.json");
    fs::write(index, r#"{"metadata":{"total_size":NaN},"weight_map":{}}"#).unwrap();
    assert_eq!(Checkpoint::open(folder.path()).unwrap().names().count(), 0);
    let header = r#"{"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0]},"b":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}"#;
    let folder = crafted(header, 0);
    fs::rename(folder.path().join("model.safetensors"), folder.path().join("one.safetensors")).unwrap();
    let index = folder.path().join("model.safetensors.index.json");
    fs::write(index, r#"{"weight_map":{"a":"one.safetensors"}}"#).unwrap();
    assert_eq!(Checkpoint::open(folder.path()).unwrap().names().count(), 2);
    index_refused(
        "7",
        "/model.safetensors.index.json: no index (invalid type: integer `7`, expected a map at line 1 column 15); \
         fetch it again",
    );
}

#[test]
fn a_truncated_shard() {
    let folder = TempDir::new().unwrap();
    for file in fs::read_dir(fixture("mixtral")).unwrap().map(|file| file.unwrap().path()) {
        fs::copy(&file, folder.path().join(file.file_name().unwrap())).unwrap();
    }
    let shard = folder.path().join("model-00002-of-00009.safetensors");
    let file = fs::OpenOptions::new().write(true).open(shard).unwrap();
    file.set_len(100_000).unwrap();
    let message = Checkpoint::open(folder.path()).unwrap_err().to_string();
    assert!(
        message.contains("model-00002-of-00009.safetensors: its tensors take 114688 bytes, but 9"),
        "{message}"
    );
}

#[test]
fn weights_of_another_model() {
    let (_, checkpoint) = open("mixtral");
    let spec = config::read(&fixture("mixtral_f16")).unwrap();
    let place = fixture("mixtral").display().to_string();
    let refused = |spec: &ModelSpec, part: Part| {
        checkpoint.read(&spec.locate(part), &Window::whole()).unwrap_err().to_string().replace(&place, "DIR")
    };
    assert_eq!(
        refused(&spec, Part::FinalNorm),
        "DIR/model-00009-of-00009.safetensors: tensor `model.norm.weight` has shape [64], but config.json makes it \
         [48]; the two belong to different models: use the config.json that came with these weights"
    );
    let spec = config::read(&fixture("dbrx_clip")).unwrap();
    let expert = LayerPart::Expert(epsmoe_base::Expert(2), Map::UpProj).of(epsmoe_base::Layer(7));
    let spec = ModelSpec { layers: vec![spec.layers[0].clone(); 8], ..spec };
    assert_eq!(
        refused(&spec, expert),
        "DIR: there is no tensor `transformer.blocks.7.ffn.experts.mlp.v1` nor \
         `model.layers.7.mlp.experts.2.up_proj.weight` nor \
         `backbone.layers.7.mixer.experts.2.up_proj.weight` nor \
         `model.layers.7.block_sparse_moe.experts.2.w3.weight` nor `model.layers.7.mlp.experts.gate_up_proj` nor \
         `model.layers.7.experts.gate_up_proj` nor \
         `model.layers.7.block_sparse_moe.input_linear.weight` nor \
         `model.layers.7.feed_forward.experts.gate_up_proj` nor \
         `model.layers.7.feed_forward.experts.2.up_proj.weight`; the weights are incomplete or of another model than config.json: fetch both again"
    );
}

#[test]
fn formats_that_are_not_read() {
    let folder =
        crafted(r#"{"model.norm.weight":{"dtype":"F8_E4M3","shape":[64],"data_offsets":[0,64]}}"#, 64);
    let spec = config::read(&fixture("mixtral")).unwrap();
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    let message = checkpoint.read(&spec.locate(Part::FinalNorm), &Window::whole()).unwrap_err().to_string();
    assert!(
        message.ends_with(
            "tensor `model.norm.weight` is F8_E4M3, which holds no weights; the weights are damaged or of another \
             model than config.json: fetch both again"
        ),
        "{message}"
    );
}
