//! A cost model of a GPU: layers of one rank of several, the others emulated, in a few shapes and sizes.

use crate::emulated_layer::{EmulatedLayers, EmulatedSchedule, EmulatedShape};
use crate::samples::{calls, delays};
use crate::{LayerRun, RigShape, samples};
use epsmoe_base::{FaultCell, Lane, Rank, WireDType};
use epsmoe_device::{Backend, PeerQueue};
use epsmoe_fabric::Link;
use epsmoe_pipeline::PipelineError;
use epsmoe_plan::{
    CostModel, GemmKind, LayerHistograms, LayerSizes, Policy, Sample, ShareCost, Span, StageTable, Work,
    Workload, planned,
};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How much to measure of a GPU.
#[derive(Clone, Debug)]
pub struct EmulatedEffort {
    /// No layer is run again after so long; each is run once in any case.
    pub most: Duration,
    /// Widths to run.
    pub shapes: Vec<RigShape>,
    /// Tokens of a rank to run.
    pub tokens: Vec<usize>,
    /// Runs of every layer, after one to warm up.
    pub repeats: usize,
    /// The link that computation is measured beside.
    pub link: Link,
}

impl EmulatedEffort {
    /// Experts of DeepSeek-V2 and V3, Qwen3-30B-A3B and Mixtral, for prompts: about a minute.
    pub fn full(most: Duration) -> Self {
        EmulatedEffort {
            most,
            shapes: vec![
                RigShape::of([5120, 1536, 160, 6, 3072]),
                RigShape::of([7168, 2048, 256, 8, 2048]),
                RigShape::of([2048, 768, 128, 8, 0]),
                RigShape::of([4096, 14336, 8, 2, 0]),
            ],
            tokens: vec![256, 1024, 2048, 8192],
            repeats: 4,
            link: Link { bytes_per_second: 155_000_000_000, latency: Duration::ZERO },
        }
    }
}

/// What work costs on the processors that `processor` makes, as the first of `size` ranks; `start` says what is not
/// measured. Tells `progress` how many of how many layers were run.
pub fn measure_emulated<B: Backend<Queue: PeerQueue>>(
    processor: impl Fn(&FaultCell, Instant) -> Result<B, PipelineError>,
    start: &CostModel,
    size: usize,
    effort: &EmulatedEffort,
    progress: &mut dyn FnMut(usize, usize),
) -> Result<CostModel, PipelineError> {
    let begun = Instant::now();
    let total = effort.shapes.len() * effort.tokens.len();
    let mut layers = Vec::new();
    for &shape in &effort.shapes {
        let (faults, epoch) = (FaultCell::default(), Instant::now());
        let device = Arc::new(processor(&faults, epoch)?);
        for &tokens in &effort.tokens {
            let timeout = Duration::from_secs(60);
            let (router, rank, wire) = (shape.plain_router(), Rank(0), WireDType::Auto);
            let what = EmulatedShape { shape, router, rank, size, tokens, wire, timeout, epoch };
            let emulated = EmulatedLayers::new(what, Arc::clone(&device))?;
            let may_repeat = || begun.elapsed() < effort.most;
            layers.push(Measured::of(&emulated, effort, &faults, may_repeat)?);
            progress(layers.len(), total);
        }
    }
    let shares = vec![ShareCost::FREE];
    let mut cost = CostModel { shares, ..start.clone() };
    // What a lane needs to wake up is known after the first look, and then belongs to nothing else.
    for _ in 0..2 {
        let all: Vec<Sample> = layers.iter().flat_map(|layer| layer.samples(&cost, effort.link)).collect();
        cost = cost.fitted(&all);
    }
    Ok(cost)
}

/// The runs of a layer by some tables: over no link, and over a link.
struct Measured {
    map: epsmoe_plan::SlotMap,
    counts: LayerHistograms,
    sizes: LayerSizes,
    tables: Vec<MeasuredTable>,
}

struct MeasuredTable {
    table: StageTable,
    /// Recorded, over no link and over one.
    runs: [Vec<LayerRun>; 2],
    /// What the host took to hand over the last of some layers that nothing recorded: recording doubles its calls.
    enqueued_ns: Vec<u64>,
}

impl Measured {
    fn of<B: Backend<Queue: PeerQueue>>(
        layers: &EmulatedLayers<B>,
        effort: &EmulatedEffort,
        faults: &FaultCell,
        may_repeat: impl Fn() -> bool,
    ) -> Result<Self, PipelineError> {
        let map = (**layers.slot_map()).clone();
        let most = map.max_local();
        let mut tables =
            vec![StageTable::serial(&map, GemmKind::Grouped), StageTable::serial(&map, GemmKind::Dense)];
        for stages in [4, 16].into_iter().filter(|&stages| stages <= most) {
            tables.push(StageTable::equal(&map, stages, GemmKind::Grouped)?);
        }
        let mut measured = Measured {
            counts: layers.counts()?,
            sizes: layers.sizes(),
            map,
            tables: tables
                .into_iter()
                .map(|table| MeasuredTable { table, runs: Default::default(), enqueued_ns: Vec::new() })
                .collect(),
        };
        for (number, link) in [None, Some(effort.link)].into_iter().enumerate() {
            let schedule = layers.schedule(Policy::default(), &layers.fabric(link, faults))?;
            for MeasuredTable { table, runs, enqueued_ns } in &mut measured.tables {
                run(&schedule, table)?;
                for repeat in 0..effort.repeats {
                    if repeat == 0 || may_repeat() {
                        runs[number].push(run(&schedule, table)?);
                        let host = schedule.run(LAYERS, Some(table), false)?.host;
                        enqueued_ns.push(host.enqueued.saturating_sub(host.planned));
                    }
                }
            }
        }
        Ok(measured)
    }

    fn samples(&self, cost: &CostModel, link: Link) -> Vec<Sample> {
        let workload = Workload { map: &self.map, counts: &self.counts, shape: &self.sizes };
        let of_table = |MeasuredTable { table, runs: [alone, paced], enqueued_ns }: &MeasuredTable| {
            let computed = alone.iter().flat_map(|run| samples(run, table, &workload, cost));
            let computed = computed.filter(|sample| !matches!(sample.work, Work::Enqueue(_)));
            let calls = calls(&planned(table, &workload, cost), Rank(0));
            let handed = enqueued_ns.iter().map(|&ns| Sample { work: Work::Enqueue(calls), ns });
            // The curve begins where nothing is handed over.
            let handed = handed.chain([Sample { work: Work::Enqueue(0), ns: 0 }]);
            let late = paced.iter().flat_map(|run| delays(run, table, &workload, cost, link));
            let late = late.filter(|sample| sample.work == Work::Sleep);
            computed.chain(handed).chain(late).chain(beside(alone, paced)).collect::<Vec<_>>()
        };
        self.tables.iter().flat_map(of_table).collect()
    }
}

/// Layers that follow each other where the host's time is measured.
const LAYERS: usize = 3;

/// One layer by a table, recorded.
fn run<B: Backend>(
    schedule: &EmulatedSchedule<'_, B>,
    table: &StageTable,
) -> Result<LayerRun, PipelineError> {
    let round = schedule.run(1, Some(table), true)?;
    let extent = round.timeline.extent();
    Ok(LayerRun {
        // The one rank that is there is the first.
        hosts: [round.host].into_iter().chain((1..table.cuts.len()).map(|_| Default::default())).collect(),
        layer_ns: extent.map_or(0, |extent| extent.end - extent.start),
        timeline: round.timeline,
        weights: 0,
        bits: 0,
    })
}

/// What products took while rows travelled, against what they take while none do.
fn beside(alone: &[LayerRun], paced: &[LayerRun]) -> Vec<Sample> {
    let products = |run: &LayerRun| -> Vec<Span> {
        let spans = run.timeline.spans.iter();
        spans.filter(|span| span.name == "gemm" && span.stage.is_some()).cloned().collect()
    };
    // By their place among the products of a run.
    let mut free: BTreeMap<usize, Vec<u64>> = BTreeMap::new();
    for run in alone {
        for (number, span) in products(run).iter().enumerate() {
            free.entry(number).or_default().push(span.duration_ns());
        }
    }
    let mut found = Vec::new();
    for run in paced {
        let transfers = run.timeline.spans.iter().filter(|span| span.lane == Lane::Transfer);
        let transfers: Vec<&Span> = transfers.collect();
        for (number, span) in products(run).iter().enumerate() {
            let overlap = |other: &&Span| {
                other.end_ns.min(span.end_ns).saturating_sub(other.start_ns.max(span.start_ns))
            };
            let covered: u64 = transfers.iter().map(overlap).sum();
            let Some(times) = free.get_mut(&number) else { continue };
            times.sort_unstable();
            let alone_ns = times[times.len() / 2];
            // Short ones say more about the clock.
            if 10 * covered >= 9 * span.duration_ns() && alone_ns > 50_000 {
                let work = Work::ComputeBeside { share: 0, alone_ns };
                found.push(Sample { work, ns: span.duration_ns() });
            }
        }
    }
    found
}
