//! AMX for float32: products of bfloat16 pieces, as exact as multiply-adds and faster than the processor can do those.
//!
//! A float32 has 24 bits and a bfloat16 eight of them, so every float32 is the sum of three: `x = high + middle + low`, each
//! piece some 2⁻⁸ of the one before. Of the nine products of two such sums the six largest are computed,
//!
//! ```text
//! high · high  +  high · middle + middle · high  +  high · low + middle · middle + low · high
//! ```
//!
//! each exact before it is added in float32; what is left out is below 2⁻²⁴ of `|x · w|`, half of what float32 itself rounds
//! a product by. And a sum rounds less often: TDPBF16PS adds up 32 products before it touches the sum. (The idea is that of
//! Henry, Tang and Heinecke, "Leveraging the bfloat16 Artificial Intelligence Datatype For Higher-Precision Computations",
//! 2019.) Pieces below 2⁻¹²⁶ count as zero, and an infinity gives NaN where a multiply-add might give infinity.
//!
//! Six products for one are still faster, since a processor with AMX does sixteen of them in the time of a multiply-add in
//! float32. Activations are cut when they are packed; weights, which would be half as large again in pieces, stay float32
//! in memory and are cut a group of steps ahead, by AVX-512 instructions between those of AMX, which run on another part of
//! the processor.
//!
//! # What lies where
//!
//! A panel of weights is 32 columns wide: two halves of sixteen. A *group* is 32 steps along K, sixteen pairs, which is what
//! one tile of bfloat16 pairs has room for. Float32 weights of a group are cut into three tiles for each half:
//!
//! ```text
//!                 one row of a half panel: a pair of steps, sixteen columns (ROW = 192 bytes)
//!                 ├─ high, 64 bytes ─┼─ middle, 64 bytes ─┼─ low, 64 bytes ─┤
//! half 0   pair 0 │ c0 c1 … c15      │ c0 c1 … c15        │ c0 c1 … c15     │   a tile is one of the three columns:
//!          pair 1 │                  │                    │                 │   sixteen rows of 64 bytes, `stride` apart
//!          …      │                  │                    │                 │
//!         pair 15 │                  │                    │                 │
//! half 1   pair 0 │ …                                                           HALF_PANEL bytes on
//! ```
//!
//! There are two such buffers. While the group in `now` is multiplied, the next is cut into `next`, and after a group they
//! change places; between two tile products stand the vector instructions that cut about two of its pairs. Packed
//! activations have rows like these, one for each row of x and group.
//!
//! Weights in memory lie in four streams ([`STREAMS`]), of which a group takes eight steps each:
//!
//! ```text
//! panel     │ group 0: steps 0..8 │ group 1: 0..8 │ … │ group 0: 8..16 │ group 1: 8..16 │ … │ 16..24 … │ 24..32 … │
//!             weights →                               weights + apart →                      + 2 apart  + three_apart
//! ```
//!
//! # Registers
//!
//! | tile | up to 32 rows | 33 to 48 rows, in thirds |
//! |---|---|---|
//! | tmm0, tmm1 | sums of rows 0..16, half 0 and half 1 | sums of the first and second third, half 0 |
//! | tmm2, tmm3 | sums of rows 16..32, half 0 and half 1 (not for up to 16 rows) | of the last third, half 0; of the first, half 1 |
//! | tmm4, tmm5 | a piece of the activations of rows 0..16, of rows 16..32 | sums of the second and last third, half 1 |
//! | tmm6 | a piece of the weights of half 0 | a piece of the weights of either half |
//! | tmm7 | a piece of the weights of half 1 | a piece of the activations of any third |
//!
//! | vector | |
//! |---|---|
//! | zmm16, zmm17 | what is left of a pair's two steps, sixteen columns, once higher pieces are taken off |
//! | zmm18, zmm19 | a piece of each |
//! | zmm20 | both as bfloat16 pairs, for the tile |
//! | zmm31 | the upper half of every word |
//!
//! | general register | |
//! |---|---|
//! | `walk` | the [`Walk`]: what there is no register for |
//! | `now`, `next` | pieces of the group that is multiplied, and of the one that is cut |
//! | `weights`, `soon` | first stream of the group that is cut, and of the one after it, which is prefetched |
//! | `apart`, `three_apart` | bytes from a stream to the next, and three times that |
//! | `activations`, `sums` | those of the group and of the panel at hand |
//! | `middle`, `last` | the second and last third of either, for 33 to 48 rows |
//! | `groups` | groups left in the panel |
//! | `stride` | bytes between the rows of the tiles that are loaded or stored |

use super::amx::{SIDE, Shapes, TILE_WIDTH, tiles};
use super::avx512;
use super::kernel::{Blocks, ChunkLimit, Functions, Grouping, PANEL_BLOCK_STEPS, Several, Tile, VECTORS};
use std::arch::asm;
use std::arch::x86_64::*;
use std::mem::{MaybeUninit, offset_of, transmute};

/// Steps, that is float32 elements along K, which make one tile of bfloat16 pairs: a group.
const GROUP: usize = 2 * SIDE;

/// Rows of two tiles of activations.
const TWO_SIDES: usize = 2 * SIDE;

/// Pieces of a float32.
const PIECES: usize = 3;

/// Bytes of a row of tiles: sixteen pairs of one row of activations, or one pair of sixteen columns of weights, as high,
/// middle and low pieces. An odd number of cache lines, so that the rows fall into different cache sets.
const ROW: usize = PIECES * TILE_WIDTH;

/// Bytes of the three tiles of one half of a panel.
const HALF_PANEL: usize = SIDE * ROW;

/// Bytes from one step of packed weights, or row of sums, to the next; of a group of steps; of sixteen rows of sums.
const STEP: usize = VECTORS * TILE_WIDTH;
const WEIGHTS_OF_A_GROUP: usize = GROUP * STEP;
const SIDE_OF_SUMS: usize = SIDE * STEP;

/// Streams that the whole groups of a panel are read in: the first quarter of each group's steps, of all groups, then the
/// second quarters, and so on. A processor follows each stream of lines that it sees, but only some lines ahead and not past
/// a page's end: in four streams it brings a quarter more from memory while it multiplies.
const STREAMS: usize = 4;

/// Bytes that a stream goes on in a group.
const STREAM_OF_A_GROUP: usize = WEIGHTS_OF_A_GROUP / STREAMS;

pub(super) static F32: Functions = Functions {
    tiles: tiles!(multiply: 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23 24 25 26 27 28 29 30 31 32),
    run_words: 32 << 10,
    several: Several {
        tiles: tiles!(multiply: 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23 24 25 26 27 28 29 30 31 32
            33 34 35 36 37 38 39 40 41 42 43 44 45 46 47 48),
        grouping: Grouping::Runs(8),
    },
    chunk: ChunkLimit { rows: 256, words: 288 << 10 },
    blocks: Blocks { steps: GROUP, stride: ROW / size_of::<u32>(), pack: cut_activations },
    place: place_in_streams,
    ..avx512::F32
};

/// Where step `step` of `steps` lies in a panel: each block of [`PANEL_BLOCK_STEPS`] has its own streams, and steps that
/// make no whole group are last.
fn place_in_streams(step: usize, steps: usize) -> usize {
    const QUARTER: usize = GROUP / STREAMS;
    if step >= steps / GROUP * GROUP {
        return step;
    }
    let (block, step) = (step / PANEL_BLOCK_STEPS * PANEL_BLOCK_STEPS, step % PANEL_BLOCK_STEPS);
    let groups = (steps - block).min(PANEL_BLOCK_STEPS) / GROUP;
    let stream = step % GROUP / QUARTER;
    block + (stream * groups + step / GROUP) * QUARTER + step % QUARTER
}

/// Packs at most [`GROUP`] little-endian float32 of one row: all high pieces, then the middle ones, then the low ones. What
/// is missing in a group is zero.
///
/// # Safety
/// The processor has AVX-512 with its instructions for bfloat16.
#[target_feature(enable = "avx512f,avx512bf16")]
unsafe fn cut_activations(bytes: &[u8], words: &mut [u32]) {
    let mut group = [0_u8; GROUP * size_of::<f32>()];
    let group = <&[u8; _]>::try_from(bytes).unwrap_or_else(|_| {
        group[..bytes.len()].copy_from_slice(bytes);
        &group
    });
    let pieces = &mut words.as_chunks_mut::<SIDE>().0[..PIECES];
    // SAFETY: a group is two vectors, a piece of it one; both types of vector are 512 plain bits.
    unsafe {
        let mut low = _mm512_loadu_ps(group.as_ptr().cast());
        let mut high = _mm512_loadu_ps(group.as_ptr().cast::<f32>().add(SIDE));
        for piece in pieces {
            let rounded = transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(high, low));
            _mm512_storeu_si512(piece.as_mut_ptr().cast(), rounded);
            low = _mm512_sub_ps(low, widen(_mm512_castsi512_si256(rounded)));
            high = _mm512_sub_ps(high, widen(_mm512_extracti64x4_epi64::<1>(rounded)));
        }
    }
}

/// Sixteen bfloat16 as float32.
#[target_feature(enable = "avx512f")]
fn widen(halves: __m256i) -> __m512 {
    _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(halves)))
}

/// `sums += activations · weights` for `ROWS` rows, at most 48, of neighbouring panels.
///
/// # Safety
/// The pointers of `tile` are valid for the shapes given at its fields, and the processor has the tiles.
unsafe fn multiply<const ROWS: usize>(tile: Tile) {
    /// A group that is not whole, with zeros for what is missing.
    #[repr(C, align(64))]
    struct LastGroup([u32; WEIGHTS_OF_A_GROUP / size_of::<u32>()]);

    let shapes = &const {
        if ROWS <= TWO_SIDES { Shapes::new(ROWS, SIDE) } else { Shapes::of_three(ROWS.div_ceil(3)) }
    };
    let (whole, rest) = (tile.steps / GROUP, tile.steps % GROUP);
    let walk = |groups: usize, panels: usize, tile: &Tile| Walk {
        groups,
        panels,
        more: usize::from(tile.more),
        activations: tile.activations,
        activations_of_a_group: ROWS * ROW,
        sums_of_a_panel: ROWS * STEP,
        third_of_activations: ROWS.div_ceil(3) * ROW,
        third_of_sums: ROWS.div_ceil(3) * STEP,
        stream_end: tile.weights[0].wrapping_byte_add(groups * STREAM_OF_A_GROUP),
    };
    let groups = if ROWS <= SIDE {
        multiply_16
    } else if ROWS <= TWO_SIDES {
        multiply_32
    } else {
        multiply_48
    };
    // SAFETY: the caller's promise. Of panels that are one block of whole groups each follows the one before. Else `block`
    // begins `first` groups on in its panel; the packed activations have zeros for what is missing in the last one.
    unsafe {
        if rest == 0 && tile.steps <= PANEL_BLOCK_STEPS {
            groups(shapes, walk(whole, tile.panels, &tile), tile);
            return;
        }
        for panel in 0..tile.panels {
            let weights = tile.weights[0].wrapping_byte_add(panel * tile.steps * STEP);
            let sums = tile.sums.wrapping_byte_add(panel * ROWS * STEP);
            let block = |first: usize, weights: *const u32| Tile {
                activations: tile.activations.wrapping_byte_add(first * ROWS * ROW),
                weights: [weights; 2],
                sums,
                more: tile.more || first > 0,
                ..tile
            };
            for first in (0..whole).step_by(PANEL_BLOCK_STEPS / GROUP) {
                let block = block(first, weights.wrapping_byte_add(first * WEIGHTS_OF_A_GROUP));
                groups(shapes, walk((whole - first).min(PANEL_BLOCK_STEPS / GROUP), 1, &block), block);
            }
            if rest > 0 {
                let mut last = LastGroup([0; _]);
                let weights = weights.wrapping_byte_add(whole * WEIGHTS_OF_A_GROUP);
                weights.copy_to_nonoverlapping(last.0.as_mut_ptr(), rest * STEP / size_of::<u32>());
                let block = block(whole, last.0.as_ptr());
                groups(shapes, walk(1, 1, &block), block);
            }
        }
    }
}

/// What the loops in assembly read from memory: there are not registers enough.
#[repr(C)]
struct Walk {
    /// Groups of steps in a panel.
    groups: usize,
    /// Panels left.
    panels: usize,
    /// Whether the sums begin at what is there: 1, or 0.
    more: usize,
    /// Where the activations begin.
    activations: *const u32,
    /// Bytes from the activations of a group to those of the next.
    activations_of_a_group: usize,
    /// Bytes from the sums of a panel to those of the next.
    sums_of_a_panel: usize,
    /// Bytes of a third of the rows, of the activations of a group and of the sums of a panel.
    third_of_activations: usize,
    third_of_sums: usize,
    /// Where the first stream of the panel that is prefetched ends.
    stream_end: *const u32,
}

/// A group of weights cut into pieces, the tiles of one half of the panel after those of the other.
#[repr(C, align(64))]
struct CutWeights([u8; VECTORS * HALF_PANEL]);

/// Cuts pairs of steps in one half of the panel: a pair's high pieces are the upper halves of its words, and what remains
/// is exact. The words of both steps make one of bfloat16 pairs.
///
/// Before, it prefetches weights that will soon be used: twice, since a processor drops a prefetch for which it has no line
/// fill buffer free.
macro_rules! cut {
    ($($pair:tt $half:literal),+) => { concat!($(
        cut!(@ask 0, $pair, $half),
        cut!(@ask 256, $pair, $half),
        "vmovups zmm16, ", cut!(@step "{weights}", 0, $pair, $half),
        "vmovups zmm17, ", cut!(@step "{weights}", 1, $pair, $half),
        cut!(@piece 0, $pair, $half),
        cut!(@piece 1, $pair, $half),
        "vpsrld zmm16, zmm16, 16\n",
        "vpord zmm20, zmm16, zmm17\n",
        cut!(@store 2, $pair, $half),
    )+) };
    (@ask $ahead:literal, $pair:tt, $half:literal) => { concat!(
        "prefetcht0 ", cut!(@step concat!("{soon} + ", $ahead), 0, $pair, $half),
        "prefetcht0 ", cut!(@step concat!("{soon} + ", $ahead), 1, $pair, $half),
    ) };
    // A stream has four pairs of steps of a group.
    (@step $from:expr, $step:literal, $pair:tt, $half:literal) => { concat!(
        "[", $from, cut!(@stream $pair), " + ", $step, " * {step} + ", $half, " * {tile_width}]\n",
    ) };
    (@stream 0) => { cut!(@pair "", 0) };
    (@stream 1) => { cut!(@pair "", 1) };
    (@stream 2) => { cut!(@pair "", 2) };
    (@stream 3) => { cut!(@pair "", 3) };
    (@stream 4) => { cut!(@pair " + {apart}", 0) };
    (@stream 5) => { cut!(@pair " + {apart}", 1) };
    (@stream 6) => { cut!(@pair " + {apart}", 2) };
    (@stream 7) => { cut!(@pair " + {apart}", 3) };
    (@stream 8) => { cut!(@pair " + 2 * {apart}", 0) };
    (@stream 9) => { cut!(@pair " + 2 * {apart}", 1) };
    (@stream 10) => { cut!(@pair " + 2 * {apart}", 2) };
    (@stream 11) => { cut!(@pair " + 2 * {apart}", 3) };
    (@stream 12) => { cut!(@pair " + {three_apart}", 0) };
    (@stream 13) => { cut!(@pair " + {three_apart}", 1) };
    (@stream 14) => { cut!(@pair " + {three_apart}", 2) };
    (@stream 15) => { cut!(@pair " + {three_apart}", 3) };
    (@pair $stream:literal, $pair:literal) => { concat!($stream, " + 2 * ", $pair, " * {step}") };
    (@piece $piece:literal, $pair:tt, $half:literal) => { concat!(
        "vpandd zmm18, zmm16, zmm31\n",
        "vpandd zmm19, zmm17, zmm31\n",
        "vsubps zmm16, zmm16, zmm18\n",
        "vsubps zmm17, zmm17, zmm19\n",
        "vpsrld zmm18, zmm18, 16\n",
        "vpord zmm20, zmm18, zmm19\n",
        cut!(@store $piece, $pair, $half),
    ) };
    (@store $piece:literal, $pair:tt, $half:literal) => { concat!(
        "vmovaps [{next} + ", $half, " * {half_panel} + ", $pair, " * {row} + ", $piece, " * {tile_width}], zmm20\n",
    ) };
}

/// Loads a tile: a piece (0 is high, 2 is low) of one half of the weights or of the activations.
macro_rules! load {
    ($tile:literal: weights $half:literal, piece $piece:literal) => {
        load!(@from "{now}", $tile, $half, $piece)
    };
    ($tile:literal: activations $half:literal, piece $piece:literal) => {
        load!(@from "{activations}", $tile, $half, $piece)
    };
    (@from $from:literal, $tile:literal, $half:literal, $piece:literal) => { concat!(
        "tileloadd tmm", $tile, ", [", $from, " + {stride} + ", $half, " * {half_panel} + ", $piece, " * {tile_width}]\n",
    ) };
}

/// Adds products of activations and weights to sums.
macro_rules! add {
    ($sums:literal += $activations:literal * $weights:literal) => {
        concat!("tdpbf16ps tmm", $sums, ", tmm", $activations, ", tmm", $weights, "\n")
    };
}

/// A group of steps of at most sixteen rows. Products with low pieces of activations come first, then those with high and
/// with middle ones, so that few tiles are read again.
macro_rules! group_of_16 {
    () => {
        concat!(
            load!(6: weights 0, piece 0), load!(4: activations 0, piece 2),
            add!(0 += 4 * 6), cut!(0 0, 0 1), load!(7: weights 1, piece 0),
            add!(1 += 4 * 7), cut!(1 0, 1 1, 2 0), load!(4: activations 0, piece 0),
            add!(0 += 4 * 6), cut!(2 1, 3 0, 3 1),
            add!(1 += 4 * 7), cut!(4 0, 4 1), load!(6: weights 0, piece 2),
            add!(0 += 4 * 6), cut!(5 0, 5 1, 6 0), load!(7: weights 1, piece 2),
            add!(1 += 4 * 7), cut!(6 1, 7 0, 7 1), load!(6: weights 0, piece 1),
            add!(0 += 4 * 6), cut!(8 0, 8 1), load!(7: weights 1, piece 1),
            add!(1 += 4 * 7), cut!(9 0, 9 1, 10 0), load!(4: activations 0, piece 1),
            add!(0 += 4 * 6), cut!(10 1, 11 0, 11 1),
            add!(1 += 4 * 7), cut!(12 0, 12 1), load!(6: weights 0, piece 0),
            add!(0 += 4 * 6), cut!(13 0, 13 1, 14 0), load!(7: weights 1, piece 0),
            add!(1 += 4 * 7), cut!(14 1, 15 0, 15 1),
        )
    };
}

/// The same for 17 to 32 rows; each sum gets its products in the same order.
macro_rules! group_of_32 {
    () => {
        concat!(
            load!(6: weights 0, piece 0), load!(4: activations 0, piece 2),
            add!(0 += 4 * 6), cut!(0 0), load!(7: weights 1, piece 0),
            add!(1 += 4 * 7), cut!(0 1), load!(5: activations 1, piece 2),
            add!(2 += 5 * 6), cut!(1 0, 1 1),
            add!(3 += 5 * 7), cut!(2 0), load!(4: activations 0, piece 0),
            add!(0 += 4 * 6), cut!(2 1),
            add!(1 += 4 * 7), cut!(3 0, 3 1), load!(5: activations 1, piece 0),
            add!(2 += 5 * 6), cut!(4 0),
            add!(3 += 5 * 7), cut!(4 1), load!(6: weights 0, piece 2),
            add!(0 += 4 * 6), cut!(5 0, 5 1),
            add!(2 += 5 * 6), cut!(6 0), load!(7: weights 1, piece 2),
            add!(1 += 4 * 7), cut!(6 1),
            add!(3 += 5 * 7), cut!(7 0, 7 1), load!(6: weights 0, piece 1),
            add!(0 += 4 * 6), cut!(8 0),
            add!(2 += 5 * 6), cut!(8 1), load!(7: weights 1, piece 1),
            add!(1 += 4 * 7), cut!(9 0, 9 1),
            add!(3 += 5 * 7), cut!(10 0), load!(4: activations 0, piece 1),
            add!(0 += 4 * 6), cut!(10 1),
            add!(1 += 4 * 7), cut!(11 0, 11 1), load!(5: activations 1, piece 1),
            add!(2 += 5 * 6), cut!(12 0),
            add!(3 += 5 * 7), cut!(12 1), load!(6: weights 0, piece 0),
            add!(0 += 4 * 6), cut!(13 0, 13 1),
            add!(2 += 5 * 6), cut!(14 0), load!(7: weights 1, piece 0),
            add!(1 += 4 * 7), cut!(14 1),
            add!(3 += 5 * 7), cut!(15 0, 15 1),
        )
    };
}

/// The same for 33 to 48 rows, in three tiles of as many: those of the activations are read each time.
macro_rules! group_of_48 {
    () => {
        concat!(
            "mov {middle}, {activations}
            add {middle}, [{walk} + {third_of_activations}]
            mov {last}, {middle}
            add {last}, [{walk} + {third_of_activations}]\n",
            three!(weights 0 0, activations 2, 0 0, 0 1, 1 0), three!(weights 1 0, activations 2, 1 1, 2 0, 2 1),
            three!(weights 0 0, activations 0, 3 0, 3 1, 4 0), three!(weights 1 0, activations 0, 4 1, 5 0),
            three!(weights 0 2, activations 0, 5 1, 6 0, 6 1), three!(weights 1 2, activations 0, 7 0, 7 1),
            three!(weights 0 1, activations 0, 8 0, 8 1, 9 0), three!(weights 1 1, activations 0, 9 1, 10 0, 10 1),
            three!(weights 0 1, activations 1, 11 0, 11 1, 12 0), three!(weights 1 1, activations 1, 12 1, 13 0),
            three!(weights 0 0, activations 1, 13 1, 14 0, 14 1), three!(weights 1 0, activations 1, 15 0, 15 1),
        )
    };
}

/// Multiplies a piece of one half of the weights by one of all activations.
macro_rules! three {
    (weights 0 $weights:literal, $($rest:tt)+) => { three!(@sums 0 1 2, weights 0 $weights, $($rest)+) };
    (weights 1 $weights:literal, $($rest:tt)+) => { three!(@sums 3 4 5, weights 1 $weights, $($rest)+) };
    (@sums $s0:literal $s1:literal $s2:literal, weights $half:literal $weights:literal, activations $piece:literal,
     $p0:tt $h0:literal, $p1:tt $h1:literal $(, $p2:tt $h2:literal)?) => {
        concat!(
            load!(6: weights $half, piece $weights),
            load!(@from "{activations}", 7, 0, $piece), add!($s0 += 7 * 6), cut!($p0 $h0),
            load!(@from "{middle}", 7, 0, $piece), add!($s1 += 7 * 6), cut!($p1 $h1),
            load!(@from "{last}", 7, 0, $piece), add!($s2 += 7 * 6), $(cut!($p2 $h2),)?
        )
    };
}

/// On to the group that follows in its panel or in the next one; the group after that is prefetched.
macro_rules! advance {
    () => {
        "mov {weights}, {soon}
        add {soon}, {stream_of_a_group}
        cmp {soon}, [{walk} + {stream_end}]
        jne 6f
        add {soon}, {three_apart}
        add [{walk} + {stream_end}], {apart}
        add [{walk} + {stream_end}], {three_apart}
        6:\n"
    };
}

/// Defines the loop over panels, and over the groups of one, around what a group does. While a group is multiplied, the
/// next is cut; the very last cuts itself once more, since nothing need follow it.
///
/// The module says what each register holds.
macro_rules! walk {
    ($(#[$doc:meta])* $name:ident, $group:ident, zero: $zero:literal, load: $load:literal, store: $store:literal $($operands:tt)*) => {
        $(#[$doc])*
        ///
        /// # Safety
        /// Like [`multiply`]; `shapes` and `walk` are those of the tile's rows.
        #[target_feature(enable = "avx512f")]
        unsafe fn $name(shapes: &Shapes, mut walk: Walk, tile: Tile) {
            let apart = walk.groups * STREAM_OF_A_GROUP;
            let mut pieces = MaybeUninit::<[CutWeights; 2]>::uninit();
            // SAFETY: the caller's promise. TILERELEASE leaves no tile in use.
            unsafe {
                asm!(
                    "ldtilecfg [{next}]",
                    "mov {groups:e}, 0xffff0000",
                    "vpbroadcastd zmm31, {groups:e}",
                    "mov {next}, {now}",
                    advance!(),
                    cut!(0 0, 0 1, 1 0, 1 1, 2 0, 2 1, 3 0, 3 1, 4 0, 4 1, 5 0, 5 1, 6 0, 6 1, 7 0, 7 1),
                    cut!(8 0, 8 1, 9 0, 9 1, 10 0, 10 1, 11 0, 11 1, 12 0, 12 1, 13 0, 13 1, 14 0, 14 1, 15 0, 15 1),
                    "add {next}, {pieces}",
                    "2:",
                    $zero,
                    "cmp qword ptr [{walk} + {more}], 0",
                    "je 3f",
                    "mov {stride:e}, {step}",
                    $load,
                    "3:",
                    "mov {stride:e}, {row}",
                    "mov {groups}, [{walk} + {groups_of_a_panel}]",
                    "mov {activations}, [{walk} + {first_activations}]",
                    "4:",
                    "cmp {groups}, 1",
                    "jne 5f",
                    "cmp qword ptr [{walk} + {panels}], 1",
                    "je 6f",
                    "5:",
                    advance!(),
                    $group!(),
                    "xchg {now}, {next}",
                    "add {activations}, [{walk} + {activations_of_a_group}]",
                    "dec {groups}",
                    "jnz 4b",
                    "mov {stride:e}, {step}",
                    $store,
                    "add {sums}, [{walk} + {sums_of_a_panel}]",
                    "dec qword ptr [{walk} + {panels}]",
                    "jnz 2b",
                    "tilerelease",
                    walk = in(reg) &mut walk,
                    now = inout(reg) pieces.as_mut_ptr() => _,
                    next = inout(reg) shapes => _,
                    stride = out(reg) _,
                    groups = out(reg) _,
                    activations = out(reg) _,
                    weights = out(reg) _,
                    soon = inout(reg) tile.weights[0] => _,
                    apart = in(reg) apart,
                    three_apart = in(reg) 3 * apart,
                    sums = inout(reg) tile.sums => _,
                    more = const offset_of!(Walk, more),
                    panels = const offset_of!(Walk, panels),
                    groups_of_a_panel = const offset_of!(Walk, groups),
                    first_activations = const offset_of!(Walk, activations),
                    activations_of_a_group = const offset_of!(Walk, activations_of_a_group),
                    sums_of_a_panel = const offset_of!(Walk, sums_of_a_panel),
                    stream_end = const offset_of!(Walk, stream_end),
                    stream_of_a_group = const STREAM_OF_A_GROUP,
                    step = const STEP,
                    row = const ROW,
                    half_panel = const HALF_PANEL,
                    pieces = const size_of::<CutWeights>(),
                    tile_width = const TILE_WIDTH,
                    out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                    out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                    out("zmm16") _, out("zmm17") _, out("zmm18") _, out("zmm19") _, out("zmm20") _, out("zmm31") _,
                    options(nostack),
                    $($operands)*
                );
            }
        }
    };
}

walk!(
    /// At most sixteen rows.
    multiply_16, group_of_16,
    zero: "tilezero tmm0
        tilezero tmm1",
    load: "tileloadd tmm0, [{sums} + {stride}]
        tileloadd tmm1, [{sums} + {stride} + {tile_width}]",
    store: "tilestored [{sums} + {stride}], tmm0
        tilestored [{sums} + {stride} + {tile_width}], tmm1"
);

walk!(
    /// 17 to 32 rows.
    multiply_32, group_of_32,
    zero: "tilezero tmm0
        tilezero tmm1
        tilezero tmm2
        tilezero tmm3",
    load: "tileloadd tmm0, [{sums} + {stride}]
        tileloadd tmm1, [{sums} + {stride} + {tile_width}]
        tileloadd tmm2, [{sums} + {stride} + {side_of_sums}]
        tileloadd tmm3, [{sums} + {stride} + {side_of_sums} + {tile_width}]",
    store: "tilestored [{sums} + {stride}], tmm0
        tilestored [{sums} + {stride} + {tile_width}], tmm1
        tilestored [{sums} + {stride} + {side_of_sums}], tmm2
        tilestored [{sums} + {stride} + {side_of_sums} + {tile_width}], tmm3"
    side_of_sums = const SIDE_OF_SUMS,
);

walk!(
    /// 33 to 48 rows. What is missing in the last third is read and written beyond.
    multiply_48, group_of_48,
    zero: "tilezero tmm0
        tilezero tmm1
        tilezero tmm2
        tilezero tmm3
        tilezero tmm4
        tilezero tmm5",
    load: "mov {middle}, {sums}
        add {middle}, [{walk} + {third_of_sums}]
        mov {last}, {middle}
        add {last}, [{walk} + {third_of_sums}]
        tileloadd tmm0, [{sums} + {stride}]
        tileloadd tmm3, [{sums} + {stride} + {tile_width}]
        tileloadd tmm1, [{middle} + {stride}]
        tileloadd tmm4, [{middle} + {stride} + {tile_width}]
        tileloadd tmm2, [{last} + {stride}]
        tileloadd tmm5, [{last} + {stride} + {tile_width}]",
    store: "mov {middle}, {sums}
        add {middle}, [{walk} + {third_of_sums}]
        mov {last}, {middle}
        add {last}, [{walk} + {third_of_sums}]
        tilestored [{sums} + {stride}], tmm0
        tilestored [{sums} + {stride} + {tile_width}], tmm3
        tilestored [{middle} + {stride}], tmm1
        tilestored [{middle} + {stride} + {tile_width}], tmm4
        tilestored [{last} + {stride}], tmm2
        tilestored [{last} + {stride} + {tile_width}], tmm5"
    middle = out(reg) _,
    last = out(reg) _,
    third_of_activations = const offset_of!(Walk, third_of_activations),
    third_of_sums = const offset_of!(Walk, third_of_sums),
);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::gemm::Isa;
    use crate::cpu::gemm::kernel::{Prefetch, SPARE_ROWS};
    use epsmoe_base::{Mix, env};
    use half::bf16;

    const WIDTH: usize = VECTORS * SIDE;

    /// 1 + 2⁻⁹ + 2⁻²⁰ has the pieces 1, 2⁻⁹ and 2⁻²⁰; in a group of one value all else is zero.
    #[test]
    fn pieces_worked_example() {
        if !Isa::Amx.is_supported() {
            return;
        }
        let mut words = [u32::MAX; ROW / size_of::<u32>()];
        let [high, middle, low] = [1.0, 2_f32.powi(-9), 2_f32.powi(-20)];
        // SAFETY: a processor with AMX has AVX-512.
        unsafe { cut_activations(&(high + middle + low).to_le_bytes(), &mut words) };
        for (words, piece) in words.as_chunks::<SIDE>().0.iter().zip([high, middle, low]) {
            assert_eq!(words[0], u32::from(bf16::from_f32(piece).to_bits()));
            assert_eq!(words[1..], [0; SIDE - 1]);
        }
    }

    /// Two groups and a rest of three steps: a group's steps 8 to 15 are the second stream, which begins where the first
    /// has eight steps of each group.
    #[test]
    fn streams_worked_example() {
        assert_eq!(
            [0, 7, 8, 15, 32, 40, 63].map(|step| place_in_streams(step, 67)),
            [0, 7, 16, 23, 8, 24, 63]
        );
        assert_eq!([64, 65, 66].map(|step| place_in_streams(step, 67)), [64, 65, 66]);
        for steps in [67, PANEL_BLOCK_STEPS, 2 * PANEL_BLOCK_STEPS + 45] {
            let mut places: Vec<_> = (0..steps).map(|step| place_in_streams(step, steps)).collect();
            places.sort_unstable();
            assert!(places.iter().copied().eq(0..steps), "{steps} steps");
        }
    }

    /// Random rows times random panels, as tiles of every kind: the same bits, and errors that are no larger than those of
    /// a chain of multiply-adds.
    #[test]
    fn as_exact_as_multiply_adds_and_alike_in_every_tile() {
        if !Isa::Amx.is_supported() {
            return;
        }
        const PANELS: usize = 5;
        let seed = env::test_seed();
        println!("EPSMOE_TEST_SEED={seed}");
        let mut mix = Mix::new(seed);
        for k in [13, GROUP, 2 * GROUP, 7 * GROUP, 7 * GROUP + 13, PANEL_BLOCK_STEPS + 2 * GROUP + 1] {
            let mut numbers = |count: usize| (0..count).map(|_| mix.signed()).collect::<Vec<f32>>();
            let (rows, weights) = (numbers(48 * k), numbers(PANELS * k * WIDTH));
            let panel = |number: usize| &weights[number * k * WIDTH..][..k * WIDTH];
            // SAFETY: the processor has the tiles.
            let all = unsafe { run::<48>(&rows, k, &weights) };
            let (mut error, mut plain_error) = (0.0_f64, 0.0_f64);
            for (number, sums) in all.chunks(48 * WIDTH).enumerate() {
                // SAFETY: like above.
                let alone = unsafe { run::<48>(&rows, k, panel(number)) };
                assert_eq!(alone, sums, "panel {number}, k {k}");
                for (index, sum) in sums.iter().enumerate() {
                    let products = (0..k).map(|step| {
                        (rows[index / WIDTH * k + step], panel(number)[step * WIDTH + index % WIDTH])
                    });
                    let exact: f64 = products.clone().map(|(a, b)| f64::from(a) * f64::from(b)).sum();
                    let plain = products.fold(0_f32, |sum, (a, b)| a.mul_add(b, sum));
                    error += (f64::from(*sum) - exact).powi(2);
                    plain_error += (f64::from(plain) - exact).powi(2);
                }
            }
            // SAFETY: like above.
            let fewer = unsafe {
                [
                    run::<7>(&rows, k, &weights),
                    run::<16>(&rows, k, &weights),
                    run::<23>(&rows, k, &weights),
                    run::<32>(&rows, k, &weights),
                    run::<41>(&rows, k, &weights),
                ]
            };
            for fewer in fewer {
                let per_panel = fewer.len() / PANELS;
                for (fewer, all) in fewer.chunks(per_panel).zip(all.chunks(48 * WIDTH)) {
                    assert_eq!(fewer, &all[..per_panel], "{} rows, k {k}", per_panel / WIDTH);
                }
            }
            assert!(
                error <= plain_error,
                "k {k}: squared errors {error:e}, of multiply-adds {plain_error:e}"
            );
        }
    }

    /// The sums of the first `ROWS` of `rows` and all panels of `weights`, whose steps lie in order.
    ///
    /// # Safety
    /// The processor has the tiles.
    unsafe fn run<const ROWS: usize>(rows: &[f32], k: usize, weights: &[f32]) -> Vec<f32> {
        let row_words = ROW / size_of::<u32>();
        let mut packed = vec![0; (k.div_ceil(GROUP) * ROWS + SPARE_ROWS) * row_words];
        for (row, values) in rows.chunks(k).take(ROWS).enumerate() {
            for (group, values) in values.chunks(GROUP).enumerate() {
                let words = &mut packed[(group * ROWS + row) * row_words..][..row_words];
                // SAFETY: the caller's promise.
                unsafe { cut_activations(bytemuck::cast_slice(values), words) };
            }
        }
        let mut placed = vec![0.0; weights.len()];
        for (placed, panel) in placed.chunks_mut(k * WIDTH).zip(weights.chunks(k * WIDTH)) {
            for (step, columns) in panel.chunks(WIDTH).enumerate() {
                placed[place_in_streams(step, k) * WIDTH..][..WIDTH].copy_from_slice(columns);
            }
        }
        let panels = weights.len() / (k * WIDTH);
        let mut sums = vec![f32::NAN; (panels * ROWS + SPARE_ROWS) * WIDTH];
        let tile = Tile {
            steps: k,
            panels,
            activations: packed.as_ptr(),
            weights: [placed.as_ptr().cast(); 2],
            sums: sums.as_mut_ptr(),
            more: false,
            prefetch: Prefetch::new(placed.as_ptr().cast(), 0, k),
        };
        // SAFETY: all operands are whole; the caller's promise.
        unsafe { multiply::<ROWS>(tile) };
        sums.truncate(panels * ROWS * WIDTH);
        sums
    }
}
