//! What every processor promises.

use crate::op::{Accesses, GatherFp8, Op};
use crate::{AllocationId, Buffer, DeviceError, Drawn, TensorBytes, Weight, WeightFormat, WeightShape};
use epsmoe_base::{DType, Deadline, Fault, Lane, Place, Rank, RowFormat};
use epsmoe_quant::{Codes, Format, Target};
use std::cell::Cell;

/// Who is asked for buffers: a processor, or a [`Tally`].
pub trait Reserve {
    /// The format activations are computed and sent in.
    fn dtype(&self) -> DType;

    /// Reserves memory for `[rows, width]` elements. Only while loading: buffers never move after.
    fn allocate(
        &self,
        name: &'static str,
        dtype: DType,
        rows: usize,
        width: usize,
    ) -> Result<Buffer, DeviceError>;

    /// The same for a few numbers that the host reads in the middle of work: they lie where it reads them without asking
    /// the processor, which writes them a little more slowly.
    fn allocate_for_host(
        &self,
        name: &'static str,
        dtype: DType,
        rows: usize,
        width: usize,
    ) -> Result<Buffer, DeviceError> {
        self.allocate(name, dtype, rows, width)
    }

    /// Whether maps may be held such that rows become FP8 codes for them ([`Backend::load_fp8`]).
    fn fp8_rows(&self) -> bool {
        false
    }

    /// Reserves room for rows of up to `width` numbers as FP8 codes, each on 16 bytes; none where nothing asks for it.
    fn allocate_codes(&self, name: &'static str, rows: usize, width: usize) -> Result<Buffer, DeviceError> {
        let (dtype, words) = RowFormat::Fp8.elements(width);
        let rows = if self.fp8_rows() { rows } else { 0 };
        self.allocate(name, dtype, rows, words.next_multiple_of(16 / dtype.bytes()))
    }
}

/// Counts what would be reserved on a processor, and reserves nothing: so what a model is going to need is known from the
/// very code that will ask for it.
#[derive(Debug)]
pub struct Tally {
    dtype: DType,
    fp8_rows: bool,
    bytes: Cell<u64>,
}

impl Tally {
    /// Nothing yet, of a processor that computes in `dtype`, and with rows in FP8 or not.
    pub fn new(dtype: DType, fp8_rows: bool) -> Self {
        Tally { dtype, fp8_rows, bytes: Cell::new(0) }
    }

    /// Bytes of everything that was asked for.
    pub fn bytes(&self) -> u64 {
        self.bytes.get()
    }
}

impl Reserve for Tally {
    fn dtype(&self) -> DType {
        self.dtype
    }

    fn allocate(
        &self,
        name: &'static str,
        dtype: DType,
        rows: usize,
        width: usize,
    ) -> Result<Buffer, DeviceError> {
        let bytes = [width, dtype.bytes()].iter().fold(rows as u64, |all, &by| all.saturating_mul(by as u64));
        self.bytes.set(self.bytes.get().saturating_add(bytes));
        Ok(Buffer { allocation: AllocationId(u32::MAX), name, dtype, offset: 0, rows, width, stride: width })
    }

    fn fp8_rows(&self) -> bool {
        self.fp8_rows
    }
}

/// A processor with memory, weights and two lanes.
///
/// * An operation is only *enqueued*, on a lane, and refused only for bad arguments. What goes wrong while
///   it runs is sticky: it sets the world's fault cell and surfaces at [`wait`](Backend::wait).
/// * A lane runs its operations in order. Two lanes run beside each other and are ordered by events alone.
/// * **Row invariance**: the bits of an output row depend on its inputs, the weight and the kernel, never on
///   how many rows there are, where it stands among them, or on which lane it runs.
pub trait Backend: Reserve + Send + Sync + 'static {
    /// A point in a lane: complete once everything enqueued on the lane before it is.
    type Event: Clone + Send + Sync + 'static;

    /// A lane as work that is no operation sees it: see [`enqueue_external`](Backend::enqueue_external).
    type Queue: Send + Sync + 'static;

    /// The rank this processor works for.
    fn rank(&self) -> Rank;

    /// Bytes reserved by [`allocate`](Reserve::allocate) so far.
    fn allocated_bytes(&self) -> u64;

    /// A weight this process already holds under that name, loaded by this rank or another.
    fn find(&self, name: &str) -> Option<Weight>;

    /// Takes a weight in, in the layout of the processor's kernels. The tensors are those of [`WeightShape::sources`].
    fn load(
        &self,
        name: &str,
        shape: WeightShape,
        tensors: &[TensorBytes<'_>],
    ) -> Result<Weight, DeviceError>;

    /// The same for tensors that are made rather than stored, where the processor makes them faster than a host brings them;
    /// nothing where it does not, and the numbers are to be brought.
    fn draw(&self, name: &str, shape: WeightShape, tensors: &[Drawn]) -> Result<Option<Weight>, DeviceError> {
        let _ = (name, shape, tensors);
        Ok(None)
    }

    /// Whether maps can stay in these codes on this processor; otherwise they are decoded before they are loaded.
    fn holds(&self, format: &Format) -> bool {
        let _ = format;
        false
    }

    /// Takes a map in, in codes: as many matrices as [`WeightShape::sources`] says, all of one format that is held.
    fn load_codes(&self, name: &str, shape: WeightShape, matrices: &[Codes]) -> Result<Weight, DeviceError> {
        let _ = (shape, matrices);
        Err(DeviceError::Unsupported(format!(
            "{name}: this processor holds no weights in codes; load them decoded (--quantization dequantise)"
        )))
    }

    /// What [`load_codes`](Backend::load_codes) takes in, for tensors that are made rather than stored: the codes that `target`
    /// gives them. Nothing where the processor does not make them, and the codes are to be brought.
    fn draw_codes(
        &self,
        name: &str,
        shape: WeightShape,
        target: Target,
        tensors: &[Drawn],
    ) -> Result<Option<Weight>, DeviceError> {
        let _ = (name, shape, target, tensors);
        Ok(None)
    }

    /// Takes a map in that is multiplied as FP8 codes, with rows in such codes: as many matrices as [`WeightShape::sources`]
    /// says, of one format. Nothing if the processor has no such products, or none with these codes or what they fold into.
    fn load_fp8(
        &self,
        name: &str,
        shape: WeightShape,
        matrices: &[Codes],
    ) -> Result<Option<Weight>, DeviceError> {
        let _ = (name, shape, matrices);
        Ok(None)
    }

    /// What [`load_fp8`](Backend::load_fp8) takes in, for tensors that are made rather than stored: the codes and scales that
    /// `target` gives them. Nothing where the processor does not make them, and the codes are to be brought.
    fn draw_fp8(
        &self,
        name: &str,
        shape: WeightShape,
        target: Target,
        tensors: &[Drawn],
    ) -> Result<Option<Weight>, DeviceError> {
        let _ = (name, shape, target, tensors);
        Ok(None)
    }

    /// Rows as products with a weight take them: as they are, or as codes, for which there is `room`, where the weight is held
    /// as [`WeightFormat::Fp8`].
    fn rows_for(
        &self,
        place: Place,
        x: &Buffer,
        weight: &Weight,
        room: &Buffer,
    ) -> Result<Buffer, DeviceError> {
        if weight.format != WeightFormat::Fp8 {
            return Ok(x.clone());
        }
        let (_, words) = RowFormat::Fp8.elements(x.width);
        let codes = room.rows(0..x.rows)?.columns(0..words)?;
        self.enqueue(Lane::Compute, place, GatherFp8::encode(x.clone(), codes.clone()))?;
        Ok(codes)
    }

    /// Appends an operation to a lane.
    fn enqueue(&self, lane: Lane, place: Place, op: impl Into<Op>) -> Result<(), DeviceError>;

    /// Appends work that is no operation, such as an exchange between ranks, to a lane. `accesses` is all it may touch,
    /// through the queue it is handed; they are ordered against everything else as an operation's are.
    ///
    /// A host processor runs `work` on the lane's thread, when its turn comes; it may wait there, with a deadline. A GPU
    /// runs it at once, on the calling thread, and it puts what it wants done into the queue.
    fn enqueue_external(
        &self,
        lane: Lane,
        place: Place,
        name: &'static str,
        accesses: &Accesses,
        work: impl FnOnce(&Self::Queue) -> Result<(), Fault> + Send + 'static,
    ) -> Result<(), DeviceError>;

    /// Enqueues what `work` does, all of it operations on the compute lane. Under one key that is the same every time: the
    /// same operations on the same memory, whatever numbers lie there by then. So a processor may keep it, and enqueue it
    /// again without asking `work`; whether it did.
    fn repeat<E: From<DeviceError>>(
        &self,
        key: u64,
        work: impl FnOnce() -> Result<(), E>,
    ) -> Result<bool, E> {
        let _ = key;
        work().map(|()| false)
    }

    /// The point that the lane has been filled to.
    fn record(&self, lane: Lane) -> Self::Event;

    /// Lets nothing enqueued on `lane` from now on start before `event` is complete.
    fn lane_wait(&self, lane: Lane, event: &Self::Event);

    /// Blocks the caller until `event` is complete, the world has stopped, or the deadline has passed: for each piece of
    /// work before the event where the processor tells when one ends, else for all of them.
    fn wait(&self, event: &Self::Event, deadline: Deadline) -> Result<(), Fault>;

    /// Copies numbers out, row by row; only what a waited-for event ordered before may be read.
    fn read_f32(&self, buffer: &Buffer) -> Result<Vec<f32>, Fault>;

    /// Copies indices out, as [`read_f32`](Backend::read_f32).
    fn read_u32(&self, buffer: &Buffer) -> Result<Vec<u32>, Fault>;

    /// Leaves so many thousandths of the processor to others, that is to transfers, in products that are enqueued from
    /// now on. No bit depends on it. A processor that cannot be divided computes on all of itself.
    fn reserve_for_transfers(&self, permille: u64) {
        let _ = permille;
    }

    /// Whether what runs from now on is timed and recorded; it is not until somebody asks, because it costs time.
    fn set_recording(&self, on: bool);

    /// What ran while recording since the last call, in order of completion.
    fn take_records(&self) -> Vec<Record>;
}

/// When an operation ran.
#[derive(Clone, Debug)]
pub struct Record {
    /// The lane it ran on.
    pub lane: Lane,
    /// Where in the model it belongs; its phase is that of the operation where the caller did not say.
    pub place: Place,
    /// The operation.
    pub name: &'static str,
    /// Start, in nanoseconds since the world began.
    pub start_ns: u64,
    /// End, likewise.
    pub end_ns: u64,
}
