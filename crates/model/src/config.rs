//! A Hugging Face config.json becomes a [`ModelSpec`]: old and new key styles, every number checked, nothing
//! that would change results passed over in silence.

use crate::checkpoint::read_small;
use crate::spec::*;
use crate::{Architecture, ModelError};
use epsmoe_base::DType;
use epsmoe_device::op::{GroupLimit, GroupScore, NormKind, RopeStyle, Score, TopKRouter};
use serde_json::{Map, Value};
use std::f64::consts::PI;
use std::fmt::Display;
use std::ops::RangeInclusive;
use std::path::Path;

const FILE: &str = "config.json";
const FILE_LIMIT: u64 = 16 << 20;
const MEND: &str = "correct it or fetch the file again";
const ACTIVATIONS: [&str; 2] = ["silu", "swish"];

// Bounds that no published model comes near, chosen so that no product of sizes overflows.
const VOCABULARY: RangeInclusive<usize> = 1..=1 << 24;
const WIDTH: RangeInclusive<usize> = 1..=1 << 20;
const HEADS: RangeInclusive<usize> = 1..=4096;
const HEAD_WIDTH: RangeInclusive<usize> = 1..=1 << 14;
const LAYERS: RangeInclusive<usize> = 1..=1024;
const EXPERTS: RangeInclusive<usize> = 1..=65_535;
const POSITIONS: RangeInclusive<usize> = 1..=1 << 30;
const EPSILON: RangeInclusive<f64> = 1e-30..=1.0;
const FACTOR: RangeInclusive<f64> = 1e-6..=1e6;
const THETA: RangeInclusive<f64> = 1.0..=1e12;
const STRETCH: RangeInclusive<f64> = 1.0..=1e6;
const MOST_EXPERTS_IN_ALL: usize = 1 << 20;

/// Other names of a key, in the order they are tried.
const SYNONYMS: [(&str, &[&str]); 6] = [
    ("hidden_size", &["d_model"]),
    ("num_attention_heads", &["n_heads"]),
    ("num_hidden_layers", &["n_layers"]),
    ("max_position_embeddings", &["max_seq_len"]),
    ("num_experts", &["num_local_experts", "n_routed_experts"]),
    ("dtype", &["torch_dtype"]),
];

/// Reads the config.json of a model's folder.
pub fn read(folder: &Path) -> Result<ModelSpec, ModelError> {
    let path = folder.join(FILE);
    let text = read_small(&path, FILE_LIMIT)?;
    parse(&text, &path.display().to_string())
}

/// Reads the text of a config.json; `file` is its name in messages.
pub fn parse(text: &[u8], file: &str) -> Result<ModelSpec, ModelError> {
    build(text).map_err(|Wrong(problem)| ModelError::Config { file: file.to_owned(), problem })
}

/// What is wrong and how to mend it.
struct Wrong(String);

type Checked<T> = Result<T, Wrong>;

fn wrong<T>(problem: impl Into<String>) -> Checked<T> {
    Err(Wrong(problem.into()))
}

fn build(text: &[u8]) -> Checked<ModelSpec> {
    let value: Value = serde_json::from_slice(text)
        .map_err(|error| Wrong(format!("this is not valid JSON ({error}); fetch the file again")))?;
    let Value::Object(map) = value else {
        return wrong("this is not a JSON object; fetch the file again");
    };
    let keys = Keys { map: Some(&map), section: "" };
    let architecture = architecture(&keys)?;
    refuse_unsupported(&keys)?;
    let spec = match architecture {
        Architecture::Mixtral => mixtral(&keys),
        Architecture::DeepseekV2 => deepseek_v2(&keys),
        Architecture::DeepseekV3 => deepseek_v3(&keys),
        Architecture::Dbrx => dbrx(&keys),
        Architecture::Qwen2Moe => qwen2(&keys),
        Architecture::Qwen3Moe => qwen3(&keys),
        Architecture::Olmoe => olmoe(&keys),
        Architecture::Arctic => arctic(&keys),
    }?;
    let experts: usize = spec.layers.iter().filter_map(|layer| layer.mlp.moe()).map(|moe| moe.experts).sum();
    if experts > MOST_EXPERTS_IN_ALL {
        return wrong(format!(
            "all layers together have {experts} experts, of at most {MOST_EXPERTS_IN_ALL}"
        ));
    }
    Ok(spec)
}

fn architecture(keys: &Keys) -> Checked<Architecture> {
    let class = match keys.get("architectures").map(|(_, value)| value) {
        Some(Value::Array(classes)) => classes.first().and_then(Value::as_str),
        _ => None,
    };
    let name = match class {
        Some(class) => class,
        None => keys.word("model_type")?.unwrap_or("none"),
    };
    let known =
        Architecture::ALL.into_iter().find(|known| [known.names().0, known.names().1].contains(&name));
    known.map_or_else(
        || {
            let all = Architecture::ALL.map(|known| known.to_string()).join(", ");
            wrong(format!("architecture `{name}` is not supported; supported are {all}"))
        },
        Ok,
    )
}

/// What would change results if it were passed over.
fn refuse_unsupported(keys: &Keys) -> Checked<()> {
    for key in ["quantization_config", "quantization"] {
        if let Some((_, value)) = keys.get(key) {
            let method = value.get("quant_method").and_then(Value::as_str).unwrap_or("unknown");
            return wrong(format!(
                "`{key}` ({method}) is not supported; use an unquantised (bfloat16) version of the model"
            ));
        }
    }
    keys.only("hidden_act", &ACTIVATIONS)?;
    if let Some(part) = keys.number("partial_rotary_factor", 0.0..=1.0)?
        && part != 1.0
    {
        return wrong(format!("`partial_rotary_factor` is {part}; only 1 is supported"));
    }
    for key in ["use_sliding_window", "mlp_bias"] {
        if keys.flag(key)?.unwrap_or(false) {
            return wrong(format!("`{key}` is true, which is not supported"));
        }
    }
    let other = keys.list("layer_types")?.iter().find(|kind| kind.as_str() != Some("full_attention"));
    other.map_or(Ok(()), |kind| {
        wrong(format!("`layer_types` has {kind}; only \"full_attention\" in every layer is supported"))
    })
}

// ---- keys --------------------------------------------------------------------------------------------------

/// The keys of a section; null counts as absent.
struct Keys<'a> {
    map: Option<&'a Map<String, Value>>,
    /// Prefix of its keys in messages.
    section: &'static str,
}

impl<'a> Keys<'a> {
    /// A value and the name it was found under.
    fn get(&self, key: &'static str) -> Option<(&'static str, &'a Value)> {
        let synonyms = SYNONYMS.iter().find(|(name, _)| *name == key).map_or(&[][..], |(_, others)| others);
        [&[key], synonyms]
            .concat()
            .into_iter()
            .find_map(|name| self.map?.get(name).filter(|value| !value.is_null()).map(|value| (name, value)))
    }

    fn is_null(&self, key: &str) -> bool {
        self.map.and_then(|map| map.get(key)).is_some_and(Value::is_null)
    }

    fn section(&self, key: &'static str, prefix: &'static str) -> Checked<Keys<'a>> {
        let map = self.read(key, "a JSON object", Value::as_object)?;
        Ok(Keys { map, section: prefix })
    }

    fn whole(&self, key: &'static str, allowed: RangeInclusive<usize>) -> Checked<Option<usize>> {
        let what = format!("a whole number from {} to {}", allowed.start(), allowed.end());
        self.read(key, what, |value| {
            value
                .as_u64()
                .and_then(|number| usize::try_from(number).ok())
                .filter(|number| allowed.contains(number))
        })
    }

    fn number(&self, key: &'static str, allowed: RangeInclusive<f64>) -> Checked<Option<f64>> {
        let what = format!("a number from {} to {}", allowed.start(), allowed.end());
        self.read(key, what, |value| value.as_f64().filter(|number| allowed.contains(number)))
    }

    fn flag(&self, key: &'static str) -> Checked<Option<bool>> {
        self.read(key, "true or false", Value::as_bool)
    }

    fn word(&self, key: &'static str) -> Checked<Option<&'a str>> {
        self.read(key, "a string", Value::as_str)
    }

    /// A list; none is an empty one.
    fn list(&self, key: &'static str) -> Checked<&'a [Value]> {
        Ok(self.read(key, "a list", |value| value.as_array().map(Vec::as_slice))?.unwrap_or_default())
    }

    /// A word that must be one of some, if it is given.
    fn only(&self, key: &'static str, supported: &[&str]) -> Checked<()> {
        let what = format!("`{}`, the only kind supported", supported[0]);
        let fits = |value: &Value| value.as_str().is_some_and(|word| supported.contains(&word)).then_some(());
        self.read(key, what, fits).map(|_| ())
    }

    fn read<T>(
        &self,
        key: &'static str,
        allowed: impl Display,
        convert: impl FnOnce(&'a Value) -> Option<T>,
    ) -> Checked<Option<T>> {
        let Some((name, value)) = self.get(key) else { return Ok(None) };
        match convert(value) {
            Some(converted) => Ok(Some(converted)),
            None => wrong(format!(
                "`{}{name}` is {}, but must be {allowed}; {MEND}",
                self.section,
                shortened(value)
            )),
        }
    }
}

/// A value for a message, of bearable length.
fn shortened(value: &Value) -> String {
    const LONGEST: usize = 60;
    let text = value.to_string();
    if text.chars().count() <= LONGEST {
        text
    } else {
        text.chars().take(LONGEST).chain("…".chars()).collect()
    }
}

// ---- what architectures share ------------------------------------------------------------------------

/// What a config may leave out.
struct Defaults {
    vocab: usize,
    hidden: usize,
    inner: usize,
    layers: usize,
    heads: usize,
    /// As many as heads when absent.
    kv_heads: Option<usize>,
    experts: usize,
    top_k: usize,
    positions: usize,
    eps: f64,
    theta: f64,
    bos: Option<u32>,
    eos: Option<u32>,
}

/// A model being read: the keys, what they may leave out, and the sizes that every architecture has.
struct Draft<'a> {
    keys: &'a Keys<'a>,
    defaults: &'a Defaults,
    hidden: usize,
    /// Inner width of a dense MLP.
    inner: usize,
    layers: usize,
    heads: usize,
    positions: usize,
}

impl<'a> Draft<'a> {
    fn new(keys: &'a Keys<'a>, defaults: &'a Defaults) -> Checked<Self> {
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
    fn grouped_model(
        &self,
        (architecture, naming): (Architecture, TensorNames),
        attention: GqaSpec,
        layers: Vec<LayerSpec>,
    ) -> Checked<ModelSpec> {
        let rope = self.rope(attention.head_dim, RopeStyle::HalfSplit, self.theta()?)?.spec;
        self.complete((architecture, naming), NormKind::Rms, AttentionSpec::Gqa(attention), rope, layers)
    }

    /// The parts that differ, with those that every config has.
    fn complete(
        &self,
        (architecture, naming): (Architecture, TensorNames),
        norm: NormKind,
        attention: AttentionSpec,
        rope: RopeSpec,
        layers: Vec<LayerSpec>,
    ) -> Checked<ModelSpec> {
        let (keys, defaults) = (self.keys, self.defaults);
        let vocab = keys.whole("vocab_size", VOCABULARY)?.unwrap_or(defaults.vocab);
        let eps = keys.number("rms_norm_eps", EPSILON)?.unwrap_or(defaults.eps) as f32;
        Ok(ModelSpec {
            architecture,
            naming,
            vocab,
            hidden: self.hidden,
            max_positions: self.positions,
            norm: NormSpec { kind: norm, eps },
            attention,
            rope,
            layers,
            tie_embeddings: keys.flag("tie_word_embeddings")?.unwrap_or(false),
            dtype: dtype(keys)?,
            bos: special(keys, "bos_token_id", vocab, defaults.bos)?.first().copied(),
            eos: special(keys, "eos_token_id", vocab, defaults.eos)?,
        })
    }

    /// Key and value heads where the key is at the top.
    fn kv_heads(&self) -> Checked<usize> {
        const KEY: &str = "num_key_value_heads";
        let default = if self.keys.is_null(KEY) { None } else { self.defaults.kv_heads };
        Ok(self.keys.whole(KEY, HEADS)?.or(default).unwrap_or(self.heads))
    }

    /// Grouped-query attention with neither bias, norm, clip nor window.
    fn grouped(&self, kv_heads: usize) -> Checked<GqaSpec> {
        divides(("the number of key and value heads", kv_heads), ("the number of heads", self.heads))?;
        let head_dim = match self.keys.whole("head_dim", HEAD_WIDTH)? {
            Some(given) => given,
            None => {
                divides(("the number of heads", self.heads), ("the hidden size", self.hidden))?;
                self.hidden / self.heads
            }
        };
        Ok(GqaSpec {
            heads: self.heads,
            kv_heads,
            head_dim,
            qkv_bias: false,
            output_bias: false,
            qk_norm: None,
            clip_qkv: None,
            sliding_window: None,
            scale: (head_dim as f64).powf(-0.5) as f32,
        })
    }

    /// Experts of some width behind the commonest gate: softmax over all, the best taken, their weights
    /// divided by their sum.
    fn moe(&self, inner: usize) -> Checked<MoeSpec> {
        let experts = self.keys.whole("num_experts", EXPERTS)?.unwrap_or(self.defaults.experts);
        let top_k = top_k(self.keys, "num_experts_per_tok", self.defaults.top_k, experts)?;
        Ok(softmax_moe(experts, inner, top_k))
    }

    /// Layers without residual MLPs, dense where they are no mixture.
    fn layers(&self, moe: &MoeSpec, is_moe: impl Fn(usize) -> bool) -> Vec<LayerSpec> {
        let inner = self.inner;
        let mlp = |index| if is_moe(index) { MlpSpec::Moe(moe.clone()) } else { MlpSpec::Dense { inner } };
        (0..self.layers).map(|index| LayerSpec { mlp: mlp(index), residual_mlp: None }).collect()
    }
}

fn dtype(keys: &Keys) -> Checked<DType> {
    let convert = |value: &Value| match value.as_str()? {
        "bfloat16" => Some(DType::BF16),
        "float16" => Some(DType::F16),
        "float32" => Some(DType::F32),
        _ => None,
    };
    Ok(keys.read("dtype", "bfloat16, float16 or float32", convert)?.unwrap_or(DType::F32))
}

/// One token id or a list of them.
fn special(keys: &Keys, key: &'static str, vocab: usize, default: Option<u32>) -> Checked<Vec<u32>> {
    let id = |value: &Value| value.as_u64().filter(|&id| id < vocab as u64).map(|id| id as u32);
    let convert = |value: &Value| match value {
        Value::Array(ids) => ids.iter().map(id).collect(),
        single => id(single).map(|id| vec![id]),
    };
    let ids =
        keys.read(key, format!("a token id below the vocabulary's {vocab}, or a list of them"), convert)?;
    let default = default.filter(|&id| !keys.is_null(key) && (id as usize) < vocab);
    Ok(ids.unwrap_or_else(|| default.into_iter().collect()))
}

fn divides(small: (&str, usize), large: (&str, usize)) -> Checked<()> {
    if large.1.is_multiple_of(small.1) {
        return Ok(());
    }
    wrong(format!("{} ({}) is no multiple of {} ({}); {MEND}", large.0, large.1, small.0, small.1))
}

fn clip(keys: &Keys) -> Checked<Option<f32>> {
    Ok(keys.number("clip_qkv", FACTOR)?.map(|clip| clip as f32))
}

fn top_k(keys: &Keys, key: &'static str, default: usize, experts: usize) -> Checked<usize> {
    match keys.whole(key, 1..=experts)? {
        Some(top_k) => Ok(top_k),
        None if default <= experts => Ok(default),
        None => wrong(format!(
            "`{key}` is absent and its default, {default}, is more than the {experts} experts; {MEND}"
        )),
    }
}

fn softmax_moe(experts: usize, inner: usize, top_k: usize) -> MoeSpec {
    let gate = TopKRouter { top_k, score: Score::Softmax, groups: None, normalise: true, scale: 1.0 };
    MoeSpec { experts, inner, gate, correction_bias: false, shared: None }
}

// ---- rotary embedding --------------------------------------------------------------------------------

/// Rotary embedding, and the factor that yarn puts on the scores of latent attention.
struct Rope {
    spec: RopeSpec,
    score_factor: f64,
}

/// The section that describes scaling: the old key, when it is set, replaces the new one.
fn rope_section<'a>(keys: &Keys<'a>) -> Checked<Keys<'a>> {
    match keys.get("rope_scaling") {
        Some(_) => keys.section("rope_scaling", "rope_scaling."),
        None => keys.section("rope_parameters", "rope_parameters."),
    }
}

impl Draft<'_> {
    fn theta(&self) -> Checked<f64> {
        let inside = rope_section(self.keys)?.number("rope_theta", THETA)?;
        Ok(inside.or(self.keys.number("rope_theta", THETA)?).unwrap_or(self.defaults.theta))
    }

    fn rope(&self, dim: usize, style: RopeStyle, theta: f64) -> Checked<Rope> {
        if dim % 2 == 1 {
            return wrong(format!("the rotated part of a head is {dim} wide, but must be even; {MEND}"));
        }
        let section = rope_section(self.keys)?;
        if let Some(inner) = section.map.and_then(|map| map.iter().find(|(_, value)| value.is_object())) {
            return wrong(format!(
                "`{}{}` is a section; one embedding for all layers is supported",
                section.section, inner.0
            ));
        }
        let kind = section.word("rope_type")?.or(section.word("type")?).unwrap_or("default");
        let plain = inverse_frequencies(dim, theta);
        let (inverse_frequencies, attention_factor, score_factor) = match kind {
            "default" => (plain, 1.0, 1.0),
            "linear" => {
                let factor = required_factor(&section)? as f32;
                (plain.into_iter().map(|frequency| frequency / factor).collect(), 1.0, 1.0)
            }
            "yarn" => {
                let yarn = Yarn::read(&section, self.positions)?;
                (yarn.stretch(&plain, theta), yarn.attention_factor, yarn.score_factor)
            }
            other => {
                return wrong(format!(
                    "`{}rope_type` is \"{other}\", which is not supported; supported are default, linear and yarn",
                    section.section
                ));
            }
        };
        let spec = RopeSpec { style, dim, inverse_frequencies, attention_factor: attention_factor as f32 };
        Ok(Rope { spec, score_factor })
    }
}

fn required_factor(section: &Keys) -> Checked<f64> {
    let factor = section.number("factor", STRETCH)?;
    factor.map_or_else(|| wrong(format!("`{}factor` is missing; fetch the file again", section.section)), Ok)
}

/// `theta^(-2i/dim)`, rounded where the published models round: the power, then its inverse.
fn inverse_frequencies(dim: usize, theta: f64) -> Vec<f32> {
    let exponent = |i: usize| f64::from(2.0 * i as f32 / dim as f32);
    (0..dim / 2).map(|i| 1.0 / theta.powf(exponent(i)) as f32).collect()
}

/// Yarn (arXiv 2309.00071): slow dimensions are stretched by a factor, fast ones kept, those between blended.
struct Yarn {
    factor: f64,
    original_positions: f64,
    beta_fast: f64,
    beta_slow: f64,
    truncate: bool,
    attention_factor: f64,
    score_factor: f64,
}

impl Yarn {
    fn read(section: &Keys, positions: usize) -> Checked<Yarn> {
        let factor = required_factor(section)?;
        let nonzero = |key| section.number(key, 0.0..=1e6).map(|value| value.filter(|&value| value != 0.0));
        let (mscale, all_dim) = (nonzero("mscale")?, nonzero("mscale_all_dim")?);
        let default_attention_factor = match (mscale, all_dim) {
            (Some(mscale), Some(all_dim)) => magnitude(factor, mscale) / magnitude(factor, all_dim),
            _ => magnitude(factor, 1.0),
        };
        let original = section.whole("original_max_position_embeddings", POSITIONS)?.unwrap_or(positions);
        Ok(Yarn {
            factor,
            original_positions: original as f64,
            beta_fast: nonzero("beta_fast")?.unwrap_or(32.0),
            beta_slow: nonzero("beta_slow")?.unwrap_or(1.0),
            truncate: section.flag("truncate")?.unwrap_or(true),
            attention_factor: section.number("attention_factor", FACTOR)?.unwrap_or(default_attention_factor),
            score_factor: all_dim.map_or(1.0, |all_dim| magnitude(factor, all_dim).powi(2)),
        })
    }

    fn stretch(&self, plain: &[f32], theta: f64) -> Vec<f32> {
        let dim = 2.0 * plain.len() as f64;
        // The dimension that turns so many times within the original context.
        let dimension =
            |turns: f64| dim * (self.original_positions / (turns * 2.0 * PI)).ln() / (2.0 * theta.ln());
        let (mut low, mut high) = (dimension(self.beta_fast), dimension(self.beta_slow));
        if self.truncate {
            (low, high) = (low.floor(), high.ceil());
        }
        (low, high) = (low.max(0.0), high.min(dim - 1.0));
        if low == high {
            high += 0.001;
        }
        let (low, width, factor) = (low as f32, (high - low) as f32, self.factor as f32);
        let blend = |(i, &kept): (usize, &f32)| {
            let stretched = ((i as f32 - low) / width).clamp(0.0, 1.0);
            kept / factor * stretched + kept * (1.0 - stretched)
        };
        plain.iter().enumerate().map(blend).collect()
    }
}

/// How much larger scores must be when the context is `stretch` times as long.
fn magnitude(stretch: f64, scale: f64) -> f64 {
    if stretch <= 1.0 { 1.0 } else { 0.1 * scale * stretch.ln() + 1.0 }
}

// ---- architectures -----------------------------------------------------------------------------------

const MIXTRAL: Defaults = Defaults {
    vocab: 32_000,
    hidden: 4096,
    inner: 14_336,
    layers: 32,
    heads: 32,
    kv_heads: Some(8),
    experts: 8,
    top_k: 2,
    positions: 131_072,
    eps: 1e-5,
    theta: 1e6,
    bos: Some(1),
    eos: Some(2),
};

fn mixtral(keys: &Keys) -> Checked<ModelSpec> {
    let draft = Draft::new(keys, &MIXTRAL)?;
    let sliding_window = keys.whole("sliding_window", POSITIONS)?;
    let attention = GqaSpec { sliding_window, ..draft.grouped(draft.kv_heads()?)? };
    let layers = draft.layers(&draft.moe(draft.inner)?, |_| true);
    draft.grouped_model((Architecture::Mixtral, TensorNames::Mixtral), attention, layers)
}

const ARCTIC: Defaults = Defaults { kv_heads: None, top_k: 1, positions: 4096, ..MIXTRAL };

fn arctic(keys: &Keys) -> Checked<ModelSpec> {
    let draft = Draft::new(keys, &ARCTIC)?;
    let sliding_window = keys.whole("sliding_window", POSITIONS)?;
    let attention = GqaSpec { sliding_window, ..draft.grouped(draft.kv_heads()?)? };
    let every = keys.whole("moe_layer_frequency", LAYERS)?.unwrap_or(2);
    let mut layers = draft.layers(&draft.moe(draft.inner)?, |index| (index + 1).is_multiple_of(every));
    if keys.flag("parallel_attn_mlp_res")?.unwrap_or(false) {
        for layer in layers.iter_mut().filter(|layer| layer.mlp.moe().is_some()) {
            layer.residual_mlp = Some(draft.hidden);
        }
    }
    draft.grouped_model((Architecture::Arctic, TensorNames::Mixtral), attention, layers)
}

const QWEN2: Defaults = Defaults {
    vocab: 151_936,
    hidden: 2048,
    inner: 5632,
    layers: 24,
    heads: 16,
    kv_heads: Some(16),
    experts: 60,
    top_k: 4,
    positions: 32_768,
    eps: 1e-6,
    theta: 1e4,
    bos: None,
    eos: None,
};

fn qwen2(keys: &Keys) -> Checked<ModelSpec> {
    let draft = Draft::new(keys, &QWEN2)?;
    let qkv_bias = keys.flag("qkv_bias")?.unwrap_or(true);
    let attention = GqaSpec { qkv_bias, ..draft.grouped(draft.kv_heads()?)? };
    let shared = keys.whole("shared_expert_intermediate_size", WIDTH)?.unwrap_or(5632);
    let moe =
        MoeSpec { shared: Some(SharedSpec { inner: shared, gated: true }), ..qwen_experts(&draft, 1408)? };
    let layers = qwen_layers(&draft, &moe)?;
    draft.grouped_model((Architecture::Qwen2Moe, TensorNames::Qwen), attention, layers)
}

const QWEN3: Defaults =
    Defaults { inner: 6144, heads: 32, kv_heads: Some(4), experts: 128, top_k: 8, ..QWEN2 };

fn qwen3(keys: &Keys) -> Checked<ModelSpec> {
    let draft = Draft::new(keys, &QWEN3)?;
    let bias = keys.flag("attention_bias")?.unwrap_or(false);
    let attention = GqaSpec {
        qkv_bias: bias,
        output_bias: bias,
        qk_norm: Some(QkNorm::PerHead),
        ..draft.grouped(draft.kv_heads()?)?
    };
    let layers = qwen_layers(&draft, &qwen_experts(&draft, 768)?)?;
    draft.grouped_model((Architecture::Qwen3Moe, TensorNames::Common), attention, layers)
}

fn qwen_experts(draft: &Draft, default_inner: usize) -> Checked<MoeSpec> {
    let inner = draft.keys.whole("moe_intermediate_size", WIDTH)?.unwrap_or(default_inner);
    normalised_if_asked(draft.keys, draft.moe(inner)?)
}

fn normalised_if_asked(keys: &Keys, mut moe: MoeSpec) -> Checked<MoeSpec> {
    moe.gate.normalise = keys.flag("norm_topk_prob")?.unwrap_or(false);
    Ok(moe)
}

fn qwen_layers(draft: &Draft, moe: &MoeSpec) -> Checked<Vec<LayerSpec>> {
    let step = draft.keys.whole("decoder_sparse_step", LAYERS)?.unwrap_or(1);
    let index = |value: &Value| value.as_u64();
    let indices = |value: &Value| value.as_array()?.iter().map(index).collect::<Option<Vec<u64>>>();
    let dense = draft.keys.read("mlp_only_layers", "a list of layer numbers", indices)?.unwrap_or_default();
    Ok(draft.layers(moe, |layer| !dense.contains(&(layer as u64)) && (layer + 1).is_multiple_of(step)))
}

const OLMOE: Defaults = Defaults {
    vocab: 50_304,
    hidden: 2048,
    inner: 2048,
    layers: 16,
    heads: 16,
    kv_heads: None,
    experts: 64,
    top_k: 8,
    positions: 4096,
    eps: 1e-5,
    theta: 1e4,
    bos: None,
    eos: Some(50_279),
};

fn olmoe(keys: &Keys) -> Checked<ModelSpec> {
    let draft = Draft::new(keys, &OLMOE)?;
    let bias = keys.flag("attention_bias")?.unwrap_or(false);
    let attention = GqaSpec {
        qkv_bias: bias,
        output_bias: bias,
        qk_norm: Some(QkNorm::FullWidth),
        clip_qkv: clip(keys)?,
        ..draft.grouped(draft.kv_heads()?)?
    };
    let layers = draft.layers(&normalised_if_asked(keys, draft.moe(draft.inner)?)?, |_| true);
    draft.grouped_model((Architecture::Olmoe, TensorNames::Common), attention, layers)
}

const DBRX: Defaults = Defaults {
    vocab: 32_000,
    hidden: 2048,
    inner: 3584,
    layers: 24,
    heads: 16,
    kv_heads: Some(1),
    experts: 4,
    top_k: 1,
    positions: 2048,
    eps: 1e-5,
    theta: 1e4,
    bos: None,
    eos: None,
};

fn dbrx(keys: &Keys) -> Checked<ModelSpec> {
    let draft = Draft::new(keys, &DBRX)?;
    let attention_keys = keys.section("attn_config", "attn_config.")?;
    let kv_heads = attention_keys.whole("kv_n_heads", HEADS)?.or(DBRX.kv_heads).unwrap_or(1);
    let attention = GqaSpec { clip_qkv: clip(&attention_keys)?, ..draft.grouped(kv_heads)? };
    // Published configs have the base here; a library that reads it only at the top is wrong about them.
    let theta = attention_keys.number("rope_theta", THETA)?.map_or_else(|| draft.theta(), Ok)?;
    let rope = draft.rope(attention.head_dim, RopeStyle::HalfSplit, theta)?.spec;
    let layers = draft.layers(&dbrx_experts(&keys.section("ffn_config", "ffn_config.")?)?, |_| true);
    let attention = AttentionSpec::Gqa(attention);
    draft.complete((Architecture::Dbrx, TensorNames::Dbrx), NormKind::Layer, attention, rope, layers)
}

fn dbrx_experts(keys: &Keys) -> Checked<MoeSpec> {
    keys.section("ffn_act_fn", "ffn_config.ffn_act_fn.")?.only("name", &ACTIVATIONS)?;
    let experts = keys.whole("moe_num_experts", EXPERTS)?.unwrap_or(DBRX.experts);
    let inner = keys.whole("ffn_hidden_size", WIDTH)?.unwrap_or(DBRX.inner);
    let mut moe = softmax_moe(experts, inner, top_k(keys, "moe_top_k", DBRX.top_k, experts)?);
    const NORMALISE: &str = "moe_normalize_expert_weights";
    keys.read(NORMALISE, "1 or null, the norms supported", |power| {
        (power.as_f64() == Some(1.0)).then_some(())
    })?;
    moe.gate.normalise = !keys.is_null(NORMALISE);
    Ok(moe)
}

const DEEPSEEK_V2: Defaults = Defaults {
    vocab: 102_400,
    hidden: 4096,
    inner: 11_008,
    layers: 32,
    heads: 32,
    kv_heads: None,
    experts: 64,
    top_k: 6,
    positions: 2048,
    eps: 1e-6,
    theta: 1e4,
    bos: Some(0),
    eos: Some(1),
};

fn deepseek_v2(keys: &Keys) -> Checked<ModelSpec> {
    let draft = Draft::new(keys, &DEEPSEEK_V2)?;
    keys.only("scoring_func", &["softmax"])?;
    if keys.get("num_experts_per_tok").is_none() {
        return wrong(format!("`num_experts_per_tok` is missing; {MEND}"));
    }
    let mut moe = deepseek_experts(&draft, DeepseekDefaults { inner: 1407, shared: 2, scale: 1.0 })?;
    moe.gate.normalise = moe.gate.top_k > 1 && keys.flag("norm_topk_prob")?.unwrap_or(false);
    if moe.gate.normalise {
        moe.gate.scale = 1.0; // The published router does one or the other.
    }
    moe.gate.groups = match keys.word("topk_method")?.unwrap_or("greedy") {
        "greedy" => None,
        "group_limited_greedy" => groups(keys, (1, 1), &moe, GroupScore::Max)?,
        other => {
            return wrong(format!(
                "`topk_method` is \"{other}\"; supported are greedy and group_limited_greedy"
            ));
        }
    };
    let layers = deepseek_layers(&draft, &moe, 0)?;
    deepseek(&draft, Architecture::DeepseekV2, RopeStyle::Interleaved, layers)
}

const DEEPSEEK_V3: Defaults = Defaults {
    vocab: 129_280,
    hidden: 7168,
    inner: 18_432,
    layers: 61,
    heads: 128,
    experts: 256,
    top_k: 8,
    positions: 4096,
    ..DEEPSEEK_V2
};

fn deepseek_v3(keys: &Keys) -> Checked<ModelSpec> {
    let draft = Draft::new(keys, &DEEPSEEK_V3)?;
    keys.only("scoring_func", &["sigmoid"])?;
    keys.only("topk_method", &["noaux_tc"])?;
    let mut moe = deepseek_experts(&draft, DeepseekDefaults { inner: 2048, shared: 1, scale: 2.5 })?;
    moe.correction_bias = true;
    moe.gate.score = Score::Sigmoid;
    moe.gate.normalise = keys.flag("norm_topk_prob")?.unwrap_or(true);
    moe.gate.groups = groups(keys, (8, 4), &moe, GroupScore::TopTwoSum)?;
    let interleaved = keys.flag("rope_interleave")?.unwrap_or(true);
    let style = if interleaved { RopeStyle::Interleaved } else { RopeStyle::HalfSplit };
    let layers = deepseek_layers(&draft, &moe, 3)?;
    deepseek(&draft, Architecture::DeepseekV3, style, layers)
}

struct DeepseekDefaults {
    inner: usize,
    shared: usize,
    scale: f64,
}

fn deepseek_experts(draft: &Draft, defaults: DeepseekDefaults) -> Checked<MoeSpec> {
    let keys = draft.keys;
    let inner = keys.whole("moe_intermediate_size", WIDTH)?.unwrap_or(defaults.inner);
    let mut moe = draft.moe(inner)?;
    let default_shared = if keys.is_null("n_shared_experts") { 0 } else { defaults.shared };
    let shared = keys.whole("n_shared_experts", 0..=64)?.unwrap_or(default_shared);
    moe.shared = (shared > 0).then_some(SharedSpec { inner: shared * inner, gated: false });
    moe.gate.scale = keys.number("routed_scaling_factor", FACTOR)?.unwrap_or(defaults.scale) as f32;
    Ok(moe)
}

/// The restriction to the best groups of experts; none where there is one group.
fn groups(
    keys: &Keys,
    (default_groups, default_kept): (usize, usize),
    moe: &MoeSpec,
    by: GroupScore,
) -> Checked<Option<GroupLimit>> {
    let groups = keys.whole("n_group", 1..=moe.experts)?.unwrap_or(default_groups);
    let kept = keys.whole("topk_group", 1..=groups)?.unwrap_or(default_kept.min(groups));
    divides(("`n_group`", groups), ("the number of experts", moe.experts))?;
    let size = moe.experts / groups;
    if moe.gate.top_k > kept * size {
        return wrong(format!(
            "`num_experts_per_tok` is {}, but {kept} groups of {size} experts are kept; {MEND}",
            moe.gate.top_k
        ));
    }
    if by == GroupScore::TopTwoSum && size < 2 && groups > 1 {
        return wrong(format!("`n_group` is {groups}, but groups must have two experts or more; {MEND}"));
    }
    Ok((groups > 1).then_some(GroupLimit { groups, kept, by }))
}

fn deepseek_layers(draft: &Draft, moe: &MoeSpec, default_dense: usize) -> Checked<Vec<LayerSpec>> {
    let dense = draft.keys.whole("first_k_dense_replace", 0..=*LAYERS.end())?.unwrap_or(default_dense);
    let every = draft.keys.whole("moe_layer_freq", LAYERS)?.unwrap_or(1);
    Ok(draft.layers(moe, |layer| layer >= dense && layer.is_multiple_of(every)))
}

fn deepseek(
    draft: &Draft,
    architecture: Architecture,
    style: RopeStyle,
    layers: Vec<LayerSpec>,
) -> Checked<ModelSpec> {
    let keys = draft.keys;
    let nope = keys.whole("qk_nope_head_dim", HEAD_WIDTH)?.unwrap_or(128);
    let rope_dim = keys.whole("qk_rope_head_dim", HEAD_WIDTH)?.unwrap_or(64);
    let rope = draft.rope(rope_dim, style, draft.theta()?)?;
    let default_q_lora = (!keys.is_null("q_lora_rank")).then_some(1536);
    let attention = MlaSpec {
        heads: draft.heads,
        q_lora: keys.whole("q_lora_rank", WIDTH)?.or(default_q_lora),
        kv_lora: keys.whole("kv_lora_rank", WIDTH)?.unwrap_or(512),
        nope,
        rope: rope_dim,
        value: keys.whole("v_head_dim", HEAD_WIDTH)?.unwrap_or(128),
        inner_eps: 1e-6, // Whatever `rms_norm_eps` says.
        bias: keys.flag("attention_bias")?.unwrap_or(false),
        scale: (((nope + rope_dim) as f64).powf(-0.5) * rope.score_factor) as f32,
    };
    let attention = AttentionSpec::Mla(attention);
    draft.complete((architecture, TensorNames::Common), NormKind::Rms, attention, rope.spec, layers)
}
