//! `/v1/responses`: what is sent to it, as a conversation, and the items of its answers.

use super::chat::{ChatFields, Message};
use super::completions::check_logprobs;
use super::sampling::{NamedSchema, ResponseFormat, SamplingFields, at_least, only_one_answer};
use super::tools::{FunctionCall, FunctionDefinition, FunctionWord, Tool, ToolCall, ToolChoice};
use super::{ApiError, Condition, OneOrMany, either, one_or_many};
use crate::body::{AsksForNothing, JsonObject, read_object};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use utoipa::openapi::schema::AnyOf;
use utoipa::openapi::{RefOr, Schema};
use utoipa::{PartialSchema, ToSchema};

/// A request for what comes next.
#[derive(Debug)]
pub(crate) struct ResponsesRequest {
    pub(crate) chat: ChatFields,
    pub(crate) sampling: SamplingFields,
    /// What the answer repeats of the request.
    pub(crate) echoed: Map<String, Value>,
}

#[derive(Debug, Deserialize, ToSchema)]
struct ResponsesFields {
    /// A name that `/v1/models` lists; without one, the first of them.
    #[allow(dead_code, reason = "read with the sampling fields, and described here")]
    model: Option<String>,
    /// A text, or the conversation so far.
    #[schema(schema_with = one_or_many::some_schema::<Item>)]
    input: OneOrMany<Item>,
    /// What the system says before the conversation.
    instructions: Option<String>,
    /// Most new tokens.
    #[schema(minimum = 1)]
    max_output_tokens: Option<i64>,
    /// 0 takes the most likely token.
    #[schema(minimum = 0)]
    #[allow(dead_code, reason = "read with the sampling fields, and described here")]
    temperature: Option<f64>,
    /// Draw from the most likely tokens that together have this probability.
    #[schema(exclusive_minimum = 0, maximum = 1)]
    #[allow(dead_code, reason = "read with the sampling fields, and described here")]
    top_p: Option<f64>,
    /// Alternatives of each token; wants `message.output_text.logprobs` in `include`.
    #[schema(minimum = 0, maximum = 20)]
    top_logprobs: Option<i64>,
    /// What comes with the answer: `message.output_text.logprobs`; others are ignored.
    include: Option<Vec<String>>,
    /// Functions that the model may call.
    tools: Option<Vec<FlatTool>>,
    /// Whether the model calls functions; `{"type": "function", "name": …}` with the name of one of the tools, too.
    #[schema(value_type = Option<ToolChoice>)]
    tool_choice: Option<FlatChoice>,
    /// Whether one answer may have several calls; it may unless this says no.
    parallel_tool_calls: Option<bool>,
    /// What the answer must look like.
    #[serde(default, deserialize_with = "read_object")]
    text: Option<TextOptions>,
    /// How much the model thinks, where its chat template knows of that.
    #[serde(default, deserialize_with = "read_object")]
    reasoning: Option<ReasoningOptions>,
    /// Comes back with the answer.
    #[schema(value_type = Option<Object>)]
    #[allow(dead_code, reason = "only its type is checked")]
    metadata: Option<Map<String, Value>>,
    /// Whether the answer comes as server-sent events.
    #[allow(dead_code, reason = "read with the sampling fields, and described here")]
    stream: Option<bool>,
}

/// Fields of the request that the answer repeats, and what it says where they are absent.
fn echoes() -> [(&'static str, Value); 11] {
    [
        ("instructions", Value::Null),
        ("max_output_tokens", Value::Null),
        ("metadata", json!({})),
        ("parallel_tool_calls", true.into()),
        ("reasoning", json!({ "effort": null, "summary": null })),
        ("temperature", Value::Null),
        ("text", json!({ "format": { "type": "text" } })),
        ("tool_choice", "auto".into()),
        ("tools", json!([])),
        ("top_p", Value::Null),
        ("user", Value::Null),
    ]
}

/// Fields that ask for what only a server with a memory can do, or for what this one does not do.
const UNSUPPORTED: [(&str, AsksForNothing); 6] = [
    ("previous_response_id", |_| false),
    ("conversation", |_| false),
    ("prompt", |_| false),
    ("background", |value| value == &Value::Bool(false)),
    ("truncation", |value| value == "disabled"),
    ("max_tool_calls", |_| false),
];

impl ResponsesRequest {
    pub(crate) fn read(object: &JsonObject) -> Result<Self, ApiError> {
        object.refuse(&UNSUPPORTED)?;
        let fields: ResponsesFields = object.read()?;
        let mut sampling = SamplingFields::read(object)?;
        only_one_answer(&sampling)?;
        check_logprobs("top_logprobs", fields.top_logprobs)?;
        at_least("max_output_tokens", fields.max_output_tokens, 1)?;
        sampling.max_tokens = fields.max_output_tokens.or(sampling.max_tokens);
        sampling.response_format = fields.text.and_then(|text| text.format).map(TextFormat::into_chat);
        let echoed = echoes()
            .into_iter()
            .map(|(field, absent)| (field.to_owned(), object.get(field).cloned().unwrap_or(absent)));
        let included = fields.include.unwrap_or_default();
        let logprobs = included.iter().any(|what| what == "message.output_text.logprobs");
        let chat = ChatFields {
            messages: messages(fields.instructions, fields.input)?,
            logprobs: Some(logprobs),
            top_logprobs: fields.top_logprobs.filter(|_| logprobs),
            tools: fields.tools.map(|tools| tools.into_iter().map(FlatTool::into_chat).collect()),
            tool_choice: fields.tool_choice.map(|choice| choice.0),
            parallel_tool_calls: fields.parallel_tool_calls,
            reasoning_effort: fields.reasoning.and_then(|reasoning| reasoning.effort),
            ..ChatFields::default()
        };
        chat.check("input")?;
        Ok(ResponsesRequest { chat, sampling, echoed: echoed.collect() })
    }
}

/// The conversation. What the assistant thought and called belongs to what it says next.
fn messages(instructions: Option<String>, input: OneOrMany<Item>) -> Result<Vec<Message>, ApiError> {
    let mut messages: Vec<Message> = Vec::new();
    messages.extend(instructions.map(|text| Message::saying("system", text)));
    let items = match input {
        OneOrMany::One(text) => vec![Item::Message(ItemMessage::of_user(text))],
        OneOrMany::Many(items) => items,
    };
    let assistants = |messages: &mut Vec<Message>| {
        if !messages.last().is_some_and(Message::said_by_assistant) {
            messages.push(Message::saying("assistant", String::new()));
        }
    };
    for item in items {
        match item {
            Item::Message(message) => {
                let text = joined(message.content);
                match messages.last_mut() {
                    Some(last) if message.role == "assistant" && last.only_thinks() => last.say(&text),
                    _ => messages.push(Message::saying(&message.role, text)),
                }
            }
            Item::Reasoning(reasoning) => {
                messages.push(Message::saying("assistant", String::new()));
                if let Some(last) = messages.last_mut() {
                    last.think(&reasoning.text());
                }
            }
            Item::FunctionCall(call) => {
                assistants(&mut messages);
                if let Some(last) = messages.last_mut() {
                    let function = FunctionCall { name: call.name, arguments: call.arguments };
                    last.call(ToolCall { id: call.call_id, r#type: FunctionWord::Function, function });
                }
            }
            Item::FunctionCallOutput(output) => {
                messages.push(Message::result(output.call_id, joined(output.output)));
            }
        }
    }
    if messages.is_empty() {
        return Err(ApiError::field("input", "the list is empty: give at least one item"));
    }
    Ok(messages)
}

fn joined(content: OneOrMany<InputPart>) -> String {
    match content {
        OneOrMany::One(text) => text,
        OneOrMany::Many(parts) => parts.iter().map(InputPart::text).collect(),
    }
}

/// Something that was said, thought, called, or that a call gave.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(try_from = "Map<String, Value>")]
enum Item {
    Message(ItemMessage),
    Reasoning(ItemReasoning),
    FunctionCall(ItemCall),
    FunctionCallOutput(ItemCallOutput),
}

impl TryFrom<Map<String, Value>> for Item {
    type Error = String;

    /// An item that does not say what it is is a message.
    fn try_from(item: Map<String, Value>) -> Result<Self, String> {
        let kind = item.get("type").map_or(Some("message"), Value::as_str).unwrap_or_default().to_owned();
        let item = item.into_iter().filter(|(_, value)| !value.is_null()).collect();
        let read = |problem: serde_json::Error| format!("{kind}: {problem}");
        match kind.as_str() {
            "message" => serde_json::from_value(item).map(Item::Message).map_err(read),
            "reasoning" => serde_json::from_value(item).map(Item::Reasoning).map_err(read),
            "function_call" => serde_json::from_value(item).map(Item::FunctionCall).map_err(read),
            "function_call_output" => {
                serde_json::from_value(item).map(Item::FunctionCallOutput).map_err(read)
            }
            _ => Err(format!(
                "an item of type `{kind}` cannot be read: this server knows message, reasoning, function_call and \
                 function_call_output"
            )),
        }
    }
}

#[derive(Clone, Debug, PartialEq, Deserialize, ToSchema)]
pub(crate) struct ItemMessage {
    #[serde(default)]
    #[allow(dead_code, reason = "only its value is checked")]
    r#type: MessageWord,
    /// Who speaks: `system`, `developer`, `user`, `assistant`.
    role: String,
    #[schema(schema_with = one_or_many::schema::<InputPart>)]
    content: OneOrMany<InputPart>,
}

impl ItemMessage {
    fn of_user(text: String) -> Self {
        let (r#type, content) = (MessageWord::Message, OneOrMany::One(text));
        ItemMessage { r#type, role: "user".into(), content }
    }
}

/// The word `message`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
enum MessageWord {
    #[default]
    Message,
}

/// A text, of one or the other side.
#[derive(Clone, Debug, PartialEq, Deserialize, ToSchema)]
#[serde(tag = "type", rename_all = "snake_case")]
enum InputPart {
    InputText { text: String },
    OutputText { text: String },
    Refusal { refusal: String },
}

impl InputPart {
    fn text(&self) -> &str {
        match self {
            InputPart::InputText { text } | InputPart::OutputText { text } => text,
            InputPart::Refusal { refusal } => refusal,
        }
    }
}

#[derive(Clone, Debug, PartialEq, Deserialize, ToSchema)]
pub(crate) struct ItemReasoning {
    #[allow(dead_code, reason = "only its value is checked")]
    r#type: ReasoningWord,
    content: Option<Vec<Thought>>,
    summary: Option<Vec<Thought>>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
enum ReasoningWord {
    Reasoning,
}

#[derive(Clone, Debug, PartialEq, Deserialize, ToSchema)]
struct Thought {
    text: String,
}

impl ItemReasoning {
    fn text(self) -> String {
        let thoughts = self.content.filter(|content| !content.is_empty()).or(self.summary);
        thoughts.unwrap_or_default().iter().map(|thought| thought.text.as_str()).collect()
    }
}

#[derive(Clone, Debug, PartialEq, Deserialize, ToSchema)]
pub(crate) struct ItemCall {
    #[allow(dead_code, reason = "only its value is checked")]
    r#type: CallWord,
    call_id: String,
    name: String,
    /// An object, as JSON text.
    arguments: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
enum CallWord {
    FunctionCall,
}

#[derive(Clone, Debug, PartialEq, Deserialize, ToSchema)]
pub(crate) struct ItemCallOutput {
    #[allow(dead_code, reason = "only its value is checked")]
    r#type: CallOutputWord,
    call_id: String,
    #[schema(schema_with = one_or_many::schema::<InputPart>)]
    output: OneOrMany<InputPart>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
enum CallOutputWord {
    FunctionCallOutput,
}

/// The fields, and what holds between them.
impl PartialSchema for ResponsesRequest {
    fn schema() -> RefOr<Schema> {
        let RefOr::T(Schema::Object(fields)) = ResponsesFields::schema() else {
            return ResponsesFields::schema();
        };
        let calls = [
            Condition::absent_or("tool_choice", &["none".into(), "auto".into()]),
            Condition::has_some("tools"),
        ];
        either(fields, [calls])
    }
}

impl ToSchema for ResponsesRequest {
    fn schemas(schemas: &mut Vec<(String, RefOr<Schema>)>) {
        ResponsesFields::schemas(schemas);
    }
}

impl PartialSchema for Item {
    fn schema() -> RefOr<Schema> {
        let forms =
            [ItemMessage::schema(), ItemReasoning::schema(), ItemCall::schema(), ItemCallOutput::schema()];
        forms.into_iter().fold(AnyOf::builder(), |any, form| any.item(form)).into()
    }
}

/// A function, without an object around it.
#[derive(Clone, Debug, Deserialize, ToSchema)]
struct FlatTool {
    #[allow(dead_code, reason = "only its value is checked")]
    r#type: FunctionWord,
    #[serde(flatten)]
    function: FunctionDefinition,
}

impl FlatTool {
    fn into_chat(self) -> Tool {
        Tool { r#type: self.r#type, function: self.function }
    }
}

/// As on `/v1/chat/completions`, but for a named function's name, which stands beside the type.
#[derive(Clone, Debug, Deserialize)]
#[serde(try_from = "Value")]
struct FlatChoice(ToolChoice);

impl TryFrom<Value> for FlatChoice {
    type Error = String;

    fn try_from(choice: Value) -> Result<Self, String> {
        let choice = match choice.get("name") {
            Some(name) => json!({ "type": choice["type"], "function": { "name": name } }),
            None => choice,
        };
        serde_json::from_value(choice).map(FlatChoice).map_err(|problem| problem.to_string())
    }
}

#[derive(Clone, Debug, Deserialize, ToSchema)]
struct TextOptions {
    format: Option<TextFormat>,
}

/// `text`, `json_object`, or `json_schema` with a schema beside the type.
#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(tag = "type", rename_all = "snake_case")]
enum TextFormat {
    Text,
    JsonObject,
    JsonSchema {
        /// The JSON schema.
        #[schema(value_type = Object)]
        schema: Map<String, Value>,
    },
}

impl TextFormat {
    fn into_chat(self) -> ResponseFormat {
        match self {
            TextFormat::Text => ResponseFormat::Text,
            TextFormat::JsonObject => ResponseFormat::JsonObject,
            TextFormat::JsonSchema { schema } => {
                ResponseFormat::JsonSchema { json_schema: NamedSchema { name: None, schema } }
            }
        }
    }
}

#[derive(Clone, Debug, Deserialize, ToSchema)]
struct ReasoningOptions {
    effort: Option<String>,
}

/// An answer.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub(crate) struct ResponseObject {
    pub(crate) id: String,
    /// `response`
    pub(crate) object: &'static str,
    pub(crate) created_at: u64,
    /// `in_progress`, `completed`, `incomplete` or `failed`.
    pub(crate) status: &'static str,
    #[schema(required)]
    pub(crate) error: Option<ResponseError>,
    #[schema(required)]
    pub(crate) incomplete_details: Option<IncompleteDetails>,
    pub(crate) model: String,
    /// Items of type `message`, `reasoning` and `function_call`.
    #[schema(value_type = Vec<Object>)]
    pub(crate) output: Vec<Value>,
    #[schema(required)]
    pub(crate) usage: Option<ResponseUsage>,
    /// Answers are not kept.
    pub(crate) store: bool,
    #[schema(required)]
    pub(crate) previous_response_id: Option<String>,
    /// `disabled`
    pub(crate) truncation: &'static str,
    pub(crate) background: bool,
    /// Fields of the request.
    #[serde(flatten)]
    #[schema(value_type = Object)]
    pub(crate) echoed: Map<String, Value>,
}

#[derive(Clone, Debug, Serialize, ToSchema)]
pub(crate) struct ResponseError {
    /// `server_error`
    pub(crate) code: &'static str,
    pub(crate) message: String,
}

#[derive(Clone, Copy, Debug, Serialize, ToSchema)]
pub(crate) struct IncompleteDetails {
    /// `max_output_tokens`
    pub(crate) reason: &'static str,
}

#[derive(Clone, Copy, Debug, Serialize, ToSchema)]
pub(crate) struct ResponseUsage {
    pub(crate) input_tokens: usize,
    pub(crate) input_tokens_details: InputTokensDetails,
    pub(crate) output_tokens: usize,
    pub(crate) output_tokens_details: OutputTokensDetails,
    pub(crate) total_tokens: usize,
}

#[derive(Clone, Copy, Debug, Serialize, ToSchema)]
pub(crate) struct InputTokensDetails {
    /// Tokens of the prompt that were in the cache already.
    pub(crate) cached_tokens: usize,
    /// Nothing is paid for those that go there.
    pub(crate) cache_write_tokens: usize,
}

#[derive(Clone, Copy, Debug, Serialize, ToSchema)]
pub(crate) struct OutputTokensDetails {
    pub(crate) reasoning_tokens: usize,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::body::object;

    fn read(text: &str) -> ResponsesRequest {
        ResponsesRequest::read(&object(text)).unwrap()
    }

    #[test]
    fn items_become_a_conversation() {
        let request = read(
            r#"{"instructions": "Be brief.", "input": [
                {"role": "user", "content": [{"type": "input_text", "text": "Weather"}, {"type": "input_text", "text": "?"}]},
                {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "Hm."}]},
                {"type": "function_call", "id": "fc_1", "call_id": "1", "name": "f", "arguments": "{\"x\": 1}"},
                {"type": "function_call_output", "call_id": "1", "output": "2"},
                {"type": "message", "id": "msg_1", "role": "assistant", "content": [{"type": "output_text", "text": "Two.", "annotations": []}]},
                {"role": "user", "content": "Thanks"}]}"#,
        );
        let expected = json!([
            { "role": "system", "content": "Be brief." },
            { "role": "user", "content": "Weather?" },
            { "role": "assistant", "content": "", "reasoning_content": "Hm.", "tool_calls": [{ "id": "1", "type": "function", "function": { "name": "f", "arguments": { "x": 1 } } }] },
            { "role": "tool", "content": "2", "tool_call_id": "1" },
            { "role": "assistant", "content": "Two." },
            { "role": "user", "content": "Thanks" },
        ]);
        assert_eq!(request.chat.conversation(), expected);
    }

    #[test]
    fn fields_have_their_chat_names() {
        let request = read(
            r#"{"input": "Hi", "max_output_tokens": 5, "tools": [{"type": "function", "name": "f", "parameters": {}}],
                "tool_choice": {"type": "function", "name": "f"}, "reasoning": {"effort": "low"},
                "metadata": {"a": "b"}, "temperature": null}"#,
        );
        assert_eq!(request.sampling.max_tokens, Some(5));
        assert_eq!(request.chat.choice(), ToolChoice::Named("f".into()));
        assert_eq!(request.chat.reasoning_effort.as_deref(), Some("low"));
        assert_eq!(
            (&request.echoed["metadata"]["a"], &request.echoed["temperature"]),
            (&json!("b"), &Value::Null)
        );
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (body, param) in [
            ("{}", "input"),
            (r#"{"input": []}"#, "input"),
            (r#"{"input": 3}"#, "input"),
            (r#"{"input": [{"type": "item_reference", "id": "x"}]}"#, "input"),
            (
                r#"{"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}"#,
                "input",
            ),
            (r#"{"input": "x", "previous_response_id": "resp_1"}"#, "previous_response_id"),
            (r#"{"input": "x", "background": true}"#, "background"),
            (r#"{"input": "x", "max_output_tokens": 0}"#, "max_output_tokens"),
            (r#"{"input": "x", "tool_choice": "required"}"#, "tool_choice"),
            (r#"{"input": "x", "tools": [{"type": "web_search"}]}"#, "tools"),
            (r#"{"input": "x", "text": {"format": {"type": "yaml"}}}"#, "text"),
            (r#"{"input": "x", "text": [null]}"#, "text"),
            (r#"{"input": "x", "top_logprobs": -1}"#, "top_logprobs"),
            (r#"{"input": "x", "n": 2}"#, "n"),
        ] {
            let error = ResponsesRequest::read(&object(body)).unwrap_err();
            assert_eq!(error.param(), Some(param), "{body}");
        }
    }
}
