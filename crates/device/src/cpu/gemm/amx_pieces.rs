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

use super::amx::{SIDE, Shapes, TILE_WIDTH, tiles};
use super::epilogue::round_to_bf16;
use super::kernel::{Blocks, Functions, Several, Tile, VECTORS};
use super::{avx512, pack};
use crate::host::LINE_BYTES;
use half::bf16;
use std::arch::asm;
use std::mem::{MaybeUninit, offset_of};

/// Steps, that is float32 elements along K, which make one tile of bfloat16 pairs: a group.
const GROUP: usize = 2 * SIDE;

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

/// How often in a group `ask!` stands.
const QUESTIONS: usize = 4;

pub(super) static F32: Functions = Functions {
    tiles: tiles!(multiply_tile: 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23 24 25 26 27 28 29 30 31 32),
    several: Several {
        tiles: tiles!(multiply_run: 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23 24 25 26 27 28 29 30 31 32),
        panels: 8,
        neighbours: true,
    },
    chunk_rows: 256,
    blocks: Blocks { steps: GROUP, stride: ROW / size_of::<u32>(), pack: cut_activations },
    ..avx512::F32
};

/// Packs at most [`GROUP`] little-endian float32 of one row: all high pieces, then the middle ones, then the low ones. What
/// is missing in a group is zero.
///
/// # Safety
/// The processor has AVX-512.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
unsafe fn cut_activations(bytes: &[u8], words: &mut [u32]) {
    let mut rest = [0; GROUP];
    pack::bytes_to_words(bytes, &mut rest);
    let mut rest = rest.map(f32::from_bits);
    let (pieces, _) = bytemuck::cast_slice_mut::<u32, bf16>(words).as_chunks_mut::<GROUP>();
    for piece in &mut pieces[..PIECES] {
        round_to_bf16(&rest, piece);
        rest.iter_mut().zip(piece).for_each(|(rest, piece)| *rest -= f32::from(*piece));
    }
}

/// A tile of at most 32 rows of one panel, of many in a chunk: meanwhile it asks for its part of what follows.
///
/// # Safety
/// See [`multiply`].
unsafe fn multiply_tile<const ROWS: usize>(tile: Tile) {
    // SAFETY: the caller's promise.
    unsafe { multiply::<ROWS>(tile, if ROWS <= SIDE { multiply_16 } else { multiply_32 }) }
}

/// The only tile of its chunk, in some neighbouring panels: it reads weights as fast as they come.
///
/// # Safety
/// See [`multiply`].
unsafe fn multiply_run<const ROWS: usize>(tile: Tile) {
    // SAFETY: the caller's promise.
    unsafe { multiply::<ROWS>(tile, if ROWS <= SIDE { multiply_16 } else { multiply_run_of_32 }) }
}

/// `sums += activations · weights` for `ROWS` rows, at most 32, of neighbouring panels.
///
/// # Safety
/// The pointers of `tile` are valid for the shapes given at its fields, and the processor has the tiles.
#[inline(always)]
unsafe fn multiply<const ROWS: usize>(tile: Tile, groups: unsafe fn(&Shapes, Walk, Tile)) {
    /// A group that is not whole, with zeros for what is missing.
    #[repr(C, align(64))]
    struct LastGroup([u32; WEIGHTS_OF_A_GROUP / size_of::<u32>()]);

    let shapes = &const { Shapes::new(ROWS, SIDE) };
    let (whole, rest) = (tile.steps / GROUP, tile.steps % GROUP);
    let lines = (GROUP / QUESTIONS * tile.prefetch.stride).div_ceil(LINE_BYTES);
    let walk = |groups: usize, panels: usize, tile: &Tile| Walk {
        groups,
        panels,
        more: usize::from(tile.more),
        activations: tile.activations,
        activations_of_a_group: ROWS * ROW,
        sums_of_a_panel: ROWS * STEP,
        sums_of_the_first: panels * ROWS * STEP,
        lines,
    };
    // SAFETY: the caller's promise. Where groups are whole, each panel follows the one before. Where one is not, its steps
    // begin `whole` groups on in its panel; the packed activations have zeros for what is missing in them.
    unsafe {
        if rest == 0 {
            let paired = if ROWS <= SIDE { tile.panels / 2 } else { 0 };
            let panel = |number: usize| tile.weights[0].wrapping_byte_add(number * tile.steps * STEP);
            if paired > 0 {
                let shapes = &const { Shapes::of_pair(if ROWS <= SIDE { ROWS } else { SIDE }) };
                let pairs = Tile { weights: [panel(0), panel(paired)], ..tile };
                multiply_16_in_pairs(shapes, walk(whole, paired, &tile), pairs);
            }
            if tile.panels > 2 * paired {
                let sums = tile.sums.wrapping_byte_add(2 * paired * ROWS * STEP);
                let others = Tile { weights: [panel(2 * paired); 2], sums, ..tile };
                groups(shapes, walk(whole, tile.panels - 2 * paired, &tile), others);
            }
            return;
        }
        for panel in 0..tile.panels {
            let weights = tile.weights[0].wrapping_byte_add(panel * tile.steps * STEP);
            let sums = tile.sums.wrapping_byte_add(panel * ROWS * STEP);
            let tile = Tile { weights: [weights; 2], sums, ..tile };
            if whole > 0 {
                groups(shapes, walk(whole, 1, &tile), tile);
            }
            let mut last = LastGroup([0; _]);
            let weights = weights.wrapping_byte_add(whole * WEIGHTS_OF_A_GROUP);
            weights.copy_to_nonoverlapping(last.0.as_mut_ptr(), rest * STEP / size_of::<u32>());
            let rest_of_it = Tile {
                activations: tile.activations.wrapping_byte_add(whole * ROWS * ROW),
                weights: [last.0.as_ptr(); 2],
                more: tile.more || whole > 0,
                ..tile
            };
            groups(shapes, walk(1, 1, &rest_of_it), rest_of_it);
        }
    }
}

/// What the loops in assembly read from memory: there are not registers enough.
#[repr(C)]
struct Walk {
    /// Groups of steps in a panel.
    groups: usize,
    /// Panels left, or pairs of them.
    panels: usize,
    /// Whether the sums begin at what is there: 1, or 0.
    more: usize,
    /// Where the activations begin.
    activations: *const u32,
    /// Bytes from the activations of a group to those of the next.
    activations_of_a_group: usize,
    /// Bytes from the sums of a panel to those of the next.
    sums_of_a_panel: usize,
    /// Bytes from the sums of the panels of one stream to those of the other.
    sums_of_the_first: usize,
    /// Lines of each stream that are asked for at a time.
    lines: usize,
}

/// A group of weights cut into pieces, the tiles of one half of the panel after those of the other.
#[repr(C, align(64))]
struct CutWeights([u8; VECTORS * HALF_PANEL]);

/// Cuts pairs of steps in one half of the panel, or of another one (halves 2 and 3): a pair's high pieces are the upper
/// halves of its words, and what remains is exact. The words of both steps make one of bfloat16 pairs.
macro_rules! cut {
    ($($pair:literal $half:tt),+) => { concat!($(
        "vmovups zmm16, [", cut!(@half $half), " + 2 * ", $pair, " * {step}]\n",
        "vmovups zmm17, [", cut!(@half $half), " + 2 * ", $pair, " * {step} + {step}]\n",
        cut!(@piece 0, $pair, $half),
        cut!(@piece 1, $pair, $half),
        "vpsrld zmm16, zmm16, 16\n",
        "vpord zmm20, zmm16, zmm17\n",
        cut!(@store 2, $pair, $half),
    )+) };
    (@half 0) => { "{weights}" };
    (@half 1) => { "{weights} + {tile_width}" };
    (@half 2) => { "{other}" };
    (@half 3) => { "{other} + {tile_width}" };
    (@piece $piece:literal, $pair:literal, $half:tt) => { concat!(
        "vpandd zmm18, zmm16, zmm31\n",
        "vpandd zmm19, zmm17, zmm31\n",
        "vsubps zmm16, zmm16, zmm18\n",
        "vsubps zmm17, zmm17, zmm19\n",
        "vpsrld zmm18, zmm18, 16\n",
        "vpord zmm20, zmm18, zmm19\n",
        cut!(@store $piece, $pair, $half),
    ) };
    (@store $piece:literal, $pair:literal, $half:tt) => { concat!(
        "vmovaps [{next} + ", $half, " * {half_panel} + ", $pair, " * {row} + ", $piece, " * {tile_width}], zmm20\n",
    ) };
}

/// The same, after asking for weights that will soon be used: three times, since a processor that has too many questions
/// open to take one forgets it.
macro_rules! ask_and_cut {
    ($($pair:literal $half:tt),+) => { concat!($(
        ask_and_cut!(@ask "{soon}", $pair, $half),
        ask_and_cut!(@ask "{later}", $pair, $half),
        ask_and_cut!(@ask "{latest}", $pair, $half),
        cut!($pair $half),
    )+) };
    (@ask $ahead:literal, $pair:literal, $half:tt) => { concat!(
        "prefetcht0 [", cut!(@half $half), " + ", $ahead, " + 2 * ", $pair, " * {step}]\n",
        "prefetcht0 [", cut!(@half $half), " + ", $ahead, " + 2 * ", $pair, " * {step} + {step}]\n",
    ) };
}

/// Asks for the next lines of the four streams.
macro_rules! ask {
    () => {
        "mov {line}, [{walk} + {lines}]
        8:
        prefetcht1 [{ahead}]
        prefetcht1 [{ahead} + {apart}]
        prefetcht1 [{ahead} + 2 * {apart}]
        prefetcht1 [{ahead} + {three_apart}]
        add {ahead}, {line_bytes}
        dec {line}
        jg 8b\n"
    };
}

macro_rules! nothing {
    () => {
        ""
    };
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
    ($cut:ident, $ask:ident) => {
        concat!(
            load!(6: weights 0, piece 0), load!(4: activations 0, piece 2),
            add!(0 += 4 * 6), $cut!(0 0, 0 1), load!(7: weights 1, piece 0),
            add!(1 += 4 * 7), $cut!(1 0, 1 1, 2 0), load!(4: activations 0, piece 0),
            add!(0 += 4 * 6), $cut!(2 1, 3 0, 3 1),
            add!(1 += 4 * 7), $cut!(4 0, 4 1), load!(6: weights 0, piece 2),
            add!(0 += 4 * 6), $cut!(5 0, 5 1, 6 0), load!(7: weights 1, piece 2),
            add!(1 += 4 * 7), $cut!(6 1, 7 0, 7 1), load!(6: weights 0, piece 1),
            add!(0 += 4 * 6), $cut!(8 0, 8 1), load!(7: weights 1, piece 1),
            add!(1 += 4 * 7), $cut!(9 0, 9 1, 10 0), load!(4: activations 0, piece 1),
            add!(0 += 4 * 6), $cut!(10 1, 11 0, 11 1),
            add!(1 += 4 * 7), $cut!(12 0, 12 1), load!(6: weights 0, piece 0),
            add!(0 += 4 * 6), $cut!(13 0, 13 1, 14 0), load!(7: weights 1, piece 0),
            add!(1 += 4 * 7), $cut!(14 1, 15 0, 15 1),
        )
    };
}

/// The same in a pair of panels at once.
macro_rules! group_of_16_in_pair {
    ($cut:ident, $ask:ident) => {
        concat!(
            load!(4: activations 0, piece 2),
            in_pair!(0, $cut, 0 0, 0 1, 0 2, 0 3, 1 0, 1 1, 1 2, 1 3, 2 0, 2 1),
            load!(4: activations 0, piece 0),
            in_pair!(0, $cut, 2 2, 2 3, 3 0, 3 1, 3 2, 3 3, 4 0, 4 1, 4 2, 4 3),
            in_pair!(2, $cut, 5 0, 5 1, 5 2, 5 3, 6 0, 6 1, 6 2, 6 3, 7 0, 7 1),
            in_pair!(1, $cut, 7 2, 7 3, 8 0, 8 1, 8 2, 8 3, 9 0, 9 1, 9 2, 9 3),
            load!(4: activations 0, piece 1),
            in_pair!(1, $cut, 10 0, 10 1, 10 2, 10 3, 11 0, 11 1, 11 2, 11 3, 12 0, 12 1),
            in_pair!(0, $cut, 12 2, 12 3, 13 0, 13 1, 13 2, 13 3, 14 0, 14 1, 14 2, 14 3),
            $cut!(15 0, 15 1, 15 2, 15 3),
        )
    };
}

/// Multiplies a piece of the activations by one of both panels' weights.
macro_rules! in_pair {
    ($piece:literal, $cut:ident, $p0:literal $h0:tt, $p1:literal $h1:tt, $p2:literal $h2:tt, $p3:literal $h3:tt, $p4:literal $h4:tt,
     $p5:literal $h5:tt, $p6:literal $h6:tt, $p7:literal $h7:tt, $p8:literal $h8:tt, $p9:literal $h9:tt) => {
        concat!(
            load!(5: weights 0, piece $piece), add!(0 += 4 * 5), $cut!($p0 $h0, $p1 $h1),
            load!(6: weights 1, piece $piece), add!(1 += 4 * 6), $cut!($p2 $h2, $p3 $h3, $p4 $h4),
            load!(7: weights 2, piece $piece), add!(2 += 4 * 7), $cut!($p5 $h5, $p6 $h6),
            load!(5: weights 3, piece $piece), add!(3 += 4 * 5), $cut!($p7 $h7, $p8 $h8, $p9 $h9),
        )
    };
}

/// `group_of_16` for 17 to 32 rows; each sum gets its products in the same order.
macro_rules! group_of_32 {
    ($cut:ident, $ask:ident) => {
        concat!(
            load!(6: weights 0, piece 0), load!(4: activations 0, piece 2),
            add!(0 += 4 * 6), $cut!(0 0), load!(7: weights 1, piece 0),
            add!(1 += 4 * 7), $cut!(0 1), load!(5: activations 1, piece 2),
            add!(2 += 5 * 6), $cut!(1 0, 1 1),
            add!(3 += 5 * 7), $cut!(2 0), $ask!(), load!(4: activations 0, piece 0),
            add!(0 += 4 * 6), $cut!(2 1),
            add!(1 += 4 * 7), $cut!(3 0, 3 1), load!(5: activations 1, piece 0),
            add!(2 += 5 * 6), $cut!(4 0),
            add!(3 += 5 * 7), $cut!(4 1), load!(6: weights 0, piece 2),
            add!(0 += 4 * 6), $cut!(5 0, 5 1),
            add!(2 += 5 * 6), $cut!(6 0), $ask!(), load!(7: weights 1, piece 2),
            add!(1 += 4 * 7), $cut!(6 1),
            add!(3 += 5 * 7), $cut!(7 0, 7 1), load!(6: weights 0, piece 1),
            add!(0 += 4 * 6), $cut!(8 0),
            add!(2 += 5 * 6), $cut!(8 1), load!(7: weights 1, piece 1),
            add!(1 += 4 * 7), $cut!(9 0, 9 1),
            add!(3 += 5 * 7), $cut!(10 0), $ask!(), load!(4: activations 0, piece 1),
            add!(0 += 4 * 6), $cut!(10 1),
            add!(1 += 4 * 7), $cut!(11 0, 11 1), load!(5: activations 1, piece 1),
            add!(2 += 5 * 6), $cut!(12 0),
            add!(3 += 5 * 7), $cut!(12 1), load!(6: weights 0, piece 0),
            add!(0 += 4 * 6), $cut!(13 0, 13 1),
            add!(2 += 5 * 6), $cut!(14 0), $ask!(), load!(7: weights 1, piece 0),
            add!(1 += 4 * 7), $cut!(14 1),
            add!(3 += 5 * 7), $cut!(15 0, 15 1),
        )
    };
}

/// Defines the loop over panels, or pairs of them, and over the groups of one, around what a group does. While a group is
/// multiplied, the next is cut; the very last cuts itself once more, since nothing need follow it.
///
/// Sums are in tiles 0 to 3, activations in 4 and 5, weights in 6 and 7, of a pair of panels in 5 to 7.
macro_rules! walk {
    ($(#[$doc:meta])* $name:ident($tile:ident), $group:ident, $cut:ident, $ask:ident, panels: $panels:literal,
     cut first: [$($first:expr),+], load: $load:literal, advance: $other:literal, zero: $zero:literal, store: $store:literal, $($operands:tt)*) => {
        $(#[$doc])*
        ///
        /// # Safety
        /// Like [`multiply`]; `shapes` and `walk` are those of the tile's rows.
        #[target_feature(enable = "avx512f")]
        unsafe fn $name(shapes: &Shapes, mut walk: Walk, $tile: Tile) {
            const PANELS: usize = $panels;
            let mut pieces = MaybeUninit::<[CutWeights; 4]>::uninit();
            // SAFETY: the caller's promise. LDTILECFG makes all tiles zero, TILERELEASE leaves none in use.
            unsafe {
                asm!(
                    "ldtilecfg [{next}]",
                    "cmp qword ptr [{walk} + {more}], 0",
                    "je 2f",
                    "mov {stride:e}, {step}",
                    $load,
                    "2:",
                    "mov {groups:e}, 0xffff0000",
                    "vpbroadcastd zmm31, {groups:e}",
                    "mov {next}, {now}",
                    $($first,)+
                    "add {next}, {pieces}",
                    "mov {stride:e}, {row}",
                    "3:",
                    "mov {groups}, [{walk} + {groups_of_a_panel}]",
                    "mov {activations}, [{walk} + {first_activations}]",
                    "4:",
                    "cmp {groups}, 1",
                    "jne 5f",
                    "cmp qword ptr [{walk} + {panels}], 1",
                    "je 6f",
                    "5:",
                    "add {weights}, {weights_of_a_group}",
                    $other,
                    "6:",
                    $group!($cut, $ask),
                    "xchg {now}, {next}",
                    "add {activations}, [{walk} + {activations_of_a_group}]",
                    "dec {groups}",
                    "jnz 4b",
                    "mov {stride:e}, {step}",
                    $store,
                    "dec qword ptr [{walk} + {panels}]",
                    "jz 7f",
                    $zero,
                    "add {sums}, [{walk} + {sums_of_a_panel}]",
                    "mov {stride:e}, {row}",
                    "jmp 3b",
                    "7:",
                    "tilerelease",
                    walk = in(reg) &mut walk,
                    now = inout(reg) pieces.as_mut_ptr() => _,
                    next = inout(reg) shapes => _,
                    stride = out(reg) _,
                    groups = out(reg) _,
                    activations = out(reg) _,
                    weights = inout(reg) $tile.weights[0] => _,
                    sums = inout(reg) $tile.sums => _,
                    more = const offset_of!(Walk, more),
                    panels = const offset_of!(Walk, panels),
                    groups_of_a_panel = const offset_of!(Walk, groups),
                    first_activations = const offset_of!(Walk, activations),
                    activations_of_a_group = const offset_of!(Walk, activations_of_a_group),
                    sums_of_a_panel = const offset_of!(Walk, sums_of_a_panel),
                    step = const STEP,
                    row = const ROW,
                    half_panel = const HALF_PANEL,
                    pieces = const size_of::<CutWeights>() * PANELS,
                    weights_of_a_group = const WEIGHTS_OF_A_GROUP,
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
    multiply_16(tile), group_of_16, ask_and_cut, nothing, panels: 1,
    cut first: [ask_and_cut!(0 0, 0 1, 1 0, 1 1, 2 0, 2 1, 3 0, 3 1, 4 0, 4 1, 5 0, 5 1, 6 0, 6 1, 7 0, 7 1),
        ask_and_cut!(8 0, 8 1, 9 0, 9 1, 10 0, 10 1, 11 0, 11 1, 12 0, 12 1, 13 0, 13 1, 14 0, 14 1, 15 0, 15 1)],
    load: "tileloadd tmm0, [{sums} + {stride}]
        tileloadd tmm1, [{sums} + {stride} + {tile_width}]",
    advance: "",
    zero: "tilezero tmm0
        tilezero tmm1",
    store: "tilestored [{sums} + {stride}], tmm0
        tilestored [{sums} + {stride} + {tile_width}], tmm1",
    soon = const 1024,
    later = const 2048,
    latest = const 3072,
);

/// `walk!` for 17 to 32 rows of one panel after the other.
macro_rules! walk_32 {
    ($(#[$doc:meta])* $name:ident($tile:ident), $cut:ident, $ask:ident, $($operands:tt)*) => {
        walk!(
            $(#[$doc])*
            $name($tile), group_of_32, $cut, $ask, panels: 1,
            cut first: [$cut!(0 0, 0 1, 1 0, 1 1, 2 0, 2 1, 3 0, 3 1, 4 0, 4 1, 5 0, 5 1, 6 0, 6 1, 7 0, 7 1),
                $cut!(8 0, 8 1, 9 0, 9 1, 10 0, 10 1, 11 0, 11 1, 12 0, 12 1, 13 0, 13 1, 14 0, 14 1, 15 0, 15 1)],
            load: "tileloadd tmm0, [{sums} + {stride}]
                tileloadd tmm1, [{sums} + {stride} + {tile_width}]
                tileloadd tmm2, [{sums} + {stride} + {side_of_sums}]
                tileloadd tmm3, [{sums} + {stride} + {side_of_sums} + {tile_width}]",
            advance: "",
            zero: "tilezero tmm0
                tilezero tmm1
                tilezero tmm2
                tilezero tmm3",
            store: "tilestored [{sums} + {stride}], tmm0
                tilestored [{sums} + {stride} + {tile_width}], tmm1
                tilestored [{sums} + {stride} + {side_of_sums}], tmm2
                tilestored [{sums} + {stride} + {side_of_sums} + {tile_width}], tmm3",
            side_of_sums = const SIDE_OF_SUMS,
            $($operands)*
        );
    };
}

walk_32!(
    /// 17 to 32 rows, alone in their chunk.
    multiply_run_of_32(tile), ask_and_cut, nothing,
    soon = const 1024,
    later = const 2048,
    latest = const 3072,
);

walk_32!(
    /// 17 to 32 rows of many.
    multiply_32(tile), cut, ask,
    ahead = inout(reg) tile.prefetch.start => _,
    apart = in(reg) tile.prefetch.apart,
    three_apart = in(reg) 3 * tile.prefetch.apart,
    line = out(reg) _,
    lines = const offset_of!(Walk, lines),
    line_bytes = const LINE_BYTES,
);

walk!(
    /// At most sixteen rows, in pairs of panels: two streams bring more from memory than one. Nothing is added to: where
    /// there are pairs, a call has the whole of K.
    multiply_16_in_pairs(tile), group_of_16_in_pair, ask_and_cut, nothing, panels: 2,
    cut first: [
        ask_and_cut!(0 0, 0 1, 0 2, 0 3, 1 0, 1 1, 1 2, 1 3, 2 0, 2 1, 2 2, 2 3, 3 0, 3 1, 3 2, 3 3),
        ask_and_cut!(4 0, 4 1, 4 2, 4 3, 5 0, 5 1, 5 2, 5 3, 6 0, 6 1, 6 2, 6 3, 7 0, 7 1, 7 2, 7 3),
        ask_and_cut!(8 0, 8 1, 8 2, 8 3, 9 0, 9 1, 9 2, 9 3, 10 0, 10 1, 10 2, 10 3, 11 0, 11 1, 11 2, 11 3),
        ask_and_cut!(12 0, 12 1, 12 2, 12 3, 13 0, 13 1, 13 2, 13 3, 14 0, 14 1, 14 2, 14 3, 15 0, 15 1, 15 2, 15 3)
    ],
    load: "",
    advance: "add {other}, {weights_of_a_group}",
    zero: "tilezero tmm0
        tilezero tmm1
        tilezero tmm2
        tilezero tmm3",
    store: "tilestored [{sums} + {stride}], tmm0
        tilestored [{sums} + {stride} + {tile_width}], tmm1
        mov {groups}, [{walk} + {sums_of_the_first}]
        add {groups}, {sums}
        tilestored [{groups} + {stride}], tmm2
        tilestored [{groups} + {stride} + {tile_width}], tmm3",
    other = inout(reg) tile.weights[1] => _,
    sums_of_the_first = const offset_of!(Walk, sums_of_the_first),
    soon = const 1024,
    later = const 1536,
    latest = const 2048,
);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::gemm::Isa;
    use crate::cpu::gemm::kernel::Prefetch;
    use epsmoe_base::{Mix, env};

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
        for k in [GROUP, 7 * GROUP, 7 * GROUP + 13] {
            let mut numbers = |count: usize| (0..count).map(|_| mix.signed()).collect::<Vec<f32>>();
            let (rows, weights) = (numbers(32 * k), numbers(PANELS * k * WIDTH));
            // SAFETY: the operands are as `run` makes them, and the processor has the tiles.
            let (few, many) = unsafe {
                (
                    run::<7>(multiply_run::<7>, &rows, k, &weights),
                    run::<32>(multiply_run::<32>, &rows, k, &weights),
                )
            };
            let (mut error, mut plain_error) = (0.0_f64, 0.0_f64);
            for panel in 0..PANELS {
                let weights = &weights[panel * k * WIDTH..][..k * WIDTH];
                // SAFETY: like above.
                let alone = unsafe { run::<32>(multiply_tile::<32>, &rows, k, weights) };
                assert_eq!(alone[..], many[panel * 32 * WIDTH..][..32 * WIDTH], "panel {panel}, k {k}");
                assert_eq!(alone[..7 * WIDTH], few[panel * 7 * WIDTH..][..7 * WIDTH], "panel {panel}, k {k}");
                for (index, sum) in alone.iter().enumerate() {
                    let products = (0..k)
                        .map(|step| (rows[index / WIDTH * k + step], weights[step * WIDTH + index % WIDTH]));
                    let exact: f64 = products.clone().map(|(a, b)| f64::from(a) * f64::from(b)).sum();
                    let plain = products.fold(0_f32, |sum, (a, b)| a.mul_add(b, sum));
                    error += (f64::from(*sum) - exact).powi(2);
                    plain_error += (f64::from(plain) - exact).powi(2);
                }
            }
            assert!(
                error <= plain_error,
                "k {k}: squared errors {error:e}, of multiply-adds {plain_error:e}"
            );
        }
    }

    /// The sums of the first `ROWS` of `rows` and all panels of `weights`.
    ///
    /// # Safety
    /// The processor has the tiles; `tile` is for `ROWS` rows.
    unsafe fn run<const ROWS: usize>(
        tile: unsafe fn(Tile),
        rows: &[f32],
        k: usize,
        weights: &[f32],
    ) -> Vec<f32> {
        let row_words = ROW / size_of::<u32>();
        let mut packed = vec![0; k.div_ceil(GROUP) * ROWS * row_words];
        for (row, values) in rows.chunks(k).take(ROWS).enumerate() {
            for (group, values) in values.chunks(GROUP).enumerate() {
                let words = &mut packed[(group * ROWS + row) * row_words..][..row_words];
                // SAFETY: the caller's promise.
                unsafe { cut_activations(bytemuck::cast_slice(values), words) };
            }
        }
        let panels = weights.len() / (k * WIDTH);
        let mut sums = vec![f32::NAN; panels * ROWS * WIDTH];
        let tile_of_all = Tile {
            steps: k,
            panels,
            activations: packed.as_ptr(),
            weights: [weights.as_ptr().cast(); 2],
            sums: sums.as_mut_ptr(),
            more: false,
            prefetch: Prefetch::new(weights.as_ptr().cast(), 0, k),
        };
        // SAFETY: all operands are whole; the caller's promise.
        unsafe { tile(tile_of_all) };
        sums
    }
}
