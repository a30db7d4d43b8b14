//! Requests become tokens.
//!
//! Start at [`Engine::step`]: each step gives every rank a batch, runs them together, and turns what comes back into
//! tokens. Around it: `request` (what is asked and answered), `scheduler` (what is computed next, and who gives way),
//! `kv_blocks` (who owns which block of the cache, and what lies in it), `states` (the same for what sequences carry along), `executor` (the ranks, as threads) and `workers` (as processes), `sampler` (a token from
//! logits), `figures` (what MoE layers did, for whoever wants to see). [`EngineService`] gives an engine a thread of its own, to which requests come at any time.
//!
//! This room knows no text, no wire format and no architecture.

mod engine;
mod executor;
mod figures;
mod kv_blocks;
mod request;
mod sampler;
mod scheduler;
mod service;
mod states;
#[cfg(test)]
mod tests;
mod workers;

pub use engine::{Engine, EngineOptions};
pub use executor::{Executor, StepReport, ThreadExecutor};
pub use figures::{LayerFigures, LayerTimes, MoeLayerFigures};
pub use request::{
    Completion, Constraint, Event, Failure, Finish, Request, RequestId, TokenLogprobs, TokenMask,
};
pub use sampler::Sampling;
pub use service::{EngineHandle, EngineService, EngineStats, Rejected, ServiceOptions};
pub use workers::{Workers, work};

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
    /// One of the request's numbers is impossible.
    #[error("{field} {problem}")]
    Parameter {
        /// Its name.
        field: &'static str,
        /// What is wrong with it.
        problem: String,
    },
    /// The request is longer than the model's context.
    #[error(
        "This model's maximum context length is {most} tokens. However, {} were asked for: {prompt} in the prompt \
         and {new} to generate. Shorten either, or raise --max-model-len if the model allows it",
        prompt.saturating_add(*new)
    )]
    ContextLength {
        /// Most tokens of a sequence.
        most: usize,
        /// Tokens of the prompt.
        prompt: usize,
        /// Most new tokens.
        new: usize,
    },
    /// The request is longer than what the cache holds.
    #[error(
        "the request needs {tokens} tokens of the KV cache, which holds {cache}: shorten the prompt or generate \
         fewer tokens, or give the cache more memory (--kv-cache-memory-bytes)"
    )]
    CacheTooSmall {
        /// Tokens of the prompt, and new ones.
        tokens: usize,
        /// Tokens that the cache of a group of ranks holds.
        cache: usize,
    },
    /// The model could not be loaded.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// The world stopped.
    #[error(transparent)]
    Fault(#[from] Fault),
}
