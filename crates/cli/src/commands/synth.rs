//! `epsmoe synth`: random checkpoints, for tests and for measurements of models that are too large to fetch.

use crate::args::SynthArgs;
use crate::output;
use crate::tensors::{TensorPlan, write_header};
use anyhow::{Context, Result, bail};
use epsmoe_base::files::{PART, read_plain_text};
use epsmoe_base::{Bytes, DType, count};
use epsmoe_model::{Synthetic, WeightSource, config, preset_text};
use indicatif::ProgressBar;
use serde_json::json;
use std::ffi::OsString;
use std::fs::{File, OpenOptions, TryLockError};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

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

    let made = format!("{}seed {}, files of {} bytes\n{text}", NOTE, args.seed, args.max_shard_size.0);
    let unfinished = Unfinished::open(&args.out, &made)?;
    let progress = output::byte_bar(format!("writing {}", args.out.display()), total);
    for shard in &shards {
        let file = args.out.join(&shard.file);
        // Files get their names when they are whole.
        if !file.exists() {
            output::write_file(&file, |out| write_shard(&weights, shard, out, &progress))?;
        }
    }
    progress.finish_and_clear();
    if shards.len() > 1 {
        let index = serde_json::to_vec_pretty(&index(&shards, total))?;
        output::write_file(&args.out.join("model.safetensors.index.json"), |out| out.write_all(&index))?;
    }
    output::write_file(&args.out.join("config.json"), |out| out.write_all(text.as_bytes()))?;
    unfinished.finish()?;
    let (out, files) = (args.out.display(), count(shards.len(), "file"));
    output::remark(format_args!(
        "wrote {name} with seed {}, {} in {files}, to {out}",
        args.seed,
        Bytes(total)
    ));
    Ok(())
}

/// A configuration file of bearable size.
fn read(file: &Path) -> Result<String> {
    const LIMIT: u64 = 16 << 20;
    read_plain_text(file, LIMIT)
        .with_context(|| format!("{} is not a config.json: give the file of a model", file.display()))
}

/// A checkpoint's folder while its files are made. A hidden file in it says what of, and is locked as long as somebody
/// writes: whoever comes after an interruption goes on, whoever comes meanwhile is refused.
struct Unfinished {
    note: PathBuf,
    /// Holds the lock.
    _locked: File,
}

/// The hidden file, and how it begins.
const NOTE_NAME: &str = ".epsmoe-synth";
const NOTE: &str = "`epsmoe synth` has not finished this checkpoint: ";

impl Unfinished {
    /// Makes the folder, or takes up one in which the same checkpoint was begun. Refuses any other that has something in
    /// it, which could be mistaken for part of the checkpoint.
    fn open(folder: &Path, made: &str) -> Result<Self> {
        let shown = folder.display();
        std::fs::create_dir_all(folder).with_context(|| format!("cannot make the folder {shown}"))?;
        let note = folder.join(NOTE_NAME);
        if !note.exists() && !entries(folder)?.is_empty() {
            bail!("{shown} is not empty: give a new folder");
        }
        let failed = || format!("cannot write {}", note.display());
        let locked = OpenOptions::new().append(true).read(true).create(true).open(&note);
        let mut locked = locked.with_context(failed)?;
        match locked.try_lock() {
            Err(TryLockError::WouldBlock) => {
                bail!("another `epsmoe synth` is writing to {shown}: give a new folder")
            }
            Err(TryLockError::Error(error)) => return Err(error).with_context(failed),
            Ok(()) => {}
        }
        // Whoever had the lock may have finished since.
        let names = entries(folder)?;
        if !names.iter().any(|name| name == NOTE_NAME) {
            bail!("{shown} is not empty: give a new folder");
        }
        let limit = made.len() as u64 + 1;
        let mut begun = String::new();
        (&locked).take(limit).read_to_string(&mut begun).with_context(failed)?;
        match begun.as_str() {
            begun if names.len() == 1 && made.starts_with(begun) => {
                let rest = &made.as_bytes()[begun.len()..];
                locked.write_all(rest).and_then(|()| locked.sync_all()).with_context(failed)?;
            }
            begun if begun == made => remove_parts(folder, &names)?,
            _ => bail!(
                "{shown} has the beginning of another checkpoint: give the flags with which that was begun, or a new folder"
            ),
        }
        Ok(Unfinished { note, _locked: locked })
    }

    fn finish(self) -> Result<()> {
        std::fs::remove_file(&self.note).with_context(|| format!("cannot remove {}", self.note.display()))
    }
}

/// Names in a folder.
fn entries(folder: &Path) -> Result<Vec<OsString>> {
    let entries = folder.read_dir().and_then(|entries| entries.map(|entry| Ok(entry?.file_name())).collect());
    entries.with_context(|| format!("cannot read the folder {}", folder.display()))
}

/// Removes what an interruption left of files that were not whole.
fn remove_parts(folder: &Path, names: &[OsString]) -> Result<()> {
    for name in names.iter().filter(|name| name.to_string_lossy().ends_with(PART)) {
        let part = folder.join(name);
        std::fs::remove_file(&part).with_context(|| format!("cannot remove {}", part.display()))?;
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
