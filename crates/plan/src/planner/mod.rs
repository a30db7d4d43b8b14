//! Who decides how a layer runs, and what everybody has to know for it.
//!
//! A [`Planner`] turns a layer's gathered counts into a [`LayerPlan`]. Every rank has one of its own; all of them are
//! asked the same questions in the same order and answer alike, which the digest that travels with the counts proves.
//!
//! | planner | answers |
//! |---|---|
//! | [`FixedPlanner`] | what the user asked for: one stage, or stages cut by load or by size |
//! | [`AutoPlanner`]  | what is predicted to be fastest, corrected by what layers took |
//! | [`TwoBatchPlanner`] | two micro-batches that alternate: the yardstick for stages |

mod auto;
mod contest;
mod feedback;
mod fixed;
mod report;
mod two_batch;

pub use auto::AutoPlanner;
pub use feedback::{Feedback, MOST_TRIALS, PredictedMeasured, Trial};
pub use fixed::FixedPlanner;
pub use report::{LayerSample, PlanReport, ScheduleReport};
pub use two_batch::TwoBatchPlanner;

use crate::{LayerHistograms, PlanError, SharedExpert, SlotMap, Span, StageTable};
use epsmoe_base::{Layer, Rank};

/// What is known of the next layer's plan before its counts are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ahead {
    /// Where the shared expert computes: it may compute beside the exchange of the counts.
    pub shared: SharedExpert,
    /// Micro-batches that the tokens are cut into; one that holds all of them as a rule.
    pub batches: usize,
    /// The table of a layer whose counts nobody asks for, if there may be such: because its rank is alone and it
    /// [runs in place](StageTable::runs_in_place), or because it is too short to ask.
    pub table: Option<StageTable>,
}

/// How a layer runs, equal on all ranks: a table for each of its micro-batches, all with one transfer order and one
/// place of the shared expert. Stage s belongs to micro-batch s if there are several, and to the only one if not.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LayerPlan {
    /// One for each micro-batch.
    pub tables: Vec<StageTable>,
}

/// Decides how layers run; see the module.
pub trait Planner: Send {
    /// What is known of the next layer's plan before its counts are, on the ranks of `map`.
    ///
    /// # Errors
    /// What was asked for does not fit the map.
    fn ahead(&self, map: &SlotMap) -> Result<Ahead, PlanError>;

    /// The plan of a layer, from the counts of each of its micro-batches and from the feedback of the ranks, in rank
    /// order, of those that had any.
    ///
    /// # Errors
    /// What was asked for does not fit the map.
    fn plan(
        &mut self,
        layer: Layer,
        map: &SlotMap,
        counts: &[LayerHistograms],
        feedback: &[Feedback],
    ) -> Result<LayerPlan, PlanError>;

    /// What this rank has to tell the others with the next layer's counts, once.
    fn take_feedback(&mut self) -> Option<Feedback> {
        None
    }

    /// Whether [`observe`](Planner::observe) after this step wants to see the spans of its layers: recording them costs
    /// a little.
    fn wants_spans(&self) -> bool {
        false
    }

    /// Whether what the layers that come now take is recorded: of others [`observe`](Planner::observe) is not told.
    fn set_recorded(&mut self, recorded: bool) {
        let _ = recorded;
    }

    /// After a step: what its layers took on `rank`, which is this one; nothing if nothing was recorded.
    fn observe(&mut self, rank: Rank, spans: &[Span]) {
        let _ = (rank, spans);
    }

    /// A hash of everything that plans follow from besides counts and feedback.
    fn digest(&self) -> u64 {
        0
    }

    /// How the layers so far were planned, if there is something to say.
    fn report(&self) -> Option<ScheduleReport> {
        None
    }
}
