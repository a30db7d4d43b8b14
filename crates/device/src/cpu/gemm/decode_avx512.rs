//! Codes become words of two bfloat16 by AVX-512: sixteen columns of a panel side by side, two elements along K in each word.
//!
//! What [`super::decode_avx2`] does for eight columns in float32, with two instructions that it has not: one rounds two vectors
//! of weights to bfloat16, and additions under a mask scale FP4 by powers of two where it stands, in the exponents of all numbers
//! that are not zero. The words are the same.

use super::coded::{Layout, SIDE};
use super::decode_avx2;
use super::{ElementType, decode_avx2::Table};
use epsmoe_quant::{Code, Format, Scale};
use std::arch::x86_64::*;
use std::mem::transmute;
use std::ops::Range;

/// Columns at a time: two units.
const COLUMNS: usize = 2 * SIDE;

/// See [`Layout::decode`].
///
/// # Safety
/// The processor has AVX-512 F, BW, VL, DQ and BF16, and what [`decode_avx2::decode`] needs.
pub(super) unsafe fn decode(
    layout: &Layout,
    panel: &[u8],
    k: Range<usize>,
    element: ElementType,
    out: &mut [u32],
) {
    if element != ElementType::Bf16 || !layout.width.is_multiple_of(COLUMNS) {
        // SAFETY: the caller's promise.
        return unsafe { decode_avx2::decode(layout, panel, k, element, out) };
    }
    let steps = k.len().next_multiple_of(SIDE) / 2;
    assert!(k.start.is_multiple_of(SIDE), "decoding begins in the middle of a unit");
    assert!(out.len() >= steps * layout.width && k.end <= layout.k, "decoding beyond a panel or its words");
    assert!(layout.panel_bytes().is_some_and(|bytes| panel.len() >= bytes), "the panel is not whole");
    // SAFETY: the caller's promise; units and words are inside, as was just made sure.
    unsafe { decode_words(layout, panel.as_ptr(), k, out.as_mut_ptr()) }
}

/// # Safety
/// The processor has the instructions, `k` lies in the panel and `out` has room for its words.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,f16c")]
unsafe fn decode_words(layout: &Layout, panel: *const u8, k: Range<usize>, out: *mut u32) {
    let Format { code, scale, zeros, .. } = layout.format;
    // SAFETY: the caller's promise.
    unsafe {
        let nibbles = |values: &[f32; 16]| Nibbles::new(&Table::new(*values));
        let whole: [f32; 16] = std::array::from_fn(|code| code as f32);
        let centred = whole.map(|value| value - 8.0);
        match (code, scale) {
            (Code::E2M1, _) => {
                store::<_, Powers>(nibbles(&epsmoe_quant::element::E2M1), layout, panel, k, out)
            }
            (Code::U4, Scale::NestedWithMinima) => store::<_, Minima>(nibbles(&whole), layout, panel, k, out),
            (Code::U4, _) if zeros => store::<_, Zeros>(nibbles(&whole), layout, panel, k, out),
            (Code::U4, _) => store::<_, Scaled>(nibbles(&centred), layout, panel, k, out),
            (Code::I8, Scale::NestedWithMinima) => store::<_, Minima>(Signed, layout, panel, k, out),
            (Code::I8, _) if zeros => store::<_, Zeros>(Signed, layout, panel, k, out),
            (Code::I8, _) => store::<_, Scaled>(Signed, layout, panel, k, out),
            (Code::E4M3, _) => store::<_, ScaledFloats>(Floats, layout, panel, k, out),
        }
    }
}

/// # Safety
/// Like [`decode_words`].
#[inline(always)]
unsafe fn store<U: Unit, W: Weights>(
    unit: U,
    layout: &Layout,
    panel: *const u8,
    k: Range<usize>,
    out: *mut u32,
) {
    let (width, unit_bytes) = (layout.width, layout.unit_bytes);
    // SAFETY: the caller's promise.
    unsafe {
        for run in layout.runs(k) {
            let header = panel.add(run.group * layout.group_bytes);
            let units = header.add(layout.header_bytes + run.units.start * layout.octets * unit_bytes);
            for octet in (0..layout.octets).step_by(2) {
                let weights = W::load(layout, header, run.part, octet);
                for index in 0..run.units.len() {
                    let codes = units.add((index * layout.octets + octet) * unit_bytes);
                    let words = unit.words(codes, &weights);
                    let to = out.add((run.at + index * SIDE) / 2 * width + octet * SIDE);
                    for (step, words) in words.into_iter().enumerate() {
                        _mm512_storeu_si512(to.add(step * width).cast(), words);
                    }
                }
            }
        }
    }
}

/// How the codes of two units side by side become words.
trait Unit {
    /// Steps of two elements along K.
    ///
    /// # Safety
    /// The processor has the instructions, and two units can be read.
    unsafe fn words(&self, codes: *const u8, weights: &impl Weights) -> [__m512i; SIDE / 2];
}

/// Four bits, by a table: low and high bytes of sixteen bfloat16.
struct Nibbles {
    low: __m512i,
    high: __m512i,
}

impl Nibbles {
    /// # Safety
    /// The processor has the instructions.
    #[inline(always)]
    unsafe fn new(table: &Table) -> Self {
        // SAFETY: the caller's promise; half of a table is sixteen bytes.
        unsafe {
            let half = |bytes: &[u8; 16]| _mm512_broadcast_i32x4(_mm_loadu_si128(bytes.as_ptr().cast()));
            Nibbles { low: half(&table.0), high: half(&table.1) }
        }
    }
}

impl Unit for Nibbles {
    #[inline(always)]
    unsafe fn words(&self, codes: *const u8, weights: &impl Weights) -> [__m512i; SIDE / 2] {
        // SAFETY: the caller's promise; two units are a vector of 64 bytes.
        unsafe {
            let codes = _mm512_loadu_si512(codes.cast());
            let mask = _mm512_set1_epi8(15);
            let [low, high] = [codes, _mm512_srli_epi16::<4>(codes)].map(|nibbles| {
                let nibbles = _mm512_and_si512(nibbles, mask);
                let bytes = [self.low, self.high].map(|table| _mm512_shuffle_epi8(table, nibbles));
                [_mm512_unpacklo_epi8(bytes[0], bytes[1]), _mm512_unpackhi_epi8(bytes[0], bytes[1])]
            });
            [low[0], low[1], high[0], high[1]].map(|pairs| weights.of_pairs(pairs))
        }
    }
}

/// Bytes.
struct Signed;

/// FP8 e4m3, each times 2⁻¹²⁰: sign, exponent and fraction in their places.
struct Floats;

/// Even and odd elements of sixteen columns in a step, widened as signed numbers.
///
/// # Safety
/// The processor has the instructions, and two units of bytes can be read.
#[inline(always)]
unsafe fn bytes(codes: *const u8, step: usize) -> [__m512i; 2] {
    // SAFETY: the caller's promise; in a unit the eight columns of one k lie side by side.
    unsafe {
        let [left, right] =
            [0, SIDE * SIDE].map(|unit| _mm_loadu_si128(codes.add(unit + 2 * step * SIDE).cast()));
        [_mm_unpacklo_epi64(left, right), _mm_unpackhi_epi64(left, right)]
            .map(|columns| _mm512_cvtepi8_epi32(columns))
    }
}

impl Unit for Signed {
    #[inline(always)]
    unsafe fn words(&self, codes: *const u8, weights: &impl Weights) -> [__m512i; SIDE / 2] {
        // SAFETY: the caller's promise.
        unsafe {
            std::array::from_fn(|step| {
                let [even, odd] = bytes(codes, step).map(|numbers| _mm512_cvtepi32_ps(numbers));
                weights.of(even, odd)
            })
        }
    }
}

impl Unit for Floats {
    #[inline(always)]
    unsafe fn words(&self, codes: *const u8, weights: &impl Weights) -> [__m512i; SIDE / 2] {
        // SAFETY: the caller's promise.
        unsafe {
            let places = _mm512_set1_epi32(0x87f0_0000_u32.cast_signed());
            std::array::from_fn(|step| {
                let [even, odd] = bytes(codes, step).map(|codes| {
                    _mm512_castsi512_ps(_mm512_and_si512(_mm512_slli_epi32::<20>(codes), places))
                });
                weights.of(even, odd)
            })
        }
    }
}

/// What makes weights of values: sixteen columns.
pub(super) trait Weights {
    /// Of columns `octet · 8` and on of a panel, in part `part` of the group.
    ///
    /// # Safety
    /// The processor has the instructions; `header` is that of a group.
    unsafe fn load(layout: &Layout, header: *const u8, part: usize, octet: usize) -> Self;

    /// Words of the nearest bfloat16 of each weight.
    ///
    /// # Safety
    /// The processor has the instructions.
    unsafe fn of(&self, even: __m512, odd: __m512) -> __m512i;

    /// The same of values that are bfloat16.
    ///
    /// # Safety
    /// The processor has the instructions.
    #[inline(always)]
    unsafe fn of_pairs(&self, pairs: __m512i) -> __m512i {
        // SAFETY: the caller's promise.
        unsafe {
            let even = _mm512_slli_epi32::<16>(pairs);
            let odd = _mm512_and_si512(pairs, _mm512_set1_epi32(!0xffff));
            self.of(_mm512_castsi512_ps(even), _mm512_castsi512_ps(odd))
        }
    }
}

/// Powers of two: what is added to the bits of either half of a word.
pub(super) struct Powers(pub(super) __m512i);

pub(super) struct Scaled(pub(super) __m512);

/// FP8, whose values lack a factor of 2¹²⁰.
pub(super) struct ScaledFloats(pub(super) __m512);

pub(super) struct Zeros {
    pub(super) scale: __m512,
    pub(super) zero: __m512,
}

pub(super) struct Minima {
    pub(super) scale: __m512,
    pub(super) minimum: __m512,
}

impl Weights for Powers {
    #[inline(always)]
    unsafe fn load(_: &Layout, header: *const u8, _: usize, octet: usize) -> Self {
        // SAFETY: the caller's promise.
        unsafe {
            let powers = _mm512_cvtepu8_epi32(_mm_loadu_si128(header.add(octet * SIDE).cast()));
            let added = _mm512_slli_epi32::<7>(_mm512_sub_epi32(powers, _mm512_set1_epi32(127)));
            let low = _mm512_and_si512(added, _mm512_set1_epi32(0xffff));
            Powers(_mm512_or_si512(low, _mm512_slli_epi32::<16>(added)))
        }
    }

    #[inline(always)]
    unsafe fn of(&self, even: __m512, odd: __m512) -> __m512i {
        // SAFETY: the caller's promise.
        unsafe { self.of_pairs(rounded(even, odd)) }
    }

    #[inline(always)]
    unsafe fn of_pairs(&self, pairs: __m512i) -> __m512i {
        // SAFETY: the caller's promise.
        unsafe {
            let numbers = _mm512_test_epi16_mask(pairs, _mm512_set1_epi16(0x7fff));
            _mm512_mask_add_epi16(pairs, numbers, pairs, self.0)
        }
    }
}

impl Weights for Scaled {
    #[inline(always)]
    unsafe fn load(layout: &Layout, header: *const u8, part: usize, octet: usize) -> Self {
        // SAFETY: the caller's promise.
        unsafe { Scaled(scale(layout, header, part, octet)) }
    }

    #[inline(always)]
    unsafe fn of(&self, even: __m512, odd: __m512) -> __m512i {
        // SAFETY: the caller's promise.
        unsafe { rounded(_mm512_mul_ps(even, self.0), _mm512_mul_ps(odd, self.0)) }
    }
}

impl Weights for ScaledFloats {
    #[inline(always)]
    unsafe fn load(layout: &Layout, header: *const u8, part: usize, octet: usize) -> Self {
        // SAFETY: the caller's promise.
        unsafe {
            let scale = scale(layout, header, part, octet);
            ScaledFloats(_mm512_mul_ps(scale, _mm512_set1_ps(2f32.powi(120))))
        }
    }

    #[inline(always)]
    unsafe fn of(&self, even: __m512, odd: __m512) -> __m512i {
        // SAFETY: the caller's promise.
        unsafe { rounded(_mm512_mul_ps(even, self.0), _mm512_mul_ps(odd, self.0)) }
    }
}

impl Weights for Zeros {
    #[inline(always)]
    unsafe fn load(layout: &Layout, header: *const u8, part: usize, octet: usize) -> Self {
        let last = layout.header_bytes - layout.width;
        // SAFETY: the caller's promise; records end in a zero.
        unsafe {
            let zeros = _mm_loadu_si128(header.add(last + octet * SIDE).cast());
            let zero = _mm512_cvtepi32_ps(match layout.format.code {
                Code::U4 => _mm512_cvtepu8_epi32(zeros),
                _ => _mm512_cvtepi8_epi32(zeros),
            });
            Zeros { scale: scale(layout, header, part, octet), zero }
        }
    }

    #[inline(always)]
    unsafe fn of(&self, even: __m512, odd: __m512) -> __m512i {
        // SAFETY: the caller's promise.
        unsafe {
            let [even, odd] =
                [even, odd].map(|values| _mm512_mul_ps(_mm512_sub_ps(values, self.zero), self.scale));
            rounded(even, odd)
        }
    }
}

impl Weights for Minima {
    #[inline(always)]
    unsafe fn load(layout: &Layout, header: *const u8, part: usize, octet: usize) -> Self {
        let parts = layout.format.group / layout.format.part;
        // SAFETY: the caller's promise.
        unsafe {
            let product = |half: usize, byte: usize| {
                let bytes = _mm_loadu_si128(header.add(byte * layout.width + octet * SIDE).cast());
                let numbers = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(bytes));
                _mm512_mul_ps(halves(header.add(half * layout.width), octet), numbers)
            };
            Minima { scale: product(0, 4 + part), minimum: product(2, 4 + parts + part) }
        }
    }

    #[inline(always)]
    unsafe fn of(&self, even: __m512, odd: __m512) -> __m512i {
        // The product has at most 24 bits, so that fusing it with the difference changes nothing.
        // SAFETY: the caller's promise.
        unsafe {
            let [even, odd] = [even, odd].map(|values| _mm512_fmsub_ps(values, self.scale, self.minimum));
            rounded(even, odd)
        }
    }
}

/// Words of the nearest bfloat16, ties to even.
///
/// # Safety
/// The processor has the instructions.
#[inline(always)]
unsafe fn rounded(even: __m512, odd: __m512) -> __m512i {
    /// Number `c` of the even elements, then of the odd ones, for each column.
    const WOVEN: [u16; 32] = {
        let mut order = [0; 32];
        let mut at = 0;
        while at < 32 {
            order[at] = (at / 2 + at % 2 * 16) as u16;
            at += 1;
        }
        order
    };
    // SAFETY: the caller's promise; both are 64 bytes that may have any bits.
    unsafe {
        let order = _mm512_loadu_si512(WOVEN.as_ptr().cast());
        _mm512_permutexvar_epi16(order, transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(odd, even)))
    }
}

/// Sixteen half-precision numbers of a field.
///
/// # Safety
/// The processor has the instructions; the field can be read.
#[inline(always)]
unsafe fn halves(field: *const u8, octet: usize) -> __m512 {
    // SAFETY: the caller's promise.
    unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(field.add(octet * SIDE * 2).cast())) }
}

/// Scales of sixteen columns.
///
/// # Safety
/// Like [`Weights::load`].
#[inline(always)]
unsafe fn scale(layout: &Layout, header: *const u8, part: usize, octet: usize) -> __m512 {
    let first = octet * SIDE;
    // SAFETY: the caller's promise; numbers lie field by field.
    unsafe {
        match layout.format.scale {
            Scale::E8M0 => {
                let powers = _mm512_cvtepu8_epi32(_mm_loadu_si128(header.add(first).cast()));
                _mm512_castsi512_ps(_mm512_slli_epi32::<23>(powers))
            }
            Scale::F16 => halves(header, octet),
            Scale::BF16 => {
                let words = _mm512_cvtepu16_epi32(_mm256_loadu_si256(header.add(2 * first).cast()));
                _mm512_castsi512_ps(_mm512_slli_epi32::<16>(words))
            }
            Scale::F32 => _mm512_loadu_ps(header.add(4 * first).cast()),
            Scale::Nested | Scale::NestedWithMinima => {
                let bytes = _mm_loadu_si128(header.add((2 + part) * layout.width + first).cast());
                let factors = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes));
                _mm512_mul_ps(halves(header, octet), factors)
            }
        }
    }
}
