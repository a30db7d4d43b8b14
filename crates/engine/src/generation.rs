//! How the makers of a checkpoint want it to be sampled.

use crate::{EngineError, Sampling, files};
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
    /// See [`Sampling::temperature`].
    pub temperature: Option<f32>,
    /// See [`Sampling::top_k`].
    pub top_k: Option<usize>,
    /// See [`Sampling::top_p`].
    pub top_p: Option<f32>,
    /// See [`Sampling::min_p`].
    pub min_p: Option<f32>,
    /// See [`Sampling::repetition_penalty`].
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
    pub fn open(folder: &Path) -> Result<Self, EngineError> {
        let path = folder.join(FILE);
        let bytes = files::read(&path, LIMIT)?;
        bytes.map_or_else(|| Ok(GenerationConfig::default()), |bytes| GenerationConfig::parse(&bytes, &path))
    }

    /// Reads the text of the file at `path`.
    pub fn parse(text: &[u8], path: &Path) -> Result<Self, EngineError> {
        serde_json::from_slice(text).map_err(|error| {
            let problem = "cannot be read; correct it, or remove it to do without";
            EngineError::Text(format!("{}: {problem} ({error})", path.display()))
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

    /// Sampling as the file wants it.
    pub fn sampling(&self, seed: u64) -> Sampling {
        let greedy = Sampling { seed, ..Sampling::default() };
        let repetition_penalty = self.repetition_penalty.unwrap_or(greedy.repetition_penalty);
        if self.do_sample != Some(true) {
            return Sampling { repetition_penalty, ..greedy };
        }
        Sampling {
            temperature: self.temperature.unwrap_or(1.0),
            top_k: self.top_k.unwrap_or(greedy.top_k),
            top_p: self.top_p.unwrap_or(greedy.top_p),
            min_p: self.min_p.unwrap_or(greedy.min_p),
            repetition_penalty,
            ..greedy
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
        let wanted = Sampling { temperature: 0.6, top_k: 20, top_p: 0.95, seed: 3, ..Sampling::default() };
        assert_eq!(config.sampling(3), wanted);
    }

    #[test]
    fn without_do_sample_it_is_greedy() {
        let config = read(r#"{"temperature": 0.6, "repetition_penalty": 1.05, "eos_token_id": 1}"#).unwrap();
        assert_eq!(config.eos(), [1]);
        assert_eq!(config.sampling(0), Sampling { repetition_penalty: 1.05, ..Sampling::default() });
        assert_eq!(GenerationConfig::open(Path::new("/nowhere")).unwrap().sampling(0), Sampling::default());
    }

    #[test]
    fn damage_is_named() {
        for damaged in ["", "[", r#"{"top_k": -1}"#, r#"{"eos_token_id": "x"}"#, &"[".repeat(100_000)] {
            assert!(read(damaged).unwrap_err().contains(FILE));
        }
    }
}
