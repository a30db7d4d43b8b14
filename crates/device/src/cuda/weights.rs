//! The weights of a process on one GPU: loaded once, shared by all its ranks there.

use super::bricks::Bricks;
use super::driver::{Copy2d, CudaError, End, Matrix, Stream, TensorMap};
use super::hopper;
use super::memory::Pool;
use crate::threaded::{check_codes, check_sources, held_format};
use crate::{DeviceError, TensorBytes, Weight, WeightFormat, WeightShape, WeightSlot};
use epsmoe_base::{Bytes, DType};
use epsmoe_quant::Codes;
use half::bf16;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError, RwLock};

/// A weight in GPU memory: rows of `width` elements, `stride` elements apart and zero in between, or bricks of codes.
#[derive(Clone, Copy, Debug)]
pub(super) struct Held {
    pub(super) start: u64,
    /// What its numbers are, or what its codes mean.
    pub(super) dtype: DType,
    /// How codes lie, if it is held in them.
    pub(super) bricks: Option<Bricks>,
    pub(super) rows: usize,
    pub(super) width: usize,
    pub(super) stride: usize,
    /// Address of its `TensorMap`; zero if it has none.
    pub(super) map: u64,
}

/// Every weight of a process on one GPU.
pub(super) struct WeightStore {
    /// Whether bf16 maps get a `TensorMap`.
    mapped: bool,
    stream: Mutex<Stream>,
    pool: Mutex<Pool>,
    inner: RwLock<Inner>,
}

#[derive(Default)]
struct Inner {
    held: Vec<Held>,
    by_name: HashMap<Arc<str>, Weight>,
}

impl WeightStore {
    pub(super) fn new(stream: Stream, pool: Pool, mapped: bool) -> Self {
        WeightStore { mapped, stream: Mutex::new(stream), pool: Mutex::new(pool), inner: RwLock::default() }
    }

    pub(super) fn find(&self, name: &str) -> Option<Weight> {
        self.inner.read().unwrap_or_else(PoisonError::into_inner).by_name.get(name).cloned()
    }

    /// The name of the weight that a slot was loaded with.
    pub(super) fn name(&self, slot: WeightSlot) -> Option<Arc<str>> {
        let inner = self.inner.read().unwrap_or_else(PoisonError::into_inner);
        inner.by_name.values().find(|weight| weight.slot == slot).map(|weight| Arc::clone(&weight.name))
    }

    pub(super) fn get(&self, weight: &Weight) -> Result<Held, DeviceError> {
        let inner = self.inner.read().unwrap_or_else(PoisonError::into_inner);
        inner.held.get(weight.slot.0 as usize).copied().ok_or_else(|| {
            DeviceError::Shape(format!("weight {} is not held as a {:?}", weight.name, weight.shape))
        })
    }

    /// Brings a weight to the GPU. Maps are kept in `dtype`, their rows on 16 bytes; gate and up rows alternate
    /// eight by eight. Vectors are kept in float32, tables in their own format.
    pub(super) fn load(
        &self,
        dtype: DType,
        name: &str,
        shape: WeightShape,
        tensors: &[TensorBytes<'_>],
    ) -> Result<Weight, DeviceError> {
        check_sources(name, shape, tensors)?;
        let format = held_format(name, shape, dtype, tensors)?;
        let (rows, width, kept) = match shape {
            WeightShape::Matrix { n, k } | WeightShape::GateUp { inner: n, k } => (n, k, dtype),
            WeightShape::Vector { n } => (1, n, DType::F32),
            WeightShape::Table { rows, width } => (rows, width, tensors[0].dtype),
        };
        let aligned = matches!(shape, WeightShape::Matrix { .. } | WeightShape::GateUp { .. });
        let stride = if aligned { width.next_multiple_of(16 / kept.bytes()) } else { width };
        let mut held = self.bring(name, &Layout { rows, width, stride, dtype: kept }, tensors)?;
        if self.mapped && aligned && kept == DType::BF16 {
            held.map = self.map(name, &held)?;
        }
        self.keep(name, shape, format, held)
    }

    /// Brings a map to the GPU in its codes, or decoded if kernels cannot do with its scales what they mean.
    pub(super) fn load_codes(
        &self,
        dtype: DType,
        name: &str,
        shape: WeightShape,
        matrices: &[Codes],
    ) -> Result<Weight, DeviceError> {
        let format = check_codes(name, shape, matrices)?;
        let Some(bricks) = Bricks::of(&format).filter(|_| dtype == DType::BF16) else {
            return Err(DeviceError::Unsupported(format!(
                "{name}: no kernel of a GPU multiplies {dtype} rows with weights held as {format}; load them decoded \
                 (--quantization dequantise)"
            )));
        };
        let Some((packed, rows)) = bricks.pack(matrices) else {
            let decoded: Vec<Vec<u8>> = matrices.iter().map(decoded).collect();
            let tensor = |bytes| TensorBytes { dtype: DType::BF16, bytes };
            let tensors: Vec<_> = decoded.iter().map(Vec::as_slice).map(tensor).collect();
            return self.load(DType::BF16, name, shape, &tensors);
        };
        let start = self.bring_bytes(name, &packed)?;
        let width = matrices[0].columns;
        let held = Held { start, dtype: DType::BF16, bricks: Some(bricks), rows, width, stride: 0, map: 0 };
        self.keep(name, shape, WeightFormat::Coded(format), held)
    }

    fn keep(
        &self,
        name: &str,
        shape: WeightShape,
        format: WeightFormat,
        held: Held,
    ) -> Result<Weight, DeviceError> {
        let mut inner = self.inner.write().unwrap_or_else(PoisonError::into_inner);
        let slot = u32::try_from(inner.held.len()).map_err(|_| too_large(name, usize::MAX))?;
        let weight = Weight { slot: WeightSlot(slot), shape, format, name: name.into() };
        inner.held.push(held);
        inner.by_name.insert(weight.name.clone(), weight.clone());
        Ok(weight)
    }

    /// Describes a weight to TMA, in GPU memory, once and for all.
    fn map(&self, name: &str, held: &Held) -> Result<u64, DeviceError> {
        let Held { start, rows, width, stride, .. } = *held;
        let map = TensorMap::new(&Matrix { start, rows, width, stride, piece: hopper::WEIGHT_PIECE })?;
        self.bring_bytes(name, bytemuck::bytes_of(&map))
    }

    /// Brings bytes to the GPU as they are.
    fn bring_bytes(&self, name: &str, bytes: &[u8]) -> Result<u64, DeviceError> {
        let stream = self.stream.lock().unwrap_or_else(PoisonError::into_inner);
        let at = {
            let mut pool = self.pool.lock().unwrap_or_else(PoisonError::into_inner);
            pool.take(bytes.len(), &stream)?.ok_or_else(|| too_large(name, bytes.len()))?
        };
        let copy = Copy2d {
            from: End::Host(bytes.as_ptr().cast_mut().cast()),
            from_pitch: bytes.len(),
            to: End::Device(at),
            to_pitch: bytes.len(),
            width: bytes.len(),
            rows: 1,
        };
        copy_now(&stream, copy)?;
        Ok(at)
    }

    /// A single tensor keeps its rows. Of several, eight rows of each follow one another, the last eight filled up
    /// with zeros.
    fn bring(&self, name: &str, layout: &Layout, tensors: &[TensorBytes<'_>]) -> Result<Held, DeviceError> {
        let Layout { rows, width, stride, dtype } = *layout;
        let (size, count) = (dtype.bytes(), tensors.len());
        // Rows of one tensor that stand together.
        let together = if count == 1 { rows.max(1) } else { hopper::INTERLEAVED };
        let packed = if count == 1 { Some(rows) } else { rows.checked_next_multiple_of(together) };
        let packed = packed.and_then(|rows| rows.checked_mul(count));
        let bytes = packed
            .and_then(|rows| rows.checked_mul(stride))
            .and_then(|elements| elements.checked_mul(size))
            .ok_or_else(|| too_large(name, usize::MAX))?;
        let stream = self.stream.lock().unwrap_or_else(PoisonError::into_inner);
        let start = {
            let mut pool = self.pool.lock().unwrap_or_else(PoisonError::into_inner);
            pool.take(bytes, &stream)?.ok_or_else(|| too_large(name, bytes))?
        };
        if stride != width || packed != Some(rows * count) {
            // SAFETY: the piece was just taken with that size, and nobody else has it yet.
            unsafe { stream.fill(start, 0, bytes) }?;
        }
        for (index, tensor) in tensors.iter().enumerate() {
            let converted = (tensor.dtype != dtype).then(|| convert(tensor, rows * width, dtype));
            let source = converted.as_deref().unwrap_or(tensor.bytes).as_ptr().cast_mut();
            let (row, kept_row) = (width * size, stride * size);
            // `pieces` pieces of `lines` rows each, the first of them at row `first` of the tensor.
            let bring = |first: usize, pieces: usize, lines: usize| {
                let host = source.wrapping_add(first * row).cast();
                let device = start + ((first * count + index * together) * kept_row) as u64;
                let copy = Copy2d {
                    from: End::Host(host),
                    from_pitch: lines * row,
                    to: End::Device(device),
                    to_pitch: if pieces == 1 { lines * row } else { count * lines * kept_row },
                    width: lines * row,
                    rows: pieces,
                };
                copy_now(&stream, copy)
            };
            if stride == width {
                // Rows that stand together are one long row.
                let whole = rows / together;
                bring(0, whole, together)?;
                bring(whole * together, 1, rows % together)?;
            } else {
                for first in (0..rows).step_by(together) {
                    let lines = together.min(rows - first);
                    let copy = Copy2d {
                        from: End::Host(source.wrapping_add(first * row).cast()),
                        from_pitch: row,
                        to: End::Device(start + ((first * count + index * together) * kept_row) as u64),
                        to_pitch: kept_row,
                        width: row,
                        rows: lines,
                    };
                    copy_now(&stream, copy)?;
                }
            }
        }
        let rows = packed.unwrap_or(rows);
        Ok(Held { start, dtype, bricks: None, rows, width, stride, map: 0 })
    }
}

/// Where the numbers of each tensor of a weight go.
struct Layout {
    rows: usize,
    width: usize,
    stride: usize,
    dtype: DType,
}

/// Copies and waits: host memory is free afterwards.
fn copy_now(stream: &Stream, copy: Copy2d) -> Result<(), CudaError> {
    // SAFETY: both ends are the caller's until the wait below.
    unsafe { stream.copy(&copy.without_gaps()) }?;
    stream.synchronize()
}

/// The first `elements` numbers of a tensor in another format.
fn convert(tensor: &TensorBytes<'_>, elements: usize, dtype: DType) -> Vec<u8> {
    let mut wide = vec![0.0f32; elements];
    tensor.convert(0, &mut wide);
    match dtype {
        DType::BF16 => wide.into_iter().flat_map(|value| bf16::from_f32(value).to_le_bytes()).collect(),
        _ => wide.into_iter().flat_map(f32::to_le_bytes).collect(),
    }
}

/// The bfloat16 numbers that codes mean.
fn decoded(codes: &Codes) -> Vec<u8> {
    let mut row = vec![0.0; codes.columns];
    let mut bytes = Vec::with_capacity(codes.rows * codes.columns * DType::BF16.bytes());
    for index in 0..codes.rows {
        codes.decode(index, &mut row);
        bytes.extend(row.iter().flat_map(|&weight| bf16::from_f32(weight).to_le_bytes()));
    }
    bytes
}

fn too_large(name: &str, bytes: usize) -> DeviceError {
    DeviceError::OutOfMemory {
        name: name.to_owned(),
        needed: Bytes(bytes as u64),
        mend: "use more ranks on more GPUs, or a smaller model",
    }
}
