//! A GPU as a processor: lanes are streams, events are CUDA events, every operation is a kernel of ours.
//!
//! Read in this order: this file (the [`Backend`]), `launch/` (from an operation to a kernel and its arguments),
//! `kernels/*.cu` (one operation a file), `kernels.rs` (compiled for the GPU at hand, kept on disk). `driver.rs` and
//! `nvrtc.rs` are the two libraries, loaded when asked for: the program builds without CUDA and runs without a GPU.
//! `probe` measures what this GPU does where nothing promises it.
//!
//! Numbers that arrive in memory (indices, sequences) are checked by the kernels that follow them; what they find is
//! read while waiting (`report.rs`) and stops the world with the words that a host processor uses.

mod bricks;
mod carrier;
mod driver;
mod fp8;
mod hopper;
mod kernels;
mod launch;
mod layout;
mod memory;
mod nccl;
mod nvrtc;
mod pacer;
mod probe;
mod queue;
mod repeat;
mod report;
mod staging;
mod weights;

pub use driver::{DriverCalls, count_driver_calls, take_driver_calls};
pub use kernels::{CACHE_VARIABLE, KernelUse, Warmed, check_kernels, warm_kernels};
pub use nccl::{CarryOn, Communicator, NcclError, Part, UNIQUE_ID_BYTES, nccl_unique_id, nccl_version};
pub use probe::{Capabilities, Figure, Known, Probes, Table, probe};
pub use queue::{CudaQueue, CudaRows};

use crate::hazard::{Agent, Clock, Hazards};
use crate::op::{Accesses, Op, Origin};
use crate::threaded::{Cached, E4m3, Fill};
use crate::{
    AllocationId, Backend, Buffer, DeviceError, Drawn, Record, Reserve, TensorBytes, Weight, WeightShape,
};
use bricks::Bricks;
use cudarc::driver::sys::CUdevice_attribute::{
    CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
};
use driver::{Context, Copy2d, CudaError, DeviceMemory, End, Event, EventPool, PinnedMemory, Stream};
use epsmoe_base::{Bytes, DType, Deadline, Fault, FaultCell, FaultKind, Lane, Place, Rank, panic_text};
use epsmoe_quant::{Codes, Format, Target};
use half::bf16;
use kernels::Kernels;
use launch::{Kept, Launch, Refusal};
use memory::Pool;
use pacer::Pacer;
use repeat::{Keeping, Repeats};
use report::ReportPage;
use staging::Staging;
use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};
use weights::WeightStore;

/// Bytes that kernels of one operation have to hand over in: attention scores of a token and 16 heads over 512K
/// positions, or of 128 such tokens over 4K, or what 240 blocks of a prompt put away between spans. First come words that are zero
/// between kernels.
const SCRATCH: usize = 32 << 20;

/// Bytes that a rank takes of a GPU beside its buffers.
pub const RANK_BYTES: u64 = SCRATCH as u64 + staging::CAPACITY + (2 << 20);

/// Bytes of slabs that stay free beside so many bytes of weights and buffers, at most.
pub fn beside_pieces(bytes: u64) -> u64 {
    bytes / 32 + (64 << 20)
}

/// The oldest driver that runs what CUDA 13 compiles, as 1000 · major + 10 · minor.
const OLDEST_DRIVER: i32 = 13_000;

impl From<CudaError> for DeviceError {
    fn from(error: CudaError) -> Self {
        DeviceError::Unsupported(error.to_string())
    }
}

/// One GPU of this machine with every kernel loaded. Shared by the ranks of a process that work on it.
pub struct CudaDevice {
    context: Arc<Context>,
    kernels: Kernels,
    ordinal: usize,
    description: String,
    multiprocessors: u32,
    /// What holds the lanes of its ranks where a link is emulated.
    pacer: Pacer,
    /// What each of its ranks has given it to do.
    underway: Mutex<Vec<Weak<Mutex<Underway>>>>,
}

impl CudaDevice {
    /// Opens GPU number `ordinal`, and begins to load its kernels, or to compile them if the cache on disk does not hold
    /// them: what needs one waits for it. Every absence (no driver, an old one, no such GPU, no NVRTC) is an error that
    /// says what would mend it.
    pub fn open(ordinal: usize) -> Result<Arc<Self>, DeviceError> {
        let (context, architecture) = Self::find(ordinal)?;
        let kernels = Kernels::begin(&context, &architecture)?;
        let multiprocessors = kernels::multiprocessors(&context)?;
        let version = driver::driver_version().unwrap_or(0);
        let description = format!(
            "{}, {multiprocessors} multiprocessors, {}, {architecture}, driver for CUDA {}.{}",
            context.name()?,
            Bytes(context.memory()?.1),
            version / 1000,
            version % 1000 / 10
        );
        Ok(Arc::new(CudaDevice {
            context,
            kernels,
            ordinal,
            description,
            multiprocessors,
            pacer: Pacer::default(),
            underway: Mutex::default(),
        }))
    }

    /// Whether it multiplies FP8 codes with FP8 codes.
    pub fn multiplies_fp8(&self) -> bool {
        self.kernels.has_hopper()
    }

    /// Waits until its kernels are ready, but for those that only weights in codes need.
    pub fn finish_kernels(&self) -> Result<(), DeviceError> {
        self.kernels.finish()
    }

    /// The folder that compiled kernels are kept in; nothing if there is none to write to, and every start compiles.
    pub fn kernel_folder(&self) -> Option<&Path> {
        self.kernels.folder()
    }

    /// What kernels for GPU number `ordinal` are compiled for, such as `sm_90a`.
    pub fn architecture(ordinal: usize) -> Result<String, DeviceError> {
        Ok(Self::find(ordinal)?.1)
    }

    /// How many GPUs the driver shows; an error where there is no driver, or an old one.
    pub fn count() -> Result<usize, DeviceError> {
        let missing = |message: String| Err(DeviceError::Unsupported(message));
        let Some(version) = driver::driver_version() else {
            return missing(
                "no GPU driver was found on this machine; install the NVIDIA driver 580 or newer, or run on the \
                 CPU"
                .into(),
            );
        };
        if version < OLDEST_DRIVER {
            return missing(format!(
                "the GPU driver speaks CUDA {}.{}, but 13.0 is needed; update it to 580 or newer",
                version / 1000,
                version % 1000 / 10
            ));
        }
        Ok(driver::count_devices()?)
    }

    fn find(ordinal: usize) -> Result<(Arc<Context>, String), DeviceError> {
        let count = Self::count()?;
        if ordinal >= count {
            return Err(DeviceError::Unsupported(format!(
                "there is no GPU {ordinal}: the driver shows {}; look at CUDA_VISIBLE_DEVICES, or run on the CPU",
                epsmoe_base::count(count, "GPU")
            )));
        }
        let context = Arc::new(Context::retain(ordinal)?);
        let name = context.name()?;
        let major = context.attribute(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
        let minor = context.attribute(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?;
        if major < 8 {
            return Err(DeviceError::Unsupported(format!(
                "{name} has compute capability {major}.{minor}, but 8.0 is needed"
            )));
        }
        let architecture = match (major, minor) {
            (9, 0) => "sm_90a".to_owned(),
            _ => format!("sm_{major}{minor}"),
        };
        Ok((context, architecture))
    }

    /// The GPU in a few words: name, size, architecture, driver.
    pub fn describe(&self) -> &str {
        &self.description
    }

    /// Its number, as the driver counts.
    pub fn ordinal(&self) -> usize {
        self.ordinal
    }

    /// Lets copies go from this GPU's memory to another's and back without a detour. Whether they do: where the two
    /// cannot reach each other, the driver takes copies by way of the host's memory.
    pub fn connect(&self, other: &CudaDevice) -> Result<bool, DeviceError> {
        Ok(self.context.reach(&other.context)? && other.context.reach(&self.context)?)
    }

    /// Bytes of memory that nobody uses at this moment, and bytes of all memory.
    pub fn memory_bytes(&self) -> Result<(u64, u64), DeviceError> {
        Ok(self.context.memory()?)
    }

    /// Whether products of such numbers run on the kernels for Hopper, whose tiles `TileCost` of the plan room prices.
    pub fn multiplies_by_tiles(&self, dtype: DType) -> bool {
        dtype == DType::BF16 && self.kernels.has_hopper()
    }

    /// Streaming multiprocessors.
    pub fn multiprocessors(&self) -> u32 {
        self.multiprocessors
    }
}

/// The weights of a process on one GPU, shared by its ranks there.
#[derive(Clone)]
pub struct CudaWeights(Arc<WeightStore>);

impl CudaWeights {
    /// An empty store.
    pub fn new(device: &CudaDevice) -> Result<Self, DeviceError> {
        Ok(CudaWeights(Arc::new(WeightStore::new(&device.context, device.kernels.has_hopper())?)))
    }
}

/// Bits that a weight in codes of this format takes on a GPU that computes in `dtype`; nothing if it holds none.
pub fn held_bits(format: &Format, dtype: DType) -> Option<f64> {
    Bricks::of(format).filter(|_| dtype == DType::BF16).map(Bricks::bits)
}

/// What the GPU processors of one world share.
#[derive(Clone)]
pub struct CudaOptions {
    /// Format of activations.
    pub dtype: DType,
    /// The world's fault cell.
    pub faults: FaultCell,
    /// The world's birth, which timelines count from.
    pub epoch: Instant,
    /// What fresh memory holds.
    pub fill: Fill,
    /// Multiprocessors that products leave to others all the time, or more while a plan says so.
    pub reserved_multiprocessors: u32,
    /// Whether maps in FP8 blocks are multiplied as codes, with rows that become codes for them.
    pub fp8_rows: bool,
    /// Whether scales of rows that become FP8 codes are powers of two.
    pub power_scales: bool,
}

impl CudaOptions {
    /// Plain options for a new world.
    pub fn new(dtype: DType) -> Self {
        CudaOptions {
            dtype,
            faults: FaultCell::default(),
            epoch: Instant::now(),
            fill: Fill::Zero,
            reserved_multiprocessors: 0,
            fp8_rows: false,
            power_scales: false,
        }
    }
}

/// A GPU working for one rank: its own memory and lanes, kernels and weights shared.
pub struct CudaBackend {
    rank: Rank,
    options: CudaOptions,
    // The order of the fields is the order of their end: lanes and memory before the GPU's context.
    repeats: Mutex<Repeats>,
    order: Mutex<Order>,
    underway: Arc<Mutex<Underway>>,
    memory: Arc<Mutex<Memory>>,
    queues: [CudaQueue; Lane::ALL.len()],
    /// What kernels of one operation on the compute lane hand over.
    scratch: DeviceMemory,
    /// For each lane, what its products draw their tiles from; zero between two of them.
    tickets: [DeviceMemory; Lane::ALL.len()],
    reads: Mutex<Stream>,
    events: Arc<EventPool>,
    timed_events: Arc<EventPool>,
    recording: AtomicBool,
    /// Permille of the multiprocessors that products leave to transfers for now.
    reserved_permille: AtomicU32,
    report: ReportPage,
    weights: CudaWeights,
    device: Arc<CudaDevice>,
}

/// One thing per lane.
fn for_each_lane<T>(make: impl Fn(Lane) -> Result<T, CudaError>) -> Result<[T; Lane::ALL.len()], CudaError> {
    let made = Lane::ALL.iter().map(|&lane| make(lane)).collect::<Result<Vec<T>, CudaError>>()?;
    Ok(made.try_into().unwrap_or_else(|_| unreachable!("as many were made as there are lanes")))
}

/// A timed point of an idle stream and where it lies, in nanoseconds since `epoch`.
fn anchor(events: &Arc<EventPool>, idle: &Stream, epoch: Instant) -> Result<(Arc<Event>, u64), CudaError> {
    let point = Arc::new(events.record(idle)?);
    idle.synchronize()?;
    Ok((point, epoch.elapsed().as_nanos() as u64))
}

/// Guards enqueueing: the order of checks is the order of the lanes.
struct Order {
    hazards: Hazards,
    staging: Staging,
    /// What work that is being kept has enqueued so far, and where what it brings along stays.
    keeping: Option<Keeping>,
    kept: Pool,
    serial: u32,
    /// Timed operations that nobody has asked for yet.
    timed: Vec<Timed>,
    /// A timed point and where it lies, in nanoseconds since the world began.
    anchor: (Arc<Event>, u64),
}

/// Operations of a rank that are not known to be done.
struct Underway {
    rank: Rank,
    /// Of each lane, oldest first.
    lanes: [VecDeque<Pending>; Lane::ALL.len()],
    /// Of work that is kept, and may run again at any time.
    kept: Vec<Pending>,
}

impl Underway {
    fn oldest(&self) -> Option<&Pending> {
        self.lanes.iter().filter_map(VecDeque::front).min_by_key(|pending| pending.serial)
    }
}

#[derive(Clone)]
struct Pending {
    serial: u32,
    /// Pieces of work of the lane, this one included.
    count: u64,
    name: &'static str,
    place: Place,
    subject: Option<Subject>,
}

/// What complaints of an operation are about, and who wrote it, if that is who is to be named.
#[derive(Clone)]
struct Subject {
    buffer: Buffer,
    /// Of the operation's second part, if it has one.
    second: Option<Buffer>,
    origin: Option<Origin>,
}

impl Subject {
    /// What complaints of a part are about.
    fn of_part(&self, part: u32) -> &Buffer {
        self.second.as_ref().filter(|_| part > 0).unwrap_or(&self.buffer)
    }
}

struct Timed {
    lane: Lane,
    place: Place,
    name: &'static str,
    start: Event,
    end: Arc<Event>,
}

struct Memory {
    pool: Pool,
    regions: Vec<Region>,
}

/// An allocation.
struct Region {
    /// Its address on the GPU.
    start: u64,
    bytes: usize,
    /// Where it lies if that is memory of the host.
    host: Option<PinnedMemory>,
}

impl Memory {
    fn add(&mut self, region: Region) -> AllocationId {
        self.regions.push(region);
        AllocationId((self.regions.len() - 1) as u32)
    }

    /// A buffer's numbers, if they lie in the host's memory.
    fn on_host<T: bytemuck::Pod>(&self, buffer: &Buffer) -> Option<Vec<T>> {
        let region = self.regions.get(buffer.allocation.0 as usize)?;
        let start = region.host.as_ref()?.start.cast::<T>();
        let inside = buffer.byte_range().end <= region.bytes;
        assert!(
            inside && buffer.dtype.bytes() == size_of::<T>(),
            "{buffer:?} is read as another. This is a bug."
        );
        let row = |row| buffer.offset + row * buffer.stride;
        let places = (0..buffer.rows).flat_map(|at| row(at)..row(at) + buffer.width);
        // SAFETY: inside the allocation, which is aligned for any number; the GPU wrote it before a point that the host
        // has waited for, by the hazard check.
        Some(places.map(|place| unsafe { start.add(place).read_volatile() }).collect())
    }

    /// Address of a buffer's first element.
    fn address(&self, buffer: &Buffer) -> Result<u64, DeviceError> {
        let region = self.regions.get(buffer.allocation.0 as usize);
        match region.filter(|region| buffer.byte_range().end <= region.bytes) {
            Some(region) => Ok(region.start + (buffer.offset * buffer.dtype.bytes()) as u64),
            None => {
                Err(DeviceError::Shape(format!("{buffer:?} is not of this GPU's memory. This is a bug.")))
            }
        }
    }
}

/// A point in a lane of a GPU.
#[derive(Clone)]
pub struct CudaEvent {
    clock: Clock,
    /// Absent if the driver refused to record it, which stopped the world.
    event: Option<Arc<Event>>,
}

impl CudaBackend {
    /// A processor with its own memory and lanes on a GPU.
    pub fn new(
        rank: Rank,
        device: &Arc<CudaDevice>,
        weights: &CudaWeights,
        options: CudaOptions,
    ) -> Result<Self, DeviceError> {
        let context = &device.context;
        if options.fp8_rows && !(device.multiplies_fp8() && options.dtype == DType::BF16) {
            return Err(DeviceError::Unsupported(format!(
                "{} has no products of FP8 rows and weights that give {}: that takes a Hopper GPU and bfloat16; leave out \
                 --activation-scheme dynamic",
                device.description, options.dtype
            )));
        }
        let reads = Stream::new(context)?;
        let (events, timed_events) = (EventPool::new(context, false), EventPool::new(context, true));
        let tickets = for_each_lane(|_| hopper::tickets(context, &reads))?;
        let scratch = DeviceMemory::new(context, SCRATCH)?;
        // SAFETY: just allocated with more bytes, and nobody else has it yet.
        unsafe { reads.fill(scratch.start, 0, kernels::SCRATCH_WORDS * size_of::<u32>()) }?;
        let anchor = anchor(&timed_events, &reads, options.epoch)?;
        let order = Order {
            hazards: Hazards::default(),
            staging: Staging::new(context)?,
            keeping: None,
            kept: Pool::new(context, None),
            serial: 0,
            timed: Vec::new(),
            anchor,
        };
        let memory = Memory { pool: Pool::new(context, Some(options.fill)), regions: Vec::new() };
        let memory = Arc::new(Mutex::new(memory));
        let queues = for_each_lane(|lane| CudaQueue::new(lane, device, &events, &memory))?;
        let underway = Arc::new(Mutex::new(Underway { rank, lanes: Default::default(), kept: Vec::new() }));
        {
            let mut others = device.underway.lock().unwrap_or_else(PoisonError::into_inner);
            others.retain(|other| other.strong_count() > 0);
            others.push(Arc::downgrade(&underway));
        }
        Ok(CudaBackend {
            rank,
            repeats: Mutex::default(),
            scratch,
            order: Mutex::new(order),
            underway,
            memory,
            queues,
            tickets,
            report: ReportPage::new(context, &reads)?,
            reads: Mutex::new(reads),
            events,
            timed_events,
            recording: AtomicBool::new(false),
            reserved_permille: AtomicU32::new(0),
            weights: weights.clone(),
            device: Arc::clone(device),
            options,
        })
    }

    /// The GPU in a few words.
    pub fn describe(&self) -> String {
        self.device.description.clone()
    }

    fn order(&self) -> MutexGuard<'_, Order> {
        self.order.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn stream(&self, lane: Lane) -> &Stream {
        &self.queues[lane.index()].stream
    }

    fn raise(&self, kind: FaultKind, place: Place, message: String) -> Fault {
        self.options.faults.raise(Fault { kind, rank: self.rank, place, message })
    }

    fn underway(&self) -> MutexGuard<'_, Underway> {
        self.underway.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Stops the world because the GPU failed; the operation that was running is the likely cause, and where other ranks
    /// share the GPU, theirs are: the driver does not say whose it was.
    fn gpu_failed(&self, error: &CudaError) -> Fault {
        let (place, mut message) = {
            let underway = self.underway();
            let oldest = underway.oldest().map_or(("nothing", Place::default()), |it| (it.name, it.place));
            (oldest.1, format!("at {} or soon after: {error}", oldest.0))
        };
        let others = self.device.underway.lock().unwrap_or_else(PoisonError::into_inner);
        for other in others.iter().filter_map(Weak::upgrade) {
            if Arc::ptr_eq(&other, &self.underway) {
                continue;
            }
            let other = other.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some(Pending { name, place, .. }) = other.oldest() {
                message += &format!("; or at {name} of {}, {place}, on the same GPU", other.rank);
            }
        }
        self.raise(FaultKind::Invalid, place, message)
    }

    /// Stops the world if a kernel has complained.
    fn check_report(&self) -> Result<(), Fault> {
        let Some(complaint) = self.report.read() else { return Ok(()) };
        let underway = self.underway();
        let all = underway.lanes.iter().flatten().chain(&underway.kept);
        let pending = all.into_iter().find(|pending| pending.serial == complaint.serial);
        let (name, place) =
            pending.map_or(("an operation", Place::default()), |pending| (pending.name, pending.place));
        let subject = pending.and_then(|pending| pending.subject.as_ref());
        let place = subject.and_then(|subject| subject.origin).map_or(place, |origin| origin.place);
        let message = format!("{name}: {}", complaint.describe(subject));
        Err(self.raise(FaultKind::Invalid, place, message))
    }

    /// Enqueues what `fill` puts into the lane's stream, if it is ordered; timed if asked for. `subject` is what
    /// complaints about it are about.
    fn append(
        &self,
        lane: Lane,
        place: Place,
        name: &'static str,
        accesses: &Accesses,
        subject: Option<Subject>,
        fill: impl FnOnce(&mut Order) -> Result<(), Refusal>,
    ) -> Result<(), DeviceError> {
        let mut order = self.order();
        // A stopped world takes work in and does nothing, as a host lane does.
        if self.options.faults.get().is_some() {
            return Ok(());
        }
        if let Err(race) = order.hazards.advance(Agent::Lane(lane), name, place, accesses) {
            self.raise(FaultKind::Race, place, race.describe(|slot| self.weights.0.name(slot)));
            return Ok(());
        }
        order.serial = order.serial.wrapping_add(1);
        let count = order.hazards.record(lane).of(lane);
        let pending = Pending { serial: order.serial, count, name, place, subject };
        if let Some(keeping) = &mut order.keeping {
            keeping.accesses.join(accesses);
            keeping.operations.push(pending.clone());
        }
        self.underway().lanes[lane.index()].push_back(pending);
        match self.timed(&mut order, lane, place, name, fill) {
            Ok(()) => Ok(()),
            Err(Refusal::Arguments(error)) => Err(error),
            Err(Refusal::Gpu(error)) => Err(self.gpu_failed(&error).into()),
            Err(Refusal::World(fault)) => Err(self.options.faults.raise(fault).into()),
        }
    }

    fn timed(
        &self,
        order: &mut Order,
        lane: Lane,
        place: Place,
        name: &'static str,
        fill: impl FnOnce(&mut Order) -> Result<(), Refusal>,
    ) -> Result<(), Refusal> {
        self.device.context.bind()?;
        if !self.recording.load(Ordering::Relaxed) {
            return fill(order);
        }
        let start = self.timed_events.record(self.stream(lane))?;
        fill(order)?;
        let end = Arc::new(self.timed_events.record(self.stream(lane))?);
        order.timed.push(Timed { lane, place, name, start, end });
        Ok(())
    }

    fn launch(&self, order: &mut Order, lane: Lane, op: &Op) -> Result<(), Refusal> {
        let keeping = order.keeping.is_some();
        let reads = keeping.then(|| self.reads.lock().unwrap_or_else(PoisonError::into_inner));
        let regions = self.memory.lock().unwrap_or_else(PoisonError::into_inner);
        let mut launch = Launch {
            kernels: &self.device.kernels,
            weights: &self.weights.0,
            staging: &mut order.staging,
            events: &self.events,
            stream: self.stream(lane),
            tickets: self.tickets[lane.index()].start,
            memory: &regions,
            report: self.report.for_operation(order.serial),
            power_scales: self.options.power_scales,
            multiprocessors: self.free_multiprocessors(),
            scratch: (lane == Lane::Compute).then_some(&self.scratch),
            kept: reads.as_deref().map(|stream| Kept { pool: &mut order.kept, stream }),
        };
        launch.run(op)
    }

    /// Multiprocessors that products may fill.
    fn free_multiprocessors(&self) -> u32 {
        let all = self.device.multiprocessors;
        let for_transfers = (all * self.reserved_permille.load(Ordering::Relaxed)).div_ceil(1000);
        all.saturating_sub(self.options.reserved_multiprocessors.max(for_transfers)).max(1)
    }

    fn read<T: bytemuck::Pod>(&self, buffer: &Buffer) -> Result<Vec<T>, Fault> {
        let mut order = self.order();
        order
            .hazards
            .advance(Agent::Host, "read", Place::default(), &Accesses::new().read(buffer))
            .map_err(|race| self.raise(FaultKind::Race, Place::default(), race.to_string()))?;
        let on_host = self.memory.lock().unwrap_or_else(PoisonError::into_inner).on_host(buffer);
        if let Some(values) = on_host {
            return Ok(values);
        }
        let mut values = vec![T::zeroed(); buffer.rows * buffer.width];
        if values.is_empty() {
            return Ok(values);
        }
        assert_eq!(buffer.dtype.bytes(), size_of::<T>(), "{buffer:?} is of another format. This is a bug.");
        let start = self.memory.lock().unwrap_or_else(PoisonError::into_inner).address(buffer);
        let copy = Copy2d {
            from: End::Device(start.unwrap_or_else(|error| panic!("{error}"))),
            from_pitch: buffer.stride * size_of::<T>(),
            to: End::Host(values.as_mut_ptr().cast()),
            to_pitch: buffer.width * size_of::<T>(),
            width: buffer.width * size_of::<T>(),
            rows: buffer.rows,
        };
        let stream = self.reads.lock().unwrap_or_else(PoisonError::into_inner);
        let copied = self.device.context.bind().and_then(|()| {
            // SAFETY: the source lies inside its allocation, checked above, and passed the hazard check while
            // enqueueing is locked out; the target is waited for before it is used.
            unsafe { stream.copy(&copy) }?;
            stream.synchronize()
        });
        copied.map_err(|error| self.gpu_failed(&error))?;
        Ok(values)
    }
}

impl Drop for CudaBackend {
    fn drop(&mut self) {
        // Work in flight uses memory that is about to be given back. A failed GPU has nothing in flight.
        if self.device.context.bind().is_ok() {
            for queue in &self.queues {
                match self.options.faults.get() {
                    None => drop(queue.stream.synchronize()),
                    Some(fault) => leave_unless_idle(&queue.stream, fault),
                }
            }
        }
    }
}

/// Waits for a stream of a world that has ended by a fault, which may be that it stands still for good. Neither its memory nor its context can be
/// given back then, and whoever ends in good order waits for it without an end: so the process ends here.
fn leave_unless_idle(stream: &Stream, fault: &Fault) {
    const LAST_WAIT: Duration = Duration::from_secs(10);
    const NAP: Duration = Duration::from_millis(1);
    let begun = Instant::now();
    while let Ok(false) = stream.is_idle() {
        if begun.elapsed() > LAST_WAIT {
            eprintln!(
                "error: {fault}; what the GPU was given does not end, so this process leaves without it"
            );
            // SAFETY: ends the process; nothing of it runs afterwards.
            unsafe { libc::_exit(1) };
        }
        std::thread::sleep(NAP);
    }
}

impl Reserve for CudaBackend {
    fn dtype(&self) -> DType {
        self.options.dtype
    }

    fn fp8_rows(&self) -> bool {
        self.options.fp8_rows
    }

    fn allocate(
        &self,
        name: &'static str,
        dtype: DType,
        rows: usize,
        width: usize,
    ) -> Result<Buffer, DeviceError> {
        let bytes = rows.checked_mul(width).and_then(|elements| elements.checked_mul(dtype.bytes()));
        let too_large = || DeviceError::OutOfMemory {
            owner: "the GPU",
            name: format!("{name} [{rows}, {width}] {dtype}"),
            needed: Bytes(bytes.unwrap_or(usize::MAX) as u64),
            mend: "lower --max-num-batched-tokens or --max-model-len",
        };
        let bytes = bytes.ok_or_else(too_large)?;
        if dtype == DType::E4M3 {
            self.device.kernels.expect_cached_codes();
        }
        self.device.context.bind()?;
        let reads = self.reads.lock().unwrap_or_else(PoisonError::into_inner);
        let mut memory = self.memory.lock().unwrap_or_else(PoisonError::into_inner);
        let start = memory.pool.take(bytes, &reads)?.ok_or_else(too_large)?;
        let allocation = memory.add(Region { start, bytes, host: None });
        Ok(Buffer { allocation, name, dtype, offset: 0, rows, width, stride: width })
    }

    fn allocate_for_host(
        &self,
        name: &'static str,
        dtype: DType,
        rows: usize,
        width: usize,
    ) -> Result<Buffer, DeviceError> {
        let bytes = rows * width * dtype.bytes();
        let host = PinnedMemory::new(&self.device.context, bytes.max(1))?;
        if self.options.fill == Fill::Poison {
            // SAFETY: just allocated with at least that size, and nobody else has it.
            unsafe { host.start.write_bytes(0xff, bytes) };
        }
        let region = Region { start: host.device_address()?, bytes, host: Some(host) };
        let allocation = self.memory.lock().unwrap_or_else(PoisonError::into_inner).add(region);
        Ok(Buffer { allocation, name, dtype, offset: 0, rows, width, stride: width })
    }
}

impl Backend for CudaBackend {
    type Event = CudaEvent;
    type Queue = CudaQueue;

    fn rank(&self) -> Rank {
        self.rank
    }

    fn allocated_bytes(&self) -> u64 {
        let memory = self.memory.lock().unwrap_or_else(PoisonError::into_inner);
        memory.regions.iter().map(|region| region.bytes as u64).sum()
    }

    fn find(&self, name: &str) -> Option<Weight> {
        self.weights.0.find(name)
    }

    fn load(
        &self,
        name: &str,
        shape: WeightShape,
        tensors: &[TensorBytes<'_>],
    ) -> Result<Weight, DeviceError> {
        self.device.context.bind()?;
        self.weights.0.load(self.options.dtype, name, shape, tensors)
    }

    fn draw(&self, name: &str, shape: WeightShape, tensors: &[Drawn]) -> Result<Option<Weight>, DeviceError> {
        self.device.context.bind()?;
        self.weights.0.draw(&self.device.kernels, self.options.dtype, name, shape, tensors).map(Some)
    }

    fn draw_codes(
        &self,
        name: &str,
        shape: WeightShape,
        target: Target,
        tensors: &[Drawn],
    ) -> Result<Option<Weight>, DeviceError> {
        if target != Target::Mxfp4 || self.options.dtype != DType::BF16 {
            return Ok(None);
        }
        self.device.context.bind()?;
        self.device.kernels.expect_codes();
        self.weights.0.draw_mxfp4(&self.device.kernels, name, shape, tensors)
    }

    fn draw_fp8(
        &self,
        name: &str,
        shape: WeightShape,
        target: Target,
        tensors: &[Drawn],
    ) -> Result<Option<Weight>, DeviceError> {
        if !self.options.fp8_rows {
            return Ok(None);
        }
        self.device.context.bind()?;
        self.device.kernels.expect_codes();
        self.weights.0.draw_fp8(&self.device.kernels, name, shape, target, tensors)
    }

    fn holds(&self, format: &Format) -> bool {
        held_bits(format, self.options.dtype).is_some()
    }

    fn load_fp8(
        &self,
        name: &str,
        shape: WeightShape,
        matrices: &[Codes],
    ) -> Result<Option<Weight>, DeviceError> {
        if !self.options.fp8_rows {
            return Ok(None);
        }
        self.device.context.bind()?;
        self.device.kernels.expect_codes();
        self.weights.0.load_fp8(name, shape, matrices)
    }

    fn load_codes(&self, name: &str, shape: WeightShape, matrices: &[Codes]) -> Result<Weight, DeviceError> {
        self.device.context.bind()?;
        self.device.kernels.expect_codes();
        self.weights.0.load_codes(self.options.dtype, name, shape, matrices)
    }

    fn enqueue(&self, lane: Lane, place: Place, op: impl Into<Op>) -> Result<(), DeviceError> {
        let op = op.into();
        op.check()?;
        let place = place.or_phase(op.phase());
        let [first, second] = match &op {
            Op::Attention(op) => [Some(&op.keys), None],
            Op::KvWrite(op) => [0, 1].map(|part| op.parts.get(part).map(|part| &part.x)),
            Op::Norm(op) => [Some(&op.x), None],
            Op::AddNorm(op) => [Some(&op.norm.x), None],
            Op::NormRotate(op) => [0, 1].map(|part| op.parts.get(part).map(|part| &part.norm.x)),
            Op::ArgMax(op) => [Some(&op.logits), None],
            _ => [None; 2],
        };
        let subject = |buffer: &Buffer| Subject {
            buffer: buffer.clone(),
            second: second.cloned(),
            origin: op.origin(),
        };
        let subject = first.map(subject);
        self.append(lane, place, op.name(), &op.accesses(), subject, |order| self.launch(order, lane, &op))
    }

    fn enqueue_external(
        &self,
        lane: Lane,
        place: Place,
        name: &'static str,
        accesses: &Accesses,
        work: impl FnOnce(&CudaQueue) -> Result<(), Fault> + Send + 'static,
    ) -> Result<(), DeviceError> {
        self.append(lane, place, name, accesses, None, |_| {
            match catch_unwind(AssertUnwindSafe(|| work(&self.queues[lane.index()]))) {
                Ok(done) => done.map_err(Refusal::World),
                Err(panic) => {
                    let message = format!("{name} panicked: {}", panic_text(panic.as_ref()));
                    Err(Refusal::World(self.raise(FaultKind::Panic, place, message)))
                }
            }
        })
    }

    fn repeat<E: From<DeviceError>>(
        &self,
        key: u64,
        work: impl FnOnce() -> Result<(), E>,
    ) -> Result<bool, E> {
        self.run_repeated(key, work)
    }

    fn record(&self, lane: Lane) -> CudaEvent {
        let mut order = self.order();
        let clock = order.hazards.record(lane);
        let recorded = self.device.context.bind().and_then(|()| self.events.record(self.stream(lane)));
        let event = recorded.map(Arc::new).map_err(|error| self.gpu_failed(&error)).ok();
        CudaEvent { clock, event }
    }

    fn lane_wait(&self, lane: Lane, event: &CudaEvent) {
        let mut order = self.order();
        order.hazards.wait(Agent::Lane(lane), &event.clock);
        let Some(event) = &event.event else { return };
        let waited = self.device.context.bind().and_then(|()| self.stream(lane).wait(event));
        if let Err(error) = waited {
            self.gpu_failed(&error);
        }
    }

    fn wait(&self, event: &CudaEvent, mut deadline: Deadline) -> Result<(), Fault> {
        /// Waits shorter than this are spun through …
        const SPIN: Duration = Duration::from_micros(200);
        /// … and shorter than this looked after often, but not so often that others wait for the driver: a host that
        /// sleeps when a layer's counts are there keeps the GPU waiting.
        const WATCH: Duration = Duration::from_millis(50);
        const BETWEEN: Duration = Duration::from_micros(3);
        const NAP: Duration = Duration::from_micros(50);
        let asked = Instant::now();
        self.options.faults.check()?;
        let bound = self.device.context.bind();
        bound.map_err(|error| self.gpu_failed(&error))?;
        loop {
            self.options.faults.check()?;
            let complete = match &event.event {
                Some(event) => event.is_complete(),
                None => Ok(true),
            };
            let complete = complete.map_err(|error| self.gpu_failed(&error))?;
            if self.report.read().is_some() {
                self.check_report()?;
            }
            if complete {
                break;
            }
            if deadline.passed() {
                let late = {
                    let underway = self.underway();
                    Lane::ALL.into_iter().find_map(|lane| {
                        let pending = underway.lanes[lane.index()].front()?;
                        (pending.count <= event.clock.of(lane)).then_some((lane, pending.name, pending.place))
                    })
                };
                let allowed = deadline.allowed();
                let (place, message) = match late {
                    Some((lane, name, place)) => (
                        place,
                        format!("{name} on the {lane}, or what follows it, did not end within {allowed:?}"),
                    ),
                    None => (Place::default(), format!("the GPU did not go on within {allowed:?}")),
                };
                return Err(self.raise(FaultKind::Deadline, place, message));
            }
            match asked.elapsed() {
                waited if waited < SPIN => std::hint::spin_loop(),
                waited if waited < WATCH => {
                    while asked.elapsed() < waited + BETWEEN {
                        std::thread::yield_now();
                    }
                }
                _ => std::thread::sleep(NAP),
            }
        }
        self.order().hazards.wait(Agent::Host, &event.clock);
        let mut underway = self.underway();
        for lane in Lane::ALL {
            let done = event.clock.of(lane);
            let pending = &mut underway.lanes[lane.index()];
            while pending.front().is_some_and(|pending| pending.count <= done) {
                pending.pop_front();
            }
        }
        Ok(())
    }

    fn read_f32(&self, buffer: &Buffer) -> Result<Vec<f32>, Fault> {
        match buffer.dtype {
            DType::BF16 => Ok(self.read::<bf16>(buffer)?.into_iter().map(bf16::to_f32).collect()),
            DType::E4M3 => Ok(self.read::<E4m3>(buffer)?.into_iter().map(E4m3::number).collect()),
            _ => self.read::<f32>(buffer),
        }
    }

    fn read_u32(&self, buffer: &Buffer) -> Result<Vec<u32>, Fault> {
        self.read::<u32>(buffer)
    }

    fn reserve_for_transfers(&self, permille: u64) {
        self.reserved_permille.store(permille.min(1000) as u32, Ordering::Relaxed);
    }

    fn set_recording(&self, on: bool) {
        if on && !self.recording.load(Ordering::Relaxed) {
            // Times are told from the anchor; the nearer it is, the finer they are.
            let reads = self.reads.lock().unwrap_or_else(PoisonError::into_inner);
            let bound = self.device.context.bind();
            if let Ok(anchor) = bound.and_then(|()| anchor(&self.timed_events, &reads, self.options.epoch)) {
                self.order().anchor = anchor;
            }
        }
        self.recording.store(on, Ordering::Relaxed);
    }

    /// Operations that are not done yet are left for the next call.
    fn take_records(&self) -> Vec<Record> {
        /// A float32 of milliseconds counts this far without losing a tenth of a microsecond.
        const RELIABLE_MS: f32 = 500.0;
        let mut order = self.order();
        let mut records = Vec::new();
        if self.device.context.bind().is_err() {
            return records;
        }
        let (done, left): (Vec<Timed>, Vec<Timed>) = std::mem::take(&mut order.timed)
            .into_iter()
            .partition(|timed| timed.end.is_complete().unwrap_or(false));
        order.timed = left;
        for timed in done {
            let (anchor, anchor_ns) = &order.anchor;
            let (Ok(start), Ok(end)) = (anchor.elapsed_ms(&timed.start), anchor.elapsed_ms(&timed.end))
            else {
                continue;
            };
            let at =
                |milliseconds: f32| anchor_ns.saturating_add_signed((f64::from(milliseconds) * 1e6) as i64);
            let Timed { lane, place, name, .. } = timed;
            records.push(Record { lane, place, name, start_ns: at(start), end_ns: at(end) });
            if end > RELIABLE_MS {
                order.anchor = (timed.end, at(end));
            }
        }
        records.sort_by_key(|record| record.end_ns);
        records
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use epsmoe_base::{Layer, Stage, env};

    /// Tells the test that it is the process in which the GPU is to fail.
    const FAILING: &str = "EPSMOE_TEST_GPU_FAULT";

    /// The twin of `Mark` in `probe.cu`.
    #[repr(C)]
    #[derive(Clone, Copy)]
    struct Mark {
        at: u64,
        value: u32,
        padding: u32,
    }

    /// A kernel that writes where nothing is ends all work of its process on that GPU: it gets one of its own.
    #[test]
    fn a_fault_of_a_gpu_names_rank_layer_and_operation() {
        if env::text(FAILING).is_some() {
            return fail_on_a_gpu(&CudaDevice::open(0).unwrap());
        }
        match CudaDevice::open(0) {
            Err(missing) if env::text("EPSMOE_TEST_ALL").is_some() => panic!("{missing}"),
            Err(missing) => return eprintln!("skipped: {missing}"),
            Ok(_) => {}
        }
        let name = "cuda::tests::a_fault_of_a_gpu_names_rank_layer_and_operation";
        let child = std::process::Command::new(std::env::current_exe().unwrap())
            .args([name, "--exact", "--nocapture"])
            .env(FAILING, "1")
            .output()
            .unwrap();
        assert!(child.status.success(), "{}", String::from_utf8_lossy(&child.stderr));
    }

    #[test]
    fn memory_of_a_gpu_that_is_not_there_is_refused_by_name() {
        let device = match CudaDevice::open(0) {
            Err(missing) if env::text("EPSMOE_TEST_ALL").is_some() => panic!("{missing}"),
            Err(missing) => return eprintln!("skipped: {missing}"),
            Ok(device) => device,
        };
        let (weights, options) = (CudaWeights::new(&device).unwrap(), CudaOptions::new(DType::F32));
        let rank = CudaBackend::new(Rank(3), &device, &weights, options).unwrap();
        // As much as no GPU has, and more than can be counted.
        for rows in [1 << 24, usize::MAX / 8] {
            let refused = rank.allocate("received_rows", DType::F32, rows, 1 << 20).unwrap_err().to_string();
            assert!(refused.contains(&format!("received_rows [{rows}, 1048576] float32")), "{refused}");
            assert!(refused.contains("lower --max-num-batched-tokens"), "{refused}");
        }
        // What comes after is not the worse for it.
        let place = Place::default();
        let words = rank.allocate("words", DType::U32, 1, 4).unwrap();
        let op = crate::op::HostToDevice { words: [1, 2, 3, 4].into(), out: words.clone() };
        rank.enqueue(Lane::Compute, place, op).unwrap();
        rank.wait(&rank.record(Lane::Compute), Deadline::after(Duration::from_secs(20))).unwrap();
        assert_eq!(rank.read_u32(&words).unwrap(), [1, 2, 3, 4]);
    }

    fn fail_on_a_gpu(device: &Arc<CudaDevice>) {
        let (weights, options) = (CudaWeights::new(device).unwrap(), CudaOptions::new(DType::F32));
        let ranks =
            [0, 1].map(|rank| CudaBackend::new(Rank(rank), device, &weights, options.clone()).unwrap());
        let mark = device.kernels.get("mark", DType::U32, DType::U32).unwrap().function;
        let place = Place::layer(Layer(3)).stage(Stage(1));
        let work = move |queue: &CudaQueue| {
            let nowhere = Mark { at: 16, value: 1, padding: 0 };
            // SAFETY: it is not: that is what is tested, in a process that does nothing else.
            let launched = unsafe { queue.stream.launch(&mark, (1, 1), 0, &nowhere) };
            launched.map_err(|error| panic!("{error}"))
        };
        let enqueued = ranks[1].enqueue_external(Lane::Transfer, place, "dispatch", &Accesses::new(), work);
        enqueued.unwrap();
        let wait = |rank: &CudaBackend| {
            rank.wait(&rank.record(Lane::Transfer), Deadline::after(Duration::from_secs(20))).unwrap_err()
        };
        let fault = wait(&ranks[1]);
        let text = fault.to_string();
        assert!(text.starts_with("rank 1, layer 3, stage 1: at dispatch or soon after: "), "{text}");
        assert!(text.contains("illegal memory access"), "{text}");
        assert_eq!(wait(&ranks[0]), fault, "every rank says the same");
    }
}
