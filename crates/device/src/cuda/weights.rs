//! The weights of a process on one GPU: loaded once, by several threads, and shared by all its ranks there.

use super::bricks::Bricks;
use super::carrier::{Carriers, Lines};
use super::driver::{Context, CudaError, Element, Matrix, PinnedMemory, Stream, TensorMap};
use super::fp8;
use super::hopper;
use super::kernels::Kernels;
use super::layout::{self, twin};
use super::memory::Pool;
use crate::threaded::{check_codes, check_sources, held_format};
use crate::{DeviceError, Drawn, TensorBytes, Weight, WeightFormat, WeightShape, WeightSlot};
use epsmoe_base::{Bytes, DType};
use epsmoe_quant::{Codes, Target};
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
    context: Arc<Context>,
    stream: Stream,
    carriers: Carriers,
    pool: Mutex<Pool>,
    inner: RwLock<Inner>,
}

#[derive(Default)]
struct Inner {
    held: Vec<Held>,
    by_name: HashMap<Arc<str>, Weight>,
}

impl WeightStore {
    pub(super) fn new(context: &Arc<Context>, mapped: bool) -> Result<Self, CudaError> {
        Ok(WeightStore {
            mapped,
            context: Arc::clone(context),
            stream: Stream::new(context)?,
            carriers: Carriers::new(context),
            pool: Mutex::new(Pool::new(context, None)),
            inner: RwLock::default(),
        })
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
        let format = held_format(name, shape, dtype, tensors[0].dtype)?;
        let layout = Layout::of(shape, dtype, tensors[0].dtype);
        let held = self.reserve(name, &layout)?;
        self.bring(&layout, &held, tensors)?;
        self.keep(name, shape, format, self.mapped(name, shape, held)?)
    }

    /// Makes a weight of numbers that follow from their places, each the bfloat16 that a checkpoint would have.
    pub(super) fn draw(
        &self,
        kernels: &Kernels,
        dtype: DType,
        name: &str,
        shape: WeightShape,
        tensors: &[Drawn],
    ) -> Result<Weight, DeviceError> {
        let format = held_format(name, shape, dtype, DType::BF16)?;
        let layout = Layout::of(shape, dtype, DType::BF16);
        let kernel = kernels.get("draw", DType::BF16, layout.dtype)?;
        let held = self.reserve(name, &layout)?;
        for (index, tensor) in tensors.iter().enumerate() {
            let sizes = [layout.rows, layout.width, layout.stride];
            let arguments = DrawArgs::of(tensor, held.start, sizes, [index, layout.tensors]);
            let blocks =
                (layout.width.div_ceil(DRAW_THREADS) as u32, layout.rows.clamp(1, DRAW_BLOCKS) as u32);
            // SAFETY: the kernel writes the rows of this tensor inside the memory of this weight, which nobody else has yet.
            unsafe { self.stream.launch(&kernel.function, blocks, 0, &arguments) }?;
        }
        self.stream.synchronize()?;
        self.keep(name, shape, format, self.mapped(name, shape, held)?)
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

    /// Brings a map to the GPU as FP8 codes that are multiplied as such: their rows, and a map with the scales of blocks.
    /// Nothing if codes neither are in such blocks nor fold into them.
    pub(super) fn load_fp8(
        &self,
        name: &str,
        shape: WeightShape,
        matrices: &[Codes],
    ) -> Result<Option<Weight>, DeviceError> {
        check_codes(name, shape, matrices)?;
        let Some(packed) = fp8::pack(matrices).filter(|_| self.mapped) else { return Ok(None) };
        let fp8::Packed { codes, scales, rows, stride } = packed;
        let (start, width) = (self.bring_bytes(name, &codes)?, matrices[0].columns);
        let (held, to) = self.mapped_codes(name, start, [rows, width, stride], scales.len())?;
        // SAFETY: so much room was just taken there, and nobody else has it yet.
        unsafe { self.bring_to(to, bytemuck::cast_slice(&scales)) }?;
        self.keep(name, shape, WeightFormat::Fp8, held).map(Some)
    }

    /// Makes a map of numbers that follow from their places, in the codes that it has when it is quantised to MXFP4 on the host.
    /// Nothing where kernels could not do with scales what they mean.
    pub(super) fn draw_mxfp4(
        &self,
        kernels: &Kernels,
        name: &str,
        shape: WeightShape,
        tensors: &[Drawn],
    ) -> Result<Option<Weight>, DeviceError> {
        /// What is below it has scales below 4.
        const LARGEST: f32 = 8.0;
        let (count, dimensions) = shape.sources();
        let (height, width) = (dimensions[0], dimensions[1]);
        let format = Target::Mxfp4.format(width);
        let small = tensors.iter().all(|tensor| tensor.step * 32768.0 < LARGEST);
        let Some(bricks) = Bricks::of(&format).filter(|_| small && Target::Mxfp4.fits(width)) else {
            return Ok(None);
        };
        let (rows, bytes) = bricks.size([count, height, width]);
        let start = self.take(name, bytes)?;
        // SAFETY: the piece was just taken with that size, and nobody else has it yet.
        unsafe { self.stream.fill(start, 0, bytes) }?;
        let kernel = kernels.get("draw_mxfp4", DType::BF16, DType::U32)?;
        let parts = height * width / format.part;
        for (index, tensor) in tensors.iter().enumerate() {
            let arguments = DrawArgs::of(tensor, start, [height, width, bricks.bytes()], [index, count]);
            let blocks = (parts.div_ceil(DRAW_THREADS).clamp(1, DRAW_BLOCKS) as u32, 1);
            // SAFETY: the kernel writes the rows of this tensor inside the memory of this weight, which nobody else has yet.
            unsafe { self.stream.launch(&kernel.function, blocks, 0, &arguments) }?;
        }
        self.stream.synchronize()?;
        let held = Held { start, dtype: DType::BF16, bricks: Some(bricks), rows, width, stride: 0, map: 0 };
        self.keep(name, shape, WeightFormat::Coded(format), held).map(Some)
    }

    /// Makes a map of numbers that follow from their places as FP8 codes that are multiplied as such: those that it has when it is
    /// quantised on the host, and folded if that is to MXFP4. Nothing if codes are not in such blocks.
    pub(super) fn draw_fp8(
        &self,
        kernels: &Kernels,
        name: &str,
        shape: WeightShape,
        target: Target,
        tensors: &[Drawn],
    ) -> Result<Option<Weight>, DeviceError> {
        let (count, dimensions) = shape.sources();
        let (height, width) = (dimensions[0], dimensions[1]);
        let in_blocks = target.fits(width) && target.format(width).may_become_fp8_blocks();
        if !(self.mapped && in_blocks && fp8::is_even([height, width])) {
            return Ok(None);
        }
        let (rows, stride) = (count * height, fp8::stride(width));
        let start = self.take(name, rows * stride)?;
        let (down, across) = (height.div_ceil(fp8::BLOCK), width.div_ceil(fp8::BLOCK));
        let (held, scales) = self.mapped_codes(name, start, [rows, width, stride], count * down * across)?;
        let operation = if target == Target::Mxfp4 { "draw_folded" } else { "draw_blocks" };
        let kernel = kernels.get(operation, DType::BF16, DType::E4M3)?;
        let refused = PinnedMemory::new(&self.context, size_of::<u32>())?;
        // SAFETY: just allocated with that size, and nobody else has it.
        unsafe { refused.start.cast::<u32>().write_volatile(0) };
        for (index, tensor) in tensors.iter().enumerate() {
            let arguments = DrawArgs {
                scales: scales + (index * down * across * size_of::<f32>()) as u64,
                refused: refused.device_address()?,
                ..DrawArgs::of(tensor, start, [height, width, stride], [index, count])
            };
            let blocks = (across as u32, down.min(DRAW_BLOCKS) as u32);
            // SAFETY: the kernel writes the rows and scales of this tensor inside the memory of this weight, which nobody
            // else has yet, and a word that outlives it.
            unsafe { self.stream.launch(&kernel.function, blocks, 0, &arguments) }?;
        }
        self.stream.synchronize()?;
        // SAFETY: written above, and by kernels that have ended.
        if unsafe { refused.start.cast::<u32>().read_volatile() } != 0 {
            return Ok(None);
        }
        self.keep(name, shape, WeightFormat::Fp8, held).map(Some)
    }

    /// Codes of so many rows, columns and bytes from row to row with their map, and where there is room behind it for scales.
    fn mapped_codes(
        &self,
        name: &str,
        start: u64,
        [rows, width, stride]: [usize; 3],
        scales: usize,
    ) -> Result<(Held, u64), DeviceError> {
        let (element, piece) = (Element::Byte, fp8::WEIGHT_PIECE);
        let described = TensorMap::new(&Matrix { start, rows, width, stride, element, piece })?;
        let map = self.take(name, size_of::<TensorMap>() + scales * size_of::<f32>())?;
        // SAFETY: the piece was just taken, and nobody else has it yet.
        unsafe { self.bring_to(map, bytemuck::bytes_of(&described)) }?;
        let held = Held { start, dtype: DType::BF16, bricks: None, rows, width, stride, map };
        Ok((held, map + size_of::<TensorMap>() as u64))
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

    /// The same with its description for TMA, in GPU memory, once and for all, if it is one that TMA reads.
    fn mapped(&self, name: &str, shape: WeightShape, held: Held) -> Result<Held, DeviceError> {
        let Held { start, rows, width, stride, dtype, .. } = held;
        if !self.mapped || !shape.is_map() || dtype != DType::BF16 {
            return Ok(held);
        }
        let (element, piece) = (Element::Bf16, hopper::WEIGHT_PIECE);
        let map = TensorMap::new(&Matrix { start, rows, width, stride, element, piece })?;
        Ok(Held { map: self.bring_bytes(name, bytemuck::bytes_of(&map))?, ..held })
    }

    /// A piece of memory that holds nothing defined.
    fn take(&self, name: &str, bytes: usize) -> Result<u64, DeviceError> {
        let mut pool = self.pool.lock().unwrap_or_else(PoisonError::into_inner);
        pool.take(bytes, &self.stream)?.ok_or_else(|| too_large(name, bytes))
    }

    /// Brings bytes to the GPU as they are.
    fn bring_bytes(&self, name: &str, bytes: &[u8]) -> Result<u64, DeviceError> {
        let at = self.take(name, bytes.len())?;
        // SAFETY: the piece was just taken with that size, and nobody else has it yet.
        unsafe { self.bring_to(at, bytes) }?;
        Ok(at)
    }

    /// The same to memory of that size.
    ///
    /// # Safety
    /// Nobody else has the memory yet.
    unsafe fn bring_to(&self, at: u64, bytes: &[u8]) -> Result<(), DeviceError> {
        let whole = Lines { width: bytes.len(), count: 1, pitch: bytes.len() };
        // SAFETY: the caller's.
        self.carriers.with(|carrier| unsafe { carrier.bring(bytes, at, whole) })?;
        Ok(())
    }

    /// Memory for a weight, zero where no number will be.
    fn reserve(&self, name: &str, layout: &Layout) -> Result<Held, DeviceError> {
        let Layout { width, stride, dtype, .. } = *layout;
        let (Some(rows), Some(bytes)) = (layout.packed_rows(), layout.bytes()) else {
            return Err(too_large(name, usize::MAX));
        };
        let start = self.take(name, bytes)?;
        if stride != width || rows != layout.rows * layout.tensors {
            // SAFETY: the piece was just taken with that size, and nobody else has it yet.
            unsafe { self.stream.fill(start, 0, bytes) }?;
            self.stream.synchronize()?;
        }
        Ok(Held { start, dtype, bricks: None, rows, width, stride, map: 0 })
    }

    /// Brings tensors to where the layout says.
    fn bring(&self, layout: &Layout, held: &Held, tensors: &[TensorBytes<'_>]) -> Result<(), CudaError> {
        let row = layout.width * layout.dtype.bytes();
        self.carriers.with(|carrier| {
            for (tensor, to) in tensors.iter().zip(0..) {
                let converted = (tensor.dtype != layout.dtype).then(|| convert(tensor, layout));
                let bytes = converted.as_deref().unwrap_or(tensor.bytes);
                for (first, lines) in layout.lines() {
                    let (from, at) = (&bytes[first * row..], held.start + layout.place(to, first));
                    // SAFETY: the lines lie inside the memory of this weight, which nobody else has yet.
                    unsafe { carrier.bring(from, at, lines) }?;
                }
            }
            Ok(())
        })
    }
}

/// Threads of a block of kernels that draw, and most blocks along the rows.
const DRAW_THREADS: usize = 256;
const DRAW_BLOCKS: usize = 4096;

twin! {
    pub(super) struct DrawArgs = "Args" in "draw.cuh" {
        out: u64,
        stride: u64,
        rows: u32,
        width: u32,
        together: u32,
        apart: u32,
        key: u64,
        first: u64,
        row_step: u64,
        column_step: u64,
        step: f32,
        first_row: u32,
        scales: u64,
        refused: u64,
    }
}

impl DrawArgs {
    /// The numbers of tensor `index` of `count`, of `rows` and `width`, whose rows stand as every weight's do.
    fn of(tensor: &Drawn, out: u64, [rows, width, stride]: [usize; 3], [index, count]: [usize; 2]) -> Self {
        let together = if count == 1 { rows.max(1) } else { hopper::INTERLEAVED };
        DrawArgs {
            out,
            stride: stride as u64,
            rows: rows as u32,
            width: width as u32,
            together: together as u32,
            apart: (together * count) as u32,
            key: tensor.numbers.key(),
            first: tensor.first,
            row_step: tensor.row_step,
            column_step: tensor.column_step,
            step: tensor.step,
            first_row: (index * together) as u32,
            scales: 0,
            refused: 0,
        }
    }
}

/// What the source is held against.
pub(super) const LAYOUTS: &[&layout::Layout] = &[DrawArgs::LAYOUT];

/// Where the numbers of a weight's tensors lie. A single tensor keeps its rows. Of several, eight rows of each follow one
/// another, the last eight filled up with zeros.
struct Layout {
    tensors: usize,
    /// Of each tensor.
    rows: usize,
    width: usize,
    stride: usize,
    dtype: DType,
}

impl Layout {
    /// Of a weight on a GPU that computes in `dtype`, whose tensors are `stored` so: the rows of maps on 16 bytes.
    fn of(shape: WeightShape, dtype: DType, stored: DType) -> Self {
        let (tensors, dimensions) = shape.sources();
        let (rows, width, dtype) = match shape {
            WeightShape::Vector { n } => (1, n, DType::F32),
            WeightShape::Table { rows, width } => (rows, width, stored),
            _ => (dimensions[0], dimensions[1], dtype),
        };
        let stride = if shape.is_map() { width.next_multiple_of(16 / dtype.bytes()) } else { width };
        Layout { tensors, rows, width, stride, dtype }
    }

    /// Rows of one tensor that stand together.
    fn together(&self) -> usize {
        if self.tensors == 1 { self.rows.max(1) } else { hopper::INTERLEAVED }
    }

    /// Rows of all tensors, and those of zeros; nothing if there is no such number, as of `bytes`.
    fn packed_rows(&self) -> Option<usize> {
        let rows = if self.tensors == 1 {
            Some(self.rows)
        } else {
            self.rows.checked_next_multiple_of(self.together())
        };
        rows?.checked_mul(self.tensors)
    }

    fn bytes(&self) -> Option<usize> {
        self.packed_rows()?.checked_mul(self.stride)?.checked_mul(self.dtype.bytes())
    }

    /// Where a row of a tensor lies that begins rows which stand together, in bytes.
    fn place(&self, tensor: usize, row: usize) -> u64 {
        ((row * self.tensors + tensor * self.together()) * self.stride * self.dtype.bytes()) as u64
    }

    /// A tensor's rows as lines that lie evenly in the weight: the first row of each such piece, and its lines.
    fn lines(&self) -> Vec<(usize, Lines)> {
        let (together, size) = (self.together(), self.dtype.bytes());
        let (row, kept) = (self.width * size, self.stride * size);
        if self.stride != self.width {
            let of = |first: usize| {
                let count = together.min(self.rows - first);
                (first, Lines { width: row, count, pitch: kept })
            };
            return (0..self.rows).step_by(together).map(of).collect();
        }
        // Rows that stand together are one line.
        let (whole, rest) = (self.rows / together, self.rows % together);
        let pitch = self.tensors * together * kept;
        let all = Lines { width: together * row, count: whole, pitch };
        vec![(0, all), (whole * together, Lines { width: rest * row, count: 1, pitch })]
    }
}

/// The numbers of a tensor in the format of a layout.
fn convert(tensor: &TensorBytes<'_>, layout: &Layout) -> Vec<u8> {
    let mut wide = vec![0.0f32; layout.rows * layout.width];
    tensor.convert(0, &mut wide);
    match layout.dtype {
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
        owner: "the GPU",
        name: name.to_owned(),
        needed: Bytes(bytes as u64),
        mend: "use more ranks on more GPUs, or a smaller model",
    }
}
