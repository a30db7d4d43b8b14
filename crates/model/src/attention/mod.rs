//! Attention: normed rows in, what is added to the residual out. Both kinds end in one operation over a paged
//! cache, whose blocks the engine hands out; the bytes are here.

mod gqa;
mod mla;

use crate::forward::ModelOptions;
use crate::load::Loader;
use crate::step::{Queries, Step};
use crate::{AttentionSpec, LayerPart, MlaSpec, ModelError, Window};
use epsmoe_base::{Lane, Layer, Place};
use epsmoe_device::op::{self, Gather, Gemm, KvWrite, NormKind, Op, RopeStyle, Rotate};
use epsmoe_device::{Backend, Buffer, DeviceError, Weight};
use gqa::Gqa;
use mla::Mla;
use std::ops::Range;

/// Tokens in a block of the cache.
pub const BLOCK_SIZE: usize = 64;

/// The attention of one layer: the weights and the cache of this rank's heads.
pub(crate) enum Attention {
    Gqa(Gqa),
    Mla(Mla),
}

impl Attention {
    /// The attention of every layer. The workspace for what is computed in between is shared by all of them.
    pub(crate) fn load<B: Backend>(
        loader: &Loader<'_, B>,
        options: &ModelOptions,
    ) -> Result<Vec<Self>, ModelError> {
        let layers = (0..loader.spec.layers.len()).map(Layer);
        let slots = options.cache_blocks * BLOCK_SIZE;
        match &loader.spec.attention {
            AttentionSpec::Gqa(spec) => {
                let own = gqa::OwnHeads::of(spec, loader.layout.in_group());
                let workspace =
                    gqa::Workspace::allocate(loader.device, &own, loader.spec.hidden, options.max_tokens)?;
                let load = |layer| Gqa::load(loader, layer, &own, &workspace, slots).map(Attention::Gqa);
                layers.map(load).collect()
            }
            AttentionSpec::Mla(spec) => {
                let heads = loader.layout.in_group().of(spec.heads);
                let own = MlaSpec { heads: heads.len(), ..*spec };
                let workspace =
                    mla::Workspace::allocate(loader.device, &own, loader.spec.hidden, options.max_tokens)?;
                let load = |layer| {
                    Mla::load(loader, layer, own, heads.clone(), &workspace, slots).map(Attention::Mla)
                };
                layers.map(load).collect()
            }
        }
    }

    /// `out = attention(x)` for `x` `[T, H]` and `out` `[Q, H]`, one row for each query: of this rank's heads, to be
    /// added over its group.
    pub(crate) fn run<B: Backend>(
        &self,
        context: &Context<'_, B>,
        x: &Buffer,
        out: &Buffer,
    ) -> Result<(), DeviceError> {
        match self {
            Attention::Gqa(attention) => attention.run(context, x, out),
            Attention::Mla(attention) => attention.run(context, x, out),
        }
    }
}

/// A linear map with its bias, if it has one.
struct Linear {
    weight: Weight,
    bias: Option<Weight>,
}

impl Linear {
    /// A window of a map, with the same rows of its bias.
    fn load<B: Backend>(
        loader: &Loader<'_, B>,
        layer: Layer,
        weight: LayerPart,
        bias: Option<LayerPart>,
        window: &Window,
    ) -> Result<Self, ModelError> {
        let rows = Window { rows: window.rows.clone(), columns: None };
        let bias = bias.map(|bias| loader.window(bias.of(layer), &rows)).transpose()?;
        Ok(Linear { weight: loader.window(weight.of(layer), window)?, bias })
    }

    /// The columns of the output projection that meet this rank's heads. Their products are added over the
    /// group, to which only its first rank adds the bias.
    fn load_output<B: Backend>(
        loader: &Loader<'_, B>,
        layer: Layer,
        biased: bool,
        columns: Range<usize>,
    ) -> Result<Self, ModelError> {
        let biased = biased && loader.layout.in_group().index == 0;
        let bias = biased.then_some(LayerPart::OutputBias);
        Linear::load(loader, layer, LayerPart::Output, bias, &Window::columns(columns))
    }
}

/// What attention shares with the rest of its layer.
pub(crate) struct Context<'a, B> {
    pub(crate) device: &'a B,
    pub(crate) place: Place,
    pub(crate) step: &'a Step,
    /// The tokens that attention is computed for; all of the step store keys and values.
    pub(crate) queries: &'a Queries,
    pub(crate) rope: RopeStyle,
    /// Epsilon of the model's norms.
    pub(crate) eps: f32,
}

/// What the attention operation varies in.
struct Heads {
    heads: usize,
    kv_heads: usize,
    scale: f32,
    window: Option<usize>,
    sinks: Option<Weight>,
}

impl<B: Backend> Context<'_, B> {
    fn linear(&self, x: &Buffer, linear: &Linear, out: &Buffer) -> Result<(), DeviceError> {
        let product = Gemm::linear(x.clone(), &linear.weight, out.clone());
        self.compute(Gemm { bias: linear.bias.clone(), ..product })
    }

    fn norm(&self, x: &Buffer, weight: &Weight, eps: f32, out: &Buffer) -> Result<(), DeviceError> {
        let (x, weight, out) = (x.clone(), weight.clone(), out.clone());
        self.compute(op::Norm { kind: NormKind::Rms, x, weight, eps, out, origin: None })
    }

    /// The rows of `x` whose queries are computed, in `room` if they are not all.
    fn queries_of(&self, x: &Buffer, room: &Buffer) -> Result<Buffer, DeviceError> {
        let Some(index) = &self.queries.index else { return Ok(x.clone()) };
        let out = room.rows(0..index.rows)?;
        self.compute(Gather { x: x.clone(), index: index.clone(), out: out.clone() })?;
        Ok(out)
    }

    /// Turns the elements from `start` on of every head of these tokens.
    fn rotate(
        &self,
        tokens: &Queries,
        x: &Buffer,
        head_width: usize,
        start: usize,
    ) -> Result<(), DeviceError> {
        let rope_table = tokens.rope_table.clone();
        self.compute(Rotate { x: x.clone(), head_width, start, style: self.rope, rope_table })
    }

    fn store(&self, x: &Buffer, cache: &Buffer) -> Result<(), DeviceError> {
        self.compute(KvWrite { x: x.clone(), slots: self.step.slots.clone(), cache: cache.clone() })
    }

    fn attend(
        &self,
        heads: Heads,
        q: &Buffer,
        keys: &Buffer,
        values: &Buffer,
        out: &Buffer,
    ) -> Result<(), DeviceError> {
        let Heads { heads, kv_heads, scale, window, sinks } = heads;
        self.compute(op::Attention {
            q: q.clone(),
            keys: keys.clone(),
            values: values.clone(),
            sequence_starts: self.queries.sequence_starts.clone(),
            positions: self.queries.positions.clone(),
            blocks: self.step.blocks.clone(),
            block_size: BLOCK_SIZE,
            longest: self.step.longest,
            heads,
            kv_heads,
            scale,
            window,
            sinks,
            out: out.clone(),
        })
    }

    fn compute(&self, op: impl Into<Op>) -> Result<(), DeviceError> {
        self.device.enqueue(Lane::Compute, self.place, op)
    }
}

/// The elements of the heads in `heads`, each `width` wide.
fn blocks(heads: &Range<usize>, width: usize) -> Range<usize> {
    heads.start * width..heads.end * width
}
