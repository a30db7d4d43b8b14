//! Writing a checkpoint's folder: files of bearable size that appear when they are whole, and a command that was interrupted
//! goes on where it was.

use crate::output;
use crate::tensors::TensorPlan;
use anyhow::{Context, Result, bail};
use epsmoe_base::files::PART;
use serde_json::json;
use std::ffi::OsString;
use std::fs::{File, OpenOptions, TryLockError};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};

/// A checkpoint's folder while its files are made. A hidden file in it says what of, and is locked as long as somebody
/// writes: whoever comes after an interruption goes on, whoever comes meanwhile is refused.
pub(crate) struct Unfinished {
    note: PathBuf,
    /// Holds the lock.
    _locked: File,
}

impl Unfinished {
    /// Makes the folder, or takes up one in which the same checkpoint was begun. Refuses any other that has something in
    /// it, which could be mistaken for part of the checkpoint. `made` is what `command` makes.
    pub(crate) fn open(folder: &Path, command: &str, made: &str) -> Result<Self> {
        let shown = folder.display();
        let note_name = format!(".epsmoe-{command}");
        let made = format!("`epsmoe {command}` has not finished this checkpoint: {made}");
        std::fs::create_dir_all(folder).with_context(|| format!("cannot make the folder {shown}"))?;
        let note = folder.join(&note_name);
        if !note.exists() && !entries(folder)?.is_empty() {
            bail!("{shown} is not empty: give a new folder");
        }
        let failed = || format!("cannot write {}", note.display());
        let locked = OpenOptions::new().append(true).read(true).create(true).open(&note);
        let mut locked = locked.with_context(failed)?;
        match locked.try_lock() {
            Err(TryLockError::WouldBlock) => {
                bail!("another `epsmoe {command}` is writing to {shown}: give a new folder")
            }
            Err(TryLockError::Error(error)) => return Err(error).with_context(failed),
            Ok(()) => {}
        }
        // Whoever had the lock may have finished since.
        let names = entries(folder)?;
        if !names.iter().any(|name| *name == *note_name) {
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

    pub(crate) fn finish(self) -> Result<()> {
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

/// A file, and what is written to it, an item after the other.
pub(crate) struct Shard<T> {
    pub(crate) file: String,
    pub(crate) items: Vec<T>,
}

/// Bytes of all tensors of some items.
pub(crate) fn bytes_of<T>(items: &[T], tensors: impl Fn(&T) -> &[TensorPlan]) -> u64 {
    items.iter().flat_map(tensors).map(TensorPlan::bytes).sum()
}

/// Items in order, as many to a file as fit.
pub(crate) fn shards<T>(
    items: Vec<T>,
    most_bytes: u64,
    tensors: impl Fn(&T) -> &[TensorPlan],
) -> Vec<Shard<T>> {
    let mut groups: Vec<Vec<T>> = Vec::new();
    let mut room = 0;
    for item in items {
        let bytes = tensors(&item).iter().map(TensorPlan::bytes).sum();
        match groups.last_mut().filter(|_| bytes <= room) {
            Some(group) => group.push(item),
            None => {
                room = most_bytes.max(bytes);
                groups.push(vec![item]);
            }
        }
        room -= bytes;
    }
    let count = groups.len();
    let file = |index: usize| match count {
        1 => "model.safetensors".to_owned(),
        _ => format!("model-{:05}-of-{count:05}.safetensors", index + 1),
    };
    groups.into_iter().enumerate().map(|(index, items)| Shard { file: file(index), items }).collect()
}

/// Writes which file has which tensor, if there are several.
pub(crate) fn write_index<T>(
    folder: &Path,
    shards: &[Shard<T>],
    tensors: impl Fn(&T) -> &[TensorPlan] + Copy,
) -> Result<()> {
    if shards.len() < 2 {
        return Ok(());
    }
    let entries = shards.iter().flat_map(|shard| {
        let entry = |tensor: &TensorPlan| (tensor.name.clone(), json!(shard.file));
        shard.items.iter().flat_map(tensors).map(entry)
    });
    let weight_map: serde_json::Map<String, serde_json::Value> = entries.collect();
    let total: u64 = shards.iter().map(|shard| bytes_of(&shard.items, tensors)).sum();
    let index = json!({ "metadata": { "total_size": total }, "weight_map": weight_map });
    let text = serde_json::to_vec_pretty(&index)?;
    output::write_file(&folder.join("model.safetensors.index.json"), |out| out.write_all(&text))
}
