//! `/v1/chat/completions`: the next message of a conversation.

use super::grammar;
use crate::app::Shared;
use crate::auth::Caller;
use crate::body::JsonObject;
use crate::choices::{self, Choices, Head, Sending};
use crate::generation::{Job, Step, TokenTexts, What};
use crate::openai::chat::{
    AssistantMessage, ChatChoice, ChatChunk, ChatFields, ChatRequest, ChatResponse, ChunkChoice, Delta,
};
use crate::openai::errors::Refusals;
use crate::openai::logprobs::ChatLogprobs;
use crate::openai::tools::{FunctionCall, FunctionCallDelta, FunctionWord, ToolCall, ToolCallDelta};
use crate::openai::{ApiError, Usage, new_id};
use crate::parsers::Piece;
use crate::prompt::aside;
use crate::sse::StreamEvent;
use crate::turn::{Asked, Reply};
use axum::extract::State;
use axum::response::Response;
use serde::Serialize;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

const ASSISTANT: &str = "assistant";

pub(crate) fn router() -> OpenApiRouter<Shared> {
    OpenApiRouter::new().routes(routes!(chat_completions))
}

/// Answer a conversation
#[utoipa::path(
    post,
    path = "/v1/chat/completions",
    tag = "generation",
    request_body = ChatRequest,
    responses(
        (status = 200, description = "the answers; with `stream` as events, each a `ChatChunk`", content(
            (ChatResponse = "application/json"),
            (StreamEvent = "text/event-stream")
        )),
        Refusals
    )
)]
async fn chat_completions(
    State(app): State<Shared>,
    caller: Caller,
    body: JsonObject,
) -> Result<Response, ApiError> {
    let request = ChatRequest::read(&body)?;
    let model = app.check_model(request.sampling.model.as_deref())?;
    let sending = Sending::of(&request.sampling);
    let (job, writer) = aside(&app, move |app| prepare(app, caller, &request, model)).await?;
    choices::answer(&app, job, writer, sending).await
}

/// Everything that takes long before the engine is asked.
fn prepare(
    app: &Shared,
    caller: Caller,
    request: &ChatRequest,
    model: String,
) -> Result<(Job, ChatWriter), ApiError> {
    let (chat, fields) = (&request.chat, &request.sampling);
    let asked = Asked { chat, sampling: fields, form: grammar(fields)?, messages: "messages" };
    let (job, replies) = asked.prepare(app, caller)?;
    let echo = fields.echo.unwrap_or(false).then(|| said_last(chat)).flatten();
    let by_id = fields.return_tokens_as_token_ids.unwrap_or(false);
    let writer = ChatWriter {
        head: Head::new("chatcmpl", fields, model),
        calls: vec![0; replies.len()],
        replies,
        echo,
        logprobs: job.logprobs.is_some(),
        ids: fields.return_token_ids.unwrap_or(false),
        texts: TokenTexts::new(app, by_id, job.skip_special),
    };
    Ok((job, writer))
}

/// The content of the last message, if it is the assistant's.
fn said_last(chat: &ChatFields) -> Option<String> {
    let last = chat.messages.last().filter(|message| message.said_by_assistant())?;
    last.for_template()["content"].as_str().map(str::to_owned)
}

/// Writes what happens to choices as chunks, and chunks as a whole answer.
struct ChatWriter {
    head: Head,
    replies: Vec<Reply>,
    /// Calls of each choice so far.
    calls: Vec<usize>,
    /// Text before the answers.
    echo: Option<String>,
    /// Whether log-probabilities are wanted.
    logprobs: bool,
    /// Whether token ids are.
    ids: bool,
    texts: TokenTexts,
}

impl ChatWriter {
    fn deltas(&mut self, index: usize, text: &str, last: bool) -> Vec<Delta> {
        let pieces = self.replies[index].pieces(text, last);
        let calls = &mut self.calls[index];
        pieces.into_iter().map(|piece| delta(piece, calls)).collect()
    }
}

/// What a piece adds to a message of so many `calls`.
fn delta(piece: Piece, calls: &mut usize) -> Delta {
    match piece {
        Piece::Content(text) => Delta { content: Some(text), ..Delta::default() },
        Piece::Reasoning(text) => Delta { reasoning_content: Some(text), ..Delta::default() },
        Piece::Call { name } => {
            *calls += 1;
            let function = FunctionCallDelta { name: Some(name), arguments: Some(String::new()) };
            let (id, r#type) = (Some(new_id("call")), Some(FunctionWord::Function));
            call_delta(ToolCallDelta { index: *calls - 1, id, r#type, function })
        }
        Piece::Arguments(text) => {
            let function = FunctionCallDelta { name: None, arguments: Some(text) };
            call_delta(ToolCallDelta { index: calls.saturating_sub(1), function, ..ToolCallDelta::default() })
        }
    }
}

fn call_delta(call: ToolCallDelta) -> Delta {
    Delta { tool_calls: vec![call], ..Delta::default() }
}

impl Choices for ChatWriter {
    type Whole = ChatChoice;
    type Part = ChunkChoice;

    fn empty(&self, index: usize) -> ChatChoice {
        ChatChoice {
            index,
            message: AssistantMessage {
                role: ASSISTANT,
                content: self.echo.clone(),
                ..AssistantMessage::default()
            },
            logprobs: self.logprobs.then(ChatLogprobs::default),
            finish_reason: "length",
            stop_reason: None,
            token_ids: self.ids.then(Vec::new),
        }
    }

    /// The role, and what the answers begin with.
    fn opening(&self) -> Vec<ChunkChoice> {
        let content = Some(self.echo.clone().unwrap_or_default());
        let delta = Delta { role: Some(ASSISTANT), content, ..Delta::default() };
        let choice = |index| ChunkChoice { index, delta: delta.clone(), ..ChunkChoice::default() };
        (0..self.replies.len()).map(choice).collect()
    }

    fn parts(&mut self, step: Step) -> Vec<ChunkChoice> {
        let index = step.choice;
        let (deltas, logprobs, token_ids, end) = match step.what {
            What::Prompt(_) => return Vec::new(),
            What::Token { id, logprobs, text } => {
                let content = logprobs.filter(|_| self.logprobs).map(|it| vec![self.texts.of_chat(id, &it)]);
                let logprobs = content.map(|content| ChatLogprobs { content });
                (self.deltas(index, &text, false), logprobs, self.ids.then(|| vec![id]), None)
            }
            What::End { text, end } => (self.deltas(index, &text, true), None, None, Some(end)),
        };
        let plain = |delta| ChunkChoice { index, delta, ..ChunkChoice::default() };
        let mut choices: Vec<ChunkChoice> = deltas.into_iter().map(plain).collect();
        if choices.is_empty() && end.is_none() {
            // A client may count chunks, and sees that the answer goes on. What a parser holds back may become anything.
            if !self.replies[index].parsed {
                choices.push(plain(Delta { content: Some(String::new()), ..Delta::default() }));
            } else if logprobs.is_some() || token_ids.is_some() {
                choices.push(plain(Delta::default()));
            }
        }
        if let Some(first) = choices.first_mut() {
            (first.logprobs, first.token_ids) = (logprobs, token_ids);
        }
        if let Some(end) = end {
            let finish_reason = Some(self.replies[index].finish_reason(end.reason));
            choices.push(ChunkChoice { finish_reason, stop_reason: end.stop, ..plain(Delta::default()) });
        }
        choices
    }

    fn append(choice: &mut ChatChoice, more: ChunkChoice) {
        let message = &mut choice.message;
        add_text(&mut message.content, more.delta.content);
        add_text(&mut message.reasoning_content, more.delta.reasoning_content);
        for call in more.delta.tool_calls {
            let arguments = call.function.arguments.unwrap_or_default();
            match (call.id, call.function.name) {
                (Some(id), Some(name)) => {
                    let function = FunctionCall { name, arguments };
                    message.tool_calls.push(ToolCall { id, r#type: FunctionWord::Function, function });
                }
                _ => message
                    .tool_calls
                    .last_mut()
                    .into_iter()
                    .for_each(|last| last.function.arguments += &arguments),
            }
        }
        if let (Some(all), Some(more)) = (&mut choice.logprobs, more.logprobs) {
            all.content.extend(more.content);
        }
        if let (Some(all), Some(more)) = (&mut choice.token_ids, more.token_ids) {
            all.extend(more);
        }
        choice.finish_reason = more.finish_reason.unwrap_or(choice.finish_reason);
        choice.stop_reason = more.stop_reason.or(choice.stop_reason.take());
    }

    fn answer(self, mut choices: Vec<ChatChoice>, usage: Usage) -> impl Serialize {
        for choice in &mut choices {
            // Nothing said is said in so many words, unless functions are called.
            if choice.message.tool_calls.is_empty() {
                choice.message.content.get_or_insert_default();
            }
        }
        let Head { id, created, model } = self.head;
        ChatResponse { id, object: "chat.completion", created, model, choices, usage }
    }

    fn chunk(&self, part: Option<ChunkChoice>, usage: Option<Usage>) -> impl Serialize {
        let Head { id, created, model } = self.head.clone();
        let choices = part.into_iter().collect();
        ChatChunk { id, object: "chat.completion.chunk", created, model, choices, usage }
    }
}

fn add_text(all: &mut Option<String>, more: Option<String>) {
    if let Some(more) = more {
        all.get_or_insert_default().push_str(&more);
    }
}
