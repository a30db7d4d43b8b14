//! A server over a checkpoint, as clients see it.

#![expect(clippy::unwrap_used, reason = "what panics in a test has failed")]

mod answers;
mod chat;
mod company;
mod connections;
mod dialects;
mod endings;
mod errors;
mod guided;
mod routes;
mod support;
