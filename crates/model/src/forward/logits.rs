//! The end of a step: the most likely tokens, and logits.

use super::{Batch, Model, StepOutput, made_before};
use crate::ModelError;
use crate::step::Step;
use epsmoe_base::{Phase, Place};
use epsmoe_device::op::{ArgMax, Gather, Gemm};
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
        let (place, buffers) = (Place::default(), &self.buffers);
        let stream = self.wanted_stream(step, stream)?;
        let normed = buffers.normed.rows(0..stream.rows)?;
        self.norm(place, &stream, made_before(self.layers.len()), &self.final_norm, &normed)?;
        let last = self.attention.all_gather(place, &step.wanted, &normed)?;
        if self.layout.in_group().index == 0 {
            for start in (0..last.rows).step_by(buffers.logits.rows.max(1)) {
                let rows = start..last.rows.min(start + buffers.logits.rows);
                let whole = &batch.whole[rows.clone()];
                let logits = buffers.logits.rows(0..rows.len())?;
                let head = Gemm::linear(last.rows(rows)?, &self.head, logits.clone());
                self.compute(place.phase(Phase::LmHead), head)?;
                self.scale(place.phase(Phase::LmHead), &logits, self.spec.factors.logits)?;
                let tokens = buffers.tokens.rows(0..logits.rows)?;
                self.compute(place, ArgMax { logits: logits.clone(), tokens: tokens.clone() })?;
                self.finish()?;
                output.tokens.extend(self.device.read_u32(&tokens)?);
                let mut row = 0;
                for run in whole.chunk_by(|one, next| one == next) {
                    let rows = row..row + run.len();
                    row = rows.end;
                    if run[0] {
                        output.logits.extend(self.device.read_f32(&logits.rows(rows)?)?);
                    }
                }
            }
        }
        self.finish()
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
