//! OLMoE.

use super::draft::{Defaults, Draft, clip, normalised_if_asked};
use super::keys::{Checked, Keys};
use crate::Architecture;
use crate::spec::*;

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

pub(super) fn olmoe(keys: &Keys) -> Checked<ModelSpec> {
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
