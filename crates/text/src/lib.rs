//! Text to tokens and back.
//!
//! Everything in a checkpoint's folder, or in the header of its GGUF file, that is about text: [`Tokenizer`] (`tokenizer.json`), [`DecodeStream`] (text as
//! tokens come, up to a stop string), [`ChatTemplate`] (conversations become prompts), and [`GenerationConfig`] (how the
//! makers of the checkpoint want it to be sampled).
//!
//! The files are somebody else's: whatever is in them, reading and using them ends, in bounded memory, with a result
//! or with an error that names the file. This room knows no model and no wire format.

mod bounds;
mod chat;
mod files;
mod generation_config;
mod gguf;
mod special_tokens;
mod stream;
mod token_bytes;
mod tokenizer;

pub use chat::{ChatTemplate, RenderRequest};
pub use generation_config::{GenerationConfig, SamplingDefaults};
pub use special_tokens::SpecialTokens;
pub use stream::DecodeStream;
pub use tokenizer::Tokenizer;

/// Why text could not be turned into tokens or back.
#[derive(Debug, thiserror::Error)]
pub enum TextError {
    /// A file is missing, damaged, or cannot do what is asked.
    #[error("{file}: {problem}")]
    File {
        /// Path of the file.
        file: String,
        /// What is wrong with it, and how to mend that.
        problem: String,
    },
    /// The chat template refuses a conversation.
    #[error("{file}: {reason}")]
    Refused {
        /// Path of the template.
        file: String,
        /// Why, in the template's words.
        reason: String,
    },
    /// The chat template fails.
    #[error("{file}: {problem}")]
    Template {
        /// Path of the template.
        file: String,
        /// How.
        problem: String,
    },
    /// The prompt of a conversation is longer than it may be.
    #[error(
        "the prompt of this conversation is longer than {limit} bytes, which is more than the context holds"
    )]
    TooLong {
        /// Most bytes that were asked for.
        limit: usize,
    },
    /// What is asked for cannot be done.
    #[error("{0}")]
    Request(String),
    /// The tokenizer failed on a text or on tokens.
    #[error("{0}")]
    Tokenizer(String),
}

impl TextError {
    fn file(path: &std::path::Path, problem: impl Into<String>) -> Self {
        TextError::File { file: path.display().to_string(), problem: problem.into() }
    }
}
