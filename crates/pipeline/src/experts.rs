//! One stage of experts: from received rows to partial sums.

use crate::buffers::LayerBuffers;
use crate::rendezvous::Plan;
use crate::run::MoeLayer;
use crate::{ExpertPipeline, PipelineError};
use epsmoe_base::{Phase, Place, Stage};
use epsmoe_device::op::{Epilogue, Gather, Gemm, GemmPart, HostToDevice, Reduce};
use epsmoe_device::{Backend, Weight};
use epsmoe_plan::{ArrivalMaps, GemmKind};
use std::ops::Range;

impl<B: Backend> ExpertPipeline<B> {
    /// Waits for the metadata records, on the host, and turns them into the index arrays of this rank's stages.
    pub(crate) fn receive_metadata(
        &self,
        layer: &MoeLayer,
        buffers: &LayerBuffers,
        plan: &Plan,
        arrived: &B::Event,
    ) -> Result<(), PipelineError> {
        let me = self.fabric.rank();
        self.wait(arrived)?;
        let rows = plan.traffic.rows_received(me);
        let records = self.device.read_u32(&buffers.received_records.rows(0..rows)?)?;
        let Plan { counts, table, traffic } = plan;
        let (placement, top_k) = (&self.options.placement, layer.gate.top_k);
        let maps = ArrivalMaps::of(placement, me, counts, table, traffic, top_k, &records)?;
        let copies = 0..maps.expand.len();
        let weights: Vec<u32> = maps.reduce_weights.iter().map(|weight| weight.to_bits()).collect();
        let uploads = [
            (maps.expand, buffers.expand_index.rows(copies.clone())?),
            (maps.reduce_offsets, buffers.reduce_starts.rows(0..rows + 1)?),
            (maps.reduce_index, buffers.reduce_index.rows(copies.clone())?),
            (weights, buffers.reduce_weights.rows(copies)?),
        ];
        for (words, out) in uploads {
            self.compute(
                Place::layer(layer.layer).phase(Phase::Maps),
                HostToDevice { words: words.into(), out },
            )?;
        }
        Ok(())
    }

    /// Expand, gate and up, activation, down, reduce. Outputs of earlier stages are kept until the last expert
    /// of their rows is done, so that each sum is folded once, in expert order.
    pub(crate) fn run_stage(
        &self,
        layer: &MoeLayer,
        buffers: &LayerBuffers,
        plan: &Plan,
        stage: Stage,
    ) -> Result<(), PipelineError> {
        let (me, traffic) = (self.fabric.rank(), &plan.traffic);
        let place = Place::layer(layer.layer).stage(stage);
        let copies = traffic.stage_copies(me, stage);
        let expand = Gather {
            x: buffers.received_rows.rows(0..traffic.receive_stage(me, stage).end)?,
            index: buffers.expand_index.rows(copies.clone())?,
            out: buffers.expanded.rows(0..copies.len())?,
        };
        self.compute(place.phase(Phase::Expand), expand)?;
        let experts = plan.table.experts_of(me, stage);
        let (mut gate_up, mut down) = (Vec::new(), Vec::new());
        for (expert, mlp) in experts.clone().zip(&layer.experts[experts]) {
            let of_expert = traffic.expert_copies(me, expert);
            if of_expert.is_empty() {
                continue;
            }
            let in_stage = of_expert.start - copies.start..of_expert.end - copies.start;
            let (x, inner) = (buffers.expanded.rows(in_stage.clone())?, buffers.inner.rows(in_stage)?);
            let part = |x, weight: &Weight, out| GemmPart { x, weight: weight.clone(), out };
            gate_up.push(part(x, &mlp.gate_up, inner.clone()));
            down.push(part(inner, &mlp.down, buffers.outputs.rows(of_expert)?));
        }
        let kind = plan.table.gemm[stage.0];
        self.products(place.phase(Phase::GateUp), kind, gate_up, Epilogue::SwiGlu)?;
        self.products(place.phase(Phase::Down), kind, down, Epilogue::Store)?;
        self.reduce(place.phase(Phase::Reduce), buffers, copies.end, traffic.combine_stage(me, stage))
    }

    /// The products of a stage's experts: all in one operation, or one after the other.
    fn products(
        &self,
        place: Place,
        kind: GemmKind,
        parts: Vec<GemmPart>,
        epilogue: Epilogue,
    ) -> Result<(), PipelineError> {
        match kind {
            GemmKind::Grouped => self.compute(place, Gemm { parts, bias: None, epilogue }),
            GemmKind::Dense => parts
                .into_iter()
                .try_for_each(|part| self.compute(place, Gemm { parts: vec![part], bias: None, epilogue })),
        }
    }

    /// Partial sums of the rows whose last expert here is done: weights applied, folded in expert order.
    fn reduce(
        &self,
        place: Place,
        buffers: &LayerBuffers,
        copies: usize,
        rows: Range<usize>,
    ) -> Result<(), PipelineError> {
        let reduce = Reduce {
            x: buffers.outputs.rows(0..copies)?,
            starts: buffers.reduce_starts.rows(rows.start..rows.end + 1)?,
            index: buffers.reduce_index.rows(0..copies)?,
            weights: Some(buffers.reduce_weights.rows(0..copies)?),
            addend: None,
            out: buffers.sums.rows(rows)?,
        };
        self.compute(place, reduce)
    }
}
