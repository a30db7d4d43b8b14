//! Norms of rows, with what comes before or after in the same pass.

use super::{Launch, RUN, Refusal, Rows, THREADS, WARP, is_empty};
use crate::cuda::layout::twin;
use crate::cuda::report::Report;
use crate::op::{AddNorm, Norm, NormKind, NormRotate, RopeStyle, TurnedNorm};

/// Widest rows of which several are a block's, each a warp's or half a warp's; `NARROW` in `norm.cu`.
const NARROW: usize = WARP * RUN;

twin! {
    pub(super) struct NormArgs = "Args" in "norm.cu" {
        x: Rows,
        out: Rows,
        added: Rows,
        rope_table: Rows,
        codes: Rows,
        weight: u64,
        bias: u64,
        eps: f32,
        centred: u32,
        report: Report,
        heads: u32,
        interleaved: u32,
        groups: u32,
        powers: u32,
    }
}

twin! {
    pub(super) struct NarrowArgs = "Narrow" in "norm.cu" {
        parts: [NormArgs; NormRotate::PARTS],
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
        let turns = |TurnedNorm { norm, rotate }: &TurnedNorm| {
            let half = rotate.rope_table.width / 2;
            norm.out.width <= NARROW && rotate.start == 0 && half.is_multiple_of(RUN) && half > 0
        };
        let (narrow, others): (Vec<&TurnedNorm>, Vec<_>) = op.parts.iter().partition(|part| turns(part));
        for TurnedNorm { norm, rotate } in others {
            self.norm(norm)?;
            self.rotate(rotate)?;
        }
        let arguments = |part: &TurnedNorm| -> Result<NormArgs, Refusal> {
            Ok(NormArgs {
                rope_table: self.rows(&part.rotate.rope_table)?,
                heads: part.heads() as u32,
                interleaved: u32::from(part.rotate.style == RopeStyle::Interleaved),
                ..self.norm_args(&part.norm)?
            })
        };
        let parts = narrow.into_iter().map(|part| Ok((&part.norm, arguments(part)?)));
        let parts = parts.collect::<Result<Vec<_>, Refusal>>()?;
        self.start_narrow(&parts)
    }

    fn norm_args(&self, op: &Norm) -> Result<NormArgs, Refusal> {
        Ok(NormArgs {
            x: self.rows(&op.x)?,
            out: self.rows(&op.out)?,
            added: Rows::NONE,
            rope_table: Rows::NONE,
            codes: op.codes.as_ref().map_or(Ok(Rows::NONE), |codes| self.rows(codes))?,
            weight: self.weights.get(&op.weight)?.start,
            bias: op.bias.as_ref().map_or(Ok(0), |bias| self.weights.get(bias).map(|held| held.start))?,
            eps: op.eps,
            centred: u32::from(op.kind == NormKind::Layer),
            report: self.report,
            heads: 1,
            interleaved: 0,
            groups: op.groups() as u32,
            powers: u32::from(self.power_scales),
        })
    }

    fn start_norm(&mut self, op: &Norm, arguments: NormArgs) -> Result<(), Refusal> {
        if is_empty(&op.out) {
            return Ok(());
        }
        if op.x.width <= NARROW && op.codes.is_none() {
            return self.start_narrow(&[(op, arguments)]);
        }
        let kernel = if op.codes.is_some() { "norm_coded" } else { "norm" };
        let kernel = self.kernels.get(kernel, op.x.dtype, op.out.dtype)?;
        self.start(&kernel.function, (op.out.rows as u32, 1), 0, arguments)
    }

    /// Norms of narrow rows, all of the same formats, in one launch.
    fn start_narrow(&mut self, norms: &[(&Norm, NormArgs)]) -> Result<(), Refusal> {
        let blocks = |norm: &Norm| {
            let lanes = if norm.x.width <= HALF { WARP / 2 } else { WARP };
            norm.out.rows.div_ceil(THREADS / lanes) as u32
        };
        let most = norms.iter().map(|(norm, _)| blocks(norm)).max().unwrap_or(0);
        let Some((first, arguments)) = norms.first().filter(|_| most > 0) else { return Ok(()) };
        let mut parts = [*arguments; NormRotate::PARTS];
        parts.iter_mut().zip(norms).for_each(|(part, (_, arguments))| *part = *arguments);
        let kernel = self.kernels.get("norm_narrow", first.x.dtype, first.out.dtype)?;
        self.start(&kernel.function, (most, norms.len() as u32), 0, NarrowArgs { parts })
    }
}

/// Widest rows that half a warp takes.
const HALF: usize = NARROW / 2;
