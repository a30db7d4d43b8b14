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

/// How the description of the API words the ids below a number in decimal digits, as a regular expression.
///
/// Below 320: `^([0-9]|[1-9][0-9]|[1-2][0-9][0-9]|3[0-0][0-9]|31[0-8]|319)$`.
pub(crate) fn digits_below(end: usize) -> String {
    let last = end.saturating_sub(1).to_string().into_bytes();
    let any = |digits: usize| "[0-9]".repeat(digits);
    let shorter = (1..last.len()).map(|digits| match digits {
        1 => any(1),
        _ => format!("[1-9]{}", any(digits - 1)),
    });
    // As long as the last: equal up to a digit that is smaller, then whatever.
    let smaller = last.iter().enumerate().filter_map(|(at, &digit)| {
        let (least, most) = (if at == 0 && last.len() > 1 { b'1' } else { b'0' }, digit - 1);
        let same = String::from_utf8_lossy(&last[..at]);
        (digit > least).then(|| {
            format!("{same}[{}-{}]{}", char::from(least), char::from(most), any(last.len() - at - 1))
        })
    });
    let itself = String::from_utf8_lossy(&last).into_owned();
    let all: Vec<String> = shorter.chain(smaller).chain([itself]).collect();
    format!("^({})$", all.join("|"))
}

/// An object with the properties of both.
pub(crate) fn merged(first: RefOr<Schema>, second: RefOr<Schema>) -> Object {
    let (RefOr::T(Schema::Object(mut all)), RefOr::T(Schema::Object(more))) = (first, second) else {
        return Object::new();
    };
    all.properties.extend(more.properties);
    all.required.extend(more.required);
    all
}

/// What fields may be for a request to be right, in the words of JSON Schema.
pub(crate) struct Condition(ObjectBuilder);

impl Condition {
    fn on(field: &'static str, schema: impl Into<RefOr<Schema>>) -> Self {
        Condition(ObjectBuilder::new().schema_type(SchemaType::AnyValue).property(field, schema))
    }

    fn required(self, field: &'static str) -> Self {
        Condition(self.0.required(field))
    }

    /// The field is absent, or one of these values.
    pub(crate) fn absent_or(field: &'static str, values: &[Value]) -> Self {
        let values = values.iter().cloned().chain([Value::Null]);
        let any = ObjectBuilder::new().schema_type(SchemaType::AnyValue);
        Condition::on(field, any.enum_values(Some(values)))
    }

    /// The field is true.
    pub(crate) fn is_true(field: &'static str) -> Self {
        let schema = ObjectBuilder::new().schema_type(Type::Boolean).enum_values(Some([true]));
        Condition::on(field, schema).required(field)
    }

    /// The field is there, and not null.
    pub(crate) fn is_there(field: &'static str, kind: Type) -> Self {
        Condition::on(field, ObjectBuilder::new().schema_type(kind)).required(field)
    }

    /// The field is a list with something in it.
    pub(crate) fn has_some(field: &'static str) -> Self {
        let any = RefOr::from(ObjectBuilder::new().schema_type(SchemaType::AnyValue));
        Condition::on(field, ArrayBuilder::new().items(any).min_items(Some(1))).required(field)
    }

    /// The field is absent, null, or a number in a range; and so on for the field of another range.
    fn and_within(self, field: &'static str, least: i64, most: Option<i64>) -> Self {
        let number = ObjectBuilder::new().schema_type(SchemaType::from_iter([Type::Integer, Type::Null]));
        Condition(self.0.property(field, number.minimum(Some(least)).maximum(most)))
    }
}

/// An object of which in each of the pairs at least one condition holds.
pub(crate) fn either(object: Object, pairs: impl IntoIterator<Item = [Condition; 2]>) -> RefOr<Schema> {
    let any = |[one, other]: [Condition; 2]| AnyOf::builder().item(one.0.build()).item(other.0.build());
    pairs.into_iter().fold(AllOf::builder().item(object), |all, pair| all.item(any(pair))).into()
}

/// The least of an answer is no more than its most, by any of the names in `most`. No schema compares two fields: both
/// are on one side of a number, or none has to be there. (One pair for all names: whoever makes up requests from the
/// description multiplies the pairs out.)
pub(crate) fn least_and_most(most: &[&'static str]) -> [Condition; 2] {
    const BORDER: i64 = 16;
    let nothing = Condition(ObjectBuilder::new().schema_type(SchemaType::AnyValue));
    let least = nothing.and_within("min_tokens", 0, Some(BORDER));
    let apart = most.iter().fold(least, |all, name| all.and_within(name, BORDER, None));
    [Condition::absent_or("min_tokens", &[0.into()]), apart]
}

/// `stream_options` want a stream.
pub(crate) fn streamed() -> [Condition; 2] {
    [Condition::absent_or("stream_options", &[]), Condition::is_true("stream")]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ids_below_a_number_are_one_pattern() {
        assert_eq!(digits_below(1), "^(0)$");
        assert_eq!(digits_below(10), "^([0-8]|9)$");
        assert_eq!(digits_below(320), "^([0-9]|[1-9][0-9]|[1-2][0-9][0-9]|3[0-0][0-9]|31[0-8]|319)$");
    }
}
