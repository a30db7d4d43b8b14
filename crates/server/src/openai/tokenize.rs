//! Text to tokens and back, without generating.

use super::chat::Message;
use super::tools::Tool;
use super::{Condition, TokenId, either};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use utoipa::openapi::{RefOr, Schema, Type};
use utoipa::{PartialSchema, ToSchema};

/// Either `prompt` or `messages`.
#[derive(Debug, Deserialize)]
#[serde(transparent)]
pub(crate) struct TokenizeRequest(pub(crate) TokenizeFields);

#[derive(Debug, Deserialize, ToSchema)]
pub(crate) struct TokenizeFields {
    pub(crate) model: Option<String>,
    /// A text.
    pub(crate) prompt: Option<String>,
    /// Whether the special tokens that the model wants around every text are added; by default for a text, and not for
    /// messages, whose template writes them.
    pub(crate) add_special_tokens: Option<bool>,
    /// A conversation, as the chat template renders it.
    #[schema(min_items = 1)]
    pub(crate) messages: Option<Vec<Message>>,
    /// Whether the assistant's next message is begun; it is unless this says no.
    pub(crate) add_generation_prompt: Option<bool>,
    /// Whether the last message is left open, to be gone on with.
    pub(crate) continue_final_message: Option<bool>,
    /// Functions that the template is told of.
    pub(crate) tools: Option<Vec<Tool>>,
    /// Further variables of the chat template.
    #[schema(value_type = Option<Object>)]
    pub(crate) chat_template_kwargs: Option<Map<String, Value>>,
    /// Whether the answer also has the tokens as the vocabulary writes them.
    pub(crate) return_token_strs: Option<bool>,
}

/// The fields, and what holds between them.
impl PartialSchema for TokenizeRequest {
    fn schema() -> RefOr<Schema> {
        let RefOr::T(Schema::Object(fields)) = TokenizeFields::schema() else {
            return TokenizeFields::schema();
        };
        let one = [Condition::absent_or("prompt", &[]), Condition::absent_or("messages", &[])];
        either(
            fields,
            [
                one,
                [Condition::is_there("prompt", Type::String), Condition::is_there("messages", Type::Array)],
            ],
        )
    }
}

impl ToSchema for TokenizeRequest {
    fn schemas(schemas: &mut Vec<(String, RefOr<Schema>)>) {
        TokenizeFields::schemas(schemas);
    }
}

#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct TokenizeResponse {
    pub(crate) count: usize,
    pub(crate) max_model_len: usize,
    pub(crate) tokens: Vec<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub(crate) token_strs: Option<Vec<String>>,
}

#[derive(Debug, Deserialize, ToSchema)]
pub(crate) struct DetokenizeRequest {
    pub(crate) model: Option<String>,
    #[schema(value_type = Vec<TokenId>)]
    pub(crate) tokens: Vec<u32>,
}

#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct DetokenizeResponse {
    pub(crate) prompt: String,
}
