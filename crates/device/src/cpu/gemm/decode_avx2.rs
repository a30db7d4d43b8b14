//! Codes become weights by AVX2: the eight columns of a unit side by side in a vector of float32. They are stored as words for the
//! micro-kernels, or, for a few rows, multiplied where they are.
//!
//! Four bits become bfloat16 by two shuffles of bytes, one for the low and one for the high byte of each value, and two
//! vectors of pairs by weaving the two together. A weight is rounded to bfloat16 by multiplication: `t = v · (2¹⁶ + 1)`, and
//! `t − (t − v)` has the eight bits of `v` that are wanted, rounded as the nearest and ties to even (Veltkamp's splitting; a tie
//! has nine bits, and for those each of the three steps can be followed by hand). It is right as long as neither overflows nor
//! meets numbers below the normal ones, which [`epsmoe_quant::CodedTensor::codes`] sees to.

use super::ElementType;
use super::coded::{CodedTile, Layout, Run, SIDE};
use super::kernel::{BLOCK_STEPS, BLOCK_STRIDE, VECTORS};
use epsmoe_quant::{Code, Format, Scale};
use std::arch::x86_64::*;
use std::marker::PhantomData;
use std::ops::Range;

/// Products of 1, 2, … rows with panels of codes.
pub(super) static FUSED: [unsafe fn(&CodedTile<'_>); 4] =
    [multiply::<1>, multiply::<2>, multiply::<3>, multiply::<4>];

/// Bytes from the codes in use to those that are asked for meanwhile: a processor looks ahead by itself, but not far enough.
const AHEAD: usize = 1024;

/// See [`Layout::decode`].
///
/// # Safety
/// The processor has AVX2, FMA and F16C.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn decode(
    layout: &Layout,
    panel: &[u8],
    k: Range<usize>,
    element: ElementType,
    out: &mut [u32],
) {
    let steps = match element {
        ElementType::F32 => k.len().next_multiple_of(SIDE),
        ElementType::Bf16 => k.len().next_multiple_of(SIDE) / 2,
    };
    assert!(k.start.is_multiple_of(SIDE), "decoding begins in the middle of a unit");
    assert!(out.len() >= steps * layout.width && k.end <= layout.k, "decoding beyond a panel or its words");
    assert!(layout.panel_bytes().is_some_and(|bytes| panel.len() >= bytes), "the panel is not whole");
    let (panel, out) = (panel.as_ptr(), out.as_mut_ptr());
    // SAFETY: the caller's promise; units and words are inside, as was just made sure.
    unsafe {
        match element {
            ElementType::F32 => visit(layout.format, Store::<1> { layout, panel, k, out }),
            ElementType::Bf16 => visit(layout.format, Store::<2> { layout, panel, k, out }),
        }
    }
}

/// `sums = activations · weights` for `ROWS` rows and one or two panels.
///
/// # Safety
/// The pointers of `tile` are valid for the shapes given at its fields, and the processor has AVX2, FMA and F16C.
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn multiply<const ROWS: usize>(tile: &CodedTile<'_>) {
    // SAFETY: the caller's promise.
    unsafe {
        match tile.count {
            1 => visit(tile.layout.format, Multiply::<ROWS, 1>(tile)),
            _ => visit(tile.layout.format, Multiply::<ROWS, 2>(tile)),
        }
    }
}

/// What can be done with codes of any format.
trait Visitor {
    /// Does it.
    ///
    /// # Safety
    /// The processor has the instructions; each visitor has promises of its own.
    unsafe fn visit<U: Unit, W: Weights>(self);
}

/// Lets a visitor meet the values and the weights of a format.
///
/// # Safety
/// That of the visitor.
#[inline(always)]
unsafe fn visit(format: Format, visitor: impl Visitor) {
    let Format { code, scale, zeros, .. } = format;
    // SAFETY: the caller's promise.
    unsafe {
        match (code, scale) {
            (Code::E2M1, _) => visitor.visit::<Nibbles<Floats>, Exact>(),
            (Code::U4, Scale::NestedWithMinima) => visitor.visit::<Nibbles<Whole>, Minima>(),
            (Code::U4, _) if zeros => visitor.visit::<Nibbles<Whole>, Zeros>(),
            (Code::U4, Scale::BF16) => visitor.visit::<Nibbles<Centred>, Short>(),
            (Code::U4, _) => visitor.visit::<Nibbles<Centred>, Scaled>(),
            (Code::I8, Scale::NestedWithMinima) => visitor.visit::<Bytes<Whole>, Minima>(),
            (Code::I8, _) if zeros => visitor.visit::<Bytes<Whole>, Zeros>(),
            (Code::I8, Scale::BF16) => visitor.visit::<Bytes<Whole>, Short>(),
            (Code::I8, _) => visitor.visit::<Bytes<Whole>, Scaled>(),
            (Code::E4M3, _) => visitor.visit::<Bytes<Floats>, ScaledFloats>(),
        }
    }
}

/// Writes words; `EACH` elements along K a word.
struct Store<'a, const EACH: usize> {
    layout: &'a Layout,
    panel: *const u8,
    k: Range<usize>,
    out: *mut u32,
}

impl<const EACH: usize> Visitor for Store<'_, EACH> {
    #[inline(always)]
    unsafe fn visit<U: Unit, W: Weights>(self) {
        let Store { layout, panel, k, out } = self;
        // SAFETY: the caller's promise.
        unsafe {
            let unit_kind = U::new();
            for run in layout.runs(k) {
                let group = Group::of(layout, panel, &run);
                for octet in 0..layout.octets {
                    let weights = W::load(layout, group.header, run.part, octet);
                    for index in 0..run.units.len() {
                        let first = (run.at + index * SIDE) / EACH * layout.width + octet * SIDE;
                        let mut words = Words::<EACH> { out: out.add(first), width: layout.width };
                        unit_kind.decode(group.unit(index, octet), &weights, &mut words);
                    }
                }
            }
        }
    }
}

struct Multiply<'a, const ROWS: usize, const PANELS: usize>(&'a CodedTile<'a>);

impl<const ROWS: usize, const PANELS: usize> Visitor for Multiply<'_, ROWS, PANELS> {
    #[inline(always)]
    unsafe fn visit<U: Unit, W: Weights>(self) {
        let tile = self.0;
        let layout = tile.layout;
        let Format { group, part, .. } = layout.format;
        let (units, units_of_a_part) = (layout.k.div_ceil(SIDE), part / SIDE);
        // SAFETY: the caller's promise. Activations are read where `Blocks` has them: whole units lie in one block, since a
        // block has whole units.
        unsafe {
            let unit_kind = U::new();
            let mut sums = [[[_mm256_setzero_ps(); ROWS]; VECTORS]; PANELS];
            let mut last = [[0; BLOCK_STRIDE]; ROWS];
            let mut headers = tile.panels;
            let mut unit = 0;
            while unit < units {
                let mut codes = headers.map(|header| header.wrapping_add(layout.header_bytes));
                for index in 0..group / part {
                    let weights = [
                        [W::load(layout, headers[0], index, 0), W::load(layout, headers[0], index, 1)],
                        [W::load(layout, headers[1], index, 0), W::load(layout, headers[1], index, 1)],
                    ];
                    for unit in unit..units.min(unit + units_of_a_part) {
                        let k = unit * SIDE;
                        let block = k / BLOCK_STEPS * ROWS * BLOCK_STRIDE + k % BLOCK_STEPS;
                        let mut activations = tile.activations.add(block);
                        if k + SIDE > layout.k {
                            // What follows the last element of a row is not even zero.
                            for (row, last) in last.iter_mut().enumerate() {
                                for (at, last) in last[..layout.k - k].iter_mut().enumerate() {
                                    *last = *activations.add(row * BLOCK_STRIDE + at);
                                }
                            }
                            activations = last.as_ptr().cast();
                        }
                        for ((codes, weights), sums) in codes.iter_mut().zip(&weights).zip(&mut sums) {
                            _mm_prefetch::<_MM_HINT_T0>(codes.wrapping_add(AHEAD).cast());
                            for (weights, sums) in weights.iter().zip(sums) {
                                let mut products = Products::<ROWS> { activations, sums };
                                unit_kind.decode(*codes, weights, &mut products);
                                *codes = codes.wrapping_add(U::BYTES);
                            }
                        }
                    }
                    unit += units_of_a_part;
                }
                headers = headers.map(|header| header.wrapping_add(layout.group_bytes));
            }
            for (panel, sums) in sums.iter().enumerate() {
                for (octet, sums) in sums.iter().enumerate() {
                    for (row, sums) in sums.iter().enumerate() {
                        let at = ((panel * ROWS + row) * VECTORS + octet) * SIDE;
                        _mm256_storeu_ps(tile.sums.add(at), *sums);
                    }
                }
            }
        }
    }
}

/// Where a run's scales and codes are.
struct Group {
    header: *const u8,
    /// The run's first unit.
    units: *const u8,
    octets: usize,
    unit_bytes: usize,
}

impl Group {
    /// # Safety
    /// The run lies in the panel.
    #[inline(always)]
    unsafe fn of(layout: &Layout, panel: *const u8, run: &Run) -> Group {
        let (octets, unit_bytes) = (layout.octets, layout.unit_bytes);
        // SAFETY: the caller's promise.
        unsafe {
            let header = panel.add(run.group * layout.group_bytes);
            let units = header.add(layout.header_bytes + run.units.start * octets * unit_bytes);
            Group { header, units, octets, unit_bytes }
        }
    }

    /// The codes of unit `index` of the run.
    #[inline(always)]
    fn unit(&self, index: usize, octet: usize) -> *const u8 {
        self.units.wrapping_add((index * self.octets + octet) * self.unit_bytes)
    }
}

/// What takes the weights of a unit, which are bfloat16 in float32, two along K at a time.
trait Sink {
    /// Takes elements `2 · step` and the next of eight columns.
    ///
    /// # Safety
    /// The processor has the instructions, and wherever the sink writes or reads is valid.
    unsafe fn take(&mut self, step: usize, even: __m256, odd: __m256);
}

struct Words<const EACH: usize> {
    out: *mut u32,
    width: usize,
}

impl<const EACH: usize> Sink for Words<EACH> {
    #[inline(always)]
    unsafe fn take(&mut self, step: usize, even: __m256, odd: __m256) {
        // SAFETY: the caller's promise.
        unsafe {
            let (even, odd) = (_mm256_castps_si256(even), _mm256_castps_si256(odd));
            if EACH == 2 {
                let pairs = _mm256_or_si256(_mm256_srli_epi32::<16>(even), odd);
                _mm256_storeu_si256(self.out.add(step * self.width).cast(), pairs);
            } else {
                let at = self.out.add(2 * step * self.width);
                _mm256_storeu_si256(at.cast(), even);
                _mm256_storeu_si256(at.add(self.width).cast(), odd);
            }
        }
    }
}

struct Products<'a, const ROWS: usize> {
    activations: *const u32,
    sums: &'a mut [__m256; ROWS],
}

impl<const ROWS: usize> Sink for Products<'_, ROWS> {
    #[inline(always)]
    unsafe fn take(&mut self, step: usize, even: __m256, odd: __m256) {
        // SAFETY: the caller's promise.
        unsafe {
            for (part, weights) in [even, odd].into_iter().enumerate() {
                for (row, sums) in self.sums.iter_mut().enumerate() {
                    let at = self.activations.add(row * BLOCK_STRIDE + 2 * step + part);
                    *sums = _mm256_fmadd_ps(_mm256_broadcast_ss(&*at.cast()), weights, *sums);
                }
            }
        }
    }
}

/// How the codes of a unit become values.
trait Unit {
    /// Bytes of a unit.
    const BYTES: usize;

    /// # Safety
    /// The processor has the instructions.
    unsafe fn new() -> Self;

    /// # Safety
    /// The processor has the instructions, a unit of codes can be read, and `sink` may take its weights.
    unsafe fn decode(&self, codes: *const u8, weights: &impl Weights, sink: &mut impl Sink);
}

/// What codes mean before their scale: signed numbers or those without a sign; four bits less eight; floats.
struct Whole;
struct Centred;
struct Floats;

/// Four bits, by a table.
struct Nibbles<T> {
    /// Low and high bytes of sixteen bfloat16.
    low: __m256i,
    high: __m256i,
    values: PhantomData<T>,
}

impl<T: FourBits> Unit for Nibbles<T> {
    const BYTES: usize = 4 * SIDE;

    #[inline(always)]
    unsafe fn new() -> Self {
        // SAFETY: the caller's promise; a half of the table is sixteen bytes.
        unsafe {
            let half = |bytes: &[u8; 16]| _mm256_broadcastsi128_si256(_mm_loadu_si128(bytes.as_ptr().cast()));
            Nibbles { low: half(&T::TABLE.0), high: half(&T::TABLE.1), values: PhantomData }
        }
    }

    #[inline(always)]
    unsafe fn decode(&self, codes: *const u8, weights: &impl Weights, sink: &mut impl Sink) {
        // SAFETY: the caller's promise; a unit is a vector of 32 bytes.
        unsafe {
            let codes = _mm256_loadu_si256(codes.cast());
            for (half, nibbles) in [codes, _mm256_srli_epi16::<4>(codes)].into_iter().enumerate() {
                let nibbles = _mm256_and_si256(nibbles, _mm256_set1_epi8(15));
                let low = _mm256_shuffle_epi8(self.low, nibbles);
                let high = _mm256_shuffle_epi8(self.high, nibbles);
                let steps = [_mm256_unpacklo_epi8(low, high), _mm256_unpackhi_epi8(low, high)];
                for (step, pairs) in steps.into_iter().enumerate() {
                    let even = _mm256_castsi256_ps(_mm256_slli_epi32::<16>(pairs));
                    let odd = _mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32(!0xffff)));
                    sink.take(2 * half + step, weights.of(even), weights.of(odd));
                }
            }
        }
    }
}

/// Low and high bytes of the values of sixteen codes.
pub(super) struct Table(pub(super) [u8; 16], pub(super) [u8; 16]);

impl Table {
    pub(super) const fn new(values: [f32; 16]) -> Table {
        let mut table = Table([0; 16], [0; 16]);
        let mut code = 0;
        while code < 16 {
            let bits = values[code].to_bits();
            assert!(bits & 0xffff == 0, "not a bfloat16");
            table.0[code] = (bits >> 16) as u8;
            table.1[code] = (bits >> 24) as u8;
            code += 1;
        }
        table
    }
}

trait FourBits {
    const TABLE: &'static Table;
}

impl FourBits for Floats {
    const TABLE: &'static Table = &Table::new(epsmoe_quant::element::E2M1);
}

impl FourBits for Whole {
    const TABLE: &'static Table =
        &Table::new([0., 1., 2., 3., 4., 5., 6., 7., 8., 9., 10., 11., 12., 13., 14., 15.]);
}

impl FourBits for Centred {
    const TABLE: &'static Table =
        &Table::new([-8., -7., -6., -5., -4., -3., -2., -1., 0., 1., 2., 3., 4., 5., 6., 7.]);
}

/// Bytes.
struct Bytes<V>(PhantomData<V>);

impl<V: EightBits> Unit for Bytes<V> {
    const BYTES: usize = SIDE * SIDE;

    #[inline(always)]
    unsafe fn new() -> Self {
        Bytes(PhantomData)
    }

    #[inline(always)]
    unsafe fn decode(&self, codes: *const u8, weights: &impl Weights, sink: &mut impl Sink) {
        // SAFETY: the caller's promise; a unit is eight times eight bytes.
        unsafe {
            for step in 0..SIDE / 2 {
                let even = _mm_loadl_epi64(codes.add(2 * step * SIDE).cast());
                let odd = _mm_loadl_epi64(codes.add((2 * step + 1) * SIDE).cast());
                let even = V::values(_mm256_cvtepi8_epi32(even));
                let odd = V::values(_mm256_cvtepi8_epi32(odd));
                sink.take(step, weights.of(even), weights.of(odd));
            }
        }
    }
}

trait EightBits {
    /// What eight bytes mean, which have been widened as signed numbers.
    ///
    /// # Safety
    /// The processor has the instructions.
    unsafe fn values(codes: __m256i) -> __m256;
}

impl EightBits for Whole {
    #[inline(always)]
    unsafe fn values(codes: __m256i) -> __m256 {
        // SAFETY: the caller's promise.
        unsafe { _mm256_cvtepi32_ps(codes) }
    }
}

/// FP8 e4m3, each times 2⁻¹²⁰: sign, exponent and fraction in their places.
impl EightBits for Floats {
    #[inline(always)]
    unsafe fn values(codes: __m256i) -> __m256 {
        // SAFETY: the caller's promise.
        unsafe {
            let places = _mm256_set1_epi32(0x87f0_0000_u32.cast_signed());
            _mm256_castsi256_ps(_mm256_and_si256(_mm256_slli_epi32::<20>(codes), places))
        }
    }
}

/// What makes weights of values: eight columns.
trait Weights {
    /// Of columns `octet · 8` and on of a panel, in part `part` of the group.
    ///
    /// # Safety
    /// The processor has the instructions; `header` is that of a group.
    unsafe fn load(layout: &Layout, header: *const u8, part: usize, octet: usize) -> Self;

    /// The nearest bfloat16 of each weight.
    ///
    /// # Safety
    /// The processor has the instructions.
    unsafe fn of(&self, values: __m256) -> __m256;
}

/// Powers of two leave values as short as they are.
struct Exact {
    scale: __m256,
}

struct Scaled {
    scale: __m256,
}

/// Whole numbers times a scale of eight bits: the product is exact, and so is the scale times `2¹⁶ + 1`, which has 24.
struct Short {
    scale: __m256,
    above: __m256,
}

/// FP8, whose values lack a factor of 2¹²⁰.
struct ScaledFloats {
    scale: __m256,
}

struct Zeros {
    scale: __m256,
    zero: __m256,
}

struct Minima {
    scale: __m256,
    minimum: __m256,
}

impl Weights for Exact {
    #[inline(always)]
    unsafe fn load(layout: &Layout, header: *const u8, part: usize, octet: usize) -> Self {
        // SAFETY: the caller's promise.
        unsafe { Exact { scale: scale(layout, header, part, octet) } }
    }

    #[inline(always)]
    unsafe fn of(&self, values: __m256) -> __m256 {
        // SAFETY: the caller's promise.
        unsafe { _mm256_mul_ps(values, self.scale) }
    }
}

impl Weights for Scaled {
    #[inline(always)]
    unsafe fn load(layout: &Layout, header: *const u8, part: usize, octet: usize) -> Self {
        // SAFETY: the caller's promise.
        unsafe { Scaled { scale: scale(layout, header, part, octet) } }
    }

    #[inline(always)]
    unsafe fn of(&self, values: __m256) -> __m256 {
        // SAFETY: the caller's promise.
        unsafe { rounded(_mm256_mul_ps(values, self.scale)) }
    }
}

impl Weights for Short {
    #[inline(always)]
    unsafe fn load(layout: &Layout, header: *const u8, part: usize, octet: usize) -> Self {
        // SAFETY: the caller's promise.
        unsafe {
            let scale = scale(layout, header, part, octet);
            Short { scale, above: _mm256_mul_ps(scale, _mm256_set1_ps(SPLIT)) }
        }
    }

    #[inline(always)]
    unsafe fn of(&self, values: __m256) -> __m256 {
        // SAFETY: the caller's promise.
        unsafe {
            let above = _mm256_mul_ps(values, self.above);
            _mm256_sub_ps(above, _mm256_fnmadd_ps(values, self.scale, above))
        }
    }
}

impl Weights for ScaledFloats {
    #[inline(always)]
    unsafe fn load(layout: &Layout, header: *const u8, part: usize, octet: usize) -> Self {
        // SAFETY: the caller's promise.
        unsafe {
            let scale = scale(layout, header, part, octet);
            ScaledFloats { scale: _mm256_mul_ps(scale, _mm256_set1_ps(2f32.powi(120))) }
        }
    }

    #[inline(always)]
    unsafe fn of(&self, values: __m256) -> __m256 {
        // SAFETY: the caller's promise.
        unsafe { rounded(_mm256_mul_ps(values, self.scale)) }
    }
}

impl Weights for Zeros {
    #[inline(always)]
    unsafe fn load(layout: &Layout, header: *const u8, part: usize, octet: usize) -> Self {
        let last = layout.header_bytes - layout.width;
        // SAFETY: the caller's promise; records end in a zero.
        unsafe {
            let zeros = _mm_loadl_epi64(header.add(last + octet * SIDE).cast());
            let zero = _mm256_cvtepi32_ps(match layout.format.code {
                Code::U4 => _mm256_cvtepu8_epi32(zeros),
                _ => _mm256_cvtepi8_epi32(zeros),
            });
            Zeros { scale: scale(layout, header, part, octet), zero }
        }
    }

    #[inline(always)]
    unsafe fn of(&self, values: __m256) -> __m256 {
        // SAFETY: the caller's promise.
        unsafe { rounded(_mm256_mul_ps(_mm256_sub_ps(values, self.zero), self.scale)) }
    }
}

impl Weights for Minima {
    #[inline(always)]
    unsafe fn load(layout: &Layout, header: *const u8, part: usize, octet: usize) -> Self {
        let parts = layout.format.group / layout.format.part;
        // SAFETY: the caller's promise.
        unsafe {
            let product = |half: usize, byte: usize| {
                let bytes = _mm_loadl_epi64(header.add(byte * layout.width + octet * SIDE).cast());
                let numbers = _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(bytes));
                _mm256_mul_ps(halves(header.add(half * layout.width), octet), numbers)
            };
            Minima { scale: product(0, 4 + part), minimum: product(2, 4 + parts + part) }
        }
    }

    #[inline(always)]
    unsafe fn of(&self, values: __m256) -> __m256 {
        // The product has at most 24 bits, so that fusing it with the difference changes nothing.
        // SAFETY: the caller's promise.
        unsafe { rounded(_mm256_fmsub_ps(values, self.scale, self.minimum)) }
    }
}

/// What splits a float32 after eight bits.
const SPLIT: f32 = 65537.0;

/// Rounds to bfloat16.
///
/// # Safety
/// The processor has the instructions.
#[inline(always)]
unsafe fn rounded(values: __m256) -> __m256 {
    // SAFETY: the caller's promise.
    unsafe {
        let above = _mm256_mul_ps(values, _mm256_set1_ps(SPLIT));
        _mm256_sub_ps(above, _mm256_sub_ps(above, values))
    }
}

/// Eight half-precision numbers of a field.
///
/// # Safety
/// The processor has the instructions; the field can be read.
#[inline(always)]
unsafe fn halves(field: *const u8, octet: usize) -> __m256 {
    // SAFETY: the caller's promise.
    unsafe { _mm256_cvtph_ps(_mm_loadu_si128(field.add(octet * SIDE * 2).cast())) }
}

/// Scales of eight columns.
///
/// # Safety
/// Like [`Weights::load`].
#[inline(always)]
unsafe fn scale(layout: &Layout, header: *const u8, part: usize, octet: usize) -> __m256 {
    let first = octet * SIDE;
    // SAFETY: the caller's promise; numbers lie field by field.
    unsafe {
        match layout.format.scale {
            Scale::E8M0 => {
                let powers = _mm256_cvtepu8_epi32(_mm_loadl_epi64(header.add(first).cast()));
                _mm256_castsi256_ps(_mm256_slli_epi32::<23>(powers))
            }
            Scale::F16 => halves(header, octet),
            Scale::BF16 => {
                let words = _mm256_cvtepu16_epi32(_mm_loadu_si128(header.add(2 * first).cast()));
                _mm256_castsi256_ps(_mm256_slli_epi32::<16>(words))
            }
            Scale::F32 => _mm256_loadu_ps(header.add(4 * first).cast()),
            Scale::Nested | Scale::NestedWithMinima => {
                let bytes = _mm_loadl_epi64(header.add((2 + part) * layout.width + first).cast());
                let factors = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes));
                _mm256_mul_ps(halves(header, octet), factors)
            }
        }
    }
}
