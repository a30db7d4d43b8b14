//! Answers as server-sent events: `data: {json}` lines, then `data: [DONE]`.

use crate::generation::{Generation, Step};
use crate::openai::{ApiError, Usage};
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use futures_util::stream;
use serde::Serialize;
use std::collections::VecDeque;
use std::convert::Infallible;
use std::time::Duration;
use utoipa::ToSchema;

/// Silence after which a comment is sent, so that nobody on the way takes the connection for dead.
const KEEP_ALIVE: Duration = Duration::from_secs(15);

/// How a route words a generation as chunks.
pub(crate) trait Chunks: Send + 'static {
    type Chunk: Serialize + Send;

    /// The chunks of a step.
    fn step(&mut self, step: Step, out: &mut Vec<Self::Chunk>);

    /// The last chunk, with nothing but the usage.
    fn last(&mut self, usage: Usage) -> Self::Chunk;

    /// Puts the usage so far on a chunk.
    fn mark(chunk: &mut Self::Chunk, usage: Usage);
}

/// One event of a stream, as the description of the API has it.
#[derive(ToSchema)]
#[allow(dead_code, reason = "only its description is used")]
pub(crate) struct StreamEvent {
    /// A chunk as JSON, an error object, or `[DONE]`.
    data: String,
}

/// Which usage a stream tells.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct UsageWanted {
    /// In one more chunk at the end.
    pub(crate) last: bool,
    /// In every chunk.
    pub(crate) each: bool,
}

/// The stream of a generation. What goes wrong before its first chunk is answered plainly.
pub(crate) async fn stream<C: Chunks>(
    generation: Generation,
    chunks: C,
    usage: UsageWanted,
) -> Result<Response, ApiError> {
    let mut writer = Writer { generation, chunks, usage, ready: VecDeque::new(), stage: Stage::Chunks };
    let first = writer.chunk().await?;
    writer.ready.extend(first);
    let events = stream::unfold(writer, |mut writer| async {
        let event = writer.event().await?;
        Some((Ok::<_, Infallible>(event), writer))
    });
    Ok(Sse::new(events).keep_alive(KeepAlive::new().interval(KEEP_ALIVE)).into_response())
}

struct Writer<C: Chunks> {
    generation: Generation,
    chunks: C,
    usage: UsageWanted,
    /// Chunks as JSON that have not been sent.
    ready: VecDeque<String>,
    stage: Stage,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Stage {
    Chunks,
    /// Only `[DONE]` is left.
    Done,
    Ended,
}

impl<C: Chunks> Writer<C> {
    async fn event(&mut self) -> Option<Event> {
        if self.stage == Stage::Chunks {
            match self.chunk().await {
                Ok(Some(chunk)) => return Some(Event::default().data(chunk)),
                Ok(None) => {}
                Err(error) => {
                    self.stage = Stage::Done;
                    return Some(Event::default().data(json(&error.body())));
                }
            }
        }
        if self.stage == Stage::Ended {
            return None;
        }
        self.stage = Stage::Ended;
        Some(Event::default().data("[DONE]"))
    }

    /// The next chunk; nothing after the last.
    async fn chunk(&mut self) -> Result<Option<String>, ApiError> {
        let mut chunks = Vec::new();
        loop {
            if let Some(chunk) = self.ready.pop_front() {
                return Ok(Some(chunk));
            }
            if self.stage != Stage::Chunks {
                return Ok(None);
            }
            match self.generation.next().await? {
                Some(step) => {
                    self.chunks.step(step, &mut chunks);
                    if self.usage.each {
                        let usage = self.generation.usage();
                        chunks.iter_mut().for_each(|chunk| C::mark(chunk, usage));
                    }
                    self.ready.extend(chunks.drain(..).map(|chunk| json(&chunk)));
                }
                None => {
                    self.stage = Stage::Done;
                    if self.usage.last {
                        self.ready.push_back(json(&self.chunks.last(self.generation.usage())));
                    }
                }
            }
        }
    }
}

/// Chunks have no maps with keys that are no strings, so this cannot fail.
fn json(value: &impl Serialize) -> String {
    serde_json::to_string(value).unwrap_or_default()
}
