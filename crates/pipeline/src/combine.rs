//! Partial sums on their way home.

use crate::buffers::LayerBuffers;
use crate::rendezvous::Plan;
use crate::run::MoeLayer;
use crate::{ExpertPipeline, PipelineError};
use epsmoe_base::{Phase, Place, Stage};
use epsmoe_device::op::{HostToDevice, Reduce};
use epsmoe_device::{Backend, Buffer};
use epsmoe_plan::HomeMap;

impl<B: Backend> ExpertPipeline<B> {
    /// The sums that one stage completed, from every rank to every rank.
    pub(crate) fn combine(
        &self,
        layer: &MoeLayer,
        buffers: &LayerBuffers,
        plan: &Plan,
        stage: Stage,
    ) -> Result<(), PipelineError> {
        let me = self.fabric.rank();
        self.exchange(
            Place::layer(layer.layer).stage(stage).phase(Phase::Combine),
            "combine",
            |rank| buffers.sums.rows(plan.traffic.combine_range(me, stage, rank)),
            |rank| buffers.home_rows.rows(plan.traffic.home_range(me, rank, stage)),
        )
    }

    /// Every token's sums, added in rank order, then the shared expert's output.
    pub(crate) fn sum_at_home(
        &self,
        layer: &MoeLayer,
        buffers: &LayerBuffers,
        home: HomeMap,
        y: &Buffer,
    ) -> Result<(), PipelineError> {
        let (place, sums) = (Place::layer(layer.layer).phase(Phase::SumAtHome), 0..home.index.len());
        let starts = buffers.home_starts.rows(0..y.rows + 1)?;
        let index = buffers.home_index.rows(sums.clone())?;
        self.compute(place, HostToDevice { words: home.offsets.into(), out: starts.clone() })?;
        self.compute(place, HostToDevice { words: home.index.into(), out: index.clone() })?;
        let addend = layer.shared.as_ref().map(|_| buffers.shared_out.rows(0..y.rows)).transpose()?;
        let x = buffers.home_rows.rows(sums)?;
        self.compute(place, Reduce { x, starts, index, weights: None, addend, out: y.clone() })
    }
}
