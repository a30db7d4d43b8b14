//! Grouped-query attention (arXiv 2305.13245): several query heads share a key and a value head.

use super::{Cached, Context, Heads, Linear, Slots, blocks};
use crate::load::Loader;
use crate::parallel::Share;
use crate::step::Queries;
use crate::{GqaSpec, LayerPart, ModelError, QkNorm, Window};
use epsmoe_base::Layer;
use epsmoe_device::op::{Clamp, Gate, Gating, NormRotate, Sight};
use epsmoe_device::{Backend, Buffer, DeviceError, Reserve, Weight};
use std::ops::Range;

pub(crate) struct Gqa {
    own: OwnHeads,
    query: Linear,
    key: Linear,
    /// Nothing where values are keys.
    value: Option<Linear>,
    /// Ones, where values are normed.
    value_norm: Option<Weight>,
    /// Of queries and of keys; ones, where the norm has no weights.
    norms: Option<[Weight; 2]>,
    /// Of this rank's heads.
    sinks: Option<Weight>,
    output: Linear,
    /// `[slots, kv_heads · head_dim]`.
    cached_keys: Cached,
    cached_values: Cached,
    sight: Sight,
    workspace: Workspace,
}

/// The heads of one rank.
///
/// Ranks take whole groups of query heads, each with the key head they share. With more ranks than key heads,
/// several ranks have the same key head and split its group. Six query heads over three key heads:
///
/// | ranks | query heads        | key heads |
/// |-------|--------------------|-----------|
/// | 2     | 0-1, 2-5           | 0, 1-2    |
/// | 4     | 0-1, 2-3, 4, 5     | 0, 1, 2, 2 |
#[derive(Clone)]
pub(super) struct OwnHeads {
    /// The attention of all ranks together.
    spec: GqaSpec,
    /// Query heads, and the key heads they look at.
    query: Range<usize>,
    kv: Range<usize>,
}

impl OwnHeads {
    pub(super) fn of(spec: &GqaSpec, share: Share) -> Self {
        let (heads, kv_heads) = (spec.heads, spec.kv_heads);
        let group = heads / kv_heads;
        if share.count <= kv_heads {
            let kv = share.of(kv_heads);
            return OwnHeads { spec: *spec, query: blocks(&kv, group), kv };
        }
        let ranks_of = |kv| Share { index: kv, count: kv_heads }.of(share.count);
        let kv = (0..kv_heads).find(|&kv| ranks_of(kv).contains(&share.index)).unwrap_or(0);
        let ranks = ranks_of(kv);
        let within = Share { index: share.index - ranks.start, count: ranks.len() }.of(group);
        let query = kv * group + within.start..kv * group + within.end;
        OwnHeads { spec: *spec, query, kv: kv..kv + 1 }
    }

    /// The heads whose queries and keys are projected here: all, where a norm spans all.
    fn projected(&self) -> (Range<usize>, Range<usize>) {
        match self.spec.qk_norm {
            Some(QkNorm::FullWidth) => (0..self.spec.heads, 0..self.spec.kv_heads),
            _ => (self.query.clone(), self.kv.clone()),
        }
    }

    /// Keys and values of so many tokens.
    pub(super) fn cache(&self, device: &impl Reserve, slots: &Slots) -> Result<[Buffer; 2], DeviceError> {
        let width = self.kv.len() * self.spec.head_dim;
        let cache = |name| slots.reserve(device, name, width);
        Ok([cache("cached_keys")?, cache("cached_values")?])
    }

    /// The elements of `heads`.
    fn elements(&self, heads: &Range<usize>) -> Range<usize> {
        blocks(heads, self.spec.head_dim)
    }

    /// The elements of `own` among those of the `projected` heads.
    fn among(&self, own: &Range<usize>, projected: &Range<usize>) -> Range<usize> {
        self.elements(&(own.start - projected.start..own.end - projected.start))
    }
}

/// What is computed in between, for all tokens of a step.
#[derive(Clone)]
pub(super) struct Workspace {
    /// Rows of the input whose queries are computed.
    input: Buffer,
    /// With the gates of its heads, if they have any.
    query: Buffer,
    key: Buffer,
    value: Buffer,
    normed_query: Buffer,
    normed_key: Buffer,
    normed_value: Buffer,
    context: Buffer,
}

impl Workspace {
    pub(super) fn allocate(
        device: &impl Reserve,
        own: &OwnHeads,
        hidden: usize,
        tokens: usize,
    ) -> Result<Self, DeviceError> {
        let reserve =
            |name, heads: usize| device.allocate(name, device.dtype(), tokens, heads * own.spec.head_dim);
        let (queries, keys) = own.projected();
        let normed = |heads: &Range<usize>| if own.spec.qk_norm.is_some() { heads.len() } else { 0 };
        Ok(Workspace {
            input: device.allocate("query_input", device.dtype(), tokens, hidden)?,
            query: device.allocate(
                "query",
                device.dtype(),
                tokens,
                queries.len() * own.spec.query_rows_of_head(),
            )?,
            key: reserve("key", keys.len())?,
            value: reserve("value", own.kv.len())?,
            normed_query: reserve("normed_query", normed(&queries))?,
            normed_key: reserve("normed_key", normed(&keys))?,
            normed_value: reserve("normed_value", if own.spec.value_norm { own.kv.len() } else { 0 })?,
            context: reserve("context", own.query.len())?,
        })
    }

    /// The widest rows beside those of the model that a map is multiplied with.
    pub(super) fn widest(&self) -> usize {
        self.context.width
    }
}

impl Gqa {
    pub(super) fn load<B: Backend>(
        loader: &Loader<'_, B>,
        layer: Layer,
        own: &OwnHeads,
        workspace: &Workspace,
        [cached_keys, cached_values]: [Buffer; 2],
    ) -> Result<Self, ModelError> {
        let spec = own.spec;
        let linear = |weight, bias: LayerPart, rows: Range<usize>| {
            let window = Window::rows(rows);
            Linear::load(loader, layer, weight, spec.qkv_bias.then_some(bias), &window)
        };
        let sinks = || loader.window(LayerPart::Sinks.of(layer), &Window::rows(own.query.clone()));
        let value = || linear(LayerPart::Value, LayerPart::ValueBias, own.elements(&own.kv));
        let ones = || loader.vector(&format!("{} ones", spec.head_dim), &vec![1.0; spec.head_dim]);
        let norms = |norm| -> Result<_, ModelError> {
            match norm {
                QkNorm::Unweighted => Ok([ones()?, ones()?]),
                _ => {
                    Ok([loader.layer(layer, LayerPart::QueryNorm)?, loader.layer(layer, LayerPart::KeyNorm)?])
                }
            }
        };
        let (queries, keys) = own.projected();
        Ok(Gqa {
            query: linear(
                LayerPart::Query,
                LayerPart::QueryBias,
                blocks(&queries, spec.query_rows_of_head()),
            )?,
            key: linear(LayerPart::Key, LayerPart::KeyBias, own.elements(&keys))?,
            value: (!spec.values_are_keys).then(value).transpose()?,
            value_norm: spec.value_norm.then(ones).transpose()?,
            norms: spec.qk_norm.map(norms).transpose()?,
            sinks: spec.sinks.then(sinks).transpose()?,
            output: Linear::load_output(loader, layer, spec.output_bias, own.elements(&own.query))?,
            cached_keys: Cached::of(loader, LayerPart::Key.of(layer), 'k', cached_keys)?,
            cached_values: Cached::of(loader, LayerPart::Value.of(layer), 'v', cached_values)?,
            sight: loader.spec.layers[layer.0].sight,
            workspace: workspace.clone(),
            own: own.clone(),
        })
    }

    /// The maps of what it reads.
    pub(super) fn maps_of_input(&self) -> impl Iterator<Item = &Linear> {
        [&self.query, &self.key].into_iter().chain(&self.value)
    }

    pub(super) fn run<B: Backend>(
        &self,
        cx: &Context<'_, B>,
        x: &Buffer,
        out: &Buffer,
    ) -> Result<(), DeviceError> {
        let (own, spec, tokens, queries) = (&self.own, &self.own.spec, 0..x.rows, 0..out.rows);
        let mut query = self.workspace.query.rows(queries.clone())?;
        let mut key = self.workspace.key.rows(tokens.clone())?;
        let mut value = self.workspace.value.rows(tokens.clone())?;
        let mut others = vec![(&self.key, &key)];
        others.extend(self.value.as_ref().map(|map| (map, &value)));
        cx.linears_of_queries(x, &self.workspace.input, (&self.query, &query), &others)?;
        if self.value.is_none() {
            value = key.clone();
        }
        if let Some(ones) = &self.value_norm {
            let normed = self.workspace.normed_value.rows(tokens.clone())?;
            cx.norm(&value.reshape(spec.head_dim)?, ones, cx.eps, &normed.reshape(spec.head_dim)?)?;
            value = normed;
        }
        let gate = self.gate(&query)?;
        let rotate_first = spec.norm_after_rope;
        let rotate = |query: &Buffer, key: &Buffer| {
            cx.rotate(cx.queries, query, spec.head_dim, 0)?;
            if !cx.turns_keys() {
                return Ok(());
            }
            cx.rotate(&cx.step.all.queries, key, spec.head_dim, 0)
        };
        if rotate_first {
            rotate(&query, &key)?;
        }
        // Norms of heads that are turned afterwards do both.
        let alike = spec.clip_qkv.is_none() && cx.turns_keys();
        let turns = spec.qk_norm == Some(QkNorm::PerHead) && !rotate_first && alike;
        if let Some([query_norm, key_norm]) = &self.norms {
            let (normed_query, normed_key) =
                (self.workspace.normed_query.rows(queries.clone())?, self.workspace.normed_key.rows(tokens)?);
            let heads = [
                (cx.queries, self.heads_of(&query, &normed_query)?, query_norm, &normed_query),
                (&cx.step.all.queries, self.heads_of(&key, &normed_key)?, key_norm, &normed_key),
            ];
            match cx.rope.filter(|_| turns) {
                Some((number, rope)) => {
                    let part = |(tokens, x, weight, out): &(&Queries, Buffer, &Weight, &Buffer)| {
                        cx.turned_norm((tokens, number, rope), x, weight, out)
                    };
                    cx.compute(NormRotate { parts: heads.iter().map(part).collect::<Result<_, _>>()? })?;
                }
                None => {
                    for (_, x, weight, out) in &heads {
                        cx.norm(x, weight, cx.eps, &out.reshape(x.width)?)?;
                    }
                }
            }
            (query, key) = (normed_query, normed_key);
        }
        let (projected_queries, projected_keys) = own.projected();
        let query = query.columns(own.among(&own.query, &projected_queries))?;
        let key = key.columns(own.among(&own.kv, &projected_keys))?;
        if let Some(limit) = spec.clip_qkv {
            for x in [&query, &key, &value] {
                cx.compute(Clamp { x: x.clone(), limit })?;
            }
        }
        if !rotate_first && !turns {
            rotate(&query, &key)?;
        }
        cx.store(&[(&key, &self.cached_keys), (&value, &self.cached_values)])?;
        let mut context = self.workspace.context.rows(queries.clone())?;
        let (heads, kv_heads) = (own.query.len(), own.kv.len());
        let heads =
            Heads { heads, kv_heads, scale: spec.scale, sight: self.sight, sinks: self.sinks.clone() };
        cx.attend(heads, &query, &self.cached_keys, &self.cached_values, &context)?;
        if let Some(gate) = gate {
            // Its queries are done with.
            let out = self.workspace.normed_query.rows(queries)?;
            let (x, heads) = (context.reshape(spec.head_dim)?, out.reshape(spec.head_dim)?);
            cx.compute(Gate { gate, gating: Gating::Sigmoid, x, out: heads })?;
            context = out;
        }
        cx.linear(&context, &self.output, out)
    }

    /// The gates among the projected queries, a row for each head: they lie behind each query.
    fn gate(&self, query: &Buffer) -> Result<Option<Buffer>, DeviceError> {
        let GqaSpec { gated, head_dim, .. } = self.own.spec;
        let of = || query.reshape(2 * head_dim)?.columns(head_dim..2 * head_dim);
        gated.then(of).transpose()
    }

    /// Queries or keys as rows that are normed, into rows of `out`: each head by itself, or all of a token together.
    fn heads_of(&self, x: &Buffer, out: &Buffer) -> Result<Buffer, DeviceError> {
        let width = match self.own.spec.qk_norm {
            Some(QkNorm::PerHead | QkNorm::Unweighted) => self.own.spec.head_dim,
            _ => out.width,
        };
        // What is projected for a head may be more than is normed.
        x.reshape(x.width / (out.width / width))?.columns(0..width)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn own(heads: usize, kv_heads: usize, count: usize) -> Vec<(Range<usize>, Range<usize>)> {
        let spec = GqaSpec {
            heads,
            kv_heads,
            head_dim: 8,
            qkv_bias: false,
            output_bias: false,
            qk_norm: None,
            norm_after_rope: false,
            clip_qkv: None,
            sinks: false,
            gated: false,
            value_norm: false,
            values_are_keys: false,
            scale: 1.0,
        };
        let of = |index| OwnHeads::of(&spec, Share { index, count });
        (0..count).map(of).map(|own| (own.query, own.kv)).collect()
    }

    #[test]
    fn the_worked_example() {
        assert_eq!(own(6, 3, 2), [(0..2, 0..1), (2..6, 1..3)]);
        assert_eq!(own(6, 3, 4), [(0..2, 0..1), (2..4, 1..2), (4..5, 2..3), (5..6, 2..3)]);
    }

    #[test]
    fn every_head_is_somewhere_once_and_nobody_has_none() {
        for (heads, kv_heads) in [(8, 8), (8, 2), (12, 3), (20, 4), (7, 1)] {
            for ranks in 1..=heads {
                let own = own(heads, kv_heads, ranks);
                let all: Vec<usize> = own.iter().flat_map(|(query, _)| query.clone()).collect();
                assert_eq!(all, (0..heads).collect::<Vec<_>>(), "{heads} heads over {ranks} ranks");
                for (query, kv) in own {
                    assert!(!query.is_empty() && query.len().is_multiple_of(kv.len()));
                    let group = heads / kv_heads;
                    assert_eq!(kv, query.start / group..(query.end - 1) / group + 1);
                }
            }
        }
    }
}
