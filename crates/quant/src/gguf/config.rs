//! The keys of a config.json out of a file's metadata.
//!
//! Where the format leaves something to the program that reads it (whether the chosen experts' weights are divided by
//! their sum, which layers have a window), it is what llama.cpp, whose format it is, does with the architecture.

use super::Gguf;
use crate::QuantError;
use crate::error::shown;
use serde_json::{Map, Value, json};

/// Architectures that are translated.
const SUPPORTED: &str = "llama (with experts), qwen2moe, qwen3moe, olmoe, dbrx, deepseek2, glm4moe, dots1, bailingmoe2, \
                         minimax-m2, gpt-oss, ernie4_5-moe, hunyuan-moe and granitemoe";

impl Gguf {
    /// The name of the model's architecture.
    pub fn architecture(&self) -> Result<&str, QuantError> {
        let name = self.metadata.text("general.architecture")?;
        name.ok_or_else(|| QuantError::new("`general.architecture` is missing; fetch the file again"))
    }

    /// The config.json of the model.
    pub fn config(&self) -> Result<Map<String, Value>, QuantError> {
        let architecture = self.architecture()?;
        let draft = Draft { file: self, architecture, keys: Map::new() };
        let keys = match architecture {
            "llama" => draft.llama(),
            "qwen2moe" => draft.qwen2(),
            "qwen3moe" => draft.qwen3(),
            "olmoe" => draft.olmoe(),
            "dbrx" => draft.dbrx(),
            "deepseek2" => draft.deepseek(),
            "glm4moe" => draft.glm(),
            "dots1" => draft.dots(),
            "bailingmoe2" => draft.bailing(),
            "minimax-m2" => draft.minimax(),
            "gpt-oss" => draft.gpt_oss(),
            "ernie4_5-moe" => draft.ernie(),
            "hunyuan-moe" => draft.hunyuan(),
            "granitemoe" => draft.granite(),
            other => {
                return Err(QuantError::new(format!(
                    "architecture `{}` is not supported in GGUF; supported are {SUPPORTED}",
                    shown(other)
                )));
            }
        }?;
        Ok(keys)
    }
}

/// More layers than any model has; a header may claim any number.
const MOST_LAYERS: u64 = 1 << 16;

/// Keys gathered so far.
struct Draft<'a> {
    file: &'a Gguf,
    architecture: &'a str,
    keys: Map<String, Value>,
}

type Keys = Result<Map<String, Value>, QuantError>;

impl Draft<'_> {
    fn set(&mut self, key: &str, value: impl Into<Value>) {
        self.keys.insert(key.to_owned(), value.into());
    }

    fn whole(&self, key: &str) -> Result<Option<u64>, QuantError> {
        self.file.metadata.whole(&format!("{}.{key}", self.architecture))
    }

    fn number(&self, key: &str) -> Result<Option<f64>, QuantError> {
        self.file.metadata.number(&format!("{}.{key}", self.architecture))
    }

    fn required(&self, key: &str) -> Result<u64, QuantError> {
        let value = self.whole(key)?;
        value.ok_or_else(|| {
            QuantError::new(format!("`{}.{key}` is missing; fetch the file again", self.architecture))
        })
    }

    fn has(&self, tensor: &str) -> bool {
        self.file.tensors.contains_key(tensor)
    }

    /// What every architecture has.
    fn common(&mut self, class: &str) -> Result<(), QuantError> {
        self.set("architectures", json!([class]));
        self.set("dtype", "bfloat16");
        self.set("hidden_size", self.required("embedding_length")?);
        // Layers after the last predict further tokens.
        let further = self.whole("nextn_predict_layers")?.unwrap_or(0);
        self.set("num_hidden_layers", self.required("block_count")?.saturating_sub(further));
        self.set("num_attention_heads", self.required("attention.head_count")?);
        self.set("max_position_embeddings", self.required("context_length")?);
        if let Some(eps) =
            self.number("attention.layer_norm_rms_epsilon")?.or(self.number("attention.layer_norm_epsilon")?)
        {
            self.set("rms_norm_eps", rounded(eps));
        }
        self.set("vocab_size", self.vocabulary()?);
        self.set("tie_word_embeddings", !self.has("output.weight"));
        self.set("rope_theta", rounded(self.number("rope.freq_base")?.unwrap_or(10_000.0)));
        self.special_tokens()
    }

    /// Rows of a matrix; none, if it is not there.
    fn rows(&self, tensor: &str) -> usize {
        let shape = self.file.tensors.get(tensor).map(|tensor| tensor.tensor.shape.as_slice());
        shape.and_then(|shape| shape.first()).copied().unwrap_or(0)
    }

    /// Rows of the embedding.
    fn vocabulary(&self) -> Result<usize, QuantError> {
        match self.file.tensors.get("token_embd.weight").map(|embedding| embedding.tensor.shape.as_slice()) {
            Some([vocabulary, _]) => Ok(*vocabulary),
            _ => Err(QuantError::new("there is no matrix `token_embd.weight`; fetch the file again")),
        }
    }

    fn special_tokens(&mut self) -> Result<(), QuantError> {
        let tokenizer = self.file.tokenizer()?;
        let (bos, ends) = tokenizer.map_or((None, Vec::new()), |tokenizer| (tokenizer.bos, tokenizer.ends));
        self.set("bos_token_id", bos);
        self.set("eos_token_id", if ends.is_empty() { Value::Null } else { ends.into() });
        Ok(())
    }

    /// Grouped-query attention.
    fn grouped(&mut self) -> Result<(), QuantError> {
        let heads = self.required("attention.head_count")?;
        let hidden = self.required("embedding_length")?;
        self.set("num_key_value_heads", self.whole("attention.head_count_kv")?.unwrap_or(heads));
        let width = self.whole("attention.key_length")?.or(hidden.checked_div(heads)).unwrap_or(0);
        self.set("head_dim", width);
        if let Some(rotated) = self.whole("rope.dimension_count")? {
            self.set("partial_rotary_factor", rotated as f64 / width.max(1) as f64);
        }
        self.scaling()
    }

    fn experts(&mut self) -> Result<(), QuantError> {
        self.set("num_experts", self.required("expert_count")?);
        self.set("num_experts_per_tok", self.required("expert_used_count")?);
        if let Some(inner) = self.whole("feed_forward_length")? {
            self.set("intermediate_size", inner);
        }
        Ok(())
    }

    /// Layers without a router have a dense MLP.
    fn dense_layers(&mut self) -> Result<(), QuantError> {
        let layers = 0..self.required("block_count")?.min(MOST_LAYERS);
        let dense = layers.filter(|layer| !self.has(&format!("blk.{layer}.ffn_gate_inp.weight")));
        self.set("mlp_only_layers", dense.collect::<Vec<_>>());
        Ok(())
    }

    /// How rotary embedding is stretched.
    fn scaling(&mut self) -> Result<(), QuantError> {
        let key = format!("{}.rope.scaling.type", self.architecture);
        let kind = self.file.metadata.text(&key)?.unwrap_or("none").to_owned();
        if kind == "none" {
            return Ok(());
        }
        let mut scaling = Map::new();
        scaling.insert("rope_type".into(), kind.into());
        let numbers = [
            ("factor", "factor"),
            ("original_context_length", "original_max_position_embeddings"),
            ("yarn_beta_fast", "beta_fast"),
            ("yarn_beta_slow", "beta_slow"),
        ];
        for (key, name) in numbers {
            if let Some(number) = self.number(&format!("rope.scaling.{key}"))? {
                scaling.insert(name.into(), number_or_whole(rounded(number)));
            }
        }
        self.set("rope_scaling", scaling);
        Ok(())
    }

    /// Mixtral: rows of queries and keys lie in pairs that are rotated together.
    fn llama(mut self) -> Keys {
        if self.whole("expert_count")?.unwrap_or(0) == 0 {
            return Err(QuantError::new(format!(
                "it is a llama without experts, which is not supported; supported are {SUPPORTED}"
            )));
        }
        self.common("MixtralForCausalLM")?;
        self.grouped()?;
        self.experts()?;
        self.set("rope_interleave", true);
        if self.has("rope_freqs.weight") {
            return Err(QuantError::new(
                "it has frequencies of its own (`rope_freqs.weight`), which are not supported; use another \
                 conversion of the model",
            ));
        }
        Ok(self.keys)
    }

    fn qwen2(mut self) -> Keys {
        self.common("Qwen2MoeForCausalLM")?;
        self.grouped()?;
        self.experts()?;
        let inner = self.whole("feed_forward_length")?.unwrap_or(0);
        let chosen = self.required("expert_used_count")?.max(1);
        self.set(
            "moe_intermediate_size",
            self.whole("expert_feed_forward_length")?.unwrap_or(inner / chosen),
        );
        let shared = self.whole("expert_shared_feed_forward_length")?.unwrap_or(inner);
        self.set("shared_expert_intermediate_size", shared);
        self.set("qkv_bias", self.has("blk.0.attn_q.bias"));
        self.set("norm_topk_prob", false);
        self.dense_layers()?;
        Ok(self.keys)
    }

    fn qwen3(mut self) -> Keys {
        self.common("Qwen3MoeForCausalLM")?;
        self.grouped()?;
        self.experts()?;
        self.set("moe_intermediate_size", self.required("expert_feed_forward_length")?);
        self.set("attention_bias", self.has("blk.0.attn_q.bias"));
        self.set("norm_topk_prob", true);
        self.dense_layers()?;
        Ok(self.keys)
    }

    fn olmoe(mut self) -> Keys {
        self.common("OlmoeForCausalLM")?;
        self.grouped()?;
        self.experts()?;
        if let Some(clip) = self.number("attention.clamp_kqv")? {
            self.set("clip_qkv", rounded(clip));
        }
        self.set("norm_topk_prob", false);
        Ok(self.keys)
    }

    fn dbrx(mut self) -> Keys {
        self.common("DbrxForCausalLM")?;
        self.scaling()?;
        let mut attention = Map::new();
        attention.insert("kv_n_heads".into(), self.required("attention.head_count_kv")?.into());
        attention.insert("rope_theta".into(), self.keys["rope_theta"].clone());
        if let Some(clip) = self.number("attention.clamp_kqv")? {
            attention.insert("clip_qkv".into(), rounded(clip).into());
        }
        self.set("attn_config", attention);
        let (inner, experts, chosen) = (
            self.required("feed_forward_length")?,
            self.required("expert_count")?,
            self.required("expert_used_count")?,
        );
        let experts = json!({"ffn_hidden_size": inner, "moe_num_experts": experts, "moe_top_k": chosen});
        self.set("ffn_config", experts);
        Ok(self.keys)
    }

    /// Experts of which the best groups are taken, after some dense layers.
    fn experts_after_dense(&mut self) -> Result<(), QuantError> {
        self.experts()?;
        self.set("moe_intermediate_size", self.required("expert_feed_forward_length")?);
        self.set("first_k_dense_replace", self.whole("leading_dense_block_count")?.unwrap_or(0));
        self.set("routed_scaling_factor", rounded(self.number("expert_weights_scale")?.unwrap_or(1.0)));
        let key = format!("{}.expert_weights_norm", self.architecture);
        self.set("norm_topk_prob", self.file.metadata.flag(&key)?.unwrap_or(false));
        self.set("n_group", self.whole("expert_group_count")?.unwrap_or(1));
        self.set("topk_group", self.whole("expert_group_used_count")?.unwrap_or(1));
        Ok(())
    }

    /// GLM-4.5 to 4.7.
    fn glm(mut self) -> Keys {
        self.common("Glm4MoeForCausalLM")?;
        self.grouped()?;
        self.experts_after_dense()?;
        self.set("n_shared_experts", self.whole("expert_shared_count")?.unwrap_or(0));
        self.set("attention_bias", self.has("blk.0.attn_q.bias"));
        self.set("use_qk_norm", self.has("blk.0.attn_q_norm.weight"));
        Ok(self.keys)
    }

    /// dots.llm1.
    fn dots(mut self) -> Keys {
        self.common("Dots1ForCausalLM")?;
        self.grouped()?;
        self.experts_after_dense()?;
        self.set("n_shared_experts", self.whole("expert_shared_count")?.unwrap_or(0));
        self.set("attention_bias", self.has("blk.0.attn_q.bias"));
        self.set("sliding_window", Value::Null);
        Ok(self.keys)
    }

    /// Ling 2.0.
    fn bailing(mut self) -> Keys {
        self.common("BailingMoeV2ForCausalLM")?;
        self.grouped()?;
        self.experts_after_dense()?;
        self.set("num_shared_experts", self.whole("expert_shared_count")?.unwrap_or(0));
        if let Some(inner) = self.whole("expert_shared_feed_forward_length")? {
            self.set("moe_shared_expert_intermediate_size", inner);
        }
        Ok(self.keys)
    }

    /// MiniMax-M2. The width of experts is under the key that others have for dense layers.
    fn minimax(mut self) -> Keys {
        self.common("MiniMaxM2ForCausalLM")?;
        self.grouped()?;
        self.experts()?;
        if let Some(inner) = self.whole("expert_feed_forward_length")? {
            self.set("intermediate_size", inner);
        }
        Ok(self.keys)
    }

    /// DeepSeek-V2, or V3 where experts are scored by a sigmoid.
    fn deepseek(mut self) -> Keys {
        let sigmoid = match self.whole("expert_gating_func")? {
            None | Some(0 | 1) => false,
            Some(2) => true,
            Some(other) => {
                let problem = format!("`deepseek2.expert_gating_func` is {other}; supported are 1 and 2");
                return Err(QuantError::new(format!("{problem} (softmax and sigmoid)")));
            }
        };
        self.common(if sigmoid { "DeepseekV3ForCausalLM" } else { "DeepseekV2ForCausalLM" })?;
        let rope = self.required("rope.dimension_count")?;
        // Files of before latent attention was run absorbed have the widths under other keys.
        let key = self
            .whole("attention.key_length_mla")?
            .map_or_else(|| self.required("attention.key_length"), Ok)?;
        let value = self
            .whole("attention.value_length_mla")?
            .map_or_else(|| self.required("attention.value_length"), Ok)?;
        self.set("qk_rope_head_dim", rope);
        self.set("qk_nope_head_dim", key.saturating_sub(rope));
        self.set("v_head_dim", value);
        self.set("kv_lora_rank", self.required("attention.kv_lora_rank")?);
        self.set("q_lora_rank", self.whole("attention.q_lora_rank")?);
        self.set("n_shared_experts", self.whole("expert_shared_count")?.unwrap_or(0));
        self.experts_after_dense()?;
        let groups = self.whole("expert_group_count")?.unwrap_or(1);
        match sigmoid {
            true => {
                self.set("scoring_func", "sigmoid");
                self.set("topk_method", "noaux_tc");
            }
            false if groups > 1 => self.set("topk_method", "group_limited_greedy"),
            false => self.set("topk_method", "greedy"),
        }
        self.scaling()?;
        // A tenth of `mscale_all_dim` is what the file has; with an equal `mscale` only scores are stretched.
        let stretch = self.number("rope.scaling.yarn_log_multiplier")?.unwrap_or(0.0);
        if let Some(scaling) = self.keys.get_mut("rope_scaling").and_then(Value::as_object_mut) {
            let mscale = rounded(f64::from((10.0 * rounded(stretch)) as f32));
            scaling.insert("mscale".into(), mscale.into());
            scaling.insert("mscale_all_dim".into(), mscale.into());
        }
        Ok(self.keys)
    }

    /// ERNIE 4.5. What the header says of shared experts depends on the program that wrote it; the tensors do not.
    fn ernie(mut self) -> Keys {
        self.common("Ernie4_5_MoeForCausalLM")?;
        self.grouped()?;
        self.experts()?;
        let inner = self.required("expert_feed_forward_length")?;
        self.set("moe_intermediate_size", inner);
        let layers = 0..self.required("block_count")?.min(MOST_LAYERS);
        let mut sparse = layers.filter(|layer| self.has(&format!("blk.{layer}.ffn_gate_inp.weight")));
        let first = sparse.next();
        let last = sparse.next_back().or(first).unwrap_or(0);
        let first = first.unwrap_or(0);
        let shared = self.rows(&format!("blk.{first}.ffn_gate_shexp.weight"));
        self.set("moe_num_shared_experts", shared as u64 / inner.max(1));
        self.set("moe_layer_start_index", first);
        self.set("moe_layer_end_index", last);
        self.set("moe_layer_interval", self.whole("interleave_moe_layer_step")?.unwrap_or(1));
        Ok(self.keys)
    }

    /// Hunyuan-A13B. Its frequencies are stretched by their base alone, which the file has as it was made.
    fn hunyuan(mut self) -> Keys {
        self.common("HunYuanMoEV1ForCausalLM")?;
        self.grouped()?;
        self.experts()?;
        self.keys.remove("rope_scaling");
        self.set("moe_intermediate_size", self.required("expert_feed_forward_length")?);
        let shared = self.rows("blk.0.ffn_gate_shexp.weight") as u64;
        self.set("num_shared_expert", u64::from(shared > 0));
        if shared > 0 {
            self.set("intermediate_size", shared);
        }
        self.set("use_qk_norm", self.has("blk.0.attn_q_norm.weight"));
        self.set("norm_topk_prob", true);
        Ok(self.keys)
    }

    /// Granite with experts: rows of queries and keys lie in pairs, and factors have keys of their own.
    fn granite(mut self) -> Keys {
        self.common("GraniteMoeSharedForCausalLM")?;
        self.grouped()?;
        self.experts()?;
        self.set("rope_interleave", true);
        self.set("shared_intermediate_size", self.rows("blk.0.ffn_gate_shexp.weight") as u64);
        let factors = [
            ("attention.scale", "attention_multiplier"),
            ("embedding_scale", "embedding_multiplier"),
            ("residual_scale", "residual_multiplier"),
            ("logit_scale", "logits_scaling"),
        ];
        for (key, name) in factors {
            if let Some(factor) = self.number(key)? {
                self.set(name, rounded(factor));
            }
        }
        Ok(self.keys)
    }

    /// Every other layer has a window, the first one among them.
    fn gpt_oss(mut self) -> Keys {
        self.common("GptOssForCausalLM")?;
        self.grouped()?;
        self.experts()?;
        self.set("num_local_experts", self.required("expert_count")?);
        self.set("intermediate_size", self.required("expert_feed_forward_length")?);
        self.set("attention_bias", true);
        self.set("sliding_window", self.required("attention.sliding_window")?);
        let layers = self.required("block_count")?.min(MOST_LAYERS);
        let kind = |layer: u64| if layer.is_multiple_of(2) { "sliding_attention" } else { "full_attention" };
        self.set("layer_types", (0..layers).map(kind).collect::<Vec<_>>());
        self.set("swiglu_limit", 7.0);
        if let Some(scaling) = self.keys.get_mut("rope_scaling").and_then(Value::as_object_mut) {
            scaling.insert("truncate".into(), false.into());
            scaling.entry("beta_fast").or_insert(32.0.into());
            scaling.entry("beta_slow").or_insert(1.0.into());
        }
        Ok(self.keys)
    }
}

/// The shortest decimal of a float32, which is what its config.json had: 1e-6, not 9.999999974752427e-7.
fn rounded(number: f64) -> f64 {
    let single = number as f32;
    if f64::from(single) == number { single.to_string().parse().unwrap_or(number) } else { number }
}

/// Whole numbers without a point.
fn number_or_whole(number: f64) -> Value {
    let whole = number as u64;
    if whole as f64 == number { whole.into() } else { number.into() }
}
