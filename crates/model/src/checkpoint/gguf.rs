//! GGUF files, one or the shards of one model.

use super::folder::{files_with_ending, numbered};
use super::{damaged, open, shown};
use crate::ModelError;
use epsmoe_quant::HeaderError;
use epsmoe_quant::gguf::Gguf;
use std::collections::HashMap;
use std::fs::File;
use std::path::{Path, PathBuf};

const ENDING: &str = ".gguf";

/// The open files of a model.
pub(crate) struct GgufFiles {
    pub(super) files: Vec<(PathBuf, File)>,
    /// What the first file says of the model, and the tensors of all of them.
    pub(crate) header: Gguf,
    /// Which file each tensor is in.
    pub(super) file_of: HashMap<String, usize>,
}

impl GgufFiles {
    /// The files of the model at a path: a file, or a folder that has those of one model. None if there are none.
    pub(crate) fn open(path: &Path) -> Result<Option<GgufFiles>, ModelError> {
        let paths = if path.is_dir() { in_folder(path)? } else { with_its_shards(path)? };
        let mut all: Option<GgufFiles> = None;
        for path in paths {
            let (file, header) = read(&path)?;
            match &mut all {
                None => {
                    let file_of = header.tensors.keys().map(|name| (name.clone(), 0)).collect();
                    all = Some(GgufFiles { files: vec![(path, file)], header, file_of });
                }
                Some(all) => all.add(path, file, header)?,
            }
        }
        Ok(all)
    }

    fn add(&mut self, path: PathBuf, file: File, header: Gguf) -> Result<(), ModelError> {
        let shard = self.files.len();
        for (name, tensor) in header.tensors {
            if let Some(before) = self.file_of.insert(name.clone(), shard) {
                let before = self.files[before].0.display();
                return Err(damaged(
                    &path,
                    &format!("tensor `{}` is in {before} too; fetch both again", shown(&name)),
                ));
            }
            self.header.tensors.insert(name, tensor);
        }
        self.files.push((path, file));
        Ok(())
    }

    /// The file that says what the model is.
    pub(crate) fn first(self) -> PathBuf {
        self.files.into_iter().next().map(|(path, _)| path).unwrap_or_default()
    }

    /// What to call it in messages.
    pub(crate) fn place(&self) -> String {
        self.files[0].0.display().to_string()
    }
}

fn read(path: &Path) -> Result<(File, Gguf), ModelError> {
    let (file, length) = open(path)?;
    match Gguf::of_file(&file, length) {
        Ok(header) => Ok((file, header)),
        Err(HeaderError::Reading(source)) => Err(ModelError::Read { file: path.into(), source }),
        Err(HeaderError::Refused(error)) => Err(damaged(path, &error.to_string())),
    }
}

/// A file, and the others of its set if its name is `NAME-00001-of-00003.gguf`.
fn with_its_shards(path: &Path) -> Result<Vec<PathBuf>, ModelError> {
    let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    let folder = path.parent().unwrap_or(Path::new(""));
    let Some((stem, _, of)) = numbered(name, ENDING) else { return Ok(vec![path.to_owned()]) };
    // The first one says what the model is.
    (1..=of)
        .map(|number| {
            let shard = folder.join(format!("{stem}-{number:05}-of-{of:05}{ENDING}"));
            let there = shard.symlink_metadata().is_ok();
            if there { Ok(shard) } else { Err(damaged(&shard, "the file is missing; fetch it")) }
        })
        .collect()
}

fn in_folder(folder: &Path) -> Result<Vec<PathBuf>, ModelError> {
    let files = files_with_ending(folder, ENDING);
    // Projectors of images are no language models.
    let mut files = files.iter().filter(|name| !name.starts_with("mmproj"));
    let Some(first) = files.next() else { return Ok(Vec::new()) };
    let set = |name: &str| numbered(name, ENDING).map(|(stem, _, of)| (stem.to_owned(), of));
    match files.find(|name| set(name).is_none() || set(name) != set(first)) {
        None => with_its_shards(&folder.join(first)),
        Some(other) => {
            let (first, other) = (shown(first), shown(other));
            Err(damaged(
                folder,
                &format!("there are several models, `{first}` and `{other}`: give the file of one"),
            ))
        }
    }
}
