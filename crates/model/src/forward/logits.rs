//! The end of a step: logits, or the most likely tokens.

use super::{Batch, Model, StepOutput, made_before};
use crate::ModelError;
use crate::step::Step;
use epsmoe_base::{Fault, FaultKind, Phase, Place};
use epsmoe_device::op::{ArgMax, Gather, Gemm};
use epsmoe_device::{Backend, Buffer, DeviceError};

impl<B: Backend> Model<B> {
    /// Logits of the wanted tokens, or the largest of each, on the host of the group's first rank.
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
                let out = buffers.logits.rows(0..rows.len())?;
                let head = Gemm::linear(last.rows(rows)?, &self.head, out.clone());
                self.compute(place.phase(Phase::LmHead), head)?;
                if batch.greedy {
                    let tokens = buffers.tokens.rows(0..out.rows)?;
                    self.compute(place, ArgMax { logits: out, tokens: tokens.clone() })?;
                    self.finish()?;
                    output.tokens.extend(self.device.read_u32(&tokens)?);
                } else {
                    self.finish()?;
                    let logits = self.device.read_f32(&out)?;
                    self.check_logits(&logits)?;
                    output.logits.extend(logits);
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

    /// What [`ArgMax`] refuses where it runs, nothing refuses where logits come to the host.
    fn check_logits(&self, logits: &[f32]) -> Result<(), Fault> {
        let spoiled =
            logits.iter().fold(false, |any, logit| any | logit.is_nan() | (*logit == f32::INFINITY));
        if !spoiled {
            return Ok(());
        }
        let message = "the output projection made logits that are NaN or infinite: its weights are damaged, or too \
                       large for the format they are computed in (--dtype)";
        let place = Place::default();
        Err(Fault { kind: FaultKind::Invalid, rank: self.fabric.rank(), place, message: message.into() })
    }
}
