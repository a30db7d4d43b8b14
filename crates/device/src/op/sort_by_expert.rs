//! Which rows belong to which expert, found out by the device: no host waits for it.

use super::{Accesses, expect, same_rows};
use crate::{Buffer, DeviceError};
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
        same_rows("sort_by_expert", &[experts, weights])?;
        same_rows("sort_by_expert", &[tokens, copies, factors])?;
        expect("sort_by_expert", "experts", experts, DType::U32, experts.width)?;
        expect("sort_by_expert", "weights", weights, DType::F32, experts.width)?;
        for (what, buffer) in [("starts", starts), ("tokens", tokens), ("copies", copies)] {
            expect("sort_by_expert", what, buffer, DType::U32, 1)?;
        }
        expect("sort_by_expert", "factors", factors, DType::F32, 1)?;
        if starts.rows < 2 || experts.width == 0 || tokens.rows != experts.rows * experts.width {
            return Err(DeviceError::Shape(format!(
                "sort_by_expert: {experts:?} does not make the copies {tokens:?} of the experts that {starts:?} delimits"
            )));
        }
        Ok(())
    }

    pub(super) fn accesses(&self) -> Accesses {
        let reads = Accesses::new().read(&self.experts).read(&self.weights);
        [&self.starts, &self.tokens, &self.copies, &self.factors].into_iter().fold(reads, Accesses::write)
    }
}
