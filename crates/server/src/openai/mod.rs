//! The wire format, as data: what clients send and what they are answered. Nothing here computes anything.
//!
//! `errors` (the error object), `sampling` (fields that both ways to generate have), `completions`, `chat`, `responses`, `tools`,
//! `logprobs`, `usage`, `models`, `tokenize`.

pub(crate) mod chat;
pub(crate) mod completions;
pub(crate) mod errors;
pub(crate) mod logprobs;
pub(crate) mod models;
pub(crate) mod one_or_many;
pub(crate) mod responses;
pub(crate) mod sampling;
pub(crate) mod tokenize;
pub(crate) mod tools;
pub(crate) mod usage;

pub(crate) use errors::{ApiError, ErrorBody};
pub(crate) use one_or_many::OneOrMany;
pub(crate) use usage::Usage;

use serde_json::Value;
use std::time::{SystemTime, UNIX_EPOCH};
use utoipa::openapi::schema::{AllOf, AnyOf, ArrayBuilder, Object, SchemaType};
use utoipa::openapi::{ObjectBuilder, RefOr, Schema, Type};
use utoipa::{PartialSchema, ToSchema};

/// Seconds since 1970, as answers tell when they were made.
pub(crate) fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

/// An identifier nobody else has: `prefix-…`.
pub(crate) fn new_id(prefix: &str) -> String {
    format!("{prefix}-{}", uuid::Uuid::new_v4().simple())
}

/// How the description of the API names the ids of tokens; how many there are, the server says when it knows its model.
pub(crate) struct TokenId;

impl PartialSchema for TokenId {
    fn schema() -> RefOr<Schema> {
        ObjectBuilder::new().schema_type(Type::Integer).minimum(Some(0)).into()
    }
}

impl ToSchema for TokenId {}

/// An object with the properties of both.
pub(crate) fn merged(first: RefOr<Schema>, second: RefOr<Schema>) -> Object {
    let (RefOr::T(Schema::Object(mut all)), RefOr::T(Schema::Object(more))) = (first, second) else {
        return Object::new();
    };
    all.properties.extend(more.properties);
    all.required.extend(more.required);
    all
}

/// What a field may be for a request to be right, in the words of JSON Schema.
pub(crate) struct Condition {
    field: &'static str,
    schema: Schema,
    /// Whether it must be there.
    required: bool,
}

impl Condition {
    /// The field is absent, or one of these values.
    pub(crate) fn absent_or(field: &'static str, values: &[Value]) -> Self {
        let values = values.iter().cloned().chain([Value::Null]);
        let any = ObjectBuilder::new().schema_type(SchemaType::AnyValue);
        Condition { field, schema: any.enum_values(Some(values)).build().into(), required: false }
    }

    /// The field is true.
    pub(crate) fn is_true(field: &'static str) -> Self {
        let schema = ObjectBuilder::new().schema_type(Type::Boolean).enum_values(Some([true])).build();
        Condition { field, schema: schema.into(), required: true }
    }

    /// The field is there, and not null.
    pub(crate) fn is_there(field: &'static str, kind: Type) -> Self {
        let schema = ObjectBuilder::new().schema_type(kind).build();
        Condition { field, schema: schema.into(), required: true }
    }

    /// The field is a list with something in it.
    pub(crate) fn has_some(field: &'static str) -> Self {
        let any = RefOr::from(ObjectBuilder::new().schema_type(SchemaType::AnyValue));
        let schema = ArrayBuilder::new().items(any).min_items(Some(1)).build();
        Condition { field, schema: schema.into(), required: true }
    }

    /// The field is absent, null, or a number in a range.
    fn absent_or_within(field: &'static str, least: i64, most: Option<i64>) -> Self {
        let number = ObjectBuilder::new().schema_type(SchemaType::from_iter([Type::Integer, Type::Null]));
        let schema = number.minimum(Some(least)).maximum(most).build();
        Condition { field, schema: schema.into(), required: false }
    }

    fn schema(self) -> Object {
        let object = ObjectBuilder::new().schema_type(SchemaType::AnyValue).property(self.field, self.schema);
        if self.required { object.required(self.field).build() } else { object.build() }
    }
}

/// An object of which in each of the pairs at least one condition holds.
pub(crate) fn either(object: Object, pairs: impl IntoIterator<Item = [Condition; 2]>) -> RefOr<Schema> {
    let any = |[one, other]: [Condition; 2]| AnyOf::builder().item(one.schema()).item(other.schema());
    pairs.into_iter().fold(AllOf::builder().item(object), |all, pair| all.item(any(pair))).into()
}

/// The least of an answer is no more than its most, in `most`. No schema compares two fields: both are on one side of a
/// number, or one of them is not said.
pub(crate) fn least_and_most(most: &'static str) -> [[Condition; 2]; 2] {
    const BORDER: i64 = 16;
    let within = Condition::absent_or_within;
    [
        [within("min_tokens", 0, Some(BORDER)), Condition::absent_or(most, &[])],
        [within(most, BORDER, None), Condition::absent_or("min_tokens", &[0.into()])],
    ]
}

/// `stream_options` want a stream.
pub(crate) fn streamed() -> [Condition; 2] {
    [Condition::absent_or("stream_options", &[]), Condition::is_true("stream")]
}
