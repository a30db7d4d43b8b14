//! How the layers of a run were planned, for people.

use crate::search::Bucket;
use crate::{Correction, PredictedMeasured, StageTimes, Timeline};
use epsmoe_base::{Stage, count};
use std::fmt;

/// One layer as it was predicted and as it went, on one rank.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LayerSample {
    /// From the choice of experts to the last sum.
    pub layer: PredictedMeasured,
    /// `[S]` predicted, measured.
    pub stages: Vec<(StageTimes, StageTimes)>,
    /// Both lanes of the rank as predicted, from the choice of experts.
    pub predicted: Timeline,
    /// The same as measured.
    pub measured: Timeline,
}

/// How the layers of a run were planned.
#[derive(Clone, Debug, Default)]
pub struct ScheduleReport {
    /// Layers planned.
    pub layers: u64,
    /// Searches made: one for every bucket, and again when the correction had moved.
    pub searches: u64,
    /// Layers whose prediction was compared with the clock.
    pub sampled: u64,
    /// Of these, whose time was more than [`ScheduleReport::MISPREDICTED_PERCENT`] off.
    pub mispredicted: u64,
    /// What the cost model is multiplied by.
    pub correction: Correction,
    /// Whether plans are still being tried on layers.
    pub trying: bool,
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
    /// Plans that were tried on layers, cheapest by the model first: stages, and what layers took in permille of what the model
    /// said of the first plan.
    pub tried: Vec<(usize, Option<u64>)>,
    /// The last layer that was sampled.
    pub last_sample: Option<LayerSample>,
}

impl ScheduleReport {
    /// A prediction that is off by more than this is counted as a misprediction.
    pub const MISPREDICTED_PERCENT: u64 = 20;

    /// Stages of the plan that most layers ran by.
    pub fn usual_stages(&self) -> usize {
        self.plans.iter().max_by_key(|plan| plan.layers).map_or(1, |plan| plan.stages)
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
            self.sampled,
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
        let tried = |&(stages, took): &(usize, Option<u64>)| {
            Some(format!("{} {}", count(stages, "stage"), Factor(took?)))
        };
        let tried: Vec<String> = self.tried.iter().filter_map(tried).collect();
        if !tried.is_empty() {
            let (all, best) = (tried.join(", "), count(self.stages, "stage"));
            writeln!(f, "tried on layers, in times what was predicted: {all}; layers run in {best}")?;
        }
        let Some(sample) = &self.last_sample else { return Ok(()) };
        let ms = |ns: u64| ns as f64 / 1e6;
        let PredictedMeasured { predicted_ns, measured_ns } = sample.layer;
        writeln!(
            f,
            "last layer sampled: predicted {:.3} ms, measured {:.3} ms",
            ms(predicted_ns),
            ms(measured_ns)
        )?;
        for (stage, (predicted, measured)) in sample.stages.iter().enumerate() {
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
