//! Portable Rust: 4 lanes in an array, tiles of up to 4 rows; multiply and add round separately.

use super::ElementType;
use super::coded::decode_portable;
use super::kernel::{Functions, Kernel, functions};

pub(super) fn functions(element: ElementType) -> &'static Functions {
    match element {
        ElementType::F32 => &F32,
        ElementType::Bf16 => &BF16,
    }
}

functions!(F32, F32Kernel, , decode_portable, rows: 1 2 3 4, of pairs: );
functions!(BF16, WidenedKernel, , decode_portable, rows: 1 2 3 4, of pairs: );

/// f32 × f32.
struct F32Kernel;
/// bf16 pairs widened to f32, low half first.
struct WidenedKernel;

const LANES: usize = 4;

/// The methods that are the same for both.
macro_rules! common {
    () => {
        type Sums = [f32; LANES];
        type Weights = [f32; LANES];
        type Activation = f32;
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
        unsafe fn load_activation(from: *const u32) -> f32 {
            // SAFETY: the caller's promise.
            unsafe { *from.cast() }
        }

        #[inline(always)]
        unsafe fn multiply_add(sums: [f32; LANES], activation: f32, weights: [f32; LANES]) -> [f32; LANES] {
            std::array::from_fn(|lane| sums[lane] + activation * weights[lane])
        }

        #[inline(always)]
        fn prefetch_to_l1(_: *const u8) {}

        #[inline(always)]
        fn prefetch_to_l2(_: *const u8) {}
    };
}

// SAFETY: uses no special instructions.
unsafe impl Kernel for F32Kernel {
    const PARTS: usize = 1;
    common!();

    #[inline(always)]
    unsafe fn load_weights(from: *const u32, _: usize) -> [f32; LANES] {
        // SAFETY: the caller's promise; an array needs no more alignment than its elements.
        unsafe { *from.cast() }
    }
}

// SAFETY: uses no special instructions.
unsafe impl Kernel for WidenedKernel {
    const PARTS: usize = 2;
    common!();

    #[inline(always)]
    unsafe fn load_weights(from: *const u32, part: usize) -> [f32; LANES] {
        // SAFETY: the caller's promise; an array needs no more alignment than its elements.
        let pairs: [u32; LANES] = unsafe { *from.cast() };
        pairs.map(|pair| f32::from_bits(if part == 0 { pair << 16 } else { pair & !0xffff }))
    }
}
