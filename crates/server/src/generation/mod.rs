//! From a request's prompts to pieces of its answers. START HERE: [`Generation::start`], then [`Generation::next`].
//!
//! A [`Job`] has some prompts and n choices of each; every choice is a request of its own to the engine, which calls back
//! on its thread for each token. What it tells waits in one queue, a few bytes a token, until the answer is written: a
//! client that reads slowly holds up nobody, and costs no more than its answer's tokens. Whoever drops a generation
//! calls off what still runs.

mod choice;
mod job;
mod tokens;

pub(crate) use job::Job;
pub(crate) use tokens::TokenTexts;

use crate::app::Shared;
use crate::guide::Guide;
use crate::openai::completions::StopReason;
use crate::openai::{ApiError, Usage};
use choice::Choice;
use epsmoe_engine::{Event, Finish, TokenLogprobs};
use std::time::Instant;
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};

/// Answers on their way.
pub(crate) struct Generation {
    app: Shared,
    /// Choices of the first prompt, then of the second, …
    choices: Vec<Choice>,
    choices_of_prompt: usize,
    open: usize,
    events: UnboundedReceiver<Told>,
    /// Whether an error is the answer, which no answer of these counts beside.
    failed: bool,
}

/// What the engine told about a choice, and when.
struct Told {
    choice: usize,
    at: Instant,
    event: Event,
}

/// What happened to a choice.
#[derive(Debug)]
pub(crate) struct Step {
    /// Number of the prompt · n + number of the answer.
    pub(crate) choice: usize,
    pub(crate) what: What,
}

#[derive(Debug)]
pub(crate) enum What {
    /// The prompt has been computed; with log-probabilities of its tokens if they are wanted.
    Prompt(Option<Vec<Option<TokenLogprobs>>>),
    /// A token, and text that is certain now: often its own, none while a character is incomplete.
    Token { id: u32, logprobs: Option<TokenLogprobs>, text: String },
    /// The end, and text that was held back.
    End { text: String, end: End },
}

/// Why a choice ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct End {
    /// `stop` or `length`.
    pub(crate) reason: &'static str,
    /// The text or token that ended it.
    pub(crate) stop: Option<StopReason>,
}

impl Generation {
    /// Hands the job to the engine.
    pub(crate) fn start(app: &Shared, mut job: Job) -> Result<Self, ApiError> {
        app.model.engine.room_for(job.prompts.len().saturating_mul(job.n))?;
        let (sender, events) = unbounded_channel();
        let mut generation = Generation {
            app: app.clone(),
            choices: Vec::with_capacity(job.prompts.len() * job.n),
            choices_of_prompt: job.n,
            open: 0,
            events,
            failed: false,
        };
        let guide: Option<Guide> = job.guide.take();
        for prompt in 0..job.prompts.len() {
            for answer in 0..job.n {
                let choice = generation.choices.len();
                let request = job.engine_request(prompt, answer, guide.as_ref().map(Guide::another));
                let sender = sender.clone();
                let tell = move |event| {
                    // Nobody may be listening any more.
                    let _ = sender.send(Told { choice, at: Instant::now(), event });
                };
                let submitted = Instant::now();
                let id = app.model.engine.submit(request, tell).inspect_err(|_| generation.failed = true)?;
                generation.choices.push(Choice::new(app, &job, prompt, id, submitted));
                generation.open += 1;
            }
        }
        Ok(generation)
    }

    /// What happens next; nothing after every choice has ended.
    pub(crate) async fn next(&mut self) -> Result<Option<Step>, ApiError> {
        while self.open > 0 {
            let told = self.events.recv().await;
            let told = told.ok_or_else(|| ApiError::internal("the engine has ended without a word"))?;
            if let Some(step) = self.take_in(told).inspect_err(|_| self.failed = true)? {
                return Ok(Some(step));
            }
        }
        Ok(None)
    }

    fn take_in(&mut self, told: Told) -> Result<Option<Step>, ApiError> {
        let first_of_prompt = told.choice.is_multiple_of(self.choices_of_prompt);
        let (app, choice) = (&self.app, &mut self.choices[told.choice]);
        let what = match told.event {
            Event::Prompt { cached_tokens, queued, logprobs } => {
                choice.prompt(cached_tokens, queued);
                if first_of_prompt {
                    app.metrics.prompt(choice.prompt_tokens);
                }
                What::Prompt(logprobs)
            }
            // What comes after a stop text belongs to nobody.
            Event::Token { .. } if choice.is_stopping() => return Ok(None),
            Event::Token { id, logprobs } => {
                app.metrics.token(&mut choice.times, told.at);
                let text = choice.token(id)?;
                if choice.is_stopping() {
                    app.model.engine.abort(choice.id);
                }
                What::Token { id, logprobs, text }
            }
            Event::Finished(finish) => {
                self.open -= 1;
                if finish == Finish::Abort && !choice.is_stopping() {
                    choice.close();
                    return Err(ApiError::busy("the server is shutting down"));
                }
                let (text, end) = choice.end(finish)?;
                app.metrics.finished(end.reason, choice.tokens, &choice.times, told.at);
                What::End { text, end }
            }
            Event::Failed(failure) => {
                self.open -= 1;
                choice.close();
                return Err(failure.into());
            }
            Event::PromptLogits(_) => return Ok(None),
        };
        Ok(Some(Step { choice: told.choice, what }))
    }

    /// Tokens so far; a prompt counts once.
    pub(crate) fn usage(&self) -> Usage {
        let of_prompts = || self.choices.iter().step_by(self.choices_of_prompt);
        let prompt_tokens = of_prompts().map(|choice| choice.prompt_tokens).sum();
        let cached = of_prompts().map(|choice| choice.cached_tokens).sum();
        let new = self.choices.iter().map(|choice| choice.tokens).sum();
        Usage::new(prompt_tokens, new, cached)
    }

    /// How many choices there are.
    pub(crate) fn len(&self) -> usize {
        self.choices.len()
    }
}

impl Drop for Generation {
    /// Calls off what nobody waits for.
    fn drop(&mut self) {
        let now = Instant::now();
        for choice in self.choices.iter_mut().filter(|choice| !choice.is_closed()) {
            self.app.model.engine.abort(choice.id);
            if !self.failed {
                self.app.metrics.finished("abort", choice.tokens, &choice.times, now);
            }
        }
    }
}
