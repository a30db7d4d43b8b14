//! Plans layer after layer by what they are predicted to cost, and corrects the prediction by what they did cost.
//!
//! Every rank has an [`AutoPlanner`]. It decides from the gathered counts and from what all ranks told each other, never
//! from what only its own rank knows, so that all of them decide alike:
//!
//! ```text
//! counts meet  learn (what all ranks measured) → plan (cuts by the decision of the layer's bucket)
//! … the layer runs …
//! after a step observe (this rank's spans beside the simulation) → search for new buckets, off the critical path
//! ```
//!
//! A model is off by some percent, and plans are closer to each other than that. So a search leaves several, and layers that are
//! sampled run by them in turn until it is known which of them takes least ([`Contest`]).
//!
//! It moves only what does not change bits: stages, cuts, orders, kernels that give equal bits, and the place of the
//! shared expert, which a layer takes from the decision before it because it may compute beside the count exchange.

use super::contest::Contest;
use super::fixed::uncounted_table;
use super::{
    Ahead, Feedback, LayerPlan, LayerSample, MOST_TRIALS, PlanReport, Planner, PredictedMeasured,
    ScheduleReport, Trial,
};
use crate::search::{Bucket, SearchOptions, cuts_for, search};
use crate::simulate::{StageTimes, Workload, predict_ns, simulate};
use crate::{
    Correction, CostModel, GemmKind, LayerHistograms, LayerSizes, LayerWindow, PlanError, SharedExpert,
    SlotMap, Span, StageTable, Timeline,
};
use epsmoe_base::{Lane, Layer, Phase, Rank, Stage, hash_bytes};
use std::collections::BTreeMap;
use std::sync::Arc;

/// What was decided for the layers of a bucket.
#[derive(Clone, Debug)]
struct Decided {
    /// Plans, and which of them is best.
    contest: Contest,
    /// Which of this planner's searches found them.
    search: u32,
    /// The model's correction when it was made.
    correction: Correction,
    /// The search in words.
    reason: String,
    /// Layers it planned.
    layers: u64,
    /// How many it had planned when it was made.
    since: u64,
    /// The layer that was sampled last, on this rank.
    last_sample: Option<LayerSample>,
}

/// A layer that ran, kept until its spans are there.
#[derive(Clone, Debug)]
struct Ran {
    layer: Layer,
    map: SlotMap,
    bucket: Bucket,
    counts: LayerHistograms,
    table: StageTable,
    /// The plan that is being tried, if one is.
    trial: Option<Trial>,
}

/// See the module.
#[derive(Clone, Debug)]
pub struct AutoPlanner {
    shape: LayerSizes,
    options: SearchOptions,
    /// As it was measured, or assumed, before the run.
    start: Arc<CostModel>,
    /// The same, corrected.
    cost: CostModel,
    correction: Correction,
    decisions: BTreeMap<Bucket, Decided>,
    /// A hash of the correction and the decisions: they change seldom, and it travels with every layer's counts.
    known: u64,
    /// Where the next layer's shared expert computes.
    shared: SharedExpert,
    /// Layers whose buckets wait for a search.
    waiting: BTreeMap<Bucket, (SlotMap, LayerHistograms)>,
    /// The last layers that ran, at most [`SAMPLED`].
    ran: Vec<Ran>,
    /// The last layer of this step that was planned.
    planned: Option<Layer>,
    /// Whether the last look at layers left the correction about as it was, or there were many: until then plans are chosen by a
    /// model that is still moving.
    steady: bool,
    /// How often layers were looked at.
    looks: u32,
    /// Whether what layers take is being recorded.
    recorded: bool,
    /// Steps until layers are sampled again.
    rest: u32,
    feedback: Option<Feedback>,
    layers: u64,
    searches: u64,
    sampled: u64,
    mispredicted: u64,
}

/// Most layers of a step that are sampled.
const SAMPLED: usize = MOST_TRIALS;

/// Steps between samples when predictions hold.
const REST: u32 = 8;

/// A prediction that holds this well, in percent, is left alone.
const HOLDS: u64 = 4;

/// Work shorter than this says more about the clock than about the machine.
const SHORTEST_NS: u64 = 20_000;

/// Looks at layers after which plans are tried though the correction still moves: clocks may be that bad.
const MOST_LOOKS: u32 = 8;

/// A decision is searched for again when a factor has moved by more than this, in permille.
const MOVED: u64 = 80;

impl AutoPlanner {
    /// For layers of one shape. Ranks whose arguments are equal plan alike.
    pub fn new(shape: LayerSizes, cost: Arc<CostModel>, options: SearchOptions) -> Self {
        AutoPlanner {
            shape,
            shared: options.shared.unwrap_or(SharedExpert::BesideCountExchange),
            options,
            cost: CostModel::clone(&cost),
            start: cost,
            correction: Correction::default(),
            decisions: BTreeMap::new(),
            known: 0,
            waiting: BTreeMap::new(),
            ran: Vec::new(),
            planned: None,
            steady: false,
            looks: 0,
            recorded: true,
            rest: 0,
            feedback: None,
            layers: 0,
            searches: 0,
            sampled: 0,
            mispredicted: 0,
        }
    }

    /// What all ranks saw: corrects the cost model half way, within bounds, and not at all where predictions hold.
    fn learn(&mut self, feedback: &[Feedback]) {
        let Some(first) = feedback.first() else { return };
        self.note_trials(feedback);
        self.correct(first, feedback);
        self.remember();
    }

    fn note_trials(&mut self, feedback: &[Feedback]) {
        for number in 0..MOST_TRIALS {
            let trial = Trial::of_ranks(feedback.iter().map(|feedback| feedback.trials[number]));
            let Some(trial) = trial else { continue };
            let decided = self.decisions.get_mut(&trial.bucket).filter(|of| of.search == trial.search);
            if let Some(decided) = decided {
                decided.contest.note(&trial);
            }
        }
    }

    fn correct(&mut self, first: &Feedback, feedback: &[Feedback]) {
        let mut all = Feedback::default();
        let mut link = first.link;
        for feedback in feedback {
            all.add(feedback);
            // The rank that came last to the exchanges waited least.
            link = link.less(feedback.link);
        }
        let step = |factor: u64, times: PredictedMeasured| {
            if times.measured_ns < SHORTEST_NS || !times.misses_by(HOLDS) {
                return factor;
            }
            Correction::step(factor, times.predicted_ns, times.measured_ns)
        };
        let before = self.correction;
        let grouped = step(before.grouped, all.grouped);
        let dense = step(before.dense, all.dense);
        // A kernel that nobody uses is as far off as the other: it might be the better one.
        let like = |own: u64, other: u64, now: u64| (own * now / other.max(1)).clamp(1000 / 16, 16_000);
        let unused = |times: PredictedMeasured| times.measured_ns == 0;
        self.correction = Correction {
            link: step(before.link, link),
            grouped: if unused(all.grouped) { like(before.grouped, before.dense, dense) } else { grouped },
            dense: if unused(all.dense) { like(before.dense, before.grouped, grouped) } else { dense },
            rows: step(before.rows, all.rows),
        };
        self.looks = self.looks.saturating_add(1);
        self.steady = self.looks >= MOST_LOOKS || !before.is_far_from(&self.correction);
        if self.correction == before {
            return;
        }
        self.cost = self.start.corrected(&self.correction);
        self.rest = 0;
    }

    /// The table of a layer. In a bucket that was not seen before the layer follows its nearest neighbour; the very first
    /// layer of a run waits for its search.
    fn table(&mut self, layer: Layer, map: &SlotMap, counts: &LayerHistograms) -> StageTable {
        let shape = self.shape;
        let workload = Workload { map, counts, shape: &shape };
        let bucket = Bucket::of(&workload);
        let shared = self.shared;
        if self.decisions.is_empty() {
            self.decide(bucket, map, counts);
        }
        let known = self.decisions.get(&bucket);
        if known.is_none_or(|decided| decided.is_stale(&self.correction)) {
            self.waiting.entry(bucket).or_insert_with(|| (map.clone(), counts.clone()));
        }
        let nearest = match known {
            Some(_) => bucket,
            None => self.nearest(bucket),
        };
        let Some(decided) = self.decisions.get_mut(&nearest) else {
            unreachable!("the first layer decided its bucket")
        };
        decided.layers += 1;
        self.layers += 1;
        let is_sampled = self.recorded && self.rest == 0 && self.ran.len() < SAMPLED;
        let trial = if is_sampled && self.steady { decided.contest.next_trial() } else { None };
        let decision = decided.contest.decision(trial.unwrap_or_else(|| decided.contest.best()));
        self.shared = decision.shared;
        let is_whole = decision.shared == shared;
        let table = StageTable { shared, ..cuts_for(decision, &workload, &self.cost) };
        if self.planned.replace(layer) == Some(layer) {
            // In chunks: its spans are not one table's.
            self.ran.retain(|ran| ran.layer != layer);
        } else if is_sampled && (is_whole || trial.is_none()) {
            // The shared expert of a layer whose plan is another than the last one's is where the last one's was: no trial.
            let trial = trial.inspect(|&plan| decided.contest.attempt(plan)).map(|plan| Trial {
                bucket: nearest,
                search: decided.search,
                plan: plan as u32,
                permille: 0,
            });
            let (map, counts, table) = (map.clone(), counts.clone(), table.clone());
            self.ran.push(Ran { layer, map, bucket: nearest, counts, table, trial });
        }
        table
    }

    fn nearest(&self, bucket: Bucket) -> Bucket {
        let distance = |other: &Bucket| {
            (other.tokens.abs_diff(bucket.tokens) + other.skew.abs_diff(bucket.skew), *other)
        };
        self.decisions.keys().copied().min_by_key(distance).unwrap_or(bucket)
    }

    fn decide(&mut self, bucket: Bucket, map: &SlotMap, counts: &LayerHistograms) {
        let shape = self.shape;
        let workload = Workload { map, counts, shape: &shape };
        let choice = search(&workload, &self.cost, &self.options);
        let before = self.decisions.get(&bucket);
        let (layers, last_sample) =
            before.map_or((0, None), |before| (before.layers, before.last_sample.clone()));
        let (correction, reason) = (self.correction, choice.explain());
        let (contest, search) = (Contest::new(&choice), self.searches as u32);
        let decided = Decided { contest, search, correction, reason, layers, since: layers, last_sample };
        self.decisions.insert(bucket, decided);
        self.searches += 1;
        self.remember();
    }

    fn remember(&mut self) {
        let contests: Vec<_> = self
            .decisions
            .iter()
            .map(|(bucket, decided)| (bucket, decided.search, &decided.contest))
            .collect();
        let state = format!("{:?} {contests:?}", self.correction);
        self.known = hash_bytes(state.as_bytes());
    }

    /// What a layer took beside what it was predicted to, and the trial that it was.
    fn compare(&mut self, rank: Rank, ran: &Ran, spans: &[Span]) -> (Feedback, Option<Trial>) {
        let measured: Vec<&Span> =
            spans.iter().filter(|span| span.layer == Some(ran.layer) && span.rank == rank).collect();
        let workload = Workload { map: &ran.map, counts: &ran.counts, shape: &self.shape };
        let predicted = simulate(&ran.table, &workload, &self.cost).timeline;
        let all: Vec<&Span> = predicted.spans.iter().filter(|span| span.rank == rank).collect();
        let feedback = Feedback::of(rank, &ran.table, &predicted, &measured);
        // Replayed routing leaves no choice of experts to begin with.
        let window = |spans: &[&Span]| LayerWindow::of(spans.iter().copied()).pop();
        let Some((planned, took)) = window(&all).zip(window(&measured)) else { return (feedback, ran.trial) };
        let stages = (0..ran.table.stages()).map(Stage);
        let sample = LayerSample {
            layer: PredictedMeasured { predicted_ns: planned.duration_ns(), measured_ns: took.duration_ns() },
            stages: stages.map(|stage| (stage_times(&all, stage), stage_times(&measured, stage))).collect(),
            predicted: since(&all, &planned),
            measured: since(&measured, &took),
        };
        self.sampled += 1;
        self.mispredicted += u64::from(sample.layer.misses_by(ScheduleReport::MISPREDICTED_PERCENT));
        let decided = self.decisions.get_mut(&ran.bucket);
        let trial = ran.trial.zip(decided.as_ref()).map(|(trial, decided)| {
            // By what the layer's own counts need, as layers are compared that have others.
            let first = cuts_for(decided.contest.decision(0), &workload, &self.cost);
            let predicted = predict_ns(&first, &workload, &self.cost).max(1);
            Trial { permille: (took.duration_ns() * 1000 / predicted).max(1), ..trial }
        });
        if let Some(decided) = decided {
            decided.last_sample = Some(sample);
        }
        (feedback, trial)
    }
}

impl Planner for AutoPlanner {
    fn ahead(&self, map: &SlotMap) -> Result<Ahead, PlanError> {
        // A layer without counts is one stage, unless dense products were asked for, whose bits may be others.
        let grouped = self.options.kernels.contains(&GemmKind::Grouped);
        let table = grouped.then(|| uncounted_table(map, self.options.shared));
        Ok(Ahead { shared: self.shared, batches: 1, table })
    }

    fn plan(
        &mut self,
        layer: Layer,
        map: &SlotMap,
        counts: &[LayerHistograms],
        feedback: &[Feedback],
    ) -> Result<LayerPlan, PlanError> {
        self.learn(feedback);
        Ok(LayerPlan { tables: counts.iter().map(|counts| self.table(layer, map, counts)).collect() })
    }

    fn take_feedback(&mut self) -> Option<Feedback> {
        self.feedback.take()
    }

    fn wants_spans(&self) -> bool {
        self.rest == 0
    }

    fn set_recorded(&mut self, recorded: bool) {
        self.recorded = recorded;
    }

    /// Compares the layers that were sampled with their simulation, and searches for the buckets that wait.
    fn observe(&mut self, rank: Rank, spans: &[Span]) {
        self.rest = self.rest.saturating_sub(1);
        self.planned = None;
        let mut feedback = Feedback::default();
        if self.rest == 0 && self.ran.is_empty() {
            // A step of layers that nobody planned, as the next ones may be.
            self.rest = REST;
        }
        let all_ran = std::mem::take(&mut self.ran);
        for (number, ran) in all_ran.iter().enumerate() {
            let (of_layer, trial) = self.compare(rank, ran, spans);
            // The model is corrected for the plan that is thought best: others would pull it to and fro.
            if trial.is_none_or(|trial| trial.plan == 0) {
                feedback.add(&of_layer);
            }
            feedback.trials[number] = trial.unwrap_or_default();
            self.rest = REST;
        }
        if feedback != Feedback::default() {
            self.feedback = Some(feedback);
        }
        for (bucket, (map, counts)) in std::mem::take(&mut self.waiting) {
            self.decide(bucket, &map, &counts);
        }
        let is_open = |bucket| self.decisions.get(bucket).is_some_and(|of| of.contest.next_trial().is_some());
        if all_ran.iter().any(|ran| is_open(&ran.bucket)) {
            self.rest = 0;
        }
    }

    fn digest(&self) -> u64 {
        // What is tried next follows from the layers that were sampled in this step, too.
        let of_step = (self.recorded, self.steady, self.rest, self.ran.len(), self.layers);
        let state = format!("{} {:?} {of_step:?}", self.known, self.shared);
        hash_bytes(state.as_bytes())
    }

    fn report(&self) -> Option<ScheduleReport> {
        let plan = |(bucket, decided): (&Bucket, &Decided)| PlanReport {
            bucket: *bucket,
            stages: decided.contest.decision(decided.contest.best()).gemm.len(),
            layers: decided.layers,
            tried: decided.contest.standings(),
            reason: decided.reason.clone(),
            last_sample: decided.last_sample.clone(),
        };
        Some(ScheduleReport {
            layers: self.layers,
            searches: self.searches,
            sampled: self.sampled,
            mispredicted: self.mispredicted,
            correction: self.correction,
            trying: !self.steady
                || self.decisions.values().any(|decided| decided.contest.next_trial().is_some()),
            plans: self.decisions.iter().map(plan).collect(),
        })
    }
}

impl Correction {
    /// Whether a factor is further away than [`MOVED`].
    fn is_far_from(&self, other: &Correction) -> bool {
        let factors = |correction: &Correction| {
            let Correction { link, grouped, dense, rows } = *correction;
            [link, grouped, dense, rows]
        };
        let mut pairs = factors(self).into_iter().zip(factors(other));
        pairs.any(|(then, now)| then.abs_diff(now) * 1000 > then * MOVED)
    }
}

impl Decided {
    /// Whether a factor has moved enough since to look again. A search costs as much as some layers: the next one
    /// waits until half as many more have run as before it.
    fn is_stale(&self, now: &Correction) -> bool {
        let moved = self.correction.is_far_from(now);
        moved && self.layers - self.since >= self.since / 2
    }
}

/// What happened in a window, from its start.
fn since(spans: &[&Span], window: &LayerWindow) -> Timeline {
    let &LayerWindow { start_ns: start, end_ns: end, .. } = window;
    let inside = spans.iter().filter(|span| span.end_ns > start && span.start_ns < end);
    let moved = inside.map(|&span| Span {
        start_ns: span.start_ns.saturating_sub(start),
        end_ns: span.end_ns.saturating_sub(start),
        ..span.clone()
    });
    Timeline { spans: moved.collect() }
}

fn stage_times(spans: &[&Span], stage: Stage) -> StageTimes {
    let sum = |wanted: &dyn Fn(&Span) -> bool| {
        let of_stage = spans.iter().filter(|span| span.stage == Some(stage) && wanted(span));
        of_stage.map(|span| span.duration_ns()).sum()
    };
    StageTimes {
        dispatch_ns: sum(&|span| span.phase == Phase::Dispatch),
        compute_ns: sum(&|span| span.lane == Lane::Compute),
        combine_ns: sum(&|span| span.phase == Phase::Combine),
    }
}
