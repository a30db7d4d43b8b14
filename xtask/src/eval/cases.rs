//! Layers that no profile was fitted to: drawn by a seed.

use epsmoe_base::{DType, Mix};
use epsmoe_fabric::Link;
use epsmoe_pipeline::PipelineError;
use epsmoe_plan::{
    CostModel, GemmKind, LayerHistograms, LayerSizes, Routing, SharedExpert, SlotMap, StageTable,
    SyntheticRouting, Workload, sensible_orders,
};
use epsmoe_profile::{LayerRig, RigOptions, RigShape, with_link};
use std::collections::BTreeMap;
use std::time::Duration;

/// One layer to run: sizes, tokens, skew, link and table.
#[derive(Clone, Debug)]
pub(super) struct Case {
    /// In words.
    pub(super) what: String,
    /// Widths.
    pub(super) shape: RigShape,
    /// Ranks R.
    pub(super) ranks: usize,
    /// The link; as fast as memory when absent.
    pub(super) link: Option<Link>,
    /// `[R]` where tokens go.
    pub(super) routings: Vec<Routing>,
    /// The table to run it by.
    pub(super) table: StageTable,
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

/// `number` cases, which follow from the seed.
pub(super) fn cases(seed: u64, number: usize) -> Result<Vec<Case>, PipelineError> {
    (0..number).map(|index| case(&mut Mix::keyed(seed, &[index as u64]))).collect()
}

fn case(mix: &mut Mix) -> Result<Case, PipelineError> {
    let (name, [hidden, inner, experts, top_k, shared_inner]) = SHAPES[mix.below(SHAPES.len())];
    let shape = RigShape { hidden, inner, experts, top_k, shared_inner };
    let ranks = [1, 2, 2, 4][mix.below(4)];
    let map = SlotMap::contiguous(experts, ranks)?;
    let most = if hidden > 1024 { 512 } else { 2048 / ranks.max(2) * 2 };
    let size = (16 << mix.below((most / 16).ilog2() as usize + 1)).min(most);
    let tokens: Vec<usize> = (0..ranks).map(|_| (size / 2 + mix.below(size / 2 + 1)).max(16)).collect();
    let skew = mix.below(4);
    let law = SyntheticRouting {
        top_k,
        groups: None,
        zipf_permille: [0, 800, 1200, 0][skew],
        seed: mix.next_u64(),
    };
    let mut routings: Vec<Routing> = map
        .all_ranks()
        .zip(&tokens)
        .map(|(rank, &tokens)| law.routing(&map, rank, tokens))
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
    let stages = (1 << mix.below(4)).min(map.max_local());
    let kind = [GemmKind::Grouped, GemmKind::Dense][mix.below(2)];
    let counts = counts(&map, top_k, &routings)?;
    let mut table = match mix.below(2) {
        0 => StageTable::equal(&map, stages, kind)?,
        _ => StageTable::balanced(&map, &counts, stages, kind)?,
    };
    let orders = sensible_orders(stages);
    table.order = orders[mix.below(orders.len())].clone();
    table.shared = [
        SharedExpert::BesideCountExchange,
        SharedExpert::BesideFirstDispatch,
        SharedExpert::BesideLastCombine,
        SharedExpert::Serial,
    ][mix.below(4)];
    let speed = link.map_or("memory speed".into(), |link| link.to_string());
    let skew = ["uniform", "zipf 0.8", "zipf 1.2", "hot expert"][skew];
    let what =
        format!("{name}, {ranks} rank(s) of {tokens:?} tokens, {skew}, {speed}, {stages} stage(s), {kind}");
    Ok(Case { what, shape, ranks, link, routings, table })
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

pub(super) fn counts(
    map: &SlotMap,
    top_k: usize,
    routings: &[Routing],
) -> Result<LayerHistograms, PipelineError> {
    Ok(LayerHistograms::of_routings(map, top_k, routings)?)
}

/// What is known about ranks of one number: what their work costs at memory speed, and how to start them.
#[derive(Clone)]
pub(super) struct Model {
    /// The profile.
    pub(super) cost: CostModel,
    /// As in the profile's own rig.
    pub(super) options: RigOptions,
}

/// By number of ranks.
pub(super) type Models = BTreeMap<usize, Model>;

/// A case with all that pricing it takes.
pub(super) struct Question {
    pub(super) map: SlotMap,
    pub(super) counts: LayerHistograms,
    pub(super) shape: LayerSizes,
    /// Of its ranks and its link.
    pub(super) cost: CostModel,
}

impl Question {
    pub(super) fn of(case: &Case, cost: &CostModel, dtype: DType) -> Result<Self, PipelineError> {
        let map = SlotMap::contiguous(case.shape.experts, case.ranks)?;
        let counts = counts(&map, case.shape.top_k, &case.routings)?;
        let shape = case.shape.layer(&map, dtype);
        let cost = case.link.map_or_else(|| cost.clone(), |link| with_link(cost, link));
        Ok(Question { map, counts, shape, cost })
    }

    pub(super) fn workload(&self) -> Workload<'_> {
        Workload { map: &self.map, counts: &self.counts, shape: &self.shape }
    }
}

impl Case {
    /// Ranks with room for all these cases, which differ in routing and table alone.
    pub(super) fn rig(cases: &[&Case], options: &RigOptions) -> Result<LayerRig, PipelineError> {
        let loads: Vec<_> = cases.iter().map(|case| case.routings.clone()).collect();
        let first = cases[0];
        LayerRig::start(
            first.shape,
            &loads,
            &RigOptions { ranks: first.ranks, link: first.link, ..options.clone() },
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Never the seed that the recorded figures come from.
    const SEED: u64 = 11;

    #[test]
    fn cases_follow_from_the_seed_alone() {
        let words = |cases: Vec<Case>| -> Vec<String> { cases.into_iter().map(|case| case.what).collect() };
        let (all, some) = (cases(SEED, 60).unwrap(), cases(SEED, 20).unwrap());
        for (case, again) in all.iter().zip(&some) {
            assert_eq!(case.what, again.what, "a case does not depend on how many there are");
            assert_eq!((&case.table, &case.routings), (&again.table, &again.routings));
        }
        assert_ne!(words(cases(SEED + 1, 20).unwrap()), words(some));
        for case in &all {
            let map = SlotMap::contiguous(case.shape.experts, case.ranks).unwrap();
            case.table.validate(&map).unwrap();
            assert_eq!(case.routings.len(), case.ranks);
            assert!(case.ranks > 1 || case.link.is_none(), "one rank has no link: {}", case.what);
            let hot = case.what.contains("hot expert");
            let counts = counts(&map, case.shape.top_k, &case.routings).unwrap();
            let busiest = (0..case.shape.experts).map(|expert| counts.assignments_of(expert)).max().unwrap();
            let tokens: usize = case.routings.iter().map(|routing| routing.tokens()).sum();
            assert!(!hot || busiest == tokens, "every token visits the hot expert: {}", case.what);
        }
        for (what, wanted) in
            [("1 rank(s)", 5), ("2 rank(s)", 10), ("4 rank(s)", 5), ("hot", 5), ("zipf", 10)]
        {
            let number = all.iter().filter(|case| case.what.contains(what)).count();
            assert!(number >= wanted, "{number} cases with {what}");
        }
    }
}
