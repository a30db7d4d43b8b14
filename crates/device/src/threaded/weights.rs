//! The weights of a process: loaded once, shared by all its ranks.

use super::{Element, Kernels, Pages, out_of_memory};
use crate::{DeviceError, TensorBytes, Weight, WeightFormat, WeightShape, WeightSlot};
use epsmoe_base::DType;
use epsmoe_base::float8::E4M3;
use epsmoe_quant::{Codes, Format};
use half::{bf16, f16};
use std::collections::HashMap;
use std::sync::{Arc, PoisonError, RwLock};

/// A linear map to be packed: rows `[n, k]` from one tensor, or from two that lie side by side.
pub struct Pack<'a> {
    /// Output width of each tensor.
    pub n: usize,
    /// Input width.
    pub k: usize,
    /// One tensor, or gate and up.
    pub tensors: &'a [TensorBytes<'a>],
    /// Format of the activations it will meet.
    pub dtype: DType,
}

impl TensorBytes<'_> {
    /// Writes elements `start..start + out.len()`, each the nearest number of `T`.
    pub fn convert<T: Element>(&self, start: usize, out: &mut [T]) {
        let bytes = &self.bytes[start * self.dtype.bytes()..][..out.len() * self.dtype.bytes()];
        match self.dtype {
            DType::F32 | DType::U32 => from_bytes(bytes, out, f32::from_le_bytes),
            DType::BF16 => from_bytes(bytes, out, |bytes| bf16::from_le_bytes(bytes).to_f32()),
            DType::F16 => from_bytes(bytes, out, |bytes| f16::from_le_bytes(bytes).to_f32()),
            DType::E4M3 => from_bytes(bytes, out, |[code]| E4M3[usize::from(code)]),
        }
    }
}

/// Reads one number after the other, `N` bytes each.
fn from_bytes<T: Element, const N: usize>(bytes: &[u8], out: &mut [T], number: impl Fn([u8; N]) -> f32) {
    let (numbers, _) = bytes.as_chunks::<N>();
    out.iter_mut().zip(numbers).for_each(|(out, bytes)| *out = T::from_f32(number(*bytes)));
}

/// Rows that are looked up, kept in the checkpoint's own format.
pub(super) struct Table {
    dtype: DType,
    width: usize,
    bytes: Pages,
}

impl Table {
    /// Writes row `row`.
    pub(super) fn row<T: Element>(&self, row: usize, out: &mut [T]) {
        TensorBytes { dtype: self.dtype, bytes: &self.bytes }.convert(row * self.width, out);
    }
}

enum Held<M> {
    Matrix(Arc<M>),
    Vector(Arc<[f32]>),
    Table(Arc<Table>),
}

/// Every weight of a process.
pub struct WeightStore<M>(RwLock<Inner<M>>);

struct Inner<M> {
    held: Vec<Held<M>>,
    by_name: HashMap<Arc<str>, Weight>,
}

impl<M> Default for WeightStore<M> {
    fn default() -> Self {
        WeightStore(RwLock::new(Inner { held: Vec::new(), by_name: HashMap::new() }))
    }
}

impl<M> WeightStore<M> {
    pub(super) fn find(&self, name: &str) -> Option<Weight> {
        self.0.read().unwrap_or_else(PoisonError::into_inner).by_name.get(name).cloned()
    }

    pub(super) fn load<K: Kernels<Matrix = M>>(
        &self,
        kernels: &K,
        dtype: DType,
        name: &str,
        shape: WeightShape,
        tensors: &[TensorBytes<'_>],
    ) -> Result<Weight, DeviceError> {
        check_sources(name, shape, tensors)?;
        let format = held_format(name, shape, dtype, tensors[0].dtype)?;
        let held = match shape {
            WeightShape::Matrix { n, k } | WeightShape::GateUp { inner: n, k } => {
                let matrix = kernels.pack(&Pack { n, k, tensors, dtype });
                let bytes = (tensors.len() * n * k * dtype.bytes()) as u64;
                Held::Matrix(Arc::new(matrix.ok_or_else(|| out_of_memory(name, bytes))?))
            }
            WeightShape::Vector { n } => {
                let mut vector = vec![0.0; n];
                tensors[0].convert(0, &mut vector);
                Held::Vector(vector.into())
            }
            WeightShape::Table { width, .. } => {
                let TensorBytes { dtype, bytes } = tensors[0];
                let mut pages =
                    Pages::new(bytes.len()).ok_or_else(|| out_of_memory(name, bytes.len() as u64))?;
                pages.copy_from_slice(bytes);
                Held::Table(Arc::new(Table { dtype, width, bytes: pages }))
            }
        };
        self.keep(name, shape, format, held)
    }

    pub(super) fn load_codes<K: Kernels<Matrix = M>>(
        &self,
        kernels: &K,
        dtype: DType,
        name: &str,
        shape: WeightShape,
        matrices: &[Codes],
    ) -> Result<Weight, DeviceError> {
        let format = check_codes(name, shape, matrices)?;
        if !kernels.holds(&format, dtype) {
            return Err(DeviceError::Unsupported(format!(
                "{name}: {} computes in {dtype} with no weights held as {format}; load them decoded \
                 (--quantization dequantise)",
                kernels.describe()
            )));
        }
        let bytes = matrices.iter().map(|codes| (codes.codes.len() + codes.records.len()) as u64).sum();
        let matrix = kernels.pack_codes(matrices, dtype).ok_or_else(|| out_of_memory(name, bytes))?;
        self.keep(name, shape, WeightFormat::Coded(format), Held::Matrix(Arc::new(matrix)))
    }

    fn keep(
        &self,
        name: &str,
        shape: WeightShape,
        format: WeightFormat,
        held: Held<M>,
    ) -> Result<Weight, DeviceError> {
        let mut inner = self.0.write().unwrap_or_else(PoisonError::into_inner);
        let slot = u32::try_from(inner.held.len()).map_err(|_| out_of_memory(name, u64::MAX))?;
        let weight = Weight { slot: WeightSlot(slot), shape, format, name: name.into() };
        inner.held.push(held);
        inner.by_name.insert(weight.name.clone(), weight.clone());
        Ok(weight)
    }

    pub(super) fn matrix(&self, weight: &Weight) -> Result<Arc<M>, String> {
        self.get(weight, |held| match held {
            Held::Matrix(matrix) => Some(Arc::clone(matrix)),
            _ => None,
        })
    }

    pub(super) fn vector(&self, weight: &Weight) -> Result<Arc<[f32]>, String> {
        self.get(weight, |held| match held {
            Held::Vector(vector) => Some(Arc::clone(vector)),
            _ => None,
        })
    }

    pub(super) fn table(&self, weight: &Weight) -> Result<Arc<Table>, String> {
        self.get(weight, |held| match held {
            Held::Table(table) => Some(Arc::clone(table)),
            _ => None,
        })
    }

    /// The name of the weight that a slot was loaded with.
    pub(super) fn name(&self, slot: WeightSlot) -> Option<Arc<str>> {
        let inner = self.0.read().unwrap_or_else(PoisonError::into_inner);
        inner.by_name.values().find(|weight| weight.slot == slot).map(|weight| Arc::clone(&weight.name))
    }

    fn get<T>(&self, weight: &Weight, pick: impl Fn(&Held<M>) -> Option<T>) -> Result<T, String> {
        let inner = self.0.read().unwrap_or_else(PoisonError::into_inner);
        let found = inner.held.get(weight.slot.0 as usize).and_then(pick);
        found.ok_or_else(|| format!("weight {} is not held as a {:?}", weight.name, weight.shape))
    }
}

/// How a processor that computes in `dtype` holds a weight: maps in the format of activations, vectors in float32, tables
/// as the checkpoint has them.
pub(crate) fn held_format(
    name: &str,
    shape: WeightShape,
    dtype: DType,
    stored: DType,
) -> Result<WeightFormat, DeviceError> {
    let held = match shape {
        WeightShape::Matrix { .. } | WeightShape::GateUp { .. } => dtype,
        WeightShape::Vector { .. } => DType::F32,
        WeightShape::Table { .. } => stored,
    };
    WeightFormat::plain(held).ok_or_else(|| {
        DeviceError::Shape(format!("{name}: no weight is held in {held}; store it as a float"))
    })
}

/// The format of matrices in codes, unless they are not those of [`WeightShape::sources`] or differ.
pub(crate) fn check_codes(name: &str, shape: WeightShape, matrices: &[Codes]) -> Result<Format, DeviceError> {
    let (count, dimensions) = shape.sources();
    let kinds: Vec<_> =
        matrices.iter().map(|codes| (vec![codes.rows, codes.columns], codes.format)).collect();
    match kinds.first() {
        Some((_, format))
            if shape.is_map()
                && kinds.len() == count
                && kinds.iter().all(|kind| *kind == (dimensions.clone(), *format)) =>
        {
            Ok(*format)
        }
        _ => Err(DeviceError::Shape(format!(
            "{name}: {shape:?} needs {count} × {dimensions:?} in codes of one format, given {kinds:?}"
        ))),
    }
}

/// Refuses tensors that are not those of [`WeightShape::sources`].
pub(crate) fn check_sources(
    name: &str,
    shape: WeightShape,
    tensors: &[TensorBytes<'_>],
) -> Result<(), DeviceError> {
    let (count, dimensions) = shape.sources();
    let elements: usize = dimensions.iter().product();
    let right = tensors.len() == count
        && tensors.iter().all(|tensor| tensor.bytes.len() == elements * tensor.dtype.bytes());
    if right {
        return Ok(());
    }
    let given: Vec<usize> = tensors.iter().map(|tensor| tensor.bytes.len()).collect();
    Err(DeviceError::Shape(format!(
        "{name}: {shape:?} needs {count} × {dimensions:?}, given bytes {given:?}"
    )))
}
