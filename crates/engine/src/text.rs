//! Tokens to and from text.

use crate::EngineError;
use std::path::Path;
use tokenizers::Tokenizer;

/// The largest tokenizer.json that is read, in bytes; published ones have up to about 20 MB.
const LIMIT: u64 = 256 << 20;

/// A checkpoint's tokenizer.
pub struct Text(Tokenizer);

impl Text {
    /// Reads `tokenizer.json` of a checkpoint folder; nothing if there is none.
    pub fn open(folder: &Path) -> Result<Option<Self>, EngineError> {
        let file = folder.join("tokenizer.json");
        let refuse = |problem: String| EngineError::Text(format!("{}: {problem}", file.display()));
        let size = match std::fs::metadata(&file) {
            Ok(metadata) => metadata.len(),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(refuse(error.to_string())),
        };
        if size > LIMIT {
            return Err(refuse(format!("{size} bytes are more than the {LIMIT} that a tokenizer may have")));
        }
        let tokenizer = Tokenizer::from_file(&file).map_err(|error| {
            refuse(format!("cannot be read as a tokenizer ({error}): fetch the file again"))
        })?;
        Ok(Some(Text(tokenizer)))
    }

    /// The text of token ids, special tokens left out.
    pub fn decode(&self, ids: &[u32]) -> Result<String, EngineError> {
        self.0.decode(ids, true).map_err(|error| EngineError::Text(format!("cannot decode tokens: {error}")))
    }
}
