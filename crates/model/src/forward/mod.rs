//! Token ids become logits. START HERE to follow a token: [`Model::forward`].

mod buffers;
mod experts;
mod input;
mod logits;
mod repeat;

use crate::attention::{Attention, Context, Rooms, codes_of};
use crate::collectives::Group;
use crate::load::{Loader, NormWeights, by_readers};
use crate::mlp::{MlpWeights, ResidualWeights, Sandwich, experts_of, load_expert};
use crate::parallel::Layout;
use crate::step::{LayerTokens, Step};
use crate::{LayerPart, MlpSpec, ModelError, ModelSpec, Parallel, Part, WeightSource};
use buffers::{StepBuffers, groups};
use epsmoe_base::{CacheDType, Deadline, Lane, Layer, Phase, Place, WireDType, hash_bytes};
use epsmoe_device::op::{
    Activate, Activation, Add, AddNorm, Gather, Gemm, HostToDevice, Norm, Op, Origin, Scale,
};
use epsmoe_device::{Backend, Buffer, DeviceError, Weight};
use epsmoe_fabric::Fabric;
use epsmoe_pipeline::{ExpertPipeline, Input, LayerReport, Mlp, RoutingLog};
use epsmoe_plan::{Capacity, Policy, ScheduleReport, Span};
use experts::LateExperts;
use repeat::Repeats;
use serde::{Deserialize, Serialize};
use std::sync::Arc;
use std::time::Duration;

/// What one group of ranks computes in one step: new tokens of some sequences, packed one after the other.
/// Every rank of the group is given the same.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
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
    /// Where each sequence's state is, and where it is to be left, if the model has states `[B]`.
    pub states: Vec<StateSlots>,
    /// The tokens of so many sequences, which come first, were generated; those of the others are of prompts. It matters where
    /// [prompts are decompressed](ModelOptions::decompress_prompts).
    pub generated: usize,
    /// Number of each sequence, by which a routing log knows it `[B]`.
    pub sequences: Vec<u64>,
    /// Tokens whose logits are computed, ascending.
    pub logits: Vec<u32>,
    /// Of each of them, whether all its logits are wanted, or only the most likely next token.
    pub whole: Vec<bool>,
    /// Whether [`StepOutput::expert_tokens`] is wanted, for which the host waits in every MoE layer.
    pub count_experts: bool,
}

/// Slots of a sequence's state in one step. No slot is written that another sequence reads or writes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct StateSlots {
    /// Where it is.
    pub from: u32,
    /// Where it is left.
    pub to: u32,
    /// A slot apart from both in which it is left as it is behind so many of the new tokens.
    pub kept: Option<(u32, u32)>,
}

impl StateSlots {
    /// As operations read it.
    pub(crate) fn words(&self) -> [u32; 4] {
        let (kept, after) = self.kept.unwrap_or_default();
        [self.from, self.to, kept, after]
    }
}

/// How a model is run; equal on all ranks.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ModelOptions {
    /// Most tokens of one group of ranks in one step.
    pub max_tokens: usize,
    /// Most sequences of one group in one step.
    pub max_sequences: usize,
    /// Cache blocks of one rank.
    pub cache_blocks: usize,
    /// Most cache blocks of one sequence.
    pub max_blocks: usize,
    /// What keys and values are cached in.
    pub cache_dtype: CacheDType,
    /// Slots for states of sequences, of a model that has any.
    pub states: usize,
    /// How MoE layers are scheduled.
    pub policy: Policy,
    /// Room for the tokens of an MoE layer; the worst case when absent. Layers that do not fit run in chunks.
    pub capacity: Option<Capacity>,
    /// What rows travel between ranks in.
    pub wire: WireDType,
    /// MoE layers of at most so many tokens on all ranks together are gathered; 0 for none.
    pub gather_tokens: usize,
    /// How the model is spread over ranks.
    pub parallel: Parallel,
    /// What decides where tokens go.
    pub routing: RoutingMode,
    /// Whether prompts see latents decompressed: then generated tokens have other bits (docs/bits.md).
    pub decompress_prompts: bool,
    /// How long any wait may take.
    pub timeout: Duration,
}

impl ModelOptions {
    /// Whether it matters to this model if a token is of a prompt or was generated.
    pub(crate) fn tells_origins(&self, spec: &ModelSpec) -> bool {
        self.decompress_prompts && spec.has_latents()
    }
}

/// What decides which experts a token goes to.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub enum RoutingMode {
    /// The model's gates.
    #[default]
    FromRouter,
    /// The gates, and every step tells what they chose.
    Record,
    /// What another run recorded.
    Replay(#[serde(with = "shared")] Arc<RoutingLog>),
}

/// A log that several hold is written down like one that somebody holds alone.
mod shared {
    use super::RoutingLog;
    use serde::{Deserialize, Deserializer, Serialize, Serializer};
    use std::sync::Arc;

    pub(super) fn serialize<S: Serializer>(log: &Arc<RoutingLog>, to: S) -> Result<S::Ok, S::Error> {
        log.as_ref().serialize(to)
    }

    pub(super) fn deserialize<'a, D: Deserializer<'a>>(from: D) -> Result<Arc<RoutingLog>, D::Error> {
        RoutingLog::deserialize(from).map(Arc::new)
    }
}

/// What a step gave.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct StepOutput {
    /// The most likely token after each of [`Batch::logits`]; on the first rank of each group.
    pub tokens: Vec<u32>,
    /// Logits of those that want them all, row by row `[…, V]`; on the first rank of each group.
    pub logits: Vec<f32>,
    /// What each MoE layer did.
    pub layers: Vec<LayerReport>,
    /// Where the tokens went that this rank routed, if that was to be recorded.
    pub routing: RoutingLog,
    /// How many of them went to each expert of each MoE layer, if that was to be counted. Every token of the world is
    /// counted on one rank.
    pub expert_tokens: Vec<ExpertTokens>,
}

/// How many tokens went to each expert of a layer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExpertTokens {
    /// Which layer.
    pub layer: Layer,
    /// `[E]`.
    pub tokens: Vec<u32>,
}

/// Loads what most of a model is, by many threads: whoever asks for it later finds it. Tables come first, as long as there is
/// memory to have them twice; then this rank's experts of all layers.
fn load_ahead<B: Backend>(loader: &Loader<'_, B>) -> Result<(), ModelError> {
    let (tables, experts) = ([Part::Embedding, Part::LmHead], experts_of(loader)?);
    by_readers(tables.len() + experts.len(), |at| {
        if let Some(&table) = tables.get(at) {
            return loader.part(table).map(drop);
        }
        let (layer, moe, expert) = experts[at - tables.len()];
        load_expert(loader, layer, moe, expert).map(drop)
    })?;
    Ok(())
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
    experts: Option<ExpertPipeline<B>>,
    options: ModelOptions,
    embedding: Weight,
    /// Of each rotary embedding.
    frequencies: Vec<Weight>,
    layers: Vec<LayerWeights>,
    final_norm: NormWeights,
    head: Weight,
    head_bias: Option<Weight>,
    buffers: StepBuffers,
    repeats: Repeats,
}

struct LayerWeights {
    input_norm: NormWeights,
    attention: Attention,
    /// Before the MLP, if there is one.
    mlp_norm: Option<NormWeights>,
    mlp: MlpWeights,
    residual: Option<ResidualWeights>,
    sandwich: Option<Sandwich>,
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
        let rooms = Rooms::allocate(&*device, &spec, layout.in_group(), &options)?;
        load_ahead(&loader)?;
        let layers = by_readers(spec.layers.len(), |layer| {
            let layer = Layer(layer);
            Ok(LayerWeights {
                input_norm: loader
                    .norm(LayerPart::InputNorm.of(layer), LayerPart::InputNormBias.of(layer))?,
                attention: Attention::load(&loader, layer, &rooms, &options)?,
                mlp_norm: (spec.layers[layer.0].mlp != MlpSpec::Absent)
                    .then(|| {
                        loader.norm(
                            LayerPart::PostAttentionNorm.of(layer),
                            LayerPart::PostAttentionNormBias.of(layer),
                        )
                    })
                    .transpose()?,
                mlp: MlpWeights::load(&loader, layer)?,
                residual: ResidualWeights::load(&loader, layer)?,
                sandwich: Sandwich::load(&loader, layer)?,
            })
        })?;
        let embedding = loader.part(Part::Embedding)?;
        let final_norm = loader.norm(Part::FinalNorm, Part::FinalNormBias)?;
        let head = loader.part(Part::LmHead)?;
        let head_bias = spec.head_bias.then(|| loader.part(Part::LmHeadBias)).transpose()?;
        let coded_experts = loader.coded_experts()?;
        let frequencies = spec.ropes.iter().enumerate().map(|(index, rope)| {
            loader.vector(&format!("inverse frequencies {index}"), &rope.inverse_frequencies)
        });
        let frequencies = frequencies.collect::<Result<_, _>>()?;
        let [attention, mlp] = groups(&*device, &spec, &layout, options.max_tokens)?;
        let group = |ranks, buffers| Group::new(Arc::clone(&device), &fabric, ranks, buffers);
        let labelled = !matches!(options.routing, RoutingMode::FromRouter);
        let origins = options.decompress_prompts;
        let identity = format!("{spec:?} {} {:?} {labelled} {origins}", device.dtype(), options.parallel);
        let identity = hash_bytes(identity.as_bytes());
        let experts = experts::pipeline(&spec, &layout, &options, identity, &device, &fabric, coded_experts)?;
        let settings = experts.as_ref().map(ExpertPipeline::settings);
        let identity = hash_bytes(format!("{identity} {settings:?}").as_bytes());
        Ok(Model {
            attention: group(layout.attention_ranks(), attention)?,
            mlp: group(layout.mlp_ranks(), mlp)?,
            experts,
            buffers: StepBuffers::allocate(&*device, &spec, &options, &layout, &rooms)?,
            repeats: Repeats::default(),
            identity,
            embedding,
            frequencies,
            layers,
            final_norm,
            head,
            head_bias,
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
        match self.repetition(batch, &step)? {
            Some(key) => self.repeat(key, &step, batch, &mut output)?,
            None => {
                let stream = self.run_layers(&step, &mut output)?;
                self.choose(&step, &stream, batch, &mut output)?;
            }
        }
        Ok(output)
    }

    /// The residual stream of this rank's tokens through all layers.
    fn run_layers(&self, step: &Step, output: &mut StepOutput) -> Result<Buffer, ModelError> {
        let mut stream = self.buffers.stream.rows(0..step.all.attention.of(self.fabric.rank().0).len())?;
        self.enter(Layer(0), None, &stream)?;
        let mut late = None;
        for (index, layer) in self.layers.iter().enumerate() {
            stream = self.run_layer(Layer(index), layer, step, (&stream, &mut late), output)?;
        }
        Ok(stream)
    }

    /// Whether [`observe`](Self::observe) looks at what it is given.
    pub fn wants_spans(&self) -> bool {
        self.experts.as_ref().is_some_and(ExpertPipeline::wants_spans)
    }

    /// After a step: what this rank's operations took, for the auto schedule to learn from.
    pub fn observe(&self, spans: &[Span]) {
        if let Some(experts) = &self.experts {
            experts.observe(spans);
        }
    }

    /// How the auto schedule planned the layers so far.
    pub fn schedule(&self) -> Option<ScheduleReport> {
        self.experts.as_ref()?.report()
    }

    /// Adds what the layer before gave to the stream, and norms the stream for a layer, if there is one more.
    fn enter(&self, layer: Layer, given: Option<&Buffer>, stream: &Buffer) -> Result<(), DeviceError> {
        let before = made_before(layer.0);
        match (self.layers.get(layer.0), given) {
            (Some(weights), given) => {
                let normed = self.buffers.normed.rows(0..stream.rows)?;
                let codes = self.codes_for_attention(weights, &normed)?;
                let norm = (&weights.input_norm, &normed, codes);
                self.add_and_norm(Place::layer(layer), given, stream, before, norm)
            }
            (None, Some(delta)) => self.add_to_stream(before.place, delta, stream),
            (None, None) => Ok(()),
        }
    }

    /// The residual stream through one layer, whose norm is there already; see [`LayerSpec`](crate::LayerSpec) for the
    /// equations. What ranks split is computed for the tokens of all of them, the rest for this rank's shard. Every token
    /// leaves its keys and values in the cache. What follows is computed for all tokens, but in the last layer only for
    /// those whose logits are wanted, and only they are in the stream that comes out. `late` is what experts of one layer
    /// give in the next.
    fn run_layer(
        &self,
        layer: Layer,
        weights: &LayerWeights,
        step: &Step,
        (stream, late): (&Buffer, &mut Option<LateExperts<B>>),
        output: &mut StepOutput,
    ) -> Result<Buffer, ModelError> {
        let (place, before, tokens) =
            (Place::layer(layer), made_before(layer.0), self.tokens_of(layer, step)?);
        let normed = self.buffers.normed.rows(0..stream.rows)?;
        let stream = match &tokens.index {
            Some(index) => {
                let out = self.buffers.wanted_stream.rows(0..index.rows)?;
                self.compute(place, Gather { x: stream.clone(), index: index.clone(), out: out.clone() })?;
                out
            }
            None => stream.clone(),
        };
        let input_codes = self.codes_for_attention(weights, &normed)?;
        let delta = self.buffers.delta.rows(0..stream.rows)?;
        let pre_attention = self.buffers.pre_attention.rows(0..stream.rows)?;
        let early = weights.residual.is_some() && weights.sandwich.is_none();
        if let Some(norm) = weights.mlp_norm.as_ref().filter(|_| early) {
            self.norm(place, &stream, before, norm, &pre_attention)?;
        }
        let context = Context {
            device: &*self.device,
            place,
            step,
            queries: &tokens.queries,
            rope: self.spec.layers[layer.0].rope.map(|rope| (rope, &self.spec.ropes[rope])),
            eps: self.spec.norm.eps,
            input_codes,
            codes: &self.buffers.codes,
        };
        let attention = |x: &Buffer, out: &Buffer| weights.attention.run(&context, x, out);
        let shares = [&step.all.attention, &tokens.attention];
        self.attention.gather_compute_scatter(place, shares, &normed, &delta, attention)?;
        let Some(mlp_norm) = &weights.mlp_norm else {
            self.enter(Layer(layer.0 + 1), Some(&delta), &stream)?;
            return Ok(stream);
        };
        if let Some(sandwich) = &weights.sandwich {
            let parts = (weights, sandwich, mlp_norm);
            self.run_sandwich(place, parts, (step, tokens), [&stream, &delta], output)?;
            self.enter(Layer(layer.0 + 1), None, &stream)?;
            return Ok(stream);
        }
        let (attended, normed) = (Origin { place, part: "attention" }, normed.rows(0..stream.rows)?);
        let shares = [&tokens.mlp; 2];
        let (input, codes) = match &weights.residual {
            Some(residual) => {
                let norm = (&residual.norm, &normed, None);
                self.add_and_norm(place, Some(&delta), &stream, attended, norm)?;
                let dense = |x: &Buffer, out: &Buffer| self.dense(place, &residual.mlp, None, x.into(), out);
                self.mlp.gather_compute_scatter(place, shares, &normed, &delta, dense)?;
                self.add_to_stream(place, &delta, &stream)?;
                (pre_attention, None)
            }
            None => {
                let codes = self.codes_of_normed(&self.mlp, weights.mlp.takes_codes(), &normed)?;
                let norm = (mlp_norm, &normed, codes.clone());
                self.add_and_norm(place, Some(&delta), &stream, attended, norm)?;
                (normed, codes)
            }
        };
        let experts_before = late.take();
        match &weights.mlp {
            MlpWeights::Moe(moe) if self.spec.layers[layer.0].late_experts => {
                let input = Input { x: &input, codes: codes.as_ref() };
                *late = Some(self.begin_late(place, moe, (step, tokens), (input, &delta), output)?);
            }
            mlp => self.mlp.gather_compute_scatter(place, shares, &input, &delta, |x, out| {
                let input = Input { x, codes: codes.as_ref() };
                self.run_mlp(place, mlp, (step, tokens), (input, out), output)
            })?,
        }
        let given = match experts_before {
            None => delta,
            Some(experts) => {
                self.add_to_stream(place, &delta, &stream)?;
                self.finish_late(place, tokens, experts, output)?
            }
        };
        self.enter(Layer(layer.0 + 1), Some(&given), &stream)?;
        Ok(stream)
    }

    /// What follows attention, whose output is in `delta`, in a layer that norms what its parts give.
    fn run_sandwich(
        &self,
        place: Place,
        (weights, sandwich, mlp_norm): (&LayerWeights, &Sandwich, &NormWeights),
        (step, tokens): (&Step, &LayerTokens),
        [stream, delta]: [&Buffer; 2],
        output: &mut StepOutput,
    ) -> Result<(), ModelError> {
        let (rows, shares) = (0..stream.rows, [&tokens.mlp; 2]);
        let out = |buffer: &Buffer| buffer.rows(rows.clone());
        let (normed, one, both) =
            (out(&self.buffers.normed)?, out(&self.buffers.out_normed)?, out(&self.buffers.both)?);
        let attended = Origin { place, part: "attention" };
        let given = Origin { place, part: "the MLP" };
        self.norm(place, delta, attended, &sandwich.attention, &one)?;
        self.add_to_stream(place, &one, stream)?;
        let Some(residual) = &weights.residual else {
            unreachable!("a sandwich has a dense MLP. This is a bug.")
        };
        self.norm(place, stream, attended, &residual.norm, &normed)?;
        self.mlp.gather_compute_scatter(place, shares, &normed, delta, |x: &Buffer, out: &Buffer| {
            self.dense(place, &residual.mlp, residual.activation, x.into(), out)
        })?;
        self.norm(place, delta, given, &sandwich.dense, &both)?;
        self.norm(place, stream, attended, mlp_norm, &normed)?;
        self.mlp.gather_compute_scatter(place, shares, &normed, delta, |x, out| {
            self.run_mlp(place, &weights.mlp, (step, tokens), (x.into(), out), output)
        })?;
        self.norm(place, delta, given, &sandwich.experts, &one)?;
        self.compute(place, Add { x: one.clone(), out: both.clone() })?;
        self.norm(place, &both, given, &sandwich.both, &one)?;
        self.add_to_stream(place, &one, stream)?;
        Ok(self.scale(place, stream, sandwich.scale)?)
    }

    /// The tokens that a layer computes. The last layer's sums over ranks have an order of their own.
    fn tokens_of<'a>(&self, layer: Layer, step: &'a Step) -> Result<&'a LayerTokens, DeviceError> {
        let last = step.last.as_ref().filter(|_| layer.0 + 1 == self.layers.len());
        let tokens = last.unwrap_or(&step.all);
        if layer.0 == 0 || last.is_some() {
            self.attention.begin(&tokens.attention)?;
            self.mlp.begin(&tokens.mlp)?;
        }
        Ok(tokens)
    }

    /// Waits for everything enqueued.
    fn finish(&self) -> Result<(), ModelError> {
        let event = self.device.record(Lane::Compute);
        Ok(self.device.wait(&event, Deadline::behind(self.options.timeout))?)
    }

    /// The MLP of a layer.
    fn run_mlp(
        &self,
        place: Place,
        mlp: &MlpWeights,
        tokens: (&Step, &LayerTokens),
        (input, out): (Input<'_>, &Buffer),
        output: &mut StepOutput,
    ) -> Result<(), ModelError> {
        match mlp {
            MlpWeights::Absent => Ok(()),
            MlpWeights::Dense(mlp, activation) => Ok(self.dense(place, mlp, *activation, input, out)?),
            MlpWeights::Moe(moe) => self.mixture(moe, tokens, (input, out), output),
        }
    }

    fn dense(
        &self,
        place: Place,
        mlp: &Mlp,
        activation: Option<Activation>,
        Input { x, codes }: Input<'_>,
        out: &Buffer,
    ) -> Result<(), DeviceError> {
        let rows = 0..x.rows;
        let factors = activation.map_or(1, |activation| activation.factors());
        let width = mlp.inner() / factors;
        let inner = self.buffers.inner.rows(rows.clone())?.columns(0..width)?.for_weight(&mlp.down)?;
        let place = place.phase(Phase::Mlp);
        match activation {
            None => {
                let x = match codes {
                    Some(codes) => codes.clone(),
                    None => self.device.rows_for(place, x, &mlp.gate_up, &self.buffers.codes)?,
                };
                self.compute(place, Gemm::gated(x, &mlp.gate_up, inner.clone()))?;
            }
            Some(activation) => {
                let open = self.buffers.open.rows(rows)?.columns(0..factors * width)?;
                self.compute(place, Gemm::linear(x.clone(), &mlp.gate_up, open.clone()))?;
                self.compute(place, Activate { x: open, bias: None, activation, out: inner.clone() })?;
            }
        }
        self.compute(place, Gemm::linear(inner, &mlp.down, out.clone()))
    }

    /// The norm of the residual stream, which `origin` added to last.
    fn norm(
        &self,
        place: Place,
        x: &Buffer,
        origin: Origin,
        weights: &NormWeights,
        out: &Buffer,
    ) -> Result<(), DeviceError> {
        self.compute(place, self.norm_of(x, origin, (weights, out, None)))
    }

    fn norm_of(
        &self,
        x: &Buffer,
        origin: Origin,
        (weights, out, codes): (&NormWeights, &Buffer, Option<Buffer>),
    ) -> Norm {
        let (kind, eps, origin) = (self.spec.norm.kind, self.spec.norm.eps, Some(origin));
        let (x, NormWeights { weight, bias }, out) = (x.clone(), weights.clone(), out.clone());
        Norm { kind, x, weight, bias, eps, out, codes, origin }
    }

    /// Where the norm before a layer's attention leaves its rows as codes, if that takes them so.
    fn codes_for_attention(
        &self,
        layer: &LayerWeights,
        normed: &Buffer,
    ) -> Result<Option<Buffer>, DeviceError> {
        self.codes_of_normed(&self.attention, layer.attention.takes_codes(), normed)
    }

    /// The same of what a group computes together. Where there are several ranks, rows travel as numbers first.
    fn codes_of_normed(
        &self,
        group: &Group<B>,
        wanted: bool,
        normed: &Buffer,
    ) -> Result<Option<Buffer>, DeviceError> {
        let wanted = wanted && group.ranks().len() == 1;
        wanted.then(|| codes_of(normed, &self.buffers.normed_codes)).transpose()
    }

    /// Adds to the residual stream what a part of a model gave, if it gave anything, and norms the stream.
    fn add_and_norm(
        &self,
        place: Place,
        delta: Option<&Buffer>,
        stream: &Buffer,
        origin: Origin,
        norm: (&NormWeights, &Buffer, Option<Buffer>),
    ) -> Result<(), DeviceError> {
        let norm = self.norm_of(stream, origin, norm);
        let Some(delta) = delta else { return self.compute(place, norm) };
        self.scale(place, delta, self.spec.factors.residual)?;
        let add = Add { x: delta.clone(), out: stream.clone() };
        self.compute(place, AddNorm { add, norm })
    }

    fn add_to_stream(&self, place: Place, delta: &Buffer, stream: &Buffer) -> Result<(), DeviceError> {
        self.scale(place, delta, self.spec.factors.residual)?;
        self.compute(place, Add { x: delta.clone(), out: stream.clone() })
    }

    /// Puts a factor of the model on something, unless it is 1.
    fn scale(&self, place: Place, x: &Buffer, factor: f32) -> Result<(), DeviceError> {
        if factor == 1.0 {
            return Ok(());
        }
        self.compute(place, Scale { x: x.clone(), factor })
    }

    fn upload(&self, words: &[u32], out: &Buffer) -> Result<Buffer, DeviceError> {
        self.compute(Place::default(), HostToDevice { words: words.into(), out: out.clone() })?;
        Ok(out.clone())
    }

    fn compute(&self, place: Place, op: impl Into<Op>) -> Result<(), DeviceError> {
        self.device.enqueue(Lane::Compute, place, op)
    }
}

/// What layer `layer` finds in the residual stream.
fn made_before(layer: usize) -> Origin {
    match layer.checked_sub(1) {
        Some(before) => Origin { place: Place::layer(Layer(before)), part: "the MLP" },
        None => Origin { place: Place::default(), part: "the embedding" },
    }
}
