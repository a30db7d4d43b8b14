//! From an operation to a kernel and its arguments: what all have in common; each operation's own file has the rest.

mod assignments;
mod attention;
mod gemm;
mod host_to_device;
mod norm;
mod recurrent;
mod reduce;
mod rope;
mod route;
mod rows;

use super::Memory;
use super::driver::{Copy2d, CudaError, DeviceMemory, End, Event, EventPool, Function, Stream};
use super::kernels::Kernels;
use super::layout::{Layout, twin};
use super::memory::Pool;
use super::report::Report;
use super::staging::{Staged, Staging};
use super::weights::WeightStore;
use crate::op::Op;
use crate::{Buffer, DeviceError};
use epsmoe_base::{Bytes, DType, Fault};
pub(super) use gemm::GemmPart;
use std::sync::Arc;

/// Threads of a block that goes element by element; `THREADS` in `common.cuh`.
const THREADS: usize = 256;

/// Columns that a thread takes at once; `RUN` in `common.cuh`.
const RUN: usize = 8;

/// Threads of a warp, and columns that one takes at once; `RUNS * STRIDE` in `common.cuh`.
const WARP: usize = 32;
const STRETCH: usize = 4 * WARP * RUN;

/// What a row is cut into.
#[derive(Clone, Copy)]
enum Columns {
    /// Single ones, each a thread's.
    Each,
    /// Runs, each a thread's.
    Runs,
    /// Stretches, each a warp's.
    Stretches,
}

impl Columns {
    /// Threads for a row of `width` columns.
    fn threads(self, width: usize) -> usize {
        match self {
            Columns::Each => width,
            Columns::Runs => width.div_ceil(RUN),
            Columns::Stretches => width.div_ceil(STRETCH) * WARP,
        }
    }
}

/// Most blocks along the second axis of a grid.
const MOST_ROWS: usize = 65_535;

twin! {
    pub(super) struct Rows = "Rows" in "common.cuh" {
        start: u64,
        stride: u64,
        rows: u32,
        width: u32,
    }
}

impl Rows {
    /// In the place of a view that an operation does without.
    const NONE: Rows = Rows { start: 0, stride: 0, rows: 0, width: 0 };
}

/// What the sources are held against.
pub(super) const LAYOUTS: &[&Layout] = &[
    Rows::LAYOUT,
    assignments::AssignArgs::LAYOUT,
    assignments::CountArgs::LAYOUT,
    assignments::SendOrderArgs::LAYOUT,
    assignments::SpreadArgs::LAYOUT,
    assignments::ReceiveOrderArgs::LAYOUT,
    assignments::SortArgs::LAYOUT,
    attention::AttentionArgs::LAYOUT,
    attention::FewArgs::LAYOUT,
    attention::HopperAttentionArgs::LAYOUT,
    gemm::GemmPart::LAYOUT,
    gemm::GemmArgs::LAYOUT,
    gemm::CodedArgs::LAYOUT,
    gemm::FewMap::LAYOUT,
    gemm::FewArgs::LAYOUT,
    gemm::ListArgs::LAYOUT,
    norm::NormArgs::LAYOUT,
    norm::NarrowArgs::LAYOUT,
    recurrent::CarriedArgs::LAYOUT,
    recurrent::RecurrenceArgs::LAYOUT,
    recurrent::GateArgs::LAYOUT,
    recurrent::ShortConvArgs::LAYOUT,
    reduce::ReduceArgs::LAYOUT,
    rope::TableArgs::LAYOUT,
    rope::RotateArgs::LAYOUT,
    route::RouteArgs::LAYOUT,
    rows::ActivateArgs::LAYOUT,
    rows::AddArgs::LAYOUT,
    rows::AddSlotBiasArgs::LAYOUT,
    rows::ArgMaxArgs::LAYOUT,
    rows::ClampArgs::LAYOUT,
    rows::CopyArgs::LAYOUT,
    rows::EmbedArgs::LAYOUT,
    rows::GateRowsArgs::LAYOUT,
    rows::GatherArgs::LAYOUT,
    rows::GatherFp8Args::LAYOUT,
    rows::KvRowsArgs::LAYOUT,
    rows::KvWriteArgs::LAYOUT,
    rows::ScaleArgs::LAYOUT,
    rows::ScaleTermsArgs::LAYOUT,
    rows::SoftCapArgs::LAYOUT,
    rows::SlotBiasArgs::LAYOUT,
];

/// Why an operation did not start.
pub(super) enum Refusal {
    /// Its arguments are at fault.
    Arguments(DeviceError),
    /// The GPU is at fault, now or in earlier work.
    Gpu(CudaError),
    /// Work that is no operation stopped the world.
    World(Fault),
}

impl From<DeviceError> for Refusal {
    fn from(error: DeviceError) -> Self {
        Refusal::Arguments(error)
    }
}

impl From<CudaError> for Refusal {
    fn from(error: CudaError) -> Self {
        Refusal::Gpu(error)
    }
}

/// What a launch needs besides the operation. Whoever makes one holds the lock on enqueueing, and the hazard
/// check has passed: that is why the memory named by the operation may be given to a kernel.
pub(super) struct Launch<'a> {
    pub(super) kernels: &'a Kernels,
    pub(super) weights: &'a WeightStore,
    pub(super) staging: &'a mut Staging,
    pub(super) events: &'a Arc<EventPool>,
    pub(super) stream: &'a Stream,
    /// Where products of this lane draw their tiles from.
    pub(super) tickets: u64,
    pub(super) memory: &'a Memory,
    pub(super) report: Report,
    /// Whether scales of rows that become codes are powers of two.
    pub(super) power_scales: bool,
    /// Multiprocessors that products may fill.
    pub(super) multiprocessors: u32,
    /// Memory for what two kernels of one operation hand over; none on lanes whose operations have none such.
    pub(super) scratch: Option<&'a DeviceMemory>,
    /// There while what is enqueued is kept, to be enqueued again.
    pub(super) kept: Option<Kept<'a>>,
}

/// Where what kept work brings along stays, and what brings it there at once.
pub(super) struct Kept<'a> {
    pub(super) pool: &'a mut Pool,
    pub(super) stream: &'a Stream,
}

impl Kept<'_> {
    /// Where on the GPU a copy of these bytes stays.
    fn bring(&mut self, bytes: &[u8]) -> Result<u64, Refusal> {
        let full = || DeviceError::OutOfMemory {
            owner: "the GPU",
            name: "what steps bring along".into(),
            needed: Bytes(bytes.len() as u64),
            mend: "lower --max-model-len",
        };
        let to = self.pool.take(bytes.len(), self.stream)?.ok_or_else(full)?;
        let from = End::Host(bytes.as_ptr().cast_mut().cast());
        let (from_pitch, to_pitch, width) = (bytes.len(), bytes.len(), bytes.len());
        let copy = Copy2d { from, from_pitch, to: End::Device(to), to_pitch, width, rows: 1 };
        // SAFETY: the piece was just taken with that size, nobody else has it, and the copy is waited for.
        unsafe { self.stream.copy(&copy) }?;
        self.stream.synchronize()?;
        Ok(to)
    }
}

impl Launch<'_> {
    /// Enqueues an operation that passed its own check.
    pub(super) fn run(&mut self, op: &Op) -> Result<(), Refusal> {
        match op {
            Op::HostToDevice(op) => self.host_to_device(op),
            Op::Gemm(op) => self.gemm(op),
            Op::Norm(op) => self.norm(op),
            Op::AddNorm(op) => self.add_norm(op),
            Op::NormRotate(op) => self.norm_rotate(op),
            Op::RopeTable(op) => self.rope_table(op),
            Op::Rotate(op) => self.rotate(op),
            Op::Attention(op) => self.attention(op),
            Op::Route(op) => self.route(op),
            Op::ArgMax(op) => self.arg_max(op),
            Op::AssignSlots(op) => self.assign_slots(op),
            Op::CountSlots(op) => self.count_slots(op),
            Op::SendOrder(op) => self.send_order(op),
            Op::SpreadSlots(op) => self.spread_slots(op),
            Op::ReceiveOrder(op) => self.receive_order(op),
            Op::SortBySlot(op) => self.sort_by_slot(op),
            Op::ExpertGemm(op) => self.expert_gemm(op),
            Op::Reduce(op) => self.reduce(op),
            Op::Embed(op) => self.embed(op),
            Op::KvWrite(op) => self.kv_write(op),
            Op::Gather(op) => self.gather(op),
            Op::GatherFp8(op) => self.gather_fp8(op),
            Op::Add(op) => self.add(op),
            Op::Copy(op) => self.copy(op),
            Op::Clamp(op) => self.clamp(op),
            Op::GateRows(op) => self.gate_rows(op),
            Op::Scale(op) => self.scale(op),
            Op::ScaleTerms(op) => self.scale_terms(op),
            Op::SoftCap(op) => self.soft_cap(op),
            Op::Activate(op) => self.activate(op),
            Op::AddSlotBias(op) => self.add_slot_bias(op),
            Op::ShortConv(op) => self.short_conv(op),
            Op::Recurrence(op) => self.recurrence(op),
            Op::Gate(op) => self.gate(op),
        }
    }

    /// Starts a kernel over the rows of `over`, cut into `columns`; its arguments are the kernel's own struct.
    fn by_columns<A: Copy>(
        &mut self,
        columns: Columns,
        operation: &'static str,
        from: DType,
        to: DType,
        over: &Buffer,
        arguments: A,
    ) -> Result<(), Refusal> {
        self.by_columns_of((columns, 1), operation, (from, to), over, arguments)
    }

    /// The same over several buffers no larger than `over`, each a row of the grid.
    fn by_columns_of<A: Copy>(
        &mut self,
        (columns, buffers): (Columns, usize),
        operation: &'static str,
        (from, to): (DType, DType),
        over: &Buffer,
        arguments: A,
    ) -> Result<(), Refusal> {
        if is_empty(over) {
            return Ok(());
        }
        let kernel = self.kernels.get(operation, from, to)?;
        let threads = over.rows * columns.threads(over.width);
        // A kernel counts all threads in 32 bits.
        if threads > u32::MAX as usize / 2 {
            let message = format!("{operation}: {over:?} is too large for one launch");
            return Err(DeviceError::Unsupported(message).into());
        }
        self.start(&kernel.function, (threads.div_ceil(THREADS) as u32, buffers as u32), 0, arguments)
    }

    /// Starts a kernel over the elements of `over`; its arguments are the kernel's own struct.
    fn elements<A: Copy>(
        &mut self,
        operation: &'static str,
        from: DType,
        to: DType,
        over: &Buffer,
        arguments: A,
    ) -> Result<(), Refusal> {
        if is_empty(over) {
            return Ok(());
        }
        let kernel = self.kernels.get(operation, from, to)?;
        let blocks = (over.width.div_ceil(THREADS) as u32, over.rows.min(MOST_ROWS) as u32);
        self.start(&kernel.function, blocks, 0, arguments)
    }

    fn start<A: Copy>(
        &self,
        function: &Function,
        blocks: (u32, u32),
        shared_bytes: u32,
        arguments: A,
    ) -> Result<(), Refusal> {
        // SAFETY: each caller gives the twin of the kernel's own argument struct; the buffers in it lie inside
        // their allocations, were declared by the operation and are ordered by the hazard check; indices in
        // memory are checked by the kernel before they are followed.
        unsafe { self.stream.launch(function, blocks, shared_bytes, &arguments) }?;
        Ok(())
    }

    /// A buffer as a kernel sees it.
    fn rows(&self, buffer: &Buffer) -> Result<Rows, DeviceError> {
        let narrow = |size: usize| {
            u32::try_from(size).map_err(|_| {
                DeviceError::Shape(format!("{buffer:?} has more rows or columns than a kernel counts"))
            })
        };
        Ok(Rows {
            start: self.memory.address(buffer)?,
            stride: buffer.stride as u64,
            rows: narrow(buffer.rows)?,
            width: narrow(buffer.width)?,
        })
    }

    fn stage(&mut self, bytes: &[u8]) -> Result<Staged, Refusal> {
        if bytes.len() > Staging::LONGEST {
            let message = format!("{} bytes of arguments are too many for one operation", bytes.len());
            return Err(DeviceError::Unsupported(message).into());
        }
        let staged = self.staging.fill(bytes)?;
        staged.ok_or_else(|| {
            DeviceError::Unsupported("the GPU does not take in what is sent to it".into()).into()
        })
    }

    fn sent(&mut self, staged: &Staged) -> Result<(), Refusal> {
        let event: Event = self.events.record(self.stream)?;
        self.staging.sent(staged, event);
        Ok(())
    }
}

fn is_empty(buffer: &Buffer) -> bool {
    buffer.rows == 0 || buffer.width == 0
}

fn within(what: &str, bytes: usize, limit: u32) -> Result<u32, DeviceError> {
    u32::try_from(bytes).ok().filter(|&bytes| bytes <= limit).ok_or_else(|| {
        DeviceError::Unsupported(format!("{what} take {bytes} bytes of shared memory, this GPU has {limit}"))
    })
}
