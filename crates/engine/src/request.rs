//! What is asked, and what is answered.

use crate::{EngineError, Sampling};
use epsmoe_base::Fault;
use std::fmt;
use std::time::Duration;

/// A prompt to be continued.
#[derive(Debug, Default)]
pub struct Request {
    /// Token ids of the prompt.
    pub prompt: Vec<u32>,
    /// Most new tokens.
    pub max_tokens: usize,
    /// New tokens before which neither an end-of-text token nor one of `stop_token_ids` may come.
    pub min_tokens: usize,
    /// Whether to go on after an end-of-text token.
    pub ignore_eos: bool,
    /// Further tokens that end the answer.
    pub stop_token_ids: Vec<u32>,
    /// How tokens are chosen.
    pub sampling: Sampling,
    /// Whether each new token comes with its log-probability, and with how many alternatives.
    pub logprobs: Option<usize>,
    /// Whether each token of the prompt does.
    pub prompt_logprobs: Option<usize>,
    /// Whether the logits of every prompt token are wanted.
    pub prompt_logits: bool,
    /// What the answer must look like.
    pub constraint: Option<Box<dyn Constraint>>,
    /// Requests share cached prompts only with those of the same salt.
    pub cache_salt: Option<u64>,
}

/// Number of a request: unique in an engine, ascending in order of submission.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RequestId(pub u64);

impl fmt::Display for RequestId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "request {}", self.0)
    }
}

/// Guided decoding: says before every new token which may come.
pub trait Constraint: Send {
    /// The tokens that may come next.
    fn mask(&mut self) -> Result<TokenMask, String>;
    /// Takes in the one that came.
    fn accept(&mut self, id: u32) -> Result<(), String>;
    /// Whether the answer is complete, so that nothing may follow.
    fn is_finished(&self) -> bool;
}

impl fmt::Debug for dyn Constraint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Constraint")
    }
}

/// A set of tokens: bit `id % 32` of word `id / 32` stands for token `id`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TokenMask(pub Vec<u32>);

impl TokenMask {
    /// Whether the token is in the set.
    pub fn allows(&self, id: u32) -> bool {
        self.0.get(id as usize / 32).is_some_and(|word| word >> (id % 32) & 1 == 1)
    }
}

/// How likely a token was, by the model's logits as they are: before penalties, masks and temperature.
#[derive(Clone, Debug, PartialEq)]
pub struct TokenLogprobs {
    /// Natural logarithm of its probability.
    pub logprob: f32,
    /// The most likely tokens in its place, in falling order.
    pub top: Vec<(u32, f32)>,
}

/// What the engine tells about a request, in order. The last one is `Finished` or `Failed`.
#[derive(Clone, Debug)]
pub enum Event {
    /// Logits of some of the prompt's tokens, row by row `[tokens, V]`; in order, only if wanted.
    PromptLogits(Vec<f32>),
    /// The prompt has been computed.
    Prompt {
        /// How many of its tokens were in the cache already.
        cached_tokens: usize,
        /// Time from submission to the first step that the request took part in.
        queued: Duration,
        /// Of each of its tokens, if wanted; the first one has none.
        logprobs: Option<Vec<Option<TokenLogprobs>>>,
    },
    /// A new token.
    Token {
        /// Its id.
        id: u32,
        /// How likely it was, if wanted.
        logprobs: Option<TokenLogprobs>,
    },
    /// The request has ended.
    Finished(Finish),
    /// The request has failed.
    Failed(Failure),
}

/// Why a completion ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Finish {
    /// The model ended the text, or the constraint did.
    Stop,
    /// The answer's last token is this one of [`Request::stop_token_ids`].
    StopToken(u32),
    /// The most new tokens were made.
    Length,
    /// Nobody wanted it any more.
    Abort,
}

/// Why a request failed after it was accepted.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Failure {
    /// The ranks stopped: every request fails.
    #[error(transparent)]
    Stopped(Fault),
    /// This request cannot go on.
    #[error("{0}")]
    Request(String),
}

/// A request's answer, as its events tell it.
#[derive(Clone, Debug, Default)]
pub struct Completion {
    /// New token ids.
    pub ids: Vec<u32>,
    /// How likely they were, if wanted.
    pub logprobs: Vec<TokenLogprobs>,
    /// Why it ended; nothing while it runs.
    pub finish: Option<Finish>,
    /// How many of the prompt's tokens were in the cache already.
    pub cached_tokens: usize,
    /// How likely the prompt's tokens were, if wanted.
    pub prompt_logprobs: Vec<Option<TokenLogprobs>>,
    /// Logits of the prompt's tokens, row by row `[prompt, V]`, if wanted.
    pub prompt_logits: Vec<f32>,
    /// From submission to the first new token.
    pub time_to_first_token: Duration,
    /// From submission to the end.
    pub total_time: Duration,
}

impl Completion {
    /// Takes in what happened to the request so long after its submission.
    pub fn hear(&mut self, event: Event, since: Duration) -> Result<(), EngineError> {
        match event {
            Event::PromptLogits(logits) => self.prompt_logits.extend(logits),
            Event::Prompt { cached_tokens, logprobs, .. } => {
                self.cached_tokens = cached_tokens;
                self.prompt_logprobs = logprobs.unwrap_or_default();
            }
            Event::Token { id, logprobs } => {
                if self.ids.is_empty() {
                    self.time_to_first_token = since;
                }
                self.ids.push(id);
                self.logprobs.extend(logprobs);
            }
            Event::Finished(finish) => self.finish = Some(finish),
            Event::Failed(Failure::Stopped(fault)) => return Err(EngineError::Fault(fault)),
            Event::Failed(Failure::Request(problem)) => return Err(EngineError::Request(problem)),
        }
        self.total_time = since;
        Ok(())
    }
}

impl Request {
    /// Refuses what cannot be run by a model of `vocab` tokens with contexts of `max_model_len`.
    pub fn check(&self, vocab: usize, max_model_len: usize) -> Result<(), EngineError> {
        let refuse = |field, problem| Err(EngineError::Parameter { field, problem });
        if self.prompt.is_empty() {
            return Err(EngineError::Request("the prompt is empty: give at least one token".into()));
        }
        if let Some((at, id)) = self.prompt.iter().enumerate().find(|&(_, &id)| id as usize >= vocab) {
            let problem = format!("prompt token {at} is {id}, but the vocabulary ends at {}", vocab - 1);
            return Err(EngineError::Request(problem));
        }
        if self.prompt.len().saturating_add(self.max_tokens) > max_model_len {
            let (prompt, new) = (self.prompt.len(), self.max_tokens);
            return Err(EngineError::ContextLength { most: max_model_len, prompt, new });
        }
        if self.min_tokens > self.max_tokens {
            let problem = format!("is {}, but max_tokens is {}", self.min_tokens, self.max_tokens);
            return refuse("min_tokens", problem);
        }
        if let Some(id) = self.stop_token_ids.iter().find(|&&id| id as usize >= vocab) {
            let problem = format!("names {id}, but the vocabulary ends at {}", vocab - 1);
            return refuse("stop_token_ids", problem);
        }
        for (field, wanted) in [("logprobs", self.logprobs), ("prompt_logprobs", self.prompt_logprobs)] {
            if let Some(wanted) = wanted.filter(|&wanted| wanted > vocab) {
                return refuse(field, format!("asks for {wanted} of {vocab} tokens"));
            }
        }
        self.sampling.check(vocab)
    }
}
