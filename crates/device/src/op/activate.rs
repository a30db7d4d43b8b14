//! What experts do between their products where it is more than these do themselves: biases, and other activations than
//! `silu(gate) ⊙ up`.

use super::{Accesses, expect, expect_wide, same_rows};
use crate::{Buffer, DeviceError, Weight, WeightShape};
use epsmoe_base::DType;

/// What becomes of what the maps into an MLP's inner width give.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Activation {
    /// Of gates and other factors.
    Swish(Swish),
    /// `max(x, 0)²` of the one map there is.
    SquaredRelu,
}

impl Activation {
    /// Numbers that an element of the inner width is made of.
    pub const fn factors(&self) -> usize {
        match self {
            Activation::Swish(_) => 2,
            Activation::SquaredRelu => 1,
        }
    }
}

/// A gated activation, with `c = min(g, limit)`: `c · sigmoid(alpha · (c + cubic · c³)) · (max(−limit, min(u, limit)) + shift)`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Swish {
    /// Factor inside the sigmoid.
    pub alpha: f32,
    /// What the cube of the gate counts there.
    pub cubic: f32,
    /// Largest gate, and largest magnitude of the other factor.
    pub limit: f32,
    /// Added to the other factor.
    pub shift: f32,
}

impl Swish {
    /// The approximation of GELU by a tanh: `½g · (1 + tanh(√(2/π) · (g + 0.044715 g³))) · u`.
    pub const GELU_TANH: Swish = Swish {
        alpha: (2.0 * std::f64::consts::FRAC_2_SQRT_PI * std::f64::consts::FRAC_1_SQRT_2) as f32,
        cubic: 0.044_715,
        limit: f32::INFINITY,
        shift: 0.0,
    };
}

/// A bias for rows that are sorted by slot: row `m` has that of slot `l` where `starts[l] ≤ m + first < starts[l + 1]`.
#[derive(Clone, Debug)]
pub struct SlotBias {
    /// The biases of all slots, one after the other: `L · W` elements.
    pub bias: Weight,
    /// Where the rows of each slot start, and the end `[L + 1, 1]`, uint32, ascending.
    pub starts: Buffer,
    /// What the first row counts as.
    pub first: usize,
}

impl SlotBias {
    fn check(&self, op: &str, width: usize) -> Result<(), DeviceError> {
        expect(op, "starts", &self.starts, DType::U32, 1)?;
        let n = self.starts.rows.saturating_sub(1) * width;
        if self.starts.rows > 0 && self.bias.shape == (WeightShape::Vector { n }) {
            return Ok(());
        }
        Err(DeviceError::Shape(format!(
            "{op}: bias {} is {:?}, but {:?} delimits slots of rows of {width}",
            self.bias.name, self.bias.shape, self.starts
        )))
    }
}

/// `out[m] = swish(x[m, ..I] + bias[..I], x[m, I..] + bias[I..])`: gates first, then the other factors; or
/// `out[m] = max(x[m] + bias, 0)²`.
#[derive(Clone, Debug)]
pub struct Activate {
    /// Gates and other factors `[M, 2I]`, or what there is of one map `[M, I]`, in the output's format or float32.
    pub x: Buffer,
    /// Added before, as many elements a slot, if the experts have biases.
    pub bias: Option<SlotBias>,
    /// The activation.
    pub activation: Activation,
    /// Output `[M, I]`.
    pub out: Buffer,
}

impl Activate {
    pub(super) fn check(&self) -> Result<(), DeviceError> {
        same_rows("activate", &[&self.x, &self.out])?;
        expect_wide(
            "activate",
            "input",
            &self.x,
            self.out.dtype,
            self.activation.factors() * self.out.width,
        )?;
        self.bias.as_ref().map_or(Ok(()), |bias| bias.check("activate", self.x.width))
    }

    pub(super) fn accesses(&self) -> Accesses {
        let reads = Accesses::new().read(&self.x);
        let reads = match &self.bias {
            Some(bias) => reads.read(&bias.starts).read_weights([&bias.bias]),
            None => reads,
        };
        reads.write(&self.out)
    }
}

/// `x[m] = x[m] + bias`, in place, each row the bias of its slot.
#[derive(Clone, Debug)]
pub struct AddSlotBias {
    /// The rows `[M, W]`.
    pub x: Buffer,
    /// `W` elements a slot.
    pub bias: SlotBias,
}

impl AddSlotBias {
    pub(super) fn check(&self) -> Result<(), DeviceError> {
        self.bias.check("add_slot_bias", self.x.width)
    }

    pub(super) fn accesses(&self) -> Accesses {
        Accesses::new().read(&self.bias.starts).read_weights([&self.bias.bias]).write(&self.x)
    }
}
