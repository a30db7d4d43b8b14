//! Gemma 4 with experts: heads of two widths, windows in most layers, norms of what every part gives, and experts beside a
//! dense MLP.

use super::draft::{Defaults, Draft};
use super::keys::{Checked, EXPERTS, FACTOR, HEAD_WIDTH, HEADS, Keys, WIDTH, wrong};
use super::rope::Rope;
use crate::Architecture;
use crate::spec::*;
use epsmoe_device::op::{Activation, NormKind, RopeStyle, Sight, Swish};
use serde_json::{Map, Value, json};

const GEMMA4: Defaults = Defaults {
    vocab: 262_144,
    hidden: 2304,
    inner: 9216,
    layers: 30,
    heads: 8,
    kv_heads: Some(4),
    experts: 128,
    top_k: 8,
    positions: 131_072,
    eps: 1e-6,
    theta: 1e4,
    bos: Some(2),
    eos: Some(1),
};

pub(super) fn gemma4(keys: &Keys) -> Checked<ModelSpec> {
    let draft = Draft::new(keys, &GEMMA4)?;
    refuse_others(keys)?;
    let mut layers = draft.layers(&experts(&draft)?, |_| true);
    layers.iter_mut().for_each(|layer| {
        (layer.residual_mlp, layer.sandwich) = (Some(draft.inner), true);
    });
    let mut layers = draft.windowed_by_type(layers, |layer| !(layer + 1).is_multiple_of(6))?;
    if let Some(last) = layers.last_mut() {
        last.sight = Sight::All; // Whatever its type says.
    }
    layers.iter_mut().for_each(|layer| layer.rope = Some(usize::from(layer.sight == Sight::All)));
    let wide: Vec<bool> = layers.iter().map(|layer| layer.sight == Sight::All).collect();
    let [near, far] = attentions(&draft)?;
    let of_layer = |layer: usize| AttentionSpec::Gqa(if wide[layer] { far } else { near });
    let plain = json!({ "rope_type": "default", "rope_theta": 1e4 });
    let stretched = json!({ "rope_type": "proportional", "rope_theta": 1e6, "partial_rotary_factor": 0.25 });
    let near_rope = rope(&draft, "sliding_attention", plain, near.head_dim)?;
    let far_rope = rope(&draft, "full_attention", stretched, far.head_dim)?;
    let names = (Architecture::Gemma4, TensorNames::Gemma);
    let mut spec = draft.complete(names, NormKind::Rms, Some(near_rope), layers, of_layer)?;
    spec.ropes.push(far_rope.spec);
    spec.tie_embeddings = keys.flag("tie_word_embeddings")?.unwrap_or(true);
    spec.factors = Factors {
        embedding: (draft.hidden as f32).sqrt(),
        cap: keys.number("final_logit_softcapping", FACTOR)?.map(|cap| cap as f32),
        ..Factors::default()
    };
    Ok(spec)
}

/// What its smaller and larger siblings have instead.
fn refuse_others(keys: &Keys) -> Checked<()> {
    keys.only("hidden_activation", &["gelu_pytorch_tanh"])?;
    keys.only("use_bidirectional_attention", &["vision"])?;
    if !keys.flag("enable_moe_block")?.unwrap_or(false) {
        return wrong("`enable_moe_block` is not true: this Gemma has no experts, which is not supported");
    }
    for (key, default) in [("hidden_size_per_layer_input", 256), ("num_kv_shared_layers", 0)] {
        match keys.whole(key, 0..=*WIDTH.end())?.unwrap_or(default) {
            0 => {}
            other => return wrong(format!("`{key}` is {other}; only 0 is supported")),
        }
    }
    match keys.flag("use_double_wide_mlp")? {
        Some(true) => wrong("`use_double_wide_mlp` is true, which is not supported"),
        _ => Ok(()),
    }
}

fn experts(draft: &Draft) -> Checked<MoeSpec> {
    let keys = draft.keys;
    let inner = keys.whole("moe_intermediate_size", WIDTH)?.unwrap_or(704);
    let experts = keys.whole("num_experts", EXPERTS)?.unwrap_or(GEMMA4.experts);
    let top_k = super::draft::top_k(keys, "top_k_experts", GEMMA4.top_k, experts)?;
    Ok(MoeSpec {
        activation: Some(Activation::Swish(Swish::GELU_TANH)),
        router_scale: true,
        expert_scales: true,
        ..super::draft::softmax_moe(experts, inner, top_k)
    })
}

/// The attention of layers with a window, and of those that see everything.
fn attentions(draft: &Draft) -> Checked<[GqaSpec; 2]> {
    let keys = draft.keys;
    let bias = keys.flag("attention_bias")?.unwrap_or(false);
    let shared = keys.flag("attention_k_eq_v")?.unwrap_or(false);
    let of = |kv_heads, head_dim, values_are_keys| -> Checked<GqaSpec> {
        Ok(GqaSpec {
            qkv_bias: bias,
            output_bias: bias,
            qk_norm: Some(QkNorm::PerHead),
            value_norm: true,
            values_are_keys,
            scale: 1.0,
            ..draft.grouped_of(kv_heads, head_dim)?
        })
    };
    let (near, width) = (draft.kv_heads()?, keys.whole("head_dim", HEAD_WIDTH)?.unwrap_or(256));
    let far = keys.whole("num_global_key_value_heads", HEADS)?.filter(|_| shared).unwrap_or(near);
    let wide = keys.whole("global_head_dim", HEAD_WIDTH)?.unwrap_or(512);
    Ok([of(near, width, false)?, of(far, wide, shared)?])
}

/// The rotary embedding of one type of layers: what `rope_parameters` has under its name.
fn rope(draft: &Draft, kind: &'static str, usual: Value, head_dim: usize) -> Checked<Rope> {
    let all = draft.keys.section("rope_parameters", "rope_parameters.")?;
    let own = all.get(kind).map_or(usual, |(_, own)| own.clone());
    let map = Map::from_iter([("rope_parameters".to_owned(), own)]);
    let keys = Keys { map: Some(&map), section: "", remarks: draft.keys.remarks };
    let draft = Draft { keys: &keys, ..*draft };
    draft.rope(head_dim, RopeStyle::HalfSplit, draft.theta()?)
}
