//! Qwen1.5-MoE, Qwen2-MoE and Qwen3-MoE; and with gated delta nets in most layers, Qwen3-Next and Qwen3.5-MoE.

use super::draft::{Defaults, Draft, DraftLayer, divides, normalised_if_asked};
use super::keys::{Checked, HEAD_WIDTH, HEADS, Keys, LAYERS, MEND, WIDTH, shown, wrong};
use crate::Architecture;
use crate::spec::*;
use epsmoe_device::op::{NormKind, RopeStyle};
use serde_json::Value;

const QWEN2: Defaults = Defaults {
    vocab: 151_936,
    hidden: 2048,
    inner: 5632,
    layers: 24,
    heads: 16,
    kv_heads: Some(16),
    experts: 60,
    top_k: 4,
    positions: 32_768,
    eps: 1e-6,
    theta: 1e4,
    bos: None,
    eos: None,
};

pub(super) fn qwen2(keys: &Keys) -> Checked<ModelSpec> {
    let draft = Draft::new(keys, &QWEN2)?;
    let qkv_bias = keys.flag("qkv_bias")?.unwrap_or(true);
    let attention = GqaSpec { qkv_bias, ..draft.grouped(draft.kv_heads()?)? };
    let shared = keys.whole("shared_expert_intermediate_size", WIDTH)?.unwrap_or(5632);
    let moe =
        MoeSpec { shared: Some(SharedSpec { inner: shared, gated: true }), ..qwen_experts(&draft, 1408)? };
    let layers = qwen_layers(&draft, &moe)?;
    let layers = match keys.flag("use_sliding_window")?.unwrap_or(false) {
        false => layers,
        true => {
            let sliding = keys.whole("max_window_layers", 0..=*LAYERS.end())?.unwrap_or(28);
            draft.windowed_by_type(layers, |layer| layer.is_multiple_of(2) && layer < sliding)?
        }
    };
    draft.grouped_model((Architecture::Qwen2Moe, TensorNames::Qwen), attention, layers)
}

const QWEN3: Defaults =
    Defaults { inner: 6144, heads: 32, kv_heads: Some(4), experts: 128, top_k: 8, ..QWEN2 };

pub(super) fn qwen3(keys: &Keys) -> Checked<ModelSpec> {
    let draft = Draft::new(keys, &QWEN3)?;
    let bias = keys.flag("attention_bias")?.unwrap_or(false);
    let attention = GqaSpec {
        qkv_bias: bias,
        output_bias: bias,
        qk_norm: Some(QkNorm::PerHead),
        ..draft.grouped(draft.kv_heads()?)?
    };
    let layers = qwen_layers(&draft, &qwen_experts(&draft, 768)?)?;
    let slides = keys.flag("use_sliding_window")?.unwrap_or(false);
    let layers = if slides { draft.windowed(layers)? } else { layers };
    draft.grouped_model((Architecture::Qwen3Moe, TensorNames::Common), attention, layers)
}

fn qwen_experts(draft: &Draft, default_inner: usize) -> Checked<MoeSpec> {
    let inner = draft.keys.whole("moe_intermediate_size", WIDTH)?.unwrap_or(default_inner);
    normalised_if_asked(draft.keys, draft.moe(inner)?)
}

fn qwen_layers(draft: &Draft, moe: &MoeSpec) -> Checked<Vec<DraftLayer>> {
    let step = draft.keys.whole("decoder_sparse_step", LAYERS)?.unwrap_or(1);
    let index = |value: &Value| value.as_u64();
    let indices = |value: &Value| value.as_array()?.iter().map(index).collect::<Option<Vec<u64>>>();
    let dense = draft.keys.read("mlp_only_layers", "a list of layer numbers", indices)?.unwrap_or_default();
    Ok(draft.layers(moe, |layer| !dense.contains(&(layer as u64)) && (layer + 1).is_multiple_of(step)))
}

const QWEN3_NEXT: Defaults =
    Defaults { layers: 48, heads: 16, kv_heads: Some(2), experts: 512, top_k: 10, ..QWEN2 };

pub(super) fn qwen3_next(keys: &Keys) -> Checked<ModelSpec> {
    let draft = Draft::new(keys, &QWEN3_NEXT)?;
    let mut moe = delta_experts(&draft)?;
    moe.router.normalise = keys.flag("norm_topk_prob")?.unwrap_or(true);
    delta_model(&draft, (Architecture::Qwen3Next, TensorNames::Qwen), qwen_layers(&draft, &moe)?)
}

const QWEN3_5: Defaults = Defaults { vocab: 248_320, layers: 40, experts: 256, top_k: 8, ..QWEN3_NEXT };

pub(super) fn qwen3_5(keys: &Keys) -> Checked<ModelSpec> {
    let draft = Draft::new(keys, &QWEN3_5)?;
    let layers = draft.layers(&delta_experts(&draft)?, |_| true);
    delta_model(&draft, (Architecture::Qwen35Moe, TensorNames::Qwen35), layers)
}

fn delta_experts(draft: &Draft) -> Checked<MoeSpec> {
    let of = |key| -> Checked<usize> { Ok(draft.keys.whole(key, WIDTH)?.unwrap_or(512)) };
    let shared = SharedSpec { inner: of("shared_expert_intermediate_size")?, gated: true };
    Ok(MoeSpec { shared: Some(shared), ..draft.moe(of("moe_intermediate_size")?)? })
}

/// Gated attention in some layers, gated delta nets in the others; norms stored less 1.
fn delta_model(
    draft: &Draft,
    (architecture, naming): (Architecture, TensorNames),
    layers: Vec<DraftLayer>,
) -> Checked<ModelSpec> {
    let keys = draft.keys;
    let bias = keys.flag("attention_bias")?.unwrap_or(false);
    let head_dim = keys.whole("head_dim", HEAD_WIDTH)?.unwrap_or(256);
    let attention = GqaSpec {
        qkv_bias: bias,
        output_bias: bias,
        qk_norm: Some(QkNorm::PerHead),
        gated: true,
        ..draft.grouped_of(draft.kv_heads()?, head_dim)?
    };
    let delta = delta_net(keys)?;
    let looks_back = looks_back(draft)?;
    let of_layer = |layer: usize| match looks_back[layer] {
        true => AttentionSpec::Gqa(attention),
        false => AttentionSpec::Recurrent(delta),
    };
    let rope = draft.rope(draft.rotated(head_dim, Some(0.25))?, RopeStyle::HalfSplit, draft.theta()?)?;
    let mut spec = draft.complete((architecture, naming), NormKind::Rms, Some(rope), layers, of_layer)?;
    spec.norm.less_one = true;
    Ok(spec)
}

fn delta_net(keys: &Keys) -> Checked<RecurrentSpec> {
    let spec = RecurrentSpec {
        rule: RecurrentRule::Delta,
        key_heads: keys.whole("linear_num_key_heads", HEADS)?.unwrap_or(16),
        value_heads: keys.whole("linear_num_value_heads", HEADS)?.unwrap_or(32),
        key_width: keys.whole("linear_key_head_dim", HEAD_WIDTH)?.unwrap_or(128),
        value_width: keys.whole("linear_value_head_dim", HEAD_WIDTH)?.unwrap_or(128),
        taps: keys.whole("linear_conv_kernel_dim", 2..=64)?.unwrap_or(4),
        conv_bias: false,
    };
    let heads = ("`linear_num_key_heads`", spec.key_heads);
    divides(heads, ("`linear_num_value_heads`", spec.value_heads))?;
    Ok(spec)
}

/// Which layers have attention: `layer_types` says it, or every fourth does.
fn looks_back(draft: &Draft) -> Checked<Vec<bool>> {
    let every = draft.keys.whole("full_attention_interval", LAYERS)?.unwrap_or(4);
    let kinds = draft.keys.list("layer_types")?;
    if !kinds.is_empty() && kinds.len() < draft.layers {
        let (kinds, layers) = (kinds.len(), draft.layers);
        return wrong(format!("`layer_types` has {kinds} entries for {layers} layers; {MEND}"));
    }
    let of_layer = |layer: usize| match kinds.get(layer).map(|kind| (kind, kind.as_str())) {
        None => Ok((layer + 1).is_multiple_of(every)),
        Some((_, Some("full_attention"))) => Ok(true),
        Some((_, Some("linear_attention"))) => Ok(false),
        Some((other, _)) => wrong(format!(
            "`layer_types` has {}; supported are full_attention and linear_attention",
            shown(other)
        )),
    };
    let looks_back = (0..draft.layers).map(of_layer).collect::<Checked<Vec<bool>>>()?;
    if !looks_back.contains(&true) {
        let layers = draft.layers;
        return wrong(format!(
            "none of its {layers} layers has full attention; a model with a cache of keys has one at least"
        ));
    }
    Ok(looks_back)
}
