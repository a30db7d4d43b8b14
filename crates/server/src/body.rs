//! Reading a request's body: bounded in size and time, and every complaint names its field.

use crate::app::Shared;
use crate::openai::ApiError;
use axum::body::{Body, Bytes, to_bytes};
use axum::extract::{FromRequest, Request};
use axum::http::header::CONTENT_TYPE;
use axum::http::{HeaderMap, StatusCode};
use http_body_util::LengthLimitError;
use serde::de::{DeserializeOwned, Error as _};
use serde::{Deserialize, Deserializer};
use serde_json::{Map, Value};
use std::error::Error as _;

/// Whether a value of a field leaves everything as it is.
pub(crate) type AsksForNothing = fn(&Value) -> bool;

/// The object in a request's body.
pub(crate) struct JsonObject(Map<String, Value>);

impl FromRequest<Shared> for JsonObject {
    type Rejection = ApiError;

    async fn from_request(request: Request, app: &Shared) -> Result<Self, ApiError> {
        check_content_type(request.headers())?;
        let bytes = read(request.into_body(), app).await?;
        parse(&bytes).map(JsonObject)
    }
}

impl JsonObject {
    /// The fields that `T` has. A field that is null is one that is absent.
    pub(crate) fn read<'de, T: Deserialize<'de>>(&'de self) -> Result<T, ApiError> {
        let fields = serde::de::value::MapDeserializer::new(
            self.0.iter().filter(|(_, value)| !value.is_null()).map(|(key, value)| (key.as_str(), value)),
        );
        serde_path_to_error::deserialize(fields).map_err(|error| {
            let path = error.path().to_string();
            let problem = error.inner().to_string();
            match path.split(['.', '[']).next().filter(|field| !field.is_empty()) {
                Some(field) if field == path => ApiError::field(field, problem),
                Some(field) => ApiError::field(field, format!("{path}: {problem}")),
                // A field that is missing has no path, but its name is in the message.
                None => match problem.split('`').nth(1).filter(|_| problem.starts_with("missing field")) {
                    Some(field) => ApiError::field(field, "this field is required"),
                    None => ApiError::bad_request(problem),
                },
            }
        })
    }

    /// Refuses the first of these fields that is there and asks for something.
    pub(crate) fn refuse(&self, unsupported: &[(&str, AsksForNothing)]) -> Result<(), ApiError> {
        for (field, asks_for_nothing) in unsupported {
            if self.get(field).is_some_and(|value| !asks_for_nothing(value)) {
                return Err(ApiError::field(field, "this server does not support it: leave it out"));
            }
        }
        Ok(())
    }

    /// The value of a field; nothing if it is absent or null.
    pub(crate) fn get(&self, field: &str) -> Option<&Value> {
        self.0.get(field).filter(|value| !value.is_null())
    }
}

/// Reads a field that is an object. A list of the object's values, which derived readers take for one, is none.
pub(crate) fn read_object<'de, D: Deserializer<'de>, T: DeserializeOwned>(
    field: D,
) -> Result<Option<T>, D::Error> {
    let object = Option::<Map<String, Value>>::deserialize(field)?;
    object.map(|object| serde_json::from_value(object.into())).transpose().map_err(D::Error::custom)
}

/// JSON, or nothing said. What a page of another origin may send without asking first is not taken.
fn check_content_type(headers: &HeaderMap) -> Result<(), ApiError> {
    let Some(kind) = headers.get(CONTENT_TYPE) else { return Ok(()) };
    let kind = kind.to_str().unwrap_or_default().split(';').next().unwrap_or_default().trim();
    let kind = kind.to_ascii_lowercase();
    if kind == "application/json" || (kind.starts_with("application/") && kind.ends_with("+json")) {
        return Ok(());
    }
    let message =
        format!("the body is `{kind}`, but this server reads JSON: send `content-type: application/json`");
    Err(ApiError::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, message))
}

async fn read(body: Body, app: &Shared) -> Result<Bytes, ApiError> {
    let limits = &app.options.limits;
    let reading = tokio::time::timeout(limits.body_timeout, to_bytes(body, limits.body_bytes));
    let read = tokio::select! {
        read = reading => read,
        ended = app.last_bodies() => return Err(ended),
    };
    match read {
        Ok(Ok(bytes)) => Ok(bytes),
        Ok(Err(error)) if error.source().is_some_and(|source| source.is::<LengthLimitError>()) => {
            Err(too_large(limits.body_bytes))
        }
        Ok(Err(error)) => Err(ApiError::bad_request(format!("the body could not be read: {error}"))),
        Err(_) => {
            let message = format!("the body took longer than {} s", limits.body_timeout.as_secs());
            Err(ApiError::new(StatusCode::REQUEST_TIMEOUT, message))
        }
    }
}

/// 413.
pub(crate) fn too_large(limit: usize) -> ApiError {
    let message = format!("the body is larger than this server's limit of {limit} bytes");
    ApiError::new(StatusCode::PAYLOAD_TOO_LARGE, message)
}

fn parse(bytes: &[u8]) -> Result<Map<String, Value>, ApiError> {
    if bytes.trim_ascii().is_empty() {
        return Err(ApiError::bad_request("the body is empty: send a JSON object"));
    }
    match serde_json::from_slice(bytes) {
        Ok(Value::Object(mut object)) => {
            object.values_mut().for_each(|value| whole_numbers(value, NUMBERS_WITHIN));
            match TYPED.iter().find(|field| object.get(**field).is_some_and(has_numbered_type)) {
                Some(field) => {
                    Err(ApiError::field(field, "the `type` of what is in it is a word, not a number"))
                }
                None => Ok(object),
            }
        }
        Ok(_) => Err(ApiError::bad_request("the body is no JSON object")),
        Err(error) => Err(ApiError::bad_request(format!("the body is not valid JSON: {error}"))),
    }
}

/// Fields with objects of several types.
const TYPED: &[&str] =
    &["messages", "input", "system", "response_format", "tool_choice", "thinking", "output_config"];

/// Whether a type is a number, which derived readers would take for a place in their list of types. What clients may
/// say as they like, such as arguments and schemas, is not looked into.
fn has_numbered_type(value: &Value) -> bool {
    match value {
        Value::Array(list) => list.iter().any(has_numbered_type),
        Value::Object(object) => {
            let inner = ["content", "output", "format"];
            object.get("type").is_some_and(Value::is_number)
                || inner.iter().any(|field| object.get(*field).is_some_and(has_numbered_type))
        }
        _ => false,
    }
}

/// Lists of lists of numbers are the deepest numbers that a field of ours has; what is in objects is the client's.
const NUMBERS_WITHIN: usize = 2;

/// To JSON `5.0` is a whole number as good as `5`.
fn whole_numbers(value: &mut Value, within: usize) {
    match value {
        Value::Number(number) if number.is_f64() => {
            let whole =
                number.as_f64().filter(|number| number.fract() == 0.0 && number.abs() < 2f64.powi(53));
            if let Some(whole) = whole {
                *value = (whole as i64).into();
            }
        }
        Value::Array(list) if within > 0 => {
            list.iter_mut().for_each(|value| whole_numbers(value, within - 1))
        }
        _ => {}
    }
}

#[cfg(test)]
pub(crate) fn object(text: &str) -> JsonObject {
    JsonObject(parse(text.as_bytes()).unwrap())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn types_are_words() {
        for text in [
            r#"{"messages": [{"content": [{"type": "tool_result", "content": [{"type": 0}]}]}]}"#,
            r#"{"response_format": {"type": 1}}"#,
            r#"{"output_config": {"format": {"type": 0}}}"#,
        ] {
            assert!(parse(text.as_bytes()).is_err(), "{text}");
        }
        let arguments = r#"{"messages": [{"content": [{"type": "tool_use", "input": {"type": 3}}]}]}"#;
        assert!(parse(arguments.as_bytes()).is_ok());
    }

    #[derive(Debug, Deserialize)]
    struct Fields {
        #[allow(dead_code, reason = "only its type is looked at")]
        list: Vec<u32>,
        number: Option<f64>,
    }

    fn complaint(text: &str) -> (Value, String) {
        let body = serde_json::to_value(object(text).read::<Fields>().unwrap_err().body()).unwrap();
        (body["error"]["param"].clone(), body["error"]["message"].as_str().unwrap().to_owned())
    }

    #[test]
    fn complaints_name_the_field() {
        assert_eq!(complaint("{}"), ("list".into(), "list: this field is required".into()));
        assert_eq!(complaint(r#"{"list": null}"#).0, "list");
        assert_eq!(complaint(r#"{"list": 3}"#).0, "list");
        let (param, message) = complaint(r#"{"list": [1, "x"]}"#);
        assert_eq!(param, "list");
        assert!(message.starts_with("list: list[1]: invalid type: string"), "{message}");
        assert_eq!(complaint(r#"{"list": [], "number": true}"#).0, "number");
    }

    #[test]
    fn null_is_absent_and_unknown_fields_are_ignored() {
        let fields: Fields = object(r#"{"list": [1], "number": null, "other": {}}"#).read().unwrap();
        assert_eq!(fields.number, None);
    }

    #[test]
    fn whole_numbers_may_have_a_point() {
        let fields: Fields = object(r#"{"list": [1.0, 2], "number": 3.0}"#).read().unwrap();
        assert_eq!(fields.number, Some(3.0));
        assert!(object(r#"{"list": [1.5]}"#).read::<Fields>().is_err());
    }

    #[test]
    fn what_is_no_object_is_refused() {
        for body in ["", " \n", "[]", "3", "{", "{\"a\": NaN}", &"[".repeat(100_000), "{} {}"] {
            assert!(parse(body.as_bytes()).is_err(), "{body:.20}");
        }
    }
}
