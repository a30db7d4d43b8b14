//! Partial sums on their way back to their tokens.

use crate::batch::{Batch, Rows};
use crate::run::Call;
use crate::{ExpertPipeline, PipelineError};
use epsmoe_base::{Lane, Phase, Place, Stage};
use epsmoe_device::Backend;
use epsmoe_device::op::Reduce;

impl<B: Backend> ExpertPipeline<B> {
    /// The sums that one stage completed, from every rank to every rank, after the event that says so; the event says
    /// when they have come back. Nothing travels in place.
    pub(crate) fn combine(
        &self,
        call: &Call<'_>,
        batch: &Batch,
        stage: Stage,
        reduced: Option<&B::Event>,
    ) -> Result<Option<B::Event>, PipelineError> {
        let Rows::Travel(travel) = &batch.rows else { return Ok(None) };
        let (me, traffic, buffers) = (self.fabric.rank(), &travel.traffic, &batch.buffers);
        self.after(Lane::Transfer, reduced);
        self.exchange(
            Place::layer(call.layer.layer).stage(stage).phase(Phase::Combine),
            "combine",
            |rank| buffers.sums.rows(traffic.combine_send(me, stage, rank)),
            |rank| buffers.combined_rows.rows(traffic.combine_receive(me, rank, stage)),
        )?;
        Ok(Some(self.device.record(Lane::Transfer)))
    }

    /// Every token's sums, added in rank order, then the shared expert's output. In place a token has one sum, which was
    /// rounded as if it had travelled.
    pub(crate) fn sum(&self, call: &Call<'_>, batch: &Batch) -> Result<(), PipelineError> {
        let (buffers, tokens) = (&batch.buffers, batch.tokens.clone());
        let (x, index) = match &batch.rows {
            Rows::InPlace => {
                (buffers.sums.rows(0..tokens.len())?, buffers.every_token.rows(0..tokens.len())?)
            }
            Rows::Travel(travel) => (
                buffers.combined_rows.rows(0..travel.traffic.rows_sent(self.fabric.rank()))?,
                buffers.combine_index.rows(tokens.clone())?,
            ),
        };
        let addend = call.layer.shared.as_ref().map(|_| buffers.shared_out.rows(tokens)).transpose()?;
        let sum = Reduce { x, index, weights: None, addend, out: batch.y.clone() };
        self.compute(Place::layer(call.layer.layer).phase(Phase::Sum), sum)
    }
}
