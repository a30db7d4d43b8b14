//! `/v1/messages`: the next message, as Anthropic's clients ask for it.

use super::grammar;
use crate::anthropic::{
    CountRequest, CountedTokens, MessageErrorBody, MessageObject, MessageUsage, MessagesRequest,
};
use crate::app::Shared;
use crate::auth::Caller;
use crate::body::JsonObject;
use crate::generation::{End, Generation, Job, Step, TokenTexts, What};
use crate::openai::completions::StopReason;
use crate::openai::{ApiError, Usage, new_id};
use crate::prompt::{Conversation, aside, encode};
use crate::sse::{self, Event, Events, StreamEvent};
use crate::turn::{Asked, Change, Part, PartKind, Parts};
use axum::Json;
use axum::extract::{Request, State};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

/// What all addresses here begin with.
pub(crate) const PREFIX: &str = "/v1/messages";

pub(crate) fn router() -> OpenApiRouter<Shared> {
    OpenApiRouter::new().routes(routes!(messages)).routes(routes!(count_tokens))
}

/// Words errors as these routes' clients read them, wherever they come from.
pub(crate) async fn reword_errors(request: Request, next: Next) -> Response {
    let here = request.uri().path().starts_with(PREFIX);
    let mut response = next.run(request).await;
    match response.extensions_mut().remove::<ApiError>() {
        Some(error) if here => {
            let (mut parts, _) = response.into_parts();
            parts.headers.remove(axum::http::header::CONTENT_LENGTH);
            let body = Json(MessageErrorBody::new(&error)).into_response().into_body();
            Response::from_parts(parts, body)
        }
        _ => response,
    }
}

/// How a request here is refused, for the description of the API.
#[derive(utoipa::IntoResponses)]
#[allow(dead_code, reason = "only its description is used")]
enum Refusals {
    /// the request is wrong
    #[response(status = "4XX")]
    Wrong(#[to_schema] MessageErrorBody),
    /// too much to do, the server is shutting down, or the model has failed on the way
    #[response(status = "5XX")]
    Failed(#[to_schema] MessageErrorBody),
}

/// Answer a conversation, in blocks
#[utoipa::path(
    post,
    path = "/v1/messages",
    tag = "generation",
    request_body = MessagesRequest,
    responses(
        (status = 200, description = "the answer; with `stream` as events that say what happens to it", content(
            (MessageObject = "application/json"),
            (StreamEvent = "text/event-stream")
        )),
        Refusals
    )
)]
async fn messages(State(app): State<Shared>, caller: Caller, body: JsonObject) -> Result<Response, ApiError> {
    let request = MessagesRequest::read(&body, false)?;
    let model = app.check_model(request.sampling.model.as_deref())?;
    let stream = request.sampling.stream == Some(true);
    let (job, mut writer) = aside(&app, move |app| prepare(app, caller, &request, model)).await?;
    let mut generation = Generation::start(&app, job)?;
    if stream {
        return sse::stream(generation, writer).await;
    }
    while let Some(step) = generation.next().await? {
        writer.take_in(step, |_, _| {});
    }
    Ok(Json(writer.message(generation.usage())).into_response())
}

/// How many tokens a conversation has
#[utoipa::path(
    post,
    path = "/v1/messages/count_tokens",
    tag = "tokens",
    request_body = CountRequest,
    responses((status = 200, description = "how many", body = CountedTokens), Refusals)
)]
async fn count_tokens(State(app): State<Shared>, body: JsonObject) -> Result<Json<CountedTokens>, ApiError> {
    let request = MessagesRequest::read(&body, true)?;
    app.check_model(request.sampling.model.as_deref())?;
    let count = move |app: &Shared| {
        let prompt = Conversation::of_chat(&request.chat, true, "messages").render(app)?;
        encode(app, &prompt, false, "messages")
    };
    let ids = aside(&app, count).await?;
    Ok(Json(CountedTokens { input_tokens: ids.len() }))
}

/// Everything that takes long before the engine is asked.
fn prepare(
    app: &Shared,
    caller: Caller,
    request: &MessagesRequest,
    model: String,
) -> Result<(Job, MessageWriter), ApiError> {
    let form = grammar(&request.sampling)?.map(|(grammar, _)| (grammar, "output_config"));
    let asked = Asked { chat: &request.chat, sampling: &request.sampling, form, messages: "messages" };
    let (job, replies) = asked.prepare(app, caller)?;
    let reply = replies.into_iter().next().ok_or_else(|| ApiError::internal("there is no answer to give"))?;
    let (parts, texts) = (Parts::new(reply), TokenTexts::new(app, false, job.skip_special));
    Ok((job, MessageWriter { id: new_id("msg"), model, parts, texts, end: None, begun: false }))
}

/// Writes what happens to an answer as events, or the whole of it.
struct MessageWriter {
    id: String,
    model: String,
    parts: Parts,
    texts: TokenTexts,
    end: Option<End>,
    /// Whether the stream has begun.
    begun: bool,
}

impl MessageWriter {
    /// Takes in what happened; `changed` hears what that did to the last part.
    fn take_in(&mut self, step: Step, changed: impl FnMut(&Parts, Change)) {
        self.parts.step(&step, &self.texts, changed);
        if let What::End { end, .. } = step.what {
            self.end = Some(end);
        }
    }

    fn message(&self, usage: Usage) -> MessageObject {
        MessageObject {
            id: self.id.clone(),
            r#type: "message",
            role: "assistant",
            model: self.model.clone(),
            content: self.parts.all.iter().map(|part| block(part, true)).collect(),
            stop_reason: self.stop_reason(),
            stop_sequence: self.stop_sequence(),
            usage: tokens(usage),
        }
    }

    /// Why the answer ended, if it has.
    fn stop_reason(&self) -> Option<&'static str> {
        let end = self.end.as_ref()?;
        Some(match &end.stop {
            _ if end.reason == "length" => "max_tokens",
            Some(StopReason::Text(_)) => "stop_sequence",
            _ if self.parts.has_calls() => "tool_use",
            _ => "end_turn",
        })
    }

    fn stop_sequence(&self) -> Option<String> {
        match self.end.as_ref()?.stop.as_ref()? {
            StopReason::Text(text) => Some(text.clone()),
            StopReason::Token(_) => None,
        }
    }
}

fn tokens(usage: Usage) -> MessageUsage {
    MessageUsage {
        input_tokens: usage.prompt_tokens,
        output_tokens: usage.completion_tokens,
        cache_creation_input_tokens: 0,
        cache_read_input_tokens: 0,
    }
}

impl Events for MessageWriter {
    fn step(&mut self, step: Step, usage: Usage, out: &mut Vec<Event>) {
        if !self.begun {
            self.begun = true;
            let message = self.message(usage);
            out.push(Event::named("message_start", &json!({ "type": "message_start", "message": message })));
        }
        self.take_in(step, |parts, change| tell(parts, change, out));
    }

    fn end(&mut self, usage: Usage, out: &mut Vec<Event>) {
        let delta = json!({ "stop_reason": self.stop_reason(), "stop_sequence": self.stop_sequence() });
        let last = json!({ "type": "message_delta", "delta": delta, "usage": tokens(usage) });
        out.push(Event::named("message_delta", &last));
        out.push(Event::named("message_stop", &json!({ "type": "message_stop" })));
    }

    fn failed(&mut self, error: &ApiError, out: &mut Vec<Event>) {
        out.push(Event::named("error", &MessageErrorBody::new(error)));
    }
}

/// The events of a change to the last part.
fn tell(parts: &Parts, change: Change, out: &mut Vec<Event>) {
    let Some(part) = parts.all.last() else { return };
    let index = parts.all.len() - 1;
    let delta = |delta: Value| {
        let data = json!({ "type": "content_block_delta", "index": index, "delta": delta });
        Event::named("content_block_delta", &data)
    };
    match change {
        Change::Opened => {
            let data =
                json!({ "type": "content_block_start", "index": index, "content_block": block(part, false) });
            out.push(Event::named("content_block_start", &data));
        }
        Change::More(text, _) => out.push(delta(match part.kind {
            PartKind::Text => json!({ "type": "text_delta", "text": text }),
            PartKind::Reasoning => json!({ "type": "thinking_delta", "thinking": text }),
            PartKind::Call { .. } => json!({ "type": "input_json_delta", "partial_json": text }),
        })),
        Change::Closed => {
            if part.kind == PartKind::Reasoning {
                out.push(delta(json!({ "type": "signature_delta", "signature": "" })));
            }
            let data = json!({ "type": "content_block_stop", "index": index });
            out.push(Event::named("content_block_stop", &data));
        }
    }
}

/// A part as a block: whole, or as it is when it is new.
fn block(part: &Part, whole: bool) -> Value {
    let text = if whole { part.text.as_str() } else { "" };
    match &part.kind {
        PartKind::Text => json!({ "type": "text", "text": text }),
        PartKind::Reasoning => json!({ "type": "thinking", "thinking": text, "signature": "" }),
        PartKind::Call { name } => {
            // What was cut off is no JSON; clients want an object.
            let input = serde_json::from_str(text).ok().filter(Value::is_object).unwrap_or_else(|| json!({}));
            json!({ "type": "tool_use", "id": part.id, "name": name, "input": input })
        }
    }
}
