//! The end of a step: the most likely tokens, and logits.

use super::{Batch, Model, StepOutput, made_before};
use crate::ModelError;
use crate::step::Step;
use epsmoe_base::{Phase, Place};
use epsmoe_device::op::{ArgMax, Gather, Gemm, SoftCap};
use epsmoe_device::{Backend, Buffer, DeviceError};

impl<B: Backend> Model<B> {
    /// The most likely token after each wanted one, and the logits of those that want them all, on the host of the
    /// group's first rank.
    pub(super) fn choose(
        &self,
        step: &Step,
        stream: &Buffer,
        batch: &Batch,
        output: &mut StepOutput,
    ) -> Result<(), ModelError> {
        let last = self.last_rows(step, stream)?;
        if self.layout.in_group().index == 0 {
            for start in (0..last.rows).step_by(self.buffers.logits.rows.max(1)) {
                let rows = start..last.rows.min(start + self.buffers.logits.rows);
                self.compute_logits(&last.rows(rows.clone())?)?;
                self.take_tokens(&batch.whole[rows], output)?;
            }
        }
        self.finish()
    }

    /// The wanted rows of the stream, normed, of all ranks of the group.
    pub(super) fn last_rows(&self, step: &Step, stream: &Buffer) -> Result<Buffer, ModelError> {
        let place = Place::default();
        let stream = self.wanted_stream(step, stream)?;
        let normed = self.buffers.normed.rows(0..stream.rows)?;
        self.norm(place, &stream, made_before(self.layers.len()), &self.final_norm, &normed)?;
        Ok(self.attention.all_gather(place, &step.wanted, &normed)?)
    }

    /// Logits of so many rows as there is room for, and the most likely tokens.
    pub(super) fn compute_logits(&self, last: &Buffer) -> Result<(), DeviceError> {
        let (place, buffers) = (Place::default(), &self.buffers);
        let (logits, tokens) = (buffers.logits.rows(0..last.rows)?, buffers.tokens.rows(0..last.rows)?);
        let product = Gemm::biased(last.clone(), &self.head, self.head_bias.as_ref(), logits.clone());
        self.compute(place.phase(Phase::LmHead), product)?;
        self.scale(place.phase(Phase::LmHead), &logits, self.spec.factors.logits)?;
        if let Some(cap) = self.spec.factors.cap {
            self.compute(place, SoftCap { x: logits.clone(), cap })?;
        }
        self.compute(place, ArgMax { logits, tokens })
    }

    /// Brings to the host what was computed last: the tokens, and the logits of rows that want them `whole`.
    pub(super) fn take_tokens(&self, whole: &[bool], output: &mut StepOutput) -> Result<(), ModelError> {
        self.finish()?;
        output.tokens.extend(self.device.read_u32(&self.buffers.tokens.rows(0..whole.len())?)?);
        let mut row = 0;
        for run in whole.chunk_by(|one, next| one == next) {
            let rows = row..row + run.len();
            row = rows.end;
            if run[0] {
                output.logits.extend(self.device.read_f32(&self.buffers.logits.rows(rows)?)?);
            }
        }
        Ok(())
    }

    /// The rows of the stream whose logits are wanted: what the last layer left, or some of it.
    fn wanted_stream(&self, step: &Step, stream: &Buffer) -> Result<Buffer, DeviceError> {
        if stream.rows == step.index.len() {
            return Ok(stream.clone());
        }
        let rows = 0..step.index.len();
        let index = self.upload(&step.index, &self.buffers.wanted.rows(rows.clone())?)?;
        let out = self.buffers.wanted_stream.rows(rows)?;
        self.compute(
            Place::default().phase(Phase::LmHead),
            Gather { x: stream.clone(), index, out: out.clone() },
        )?;
        Ok(out)
    }
}
