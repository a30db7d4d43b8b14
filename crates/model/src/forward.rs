//! Token ids become logits. START HERE to follow a token: [`Model::forward`].

use crate::attention::{Attention, Context};
use crate::load::Loader;
use crate::mlp::{MlpWeights, ResidualWeights};
use crate::{LayerPart, MlpSpec, ModelError, ModelSpec, MoeSpec, Part, WeightSource};
use epsmoe_base::{DType, Deadline, Lane, Layer, Place, hash_bytes};
use epsmoe_device::op::{Add, Angles, Embed, Gather, Gemm, Norm, Op, Upload};
use epsmoe_device::{Backend, Buffer, DeviceError, Weight};
use epsmoe_fabric::Fabric;
use epsmoe_pipeline::{ExpertPipeline, LayerReport, Mlp, PipelineOptions, PipelineSizes};
use epsmoe_plan::{Capacity, LayerSizes, Placement, Policy};
use std::sync::Arc;
use std::time::Duration;

/// What one rank computes in one step: new tokens of some sequences, packed one after the other.
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
    /// Tokens whose logits are wanted, ascending.
    pub logits: Vec<u32>,
}

/// How a model is run; equal on all ranks.
#[derive(Clone, Debug)]
pub struct ModelOptions {
    /// Most tokens of one rank in one step.
    pub max_tokens: usize,
    /// Most sequences of one rank in one step.
    pub max_sequences: usize,
    /// Cache blocks of one rank.
    pub cache_blocks: usize,
    /// Most cache blocks of one sequence.
    pub max_blocks: usize,
    /// How MoE layers are scheduled.
    pub policy: Policy,
    /// Room for the tokens of an MoE layer; the worst case when absent. Layers that do not fit run in chunks.
    pub capacity: Option<Capacity>,
    /// How long any wait may take.
    pub timeout: Duration,
}

/// What a step gave.
#[derive(Clone, Debug, Default)]
pub struct StepOutput {
    /// Logits of the wanted tokens, row by row `[wanted, V]`.
    pub logits: Vec<f32>,
    /// What each MoE layer did.
    pub layers: Vec<LayerReport>,
}

/// The model of one rank: its weights, its cache and its buffers.
pub struct Model<B: Backend, F: Fabric<B>> {
    spec: Arc<ModelSpec>,
    device: Arc<B>,
    pipeline: Option<ExpertPipeline<B, F>>,
    options: ModelOptions,
    embedding: Weight,
    frequencies: Weight,
    layers: Vec<LayerWeights>,
    final_norm: Weight,
    head: Weight,
    buffers: StepBuffers,
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

/// Room for one step, `[T, …]` each unless said otherwise.
struct StepBuffers {
    ids: Buffer,
    positions: Buffer,
    slots: Buffer,
    sequence_starts: Buffer,
    /// `[B, most blocks of a sequence]`.
    blocks: Buffer,
    angles: Buffer,
    /// The residual stream.
    hidden: Buffer,
    normed: Buffer,
    /// What attention or an MLP gives.
    mixed: Buffer,
    /// The layer's normed input, for experts that read it beside attention.
    early: Buffer,
    inner: Buffer,
    /// `[LOGIT_ROWS, …]`: which tokens, their hidden vectors, their logits.
    wanted: Buffer,
    last: Buffer,
    last_normed: Buffer,
    logits: Buffer,
}

/// The views that every layer of one step shares.
pub(crate) struct Step {
    pub(crate) positions: Buffer,
    pub(crate) slots: Buffer,
    pub(crate) sequence_starts: Buffer,
    pub(crate) blocks: Buffer,
    pub(crate) angles: Buffer,
}

impl<B: Backend, F: Fabric<B>> Model<B, F> {
    /// Loads what this rank holds, and reserves all memory it will use.
    pub fn load(
        spec: Arc<ModelSpec>,
        source: &dyn WeightSource,
        device: Arc<B>,
        fabric: Arc<F>,
        options: ModelOptions,
    ) -> Result<Self, ModelError> {
        let loader = Loader { spec: &spec, source, device: &*device };
        let moe = spec.layers.iter().find_map(|layer| layer.mlp.moe());
        let placement = moe.map(|moe| Placement::new(moe.experts, fabric.size())).transpose()?;
        let rank = fabric.rank();
        let layers = Attention::load(&loader, &options)?.into_iter().enumerate().map(|(layer, attention)| {
            let layer = Layer(layer);
            Ok(LayerWeights {
                input_norm: loader.layer(layer, LayerPart::InputNorm)?,
                attention,
                mlp_norm: loader.layer(layer, LayerPart::PostAttentionNorm)?,
                mlp: MlpWeights::load(&loader, layer, placement.as_ref(), rank)?,
                residual: ResidualWeights::load(&loader, layer)?,
            })
        });
        let layers = layers.collect::<Result<_, ModelError>>()?;
        let pipeline = match (moe, placement) {
            (Some(moe), Some(placement)) => {
                let pipeline = pipeline_options(&spec, moe, placement, &options, device.dtype());
                Some(ExpertPipeline::new(Arc::clone(&device), fabric, pipeline)?)
            }
            _ => None,
        };
        Ok(Model {
            embedding: loader.part(Part::Embedding)?,
            frequencies: loader.vector("inverse frequencies", &spec.rope.inverse_frequencies)?,
            final_norm: loader.part(Part::FinalNorm)?,
            head: loader.part(Part::LmHead)?,
            buffers: StepBuffers::allocate(&*device, &spec, &options)?,
            layers,
            pipeline,
            options,
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

    /// Runs one step. Every rank of the world calls it, with its own batch, which may be empty.
    pub fn forward(&self, batch: &Batch) -> Result<StepOutput, ModelError> {
        let step = self.begin(batch)?;
        let tokens = batch.ids.len();
        let hidden = self.buffers.hidden.rows(0..tokens)?;
        let mut layers = Vec::new();
        for (index, layer) in self.layers.iter().enumerate() {
            layers.extend(self.run_layer(Layer(index), layer, &step, &hidden)?);
        }
        Ok(StepOutput { logits: self.logits(&hidden, &batch.logits)?, layers })
    }

    /// Brings the batch to the device and looks up the embeddings.
    fn begin(&self, batch: &Batch) -> Result<Step, ModelError> {
        let (buffers, tokens, sequences) = (&self.buffers, batch.ids.len(), batch.blocks.len());
        let widest = buffers.blocks.width;
        let mut blocks = vec![0; sequences * widest];
        for (row, sequence) in blocks.chunks_exact_mut(widest).zip(&batch.blocks) {
            row[..sequence.len()].copy_from_slice(sequence);
        }
        let ids = self.upload(&batch.ids, &buffers.ids.rows(0..tokens)?)?;
        let positions = self.upload(&batch.positions, &buffers.positions.rows(0..tokens)?)?;
        let slots = self.upload(&batch.slots, &buffers.slots.rows(0..tokens)?)?;
        let starts = buffers.sequence_starts.rows(0..sequences + 1)?;
        let sequence_starts = self.upload(&batch.sequence_starts, &starts)?;
        let blocks = self.upload(&blocks, &buffers.blocks.rows(0..sequences)?)?;
        let angles = buffers.angles.rows(0..tokens)?;
        self.compute(Place::default(), Angles {
            positions: positions.clone(),
            frequencies: self.frequencies.clone(),
            scale: self.spec.rope.attention_factor,
            out: angles.clone(),
        })?;
        let (table, out) = (self.embedding.clone(), buffers.hidden.rows(0..tokens)?);
        self.compute(Place::default(), Embed { ids, table, out })?;
        Ok(Step { positions, slots, sequence_starts, blocks, angles })
    }

    /// `hidden` through one layer, in place; see [`LayerSpec`](crate::LayerSpec) for the equations.
    fn run_layer(
        &self,
        layer: Layer,
        weights: &LayerWeights,
        step: &Step,
        hidden: &Buffer,
    ) -> Result<Option<LayerReport>, ModelError> {
        let (place, buffers, tokens) = (Place::layer(layer), &self.buffers, 0..hidden.rows);
        let (normed, mixed) = (buffers.normed.rows(tokens.clone())?, buffers.mixed.rows(tokens.clone())?);
        let early = buffers.early.rows(tokens)?;
        if weights.residual.is_some() {
            self.norm(place, hidden, &weights.mlp_norm, &early)?;
        }
        self.norm(place, hidden, &weights.input_norm, &normed)?;
        let context = Context {
            device: &*self.device,
            place,
            step,
            rope: self.spec.rope.style,
            eps: self.spec.norm.eps,
        };
        weights.attention.run(&context, &normed, &mixed)?;
        self.add(place, &mixed, hidden)?;
        let input = match &weights.residual {
            Some(residual) => {
                self.norm(place, hidden, &residual.norm, &normed)?;
                self.dense(place, &residual.mlp, &normed, &mixed)?;
                self.add(place, &mixed, hidden)?;
                early
            }
            None => {
                self.norm(place, hidden, &weights.mlp_norm, &normed)?;
                normed
            }
        };
        let report = match (&weights.mlp, &self.pipeline) {
            (MlpWeights::Moe(moe), Some(pipeline)) => Some(pipeline.run(moe, &input, &mixed)?),
            (MlpWeights::Dense(mlp), _) => {
                self.dense(place, mlp, &input, &mixed)?;
                None
            }
            (MlpWeights::Moe(_), None) => unreachable!("a model with experts has a pipeline. This is a bug."),
        };
        self.add(place, &mixed, hidden)?;
        Ok(report)
    }

    /// Logits of the wanted tokens, on the host.
    fn logits(&self, hidden: &Buffer, wanted: &[u32]) -> Result<Vec<f32>, ModelError> {
        let (place, buffers) = (Place::default(), &self.buffers);
        let mut logits = Vec::with_capacity(wanted.len() * self.spec.vocab);
        for wanted in wanted.chunks(buffers.logits.rows) {
            let rows = 0..wanted.len();
            let index = self.upload(wanted, &buffers.wanted.rows(rows.clone())?)?;
            let (last, normed) = (buffers.last.rows(rows.clone())?, buffers.last_normed.rows(rows.clone())?);
            let out = buffers.logits.rows(rows)?;
            self.compute(place, Gather { x: hidden.clone(), index, out: last.clone() })?;
            self.norm(place, &last, &self.final_norm, &normed)?;
            self.compute(place, Gemm::linear(normed, &self.head, out.clone()))?;
            self.finish()?;
            logits.extend(self.device.read_f32(&out)?);
        }
        if wanted.is_empty() {
            self.finish()?;
        }
        Ok(logits)
    }

    /// Waits for everything enqueued.
    fn finish(&self) -> Result<(), ModelError> {
        let event = self.device.record(Lane::Compute);
        Ok(self.device.wait(&event, Deadline::after(self.options.timeout))?)
    }

    fn dense(&self, place: Place, mlp: &Mlp, x: &Buffer, out: &Buffer) -> Result<(), DeviceError> {
        let inner = self.buffers.inner.rows(0..x.rows)?.columns(0..mlp.inner())?;
        self.compute(place, Gemm::gated(x.clone(), &mlp.gate_up, inner.clone()))?;
        self.compute(place, Gemm::linear(inner, &mlp.down, out.clone()))
    }

    fn norm(&self, place: Place, x: &Buffer, weight: &Weight, out: &Buffer) -> Result<(), DeviceError> {
        let (kind, eps) = (self.spec.norm.kind, self.spec.norm.eps);
        self.compute(place, Norm { kind, x: x.clone(), weight: weight.clone(), eps, out: out.clone() })
    }

    fn add(&self, place: Place, x: &Buffer, out: &Buffer) -> Result<(), DeviceError> {
        self.compute(place, Add { x: x.clone(), out: out.clone() })
    }

    fn upload(&self, words: &[u32], out: &Buffer) -> Result<Buffer, DeviceError> {
        self.compute(Place::default(), Upload { words: words.into(), out: out.clone() })?;
        Ok(out.clone())
    }

    fn compute(&self, place: Place, op: impl Into<Op>) -> Result<(), DeviceError> {
        compute(&*self.device, place, op)
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
    ) -> Result<Self, DeviceError> {
        let (tokens, sequences, hidden) = (options.max_tokens, options.max_sequences, spec.hidden);
        let values = |name, width| device.allocate(name, device.dtype(), tokens, width);
        let indices = |name, rows, width| device.allocate(name, DType::U32, rows, width);
        let logit_rows = tokens.min(LOGIT_ROWS);
        let last = |name| device.allocate(name, device.dtype(), logit_rows, hidden);
        let residual = spec.layers.iter().any(|layer| layer.residual_mlp.is_some());
        Ok(StepBuffers {
            ids: indices("ids", tokens, 1)?,
            positions: indices("positions", tokens, 1)?,
            slots: indices("slots", tokens, 1)?,
            sequence_starts: indices("sequence_starts", sequences + 1, 1)?,
            blocks: indices("blocks", sequences, options.max_blocks)?,
            angles: device.allocate("angles", DType::F32, tokens, spec.rope.dim)?,
            hidden: values("hidden", hidden)?,
            normed: values("normed", hidden)?,
            mixed: values("mixed", hidden)?,
            early: values("early", if residual { hidden } else { 0 })?,
            inner: values("inner", widest_dense(spec))?,
            wanted: indices("wanted", logit_rows, 1)?,
            last: last("last")?,
            last_normed: last("last_normed")?,
            logits: device.allocate("logits", DType::F32, logit_rows, spec.vocab)?,
        })
    }
}

/// Sizes of the expert pipeline. Everything that ranks must have in common is in it, or in its identity.
fn pipeline_options(
    spec: &ModelSpec,
    moe: &MoeSpec,
    placement: Placement,
    options: &ModelOptions,
    dtype: DType,
) -> PipelineOptions {
    let top_k = moe.gate.top_k;
    let layer = LayerSizes {
        hidden: spec.hidden,
        inner: moe.inner,
        top_k,
        local_experts: placement.max_local(),
        activation_bytes: dtype.bytes(),
    };
    let worst = || Capacity::worst_case(options.max_tokens, &placement, top_k);
    let capacity = options.capacity.unwrap_or_else(worst);
    let shared_inner = moe.shared.map_or(0, |shared| shared.inner);
    PipelineOptions {
        sizes: PipelineSizes { layer, shared_inner, capacity },
        placement,
        policy: options.policy.clone(),
        identity: hash_bytes(format!("{spec:?} {dtype}").as_bytes()),
        timeout: options.timeout,
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
