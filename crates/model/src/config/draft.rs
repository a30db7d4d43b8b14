//! What architectures share: sizes, defaults, and the parts that every configuration has.

use super::keys::*;
use super::rope::Rope;
use crate::Architecture;
use crate::spec::*;
use epsmoe_base::DType;
use epsmoe_device::op::{NormKind, RopeStyle, Score, Sight, TopKRouter};
use serde_json::Value;

/// What a config may leave out.
pub(super) struct Defaults {
    pub(super) vocab: usize,
    pub(super) hidden: usize,
    pub(super) inner: usize,
    pub(super) layers: usize,
    pub(super) heads: usize,
    /// As many as heads when absent.
    pub(super) kv_heads: Option<usize>,
    pub(super) experts: usize,
    pub(super) top_k: usize,
    pub(super) positions: usize,
    pub(super) eps: f64,
    pub(super) theta: f64,
    pub(super) bos: Option<u32>,
    pub(super) eos: Option<u32>,
}

/// A model being read: the keys, what they may leave out, and the sizes that every architecture has.
pub(super) struct Draft<'a> {
    pub(super) keys: &'a Keys<'a>,
    pub(super) defaults: &'a Defaults,
    pub(super) hidden: usize,
    /// Inner width of a dense MLP.
    pub(super) inner: usize,
    pub(super) layers: usize,
    pub(super) heads: usize,
    pub(super) positions: usize,
}

/// A layer but for its attention; see [`LayerSpec`].
pub(super) struct DraftLayer {
    pub(super) sight: Sight,
    pub(super) rope: Option<usize>,
    pub(super) mlp: MlpSpec,
    pub(super) residual_mlp: Option<usize>,
    pub(super) sandwich: bool,
    pub(super) late_experts: bool,
}

impl DraftLayer {
    /// A layer that sees everything and knows no positions.
    pub(super) fn without_positions(mlp: MlpSpec) -> Self {
        DraftLayer {
            sight: Sight::All,
            rope: None,
            mlp,
            residual_mlp: None,
            sandwich: false,
            late_experts: false,
        }
    }
}

impl<'a> Draft<'a> {
    pub(super) fn new(keys: &'a Keys<'a>, defaults: &'a Defaults) -> Checked<Self> {
        Ok(Draft {
            keys,
            defaults,
            hidden: keys.whole("hidden_size", WIDTH)?.unwrap_or(defaults.hidden),
            inner: keys.whole("intermediate_size", WIDTH)?.unwrap_or(defaults.inner),
            layers: keys.whole("num_hidden_layers", LAYERS)?.unwrap_or(defaults.layers),
            heads: keys.whole("num_attention_heads", HEADS)?.unwrap_or(defaults.heads),
            positions: keys.whole("max_position_embeddings", POSITIONS)?.unwrap_or(defaults.positions),
        })
    }

    /// A model of RMS norms and half-split rotary embedding over whole heads.
    pub(super) fn grouped_model(
        &self,
        names: (Architecture, TensorNames),
        attention: GqaSpec,
        layers: Vec<DraftLayer>,
    ) -> Checked<ModelSpec> {
        self.partial_model(names, attention, layers, None)
    }

    /// The same over a part of each head, by default the `usual` one.
    pub(super) fn partial_model(
        &self,
        (architecture, naming): (Architecture, TensorNames),
        attention: GqaSpec,
        layers: Vec<DraftLayer>,
        usual: Option<f64>,
    ) -> Checked<ModelSpec> {
        // GGUF keeps rows of some models in pairs that turn together, and then says so.
        let interleaved = self.keys.flag("rope_interleave")?.unwrap_or(false);
        let style = if interleaved { RopeStyle::Interleaved } else { RopeStyle::HalfSplit };
        let rope = self.rope(self.rotated(attention.head_dim, usual)?, style, self.theta()?)?;
        let attention = AttentionSpec::Gqa(attention);
        self.complete((architecture, naming), NormKind::Rms, Some(rope), layers, |_| attention)
    }

    /// The parts that differ, with those that every config has; `attention` is that of each layer, some of which turn by `rope`.
    pub(super) fn complete(
        &self,
        (architecture, naming): (Architecture, TensorNames),
        norm: NormKind,
        rope: Option<Rope>,
        layers: Vec<DraftLayer>,
        attention: impl Fn(usize) -> AttentionSpec,
    ) -> Checked<ModelSpec> {
        let (keys, defaults) = (self.keys, self.defaults);
        let vocab = keys.whole("vocab_size", VOCABULARY)?.unwrap_or(defaults.vocab);
        let eps = keys.number("rms_norm_eps", EPSILON)?.unwrap_or(defaults.eps) as f32;
        let layers = layers.into_iter().enumerate().map(|(index, layer)| LayerSpec {
            attention: attention(index),
            sight: layer.sight,
            rope: layer.rope,
            mlp: layer.mlp,
            residual_mlp: layer.residual_mlp,
            sandwich: layer.sandwich,
            late_experts: layer.late_experts,
        });
        Ok(ModelSpec {
            architecture,
            naming,
            nesting: Nesting::Alone,
            vocab,
            hidden: self.hidden,
            max_positions: rope.as_ref().map_or(self.positions, |rope| rope.positions),
            norm: NormSpec { kind: norm, bias: false, eps, less_one: false },
            ropes: rope.into_iter().map(|rope| rope.spec).collect(),
            layers: layers.collect(),
            factors: Factors::default(),
            tie_embeddings: keys.flag("tie_word_embeddings")?.unwrap_or(false),
            head_bias: false,
            dtype: dtype(keys),
            bos: special(keys, "bos_token_id", vocab, defaults.bos).first().copied(),
            eos: special(keys, "eos_token_id", vocab, defaults.eos),
        })
    }

    /// Key and value heads where the key is at the top.
    pub(super) fn kv_heads(&self) -> Checked<usize> {
        const KEY: &str = "num_key_value_heads";
        let default = if self.keys.is_null(KEY) { None } else { self.defaults.kv_heads };
        Ok(self.keys.whole(KEY, HEADS)?.or(default).unwrap_or(self.heads))
    }

    /// Grouped-query attention with neither bias, norm, clip nor window.
    pub(super) fn grouped(&self, kv_heads: usize) -> Checked<GqaSpec> {
        let head_dim = match self.keys.whole("head_dim", HEAD_WIDTH)? {
            Some(given) => given,
            None => {
                divides(("the number of heads", self.heads), ("the hidden size", self.hidden))?;
                self.hidden / self.heads
            }
        };
        self.grouped_of(kv_heads, head_dim)
    }

    /// The same with heads of a width.
    pub(super) fn grouped_of(&self, kv_heads: usize, head_dim: usize) -> Checked<GqaSpec> {
        divides(("the number of key and value heads", kv_heads), ("the number of heads", self.heads))?;
        Ok(GqaSpec {
            heads: self.heads,
            kv_heads,
            head_dim,
            qkv_bias: false,
            output_bias: false,
            qk_norm: None,
            norm_after_rope: false,
            clip_qkv: None,
            sinks: false,
            gated: false,
            value_norm: false,
            values_are_keys: false,
            scale: (head_dim as f64).powf(-0.5) as f32,
        })
    }

    /// Experts of some width behind the commonest router: softmax over all, the best taken, their weights
    /// divided by their sum.
    pub(super) fn moe(&self, inner: usize) -> Checked<MoeSpec> {
        let experts = self.keys.whole("num_experts", EXPERTS)?.unwrap_or(self.defaults.experts);
        let top_k = top_k(self.keys, "num_experts_per_tok", self.defaults.top_k, experts)?;
        Ok(softmax_moe(experts, inner, top_k))
    }

    /// Layers without residual MLPs, dense where they are no mixture.
    pub(super) fn layers(&self, moe: &MoeSpec, is_moe: impl Fn(usize) -> bool) -> Vec<DraftLayer> {
        let inner = self.inner;
        let mlp = |index| {
            if is_moe(index) { MlpSpec::Moe(moe.clone()) } else { MlpSpec::Dense { inner, activation: None } }
        };
        let layer = |index| DraftLayer { rope: Some(0), ..DraftLayer::without_positions(mlp(index)) };
        (0..self.layers).map(layer).collect()
    }

    /// The same, each layer with the window of `sliding_window`, if there is one.
    pub(super) fn windowed(&self, mut layers: Vec<DraftLayer>) -> Checked<Vec<DraftLayer>> {
        let sight = self.keys.whole("sliding_window", POSITIONS)?.map_or(Sight::All, Sight::Last);
        layers.iter_mut().for_each(|layer| layer.sight = sight);
        Ok(layers)
    }

    /// Those of some layers: which, `layer_types` says, or `usual` for the number of a layer.
    pub(super) fn windowed_by_type(
        &self,
        mut layers: Vec<DraftLayer>,
        usual: impl Fn(usize) -> bool,
    ) -> Checked<Vec<DraftLayer>> {
        const KINDS: [&str; 2] = ["full_attention", "sliding_attention"];
        let kinds = self.keys.list("layer_types")?;
        if let Some(other) = kinds.iter().find(|kind| !KINDS.map(Some).contains(&kind.as_str())) {
            let other = shown(other);
            return wrong(format!("`layer_types` has {other}; supported are {} and {}", KINDS[0], KINDS[1]));
        }
        if !kinds.is_empty() && kinds.len() < layers.len() {
            return wrong(format!(
                "`layer_types` has {} entries for {} layers; {MEND}",
                kinds.len(),
                layers.len()
            ));
        }
        let window = self.keys.whole("sliding_window", POSITIONS)?;
        for (index, layer) in layers.iter_mut().enumerate() {
            let slides = kinds.get(index).map_or_else(|| usual(index), |kind| kind == KINDS[1]);
            if slides && window.is_none() {
                return wrong(format!(
                    "layer {index} has a sliding window, but `sliding_window` is missing; {MEND}"
                ));
            }
            layer.sight = window.filter(|_| slides).map_or(Sight::All, Sight::Last);
        }
        Ok(layers)
    }
}

/// The format that weights are computed in, if the file names one: its words are those of several libraries.
pub(super) fn known_dtype(keys: &Keys) -> Option<DType> {
    let word = keys.get("dtype")?.1.as_str()?.to_ascii_lowercase();
    match word.strip_prefix("torch.").unwrap_or(&word) {
        "bfloat16" | "bf16" => Some(DType::BF16),
        "float16" | "fp16" | "f16" | "half" => Some(DType::F16),
        "float32" | "fp32" | "f32" | "float" => Some(DType::F32),
        _ => None,
    }
}

/// The same, float32 where there is none; other words only inform.
fn dtype(keys: &Keys) -> DType {
    known_dtype(keys).unwrap_or_else(|| {
        if let Some((name, value)) = keys.get("dtype").filter(|(_, value)| value.as_str() != Some("auto")) {
            let value = shown(value);
            keys.remark(format!(
                "`{name}` is {value}, which is ignored: the stored weights say what they are"
            ));
        }
        DType::F32
    })
}

/// One token id or a list of them. Ids that can never come are left out: they only inform.
fn special(keys: &Keys, key: &'static str, vocab: usize, default: Option<u32>) -> Vec<u32> {
    let Some((_, value)) = keys.get(key) else {
        return default.filter(|&id| !keys.is_null(key) && (id as usize) < vocab).into_iter().collect();
    };
    let given = value.as_array().map_or(std::slice::from_ref(value), Vec::as_slice);
    let id = |value: &Value| whole(value).filter(|&id| id < vocab).map(|id| id as u32);
    if let Some(odd) = given.iter().find(|value| id(value).is_none()) {
        let last = vocab - 1;
        keys.remark(format!("`{key}` has {}, which is ignored: token ids go from 0 to {last}", shown(odd)));
    }
    given.iter().filter_map(id).collect()
}

pub(super) fn divides(small: (&str, usize), large: (&str, usize)) -> Checked<()> {
    if large.1.is_multiple_of(small.1) {
        return Ok(());
    }
    wrong(format!("{} ({}) is no multiple of {} ({}); {MEND}", large.0, large.1, small.0, small.1))
}

pub(super) fn clip(keys: &Keys) -> Checked<Option<f32>> {
    Ok(keys.number("clip_qkv", FACTOR)?.map(|clip| clip as f32))
}

pub(super) fn top_k(keys: &Keys, key: &'static str, default: usize, experts: usize) -> Checked<usize> {
    match keys.whole(key, 1..=experts)? {
        Some(top_k) => Ok(top_k),
        None if default <= experts => Ok(default),
        None => wrong(format!(
            "`{key}` is absent and its default, {default}, is more than the {experts} experts; {MEND}"
        )),
    }
}

pub(super) fn softmax_moe(experts: usize, inner: usize, top_k: usize) -> MoeSpec {
    let router = TopKRouter { top_k, score: Score::Softmax, groups: None, normalise: true, scale: 1.0 };
    MoeSpec {
        experts,
        inner,
        router,
        router_bias: false,
        correction_bias: false,
        activation: None,
        expert_bias: false,
        router_scale: false,
        expert_scales: false,
        shared: None,
        identities: 0,
        scaled_inputs: false,
    }
}

pub(super) fn normalised_if_asked(keys: &Keys, mut moe: MoeSpec) -> Checked<MoeSpec> {
    moe.router.normalise = keys.flag("norm_topk_prob")?.unwrap_or(false);
    Ok(moe)
}
