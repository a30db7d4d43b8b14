//! Attention: on the tensor cores where a kernel takes such heads, else element by element.

use super::{Launch, Refusal, Rows, is_empty, within};
use crate::cuda::kernels::{ATTENTION_64, ATTENTION_128, ATTENTION_MLA, AttentionTile, MLA_WIDTHS};
use crate::cuda::layout::twin;
use crate::cuda::report::Report;
use crate::op::Attention;
use crate::{Buffer, DeviceError};
use epsmoe_base::DType;

twin! {
    pub(super) struct AttentionArgs = "Args" in "attention.cuh" {
        q: Rows,
        keys: Rows,
        values: Rows,
        starts: Rows,
        positions: Rows,
        blocks: Rows,
        out: Rows,
        report: Report,
        sinks: u64,
        block_size: u32,
        heads: u32,
        kv_heads: u32,
        scale: f32,
        window: u32,
        vectors: u32,
    }
}

impl Launch<'_> {
    pub(super) fn attention(&mut self, op: &Attention) -> Result<(), Refusal> {
        if is_empty(&op.q) {
            return Ok(());
        }
        let (key_width, value_width) = (op.key_width(), op.value_width());
        let [q, keys, values, out] = [&op.q, &op.keys, &op.values, &op.out].map(|buffer| self.rows(buffer));
        let (q, keys, values, out) = (q?, keys?, values?, out?);
        let on_vectors = |rows: &Rows| rows.start.is_multiple_of(16) && rows.stride.is_multiple_of(8);
        let vectors = [q, keys, values, out].iter().all(on_vectors)
            && [key_width, value_width].iter().all(|width| width.is_multiple_of(8));
        let arguments = AttentionArgs {
            q,
            keys,
            values,
            starts: self.rows(&op.sequence_starts)?,
            positions: self.rows(&op.positions)?,
            blocks: self.rows(&op.blocks)?,
            out,
            report: self.report,
            sinks: op.sinks.as_ref().map_or(Ok(0), |sinks| self.weights.get(sinks).map(|held| held.start))?,
            block_size: op.block_size as u32,
            heads: op.heads as u32,
            kv_heads: op.kv_heads as u32,
            scale: op.scale,
            window: op.window.map_or(0, |window| u32::try_from(window).unwrap_or(0)),
            vectors: u32::from(vectors),
        };
        let grid = |blocks: usize| {
            u32::try_from(blocks).map_err(|_| {
                DeviceError::Unsupported(format!("attention: {:?} has too many rows for one launch", op.q))
            })
        };
        let dtypes = (op.q.dtype, op.out.dtype);
        let Some(tile) = attention_tile_for(op, self.kernels.has_hopper()) else {
            let kernel = self.kernels.get("attention", dtypes.0, dtypes.1)?;
            let shared = size_of::<f32>() * (key_width + value_width);
            let shared = within("attention: elements of a head", shared, kernel.shared_limit)?;
            return self.start(&kernel.function, (grid(op.q.rows * op.heads)?, 1), shared, arguments);
        };
        // Where sequences start only the GPU knows: each may leave one tile unfilled.
        let rows = op.q.rows * (op.heads / op.kv_heads);
        let tiles = rows.div_ceil(tile.rows as usize) + op.blocks.rows;
        let kernel = self.kernels.get(tile.operation, dtypes.0, dtypes.1)?;
        let shared = within("attention: a tile", tile.shared_bytes as usize, kernel.shared_limit)?;
        self.start(&kernel.function, (grid(tiles)?, op.kv_heads as u32), shared, arguments)
    }
}

/// The kernel on the tensor cores that takes such heads, if one does. Only what is the same in every step of a model
/// decides: kernels differ in bits.
fn attention_tile_for(op: &Attention, hopper: bool) -> Option<AttentionTile> {
    let (keys, values) = (op.key_width(), op.value_width());
    let start = |buffer: &Buffer| (buffer.allocation, buffer.offset, buffer.stride);
    let latent = op.kv_heads == 1 && start(&op.keys) == start(&op.values) && values <= keys;
    match keys.max(values) {
        _ if op.q.dtype != DType::BF16 || op.scale <= 0.0 => None,
        0..=64 => Some(ATTENTION_64),
        65..=128 => Some(ATTENTION_128),
        _ => (hopper && latent && op.sinks.is_none() && keys <= MLA_WIDTHS.0 && values <= MLA_WIDTHS.1)
            .then_some(ATTENTION_MLA),
    }
}
