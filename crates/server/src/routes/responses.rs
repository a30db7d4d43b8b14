//! `/v1/responses`: what comes next, in items.

use super::grammar;
use crate::app::Shared;
use crate::auth::Caller;
use crate::body::JsonObject;
use crate::generation::{End, Generation, Job, Step, TokenTexts, What};
use crate::openai::errors::Refusals;
use crate::openai::responses::{
    IncompleteDetails, InputTokensDetails, OutputTokensDetails, ResponseError, ResponseObject, ResponseUsage,
    ResponsesRequest,
};
use crate::openai::{ApiError, Usage, new_id, now};
use crate::prompt::aside;
use crate::sse::{self, Event, Events, StreamEvent};
use crate::turn::{Asked, Change, Part, PartKind, Parts};
use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use serde_json::{Map, Value, json};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

pub(crate) fn router() -> OpenApiRouter<Shared> {
    OpenApiRouter::new().routes(routes!(responses))
}

/// Answer a conversation, in items
#[utoipa::path(
    post,
    path = "/v1/responses",
    tag = "generation",
    request_body = ResponsesRequest,
    responses(
        (status = 200, description = "the answer; with `stream` as events that say what happens to it", content(
            (ResponseObject = "application/json"),
            (StreamEvent = "text/event-stream")
        )),
        Refusals
    )
)]
async fn responses(
    State(app): State<Shared>,
    caller: Caller,
    body: JsonObject,
) -> Result<Response, ApiError> {
    let request = ResponsesRequest::read(&body)?;
    let model = app.check_model(request.sampling.model.as_deref())?;
    let stream = request.sampling.stream == Some(true);
    let (job, mut writer) = aside(&app, move |app| prepare(app, caller, request, model)).await?;
    let mut generation = Generation::start(&app, job)?;
    if stream {
        return sse::stream(generation, writer).await;
    }
    while let Some(step) = generation.next().await? {
        writer.take_in(step, |_, _| {});
    }
    let (status, usage) = (writer.last_status(), generation.usage());
    Ok(Json(writer.response(status, Some(usage))).into_response())
}

/// Everything that takes long before the engine is asked.
fn prepare(
    app: &Shared,
    caller: Caller,
    request: ResponsesRequest,
    model: String,
) -> Result<(Job, ResponseWriter), ApiError> {
    let form = grammar(&request.sampling)?.map(|(grammar, _)| (grammar, "text"));
    let asked = Asked { chat: &request.chat, sampling: &request.sampling, form, messages: "input" };
    let (job, replies) = asked.prepare(app, caller)?;
    let reply = replies.into_iter().next().ok_or_else(|| ApiError::internal("there is no answer to give"))?;
    let writer = ResponseWriter {
        id: new_id("resp"),
        created: now(),
        model,
        echoed: request.echoed,
        parts: Parts::new(reply),
        texts: TokenTexts::new(app, false, job.skip_special),
        end: None,
        events: 0,
    };
    Ok((job, writer))
}

/// Writes what happens to an answer as events, or the whole of it.
struct ResponseWriter {
    id: String,
    created: u64,
    model: String,
    echoed: Map<String, Value>,
    parts: Parts,
    texts: TokenTexts,
    end: Option<End>,
    /// Events so far.
    events: usize,
}

impl ResponseWriter {
    /// Takes in what happened; `changed` hears what that did to the last part.
    fn take_in(&mut self, step: Step, changed: impl FnMut(&Parts, Change)) {
        self.parts.step(&step, &self.texts, changed);
        if let What::End { end, .. } = step.what {
            self.end = Some(end);
        }
    }

    /// How the answer ended.
    fn last_status(&self) -> &'static str {
        let complete = self.end.as_ref().is_some_and(|end| end.reason == "stop");
        if complete { "completed" } else { "incomplete" }
    }

    fn response(&self, status: &'static str, usage: Option<Usage>) -> ResponseObject {
        let last = self.parts.all.len().saturating_sub(1);
        let items = self.parts.all.iter().enumerate().map(|(index, part)| {
            let whole = index < last || status == "completed";
            item(part, if whole { "completed" } else { "incomplete" })
        });
        ResponseObject {
            id: self.id.clone(),
            object: "response",
            created_at: self.created,
            status,
            error: None,
            incomplete_details: (status == "incomplete")
                .then_some(IncompleteDetails { reason: "max_output_tokens" }),
            model: self.model.clone(),
            output: items.collect(),
            usage: usage.map(|usage| self.usage(usage)),
            store: false,
            previous_response_id: None,
            truncation: "disabled",
            background: false,
            echoed: self.echoed.clone(),
        }
    }

    fn usage(&self, usage: Usage) -> ResponseUsage {
        let cached_tokens = usage.prompt_tokens_details.cached_tokens;
        ResponseUsage {
            input_tokens: usage.prompt_tokens,
            input_tokens_details: InputTokensDetails { cached_tokens, cache_write_tokens: 0 },
            output_tokens: usage.completion_tokens,
            output_tokens_details: OutputTokensDetails { reasoning_tokens: self.parts.reasoning_tokens },
            total_tokens: usage.total_tokens,
        }
    }

    /// An event; all have a number.
    fn event(&mut self, name: &'static str, mut data: Value) -> Event {
        data["type"] = name.into();
        data["sequence_number"] = self.events.into();
        self.events += 1;
        Event::named(name, &data)
    }

    fn with_response(&mut self, name: &'static str, status: &'static str, usage: Option<Usage>) -> Event {
        let response = self.response(status, usage);
        self.event(name, json!({ "response": response }))
    }
}

impl Events for ResponseWriter {
    fn step(&mut self, step: Step, _: Usage, out: &mut Vec<Event>) {
        if self.events == 0 {
            out.push(self.with_response("response.created", "in_progress", None));
            out.push(self.with_response("response.in_progress", "in_progress", None));
        }
        let cut = matches!(&step.what, What::End { end, .. } if end.reason != "stop");
        let closed = if cut { "incomplete" } else { "completed" };
        let mut told = Vec::new();
        self.take_in(step, |parts, change| tell(parts, change, closed, &mut told));
        out.extend(told.into_iter().map(|(name, data)| self.event(name, data)));
    }

    fn end(&mut self, usage: Usage, out: &mut Vec<Event>) {
        let status = self.last_status();
        let name = if status == "completed" { "response.completed" } else { "response.incomplete" };
        out.push(self.with_response(name, status, Some(usage)));
    }

    fn failed(&mut self, error: &ApiError, out: &mut Vec<Event>) {
        let mut response = self.response("failed", None);
        response.error = Some(ResponseError { code: "server_error", message: error.message().to_owned() });
        out.push(self.event("response.failed", json!({ "response": response })));
    }
}

/// The events of a change to the last part: their names, and what they say. A part that ends now is `closed`.
fn tell(parts: &Parts, change: Change, closed: &'static str, out: &mut Vec<(&'static str, Value)>) {
    let Some(part) = parts.all.last() else { return };
    let of_item = json!({ "output_index": parts.all.len() - 1 });
    let mut of_part = with(&of_item, json!({ "item_id": part.id }));
    // Calls have no content, so nothing is at a place in it.
    if !matches!(part.kind, PartKind::Call { .. }) {
        of_part["content_index"] = 0.into();
    }
    let (delta, done) = match part.kind {
        PartKind::Text => ("response.output_text.delta", "response.output_text.done"),
        PartKind::Reasoning => ("response.reasoning_text.delta", "response.reasoning_text.done"),
        PartKind::Call { .. } => {
            ("response.function_call_arguments.delta", "response.function_call_arguments.done")
        }
    };
    let content = || content(part).map(|content| with(&of_part, json!({ "part": content })));
    match change {
        Change::Opened => {
            let item = item(part, "in_progress");
            out.push(("response.output_item.added", with(&of_item, json!({ "item": item }))));
            out.extend(content().map(|content| ("response.content_part.added", content)));
        }
        Change::More(text, logprobs) => {
            let more = match part.kind {
                PartKind::Text => json!({ "delta": text, "logprobs": logprobs }),
                PartKind::Reasoning | PartKind::Call { .. } => json!({ "delta": text }),
            };
            out.push((delta, with(&of_part, more)));
        }
        Change::Closed => {
            let whole = match &part.kind {
                PartKind::Text => json!({ "text": part.text, "logprobs": part.logprobs }),
                PartKind::Reasoning => json!({ "text": part.text }),
                PartKind::Call { name } => json!({ "name": name, "arguments": part.text }),
            };
            out.push((done, with(&of_part, whole)));
            out.extend(content().map(|content| ("response.content_part.done", content)));
            let item = item(part, closed);
            out.push(("response.output_item.done", with(&of_item, json!({ "item": item }))));
        }
    }
}

/// An object with the fields of both.
fn with(object: &Value, more: Value) -> Value {
    let mut object = object.clone();
    if let (Value::Object(object), Value::Object(more)) = (&mut object, more) {
        object.extend(more);
    }
    object
}

/// A part as an item of the answer. One in progress has its content told by events of their own.
fn item(part: &Part, status: &'static str) -> Value {
    let (id, text) = (&part.id, &part.text);
    let in_progress = status == "in_progress";
    let content: Vec<Value> = content(part).filter(|_| !in_progress).into_iter().collect();
    match &part.kind {
        PartKind::Text => {
            json!({ "id": id, "type": "message", "status": status, "role": "assistant", "content": content })
        }
        PartKind::Reasoning => {
            json!({ "id": id, "type": "reasoning", "status": status, "summary": [], "content": content })
        }
        PartKind::Call { name } => {
            let arguments = if in_progress { "" } else { text };
            json!({ "id": id, "type": "function_call", "status": status, "call_id": id, "name": name,
                "arguments": arguments })
        }
    }
}

/// What a part of text has in it; a call has none.
fn content(part: &Part) -> Option<Value> {
    match part.kind {
        PartKind::Text => Some(json!({ "type": "output_text", "text": part.text, "annotations": [],
            "logprobs": part.logprobs })),
        PartKind::Reasoning => Some(json!({ "type": "reasoning_text", "text": part.text })),
        PartKind::Call { .. } => None,
    }
}
