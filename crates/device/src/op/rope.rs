//! Rotary position embedding (RoFormer, arXiv 2104.09864): the angles once per step, the rotation per layer.

use super::{Accesses, expect, same_rows};
use crate::{Buffer, DeviceError, Weight, WeightShape};
use epsmoe_base::DType;

/// A factor that grows with the position `p`, in steps: `1 + rate · ln(1 + ⌊(p + 1) / step⌋)` (arXiv 2501.19399).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Growth {
    /// Positions of a step.
    pub step: f32,
    /// How fast it grows.
    pub rate: f32,
}

impl Growth {
    /// The factor at a position.
    pub fn at(self, position: f32) -> f32 {
        1.0 + self.rate * ((position + 1.0) / self.step).floor().ln_1p()
    }
}

/// `out[t] = scale · (cos(p·f₀) … cos(p·f_{d/2−1}), sin(p·f₀) … sin(p·f_{d/2−1}))` with `p = positions[t]`, times the growth.
#[derive(Clone, Debug)]
pub struct RopeTable {
    /// Position of each token `[T, 1]`, uint32.
    pub positions: Buffer,
    /// Inverse frequencies, `d/2` elements.
    pub frequencies: Weight,
    /// Attention factor of scaled rotary embeddings; 1 otherwise.
    pub scale: f32,
    /// A further factor, if there is one.
    pub growth: Option<Growth>,
    /// Cosines, then sines, `[T, d]`, float32.
    pub out: Buffer,
}

impl RopeTable {
    pub(super) fn check(&self) -> Result<(), DeviceError> {
        same_rows("rope_table", &[&self.positions, &self.out])?;
        expect("rope_table", "positions", &self.positions, DType::U32, 1)?;
        let WeightShape::Vector { n } = self.frequencies.shape else {
            return Err(DeviceError::Shape(format!("rope_table: {} is no vector", self.frequencies.name)));
        };
        expect("rope_table", "output", &self.out, DType::F32, 2 * n)
    }

    pub(super) fn accesses(&self) -> Accesses {
        Accesses::new().read(&self.positions).read_weights([&self.frequencies]).write(&self.out)
    }
}

/// Which elements of a head form a pair.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RopeStyle {
    /// Element `i` with element `i + d/2`.
    HalfSplit,
    /// Element `2i` with element `2i + 1`.
    Interleaved,
}

/// In every head of every row, turns the `d` elements from `start` on by the row's angles, in place:
/// `(a, b) → (a·cos − b·sin, b·cos + a·sin)`.
#[derive(Clone, Debug)]
pub struct Rotate {
    /// Rows of heads `[T, heads · head_width]`.
    pub x: Buffer,
    /// Elements of a head.
    pub head_width: usize,
    /// First rotated element of a head.
    pub start: usize,
    /// How pairs are formed.
    pub style: RopeStyle,
    /// Cosines and sines `[T, d]`, float32.
    pub rope_table: Buffer,
}

impl Rotate {
    pub(super) fn check(&self) -> Result<(), DeviceError> {
        same_rows("rotate", &[&self.x, &self.rope_table])?;
        expect("rotate", "rope_table", &self.rope_table, DType::F32, self.rope_table.width)?;
        let dims = self.rope_table.width;
        let fits = self.head_width > 0
            && self.x.width.is_multiple_of(self.head_width)
            && dims.is_multiple_of(2)
            && self.start + dims <= self.head_width;
        if !fits {
            return Err(DeviceError::Shape(format!(
                "rotate: {:?} in heads of {} cannot turn elements {}..{}",
                self.x,
                self.head_width,
                self.start,
                self.start + dims
            )));
        }
        Ok(())
    }

    pub(super) fn accesses(&self) -> Accesses {
        Accesses::new().read(&self.rope_table).write(&self.x)
    }
}
