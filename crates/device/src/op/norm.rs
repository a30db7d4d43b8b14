//! Normalisation of rows.

use super::{Accesses, expect, same_rows};
use crate::{Buffer, DeviceError, Weight, WeightShape};

/// Which norm.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NormKind {
    /// `x / √(mean(x²) + eps)`.
    Rms,
    /// `(x − mean(x)) / √(var(x) + eps)`.
    Layer,
}

/// `out[m] = round(norm(x[m])) ⊙ weight`, computed in float32 and rounded to the buffer's format before the
/// weight is applied, as the published models do.
#[derive(Clone, Debug)]
pub struct Norm {
    /// Which norm.
    pub kind: NormKind,
    /// Input `[M, W]`.
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
        expect("norm", "output", &self.out, self.x.dtype, self.x.width)?;
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
