//! Token ids become logits. START HERE to follow a token: [`Model::forward`].

use crate::attention::{Attention, Context};
use crate::collectives::Group;
use crate::load::Loader;
use crate::mlp::{MlpWeights, ResidualWeights};
use crate::parallel::Layout;
use crate::step::{Step, StepLayout};
use crate::{Experts, LayerPart, MlpSpec, ModelError, ModelSpec, Parallel, Part, WeightSource};
use epsmoe_base::{DType, Deadline, Fault, FaultKind, Lane, Layer, Phase, Place, hash_bytes};
use epsmoe_device::op::{Add, ArgMax, Embed, Gather, Gemm, HostToDevice, Norm, Op, Origin, RopeTable};
use epsmoe_device::{Backend, Buffer, DeviceError, Weight};
use epsmoe_fabric::Fabric;
use epsmoe_pipeline::{
    ExpertPipeline, LayerReport, Mlp, MoeLayer, PipelineError, PipelineOptions, PipelineSizes, RoutingLog,
};
use epsmoe_plan::{Capacity, LayerSizes, Policy, Schedule, ScheduleReport, Span};
use std::sync::Arc;
use std::time::Duration;

/// What one group of ranks computes in one step: new tokens of some sequences, packed one after the other.
/// Every rank of the group is given the same.
#[derive(Clone, Debug, Default)]
pub struct Batch {
    /// Token ids `[T]`.
    pub ids: Vec<u32>,
    /// Position of each token in its sequence `[T]`.
    pub positions: Vec<u32>,
    /// Cache slot of each token `[T]`.
    pub slots: Vec<u32>,
    /// First token of each sequence, and T, `[B + 1]`.
    pub sequence_starts: Vec<u32>,
    /// Cache blocks of each sequence, in order `[B]`.
    pub blocks: Vec<Vec<u32>>,
    /// Number of each sequence, by which a routing log knows it `[B]`.
    pub sequences: Vec<u64>,
    /// Tokens whose logits are wanted, ascending.
    pub logits: Vec<u32>,
    /// Whether of these logits only the largest of each token is wanted: the most likely next token.
    pub greedy: bool,
}

/// How a model is run; equal on all ranks.
#[derive(Clone, Debug)]
pub struct ModelOptions {
    /// Most tokens of one group of ranks in one step.
    pub max_tokens: usize,
    /// Most sequences of one group in one step.
    pub max_sequences: usize,
    /// Cache blocks of one rank.
    pub cache_blocks: usize,
    /// Most cache blocks of one sequence.
    pub max_blocks: usize,
    /// How MoE layers are scheduled.
    pub policy: Policy,
    /// Room for the tokens of an MoE layer; the worst case when absent. Layers that do not fit run in chunks.
    pub capacity: Option<Capacity>,
    /// How the model is spread over ranks.
    pub parallel: Parallel,
    /// What decides where tokens go.
    pub routing: RoutingMode,
    /// How long any wait may take.
    pub timeout: Duration,
}

/// What decides which experts a token goes to.
#[derive(Clone, Debug, Default)]
pub enum RoutingMode {
    /// The model's gates.
    #[default]
    FromRouter,
    /// The gates, and every step tells what they chose.
    Record,
    /// What another run recorded.
    Replay(Arc<RoutingLog>),
}

/// What a step gave.
#[derive(Clone, Debug, Default)]
pub struct StepOutput {
    /// Logits of the wanted tokens, row by row `[wanted, V]`, unless the step is greedy; on the first rank of each
    /// group.
    pub logits: Vec<f32>,
    /// The most likely token after each of them `[wanted]`, if the step is greedy; on the first rank of each group.
    pub tokens: Vec<u32>,
    /// What each MoE layer did.
    pub layers: Vec<LayerReport>,
    /// Where the tokens went that this rank routed, if that was to be recorded.
    pub routing: RoutingLog,
    /// How the auto schedule planned the layers so far.
    pub schedule: Option<ScheduleReport>,
}

/// The model of one rank: its weights, its cache and its buffers.
pub struct Model<B: Backend> {
    spec: Arc<ModelSpec>,
    device: Arc<B>,
    fabric: Fabric<B>,
    layout: Layout,
    /// A hash of everything that ranks must have in common.
    identity: u64,
    /// The ranks that split attention, and those that split MLPs.
    attention: Group<B>,
    mlp: Group<B>,
    experts: ExpertLayers<B>,
    options: ModelOptions,
    embedding: Weight,
    frequencies: Weight,
    layers: Vec<LayerWeights>,
    final_norm: Weight,
    head: Weight,
    buffers: StepBuffers,
}

/// What runs the MoE layers of one rank.
enum ExpertLayers<B: Backend> {
    /// The model has none.
    None,
    /// Whole experts, over all ranks.
    Spread(ExpertPipeline<B>),
    /// A part of every expert, on this rank for itself.
    Split(ExpertPipeline<B>),
}

struct LayerWeights {
    input_norm: Weight,
    attention: Attention,
    mlp_norm: Weight,
    mlp: MlpWeights,
    residual: Option<ResidualWeights>,
}

/// Logits are computed for this many tokens at a time.
const LOGIT_ROWS: usize = 256;

/// Room for one step.
struct StepBuffers {
    /// Of the tokens this rank keeps `[kept, 1]`.
    ids: Buffer,
    /// Of all tokens of the group `[T, …]`.
    positions: Buffer,
    slots: Buffer,
    angles: Buffer,
    /// `[B + 1, 1]`, and `[B, most blocks of a sequence]`.
    sequence_starts: Buffer,
    blocks: Buffer,
    /// The residual stream of the tokens this rank keeps, and what attention or an MLP adds to it, `[kept, H]`:
    /// in float32, as every layer's rounding would stay in it.
    hidden: Buffer,
    mixed: Buffer,
    /// The stream normed `[kept, H]`.
    normed: Buffer,
    /// The layer's normed input, for experts that read it beside attention.
    early: Buffer,
    /// Of a dense MLP, for all tokens of the ranks that split it.
    inner: Buffer,
    /// Tokens whose logits are wanted, of those that this rank keeps `[kept, 1]`.
    wanted: Buffer,
    /// `[LOGIT_ROWS, V]`, and the largest of each row `[LOGIT_ROWS, 1]`.
    logits: Buffer,
    tokens: Buffer,
}

impl<B: Backend> Model<B> {
    /// Loads what this rank holds, and reserves all memory it will use.
    pub fn load(
        spec: Arc<ModelSpec>,
        source: &dyn WeightSource,
        device: Arc<B>,
        fabric: Fabric<B>,
        options: ModelOptions,
    ) -> Result<Self, ModelError> {
        let layout = options.parallel.layout(&spec, fabric.rank(), fabric.size())?;
        let loader = Loader { spec: &spec, source, device: &*device, layout };
        let layers = Attention::load(&loader, &options)?.into_iter().enumerate().map(|(layer, attention)| {
            let layer = Layer(layer);
            Ok(LayerWeights {
                input_norm: loader.layer(layer, LayerPart::InputNorm)?,
                attention,
                mlp_norm: loader.layer(layer, LayerPart::PostAttentionNorm)?,
                mlp: MlpWeights::load(&loader, layer)?,
                residual: ResidualWeights::load(&loader, layer)?,
            })
        });
        let layers = layers.collect::<Result<_, ModelError>>()?;
        let (embedding, final_norm) = (loader.part(Part::Embedding)?, loader.part(Part::FinalNorm)?);
        let head = loader.part(Part::LmHead)?;
        let frequencies = loader.vector("inverse frequencies", &spec.rope.inverse_frequencies)?;
        let tokens = options.max_tokens;
        let group = |ranks, together| {
            Group::new(Arc::clone(&device), &fabric, ranks, spec.hidden, together, layout.most_kept(tokens))
        };
        let labelled = !matches!(options.routing, RoutingMode::FromRouter);
        let identity = format!("{spec:?} {} {:?} {labelled}", device.dtype(), options.parallel);
        let identity = hash_bytes(identity.as_bytes());
        Ok(Model {
            attention: group(layout.attention_ranks(), tokens)?,
            mlp: group(layout.mlp_ranks(), layout.most_in_mlp(tokens))?,
            experts: ExpertLayers::new(&spec, &layout, &options, identity, &device, &fabric)?,
            buffers: StepBuffers::allocate(&*device, &spec, &options, &layout)?,
            identity,
            embedding,
            frequencies,
            layers,
            final_norm,
            head,
            layout,
            options,
            fabric,
            device,
            spec,
        })
    }

    /// What the model is.
    pub fn spec(&self) -> &ModelSpec {
        &self.spec
    }

    /// Its processor.
    pub fn device(&self) -> &B {
        &self.device
    }

    /// Runs one step. Every rank of the world calls it, with its group's batch, which may be empty.
    pub fn forward(&self, batch: &Batch) -> Result<StepOutput, ModelError> {
        let mut output = StepOutput::default();
        let step = self.begin(batch)?;
        let hidden = self.buffers.hidden.rows(0..step.kept.len())?;
        for (index, layer) in self.layers.iter().enumerate() {
            self.run_layer(Layer(index), layer, &step, &hidden, &mut output)?;
        }
        self.choose(&step, &hidden, batch, &mut output)?;
        Ok(output)
    }

    /// After a step: what this rank's operations took, for the auto schedule to learn from.
    pub fn observe(&self, spans: &[Span]) -> Option<ScheduleReport> {
        match &self.experts {
            ExpertLayers::Spread(pipeline) => pipeline.observe(spans),
            ExpertLayers::Split(pipeline) => pipeline.observe(spans),
            ExpertLayers::None => None,
        }
    }

    /// Brings the batch to the device and looks up the embeddings of the tokens that this rank keeps.
    fn begin(&self, batch: &Batch) -> Result<Step, ModelError> {
        let (buffers, tokens, sequences) = (&self.buffers, batch.ids.len(), batch.blocks.len());
        let labelled = !matches!(self.options.routing, RoutingMode::FromRouter);
        let layout_of_step =
            StepLayout::call(&*self.fabric.control, &self.layout, self.identity, batch, labelled)?;
        let (attention, mlp) =
            (self.attention.shares(&layout_of_step.kept), self.mlp.shares(&layout_of_step.kept));
        self.attention.begin(&attention)?;
        self.mlp.begin(&mlp)?;
        let kept = attention.of(self.fabric.rank().0);
        let widest = buffers.blocks.width;
        let mut blocks = vec![0; sequences * widest];
        for (row, sequence) in blocks.chunks_exact_mut(widest).zip(&batch.blocks) {
            row[..sequence.len()].copy_from_slice(sequence);
        }
        let ids = self.upload(&batch.ids[kept.clone()], &buffers.ids.rows(0..kept.len())?)?;
        let positions = self.upload(&batch.positions, &buffers.positions.rows(0..tokens)?)?;
        let slots = self.upload(&batch.slots, &buffers.slots.rows(0..tokens)?)?;
        let starts = buffers.sequence_starts.rows(0..sequences + 1)?;
        let sequence_starts = self.upload(&batch.sequence_starts, &starts)?;
        let blocks = self.upload(&blocks, &buffers.blocks.rows(0..sequences)?)?;
        let angles = buffers.angles.rows(0..tokens)?;
        self.compute(
            Place::default(),
            RopeTable {
                positions: positions.clone(),
                frequencies: self.frequencies.clone(),
                scale: self.spec.rope.attention_factor,
                out: angles.clone(),
            },
        )?;
        let (table, out) = (self.embedding.clone(), buffers.hidden.rows(0..kept.len())?);
        self.compute(Place::default(), Embed { ids, table, out })?;
        let routed = layout_of_step.labels(self.mlp.ranks());
        Ok(Step { positions, slots, sequence_starts, blocks, angles, kept, attention, mlp, routed })
    }

    /// `hidden` through one layer, in place; see [`LayerSpec`](crate::LayerSpec) for the equations. What ranks
    /// split is computed `across` them, the rest for the tokens that this rank keeps.
    fn run_layer(
        &self,
        layer: Layer,
        weights: &LayerWeights,
        step: &Step,
        hidden: &Buffer,
        output: &mut StepOutput,
    ) -> Result<(), ModelError> {
        let (place, buffers, tokens) = (Place::layer(layer), &self.buffers, 0..hidden.rows);
        let (normed, mixed) = (buffers.normed.rows(tokens.clone())?, buffers.mixed.rows(tokens.clone())?);
        let early = buffers.early.rows(tokens)?;
        let before = made_before(layer.0);
        if weights.residual.is_some() {
            self.norm(place, hidden, before, &weights.mlp_norm, &early)?;
        }
        self.norm(place, hidden, before, &weights.input_norm, &normed)?;
        let context = Context {
            device: &*self.device,
            place,
            step,
            rope: self.spec.rope.style,
            eps: self.spec.norm.eps,
        };
        let attention = |x: &Buffer, out: &Buffer| weights.attention.run(&context, x, out);
        self.attention.across(place, &step.attention, &normed, &mixed, attention)?;
        self.add(place, &mixed, hidden)?;
        let attended = Origin { place, part: "attention" };
        let input = match &weights.residual {
            Some(residual) => {
                self.norm(place, hidden, attended, &residual.norm, &normed)?;
                let dense = |x: &Buffer, out: &Buffer| self.dense(place, &residual.mlp, x, out);
                self.mlp.across(place, &step.mlp, &normed, &mixed, dense)?;
                self.add(place, &mixed, hidden)?;
                early
            }
            None => {
                self.norm(place, hidden, attended, &weights.mlp_norm, &normed)?;
                normed
            }
        };
        self.mlp.across(place, &step.mlp, &input, &mixed, |x, out| match &weights.mlp {
            MlpWeights::Dense(mlp) => self.dense(place, mlp, x, out).map_err(ModelError::from),
            MlpWeights::Moe(moe) => match &self.experts {
                ExpertLayers::Spread(pipeline) => self.mixture(pipeline, moe, step, x, out, output),
                ExpertLayers::Split(pipeline) => self.mixture(pipeline, moe, step, x, out, output),
                ExpertLayers::None => unreachable!("a model with experts has a pipeline. This is a bug."),
            },
        })?;
        Ok(self.add(place, &mixed, hidden)?)
    }

    /// An MoE layer whose routing is made, recorded or replayed.
    fn mixture(
        &self,
        pipeline: &ExpertPipeline<B>,
        moe: &MoeLayer,
        step: &Step,
        x: &Buffer,
        y: &Buffer,
        output: &mut StepOutput,
    ) -> Result<(), ModelError> {
        let report = match &self.options.routing {
            RoutingMode::FromRouter => pipeline.run(moe, x, y)?,
            RoutingMode::Record => {
                let routing = pipeline.route(moe, x)?;
                output.routing.record(moe.layer, &step.routed, &routing);
                pipeline.run_routed(moe, &routing, x, y)?
            }
            RoutingMode::Replay(log) => {
                let (_, router) = moe.router.shape.sources();
                let routing = log.routing(moe.layer, &step.routed, router[0], moe.gate.top_k);
                pipeline.run_routed(moe, &routing.map_err(PipelineError::from)?, x, y)?
            }
        };
        output.layers.push(report);
        Ok(())
    }

    /// Logits of the wanted tokens, or the largest of each, on the host of the group's first rank.
    fn choose(
        &self,
        step: &Step,
        hidden: &Buffer,
        batch: &Batch,
        output: &mut StepOutput,
    ) -> Result<(), ModelError> {
        let (place, buffers, wanted) = (Place::default(), &self.buffers, &batch.logits);
        let before = |end: usize| wanted.partition_point(|&token| (token as usize) < end);
        let kept = &wanted[before(step.kept.start)..before(step.kept.end)];
        let kept: Vec<u32> = kept.iter().map(|&token| token - step.kept.start as u32).collect();
        let rows = 0..kept.len();
        let index = self.upload(&kept, &buffers.wanted.rows(rows.clone())?)?;
        let (last, normed) = (buffers.mixed.rows(rows.clone())?, buffers.normed.rows(rows)?);
        let gather = Gather { x: hidden.clone(), index, out: last.clone() };
        self.compute(place.phase(Phase::LmHead), gather)?;
        self.norm(place, &last, made_before(self.layers.len()), &self.final_norm, &normed)?;
        let wanted_of = |rank| before(step.attention.of(rank).end) - before(step.attention.of(rank).start);
        let wanted_of: Vec<usize> = (0..self.fabric.size()).map(wanted_of).collect();
        let last = self.attention.all_gather(place, &self.attention.shares(&wanted_of), &normed)?;

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

    /// Waits for everything enqueued.
    fn finish(&self) -> Result<(), ModelError> {
        let event = self.device.record(Lane::Compute);
        Ok(self.device.wait(&event, Deadline::behind(self.options.timeout))?)
    }

    fn dense(&self, place: Place, mlp: &Mlp, x: &Buffer, out: &Buffer) -> Result<(), DeviceError> {
        let inner = self.buffers.inner.rows(0..x.rows)?.columns(0..mlp.inner())?;
        let place = place.phase(Phase::Mlp);
        self.compute(place, Gemm::gated(x.clone(), &mlp.gate_up, inner.clone()))?;
        self.compute(place, Gemm::linear(inner, &mlp.down, out.clone()))
    }

    /// The norm of the residual stream, which `origin` added to last.
    fn norm(
        &self,
        place: Place,
        x: &Buffer,
        origin: Origin,
        weight: &Weight,
        out: &Buffer,
    ) -> Result<(), DeviceError> {
        let (kind, eps, origin) = (self.spec.norm.kind, self.spec.norm.eps, Some(origin));
        self.compute(
            place,
            Norm { kind, x: x.clone(), weight: weight.clone(), eps, out: out.clone(), origin },
        )
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

    fn add(&self, place: Place, x: &Buffer, out: &Buffer) -> Result<(), DeviceError> {
        self.compute(place, Add { x: x.clone(), out: out.clone() })
    }

    fn upload(&self, words: &[u32], out: &Buffer) -> Result<Buffer, DeviceError> {
        self.compute(Place::default(), HostToDevice { words: words.into(), out: out.clone() })?;
        Ok(out.clone())
    }

    fn compute(&self, place: Place, op: impl Into<Op>) -> Result<(), DeviceError> {
        compute(&*self.device, place, op)
    }
}

/// What layer `layer` finds in the residual stream.
fn made_before(layer: usize) -> Origin {
    match layer.checked_sub(1) {
        Some(before) => Origin { place: Place::layer(Layer(before)), part: "the MLP" },
        None => Origin { place: Place::default(), part: "the embedding" },
    }
}

/// Appends an operation to the compute lane.
pub(crate) fn compute<B: Backend>(device: &B, place: Place, op: impl Into<Op>) -> Result<(), DeviceError> {
    device.enqueue(Lane::Compute, place, op)
}

impl StepBuffers {
    fn allocate<B: Backend>(
        device: &B,
        spec: &ModelSpec,
        options: &ModelOptions,
        layout: &Layout,
    ) -> Result<Self, DeviceError> {
        let (tokens, sequences) = (options.max_tokens, options.max_sequences);
        let kept = layout.most_kept(tokens);
        let values = |name, rows, width| device.allocate(name, device.dtype(), rows, width);
        let floats = |name, rows, width| device.allocate(name, DType::F32, rows, width);
        let indices = |name, rows, width| device.allocate(name, DType::U32, rows, width);
        let residual = spec.layers.iter().any(|layer| layer.residual_mlp.is_some());
        Ok(StepBuffers {
            ids: indices("ids", kept, 1)?,
            positions: indices("positions", tokens, 1)?,
            slots: indices("slots", tokens, 1)?,
            angles: floats("angles", tokens, spec.rope.dim)?,
            sequence_starts: indices("sequence_starts", sequences + 1, 1)?,
            blocks: indices("blocks", sequences, options.max_blocks)?,
            hidden: floats("hidden", kept, spec.hidden)?,
            mixed: floats("mixed", kept, spec.hidden)?,
            normed: values("normed", kept, spec.hidden)?,
            early: values("early", kept, if residual { spec.hidden } else { 0 })?,
            inner: values("inner", layout.most_in_mlp(tokens), layout.inner().most(widest_dense(spec)))?,
            wanted: indices("wanted", kept, 1)?,
            logits: floats("logits", tokens.min(LOGIT_ROWS), spec.vocab)?,
            tokens: indices("tokens", tokens.min(LOGIT_ROWS), 1)?,
        })
    }
}

impl<B: Backend> ExpertLayers<B> {
    fn new(
        spec: &ModelSpec,
        layout: &Layout,
        options: &ModelOptions,
        identity: u64,
        device: &Arc<B>,
        fabric: &Fabric<B>,
    ) -> Result<Self, ModelError> {
        let Some(moe) = spec.layers.iter().find_map(|layer| layer.mlp.moe()) else {
            return Ok(ExpertLayers::None);
        };
        let (placement, _) = layout.placement(moe.experts)?;
        let (top_k, inner) = (moe.gate.top_k, layout.inner());
        let layer = LayerSizes {
            hidden: spec.hidden,
            inner: inner.of(moe.inner).len(),
            top_k,
            local_experts: placement.max_local(),
            activation_bytes: device.dtype().bytes(),
        };
        let worst = || Capacity::worst_case(layout.most_in_mlp(options.max_tokens), &placement, top_k);
        let capacity = options.capacity.unwrap_or_else(worst);
        let shared_inner = moe.shared.map_or(0, |shared| inner.of(shared.inner).len());
        let pipeline = PipelineOptions {
            sizes: PipelineSizes { layer, shared_inner, capacity },
            placement,
            policy: options.policy.clone(),
            identity,
            timeout: options.timeout,
        };
        let device = Arc::clone(device);
        Ok(match layout.experts() {
            Experts::Ep => ExpertLayers::Spread(ExpertPipeline::new(device, fabric.clone(), pipeline)?),
            Experts::Tp => {
                // Experts that never travel leave stages nothing to run beside.
                let policy = Policy { gemm: pipeline.policy.gemm, ..Policy::default() };
                let policy = Policy { schedule: Schedule::Serial, ..policy };
                let pipeline = PipelineOptions { policy, ..pipeline };
                ExpertLayers::Split(ExpertPipeline::new(device, Fabric::single_rank(), pipeline)?)
            }
        })
    }
}

/// The widest dense MLP of any layer.
fn widest_dense(spec: &ModelSpec) -> usize {
    let widths = spec.layers.iter().flat_map(|layer| {
        let dense = match layer.mlp {
            MlpSpec::Dense { inner } => Some(inner),
            MlpSpec::Moe(_) => None,
        };
        dense.into_iter().chain(layer.residual_mlp)
    });
    widths.max().unwrap_or(0)
}
