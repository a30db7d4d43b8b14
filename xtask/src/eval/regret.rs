//! Plans of the same layer against each other, run in turn: what the search's choice loses to the best plan there is,
//! what uneven cuts gain, and how a wrong profile mends itself.

use super::cases::{Case, Model, Question};
use epsmoe_base::{Layer, Rank};
use epsmoe_pipeline::PipelineError;
use epsmoe_plan::{
    Correction, CostModel, Feedback, GemmKind, LayerHistograms, Planner, Policy, Schedule, SearchOptions,
    SlotMap, StageTable, predict_ns, search, sensible_orders,
};
use epsmoe_profile::LayerRig;
use serde::Serialize;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

/// How many times the time of one plan another one takes, in permille, pair by pair.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub(super) struct Ratio {
    /// The median of the pairs.
    pub(super) median: u64,
    /// Where the median of all pairs there could be lies with 95 %, from the order of these.
    pub(super) interval: (u64, u64),
}

impl Ratio {
    /// Of two plans' times in the same rounds.
    pub(super) fn of(times: &[u64], others: &[u64]) -> Self {
        let pairs = times.iter().zip(others);
        let mut ratios: Vec<u64> = pairs.map(|(time, other)| time * 1000 / (*other).max(1)).collect();
        ratios.sort_unstable();
        let (number, half) = (ratios.len(), (0.98 * (ratios.len() as f64).sqrt()).ceil() as usize);
        let at = |index: usize| ratios.get(index.min(number.saturating_sub(1))).copied().unwrap_or(1000);
        let (low, high) = (number.saturating_sub(1) / 2, number / 2);
        Ratio {
            median: at(low).midpoint(at(high)),
            interval: (at(high.saturating_sub(half)), at(low + half)),
        }
    }
}

/// Runs tables in turn, `rounds` times, after one run to warm up: the times of each. Every other round goes backwards,
/// so that no plan always follows the same one.
fn in_turn(
    rig: &mut LayerRig,
    case: &Case,
    tables: &[StageTable],
    rounds: usize,
) -> Result<Vec<Vec<u64>>, PipelineError> {
    let mut times = vec![Vec::with_capacity(rounds); tables.len()];
    if let Some(first) = tables.first() {
        rig.run(&case.routings, first)?;
    }
    for round in 0..rounds {
        for turn in 0..tables.len() {
            let index = if round % 2 == 0 { turn } else { tables.len() - 1 - turn };
            times[index].push(rig.run(&case.routings, &tables[index])?.layer_ns);
        }
    }
    Ok(times)
}

/// How much slower the plan of the search is than the best one found by running many.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Regret {
    /// The case in words.
    pub(super) what: String,
    /// The search's plan over the best of the five, in permille: 1000 when none is faster.
    pub(super) against_best: u64,
    /// Stages of the search's plan.
    pub(super) stages: usize,
    /// Time of one stage over the search's plan: above 1000 the search's is faster.
    pub(super) over_one_stage: Ratio,
}

impl Regret {
    /// What choosing this plan costs, in permille of the best one's time.
    pub(super) fn regret(&self) -> u64 {
        self.against_best - 1000
    }
}

/// How many of the plans that a sweep found fastest are run again.
const TOP: usize = 5;

/// Runs all plans that people would try, then the fastest five in turn with the search's own and one stage.
pub(super) fn regret(case: &Case, model: &Model, pairs: usize) -> Result<Regret, PipelineError> {
    let question = Question::of(case, &model.cost, model.options.dtype)?;
    let chosen = next_table(&mut *auto(&question, question.cost.clone())?, Layer(0), &question, &[])?;
    let one = StageTable::serial(&question.map, GemmKind::Grouped);
    let mut rig = Case::rig(&[case], &model.options)?;
    let all = sweep(&question.map, &question.counts)?;
    // Once each, then again those that might be among the best.
    let hopeful = fastest(&mut rig, case, all, 1, 2 * TOP)?;
    let mut best = fastest(&mut rig, case, hopeful, 3, TOP)?;
    best.retain(|table| *table != chosen);
    let stages = chosen.stages();
    let tables: Vec<StageTable> = [chosen, one].into_iter().chain(best).collect();
    let times = in_turn(&mut rig, case, &tables, pairs)?;
    let slower = |other: &Vec<u64>| Ratio::of(&times[0], other).median;
    Ok(Regret {
        what: case.what.clone(),
        against_best: times[1..].iter().map(slower).max().unwrap_or(1000).max(1000),
        stages,
        over_one_stage: Ratio::of(&times[1], &times[0]),
    })
}

/// What plans the layers of a rank by itself, as in a run.
fn auto(question: &Question, cost: CostModel) -> Result<Box<dyn Planner>, PipelineError> {
    let dtype = cost.dtype;
    let policy = Policy { schedule: Schedule::Auto, cost: Some(Arc::new(cost)), ..Policy::default() };
    Ok(policy.planner(question.shape, dtype)?)
}

/// What it plans for a layer.
fn next_table(
    planner: &mut dyn Planner,
    layer: Layer,
    question: &Question,
    feedback: &[Feedback],
) -> Result<StageTable, PipelineError> {
    let counts = std::slice::from_ref(&question.counts);
    let plan = planner.plan(layer, &question.map, counts, feedback)?;
    Ok(plan.tables.into_iter().next().unwrap_or_else(|| unreachable!("a table for every batch")))
}

/// The `kept` tables with the lowest median of some rounds.
fn fastest(
    rig: &mut LayerRig,
    case: &Case,
    tables: Vec<StageTable>,
    rounds: usize,
    kept: usize,
) -> Result<Vec<StageTable>, PipelineError> {
    let times = in_turn(rig, case, &tables, rounds)?;
    let mut ranked: Vec<(u64, StageTable)> = times.into_iter().map(median).zip(tables).collect();
    ranked.sort_by_key(|ranked| ranked.0);
    Ok(ranked.into_iter().take(kept).map(|ranked| ranked.1).collect())
}

fn median(mut times: Vec<u64>) -> u64 {
    times.sort_unstable();
    times.get(times.len() / 2).copied().unwrap_or(0)
}

/// 1, 2, 4 and 8 stages, equal and balanced, in all sensible orders, with both kernels.
fn sweep(map: &SlotMap, counts: &LayerHistograms) -> Result<Vec<StageTable>, PipelineError> {
    let mut tables: Vec<StageTable> = Vec::new();
    for stages in [1, 2, 4, 8].into_iter().filter(|&stages| stages <= map.max_local()) {
        for kind in [GemmKind::Grouped, GemmKind::Dense] {
            for table in
                [StageTable::equal(map, stages, kind)?, StageTable::balanced(map, counts, stages, kind)?]
            {
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

/// What cuts that follow the loads gain over as many experts in every stage, in permille of time: above 1000 the
/// uneven cuts are faster.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Uneven {
    /// The case in words.
    pub(super) what: String,
    /// Stages of both plans.
    pub(super) stages: usize,
    /// The uneven cuts.
    pub(super) cuts: Vec<Vec<usize>>,
    /// Time of equal over uneven cuts by the model.
    pub(super) predicted: u64,
    /// As measured.
    pub(super) measured: Ratio,
}

/// Equal cuts against those of the search, with as many stages as the case has and all else alike. Nothing where there
/// is no choice: one stage, or the search cuts equally.
pub(super) fn uneven(case: &Case, model: &Model, pairs: usize) -> Result<Option<Uneven>, PipelineError> {
    let stages = case.table.stages();
    let question = Question::of(case, &model.cost, model.options.dtype)?;
    let workload = question.workload();
    let options = SearchOptions { min_stages: stages, max_stages: stages, ..SearchOptions::default() };
    let uneven = search(&workload, &question.cost, &options).table;
    let equal = StageTable::equal(&question.map, stages, GemmKind::Grouped)?;
    let equal = StageTable { cuts: equal.cuts, ..uneven.clone() };
    if equal == uneven {
        return Ok(None);
    }
    let predict = |table: &StageTable| predict_ns(table, &workload, &question.cost);
    let predicted = predict(&equal) * 1000 / predict(&uneven).max(1);
    let mut rig = Case::rig(&[case], &model.options)?;
    let cuts = uneven.cuts.clone();
    let times = in_turn(&mut rig, case, &[equal, uneven], pairs)?;
    let measured = Ratio::of(&times[0], &times[1]);
    Ok(Some(Uneven { what: case.what.clone(), stages, cuts, predicted, measured }))
}

/// How the auto schedule got over a wrong profile.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Recovery {
    /// The case in words.
    pub(super) what: String,
    /// The layer after which its plan did not change any more.
    pub(super) settled: usize,
    /// What it took the machine for in the end, in permille of the wrong profile's times.
    pub(super) correction: Correction,
    /// Time of the wrong profile's first plan over the right profile's, in permille.
    pub(super) before: Ratio,
    /// Time of its last plan over the right profile's.
    pub(super) after: Ratio,
    /// Whether all layers had the same bits.
    pub(super) same_bits: bool,
}

/// Layers in which the auto schedule has to find out that its profile is wrong.
pub(super) const LAYERS: usize = 50;

/// Layers of a step: between steps the schedule looks back.
const STEP: usize = 5;

/// What the wrong profile says, in permille of the right one's times: links four times as fast, products half.
pub(super) const WRONG: Correction = Correction { link: 250, grouped: 2000, dense: 2000, rows: 1000 };

/// Lets the auto schedule of every rank begin with the wrong profile and run fifty layers; then runs its first and its
/// last plan in turn with the right profile's.
///
/// # Panics
/// If two ranks plan differently.
pub(super) fn recovery(case: &Case, model: &Model, pairs: usize) -> Result<Recovery, PipelineError> {
    let question = Question::of(case, &model.cost, model.options.dtype)?;
    let right = next_table(&mut *auto(&question, question.cost.clone())?, Layer(0), &question, &[])?;
    let wrong = question.cost.corrected(&WRONG);
    let ranks = question.map.all_ranks().map(|_| auto(&question, wrong.clone()));
    let mut ranks: Vec<Box<dyn Planner>> = ranks.collect::<Result<_, _>>()?;
    let mut rig = Case::rig(&[case], &model.options)?;
    rig.keep_bits(true);
    let mut tables: Vec<StageTable> = Vec::new();
    // By the weights that a layer had.
    let mut bits: BTreeMap<usize, BTreeSet<u64>> = BTreeMap::new();
    for step in 0..LAYERS / STEP {
        let mut spans = Vec::new();
        for layer in (0..STEP).map(Layer) {
            let feedback: Vec<Feedback> = ranks.iter_mut().filter_map(|rank| rank.take_feedback()).collect();
            let plans = ranks.iter_mut().map(|rank| next_table(&mut **rank, layer, &question, &feedback));
            let plans: Vec<StageTable> = plans.collect::<Result<_, _>>()?;
            assert!(plans.iter().all(|plan| *plan == plans[0]), "ranks plan step {step} differently");
            let mut run = rig.run(&case.routings, &plans[0])?;
            run.timeline.spans.iter_mut().for_each(|span| span.layer = Some(layer));
            spans.append(&mut run.timeline.spans);
            bits.entry(run.weights).or_default().insert(run.bits);
            tables.extend(plans.into_iter().take(1));
        }
        for (rank, planner) in ranks.iter_mut().enumerate() {
            planner.observe(Rank(rank), &spans);
        }
    }
    rig.keep_bits(false);
    let last = tables.last().unwrap_or(&right).clone();
    let settled = tables.iter().rposition(|table| *table != last).map_or(0, |layer| layer + 1);
    let correction = ranks[0].report().unwrap_or_default().correction;
    let contestants = [right, tables[0].clone(), last];
    let times = in_turn(&mut rig, case, &contestants, pairs)?;
    Ok(Recovery {
        what: case.what.clone(),
        settled,
        correction,
        before: Ratio::of(&times[1], &times[0]),
        after: Ratio::of(&times[2], &times[0]),
        same_bits: bits.values().all(|different| different.len() == 1),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ratios_are_of_pairs() {
        let others: Vec<u64> = (1..=20).map(|round| round * 1000).collect();
        let times: Vec<u64> = others.iter().map(|time| time * 11 / 10).collect();
        let ratio = Ratio::of(&times, &others);
        assert_eq!(
            (ratio.median, ratio.interval),
            (1100, (1100, 1100)),
            "what slows both of a pair changes nothing"
        );
        // Of twenty pairs the median lies between the sixth and the fifteenth.
        let rising: Vec<u64> = (0..20).map(|round| 1000 + round).collect();
        let ratio = Ratio::of(&rising, &[1000; 20]);
        assert_eq!((ratio.median, ratio.interval), (1009, (1005, 1014)));
        assert_eq!(Ratio::of(&[3], &[2]), Ratio { median: 1500, interval: (1500, 1500) });
        assert_eq!(Ratio::of(&[], &[]).median, 1000);
        let over_one_stage = ratio;
        let regret = |against_best| Regret { what: String::new(), against_best, stages: 1, over_one_stage };
        assert_eq!([regret(1000).regret(), regret(1042).regret()], [0, 42]);
    }
}
