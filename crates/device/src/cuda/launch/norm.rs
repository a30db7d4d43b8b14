//! Norms of rows, with what comes before or after in the same pass.

use super::{Launch, RUN, Refusal, Rows, THREADS, WARP, is_empty};
use crate::cuda::layout::twin;
use crate::cuda::report::Report;
use crate::op::{AddNorm, Norm, NormKind, NormRotate, RopeStyle};

/// Widest rows of which several are a block's, each a warp's or half a warp's; `NARROW` in `norm.cu`.
const NARROW: usize = WARP * RUN;

twin! {
    pub(super) struct NormArgs = "Args" in "norm.cu" {
        x: Rows,
        out: Rows,
        added: Rows,
        rope_table: Rows,
        weight: u64,
        bias: u64,
        eps: f32,
        centred: u32,
        report: Report,
        heads: u32,
        interleaved: u32,
        groups: u32,
        padding: u32,
    }
}

impl Launch<'_> {
    pub(super) fn norm(&mut self, op: &Norm) -> Result<(), Refusal> {
        let arguments = self.norm_args(op)?;
        self.start_norm(op, arguments)
    }

    pub(super) fn add_norm(&mut self, op: &AddNorm) -> Result<(), Refusal> {
        let added = self.rows(&op.add.x)?;
        let arguments = self.norm_args(&op.norm)?;
        self.start_norm(&op.norm, NormArgs { added, ..arguments })
    }

    /// Where the halves of a head lie in whole runs of one warp the norm turns them, else a kernel of its own does.
    pub(super) fn norm_rotate(&mut self, op: &NormRotate) -> Result<(), Refusal> {
        let NormRotate { norm, rotate } = op;
        let half = rotate.rope_table.width / 2;
        if norm.out.width > NARROW || rotate.start != 0 || !half.is_multiple_of(RUN) || half == 0 {
            self.norm(norm)?;
            return self.rotate(rotate);
        }
        let arguments = NormArgs {
            rope_table: self.rows(&rotate.rope_table)?,
            heads: op.heads() as u32,
            interleaved: u32::from(rotate.style == RopeStyle::Interleaved),
            ..self.norm_args(norm)?
        };
        self.start_norm(norm, arguments)
    }

    fn norm_args(&self, op: &Norm) -> Result<NormArgs, Refusal> {
        Ok(NormArgs {
            x: self.rows(&op.x)?,
            out: self.rows(&op.out)?,
            added: Rows::NONE,
            rope_table: Rows::NONE,
            weight: self.weights.get(&op.weight)?.start,
            bias: op.bias.as_ref().map_or(Ok(0), |bias| self.weights.get(bias).map(|held| held.start))?,
            eps: op.eps,
            centred: u32::from(op.kind == NormKind::Layer),
            report: self.report,
            heads: 1,
            interleaved: 0,
            groups: op.groups() as u32,
            padding: 0,
        })
    }

    fn start_norm(&mut self, op: &Norm, arguments: NormArgs) -> Result<(), Refusal> {
        if is_empty(&op.out) {
            return Ok(());
        }
        let (kernel, rows) = match op.x.width {
            width if width <= HALF => ("norm_narrow", 2 * THREADS / WARP),
            width if width <= NARROW => ("norm_narrow", THREADS / WARP),
            _ => ("norm", 1),
        };
        let kernel = self.kernels.get(kernel, op.x.dtype, op.out.dtype)?;
        self.start(&kernel.function, (op.out.rows.div_ceil(rows) as u32, 1), 0, arguments)
    }
}

/// Widest rows that half a warp takes.
const HALF: usize = NARROW / 2;
