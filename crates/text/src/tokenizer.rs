//! Tokens to and from text.

use crate::bounds::{self, Growth};
use crate::gguf::GgufText;
use crate::token_bytes::{Decoding, Spelling};
use crate::{SpecialTokens, TextError, files};
use epsmoe_quant::gguf::Gguf;
use serde_json::Map;
use std::collections::{HashMap, HashSet};
use std::path::Path;
use std::sync::Arc;
use tokenizers::{AddedToken, ModelWrapper};

const FILE: &str = "tokenizer.json";

/// The largest tokenizer.json that is read, in bytes; published ones have up to about 20 MB.
const LIMIT: u64 = 256 << 20;

/// A checkpoint's tokenizer. Clones share it.
#[derive(Clone)]
pub struct Tokenizer(Arc<Inner>);

struct Inner {
    tokenizer: tokenizers::Tokenizer,
    eos: Option<u32>,
    special: HashSet<u32>,
    spelling: Spelling,
    decoding: Decoding,
    /// On the way to tokens.
    growth: Growth,
    /// Whether decoding may take long: it tries regular expressions.
    decodes_by_regex: bool,
}

impl Tokenizer {
    /// Reads `tokenizer.json` of a checkpoint folder, with the special tokens of its other files, or the header of a GGUF
    /// file; nothing if there is none.
    pub fn open(folder: &Path) -> Result<Option<Self>, TextError> {
        if GgufText::is_at(folder) {
            return Tokenizer::of_gguf(&GgufText::header(folder)?, folder);
        }
        let path = folder.join(FILE);
        let Some(text) = files::read(&path, LIMIT)? else { return Ok(None) };
        Tokenizer::parse(&text, &path, &SpecialTokens::open(folder)?).map(Some)
    }

    /// Builds what the header of the GGUF file at `path` describes; nothing if it has no vocabulary.
    pub fn of_gguf(header: &Gguf, path: &Path) -> Result<Option<Self>, TextError> {
        let text = GgufText::of(header).map_err(|error| TextError::file(path, error.to_string()))?;
        let special = SpecialTokens::of(&text.config, &Map::new());
        text.tokenizer.map(|it| Tokenizer::parse(&it, path, &special)).transpose()
    }

    /// Reads the text of the tokenizer.json at `path`.
    pub fn parse(text: &[u8], path: &Path, special: &SpecialTokens) -> Result<Self, TextError> {
        let unreadable = |problem: String| {
            TextError::file(path, format!("cannot be read as a tokenizer ({problem}): fetch the file again"))
        };
        let growth = bounds::growth(text)
            .map_err(|problem| TextError::file(path, format!("{problem}; do not trust this model")))?;
        let (bytes, special) = (text.to_vec(), special.clone());
        let names = special.clone();
        let tokenizer =
            bounds::within(bounds::time_for(text.len()), move || -> Result<_, tokenizers::Error> {
                let mut tokenizer = tokenizers::Tokenizer::from_bytes(bytes)?;
                // What belongs to training: it would cut prompts, fill them up, or make their tokens random.
                tokenizer.with_truncation(None)?.with_padding(None);
                if let ModelWrapper::BPE(model) = tokenizer.get_model()
                    && model.dropout.is_some()
                {
                    let mut model = model.clone();
                    model.dropout = None;
                    tokenizer.with_model(model);
                }
                add_tokens(&mut tokenizer, &special)?;
                // A template around texts that names what is not there is only noticed when it is used.
                tokenizer.encode_fast("", true)?;
                Ok(tokenizer)
            });
        let tokenizer = tokenizer.map_err(unreadable)?;
        let eos = names.get("eos_token").and_then(|eos| tokenizer.token_to_id(eos));
        let added = tokenizer.get_added_tokens_decoder();
        let special = added.iter().filter(|(_, token)| token.special).map(|(&id, _)| id).collect();
        let (spelling, decoding) =
            (Spelling::of(tokenizer.get_decoder()), Decoding::of(tokenizer.get_decoder()));
        let decoder = serde_json::to_string(&tokenizer.get_decoder()).unwrap_or_default();
        let decodes_by_regex = decoder.contains("\"Regex\"");
        let inner = Inner { tokenizer, eos, special, spelling, decoding, growth, decodes_by_regex };
        Ok(Tokenizer(Arc::new(inner)))
    }

    /// Token ids of a text, where special tokens are found by their names.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, TextError> {
        self.encode_with(text, false)
    }

    /// The same, with the special tokens that the model wants around every text.
    pub fn encode_special(&self, text: &str) -> Result<Vec<u32>, TextError> {
        self.encode_with(text, true)
    }

    fn encode_with(&self, text: &str, special: bool) -> Result<Vec<u32>, TextError> {
        let (inner, owned) = (Arc::clone(&self.0), text.to_owned());
        let encode = move || inner.tokenizer.encode_fast(owned, special).map(|it| it.get_ids().to_vec());
        let ids =
            self.0.growth.allows(text).and_then(|()| bounds::within(bounds::time_for(text.len()), encode));
        ids.map_err(|problem| TextError::Tokenizer(format!("cannot turn the text into tokens: {problem}")))
    }

    /// The text of token ids, with or without special tokens.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> Result<String, TextError> {
        let text = if self.0.decodes_by_regex {
            let (inner, owned) = (Arc::clone(&self.0), ids.to_vec());
            let decode = move || inner.tokenizer.decode(&owned, skip_special);
            bounds::within(bounds::time_for(ids.len()), decode)
        } else {
            bounds::guarded(|| self.0.tokenizer.decode(ids, skip_special))
        };
        text.map_err(|problem| TextError::Tokenizer(format!("cannot turn tokens into text: {problem}")))
    }

    /// How the vocabulary writes a token, if it has it.
    pub fn token(&self, id: u32) -> Option<String> {
        self.0.tokenizer.id_to_token(id)
    }

    /// The token that ends a text, as `eos_token` of the checkpoint's files names it.
    pub fn eos(&self) -> Option<u32> {
        self.0.eos
    }

    /// The bytes that a token stands for, if the vocabulary has it; of an added token, its name.
    pub fn token_bytes(&self, id: u32) -> Option<Vec<u8>> {
        let added = self.0.tokenizer.get_added_vocabulary().simple_id_to_token(id);
        added.map(String::into_bytes).or_else(|| Some(self.0.spelling.bytes(&self.token(id)?)))
    }

    /// Whether a token is no text, but a sign between texts.
    pub fn is_special(&self, id: u32) -> bool {
        self.0.special.contains(&id)
    }

    pub(crate) fn spelling(&self) -> Spelling {
        self.0.spelling
    }

    pub(crate) fn decoding(&self) -> Decoding {
        self.0.decoding
    }

    /// How many tokens there are, added ones included.
    pub fn vocab_size(&self) -> usize {
        self.0.tokenizer.get_vocab_size(true)
    }
}

/// Adds the tokens that only the other files know, or know better.
fn add_tokens(
    tokenizer: &mut tokenizers::Tokenizer,
    special: &SpecialTokens,
) -> Result<(), tokenizers::Error> {
    let known = tokenizer.get_added_tokens_decoder();
    let known: HashMap<&str, &AddedToken> =
        known.values().map(|token| (token.content.as_str(), token)).collect();
    let missing: Vec<AddedToken> = special
        .added()
        .iter()
        .map(|token| {
            AddedToken::from(token.content.as_str(), token.special)
                .single_word(token.single_word)
                .lstrip(token.lstrip)
                .rstrip(token.rstrip)
                .normalized(token.normalized)
        })
        .zip(special.added())
        .filter(|(token, given)| match known.get(token.content.as_str()) {
            // A mere name changes nothing about a token that the tokenizer describes.
            Some(known) => given.described && !same(known, token),
            None => true,
        })
        .map(|(token, _)| token)
        .collect();
    tokenizer.add_tokens(missing)?;
    Ok(())
}

fn same(one: &AddedToken, other: &AddedToken) -> bool {
    let flags = |it: &AddedToken| (it.single_word, it.lstrip, it.rstrip, it.normalized, it.special);
    flags(one) == flags(other)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;
    use std::time::{Duration, Instant};

    #[test]
    fn text_goes_to_tokens_and_back() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/mixtral");
        let tokenizer = Tokenizer::open(&folder).unwrap().unwrap();
        for whole in ["Hello, world!", "naïve 日本語 🙂", ""] {
            let ids = tokenizer.encode_special(whole).unwrap();
            assert_eq!(tokenizer.decode(&ids, true).unwrap(), whole);
        }
        assert_eq!(tokenizer.encode("<s>").unwrap(), [0]);
        assert_eq!(tokenizer.token(0).as_deref(), Some("<s>"));
        assert_eq!(tokenizer.token_bytes(0).unwrap(), b"<s>");
        assert!(tokenizer.is_special(0) && !tokenizer.is_special(100));
        let bytes: Vec<u8> = tokenizer
            .encode("a 🙂")
            .unwrap()
            .iter()
            .flat_map(|&id| tokenizer.token_bytes(id).unwrap())
            .collect();
        assert_eq!(bytes, "a 🙂".as_bytes());
    }

    /// A fixture's folder with changed files.
    fn changed(
        change: impl FnOnce(&mut serde_json::Value),
        files: &[(&str, serde_json::Value)],
    ) -> Tokenizer {
        let fixture = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/mixtral");
        let mut tokenizer = serde_json::from_slice(&std::fs::read(fixture.join(FILE)).unwrap()).unwrap();
        change(&mut tokenizer);
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join(FILE), tokenizer.to_string()).unwrap();
        for (name, value) in files {
            std::fs::write(folder.path().join(name), value.to_string()).unwrap();
        }
        Tokenizer::open(folder.path()).unwrap().unwrap()
    }

    #[test]
    fn a_template_with_tokens_that_are_not_there_is_refused() {
        let fixture = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/mixtral");
        let mut tokenizer: serde_json::Value =
            serde_json::from_slice(&std::fs::read(fixture.join(FILE)).unwrap()).unwrap();
        let parse = |tokenizer: &serde_json::Value| {
            Tokenizer::parse(tokenizer.to_string().as_bytes(), Path::new(FILE), &SpecialTokens::default())
        };
        let sequence = json!({ "Sequence": { "id": "A", "type_id": 0 } });
        let single = [json!({ "SpecialToken": { "id": "<nowhere>", "type_id": 0 } }), sequence];
        tokenizer["post_processor"] = json!({
            "type": "TemplateProcessing", "single": single, "pair": single, "special_tokens": {},
        });
        let refused = parse(&tokenizer).err().expect("a refusal").to_string();
        assert!(refused.starts_with(FILE) && refused.contains("fetch the file again"), "{refused}");
    }

    #[test]
    fn options_of_training_are_off() {
        let plain = changed(|_| {}, &[]).encode_special("one two three four").unwrap();
        let trained = changed(
            |tokenizer| {
                tokenizer["truncation"] =
                    json!({ "direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0 });
                tokenizer["padding"] = json!({
                    "strategy": { "Fixed": 10_000_000_000_u64 }, "direction": "Right",
                    "pad_to_multiple_of": null, "pad_id": 0, "pad_type_id": 0, "pad_token": "<s>",
                });
                tokenizer["model"]["dropout"] = json!(0.9);
            },
            &[],
        );
        assert_eq!(trained.encode_special("one two three four").unwrap(), plain);
    }

    #[test]
    fn special_tokens_come_from_all_files() {
        let bare = |tokenizer: &mut serde_json::Value| tokenizer["added_tokens"] = json!([]);
        let config = ("tokenizer_config.json", json!({ "eos_token": "</s>" }));
        let map = ("special_tokens_map.json", json!({ "bos_token": { "content": "<s>" } }));
        let tokenizer = changed(bare, &[config, map]);
        assert_eq!(tokenizer.eos(), Some(1));
        assert_eq!(tokenizer.encode("<s></s>").unwrap(), [0, 1]);
        assert_eq!(tokenizer.decode(&[0, 43, 76, 1], true).unwrap(), "Hi");
        let decoder = json!({ "added_tokens_decoder": { "2": { "content": "<|user|>", "special": true } } });
        let plain =
            |tokenizer: &mut serde_json::Value| tokenizer["added_tokens"][2]["special"] = json!(false);
        assert_eq!(changed(plain, &[]).decode(&[2, 43, 76], true).unwrap(), "<|user|>Hi");
        let tokenizer = changed(plain, &[("tokenizer_config.json", decoder)]);
        assert_eq!(tokenizer.decode(&[2, 43, 76], true).unwrap(), "Hi");
        assert_eq!(tokenizer.eos(), None);
    }

    /// A pattern that tries every way to divide a word at every letter of it.
    #[test]
    fn slow_patterns_are_not_waited_for() {
        let tokenizer = changed(
            |tokenizer| {
                let pattern = r"a(?=((?:a|a)*)*(?!.))|a";
                tokenizer["pre_tokenizer"] = json!({ "type": "Split", "pattern": { "Regex": pattern },
                    "behavior": "Isolated", "invert": false });
                tokenizer["normalizer"] =
                    json!({ "type": "Replace", "pattern": { "String": "x" }, "content": "y" });
            },
            &[],
        );
        let begun = Instant::now();
        assert!(tokenizer.encode("a b").is_ok());
        let _ = tokenizer.encode(&"a".repeat(100_000));
        assert!(begun.elapsed() < Duration::from_secs(20), "{:?}", begun.elapsed());
    }

    #[test]
    fn what_no_tokenizer_needs_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let step = json!({ "type": "Replace", "pattern": { "String": "a" }, "content": "aa" });
        let bomb = json!({ "version": "1.0", "normalizer": { "type": "Sequence", "normalizers": vec![step; 60] },
            "model": { "type": "WordLevel", "vocab": { "a": 0 }, "unk_token": "a" } });
        std::fs::write(folder.path().join(FILE), bomb.to_string()).unwrap();
        let Err(error) = Tokenizer::open(folder.path()) else { panic!("it was read") };
        assert!(error.to_string().contains("times as long") && error.to_string().contains(FILE), "{error}");
    }

    #[test]
    fn damaged_tokenizers_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        assert!(Tokenizer::open(folder.path()).unwrap().is_none());
        for damaged in ["", "{", "[]", &"[".repeat(100_000), r#"{"version":"1.0","model":{"type":"BPE"}}"#] {
            std::fs::write(folder.path().join(FILE), damaged).unwrap();
            let Err(error) = Tokenizer::open(folder.path()) else { panic!("{damaged:.20} was read") };
            assert!(error.to_string().contains("cannot be read as a tokenizer"), "{error}");
        }
    }
}
