//! What is asked, and what is answered.

use crate::{EngineError, Sampling};
use std::time::Duration;

/// A prompt to be continued.
#[derive(Clone, Debug, Default)]
pub struct Request {
    /// Token ids of the prompt.
    pub prompt: Vec<u32>,
    /// Most new tokens.
    pub max_tokens: usize,
    /// Whether to go on after an end-of-text token.
    pub ignore_eos: bool,
    /// How tokens are chosen.
    pub sampling: Sampling,
    /// Whether the logits of every prompt token are wanted.
    pub prompt_logits: bool,
}

/// Why a completion ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Finish {
    /// The model ended the text.
    Stop,
    /// The most new tokens were made.
    Length,
}

/// A request's answer.
#[derive(Clone, Debug, Default)]
pub struct Completion {
    /// New token ids.
    pub ids: Vec<u32>,
    /// Why it ended; nothing while it runs.
    pub finish: Option<Finish>,
    /// Logits of the prompt's tokens, row by row `[prompt, V]`, if wanted.
    pub prompt_logits: Vec<f32>,
    /// From submission to the first new token.
    pub time_to_first_token: Duration,
    /// From submission to the end.
    pub total_time: Duration,
}

impl Request {
    /// Whether no logits are looked at but the largest ones.
    pub(crate) fn wants_only_tokens(&self) -> bool {
        self.sampling.is_greedy() && !self.prompt_logits
    }

    /// Refuses what cannot be run by a model of `vocab` tokens with contexts of `max_model_len`.
    pub fn check(&self, vocab: usize, max_model_len: usize) -> Result<(), EngineError> {
        let refuse = |message| Err(EngineError::Request(message));
        if self.prompt.is_empty() {
            return refuse("the prompt is empty: give at least one token".into());
        }
        if let Some((at, id)) = self.prompt.iter().enumerate().find(|&(_, &id)| id as usize >= vocab) {
            return refuse(format!("prompt token {at} is {id}, but the vocabulary ends at {}", vocab - 1));
        }
        let length = self.prompt.len().saturating_add(self.max_tokens);
        if length > max_model_len {
            return refuse(format!(
                "This model's maximum context length is {max_model_len} tokens. However, {length} were asked \
                 for: {} in the prompt and {} to generate. Shorten either, or raise --max-model-len if the \
                 model allows it",
                self.prompt.len(),
                self.max_tokens
            ));
        }
        self.sampling.check()
    }
}
