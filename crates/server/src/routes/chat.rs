//! `/v1/chat/completions`: the next message of a conversation.

use super::{grammar, usage_wanted};
use crate::app::{App, Shared};
use crate::auth::Caller;
use crate::body::JsonObject;
use crate::calls;
use crate::generation::{Generation, Job, Step, TokenTexts, What};
use crate::guide::Grammar;
use crate::openai::chat::{
    AssistantMessage, ChatChoice, ChatChunk, ChatFields, ChatRequest, ChatResponse, ChunkChoice, Delta,
};
use crate::openai::logprobs::ChatLogprobs;
use crate::openai::tools::{
    FunctionCall, FunctionCallDelta, FunctionWord, ToolCall, ToolCallDelta, ToolChoice,
};
use crate::openai::{ApiError, ErrorBody, Usage, new_id, now};
use crate::parsers::{self, Parser, Piece};
use crate::prompt::{Conversation, aside, encode};
use crate::sse::{self, Chunks, StreamEvent};
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use axum::{Extension, Json};
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
        (status = 400, body = ErrorBody, description = "the request is wrong"),
        (status = 401, body = ErrorBody, description = "no key"),
        (status = 404, body = ErrorBody, description = "no such model"),
        (status = 413, body = ErrorBody, description = "the body is too large"),
        (status = 415, body = ErrorBody, description = "the body is no JSON"),
        (status = 503, body = ErrorBody, description = "too much to do")
    )
)]
async fn chat_completions(
    State(app): State<Shared>,
    caller: Option<Extension<Caller>>,
    body: JsonObject,
) -> Result<Response, ApiError> {
    let request = ChatRequest::read(&body)?;
    let model = app.check_model(request.sampling.model.as_deref())?;
    let caller = caller.map(|Extension(caller)| caller).unwrap_or_default();
    let (stream, options) = (request.sampling.stream == Some(true), request.sampling.stream_options);
    let (job, writer) = aside(&app, move |app| prepare(app, caller, &request, model)).await?;
    let generation = Generation::start(&app, job)?;
    if stream {
        return sse::stream(generation, writer, usage_wanted(options)).await;
    }
    writer.whole(generation).await.map(|response| Json(response).into_response())
}

/// Everything that takes long before the engine is asked.
fn prepare(
    app: &Shared,
    caller: Caller,
    request: &ChatRequest,
    model: String,
) -> Result<(Job, ChatWriter), ApiError> {
    let (chat, fields) = (&request.chat, &request.sampling);
    let choice = chat.choice();
    let prompt = Conversation::of_chat(chat, choice != ToolChoice::None).render(app)?;
    let ids = encode(app, &prompt, fields.add_special_tokens.unwrap_or(false), "messages")?;
    let mut job = Job::new(app, caller, vec![ids], fields, "messages")?;
    job.logprobs = chat.logprobs();
    let thinking = app.options.reasoning.filter(|reasoning| reasoning.begun_in(&prompt));
    if let Some((grammar, param)) = wanted_form(chat, &choice, grammar(fields)?)? {
        let after = thinking.map(|reasoning| reasoning.close());
        job.guide = Some(app.guides()?.compile(&grammar, param, after)?);
    }
    let reads_calls = choice == ToolChoice::Auto && app.options.tool_parser.is_some();
    if reads_calls || app.options.reasoning.is_some() {
        // The marks that parsers look for are often special tokens.
        job.skip_special = fields.skip_special_tokens.unwrap_or(false);
    }
    let skip_special = job.skip_special;
    let answers = (0..job.n).map(|_| Answer::new(app, chat, &choice, thinking.is_some())).collect();
    let echo = fields.echo.unwrap_or(false).then(|| said_last(chat)).flatten();
    let writer = ChatWriter {
        id: fields.request_id.as_ref().map_or_else(|| new_id("chatcmpl"), |id| format!("chatcmpl-{id}")),
        created: now(),
        model,
        answers,
        opened: false,
        echo,
        logprobs: job.logprobs.is_some(),
        ids: fields.return_token_ids.unwrap_or(false),
        texts: TokenTexts::new(app, fields.return_tokens_as_token_ids.unwrap_or(false), skip_special),
    };
    Ok((job, writer))
}

/// What the answer must look like, and the field that says so: a form, or calls of functions.
fn wanted_form(
    chat: &ChatFields,
    choice: &ToolChoice,
    form: Option<(Grammar, &'static str)>,
) -> Result<Option<(Grammar, &'static str)>, ApiError> {
    let tools = chat.tools.as_deref().unwrap_or_default();
    let calls = match choice {
        ToolChoice::None | ToolChoice::Auto => return Ok(form),
        ToolChoice::Named(name) => calls::arguments_of(tools, name),
        ToolChoice::Required => calls::list_of_calls(tools, chat.parallel_tool_calls != Some(false)),
    };
    match form {
        Some((_, param)) => {
            Err(ApiError::field(param, "tool_choice wants calls of functions: leave one of them out"))
        }
        None => Ok(Some((Grammar::Json(calls), "tools"))),
    }
}

/// The content of the last message, if it is the assistant's.
fn said_last(chat: &ChatFields) -> Option<String> {
    let last = chat.messages.last().filter(|message| message.said_by_assistant())?;
    last.for_template()["content"].as_str().map(str::to_owned)
}

/// One answer on its way from text to a message.
struct Answer {
    parser: Box<dyn Parser>,
    /// Calls so far.
    calls: usize,
    /// Whether only one may be made.
    one_call: bool,
    /// Whether the client named the function: an answer that is the call then ends as others do, with `stop`.
    named: bool,
    /// Whether reasoning is told.
    reasoning: bool,
}

impl Answer {
    fn new(app: &App, chat: &ChatFields, choice: &ToolChoice, thinking: bool) -> Self {
        let tools = chat.tools.as_deref().unwrap_or_default();
        let answer = match (choice, app.options.tool_parser) {
            (ToolChoice::Named(name), _) => parsers::named_call(name),
            (ToolChoice::Required, _) => parsers::required_calls(),
            (ToolChoice::Auto, Some(parser)) => parser.parser(tools),
            (ToolChoice::Auto | ToolChoice::None, _) => parsers::plain(),
        };
        let parser = match app.options.reasoning {
            Some(reasoning) => reasoning.parser(thinking, answer),
            None => answer,
        };
        Answer {
            parser,
            calls: 0,
            one_call: chat.parallel_tool_calls == Some(false),
            named: matches!(choice, ToolChoice::Named(_)),
            reasoning: chat.include_reasoning.unwrap_or(true),
        }
    }

    /// What more text adds to the message; at the `last` of it also what was held back.
    fn deltas(&mut self, text: &str, last: bool) -> Vec<Delta> {
        let mut pieces = Vec::new();
        self.parser.push(text, &mut pieces);
        if last {
            self.parser.finish(&mut pieces);
        }
        pieces.into_iter().filter_map(|piece| self.delta(piece)).collect()
    }

    fn delta(&mut self, piece: Piece) -> Option<Delta> {
        match piece {
            Piece::Content(text) => Some(Delta { content: Some(text), ..Delta::default() }),
            Piece::Reasoning(text) => {
                self.reasoning.then(|| Delta { reasoning_content: Some(text), ..Delta::default() })
            }
            Piece::Call { name } => {
                self.calls += 1;
                let function = FunctionCallDelta { name: Some(name), arguments: Some(String::new()) };
                let (id, r#type) = (Some(new_id("call")), Some(FunctionWord::Function));
                self.call(ToolCallDelta { index: self.calls - 1, id, r#type, function })
            }
            Piece::Arguments(text) => {
                let function = FunctionCallDelta { name: None, arguments: Some(text) };
                let index = self.calls.saturating_sub(1);
                self.call(ToolCallDelta { index, function, ..ToolCallDelta::default() })
            }
        }
    }

    fn call(&self, call: ToolCallDelta) -> Option<Delta> {
        let wanted = call.index == 0 || !self.one_call;
        wanted.then(|| Delta { tool_calls: vec![call], ..Delta::default() })
    }

    /// `tool_calls` where the model chose to end with some.
    fn finish_reason(&self, reason: &'static str) -> &'static str {
        if reason == "stop" && self.calls > 0 && !self.named { "tool_calls" } else { reason }
    }
}

/// Writes what happens to choices as chunks, and chunks as a whole answer.
struct ChatWriter {
    id: String,
    created: u64,
    model: String,
    answers: Vec<Answer>,
    /// Whether the chunks with the role have been written.
    opened: bool,
    /// Text before the answers.
    echo: Option<String>,
    /// Whether log-probabilities are wanted.
    logprobs: bool,
    /// Whether token ids are.
    ids: bool,
    texts: TokenTexts,
}

impl ChatWriter {
    /// All choices at once.
    async fn whole(mut self, mut generation: Generation) -> Result<ChatResponse, ApiError> {
        let mut choices: Vec<ChatChoice> = (0..generation.len()).map(|index| self.empty(index)).collect();
        while let Some(step) = generation.next().await? {
            for more in self.choices(step) {
                append(&mut choices[more.index], more);
            }
        }
        for choice in &mut choices {
            // Nothing said is said in so many words, unless functions are called.
            if choice.message.tool_calls.is_empty() {
                choice.message.content.get_or_insert_default();
            }
        }
        Ok(ChatResponse {
            id: self.id,
            object: "chat.completion",
            created: self.created,
            model: self.model,
            choices,
            usage: generation.usage(),
        })
    }

    /// A choice that nothing has happened to.
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

    /// What a step adds to its choice, in one or several pieces.
    fn choices(&mut self, step: Step) -> Vec<ChunkChoice> {
        let index = step.choice;
        let answer = &mut self.answers[index];
        let (deltas, logprobs, token_ids, end) = match step.what {
            What::Prompt(_) => return Vec::new(),
            What::Token { id, logprobs, text } => {
                let content = logprobs.filter(|_| self.logprobs).map(|it| vec![self.texts.of_chat(id, &it)]);
                let logprobs = content.map(|content| ChatLogprobs { content });
                (answer.deltas(&text, false), logprobs, self.ids.then(|| vec![id]), None)
            }
            What::End { text, end } => (answer.deltas(&text, true), None, None, Some(end)),
        };
        let plain = |delta| ChunkChoice { index, delta, ..ChunkChoice::default() };
        let mut choices: Vec<ChunkChoice> = deltas.into_iter().map(plain).collect();
        if choices.is_empty() && (logprobs.is_some() || token_ids.is_some()) {
            choices.push(plain(Delta::default()));
        }
        if let Some(first) = choices.first_mut() {
            (first.logprobs, first.token_ids) = (logprobs, token_ids);
        }
        if let Some(end) = end {
            let finish_reason = Some(answer.finish_reason(end.reason));
            choices.push(ChunkChoice { finish_reason, stop_reason: end.stop, ..plain(Delta::default()) });
        }
        choices
    }

    fn chunk(&self, choices: Vec<ChunkChoice>, usage: Option<Usage>) -> ChatChunk {
        ChatChunk {
            id: self.id.clone(),
            object: "chat.completion.chunk",
            created: self.created,
            model: self.model.clone(),
            choices,
            usage,
        }
    }
}

impl Chunks for ChatWriter {
    type Chunk = ChatChunk;

    fn step(&mut self, step: Step, out: &mut Vec<ChatChunk>) {
        if !self.opened {
            self.opened = true;
            for index in 0..self.answers.len() {
                let content = Some(self.echo.clone().unwrap_or_default());
                let delta = Delta { role: Some(ASSISTANT), content, ..Delta::default() };
                out.push(self.chunk(vec![ChunkChoice { index, delta, ..ChunkChoice::default() }], None));
            }
        }
        let choices = self.choices(step);
        out.extend(choices.into_iter().map(|choice| self.chunk(vec![choice], None)));
    }

    fn last(&mut self, usage: Usage) -> ChatChunk {
        self.chunk(Vec::new(), Some(usage))
    }

    fn mark(chunk: &mut ChatChunk, usage: Usage) {
        chunk.usage = Some(usage);
    }
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

fn add_text(all: &mut Option<String>, more: Option<String>) {
    if let Some(more) = more {
        all.get_or_insert_default().push_str(&more);
    }
}
