//! Which layers to run for a whole cost model, in bounded time.

use crate::samples::delays;
use crate::{Fingerprint, Kept, LayerRig, LayerRun, RigOptions, RigShape, samples};
use epsmoe_base::{Mix, Rank};
use epsmoe_fabric::Link;
use epsmoe_pipeline::PipelineError;
use epsmoe_plan::{
    CostModel, GemmCost, GemmKind, HostCost, LayerHistograms, LinkCost, Piecewise, Routing, RowsCost, Sample,
    ShareCost, SlotMap, StageTable, Workload,
};
use std::time::{Duration, Instant};

/// How much to measure.
#[derive(Clone, Debug)]
pub struct Effort {
    /// What the whole may take. Where it is too short to run every layer once, there is no cost model.
    pub most: Duration,
    /// Widths to run.
    pub shapes: Vec<RigShape>,
    /// Rows per expert to run.
    pub rows: Vec<usize>,
    /// Runs of every layer, at least one, after one to warm up.
    pub repeats: usize,
}

impl Effort {
    /// Everything: under two minutes on two cores.
    pub fn full(most: Duration) -> Self {
        Effort {
            most,
            shapes: vec![
                RigShape::of([512, 256, 32, 4, 512]),
                RigShape::of([512, 1024, 8, 2, 0]),
                RigShape::of([1024, 704, 16, 4, 704]),
                RigShape::of([1536, 384, 16, 2, 0]),
            ],
            rows: vec![1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64, 128, 256, 512, 1024],
            repeats: 8,
        }
    }
}

/// Told how many of how many layers were run.
pub type Progress<'a> = dyn FnMut(usize, usize) + 'a;

/// Why there is no cost model.
#[derive(Debug, thiserror::Error)]
pub enum MeasureError {
    /// A layer could not be run.
    #[error(transparent)]
    Layer(#[from] PipelineError),
    /// Some layers were never run: what they would have told is nowhere else.
    #[error(
        "--max-seconds {} is too short to profile {}: it was enough for {measured} of {layers} layers; about \
         {needed} seconds are left, an estimate by the pace until then: try `--max-seconds {needed}`; {kept}",
        given.as_secs_f64(),
        epsmoe_base::count(*ranks, "rank")
    )]
    TooShort {
        /// What the whole could take.
        given: Duration,
        /// Ranks of the profile.
        ranks: usize,
        /// Layers with a run.
        measured: usize,
        /// All layers.
        layers: usize,
        /// Seconds that should do.
        needed: u64,
        /// What became of the runs.
        kept: String,
    },
}

/// A layer to run, and its runs.
struct Experiment {
    shape: RigShape,
    map: SlotMap,
    routings: Vec<Routing>,
    counts: LayerHistograms,
    table: StageTable,
    runs: Vec<LayerRun>,
    /// Whether it has run in this process before.
    warm: bool,
}

/// The cost model of this machine, for ranks like those of `options`, at memory speed.
///
/// Where the ranks have more threads than the machine has cores, nobody can tell from a span how long its work had a
/// core. What compute lanes cost then comes from as many ranks of the same threads as have cores of their own, and only
/// the rest from all of them.
///
/// Begins with the runs that are kept from before. Where the time is too short for at least one of every layer, all there
/// are by then are kept, and the next attempt goes on from them.
pub fn measure(
    fingerprint: &Fingerprint,
    options: &RigOptions,
    effort: &Effort,
    kept: &mut Kept,
    progress: &mut Progress<'_>,
) -> Result<CostModel, MeasureError> {
    let options = RigOptions { link: None, ..options.clone() };
    let roomy = match fingerprint.cores / options.threads.max(1) {
        0 => options.ranks,
        ranks => ranks.min(options.ranks),
    };
    let mut worlds = vec![options.clone()];
    if roomy < options.ranks {
        worlds.push(RigOptions { ranks: roomy, ..options.clone() });
    }
    // A fifth is left for layers over links.
    let most = effort.most * 4 / 5 / worlds.len() as u32;
    let mut measured = Vec::new();
    for (number, world) in worlds.iter().enumerate() {
        let mut part = |done: usize, of: usize| progress(number * of + done, worlds.len() * of);
        let (experiments, pace) = run_all(world, effort, most, kept, &mut part)?;
        let with_runs = experiments.iter().filter(|experiment| !experiment.runs.is_empty()).count();
        let layers = experiments.len();
        measured.push((world, experiments));
        if with_runs < layers {
            for (world, experiments) in measured {
                for (number, experiment) in experiments.into_iter().enumerate() {
                    kept.put(world.ranks, number, experiment.runs);
                }
            }
            let kept = match kept.store() {
                Ok(path) => {
                    format!("what was measured is kept in {}, and goes on from there", path.display())
                }
                Err(error) => format!("what was measured could not be kept: {error}"),
            };
            return Err(MeasureError::TooShort {
                kept,
                given: effort.most,
                ranks: options.ranks,
                measured: with_runs,
                layers,
                needed: seconds_needed(pace.two_passes(), worlds.len()),
            });
        }
    }
    let late = paced(fingerprint, &options, effort)?;
    kept.remove();
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

/// Seconds for the whole in which each of so many worlds has time for its two passes, in round tens: nobody knows it
/// better than that. It does not count on the fifth that these passes get beyond their share, should they take longer.
fn seconds_needed(two_passes: Duration, worlds: usize) -> u64 {
    let whole = two_passes * worlds as u32 * 5 / 4;
    whole.as_secs() / 10 * 10 + 10
}

/// How fast a world went through its layers.
struct Pace {
    /// Until the first of them began.
    start: Duration,
    /// For those that ran.
    running: Duration,
    /// Their work.
    ran: usize,
    /// The work of one pass over all of them.
    pass: usize,
}

impl Pace {
    /// About how long the passes to warm up and to have a run of every layer take, where they were not finished.
    fn two_passes(&self) -> Duration {
        let left = (2 * self.pass).saturating_sub(self.ran);
        self.start + self.running.mul_f64(1.0 + left as f64 / self.ran.max(1) as f64)
    }
}

/// All layers of these ranks with their runs. None begins after `most`, or a fifth later in the first two passes; but
/// the first one always does, so that there is a pace, and something more to keep each time.
fn run_all(
    options: &RigOptions,
    effort: &Effort,
    most: Duration,
    kept: &mut Kept,
    progress: &mut Progress<'_>,
) -> Result<(Vec<Experiment>, Pace), PipelineError> {
    let begun = Instant::now();
    let mut experiments = Vec::new();
    for &shape in &effort.shapes {
        experiments.extend(of_shape(shape, options, effort)?);
    }
    let mut rigs = Vec::new();
    for &shape in &effort.shapes {
        let here = experiments.iter().filter(|experiment| experiment.shape == shape);
        let loads: Vec<_> = here.map(|experiment| experiment.routings.clone()).collect();
        rigs.push((shape, LayerRig::start(shape, &loads, options)?));
    }
    // Ranks load weights before their first layer: no part of any pace.
    for (shape, rig) in &mut rigs {
        if let Some(first) = experiments.iter().find(|experiment| experiment.shape == *shape) {
            rig.run(&first.routings, &first.table)?;
        }
    }
    for (number, experiment) in experiments.iter_mut().enumerate() {
        experiment.runs = kept.take(options.ranks, number);
    }
    let without_runs = experiments.iter().filter(|experiment| experiment.runs.is_empty());
    let pass = without_runs.map(Experiment::work).sum();
    let total = experiments.len() * effort.repeats;
    let (start, mut ran) = (begun.elapsed(), 0);
    // Pass after pass over all of them: what disturbs the machine for a while disturbs a few runs of each.
    for pass in 0..effort.repeats {
        for (number, experiment) in experiments.iter_mut().enumerate() {
            let most = if pass > 0 { most } else { most * 6 / 5 };
            if experiment.runs.len() > pass {
                continue;
            }
            if begun.elapsed() > most && ran > 0 {
                break;
            }
            let Some((_, rig)) = rigs.iter_mut().find(|rig| rig.0 == experiment.shape) else { continue };
            if !experiment.warm {
                rig.run(&experiment.routings, &experiment.table)?;
                ran += experiment.work();
                experiment.warm = true;
            }
            experiment.runs.push(rig.run(&experiment.routings, &experiment.table)?);
            ran += experiment.work();
            progress(pass * (total / effort.repeats) + number + 1, total);
        }
    }
    Ok((experiments, Pace { start, running: begun.elapsed() - start, ran, pass }))
}

impl Experiment {
    /// How much there is to do, against other layers: weights are read once and multiplied with every row.
    fn work(&self) -> usize {
        // About as many rows as make reading a weight take as long as multiplying it.
        const READ: usize = 24;
        let RigShape { hidden, inner, experts, top_k, shared_inner } = self.shape;
        let tokens: usize = self.routings.iter().map(Routing::tokens).sum();
        hidden * (inner * (experts * READ + tokens * top_k) + shared_inner * (READ + tokens))
    }

    fn samples(&self, options: &RigOptions, cost: &CostModel) -> Vec<Sample> {
        let shape = self.shape.layer(&self.map, options.dtype);
        let workload = Workload { map: &self.map, counts: &self.counts, shape: &shape };
        self.runs.iter().flat_map(|run| samples(run, &self.table, &workload, cost)).collect()
    }
}

fn of_shape(
    shape: RigShape,
    options: &RigOptions,
    effort: &Effort,
) -> Result<Vec<Experiment>, PipelineError> {
    let map = SlotMap::contiguous(shape.experts, options.ranks)?;
    let mut experiments = Vec::new();
    for &rows in &effort.rows {
        let tokens = rows * shape.experts / (shape.top_k * options.ranks);
        if !(1..=2048).contains(&tokens) {
            continue;
        }
        let routings: Vec<Routing> =
            map.all_ranks().map(|rank| even(shape, rank, tokens)).collect::<Result<_, _>>()?;
        let counts = LayerHistograms::of_routings(&map, shape.top_k, &routings)?;
        let stages = map.max_local();
        let tables = [
            StageTable::serial(&map, GemmKind::Grouped),
            StageTable::equal(&map, stages.min(4), GemmKind::Grouped)?,
            StageTable::serial(&map, GemmKind::Dense),
            StageTable::equal(&map, stages.min(2), GemmKind::Dense)?,
        ];
        experiments.extend(tables.map(|table| Experiment {
            shape,
            map: map.clone(),
            routings: routings.clone(),
            counts: counts.clone(),
            table,
            runs: Vec::new(),
            warm: false,
        }));
    }
    Ok(experiments)
}

/// Tokens that visit all experts equally often.
fn even(shape: RigShape, rank: Rank, tokens: usize) -> Result<Routing, PipelineError> {
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
    options: &RigOptions,
    effort: &Effort,
) -> Result<Vec<Sample>, PipelineError> {
    let cost = blank(fingerprint, options);
    let mut samples = Vec::new();
    for &shape in effort.shapes.iter().take(if options.ranks > 1 { 2 } else { 0 }) {
        let map = SlotMap::contiguous(shape.experts, options.ranks)?;
        let routings: Vec<Routing> =
            map.all_ranks().map(|rank| even(shape, rank, 128)).collect::<Result<_, _>>()?;
        let counts = LayerHistograms::of_routings(&map, shape.top_k, &routings)?;
        let table = StageTable::equal(&map, 8.min(map.max_local()), GemmKind::Grouped)?;
        let sizes = shape.layer(&map, options.dtype);
        let workload = Workload { map: &map, counts: &counts, shape: &sizes };
        for megabytes in [50, 200, 1000] {
            let link = Link { bytes_per_second: megabytes * 1_000_000, latency: Duration::from_micros(200) };
            let options = RigOptions { link: Some(link), ..options.clone() };
            let mut rig = LayerRig::start(shape, std::slice::from_ref(&routings), &options)?;
            for repeat in 0..=2 * effort.repeats {
                let run = rig.run(&routings, &table)?;
                if repeat > 0 {
                    samples.extend(delays(&run, &table, &workload, &cost, link));
                }
            }
        }
    }
    Ok(samples)
}

/// A model in which nothing was measured yet.
fn blank(fingerprint: &Fingerprint, options: &RigOptions) -> CostModel {
    let gemm = GemmCost {
        flops_per_second: 1_000_000_000,
        rows: Piecewise::flat(1000),
        depth: Piecewise::flat(1000),
        weight_bytes_per_second: 1_000_000_000,
        op_ns: 0,
        least_columns: 0,
        tiles: None,
    };
    let free = Piecewise::default;
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
        rows: RowsCost::default(),
        host: HostCost::default(),
        shares: vec![ShareCost::FREE],
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use epsmoe_base::DType;
    use epsmoe_device::cpu::gemm::Isa;
    use std::sync::Arc;

    /// What was never run has no price, so there is no profile; but each attempt goes on from the one before.
    #[test]
    fn too_short_a_time_is_refused_until_it_adds_up() {
        let fingerprint = Fingerprint::of_cpu(2, 1, Isa::Scalar, DType::F32);
        let options = RigOptions {
            ranks: 2,
            threads: 1,
            isa: Isa::Scalar,
            dtype: DType::F32,
            link: None,
            timeout: Duration::from_secs(30),
            weights: Arc::default(),
        };
        let shape = RigShape { hidden: 64, inner: 64, experts: 4, top_k: 2, shared_inner: 64 };
        let effort =
            Effort { most: Duration::from_millis(1), shapes: vec![shape], rows: vec![1, 8], repeats: 1 };
        let folder = tempfile::tempdir().unwrap();
        let profile = folder.path().join("new/profile.toml");
        let attempt = |layers| {
            let mut kept = Kept::beside(&profile, &fingerprint, layers);
            measure(&fingerprint, &options, &effort, &mut kept, &mut |_, _| {})
        };
        let refused = |layers, measured: usize| {
            let refused = attempt(layers).unwrap_err().to_string();
            let of_all = format!("{measured} of 8 layers");
            let words = ["--max-seconds 0.001 is too short", "2 ranks", &of_all, "try `--max-seconds 10`"];
            for words in words.into_iter().chain(["is kept in", "new/profile.runs"]) {
                assert!(refused.contains(words), "{words} in: {refused}");
            }
        };
        (1..=3).for_each(|measured| refused("these layers", measured));
        // Runs of other layers are none.
        (1..=7).for_each(|measured| refused("others", measured));
        let cost = attempt("others").unwrap();
        assert!(cost.grouped.flops_per_second != 1_000_000_000, "nothing was measured");
        assert!(!folder.path().join("new/profile.runs").exists());
    }

    #[test]
    fn what_did_not_run_is_estimated_by_its_work() {
        let pace =
            |ran| Pace { start: Duration::from_secs(1), running: Duration::from_secs(6), ran, pass: 100 };
        // A quarter of a pass in 6 s are 48 s for two; one pass and a half are 8 s.
        let whole = [25, 150].map(|ran| pace(ran).two_passes().as_millis());
        assert_eq!(whole, [49_000, 9_000]);
        // Two worlds, each with four fifths of its half.
        let seconds = |two_passes| seconds_needed(Duration::from_secs(two_passes), 2);
        assert_eq!([seconds(3), seconds(49)], [10, 130]);
    }
}
