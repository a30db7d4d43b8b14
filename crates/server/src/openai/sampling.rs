//! Fields that both ways to generate have: how much, how tokens are chosen, where to end, what comes back.

use super::one_or_many::optional_schema;
use super::{ApiError, OneOrMany, TokenId, digits_below};
use crate::body::{AsksForNothing, JsonObject, read_object};
use serde::Deserialize;
use serde_json::{Map, Value};
use std::collections::BTreeMap;
use utoipa::openapi::schema::{AnyOf, ArrayBuilder, Object, SchemaFormat};
use utoipa::openapi::{ObjectBuilder, RefOr, Schema, Type};
use utoipa::{PartialSchema, ToSchema};

/// Most choices of one prompt.
const MAX_CHOICES: i64 = 128;
/// Most texts that end an answer.
const MAX_STOPS: usize = 64;
/// Longest of them in bytes.
const MAX_STOP_BYTES: usize = 4096;

/// How an answer is generated.
#[derive(Clone, Debug, Default, Deserialize, ToSchema)]
pub(crate) struct SamplingFields {
    /// A name that `/v1/models` lists; without one, the first of them.
    pub(crate) model: Option<String>,
    /// Most new tokens, end-of-text tokens included; what the context has room for is the limit in any case. Without it a
    /// completion has 16, and a chat what there is room for.
    #[schema(minimum = 0)]
    pub(crate) max_tokens: Option<i64>,
    /// New tokens before which the answer does not end by itself.
    #[schema(minimum = 0)]
    pub(crate) min_tokens: Option<i64>,
    /// Answers to each prompt.
    #[schema(minimum = 1, maximum = 128)]
    pub(crate) n: Option<i64>,
    /// 0 takes the most likely token.
    #[schema(minimum = 0)]
    pub(crate) temperature: Option<f64>,
    /// Draw from the most likely tokens that together have this probability.
    #[schema(exclusive_minimum = 0, maximum = 1)]
    pub(crate) top_p: Option<f64>,
    /// Draw from this many of the most likely tokens; 0 or -1 for all.
    #[schema(minimum = -1)]
    pub(crate) top_k: Option<i64>,
    /// Draw from tokens that have at least this share of the most likely one's probability.
    #[schema(minimum = 0, maximum = 1)]
    pub(crate) min_p: Option<f64>,
    /// Taken off the logits of tokens that the answer has already.
    #[schema(minimum = -2, maximum = 2)]
    pub(crate) presence_penalty: Option<f64>,
    /// Taken off the logit of a token for each time that the answer has it.
    #[schema(minimum = -2, maximum = 2)]
    pub(crate) frequency_penalty: Option<f64>,
    /// Divides the logits of tokens that prompt or answer have already; 1 leaves them.
    #[schema(exclusive_minimum = 0, maximum = 1000)]
    pub(crate) repetition_penalty: Option<f64>,
    /// Added to the logits of tokens, by their ids: -100 bans, 100 forces.
    #[schema(value_type = Option<LogitBias>)]
    pub(crate) logit_bias: Option<BTreeMap<String, f64>>,
    /// The same request with the same seed has the same answer, whatever else is being served.
    pub(crate) seed: Option<i64>,
    /// The answer ends before any of these texts.
    #[schema(schema_with = optional_schema::<String>)]
    pub(crate) stop: Option<OneOrMany>,
    /// The answer ends with any of these tokens.
    #[schema(value_type = Option<Vec<TokenId>>)]
    pub(crate) stop_token_ids: Option<Vec<u32>>,
    /// Whether a stop text is left at the end of the answer.
    pub(crate) include_stop_str_in_output: Option<bool>,
    /// Whether to go on after an end-of-text token.
    pub(crate) ignore_eos: Option<bool>,
    /// Whether special tokens are left out of texts; they are unless this says no.
    pub(crate) skip_special_tokens: Option<bool>,
    /// Whether the prompt comes before the answer.
    pub(crate) echo: Option<bool>,
    /// Whether the answer comes as server-sent events.
    pub(crate) stream: Option<bool>,
    /// What a stream tells besides the answer.
    #[serde(default, deserialize_with = "read_object")]
    pub(crate) stream_options: Option<StreamOptions>,
    /// Whether token ids come back too.
    pub(crate) return_token_ids: Option<bool>,
    /// Whether log-probabilities name tokens as `token_id:5`.
    pub(crate) return_tokens_as_token_ids: Option<bool>,
    /// Whether the special tokens that the model wants around a text are added to the prompt.
    pub(crate) add_special_tokens: Option<bool>,
    /// What the answer must look like.
    pub(crate) response_format: Option<ResponseFormat>,
    /// What the answer must look like: exactly one of the forms.
    #[serde(default, deserialize_with = "read_object")]
    pub(crate) structured_outputs: Option<StructuredOutputs>,
    /// Requests share cached prompts only with those of the same salt.
    pub(crate) cache_salt: Option<String>,
    /// Becomes part of the answer's id.
    pub(crate) request_id: Option<String>,
}

#[derive(Clone, Copy, Debug, Default, Deserialize, ToSchema)]
pub(crate) struct StreamOptions {
    /// One more chunk at the end with the usage.
    pub(crate) include_usage: Option<bool>,
    /// The usage so far in every chunk.
    pub(crate) continuous_usage_stats: Option<bool>,
}

/// `text`, `json_object`, or `json_schema` with a schema.
#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(
    tag = "type",
    rename_all = "snake_case",
    expecting = "expected an object whose `type` is text, json_object or json_schema"
)]
pub(crate) enum ResponseFormat {
    Text,
    JsonObject,
    JsonSchema { json_schema: NamedSchema },
}

#[derive(Clone, Debug, Deserialize, ToSchema)]
pub(crate) struct NamedSchema {
    #[allow(dead_code, reason = "clients must send it, and nothing depends on it")]
    pub(crate) name: Option<String>,
    /// The JSON schema.
    #[schema(value_type = Object)]
    pub(crate) schema: Map<String, Value>,
}

/// Exactly one form.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
pub(crate) struct StructuredOutputs {
    /// A JSON schema.
    pub(crate) json: Option<Value>,
    /// A regular expression that the whole answer matches.
    pub(crate) regex: Option<String>,
    /// Texts of which the answer is one.
    pub(crate) choice: Option<Vec<String>>,
    /// A grammar in Lark's syntax.
    pub(crate) grammar: Option<String>,
    /// Any JSON object.
    pub(crate) json_object: Option<bool>,
}

/// What `structured_outputs` was called before, one field for each form.
#[derive(Deserialize)]
struct GuidedFields {
    guided_json: Option<Value>,
    guided_regex: Option<String>,
    guided_choice: Option<Vec<String>>,
    guided_grammar: Option<String>,
    guided_json_object: Option<bool>,
}

impl GuidedFields {
    fn structured_outputs(self) -> Option<StructuredOutputs> {
        let forms = StructuredOutputs {
            json: self.guided_json,
            regex: self.guided_regex,
            choice: self.guided_choice,
            grammar: self.guided_grammar,
            json_object: self.guided_json_object,
        };
        (forms != StructuredOutputs::default()).then_some(forms)
    }
}

/// One of the forms, the others absent or null. What is a grammar, no schema can say.
impl PartialSchema for StructuredOutputs {
    fn schema() -> RefOr<Schema> {
        let of = |kind: Type| ObjectBuilder::new().schema_type(kind);
        let text = RefOr::from(of(Type::String).min_length(Some(1)).pattern(Some("^[ -~]+$")));
        let forms: [(&str, &str, RefOr<Schema>); 4] = [
            ("json", "a JSON schema", of(Type::Object).into()),
            (
                "regex",
                "a regular expression that the whole answer matches",
                of(Type::String).format(Some(SchemaFormat::Custom("regex".into()))).into(),
            ),
            (
                "choice",
                "texts of which the answer is one",
                ArrayBuilder::new().items(text).min_items(Some(1)).into(),
            ),
            (
                "json_object",
                "any JSON object; `grammar`: a grammar in Lark's syntax",
                of(Type::Boolean).into(),
            ),
        ];
        let names = forms.each_ref().map(|(name, ..)| *name);
        let form = |(name, meaning, schema): (&'static str, &str, RefOr<Schema>)| {
            let others = names.into_iter().chain(["grammar"]).filter(|other| *other != name);
            let object = of(Type::Object).property(name, schema).required(name).description(Some(meaning));
            others.fold(object, |object, other| object.property(other, of(Type::Null)))
        };
        forms.into_iter().fold(AnyOf::builder(), |any, one| any.item(form(one))).into()
    }
}

impl ToSchema for StructuredOutputs {}

/// Fields that other servers have and this one does not do.
const UNSUPPORTED: &[(&str, AsksForNothing)] = &[
    ("suffix", is_empty),
    ("use_beam_search", is_false),
    ("length_penalty", |value| value.as_f64() == Some(1.0)),
    ("prompt_logprobs", never),
    ("prompt_embeds", never),
    ("allowed_token_ids", never),
    ("bad_words", is_empty),
    ("truncate_prompt_tokens", never),
    ("priority", |value| value.as_f64() == Some(0.0)),
    ("logits_processors", is_empty),
    ("kv_transfer_params", never),
    ("mm_processor_kwargs", never),
    ("vllm_xargs", is_empty),
    ("chat_template", never),
    ("functions", is_empty),
    ("function_call", |value| value == "none" || value == "auto"),
    ("audio", never),
    ("modalities", |value| value == &serde_json::json!(["text"])),
    ("prediction", never),
    ("web_search_options", never),
    ("thinking_token_budget", never),
];

fn never(_: &Value) -> bool {
    false
}

fn is_false(value: &Value) -> bool {
    value == &Value::Bool(false)
}

fn is_empty(value: &Value) -> bool {
    match value {
        Value::String(text) => text.is_empty(),
        Value::Array(list) => list.is_empty(),
        Value::Object(object) => object.is_empty(),
        _ => false,
    }
}

impl SamplingFields {
    /// Reads and checks the fields. Those that are known but not supported are refused by name.
    pub(crate) fn read(object: &JsonObject) -> Result<Self, ApiError> {
        object.refuse(UNSUPPORTED)?;
        let mut fields: SamplingFields = object.read()?;
        let guided: GuidedFields = object.read()?;
        fields.structured_outputs = fields.structured_outputs.or(guided.structured_outputs());
        fields.check()?;
        let (n, best_of) = (fields.n.unwrap_or(1), object.get("best_of"));
        if best_of.is_some_and(|best_of| best_of.as_i64() != Some(n)) {
            return Err(ApiError::field("best_of", "this server answers with all it generates: use n"));
        }
        Ok(fields)
    }

    pub(crate) fn check(&self) -> Result<(), ApiError> {
        at_least("max_tokens", self.max_tokens, 0)?;
        at_least("min_tokens", self.min_tokens, 0)?;
        at_least("n", self.n, 1)?;
        at_least("top_k", self.top_k, -1)?;
        if self.n.is_some_and(|n| n > MAX_CHOICES) {
            return Err(ApiError::field("n", format!("must be at most {MAX_CHOICES}")));
        }
        number("temperature", self.temperature, |it| it >= 0.0, "at least 0")?;
        number("top_p", self.top_p, |it| it > 0.0 && it <= 1.0, "above 0 and at most 1")?;
        number("min_p", self.min_p, |it| (0.0..=1.0).contains(&it), "from 0 to 1")?;
        let penalty = |it: f64| (-2.0..=2.0).contains(&it);
        number("presence_penalty", self.presence_penalty, penalty, "from -2 to 2")?;
        number("frequency_penalty", self.frequency_penalty, penalty, "from -2 to 2")?;
        let damping = |it: f64| it > 0.0 && it <= 1000.0;
        number("repetition_penalty", self.repetition_penalty, damping, "above 0 and at most 1000")?;
        if self.stream_options.is_some() && self.stream != Some(true) {
            return Err(ApiError::field("stream_options", "only streams have them: set stream to true"));
        }
        if let Some(OneOrMany::Many(stop)) = &self.stop
            && stop.len() > MAX_STOPS
        {
            return Err(ApiError::field("stop", format!("at most {MAX_STOPS} texts can end an answer")));
        }
        let too_long = |text: &String| text.len() > MAX_STOP_BYTES;
        let long = match &self.stop {
            Some(OneOrMany::One(text)) => too_long(text),
            Some(OneOrMany::Many(texts)) => texts.iter().any(too_long),
            None => false,
        };
        if long {
            return Err(ApiError::field("stop", format!("a text of more than {MAX_STOP_BYTES} bytes")));
        }
        Ok(())
    }

    /// Biases by token id.
    pub(crate) fn biases(&self) -> Result<Vec<(u32, f32)>, ApiError> {
        let bias = |(key, &bias): (&String, &f64)| match key.trim().parse() {
            Ok(id) => Ok((id, bias.clamp(-100.0, 100.0) as f32)),
            Err(_) => Err(ApiError::field("logit_bias", format!("`{key}` is no token id"))),
        };
        self.logit_bias.iter().flatten().map(bias).collect()
    }

    /// The texts that end an answer.
    pub(crate) fn stop_texts(&self) -> Vec<String> {
        let texts = self.stop.clone().map(OneOrMany::into_vec).unwrap_or_default();
        texts.into_iter().filter(|text| !text.is_empty()).collect()
    }
}

/// How the description of the API names biases by token ids; which ids there are, the server says when it knows its model.
pub(crate) struct LogitBias;

impl LogitBias {
    /// Biases of the tokens of a vocabulary.
    pub(crate) fn of(vocabulary: usize) -> Object {
        let ids = ObjectBuilder::new().schema_type(Type::String).pattern(Some(digits_below(vocabulary)));
        ObjectBuilder::new()
            .schema_type(Type::Object)
            .property_names(Some(ids))
            .additional_properties(Some(ObjectBuilder::new().schema_type(Type::Number)))
            .build()
    }
}

impl PartialSchema for LogitBias {
    fn schema() -> RefOr<Schema> {
        LogitBias::of(1 << 30).into()
    }
}

impl ToSchema for LogitBias {}

/// Refuses more than one answer, where only one can be told.
pub(crate) fn only_one_answer(fields: &SamplingFields) -> Result<(), ApiError> {
    match fields.n {
        Some(n) if n > 1 => Err(ApiError::field("n", "there is one answer here: leave it out")),
        _ => Ok(()),
    }
}

/// Refuses a number below the least.
pub(crate) fn at_least(field: &str, value: Option<i64>, least: i64) -> Result<(), ApiError> {
    match value {
        Some(value) if value < least => {
            Err(ApiError::field(field, format!("must be at least {least}, got {value}")))
        }
        _ => Ok(()),
    }
}

fn number(field: &str, value: Option<f64>, fits: impl Fn(f64) -> bool, range: &str) -> Result<(), ApiError> {
    match value {
        Some(value) if !fits(value) => Err(ApiError::field(field, format!("must be {range}, got {value}"))),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::body::object;

    fn param(text: &str) -> Value {
        let error = SamplingFields::read(&object(text)).unwrap_err();
        serde_json::to_value(error.body()).unwrap()["error"]["param"].clone()
    }

    #[test]
    fn ranges_are_checked_by_name() {
        for (body, field) in [
            (r#"{"temperature": -0.1}"#, "temperature"),
            (r#"{"temperature": "warm"}"#, "temperature"),
            (r#"{"temperature": true}"#, "temperature"),
            (r#"{"top_p": 0}"#, "top_p"),
            (r#"{"top_p": 1.01}"#, "top_p"),
            (r#"{"max_tokens": -1}"#, "max_tokens"),
            (r#"{"max_tokens": 1.5}"#, "max_tokens"),
            (r#"{"n": 0}"#, "n"),
            (r#"{"n": 1000000}"#, "n"),
            (r#"{"seed": "x"}"#, "seed"),
            (r#"{"stop": 3}"#, "stop"),
            (r#"{"stop": [3]}"#, "stop"),
            (r#"{"stream": "yes"}"#, "stream"),
            (r#"{"stream_options": {"include_usage": true}}"#, "stream_options"),
            (r#"{"logit_bias": [1]}"#, "logit_bias"),
            (r#"{"presence_penalty": 2.5}"#, "presence_penalty"),
            (r#"{"response_format": {"type": "yaml"}}"#, "response_format"),
            (r#"{"response_format": {"type": "json_schema"}}"#, "response_format"),
            (r#"{"suffix": "x"}"#, "suffix"),
            (r#"{"best_of": 3}"#, "best_of"),
            (r#"{"modalities": ["audio"]}"#, "modalities"),
        ] {
            assert_eq!(param(body), field, "{body}");
        }
    }

    #[test]
    fn what_asks_for_nothing_is_taken() {
        let body = r#"{"suffix": null, "best_of": 1, "modalities": ["text"], "bad_words": [], "user": "me",
            "temperature": null, "stream_options": null, "priority": 0}"#;
        assert!(SamplingFields::read(&object(body)).is_ok());
    }

    #[test]
    fn older_names_of_forms_are_read() {
        let fields =
            SamplingFields::read(&object(r#"{"guided_choice": ["yes", "no"], "guided_regex": null}"#))
                .unwrap();
        assert_eq!(fields.structured_outputs.unwrap().choice.unwrap(), ["yes", "no"]);
        assert!(SamplingFields::read(&object("{}")).unwrap().structured_outputs.is_none());
        assert_eq!(param(r#"{"guided_choice": "yes"}"#), "guided_choice");
    }

    #[test]
    fn biases_have_token_ids() {
        let fields = SamplingFields::read(&object(r#"{"logit_bias": {"5": -100, "7": 3e9}}"#)).unwrap();
        assert_eq!(fields.biases().unwrap(), [(5, -100.0), (7, 100.0)]);
        let fields = SamplingFields::read(&object(r#"{"logit_bias": {"x": 1}}"#)).unwrap();
        assert!(fields.biases().is_err());
    }
}
