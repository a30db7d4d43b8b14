//! Qwen1.5-MoE, Qwen2-MoE and Qwen3-MoE.

use super::draft::{Defaults, Draft, normalised_if_asked};
use super::keys::{Checked, Keys, LAYERS, WIDTH};
use crate::Architecture;
use crate::spec::*;
use serde_json::Value;

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

pub(super) fn qwen2(keys: &Keys) -> Checked<ModelSpec> {
    let draft = Draft::new(keys, &QWEN2)?;
    let qkv_bias = keys.flag("qkv_bias")?.unwrap_or(true);
    let attention = GqaSpec { qkv_bias, ..draft.grouped(draft.kv_heads()?)? };
    let shared = keys.whole("shared_expert_intermediate_size", WIDTH)?.unwrap_or(5632);
    let moe =
        MoeSpec { shared: Some(SharedSpec { inner: shared, gated: true }), ..qwen_experts(&draft, 1408)? };
    let layers = qwen_layers(&draft, &moe)?;
    let layers = match keys.flag("use_sliding_window")?.unwrap_or(false) {
        false => layers,
        true => {
            let sliding = keys.whole("max_window_layers", 0..=*LAYERS.end())?.unwrap_or(28);
            draft.windowed_by_type(layers, |layer| layer.is_multiple_of(2) && layer < sliding)?
        }
    };
    draft.grouped_model((Architecture::Qwen2Moe, TensorNames::Qwen), attention, layers)
}

const QWEN3: Defaults =
    Defaults { inner: 6144, heads: 32, kv_heads: Some(4), experts: 128, top_k: 8, ..QWEN2 };

pub(super) fn qwen3(keys: &Keys) -> Checked<ModelSpec> {
    let draft = Draft::new(keys, &QWEN3)?;
    let bias = keys.flag("attention_bias")?.unwrap_or(false);
    let attention = GqaSpec {
        qkv_bias: bias,
        output_bias: bias,
        qk_norm: Some(QkNorm::PerHead),
        ..draft.grouped(draft.kv_heads()?)?
    };
    let layers = qwen_layers(&draft, &qwen_experts(&draft, 768)?)?;
    let slides = keys.flag("use_sliding_window")?.unwrap_or(false);
    let layers = if slides { draft.windowed(layers)? } else { layers };
    draft.grouped_model((Architecture::Qwen3Moe, TensorNames::Common), attention, layers)
}

fn qwen_experts(draft: &Draft, default_inner: usize) -> Checked<MoeSpec> {
    let inner = draft.keys.whole("moe_intermediate_size", WIDTH)?.unwrap_or(default_inner);
    normalised_if_asked(draft.keys, draft.moe(inner)?)
}

fn qwen_layers(draft: &Draft, moe: &MoeSpec) -> Checked<Vec<LayerSpec>> {
    let step = draft.keys.whole("decoder_sparse_step", LAYERS)?.unwrap_or(1);
    let index = |value: &Value| value.as_u64();
    let indices = |value: &Value| value.as_array()?.iter().map(index).collect::<Option<Vec<u64>>>();
    let dense = draft.keys.read("mlp_only_layers", "a list of layer numbers", indices)?.unwrap_or_default();
    Ok(draft.layers(moe, |layer| !dense.contains(&(layer as u64)) && (layer + 1).is_multiple_of(step)))
}
