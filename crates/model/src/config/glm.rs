//! Families with DeepSeek-V3's experts: GLM-4.5 to 4.7, dots.llm1, Solar Open and K-EXAONE, and, with its attention too,
//! GLM-4.7-Flash.

use super::deepseek::{ExpertDefaults, LatentDefaults, deepseek_layers, latent_model, sigmoid_experts};
use super::draft::{Defaults, Draft};
use super::keys::{Checked, HEAD_WIDTH, Keys, LAYERS, MEND, POSITIONS, wrong};
use crate::Architecture;
use crate::spec::*;
use epsmoe_device::op::Sight;

const GLM4_MOE: Defaults = Defaults {
    vocab: 151_552,
    hidden: 4096,
    inner: 10_944,
    layers: 46,
    heads: 96,
    kv_heads: Some(8),
    experts: 128,
    top_k: 8,
    positions: 131_072,
    eps: 1e-5,
    theta: 1e4,
    bos: None,
    eos: None,
};

pub(super) fn glm4_moe(keys: &Keys) -> Checked<ModelSpec> {
    let draft = Draft::new(keys, &GLM4_MOE)?;
    let attention = GqaSpec {
        qkv_bias: keys.flag("attention_bias")?.unwrap_or(false),
        qk_norm: keys.flag("use_qk_norm")?.unwrap_or(false).then_some(QkNorm::PerHead),
        ..draft.grouped(draft.kv_heads()?)?
    };
    let defaults = ExpertDefaults { inner: 1408, shared: 1, scale: 1.0 };
    let moe = sigmoid_experts(&draft, defaults, (1, 1), true)?;
    let layers = deepseek_layers(&draft, &moe, 1)?;
    draft.partial_model((Architecture::Glm4Moe, TensorNames::Common), attention, layers, Some(0.5))
}

const GLM4_MOE_LITE: Defaults = Defaults {
    vocab: 154_880,
    hidden: 2048,
    inner: 10_240,
    layers: 47,
    heads: 20,
    kv_heads: None,
    experts: 64,
    top_k: 4,
    positions: 202_752,
    bos: Some(0),
    eos: Some(1),
    ..GLM4_MOE
};

pub(super) fn glm4_moe_lite(keys: &Keys) -> Checked<ModelSpec> {
    let draft = Draft::new(keys, &GLM4_MOE_LITE)?;
    let defaults = ExpertDefaults { inner: 1536, shared: 1, scale: 1.8 };
    let moe = sigmoid_experts(&draft, defaults, (1, 1), true)?;
    let sparse = sparse_layers(&draft, 1)?;
    let layers = draft.layers(&moe, |layer| sparse[layer]);
    let latent = LatentDefaults { q_lora: 768, kv_lora: 512, nope: 192, rope: 64, value: 256 };
    latent_model(&draft, Architecture::Glm4MoeLite, latent, layers)
}

/// Which layers have experts: `mlp_layer_types` says it, or all from `first_k_dense_replace` on.
pub(super) fn sparse_layers(draft: &Draft, default_dense: usize) -> Checked<Vec<bool>> {
    const KEY: &str = "mlp_layer_types";
    let kinds = draft.keys.list(KEY)?;
    if kinds.is_empty() {
        let dense = draft.keys.whole("first_k_dense_replace", 0..=*LAYERS.end())?.unwrap_or(default_dense);
        return Ok((0..draft.layers).map(|layer| layer >= dense).collect());
    }
    let sparse = |kind: &serde_json::Value| match kind.as_str() {
        Some("sparse") => Some(true),
        Some("dense") => Some(false),
        _ => None,
    };
    let sparse: Option<Vec<bool>> = kinds.iter().map(sparse).collect();
    match sparse.filter(|sparse| sparse.len() >= draft.layers) {
        Some(sparse) => Ok(sparse),
        None => {
            wrong(format!("`{KEY}` must say `dense` or `sparse` for each of {} layers; {MEND}", draft.layers))
        }
    }
}

const DOTS1: Defaults = Defaults {
    vocab: 152_064,
    hidden: 4608,
    inner: 10_944,
    layers: 62,
    heads: 32,
    kv_heads: Some(32),
    experts: 128,
    top_k: 6,
    positions: 2048,
    eps: 1e-6,
    ..GLM4_MOE
};

pub(super) fn dots1(keys: &Keys) -> Checked<ModelSpec> {
    let draft = Draft::new(keys, &DOTS1)?;
    let bias = keys.flag("attention_bias")?.unwrap_or(false);
    let attention = GqaSpec {
        qkv_bias: bias,
        output_bias: bias,
        qk_norm: Some(QkNorm::PerHead),
        ..draft.grouped(draft.kv_heads()?)?
    };
    let defaults = ExpertDefaults { inner: 1408, shared: 0, scale: 1.0 };
    let moe = sigmoid_experts(&draft, defaults, (1, 1), false)?;
    let full = match keys.is_null("sliding_window") {
        true => usize::MAX,
        false => keys.whole("max_window_layers", 0..=*LAYERS.end())?.unwrap_or(62),
    };
    let layers = draft.windowed_by_type(deepseek_layers(&draft, &moe, 0)?, |layer| layer >= full)?;
    draft.grouped_model((Architecture::Dots1, TensorNames::Common), attention, layers)
}

const SOLAR_OPEN: Defaults = Defaults {
    vocab: 196_608,
    hidden: 4096,
    layers: 48,
    heads: 64,
    kv_heads: Some(8),
    positions: 131_072,
    theta: 1e6,
    ..GLM4_MOE
};

pub(super) fn solar_open(keys: &Keys) -> Checked<ModelSpec> {
    let draft = Draft::new(keys, &SOLAR_OPEN)?;
    let head_dim = keys.whole("head_dim", HEAD_WIDTH)?.unwrap_or(128);
    let attention = GqaSpec {
        qkv_bias: keys.flag("attention_bias")?.unwrap_or(false),
        ..draft.grouped_of(draft.kv_heads()?, head_dim)?
    };
    let defaults = ExpertDefaults { inner: 1280, shared: 1, scale: 1.0 };
    let layers = draft.layers(&sigmoid_experts(&draft, defaults, (1, 1), true)?, |_| true);
    draft.partial_model((Architecture::SolarOpen, TensorNames::Common), attention, layers, Some(1.0))
}

const EXAONE_MOE: Defaults = Defaults {
    vocab: 102_400,
    hidden: 4096,
    inner: 16_384,
    layers: 32,
    heads: 32,
    kv_heads: Some(32),
    experts: 64,
    positions: 2048,
    bos: Some(1),
    eos: Some(53),
    ..GLM4_MOE
};

/// Layers with a window turn queries and keys; those that see everything know no positions.
pub(super) fn exaone_moe(keys: &Keys) -> Checked<ModelSpec> {
    let draft = Draft::new(keys, &EXAONE_MOE)?;
    let attention = GqaSpec { qk_norm: Some(QkNorm::PerHead), ..draft.grouped(draft.kv_heads()?)? };
    let defaults = ExpertDefaults { inner: 1024, shared: 0, scale: 2.5 };
    let mut moe = sigmoid_experts(&draft, defaults, (1, 1), true)?;
    let shared = keys.whole("num_shared_experts", 0..=64)?.unwrap_or(1);
    moe.shared = (shared > 0).then_some(SharedSpec { inner: shared * moe.inner, gated: false });
    let sparse = sparse_layers(&draft, 1)?;
    let layers = draft.layers(&moe, |layer| sparse[layer]);
    let windows = keys.whole("sliding_window", POSITIONS)?.is_some();
    let mut layers = draft.windowed_by_type(layers, |layer| windows && !(layer + 1).is_multiple_of(4))?;
    layers
        .iter_mut()
        .filter(|layer| windows && layer.sight == Sight::All)
        .for_each(|layer| layer.rope = None);
    draft.grouped_model((Architecture::ExaoneMoe, TensorNames::Exaone), attention, layers)
}
