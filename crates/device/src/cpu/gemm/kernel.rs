//! The one micro-kernel, generic over the instruction set and the element type.
//!
//! Both operands are arrays of 32-bit *words*. A word is one *step* along K: one f32, or two
//! neighbouring bf16 (`k` even in the low half, `k + 1` in the high half; the missing partner of an
//! odd K is zero). So the kernels of both types have the same loads and the same loop.
//!
//! Without an instruction for pairs of bf16 a kernel has two *parts* a step: the low halves of the weights are widened to
//! f32 and multiplied, then the high halves. Activations are widened when they are packed, a word for each part: every
//! tile of columns reads them again, and widening there would take as long as multiplying.

use super::coded::{CodedProducts, CodedTile, Layout};
use super::epilogue::Finish;
use super::{ElementType, Isa, amx, avx2, avx512, scalar};
use crate::cpu::attention::KEYS;
use crate::threaded::LINE_BYTES;

/// Vectors side by side in a tile. With 14 rows, 2 vectors of sums a row leave 4 of AVX-512's 32
/// registers for the weights and the activation; gate and up take one vector each.
pub(crate) const VECTORS: usize = 2;

/// Words of a row in one block of packed activations; 14 rows of it fill a fifth of a 32 KiB L1 cache. That many steps, where
/// steps have one part.
pub(crate) const BLOCK_STEPS: usize = 128;

/// Words from one row to the next within a block: one cache line more than the block, so that the
/// rows fall into different cache sets.
pub(crate) const BLOCK_STRIDE: usize = BLOCK_STEPS + 16;

/// Operations on one vector register, for one instruction set and element type.
///
/// # Safety
/// Implementations may use instructions beyond the target's baseline: every method may be called only
/// where the processor supports them, and inlined into a function that enables them.
pub(crate) unsafe trait Kernel {
    /// `LANES` sums in f32.
    type Sums: Copy;
    /// One part of a step of `LANES` columns of weights.
    type Weights: Copy;
    /// One part of a step of one row of activations, in all lanes.
    type Activation: Copy;

    const LANES: usize;

    /// Parts of a step: one, or the low and the high halves of the words.
    const PARTS: usize;

    /// Tiles of fewer rows do not prefetch into L1: they read weights faster than memory delivers them, and
    /// then the way from L2 is no longer what they wait for.
    const ROWS_TO_L1: usize;

    /// Tiles of fewer rows go on step by step: they wait for memory, which delivers most when loads
    /// are evenly spread. From here on what counts is that each step has few instructions beside its products.
    const ROWS_TO_UNROLL: usize;

    /// `LANES` sums of nothing.
    ///
    /// # Safety
    /// See the trait.
    unsafe fn zero_sums() -> Self::Sums;

    /// Reads `LANES` sums.
    ///
    /// # Safety
    /// `from` points to `LANES` readable values; see also the trait.
    unsafe fn load_sums(from: *const f32) -> Self::Sums;

    /// Writes `LANES` sums.
    ///
    /// # Safety
    /// `to` points to `LANES` writable values; see also the trait.
    unsafe fn store_sums(to: *mut f32, sums: Self::Sums);

    /// Reads part `part` of a step of `LANES` columns.
    ///
    /// # Safety
    /// `from` points to `LANES` readable words; see also the trait.
    unsafe fn load_weights(from: *const u32, part: usize) -> Self::Weights;

    /// Reads one part of a step of one row.
    ///
    /// # Safety
    /// `from` points to a readable word; see also the trait.
    unsafe fn load_activation(from: *const u32) -> Self::Activation;

    /// `sums + activation · weights`, in each lane.
    ///
    /// # Safety
    /// See the trait.
    unsafe fn multiply_add(
        sums: Self::Sums,
        activation: Self::Activation,
        weights: Self::Weights,
    ) -> Self::Sums;

    /// Asks for the cache line at `address`, which may be any address, in the L1 cache.
    fn prefetch_to_l1(address: *const u8);

    /// The same for the L2 cache.
    fn prefetch_to_l2(address: *const u8);
}

/// Steps of a panel that the tiles pass over at a time: 256 KiB of weights for 32 columns. For a
/// longer K the sums wait in f32, which is exact.
pub(crate) const PANEL_BLOCK_STEPS: usize = 16 * BLOCK_STEPS;

/// Rows that a micro-kernel may read after those of a block, and write after its sums.
pub(crate) const SPARE_ROWS: usize = 2;

/// Steps from the weights in use to those fetched into L1 meanwhile: 4 KiB for AVX-512.
const STEPS_TO_L1: usize = 32;

/// Bytes from the weights in use to those fetched meanwhile in a tile of a pair of panels. Less than a page: a processor
/// looks ahead by itself from where it was asked, but not past a page's end, which this reaches before the weights do.
const PAIR_AHEAD: usize = 1024;

/// The operands of one call of the micro-kernel, for `rows` rows by `VECTORS · LANES` columns, or twice as many in a pair
/// of panels.
#[derive(Clone, Copy)]
pub(crate) struct Tile {
    /// Steps to run.
    pub steps: usize,
    /// Activations: blocks of `rows` rows, as [`Blocks`] says, and [`SPARE_ROWS`].
    pub activations: *const u32,
    /// Panels at once.
    pub panels: usize,
    /// Weights of the first panel and of the last: for each step `VECTORS · LANES` words, one a column.
    pub weights: [*const u32; 2],
    /// Sums `[panels, rows, VECTORS · LANES]`, written at the end, and [`SPARE_ROWS`].
    pub sums: *mut f32,
    /// Whether the sums begin at what is there, or at zero.
    pub more: bool,
    /// What else to bring into L2 meanwhile.
    pub prefetch: Prefetch,
}

/// Streams that memory is asked for in. A processor follows each stream of lines that it sees, but only some lines
/// ahead: in one stream a core of a large machine gets half of what it could.
const STREAMS: usize = 4;

/// Memory to be brought into L2 while a tile runs, a quarter of it in each stream.
#[derive(Clone, Copy)]
pub(crate) struct Prefetch {
    /// Where the first stream begins: any address.
    pub start: *const u8,
    /// Bytes from the beginning of a stream to that of the next.
    pub apart: usize,
    /// Bytes that each stream goes on in a step.
    pub stride: usize,
}

impl Prefetch {
    /// `bytes` from `start` on, in the course of `steps` steps. Of no bytes, the line at `start` is asked for again and
    /// again: let it be one that is mapped, since translating the address of an unmapped page takes long.
    pub(crate) fn new(start: *const u8, bytes: usize, steps: usize) -> Self {
        let apart = bytes / STREAMS;
        Prefetch { start, apart, stride: apart.div_ceil(steps.max(1)) }
    }

    /// Which stream is asked for its next line by line `line` of the `lines` that a step of weights has: each of them in
    /// turn.
    #[inline(always)]
    fn stream(step: usize, line: usize, lines: usize) -> usize {
        (step * lines + line) % STREAMS
    }
}

/// `sums += activations · weights` for `ROWS` rows and `PANELS` panels, 1 or 2. Per element the additions are in rising `k`.
///
/// A pair of panels is for so few rows that reading weights is all that counts: two streams of them, each asked for
/// shortly before it is used, bring more from memory than one panel while the next is asked for.
///
/// # Safety
/// The pointers of `tile` are valid for the shapes given at its fields, and the processor supports
/// the instructions of `K`, which the caller enables.
#[inline(always)]
pub(crate) unsafe fn multiply_tile<K: Kernel, const ROWS: usize, const PANELS: usize>(tile: Tile) {
    let width = VECTORS * K::LANES;
    let Tile { mut activations, mut weights, prefetch: Prefetch { start: mut ahead, apart, stride }, .. } =
        tile;
    let round = if PANELS > 1 || ROWS >= K::ROWS_TO_UNROLL { STREAMS } else { 1 };
    // SAFETY: all addresses stay inside the operands described at `Tile`: `weights` advances by
    // `width` words `steps` times, `activations` by a whole block after each block, and rows and
    // steps inside a block are below `ROWS` and `BLOCK_STEPS`. Prefetches may go anywhere.
    unsafe {
        let mut sums = [[[K::zero_sums(); VECTORS]; ROWS]; PANELS];
        if tile.more {
            for (vector, sums) in sums.as_flattened_mut().as_flattened_mut().iter_mut().enumerate() {
                *sums = K::load_sums(tile.sums.add(vector * K::LANES));
            }
        }
        let mut left = tile.steps;
        while left > 0 {
            let steps = left.min(BLOCK_STEPS / K::PARTS);
            let whole = steps / round * round;
            for first in (0..whole).step_by(round) {
                for turn in 0..round {
                    for (sums, weights) in sums.iter_mut().zip(weights) {
                        multiply_step::<K, ROWS>(first + turn, activations, weights, sums);
                        if PANELS > 1 {
                            prefetch_in_panel::<K>(weights);
                        }
                    }
                    if PANELS == 1 {
                        // All streams are asked in a round of several steps: which one it is stands in the code.
                        let turn = if round == 1 { first } else { turn };
                        prefetch_step::<K, ROWS>(turn, weights[0], ahead, apart);
                    }
                    weights = weights.map(|weights| weights.wrapping_add(width));
                    ahead = ahead.wrapping_add(stride);
                }
            }
            for step in whole..steps {
                for (sums, weights) in sums.iter_mut().zip(weights) {
                    multiply_step::<K, ROWS>(step, activations, weights, sums);
                }
                weights = weights.map(|weights| weights.wrapping_add(width));
                ahead = ahead.wrapping_add(stride);
            }
            activations = activations.add(ROWS * BLOCK_STRIDE);
            left -= steps;
        }
        for (vector, sums) in sums.as_flattened().as_flattened().iter().enumerate() {
            K::store_sums(tile.sums.add(vector * K::LANES), *sums);
        }
    }
}

/// Cache lines that one step of weights takes.
const fn lines_of_a_step<K: Kernel>() -> usize {
    (VECTORS * K::LANES * size_of::<u32>()).div_ceil(LINE_BYTES)
}

/// Adds one step of a block to the sums.
///
/// # Safety
/// Like [`multiply_tile`]; `step` is a step of the block at `activations`, whose weights are at `weights`.
#[inline(always)]
unsafe fn multiply_step<K: Kernel, const ROWS: usize>(
    step: usize,
    activations: *const u32,
    weights: *const u32,
    sums: &mut [[K::Sums; VECTORS]; ROWS],
) {
    // SAFETY: the caller's promise.
    unsafe {
        for part in 0..K::PARTS {
            let columns: [K::Weights; VECTORS] =
                std::array::from_fn(|vector| K::load_weights(weights.add(vector * K::LANES), part));
            for (row, sums) in sums.iter_mut().enumerate() {
                let word = row * BLOCK_STRIDE + step * K::PARTS + part;
                let activation = K::load_activation(activations.add(word));
                for (sums, columns) in sums.iter_mut().zip(columns) {
                    *sums = K::multiply_add(*sums, activation, columns);
                }
            }
        }
    }
}

/// Prefetches weights of the same panel that will soon be used.
#[inline(always)]
fn prefetch_in_panel<K: Kernel>(weights: *const u32) {
    for line in 0..lines_of_a_step::<K>() {
        K::prefetch_to_l1(weights.cast::<u8>().wrapping_add(PAIR_AHEAD + line * LINE_BYTES));
    }
}

/// Prefetches for one step: weights some steps on into L1, and into L2 the streams whose turn it is.
#[inline(always)]
fn prefetch_step<K: Kernel, const ROWS: usize>(
    turn: usize,
    weights: *const u32,
    ahead: *const u8,
    apart: usize,
) {
    let lines = lines_of_a_step::<K>();
    let soon = weights.wrapping_add(STEPS_TO_L1 * VECTORS * K::LANES).cast::<u8>();
    for line in 0..lines {
        if ROWS >= K::ROWS_TO_L1 {
            K::prefetch_to_l1(soon.wrapping_add(line * LINE_BYTES));
        }
        K::prefetch_to_l2(ahead.wrapping_add(Prefetch::stream(turn, line, lines) * apart));
    }
}

/// `rounds` steps on each sum of the largest tile, on registers only; returns their number in f32 lanes.
///
/// # Safety
/// The processor supports the instructions of `K`, which the caller enables.
#[inline(always)]
pub(crate) unsafe fn spin_multiply_add<K: Kernel, const ROWS: usize>(rounds: usize) -> f64 {
    let words = std::hint::black_box([0x3f80_3f80_u32; 64]); // about 1.0, in either type
    let mut values = [0.5_f32; 64];
    // SAFETY: the arrays are longer than a vector of any instruction set.
    unsafe {
        let columns = K::load_weights(words.as_ptr(), 0);
        let activation = K::load_activation(words.as_ptr());
        let mut sums = [[K::load_sums(values.as_ptr()); VECTORS]; ROWS];
        for _ in 0..rounds * K::PARTS {
            for sums in sums.as_flattened_mut() {
                *sums = K::multiply_add(*sums, activation, columns);
            }
        }
        for sums in sums.as_flattened() {
            K::store_sums(values.as_mut_ptr(), *sums);
            std::hint::black_box(&values);
        }
    }
    (rounds * ROWS * VECTORS * K::LANES) as f64
}

/// Panels that a kernel takes at once.
#[derive(Clone, Copy)]
pub(crate) enum Grouping {
    /// At most so many neighbours, read one after the other.
    Runs(usize),
    /// Two, each at the same place in a stream of its own.
    Pairs,
}

/// Kernels for chunks of so few rows that reading weights is all that counts.
#[derive(Clone, Copy)]
pub(crate) struct Several {
    /// The micro-kernel for 1, 2, … rows, for as few as are worth it.
    pub tiles: &'static [unsafe fn(Tile)],
    /// The panels it takes at once.
    pub grouping: Grouping,
}

/// What rows share one pass over the weights, at most: enough that the pass takes longer than bringing the weights from
/// memory, few enough that the rows stay in L2.
#[derive(Clone, Copy)]
pub(crate) struct ChunkLimit {
    pub rows: usize,
    /// Words of packed activations. An L2 cache has room for more, but does not forget what was used longest ago first:
    /// with a MiB and two blocks of weights, a cache of 2 MiB has already lost some of it.
    pub words: usize,
}

/// How the activations of a tile are packed: block after block of some steps, within a block row after row.
#[derive(Clone, Copy)]
pub(crate) struct Blocks {
    /// Steps in a block.
    pub steps: usize,
    /// Words from one row of a block to the next.
    pub stride: usize,
    /// Packs the little-endian elements that a row has in a block, which need not fill it, into `stride` words.
    pub pack: unsafe fn(&[u8], &mut [u32]),
}

impl Blocks {
    /// Words of a row of `steps` steps.
    pub(crate) fn row_words(&self, steps: usize) -> usize {
        steps.div_ceil(self.steps) * self.stride
    }
}

/// The compiled kernels for one instruction set and element type.
///
/// The function pointers may be called only on a processor with that instruction set; a table is
/// handed out by [`Functions::select`] only there.
pub(crate) struct Functions {
    /// Columns in one vector; a panel has `VECTORS · lanes`.
    pub lanes: usize,
    /// The micro-kernel for 1, 2, … rows.
    pub tiles: &'static [unsafe fn(Tile)],
    /// Words of neighbouring panels that it may take at once, if they are more than one panel.
    pub run_words: usize,
    /// The same for several panels at once.
    pub several: Several,
    /// The rows that share one pass over the weights.
    pub chunk: ChunkLimit,
    /// How packed activations lie.
    pub blocks: Blocks,
    /// Where step `.0` of the `.1` that a panel of weights has lies in it.
    pub place: fn(usize, usize) -> usize,
    /// See [`Layout::decode`].
    pub decode: unsafe fn(&Layout, &[u8], std::ops::Range<usize>, ElementType, &mut [u32]),
    /// Products of 1, 2, … rows with panels of codes, for as few as are decoded where they are multiplied.
    pub fused: &'static [unsafe fn(&CodedTile<'_>)],
    /// Products with panels of codes in tiles, where codes lie like that.
    pub tile_products: Option<CodedProducts>,
    /// See `epilogue::store`, into float32 and bfloat16.
    pub store_f32: unsafe fn(&Finish<'_, f32>),
    pub store_bf16: unsafe fn(&Finish<'_, half::bf16>),
    /// See `epilogue::round_to_bf16`.
    pub round_to_bf16: unsafe fn(&[f32], &mut [half::bf16]),
    /// Numbers of e4m3 codes: see `attention::decode`.
    pub codes_to_f32: unsafe fn(&[u8], &mut [f32]),
    pub codes_to_bf16: unsafe fn(&[u8], &mut [half::bf16]),
    /// See `attention::soften`.
    pub soften: unsafe fn(&mut [f32; KEYS], f32, std::ops::Range<usize>, &mut f32, &mut f32) -> f32,
    /// See [`spin_multiply_add`].
    pub spin: unsafe fn(usize) -> f64,
}

impl Functions {
    /// The kernels for `isa` and `element`.
    ///
    /// # Panics
    /// If this processor does not support `isa`.
    pub(crate) fn select(isa: Isa, element: ElementType) -> &'static Self {
        assert!(isa.is_supported(), "this processor does not support the instruction set {isa}");
        match isa {
            Isa::Scalar => scalar::functions(element),
            Isa::Avx2 => avx2::functions(element),
            Isa::Avx512 => avx512::functions(element),
            Isa::Amx => amx::functions(element),
        }
    }

    /// The kernels for packed weights. They may want activations in other blocks than those of [`Self::select`].
    ///
    /// # Panics
    /// Like [`Self::select`].
    pub(crate) fn for_weights(isa: Isa, element: ElementType) -> &'static Self {
        match isa {
            Isa::Amx if isa.is_supported() => amx::weight_functions(element),
            _ => Self::select(isa, element),
        }
    }

    /// Columns in a panel.
    pub(crate) fn width(&self) -> usize {
        VECTORS * self.lanes
    }
}

/// Defines `static $name: Functions`, compiling the generic code for a kernel type with
/// the given target features, once for each number of rows listed, and a decoder for its panels.
macro_rules! functions {
    ($name:ident, $kernel:ty, $($feature:literal)?, $decode:path, rows: $($rows:literal)+, of pairs: $($pairs:literal)*) => {
        pub(in crate::cpu::gemm) static $name: $crate::cpu::gemm::kernel::Functions = {
            use $crate::cpu::gemm::{epilogue, kernel};

            const MOST_ROWS: usize = [$($rows),+].len();
            const PARTS: usize = <$kernel as kernel::Kernel>::PARTS;

            $(#[target_feature(enable = $feature)])?
            unsafe fn tile<const ROWS: usize, const PANELS: usize>(tile: kernel::Tile) {
                // SAFETY: the caller's promise.
                unsafe { kernel::multiply_tile::<$kernel, ROWS, PANELS>(tile) }
            }
            $(#[target_feature(enable = $feature)])?
            unsafe fn pack(bytes: &[u8], words: &mut [u32]) {
                match PARTS {
                    1 => $crate::cpu::gemm::bytes_to_words(bytes, words),
                    _ => $crate::cpu::gemm::bf16_to_words(bytes, words),
                }
            }
            $(#[target_feature(enable = $feature)])?
            unsafe fn store<T: $crate::threaded::Element>(finish: &epilogue::Finish<'_, T>) {
                // SAFETY: the caller's promise.
                unsafe { epilogue::store::<T, { <$kernel as kernel::Kernel>::LANES }>(finish) }
            }
            $(#[target_feature(enable = $feature)])?
            unsafe fn round_to_bf16(from: &[f32], to: &mut [half::bf16]) {
                epilogue::round_to_bf16(from, to);
            }
            $(#[target_feature(enable = $feature)])?
            unsafe fn decode<T>(codes: &[u8], numbers: &mut [T], number: impl Fn(u32) -> T) {
                $crate::cpu::attention::decode(codes, numbers, number);
            }
            unsafe fn codes_to_f32(codes: &[u8], numbers: &mut [f32]) {
                // SAFETY: the caller's promise.
                unsafe { decode(codes, numbers, f32::from_bits) }
            }
            unsafe fn codes_to_bf16(codes: &[u8], numbers: &mut [half::bf16]) {
                // SAFETY: the caller's promise.
                unsafe { decode(codes, numbers, |bits| half::bf16::from_bits((bits >> 16) as u16)) }
            }
            $(#[target_feature(enable = $feature)])?
            unsafe fn soften(
                scores: &mut [f32; $crate::cpu::attention::KEYS],
                scale: f32,
                visible: std::ops::Range<usize>,
                most: &mut f32,
                total: &mut f32,
            ) -> f32 {
                $crate::cpu::attention::soften(scores, scale, visible, most, total)
            }
            $(#[target_feature(enable = $feature)])?
            unsafe fn spin(rounds: usize) -> f64 {
                // SAFETY: the caller's promise.
                unsafe { kernel::spin_multiply_add::<$kernel, MOST_ROWS>(rounds) }
            }
            kernel::Functions {
                lanes: <$kernel as kernel::Kernel>::LANES,
                tiles: &[$(tile::<$rows, 1>),+],
                run_words: 0,
                several: kernel::Several {
                    tiles: &[$(tile::<$pairs, 2>),*],
                    grouping: kernel::Grouping::Pairs,
                },
                chunk: kernel::ChunkLimit { rows: 140, words: 144 << 10 }, // ten full tiles of AVX-512
                blocks: kernel::Blocks {
                    steps: kernel::BLOCK_STEPS / PARTS,
                    stride: kernel::BLOCK_STRIDE,
                    pack,
                },
                place: |step, _| step,
                decode: $decode,
                fused: &[],
                tile_products: None,
                store_f32: store::<f32>,
                store_bf16: store::<half::bf16>,
                round_to_bf16,
                codes_to_f32,
                codes_to_bf16,
                soften,
                spin,
            }
        };
    };
}
pub(crate) use functions;

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    /// A block of 2048 steps of 32 columns is 256 KiB. One tile asks for all of it, so its streams begin 64 KiB apart and
    /// each goes on 32 bytes a step; asked in every second step, it gets one line after the other.
    #[test]
    fn streams_of_a_block_worked_example() {
        let whole = Prefetch::new(std::ptr::null(), 256 << 10, 2048);
        assert_eq!((whole.apart, whole.stride), (64 << 10, 32));
        let streams = [0, 1, 2].map(|step| [0, 1].map(|line| Prefetch::stream(step, line, 2)));
        assert_eq!(streams, [[0, 1], [2, 3], [0, 1]]);
    }

    #[test]
    fn every_line_is_asked_for() {
        for (lines, steps, tiles) in [(2, 2048, 1), (2, 512, 3), (1, 352, 1), (1, 300, 2), (2, 128, 10)] {
            let bytes = lines * LINE_BYTES * steps / tiles;
            let Prefetch { apart, stride, .. } = Prefetch::new(std::ptr::null(), bytes, steps);
            let mut asked = BTreeSet::new();
            for (step, line) in (0..steps).flat_map(|step| (0..lines).map(move |line| (step, line))) {
                asked.insert((Prefetch::stream(step, line, lines) * apart + step * stride) / LINE_BYTES);
            }
            let missing: Vec<_> = (0..bytes / LINE_BYTES).filter(|line| !asked.contains(line)).collect();
            assert!(missing.is_empty(), "{lines} lines a step, {steps} steps, {tiles} tiles: {missing:?}");
        }
    }
}
