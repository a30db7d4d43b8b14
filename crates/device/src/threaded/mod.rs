//! A processor made of threads: lanes, memory, weights, and the operations in terms of a few [`Kernels`].
//!
//! [`ThreadedBackend`] turns an [`Op`] into work on a lane after two checks: its shapes fit, and everything it
//! touches is ordered against what the other lane and the host touch. Because the second check refuses
//! unordered work, no sequence of calls can make two threads race on a buffer.

mod assignments;
mod element;
mod lanes;
mod memory;
mod pages;
mod recurrent;
mod rows;
mod weights;

pub use element::{Cached, E4m3, Element, Plain};
pub use memory::{Fill, Memory, View, ViewMut};
pub(crate) use pages::{LINE_BYTES, Pages, Piece, Slabs};
pub use recurrent::RecurrentToken;
pub use rows::AttentionViews;
pub use weights::{Pack, WeightStore};
pub(crate) use weights::{check_codes, check_sources, held_format};

use crate::hazard::{Agent, Clock, Hazards};
use crate::op::{Accesses, Epilogue, ExpertGemm, GatherFp8, GemmPart, Norm, Op};
use crate::{Backend, Buffer, DeviceError, Record, Reserve, TensorBytes, Weight, WeightShape};
use epsmoe_base::{Bytes, DType, Deadline, Fault, FaultCell, FaultKind, Lane, Place, Rank};
use epsmoe_quant::{Codes, Format};
use half::bf16;
use lanes::{Lanes, Work};
use std::collections::HashSet;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

/// The arithmetic that differs between host processors. Everything else (gathers, norms, rotations, sums) is
/// shared and plain.
pub trait Kernels: Send + Sync + 'static {
    /// A packed linear map.
    type Matrix: Send + Sync + 'static;

    /// The processor and its kernels in a few words.
    fn describe(&self) -> String;

    /// Packs a linear map for activations of `dtype`; several tensors of `[n, k]` lie side by side. Nothing if the system
    /// has no memory for it.
    fn pack(&self, pack: &Pack<'_>) -> Option<Self::Matrix>;

    /// Whether [`pack_codes`](Kernels::pack_codes) takes this format for activations of `dtype`.
    fn holds(&self, format: &Format, dtype: DType) -> bool;

    /// Packs a linear map that stays in its codes; several matrices lie side by side. Nothing if the system has no memory for
    /// it.
    fn pack_codes(&self, matrices: &[Codes], dtype: DType) -> Option<Self::Matrix>;

    /// Runs `task(0..tasks)`, each once, on the lane's threads.
    fn parallel(&self, tasks: usize, task: &(dyn Fn(usize) + Sync));

    /// See [`Gemm`](crate::op::Gemm). Row-invariant.
    fn gemm<X: Element, Y: Element>(
        &self,
        parts: &mut [GemmViews<'_, X, Y, Self::Matrix>],
        epilogue: Epilogue,
        bias: Option<&[f32]>,
    );

    /// See [`Attention`](crate::op::Attention). Row-invariant.
    fn attention<T: Element, C: Cached<T>>(&self, attention: AttentionViews<'_, T, C>);

    /// One token of one value head of [`Recurrence`](crate::op::Recurrence): the state goes on by it.
    fn recurrence(&self, state: &mut [f32], token: &RecurrentToken<'_>, out: &mut [f32]);
}

/// One product with its numbers at hand.
pub struct GemmViews<'a, X, Y, M> {
    /// Input rows.
    pub x: View<'a, X>,
    /// Packed weight.
    pub matrix: &'a M,
    /// Output rows.
    pub out: ViewMut<'a, Y>,
}

/// What the host processors of one world share.
#[derive(Clone)]
pub struct ThreadedOptions {
    /// Format of activations.
    pub dtype: DType,
    /// The world's fault cell.
    pub faults: FaultCell,
    /// The world's birth, which timelines count from.
    pub epoch: Instant,
    /// What fresh memory holds.
    pub fill: Fill,
    /// Seed of random pauses in the lanes, for tests.
    pub jitter: Option<u64>,
    /// Lane waits to leave out, counted from the first: proof in tests that the missing event is found.
    pub skipped_waits: HashSet<usize>,
}

impl ThreadedOptions {
    /// Plain options for a new world.
    pub fn new(dtype: DType) -> Self {
        ThreadedOptions {
            dtype,
            faults: FaultCell::default(),
            epoch: Instant::now(),
            fill: Fill::Zero,
            jitter: None,
            skipped_waits: HashSet::new(),
        }
    }
}

/// A host processor working for one rank.
pub struct ThreadedBackend<K: Kernels> {
    rank: Rank,
    options: ThreadedOptions,
    kernels: Arc<K>,
    memory: Memory,
    weights: Arc<WeightStore<K::Matrix>>,
    order: Mutex<Order>,
    lanes: Lanes,
}

/// Guards enqueueing: the order of checks is the order of the lanes.
#[derive(Default)]
struct Order {
    hazards: Hazards,
    waits: usize,
}

impl<K: Kernels> ThreadedBackend<K> {
    /// A processor with its own memory and lanes, sharing the store of weights with the process.
    pub fn new(
        rank: Rank,
        kernels: K,
        weights: Arc<WeightStore<K::Matrix>>,
        options: ThreadedOptions,
    ) -> Result<Self, DeviceError> {
        let memory = Memory::new(options.fill);
        let lanes = Lanes::start(rank, memory.clone(), options.faults.clone(), options.epoch, options.jitter)
            .map_err(|error| {
                DeviceError::Unsupported(format!("cannot start the lane threads of {rank}: {error}"))
            })?;
        let kernels = Arc::new(kernels);
        Ok(ThreadedBackend { rank, options, kernels, memory, weights, order: Mutex::default(), lanes })
    }

    /// The processor and its kernels in a few words.
    pub fn describe(&self) -> String {
        self.kernels.describe()
    }

    /// Lane waits asked for so far.
    pub fn waits(&self) -> usize {
        self.order.lock().unwrap_or_else(PoisonError::into_inner).waits
    }

    fn raise(&self, kind: FaultKind, place: Place, message: String) -> Fault {
        self.options.faults.raise(Fault { kind, rank: self.rank, place, message })
    }

    fn read<T: Plain>(&self, buffer: &Buffer) -> Result<Vec<T>, Fault> {
        let accesses = Accesses::new().read(buffer);
        let mut order = self.order.lock().unwrap_or_else(PoisonError::into_inner);
        order
            .hazards
            .advance(Agent::Host, "read", Place::default(), &accesses)
            .map_err(|race| self.raise(FaultKind::Race, Place::default(), race.to_string()))?;
        // SAFETY: the read passed the hazard check, and enqueueing is locked out until the copy is done.
        let view = unsafe { self.memory.view::<T>(buffer) };
        Ok(view.iter().flatten().copied().collect())
    }
}

impl<K: Kernels> Reserve for ThreadedBackend<K> {
    fn dtype(&self) -> DType {
        self.options.dtype
    }

    fn allocate(
        &self,
        name: &'static str,
        dtype: DType,
        rows: usize,
        width: usize,
    ) -> Result<Buffer, DeviceError> {
        self.memory.allocate(name, dtype, rows, width)
    }
}

impl<K: Kernels> Backend for ThreadedBackend<K> {
    type Event = Clock;
    type Queue = Memory;

    fn rank(&self) -> Rank {
        self.rank
    }

    fn allocated_bytes(&self) -> u64 {
        self.memory.allocated_bytes()
    }

    fn find(&self, name: &str) -> Option<Weight> {
        self.weights.find(name)
    }

    fn load(
        &self,
        name: &str,
        shape: WeightShape,
        tensors: &[TensorBytes<'_>],
    ) -> Result<Weight, DeviceError> {
        self.weights.load(&*self.kernels, self.options.dtype, name, shape, tensors)
    }

    fn holds(&self, format: &Format) -> bool {
        self.kernels.holds(format, self.options.dtype)
    }

    fn load_codes(&self, name: &str, shape: WeightShape, matrices: &[Codes]) -> Result<Weight, DeviceError> {
        self.weights.load_codes(&*self.kernels, self.options.dtype, name, shape, matrices)
    }

    fn enqueue(&self, lane: Lane, place: Place, op: impl Into<Op>) -> Result<(), DeviceError> {
        let op = op.into();
        op.check()?;
        let place = place.or_phase(op.phase());
        let (name, accesses) = (op.name(), op.accesses());
        let (kernels, weights) = (Arc::clone(&self.kernels), Arc::clone(&self.weights));
        let (rank, blamed) = (self.rank, op.origin().map_or(place, |origin| origin.place));
        self.enqueue_external(lane, place, name, &accesses, move |memory| {
            run(&*kernels, &weights, memory, &op).map_err(|message| {
                let message = format!("{name}: {message}");
                Fault { kind: FaultKind::Invalid, rank, place: blamed, message }
            })
        })
    }

    fn enqueue_external(
        &self,
        lane: Lane,
        place: Place,
        name: &'static str,
        accesses: &Accesses,
        work: impl FnOnce(&Memory) -> Result<(), Fault> + Send + 'static,
    ) -> Result<(), DeviceError> {
        let mut order = self.order.lock().unwrap_or_else(PoisonError::into_inner);
        let work: Work = match order.hazards.advance(Agent::Lane(lane), name, place, accesses) {
            Ok(()) => Box::new(work),
            // The lane is told so that it keeps its count; the world stops before anything runs unordered.
            Err(race) => {
                let message = race.describe(|slot| self.weights.name(slot));
                let fault = self.raise(FaultKind::Race, place, message);
                Box::new(move |_| Err(fault))
            }
        };
        self.lanes.push(lane, place, name, work);
        Ok(())
    }

    fn record(&self, lane: Lane) -> Clock {
        self.order.lock().unwrap_or_else(PoisonError::into_inner).hazards.record(lane)
    }

    fn lane_wait(&self, lane: Lane, event: &Clock) {
        let mut order = self.order.lock().unwrap_or_else(PoisonError::into_inner);
        order.waits += 1;
        if self.options.skipped_waits.contains(&(order.waits - 1)) {
            return;
        }
        order.hazards.wait(Agent::Lane(lane), event);
        for other in Lane::ALL.into_iter().filter(|&other| other != lane) {
            self.lanes.push_wait(lane, other, event.of(other));
        }
    }

    fn wait(&self, event: &Clock, deadline: Deadline) -> Result<(), Fault> {
        self.lanes.wait(|lane| event.of(lane), deadline)?;
        let mut order = self.order.lock().unwrap_or_else(PoisonError::into_inner);
        order.hazards.wait(Agent::Host, event);
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

    fn set_recording(&self, on: bool) {
        self.lanes.set_recording(on);
    }

    fn take_records(&self) -> Vec<Record> {
        self.lanes.take_records()
    }
}

/// Runs one operation with the format its buffers have.
fn run<K: Kernels>(
    kernels: &K,
    weights: &WeightStore<K::Matrix>,
    memory: &Memory,
    op: &Op,
) -> Result<(), String> {
    let rows = rows::Rows { kernels, weights, memory };
    macro_rules! typed {
        ($dtype:expr, $name:ident, $op:expr $(; $beside:expr)?) => {
            match $dtype {
                DType::F32 => rows.$name::<f32>($op $(, $beside)?),
                DType::BF16 => rows.$name::<bf16>($op $(, $beside)?),
                other => Err(format!("{other} is no format to compute in")),
            }
        };
        ($from:expr, $to:expr, $name:ident, $op:expr) => {
            match ($from, $to) {
                (DType::F32, DType::F32) => rows.$name::<f32, f32>($op),
                (DType::F32, DType::BF16) => rows.$name::<f32, bf16>($op),
                (DType::BF16, DType::F32) => rows.$name::<bf16, f32>($op),
                (DType::BF16, DType::BF16) => rows.$name::<bf16, bf16>($op),
                (from, to) => Err(format!("{from} and {to} are no formats to compute in")),
            }
        };
    }
    // Of numbers in the first format, and a cache of them in the second.
    macro_rules! cached {
        ($dtype:expr, $cached:expr, $name:ident, $op:expr) => {
            match ($dtype, $cached) {
                (DType::F32, DType::F32) => rows.$name::<f32, f32>($op),
                (DType::BF16, DType::BF16) => rows.$name::<bf16, bf16>($op),
                (DType::F32, DType::E4M3) => rows.$name::<f32, E4m3>($op),
                (DType::BF16, DType::E4M3) => rows.$name::<bf16, E4m3>($op),
                (dtype, cached) => Err(format!("no cache in {cached} of numbers in {dtype}")),
            }
        };
    }
    let norm = |op: &Norm| {
        typed!(op.x.dtype, op.out.dtype, norm, op)?;
        let Some(codes) = &op.codes else { return Ok(()) };
        typed!(op.out.dtype, gather_fp8, &GatherFp8::encode(op.out.clone(), codes.clone()))
    };
    match op {
        Op::HostToDevice(op) => rows.host_to_device(op),
        Op::RopeTable(op) => rows.rope_table(op),
        Op::Route(op) => rows.route(op),
        Op::ArgMax(op) => rows.argmax(op),
        Op::AssignSlots(op) => rows.assign_slots(op),
        Op::CountSlots(op) => rows.count_slots(op),
        Op::SendOrder(op) => rows.send_order(op),
        Op::SpreadSlots(op) => rows.spread_slots(op),
        Op::ReceiveOrder(op) => rows.receive_order(op),
        Op::SortBySlot(op) => rows.sort_by_slot(op),
        Op::Gemm(op) => {
            for parts in op.parts.chunk_by(GemmPart::is_like) {
                let products: Vec<_> = parts.iter().map(Product::of).collect();
                gemm(kernels, weights, memory, &products, op.epilogue, parts[0].bias.as_ref())?;
            }
            Ok(())
        }
        Op::ExpertGemm(op) => {
            gemm(kernels, weights, memory, &expert_products(memory, op)?, op.epilogue, None)
        }
        Op::Embed(op) => typed!(op.out.dtype, embed, op),
        Op::Norm(op) => norm(op),
        Op::Rotate(op) => typed!(op.x.dtype, rotate, op),
        Op::AddNorm(op) => {
            typed!(op.add.x.dtype, add, &op.add)?;
            norm(&op.norm)
        }
        Op::NormRotate(op) => op.parts.iter().try_for_each(|part| {
            norm(&part.norm)?;
            typed!(part.rotate.x.dtype, rotate, &part.rotate)
        }),
        Op::KvWrite(op) => op.parts.iter().try_for_each(|part| match part.cache.dtype {
            DType::E4M3 => typed!(part.x.dtype, kv_write_codes, part; &op.slots),
            _ => typed!(part.x.dtype, kv_write, part; &op.slots),
        }),
        Op::Attention(op) => cached!(op.q.dtype, op.keys.dtype, attention, op),
        Op::Gather(op) => cached!(op.out.dtype, op.x.dtype, gather, op),
        Op::GatherFp8(op) => typed!(op.numbers().dtype, gather_fp8, op),
        Op::Reduce(op) => typed!(op.x.dtype, op.out.dtype, reduce, op),
        Op::Add(op) => typed!(op.x.dtype, add, op),
        Op::Copy(op) if op.x.dtype == op.out.dtype => typed!(op.x.dtype, copy, op),
        Op::Copy(op) => typed!(op.x.dtype, op.out.dtype, rounded_copy, op),
        Op::Clamp(op) => typed!(op.x.dtype, clamp, op),
        Op::GateRows(op) => typed!(op.x.dtype, gate_rows, op),
        Op::Scale(op) => typed!(op.x.dtype, scale, op),
        Op::ScaleTerms(op) => typed!(op.x.dtype, scale_terms, op),
        Op::SoftCap(op) => typed!(op.x.dtype, soft_cap, op),
        Op::Activate(op) => typed!(op.x.dtype, op.out.dtype, activate, op),
        Op::AddSlotBias(op) => typed!(op.x.dtype, add_slot_bias, op),
        Op::ShortConv(op) => typed!(op.x.dtype, op.out.dtype, short_conv, op),
        Op::Recurrence(op) => typed!(op.x.dtype, recurrence, op),
        Op::Gate(op) => typed!(op.x.dtype, op.out.dtype, gate, op),
    }
}

/// A product whose rows are known: of a part, or of an expert.
struct Product<'a> {
    x: Buffer,
    weight: &'a Weight,
    out: Buffer,
}

impl<'a> Product<'a> {
    fn of(part: &'a GemmPart) -> Self {
        Product { x: part.x.clone(), weight: &part.weight, out: part.out.clone() }
    }
}

/// One product per expert that has rows.
fn expert_products<'a>(memory: &Memory, op: &'a ExpertGemm) -> Result<Vec<Product<'a>>, String> {
    // SAFETY: declared by `ExpertGemm::accesses`, checked before this work was enqueued.
    let starts = unsafe { memory.view::<u32>(&op.starts) };
    let mut products = Vec::new();
    for (expert, weight) in op.weights.iter().enumerate() {
        let (start, end) = (starts.at(expert), starts.at(expert + 1));
        if end < start {
            return Err(format!("rows of expert {expert} end at {end}, but start at {start}"));
        }
        let rows = start as usize..rows::in_range("end of an expert's rows", end, op.x.rows + 1)?;
        if !rows.is_empty() {
            let view = |buffer: &Buffer| buffer.rows(rows.clone()).map_err(|error| error.to_string());
            products.push(Product { x: view(&op.x)?, weight, out: view(&op.out)? });
        }
    }
    Ok(products)
}

fn gemm<K: Kernels>(
    kernels: &K,
    weights: &WeightStore<K::Matrix>,
    memory: &Memory,
    products: &[Product<'_>],
    epilogue: Epilogue,
    bias: Option<&Weight>,
) -> Result<(), String> {
    let Some(first) = products.first() else { return Ok(()) };
    let run = match (first.x.dtype, first.out.dtype) {
        (DType::F32, DType::F32) => typed_gemm::<K, f32, f32>,
        (DType::BF16, DType::BF16) => typed_gemm::<K, bf16, bf16>,
        (DType::BF16, DType::F32) => typed_gemm::<K, bf16, f32>,
        (x, out) => return Err(format!("no product of {x} into {out}")),
    };
    // Kernels take weights of one format at a time.
    let mut alike = products.chunk_by(|left, right| left.weight.format == right.weight.format);
    alike.try_for_each(|products| run(kernels, weights, memory, products, epilogue, bias))
}

fn typed_gemm<K: Kernels, X: Element, Y: Element>(
    kernels: &K,
    weights: &WeightStore<K::Matrix>,
    memory: &Memory,
    products: &[Product<'_>],
    epilogue: Epilogue,
    bias: Option<&Weight>,
) -> Result<(), String> {
    let held: Vec<_> =
        products.iter().map(|product| weights.matrix(product.weight)).collect::<Result<_, _>>()?;
    let mut parts: Vec<_> = products
        .iter()
        .zip(&held)
        .map(|(product, matrix)| GemmViews {
            // SAFETY: declared by the operation's `accesses`, checked before this work was enqueued.
            x: unsafe { memory.view::<X>(&product.x) },
            matrix: &**matrix,
            // SAFETY: likewise; `Gemm::check` refuses parts whose outputs overlap, and experts' rows ascend.
            out: unsafe { memory.view_mut::<Y>(&product.out) },
        })
        .collect();
    let bias = bias.map(|bias| weights.vector(bias)).transpose()?;
    kernels.gemm(&mut parts, epilogue, bias.as_deref());
    Ok(())
}

/// Part `index` of `range` cut into `parts` parts whose lengths differ by at most one.
pub(crate) fn even_part(range: Range<usize>, parts: usize, index: usize) -> Range<usize> {
    let cut = |index| range.start + range.len() * index / parts;
    cut(index)..cut(index + 1)
}

/// Refuses to hold what the machine's memory cannot.
pub(crate) fn out_of_memory(name: &str, bytes: u64) -> DeviceError {
    DeviceError::OutOfMemory {
        owner: "this machine",
        name: name.to_owned(),
        needed: Bytes(bytes),
        mend: "use more ranks on more machines, or a smaller model",
    }
}
