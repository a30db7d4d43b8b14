//! The OpenAI-compatible face of an engine.
//!
//! A request's way, in reading order: `serve` (connections, and the end of all) → `router` (all routes, and what every
//! request passes on its way: `access_log`, `auth`) → `routes/` (one file for each group) → `body` and `openai/` (what was
//! asked, checked field by field; `anthropic` for one route) → `turn` (what is asked of the assistant), with `prompt` (texts
//! and conversations become token ids) and `guide` (grammars; `calls`: of calls) → `generation/` (requests to the engine, and
//! what it tells) → `parsers/` (text becomes reasoning, content and calls of functions) → back in the route, which words it, two
//! of them as `choices`; streams go out through `sse`. Beside them: `app` (the state that all
//! share), `options` (how a server is set up), `metrics`.
//!
//! This room alone knows the wire format. It knows no devices, ranks or models: the engine behind it is a handle that
//! takes requests and tells of tokens.

mod access_log;
mod anthropic;
mod app;
mod auth;
mod body;
mod calls;
mod choices;
mod generation;
mod guide;
mod metrics;
mod openai;
mod options;
mod parsers;
mod prompt;
mod router;
mod routes;
mod serve;
mod sse;
mod turn;

pub use options::{Address, Limits, MetricNames, ServedModel, ServerOptions};
pub use parsers::{Reasoning, ToolParser};
pub use serve::{Ended, ServeError, Server, Stop, StopHandle};
