//! Who may ask: `Authorization: Bearer KEY`, where the server has keys.

use crate::app::Shared;
use crate::openai::ApiError;
use axum::extract::{Request, State};
use axum::http::header::{AUTHORIZATION, WWW_AUTHENTICATE};
use axum::http::{HeaderMap, HeaderValue, StatusCode};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use std::hash::{BuildHasher, Hasher, RandomState};
use std::sync::OnceLock;
use subtle::ConstantTimeEq;

/// Who asks, as far as it matters.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Caller {
    /// Which of the server's keys was shown.
    key: Option<usize>,
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
    match shown_key(request.headers(), keys) {
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

/// Which of the keys the headers show. How long this takes tells nothing of how much of a key is right.
fn shown_key(headers: &HeaderMap, keys: &[String]) -> Option<usize> {
    let (scheme, shown) = headers.get(AUTHORIZATION)?.to_str().ok()?.split_once(' ')?;
    if !scheme.eq_ignore_ascii_case("bearer") {
        return None;
    }
    let shown = shown.as_bytes();
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
            shown_key(&headers, &keys)
        };
        assert_eq!(shown("Bearer first"), Some(0));
        assert_eq!(shown("bearer second key"), Some(1));
        for wrong in
            ["Bearer firs", "Bearer first1", "Bearer ", "Bearer", "first", "Basic first", "Bearer  first"]
        {
            assert_eq!(shown(wrong), None, "{wrong}");
        }
        assert_eq!(shown_key(&HeaderMap::new(), &keys), None);
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
