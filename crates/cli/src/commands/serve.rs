//! `epsmoe serve`: the model behind an OpenAI-compatible server.

use crate::args::{LogFormat, MetricsCompat, Parsers, ServeArgs};
use crate::output;
use crate::setup::{Demand, Setup};
use anyhow::{Context, Result, bail};
use epsmoe_base::files::read_plain_text;
use epsmoe_engine::{EngineOptions, EngineService, ServiceOptions};
use epsmoe_server::{
    Address, Ended, Limits, MetricNames, Reasoning, ServedModel, Server, ServerOptions, Stop, ToolParser,
};
use epsmoe_text::ChatTemplate;
use std::time::Duration;
use tracing_appender::non_blocking::{NonBlockingBuilder, WorkerGuard};
use tracing_subscriber::EnvFilter;

/// Sequences at once of a group of ranks when nobody says how many.
const SEQUENCES: usize = 256;

/// Serves until a signal ends it.
pub(crate) fn run(args: &ServeArgs) -> Result<()> {
    let _log = start_log(args)?;
    let server = Server::bind(&address(args))?;
    let mut setup = Setup::new(&args.run)?;
    let tokenizer = setup.model.tokenizer()?;
    let spec = &setup.model.spec;
    let demand = Demand { sequences: SEQUENCES, tokens: spec.max_positions, step: spec.max_positions };
    let options = setup.engine_options(demand, setup.parallel, &setup.policy)?;
    let options = EngineOptions { prefix_caching: true, ..options };
    let options = setup.with_cache(options, &args.cache)?;
    let cache = setup.describe_cache(&options);
    let max_model_len = options.max_model_len;
    let template = template(args, &setup)?;
    let options_of_server = server_options(args, &setup, template.as_ref());
    let (engine, load) = setup.start(options)?;
    let service = ServiceOptions { max_queued_requests: args.max_num_queued_reqs };
    let engine = EngineService::start(engine, service)?;
    let model = ServedModel {
        engine: engine.clone(),
        tokenizer,
        template,
        generation: setup.model.generation.clone(),
        eos: spec.eos.clone(),
        vocab: spec.vocab,
        max_model_len,
        root: setup.model.name.clone(),
        ranks: vec![setup.processor(); setup.ranks],
    };
    let name = server.name().to_owned();
    let ready = || {
        let seconds = load.as_secs_f64();
        output::remark(format_args!(
            "{} on {name} ({}; {cache}; loaded in {seconds:.1} s)",
            setup.model.name,
            setup.processor()
        ));
    };
    let ended = server.run(model, options_of_server, Stop::signals(), ready)?;
    if let Some(fault) = engine.fault() {
        bail!("the ranks had stopped: {fault}");
    }
    match ended {
        Ended::Drained => Ok(()),
        Ended::AtOnce => bail!("ended by a second signal, before all requests were answered"),
    }
}

fn address(args: &ServeArgs) -> Address {
    match &args.uds {
        Some(path) => Address::Unix(path.clone()),
        None => Address::Tcp { host: args.host.clone(), port: args.port },
    }
}

/// The template that was named, or the model's own.
fn template(args: &ServeArgs, setup: &Setup) -> Result<Option<ChatTemplate>> {
    let Some(file) = &args.chat_template else { return setup.model.template() };
    let text = read_plain_text(file, ChatTemplate::MOST_BYTES);
    let text = text.with_context(|| format!("cannot read {}", file.display()))?;
    Ok(Some(ChatTemplate::from_source(text, file, &setup.model.special_tokens()?)?))
}

fn server_options(args: &ServeArgs, setup: &Setup, template: Option<&ChatTemplate>) -> ServerOptions {
    let names = &args.served_model_name;
    let source = template.map(ChatTemplate::source).unwrap_or_default();
    ServerOptions {
        served_names: if names.is_empty() { vec![setup.model.name.clone()] } else { names.clone() },
        api_keys: args.api_key.clone(),
        allowed_origins: args.allowed_origins.iter().flat_map(|origins| origins.0.clone()).collect(),
        limits: Limits {
            body_bytes: args.max_body_bytes,
            connections: args.max_connections,
            ..Limits::default()
        },
        shutdown_timeout: Duration::from_secs_f64(args.shutdown_timeout),
        metric_names: match args.metrics_compat {
            MetricsCompat::Epsmoe => MetricNames::Own,
            MetricsCompat::Vllm => MetricNames::Vllm,
        },
        tool_parser: match args.tool_call_parser {
            Parsers::Auto => ToolParser::of_template(source),
            Parsers::None => None,
            Parsers::Named(parser) => Some(parser),
        },
        reasoning: match args.reasoning_parser {
            Parsers::Auto => Reasoning::of_template(source),
            Parsers::None => None,
            Parsers::Named(parser) => Some(parser),
        },
    }
}

/// Log lines go to standard error from a thread of their own: whoever does not read them, or a full disk, holds up
/// nobody.
fn start_log(args: &ServeArgs) -> Result<WorkerGuard> {
    let Ok(filter) = EnvFilter::builder().parse(&args.log_level) else {
        bail!(
            "--log-level {}: write error, warn, info, debug, or parts like info,epsmoe::access=off",
            args.log_level
        );
    };
    let (writer, guard) = NonBlockingBuilder::default().finish(std::io::stderr());
    let log = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(writer)
        .with_ansi(false)
        .log_internal_errors(false);
    match args.log_format {
        LogFormat::Text => log.init(),
        LogFormat::Json => log.json().flatten_event(true).init(),
    }
    Ok(guard)
}
