//! Products of bfloat16 rows with panels of codes in tiles, by AMX.
//!
//! A tile product adds up over K `a[i][k] · b[k][j]`, and which operand is the weights does not matter for the bits. Elsewhere they
//! are `b`, in words of two elements along K. Here they are `a`: a row of that tile is 32 weights of one column of the product, which
//! have one scale. Of four bits they are looked up, 32 by one instruction, in a table of the sixteen weights that there are under
//! this scale: sixteen products, rounded once to bfloat16, for 32 weights. Bytes are multiplied and rounded each for itself, except
//! where all columns of a tile have one scale, as in FP8 blocks: a table then has all weights of seven bits. Activations
//! are `b`, sums come out column by column and are turned at the end.
//!
//! Decoded tiles go through the first cache: vector instructions fill one buffer while tiles are loaded from the other.

use super::ElementType;
use super::amx::{SIDE, Shapes};
use super::coded::{CodedProducts, CodedTile, Layout, TILE};
use super::decode_avx512::{Minima, Powers, Scaled, ScaledFloats, Weights, Zeros};
use super::kernel::VECTORS;
use crate::threaded::LINE_BYTES;
use epsmoe_quant::{Code, Format, Scale};
use std::arch::asm;
use std::arch::x86_64::*;
use std::mem::transmute;

pub(super) const PRODUCTS: CodedProducts =
    CodedProducts { words, pack, decoded_words: BLOCK * VECTORS * SIDE * SIDE, panels, multiply };

/// Tiles along K that are decoded before many rows are multiplied with them; few rows are with one at a time.
const BLOCK: usize = 32;

/// Decoded tiles that take turns of few rows: one is filled while the one before is multiplied with.
const TURNS: usize = 2;

/// Rows that are multiplied with a decoded tile at once.
const ROWS_AT_ONCE: usize = 2 * SIDE;

/// Streams in which the panel that follows is brought into L2.
const STREAMS: usize = 4;

/// Panels that are multiplied one after the other: of few rows one ends while the next has begun.
fn panels(rows: usize) -> usize {
    if rows <= ROWS_AT_ONCE { 8 } else { 1 }
}

/// Rows side by side in a tile of activations or of sums.
fn across(rows: usize) -> usize {
    rows.next_power_of_two().min(SIDE)
}

/// See [`CodedProducts`].
fn words(layout: &Layout, rows: usize) -> usize {
    layout.k.div_ceil(TILE[1]) * SIDE * rows.next_multiple_of(across(rows))
}

/// See [`CodedProducts`]: tile after tile of sixteen steps and, for each, some rows side by side, of all steps; then the next rows. What is
/// missing is zero.
///
/// # Safety
/// The processor has AVX-512.
#[target_feature(enable = "avx512f")]
unsafe fn pack(_: &Layout, _: ElementType, rows: &[&[u8]], words: &mut [u32]) {
    let (bytes, across) = (rows[0].len(), across(rows.len()));
    let tiles = bytes.div_ceil(LINE_BYTES);
    for (rows, words) in rows.chunks(across).zip(words.chunks_mut(tiles * SIDE * across)) {
        for (tile, words) in words.chunks_exact_mut(SIDE * across).enumerate() {
            let mut square = [_mm512_setzero_si512(); SIDE];
            for (row, vector) in rows.iter().zip(&mut square) {
                let from = &row[tile * LINE_BYTES..bytes.min((tile + 1) * LINE_BYTES)];
                let mut line = [0; LINE_BYTES];
                let line = <&[u8; LINE_BYTES]>::try_from(from).unwrap_or_else(|_| {
                    line[..from.len()].copy_from_slice(from);
                    &line
                });
                // SAFETY: a line is a vector.
                *vector = unsafe { _mm512_loadu_si512(line.as_ptr().cast()) };
            }
            for (vector, words) in turn(square).into_iter().zip(words.chunks_exact_mut(across)) {
                // SAFETY: under the mask are as many words as there are.
                unsafe { _mm512_mask_storeu_epi32(words.as_mut_ptr().cast(), lanes(across), vector) }
            }
        }
    }
}

/// The first lanes.
fn lanes(count: usize) -> __mmask16 {
    __mmask16::MAX >> (SIDE - count)
}

/// Rows become columns.
#[target_feature(enable = "avx512f")]
fn turn(rows: [__m512i; SIDE]) -> [__m512i; SIDE] {
    let mut halves = [_mm512_setzero_si512(); SIDE];
    for four in 0..4 {
        let [a, b, c, d] = [0, 1, 2, 3].map(|row| rows[4 * four + row]);
        let (low, high) = (_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
        let (other_low, other_high) = (_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
        // Number `i` has column `i` of these four rows in its first quarter, column `4 + i` in its second, …
        halves[four] = _mm512_unpacklo_epi64(low, other_low);
        halves[4 + four] = _mm512_unpackhi_epi64(low, other_low);
        halves[8 + four] = _mm512_unpacklo_epi64(high, other_high);
        halves[12 + four] = _mm512_unpackhi_epi64(high, other_high);
    }
    let mut columns = halves;
    for (first, quarters) in halves.as_chunks::<4>().0.iter().enumerate() {
        let [a, b, c, d] = *quarters;
        let even = [_mm512_shuffle_i32x4::<0x88>(a, b), _mm512_shuffle_i32x4::<0x88>(c, d)];
        let odd = [_mm512_shuffle_i32x4::<0xdd>(a, b), _mm512_shuffle_i32x4::<0xdd>(c, d)];
        columns[first] = _mm512_shuffle_i32x4::<0x88>(even[0], even[1]);
        columns[8 + first] = _mm512_shuffle_i32x4::<0xdd>(even[0], even[1]);
        columns[4 + first] = _mm512_shuffle_i32x4::<0x88>(odd[0], odd[1]);
        columns[12 + first] = _mm512_shuffle_i32x4::<0xdd>(odd[0], odd[1]);
    }
    columns
}

/// See [`CodedProducts`].
///
/// # Safety
/// The pointers of `tile` are valid for the shapes given at its fields, and the processor has the tiles and AVX-512 with its
/// instructions for bytes and bfloat16.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx512vbmi,f16c")]
unsafe fn multiply(tile: &CodedTile<'_>) {
    let Format { code, scale, zeros, .. } = tile.layout.format;
    let whole: [f32; 16] = std::array::from_fn(|code| code as f32);
    // SAFETY: the caller's promise.
    unsafe {
        match (code, scale) {
            (Code::E2M1, _) => walk::<_, Powers>(Nibbles::new(&epsmoe_quant::element::E2M1), tile),
            (Code::U4, Scale::NestedWithMinima) => walk::<_, Minima>(Nibbles::new(&whole), tile),
            (Code::U4, _) if zeros => walk::<_, Zeros>(Nibbles::new(&whole), tile),
            (Code::U4, _) => walk::<_, Scaled>(Nibbles::new(&whole.map(|value| value - 8.0)), tile),
            (Code::I8, Scale::NestedWithMinima) => walk::<_, Minima>(Signed, tile),
            (Code::I8, _) if zeros => walk::<_, Zeros>(Signed, tile),
            (Code::I8, Scale::F16 | Scale::BF16) => walk::<_, Shifted>(InFraction::new(), tile),
            (Code::I8, _) => walk::<_, Scaled>(Signed, tile),
            (Code::E4M3, _) => walk::<_, ScaledFloats>(Floats::new(), tile),
        }
    }
}

/// Multiplies with panels that lie one after the other.
///
/// # Safety
/// Like [`multiply`].
#[inline(always)]
unsafe fn walk<U: Unit<W> + Copy, W: Column>(unit: U, tile: &CodedTile<'_>) {
    // One for each half of a panel, which may be gate and up and have other scales.
    let mut units = [unit; VECTORS];
    let panel_bytes = tile.layout.format.groups(tile.layout.k) * tile.layout.group_bytes;
    // SAFETY: the caller's promise.
    unsafe {
        configure(across(tile.rows));
        for panel in 0..tile.count {
            let codes = tile.panels[0].add(panel * panel_bytes);
            let last = panel + 1 == tile.count;
            let following = if last { tile.following } else { codes.add(panel_bytes) };
            let sums = tile.sums.add(panel * tile.rows * VECTORS * SIDE);
            multiply_panel(&mut units, tile, codes, [following, following.wrapping_add(panel_bytes)], sums);
        }
        release();
    }
}

/// Decodes a panel block by block and multiplies all rows with each, while what follows is brought into L2.
///
/// # Safety
/// Like [`multiply`], and [`configure`] was called.
#[inline(always)]
unsafe fn multiply_panel<U: Unit<W>, W: Column>(
    units: &mut [U; VECTORS],
    tile: &CodedTile<'_>,
    mut codes: *const u8,
    following: [*const u8; 2],
    sums: *mut f32,
) {
    let &CodedTile { layout, rows, activations, .. } = tile;
    let Format { group, part, .. } = layout.format;
    let tiles = layout.k.div_ceil(TILE[1]);
    let (tiles_of_a_group, tiles_of_a_part) = (group.div_ceil(TILE[1]), part.div_ceil(TILE[1]));
    // Parts that a tile is made of, and the second of them.
    let (parts_of_a_tile, other) = if part < TILE[1] && group > part { (2, 1) } else { (1, 0) };
    let few = rows <= ROWS_AT_ONCE;
    let across = across(rows);
    let apart = (following[1].addr() - following[0].addr()) / STREAMS;
    let (mut following, mut header) = (following[0], codes);
    let (mut of_group, mut of_part) = (0, 0);
    let mut halves = [Halves::default(); VECTORS];
    let decoded = tile.decoded.cast::<DecodedTiles>();
    let words_of_a_tile = SIDE * across;
    // Sums and activations of the tiles of rows from `row` on; those of the next are `true`.
    let multiplied = |row: usize| Multiplied {
        activations: activations.wrapping_add(row * tiles * SIDE),
        below: (row + SIDE < rows).then_some(tiles * words_of_a_tile),
        sums: sums.wrapping_add(row * VECTORS * SIDE),
        words_of_a_tile,
    };
    // SAFETY: the caller's promise. There is room for the decoded tiles of a block.
    unsafe {
        let first_rows = multiplied(0);
        zero_sums();
        for index in 0..tiles {
            if of_group == 0 {
                header = codes;
                codes = codes.add(layout.header_bytes);
                of_part = 0;
            }
            if of_part == 0 {
                let part = of_group / tiles_of_a_part * parts_of_a_tile;
                for (vector, halves) in halves.iter_mut().enumerate() {
                    W::load(layout, header, part, 2 * vector).keep(&mut halves[0]);
                    if other > 0 {
                        W::load(layout, header, part + other, 2 * vector).keep(&mut halves[1]);
                    } else {
                        halves[1] = halves[0];
                    }
                }
            }
            let within = if few { index % TURNS } else { index % BLOCK };
            let vectors = units.iter_mut().zip(&halves).zip(&mut *decoded.add(within));
            for ((unit, halves), decoded) in vectors {
                for line in 0..layout.unit_bytes / LINE_BYTES / STREAMS {
                    for stream in 0..STREAMS {
                        let ahead = following.wrapping_add(stream * apart + line * LINE_BYTES);
                        _mm_prefetch::<_MM_HINT_T1>(ahead.cast());
                    }
                }
                following = following.wrapping_add(layout.unit_bytes / STREAMS);
                unit.decode(codes, halves, decoded);
                codes = codes.add(layout.unit_bytes);
            }
            of_group = if of_group + 1 == tiles_of_a_group { 0 } else { of_group + 1 };
            of_part = if of_part + 1 == tiles_of_a_part { 0 } else { of_part + 1 };
            if few {
                // What was just stored can be loaded only some time later.
                if index > 0 {
                    first_rows.add_products(decoded.add((index - 1) % TURNS), index - 1);
                }
            } else if within + 1 == BLOCK || index + 1 == tiles {
                for row in (0..rows).step_by(ROWS_AT_ONCE) {
                    let multiplied = multiplied(row);
                    if index > within {
                        multiplied.load_sums();
                    } else {
                        zero_sums();
                    }
                    for earlier in 0..=within {
                        multiplied.add_products(decoded.add(earlier), index - within + earlier);
                    }
                    multiplied.store_sums();
                }
            }
        }
        if few {
            first_rows.add_products(decoded.add((tiles - 1) % TURNS), tiles - 1);
            first_rows.store_sums();
        }
        if across > 1 {
            turn_sums(sums, rows, across);
        }
    }
}

/// The decoded tiles of a panel that lie side by side.
type DecodedTiles = [[[u8; LINE_BYTES]; SIDE]; VECTORS];

/// Sums of sixteen columns, each of the rows side by side, and of the other sixteen become rows of the panel's width.
///
/// # Safety
/// `sums` has room for `rows` rows and what is missing in the last sixteen.
#[target_feature(enable = "avx512f")]
unsafe fn turn_sums(sums: *mut f32, rows: usize, across: usize) {
    for first in (0..rows).step_by(SIDE) {
        // SAFETY: the caller's promise; both squares are read before they are written.
        unsafe {
            let sums = sums.add(first * VECTORS * SIDE);
            let square = |vector: usize| {
                let line = |row: usize| {
                    _mm512_maskz_loadu_epi32(lanes(across), sums.add((vector * SIDE + row) * across).cast())
                };
                turn(std::array::from_fn(line))
            };
            let squares: [_; VECTORS] = std::array::from_fn(square);
            for (vector, square) in squares.into_iter().enumerate() {
                for (row, line) in square.into_iter().take(across).enumerate() {
                    _mm512_storeu_si512(sums.add((row * VECTORS + vector) * SIDE).cast(), line);
                }
            }
        }
    }
}

/// Makes tiles of the processor: sums in 0 to 3, weights in 4 and 5, activations in 6 and 7. They stay until [`release`], with what is in
/// them: the compiler uses none of its own.
///
/// # Safety
/// The processor has the tiles; `across` is a power of two.
#[inline(always)]
unsafe fn configure(across: usize) {
    static SHAPES: [Shapes; 5] = [
        Shapes::of_weights(1),
        Shapes::of_weights(2),
        Shapes::of_weights(4),
        Shapes::of_weights(8),
        Shapes::of_weights(16),
    ];
    let shapes = &SHAPES[across.trailing_zeros() as usize];
    // SAFETY: the caller's promise.
    unsafe {
        asm!("ldtilecfg [{shapes}]", shapes = in(reg) shapes, options(nostack, readonly),
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
            out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _);
    }
}

/// # Safety
/// The processor has the tiles.
#[inline(always)]
unsafe fn release() {
    // SAFETY: the caller's promise.
    unsafe {
        asm!("tilerelease", options(nostack, nomem),
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
            out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _);
    }
}

/// One or two tiles of rows that are multiplied with decoded tiles.
#[derive(Clone, Copy)]
struct Multiplied {
    /// Activations, and words from there to those of the next sixteen rows, if there are any.
    activations: *const u32,
    below: Option<usize>,
    /// Sums of sixteen columns, those of the other sixteen, and both of the next rows.
    sums: *mut f32,
    /// Words of a tile of activations or of sums.
    words_of_a_tile: usize,
}

/// Instructions on all sums in memory: what is done to a tile's register and its address.
macro_rules! each_tile_of_sums {
    ($multiplied:ident, $first:literal, $second:literal, $third:literal, $fourth:literal) => {{
        let Multiplied { sums, words_of_a_tile, .. } = *$multiplied;
        asm!($first, $second, sums = in(reg) sums, others = in(reg) sums.wrapping_add(words_of_a_tile),
            row = in(reg) words_of_a_tile / SIDE * size_of::<f32>(), options(nostack),
            out("tmm0") _, out("tmm1") _);
        if $multiplied.below.is_some() {
            asm!($third, $fourth, sums = in(reg) sums.wrapping_add(2 * words_of_a_tile),
                others = in(reg) sums.wrapping_add(3 * words_of_a_tile),
                row = in(reg) words_of_a_tile / SIDE * size_of::<f32>(), options(nostack),
                out("tmm2") _, out("tmm3") _);
        }
    }};
}

impl Multiplied {
    /// # Safety
    /// The sums are valid, and [`configure`] was called.
    #[inline(always)]
    unsafe fn load_sums(&self) {
        // SAFETY: the caller's promise.
        unsafe {
            each_tile_of_sums!(
                self,
                "tileloadd tmm0, [{sums} + {row}]",
                "tileloadd tmm1, [{others} + {row}]",
                "tileloadd tmm2, [{sums} + {row}]",
                "tileloadd tmm3, [{others} + {row}]"
            );
        }
    }

    /// # Safety
    /// The sums are valid, and [`configure`] was called.
    #[inline(always)]
    unsafe fn store_sums(&self) {
        // SAFETY: the caller's promise.
        unsafe {
            each_tile_of_sums!(
                self,
                "tilestored [{sums} + {row}], tmm0",
                "tilestored [{others} + {row}], tmm1",
                "tilestored [{sums} + {row}], tmm2",
                "tilestored [{others} + {row}], tmm3"
            );
        }
    }

    /// Adds products with two decoded tiles, which are number `index` along K.
    ///
    /// # Safety
    /// The activations and the tiles are valid, and [`configure`] was called.
    #[inline(always)]
    unsafe fn add_products(&self, weights: *const DecodedTiles, index: usize) {
        let activations = self.activations.wrapping_add(index * self.words_of_a_tile);
        let row = self.words_of_a_tile / SIDE * size_of::<u32>();
        // SAFETY: the caller's promise.
        unsafe {
            asm!(
                "tileloadd tmm4, [{weights} + {line}]",
                "tileloadd tmm6, [{activations} + {row}]",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tileloadd tmm5, [{weights} + {line} + {tile_bytes}]",
                "tdpbf16ps tmm1, tmm5, tmm6",
                weights = in(reg) weights,
                activations = in(reg) activations,
                row = in(reg) row,
                line = in(reg) LINE_BYTES,
                tile_bytes = const SIDE * LINE_BYTES,
                out("tmm0") _, out("tmm1") _, out("tmm4") _, out("tmm5") _, out("tmm6") _,
                options(nostack, readonly),
            );
            if let Some(below) = self.below {
                asm!(
                    "tileloadd tmm7, [{activations} + {row}]",
                    "tdpbf16ps tmm2, tmm4, tmm7",
                    "tdpbf16ps tmm3, tmm5, tmm7",
                    activations = in(reg) activations.wrapping_add(below),
                    row = in(reg) row,
                    out("tmm2") _, out("tmm3") _, out("tmm7") _,
                    options(nostack, readonly),
                );
            }
        }
    }
}

/// # Safety
/// [`configure`] was called.
#[inline(always)]
unsafe fn zero_sums() {
    // SAFETY: the caller's promise.
    unsafe {
        asm!("tilezero tmm0", "tilezero tmm1", "tilezero tmm2", "tilezero tmm3",
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _, options(nostack, nomem));
    }
}

/// What a part of sixteen columns needs beside its codes, for one column at a time.
#[derive(Clone, Copy, Default)]
#[repr(C, align(64))]
struct Kept {
    /// Scales; of powers of two, what is added to either half of a word.
    scales: [u32; SIDE],
    /// Zeros or minima.
    others: [u32; SIDE],
}

/// The parts of the first and of the second half of a tile, which most often are one.
type Halves = [Kept; 2];

/// Weights of one column.
trait Column: Weights {
    /// # Safety
    /// The processor has the instructions.
    unsafe fn keep(&self, kept: &mut Kept);

    /// Sixteen values times the scale of a column, rounded to bfloat16, twice.
    ///
    /// # Safety
    /// The processor has the instructions; there is such a column.
    unsafe fn table(kept: &Kept, column: usize, values: __m512) -> __m512i;
}

impl Column for Powers {
    #[inline(always)]
    unsafe fn keep(&self, kept: &mut Kept) {
        // SAFETY: the caller's promise.
        unsafe { _mm512_storeu_si512(kept.scales.as_mut_ptr().cast(), self.0) }
    }

    #[inline(always)]
    unsafe fn table(kept: &Kept, column: usize, values: __m512) -> __m512i {
        /// All codes of FP4 but the two zeros.
        const NUMBERS: u32 = 0xfefe_fefe;
        // SAFETY: the caller's promise. The bfloat16 of the values, the compiler makes once.
        unsafe {
            let power = broadcast(kept.scales.get_unchecked(column));
            _mm512_maskz_add_epi16(NUMBERS, rounded(values, values), power)
        }
    }
}

/// A number in all lanes, from memory, which takes none of the units that compute: the compiler would keep sixteen numbers in a
/// register and permute them, which does.
///
/// # Safety
/// The processor has AVX-512.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn broadcast(number: &u32) -> __m512i {
    let lanes: __m512i;
    // SAFETY: the caller's promise.
    unsafe {
        asm!("vpbroadcastd {lanes}, dword ptr [{number}]", lanes = out(zmm_reg) lanes, number = in(reg) number,
            options(pure, readonly, nostack, preserves_flags));
    }
    lanes
}

/// Weights that are numbers times a scale, and more.
trait Linear: Weights {
    /// Numbers, and zeros or minima if there are any.
    ///
    /// # Safety
    /// The processor has the instructions.
    unsafe fn parts(&self) -> (__m512, __m512);

    /// Weights of sixteen values of one column, before they are rounded.
    ///
    /// # Safety
    /// The processor has the instructions.
    unsafe fn of_column(scale: __m512, other: __m512, values: __m512) -> __m512;
}

macro_rules! linear {
    ($weights:ty, $self:ident => $parts:expr, ($scale:ident, $other:ident, $values:ident) => $of:expr) => {
        impl Linear for $weights {
            #[inline(always)]
            unsafe fn parts(&$self) -> (__m512, __m512) {
                // SAFETY: the caller's promise.
                #[allow(unused_unsafe, reason = "some need no instructions")]
                unsafe { $parts }
            }

            #[inline(always)]
            unsafe fn of_column($scale: __m512, $other: __m512, $values: __m512) -> __m512 {
                // SAFETY: the caller's promise.
                unsafe { $of }
            }
        }

        impl Column for $weights {
            #[inline(always)]
            unsafe fn keep(&self, kept: &mut Kept) {
                // SAFETY: the caller's promise; there are sixteen of both.
                unsafe {
                    let (scales, others) = self.parts();
                    _mm512_storeu_ps(kept.scales.as_mut_ptr().cast(), scales);
                    _mm512_storeu_ps(kept.others.as_mut_ptr().cast(), others);
                }
            }

            #[inline(always)]
            unsafe fn table(kept: &Kept, column: usize, values: __m512) -> __m512i {
                // SAFETY: the caller's promise.
                unsafe {
                    let weights = of_column::<Self>(kept, column, values);
                    rounded(weights, weights)
                }
            }
        }
    };
}

linear!(Scaled, self => (self.0, _mm512_setzero_ps()), (scale, _other, values) => _mm512_mul_ps(values, scale));
linear!(ScaledFloats, self => (self.0, _mm512_setzero_ps()), (scale, _other, values) => _mm512_mul_ps(values, scale));
linear!(Zeros, self => (self.scale, self.zero),
    (scale, zero, values) => _mm512_mul_ps(_mm512_sub_ps(values, zero), scale));
linear!(Minima, self => (self.scale, self.minimum),
    (scale, minimum, values) => _mm512_fmsub_ps(values, scale, minimum));

/// Scales of at most eleven bits for bytes in the fraction of 2¹⁵: `byte · scale` is `(2¹⁵ + 128 + byte) · scale − (2¹⁵ + 128) · scale`, and
/// what is taken off has twenty bits, so that one multiply-add gives it exactly.
struct Shifted(Scaled);

impl Weights for Shifted {
    #[inline(always)]
    unsafe fn load(layout: &Layout, header: *const u8, part: usize, octet: usize) -> Self {
        // SAFETY: the caller's promise.
        unsafe { Shifted(Scaled::load(layout, header, part, octet)) }
    }

    #[inline(always)]
    unsafe fn of(&self, even: __m512, odd: __m512) -> __m512i {
        // SAFETY: the caller's promise.
        unsafe { self.0.of(even, odd) }
    }
}

linear!(Shifted, self => (self.0.0, _mm512_mul_ps(self.0.0, _mm512_set1_ps(32768.0 + 128.0))),
    (scale, shift, values) => _mm512_fmsub_ps(values, scale, shift));

/// # Safety
/// The processor has the instructions; there is such a column.
#[inline(always)]
unsafe fn of_column<W: Linear>(kept: &Kept, column: usize, values: __m512) -> __m512 {
    // SAFETY: the caller's promise.
    unsafe {
        let [scale, other] = [&kept.scales, &kept.others]
            .map(|numbers| _mm512_castsi512_ps(broadcast(numbers.get_unchecked(column))));
        W::of_column(scale, other, values)
    }
}

/// The nearest bfloat16, ties to even, of sixteen numbers and sixteen more.
///
/// # Safety
/// The processor has the instructions.
#[inline(always)]
unsafe fn rounded(first: __m512, second: __m512) -> __m512i {
    // SAFETY: the caller's promise; both are 64 bytes that may have any bits.
    unsafe { transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(second, first)) }
}

/// How the codes of a tile become weights.
trait Unit<W> {
    /// # Safety
    /// The processor has the instructions, and a tile of codes can be read.
    unsafe fn decode(&mut self, codes: *const u8, halves: &Halves, decoded: &mut [[u8; LINE_BYTES]; SIDE]);
}

/// Four bits: what they mean.
#[derive(Clone, Copy)]
struct Nibbles(__m512);

impl Nibbles {
    /// # Safety
    /// The processor has the instructions.
    #[inline(always)]
    unsafe fn new(values: &[f32; 16]) -> Self {
        // SAFETY: the caller's promise.
        unsafe { Nibbles(_mm512_loadu_ps(values.as_ptr())) }
    }
}

impl<W: Column> Unit<W> for Nibbles {
    #[inline(always)]
    unsafe fn decode(&mut self, codes: *const u8, halves: &Halves, decoded: &mut [[u8; LINE_BYTES]; SIDE]) {
        // SAFETY: the caller's promise; a lookup takes the lowest five bits, and a table has everything twice.
        unsafe {
            for (four, decoded) in decoded.as_chunks_mut::<4>().0.iter_mut().enumerate() {
                let codes = _mm512_loadu_si512(codes.add(four * LINE_BYTES).cast());
                let shifted = [
                    codes,
                    _mm512_srli_epi16::<4>(codes),
                    _mm512_srli_epi16::<8>(codes),
                    _mm512_srli_epi16::<12>(codes),
                ];
                for (column, (codes, decoded)) in shifted.into_iter().zip(decoded).enumerate() {
                    let table = W::table(&halves[0], 4 * four + column, self.0);
                    let weights = _mm512_permutexvar_epi16(codes, table);
                    _mm512_store_si512(decoded.as_mut_ptr().cast(), weights);
                }
            }
        }
    }
}

/// Bytes.
#[derive(Clone, Copy)]
struct Signed;

impl<W: Linear> Unit<W> for Signed {
    #[inline(always)]
    unsafe fn decode(&mut self, codes: *const u8, halves: &Halves, decoded: &mut [[u8; LINE_BYTES]; SIDE]) {
        // SAFETY: the caller's promise.
        unsafe {
            for (column, decoded) in decoded.iter_mut().enumerate() {
                let half = |half: usize| {
                    let codes = _mm_loadu_si128(codes.add(column * TILE[1] + half * SIDE).cast());
                    let values = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(codes));
                    of_column::<W>(&halves[half], column, values)
                };
                _mm512_store_si512(decoded.as_mut_ptr().cast(), rounded(half(0), half(1)));
            }
        }
    }
}

/// Bytes that become numbers without being converted: 128 more than a byte in the second lowest byte of 2¹⁵ is that much added to it.
#[derive(Clone, Copy)]
struct InFraction {
    /// Which byte of two columns goes to each number: the halves of the first, then those of the second.
    places: [__m512i; 4],
}

impl InFraction {
    /// # Safety
    /// The processor has the instructions.
    #[inline(always)]
    unsafe fn new() -> Self {
        // SAFETY: the caller's promise.
        unsafe {
            let lanes = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
            let places = [0, 1, 2, 3].map(|half| {
                let bytes = _mm512_add_epi32(lanes, _mm512_set1_epi32(16 * half));
                _mm512_slli_epi32::<8>(bytes)
            });
            InFraction { places }
        }
    }
}

/// Sixteen of the bytes at `codes`, each in its number. The compiler would make several instructions of it.
///
/// # Safety
/// The processor has AVX-512 with its instructions for bytes.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vbmi")]
unsafe fn in_fraction(codes: __m512i, places: __m512i) -> __m512 {
    let mut numbers = _mm512_set1_ps(32768.0);
    // SAFETY: the caller's promise.
    unsafe {
        asm!("vpermb {numbers}{{{second}}}, {places}, {codes}", numbers = inout(zmm_reg) numbers,
            places = in(zmm_reg) places, codes = in(zmm_reg) codes, second = in(kreg) 0x2222_2222_2222_2222_u64,
            options(pure, nomem, nostack, preserves_flags));
    }
    numbers
}

impl Unit<Shifted> for InFraction {
    #[inline(always)]
    unsafe fn decode(&mut self, codes: *const u8, halves: &Halves, decoded: &mut [[u8; LINE_BYTES]; SIDE]) {
        // SAFETY: the caller's promise.
        unsafe {
            for (pair, decoded) in decoded.as_chunks_mut::<2>().0.iter_mut().enumerate() {
                let codes = _mm512_loadu_si512(codes.add(pair * LINE_BYTES).cast());
                let codes = _mm512_xor_si512(codes, _mm512_set1_epi8(i8::MIN));
                for (other, decoded) in decoded.iter_mut().enumerate() {
                    let half = |half: usize| {
                        let values = in_fraction(codes, self.places[2 * other + half]);
                        of_column::<Shifted>(&halves[half], 2 * pair + other, values)
                    };
                    _mm512_store_si512(decoded.as_mut_ptr().cast(), rounded(half(0), half(1)));
                }
            }
        }
    }
}

/// FP8 e4m3.
#[derive(Clone, Copy)]
struct Floats {
    /// The scale that `tables` are of.
    scale: u32,
    /// Low bytes, then high bytes, of the weights of all codes without a sign.
    tables: [__m512i; 4],
}

impl Floats {
    /// # Safety
    /// The processor has the instructions.
    #[inline(always)]
    unsafe fn new() -> Self {
        // SAFETY: the caller's promise. No scale is this NaN.
        unsafe { Floats { scale: !0, tables: [_mm512_setzero_si512(); 4] } }
    }

    /// Sixteen codes times the scale they have in `scale`, which lacks a factor of 2⁻¹²⁰.
    ///
    /// # Safety
    /// The processor has the instructions.
    #[inline(always)]
    unsafe fn scaled(codes: __m512i, scale: __m512) -> __m512 {
        // SAFETY: the caller's promise. Sign, exponent and fraction go to their places.
        unsafe {
            let places = _mm512_set1_epi32(0x87f0_0000_u32.cast_signed());
            let values = _mm512_castsi512_ps(_mm512_and_si512(_mm512_slli_epi32::<20>(codes), places));
            _mm512_mul_ps(values, scale)
        }
    }

    /// Makes the tables of a scale.
    ///
    /// # Safety
    /// The processor has the instructions.
    #[inline(always)]
    unsafe fn make_tables(&mut self, scale: u32) {
        // SAFETY: the caller's promise.
        unsafe {
            let factor = _mm512_set1_ps(f32::from_bits(scale));
            let columns = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
            let weights: [__m512i; 4] = std::array::from_fn(|four| {
                let codes = |first: usize| {
                    let codes = _mm512_add_epi32(columns, _mm512_set1_epi32((32 * four + first) as i32));
                    Self::scaled(codes, factor)
                };
                rounded(codes(0), codes(16))
            });
            for (half, pair) in weights.as_chunks::<2>().0.iter().enumerate() {
                let [low, high] = [pair[0], pair[1]].map(|weights| {
                    [_mm512_cvtepi16_epi8(weights), _mm512_cvtepi16_epi8(_mm512_srli_epi16::<8>(weights))]
                });
                for byte in 0..2 {
                    let first = _mm512_castsi256_si512(low[byte]);
                    self.tables[2 * byte + half] = _mm512_inserti64x4::<1>(first, high[byte]);
                }
            }
            self.scale = scale;
        }
    }
}

impl Unit<ScaledFloats> for Floats {
    #[inline(always)]
    unsafe fn decode(&mut self, codes: *const u8, halves: &Halves, decoded: &mut [[u8; LINE_BYTES]; SIDE]) {
        // SAFETY: the caller's promise.
        unsafe {
            let scales = &halves[0].scales;
            let all = _mm512_loadu_si512(scales.as_ptr().cast());
            if _mm512_cmpneq_epi32_mask(all, _mm512_set1_epi32(scales[0].cast_signed())) != 0 {
                for (column, decoded) in decoded.iter_mut().enumerate() {
                    let scale = _mm512_set1_ps(f32::from_bits(scales[column]));
                    let half = |half: usize| {
                        let codes = _mm_loadu_si128(codes.add(column * TILE[1] + half * SIDE).cast());
                        Self::scaled(_mm512_cvtepi8_epi32(codes), scale)
                    };
                    _mm512_store_si512(decoded.as_mut_ptr().cast(), rounded(half(0), half(1)));
                }
                return;
            }
            if scales[0] != self.scale {
                self.make_tables(scales[0]);
            }
            let [low, low_above, high, high_above] = self.tables;
            // Quarters of a column's 32 codes go where bytes are woven from: eight to each of four lanes.
            let order = _mm512_set_epi64(7, 3, 6, 2, 5, 1, 4, 0);
            for (pair, decoded) in decoded.as_chunks_mut::<2>().0.iter_mut().enumerate() {
                let codes = _mm512_loadu_si512(codes.add(pair * LINE_BYTES).cast());
                let codes = _mm512_permutexvar_epi64(order, codes);
                let low = _mm512_permutex2var_epi8(low, codes, low_above);
                let high = _mm512_permutex2var_epi8(high, codes, high_above);
                // The sign of a weight: that of its code, or of the scale, or neither of both.
                let high = _mm512_xor_si512(high, _mm512_and_si512(codes, _mm512_set1_epi8(i8::MIN)));
                let weights = [_mm512_unpacklo_epi8(low, high), _mm512_unpackhi_epi8(low, high)];
                for (weights, decoded) in weights.into_iter().zip(decoded) {
                    _mm512_store_si512(decoded.as_mut_ptr().cast(), weights);
                }
            }
        }
    }
}
