//! The index arrays of an MoE layer: blocks that count and then place, a kernel or two for each operation.

use super::{Columns, Launch, Refusal, Rows};
use crate::cuda::layout::twin;
use crate::cuda::report::Report;
use crate::op::{AssignSlots, CountSlots, ReceiveOrder, SendOrder, SortBySlot, SpreadSlots};
use epsmoe_base::DType;

twin! {
    pub(super) struct AssignArgs = "Args" in "assign.cu" {
        experts: Rows,
        weights: Rows,
        slot_of: Rows,
        slots: Rows,
        slot_weights: Rows,
        kept: Rows,
        report: Report,
        slotless: u32,
        padding: u32,
    }
}

twin! {
    pub(super) struct CountArgs = "Args" in "count.cu" {
        slots: Rows,
        block_starts: Rows,
        counts: Rows,
        report: Report,
    }
}

twin! {
    pub(super) struct SendOrderArgs = "Args" in "send_order.cu" {
        slots: Rows,
        weights: Rows,
        block_starts: Rows,
        counts: Rows,
        tokens: Rows,
        last: Rows,
        metadata: Rows,
        sums: Rows,
        report: Report,
    }
}

twin! {
    pub(super) struct SpreadArgs = "Args" in "spread_slots.cu" {
        slots: Rows,
        weights: Rows,
        rank_starts: Rows,
        metadata: Rows,
        sums: Rows,
        report: Report,
    }
}

twin! {
    pub(super) struct ReceiveOrderArgs = "Args" in "receive_order.cu" {
        slots: Rows,
        bins: Rows,
        order: Rows,
        sums: Rows,
        report: Report,
        local: u32,
        padding: u32,
    }
}

twin! {
    pub(super) struct SortArgs = "Args" in "sort.cu" {
        slots: Rows,
        order: Rows,
        sums: Rows,
        weights: Rows,
        factors: Rows,
        starts: Rows,
        rows: Rows,
        terms: Rows,
        report: Report,
        travelled: u32,
        padding: u32,
    }
}

impl Launch<'_> {
    pub(super) fn assign_slots(&mut self, op: &AssignSlots) -> Result<(), Refusal> {
        let arguments = AssignArgs {
            experts: self.rows(&op.experts)?,
            weights: self.rows(&op.weights)?,
            slot_of: self.rows(&op.slot_of)?,
            slots: self.rows(&op.slots)?,
            slot_weights: self.rows(&op.slot_weights)?,
            kept: op.slotless.as_ref().map_or(Ok(Rows::NONE), |slotless| self.rows(&slotless.weights))?,
            report: self.report,
            slotless: op.slotless.as_ref().map_or(0, |slotless| slotless.experts as u32),
            padding: 0,
        };
        self.by_columns(Columns::Each, "assign", DType::F32, DType::F32, &op.experts, arguments)
    }

    pub(super) fn count_slots(&mut self, op: &CountSlots) -> Result<(), Refusal> {
        let arguments = CountArgs {
            slots: self.rows(&op.slots)?,
            block_starts: self.rows(&op.block_starts)?,
            counts: self.rows(&op.counts)?,
            report: self.report,
        };
        self.blocks("count", op.block_starts.rows, arguments)
    }

    pub(super) fn send_order(&mut self, op: &SendOrder) -> Result<(), Refusal> {
        let arguments = SendOrderArgs {
            slots: self.rows(&op.slots)?,
            weights: self.rows(&op.weights)?,
            block_starts: self.rows(&op.block_starts)?,
            counts: self.rows(&op.counts)?,
            tokens: self.rows(&op.tokens)?,
            last: self.rows(&op.last)?,
            metadata: self.rows(&op.metadata)?,
            sums: self.rows(&op.sums)?,
            report: self.report,
        };
        self.blocks("send_rows", op.block_starts.rows, arguments)?;
        self.blocks("send_sums", op.block_starts.rows, arguments)
    }

    pub(super) fn spread_slots(&mut self, op: &SpreadSlots) -> Result<(), Refusal> {
        let arguments = SpreadArgs {
            slots: self.rows(&op.slots)?,
            weights: self.rows(&op.weights)?,
            rank_starts: self.rows(&op.rank_starts)?,
            metadata: self.rows(&op.metadata)?,
            sums: self.rows(&op.sums)?,
            report: self.report,
        };
        let each = op.metadata.columns(0..1)?;
        self.by_columns(Columns::Each, "spread_slots", DType::F32, DType::F32, &each, arguments)
    }

    pub(super) fn receive_order(&mut self, op: &ReceiveOrder) -> Result<(), Refusal> {
        let arguments = ReceiveOrderArgs {
            slots: self.rows(&op.slots)?,
            bins: self.rows(&op.bins)?,
            order: self.rows(&op.order)?,
            sums: self.rows(&op.sums)?,
            report: self.report,
            local: op.local as u32,
            padding: 0,
        };
        self.by_columns(Columns::Each, "receive_rows", DType::F32, DType::F32, &op.order, arguments)?;
        self.blocks("receive_sums", op.local, arguments)
    }

    pub(super) fn sort_by_slot(&mut self, op: &SortBySlot) -> Result<(), Refusal> {
        let [order, sums, weights, factors] = match &op.travelled {
            Some(travelled) => [
                self.rows(&travelled.order)?,
                self.rows(&travelled.sums)?,
                self.rows(&travelled.weights)?,
                self.rows(&travelled.factors)?,
            ],
            None => [Rows::NONE; 4],
        };
        let arguments = SortArgs {
            slots: self.rows(&op.slots)?,
            order,
            sums,
            weights,
            factors,
            starts: self.rows(&op.starts)?,
            rows: self.rows(&op.rows)?,
            terms: self.rows(&op.terms)?,
            report: self.report,
            travelled: u32::from(op.travelled.is_some()),
            padding: 0,
        };
        self.blocks("sort", op.starts.rows - 1, arguments)
    }

    /// Starts a kernel that gives a block to every bin.
    fn blocks<A: Copy>(&self, operation: &'static str, bins: usize, arguments: A) -> Result<(), Refusal> {
        if bins == 0 {
            return Ok(());
        }
        let kernel = self.kernels.get(operation, DType::F32, DType::F32)?;
        self.start(&kernel.function, (bins as u32, 1), 0, arguments)
    }
}
