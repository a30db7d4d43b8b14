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
//! Experts by `ep` are priced by [`search`] or [`simulate`](crate::simulate()) on counts drawn from a [`SyntheticRouting`]; everything
//! else by the same [`CostModel`]. All times are of a prefill without a cache.

use crate::{
    Capacity, Choice, CostModel, GemmKind, HostCost, LayerBytes, LayerHistograms, LayerShape, LayerSizes,
    LinkCost, Machine, Piecewise, Placement, PlanError, SearchOptions, SharedExpert, StageTable,
    SyntheticRouting, Traffic, Workload, predict_ns, search,
};
use epsmoe_base::{Bytes, Rank, count};
use serde::Serialize;
use std::fmt;

/// Sizes of a model, whatever its architecture is called.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ModelSizes {
    /// For the heading.
    pub name: String,
    /// All layers.
    pub layers: usize,
    /// Those of them with a dense MLP instead of experts.
    pub dense_layers: usize,
    /// Hidden width H.
    pub hidden: usize,
    /// Vocabulary V.
    pub vocab: usize,
    /// The output projection is the embedding table.
    pub tied: bool,
    /// Attention, the same in every layer.
    pub attention: AttentionSizes,
    /// Routed experts E and how many a token visits, k.
    pub experts: usize,
    /// k.
    pub top_k: usize,
    /// Expert groups and how many of them a token may use.
    pub groups: Option<(usize, usize)>,
    /// Inner width of a routed expert, I.
    pub inner: usize,
    /// Inner width of all shared experts together; 0 without.
    pub shared_inner: usize,
    /// Inner width of the MLP of dense layers.
    pub dense_inner: usize,
    /// Inner width of a dense MLP beside the experts, as in Arctic; 0 without.
    pub residual_inner: usize,
}

/// Widths of attention.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AttentionSizes {
    /// Query heads that share key and value heads.
    Gqa {
        /// Query heads.
        heads: usize,
        /// Key and value heads.
        kv_heads: usize,
        /// Width of a head.
        head: usize,
    },
    /// Keys and values decompressed from a latent vector (MLA).
    Mla {
        /// Heads.
        heads: usize,
        /// Rank of the compressed queries; 0: not compressed.
        query_rank: usize,
        /// Rank of the latent.
        latent: usize,
        /// Width of a head without position.
        nope: usize,
        /// Width of the rotated part.
        rope: usize,
        /// Width of a value head.
        value: usize,
    },
}

/// A product with a matrix `[N, K]`.
type Matrix = (usize, usize);

impl AttentionSizes {
    /// The matrices of one layer on one of `parts` GPUs that split the heads. KV heads are repeated once there are
    /// more GPUs than heads; the latents of MLA and what makes them always are.
    fn matrices(&self, hidden: usize, parts: usize) -> Vec<Matrix> {
        match *self {
            AttentionSizes::Gqa { heads, kv_heads, head } => {
                let (heads, kv_heads) = (heads.div_ceil(parts), kv_heads.div_ceil(parts));
                vec![((heads + 2 * kv_heads) * head, hidden), (hidden, heads * head)]
            }
            AttentionSizes::Mla { heads, query_rank, latent, nope, rope, value } => {
                let heads = heads.div_ceil(parts);
                let queries = match query_rank {
                    0 => vec![(heads * (nope + rope), hidden)],
                    rank => vec![(rank, hidden), (heads * (nope + rope), rank)],
                };
                let rest =
                    [(latent + rope, hidden), (heads * (nope + value), latent), (hidden, heads * value)];
                queries.into_iter().chain(rest).collect()
            }
        }
    }

    /// (heads, width of scores plus width of values).
    fn core(&self) -> (usize, usize) {
        match *self {
            AttentionSizes::Gqa { heads, head, .. } => (heads, 2 * head),
            AttentionSizes::Mla { heads, nope, rope, value, .. } => (heads, nope + rope + value),
        }
    }

    /// Cached elements of a token in a layer, on one of `parts` GPUs.
    fn cached(&self, parts: usize) -> usize {
        match *self {
            AttentionSizes::Gqa { kv_heads, head, .. } => 2 * kv_heads.div_ceil(parts) * head,
            AttentionSizes::Mla { latent, rope, .. } => latent + rope,
        }
    }
}

/// Bytes of an element: bf16.
const ELEMENT: usize = 2;

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
        self.weights + self.cache + self.buffers
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
    /// Memory of a GPU.
    pub memory_bytes: u64,
    /// Strategies by schedules.
    pub rows: Vec<Row>,
    /// The fastest row that fits.
    pub best: Option<usize>,
    /// Why, in words.
    pub why: String,
}

/// Share of a GPU's memory that can be filled, in permille: the rest is the driver's and fragmentation.
const USABLE: u64 = 950;

/// Permille that more stages must gain over fewer: a judgement of what figures that were not measured on the machine
/// can tell, made with DBRX on fast links in view (`docs/paper-check.md`).
const MARGIN: u64 = 40;

/// Compares all strategies and schedules.
pub fn advise(model: &ModelSizes, machine: &Machine, load: &Load) -> Result<Advice, PlanError> {
    let advisor = Advisor { model, machine, load, cost: machine.cost() };
    let mut rows = Vec::new();
    for strategy in Strategy::ALL {
        if strategy.expert_parallel() && model.experts < machine.ranks {
            continue;
        }
        rows.extend(advisor.rows(strategy)?);
    }
    let fastest = |fits: bool| {
        let rows = rows.iter().enumerate().filter(|(_, row)| row.fits || !fits);
        rows.min_by_key(|(_, row)| (row.prefill_ns, row.running != Running::Auto)).map(|(index, _)| index)
    };
    let best = fastest(true);
    let why = why(&rows, best, fastest(false));
    Ok(Advice {
        model: model.name.clone(),
        machine: machine.name.clone(),
        batch: load.batch,
        sequence: load.sequence,
        memory_bytes: machine.gpu.memory_bytes.value,
        rows,
        best,
        why,
    })
}

struct Advisor<'a> {
    model: &'a ModelSizes,
    machine: &'a Machine,
    load: &'a Load,
    cost: CostModel,
}

/// The parts of a strategy that no schedule changes.
struct Frame {
    /// Tokens that attention sees on the fullest GPU.
    tokens: usize,
    attention_ns: u64,
    collective_ns: u64,
    collective_bytes: u64,
    /// Dense MLPs beside the experts.
    residual_ns: u64,
    dense_layers_ns: u64,
    ends_ns: u64,
    weights: u64,
    cache: u64,
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
    fn rows(&self, strategy: Strategy) -> Result<Vec<Row>, PlanError> {
        let frame = self.frame(strategy);
        let experts = if strategy.expert_parallel() { self.parallel(strategy)? } else { self.split()? };
        Ok(experts
            .into_iter()
            .map(|(running, experts)| self.row(strategy, running, &frame, experts))
            .collect())
    }

    fn row(&self, strategy: Strategy, running: Running, frame: &Frame, experts: Experts) -> Row {
        let model = self.model;
        let experts_ns = experts.ns + frame.residual_ns;
        let layer_ns = frame.attention_ns + frame.collective_ns + experts_ns;
        let sparse = (model.layers - model.dense_layers) as u64;
        let prefill_ns = sparse * layer_ns + frame.dense_layers_ns + frame.ends_ns;
        let tokens = (self.load.batch * self.load.sequence) as u128;
        // The residual stream and what is added to it, in float32; its norm, and what comes out of attention.
        let hidden = (frame.tokens * model.hidden * (2 * size_of::<f32>() + 2 * ELEMENT)) as u64;
        let bytes =
            GpuBytes { weights: frame.weights, cache: frame.cache, buffers: hidden + experts.buffers };
        Row {
            strategy,
            running,
            stages: experts.stages,
            layer_ns,
            attention_ns: frame.attention_ns,
            collective_ns: frame.collective_ns,
            experts_ns,
            prefill_ns,
            tokens_per_second: (tokens * 1_000_000_000 / u128::from(prefill_ns.max(1))) as u64,
            moved_bytes: frame.collective_bytes + experts.moved,
            bytes,
            fits: bytes.total() <= self.machine.gpu.memory_bytes.value / 1000 * USABLE,
            explanation: experts.explanation,
        }
    }

    fn frame(&self, strategy: Strategy) -> Frame {
        let (model, load, ranks) = (self.model, self.load, self.machine.ranks);
        let split = strategy.attention_split();
        let parts = if split { ranks } else { 1 };
        let sequences = if split { load.batch } else { load.batch.div_ceil(ranks) };
        let tokens = sequences * load.sequence;
        // Elements of (P/D)·(D−1) tokens.
        let unit = (load.batch * load.sequence).div_ceil(ranks) * (ranks - 1) * model.hidden * ELEMENT;
        let units = match strategy {
            Strategy::TpTp => 4,
            Strategy::TpEp | Strategy::DpTp => 2,
            Strategy::DpEp => 0,
        };
        let collective = self.machine.collective_ns(unit as u64);
        let attention_ns = self.attention_ns(tokens, sequences, parts);
        // A residual MLP is divided like attention.
        let residual_ns = self.mlp_ns(tokens, model.residual_inner, parts);
        let dense = attention_ns
            + self.mlp_ns(tokens, model.dense_inner, parts)
            + if split { 4 * collective } else { 0 };
        Frame {
            tokens,
            attention_ns,
            collective_ns: units * collective,
            collective_bytes: units * unit as u64,
            residual_ns,
            dense_layers_ns: model.dense_layers as u64 * dense,
            ends_ns: self.products_ns(sequences, &[(model.vocab.div_ceil(parts), model.hidden)]),
            weights: self.weights(strategy),
            cache: (model.layers * tokens * model.attention.cached(parts) * ELEMENT) as u64,
        }
    }

    fn products_ns(&self, rows: usize, matrices: &[Matrix]) -> u64 {
        let product = |&(columns, depth): &Matrix| {
            self.cost.dense.product(columns, depth, ELEMENT).op_ns([rows as u64])
        };
        matrices.iter().map(product).sum()
    }

    fn mlp_ns(&self, tokens: usize, inner: usize, parts: usize) -> u64 {
        let (hidden, inner) = (self.model.hidden, inner.div_ceil(parts));
        if inner == 0 { 0 } else { self.products_ns(tokens, &[(2 * inner, hidden), (hidden, inner)]) }
    }

    /// Projections, causal attention, two norms and the residual additions.
    fn attention_ns(&self, tokens: usize, sequences: usize, parts: usize) -> u64 {
        let (model, sequence) = (self.model, self.load.sequence);
        let (heads, widths) = model.attention.core();
        let flops = sequence as u128 * (sequence as u128 + 1) * widths as u128;
        let flops = flops * heads.div_ceil(parts) as u128 * sequences as u128;
        let permille = self.machine.kernels.attention.value.clamped(sequence as u64).max(1);
        let rate = u128::from(self.machine.gpu.flops_per_second.value) * u128::from(permille) / 1000;
        let core = (flops * 1_000_000_000 / rate) as u64;
        let norms = 4 * self.cost.rows.gather.extended((tokens * model.hidden * ELEMENT) as u64);
        self.products_ns(tokens, &model.attention.matrices(model.hidden, parts)) + core + norms
    }

    /// Weights of the fullest GPU.
    fn weights(&self, strategy: Strategy) -> u64 {
        let (model, ranks) = (self.model, self.machine.ranks);
        let parts = if strategy.attention_split() { ranks } else { 1 };
        let matrices = |all: &[Matrix]| all.iter().map(|(columns, depth)| columns * depth).sum::<usize>();
        let attention = matrices(&model.attention.matrices(model.hidden, parts));
        let mlp = |inner: usize, parts: usize| 3 * model.hidden * inner.div_ceil(parts);
        // Shared experts see a GPU's own tokens: whole where tokens are divided, split where they are not.
        let (routed, shared_parts) = if strategy.expert_parallel() {
            (model.experts.div_ceil(ranks) * mlp(model.inner, 1), 1)
        } else {
            (model.experts * mlp(model.inner, ranks), ranks)
        };
        let router = model.experts * model.hidden;
        let sparse =
            routed + mlp(model.shared_inner, shared_parts) + router + mlp(model.residual_inner, parts);
        let tables = if model.tied { 1 } else { 2 } * (model.vocab * model.hidden).div_ceil(parts);
        let elements = model.layers * attention
            + (model.layers - model.dense_layers) * sparse
            + model.dense_layers * mlp(model.dense_inner, parts)
            + tables;
        (elements * ELEMENT) as u64
    }

    fn law(&self) -> SyntheticRouting {
        let (model, load) = (self.model, self.load);
        SyntheticRouting {
            top_k: model.top_k,
            groups: model.groups,
            zipf_permille: load.zipf_permille,
            seed: load.seed,
        }
    }

    fn shape(&self, inner: usize, shared_inner: usize, local_experts: usize) -> LayerShape {
        let (hidden, top_k) = (self.model.hidden, self.model.top_k);
        LayerShape {
            sizes: LayerSizes { hidden, inner, top_k, local_experts, activation_bytes: ELEMENT },
            shared_inner,
        }
    }

    /// Every expert on one GPU: one search or table for each schedule.
    fn parallel(&self, strategy: Strategy) -> Result<Vec<(Running, Experts)>, PlanError> {
        let (model, load, ranks) = (self.model, self.load, self.machine.ranks);
        let placement = Placement::new(model.experts, ranks)?;
        let share = |all: usize, rank: usize| all / ranks + usize::from(rank < all % ranks);
        let of_rank = |rank| match strategy.attention_split() {
            // Tokens are scattered, wherever their sequences end.
            true => share(load.batch * load.sequence, rank),
            false => share(load.batch, rank) * load.sequence,
        };
        let tokens: Vec<usize> = (0..ranks).map(of_rank).collect();
        let counts = self.law().counts(&placement, &tokens)?;
        let shape = self.shape(model.inner, model.shared_inner, placement.max_local());
        let workload = Workload { placement: &placement, counts: &counts, shape: &shape };
        let serial = StageTable::serial(&placement, GemmKind::Grouped);
        let serial_ns = predict_ns(&serial, 0, &workload, &self.cost);
        let mut all = vec![(Running::Serial, self.measured(&workload, &serial, serial_ns, None))];
        let most = SearchOptions::default().max_stages;
        for (running, min_stages, max_stages) in
            [(Running::Kernel, 1, 1), (Running::Staged, load.stages, load.stages), (Running::Auto, 1, most)]
        {
            let options =
                SearchOptions { min_stages, max_stages, margin: MARGIN, ..SearchOptions::default() };
            let Choice { table, predicted, .. } = &search(&workload, &self.cost, &options);
            let text = (running == Running::Auto).then(|| short(table, self.machine.ranks));
            all.push((running, self.measured(&workload, table, predicted.layer_ns, text)));
        }
        Ok(all)
    }

    fn measured(
        &self,
        workload: &Workload<'_>,
        table: &StageTable,
        ns: u64,
        explanation: Option<String>,
    ) -> Experts {
        let traffic = Traffic::of(workload.placement, workload.counts, table);
        let ranks = || workload.placement.all_ranks();
        let row_bytes = (self.model.hidden * ELEMENT) as u64;
        let rows =
            |from: Rank, to: Rank| if from == to { 0 } else { traffic.send_rows(from, to).len() as u64 };
        let moved = |rank: Rank| {
            let (out, back): (u64, u64) =
                (ranks().map(|other| rows(rank, other)).sum(), ranks().map(|other| rows(other, rank)).sum());
            2 * out.max(back) * row_bytes
        };
        let buffers = |rank| LayerBytes::of(&workload.shape.sizes, &Capacity::needed(&traffic, rank)).total();
        Experts {
            stages: table.stages(),
            ns,
            moved: ranks().map(moved).max().unwrap_or(0),
            buffers: ranks().map(buffers).max().unwrap_or(0),
            explanation,
        }
    }

    /// Every expert split over all GPUs: each sees all tokens, and nobody waits for anybody inside the layer.
    fn split(&self) -> Result<Vec<(Running, Experts)>, PlanError> {
        let (model, load, ranks) = (self.model, self.load, self.machine.ranks);
        let placement = Placement::new(model.experts, 1)?;
        let counts: LayerHistograms = self.law().counts(&placement, &[load.batch * load.sequence])?;
        let shape =
            self.shape(model.inner.div_ceil(ranks), model.shared_inner.div_ceil(ranks), model.experts);
        let workload = Workload { placement: &placement, counts: &counts, shape: &shape };
        let none = || Piecewise::flat(0);
        let cost = CostModel {
            link: LinkCost { exchange_ns: 0, node_ranks: 0, near: none(), far: none(), copy: none() },
            host: HostCost::default(),
            ..self.cost.clone()
        };
        let of = |kind| {
            let table = StageTable { shared: SharedExpert::Alone, ..StageTable::serial(&placement, kind) };
            let ns = predict_ns(&table, 0, &workload, &cost);
            self.measured(&workload, &table, ns, None)
        };
        let (grouped, dense) = (of(GemmKind::Grouped), of(GemmKind::Dense));
        let better = if dense.ns < grouped.ns { dense } else { of(GemmKind::Grouped) };
        Ok(vec![(Running::Serial, grouped), (Running::Kernel, better)])
    }
}

/// A table in a line.
fn short(table: &StageTable, ranks: usize) -> String {
    let sizes = |cut: &Vec<usize>| {
        cut.windows(2).map(|ends| (ends[1] - ends[0]).to_string()).collect::<Vec<_>>().join("+")
    };
    let cuts = table.cuts.first().map(sizes).unwrap_or_default();
    let which = if ranks > 1 { " on rank 0" } else { "" };
    let gemm = table.gemm.iter().map(GemmKind::to_string).collect::<Vec<_>>().join(" ");
    format!("{}: {cuts} experts{which}, {gemm}", count(table.stages(), "stage"))
}

fn why(rows: &[Row], best: Option<usize>, fastest: Option<usize>) -> String {
    let Some(row) = best.map(|index| &rows[index]) else {
        let least = rows.iter().map(|row| row.bytes.total()).min().unwrap_or(0);
        return format!("nothing fits: the smallest plan needs {} a GPU", Bytes(least));
    };
    let of = |strategy| rows.iter().filter(move |row| row.strategy == strategy);
    let mut reasons = vec![format!("{} {} is fastest of what fits", row.strategy, row.running)];
    if let Some(fastest) =
        fastest.map(|index| &rows[index]).filter(|fastest| fastest.prefill_ns < row.prefill_ns)
    {
        reasons.push(format!(
            "{} would be faster but needs {} a GPU",
            fastest.strategy,
            Bytes(fastest.bytes.total())
        ));
    }
    for other in Strategy::ALL.into_iter().filter(|&strategy| strategy != row.strategy) {
        let Some(rival) = of(other).min_by_key(|rival| rival.prefill_ns) else { continue };
        let longer = |theirs: u64, ours: u64| theirs as i64 / 1000 - ours as i64 / 1000;
        reasons.push(format!(
            "{other} spends {:+} µs a layer on attention, {:+} on collectives, {:+} on experts and their exchanges",
            longer(rival.attention_ns, row.attention_ns),
            longer(rival.collective_ns, row.collective_ns),
            longer(rival.experts_ns, row.experts_ns),
        ));
    }
    if let Some(one) = of(row.strategy).find(|one| one.running == Running::Kernel && one.stages == 1) {
        let gain = (one.experts_ns as f64 / row.experts_ns.max(1) as f64 - 1.0) * 100.0;
        reasons.push(match row.stages {
            1 => "more stages do not pay".into(),
            stages => format!("{stages} stages make the experts {gain:.1} % faster than one"),
        });
    }
    reasons.join("; ")
}

impl fmt::Display for Advice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "{} on {}, batch {} x sequence {}, {} a GPU",
            self.model,
            self.machine,
            self.batch,
            self.sequence,
            Bytes(self.memory_bytes)
        )?;
        writeln!(
            f,
            "{:<8} {:<7} {:>6} {:>10} {:>10} {:>11} {:>10} {:>11} {:>10} {:>10}",
            "strategy",
            "run",
            "stages",
            "layer µs",
            "attention",
            "collectives",
            "experts",
            "tokens/s",
            "moved",
            "GPU bytes"
        )?;
        for (index, row) in self.rows.iter().enumerate() {
            let micros = |ns: u64| ns / 1000;
            let mark = if Some(index) == self.best { "  <- best" } else { "" };
            let mark = if row.fits { mark } else { "  does not fit" };
            writeln!(
                f,
                "{:<8} {:<7} {:>6} {:>10} {:>10} {:>11} {:>10} {:>11} {:>10} {:>10}{mark}",
                row.strategy,
                row.running,
                row.stages,
                micros(row.layer_ns),
                micros(row.attention_ns),
                micros(row.collective_ns),
                micros(row.experts_ns),
                row.tokens_per_second,
                Bytes(row.moved_bytes).to_string(),
                Bytes(row.bytes.total()).to_string(),
            )?;
        }
        if let Some(explanation) = self.best.and_then(|best| self.rows[best].explanation.as_ref()) {
            writeln!(f, "{explanation}")?;
        }
        writeln!(f, "{}", self.why)
    }
}
