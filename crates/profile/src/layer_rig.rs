//! Ranks that run one MoE layer again and again: given sizes, given routing, given table.

use crate::RigShape;
use crate::rig_rank::RigRank;
use epsmoe_base::{DType, Deadline, Fault, FaultCell, FaultKind, Lane, Place, Rank};
use epsmoe_device::cpu::gemm::{Isa, PackedMatrix};
use epsmoe_device::cpu::{Cpu, CpuKernels};
use epsmoe_device::threaded::{ThreadedBackend, ThreadedOptions, WeightStore};
use epsmoe_device::{Backend, DeviceError, Reserve};
use epsmoe_fabric::{Fabric, Link, ThreadsOptions};
use epsmoe_pipeline::{
    ExpertPipeline, HostTimes, MoeLayer, PipelineError, PipelineOptions, PipelineSizes, take_spans,
};
use epsmoe_plan::{
    Capacity, GemmKind, LayerHistograms, LayerSizes, Policy, Routing, SlotMap, Span, StageTable, Timeline,
    Traffic,
};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

/// What the ranks of a rig have in common.
#[derive(Clone)]
pub struct RigOptions {
    /// Ranks R.
    pub ranks: usize,
    /// Threads of each rank.
    pub threads: usize,
    /// Vector instructions.
    pub isa: Isa,
    /// Format of activations and weights.
    pub dtype: DType,
    /// How fast rows travel; as fast as memory when absent.
    pub link: Option<Link>,
    /// How long ranks wait for each other.
    pub timeout: Duration,
    /// Weights of rigs of the same format, which share them.
    pub weights: Arc<WeightStore<PackedMatrix>>,
}

/// One layer as it ran.
#[derive(Clone, Debug)]
pub struct LayerRun {
    /// The lanes of all ranks.
    pub timeline: Timeline,
    /// `[R]` what the hosts did in between.
    pub hosts: Vec<RankHost>,
    /// From the first operation of any rank to the end of the last: what
    /// [`Simulation::layer_ns`](epsmoe_plan::Simulation::layer_ns) predicts.
    pub layer_ns: u64,
    /// Which of the rig's weights it had, by a number.
    pub weights: usize,
    /// A hash of all ranks' outputs; 0 unless the rig keeps them.
    pub bits: u64,
}

/// When a rank's host was done with its parts of a layer, in nanoseconds of the timeline.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RankHost {
    /// Its token histograms read.
    pub counted: u64,
    /// Rows on their way to the send buffers.
    pub packed: u64,
    /// The counts of all ranks there.
    pub exchanged: u64,
    /// So the plan.
    pub planned: u64,
    /// Everything enqueued.
    pub enqueued: u64,
}

impl RankHost {
    /// From times of the host, by the timeline's beginning.
    pub(crate) fn since(epoch: Instant, times: HostTimes) -> Self {
        let ns = |time: Option<Instant>| {
            time.map_or(0, |time| time.saturating_duration_since(epoch).as_nanos() as u64)
        };
        RankHost {
            counted: ns(times.counted),
            packed: ns(times.packed),
            exchanged: ns(times.exchanged),
            planned: ns(times.planned),
            enqueued: ns(times.enqueued),
        }
    }
}

struct Job {
    layer: usize,
    routing: Routing,
    table: Arc<StageTable>,
    keep_bits: bool,
}

/// What a rank did.
struct Done {
    rank: Rank,
    spans: Vec<Span>,
    host: RankHost,
    bits: u64,
}

type Answer = Result<Done, PipelineError>;

/// Ranks that wait for layers to run. Dropping it ends them.
pub struct LayerRig {
    /// Where experts live.
    pub map: Arc<SlotMap>,
    jobs: Vec<Sender<Job>>,
    answers: Receiver<Answer>,
    timeout: Duration,
    layers: usize,
    next: usize,
    keep_bits: bool,
}

/// Weights of different layers that a rig walks through come to this many bytes, so that no cache holds them: as in a
/// model, whose layers follow each other.
const WEIGHT_BYTES: usize = 96 << 20;

impl LayerRig {
    /// Starts ranks with room for each of `loads`, which are routings by rank.
    pub fn start(
        shape: RigShape,
        loads: &[Vec<Routing>],
        options: &RigOptions,
    ) -> Result<Self, PipelineError> {
        let map = Arc::new(SlotMap::contiguous(shape.experts, options.ranks)?);
        let capacity = capacity(&map, shape.top_k, loads)?;
        let layers = WEIGHT_BYTES.div_ceil(shape.bytes(options.dtype).max(1)).clamp(1, 6);
        let (epoch, faults) = (Instant::now(), FaultCell::default());
        let fabric =
            ThreadsOptions { link: options.link, ..ThreadsOptions::new(options.timeout, faults.clone()) };
        let (answer, answers) = channel();
        let mut jobs = Vec::new();
        for (number, fabric) in Fabric::threads(options.ranks, fabric).into_iter().enumerate() {
            let host =
                ThreadedOptions { faults: faults.clone(), epoch, ..ThreadedOptions::new(options.dtype) };
            let kernels = CpuKernels::new(options.threads, options.isa).map_err(DeviceError::Unsupported)?;
            let device = ThreadedBackend::new(Rank(number), kernels, Arc::clone(&options.weights), host)?;
            let pipeline_options = PipelineOptions {
                policy: Policy::default(),
                sizes: PipelineSizes { layer: shape.layer(&map, options.dtype), capacity },
                gather_tokens: 0,
                identity: 0,
                timeout: options.timeout,
            };
            let rank = RigRank {
                shape,
                router: shape.plain_router(),
                device: Arc::new(device),
                map: Arc::clone(&map),
            };
            let bench = Bench { rank, layers, tokens: capacity.tokens, epoch };
            let (job, todo) = channel();
            let (answer, faults) = (answer.clone(), faults.clone());
            let work = move || {
                if let Err(error) = bench.serve(fabric, pipeline_options, &todo, &answer) {
                    faults.raise(Fault {
                        kind: FaultKind::Invalid,
                        rank: Rank(number),
                        place: Place::default(),
                        message: error.to_string(),
                    });
                    // Nobody listens any more when the rig is gone.
                    let _ = answer.send(Err(error));
                }
            };
            let thread = std::thread::Builder::new().name(format!("rank{number}")).spawn(work);
            thread
                .map_err(|error| DeviceError::Unsupported(format!("no thread for rank {number}: {error}")))?;
            jobs.push(job);
        }
        Ok(LayerRig { map, jobs, answers, timeout: 3 * options.timeout, layers, next: 0, keep_bits: false })
    }

    /// Whether runs say what their outputs were: a hash, which takes its time after each.
    pub fn keep_bits(&mut self, keep: bool) {
        self.keep_bits = keep;
    }

    /// Runs the layer once.
    pub fn run(&mut self, routings: &[Routing], table: &StageTable) -> Result<LayerRun, PipelineError> {
        let (table, layer) = (Arc::new(table.clone()), self.next % self.layers);
        self.next += 1;
        for (job, routing) in self.jobs.iter().zip(routings) {
            // A rank that ended has answered why.
            let _ = job.send(Job {
                layer,
                routing: routing.clone(),
                table: Arc::clone(&table),
                keep_bits: self.keep_bits,
            });
        }
        let mut run = LayerRun {
            timeline: Timeline::default(),
            hosts: vec![RankHost::default(); self.jobs.len()],
            layer_ns: 0,
            weights: layer,
            bits: 0,
        };
        for _ in 0..self.jobs.len() {
            let done = self.answer()??;
            run.timeline.spans.extend(done.spans);
            run.hosts[done.rank.0] = done.host;
            // Ranks answer in any order.
            run.bits ^= done.bits.rotate_left(done.rank.0 as u32);
        }
        run.layer_ns = run.timeline.extent().map_or(0, |extent| extent.end - extent.start);
        Ok(run)
    }

    /// What the next rank says.
    fn answer(&self) -> Result<Answer, Fault> {
        let mut deadline = Deadline::after(self.timeout);
        let problem = loop {
            match self.answers.recv_timeout(FaultCell::POLL) {
                Ok(answer) => return Ok(answer),
                Err(RecvTimeoutError::Disconnected) => break "no rank is left".into(),
                Err(RecvTimeoutError::Timeout) if deadline.passed() => {
                    break format!("no rank finished a layer within {:?}", self.timeout);
                }
                Err(RecvTimeoutError::Timeout) => {}
            }
        };
        Err(Fault { kind: FaultKind::Deadline, rank: Rank(0), place: Place::default(), message: problem })
    }
}

/// Room for each of the loads, whatever their tables.
pub(crate) fn capacity(
    map: &SlotMap,
    top_k: usize,
    loads: &[Vec<Routing>],
) -> Result<Capacity, PipelineError> {
    let mut most = Capacity::worst_case(1, &LayerSizes { top_k, ..LayerSizes::of(map, DType::F32) });
    for routings in loads {
        let counts = LayerHistograms::of_routings(map, top_k, routings)?;
        let traffic = Traffic::of(map, &counts, &StageTable::serial(map, GemmKind::Grouped));
        for rank in map.all_ranks() {
            let needed = Capacity::needed(&traffic, rank);
            most = Capacity {
                tokens: most.tokens.max(needed.tokens),
                rows_sent: most.rows_sent.max(needed.rows_sent),
                rows_received: most.rows_received.max(needed.rows_received),
                assignments: most.assignments.max(needed.assignments),
                stage_assignments: most.stage_assignments.max(needed.stage_assignments),
            };
        }
    }
    Ok(most)
}

/// One rank of a rig.
struct Bench {
    rank: RigRank<Cpu>,
    layers: usize,
    tokens: usize,
    epoch: Instant,
}

impl Bench {
    fn serve(
        &self,
        fabric: Fabric<Cpu>,
        options: PipelineOptions,
        todo: &Receiver<Job>,
        answers: &mpsc::Sender<Answer>,
    ) -> Result<(), PipelineError> {
        let RigRank { device, shape, .. } = &self.rank;
        let timeout = options.timeout;
        let pipeline = ExpertPipeline::new(Arc::clone(device), fabric.clone(), options)?;
        let layers: Vec<MoeLayer> =
            (0..self.layers).map(|layer| self.rank.load(layer)).collect::<Result<_, _>>()?;
        let x = device.allocate("x", device.dtype(), self.tokens, shape.hidden)?;
        let y = device.allocate("y", device.dtype(), self.tokens, shape.hidden)?;
        self.rank.fill(&x, "", 256)?;
        let finish = || device.wait(&device.record(Lane::Compute), Deadline::behind(timeout));
        finish()?;
        device.set_recording(true);
        while let Ok(job) = todo.recv() {
            let rows = 0..job.routing.tokens();
            let (x, y) = (x.rows(rows.clone())?, y.rows(rows)?);
            device.take_records();
            self.together(&fabric)?;
            let layer = &layers[job.layer];
            let report = pipeline.run_table(layer, Some(&job.routing), &job.table, &x, &y)?;
            finish()?;
            let (rank, spans, host) =
                (device.rank(), take_spans(&**device), RankHost::since(self.epoch, report.host));
            let bits = if job.keep_bits { self.rank.bits(&y)? } else { 0 };
            if answers.send(Ok(Done { rank, spans, host, bits })).is_err() {
                break;
            }
        }
        Ok(())
    }

    /// Returns at the same moment on all ranks, as well as sleeping does.
    fn together(&self, fabric: &Fabric<Cpu>) -> Result<(), Fault> {
        const AHEAD: Duration = Duration::from_micros(150);
        let soon = (self.epoch.elapsed() + AHEAD).as_nanos() as u64;
        let messages = fabric.control.exchange("start", Place::default(), soon.to_le_bytes().into())?;
        let times =
            messages.iter().filter_map(|message| Some(u64::from_le_bytes(message[..].try_into().ok()?)));
        let start = Duration::from_nanos(times.max().unwrap_or(0));
        std::thread::sleep(start.saturating_sub(self.epoch.elapsed()));
        Ok(())
    }
}
