//! Room for one step.

use super::{ModelOptions, experts};
use crate::attention::Rooms;
use crate::collectives::GroupBuffers;
use crate::parallel::Layout;
use crate::{AttentionSpec, LayerSpec, MlpSpec, ModelError, ModelSpec};
use epsmoe_base::{DType, Rank};
use epsmoe_device::{Buffer, DeviceError, Reserve, Tally};
use std::ops::Range;

/// Logits are computed for this many tokens at a time.
const LOGIT_ROWS: usize = 256;

/// Room for one step: T tokens of the group, N of them in this rank's shard.
pub(super) struct StepBuffers {
    /// `[N, 1]`.
    pub(super) ids: Buffer,
    /// `[T, 1]`.
    pub(super) slots: Buffer,
    /// `[B, most blocks of a sequence]`.
    pub(super) blocks: Buffer,
    /// `[B, 2]`.
    pub(super) states: Buffer,
    /// What attention computes for: all tokens, and in the last layer those whose logits are wanted.
    pub(super) queries: QueryBuffers,
    pub(super) wanted_queries: QueryBuffers,
    /// Tokens whose logits are wanted, within the shard `[N, 1]`.
    pub(super) wanted: Buffer,
    /// The residual stream of the shard, what is left of it for the logits, and what attention or an MLP adds to it,
    /// `[N, H]`: in float32, as every layer's rounding would stay in it.
    pub(super) stream: Buffer,
    pub(super) wanted_stream: Buffer,
    pub(super) delta: Buffer,
    /// The stream normed `[N, H]`.
    pub(super) normed: Buffer,
    /// The layer's input normed, for experts that read what was there before attention.
    pub(super) pre_attention: Buffer,
    /// What parts give, normed, and the sum of two of them `[N, H]`, float32.
    pub(super) out_normed: Buffer,
    pub(super) both: Buffer,
    /// What experts give late, and what of it is left for the logits `[N, H]`, float32; a rank's part of it, of ranks that
    /// split them.
    pub(super) late: Buffer,
    pub(super) wanted_late: Buffer,
    pub(super) late_parts: Buffer,
    /// Of a dense MLP, for all tokens of the ranks that split it.
    pub(super) inner: Buffer,
    /// Its products before an activation of its own, float32.
    pub(super) open: Buffer,
    /// What is normed, as codes.
    pub(super) normed_codes: Buffer,
    /// Rows of attention or of an MLP as codes, for maps that take them so.
    pub(super) codes: Buffer,
    /// `[LOGIT_ROWS, V]`, and the largest of each row, where the host finds it `[LOGIT_ROWS, 1]`.
    pub(super) logits: Buffer,
    pub(super) tokens: Buffer,
}

/// Room for [`Queries`](crate::step::Queries) of at most T tokens.
pub(super) struct QueryBuffers {
    pub(super) index: Buffer,
    pub(super) positions: Buffer,
    pub(super) sequence_starts: Buffer,
    pub(super) rope_tables: Vec<Buffer>,
    /// Of rounds: first queries of sequences, cached blocks, and blocks of what is decompressed.
    pub(super) round_starts: Buffer,
    pub(super) round_cached: Buffer,
    pub(super) round_blocks: Buffer,
}

impl StepBuffers {
    pub(super) fn allocate(
        device: &impl Reserve,
        spec: &ModelSpec,
        options: &ModelOptions,
        layout: &Layout,
        rooms: &Rooms,
    ) -> Result<Self, DeviceError> {
        let (tokens, sequences) = (options.max_tokens, options.max_sequences);
        let shard = layout.most_in_shard(tokens);
        let values = |name, rows, width| device.allocate(name, device.dtype(), rows, width);
        let floats = |name, rows, width| device.allocate(name, DType::F32, rows, width);
        let indices = |name, rows, width| device.allocate(name, DType::U32, rows, width);
        let rounds = if options.tells_origins(spec) { sequences } else { 0 };
        let queries = || -> Result<QueryBuffers, DeviceError> {
            Ok(QueryBuffers {
                round_starts: indices("round_starts", 2 * rounds, 1)?,
                round_cached: indices("round_cached", rounds * options.max_blocks, 1)?,
                round_blocks: indices("round_blocks", rounds * options.max_blocks, 1)?,
                index: indices("query_index", tokens, 1)?,
                positions: indices("positions", tokens, 1)?,
                sequence_starts: indices("sequence_starts", sequences + 1, 1)?,
                rope_tables: spec
                    .ropes
                    .iter()
                    .map(|rope| floats("rope_table", tokens, rope.dim))
                    .collect::<Result<_, _>>()?,
            })
        };
        let residual = spec.layers.iter().any(|layer| layer.residual_mlp.is_some());
        let sandwich = if is_sandwich(spec) { spec.hidden } else { 0 };
        let late = if is_late(spec) { spec.hidden } else { 0 };
        let (mlp_tokens, inner) = (layout.most_in_mlp(tokens), layout.inner().most(widest_dense(spec)));
        Ok(StepBuffers {
            ids: indices("ids", shard, 1)?,
            slots: indices("slots", tokens, 1)?,
            blocks: indices("blocks", sequences, options.max_blocks)?,
            states: indices("states", sequences, 4)?,
            queries: queries()?,
            wanted_queries: queries()?,
            wanted: indices("wanted", shard, 1)?,
            stream: floats("stream", shard, spec.hidden)?,
            wanted_stream: floats("wanted_stream", shard, spec.hidden)?,
            delta: floats("delta", shard, spec.hidden)?,
            normed: values("normed", shard, spec.hidden)?,
            pre_attention: values("pre_attention", shard, if residual { spec.hidden } else { 0 })?,
            out_normed: floats("out_normed", shard, sandwich)?,
            both: floats("both", shard, sandwich)?,
            late: floats("late_experts", shard, late)?,
            wanted_late: floats("wanted_late_experts", shard, late)?,
            late_parts: values(
                "late_parts",
                if layout.mlp_ranks().len() > 1 { mlp_tokens } else { 0 },
                late,
            )?,
            inner: values("inner", mlp_tokens, inner)?,
            open: floats("open_inner", mlp_tokens, most_factors(spec) * inner)?,
            normed_codes: device.allocate_codes("normed_codes", shard, spec.hidden)?,
            codes: device.allocate_codes("codes", tokens.max(mlp_tokens), spec.hidden.max(rooms.widest()))?,
            logits: floats("logits", tokens.min(LOGIT_ROWS), spec.vocab)?,
            tokens: device.allocate_for_host("tokens", DType::U32, tokens.min(LOGIT_ROWS), 1)?,
        })
    }
}

/// What the exchanges of a rank's two groups need: of those that split attention, and of those that split MLPs.
pub(super) fn groups(
    device: &impl Reserve,
    spec: &ModelSpec,
    layout: &Layout,
    tokens: usize,
) -> Result<[GroupBuffers; 2], DeviceError> {
    let group = |ranks: Range<usize>, together| {
        let most = [together, layout.most_in_shard(tokens)];
        GroupBuffers::allocate(device, ranks.len(), spec.hidden, most)
    };
    Ok([group(layout.attention_ranks(), tokens)?, group(layout.mlp_ranks(), layout.most_in_mlp(tokens))?])
}

impl ModelOptions {
    /// Bytes of the maps by which the contexts of prompts are decompressed, where attention goes to latents: weights that are
    /// made of the model's, beside them.
    pub fn made_bytes(&self, spec: &ModelSpec, dtype: DType) -> u64 {
        if !self.decompress_prompts {
            return 0;
        }
        let of_maps = |layer: &LayerSpec| {
            let AttentionSpec::Mla(mla) = layer.attention else { return 0 };
            let heads = mla.heads.div_ceil(self.parallel.tensor.max(1));
            let of_head = (mla.nope + mla.rope) * (mla.kv_lora + mla.rope) + mla.value * mla.kv_lora;
            (heads.saturating_mul(of_head) as u64).saturating_mul(dtype.bytes() as u64)
        };
        spec.layers.iter().map(of_maps).fold(0, u64::saturating_add)
    }

    /// How many bytes each of `ranks` ranks reserves beside its weights, its cache included: asked of the code that does.
    /// `fp8_rows` as of [`Reserve::fp8_rows`].
    pub fn reserved_bytes(
        &self,
        spec: &ModelSpec,
        ranks: usize,
        dtype: DType,
        fp8_rows: bool,
    ) -> Result<u64, ModelError> {
        let (layout, tally) = (self.parallel.layout(spec, Rank(0), ranks)?, Tally::new(dtype, fp8_rows));
        let rooms = Rooms::allocate(&tally, spec, layout.in_group(), self)?;
        for layer in &spec.layers {
            rooms.reserve_kept(&tally, &layer.attention, self)?;
        }
        groups(&tally, spec, &layout, self.max_tokens)?;
        experts::reserve(&tally, spec, &layout, self)?;
        StepBuffers::allocate(&tally, spec, self, &layout, &rooms)?;
        Ok(tally.bytes())
    }
}

/// Whether layers norm what their parts give.
fn is_sandwich(spec: &ModelSpec) -> bool {
    spec.layers.iter().any(|layer| layer.sandwich)
}

/// Whether what experts give is added behind the next layer.
fn is_late(spec: &ModelSpec) -> bool {
    spec.layers.iter().any(|layer| layer.late_experts)
}

/// Most numbers that an element of the inner width of a dense MLP is made of by an operation of its own.
fn most_factors(spec: &ModelSpec) -> usize {
    let activations = spec.layers.iter().map(|layer| match &layer.mlp {
        MlpSpec::Dense { activation, .. } => *activation,
        MlpSpec::Moe(moe) if layer.residual_mlp.is_some() => moe.activation,
        _ => None,
    });
    activations.flatten().map(|activation| activation.factors()).max().unwrap_or(0)
}

/// The widest dense MLP of any layer.
fn widest_dense(spec: &ModelSpec) -> usize {
    let widths = spec.layers.iter().flat_map(|layer| {
        let dense = match layer.mlp {
            MlpSpec::Dense { inner, .. } => Some(inner),
            MlpSpec::Absent | MlpSpec::Moe(_) => None,
        };
        dense.into_iter().chain(layer.residual_mlp)
    });
    widths.max().unwrap_or(0)
}
