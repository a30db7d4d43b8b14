//! Operations that carry a state from token to token, and gates.

use super::{Columns, Launch, RUN, Refusal, Rows, THREADS, is_empty};
use crate::DeviceError;
use crate::cuda::layout::twin;
use crate::cuda::report::Report;
use crate::op::{Carried, Gate, Gating, Recurrence, Rule, ShortConv};
use epsmoe_base::DType;

/// Most tokens that an output of a short convolution depends on; `TAPS` in `short_conv.cu`.
const TAPS: usize = 4;
/// Tokens of a thread of a short convolution, where there are many.
const EACH: usize = 16;

/// Threads of a block and rows of a lane, as in `recurrence.cu`.
const STATE_THREADS: usize = 128;
const ROWS: usize = 16;
/// Columns of a lane where there are many blocks, and where there are few.
const MANY: usize = 4;
const FEW: usize = 2;

twin! {
    pub(super) struct CarriedArgs = "Carried" in "carried.cuh" {
        starts: Rows,
        positions: Rows,
        slots: Rows,
        report: Report,
    }
}

twin! {
    pub(super) struct ShortConvArgs = "Args" in "short_conv.cu" {
        x: Rows,
        states: Rows,
        out: Rows,
        kept: Rows,
        carried: CarriedArgs,
        weight: u64,
        bias: u64,
        taps: u32,
        each: u32,
    }
}

twin! {
    pub(super) struct RecurrenceArgs = "Args" in "recurrence.cu" {
        x: Rows,
        gates: Rows,
        states: Rows,
        out: Rows,
        carried: CarriedArgs,
        decay: u64,
        bias: u64,
        skip: u64,
        key_heads: u32,
        value_heads: u32,
        key_width: u32,
        value_width: u32,
        floor: f32,
        padding: u32,
    }
}

twin! {
    pub(super) struct GateArgs = "Args" in "gate.cu" {
        gate: Rows,
        x: Rows,
        out: Rows,
        linear: u32,
        padding: u32,
    }
}

impl Launch<'_> {
    fn carried(&self, op: &Carried) -> Result<CarriedArgs, Refusal> {
        Ok(CarriedArgs {
            starts: self.rows(&op.sequence_starts)?,
            positions: self.rows(&op.positions)?,
            slots: self.rows(&op.slots)?,
            report: self.report,
        })
    }

    pub(super) fn short_conv(&mut self, op: &ShortConv) -> Result<(), Refusal> {
        let sequences = op.carried.slots.rows;
        let counted = crate::Buffer { rows: sequences, ..op.x.clone() };
        if op.taps() > TAPS {
            let message = format!(
                "short_conv: outputs depend on {} tokens, with this GPU's kernels on at most {TAPS}",
                op.taps()
            );
            return Err(DeviceError::Unsupported(message).into());
        }
        // Many tokens a thread, unless they are too few to fill the GPU, or of too many sequences.
        let fills =
            op.out.rows * op.out.width.div_ceil(RUN) >= EACH * THREADS * self.multiprocessors as usize;
        let each = if fills && op.out.rows >= EACH * sequences { EACH } else { 1 };
        let arguments = ShortConvArgs {
            x: self.rows(&op.x)?,
            states: self.rows(&op.states)?,
            out: self.rows(&op.out)?,
            kept: Rows { start: 0, stride: 0, rows: sequences as u32, width: op.x.width as u32 },
            carried: self.carried(&op.carried)?,
            weight: self.weights.get(&op.weight)?.start,
            bias: op.bias.as_ref().map_or(Ok(0), |bias| self.weights.get(bias).map(|bias| bias.start))?,
            taps: op.taps() as u32,
            each: each as u32,
        };
        let (from, to) = (op.x.dtype, op.out.dtype);
        let threads = crate::Buffer { rows: op.out.rows.div_ceil(each), ..op.out.clone() };
        self.by_columns(Columns::Runs, "short_conv", from, to, &threads, arguments)?;
        self.by_columns(Columns::Runs, "keep_rows", from, to, &counted, arguments)
    }

    pub(super) fn recurrence(&mut self, op: &Recurrence) -> Result<(), Refusal> {
        let (heads, width) = (op.value_heads(), op.value_width());
        if is_empty(&op.out) {
            return Ok(());
        }
        let (names, skip, floor) = match &op.rule {
            Rule::Delta => (["delta128", "delta128_few", "delta256", "delta256_few"], 0, 0.0),
            Rule::StateSpace { skip, floor } => {
                let names = ["space128", "space128_few", "space256", "space256_few"];
                (names, self.weights.get(skip)?.start, *floor)
            }
        };
        let (names, keys) = match op.key_width {
            0..=128 => (&names[..2], 128),
            129..=256 => (&names[2..], 256),
            wider => {
                let message =
                    format!("recurrence: keys are {wider} wide, this GPU's kernels take at most 256");
                return Err(DeviceError::Unsupported(message).into());
            }
        };
        // A column of a state is shared by so many lanes.
        let lanes = keys / ROWS;
        let blocks =
            |each: usize| op.carried.slots.rows * heads * width.div_ceil(STATE_THREADS / lanes * each);
        // Few, too, where it is reading states that takes the time.
        let brief = op.x.rows < 8 * op.carried.slots.rows;
        let few = brief || 2 * blocks(MANY) < 3 * self.multiprocessors as usize;
        let (operation, blocks) = if few { (names[1], blocks(FEW)) } else { (names[0], blocks(MANY)) };
        let arguments = RecurrenceArgs {
            x: self.rows(&op.x)?,
            gates: self.rows(&op.gates)?,
            states: self.rows(&op.states)?,
            out: self.rows(&op.out)?,
            carried: self.carried(&op.carried)?,
            decay: self.weights.get(&op.decay)?.start,
            bias: self.weights.get(&op.bias)?.start,
            key_heads: op.key_heads as u32,
            value_heads: heads as u32,
            key_width: op.key_width as u32,
            value_width: width as u32,
            skip,
            floor,
            padding: 0,
        };
        let kernel = self.kernels.get(operation, op.x.dtype, DType::F32)?;
        self.start(&kernel.function, (blocks as u32, 1), 0, arguments)
    }

    pub(super) fn gate(&mut self, op: &Gate) -> Result<(), Refusal> {
        let linear = u32::from(op.gating == Gating::Silu);
        let (gate, x, out) = (self.rows(&op.gate)?, self.rows(&op.x)?, self.rows(&op.out)?);
        let arguments = GateArgs { gate, x, out, linear, padding: 0 };
        self.by_columns(Columns::Runs, "gate", op.x.dtype, op.out.dtype, &op.out, arguments)
    }
}
