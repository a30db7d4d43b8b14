//! Snowflake Arctic: a dense MLP beside the experts.

use super::draft::{Defaults, Draft};
use super::keys::{Checked, Keys, LAYERS};
use super::mixtral::MIXTRAL;
use crate::Architecture;
use crate::spec::*;

const ARCTIC: Defaults = Defaults { kv_heads: None, top_k: 1, positions: 4096, ..MIXTRAL };

pub(super) fn arctic(keys: &Keys) -> Checked<ModelSpec> {
    let draft = Draft::new(keys, &ARCTIC)?;
    let attention = draft.grouped(draft.kv_heads()?)?;
    let every = keys.whole("moe_layer_frequency", LAYERS)?.unwrap_or(2);
    let layers = draft.layers(&draft.moe(draft.inner)?, |index| (index + 1).is_multiple_of(every));
    let mut layers = draft.windowed(layers)?;
    if keys.flag("parallel_attn_mlp_res")?.unwrap_or(false) {
        for layer in layers.iter_mut().filter(|layer| layer.mlp.moe().is_some()) {
            layer.residual_mlp = Some(draft.hidden);
        }
    }
    draft.grouped_model((Architecture::Arctic, TensorNames::Mixtral), attention, layers)
}
