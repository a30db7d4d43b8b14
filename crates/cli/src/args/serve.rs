//! `epsmoe serve`.

use super::RunArgs;
use super::values::{ByteSize, Origins, Parsers, bounded, seconds};
use clap::builder::NonEmptyStringValueParser;
use clap::{Args, ValueEnum};
use epsmoe_server::{Reasoning, ToolParser};
use std::path::PathBuf;

const SERVER: &str = "Server";
const LIMITS: &str = "Limits";
const LOG: &str = "Log";

#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  epsmoe serve ./Qwen3-30B-A3B
  epsmoe serve preset:mixtral-mini --port 9000 --max-num-seqs 32
  epsmoe serve ./model -dp 2 -ep --api-key secret --allowed-origins http://localhost:3000
  curl http://127.0.0.1:8000/v1/chat/completions -H 'content-type: application/json' \\
       -d '{\"messages\": [{\"role\": \"user\", \"content\": \"Hello\"}]}'

A SIGTERM ends the server when the requests that it has begun are answered; a second one ends it at once.")]
pub(crate) struct ServeArgs {
    /// Name or address to listen on
    #[arg(long, value_name = "HOST", default_value = "127.0.0.1", help_heading = SERVER)]
    pub(crate) host: String,

    /// Port to listen on; 0 for a free one
    #[arg(long, value_name = "PORT", default_value_t = 8000, help_heading = SERVER)]
    pub(crate) port: u16,

    /// Listen on a socket of this path instead
    #[arg(long, value_name = "PATH", conflicts_with_all = ["host", "port"], help_heading = SERVER)]
    pub(crate) uds: Option<PathBuf>,

    /// What requests call the model; can be given several times [default: MODEL as typed]
    #[arg(long, value_name = "NAME", value_parser = NonEmptyStringValueParser::new(), help_heading = SERVER)]
    pub(crate) served_model_name: Vec<String>,

    /// Answer only requests with this key; can be given several times
    #[arg(
        long,
        value_name = "KEY",
        hide_env_values = true,
        value_parser = NonEmptyStringValueParser::new(),
        help_heading = SERVER
    )]
    pub(crate) api_key: Vec<String>,

    /// Let pages of this origin ask, * for all; can be given several times, or as a JSON list
    #[arg(long, value_name = "ORIGIN", help_heading = SERVER)]
    pub(crate) allowed_origins: Vec<Origins>,

    /// A file with the chat template to use instead of the model's own
    #[arg(long, value_name = "FILE", help_heading = SERVER)]
    pub(crate) chat_template: Option<PathBuf>,

    /// How calls of functions are read: hermes, qwen3_coder, mistral, deepseek_v3, deepseek_v31, openai (gpt-oss) or none;
    /// auto looks at the chat template
    #[arg(long, value_name = "FORMAT", default_value = "auto", help_heading = SERVER)]
    pub(crate) tool_call_parser: Parsers<ToolParser>,

    /// How reasoning is told from answers: deepseek_r1, deepseek_v3, qwen3, mistral, openai_gptoss or none; auto looks at the
    /// chat template
    #[arg(long, value_name = "FORMAT", default_value = "auto", help_heading = SERVER)]
    pub(crate) reasoning_parser: Parsers<Reasoning>,

    /// Whose names /metrics uses
    #[arg(long, value_enum, value_name = "NAMES", default_value_t = MetricsCompat::Epsmoe, help_heading = SERVER)]
    pub(crate) metrics_compat: MetricsCompat,

    /// Most requests that wait for those that run; more are answered with 503
    #[arg(long, value_name = "REQUESTS", default_value = "4096", value_parser = bounded(0, 1 << 20), help_heading = LIMITS)]
    pub(crate) max_num_queued_reqs: usize,

    #[command(flatten)]
    pub(crate) cache: CacheArgs,

    /// Largest body of a request in bytes
    #[arg(long, value_name = "BYTES", default_value = "33554432", value_parser = bounded(1024, 1 << 32), help_heading = LIMITS)]
    pub(crate) max_body_bytes: usize,

    /// Most connections at once
    #[arg(long, value_name = "CONNECTIONS", default_value = "8192", value_parser = bounded(1, 1 << 20), help_heading = LIMITS)]
    pub(crate) max_connections: usize,

    /// How long requests may go on after a SIGTERM, in seconds
    #[arg(long, value_name = "SECONDS", default_value = "300", value_parser = seconds, help_heading = LIMITS)]
    pub(crate) shutdown_timeout: f64,

    /// What is logged: error, warn, info, debug, or parts like info,epsmoe::access=off
    #[arg(long, value_name = "FILTER", default_value = "info", help_heading = LOG)]
    pub(crate) log_level: String,

    /// How lines of the log look
    #[arg(long, value_enum, value_name = "FORMAT", default_value_t = LogFormat::Text, help_heading = LOG)]
    pub(crate) log_format: LogFormat,

    /// A YAML file in which each key is a flag; flags and variables go before it
    #[arg(long, value_name = "FILE")]
    pub(crate) config: Option<PathBuf>,

    #[command(flatten)]
    pub(crate) run: RunArgs,
}

/// How large the KV cache is.
#[derive(Args, Debug)]
pub(crate) struct CacheArgs {
    /// Size of the KV cache of each rank, like 8GiB [default: what is left of --gpu-memory-utilization, at most what
    /// --max-num-seqs sequences of --max-model-len need]
    #[arg(long, env = "EPSMOE_KV_CACHE_MEMORY_BYTES", value_name = "BYTES", help_heading = LIMITS)]
    pub(crate) kv_cache_memory_bytes: Option<ByteSize>,

    /// States that are kept behind blocks of the KV cache, of a model whose sequences carry states along, so that prompts which begin
    /// alike go on from there [default: --max-num-seqs, in at most a quarter of the memory that is left]
    #[arg(long, env = "EPSMOE_KEPT_STATES", value_name = "STATES", value_parser = bounded(0, 1 << 20), help_heading = LIMITS)]
    pub(crate) kept_states: Option<usize>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum MetricsCompat {
    Epsmoe,
    Vllm,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum LogFormat {
    Text,
    Json,
}
