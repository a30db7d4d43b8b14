//! What the user asked for.

use super::{Ahead, Feedback, LayerPlan, Planner};
use crate::{GemmKind, LayerHistograms, PlanError, Policy, Schedule, SharedExpert, SlotMap, StageTable};
use epsmoe_base::Layer;

/// One stage, or stages cut by load or by size: a [`Policy`]'s serial or staged table.
#[derive(Clone, Debug)]
pub struct FixedPlanner {
    policy: Policy,
}

impl FixedPlanner {
    /// Follows `policy`.
    pub fn new(policy: Policy) -> Self {
        FixedPlanner { policy }
    }
}

impl Planner for FixedPlanner {
    fn ahead(&self, map: &SlotMap) -> Result<Ahead, PlanError> {
        let table = match self.policy.schedule {
            Schedule::Serial => Some(self.policy.serial(map)?),
            _ => None,
        };
        Ok(Ahead { shared: self.policy.shared_expert(), batches: 1, table })
    }

    fn plan(
        &mut self,
        _layer: Layer,
        map: &SlotMap,
        counts: &[LayerHistograms],
        _feedback: &[Feedback],
    ) -> Result<LayerPlan, PlanError> {
        let tables = counts.iter().map(|counts| self.policy.table(map, counts));
        Ok(LayerPlan { tables: tables.collect::<Result<_, _>>()? })
    }
}

/// The table of a layer whose counts nobody knows: one stage, whose shared expert computes while rows travel, if any do and
/// nothing else was asked for.
pub(super) fn uncounted_table(map: &SlotMap, asked: Option<SharedExpert>) -> StageTable {
    let serial = StageTable::serial(map, GemmKind::Grouped);
    match map.ranks() {
        1 => serial,
        _ => StageTable { shared: asked.unwrap_or(SharedExpert::BesideFirstDispatch), ..serial },
    }
}
