//! Small files of a checkpoint folder, which nobody has to trust.

use crate::TextError;
use std::fs::File;
use std::io::{ErrorKind, Read};
use std::path::Path;

/// A whole file of at most `limit` bytes; nothing if there is none.
pub(crate) fn read(path: &Path, limit: u64) -> Result<Option<Vec<u8>>, TextError> {
    let refuse = |problem: String| Err(TextError::file(path, problem));
    let metadata = match std::fs::metadata(path) {
        Ok(metadata) => metadata,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        Err(error) => return refuse(error.to_string()),
    };
    if !metadata.is_file() {
        return refuse("this is not a plain file; give a folder of plain files".into());
    }
    if metadata.len() > limit {
        return refuse(format!("{} bytes are more than such a file may have ({limit})", metadata.len()));
    }
    let mut bytes = Vec::new();
    match File::open(path).and_then(|file| file.take(limit).read_to_end(&mut bytes)) {
        Ok(_) => Ok(Some(bytes)),
        Err(error) => refuse(error.to_string()),
    }
}

/// The same as text.
pub(crate) fn read_text(path: &Path, limit: u64) -> Result<Option<String>, TextError> {
    let Some(bytes) = read(path, limit)? else { return Ok(None) };
    String::from_utf8(bytes)
        .map(Some)
        .map_err(|_| TextError::file(path, "this is not UTF-8 text; fetch the file again"))
}
