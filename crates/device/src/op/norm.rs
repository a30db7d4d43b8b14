//! Normalisation of rows.

use super::{Accesses, expect_wide, same_rows};
use crate::{Buffer, DeviceError, Weight, WeightShape};

/// Which norm.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NormKind {
    /// `x / √(mean(x²) + eps)`.
    Rms,
    /// `(x − mean(x)) / √(var(x) + eps)`.
    Layer,
}

/// `out[m] = norm(x[m]) ⊙ weight`, computed in float32 and rounded once. (Published code rounds before it applies
/// the weight as well, which in bfloat16 makes up a quarter of a model's error.)
#[derive(Clone, Debug)]
pub struct Norm {
    /// Which norm.
    pub kind: NormKind,
    /// Input `[M, W]`, in the output's format or float32.
    pub x: Buffer,
    /// Scale, `W` elements.
    pub weight: Weight,
    /// Added under the root.
    pub eps: f32,
    /// Output `[M, W]`, another buffer than the input.
    pub out: Buffer,
}

impl Norm {
    pub(super) fn check(&self) -> Result<(), DeviceError> {
        same_rows("norm", &[&self.x, &self.out])?;
        expect_wide("norm", "input", &self.x, self.out.dtype, self.out.width)?;
        if self.weight.shape != (WeightShape::Vector { n: self.x.width }) {
            return Err(DeviceError::Shape(format!(
                "norm: {} is {:?}, the input {:?}",
                self.weight.name, self.weight.shape, self.x
            )));
        }
        Ok(())
    }

    pub(super) fn accesses(&self) -> Accesses {
        Accesses::new().read(&self.x).write(&self.out)
    }
}
