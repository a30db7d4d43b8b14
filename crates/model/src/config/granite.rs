//! Granite with experts: Mixtral with factors on its streams, and a shared expert in some; Granite 4, most of whose layers are
//! state spaces.

use super::draft::{Defaults, Draft, divides};
use super::keys::{Checked, FACTOR, HEAD_WIDTH, HEADS, Keys, MEND, WIDTH, shown, wrong};
use super::mixtral::MIXTRAL;
use crate::Architecture;
use crate::spec::*;
use epsmoe_device::op::{NormKind, RopeStyle};

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
        Architecture::GraniteMoeShared | Architecture::GraniteMoeHybrid => {
            keys.whole("shared_intermediate_size", 0..=*WIDTH.end())?.unwrap_or(0)
        }
        _ => 0,
    };
    moe.shared = (shared > 0).then_some(SharedSpec { inner: shared, gated: false });
    let mut layers = draft.layers(&moe, |_| true);
    let factors = Factors {
        embedding: factor("embedding_multiplier")?,
        residual: factor("residual_multiplier")?,
        logits: 1.0 / factor("logits_scaling")?,
        cap: None,
    };
    let names = (architecture, TensorNames::Granite);
    if architecture != Architecture::GraniteMoeHybrid {
        return Ok(ModelSpec { factors, ..draft.grouped_model(names, attention, layers)? });
    }
    let rope = match keys.word("position_embedding_type")? {
        Some("rope") => Some(draft.rope(attention.head_dim, RopeStyle::HalfSplit, draft.theta()?)?),
        None | Some("nope") => None,
        Some(other) => {
            return wrong(format!(
                "`position_embedding_type` is \"{other}\"; supported are \"rope\", \"nope\" and none at all"
            ));
        }
    };
    layers.iter_mut().for_each(|layer| layer.rope = rope.as_ref().map(|_| 0));
    let looks_back = looks_back(&draft)?;
    let state_space = state_space(&draft)?;
    let of_layer = |layer: usize| match looks_back[layer] {
        true => AttentionSpec::Gqa(attention),
        false => AttentionSpec::Recurrent(state_space),
    };
    let spec = draft.complete(names, NormKind::Rms, rope, layers, of_layer)?;
    Ok(ModelSpec { factors, ..spec })
}

/// Which layers have attention: `layer_types` says it, or none has.
fn looks_back(draft: &Draft) -> Checked<Vec<bool>> {
    const KEY: &str = "layer_types";
    let kinds = draft.keys.list(KEY)?;
    if kinds.len() != draft.layers {
        let (kinds, layers) = (kinds.len(), draft.layers);
        return wrong(format!("`{KEY}` has {kinds} entries for {layers} layers; {MEND}"));
    }
    let of_layer = |kind: &serde_json::Value| match kind.as_str() {
        Some("attention" | "full_attention") => Ok(true),
        Some("mamba" | "linear_attention") => Ok(false),
        _ => wrong(format!("`{KEY}` has {}; supported are \"mamba\" and \"attention\"", shown(kind))),
    };
    let looks_back = kinds.iter().map(of_layer).collect::<Checked<Vec<bool>>>()?;
    if !looks_back.contains(&true) {
        let layers = draft.layers;
        return wrong(format!(
            "none of its {layers} layers has attention; a model with a cache of keys has one at least"
        ));
    }
    Ok(looks_back)
}

fn state_space(draft: &Draft) -> Checked<RecurrentSpec> {
    let keys = draft.keys;
    let heads = keys.whole("mamba_n_heads", HEADS)?.unwrap_or(128);
    let groups = keys.whole("mamba_n_groups", HEADS)?.unwrap_or(1);
    if groups != 1 {
        return wrong(format!(
            "`mamba_n_groups` is {groups}; only one group, whose heads are normed together, is supported"
        ));
    }
    if keys.flag("mamba_proj_bias")?.unwrap_or(false) {
        return wrong("`mamba_proj_bias` is true, which is not supported");
    }
    let width = keys.whole("mamba_expand", 1..=64)?.unwrap_or(2) * draft.hidden;
    divides(("`mamba_n_heads`", heads), ("`mamba_expand` times the hidden size", width))?;
    let given = match keys.get("mamba_d_head").and_then(|(_, value)| value.as_str()) {
        Some("auto") => None,
        _ => keys.whole("mamba_d_head", HEAD_WIDTH)?,
    };
    let head_width = match given {
        Some(given) if given * heads != width => {
            return wrong(format!(
                "{heads} heads (`mamba_n_heads`) of {given} (`mamba_d_head`) are not `mamba_expand` times the hidden size, {width}; {MEND}"
            ));
        }
        given => given.unwrap_or(width / heads),
    };
    Ok(RecurrentSpec {
        rule: RecurrentRule::StateSpace { floor: least_step(keys)? },
        key_heads: groups,
        value_heads: heads,
        key_width: keys.whole("mamba_d_state", HEAD_WIDTH)?.unwrap_or(256),
        value_width: head_width,
        taps: keys.whole("mamba_d_conv", 2..=64)?.unwrap_or(4),
        conv_bias: keys.flag("mamba_conv_bias")?.unwrap_or(true),
    })
}

/// The lower of two limits on steps; the upper is none.
fn least_step(keys: &Keys) -> Checked<f32> {
    const KEY: &str = "time_step_limit";
    match keys.list(KEY)? {
        [] => Ok(0.0),
        [least, most] if most.as_f64().is_none_or(|most| most >= f64::from(f32::MAX)) => {
            Ok(least.as_f64().unwrap_or(0.0) as f32)
        }
        [_, most] => wrong(format!(
            "`{KEY}` ends at {}, which is not supported: only limits without an end are",
            shown(most)
        )),
        other => wrong(format!("`{KEY}` has {} entries instead of 2; {MEND}", other.len())),
    }
}
