//! Granite with experts: Mixtral with factors on its streams, and a shared expert in some.

use super::draft::{Defaults, Draft};
use super::keys::{Checked, FACTOR, Keys, WIDTH};
use super::mixtral::MIXTRAL;
use crate::Architecture;
use crate::spec::*;

const GRANITE: Defaults =
    Defaults { inner: 11_008, kv_heads: None, positions: 2048, eps: 1e-6, theta: 1e4, ..MIXTRAL };

pub(super) fn granite(keys: &Keys, architecture: Architecture) -> Checked<ModelSpec> {
    let draft = Draft::new(keys, &GRANITE)?;
    let factor = |key| -> Checked<f32> { Ok(keys.number(key, FACTOR)?.unwrap_or(1.0) as f32) };
    let bias = keys.flag("attention_bias")?.unwrap_or(false);
    let attention = GqaSpec {
        qkv_bias: bias,
        output_bias: bias,
        scale: factor("attention_multiplier")?,
        ..draft.grouped(draft.kv_heads()?)?
    };
    let mut moe = draft.moe(draft.inner)?;
    let shared = match architecture {
        Architecture::GraniteMoeShared => {
            keys.whole("shared_intermediate_size", 0..=*WIDTH.end())?.unwrap_or(0)
        }
        _ => 0,
    };
    moe.shared = (shared > 0).then_some(SharedSpec { inner: shared, gated: false });
    let layers = draft.layers(&moe, |_| true);
    let spec = draft.grouped_model((architecture, TensorNames::Granite), attention, layers)?;
    let factors = Factors {
        embedding: factor("embedding_multiplier")?,
        residual: factor("residual_multiplier")?,
        logits: 1.0 / factor("logits_scaling")?,
        cap: None,
    };
    Ok(ModelSpec { factors, ..spec })
}
