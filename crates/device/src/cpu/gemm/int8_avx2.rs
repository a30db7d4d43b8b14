//! Products of rows in int8 by AVX2: eight columns at a time. VPMADDUBSW multiplies bytes without a sign by bytes with one, and adds
//! pairs into sixteen bits, where it would saturate: codes of four bits are far from that, and bytes give their sign away first.

use super::int8::{FP4_CODES, Lanes, coded_products};
use std::arch::x86_64::*;

coded_products!(PRODUCTS, Vectors, "avx2,fma,f16c");

struct Vectors;

// SAFETY: needs AVX2, FMA and F16C only.
unsafe impl Lanes for Vectors {
    const LANES: usize = 8;
    const MOST_ROWS: usize = 4;
    const BYTES_BIAS: i32 = 0;
    type Floats = __m256;
    type Ints = __m256i;
    type Quads = __m256i;

    #[inline(always)]
    unsafe fn all(number: f32) -> __m256 {
        // SAFETY: the caller's promise.
        unsafe { _mm256_set1_ps(number) }
    }

    #[inline(always)]
    unsafe fn all_ints(number: i32) -> __m256i {
        // SAFETY: the caller's promise.
        unsafe { _mm256_set1_epi32(number) }
    }

    #[inline(always)]
    unsafe fn store(to: *mut f32, numbers: __m256) {
        // SAFETY: the caller's promise.
        unsafe { _mm256_storeu_ps(to, numbers) }
    }

    #[inline(always)]
    unsafe fn floats(from: *const u8) -> __m256 {
        // SAFETY: the caller's promise.
        unsafe { _mm256_loadu_ps(from.cast()) }
    }

    #[inline(always)]
    unsafe fn halves(from: *const u8) -> __m256 {
        // SAFETY: the caller's promise.
        unsafe { _mm256_cvtph_ps(_mm_loadu_si128(from.cast())) }
    }

    #[inline(always)]
    unsafe fn brains(from: *const u8) -> __m256 {
        // SAFETY: the caller's promise.
        unsafe {
            _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(_mm_loadu_si128(from.cast()))))
        }
    }

    #[inline(always)]
    unsafe fn powers(from: *const u8) -> __m256 {
        // SAFETY: the caller's promise.
        unsafe { _mm256_castsi256_ps(_mm256_slli_epi32::<23>(Self::unsigned(from))) }
    }

    #[inline(always)]
    unsafe fn signed(from: *const u8) -> __m256i {
        // SAFETY: the caller's promise.
        unsafe { _mm256_cvtepi8_epi32(_mm_loadl_epi64(from.cast())) }
    }

    #[inline(always)]
    unsafe fn unsigned(from: *const u8) -> __m256i {
        // SAFETY: the caller's promise.
        unsafe { _mm256_cvtepu8_epi32(_mm_loadl_epi64(from.cast())) }
    }

    #[inline(always)]
    unsafe fn to_floats(numbers: __m256i) -> __m256 {
        // SAFETY: the caller's promise.
        unsafe { _mm256_cvtepi32_ps(numbers) }
    }

    #[inline(always)]
    unsafe fn times(a: __m256, b: __m256) -> __m256 {
        // SAFETY: the caller's promise.
        unsafe { _mm256_mul_ps(a, b) }
    }

    #[inline(always)]
    unsafe fn times_plus(a: __m256, b: __m256, c: __m256) -> __m256 {
        // SAFETY: the caller's promise.
        unsafe { _mm256_fmadd_ps(a, b, c) }
    }

    #[inline(always)]
    unsafe fn minus_times(a: __m256, b: __m256, c: __m256) -> __m256 {
        // SAFETY: the caller's promise.
        unsafe { _mm256_fnmadd_ps(a, b, c) }
    }

    #[inline(always)]
    unsafe fn add_ints(a: __m256i, b: __m256i) -> __m256i {
        // SAFETY: the caller's promise.
        unsafe { _mm256_add_epi32(a, b) }
    }

    #[inline(always)]
    unsafe fn times_ints(a: __m256i, b: __m256i) -> __m256i {
        // SAFETY: the caller's promise.
        unsafe { _mm256_mullo_epi32(a, b) }
    }

    #[inline(always)]
    unsafe fn nibbles(from: *const u8) -> [__m256i; 2] {
        // SAFETY: the caller's promise.
        unsafe {
            let (codes, mask) = (Self::bytes(from), _mm256_set1_epi8(15));
            [codes, _mm256_srli_epi16::<4>(codes)].map(|codes| _mm256_and_si256(codes, mask))
        }
    }

    #[inline(always)]
    unsafe fn fp4(codes: __m256i) -> __m256i {
        // SAFETY: the caller's promise; a table is sixteen bytes.
        unsafe {
            let table = _mm256_broadcastsi128_si256(_mm_loadu_si128(FP4_CODES.as_ptr().cast()));
            _mm256_shuffle_epi8(table, codes)
        }
    }

    #[inline(always)]
    unsafe fn bytes(from: *const u8) -> __m256i {
        // SAFETY: the caller's promise.
        unsafe { _mm256_loadu_si256(from.cast()) }
    }

    #[inline(always)]
    unsafe fn add_small(sums: __m256i, codes: [__m256i; 4], row: *const u32) -> __m256i {
        // SAFETY: the caller's promise.
        unsafe {
            // At most 8 · 24 · 127 in each half of a lane.
            let pairs =
                |at: usize| _mm256_maddubs_epi16(codes[at], _mm256_set1_epi32((*row.add(at)).cast_signed()));
            let low = _mm256_add_epi16(pairs(0), pairs(1));
            let all = _mm256_add_epi16(low, _mm256_add_epi16(pairs(2), pairs(3)));
            _mm256_add_epi32(sums, _mm256_madd_epi16(all, _mm256_set1_epi16(1)))
        }
    }

    #[inline(always)]
    unsafe fn add_bytes(mut sums: __m256i, codes: [__m256i; 4], row: *const u32) -> __m256i {
        // SAFETY: the caller's promise.
        unsafe {
            for (at, codes) in codes.into_iter().enumerate() {
                let quad = _mm256_set1_epi32((*row.add(at)).cast_signed());
                // The sign goes over to the row; 2 · 128 · 127 fits into half a lane.
                let pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(codes), _mm256_sign_epi8(quad, codes));
                sums = _mm256_add_epi32(sums, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
            }
            sums
        }
    }
}
