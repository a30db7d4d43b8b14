//! Rotary position embeddings: the table of angles, and rows rotated by it.

use super::{Columns, Launch, Refusal, Rows};
use crate::Buffer;
use crate::cuda::layout::twin;
use crate::op::{RopeStyle, RopeTable, Rotate};
use epsmoe_base::DType;

twin! {
    pub(super) struct TableArgs = "Args" in "rope_table.cu" {
        positions: Rows,
        out: Rows,
        frequencies: u64,
        scale: f32,
        step: f32,
        rate: f32,
        padding: u32,
    }
}

twin! {
    pub(super) struct RotateArgs = "Args" in "rotate.cu" {
        x: Rows,
        rope_table: Rows,
        pairs: Rows,
        head_width: u32,
        first: u32,
        interleaved: u32,
        padding: u32,
    }
}

impl Launch<'_> {
    pub(super) fn rope_table(&mut self, op: &RopeTable) -> Result<(), Refusal> {
        let arguments = TableArgs {
            positions: self.rows(&op.positions)?,
            out: self.rows(&op.out)?,
            frequencies: self.weights.get(&op.frequencies)?.start,
            scale: op.scale,
            step: op.growth.map_or(1.0, |growth| growth.step),
            rate: op.growth.map_or(0.0, |growth| growth.rate),
            padding: 0,
        };
        self.elements("rope_table", DType::F32, DType::F32, &op.out, arguments)
    }

    pub(super) fn rotate(&mut self, op: &Rotate) -> Result<(), Refusal> {
        let pairs = Buffer { width: op.x.width / op.head_width * (op.rope_table.width / 2), ..op.x.clone() };
        let arguments = RotateArgs {
            x: self.rows(&op.x)?,
            rope_table: self.rows(&op.rope_table)?,
            pairs: Rows { rows: pairs.rows as u32, width: pairs.width as u32, ..Rows::NONE },
            head_width: op.head_width as u32,
            first: op.start as u32,
            interleaved: u32::from(op.style == RopeStyle::Interleaved),
            padding: 0,
        };
        self.by_columns(Columns::Runs, "rotate", op.x.dtype, op.x.dtype, &pairs, arguments)
    }
}
