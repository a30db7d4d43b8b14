//! The index arrays of an MoE layer on a GPU: blocks that count and then place, a kernel or two for each operation.

use super::{Launch, Refusal, Rows};
use crate::Buffer;
use crate::cuda::report::Report;
use crate::op::{AssignSlots, CountSlots, ReceiveOrder, SendOrder, SortBySlot};
use epsmoe_base::DType;

/// Arguments of a kernel over `N` views that complains.
#[repr(C)]
#[derive(Clone, Copy)]
struct Views<const N: usize> {
    views: [Rows; N],
    report: Report,
}

impl Launch<'_> {
    pub(super) fn assign_slots(&mut self, op: &AssignSlots) -> Result<(), Refusal> {
        let AssignSlots { experts, weights, slot_of, slots, slot_weights } = op;
        let arguments = self.views([experts, weights, slot_of, slots, slot_weights])?;
        self.threads("assign", DType::F32, DType::F32, experts, experts.rows * experts.width, arguments)
    }

    pub(super) fn count_slots(&mut self, op: &CountSlots) -> Result<(), Refusal> {
        let CountSlots { slots, block_starts, counts } = op;
        let arguments = self.views([slots, block_starts, counts])?;
        self.blocks("count", block_starts.rows, arguments)
    }

    pub(super) fn send_order(&mut self, op: &SendOrder) -> Result<(), Refusal> {
        let SendOrder { slots, weights, block_starts, counts, tokens, last, metadata, sums } = op;
        let views = [slots, weights, block_starts, counts, tokens, last, metadata, sums];
        let arguments = self.views(views)?;
        self.blocks("send_rows", block_starts.rows, arguments)?;
        self.blocks("send_sums", block_starts.rows, arguments)
    }

    pub(super) fn receive_order(&mut self, op: &ReceiveOrder) -> Result<(), Refusal> {
        #[repr(C)]
        #[derive(Clone, Copy)]
        struct Args {
            views: Views<4>,
            local: u32,
            padding: u32,
        }
        let ReceiveOrder { slots, bins, local, order, sums } = op;
        let views = self.views([slots, bins, order, sums])?;
        let arguments = Args { views, local: *local as u32, padding: 0 };
        self.threads("receive_rows", DType::F32, DType::F32, order, order.rows, arguments)?;
        self.blocks("receive_sums", *local, arguments)
    }

    pub(super) fn sort_by_slot(&mut self, op: &SortBySlot) -> Result<(), Refusal> {
        #[repr(C)]
        #[derive(Clone, Copy)]
        struct Args {
            views: Views<8>,
            travelled: u32,
            padding: u32,
        }
        let SortBySlot { slots, travelled, starts, rows, terms } = op;
        let [order, sums, weights, factors] = match travelled {
            Some(travelled) => [&travelled.order, &travelled.sums, &travelled.weights, &travelled.factors],
            // Not looked at.
            None => [slots; 4],
        };
        let views = self.views([slots, order, sums, weights, factors, starts, rows, terms])?;
        let arguments = Args { views, travelled: u32::from(travelled.is_some()), padding: 0 };
        self.blocks("sort", starts.rows - 1, arguments)
    }

    fn views<const N: usize>(&self, buffers: [&Buffer; N]) -> Result<Views<N>, Refusal> {
        let mut views = [Rows::default(); N];
        for (view, buffer) in views.iter_mut().zip(buffers) {
            *view = self.rows(buffer)?;
        }
        Ok(Views { views, report: self.report })
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
