//! Two micro-batches that alternate, the schedule that stages are compared with: the tokens of every rank are cut in
//! two, and while the experts of one half compute, the rows of the other travel.
//!
//! ```text
//! transfer  mA dA  mB dB        cA          cB
//! compute   pack    ·   experts A   experts B   sum A   sum B
//! ```
//!
//! Every weight is read twice, and every expert sees half the rows at a time: what stages avoid. In times and messages,
//! stage 0 is A and stage 1 is B.

use super::{Ahead, Feedback, LayerPlan, Planner};
use crate::{LayerHistograms, PlanError, Policy, SlotMap};
use epsmoe_base::Layer;

/// See the module.
#[derive(Clone, Debug)]
pub struct TwoBatchPlanner {
    policy: Policy,
}

impl TwoBatchPlanner {
    /// Follows `policy` in what it leaves open: the kernel, and where the shared expert computes.
    pub fn new(policy: Policy) -> Self {
        TwoBatchPlanner { policy }
    }
}

impl Planner for TwoBatchPlanner {
    fn ahead(&self, _map: &SlotMap) -> Result<Ahead, PlanError> {
        Ok(Ahead { shared: self.policy.shared_expert(), batches: 2, table: None })
    }

    fn plan(
        &mut self,
        _layer: Layer,
        map: &SlotMap,
        _counts: &[LayerHistograms],
        _feedback: &[Feedback],
    ) -> Result<LayerPlan, PlanError> {
        Ok(LayerPlan { tables: self.policy.micro_batches(map)?.to_vec() })
    }
}
