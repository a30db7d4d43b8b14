//! One answer on its way: tokens become text, and the text may come to a stop.

use super::{End, Job};
use crate::app::App;
use crate::metrics::Times;
use crate::openai::ApiError;
use crate::openai::completions::StopReason;
use epsmoe_engine::{Finish, RequestId};
use epsmoe_text::{DecodeStream, TextError};
use std::time::{Duration, Instant};

/// One answer on its way.
pub(super) struct Choice {
    pub(super) id: RequestId,
    pub(super) prompt_tokens: usize,
    /// Tokens of the prompt that were in the cache.
    pub(super) cached_tokens: usize,
    /// New tokens.
    pub(super) tokens: usize,
    pub(super) times: Times,
    text: Text,
    /// Tokens that end the answer and are no part of its text.
    silent: Vec<u32>,
    /// Whether stop texts stay.
    keep_stop: bool,
    state: State,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    Open,
    /// The text has come to a stop; the engine has been told and not yet answered.
    Stopping,
    Closed,
}

/// How tokens become text.
enum Text {
    Decoded(Box<DecodeStream>),
    /// Without a tokenizer the ids are the text.
    Ids,
}

impl Choice {
    pub(super) fn new(app: &App, job: &Job, prompt: usize, id: RequestId, submitted: Instant) -> Self {
        let text = match &app.model.tokenizer {
            Some(tokenizer) => {
                let stream = DecodeStream::new(tokenizer, job.stop.clone(), job.skip_special)
                    .after(&job.prompts[prompt])
                    .deaf_for(job.min_tokens);
                Text::Decoded(Box::new(stream))
            }
            None => Text::Ids,
        };
        let eos: &[u32] = if job.ignore_eos { &[] } else { &app.model.eos };
        let silent = if job.keep_stop { Vec::new() } else { [eos, &job.stop_token_ids].concat() };
        Choice {
            id,
            prompt_tokens: job.prompts[prompt].len(),
            cached_tokens: 0,
            tokens: 0,
            times: Times { submitted, queued: Duration::ZERO, first_token: None, last_token: None },
            text,
            silent,
            keep_stop: job.keep_stop,
            state: State::Open,
        }
    }

    pub(super) fn prompt(&mut self, cached_tokens: usize, queued: Duration) {
        self.cached_tokens = cached_tokens;
        self.times.queued = queued;
    }

    /// Takes a token in; returns the text that is certain now.
    pub(super) fn token(&mut self, id: u32) -> Result<String, ApiError> {
        self.tokens += 1;
        if self.silent.contains(&id) {
            return Ok(String::new());
        }
        let (mut text, stopped) = match &mut self.text {
            Text::Decoded(stream) => {
                let text = stream.push(id).map_err(undecodable)?;
                (text, stream.stopped_by().map(str::to_owned))
            }
            Text::Ids if self.tokens > 1 => (format!(" {id}"), None),
            Text::Ids => (id.to_string(), None),
        };
        if let Some(stop) = stopped {
            self.state = State::Stopping;
            if self.keep_stop {
                text.push_str(&stop);
            }
        }
        Ok(text)
    }

    /// The answer has ended; returns the text that was held back.
    pub(super) fn end(&mut self, finish: Finish) -> Result<(String, End), ApiError> {
        self.close();
        let (rest, stopped) = match &mut self.text {
            Text::Decoded(stream) => {
                let rest = stream.finish().map_err(undecodable)?;
                (rest, stream.stopped_by().map(str::to_owned))
            }
            Text::Ids => (String::new(), None),
        };
        let end = match (stopped, finish) {
            (Some(text), _) => End { reason: "stop", stop: Some(StopReason::Text(text)) },
            (None, Finish::StopToken(id)) => End { reason: "stop", stop: Some(StopReason::Token(id)) },
            (None, Finish::Stop) => End { reason: "stop", stop: None },
            (None, Finish::Length | Finish::Abort) => End { reason: "length", stop: None },
        };
        Ok((rest, end))
    }

    pub(super) fn is_stopping(&self) -> bool {
        self.state == State::Stopping
    }

    pub(super) fn close(&mut self) {
        self.state = State::Closed;
    }

    pub(super) fn is_closed(&self) -> bool {
        self.state == State::Closed
    }
}

fn undecodable(error: TextError) -> ApiError {
    ApiError::internal(error.to_string())
}
