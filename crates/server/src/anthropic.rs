//! `/v1/messages` as data: what is sent to it, as a conversation, and its answers and errors.

use crate::body::{JsonObject, read_object};
use crate::openai::chat::{ChatFields, Message};
use crate::openai::sampling::{NamedSchema, ResponseFormat, SamplingFields, at_least, only_one_answer};
use crate::openai::tools::{FunctionCall, FunctionDefinition, FunctionWord, Tool, ToolCall, ToolChoice};
use crate::openai::{ApiError, Condition, OneOrMany, either, merged, one_or_many};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use utoipa::openapi::schema::Object;
use utoipa::openapi::{KnownFormat, ObjectBuilder, RefOr, Schema, SchemaFormat, Type};
use utoipa::{PartialSchema, ToSchema};

/// A request for the assistant's next message.
#[derive(Debug)]
pub(crate) struct MessagesRequest {
    pub(crate) chat: ChatFields,
    pub(crate) sampling: SamplingFields,
}

#[derive(Debug, Deserialize, ToSchema)]
struct MessagesFields {
    /// A name that `/v1/models` lists.
    #[allow(dead_code, reason = "read with the sampling fields, and described here")]
    model: Option<String>,
    /// Most new tokens.
    #[schema(minimum = 1)]
    max_tokens: Option<i64>,
    /// The conversation so far; if its last message is the assistant's, the answer goes on with that.
    #[schema(min_items = 1)]
    messages: Vec<InputMessage>,
    /// What the system says before the conversation.
    #[schema(schema_with = one_or_many::optional_schema::<TextBlock>)]
    system: Option<OneOrMany<TextBlock>>,
    /// The answer ends before any of these texts.
    stop_sequences: Option<Vec<String>>,
    /// 0 takes the most likely token.
    #[schema(minimum = 0)]
    #[allow(dead_code, reason = "read with the sampling fields, and described here")]
    temperature: Option<f64>,
    /// Draw from the most likely tokens that together have this probability.
    #[schema(exclusive_minimum = 0, maximum = 1)]
    #[allow(dead_code, reason = "read with the sampling fields, and described here")]
    top_p: Option<f64>,
    /// Draw from this many of the most likely tokens; 0 and -1 are all.
    #[schema(minimum = -1)]
    #[allow(dead_code, reason = "read with the sampling fields, and described here")]
    top_k: Option<i64>,
    /// Functions that the model may call.
    tools: Option<Vec<InputTool>>,
    tool_choice: Option<InputToolChoice>,
    /// Whether the model thinks first, where its chat template knows of that.
    thinking: Option<Thinking>,
    /// What the answer must look like.
    #[serde(default, deserialize_with = "read_object")]
    output_config: Option<OutputConfig>,
    /// Whether the answer comes as server-sent events.
    #[allow(dead_code, reason = "read with the sampling fields, and described here")]
    stream: Option<bool>,
}

impl MessagesRequest {
    /// Reads a request; `counted` ones only count their tokens, and need not say how many may be new.
    pub(crate) fn read(object: &JsonObject, counted: bool) -> Result<Self, ApiError> {
        object.refuse(&[
            ("container", |_| false),
            ("mcp_servers", |value| value == &Value::Array(Vec::new())),
        ])?;
        let fields: MessagesFields = object.read()?;
        let mut sampling = SamplingFields::read(object)?;
        only_one_answer(&sampling)?;
        if fields.max_tokens.is_none() && !counted {
            return Err(ApiError::field("max_tokens", "this field is required"));
        }
        at_least("max_tokens", fields.max_tokens, 1)?;
        if let Some(texts) = fields.stop_sequences {
            sampling.stop = Some(OneOrMany::Many(texts));
            sampling.check()?;
        }
        let config = fields.output_config.unwrap_or_default();
        sampling.response_format = config.format.map(|OutputFormat::JsonSchema { schema }| {
            ResponseFormat::JsonSchema { json_schema: NamedSchema { name: None, schema } }
        });
        let begun = fields.messages.last().is_some_and(InputMessage::is_begun_answer);
        let choice = fields.tool_choice;
        let mut chat = ChatFields {
            messages: messages(fields.system, fields.messages),
            tools: fields.tools.map(|tools| tools.into_iter().map(InputTool::into_chat).collect()),
            parallel_tool_calls: choice.as_ref().and_then(InputToolChoice::parallel),
            tool_choice: choice.map(InputToolChoice::into_chat),
            continue_final_message: Some(begun),
            reasoning_effort: config.effort,
            ..ChatFields::default()
        };
        if let Some(thinking) = fields.thinking {
            // Both names are in use among chat templates.
            let thinks = Value::Bool(!matches!(thinking, Thinking::Disabled {}));
            let variables = ["enable_thinking", "thinking"].map(|name| (name.to_owned(), thinks.clone()));
            chat.chat_template_kwargs = Some(Map::from_iter(variables));
        }
        chat.check("messages")?;
        Ok(MessagesRequest { chat, sampling })
    }
}

/// A request whose tokens are only counted, for the description of the API.
pub(crate) struct CountRequest;

/// The fields, and what holds between them.
fn described(mut fields: Object) -> RefOr<Schema> {
    let int64 = SchemaFormat::KnownFormat(KnownFormat::Int64);
    let most = ObjectBuilder::new().schema_type(Type::Integer).format(Some(int64)).minimum(Some(1));
    if fields.required.iter().any(|field| field == "max_tokens") {
        fields.properties.insert("max_tokens".into(), most.into());
    }
    let idle = ["auto", "none"].map(|word| json!({ "type": word }));
    either(fields, [[Condition::absent_or("tool_choice", &idle), Condition::has_some("tools")]])
}

impl PartialSchema for MessagesRequest {
    fn schema() -> RefOr<Schema> {
        let mut fields = merged(MessagesFields::schema(), RefOr::T(Schema::Object(Object::new())));
        fields.required.push("max_tokens".into());
        described(fields)
    }
}

impl ToSchema for MessagesRequest {
    fn schemas(schemas: &mut Vec<(String, RefOr<Schema>)>) {
        MessagesFields::schemas(schemas);
    }
}

impl PartialSchema for CountRequest {
    fn schema() -> RefOr<Schema> {
        described(merged(MessagesFields::schema(), RefOr::T(Schema::Object(Object::new()))))
    }
}

impl ToSchema for CountRequest {
    fn schemas(schemas: &mut Vec<(String, RefOr<Schema>)>) {
        MessagesFields::schemas(schemas);
    }
}

/// The words alone: that a named tool has to be among the tools, no schema can say.
impl PartialSchema for InputToolChoice {
    fn schema() -> RefOr<Schema> {
        let words = ["auto", "any", "none"].map(|word| json!({ "type": word }));
        let named = "or {\"type\": \"tool\", \"name\": …} with the name of one of the tools";
        ObjectBuilder::new()
            .schema_type(Type::Object)
            .enum_values(Some(words))
            .description(Some(named))
            .into()
    }
}

impl ToSchema for InputToolChoice {}

/// The conversation. Results of calls stand first in what the user says, and are messages of their own elsewhere.
fn messages(system: Option<OneOrMany<TextBlock>>, input: Vec<InputMessage>) -> Vec<Message> {
    let mut messages = Vec::new();
    messages.extend(system.map(|system| Message::saying("system", joined(system))));
    for InputMessage { role, content } in input {
        let blocks = match content {
            OneOrMany::One(text) => vec![Block::Text { text }],
            OneOrMany::Many(blocks) => blocks,
        };
        let mut message = Message::saying(role.name(), String::new());
        let mut says = blocks.is_empty();
        for block in blocks {
            says |= !matches!(block, Block::ToolResult { .. });
            match block {
                Block::Text { text } => message.say(&text),
                Block::Thinking { thinking } => message.think(&thinking),
                Block::RedactedThinking {} => {}
                Block::ToolUse { id, name, input } => {
                    let function = FunctionCall { name, arguments: Value::Object(input).to_string() };
                    message.call(ToolCall { id, r#type: FunctionWord::Function, function });
                }
                Block::ToolResult { tool_use_id, content } => {
                    let text = content.map(joined).unwrap_or_default();
                    messages.push(Message::result(tool_use_id, text));
                }
            }
        }
        if says {
            messages.push(message);
        }
    }
    messages
}

fn joined(blocks: OneOrMany<TextBlock>) -> String {
    match blocks {
        OneOrMany::One(text) => text,
        OneOrMany::Many(blocks) => {
            blocks.iter().map(|TextBlock::Text { text }| text.as_str()).collect::<Vec<_>>().concat()
        }
    }
}

#[derive(Debug, Deserialize, ToSchema)]
struct InputMessage {
    role: Role,
    #[schema(schema_with = one_or_many::schema::<Block>)]
    content: OneOrMany<Block>,
}

impl InputMessage {
    /// Whether this is the beginning of an answer.
    fn is_begun_answer(&self) -> bool {
        let said = match &self.content {
            OneOrMany::One(text) => text.clone(),
            OneOrMany::Many(blocks) => blocks.iter().filter_map(Block::text).collect(),
        };
        self.role == Role::Assistant && !said.trim().is_empty()
    }
}

/// Who speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
enum Role {
    User,
    Assistant,
    System,
}

impl Role {
    fn name(self) -> &'static str {
        match self {
            Role::User => "user",
            Role::Assistant => "assistant",
            Role::System => "system",
        }
    }
}

/// A piece of a message.
#[derive(Clone, Debug, PartialEq, Deserialize, ToSchema)]
#[serde(tag = "type", rename_all = "snake_case")]
enum Block {
    Text {
        text: String,
    },
    Thinking {
        thinking: String,
    },
    RedactedThinking {},
    ToolUse {
        id: String,
        name: String,
        #[schema(value_type = Object)]
        input: Map<String, Value>,
    },
    ToolResult {
        tool_use_id: String,
        #[serde(default)]
        #[schema(schema_with = one_or_many::optional_schema::<TextBlock>)]
        content: Option<OneOrMany<TextBlock>>,
    },
}

impl Block {
    fn text(&self) -> Option<&str> {
        match self {
            Block::Text { text } => Some(text),
            _ => None,
        }
    }
}

/// A piece of text.
#[derive(Clone, Debug, PartialEq, Deserialize, ToSchema)]
#[serde(tag = "type", rename_all = "snake_case")]
enum TextBlock {
    Text { text: String },
}

/// A function.
#[derive(Clone, Debug, Deserialize, ToSchema)]
struct InputTool {
    #[serde(default)]
    #[allow(dead_code, reason = "only its value is checked")]
    r#type: CustomWord,
    #[schema(min_length = 1)]
    name: String,
    description: Option<String>,
    /// JSON schema of the arguments.
    #[schema(value_type = Object)]
    input_schema: Map<String, Value>,
}

/// The word `custom`: other tools would be the server's own.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
enum CustomWord {
    #[default]
    Custom,
}

impl InputTool {
    fn into_chat(self) -> Tool {
        let InputTool { name, description, input_schema, .. } = self;
        let function = FunctionDefinition { name, description, parameters: Some(input_schema), strict: None };
        Tool { r#type: FunctionWord::Function, function }
    }
}

/// Whether the model calls functions.
#[derive(Clone, Debug, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
enum InputToolChoice {
    Auto { disable_parallel_tool_use: Option<bool> },
    Any { disable_parallel_tool_use: Option<bool> },
    Tool { name: String, disable_parallel_tool_use: Option<bool> },
    None {},
}

impl InputToolChoice {
    fn parallel(&self) -> Option<bool> {
        match self {
            InputToolChoice::Auto { disable_parallel_tool_use }
            | InputToolChoice::Any { disable_parallel_tool_use }
            | InputToolChoice::Tool { disable_parallel_tool_use, .. } => {
                disable_parallel_tool_use.map(|no| !no)
            }
            InputToolChoice::None {} => None,
        }
    }

    fn into_chat(self) -> ToolChoice {
        match self {
            InputToolChoice::Auto { .. } => ToolChoice::Auto,
            InputToolChoice::Any { .. } => ToolChoice::Required,
            InputToolChoice::Tool { name, .. } => ToolChoice::Named(name),
            InputToolChoice::None {} => ToolChoice::None,
        }
    }
}

/// Whether the model thinks first; how long is its own affair.
#[derive(Clone, Copy, Debug, Deserialize, ToSchema)]
#[serde(tag = "type", rename_all = "snake_case")]
enum Thinking {
    Enabled {},
    Adaptive {},
    BetweenTools {},
    Disabled {},
}

#[derive(Clone, Debug, Default, Deserialize, ToSchema)]
struct OutputConfig {
    /// A variable of the chat template, where it has it.
    effort: Option<String>,
    format: Option<OutputFormat>,
}

#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(tag = "type", rename_all = "snake_case")]
enum OutputFormat {
    JsonSchema {
        /// The JSON schema.
        #[schema(value_type = Object)]
        schema: Map<String, Value>,
    },
}

/// An answer.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub(crate) struct MessageObject {
    pub(crate) id: String,
    /// `message`
    pub(crate) r#type: &'static str,
    /// `assistant`
    pub(crate) role: &'static str,
    pub(crate) model: String,
    /// Blocks of type `text`, `thinking` and `tool_use`.
    #[schema(value_type = Vec<Object>)]
    pub(crate) content: Vec<Value>,
    /// `end_turn`, `max_tokens`, `stop_sequence` or `tool_use`.
    #[schema(required)]
    pub(crate) stop_reason: Option<&'static str>,
    /// The text that ended the answer.
    #[schema(required)]
    pub(crate) stop_sequence: Option<String>,
    pub(crate) usage: MessageUsage,
}

/// Tokens of a request and of its answer. Nothing is paid for the cache, so all of a prompt counts as input.
#[derive(Clone, Copy, Debug, Serialize, ToSchema)]
pub(crate) struct MessageUsage {
    pub(crate) input_tokens: usize,
    pub(crate) output_tokens: usize,
    pub(crate) cache_creation_input_tokens: usize,
    pub(crate) cache_read_input_tokens: usize,
}

#[derive(Clone, Copy, Debug, Serialize, ToSchema)]
pub(crate) struct CountedTokens {
    pub(crate) input_tokens: usize,
}

/// The body of every answer here that is none: the error object of all other routes, in this one's words.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct MessageErrorBody {
    /// `error`
    r#type: &'static str,
    error: MessageError,
}

#[derive(Debug, Serialize, ToSchema)]
struct MessageError {
    /// The kind of error, such as `invalid_request_error`.
    r#type: &'static str,
    /// What is wrong, and how to mend it.
    message: String,
    /// The field that is to blame, if it is one.
    #[schema(required)]
    param: Option<String>,
    /// The HTTP status.
    code: u16,
}

impl MessageErrorBody {
    pub(crate) fn new(error: &ApiError) -> Self {
        let status = error.status().as_u16();
        let kind = match status {
            400 | 405 | 415 | 422 => "invalid_request_error",
            401 => "authentication_error",
            403 => "permission_error",
            404 => "not_found_error",
            413 => "request_too_large",
            429 => "rate_limit_error",
            503 => "overloaded_error",
            _ if status < 500 => "invalid_request_error",
            _ => "api_error",
        };
        let (message, param) = (error.message().to_owned(), error.param().map(str::to_owned));
        MessageErrorBody {
            r#type: "error",
            error: MessageError { r#type: kind, message, param, code: status },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::body::object;

    #[test]
    fn blocks_become_a_conversation() {
        let body = r#"{"max_tokens": 5, "system": [{"type": "text", "text": "Be brief."}], "messages": [
            {"role": "user", "content": "Weather?"},
            {"role": "assistant", "content": [{"type": "thinking", "thinking": "Hm.", "signature": ""},
                {"type": "text", "text": "I look."}, {"type": "tool_use", "id": "1", "name": "f", "input": {"x": 1}}]},
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "1", "content": [{"type": "text", "text": "2"}]},
                {"type": "text", "text": "And?"}]},
            {"role": "assistant", "content": "Two"}]}"#;
        let request = MessagesRequest::read(&object(body), false).unwrap();
        assert_eq!(request.chat.continue_final_message, Some(true));
        let expected = json!([
            { "role": "system", "content": "Be brief." },
            { "role": "user", "content": "Weather?" },
            { "role": "assistant", "content": "I look.", "reasoning_content": "Hm.", "tool_calls": [{ "id": "1", "type": "function", "function": { "name": "f", "arguments": { "x": 1 } } }] },
            { "role": "tool", "content": "2", "tool_call_id": "1" },
            { "role": "user", "content": "And?" },
            { "role": "assistant", "content": "Two" },
        ]);
        assert_eq!(request.chat.conversation(), expected);
    }

    #[test]
    fn what_is_wrong_is_named() {
        let with = |rest: &str| {
            format!(r#"{{"messages": [{{"role": "user", "content": "x"}}], "max_tokens": 5{rest}}}"#)
        };
        for (body, param) in [
            (r#"{"max_tokens": 5}"#.to_owned(), "messages"),
            (r#"{"messages": [{"role": "user", "content": "x"}]}"#.to_owned(), "max_tokens"),
            (with(r#", "messages": []"#), "messages"),
            (
                with(r#", "messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]"#),
                "messages",
            ),
            (with(r#", "tool_choice": {"type": "any"}"#), "tool_choice"),
            (with(r#", "tools": [{"type": "bash_20250124", "name": "bash"}]"#), "tools"),
            (with(r#", "output_config": [null]"#), "output_config"),
            (with(r#", "container": "x""#), "container"),
            (with(r#", "temperature": -1"#), "temperature"),
        ] {
            let error = MessagesRequest::read(&object(&body), false).unwrap_err();
            assert_eq!(error.param(), Some(param), "{body}");
        }
    }
}
