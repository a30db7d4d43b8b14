//! Answers as server-sent events.

use crate::generation::{Generation, Step};
use crate::openai::{ApiError, Usage};
use axum::response::sse::{self, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use futures_util::stream;
use serde::Serialize;
use std::collections::VecDeque;
use std::convert::Infallible;
use std::time::Duration;
use utoipa::ToSchema;

/// Silence after which a comment is sent, so that nobody on the way takes the connection for dead.
const KEEP_ALIVE: Duration = Duration::from_secs(15);

/// One event of a stream.
pub(crate) struct Event {
    name: Option<&'static str>,
    data: String,
}

impl Event {
    /// An event without a name.
    pub(crate) fn data(data: &impl Serialize) -> Self {
        Event { name: None, data: json(data) }
    }

    /// An event with one.
    pub(crate) fn named(name: &'static str, data: &impl Serialize) -> Self {
        Event { name: Some(name), data: json(data) }
    }

    /// What ends a stream of OpenAI's first two routes.
    pub(crate) fn done() -> Self {
        Event { name: None, data: "[DONE]".to_owned() }
    }

    fn written(self) -> sse::Event {
        let event = sse::Event::default();
        let event = if let Some(name) = self.name { event.event(name) } else { event };
        event.data(self.data)
    }
}

/// How a route words a generation as events.
pub(crate) trait Events: Send + 'static {
    /// The events of a step; `usage` is what the answers have taken so far.
    fn step(&mut self, step: Step, usage: Usage, out: &mut Vec<Event>);

    /// The last ones, when every answer has ended.
    fn end(&mut self, usage: Usage, out: &mut Vec<Event>);

    /// The last ones, when something went wrong.
    fn failed(&mut self, error: &ApiError, out: &mut Vec<Event>);
}

/// One event of a stream, as the description of the API has it.
#[derive(ToSchema)]
#[allow(dead_code, reason = "only its description is used")]
pub(crate) struct StreamEvent {
    /// A chunk as JSON, an error object, or `[DONE]`.
    data: String,
}

/// The stream of a generation. What goes wrong before its first event is answered plainly.
pub(crate) async fn stream(generation: Generation, events: impl Events) -> Result<Response, ApiError> {
    let mut writer = Writer { generation, events, ready: VecDeque::new(), ended: false };
    while writer.ready.is_empty() && !writer.ended {
        writer.more().await?;
    }
    let events = stream::unfold(writer, |mut writer| async {
        let event = writer.next().await?;
        Some((Ok::<_, Infallible>(event.written()), writer))
    });
    Ok(Sse::new(events).keep_alive(KeepAlive::new().interval(KEEP_ALIVE)).into_response())
}

struct Writer<E> {
    generation: Generation,
    events: E,
    /// Events that have not been sent.
    ready: VecDeque<Event>,
    ended: bool,
}

impl<E: Events> Writer<E> {
    async fn next(&mut self) -> Option<Event> {
        while self.ready.is_empty() && !self.ended {
            if let Err(error) = self.more().await {
                let mut last = Vec::new();
                self.events.failed(&error, &mut last);
                self.ready.extend(last);
                self.ended = true;
            }
        }
        self.ready.pop_front()
    }

    /// Waits for what happens next, and words it.
    async fn more(&mut self) -> Result<(), ApiError> {
        let (step, usage) = (self.generation.next().await?, self.generation.usage());
        let mut events = Vec::new();
        match step {
            Some(step) => self.events.step(step, usage, &mut events),
            None => {
                self.events.end(usage, &mut events);
                self.ended = true;
            }
        }
        self.ready.extend(events);
        Ok(())
    }
}

/// Events have no maps with keys that are no strings, so this cannot fail.
fn json(value: &impl Serialize) -> String {
    serde_json::to_string(value).unwrap_or_default()
}
