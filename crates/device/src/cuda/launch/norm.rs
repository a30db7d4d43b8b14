//! Norms of rows.

use super::{Launch, RUN, Refusal, Rows, THREADS, WARP, is_empty};
use crate::cuda::layout::twin;
use crate::cuda::report::Report;
use crate::op::{Norm, NormKind};

/// Widest rows of which each is a warp's, several of them a block's; `NARROW` in `norm.cu`.
const NARROW: usize = WARP * RUN;

twin! {
    pub(super) struct NormArgs = "Args" in "norm.cu" {
        x: Rows,
        out: Rows,
        weight: u64,
        eps: f32,
        centred: u32,
        report: Report,
    }
}

impl Launch<'_> {
    pub(super) fn norm(&mut self, op: &Norm) -> Result<(), Refusal> {
        if is_empty(&op.out) {
            return Ok(());
        }
        let arguments = NormArgs {
            x: self.rows(&op.x)?,
            out: self.rows(&op.out)?,
            weight: self.weights.get(&op.weight)?.start,
            eps: op.eps,
            centred: u32::from(op.kind == NormKind::Layer),
            report: self.report,
        };
        let kernel = self.kernels.get("norm", op.x.dtype, op.out.dtype)?;
        let rows = if op.x.width <= NARROW { THREADS / WARP } else { 1 };
        self.start(&kernel.function, (op.out.rows.div_ceil(rows) as u32, 1), 0, arguments)
    }
}
