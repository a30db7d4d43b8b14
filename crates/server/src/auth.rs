//! Who may ask: `Authorization: Bearer KEY` where the server has keys, or on `/v1/messages` also `x-api-key: KEY`.

use crate::app::Shared;
use crate::openai::ApiError;
use crate::routes::messages;
use axum::extract::{FromRequestParts, Request, State};
use axum::http::header::{AUTHORIZATION, WWW_AUTHENTICATE};
use axum::http::request::Parts;
use axum::http::{HeaderMap, HeaderValue, StatusCode};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use std::convert::Infallible;
use std::hash::{BuildHasher, Hasher, RandomState};
use std::sync::OnceLock;
use subtle::ConstantTimeEq;

/// Who asks, as far as it matters.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Caller {
    /// Which of the server's keys was shown.
    key: Option<usize>,
}

impl FromRequestParts<Shared> for Caller {
    type Rejection = Infallible;

    async fn from_request_parts(parts: &mut Parts, _: &Shared) -> Result<Self, Infallible> {
        Ok(parts.extensions.get().copied().unwrap_or_default())
    }
}

impl Caller {
    /// Requests share cached prompts only within one key, and within one salt if they name one.
    pub(crate) fn cache_salt(self, salt: Option<&str>) -> Option<u64> {
        if self.key.is_none() && salt.is_none() {
            return None;
        }
        let mut hasher = process_hasher().build_hasher();
        hasher.write_usize(self.key.map_or(0, |key| key + 1));
        hasher.write(salt.unwrap_or_default().as_bytes());
        Some(hasher.finish())
    }
}

/// One secret for the whole process: equal salts must give equal numbers, which nobody outside can choose.
fn process_hasher() -> &'static RandomState {
    static HASHER: OnceLock<RandomState> = OnceLock::new();
    HASHER.get_or_init(RandomState::new)
}

/// Lets requests through that show a key, and tells routes whose it was.
pub(crate) async fn require_key(State(app): State<Shared>, mut request: Request, next: Next) -> Response {
    let keys = &app.options.api_keys;
    if keys.is_empty() {
        return next.run(request).await;
    }
    let of_messages = request.uri().path().starts_with(messages::PREFIX);
    let shown = shown_key(request.headers()).or_else(|| of_messages.then(|| api_key(request.headers()))?);
    match shown.and_then(|shown| known_key(shown, keys)) {
        Some(key) => {
            request.extensions_mut().insert(Caller { key: Some(key) });
            next.run(request).await
        }
        None => {
            let message = "this server wants a key: send `Authorization: Bearer KEY` with one that it knows";
            let mut response = ApiError::new(StatusCode::UNAUTHORIZED, message).into_response();
            response.headers_mut().insert(WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
            response
        }
    }
}

/// The key behind `Authorization: Bearer`.
fn shown_key(headers: &HeaderMap) -> Option<&[u8]> {
    let (scheme, shown) = headers.get(AUTHORIZATION)?.to_str().ok()?.split_once(' ')?;
    scheme.eq_ignore_ascii_case("bearer").then_some(shown.as_bytes())
}

/// The key as Anthropic's clients show it.
fn api_key(headers: &HeaderMap) -> Option<&[u8]> {
    Some(headers.get("x-api-key")?.as_bytes())
}

/// Which of the keys is shown. How long this takes tells nothing of how much of a key is right.
fn known_key(shown: &[u8], keys: &[String]) -> Option<usize> {
    let mut found = None;
    for (index, key) in keys.iter().enumerate() {
        if bool::from(key.as_bytes().ct_eq(shown)) {
            found = Some(index);
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_whole_keys_behind_the_scheme_count() {
        let keys = ["first".to_owned(), "second key".to_owned()];
        let shown = |value: &str| {
            let headers = HeaderMap::from_iter([(AUTHORIZATION, HeaderValue::from_str(value).unwrap())]);
            shown_key(&headers).and_then(|shown| known_key(shown, &keys))
        };
        assert_eq!(shown("Bearer first"), Some(0));
        assert_eq!(shown("bearer second key"), Some(1));
        for wrong in
            ["Bearer firs", "Bearer first1", "Bearer ", "Bearer", "first", "Basic first", "Bearer  first"]
        {
            assert_eq!(shown(wrong), None, "{wrong}");
        }
        assert_eq!(shown_key(&HeaderMap::new()), None);
    }

    #[test]
    fn salts_separate_callers() {
        let (open, first, second) = (Caller::default(), Caller { key: Some(0) }, Caller { key: Some(1) });
        assert_eq!(open.cache_salt(None), None);
        assert_eq!(first.cache_salt(None), first.cache_salt(None));
        assert_ne!(first.cache_salt(None), second.cache_salt(None));
        assert_ne!(open.cache_salt(Some("a")), open.cache_salt(Some("b")));
    }
}
