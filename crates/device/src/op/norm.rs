//! Normalisation of rows.

use super::{Accesses, Add, Rotate, expect, expect_wide, same_rows};
use crate::{Buffer, DeviceError, Weight, WeightShape};
use epsmoe_base::{Place, RowFormat};

/// Which norm.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NormKind {
    /// `x / √(mean(x²) + eps)`.
    Rms,
    /// `(x − mean(x)) / √(var(x) + eps)`.
    Layer,
}

/// `out[m] = norm(x[m]) ⊙ weight + bias`, computed in float32 and rounded once. (Published code rounds before it applies
/// the weight as well, which in bfloat16 makes up a quarter of a model's error.)
///
/// A row whose squares have no finite sum holds a NaN, an infinity, or a number that cannot be squared. It stops the
/// world: so a norm of the residual stream finds what the layer before it made.
#[derive(Clone, Debug)]
pub struct Norm {
    /// Which norm.
    pub kind: NormKind,
    /// Input `[M, W]`, in the output's format or float32.
    pub x: Buffer,
    /// Scale, `W` elements; or of G rows that follow each other, those of each, `G · W`.
    pub weight: Weight,
    /// Added last, as many elements, if the norm has a bias.
    pub bias: Option<Weight>,
    /// Added under the root.
    pub eps: f32,
    /// Output `[M, W]`, another buffer than the input.
    pub out: Buffer,
    /// The output also as FP8 codes with their scales `[M, words of W]`, as [`GatherFp8`](super::GatherFp8) makes them of it, if it is
    /// wanted so.
    pub codes: Option<Buffer>,
    /// What last wrote the input; named, instead of the norm itself, where a row is not finite.
    pub origin: Option<Origin>,
}

/// Who wrote a buffer: a part of a model, and where in the model it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Origin {
    /// The layer, for the fault's place.
    pub place: Place,
    /// The part, for its message.
    pub part: &'static str,
}

/// What to say of a row that is not finite.
pub(crate) fn not_finite(row: usize, buffer: &Buffer, origin: Option<Origin>) -> String {
    let origin = origin.map_or_else(String::new, |origin| format!(", made by {},", origin.part));
    format!(
        "row {row} of {}{origin} is not finite (a NaN, an infinity, or numbers whose squares are): the weights are \
         damaged, or too large for the format they are computed in (--dtype)",
        buffer.name
    )
}

impl Norm {
    pub(super) fn check(&self) -> Result<(), DeviceError> {
        same_rows("norm", &[&self.x, &self.out])?;
        expect_wide("norm", "input", &self.x, self.out.dtype, self.out.width)?;
        if let Some(codes) = &self.codes {
            same_rows("norm", &[&self.out, codes])?;
            let (dtype, words) = RowFormat::Fp8.elements(self.out.width);
            expect("norm", "codes", codes, dtype, words)?;
        }
        let n = self.groups() * self.x.width;
        let fits = |vector: &&Weight| n > 0 && vector.shape == (WeightShape::Vector { n });
        match [&self.weight].into_iter().chain(&self.bias).find(|vector| !fits(vector)) {
            Some(Weight { name, shape, .. }) => {
                Err(DeviceError::Shape(format!("norm: {name} is {shape:?}, the input {:?}", self.x)))
            }
            None => Ok(()),
        }
    }

    /// Rows whose weights differ, G: row m has those of row m modulo G.
    pub(crate) fn groups(&self) -> usize {
        self.weight.shape.parameters() / self.x.width.max(1)
    }

    pub(super) fn accesses(&self) -> Accesses {
        let reads = Accesses::new().read(&self.x).read_weights([&self.weight]).read_weights(&self.bias);
        self.writes(reads)
    }

    /// What it writes, beside what else is touched.
    fn writes(&self, accesses: Accesses) -> Accesses {
        self.codes.iter().fold(accesses.write(&self.out), Accesses::write)
    }
}

/// [`Add`] to a stream, then the [`Norm`] of the stream: the bits of the two, in one pass where a processor can.
#[derive(Clone, Debug)]
pub struct AddNorm {
    /// Into the stream.
    pub add: Add,
    /// Of what it becomes: `norm.x` is `add.out`.
    pub norm: Norm,
}

impl AddNorm {
    pub(super) fn check(&self) -> Result<(), DeviceError> {
        self.add.check()?;
        self.norm.check()?;
        if self.norm.x != self.add.out {
            return Err(DeviceError::Shape(format!(
                "add_norm: the norm of {:?} is not of the sum {:?}",
                self.norm.x, self.add.out
            )));
        }
        Ok(())
    }

    pub(super) fn accesses(&self) -> Accesses {
        let reads = Accesses::new().read(&self.add.x).write(&self.add.out);
        self.norm.writes(reads.read_weights([&self.norm.weight]).read_weights(&self.norm.bias))
    }
}

/// [`Norm`] of every head of every token, which then [`Rotate`] turns, of queries and of keys: the bits of the two, in one pass where
/// a processor can.
#[derive(Clone, Debug)]
pub struct NormRotate {
    /// At most two, of the same formats.
    pub parts: Vec<TurnedNorm>,
}

/// Heads that are normed and turned.
#[derive(Clone, Debug)]
pub struct TurnedNorm {
    /// Of rows `[T · heads, W]`.
    pub norm: Norm,
    /// Of the rows `[T, heads · W]` that these are, in heads of `W`.
    pub rotate: Rotate,
}

impl NormRotate {
    /// Most parts.
    pub(crate) const PARTS: usize = 2;

    pub(super) fn check(&self) -> Result<(), DeviceError> {
        let formats = |part: &TurnedNorm| (part.norm.x.dtype, part.norm.out.dtype);
        let alike = self.parts.iter().all(|part| formats(part) == formats(&self.parts[0]));
        if !alike || self.parts.len() > Self::PARTS {
            return Err(DeviceError::Shape(format!(
                "norm_rotate: {} parts are not two alike",
                self.parts.len()
            )));
        }
        self.parts.iter().try_for_each(TurnedNorm::check)
    }

    pub(super) fn accesses(&self) -> Accesses {
        self.parts.iter().fold(Accesses::new(), |all, TurnedNorm { norm, rotate }| {
            let reads = all.read(&norm.x).read(&rotate.rope_table).read_weights([&norm.weight]);
            norm.writes(reads.read_weights(&norm.bias))
        })
    }
}

impl TurnedNorm {
    /// Heads of a token.
    pub(crate) fn heads(&self) -> usize {
        self.rotate.x.width / self.norm.out.width.max(1)
    }

    fn check(&self) -> Result<(), DeviceError> {
        self.norm.check()?;
        self.rotate.check()?;
        let heads = self.rotate.x.reshape(self.rotate.head_width)?;
        if self.norm.codes.is_some() {
            return Err(DeviceError::Shape(
                "norm_rotate: heads that are turned are not left as codes".into(),
            ));
        }
        if heads != self.norm.out {
            return Err(DeviceError::Shape(format!(
                "norm_rotate: heads of {} of {:?} are not the normed rows {:?}",
                self.rotate.head_width, self.rotate.x, self.norm.out
            )));
        }
        Ok(())
    }
}
