//! All the memory of the MoE layers of one rank, reserved once and used by every layer in turn.

use crate::PipelineOptions;
use epsmoe_base::{DType, RowFormat};
use epsmoe_device::op::ReceiveOrder;
use epsmoe_device::{Buffer, DeviceError, Reserve};
use epsmoe_plan::{Capacity, LayerSizes, Schedule};

/// Widths of the MoE layers of a model, and how much of everything a rank can hold at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PipelineSizes {
    /// Widths, experts, ranks and slots.
    pub layer: LayerSizes,
    /// Room for tokens, rows and assignments, equal on all ranks.
    pub capacity: Capacity,
}

/// The buffers, in the order in which data walks through them.
#[derive(Clone)]
pub(crate) struct LayerBuffers {
    /// Router logits `[T, E]`, chosen experts and weights `[T, k]`.
    pub(crate) router_logits: Buffer,
    pub(crate) router_experts: Buffer,
    pub(crate) router_weights: Buffer,
    /// The layer's map: slot of each expert `[E, 1]`, first slot on the rank of each slot `[S, 1]`, first slot of each rank
    /// and the end `[R + 1, 1]`.
    pub(crate) slot_of: Buffer,
    pub(crate) block_starts: Buffer,
    pub(crate) rank_starts: Buffer,
    /// Slots of each token and their weights `[T, k]`, and histograms over slots `[3, S]`, which the host reads.
    pub(crate) slots: Buffer,
    pub(crate) slot_weights: Buffer,
    pub(crate) counts: Buffer,
    /// Token and last slot of each row sent; the rows `[rows sent, H]` and their metadata `[rows sent, 2k]`.
    pub(crate) send_tokens: Buffer,
    pub(crate) send_last: Buffer,
    pub(crate) send_rows: Buffer,
    pub(crate) send_metadata: Buffer,
    /// What arrives: rows `[rows received, H]` and metadata.
    pub(crate) received_rows: Buffer,
    pub(crate) received_metadata: Buffer,
    /// What was announced `[R · L, 5]`; metadata of each received row; sum of each row of metadata.
    pub(crate) receive_bins: Buffer,
    pub(crate) receive_order: Buffer,
    pub(crate) receive_sums: Buffer,
    /// Where the assignments of each slot start `[L + 1, 1]`, and the received row of each.
    pub(crate) slot_starts: Buffer,
    pub(crate) expand_index: Buffer,
    /// The rows of one stage's assignments `[stage assignments, H]`, their activations `[stage assignments, I]`, and the
    /// outputs of all stages `[assignments, H]`.
    pub(crate) expanded: Buffer,
    pub(crate) inner: Buffer,
    /// Gates and other factors before an activation of its own `[stage assignments, 2I]`, or what one map gives.
    pub(crate) products: Buffer,
    pub(crate) outputs: Buffer,
    /// Which assignments, with which weights, make each partial sum `[rows received, k]`; the sums `[rows received, H]`.
    pub(crate) reduce_index: Buffer,
    pub(crate) reduce_weights: Buffer,
    pub(crate) sums: Buffer,
    /// Sums that came back `[rows sent, H]`, and which of them make each token's output `[T, min(k, R)]`.
    pub(crate) combined_rows: Buffer,
    pub(crate) combine_index: Buffer,
    /// Where tokens are looked up by themselves, a constant: `0, 1, 2, …` `[T, 1]`.
    pub(crate) every_token: Buffer,
    /// The shared expert's activations `[T, shared I]`, its gate `[T, 1]` and its output `[T, H]`.
    pub(crate) shared_inner: Buffer,
    /// What its maps give before an activation of its own.
    pub(crate) shared_products: Buffer,
    /// Rows of the shared expert as codes, if it takes them so `[T, H]`.
    pub(crate) shared_rows: Buffer,
    pub(crate) shared_gate: Buffer,
    pub(crate) shared_out: Buffer,
    /// The weight of experts that give rows back as they are `[T, 1]`, and what they give `[T, H]`.
    pub(crate) kept_weights: Buffer,
    pub(crate) kept_rows: Buffer,
}

impl LayerBuffers {
    pub(crate) fn allocate(device: &impl Reserve, options: &PipelineOptions) -> Result<Self, DeviceError> {
        let PipelineSizes { layer, capacity } = options.sizes;
        let Capacity { tokens, rows_sent, rows_received, assignments, stage_assignments } = capacity;
        let LayerSizes {
            hidden,
            inner,
            shared_inner,
            top_k,
            experts,
            identities,
            ranks,
            local_slots,
            replicas,
            wire,
            ..
        } = layer;
        // What is counted and announced is told of each micro-batch.
        let batches = if options.policy.schedule == Schedule::TwoBatch { 2 } else { 1 };
        let shared_tokens = if shared_inner > 0 { tokens } else { 0 };
        let kept_tokens = if identities > 0 { tokens } else { 0 };
        // Where nothing is sent, experts read rows where they are.
        let arriving = if rows_sent > 0 { rows_received } else { 0 };
        let values = |name, rows, width| device.allocate(name, device.dtype(), rows, width);
        let travelling = |name, rows, format: RowFormat| {
            let (dtype, elements) = format.elements(hidden);
            device.allocate(name, dtype, rows, elements)
        };
        let floats = |name, rows, width| device.allocate(name, DType::F32, rows, width);
        let indices = |name, rows, width| device.allocate(name, DType::U32, rows, width);
        Ok(LayerBuffers {
            router_logits: floats("router_logits", tokens, experts + identities)?,
            router_experts: indices("router_experts", tokens, top_k)?,
            router_weights: floats("router_weights", tokens, top_k)?,
            slot_of: indices("slot_of", experts, replicas)?,
            block_starts: indices("block_starts", layer.slots(), 1)?,
            rank_starts: indices("rank_starts", ranks + 1, 1)?,
            slots: indices("slots", tokens, top_k)?,
            slot_weights: floats("slot_weights", tokens, top_k)?,
            counts: device.allocate_for_host("counts", DType::U32, batches * 3, layer.slots())?,
            send_tokens: indices("send_tokens", rows_sent, 1)?,
            send_last: indices("send_last", rows_sent, 1)?,
            send_rows: travelling("send_rows", rows_sent, wire.dispatch)?,
            send_metadata: indices("send_metadata", rows_sent, 2 * top_k)?,
            received_rows: travelling("received_rows", arriving, wire.dispatch)?,
            received_metadata: indices("received_metadata", rows_received, 2 * top_k)?,
            receive_bins: indices("receive_bins", batches * ranks * local_slots, ReceiveOrder::BIN)?,
            receive_order: indices("receive_order", rows_received, 1)?,
            receive_sums: indices("receive_sums", rows_received, 1)?,
            slot_starts: indices("slot_starts", batches * (local_slots + 1), 1)?,
            expand_index: indices("expand_index", assignments, 1)?,
            expanded: values("expanded", stage_assignments, hidden)?,
            inner: values("inner", stage_assignments, inner)?,
            products: floats(
                "products",
                stage_assignments,
                if layer.kept_products { layer.maps * inner } else { 0 },
            )?,
            outputs: values("outputs", assignments, hidden)?,
            reduce_index: indices("reduce_index", rows_received, top_k)?,
            reduce_weights: floats("reduce_weights", rows_received, top_k)?,
            sums: travelling("sums", rows_received, wire.combine)?,
            combined_rows: travelling("combined_rows", rows_sent, wire.combine)?,
            combine_index: indices("combine_index", tokens, layer.ranks_of_token())?,
            every_token: indices("every_token", tokens, 1)?,
            shared_inner: values("shared_inner", shared_tokens, shared_inner)?,
            shared_products: floats(
                "shared_products",
                shared_tokens,
                if layer.kept_products { layer.maps * shared_inner } else { 0 },
            )?,
            shared_rows: device.allocate_codes("shared_rows", shared_tokens, hidden)?,
            shared_gate: floats("shared_gate", shared_tokens, 1)?,
            shared_out: values("shared_out", shared_tokens, hidden)?,
            kept_weights: floats("kept_weights", kept_tokens, 1)?,
            kept_rows: values("kept_rows", kept_tokens, hidden)?,
        })
    }

    /// Room for the histograms of a batch over so many slots `[3, S]`.
    pub(crate) fn histograms(&self, slots: usize) -> Result<Buffer, DeviceError> {
        self.counts.rows(0..3)?.columns(0..slots)
    }

    /// The part of a batch: all of it for the first one, and what is left behind those `before` it for the second. Each
    /// token has its own rows of what is `[T, …]`, and the assignments of a stage are shared: the compute lane is at one
    /// stage at a time.
    pub(crate) fn of_batch(&self, number: usize, before: &Capacity) -> Result<Self, DeviceError> {
        if number == 0 {
            return Ok(self.clone());
        }
        let Capacity { rows_sent, rows_received, assignments, .. } = *before;
        let rest = |buffer: &Buffer, used: usize| buffer.rows(used.min(buffer.rows)..buffer.rows);
        let second = |buffer: &Buffer| rest(buffer, buffer.rows / 2);
        Ok(LayerBuffers {
            counts: second(&self.counts)?,
            send_tokens: rest(&self.send_tokens, rows_sent)?,
            send_last: rest(&self.send_last, rows_sent)?,
            send_rows: rest(&self.send_rows, rows_sent)?,
            send_metadata: rest(&self.send_metadata, rows_sent)?,
            received_rows: rest(&self.received_rows, rows_received)?,
            received_metadata: rest(&self.received_metadata, rows_received)?,
            receive_bins: second(&self.receive_bins)?,
            receive_order: rest(&self.receive_order, rows_received)?,
            receive_sums: rest(&self.receive_sums, rows_received)?,
            slot_starts: second(&self.slot_starts)?,
            expand_index: rest(&self.expand_index, assignments)?,
            outputs: rest(&self.outputs, assignments)?,
            reduce_index: rest(&self.reduce_index, rows_received)?,
            reduce_weights: rest(&self.reduce_weights, rows_received)?,
            sums: rest(&self.sums, rows_received)?,
            combined_rows: rest(&self.combined_rows, rows_sent)?,
            ..self.clone()
        })
    }
}
