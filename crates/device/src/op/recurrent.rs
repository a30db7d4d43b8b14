//! Layers that carry a state from token to token instead of looking back at all of them: a short convolution, and the
//! rules by which states go on; and gates.

use super::{Accesses, expect, expect_wide, same_rows};
use crate::{Buffer, DeviceError, Weight, WeightShape};
use epsmoe_base::DType;

/// Whose states a batch goes on from, and where it leaves them.
#[derive(Clone, Debug)]
pub struct Carried {
    /// First new token of each sequence, and the total, `[B + 1, 1]`, uint32.
    pub sequence_starts: Buffer,
    /// Position of each new token in its sequence `[T, 1]`, uint32: consecutive in a sequence. What lies before position 0
    /// is zero.
    pub positions: Buffer,
    /// `[B, 4]`, uint32: the slot that each sequence's state is read from, and the one that it is left in; then one more, in
    /// which it is left as it is behind so many of the new tokens, and how many those are: 0 where it is left in no other. No
    /// sequence leaves its state where another reads or leaves one, nor in the third slot over what it reads.
    pub slots: Buffer,
}

impl Carried {
    fn check(&self, op: &str, tokens: &Buffer) -> Result<(), DeviceError> {
        same_rows(op, &[tokens, &self.positions])?;
        expect(op, "positions", &self.positions, DType::U32, 1)?;
        expect(op, "sequence starts", &self.sequence_starts, DType::U32, 1)?;
        expect(op, "slots", &self.slots, DType::U32, 4)?;
        if self.sequence_starts.rows != self.slots.rows + 1 {
            return Err(DeviceError::Shape(format!(
                "{op}: {:?} does not delimit the sequences of {:?}",
                self.sequence_starts, self.slots
            )));
        }
        Ok(())
    }

    fn read(&self, accesses: Accesses) -> Accesses {
        accesses.read(&self.sequence_starts).read(&self.positions).read(&self.slots)
    }
}

/// A causal convolution over each sequence, column by column, over K tokens:
/// `out[t, c] = silu( Σ_k weight[c, k] · x[t − K + 1 + k, c] + bias[c] )`.
/// A sequence's state is its last K − 1 rows of x, the oldest first.
#[derive(Clone, Debug)]
pub struct ShortConv {
    /// New rows `[T, W]`.
    pub x: Buffer,
    /// `W · K` elements, those of a column together.
    pub weight: Weight,
    /// `W` elements, if it has a bias.
    pub bias: Option<Weight>,
    /// The sequences.
    pub carried: Carried,
    /// `[slots · (K − 1), W]`, in x's format.
    pub states: Buffer,
    /// Output `[T, W]`, elsewhere, in x's format or float32.
    pub out: Buffer,
}

impl ShortConv {
    /// Tokens that an output depends on, K.
    pub fn taps(&self) -> usize {
        self.weight.shape.parameters() / self.x.width.max(1)
    }

    pub(super) fn check(&self) -> Result<(), DeviceError> {
        same_rows("short_conv", &[&self.x, &self.out])?;
        expect_wide("short_conv", "output", &self.out, self.x.dtype, self.x.width)?;
        expect("short_conv", "states", &self.states, self.x.dtype, self.x.width)?;
        self.carried.check("short_conv", &self.x)?;
        let taps = self.taps();
        let fits = self.weight.shape == (WeightShape::Vector { n: taps * self.x.width });
        if !fits || taps < 2 || !self.states.rows.is_multiple_of(taps - 1) {
            return Err(DeviceError::Shape(format!(
                "short_conv: weight {} is {:?}, for rows of {} and {:?}",
                self.weight.name, self.weight.shape, self.x.width, self.states
            )));
        }
        match &self.bias {
            Some(bias) => of_heads("short_conv", [bias], self.x.width, "columns"),
            None => Ok(()),
        }
    }

    pub(super) fn accesses(&self) -> Accesses {
        self.carried
            .read(Accesses::new().read(&self.x))
            .read_weights([&self.weight])
            .read_weights(&self.bias)
            .write(&self.states)
            .write(&self.out)
    }
}

/// How a state goes on by a token, after `s = softplus(a + bias)` and `S ← exp(−exp(decay) · s) · S`.
#[derive(Clone, Debug)]
pub enum Rule {
    /// The gated delta rule (arXiv 2412.06464), with `q̂ = q / (√key_width · √(|q|² + ε))` and `k̂ = k / √(|k|² + ε)`:
    /// `S ← S + k̂ ⊗ sigmoid(b) · (v − k̂ᵀS);  out = q̂ᵀS`.
    Delta,
    /// That of state spaces (Mamba-2, arXiv 2405.21060), where `s` is at least `floor`:
    /// `S ← S + k ⊗ s · v;  out = qᵀS + skip · v`. Its papers call the query C, the key B and the value x.
    StateSpace {
        /// `value_heads` elements.
        skip: Weight,
        /// Least `s`.
        floor: f32,
    },
}

impl Rule {
    /// Numbers that weigh a token for each value head: `b` if there is one, and `a`.
    fn gates(&self) -> usize {
        match self {
            Rule::Delta => 2,
            Rule::StateSpace { .. } => 1,
        }
    }
}

/// Layers that carry a state. Each value head has a state `S` of `[key_width, value_width]`, and looks at it with the query
/// and key of one key head, of which `value_heads / key_heads` in turn share one. Token by token it goes on by its
/// [`Rule`], in float32, which states are kept in: one token after the other, so that no bit depends on how a sequence
/// was cut.
#[derive(Clone, Debug)]
pub struct Recurrence {
    /// How it goes on.
    pub rule: Rule,
    /// Queries and keys of all key heads, then the values of all value heads,
    /// `[T, 2 · key_heads · key_width + value_heads · value_width]`.
    pub x: Buffer,
    /// `b` of each value head, if the rule has one, then `a` of each, `[T, value_heads]` or twice that, float32.
    pub gates: Buffer,
    /// `value_heads` elements.
    pub decay: Weight,
    /// `value_heads` elements.
    pub bias: Weight,
    /// Key heads.
    pub key_heads: usize,
    /// Elements of a query or key.
    pub key_width: usize,
    /// The sequences.
    pub carried: Carried,
    /// `[slots · value_heads, key_width · value_width]`, float32.
    pub states: Buffer,
    /// Output `[T, value_heads · value_width]`, float32.
    pub out: Buffer,
}

impl Recurrence {
    /// ε.
    pub const EPSILON: f32 = 1e-6;

    /// Value heads.
    pub fn value_heads(&self) -> usize {
        self.gates.width / self.rule.gates()
    }

    /// Elements of a value.
    pub fn value_width(&self) -> usize {
        self.out.width / self.value_heads().max(1)
    }

    fn skip(&self) -> Option<&Weight> {
        match &self.rule {
            Rule::Delta => None,
            Rule::StateSpace { skip, .. } => Some(skip),
        }
    }

    pub(super) fn check(&self) -> Result<(), DeviceError> {
        same_rows("recurrence", &[&self.x, &self.gates, &self.out])?;
        self.carried.check("recurrence", &self.x)?;
        let (heads, key_heads) = (self.value_heads(), self.key_heads);
        if key_heads == 0 || heads == 0 || !heads.is_multiple_of(key_heads) || self.key_width == 0 {
            return Err(DeviceError::Shape(format!(
                "recurrence: {heads} value heads over {key_heads} key heads of {}",
                self.key_width
            )));
        }
        let values = heads * self.value_width();
        expect("recurrence", "gates", &self.gates, DType::F32, self.rule.gates() * heads)?;
        expect("recurrence", "output", &self.out, DType::F32, values)?;
        let width = 2 * key_heads * self.key_width + values;
        expect("recurrence", "queries, keys and values", &self.x, self.x.dtype, width)?;
        let state = self.key_width * self.value_width();
        expect("recurrence", "states", &self.states, DType::F32, state)?;
        of_heads(
            "recurrence",
            [&self.decay, &self.bias].into_iter().chain(self.skip()),
            heads,
            "value heads",
        )?;
        if !self.states.rows.is_multiple_of(heads) {
            return Err(DeviceError::Shape(format!(
                "recurrence: {:?} are no states of {heads} value heads",
                self.states
            )));
        }
        Ok(())
    }

    pub(super) fn accesses(&self) -> Accesses {
        self.carried
            .read(Accesses::new().read(&self.x).read(&self.gates))
            .read_weights([&self.decay, &self.bias].into_iter().chain(self.skip()))
            .write(&self.states)
            .write(&self.out)
    }
}

/// Vectors with an element for each of so many.
fn of_heads<'a>(
    op: &str,
    vectors: impl IntoIterator<Item = &'a Weight>,
    count: usize,
    of: &str,
) -> Result<(), DeviceError> {
    match vectors.into_iter().find(|vector| vector.shape != (WeightShape::Vector { n: count })) {
        Some(Weight { name, shape, .. }) => {
            Err(DeviceError::Shape(format!("{op}: {name} is {shape:?}, but there are {count} {of}")))
        }
        None => Ok(()),
    }
}

/// What a gate becomes before it is multiplied with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Gating {
    /// `sigmoid(gate)`.
    Sigmoid,
    /// `gate · sigmoid(gate)`.
    Silu,
}

/// `out = gating(gate) ⊙ x`.
#[derive(Clone, Debug)]
pub struct Gate {
    /// One number for each element `[M, W]`.
    pub gate: Buffer,
    /// What becomes of it.
    pub gating: Gating,
    /// What is multiplied `[M, W]`, in the gate's format or float32.
    pub x: Buffer,
    /// Output `[M, W]`, elsewhere, in the gate's format.
    pub out: Buffer,
}

impl Gate {
    pub(super) fn check(&self) -> Result<(), DeviceError> {
        same_rows("gate", &[&self.gate, &self.x, &self.out])?;
        expect("gate", "output", &self.out, self.gate.dtype, self.gate.width)?;
        expect_wide("gate", "what is multiplied", &self.x, self.gate.dtype, self.gate.width)
    }

    pub(super) fn accesses(&self) -> Accesses {
        Accesses::new().read(&self.gate).read(&self.x).write(&self.out)
    }
}
