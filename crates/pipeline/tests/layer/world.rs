//! Random MoE layers, and ranks that run them.

use crate::emulated::Heard;
use epsmoe_base::{
    DType, Deadline, Fault, FaultCell, FaultKind, Lane, Layer, Mix, Phase, Place, Rank, Stage, WireDType,
    WireFormat, hash_bytes,
};
use epsmoe_device::op::{Add, Copy, Embed, HostToDevice, Score, TopKRouter};
use epsmoe_device::reference::{self, PlainKernels, PlainMatrix, Reference};
use epsmoe_device::threaded::{ThreadedOptions, WeightStore};
use epsmoe_device::{Backend, Buffer, Record, Reserve, TensorBytes, Weight, WeightShape};
use epsmoe_fabric::{Fabric, FaultInjection, ThreadsOptions};
use epsmoe_pipeline::{
    ExpertPipeline, Identities, LayerReport, Mlp, MoeLayer, PipelineError, PipelineOptions, PipelineSizes,
    SharedMlp,
};
use epsmoe_plan::*;
use half::bf16;
use std::sync::{Arc, mpsc};
use std::time::Duration;

/// Long enough for any machine that works.
pub(crate) const PATIENT: Duration = Duration::from_secs(30);

/// Layers of one shape, one after the other: what one gives is what the next takes. All numbers follow from
/// the seed and the format.
#[derive(Clone, Debug)]
pub(crate) struct Case {
    pub(crate) seed: u64,
    pub(crate) dtype: DType,
    pub(crate) map: SlotMap,
    pub(crate) hidden: usize,
    pub(crate) inner: usize,
    pub(crate) router: TopKRouter,
    /// Expert that a strong bias sends every token to.
    pub(crate) hot: Option<usize>,
    /// Inner width of the shared expert.
    pub(crate) shared: Option<usize>,
    /// Whether the shared expert's output is gated.
    pub(crate) shared_gate: bool,
    /// Tokens of each rank.
    pub(crate) tokens: Vec<usize>,
    pub(crate) layers: usize,
    /// What rows travel in; like activations unless it says so.
    pub(crate) wire: Option<WireFormat>,
    /// Experts that give rows back as they are.
    pub(crate) identities: usize,
    /// Whether weights are put on what experts read.
    pub(crate) scaled_inputs: bool,
}

impl Case {
    pub(crate) fn random(seed: u64, dtype: DType, layers: usize) -> Self {
        let mut mix = Mix::keyed(seed, &[1]);
        let ranks = 1 + mix.below(4);
        let experts = ranks + mix.below(3 * ranks + 2);
        let router = TopKRouter {
            top_k: 1 + mix.below(experts.min(4)),
            score: [Score::Softmax, Score::Sigmoid][mix.below(2)],
            groups: None,
            normalise: mix.below(2) == 0,
            scale: 1.0 + 0.5 * mix.unit(),
        };
        let tokens = |_| if mix.below(4) == 0 { 0 } else { mix.below(24) };
        Case {
            tokens: (0..ranks).map(tokens).collect(),
            seed,
            dtype,
            map: random_map(experts, ranks, &mut mix),
            hidden: 1 + mix.below(20),
            inner: 1 + mix.below(12),
            router,
            hot: (mix.below(3) == 0).then(|| mix.below(experts)),
            shared: (mix.below(3) > 0).then(|| 1 + mix.below(9)),
            shared_gate: mix.below(2) == 0,
            layers,
            wire: (mix.below(3) == 0).then(|| WireFormat::of(WireDType::Fp8, dtype)),
            identities: if mix.below(3) == 0 { 1 + mix.below(5) } else { 0 },
            scaled_inputs: mix.below(4) == 0,
        }
    }

    /// Experts that the router chooses from.
    pub(crate) fn choices(&self) -> usize {
        self.map.experts() + self.identities
    }

    /// Two ranks of four experts, top 3, with 24 tokens each: rows in every stage, whatever the cut.
    pub(crate) fn fixed() -> Self {
        let router =
            TopKRouter { top_k: 3, score: Score::Softmax, groups: None, normalise: true, scale: 1.0 };
        Case {
            seed: 7,
            dtype: DType::F32,
            map: SlotMap::contiguous(8, 2).expect("two ranks"),
            hidden: 16,
            inner: 5,
            router,
            hot: None,
            shared: Some(3),
            shared_gate: false,
            tokens: vec![24, 24],
            layers: 2,
            wire: None,
            identities: 0,
            scaled_inputs: false,
        }
    }

    /// A named tensor `[rows, width]`, whose rows keep numbers small, in numbers that its format has exactly.
    pub(crate) fn tensor(&self, name: &str, rows: usize, width: usize) -> Vec<f32> {
        let mut mix = Mix::keyed(self.seed, &[hash_bytes(name.as_bytes())]);
        let size = 1.2 / (width as f32).sqrt();
        (0..rows * width).map(|_| rounded(self.dtype, size * mix.signed())).collect()
    }

    /// What each rank starts from `[T, H]`.
    pub(crate) fn input(&self, rank: usize) -> Vec<f32> {
        let name = format!("input of rank {rank}");
        let x = self.tensor(&name, self.tokens[rank] * self.hidden, 1);
        x.into_iter().map(|x| rounded(self.dtype, x)).collect()
    }

    /// What the layer's memory follows from.
    pub(crate) fn sizes(&self) -> LayerSizes {
        LayerSizes {
            hidden: self.hidden,
            inner: self.inner,
            shared_inner: self.shared.unwrap_or(0),
            top_k: self.router.top_k,
            identities: self.identities,
            wire: self.wire.unwrap_or(WireFormat::plain(self.dtype)),
            ..LayerSizes::of(&self.map, self.dtype)
        }
    }

    /// The router's correction bias.
    pub(crate) fn bias(&self, layer: usize) -> Option<Vec<f32>> {
        let hot = self.hot?;
        let mut bias = self.tensor(&format!("{layer} bias"), 1, self.choices());
        bias[hot] = 50.0;
        Some(bias)
    }
}

/// Contiguous blocks, or any experts on any rank in any order.
fn random_map(experts: usize, ranks: usize, mix: &mut Mix) -> SlotMap {
    if mix.below(2) == 0 {
        return SlotMap::contiguous(experts, ranks).expect("at least an expert a rank");
    }
    let mut order: Vec<u32> = (0..experts as u32).collect();
    (1..experts).for_each(|last| order.swap(last, mix.below(last + 1)));
    let mut by_rank: Vec<Vec<u32>> = order[..ranks].iter().map(|&expert| vec![expert]).collect();
    order[ranks..].iter().for_each(|&expert| by_rank[mix.below(ranks)].push(expert));
    // Some are on other ranks too.
    for _ in 0..mix.below(2) * (1 + mix.below(experts)) {
        let (expert, held) = (mix.below(experts) as u32, &mut by_rank[mix.below(ranks)]);
        if !held.contains(&expert) {
            held.insert(mix.below(held.len() + 1), expert);
        }
    }
    SlotMap::new(experts, &by_rank, mix.next_u64()).expect("every expert once")
}

pub(crate) fn rounded(dtype: DType, value: f32) -> f32 {
    if dtype == DType::BF16 { bf16::from_f32(value).to_f32() } else { value }
}

/// What a rank may have otherwise than the others.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Odd {
    /// A router that scales weights otherwise.
    Router,
    /// A table with another kernel.
    Table,
    /// Room for one token more.
    Sizes,
    /// A later version of the same map.
    Map,
}

/// How a case is run.
#[derive(Clone)]
pub(crate) struct Setup {
    /// One for all ranks, or one each.
    pub(crate) policies: Vec<Policy>,
    /// Instead of what the policy makes.
    pub(crate) table: Option<StageTable>,
    pub(crate) identities: Vec<u64>,
    pub(crate) capacity: Option<Capacity>,
    pub(crate) jitter: u64,
    pub(crate) delay: Option<u64>,
    /// A lane wait of one rank to leave out.
    pub(crate) skipped: Option<(usize, usize)>,
    pub(crate) injection: Option<FaultInjection>,
    /// Something that one rank, the second, has otherwise.
    pub(crate) odd: Option<Odd>,
    /// A rank that comes to no layer.
    pub(crate) absent: Option<usize>,
    /// A rank that comes so late.
    pub(crate) late: Option<(usize, Duration)>,
    /// How long ranks wait for each other.
    pub(crate) timeout: Duration,
    /// A rank, and what writes down what the others say and send to it.
    pub(crate) heard: Option<(usize, Arc<Heard>)>,
    /// Whether layers are begun, and finished behind other work.
    pub(crate) in_two: bool,
    /// Layers of at most so many tokens are gathered.
    pub(crate) gather_tokens: usize,
}

impl Setup {
    pub(crate) fn new(policy: Policy) -> Self {
        Setup {
            policies: vec![policy],
            table: None,
            identities: vec![0],
            capacity: None,
            jitter: 1,
            delay: None,
            skipped: None,
            injection: None,
            odd: None,
            absent: None,
            late: None,
            timeout: PATIENT,
            heard: None,
            in_two: false,
            gather_tokens: 0,
        }
    }

    pub(crate) fn serial() -> Self {
        Setup::new(Policy { schedule: Schedule::Serial, ..Policy::default() })
    }

    pub(crate) fn two_batch() -> Self {
        Setup::new(Policy { schedule: Schedule::TwoBatch, ..Policy::default() })
    }
}

/// What one rank got.
#[derive(Clone, Debug)]
pub(crate) struct Got {
    /// The last layer's output.
    pub(crate) y: Vec<f32>,
    /// Lane waits asked for.
    pub(crate) waits: usize,
    /// Of each layer.
    pub(crate) reports: Vec<LayerReport>,
    /// What the router says to the input in the first layer.
    pub(crate) routing: Routing,
    /// What the lanes did after that.
    pub(crate) records: Vec<Record>,
    /// Memory of the device before the layers' inputs and after their buffers.
    pub(crate) pipeline_bytes: u64,
}

/// Runs all layers on all ranks; a rank's error is the world's first fault, as in an engine. Fails the test
/// rather than hang.
pub(crate) fn run(case: &Case, setup: &Setup) -> Vec<Result<Got, Fault>> {
    let faults = FaultCell::default();
    let fabric = ThreadsOptions {
        delay: setup.delay,
        injection: setup.injection,
        ..ThreadsOptions::new(setup.timeout, faults.clone())
    };
    let weights = Arc::<WeightStore<_>>::default();
    let (done, answers) = mpsc::channel();
    for (rank, fabric) in Fabric::threads(case.map.ranks(), fabric).into_iter().enumerate() {
        let (case, setup, done) = (case.clone(), setup.clone(), done.clone());
        let (faults, weights) = (faults.clone(), Arc::clone(&weights));
        std::thread::spawn(move || {
            let fabric = match &setup.heard {
                Some((who, heard)) if *who == rank => heard.listen(fabric),
                _ => fabric,
            };
            let answer =
                run_rank_of(&case, &setup, rank, fabric, &faults, &weights).map_err(|error| match error {
                    PipelineError::Fault(fault) => faults.raise(fault),
                    other => {
                        let (kind, place, message) =
                            (FaultKind::Invalid, Place::default(), other.to_string());
                        faults.raise(Fault { kind, rank: Rank(rank), place, message })
                    }
                });
            // Whoever waits for it may have failed.
            let _ = done.send((rank, answer));
        });
    }
    drop(done);
    let mut all = Vec::new();
    while all.len() < case.map.ranks() {
        match answers.recv_timeout(4 * PATIENT) {
            Ok(answer) => all.push(answer),
            Err(error) => panic!("{} ranks answered, then {error}: {case:?}", all.len()),
        }
    }
    all.sort_by_key(|&(rank, _)| rank);
    all.into_iter().map(|(_, answer)| answer).collect()
}

/// One rank of a case on a processor of its own.
pub(crate) fn run_rank_of(
    case: &Case,
    setup: &Setup,
    rank: usize,
    fabric: Fabric<Reference>,
    faults: &FaultCell,
    weights: &Arc<WeightStore<PlainMatrix>>,
) -> Result<Got, PipelineError> {
    let skipped = setup.skipped.filter(|&(who, _)| who == rank).map(|(_, wait)| wait);
    let host = ThreadedOptions {
        faults: faults.clone(),
        skipped_waits: skipped.into_iter().collect(),
        ..reference::options(case.dtype, setup.jitter)
    };
    let device = Reference::new(Rank(rank), PlainKernels, Arc::clone(weights), host)?;
    run_rank(case, setup, device, fabric)
}

fn run_rank(
    case: &Case,
    setup: &Setup,
    device: Reference,
    fabric: Fabric<Reference>,
) -> Result<Got, PipelineError> {
    let rank = device.rank();
    let (device, tokens) = (Arc::new(device), case.tokens[rank.0]);
    let odd = setup.odd.filter(|_| rank == Rank(1));
    let mut options = options(case, setup, rank);
    if let Some(Odd::Sizes) = odd {
        options.sizes.capacity.tokens += 1;
    }
    let pipeline = ExpertPipeline::new(Arc::clone(&device), fabric, options)?;
    let mut layers: Vec<MoeLayer> = (0..case.layers).map(|layer| load(case, &device, Layer(layer))).collect();
    let mut table = setup.table.clone();
    match odd {
        Some(Odd::Router) => layers[0].router.scale = 3.0,
        Some(Odd::Map) => layers[0].slots = Arc::new(later(&layers[0].slots)),
        Some(Odd::Table) => table.iter_mut().for_each(|table| table.gemm[0] = GemmKind::Dense),
        Some(Odd::Sizes) | None => {}
    }
    let pipeline_bytes = device.allocated_bytes();
    let mut x = device.allocate("x", case.dtype, tokens, case.hidden)?;
    let mut y = device.allocate("y", case.dtype, tokens, case.hidden)?;
    fill(&device, &x, &case.input(rank.0));
    let finish = || device.wait(&device.record(Lane::Compute), Deadline::after(4 * PATIENT));
    if setup.absent == Some(rank.0) {
        // Elsewhere until the world has stopped.
        loop {
            finish()?;
            std::thread::sleep(FaultCell::POLL);
        }
    }
    let routing = pipeline.route(&layers[0], &x)?;
    device.take_records();
    device.set_recording(true);
    if let Some((_, late)) = setup.late.filter(|&(who, _)| who == rank.0) {
        std::thread::sleep(late);
    }
    let mut reports = Vec::new();
    let known = (setup.gather_tokens > 0).then_some(case.tokens.as_slice());
    for layer in &layers {
        reports.push(match &table {
            None if setup.in_two => run_in_two(&pipeline, &device, layer, known, [&x, &y])?,
            None => pipeline.run(layer, known, &x, &y)?,
            Some(table) => pipeline.run_table(layer, None, table, &x, &y)?,
        });
        std::mem::swap(&mut x, &mut y);
    }
    finish()?;
    let (waits, records) = (device.waits(), device.take_records());
    Ok(Got { y: device.read_f32(&x)?, waits, reports, routing, records, pipeline_bytes })
}

/// A layer whose last sums are awaited behind other work, and to which the shared expert's output is added then.
fn run_in_two(
    pipeline: &ExpertPipeline<Reference>,
    device: &Reference,
    layer: &MoeLayer,
    known: Option<&[usize]>,
    [x, y]: [&Buffer; 2],
) -> Result<LayerReport, PipelineError> {
    let place = Place::layer(Layer(layer.layer.0 + 1)).phase(Phase::Residual);
    let [shared, other] = ["shared", "other"].map(|name| device.allocate(name, y.dtype, y.rows, y.width));
    let (shared, other) = (shared?, other?);
    let pending = pipeline.begin(layer, (known, None), x, [&shared, y])?;
    device.enqueue(Lane::Compute, place, Copy { x: x.clone(), out: other })?;
    let report = pipeline.finish(place, pending)?;
    if layer.shared.is_some() {
        device.enqueue(Lane::Compute, place, Add { x: shared, out: y.clone() })?;
    }
    Ok(report)
}

/// The next version of a map.
fn later(map: &SlotMap) -> SlotMap {
    let held = |rank| map.experts_on(rank).map(|expert| expert.0 as u32).collect();
    let by_rank: Vec<Vec<u32>> = map.all_ranks().map(held).collect();
    SlotMap::new(map.experts(), &by_rank, map.version() + 1).expect("every expert once")
}

fn options(case: &Case, setup: &Setup, rank: Rank) -> PipelineOptions {
    let tokens = case.tokens.iter().copied().max().unwrap_or(0).max(1);
    let layer = case.sizes();
    let capacity = setup.capacity.unwrap_or(Capacity::worst_case(tokens, &layer));
    PipelineOptions {
        policy: setup.policies[rank.0 % setup.policies.len()].clone(),
        sizes: PipelineSizes { layer, capacity },
        gather_tokens: setup.gather_tokens,
        identity: setup.identities[rank.0 % setup.identities.len()],
        timeout: setup.timeout,
    }
}

fn load(case: &Case, device: &Reference, layer: Layer) -> MoeLayer {
    let (hidden, experts) = (case.hidden, case.choices());
    let take = |name: String, shape: WeightShape, tensors: &[Vec<f32>]| -> Weight {
        let bytes = |tensor: &Vec<f32>| tensor.iter().flat_map(|value| value.to_le_bytes()).collect();
        let bytes: Vec<Vec<u8>> = tensors.iter().map(bytes).collect();
        let tensors: Vec<_> = bytes.iter().map(|bytes| TensorBytes { dtype: DType::F32, bytes }).collect();
        device.find(&name).unwrap_or_else(|| device.load(&name, shape, &tensors).expect("a weight"))
    };
    let map = |name: String, n: usize, k: usize| {
        let tensor = case.tensor(&name, n, k);
        take(name, WeightShape::Matrix { n, k }, &[tensor])
    };
    let mlp = |name: String, inner: usize| {
        let part = |part: &str| case.tensor(&format!("{name} {part}"), inner, hidden);
        let shape = WeightShape::GateUp { inner, k: hidden };
        Mlp {
            gate_up: take(format!("{name} gate and up"), shape, &[part("gate"), part("up")]),
            down: map(format!("{name} down"), hidden, inner),
        }
    };
    let number = layer.0;
    let bias = |bias: Vec<f32>| take(format!("{number} bias"), WeightShape::Vector { n: experts }, &[bias]);
    let shared = |inner: usize| SharedMlp {
        mlp: mlp(format!("{number} shared"), inner),
        gate: case.shared_gate.then(|| map(format!("{number} shared gate"), 1, hidden)),
    };
    let held = case.map.experts_on(device.rank());
    MoeLayer {
        router_bias: None,
        activation: None,
        layer,
        router_weight: map(format!("{number} router"), experts, hidden),
        bias: case.bias(number).map(bias),
        scales: None,
        router: case.router,
        experts: held.map(|expert| mlp(format!("{number} expert {}", expert.0), case.inner)).collect(),
        slots: Arc::new(case.map.clone()),
        shared: case.shared.map(shared),
        identities: (case.identities > 0).then_some(Identities { experts: case.identities, added: true }),
        scaled_inputs: case.scaled_inputs,
    }
}

fn fill(device: &Reference, out: &Buffer, values: &[f32]) {
    let (rows, width) = (out.rows, out.width);
    let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
    let tensors = [TensorBytes { dtype: DType::F32, bytes: &bytes }];
    let name = format!("input of {}", device.rank());
    let table = device.load(&name, WeightShape::Table { rows, width }, &tensors).expect("a table");
    let ids = device.allocate("ids", DType::U32, rows, 1).expect("memory");
    let compute =
        |op: epsmoe_device::op::Op| device.enqueue(Lane::Compute, Place::default(), op).expect("it fits");
    compute(HostToDevice { words: (0..rows as u32).collect(), out: ids.clone() }.into());
    compute(Embed { ids, table, out: out.clone() }.into());
}

/// Any policy that the map allows: stages with and without experts, in any legal order.
pub(crate) fn random_policy(map: &SlotMap, mix: &mut Mix) -> Policy {
    let gemm = Some([GemmKind::Grouped, GemmKind::Dense][mix.below(2)]);
    let most = map.max_local();
    if mix.below(8) == 0 {
        return Policy { schedule: Schedule::Auto, ..Policy::default() };
    }
    if mix.below(8) == 0 {
        return Policy { schedule: Schedule::Serial, gemm, ..Policy::default() };
    }
    if mix.below(5) == 0 {
        return Policy { schedule: Schedule::TwoBatch, gemm, shared: random_place(mix), ..Policy::default() };
    }
    let (stages, count) = match mix.below(4) {
        0 => (None, Policy::DEFAULT_STAGES.min(most)),
        1 => {
            let count = 1 + mix.below(most);
            (Some(Stages::Count(count)), count)
        }
        _ => {
            let count = 1 + mix.below(most + 2);
            let mut cut: Vec<usize> = (1..count).map(|_| mix.below(most + 1)).chain([0, most]).collect();
            cut.sort_unstable();
            (Some(Stages::Sizes(cut.windows(2).map(|ends| ends[1] - ends[0]).collect())), count)
        }
    };
    let shared = random_place(mix);
    let order = (mix.below(3) > 0).then(|| random_order(count, mix));
    Policy { schedule: Schedule::Staged, stages, gemm, shared, order, cost: None }
}

fn random_place(mix: &mut Mix) -> Option<SharedExpert> {
    [
        None,
        Some(SharedExpert::BesideCountExchange),
        Some(SharedExpert::BesideFirstDispatch),
        Some(SharedExpert::BesideLastCombine),
        Some(SharedExpert::Serial),
    ][mix.below(5)]
}

/// Any table that the map allows: each rank with cuts of its own, each stage with a kernel of its own.
pub(crate) fn random_table(map: &SlotMap, mix: &mut Mix) -> StageTable {
    let stages = 1 + mix.below(5);
    let mut cut = |local: usize| {
        let mut cut: Vec<usize> = (1..stages).map(|_| mix.below(local + 1)).chain([0, local]).collect();
        cut.sort_unstable();
        cut
    };
    let cuts = map.all_ranks().map(|rank| cut(map.local_count(rank))).collect();
    let shared = [
        SharedExpert::BesideCountExchange,
        SharedExpert::BesideFirstDispatch,
        SharedExpert::BesideLastCombine,
        SharedExpert::Serial,
    ][mix.below(4)];
    let gemm = (0..stages).map(|_| [GemmKind::Grouped, GemmKind::Dense][mix.below(2)]).collect();
    StageTable { cuts, order: random_order(stages, mix), gemm, shared, reserved: 100 * mix.below(2) as u64 }
}

/// Draws among the transfers that may come next until none is left.
fn random_order(stages: usize, mix: &mut Mix) -> Vec<Transfer> {
    let (mut dispatched, mut combined) = (vec![false; stages], vec![false; stages]);
    let mut order = Vec::new();
    while order.len() < 2 * stages {
        let stage = mix.below(stages);
        if mix.below(2) == 0 && !dispatched[stage] {
            dispatched[stage] = true;
            order.push(Transfer::Dispatch(Stage(stage)));
        } else if !combined[stage] && dispatched[..=stage].iter().all(|&there| there) {
            combined[stage] = true;
            order.push(Transfer::Combine(Stage(stage)));
        }
    }
    order
}
