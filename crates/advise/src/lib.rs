//! Which parallel strategy and which schedule a model should run with on a machine, in numbers and in words: what
//! `epsmoe plan` prints.
//!
//! A strategy is attention by `dp` or `tp` and experts by `tp` or `ep`, over all GPUs. With P tokens of H elements
//! in the whole batch and D GPUs, a GPU sends per MoE layer, with u = (P/D)·(D−1)·H elements:
//!
//! | strategy | after attention | experts | before the next attention |
//! |---|---|---|---|
//! | TP+TP | all-reduce, 2 u | – | all-reduce, 2 u |
//! | TP+EP | reduce-scatter, u | two all-to-alls of the P/D tokens | all-gather, u |
//! | DP+TP | all-gather, u | – | reduce-scatter, u |
//! | DP+EP | – | two all-to-alls of the own tokens | – |
//!
//! Experts by `ep` are priced by [`search`](epsmoe_plan::search()) or [`simulate`](epsmoe_plan::simulate()) on counts drawn
//! from a [`SyntheticRouting`](epsmoe_plan::SyntheticRouting) (`experts`); everything else by the same
//! [`CostModel`] (`frame`). All times are of a prefill without a cache.
//!
//! Numbers come from users: `limits` refuses what could not be told in whole nanoseconds and bytes, and what is multiplied
//! here is checked.

mod experts;
mod frame;
mod limits;
mod text;

use epsmoe_base::{CacheDType, DType, WireDType, WireFormat};
use epsmoe_model::{ModelSpec, MoeSpec};
use epsmoe_plan::{CostModel, MOST_NS, Machine, PlanError, WeightCost, millibits};
use frame::{Frame, sum};
use serde::Serialize;
use std::fmt;

/// Why there is no advice.
#[derive(Debug, thiserror::Error)]
pub enum AdviseError {
    /// The model has no mixture of experts.
    #[error("{0} has no experts, so there is nothing to plan")]
    NoExperts(String),
    /// A number that no plan can be told for: which, what it is and what it may be.
    #[error("{0}")]
    Limit(String),
    /// The plan of a layer was refused.
    #[error(transparent)]
    Plan(#[from] PlanError),
}

/// How a layer is divided over GPUs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub enum Strategy {
    /// Heads split, experts split.
    #[serde(rename = "TP+TP")]
    TpTp,
    /// Heads split, every expert on one GPU.
    #[serde(rename = "TP+EP")]
    TpEp,
    /// Sequences split, experts split.
    #[serde(rename = "DP+TP")]
    DpTp,
    /// Sequences split, every expert on one GPU.
    #[serde(rename = "DP+EP")]
    DpEp,
}

impl Strategy {
    /// All of them.
    pub const ALL: [Strategy; 4] = [Strategy::TpTp, Strategy::TpEp, Strategy::DpTp, Strategy::DpEp];

    fn attention_split(self) -> bool {
        matches!(self, Strategy::TpTp | Strategy::TpEp)
    }

    fn expert_parallel(self) -> bool {
        matches!(self, Strategy::TpEp | Strategy::DpEp)
    }
}

impl fmt::Display for Strategy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Strategy::TpTp => "TP+TP",
            Strategy::TpEp => "TP+EP",
            Strategy::DpTp => "DP+TP",
            Strategy::DpEp => "DP+EP",
        })
    }
}

/// How the experts of a layer run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Running {
    /// One stage, grouped GEMM, nothing beside anything.
    Serial,
    /// One stage, the better kernel.
    Kernel,
    /// A fixed number of stages, everything else searched.
    Staged,
    /// Whatever the search finds.
    Auto,
}

impl fmt::Display for Running {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Running::Serial => "serial",
            Running::Kernel => "kernel",
            Running::Staged => "staged",
            Running::Auto => "auto",
        })
    }
}

/// What is to be run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Load {
    /// Sequences.
    pub batch: usize,
    /// Tokens of each.
    pub sequence: usize,
    /// Zipf exponent of the experts' popularity, in thousandths; 0 is uniform.
    pub zipf_permille: u32,
    /// Seed of the routing.
    pub seed: u64,
    /// Stages of [`Running::Staged`].
    pub stages: usize,
    /// What rows travel to their experts in.
    pub wire: WireDType,
    /// What keys and values are cached in.
    pub cache: CacheDType,
    /// How weights are held.
    pub weights: HeldAs,
}

/// How the weights of a model are held, on average, and multiplied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HeldAs {
    /// Routed experts.
    pub experts: WeightCost,
    /// Everything else in a layer.
    pub layers: WeightCost,
    /// Thousandths of a bit of a number of embeddings and the output projection.
    pub tables: u64,
}

impl Default for HeldAs {
    /// Nothing in codes.
    fn default() -> Self {
        let plain = millibits(DTYPE);
        HeldAs { experts: plain.into(), layers: plain.into(), tables: plain }
    }
}

impl Load {
    /// All tokens, P.
    fn tokens(&self) -> usize {
        self.batch * self.sequence // `limits` has looked at it.
    }

    fn wire(&self) -> WireFormat {
        WireFormat::of(self.wire, DTYPE)
    }
}

/// Memory of the fullest GPU.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct GpuBytes {
    /// Weights.
    pub weights: u64,
    /// Cached keys and values of the whole batch.
    pub cache: u64,
    /// Hidden states and the buffers of a MoE layer.
    pub buffers: u64,
}

impl GpuBytes {
    /// All of it.
    pub fn total(&self) -> u64 {
        self.weights.saturating_add(self.cache).saturating_add(self.buffers)
    }
}

/// One strategy with one way to run it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Row {
    /// The strategy.
    pub strategy: Strategy,
    /// The schedule.
    pub running: Running,
    /// Stages it runs in.
    pub stages: usize,
    /// One MoE layer with its attention.
    pub layer_ns: u64,
    /// Of which attention,
    pub attention_ns: u64,
    /// collectives around it,
    pub collective_ns: u64,
    /// and router, experts, their exchanges and other MLPs.
    pub experts_ns: u64,
    /// The whole prefill.
    pub prefill_ns: u64,
    /// Prefill tokens a second, on all GPUs together.
    pub tokens_per_second: u64,
    /// Bytes that a GPU sends (or receives, if more) in a MoE layer.
    pub moved_bytes: u64,
    /// Memory of a GPU.
    pub bytes: GpuBytes,
    /// Whether that fits.
    pub fits: bool,
    /// The choice in words, where there was one.
    pub explanation: Option<String>,
}

/// All rows, and the best.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Advice {
    /// The model.
    pub model: String,
    /// The machine.
    pub machine: String,
    /// What was asked.
    pub batch: usize,
    /// Tokens of a sequence.
    pub sequence: usize,
    /// What rows travel in.
    pub wire: String,
    /// How the weights of experts are held and multiplied.
    pub experts: String,
    /// Memory of a GPU.
    pub memory_bytes: u64,
    /// Strategies by schedules.
    pub rows: Vec<Row>,
    /// The fastest row that fits.
    pub best: Option<usize>,
    /// Why, in words.
    pub why: String,
    /// Strategies that are not among the rows, and why.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub left_out: Option<String>,
}

/// What activations are in, and weights unless they are held in codes.
pub const DTYPE: DType = DType::BF16;
/// Bytes of an element of them.
const ELEMENT: usize = DTYPE.bytes();

/// Share of a GPU's memory that can be filled, in permille: the rest is the driver's and fragmentation.
const USABLE: u64 = 950;

/// Permille that more stages must gain over fewer: a judgement of what figures that were not measured on the machine
/// can tell, made with DBRX on fast links in view (`docs/paper-check.md`).
const MARGIN: u64 = 40;

/// Compares all strategies and schedules for a model that goes by `name`.
pub fn advise(name: &str, model: &ModelSpec, machine: &Machine, load: &Load) -> Result<Advice, AdviseError> {
    let moe = model.layers.iter().find_map(|layer| layer.mlp.moe());
    let moe = moe.ok_or_else(|| AdviseError::NoExperts(name.to_owned()))?;
    limits::check(model, moe, machine, load)?;
    let advisor = Advisor { model, moe, machine, load, cost: machine.cost() };
    let mut rows = Vec::new();
    for strategy in Strategy::ALL {
        if strategy.expert_parallel() && moe.experts < machine.ranks {
            continue;
        }
        rows.extend(advisor.rows(strategy)?);
    }
    let fastest = |fits: bool| {
        let rows = rows.iter().enumerate().filter(|(_, row)| row.fits || !fits);
        rows.min_by_key(|(_, row)| (row.prefill_ns, row.running != Running::Auto)).map(|(index, _)| index)
    };
    let best = fastest(true);
    let why = text::why(&rows, best, fastest(false));
    Ok(Advice {
        model: name.to_owned(),
        machine: machine.name.clone(),
        batch: load.batch,
        sequence: load.sequence,
        wire: load.wire().to_string(),
        experts: load.weights.experts.to_string(),
        memory_bytes: machine.gpu.memory_bytes.value,
        rows,
        best,
        why,
        left_out: (moe.experts < machine.ranks).then(|| {
            format!(
                "strategies with experts spread are left out: {} experts are fewer than the machine's {} GPUs",
                moe.experts, machine.ranks
            )
        }),
    })
}

struct Advisor<'a> {
    model: &'a ModelSpec,
    /// The mixture of its MoE layers, which are all alike.
    moe: &'a MoeSpec,
    machine: &'a Machine,
    load: &'a Load,
    cost: CostModel,
}

/// The experts of one layer under one schedule.
struct Experts {
    stages: usize,
    ns: u64,
    moved: u64,
    buffers: u64,
    explanation: Option<String>,
}

impl Advisor<'_> {
    fn rows(&self, strategy: Strategy) -> Result<Vec<Row>, AdviseError> {
        let frame = self.frame(strategy)?;
        let experts = if strategy.expert_parallel() { self.parallel(strategy)? } else { self.split()? };
        experts.into_iter().map(|(running, experts)| self.row(strategy, running, &frame, experts)).collect()
    }

    fn row(
        &self,
        strategy: Strategy,
        running: Running,
        frame: &Frame,
        experts: Experts,
    ) -> Result<Row, AdviseError> {
        if [experts.ns, frame.attention_ns, frame.collective_ns].into_iter().any(|ns| ns >= MOST_NS) {
            // Some part of it may be longer than it was priced at.
            return Err(limits::beyond());
        }
        let experts_ns = sum([experts.ns, frame.residual_ns])?;
        let layer_ns = sum([frame.attention_ns, frame.collective_ns, experts_ns])?;
        let sparse = self.model.layers.iter().filter(|layer| layer.mlp.moe().is_some()).count();
        let prefill_ns =
            sum([frame::product([sparse as u64, layer_ns])?, frame.dense_layers_ns, frame.ends_ns])?;
        // The residual stream and what is added to it, in float32; its norm, and what comes out of attention.
        let a_token = (self.model.hidden * (2 * size_of::<f32>() + 2 * ELEMENT)) as u64;
        let hidden = frame::product([frame.tokens as u64, a_token])?;
        let bytes =
            GpuBytes { weights: frame.weights, cache: frame.cache, buffers: sum([hidden, experts.buffers])? };
        let tokens = self.load.tokens() as u128;
        Ok(Row {
            strategy,
            running,
            stages: experts.stages,
            layer_ns,
            attention_ns: frame.attention_ns,
            collective_ns: frame.collective_ns,
            experts_ns,
            prefill_ns,
            tokens_per_second: (tokens * 1_000_000_000 / u128::from(prefill_ns.max(1))) as u64,
            moved_bytes: sum([frame.collective_bytes, experts.moved])?,
            bytes,
            fits: bytes.total() <= self.machine.gpu.memory_bytes.value / 1000 * USABLE,
            explanation: experts.explanation,
        })
    }
}
