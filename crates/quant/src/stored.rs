//! Tensors as files hold them, and rectangles of them.

use crate::{GgmlType, QuantError};
use epsmoe_base::DType;
use std::fmt;
use std::ops::Range;

/// Number format of a stored tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum StoredType {
    /// IEEE single precision.
    F32,
    /// IEEE half precision.
    F16,
    /// bfloat16.
    BF16,
    /// FP8 with four bits of exponent.
    E4M3,
    /// FP8 with five bits of exponent.
    E5M2,
    /// A power of two.
    E8M0,
    /// Signed bytes.
    I8,
    /// Bytes.
    U8,
    /// Signed words of 32 bits.
    I32,
    /// Signed words of 64 bits.
    I64,
    /// Blocks of a GGUF file.
    Ggml(GgmlType),
    /// Another format, by its name. Nothing is read of it.
    Other(&'static str),
}

impl StoredType {
    /// Elements of a block, and bytes of one. Only GGUF's blocks have more than one element.
    pub fn block(self) -> (usize, usize) {
        match self {
            StoredType::E4M3 | StoredType::E5M2 | StoredType::E8M0 => (1, 1),
            StoredType::I8 | StoredType::U8 | StoredType::Other(_) => (1, 1),
            StoredType::F16 | StoredType::BF16 => (1, 2),
            StoredType::F32 | StoredType::I32 => (1, 4),
            StoredType::I64 => (1, 8),
            StoredType::Ggml(format) => (format.block(), format.block_bytes()),
        }
    }

    /// Bytes of a row of so many elements, which are whole blocks.
    pub fn bytes(self, elements: usize) -> usize {
        let (block, bytes) = self.block();
        elements / block * bytes
    }

    /// The format of weights that are kept as they are.
    pub fn of(dtype: DType) -> StoredType {
        match dtype {
            DType::F32 => StoredType::F32,
            DType::F16 => StoredType::F16,
            DType::BF16 => StoredType::BF16,
            DType::U32 => StoredType::Other("U32"),
            DType::E4M3 => StoredType::E4M3,
        }
    }

    /// Whether it holds weights as they are.
    pub fn is_plain(self) -> bool {
        self.plain().is_some()
    }

    /// The format, if it holds weights as they are.
    pub fn plain(self) -> Option<DType> {
        match self {
            StoredType::F32 => Some(DType::F32),
            StoredType::F16 => Some(DType::F16),
            StoredType::BF16 => Some(DType::BF16),
            _ => None,
        }
    }
}

impl fmt::Display for StoredType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            StoredType::F32 => "F32",
            StoredType::F16 => "F16",
            StoredType::BF16 => "BF16",
            StoredType::E4M3 => "F8_E4M3",
            StoredType::E5M2 => "F8_E5M2",
            StoredType::E8M0 => "F8_E8M0",
            StoredType::I8 => "I8",
            StoredType::U8 => "U8",
            StoredType::I32 => "I32",
            StoredType::I64 => "I64",
            StoredType::Other(name) => name,
            StoredType::Ggml(format) => return fmt::Display::fmt(format, f),
        })
    }
}

/// A tensor in a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoredTensor {
    /// Format of its elements.
    pub dtype: StoredType,
    /// Its shape, slowest dimension first.
    pub shape: Vec<usize>,
}

/// Where stored tensors are.
pub trait StoredTensors {
    /// What reading may end in.
    type Error: From<QuantError>;

    /// The tensor of this name, if there is one.
    fn find(&self, name: &str) -> Option<StoredTensor>;

    /// Copies bytes of a tensor, from byte `first` of it on. The tensor exists and is long enough.
    fn fill(&self, name: &str, first: u64, into: &mut [u8]) -> Result<(), Self::Error>;
}

/// Rows of a tensor, evenly spaced: `first`, `first + step`, …
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rows {
    /// The first one.
    pub first: usize,
    /// How many.
    pub count: usize,
    /// From one to the next; 1 for neighbours.
    pub step: usize,
}

impl Rows {
    /// Neighbours.
    pub fn range(range: Range<usize>) -> Rows {
        Rows { first: range.start, count: range.len(), step: 1 }
    }

    /// The number of row `i` of these.
    pub fn at(self, i: usize) -> usize {
        self.first + i * self.step
    }

    /// From the first to the last, with what lies between.
    pub(crate) fn span(self) -> Range<usize> {
        self.first..if self.count == 0 { self.first } else { self.at(self.count - 1) + 1 }
    }

    /// In pieces of at most `most` rows.
    pub(crate) fn chunks(self, most: usize) -> impl Iterator<Item = Rows> {
        (0..self.count).step_by(most.max(1)).map(move |done| Rows {
            first: self.at(done),
            count: most.min(self.count - done),
            ..self
        })
    }
}

/// A stored tensor seen as a matrix: rows of `columns` elements.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct StoredMatrix {
    pub(crate) name: String,
    pub(crate) dtype: StoredType,
    pub(crate) columns: usize,
}

impl StoredMatrix {
    /// The bytes of some whole blocks of each of some rows, side by side in `into`.
    pub(crate) fn read<S: StoredTensors>(
        &self,
        source: &S,
        rows: Rows,
        columns: Range<usize>,
        into: &mut Vec<u8>,
    ) -> Result<(), S::Error> {
        let (row, piece) = (self.dtype.bytes(self.columns), self.dtype.bytes(columns.len()));
        into.clear();
        into.resize(rows.count * piece, 0);
        if into.is_empty() {
            return Ok(());
        }
        if piece == row && rows.step == 1 {
            return source.fill(&self.name, (rows.first * row) as u64, into);
        }
        let start = self.dtype.bytes(columns.start);
        into.chunks_exact_mut(piece)
            .enumerate()
            .try_for_each(|(i, into)| source.fill(&self.name, (rows.at(i) * row + start) as u64, into))
    }
}
