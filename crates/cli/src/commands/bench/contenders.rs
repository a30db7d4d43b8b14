//! What a bench compares, and the rounds in which it is measured.

use super::times::{
    HostTime, LayerTime, StepTime, busiest, host_times, layer_times, quantile, smallest_transfer,
};
use super::{Decisions, PacingFigures, Row};
use crate::args::{BenchArgs, ContenderSpec, ScheduleKind};
use crate::output;
use crate::setup::{Setup, Started};
use anyhow::{Result, bail};
use epsmoe_base::Rank;
use epsmoe_engine::{Engine, Experts, Parallel, StepReport};
use epsmoe_fabric::{PacedLink, Pacing};
use epsmoe_plan::{GemmKind, Policy, Schedule, Span, StageTable, Stages, Timeline, order_text};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// A way to run the model.
#[derive(Clone, Debug)]
pub(super) struct Way {
    pub(super) parallel: Parallel,
    pub(super) policy: Policy,
}

/// What is compared: the strategy that was typed, or every one.
pub(super) fn ways(args: &BenchArgs, setup: &Setup) -> Result<Vec<Way>> {
    if args.ablation {
        return ablation(setup);
    }
    let policies = match args.contender.as_slice() {
        [] => policies(setup, args.run.schedule)?,
        specs => specs.iter().map(|spec| of_spec(&setup.policy, spec)).collect(),
    };
    Ok(policies.into_iter().map(|policy| Way { parallel: setup.parallel, policy }).collect())
}

/// The steps from tensor parallelism to the expert pipeline, one at a time, with attention split and with attention
/// whole: experts split (the base), experts whole, each with either kernel; then the stages.
fn ablation(setup: &Setup) -> Result<Vec<Way>> {
    let ranks = setup.ranks;
    if ranks == 1 {
        bail!(
            "--ablation compares ways to spread a model, but there is one rank: give --data-parallel-size 2"
        );
    }
    let mut ways = Vec::new();
    for (tensor, data) in [(ranks, 1), (1, ranks)] {
        for experts in [Experts::Tp, Experts::Ep] {
            let parallel = Parallel { tensor, data: Some(data), experts };
            let kernels = [GemmKind::Grouped, GemmKind::Dense];
            let serial = |gemm| Policy { gemm: Some(gemm), ..serial(&setup.policy) };
            ways.extend(kernels.map(|gemm| Way { parallel, policy: serial(gemm) }));
            if experts == Experts::Ep {
                let beside = [two_batch(&setup.policy)].into_iter().chain(staged(setup, &parallel)?);
                let policies = beside.chain(auto(setup));
                ways.extend(policies.map(|policy| Way { parallel, policy }));
            }
        }
    }
    Ok(ways)
}

/// A contender that was typed, beside an auto policy.
pub(super) fn of_spec(auto: &Policy, spec: &ContenderSpec) -> Policy {
    let ContenderSpec { schedule, stages, order } = spec.clone();
    let base = match schedule {
        Schedule::Serial => serial(auto),
        Schedule::Auto => auto.clone(),
        Schedule::Staged | Schedule::TwoBatch => Policy { cost: None, ..auto.clone() },
    };
    Policy { schedule, stages, order, ..base }
}

/// The schedules to compare: what was typed, or serial, and of several ranks two micro-batches, 2, 4, 8, …
/// stages, and auto.
fn policies(setup: &Setup, typed: Option<ScheduleKind>) -> Result<Vec<Policy>> {
    Ok(match typed {
        Some(ScheduleKind::Serial | ScheduleKind::Auto | ScheduleKind::TwoBatch) => {
            vec![setup.policy.clone()]
        }
        Some(ScheduleKind::Staged) => staged(setup, &setup.parallel)?,
        // Nothing travels, so there is nothing to schedule.
        None if setup.ranks == 1 && setup.policy.stages.is_none() => vec![serial(&setup.policy)],
        None => {
            let whole = [serial(&setup.policy), two_batch(&setup.policy)].into_iter();
            whole.chain(staged(setup, &setup.parallel)?).chain(auto(setup)).collect()
        }
    })
}

fn serial(base: &Policy) -> Policy {
    let shared = None;
    Policy { schedule: Schedule::Serial, stages: None, order: None, shared, cost: None, ..base.clone() }
}

fn two_batch(base: &Policy) -> Policy {
    Policy { schedule: Schedule::TwoBatch, stages: None, order: None, cost: None, ..base.clone() }
}

/// As many stages as were typed, or 2, 4, 8.
fn staged(setup: &Setup, parallel: &Parallel) -> Result<Vec<Policy>> {
    let base = Policy { schedule: Schedule::Staged, cost: None, ..setup.policy.clone() };
    let staged = |stages| Policy { stages: Some(stages), ..base.clone() };
    Ok(match &base.stages {
        Some(stages) => vec![staged(stages.clone())],
        None if base.order.is_some() => vec![base],
        None => {
            let most = setup.most_local_experts(parallel)?.unwrap_or(0);
            let counts = std::iter::successors(Some(2), |stages| Some(stages * 2));
            counts
                .take_while(|&stages| stages <= most.min(8))
                .map(|stages| staged(Stages::Count(stages)))
                .collect()
        }
    })
}

/// What the cost model prefers, unless stages were typed.
fn auto(setup: &Setup) -> Option<Policy> {
    Some(setup.policy.clone()).filter(|policy| policy.schedule == Schedule::Auto)
}

/// A schedule, its engine, and what was measured of it.
pub(super) struct Contender {
    pub(super) way: Way,
    pub(super) engine: Engine,
    links: Vec<Arc<PacedLink>>,
    stands_for: usize,
    pub(super) rates: Vec<f64>,
    steps: Vec<StepTime>,
    layers: Vec<LayerTime>,
    hosts: Vec<HostTime>,
    smallest_transfer_ms: Option<f64>,
    /// Of all rounds.
    pub(super) pacing: Pacing,
    /// The last one that ran.
    table: Option<StageTable>,
    peak_bytes: u64,
    /// Of the last round.
    pub(super) timeline: Timeline,
}

/// Rounds that tell what ran when, where others do not.
const RECORDED: usize = 3;

/// Rounds after the first in which an auto schedule that still tries plans is left to find the best, at most, and of the time to
/// measure.
const LEARNING: usize = 16;
const LEARNING_SHARE: f64 = 0.25;

/// Rounds in which every schedule takes its turn, the first of them to warm up; who begins moves on. Where it costs time to
/// tell what ran when (`apart`), rates are those of rounds that do not, and a few more rounds tell it.
pub(super) fn measure(
    args: &BenchArgs,
    prompts: &[Vec<u32>],
    contenders: &mut [Contender],
    apart: bool,
) -> Result<()> {
    let progress = output::step_bar("measuring", args.num_iters * contenders.len());
    for contender in &mut *contenders {
        contender.engine.record_spans(!apart);
        contender.round(prompts, args.output_len)?;
        let begun = Instant::now();
        for _ in 0..LEARNING {
            let is_trying = contender.engine.schedule().is_some_and(|report| report.trying);
            if !is_trying || begun.elapsed().as_secs_f64() > args.max_seconds * LEARNING_SHARE {
                break;
            }
            contender.round(prompts, args.output_len)?;
        }
        contender.forget();
    }
    let begun = Instant::now();
    for round in 0..args.num_iters {
        if round > 0 && begun.elapsed() > Duration::from_secs_f64(args.max_seconds) {
            break;
        }
        let count = contenders.len();
        for turn in 0..count {
            contenders[(round + turn) % count].round(prompts, args.output_len)?;
            progress.inc(1);
        }
    }
    for _ in 0..if apart { RECORDED } else { 0 } {
        for contender in &mut *contenders {
            contender.engine.record_spans(true);
            contender.round(prompts, args.output_len)?;
            contender.rates.pop();
            contender.steps.pop();
        }
    }
    progress.finish_and_clear();
    Ok(())
}

impl Contender {
    /// Its engine has one of so many ranks that each have as much to do.
    pub(super) fn new(way: Way, started: Started, stands_for: usize) -> Self {
        let Started { engine, links } = started;
        Contender {
            way,
            engine,
            links,
            stands_for,
            rates: Vec::new(),
            steps: Vec::new(),
            layers: Vec::new(),
            hosts: Vec::new(),
            smallest_transfer_ms: None,
            pacing: Pacing::default(),
            table: None,
            peak_bytes: 0,
            timeline: Timeline::default(),
        }
    }

    /// Runs all prompts to their ends.
    fn round(&mut self, prompts: &[Vec<u32>], output_len: usize) -> Result<()> {
        let tokens: usize = prompts.iter().map(|prompt| prompt.len() + output_len).sum();
        let tokens = tokens * self.stands_for;
        let requests = prompts.iter().map(|prompt| super::request(prompt, output_len)).collect();
        self.timeline = Timeline::default();
        let (mut steps, mut ends, begun) = (Vec::new(), Vec::new(), Instant::now());
        self.engine.run(requests, |step| {
            ends.push(begun.elapsed());
            steps.push(step.clone());
        })?;
        self.rates.push(tokens as f64 / begun.elapsed().as_secs_f64());
        self.steps.extend(StepTime::of(&ends, output_len));
        for step in steps {
            self.layers.extend(layer_times(&step.timeline));
            self.hosts.extend(host_times(&step));
            let smallest = smallest_transfer(&step.timeline).into_iter().chain(self.smallest_transfer_ms);
            self.smallest_transfer_ms = smallest.reduce(f64::min);
            self.peak_bytes = self.peak_bytes.max(peak_bytes(&step));
            if self.way.policy.schedule != Schedule::TwoBatch {
                self.table = last_table(&step).or(self.table.take());
            }
            self.timeline.spans.extend(step.timeline.spans);
        }
        for link in &self.links {
            self.pacing.add(&link.take_pacing());
        }
        Ok(())
    }

    fn forget(&mut self) {
        self.rates.clear();
        self.steps.clear();
        self.layers.clear();
        self.hosts.clear();
        self.smallest_transfer_ms = None;
        self.pacing = Pacing::default();
    }

    /// Whether this is what `other` would be without stages. Where nobody chose a kernel, either stands for it.
    fn is_serial_of(&self, other: &Contender) -> bool {
        let (own, others) = (&self.way, &other.way);
        let kernel = others.policy.gemm.is_none() || own.policy.gemm == others.policy.gemm;
        own.policy.schedule == Schedule::Serial && own.parallel == others.parallel && kernel
    }

    fn row(&self, serial: Option<&Contender>, base: Option<&Contender>) -> Row {
        let Way { parallel, policy } = &self.way;
        let stage_sizes = match &policy.stages {
            Some(Stages::Sizes(sizes)) => Some(sizes.clone()),
            _ => None,
        };
        let median =
            |of: &Contender, figure: fn(&LayerTime) -> f64| quantile(of.layers.iter().map(figure), 0.5);
        let layers = |figure: fn(&LayerTime) -> f64| median(self, figure);
        let host = |figure: fn(&HostTime) -> f64| quantile(self.hosts.iter().map(figure), 0.5).unwrap_or(0.0);
        let step = |figure: fn(&StepTime) -> Option<f64>| quantile(self.steps.iter().filter_map(figure), 0.5);
        let bound = serial.and_then(|serial| {
            Some(median(serial, |layer| layer.compute_ms)?.max(median(serial, |layer| layer.transfer_ms)?))
        });
        let breakdown = busiest(&self.timeline);
        let ratio_to = |other: &Contender| {
            quantile(self.rates.iter().zip(&other.rates).map(|(own, other)| own / other), 0.5)
        };
        let rate = |share| quantile(self.rates.iter().copied(), share).unwrap_or(0.0);
        Row {
            strategy: parallel.to_string(),
            schedule: policy.schedule.to_string(),
            gemm: match (policy.gemm, policy.schedule) {
                (None, Schedule::Auto) => "auto".into(),
                (gemm, _) => gemm.unwrap_or_default().to_string(),
            },
            stages: match (&policy.stages, policy.schedule) {
                (_, Schedule::Serial | Schedule::TwoBatch) => 1,
                (_, Schedule::Auto) => self.engine.schedule().map_or(1, |report| report.usual_stages()),
                (Some(Stages::Count(count)), _) => *count,
                (Some(Stages::Sizes(sizes)), _) => sizes.len(),
                (None, _) => Policy::DEFAULT_STAGES,
            },
            stage_sizes,
            last_cut: self.table.as_ref().and_then(|table| {
                let cut = table.cuts.first()?;
                Some(cut.windows(2).map(|ends| ends[1] - ends[0]).collect())
            }),
            transfer_order: match (&self.table, policy.schedule) {
                (_, Schedule::TwoBatch) => Some("dA dB cA cB".into()),
                (table, _) => table.as_ref().map(|table| order_text(&table.order)),
            },
            tokens_per_second: rate(0.5),
            tokens_per_second_range: [rate(0.25), rate(0.75)],
            first_step_ms: step(|times| Some(times.first_ms)),
            decode_step_ms: step(|times| times.decode_ms),
            moe_layer_ms: layers(|layer| layer.ms),
            compute_ms: layers(|layer| layer.compute_ms),
            experts_ms: layers(|layer| layer.experts_ms),
            dispatch_and_combine_ms: layers(|layer| layer.transfer_ms),
            smallest_transfer_ms: self.smallest_transfer_ms,
            exposed_transfer_ms: layers(|layer| layer.exposed_ms),
            efficiency: bound.zip(layers(|layer| layer.ms)).map(|(bound, time)| bound / time),
            host: (!self.hosts.is_empty()).then(|| HostTime {
                packing_us: host(|time| time.packing_us),
                rendezvous_us: host(|time| time.rendezvous_us),
                planning_us: host(|time| time.planning_us),
                enqueueing_us: host(|time| time.enqueueing_us),
            }),
            breakdown,
            accounts_complete: breakdown.unexplained() * 50 <= breakdown.wall,
            peak_bytes: self.peak_bytes,
            ratio_to_serial: serial.and_then(ratio_to),
            ratio_to_base: base.and_then(ratio_to),
            pacing: PacingFigures::of(&self.pacing),
            decisions: self.engine.schedule().map(|report| Decisions {
                layers: report.layers,
                searches: report.searches,
                sampled: report.sampled,
                mispredicted: report.mispredicted,
                correction: report.correction,
            }),
        }
    }
}

/// A row for each; with `against_base`, compared with the first too.
pub(super) fn rows(contenders: &[Contender], against_base: bool) -> Vec<Row> {
    let base = contenders.first().filter(|_| against_base);
    let row = |contender: &Contender| {
        contender.row(contenders.iter().find(|other| other.is_serial_of(contender)), base)
    };
    contenders.iter().map(row).collect()
}

fn peak_bytes(step: &StepReport) -> u64 {
    let layers = step.outputs.iter().flat_map(|output| &output.layers);
    layers.map(|layer| layer.peak_bytes).max().unwrap_or(0)
}

/// The table of a step's last MoE layer, as the first rank ran it.
fn last_table(step: &StepReport) -> Option<StageTable> {
    let layers = &step.outputs.first()?.layers;
    layers.iter().rev().find_map(|layer| layer.tables.last()).cloned()
}

/// All schedules' last rounds in one timeline; each has ranks of its own there.
pub(super) fn side_by_side(contenders: &[Contender]) -> Timeline {
    let ranks = contenders.iter().flat_map(|contender| &contender.timeline.spans).map(|span| span.rank.0 + 1);
    let ranks = ranks.max().unwrap_or(0);
    let spans = contenders.iter().enumerate().flat_map(|(index, contender)| {
        let start = contender.timeline.spans.iter().map(|span| span.start_ns).min().unwrap_or(0);
        contender.timeline.spans.iter().map(move |span| Span {
            rank: Rank(span.rank.0 + index * ranks),
            start_ns: span.start_ns - start,
            end_ns: span.end_ns - start,
            ..span.clone()
        })
    });
    Timeline { spans: spans.collect() }
}
