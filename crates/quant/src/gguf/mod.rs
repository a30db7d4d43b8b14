//! GGUF files: a header of typed metadata and a table of tensors, then the tensors.
//!
//! The header says everything that other checkpoints keep in config.json and tokenizer.json: [`Gguf::config`] and
//! [`Gguf::tokenizer`] translate it.

mod config;
mod cursor;
mod metadata;
mod tensors;
mod tokenizer;

pub use metadata::{List, Metadata, Value};
pub use tensors::GgufTensor;
pub use tokenizer::{TokenKind, Tokenizer};

use crate::error::DAMAGED;
use crate::{HeaderError, QuantError};
use cursor::Cursor;
use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt;

/// Tensors begin at multiples of so many bytes unless the file says otherwise.
const ALIGNMENT: u64 = 32;

/// The header of a file.
#[derive(Clone, Debug, PartialEq)]
pub struct Gguf {
    /// What the file says about its model.
    pub metadata: Metadata,
    /// Its tensors by name.
    pub tensors: BTreeMap<String, GgufTensor>,
}

impl Gguf {
    /// The first bytes of every such file.
    pub const MAGIC: [u8; 4] = *b"GGUF";

    /// Reads the header of an open file of `length` bytes.
    pub fn of_file(file: &File, length: u64) -> Result<Gguf, HeaderError> {
        Gguf::read(length, |into, at| file.read_exact_at(into, at).map_err(HeaderError::Reading))
    }

    /// Reads the header of a file of `length` bytes. `read` fills its argument with the file's bytes from a position
    /// on.
    pub fn read<E: From<QuantError>>(
        length: u64,
        read: impl Fn(&mut [u8], u64) -> Result<(), E>,
    ) -> Result<Gguf, E> {
        let mut cursor = Cursor::new(length, read);
        if cursor.array::<4>("the magic number")? != Gguf::MAGIC {
            return Err(QuantError::new("this is not a GGUF file; fetch it again").into());
        }
        let version = cursor.u32("the version")?;
        if !(2..=3).contains(&version) {
            return Err(QuantError::new(format!(
                "its version is {version}, of which 2 and 3 are read (little-endian); convert the model again"
            ))
            .into());
        }
        let tensors = cursor.u64("the number of tensors")?;
        let keys = cursor.u64("the number of keys")?;
        let metadata = Metadata::read(&mut cursor, keys)?;
        let alignment = metadata.whole("general.alignment")?.unwrap_or(ALIGNMENT);
        if !alignment.is_power_of_two() || alignment > 1 << 20 {
            return Err(damaged(format!(
                "`general.alignment` is {alignment}, which is no power of two that fits"
            ))
            .into());
        }
        let tensors = tensors::read(&mut cursor, tensors, alignment)?;
        Ok(Gguf { metadata, tensors })
    }
}

fn damaged(problem: impl std::fmt::Display) -> QuantError {
    QuantError::new(format!("{problem}; {DAMAGED}"))
}
