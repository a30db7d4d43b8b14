//! Weights: loaded once, packed by the backend as it likes, then only named.

use epsmoe_base::DType;
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

    /// Numbers held.
    pub fn parameters(self) -> usize {
        let (tensors, shape) = self.sources();
        tensors * shape.iter().product::<usize>()
    }
}

/// A loaded weight: a cheap handle that a backend resolves.
#[derive(Clone, Debug)]
pub struct Weight {
    /// Index into the backend's store.
    pub id: u32,
    /// What it is for.
    pub shape: WeightShape,
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
