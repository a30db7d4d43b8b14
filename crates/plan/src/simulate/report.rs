//! What a run of the program says about the layer.

use super::clock::Times;
use super::program::{Program, Queue, Step};
use crate::{Span, Timeline};
use epsmoe_base::{Lane, Phase, Rank, Stage};
use std::ops::Range;

/// What a layer will do and how long it will take.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Simulation {
    /// The two lanes of every rank, from the moment the layer's input is there.
    pub timeline: Timeline,
    /// When the last rank is done.
    pub layer_ns: u64,
    /// How long the transfer lane works, or waits for its peers, while the compute lane does not; on the rank with
    /// the most of it.
    pub exposed_transfer_ns: u64,
    /// From the first rank that is ready to tell its counts to the plan in every rank's hands.
    pub count_exchange_ns: u64,
    /// `[S]`
    pub stages: Vec<StageTimes>,
    /// `[R]`
    pub ranks: Vec<RankTimes>,
}

/// A stage on the rank that takes longest, work by work, as it went beside everything else.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StageTimes {
    /// Its rows travel, from the moment all ranks are there.
    pub dispatch_ns: u64,
    /// Expand, products, reduce.
    pub compute_ns: u64,
    /// Its sums travel.
    pub combine_ns: u64,
}

/// How one rank spends the layer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RankTimes {
    /// Compute lane at work.
    pub compute_ns: u64,
    /// Transfer lane at work, or waiting for its peers.
    pub transfer_ns: u64,
    /// Of which beside no computation.
    pub exposed_ns: u64,
    /// When it has its output.
    pub end_ns: u64,
}

/// Everything about a program that ran.
pub(super) fn report(program: &Program, times: &Times, stages: usize) -> Simulation {
    let steps = program.steps.len();
    let of = |step: usize| (0..program.ranks).map(move |rank| rank * steps + step);
    let mut timeline = Timeline::default();
    let mut stage_times = vec![StageTimes::default(); stages];
    let mut count_exchange_ns = 0;
    for (number, step) in program.steps.iter().enumerate() {
        let lane = match step.queue {
            Queue::Compute => Lane::Compute,
            Queue::Transfer => Lane::Transfer,
            Queue::Host => continue,
        };
        timeline.spans.extend(of(number).enumerate().map(|(rank, at)| Span {
            rank: Rank(rank),
            layer: None,
            stage: step.label.stage,
            lane,
            phase: step.label.phase.unwrap_or(Phase::Other),
            name: step.label.name.into(),
            start_ns: times.start[at],
            end_ns: times.end[at],
        }));
    }
    for (stage, times_of) in stage_times.iter_mut().enumerate() {
        *times_of = stage_report(program, times, Stage(stage));
    }
    if let Some([exchanged, planned]) = program.exchanged_and_planned {
        let first = of(exchanged).map(|at| times.start[at]).min().unwrap_or(0);
        count_exchange_ns = of(planned).map(|at| times.end[at]).max().unwrap_or(0) - first;
    }
    let of_rank = |rank| RankTimes {
        compute_ns: timeline.busy(rank, Lane::Compute),
        transfer_ns: timeline.busy(rank, Lane::Transfer),
        exposed_ns: timeline.exposed_transfer(rank),
        end_ns: times.end[rank.0 * steps..(rank.0 + 1) * steps].iter().copied().max().unwrap_or(0),
    };
    let ranks: Vec<RankTimes> = (0..program.ranks).map(|rank| of_rank(Rank(rank))).collect();
    let exposed_transfer_ns = ranks.iter().map(|rank| rank.exposed_ns).max().unwrap_or(0);
    Simulation {
        layer_ns: times.end(),
        exposed_transfer_ns,
        count_exchange_ns,
        stages: stage_times,
        ranks,
        timeline,
    }
}

fn stage_report(program: &Program, times: &Times, stage: Stage) -> StageTimes {
    let worked = |at: usize| times.end[at] - times.begin[at];
    let slowest = |wanted: &dyn Fn(&Step) -> bool| {
        let steps = || (0..program.steps.len()).filter(|&step| wanted(&program.steps[step]));
        let of_rank = |rank| steps().map(|step| worked(rank * program.steps.len() + step)).sum();
        let ranks: Range<usize> = 0..program.ranks;
        ranks.map(of_rank).max().unwrap_or(0)
    };
    let here = |step: &Step, phase| step.label.stage == Some(stage) && step.label.phase == Some(phase);
    StageTimes {
        dispatch_ns: slowest(&|step| here(step, Phase::Dispatch)),
        compute_ns: slowest(&|step| step.label.stage == Some(stage) && step.queue == Queue::Compute),
        combine_ns: slowest(&|step| here(step, Phase::Combine)),
    }
}
