//! MiniMax-M2: experts behind a sigmoid, norms over whole queries and keys.

use super::draft::{Defaults, Draft};
use super::keys::{Checked, HEAD_WIDTH, Keys};
use crate::Architecture;
use crate::spec::*;
use epsmoe_device::op::Score;

const MINIMAX_M2: Defaults = Defaults {
    vocab: 200_064,
    hidden: 3072,
    inner: 1536,
    layers: 62,
    heads: 48,
    kv_heads: Some(8),
    experts: 256,
    top_k: 8,
    positions: 196_608,
    eps: 1e-6,
    theta: 5e6,
    bos: Some(200_034),
    eos: Some(200_020),
};

pub(super) fn minimax_m2(keys: &Keys) -> Checked<ModelSpec> {
    let draft = Draft::new(keys, &MINIMAX_M2)?;
    keys.only("scoring_func", &["sigmoid"])?;
    keys.only("qk_norm_type", &["per_layer"])?;
    let norm = keys.flag("use_qk_norm")?.unwrap_or(true).then_some(QkNorm::FullWidth);
    let attention = GqaSpec { qk_norm: norm, ..draft.grouped(draft.kv_heads()?)? };
    let mut moe = draft.moe(draft.inner)?;
    moe.router.score = Score::Sigmoid;
    moe.correction_bias = keys.flag("use_routing_bias")?.unwrap_or(true);
    let layers = draft.layers(&moe, |_| true);
    let rotated = keys.whole("rotary_dim", HEAD_WIDTH)?.map(|dim| dim as f64 / attention.head_dim as f64);
    let usual = Some(rotated.unwrap_or(1.0).min(1.0));
    draft.partial_model((Architecture::MinimaxM2, TensorNames::Mixtral), attention, layers, usual)
}
