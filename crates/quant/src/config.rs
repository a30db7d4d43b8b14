//! What a config.json says about its weights: `quantization_config`.
//!
//! Which tensors are coded, and how, the tensors say themselves ([`crate::CodedTensor::detect`]); lists of modules are
//! not read. What is read here: which method it was, what shapes of tensors cannot tell ([`Hints`]), what is to be done
//! with activations, and whatever makes weights mean something else than these codings do, which is refused.

use crate::error::shown;
use crate::{Hints, QuantError};
use serde_json::{Map, Value};
use std::fmt;

/// How a checkpoint was quantised.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QuantConfig {
    /// The method's name.
    pub method: Method,
    /// For decoding.
    pub hints: Hints,
    /// What is multiplied with the weights.
    pub activations: Activations,
}

/// Methods by the names that checkpoints and command lines use.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[expect(missing_docs, reason = "the methods' own names")]
pub enum Method {
    Fp8,
    CompressedTensors,
    Mxfp4,
    Awq,
    Gptq,
    ModelOpt,
    Quark,
    Gguf,
}

impl Method {
    /// All methods.
    pub const ALL: [Method; 8] = [
        Method::Fp8,
        Method::CompressedTensors,
        Method::Mxfp4,
        Method::Awq,
        Method::Gptq,
        Method::ModelOpt,
        Method::Quark,
        Method::Gguf,
    ];

    /// The method of this name, or of one that others give it.
    pub fn named(name: &str) -> Option<Method> {
        let own = Method::ALL.into_iter().find(|method| method.to_string() == name);
        own.or_else(|| SYNONYMS.iter().find(|(synonym, _)| *synonym == name).map(|(_, method)| *method))
    }
}

/// Names that tell how a method is computed where kernels are chosen by hand.
const SYNONYMS: [(&str, Method); 11] = [
    ("fbgemm_fp8", Method::Fp8),
    ("deepseek_v4_fp8", Method::Fp8),
    ("gpt_oss_mxfp4", Method::Mxfp4),
    ("auto_awq", Method::Awq),
    ("awq_marlin", Method::Awq),
    ("auto_gptq", Method::Gptq),
    ("gptq_marlin", Method::Gptq),
    ("modelopt_fp4", Method::ModelOpt),
    ("modelopt_mxfp8", Method::ModelOpt),
    ("modelopt_mixed", Method::ModelOpt),
    ("compressed_tensors", Method::CompressedTensors),
];

impl fmt::Display for Method {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Method::Fp8 => "fp8",
            Method::CompressedTensors => "compressed-tensors",
            Method::Mxfp4 => "mxfp4",
            Method::Awq => "awq",
            Method::Gptq => "gptq",
            Method::ModelOpt => "modelopt",
            Method::Quark => "quark",
            Method::Gguf => "gguf",
        })
    }
}

/// What is done with activations before they are multiplied with weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activations {
    /// They stay as they are.
    Plain,
    /// Each row is quantised, with scales of its own; they are powers of two if `powers` says so.
    Dynamic {
        /// See above.
        powers: bool,
    },
    /// They are quantised with a scale that is stored.
    Static,
}

impl QuantConfig {
    /// Reads the section. Its keys have the names of the `transformers` library.
    pub fn parse(section: &Value) -> Result<QuantConfig, QuantError> {
        let Value::Object(map) = section else {
            return Err(QuantError::new("it is not a JSON object; fetch the file again"));
        };
        let section = Section(map);
        match section.word("quant_method")?.unwrap_or("missing") {
            "fp8" | "fbgemm_fp8" => section.fp8(),
            "compressed-tensors" => section.compressed_tensors(),
            "mxfp4" => Ok(weight_only(Method::Mxfp4, Hints::default())),
            "awq" => section.awq(),
            "gptq" => section.gptq(),
            "modelopt" => section.modelopt(),
            "quark" => Ok(weight_only(Method::Quark, Hints::default())),
            other => {
                let methods: Vec<String> = Method::ALL.iter().map(Method::to_string).collect();
                Err(QuantError::new(format!(
                    "its `quant_method` is {}, which is not read; use a version of the model made with one of {}, or \
                     an unquantised one",
                    shown(other),
                    methods.join(", ")
                )))
            }
        }
    }
}

fn weight_only(method: Method, hints: Hints) -> QuantConfig {
    QuantConfig { method, hints, activations: Activations::Plain }
}

/// A JSON object; null counts as absent.
#[derive(Clone, Copy)]
struct Section<'a>(&'a Map<String, Value>);

/// A block for a whole row or column.
const WHOLE: usize = usize::MAX;

impl<'a> Section<'a> {
    fn get(self, key: &str) -> Option<&'a Value> {
        self.0.get(key).filter(|value| !value.is_null())
    }

    fn read<T>(
        self,
        key: &str,
        what: &str,
        convert: impl FnOnce(&'a Value) -> Option<T>,
    ) -> Result<Option<T>, QuantError> {
        let Some(value) = self.get(key) else { return Ok(None) };
        convert(value)
            .map(Some)
            .ok_or_else(|| refused(key, value, &format!("must be {what}; fetch the file again")))
    }

    fn word(self, key: &str) -> Result<Option<&'a str>, QuantError> {
        self.read(key, "a string", Value::as_str)
    }

    fn flag(self, key: &str) -> Result<Option<bool>, QuantError> {
        self.read(key, "true or false", Value::as_bool)
    }

    fn section(self, key: &str) -> Result<Option<Section<'a>>, QuantError> {
        self.read(key, "a JSON object", |value| value.as_object().map(Section))
    }

    /// Refuses any other number of bits.
    fn bits(self, key: &str, read: &[u64]) -> Result<(), QuantError> {
        let Some(value) = self.get(key) else { return Ok(()) };
        if value.as_u64().is_some_and(|bits| read.contains(&bits)) {
            return Ok(());
        }
        let read: Vec<String> = read.iter().map(u64::to_string).collect();
        Err(refused(
            key,
            value,
            &format!("of which {} are read; use another version of the model", read.join(" and ")),
        ))
    }

    /// Refuses any other word.
    fn only(self, key: &str, read: &[&str]) -> Result<(), QuantError> {
        let Some(value) = self.get(key) else { return Ok(()) };
        if value.as_str().is_some_and(|word| read.contains(&word)) {
            return Ok(());
        }
        Err(refused(
            key,
            value,
            &format!("of which {} is read; use another version of the model", read.join(" or ")),
        ))
    }

    /// Columns of a group; −1 says all.
    fn group(self, key: &str) -> Result<Option<usize>, QuantError> {
        self.read(key, "a number of columns, or -1", |value| match value.as_i64()? {
            -1 => Some(WHOLE),
            group => usize::try_from(group).ok().filter(|group| (1..=1 << 20).contains(group)),
        })
    }

    /// Rows and columns of a block.
    fn block(self, key: &str) -> Result<Option<[usize; 2]>, QuantError> {
        self.read(key, "a number of rows and one of columns", |value| {
            let length = |value: &Value| {
                value
                    .as_u64()
                    .and_then(|length| usize::try_from(length).ok())
                    .filter(|n| (1..=1 << 20).contains(n))
            };
            match value.as_array()?.as_slice() {
                [rows, columns] => Some([length(rows)?, length(columns)?]),
                _ => None,
            }
        })
    }

    fn fp8(self) -> Result<QuantConfig, QuantError> {
        self.only("fmt", &["e4m3", "float8_e4m3fn"])?;
        self.only("scale_fmt", &["ue8m0", "float"])?;
        let powers = self.word("scale_fmt")? == Some("ue8m0");
        let activations = match self.word("activation_scheme")? {
            Some("static") => Activations::Static,
            _ => Activations::Dynamic { powers },
        };
        let hints = Hints { block: self.block("weight_block_size")?, ..Hints::default() };
        Ok(QuantConfig { method: Method::Fp8, hints, activations })
    }

    fn compressed_tensors(self) -> Result<QuantConfig, QuantError> {
        const FORMATS: [&str; 9] = [
            "dense",
            "float-quantized",
            "naive-quantized",
            "int-quantized",
            "pack-quantized",
            "mxfp4-pack-quantized",
            "nvfp4-pack-quantized",
            "mxfp8-quantized",
            "mixed-precision",
        ];
        self.only("format", &FORMATS)?;
        if let Some(sparsity) = self.section("sparsity_config")? {
            sparsity.only("format", &["dense"])?;
        }
        if let Some(rotations) = self.section("transform_config")?.filter(|section| !section.0.is_empty()) {
            let value = Value::Object(rotations.0.clone());
            return Err(refused(
                "transform_config",
                &value,
                "which is not read; use a version of the model without",
            ));
        }
        let mut config = weight_only(Method::CompressedTensors, Hints::default());
        let groups: Vec<&Value> =
            self.section("config_groups")?.map_or_else(Vec::new, |section| section.0.values().collect());
        for group in &groups {
            let Value::Object(group) = group else { continue };
            let group = Section(group);
            group.only("format", &FORMATS)?;
            if let Some(weights) = group.section("weights")? {
                weights.bits("num_bits", &[4, 8])?;
                config.hints = weights.strategy()?;
            }
            if let Some(inputs) = group.section("input_activations")? {
                let fixed = inputs.get("dynamic") == Some(&Value::Bool(false));
                config.activations =
                    if fixed { Activations::Static } else { Activations::Dynamic { powers: false } };
            }
        }
        // Several groups may differ, and only tensors tell which is whose.
        if groups.len() > 1 {
            config.hints = Hints::default();
        }
        Ok(config)
    }

    /// How weights of `compressed-tensors` share scales.
    fn strategy(self) -> Result<Hints, QuantError> {
        let group = self.group("group_size")?;
        let (rows, columns) = match self.word("strategy")? {
            Some("tensor") => (WHOLE, Some(WHOLE)),
            Some("channel") => (1, Some(WHOLE)),
            Some("group" | "tensor_group") => (1, group),
            Some("block") => {
                return Ok(Hints { block: self.block("block_structure")?, ..Hints::default() });
            }
            _ => return Ok(Hints::default()),
        };
        Ok(Hints { block: columns.map(|columns| [rows, columns]), group: columns, ..Hints::default() })
    }

    fn awq(self) -> Result<QuantConfig, QuantError> {
        self.bits("bits", &[4])?;
        self.bits("w_bit", &[4])?;
        self.only("version", &["gemm", "GEMM"])?;
        if self.flag("zero_point")? == Some(false) {
            let value = Value::Bool(false);
            return Err(refused("zero_point", &value, "which is not read; use another version of the model"));
        }
        let group = self.group("group_size")?.or(self.group("q_group_size")?);
        Ok(weight_only(Method::Awq, Hints { group, ..Hints::default() }))
    }

    /// Which group a column is in where they have an order of their own (`desc_act`) the tensors tell.
    fn gptq(self) -> Result<QuantConfig, QuantError> {
        self.bits("bits", &[4])?;
        self.only("checkpoint_format", &["gptq", "gptq_v2"])?;
        self.only("pack_dtype", &["int32"])?;
        let gptq_v2 = self.word("checkpoint_format")? == Some("gptq_v2");
        let several = self.section("dynamic")?.is_some_and(|section| !section.0.is_empty());
        let group = if several { None } else { self.group("group_size")? };
        let act_order = self.flag("desc_act")?.unwrap_or(false);
        Ok(weight_only(Method::Gptq, Hints { group, gptq_v2, act_order, block: None }))
    }

    fn modelopt(self) -> Result<QuantConfig, QuantError> {
        self.only(
            "quant_algo",
            &["FP8", "NVFP4", "MXFP8", "MXFP4", "FP8_PB_WO", "FP8_PER_CHANNEL_PER_TOKEN"],
        )?;
        let activations = match self.word("quant_algo")? {
            Some("FP8" | "NVFP4") => Activations::Static,
            Some("MXFP8" | "FP8_PER_CHANNEL_PER_TOKEN") => Activations::Dynamic { powers: false },
            _ => Activations::Plain,
        };
        Ok(QuantConfig { method: Method::ModelOpt, hints: Hints::default(), activations })
    }
}

fn refused(key: &str, value: &Value, problem: &str) -> QuantError {
    const LONGEST: usize = 60;
    let mut text = value.to_string();
    if text.chars().count() > LONGEST {
        text = text.chars().take(LONGEST).chain("…".chars()).collect();
    }
    QuantError::new(format!("its `{key}` is {text}, {problem}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn parsed(section: Value) -> QuantConfig {
        QuantConfig::parse(&section).expect("a section that is read")
    }

    #[test]
    fn published_sections_are_read() {
        let deepseek = json!({
            "activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128],
            "scale_fmt": "ue8m0",
        });
        let hints = Hints { block: Some([128, 128]), ..Hints::default() };
        let activations = Activations::Dynamic { powers: true };
        assert_eq!(parsed(deepseek), QuantConfig { method: Method::Fp8, hints, activations });
        let fixed = json!({"quant_method": "fp8", "activation_scheme": "static", "weight_block_size": null});
        assert_eq!(parsed(fixed).activations, Activations::Static);
        let kimi = json!({
            "quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed",
            "config_groups": {"group_0": {
                "targets": ["Linear"], "input_activations": null, "output_activations": null,
                "weights": {
                    "num_bits": 4, "type": "int", "symmetric": true, "strategy": "group", "group_size": 32,
                    "dynamic": false, "actorder": null,
                },
            }},
            "ignore": ["lm_head", "re:.*self_attn.*"], "kv_cache_scheme": null,
        });
        let hints = Hints { block: Some([1, 32]), group: Some(32), ..Hints::default() };
        assert_eq!(parsed(kimi), weight_only(Method::CompressedTensors, hints));
        let glm = json!({
            "quant_method": "compressed-tensors", "format": "float-quantized",
            "config_groups": {"group_0": {
                "input_activations": {"num_bits": 8, "strategy": "token", "dynamic": true},
                "weights": {"num_bits": 8, "type": "float", "strategy": "channel"},
            }},
        });
        let hints = Hints { block: Some([1, WHOLE]), group: Some(WHOLE), ..Hints::default() };
        let activations = Activations::Dynamic { powers: false };
        assert_eq!(parsed(glm), QuantConfig { method: Method::CompressedTensors, hints, activations });
        let awq = json!({"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm", "zero_point": true});
        assert_eq!(parsed(awq), weight_only(Method::Awq, Hints { group: Some(128), ..Hints::default() }));
        let gptq = json!({
            "quant_method": "gptq", "bits": 4, "group_size": -1, "desc_act": true, "sym": true,
            "checkpoint_format": "gptq_v2",
        });
        let hints = Hints { group: Some(WHOLE), gptq_v2: true, act_order: true, block: None };
        assert_eq!(parsed(gptq), weight_only(Method::Gptq, hints));
        let oss = json!({"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]});
        assert_eq!(parsed(oss), weight_only(Method::Mxfp4, Hints::default()));
    }

    #[test]
    fn what_means_something_else_is_refused() {
        let refusals = [
            (json!("fp8"), "it is not a JSON object"),
            (
                json!({"quant_method": "bitsandbytes"}),
                "its `quant_method` is bitsandbytes, which is not read",
            ),
            (json!({}), "its `quant_method` is missing"),
            (json!({"quant_method": "awq", "bits": 3}), "its `bits` is 3, of which 4 are read"),
            (
                json!({"quant_method": "awq", "version": "gemv"}),
                "its `version` is \"gemv\", of which gemm or GEMM",
            ),
            (
                json!({"quant_method": "gptq", "group_size": 0}),
                "its `group_size` is 0, must be a number of columns",
            ),
            (
                json!({"quant_method": "gptq", "checkpoint_format": "marlin"}),
                "its `checkpoint_format` is \"marlin\"",
            ),
            (
                json!({"quant_method": "fp8", "weight_block_size": [0, 128]}),
                "its `weight_block_size` is [0,128]",
            ),
            (json!({"quant_method": "fp8", "fmt": "e5m2"}), "its `fmt` is \"e5m2\""),
            (
                json!({"quant_method": "compressed-tensors", "format": "marlin-24"}),
                "its `format` is \"marlin-24\"",
            ),
            (
                json!({"quant_method": "compressed-tensors", "transform_config": {"R1": 1}}),
                "its `transform_config` is {\"R1\":1}, which is not read",
            ),
        ];
        for (section, problem) in refusals {
            let message = QuantConfig::parse(&section).expect_err("a section that is refused").to_string();
            assert!(message.starts_with(problem), "{message}");
        }
    }

    #[test]
    fn methods_have_names() {
        for method in Method::ALL {
            assert_eq!(Method::named(&method.to_string()), Some(method));
        }
        assert_eq!(Method::named("gptq_marlin"), Some(Method::Gptq));
        assert_eq!(Method::named("none"), None);
    }
}
