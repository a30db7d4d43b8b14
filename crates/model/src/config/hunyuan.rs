//! Hunyuan-A13B, whose queries and keys are normed after they are rotated; and Hunyuan 3, with DeepSeek-V3's gate.

use super::draft::{Defaults, Draft};
use super::glm::sparse_layers;
use super::keys::{Checked, EXPERTS, FACTOR, HEAD_WIDTH, Keys, MEND, WIDTH, whole, wrong};
use crate::Architecture;
use crate::spec::*;
use epsmoe_device::op::Score;
use std::ops::RangeInclusive;

const HUNYUAN: Defaults = Defaults {
    vocab: 290_943,
    hidden: 4096,
    inner: 11_008,
    layers: 32,
    heads: 32,
    kv_heads: None,
    experts: 1,
    top_k: 1,
    positions: 2048,
    eps: 1e-5,
    theta: 1e4,
    bos: Some(1),
    eos: Some(2),
};

pub(super) fn hunyuan_v1_moe(keys: &Keys) -> Checked<ModelSpec> {
    let draft = Draft::new(keys, &HUNYUAN)?;
    for key in ["use_cla", "use_mla", "add_classification_head"] {
        if keys.flag(key)?.unwrap_or(false) {
            return wrong(format!("`{key}` is true, which is not supported"));
        }
    }
    let bias = keys.flag("attention_bias")?.unwrap_or(false);
    let attention = GqaSpec {
        qkv_bias: bias,
        output_bias: bias,
        qk_norm: keys.flag("use_qk_norm")?.unwrap_or(true).then_some(QkNorm::PerHead),
        norm_after_rope: true,
        ..draft.grouped(draft.kv_heads()?)?
    };
    let experts = alike(keys, "num_experts", EXPERTS)?.unwrap_or(HUNYUAN.experts);
    let inner = alike(keys, "moe_intermediate_size", WIDTH)?.unwrap_or(draft.inner);
    let top_k = alike(keys, "num_experts_per_tok", 1..=experts)?.unwrap_or(HUNYUAN.top_k);
    let mut moe = super::draft::softmax_moe(experts, inner, top_k);
    moe.router.normalise = keys.flag("norm_topk_prob")?.unwrap_or(true);
    let shared = alike(keys, "num_shared_expert", 0..=64)?.unwrap_or(1);
    moe.shared = (shared > 0).then_some(SharedSpec { inner: shared * draft.inner, gated: false });
    let dense = keys.whole("moe_layer_num_skipped", 0..=draft.layers)?.unwrap_or(0);
    let layers = draft.layers(&moe, |layer| layer >= dense);
    draft.grouped_model((Architecture::HunyuanV1Moe, TensorNames::Hunyuan), attention, layers)
}

/// A number, or a list of one for each layer, all equal.
fn alike(keys: &Keys, key: &'static str, allowed: RangeInclusive<usize>) -> Checked<Option<usize>> {
    let Some((name, value)) = keys.get(key) else { return Ok(None) };
    let Some(list) = value.as_array() else { return keys.whole(key, allowed) };
    let first = list.first().and_then(whole).filter(|number| allowed.contains(number));
    match first.filter(|_| list.iter().all(|other| *other == list[0])) {
        Some(number) => Ok(Some(number)),
        None => wrong(format!(
            "`{name}` is not one number from {} to {} for all layers, which is not supported; {MEND}",
            allowed.start(),
            allowed.end()
        )),
    }
}

const HUNYUAN_V3: Defaults = Defaults {
    vocab: 120_832,
    hidden: 4096,
    inner: 13_312,
    layers: 80,
    heads: 64,
    kv_heads: Some(8),
    experts: 192,
    top_k: 8,
    positions: 131_072,
    eps: 1e-5,
    theta: 11_158_840.0,
    bos: None,
    eos: None,
};

pub(super) fn hunyuan_v3(keys: &Keys) -> Checked<ModelSpec> {
    let draft = Draft::new(keys, &HUNYUAN_V3)?;
    let bias = keys.flag("attention_bias")?.unwrap_or(false);
    let head_dim = keys.whole("head_dim", HEAD_WIDTH)?.unwrap_or(128);
    let attention = GqaSpec {
        qkv_bias: bias,
        output_bias: bias,
        qk_norm: Some(QkNorm::PerHead),
        ..draft.grouped_of(draft.kv_heads()?, head_dim)?
    };
    let inner = keys.whole("moe_intermediate_size", WIDTH)?.unwrap_or(1536);
    let mut moe = draft.moe(inner)?;
    moe.correction_bias = true;
    moe.router.score = Score::Sigmoid;
    moe.router.scale = keys.number("router_scaling_factor", FACTOR)?.unwrap_or(2.826) as f32;
    let shared = keys.whole("num_shared_experts", 0..=64)?.unwrap_or(1);
    moe.shared = (shared > 0).then_some(SharedSpec { inner: shared * inner, gated: false });
    let sparse = sparse_layers(&draft, 1)?;
    let layers = draft.layers(&moe, |layer| sparse[layer]);
    draft.grouped_model((Architecture::HunyuanV3, TensorNames::HunyuanV3), attention, layers)
}
