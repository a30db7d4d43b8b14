//! Prompts: a text or a conversation becomes token ids, by the tokenizer and the chat template in a model's folder or
//! GGUF file.

use crate::args::TextArgs;
use anyhow::{Context, Result, bail};
use epsmoe_base::files::read_plain;
use epsmoe_base::json::from_python;
use epsmoe_text::{ChatTemplate, RenderRequest, Tokenizer};
use serde_json::{Map, Value, json};
use std::path::Path;

/// Bytes of a conversation's file: beyond any context.
const MOST_BYTES: u64 = 64 << 20;

/// Token ids of what was typed.
pub(crate) fn encode(
    place: Option<&Path>,
    model: &str,
    tokenizer: Option<&Tokenizer>,
    text: &TextArgs,
) -> Result<Vec<u32>> {
    let place = place.with_context(|| format!("{model} has no tokenizer: give the prompt as --ids"))?;
    let tokenizer = tokenizer.with_context(|| {
        let what = if place.is_dir() { "tokenizer.json" } else { "vocabulary" };
        format!("{} has no {what}: give the prompt as --ids", place.display())
    })?;
    let conversation = match (&text.messages, &text.prompt) {
        (Some(file), _) => Conversation::read(file)?,
        (None, Some(prompt)) if text.chat => Conversation::of(prompt, text.system.as_deref()),
        (None, Some(_)) if text.chat_template_kwargs.is_some() => {
            bail!("--chat-template-kwargs are for the chat template: give --chat or --messages too")
        }
        (None, Some(prompt)) => return Ok(tokenizer.encode_special(prompt)?),
        (None, None) => bail!("there is no prompt: give --prompt or --messages"),
    };
    let template = ChatTemplate::open(place)?.with_context(|| {
        let instead = "leave out --chat or --messages and write the whole prompt";
        format!("{} has no chat template: {instead}", place.display())
    })?;
    let mut kwargs = conversation.kwargs.unwrap_or_default();
    kwargs.extend(text.chat_template_kwargs.iter().flat_map(|typed| typed.0.clone()));
    let request = RenderRequest {
        messages: &conversation.messages,
        tools: conversation.tools.as_deref(),
        documents: conversation.documents.as_deref(),
        kwargs: Some(&kwargs),
        add_generation_prompt: true,
        ..RenderRequest::default()
    };
    Ok(tokenizer.encode(&template.render(&request)?)?)
}

/// What a chat template is given.
struct Conversation {
    messages: Vec<Value>,
    tools: Option<Vec<Value>>,
    documents: Option<Vec<Value>>,
    kwargs: Option<Map<String, Value>>,
}

impl Conversation {
    fn of(prompt: &str, system: Option<&str>) -> Self {
        let message = |role: &str, content: &str| json!({ "role": role, "content": content });
        let system = system.map(|system| message("system", system));
        let messages = system.into_iter().chain([message("user", prompt)]).collect();
        Conversation { messages, tools: None, documents: None, kwargs: None }
    }

    /// A file with a list of messages, or with a request's object as servers take it.
    fn read(file: &Path) -> Result<Self> {
        let shown = file.display();
        let bytes = read_plain(file, MOST_BYTES).with_context(|| format!("cannot read {shown}"))?;
        let value: Value = serde_json::from_slice(&from_python(&bytes))
            .with_context(|| format!("{shown} is not valid JSON"))?;
        let mut keys = match value {
            Value::Array(messages) => Map::from_iter([("messages".to_owned(), messages.into())]),
            Value::Object(keys) => keys,
            _ => bail!("{shown} must hold a list of messages, or an object with `messages`"),
        };
        let mut list = |key: &str| match keys.remove(key) {
            None | Some(Value::Null) => Ok(None),
            Some(Value::Array(all)) if all.iter().all(Value::is_object) => Ok(Some(all)),
            Some(_) => bail!("{shown}: `{key}` must be a list of objects"),
        };
        let (messages, tools, documents) = (list("messages")?, list("tools")?, list("documents")?);
        let Some(messages) = messages.filter(|all| !all.is_empty()) else {
            bail!(
                "{shown} holds no messages: give a list like [{{\"role\": \"user\", \"content\": \"Hello\"}}]"
            )
        };
        let kwargs = match keys.remove("chat_template_kwargs") {
            None | Some(Value::Null) => None,
            Some(Value::Object(kwargs)) => Some(kwargs),
            Some(_) => bail!("{shown}: `chat_template_kwargs` must be an object"),
        };
        Ok(Conversation { messages, tools, documents, kwargs })
    }
}
