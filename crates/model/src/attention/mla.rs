//! Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1). A token leaves one row in the cache: a normed
//! latent `c` and a rotated key that all heads share. Per head, keys and values are `KeyUp·c` and `ValueUp·c`.
//!
//! Queries of a prompt may look at these: the context's rows are *decompressed*, some heads at a time, and forgotten again.
//! Queries of generated tokens, which are few, and all where [prompts are not decompressed](ModelOptions::decompress_prompts), do
//! without:
//!
//! `q·(KeyUp·c) = (KeyUpᵀ·q)·c`   and   `Σ p·(ValueUp·c) = ValueUp·(Σ p·c)`,
//!
//! so every head attends to the cached rows themselves, with the latent part as the value: the *absorbed* form. Which form a
//! token has depends on where it is from alone: `docs/bits.md`. Ranks that split the heads have the maps into
//! latents and the cache in common, whole.

use super::{BLOCK_SIZE, Cached, Context, Heads, Linear, Slots, blocks};
use crate::forward::ModelOptions;
use crate::load::Loader;
use crate::origins::{Round, RoundRoom, Span};
use crate::{LayerPart, MlaSpec, ModelError, Window};
use epsmoe_base::{DType, Layer};
use epsmoe_device::op::{Copy, Epilogue, Gather, Gemm, GemmPart, Sight};
use epsmoe_device::{Backend, Buffer, DeviceError, Reserve, Weight};
use std::ops::Range;

pub(crate) struct Mla {
    /// With the heads of this rank.
    spec: MlaSpec,
    /// Into the query latent, and its norm, if queries have one.
    query_down: Option<(Linear, Weight)>,
    /// `[heads · (nope + rope), …]`, of the latent or of the input.
    query: Linear,
    kv_down: Linear,
    kv_norm: Weight,
    heads: Vec<Head>,
    /// What decompresses: of some heads each, in order.
    decompressing: Vec<Decompressing>,
    output: Linear,
    /// `[slots, kv_lora + rope]`.
    cache: Cached,
    workspace: Workspace,
}

struct Head {
    /// `KeyUpᵀ` `[kv_lora, nope]`.
    keys: Weight,
    /// `ValueUp` `[value, kv_lora]`.
    values: Weight,
}

/// Maps from cached rows to the keys and values of some heads.
struct Decompressing {
    heads: Range<usize>,
    /// `[heads · (nope + rope), kv_lora + rope]`.
    keys: Weight,
    /// `[heads · value, kv_lora]`.
    values: Weight,
}

/// What is computed in between, for all tokens of a step.
#[derive(Clone)]
pub(super) struct Workspace {
    /// Rows of the input whose queries are computed.
    input: Buffer,
    /// What is normed next is not rounded before: float32.
    query_latent: Buffer,
    query_normed: Buffer,
    query: Buffer,
    /// Latent and key, float32 too.
    kv: Buffer,
    row: Buffer,
    /// Queries in terms of the cached row `[T, heads · (kv_lora + rope)]`.
    absorbed: Buffer,
    /// Weighted latents `[T, heads · kv_lora]`.
    attended: Buffer,
    context: Buffer,
    /// The cached rows of a round's contexts `[N, kv_lora + rope]`.
    latents: Buffer,
    /// Their keys and values, of some heads at a time: `[P, nope + rope]` and `[P, value]`.
    keys: Buffer,
    values: Buffer,
    room: RoundRoom,
}

impl Workspace {
    pub(super) fn allocate(
        device: &impl Reserve,
        spec: &MlaSpec,
        hidden: usize,
        options: &ModelOptions,
    ) -> Result<Self, DeviceError> {
        let tokens = options.max_tokens;
        let room = match options.decompress_prompts {
            true => RoundRoom::of(spec.heads, options.max_sequences, options.max_blocks),
            false => RoundRoom::NONE,
        };
        let reserve = |name, width| device.allocate(name, device.dtype(), tokens, width);
        let reserve_rows = |name, rows, width| device.allocate(name, device.dtype(), rows, width);
        let floats = |name, width| device.allocate(name, DType::F32, tokens, width);
        let (query_latent, row) = (spec.q_lora.unwrap_or(0), spec.kv_lora + spec.rope);
        Ok(Workspace {
            input: reserve("query_input", hidden)?,
            query_latent: floats("query_latent", query_latent)?,
            query_normed: reserve("query_normed", query_latent)?,
            query: reserve("query", spec.heads * (spec.nope + spec.rope))?,
            kv: floats("kv", row)?,
            row: reserve("cache_row", row)?,
            absorbed: reserve("absorbed", spec.heads * row)?,
            attended: reserve("attended", spec.heads * spec.kv_lora)?,
            context: reserve("context", spec.heads * spec.value)?,
            latents: reserve_rows("latents", room.positions, row)?,
            keys: reserve_rows("decompressed_keys", room.pairs, spec.nope + spec.rope)?,
            values: reserve_rows("decompressed_values", room.pairs, spec.value)?,
            room,
        })
    }

    /// The widest rows beside those of the model that a map is multiplied with.
    pub(super) fn widest(&self) -> usize {
        self.query_normed.width.max(self.context.width)
    }

    /// For that many tokens, of which some have queries.
    fn first(&self, tokens: usize, queries: usize) -> Result<Workspace, DeviceError> {
        Ok(Workspace {
            input: self.input.clone(),
            query_latent: self.query_latent.rows(0..queries)?,
            query_normed: self.query_normed.rows(0..queries)?,
            query: self.query.rows(0..queries)?,
            kv: self.kv.rows(0..tokens)?,
            row: self.row.rows(0..tokens)?,
            absorbed: self.absorbed.rows(0..queries)?,
            attended: self.attended.rows(0..queries)?,
            context: self.context.rows(0..queries)?,
            ..self.clone()
        })
    }
}

/// Latents of so many tokens.
pub(super) fn cache(device: &impl Reserve, spec: &MlaSpec, slots: &Slots) -> Result<Buffer, DeviceError> {
    slots.reserve(device, "cached_latents", spec.kv_lora + spec.rope)
}

impl Mla {
    pub(super) fn load<B: Backend>(
        loader: &Loader<'_, B>,
        layer: Layer,
        spec: MlaSpec,
        heads: Range<usize>,
        workspace: &Workspace,
        cache: Buffer,
    ) -> Result<Self, ModelError> {
        let linear = |weight, bias: LayerPart| {
            Linear::load(loader, layer, weight, spec.bias.then_some(bias), &Window::whole())
        };
        let down = |_| -> Result<_, ModelError> {
            let norm = loader.layer(layer, LayerPart::QueryDownNorm)?;
            Ok((linear(LayerPart::QueryDown, LayerPart::QueryDownBias)?, norm))
        };
        let query = if spec.q_lora.is_some() { LayerPart::QueryUp } else { LayerPart::Query };
        let query_rows = Window::rows(blocks(&heads, spec.nope + spec.rope));
        Ok(Mla {
            query_down: spec.q_lora.map(down).transpose()?,
            query: Linear::load(loader, layer, query, None, &query_rows)?,
            kv_down: linear(LayerPart::KvDown, LayerPart::KvDownBias)?,
            kv_norm: loader.scaled(LayerPart::KvDownNorm.of(layer), spec.latent_scale)?,
            output: Linear::load_output(loader, layer, spec.bias, blocks(&heads, spec.value))?,
            decompressing: match workspace.room {
                RoundRoom::NONE => Vec::new(),
                room => Decompressing::load(loader, layer, &spec, &heads, room.together)?,
            },
            heads: heads
                .map(|head| Head::load(loader, layer, head, workspace.room))
                .collect::<Result<_, _>>()?,
            cache: Cached::of(loader, LayerPart::KvDown.of(layer), 'k', cache)?,
            workspace: workspace.clone(),
            spec,
        })
    }

    /// The maps of what it reads.
    pub(super) fn maps_of_input(&self) -> impl Iterator<Item = &Linear> {
        let query = self.query_down.as_ref().map_or(&self.query, |(down, _)| down);
        [query, &self.kv_down].into_iter()
    }

    pub(super) fn run<B: Backend>(
        &self,
        cx: &Context<'_, B>,
        x: &Buffer,
        out: &Buffer,
    ) -> Result<(), DeviceError> {
        let workspace = self.workspace.first(x.rows, out.rows)?;
        self.project(cx, x, &workspace)?;
        self.cache_rows(cx, &workspace)?;
        let MlaSpec { nope, rope, .. } = self.spec;
        cx.rotate(cx.queries, &workspace.query, nope + rope, nope)?;
        let origins = cx.queries.origins.as_ref();
        if let Some(span) = origins.and_then(|origins| origins.absorbed.as_ref()) {
            self.attend_absorbed(cx, span, &workspace)?;
        }
        for round in origins.iter().flat_map(|origins| &origins.rounds) {
            self.attend_decompressed(cx, round, &workspace)?;
        }
        cx.linear(&workspace.context, &self.output, out)
    }

    /// Queries, and what the cached rows are made of.
    fn project<B: Backend>(
        &self,
        cx: &Context<'_, B>,
        x: &Buffer,
        workspace: &Workspace,
    ) -> Result<(), DeviceError> {
        let others = [(&self.kv_down, &workspace.kv)];
        let (room, queries) = (&workspace.input, &workspace.query);
        let Some((down, norm)) = &self.query_down else {
            return cx.linears_of_queries(x, room, (&self.query, queries), &others);
        };
        cx.linears_of_queries(x, room, (down, &workspace.query_latent), &others)?;
        let normed = (norm, self.spec.inner_eps, &workspace.query_normed);
        cx.linear_of_norm(&workspace.query_latent, normed, &self.query, queries)
    }

    /// The normed latent, then the rotated key.
    fn cache_rows<B: Backend>(&self, cx: &Context<'_, B>, workspace: &Workspace) -> Result<(), DeviceError> {
        let (latent, width) = (self.spec.kv_lora, self.spec.kv_lora + self.spec.rope);
        let (normed, key) = (workspace.row.columns(0..latent)?, workspace.row.columns(latent..width)?);
        cx.norm(&workspace.kv.columns(0..latent)?, &self.kv_norm, self.spec.inner_eps, &normed)?;
        cx.compute(Copy { x: workspace.kv.columns(latent..width)?, out: key })?;
        cx.rotate(&cx.step.all.queries, &workspace.row, width, latent)?;
        cx.store(&[(&workspace.row, &self.cache)])
    }

    /// Queries in terms of the cached rows, which are keys, and in front of them values.
    fn attend_absorbed<B: Backend>(
        &self,
        cx: &Context<'_, B>,
        span: &Span,
        workspace: &Workspace,
    ) -> Result<(), DeviceError> {
        let MlaSpec { heads, kv_lora, nope, rope, scale, value, .. } = self.spec;
        let width = kv_lora + rope;
        let of_span = |buffer: &Buffer| buffer.rows(span.rows.clone());
        let (query, absorbed) = (of_span(&workspace.query)?, of_span(&workspace.absorbed)?);
        let (attended, context) = (of_span(&workspace.attended)?, of_span(&workspace.context)?);
        self.per_head(cx, |head, weights| {
            let unrotated = query.columns(block(head, nope + rope))?.columns(0..nope)?;
            let absorbed = absorbed.columns(block(head, width))?.columns(0..kv_lora)?;
            Ok((unrotated, weights.keys.clone(), absorbed))
        })?;
        let rotated = query.reshape(nope + rope)?.columns(nope..nope + rope)?;
        let behind = absorbed.reshape(width)?.columns(kv_lora..width)?;
        cx.compute(Copy { x: rotated, out: behind })?;
        let attention = Heads { heads, kv_heads: 1, scale, sight: Sight::All, sinks: None };
        let latents = Cached { rows: self.cache.rows.columns(0..kv_lora)?, scale: self.cache.scale };
        cx.attend_in(span, attention, &absorbed, &self.cache, &latents, &attended)?;
        self.per_head(cx, |head, weights| {
            let (latent, value) = (block(head, kv_lora), block(head, value));
            Ok((attended.columns(latent)?, weights.values.clone(), context.columns(value)?))
        })
    }

    /// Queries and decompressed contexts, as many heads at a time as there is room for.
    fn attend_decompressed<B: Backend>(
        &self,
        cx: &Context<'_, B>,
        round: &Round,
        workspace: &Workspace,
    ) -> Result<(), DeviceError> {
        let MlaSpec { kv_lora, nope, rope, scale, value, .. } = self.spec;
        let latents = workspace.latents.rows(0..round.cached.rows * BLOCK_SIZE)?;
        let in_blocks = |rows: &Buffer| rows.reshape(BLOCK_SIZE * (kv_lora + rope));
        let (x, out) = (in_blocks(&self.cache.rows)?, in_blocks(&latents)?);
        cx.compute(Gather { x, index: round.cached.clone(), out })?;
        let together = workspace.room.products(latents.rows);
        let turns = self.decompressing.len().div_ceil(together);
        for maps in self.decompressing.chunks(self.decompressing.len().div_ceil(turns)) {
            let heads = maps[0].heads.start..maps[maps.len() - 1].heads.end;
            let (keys, values) = self.decompress(cx, maps, &latents, workspace)?;
            // What is linear in the rows is short of the same factor.
            let [keys, values] = [keys, values].map(|rows| Cached { rows, scale: self.cache.scale });
            let of_heads =
                |buffer: &Buffer, width| buffer.rows(round.span.rows.clone())?.columns(blocks(&heads, width));
            let query = of_heads(&workspace.query, nope + rope)?;
            let context = of_heads(&workspace.context, value)?;
            let count = heads.len();
            let attention = Heads { heads: count, kv_heads: count, scale, sight: Sight::All, sinks: None };
            cx.attend_in(&round.span, attention, &query, &keys, &values, &context)?;
        }
        Ok(())
    }

    /// Keys `[N, heads · (nope + rope)]` and values `[N, heads · value]` of cached rows.
    fn decompress<B: Backend>(
        &self,
        cx: &Context<'_, B>,
        maps: &[Decompressing],
        latents: &Buffer,
        workspace: &Workspace,
    ) -> Result<(Buffer, Buffer), DeviceError> {
        let (key, value) = (self.spec.nope + self.spec.rope, self.spec.value);
        let heads = maps[0].heads.start..maps[maps.len() - 1].heads.end;
        let pairs = 0..latents.rows * heads.len();
        let keys = workspace.keys.rows(pairs.clone())?.reshape(heads.len() * key)?;
        let values = workspace.values.rows(pairs)?.reshape(heads.len() * value)?;
        let normed = latents.columns(0..self.spec.kv_lora)?;
        for map in maps {
            let own = map.heads.start - heads.start..map.heads.end - heads.start;
            let (keys, values) = (keys.columns(blocks(&own, key))?, values.columns(blocks(&own, value))?);
            cx.compute(Gemm::linear(latents.clone(), &map.keys, keys))?;
            cx.compute(Gemm::linear(normed.clone(), &map.values, values))?;
        }
        Ok((keys, values))
    }

    /// One product per head, all in one operation.
    fn per_head<B: Backend>(
        &self,
        cx: &Context<'_, B>,
        part: impl Fn(usize, &Head) -> Result<(Buffer, Weight, Buffer), DeviceError>,
    ) -> Result<(), DeviceError> {
        let parts = self.heads.iter().enumerate().map(|(head, weights)| {
            let (x, weight, out) = part(head, weights)?;
            Ok(GemmPart { x, weight, bias: None, out })
        });
        let parts = parts.collect::<Result<_, DeviceError>>()?;
        cx.compute(Gemm { parts, epilogue: Epilogue::Store })
    }
}

impl Decompressing {
    /// For the heads `heads` of the model, which are this rank's, some together.
    fn load<B: Backend>(
        loader: &Loader<'_, B>,
        layer: Layer,
        spec: &MlaSpec,
        heads: &Range<usize>,
        together: usize,
    ) -> Result<Vec<Self>, ModelError> {
        let some = |first: usize| {
            let of_model = first..heads.end.min(first + together);
            Ok(Decompressing {
                keys: loader.keys_of_rows(layer, spec, &of_model)?,
                values: loader.values_of_latents(layer, spec, &of_model)?,
                heads: of_model.start - heads.start..of_model.end - heads.start,
            })
        };
        heads.clone().step_by(together).map(some).collect()
    }
}

impl Head {
    fn load<B: Backend>(
        loader: &Loader<'_, B>,
        layer: Layer,
        head: usize,
        room: RoundRoom,
    ) -> Result<Self, ModelError> {
        let values = LayerPart::ValueUp(head).of(layer);
        Ok(Head {
            keys: loader.transposed(LayerPart::KeyUp(head).of(layer))?,
            // Of few rows of codes a GPU would be busy with decoding; what is decompressed lies there decoded too.
            values: if room == RoundRoom::NONE { loader.part(values)? } else { loader.decoded(values)? },
        })
    }
}

/// The `index`-th run of `width` elements.
fn block(index: usize, width: usize) -> Range<usize> {
    blocks(&(index..index + 1), width)
}
