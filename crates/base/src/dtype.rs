//! Number formats, and how close two computations in one of them must be.

use serde::{Deserialize, Serialize};
use std::fmt;

/// A number format that buffers and checkpoint tensors are stored in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum DType {
    /// IEEE single precision.
    F32,
    /// bfloat16: eight bits of exponent, seven of fraction.
    BF16,
    /// IEEE half precision; only read from checkpoints, never computed in.
    F16,
    /// Indices and ids.
    U32,
    /// FP8: a sign, four bits of exponent, three of fraction; what keys and values may be cached in, never computed in.
    E4M3,
}

impl DType {
    /// Bytes of one element.
    pub const fn bytes(self) -> usize {
        match self {
            DType::F32 | DType::U32 => 4,
            DType::BF16 | DType::F16 => 2,
            DType::E4M3 => 1,
        }
    }

    /// How far a fast computation in this format may be from the plain reference. Written here once; no
    /// test has a number of its own.
    pub const fn tolerance(self) -> Tolerance {
        match self {
            DType::F32 => Tolerance { absolute: 1e-4, relative: 1e-4 },
            DType::BF16 => Tolerance { absolute: 2e-2, relative: 2e-2 },
            DType::F16 => Tolerance { absolute: 4e-3, relative: 4e-3 },
            DType::E4M3 => Tolerance { absolute: 1e-3, relative: 0.0625 },
            DType::U32 => Tolerance { absolute: 0.0, relative: 0.0 },
        }
    }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            DType::F32 => "float32",
            DType::BF16 => "bfloat16",
            DType::F16 => "float16",
            DType::U32 => "uint32",
            DType::E4M3 => "float8_e4m3",
        })
    }
}

/// What keys and values are asked to be cached in.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum CacheDType {
    /// What activations are in.
    #[default]
    Auto,
    /// [`DType::E4M3`]: a byte for each number.
    Fp8,
}

impl CacheDType {
    /// The format of the cache, where activations are in `dtype`.
    pub const fn of(self, dtype: DType) -> DType {
        match self {
            CacheDType::Auto => dtype,
            CacheDType::Fp8 => DType::E4M3,
        }
    }
}

/// `|a - b| <= absolute + relative * |b|`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Tolerance {
    /// Allowed difference near zero.
    pub absolute: f32,
    /// Allowed difference per unit of the reference's magnitude.
    pub relative: f32,
}

impl Tolerance {
    /// Position and values of the first element out of tolerance; NaN never passes.
    pub fn first_violation(self, got: &[f32], want: &[f32]) -> Option<(usize, f32, f32)> {
        assert_eq!(got.len(), want.len(), "tensors of different length cannot be compared");
        got.iter().zip(want).enumerate().find_map(|(i, (&g, &w))| {
            let within = (g - w).abs() <= self.absolute + self.relative * w.abs();
            (!within).then_some((i, g, w))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nan_and_distance_are_violations() {
        let tolerance = DType::F32.tolerance();
        assert_eq!(tolerance.first_violation(&[1.0, 2.0], &[1.0, 2.00001]), None);
        assert!(tolerance.first_violation(&[f32::NAN], &[0.0]).is_some());
        assert_eq!(tolerance.first_violation(&[1.0, 2.1], &[1.0, 2.0]), Some((1, 2.1, 2.0)));
    }
}
