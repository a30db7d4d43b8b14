//! One file for each group of routes.

pub(crate) mod chat;
pub(crate) mod completions;
pub(crate) mod health;
pub(crate) mod messages;
pub(crate) mod metrics;
pub(crate) mod models;
pub(crate) mod page;
pub(crate) mod responses;
pub(crate) mod tokenize;

use crate::guide::Grammar;
use crate::openai::ApiError;
use crate::openai::sampling::{ResponseFormat, SamplingFields, StructuredOutputs};

/// What the answer must look like, and the field that says so.
fn grammar(fields: &SamplingFields) -> Result<Option<(Grammar, &'static str)>, ApiError> {
    let of_format = match &fields.response_format {
        None | Some(ResponseFormat::Text) => None,
        Some(ResponseFormat::JsonObject) => Some(Grammar::object()),
        Some(ResponseFormat::JsonSchema { json_schema }) => {
            Some(Grammar::Json(json_schema.schema.clone().into()))
        }
    };
    let of_outputs = fields.structured_outputs.as_ref().map(structured).transpose()?.flatten();
    match (of_format, of_outputs) {
        (Some(_), Some(_)) => {
            Err(ApiError::field("structured_outputs", "response_format says it too: give one of the two"))
        }
        (Some(grammar), None) => Ok(Some((grammar, "response_format"))),
        (None, Some(grammar)) => Ok(Some((grammar, "structured_outputs"))),
        (None, None) => Ok(None),
    }
}

fn structured(outputs: &StructuredOutputs) -> Result<Option<Grammar>, ApiError> {
    let StructuredOutputs { json, regex, choice, grammar, json_object } = outputs.clone();
    let schema = json.map(|json| match json {
        // Some clients send the schema as text.
        serde_json::Value::String(text) => serde_json::from_str(&text).unwrap_or_default(),
        json => json,
    });
    let all = [
        schema.map(Grammar::Json),
        regex.map(Grammar::Regex),
        choice.map(Grammar::Choice),
        grammar.map(Grammar::Lark),
        (json_object == Some(true)).then(Grammar::object),
    ];
    let mut given = all.into_iter().flatten();
    let problem = "give one of json, regex, choice, grammar and json_object";
    match (given.next(), given.next()) {
        (Some(Grammar::Choice(texts)), None) if texts.is_empty() => {
            Err(ApiError::field("structured_outputs", "choice: the list is empty"))
        }
        (Some(grammar), None) => Ok(Some(grammar)),
        (None, _) if outputs.json_object == Some(false) => Ok(None),
        _ => Err(ApiError::field("structured_outputs", problem)),
    }
}
