//! The wire format, as data: what clients send and what they are answered. Nothing here computes anything.
//!
//! `errors` (the error object), `sampling` (fields that both ways to generate have), `completions`, `chat`, `tools`,
//! `logprobs`, `usage`, `models`, `tokenize`.

pub(crate) mod chat;
pub(crate) mod completions;
pub(crate) mod errors;
pub(crate) mod logprobs;
pub(crate) mod models;
pub(crate) mod one_or_many;
pub(crate) mod sampling;
pub(crate) mod tokenize;
pub(crate) mod tools;
pub(crate) mod usage;

pub(crate) use errors::{ApiError, ErrorBody};
pub(crate) use one_or_many::OneOrMany;
pub(crate) use usage::Usage;

use std::time::{SystemTime, UNIX_EPOCH};

/// Seconds since 1970, as answers tell when they were made.
pub(crate) fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

/// An identifier nobody else has: `prefix-…`.
pub(crate) fn new_id(prefix: &str) -> String {
    format!("{prefix}-{}", uuid::Uuid::new_v4().simple())
}
