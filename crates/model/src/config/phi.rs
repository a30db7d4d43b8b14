//! Phi-3.5-MoE: norms with a mean and a bias, and a sparse mixer.

use super::draft::{Defaults, Draft};
use super::keys::{Checked, Keys, wrong};
use crate::Architecture;
use crate::spec::*;
use epsmoe_device::op::{NormKind, RopeStyle, Score};

const PHI: Defaults = Defaults {
    vocab: 32_064,
    hidden: 4096,
    inner: 6400,
    layers: 32,
    heads: 32,
    kv_heads: Some(8),
    experts: 16,
    top_k: 2,
    positions: 131_072,
    eps: 1e-5,
    theta: 1e6,
    bos: Some(1),
    eos: Some(2),
};

pub(super) fn phimoe(keys: &Keys) -> Checked<ModelSpec> {
    let draft = Draft::new(keys, &PHI)?;
    let bias = keys.flag("attention_bias")?.unwrap_or(false);
    let attention = GqaSpec { qkv_bias: bias, output_bias: bias, ..draft.grouped(draft.kv_heads()?)? };
    let mut moe = draft.moe(draft.inner)?;
    if moe.router.top_k != 2 {
        let top_k = moe.router.top_k;
        return wrong(format!("`num_experts_per_tok` is {top_k}; this router always chooses 2"));
    }
    let jitter = keys.number("router_jitter_noise", 0.0..=1.0)?.unwrap_or(0.01) as f32;
    moe.router.score = Score::SparseMixer { jitter };
    moe.router.normalise = false;
    let layers = draft.windowed(draft.layers(&moe, |_| true))?;
    let rope = draft.rope(draft.rotated(attention.head_dim, None)?, RopeStyle::HalfSplit, draft.theta()?)?;
    let names = (Architecture::Phimoe, TensorNames::Mixtral);
    let mut spec =
        draft.complete(names, NormKind::Layer, Some(rope), layers, |_| AttentionSpec::Gqa(attention))?;
    spec.norm.bias = true;
    spec.head_bias = keys.flag("lm_head_bias")?.unwrap_or(false);
    Ok(spec)
}
