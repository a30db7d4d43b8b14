//! How well a cost model predicts layers that it never saw.

use super::cases::{Case, Models, Question};
use epsmoe_base::{Lane, Rank};
use epsmoe_fabric::Link;
use epsmoe_pipeline::PipelineError;
use epsmoe_plan::{Span, Timeline, simulate};
use epsmoe_profile::LayerRig;
use serde::Serialize;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// The busiest rank's time by class, in nanoseconds.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub(super) struct Parts {
    /// Matrix products.
    pub(super) gemm: u64,
    /// Everything else on compute lanes.
    pub(super) other: u64,
    /// Exchanges, beside no computation.
    pub(super) exposed: u64,
}

impl Parts {
    fn of(timeline: &Timeline, ranks: usize) -> Self {
        let most = |of: &dyn Fn(Rank) -> u64| (0..ranks).map(|rank| of(Rank(rank))).max().unwrap_or(0);
        let gemm = |rank| {
            let spans = timeline.spans.iter().filter(|span| span.rank == rank && span.phase.is_product());
            spans.map(Span::duration_ns).sum::<u64>()
        };
        Parts {
            gemm: most(&gemm),
            other: most(&|rank| timeline.busy(rank, Lane::Compute).saturating_sub(gemm(rank))),
            exposed: most(&|rank| timeline.exposed_transfer(rank)),
        }
    }
}

/// A case, predicted and measured.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Outcome {
    /// The case in words.
    pub(super) what: String,
    /// Layer time by the model, in nanoseconds.
    pub(super) predicted_ns: u64,
    /// Median of the measured ones.
    pub(super) measured_ns: u64,
    /// Their lower quartile: what is left of it when other programs disturb the machine.
    pub(super) low_ns: u64,
    /// Half the distance between the quartiles of the repeats, in permille of the median.
    pub(super) spread: u64,
    /// Repeats, over all passes.
    pub(super) repeats: usize,
    /// Where the time went by the model.
    pub(super) predicted: Parts,
    /// Where it went.
    pub(super) measured: Parts,
}

impl Outcome {
    /// How far the prediction is off, in permille of the measured time.
    pub(super) fn error(&self) -> u64 {
        self.predicted_ns.abs_diff(self.measured_ns) * 1000 / self.measured_ns.max(1)
    }

    /// Whether repeats agree to 4 %.
    pub(super) fn is_steady(&self) -> bool {
        self.spread <= 40
    }
}

/// Errors of many cases, in permille.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub(super) struct Spread {
    /// How many cases.
    pub(super) cases: usize,
    /// The median of them.
    pub(super) median: u64,
    /// The 90th percentile.
    pub(super) p90: u64,
    /// The worst.
    pub(super) worst: u64,
}

impl Spread {
    /// Of these errors.
    pub(super) fn of(errors: impl IntoIterator<Item = u64>) -> Self {
        let mut errors: Vec<u64> = errors.into_iter().collect();
        errors.sort_unstable();
        let at = |permille: usize| errors.get(errors.len() * permille / 1000).or(errors.last()).copied();
        Spread {
            cases: errors.len(),
            median: at(500).unwrap_or(0),
            p90: at(900).unwrap_or(0),
            worst: at(1000).unwrap_or(0),
        }
    }
}

/// Passes over all cases, far apart in time: what disturbs the machine for a while disturbs one of them.
const PASSES: usize = 3;

/// Runs of a case in a pass, in turn with the others of its widths, after one to warm up.
const RUNS: usize = 5;

/// Runs every case fifteen times, in three passes over all of them, and predicts it. No pass begins after `most`; the
/// first one is always complete. `progress` is told how many of how many visits are over.
///
/// # Panics
/// If a case's number of ranks has no model.
pub(super) fn verify(
    cases: &[&Case],
    models: &Models,
    most: Duration,
    progress: &mut dyn FnMut(usize, usize),
) -> Result<Vec<Outcome>, PipelineError> {
    let begun = Instant::now();
    let groups = groups(cases);
    let mut runs: Vec<Vec<(u64, Parts)>> = vec![Vec::new(); cases.len()];
    for pass in 0..PASSES {
        if pass > 0 && begun.elapsed() > most {
            break;
        }
        for (number, group) in groups.iter().enumerate() {
            visit(group, cases, models, &mut runs)?;
            progress(pass * groups.len() + number + 1, PASSES * groups.len());
        }
    }
    cases.iter().zip(runs).map(|(case, runs)| outcome(case, models, runs)).collect()
}

/// Cells whose ranks can hold the same weights.
fn groups(cases: &[&Case]) -> Vec<Vec<usize>> {
    let mut groups: BTreeMap<_, Vec<usize>> = BTreeMap::new();
    for (index, case) in cases.iter().enumerate() {
        let shape = case.shape;
        let widths = [shape.hidden, shape.inner, shape.experts, shape.top_k, shape.shared_inner];
        groups.entry((case.ranks, widths)).or_default().push(index);
    }
    groups.into_values().collect()
}

/// One pass over the cases of a group: a rig for each of their links, all with the same weights.
fn visit(
    group: &[usize],
    cases: &[&Case],
    models: &Models,
    runs: &mut [Vec<(u64, Parts)>],
) -> Result<(), PipelineError> {
    let mut options = models[&cases[group[0]].ranks].options.clone();
    // They go with the rigs.
    options.weights = Arc::default();
    let mut rigs: Vec<(Option<Link>, LayerRig)> = Vec::new();
    for &index in group {
        let link = cases[index].link;
        if rigs.iter().all(|rig| rig.0 != link) {
            let alike: Vec<&Case> =
                group.iter().map(|&index| cases[index]).filter(|c| c.link == link).collect();
            rigs.push((link, Case::rig(&alike, &options)?));
        }
    }
    for turn in 0..=RUNS {
        for &index in group {
            let case = cases[index];
            let Some((_, rig)) = rigs.iter_mut().find(|rig| rig.0 == case.link) else { continue };
            let run = rig.run(&case.routings, &case.table)?;
            if turn > 0 {
                runs[index].push((run.layer_ns, Parts::of(&run.timeline, case.ranks)));
            }
        }
    }
    Ok(())
}

fn outcome(case: &Case, models: &Models, mut runs: Vec<(u64, Parts)>) -> Result<Outcome, PipelineError> {
    let model = &models[&case.ranks];
    let question = Question::of(case, &model.cost, model.options.dtype)?;
    let simulation = simulate(&case.table, &question.workload(), &question.cost);
    runs.sort_by_key(|run| run.0);
    let at = |quarter: usize| runs[(runs.len() - 1) * quarter / 4];
    let (measured_ns, measured) = at(2);
    Ok(Outcome {
        what: case.what.clone(),
        predicted_ns: simulation.layer_ns,
        measured_ns,
        low_ns: at(1).0,
        spread: (at(3).0 - at(1).0) * 500 / measured_ns.max(1),
        repeats: runs.len(),
        predicted: Parts::of(&simulation.timeline, case.ranks),
        measured,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_are_summed_up_by_rank() {
        let spread = Spread::of((1..=10).rev().map(|error| error * 10));
        assert_eq!((spread.cases, spread.median, spread.p90, spread.worst), (10, 60, 100, 100));
        assert_eq!(Spread::of([]).cases, 0);
        let outcome = |predicted_ns, spread| Outcome {
            what: String::new(),
            predicted_ns,
            measured_ns: 1000,
            low_ns: 990,
            spread,
            repeats: 15,
            predicted: Parts::default(),
            measured: Parts::default(),
        };
        assert_eq!([outcome(900, 0).error(), outcome(1300, 0).error()], [100, 300]);
        assert!(outcome(0, 40).is_steady() && !outcome(0, 41).is_steady());
    }
}
