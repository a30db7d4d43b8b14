//! How well a cost model predicts layers that it never saw, and how good the plans are that follow from it.

use crate::{Lab, LabOptions, LabShape, LayerRun, with_link};
use epsmoe_base::{Mix, Rank};
use epsmoe_fabric::Link;
use epsmoe_pipeline::PipelineError;
use epsmoe_plan::{
    CostModel, GemmKind, LayerCounts, Placement, RankCounts, Routing, RoutingLaw, SearchOptions,
    SharedExpert, StageTable, Timeline, Workload, search, sensible_orders, simulate,
};
use serde::Serialize;
use std::time::Duration;

/// One layer to run: sizes, tokens, skew, link and table.
#[derive(Clone, Debug)]
pub struct Cell {
    /// In words.
    pub what: String,
    /// Widths.
    pub shape: LabShape,
    /// Ranks R.
    pub ranks: usize,
    /// The link; as fast as memory when absent.
    pub link: Option<Link>,
    /// `[R]` where tokens go.
    pub routings: Vec<Routing>,
    /// The table to run it by.
    pub table: StageTable,
}

/// Shapes of layers: those of small presets, and published ones with fewer or narrower experts.
const SHAPES: [(&str, [usize; 5]); 6] = [
    ("deepseek-v2-mini", [512, 256, 32, 6, 512]),
    ("mixtral-mini", [512, 1024, 8, 2, 0]),
    ("qwen3-moe-mini", [512, 256, 32, 4, 0]),
    ("deepseek2-mini, 16 experts", [1024, 704, 16, 6, 1408]),
    ("qwen3-30b-a3b, 16 experts", [2048, 768, 16, 4, 0]),
    ("olmoe-1b-7b, 16 experts", [2048, 1024, 16, 4, 0]),
];

/// `number` cells, which follow from the seed.
pub fn cells(seed: u64, number: usize) -> Result<Vec<Cell>, PipelineError> {
    (0..number).map(|index| cell(&mut Mix::keyed(seed, &[index as u64]))).collect()
}

fn cell(mix: &mut Mix) -> Result<Cell, PipelineError> {
    let (name, [hidden, inner, experts, top_k, shared_inner]) = SHAPES[mix.below(SHAPES.len())];
    let shape = LabShape { hidden, inner, experts, top_k, shared_inner };
    let ranks = [1, 2, 2, 4][mix.below(4)];
    let placement = Placement::new(experts, ranks)?;
    let most = if hidden > 1024 { 512 } else { 2048 / ranks.max(2) * 2 };
    let size = (16 << mix.below((most / 16).ilog2() as usize + 1)).min(most);
    let tokens: Vec<usize> = (0..ranks).map(|_| (size / 2 + mix.below(size / 2 + 1)).max(16)).collect();
    let skew = mix.below(4);
    let law =
        RoutingLaw { top_k, groups: None, zipf_permille: [0, 800, 1200, 0][skew], seed: mix.next_u64() };
    let mut routings: Vec<Routing> = placement
        .all_ranks()
        .zip(&tokens)
        .map(|(rank, &tokens)| law.routing(&placement, rank, tokens))
        .collect::<Result<_, _>>()?;
    if skew == 3 {
        let hot = mix.below(experts) as u32;
        routings = routings.iter().map(|routing| heated(routing, experts, hot)).collect::<Result<_, _>>()?;
    }
    let link = [None, Some((10_000, 20)), Some((1_000, 50)), Some((100, 200)), Some((20, 1000))]
        [mix.below(5)]
    .filter(|_| ranks > 1)
    .map(|(megabytes, microseconds)| Link {
        bytes_per_second: megabytes * 1_000_000,
        latency: Duration::from_micros(microseconds),
    });
    let stages = (1 << mix.below(4)).min(placement.max_local());
    let kind = [GemmKind::Grouped, GemmKind::Dense][mix.below(2)];
    let counts = counts(&placement, top_k, &routings)?;
    let mut table = match mix.below(2) {
        0 => StageTable::equal(&placement, stages, kind)?,
        _ => StageTable::balanced(&placement, &counts, stages, kind)?,
    };
    let orders = sensible_orders(stages);
    table.order = orders[mix.below(orders.len())].clone();
    table.shared = [
        SharedExpert::BesideRendezvous,
        SharedExpert::BesideFirstDispatch,
        SharedExpert::BesideLastCombine,
        SharedExpert::Alone,
    ][mix.below(4)];
    let speed = link.map_or("memory speed".into(), |link| link.to_string());
    let skew = ["uniform", "zipf 0.8", "zipf 1.2", "hot expert"][skew];
    let what =
        format!("{name}, {ranks} rank(s) of {tokens:?} tokens, {skew}, {speed}, {stages} stage(s), {kind}");
    Ok(Cell { what, shape, ranks, link, routings, table })
}

/// Every token visits one expert.
fn heated(routing: &Routing, experts: usize, hot: u32) -> Result<Routing, PipelineError> {
    let mut ids = routing.experts().to_vec();
    for token in ids.chunks_exact_mut(routing.top_k()) {
        if !token.contains(&hot) {
            token[0] = hot;
        }
    }
    Ok(Routing::new(experts, routing.top_k(), ids, routing.weights().to_vec())?)
}

fn counts(placement: &Placement, top_k: usize, routings: &[Routing]) -> Result<LayerCounts, PipelineError> {
    let ranks = routings.iter().map(|routing| RankCounts::of(placement, routing)).collect();
    Ok(LayerCounts::new(placement, top_k, ranks)?)
}

/// The busiest rank's time by class, in nanoseconds.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct Parts {
    /// Matrix products.
    pub gemm: u64,
    /// Everything else on compute lanes.
    pub other: u64,
    /// Exchanges, beside no computation.
    pub exposed: u64,
}

impl Parts {
    fn of(timeline: &Timeline, ranks: usize) -> Self {
        let most = |of: &dyn Fn(Rank) -> u64| (0..ranks).map(|rank| of(Rank(rank))).max().unwrap_or(0);
        let gemm = |rank| timeline.totals(rank).get("gemm").copied().unwrap_or(0);
        Parts {
            gemm: most(&gemm),
            other: most(&|rank| timeline.busy(rank, epsmoe_base::Lane::Compute).saturating_sub(gemm(rank))),
            exposed: most(&|rank| timeline.exposed_transfer(rank)),
        }
    }
}

/// A cell, predicted and measured.
#[derive(Clone, Debug, Serialize)]
pub struct Outcome {
    /// The cell in words.
    pub what: String,
    /// Layer time by the model, in nanoseconds.
    pub predicted_ns: u64,
    /// Median of the measured ones.
    pub measured_ns: u64,
    /// Half the distance between the quartiles of the repeats, in permille of the median.
    pub spread: u64,
    /// Where the time went by the model.
    pub predicted: Parts,
    /// Where it went.
    pub measured: Parts,
}

impl Outcome {
    /// How far the prediction is off, in permille of the measured time.
    pub fn error(&self) -> u64 {
        self.predicted_ns.abs_diff(self.measured_ns) * 1000 / self.measured_ns.max(1)
    }

    /// Whether repeats agree to 4 %.
    pub fn is_steady(&self) -> bool {
        self.spread <= 40
    }
}

/// Errors of many cells, in permille.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct Spread {
    /// How many cells.
    pub cells: usize,
    /// The median of them.
    pub median: u64,
    /// The 90th percentile.
    pub p90: u64,
    /// The worst.
    pub worst: u64,
}

impl Spread {
    /// Of these errors.
    pub fn of(errors: impl IntoIterator<Item = u64>) -> Self {
        let mut errors: Vec<u64> = errors.into_iter().collect();
        errors.sort_unstable();
        let at = |permille: usize| errors.get(errors.len() * permille / 1000).or(errors.last()).copied();
        Spread {
            cells: errors.len(),
            median: at(500).unwrap_or(0),
            p90: at(900).unwrap_or(0),
            worst: at(1000).unwrap_or(0),
        }
    }
}

/// Runs a cell `repeats` times, after two to warm up, and predicts it by the model of its ranks at memory speed.
pub fn verify(
    cell: &Cell,
    cost: &CostModel,
    options: &LabOptions,
    repeats: usize,
) -> Result<Outcome, PipelineError> {
    let cost = cell.link.map_or_else(|| cost.clone(), |link| with_link(cost, link));
    let placement = Placement::new(cell.shape.experts, cell.ranks)?;
    let counts = counts(&placement, cell.shape.top_k, &cell.routings)?;
    let shape = cell.shape.layer(&placement, options.dtype);
    let workload = Workload { placement: &placement, counts: &counts, shape: &shape };
    let simulation = simulate(&cell.table, 0, &workload, &cost);
    let mut lab = cell.lab(options)?;
    let mut runs = Vec::new();
    for repeat in 0..repeats.max(1) + 2 {
        let run = lab.run(&cell.routings, &cell.table)?;
        if repeat > 1 {
            runs.push(run);
        }
    }
    runs.sort_by_key(|run: &LayerRun| run.layer_ns);
    let at = |quarter: usize| runs[(runs.len() - 1) * quarter / 4].layer_ns;
    let middle = &runs[runs.len() / 2];
    Ok(Outcome {
        what: cell.what.clone(),
        predicted_ns: simulation.layer_ns,
        measured_ns: middle.layer_ns,
        spread: (at(3) - at(1)) * 500 / middle.layer_ns.max(1),
        predicted: Parts::of(&simulation.timeline, cell.ranks),
        measured: Parts::of(&middle.timeline, cell.ranks),
    })
}

impl Cell {
    fn lab(&self, options: &LabOptions) -> Result<Lab, PipelineError> {
        let options = LabOptions { ranks: self.ranks, link: self.link, ..options.clone() };
        Lab::start(self.shape, std::slice::from_ref(&self.routings), &options)
    }
}

/// How much slower the plan of the search is than the best one found by running many.
#[derive(Clone, Debug, Serialize)]
pub struct Regret {
    /// The cell in words.
    pub what: String,
    /// Median of (the search's plan ÷ the best of the five), pair by pair, in permille.
    pub against_best: u64,
    /// Median of (the search's plan ÷ one stage), likewise.
    pub against_one_stage: u64,
    /// Its 95 % interval, from the order of the pairs.
    pub interval: (u64, u64),
}

/// Runs all plans that a search would consider, then the fastest five in turn with the search's own and one stage.
pub fn regret(
    cell: &Cell,
    cost: &CostModel,
    options: &LabOptions,
    pairs: usize,
) -> Result<Regret, PipelineError> {
    let cost = cell.link.map_or_else(|| cost.clone(), |link| with_link(cost, link));
    let placement = Placement::new(cell.shape.experts, cell.ranks)?;
    let counts = counts(&placement, cell.shape.top_k, &cell.routings)?;
    let shape = cell.shape.layer(&placement, options.dtype);
    let workload = Workload { placement: &placement, counts: &counts, shape: &shape };
    let chosen = search(&workload, &cost, &SearchOptions::default()).table;
    let one = StageTable::serial(&placement, GemmKind::Grouped);
    let mut lab = cell.lab(options)?;
    let mut measured = Vec::new();
    for table in sweep(&placement, &counts)? {
        let mut times = Vec::new();
        for _ in 0..3 {
            times.push(lab.run(&cell.routings, &table)?.layer_ns);
        }
        times.sort_unstable();
        measured.push((times[1], table));
    }
    measured.sort_by_key(|plan| plan.0);
    let tables: Vec<StageTable> =
        [chosen, one].into_iter().chain(measured.into_iter().take(5).map(|plan| plan.1)).collect();
    let mut times: Vec<Vec<u64>> = vec![Vec::new(); tables.len()];
    for _ in 0..pairs.max(1) {
        for (table, times) in tables.iter().zip(&mut times) {
            times.push(lab.run(&cell.routings, table)?.layer_ns);
        }
    }
    let ratios = |other: usize| {
        let pairs = times[0].iter().zip(&times[other]);
        let mut ratios: Vec<u64> = pairs.map(|(auto, other)| auto * 1000 / (*other).max(1)).collect();
        ratios.sort_unstable();
        ratios
    };
    let middle = |ratios: &[u64]| ratios[ratios.len() / 2];
    let against_one = ratios(1);
    let best = (2..tables.len()).map(|other| middle(&ratios(other))).max().unwrap_or(1000);
    // Of n pairs, the median lies between these two with 95 %.
    let half = (0.98 * (pairs as f64).sqrt()) as usize;
    let (low, high) = (pairs / 2 - half.min(pairs / 2), (pairs / 2 + half).min(against_one.len() - 1));
    Ok(Regret {
        what: cell.what.clone(),
        against_best: best,
        against_one_stage: middle(&against_one),
        interval: (against_one[low], against_one[high]),
    })
}

/// 1, 2, 4 and 8 stages, equal and balanced, in all sensible orders, with both kernels.
fn sweep(placement: &Placement, counts: &LayerCounts) -> Result<Vec<StageTable>, PipelineError> {
    let mut tables: Vec<StageTable> = Vec::new();
    for stages in [1, 2, 4, 8].into_iter().filter(|&stages| stages <= placement.max_local()) {
        for kind in [GemmKind::Grouped, GemmKind::Dense] {
            for table in [
                StageTable::equal(placement, stages, kind)?,
                StageTable::balanced(placement, counts, stages, kind)?,
            ] {
                for order in sensible_orders(stages) {
                    let table = StageTable { order, ..table.clone() };
                    if !tables.contains(&table) {
                        tables.push(table);
                    }
                }
            }
        }
    }
    Ok(tables)
}
