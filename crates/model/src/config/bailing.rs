//! Ling 2.0 and Ring 2.0: DeepSeek-V3's experts beside grouped-query attention.

use super::deepseek::{ExpertDefaults, deepseek_layers, sigmoid_experts};
use super::draft::{Defaults, Draft};
use super::keys::{Checked, FACTOR, HEAD_WIDTH, Keys, WIDTH, wrong};
use crate::Architecture;
use crate::spec::*;

const BAILING: Defaults = Defaults {
    vocab: 157_184,
    hidden: 2048,
    inner: 5120,
    layers: 20,
    heads: 16,
    kv_heads: Some(4),
    experts: 256,
    top_k: 8,
    positions: 32_768,
    eps: 1e-6,
    theta: 6e5,
    bos: None,
    eos: None,
};

pub(super) fn bailing_moe_v2(keys: &Keys) -> Checked<ModelSpec> {
    let draft = Draft::new(keys, &BAILING)?;
    keys.only("score_function", &["sigmoid"])?;
    keys.only("router_dtype", &["fp32", "float32"])?;
    if keys.flag("moe_router_enable_expert_bias")? == Some(false) {
        return wrong("`moe_router_enable_expert_bias` is false, which is not supported");
    }
    let attention = GqaSpec {
        qkv_bias: keys.flag("use_qkv_bias")?.unwrap_or(false),
        output_bias: keys.flag("use_bias")?.unwrap_or(false),
        qk_norm: keys.flag("use_qk_norm")?.unwrap_or(true).then_some(QkNorm::PerHead),
        ..draft.grouped(draft.kv_heads()?)?
    };
    let defaults = ExpertDefaults { inner: 512, shared: 0, scale: 2.5 };
    let mut moe = sigmoid_experts(&draft, defaults, (8, 4), true)?;
    if let Some(scale) = keys.number("routed_scaling_factor", FACTOR)? {
        moe.router.scale = scale as f32;
    }
    let shared = keys.whole("num_shared_experts", 0..=64)?.unwrap_or(0);
    let inner = keys.whole("moe_shared_expert_intermediate_size", WIDTH)?.unwrap_or(moe.inner);
    moe.shared = (shared > 0).then_some(SharedSpec { inner: shared * inner, gated: false });
    let layers = deepseek_layers(&draft, &moe, 0)?;
    let rotated = keys.whole("rotary_dim", HEAD_WIDTH)?.map(|dim| dim as f64 / attention.head_dim as f64);
    let usual = Some(rotated.unwrap_or(1.0).min(1.0));
    draft.partial_model((Architecture::BailingMoeV2, TensorNames::Bailing), attention, layers, usual)
}
