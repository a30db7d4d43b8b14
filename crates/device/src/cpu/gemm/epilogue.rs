//! What happens to a tile's sums before they are stored. Plain Rust without branches, inlined into
//! functions that enable wide vectors, so that the compiler vectorises it; every operation is an IEEE
//! one, so the bits do not depend on the vector width.

use super::kernel::VECTORS;
use crate::threaded::Element;
use half::bf16;
use std::slice;

/// The sums of a tile and where they go.
#[derive(Clone, Copy)]
pub(crate) struct Finish<'a, T> {
    /// Sums `[rows, 2 · lanes]`.
    pub sums: &'a [f32],
    /// Whether the second half of a row is up and the first its gate, so that `silu(gate) · up` is stored.
    pub gated: bool,
    /// What is added to the columns that are stored.
    pub bias: Option<&'a [f32]>,
    /// Where the first row goes.
    pub out: *mut T,
    /// Elements from there to where the next row goes.
    pub stride: usize,
    /// Columns that are stored; the others are padding.
    pub columns: usize,
}

impl<'a, T> Finish<'a, T> {
    /// The same with outputs of type `U`, which is `T` by another name.
    pub(crate) fn cast<U>(self) -> Finish<'a, U> {
        let Finish { sums, gated, bias, out, stride, columns } = self;
        Finish { sums, gated, bias, out: out.cast(), stride, columns }
    }
}

/// Stores the sums of a tile.
///
/// # Safety
/// At `out`, and `stride` elements on for each further row of the sums, `columns` elements may be written.
#[inline(always)]
pub(crate) unsafe fn store<T: Element, const LANES: usize>(finish: &Finish<'_, T>) {
    let (vectors, _) = finish.sums.as_chunks::<LANES>();
    for (row, sums) in vectors.as_chunks::<VECTORS>().0.iter().enumerate() {
        // SAFETY: the caller's promise.
        let out = unsafe { slice::from_raw_parts_mut(finish.out.add(row * finish.stride), finish.columns) };
        for (vector, out) in out.chunks_mut(LANES).enumerate() {
            let mut values = sums[vector];
            if finish.gated {
                let [gates, ups] = sums;
                for lane in 0..LANES {
                    values[lane] = silu(gates[lane]) * ups[lane];
                }
            }
            if let Some(bias) = finish.bias {
                values.iter_mut().zip(&bias[vector * LANES..]).for_each(|(value, bias)| *value += bias);
            }
            match <&mut [T; LANES]>::try_from(&mut *out) {
                Ok(out) => {
                    for lane in 0..LANES {
                        out[lane] = T::from_f32(values[lane]);
                    }
                }
                // The last columns of a matrix.
                Err(_) => out.iter_mut().zip(values).for_each(|(out, value)| *out = T::from_f32(value)),
            }
        }
    }
}

/// `x · sigmoid(x)`.
#[inline(always)]
fn silu(x: f32) -> f32 {
    x / (1.0 + exp(-x))
}

/// `eˣ` with a relative error below 2e-7; `x` is clamped to ±87, inside which the result is normal.
///
/// `x = n·ln 2 + r` with `n` an integer and `|r| ≤ ln 2 / 2`; `eʳ` is its Taylor polynomial and `2ⁿ`
/// is made from its exponent bits.
#[inline(always)]
pub(crate) fn exp(x: f32) -> f32 {
    /// Adding it to a small number leaves the nearest integer in the low bits.
    const ROUND: f32 = 12_582_912.0; // 1.5 · 2²³
    /// `ln 2` in two parts, the first with so few bits that `n` times it is exact.
    const LN_2_HIGH: f32 = 0.693_359_4;
    const LN_2_LOW: f32 = -2.121_944_4e-4;

    let x = x.clamp(-87.0, 87.0);
    let shifted = x * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = x - n * LN_2_HIGH - n * LN_2_LOW;
    let mut power = 1.0 / 5040.0;
    for coefficient in [1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0] {
        power = power * r + coefficient;
    }
    let two_to_n = f32::from_bits(shifted.to_bits().wrapping_add(127) << 23);
    power * two_to_n
}

/// Rounds to the nearest bf16, ties to even; NaN stays NaN.
#[inline(always)]
pub(crate) fn round_to_bf16(from: &[f32], to: &mut [bf16]) {
    for (from, to) in from.iter().zip(to) {
        *to = <bf16 as Element>::from_f32(*from);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_and_silu_are_accurate() {
        for step in -8700..=8700 {
            let x = step as f32 * 0.01;
            let exact = f64::from(x).exp();
            let error = (f64::from(exp(x)) - exact).abs() / exact;
            assert!(error < 2e-7, "exp({x}): relative error {error:e}");
        }
        assert_eq!(silu(0.0), 0.0);
        assert_eq!(silu(f32::INFINITY), f32::INFINITY);
        assert_eq!(silu(200.0), 200.0);
        assert!(silu(-200.0).abs() < 1e-30);
        assert!(silu(f32::NAN).is_nan());
    }

    #[test]
    fn bf16_rounding_agrees_with_half() {
        let mut bits = 1_u32;
        for _ in 0..100_000 {
            bits = bits.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            let value = f32::from_bits(bits);
            let mut rounded = [bf16::ZERO];
            round_to_bf16(&[value], &mut rounded);
            let expected = bf16::from_f32(value);
            assert!(rounded[0].to_bits() == expected.to_bits() || value.is_nan());
            assert_eq!(rounded[0].is_nan(), value.is_nan());
        }
    }
}
