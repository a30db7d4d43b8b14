//! Named configurations: published models, small ones of the same make, and those that other engines were
//! measured with. Each is a config.json, read like any other.

use crate::{ModelError, ModelSpec, config};

macro_rules! presets {
    ($($name:literal),* $(,)?) => {
        /// Names and texts of all presets.
        pub const PRESETS: &[(&str, &str)] =
            &[$(($name, include_str!(concat!("../presets/", $name, ".json")))),*];
    };
}

presets![
    "deepseek-v2-mini",
    "mixtral-mini",
    "qwen3-moe-mini",
    "deepseek-v2",
    "deepseek-v2-lite",
    "deepseek-v3",
    "mixtral-8x7b",
    "dbrx",
    "qwen2-moe-a2.7b",
    "qwen3-30b-a3b",
    "olmoe-1b-7b",
    "arctic",
    "gpt-oss-20b",
    "qwen3.5-35b-a3b",
    "longcat-flash",
    "granite-4.0-h-small",
    "nemotron-3-nano-30b-a3b",
    "llamacpp-qwen3moe-mini",
    "llamacpp-deepseek2-mini",
    "llamacpp-deepseek2-lite4",
];

/// A preset by name.
pub fn preset(name: &str) -> Result<ModelSpec, ModelError> {
    config::parse(preset_text(name)?.as_bytes(), &format!("preset {name}"))
}

/// The config.json of a preset.
pub fn preset_text(name: &str) -> Result<&'static str, ModelError> {
    let known = || PRESETS.iter().map(|(name, _)| *name).collect::<Vec<_>>().join(", ");
    let found = PRESETS.iter().find(|(known, _)| *known == name).map(|(_, text)| *text);
    found.ok_or_else(|| ModelError::UnknownPreset { name: name.to_owned(), known: known() })
}
