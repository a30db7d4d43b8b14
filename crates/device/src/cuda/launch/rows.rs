//! Operations that go row by row and element by element.

use super::{Columns, Launch, Refusal, Rows, is_empty};
use crate::Buffer;
use crate::cuda::layout::twin;
use crate::cuda::report::Report;
use crate::op::{
    Activate, Activation, Add, AddSlotBias, ArgMax, Clamp, Copy, Embed, Fp8, GateRows, Gather, GatherFp8,
    KvRows, KvWrite, Scale, ScaleTerms, SlotBias, SoftCap, Swish,
};
use epsmoe_base::DType;

twin! {
    pub(super) struct ArgMaxArgs = "Args" in "argmax.cu" {
        logits: Rows,
        tokens: Rows,
        report: Report,
    }
}

twin! {
    pub(super) struct EmbedArgs = "Args" in "embed.cu" {
        ids: Rows,
        table: Rows,
        out: Rows,
        report: Report,
    }
}

twin! {
    pub(super) struct KvRowsArgs = "KvRows" in "kv_write.cu" {
        x: Rows,
        cache: Rows,
        scale: f32,
        padding: u32,
    }
}

twin! {
    pub(super) struct KvWriteArgs = "Args" in "kv_write.cu" {
        parts: [KvRowsArgs; KvWrite::PARTS],
        slots: Rows,
        report: Report,
    }
}

twin! {
    pub(super) struct GatherArgs = "Args" in "gather.cu" {
        x: Rows,
        index: Rows,
        out: Rows,
        report: Report,
    }
}

twin! {
    pub(super) struct GatherFp8Args = "Args" in "gather_fp8.cu" {
        x: Rows,
        index: Rows,
        out: Rows,
        report: Report,
        powers: u32,
        padding: u32,
    }
}

twin! {
    pub(super) struct AddArgs = "Args" in "add.cu" {
        x: Rows,
        out: Rows,
    }
}

twin! {
    pub(super) struct CopyArgs = "Args" in "copy.cu" {
        x: Rows,
        out: Rows,
    }
}

twin! {
    pub(super) struct ClampArgs = "Args" in "clamp.cu" {
        x: Rows,
        limit: f32,
        padding: u32,
    }
}

twin! {
    pub(super) struct GateRowsArgs = "Args" in "gate_rows.cu" {
        gate: Rows,
        x: Rows,
    }
}

twin! {
    pub(super) struct ScaleArgs = "Args" in "scale.cu" {
        x: Rows,
        factor: f32,
        padding: u32,
    }
}

twin! {
    pub(super) struct ScaleTermsArgs = "Args" in "scale_terms.cu" {
        x: Rows,
        index: Rows,
        weights: Rows,
        terms: Rows,
        first: u32,
        padding: u32,
    }
}

twin! {
    pub(super) struct SlotBiasArgs = "SlotBias" in "slot_bias.cuh" {
        bias: u64,
        starts: Rows,
        report: Report,
        first: u32,
        width: u32,
    }
}

twin! {
    pub(super) struct ActivateArgs = "Args" in "activate.cu" {
        x: Rows,
        out: Rows,
        bias: SlotBiasArgs,
        alpha: f32,
        cubic: f32,
        limit: f32,
        shift: f32,
        squared: u32,
        padding: u32,
    }
}

twin! {
    pub(super) struct AddSlotBiasArgs = "Args" in "add_slot_bias.cu" {
        x: Rows,
        bias: SlotBiasArgs,
    }
}

twin! {
    pub(super) struct SoftCapArgs = "Args" in "soft_cap.cu" {
        x: Rows,
        cap: f32,
        padding: u32,
    }
}

impl Launch<'_> {
    pub(super) fn soft_cap(&mut self, op: &SoftCap) -> Result<(), Refusal> {
        let arguments = SoftCapArgs { x: self.rows(&op.x)?, cap: op.cap, padding: 0 };
        self.by_columns(Columns::Runs, "soft_cap", op.x.dtype, op.x.dtype, &op.x, arguments)
    }

    pub(super) fn scale(&mut self, op: &Scale) -> Result<(), Refusal> {
        let arguments = ScaleArgs { x: self.rows(&op.x)?, factor: op.factor, padding: 0 };
        self.by_columns(Columns::Runs, "scale", op.x.dtype, op.x.dtype, &op.x, arguments)
    }

    /// A row of work for each term, whether it is one of these rows or not.
    pub(super) fn scale_terms(&mut self, op: &ScaleTerms) -> Result<(), Refusal> {
        let terms = Buffer { rows: op.index.rows * op.index.width, ..op.x.clone() };
        let arguments = ScaleTermsArgs {
            x: self.rows(&op.x)?,
            index: self.rows(&op.index)?,
            weights: self.rows(&op.weights)?,
            terms: Rows { rows: terms.rows as u32, width: terms.width as u32, ..Rows::NONE },
            first: op.first as u32,
            padding: 0,
        };
        self.by_columns(Columns::Runs, "scale_terms", op.x.dtype, op.x.dtype, &terms, arguments)
    }

    fn slot_bias(&self, op: Option<&SlotBias>, width: usize) -> Result<SlotBiasArgs, Refusal> {
        let Some(op) = op else {
            let (bias, starts, report) = (0, Rows::NONE, self.report);
            return Ok(SlotBiasArgs { bias, starts, report, first: 0, width: 0 });
        };
        Ok(SlotBiasArgs {
            bias: self.weights.get(&op.bias)?.start,
            starts: self.rows(&op.starts)?,
            report: self.report,
            first: op.first as u32,
            width: width as u32,
        })
    }

    pub(super) fn activate(&mut self, op: &Activate) -> Result<(), Refusal> {
        let (swish, squared) = match op.activation {
            Activation::Swish(swish) => (swish, 0),
            Activation::SquaredRelu => (Swish::GELU_TANH, 1),
        };
        let arguments = ActivateArgs {
            x: self.rows(&op.x)?,
            out: self.rows(&op.out)?,
            bias: self.slot_bias(op.bias.as_ref(), op.x.width)?,
            alpha: swish.alpha,
            cubic: swish.cubic,
            limit: swish.limit,
            shift: swish.shift,
            squared,
            padding: 0,
        };
        self.by_columns(Columns::Runs, "activate", op.x.dtype, op.out.dtype, &op.out, arguments)
    }

    pub(super) fn add_slot_bias(&mut self, op: &AddSlotBias) -> Result<(), Refusal> {
        let bias = self.slot_bias(Some(&op.bias), op.x.width)?;
        let arguments = AddSlotBiasArgs { x: self.rows(&op.x)?, bias };
        self.by_columns(Columns::Runs, "add_slot_bias", op.x.dtype, op.x.dtype, &op.x, arguments)
    }

    pub(super) fn arg_max(&mut self, op: &ArgMax) -> Result<(), Refusal> {
        if is_empty(&op.logits) {
            return Ok(());
        }
        let arguments = ArgMaxArgs {
            logits: self.rows(&op.logits)?,
            tokens: self.rows(&op.tokens)?,
            report: self.report,
        };
        let kernel = self.kernels.get("argmax", DType::F32, DType::F32)?;
        self.start(&kernel.function, (op.logits.rows as u32, 1), 0, arguments)
    }

    pub(super) fn embed(&mut self, op: &Embed) -> Result<(), Refusal> {
        let table = self.weights.get(&op.table)?;
        let rows = Rows {
            start: table.start,
            stride: table.stride as u64,
            rows: table.rows as u32,
            width: table.width as u32,
        };
        let (ids, out) = (self.rows(&op.ids)?, self.rows(&op.out)?);
        let arguments = EmbedArgs { ids, table: rows, out, report: self.report };
        self.by_columns(Columns::Runs, "embed", table.dtype, op.out.dtype, &op.out, arguments)
    }

    pub(super) fn kv_write(&mut self, op: &KvWrite) -> Result<(), Refusal> {
        let mut parts =
            [KvRowsArgs { x: Rows::NONE, cache: Rows::NONE, scale: 1.0, padding: 0 }; KvWrite::PARTS];
        for (part, KvRows { x, cache, scale }) in parts.iter_mut().zip(&op.parts) {
            (part.x, part.cache, part.scale) = (self.rows(x)?, self.rows(cache)?, *scale);
        }
        let Some(widest) = op.parts.iter().max_by_key(|part| part.x.width) else { return Ok(()) };
        let arguments = KvWriteArgs { parts, slots: self.rows(&op.slots)?, report: self.report };
        let (x, cache) = (&widest.x, widest.cache.dtype);
        self.by_columns_of((Columns::Runs, op.parts.len()), "kv_write", (x.dtype, cache), x, arguments)
    }

    pub(super) fn gather(&mut self, op: &Gather) -> Result<(), Refusal> {
        let (x, index, out) = (self.rows(&op.x)?, self.rows(&op.index)?, self.rows(&op.out)?);
        let arguments = GatherArgs { x, index, out, report: self.report };
        self.by_columns(Columns::Stretches, "gather", op.x.dtype, op.out.dtype, &op.out, arguments)
    }

    pub(super) fn gather_fp8(&mut self, op: &GatherFp8) -> Result<(), Refusal> {
        let (x, out) = (self.rows(&op.x)?, self.rows(&op.out)?);
        let index = op.index.as_ref().map_or(Ok(Rows::NONE), |index| self.rows(index))?;
        let powers = u32::from(self.power_scales);
        let arguments = GatherFp8Args { x, index, out, report: self.report, powers, padding: 0 };
        let numbers = op.numbers();
        let kernel = match op.how {
            Fp8::Encode => "to_fp8",
            Fp8::Decode => "from_fp8",
            Fp8::Through => "through_fp8",
        };
        let over = Buffer { rows: op.out.rows, ..numbers.clone() };
        self.by_columns(Columns::Stretches, kernel, numbers.dtype, numbers.dtype, &over, arguments)
    }

    pub(super) fn add(&mut self, op: &Add) -> Result<(), Refusal> {
        let arguments = AddArgs { x: self.rows(&op.x)?, out: self.rows(&op.out)? };
        self.by_columns(Columns::Runs, "add", op.x.dtype, op.out.dtype, &op.out, arguments)
    }

    pub(super) fn copy(&mut self, op: &Copy) -> Result<(), Refusal> {
        let arguments = CopyArgs { x: self.rows(&op.x)?, out: self.rows(&op.out)? };
        self.by_columns(Columns::Runs, "copy", op.x.dtype, op.out.dtype, &op.out, arguments)
    }

    pub(super) fn clamp(&mut self, op: &Clamp) -> Result<(), Refusal> {
        let arguments = ClampArgs { x: self.rows(&op.x)?, limit: op.limit, padding: 0 };
        self.by_columns(Columns::Runs, "clamp", op.x.dtype, op.x.dtype, &op.x, arguments)
    }

    pub(super) fn gate_rows(&mut self, op: &GateRows) -> Result<(), Refusal> {
        let arguments = GateRowsArgs { gate: self.rows(&op.gate)?, x: self.rows(&op.x)? };
        self.by_columns(Columns::Runs, "gate_rows", op.x.dtype, op.x.dtype, &op.x, arguments)
    }
}
