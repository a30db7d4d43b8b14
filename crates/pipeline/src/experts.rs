//! One stage of experts: from received rows to partial sums.

use crate::batch::{Batch, Rows, Travel};
use crate::buffers::LayerBuffers;
use crate::run::{Call, Mlp};
use crate::{ExpertPipeline, PipelineError};
use epsmoe_base::{DType, Lane, Phase, Place, Stage};
use epsmoe_device::op::{
    Activate, AddSlotBias, Epilogue, ExpertGemm, Fp8, Gemm, GemmPart, HostToDevice, ReceiveOrder, Reduce,
    ScaleTerms, SlotBias, SortBySlot, Travelled,
};
use epsmoe_device::{Backend, Buffer, DeviceError, Weight};
use epsmoe_plan::GemmKind;
use std::ops::Range;

/// Rows that are on a rank, with their slots there and the weights of these.
struct Here {
    x: Buffer,
    /// How they are read, where they travel in FP8.
    how: Fp8,
    slots: Buffer,
    weights: Buffer,
}

impl<B: Backend> ExpertPipeline<B> {
    /// Makes the index arrays of the batch's stages: out of the metadata, once it has arrived, and of what was announced
    /// about it; where nobody counted, out of the slots alone.
    pub(crate) fn receive(
        &self,
        call: &Call<'_>,
        batch: &Batch,
        metadata: Option<&B::Event>,
    ) -> Result<(), PipelineError> {
        let place = Place::layer(call.layer.layer).phase(Phase::Maps);
        let (buffers, local) = (&batch.buffers, call.layer.slots.local_count(self.fabric.rank()));
        let starts = buffers.slot_starts.rows(0..local + 1)?;
        let Rows::Travel(travel) = &batch.rows else {
            self.after(Lane::Compute, metadata);
            let Here { slots, .. } = self.here(batch)?;
            let sort = SortBySlot {
                terms: buffers.reduce_index.rows(0..slots.rows)?,
                rows: buffers.expand_index.rows(0..self.assignments_of(slots.rows))?,
                travelled: None,
                slots,
                starts,
            };
            return self.compute(place, sort);
        };
        let (me, traffic, top_k) = (self.fabric.rank(), &travel.traffic, call.layer.router.top_k);
        let bins = traffic.receive_bins(&call.layer.slots, &travel.counts, &batch.table, me);
        let announced = buffers.receive_bins.rows(0..bins.len())?;
        self.compute(place, HostToDevice { words: bins.as_flattened().into(), out: announced.clone() })?;
        self.after(Lane::Compute, metadata);
        let rows = 0..traffic.rows_received(me);
        let metadata = buffers.received_metadata.rows(rows.clone())?;
        let slots = metadata.columns(0..top_k)?;
        let order = buffers.receive_order.rows(rows.clone())?;
        let sums = buffers.receive_sums.rows(rows.clone())?;
        let receive = ReceiveOrder {
            slots: slots.clone(),
            bins: announced,
            local,
            order: order.clone(),
            sums: sums.clone(),
        };
        self.compute(place, receive)?;
        let travelled = Travelled {
            order,
            sums,
            weights: metadata.columns(top_k..2 * top_k)?.bits_as(DType::F32)?,
            factors: buffers.reduce_weights.rows(rows.clone())?,
        };
        let sort = SortBySlot {
            slots,
            travelled: Some(travelled),
            starts,
            rows: buffers.expand_index.rows(0..traffic.assignments(me))?,
            terms: buffers.reduce_index.rows(rows)?,
        };
        self.compute(place, sort)
    }

    /// Expand, gate and up, activation, down, reduce.
    pub(crate) fn run_stage(
        &self,
        call: &Call<'_>,
        batch: &Batch,
        stage: Stage,
    ) -> Result<(), PipelineError> {
        let place = Place::layer(call.layer.layer).stage(stage);
        match &batch.rows {
            Rows::InPlace | Rows::Gathered(_) => self.run_uncounted(place, call, batch),
            Rows::Travel(travel) => self.run_received(place, call, batch, travel, stage),
        }
    }

    /// Rows that nobody counted, and what they are sorted by.
    fn here(&self, batch: &Batch) -> Result<Here, PipelineError> {
        let buffers = &batch.buffers;
        let Rows::Gathered(gathered) = &batch.rows else {
            let tokens = batch.tokens.clone();
            let (slots, weights) = (buffers.slots.rows(tokens.clone())?, buffers.slot_weights.rows(tokens)?);
            // As if the rows had travelled: a rank that is alone gives what it would give among others.
            return Ok(Here { x: batch.x.clone(), how: Fp8::Through, slots, weights });
        };
        let metadata = buffers.received_metadata.rows(gathered.all())?;
        let top_k = metadata.width / 2;
        Ok(Here {
            x: buffers.received_rows.rows(gathered.all())?,
            how: Fp8::Decode,
            slots: metadata.columns(0..top_k)?,
            weights: metadata.columns(top_k..2 * top_k)?.bits_as(DType::F32)?,
        })
    }

    /// The most assignments that so many rows have on this rank.
    fn assignments_of(&self, rows: usize) -> usize {
        rows * self.options.sizes.layer.slots_of_row()
    }

    /// All experts over rows of which only the device knows whose they are.
    fn run_uncounted(&self, place: Place, call: &Call<'_>, batch: &Batch) -> Result<(), PipelineError> {
        let Here { x, how, weights, .. } = self.here(batch)?;
        let (buffers, tokens) = (&batch.buffers, 0..x.rows);
        let assignments = 0..self.assignments_of(x.rows);
        let inner = buffers.inner.rows(assignments.clone())?;
        let expanded = expanded(call, buffers)?.rows(assignments.clone())?;
        let outputs = buffers.outputs.rows(assignments.clone())?;
        let index = buffers.expand_index.rows(assignments)?;
        let from = match &batch.rows {
            Rows::InPlace => call.rows_for(&batch.tokens, &expanded)?,
            Rows::Gathered(_) | Rows::Travel(_) => x,
        };
        self.gather_rows(place.phase(Phase::Expand), how, [from, index, expanded.clone()])?;
        if call.layer.scaled_inputs {
            self.scale_inputs(place, &expanded, [&buffers.reduce_index.rows(tokens.clone())?, &weights], 0)?;
        }
        let starts = buffers.slot_starts.rows(0..call.layer.experts.len() + 1)?;
        let product = |x, weight: fn(&Mlp) -> &Weight, epilogue, out| ExpertGemm {
            x,
            starts: starts.clone(),
            weights: call.layer.experts.iter().map(|mlp| weight(mlp).clone()).collect(),
            epilogue,
            out,
        };
        let (epilogue, activated, inner) = self.activated(call, buffers, &inner)?;
        let gate_up = product(expanded, |mlp| &mlp.gate_up, epilogue, activated);
        self.compute(place.phase(Phase::GateUp), gate_up)?;
        self.activate(place, call, &starts, buffers, &inner, 0)?;
        let down = product(inner, |mlp| &mlp.down, Epilogue::Store, outputs.clone());
        self.compute(place.phase(Phase::Down), down)?;
        self.add_down_bias(place, call, &starts, &outputs, 0)?;
        let weights = (!call.layer.scaled_inputs).then_some(&weights);
        self.reduce(place, outputs, &buffers.reduce_index, weights, &buffers.sums, tokens)
    }

    /// The experts of one stage over rows that have arrived. Outputs of earlier stages are kept until the last expert of
    /// their rows is done, so that each sum is folded once, in slot order.
    fn run_received(
        &self,
        place: Place,
        call: &Call<'_>,
        batch: &Batch,
        travel: &Travel,
        stage: Stage,
    ) -> Result<(), PipelineError> {
        let (me, traffic, buffers) = (self.fabric.rank(), &travel.traffic, &batch.buffers);
        let assignments = traffic.stage_assignments(me, stage);
        let expand = [
            buffers.received_rows.rows(0..traffic.dispatch_receive_stage(me, stage).end)?,
            buffers.expand_index.rows(assignments.clone())?,
            expanded(call, buffers)?.rows(0..assignments.len())?,
        ];
        let rows = expand[2].clone();
        self.gather_rows(place.phase(Phase::Expand), Fp8::Decode, expand)?;
        if call.layer.scaled_inputs {
            let received = 0..traffic.rows_received(me);
            let terms =
                [&buffers.reduce_index.rows(received.clone())?, &buffers.reduce_weights.rows(received)?];
            self.scale_inputs(place, &rows, terms, assignments.start)?;
        }
        let slots = batch.table.slots_of(me, stage);
        let inner = buffers.inner.rows(0..assignments.len())?;
        let (epilogue, activated, inner) = self.activated(call, buffers, &inner)?;
        let (mut gate_up, mut down) = (Vec::new(), Vec::new());
        for (slot, mlp) in slots.clone().zip(&call.layer.experts[slots]) {
            let of_slot = traffic.slot_assignments(me, slot);
            if of_slot.is_empty() {
                continue;
            }
            let in_stage = of_slot.start - assignments.start..of_slot.end - assignments.start;
            let x = rows.rows(in_stage.clone())?;
            let part = |x, weight: &Weight, out| GemmPart { x, weight: weight.clone(), bias: None, out };
            gate_up.push(part(x, &mlp.gate_up, activated.rows(in_stage.clone())?));
            down.push(part(inner.rows(in_stage)?, &mlp.down, buffers.outputs.rows(of_slot)?));
        }
        let (kind, first) = (batch.table.gemm[stage.0], assignments.start);
        let starts = buffers.slot_starts.rows(0..call.layer.experts.len() + 1)?;
        self.products(place.phase(Phase::GateUp), kind, gate_up, epilogue)?;
        self.activate(place, call, &starts, buffers, &inner, first)?;
        self.products(place.phase(Phase::Down), kind, down, Epilogue::Store)?;
        self.add_down_bias(place, call, &starts, &buffers.outputs.rows(assignments.clone())?, first)?;
        let (outputs, rows) =
            (buffers.outputs.rows(0..assignments.end)?, traffic.combine_send_stage(me, stage));
        let weights = (!call.layer.scaled_inputs).then_some(&buffers.reduce_weights);
        self.reduce(place, outputs, &buffers.reduce_index, weights, &buffers.sums, rows)
    }

    /// Puts the weights of all sums on the rows of a stage's assignments, which count from `first` on.
    fn scale_inputs(
        &self,
        place: Place,
        x: &Buffer,
        [index, weights]: [&Buffer; 2],
        first: usize,
    ) -> Result<(), PipelineError> {
        let scale = ScaleTerms { x: x.clone(), index: index.clone(), weights: weights.clone(), first };
        self.compute(place.phase(Phase::Expand), scale)
    }

    /// What gate and up products end in, and where: in the activations themselves, as the down maps take them, or before an
    /// operation of their own. Then where activations are.
    fn activated(
        &self,
        call: &Call<'_>,
        buffers: &LayerBuffers,
        inner: &Buffer,
    ) -> Result<(Epilogue, Buffer, Buffer), PipelineError> {
        let inner =
            call.layer.experts.first().map_or(Ok(inner.clone()), |mlp| inner.for_weight(&mlp.down))?;
        Ok(match call.layer.activation {
            None => (Epilogue::SwiGlu, inner.clone(), inner),
            Some(_) => (Epilogue::Store, buffers.products.rows(0..inner.rows)?, inner),
        })
    }

    /// The activation of rows that count from `first` on, if the products have not done it.
    fn activate(
        &self,
        place: Place,
        call: &Call<'_>,
        starts: &Buffer,
        buffers: &LayerBuffers,
        inner: &Buffer,
        first: usize,
    ) -> Result<(), PipelineError> {
        let Some(activation) = &call.layer.activation else { return Ok(()) };
        let bias = |bias: &Weight| SlotBias { bias: bias.clone(), starts: starts.clone(), first };
        let activate = Activate {
            x: buffers.products.rows(0..inner.rows)?,
            bias: activation.gate_up_bias.as_ref().map(bias),
            activation: activation.activation,
            out: inner.clone(),
        };
        self.compute(place.phase(Phase::GateUp), activate)
    }

    /// The biases of the down maps, if they have some.
    fn add_down_bias(
        &self,
        place: Place,
        call: &Call<'_>,
        starts: &Buffer,
        outputs: &Buffer,
        first: usize,
    ) -> Result<(), PipelineError> {
        let bias = call.layer.activation.as_ref().and_then(|activation| activation.down_bias.clone());
        let Some(bias) = bias else { return Ok(()) };
        let bias = SlotBias { bias, starts: starts.clone(), first };
        self.compute(place.phase(Phase::Down), AddSlotBias { x: outputs.clone(), bias })
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
            GemmKind::Grouped => self.compute(place, Gemm { parts, epilogue }),
            GemmKind::Dense => parts
                .into_iter()
                .try_for_each(|part| self.compute(place, Gemm { parts: vec![part], epilogue })),
        }
    }

    /// Partial sums of the rows whose last expert here is done: weights applied, if they are not yet, folded in slot order.
    fn reduce(
        &self,
        place: Place,
        outputs: Buffer,
        index: &Buffer,
        weights: Option<&Buffer>,
        sums: &Buffer,
        rows: Range<usize>,
    ) -> Result<(), PipelineError> {
        let reduce = Reduce {
            x: outputs,
            index: index.rows(rows.clone())?,
            weights: weights.map(|weights| weights.rows(rows.clone())).transpose()?,
            addend: None,
            out: sums.rows(rows)?,
        };
        self.compute(place.phase(Phase::Reduce), reduce)
    }
}

/// Where rows are gathered, as the layer's experts take them.
fn expanded(call: &Call<'_>, buffers: &LayerBuffers) -> Result<Buffer, DeviceError> {
    let first = call.layer.experts.first();
    first.map_or(Ok(buffers.expanded.clone()), |mlp| buffers.expanded.for_weight(&mlp.gate_up))
}
