//! `epsmoe convert`: a checkpoint in codes, as others read it too.

use crate::args::{ConvertArgs, ModelArgs};
use crate::locate::{Place, locate};
use crate::output;
use crate::tensors::{TensorPlan, write_header};
use crate::unfinished::{Shard, Unfinished, bytes_of, shards, write_index};
use anyhow::{Context, Result, anyhow, bail};
use epsmoe_base::files::read_plain;
use epsmoe_base::{Bytes, by_threads, cores, count, json};
use epsmoe_device::WeightShape;
use epsmoe_model::config::{self, Config};
use epsmoe_model::{
    Checkpoint, ModelError, ModelSpec, Part, Source, Tensor, Turn, WeightSource, Window, gguf_file,
};
use epsmoe_quant::{QuantError, StoredTensor, StoredType, Target};
use indicatif::ProgressBar;
use serde_json::{Map, Value};
use std::collections::HashMap;
use std::io::{self, Write};
use std::path::Path;

/// Endings of files that a model's folder has beside its weights: tokenizers, templates, settings, code, licences.
const COPIED: [&str; 8] = ["json", "jinja", "txt", "model", "tiktoken", "py", "md", "LICENSE"];
/// Files that say something about the weights that is no longer true.
const LEFT: [&str; 5] = [
    config::FILE,
    "model.safetensors.index.json",
    "quantize_config.json",
    "quant_config.json",
    "hf_quant_config.json",
];
const TEMPLATES: &str = "additional_chat_templates";
/// Bytes that such a file may have.
const FILE_LIMIT: u64 = 256 << 20;

/// A stored tensor of the new checkpoint's plain twin, and what becomes of it.
struct Item {
    name: String,
    /// Matrices on top of each other, each coded for itself; what is not coded is one.
    matrices: usize,
    /// Rows and columns of each; a vector is one column.
    shape: [usize; 2],
    parts: Vec<Piece>,
    /// What it is stored as.
    coding: Option<Target>,
    tensors: Vec<TensorPlan>,
}

/// A part of the model, and which rows of the tensor it is, or which columns of its rows.
struct Piece {
    part: Part,
    first: usize,
    turn: Turn,
    transposed: bool,
}

impl Item {
    fn tensors(&self) -> &[TensorPlan] {
        &self.tensors
    }
}

/// Writes the weights, then config.json: a folder without it is not finished.
pub(crate) fn run(args: &ConvertArgs) -> Result<()> {
    let model = ModelArgs { revision: args.revision.clone(), ..ModelArgs::of(&args.input) };
    let Place::Folder(folder) = locate(&model.model, &model.revision)? else {
        bail!("{} has no files: write them with `epsmoe synth` first", args.input);
    };
    if gguf_file(&folder)?.is_some() {
        bail!("{} is a GGUF file: give the folder of the model that it was made of", folder.display());
    }
    let Config { spec, remarks, .. } = Config::read(&folder)?;
    let weights = Checkpoint::open(&folder)?;
    remarks.iter().chain(&weights.check(&spec)?).for_each(output::warn);
    let items = items(&spec, &weights, args.quantization)?;
    let coded = items.iter().filter(|item| item.coding.is_some()).count();
    if coded == 0 {
        bail!(
            "no matrix of {} has rows of whole groups of 32: {} has no codes for it",
            args.input,
            args.quantization
        );
    }
    let config = new_config(&folder, &items, args.quantization)?;
    let shards = shards(items, args.max_shard_size.0, Item::tensors);
    let total = shards.iter().map(|shard| bytes_of(&shard.items, Item::tensors)).sum();

    let (from, most) = (folder.display(), args.max_shard_size.0);
    let made = format!("{from} as {}, files of {most} bytes\n{config}", args.quantization);
    let unfinished = Unfinished::open(&args.out, "convert", &made)?;
    let progress = output::byte_bar(format!("writing {}", args.out.display()), total);
    for shard in &shards {
        let file = args.out.join(&shard.file);
        // Files get their names when they are whole.
        if file.exists() {
            progress.inc(bytes_of(&shard.items, Item::tensors));
            continue;
        }
        output::write_file(&file, |out| write_shard(&spec, &weights, shard, out, &progress))?;
    }
    progress.finish_and_clear();
    write_index(&args.out, &shards, Item::tensors)?;
    copy_files(&folder, &args.out)?;
    output::write_file(&args.out.join(config::FILE), |out| out.write_all(config.as_bytes()))?;
    unfinished.finish()?;
    output::remark(format_args!(
        "wrote {} as {}: {} in codes, {} in {}, to {}",
        args.input,
        args.quantization,
        count(coded, "map"),
        Bytes(total),
        count(shards.len(), "file"),
        args.out.display()
    ));
    Ok(())
}

/// The tensors of the model under the names that its architecture is published with.
fn items(spec: &ModelSpec, weights: &Checkpoint, target: Target) -> Result<Vec<Item>> {
    let mut items: Vec<Item> = Vec::new();
    let mut by_name: HashMap<String, usize> = HashMap::new();
    for part in spec.parts() {
        let located = spec.locate(part);
        let width = |to: &Source| match located.shape {
            WeightShape::Vector { .. } => 1,
            _ => to.shape.last().copied().unwrap_or(1),
        };
        let coded = located.place_of_codes();
        let fits = part.is_quantised() && matches!(coded.shape.len(), 2 | 3) && target.fits(width(coded));
        let (to, coding) = if fits { (coded, Some(target)) } else { (&located.sources[0], None) };
        let piece = Piece { part, first: to.first_row, turn: to.turn, transposed: to.transposed };
        if let Some(&index) = by_name.get(&to.name) {
            items[index].parts.push(piece);
            continue;
        }
        by_name.insert(to.name.clone(), items.len());
        let Some((_, kept)) = weights.kept(&located)? else {
            bail!("there is no tensor `{}`: this is a bug", to.name);
        };
        let columns = width(to);
        let rows = to.shape.iter().product::<usize>() / columns.max(1);
        let matrices = if coding.is_some() && to.shape.len() == 3 { to.shape[0] } else { 1 };
        let shape = [rows / matrices.max(1), columns];
        let tensors = match coding {
            Some(target) => stacked(target.tensors(&to.name, shape), &to.shape[..to.shape.len() - 2]),
            None => {
                let dtype = StoredType::of(kept.dtype());
                vec![(to.name.clone(), StoredTensor { dtype, shape: to.shape.clone() })]
            }
        };
        let plan = |(name, tensor): (String, StoredTensor)| TensorPlan {
            name,
            dtype: tensor.dtype,
            shape: tensor.shape,
        };
        let tensors = tensors.into_iter().map(plan).collect();
        items.push(Item { name: to.name.clone(), matrices, shape, parts: vec![piece], coding, tensors });
    }
    Ok(items)
}

/// The tensors of matrices on top of each other, `lead` of them. What tells the shape of one tells that of all.
fn stacked(tensors: Vec<(String, StoredTensor)>, lead: &[usize]) -> Vec<(String, StoredTensor)> {
    let of_all = |(name, tensor): (String, StoredTensor)| match tensor.dtype {
        StoredType::I64 => (name, tensor),
        _ => (name, StoredTensor { shape: [lead, &tensor.shape].concat(), ..tensor }),
    };
    tensors.into_iter().map(of_all).collect()
}

/// config.json, with how the weights are coded now.
fn new_config(folder: &Path, items: &[Item], target: Target) -> Result<String> {
    let path = folder.join(config::FILE);
    let text =
        read_plain(&path, config::FILE_LIMIT).with_context(|| format!("cannot read {}", path.display()))?;
    let mut keys: Map<String, Value> = serde_json::from_slice(&json::from_python(&text))
        .with_context(|| format!("{} is not valid JSON", path.display()))?;
    let plain = items.iter().filter(|item| item.coding.is_none() && item.shape[1] > 1);
    // Embeddings and norms are no linear maps, which nobody expects to be coded.
    let modules = plain.filter_map(|item| item.name.strip_suffix(".weight"));
    let modules = modules.filter(|name| !name.ends_with("embed_tokens") && !name.ends_with("wte"));
    let modules: Vec<String> = modules.map(str::to_owned).collect();
    if let Some(Value::Object(inner)) = keys.get_mut("text_config") {
        inner.remove("quantization_config");
    }
    keys.insert("quantization_config".into(), target.config(&modules));
    Ok(serde_json::to_string_pretty(&keys)? + "\n")
}

fn write_shard(
    spec: &ModelSpec,
    weights: &Checkpoint,
    shard: &Shard<Item>,
    out: &mut dyn Write,
    progress: &ProgressBar,
) -> io::Result<()> {
    write_header(out, shard.items.iter().flat_map(|item| &item.tensors))?;
    for item in &shard.items {
        let mut write = |bytes: &[u8]| {
            progress.inc(bytes.len() as u64);
            out.write_all(bytes)
        };
        match item.coding {
            Some(target) => {
                let coded = coded(spec, weights, item, target)?;
                coded.iter().try_for_each(|bytes| write(bytes))?;
            }
            None => write(&matrix(spec, weights, item, 0).map_err(io::Error::other)?.bytes)?,
        }
    }
    Ok(())
}

/// The bytes of an item's tensors, matrix by matrix.
fn coded(spec: &ModelSpec, weights: &Checkpoint, item: &Item, target: Target) -> io::Result<Vec<Vec<u8>>> {
    let mut all: Vec<Vec<u8>> = vec![Vec::new(); item.tensors.len()];
    for number in 0..item.matrices {
        let floats = matrix(spec, weights, item, number).map_err(io::Error::other)?.floats();
        let of_one = in_bands(target, item, &floats).map_err(io::Error::other)?;
        for (all, bytes) in all.iter_mut().zip(of_one) {
            all.extend(bytes);
        }
    }
    // What says the shape says it once.
    let shapes = all.iter_mut().zip(&item.tensors).filter(|(_, tensor)| tensor.dtype == StoredType::I64);
    shapes.for_each(|(bytes, _)| *bytes = item.shape.map(|width| (width as i64).to_le_bytes()).concat());
    for (bytes, tensor) in all.iter().zip(&item.tensors) {
        debug_assert_eq!(bytes.len() as u64, tensor.bytes());
    }
    Ok(all)
}

/// The bytes that one matrix of an item adds to its tensors, coded by all cores, some rows each.
fn in_bands(target: Target, item: &Item, weights: &[f32]) -> Result<Vec<Vec<u8>>, QuantError> {
    let [rows, columns] = item.shape;
    // Blocks of rows stay whole.
    let band = rows.div_ceil(cores()).next_multiple_of(BAND) * columns;
    let bands: Vec<&[f32]> = weights.chunks(band).collect();
    let coded = by_threads(cores(), bands.len(), |at| target.encode(&item.name, bands[at], columns))?;
    let mut bytes: Vec<Vec<u8>> = vec![Vec::new(); item.tensors.len()];
    for band in coded {
        for (bytes, coded) in bytes.iter_mut().zip(band) {
            bytes.extend(coded.bytes);
        }
    }
    Ok(bytes)
}

/// Rows that no band cuts: those of the largest block.
const BAND: usize = 128;

/// One matrix of a tensor, out of its parts.
fn matrix(spec: &ModelSpec, weights: &Checkpoint, item: &Item, number: usize) -> Result<Tensor, ModelError> {
    let [rows, columns] = item.shape;
    let above = number * rows;
    let mut whole: Option<Tensor> = None;
    for &Piece { part, first, turn: Turn { at, of }, transposed } in
        item.parts.iter().filter(|piece| (above..above + rows).contains(&piece.first))
    {
        let tensor = weights.read(&spec.locate(part), &Window::whole())?;
        let tensor = if transposed { tensor.transposed() } else { tensor };
        let (size, width) = (tensor.dtype.bytes(), tensor.shape.last().copied().unwrap_or(1));
        let whole = whole.get_or_insert_with(|| Tensor {
            dtype: tensor.dtype,
            shape: item.shape.to_vec(),
            bytes: vec![0; rows * columns * size],
        });
        // A vector is rows of one element.
        let width = if columns == 1 { 1 } else { width };
        for (i, from) in tensor.bytes.chunks_exact((width * size).max(1)).enumerate() {
            let row = first - above;
            if !transposed {
                let to = (row + at + i * of) * columns * size;
                whole.bytes[to..to + from.len()].copy_from_slice(from);
                continue;
            }
            for (j, element) in from.chunks_exact(size).enumerate() {
                let to = ((row + i) * columns + at + j * of) * size;
                whole.bytes[to..to + size].copy_from_slice(element);
            }
        }
    }
    Ok(whole.expect("a matrix has parts; this is a bug"))
}

/// What the folder has beside its weights.
fn copy_files(from: &Path, to: &Path) -> Result<()> {
    copy_some(from, to)?;
    if from.join(TEMPLATES).is_dir() {
        let to = to.join(TEMPLATES);
        std::fs::create_dir_all(&to).with_context(|| format!("cannot make the folder {}", to.display()))?;
        copy_some(&from.join(TEMPLATES), &to)?;
    }
    Ok(())
}

fn copy_some(from: &Path, to: &Path) -> Result<()> {
    let failed = || anyhow!("cannot read the folder {}", from.display());
    for entry in from.read_dir().with_context(failed)? {
        let path = entry.with_context(failed)?.path();
        let Some(name) = path.file_name().and_then(|name| name.to_str()) else { continue };
        let ending = name.rsplit('.').next().unwrap_or_default();
        if path.is_file() && COPIED.contains(&ending) && !LEFT.contains(&name) {
            let bytes =
                read_plain(&path, FILE_LIMIT).with_context(|| format!("cannot read {}", path.display()))?;
            output::write_file(&to.join(name), |out| out.write_all(&bytes))?;
        }
    }
    Ok(())
}
