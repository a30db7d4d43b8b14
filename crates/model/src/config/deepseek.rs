//! DeepSeek-V2 and DeepSeek-V3: latent attention, shared experts, groups of experts.

use super::draft::{Defaults, Draft, DraftLayer, divides};
use super::keys::{Checked, FACTOR, HEAD_WIDTH, Keys, LAYERS, MEND, WIDTH, wrong};
use crate::Architecture;
use crate::spec::*;
use epsmoe_device::op::{GroupLimit, GroupScore, NormKind, RopeStyle, Score};

const DEEPSEEK_V2: Defaults = Defaults {
    vocab: 102_400,
    hidden: 4096,
    inner: 11_008,
    layers: 32,
    heads: 32,
    kv_heads: None,
    experts: 64,
    top_k: 6,
    positions: 2048,
    eps: 1e-6,
    theta: 1e4,
    bos: Some(0),
    eos: Some(1),
};

pub(super) fn deepseek_v2(keys: &Keys) -> Checked<ModelSpec> {
    let draft = Draft::new(keys, &DEEPSEEK_V2)?;
    keys.only("scoring_func", &["softmax"])?;
    if keys.get("num_experts_per_tok").is_none() {
        return wrong(format!("`num_experts_per_tok` is missing; {MEND}"));
    }
    let mut moe = deepseek_experts(&draft, ExpertDefaults { inner: 1407, shared: 2, scale: 1.0 })?;
    moe.router.normalise = moe.router.top_k > 1 && keys.flag("norm_topk_prob")?.unwrap_or(false);
    if moe.router.normalise {
        moe.router.scale = 1.0; // The published router does one or the other.
    }
    moe.router.groups = match keys.word("topk_method")?.unwrap_or("greedy") {
        "greedy" => None,
        "group_limited_greedy" => groups(keys, (1, 1), &moe, GroupScore::Max)?,
        other => {
            return wrong(format!(
                "`topk_method` is \"{other}\"; supported are greedy and group_limited_greedy"
            ));
        }
    };
    let layers = deepseek_layers(&draft, &moe, 0)?;
    latent_model(&draft, Architecture::DeepseekV2, LATENT, layers)
}

const DEEPSEEK_V3: Defaults = Defaults {
    vocab: 129_280,
    hidden: 7168,
    inner: 18_432,
    layers: 61,
    heads: 128,
    experts: 256,
    top_k: 8,
    positions: 4096,
    ..DEEPSEEK_V2
};

pub(super) fn deepseek_v3(keys: &Keys) -> Checked<ModelSpec> {
    let draft = Draft::new(keys, &DEEPSEEK_V3)?;
    let defaults = ExpertDefaults { inner: 2048, shared: 1, scale: 2.5 };
    let moe = sigmoid_experts(&draft, defaults, (8, 4), true)?;
    let layers = deepseek_layers(&draft, &moe, 3)?;
    latent_model(&draft, Architecture::DeepseekV3, LATENT, layers)
}

/// DeepSeek-V3's experts, which newer families have too: chosen by the sigmoid of their logits and a bias.
pub(super) fn sigmoid_experts(
    draft: &Draft,
    defaults: ExpertDefaults,
    default_groups: (usize, usize),
    normalise: bool,
) -> Checked<MoeSpec> {
    let keys = draft.keys;
    // One family's configs name the method where others name the function.
    keys.only("scoring_func", &["sigmoid", "noaux_tc"])?;
    keys.only("topk_method", &["noaux_tc"])?;
    let mut moe = deepseek_experts(draft, defaults)?;
    moe.correction_bias = true;
    moe.router.score = Score::Sigmoid;
    moe.router.normalise = keys.flag("norm_topk_prob")?.unwrap_or(normalise);
    moe.router.groups = groups(keys, default_groups, &moe, GroupScore::TopTwoSum)?;
    Ok(moe)
}

/// What a config may leave out of its experts.
pub(super) struct ExpertDefaults {
    pub(super) inner: usize,
    pub(super) shared: usize,
    pub(super) scale: f64,
}

fn deepseek_experts(draft: &Draft, defaults: ExpertDefaults) -> Checked<MoeSpec> {
    let keys = draft.keys;
    let inner = keys.whole("moe_intermediate_size", WIDTH)?.unwrap_or(defaults.inner);
    let mut moe = draft.moe(inner)?;
    let default_shared = if keys.is_null("n_shared_experts") { 0 } else { defaults.shared };
    let shared = keys.whole("n_shared_experts", 0..=64)?.unwrap_or(default_shared);
    moe.shared = (shared > 0).then_some(SharedSpec { inner: shared * inner, gated: false });
    moe.router.scale = keys.number("routed_scaling_factor", FACTOR)?.unwrap_or(defaults.scale) as f32;
    Ok(moe)
}

/// The restriction to the best groups of experts; none where there is one group.
fn groups(
    keys: &Keys,
    (default_groups, default_kept): (usize, usize),
    moe: &MoeSpec,
    by: GroupScore,
) -> Checked<Option<GroupLimit>> {
    let groups = keys.whole("n_group", 1..=moe.experts)?.unwrap_or(default_groups);
    let kept = keys.whole("topk_group", 1..=groups)?.unwrap_or(default_kept.min(groups));
    divides(("`n_group`", groups), ("the number of experts", moe.experts))?;
    let size = moe.experts / groups;
    if moe.router.top_k > kept * size {
        return wrong(format!(
            "`num_experts_per_tok` is {}, but {kept} groups of {size} experts are kept; {MEND}",
            moe.router.top_k
        ));
    }
    if by == GroupScore::TopTwoSum && size < 2 && groups > 1 {
        return wrong(format!("`n_group` is {groups}, but groups must have two experts or more; {MEND}"));
    }
    Ok((groups > 1).then_some(GroupLimit { groups, kept, by }))
}

pub(super) fn deepseek_layers(
    draft: &Draft,
    moe: &MoeSpec,
    default_dense: usize,
) -> Checked<Vec<DraftLayer>> {
    let dense = draft.keys.whole("first_k_dense_replace", 0..=*LAYERS.end())?.unwrap_or(default_dense);
    let every = draft.keys.whole("moe_layer_freq", LAYERS)?.unwrap_or(1);
    Ok(draft.layers(moe, |layer| layer >= dense && layer.is_multiple_of(every)))
}

/// What a config may leave out of latent attention.
pub(super) struct LatentDefaults {
    pub(super) q_lora: usize,
    pub(super) kv_lora: usize,
    pub(super) nope: usize,
    pub(super) rope: usize,
    pub(super) value: usize,
}

const LATENT: LatentDefaults = LatentDefaults { q_lora: 1536, kv_lora: 512, nope: 128, rope: 64, value: 128 };

pub(super) fn latent_model(
    draft: &Draft,
    architecture: Architecture,
    defaults: LatentDefaults,
    layers: Vec<DraftLayer>,
) -> Checked<ModelSpec> {
    let keys = draft.keys;
    let nope = keys.whole("qk_nope_head_dim", HEAD_WIDTH)?.unwrap_or(defaults.nope);
    let rope_dim = keys.whole("qk_rope_head_dim", HEAD_WIDTH)?.unwrap_or(defaults.rope);
    let pairs = architecture == Architecture::DeepseekV2 || keys.flag("rope_interleave")?.unwrap_or(true);
    let style = if pairs { RopeStyle::Interleaved } else { RopeStyle::HalfSplit };
    let rope = draft.rope(draft.rotated(rope_dim, None)?, style, draft.theta()?)?;
    let default_q_lora = (!keys.is_null("q_lora_rank")).then_some(defaults.q_lora);
    let attention = MlaSpec {
        heads: draft.heads,
        q_lora: keys.whole("q_lora_rank", WIDTH)?.or(default_q_lora),
        kv_lora: keys.whole("kv_lora_rank", WIDTH)?.unwrap_or(defaults.kv_lora),
        nope,
        rope: rope_dim,
        value: keys.whole("v_head_dim", HEAD_WIDTH)?.unwrap_or(defaults.value),
        inner_eps: 1e-6, // Whatever `rms_norm_eps` says.
        bias: keys.flag("attention_bias")?.unwrap_or(false),
        scale: (((nope + rope_dim) as f64).powf(-0.5) * rope.score_factor) as f32,
        latent_scale: 1.0,
    };
    let attention = AttentionSpec::Mla(attention);
    draft.complete((architecture, TensorNames::Common), NormKind::Rms, Some(rope), layers, |_| attention)
}
