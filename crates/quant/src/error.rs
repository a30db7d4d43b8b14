//! What can be wrong with a coded tensor or a GGUF file.

use epsmoe_base::text::{printable, shortened};

/// Why a tensor or a file could not be read: what is wrong and how to mend it, without the file's name.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct QuantError(String);

impl QuantError {
    /// An error of these words.
    pub fn new(problem: impl Into<String>) -> Self {
        QuantError(printable(&shortened(&problem.into(), 2000)).into_owned())
    }
}

/// Why the header of a file could not be read.
#[derive(Debug, thiserror::Error)]
pub enum HeaderError {
    /// The file gave no bytes.
    #[error(transparent)]
    Reading(std::io::Error),
    /// What it says is refused.
    #[error(transparent)]
    Refused(#[from] QuantError),
}

/// A name from a file, of bearable length.
pub(crate) fn shown(name: &str) -> String {
    shortened(name, 200).into()
}

/// What mends bytes that disagree with each other.
pub(crate) const DAMAGED: &str = "the file is damaged or incomplete: fetch it again";
