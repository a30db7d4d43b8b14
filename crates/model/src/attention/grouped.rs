//! Grouped-query attention (arXiv 2305.13245): several query heads share a key and a value head.

use super::{Context, Heads, Linear};
use crate::load::Loader;
use crate::{GroupedSpec, LayerPart, ModelError, QkNorm};
use epsmoe_base::Layer;
use epsmoe_device::op::Clamp;
use epsmoe_device::{Backend, Buffer, DeviceError, Weight};

pub(crate) struct Grouped {
    spec: GroupedSpec,
    query: Linear,
    key: Linear,
    value: Linear,
    /// Of queries and of keys.
    norms: Option<[Weight; 2]>,
    output: Linear,
    /// `[slots, kv_heads · head_dim]`.
    cached_keys: Buffer,
    cached_values: Buffer,
    room: Room,
}

/// What is computed in between, for all tokens of a step.
#[derive(Clone)]
pub(super) struct Room {
    query: Buffer,
    key: Buffer,
    value: Buffer,
    normed_query: Buffer,
    normed_key: Buffer,
    context: Buffer,
}

impl Room {
    pub(super) fn allocate<B: Backend>(
        device: &B,
        spec: &GroupedSpec,
        tokens: usize,
    ) -> Result<Self, DeviceError> {
        let reserve = |name, width| device.allocate(name, device.dtype(), tokens, width);
        let (queries, keys) = (spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim);
        let normed = |width| if spec.qk_norm.is_some() { width } else { 0 };
        Ok(Room {
            query: reserve("query", queries)?,
            key: reserve("key", keys)?,
            value: reserve("value", keys)?,
            normed_query: reserve("normed_query", normed(queries))?,
            normed_key: reserve("normed_key", normed(keys))?,
            context: reserve("context", queries)?,
        })
    }
}

impl Grouped {
    pub(super) fn load<B: Backend>(
        loader: &Loader<'_, B>,
        layer: Layer,
        spec: GroupedSpec,
        room: &Room,
        slots: usize,
    ) -> Result<Self, ModelError> {
        let linear = |weight, bias: LayerPart, biased: bool| {
            Linear::load(loader, layer, weight, biased.then_some(bias))
        };
        let norms = |_| -> Result<_, ModelError> {
            Ok([loader.layer(layer, LayerPart::QueryNorm)?, loader.layer(layer, LayerPart::KeyNorm)?])
        };
        let width = spec.kv_heads * spec.head_dim;
        let cache = |name| loader.device.allocate(name, loader.device.dtype(), slots, width);
        Ok(Grouped {
            spec,
            query: linear(LayerPart::Query, LayerPart::QueryBias, spec.qkv_bias)?,
            key: linear(LayerPart::Key, LayerPart::KeyBias, spec.qkv_bias)?,
            value: linear(LayerPart::Value, LayerPart::ValueBias, spec.qkv_bias)?,
            norms: spec.qk_norm.map(norms).transpose()?,
            output: linear(LayerPart::Output, LayerPart::OutputBias, spec.output_bias)?,
            cached_keys: cache("cached_keys")?,
            cached_values: cache("cached_values")?,
            room: room.clone(),
        })
    }

    pub(super) fn run<B: Backend>(
        &self,
        cx: &Context<'_, B>,
        x: &Buffer,
        out: &Buffer,
    ) -> Result<(), DeviceError> {
        let (spec, tokens) = (&self.spec, 0..x.rows);
        let mut query = self.room.query.rows(tokens.clone())?;
        let mut key = self.room.key.rows(tokens.clone())?;
        let value = self.room.value.rows(tokens.clone())?;
        cx.linear(x, &self.query, &query)?;
        cx.linear(x, &self.key, &key)?;
        cx.linear(x, &self.value, &value)?;
        if let Some([query_norm, key_norm]) = &self.norms {
            query = self.norm_heads(cx, &query, query_norm, self.room.normed_query.rows(tokens.clone())?)?;
            key = self.norm_heads(cx, &key, key_norm, self.room.normed_key.rows(tokens.clone())?)?;
        }
        if let Some(limit) = spec.clip_qkv {
            for x in [&query, &key, &value] {
                cx.compute(Clamp { x: x.clone(), limit })?;
            }
        }
        cx.rotate(&query, spec.head_dim, 0)?;
        cx.rotate(&key, spec.head_dim, 0)?;
        cx.store(&key, &self.cached_keys)?;
        cx.store(&value, &self.cached_values)?;
        let context = self.room.context.rows(tokens)?;
        let GroupedSpec { heads, kv_heads, scale, sliding_window: window, .. } = *spec;
        let heads = Heads { heads, kv_heads, scale, window };
        cx.attend(heads, &query, &self.cached_keys, &self.cached_values, &context)?;
        cx.linear(&context, &self.output, out)
    }

    /// The norm of queries or keys, each head by itself or all of a token together.
    fn norm_heads<B: Backend>(
        &self,
        cx: &Context<'_, B>,
        x: &Buffer,
        weight: &Weight,
        out: Buffer,
    ) -> Result<Buffer, DeviceError> {
        let width = match self.spec.qk_norm {
            Some(QkNorm::PerHead) => self.spec.head_dim,
            _ => x.width,
        };
        cx.norm(&x.reshape(width)?, weight, cx.eps, &out.reshape(width)?)?;
        Ok(out)
    }
}
