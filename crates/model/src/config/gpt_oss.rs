//! gpt-oss: sinks, a sliding window in every other layer, biases everywhere and a clamped activation.

use super::draft::{Defaults, Draft};
use super::keys::{Checked, FACTOR, Keys};
use crate::Architecture;
use crate::spec::*;
use epsmoe_device::op::{Activation, Swish};

const GPT_OSS: Defaults = Defaults {
    vocab: 201_088,
    hidden: 2880,
    inner: 2880,
    layers: 36,
    heads: 64,
    kv_heads: Some(8),
    experts: 128,
    top_k: 4,
    positions: 131_072,
    eps: 1e-5,
    theta: 1.5e5,
    bos: None,
    eos: None,
};

/// Its sigmoid's factor, which no key tells, and the limit of its activation where none does.
const ALPHA: f32 = 1.702;
const LIMIT: f64 = 7.0;

pub(super) fn gpt_oss(keys: &Keys) -> Checked<ModelSpec> {
    let draft = Draft::new(keys, &GPT_OSS)?;
    let bias = keys.flag("attention_bias")?.unwrap_or(true);
    let attention =
        GqaSpec { qkv_bias: bias, output_bias: bias, sinks: true, ..draft.grouped(draft.kv_heads()?)? };
    let limit = keys.number("swiglu_limit", FACTOR)?.unwrap_or(LIMIT) as f32;
    let moe = MoeSpec {
        router_bias: true,
        activation: Some(Activation::Swish(Swish { alpha: ALPHA, cubic: 0.0, limit, shift: 1.0 })),
        expert_bias: true,
        ..draft.moe(draft.inner)?
    };
    let layers = draft.windowed_by_type(draft.layers(&moe, |_| true), |layer| layer.is_multiple_of(2))?;
    draft.grouped_model((Architecture::GptOss, TensorNames::GptOss), attention, layers)
}
