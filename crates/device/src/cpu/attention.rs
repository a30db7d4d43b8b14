//! Attention in blocks of keys, for one query or thousands, through the micro-kernel of the matrix products.
//!
//! A task is one key head of one sequence and a run of its new tokens: rows are (token, query head) pairs that
//! share that head. It walks the cached keys in blocks of [`KEYS`] positions counted from 0, and keeps for each
//! row the largest score so far, the sum of powers and the weighted values (the online softmax of Milakov and
//! Gimelshein, arXiv 1805.02867). Blocks begin at fixed positions and all sums run in a fixed order, so a row's
//! bits depend on its query and on the keys that it sees, not on the rows beside it: a token decoded alone has the
//! bits it has in a prompt. Codes become numbers where blocks are packed, and go on as numbers do.

use super::gemm::{
    AlignedWords, BLOCK_STRIDE, Blocks, ElementType, Functions, Isa, Prefetch, Tile, bytes_to_words, exp,
};
use super::pool::ComputePool;
use super::prefetch_all;
use crate::threaded::{AttentionViews, Cached, Element};
use epsmoe_base::DType;
use epsmoe_base::float8::e4m3_bits;
use half::bf16;
use std::cell::RefCell;
use std::ops::Range;

/// Key positions in a block: what the weighted values wait for in registers, and a block of packed rows.
pub(super) const KEYS: usize = 64;

/// Rows of a task: enough that packing a block of keys is little beside using it.
const ROWS: usize = 512;

/// Runs the operation on the pool's threads.
pub(super) fn run<T: Element, C: Cached<T>>(
    pool: &mut ComputePool,
    isa: Isa,
    views: &AttentionViews<'_, T, C>,
) {
    let group = views.op.heads / views.op.kv_heads;
    let mut tasks = Vec::new();
    let mut first = 0;
    for sequence in views.sequences.chunk_by(|a, b| a == b) {
        let tokens = first..first + sequence.len();
        first = tokens.end;
        for start in tokens.clone().step_by((ROWS / group).max(1)) {
            let tokens = start..tokens.end.min(start + (ROWS / group).max(1));
            tasks.extend((0..views.op.kv_heads).map(|kv_head| (tokens.clone(), kv_head)));
        }
    }
    // Later tokens see more keys: the longest tasks first, so that the threads end together.
    tasks.sort_by_key(|(tokens, _)| std::cmp::Reverse(views.positions[tokens.end - 1]));
    pool.run(tasks.len(), |index| {
        let (tokens, kv_head) = tasks[index].clone();
        SCRATCH.with_borrow_mut(|scratch| {
            let functions = Functions::select(isa, ElementType::of(T::DTYPE));
            Task { views, functions, tokens, kv_head, group }.run(scratch);
        });
    });
}

/// One thread's room, kept from call to call. Operands are words as the micro-kernel takes them (a float32, or two
/// bfloat16 that follow each other along the sum), scores and sums are float32.
struct Scratch {
    /// Queries, tile after tile; in a tile, block after block of steps; in a block, row after row.
    queries: AlignedWords,
    /// Keys of a block, panel after panel of `width` keys: for each step `width` words.
    keys: AlignedWords,
    /// One key, before its words go to their columns.
    key: Vec<u32>,
    /// The numbers of one key or value in codes.
    decoded: Vec<u32>,
    /// Values of a block, panel after panel of `width` columns: for each word of keys `width` words.
    values: AlignedWords,
    /// Scores of a tile, panel after panel `[rows, width]`.
    scores: AlignedWords,
    /// Powers of a tile, as the micro-kernel reads rows.
    powers: AlignedWords,
    /// Weighted values, tile after tile; in a tile, panel after panel `[rows, width]`.
    sums: AlignedWords,
    state: Vec<RowState>,
}

/// Where a row's softmax stands.
#[derive(Clone, Copy)]
struct RowState {
    /// Key positions the row sees.
    first: usize,
    end: usize,
    /// Largest score so far.
    most: f32,
    /// Sum of `exp(score − most)`.
    total: f32,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::new(Scratch {
        queries: AlignedWords::zeros(0),
        keys: AlignedWords::zeros(0),
        key: Vec::new(),
        decoded: Vec::new(),
        values: AlignedWords::zeros(0),
        scores: AlignedWords::zeros(0),
        powers: AlignedWords::zeros(0),
        sums: AlignedWords::zeros(0),
        state: Vec::new(),
    });
}

struct Task<'a, 'v, T, C> {
    views: &'a AttentionViews<'v, T, C>,
    functions: &'static Functions,
    tokens: Range<usize>,
    kv_head: usize,
    group: usize,
}

impl<T: Element, C: Cached<T>> Task<'_, '_, T, C> {
    /// Numbers in a word.
    const IN_WORD: usize = size_of::<u32>() / size_of::<T>();

    fn run(&self, scratch: &mut Scratch) {
        self.begin(scratch);
        let first = scratch.state.iter().map(|row| row.first).min().unwrap_or(0);
        let end = scratch.state.iter().map(|row| row.end).max().unwrap_or(0);
        for block in first / KEYS..end.div_ceil(KEYS) {
            let positions = block * KEYS..end.min((block + 1) * KEYS);
            self.prefetch(positions.end..end.min(positions.end + KEYS));
            self.pack_keys(&positions, scratch);
            self.pack_values(&positions, scratch);
            for tile in self.tiles() {
                let sees = |row: &RowState| row.first < positions.end && row.end > positions.start;
                if scratch.state[tile.clone()].iter().any(sees) {
                    self.score(&tile, positions.len(), scratch);
                    self.soften(&tile, &positions, scratch);
                    self.weigh(&tile, positions.len(), scratch);
                }
            }
        }
        self.store(scratch);
    }

    fn rows(&self) -> usize {
        self.tokens.len() * self.group
    }

    /// Row `r` is query head `r % group` of token `r / group`.
    fn token_and_head(&self, row: usize) -> (usize, usize) {
        (self.tokens.start + row / self.group, self.kv_head * self.group + row % self.group)
    }

    fn tiles(&self) -> impl Iterator<Item = Range<usize>> + use<T, C> {
        let (rows, most) = (self.rows(), self.functions.tiles.len());
        (0..rows).step_by(most).map(move |start| start..rows.min(start + most))
    }

    /// Words of a key, and of a packed query row.
    fn key_steps(&self) -> usize {
        self.views.op.key_width().div_ceil(Self::IN_WORD)
    }

    fn query_words(&self) -> usize {
        self.functions.blocks.row_words(self.key_steps())
    }

    /// Panels of that many keys, and of a row of values.
    fn key_panels(&self, keys: usize) -> usize {
        keys.div_ceil(self.functions.width())
    }

    fn value_panels(&self) -> usize {
        self.views.op.value_width().div_ceil(self.functions.width())
    }

    /// Makes room, packs the queries, and starts every row's softmax.
    fn begin(&self, scratch: &mut Scratch) {
        let (rows, width, key_width) = (self.rows(), self.functions.width(), self.views.op.key_width());
        let most_rows = self.functions.tiles.len();
        let Blocks { steps, pack, .. } = self.functions.blocks;
        scratch.queries.grow(rows * self.query_words());
        scratch.keys.grow(self.key_panels(KEYS) * self.key_steps() * width);
        scratch.key.resize(self.key_steps(), 0);
        scratch.decoded.resize(self.views.op.key_width().max(self.views.op.value_width()), 0);
        scratch.values.grow(self.value_panels() * KEYS * width);
        scratch.scores.grow(self.key_panels(KEYS) * most_rows * width);
        scratch.powers.grow(most_rows * BLOCK_STRIDE);
        let sums = rows * self.value_panels() * width;
        scratch.sums.grow(sums);
        scratch.sums[..sums].fill(0);
        scratch.state.clear();
        for tile in self.tiles() {
            let base = tile.start * self.query_words();
            for (in_tile, row) in tile.clone().enumerate() {
                let (token, head) = self.token_and_head(row);
                let query = &self.views.q.row(token)[head * key_width..][..key_width];
                for (block, numbers) in query.chunks(steps * Self::IN_WORD).enumerate() {
                    let start = base + (block * tile.len() + in_tile) * BLOCK_STRIDE;
                    let words = &mut scratch.queries[start..][..BLOCK_STRIDE];
                    // SAFETY: the table exists only where its instructions do.
                    unsafe { pack(bytemuck::cast_slice(numbers), words) };
                }
                let visible = self.views.visible(token);
                // A sink is a score that came before all others, of a value that is zero.
                let sink = self.views.sinks.as_ref().map(|sinks| sinks[head]);
                scratch.state.push(RowState {
                    first: visible.start,
                    end: visible.end,
                    most: sink.unwrap_or(f32::NEG_INFINITY),
                    total: if sink.is_some() { 1.0 } else { 0.0 },
                });
            }
        }
    }

    /// Asks for keys and values that will be packed soon: rows of one head lie far apart, so that the processor does
    /// not see them coming, and between two steps the weights have pushed them out of the caches.
    fn prefetch(&self, positions: Range<usize>) {
        let AttentionViews { op, keys, values, sequences, .. } = self.views;
        let sequence = sequences[self.tokens.start] as usize;
        for position in positions {
            let slot = self.views.slot(sequence, position);
            for (rows, width) in [(keys, op.key_width()), (values, op.value_width())] {
                prefetch_all(&rows.row(slot)[self.kv_head * width..][..width]);
            }
        }
    }

    /// A cached row as numbers: itself, or decoded into `room`.
    fn numbers<'r>(&self, row: &'r [C], room: &'r mut [u32]) -> &'r [T] {
        if C::DTYPE != DType::E4M3 {
            return bytemuck::cast_slice(row);
        }
        let (codes, numbers) = (bytemuck::cast_slice(row), bytemuck::cast_slice_mut::<u32, T>(room));
        let numbers = &mut numbers[..row.len()];
        // SAFETY: the table exists only where its instructions do.
        unsafe {
            match T::DTYPE {
                DType::BF16 => (self.functions.codes_to_bf16)(codes, bytemuck::cast_slice_mut(numbers)),
                _ => (self.functions.codes_to_f32)(codes, bytemuck::cast_slice_mut(numbers)),
            }
        }
        numbers
    }

    /// Keys past the block's last position keep what was there: their scores are never looked at.
    fn pack_keys(&self, positions: &Range<usize>, scratch: &mut Scratch) {
        let (width, key_width, steps) = (self.functions.width(), self.views.op.key_width(), self.key_steps());
        let sequence = self.views.sequences[self.tokens.start] as usize;
        for (key, position) in positions.clone().enumerate() {
            let slot = self.views.slot(sequence, position);
            let row = &self.views.keys.row(slot)[self.kv_head * key_width..][..key_width];
            let row = self.numbers(row, &mut scratch.decoded);
            bytes_to_words(bytemuck::cast_slice(row), &mut scratch.key);
            let panel = &mut scratch.keys[key / width * steps * width..][..steps * width];
            for (words, word) in panel.chunks_exact_mut(width).zip(&scratch.key) {
                words[key % width] = *word;
            }
        }
    }

    /// Of a word that only begins inside the block, the rest is 0, since the powers are: 0 times what was there may be
    /// NaN.
    fn pack_values(&self, positions: &Range<usize>, scratch: &mut Scratch) {
        let Scratch { values, decoded, .. } = scratch;
        let (width, value_width) = (self.functions.width(), self.views.op.value_width());
        let sequence = self.views.sequences[self.tokens.start] as usize;
        for (key, position) in positions.clone().enumerate() {
            let slot = self.views.slot(sequence, position);
            let row = &self.views.values.row(slot)[self.kv_head * value_width..][..value_width];
            let row = self.numbers(row, decoded);
            let (step, shift) = (key / Self::IN_WORD, 16 * (key % Self::IN_WORD));
            for (panel, columns) in row.chunks(width).enumerate() {
                let words = &mut values[(panel * KEYS + step) * width..][..width];
                if shift == 0 {
                    words.iter_mut().zip(columns).for_each(|(word, x)| *word = bits(*x));
                    words[columns.len()..].fill(0);
                } else {
                    words.iter_mut().zip(columns).for_each(|(word, x)| *word |= bits(*x) << shift);
                }
            }
        }
    }

    /// `scores = queries · keysᵀ` for one tile and the block's first `keys` keys.
    fn score(&self, tile: &Range<usize>, keys: usize, scratch: &mut Scratch) {
        let (width, steps) = (self.functions.width(), self.key_steps());
        let queries = &scratch.queries[tile.start * self.query_words()..];
        for panel in 0..self.key_panels(keys) {
            let scores = &mut scratch.scores[panel * tile.len() * width..][..tile.len() * width];
            let keys = &scratch.keys[panel * steps * width..][..steps * width];
            self.multiply(tile.len(), steps, queries, keys, scores, false);
        }
    }

    /// Scores become powers, and what was summed before is scaled to the new largest score.
    fn soften(&self, tile: &Range<usize>, positions: &Range<usize>, scratch: &mut Scratch) {
        let (width, panels, scale) = (self.functions.width(), self.value_panels(), self.views.op.scale);
        let Scratch { scores, powers, sums, state, .. } = scratch;
        for (in_tile, row) in tile.clone().enumerate() {
            let mut weights = [0.0; KEYS];
            for (panel, weights) in
                weights.chunks_mut(width).take(self.key_panels(positions.len())).enumerate()
            {
                let scores = &scores[(panel * tile.len() + in_tile) * width..][..weights.len()];
                weights.copy_from_slice(bytemuck::cast_slice(scores));
            }
            let state = &mut state[row];
            let visible = state.first.clamp(positions.start, positions.end) - positions.start
                ..state.end.clamp(positions.start, positions.end) - positions.start;
            // SAFETY: the table exists only where its instructions do.
            let factor = unsafe {
                (self.functions.soften)(&mut weights, scale, visible, &mut state.most, &mut state.total)
            };
            self.pack_powers(&weights, &mut powers[in_tile * BLOCK_STRIDE..][..KEYS]);
            if factor != 1.0 {
                for panel in 0..panels {
                    let at = (tile.start * panels + panel * tile.len() + in_tile) * width;
                    let sums: &mut [f32] = bytemuck::cast_slice_mut(&mut sums[at..at + width]);
                    sums.iter_mut().for_each(|sum| *sum *= factor);
                }
            }
        }
    }

    /// Powers in the format of the values that they meet.
    fn pack_powers(&self, powers: &[f32; KEYS], words: &mut [u32]) {
        if Self::IN_WORD == 1 {
            words.copy_from_slice(bytemuck::cast_slice(powers));
        } else {
            let mut rounded = [bf16::ZERO; KEYS];
            // SAFETY: the table exists only where its instructions do.
            unsafe { (self.functions.round_to_bf16)(powers, &mut rounded) };
            // SAFETY: likewise.
            unsafe { (self.functions.blocks.pack)(bytemuck::cast_slice(&rounded), words) };
        }
    }

    /// `sums += powers · values` for one tile and the block's first `keys` keys.
    fn weigh(&self, tile: &Range<usize>, keys: usize, scratch: &mut Scratch) {
        let (width, panels) = (self.functions.width(), self.value_panels());
        for panel in 0..panels {
            let at = (tile.start * panels + panel * tile.len()) * width;
            let steps = keys.div_ceil(Self::IN_WORD);
            let values = &scratch.values[panel * KEYS * width..][..steps * width];
            let sums = &mut scratch.sums[at..at + tile.len() * width];
            self.multiply(tile.len(), steps, &scratch.powers, values, sums, true);
        }
    }

    /// `sums = left · right`, or with `more` added to what is there.
    fn multiply(&self, rows: usize, steps: usize, left: &[u32], right: &[u32], sums: &mut [u32], more: bool) {
        assert!(left.len() >= self.functions.blocks.row_words(steps) * rows);
        assert!(right.len() == steps * self.functions.width() && sums.len() == rows * self.functions.width());
        let tile = Tile {
            steps,
            panels: 1,
            activations: left.as_ptr(),
            weights: [right.as_ptr(); 2],
            sums: sums.as_mut_ptr().cast(),
            more,
            prefetch: Prefetch::new(right.as_ptr().cast(), 0, steps),
        };
        // SAFETY: the table exists only where its instructions do; the operands were measured just above.
        unsafe { (self.functions.tiles[rows - 1])(tile) }
    }

    fn store(&self, scratch: &Scratch) {
        let (width, panels) = (self.functions.width(), self.value_panels());
        let (value_width, factor) = (self.views.op.value_width(), self.views.op.value_scale);
        for tile in self.tiles() {
            for (in_tile, row) in tile.clone().enumerate() {
                let (token, head) = self.token_and_head(row);
                let columns = head * value_width..(head + 1) * value_width;
                // SAFETY: each (token, head) pair is a row of exactly one task.
                let out = unsafe { self.views.out.columns_shared(token, columns) };
                let total = scratch.state[row].total;
                for (panel, out) in out.chunks_mut(width).enumerate() {
                    let at = (tile.start * panels + panel * tile.len() + in_tile) * width;
                    let sums = scratch.sums[at..].iter().map(|&bits| f32::from_bits(bits));
                    // Adding 0 leaves one zero: a block that a row does not see may have turned −0 into +0.
                    out.iter_mut()
                        .zip(sums)
                        .for_each(|(out, sum)| *out = T::from_f32(sum / total * factor + 0.0));
                }
            }
        }
    }
}

/// A number as the low part of a word.
fn bits<T: Element>(x: T) -> u32 {
    if size_of::<T>() == size_of::<u32>() {
        bytemuck::cast(x)
    } else {
        u32::from(bytemuck::cast::<T, u16>(x))
    }
}

/// Numbers of e4m3 codes, each of which `number` makes from its bits in float32.
#[inline(always)]
pub(super) fn decode<T>(codes: &[u8], numbers: &mut [T], number: impl Fn(u32) -> T) {
    numbers.iter_mut().zip(codes).for_each(|(to, &code)| *to = number(e4m3_bits(code)));
}

/// Largest values and sums run in this many lanes, whatever the instruction set.
const LANES: usize = 16;

/// One row's products with the keys of a block become powers of the scores (the products times `scale`) it sees, 0
/// elsewhere; returns the factor that brings what was summed before to the new largest score.
#[inline(always)]
pub(super) fn soften(
    scores: &mut [f32; KEYS],
    scale: f32,
    visible: Range<usize>,
    most: &mut f32,
    total: &mut f32,
) -> f32 {
    if visible.is_empty() {
        scores.fill(0.0);
        return 1.0;
    }
    let sees = |key: usize| key as u32 >= visible.start as u32 && (key as u32) < visible.end as u32;
    // Chunks that the row sees nothing of would leave the largest score and the sum as they are.
    let (seen, unseen) = scores.as_chunks_mut::<LANES>().0.split_at_mut(visible.end.div_ceil(LANES));
    unseen.as_flattened_mut().fill(0.0);
    for (key, score) in seen.as_flattened_mut().iter_mut().enumerate() {
        *score = if sees(key) { *score * scale } else { f32::NEG_INFINITY };
    }
    let before = *most;
    *most = fold(seen, f32::NEG_INFINITY, larger).max(before);
    for (key, score) in seen.as_flattened_mut().iter_mut().enumerate() {
        let power = exp(*score - *most);
        *score = if sees(key) { power } else { 0.0 };
    }
    let factor = if before == f32::NEG_INFINITY { 0.0 } else { exp(before - *most) };
    *total = *total * factor + fold(seen, 0.0, |a, b| a + b);
    factor
}

/// The larger number; of a NaN and a number, the number. One instruction, which `f32::max` is not.
#[inline(always)]
fn larger(most: f32, value: f32) -> f32 {
    if value > most { value } else { most }
}

/// All of `chunks`, lane by lane, then the lanes in halves.
#[inline(always)]
fn fold(chunks: &[[f32; LANES]], neutral: f32, join: impl Fn(f32, f32) -> f32) -> f32 {
    let mut lanes = [neutral; LANES];
    for chunk in chunks {
        for lane in 0..LANES {
            lanes[lane] = join(lanes[lane], chunk[lane]);
        }
    }
    let mut half = LANES / 2;
    while half > 0 {
        for lane in 0..half {
            lanes[lane] = join(lanes[lane], lanes[lane + half]);
        }
        half /= 2;
    }
    lanes[0]
}
