//! Weighted sums of rows.

use super::{Columns, Launch, Refusal, Rows};
use crate::Buffer;
use crate::cuda::layout::twin;
use crate::cuda::report::Report;
use crate::op::Reduce;

twin! {
    pub(super) struct ReduceArgs = "Args" in "reduce.cu" {
        x: Rows,
        index: Rows,
        weights: Rows,
        addend: Rows,
        out: Rows,
        report: Report,
        weighted: u32,
        added: u32,
    }
}

impl Launch<'_> {
    pub(super) fn reduce(&mut self, op: &Reduce) -> Result<(), Refusal> {
        let optional =
            |buffer: &Option<Buffer>| buffer.as_ref().map_or(Ok(Rows::NONE), |buffer| self.rows(buffer));
        let arguments = ReduceArgs {
            x: self.rows(&op.x)?,
            index: self.rows(&op.index)?,
            weights: optional(&op.weights)?,
            addend: optional(&op.addend)?,
            out: self.rows(&op.out)?,
            report: self.report,
            weighted: u32::from(op.weights.is_some()),
            added: u32::from(op.addend.is_some()),
        };
        self.by_columns(Columns::Stretches, "reduce", op.x.dtype, op.out.dtype, &op.out, arguments)
    }
}
