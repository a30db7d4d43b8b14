//! `/v1/completions`.

use super::logprobs::CompletionLogprobs;
use super::sampling::{SamplingFields, at_least};
use super::{ApiError, TokenId, Usage, either, least_and_most, merged, streamed};
use crate::body::JsonObject;
use serde::de::value::SeqAccessDeserializer;
use serde::de::{Error, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize};
use std::fmt;
use utoipa::openapi::schema::{AnyOf, ArrayBuilder};
use utoipa::openapi::{ObjectBuilder, Ref, RefOr, Schema, Type};
use utoipa::{PartialSchema, ToSchema};

/// Most prompts of one request.
const MAX_PROMPTS: usize = 2048;
/// Most alternatives of a token.
pub(crate) const MAX_LOGPROBS: i64 = 20;

/// Most new tokens of an answer to a request that does not say, as everywhere in this API.
const DEFAULT_TOKENS: i64 = 16;

/// A request to continue texts.
#[derive(Debug)]
pub(crate) struct CompletionRequest {
    pub(crate) prompt: Vec<Prompt>,
    /// Alternatives of each token, if log-probabilities are wanted.
    pub(crate) logprobs: Option<usize>,
    pub(crate) sampling: SamplingFields,
}

#[derive(Debug, Deserialize, ToSchema)]
struct CompletionFields {
    prompt: Prompts,
    /// Log-probabilities with this many alternatives of each token, with `echo` also of the prompt.
    #[schema(minimum = 0, maximum = 20)]
    logprobs: Option<i64>,
}

/// A text, or the token ids of one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Prompt {
    Text(String),
    Ids(Vec<u32>),
}

/// A prompt or a list of them.
#[derive(Debug, PartialEq, Eq)]
struct Prompts(Vec<Prompt>);

impl CompletionRequest {
    pub(crate) fn read(object: &JsonObject) -> Result<Self, ApiError> {
        let fields: CompletionFields = object.read()?;
        let mut sampling = SamplingFields::read(object)?;
        sampling.max_tokens.get_or_insert(DEFAULT_TOKENS.max(sampling.min_tokens.unwrap_or(0)));
        let prompt = fields.prompt.0;
        if prompt.is_empty() {
            return Err(ApiError::field("prompt", "the list is empty: give at least one prompt"));
        }
        if prompt.len() > MAX_PROMPTS {
            return Err(ApiError::field(
                "prompt",
                format!("at most {MAX_PROMPTS} prompts go into a request"),
            ));
        }
        check_logprobs("logprobs", fields.logprobs)?;
        let logprobs = fields.logprobs.map(|count| count as usize);
        Ok(CompletionRequest { prompt, logprobs, sampling })
    }
}

/// Refuses more alternatives than are offered.
pub(crate) fn check_logprobs(field: &str, count: Option<i64>) -> Result<(), ApiError> {
    at_least(field, count, 0)?;
    match count {
        Some(count) if count > MAX_LOGPROBS => {
            Err(ApiError::field(field, format!("must be at most {MAX_LOGPROBS}, got {count}")))
        }
        _ => Ok(()),
    }
}

impl PartialSchema for CompletionRequest {
    fn schema() -> RefOr<Schema> {
        either(
            merged(CompletionFields::schema(), SamplingFields::schema()),
            [streamed(), least_and_most(&["max_tokens"])],
        )
    }
}

impl ToSchema for CompletionRequest {
    fn schemas(schemas: &mut Vec<(String, RefOr<Schema>)>) {
        CompletionFields::schemas(schemas);
        SamplingFields::schemas(schemas);
    }
}

impl<'de> Deserialize<'de> for Prompts {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(PromptsVisitor)
    }
}

struct PromptsVisitor;

impl<'de> Visitor<'de> for PromptsVisitor {
    type Value = Prompts;

    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("a string, a list of strings, a list of token ids, or a list of such lists")
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<Prompts, E> {
        Ok(Prompts(vec![Prompt::Text(text.to_owned())]))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Prompts, A::Error> {
        let (mut ids, mut prompts) = (Vec::new(), Vec::new());
        while let Some(element) = list.next_element::<Element>()? {
            match element {
                Element::Id(id) => ids.push(id),
                Element::Prompt(prompt) => prompts.push(prompt),
            }
            if !ids.is_empty() && !prompts.is_empty() {
                return Err(A::Error::custom("token ids stand beside prompts in one list"));
            }
        }
        if ids.is_empty() { Ok(Prompts(prompts)) } else { Ok(Prompts(vec![Prompt::Ids(ids)])) }
    }
}

/// An element of the list.
enum Element {
    Id(u32),
    Prompt(Prompt),
}

impl<'de> Deserialize<'de> for Element {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(ElementVisitor)
    }
}

struct ElementVisitor;

impl<'de> Visitor<'de> for ElementVisitor {
    type Value = Element;

    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("a string, a token id, or a list of token ids")
    }

    fn visit_u64<E: Error>(self, id: u64) -> Result<Element, E> {
        u32::try_from(id).map(Element::Id).map_err(|_| E::custom(format!("{id} is no token id")))
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<Element, E> {
        Ok(Element::Prompt(Prompt::Text(text.to_owned())))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, list: A) -> Result<Element, A::Error> {
        let ids = Vec::deserialize(SeqAccessDeserializer::new(list))?;
        Ok(Element::Prompt(Prompt::Ids(ids)))
    }
}

impl PartialSchema for Prompts {
    fn schema() -> RefOr<Schema> {
        let list = |items: RefOr<Schema>| ArrayBuilder::new().items(items).min_items(Some(1));
        let text = || RefOr::from(ObjectBuilder::new().schema_type(Type::String).min_length(Some(1)));
        let ids = || list(Ref::from_schema_name(TokenId::name()).into());
        AnyOf::builder().item(text()).item(list(text())).item(ids()).item(list(ids().into())).into()
    }
}

impl ToSchema for Prompts {
    fn schemas(schemas: &mut Vec<(String, RefOr<Schema>)>) {
        schemas.push((TokenId::name().into(), TokenId::schema()));
    }
}

/// An answer, or a chunk of a stream.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct CompletionResponse {
    pub(crate) id: String,
    /// `text_completion`
    pub(crate) object: &'static str,
    pub(crate) created: u64,
    pub(crate) model: String,
    pub(crate) choices: Vec<CompletionChoice>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) usage: Option<Usage>,
}

#[derive(Debug, Default, Serialize, ToSchema)]
pub(crate) struct CompletionChoice {
    /// Number of the prompt · n + number of the answer.
    pub(crate) index: usize,
    pub(crate) text: String,
    #[schema(required)]
    pub(crate) logprobs: Option<CompletionLogprobs>,
    /// `stop` or `length`; nothing while the answer goes on.
    #[schema(required)]
    pub(crate) finish_reason: Option<&'static str>,
    /// The text or token that ended the answer.
    #[schema(required)]
    pub(crate) stop_reason: Option<StopReason>,
    /// Ids of the new tokens, if wanted.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) token_ids: Option<Vec<u32>>,
    /// Ids of the prompt, if wanted.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) prompt_token_ids: Option<Vec<u32>>,
}

/// What ended an answer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, ToSchema)]
#[serde(untagged)]
pub(crate) enum StopReason {
    Token(u32),
    Text(String),
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::body::object;

    #[test]
    fn prompts_come_in_four_shapes() {
        let read = |text: &str| serde_json::from_str::<Prompts>(text).map(|prompts| prompts.0);
        let text = |text: &str| Prompt::Text(text.into());
        assert_eq!(read("\"a\"").unwrap(), [text("a")]);
        assert_eq!(read("[\"a\", \"b\"]").unwrap(), [text("a"), text("b")]);
        assert_eq!(read("[1, 2]").unwrap(), [Prompt::Ids(vec![1, 2])]);
        assert_eq!(read("[[1, 2], [3]]").unwrap(), [Prompt::Ids(vec![1, 2]), Prompt::Ids(vec![3])]);
        for other in ["3", "{}", "[1, \"a\"]", "[-1]", "[1.5]", "[true]", "[[\"a\"]]", "[4294967296]"] {
            assert!(read(other).is_err(), "{other}");
        }
    }

    #[test]
    fn prompts_are_wanted() {
        let param = |text: &str| {
            let error = CompletionRequest::read(&object(text)).unwrap_err();
            serde_json::to_value(error.body()).unwrap()["error"]["param"].clone()
        };
        for body in
            ["{}", r#"{"prompt": null}"#, r#"{"prompt": []}"#, r#"{"prompt": {}}"#, r#"{"prompt": [1, "a"]}"#]
        {
            assert_eq!(param(body), "prompt", "{body}");
        }
        assert_eq!(param(r#"{"prompt": "a", "logprobs": 21}"#), "logprobs");
        assert_eq!(param(r#"{"prompt": "a", "logprobs": -1}"#), "logprobs");
    }
}
