//! Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1) in its absorbed form, for prefill and
//! decode alike, so that cached decoding has the bits of recomputation.
//!
//! A token leaves one row in the cache: a normed latent `c` and a rotated key that all heads share. Per head,
//! keys and values are `KeyUp·c` and `ValueUp·c`, which need not be formed:
//!
//! `q·(KeyUp·c) = (KeyUpᵀ·q)·c`   and   `Σ p·(ValueUp·c) = ValueUp·(Σ p·c)`,
//!
//! so every head attends to the cached rows themselves, with the latent part as the value. Ranks that split the
//! heads have the maps into latents and the cache in common, whole.

use super::{Context, Heads, Linear, blocks};
use crate::load::Loader;
use crate::{LayerPart, MlaSpec, ModelError, Window};
use epsmoe_base::{DType, Layer};
use epsmoe_device::op::{Copy, Epilogue, Gemm, GemmPart};
use epsmoe_device::{Backend, Buffer, DeviceError, Weight};
use std::ops::Range;

pub(crate) struct Mla {
    /// With the heads of this rank.
    spec: MlaSpec,
    /// Into the query latent, and its norm, if queries have one.
    query_down: Option<(Linear, Weight)>,
    /// `[heads · (nope + rope), …]`.
    query: Weight,
    kv_down: Linear,
    kv_norm: Weight,
    heads: Vec<Head>,
    output: Linear,
    /// `[slots, kv_lora + rope]`.
    cache: Buffer,
    workspace: Workspace,
}

struct Head {
    /// `KeyUpᵀ` `[kv_lora, nope]`.
    keys: Weight,
    /// `ValueUp` `[value, kv_lora]`.
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
}

impl Workspace {
    pub(super) fn allocate<B: Backend>(
        device: &B,
        spec: &MlaSpec,
        hidden: usize,
        tokens: usize,
    ) -> Result<Self, DeviceError> {
        let reserve = |name, width| device.allocate(name, device.dtype(), tokens, width);
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
        })
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
        })
    }
}

impl Mla {
    pub(super) fn load<B: Backend>(
        loader: &Loader<'_, B>,
        layer: Layer,
        spec: MlaSpec,
        heads: Range<usize>,
        workspace: &Workspace,
        slots: usize,
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
        let width = spec.kv_lora + spec.rope;
        Ok(Mla {
            query_down: spec.q_lora.map(down).transpose()?,
            query: loader.window(query.of(layer), &query_rows)?,
            kv_down: linear(LayerPart::KvDown, LayerPart::KvDownBias)?,
            kv_norm: loader.layer(layer, LayerPart::KvDownNorm)?,
            output: Linear::load_output(loader, layer, spec.bias, blocks(&heads, spec.value))?,
            heads: heads.map(|head| Head::load(loader, layer, head)).collect::<Result<_, _>>()?,
            cache: loader.device.allocate("cached_latents", loader.device.dtype(), slots, width)?,
            workspace: workspace.clone(),
            spec,
        })
    }

    pub(super) fn run<B: Backend>(
        &self,
        cx: &Context<'_, B>,
        x: &Buffer,
        out: &Buffer,
    ) -> Result<(), DeviceError> {
        let workspace = self.workspace.first(x.rows, out.rows)?;
        self.project_queries(cx, &cx.queries_of(x, &workspace.input)?, &workspace)?;
        self.cache_rows(cx, x, &workspace)?;
        self.absorb_queries(cx, &workspace)?;
        let MlaSpec { heads, kv_lora, scale, value, .. } = self.spec;
        let latents = self.cache.columns(0..kv_lora)?;
        let attention = Heads { heads, kv_heads: 1, scale, window: None, sinks: None };
        cx.attend(attention, &workspace.absorbed, &self.cache, &latents, &workspace.attended)?;
        self.per_head(cx, |head, weights| {
            let (latent, value) = (block(head, kv_lora), block(head, value));
            Ok((
                workspace.attended.columns(latent)?,
                weights.values.clone(),
                workspace.context.columns(value)?,
            ))
        })?;
        cx.linear(&workspace.context, &self.output, out)
    }

    fn project_queries<B: Backend>(
        &self,
        cx: &Context<'_, B>,
        x: &Buffer,
        workspace: &Workspace,
    ) -> Result<(), DeviceError> {
        let Some((down, norm)) = &self.query_down else {
            return cx.compute(Gemm::linear(x.clone(), &self.query, workspace.query.clone()));
        };
        cx.linear(x, down, &workspace.query_latent)?;
        cx.norm(&workspace.query_latent, norm, self.spec.inner_eps, &workspace.query_normed)?;
        cx.compute(Gemm::linear(workspace.query_normed.clone(), &self.query, workspace.query.clone()))
    }

    /// The normed latent, then the rotated key.
    fn cache_rows<B: Backend>(
        &self,
        cx: &Context<'_, B>,
        x: &Buffer,
        workspace: &Workspace,
    ) -> Result<(), DeviceError> {
        let (latent, width) = (self.spec.kv_lora, self.spec.kv_lora + self.spec.rope);
        cx.linear(x, &self.kv_down, &workspace.kv)?;
        let (normed, key) = (workspace.row.columns(0..latent)?, workspace.row.columns(latent..width)?);
        cx.norm(&workspace.kv.columns(0..latent)?, &self.kv_norm, self.spec.inner_eps, &normed)?;
        cx.compute(Copy { x: workspace.kv.columns(latent..width)?, out: key })?;
        cx.rotate(&cx.step.all.queries, &workspace.row, width, latent)?;
        cx.store(&workspace.row, &self.cache)
    }

    /// Per head, `KeyUpᵀ` times the unrotated part of the query, then the rotated part.
    fn absorb_queries<B: Backend>(
        &self,
        cx: &Context<'_, B>,
        workspace: &Workspace,
    ) -> Result<(), DeviceError> {
        let MlaSpec { kv_lora, nope, rope, .. } = self.spec;
        let width = kv_lora + rope;
        self.per_head(cx, |head, weights| {
            let unrotated = workspace.query.columns(block(head, nope + rope))?.columns(0..nope)?;
            let absorbed = workspace.absorbed.columns(block(head, width))?.columns(0..kv_lora)?;
            Ok((unrotated, weights.keys.clone(), absorbed))
        })?;
        let rotated = workspace.query.reshape(nope + rope)?.columns(nope..nope + rope)?;
        let behind = workspace.absorbed.reshape(width)?.columns(kv_lora..width)?;
        cx.compute(Copy { x: rotated, out: behind })?;
        cx.rotate(cx.queries, &workspace.absorbed, width, kv_lora)
    }

    /// One product per head, all in one operation.
    fn per_head<B: Backend>(
        &self,
        cx: &Context<'_, B>,
        part: impl Fn(usize, &Head) -> Result<(Buffer, Weight, Buffer), DeviceError>,
    ) -> Result<(), DeviceError> {
        let parts = self.heads.iter().enumerate().map(|(head, weights)| {
            let (x, weight, out) = part(head, weights)?;
            Ok(GemmPart { x, weight, out })
        });
        let parts = parts.collect::<Result<_, DeviceError>>()?;
        cx.compute(Gemm { parts, bias: None, epilogue: Epilogue::Store })
    }
}

impl Head {
    fn load<B: Backend>(loader: &Loader<'_, B>, layer: Layer, head: usize) -> Result<Self, ModelError> {
        let keys = loader.transposed(LayerPart::KeyUp(head).of(layer))?;
        Ok(Head { keys, values: loader.layer(layer, LayerPart::ValueUp(head))? })
    }
}

/// The `index`-th run of `width` elements.
fn block(index: usize, width: usize) -> Range<usize> {
    blocks(&(index..index + 1), width)
}
