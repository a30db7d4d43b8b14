//! Reading weights: exactly the bytes that are asked for, from files that nobody has to trust.

use crate::ModelError;
use crate::names::{Located, Source};
use epsmoe_base::{DType, count};
use epsmoe_device::{TensorBytes, WeightShape};
use safetensors::tensor::{Dtype, TensorInfo};
use serde::Deserialize;
use serde::de::{Deserializer, Error, IgnoredAny, MapAccess, Visitor};
use std::collections::{BTreeMap, HashMap, HashSet};
use std::fmt;
use std::fs::File;
use std::io::{self, Read};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Component, Path};

/// The largest header of a safetensors file, as its format states, and the largest index.
const HEADER_LIMIT: u64 = 100_000_000;
const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";
const DAMAGED: &str = "the file is damaged or incomplete: fetch it again";

/// Where weights come from.
pub trait WeightSource: Send + Sync {
    /// A stored tensor, if there is one of this name.
    fn find(&self, name: &str) -> Result<Option<Stored<'_>>, ModelError>;

    /// Copies stored elements from number `first` on, as many as fit. The tensor exists and is long enough.
    fn fill(&self, name: &str, first: usize, into: &mut [u8]) -> Result<(), ModelError>;

    /// What to call the place of a tensor in messages.
    fn place(&self, name: &str) -> String;

    /// Reads a part of a model, or a window of it.
    fn read(&self, part: &Located, window: &Window) -> Result<Tensor, ModelError> {
        let mut sources = part.sources.iter();
        let found = sources.find_map(|source| Some((source, self.find(&source.name).transpose()?)));
        let Some((source, stored)) = found else {
            return Err(missing(part, self.place("")));
        };
        let stored = stored?;
        if stored.shape != source.shape {
            return Err(ModelError::Weights {
                file: self.place(&source.name),
                problem: format!(
                    "tensor `{}` has shape {:?}, but config.json makes it {:?}; the two belong to different \
                     models: use the config.json that came with these weights",
                    source.name, stored.shape, source.shape
                ),
            });
        }
        let block = Block::new(source, part.shape, window);
        let mut bytes = vec![0; block.rows.len() * block.columns.len() * stored.dtype.bytes()];
        block.read(stored.dtype, &mut bytes, |first, into| self.fill(&source.name, first, into))?;
        let tensor =
            Tensor { dtype: stored.dtype, shape: vec![block.rows.len(), block.columns.len()], bytes };
        let tensor = if source.transposed { tensor.transposed() } else { tensor };
        Ok(match part.shape {
            WeightShape::Vector { .. } => Tensor { shape: vec![tensor.shape[0]], ..tensor },
            _ => tensor,
        })
    }
}

/// The part of a tensor to read; everything by default.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Window {
    /// Rows; elements of a vector.
    pub rows: Option<Range<usize>>,
    /// Columns.
    pub columns: Option<Range<usize>>,
}

impl Window {
    /// Everything.
    pub fn whole() -> Self {
        Window::default()
    }

    /// Some rows, whole.
    pub fn rows(rows: Range<usize>) -> Self {
        Window { rows: Some(rows), columns: None }
    }

    /// Some columns of every row.
    pub fn columns(columns: Range<usize>) -> Self {
        Window { rows: None, columns: Some(columns) }
    }
}

/// A tensor as it is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stored<'a> {
    /// Format of its elements.
    pub dtype: DType,
    /// Its shape.
    pub shape: &'a [usize],
}

/// A tensor in memory, row-major and little-endian.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tensor {
    /// Format of the elements.
    pub dtype: DType,
    /// One or two dimensions.
    pub shape: Vec<usize>,
    /// The elements.
    pub bytes: Vec<u8>,
}

impl Tensor {
    /// For a backend to load.
    pub fn as_bytes(&self) -> TensorBytes<'_> {
        TensorBytes { dtype: self.dtype, bytes: &self.bytes }
    }

    /// Rows become columns, of a tensor of two dimensions.
    pub fn transposed(self) -> Tensor {
        let (rows, columns) = (self.shape[0], self.shape[1]);
        let bytes = match self.dtype.bytes() {
            2 => transpose::<2>(&self.bytes, rows, columns),
            _ => transpose::<4>(&self.bytes, rows, columns),
        };
        Tensor { shape: vec![columns, rows], bytes, ..self }
    }
}

fn transpose<const SIZE: usize>(bytes: &[u8], rows: usize, columns: usize) -> Vec<u8> {
    /// Columns at a time, so that what they write stays in the cache while rows pass.
    const TILE: usize = 32;
    let (from, _) = bytes.as_chunks::<SIZE>();
    let mut to = vec![[0; SIZE]; from.len()];
    for tile in (0..columns).step_by(TILE) {
        for row in 0..rows {
            for column in tile..columns.min(tile + TILE) {
                to[column * rows + row] = from[row * columns + column];
            }
        }
    }
    to.into_flattened()
}

/// A rectangle of a stored tensor seen as rows.
struct Block {
    rows: Range<usize>,
    columns: Range<usize>,
    row_width: usize,
}

impl Block {
    fn new(source: &Source, shape: WeightShape, window: &Window) -> Block {
        let (_, dimensions) = shape.sources();
        let (n, k) = (dimensions[0], dimensions.get(1).copied().unwrap_or(1));
        let rows = window.rows.clone().unwrap_or(0..n);
        let columns = window.columns.clone().unwrap_or(0..k);
        let inside =
            rows.start <= rows.end && rows.end <= n && columns.start <= columns.end && columns.end <= k;
        assert!(
            inside,
            "rows {rows:?}, columns {columns:?} of `{}` {dimensions:?}: this is a bug",
            source.name
        );
        let (rows, columns, row_width) =
            if source.transposed { (columns, rows, n) } else { (rows, columns, k) };
        Block { rows: rows.start + source.first_row..rows.end + source.first_row, columns, row_width }
    }

    /// Whole rows lie one after the other and are read at once, pieces of rows one by one.
    fn read<F>(&self, dtype: DType, bytes: &mut [u8], fill: F) -> Result<(), ModelError>
    where
        F: Fn(usize, &mut [u8]) -> Result<(), ModelError>,
    {
        if bytes.is_empty() {
            return Ok(());
        }
        if self.columns.len() == self.row_width {
            return fill(self.rows.start * self.row_width, bytes);
        }
        let piece = self.columns.len() * dtype.bytes();
        let mut pieces = self.rows.clone().zip(bytes.chunks_exact_mut(piece));
        pieces.try_for_each(|(row, into)| fill(row * self.row_width + self.columns.start, into))
    }
}

fn missing(part: &Located, file: String) -> ModelError {
    let names: Vec<String> = part.sources.iter().map(|source| format!("`{}`", source.name)).collect();
    let problem = format!(
        "there is no tensor {}; the weights are incomplete or of another model than config.json: fetch both again",
        names.join(" nor ")
    );
    ModelError::Weights { file, problem }
}

/// A folder of safetensors files, one or many with an index.
#[derive(Debug)]
pub struct Checkpoint {
    folder: String,
    shards: Vec<Shard>,
    tensors: HashMap<String, Entry>,
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
    dtype: Dtype,
    shape: Vec<usize>,
}

impl Checkpoint {
    /// Reads the headers of a folder's files, not their tensors.
    pub fn open(folder: &Path) -> Result<Self, ModelError> {
        let mut checkpoint =
            Checkpoint { folder: folder.display().to_string(), shards: Vec::new(), tensors: HashMap::new() };
        if folder.join(SINGLE).exists() {
            checkpoint.add_shard(folder, SINGLE, |_| true)?;
            return Ok(checkpoint);
        }
        if !folder.join(INDEX).exists() {
            return Err(damaged(
                folder,
                &format!(
                    "there is neither {SINGLE} nor {INDEX}; give a folder with safetensors weights, and convert \
                     other formats to safetensors first"
                ),
            ));
        }
        let path = folder.join(INDEX);
        let index = Index::parse(&read_small(&path, HEADER_LIMIT)?, &path)?;
        for shard in index.shards() {
            if !folder.join(shard).exists() {
                let problem = format!("the file is missing, but {INDEX} puts tensors there; fetch it");
                return Err(damaged(&folder.join(shard), &problem));
            }
        }
        for shard in index.shards() {
            let wanted = |name: &str| index.weight_map.get(name).is_some_and(|of| of == shard);
            checkpoint.add_shard(folder, shard, wanted)?;
        }
        for (name, shard) in &index.weight_map {
            if !checkpoint.tensors.contains_key(name) {
                let problem =
                    format!("there is no tensor `{name}`, which {INDEX} puts here; fetch both again");
                return Err(damaged(&folder.join(shard), &problem));
            }
        }
        Ok(checkpoint)
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
        let (file, length) = open_regular(&path)?;
        let header = Header::read(&path, length, |into, at| file.read_exact_at(into, at))?;
        let shard = self.shards.len();
        for (tensor, info) in header.tensors.0.into_iter().filter(|(tensor, _)| wanted(tensor)) {
            let start = header.end + info.data_offsets.0 as u64;
            self.tensors.insert(tensor, Entry { shard, start, dtype: info.dtype, shape: info.shape });
        }
        self.shards.push(Shard { name: path.display().to_string(), file });
        Ok(())
    }
}

impl WeightSource for Checkpoint {
    fn find(&self, name: &str) -> Result<Option<Stored<'_>>, ModelError> {
        let Some(entry) = self.tensors.get(name) else { return Ok(None) };
        let dtype = match entry.dtype {
            Dtype::BF16 => DType::BF16,
            Dtype::F16 => DType::F16,
            Dtype::F32 => DType::F32,
            other => {
                return Err(ModelError::Weights {
                    file: self.place(name),
                    problem: format!(
                        "tensor `{name}` is {other:?}; only BF16, F16 and F32 weights are read: use an \
                         unquantised version of the model"
                    ),
                });
            }
        };
        Ok(Some(Stored { dtype, shape: &entry.shape }))
    }

    fn fill(&self, name: &str, first: usize, into: &mut [u8]) -> Result<(), ModelError> {
        let entry = &self.tensors[name];
        let shard = &self.shards[entry.shard];
        let at = entry.start + (first * entry.dtype.bitsize() / 8) as u64;
        shard
            .file
            .read_exact_at(into, at)
            .map_err(|source| ModelError::Read { file: (&shard.name).into(), source })
    }

    fn place(&self, name: &str) -> String {
        self.tensors
            .get(name)
            .map_or_else(|| self.folder.clone(), |entry| self.shards[entry.shard].name.clone())
    }
}

/// `model.safetensors.index.json`: which file each tensor is in.
#[derive(Debug, Deserialize)]
pub struct Index {
    /// File of each tensor.
    weight_map: BTreeMap<String, String>,
}

impl Index {
    /// Reads the text of the index at `path`. Every file must be in the index's own folder.
    pub fn parse(text: &[u8], path: &Path) -> Result<Index, ModelError> {
        let index: Index = serde_json::from_slice(text)
            .map_err(|error| damaged(path, &format!("no index ({error}); fetch it again")))?;
        for name in index.shards() {
            // A path forgets a slash at its end, so that `one/` would be the component `one`.
            let plain = Path::new(name).components().next() == Some(Component::Normal(name.as_ref()));
            if !plain {
                let problem =
                    format!("`{name}` is not the name of a file in this folder; do not trust this model");
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
    tensors: Tensors,
    /// The first byte after the header, from which tensors count theirs.
    end: u64,
}

/// The tensors of a file by name.
#[derive(Debug)]
struct Tensors(BTreeMap<String, TensorInfo>);

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
                return Err(A::Error::custom(format!("tensor `{name}` is there twice")));
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
        let size = u64::from_le_bytes(size);
        let limit = HEADER_LIMIT.min(after_length);
        if size > limit {
            return damage(format!("the header claims {size} bytes, of at most {limit}"));
        }
        let mut text = vec![0; size as usize];
        read(&mut text, 8)?;
        let tensors = match serde_json::from_slice(&text) {
            Ok(tensors) => tensors,
            Err(error) => return damage(format!("the header is not valid: {error}")),
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
        if from != end {
            let what = if from < end { "overlaps the one before it" } else { "leaves a hole before it" };
            return Err(format!("tensor `{name}` {what}: it starts at byte {from}, where {end} is due"));
        }
        let numbers = info.shape.iter().try_fold(1usize, |all, &width| all.checked_mul(width));
        let Some(bits) = numbers.and_then(|numbers| numbers.checked_mul(info.dtype.bitsize())) else {
            return Err(format!("tensor `{name}` has the impossible shape {:?}", info.shape));
        };
        if to < from || Some(to - from) != bits.is_multiple_of(8).then_some(bits / 8) {
            return Err(format!(
                "tensor `{name}` has bytes {from}..{to}, but shape {:?} of {:?} takes {}",
                info.shape,
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

fn damaged(path: &Path, problem: &str) -> ModelError {
    ModelError::Weights { file: path.display().to_string(), problem: problem.to_owned() }
}

/// Opens a file and tells its length. Pipes and devices are refused: reading one may never end.
fn open_regular(path: &Path) -> Result<(File, u64), ModelError> {
    let read = |source| ModelError::Read { file: path.into(), source };
    let metadata = std::fs::metadata(path).map_err(read)?;
    if !metadata.is_file() {
        return Err(damaged(path, "this is not a plain file; give a folder of plain files"));
    }
    Ok((File::open(path).map_err(read)?, metadata.len()))
}

/// A whole file of at most `limit` bytes.
pub(crate) fn read_small(path: &Path, limit: u64) -> Result<Vec<u8>, ModelError> {
    let (file, length) = open_regular(path)?;
    if length > limit {
        return Err(damaged(path, &format!("{length} bytes are more than such a file may have ({limit})")));
    }
    let mut bytes = Vec::new();
    file.take(limit)
        .read_to_end(&mut bytes)
        .map_err(|source| ModelError::Read { file: path.into(), source })?;
    Ok(bytes)
}
