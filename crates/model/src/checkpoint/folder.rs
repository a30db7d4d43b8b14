//! The files of a checkpoint's folder.

use super::header::HEADER_LIMIT;
use super::{
    GgufFiles, Header, Index, Kept, Stored, WeightSource, damaged, missing, open, read_small, shown, unused,
};
use crate::{ModelError, ModelSpec, Part, config};
use epsmoe_base::{DType, json};
use epsmoe_quant::{Activations, Hints, Method, QuantConfig, QuantError, StoredTensor, StoredType};
use safetensors::tensor::Dtype;
use serde_json::Value;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

const SAFETENSORS: &str = ".safetensors";
const SINGLE: &str = "model.safetensors";
const QUANTISATION: &str = "quantization_config";
/// Where older libraries keep what `quantization_config` says, and the method whose it is.
const QUANTISATION_FILES: [(&str, &str); 3] =
    [("quantize_config.json", "gptq"), ("quant_config.json", "awq"), ("hf_quant_config.json", "modelopt")];
const INDEX: &str = "model.safetensors.index.json";

/// A folder of safetensors files, one or many with an index.
#[derive(Debug)]
pub struct Checkpoint {
    folder: String,
    shards: Vec<Shard>,
    tensors: HashMap<String, Entry>,
    quantisation: Quantisation,
    /// See [`Checkpoint::decoded`].
    decodes: bool,
}

/// What is said about how weights are coded, and the file that says so.
#[derive(Debug)]
struct Quantisation {
    file: PathBuf,
    config: Result<Option<QuantConfig>, QuantError>,
}

#[derive(Debug)]
struct Shard {
    name: String,
    file: File,
}

#[derive(Debug)]
struct Entry {
    shard: usize,
    /// First byte in the file.
    start: u64,
    dtype: StoredType,
    shape: Vec<usize>,
}

impl Checkpoint {
    /// Reads the headers of a folder's files, or of a GGUF file and its other parts, not their tensors.
    pub fn open(folder: &Path) -> Result<Self, ModelError> {
        let mut checkpoint = Checkpoint {
            folder: folder.display().to_string(),
            shards: Vec::new(),
            tensors: HashMap::new(),
            quantisation: Quantisation::of(folder),
            decodes: false,
        };
        if !has_safetensors(folder) {
            checkpoint.add_gguf(folder)?;
        } else if is_there(folder, SINGLE) {
            checkpoint.add_shard(folder, SINGLE, |_| true)?;
        } else if is_there(folder, INDEX) {
            checkpoint.add_indexed(folder)?;
        } else {
            for shard in shards_without_index(folder)? {
                checkpoint.add_shard(folder, &shard, |_| true)?;
            }
        }
        Ok(checkpoint)
    }

    /// The GGUF files at a path, which has no other weights.
    fn add_gguf(&mut self, path: &Path) -> Result<(), ModelError> {
        let Some(files) = GgufFiles::open(path)? else {
            return Err(damaged(path, &no_weights(path, &[])));
        };
        for (name, tensor) in files.header.tensors {
            let (shard, StoredTensor { dtype, shape }) = (files.file_of[&name], tensor.tensor);
            self.tensors.insert(name, Entry { shard, start: tensor.start, dtype, shape });
        }
        let shard = |(path, file): (PathBuf, File)| Shard { name: path.display().to_string(), file };
        self.shards = files.files.into_iter().map(shard).collect();
        let config =
            QuantConfig { method: Method::Gguf, hints: Hints::default(), activations: Activations::Plain };
        self.quantisation = Quantisation { file: path.to_owned(), config: Ok(Some(config)) };
        Ok(())
    }

    /// The files of an index. Tensors that it does not list count too, as the files have them.
    fn add_indexed(&mut self, folder: &Path) -> Result<(), ModelError> {
        let path = folder.join(INDEX);
        let index = Index::parse(&read_small(&path, HEADER_LIMIT)?, &path)?;
        for shard in index.shards() {
            if !is_there(folder, shard) {
                let problem = format!("the file is missing, but {INDEX} puts tensors there; fetch it");
                return Err(damaged(&folder.join(shard), &problem));
            }
        }
        for shard in index.shards() {
            self.add_shard(folder, shard, |name| index.weight_map.get(name).is_none_or(|of| of == shard))?;
        }
        for (name, shard) in &index.weight_map {
            if !self.tensors.contains_key(name) {
                let name = shown(name);
                let problem =
                    format!("there is no tensor `{name}`, which {INDEX} puts here; fetch both again");
                return Err(damaged(&folder.join(shard), &problem));
            }
        }
        Ok(())
    }

    /// Looks for every part of a model: each must be there, in the right shape and in a format that is read. A sentence
    /// about the tensors that the model does not use, if there are any.
    pub fn check(&self, spec: &ModelSpec) -> Result<Option<String>, ModelError> {
        let mut used = HashSet::new();
        for part in spec.parts() {
            let located = spec.locate(part);
            let Some((source, kept)) = self.kept(&located)? else {
                return Err(missing(&located, self.folder.clone()));
            };
            let name = |name: &str| self.tensors.get_key_value(name).map(|(name, _)| name.as_str());
            match kept {
                Kept::Plain(_) => used.extend(name(&source.name)),
                Kept::Coded(coded) => used.extend(coded.tensors().filter_map(name)),
            }
        }
        let unused = self.names().filter(|name| !used.contains(name));
        Ok(unused::sentence(unused, spec).map(|sentence| format!("{}: {sentence}", self.folder)))
    }

    /// The format that the embeddings are stored in, if it is one that is read.
    pub fn dtype(&self, spec: &ModelSpec) -> Option<DType> {
        Some(self.kept(&spec.locate(Part::Embedding)).ok()??.1.dtype())
    }

    /// How it says that its weights are coded; None if they are plain. Tensors may be plain all the same.
    pub fn method(&self) -> Result<Option<Method>, ModelError> {
        Ok(self.quantisation.read()?.map(|config| config.method))
    }

    /// Names of all tensors, in no order.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    fn add_shard(
        &mut self,
        folder: &Path,
        name: &str,
        wanted: impl Fn(&str) -> bool,
    ) -> Result<(), ModelError> {
        let path = folder.join(name);
        let (file, length) = open(&path)?;
        let header = Header::read(&path, length, |into, at| file.read_exact_at(into, at))?;
        let shard = self.shards.len();
        for (tensor, info) in header.tensors.0.into_iter().filter(|(tensor, _)| wanted(tensor)) {
            let start = header.end + info.data_offsets.0 as u64;
            let entry = Entry { shard, start, dtype: stored_type(info.dtype), shape: info.shape };
            if let Some(before) = self.tensors.get(&tensor) {
                let (tensor, before) = (shown(&tensor), &self.shards[before.shard].name);
                let problem =
                    format!("tensor `{tensor}` is in {before} too; fetch both again, or remove one");
                return Err(damaged(&path, &problem));
            }
            self.tensors.insert(tensor, entry);
        }
        self.shards.push(Shard { name: path.display().to_string(), file });
        Ok(())
    }
}

impl Checkpoint {
    /// The same, whose coded tensors become bfloat16 when they are loaded: more memory, the same numbers.
    pub fn decoded(self) -> Self {
        Checkpoint { decodes: true, ..self }
    }
}

impl WeightSource for Checkpoint {
    fn decodes(&self) -> bool {
        self.decodes
    }

    fn find(&self, name: &str) -> Result<Option<Stored<'_>>, ModelError> {
        Ok(self.tensors.get(name).map(|entry| Stored { dtype: entry.dtype, shape: &entry.shape }))
    }

    fn fill(&self, name: &str, first: usize, into: &mut [u8]) -> Result<(), ModelError> {
        let entry = &self.tensors[name];
        let shard = &self.shards[entry.shard];
        let at = entry.start + (first * entry.dtype.block().1) as u64;
        shard
            .file
            .read_exact_at(into, at)
            .map_err(|source| ModelError::Read { file: (&shard.name).into(), source })
    }

    fn hints(&self) -> Result<Hints, ModelError> {
        Ok(self.quantisation.read()?.map_or_else(Hints::default, |config| config.hints))
    }

    fn activations(&self) -> Result<Activations, ModelError> {
        Ok(self.quantisation.read()?.map_or(Activations::Plain, |config| config.activations))
    }

    fn place(&self, name: &str) -> String {
        // Of a coded tensor only the parts are there.
        let stem = name.strip_suffix(".weight").unwrap_or(name);
        let packed = ["weight_packed", "qweight"].map(|part| format!("{stem}.{part}"));
        let entry =
            [name].into_iter().chain(packed.iter().map(String::as_str)).find_map(|it| self.tensors.get(it));
        entry.map_or_else(|| self.folder.clone(), |entry| self.shards[entry.shard].name.clone())
    }
}

impl Quantisation {
    /// Of a folder: from its config.json, or a file of its own. What cannot be read says nothing here: whoever reads the
    /// model from config.json tells why.
    fn of(folder: &Path) -> Self {
        let parsed = |name: &str| -> Option<Value> {
            let text = read_small(&folder.join(name), config::FILE_LIMIT).ok()?;
            serde_json::from_slice(&json::from_python(&text)).ok()
        };
        let found = |name: &str, section: Option<&Value>| {
            let section = section.filter(|section| section.is_object())?;
            Some(Quantisation { file: folder.join(name), config: QuantConfig::parse(section).map(Some) })
        };
        let config = parsed(config::FILE).unwrap_or_default();
        let sections = [&config, &config["text_config"]].into_iter().map(|of| of.get(QUANTISATION));
        let inside = sections.flatten().find_map(|section| found(config::FILE, Some(section)));
        let beside = || {
            QUANTISATION_FILES.iter().find_map(|(name, method)| {
                let Value::Object(mut file) = parsed(name)? else { return None };
                let mut section = match file.remove("quantization") {
                    Some(Value::Object(section)) => section,
                    _ => file,
                };
                section.entry("quant_method").or_insert((*method).into());
                found(name, Some(&section.into()))
            })
        };
        inside.or_else(beside).unwrap_or(Quantisation { file: folder.join(config::FILE), config: Ok(None) })
    }

    fn read(&self) -> Result<Option<&QuantConfig>, ModelError> {
        self.config.as_ref().map(Option::as_ref).map_err(|error| ModelError::Config {
            file: self.file.display().to_string(),
            problem: format!("`{QUANTISATION}`: {error}"),
        })
    }
}

/// A format of safetensors.
fn stored_type(dtype: Dtype) -> StoredType {
    match dtype {
        Dtype::F32 => StoredType::F32,
        Dtype::F16 => StoredType::F16,
        Dtype::BF16 => StoredType::BF16,
        Dtype::F8_E4M3 => StoredType::E4M3,
        Dtype::F8_E5M2 => StoredType::E5M2,
        Dtype::F8_E8M0 => StoredType::E8M0,
        Dtype::I8 => StoredType::I8,
        Dtype::U8 => StoredType::U8,
        Dtype::I32 => StoredType::I32,
        Dtype::I64 => StoredType::I64,
        Dtype::F64 => StoredType::Other("F64"),
        Dtype::BOOL => StoredType::Other("BOOL"),
        _ => StoredType::Other("of a format of its own"),
    }
}

/// Whether a path is a folder with safetensors files, or with an index of some.
fn has_safetensors(path: &Path) -> bool {
    path.is_dir() && (is_there(path, INDEX) || !files_with_ending(path, SAFETENSORS).is_empty())
}

/// The GGUF file that says what the model at a path is, if its weights are such files.
pub fn gguf_file(path: &Path) -> Result<Option<PathBuf>, ModelError> {
    if has_safetensors(path) {
        return Ok(None);
    }
    Ok(GgufFiles::open(path)?.map(GgufFiles::first))
}

/// How the model at a path says that its weights are coded; None if they are plain. Nothing of its weights is read.
pub fn method(path: &Path) -> Result<Option<Method>, ModelError> {
    if gguf_file(path)?.is_some() {
        return Ok(Some(Method::Gguf));
    }
    Ok(Quantisation::of(path).read()?.map(|config| config.method))
}

/// Whether a folder has a file of this name, even one that points to nothing: opening it says so.
fn is_there(folder: &Path, name: &str) -> bool {
    folder.join(name).symlink_metadata().is_ok()
}

/// Names of a folder's files with this ending, in order.
pub(super) fn files_with_ending(folder: &Path, ending: &str) -> Vec<String> {
    let entries = folder.read_dir().into_iter().flatten().filter_map(Result::ok);
    let names = entries.filter_map(|entry| entry.file_name().into_string().ok());
    let mut names: Vec<String> = names.filter(|name| name.ends_with(ending)).collect();
    names.sort_unstable();
    names
}

/// The weights of a folder without an index: all of `NAME-00001-of-00005.safetensors`, or its only safetensors file.
fn shards_without_index(folder: &Path) -> Result<Vec<String>, ModelError> {
    let files = files_with_ending(folder, SAFETENSORS);
    let mut sets: BTreeMap<(&str, usize), Vec<usize>> = BTreeMap::new();
    for (name, number, of) in files.iter().filter_map(|file| numbered(file, SAFETENSORS)) {
        sets.entry((name, of)).or_default().push(number);
    }
    let only = |files: &[String]| -> Option<Vec<String>> { (files.len() == 1).then(|| files.to_vec()) };
    if let Some(((name, of), numbers)) = sets.pop_first() {
        if let Some(((other, _), _)) = sets.first_key_value() {
            let (name, other) = (shown(name), shown(other));
            let problem = format!("there are shards of `{name}` and of `{other}`, but no {INDEX}: fetch it");
            return Err(damaged(folder, &problem));
        }
        if let Some(absent) = (1..=of).find(|number| !numbers.contains(number)) {
            let problem = format!(
                "shard {absent} of {of} is missing: of `{}` there {} {}, and no {INDEX}; fetch what is missing",
                shown(name),
                if numbers.len() == 1 { "is" } else { "are" },
                numbers.len()
            );
            return Err(damaged(folder, &problem));
        }
        return Ok(files.iter().filter(|file| numbered(file, SAFETENSORS).is_some()).cloned().collect());
    }
    only(&files).ok_or_else(|| damaged(folder, &no_weights(folder, &files)))
}

/// The parts of `NAME-00002-of-00005.safetensors`.
pub(super) fn numbered<'a>(file: &'a str, ending: &str) -> Option<(&'a str, usize, usize)> {
    let (rest, of) = file.strip_suffix(ending)?.rsplit_once("-of-")?;
    let (name, number) = rest.rsplit_once('-')?;
    let digits = |text: &str| -> Option<usize> {
        text.bytes().all(|byte| byte.is_ascii_digit()).then(|| text.parse().ok()).flatten()
    };
    let (number, of) = (digits(number)?, digits(of)?);
    // More files than any folder has are no shards.
    ((1..=of).contains(&number) && of <= 100_000).then_some((name, number, of))
}

/// What a folder without readable weights has instead.
fn no_weights(folder: &Path, safetensors: &[String]) -> String {
    let Some(other) = other_weights(folder) else {
        return match safetensors {
            [] => format!(
                "there is neither {SINGLE} nor {INDEX}; give a folder with safetensors weights, and convert other \
                 formats to safetensors first"
            ),
            several => format!(
                "there are {} safetensors files, but neither {SINGLE} nor {INDEX} that says which are the model's: \
                 fetch it",
                several.len()
            ),
        };
    };
    format!("there is neither {SINGLE} nor {INDEX}; {other}")
}

/// Weights of other formats in a folder, and what to do about them.
pub(crate) fn other_weights(folder: &Path) -> Option<String> {
    let found = |ending: &str| files_with_ending(folder, ending).into_iter().next().map(|name| shown(&name));
    let other = [".bin", ".pt", ".pth", ".ckpt", ".npz", ".msgpack", ".h5"]
        .iter()
        .find_map(|ending| found(ending))?;
    Some(format!("`{other}` is not read: convert it to safetensors first"))
}
