//! How a server is set up: settled settings, as the program's flags meant them.

use crate::parsers::{Reasoning, ToolParser};
use epsmoe_engine::EngineHandle;
use epsmoe_text::{ChatTemplate, GenerationConfig, Tokenizer};
use std::path::PathBuf;
use std::time::Duration;

/// The model behind a server.
pub struct ServedModel {
    /// The way to the engine that runs it.
    pub engine: EngineHandle,
    /// Nothing for a model without one: its prompts are token ids, and so are its answers.
    pub tokenizer: Option<Tokenizer>,
    /// Nothing for a model that cannot chat.
    pub template: Option<ChatTemplate>,
    /// How its makers want it to be sampled.
    pub generation: GenerationConfig,
    /// Tokens that end a text.
    pub eos: Vec<u32>,
    /// Number of tokens it knows.
    pub vocab: usize,
    /// Most tokens of prompt and answer together.
    pub max_model_len: usize,
    /// Where it was loaded from.
    pub root: String,
    /// What each rank computes on, for people.
    pub ranks: Vec<String>,
}

/// How it is served.
#[derive(Clone, Debug)]
pub struct ServerOptions {
    /// What requests may call the model; answers to requests that do not say use the first.
    pub served_names: Vec<String>,
    /// Whoever has one of these may ask; with none, everybody may.
    pub api_keys: Vec<String>,
    /// Origins whose pages may ask; `*` is any.
    pub allowed_origins: Vec<String>,
    /// What clients may take.
    pub limits: Limits,
    /// How long running requests may go on when the server is to end.
    pub shutdown_timeout: Duration,
    /// Whose names metrics have.
    pub metric_names: MetricNames,
    /// How calls of functions are read.
    pub tool_parser: Option<ToolParser>,
    /// How reasoning is told from answers.
    pub reasoning: Option<Reasoning>,
}

/// Where a server listens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Address {
    /// A name or address, and a port.
    Tcp {
        /// Name or address of this machine.
        host: String,
        /// 0 takes a free one.
        port: u16,
    },
    /// A socket in the file system.
    Unix(PathBuf),
}

/// Bounds on what clients may take.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Largest body of a request.
    pub body_bytes: usize,
    /// Longest time from a body's first byte to its last.
    pub body_timeout: Duration,
    /// Largest head of a request: its line and headers.
    pub header_bytes: usize,
    /// Longest time until a head is whole; also how long a connection may idle.
    pub header_timeout: Duration,
    /// Longest time in which a client takes nothing of what it is sent.
    pub write_timeout: Duration,
    /// Most connections at once; more wait in the system's queue.
    pub connections: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Limits {
            body_bytes: 32 << 20,
            body_timeout: Duration::from_secs(60),
            header_bytes: 64 << 10,
            header_timeout: Duration::from_secs(60),
            write_timeout: Duration::from_secs(300),
            connections: 8192,
        }
    }
}

/// Whose names metrics have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MetricNames {
    /// `epsmoe_…`
    Own,
    /// `vllm:…`, for dashboards that are there already.
    Vllm,
}

impl MetricNames {
    pub(crate) fn prefix(self) -> &'static str {
        match self {
            MetricNames::Own => "epsmoe_",
            MetricNames::Vllm => "vllm:",
        }
    }
}
