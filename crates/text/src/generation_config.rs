//! How the makers of a checkpoint want it to be sampled.

use crate::{TextError, files};
use serde::Deserialize;
use std::path::Path;

const FILE: &str = "generation_config.json";
const LIMIT: u64 = 1 << 20;

/// `generation_config.json`; what it leaves out is absent.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
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
    eos_token_id: Option<OneOrMany>,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(untagged)]
enum OneOrMany {
    One(u32),
    Many(Vec<u32>),
}

impl GenerationConfig {
    /// Reads the file of a checkpoint folder; everything is absent if there is none.
    pub fn open(folder: &Path) -> Result<Self, TextError> {
        let path = folder.join(FILE);
        let bytes = files::read(&path, LIMIT)?;
        bytes.map_or_else(|| Ok(GenerationConfig::default()), |bytes| GenerationConfig::parse(&bytes, &path))
    }

    /// Reads the text of the file at `path`.
    pub fn parse(text: &[u8], path: &Path) -> Result<Self, TextError> {
        serde_json::from_slice(text).map_err(|error| {
            let problem = "cannot be read; correct it, or remove it to do without";
            TextError::file(path, format!("{problem} ({error})"))
        })
    }

    /// Tokens that end a text.
    pub fn eos(&self) -> &[u32] {
        match &self.eos_token_id {
            None => &[],
            Some(OneOrMany::One(id)) => std::slice::from_ref(id),
            Some(OneOrMany::Many(ids)) => ids,
        }
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
        for damaged in ["", "[", r#"{"top_k": -1}"#, r#"{"eos_token_id": "x"}"#, &"[".repeat(100_000)] {
            assert!(read(damaged).unwrap_err().contains(FILE));
        }
    }
}
