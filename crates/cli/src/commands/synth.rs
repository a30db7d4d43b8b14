//! `epsmoe synth`: random checkpoints, for tests and for measurements of models that are too large to fetch.

use crate::args::SynthArgs;
use crate::output;
use crate::tensors::{TensorPlan, write_header};
use anyhow::{Context, Result, bail};
use epsmoe_base::{Bytes, DType, count};
use epsmoe_model::{Synthetic, WeightSource, config, preset_text};
use indicatif::ProgressBar;
use serde_json::json;
use std::io::{self, Write};
use std::path::Path;

/// Bytes made at a time.
const PIECE: usize = 4 << 20;

/// Tensors of one file, and its name.
struct Shard {
    file: String,
    tensors: Vec<TensorPlan>,
}

/// Writes the weights, then config.json: a folder without it is not finished.
pub(crate) fn run(args: &SynthArgs) -> Result<()> {
    let (name, text) = match (&args.preset, &args.config) {
        (Some(name), _) => (format!("preset {name}"), preset_text(name)?.to_owned()),
        (None, Some(file)) => (file.display().to_string(), read(file)?),
        (None, None) => bail!("give --preset or --config"),
    };
    let weights = Synthetic::new(&config::parse(text.as_bytes(), &name)?, args.seed);
    let shards = shards(&weights, args.max_shard_size.0);
    let total: u64 = shards.iter().flat_map(|shard| &shard.tensors).map(TensorPlan::bytes).sum();

    prepare(&args.out)?;
    let progress = output::byte_bar(format!("writing {}", args.out.display()), total);
    for shard in &shards {
        output::write_file(&args.out.join(&shard.file), |out| write_shard(&weights, shard, out, &progress))?;
    }
    progress.finish_and_clear();
    if shards.len() > 1 {
        let index = serde_json::to_vec_pretty(&index(&shards, total))?;
        output::write_file(&args.out.join("model.safetensors.index.json"), |out| out.write_all(&index))?;
    }
    output::write_file(&args.out.join("config.json"), |out| out.write_all(text.as_bytes()))?;
    let (out, files) = (args.out.display(), count(shards.len(), "file"));
    output::remark(format_args!(
        "wrote {name} with seed {}, {} in {files}, to {out}",
        args.seed,
        Bytes(total)
    ));
    Ok(())
}

/// A configuration file of bearable size; pipes and devices may never end.
fn read(file: &Path) -> Result<String> {
    const LIMIT: u64 = 16 << 20;
    let failed = || format!("cannot read {}", file.display());
    let metadata = std::fs::metadata(file).with_context(failed)?;
    if !metadata.is_file() || metadata.len() > LIMIT {
        bail!("{} is not a config.json: give the file of a model", file.display());
    }
    std::fs::read_to_string(file).with_context(failed)
}

/// Makes the folder; refuses one that has something in it, which could be mistaken for part of the checkpoint.
fn prepare(out: &Path) -> Result<()> {
    std::fs::create_dir_all(out).with_context(|| format!("cannot make the folder {}", out.display()))?;
    let mut entries = out.read_dir().with_context(|| format!("cannot read the folder {}", out.display()))?;
    if entries.next().is_some() {
        bail!("{} is not empty: give a new folder", out.display());
    }
    Ok(())
}

/// Tensors in order, as many to a file as fit.
fn shards(weights: &Synthetic, most_bytes: u64) -> Vec<Shard> {
    let mut groups: Vec<Vec<TensorPlan>> = Vec::new();
    let mut room = 0;
    for (name, shape) in weights.tensors() {
        let tensor = TensorPlan { name: name.to_owned(), dtype: DType::BF16, shape: shape.to_vec() };
        let bytes = tensor.bytes();
        match groups.last_mut().filter(|_| bytes <= room) {
            Some(group) => group.push(tensor),
            None => {
                room = most_bytes.max(bytes);
                groups.push(vec![tensor]);
            }
        }
        room -= bytes;
    }
    let count = groups.len();
    let file = |index: usize| match count {
        1 => "model.safetensors".to_owned(),
        _ => format!("model-{:05}-of-{count:05}.safetensors", index + 1),
    };
    groups.into_iter().enumerate().map(|(index, tensors)| Shard { file: file(index), tensors }).collect()
}

fn write_shard(
    weights: &Synthetic,
    shard: &Shard,
    out: &mut dyn Write,
    progress: &ProgressBar,
) -> io::Result<()> {
    write_header(out, &shard.tensors)?;
    let mut piece = vec![0; PIECE];
    for tensor in &shard.tensors {
        let bytes = tensor.bytes() as usize;
        for start in (0..bytes).step_by(PIECE) {
            let piece = &mut piece[..PIECE.min(bytes - start)];
            weights.fill(&tensor.name, start / tensor.dtype.bytes(), piece).map_err(io::Error::other)?;
            out.write_all(piece)?;
            progress.inc(piece.len() as u64);
        }
    }
    Ok(())
}

/// Which file has which tensor.
fn index(shards: &[Shard], total: u64) -> serde_json::Value {
    let entries = shards.iter().flat_map(|shard| {
        let entry = |tensor: &TensorPlan| (tensor.name.clone(), json!(shard.file));
        shard.tensors.iter().map(entry)
    });
    let weight_map: serde_json::Map<String, serde_json::Value> = entries.collect();
    json!({ "metadata": { "total_size": total }, "weight_map": weight_map })
}
