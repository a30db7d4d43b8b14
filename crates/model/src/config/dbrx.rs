//! DBRX: its keys lie in sections.

use super::draft::{Defaults, Draft, clip, softmax_moe, top_k};
use super::keys::{ACTIVATIONS, Checked, EXPERTS, HEADS, Keys, THETA, WIDTH};
use crate::Architecture;
use crate::spec::*;
use epsmoe_device::op::{NormKind, RopeStyle};

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

pub(super) fn dbrx(keys: &Keys) -> Checked<ModelSpec> {
    let draft = Draft::new(keys, &DBRX)?;
    let attention_keys = keys.section("attn_config", "attn_config.")?;
    let kv_heads = attention_keys.whole("kv_n_heads", HEADS)?.or(DBRX.kv_heads).unwrap_or(1);
    let attention = GqaSpec { clip_qkv: clip(&attention_keys)?, ..draft.grouped(kv_heads)? };
    // Published configs have the base here; a library that reads it only at the top is wrong about them.
    let theta = attention_keys.number("rope_theta", THETA)?.map_or_else(|| draft.theta(), Ok)?;
    let rope = draft.rope(draft.rotated(attention.head_dim, None)?, RopeStyle::HalfSplit, theta)?;
    let layers = draft.layers(&dbrx_experts(&keys.section("ffn_config", "ffn_config.")?)?, |_| true);
    let attention = AttentionSpec::Gqa(attention);
    draft
        .complete((Architecture::Dbrx, TensorNames::Dbrx), NormKind::Layer, Some(rope), layers, |_| attention)
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
    moe.router.normalise = !keys.is_null(NORMALISE);
    Ok(moe)
}
