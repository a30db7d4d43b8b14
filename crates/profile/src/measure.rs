//! Which layers to run for a whole cost model, in bounded time.

use crate::samples::delays;
use crate::{Fingerprint, Lab, LabOptions, LabShape, LayerRun, samples};
use epsmoe_base::{Mix, Rank};
use epsmoe_fabric::Link;
use epsmoe_pipeline::PipelineError;
use epsmoe_plan::{
    CostModel, Curve, GemmCost, GemmKind, HostCost, LayerCounts, LinkCost, Placement, RankCounts, Routing,
    RowsCost, Sample, ShareCost, StageTable, Workload,
};
use std::time::{Duration, Instant};

/// How much to measure.
#[derive(Clone, Debug)]
pub struct Effort {
    /// No new layer begins after this, or a fifth later in the first two passes over all of them.
    pub most: Duration,
    /// Widths to run.
    pub shapes: Vec<LabShape>,
    /// Rows per expert to run.
    pub rows: Vec<usize>,
    /// Runs of every layer, after one to warm up.
    pub repeats: usize,
}

impl Effort {
    /// Everything: under two minutes on two cores.
    pub fn full(most: Duration) -> Self {
        let shape = |hidden, inner, experts, top_k, shared_inner| LabShape {
            hidden,
            inner,
            experts,
            top_k,
            shared_inner,
        };
        Effort {
            most,
            shapes: vec![
                shape(512, 256, 32, 4, 512),
                shape(512, 1024, 8, 2, 0),
                shape(1024, 704, 16, 4, 704),
                shape(1536, 384, 16, 2, 0),
            ],
            rows: vec![1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64, 128, 256, 512, 1024],
            repeats: 8,
        }
    }
}

/// Told how many of how many layers were run.
pub type Progress<'a> = dyn FnMut(usize, usize) + 'a;

/// A layer to run, and its runs.
struct Experiment {
    shape: LabShape,
    placement: Placement,
    routings: Vec<Routing>,
    counts: LayerCounts,
    table: StageTable,
    runs: Vec<LayerRun>,
}

/// The cost model of this machine, for ranks like those of `options`, at memory speed.
///
/// Where the ranks have more threads than the machine has cores, nobody can tell from a span how long its work had a
/// core. What compute lanes cost then comes from as many ranks of the same threads as have cores of their own, and only
/// the rest from all of them.
pub fn measure(
    fingerprint: &Fingerprint,
    options: &LabOptions,
    effort: &Effort,
    progress: &mut Progress<'_>,
) -> Result<CostModel, PipelineError> {
    let options = LabOptions { link: None, ..options.clone() };
    let roomy = match fingerprint.cores / options.threads.max(1) {
        0 => options.ranks,
        ranks => ranks.min(options.ranks),
    };
    let mut worlds = vec![options.clone()];
    if roomy < options.ranks {
        worlds.push(LabOptions { ranks: roomy, ..options.clone() });
    }
    let most = effort.most / worlds.len() as u32;
    let mut measured = Vec::new();
    for (number, world) in worlds.iter().enumerate() {
        let mut part = |done: usize, of: usize| progress(number * of + done, worlds.len() * of);
        measured.push((world, run_all(world, effort, most, &mut part)?));
    }
    let late = paced(fingerprint, &options, effort)?;
    let mut cost = blank(fingerprint, &options);
    // What a lane needs to wake up is known after the first look, and then belongs to nothing else.
    for _ in 0..2 {
        let mut all = late.clone();
        for (world, experiments) in &measured {
            let wanted = |sample: &Sample| {
                world.ranks == if sample.work.is_computed() { roomy } else { options.ranks }
            };
            let found = experiments.iter().flat_map(|experiment| experiment.samples(world, &cost));
            all.extend(found.filter(wanted));
        }
        cost = cost.fitted(&all);
    }
    Ok(cost)
}

/// All layers of these ranks with their runs. None begins after `most`, or a fifth later in the first two passes.
fn run_all(
    options: &LabOptions,
    effort: &Effort,
    most: Duration,
    progress: &mut Progress<'_>,
) -> Result<Vec<Experiment>, PipelineError> {
    let begun = Instant::now();
    let mut experiments = Vec::new();
    for &shape in &effort.shapes {
        experiments.extend(of_shape(shape, options, effort)?);
    }
    let mut labs = Vec::new();
    for &shape in &effort.shapes {
        let here = experiments.iter().filter(|experiment| experiment.shape == shape);
        let loads: Vec<_> = here.map(|experiment| experiment.routings.clone()).collect();
        labs.push((shape, Lab::start(shape, &loads, options)?));
    }
    let total = experiments.len() * (effort.repeats + 1);
    // Pass after pass over all of them: what disturbs the machine for a while disturbs a few runs of each.
    for pass in 0..=effort.repeats {
        for (number, experiment) in experiments.iter_mut().enumerate() {
            let most = if pass > 1 { most } else { most * 6 / 5 };
            if begun.elapsed() > most {
                break;
            }
            let Some((_, lab)) = labs.iter_mut().find(|lab| lab.0 == experiment.shape) else { continue };
            let run = lab.run(&experiment.routings, &experiment.table)?;
            if pass > 0 {
                experiment.runs.push(run);
            }
            progress(pass * (total / (effort.repeats + 1)) + number + 1, total);
        }
    }
    Ok(experiments)
}

impl Experiment {
    fn samples(&self, options: &LabOptions, cost: &CostModel) -> Vec<Sample> {
        let shape = self.shape.layer(&self.placement, options.dtype);
        let workload = Workload { placement: &self.placement, counts: &self.counts, shape: &shape };
        self.runs.iter().flat_map(|run| samples(run, &self.table, &workload, cost)).collect()
    }
}

fn of_shape(
    shape: LabShape,
    options: &LabOptions,
    effort: &Effort,
) -> Result<Vec<Experiment>, PipelineError> {
    let placement = Placement::new(shape.experts, options.ranks)?;
    let mut experiments = Vec::new();
    for &rows in &effort.rows {
        let tokens = rows * shape.experts / (shape.top_k * options.ranks);
        if !(1..=2048).contains(&tokens) {
            continue;
        }
        let routings: Vec<Routing> =
            placement.all_ranks().map(|rank| even(shape, rank, tokens)).collect::<Result<_, _>>()?;
        let counts = routings.iter().map(|routing| RankCounts::of(&placement, routing)).collect();
        let counts = LayerCounts::new(&placement, shape.top_k, counts)?;
        let stages = placement.max_local();
        let tables = [
            StageTable::serial(&placement, GemmKind::Grouped),
            StageTable::equal(&placement, stages.min(4), GemmKind::Grouped)?,
            StageTable::serial(&placement, GemmKind::Dense),
            StageTable::equal(&placement, stages.min(2), GemmKind::Dense)?,
        ];
        experiments.extend(tables.map(|table| Experiment {
            shape,
            placement,
            routings: routings.clone(),
            counts: counts.clone(),
            table,
            runs: Vec::new(),
        }));
    }
    Ok(experiments)
}

/// Tokens that visit all experts equally often.
fn even(shape: LabShape, rank: Rank, tokens: usize) -> Result<Routing, PipelineError> {
    let (experts, top_k) = (shape.experts, shape.top_k);
    // A stride that no expert meets twice in a token.
    let stride = experts / top_k;
    let expert = |token: usize, choice: usize| (token + rank.0 + choice * stride) % experts;
    // In no order that memory could foresee, as in a model.
    let (mut order, mut mix): (Vec<usize>, _) = ((0..tokens).collect(), Mix::keyed(0, &[rank.0 as u64]));
    (1..tokens).for_each(|token| order.swap(token, mix.below(token + 1)));
    let ids = order.into_iter().flat_map(|token| (0..top_k).map(move |choice| expert(token, choice) as u32));
    Ok(Routing::new(experts, top_k, ids.collect(), vec![1.0 / top_k as f32; tokens * top_k])?)
}

/// How late lanes go on beside computation, and beside none: layers whose rows a link carries, in as many stages as
/// there can be.
fn paced(
    fingerprint: &Fingerprint,
    options: &LabOptions,
    effort: &Effort,
) -> Result<Vec<Sample>, PipelineError> {
    let cost = blank(fingerprint, options);
    let mut samples = Vec::new();
    for &shape in effort.shapes.iter().take(if options.ranks > 1 { 2 } else { 0 }) {
        let placement = Placement::new(shape.experts, options.ranks)?;
        let routings: Vec<Routing> =
            placement.all_ranks().map(|rank| even(shape, rank, 128)).collect::<Result<_, _>>()?;
        let counts = routings.iter().map(|routing| RankCounts::of(&placement, routing)).collect();
        let counts = LayerCounts::new(&placement, shape.top_k, counts)?;
        let table = StageTable::equal(&placement, 8.min(placement.max_local()), GemmKind::Grouped)?;
        let sizes = shape.layer(&placement, options.dtype);
        let workload = Workload { placement: &placement, counts: &counts, shape: &sizes };
        for megabytes in [50, 200, 1000] {
            let link = Link { bytes_per_second: megabytes * 1_000_000, latency: Duration::from_micros(200) };
            let options = LabOptions { link: Some(link), ..options.clone() };
            let mut lab = Lab::start(shape, std::slice::from_ref(&routings), &options)?;
            for repeat in 0..=2 * effort.repeats {
                let run = lab.run(&routings, &table)?;
                if repeat > 0 {
                    samples.extend(delays(&run, &table, &workload, &cost, link));
                }
            }
        }
    }
    Ok(samples)
}

/// A model in which nothing was measured yet.
fn blank(fingerprint: &Fingerprint, options: &LabOptions) -> CostModel {
    let gemm = GemmCost {
        flops_per_second: 1_000_000_000,
        rows: Curve::flat(1000),
        depth: Curve::flat(1000),
        weight_bytes_per_second: 1_000_000_000,
        op_ns: 0,
        least_columns: 0,
    };
    let free = Curve::default;
    CostModel {
        version: CostModel::VERSION,
        machine: fingerprint.machine(),
        kernels: fingerprint.kernels(),
        dtype: options.dtype,
        concurrent: fingerprint.cores as u32,
        lane_threads: options.threads as u32,
        grouped: gemm.clone(),
        dense: gemm,
        link: LinkCost { exchange_ns: 0, node_ranks: 0, near: free(), far: free(), copy: free() },
        rows: RowsCost { gather: free(), reduce: free(), upload: free(), route: free() },
        host: HostCost::default(),
        shares: vec![ShareCost::FREE],
    }
}
