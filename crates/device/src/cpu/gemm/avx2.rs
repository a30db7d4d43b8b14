//! AVX2 and FMA: 8 lanes, tiles of up to 6 rows (12 sums in 16 registers), or 5 where words are kept for their second part.

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
    use crate::cpu::gemm::decode_avx2;
    use crate::cpu::gemm::kernel::{Kernel, functions};
    use std::arch::x86_64::*;

    pub(in crate::cpu::gemm) fn is_supported() -> bool {
        is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("fma")
            && is_x86_feature_detected!("f16c")
    }

    pub(in crate::cpu::gemm) fn functions(element: ElementType) -> &'static Functions {
        static FUSED_F32: Functions = Functions { fused: &decode_avx2::FUSED, ..F32 };
        static FUSED_BF16: Functions = Functions { fused: &decode_avx2::FUSED, ..BF16 };
        match element {
            ElementType::F32 => &FUSED_F32,
            ElementType::Bf16 => &FUSED_BF16,
        }
    }

    functions!(F32, F32Kernel, "avx2,fma", decode_avx2::decode, rows: 1 2 3 4 5 6, of pairs: 1 2);
    functions!(BF16, WidenedKernel, "avx2,fma", decode_avx2::decode, rows: 1 2 3 4 5, of pairs: 1 2);

    /// f32 × f32.
    struct F32Kernel;
    /// bf16 pairs widened to f32, low half first.
    struct WidenedKernel;

    /// The methods that are the same for both.
    macro_rules! common {
        () => {
            type Sums = __m256;
            type Weights = __m256;
            type Activation = __m256;
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
            unsafe fn load_activation(from: *const u32) -> __m256 {
                // SAFETY: the caller's promise.
                unsafe { _mm256_set1_ps(*from.cast()) }
            }

            #[inline(always)]
            unsafe fn multiply_add(sums: __m256, activation: __m256, weights: __m256) -> __m256 {
                // SAFETY: the caller's promise.
                unsafe { _mm256_fmadd_ps(activation, weights, sums) }
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
        const PARTS: usize = 1;
        common!();

        #[inline(always)]
        unsafe fn load_weights(from: *const u32, _: usize) -> __m256 {
            // SAFETY: the caller's promise.
            unsafe { _mm256_loadu_ps(from.cast()) }
        }
    }

    // SAFETY: needs AVX2 and FMA only.
    unsafe impl Kernel for WidenedKernel {
        const PARTS: usize = 2;
        common!();

        #[inline(always)]
        unsafe fn load_weights(from: *const u32, part: usize) -> __m256 {
            // SAFETY: the caller's promise.
            unsafe {
                let pairs = _mm256_loadu_si256(from.cast());
                _mm256_castsi256_ps(if part == 0 {
                    _mm256_slli_epi32::<16>(pairs)
                } else {
                    _mm256_and_si256(pairs, _mm256_set1_epi32(!0xffff))
                })
            }
        }
    }
}
