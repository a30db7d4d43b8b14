//! AVX-512: 16 lanes, tiles of up to 14 rows (28 sums in 32 registers).

use super::ElementType;
use super::kernel::Functions;

#[cfg(target_arch = "x86_64")]
pub(super) use x86::{BF16_DOT, F32, functions, has_bf16, is_supported};

#[cfg(not(target_arch = "x86_64"))]
pub(super) fn is_supported() -> bool {
    false
}

#[cfg(not(target_arch = "x86_64"))]
pub(super) fn functions(_: ElementType) -> &'static Functions {
    unreachable!("AVX-512 is not supported on this architecture")
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::{ElementType, Functions};
    use crate::cpu::gemm::avx2;
    use crate::cpu::gemm::kernel::{Kernel, functions};
    use crate::cpu::gemm::{decode_avx2, decode_avx512};
    use std::arch::x86_64::*;
    use std::mem::transmute;

    pub(in crate::cpu::gemm) fn is_supported() -> bool {
        avx2::is_supported()
            && is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512vl")
            && is_x86_feature_detected!("avx512dq")
    }

    /// Whether VDPBF16PS is there too.
    pub(in crate::cpu::gemm) fn has_bf16() -> bool {
        is_supported() && is_x86_feature_detected!("avx512bf16")
    }

    pub(in crate::cpu::gemm) fn functions(element: ElementType) -> &'static Functions {
        match element {
            ElementType::F32 => &F32,
            ElementType::Bf16 if has_bf16() => &BF16_DOT,
            ElementType::Bf16 => &BF16_WIDENED,
        }
    }

    functions!(F32, F32Kernel, "avx512f,avx512bw,avx512vl,avx512dq", decode_avx2::decode,
        rows: 1 2 3 4 5 6 7 8 9 10 11 12 13 14, of pairs: 1 2 3 4 5);
    functions!(BF16_DOT, Bf16DotKernel, "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16", decode_avx512::decode,
        rows: 1 2 3 4 5 6 7 8 9 10 11 12 13 14, of pairs: 1 2 3 4 5);
    functions!(BF16_WIDENED, WidenedKernel, "avx512f,avx512bw,avx512vl,avx512dq", decode_avx2::decode,
        rows: 1 2 3 4 5 6 7 8 9 10 11 12, of pairs: 1 2 3 4 5);

    /// f32 × f32.
    struct F32Kernel;
    /// bf16 pairs by VDPBF16PS: two products added to an f32 sum in each lane.
    struct Bf16DotKernel;
    /// bf16 pairs widened to f32, low half first.
    struct WidenedKernel;

    /// The methods that are the same for all three.
    macro_rules! common {
        () => {
            type Sums = __m512;
            const LANES: usize = 16;
            const ROWS_TO_L1: usize = 4;
            const ROWS_TO_UNROLL: usize = 9;

            #[inline(always)]
            unsafe fn zero_sums() -> __m512 {
                // SAFETY: the caller's promise.
                unsafe { _mm512_setzero_ps() }
            }

            #[inline(always)]
            unsafe fn load_sums(from: *const f32) -> __m512 {
                // SAFETY: the caller's promise.
                unsafe { _mm512_loadu_ps(from) }
            }

            #[inline(always)]
            unsafe fn store_sums(to: *mut f32, sums: __m512) {
                // SAFETY: the caller's promise.
                unsafe { _mm512_storeu_ps(to, sums) }
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

    /// The methods of those that multiply f32 with f32.
    macro_rules! float32 {
        () => {
            type Weights = __m512;
            type Activation = __m512;

            #[inline(always)]
            unsafe fn load_activation(from: *const u32) -> __m512 {
                // SAFETY: the caller's promise.
                unsafe { _mm512_set1_ps(*from.cast()) }
            }

            #[inline(always)]
            unsafe fn multiply_add(sums: __m512, activation: __m512, weights: __m512) -> __m512 {
                // SAFETY: the caller's promise.
                unsafe { _mm512_fmadd_ps(activation, weights, sums) }
            }
        };
    }

    // SAFETY: needs AVX-512 F only.
    unsafe impl Kernel for F32Kernel {
        const PARTS: usize = 1;
        common!();
        float32!();

        #[inline(always)]
        unsafe fn load_weights(from: *const u32, _: usize) -> __m512 {
            // SAFETY: the caller's promise.
            unsafe { _mm512_loadu_ps(from.cast()) }
        }
    }

    // SAFETY: needs AVX-512 F and BF16 only.
    unsafe impl Kernel for Bf16DotKernel {
        type Weights = __m512i;
        type Activation = __m512i;
        const PARTS: usize = 1;
        common!();

        #[inline(always)]
        unsafe fn load_weights(from: *const u32, _: usize) -> __m512i {
            // SAFETY: the caller's promise.
            unsafe { _mm512_loadu_si512(from.cast()) }
        }

        #[inline(always)]
        unsafe fn load_activation(from: *const u32) -> __m512i {
            // SAFETY: the caller's promise.
            unsafe { _mm512_set1_epi32((*from).cast_signed()) }
        }

        #[inline(always)]
        unsafe fn multiply_add(sums: __m512, activation: __m512i, weights: __m512i) -> __m512 {
            // SAFETY: the caller's promise; both types are 512 plain bits.
            unsafe {
                let activation = transmute::<__m512i, __m512bh>(activation);
                let weights = transmute::<__m512i, __m512bh>(weights);
                _mm512_dpbf16_ps(sums, activation, weights)
            }
        }
    }

    // SAFETY: needs AVX-512 F only.
    unsafe impl Kernel for WidenedKernel {
        const PARTS: usize = 2;
        common!();
        float32!();

        #[inline(always)]
        unsafe fn load_weights(from: *const u32, part: usize) -> __m512 {
            // SAFETY: the caller's promise.
            unsafe {
                let pairs = _mm512_loadu_si512(from.cast());
                _mm512_castsi512_ps(if part == 0 {
                    _mm512_slli_epi32::<16>(pairs)
                } else {
                    _mm512_and_si512(pairs, _mm512_set1_epi32(!0xffff))
                })
            }
        }
    }
}
