//! Tokens to and from text.

use crate::token_bytes::Spelling;
use crate::{TextError, files};
use epsmoe_base::panic_text;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::Arc;

const FILE: &str = "tokenizer.json";

/// The largest tokenizer.json that is read, in bytes; published ones have up to about 20 MB.
const LIMIT: u64 = 256 << 20;

/// A checkpoint's tokenizer. Clones share it.
#[derive(Clone)]
pub struct Tokenizer(Arc<tokenizers::Tokenizer>);

impl Tokenizer {
    /// Reads `tokenizer.json` of a checkpoint folder; nothing if there is none.
    pub fn open(folder: &Path) -> Result<Option<Self>, TextError> {
        let path = folder.join(FILE);
        files::read(&path, LIMIT)?.map(|bytes| Tokenizer::parse(&bytes, &path)).transpose()
    }

    /// Reads the text of the tokenizer.json at `path`.
    pub fn parse(text: &[u8], path: &Path) -> Result<Self, TextError> {
        let tokenizer = guarded(|| tokenizers::Tokenizer::from_bytes(text)).map_err(|problem| {
            TextError::file(path, format!("cannot be read as a tokenizer ({problem}): fetch the file again"))
        })?;
        Ok(Tokenizer(Arc::new(tokenizer)))
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
        let encoding = guarded(|| self.0.encode_fast(text, special)).map_err(|problem| {
            TextError::Tokenizer(format!("cannot turn the text into tokens: {problem}"))
        })?;
        Ok(encoding.get_ids().to_vec())
    }

    /// The text of token ids, with or without special tokens.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> Result<String, TextError> {
        guarded(|| self.0.decode(ids, skip_special))
            .map_err(|problem| TextError::Tokenizer(format!("cannot turn tokens into text: {problem}")))
    }

    /// How the vocabulary writes a token, if it has it.
    pub fn token(&self, id: u32) -> Option<String> {
        self.0.id_to_token(id)
    }

    /// The bytes that a token stands for, if the vocabulary has it; of a special token, its name.
    pub fn token_bytes(&self, id: u32) -> Option<Vec<u8>> {
        if let Some(added) = self.0.get_added_tokens_decoder().get(&id) {
            return Some(added.content.clone().into_bytes());
        }
        let spelling = Spelling::of(self.0.get_decoder());
        self.0.id_to_token(id).map(|written| spelling.bytes(&written))
    }

    /// Whether a token is no text, but a sign between texts.
    pub fn is_special(&self, id: u32) -> bool {
        self.0.get_added_tokens_decoder().get(&id).is_some_and(|token| token.special)
    }

    /// How many tokens there are, added ones included.
    pub fn vocab_size(&self) -> usize {
        self.0.get_vocab_size(true)
    }
}

/// What the library says, its panics included: a strange tokenizer.json must not end the program.
fn guarded<T, E: ToString>(call: impl FnOnce() -> Result<T, E>) -> Result<T, String> {
    match catch_unwind(AssertUnwindSafe(call)) {
        Ok(result) => result.map_err(|error| error.to_string()),
        Err(panic) => Err(format!("the tokenizer panicked: {}", panic_text(panic.as_ref()))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
