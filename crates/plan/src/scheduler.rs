//! Plans layer after layer by what they are predicted to cost, and corrects the prediction by what they did cost.
//!
//! Every rank has a [`Scheduler`]. It decides from the gathered counts and from what all ranks told each other, never
//! from what only its own rank knows, so that all of them decide alike:
//!
//! ```text
//! rendezvous   learn (what all ranks measured) → plan (cuts by the decision of the layer's bucket)
//! … the layer runs …
//! after a step observe (this rank's spans beside the simulation) → search for new buckets, off the critical path
//! ```
//!
//! It moves only what does not change bits: stages, cuts, orders, kernels that give equal bits, and the place of the
//! shared expert, which a layer takes from the decision before it because it may compute beside the rendezvous.

use crate::search::{Bucket, Decision, SearchOptions, cuts_for, search};
use crate::simulate::{LayerShape, StageTimes, Workload, simulate};
use crate::time_breakdown::moe_layers;
use crate::{
    Correction, CostModel, GemmKind, LayerHistograms, Placement, SharedExpert, Span, StageTable, Timeline,
};
use epsmoe_base::{Lane, Layer, Rank, Stage, count, hash_bytes};
use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

/// What a kind of work was predicted to take on a rank, and what it took, in nanoseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PredictedMeasured {
    /// By the cost model as it was corrected then.
    pub predicted_ns: u64,
    /// By the clock.
    pub measured_ns: u64,
}

impl PredictedMeasured {
    fn add(&mut self, other: PredictedMeasured) {
        self.predicted_ns += other.predicted_ns;
        self.measured_ns += other.measured_ns;
    }

    fn less(self, other: PredictedMeasured) -> PredictedMeasured {
        PredictedMeasured {
            predicted_ns: self.predicted_ns.min(other.predicted_ns),
            measured_ns: self.measured_ns.min(other.measured_ns),
        }
    }

    /// Whether the two are more than `percent` of the measured time apart.
    fn misses_by(self, percent: u64) -> bool {
        self.predicted_ns.abs_diff(self.measured_ns) * 100 > self.measured_ns * percent
    }
}

/// What one rank learned from layers it watched: the kinds of work that a [`Correction`] has a factor for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Feedback {
    /// Exchanges, with their waiting for other ranks.
    pub link: PredictedMeasured,
    /// Grouped products of the stages.
    pub grouped: PredictedMeasured,
    /// Dense products of the stages.
    pub dense: PredictedMeasured,
    /// Rows picked and added.
    pub rows: PredictedMeasured,
}

impl Feedback {
    /// Bytes of the message to the other ranks.
    pub const ENCODED_LEN: usize = 64;

    /// Sorts the spans of one layer of one rank, as simulated and as measured.
    fn of(rank: Rank, table: &StageTable, predicted: &Timeline, measured: &[&Span]) -> Self {
        let mut feedback = Feedback::default();
        for span in predicted.spans.iter().filter(|span| span.rank == rank) {
            if let Some(look) = feedback.look_of(table, span) {
                look.predicted_ns += span.duration_ns();
            }
        }
        for span in measured {
            if let Some(look) = feedback.look_of(table, span) {
                look.measured_ns += span.duration_ns();
            }
        }
        feedback
    }

    fn look_of(&mut self, table: &StageTable, span: &Span) -> Option<&mut PredictedMeasured> {
        match (span.lane, span.name.as_ref(), span.stage) {
            (Lane::Transfer, _, _) => Some(&mut self.link),
            (_, "gemm", Some(stage)) => match table.gemm.get(stage.0)? {
                GemmKind::Grouped => Some(&mut self.grouped),
                GemmKind::Dense => Some(&mut self.dense),
            },
            (_, "gather" | "reduce", _) => Some(&mut self.rows),
            _ => None,
        }
    }

    fn looks(&self) -> [PredictedMeasured; 4] {
        [self.link, self.grouped, self.dense, self.rows]
    }

    /// The message to the other ranks.
    pub fn encode(&self) -> Vec<u8> {
        let numbers = self.looks().into_iter().flat_map(|look| [look.predicted_ns, look.measured_ns]);
        numbers.flat_map(u64::to_le_bytes).collect()
    }

    /// Reads another rank's message; nothing if it is none.
    pub fn decode(bytes: &[u8]) -> Option<Self> {
        let (words, []) = bytes.as_chunks::<8>() else { return None };
        let numbers: Vec<u64> = words.iter().map(|&word| u64::from_le_bytes(word)).collect();
        let (pairs, []) = numbers.as_chunks::<2>() else { return None };
        let [link, grouped, dense, rows] = pairs else { return None };
        let look = |&[predicted_ns, measured_ns]: &[u64; 2]| PredictedMeasured { predicted_ns, measured_ns };
        Some(Feedback { link: look(link), grouped: look(grouped), dense: look(dense), rows: look(rows) })
    }

    fn add(&mut self, other: &Feedback) {
        self.link.add(other.link);
        self.grouped.add(other.grouped);
        self.dense.add(other.dense);
        self.rows.add(other.rows);
    }
}

/// A decision with what is known about it.
#[derive(Clone, Debug)]
struct Decided {
    decision: Decision,
    /// The model's correction when it was made.
    correction: Correction,
    /// The search in words.
    reason: String,
    /// Layers it planned.
    layers: u64,
    /// How many it had planned when it was made.
    since: u64,
    /// The layer that was watched last, on this rank.
    watched: Option<LayerSample>,
}

/// One layer as it was predicted and as it went, on one rank.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LayerSample {
    /// From the choice of experts to the sum at home.
    pub layer: PredictedMeasured,
    /// `[S]` predicted, measured.
    pub stages: Vec<(StageTimes, StageTimes)>,
    /// Both lanes of the rank as predicted, from the choice of experts.
    pub predicted: Timeline,
    /// The same as measured.
    pub measured: Timeline,
}

/// A layer that ran, kept until its spans are there.
#[derive(Clone, Debug)]
struct Ran {
    layer: Layer,
    bucket: Bucket,
    counts: LayerHistograms,
    table: StageTable,
    share: usize,
}

/// How the layers of a run were planned.
#[derive(Clone, Debug, Default)]
pub struct ScheduleReport {
    /// Layers planned.
    pub layers: u64,
    /// Searches made: one for every bucket, and again when the correction had moved.
    pub searches: u64,
    /// Layers whose prediction was compared with the clock.
    pub watched: u64,
    /// Of these, whose time was more than [`ScheduleReport::MISPREDICTED_PERCENT`] off.
    pub mispredicted: u64,
    /// What the cost model is multiplied by.
    pub correction: Correction,
    /// By bucket.
    pub plans: Vec<PlanReport>,
}

/// The plan of one bucket.
#[derive(Clone, Debug)]
pub struct PlanReport {
    /// Which layers.
    pub bucket: Bucket,
    /// Stages.
    pub stages: usize,
    /// How many layers.
    pub layers: u64,
    /// What was chosen and what it beat.
    pub reason: String,
    /// The last layer that was watched.
    pub watched: Option<LayerSample>,
}

impl ScheduleReport {
    /// A prediction that is off by more than this is counted as a misprediction.
    pub const MISPREDICTED_PERCENT: u64 = 20;

    /// Stages of the plan that most layers ran by.
    pub fn usual_stages(&self) -> usize {
        self.plans.iter().max_by_key(|plan| plan.layers).map_or(1, |plan| plan.stages)
    }
}

/// See the module.
#[derive(Clone, Debug)]
pub struct Scheduler {
    placement: Placement,
    shape: LayerShape,
    options: SearchOptions,
    /// As it was measured, or assumed, before the run.
    start: Arc<CostModel>,
    /// The same, corrected.
    cost: CostModel,
    correction: Correction,
    decisions: BTreeMap<Bucket, Decided>,
    /// Where the next layer's shared expert computes.
    shared: SharedExpert,
    /// Layers whose buckets wait for a search.
    waiting: BTreeMap<Bucket, LayerHistograms>,
    /// The last layers that ran, at most [`WATCHED`].
    ran: Vec<Ran>,
    /// The last layer of this step that was planned.
    planned: Option<Layer>,
    /// Steps until layers are watched again.
    rest: u32,
    feedback: Option<Feedback>,
    layers: u64,
    searches: u64,
    watched: u64,
    mispredicted: u64,
}

/// Most layers of a step that are watched.
const WATCHED: usize = 4;

/// Steps between looks when predictions hold.
const REST: u32 = 8;

/// A prediction that holds this well, in percent, is left alone.
const HOLDS: u64 = 4;

/// Work shorter than this says more about the clock than about the machine.
const SHORTEST_NS: u64 = 20_000;

/// A decision is searched for again when a factor has moved by more than this, in permille.
const MOVED: u64 = 80;

impl Scheduler {
    /// For layers of one shape. Ranks whose arguments are equal plan alike.
    pub fn new(
        placement: Placement,
        shape: LayerShape,
        cost: Arc<CostModel>,
        options: SearchOptions,
    ) -> Self {
        Scheduler {
            placement,
            shape,
            shared: options.shared.unwrap_or(SharedExpert::BesideRendezvous),
            options,
            cost: CostModel::clone(&cost),
            start: cost,
            correction: Correction::default(),
            decisions: BTreeMap::new(),
            waiting: BTreeMap::new(),
            ran: Vec::new(),
            planned: None,
            rest: 0,
            feedback: None,
            layers: 0,
            searches: 0,
            watched: 0,
            mispredicted: 0,
        }
    }

    /// Where the shared expert of the next layer computes.
    pub fn shared_expert(&self) -> SharedExpert {
        self.shared
    }

    /// What this rank has to tell the others, once.
    pub fn take_feedback(&mut self) -> Option<Feedback> {
        self.feedback.take()
    }

    /// A hash of everything that plans follow from besides the counts. Ranks whose hashes are equal plan alike.
    pub fn digest(&self) -> u64 {
        let decisions: Vec<_> =
            self.decisions.iter().map(|(bucket, decided)| (bucket, &decided.decision)).collect();
        let state = format!("{:?} {:?} {decisions:?}", self.correction, self.shared);
        hash_bytes(state.as_bytes())
    }

    /// The table of a layer, from the counts and the feedback that the rendezvous gathered, both in rank order.
    ///
    /// In a bucket that was not seen before the layer follows its nearest neighbour; the very first layer of a run
    /// waits for its search.
    pub fn next_table(
        &mut self,
        layer: Layer,
        counts: &LayerHistograms,
        feedback: &[Feedback],
    ) -> StageTable {
        self.learn(feedback);
        self.plan(layer, counts)
    }

    /// Corrects the cost model: half way, within bounds, and not at all where predictions hold.
    fn learn(&mut self, feedback: &[Feedback]) {
        let Some(first) = feedback.first() else { return };
        let mut all = Feedback::default();
        let mut link = first.link;
        for feedback in feedback {
            all.add(feedback);
            // The rank that came last to the exchanges waited least.
            link = link.less(feedback.link);
        }
        let step = |factor: u64, look: PredictedMeasured| {
            if look.measured_ns < SHORTEST_NS || !look.misses_by(HOLDS) {
                return factor;
            }
            Correction::step(factor, look.predicted_ns, look.measured_ns)
        };
        let before = self.correction;
        let grouped = step(before.grouped, all.grouped);
        let dense = step(before.dense, all.dense);
        // A kernel that nobody uses is as far off as the other: it might be the better one.
        let like = |own: u64, other: u64, now: u64| (own * now / other.max(1)).clamp(1000 / 16, 16_000);
        let unused = |look: PredictedMeasured| look.measured_ns == 0;
        self.correction = Correction {
            link: step(before.link, link),
            grouped: if unused(all.grouped) { like(before.grouped, before.dense, dense) } else { grouped },
            dense: if unused(all.dense) { like(before.dense, before.grouped, grouped) } else { dense },
            rows: step(before.rows, all.rows),
        };
        if self.correction == before {
            return;
        }
        self.cost = self.start.corrected(&self.correction);
        self.rest = 0;
    }

    fn plan(&mut self, layer: Layer, counts: &LayerHistograms) -> StageTable {
        let (placement, shape) = (self.placement, self.shape);
        let workload = Workload { placement: &placement, counts, shape: &shape };
        let bucket = Bucket::of(&workload);
        let shared = self.shared;
        if self.decisions.is_empty() {
            self.decide(bucket, counts);
        }
        let known = self.decisions.get(&bucket);
        if known.is_none_or(|decided| decided.is_stale(&self.correction)) {
            self.waiting.entry(bucket).or_insert_with(|| counts.clone());
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
        self.shared = decided.decision.shared;
        let table = StageTable { shared, ..cuts_for(&decided.decision, &workload, &self.cost) };
        let share = decided.decision.share;
        if self.planned.replace(layer) == Some(layer) {
            // In chunks: its spans are not one table's.
            self.ran.retain(|ran| ran.layer != layer);
        } else if self.rest == 0 && self.ran.len() < WATCHED {
            let (counts, table) = (counts.clone(), table.clone());
            self.ran.push(Ran { layer, bucket: nearest, counts, table, share });
        }
        table
    }

    fn nearest(&self, bucket: Bucket) -> Bucket {
        let distance = |other: &Bucket| {
            (other.tokens.abs_diff(bucket.tokens) + other.skew.abs_diff(bucket.skew), *other)
        };
        self.decisions.keys().copied().min_by_key(distance).unwrap_or(bucket)
    }

    fn decide(&mut self, bucket: Bucket, counts: &LayerHistograms) {
        let (placement, shape) = (self.placement, self.shape);
        let workload = Workload { placement: &placement, counts, shape: &shape };
        let choice = search(&workload, &self.cost, &self.options);
        let before = self.decisions.get(&bucket);
        let (layers, watched) = before.map_or((0, None), |before| (before.layers, before.watched.clone()));
        let (correction, reason) = (self.correction, choice.explain());
        let decided =
            Decided { decision: choice.decision, correction, reason, layers, since: layers, watched };
        self.decisions.insert(bucket, decided);
        self.searches += 1;
    }

    /// After a step: compares the layers that were watched with their simulation, and searches for the buckets that
    /// wait. `spans` are this rank's, of that step.
    pub fn observe(&mut self, rank: Rank, spans: &[Span]) {
        self.rest = self.rest.saturating_sub(1);
        self.planned = None;
        let mut feedback = Feedback::default();
        for ran in std::mem::take(&mut self.ran) {
            feedback.add(&self.compare(rank, &ran, spans));
            self.rest = REST;
        }
        if feedback != Feedback::default() {
            self.feedback = Some(feedback);
        }
        for (bucket, counts) in std::mem::take(&mut self.waiting) {
            self.decide(bucket, &counts);
        }
    }

    fn compare(&mut self, rank: Rank, ran: &Ran, spans: &[Span]) -> Feedback {
        let measured: Vec<&Span> =
            spans.iter().filter(|span| span.layer == Some(ran.layer) && span.rank == rank).collect();
        let workload = Workload { placement: &self.placement, counts: &ran.counts, shape: &self.shape };
        let predicted = simulate(&ran.table, ran.share, &workload, &self.cost).timeline;
        let all: Vec<&Span> = predicted.spans.iter().filter(|span| span.rank == rank).collect();
        let feedback = Feedback::of(rank, &ran.table, &predicted, &measured);
        // Replayed routing leaves no choice of experts to begin with.
        let windows = window(&all, rank).zip(window(&measured, rank));
        let Some(((from, to), (start, end))) = windows else { return feedback };
        let stages = (0..ran.table.stages()).map(Stage);
        let watched = LayerSample {
            layer: PredictedMeasured { predicted_ns: to - from, measured_ns: end - start },
            stages: stages.map(|stage| (stage_times(&all, stage), stage_times(&measured, stage))).collect(),
            predicted: since(&all, from, to),
            measured: since(&measured, start, end),
        };
        self.watched += 1;
        self.mispredicted += u64::from(watched.layer.misses_by(ScheduleReport::MISPREDICTED_PERCENT));
        if let Some(decided) = self.decisions.get_mut(&ran.bucket) {
            decided.watched = Some(watched);
        }
        feedback
    }

    /// How the layers so far were planned.
    pub fn report(&self) -> ScheduleReport {
        let plan = |(bucket, decided): (&Bucket, &Decided)| PlanReport {
            bucket: *bucket,
            stages: decided.decision.gemm.len(),
            layers: decided.layers,
            reason: decided.reason.clone(),
            watched: decided.watched.clone(),
        };
        ScheduleReport {
            layers: self.layers,
            searches: self.searches,
            watched: self.watched,
            mispredicted: self.mispredicted,
            correction: self.correction,
            plans: self.decisions.iter().map(plan).collect(),
        }
    }
}

impl Decided {
    /// Whether a factor has moved enough since to look again. A search costs as much as some layers: the next one
    /// waits until half as many more have run as before it.
    fn is_stale(&self, now: &Correction) -> bool {
        let factors = |correction: &Correction| {
            let Correction { link, grouped, dense, rows } = *correction;
            [link, grouped, dense, rows]
        };
        let mut pairs = factors(&self.correction).into_iter().zip(factors(now));
        let moved = pairs.any(|(then, now)| then.abs_diff(now) * 1000 > then * MOVED);
        moved && self.layers - self.since >= self.since / 2
    }
}

/// From the choice of experts to the sum at home; the longest if a layer ran in chunks.
fn window(spans: &[&Span], rank: Rank) -> Option<(u64, u64)> {
    let spans = spans.iter().map(|&span| span.clone()).collect();
    let layers = moe_layers(&Timeline { spans }, rank);
    layers.into_iter().max_by_key(|(start, end)| end - start)
}

fn since(spans: &[&Span], start: u64, end: u64) -> Timeline {
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
        dispatch_ns: sum(&|span| span.name == "dispatch"),
        compute_ns: sum(&|span| span.lane == Lane::Compute),
        combine_ns: sum(&|span| span.name == "combine"),
    }
}

impl fmt::Display for ScheduleReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Correction { link, grouped, dense, rows } = self.correction;
        writeln!(
            f,
            "{} planned by {}; {} of {} predictions were more than {} % off",
            count(self.layers as usize, "MoE layer"),
            count(self.searches as usize, "decision"),
            self.mispredicted,
            self.watched,
            Self::MISPREDICTED_PERCENT
        )?;
        writeln!(
            f,
            "the machine against its cost model: transfers ×{}, grouped GEMM ×{}, dense GEMM ×{}, rows ×{}",
            Factor(link),
            Factor(grouped),
            Factor(dense),
            Factor(rows)
        )?;
        self.plans.iter().try_for_each(|plan| write!(f, "\n{plan}"))
    }
}

/// Permille, shown as a factor.
struct Factor(u64);

impl fmt::Display for Factor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{:02}", self.0 / 1000, self.0 % 1000 / 10)
    }
}

impl fmt::Display for PlanReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}, {}:", self.bucket, count(self.layers as usize, "layer"))?;
        write!(f, "{}", self.reason)?;
        let Some(watched) = &self.watched else { return Ok(()) };
        let ms = |ns: u64| ns as f64 / 1e6;
        let PredictedMeasured { predicted_ns, measured_ns } = watched.layer;
        writeln!(
            f,
            "last layer watched: predicted {:.3} ms, measured {:.3} ms",
            ms(predicted_ns),
            ms(measured_ns)
        )?;
        for (stage, (predicted, measured)) in watched.stages.iter().enumerate() {
            writeln!(
                f,
                "  {}: dispatch {:.3} → {:.3} ms, compute {:.3} → {:.3} ms, combine {:.3} → {:.3} ms",
                Stage(stage),
                ms(predicted.dispatch_ns),
                ms(measured.dispatch_ns),
                ms(predicted.compute_ns),
                ms(measured.compute_ns),
                ms(predicted.combine_ns),
                ms(measured.combine_ns)
            )?;
        }
        Ok(())
    }
}
