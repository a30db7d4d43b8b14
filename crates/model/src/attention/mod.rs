//! Attention: normed rows in, what is added to the residual out. Two kinds end in one operation over a paged cache, whose
//! blocks the engine hands out; the third carries a state along, in a slot that the engine hands out. The bytes are here.

mod gqa;
mod mla;
mod recurrent;

use crate::forward::ModelOptions;
use crate::load::Loader;
use crate::origins::Span;
use crate::parallel::Share;
use crate::step::{Queries, Step};
use crate::{
    AttentionSpec, LayerPart, LayerSpec, MlaSpec, ModelError, ModelSpec, Part, RecurrentSpec, RopeSpec,
    Window,
};
use epsmoe_base::{DType, Lane, Layer, Phase, Place, RowFormat};
use epsmoe_device::op::{
    self, Carried, Epilogue, Gather, Gemm, GemmPart, KvRows, KvWrite, NormKind, Op, Rotate, Sight, TurnedNorm,
};
use epsmoe_device::{Backend, Buffer, DeviceError, Reserve, Weight, WeightFormat};
use gqa::Gqa;
use mla::Mla;
use recurrent::Recurrent;
use std::ops::Range;

/// Tokens in a block of the cache.
pub const BLOCK_SIZE: usize = 64;

/// The attention of one layer: the weights and the cache of this rank's heads.
pub(crate) enum Attention {
    Gqa(Gqa),
    Mla(Mla),
    Recurrent(Recurrent),
}

/// Room for what is computed in between, which layers of one kind share.
enum Workspace {
    Gqa(gqa::OwnHeads, gqa::Workspace),
    Mla(MlaSpec, Box<mla::Workspace>),
    Recurrent(RecurrentSpec, recurrent::Workspace),
}

impl Workspace {
    fn allocate(
        device: &impl Reserve,
        (attention, hidden): (&AttentionSpec, usize),
        share: Share,
        options: &ModelOptions,
    ) -> Result<Self, DeviceError> {
        let tokens = options.max_tokens;
        Ok(match attention {
            AttentionSpec::Gqa(spec) => {
                let own = gqa::OwnHeads::of(spec, share);
                let workspace = gqa::Workspace::allocate(device, &own, hidden, tokens)?;
                Workspace::Gqa(own, workspace)
            }
            AttentionSpec::Mla(spec) => {
                let own = MlaSpec { heads: share.of(spec.heads).len(), ..*spec };
                Workspace::Mla(own, Box::new(mla::Workspace::allocate(device, &own, hidden, options)?))
            }
            AttentionSpec::Recurrent(spec) => {
                let own = spec.of_heads(recurrent::heads_of(spec, share).len());
                Workspace::Recurrent(own, recurrent::Workspace::allocate(device, &own, hidden, tokens)?)
            }
        })
    }
}

/// The workspaces of every kind of attention that a model has.
pub(crate) struct Rooms(Vec<(AttentionSpec, Workspace)>);

impl Rooms {
    /// For a rank that has this share of the heads.
    pub(crate) fn allocate(
        device: &impl Reserve,
        spec: &ModelSpec,
        share: Share,
        options: &ModelOptions,
    ) -> Result<Self, DeviceError> {
        let mut rooms: Vec<(AttentionSpec, Workspace)> = Vec::new();
        for LayerSpec { attention, .. } in &spec.layers {
            if !rooms.iter().any(|(of, _)| of == attention) {
                let workspace = Workspace::allocate(device, (attention, spec.hidden), share, options)?;
                rooms.push((*attention, workspace));
            }
        }
        Ok(Rooms(rooms))
    }

    /// Reserves what a layer keeps of tokens that it may look back at, or of sequences, as [`Attention::load`] does.
    pub(crate) fn reserve_kept(
        &self,
        device: &impl Reserve,
        attention: &AttentionSpec,
        options: &ModelOptions,
    ) -> Result<(), DeviceError> {
        let slots = Slots::of(device, options);
        match self.of(attention) {
            Workspace::Gqa(own, _) => own.cache(device, &slots).map(drop),
            Workspace::Mla(own, _) => mla::cache(device, own, &slots).map(drop),
            Workspace::Recurrent(own, _) => own.states(device, options.states).map(drop),
        }
    }

    /// The widest rows that its maps are multiplied with, but for those of the model.
    pub(crate) fn widest(&self) -> usize {
        let widths = self.0.iter().map(|(_, workspace)| match workspace {
            Workspace::Gqa(_, workspace) => workspace.widest(),
            Workspace::Mla(_, workspace) => workspace.widest(),
            Workspace::Recurrent(..) => 0,
        });
        widths.max().unwrap_or(0)
    }

    fn of(&self, attention: &AttentionSpec) -> &Workspace {
        let found = self.0.iter().find(|(of, _)| of == attention);
        let Some((_, workspace)) = found else {
            unreachable!("{attention:?} has a workspace. This is a bug.")
        };
        workspace
    }
}

/// How many rows a layer's cache has, and in what format.
struct Slots {
    count: usize,
    dtype: DType,
}

impl Slots {
    fn of(device: &impl Reserve, options: &ModelOptions) -> Self {
        let count = options.cache_blocks * BLOCK_SIZE;
        Slots { count, dtype: options.cache_dtype.of(device.dtype()) }
    }

    fn reserve(
        &self,
        device: &impl Reserve,
        name: &'static str,
        width: usize,
    ) -> Result<Buffer, DeviceError> {
        device.allocate(name, self.dtype, self.count, width)
    }
}

/// Keys or values as they are cached, or were decompressed.
struct Cached {
    rows: Buffer,
    /// What they are multiplied with to be what was stored.
    scale: f32,
}

impl Cached {
    /// What a map makes, keys (`k`) or values (`v`). Codes have the scale that the checkpoint has for them, beside the map or its module,
    /// or 1.
    fn of<B: Backend>(
        loader: &Loader<'_, B>,
        part: Part,
        letter: char,
        rows: Buffer,
    ) -> Result<Self, ModelError> {
        if rows.dtype != DType::E4M3 {
            return Ok(Cached { rows, scale: 1.0 });
        }
        let names = loader.spec.locate(part).sources.into_iter().flat_map(|source| {
            let map = source.name.strip_suffix(".weight").unwrap_or(&source.name).to_owned();
            let module = map.rsplit_once('.').map_or("", |(module, _)| module);
            let mut names = vec![
                format!("{map}.{letter}_scale"),
                format!("{module}.{letter}_scale"),
                format!("{module}.attn.{letter}_scale"),
                format!("{module}.kv_scale"),
            ];
            // The scale of what the map gives, if that is nothing else.
            if map.ends_with(&format!(".{letter}_proj")) {
                names.push(format!("{map}.output_scale"));
            }
            names
        });
        Ok(Cached { rows, scale: loader.scale_of_cache(names)?.unwrap_or(1.0) })
    }
}

impl Attention {
    /// The attention of one layer, which computes in one of the `rooms`.
    pub(crate) fn load<B: Backend>(
        loader: &Loader<'_, B>,
        layer: Layer,
        rooms: &Rooms,
        options: &ModelOptions,
    ) -> Result<Self, ModelError> {
        let (share, attention) = (loader.layout.in_group(), &loader.spec.layers[layer.0].attention);
        let (device, slots) = (loader.device, Slots::of(loader.device, options));
        Ok(match (attention, rooms.of(attention)) {
            (_, Workspace::Gqa(own, workspace)) => {
                Attention::Gqa(Gqa::load(loader, layer, own, workspace, own.cache(device, &slots)?)?)
            }
            (AttentionSpec::Mla(spec), Workspace::Mla(own, workspace)) => {
                let (heads, cache) = (share.of(spec.heads), mla::cache(device, own, &slots)?);
                Attention::Mla(Mla::load(loader, layer, *own, heads, workspace, cache)?)
            }
            (AttentionSpec::Recurrent(spec), Workspace::Recurrent(own, workspace)) => {
                let kept = own.states(device, options.states)?;
                Attention::Recurrent(Recurrent::load(loader, layer, spec, workspace, kept)?)
            }
            _ => unreachable!("{attention:?} has a workspace of its own kind. This is a bug."),
        })
    }

    /// Whether the rows that it reads are wanted as codes.
    pub(crate) fn takes_codes(&self) -> bool {
        let codes = |linear: &Linear| linear.weight.format == WeightFormat::Fp8;
        match self {
            Attention::Gqa(attention) => attention.maps_of_input().any(codes),
            Attention::Mla(attention) => attention.maps_of_input().any(codes),
            Attention::Recurrent(_) => false,
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
            Attention::Recurrent(attention) => attention.run(context, x, out),
        }
    }
}

/// Where in a room the codes of some rows go.
pub(crate) fn codes_of(rows: &Buffer, room: &Buffer) -> Result<Buffer, DeviceError> {
    let (_, words) = RowFormat::Fp8.elements(rows.width);
    room.rows(0..rows.rows)?.columns(0..words)
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
        Ok(Linear { weight: loader.window_for(weight.of(layer), window, true)?, bias })
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
    /// The rotary embedding that its layer has, and its number.
    pub(crate) rope: Option<(usize, &'a RopeSpec)>,
    /// Epsilon of the model's norms.
    pub(crate) eps: f32,
    /// The rows that attention reads, as codes too, if they are wanted so and there already.
    pub(crate) input_codes: Option<Buffer>,
    /// Room for rows as codes, for maps that take them so.
    pub(crate) codes: &'a Buffer,
}

/// What the attention operation varies in.
struct Heads {
    heads: usize,
    kv_heads: usize,
    scale: f32,
    sight: Sight,
    sinks: Option<Weight>,
}

impl<B: Backend> Context<'_, B> {
    fn linear(&self, x: &Buffer, linear: &Linear, out: &Buffer) -> Result<(), DeviceError> {
        let rows = self.rows_for(x, &linear.weight)?;
        self.compute(Gemm::biased(rows, &linear.weight, linear.bias.as_ref(), out.clone()))
    }

    /// Several maps of the rows that attention reads, in one operation; these become codes once for all that take them so.
    fn linears(&self, x: &Buffer, maps: &[(&Linear, &Buffer)]) -> Result<(), DeviceError> {
        let (mut codes, mut parts) = (self.input_codes.clone(), Vec::with_capacity(maps.len()));
        for (Linear { weight, bias }, out) in maps {
            let x = match &codes {
                Some(codes) if weight.format == WeightFormat::Fp8 => Buffer::clone(codes),
                _ => self.rows_for(x, weight)?,
            };
            if weight.format == WeightFormat::Fp8 {
                codes = Some(x.clone());
            }
            let (weight, bias, out) = (weight.clone(), bias.clone(), Buffer::clone(out));
            parts.push(GemmPart { x, weight, bias, out });
        }
        self.compute(Gemm { parts, epilogue: Epilogue::Store })
    }

    /// The same with one map whose outcome is wanted of queries alone; `room` is for their rows, if they are not all.
    fn linears_of_queries(
        &self,
        x: &Buffer,
        room: &Buffer,
        (map, out): (&Linear, &Buffer),
        others: &[(&Linear, &Buffer)],
    ) -> Result<(), DeviceError> {
        if self.queries.index.is_none() {
            let maps: Vec<_> = [(map, out)].into_iter().chain(others.iter().copied()).collect();
            return self.linears(x, &maps);
        }
        self.linear(&self.queries_of(x, room)?, map, out)?;
        self.linears(x, others)
    }

    fn rows_for(&self, x: &Buffer, weight: &Weight) -> Result<Buffer, DeviceError> {
        self.device.rows_for(self.place.or_phase(Phase::Projection), x, weight, self.codes)
    }

    fn norm(&self, x: &Buffer, weight: &Weight, eps: f32, out: &Buffer) -> Result<(), DeviceError> {
        let (x, weight, out) = (x.clone(), weight.clone(), out.clone());
        let (kind, bias, codes) = (NormKind::Rms, None, None);
        self.compute(op::Norm { kind, x, weight, bias, eps, out, codes, origin: None })
    }

    /// A map of rows that are normed first, into `normed`: as the map takes them.
    fn linear_of_norm(
        &self,
        x: &Buffer,
        (weight, eps, normed): (&Weight, f32, &Buffer),
        map: &Linear,
        out: &Buffer,
    ) -> Result<(), DeviceError> {
        let codes = match map.weight.format {
            WeightFormat::Fp8 => Some(codes_of(normed, self.codes)?),
            _ => None,
        };
        let rows = codes.as_ref().unwrap_or(normed).clone();
        let (kind, x, weight, normed) = (NormKind::Rms, x.clone(), weight.clone(), normed.clone());
        self.compute(op::Norm { kind, x, weight, bias: None, eps, out: normed, codes, origin: None })?;
        self.compute(Gemm::biased(rows, &map.weight, map.bias.as_ref(), out.clone()))
    }

    /// The norm of every head of these tokens, to be turned like [`rotate`](Self::rotate) from its first element on by the
    /// embedding `(number, rope)`.
    fn turned_norm(
        &self,
        (tokens, number, rope): (&Queries, usize, &RopeSpec),
        x: &Buffer,
        weight: &Weight,
        heads: &Buffer,
    ) -> Result<TurnedNorm, DeviceError> {
        let (x, weight, head_width) = (x.clone(), weight.clone(), x.width);
        let norm = op::Norm {
            kind: NormKind::Rms,
            x,
            weight,
            bias: None,
            eps: self.eps,
            out: heads.reshape(head_width)?,
            codes: None,
            origin: None,
        };
        let rope_table = tokens.rope_tables[number].clone();
        let rotate = Rotate { x: heads.clone(), head_width, start: 0, style: rope.style, rope_table };
        Ok(TurnedNorm { norm, rotate })
    }

    /// The rows of `x` whose queries are computed, in `room` if they are not all.
    fn queries_of(&self, x: &Buffer, room: &Buffer) -> Result<Buffer, DeviceError> {
        let Some(index) = &self.queries.index else { return Ok(x.clone()) };
        let out = room.rows(0..index.rows)?;
        self.compute(Gather { x: x.clone(), index: index.clone(), out: out.clone() })?;
        Ok(out)
    }

    /// Turns the elements from `start` on of every head of these tokens, in a layer whose heads turn.
    fn rotate(
        &self,
        tokens: &Queries,
        x: &Buffer,
        head_width: usize,
        start: usize,
    ) -> Result<(), DeviceError> {
        let Some((number, rope)) = self.rope else { return Ok(()) };
        let rope_table = tokens.rope_tables[number].clone();
        self.compute(Rotate { x: x.clone(), head_width, start, style: rope.style, rope_table })
    }

    /// Whether keys turn as queries do.
    fn turns_keys(&self) -> bool {
        self.rope.is_some_and(|(_, rope)| rope.growth.is_none())
    }

    /// Whose states the step goes on from.
    fn carried(&self) -> Carried {
        let all = &self.step.all.queries;
        Carried {
            sequence_starts: all.sequence_starts.clone(),
            positions: all.positions.clone(),
            slots: self.step.states.clone(),
        }
    }

    /// Rows into their caches.
    fn store(&self, rows: &[(&Buffer, &Cached)]) -> Result<(), DeviceError> {
        let part = |(x, cache): &(&Buffer, &Cached)| KvRows {
            x: Buffer::clone(x),
            cache: cache.rows.clone(),
            scale: cache.scale,
        };
        self.compute(KvWrite { parts: rows.iter().map(part).collect(), slots: self.step.slots.clone() })
    }

    /// Attention of all queries to what is cached.
    fn attend(
        &self,
        heads: Heads,
        q: &Buffer,
        keys: &Cached,
        values: &Cached,
        out: &Buffer,
    ) -> Result<(), DeviceError> {
        let all = Span {
            rows: 0..q.rows,
            positions: self.queries.positions.clone(),
            sequence_starts: self.queries.sequence_starts.clone(),
            blocks: self.step.blocks.clone(),
        };
        self.attend_in(&all, heads, q, keys, values, out)
    }

    /// Attention of some queries, to rows of keys and values that their blocks name.
    fn attend_in(
        &self,
        span: &Span,
        heads: Heads,
        q: &Buffer,
        keys: &Cached,
        values: &Cached,
        out: &Buffer,
    ) -> Result<(), DeviceError> {
        let Heads { heads, kv_heads, scale, sight, sinks } = heads;
        self.compute(op::Attention {
            q: q.clone(),
            keys: keys.rows.clone(),
            values: values.rows.clone(),
            sequence_starts: span.sequence_starts.clone(),
            positions: span.positions.clone(),
            blocks: span.blocks.clone(),
            block_size: BLOCK_SIZE,
            longest: self.step.longest,
            heads,
            kv_heads,
            scale: scale * keys.scale,
            value_scale: values.scale,
            sight,
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
