//! Requests become tokens.
//!
//! Start at [`Engine::step`]: each step gives every rank a batch, runs them together, and turns the logits into
//! tokens. Around it: `request` (what is asked and answered), `pages` (who owns which cache block), `batch`
//! (what a rank computes next), `world` (the ranks and their threads), `sample` (a token from logits),
//! `text` (tokens to and from text), `chat` (conversations become prompts), `generation` (how a checkpoint wants
//! to be sampled), `files` (their small files).
//!
//! This room knows no wire format and no architecture.

mod chat;
mod engine;
mod executor;
mod files;
mod generation;
mod kv_blocks;
mod request;
mod sample;
mod scheduler;
mod text;

pub use chat::{ChatTemplate, Message};
pub use engine::{Engine, EngineOptions};
pub use executor::{Executor, StepReport};
pub use generation::GenerationConfig;
pub use request::{Completion, Finish, Request};
pub use sample::Sampling;
pub use text::{Text, TextStream};

use epsmoe_base::Fault;
pub use epsmoe_model::{Experts, Parallel, RoutingMode};
pub use epsmoe_pipeline::RoutingLog;

use epsmoe_model::ModelError;

/// Why a request was refused or a step failed.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// The request asks for something impossible.
    #[error("{0}")]
    Request(String),
    /// The tokenizer is missing, damaged, or cannot do what is asked.
    #[error("{0}")]
    Text(String),
    /// The model could not be loaded.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// The world stopped.
    #[error(transparent)]
    Fault(#[from] Fault),
}
