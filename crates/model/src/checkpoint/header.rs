//! What is in a file of weights, and which file a tensor is in.

use super::{damaged, shown, shown_shape};
use crate::ModelError;
use epsmoe_base::text::{printable, shortened};
use epsmoe_base::{count, json};
use safetensors::tensor::TensorInfo;
use serde::Deserialize;
use serde::de::{Deserializer, Error, IgnoredAny, MapAccess, Visitor};
use std::collections::{BTreeMap, HashSet};
use std::fmt;
use std::io;
use std::ops::Range;
use std::path::{Component, Path};

/// The largest header of a safetensors file, as its format states, and the largest index.
pub(super) const HEADER_LIMIT: u64 = 100_000_000;
const DAMAGED: &str = "the file is damaged or incomplete: fetch it again";

/// What a JSON reader says, which may quote the file.
fn reason(error: &serde_json::Error) -> String {
    printable(&shortened(&error.to_string(), 300)).into_owned()
}

/// `model.safetensors.index.json`: which file each tensor is in.
#[derive(Debug, Deserialize)]
pub struct Index {
    /// File of each tensor.
    pub(super) weight_map: BTreeMap<String, String>,
}

impl Index {
    /// Reads the text of the index at `path`. Every file must be in the index's own folder.
    pub fn parse(text: &[u8], path: &Path) -> Result<Index, ModelError> {
        let index: Index = serde_json::from_slice(&json::from_python(text))
            .map_err(|error| damaged(path, &format!("no index ({}); fetch it again", reason(&error))))?;
        for name in index.shards() {
            // A path forgets a slash at its end, so that `one/` would be the component `one`.
            let plain = Path::new(name).components().next() == Some(Component::Normal(name.as_ref()));
            if !plain {
                let problem = format!(
                    "`{}` is not the name of a file in this folder; do not trust this model",
                    shown(name)
                );
                return Err(damaged(path, &problem));
            }
        }
        Ok(index)
    }

    /// The files, each once.
    pub fn shards(&self) -> impl Iterator<Item = &str> {
        let mut seen = HashSet::new();
        self.weight_map.values().map(String::as_str).filter(move |name| seen.insert(*name))
    }
}

/// The header of a safetensors file: which tensors it has, and where.
#[derive(Debug)]
pub struct Header {
    pub(super) tensors: Tensors,
    /// The first byte after the header, from which tensors count theirs.
    pub(super) end: u64,
}

/// The tensors of a file by name.
#[derive(Debug)]
pub(super) struct Tensors(pub(super) BTreeMap<String, TensorInfo>);

impl<'de> Deserialize<'de> for Tensors {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(TensorsVisitor)
    }
}

struct TensorsVisitor;

impl<'de> Visitor<'de> for TensorsVisitor {
    type Value = Tensors;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("tensors by name")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Tensors, A::Error> {
        let mut tensors = BTreeMap::new();
        while let Some(name) = map.next_key::<String>()? {
            if name == "__metadata__" {
                map.next_value::<IgnoredAny>()?;
                continue;
            }
            let info = map.next_value()?;
            if tensors.contains_key(&name) {
                return Err(A::Error::custom(format!("tensor `{}` is there twice", shown(&name))));
            }
            tensors.insert(name, info);
        }
        Ok(Tensors(tensors))
    }
}

impl Header {
    /// Reads the header of the file at `path`, which is `length` bytes long. `read` fills its argument with the
    /// file's bytes from a position on.
    pub fn read(
        path: &Path,
        length: u64,
        read: impl Fn(&mut [u8], u64) -> io::Result<()>,
    ) -> Result<Header, ModelError> {
        let read = |into: &mut [u8], at| {
            read(into, at).map_err(|source| ModelError::Read { file: path.into(), source })
        };
        let damage = |problem: String| Err(damaged(path, &format!("{problem}; {DAMAGED}")));
        let Some(after_length) = length.checked_sub(8) else {
            return damage(format!("{} are too few for a header", count(length as usize, "byte")));
        };
        let mut size = [0; 8];
        read(&mut size, 0)?;
        if &size == b"version " {
            return Err(damaged(
                path,
                "this is a pointer to the weights, not the weights: fetch them with `git lfs pull`",
            ));
        }
        let size = u64::from_le_bytes(size);
        let limit = HEADER_LIMIT.min(after_length);
        if size > limit {
            return damage(format!("the header claims {size} bytes, of at most {limit}"));
        }
        let mut text = vec![0; size as usize];
        read(&mut text, 8)?;
        let tensors = match serde_json::from_slice(&text) {
            Ok(tensors) => tensors,
            Err(error) => return damage(format!("the header is not valid: {}", reason(&error))),
        };
        match check_layout(&tensors, after_length - size) {
            Ok(()) => Ok(Header { tensors, end: 8 + size }),
            Err(problem) => damage(problem),
        }
    }

    /// The bytes of each tensor in the file.
    pub fn ranges(&self) -> impl Iterator<Item = (&str, Range<u64>)> {
        self.tensors.0.iter().map(|(name, info)| {
            let (from, to) = info.data_offsets;
            (name.as_str(), self.end + from as u64..self.end + to as u64)
        })
    }
}

/// Tensors must fill the file, in some order, without holes or overlaps, each as long as its shape says.
fn check_layout(tensors: &Tensors, length: u64) -> Result<(), String> {
    let mut tensors: Vec<(&String, &TensorInfo)> = tensors.0.iter().collect();
    tensors.sort_by_key(|(_, info)| info.data_offsets);
    let mut end = 0;
    for (name, info) in tensors {
        let (from, to) = info.data_offsets;
        let (name, shape) = (|| shown(name), || shown_shape(&info.shape));
        if from != end {
            let what = if from < end { "overlaps the one before it" } else { "leaves a hole before it" };
            return Err(format!("tensor `{}` {what}: it starts at byte {from}, where {end} is due", name()));
        }
        let numbers = info.shape.iter().try_fold(1usize, |all, &width| all.checked_mul(width));
        let Some(bits) = numbers.and_then(|numbers| numbers.checked_mul(info.dtype.bitsize())) else {
            return Err(format!("tensor `{}` has the impossible shape {}", name(), shape()));
        };
        if to < from || Some(to - from) != bits.is_multiple_of(8).then_some(bits / 8) {
            return Err(format!(
                "tensor `{}` has bytes {from}..{to}, but shape {} of {:?} takes {}",
                name(),
                shape(),
                info.dtype,
                bits.div_ceil(8)
            ));
        }
        end = to;
    }
    if end as u64 != length {
        return Err(format!("its tensors take {end} bytes, but {length} follow the header"));
    }
    Ok(())
}
