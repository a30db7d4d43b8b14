//! How the makers of a checkpoint want it to be sampled.

use crate::{TextError, files};
use epsmoe_base::text::shortened;
use serde_json::{Map, Value};
use std::path::Path;

const FILE: &str = "generation_config.json";
const LIMIT: u64 = 1 << 20;

/// `generation_config.json`; what it leaves out, or says in a way that nobody understands, is absent.
#[derive(Clone, Debug, Default)]
pub struct GenerationConfig {
    /// Whether tokens are drawn; the most likely one is taken otherwise.
    pub do_sample: Option<bool>,
    /// Divides the logits before the softmax; 0 takes the most likely token.
    pub temperature: Option<f32>,
    /// Only this many of the most likely tokens; 0 for all.
    pub top_k: Option<usize>,
    /// Only the most likely tokens that together have this probability; 1 for all.
    pub top_p: Option<f32>,
    /// Only tokens at least this likely, as a share of the most likely one's probability; 0 for all.
    pub min_p: Option<f32>,
    /// Logits of tokens that are there already are divided by this if positive, multiplied if negative.
    pub repetition_penalty: Option<f32>,
    /// Most new tokens.
    pub max_new_tokens: Option<usize>,
    /// What of the file is not used, and why: a sentence for each.
    pub remarks: Vec<String>,
    eos: Vec<u32>,
}

impl GenerationConfig {
    /// Reads the file of a checkpoint folder; everything is absent if there is none, and where the checkpoint is a GGUF
    /// file.
    pub fn open(folder: &Path) -> Result<Self, TextError> {
        if folder.is_file() {
            return Ok(GenerationConfig::default());
        }
        let path = folder.join(FILE);
        let bytes = files::read(&path, LIMIT)?;
        bytes.map_or_else(|| Ok(GenerationConfig::default()), |bytes| GenerationConfig::parse(&bytes, &path))
    }

    /// Reads the text of the file at `path`. Only a file that is no JSON object is refused.
    pub fn parse(text: &[u8], path: &Path) -> Result<Self, TextError> {
        let mut keys = Keys { path, keys: files::parse_json(text, path)?, remarks: Vec::new() };
        let share = |number: f64| (0.0..=1.0).contains(&number);
        Ok(GenerationConfig {
            do_sample: keys.get("do_sample", "true or false", Value::as_bool),
            temperature: keys.number("temperature", "a number of at least 0", |number| number >= 0.0),
            top_k: keys.get("top_k", "a whole number, or 0 or -1 for all", |value| match whole(value)? {
                -1 => Some(0),
                number => usize::try_from(number).ok(),
            }),
            top_p: keys.number("top_p", "above 0 and at most 1", |number| share(number) && number > 0.0),
            min_p: keys.number("min_p", "from 0 to 1", share),
            repetition_penalty: keys.number("repetition_penalty", "a number above 0", |number| number > 0.0),
            max_new_tokens: keys.get("max_new_tokens", "a whole number above 0", |value| {
                usize::try_from(whole(value)?).ok().filter(|&number| number > 0)
            }),
            eos: keys.eos(),
            remarks: keys.remarks,
        })
    }

    /// Tokens that end a text.
    pub fn eos(&self) -> &[u32] {
        &self.eos
    }

    /// Sampling as the file wants it; without `do_sample` the most likely token is taken.
    pub fn sampling(&self) -> SamplingDefaults {
        let greedy = SamplingDefaults {
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: self.repetition_penalty.unwrap_or(1.0),
        };
        if self.do_sample != Some(true) {
            return greedy;
        }
        SamplingDefaults {
            temperature: self.temperature.unwrap_or(1.0),
            top_k: self.top_k.unwrap_or(greedy.top_k),
            top_p: self.top_p.unwrap_or(greedy.top_p),
            min_p: self.min_p.unwrap_or(greedy.min_p),
            ..greedy
        }
    }
}

/// The file's keys, and what was odd about them.
struct Keys<'a> {
    path: &'a Path,
    keys: Map<String, Value>,
    remarks: Vec<String>,
}

impl Keys<'_> {
    /// What a key says, or a remark that it does not say `wanted`. Null is as good as nothing.
    fn get<T>(&mut self, key: &str, wanted: &str, read: impl FnOnce(&Value) -> Option<T>) -> Option<T> {
        let value = self.keys.get(key).filter(|value| !value.is_null())?;
        let read = read(value);
        if read.is_none() {
            let (path, value) = (self.path.display(), value.to_string());
            let value = shortened(&value, 100);
            self.remarks.push(format!("{path}: `{key}` is {value}, which is not {wanted}: it is ignored"));
        }
        read
    }

    /// Every token that ends a text is wanted, whatever stands beside it.
    fn eos(&mut self) -> Vec<u32> {
        let all = |value: &Value| match value {
            Value::Array(all) => all.iter().map(token).collect(),
            one => token(one).map(|id| vec![id]),
        };
        let whole = self.get("eos_token_id", "a token, or a list of tokens", all);
        let list = self.keys.get("eos_token_id").and_then(Value::as_array);
        whole.unwrap_or_else(|| list.into_iter().flatten().filter_map(token).collect())
    }

    fn number(&mut self, key: &str, wanted: &str, fits: impl FnOnce(f64) -> bool) -> Option<f32> {
        let in_bounds = |number: &f64| (*number as f32).is_finite() && fits(*number);
        self.get(key, wanted, |value| value.as_f64().filter(in_bounds).map(|number| number as f32))
    }
}

/// A whole number, also written as `50.0`.
fn whole(value: &Value) -> Option<i64> {
    let whole = |number: &f64| number.fract() == 0.0 && number.abs() < 1e15;
    value.as_i64().or_else(|| value.as_f64().filter(whole).map(|number| number as i64))
}

fn token(value: &Value) -> Option<u32> {
    u32::try_from(whole(value)?).ok()
}

/// Sampling where nobody asks for anything else.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SamplingDefaults {
    /// Divides the logits before the softmax; 0 takes the most likely token.
    pub temperature: f32,
    /// Only this many of the most likely tokens; 0 for all.
    pub top_k: usize,
    /// Only the most likely tokens that together have this probability; 1 for all.
    pub top_p: f32,
    /// Only tokens at least this likely, as a share of the most likely one's probability; 0 for all.
    pub min_p: f32,
    /// Logits of tokens that are there already are divided by this if positive, multiplied if negative.
    pub repetition_penalty: f32,
}

#[cfg(test)]
mod tests {
    use super::*;

    const GREEDY: SamplingDefaults =
        SamplingDefaults { temperature: 0.0, top_k: 0, top_p: 1.0, min_p: 0.0, repetition_penalty: 1.0 };

    fn read(text: &str) -> Result<GenerationConfig, String> {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join(FILE), text).unwrap();
        GenerationConfig::open(folder.path()).map_err(|error| error.to_string())
    }

    #[test]
    fn what_is_asked_for_is_done() {
        let config = read(
            r#"{"do_sample": true, "temperature": 0.6, "top_k": 20, "top_p": 0.95, "eos_token_id": [7, 8],
                "min_p": null, "transformers_version": "5.17.0"}"#,
        )
        .unwrap();
        assert_eq!(config.eos(), [7, 8]);
        let wanted = SamplingDefaults { temperature: 0.6, top_k: 20, top_p: 0.95, ..GREEDY };
        assert_eq!(config.sampling(), wanted);
    }

    #[test]
    fn without_do_sample_it_is_greedy() {
        let config = read(r#"{"temperature": 0.6, "repetition_penalty": 1.05, "eos_token_id": 1}"#).unwrap();
        assert_eq!(config.eos(), [1]);
        assert_eq!(config.sampling(), SamplingDefaults { repetition_penalty: 1.05, ..GREEDY });
        assert_eq!(GenerationConfig::open(Path::new("/nowhere")).unwrap().sampling(), GREEDY);
    }

    #[test]
    fn damage_is_named() {
        for damaged in ["", "[", "[]", "null", &"[".repeat(100_000)] {
            assert!(read(damaged).unwrap_err().contains(FILE));
        }
    }

    #[test]
    fn oddities_are_passed_over_and_named() {
        let config = read(
            r#"{"do_sample": true, "top_k": -1, "top_p": "0.9", "temperature": NaN, "min_p": null,
                "repetition_penalty": 0, "max_new_tokens": 20.0, "eos_token_id": ["</s>"]}"#,
        )
        .unwrap();
        let wanted = SamplingDefaults { temperature: 1.0, ..GREEDY };
        assert_eq!(
            (config.sampling(), config.max_new_tokens, config.eos()),
            (wanted, Some(20), [].as_slice())
        );
        let odd = ["temperature", "top_p", "repetition_penalty", "eos_token_id"];
        assert_eq!(config.remarks.len(), odd.len(), "{:?}", config.remarks);
        for (remark, key) in config.remarks.iter().zip(odd) {
            assert!(remark.contains(&format!("{FILE}: `{key}` is ")), "{remark}");
        }
        for odd in [
            r#"{"top_k": -2}"#,
            r#"{"top_k": 1e300}"#,
            r#"{"top_k": 2.5}"#,
            r#"{"top_p": 0}"#,
            r#"{"top_p": 1.5}"#,
            r#"{"do_sample": "yes"}"#,
            r#"{"temperature": 1e39}"#,
            r#"{"eos_token_id": -1}"#,
            r#"{"max_new_tokens": 0}"#,
            r#"{"eos_token_id": {"a": 1}}"#,
        ] {
            assert_eq!(read(odd).unwrap().remarks.len(), 1, "{odd}");
        }
        assert_eq!(read(r#"{"eos_token_id": [7, "</s>", 8]}"#).unwrap().eos(), [7, 8]);
        let long = read(&format!("{{\"top_k\": \"{}\"}}", "x".repeat(100_000))).unwrap();
        assert!(long.remarks[0].len() < 400);
    }
}
