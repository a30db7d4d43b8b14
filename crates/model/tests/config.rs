//! What configs are read as, and which are refused with what words.
#![expect(clippy::unwrap_used, reason = "helpers of tests may panic")]

use epsmoe_base::DType;
use epsmoe_device::op::{Activation, GroupLimit, Sight, Swish, TopKRouter};
use epsmoe_model::config::{self, Config};
use epsmoe_model::{
    Architecture, AttentionSpec, LayerSpec, MlpSpec, ModelSpec, PRESETS, RecurrentRule, preset, preset_text,
};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures").join(name)
}

/// A spec in a few lines.
fn outline(spec: &ModelSpec) -> String {
    let tied = if spec.tie_embeddings { " tied" } else { "" };
    let less = if spec.norm.less_one { " less 1" } else { "" };
    let mut lines = vec![format!(
        "{} {} V{} H{}{tied} positions {} {:?} {:e}{less} bos {:?} eos {:?}",
        spec.architecture,
        spec.dtype,
        spec.vocab,
        spec.hidden,
        spec.max_positions,
        spec.norm.kind,
        spec.norm.eps,
        spec.bos.unwrap_or_default(),
        spec.eos
    )];
    // Where kinds take turns, each once.
    let mut kinds: Vec<String> = Vec::new();
    for kind in spec.layers.iter().map(|layer| attention(&layer.attention)) {
        if !kinds.contains(&kind) {
            kinds.push(kind);
        }
    }
    kinds.sort_by_key(|kind| ["delta", "states"].iter().any(|start| kind.starts_with(start)));
    lines.extend(kinds);
    if let Some(rope) = spec.ropes.first() {
        assert_eq!(rope.inverse_frequencies.len(), rope.dim / 2);
        let last = rope.inverse_frequencies[rope.dim / 2 - 1];
        lines.push(format!("{:?} {} to {last:.4e} times {:.4}", rope.style, rope.dim, rope.attention_factor));
    }
    lines.extend(spec.layers.iter().map(layer));
    lines.dedup_by(|next, line| line == next);
    lines.join("\n")
}

fn attention(spec: &AttentionSpec) -> String {
    match spec {
        AttentionSpec::Gqa(spec) => {
            let mut text = format!(
                "{}/{} heads of {} scale {:.5}",
                spec.heads, spec.kv_heads, spec.head_dim, spec.scale
            );
            let extras = [
                spec.qkv_bias.then(|| "qkv bias".to_owned()),
                spec.output_bias.then(|| "output bias".to_owned()),
                spec.qk_norm.map(|norm| format!("norm {norm:?}")),
                spec.norm_after_rope.then(|| "after rope".to_owned()),
                spec.sinks.then(|| "sinks".to_owned()),
                spec.gated.then(|| "gated".to_owned()),
                spec.value_norm.then(|| "values normed".to_owned()),
                spec.values_are_keys.then(|| "values are keys".to_owned()),
                spec.clip_qkv.map(|clip| format!("clip {clip}")),
            ];
            extras.into_iter().flatten().for_each(|extra| text += &format!(", {extra}"));
            text
        }
        AttentionSpec::Mla(spec) => format!(
            "latent {} heads q {} kv {} of {}+{} value {} scale {:.5} bias {} eps {:e}",
            spec.heads,
            spec.q_lora.unwrap_or_default(),
            spec.kv_lora,
            spec.nope,
            spec.rope,
            spec.value,
            spec.scale,
            spec.bias,
            spec.inner_eps
        ),
        AttentionSpec::Recurrent(spec) => format!(
            "{} {}/{} heads of {}/{} over {}{}",
            match spec.rule {
                RecurrentRule::Delta => "delta".to_owned(),
                RecurrentRule::StateSpace { floor } => format!("states from {floor}"),
            },
            spec.value_heads,
            spec.key_heads,
            spec.value_width,
            spec.key_width,
            spec.taps,
            if spec.conv_bias { " + bias" } else { "" }
        ),
    }
}

fn layer(layer: &LayerSpec) -> String {
    let mut text = match &layer.mlp {
        MlpSpec::Absent => "no mlp".to_owned(),
        MlpSpec::Dense { inner, activation } => {
            format!("dense {inner}{}", if activation.is_some() { ", squared" } else { "" })
        }
        MlpSpec::Moe(moe) => {
            let mut text = format!("{} experts of {}, {}", moe.experts, moe.inner, router(&moe.router));
            if moe.router_bias {
                text += ", router bias";
            }
            match moe.activation {
                Some(Activation::SquaredRelu) => text += ", squared",
                Some(Activation::Swish(Swish::GELU_TANH)) => text += ", gelu",
                Some(Activation::Swish(Swish { alpha, limit, shift, .. })) => {
                    text += &format!(", swish {alpha} to {limit} + {shift}");
                }
                None => {}
            }
            if moe.router_scale {
                text += ", router scale";
            }
            if moe.expert_scales {
                text += ", scales";
            }
            if moe.expert_bias {
                text += ", expert bias";
            }
            if moe.correction_bias {
                text += ", bias";
            }
            if moe.identities > 0 {
                text += &format!(", {} identities", moe.identities);
            }
            if moe.scaled_inputs {
                text += ", scaled inputs";
            }
            if let Some(shared) = moe.shared {
                text += &format!(", shared {}{}", shared.inner, if shared.gated { " gated" } else { "" });
            }
            text
        }
    };
    match layer.sight {
        Sight::All => {}
        Sight::Last(window) => text += &format!(", window {window}"),
        Sight::Stretch(stretch) => text += &format!(", stretch {stretch}"),
    }
    match layer.rope {
        Some(0) => {}
        Some(other) => text += &format!(", rope {other}"),
        None => text += ", no rope",
    }
    if let Some(inner) = layer.residual_mlp {
        text += &format!(", residual {inner}");
    }
    if layer.sandwich {
        text += ", sandwich";
    }
    if layer.late_experts {
        text += ", late";
    }
    text
}

fn router(router: &TopKRouter) -> String {
    let normalise = if router.normalise { " normalised" } else { "" };
    let groups = match router.groups {
        Some(GroupLimit { groups, kept, by }) => format!(" in {kept} of {groups} groups by {by:?}"),
        None => String::new(),
    };
    format!("top {}{groups} {:?}{normalise} x{}", router.top_k, router.score, router.scale)
}

#[track_caller]
fn check(name: &str, expected: &str) {
    let spec = config::read(&fixture(name)).unwrap();
    let expected: Vec<&str> = expected.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    assert_eq!(outline(&spec), expected.join("\n"), "{name}");
}

#[test]
fn mixtral() {
    check(
        "mixtral",
        "MixtralForCausalLM bfloat16 V320 H64 positions 4096 Rms 1e-5 bos 0 eos [1]
         8/2 heads of 8 scale 0.35355
         HalfSplit 8 to 3.1623e-5 times 1.0000
         8 experts of 112, top 2 Softmax normalised x1",
    );
    check(
        "mixtral_f16",
        "MixtralForCausalLM float16 V320 H48 positions 32768 Rms 1e-5 bos 0 eos [1]
         6/3 heads of 20 scale 0.22361
         HalfSplit 20 to 3.9811e-6 times 1.0000
         5 experts of 40, top 3 Softmax normalised x1",
    );
}

#[test]
fn deepseek() {
    check(
        "deepseek_v2",
        "DeepseekV2ForCausalLM bfloat16 V320 H64 positions 4096 Rms 1e-6 bos 0 eos [1]
         latent 4 heads q 48 kv 32 of 16+8 value 16 scale 0.20412 bias false eps 1e-6
         Interleaved 8 to 1.0000e-3 times 1.0000
         dense 96
         16 experts of 32, top 4 in 2 of 4 groups by Max Softmax x2, shared 64",
    );
    check(
        "deepseek_v2_lite",
        "DeepseekV2ForCausalLM float32 V320 H32 positions 4096 Rms 1e-6 bos 0 eos [1]
         latent 4 heads q 0 kv 16 of 8+8 value 12 scale 0.25000 bias false eps 1e-6
         Interleaved 8 to 1.0000e-3 times 1.0000
         dense 48
         8 experts of 16, top 3 Softmax x1, shared 32",
    );
    // scale: 28^-1/2 · (0.1 · 0.707 · ln 40 + 1)² = 0.18898 · 1.58963
    check(
        "deepseek_v2_yarn",
        "DeepseekV2ForCausalLM float16 V320 H32 positions 2560 Rms 1e-6 bos 0 eos [1]
         latent 4 heads q 24 kv 16 of 12+16 value 8 scale 0.30041 bias false eps 1e-6
         Interleaved 16 to 7.9057e-6 times 1.0000
         dense 48
         12 experts of 16, top 3 in 2 of 4 groups by Max Softmax x4, shared 16",
    );
    check(
        "deepseek_v3",
        "DeepseekV3ForCausalLM bfloat16 V320 H32 positions 2560 Rms 1e-6 bos 0 eos [1]
         latent 4 heads q 24 kv 16 of 12+16 value 12 scale 0.29918 bias false eps 1e-6
         Interleaved 16 to 7.9057e-6 times 1.0880
         dense 48
         16 experts of 16, top 4 in 2 of 4 groups by TopTwoSum Sigmoid normalised x2.5, bias, shared 16",
    );
}

#[test]
fn dbrx() {
    check(
        "dbrx",
        "DbrxForCausalLM bfloat16 V320 H64 positions 2048 Layer 1e-5 bos 0 eos [1]
         8/2 heads of 8 scale 0.35355, clip 8
         HalfSplit 8 to 1.0000e-3 times 1.0000
         16 experts of 80, top 4 Softmax normalised x1",
    );
    check(
        "dbrx_clip",
        "DbrxForCausalLM bfloat16 V320 H32 positions 32768 Layer 1e-5 bos 0 eos []
         4/2 heads of 8 scale 0.35355, clip 0.8
         HalfSplit 8 to 5.3183e-5 times 1.0000
         6 experts of 24, top 3 Softmax normalised x1",
    );
}

#[test]
fn qwen() {
    check(
        "qwen2_moe",
        "Qwen2MoeForCausalLM bfloat16 V320 H48 positions 32768 Rms 1e-6 bos 0 eos [1]
         4/2 heads of 12 scale 0.28868, qkv bias
         HalfSplit 12 to 1.0000e-5 times 1.0000
         10 experts of 20, top 4 Softmax x1, shared 40 gated
         dense 56
         10 experts of 20, top 4 Softmax x1, shared 40 gated",
    );
    let layer = "8 experts of 16, top 3 Softmax normalised x1, shared 24 gated";
    check(
        "qwen2_moe_windows",
        &format!(
            "Qwen2MoeForCausalLM bfloat16 V320 H32 positions 512 Rms 1e-6 bos 0 eos [1]
             4/2 heads of 8 scale 0.35355, qkv bias
             HalfSplit 8 to 6.6479e-6 times 1.0000
             {layer}, window 20
             {layer}
             {layer}, window 20
             {layer}"
        ),
    );
    check(
        "qwen3_moe",
        "Qwen3MoeForCausalLM bfloat16 V320 H64 tied positions 4096 Rms 1e-6 bos 0 eos [1]
         4/2 heads of 32 scale 0.17678, norm PerHead
         HalfSplit 32 to 1.7783e-4 times 1.0000
         32 experts of 24, top 8 Softmax normalised x1",
    );
    check(
        "qwen3_moe_sparse",
        "Qwen3MoeForCausalLM bfloat16 V320 H32 positions 40960 Rms 1e-6 bos 0 eos [1]
         4/2 heads of 16 scale 0.25000, norm PerHead
         HalfSplit 16 to 5.6234e-6 times 1.0000
         dense 48
         12 experts of 20, top 4 Softmax normalised x1",
    );
    check(
        "qwen3_moe_merged",
        "Qwen3MoeForCausalLM bfloat16 V320 H32 positions 40960 Rms 1e-6 bos 0 eos [1]
         4/2 heads of 16 scale 0.25000, norm PerHead
         HalfSplit 16 to 5.6234e-6 times 1.0000
         12 experts of 20, top 4 Softmax normalised x1",
    );
}

#[test]
fn families_with_experts_behind_a_sigmoid() {
    check(
        "glm4_moe",
        "Glm4MoeForCausalLM bfloat16 V320 H32 positions 4096 Rms 1e-5 bos 0 eos [1]
         4/2 heads of 16 scale 0.25000, qkv bias, norm PerHead
         HalfSplit 8 to 3.1623e-5 times 1.0000
         dense 48
         12 experts of 16, top 4 Sigmoid normalised x2.5, bias, shared 16",
    );
    check(
        "glm4_moe_lite",
        "Glm4MoeLiteForCausalLM bfloat16 V320 H32 positions 4096 Rms 1e-5 bos 0 eos [1]
         latent 4 heads q 24 kv 16 of 12+8 value 16 scale 0.22361 bias false eps 1e-6
         Interleaved 8 to 3.1623e-5 times 1.0000
         dense 48
         12 experts of 16, top 4 in 1 of 2 groups by TopTwoSum Sigmoid normalised x2.5, bias, shared 16",
    );
    check(
        "dots1",
        "Dots1ForCausalLM bfloat16 V320 H32 positions 4096 Rms 1e-5 bos 0 eos [1]
         4/4 heads of 12 scale 0.28868, norm PerHead
         HalfSplit 12 to 1.0000e-5 times 1.0000
         dense 48
         12 experts of 16, top 4 Sigmoid normalised x2.5, bias, shared 32
         12 experts of 16, top 4 Sigmoid normalised x2.5, bias, shared 32, window 20",
    );
    check(
        "minimax_m2",
        "MiniMaxM2ForCausalLM bfloat16 V320 H48 positions 196608 Rms 1e-6 bos 0 eos [1]
         6/2 heads of 16 scale 0.25000, norm FullWidth
         HalfSplit 4 to 4.4721e-4 times 1.0000
         12 experts of 20, top 4 Sigmoid normalised x1, bias",
    );
    check(
        "bailing_moe_v2",
        "BailingMoeV2ForCausalLM bfloat16 V320 H32 positions 4096 Rms 1e-6 bos 0 eos [1]
         4/2 heads of 16 scale 0.25000, norm PerHead
         HalfSplit 8 to 4.6386e-5 times 1.0000
         dense 48
         16 experts of 16, top 4 in 2 of 4 groups by TopTwoSum Sigmoid normalised x2.5, bias, shared 16",
    );
}

#[test]
fn ernie_and_hunyuan() {
    check(
        "ernie4_5_moe",
        "Ernie4_5_MoeForCausalLM bfloat16 V320 H32 positions 4096 Rms 1e-5 bos 0 eos [1]
         4/2 heads of 16 scale 0.25000
         Interleaved 16 to 1.0313e-5 times 1.0000
         dense 48
         10 experts of 16, top 4 Softmax normalised x1, bias, shared 32
         dense 48",
    );
    // The base: 10000 · 1000^(12/10).
    check(
        "hunyuan_v1_moe",
        "HunYuanMoEV1ForCausalLM bfloat16 V320 H48 positions 4096 Rms 1e-5 bos 0 eos [1]
         4/2 heads of 12 scale 0.28868, norm PerHead, after rope
         HalfSplit 12 to 4.6416e-7 times 1.0000
         8 experts of 24, top 3 Softmax normalised x1, shared 24",
    );
}

#[test]
fn gpt_oss_and_granite() {
    let layer =
        "8 experts of 20, top 3 Softmax normalised x1, router bias, swish 1.702 to 7 + 1, expert bias";
    // Yarn: the first frequencies as they are, the last a thirty-second, and 0.1 · ln 32 + 1 on both.
    check(
        "gpt_oss",
        &format!(
            "GptOssForCausalLM bfloat16 V320 H48 positions 2048 Rms 1e-5 bos 0 eos [1]
             4/2 heads of 16 scale 0.25000, qkv bias, output bias, sinks
             HalfSplit 16 to 9.2421e-7 times 1.3466
             {layer}, window 20
             {layer}
             {layer}, window 20"
        ),
    );
    check(
        "granitemoeshared",
        "GraniteMoeSharedForCausalLM bfloat16 V320 H48 positions 4096 Rms 1e-6 bos 0 eos [1]
         4/2 heads of 12 scale 0.20000
         HalfSplit 12 to 4.6416e-4 times 1.0000
         8 experts of 24, top 3 Softmax normalised x1, shared 40",
    );
    let factors = config::read(&fixture("granitemoeshared")).unwrap().factors;
    assert_eq!((factors.embedding, factors.residual, factors.logits), (1.5, 0.7, 0.8));
}

/// Configurations as published, with what their authors say of their size: billions of parameters, all and active.
#[test]
fn published_configurations_are_read() {
    let glm = json!({
        "architectures": ["Glm4MoeForCausalLM"], "model_type": "glm4_moe", "attention_bias": true, "head_dim": 128,
        "num_attention_heads": 96, "num_key_value_heads": 8, "partial_rotary_factor": 0.5, "rope_theta": 1000000,
        "max_position_embeddings": 131_072, "n_group": 1, "topk_group": 1, "n_shared_experts": 1, "norm_topk_prob": true,
        "num_experts_per_tok": 8, "num_nextn_predict_layers": 1, "vocab_size": 151_552, "rms_norm_eps": 1e-5,
        "hidden_size": 4096, "intermediate_size": 10_944, "moe_intermediate_size": 1408, "n_routed_experts": 128,
        "num_hidden_layers": 46, "first_k_dense_replace": 1, "use_qk_norm": false, "routed_scaling_factor": 1.0,
        "rope_scaling": null, "torch_dtype": "bfloat16", "eos_token_id": [151_329, 151_336, 151_338]
    });
    let large = json!({
        "hidden_size": 5120, "intermediate_size": 12_288, "moe_intermediate_size": 1536, "n_routed_experts": 160,
        "num_hidden_layers": 92, "first_k_dense_replace": 3, "use_qk_norm": true, "routed_scaling_factor": 2.5
    });
    let flash = json!({
        "architectures": ["Glm4MoeLiteForCausalLM"], "model_type": "glm4_moe_lite", "hidden_size": 2048,
        "intermediate_size": 10_240, "moe_intermediate_size": 1536, "n_routed_experts": 64, "num_hidden_layers": 47,
        "num_attention_heads": 20, "num_key_value_heads": 20, "num_experts_per_tok": 4, "partial_rotary_factor": 1.0,
        "q_lora_rank": 768, "kv_lora_rank": 512, "qk_nope_head_dim": 192, "qk_rope_head_dim": 64, "v_head_dim": 256,
        "routed_scaling_factor": 1.8, "topk_method": "noaux_tc", "vocab_size": 154_880, "attention_bias": false
    });
    let minimax = json!({
        "architectures": ["MiniMaxM2ForCausalLM"], "model_type": "minimax_m2", "attn_type_list": vec![1; 62],
        "head_dim": 128, "hidden_size": 3072, "intermediate_size": 1536, "num_attention_heads": 48,
        "num_key_value_heads": 8, "num_hidden_layers": 62, "num_local_experts": 256, "num_experts_per_tok": 8,
        "rotary_dim": 64, "rope_theta": 5000000, "scoring_func": "sigmoid", "qk_norm_type": "per_layer",
        "use_qk_norm": true, "use_routing_bias": true, "use_mtp": true, "vocab_size": 200_064, "shared_intermediate_size": 0
    });
    let kimi = json!({
        "architectures": ["DeepseekV3ForCausalLM"], "model_type": "kimi_k2", "hidden_size": 7168,
        "intermediate_size": 18_432, "moe_intermediate_size": 2048, "n_routed_experts": 384, "n_shared_experts": 1,
        "num_experts_per_tok": 8, "num_hidden_layers": 61, "num_attention_heads": 64, "num_key_value_heads": 64,
        "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "topk_method": "noaux_tc", "scoring_func": "sigmoid",
        "norm_topk_prob": true, "routed_scaling_factor": 2.827, "q_lora_rank": 1536, "kv_lora_rank": 512,
        "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "vocab_size": 163_840, "rope_theta": 50000.0,
        "rope_scaling": { "type": "yarn", "factor": 32.0, "original_max_position_embeddings": 4096, "beta_fast": 1.0,
            "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0 }, "max_position_embeddings": 131_072
    });
    let moonlight = json!({
        "model_type": "deepseek_v3", "hidden_size": 2048, "intermediate_size": 11_264, "moe_intermediate_size": 1408,
        "n_routed_experts": 64, "n_shared_experts": 2, "num_experts_per_tok": 6, "num_hidden_layers": 27,
        "num_attention_heads": 16, "num_key_value_heads": 16, "q_lora_rank": null, "routed_scaling_factor": 2.446,
        "rope_scaling": null, "max_position_embeddings": 8192
    });
    let dots = json!({
        "architectures": ["Dots1ForCausalLM"], "model_type": "dots1", "hidden_size": 4096, "intermediate_size": 10_944,
        "moe_intermediate_size": 1408, "n_routed_experts": 128, "n_shared_experts": 2, "num_experts_per_tok": 6,
        "num_hidden_layers": 62, "num_attention_heads": 32, "num_key_value_heads": 32, "head_dim": 128,
        "first_k_dense_replace": 1, "sliding_window": null, "max_window_layers": 62, "use_sliding_window": false,
        "norm_topk_prob": true, "routed_scaling_factor": 2.5, "scoring_func": "noaux_tc", "vocab_size": 152_064
    });
    let ling = json!({
        "architectures": ["BailingMoeV2ForCausalLM"], "model_type": "bailing_moe", "hidden_size": 2048,
        "intermediate_size": 5120, "moe_intermediate_size": 512, "num_experts": 256, "num_shared_experts": 1,
        "num_experts_per_tok": 8, "n_group": 8, "topk_group": 4, "num_hidden_layers": 20, "num_attention_heads": 16,
        "num_key_value_heads": 4, "head_dim": 128, "partial_rotary_factor": 0.5, "rope_theta": 600000,
        "first_k_dense_replace": 1, "moe_router_enable_expert_bias": true, "norm_topk_prob": true, "router_dtype": "fp32",
        "routed_scaling_factor": 2.5, "score_function": "sigmoid", "use_qk_norm": true, "use_qkv_bias": false,
        "use_bias": false, "vocab_size": 157_184, "rope_scaling": null, "num_nextn_predict_layers": 0
    });
    let ernie = json!({
        "architectures": ["Ernie4_5_MoeForCausalLM"], "model_type": "ernie4_5_moe", "hidden_size": 2560,
        "intermediate_size": 12_288, "moe_intermediate_size": 1536, "moe_num_experts": 64, "moe_k": 6,
        "moe_num_shared_experts": 2, "moe_layer_start_index": 1, "moe_layer_end_index": 27, "moe_layer_interval": 1,
        "num_hidden_layers": 28, "num_attention_heads": 20, "num_key_value_heads": 4, "use_bias": false,
        "rope_theta": 500000, "tie_word_embeddings": true, "vocab_size": 103_424, "max_position_embeddings": 131_072
    });
    let hunyuan = json!({
        "architectures": ["HunYuanMoEV1ForCausalLM"], "model_type": "hunyuan_v1_moe", "hidden_size": 4096,
        "intermediate_size": 3072, "moe_intermediate_size": vec![3072; 32], "num_experts": 64, "moe_topk": vec![8; 32],
        "num_shared_expert": vec![1; 32], "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
        "head_dim": 128, "use_qk_norm": true, "use_cla": false, "tie_word_embeddings": true, "vocab_size": 128_167,
        "rope_scaling": { "alpha": 1000.0, "beta_fast": 32, "beta_slow": 1, "factor": 1.0, "mscale": 1.0,
            "mscale_all_dim": 1.0, "type": "dynamic" }, "max_position_embeddings": 32_768, "rope_theta": 10000.0
    });
    let gpt_oss = json!({
        "architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss", "hidden_size": 2880, "intermediate_size": 2880,
        "num_hidden_layers": 24, "num_local_experts": 32, "num_experts_per_tok": 4, "experts_per_token": 4,
        "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 64, "attention_bias": true,
        "sliding_window": 128, "swiglu_limit": 7.0, "rope_theta": 150000, "vocab_size": 201_088,
        "max_position_embeddings": 131_072, "initial_context_length": 4096,
        "rope_scaling": { "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": false,
            "original_max_position_embeddings": 4096 }, "quantization_config": { "quant_method": "mxfp4" }
    });
    let granite = json!({
        "architectures": ["GraniteMoeForCausalLM"], "model_type": "granitemoe", "hidden_size": 1536,
        "intermediate_size": 512, "num_hidden_layers": 32, "num_attention_heads": 24, "num_key_value_heads": 8,
        "num_local_experts": 40, "num_experts_per_tok": 8, "vocab_size": 49_155, "tie_word_embeddings": true,
        "attention_multiplier": 0.015625, "embedding_multiplier": 12.0, "residual_multiplier": 0.22,
        "logits_scaling": 6.0, "rope_theta": 10000.0, "max_position_embeddings": 4096
    });
    let next = json!({
        "architectures": ["Qwen3NextForCausalLM"], "model_type": "qwen3_next", "hidden_size": 2048, "intermediate_size": 5120,
        "decoder_sparse_step": 1, "full_attention_interval": 4, "head_dim": 256, "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": 128, "linear_num_key_heads": 16, "linear_num_value_heads": 32, "linear_value_head_dim": 128,
        "max_position_embeddings": 262_144, "mlp_only_layers": [], "moe_intermediate_size": 512, "norm_topk_prob": true,
        "num_attention_heads": 16, "num_experts": 512, "num_experts_per_tok": 10, "num_hidden_layers": 48,
        "num_key_value_heads": 2, "partial_rotary_factor": 0.25, "rope_scaling": null, "rope_theta": 10_000_000,
        "shared_expert_intermediate_size": 512, "tie_word_embeddings": false, "torch_dtype": "bfloat16",
        "use_sliding_window": false, "vocab_size": 151_936
    });
    let kinds = ["linear_attention", "linear_attention", "linear_attention", "full_attention"];
    let qwen = json!({
        "architectures": ["Qwen3_5MoeForConditionalGeneration"], "model_type": "qwen3_5_moe", "image_token_id": 248_056,
        "text_config": {
            "attention_bias": false, "attn_output_gate": true, "dtype": "bfloat16", "eos_token_id": 248_044,
            "full_attention_interval": 4, "head_dim": 256, "hidden_act": "silu", "hidden_size": 2048,
            "layer_types": kinds.repeat(10),
            "linear_conv_kernel_dim": 4, "linear_key_head_dim": 128, "linear_num_key_heads": 16,
            "linear_num_value_heads": 32, "linear_value_head_dim": 128, "max_position_embeddings": 262_144,
            "mlp_only_layers": [], "model_type": "qwen3_5_moe_text", "moe_intermediate_size": 512,
            "mtp_num_hidden_layers": 1, "num_attention_heads": 16, "num_experts": 256, "num_experts_per_tok": 8,
            "num_hidden_layers": 40, "num_key_value_heads": 2, "rms_norm_eps": 1e-6,
            "shared_expert_intermediate_size": 512, "vocab_size": 248_320, "mamba_ssm_dtype": "float32",
            "rope_parameters": { "mrope_interleaved": true, "mrope_section": [11, 11, 10], "rope_type": "default",
                "rope_theta": 10_000_000, "partial_rotary_factor": 0.25 }
        },
        "tie_word_embeddings": false, "vision_config": { "depth": 27, "hidden_size": 1152, "model_type": "qwen3_5_moe" }
    });
    let gemma = json!({
        "architectures": ["Gemma4ForConditionalGeneration"], "model_type": "gemma4", "dtype": "bfloat16",
        "text_config": {
            "attention_k_eq_v": true, "enable_moe_block": true, "final_logit_softcapping": 30.0, "global_head_dim": 512,
            "head_dim": 256, "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 2816,
            "hidden_size_per_layer_input": 0, "intermediate_size": 2112, "max_position_embeddings": 262_144,
            "model_type": "gemma4_text", "moe_intermediate_size": 704, "num_attention_heads": 16, "num_experts": 128,
            "num_global_key_value_heads": 2, "num_hidden_layers": 30, "num_key_value_heads": 8, "num_kv_shared_layers": 0,
            "rms_norm_eps": 1e-6, "sliding_window": 1024, "tie_word_embeddings": true, "top_k_experts": 8,
            "use_bidirectional_attention": "vision", "use_double_wide_mlp": false, "vocab_size": 262_144,
            "rope_parameters": {
                "full_attention": { "partial_rotary_factor": 0.25, "rope_theta": 1_000_000.0, "rope_type": "proportional" },
                "sliding_attention": { "rope_theta": 10_000.0, "rope_type": "default" }
            }
        },
        "vision_config": { "model_type": "gemma4_vision" }
    });
    let solar = json!({
        "architectures": ["SolarOpenForCausalLM"], "model_type": "solar_open", "hidden_size": 4096,
        "moe_intermediate_size": 1280, "n_routed_experts": 128, "n_shared_experts": 1, "num_experts_per_tok": 8,
        "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 128, "num_hidden_layers": 48,
        "norm_topk_prob": true, "routed_scaling_factor": 1.0, "vocab_size": 196_608, "max_position_embeddings": 131_072
    });
    let exaone = json!({
        "architectures": ["ExaoneMoEForCausalLM"], "model_type": "exaone_moe", "hidden_size": 6144,
        "intermediate_size": 18_432, "moe_intermediate_size": 2048, "num_experts": 128, "num_experts_per_tok": 8,
        "num_shared_experts": 1, "num_hidden_layers": 48, "num_attention_heads": 64, "num_key_value_heads": 8,
        "head_dim": 128, "first_k_dense_replace": 1, "sliding_window": 128, "sliding_window_pattern": "LLLG",
        "routed_scaling_factor": 2.5, "norm_topk_prob": true, "vocab_size": 153_600, "rope_theta": 1_000_000
    });
    let longcat = json!({
        "architectures": ["LongcatFlashForCausalLM"], "attention_bias": false, "vocab_size": 131_072, "hidden_size": 6144,
        "ffn_hidden_size": 12_288, "expert_ffn_hidden_size": 2048, "num_layers": 28, "num_attention_heads": 64,
        "kv_lora_rank": 512, "q_lora_rank": 1536, "qk_rope_head_dim": 64, "v_head_dim": 128, "qk_nope_head_dim": 128,
        "mla_scale_q_lora": true, "mla_scale_kv_lora": true, "routed_scaling_factor": 6.0, "n_routed_experts": 512,
        "rms_norm_eps": 1e-5, "rope_theta": 10_000_000.0, "max_position_embeddings": 131_072, "zero_expert_num": 256,
        "zero_expert_type": "identity", "moe_topk": 12, "attention_method": "MLA", "bos_token_id": 1, "eos_token_id": 2
    });
    let scout = json!({
        "architectures": ["Llama4ForConditionalGeneration"], "model_type": "llama4", "tie_word_embeddings": false,
        "text_config": {
            "attention_bias": false, "attention_chunk_size": 8192, "attn_temperature_tuning": 4, "floor_scale": 8192,
            "attn_scale": 0.1, "head_dim": 128, "hidden_size": 5120, "interleave_moe_layer_step": 1,
            "intermediate_size": 8192, "intermediate_size_mlp": 16_384, "max_position_embeddings": 10_485_760,
            "model_type": "llama4_text", "no_rope_layers": [], "num_attention_heads": 40, "num_experts_per_tok": 1,
            "num_hidden_layers": 48, "num_key_value_heads": 8, "num_local_experts": 16, "rope_theta": 500_000.0,
            "rope_scaling": { "factor": 16.0, "high_freq_factor": 1.0, "low_freq_factor": 1.0,
                "original_max_position_embeddings": 8192, "rope_type": "llama3" }, "use_qk_norm": true,
            "vocab_size": 202_048
        },
        "vision_config": { "model_type": "llama4_vision_model" }
    });
    let maverick = json!({ "text_config": {
        "model_type": "llama4_text", "hidden_size": 5120, "interleave_moe_layer_step": 2, "intermediate_size": 8192,
        "intermediate_size_mlp": 16_384, "num_attention_heads": 40, "num_hidden_layers": 48, "num_key_value_heads": 8,
        "num_local_experts": 128, "num_experts_per_tok": 1, "rope_scaling": null, "use_qk_norm": false, "vocab_size": 202_048
    } });
    let phi = json!({
        "architectures": ["PhiMoEForCausalLM"], "attention_bias": true, "hidden_size": 4096, "input_jitter_noise": 0.01,
        "intermediate_size": 6400, "lm_head_bias": true, "max_position_embeddings": 131_072, "model_type": "phimoe",
        "num_attention_heads": 32, "num_experts_per_tok": 2, "num_hidden_layers": 32, "num_key_value_heads": 8,
        "num_local_experts": 16, "original_max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "rope_theta": 10_000.0,
        "rope_scaling": { "type": "longrope", "short_factor": vec![1.0; 64], "long_factor": vec![2.0; 64],
            "short_mscale": 1.243_163_121_016_122, "long_mscale": 1.243_163_121_016_122,
            "original_max_position_embeddings": 4096 },
        "router_jitter_noise": 0.01, "sliding_window": 131_072, "tie_word_embeddings": false, "vocab_size": 32_064
    });
    let with = |base: &Value, patch: Value| {
        let mut config = base.clone();
        config.as_object_mut().unwrap().extend(patch.as_object().unwrap().clone());
        config
    };
    let of_preset = |name| -> Value { serde_json::from_str(preset_text(name).unwrap()).unwrap() };
    let hybrid = of_preset("granite-4.0-h-small");
    let tiny = json!({
        "hidden_size": 1536, "intermediate_size": 512, "shared_intermediate_size": 1024, "mamba_n_heads": 48,
        "num_attention_heads": 12, "num_key_value_heads": 4, "num_local_experts": 64, "num_experts_per_tok": 6, "logits_scaling": 6
    });
    let expected = [
        ("GLM-4.5-Air", glm.clone(), 106.9, 13.4),
        ("GLM-4.6", with(&glm, large), 352.8, 33.6),
        ("GLM-4.7-Flash", with(&glm, flash), 29.9, 3.9),
        ("MiniMax-M2", minimax, 228.7, 11.0),
        ("Kimi-K2", kimi.clone(), 1026.4, 32.9),
        ("Moonlight", with(&kimi, moonlight), 16.0, 2.9),
        ("dots.llm1", dots, 142.8, 14.0),
        ("Ling-mini-2.0", ling, 16.3, 1.4),
        ("ERNIE-4.5-21B-A3B", ernie, 21.8, 3.4),
        ("Hunyuan-A13B", hunyuan, 80.4, 12.8),
        ("gpt-oss-20b", gpt_oss.clone(), 20.9, 4.2),
        (
            "gpt-oss-120b",
            with(&gpt_oss, json!({ "num_hidden_layers": 36, "num_local_experts": 128 })),
            116.8,
            5.7,
        ),
        ("granite-3.0-3b-a800m", granite, 3.3, 0.9),
        ("Granite-4.0-H-Small", hybrid.clone(), 32.2, 8.8),
        ("Granite-4.0-H-Tiny", with(&hybrid, tiny), 6.9, 1.5),
        ("Nemotron-3-Nano-30B-A3B", of_preset("nemotron-3-nano-30b-a3b"), 31.6, 3.6),
        ("Qwen3-Next-80B-A3B", next, 79.7, 3.9),
        ("Qwen3.5-35B-A3B", qwen, 34.7, 3.5),
        ("Gemma-4-26B-A4B", gemma, 25.2, 3.8),
        ("Solar-Open-100B", solar, 102.6, 12.0),
        ("K-EXAONE-236B-A23B", exaone, 236.6, 23.7),
        // Of the twelve experts that a token is sent to, eight compute, on average.
        ("LongCat-Flash", longcat, 560.7, 27.9),
        ("Llama-4 Scout", scout.clone(), 107.8, 17.2),
        ("Llama-4 Maverick", with(&scout, maverick), 400.7, 17.2),
        ("Phi-3.5-MoE", phi, 41.9, 6.6),
    ];
    for (name, config, total, active) in expected {
        let spec = config::parse(config.to_string().as_bytes(), name).unwrap();
        let parameters = spec.parameters();
        let close =
            |numbers: u64, billions: f64| (numbers as f64 / 1e9 - billions).abs() < 0.006 * billions + 0.05;
        assert!(close(parameters.total, total) && close(parameters.active, active), "{name}: {parameters:?}");
    }
}

#[test]
fn state_spaces() {
    check(
        "granitemoehybrid",
        "GraniteMoeHybridForCausalLM bfloat16 V320 H48 positions 4096 Rms 1e-5 bos 0 eos [1]
         4/2 heads of 12 scale 0.20000
         states from 0 8/1 heads of 12/20 over 4 + bias
         8 experts of 24, top 3 Softmax normalised x1, shared 40, no rope",
    );
    check(
        "nemotron_h",
        "NemotronHForCausalLM bfloat16 V320 H48 positions 4096 Rms 1e-5 bos 0 eos [1]
         4/2 heads of 16 scale 0.25000
         states from 0.001 8/2 heads of 10/12 over 4 + bias
         8 experts of 20, top 3 Sigmoid normalised x2.5, squared, bias, shared 36, no rope
         no mlp, no rope
         8 experts of 20, top 3 Sigmoid normalised x2.5, squared, bias, shared 36, no rope
         dense 40, squared, no rope
         8 experts of 20, top 3 Sigmoid normalised x2.5, squared, bias, shared 36, no rope",
    );
    // Words in the place of letters.
    let words = |config: &Value| {
        let mut config = config.clone();
        let keys = config.as_object_mut().unwrap();
        let letters = keys.remove("hybrid_override_pattern").unwrap();
        let kind = |letter| match letter {
            'M' => "mamba",
            '*' => "attention",
            'E' => "moe",
            _ => "mlp",
        };
        let kinds: Vec<&str> = letters.as_str().unwrap().chars().map(kind).collect();
        keys.insert("layers_block_type".into(), json!(kinds));
        config
    };
    let nano: Value = serde_json::from_str(preset_text("nemotron-3-nano-30b-a3b").unwrap()).unwrap();
    let parse = |config: &Value| config::parse(config.to_string().as_bytes(), "c");
    assert_eq!(parse(&words(&nano)).unwrap(), parse(&nano).unwrap());
    let granite: Value = serde_json::from_str(preset_text("granite-4.0-h-small").unwrap()).unwrap();
    let refused = |base: &Value, key: &str, value: Value, said: &str| {
        let mut config = base.clone();
        config.as_object_mut().unwrap().insert(key.to_owned(), value);
        let told = parse(&config).unwrap_err().to_string();
        assert!(told.contains(said), "{told}");
    };
    refused(&nano, "hybrid_override_pattern", json!("EM*E"), "layer 0 is an MLP that follows no attention");
    refused(&nano, "hybrid_override_pattern", json!("ME?"), "has `?`; supported are M, *, E and -");
    refused(&nano, "hybrid_override_pattern", json!("MEM-"), "none of its layers has attention");
    refused(&nano, "moe_latent_size", json!(1024), "`moe_latent_size` is 1024");
    refused(&nano, "mlp_hidden_act", json!("silu"), "`mlp_hidden_act`");
    refused(&granite, "mamba_n_groups", json!(8), "`mamba_n_groups` is 8");
    refused(&granite, "mamba_d_head", json!(32), "128 heads (`mamba_n_heads`) of 32 (`mamba_d_head`)");
    refused(&granite, "position_embedding_type", json!("alibi"), "`position_embedding_type`");
    refused(&granite, "num_local_experts", json!(0), "`num_local_experts` is 0");
}

#[test]
fn gemma() {
    check(
        "gemma4",
        "Gemma4ForConditionalGeneration bfloat16 V320 H32 tied positions 4096 Rms 1e-6 bos 0 eos [1]
         4/2 heads of 8 scale 1.00000, norm PerHead, values normed
         4/1 heads of 16 scale 1.00000, norm PerHead, values normed, values are keys
         HalfSplit 8 to 1.0000e-3 times 1.0000
         8 experts of 16, top 3 Softmax normalised x1, gelu, router scale, scales, window 20, residual 40, sandwich
         8 experts of 16, top 3 Softmax normalised x1, gelu, router scale, scales, rope 1, residual 40, sandwich
         8 experts of 16, top 3 Softmax normalised x1, gelu, router scale, scales, window 20, residual 40, sandwich
         8 experts of 16, top 3 Softmax normalised x1, gelu, router scale, scales, rope 1, residual 40, sandwich",
    );
    let spec = config::read(&fixture("gemma4")).unwrap();
    // A quarter of the wide heads turns, as slowly as if all did.
    close(&spec.ropes[1].inverse_frequencies, &[1.0, 0.177_827_94, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]);
    assert_eq!((spec.factors.embedding, spec.factors.cap), (32f32.sqrt(), Some(1.5)));
    let inside = |key: &str, value: Value| {
        let text = std::fs::read(fixture("gemma4").join("config.json")).unwrap();
        let mut config: Value = serde_json::from_slice(&text).unwrap();
        config["text_config"][key] = value;
        config::parse(config.to_string().as_bytes(), "config.json").unwrap_err().to_string()
    };
    assert_eq!(
        inside("enable_moe_block", json!(false)),
        "config.json: `enable_moe_block` is not true: this Gemma has no experts, which is not supported"
    );
    assert_eq!(
        inside("hidden_size_per_layer_input", json!(256)),
        "config.json: `hidden_size_per_layer_input` is 256; only 0 is supported"
    );
}

#[test]
fn families_of_deepseeks_gate() {
    check(
        "solar_open",
        "SolarOpenForCausalLM bfloat16 V320 H32 positions 128 Rms 1e-5 bos 0 eos [1]
         4/2 heads of 12 scale 0.28868
         HalfSplit 12 to 5.0000e-6 times 1.0693
         12 experts of 16, top 4 in 2 of 3 groups by TopTwoSum Sigmoid normalised x2.5, bias, shared 16",
    );
    check(
        "exaone_moe",
        "ExaoneMoEForCausalLM bfloat16 V320 H32 positions 4096 Rms 1e-5 bos 0 eos [1]
         4/2 heads of 16 scale 0.25000, norm PerHead
         HalfSplit 16 to 5.6234e-6 times 1.0000
         dense 48, window 20
         10 experts of 16, top 3 Sigmoid normalised x2.5, bias, shared 16, no rope
         10 experts of 16, top 3 Sigmoid normalised x2.5, bias, shared 16, window 20
         10 experts of 16, top 3 Sigmoid normalised x2.5, bias, shared 16, no rope",
    );
    check(
        "hy_v3",
        "HYV3ForCausalLM bfloat16 V320 H48 positions 4096 Rms 1e-5 bos 0 eos [1]
         4/2 heads of 16 scale 0.25000, norm PerHead
         HalfSplit 16 to 6.8129e-7 times 1.0000
         dense 40
         8 experts of 16, top 3 Sigmoid normalised x2.826, bias, shared 32",
    );
    check(
        "kimi_k25",
        "DeepseekV3ForCausalLM bfloat16 V320 H32 positions 4096 Rms 1e-6 bos 0 eos [1]
         latent 4 heads q 24 kv 16 of 12+8 value 12 scale 0.22361 bias false eps 1e-6
         Interleaved 8 to 2.9907e-4 times 1.0000
         dense 48
         12 experts of 16, top 3 Sigmoid normalised x2.8, bias, shared 16",
    );
}

#[test]
fn longcat_llama_and_phi() {
    check(
        "longcat_flash",
        "LongcatFlashForCausalLM bfloat16 V320 H32 positions 4096 Rms 1e-5 bos 0 eos [1]
         latent 4 heads q 24 kv 16 of 12+8 value 12 scale 0.25820 bias false eps 1e-6
         Interleaved 8 to 5.6234e-6 times 1.0000
         8 experts of 16, top 4 Softmax x3, bias, 4 identities, shared 40, late
         dense 40
         8 experts of 16, top 4 Softmax x3, bias, 4 identities, shared 40, late
         dense 40",
    );
    check(
        "llama4_text",
        "Llama4ForConditionalGeneration bfloat16 V320 H48 positions 4096 Rms 1e-5 bos 0 eos [1]
         6/2 heads of 8 scale 0.35355, norm Unweighted, after rope
         6/2 heads of 8 scale 0.35355
         Interleaved 8 to 5.3183e-5 times 1.0000
         dense 40, stretch 20
         6 experts of 24, top 1 SigmoidOfLogit x1, scaled inputs, shared 24, stretch 20
         dense 40, stretch 20
         6 experts of 24, top 1 SigmoidOfLogit x1, scaled inputs, shared 24, rope 1",
    );
    check(
        "phimoe",
        "PhimoeForCausalLM bfloat16 V320 H48 positions 1024 Layer 1e-5 bos 0 eos [1]
         6/2 heads of 8 scale 0.35355, qkv bias, output bias
         HalfSplit 8 to 6.6667e-4 times 1.2000
         8 experts of 20, top 2 SparseMixer { jitter: 0.1 } x1, window 100",
    );
    let spec = config::read(&fixture("longcat_flash")).unwrap();
    let AttentionSpec::Mla(attention) = spec.layers[0].attention else { panic!("{:?}", spec.layers[0]) };
    assert_eq!(attention.latent_scale, 2f32.sqrt());
    for (patch, expected) in [
        (
            json!({ "zero_expert_type": "zero" }),
            "`zero_expert_type` is \"zero\", but must be `identity`, the only kind supported; correct it or fetch the file again",
        ),
        (json!({ "norm_topk_prob": true }), "`norm_topk_prob` is true, which is not supported"),
    ] {
        refused("longcat_flash", patch, expected);
    }
    refused(
        "llama4_text",
        json!({ "attention_chunk_size": null }),
        "layer 0 has attention in chunks, but `attention_chunk_size` is null; correct it or fetch the file again",
    );
    refused(
        "llama4_text",
        json!({ "no_rope_layers": [1, 0] }),
        "`no_rope_layers` must say 0 or 1 for each of 4 layers; correct it or fetch the file again",
    );
    refused(
        "phimoe",
        json!({ "num_experts_per_tok": 3 }),
        "`num_experts_per_tok` is 3; this router always chooses 2",
    );
}

#[test]
fn delta_nets() {
    check(
        "qwen3_next",
        "Qwen3NextForCausalLM bfloat16 V320 H32 positions 4096 Rms 1e-6 less 1 bos 0 eos [1]
         4/2 heads of 16 scale 0.25000, norm PerHead, gated
         delta 8/4 heads of 8/12 over 4
         HalfSplit 4 to 3.1623e-4 times 1.0000
         8 experts of 16, top 3 Softmax normalised x1, shared 24 gated
         dense 40
         8 experts of 16, top 3 Softmax normalised x1, shared 24 gated",
    );
    check(
        "qwen3_5_moe",
        "Qwen3_5MoeForConditionalGeneration bfloat16 V320 H32 positions 4096 Rms 1e-6 less 1 bos 0 eos [1]
         4/2 heads of 16 scale 0.25000, norm PerHead, gated
         delta 8/4 heads of 12/8 over 4
         HalfSplit 8 to 5.6234e-6 times 1.0000
         10 experts of 16, top 3 Softmax normalised x1, shared 24 gated",
    );
    let kinds = json!({ "layer_types": ["linear_attention", "full_attention", "full_attention"] });
    refused(
        "qwen3_next",
        kinds,
        "`layer_types` has 3 entries for 4 layers; correct it or fetch the file again",
    );
    let kinds = json!({ "layer_types": ["linear_attention", "chunked", "full_attention", "full_attention"] });
    refused(
        "qwen3_next",
        kinds,
        "`layer_types` has \"chunked\"; supported are full_attention and linear_attention",
    );
    refused(
        "qwen3_next",
        json!({ "linear_num_value_heads": 6 }),
        "`linear_num_value_heads` (6) is no multiple of `linear_num_key_heads` (4); correct it or fetch the file again",
    );
}

#[test]
fn what_is_asked_for_and_missing_is_said() {
    for (name, missing) in [
        ("DeepseekV32ForCausalLM", "its attention looks at tokens that an indexer chooses"),
        (
            "KimiLinearForCausalLM",
            "most of its layers have a delta net whose decays are one for each channel",
        ),
        ("JambaForCausalLM", "most of its layers are state spaces whose decays are one for each channel"),
        (
            "DeepseekV4ForCausalLM",
            "its attention looks at compressed tokens, and its residual stream is several",
        ),
    ] {
        refused(
            "mixtral",
            json!({ "architectures": [name] }),
            &format!("architecture `{name}` is not supported: {missing}"),
        );
    }
}

/// Numbers printed by transformers 5.17 for the same configs.
#[test]
fn frequencies_of_long_contexts() {
    let llama = json!({ "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192 });
    let rope = patched("qwen3_moe", json!({ "head_dim": 64, "rope_theta": 5e5, "rope_scaling": llama }))
        .unwrap()
        .ropes
        .remove(0);
    close(&rope.inverse_frequencies[14..18], &[3.211_446e-3, 1.371_893_7e-3, 5.248_46e-4, 1.785_077_9e-4]);
    let factors: Vec<f64> = (0..16).map(|i| 1.0 + 0.5 * f64::from(i)).collect();
    let long = json!({ "rope_type": "longrope", "short_factor": factors, "long_factor": factors,
        "original_max_position_embeddings": 1024, "factor": 4.0 });
    let spec = patched("qwen3_moe", json!({ "rope_scaling": long })).unwrap();
    close(&spec.ropes[0].inverse_frequencies[..3], &[1.0, 0.374_894_2, 0.158_113_88]);
    assert!((spec.ropes[0].attention_factor - 1.095_445_1).abs() < 1e-6);
    assert_eq!(spec.max_positions, 1024);
    let plain = patched("qwen3_moe", json!({})).unwrap();
    for kind in ["dynamic", "mrope"] {
        let same = json!({ "rope_scaling": { "rope_type": kind, "factor": 2.0 } });
        assert_eq!(patched("qwen3_moe", same).unwrap().ropes, plain.ropes);
    }
}

#[test]
fn olmoe_and_arctic() {
    check(
        "olmoe",
        "OlmoeForCausalLM bfloat16 V320 H48 positions 4096 Rms 1e-5 bos 0 eos [1]
         6/3 heads of 8 scale 0.35355, norm FullWidth, clip 0.9
         HalfSplit 8 to 1.0000e-3 times 1.0000
         8 experts of 24, top 3 Softmax x1",
    );
    check(
        "arctic",
        "ArcticForCausalLM bfloat16 V320 H32 positions 4096 Rms 1e-5 bos 0 eos [1]
         4/2 heads of 8 scale 0.35355
         HalfSplit 8 to 1.0000e-3 times 1.0000
         dense 24
         8 experts of 24, top 2 Softmax normalised x1, residual 32
         dense 24
         8 experts of 24, top 2 Softmax normalised x1, residual 32",
    );
}

/// Billions of parameters, all and active, and bytes a token leaves in the cache in bfloat16. Counted by hand
/// from the shapes; they round to what the authors publish (236 and 21 for DeepSeek-V2, 480 and 17 for Arctic).
#[test]
fn presets_are_as_large_as_published() {
    let expected = [
        ("deepseek-v2", 235.7, 21.4, 60 * 576 * 2),
        ("deepseek-v2-lite", 15.7, 2.7, 27 * 576 * 2),
        ("deepseek-v3", 671.0, 37.6, 61 * 576 * 2),
        ("mixtral-8x7b", 46.7, 12.9, 32 * 2048 * 2),
        ("dbrx", 131.6, 36.5, 40 * 2048 * 2),
        ("qwen2-moe-a2.7b", 14.3, 2.7, 24 * 4096 * 2),
        ("qwen3-30b-a3b", 30.5, 3.3, 48 * 1024 * 2),
        ("olmoe-1b-7b", 6.9, 1.3, 16 * 4096 * 2),
        ("arctic", 478.6, 17.3, 35 * 2048 * 2),
        ("gpt-oss-20b", 20.91, 4.19, 24 * 1024 * 2),
        ("qwen3.5-35b-a3b", 34.66, 3.46, 10 * 1024 * 2),
        ("longcat-flash", 560.7, 27.9, 56 * 576 * 2),
        ("granite-4.0-h-small", 32.21, 8.8, 4 * 2048 * 2),
        ("nemotron-3-nano-30b-a3b", 31.58, 3.58, 6 * 512 * 2),
        ("llamacpp-qwen3moe-mini", 0.855, 0.1, 6 * 512 * 2),
        ("llamacpp-deepseek2-mini", 0.748, 0.1, 6 * 288 * 2),
        ("llamacpp-deepseek2-lite4", 1.86, 0.3, 4 * 576 * 2),
    ];
    for (name, total, active, cache) in expected {
        let spec = preset(name).unwrap();
        let parameters = spec.parameters();
        let close = |numbers: u64, billions: f64| (numbers as f64 / 1e9 - billions).abs() < 0.1;
        assert!(close(parameters.total, total), "{name}: {parameters:?}");
        assert!(close(parameters.active, active), "{name}: {parameters:?}");
        assert_eq!(spec.cache_bytes_per_token(DType::BF16, 1), cache, "{name}");
    }
    for (name, _) in PRESETS {
        preset(name).unwrap();
    }
}

#[test]
fn an_unknown_preset_lists_the_known() {
    let message = preset("gpt-5").unwrap_err().to_string();
    assert!(
        message.starts_with("there is no preset `gpt-5`; there are: deepseek-v2-mini, mixtral-mini"),
        "{message}"
    );
}

#[track_caller]
fn close(got: &[f32], want: &[f32]) {
    for (i, (got, want)) in got.iter().zip(want).enumerate() {
        assert!((got - want).abs() <= want.abs() * 3e-7, "frequency {i} is {got:e}, expected {want:e}");
    }
}

/// Numbers printed by transformers 5.17 for the same configs.
#[test]
fn frequencies_are_the_published_ones() {
    let spec = config::read(&fixture("deepseek_v3")).unwrap();
    let expected =
        [1.0, 0.213_453_72, 0.034_999_996, 7.905_695e-4, 2.5e-4, 7.905_695e-5, 2.5e-5, 7.905_694_5e-6];
    close(&spec.ropes[0].inverse_frequencies, &expected);
    assert!((spec.ropes[0].attention_factor - 1.087_954_6).abs() < 1e-6);

    let frequencies = preset("deepseek-v2").unwrap().ropes.remove(0).inverse_frequencies;
    close(&frequencies[9..13], &[0.074_989_416, 0.056_234_13, 0.039_006_926, 0.026_879_36]);
    close(&frequencies[21..25], &[4.149_904e-4, 1.778_279_4e-4, 3.333_803_4e-5, 2.5e-5]);

    let yarn = json!({ "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768 });
    let rope = patched("qwen3_moe", json!({ "head_dim": 64, "rope_theta": 1e6, "rope_scaling": yarn }))
        .unwrap()
        .ropes
        .remove(0);
    close(&rope.inverse_frequencies[11..14], &[8.659_643e-3, 5.154_795_5e-3, 3.043_117_7e-3]);
    assert!((rope.attention_factor - 1.138_629_4).abs() < 1e-6);

    let linear = json!({ "type": "linear", "factor": 8 });
    let rope = patched("mixtral", json!({ "rope_scaling": linear })).unwrap().ropes.remove(0);
    close(&rope.inverse_frequencies, &[0.125, 0.031_622_78 / 8.0, 0.001 / 8.0, 3.162_277_5e-5 / 8.0]);
}

#[test]
fn old_and_new_keys_mean_the_same() {
    let old = patched("mixtral", json!({ "rope_theta": 5e4, "torch_dtype": "float16" })).unwrap();
    let new = json!({
        "rope_theta": null, "torch_dtype": null, "dtype": "float16",
        "rope_parameters": { "rope_type": "default", "rope_theta": 5e4 }
    });
    assert_eq!(old, patched("mixtral", new).unwrap());
}

#[test]
fn nulls_are_not_always_absences() {
    let spec = patched("mixtral_f16", json!({ "num_key_value_heads": null })).unwrap();
    let AttentionSpec::Gqa(attention) = spec.layers[0].attention else { panic!("{:?}", spec.layers[0]) };
    assert_eq!(attention.kv_heads, 6);
    let spec = patched("deepseek_v2", json!({ "n_shared_experts": null })).unwrap();
    assert_eq!(spec.layers[1].mlp.moe().unwrap().shared, None);
    let spec = patched("mixtral", json!({ "eos_token_id": [7, 9], "bos_token_id": null })).unwrap();
    assert_eq!((spec.bos, spec.eos), (None, vec![7, 9]));
}

/// A fixture's config with some keys replaced.
fn patched(name: &str, patch: Value) -> Result<ModelSpec, epsmoe_model::ModelError> {
    let text = std::fs::read(fixture(name).join("config.json")).unwrap();
    let mut config: Value = serde_json::from_slice(&text).unwrap();
    for (key, value) in patch.as_object().unwrap() {
        config[key] = value.clone();
    }
    config::parse(config.to_string().as_bytes(), "config.json")
}

/// A fixture's config with some keys replaced, and what was said about it.
#[track_caller]
fn remarked(name: &str, patch: Value, expected: &[&str]) -> ModelSpec {
    let text = std::fs::read(fixture(name).join("config.json")).unwrap();
    let mut config: Value = serde_json::from_slice(&text).unwrap();
    config.as_object_mut().unwrap().extend(patch.as_object().unwrap().clone());
    let config = Config::parse(config.to_string().as_bytes(), "config.json").unwrap();
    let expected: Vec<String> = expected.iter().map(|remark| format!("config.json: {remark}")).collect();
    assert_eq!(config.remarks, expected);
    config.spec
}

#[test]
fn what_python_writes_is_read() {
    let text = std::fs::read_to_string(fixture("mixtral").join("config.json")).unwrap();
    let with = |keys: &str| {
        let text = text.replacen('{', &format!("{{{keys},"), 1);
        config::parse(text.as_bytes(), "config.json").map_err(|error| error.to_string())
    };
    let plain = with("\"unused\": 0").unwrap();
    for unused in [
        r#""unused": Infinity"#,
        r#""unused": [NaN, {"a": -Infinity}]"#,
        r#""unused": 1e999"#,
        r#""unused": 123456789012345678901234567890"#,
        r#""unused": "\ud800""#,
        r#""unused": 1, "unused": 2"#,
    ] {
        assert_eq!(with(unused).as_ref(), Ok(&plain), "{unused}");
    }
    // Of a key that is there twice the last value counts.
    assert_eq!(with(r#""vocab_size": 7"#).unwrap(), plain);
    // Where a number is needed, none is refused. The fixture has its own of these further down.
    let needed = |key: &str, value: &str| {
        let mut config: Value = serde_json::from_str(&text).unwrap();
        config[key] = json!("HERE");
        let text = config.to_string().replace("\"HERE\"", value);
        config::parse(text.as_bytes(), "config.json").unwrap_err().to_string()
    };
    assert_eq!(
        needed("rms_norm_eps", "NaN"),
        "config.json: `rms_norm_eps` is \"NaN\", but must be a number from 0.000000000000000000000000000001 to 1; correct \
         it or fetch the file again"
    );
    assert!(needed("hidden_size", "Infinity").contains("`hidden_size` is \"Infinity\", but must be"));
    assert!(needed("hidden_size", "1e999").contains("`hidden_size` is \"1e999\", but must be"));
    assert_eq!(patched("mixtral", json!({ "hidden_size": 64.0 })).unwrap(), plain);
}

#[test]
fn stretched_contexts_are_as_long_as_stretched() {
    let positions = |name: &str, patch: Value| patched(name, patch).unwrap().max_positions;
    let yarn = |factor: f64, original: usize| {
        json!({ "max_position_embeddings": 40_960, "rope_scaling":
            { "rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original } })
    };
    assert_eq!(positions("qwen3_moe", yarn(4.0, 32_768)), 131_072);
    assert_eq!(positions("qwen3_moe", yarn(2.5, 32_768)), 81_920);
    assert_eq!(positions("qwen3_moe", yarn(1e6, 1 << 30)), 1 << 30);
    let parameters = json!({ "rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0 });
    let newer = json!({ "max_position_embeddings": 40_960, "rope_parameters": parameters });
    assert_eq!(positions("qwen3_moe", newer), 163_840);
    // Without a factor it is how much longer the context is than it was.
    let implied = json!({ "rope_type": "yarn", "original_max_position_embeddings": 10_240 });
    let implied = json!({ "max_position_embeddings": 40_960, "rope_scaling": implied });
    let given = json!({ "max_position_embeddings": 40_960, "rope_scaling":
        { "rope_type": "yarn", "factor": 4, "original_max_position_embeddings": 10_240 } });
    assert_eq!(patched("qwen3_moe", implied).unwrap(), patched("qwen3_moe", given).unwrap());
    let linear = json!({ "rope_scaling": { "type": "linear", "factor": 8 } });
    assert_eq!(positions("mixtral", linear), 8 * 4096);
    assert_eq!(preset("deepseek-v3").unwrap().max_positions, 163_840);
}

#[test]
fn what_only_informs_is_read_or_passed_over() {
    let plain = remarked("mixtral", json!({}), &[]);
    for word in ["torch.bfloat16", "bf16", "BFloat16"] {
        assert_eq!(remarked("mixtral", json!({ "torch_dtype": word }), &[]), plain);
    }
    let dtype =
        |word: Value, remarks: &[&str]| remarked("mixtral", json!({ "torch_dtype": word }), remarks).dtype;
    assert_eq!(dtype(json!("half"), &[]), DType::F16);
    assert_eq!(dtype(json!("auto"), &[]), DType::F32);
    let odd = "`torch_dtype` is \"float8_e4m3fn\", which is ignored: the stored weights say what they are";
    assert_eq!(dtype(json!("float8_e4m3fn"), &[odd]), DType::F32);
    let odd = "`torch_dtype` is 16, which is ignored: the stored weights say what they are";
    dtype(json!(16), &[odd]);

    let ids = |ids: Value, remarks: &[&str]| remarked("mixtral", json!({ "eos_token_id": ids }), remarks).eos;
    let range = "which is ignored: token ids go from 0 to 319";
    assert_eq!(ids(json!([1, 320]), &[&format!("`eos_token_id` has 320, {range}")]), [1]);
    assert_eq!(ids(json!(-1), &[&format!("`eos_token_id` has -1, {range}")]), Vec::<u32>::new());
    assert_eq!(ids(json!(["</s>", 5]), &[&format!("`eos_token_id` has \"</s>\", {range}")]), [5]);
    assert_eq!(ids(json!(7.0), &[]), [7]);
    let bos =
        remarked("mixtral", json!({ "bos_token_id": -1 }), &[&format!("`bos_token_id` has -1, {range}")]);
    assert_eq!(bos.bos, None);
    remarked("mixtral", json!({ "pad_token_id": -1, "transformers_version": 5 }), &[]);

    // What tensors are stored in decides, and they are not looked at here.
    for (section, value) in [
        ("quantization_config", json!({ "quant_method": "fp8", "weight_block_size": [128, 128] })),
        ("quantization_config", json!({ "bits": 4 })),
        ("quantization", json!("anything")),
        ("compression_config", json!([])),
    ] {
        assert_eq!(remarked("mixtral", json!({ section: value }), &[]), plain, "{section}");
    }
    let second = json!({ "architectures": ["SomethingElse", "MixtralForCausalLM"] });
    assert_eq!(remarked("mixtral", second, &[]), plain);
}

#[track_caller]
fn refused(name: &str, patch: Value, expected: &str) {
    match patched(name, patch) {
        Ok(spec) => panic!("accepted: {}", outline(&spec)),
        Err(error) => assert_eq!(error.to_string(), format!("config.json: {expected}")),
    }
}

#[test]
fn impossible_numbers_are_refused() {
    refused(
        "mixtral",
        json!({ "num_attention_heads": 0 }),
        "`num_attention_heads` is 0, but must be a whole number from 1 to 4096; correct it or fetch the file again",
    );
    refused(
        "mixtral",
        json!({ "hidden_size": -64 }),
        "`hidden_size` is -64, but must be a whole number from 1 to 1048576; correct it or fetch the file again",
    );
    refused(
        "dbrx",
        json!({ "d_model": 64.5 }),
        "`d_model` is 64.5, but must be a whole number from 1 to 1048576; correct it or fetch the file again",
    );
    refused(
        "mixtral",
        json!({ "vocab_size": u64::MAX }),
        "`vocab_size` is 18446744073709551615, but must be a whole number from 1 to 16777216; correct it or fetch \
         the file again",
    );
    refused(
        "mixtral",
        json!({ "num_hidden_layers": "three" }),
        "`num_hidden_layers` is \"three\", but must be a whole number from 1 to 1024; correct it or fetch the file \
         again",
    );
    refused(
        "mixtral",
        json!({ "rms_norm_eps": 0.0 }),
        "`rms_norm_eps` is 0.0, but must be a number from 0.000000000000000000000000000001 to 1; correct it or \
         fetch the file again",
    );
    refused(
        "mixtral",
        json!({ "num_experts_per_tok": 9 }),
        "`num_experts_per_tok` is 9, but must be a whole number from 1 to 8; correct it or fetch the file again",
    );
    refused(
        "qwen3_moe",
        json!({ "num_local_experts": 60_000, "num_hidden_layers": 1000 }),
        "all layers together have 60000000 experts, of at most 1048576",
    );
}

#[test]
fn sizes_that_do_not_fit_each_other_are_refused() {
    refused(
        "mixtral",
        json!({ "num_key_value_heads": 3 }),
        "the number of heads (8) is no multiple of the number of key and value heads (3); correct it or fetch the \
         file again",
    );
    refused(
        "mixtral",
        json!({ "num_attention_heads": 6 }),
        "the hidden size (64) is no multiple of the number of heads (6); correct it or fetch the file again",
    );
    refused(
        "mixtral",
        json!({ "head_dim": 7 }),
        "the rotated part of a head is 7 wide, but must be even; correct it or fetch the file again",
    );
    refused(
        "deepseek_v2",
        json!({ "n_group": 3 }),
        "the number of experts (16) is no multiple of `n_group` (3); correct it or fetch the file again",
    );
    refused(
        "deepseek_v2",
        json!({ "n_group": 8, "topk_group": 1 }),
        "`num_experts_per_tok` is 4, but 1 groups of 2 experts are kept; correct it or fetch the file again",
    );
    refused(
        "deepseek_v3",
        json!({ "n_group": 16, "topk_group": 8 }),
        "`n_group` is 16, but groups must have two experts or more; correct it or fetch the file again",
    );
}

#[test]
fn what_would_change_results_is_refused() {
    let all: Vec<String> = Architecture::ALL.iter().map(|known| known.to_string()).collect();
    refused(
        "mixtral",
        json!({ "architectures": ["LlamaForCausalLM"] }),
        &format!("architecture `LlamaForCausalLM` is not supported; supported are {}", all.join(", ")),
    );
    refused(
        "mixtral",
        json!({ "hidden_act": "gelu" }),
        "`hidden_act` is \"gelu\", but must be `silu`, the only kind supported; correct it or fetch the file again",
    );
    refused(
        "mixtral",
        json!({ "rope_scaling": { "rope_type": "llama3", "factor": 8.0 } }),
        "`rope_scaling.low_freq_factor` is missing; fetch the file again",
    );
    refused(
        "mixtral",
        json!({ "rope_scaling": { "type": "yarn" } }),
        "`rope_scaling.factor` is missing; fetch the file again",
    );
    refused(
        "mixtral",
        json!({ "rope_parameters": { "full_attention": { "rope_theta": 1.0 } } }),
        "`rope_parameters.full_attention` is a section; one embedding for all layers is supported",
    );
    refused(
        "olmoe",
        json!({ "use_sliding_window": true }),
        "`use_sliding_window` is true, which is not supported",
    );
    refused(
        "qwen2_moe",
        json!({ "layer_types": ["full_attention", "sliding_attention", "full_attention"] }),
        "`layer_types` has \"sliding_attention\"; only \"full_attention\" in every layer is supported",
    );
    refused(
        "mixtral",
        json!({ "partial_rotary_factor": 0.5 }),
        "`partial_rotary_factor` is 0.5; only 1 is supported",
    );
    refused(
        "mixtral",
        json!({ "rope_parameters": { "rope_theta": 1e6, "partial_rotary_factor": 0.25 } }),
        "`rope_parameters.partial_rotary_factor` is 0.25; only 1 is supported",
    );
    for name in ["mixtral", "qwen3_moe", "deepseek_v3", "dbrx"] {
        refused(name, json!({ "mlp_bias": true }), "`mlp_bias` is true, which is not supported");
        patched(name, json!({ "mlp_bias": false })).unwrap();
    }
    for kind in ["ntk", "alibi"] {
        refused(
            "mixtral",
            json!({ "rope_scaling": { "type": kind, "factor": 2.0 } }),
            &format!(
                "`rope_scaling.rope_type` is \"{kind}\", which is not supported; supported are default, linear, dynamic, yarn, \
                 longrope, llama3 and proportional"
            ),
        );
    }
    refused(
        "dbrx",
        json!({ "ffn_config": { "moe_normalize_expert_weights": 2.0 } }),
        "`ffn_config.moe_normalize_expert_weights` is 2.0, but must be 1 or null, the norms supported; correct it or \
         fetch the file again",
    );
    refused(
        "deepseek_v2",
        json!({ "topk_method": "noaux_tc" }),
        "`topk_method` is \"noaux_tc\"; supported are greedy and group_limited_greedy",
    );
}

#[track_caller]
fn refused_text(text: &[u8], expected: &str) {
    let message = config::parse(text, "config.json").unwrap_err().to_string();
    assert!(message.starts_with(expected), "{message}");
}

#[test]
fn text_that_is_no_config_is_refused() {
    refused_text(b"", "config.json: this is not valid JSON (EOF while parsing a value at line 1 column 0)");
    refused_text(b"[]", "config.json: this is not a JSON object; fetch the file again");
    refused_text(b"{}", "config.json: architecture `none` is not supported; supported are Mixtral");
    refused_text(b"{\"rms_norm_eps\": nan}", "config.json: this is not valid JSON (expected");
    refused_text(&[b'['; 100_000], "config.json: this is not valid JSON (recursion limit exceeded");
    refused_text(b"{\"model_type\": \"\xff\"}", "config.json: this is not valid JSON (invalid unicode");
    let long = format!("{{\"model_type\": \"mixtral\", \"vocab_size\": \"{}\"}}", "x".repeat(100_000));
    let message = config::parse(long.as_bytes(), "config.json").unwrap_err().to_string();
    assert!(message.len() < 250, "{message}");
}

#[test]
fn a_huge_config_is_not_read() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("config.json");
    std::fs::File::create(&path).unwrap().set_len(1 << 40).unwrap();
    let message = config::read(folder.path()).unwrap_err().to_string();
    assert!(
        message.ends_with("1099511627776 bytes are more than such a file may have (16777216)"),
        "{message}"
    );
}

#[test]
fn other_values_take_the_place_of_some_and_objects_are_merged() {
    let with = |name: &str, overrides: Value| {
        let text = preset_text(name).unwrap().as_bytes();
        Config::parse_with(text, name, overrides.as_object().unwrap())
    };
    let whole = preset("deepseek-v2").unwrap();
    let few = with("deepseek-v2", json!({ "num_hidden_layers": 3 })).unwrap().spec;
    assert_eq!(few, ModelSpec { layers: whole.layers[..3].to_vec(), ..whole });
    let inside = with("dbrx", json!({ "ffn_config": { "moe_num_experts": 4 } })).unwrap().spec;
    let moe = inside.layers[0].mlp.moe().unwrap();
    let unchanged = preset("dbrx").unwrap();
    let before = unchanged.layers[0].mlp.moe().unwrap();
    assert_eq!((moe.experts, moe.inner, moe.router.top_k), (4, before.inner, before.router.top_k));
    let refused = with("dbrx", json!({ "d_model": "wide" })).unwrap_err().to_string();
    assert!(refused.contains("d_model"), "{refused}");
}
