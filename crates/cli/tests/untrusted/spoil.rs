//! Spoiled files.

use crate::readers;
use epsmoe_base::{Mix, env};
use serde_json::{Value, json};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::Path;
use std::time::{Duration, Instant};

/// Gives a reader spoiled copies of a file of every fixture.
fn spoil(file: &str, read: fn(&[u8])) {
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures");
    let folders = std::fs::read_dir(fixtures).unwrap();
    let files = folders.filter_map(|folder| std::fs::read(folder.unwrap().path().join(file)).ok());
    spoil_all(file, &files.collect::<Vec<_>>(), read);
}

fn spoil_all(what: &str, originals: &[Vec<u8>], read: fn(&[u8])) {
    assert!(!originals.is_empty(), "no fixture has a {what}");
    let seed = env::test_seed();
    println!("{what}: EPSMOE_TEST_SEED={seed}");
    let mut mix = Mix::new(seed);
    let begun = Instant::now();
    originals.iter().for_each(|original| read(original));
    while begun.elapsed() < Duration::from_secs(1) {
        let mut bytes = originals[mix.below(originals.len())].clone();
        for _ in 0..=mix.below(3) {
            bytes = spoiled(&mut mix, bytes);
        }
        if let Err(panic) = catch_unwind(AssertUnwindSafe(|| read(&bytes))) {
            eprintln!("{what}, seed {seed}: {}", String::from_utf8_lossy(&bytes));
            resume_unwind(panic);
        }
    }
}

/// A change of the JSON, if it is JSON, or of some bytes.
fn spoiled(mix: &mut Mix, mut bytes: Vec<u8>) -> Vec<u8> {
    if mix.below(4) > 0
        && let Ok(mut value) = serde_json::from_slice::<Value>(&bytes)
    {
        let part = random_part(mix, &value);
        spoil_value(mix, &mut value, part);
        return value.to_string().into_bytes();
    }
    let at = mix.below(bytes.len() + 1);
    match mix.below(4) {
        0 => bytes.truncate(at),
        1 => bytes.insert(at, mix.next_u64() as u8),
        2 => {
            let piece = bytes[at..bytes.len().min(at + 1 + mix.below(40))].to_vec();
            let to = mix.below(bytes.len() + 1);
            bytes.splice(to..to, piece);
        }
        _ => {
            if let Some(byte) = bytes.get_mut(at) {
                *byte ^= 1 << mix.below(8);
            }
        }
    }
    bytes
}

/// Somewhere in a value.
fn random_part(mix: &mut Mix, value: &Value) -> Value {
    let inside: Vec<&Value> = match value {
        Value::Array(values) => values.iter().collect(),
        Value::Object(map) => map.values().collect(),
        _ => return value.clone(),
    };
    if inside.is_empty() || mix.below(5) == 0 {
        return value.clone();
    }
    let chosen = inside[mix.below(inside.len())];
    random_part(mix, chosen)
}

/// Changes one thing somewhere in `value`; `part` is another part of the same file.
fn spoil_value(mix: &mut Mix, value: &mut Value, part: Value) {
    if mix.below(5) > 0 {
        let inside: Vec<&mut Value> = match value {
            Value::Array(values) => values.iter_mut().collect(),
            Value::Object(map) => map.values_mut().collect(),
            _ => Vec::new(),
        };
        let chosen = mix.below(inside.len().max(1));
        if let Some(inside) = inside.into_iter().nth(chosen) {
            return spoil_value(mix, inside, part);
        }
    }
    let chosen = match value {
        Value::Object(map) if !map.is_empty() => map.keys().nth(mix.below(map.len())).cloned(),
        _ => None,
    };
    match (mix.below(3), chosen, &mut *value) {
        (0, Some(key), Value::Object(map)) => drop(map.remove(&key)),
        (0, _, Value::Array(values)) => drop(values.pop()),
        (1, _, Value::Array(values)) => values.push(part),
        (1, ..) => *value = part,
        _ => *value = extreme(mix),
    }
}

fn extreme(mix: &mut Mix) -> Value {
    match mix.below(16) {
        0 => Value::Null,
        1 => json!(0),
        2 => json!(-1),
        3 => json!(1),
        4 => json!(u64::MAX),
        5 => json!(i64::MIN),
        6 => json!(1_u64 << mix.below(64)),
        7 => json!(1e308),
        8 => json!(-1e-308),
        9 => json!(0.5),
        10 => json!(true),
        11 => json!(""),
        12 => json!("../../etc/passwd"),
        13 => json!("\u{0}\u{202e}".repeat(1 + mix.below(1000))),
        14 => (0..mix.below(100)).fold(json!([]), |inside, _| json!([inside])),
        _ => json!({}),
    }
}

macro_rules! files {
    ($($reader:ident: $file:literal),* $(,)?) => {$(
        #[test]
        fn $reader() {
            spoil($file, readers::$reader);
        }
    )*};
}

files! {
    config: "config.json",
    weights_index: "model.safetensors.index.json",
    safetensors_header: "model.safetensors",
    tokenizer: "tokenizer.json",
    tokenizer_config: "tokenizer_config.json",
    chat_template: "chat_template.jinja",
    generation_config: "generation_config.json",
}

/// A header whose length is right, so that what is spoiled is what it says.
#[test]
fn safetensors_layout() {
    fn file(header: &[u8]) {
        let length = (header.len() as u64).to_le_bytes();
        readers::safetensors_header(&[&length, header, &[0; 24]].concat());
    }
    let header = json!({
        "__metadata__": { "format": "pt" },
        "a": { "dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16] },
        "b": { "dtype": "BF16", "shape": [4], "data_offsets": [16, 24] },
    });
    spoil_all("header", &[header.to_string().into_bytes()], file);
}

/// Files with this ending among those that hold every coding.
fn coded(ending: &str) -> Vec<Vec<u8>> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../quant/tests/golden");
    let mut paths: Vec<_> = std::fs::read_dir(folder).unwrap().map(|file| file.unwrap().path()).collect();
    paths.retain(|path| path.extension().is_some_and(|extension| extension == ending));
    paths.sort();
    paths.iter().map(|path| std::fs::read(path).unwrap()).collect()
}

#[test]
fn quantised() {
    spoil_all("coded tensor", &coded("safetensors"), readers::quantised);
}

#[test]
fn gguf() {
    // One with a model and a vocabulary in its header, too.
    let fixture = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/gguf/dbrx_clip.gguf");
    let files = [coded("gguf"), vec![std::fs::read(fixture).unwrap()]].concat();
    spoil_all("GGUF file", &files, readers::gguf);
}

#[test]
fn quantisation_config() {
    let section = json!({
        "quant_method": "compressed-tensors", "format": "pack-quantized", "sparsity_config": { "format": "dense" },
        "config_groups": { "group_0": { "weights": { "num_bits": 4, "strategy": "group", "group_size": 32 } } },
    });
    let fp8 =
        json!({ "quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic" });
    let gptq = json!({ "quant_method": "gptq", "bits": 4, "group_size": -1, "dynamic": {}, "checkpoint_format": "gptq" });
    let sections = [section, fp8, gptq].map(|section| section.to_string().into_bytes());
    spoil_all("quantization_config", &sections, readers::quantisation_config);
}
