//! AVX2 and FMA: 8 lanes, tiles of up to 6 rows (12 sums in 16 registers).

use super::ElementType;
use super::kernel::Functions;

#[cfg(target_arch = "x86_64")]
pub(super) use x86::{functions, is_supported};

#[cfg(not(target_arch = "x86_64"))]
pub(super) fn is_supported() -> bool {
    false
}

#[cfg(not(target_arch = "x86_64"))]
pub(super) fn functions(_: ElementType) -> &'static Functions {
    unreachable!("AVX2 is not supported on this architecture")
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::{ElementType, Functions};
    use crate::cpu::gemm::kernel::{Kernel, functions};
    use std::arch::x86_64::*;

    pub(in crate::cpu::gemm) fn is_supported() -> bool {
        is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma")
    }

    pub(in crate::cpu::gemm) fn functions(element: ElementType) -> &'static Functions {
        match element {
            ElementType::F32 => &F32,
            ElementType::Bf16 => &BF16,
        }
    }

    functions!(F32, F32Kernel, "avx2,fma", rows: 1 2 3 4 5 6, of pairs: 1 2);
    functions!(BF16, Bf16Kernel, "avx2,fma", rows: 1 2 3 4 5, of pairs: 1);

    /// f32 × f32.
    struct F32Kernel;
    /// bf16 pairs widened to f32, low half first.
    struct Bf16Kernel;

    /// The methods that are the same for both.
    macro_rules! common {
        () => {
            type Sums = __m256;
            const LANES: usize = 8;
            const ROWS_TO_L1: usize = 3;
            const ROWS_TO_UNROLL: usize = 5;

            #[inline(always)]
            unsafe fn zero_sums() -> __m256 {
                // SAFETY: the caller's promise.
                unsafe { _mm256_setzero_ps() }
            }

            #[inline(always)]
            unsafe fn load_sums(from: *const f32) -> __m256 {
                // SAFETY: the caller's promise.
                unsafe { _mm256_loadu_ps(from) }
            }

            #[inline(always)]
            unsafe fn store_sums(to: *mut f32, sums: __m256) {
                // SAFETY: the caller's promise.
                unsafe { _mm256_storeu_ps(to, sums) }
            }

            #[inline(always)]
            fn prefetch_to_l1(address: *const u8) {
                // SAFETY: a prefetch may take any address and is in the x86-64 baseline.
                unsafe { _mm_prefetch::<_MM_HINT_T0>(address.cast()) }
            }

            #[inline(always)]
            fn prefetch_to_l2(address: *const u8) {
                // SAFETY: a prefetch may take any address and is in the x86-64 baseline.
                unsafe { _mm_prefetch::<_MM_HINT_T1>(address.cast()) }
            }
        };
    }

    // SAFETY: needs AVX2 and FMA only.
    unsafe impl Kernel for F32Kernel {
        type Weights = __m256;
        type Activation = __m256;
        common!();

        #[inline(always)]
        unsafe fn load_weights(from: *const u32) -> __m256 {
            // SAFETY: the caller's promise.
            unsafe { _mm256_loadu_ps(from.cast()) }
        }

        #[inline(always)]
        unsafe fn load_activation(from: *const u32) -> __m256 {
            // SAFETY: the caller's promise.
            unsafe { _mm256_set1_ps(*from.cast()) }
        }

        #[inline(always)]
        unsafe fn multiply_add(sums: __m256, activation: __m256, weights: __m256) -> __m256 {
            // SAFETY: the caller's promise.
            unsafe { _mm256_fmadd_ps(activation, weights, sums) }
        }
    }

    // SAFETY: needs AVX2 and FMA only.
    unsafe impl Kernel for Bf16Kernel {
        type Weights = [__m256; 2];
        type Activation = [__m256; 2];
        common!();

        #[inline(always)]
        unsafe fn load_weights(from: *const u32) -> [__m256; 2] {
            // SAFETY: the caller's promise.
            unsafe {
                let pairs = _mm256_loadu_si256(from.cast());
                let low = _mm256_slli_epi32::<16>(pairs);
                let high = _mm256_and_si256(pairs, _mm256_set1_epi32(!0xffff));
                [_mm256_castsi256_ps(low), _mm256_castsi256_ps(high)]
            }
        }

        #[inline(always)]
        unsafe fn load_activation(from: *const u32) -> [__m256; 2] {
            // SAFETY: the caller's promise.
            unsafe {
                let pair = *from;
                [pair << 16, pair & !0xffff].map(|bits| _mm256_set1_ps(f32::from_bits(bits)))
            }
        }

        #[inline(always)]
        unsafe fn multiply_add(sums: __m256, activation: [__m256; 2], weights: [__m256; 2]) -> __m256 {
            // SAFETY: the caller's promise.
            unsafe {
                let sums = _mm256_fmadd_ps(activation[0], weights[0], sums);
                _mm256_fmadd_ps(activation[1], weights[1], sums)
            }
        }
    }
}
