//! Tensors that a model leaves alone.

use super::shown;
use crate::ModelSpec;
use epsmoe_base::count;
use std::collections::BTreeMap;

/// Kinds of tensors that a sentence names.
const NAMED: usize = 4;

/// A sentence about tensors that are not used: one name for those of all layers. Nothing if there are none, or only
/// some that can be computed.
pub(super) fn sentence<'a>(names: impl Iterator<Item = &'a str>, spec: &ModelSpec) -> Option<String> {
    let mut kinds: BTreeMap<String, usize> = BTreeMap::new();
    // Frequencies of the rotary embedding, which older libraries stored.
    for name in names.filter(|name| !name.ends_with("rotary_emb.inv_freq")) {
        *kinds.entry(kind(name, spec.layers.len())).or_default() += 1;
    }
    let all: usize = kinds.values().sum();
    let named = kinds.iter().take(NAMED).map(|(kind, &number)| match number {
        1 => format!("`{}`", shown(kind)),
        _ => format!("`{}` ({number})", shown(kind)),
    });
    let mut listed = named.collect::<Vec<_>>().join(", ");
    if kinds.len() > NAMED {
        listed += &format!(" and {} more kinds", kinds.len() - NAMED);
    }
    let verb = if all == 1 { "is" } else { "are" };
    (all > 0)
        .then(|| format!("{} of the weights {verb} not used by this model: {listed}", count(all, "tensor")))
}

/// A tensor's name with `*` for its layer and its expert. Layers after the model's last are one kind: they predict
/// further tokens.
fn kind(name: &str, layers: usize) -> String {
    let mut before = "";
    let mut words = Vec::new();
    for word in name.split('.') {
        let number = word.parse::<usize>().ok();
        if before == "layers" && number.is_some_and(|layer| layer >= layers) {
            return format!("layers after the last, from {layers} on");
        }
        words.push(if number.is_some() { "*" } else { word });
        before = word;
    }
    words.join(".")
}
