//! LongCat-Flash: two attentions and two dense MLPs a layer, which are two layers here, and experts beside all but the first
//! attention; some of them compute nothing.

use super::deepseek::{LatentDefaults, latent_model};
use super::draft::{Defaults, Draft, softmax_moe, top_k};
use super::keys::{Checked, EXPERTS, FACTOR, Keys, LAYERS, WIDTH, wrong};
use crate::Architecture;
use crate::spec::*;

const LONGCAT: Defaults = Defaults {
    vocab: 131_072,
    hidden: 6144,
    inner: 12_288,
    layers: 28,
    heads: 64,
    kv_heads: None,
    experts: 512,
    top_k: 12,
    positions: 131_072,
    eps: 1e-5,
    theta: 1e7,
    bos: Some(1),
    eos: Some(2),
};

pub(super) fn longcat_flash(keys: &Keys) -> Checked<ModelSpec> {
    keys.only("zero_expert_type", &["identity"])?;
    if keys.flag("norm_topk_prob")?.unwrap_or(false) {
        return wrong("`norm_topk_prob` is true, which is not supported");
    }
    if keys.flag("router_bias")?.unwrap_or(false) {
        keys.remark("`router_bias` is true, which is ignored: the published model does not add it".into());
    }
    let published = keys.whole("num_layers", 1..=LAYERS.end() / 2)?.unwrap_or(LONGCAT.layers);
    let draft = Draft::new(keys, &LONGCAT)?;
    let inner = keys.whole("ffn_hidden_size", WIDTH)?.unwrap_or(draft.inner);
    let draft = Draft { inner, layers: 2 * published, ..draft };
    let mut layers = draft.layers(&experts(&draft)?, |layer| layer.is_multiple_of(2));
    layers.iter_mut().for_each(|layer| layer.late_experts = layer.mlp.moe().is_some());
    let latent = LatentDefaults { q_lora: 1536, kv_lora: 512, nope: 128, rope: 64, value: 128 };
    let mut spec = latent_model(&draft, Architecture::LongcatFlash, latent, layers)?;
    spec.naming = TensorNames::Longcat;
    let (hidden, scaled) = (draft.hidden as f32, |key| keys.flag(key).map(|flag| flag.unwrap_or(true)));
    let (of_queries, of_keys) = (scaled("mla_scale_q_lora")?, scaled("mla_scale_kv_lora")?);
    for layer in &mut spec.layers {
        let AttentionSpec::Mla(attention) = &mut layer.attention else { continue };
        if let Some(q_lora) = attention.q_lora.filter(|_| of_queries) {
            attention.scale *= (hidden / q_lora as f32).sqrt();
        }
        if of_keys {
            attention.latent_scale = (hidden / attention.kv_lora as f32).sqrt();
        }
    }
    Ok(spec)
}

/// The experts of the first half of a layer, with its dense MLP as the one that every token visits.
fn experts(draft: &Draft) -> Checked<MoeSpec> {
    let keys = draft.keys;
    let experts = keys.whole("num_experts", EXPERTS)?.unwrap_or(LONGCAT.experts);
    let identities = keys.whole("zero_expert_num", 0..=*EXPERTS.end())?;
    let identities = identities.unwrap_or(if keys.is_null("zero_expert_num") { 0 } else { 256 });
    let top_k = top_k(keys, "num_experts_per_tok", LONGCAT.top_k, experts + identities)?;
    let inner = keys.whole("expert_ffn_hidden_size", WIDTH)?.unwrap_or(2048);
    let mut moe = softmax_moe(experts, inner, top_k);
    moe.router.normalise = false;
    moe.router.scale = keys.number("routed_scaling_factor", FACTOR)?.unwrap_or(6.0) as f32;
    moe.correction_bias = true;
    moe.shared = Some(SharedSpec { inner: draft.inner, gated: false });
    moe.identities = identities;
    Ok(moe)
}
