//! Mixtral 8x7B, 8x22B.

use super::draft::{Defaults, Draft};
use super::keys::{Checked, Keys};
use crate::Architecture;
use crate::spec::*;

pub(super) const MIXTRAL: Defaults = Defaults {
    vocab: 32_000,
    hidden: 4096,
    inner: 14_336,
    layers: 32,
    heads: 32,
    kv_heads: Some(8),
    experts: 8,
    top_k: 2,
    positions: 131_072,
    eps: 1e-5,
    theta: 1e6,
    bos: Some(1),
    eos: Some(2),
};

pub(super) fn mixtral(keys: &Keys) -> Checked<ModelSpec> {
    let draft = Draft::new(keys, &MIXTRAL)?;
    let attention = draft.grouped(draft.kv_heads()?)?;
    let layers = draft.windowed(draft.layers(&draft.moe(draft.inner)?, |_| true))?;
    draft.grouped_model((Architecture::Mixtral, TensorNames::Mixtral), attention, layers)
}
