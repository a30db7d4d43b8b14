//! The rows of a rank whose tokens stay with it, expert by expert. Here the processor finds out which rows belong to
//! which expert, and no host waits for it.

use super::{Accesses, Epilogue, expect, same_rows};
use crate::{Buffer, DeviceError, Weight, WeightShape};
use epsmoe_base::DType;

/// Sorts the (token, expert) pairs of a routing by expert, then token: each is a *copy* of its token's row.
///
/// Two tokens, two experts each, of three experts; token 0 goes to experts 2 and 0, token 1 to 0 and 1:
///
/// ```text
/// experts  [[2, 0], [0, 1]]       weights [[0.7, 0.3], [0.6, 0.4]]
/// starts   [0, 2, 3, 4]           copies 0..2 are expert 0's, 2..3 expert 1's, 3..4 expert 2's
/// tokens   [0, 1, 1, 0]           the token of each copy
/// copies   [0, 3, 1, 2]           the copies of token 0, then of token 1, in ascending expert order
/// factors  [0.3, 0.7, 0.6, 0.4]   the weight of each
/// ```
#[derive(Clone, Debug)]
pub struct SortByExpert {
    /// Experts of each token `[T, k]`, uint32, no expert twice.
    pub experts: Buffer,
    /// Their weights `[T, k]`, float32.
    pub weights: Buffer,
    /// Where the copies of each expert start, and the end `[E + 1, 1]`, uint32.
    pub starts: Buffer,
    /// Token of each copy `[T · k, 1]`, uint32.
    pub tokens: Buffer,
    /// Copies of each token in ascending expert order `[T · k, 1]`, uint32.
    pub copies: Buffer,
    /// Their weights `[T · k, 1]`, float32.
    pub factors: Buffer,
}

impl SortByExpert {
    pub(super) fn check(&self) -> Result<(), DeviceError> {
        let SortByExpert { experts, weights, starts, tokens, copies, factors } = self;
        same_rows("permute", &[experts, weights])?;
        same_rows("permute", &[tokens, copies, factors])?;
        expect("permute", "experts", experts, DType::U32, experts.width)?;
        expect("permute", "weights", weights, DType::F32, experts.width)?;
        for (what, buffer) in [("starts", starts), ("tokens", tokens), ("copies", copies)] {
            expect("permute", what, buffer, DType::U32, 1)?;
        }
        expect("permute", "factors", factors, DType::F32, 1)?;
        if starts.rows < 2 || experts.width == 0 || tokens.rows != experts.rows * experts.width {
            return Err(DeviceError::Shape(format!(
                "permute: {experts:?} does not make the copies {tokens:?} of the experts that {starts:?} delimits"
            )));
        }
        Ok(())
    }

    pub(super) fn accesses(&self) -> Accesses {
        let reads = Accesses::new().read(&self.experts).read(&self.weights);
        [&self.starts, &self.tokens, &self.copies, &self.factors].into_iter().fold(reads, Accesses::write)
    }
}

/// `out[m] = x[m] · weights[e]ᵀ` for `starts[e] ≤ m < starts[e + 1]`: the products of all experts over rows that are
/// sorted by expert. The bits are those of a [`Gemm`](super::Gemm) with one part per expert.
#[derive(Clone, Debug)]
pub struct ExpertGemm {
    /// Input `[M, K]`.
    pub x: Buffer,
    /// Where the rows of each expert start, and the end `[E + 1, 1]`, uint32: ascending, at most M.
    pub starts: Buffer,
    /// One weight per expert `[E]`, all of one shape, which agrees with the epilogue.
    pub weights: Vec<Weight>,
    /// What happens before storing.
    pub epilogue: Epilogue,
    /// Output `[M, N]`, in the input's format or float32.
    pub out: Buffer,
}

impl ExpertGemm {
    pub(super) fn check(&self) -> Result<(), DeviceError> {
        let ExpertGemm { x, starts, weights, epilogue, out } = self;
        same_rows("gemm", &[x, out])?;
        expect("gemm", "starts", starts, DType::U32, 1)?;
        let shape = weights.first().map(|weight| weight.shape);
        let (n, k) = match (shape, epilogue) {
            (Some(WeightShape::Matrix { n, k }), Epilogue::Store) => (n, k),
            (Some(WeightShape::GateUp { inner, k }), Epilogue::SwiGlu) => (inner, k),
            (shape, epilogue) => {
                return Err(DeviceError::Shape(format!("gemm: weights {shape:?} with {epilogue:?}")));
            }
        };
        if let Some(other) = weights.iter().find(|weight| Some(weight.shape) != shape) {
            return Err(DeviceError::Shape(format!(
                "gemm: weights differ: {} is {:?}, {} is {:?}",
                weights[0].name, weights[0].shape, other.name, other.shape
            )));
        }
        let formats = out.dtype == x.dtype || out.dtype == DType::F32;
        if x.width != k || out.width != n || !formats {
            return Err(DeviceError::Shape(format!(
                "gemm: {x:?} · {} [{n}, {k}]ᵀ does not give {out:?}",
                weights[0].name
            )));
        }
        if starts.rows != weights.len() + 1 {
            return Err(DeviceError::Shape(format!(
                "gemm: {starts:?} does not delimit the rows of {} experts",
                weights.len()
            )));
        }
        Ok(())
    }

    pub(super) fn accesses(&self) -> Accesses {
        Accesses::new().read(&self.x).read(&self.starts).write(&self.out)
    }
}
