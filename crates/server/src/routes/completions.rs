//! `/v1/completions`: texts go on.

use super::grammar;
use crate::app::Shared;
use crate::auth::Caller;
use crate::body::JsonObject;
use crate::choices::{self, Choices, Head, Sending};
use crate::generation::{Job, Step, TokenTexts, What};
use crate::openai::completions::{CompletionChoice, CompletionRequest, CompletionResponse};
use crate::openai::errors::Refusals;
use crate::openai::logprobs::CompletionLogprobs;
use crate::openai::{ApiError, Usage};
use crate::prompt::{aside, decode, encode_prompt};
use crate::sse::StreamEvent;
use axum::extract::State;
use axum::response::Response;
use epsmoe_engine::TokenLogprobs;
use serde::Serialize;
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
        Refusals
    )
)]
async fn completions(
    State(app): State<Shared>,
    caller: Caller,
    body: JsonObject,
) -> Result<Response, ApiError> {
    let request = CompletionRequest::read(&body)?;
    let model = app.check_model(request.sampling.model.as_deref())?;
    let sending = Sending::of(&request.sampling);
    let (job, writer) = aside(&app, move |app| prepare(app, caller, request, model)).await?;
    choices::answer(&app, job, writer, sending).await
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
        head: Head::new("cmpl", fields, model),
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
    head: Head,
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
    /// What a step adds to its choice; nothing if that is nothing.
    fn part(&mut self, step: Step) -> Option<CompletionChoice> {
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
                // Also without text: a client may count chunks, and sees that the answer goes on.
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

impl Choices for CompletionWriter {
    type Whole = CompletionChoice;
    type Part = CompletionChoice;

    fn empty(&self, index: usize) -> CompletionChoice {
        CompletionChoice {
            index,
            logprobs: self.logprobs.then(CompletionLogprobs::default),
            token_ids: self.ids.then(Vec::new),
            ..CompletionChoice::default()
        }
    }

    fn parts(&mut self, step: Step) -> Vec<CompletionChoice> {
        self.part(step).into_iter().collect()
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

    fn answer(self, choices: Vec<CompletionChoice>, usage: Usage) -> impl Serialize {
        response(self.head, choices, Some(usage))
    }

    fn chunk(&self, part: Option<CompletionChoice>, usage: Option<Usage>) -> impl Serialize {
        let mut choices: Vec<CompletionChoice> = part.into_iter().collect();
        for choice in &mut choices {
            // A chunk without tokens has no list of them.
            choice.logprobs = choice.logprobs.take().filter(|logprobs| !logprobs.tokens.is_empty());
        }
        response(self.head.clone(), choices, usage)
    }
}

fn response(head: Head, choices: Vec<CompletionChoice>, usage: Option<Usage>) -> CompletionResponse {
    let Head { id, created, model } = head;
    CompletionResponse { id, object: "text_completion", created, model, choices, usage }
}
