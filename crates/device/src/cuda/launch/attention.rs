//! Attention: on the tensor cores where a kernel takes such heads, else element by element.

use super::{Launch, MOST_ROWS, Refusal, Rows, is_empty, within};
use crate::cuda::driver::{Element, Matrix, TensorMap};
use crate::cuda::kernels::{
    ATTENTION_64, ATTENTION_128, ATTENTION_HOPPER, ATTENTION_MLA, AttentionTile, FEW_COLUMNS, FEW_HEADS,
    FEW_PART_BYTES, FEW_STEP, FEW_SUMS_BYTES, HopperAttention, MLA_WIDTHS, SCRATCH_WORDS, SPAN_KEYS,
    few_shared_bytes,
};
use crate::cuda::layout::twin;
use crate::cuda::report::Report;
use crate::op::{Attention, Sight};
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
        value_scale: f32,
        window: u32,
        vectors: u32,
        longest: u32,
        stretch: u32,
        padding: u32,
        scratch: u64,
        scratch_bytes: u64,
    }
}

twin! {
    pub(super) struct HopperAttentionArgs = "HopperArgs" in "attention_hopper.cuh" {
        keys: TensorMap,
        values: TensorMap,
        attention: AttentionArgs,
    }
}

twin! {
    pub(super) struct FewArgs = "FewArgs" in "attention_few.cuh" {
        attention: AttentionArgs,
        scores: u64,
        most: u64,
        parts: u64,
        steps: u32,
        spans: u32,
        tiles: u32,
        halves: u32,
        unit: u32,
        padding: u32,
    }
}

/// What the kernels for few tokens are given, for the units (16 query heads of a token) of which there is room for what they hand
/// over at a time.
struct Few {
    arguments: FewArgs,
    units: usize,
    together: usize,
}

impl Launch<'_> {
    pub(super) fn attention(&mut self, op: &Attention) -> Result<(), Refusal> {
        if is_empty(&op.q) {
            return Ok(());
        }
        let (key_width, value_width) = (op.key_width(), op.value_width());
        let [q, keys, values, out] = [&op.q, &op.keys, &op.values, &op.out].map(|buffer| self.rows(buffer));
        let (q, keys, values, out) = (q?, keys?, values?, out?);
        // Pieces of eight elements, which of codes take half of 16 bytes.
        let on_vectors = |(buffer, rows): (&Buffer, Rows)| {
            rows.start.is_multiple_of(8 * buffer.dtype.bytes() as u64) && rows.stride.is_multiple_of(8)
        };
        let vectors =
            [(&op.q, q), (&op.keys, keys), (&op.values, values), (&op.out, out)].into_iter().all(on_vectors)
                && [key_width, value_width].iter().all(|width| width.is_multiple_of(8));
        // What is longer than any position cuts nothing off.
        let positions = |count: usize| u32::try_from(count).unwrap_or(0);
        let (window, stretch) = match op.sight {
            Sight::All => (0, 0),
            Sight::Last(count) => (positions(count), 0),
            Sight::Stretch(count) => (0, positions(count)),
        };
        let scratch = self.scratch.ok_or_else(|| {
            DeviceError::Unsupported(
                "attention runs on the compute lane alone, which has room for its sums".into(),
            )
        })?;
        let words = SCRATCH_WORDS * size_of::<u32>();
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
            value_scale: op.value_scale,
            window,
            vectors: u32::from(vectors),
            longest: u32::try_from(op.longest).unwrap_or(u32::MAX),
            stretch,
            padding: 0,
            scratch: scratch.start,
            scratch_bytes: (scratch.bytes - words) as u64,
        };
        let grid = |blocks: usize| {
            u32::try_from(blocks).map_err(|_| {
                DeviceError::Unsupported(format!("attention: {:?} has too many rows for one launch", op.q))
            })
        };
        let dtypes = (op.keys.dtype, op.out.dtype);
        let hopper = vectors.then(|| self.hopper_attention(op)).flatten();
        let Some(tile) = hopper.or_else(|| attention_tile_for(op, self.kernels.has_hopper())) else {
            let kernel = self.kernels.get("attention", dtypes.0, dtypes.1)?;
            let shared = size_of::<f32>() * (key_width + value_width);
            let shared = within("attention: elements of a head", shared, kernel.shared_limit)?;
            return self.start(&kernel.function, (grid(op.q.rows * op.heads)?, 1), shared, arguments);
        };
        // Where sequences start only the GPU knows: each may leave one tile unfilled.
        let rows = op.q.rows * (op.heads / op.kv_heads);
        let tiles = rows.div_ceil(tile.rows as usize) + op.blocks.rows;
        if vectors
            && self.leaves_much_idle(op, tiles)
            && let Some(few) = self.few(op, &tile, arguments)
        {
            return self.attention_of_few(op, &few);
        }
        let blocks = (grid(tiles)?, op.kv_heads as u32);
        let kernel = self.kernels.get(tile.operation, dtypes.0, dtypes.1)?;
        let shared = within("attention: a tile", tile.shared_bytes as usize, kernel.shared_limit)?;
        if hopper.is_none() {
            return self.start(&kernel.function, blocks, shared, arguments);
        }
        let map = |cache: &Rows| {
            if op.keys.dtype == DType::E4M3 {
                // Threads bring codes, by the views.
                return Ok(bytemuck::Zeroable::zeroed());
            }
            let piece = (FEW_STEP as u32, FEW_STEP as u32);
            let (rows, width, stride) = (cache.rows as usize, cache.width as usize, cache.stride as usize);
            let element = Element::Bf16;
            TensorMap::new(&Matrix { start: cache.start, rows, width, stride, element, piece })
        };
        let (keys, values) = (map(&arguments.keys)?, map(&arguments.values)?);
        self.start(
            &kernel.function,
            blocks,
            shared,
            HopperAttentionArgs { keys, values, attention: arguments },
        )
    }
}

impl Launch<'_> {
    /// The kernel by TMA and wgmma, if it takes such heads and such a cache.
    fn hopper_attention(&self, op: &Attention) -> Option<AttentionTile> {
        let steps = self.kernels.has_hopper()
            && op.q.dtype == DType::BF16
            && op.block_size.is_multiple_of(FEW_STEP)
            && op.scale > 0.0;
        let fits = |kernel: &&HopperAttention| steps && [op.key_width(), op.value_width()] == kernel.widths;
        ATTENTION_HOPPER.iter().find(fits).map(|kernel| kernel.tile)
    }

    /// Whether the kernels for many rows would leave most of the GPU without work, and each sequence has few.
    fn leaves_much_idle(&self, op: &Attention, tiles: usize) -> bool {
        /// A sequence's cache is read again for each of its tokens.
        const TOKENS: usize = 4;
        op.q.rows <= TOKENS * op.blocks.rows && 2 * tiles * op.kv_heads <= self.multiprocessors as usize
    }

    /// How few tokens go through kernels of their own, if there is room for what these hand over. Their bits are those of the
    /// kernel for many.
    fn few(&self, op: &Attention, tile: &AttentionTile, attention: AttentionArgs) -> Option<Few> {
        let most = op.sight.most().unwrap_or(usize::MAX);
        let steps = op.longest.min(most.saturating_add(FEW_STEP)).div_ceil(FEW_STEP).max(1);
        let spans = op.longest.min(most.saturating_add(SPAN_KEYS)).div_ceil(SPAN_KEYS).max(1);
        let tiles = (op.heads / op.kv_heads).div_ceil(FEW_HEADS);
        let columns = op.value_width().div_ceil(FEW_COLUMNS);
        let scores = steps * FEW_HEADS * FEW_STEP * size_of::<f32>();
        let maxima = steps * FEW_HEADS * size_of::<f32>();
        let parts = columns * spans * FEW_PART_BYTES;
        let units = op.q.rows * op.kv_heads * tiles;
        let together = (attention.scratch_bytes as usize / (scores + maxima + parts))
            .min(MOST_ROWS / spans)
            .min(SCRATCH_WORDS / columns)
            .min(units);
        let start = attention.scratch + (SCRATCH_WORDS * size_of::<u32>()) as u64;
        let after = |bytes: usize| start + (together * bytes) as u64;
        let fits = together > 0 && few_shared_bytes(op.key_width()) <= 100 << 10;
        let arguments = FewArgs {
            attention,
            scores: after(0),
            most: after(scores),
            parts: after(scores + maxima),
            steps: steps as u32,
            spans: spans as u32,
            tiles: tiles as u32,
            halves: u32::from(tile.operation == ATTENTION_MLA.operation),
            unit: 0,
            padding: 0,
        };
        fits.then_some(Few { arguments, units, together })
    }

    fn attention_of_few(&self, op: &Attention, few: &Few) -> Result<(), Refusal> {
        let [scores, sums] = ["attention_scores", "attention_sums"]
            .map(|operation| self.kernels.get(operation, op.keys.dtype, op.out.dtype));
        let (scores, sums) = (scores?, sums?);
        let shared = within("attention: a step", few_shared_bytes(op.key_width()), scores.shared_limit)?;
        let columns = op.value_width().div_ceil(FEW_COLUMNS) as u32;
        for unit in (0..few.units).step_by(few.together) {
            let units = few.together.min(few.units - unit) as u32;
            let arguments = FewArgs { unit: unit as u32, ..few.arguments };
            self.start(&scores.function, (arguments.steps, units), shared, arguments)?;
            let blocks = (columns, units * arguments.spans);
            self.start(&sums.function, blocks, FEW_SUMS_BYTES as u32, arguments)?;
        }
        Ok(())
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
