//! Moving and adding rows.

#[cfg(doc)]
use super::NONE;
use super::{Accesses, expect, expect_wide, same_rows};
use crate::{Buffer, DeviceError, Weight, WeightShape};
use epsmoe_base::{DType, RowFormat};
use std::sync::Arc;

/// `out = words`, row by row: indices, or the bits of floats, from the host.
#[derive(Clone, Debug)]
pub struct HostToDevice {
    /// As many 32-bit words as `out` has elements.
    pub words: Arc<[u32]>,
    /// Where they go, uint32 or float32.
    pub out: Buffer,
}

impl HostToDevice {
    pub(super) fn check(&self) -> Result<(), DeviceError> {
        let words_wide = matches!(self.out.dtype, DType::U32 | DType::F32);
        if !words_wide || self.words.len() != self.out.rows * self.out.width {
            return Err(DeviceError::Shape(format!(
                "host_to_device: {} words into {:?}",
                self.words.len(),
                self.out
            )));
        }
        Ok(())
    }

    pub(super) fn accesses(&self) -> Accesses {
        Accesses::new().write(&self.out)
    }
}

/// `out[t] = table[ids[t]]`.
#[derive(Clone, Debug)]
pub struct Embed {
    /// Token ids `[T, 1]`, uint32.
    pub ids: Buffer,
    /// Embedding table `[V, H]`.
    pub table: Weight,
    /// Output `[T, H]`.
    pub out: Buffer,
}

impl Embed {
    pub(super) fn check(&self) -> Result<(), DeviceError> {
        same_rows("embed", &[&self.ids, &self.out])?;
        expect("embed", "ids", &self.ids, DType::U32, 1)?;
        match self.table.shape {
            WeightShape::Table { width, .. } if width == self.out.width => Ok(()),
            shape => Err(DeviceError::Shape(format!(
                "embed: {} is a {shape:?}, the output {:?}",
                self.table.name, self.out
            ))),
        }
    }

    pub(super) fn accesses(&self) -> Accesses {
        Accesses::new().read(&self.ids).read_weights([&self.table]).write(&self.out)
    }
}

/// `out[m] = x[index[m]]`; rows whose index is [`NONE`] stay as they are.
#[derive(Clone, Debug)]
pub struct Gather {
    /// Source rows `[N, W]`: exactly those that the index may name. In the format of the output, or codes of e4m3, which become
    /// numbers on the way.
    pub x: Buffer,
    /// Source row of each output row `[M, 1]`, uint32.
    pub index: Buffer,
    /// Output `[M, W]`.
    pub out: Buffer,
}

impl Gather {
    pub(super) fn check(&self) -> Result<(), DeviceError> {
        same_rows("gather", &[&self.index, &self.out])?;
        expect("gather", "index", &self.index, DType::U32, 1)?;
        let dtype = if self.x.dtype == DType::E4M3 { self.out.dtype } else { self.x.dtype };
        expect("gather", "output", &self.out, dtype, self.x.width)
    }

    pub(super) fn accesses(&self) -> Accesses {
        Accesses::new().read(&self.x).read(&self.index).write(&self.out)
    }
}

/// What becomes of rows in [`GatherFp8`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fp8 {
    /// Numbers become codes and scales.
    Encode,
    /// Codes and scales become numbers.
    Decode,
    /// The one, then the other: numbers become those that codes stand for.
    Through,
}

/// `out[m] = how(x[index[m]])`: [`Gather`] to or from rows of e4m3 codes that share a float32 scale by 128s, as
/// [`encode_row`](epsmoe_base::float8::encode_row) writes them. What is encoded is first rounded to bfloat16, so that
/// rows have the same codes wherever they are made.
#[derive(Clone, Debug)]
pub struct GatherFp8 {
    /// Source rows `[N, W]`, or codes and scales `[N, scaled words of W]`, uint32: exactly those that the index may name.
    pub x: Buffer,
    /// Source row of each output row `[M, 1]`, uint32; without it each is its own.
    pub index: Option<Buffer>,
    /// Output, likewise.
    pub out: Buffer,
    /// Which of the two is in codes.
    pub how: Fp8,
}

impl GatherFp8 {
    /// Rows become codes, each in its place.
    pub fn encode(x: Buffer, out: Buffer) -> Self {
        GatherFp8 { x, index: None, out, how: Fp8::Encode }
    }

    /// The side that is in numbers; both are, or the one of them that is not in codes.
    pub(crate) fn numbers(&self) -> &Buffer {
        if self.how == Fp8::Decode { &self.out } else { &self.x }
    }

    pub(super) fn check(&self) -> Result<(), DeviceError> {
        same_rows("gather_fp8", &[self.index.as_ref().unwrap_or(&self.x), &self.out])?;
        if let Some(index) = &self.index {
            expect("gather_fp8", "index", index, DType::U32, 1)?;
        }
        let numbers = self.numbers();
        let (dtype, words) = RowFormat::Fp8.elements(numbers.width);
        match self.how {
            Fp8::Encode => expect("gather_fp8", "output", &self.out, dtype, words),
            Fp8::Decode => expect("gather_fp8", "source", &self.x, dtype, words),
            Fp8::Through => expect("gather_fp8", "output", &self.out, numbers.dtype, numbers.width),
        }
    }

    pub(super) fn accesses(&self) -> Accesses {
        self.index.iter().fold(Accesses::new().read(&self.x), Accesses::read).write(&self.out)
    }
}

/// `out[m] = round( Σ_j weights[m, j] · x[index[m, j]] + addend[m] )`, folded in float32 from left to right, up to the
/// first [`NONE`] in the row of the index. Without weights every factor is 1; without terms the sum is 0.
#[derive(Clone, Debug)]
pub struct Reduce {
    /// Source rows `[N, W]`: exactly those that the index may name.
    pub x: Buffer,
    /// Source rows of each output row's terms `[M, n]`, uint32, filled up by [`NONE`].
    pub index: Buffer,
    /// Factor of each term `[M, n]`, float32.
    pub weights: Option<Buffer>,
    /// Added last, `[M, W]`, in the source's format.
    pub addend: Option<Buffer>,
    /// Output `[M, W]`, in the source's format or float32.
    pub out: Buffer,
}

impl Reduce {
    pub(super) fn check(&self) -> Result<(), DeviceError> {
        same_rows("reduce", &[&self.out, &self.index])?;
        expect("reduce", "index", &self.index, DType::U32, self.index.width)?;
        expect_wide("reduce", "output", &self.out, self.x.dtype, self.x.width)?;
        if let Some(weights) = &self.weights {
            same_rows("reduce", &[&self.index, weights])?;
            expect("reduce", "weights", weights, DType::F32, self.index.width)?;
        }
        if let Some(addend) = &self.addend {
            same_rows("reduce", &[&self.out, addend])?;
            expect("reduce", "addend", addend, self.x.dtype, self.x.width)?;
        }
        Ok(())
    }

    pub(super) fn accesses(&self) -> Accesses {
        let reads = Accesses::new().read(&self.x).read(&self.index);
        let optional = self.weights.iter().chain(&self.addend);
        optional.fold(reads, Accesses::read).write(&self.out)
    }
}

/// `out[m] = out[m] + x[m]`, in place.
#[derive(Clone, Debug)]
pub struct Add {
    /// What is added `[M, W]`.
    pub x: Buffer,
    /// The sum so far `[M, W]`.
    pub out: Buffer,
}

impl Add {
    pub(super) fn check(&self) -> Result<(), DeviceError> {
        same_rows("add", &[&self.x, &self.out])?;
        expect("add", "output", &self.out, self.x.dtype, self.x.width)
    }

    pub(super) fn accesses(&self) -> Accesses {
        Accesses::new().read(&self.x).write(&self.out)
    }
}

/// `out[m] = x[m]`, bit by bit unless the destination's format is the narrower one.
#[derive(Clone, Debug)]
pub struct Copy {
    /// Source `[M, W]`, in the destination's format or float32.
    pub x: Buffer,
    /// Destination `[M, W]`, elsewhere.
    pub out: Buffer,
}

impl Copy {
    pub(super) fn check(&self) -> Result<(), DeviceError> {
        same_rows("copy", &[&self.x, &self.out])?;
        expect_wide("copy", "source", &self.x, self.out.dtype, self.out.width)
    }

    pub(super) fn accesses(&self) -> Accesses {
        Accesses::new().read(&self.x).write(&self.out)
    }
}

/// `x = max(−limit, min(limit, x))`, in place.
#[derive(Clone, Debug)]
pub struct Clamp {
    /// What is clamped `[M, W]`.
    pub x: Buffer,
    /// Largest magnitude that stays.
    pub limit: f32,
}

impl Clamp {
    pub(super) fn check(&self) -> Result<(), DeviceError> {
        if self.limit >= 0.0 {
            return Ok(());
        }
        Err(DeviceError::Shape(format!("clamp: the limit {} is not a magnitude", self.limit)))
    }

    pub(super) fn accesses(&self) -> Accesses {
        Accesses::new().write(&self.x)
    }
}

/// `x = factor · x`, in place.
#[derive(Clone, Debug)]
pub struct Scale {
    /// What is scaled `[M, W]`.
    pub x: Buffer,
    /// By how much.
    pub factor: f32,
}

impl Scale {
    pub(super) fn check(&self) -> Result<(), DeviceError> {
        if self.factor.is_finite() {
            return Ok(());
        }
        Err(DeviceError::Shape(format!("scale: the factor {} is not finite", self.factor)))
    }

    pub(super) fn accesses(&self) -> Accesses {
        Accesses::new().write(&self.x)
    }
}

/// `x[index[n, j] − first] = weights[n, j] · x[index[n, j] − first]` for the first indices of each row that are not
/// [`NONE`](super::NONE), in place; what lies outside of x is left out. No index comes twice.
#[derive(Clone, Debug)]
pub struct ScaleTerms {
    /// What is scaled `[M, W]`.
    pub x: Buffer,
    /// Rows counted from `first` on `[N, k]`, uint32.
    pub index: Buffer,
    /// Their factors `[N, k]`, float32.
    pub weights: Buffer,
    /// The number of the first row of x.
    pub first: usize,
}

impl ScaleTerms {
    pub(super) fn check(&self) -> Result<(), DeviceError> {
        same_rows("scale_terms", &[&self.index, &self.weights])?;
        expect("scale_terms", "index", &self.index, DType::U32, self.index.width)?;
        expect("scale_terms", "weights", &self.weights, DType::F32, self.index.width)
    }

    pub(super) fn accesses(&self) -> Accesses {
        Accesses::new().read(&self.index).read(&self.weights).write(&self.x)
    }
}

/// `x = cap · tanh(x / cap)`, in place.
#[derive(Clone, Debug)]
pub struct SoftCap {
    /// What is capped `[M, W]`.
    pub x: Buffer,
    /// What no magnitude reaches.
    pub cap: f32,
}

impl SoftCap {
    pub(super) fn check(&self) -> Result<(), DeviceError> {
        if self.cap > 0.0 && self.cap.is_finite() {
            return Ok(());
        }
        Err(DeviceError::Shape(format!("soft_cap: the cap {} is not a positive number", self.cap)))
    }

    pub(super) fn accesses(&self) -> Accesses {
        Accesses::new().write(&self.x)
    }
}

/// `x[m] = sigmoid(gate[m]) · x[m]`, in place.
#[derive(Clone, Debug)]
pub struct GateRows {
    /// One number a row `[M, 1]`, float32.
    pub gate: Buffer,
    /// The rows `[M, W]`.
    pub x: Buffer,
}

impl GateRows {
    pub(super) fn check(&self) -> Result<(), DeviceError> {
        same_rows("gate_rows", &[&self.gate, &self.x])?;
        expect("gate_rows", "gate", &self.gate, DType::F32, 1)
    }

    pub(super) fn accesses(&self) -> Accesses {
        Accesses::new().read(&self.gate).write(&self.x)
    }
}
