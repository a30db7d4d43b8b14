//! Reading weights: exactly the bytes that are asked for, from files that nobody has to trust. `folder` finds the files
//! of a checkpoint, `header` reads what is in them, `unused` says which of their tensors a model leaves alone. Tensors that
//! are coded become bfloat16 on the way (`epsmoe-quant` knows how).

mod folder;
mod gguf;
mod header;
mod held;
mod quantising;
mod unused;

pub(crate) use folder::other_weights;
pub use folder::{Checkpoint, gguf_file, method};
pub(crate) use gguf::GgufFiles;
pub use header::{Header, Index};
pub use held::HeldWeights;
pub(crate) use held::{FP8_BITS, held_format, may_take_fp8_rows};
pub use quantising::Quantising;

use crate::ModelError;
use crate::names::{Form, Located, Source, Turn};
use epsmoe_base::files::{open_plain, read_plain};
use epsmoe_base::text::{printable, shortened};
use epsmoe_base::{DType, Mix};
use epsmoe_device::{Drawn, TensorBytes, WeightShape};
use epsmoe_quant::{
    Activations, CodedTensor, Codes, Format, Hints, QuantError, Rows, StoredTensor, StoredTensors,
    StoredType, Target,
};
use half::{bf16, f16};
use std::fs::File;
use std::ops::Range;
use std::path::Path;

/// Where weights come from.
pub trait WeightSource: Send + Sync {
    /// A stored tensor, if there is one of this name.
    fn find(&self, name: &str) -> Result<Option<Stored<'_>>, ModelError>;

    /// Copies stored elements, or blocks where the format has blocks, from number `first` on, as many as fit. The tensor
    /// exists and is long enough.
    fn fill(&self, name: &str, first: usize, into: &mut [u8]) -> Result<(), ModelError>;

    /// What the configuration of a quantised checkpoint says that its tensors cannot.
    fn hints(&self) -> Result<Hints, ModelError> {
        Ok(Hints::default())
    }

    /// What the makers of a quantised checkpoint do with activations.
    fn activations(&self) -> Result<Activations, ModelError> {
        Ok(Activations::Plain)
    }

    /// Whether coded tensors are decoded when they are loaded, wherever they could stay as they are.
    fn decodes(&self) -> bool {
        false
    }

    /// The coding that plain weights are brought into when they are loaded, if any.
    fn quantises(&self) -> Option<Target> {
        None
    }

    /// Where the numbers of a tensor come from, and the factor on them, if it is made as [`Drawn`] says.
    fn numbers(&self, name: &str) -> Option<(Mix, f32)> {
        let _ = name;
        None
    }

    /// A window of a part whose tensor is made rather than stored.
    fn drawn(&self, part: &Located, window: &Window) -> Result<Option<Drawn>, ModelError> {
        Ok(self.kept(part)?.and_then(|(source, _)| {
            let (numbers, step) = self.numbers(&source.name)?;
            let drawn = Block::new(source, part.shape, window).drawn(source.transposed, numbers, step);
            Some(match part.shape {
                // What is stored as rows of one element is one row.
                WeightShape::Vector { .. } => Drawn { column_step: drawn.row_step, ..drawn },
                _ => drawn,
            })
        }))
    }

    /// What to call the place of a tensor in messages.
    fn place(&self, name: &str) -> String;

    /// Where a part of a model is, of all places where it may be; nothing if it is in none. Its shape must be the part's.
    fn kept<'a>(&self, part: &'a Located) -> Result<Option<(&'a Source, Kept)>, ModelError> {
        for source in &part.sources {
            let stored = self.find(&source.name)?;
            if source.only != Some(Form::Plain)
                && let Some(coded) = self.coded(source)?
            {
                return Ok(Some((source, Kept::Coded(coded))));
            }
            // What is there may be in the form that another place of the same name is for.
            let fits = |stored: &Stored<'_>| match source.only {
                Some(Form::Coded) => false,
                Some(Form::Plain) => stored.dtype.is_plain(),
                None => true,
            };
            let Some(stored) = stored.filter(fits) else { continue };
            check_shape(source, stored, || self.place(&source.name))?;
            let Some(dtype) = stored.dtype.plain() else {
                return Err(unread(source, stored.dtype, self.place(&source.name)));
            };
            return Ok(Some((source, Kept::Plain(dtype))));
        }
        Ok(None)
    }

    /// How a tensor is coded, if it is there and not plain.
    fn coded(&self, source: &Source) -> Result<Option<CodedTensor>, ModelError> {
        let raw = Raw(self);
        let find = |name: &str| raw.find(name);
        let detect = |hints: &Hints| CodedTensor::detect(&source.name, &source.shape, hints, find);
        // Without a coded tensor, a configuration that cannot be read does no harm.
        if detect(&Hints::default()) == Ok(None) {
            return Ok(None);
        }
        detect(&self.hints()?).map_err(|error| Failed::from(error).of(|| self.place(&source.name)))
    }

    /// The format that a window of a part has in its codes; nothing if it is plain, or must be decoded.
    fn format(&self, part: &Located, window: &Window) -> Result<Option<Format>, ModelError> {
        if self.decodes() {
            return Ok(None);
        }
        Ok(match self.kept(part)? {
            Some((source, Kept::Coded(coded))) if !source.transposed => {
                coded.format(&Block::new(source, part.shape, window).columns)
            }
            _ => None,
        })
    }

    /// Reads a window of a part in the codes of its [`format`](WeightSource::format). Nothing if there is none, or for numbers
    /// that only decoding does justice to.
    fn codes(&self, part: &Located, window: &Window) -> Result<Option<Codes>, ModelError> {
        match self.kept(part)? {
            Some((source, Kept::Coded(coded))) if !source.transposed => {
                let block = Block::new(source, part.shape, window);
                let codes = coded.codes(&Raw(self), block.rows, block.columns);
                codes.map_err(|error| error.of(|| self.place(&source.name)))
            }
            _ => Ok(None),
        }
    }

    /// Reads a part of a model, or a window of it.
    fn read(&self, part: &Located, window: &Window) -> Result<Tensor, ModelError> {
        let Some((source, kept)) = self.kept(part)? else {
            return Err(missing(part, self.place("")));
        };
        let block = Block::new(source, part.shape, window);
        let (dtype, shape) = (kept.dtype(), vec![block.rows.count, block.columns.len()]);
        let mut bytes = vec![0; block.rows.count * block.columns.len() * dtype.bytes()];
        match kept {
            Kept::Plain(_) => {
                block.read(dtype, &mut bytes, |first, into| self.fill(&source.name, first, into))?;
            }
            Kept::Coded(coded) => {
                let (weights, _) = bytes.as_chunks_mut::<2>();
                let decoded = coded.decode(&Raw(self), block.rows, block.columns, weights);
                decoded.map_err(|error| error.of(|| self.place(&source.name)))?;
            }
        }
        let tensor = Tensor { dtype, shape, bytes };
        let tensor = if source.transposed { tensor.transposed() } else { tensor };
        Ok(match part.shape {
            WeightShape::Vector { .. } => Tensor { shape: vec![tensor.shape[0]], ..tensor },
            _ => tensor,
        })
    }
}

/// Stored tensors as their codings want to read them.
struct Raw<'a, S: ?Sized>(&'a S);

/// What reading codes ends in where it fails.
enum Failed {
    Reading(ModelError),
    Decoding(QuantError),
}

impl From<QuantError> for Failed {
    fn from(error: QuantError) -> Self {
        Failed::Decoding(error)
    }
}

impl Failed {
    /// The error of a tensor of a file.
    fn of(self, file: impl FnOnce() -> String) -> ModelError {
        match self {
            Failed::Reading(error) => error,
            Failed::Decoding(error) => ModelError::Weights { file: file(), problem: error.to_string() },
        }
    }
}

impl<S: WeightSource + ?Sized> StoredTensors for Raw<'_, S> {
    type Error = Failed;

    fn find(&self, name: &str) -> Option<StoredTensor> {
        let stored = self.0.find(name).ok()??;
        Some(StoredTensor { dtype: stored.dtype, shape: stored.shape.to_vec() })
    }

    fn fill(&self, name: &str, first: u64, into: &mut [u8]) -> Result<(), Failed> {
        let stored = self.0.find(name).map_err(Failed::Reading)?;
        let (_, block) = stored.map_or((1, 1), |stored| stored.dtype.block());
        self.0.fill(name, first as usize / block, into).map_err(Failed::Reading)
    }
}

/// How a part of a model is kept.
#[expect(clippy::large_enum_variant, reason = "looked at one at a time, and never stored")]
pub enum Kept {
    /// As it is.
    Plain(DType),
    /// In codes.
    Coded(CodedTensor),
}

impl Kept {
    /// The format that it has in memory.
    pub fn dtype(&self) -> DType {
        match self {
            Kept::Plain(dtype) => *dtype,
            Kept::Coded(_) => DType::BF16,
        }
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
    pub dtype: StoredType,
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

    /// Of numbers in float32.
    pub(crate) fn of_floats(shape: Vec<usize>, numbers: impl IntoIterator<Item = f32>) -> Tensor {
        Tensor { dtype: DType::F32, shape, bytes: numbers.into_iter().flat_map(f32::to_le_bytes).collect() }
    }

    /// Its elements, which are weights.
    pub fn floats(&self) -> Vec<f32> {
        let (pairs, _) = self.bytes.as_chunks();
        let (quads, _) = self.bytes.as_chunks();
        match self.dtype {
            DType::BF16 => pairs.iter().map(|&pair| bf16::from_le_bytes(pair).to_f32()).collect(),
            DType::F16 => pairs.iter().map(|&pair| f16::from_le_bytes(pair).to_f32()).collect(),
            _ => quads.iter().map(|&quad| f32::from_le_bytes(quad)).collect(),
        }
    }

    /// Every element is one more, in float32.
    pub(crate) fn plus_one(self) -> Tensor {
        let numbers = self.floats().into_iter().map(|value| 1.0 + value);
        Tensor::of_floats(self.shape, numbers)
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
    rows: Rows,
    columns: Range<usize>,
    /// Of how many parts columns lie in turn, and this one's place.
    turn: Turn,
    row_width: usize,
}

impl Block {
    fn new(source: &Source, shape: WeightShape, window: &Window) -> Block {
        let (_, dimensions) = shape.sources();
        let (n, k) = (dimensions[0], dimensions.get(1).copied().unwrap_or(1));
        let window_rows = window.rows.clone().unwrap_or(0..n);
        let columns = window.columns.clone().unwrap_or(0..k);
        let inside = window_rows.start <= window_rows.end
            && window_rows.end <= n
            && columns.start <= columns.end
            && columns.end <= k;
        assert!(
            inside,
            "rows {window_rows:?}, columns {columns:?} of `{}` {dimensions:?}: this is a bug",
            source.name
        );
        if source.transposed {
            let rows = columns.start + source.first_row..columns.end + source.first_row;
            let row_width = source.shape.last().copied().unwrap_or(n);
            return Block { rows: Rows::range(rows), columns: window_rows, turn: source.turn, row_width };
        }
        let Turn { at, of } = source.turn;
        let first = source.first_row + at + window_rows.start * of;
        let rows = Rows { first, count: window_rows.len(), step: of };
        Block { rows, columns, turn: Turn::ALONE, row_width: k }
    }

    /// How the part's elements follow from their places, where stored ones follow from their number.
    fn drawn(&self, transposed: bool, numbers: Mix, step: f32) -> Drawn {
        let Block { rows, columns, turn, row_width } = self;
        let first = rows.first * row_width + columns.start * turn.of + turn.at;
        let (down, beside) = ((rows.step * row_width) as u64, turn.of as u64);
        let (row_step, column_step) = if transposed { (beside, down) } else { (down, beside) };
        Drawn { numbers, step, first: first as u64, row_step, column_step }
    }

    /// Whole rows lie one after the other and are read at once, pieces of rows one by one.
    fn read<F>(&self, dtype: DType, bytes: &mut [u8], fill: F) -> Result<(), ModelError>
    where
        F: Fn(usize, &mut [u8]) -> Result<(), ModelError>,
    {
        if bytes.is_empty() {
            return Ok(());
        }
        let Rows { first, count, step } = self.rows;
        if self.columns.len() == self.row_width && step == 1 {
            return fill(first * self.row_width, bytes);
        }
        let (size, Turn { at, of }) = (dtype.bytes(), self.turn);
        let piece = self.columns.len() * size;
        let mut pieces =
            (0..count).map(|row| (first + row * step) * self.row_width).zip(bytes.chunks_exact_mut(piece));
        if of == 1 {
            return pieces.try_for_each(|(row, into)| fill(row + self.columns.start + at, into));
        }
        let mut turns = vec![0; ((self.columns.len() - 1) * of + 1) * size];
        pieces.try_for_each(|(row, into)| {
            fill(row + self.columns.start * of + at, &mut turns)?;
            for (element, turn) in into.chunks_exact_mut(size).zip(turns.chunks(of * size)) {
                element.copy_from_slice(&turn[..size]);
            }
            Ok(())
        })
    }
}

fn missing(part: &Located, file: String) -> ModelError {
    let mut names: Vec<String> = Vec::new();
    for source in &part.sources {
        let name = format!("`{}`", source.name);
        // One tensor may hold a part in several ways.
        if !names.contains(&name) {
            names.push(name);
        }
    }
    let problem = format!(
        "there is no tensor {}; the weights are incomplete or of another model than config.json: fetch both again",
        names.join(" nor ")
    );
    ModelError::Weights { file, problem }
}

fn unread(source: &Source, dtype: StoredType, file: String) -> ModelError {
    let problem = format!(
        "tensor `{}` is {dtype}, which holds no weights; the weights are damaged or of another model than config.json: \
         fetch both again",
        source.name
    );
    ModelError::Weights { file, problem }
}

/// Refuses a tensor of another shape than the model's.
fn check_shape(source: &Source, stored: Stored<'_>, file: impl FnOnce() -> String) -> Result<(), ModelError> {
    if stored.shape == source.shape {
        return Ok(());
    }
    let problem = format!(
        "tensor `{}` has shape {}, but config.json makes it {:?}; the two belong to different models: use the \
         config.json that came with these weights",
        source.name,
        shown_shape(stored.shape),
        source.shape
    );
    Err(ModelError::Weights { file: file(), problem })
}

/// A name from a file, for messages: of bearable length, and nothing that a terminal obeys.
fn shown(name: &str) -> String {
    printable(&shortened(name, 200)).into_owned()
}

/// A shape from a file, for messages.
fn shown_shape(shape: &[usize]) -> String {
    const MOST: usize = 8;
    match shape.get(..MOST) {
        Some(first) if shape.len() > MOST => format!("{first:?} and {} more", shape.len() - MOST),
        _ => format!("{shape:?}"),
    }
}

fn damaged(path: &Path, problem: &str) -> ModelError {
    ModelError::Weights { file: path.display().to_string(), problem: problem.to_owned() }
}

/// Opens a plain file and tells its length.
fn open(path: &Path) -> Result<(File, u64), ModelError> {
    open_plain(path).map_err(|source| ModelError::Read { file: path.into(), source })
}

/// A whole plain file of at most `limit` bytes.
pub(crate) fn read_small(path: &Path, limit: u64) -> Result<Vec<u8>, ModelError> {
    read_plain(path, limit).map_err(|source| ModelError::Read { file: path.into(), source })
}
