//! Products of rows in int8 by AVX-512: sixteen columns at a time, four elements along K by VPDPBUSD where the processor has it.

use super::coded::CodedProducts;
use super::int8::{FP4_CODES, Lanes, coded_products};
use std::arch::x86_64::*;

/// The kernels for this processor.
pub(super) fn products() -> CodedProducts {
    if is_x86_feature_detected!("avx512vnni") { DOT } else { PAIRS }
}

coded_products!(DOT, Vectors<true>, "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,f16c");
coded_products!(PAIRS, Vectors<false>, "avx512f,avx512bw,avx512vl,avx512dq,f16c");

/// With the instruction for four products, or by pairs of them.
struct Vectors<const DOT: bool>;

// SAFETY: needs AVX-512 F, BW, VL and DQ, F16C, and VNNI if `DOT`.
unsafe impl<const DOT: bool> Lanes for Vectors<DOT> {
    const LANES: usize = 16;
    const MOST_ROWS: usize = 8;
    const BYTES_BIAS: i32 = if DOT { 128 } else { 0 };
    type Floats = __m512;
    type Ints = __m512i;
    type Quads = __m512i;

    #[inline(always)]
    unsafe fn all(number: f32) -> __m512 {
        // SAFETY: the caller's promise.
        unsafe { _mm512_set1_ps(number) }
    }

    #[inline(always)]
    unsafe fn all_ints(number: i32) -> __m512i {
        // SAFETY: the caller's promise.
        unsafe { _mm512_set1_epi32(number) }
    }

    #[inline(always)]
    unsafe fn store(to: *mut f32, numbers: __m512) {
        // SAFETY: the caller's promise.
        unsafe { _mm512_storeu_ps(to, numbers) }
    }

    #[inline(always)]
    unsafe fn floats(from: *const u8) -> __m512 {
        // SAFETY: the caller's promise.
        unsafe { _mm512_loadu_ps(from.cast()) }
    }

    #[inline(always)]
    unsafe fn halves(from: *const u8) -> __m512 {
        // SAFETY: the caller's promise.
        unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(from.cast())) }
    }

    #[inline(always)]
    unsafe fn brains(from: *const u8) -> __m512 {
        // SAFETY: the caller's promise.
        unsafe {
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(_mm256_loadu_si256(
                from.cast(),
            ))))
        }
    }

    #[inline(always)]
    unsafe fn powers(from: *const u8) -> __m512 {
        // SAFETY: the caller's promise.
        unsafe { _mm512_castsi512_ps(_mm512_slli_epi32::<23>(Self::unsigned(from))) }
    }

    #[inline(always)]
    unsafe fn signed(from: *const u8) -> __m512i {
        // SAFETY: the caller's promise.
        unsafe { _mm512_cvtepi8_epi32(_mm_loadu_si128(from.cast())) }
    }

    #[inline(always)]
    unsafe fn unsigned(from: *const u8) -> __m512i {
        // SAFETY: the caller's promise.
        unsafe { _mm512_cvtepu8_epi32(_mm_loadu_si128(from.cast())) }
    }

    #[inline(always)]
    unsafe fn to_floats(numbers: __m512i) -> __m512 {
        // SAFETY: the caller's promise.
        unsafe { _mm512_cvtepi32_ps(numbers) }
    }

    #[inline(always)]
    unsafe fn times(a: __m512, b: __m512) -> __m512 {
        // SAFETY: the caller's promise.
        unsafe { _mm512_mul_ps(a, b) }
    }

    #[inline(always)]
    unsafe fn times_plus(a: __m512, b: __m512, c: __m512) -> __m512 {
        // SAFETY: the caller's promise.
        unsafe { _mm512_fmadd_ps(a, b, c) }
    }

    #[inline(always)]
    unsafe fn minus_times(a: __m512, b: __m512, c: __m512) -> __m512 {
        // SAFETY: the caller's promise.
        unsafe { _mm512_fnmadd_ps(a, b, c) }
    }

    #[inline(always)]
    unsafe fn add_ints(a: __m512i, b: __m512i) -> __m512i {
        // SAFETY: the caller's promise.
        unsafe { _mm512_add_epi32(a, b) }
    }

    #[inline(always)]
    unsafe fn times_ints(a: __m512i, b: __m512i) -> __m512i {
        // SAFETY: the caller's promise.
        unsafe { _mm512_mullo_epi32(a, b) }
    }

    #[inline(always)]
    unsafe fn nibbles(from: *const u8) -> [__m512i; 2] {
        // SAFETY: the caller's promise.
        unsafe {
            let (codes, mask) = (_mm512_loadu_si512(from.cast()), _mm512_set1_epi8(15));
            [codes, _mm512_srli_epi16::<4>(codes)].map(|codes| _mm512_and_si512(codes, mask))
        }
    }

    #[inline(always)]
    unsafe fn fp4(codes: __m512i) -> __m512i {
        // SAFETY: the caller's promise; a table is sixteen bytes.
        unsafe {
            let table = _mm512_broadcast_i32x4(_mm_loadu_si128(FP4_CODES.as_ptr().cast()));
            _mm512_shuffle_epi8(table, codes)
        }
    }

    #[inline(always)]
    unsafe fn bytes(from: *const u8) -> __m512i {
        // SAFETY: the caller's promise.
        unsafe {
            let codes = _mm512_loadu_si512(from.cast());
            if DOT { _mm512_xor_si512(codes, _mm512_set1_epi8(i8::MIN)) } else { codes }
        }
    }

    #[inline(always)]
    unsafe fn add_small(mut sums: __m512i, codes: [__m512i; 4], row: *const u32) -> __m512i {
        // SAFETY: the caller's promise.
        unsafe {
            let quad = |at: usize| _mm512_set1_epi32((*row.add(at)).cast_signed());
            if DOT {
                for (at, codes) in codes.into_iter().enumerate() {
                    sums = _mm512_dpbusd_epi32(sums, codes, quad(at));
                }
                return sums;
            }
            // At most 8 · 24 · 127 in each half of a lane.
            let pairs = |at: usize| _mm512_maddubs_epi16(codes[at], quad(at));
            let low = _mm512_add_epi16(pairs(0), pairs(1));
            let all = _mm512_add_epi16(low, _mm512_add_epi16(pairs(2), pairs(3)));
            _mm512_add_epi32(sums, _mm512_madd_epi16(all, _mm512_set1_epi16(1)))
        }
    }

    #[inline(always)]
    unsafe fn add_bytes(mut sums: __m512i, codes: [__m512i; 4], row: *const u32) -> __m512i {
        // SAFETY: the caller's promise.
        unsafe {
            if DOT {
                return Self::add_small(sums, codes, row);
            }
            for (at, codes) in codes.into_iter().enumerate() {
                let quad = _mm512_set1_epi32((*row.add(at)).cast_signed());
                // The sign goes over to the row; 2 · 128 · 127 fits into half a lane.
                let signs = _mm512_movepi8_mask(codes);
                let signed = _mm512_mask_sub_epi8(quad, signs, _mm512_setzero_si512(), quad);
                let pairs = _mm512_maddubs_epi16(_mm512_abs_epi8(codes), signed);
                sums = _mm512_add_epi32(sums, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)));
            }
            sums
        }
    }
}
