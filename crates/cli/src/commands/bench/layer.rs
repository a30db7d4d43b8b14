//! `epsmoe bench layer`: schedules of one MoE layer on one rank of several; the others are emulated.

use super::PacingFigures;
use super::contenders::of_spec;
use super::times::{LayerTime, layer_times, quantile};
use crate::args::{BenchLayerArgs, ContenderSpec, DeviceKind, Dtype, ModelArgs};
use crate::machine::{self, Machine};
use crate::setup;
use crate::{memory, output};
use anyhow::{Context, Result, anyhow, bail};
use epsmoe_base::{Bytes, DType, FaultCell, Mix, Rank, RowFormat, WireDType, WireFormat, cores};
use epsmoe_device::cpu::gemm::Isa;
use epsmoe_device::cpu::{Cpu, CpuKernels};
use epsmoe_device::cuda::{
    CudaBackend, CudaDevice, CudaOptions, CudaWeights, DriverCalls, count_driver_calls, take_driver_calls,
};
use epsmoe_device::op::TopKRouter;
use epsmoe_device::threaded::ThreadedOptions;
use epsmoe_device::{Backend, PeerQueue};
use epsmoe_fabric::Link;
use epsmoe_model::MoeSpec;
use epsmoe_plan::{
    Capacity, CostModel, LayerBytes, LayerSizes, Policy, Schedule, SharedExpert, SlotMap, StageTable, Stages,
    Workload, order_text, predict_ns, sensible_orders,
};
use epsmoe_profile::{EmulatedLayers, EmulatedSchedule, EmulatedShape, Fingerprint, RigShape};
use serde::Serialize;
use std::collections::BTreeMap;
use std::ops::RangeInclusive;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// What `--json` writes.
#[derive(Serialize)]
struct Report {
    cells: Vec<Cell>,
    command: String,
    version: &'static str,
    processor: String,
    machine: Machine,
    load_average: Option<[f64; 3]>,
}

/// All schedules of one layer over one link.
#[derive(Serialize)]
struct Cell {
    model: String,
    /// Which rank of how many was there.
    emulated: String,
    /// The link that its transfers were paced to.
    emulated_link: Option<String>,
    tokens: usize,
    /// What rows and partial sums travel in.
    wire: String,
    /// Rows that the rank sends to others, and that come from them; bytes of the busier direction, of rows and of sums.
    rows_sent: usize,
    rows_received: usize,
    dispatch_bytes: u64,
    combine_bytes: u64,
    rows: Vec<Row>,
}

/// One schedule's figures: medians over the rounds.
#[derive(Serialize)]
struct Row {
    schedule: String,
    /// A layer of a round in which nothing was recorded.
    layer_us: f64,
    layer_us_range: [f64; 2],
    /// What the cost model says of the last layer's plan, before anything was learned.
    predicted_us: Option<f64>,
    /// Over the serial schedule's of the same round.
    ratio_to_serial: Option<f64>,
    /// `max(C, D + M) / T`, C, D and M those of the serial schedule.
    efficiency: Option<f64>,
    /// Of a recorded layer: computation, the experts' of that, dispatch and combine, transfer beside no computation.
    compute_us: Option<f64>,
    experts_us: Option<f64>,
    dispatch_and_combine_us: Option<f64>,
    exposed_us: Option<f64>,
    /// Experts per stage of this rank, and what the transfer lane does.
    cut: Option<Vec<usize>>,
    transfer_order: Option<String>,
    shared_expert: Option<String>,
    pacing: Option<PacingFigures>,
    /// Of the host, from the plan to the last operation's enqueueing.
    enqueue_us: Option<f64>,
    /// Calls of the GPU's driver that a layer makes, if they were counted, longest first.
    driver_calls: Vec<CallFigures>,
}

/// Calls of a function of the GPU's driver, by all threads, in one layer.
#[derive(Serialize)]
struct CallFigures {
    function: &'static str,
    count: f64,
    us: f64,
}

/// What is measured of every model, whatever its processor.
struct Bench<'a> {
    args: &'a BenchLayerArgs,
    dtype: DType,
    wire: WireDType,
    fingerprint: Fingerprint,
}

/// Measures, prints a table for each layer and link, and writes the figures if that was asked for.
pub(crate) fn run(args: &BenchLayerArgs) -> Result<()> {
    args.json.iter().try_for_each(|file| output::check_place(file))?;
    let load_average = machine::load_average();
    let gpu = match args.device {
        DeviceKind::Cpu => None,
        DeviceKind::Cuda => Some(CudaDevice::open(0)?),
        DeviceKind::CudaAt(number) => Some(CudaDevice::open(number)?),
        DeviceKind::Auto | DeviceKind::Reference => bail!("bench layer runs on --device cpu or cuda"),
    };
    gpu.iter().try_for_each(|gpu| gpu.finish_kernels())?;
    let dtype = match args.dtype {
        Dtype::Bfloat16 => DType::BF16,
        Dtype::Float32 => DType::F32,
        Dtype::Auto => {
            if gpu.is_some() {
                DType::BF16
            } else {
                DType::F32
            }
        }
    };
    let wire = args.wire_dtype.of(dtype)?;
    let (threads, isa) = (args.threads.unwrap_or(cores()), Isa::detect());
    let size = args.emulate_rank.size;
    let fingerprint = match &gpu {
        Some(gpu) => Fingerprint::of_gpu(gpu.describe(), size, dtype),
        // Each of the ranks would have such a processor.
        None => Fingerprint::of_cpu(size, threads, isa, dtype),
    };
    let processor = match &gpu {
        Some(gpu) => format!("{}, {dtype}", gpu.describe()),
        None => format!("cpu ({isa}), {threads} thread(s), {dtype}"),
    };
    let processor = format!("{processor}, {}", WireFormat::of(wire, dtype));
    count_driver_calls(args.driver_calls);
    let bench = Bench { args, dtype, wire, fingerprint };
    let mut report = Report {
        cells: Vec::new(),
        command: std::env::args().collect::<Vec<_>>().join(" "),
        version: env!("CARGO_PKG_VERSION"),
        processor,
        machine: Machine::look(),
        load_average,
    };
    for model in &args.model {
        let spec = setup::spec(&ModelArgs::of(model))?;
        let moe = spec.layers.iter().find_map(|layer| layer.mlp.moe());
        let moe = moe.with_context(|| format!("{model} has no MoE layers"))?;
        for &tokens in &args.tokens {
            let (shape, epoch) = (bench.shape(spec.hidden, moe, tokens), Instant::now());
            let shape = EmulatedShape { epoch, ..shape };
            bench.check_room(model, &shape, gpu.as_deref())?;
            let faults = FaultCell::default();
            let rank = Rank(args.emulate_rank.rank);
            let cells = match &gpu {
                Some(gpu) => {
                    let options = CudaOptions {
                        faults: faults.clone(),
                        epoch,
                        reserved_multiprocessors: args.reserve as u32,
                        ..CudaOptions::new(dtype)
                    };
                    let device = CudaBackend::new(rank, gpu, &CudaWeights::new(gpu)?, options)?;
                    bench.cells(model, shape, device, &faults)?
                }
                None => {
                    let host =
                        ThreadedOptions { faults: faults.clone(), epoch, ..ThreadedOptions::new(dtype) };
                    let kernels = CpuKernels::new(threads, isa).map_err(|problem| anyhow!(problem))?;
                    bench.cells(model, shape, Cpu::new(rank, kernels, Arc::default(), host)?, &faults)?
                }
            };
            for cell in cells {
                output::show(&cell.table())?;
                report.cells.push(cell);
            }
        }
    }
    output::show(&report.summary())?;
    args.json.as_ref().map_or(Ok(()), |file| {
        output::write_file(file, |out| {
            serde_json::to_writer_pretty(&mut *out, &report)?;
            out.write_all(b"\n")
        })
    })
}

impl Bench<'_> {
    fn shape(&self, hidden: usize, moe: &MoeSpec, tokens: usize) -> EmulatedShape {
        // Of experts that give rows back as they are nothing is computed and nothing travels.
        let router = TopKRouter { top_k: moe.computed(), ..moe.router };
        EmulatedShape {
            shape: RigShape {
                hidden,
                inner: moe.inner,
                experts: moe.experts,
                top_k: router.top_k,
                shared_inner: moe.shared.map_or(0, |shared| shared.inner),
            },
            router,
            rank: Rank(self.args.emulate_rank.rank),
            size: self.args.emulate_rank.size,
            tokens,
            wire: self.wire,
            timeout: Duration::from_secs_f64(self.args.timeout),
            epoch: Instant::now(),
        }
    }

    /// Refuses what the processor cannot hold, before anything is made: weights, inputs of all ranks, buffers of rows
    /// that are spread evenly.
    fn check_room(&self, model: &str, what: &EmulatedShape, gpu: Option<&CudaDevice>) -> Result<()> {
        let map = SlotMap::contiguous(what.shape.experts, what.size)?;
        let sizes = what.layer(&map, self.dtype);
        let assignments = what.tokens.saturating_mul(what.shape.top_k);
        let rows = what.tokens.saturating_mul(sizes.ranks_of_token());
        let even = Capacity {
            tokens: what.tokens,
            rows_sent: rows,
            rows_received: rows,
            assignments,
            stage_assignments: assignments,
        };
        let inputs = (what.tokens * what.shape.hidden * self.dtype.bytes()) as u64 * (what.size as u64 + 2);
        let needed = what.weight_bytes(self.dtype) + LayerBytes::of(&sizes, &even).total() + inputs;
        let (owner, available) = match gpu {
            Some(gpu) => ("the GPU", Some(gpu.memory_bytes()?.0)),
            None => {
                memory::look().map_or(("", None), |memory| (memory.bound.owner(), Some(memory.available)))
            }
        };
        match available {
            Some(available) if needed > available => bail!(
                "one of {} ranks of an MoE layer of {model} with {} tokens needs about {}, but {owner} has {} left: take \
                 more ranks or fewer --tokens",
                what.size,
                what.tokens,
                Bytes(needed),
                Bytes(available)
            ),
            _ => Ok(()),
        }
    }

    fn cells<B: Backend<Queue: PeerQueue>>(
        &self,
        model: &str,
        what: EmulatedShape,
        device: B,
        faults: &FaultCell,
    ) -> Result<Vec<Cell>> {
        let layers = EmulatedLayers::new(what.clone(), Arc::new(device))?;
        let link = |link: Option<Link>| self.cell(model, &what, &layers, link, faults);
        self.args.link.iter().map(|speed| link(speed.0)).collect()
    }

    fn cell<B: Backend<Queue: PeerQueue>>(
        &self,
        model: &str,
        what: &EmulatedShape,
        layers: &EmulatedLayers<B>,
        link: Option<Link>,
        faults: &FaultCell,
    ) -> Result<Cell> {
        let fabric = layers.fabric(link, faults);
        let cost = setup::cost_model(self.args.profile.as_deref(), &self.fingerprint, link)?;
        let cost = Arc::new(CostModel { concurrent: 0, ..cost });
        let mut contenders = Vec::new();
        let drawn = self.drawn(&layers.sizes(), what.tokens);
        for policy in self.policies(layers.slot_map().max_local(), &cost).into_iter().chain(drawn) {
            contenders.push(Contender::new(layers.schedule(policy.clone(), &fabric)?, policy));
        }
        for contender in &mut contenders {
            contender.warm_up()?;
        }
        let progress = output::step_bar(format!("{model}, {} tokens", what.tokens), self.args.num_iters);
        for round in 0..self.args.num_iters {
            let count = contenders.len();
            for turn in 0..count {
                contenders[(round + turn) % count].round(round < RECORDED)?;
            }
            progress.inc(1);
        }
        progress.finish_and_clear();
        let (traffic, wire) = (layers.traffic()?, WireFormat::of(self.wire, self.dtype));
        let busier = traffic.0.max(traffic.1);
        let bytes = |format: RowFormat| (busier * format.bytes(what.shape.hidden)) as u64;
        let (counts, sizes) = (layers.counts()?, layers.sizes());
        let workload = Workload { map: layers.slot_map(), counts: &counts, shape: &sizes };
        let predicted = |table: &StageTable| predict_ns(table, &workload, &cost) as f64 / 1e3;
        let serial = contenders.iter().find(|contender| contender.policy.schedule == Schedule::Serial);
        Ok(Cell {
            model: model.to_owned(),
            emulated: self.args.emulate_rank.to_string(),
            emulated_link: link.map(|link| link.to_string()),
            tokens: what.tokens,
            rows_sent: traffic.0,
            rows_received: traffic.1,
            wire: wire.to_string(),
            dispatch_bytes: bytes(wire.dispatch),
            combine_bytes: bytes(wire.combine),
            rows: contenders.iter().map(|contender| contender.row(serial, what.rank, &predicted)).collect(),
        })
    }

    /// Schedules at random: stages, cuts, transfer order and place of the shared expert. The same for every link.
    fn drawn(&self, sizes: &LayerSizes, tokens: usize) -> Vec<Policy> {
        let mut mix = Mix::keyed(self.args.seed, &[sizes.hidden as u64, tokens as u64]);
        let mut draw = |_| {
            let most = sizes.local_slots.min(Policy::AUTO_STAGES);
            let stages = 1 + mix.below(most);
            let mut cuts: Vec<usize> = (1..sizes.local_slots).collect();
            while cuts.len() > stages - 1 {
                cuts.swap_remove(mix.below(cuts.len()));
            }
            cuts.sort_unstable();
            let ends = cuts.iter().copied().chain([sizes.local_slots]);
            let starts = std::iter::once(0).chain(cuts.iter().copied());
            let orders = sensible_orders(stages);
            let places = [
                SharedExpert::BesideCountExchange,
                SharedExpert::BesideFirstDispatch,
                SharedExpert::BesideLastCombine,
            ];
            Policy {
                schedule: Schedule::Staged,
                stages: Some(Stages::Sizes(starts.zip(ends).map(|(start, end)| end - start).collect())),
                order: Some(orders[mix.below(orders.len())].clone()),
                shared: Some(places[mix.below(places.len())]),
                ..Policy::default()
            }
        };
        (0..self.args.draw).map(&mut draw).collect()
    }

    /// What was typed, or everything that a rank with so many experts can do.
    fn policies(&self, experts: usize, cost: &Arc<CostModel>) -> Vec<Policy> {
        let staged = |stages| ContenderSpec {
            schedule: Schedule::Staged,
            stages: Some(Stages::Count(stages)),
            order: None,
        };
        let plain = |schedule| ContenderSpec { schedule, stages: None, order: None };
        let specs = match self.args.contender.as_slice() {
            [] => {
                let counts = [1, 2, 4, 8, 16].into_iter().filter(|&stages| stages <= experts).map(staged);
                let whole = [plain(Schedule::Serial), plain(Schedule::TwoBatch)];
                whole.into_iter().chain(counts).chain([plain(Schedule::Auto)]).collect()
            }
            typed => typed.to_vec(),
        };
        let base = Policy { schedule: Schedule::Auto, cost: Some(Arc::clone(cost)), ..Policy::default() };
        specs.iter().map(|spec| of_spec(&base, spec)).collect()
    }
}

/// Rounds after which one is recorded.
const RECORDED: usize = 3;

/// A round takes about so long, and has as many layers as that allows.
const ROUND: Duration = Duration::from_millis(40);

/// Rounds in which an auto schedule learns before it is measured: at least, and at most, if it still tries plans.
const LEARNING: RangeInclusive<usize> = 6..=24;

/// A schedule and what was measured of it.
struct Contender<'a, B: Backend> {
    policy: Policy,
    schedule: EmulatedSchedule<'a, B>,
    /// Layers of a round.
    layers: usize,
    layer_us: Vec<f64>,
    recorded: Vec<LayerTime>,
    table: Option<StageTable>,
    pacing: epsmoe_fabric::Pacing,
    /// Of the host, the last layer of every round.
    enqueue_us: Vec<f64>,
    calls: BTreeMap<&'static str, DriverCalls>,
    /// Layers in which calls were counted.
    counted: usize,
}

impl<'a, B: Backend> Contender<'a, B> {
    fn new(schedule: EmulatedSchedule<'a, B>, policy: Policy) -> Self {
        let (layer_us, recorded) = (Vec::new(), Vec::new());
        let pacing = epsmoe_fabric::Pacing::default();
        let (enqueue_us, calls) = (Vec::new(), BTreeMap::new());
        Contender {
            policy,
            schedule,
            layers: 4,
            layer_us,
            recorded,
            table: None,
            pacing,
            enqueue_us,
            calls,
            counted: 0,
        }
    }

    fn warm_up(&mut self) -> Result<()> {
        self.schedule.run(4, None, false)?;
        if self.policy.schedule == Schedule::Auto {
            for round in 1..=*LEARNING.end() {
                self.schedule.run(4, None, true)?;
                let is_trying = self.schedule.report().is_some_and(|report| report.trying);
                if round >= *LEARNING.start() && !is_trying {
                    break;
                }
            }
        }
        let round = self.schedule.run(4, None, false)?;
        let of_round = ROUND.as_secs_f64() / (round.time.as_secs_f64() / round.layers as f64).max(1e-6);
        self.layers = (of_round as usize).clamp(4, 512);
        self.schedule.take_pacing();
        Ok(())
    }

    fn round(&mut self, recorded: bool) -> Result<()> {
        take_driver_calls();
        let round = self.schedule.run(self.layers, None, false)?;
        for (function, calls) in take_driver_calls() {
            let all = self.calls.entry(function).or_default();
            *all = DriverCalls { count: all.count + calls.count, time: all.time + calls.time };
        }
        self.counted += round.layers;
        let host = round.host;
        if host.planned > 0 {
            self.enqueue_us.push(host.enqueued.saturating_sub(host.planned) as f64 / 1e3);
        }
        self.layer_us.push(round.time.as_secs_f64() * 1e6 / round.layers as f64);
        self.table = round.tables.into_iter().next();
        self.pacing.add(&self.schedule.take_pacing());
        if recorded {
            let round = self.schedule.run(self.layers, None, true)?;
            self.recorded.extend(layer_times(&round.timeline));
            self.schedule.take_pacing();
        }
        Ok(())
    }

    fn median(&self, figure: fn(&LayerTime) -> f64) -> Option<f64> {
        quantile(self.recorded.iter().map(figure), 0.5).map(|ms| ms * 1e3)
    }

    fn driver_calls(&self) -> Vec<CallFigures> {
        let layers = self.counted.max(1) as f64;
        let figures = |(&function, calls): (&&'static str, &DriverCalls)| CallFigures {
            function,
            count: calls.count as f64 / layers,
            us: calls.time.as_secs_f64() * 1e6 / layers,
        };
        let mut all: Vec<CallFigures> = self.calls.iter().map(figures).collect();
        all.sort_by(|a, b| b.us.total_cmp(&a.us));
        all
    }

    fn row(&self, serial: Option<&Self>, rank: Rank, predicted: &dyn Fn(&StageTable) -> f64) -> Row {
        let time = |share| quantile(self.layer_us.iter().copied(), share).unwrap_or(0.0);
        let bound = serial.and_then(|serial| {
            Some(serial.median(|layer| layer.compute_ms)?.max(serial.median(|layer| layer.transfer_ms)?))
        });
        let ratio = |serial: &Self| {
            quantile(self.layer_us.iter().zip(&serial.layer_us).map(|(own, serial)| serial / own), 0.5)
        };
        let Policy { schedule, stages, .. } = &self.policy;
        let (table, two) = (self.table.as_ref(), *schedule == Schedule::TwoBatch);
        Row {
            schedule: match stages {
                Some(stages) => format!("{schedule}:{stages}"),
                None => schedule.to_string(),
            },
            layer_us: time(0.5),
            layer_us_range: [time(0.25), time(0.75)],
            predicted_us: table.filter(|_| !two).map(predicted),
            ratio_to_serial: serial.and_then(ratio),
            efficiency: bound.map(|bound| bound / time(0.5)),
            compute_us: self.median(|layer| layer.compute_ms),
            experts_us: self.median(|layer| layer.experts_ms),
            dispatch_and_combine_us: self.median(|layer| layer.transfer_ms),
            exposed_us: self.median(|layer| layer.exposed_ms),
            cut: table.filter(|_| !two).and_then(|table| {
                Some(table.cuts.get(rank.0)?.windows(2).map(|ends| ends[1] - ends[0]).collect())
            }),
            transfer_order: table.filter(|_| !two).map(|table| order_text(&table.order)),
            shared_expert: table.map(|table| table.shared.to_string()),
            pacing: PacingFigures::of(&self.pacing),
            enqueue_us: quantile(self.enqueue_us.iter().copied(), 0.5),
            driver_calls: self.driver_calls(),
        }
    }
}

impl Cell {
    fn heading(&self) -> String {
        format!(
            "{}, {} tokens a rank, rank {} EMULATED over {}",
            self.model,
            self.tokens,
            self.emulated,
            self.emulated_link.as_deref().unwrap_or("no link")
        )
    }

    fn table(&self) -> String {
        let mut text = format!(
            "\n{}: {} rows out, {} in, {}; {} and {} the busier way\n{}\n",
            self.heading(),
            self.rows_sent,
            self.rows_received,
            self.wire,
            Bytes(self.dispatch_bytes),
            Bytes(self.combine_bytes),
            line([
                "schedule",
                "layer us",
                "predicted",
                "ratio",
                "efficiency",
                "C us",
                "experts",
                "D+M us",
                "exposed",
                "enqueue",
                "late us",
                "short",
                "cut; order"
            ])
        );
        for row in &self.rows {
            let us = |figure: Option<f64>| figure.map_or("-".into(), |us| format!("{us:.0}"));
            let ratio = |figure: Option<f64>| figure.map_or("-".into(), |ratio| format!("{ratio:.3}"));
            let cut = row.cut.iter().flatten().map(usize::to_string).collect::<Vec<_>>().join(",");
            let pacing = row.pacing.as_ref();
            let cells = [
                row.schedule.as_str(),
                &us(Some(row.layer_us)),
                &us(row.predicted_us),
                &ratio(row.ratio_to_serial),
                &ratio(row.efficiency),
                &us(row.compute_us),
                &us(row.experts_us),
                &us(row.dispatch_and_combine_us),
                &us(row.exposed_us),
                &us(row.enqueue_us),
                &pacing.map_or("-".into(), |pacing| format!("{:.1}", pacing.late_us_median)),
                &pacing.map_or("-".into(), |pacing| pacing.unresolved.to_string()),
                &format!("{cut}; {}", row.transfer_order.as_deref().unwrap_or("dA dB cA cB")),
            ];
            text.push_str(&line(cells));
            text.push('\n');
            let call =
                |calls: &CallFigures| format!("{} {:.1}x {:.0}", calls.function, calls.count, calls.us);
            if !row.driver_calls.is_empty() {
                let all: f64 = row.driver_calls.iter().map(|calls| calls.us).sum();
                let each = row.driver_calls.iter().map(call).collect::<Vec<_>>().join(", ");
                text.push_str(&format!("    driver calls of a layer, {all:.0} us: {each}\n"));
            }
        }
        text
    }
}

impl Report {
    /// A line for each cell: the serial layer, and what the others gain over it.
    fn summary(&self) -> String {
        let mut text = format!("\nSummary (EMULATED, {}): layer us and efficiency\n", self.processor);
        for cell in &self.cells {
            let of = |row: &Row| {
                format!("{} {:.0} ({:.2})", row.schedule, row.layer_us, row.efficiency.unwrap_or(0.0))
            };
            let rows = cell.rows.iter().map(of).collect::<Vec<_>>().join("  ");
            text.push_str(&format!("{}: {rows}\n", cell.heading()));
        }
        text + &self.predictions()
    }

    /// How far predictions were off, and how far auto was behind the best schedule of its cell.
    fn predictions(&self) -> String {
        let rows = || self.cells.iter().flat_map(|cell| &cell.rows);
        let off = |row: &Row| Some((row.predicted_us? / row.layer_us - 1.0).abs() * 100.0);
        let errors = || rows().filter_map(off);
        let behind = |cell: &Cell| {
            let best = cell.rows.iter().map(|row| row.layer_us).reduce(f64::min)?;
            let auto = cell.rows.iter().find(|row| row.schedule == Schedule::Auto.to_string())?;
            Some((auto.layer_us / best - 1.0) * 100.0)
        };
        let regrets: Vec<f64> = self.cells.iter().filter_map(behind).collect();
        let mut text = String::new();
        if let Some((median, most)) = quantile(errors(), 0.5).zip(quantile(errors(), 0.9)) {
            let count = errors().count();
            text += &format!(
                "predictions of {count} layers are off by {median:.1} % at the median, {most:.1} % at the 90th percentile\n"
            );
        }
        if let Some(most) = regrets.iter().copied().reduce(f64::max) {
            let mean = regrets.iter().sum::<f64>() / regrets.len() as f64;
            text += &format!(
                "auto is behind the best schedule of its cell by {mean:.1} % on average, {most:.1} % at most\n"
            );
        }
        text
    }
}

fn line(cells: [&str; 13]) -> String {
    let [schedule, layer, predicted, ratio, efficiency, rest @ ..] = cells;
    let [compute, experts, transfers, exposed, enqueue, late, short, cut] = rest;
    format!(
        "{schedule:<18}{layer:>9}{predicted:>10}{ratio:>7}{efficiency:>11}{compute:>8}{experts:>8}{transfers:>8}{exposed:>8}{enqueue:>8}\
         {late:>8}{short:>6}  {cut}"
    )
}
