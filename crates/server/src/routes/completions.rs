//! `/v1/completions`: texts go on.

use super::{grammar, usage_wanted};
use crate::app::Shared;
use crate::auth::Caller;
use crate::body::JsonObject;
use crate::generation::{Generation, Job, Step, TokenTexts, What};
use crate::openai::completions::{CompletionChoice, CompletionRequest, CompletionResponse};
use crate::openai::logprobs::CompletionLogprobs;
use crate::openai::{ApiError, ErrorBody, Usage, new_id, now};
use crate::prompt::{aside, decode, encode_prompt};
use crate::sse::{self, Chunks, StreamEvent};
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use axum::{Extension, Json};
use epsmoe_engine::TokenLogprobs;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

pub(crate) fn router() -> OpenApiRouter<Shared> {
    OpenApiRouter::new().routes(routes!(completions))
}

/// Continue texts
#[utoipa::path(
    post,
    path = "/v1/completions",
    tag = "generation",
    request_body = CompletionRequest,
    responses(
        (status = 200, description = "the answers; with `stream` as events, each a chunk of the same shape", content(
            (CompletionResponse = "application/json"),
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
async fn completions(
    State(app): State<Shared>,
    caller: Option<Extension<Caller>>,
    body: JsonObject,
) -> Result<Response, ApiError> {
    let request = CompletionRequest::read(&body)?;
    let model = app.check_model(request.sampling.model.as_deref())?;
    let caller = caller.map(|Extension(caller)| caller).unwrap_or_default();
    let sampling = request.sampling.clone();
    let (job, writer) = aside(&app, move |app| prepare(app, caller, request, model)).await?;
    let generation = Generation::start(&app, job)?;
    if sampling.stream == Some(true) {
        return sse::stream(generation, writer, usage_wanted(sampling.stream_options)).await;
    }
    writer.whole(generation).await.map(|response| Json(response).into_response())
}

/// Everything that takes long before the engine is asked.
fn prepare(
    app: &Shared,
    caller: Caller,
    request: CompletionRequest,
    model: String,
) -> Result<(Job, CompletionWriter), ApiError> {
    let fields = &request.sampling;
    let special = fields.add_special_tokens.unwrap_or(true);
    let echo = fields.echo.unwrap_or(false);
    let skip_special = fields.skip_special_tokens.unwrap_or(true);
    let mut prompts = Vec::with_capacity(request.prompt.len());
    let mut echoes = Vec::new();
    for prompt in request.prompt {
        let (ids, text) = encode_prompt(app, prompt, special)?;
        if echo {
            // Without a tokenizer there is nothing to repeat but ids, and those are asked for by their own field.
            let decoded = || {
                if app.model.tokenizer.is_some() {
                    decode(app, &ids, skip_special, "prompt")
                } else {
                    Ok(String::new())
                }
            };
            echoes.push(text.map_or_else(decoded, Ok)?);
        }
        prompts.push(ids);
    }
    let mut job = Job::new(app, caller, prompts, fields, "prompt")?;
    job.logprobs = request.logprobs;
    job.prompt_logprobs = request.logprobs.filter(|_| echo);
    if let Some((grammar, param)) = grammar(fields)? {
        job.guide = Some(app.guides()?.compile(&grammar, param, None)?);
    }
    let texts = TokenTexts::new(app, fields.return_tokens_as_token_ids.unwrap_or(false), skip_special);
    let writer = CompletionWriter {
        id: fields.request_id.as_ref().map_or_else(|| new_id("cmpl"), |id| format!("cmpl-{id}")),
        created: now(),
        model,
        n: job.n,
        echoes: echo.then_some(echoes),
        offsets: vec![0; job.prompts.len() * job.n],
        prompts: job.prompts.clone(),
        logprobs: job.logprobs.is_some(),
        ids: fields.return_token_ids.unwrap_or(false),
        texts,
    };
    Ok((job, writer))
}

/// Writes what happens to choices as chunks, and chunks as a whole answer.
struct CompletionWriter {
    id: String,
    created: u64,
    model: String,
    n: usize,
    prompts: Vec<Vec<u32>>,
    /// Texts of the prompts, if they come before the answers.
    echoes: Option<Vec<String>>,
    /// Characters of each choice's tokens so far.
    offsets: Vec<usize>,
    /// Whether log-probabilities are wanted.
    logprobs: bool,
    /// Whether token ids are.
    ids: bool,
    texts: TokenTexts,
}

impl CompletionWriter {
    /// All choices at once.
    async fn whole(mut self, mut generation: Generation) -> Result<CompletionResponse, ApiError> {
        let mut choices: Vec<CompletionChoice> =
            (0..generation.len()).map(|index| self.empty(index)).collect();
        while let Some(step) = generation.next().await? {
            let index = step.choice;
            if let Some(more) = self.choice(step) {
                append(&mut choices[index], more);
            }
        }
        Ok(self.response(choices, Some(generation.usage())))
    }

    fn response(&self, choices: Vec<CompletionChoice>, usage: Option<Usage>) -> CompletionResponse {
        CompletionResponse {
            id: self.id.clone(),
            object: "text_completion",
            created: self.created,
            model: self.model.clone(),
            choices,
            usage,
        }
    }

    /// A choice that nothing has happened to.
    fn empty(&self, index: usize) -> CompletionChoice {
        CompletionChoice {
            index,
            logprobs: self.logprobs.then(CompletionLogprobs::default),
            token_ids: self.ids.then(Vec::new),
            ..CompletionChoice::default()
        }
    }

    /// What a step adds to its choice; nothing if that is nothing.
    fn choice(&mut self, step: Step) -> Option<CompletionChoice> {
        let index = step.choice;
        let mut choice = self.empty(index);
        match step.what {
            What::Prompt(logprobs) => {
                let prompt = index / self.n;
                choice.prompt_token_ids = self.ids.then(|| self.prompts[prompt].clone());
                if let Some(echoes) = &self.echoes {
                    choice.text.clone_from(&echoes[prompt]);
                }
                let wanted = choice.logprobs.as_mut();
                for (row, all) in logprobs.iter().zip(wanted) {
                    for (&id, logprobs) in self.prompts[prompt].iter().zip(row) {
                        let offset = &mut self.offsets[index];
                        all.extend(self.texts.of_completion(id, logprobs.as_ref(), *offset));
                        *offset += self.texts.characters(id);
                    }
                }
                if choice.text.is_empty() && choice.prompt_token_ids.is_none() {
                    return None;
                }
            }
            What::Token { id, logprobs, text } => {
                if text.is_empty() && !self.logprobs && !self.ids {
                    return None;
                }
                choice.text = text;
                choice.token_ids = self.ids.then(|| vec![id]);
                self.token(&mut choice, id, logprobs.as_ref());
            }
            What::End { text, end } => {
                choice.text = text;
                choice.finish_reason = Some(end.reason);
                choice.stop_reason = end.stop;
            }
        }
        Some(choice)
    }

    fn token(&mut self, choice: &mut CompletionChoice, id: u32, logprobs: Option<&TokenLogprobs>) {
        if let Some(all) = &mut choice.logprobs {
            let offset = &mut self.offsets[choice.index];
            all.extend(self.texts.of_completion(id, logprobs, *offset));
            *offset += self.texts.characters(id);
        }
    }
}

impl Chunks for CompletionWriter {
    type Chunk = CompletionResponse;

    fn step(&mut self, step: Step, out: &mut Vec<CompletionResponse>) {
        if let Some(mut choice) = self.choice(step) {
            // A chunk without tokens has no list of them.
            choice.logprobs = choice.logprobs.filter(|logprobs| !logprobs.tokens.is_empty());
            out.push(self.response(vec![choice], None));
        }
    }

    fn last(&mut self, usage: Usage) -> CompletionResponse {
        self.response(Vec::new(), Some(usage))
    }

    fn mark(chunk: &mut CompletionResponse, usage: Usage) {
        chunk.usage = Some(usage);
    }
}

fn append(choice: &mut CompletionChoice, more: CompletionChoice) {
    choice.text.push_str(&more.text);
    if let (Some(all), Some(more)) = (&mut choice.logprobs, more.logprobs) {
        all.extend(more);
    }
    if let (Some(all), Some(more)) = (&mut choice.token_ids, more.token_ids) {
        all.extend(more);
    }
    choice.prompt_token_ids = more.prompt_token_ids.or(choice.prompt_token_ids.take());
    choice.finish_reason = more.finish_reason.or(choice.finish_reason);
    choice.stop_reason = more.stop_reason.or(choice.stop_reason.take());
}
