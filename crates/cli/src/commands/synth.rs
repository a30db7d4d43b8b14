//! `epsmoe synth`: random checkpoints, for tests and for measurements of models that are too large to fetch.

use crate::args::SynthArgs;
use crate::output;
use crate::tensors::{TensorPlan, write_header};
use crate::unfinished::{Unfinished, bytes_of, shards, write_index};
use anyhow::{Context, Result, bail};
use epsmoe_base::files::read_plain_text;
use epsmoe_base::{Bytes, by_threads, cores, count};
use epsmoe_model::{ModelError, Synthetic, WeightSource, config, preset_text};
use epsmoe_quant::StoredType;
use indicatif::ProgressBar;
use std::io::{self, Write};
use std::path::Path;
use std::slice;

/// Bytes that a core makes at a time.
const PIECE: usize = 4 << 20;

/// Writes the weights, then config.json: a folder without it is not finished.
pub(crate) fn run(args: &SynthArgs) -> Result<()> {
    let (name, text) = match (&args.preset, &args.config) {
        (Some(name), _) => (format!("preset {name}"), preset_text(name)?.to_owned()),
        (None, Some(file)) => (file.display().to_string(), read(file)?),
        (None, None) => bail!("give --preset or --config"),
    };
    let weights = Synthetic::new(&config::parse(text.as_bytes(), &name)?, args.seed);
    let tensor = |(name, shape): (&str, &[usize])| TensorPlan {
        name: name.to_owned(),
        dtype: StoredType::BF16,
        shape: shape.to_vec(),
    };
    let shards = shards(weights.tensors().map(tensor).collect(), args.max_shard_size.0, slice::from_ref);
    let total = shards.iter().map(|shard| bytes_of(&shard.items, slice::from_ref)).sum();

    let made = format!("seed {}, files of {} bytes\n{text}", args.seed, args.max_shard_size.0);
    let unfinished = Unfinished::open(&args.out, "synth", &made)?;
    let progress = output::byte_bar(format!("writing {}", args.out.display()), total);
    for shard in &shards {
        let file = args.out.join(&shard.file);
        // Files get their names when they are whole.
        if !file.exists() {
            output::write_file(&file, |out| write_shard(&weights, &shard.items, out, &progress))?;
        }
    }
    progress.finish_and_clear();
    write_index(&args.out, &shards, slice::from_ref)?;
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

fn write_shard(
    weights: &Synthetic,
    tensors: &[TensorPlan],
    out: &mut dyn Write,
    progress: &ProgressBar,
) -> io::Result<()> {
    write_header(out, tensors)?;
    for tensor in tensors {
        let bytes = tensor.bytes() as usize;
        let piece = |start: usize| {
            let mut piece = vec![0; PIECE.min(bytes - start)];
            weights.fill(&tensor.name, start / tensor.dtype.bytes(1), &mut piece)?;
            Ok::<_, ModelError>(piece)
        };
        let starts: Vec<usize> = (0..bytes).step_by(PIECE).collect();
        // As many pieces at a time as there are cores to make them.
        for starts in starts.chunks(cores()) {
            let pieces = by_threads(starts.len(), starts.len(), |at| piece(starts[at]));
            for piece in pieces.map_err(io::Error::other)? {
                out.write_all(&piece)?;
                progress.inc(piece.len() as u64);
            }
        }
    }
    Ok(())
}
