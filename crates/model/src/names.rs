//! The parts of a model and where checkpoints keep them: one table for every architecture.

use crate::spec::{
    AttentionSpec, LayerSpec, MlaSpec, MlpSpec, ModelSpec, Nesting, RecurrentRule, RecurrentSpec,
    TensorNames, matrix,
};
use epsmoe_base::{Expert, Layer};
use epsmoe_device::WeightShape;
use epsmoe_device::op::Activation;

/// A tensor of a model, whatever a checkpoint calls it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Part {
    /// Rows looked up by token, `[V, H]`.
    Embedding,
    /// The norm after the last layer.
    FinalNorm,
    /// The bias of that norm.
    FinalNormBias,
    /// Hidden vectors to logits, `[V, H]`.
    LmHead,
    /// Added to logits.
    LmHeadBias,
    /// A part of one layer.
    Layer(Layer, LayerPart),
}

/// A tensor of a layer. Matrices are `[out, in]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[expect(missing_docs, reason = "the names say it; spec.rs says what they do")]
pub enum LayerPart {
    InputNorm,
    InputNormBias,
    PostAttentionNorm,
    PostAttentionNormBias,
    ResidualNorm,
    Query,
    Key,
    Value,
    Output,
    QueryBias,
    KeyBias,
    ValueBias,
    OutputBias,
    QueryNorm,
    KeyNorm,
    Sinks,
    QueryDown,
    QueryDownBias,
    QueryDownNorm,
    QueryUp,
    KvDown,
    KvDownBias,
    KvDownNorm,
    /// Of one head.
    KeyUp(usize),
    /// Of one head.
    ValueUp(usize),
    /// What one key head of a layer that carries a state makes of its input.
    State(usize, StateRows),
    /// The convolution of one key head's queries, keys or values.
    StateConv(usize, StateRows),
    /// Its bias.
    StateConvBias(usize, StateRows),
    StateDecay,
    StateBias,
    /// A factor on values that pass the state by.
    StateSkip,
    StateNorm,
    StateOutput,
    /// Of what a part of a sandwich gives.
    OutNorm(Branch),
    /// A factor on the stream behind a layer.
    LayerScale,
    Router,
    RouterScale,
    ExpertScales,
    RouterBias,
    CorrectionBias,
    Expert(Expert, Map),
    ExpertBias(Expert, Map),
    Shared(Map),
    SharedExpertGate,
    Dense(Map),
    Residual(Map),
}

impl LayerPart {
    /// This part of one layer.
    pub fn of(self, layer: Layer) -> Part {
        Part::Layer(layer, self)
    }
}

/// A part of a layer whose output is normed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Branch {
    /// Attention.
    Attention,
    /// The dense MLP.
    Dense,
    /// The experts.
    Experts,
    /// The sum of both.
    Both,
}

impl Branch {
    /// All of them.
    pub const ALL: [Branch; 4] = [Branch::Attention, Branch::Dense, Branch::Experts, Branch::Both];
}

/// What a key head of a layer that carries a state has, with its value heads.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[expect(missing_docs, reason = "the names say it; `Recurrence` says what they do")]
pub enum StateRows {
    Query,
    Key,
    Value,
    /// Of what comes out.
    Gate,
    /// How much of what was held is replaced.
    Beta,
    /// How much of it is kept.
    Decay,
}

impl StateRows {
    /// Those that the convolution sees.
    pub const MIXED: [StateRows; 3] = [StateRows::Query, StateRows::Key, StateRows::Value];

    /// What weighs a token, and its state's decay.
    pub fn weights(spec: &RecurrentSpec) -> &'static [StateRows] {
        match spec.rule {
            RecurrentRule::Delta => &[StateRows::Beta, StateRows::Decay],
            RecurrentRule::StateSpace { .. } => &[StateRows::Decay],
        }
    }

    /// How many there are for one key head.
    pub fn count(self, spec: &RecurrentSpec) -> usize {
        match self {
            StateRows::Query | StateRows::Key => spec.key_width,
            StateRows::Value | StateRows::Gate => spec.group() * spec.value_width,
            StateRows::Beta | StateRows::Decay => spec.group(),
        }
    }
}

impl Part {
    /// Whether it is one of the maps that are quantised where a model is: routers, norms, embeddings and the output are not.
    pub fn is_quantised(self) -> bool {
        use LayerPart::*;
        let Part::Layer(_, part) = self else { return false };
        let attention =
            matches!(part, Query | Key | Value | Output | QueryDown | QueryUp | KvDown | StateOutput);
        attention || matches!(part, KeyUp(_) | ValueUp(_) | Expert(..) | Shared(_) | Dense(_) | Residual(_))
    }
}

/// One of the three linear maps of a gated MLP.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Map {
    /// `[I, H]`, through the activation.
    GateProj,
    /// `[I, H]`, multiplied with it.
    UpProj,
    /// `[H, I]`, back.
    DownProj,
}

impl Map {
    /// All three.
    pub const ALL: [Map; 3] = [Map::GateProj, Map::UpProj, Map::DownProj];

    /// Those of an MLP with this activation.
    pub fn of(activation: Option<Activation>) -> &'static [Map] {
        match activation {
            None | Some(Activation::Swish(_)) => &Self::ALL,
            Some(Activation::SquaredRelu) => &[Map::UpProj, Map::DownProj],
        }
    }

    /// Its shape in an MLP.
    pub fn shape(self, hidden: usize, inner: usize) -> WeightShape {
        match self {
            Map::GateProj | Map::UpProj => matrix(inner, hidden),
            Map::DownProj => matrix(hidden, inner),
        }
    }
}

/// A part, and every place where it may be.
#[derive(Clone, Debug, PartialEq)]
pub struct Located {
    /// The part's own shape.
    pub shape: WeightShape,
    /// In the order they are tried; the first is the published one.
    pub sources: Vec<Source>,
}

impl Located {
    /// Where its codes are to be stored: the published place, or, of an expert whose published place is for plain numbers alone or
    /// across what is summed over, the first that is not.
    pub fn place_of_codes(&self) -> &Source {
        let published = &self.sources[0];
        let fits = |source: &&Source| !source.transposed && source.only != Some(Form::Plain);
        match published.shape.len() {
            3 => self.sources.iter().find(fits).unwrap_or(published),
            _ => published,
        }
    }
}

/// Where a part may be. A stored tensor is seen as rows of its last dimension; the part is some of them, evenly spaced.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Source {
    /// Name of the stored tensor.
    pub name: String,
    /// Its whole shape.
    pub shape: Vec<usize>,
    /// The first row of its place: the part's own, unless rows of several parts alternate from there on.
    pub first_row: usize,
    /// Whether the rows are the columns of the part.
    pub transposed: bool,
    /// Where in each turn the part's rows are, if rows of several parts alternate.
    pub turn: Turn,
    /// The only form in which this place may hold the part, where another place of the same name is for the other.
    pub only: Option<Form>,
}

impl Source {
    /// The stored tensor, and where in it the part is if it is not all of it: no two parts of a model have it in common.
    pub fn place(&self) -> String {
        let Turn { at, of } = self.turn;
        let mut place = self.name.clone();
        if self.first_row > 0 {
            place += &format!(" from row {}", self.first_row);
        }
        if self.turn != Turn::ALONE {
            place += &format!(", {at} of {of}");
        }
        place
    }
}

/// Rows of several parts that take turns: this part has row `at` of each `of`, or, where nothing alternates, all rows from `at`
/// on. In a transposed tensor, columns do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Turn {
    /// Its place in each turn.
    pub at: usize,
    /// How many take turns.
    pub of: usize,
}

impl Turn {
    /// A part whose rows are neighbours.
    pub const ALONE: Turn = Turn { at: 0, of: 1 };

    /// Gate and up, which alternate.
    fn gate_up(map: Map) -> Turn {
        Turn { at: usize::from(map == Map::UpProj), of: 2 }
    }
}

/// How a tensor is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// Element by element.
    Plain,
    /// In codes.
    Coded,
}

/// The rows of a stored tensor that a part is.
struct Place {
    /// Of the whole tensor.
    shape: Vec<usize>,
    first_row: usize,
    transposed: bool,
    turn: Turn,
    only: Option<Form>,
}

impl Place {
    /// Neighbours from a row on.
    fn from(shape: Vec<usize>, first_row: usize) -> Place {
        Place { shape, first_row, transposed: false, turn: Turn::ALONE, only: None }
    }
}

impl ModelSpec {
    /// Every part of the model, in the order of the forward pass.
    pub fn parts(&self) -> impl Iterator<Item = Part> {
        let layers = self
            .layers
            .iter()
            .enumerate()
            .flat_map(|(index, layer)| self.layer_parts(layer).map(move |part| part.of(Layer(index))));
        let ends = [
            (Part::FinalNorm, true),
            (Part::FinalNormBias, self.norm.bias),
            (Part::LmHead, !self.tie_embeddings),
            (Part::LmHeadBias, self.head_bias),
        ];
        let ends = ends.into_iter().filter_map(|(part, present)| present.then_some(part));
        [Part::Embedding].into_iter().chain(layers).chain(ends)
    }

    /// Where checkpoints keep a part.
    pub fn locate(&self, part: Part) -> Located {
        let kept_as = if part == Part::LmHead && self.tie_embeddings { Part::Embedding } else { part };
        let names = if self.naming == TensorNames::Gguf {
            gguf_names(kept_as).iter().map(|name| (TensorNames::Gguf, *name)).collect()
        } else {
            let mut names = names(kept_as).to_vec();
            names.sort_by_key(|(naming, _)| {
                let in_codes = (self.naming, *naming) == (TensorNames::GptOss, TensorNames::GptOssCoded);
                *naming != self.naming && !in_codes
            });
            names
        };
        let sources = names.into_iter().map(|(naming, name)| self.source(kept_as, naming, name));
        let mut sources: Vec<Source> = sources.collect();
        // A language model may also have been taken out of what it was nested in.
        let alone: Vec<Source> = sources.iter().filter_map(|source| self.unnested(source)).collect();
        sources.extend(alone);
        Located { shape: self.shape(part), sources }
    }

    fn layer_parts(&self, layer: &LayerSpec) -> impl Iterator<Item = LayerPart> {
        use LayerPart::*;
        let bias = |part| self.norm.bias.then_some(part);
        let mut parts = vec![InputNorm];
        parts.extend(bias(InputNormBias));
        parts.extend(attention_parts(&layer.attention));
        if layer.residual_mlp.is_some() {
            parts.push(ResidualNorm);
            parts.extend(Map::ALL.map(Residual));
        }
        if layer.sandwich {
            parts.extend(Branch::ALL.map(OutNorm));
            parts.push(LayerScale);
        }
        if layer.mlp != MlpSpec::Absent {
            parts.push(PostAttentionNorm);
            parts.extend(bias(PostAttentionNormBias));
        }
        let (mut experts, mut biases, mut maps) = (0, false, Map::of(None));
        match &layer.mlp {
            MlpSpec::Absent => {}
            MlpSpec::Dense { activation, .. } => {
                parts.extend(Map::of(*activation).iter().map(|&map| Dense(map)))
            }
            MlpSpec::Moe(moe) => {
                (experts, biases, maps) = (moe.experts, moe.expert_bias, Map::of(moe.activation));
                parts.push(Router);
                parts.extend(moe.router_bias.then_some(RouterBias));
                parts.extend(moe.correction_bias.then_some(CorrectionBias));
                parts.extend(moe.router_scale.then_some(RouterScale));
                parts.extend(moe.expert_scales.then_some(ExpertScales));
                if let Some(shared) = moe.shared {
                    parts.extend(maps.iter().map(|&map| Shared(map)));
                    parts.extend(shared.gated.then_some(SharedExpertGate));
                }
            }
        }
        let experts = (0..experts).map(epsmoe_base::Expert).flat_map(move |expert| {
            let bias = move |map| biases.then_some(LayerPart::ExpertBias(expert, map));
            maps.iter()
                .map(move |&map| LayerPart::Expert(expert, map))
                .chain(Map::ALL.into_iter().filter_map(bias))
        });
        parts.into_iter().chain(experts)
    }

    /// A place by the name that it has outside of a larger model.
    fn unnested(&self, source: &Source) -> Option<Source> {
        let name = match self.nesting {
            Nesting::Alone => return None,
            Nesting::Beside => format!("model.{}", source.name.strip_prefix("model.language_model.")?),
            Nesting::Under => source.name.strip_prefix("language_model.")?.to_owned(),
        };
        Some(Source { name, ..source.clone() })
    }

    fn source(&self, part: Part, naming: TensorNames, name: &str) -> Source {
        let whole = || Place::from(self.shape(part).sources().1, 0);
        let (name, place) = match part {
            Part::Layer(layer, inside) => {
                let blocks = match naming {
                    TensorNames::Dbrx => "transformer.blocks",
                    TensorNames::Gguf => "blk",
                    TensorNames::Nemotron => "backbone.layers",
                    _ => "model.layers",
                };
                let place = self.place(layer, inside, naming, name).unwrap_or_else(whole);
                let (number, name) = match self.naming {
                    TensorNames::Longcat => halved(layer, name),
                    TensorNames::Nemotron => (self.block(layer, inside), name.to_owned()),
                    _ => (layer.0, name.to_owned()),
                };
                let name = match inside {
                    LayerPart::Expert(expert, _) => name.replace("{e}", &expert.0.to_string()),
                    _ => name,
                };
                (format!("{blocks}.{number}.{name}"), place)
            }
            _ => (name.to_owned(), whole()),
        };
        let name = match (self.nesting, name.strip_prefix("model.")) {
            (Nesting::Beside, Some(inside)) => format!("model.language_model.{inside}"),
            (Nesting::Under, _) => format!("language_model.{name}"),
            _ => name,
        };
        let Place { shape, first_row, transposed, turn, only } = place;
        Source { name, shape, first_row, transposed, turn, only }
    }

    /// Where a part of a layer is in the tensor of this name, if that is not the part alone.
    fn place(&self, layer: Layer, part: LayerPart, naming: TensorNames, name: &str) -> Option<Place> {
        use LayerPart::{
            Expert, Key, KeyBias, KeyUp, Query, QueryBias, SharedExpertGate, Value, ValueBias, ValueUp,
        };
        let fused = matches!(naming, TensorNames::Dbrx | TensorNames::Bailing) || name == GGUF_FUSED;
        match (naming, part) {
            (_, Query | Key | Value) if fused => {
                let (rows, first_row) = self.fused_heads(layer, part);
                Some(Place::from(vec![rows, self.hidden], first_row))
            }
            (_, QueryBias | KeyBias | ValueBias) if fused => {
                let (rows, first_row) = self.fused_heads(layer, part);
                Some(Place::from(vec![rows], first_row))
            }
            (TensorNames::Ernie, LayerPart::CorrectionBias) => {
                let shape = self.shape(part.of(layer)).sources().1;
                Some(Place::from([vec![1], shape].concat(), 0))
            }
            (_, KeyUp(head) | ValueUp(head)) => self.latent_head(layer, part, head, name),
            (
                _,
                LayerPart::State(head, rows)
                | LayerPart::StateConv(head, rows)
                | LayerPart::StateConvBias(head, rows),
            ) => self.state_head(layer, part, (head, rows), naming),
            (TensorNames::Gguf, SharedExpertGate) => Some(Place::from(vec![self.hidden], 0)),
            // One tensor for each.
            (_, Expert(..)) if name.contains("{e}") => None,
            (
                TensorNames::Dbrx
                | TensorNames::Merged
                | TensorNames::GptOss
                | TensorNames::GptOssCoded
                | TensorNames::Granite
                | TensorNames::Qwen35
                | TensorNames::Gemma
                | TensorNames::Llama4
                | TensorNames::Gguf,
                Expert(expert, map),
            ) => Some(self.stacked_expert(layer, expert, map, naming, name)),
            (_, LayerPart::ExpertBias(expert, map)) => Some(self.expert_bias(layer, expert, map, naming)),
            (TensorNames::Granite, LayerPart::Shared(map @ (Map::GateProj | Map::UpProj))) => {
                let inner = self.shape(part.of(layer)).sources().1[0];
                let first_row = if map == Map::UpProj { inner } else { 0 };
                Some(Place::from(vec![2 * inner, self.hidden], first_row))
            }
            _ => None,
        }
    }

    /// One map or bias for all heads: all query rows, all key rows, all value rows.
    /// Their number, and where those of a part begin.
    fn fused_heads(&self, layer: Layer, part: LayerPart) -> (usize, usize) {
        let attention = &self.layers[layer.0].attention;
        let query = attention.query_width();
        let key = attention.cache_width() / 2;
        let first_row = match part {
            LayerPart::Key | LayerPart::KeyBias => query,
            LayerPart::Value | LayerPart::ValueBias => query + key,
            _ => 0,
        };
        (query + 2 * key, first_row)
    }

    /// A head's maps out of the latent. Published: of every head, key rows and then value rows, `[heads · (nope + value), kv_lora]`.
    /// Newer GGUF files have two tensors, `[heads, kv_lora, nope]` for keys, and `[heads, value, kv_lora]`.
    fn latent_head(&self, layer: Layer, part: LayerPart, head: usize, name: &str) -> Option<Place> {
        let AttentionSpec::Mla(MlaSpec { heads, kv_lora, nope, value, .. }) = self.layers[layer.0].attention
        else {
            return None;
        };
        let is_key = matches!(part, LayerPart::KeyUp(_));
        Some(match name {
            GGUF_KEYS => {
                Place { transposed: true, ..Place::from(vec![heads, kv_lora, nope], head * kv_lora) }
            }
            GGUF_VALUES => Place::from(vec![heads, value, kv_lora], head * value),
            _ => {
                let first_row = head * (nope + value) + if is_key { 0 } else { nope };
                Place::from(vec![heads * (nope + value), kv_lora], first_row)
            }
        })
    }

    /// Rows of one key head of a layer that carries a state. State spaces have all in one tensor, gates first, kind by kind, and
    /// keys behind values, as the convolution has them. Qwen3-Next: of every head, its query, key, values and gates, in one tensor, and what
    /// weighs them in another. Qwen3.5: all queries, all keys and all values in one, as the convolution has them
    /// everywhere, and each other kind in its own.
    fn state_head(
        &self,
        layer: Layer,
        part: LayerPart,
        (head, rows): (usize, StateRows),
        naming: TensorNames,
    ) -> Option<Place> {
        use StateRows::*;
        let AttentionSpec::Recurrent(spec) = &self.layers[layer.0].attention else { return None };
        let before = |kinds: &[StateRows]| kinds.iter().map(|kind| kind.count(spec)).sum::<usize>();
        // Kinds that share a tensor, those of a head or of a kind together.
        let of_heads = |kinds: &[StateRows], at: usize| {
            (spec.key_heads * before(kinds), head * before(kinds) + before(&kinds[..at]))
        };
        let of_kinds = |kinds: &[StateRows], at: usize| {
            (spec.key_heads * before(kinds), spec.key_heads * before(&kinds[..at]) + head * rows.count(spec))
        };
        let at = |kinds: &[StateRows]| kinds.iter().position(|&kind| kind == rows).unwrap_or(0);
        let state_space = matches!(spec.rule, RecurrentRule::StateSpace { .. });
        let mixed = if state_space { [Value, Key, Query] } else { StateRows::MIXED };
        let (all, first_row) = of_kinds(&mixed, at(&mixed));
        match part {
            LayerPart::StateConv(..) => return Some(Place::from(vec![all, 1, spec.taps], first_row)),
            LayerPart::StateConvBias(..) => return Some(Place::from(vec![all], first_row)),
            _ => {}
        }
        let (all, first_row) = match (naming, rows) {
            _ if state_space => {
                let kinds = [Gate, Value, Key, Query, Decay];
                of_kinds(&kinds, at(&kinds))
            }
            (TensorNames::Qwen35, Query | Key | Value) => of_kinds(&StateRows::MIXED, at(&StateRows::MIXED)),
            (TensorNames::Qwen35, _) => of_kinds(&[rows], 0),
            (_, Beta | Decay) => of_heads(&[Beta, Decay], at(&[Beta, Decay])),
            _ => of_heads(&[Query, Key, Value, Gate], at(&[Query, Key, Value, Gate])),
        };
        Some(Place::from(vec![all, self.hidden], first_row))
    }

    /// One tensor for all experts. DBRX: three of `[E·I, H]`, where down is stored transposed. Merged:
    /// gate over up `[E, 2I, H]`, and down `[E, H, I]`; Granite too. GGUF: as merged, or gate and up apart `[E, I, H]`.
    /// gpt-oss: gate and up in turn, and everything transposed unless it is coded. Llama 4: gate beside up, transposed too.
    fn stacked_expert(
        &self,
        layer: Layer,
        expert: Expert,
        map: Map,
        naming: TensorNames,
        name: &str,
    ) -> Place {
        let (experts, inner) = self.expert_sizes(layer);
        let (e, hidden) = (expert.0, self.hidden);
        let apart = naming == TensorNames::Gguf && name != GGUF_GATE_UP;
        match (naming, map) {
            (TensorNames::Dbrx, _) => Place {
                transposed: map == Map::DownProj,
                ..Place::from(vec![experts * inner, hidden], e * inner)
            },
            (TensorNames::GptOss, Map::DownProj) => Place {
                transposed: true,
                only: Some(Form::Plain),
                ..Place::from(vec![experts, inner, hidden], e * inner)
            },
            (TensorNames::GptOss, _) => Place {
                transposed: true,
                turn: Turn::gate_up(map),
                only: Some(Form::Plain),
                ..Place::from(vec![experts, hidden, 2 * inner], e * hidden)
            },
            (TensorNames::Llama4, Map::DownProj) => {
                Place { transposed: true, ..Place::from(vec![experts, inner, hidden], e * inner) }
            }
            (TensorNames::Llama4, _) => Place {
                transposed: true,
                turn: Turn { at: if map == Map::UpProj { inner } else { 0 }, of: 1 },
                ..Place::from(vec![experts, hidden, 2 * inner], e * hidden)
            },
            (TensorNames::GptOssCoded, Map::DownProj) => {
                Place { only: Some(Form::Coded), ..Place::from(vec![experts, hidden, inner], e * hidden) }
            }
            (TensorNames::GptOssCoded, _) => Place {
                turn: Turn::gate_up(map),
                only: Some(Form::Coded),
                ..Place::from(vec![experts, 2 * inner, hidden], e * 2 * inner)
            },
            (_, Map::DownProj) => Place::from(vec![experts, hidden, inner], e * hidden),
            _ if apart => Place::from(vec![experts, inner, hidden], e * inner),
            (_, Map::GateProj) => Place::from(vec![experts, 2 * inner, hidden], e * 2 * inner),
            (_, Map::UpProj) => Place::from(vec![experts, 2 * inner, hidden], e * 2 * inner + inner),
        }
    }

    /// A part of the biases of all experts: gate and up in turn, or, in GGUF, each map its own.
    fn expert_bias(&self, layer: Layer, expert: Expert, map: Map, naming: TensorNames) -> Place {
        let (experts, inner) = self.expert_sizes(layer);
        let (width, turn) = match (map, naming) {
            (Map::DownProj, _) => (self.hidden, Turn::ALONE),
            (_, TensorNames::Gguf) => (inner, Turn::ALONE),
            _ => (2 * inner, Turn::gate_up(map)),
        };
        Place { turn, ..Place::from(vec![experts, width], expert.0 * width) }
    }

    /// Where attention and MLPs are numbered one by one: which of them a part of a layer belongs to.
    fn block(&self, layer: Layer, part: LayerPart) -> usize {
        use LayerPart::{CorrectionBias, Dense, Expert, PostAttentionNorm, Router, Shared};
        let has_mlp = |layer: &&LayerSpec| layer.mlp != MlpSpec::Absent;
        let of_mlp =
            matches!(part, PostAttentionNorm | Router | CorrectionBias | Expert(..) | Shared(_) | Dense(_));
        layer.0 + self.layers[..layer.0].iter().filter(has_mlp).count() + usize::from(of_mlp)
    }

    /// Experts of a layer, and their inner width.
    fn expert_sizes(&self, layer: Layer) -> (usize, usize) {
        self.layers[layer.0].mlp.moe().map_or((0, 0), |moe| (moe.experts, moe.inner))
    }
}

/// Of a layer that is half of a published one: that one's number, and a name with the half's number in it, where both have
/// such a part.
fn halved(layer: Layer, name: &str) -> (usize, String) {
    let both = ["self_attn", "input_layernorm", "post_attention_layernorm", "mlps"];
    let name = match name.split_once('.') {
        Some((first, rest)) if both.contains(&first) => format!("{first}.{}.{rest}", layer.0 % 2),
        _ => name.to_owned(),
    };
    (layer.0 / 2, name)
}

/// The parts of one layer's attention.
fn attention_parts(attention: &AttentionSpec) -> Vec<LayerPart> {
    use LayerPart::*;
    let optional: Vec<(LayerPart, bool)> = match attention {
        AttentionSpec::Gqa(spec) => vec![
            (Query, true),
            (QueryBias, spec.qkv_bias),
            (QueryNorm, spec.has_norm_weights()),
            (Key, true),
            (KeyBias, spec.qkv_bias),
            (KeyNorm, spec.has_norm_weights()),
            (Value, !spec.values_are_keys),
            (ValueBias, spec.qkv_bias && !spec.values_are_keys),
            (Output, true),
            (OutputBias, spec.output_bias),
            (Sinks, spec.sinks),
        ],
        AttentionSpec::Mla(spec) => {
            let before = [
                (Query, spec.q_lora.is_none()),
                (QueryDown, spec.q_lora.is_some()),
                (QueryDownBias, spec.q_lora.is_some() && spec.bias),
                (QueryDownNorm, spec.q_lora.is_some()),
                (QueryUp, spec.q_lora.is_some()),
                (KvDown, true),
                (KvDownBias, spec.bias),
                (KvDownNorm, true),
                (Output, true),
                (OutputBias, spec.bias),
            ];
            let heads = (0..spec.heads).flat_map(|head| [(KeyUp(head), true), (ValueUp(head), true)]);
            before.into_iter().chain(heads).collect()
        }
        AttentionSpec::Recurrent(spec) => {
            let heads = (0..spec.key_heads).flat_map(|head| {
                let kinds = StateRows::MIXED.iter().chain(&[StateRows::Gate]).chain(StateRows::weights(spec));
                let maps = kinds.map(move |&rows| (State(head, rows), true));
                let convolution = StateRows::MIXED.into_iter().flat_map(move |rows| {
                    [(StateConv(head, rows), true), (StateConvBias(head, rows), spec.conv_bias)]
                });
                maps.chain(convolution)
            });
            let skips = matches!(spec.rule, RecurrentRule::StateSpace { .. });
            let rest = [
                (StateDecay, true),
                (StateBias, true),
                (StateSkip, skips),
                (StateNorm, true),
                (StateOutput, true),
            ];
            heads.chain(rest).collect()
        }
    };
    optional.into_iter().filter_map(|(part, present)| present.then_some(part)).collect()
}

/// GGUF's tensor of queries, keys and values.
const GGUF_FUSED: &str = "attn_qkv.weight";
/// GGUF's tensor of the gate and up maps of all experts.
const GGUF_GATE_UP: &str = "ffn_gate_up_exps.weight";
/// GGUF's tensors of the maps from latents to keys and values.
const GGUF_KEYS: &str = "attn_k_b.weight";
const GGUF_VALUES: &str = "attn_v_b.weight";

/// What GGUF files call a part; inside a layer without the layer's prefix.
fn gguf_names(part: Part) -> &'static [&'static str] {
    use LayerPart::*;
    use Map::*;
    let part = match part {
        Part::Embedding => return &["token_embd.weight"],
        Part::FinalNorm => return &["output_norm.weight"],
        Part::LmHead => return &["output.weight"],
        Part::FinalNormBias => return &["output_norm.bias"],
        Part::LmHeadBias => return &["output.bias"],
        Part::Layer(_, part) => part,
    };
    match part {
        InputNorm => &["attn_norm.weight"],
        InputNormBias => &["attn_norm.bias"],
        PostAttentionNormBias => &["ffn_norm.bias"],
        Sinks => &["attn_sinks.weight"],
        PostAttentionNorm => &["ffn_norm.weight", "attn_output_norm.weight", "post_attention_norm.weight"],
        ResidualNorm => &["ffn_norm_exps.weight"],
        Query => &["attn_q.weight", GGUF_FUSED],
        Key => &["attn_k.weight", GGUF_FUSED],
        Value => &["attn_v.weight", GGUF_FUSED],
        Output => &["attn_output.weight"],
        QueryBias => &["attn_q.bias"],
        KeyBias => &["attn_k.bias"],
        ValueBias => &["attn_v.bias"],
        OutputBias => &["attn_output.bias"],
        QueryNorm => &["attn_q_norm.weight"],
        KeyNorm => &["attn_k_norm.weight"],
        QueryDown => &["attn_q_a.weight"],
        QueryDownBias => &["attn_q_a.bias"],
        QueryDownNorm => &["attn_q_a_norm.weight"],
        QueryUp => &["attn_q_b.weight"],
        KvDown => &["attn_kv_a_mqa.weight"],
        KvDownBias => &["attn_kv_a_mqa.bias"],
        KvDownNorm => &["attn_kv_a_norm.weight"],
        KeyUp(_) => &[GGUF_KEYS, "attn_kv_b.weight"],
        ValueUp(_) => &[GGUF_VALUES, "attn_kv_b.weight"],
        Router => &["ffn_gate_inp.weight"],
        RouterBias => &["ffn_gate_inp.bias"],
        CorrectionBias => &["exp_probs_b.bias"],
        ExpertBias(_, GateProj) => &["ffn_gate_exps.bias"],
        ExpertBias(_, UpProj) => &["ffn_up_exps.bias"],
        ExpertBias(_, DownProj) => &["ffn_down_exps.bias"],
        // Files of before 2024-04 have a tensor for each expert.
        Expert(_, GateProj) => &["ffn_gate_exps.weight", GGUF_GATE_UP, "ffn_gate.{e}.weight"],
        Expert(_, UpProj) => &["ffn_up_exps.weight", GGUF_GATE_UP, "ffn_up.{e}.weight"],
        Expert(_, DownProj) => &["ffn_down_exps.weight", "ffn_down.{e}.weight"],
        Shared(GateProj) => &["ffn_gate_shexp.weight"],
        Shared(UpProj) => &["ffn_up_shexp.weight"],
        Shared(DownProj) => &["ffn_down_shexp.weight"],
        SharedExpertGate => &["ffn_gate_inp_shexp.weight"],
        Dense(GateProj) | Residual(GateProj) => &["ffn_gate.weight"],
        Dense(UpProj) | Residual(UpProj) => &["ffn_up.weight"],
        Dense(DownProj) | Residual(DownProj) => &["ffn_down.weight"],
        State(..) | StateConv(..) | StateConvBias(..) | StateDecay | StateBias => &[],
        StateSkip | StateNorm | StateOutput => &[],
        OutNorm(_) | LayerScale | RouterScale | ExpertScales => &[],
    }
}

/// What checkpoints call a part; inside a layer without the layer's prefix, `{e}` for the expert.
fn names(part: Part) -> &'static [(TensorNames, &'static str)] {
    use LayerPart::*;
    use Map::*;
    use TensorNames::{
        Bailing, Common, Dbrx, Ernie, Exaone, Gemma, GptOss, GptOssCoded, Granite, Hunyuan, HunyuanV3,
        Llama4, Longcat, Merged, Mixtral, Nemotron, Qwen, Qwen35,
    };
    let part = match part {
        Part::Embedding => {
            return &[
                (Common, "model.embed_tokens.weight"),
                (Dbrx, "transformer.wte.weight"),
                (Bailing, "model.word_embeddings.weight"),
                (Nemotron, "backbone.embeddings.weight"),
            ];
        }
        Part::FinalNorm => {
            return &[
                (Common, "model.norm.weight"),
                (Dbrx, "transformer.norm_f.weight"),
                (Nemotron, "backbone.norm_f.weight"),
            ];
        }
        Part::FinalNormBias => return &[(Common, "model.norm.bias")],
        Part::LmHead => return &[(Common, "lm_head.weight")],
        Part::LmHeadBias => return &[(Common, "lm_head.bias")],
        Part::Layer(_, part) => part,
    };
    match part {
        InputNorm => &[
            (Common, "input_layernorm.weight"),
            (Dbrx, "norm_attn_norm.norm_1.weight"),
            (Nemotron, "norm.weight"),
        ],
        InputNormBias => &[(Common, "input_layernorm.bias")],
        PostAttentionNormBias => &[(Common, "post_attention_layernorm.bias")],
        PostAttentionNorm => &[
            (Common, "post_attention_layernorm.weight"),
            (Dbrx, "norm_attn_norm.norm_2.weight"),
            (Gemma, "pre_feedforward_layernorm_2.weight"),
            (Nemotron, "norm.weight"),
        ],
        ResidualNorm => &[(Common, "residual_layernorm.weight"), (Gemma, "pre_feedforward_layernorm.weight")],
        OutNorm(Branch::Attention) => &[(Gemma, "post_attention_layernorm.weight")],
        OutNorm(Branch::Dense) => &[(Gemma, "post_feedforward_layernorm_1.weight")],
        OutNorm(Branch::Experts) => &[(Gemma, "post_feedforward_layernorm_2.weight")],
        OutNorm(Branch::Both) => &[(Gemma, "post_feedforward_layernorm.weight")],
        LayerScale => &[(Gemma, "layer_scalar")],

        Query => &[
            (Common, "self_attn.q_proj.weight"),
            (Nemotron, "mixer.q_proj.weight"),
            (Dbrx, "norm_attn_norm.attn.Wqkv.weight"),
            (Bailing, "attention.query_key_value.weight"),
        ],
        Key => &[
            (Common, "self_attn.k_proj.weight"),
            (Nemotron, "mixer.k_proj.weight"),
            (Dbrx, "norm_attn_norm.attn.Wqkv.weight"),
            (Bailing, "attention.query_key_value.weight"),
        ],
        Value => &[
            (Common, "self_attn.v_proj.weight"),
            (Nemotron, "mixer.v_proj.weight"),
            (Dbrx, "norm_attn_norm.attn.Wqkv.weight"),
            (Bailing, "attention.query_key_value.weight"),
        ],
        Output => &[
            (Common, "self_attn.o_proj.weight"),
            (Nemotron, "mixer.o_proj.weight"),
            (Dbrx, "norm_attn_norm.attn.out_proj.weight"),
            (Bailing, "attention.dense.weight"),
        ],
        QueryBias => &[(Common, "self_attn.q_proj.bias"), (Bailing, "attention.query_key_value.bias")],
        KeyBias => &[(Common, "self_attn.k_proj.bias"), (Bailing, "attention.query_key_value.bias")],
        ValueBias => &[(Common, "self_attn.v_proj.bias"), (Bailing, "attention.query_key_value.bias")],
        OutputBias => &[(Common, "self_attn.o_proj.bias"), (Bailing, "attention.dense.bias")],
        QueryNorm => &[
            (Common, "self_attn.q_norm.weight"),
            (Hunyuan, "self_attn.query_layernorm.weight"),
            (Bailing, "attention.query_layernorm.weight"),
        ],
        KeyNorm => &[
            (Common, "self_attn.k_norm.weight"),
            (Hunyuan, "self_attn.key_layernorm.weight"),
            (Bailing, "attention.key_layernorm.weight"),
        ],
        QueryDown => &[(Common, "self_attn.q_a_proj.weight")],
        QueryDownBias => &[(Common, "self_attn.q_a_proj.bias")],
        QueryDownNorm => &[(Common, "self_attn.q_a_layernorm.weight")],
        QueryUp => &[(Common, "self_attn.q_b_proj.weight")],
        KvDown => &[(Common, "self_attn.kv_a_proj_with_mqa.weight")],
        KvDownBias => &[(Common, "self_attn.kv_a_proj_with_mqa.bias")],
        KvDownNorm => &[(Common, "self_attn.kv_a_layernorm.weight")],
        KeyUp(_) | ValueUp(_) => &[(Common, "self_attn.kv_b_proj.weight")],

        State(_, StateRows::Query | StateRows::Key | StateRows::Value) => &[
            (Qwen, "linear_attn.in_proj_qkvz.weight"),
            (Qwen35, "linear_attn.in_proj_qkv.weight"),
            (Granite, "mamba.in_proj.weight"),
            (Nemotron, "mixer.in_proj.weight"),
        ],
        State(_, StateRows::Gate) => &[
            (Qwen, "linear_attn.in_proj_qkvz.weight"),
            (Qwen35, "linear_attn.in_proj_z.weight"),
            (Granite, "mamba.in_proj.weight"),
            (Nemotron, "mixer.in_proj.weight"),
        ],
        State(_, StateRows::Beta) => {
            &[(Qwen, "linear_attn.in_proj_ba.weight"), (Qwen35, "linear_attn.in_proj_b.weight")]
        }
        State(_, StateRows::Decay) => &[
            (Qwen, "linear_attn.in_proj_ba.weight"),
            (Qwen35, "linear_attn.in_proj_a.weight"),
            (Granite, "mamba.in_proj.weight"),
            (Nemotron, "mixer.in_proj.weight"),
        ],
        StateConv(..) => &[
            (Common, "linear_attn.conv1d.weight"),
            (Granite, "mamba.conv1d.weight"),
            (Nemotron, "mixer.conv1d.weight"),
        ],
        StateConvBias(..) => &[(Granite, "mamba.conv1d.bias"), (Nemotron, "mixer.conv1d.bias")],
        StateDecay => &[(Common, "linear_attn.A_log"), (Granite, "mamba.A_log"), (Nemotron, "mixer.A_log")],
        StateBias => {
            &[(Common, "linear_attn.dt_bias"), (Granite, "mamba.dt_bias"), (Nemotron, "mixer.dt_bias")]
        }
        StateSkip => &[(Granite, "mamba.D"), (Nemotron, "mixer.D")],
        StateNorm => &[
            (Common, "linear_attn.norm.weight"),
            (Granite, "mamba.norm.weight"),
            (Nemotron, "mixer.norm.weight"),
        ],
        StateOutput => &[
            (Common, "linear_attn.out_proj.weight"),
            (Granite, "mamba.out_proj.weight"),
            (Nemotron, "mixer.out_proj.weight"),
        ],

        Router => &[
            (Common, "mlp.gate.weight"),
            (Mixtral, "block_sparse_moe.gate.weight"),
            (Dbrx, "ffn.router.layer.weight"),
            (Hunyuan, "mlp.gate.wg.weight"),
            (HunyuanV3, "mlp.router.gate.weight"),
            (Gemma, "router.proj.weight"),
            (GptOss, "mlp.router.weight"),
            (Granite, "block_sparse_moe.router.layer.weight"),
            (Longcat, "mlp.router.classifier.weight"),
            (Llama4, "feed_forward.router.weight"),
            (Nemotron, "mixer.gate.weight"),
        ],
        RouterBias => &[(Common, "mlp.router.bias")],
        RouterScale => &[(Gemma, "router.scale")],
        ExpertScales => &[(Gemma, "router.per_expert_scale")],
        Sinks => &[(Common, "self_attn.sinks")],
        CorrectionBias => &[
            (Common, "mlp.gate.e_score_correction_bias"),
            (Mixtral, "block_sparse_moe.e_score_correction_bias"),
            (Ernie, "mlp.moe_statics.e_score_correction_bias"),
            (Bailing, "mlp.gate.expert_bias"),
            (HunyuanV3, "mlp.expert_bias"),
            (Exaone, "mlp.e_score_correction_bias"),
            (Longcat, "mlp.router.e_score_correction_bias"),
            (Nemotron, "mixer.gate.e_score_correction_bias"),
        ],
        Expert(_, GateProj) => &[
            (Common, "mlp.experts.{e}.gate_proj.weight"),
            (Mixtral, "block_sparse_moe.experts.{e}.w1.weight"),
            (Dbrx, "ffn.experts.mlp.w1"),
            (Merged, "mlp.experts.gate_up_proj"),
            (Qwen35, "mlp.experts.gate_up_proj"),
            (Gemma, "experts.gate_up_proj"),
            (GptOss, "mlp.experts.gate_up_proj"),
            (GptOssCoded, "mlp.experts.gate_up_proj"),
            (Granite, "block_sparse_moe.input_linear.weight"),
            (Llama4, "feed_forward.experts.gate_up_proj"),
            (Llama4, "feed_forward.experts.{e}.gate_proj.weight"),
        ],
        Expert(_, UpProj) => &[
            (Common, "mlp.experts.{e}.up_proj.weight"),
            (Nemotron, "mixer.experts.{e}.up_proj.weight"),
            (Mixtral, "block_sparse_moe.experts.{e}.w3.weight"),
            (Dbrx, "ffn.experts.mlp.v1"),
            (Merged, "mlp.experts.gate_up_proj"),
            (Qwen35, "mlp.experts.gate_up_proj"),
            (Gemma, "experts.gate_up_proj"),
            (GptOss, "mlp.experts.gate_up_proj"),
            (GptOssCoded, "mlp.experts.gate_up_proj"),
            (Granite, "block_sparse_moe.input_linear.weight"),
            (Llama4, "feed_forward.experts.gate_up_proj"),
            (Llama4, "feed_forward.experts.{e}.up_proj.weight"),
        ],
        Expert(_, DownProj) => &[
            (Common, "mlp.experts.{e}.down_proj.weight"),
            (Nemotron, "mixer.experts.{e}.down_proj.weight"),
            (Mixtral, "block_sparse_moe.experts.{e}.w2.weight"),
            (Dbrx, "ffn.experts.mlp.w2"),
            (Merged, "mlp.experts.down_proj"),
            (Qwen35, "mlp.experts.down_proj"),
            (Gemma, "experts.down_proj"),
            (GptOss, "mlp.experts.down_proj"),
            (GptOssCoded, "mlp.experts.down_proj"),
            (Granite, "block_sparse_moe.output_linear.weight"),
            (Llama4, "feed_forward.experts.down_proj"),
            (Llama4, "feed_forward.experts.{e}.down_proj.weight"),
        ],
        ExpertBias(_, GateProj | UpProj) => &[(Common, "mlp.experts.gate_up_proj_bias")],
        ExpertBias(_, DownProj) => &[(Common, "mlp.experts.down_proj_bias")],
        Shared(GateProj) => &[
            (Common, "mlp.shared_experts.gate_proj.weight"),
            (Qwen, "mlp.shared_expert.gate_proj.weight"),
            (Qwen35, "mlp.shared_expert.gate_proj.weight"),
            (Hunyuan, "mlp.shared_mlp.gate_proj.weight"),
            (HunyuanV3, "mlp.shared_mlp.gate_proj.weight"),
            (Granite, "shared_mlp.input_linear.weight"),
            (Longcat, "mlps.gate_proj.weight"),
            (Llama4, "feed_forward.shared_expert.gate_proj.weight"),
        ],
        Shared(UpProj) => &[
            (Common, "mlp.shared_experts.up_proj.weight"),
            (Nemotron, "mixer.shared_experts.up_proj.weight"),
            (Qwen, "mlp.shared_expert.up_proj.weight"),
            (Qwen35, "mlp.shared_expert.up_proj.weight"),
            (Hunyuan, "mlp.shared_mlp.up_proj.weight"),
            (HunyuanV3, "mlp.shared_mlp.up_proj.weight"),
            (Granite, "shared_mlp.input_linear.weight"),
            (Longcat, "mlps.up_proj.weight"),
            (Llama4, "feed_forward.shared_expert.up_proj.weight"),
        ],
        Shared(DownProj) => &[
            (Common, "mlp.shared_experts.down_proj.weight"),
            (Nemotron, "mixer.shared_experts.down_proj.weight"),
            (Qwen, "mlp.shared_expert.down_proj.weight"),
            (Qwen35, "mlp.shared_expert.down_proj.weight"),
            (Hunyuan, "mlp.shared_mlp.down_proj.weight"),
            (HunyuanV3, "mlp.shared_mlp.down_proj.weight"),
            (Granite, "shared_mlp.output_linear.weight"),
            (Longcat, "mlps.down_proj.weight"),
            (Llama4, "feed_forward.shared_expert.down_proj.weight"),
        ],
        SharedExpertGate => &[(Common, "mlp.shared_expert_gate.weight")],
        Dense(GateProj) => &[
            (Common, "mlp.gate_proj.weight"),
            (Mixtral, "block_sparse_moe.mlp.w1.weight"),
            (Longcat, "mlps.gate_proj.weight"),
            (Llama4, "feed_forward.gate_proj.weight"),
        ],
        Dense(UpProj) => &[
            (Common, "mlp.up_proj.weight"),
            (Nemotron, "mixer.up_proj.weight"),
            (Mixtral, "block_sparse_moe.mlp.w3.weight"),
            (Longcat, "mlps.up_proj.weight"),
            (Llama4, "feed_forward.up_proj.weight"),
        ],
        Dense(DownProj) => &[
            (Common, "mlp.down_proj.weight"),
            (Nemotron, "mixer.down_proj.weight"),
            (Mixtral, "block_sparse_moe.mlp.w2.weight"),
            (Longcat, "mlps.down_proj.weight"),
            (Llama4, "feed_forward.down_proj.weight"),
        ],
        Residual(GateProj) => &[(Common, "residual_mlp.w1.weight"), (Gemma, "mlp.gate_proj.weight")],
        Residual(UpProj) => &[(Common, "residual_mlp.w3.weight"), (Gemma, "mlp.up_proj.weight")],
        Residual(DownProj) => &[(Common, "residual_mlp.w2.weight"), (Gemma, "mlp.down_proj.weight")],
    }
}
