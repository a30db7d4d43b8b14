//! The program as a user meets it: words in, text out.

#![expect(clippy::unwrap_used, reason = "what panics in a test has failed")]

mod commands;
mod common;
mod conversations;
mod errors;
mod hostile;
mod places;
mod processes;
mod quantised;
mod serve;
mod signals;
