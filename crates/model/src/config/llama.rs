//! Llama 4 as text: most layers turn queries and keys and see their own stretch of the text, the others see everything and know
//! no positions; experts read rows under the router's weights.

use super::draft::{Defaults, Draft, DraftLayer};
use super::keys::{Checked, FACTOR, HEAD_WIDTH, Keys, LAYERS, MEND, POSITIONS, WIDTH, shown, whole, wrong};
use crate::Architecture;
use crate::spec::*;
use epsmoe_device::op::{Growth, NormKind, RopeStyle, Score, Sight};
use serde_json::Value;

const LLAMA4: Defaults = Defaults {
    vocab: 202_048,
    hidden: 5120,
    inner: 8192,
    layers: 48,
    heads: 40,
    kv_heads: Some(8),
    experts: 16,
    top_k: 1,
    positions: 131_072,
    eps: 1e-5,
    theta: 5e5,
    bos: Some(1),
    eos: Some(2),
};

pub(super) fn llama4(keys: &Keys) -> Checked<ModelSpec> {
    let draft = Draft::new(keys, &LLAMA4)?;
    let head_dim = keys.whole("head_dim", HEAD_WIDTH)?.unwrap_or(128);
    let bias = keys.flag("attention_bias")?.unwrap_or(false);
    let far = GqaSpec { qkv_bias: bias, output_bias: bias, ..draft.grouped_of(draft.kv_heads()?, head_dim)? };
    let normed = keys.flag("use_qk_norm")?.unwrap_or(true).then_some(QkNorm::Unweighted);
    let near = GqaSpec { qk_norm: normed, norm_after_rope: true, ..far };
    let turns = turning(&draft)?;
    let growth = growth(keys)?;
    let mut layers = layers(&draft)?;
    sights(&draft, &turns, &mut layers)?;
    for (layer, &turns) in layers.iter_mut().zip(&turns) {
        layer.rope = if turns { Some(0) } else { growth.map(|_| 1) };
    }
    let rope = draft.rope(draft.rotated(head_dim, None)?, RopeStyle::Interleaved, draft.theta()?)?;
    let of_layer = |layer: usize| AttentionSpec::Gqa(if turns[layer] { near } else { far });
    let mut spec = draft.complete(
        (Architecture::Llama4, TensorNames::Llama4),
        NormKind::Rms,
        Some(rope),
        layers,
        of_layer,
    )?;
    // Queries that do not turn are still multiplied.
    spec.ropes.extend(growth.map(|growth| RopeSpec {
        style: RopeStyle::Interleaved,
        dim: head_dim,
        inverse_frequencies: vec![0.0; head_dim / 2],
        attention_factor: 1.0,
        growth: Some(growth),
    }));
    Ok(spec)
}

/// Layers with experts, all or those that a key names, and dense ones, which are wider.
fn layers(draft: &Draft) -> Checked<Vec<DraftLayer>> {
    let keys = draft.keys;
    let mut moe = draft.moe(draft.inner)?;
    moe.router.score = Score::SigmoidOfLogit;
    moe.router.normalise = false;
    moe.scaled_inputs = true;
    moe.shared = Some(SharedSpec { inner: draft.inner, gated: false });
    let step = keys.whole("interleave_moe_layer_step", LAYERS)?.unwrap_or(1);
    let named = match keys.get("moe_layers") {
        Some(_) => Some(keys.list("moe_layers")?),
        None => None,
    };
    let is_moe = |layer: usize| match named {
        Some(named) => named.iter().any(|number| whole(number) == Some(layer)),
        None => (layer + 1).is_multiple_of(step),
    };
    let inner = keys.whole("intermediate_size_mlp", WIDTH)?.unwrap_or(16_384);
    Ok(Draft { inner, ..*draft }.layers(&moe, is_moe))
}

/// Which layers turn queries and keys: `no_rope_layers` has a 1 for those that do, or all but every fourth do.
fn turning(draft: &Draft) -> Checked<Vec<bool>> {
    const KEY: &str = "no_rope_layers";
    let every = draft.keys.whole("no_rope_layer_interval", LAYERS)?.unwrap_or(4);
    let given = draft.keys.list(KEY)?;
    if given.is_empty() {
        return Ok((0..draft.layers).map(|layer| !(layer + 1).is_multiple_of(every)).collect());
    }
    let turns = |value: &Value| value.as_bool().or_else(|| whole(value).map(|number| number != 0));
    let turns: Option<Vec<bool>> = given.iter().map(turns).collect();
    match turns.filter(|turns| turns.len() >= draft.layers) {
        Some(turns) => Ok(turns[..draft.layers].to_vec()),
        None => wrong(format!("`{KEY}` must say 0 or 1 for each of {} layers; {MEND}", draft.layers)),
    }
}

/// How far back each layer sees: `layer_types` says it, or those that turn see a stretch.
fn sights(draft: &Draft, turns: &[bool], layers: &mut [DraftLayer]) -> Checked<()> {
    const KINDS: [&str; 2] = ["full_attention", "chunked_attention"];
    let keys = draft.keys;
    let kinds = keys.list("layer_types")?;
    if let Some(other) = kinds.iter().find(|kind| !KINDS.map(Some).contains(&kind.as_str())) {
        let other = shown(other);
        return wrong(format!("`layer_types` has {other}; supported are {} and {}", KINDS[0], KINDS[1]));
    }
    if !kinds.is_empty() && kinds.len() < layers.len() {
        let (kinds, layers) = (kinds.len(), layers.len());
        return wrong(format!("`layer_types` has {kinds} entries for {layers} layers; {MEND}"));
    }
    const CHUNK: &str = "attention_chunk_size";
    let usual = (!keys.is_null(CHUNK)).then_some(8192);
    let stretch = keys.whole(CHUNK, POSITIONS)?.or(usual);
    for (index, layer) in layers.iter_mut().enumerate() {
        let near = kinds.get(index).map_or(turns[index], |kind| kind == KINDS[1]);
        layer.sight = match stretch {
            _ if !near => Sight::All,
            Some(stretch) => Sight::Stretch(stretch),
            None => {
                return wrong(format!(
                    "layer {index} has attention in chunks, but `{CHUNK}` is null; {MEND}"
                ));
            }
        };
    }
    Ok(())
}

/// The factor on queries of layers that do not turn.
fn growth(keys: &Keys) -> Checked<Option<Growth>> {
    if !keys.flag("attn_temperature_tuning")?.unwrap_or(true) {
        return Ok(None);
    }
    let step = keys.number("floor_scale", FACTOR)?.unwrap_or(8192.0) as f32;
    let rate = keys.number("attn_scale", 0.0..=*FACTOR.end())?.unwrap_or(0.1) as f32;
    Ok(Some(Growth { step, rate }))
}
