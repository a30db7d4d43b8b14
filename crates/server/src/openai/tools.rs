//! Functions that a model may call, and its calls.

use serde::de::value::MapAccessDeserializer;
use serde::de::{Error, MapAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::{Map, Value};
use std::fmt;
use utoipa::openapi::schema::ObjectBuilder;
use utoipa::openapi::{RefOr, Schema, Type};
use utoipa::{PartialSchema, ToSchema};

/// A function that the model may call.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub(crate) struct Tool {
    pub(crate) r#type: FunctionWord,
    pub(crate) function: FunctionDefinition,
}

/// The word `function`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub(crate) enum FunctionWord {
    #[default]
    Function,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub(crate) struct FunctionDefinition {
    #[schema(min_length = 1)]
    pub(crate) name: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) description: Option<String>,
    /// JSON schema of the arguments.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Object>)]
    pub(crate) parameters: Option<Map<String, Value>>,
    /// Arguments of required and named calls always satisfy the parameters; this changes nothing.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) strict: Option<bool>,
}

/// A call of a function.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub(crate) struct ToolCall {
    pub(crate) id: String,
    #[serde(default)]
    pub(crate) r#type: FunctionWord,
    pub(crate) function: FunctionCall,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub(crate) struct FunctionCall {
    pub(crate) name: String,
    /// An object, as JSON text.
    pub(crate) arguments: String,
}

/// A piece of a call in a stream: first the id and the name, then the arguments bit by bit.
#[derive(Clone, Debug, Default, PartialEq, Serialize, ToSchema)]
pub(crate) struct ToolCallDelta {
    /// Which call.
    pub(crate) index: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) id: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) r#type: Option<FunctionWord>,
    pub(crate) function: FunctionCallDelta,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, ToSchema)]
pub(crate) struct FunctionCallDelta {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) name: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) arguments: Option<String>,
}

/// Whether the model calls functions: `none`, `auto`, `required`, or one of them by name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum ToolChoice {
    None,
    Auto,
    Required,
    Named(String),
}

#[derive(Deserialize)]
struct NamedToolChoice {
    #[allow(dead_code, reason = "only its value is checked")]
    r#type: FunctionWord,
    function: FunctionName,
}

#[derive(Deserialize)]
struct FunctionName {
    name: String,
}

impl<'de> Deserialize<'de> for ToolChoice {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(ToolChoiceVisitor)
    }
}

struct ToolChoiceVisitor;

impl<'de> Visitor<'de> for ToolChoiceVisitor {
    type Value = ToolChoice;

    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("`none`, `auto`, `required`, or {\"type\": \"function\", \"function\": {\"name\": …}}")
    }

    fn visit_str<E: Error>(self, word: &str) -> Result<ToolChoice, E> {
        match word {
            "none" => Ok(ToolChoice::None),
            "auto" => Ok(ToolChoice::Auto),
            "required" => Ok(ToolChoice::Required),
            _ => Err(E::invalid_value(serde::de::Unexpected::Str(word), &self)),
        }
    }

    fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<ToolChoice, A::Error> {
        let named = NamedToolChoice::deserialize(MapAccessDeserializer::new(map))?;
        Ok(ToolChoice::Named(named.function.name))
    }
}

/// The words alone: that a named function has to be among the tools, no schema can say.
impl PartialSchema for ToolChoice {
    fn schema() -> RefOr<Schema> {
        let named =
            "or {\"type\": \"function\", \"function\": {\"name\": …}} with the name of one of the tools";
        let words = ["none", "auto", "required"];
        ObjectBuilder::new()
            .schema_type(Type::String)
            .enum_values(Some(words))
            .description(Some(named))
            .into()
    }
}

impl ToSchema for ToolChoice {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn choices() {
        let read = serde_json::from_str::<ToolChoice>;
        assert_eq!(read("\"required\"").unwrap(), ToolChoice::Required);
        let named = r#"{"type": "function", "function": {"name": "f"}}"#;
        assert_eq!(read(named).unwrap(), ToolChoice::Named("f".into()));
        for other in ["\"any\"", "3", "{}", r#"{"type": "tool", "function": {"name": "f"}}"#] {
            assert!(read(other).is_err(), "{other}");
        }
    }
}
