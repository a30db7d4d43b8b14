//! The parts of a layer that no schedule changes: attention, collectives, dense MLPs, weights and cache.

use crate::{AdviseError, Advisor, DTYPE, ELEMENT, HeldAs, Strategy, limits};
use epsmoe_model::{AttentionSpec, GqaSpec, LayerSpec, Map, MlaSpec, MlpSpec, RecurrentSpec, StateRows};

/// A product with a matrix `[N, K]`.
type Matrix = (usize, usize);

/// What is the same under every schedule of a strategy.
pub(crate) struct Frame {
    /// Tokens that attention sees on the fullest GPU.
    pub(crate) tokens: usize,
    pub(crate) attention_ns: u64,
    pub(crate) collective_ns: u64,
    pub(crate) collective_bytes: u64,
    /// Dense MLPs beside the experts.
    pub(crate) residual_ns: u64,
    pub(crate) dense_layers_ns: u64,
    pub(crate) ends_ns: u64,
    pub(crate) weights: u64,
    pub(crate) cache: u64,
}

/// The matrices of one layer's attention on one of `parts` GPUs that split the heads. KV heads are repeated once there
/// are more GPUs than heads; the latents of MLA and what makes them always are.
fn matrices(attention: &AttentionSpec, hidden: usize, parts: usize) -> Vec<Matrix> {
    match *attention {
        AttentionSpec::Gqa(GqaSpec { heads, kv_heads, head_dim, gated, .. }) => {
            let (heads, kv_heads) = (heads.div_ceil(parts), kv_heads.div_ceil(parts));
            let gates = if gated { heads } else { 0 };
            vec![((heads + gates + 2 * kv_heads) * head_dim, hidden), (hidden, heads * head_dim)]
        }
        AttentionSpec::Mla(MlaSpec { heads, q_lora, kv_lora, nope, rope, value, .. }) => {
            let heads = heads.div_ceil(parts);
            let queries = match q_lora {
                None => vec![(heads * (nope + rope), hidden)],
                Some(rank) => vec![(rank, hidden), (heads * (nope + rope), rank)],
            };
            let rest = [(kv_lora + rope, hidden), (heads * (nope + value), kv_lora), (hidden, heads * value)];
            queries.into_iter().chain(rest).collect()
        }
        AttentionSpec::Recurrent(spec) => {
            let spec = recurrent_share(&spec, parts);
            let context = spec.context_width();
            let weights = StateRows::weights(&spec).len() * spec.value_heads;
            vec![(spec.mixed_width() + context + weights, hidden), (hidden, context)]
        }
    }
}

/// What one of `parts` GPUs has of a layer that carries a state.
fn recurrent_share(spec: &RecurrentSpec, parts: usize) -> RecurrentSpec {
    let key_heads = spec.heads_of_rank(parts);
    RecurrentSpec { key_heads, value_heads: key_heads * spec.group(), ..*spec }
}

/// A state is updated outside the tensor cores, which a GPU does about so many times as slowly.
const WITHOUT_TENSOR_CORES: u128 = 16;

/// Operations of one sequence of so many tokens between the projections, on one of `parts` GPUs, as many as tensor cores
/// would do meanwhile.
fn core_flops(attention: &AttentionSpec, parts: usize, sequence: u128) -> u128 {
    let causal = |heads: usize, width: usize| {
        sequence * (sequence + 1) * width as u128 * heads.div_ceil(parts) as u128
    };
    match attention {
        // A head's scores, and its values.
        AttentionSpec::Gqa(spec) => causal(spec.heads, 2 * spec.head_dim),
        AttentionSpec::Mla(spec) => causal(spec.heads, spec.nope + spec.rope + spec.value),
        // Decayed, looked at, updated, looked at.
        AttentionSpec::Recurrent(spec) => {
            let spec = recurrent_share(spec, parts);
            let state = spec.key_width * spec.context_width();
            sequence * 7 * state as u128 * WITHOUT_TENSOR_CORES
        }
    }
}

/// Cached elements of a token in a layer, on one of `parts` GPUs.
fn cached(attention: &AttentionSpec, parts: usize) -> usize {
    match attention {
        AttentionSpec::Gqa(spec) => 2 * spec.kv_heads.div_ceil(parts) * spec.head_dim,
        AttentionSpec::Mla(spec) => spec.kv_lora + spec.rope,
        AttentionSpec::Recurrent(_) => 0,
    }
}

/// Cached elements of a sequence in a layer, however long it is, likewise; states are in float32, which is two elements.
fn carried(attention: &AttentionSpec, parts: usize) -> usize {
    let AttentionSpec::Recurrent(spec) = attention else { return 0 };
    let spec = recurrent_share(spec, parts);
    2 * spec.key_width * spec.context_width() + (spec.taps - 1) * spec.mixed_width()
}

impl Advisor<'_> {
    pub(crate) fn frame(&self, strategy: Strategy) -> Result<Frame, AdviseError> {
        let (model, load, ranks) = (self.model, self.load, self.machine.ranks);
        let split = strategy.attention_split();
        let parts = if split { ranks } else { 1 };
        let sequences = if split { load.batch } else { load.batch.div_ceil(ranks) };
        let tokens = sequences * load.sequence;
        // Elements of (P/D)·(D−1) tokens.
        let unit = product(
            [load.tokens().div_ceil(ranks) * (ranks - 1), model.hidden, ELEMENT].map(|it| it as u64),
        )?;
        let units = match strategy {
            Strategy::TpTp => 4,
            Strategy::TpEp | Strategy::DpTp => 2,
            Strategy::DpEp => 0,
        };
        let collective = self.machine.collective_ns(unit);
        let of_layers =
            model.layers.iter().map(|layer| self.attention_ns(&layer.attention, tokens, sequences, parts));
        let of_layers = of_layers.collect::<Result<Vec<_>, _>>()?;
        // Where layers differ, what one of them takes on average.
        let attention_ns = sum(of_layers.iter().copied())? / of_layers.len().max(1) as u64;
        let dense_layer = |layer: &LayerSpec| match layer.mlp {
            MlpSpec::Moe(_) => Ok(0),
            MlpSpec::Absent => sum([attention_ns, if split { product([2, collective])? } else { 0 }]),
            MlpSpec::Dense { inner, activation } => sum([
                attention_ns,
                self.mlp_ns(tokens, (inner, Map::of(activation).len()), parts)?,
                if split { product([4, collective])? } else { 0 },
            ]),
        };
        let dense_layers = model.layers.iter().map(dense_layer).collect::<Result<Vec<_>, _>>()?;
        Ok(Frame {
            tokens,
            attention_ns,
            collective_ns: product([units, collective])?,
            collective_bytes: product([units, unit])?,
            // A residual MLP is divided like attention.
            residual_ns: self.mlp_ns(
                tokens,
                (self.residual_inner(), Map::of(self.moe.activation).len()),
                parts,
            )?,
            dense_layers_ns: sum(dense_layers)?,
            ends_ns: self.products_ns(sequences, &[(model.vocab.div_ceil(parts), model.hidden)])?,
            weights: self.weights(strategy)?,
            cache: sum(model
                .layers
                .iter()
                .map(|layer| {
                    let element = load.cache.of(DTYPE).bytes();
                    let cached = [tokens, cached(&layer.attention, parts), element];
                    let carried = [sequences, carried(&layer.attention, parts), ELEMENT];
                    sum([product(cached.map(|it| it as u64))?, product(carried.map(|it| it as u64))?])
                })
                .collect::<Result<Vec<_>, _>>()?)?,
        })
    }

    /// Inner width of the dense MLP beside the experts, as in Arctic; 0 without.
    fn residual_inner(&self) -> usize {
        self.model.layers.iter().filter_map(|layer| layer.residual_mlp).max().unwrap_or(0)
    }

    fn products_ns(&self, rows: usize, matrices: &[Matrix]) -> Result<u64, AdviseError> {
        let one = |&(columns, depth): &Matrix| {
            self.cost.dense.product(columns, depth, self.load.weights.layers).op_ns([rows as u64])
        };
        sum(matrices.iter().map(one))
    }

    fn mlp_ns(&self, tokens: usize, (inner, maps): (usize, usize), parts: usize) -> Result<u64, AdviseError> {
        let (hidden, inner) = (self.model.hidden, inner.div_ceil(parts));
        if inner == 0 {
            return Ok(0);
        }
        self.products_ns(tokens, &[((maps - 1) * inner, hidden), (hidden, inner)])
    }

    /// Projections, causal attention, two norms and the residual additions.
    fn attention_ns(
        &self,
        attention: &AttentionSpec,
        tokens: usize,
        sequences: usize,
        parts: usize,
    ) -> Result<u64, AdviseError> {
        let model = self.model;
        let flops = core_flops(attention, parts, self.load.sequence as u128) * sequences as u128;
        let permille = self.machine.kernels.attention.value.clamped(self.load.sequence as u64).max(1);
        let rate = u128::from(self.machine.gpu.flops_per_second.value) * u128::from(permille) / 1000;
        let core = flops.checked_mul(1_000_000_000).map(|work| work / rate.max(1));
        let core = core.and_then(|ns| u64::try_from(ns).ok()).ok_or_else(limits::beyond)?;
        let norm =
            self.cost.rows.gather.extended(product([tokens, model.hidden, ELEMENT].map(|it| it as u64))?);
        let projections = self.products_ns(tokens, &matrices(attention, model.hidden, parts))?;
        sum([projections, core, product([4, norm])?])
    }

    /// Bytes of the weights of the fullest GPU.
    fn weights(&self, strategy: Strategy) -> Result<u64, AdviseError> {
        let (model, moe, ranks) = (self.model, self.moe, self.machine.ranks);
        let parts = if strategy.attention_split() { ranks } else { 1 };
        let area = |all: &[Matrix]| all.iter().map(|(columns, depth)| (columns * depth) as u64).sum::<u64>();
        let maps = Map::of(moe.activation).len();
        let mlp = |inner: usize, parts: usize| (maps * model.hidden * inner.div_ceil(parts)) as u64;
        // Shared experts see a GPU's own tokens: whole where tokens are divided, split where they are not.
        let (experts, expert_parts, shared_parts) = match strategy.expert_parallel() {
            true => (moe.experts.div_ceil(ranks), 1, 1),
            false => (moe.experts, ranks, ranks),
        };
        let routed = product([experts as u64, mlp(moe.inner, expert_parts)])?;
        let shared = moe.shared.map_or(0, |shared| mlp(shared.inner, shared_parts));
        let sparse = sum([shared, (moe.experts * model.hidden) as u64])?;
        let layer = |layer: &LayerSpec| {
            let mlps = match layer.mlp {
                MlpSpec::Moe(_) => sum([sparse, layer.residual_mlp.map_or(0, |inner| mlp(inner, parts))])?,
                MlpSpec::Absent => 0,
                MlpSpec::Dense { inner, .. } => mlp(inner, parts),
            };
            sum([area(&matrices(&layer.attention, model.hidden, parts)), mlps])
        };
        let layers = sum(model.layers.iter().map(layer).collect::<Result<Vec<_>, _>>()?)?;
        let mixtures = model.layers.iter().filter(|layer| layer.mlp.moe().is_some()).count();
        let tables = if model.tie_embeddings { 1 } else { 2 } * (model.vocab * model.hidden).div_ceil(parts);
        let HeldAs { experts: of_experts, layers: of_layers, tables: of_tables } = self.load.weights;
        let bits = [
            product([mixtures as u64, routed, of_experts.millibits])?,
            product([layers, of_layers.millibits])?,
            product([tables as u64, of_tables])?,
        ];
        Ok(sum(bits)?.div_ceil(8000))
    }
}

/// A sum that fits.
pub(crate) fn sum(parts: impl IntoIterator<Item = u64>) -> Result<u64, AdviseError> {
    parts.into_iter().try_fold(0, u64::checked_add).ok_or_else(limits::beyond)
}

/// A product that fits.
pub(crate) fn product(factors: impl IntoIterator<Item = u64>) -> Result<u64, AdviseError> {
    factors.into_iter().try_fold(1, u64::checked_mul).ok_or_else(limits::beyond)
}
