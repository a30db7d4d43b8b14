//! What ranks learn from layers that they sample, and tell each other.

use crate::search::Bucket;
use crate::{GemmKind, Span, StageTable, Timeline};
use epsmoe_base::{Phase, Rank};

/// What a kind of work was predicted to take on a rank, and what it took, in nanoseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PredictedMeasured {
    /// By the cost model as it was corrected then.
    pub predicted_ns: u64,
    /// By the clock.
    pub measured_ns: u64,
}

impl PredictedMeasured {
    pub(super) fn add(&mut self, other: PredictedMeasured) {
        // Other ranks may say anything.
        self.predicted_ns = self.predicted_ns.saturating_add(other.predicted_ns);
        self.measured_ns = self.measured_ns.saturating_add(other.measured_ns);
    }

    pub(super) fn less(self, other: PredictedMeasured) -> PredictedMeasured {
        PredictedMeasured {
            predicted_ns: self.predicted_ns.min(other.predicted_ns),
            measured_ns: self.measured_ns.min(other.measured_ns),
        }
    }

    /// Whether the two are more than `percent` of the measured time apart.
    pub(super) fn misses_by(self, percent: u64) -> bool {
        let apart = self.predicted_ns.abs_diff(self.measured_ns);
        u128::from(apart) * 100 > u128::from(self.measured_ns) * u128::from(percent)
    }
}

/// What one rank learned from layers that it sampled: the kinds of work that a [`Correction`](crate::Correction) has a factor for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Feedback {
    /// Exchanges, with their waiting for other ranks.
    pub link: PredictedMeasured,
    /// Grouped products of the stages.
    pub grouped: PredictedMeasured,
    /// Dense products of the stages.
    pub dense: PredictedMeasured,
    /// Rows packed, picked and added.
    pub rows: PredictedMeasured,
    /// Layers that ran by a plan that is being tried.
    pub trials: [Trial; MOST_TRIALS],
}

/// A layer that ran by one of the plans that a search left to be tried.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Trial {
    /// The layers that it is to be best for.
    pub bucket: Bucket,
    /// Which of the bucket's searches the plan is of.
    pub search: u32,
    /// Which of that search's plans, the cheapest by the model first.
    pub plan: u32,
    /// What the layer took on a rank, in permille of what the model says of the first plan; 0 if there was no trial, or nobody
    /// saw what it took.
    pub permille: u64,
}

/// Most trials of a step.
pub const MOST_TRIALS: usize = 4;

impl Feedback {
    /// Bytes of the message to the other ranks.
    pub const ENCODED_LEN: usize = 64 + MOST_TRIALS * Trial::ENCODED_LEN;

    /// Sorts the spans of one layer of one rank, as simulated and as measured.
    pub(super) fn of(rank: Rank, table: &StageTable, predicted: &Timeline, measured: &[&Span]) -> Self {
        let mut feedback = Feedback::default();
        for span in predicted.spans.iter().filter(|span| span.rank == rank) {
            if let Some(times) = feedback.kind_of(table, span) {
                times.predicted_ns += span.duration_ns();
            }
        }
        for span in measured {
            if let Some(times) = feedback.kind_of(table, span) {
                times.measured_ns += span.duration_ns();
            }
        }
        feedback
    }

    fn kind_of(&mut self, table: &StageTable, span: &Span) -> Option<&mut PredictedMeasured> {
        match span.phase {
            Phase::Metadata | Phase::Dispatch | Phase::Combine => Some(&mut self.link),
            Phase::GateUp | Phase::Down => match table.gemm.get(span.stage?.0)? {
                GemmKind::Grouped => Some(&mut self.grouped),
                GemmKind::Dense => Some(&mut self.dense),
            },
            Phase::Pack | Phase::Expand | Phase::Reduce | Phase::Sum => Some(&mut self.rows),
            _ => None,
        }
    }

    fn kinds(&self) -> [PredictedMeasured; 4] {
        [self.link, self.grouped, self.dense, self.rows]
    }

    /// The message to the other ranks.
    pub fn encode(&self) -> Vec<u8> {
        let times = self.kinds().into_iter().flat_map(|times| [times.predicted_ns, times.measured_ns]);
        times.chain(self.trials.iter().flat_map(Trial::numbers)).flat_map(u64::to_le_bytes).collect()
    }

    /// Reads another rank's message; nothing if it is none.
    pub fn decode(bytes: &[u8]) -> Option<Self> {
        let (words, []) = bytes.as_chunks::<8>() else { return None };
        let numbers: Vec<u64> = words.iter().map(|&word| u64::from_le_bytes(word)).collect();
        let (times, trials) = numbers.split_at_checked(8)?;
        let (pairs, []) = times.as_chunks::<2>() else { return None };
        let [link, grouped, dense, rows] = pairs else { return None };
        let (trials, []) = trials.as_chunks::<3>() else { return None };
        let trials: &[[u64; 3]; MOST_TRIALS] = trials.try_into().ok()?;
        let times = |&[predicted_ns, measured_ns]: &[u64; 2]| PredictedMeasured { predicted_ns, measured_ns };
        let (link, grouped, dense, rows) = (times(link), times(grouped), times(dense), times(rows));
        Some(Feedback { link, grouped, dense, rows, trials: trials.map(Trial::of_numbers) })
    }

    pub(super) fn add(&mut self, other: &Feedback) {
        self.link.add(other.link);
        self.grouped.add(other.grouped);
        self.dense.add(other.dense);
        self.rows.add(other.rows);
    }
}

impl Trial {
    const ENCODED_LEN: usize = 24;

    fn numbers(&self) -> [u64; 3] {
        let Trial { bucket, search, plan, permille } = *self;
        let pair = |high: u32, low: u32| u64::from(high) << 32 | u64::from(low);
        [pair(bucket.tokens, bucket.skew), pair(search, plan), permille]
    }

    fn of_numbers([bucket, plan, permille]: [u64; 3]) -> Self {
        let pair = |number: u64| ((number >> 32) as u32, number as u32);
        let ((tokens, skew), (search, plan)) = (pair(bucket), pair(plan));
        Trial { bucket: Bucket { tokens, skew }, search, plan, permille }
    }

    /// What all ranks saw of one trial: it took as long as on the rank on which it took longest. Nothing if some rank saw nothing,
    /// or another trial.
    pub(super) fn of_ranks(trials: impl IntoIterator<Item = Trial>) -> Option<Trial> {
        let one = |slowest: Trial, other: Trial| {
            let is_same = Trial { permille: 0, ..slowest } == Trial { permille: 0, ..other };
            (is_same && slowest.permille.min(other.permille) > 0)
                .then(|| Trial { permille: slowest.permille.max(other.permille), ..slowest })
        };
        let mut trials = trials.into_iter();
        let first = trials.next().filter(|trial| trial.permille > 0)?;
        trials.try_fold(first, one)
    }
}
