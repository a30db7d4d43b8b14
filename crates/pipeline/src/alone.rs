//! One MoE layer of a rank that is alone: no row travels and no count is gathered, so the processor sorts the rows
//! itself, and the host does not wait for it.

use crate::run::{LayerReport, MoeLayer};
use crate::{ExpertPipeline, PipelineError};
use epsmoe_base::{Phase, Place};
use epsmoe_device::op::{Epilogue, ExpertGemm, Gather, Reduce, SortByExpert};
use epsmoe_device::{Backend, Buffer};
use epsmoe_plan::{Capacity, GemmKind, LayerBytes, StageTable};
use std::ops::Range;
use std::time::Instant;

impl<B: Backend> ExpertPipeline<B> {
    /// Whether nobody else has a part in the layers, and nobody asked for stages or for dense products.
    pub(crate) fn is_alone(&self) -> bool {
        self.fabric.size() == 1 && self.options.policy.leaves_one_grouped_stage()
    }

    /// [`run`](Self::run) in a world of one rank, as many tokens at a time as there is room for. The bits are those
    /// of the layer in stages.
    pub(crate) fn run_alone(
        &self,
        layer: &MoeLayer,
        x: &Buffer,
        y: &Buffer,
    ) -> Result<LayerReport, PipelineError> {
        let Capacity { tokens, rows_received, stage_copies, .. } = self.options.sizes.capacity;
        let room = tokens.min(rows_received).min(stage_copies / layer.gate.top_k.max(1)).max(1);
        let mut report = LayerReport::default();
        for start in (0..x.rows.max(1)).step_by(room) {
            let range = start..(start + room).min(x.rows);
            self.run_tokens_alone(layer, &x.rows(range.clone())?, &y.rows(range.clone())?)?;
            report.note(
                StageTable::serial(&self.options.placement, GemmKind::Grouped),
                self.bytes_alone(&range),
            );
        }
        report.host.enqueued = Some(Instant::now());
        Ok(report)
    }

    fn run_tokens_alone(&self, layer: &MoeLayer, x: &Buffer, y: &Buffer) -> Result<(), PipelineError> {
        let (place, buffers, tokens) = (Place::layer(layer.layer), &self.buffers, 0..x.rows);
        let (experts, weights) = self.choose(layer, x)?;
        let copies = 0..x.rows * layer.gate.top_k;
        let starts = buffers.expert_starts.rows(0..layer.experts.len() + 1)?;
        let expand = buffers.expand_index.rows(copies.clone())?;
        let reduce = buffers.reduce_index.rows(copies.clone())?;
        let factors = buffers.reduce_weights.rows(copies.clone())?;
        self.compute(
            place,
            SortByExpert {
                experts,
                weights,
                starts: starts.clone(),
                tokens: expand.clone(),
                copies: reduce.clone(),
                factors: factors.clone(),
            },
        )?;
        let (expanded, inner) = (buffers.expanded.rows(copies.clone())?, buffers.inner.rows(copies.clone())?);
        let outputs = buffers.outputs.rows(copies)?;
        let gather = Gather { x: x.clone(), index: expand, out: expanded.clone() };
        self.compute(place.phase(Phase::Expand), gather)?;
        let product = |x, weight: fn(&crate::Mlp) -> &epsmoe_device::Weight, epilogue, out| ExpertGemm {
            x,
            starts: starts.clone(),
            weights: layer.experts.iter().map(|mlp| weight(mlp).clone()).collect(),
            epilogue,
            out,
        };
        let gate_up = product(expanded, |mlp| &mlp.gate_up, Epilogue::SwiGlu, inner.clone());
        self.compute(place.phase(Phase::GateUp), gate_up)?;
        let down = product(inner, |mlp| &mlp.down, Epilogue::Store, outputs.clone());
        self.compute(place.phase(Phase::Down), down)?;
        // The sums are rounded before the shared expert's output is added, as they are when they come home.
        let sums = buffers.sums.rows(tokens.clone())?;
        let (starts, every) =
            (buffers.token_copies.rows(0..x.rows + 1)?, buffers.every_token.rows(0..x.rows + 1)?);
        let weights = Some(factors);
        self.compute(
            place.phase(Phase::Reduce),
            Reduce { x: outputs, starts, index: reduce, weights, addend: None, out: sums.clone() },
        )?;
        self.run_shared_if(true, layer, x)?;
        let addend = layer.shared.as_ref().map(|_| buffers.shared_out.rows(tokens.clone())).transpose()?;
        let index = every.rows(tokens)?;
        let home = Reduce { x: sums, starts: every, index, weights: None, addend, out: y.clone() };
        self.compute(place.phase(Phase::SumAtHome), home)
    }

    fn bytes_alone(&self, tokens: &Range<usize>) -> u64 {
        let (sizes, tokens) = (&self.options.sizes.layer, tokens.len());
        let copies = tokens * sizes.top_k;
        let needed = Capacity { tokens, rows_sent: 0, rows_received: tokens, copies, stage_copies: copies };
        LayerBytes::of(sizes, &needed).total()
    }
}
