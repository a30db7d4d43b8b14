//! A Hugging Face config.json becomes a [`ModelSpec`]: old and new key styles, every number checked. What would change
//! results and is not supported is refused; what only informs is read, or passed over with a remark.
//!
//! `keys` reads values, `draft` has what architectures share, `rope` the rotary embedding; beside them one file for each
//! family of architectures.

mod arctic;
mod bailing;
mod dbrx;
mod deepseek;
mod draft;
mod ernie;
mod gemma;
mod glm;
mod gpt_oss;
mod granite;
mod hunyuan;
mod keys;
mod llama;
mod longcat;
mod minimax;
mod mixtral;
mod nemotron;
mod olmoe;
mod phi;
mod qwen;
mod rope;

use crate::checkpoint::{GgufFiles, other_weights, read_small};
use crate::spec::{ModelSpec, Nesting, TensorNames};
use crate::{Architecture, ModelError};
use epsmoe_base::json;
use keys::{ACTIVATIONS, Checked, Keys, MOST_EXPERTS_IN_ALL, Remarks, Wrong, quoted, shown, wrong};
use serde_json::{Map, Value};
use std::io::ErrorKind;
use std::path::Path;

/// The file's name in a model's folder.
pub const FILE: &str = "config.json";
/// Bytes that the file may have.
pub const FILE_LIMIT: u64 = 16 << 20;

/// A configuration.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    /// The model.
    pub spec: ModelSpec,
    /// Whether the file says which format the weights are in; [`ModelSpec::dtype`] is float32 if it does not.
    pub says_dtype: bool,
    /// What was passed over, a sentence each.
    pub remarks: Vec<String>,
}

impl Config {
    /// Reads the config.json of a model's folder.
    pub fn read(folder: &Path) -> Result<Config, ModelError> {
        Config::read_with(folder, &Map::new())
    }

    /// The same with other values for some keys, however they are stored; objects are merged.
    pub fn read_with(folder: &Path, overrides: &Map<String, Value>) -> Result<Config, ModelError> {
        let path = folder.join(FILE);
        if path.symlink_metadata().is_err()
            && let Some(files) = GgufFiles::open(folder)?
        {
            return Config::of_gguf(&files, overrides);
        }
        let text = read_small(&path, FILE_LIMIT).map_err(|error| without_config(folder, error))?;
        Config::parse_with(&text, &path.display().to_string(), overrides)
    }

    /// The configuration in the header of a GGUF file.
    fn of_gguf(files: &GgufFiles, overrides: &Map<String, Value>) -> Result<Config, ModelError> {
        let file = files.place();
        let named = |problem| ModelError::Config { file: file.clone(), problem };
        let mut keys = files.header.config().map_err(|error| named(error.to_string()))?;
        merge(&mut keys, overrides);
        let mut config = build_keys(&keys).map_err(|Wrong(problem)| named(problem))?;
        config.spec.naming = TensorNames::Gguf;
        config.remarks.iter_mut().for_each(|remark| *remark = format!("{file}: {remark}"));
        Ok(config)
    }

    /// Reads the text of a config.json; `file` is its name in messages.
    pub fn parse(text: &[u8], file: &str) -> Result<Config, ModelError> {
        Config::parse_with(text, file, &Map::new())
    }

    /// The same with other values for some keys; objects are merged.
    pub fn parse_with(text: &[u8], file: &str, overrides: &Map<String, Value>) -> Result<Config, ModelError> {
        let named = |problem| ModelError::Config { file: file.to_owned(), problem };
        let mut config = build(text, overrides).map_err(|Wrong(problem)| named(problem))?;
        config.remarks.iter_mut().for_each(|remark| *remark = format!("{file}: {remark}"));
        Ok(config)
    }
}

/// What a folder without a config.json has instead.
fn without_config(folder: &Path, error: ModelError) -> ModelError {
    match &error {
        ModelError::Read { source, .. } if source.kind() == ErrorKind::NotFound && folder.is_dir() => {
            let instead = other_weights(folder)
                .unwrap_or_else(|| "name the folder of a model, or fetch it again".into());
            ModelError::Config {
                file: folder.display().to_string(),
                problem: format!("there is no {FILE}; {instead}"),
            }
        }
        _ => error,
    }
}

/// The model of a folder's config.json.
pub fn read(folder: &Path) -> Result<ModelSpec, ModelError> {
    Config::read(folder).map(|config| config.spec)
}

/// The model of a config.json's text; `file` is its name in messages.
pub fn parse(text: &[u8], file: &str) -> Result<ModelSpec, ModelError> {
    Config::parse(text, file).map(|config| config.spec)
}

fn build(text: &[u8], overrides: &Map<String, Value>) -> Checked<Config> {
    let value: Value = serde_json::from_slice(&json::from_python(text))
        .map_err(|error| Wrong(format!("this is not valid JSON ({error}); fetch the file again")))?;
    let Value::Object(mut map) = value else {
        return wrong("this is not a JSON object; fetch the file again");
    };
    merge(&mut map, overrides);
    build_keys(&map)
}

/// Puts other values in the place of some; of two objects, those inside.
fn merge(map: &mut Map<String, Value>, overrides: &Map<String, Value>) {
    for (key, value) in overrides {
        match (map.get_mut(key), value) {
            (Some(Value::Object(inner)), Value::Object(others)) => merge(inner, others),
            _ => {
                map.insert(key.clone(), value.clone());
            }
        }
    }
}

fn build_keys(map: &Map<String, Value>) -> Checked<Config> {
    let remarks = Remarks::default();
    let keys = Keys { map: Some(map), section: "", remarks: &remarks };
    let architecture = architecture(&keys)?;
    let inner = language_model(map);
    let nesting = match (&inner, keys.word("model_type")?) {
        (None, _) => Nesting::Alone,
        (_, Some("kimi_k25" | "llama4")) => Nesting::Under,
        _ => Nesting::Beside,
    };
    let keys = Keys { map: inner.as_ref().or(Some(map)), ..keys };
    refuse_unsupported(architecture, &keys)?;
    let mut spec = match architecture {
        Architecture::Mixtral => mixtral::mixtral(&keys),
        Architecture::DeepseekV2 => deepseek::deepseek_v2(&keys),
        Architecture::DeepseekV3 => deepseek::deepseek_v3(&keys),
        Architecture::Dbrx => dbrx::dbrx(&keys),
        Architecture::Qwen2Moe => qwen::qwen2(&keys),
        Architecture::Qwen3Moe => qwen::qwen3(&keys),
        Architecture::Olmoe => olmoe::olmoe(&keys),
        Architecture::Arctic => arctic::arctic(&keys),
        Architecture::Glm4Moe => glm::glm4_moe(&keys),
        Architecture::Glm4MoeLite => glm::glm4_moe_lite(&keys),
        Architecture::MinimaxM2 => minimax::minimax_m2(&keys),
        Architecture::Dots1 => glm::dots1(&keys),
        Architecture::BailingMoeV2 => bailing::bailing_moe_v2(&keys),
        Architecture::Ernie45Moe => ernie::ernie4_5_moe(&keys),
        Architecture::HunyuanV1Moe => hunyuan::hunyuan_v1_moe(&keys),
        Architecture::GptOss => gpt_oss::gpt_oss(&keys),
        Architecture::GraniteMoe | Architecture::GraniteMoeShared | Architecture::GraniteMoeHybrid => {
            granite::granite(&keys, architecture)
        }
        Architecture::NemotronH => nemotron::nemotron_h(&keys),
        Architecture::Qwen3Next => qwen::qwen3_next(&keys),
        Architecture::Qwen35Moe => qwen::qwen3_5(&keys),
        Architecture::SolarOpen => glm::solar_open(&keys),
        Architecture::ExaoneMoe => glm::exaone_moe(&keys),
        Architecture::HunyuanV3 => hunyuan::hunyuan_v3(&keys),
        Architecture::Gemma4 => gemma::gemma4(&keys),
        Architecture::LongcatFlash => longcat::longcat_flash(&keys),
        Architecture::Llama4 => llama::llama4(&keys),
        Architecture::Phimoe => phi::phimoe(&keys),
    }?;
    spec.nesting = nesting;
    let experts: usize = spec.layers.iter().filter_map(|layer| layer.mlp.moe()).map(|moe| moe.experts).sum();
    if experts > MOST_EXPERTS_IN_ALL {
        return wrong(format!(
            "all layers together have {experts} experts, of at most {MOST_EXPERTS_IN_ALL}"
        ));
    }
    let says_dtype = draft::known_dtype(&keys).is_some();
    Ok(Config { spec, says_dtype, remarks: remarks.into_inner() })
}

/// The keys of a language model that is nested in a larger one, whose own keys hold where it has none.
fn language_model(map: &Map<String, Value>) -> Option<Map<String, Value>> {
    let inner = map.get("text_config")?.as_object()?;
    let mut flat = map.clone();
    flat.extend(inner.iter().map(|(key, value)| (key.clone(), value.clone())));
    Some(flat)
}

fn architecture(keys: &Keys) -> Checked<Architecture> {
    let classes: Vec<&str> = match keys.get("architectures") {
        Some((_, Value::Array(classes))) => classes.iter().filter_map(Value::as_str).collect(),
        _ => Vec::new(),
    };
    let names = if classes.is_empty() { vec![keys.word("model_type")?.unwrap_or("none")] } else { classes };
    let known = |name: &&str| {
        let mut all = Architecture::ALL.iter().copied();
        all.find(|known| [known.names().0, known.names().1].contains(name)).or_else(|| {
            ALIASES.iter().find(|(alias, _)| alias == name).map(|(_, architecture)| *architecture)
        })
    };
    if let Some(known) = names.iter().find_map(known) {
        return Ok(known);
    }
    if let Some((name, missing)) = UNSUPPORTED.iter().find(|(name, _)| names.contains(name)) {
        return wrong(format!("architecture `{name}` is not supported: {missing}"));
    }
    let all = Architecture::ALL.iter().map(|known| known.to_string()).collect::<Vec<_>>().join(", ");
    wrong(format!("architecture `{}` is not supported; supported are {all}", quoted(names[0])))
}

/// Other names of what is supported.
const ALIASES: [(&str, Architecture); 14] = [
    ("Llama4ForCausalLM", Architecture::Llama4),
    ("llama4_text", Architecture::Llama4),
    ("PhiMoEForCausalLM", Architecture::Phimoe),
    ("Gemma4ForCausalLM", Architecture::Gemma4),
    ("gemma4_text", Architecture::Gemma4),
    ("ExaoneMoeForCausalLM", Architecture::ExaoneMoe),
    ("KimiK25ForConditionalGeneration", Architecture::DeepseekV3),
    ("kimi_k25", Architecture::DeepseekV3),
    ("Glm4vMoeForConditionalGeneration", Architecture::Glm4Moe),
    ("glm4v_moe", Architecture::Glm4Moe),
    ("kimi_k2", Architecture::DeepseekV3),
    ("hunyuan", Architecture::HunyuanV1Moe),
    ("Qwen3_5MoeForCausalLM", Architecture::Qwen35Moe),
    ("qwen3_5_moe_text", Architecture::Qwen35Moe),
];

/// Architectures that people ask for, and what they have that is missing here.
const UNSUPPORTED: [(&str, &str); 11] = [
    ("DeepseekV32ForCausalLM", INDEXER),
    ("GlmMoeDsaForCausalLM", INDEXER),
    ("DeepseekV4ForCausalLM", "its attention looks at compressed tokens, and its residual stream is several"),
    ("KimiLinearForCausalLM", DELTA),
    ("BailingMoeV2_5ForCausalLM", LINEAR),
    ("MiniMaxText01ForCausalLM", LINEAR),
    ("MiniMaxM1ForCausalLM", LINEAR),
    ("JambaForCausalLM", STATE_SPACE),
    ("Lfm2MoeForCausalLM", "most of its layers are convolutions"),
    ("BailingMoeForCausalLM", "it is of before Ling 2.0, whose router and attention are others"),
    ("Qwen3VLMoeForConditionalGeneration", NESTED),
];
const INDEXER: &str = "its attention looks at tokens that an indexer chooses";
const DELTA: &str = "most of its layers have a delta net whose decays are one for each channel";
const LINEAR: &str = "most of its layers have linear attention";
const STATE_SPACE: &str = "most of its layers are state spaces whose decays are one for each channel";
const NESTED: &str = "its language model is nested in one that sees images, and reads it between its layers";

/// What would change results if it were passed over.
fn refuse_unsupported(architecture: Architecture, keys: &Keys) -> Checked<()> {
    use Architecture::{
        Dots1, ExaoneMoe, Gemma4, GptOss, GraniteMoeHybrid, Llama4, NemotronH, Qwen2Moe, Qwen3Moe, Qwen3Next,
        Qwen35Moe,
    };
    keys.only("hidden_act", &ACTIVATIONS)?;
    let windows = matches!(architecture, Qwen2Moe | Qwen3Moe);
    for key in ["use_sliding_window", "mlp_bias"] {
        if keys.flag(key)?.unwrap_or(false) && !(windows && key == "use_sliding_window") {
            return wrong(format!("`{key}` is true, which is not supported"));
        }
    }
    let slides = keys.flag("use_sliding_window")?.unwrap_or(false);
    if matches!(
        architecture,
        Dots1 | ExaoneMoe | Gemma4 | GptOss | GraniteMoeHybrid | Llama4 | NemotronH | Qwen3Next | Qwen35Moe
    ) || (architecture == Qwen2Moe && slides)
    {
        return Ok(());
    }
    let other = keys.list("layer_types")?.iter().find(|kind| kind.as_str() != Some("full_attention"));
    other.map_or(Ok(()), |kind| {
        let kind = shown(kind);
        wrong(format!("`layer_types` has {kind}; only \"full_attention\" in every layer is supported"))
    })
}
