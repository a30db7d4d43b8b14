//! Weights: loaded once, in the backend's own layout, then only named.

use epsmoe_base::{DType, Mix};
use epsmoe_quant::Format;
use std::fmt;
use std::sync::Arc;

/// What a weight is for, which decides how a backend stores it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WeightShape {
    /// A linear map `y = x·Wᵀ`, from one tensor `[n, k]`.
    Matrix {
        /// Output width.
        n: usize,
        /// Input width.
        k: usize,
    },
    /// The gate and up maps of a gated MLP, from two tensors `[inner, k]`, kept side by side so that the
    /// activation can be fused.
    GateUp {
        /// Output width of each map.
        inner: usize,
        /// Input width.
        k: usize,
    },
    /// Numbers used element by element (norms, biases), from one tensor of `n` elements.
    Vector {
        /// Number of elements.
        n: usize,
    },
    /// Rows that are looked up (embeddings), from one tensor `[rows, width]`.
    Table {
        /// Number of rows.
        rows: usize,
        /// Elements of a row.
        width: usize,
    },
}

impl WeightShape {
    /// The shape each source tensor must have, and how many there are.
    pub fn sources(self) -> (usize, Vec<usize>) {
        match self {
            WeightShape::Matrix { n, k } => (1, vec![n, k]),
            WeightShape::GateUp { inner, k } => (2, vec![inner, k]),
            WeightShape::Vector { n } => (1, vec![n]),
            WeightShape::Table { rows, width } => (1, vec![rows, width]),
        }
    }

    /// Whether rows are multiplied with it.
    pub fn is_map(self) -> bool {
        matches!(self, WeightShape::Matrix { .. } | WeightShape::GateUp { .. })
    }

    /// Numbers held.
    pub fn parameters(self) -> usize {
        let (tensors, shape) = self.sources();
        tensors * shape.iter().product::<usize>()
    }
}

/// How the numbers of a weight are held. What a checkpoint's tensor is coded in is another matter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum WeightFormat {
    /// IEEE single precision.
    F32,
    /// bfloat16.
    Bf16,
    /// IEEE half precision: tables, which stay as the checkpoint has them.
    F16,
    /// Codes with scales. A product with them has the bits of one with the bfloat16 numbers that they mean.
    Coded(Format),
    /// FP8 e4m3 with a scale for every 128 × 128, multiplied as codes with rows that are in such codes too: see
    /// [`GemmPart`](crate::op::GemmPart).
    Fp8,
}

impl WeightFormat {
    /// The format of unscaled numbers of `dtype`; nothing if no weight is held in it.
    pub fn plain(dtype: DType) -> Option<Self> {
        match dtype {
            DType::F32 => Some(WeightFormat::F32),
            DType::BF16 => Some(WeightFormat::Bf16),
            DType::F16 => Some(WeightFormat::F16),
            DType::U32 | DType::E4M3 => None,
        }
    }
}

impl fmt::Display for WeightFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            WeightFormat::F32 => f.write_str("float32"),
            WeightFormat::Bf16 => f.write_str("bfloat16"),
            WeightFormat::F16 => f.write_str("float16"),
            WeightFormat::Coded(format) => fmt::Display::fmt(format, f),
            WeightFormat::Fp8 => f.write_str("fp8 in blocks of 128, multiplied with rows in fp8"),
        }
    }
}

/// Where a device holds a weight. Operations declare the slots that they read, and whoever brings another weight into
/// one declares that it writes: the hazard check orders the two.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct WeightSlot(pub u32);

impl fmt::Display for WeightSlot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "weight slot {}", self.0)
    }
}

/// A loaded weight: a cheap handle that a backend resolves.
#[derive(Clone, Debug)]
pub struct Weight {
    /// Where it is held.
    pub slot: WeightSlot,
    /// What it is for.
    pub shape: WeightShape,
    /// How its numbers are held.
    pub format: WeightFormat,
    /// Its tensor name, for messages.
    pub name: Arc<str>,
}

/// A tensor's bytes as a checkpoint stores them: row-major, little-endian.
#[derive(Clone, Copy, Debug)]
pub struct TensorBytes<'a> {
    /// Format of the elements.
    pub dtype: DType,
    /// Row-major elements.
    pub bytes: &'a [u8],
}

/// A tensor that is made rather than stored: the number of index `i` is `step` times a signed 16-bit number, of which each
/// word of `numbers` has four, lowest first; rounded to bfloat16, as a checkpoint would have it.
#[derive(Clone, Debug)]
pub struct Drawn {
    /// Where the numbers come from.
    pub numbers: Mix,
    /// The factor on them.
    pub step: f32,
    /// Index of the first element.
    pub first: u64,
    /// From a row's element to the one below it.
    pub row_step: u64,
    /// From a column's element to the one beside it.
    pub column_step: u64,
}
