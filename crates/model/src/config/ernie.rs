//! ERNIE-4.5 with experts.

use super::draft::{Defaults, Draft};
use super::keys::{Checked, Keys, LAYERS, WIDTH, wrong};
use crate::Architecture;
use crate::spec::*;
use epsmoe_device::op::{NormKind, RopeStyle};

const ERNIE: Defaults = Defaults {
    vocab: 103_424,
    hidden: 2560,
    inner: 12_288,
    layers: 28,
    heads: 20,
    kv_heads: Some(4),
    experts: 64,
    top_k: 6,
    positions: 131_072,
    eps: 1e-5,
    theta: 5e5,
    bos: Some(1),
    eos: Some(2),
};

pub(super) fn ernie4_5_moe(keys: &Keys) -> Checked<ModelSpec> {
    let draft = Draft::new(keys, &ERNIE)?;
    if keys.flag("use_bias")?.unwrap_or(false) {
        return wrong("`use_bias` is true; MLPs with biases are not supported");
    }
    let attention = draft.grouped(draft.kv_heads()?)?;
    let inner = keys.whole("moe_intermediate_size", WIDTH)?.unwrap_or(1536);
    let mut moe = draft.moe(inner)?;
    moe.correction_bias = true;
    let shared = keys.whole("moe_num_shared_experts", 0..=64)?.unwrap_or(2);
    moe.shared = (shared > 0).then_some(SharedSpec { inner: shared * inner, gated: false });
    let first = keys.whole("moe_layer_start_index", 0..=*LAYERS.end())?.unwrap_or(1);
    let last = match keys.get("moe_layer_end_index").and_then(|(_, value)| value.as_i64()) {
        Some(-1) | None => draft.layers,
        Some(_) => keys.whole("moe_layer_end_index", 0..=*LAYERS.end())?.unwrap_or(draft.layers),
    };
    let every = keys.whole("moe_layer_interval", LAYERS)?.unwrap_or(1);
    let sparse = |layer: usize| (layer + 1).is_multiple_of(every) && (first..=last).contains(&layer);
    let layers = draft.layers(&moe, sparse);
    let rope =
        draft.rope(draft.rotated(attention.head_dim, None)?, RopeStyle::Interleaved, draft.theta()?)?;
    let names = (Architecture::Ernie45Moe, TensorNames::Ernie);
    let tied = keys.flag("tie_word_embeddings")?.unwrap_or(true);
    let spec = draft.complete(names, NormKind::Rms, Some(rope), layers, |_| AttentionSpec::Gqa(attention))?;
    Ok(ModelSpec { tie_embeddings: tied, ..spec })
}
