//! START HERE. One MoE layer as it happens on one rank; every rank runs the same code.

use crate::PipelineError;
use crate::buffers::{LayerBuffers, PipelineSizes};
use epsmoe_base::{Deadline, Lane, Layer, Phase, Place, Stage, hash_bytes};
use epsmoe_device::op::{GateRows, Gemm, HostToDevice, Op, Route, TopKRouter};
use epsmoe_device::{Backend, Buffer, DeviceError, Weight};
use epsmoe_fabric::Fabric;
use epsmoe_plan::{
    Capacity, LayerBytes, LayerShape, Placement, Policy, Routing, Schedule, ScheduleReport, Scheduler,
    SharedExpert, Span, StageTable, Traffic, Transfer, halves,
};
use std::cell::RefCell;
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// A gated MLP: `down( silu(x·gateᵀ) ⊙ (x·upᵀ) )`.
#[derive(Clone, Debug)]
pub struct Mlp {
    /// TopKRouter and up maps `[I, H]`.
    pub gate_up: Weight,
    /// Down map `[H, I]`.
    pub down: Weight,
}

impl Mlp {
    /// Its inner width I.
    pub fn inner(&self) -> usize {
        let (_, dimensions) = self.gate_up.shape.sources();
        dimensions[0]
    }
}

/// The weights of one MoE layer on one rank.
#[derive(Clone, Debug)]
pub struct MoeLayer {
    /// Which layer.
    pub layer: Layer,
    /// Router `[E, H]`.
    pub router: Weight,
    /// Correction bias of the router `[E]`, if the model has one.
    pub bias: Option<Weight>,
    /// How router logits become experts.
    pub gate: TopKRouter,
    /// This rank's experts, in order `[L]`.
    pub experts: Vec<Mlp>,
    /// The expert that every token visits, if the model has one.
    pub shared: Option<SharedMlp>,
}

/// An expert that every token visits.
#[derive(Clone, Debug)]
pub struct SharedMlp {
    /// Its maps.
    pub mlp: Mlp,
    /// `[1, H]`: the output is scaled by `sigmoid(gate·x)`, if the model does that.
    pub gate: Option<Weight>,
}

/// What the pipeline of a world is built from; equal on all ranks.
#[derive(Clone, Debug)]
pub struct PipelineOptions {
    /// Where experts live.
    pub placement: Placement,
    /// What the user asked for.
    pub policy: Policy,
    /// Widths and capacities.
    pub sizes: PipelineSizes,
    /// A hash of the model and whatever else all ranks must have in common.
    pub identity: u64,
    /// How long ranks wait for each other, and the host for its lanes.
    pub timeout: Duration,
}

/// What a layer did.
#[derive(Clone, Debug, Default)]
pub struct LayerReport {
    /// Plans that were run: one, or one per token chunk; of two micro-batches, both.
    pub tables: Vec<StageTable>,
    /// The most bytes that one of them needed on this rank.
    pub peak_bytes: u64,
    /// When the host was done with what no lane does; of the last chunk.
    pub host: HostTimes,
}

/// When the host of a rank was done with a part of a layer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct HostTimes {
    /// Rows and records are on their way to the send buffers, and the rendezvous is next.
    pub packed: Option<Instant>,
    /// Every rank's counts are there.
    pub met: Option<Instant>,
    /// So is the plan.
    pub planned: Option<Instant>,
    /// The index arrays of this rank's stages are on their way to the device.
    pub mapped: Option<Instant>,
    /// Everything is enqueued.
    pub enqueued: Option<Instant>,
}

/// The MoE layers of one rank.
pub struct ExpertPipeline<B: Backend> {
    pub(crate) device: Arc<B>,
    pub(crate) fabric: Fabric<B>,
    pub(crate) options: PipelineOptions,
    pub(crate) buffers: LayerBuffers,
    /// A hash of what all ranks must have in common.
    pub(crate) settings: u64,
    /// What decides layer after layer, if the schedule is auto. One thread runs a rank's layers.
    pub(crate) scheduler: Option<RefCell<Scheduler>>,
}

impl<B: Backend> ExpertPipeline<B> {
    /// Reserves the buffers that every MoE layer of this rank shares.
    pub fn new(device: Arc<B>, fabric: Fabric<B>, options: PipelineOptions) -> Result<Self, PipelineError> {
        let PipelineSizes { layer, capacity, .. } = options.sizes;
        let least = Capacity::worst_case(1, &options.placement, layer.top_k);
        if !capacity.holds(&least) {
            // Halving a layer's tokens would never end.
            let message = format!("one token of every rank needs {least:?}, but there is {capacity:?}");
            return Err(DeviceError::Shape(message).into());
        }
        let buffers = LayerBuffers::allocate(&*device, &options)?;
        for (words, out) in buffers.constants(layer.top_k) {
            device.enqueue(Lane::Compute, Place::default(), HostToDevice { words, out })?;
        }
        let PipelineOptions { placement, policy, sizes, identity, .. } = &options;
        let settings = hash_bytes(format!("{placement:?} {policy} {sizes:?} {identity}").as_bytes());
        let shape = LayerShape { sizes: layer, shared_inner: sizes.shared_inner };
        let scheduler = policy.scheduler(placement, shape, device.dtype())?.map(RefCell::new);
        if scheduler.is_some() && fabric.size() > 1 {
            // It learns from the spans of layers.
            device.set_recording(true);
        }
        Ok(ExpertPipeline { device, fabric, options, buffers, settings, scheduler })
    }

    /// Whether [`observe`](Self::observe) looks at what it is given.
    pub fn observes(&self) -> bool {
        self.scheduler.is_some() && !self.is_alone()
    }

    /// After a step: what its layers took, for the auto schedule to learn from. `spans` are this rank's.
    pub fn observe(&self, spans: &[Span]) {
        if let Some(scheduler) = &self.scheduler {
            scheduler.borrow_mut().observe(self.fabric.rank(), spans);
        }
    }

    /// How the auto schedule planned the layers so far.
    pub fn schedule(&self) -> Option<ScheduleReport> {
        Some(self.scheduler.as_ref()?.borrow().report())
    }

    /// Where the shared expert of the next layer computes: known before the rendezvous.
    fn shared_expert(&self) -> SharedExpert {
        match &self.scheduler {
            Some(scheduler) => scheduler.borrow().shared_expert(),
            None => self.options.policy.shared_expert(),
        }
    }

    /// `y = Σ over the chosen experts of weight · expert(x), plus the shared expert's output`, for `x` and `y`
    /// `[T, H]`. T may differ between ranks and may be 0; all ranks must call. Returns once everything is
    /// enqueued: `y` is complete when the compute lane is.
    pub fn run(&self, layer: &MoeLayer, x: &Buffer, y: &Buffer) -> Result<LayerReport, PipelineError> {
        if self.is_alone() {
            return self.run_alone(layer, x, y);
        }
        let routing = self.route(layer, x)?;
        self.run_routed(layer, &routing, x, y)
    }

    /// [`run`](Self::run) with experts that are already chosen.
    pub fn run_routed(
        &self,
        layer: &MoeLayer,
        routing: &Routing,
        x: &Buffer,
        y: &Buffer,
    ) -> Result<LayerReport, PipelineError> {
        self.run_planned(layer, routing, None, x, y)
    }

    /// [`run_routed`](Self::run_routed) by a given table, the same on all ranks, instead of what was asked for at the
    /// start: to measure what a plan costs.
    pub fn run_table(
        &self,
        layer: &MoeLayer,
        routing: &Routing,
        table: &StageTable,
        x: &Buffer,
        y: &Buffer,
    ) -> Result<LayerReport, PipelineError> {
        self.run_planned(layer, routing, Some(table), x, y)
    }

    fn run_planned(
        &self,
        layer: &MoeLayer,
        routing: &Routing,
        table: Option<&StageTable>,
        x: &Buffer,
        y: &Buffer,
    ) -> Result<LayerReport, PipelineError> {
        let mut report = LayerReport::default();
        if table.is_none() && self.options.policy.schedule == Schedule::TwoBatch {
            self.run_micro_batches(layer, routing, 0..x.rows, x, y, &mut report)?;
            return Ok(report);
        }
        self.run_tokens(layer, routing, table, 0..x.rows, x, y, &mut report)?;
        Ok(report)
    }

    /// Runs the tokens in `range`, by `table` if there is one. If some rank could not hold what would arrive there, every rank sees it in
    /// the gathered counts, and all halve their tokens alike.
    #[expect(clippy::too_many_arguments, reason = "what run was given, and where it stands")]
    fn run_tokens(
        &self,
        layer: &MoeLayer,
        routing: &Routing,
        table: Option<&StageTable>,
        range: Range<usize>,
        x: &Buffer,
        y: &Buffer,
        report: &mut LayerReport,
    ) -> Result<(), PipelineError> {
        let (rows, out, buffers) = (x.rows(range.clone())?, y.rows(range.clone())?, &self.buffers);
        let shared = table.map_or_else(|| self.shared_expert(), |table| table.shared);
        let outgoing = self.pack(layer, buffers, &routing.slice(range.clone()), &rows)?;
        self.device.lane_wait(Lane::Transfer, &self.device.record(Lane::Compute));
        self.run_shared_if(shared == SharedExpert::BesideRendezvous, layer, &rows)?;
        report.host.packed = Some(Instant::now());
        let plan = self.rendezvous(layer, table, &outgoing, &mut report.host)?;
        if !self.options.sizes.capacity.fits(&plan.traffic) {
            let (first, second) = halves(range);
            self.run_tokens(layer, routing, table, first, x, y, report)?;
            return self.run_tokens(layer, routing, table, second, x, y, report);
        }
        let mut metadata = Some(self.exchange_metadata(layer, buffers, &plan)?);

        // The two lanes. What is enqueued on one waits for the other only where an event says so: while the
        // experts of a stage compute, the transfers enqueued after that stage's dispatch travel.
        let stages = plan.table.stages();
        let mut dispatched: Vec<Option<B::Event>> = vec![None; stages];
        let mut reduced: Vec<B::Event> = Vec::with_capacity(stages);
        for step in &plan.table.order {
            match *step {
                Transfer::Dispatch(stage) => {
                    self.dispatch(layer, buffers, &plan, stage)?;
                    dispatched[stage.0] = Some(self.device.record(Lane::Transfer));
                    if let Some(metadata) = metadata.take() {
                        // The first rows travel: time for the shared expert, and for the index arrays.
                        self.run_shared_if(shared == SharedExpert::BesideFirstDispatch, layer, &rows)?;
                        self.receive_metadata(layer, buffers, &plan, &metadata)?;
                        report.host.mapped = Some(Instant::now());
                    }
                    while let Some(Some(arrived)) = dispatched.get(reduced.len()) {
                        self.device.lane_wait(Lane::Compute, arrived);
                        self.run_stage(layer, buffers, &plan, Stage(reduced.len()))?;
                        reduced.push(self.device.record(Lane::Compute));
                    }
                }
                Transfer::Combine(stage) => {
                    self.device.lane_wait(Lane::Transfer, &reduced[stage.0]);
                    self.combine(layer, buffers, &plan, stage)?;
                }
            }
        }
        self.run_shared_if(shared == SharedExpert::BesideLastCombine, layer, &rows)?;
        self.device.lane_wait(Lane::Compute, &self.device.record(Lane::Transfer));
        self.run_shared_if(shared == SharedExpert::Alone, layer, &rows)?;
        self.sum_at_home(layer, buffers, outgoing.home, &out)?;
        report.host.enqueued = Some(Instant::now());
        report.note(plan.table, self.layer_bytes(&plan.traffic));
        Ok(())
    }

    /// Chooses every token's experts, and brings the choice to the host.
    pub fn route(&self, layer: &MoeLayer, x: &Buffer) -> Result<Routing, PipelineError> {
        let (experts, weights) = self.choose(layer, x)?;
        self.wait(&self.device.record(Lane::Compute))?;
        let (experts, weights) = (self.device.read_u32(&experts)?, self.device.read_f32(&weights)?);
        let experts_in_layer = self.options.placement.experts();
        Ok(Routing::new(experts_in_layer, layer.gate.top_k, experts, weights)?)
    }

    /// Chooses every token's experts: their numbers and weights `[T, k]`, on the device.
    pub(crate) fn choose(&self, layer: &MoeLayer, x: &Buffer) -> Result<(Buffer, Buffer), PipelineError> {
        let place = Place::layer(layer.layer);
        let tokens = 0..x.rows;
        let logits = self.buffers.router_logits.rows(tokens.clone())?;
        let experts = self.buffers.router_experts.rows(tokens.clone())?;
        let weights = self.buffers.router_weights.rows(tokens)?;
        let router = Gemm::linear(x.clone(), &layer.router, logits.clone());
        self.compute(place.phase(Phase::RouterLogits), router)?;
        let route = Route {
            logits,
            gate: layer.gate,
            bias: layer.bias.clone(),
            experts: experts.clone(),
            weights: weights.clone(),
        };
        self.compute(place, route)?;
        Ok((experts, weights))
    }

    /// The expert that every token visits, on the compute lane, if its turn is now.
    pub(crate) fn run_shared_if(&self, now: bool, layer: &MoeLayer, x: &Buffer) -> Result<(), PipelineError> {
        let Some(shared) = layer.shared.as_ref().filter(|_| now) else { return Ok(()) };
        let (tokens, buffers) = (0..x.rows, &self.buffers);
        let place = Place::layer(layer.layer).phase(Phase::Shared);
        let (inner, out) =
            (buffers.shared_inner.rows(tokens.clone())?, buffers.shared_out.rows(tokens.clone())?);
        self.compute(place, Gemm::gated(x.clone(), &shared.mlp.gate_up, inner.clone()))?;
        self.compute(place, Gemm::linear(inner, &shared.mlp.down, out.clone()))?;
        if let Some(weight) = &shared.gate {
            let gate = buffers.shared_gate.rows(tokens)?;
            let place = place.phase(Phase::SharedGate);
            self.compute(place, Gemm::linear(x.clone(), weight, gate.clone()))?;
            self.compute(place, GateRows { gate, x: out })?;
        }
        Ok(())
    }

    pub(crate) fn compute(&self, place: Place, op: impl Into<Op>) -> Result<(), PipelineError> {
        self.device.enqueue(Lane::Compute, place, op).map_err(PipelineError::from)
    }

    pub(crate) fn wait(&self, event: &B::Event) -> Result<(), PipelineError> {
        Ok(self.device.wait(event, Deadline::behind(self.options.timeout))?)
    }

    fn layer_bytes(&self, traffic: &Traffic) -> u64 {
        let needed = Capacity::needed(traffic, self.fabric.rank());
        LayerBytes::of(&self.options.sizes.layer, &needed).total()
    }
}

impl LayerReport {
    pub(crate) fn note(&mut self, table: StageTable, bytes: u64) {
        self.tables.push(table);
        self.peak_bytes = self.peak_bytes.max(bytes);
    }
}
