//! What a model is: sizes and choices that the forward pass interprets. Nothing after this room's door asks
//! for an architecture's name.

use crate::names::{LayerPart, Map, Part};
use epsmoe_base::DType;
use epsmoe_device::WeightShape;
use epsmoe_device::op::{Activation, Growth, NormKind, RopeStyle, Sight, TopKRouter};
use std::fmt;

/// What the logits of an architecture are held against.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Judge {
    /// Its implementation in transformers.
    Transformers,
    /// The authors' published code, written anew in plain PyTorch.
    Authors,
    /// A model of the same equations in transformers, under other names.
    Twin,
}

impl fmt::Display for Judge {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Judge::Transformers => "transformers",
            Judge::Authors => "its authors' code",
            Judge::Twin => "transformers' GLM-4.5",
        })
    }
}

macro_rules! architectures {
    ($($(#[doc = $models:literal])* $name:ident => $class:literal, $kind:literal, $judge:ident, $gguf:literal;)*) => {
        /// Published architectures, named in messages only.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum Architecture {
            $($(#[doc = $models])* $name,)*
        }

        impl Architecture {
            /// All of them.
            pub const ALL: &'static [Architecture] = &[$(Architecture::$name,)*];

            /// What `architectures` and `model_type` of a config.json call it.
            pub fn names(self) -> (&'static str, &'static str) {
                match self { $(Architecture::$name => ($class, $kind),)* }
            }

            /// The models that have it.
            pub fn models(self) -> &'static str {
                let models = match self { $(Architecture::$name => concat!($($models),*),)* };
                models.trim().trim_end_matches('.')
            }

            /// What its logits are held against.
            pub fn judge(self) -> Judge {
                match self { $(Architecture::$name => Judge::$judge,)* }
            }

            /// What GGUF files call it, if they are read.
            pub fn gguf(self) -> Option<&'static str> {
                let name = match self { $(Architecture::$name => $gguf,)* };
                (!name.is_empty()).then_some(name)
            }
        }
    };
}

/// A whole model.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelSpec {
    /// The published architecture it came from, for messages.
    pub architecture: Architecture,
    /// How its checkpoints call their tensors.
    pub naming: TensorNames,
    /// Where they have those of the language model.
    pub nesting: Nesting,
    /// Vocabulary V.
    pub vocab: usize,
    /// Hidden width H.
    pub hidden: usize,
    /// Longest context it was made for, in tokens.
    pub max_positions: usize,
    /// The norm before attention, before the MLP and at the end.
    pub norm: NormSpec,
    /// Rotary position embeddings, of which each layer has one or none.
    pub ropes: Vec<RopeSpec>,
    /// The layers, from the embedding on.
    pub layers: Vec<LayerSpec>,
    /// Factors that the model puts on its streams; all 1 in most.
    pub factors: Factors,
    /// Whether the output projection is the embedding table.
    pub tie_embeddings: bool,
    /// Whether logits have a bias.
    pub head_bias: bool,
    /// The format its weights are published in.
    pub dtype: DType,
    /// The token a text begins with, if the model wants one.
    pub bos: Option<u32>,
    /// The tokens that end a text.
    pub eos: Vec<u32>,
}

architectures! {
    /// Mixtral 8x7B, 8x22B.
    Mixtral => "MixtralForCausalLM", "mixtral", Transformers, "llama";
    /// DeepSeek-V2, V2-Lite.
    DeepseekV2 => "DeepseekV2ForCausalLM", "deepseek_v2", Transformers, "deepseek2";
    /// DeepSeek-V3, R1; Kimi-K2, K2.5, Moonlight.
    DeepseekV3 => "DeepseekV3ForCausalLM", "deepseek_v3", Transformers, "deepseek2";
    /// DBRX.
    Dbrx => "DbrxForCausalLM", "dbrx", Transformers, "dbrx";
    /// Qwen1.5-MoE, Qwen2-57B-A14B.
    Qwen2Moe => "Qwen2MoeForCausalLM", "qwen2_moe", Transformers, "qwen2moe";
    /// Qwen3-30B-A3B, Qwen3-235B-A22B.
    Qwen3Moe => "Qwen3MoeForCausalLM", "qwen3_moe", Transformers, "qwen3moe";
    /// OLMoE-1B-7B.
    Olmoe => "OlmoeForCausalLM", "olmoe", Transformers, "olmoe";
    /// Snowflake Arctic.
    Arctic => "ArcticForCausalLM", "arctic", Authors, "";
    /// GLM-4.5, 4.6, 4.7, 4.5V, 4.6V.
    Glm4Moe => "Glm4MoeForCausalLM", "glm4_moe", Transformers, "glm4moe";
    /// GLM-4.7-Flash.
    Glm4MoeLite => "Glm4MoeLiteForCausalLM", "glm4_moe_lite", Transformers, "";
    /// MiniMax-M2.
    MinimaxM2 => "MiniMaxM2ForCausalLM", "minimax_m2", Transformers, "minimax-m2";
    /// dots.llm1.
    Dots1 => "Dots1ForCausalLM", "dots1", Transformers, "dots1";
    /// Ling 2.0, Ring 2.0.
    BailingMoeV2 => "BailingMoeV2ForCausalLM", "bailing_moe_v2", Twin, "bailingmoe2";
    /// ERNIE-4.5-21B-A3B, ERNIE-4.5-300B-A47B.
    Ernie45Moe => "Ernie4_5_MoeForCausalLM", "ernie4_5_moe", Transformers, "ernie4_5-moe";
    /// Hunyuan-A13B.
    HunyuanV1Moe => "HunYuanMoEV1ForCausalLM", "hunyuan_v1_moe", Transformers, "hunyuan-moe";
    /// gpt-oss-20b, gpt-oss-120b.
    GptOss => "GptOssForCausalLM", "gpt_oss", Transformers, "gpt-oss";
    /// Granite 3 MoE.
    GraniteMoe => "GraniteMoeForCausalLM", "granitemoe", Transformers, "granitemoe";
    /// Granite MoE with a shared expert.
    GraniteMoeShared => "GraniteMoeSharedForCausalLM", "granitemoeshared", Transformers, "granitemoe";
    /// Granite-4.0-H-Tiny, H-Small.
    GraniteMoeHybrid => "GraniteMoeHybridForCausalLM", "granitemoehybrid", Transformers, "";
    /// Nemotron-3-Nano-30B-A3B.
    NemotronH => "NemotronHForCausalLM", "nemotron_h", Transformers, "";
    /// Qwen3-Next-80B-A3B.
    Qwen3Next => "Qwen3NextForCausalLM", "qwen3_next", Transformers, "";
    /// Qwen3.5-35B-A3B, 122B-A10B, 397B-A17B, Qwen3.6-35B-A3B.
    Qwen35Moe => "Qwen3_5MoeForConditionalGeneration", "qwen3_5_moe", Transformers, "";
    /// Solar-Open-100B.
    SolarOpen => "SolarOpenForCausalLM", "solar_open", Transformers, "";
    /// K-EXAONE-236B-A23B.
    ExaoneMoe => "ExaoneMoEForCausalLM", "exaone_moe", Transformers, "";
    /// Hunyuan 3.
    HunyuanV3 => "HYV3ForCausalLM", "hy_v3", Transformers, "";
    /// Gemma-4-26B-A4B.
    Gemma4 => "Gemma4ForConditionalGeneration", "gemma4", Transformers, "";
    /// LongCat-Flash.
    LongcatFlash => "LongcatFlashForCausalLM", "longcat_flash", Transformers, "";
    /// Llama-4 Scout, Maverick.
    Llama4 => "Llama4ForConditionalGeneration", "llama4", Transformers, "";
    /// Phi-3.5-MoE.
    Phimoe => "PhimoeForCausalLM", "phimoe", Transformers, "";
}

impl fmt::Display for Architecture {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.names().0)
    }
}

/// Families of tensor names; [`crate::names`] has the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TensorNames {
    /// `mlp.experts.3.gate_proj.weight`, `mlp.shared_experts.…`; whatever a family below does not rename.
    Common,
    /// As common, but one `mlp.shared_expert`.
    Qwen,
    /// `block_sparse_moe.experts.3.w1.weight`.
    Mixtral,
    /// `transformer.blocks.…`, query, key and value in one tensor, all experts in one tensor.
    Dbrx,
    /// As common, but some parts of a name of their own: the first of those that only this family has.
    Ernie,
    /// The same of Hunyuan.
    Hunyuan,
    /// The same of Hunyuan 3.
    HunyuanV3,
    /// The same of EXAONE.
    Exaone,
    /// The same of Gemma: all experts in one tensor.
    Gemma,
    /// The same of Ling and Ring: query, key and value in one tensor.
    Bailing,
    /// The same of gpt-oss: all experts in one tensor, rows of gate and up in turn.
    GptOss,
    /// The same in codes.
    GptOssCoded,
    /// The same of Granite: all experts in one tensor, the shared expert's gate over its up.
    Granite,
    /// As Qwen, but what feeds a delta net in a tensor for each, and all experts in one tensor, or as common.
    Qwen35,
    /// As common, but what belongs to an attention numbered in it: two of our layers are one of this family's.
    Longcat,
    /// As common, but MLPs of names of their own: all experts in one tensor, transposed, gate beside up.
    Llama4,
    /// Names of their own: attention and MLPs are numbered one by one, each behind a norm.
    Nemotron,
    /// All experts in one tensor of three dimensions, as newer libraries keep them in memory.
    Merged,
    /// `blk.3.ffn_gate_exps.weight`: GGUF, whose files know no other names.
    Gguf,
}

/// Where a checkpoint has the tensors of the language model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Nesting {
    /// They are all there is, `model.…`.
    Alone,
    /// Beside those of other parts, `model.language_model.…`.
    Beside,
    /// As they are, under another name: `language_model.model.…`.
    Under,
}

/// Factors on what flows between the parts of a model.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Factors {
    /// On embeddings.
    pub embedding: f32,
    /// On what attention and MLPs add to the residual stream.
    pub residual: f32,
    /// On logits.
    pub logits: f32,
    /// What no logit's magnitude reaches: they become `cap · tanh(logit / cap)`.
    pub cap: Option<f32>,
}

impl Default for Factors {
    fn default() -> Self {
        Factors { embedding: 1.0, residual: 1.0, logits: 1.0, cap: None }
    }
}

/// A norm over the hidden width.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct NormSpec {
    /// Which norm.
    pub kind: NormKind,
    /// Whether it has a bias.
    pub bias: bool,
    /// Added under the root.
    pub eps: f32,
    /// Whether weights are stored less 1, those of the norms of queries and keys too.
    pub less_one: bool,
}

/// How tokens look at each other.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum AttentionSpec {
    /// Query heads that share key and value heads in groups.
    Gqa(GqaSpec),
    /// Keys and values decompressed from one latent vector a token (DeepSeek-V2, arXiv 2405.04434).
    Mla(MlaSpec),
    /// No look back at all, but a state that is carried along (Gated DeltaNet, arXiv 2412.06464; Mamba-2, arXiv 2405.21060).
    Recurrent(RecurrentSpec),
}

/// Grouped-query attention. After the projections: norm of queries and keys, clip, rotary embedding, or the norm last.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct GqaSpec {
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; query head `j` uses head `j / (heads / kv_heads)`.
    pub kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Whether the query, key and value projections have a bias.
    pub qkv_bias: bool,
    /// Whether the output projection has one.
    pub output_bias: bool,
    /// Norm of queries and keys, with the model's epsilon.
    pub qk_norm: Option<QkNorm>,
    /// Whether that norm comes after the rotary embedding.
    pub norm_after_rope: bool,
    /// Queries, keys and values are clamped to ± this.
    pub clip_qkv: Option<f32>,
    /// Whether each head has a score of its own in the softmax that belongs to no key.
    pub sinks: bool,
    /// Whether what a head gives is multiplied by the sigmoid of as many numbers, projected beside its query; with a norm of
    /// each head only.
    pub gated: bool,
    /// Whether each value is normed by itself, without weights.
    pub value_norm: bool,
    /// Whether values are the keys before their norm.
    pub values_are_keys: bool,
    /// Factor on the scores.
    pub scale: f32,
}

impl GqaSpec {
    /// Numbers projected for each query head: the query, and its gate if it has one.
    pub(crate) fn query_rows_of_head(&self) -> usize {
        if self.gated { 2 * self.head_dim } else { self.head_dim }
    }

    /// Whether the norm of queries and keys has weights.
    pub(crate) fn has_norm_weights(&self) -> bool {
        self.qk_norm.is_some_and(|norm| norm != QkNorm::Unweighted)
    }

    /// The same for all of them.
    fn query_rows(&self) -> usize {
        self.heads * self.query_rows_of_head()
    }
}

/// What a norm of queries and keys spans.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum QkNorm {
    /// Each head by itself, all with the same weights.
    PerHead,
    /// All heads of a token together.
    FullWidth,
    /// Each head by itself, without weights.
    Unweighted,
}

/// Latent attention: `c = norm(KvDown·x)` is cached with one rotated key `k_r` of width `rope`; per head,
/// `KeyUp·c` gives a key part of width `nope`, and `ValueUp·c` a value of width `value`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct MlaSpec {
    /// Query heads.
    pub heads: usize,
    /// Width of the query latent; absent when queries are projected directly.
    pub q_lora: Option<usize>,
    /// Width of the key and value latent.
    pub kv_lora: usize,
    /// Unrotated elements of a query or key head, which come first.
    pub nope: usize,
    /// Rotated elements, which come last.
    pub rope: usize,
    /// Elements of a value head.
    pub value: usize,
    /// Epsilon of the norms of the two latents.
    pub inner_eps: f32,
    /// Whether `QueryDown`, `KvDown` and the output projection have a bias.
    pub bias: bool,
    /// Factor on the scores, with the square of yarn's magnitude scale, and that of queries.
    pub scale: f32,
    /// Factor on the latent of keys and values, behind its norm.
    pub latent_scale: f32,
}

/// A layer that carries a state. Queries, keys and values of all heads pass a convolution over the last tokens and a rule by
/// which the state goes on ([`Recurrence`](epsmoe_device::op::Recurrence)); what comes of it is normed, with the model's
/// epsilon, and gated by the silu of as many numbers.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RecurrentSpec {
    /// How the state goes on, and in which order what comes of it is normed and gated.
    pub rule: RecurrentRule,
    /// Query and key heads: groups, as state spaces call them.
    pub key_heads: usize,
    /// Value heads; `value_heads / key_heads` neighbours share a query and a key.
    pub value_heads: usize,
    /// Width of a query or key.
    pub key_width: usize,
    /// Width of a value.
    pub value_width: usize,
    /// Tokens that the convolution spans.
    pub taps: usize,
    /// Whether it has a bias.
    pub conv_bias: bool,
}

/// How a state goes on.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum RecurrentRule {
    /// The gated delta rule. Each value head is normed by itself, all with the same weights, and then gated.
    Delta,
    /// That of state spaces. What comes out is gated, and then all value heads of a key head are normed together.
    StateSpace {
        /// Least step of a state.
        floor: f32,
    },
}

impl RecurrentSpec {
    /// Value heads of one key head.
    pub fn group(&self) -> usize {
        self.value_heads / self.key_heads
    }

    /// Width of a token's queries, keys and values.
    pub fn mixed_width(&self) -> usize {
        2 * self.key_heads * self.key_width + self.context_width()
    }

    /// Width of its values.
    pub fn context_width(&self) -> usize {
        self.value_heads * self.value_width
    }

    /// Numbers of the state of one sequence: those kept in float32, and the rows that the convolution looks back at.
    pub(crate) fn state(&self) -> (usize, usize) {
        (self.key_width * self.value_heads * self.value_width, (self.taps - 1) * self.mixed_width())
    }

    /// The most key heads that one of so many ranks has: ranks share them, or, where there are fewer, all have all.
    pub fn heads_of_rank(&self, ranks: usize) -> usize {
        if ranks > self.key_heads { self.key_heads } else { self.key_heads.div_ceil(ranks.max(1)) }
    }

    /// The same with some of the key heads.
    pub(crate) fn of_heads(&self, key_heads: usize) -> Self {
        RecurrentSpec { key_heads, value_heads: key_heads * self.group(), ..*self }
    }
}

impl AttentionSpec {
    /// Heads that ranks must split; of layers that carry a state, each may have all.
    pub fn heads(&self) -> Option<usize> {
        match self {
            AttentionSpec::Gqa(spec) => Some(spec.heads),
            AttentionSpec::Mla(spec) => Some(spec.heads),
            AttentionSpec::Recurrent(_) => None,
        }
    }

    /// The most of its heads that one of so many ranks has.
    pub(crate) fn heads_of_rank(&self, ranks: usize) -> usize {
        match self {
            AttentionSpec::Gqa(spec) => spec.heads.div_ceil(ranks.max(1)),
            AttentionSpec::Mla(spec) => spec.heads.div_ceil(ranks.max(1)),
            AttentionSpec::Recurrent(spec) => spec.heads_of_rank(ranks),
        }
    }

    /// Width of all query heads of a token.
    pub fn query_width(&self) -> usize {
        match self {
            AttentionSpec::Gqa(spec) => spec.heads * spec.head_dim,
            AttentionSpec::Mla(spec) => spec.heads * (spec.nope + spec.rope),
            AttentionSpec::Recurrent(spec) => spec.key_heads * spec.key_width,
        }
    }

    /// Width of what the output projection reads.
    pub fn context_width(&self) -> usize {
        match self {
            AttentionSpec::Gqa(spec) => spec.heads * spec.head_dim,
            AttentionSpec::Mla(spec) => spec.heads * spec.value,
            AttentionSpec::Recurrent(spec) => spec.context_width(),
        }
    }

    /// Numbers a token leaves in the cache of one layer.
    pub fn cache_width(&self) -> usize {
        self.cache_width_of(1)
    }

    /// The same on the rank with the most key heads of `tensor` that share them; latents are whole on each.
    fn cache_width_of(&self, tensor: usize) -> usize {
        match self {
            AttentionSpec::Gqa(spec) => 2 * spec.kv_heads.div_ceil(tensor.max(1)) * spec.head_dim,
            AttentionSpec::Mla(spec) => spec.kv_lora + spec.rope,
            AttentionSpec::Recurrent(_) => 0,
        }
    }

    /// Bytes of the state that a sequence carries along, on the rank with the most heads of `tensor` that share them.
    fn state_bytes_of(&self, dtype: DType, tensor: usize) -> usize {
        let AttentionSpec::Recurrent(spec) = self else { return 0 };
        let (floats, kept) = spec.of_heads(spec.heads_of_rank(tensor)).state();
        floats * DType::F32.bytes() + kept * dtype.bytes()
    }
}

/// Rotary position embedding: element pair `i` of a head turns by `position · inverse_frequencies[i]`.
#[derive(Clone, Debug, PartialEq)]
pub struct RopeSpec {
    /// How pairs are formed.
    pub style: RopeStyle,
    /// Rotated elements of a head.
    pub dim: usize,
    /// `dim / 2` of them, with any scaling applied.
    pub inverse_frequencies: Vec<f32>,
    /// Factor on cosines and sines.
    pub attention_factor: f32,
    /// A further one on queries; where there is one, keys are left as they are.
    pub growth: Option<Growth>,
}

/// One layer, `x → y`. With `a = x + attention(norm(x))`:
///
/// - `y = a + mlp(norm(a))`;
/// - with a residual MLP (Arctic), `y = a + residual(residual_norm(a)) + mlp(norm(x))`: the experts read the
///   layer's input and do not wait for attention;
/// - in a sandwich (Gemma 4), `a = x + out(attention(norm(x)))` and
///   `y = scale · (a + out(out(residual(residual_norm(a))) + out(mlp(norm(a)))))`: each `out` is a norm of its own, and the
///   dense MLP has the activation of the experts;
/// - with late experts (LongCat-Flash), `y = a + shared(norm(a))`, and the next layer adds `experts(norm(a))` to what it
///   gives: they have all of its time to travel in.
#[derive(Clone, Debug, PartialEq)]
pub struct LayerSpec {
    /// How tokens look at each other.
    pub attention: AttentionSpec,
    /// How far back a token sees.
    pub sight: Sight,
    /// Which of the model's rotary embeddings its queries and keys have; none, and no positions at all, when absent.
    pub rope: Option<usize>,
    /// The MLP after attention, if it has one.
    pub mlp: MlpSpec,
    /// Inner width of a dense MLP beside it.
    pub residual_mlp: Option<usize>,
    /// Whether what the parts give is normed too.
    pub sandwich: bool,
    /// Whether what its experts give is added behind the next layer; that has none.
    pub late_experts: bool,
}

/// The MLP of a layer: `down(silu(gate·x) ⊙ (up·x))`, unless it has another activation.
#[derive(Clone, Debug, PartialEq)]
pub enum MlpSpec {
    /// None: the layer ends behind its attention.
    Absent,
    /// One MLP for every token.
    Dense {
        /// Inner width.
        inner: usize,
        /// What it does between its maps, if it is not `silu(gate) ⊙ up`.
        activation: Option<Activation>,
    },
    /// A mixture of experts.
    Moe(MoeSpec),
}

impl MlpSpec {
    /// The mixture, if it is one.
    pub fn moe(&self) -> Option<&MoeSpec> {
        match self {
            MlpSpec::Absent | MlpSpec::Dense { .. } => None,
            MlpSpec::Moe(spec) => Some(spec),
        }
    }
}

/// A mixture of experts.
#[derive(Clone, Debug, PartialEq)]
pub struct MoeSpec {
    /// Routed experts E.
    pub experts: usize,
    /// Inner width I of an expert.
    pub inner: usize,
    /// How router logits choose experts.
    pub router: TopKRouter,
    /// Whether the router has a bias.
    pub router_bias: bool,
    /// Whether a bias is added to the scores for the choice.
    pub correction_bias: bool,
    /// What experts do between their maps, the shared one too, if it is not `silu(gate) ⊙ up`.
    pub activation: Option<Activation>,
    /// Whether the maps of experts have biases; with an activation of their own only.
    pub expert_bias: bool,
    /// Whether the router reads the normed rows under weights of its own and a factor H^-½, in the place of the norm's.
    pub router_scale: bool,
    /// Whether each expert has a factor on its weight.
    pub expert_scales: bool,
    /// The expert of every token, added to the routed sum.
    pub shared: Option<SharedSpec>,
    /// Further experts, numbered after the others, that give rows back as they are.
    pub identities: usize,
    /// Whether weights are put on what experts read, instead of what they give.
    pub scaled_inputs: bool,
}

impl MoeSpec {
    /// Experts that the router chooses from.
    pub fn choices(&self) -> usize {
        self.experts + self.identities
    }

    /// Experts that compute for a token, of those that it is sent to: where some give rows back as they are, on average.
    pub fn computed(&self) -> usize {
        (self.router.top_k * self.experts).div_ceil(self.choices())
    }
}

/// A shared expert.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SharedSpec {
    /// Inner width; several shared experts are one wide one.
    pub inner: usize,
    /// Whether its output is scaled by `sigmoid(SharedExpertGate·x)`.
    pub gated: bool,
}

/// Numbers in a model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Parameters {
    /// All.
    pub total: u64,
    /// Those one token meets: of the routed experts, only the chosen.
    pub active: u64,
}

impl ModelSpec {
    /// How many parameters the model has.
    pub fn parameters(&self) -> Parameters {
        let mut count = Parameters { total: 0, active: 0 };
        for part in self.parts() {
            let numbers = self.shape(part).parameters() as u64;
            count.total += numbers;
            count.active += match part {
                Part::Layer(layer, LayerPart::Expert(expert, _) | LayerPart::ExpertBias(expert, _)) => {
                    // Which experts a token meets varies, but they are equal: the first stand for the chosen.
                    let chosen = self.layers[layer.0].mlp.moe().map_or(0, MoeSpec::computed);
                    if expert.0 < chosen { numbers } else { 0 }
                }
                _ => numbers,
            };
        }
        count
    }

    /// Numbers in the largest of its parts.
    pub fn largest_part(&self) -> u64 {
        self.parts().map(|part| self.shape(part).parameters() as u64).max().unwrap_or(0)
    }

    /// Bytes that one token leaves in the caches of all layers, on the rank that has the most of them of `tensor` ranks
    /// that split attention, where they are cached in `cached`.
    pub fn cache_bytes_per_token(&self, cached: DType, tensor: usize) -> usize {
        let of_layer = |layer: &LayerSpec| layer.attention.cache_width_of(tensor);
        self.layers.iter().map(of_layer).sum::<usize>() * cached.bytes()
    }

    /// Bytes that one sequence carries along in all layers, on that rank.
    pub fn state_bytes(&self, dtype: DType, tensor: usize) -> usize {
        self.layers.iter().map(|layer| layer.attention.state_bytes_of(dtype, tensor)).sum()
    }

    /// Whether sequences carry a state along, which is not there for any but their last token.
    pub fn has_states(&self) -> bool {
        self.layers.iter().any(|layer| matches!(layer.attention, AttentionSpec::Recurrent(_)))
    }

    /// Whether attention goes to latents, for which it has two forms.
    pub fn has_latents(&self) -> bool {
        self.layers.iter().any(|layer| matches!(layer.attention, AttentionSpec::Mla(_)))
    }

    /// Whether rows become FP8 codes for a map where that is wanted and its weights are FP8 blocks, or fold into them.
    pub(crate) fn takes_fp8_rows(&self, part: Part) -> bool {
        use LayerPart::*;
        let Part::Layer(layer, of) = part else { return false };
        match of {
            Query | Key | Value | Output | QueryDown | QueryUp | KvDown | StateOutput => true,
            Dense(_) | Shared(_) | Expert(..) | Residual(_) => match &self.layers[layer.0].mlp {
                MlpSpec::Absent => false,
                MlpSpec::Dense { activation, .. } => activation.is_none(),
                MlpSpec::Moe(moe) => moe.activation.is_none() && !moe.scaled_inputs,
            },
            _ => false,
        }
    }

    /// Whether the weights of a norm are stored less 1.
    pub(crate) fn is_less_one(&self, part: Part) -> bool {
        use LayerPart::{InputNorm, KeyNorm, PostAttentionNorm, QueryNorm};
        let of_layer = |part| matches!(part, InputNorm | PostAttentionNorm | QueryNorm | KeyNorm);
        self.norm.less_one
            && match part {
                Part::FinalNorm => true,
                Part::Layer(_, part) => of_layer(part),
                _ => false,
            }
    }

    /// The shape of a part the model has.
    pub fn shape(&self, part: Part) -> WeightShape {
        let (vocab, hidden) = (self.vocab, self.hidden);
        match part {
            Part::Embedding => WeightShape::Table { rows: vocab, width: hidden },
            Part::FinalNorm | Part::FinalNormBias => vector(hidden),
            Part::LmHeadBias => vector(vocab),
            Part::LmHead => matrix(vocab, hidden),
            Part::Layer(layer, part) => self.layer_shape(&self.layers[layer.0], part),
        }
    }

    fn layer_shape(&self, layer: &LayerSpec, part: LayerPart) -> WeightShape {
        use LayerPart::*;
        let hidden = self.hidden;
        let shape = match (part, &layer.mlp, layer.residual_mlp) {
            (InputNorm | PostAttentionNorm | ResidualNorm | OutNorm(_), ..) => Some(vector(hidden)),
            (InputNormBias | PostAttentionNormBias, ..) => Some(vector(hidden)),
            (LayerScale, ..) => Some(vector(1)),
            (RouterScale, MlpSpec::Moe(_), _) => Some(vector(hidden)),
            (Router, MlpSpec::Moe(moe), _) => Some(matrix(moe.choices(), hidden)),
            (RouterBias | CorrectionBias | ExpertScales, MlpSpec::Moe(moe), _) => Some(vector(moe.choices())),
            (ExpertBias(_, Map::DownProj), MlpSpec::Moe(_), _) => Some(vector(hidden)),
            (ExpertBias(..), MlpSpec::Moe(moe), _) => Some(vector(moe.inner)),
            (Expert(_, map), MlpSpec::Moe(moe), _) => Some(map.shape(hidden, moe.inner)),
            (Shared(map), MlpSpec::Moe(MoeSpec { shared: Some(shared), .. }), _) => {
                Some(map.shape(hidden, shared.inner))
            }
            (SharedExpertGate, MlpSpec::Moe(_), _) => Some(matrix(1, hidden)),
            (Dense(map), MlpSpec::Dense { inner, .. }, _) => Some(map.shape(hidden, *inner)),
            (Residual(map), _, Some(inner)) => Some(map.shape(hidden, inner)),
            _ => self.attention_shape(&layer.attention, part),
        };
        shape.unwrap_or_else(|| panic!("{} has no {part:?} in this layer: this is a bug", self.architecture))
    }

    fn attention_shape(&self, attention: &AttentionSpec, part: LayerPart) -> Option<WeightShape> {
        use LayerPart::*;
        let hidden = self.hidden;
        Some(match (part, attention) {
            (Output, _) => matrix(hidden, attention.context_width()),
            (OutputBias, _) => vector(hidden),
            (Query, AttentionSpec::Gqa(spec)) => matrix(spec.query_rows(), hidden),
            (QueryBias, AttentionSpec::Gqa(spec)) => vector(spec.query_rows()),
            (Query, _) => matrix(attention.query_width(), hidden),
            (Key | Value, AttentionSpec::Gqa(spec)) => matrix(spec.kv_heads * spec.head_dim, hidden),
            (Sinks, AttentionSpec::Gqa(spec)) => vector(spec.heads),
            (KeyBias | ValueBias, AttentionSpec::Gqa(spec)) => vector(spec.kv_heads * spec.head_dim),
            (QueryNorm | KeyNorm, AttentionSpec::Gqa(spec)) => vector(match (spec.qk_norm?, part) {
                (QkNorm::PerHead, _) => spec.head_dim,
                (QkNorm::Unweighted, _) => return None,
                (QkNorm::FullWidth, QueryNorm) => spec.heads * spec.head_dim,
                (QkNorm::FullWidth, _) => spec.kv_heads * spec.head_dim,
            }),
            (QueryDown, AttentionSpec::Mla(spec)) => matrix(spec.q_lora?, hidden),
            (QueryDownBias | QueryDownNorm, AttentionSpec::Mla(spec)) => vector(spec.q_lora?),
            (QueryUp, AttentionSpec::Mla(spec)) => matrix(attention.query_width(), spec.q_lora?),
            (KvDown, AttentionSpec::Mla(spec)) => matrix(spec.kv_lora + spec.rope, hidden),
            (KvDownBias, AttentionSpec::Mla(spec)) => vector(spec.kv_lora + spec.rope),
            (KvDownNorm, AttentionSpec::Mla(spec)) => vector(spec.kv_lora),
            (KeyUp(_), AttentionSpec::Mla(spec)) => matrix(spec.nope, spec.kv_lora),
            (ValueUp(_), AttentionSpec::Mla(spec)) => matrix(spec.value, spec.kv_lora),
            (State(_, rows), AttentionSpec::Recurrent(spec)) => matrix(rows.count(spec), hidden),
            (StateConv(_, rows), AttentionSpec::Recurrent(spec)) => matrix(rows.count(spec), spec.taps),
            (StateConvBias(_, rows), AttentionSpec::Recurrent(spec)) => vector(rows.count(spec)),
            (StateDecay | StateBias | StateSkip, AttentionSpec::Recurrent(spec)) => vector(spec.value_heads),
            (StateNorm, AttentionSpec::Recurrent(spec)) => vector(match spec.rule {
                RecurrentRule::Delta => spec.value_width,
                RecurrentRule::StateSpace { .. } => spec.context_width(),
            }),
            (StateOutput, AttentionSpec::Recurrent(spec)) => matrix(hidden, spec.context_width()),
            _ => return None,
        })
    }
}

pub(crate) fn matrix(n: usize, k: usize) -> WeightShape {
    WeightShape::Matrix { n, k }
}

fn vector(n: usize) -> WeightShape {
    WeightShape::Vector { n }
}
