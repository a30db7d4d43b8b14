//! Products of rows in int8 with weights whose codes are integers.
//!
//! A row is cut into blocks of 32 along K, each with a scale of its own: its largest magnitude over 127 in float32. An element
//! becomes the nearest integer to itself over the scale, ties to even. A block's products with a column are added up as integers,
//! which is exact, and the sums are put together in float32, the blocks upwards; a block of which each half has a scale of its own
//! counts as two. With s the scale of the row, w and m scale and minimum of the column:
//!
//! ```text
//! acc = fma(s · w, Σ (code − zero) · q, acc)        acc = fma(−m, s · Σ q, acc) where there are minima
//! ```
//!
//! Of FP4 the integers are twice what codes mean, and w half the scale. All of this are IEEE operations and integers, so bits are the
//! same for one row and for thousands, and for all instruction sets.
//!
//! Packed rows have a record of a cache line for each block: 32 integers, the scale, and what is made of sums of integers alone. Some
//! processors multiply only codes without a sign; what was added to a code for that is taken off through these sums.

use super::coded::{CodedProducts, CodedTile, Layout};
use super::kernel::{Prefetch, VECTORS};
use super::{ElementType, Isa};
use crate::threaded::LINE_BYTES;
use epsmoe_quant::{Code, Format, Scale};

/// Elements of a row that have one scale.
pub(super) const BLOCK: usize = 32;

/// Words of a record.
const WORDS: usize = 16;

/// Where in a record the scale is.
const SCALE: usize = 8;

/// Where sums begin at: what was added to each code, times less the sum of integers; of the block, then of its halves.
const STARTS: usize = 9;

/// Scale times sum of integers, in float32; of the block, then of its halves.
const SUMS: usize = 12;

/// What is added to twice the number of an FP4 code for it to have no sign.
const FP4_BIAS: i32 = 12;

/// Twice the numbers of FP4 codes, and [`FP4_BIAS`].
pub(super) const FP4_CODES: [u8; 16] = {
    const TWICE: [i32; 8] = [0, 1, 2, 3, 4, 6, 8, 12];
    let mut table = [0; 16];
    let mut code = 0;
    while code < 8 {
        table[code] = (FP4_BIAS + TWICE[code]) as u8;
        table[code + 8] = (FP4_BIAS - TWICE[code]) as u8;
        code += 1;
    }
    table
};

/// Streams in which what follows is brought into L2.
const STREAMS: usize = 4;

/// Rows for which reading weights is what counts.
const FEW_ROWS: usize = 8;

/// Whether rows become int8 for weights in this format.
pub(in crate::cpu) fn multiplies(format: &Format) -> bool {
    let &Format { code, group, part, .. } = format;
    let halves = code.bits() == 8 && part == BLOCK / 2 && group.is_multiple_of(BLOCK);
    code != Code::E4M3 && (part.is_multiple_of(BLOCK) || halves)
}

/// The kernels for `isa`.
pub(super) fn products(isa: Isa) -> CodedProducts {
    #[cfg(target_arch = "x86_64")]
    match isa {
        Isa::Scalar => PORTABLE,
        Isa::Avx2 => super::int8_avx2::PRODUCTS,
        Isa::Avx512 | Isa::Amx => super::int8_avx512::products(),
    }
    #[cfg(not(target_arch = "x86_64"))]
    PORTABLE
}

/// Vectors of one instruction set, a lane for each column.
///
/// # Safety
/// Implementations may use instructions beyond the target's baseline: every method may be called only where the processor
/// supports them, and inlined into a function that enables them. Where one reads, as many numbers can be read as there are lanes,
/// and of units of codes the whole.
pub(super) unsafe trait Lanes {
    const LANES: usize;

    /// Rows that are multiplied with weights at hand, at most.
    const MOST_ROWS: usize;

    /// What [`Self::bytes`] adds to each code.
    const BYTES_BIAS: i32;

    type Floats: Copy;
    type Ints: Copy;
    /// Four codes of each column.
    type Quads: Copy;

    unsafe fn all(number: f32) -> Self::Floats;
    unsafe fn all_ints(number: i32) -> Self::Ints;
    unsafe fn store(to: *mut f32, numbers: Self::Floats);
    unsafe fn floats(from: *const u8) -> Self::Floats;
    unsafe fn halves(from: *const u8) -> Self::Floats;
    /// bfloat16.
    unsafe fn brains(from: *const u8) -> Self::Floats;
    /// Exponents of powers of two.
    unsafe fn powers(from: *const u8) -> Self::Floats;
    unsafe fn signed(from: *const u8) -> Self::Ints;
    unsafe fn unsigned(from: *const u8) -> Self::Ints;
    unsafe fn to_floats(numbers: Self::Ints) -> Self::Floats;
    unsafe fn times(a: Self::Floats, b: Self::Floats) -> Self::Floats;
    /// `a · b + c`, rounded once.
    unsafe fn times_plus(a: Self::Floats, b: Self::Floats, c: Self::Floats) -> Self::Floats;
    /// `c − a · b`, rounded once.
    unsafe fn minus_times(a: Self::Floats, b: Self::Floats, c: Self::Floats) -> Self::Floats;
    unsafe fn add_ints(a: Self::Ints, b: Self::Ints) -> Self::Ints;
    unsafe fn times_ints(a: Self::Ints, b: Self::Ints) -> Self::Ints;

    /// A unit of four bits: its first four codes of each column, and the others.
    unsafe fn nibbles(from: *const u8) -> [Self::Quads; 2];
    /// Twice the numbers of FP4 codes, and [`FP4_BIAS`].
    unsafe fn fp4(codes: Self::Quads) -> Self::Quads;
    /// Bytes with [`Self::BYTES_BIAS`].
    unsafe fn bytes(from: *const u8) -> Self::Quads;
    /// Adds products of sixteen elements of a row with codes from 0 to 24.
    unsafe fn add_small(sums: Self::Ints, codes: [Self::Quads; 4], row: *const u32) -> Self::Ints;
    /// The same with codes of [`Self::bytes`].
    unsafe fn add_bytes(sums: Self::Ints, codes: [Self::Quads; 4], row: *const u32) -> Self::Ints;
}

/// What codes are.
trait Coding {
    /// Sixteen along K: two units, the second `apart` bytes behind the first.
    ///
    /// # Safety
    /// That of [`Lanes`].
    unsafe fn codes<L: Lanes>(units: *const u8, apart: usize) -> [L::Quads; 4];

    /// Adds their products with a row's.
    ///
    /// # Safety
    /// That of [`Lanes`]; four words of the row can be read.
    #[inline(always)]
    unsafe fn add<L: Lanes>(sums: L::Ints, codes: [L::Quads; 4], row: *const u32) -> L::Ints {
        // SAFETY: the caller's promise.
        unsafe { L::add_small(sums, codes, row) }
    }
}

struct Nibbles;
struct Fp4;
struct Bytes;

impl Coding for Nibbles {
    #[inline(always)]
    unsafe fn codes<L: Lanes>(units: *const u8, apart: usize) -> [L::Quads; 4] {
        // SAFETY: the caller's promise.
        unsafe {
            let ([a, b], [c, d]) = (L::nibbles(units), L::nibbles(units.add(apart)));
            [a, b, c, d]
        }
    }
}

impl Coding for Fp4 {
    #[inline(always)]
    unsafe fn codes<L: Lanes>(units: *const u8, apart: usize) -> [L::Quads; 4] {
        // SAFETY: the caller's promise.
        unsafe { Nibbles::codes::<L>(units, apart).map(|codes| L::fp4(codes)) }
    }
}

impl Coding for Bytes {
    #[inline(always)]
    unsafe fn codes<L: Lanes>(units: *const u8, apart: usize) -> [L::Quads; 4] {
        // SAFETY: the caller's promise.
        unsafe { [0, 4 * L::LANES, apart, apart + 4 * L::LANES].map(|at| L::bytes(units.add(at))) }
    }

    #[inline(always)]
    unsafe fn add<L: Lanes>(sums: L::Ints, codes: [L::Quads; 4], row: *const u32) -> L::Ints {
        // SAFETY: the caller's promise.
        unsafe { L::add_bytes(sums, codes, row) }
    }
}

/// Rows of `left` that are multiplied at once: a power of two.
fn at_once<L: Lanes>(left: usize) -> usize {
    1 << left.min(L::MOST_ROWS).ilog2()
}

fn blocks(layout: &Layout) -> usize {
    layout.k.div_ceil(BLOCK)
}

/// See [`CodedProducts`].
pub(super) fn words(layout: &Layout, rows: usize) -> usize {
    rows * blocks(layout) * WORDS
}

/// Panels that are multiplied one after the other.
pub(super) fn panels(rows: usize) -> usize {
    if rows <= FEW_ROWS { 8 } else { 1 }
}

/// See [`CodedProducts`]: some rows that are multiplied at once, block by block, in each record by record; then the next.
#[inline(always)]
pub(super) fn pack<L: Lanes>(layout: &Layout, element: ElementType, rows: &[&[u8]], words: &mut [u32]) {
    let Format { code, scale, zeros, .. } = layout.format;
    let bias = match code {
        // Zeros are counted with it, column by column.
        _ if zeros => 1,
        Code::U4 if scale == Scale::NestedWithMinima => 0,
        Code::U4 => 8,
        Code::E2M1 => FP4_BIAS,
        Code::I8 | Code::E4M3 => L::BYTES_BIAS,
    };
    let mut first = 0;
    while first < rows.len() {
        let count = at_once::<L>(rows.len() - first);
        let own = &mut words[first * blocks(layout) * WORDS..][..count * blocks(layout) * WORDS];
        for (row, bytes) in rows[first..][..count].iter().enumerate() {
            let records = own.as_chunks_mut::<WORDS>().0.iter_mut().skip(row).step_by(count);
            match element {
                ElementType::F32 => {
                    let number = |bytes: [u8; 4]| f32::from_le_bytes(bytes);
                    records
                        .zip(bytes.chunks(4 * BLOCK))
                        .for_each(|(to, from)| code_block(from, number, bias, to));
                }
                ElementType::Bf16 => {
                    let number = |bytes: [u8; 2]| f32::from_bits(u32::from(u16::from_le_bytes(bytes)) << 16);
                    records
                        .zip(bytes.chunks(2 * BLOCK))
                        .for_each(|(to, from)| code_block(from, number, bias, to));
                }
            }
        }
        first += count;
    }
}

/// Makes the record of a block, which may be the last and shorter.
#[inline(always)]
fn code_block<const BYTES: usize>(
    from: &[u8],
    number: impl Fn([u8; BYTES]) -> f32,
    bias: i32,
    record: &mut [u32; WORDS],
) {
    let mut x = [0.0; BLOCK];
    match <&[[u8; BYTES]; BLOCK]>::try_from(from.as_chunks::<BYTES>().0) {
        Ok(from) => x = from.map(number),
        Err(_) => x.iter_mut().zip(from.as_chunks().0).for_each(|(x, from)| *x = number(*from)),
    }
    // Magnitudes are ordered like their bits, infinity above all numbers and NaN above infinity.
    let largest = x.map(|x| x.to_bits() & !(1 << 31)).into_iter().fold(0, u32::max);
    let scale = f32::from_bits(largest) / 127.0;
    *record = [0; WORDS];
    if !scale.is_normal() {
        // Nothing; or what is no number, and makes the row none.
        record[SCALE] = if largest < f32::INFINITY.to_bits() { 0 } else { f32::NAN.to_bits() };
        (0..3).for_each(|sum| record[SUMS + sum] = record[SCALE]);
        return;
    }
    // Beside it a number as small as these has the nearest integer in its last bits.
    let integers = x.map(|x| (x / scale + 12_582_912.0).to_bits() as i8);
    bytemuck::cast_slice_mut(&mut record[..SCALE]).copy_from_slice(&integers);
    let (first, second) = integers.split_at(BLOCK / 2);
    let [first, second] = [first, second].map(|half| half.iter().map(|&q| i32::from(q)).sum::<i32>());
    record[SCALE] = scale.to_bits();
    for (index, sum) in [first + second, first, second].into_iter().enumerate() {
        record[STARTS + index] = (-bias * sum).cast_unsigned();
        record[SUMS + index] = (scale * sum as f32).to_bits();
    }
}

/// See [`CodedProducts`].
///
/// # Safety
/// The pointers of `tile` are valid for the shapes given at its fields, rows were packed by [`pack`], and [`Lanes`] are those of the processor
/// and of the layout.
#[inline(always)]
pub(super) unsafe fn multiply<L: Lanes>(tile: &CodedTile<'_>) {
    let Format { code, part, group, .. } = tile.layout.format;
    // SAFETY: the caller's promise.
    unsafe {
        match code {
            Code::U4 => walk::<L, Nibbles, 1>(tile),
            Code::E2M1 => walk::<L, Fp4, 1>(tile),
            Code::I8 if part < BLOCK && part < group => walk::<L, Bytes, 2>(tile),
            Code::I8 => walk::<L, Bytes, 1>(tile),
            Code::E4M3 => unreachable!("no integers"),
        }
    }
}

/// Multiplies all rows with panels that lie one after the other; `PARTS` of a block have scales of their own.
///
/// # Safety
/// Like [`multiply`].
#[inline(always)]
unsafe fn walk<L: Lanes, C: Coding, const PARTS: usize>(tile: &CodedTile<'_>) {
    let layout = tile.layout;
    let panel_bytes = layout.format.groups(layout.k) * layout.group_bytes;
    for index in 0..tile.count {
        let panel = tile.panels[0].wrapping_add(index * panel_bytes);
        let following =
            if index + 1 == tile.count { tile.following } else { panel.wrapping_add(panel_bytes) };
        let mut ahead = Some(Prefetch::new(following, panel_bytes, blocks(layout)));
        let mut first = 0;
        while first < tile.rows {
            let count = at_once::<L>(tile.rows - first);
            let panel = Panel {
                layout,
                panel,
                activations: tile.activations.wrapping_add(first * blocks(layout) * WORDS),
                sums: tile.sums.wrapping_add((index * tile.rows + first) * layout.width),
                ahead: ahead.take(),
            };
            // SAFETY: the caller's promise.
            unsafe {
                match count {
                    1 => panel.multiply::<L, C, PARTS, 1>(),
                    2 => panel.multiply::<L, C, PARTS, 2>(),
                    4 => panel.multiply::<L, C, PARTS, 4>(),
                    _ => panel.multiply::<L, C, PARTS, 8>(),
                }
            }
            first += count;
        }
    }
}

/// A panel and some rows that are multiplied with it at once.
struct Panel<'a> {
    layout: &'a Layout,
    panel: *const u8,
    activations: *const u32,
    sums: *mut f32,
    /// What to bring into L2 meanwhile, block by block.
    ahead: Option<Prefetch>,
}

impl Panel<'_> {
    /// # Safety
    /// Like [`multiply`].
    #[inline(always)]
    unsafe fn multiply<L: Lanes, C: Coding, const PARTS: usize, const ROWS: usize>(mut self) {
        let layout = self.layout;
        let Format { group, part, scale, zeros, .. } = layout.format;
        let (blocks_of_a_group, blocks_of_a_part) = (group.div_ceil(BLOCK), part.div_ceil(BLOCK));
        let (apart, part_units) = (VECTORS * layout.unit_bytes, BLOCK / PARTS / layout.unit[1]);
        let (mut header, mut codes, mut records) = (self.panel, self.panel, self.activations);
        let (mut of_group, mut of_part, mut part) = (0, 0, 0);
        // SAFETY: the caller's promise. Blocks beyond the end of a row that begin a group are not there, and of its last group as
        // many as there are blocks of the row.
        unsafe {
            let mut sums = [[L::all(0.0); VECTORS]; ROWS];
            for _ in 0..blocks(layout) {
                if of_group == 0 {
                    (header, part, of_part) = (codes, 0, 0);
                    codes = codes.add(layout.header_bytes);
                }
                self.look_ahead();
                for own in 0..PARTS {
                    // Sums of the block, or of this half.
                    let place = if PARTS == 1 { 0 } else { 1 + own };
                    for vector in 0..VECTORS {
                        let scales = Scales::<L>::load(layout, header, part + own, vector * L::LANES);
                        let units = codes.add((own * part_units * VECTORS + vector) * layout.unit_bytes);
                        let mut added: [L::Ints; ROWS] = std::array::from_fn(|row| {
                            let start =
                                L::all_ints((*records.add(row * WORDS + STARTS + place)).cast_signed());
                            if zeros { L::times_ints(scales.zero, start) } else { start }
                        });
                        for sixteen in 0..2 / PARTS {
                            let codes = C::codes::<L>(units.add(2 * sixteen * apart), apart);
                            for (row, added) in added.iter_mut().enumerate() {
                                let row = records.add(row * WORDS + 4 * (own + sixteen));
                                *added = C::add::<L>(*added, codes, row);
                            }
                        }
                        for (row, (added, sums)) in added.into_iter().zip(&mut sums).enumerate() {
                            let number = |at: usize| L::all(f32::from_bits(*records.add(row * WORDS + at)));
                            let (sum, factor) = (&mut sums[vector], L::times(number(SCALE), scales.scale));
                            *sum = L::times_plus(factor, L::to_floats(added), *sum);
                            if scale == Scale::NestedWithMinima {
                                *sum = L::minus_times(scales.minimum, number(SUMS + place), *sum);
                            }
                        }
                    }
                }
                codes = codes.add(BLOCK / layout.unit[1] * apart);
                records = records.add(ROWS * WORDS);
                of_part += 1;
                if of_part == blocks_of_a_part {
                    (of_part, part) = (0, part + PARTS);
                }
                of_group = if of_group + 1 == blocks_of_a_group { 0 } else { of_group + 1 };
            }
            for (row, sums) in sums.iter().enumerate() {
                for (vector, sums) in sums.iter().enumerate() {
                    L::store(self.sums.add(row * layout.width + vector * L::LANES), *sums);
                }
            }
        }
    }

    /// Asks for what follows, as much of it as a block's share.
    #[inline(always)]
    fn look_ahead(&mut self) {
        let Some(Prefetch { start, apart, stride }) = &mut self.ahead else { return };
        for line in 0..stride.div_ceil(LINE_BYTES) {
            for stream in 0..STREAMS {
                crate::cpu::prefetch(start.wrapping_add(stream * *apart + line * LINE_BYTES));
            }
        }
        *start = start.wrapping_add(*stride);
    }
}

/// What makes weights of the codes of some columns.
struct Scales<L: Lanes> {
    scale: L::Floats,
    /// With what was added to codes.
    zero: L::Ints,
    minimum: L::Floats,
}

impl<L: Lanes> Scales<L> {
    /// Of columns `first` and on of a panel, in part `part` of the group that begins at `header`.
    ///
    /// # Safety
    /// That of [`Lanes`].
    #[inline(always)]
    unsafe fn load(layout: &Layout, header: *const u8, part: usize, first: usize) -> Self {
        let Format { code, scale, group, part: length, zeros } = layout.format;
        let field = |byte: usize, bytes: usize| header.wrapping_add(byte * layout.width + first * bytes);
        // SAFETY: the caller's promise; numbers lie field by field.
        unsafe {
            let (mut zero, mut minimum) = (L::all_ints(0), L::all(0.0));
            let scale = match scale {
                Scale::E8M0 => L::powers(field(0, 1)),
                Scale::F16 => L::halves(field(0, 2)),
                Scale::BF16 => L::brains(field(0, 2)),
                Scale::F32 => L::floats(field(0, 4)),
                Scale::Nested => {
                    L::times(L::halves(field(0, 2)), L::to_floats(L::signed(field(2 + part, 1))))
                }
                Scale::NestedWithMinima => {
                    let product = |half: usize, byte: usize| {
                        L::times(L::halves(field(half, 2)), L::to_floats(L::unsigned(field(byte, 1))))
                    };
                    minimum = product(2, 4 + group / length + part);
                    product(0, 4 + part)
                }
            };
            if zeros {
                let last = field(layout.format.record_bytes() - 1, 1);
                zero = match code {
                    Code::U4 => L::unsigned(last),
                    _ => L::add_ints(L::signed(last), L::all_ints(L::BYTES_BIAS)),
                };
            }
            let scale = if code == Code::E2M1 { L::times(scale, L::all(0.5)) } else { scale };
            Scales { scale, zero, minimum }
        }
    }
}

/// `CodedProducts` by some [`Lanes`], compiled with the given target features.
macro_rules! coded_products {
    ($name:ident, $lanes:ty, $($feature:literal)?) => {
        pub(in crate::cpu::gemm) const $name: $crate::cpu::gemm::coded::CodedProducts = {
            use $crate::cpu::gemm::{ElementType, coded::{CodedProducts, CodedTile, Layout}, int8};

            $(#[target_feature(enable = $feature)])?
            unsafe fn pack(layout: &Layout, element: ElementType, rows: &[&[u8]], words: &mut [u32]) {
                int8::pack::<$lanes>(layout, element, rows, words);
            }
            $(#[target_feature(enable = $feature)])?
            unsafe fn multiply(tile: &CodedTile<'_>) {
                // SAFETY: the caller's promise.
                unsafe { int8::multiply::<$lanes>(tile) }
            }
            CodedProducts { words: int8::words, pack, decoded_words: 0, panels: int8::panels, multiply }
        };
    };
}
pub(super) use coded_products;

coded_products!(PORTABLE, Portable,);

/// Plain Rust, four columns at a time.
struct Portable;

// SAFETY: uses no special instructions.
unsafe impl Lanes for Portable {
    const LANES: usize = 4;
    const MOST_ROWS: usize = 1;
    const BYTES_BIAS: i32 = 0;
    type Floats = [f32; 4];
    type Ints = [i32; 4];
    type Quads = [[i8; 4]; 4];

    #[inline(always)]
    unsafe fn all(number: f32) -> [f32; 4] {
        [number; 4]
    }

    #[inline(always)]
    unsafe fn all_ints(number: i32) -> [i32; 4] {
        [number; 4]
    }

    #[inline(always)]
    unsafe fn store(to: *mut f32, numbers: [f32; 4]) {
        // SAFETY: the caller's promise, as for the reads below; an array needs no more alignment than its elements.
        unsafe { *to.cast() = numbers }
    }

    #[inline(always)]
    unsafe fn floats(from: *const u8) -> [f32; 4] {
        // SAFETY: see `store`.
        unsafe { *from.cast::<[[u8; 4]; 4]>() }.map(f32::from_le_bytes)
    }

    #[inline(always)]
    unsafe fn halves(from: *const u8) -> [f32; 4] {
        // SAFETY: see `store`.
        unsafe { *from.cast::<[[u8; 2]; 4]>() }.map(|half| half::f16::from_le_bytes(half).to_f32())
    }

    #[inline(always)]
    unsafe fn brains(from: *const u8) -> [f32; 4] {
        // SAFETY: see `store`.
        unsafe { *from.cast::<[[u8; 2]; 4]>() }.map(|half| half::bf16::from_le_bytes(half).to_f32())
    }

    #[inline(always)]
    unsafe fn powers(from: *const u8) -> [f32; 4] {
        // SAFETY: see `store`.
        unsafe { *from.cast::<[u8; 4]>() }.map(|power| f32::from_bits(u32::from(power) << 23))
    }

    #[inline(always)]
    unsafe fn signed(from: *const u8) -> [i32; 4] {
        // SAFETY: see `store`.
        unsafe { *from.cast::<[i8; 4]>() }.map(i32::from)
    }

    #[inline(always)]
    unsafe fn unsigned(from: *const u8) -> [i32; 4] {
        // SAFETY: see `store`.
        unsafe { *from.cast::<[u8; 4]>() }.map(i32::from)
    }

    #[inline(always)]
    unsafe fn to_floats(numbers: [i32; 4]) -> [f32; 4] {
        numbers.map(|number| number as f32)
    }

    #[inline(always)]
    unsafe fn times(a: [f32; 4], b: [f32; 4]) -> [f32; 4] {
        std::array::from_fn(|lane| a[lane] * b[lane])
    }

    #[inline(always)]
    unsafe fn times_plus(a: [f32; 4], b: [f32; 4], c: [f32; 4]) -> [f32; 4] {
        std::array::from_fn(|lane| a[lane].mul_add(b[lane], c[lane]))
    }

    #[inline(always)]
    unsafe fn minus_times(a: [f32; 4], b: [f32; 4], c: [f32; 4]) -> [f32; 4] {
        std::array::from_fn(|lane| (-a[lane]).mul_add(b[lane], c[lane]))
    }

    #[inline(always)]
    unsafe fn add_ints(a: [i32; 4], b: [i32; 4]) -> [i32; 4] {
        std::array::from_fn(|lane| a[lane] + b[lane])
    }

    #[inline(always)]
    unsafe fn times_ints(a: [i32; 4], b: [i32; 4]) -> [i32; 4] {
        std::array::from_fn(|lane| a[lane] * b[lane])
    }

    #[inline(always)]
    unsafe fn nibbles(from: *const u8) -> [[[i8; 4]; 4]; 2] {
        // SAFETY: see `store`.
        let bytes = unsafe { *from.cast::<[[u8; 4]; 4]>() };
        [0, 4].map(|shift| bytes.map(|quad| quad.map(|byte| (byte >> shift & 15) as i8)))
    }

    #[inline(always)]
    unsafe fn fp4(codes: [[i8; 4]; 4]) -> [[i8; 4]; 4] {
        codes.map(|quad| quad.map(|code| FP4_CODES[code as usize] as i8))
    }

    #[inline(always)]
    unsafe fn bytes(from: *const u8) -> [[i8; 4]; 4] {
        // SAFETY: see `store`.
        unsafe { *from.cast() }
    }

    #[inline(always)]
    unsafe fn add_small(sums: [i32; 4], codes: [[[i8; 4]; 4]; 4], row: *const u32) -> [i32; 4] {
        // SAFETY: the caller's promise, four words.
        let row: [[i8; 4]; 4] = unsafe { *row.cast() };
        std::array::from_fn(|column| {
            let pairs = codes.iter().zip(row).flat_map(|(codes, row)| codes[column].into_iter().zip(row));
            sums[column] + pairs.map(|(code, q)| i32::from(code) * i32::from(q)).sum::<i32>()
        })
    }

    #[inline(always)]
    unsafe fn add_bytes(sums: [i32; 4], codes: [[[i8; 4]; 4]; 4], row: *const u32) -> [i32; 4] {
        // SAFETY: the caller's promise.
        unsafe { Self::add_small(sums, codes, row) }
    }
}
