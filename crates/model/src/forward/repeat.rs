//! Steps that are like others: one token of each sequence, on a rank that is alone. All that differs from one to the next
//! lies in buffers that [`begin`](Model::begin) fills, so a processor may keep what such a step enqueues.

use super::{Batch, Model, RoutingMode, StepOutput};
use crate::ModelError;
use crate::mlp::MlpWeights;
use crate::step::Step;
use epsmoe_device::Backend;
use epsmoe_pipeline::LayerReport;
use std::cell::RefCell;
use std::collections::HashMap;

/// What the layers of such steps said, by their key.
pub(super) type Repeats = RefCell<HashMap<u64, Vec<LayerReport>>>;

impl<B: Backend> Model<B> {
    /// What a step has in common with those that enqueue the same; nothing where steps are not alike.
    pub(super) fn repetition(&self, batch: &Batch, step: &Step) -> Result<Option<u64>, ModelError> {
        let tokens = batch.ids.len();
        let decoding = tokens > 0 && tokens == batch.blocks.len() && tokens == batch.logits.len();
        let alone = self.fabric.size() == 1 && step.last.is_none() && tokens <= self.buffers.logits.rows;
        let watched = batch.count_experts || !matches!(self.options.routing, RoutingMode::FromRouter);
        let absorbed = batch.generated == tokens || !self.options.tells_origins(&self.spec);
        if !decoding || !alone || watched || !absorbed {
            return Ok(None);
        }
        let key = tokens as u64 | (step.longest as u64) << 32;
        if self.repeats.borrow().contains_key(&key) {
            return Ok(Some(key));
        }
        let moe = self.layers.iter().filter_map(|layer| match &layer.mlp {
            MlpWeights::Moe(moe) => Some(moe),
            MlpWeights::Absent | MlpWeights::Dense(..) => None,
        });
        for layer in moe {
            let runs_ahead = self.experts.as_ref().map(|experts| experts.runs_ahead(layer, tokens));
            if !runs_ahead.transpose()?.unwrap_or(false) {
                return Ok(None);
            }
        }
        Ok(Some(key))
    }

    /// Runs a step by what such steps enqueue.
    pub(super) fn repeat(
        &self,
        key: u64,
        step: &Step,
        batch: &Batch,
        output: &mut StepOutput,
    ) -> Result<(), ModelError> {
        let again = self.device.repeat(key, || -> Result<(), ModelError> {
            let stream = self.run_layers(step, output)?;
            Ok(self.compute_logits(&self.last_rows(step, &stream)?)?)
        })?;
        let mut repeats = self.repeats.borrow_mut();
        match repeats.get(&key) {
            Some(layers) if again => output.layers.clone_from(layers),
            _ => drop(repeats.insert(key, output.layers.clone())),
        }
        self.take_tokens(&batch.whole, output)
    }
}
