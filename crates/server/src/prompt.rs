//! Texts and conversations become token ids. Both can take long, so they run beside the connections' threads.

use crate::app::{App, Shared};
use crate::openai::ApiError;
use crate::openai::chat::{ChatFields, Message};
use crate::openai::completions::Prompt;
use crate::openai::tools::Tool;
use epsmoe_text::{RenderRequest, TextError};
use serde_json::{Map, Value};

/// A conversation, as a chat template is asked to render it.
pub(crate) struct Conversation<'a> {
    pub(crate) messages: &'a [Message],
    /// The field that they came from.
    pub(crate) param: &'static str,
    pub(crate) tools: Option<&'a [Tool]>,
    pub(crate) documents: Option<&'a [Map<String, Value>]>,
    pub(crate) kwargs: Map<String, Value>,
    /// Whether the assistant's next message is begun.
    pub(crate) add_generation_prompt: bool,
    /// Whether the last message is left open.
    pub(crate) continue_final_message: bool,
}

impl<'a> Conversation<'a> {
    pub(crate) fn of_chat(fields: &'a ChatFields, with_tools: bool, param: &'static str) -> Self {
        let mut kwargs = fields.chat_template_kwargs.clone().unwrap_or_default();
        if let Some(effort) = &fields.reasoning_effort {
            kwargs.entry("reasoning_effort").or_insert_with(|| effort.as_str().into());
        }
        let continued = fields.continue_final_message.unwrap_or(false);
        Conversation {
            messages: &fields.messages,
            param,
            tools: fields.tools.as_deref().filter(|tools| with_tools && !tools.is_empty()),
            documents: fields.documents.as_deref(),
            kwargs,
            add_generation_prompt: fields.add_generation_prompt.unwrap_or(!continued),
            continue_final_message: continued,
        }
    }

    /// The prompt's text.
    pub(crate) fn render(&self, app: &App) -> Result<String, ApiError> {
        let none = || ApiError::field(self.param, "this model has no chat template: use /v1/completions");
        let template = app.model.template.as_ref().ok_or_else(none)?;
        let messages: Vec<Value> = self.messages.iter().map(Message::for_template).collect();
        let json = |tool: &Tool| serde_json::to_value(tool).unwrap_or_default();
        let tools: Option<Vec<Value>> = self.tools.map(|tools| tools.iter().map(json).collect());
        let document = |document: &Map<String, Value>| Value::Object(document.clone());
        let documents: Option<Vec<Value>> = self.documents.map(|all| all.iter().map(document).collect());
        let text = template.render(&RenderRequest {
            messages: &messages,
            tools: tools.as_deref(),
            documents: documents.as_deref(),
            kwargs: Some(&self.kwargs),
            add_generation_prompt: self.add_generation_prompt,
            continue_final_message: false,
            max_bytes: most_bytes(app),
        });
        let text = text.map_err(|error| ApiError::field(self.param, error.to_string()))?;
        if self.continue_final_message { self.left_open(text, &messages) } else { Ok(text) }
    }

    /// The text up to the end of the last message's content, without what the template puts behind it.
    fn left_open(&self, mut text: String, messages: &[Value]) -> Result<String, ApiError> {
        let content =
            messages.last().and_then(|message| message["content"].as_str()).unwrap_or_default().trim();
        let assistant = self.messages.last().is_some_and(Message::said_by_assistant);
        if !assistant || content.is_empty() {
            return Err(ApiError::field("continue_final_message", "the last message is not the assistant's"));
        }
        let Some(at) = text.rfind(content) else {
            return Err(ApiError::field(
                "continue_final_message",
                "the chat template changes the last message",
            ));
        };
        text.truncate(at + content.len());
        Ok(text)
    }
}

/// Token ids of a text. `param` is the field that it came from.
pub(crate) fn encode(app: &App, text: &str, special: bool, param: &str) -> Result<Vec<u32>, ApiError> {
    let tokenizer = app.tokenizer(param)?;
    check_length(app, text, param)?;
    let ids = if special { tokenizer.encode_special(text) } else { tokenizer.encode(text) };
    ids.map_err(|error| ApiError::field(param, error.to_string()))
}

/// More bytes than a text has that fits.
fn most_bytes(app: &App) -> usize {
    /// Some tokens are longer, but no text consists of those.
    const BYTES_OF_A_TOKEN: usize = 32;
    app.model.max_model_len.saturating_mul(BYTES_OF_A_TOKEN)
}

/// Refuses a text that cannot fit, before all of it is taken apart.
fn check_length(app: &App, text: &str, param: &str) -> Result<(), ApiError> {
    let most = app.model.max_model_len;
    if text.len() > most_bytes(app) {
        let asked = format!("your prompt has {} bytes, which are more tokens than that", text.len());
        return Err(ApiError::context_length(most, param, asked));
    }
    Ok(())
}

/// Token ids of one prompt, and its text where that is known.
pub(crate) fn encode_prompt(
    app: &App,
    prompt: Prompt,
    special: bool,
) -> Result<(Vec<u32>, Option<String>), ApiError> {
    match prompt {
        Prompt::Ids(ids) => Ok((ids, None)),
        Prompt::Text(text) => Ok((encode(app, &text, special, "prompt")?, Some(text))),
    }
}

/// Text of token ids. `param` is the field that they came from.
pub(crate) fn decode(app: &App, ids: &[u32], skip_special: bool, param: &str) -> Result<String, ApiError> {
    if let Some(id) = ids.iter().find(|&&id| id as usize >= app.model.vocab) {
        let problem = format!("{id} is no token: the vocabulary ends at {}", app.model.vocab - 1);
        return Err(ApiError::field(param, problem));
    }
    let text = app.tokenizer(param)?.decode(ids, skip_special);
    text.map_err(|error: TextError| ApiError::field(param, error.to_string()))
}

/// Runs long work beside the connections' threads.
pub(crate) async fn aside<T: Send + 'static>(
    app: &Shared,
    work: impl FnOnce(&Shared) -> Result<T, ApiError> + Send + 'static,
) -> Result<T, ApiError> {
    let app = app.clone();
    let done = tokio::task::spawn_blocking(move || work(&app)).await;
    done.unwrap_or_else(|error| Err(ApiError::internal(format!("reading the request failed: {error}"))))
}
