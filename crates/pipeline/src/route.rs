//! Which experts a token goes to, and in which slots they are.

use crate::run::MoeLayer;
use crate::{ExpertPipeline, PipelineError};
use epsmoe_base::{Phase, Place};
use epsmoe_device::op::{AssignSlots, Gemm, HostToDevice, Route, Slotless};
use epsmoe_device::{Backend, Buffer, DeviceError};
use epsmoe_plan::{Routing, SlotMap};

impl<B: Backend> ExpertPipeline<B> {
    /// Chooses every token's experts, and brings the choice to the host.
    pub fn route(&self, layer: &MoeLayer, x: &Buffer) -> Result<Routing, PipelineError> {
        self.choose(layer, x)?;
        self.wait(&self.device.record(epsmoe_base::Lane::Compute))?;
        let tokens = 0..x.rows;
        let experts = self.device.read_u32(&self.buffers.router_experts.rows(tokens.clone())?)?;
        let weights = self.device.read_f32(&self.buffers.router_weights.rows(tokens)?)?;
        Ok(Routing::new(layer.choices(), layer.router.top_k, experts, weights)?)
    }

    /// Chooses every token's experts: their numbers and weights `[T, k]`, on the device.
    pub(crate) fn choose(&self, layer: &MoeLayer, x: &Buffer) -> Result<(), PipelineError> {
        let (place, tokens) = (Place::layer(layer.layer), 0..x.rows);
        let logits = self.buffers.router_logits.rows(tokens.clone())?;
        let bias = layer.router_bias.as_ref();
        let router = Gemm::biased(x.clone(), &layer.router_weight, bias, logits.clone());
        self.compute(place.phase(Phase::RouterLogits), router)?;
        let route = Route {
            logits,
            router: layer.router,
            bias: layer.bias.clone(),
            scales: layer.scales.clone(),
            experts: self.buffers.router_experts.rows(tokens.clone())?,
            weights: self.buffers.router_weights.rows(tokens)?,
        };
        self.compute(place, route)
    }

    /// Puts a choice that was made elsewhere in the router's place.
    pub(crate) fn overrule(&self, layer: &MoeLayer, routing: &Routing) -> Result<(), PipelineError> {
        let (place, tokens) = (Place::layer(layer.layer).phase(Phase::Input), 0..routing.tokens());
        let weights = routing.weights().iter().map(|weight| weight.to_bits()).collect();
        let (experts, weights_out) =
            (self.buffers.router_experts.rows(tokens.clone())?, self.buffers.router_weights.rows(tokens)?);
        self.compute(place, HostToDevice { words: routing.experts().into(), out: experts })?;
        self.compute(place, HostToDevice { words: weights, out: weights_out })
    }

    /// Turns the chosen experts of `tokens` tokens into slots: the one place where the layer's map is applied.
    pub(crate) fn assign(&self, layer: &MoeLayer, tokens: usize) -> Result<(), PipelineError> {
        self.hold_map(&layer.slots)?;
        let (buffers, tokens) = (&self.buffers, 0..tokens);
        let slotless = |experts| -> Result<_, DeviceError> {
            Ok(Slotless { experts, weights: buffers.kept_weights.rows(tokens.clone())? })
        };
        let assign = AssignSlots {
            experts: buffers.router_experts.rows(tokens.clone())?,
            weights: buffers.router_weights.rows(tokens.clone())?,
            slot_of: self.slot_table(&layer.slots)?,
            slots: buffers.slots.rows(tokens.clone())?,
            slot_weights: buffers.slot_weights.rows(tokens.clone())?,
            slotless: layer.identities.map(|identities| slotless(identities.experts)).transpose()?,
        };
        self.compute(Place::layer(layer.layer), assign)
    }

    /// Where the slots of every expert are `[E, m]`, once the map is held.
    fn slot_table(&self, map: &SlotMap) -> Result<Buffer, DeviceError> {
        self.buffers.slot_of.rows(0..map.experts())?.columns(0..map.most_replicas())
    }

    /// Brings a map to the device, unless it is there from the layer before.
    fn hold_map(&self, map: &SlotMap) -> Result<(), PipelineError> {
        if self.held_map.get() == Some(map.digest()) {
            return Ok(());
        }
        let sizes = &self.options.sizes.layer;
        let fits = map.experts() == sizes.experts
            && map.ranks() == self.fabric.size()
            && map.max_local() <= sizes.local_slots
            && map.most_replicas() <= sizes.replicas;
        if !fits {
            let shown = |experts, ranks, local, replicas| {
                format!(
                    "{experts} experts on {ranks} ranks, up to {local} a rank, each up to {replicas} times"
                )
            };
            let message = format!(
                "a map of {}, for layers of {}: give every layer a map of its own experts",
                shown(map.experts(), map.ranks(), map.max_local(), map.most_replicas()),
                shown(sizes.experts, self.fabric.size(), sizes.local_slots, sizes.replicas)
            );
            return Err(DeviceError::Shape(message).into());
        }
        let tables = [
            (map.slot_table(), self.slot_table(map)?),
            (map.block_starts(), self.buffers.block_starts.rows(0..map.slots())?),
            (map.rank_starts(), self.buffers.rank_starts.clone()),
        ];
        for (words, out) in tables {
            self.compute(Place::default().phase(Phase::Input), HostToDevice { words: words.into(), out })?;
        }
        self.held_map.set(Some(map.digest()));
        Ok(())
    }
}
