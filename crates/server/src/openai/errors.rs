//! Errors as clients read them: `{"error": {message, type, param, code}}`, all four keys always there.

use axum::Json;
use axum::http::header::RETRY_AFTER;
use axum::http::{HeaderValue, StatusCode};
use axum::response::{IntoResponse, Response};
use epsmoe_engine::{EngineError, Failure, Rejected};
use serde::Serialize;
use utoipa::{IntoResponses, ToSchema};

/// Seconds after which a client may try again when the queue is full.
const RETRY_AFTER_SECONDS: u16 = 1;

/// Why a request is not answered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ApiError {
    status: StatusCode,
    message: String,
    /// The field that is to blame.
    param: Option<String>,
    /// Whether the same request may do better in a moment.
    passing: bool,
}

/// The body of every answer that is none.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct ErrorBody {
    error: ErrorObject,
}

#[derive(Debug, Serialize, ToSchema)]
struct ErrorObject {
    /// What is wrong, and how to mend it.
    message: String,
    /// The kind of error, such as `BadRequestError`.
    #[schema(examples("BadRequestError"))]
    r#type: &'static str,
    /// The field that is to blame, if it is one.
    #[schema(required)]
    param: Option<String>,
    /// The HTTP status.
    code: u16,
}

/// How a request with a body is refused, for the description of the API.
#[derive(IntoResponses)]
#[allow(dead_code, reason = "only its description is used")]
pub(crate) enum Refusals {
    /// the request is wrong
    #[response(status = 400)]
    Wrong(#[to_schema] ErrorBody),
    /// no key, or another one
    #[response(status = 401)]
    Key(#[to_schema] ErrorBody),
    /// no such model
    #[response(status = 404)]
    Model(#[to_schema] ErrorBody),
    /// the body took too long
    #[response(status = 408)]
    Slow(#[to_schema] ErrorBody),
    /// the body is too large
    #[response(status = 413)]
    Large(#[to_schema] ErrorBody),
    /// the body is no JSON
    #[response(status = 415)]
    NoJson(#[to_schema] ErrorBody),
    /// the model has failed on the way
    #[response(status = 500)]
    Failed(#[to_schema] ErrorBody),
    /// too much to do, or the server is shutting down
    #[response(status = 503)]
    Busy(#[to_schema] ErrorBody),
}

impl ApiError {
    pub(crate) fn new(status: StatusCode, message: impl Into<String>) -> Self {
        ApiError { status, message: message.into(), param: None, passing: false }
    }

    /// 400 for the whole request.
    pub(crate) fn bad_request(message: impl Into<String>) -> Self {
        ApiError::new(StatusCode::BAD_REQUEST, message)
    }

    /// 400 for one field.
    pub(crate) fn field(param: &str, problem: impl AsRef<str>) -> Self {
        let message = format!("{param}: {}", problem.as_ref());
        ApiError { param: Some(param.to_owned()), ..ApiError::bad_request(message) }
    }

    /// 404 for a model of another name.
    pub(crate) fn unknown_model(name: &str, served: &[String]) -> Self {
        let served = served.join("`, `");
        let message = format!("The model `{name}` does not exist. This server has `{served}`.");
        ApiError { param: Some("model".into()), ..ApiError::new(StatusCode::NOT_FOUND, message) }
    }

    /// 400 for more tokens than the context has; agents and libraries look for the beginning of the message.
    pub(crate) fn context_length(most: usize, param: &str, asked: impl AsRef<str>) -> Self {
        let asked = asked.as_ref();
        let message = format!(
            "This model's maximum context length is {most} tokens. However, {asked}. Please shorten the prompt."
        );
        ApiError { param: Some(param.to_owned()), ..ApiError::bad_request(message) }
    }

    /// 500, and never the client's fault.
    pub(crate) fn internal(message: impl Into<String>) -> Self {
        ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, message)
    }

    /// 503 for what passes: clients are asked to try again.
    pub(crate) fn busy(message: impl Into<String>) -> Self {
        ApiError { passing: true, ..ApiError::unavailable(message) }
    }

    /// 503.
    pub(crate) fn unavailable(message: impl Into<String>) -> Self {
        ApiError::new(StatusCode::SERVICE_UNAVAILABLE, message)
    }

    pub(crate) fn status(&self) -> StatusCode {
        self.status
    }

    /// The field that is to blame, if it is one.
    pub(crate) fn param(&self) -> Option<&str> {
        self.param.as_deref()
    }

    /// What is wrong, and how to mend it.
    pub(crate) fn message(&self) -> &str {
        &self.message
    }

    /// The body of the answer, also sent in the middle of a stream.
    pub(crate) fn body(&self) -> ErrorBody {
        ErrorBody {
            error: ErrorObject {
                message: self.message.clone(),
                r#type: type_of(self.status),
                param: self.param.clone(),
                code: self.status.as_u16(),
            },
        }
    }
}

/// What clients of this dialect call a status.
fn type_of(status: StatusCode) -> &'static str {
    match status {
        StatusCode::UNAUTHORIZED => "AuthenticationError",
        StatusCode::FORBIDDEN => "PermissionDeniedError",
        StatusCode::NOT_FOUND => "NotFoundError",
        StatusCode::METHOD_NOT_ALLOWED => "MethodNotAllowedError",
        StatusCode::TOO_MANY_REQUESTS => "RateLimitError",
        StatusCode::SERVICE_UNAVAILABLE => "ServiceUnavailableError",
        StatusCode::NOT_IMPLEMENTED => "NotImplementedError",
        status if status.is_client_error() => "BadRequestError",
        _ => "InternalServerError",
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = (self.status, Json(self.body())).into_response();
        if self.passing {
            response.headers_mut().insert(RETRY_AFTER, HeaderValue::from(RETRY_AFTER_SECONDS));
        }
        // For those on the way out who word it otherwise.
        response.extensions_mut().insert(self);
        response
    }
}

/// Refused at the engine's door.
impl From<Rejected> for ApiError {
    fn from(rejected: Rejected) -> Self {
        match rejected {
            Rejected::QueueFull { .. } | Rejected::Draining => ApiError::busy(rejected.to_string()),
            Rejected::TooMany { .. } => ApiError::field("n", rejected.to_string()),
            Rejected::Stopped(fault) => ApiError::unavailable(format!("the model has stopped: {fault}")),
            Rejected::Invalid(EngineError::Parameter { field, problem }) => ApiError::field(field, problem),
            Rejected::Invalid(EngineError::ContextLength { most, prompt, new }) => {
                let asked = format!("{prompt} are in the prompt and {new} are to be generated");
                ApiError::context_length(most, "max_tokens", asked)
            }
            Rejected::Invalid(error) => ApiError::bad_request(error.to_string()),
        }
    }
}

/// Failed on the way: because of what was asked, such as a grammar that leads nowhere, or because the ranks stopped.
impl From<Failure> for ApiError {
    fn from(failure: Failure) -> Self {
        match failure {
            Failure::Request(problem) => ApiError::bad_request(problem),
            Failure::Stopped(fault) => ApiError::internal(fault.to_string()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_four_keys_are_always_there() {
        let plain = serde_json::to_value(ApiError::bad_request("no").body()).unwrap();
        let whole = serde_json::json!({
            "error": { "message": "no", "type": "BadRequestError", "param": null, "code": 400 }
        });
        assert_eq!(plain, whole);
        let named = serde_json::to_value(ApiError::field("top_p", "must be above 0").body()).unwrap();
        assert_eq!(named["error"]["param"], "top_p");
        assert_eq!(named["error"]["message"], "top_p: must be above 0");
    }

    #[test]
    fn only_what_passes_is_tried_again() {
        let full = ApiError::from(Rejected::QueueFull { open: 3, most: 3 }).into_response();
        assert_eq!((full.status().as_u16(), full.headers()[RETRY_AFTER].to_str().unwrap()), (503, "1"));
        assert!(ApiError::bad_request("no").into_response().headers().get(RETRY_AFTER).is_none());
    }
}
