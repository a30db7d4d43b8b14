//! Small files of a checkpoint folder, which nobody has to trust.

use crate::TextError;
use epsmoe_base::{files, json};
use serde_json::{Map, Value};
use std::io::ErrorKind;
use std::path::Path;

/// A whole file of at most `limit` bytes; nothing if there is none.
pub(crate) fn read(path: &Path, limit: u64) -> Result<Option<Vec<u8>>, TextError> {
    match files::read_plain(path, limit) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(TextError::file(path, error.to_string())),
    }
}

/// The same as text.
pub(crate) fn read_text(path: &Path, limit: u64) -> Result<Option<String>, TextError> {
    let Some(bytes) = read(path, limit)? else { return Ok(None) };
    let text = String::from_utf8(bytes);
    text.map(Some).map_err(|_| TextError::file(path, "this is not UTF-8 text; fetch the file again"))
}

/// The same as a JSON object, as Python writes it.
pub(crate) fn read_json(path: &Path, limit: u64) -> Result<Option<Map<String, Value>>, TextError> {
    read(path, limit)?.map(|bytes| parse_json(&bytes, path)).transpose()
}

/// Reads the text of the JSON object at `path`.
pub(crate) fn parse_json(text: &[u8], path: &Path) -> Result<Map<String, Value>, TextError> {
    serde_json::from_slice(&json::from_python(text))
        .map_err(|error| TextError::file(path, format!("cannot be read ({error}); fetch the file again")))
}
