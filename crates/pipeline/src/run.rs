//! START HERE. One MoE layer as it happens on one rank; every rank runs the same code.

use crate::PipelineError;
use crate::batch::{Batch, Gathered, Rows, batch_of};
use crate::buffers::{LayerBuffers, PipelineSizes};
use epsmoe_base::{
    DType, Deadline, Lane, Layer, Phase, Place, RowFormat, Stage, WireDType, WireFormat, hash_bytes,
};
use epsmoe_device::op::{
    Activate, Activation, Fp8, GateRows, Gather, GatherFp8, Gemm, HostToDevice, Op, TopKRouter,
};
use epsmoe_device::{Backend, Buffer, DeviceError, Reserve, Weight, WeightFormat};
use epsmoe_fabric::Fabric;
use epsmoe_plan::{
    Ahead, Capacity, LayerBytes, Planner, Policy, Routing, Schedule, ScheduleReport, SharedExpert, SlotMap,
    Span, StageTable, Transfer, halves,
};
use serde::{Deserialize, Serialize};
use std::cell::{Cell, RefCell};
use std::ops::{Range, RangeInclusive};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// An MLP, gated unless it says otherwise: `down( silu(x·gateᵀ) ⊙ (x·upᵀ) )`.
#[derive(Clone, Debug)]
pub struct Mlp {
    /// Gate and up maps `[I, H]`; one matrix of both `[2I, H]` where the activation is an operation of its own, and of the
    /// one map there is where it has no gate.
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
    pub router_weight: Weight,
    /// Added to the router's logits `[E]`, if the model does that.
    pub router_bias: Option<Weight>,
    /// Correction bias of the router `[E]`, if the model has one.
    pub bias: Option<Weight>,
    /// Factors on the weights of the experts `[E]`, if the model has some.
    pub scales: Option<Weight>,
    /// How router logits become experts.
    pub router: TopKRouter,
    /// Which rank holds which expert, in which slot; the same on all ranks.
    pub slots: Arc<SlotMap>,
    /// The experts of this rank, in the order of its slots `[L]`.
    pub experts: Vec<Mlp>,
    /// What the experts do between their products, the shared one too, if it is more than `silu(gate) ⊙ up`.
    pub activation: Option<ExpertActivation>,
    /// The expert that every token visits, if the model has one.
    pub shared: Option<SharedMlp>,
    /// Experts that give rows back as they are, if the model has some.
    pub identities: Option<Identities>,
    /// Whether weights are put on what experts read, instead of what they give.
    pub scaled_inputs: bool,
}

impl MoeLayer {
    /// Experts that the router chooses from.
    pub fn choices(&self) -> usize {
        self.slots.experts() + self.identities.map_or(0, |identities| identities.experts)
    }

    /// Whether experts add biases. They go by the slot of every row that is computed, of which an uncounted layer has more than
    /// are in one.
    fn has_biases(&self) -> bool {
        self.activation.as_ref().is_some_and(|of| of.gate_up_bias.is_some() || of.down_bias.is_some())
    }

    /// How many slots tokens are sent to.
    pub(crate) fn fanout(&self) -> RangeInclusive<usize> {
        let least = if self.identities.is_some() { 0 } else { self.router.top_k };
        least..=self.router.top_k
    }
}

/// Experts that give rows back as they are: nothing of theirs is computed, and no row travels for them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Identities {
    /// How many; they are numbered after the others.
    pub experts: usize,
    /// Whether this rank adds what they give: of ranks that split every expert, one does.
    pub added: bool,
}

/// An activation that is an operation of its own, and the biases of the experts' maps.
#[derive(Clone, Debug)]
pub struct ExpertActivation {
    /// The activation.
    pub activation: Activation,
    /// Of gate and up `[L · 2I]`, if there are some.
    pub gate_up_bias: Option<Weight>,
    /// Of the down maps `[L · H]`, if there are some and this rank is to add them.
    pub down_bias: Option<Weight>,
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
    /// What the user asked for.
    pub policy: Policy,
    /// Widths and capacities.
    pub sizes: PipelineSizes,
    /// Layers of at most so many tokens on all ranks together may be gathered: if everybody knows how many each rank has,
    /// every rank is given the rows of all, and no host waits for counts. 0 forbids it.
    pub gather_tokens: usize,
    /// A hash of the model and whatever else all ranks must have in common.
    pub identity: u64,
    /// How long ranks wait for each other. The host waits twice as long for its own lanes, so that the exchange
    /// notices a late rank first: it knows which one.
    pub timeout: Duration,
}

impl PipelineOptions {
    /// Reserves what a pipeline does that is told this, to count it.
    pub fn reserve(&self, device: &impl Reserve) -> Result<(), DeviceError> {
        LayerBuffers::allocate(device, self).map(drop)
    }
}

/// What a layer did.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct LayerReport {
    /// Plans that were run: one for each chunk of tokens, or for each micro-batch of one.
    pub tables: Vec<StageTable>,
    /// The most bytes that one of them needed on this rank.
    pub peak_bytes: u64,
    /// When the host was done with what no lane does; of the last chunk.
    pub host: HostTimes,
}

/// When the host of a rank was done with a part of a layer; in place there are no counts to wait for. The clock of another
/// process says nothing here: of what came from there only the times between the parts mean something.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "SinceCounted", into = "SinceCounted")]
pub struct HostTimes {
    /// The histograms are read.
    pub counted: Option<Instant>,
    /// Rows and metadata are on their way to the send buffers, and the count exchange is next.
    pub packed: Option<Instant>,
    /// Every rank's counts are there.
    pub exchanged: Option<Instant>,
    /// So is the plan.
    pub planned: Option<Instant>,
    /// Everything is enqueued.
    pub enqueued: Option<Instant>,
}

/// How long after `counted` each part was done, as it is told to other processes.
#[derive(Serialize, Deserialize)]
struct SinceCounted([Option<Duration>; 5]);

impl From<HostTimes> for SinceCounted {
    fn from(times: HostTimes) -> Self {
        let HostTimes { counted, packed, exchanged, planned, enqueued } = times;
        let since = |time: Option<Instant>| Some(time?.saturating_duration_since(counted?));
        SinceCounted([counted, packed, exchanged, planned, enqueued].map(since))
    }
}

impl From<SinceCounted> for HostTimes {
    fn from(SinceCounted(since): SinceCounted) -> Self {
        let counted = Instant::now();
        let [counted, packed, exchanged, planned, enqueued] = since.map(|since| counted.checked_add(since?));
        HostTimes { counted, packed, exchanged, planned, enqueued }
    }
}

/// The MoE layers of one rank.
pub struct ExpertPipeline<B: Backend> {
    pub(crate) device: Arc<B>,
    pub(crate) fabric: Fabric<B>,
    pub(crate) options: PipelineOptions,
    pub(crate) buffers: LayerBuffers,
    /// A hash of what all ranks must have in common.
    pub(crate) settings: u64,
    /// What decides layer after layer. One thread runs a rank's layers.
    pub(crate) planner: RefCell<Box<dyn Planner>>,
    /// The digest of the map that the device holds.
    pub(crate) held_map: Cell<Option<u64>>,
}

/// The rows of a layer, on their way in.
#[derive(Clone, Copy, Debug)]
pub struct Input<'a> {
    /// `[T, H]`.
    pub x: &'a Buffer,
    /// The same as FP8 codes with their scales, if they are there already: for experts that take them so, and to travel.
    pub codes: Option<&'a Buffer>,
}

impl<'a> From<&'a Buffer> for Input<'a> {
    fn from(x: &'a Buffer) -> Self {
        Input { x, codes: None }
    }
}

/// A layer that was called for.
#[derive(Clone, Copy)]
pub(crate) struct Call<'a> {
    pub(crate) layer: &'a MoeLayer,
    /// What to run by, instead of what the planner says.
    pub(crate) table: Option<&'a StageTable>,
    /// The tokens of every rank, where all ranks know them.
    pub(crate) known: Option<&'a [usize]>,
    /// Input and output `[T, H]`.
    pub(crate) x: &'a Buffer,
    pub(crate) y: &'a Buffer,
    /// The input as codes.
    pub(crate) codes: Option<&'a Buffer>,
    /// Where the shared expert's output is wanted by itself, instead of in `y`.
    pub(crate) shared_out: Option<&'a Buffer>,
}

impl Call<'_> {
    /// The rows of some tokens, as codes if they are there and `out` is for codes.
    pub(crate) fn rows_for(&self, tokens: &Range<usize>, out: &Buffer) -> Result<Buffer, DeviceError> {
        let codes = self.codes.filter(|codes| codes.dtype == out.dtype);
        codes.unwrap_or(self.x).rows(tokens.clone())
    }
}

/// A layer that is enqueued up to its last sums.
pub struct Pending<B: Backend> {
    batches: Vec<Batch>,
    /// `[batch]` the arrival of its last sums.
    combined: Vec<Option<B::Event>>,
    /// `[batch]` what is added to them.
    addends: Vec<Option<Buffer>>,
    report: LayerReport,
}

impl<B: Backend> ExpertPipeline<B> {
    /// Reserves the buffers that every MoE layer of this rank shares.
    ///
    /// # Errors
    /// Sizes of which not even a token per rank fits, a wire format that no operation packs rows into, and what the
    /// device refuses.
    pub fn new(device: Arc<B>, fabric: Fabric<B>, options: PipelineOptions) -> Result<Self, PipelineError> {
        let sizes = &options.sizes;
        let least = Capacity::for_policy(1, &sizes.layer, &options.policy);
        if !sizes.capacity.holds(&least) {
            // Halving a layer's tokens would never end.
            let message =
                format!("one token of every rank needs {least:?}, but there is {:?}", sizes.capacity);
            return Err(DeviceError::Shape(message).into());
        }
        let (wire, dtype) = (sizes.layer.wire, device.dtype());
        let packed = [WireDType::Auto, WireDType::Fp8].map(|asked| WireFormat::of(asked, dtype));
        if !packed.contains(&wire) {
            let [plain, fp8] = packed;
            let message = format!(
                "the wire format ({wire}) does not go with activations in {dtype}: use {plain}, or {fp8}"
            );
            return Err(DeviceError::Unsupported(message).into());
        }
        let buffers = LayerBuffers::allocate(&*device, &options)?;
        let tokens = buffers.every_token.clone();
        let words = (0..tokens.rows as u32).collect();
        device.enqueue(Lane::Compute, Place::default(), HostToDevice { words, out: tokens })?;
        Self::in_buffers(device, fabric, options, buffers)
    }

    /// The same layers as others decide and carry them, in the same buffers: the two take turns.
    ///
    /// # Errors
    /// A two-batch policy where this one is none: it has no room for the counts of two batches.
    pub fn sharing(&self, policy: Policy, fabric: Fabric<B>) -> Result<Self, PipelineError> {
        if policy.schedule == Schedule::TwoBatch && self.options.policy.schedule != Schedule::TwoBatch {
            let message = "buffers of one batch cannot be shared with two: begin with the two-batch schedule";
            return Err(DeviceError::Shape(message.into()).into());
        }
        let options = PipelineOptions { policy, ..self.options.clone() };
        Self::in_buffers(Arc::clone(&self.device), fabric, options, self.buffers.clone())
    }

    fn in_buffers(
        device: Arc<B>,
        fabric: Fabric<B>,
        options: PipelineOptions,
        buffers: LayerBuffers,
    ) -> Result<Self, PipelineError> {
        let PipelineOptions { policy, sizes, gather_tokens, identity, .. } = &options;
        let settings = hash_bytes(format!("{policy} {sizes:?} {gather_tokens} {identity}").as_bytes());
        let planner = RefCell::new(policy.planner(sizes.layer, device.dtype())?);
        let held_map = Cell::new(None);
        Ok(ExpertPipeline { device, fabric, options, buffers, settings, planner, held_map })
    }

    /// Whether [`observe`](Self::observe) after this step wants to see the spans of its layers.
    pub fn wants_spans(&self) -> bool {
        self.fabric.size() > 1 && self.planner.borrow().wants_spans()
    }

    /// Whether the layers that come now are recorded, if that is not because they [were wanted](Self::wants_spans).
    pub fn set_recorded(&self, recorded: bool) {
        self.planner.borrow_mut().set_recorded(recorded);
    }

    /// After a step: what its layers took, for the planner to learn from. `spans` are this rank's; nothing if nothing was
    /// recorded.
    pub fn observe(&self, spans: &[Span]) {
        self.planner.borrow_mut().observe(self.fabric.rank(), spans);
    }

    /// How the layers so far were planned, if the schedule is auto.
    pub fn report(&self) -> Option<ScheduleReport> {
        self.planner.borrow().report()
    }

    /// `y = Σ over the chosen experts of weight · expert(x), plus the shared expert's output`, for `x` and `y`
    /// `[T, H]`. T may differ between ranks and may be 0; all ranks must call. Returns once everything is
    /// enqueued: `y` is complete when the compute lane is. `known` are the tokens of every rank, where all ranks know them and
    /// [agree on everything else](Self::settings): then no host needs to ask.
    pub fn run<'a>(
        &self,
        layer: &MoeLayer,
        known: Option<&[usize]>,
        input: impl Into<Input<'a>>,
        y: &Buffer,
    ) -> Result<LayerReport, PipelineError> {
        let Input { x, codes } = input.into();
        self.choose(layer, x)?;
        self.run_chosen(Call { layer, table: None, known, x, y, codes, shared_out: None })
    }

    /// The first part of a layer whose shared expert's output goes to `shared`, and what the experts give to `y`, but not
    /// before [`finish`](Self::finish): what is enqueued until then computes while the last sums travel. `routing`, if
    /// there is one, overrules the router.
    pub fn begin<'a>(
        &self,
        layer: &MoeLayer,
        (known, routing): (Option<&[usize]>, Option<&Routing>),
        input: impl Into<Input<'a>>,
        [shared, y]: [&Buffer; 2],
    ) -> Result<Pending<B>, PipelineError> {
        let Input { x, codes } = input.into();
        match routing {
            Some(routing) => self.overrule(layer, routing)?,
            None => self.choose(layer, x)?,
        }
        self.begin_chosen(&Call { layer, table: None, known, x, y, codes, shared_out: Some(shared) })
    }

    /// The rest of it, as work of `place`.
    pub fn finish(&self, place: Place, pending: Pending<B>) -> Result<LayerReport, PipelineError> {
        let Pending { batches, combined, addends, mut report } = pending;
        for ((batch, combined), addend) in batches.iter().zip(&combined).zip(addends) {
            self.after(Lane::Compute, combined.as_ref());
            self.sum(place, batch, addend)?;
        }
        report.host.enqueued = Some(Instant::now());
        Ok(report)
    }

    /// [`run`](Self::run) with experts that are already chosen.
    pub fn run_routed<'a>(
        &self,
        layer: &MoeLayer,
        (known, routing): (Option<&[usize]>, &Routing),
        input: impl Into<Input<'a>>,
        y: &Buffer,
    ) -> Result<LayerReport, PipelineError> {
        let Input { x, codes } = input.into();
        self.overrule(layer, routing)?;
        self.run_chosen(Call { layer, table: None, known, x, y, codes, shared_out: None })
    }

    /// [`run`](Self::run) by a given table, the same on all ranks, instead of what was asked for at the start: to measure
    /// what a plan costs. With `routing`, the router's choice is overruled.
    pub fn run_table(
        &self,
        layer: &MoeLayer,
        routing: Option<&Routing>,
        table: &StageTable,
        x: &Buffer,
        y: &Buffer,
    ) -> Result<LayerReport, PipelineError> {
        self.choose(layer, x)?;
        if let Some(routing) = routing {
            self.overrule(layer, routing)?;
        }
        self.run_chosen(Call { layer, table: Some(table), known: None, x, y, codes: None, shared_out: None })
    }

    /// Whether layers may be gathered, if they are short enough and everybody knows it.
    pub fn gathers(&self) -> bool {
        let PipelineOptions { policy, gather_tokens, .. } = &self.options;
        self.fabric.size() > 1 && *gather_tokens > 0 && policy.stays_in_place()
    }

    /// A hash of what all ranks must have in common, for whoever lets them meet before their layers.
    pub fn settings(&self) -> u64 {
        self.settings
    }

    /// Whether a layer of so many tokens is enqueued without anything that the host waits for or brings along.
    pub fn runs_ahead(&self, layer: &MoeLayer, tokens: usize) -> Result<bool, PipelineError> {
        let ahead = self.planner.borrow().ahead(&layer.slots)?;
        let needed = Capacity::in_place(tokens, layer.router.top_k);
        Ok(ahead.table.is_some_and(|table| table.runs_in_place(&layer.slots))
            && self.options.sizes.capacity.holds(&needed)
            && self.held_map.get() == Some(layer.slots.digest()))
    }

    fn run_chosen(&self, call: Call<'_>) -> Result<LayerReport, PipelineError> {
        let pending = self.begin_chosen(&call)?;
        self.finish(sum_of(call.layer), pending)
    }

    fn begin_chosen(&self, call: &Call<'_>) -> Result<Pending<B>, PipelineError> {
        self.assign(call.layer, call.x.rows)?;
        self.run_tokens(call, 0..call.x.rows, LayerReport::default(), 0)
    }

    /// Runs some of the tokens. If some rank could not hold what would arrive there, every rank sees it in the counts,
    /// and all halve their tokens alike.
    fn run_tokens(
        &self,
        call: &Call<'_>,
        tokens: Range<usize>,
        mut report: LayerReport,
        halvings: u32,
    ) -> Result<Pending<B>, PipelineError> {
        // After so many no rank can have more than one token, of which this one does not know.
        const MOST_HALVINGS: u32 = u32::BITS;
        match self.plan(call, &tokens, &mut report.host)? {
            Some(batches) => self.walk(call, &tokens, batches, report),
            None if halvings < MOST_HALVINGS => {
                let (first, second) = halves(tokens);
                let first = self.run_tokens(call, first, report, halvings + 1)?;
                let report = self.finish(sum_of(call.layer), first)?;
                self.run_tokens(call, second, report, halvings + 1)
            }
            None => {
                let capacity = &self.options.sizes.capacity;
                let message = format!("one token does not fit in {capacity:?} as this table runs it");
                Err(DeviceError::Shape(message).into())
            }
        }
    }

    /// The batches of some tokens, packed and planned; nothing if some rank could not hold them.
    fn plan(
        &self,
        call: &Call<'_>,
        tokens: &Range<usize>,
        times: &mut HostTimes,
    ) -> Result<Option<Vec<Batch>>, PipelineError> {
        let (map, capacity) = (&*call.layer.slots, &self.options.sizes.capacity);
        let ahead = match call.table {
            Some(table) => Ahead { shared: table.shared, batches: 1, table: Some(table.clone()) },
            None => self.planner.borrow().ahead(map)?,
        };
        let gathered = self.gathered(call, tokens);
        if let Some(table) = ahead.table.as_ref().filter(|table| table.runs_gathered())
            && let Some(gathered) = gathered
        {
            return Ok(Some(vec![self.spread(call, tokens, table.clone(), gathered)?]));
        }
        if let Some(table) = ahead.table.filter(|table| table.runs_in_place(map)) {
            table.validate(map)?;
            let needed = Capacity::in_place(tokens.len(), call.layer.router.top_k);
            return Ok(match capacity.holds(&needed) {
                true => Some(vec![self.in_place(call, tokens, table)?]),
                false => None,
            });
        }
        let parts = match ahead.batches {
            2 => <[Range<usize>; 2]>::from(halves(tokens.clone())).to_vec(),
            _ => vec![tokens.clone()],
        };
        for (number, tokens) in parts.iter().enumerate() {
            self.count(call, &self.buffers.of_batch(number, &Capacity::default())?, tokens)?;
        }
        self.wait(&self.device.record(Lane::Compute))?;
        times.counted = Some(Instant::now());
        let mut packed = Vec::with_capacity(parts.len());
        let mut before = Capacity::default();
        for (number, tokens) in parts.into_iter().enumerate() {
            let batch = self.pack(call, self.buffers.of_batch(number, &before)?, tokens)?;
            before = batch.sent();
            packed.push(batch);
        }
        self.device.lane_wait(Lane::Transfer, &self.device.record(Lane::Compute));
        self.run_shared_if(ahead.shared == SharedExpert::BesideCountExchange, call, tokens)?;
        times.packed = Some(Instant::now());
        let mut batches = self.exchange_counts(call, packed, times)?;
        if !capacity.fits(&batches.iter().filter_map(Batch::traffic).collect::<Vec<_>>()) {
            return Ok(None);
        }
        let mut before = Capacity::default();
        for (number, batch) in batches.iter_mut().enumerate() {
            batch.buffers = self.buffers.of_batch(number, &before)?;
            before = batch.needed(self.fabric.rank(), &self.options.sizes.layer);
        }
        Ok(Some(batches))
    }

    /// Where the rows of all ranks are if these tokens are gathered: a layer that everybody knows to be that short.
    fn gathered(&self, call: &Call<'_>, tokens: &Range<usize>) -> Option<Gathered> {
        let (sizes, all) = (&self.options.sizes, call.known?);
        let most = all.iter().copied().max().unwrap_or(0);
        let fits = all.len() == self.fabric.size()
            && all.iter().sum::<usize>() <= self.options.gather_tokens
            && sizes.capacity.holds(&Capacity::gathered(most, &sizes.layer))
            && !call.layer.has_biases();
        (all.len() > 1 && fits && tokens.len() == all[self.fabric.rank().0]).then(|| Gathered::new(all))
    }

    /// A batch that needs nobody's counts.
    fn in_place(
        &self,
        call: &Call<'_>,
        tokens: &Range<usize>,
        table: StageTable,
    ) -> Result<Batch, PipelineError> {
        self.run_shared_if(table.shared == SharedExpert::BesideCountExchange, call, tokens)?;
        let (x, y) = (call.x.rows(tokens.clone())?, call.y.rows(tokens.clone())?);
        Ok(Batch { tokens: tokens.clone(), x, y, buffers: self.buffers.clone(), table, rows: Rows::InPlace })
    }

    /// The two lanes. What is enqueued on one waits for the other only where an event says so: while the experts of a
    /// stage compute, the transfers enqueued after that stage's dispatch travel. In place there are no such events.
    fn walk(
        &self,
        call: &Call<'_>,
        tokens: &Range<usize>,
        batches: Vec<Batch>,
        mut report: LayerReport,
    ) -> Result<Pending<B>, PipelineError> {
        let StageTable { order, shared, reserved, .. } = &batches[0].table;
        self.device.reserve_for_transfers(*reserved);
        let mut events = Events::new(&batches);
        for (position, step) in order.iter().enumerate() {
            match *step {
                Transfer::Dispatch(stage) => {
                    let number = batch_of(&batches, stage);
                    if events.metadata.len() == number {
                        events.metadata.push(self.exchange_metadata(call, &batches[number])?);
                    }
                    events.dispatched[stage.0] = Some(self.dispatch(call, &batches[number], stage)?);
                    // The first rows travel: time for the shared expert.
                    let first = position == 0 && *shared == SharedExpert::BesideFirstDispatch;
                    self.run_shared_if(first, call, tokens)?;
                    self.run_arrived(call, &batches, &mut events)?;
                }
                Transfer::Combine(stage) => {
                    let (number, reduced) = (batch_of(&batches, stage), events.reduced[stage.0].as_ref());
                    events.combined[number] = self.combine(call, &batches[number], stage, reduced)?;
                }
            }
        }
        self.run_shared_if(*shared == SharedExpert::BesideLastCombine, call, tokens)?;
        if *shared == SharedExpert::Serial {
            events.combined.iter().for_each(|combined| self.after(Lane::Compute, combined.as_ref()));
            self.run_shared_if(true, call, tokens)?;
        }
        self.device.reserve_for_transfers(0);
        self.note(&batches, &mut report);
        let addend = |batch| self.addend(call, batch);
        let addends = batches.iter().map(addend).collect::<Result<_, _>>()?;
        Ok(Pending { batches, combined: events.combined, addends, report })
    }

    /// The stages whose rows, and those of all stages before, are on their way.
    fn run_arrived(
        &self,
        call: &Call<'_>,
        batches: &[Batch],
        events: &mut Events<B::Event>,
    ) -> Result<(), PipelineError> {
        while let Some(Some(arrived)) = events.dispatched.get(events.reduced.len()) {
            let stage = Stage(events.reduced.len());
            let number = batch_of(batches, stage);
            if events.received == number {
                self.receive(call, &batches[number], events.metadata[number].as_ref())?;
                events.received += 1;
            }
            self.after(Lane::Compute, arrived.as_ref());
            self.run_stage(call, &batches[number], stage)?;
            events.reduced.push(arrived.as_ref().map(|_| self.device.record(Lane::Compute)));
        }
        Ok(())
    }

    /// The expert that every token visits, on the compute lane, if its turn is now.
    pub(crate) fn run_shared_if(
        &self,
        now: bool,
        call: &Call<'_>,
        tokens: &Range<usize>,
    ) -> Result<(), PipelineError> {
        let Some(shared) = call.layer.shared.as_ref().filter(|_| now) else { return Ok(()) };
        let place = Place::layer(call.layer.layer).phase(Phase::Shared);
        let (buffers, x) = (&self.buffers, call.x.rows(tokens.clone())?);
        let out = call.shared_out.unwrap_or(&buffers.shared_out).rows(tokens.clone())?;
        let inner = buffers.shared_inner.rows(tokens.clone())?.for_weight(&shared.mlp.down)?;
        match &call.layer.activation {
            None => {
                let rows = match call.codes {
                    Some(codes) if shared.mlp.gate_up.format == WeightFormat::Fp8 => {
                        codes.rows(tokens.clone())?
                    }
                    _ => self.device.rows_for(place, &x, &shared.mlp.gate_up, &buffers.shared_rows)?,
                };
                self.compute(place, Gemm::gated(rows, &shared.mlp.gate_up, inner.clone()))?;
            }
            Some(ExpertActivation { activation, .. }) => {
                let products = buffers.shared_products.rows(tokens.clone())?;
                self.compute(place, Gemm::linear(x.clone(), &shared.mlp.gate_up, products.clone()))?;
                let (activation, out) = (*activation, inner.clone());
                self.compute(place, Activate { x: products, bias: None, activation, out })?;
            }
        }
        self.compute(place, Gemm::linear(inner, &shared.mlp.down, out.clone()))?;
        if let Some(weight) = &shared.gate {
            let gate = buffers.shared_gate.rows(tokens.clone())?;
            let place = place.phase(Phase::SharedGate);
            self.compute(place, Gemm::linear(x, weight, gate.clone()))?;
            self.compute(place, GateRows { gate, x: out })?;
        }
        Ok(())
    }

    pub(crate) fn compute(&self, place: Place, op: impl Into<Op>) -> Result<(), PipelineError> {
        self.device.enqueue(Lane::Compute, place, op).map_err(PipelineError::from)
    }

    /// Lets nothing enqueued on a lane from now on start before an event, if there is one to wait for.
    pub(crate) fn after(&self, lane: Lane, event: Option<&B::Event>) {
        if let Some(event) = event {
            self.device.lane_wait(lane, event);
        }
    }

    /// Rows of `x` in the order of `index`, as the format that rows travel in has them: to it, from it, or to what numbers
    /// become that went through it without travelling. Where `out` is for codes rows become codes, or stay the codes that
    /// they arrived as.
    pub(crate) fn gather_rows(
        &self,
        place: Place,
        how: Fp8,
        [x, index, out]: [Buffer; 3],
    ) -> Result<(), PipelineError> {
        let (codes, dispatch) = (RowFormat::Fp8.elements(0).0, self.options.sizes.layer.wire.dispatch);
        match (x.dtype == codes, out.dtype == codes) {
            (true, true) => {
                let (x, out) = (x.bits_as(DType::F32)?, out.bits_as(DType::F32)?);
                self.compute(place, Gather { x, index, out })
            }
            (false, true) => self.compute(place, GatherFp8 { x, index: Some(index), out, how: Fp8::Encode }),
            _ if dispatch == RowFormat::Fp8 => {
                self.compute(place, GatherFp8 { x, index: Some(index), out, how })
            }
            _ => self.compute(place, Gather { x, index, out }),
        }
    }

    pub(crate) fn wait(&self, event: &B::Event) -> Result<(), PipelineError> {
        Ok(self.device.wait(event, Deadline::behind(self.options.timeout))?)
    }

    fn note(&self, batches: &[Batch], report: &mut LayerReport) {
        let (me, sizes) = (self.fabric.rank(), &self.options.sizes.layer);
        let needed = batches.iter().map(|batch| batch.needed(me, sizes));
        let needed = needed.fold(Capacity::default(), |sum, needed| sum.and(&needed));
        report.peak_bytes = report.peak_bytes.max(LayerBytes::of(sizes, &needed).total());
        report.tables.extend(batches.iter().map(|batch| batch.table.clone()));
    }
}

/// What the last sums of a layer are.
fn sum_of(layer: &MoeLayer) -> Place {
    Place::layer(layer.layer).phase(Phase::Sum)
}

/// What has been enqueued of a layer, and the events that say when it is done; none where nothing travels.
struct Events<E> {
    /// `[batch]` the arrival of its metadata, of those that are on their way.
    metadata: Vec<Option<E>>,
    /// Batches whose index arrays are being made.
    received: usize,
    /// `[stage]` the arrival of its rows, once they are on their way.
    dispatched: Vec<Option<Option<E>>>,
    /// `[stage]` its sums, of those that compute.
    reduced: Vec<Option<E>>,
    /// `[batch]` the arrival of its last sums.
    combined: Vec<Option<E>>,
}

impl<E: Clone> Events<E> {
    fn new(batches: &[Batch]) -> Self {
        let stages = batches[0].table.stages();
        Events {
            metadata: Vec::with_capacity(batches.len()),
            received: 0,
            dispatched: vec![None; stages],
            reduced: Vec::with_capacity(stages),
            combined: vec![None; batches.len()],
        }
    }
}
