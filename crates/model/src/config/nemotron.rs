//! Nemotron-H: state spaces, attention that knows no positions, experts and MLPs without gates, in an order of their own.

use super::deepseek::{ExpertDefaults, sigmoid_experts};
use super::draft::{Defaults, Draft, DraftLayer, divides};
use super::keys::{Checked, EPSILON, HEAD_WIDTH, HEADS, Keys, MEND, WIDTH, shown, wrong};
use crate::Architecture;
use crate::spec::*;
use epsmoe_device::op::{Activation, NormKind};
use serde_json::Value;

const NEMOTRON: Defaults = Defaults {
    vocab: 131_072,
    hidden: 4096,
    inner: 21_504,
    layers: 4,
    heads: 32,
    kv_heads: Some(8),
    experts: 8,
    top_k: 2,
    positions: 4096,
    eps: 1e-5,
    theta: 1e4,
    bos: Some(1),
    eos: Some(2),
};

const ACTIVATION: Option<Activation> = Some(Activation::SquaredRelu);

/// What one of its layers is: each has a norm before it, and adds to the stream.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Block {
    StateSpace,
    Attention,
    Experts,
    Dense,
}

pub(super) fn nemotron_h(keys: &Keys) -> Checked<ModelSpec> {
    for key in ["use_bias", "mamba_proj_bias", "attention_bias"] {
        if keys.flag(key)?.unwrap_or(false) {
            return wrong(format!("`{key}` is true, which is not supported"));
        }
    }
    if let Some((key, value)) = keys.get("moe_latent_size") {
        return wrong(format!(
            "`{key}` is {}; experts that read a narrower row are not supported",
            shown(value)
        ));
    }
    if let Some((key, value)) = keys.get("sliding_window") {
        return wrong(format!("`{key}` is {}, which is not supported", shown(value)));
    }
    keys.only("mlp_hidden_act", &["relu2"])?;
    keys.only("mamba_hidden_act", &["silu"])?;
    let blocks = blocks(keys)?;
    let draft = Draft { layers: blocks.len(), ..Draft::new(keys, &NEMOTRON)? };
    let moe = experts(&draft)?;
    let dense = MlpSpec::Dense { inner: draft.inner, activation: ACTIVATION };
    let head_dim = keys.whole("head_dim", HEAD_WIDTH)?.unwrap_or(128);
    let attention = AttentionSpec::Gqa(draft.grouped_of(draft.kv_heads()?, head_dim)?);
    let state_space = AttentionSpec::Recurrent(state_space(keys)?);
    let mut layers: Vec<(AttentionSpec, MlpSpec)> = Vec::new();
    for (number, block) in blocks.into_iter().enumerate() {
        let mlp = match block {
            Block::StateSpace => {
                layers.push((state_space, MlpSpec::Absent));
                continue;
            }
            Block::Attention => {
                layers.push((attention, MlpSpec::Absent));
                continue;
            }
            Block::Experts => MlpSpec::Moe(moe.clone()),
            Block::Dense => dense.clone(),
        };
        match layers.last_mut() {
            Some((_, place @ MlpSpec::Absent)) => *place = mlp,
            _ => {
                return wrong(format!(
                    "layer {number} is an MLP that follows no attention and no state space, which is not supported"
                ));
            }
        }
    }
    if !layers.iter().any(|(kind, _)| *kind == attention) {
        return wrong("none of its layers has attention; a model with a cache of keys has one at least");
    }
    if !layers.iter().any(|(_, mlp)| mlp.moe().is_some()) {
        return wrong("none of its layers has experts, which is not supported");
    }
    let (attentions, mlps): (Vec<_>, Vec<_>) = layers.into_iter().unzip();
    let drafts = mlps.into_iter().map(DraftLayer::without_positions).collect();
    let names = (Architecture::NemotronH, TensorNames::Nemotron);
    let mut spec = draft.complete(names, NormKind::Rms, None, drafts, |layer| attentions[layer])?;
    spec.norm.eps = keys.number("layer_norm_epsilon", EPSILON)?.unwrap_or(NEMOTRON.eps) as f32;
    Ok(spec)
}

/// The layers, by letters or by words.
fn blocks(keys: &Keys) -> Checked<Vec<Block>> {
    if let Some(letters) = keys.word("hybrid_override_pattern")? {
        let block = |letter| match letter {
            'M' => Ok(Block::StateSpace),
            '*' => Ok(Block::Attention),
            'E' => Ok(Block::Experts),
            '-' => Ok(Block::Dense),
            other => wrong(format!(
                "`hybrid_override_pattern` has `{}`; supported are M, *, E and -",
                other.escape_default()
            )),
        };
        return letters.chars().map(block).collect();
    }
    let kinds = [keys.list("layers_block_type")?, keys.list("layer_types")?];
    let Some(kinds) = kinds.into_iter().find(|kinds| !kinds.is_empty()) else {
        return wrong(format!(
            "neither `hybrid_override_pattern` nor `layers_block_type` says what its layers are; {MEND}"
        ));
    };
    let block = |kind: &Value| match kind.as_str() {
        Some("mamba" | "linear_attention") => Ok(Block::StateSpace),
        Some("attention" | "full_attention") => Ok(Block::Attention),
        Some("moe") => Ok(Block::Experts),
        Some("mlp") => Ok(Block::Dense),
        _ => wrong(format!(
            "`layers_block_type` has {}; supported are \"mamba\", \"attention\", \"moe\" and \"mlp\"",
            shown(kind)
        )),
    };
    kinds.iter().map(block).collect()
}

fn experts(draft: &Draft) -> Checked<MoeSpec> {
    let defaults = ExpertDefaults { inner: 7688, shared: 1, scale: 1.0 };
    let moe = sigmoid_experts(draft, defaults, (1, 1), true)?;
    let inner = draft.keys.whole("moe_shared_expert_intermediate_size", WIDTH)?.unwrap_or(7688);
    Ok(MoeSpec { shared: Some(SharedSpec { inner, gated: false }), activation: ACTIVATION, ..moe })
}

fn state_space(keys: &Keys) -> Checked<RecurrentSpec> {
    let spec = RecurrentSpec {
        // As transformers has it, where a prompt is computed.
        rule: RecurrentRule::StateSpace {
            floor: keys.number("time_step_min", 0.0..=1e6)?.unwrap_or(0.001) as f32,
        },
        key_heads: keys.whole("n_groups", HEADS)?.unwrap_or(8),
        value_heads: keys.whole("mamba_num_heads", HEADS)?.unwrap_or(128),
        key_width: keys.whole("ssm_state_size", HEAD_WIDTH)?.unwrap_or(128),
        value_width: keys.whole("mamba_head_dim", HEAD_WIDTH)?.unwrap_or(64),
        taps: keys.whole("conv_kernel", 2..=64)?.unwrap_or(4),
        conv_bias: keys.flag("use_conv_bias")?.unwrap_or(true),
    };
    divides(("`n_groups`", spec.key_heads), ("`mamba_num_heads`", spec.value_heads))?;
    Ok(spec)
}
