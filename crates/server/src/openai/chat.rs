//! `/v1/chat/completions`.

use super::completions::{MAX_LOGPROBS, StopReason, check_logprobs};
use super::logprobs::ChatLogprobs;
use super::sampling::{SamplingFields, at_least};
use super::tools::{Tool, ToolCall, ToolCallDelta, ToolChoice};
use super::{ApiError, Condition, OneOrMany, Usage, either, least_and_most, merged, one_or_many, streamed};
use crate::body::JsonObject;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use utoipa::openapi::schema::AnyOf;
use utoipa::openapi::{RefOr, Schema};
use utoipa::{PartialSchema, ToSchema};

/// A request for the next message of a conversation.
#[derive(Debug)]
pub(crate) struct ChatRequest {
    pub(crate) chat: ChatFields,
    pub(crate) sampling: SamplingFields,
}

#[derive(Debug, Default, Deserialize, ToSchema)]
pub(crate) struct ChatFields {
    /// The conversation so far.
    #[schema(min_items = 1)]
    pub(crate) messages: Vec<Message>,
    /// The same as `max_tokens`, and goes before it.
    #[schema(minimum = 0)]
    pub(crate) max_completion_tokens: Option<i64>,
    /// Whether log-probabilities are wanted.
    pub(crate) logprobs: Option<bool>,
    /// Alternatives of each token; wants `logprobs`.
    #[schema(minimum = 0, maximum = 20)]
    pub(crate) top_logprobs: Option<i64>,
    /// Functions that the model may call.
    pub(crate) tools: Option<Vec<Tool>>,
    pub(crate) tool_choice: Option<ToolChoice>,
    /// Whether one answer may have several calls; it may unless this says no.
    pub(crate) parallel_tool_calls: Option<bool>,
    /// Whether the assistant's next message is begun; it is unless this says no.
    pub(crate) add_generation_prompt: Option<bool>,
    /// Whether the last message is left open and gone on with.
    pub(crate) continue_final_message: Option<bool>,
    /// Further variables of the chat template.
    #[schema(value_type = Option<Object>)]
    pub(crate) chat_template_kwargs: Option<Map<String, Value>>,
    /// Texts that the template may put before the conversation.
    #[schema(value_type = Option<Vec<Object>>)]
    pub(crate) documents: Option<Vec<Map<String, Value>>>,
    /// A variable of the chat template, where it has it.
    pub(crate) reasoning_effort: Option<String>,
    /// Whether the model's reasoning comes back; it does unless this says no.
    pub(crate) include_reasoning: Option<bool>,
}

impl ChatRequest {
    pub(crate) fn read(object: &JsonObject) -> Result<Self, ApiError> {
        let chat: ChatFields = object.read()?;
        let mut sampling = SamplingFields::read(object)?;
        at_least("max_completion_tokens", chat.max_completion_tokens, 0)?;
        sampling.max_tokens = chat.max_completion_tokens.or(sampling.max_tokens);
        chat.check("messages")?;
        Ok(ChatRequest { chat, sampling })
    }
}

impl ChatFields {
    /// The conversation as templates see it.
    #[cfg(test)]
    pub(crate) fn conversation(&self) -> Value {
        self.messages.iter().map(Message::for_template).collect()
    }

    /// Alternatives of each token, if log-probabilities are wanted.
    pub(crate) fn logprobs(&self) -> Option<usize> {
        let alternatives = self.top_logprobs.unwrap_or(0).clamp(0, MAX_LOGPROBS) as usize;
        (self.logprobs == Some(true)).then_some(alternatives)
    }

    /// Functions are called if there are any, unless the request says otherwise.
    pub(crate) fn choice(&self) -> ToolChoice {
        let any = self.tools.as_ref().is_some_and(|tools| !tools.is_empty());
        match &self.tool_choice {
            Some(choice) => choice.clone(),
            None if any => ToolChoice::Auto,
            None => ToolChoice::None,
        }
    }

    /// Refuses what contradicts itself; the conversation is in the field `messages`.
    pub(crate) fn check(&self, messages: &str) -> Result<(), ApiError> {
        if self.messages.is_empty() {
            return Err(ApiError::field(messages, "the list is empty: give at least one message"));
        }
        check_logprobs("top_logprobs", self.top_logprobs)?;
        if self.top_logprobs.is_some_and(|count| count > 0) && self.logprobs != Some(true) {
            return Err(ApiError::field("top_logprobs", "log-probabilities are off: set logprobs to true"));
        }
        if self.continue_final_message == Some(true) && self.add_generation_prompt == Some(true) {
            let problem = "the last message is gone on with, or a new one begun: set only one of the two";
            return Err(ApiError::field("continue_final_message", problem));
        }
        self.check_tools()
    }

    fn check_tools(&self) -> Result<(), ApiError> {
        let tools = self.tools.as_deref().unwrap_or_default();
        if let Some(nameless) = tools.iter().position(|tool| tool.function.name.is_empty()) {
            return Err(ApiError::field("tools", format!("tools[{nameless}].function.name: is empty")));
        }
        match self.choice() {
            ToolChoice::Required if tools.is_empty() => {
                Err(ApiError::field("tool_choice", "a call is required, but there are no tools"))
            }
            ToolChoice::Named(name) if !tools.iter().any(|tool| tool.function.name == name) => {
                Err(ApiError::field("tool_choice", format!("`{name}` is not among the tools")))
            }
            _ => Ok(()),
        }
    }
}

impl PartialSchema for ChatRequest {
    fn schema() -> RefOr<Schema> {
        let fields = merged(ChatFields::schema(), SamplingFields::schema());
        let calls = [
            Condition::absent_or("tool_choice", &["none".into(), "auto".into()]),
            Condition::has_some("tools"),
        ];
        let alternatives =
            [Condition::absent_or("top_logprobs", &[0.into()]), Condition::is_true("logprobs")];
        let lengths = least_and_most(&["max_tokens", "max_completion_tokens"]);
        either(fields, [streamed(), calls, alternatives, lengths])
    }
}

impl ToSchema for ChatRequest {
    fn schemas(schemas: &mut Vec<(String, RefOr<Schema>)>) {
        ChatFields::schemas(schemas);
        SamplingFields::schemas(schemas);
    }
}

/// A message of a conversation.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(try_from = "OpenMessage")]
pub(crate) struct Message(OpenMessage);

/// A message whose content has not been checked.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, ToSchema)]
struct OpenMessage {
    /// Who speaks: `system`, `developer`, `user`, `assistant`, `tool`.
    role: String,
    /// What is said.
    #[schema(schema_with = one_or_many::optional_schema::<ContentPart>)]
    content: Option<OneOrMany<ContentPart>>,
    /// Who it is, among several of the role.
    name: Option<String>,
    /// What the assistant thought before.
    #[serde(alias = "reasoning")]
    reasoning_content: Option<String>,
    /// What the assistant called.
    tool_calls: Option<Vec<ToolCall>>,
    /// Which call this is the result of.
    tool_call_id: Option<String>,
}

/// A piece of a message.
#[derive(Clone, Debug, PartialEq, Deserialize, ToSchema)]
struct ContentPart {
    #[allow(dead_code, reason = "only its value is checked")]
    r#type: PartKind,
    text: String,
}

/// What a piece of a message can be: these models read text.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
enum PartKind {
    Text,
}

impl TryFrom<OpenMessage> for Message {
    type Error = String;

    /// Only the assistant may say nothing.
    fn try_from(message: OpenMessage) -> Result<Self, String> {
        if message.content.is_none() && message.role != "assistant" {
            return Err(format!("a message of `{}` has no content", message.role));
        }
        Ok(Message(message))
    }
}

impl Message {
    /// A text that somebody says.
    pub(crate) fn saying(role: &str, text: String) -> Self {
        let content = Some(OneOrMany::One(text));
        Message(OpenMessage { role: role.to_owned(), content, ..OpenMessage::default() })
    }

    /// What a call gave.
    pub(crate) fn result(call: String, text: String) -> Self {
        let mut message = Message::saying("tool", text);
        message.0.tool_call_id = Some(call);
        message
    }

    /// Adds to what is said.
    pub(crate) fn say(&mut self, text: &str) {
        self.0.content = Some(OneOrMany::One(self.text() + text));
    }

    /// Adds to what was thought before.
    pub(crate) fn think(&mut self, text: &str) {
        self.0.reasoning_content.get_or_insert_default().push_str(text);
    }

    /// Adds a call.
    pub(crate) fn call(&mut self, call: ToolCall) {
        self.0.tool_calls.get_or_insert_default().push(call);
    }

    /// Whether nothing is said yet, and nothing called: only thought.
    pub(crate) fn only_thinks(&self) -> bool {
        self.0.reasoning_content.is_some() && self.text().is_empty() && self.0.tool_calls.is_none()
    }

    /// What is said, in one piece.
    fn text(&self) -> String {
        match &self.0.content {
            None => String::new(),
            Some(OneOrMany::One(text)) => text.clone(),
            Some(OneOrMany::Many(parts)) => parts.iter().map(|part| part.text.as_str()).collect(),
        }
    }

    /// As chat templates read it: text in one piece, arguments of calls as objects.
    pub(crate) fn for_template(&self) -> Value {
        let message = &self.0;
        let mut object = Map::new();
        object.insert("role".into(), message.role.clone().into());
        object.insert("content".into(), self.text().into());
        let optional = [
            ("name", &message.name),
            ("reasoning_content", &message.reasoning_content),
            ("tool_call_id", &message.tool_call_id),
        ];
        for (key, value) in optional {
            if let Some(value) = value {
                object.insert(key.into(), value.clone().into());
            }
        }
        if let Some(calls) = message.tool_calls.as_ref().filter(|calls| !calls.is_empty()) {
            object.insert("tool_calls".into(), calls.iter().map(call_for_template).collect());
        }
        object.into()
    }

    /// What is said, if it is the assistant who does.
    pub(crate) fn said_by_assistant(&self) -> bool {
        self.0.role == "assistant"
    }
}

/// Arguments are an object, unless they were cut.
fn call_for_template(call: &ToolCall) -> Value {
    let text = call.function.arguments.as_str();
    let arguments = match serde_json::from_str(text) {
        Ok(object @ Value::Object(_)) => object,
        _ if text.trim().is_empty() => Map::new().into(),
        _ => text.into(),
    };
    let function = json!({ "name": call.function.name, "arguments": arguments });
    json!({ "id": call.id, "type": "function", "function": function })
}

impl PartialSchema for Message {
    /// A message of the assistant, or one with content.
    fn schema() -> RefOr<Schema> {
        let RefOr::T(Schema::Object(mut assistant)) = OpenMessage::schema() else {
            return OpenMessage::schema();
        };
        let mut other = assistant.clone();
        if let Some(RefOr::T(Schema::Object(role))) = assistant.properties.get_mut("role") {
            role.enum_values = Some(vec!["assistant".into()]);
        }
        let content = one_or_many::schema::<ContentPart>();
        other.properties.insert("content".into(), content);
        other.required.push("content".into());
        AnyOf::builder().item(other).item(assistant).into()
    }
}

impl ToSchema for Message {
    fn schemas(schemas: &mut Vec<(String, RefOr<Schema>)>) {
        OpenMessage::schemas(schemas);
        ContentPart::schemas(schemas);
    }
}

/// A whole answer.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct ChatResponse {
    pub(crate) id: String,
    /// `chat.completion`
    pub(crate) object: &'static str,
    pub(crate) created: u64,
    pub(crate) model: String,
    pub(crate) choices: Vec<ChatChoice>,
    pub(crate) usage: Usage,
}

#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct ChatChoice {
    pub(crate) index: usize,
    pub(crate) message: AssistantMessage,
    #[schema(required)]
    pub(crate) logprobs: Option<ChatLogprobs>,
    /// `stop`, `length` or `tool_calls`.
    pub(crate) finish_reason: &'static str,
    /// The text or token that ended the answer.
    #[schema(required)]
    pub(crate) stop_reason: Option<StopReason>,
    /// Ids of the new tokens, if wanted.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) token_ids: Option<Vec<u32>>,
}

/// What the assistant says.
#[derive(Clone, Debug, Default, PartialEq, Serialize, ToSchema)]
pub(crate) struct AssistantMessage {
    /// `assistant`
    pub(crate) role: &'static str,
    #[schema(required)]
    pub(crate) content: Option<String>,
    /// What it thought before, where the model's format shows that.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) reasoning_content: Option<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(crate) tool_calls: Vec<ToolCall>,
}

/// A chunk of a stream.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct ChatChunk {
    pub(crate) id: String,
    /// `chat.completion.chunk`
    pub(crate) object: &'static str,
    pub(crate) created: u64,
    pub(crate) model: String,
    pub(crate) choices: Vec<ChunkChoice>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) usage: Option<Usage>,
}

#[derive(Debug, Default, Serialize, ToSchema)]
pub(crate) struct ChunkChoice {
    pub(crate) index: usize,
    pub(crate) delta: Delta,
    #[schema(required)]
    pub(crate) logprobs: Option<ChatLogprobs>,
    /// Nothing until the choice's last chunk.
    #[schema(required)]
    pub(crate) finish_reason: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) stop_reason: Option<StopReason>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) token_ids: Option<Vec<u32>>,
}

/// What a chunk adds to the message.
#[derive(Clone, Debug, Default, PartialEq, Serialize, ToSchema)]
pub(crate) struct Delta {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) role: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) content: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) reasoning_content: Option<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(crate) tool_calls: Vec<ToolCallDelta>,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::body::object;

    fn param(text: &str) -> Value {
        let error = ChatRequest::read(&object(text)).unwrap_err();
        serde_json::to_value(error.body()).unwrap()["error"]["param"].clone()
    }

    #[test]
    fn messages_are_checked() {
        for messages in [
            "null",
            "[]",
            "{}",
            "\"hello\"",
            "[3]",
            "[{}]",
            r#"[{"role": "user"}]"#,
            r#"[{"content": "hello"}]"#,
            r#"[{"role": "user", "content": 3}]"#,
            r#"[{"role": "user", "content": null}]"#,
            r#"[{"role": "user", "content": [{"text": "no type"}]}]"#,
            r#"[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]"#,
            r#"[{"role": "user", "content": [{"type": "text"}]}]"#,
            r#"[{"role": "user", "content": ["hello"]}]"#,
        ] {
            assert_eq!(param(&format!("{{\"messages\": {messages}}}")), "messages", "{messages}");
        }
        assert_eq!(param("{}"), "messages");
    }

    #[test]
    fn templates_see_plain_text_and_objects() {
        let body = r#"{"messages": [
            {"role": "user", "content": [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]},
            {"role": "assistant", "content": null, "tool_calls": [
                {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{\"x\": 1}"}}]},
            {"role": "tool", "content": "2", "tool_call_id": "1"}]}"#;
        let request = ChatRequest::read(&object(body)).unwrap();
        let messages: Vec<Value> = request.chat.messages.iter().map(Message::for_template).collect();
        let call =
            json!({ "id": "1", "type": "function", "function": { "name": "f", "arguments": { "x": 1 } } });
        let expected = json!([
            { "role": "user", "content": "Hello" },
            { "role": "assistant", "content": "", "tool_calls": [call] },
            { "role": "tool", "content": "2", "tool_call_id": "1" },
        ]);
        assert_eq!(Value::from(messages), expected);
    }

    #[test]
    fn tools_and_choices_fit() {
        let with = |rest: &str| format!(r#"{{"messages": [{{"role": "user", "content": "x"}}], {rest}}}"#);
        let tool = r#""tools": [{"type": "function", "function": {"name": "f"}}]"#;
        assert_eq!(param(&with(r#""tool_choice": "required""#)), "tool_choice");
        let named = r#""tool_choice": {"type": "function", "function": {"name": "g"}}"#;
        assert_eq!(param(&with(&format!("{tool}, {named}"))), "tool_choice");
        assert_eq!(param(&with(r#""tools": [{"type": "web"}]"#)), "tools");
        assert_eq!(param(&with(r#""top_logprobs": 2"#)), "top_logprobs");
        let read = |rest: &str| ChatRequest::read(&object(&with(rest))).unwrap().chat.choice();
        assert_eq!(read(tool), ToolChoice::Auto);
        assert_eq!(read(r#""tools": []"#), ToolChoice::None);
    }
}
