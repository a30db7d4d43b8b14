//! Partial sums on their way back to their tokens.

use crate::batch::{Batch, Rows};
use crate::run::Call;
use crate::{ExpertPipeline, PipelineError};
use epsmoe_base::{Lane, Phase, Place, Stage};
use epsmoe_device::op::Reduce;
use epsmoe_device::{Backend, Buffer};

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
        if matches!(batch.rows, Rows::InPlace) {
            return Ok(None);
        }
        self.after(Lane::Transfer, reduced);
        let place = Place::layer(call.layer.layer).stage(stage).phase(Phase::Combine);
        let (me, ends) = (self.fabric.rank(), [&batch.buffers.sums, &batch.buffers.combined_rows]);
        self.exchange(place, "combine", ends, |rank| batch.rows.of_combine(me, rank, stage))?;
        Ok(Some(self.device.record(Lane::Transfer)))
    }

    /// What a batch's sums are added to: the shared expert's output, and rows that experts give back as they are.
    pub(crate) fn addend(&self, call: &Call<'_>, batch: &Batch) -> Result<Option<Buffer>, PipelineError> {
        let (buffers, tokens) = (&self.buffers, batch.tokens.clone());
        let shared = call.layer.shared.as_ref().filter(|_| call.shared_out.is_none());
        let shared = shared.map(|_| buffers.shared_out.rows(tokens.clone())).transpose()?;
        if !call.layer.identities.is_some_and(|identities| identities.added) {
            return Ok(shared);
        }
        let out = buffers.kept_rows.rows(tokens.clone())?;
        let keep = Reduce {
            x: batch.x.clone(),
            index: buffers.every_token.rows(0..tokens.len())?,
            weights: Some(buffers.kept_weights.rows(tokens)?),
            addend: shared,
            out: out.clone(),
        };
        self.compute(Place::layer(call.layer.layer).phase(Phase::Reduce), keep)?;
        Ok(Some(out))
    }

    /// Every token's sums, added in rank order, then what there is to add. In place a token has one sum, which was rounded
    /// as if it had travelled.
    pub(crate) fn sum(
        &self,
        place: Place,
        batch: &Batch,
        addend: Option<Buffer>,
    ) -> Result<(), PipelineError> {
        let (buffers, tokens) = (&batch.buffers, batch.tokens.clone());
        let (x, index) = match &batch.rows {
            Rows::InPlace => {
                (buffers.sums.rows(0..tokens.len())?, buffers.every_token.rows(0..tokens.len())?)
            }
            Rows::Gathered(_) | Rows::Travel(_) => (
                buffers.combined_rows.rows(0..batch.rows.sums(self.fabric.rank()))?,
                buffers.combine_index.rows(tokens)?,
            ),
        };
        self.compute(place, Reduce { x, index, weights: None, addend, out: batch.y.clone() })
    }
}
