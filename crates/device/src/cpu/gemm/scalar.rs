//! Portable Rust: 4 lanes in an array, tiles of up to 4 rows; multiply and add round separately.

use super::ElementType;
use super::kernel::{Functions, Kernel, functions};

pub(super) fn functions(element: ElementType) -> &'static Functions {
    match element {
        ElementType::F32 => &F32,
        ElementType::Bf16 => &BF16,
    }
}

functions!(F32, F32Kernel, , rows: 1 2 3 4, of pairs: );
functions!(BF16, Bf16Kernel, , rows: 1 2 3 4, of pairs: );

/// f32 × f32.
struct F32Kernel;
/// bf16 pairs widened to f32, low half first.
struct Bf16Kernel;

const LANES: usize = 4;

/// The methods that are the same for both.
macro_rules! common {
    () => {
        type Sums = [f32; LANES];
        type Weights = [u32; LANES];
        type Activation = u32;
        const LANES: usize = LANES;
        const ROWS_TO_L1: usize = usize::MAX;
        const ROWS_TO_UNROLL: usize = usize::MAX;

        #[inline(always)]
        unsafe fn zero_sums() -> [f32; LANES] {
            [0.0; LANES]
        }

        #[inline(always)]
        unsafe fn load_sums(from: *const f32) -> [f32; LANES] {
            // SAFETY: the caller's promise; an array needs no more alignment than its elements.
            unsafe { *from.cast() }
        }

        #[inline(always)]
        unsafe fn store_sums(to: *mut f32, sums: [f32; LANES]) {
            // SAFETY: the caller's promise; an array needs no more alignment than its elements.
            unsafe { *to.cast() = sums }
        }

        #[inline(always)]
        unsafe fn load_weights(from: *const u32) -> [u32; LANES] {
            // SAFETY: the caller's promise; an array needs no more alignment than its elements.
            unsafe { *from.cast() }
        }

        #[inline(always)]
        unsafe fn load_activation(from: *const u32) -> u32 {
            // SAFETY: the caller's promise.
            unsafe { *from }
        }

        #[inline(always)]
        fn prefetch_to_l1(_: *const u8) {}

        #[inline(always)]
        fn prefetch_to_l2(_: *const u8) {}
    };
}

// SAFETY: uses no special instructions.
unsafe impl Kernel for F32Kernel {
    common!();

    #[inline(always)]
    unsafe fn multiply_add(sums: [f32; LANES], activation: u32, weights: [u32; LANES]) -> [f32; LANES] {
        std::array::from_fn(|lane| sums[lane] + f32::from_bits(activation) * f32::from_bits(weights[lane]))
    }
}

// SAFETY: uses no special instructions.
unsafe impl Kernel for Bf16Kernel {
    common!();

    #[inline(always)]
    unsafe fn multiply_add(sums: [f32; LANES], activation: u32, weights: [u32; LANES]) -> [f32; LANES] {
        let low = |pair: u32| f32::from_bits(pair << 16);
        let high = |pair: u32| f32::from_bits(pair & !0xffff);
        std::array::from_fn(|lane| {
            let sum = sums[lane] + low(activation) * low(weights[lane]);
            sum + high(activation) * high(weights[lane])
        })
    }
}
