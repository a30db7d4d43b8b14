//! Answers as choices, which is how `/v1/completions` and `/v1/chat/completions` word them: all at once, or as chunks that
//! say what comes to them.

use crate::app::Shared;
use crate::generation::{Generation, Job, Step};
use crate::openai::sampling::SamplingFields;
use crate::openai::{ApiError, Usage, new_id, now};
use crate::sse::{self, Event, Events};
use axum::Json;
use axum::response::{IntoResponse, Response};
use serde::Serialize;

/// What every answer and every chunk of one request begins with.
#[derive(Clone, Debug)]
pub(crate) struct Head {
    pub(crate) id: String,
    /// Seconds since 1970.
    pub(crate) created: u64,
    pub(crate) model: String,
}

impl Head {
    /// The head of a request whose id begins with `prefix` and ends as the client says, if it says so.
    pub(crate) fn new(prefix: &str, fields: &SamplingFields, model: String) -> Self {
        let id = fields.request_id.as_ref().map_or_else(|| new_id(prefix), |id| format!("{prefix}-{id}"));
        Head { id, created: now(), model }
    }
}

/// How a route words choices.
pub(crate) trait Choices: Send + 'static {
    /// A choice of a whole answer.
    type Whole: Send;
    /// What a chunk adds to a choice.
    type Part: Send;

    /// A choice that nothing has happened to.
    fn empty(&self, index: usize) -> Self::Whole;

    /// What comes before the first step's parts.
    fn opening(&self) -> Vec<Self::Part> {
        Vec::new()
    }

    /// What a step adds to its choice, in any number of parts.
    fn parts(&mut self, step: Step) -> Vec<Self::Part>;

    /// Adds a part to its choice.
    fn append(whole: &mut Self::Whole, part: Self::Part);

    /// The whole answer.
    fn answer(self, choices: Vec<Self::Whole>, usage: Usage) -> impl Serialize;

    /// A chunk: of one part, or of none and the usage.
    fn chunk(&self, part: Option<Self::Part>, usage: Option<Usage>) -> impl Serialize;
}

/// How an answer is sent.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Sending {
    /// When it is whole.
    Whole,
    /// As it comes.
    Stream {
        /// Whether the last chunk tells the usage.
        last_usage: bool,
        /// Whether every chunk does.
        each_usage: bool,
    },
}

impl Sending {
    pub(crate) fn of(fields: &SamplingFields) -> Self {
        if fields.stream != Some(true) {
            return Sending::Whole;
        }
        let options = fields.stream_options.unwrap_or_default();
        let each_usage = options.continuous_usage_stats.unwrap_or(false);
        Sending::Stream { last_usage: options.include_usage.unwrap_or(false), each_usage }
    }
}

/// Runs a job, and words it.
pub(crate) async fn answer(
    app: &Shared,
    job: Job,
    choices: impl Choices,
    sending: Sending,
) -> Result<Response, ApiError> {
    let generation = Generation::start(app, job)?;
    match sending {
        Sending::Whole => whole(generation, choices).await,
        Sending::Stream { last_usage, each_usage } => {
            sse::stream(generation, Chunks { choices, opened: false, last_usage, each_usage }).await
        }
    }
}

/// All choices at once.
async fn whole<C: Choices>(mut generation: Generation, mut choices: C) -> Result<Response, ApiError> {
    let mut all: Vec<C::Whole> = (0..generation.len()).map(|index| choices.empty(index)).collect();
    while let Some(step) = generation.next().await? {
        let whole = &mut all[step.choice];
        choices.parts(step).into_iter().for_each(|part| C::append(whole, part));
    }
    Ok(Json(choices.answer(all, generation.usage())).into_response())
}

/// Choices as chunks.
struct Chunks<C> {
    choices: C,
    opened: bool,
    last_usage: bool,
    each_usage: bool,
}

impl<C: Choices> Events for Chunks<C> {
    fn step(&mut self, step: Step, usage: Usage, out: &mut Vec<Event>) {
        let mut parts = if self.opened { Vec::new() } else { self.choices.opening() };
        self.opened = true;
        parts.extend(self.choices.parts(step));
        let usage = self.each_usage.then_some(usage);
        out.extend(parts.into_iter().map(|part| Event::data(&self.choices.chunk(Some(part), usage))));
    }

    fn end(&mut self, usage: Usage, out: &mut Vec<Event>) {
        if self.last_usage {
            out.push(Event::data(&self.choices.chunk(None, Some(usage))));
        }
        out.push(Event::done());
    }

    fn failed(&mut self, error: &ApiError, out: &mut Vec<Event>) {
        out.extend([Event::data(&error.body()), Event::done()]);
    }
}
