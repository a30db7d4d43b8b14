//! All the memory of the MoE layers of one rank, reserved once and used by every layer in turn.

use crate::PipelineOptions;
use epsmoe_base::DType;
use epsmoe_device::{Backend, Buffer, DeviceError};
use epsmoe_plan::{Capacity, LayerSizes, Schedule, record_words};
use std::sync::Arc;

/// Widths of the MoE layers of a model, and how much of everything a rank can hold at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PipelineSizes {
    /// Hidden width H, inner width I, top k, local experts L.
    pub layer: LayerSizes,
    /// Inner width of the shared expert; 0 without one.
    pub shared_inner: usize,
    /// Room for tokens, rows and copies, equal on all ranks.
    pub capacity: Capacity,
}

/// The buffers, in the order in which data walks through them.
#[derive(Clone)]
pub(crate) struct LayerBuffers {
    /// Router logits `[T, E]`, chosen experts and weights `[T, k]`.
    pub(crate) router_logits: Buffer,
    pub(crate) router_experts: Buffer,
    pub(crate) router_weights: Buffer,
    /// Token of each send row; the rows `[rows sent, H]` and their metadata records.
    pub(crate) send_index: Buffer,
    pub(crate) send_rows: Buffer,
    pub(crate) send_records: Buffer,
    /// What arrives: rows `[rows received, H]` and records.
    pub(crate) received_rows: Buffer,
    pub(crate) received_records: Buffer,
    /// Received row of each copy; the copies of one stage `[stage copies, H]`, their activations
    /// `[stage copies, I]`, and the outputs of all stages `[copies, H]`.
    pub(crate) expand_index: Buffer,
    pub(crate) expanded: Buffer,
    pub(crate) inner: Buffer,
    pub(crate) outputs: Buffer,
    /// Which copies, with which weights, make each partial sum; the sums `[rows received, H]`.
    pub(crate) reduce_starts: Buffer,
    pub(crate) reduce_index: Buffer,
    pub(crate) reduce_weights: Buffer,
    pub(crate) sums: Buffer,
    /// Sums that came home `[rows sent, H]`, and which of them make each token's output.
    pub(crate) home_rows: Buffer,
    pub(crate) home_starts: Buffer,
    pub(crate) home_index: Buffer,
    /// The shared expert's activations `[T, shared I]`, its gate `[T, 1]` and its output `[T, H]`.
    pub(crate) shared_inner: Buffer,
    pub(crate) shared_gate: Buffer,
    pub(crate) shared_out: Buffer,
    /// In a world of one rank: where each expert's copies start `[L + 1, 1]`, and two constants, where each token's
    /// copies start, `0, k, 2k, …`, and the tokens themselves, `0, 1, 2, …`, both `[T + 1, 1]`.
    pub(crate) expert_starts: Buffer,
    pub(crate) token_copies: Buffer,
    pub(crate) every_token: Buffer,
}

impl LayerBuffers {
    pub(crate) fn allocate<B: Backend>(device: &B, options: &PipelineOptions) -> Result<Self, DeviceError> {
        let PipelineSizes { layer, shared_inner, capacity } = options.sizes;
        let Capacity { tokens, rows_sent, rows_received, copies, stage_copies } = capacity;
        let (hidden, words, dtype) = (layer.hidden, record_words(layer.top_k), device.dtype());
        // Every micro-batch ends its offsets with one more.
        let ends = if options.policy.schedule == Schedule::TwoBatch { 2 } else { 1 };
        let values = |name, rows, width| device.allocate(name, dtype, rows, width);
        let floats = |name, rows, width| device.allocate(name, DType::F32, rows, width);
        let indices = |name, rows, width| device.allocate(name, DType::U32, rows, width);
        let alone = |rows| if options.placement.ranks() == 1 { rows } else { 0 };
        Ok(LayerBuffers {
            router_logits: floats("router_logits", tokens, options.placement.experts())?,
            router_experts: indices("router_experts", tokens, layer.top_k)?,
            router_weights: floats("router_weights", tokens, layer.top_k)?,
            send_index: indices("send_index", rows_sent, 1)?,
            send_rows: values("send_rows", rows_sent, hidden)?,
            send_records: indices("send_records", rows_sent, words)?,
            received_rows: values("received_rows", rows_received, hidden)?,
            received_records: indices("received_records", rows_received, words)?,
            expand_index: indices("expand_index", copies, 1)?,
            expanded: values("expanded", stage_copies, hidden)?,
            inner: values("inner", stage_copies, layer.inner)?,
            outputs: values("outputs", copies, hidden)?,
            reduce_starts: indices("reduce_starts", rows_received + ends, 1)?,
            reduce_index: indices("reduce_index", copies, 1)?,
            reduce_weights: floats("reduce_weights", copies, 1)?,
            sums: values("sums", rows_received, hidden)?,
            home_rows: values("home_rows", rows_sent, hidden)?,
            home_starts: indices("home_starts", tokens + ends, 1)?,
            home_index: indices("home_index", rows_sent, 1)?,
            shared_inner: values("shared_inner", tokens, shared_inner)?,
            shared_gate: floats("shared_gate", tokens, 1)?,
            shared_out: values("shared_out", tokens, hidden)?,
            expert_starts: indices("expert_starts", alone(layer.local_experts + 1), 1)?,
            token_copies: indices("token_copies", alone(tokens + 1), 1)?,
            every_token: indices("every_token", alone(tokens + 1), 1)?,
        })
    }

    /// What never changes, and where it belongs.
    pub(crate) fn constants(&self, top_k: usize) -> [(Arc<[u32]>, Buffer); 2] {
        let multiples = |buffer: &Buffer, of: usize| {
            let words = (0..buffer.rows).map(|row| (row * of) as u32).collect();
            (words, buffer.clone())
        };
        [multiples(&self.token_copies, top_k), multiples(&self.every_token, 1)]
    }

    /// What is left behind a micro-batch that takes up `used`. The copies of a stage are shared: the compute lane is at
    /// one stage at a time.
    pub(crate) fn behind(&self, used: &Capacity) -> Result<Self, DeviceError> {
        let Capacity { tokens, rows_sent, rows_received, copies, .. } = *used;
        let rest = |buffer: &Buffer, used: usize| buffer.rows(used.min(buffer.rows)..buffer.rows);
        Ok(LayerBuffers {
            send_index: rest(&self.send_index, rows_sent)?,
            send_rows: rest(&self.send_rows, rows_sent)?,
            send_records: rest(&self.send_records, rows_sent)?,
            received_rows: rest(&self.received_rows, rows_received)?,
            received_records: rest(&self.received_records, rows_received)?,
            expand_index: rest(&self.expand_index, copies)?,
            outputs: rest(&self.outputs, copies)?,
            reduce_starts: rest(&self.reduce_starts, rows_received + 1)?,
            reduce_index: rest(&self.reduce_index, copies)?,
            reduce_weights: rest(&self.reduce_weights, copies)?,
            sums: rest(&self.sums, rows_received)?,
            home_rows: rest(&self.home_rows, rows_sent)?,
            home_starts: rest(&self.home_starts, tokens + 1)?,
            home_index: rest(&self.home_index, rows_sent)?,
            shared_out: rest(&self.shared_out, tokens)?,
            ..self.clone()
        })
    }
}
