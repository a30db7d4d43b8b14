//! Every matrix product: a linear layer, one expert, the experts of a stage, the heads of a projection.

use super::{Accesses, expect, same_rows};
use crate::{Buffer, DeviceError, Weight, WeightFormat, WeightShape};
use epsmoe_base::{DType, RowFormat};

/// What happens to a product before it is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Epilogue {
    /// `out = x·Wᵀ`.
    Store,
    /// `out = silu(x·gateᵀ) ⊙ (x·upᵀ)` for [`WeightShape::GateUp`] weights.
    SwiGlu,
}

/// One product: `out[m, n] = Σ_k x[m, k] · w[n, k]`.
///
/// With a weight held as [`WeightFormat::Fp8`] x is codes and scales too, [`RowFormat::Fp8`], of 128 values of k each. With b
/// such a block of k, `acc = fma(sx[m, b] · sw[n / 128, b], Σ_{k in b} x[m, k] · w[n, k], acc)` for one b after the other in
/// float32: what tensor cores cut off within a block is about what the rounding of the outcome to bfloat16 is.
#[derive(Clone, Debug)]
pub struct GemmPart {
    /// Input `[M, K]`, as the weight wants it.
    pub x: Buffer,
    /// Weight; its shape agrees with the epilogue.
    pub weight: Weight,
    /// Added to every output row, in float32 before rounding (`Store` only).
    pub bias: Option<Weight>,
    /// Output `[M, N]`: in the input's format or float32; of FP8 in bfloat16, or in float32 if it is just stored, or as codes
    /// and scales if it is activated, each the code of the bfloat16 that it would be.
    pub out: Buffer,
}

/// Several products in one operation, which share the processor tile by tile: with one part per expert this
/// is the grouped kernel, with a single part the dense one; maps of the same rows, such as queries, keys and values, may differ in
/// width, formats and biases. All give equal bits.
#[derive(Clone, Debug)]
pub struct Gemm {
    /// The operation's parts.
    pub parts: Vec<GemmPart>,
    /// What happens before storing.
    pub epilogue: Epilogue,
}

impl Gemm {
    /// A single linear map.
    pub fn linear(x: Buffer, weight: &Weight, out: Buffer) -> Self {
        let part = GemmPart { x, weight: weight.clone(), bias: None, out };
        Gemm { parts: vec![part], epilogue: Epilogue::Store }
    }

    /// The same with a bias, if there is one.
    pub fn biased(x: Buffer, weight: &Weight, bias: Option<&Weight>, out: Buffer) -> Self {
        let part = GemmPart { x, weight: weight.clone(), bias: bias.cloned(), out };
        Gemm { parts: vec![part], epilogue: Epilogue::Store }
    }

    /// A single gate and up map with its activation.
    pub fn gated(x: Buffer, weight: &Weight, out: Buffer) -> Self {
        Gemm { epilogue: Epilogue::SwiGlu, ..Gemm::linear(x, weight, out) }
    }

    pub(super) fn check(&self) -> Result<(), DeviceError> {
        self.parts.iter().try_for_each(|part| part.check(self.epilogue))?;
        // Of each allocation the output that came last.
        let mut last: Vec<&Buffer> = Vec::new();
        for part in &self.parts {
            match last.iter_mut().find(|last| last.allocation == part.out.allocation) {
                Some(last) if ascending(last, &part.out) => *last = &part.out,
                Some(_) => {
                    let message = "gemm: outputs of the parts must ascend without overlap";
                    return Err(DeviceError::Shape(message.into()));
                }
                None => last.push(&part.out),
            }
        }
        Ok(())
    }

    pub(super) fn accesses(&self) -> Accesses {
        let reads = self.parts.iter().fold(Accesses::new(), |all, part| all.read(&part.x));
        let weights = self.parts.iter().flat_map(|part| [&part.weight].into_iter().chain(&part.bias));
        let reads = reads.read_weights(weights);
        self.parts.iter().fold(reads, |all, part| all.write(&part.out))
    }
}

impl GemmPart {
    /// Whether a kernel that takes one of them in one launch takes both: weights of one shape, rows and outputs of the same formats,
    /// no bias.
    pub(crate) fn is_like(&self, other: &GemmPart) -> bool {
        let kind = |part: &GemmPart| (part.weight.shape, part.x.dtype, part.out.dtype);
        kind(self) == kind(other) && self.bias.is_none() && other.bias.is_none()
    }

    fn check(&self, epilogue: Epilogue) -> Result<(), DeviceError> {
        same_rows("gemm", &[&self.x, &self.out])?;
        let (n, k) = match (self.weight.shape, epilogue) {
            (WeightShape::Matrix { n, k }, Epilogue::Store) => (n, k),
            (WeightShape::GateUp { inner, k }, Epilogue::SwiGlu) => (inner, k),
            (shape, epilogue) => {
                return Err(DeviceError::Shape(format!(
                    "gemm: {} is a {shape:?}, which does not go with {epilogue:?}",
                    self.weight.name
                )));
            }
        };
        if let Some(bias) = &self.bias
            && (epilogue != Epilogue::Store || bias.shape != (WeightShape::Vector { n }))
        {
            return Err(DeviceError::Shape(format!(
                "gemm: bias {} is {:?}, which does not go with {epilogue:?} of {n} columns",
                bias.name, bias.shape
            )));
        }
        check_formats(&self.x, &self.weight, [n, k], epilogue, &self.out)
    }
}

/// Whether rows and outputs are of the formats and widths that they may have with a weight `[n, k]`.
fn check_formats(
    x: &Buffer,
    weight: &Weight,
    [n, k]: [usize; 2],
    epilogue: Epilogue,
    out: &Buffer,
) -> Result<(), DeviceError> {
    let of = |buffer: &Buffer| (buffer.dtype, buffer.width);
    let fits = match weight.format {
        WeightFormat::Fp8 => {
            let wide = match epilogue {
                Epilogue::Store => (DType::F32, n),
                Epilogue::SwiGlu => RowFormat::Fp8.elements(n),
            };
            of(x) == RowFormat::Fp8.elements(k) && [(DType::BF16, n), wide].contains(&of(out))
        }
        _ => {
            let formats = x.dtype != DType::U32 && [x.dtype, DType::F32].contains(&out.dtype);
            formats && x.width == k && out.width == n
        }
    };
    if fits {
        return Ok(());
    }
    let held = match weight.format {
        WeightFormat::Fp8 => format!(", held as {},", weight.format),
        _ => String::new(),
    };
    Err(DeviceError::Shape(format!("gemm: {x:?} · {} [{n}, {k}]ᵀ{held} does not give {out:?}", weight.name)))
}

/// `out[m] = x[m] · weights[e]ᵀ` for `starts[e] ≤ m < starts[e + 1]`: the products of all experts over rows that are
/// sorted by expert. The bits are those of a [`Gemm`] with one part per expert.
#[derive(Clone, Debug)]
pub struct ExpertGemm {
    /// Input `[M, K]`.
    pub x: Buffer,
    /// Where the rows of each expert start, and the end `[E + 1, 1]`, uint32: ascending, at most M.
    pub starts: Buffer,
    /// One weight per expert `[E]`, all of one shape, which agrees with the epilogue, held in any formats.
    pub weights: Vec<Weight>,
    /// What happens before storing.
    pub epilogue: Epilogue,
    /// Output `[M, N]`, in the input's format or float32.
    pub out: Buffer,
}

impl ExpertGemm {
    pub(super) fn check(&self) -> Result<(), DeviceError> {
        let ExpertGemm { x, starts, weights, epilogue, out } = self;
        same_rows("gemm", &[x, out])?;
        expect("gemm", "starts", starts, DType::U32, 1)?;
        let shape = weights.first().map(|weight| weight.shape);
        let (n, k) = match (shape, epilogue) {
            (Some(WeightShape::Matrix { n, k }), Epilogue::Store) => (n, k),
            (Some(WeightShape::GateUp { inner, k }), Epilogue::SwiGlu) => (inner, k),
            (shape, epilogue) => {
                return Err(DeviceError::Shape(format!("gemm: weights {shape:?} with {epilogue:?}")));
            }
        };
        if let Some(other) = weights.iter().find(|weight| weight.shape != weights[0].shape) {
            return Err(DeviceError::Shape(format!(
                "gemm: weights differ: {} is {:?}, {} is {:?}",
                weights[0].name, weights[0].shape, other.name, other.shape
            )));
        }
        for weight in weights {
            check_formats(x, weight, [n, k], *epilogue, out)?;
        }
        if starts.rows != weights.len() + 1 {
            return Err(DeviceError::Shape(format!(
                "gemm: {starts:?} does not delimit the rows of {} experts",
                weights.len()
            )));
        }
        Ok(())
    }

    pub(super) fn accesses(&self) -> Accesses {
        Accesses::new().read(&self.x).read(&self.starts).read_weights(&self.weights).write(&self.out)
    }
}

/// Whether two views of one allocation share no element: the second's rows come after the first's, or its
/// columns do in rows of the same stride.
fn ascending(first: &Buffer, second: &Buffer) -> bool {
    if first.allocation != second.allocation || first.rows == 0 || second.rows == 0 {
        return true;
    }
    let rows_after = second.byte_range().start >= first.byte_range().end;
    let columns_after = first.stride == second.stride
        && second.offset >= first.offset + first.width
        && second.offset + second.width <= first.offset + first.stride;
    rows_after || columns_after
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::AllocationId;

    fn view(offset: usize, rows: usize, width: usize) -> Buffer {
        let allocation = AllocationId(0);
        Buffer { allocation, name: "out", dtype: DType::F32, offset, rows, width, stride: 6 }
    }

    #[test]
    fn rows_and_columns_that_overlap_are_seen() {
        assert!(ascending(&view(0, 2, 6), &view(12, 1, 6)), "rows 0..2, then row 2");
        assert!(ascending(&view(0, 2, 3), &view(3, 2, 3)), "columns 0..3, then 3..6");
        assert!(!ascending(&view(0, 2, 4), &view(3, 2, 3)), "column 3 twice");
        assert!(!ascending(&view(0, 2, 6), &view(6, 1, 6)), "row 1 twice");
    }
}
