//! Text to tokens and back.

use crate::app::{App, Shared};
use crate::body::JsonObject;
use crate::openai::ApiError;
use crate::openai::errors::Refusals;
use crate::openai::tokenize::{
    DetokenizeRequest, DetokenizeResponse, TokenizeFields, TokenizeRequest, TokenizeResponse,
};
use crate::prompt::{Conversation, aside, decode, encode};
use axum::Json;
use axum::extract::State;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

pub(crate) fn router() -> OpenApiRouter<Shared> {
    OpenApiRouter::new().routes(routes!(tokenize)).routes(routes!(detokenize))
}

/// The tokens of a text or of a conversation
#[utoipa::path(
    post,
    path = "/tokenize",
    tag = "tokens",
    request_body = TokenizeRequest,
    responses(
        (status = 200, description = "the tokens", body = TokenizeResponse),
        Refusals
    )
)]
async fn tokenize(State(app): State<Shared>, body: JsonObject) -> Result<Json<TokenizeResponse>, ApiError> {
    let TokenizeRequest(request) = body.read()?;
    app.check_model(request.model.as_deref())?;
    aside(&app, move |app| tokens_of(app, &request)).await.map(Json)
}

fn tokens_of(app: &App, request: &TokenizeFields) -> Result<TokenizeResponse, ApiError> {
    let special = request.add_special_tokens;
    let tokens = match (&request.prompt, &request.messages) {
        (Some(_), Some(_)) => {
            return Err(ApiError::field("messages", "there is a prompt too: give one of the two"));
        }
        (None, None) => return Err(ApiError::field("prompt", "this field is required, or messages")),
        (Some(text), None) => encode(app, text, special.unwrap_or(true), "prompt")?,
        (None, Some(messages)) if messages.is_empty() => {
            return Err(ApiError::field("messages", "the list is empty: give at least one message"));
        }
        (None, Some(messages)) => {
            let continued = request.continue_final_message.unwrap_or(false);
            let conversation = Conversation {
                messages,
                param: "messages",
                tools: request.tools.as_deref(),
                documents: None,
                kwargs: request.chat_template_kwargs.clone().unwrap_or_default(),
                add_generation_prompt: request.add_generation_prompt.unwrap_or(!continued),
                continue_final_message: continued,
            };
            encode(app, &conversation.render(app)?, special.unwrap_or(false), "messages")?
        }
    };
    let written = |id: &u32| app.model.tokenizer.as_ref().and_then(|it| it.token(*id)).unwrap_or_default();
    let token_strs = request.return_token_strs.unwrap_or(false).then(|| tokens.iter().map(written).collect());
    Ok(TokenizeResponse { count: tokens.len(), max_model_len: app.model.max_model_len, tokens, token_strs })
}

/// The text of tokens
#[utoipa::path(
    post,
    path = "/detokenize",
    tag = "tokens",
    request_body = DetokenizeRequest,
    responses(
        (status = 200, description = "the text", body = DetokenizeResponse),
        Refusals
    )
)]
async fn detokenize(
    State(app): State<Shared>,
    body: JsonObject,
) -> Result<Json<DetokenizeResponse>, ApiError> {
    let request: DetokenizeRequest = body.read()?;
    app.check_model(request.model.as_deref())?;
    let prompt = aside(&app, move |app| decode(app, &request.tokens, false, "tokens")).await?;
    Ok(Json(DetokenizeResponse { prompt }))
}
