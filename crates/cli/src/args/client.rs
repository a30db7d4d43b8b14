//! `epsmoe chat` and `epsmoe bench serve`: clients of a server, ours or any other that speaks OpenAI's API.

use super::values::{JsonObject, bounded};
use clap::builder::BoolishValueParser;
use clap::{Args, ValueEnum};
use std::path::PathBuf;

/// Which server, and which of its models.
#[derive(Args, Debug)]
pub(crate) struct ServerArgs {
    /// Where the server is; no TLS
    #[arg(long, value_name = "URL", default_value = "http://127.0.0.1:8000", env = "EPSMOE_BASE_URL")]
    pub(crate) base_url: String,

    /// A model of the server; its first one when absent
    #[arg(long, value_name = "NAME")]
    pub(crate) model: Option<String>,

    /// What the server wants to be shown
    #[arg(long, value_name = "KEY", env = "EPSMOE_API_KEY", hide_env_values = true)]
    pub(crate) api_key: Option<String>,
}

/// `epsmoe chat`.
#[derive(Args, Debug)]
#[command(after_help = "\
Type a message and Enter; an empty line or Ctrl-D ends. Answers stream as they come.

Examples:
  epsmoe chat
  epsmoe chat --base-url http://127.0.0.1:9000 --system 'Answer in one sentence.'
  echo 'Why is the sky blue?' | epsmoe chat")]
pub(crate) struct ChatArgs {
    #[command(flatten)]
    pub(crate) server: ServerArgs,

    /// What the conversation begins with
    #[arg(long, value_name = "TEXT")]
    pub(crate) system: Option<String>,

    /// More variables of the server's chat template, like '{"enable_thinking": false}'
    #[arg(long, value_name = "OBJECT")]
    pub(crate) chat_template_kwargs: Option<JsonObject>,

    /// End an answer before this text; can be given several times
    #[arg(long, value_name = "TEXT")]
    pub(crate) stop: Vec<String>,

    /// Most new tokens of an answer
    #[arg(long, value_name = "TOKENS", default_value = "1024", value_parser = bounded(1, 1 << 20))]
    pub(crate) max_tokens: usize,

    /// How much chance there is; the server's default when absent
    #[arg(long, value_name = "NUMBER")]
    pub(crate) temperature: Option<f64>,
}

/// Where prompts come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Dataset {
    /// Random token ids
    Random,
    /// First turns of conversations in a file of ShareGPT's format
    Sharegpt,
}

/// `epsmoe bench serve`.
#[derive(Args, Debug)]
#[command(after_help = "\
Requests arrive at random at the asked rate (a Poisson process), or all at once. TTFT is the time to the first token, TPOT the
time of each token after it, ITL that between two pieces of a stream, E2EL that of a whole request.

Examples:
  epsmoe bench serve --num-prompts 64 --max-concurrency 32
  epsmoe bench serve --request-rate 4 --random-input-len 512 --random-output-len 64 --goodput ttft:300 tpot:40
  epsmoe bench serve --dataset-name sharegpt --dataset-path ShareGPT.json --json figures.json")]
pub(crate) struct BenchServeArgs {
    #[command(flatten)]
    pub(crate) server: ServerArgs,

    /// Where prompts come from
    #[arg(long, value_name = "NAME", default_value = "random", alias = "dataset")]
    pub(crate) dataset_name: Dataset,

    /// The file of the data set
    #[arg(long, value_name = "FILE", required_if_eq("dataset_name", "sharegpt"))]
    pub(crate) dataset_path: Option<PathBuf>,

    /// Tokens of a random prompt
    #[arg(long, value_name = "TOKENS", default_value = "1024", value_parser = bounded(1, 1 << 20))]
    pub(crate) random_input_len: usize,

    /// New tokens of an answer: exactly so many of a random prompt, at most of a conversation
    #[arg(long, value_name = "TOKENS", default_value = "128", value_parser = bounded(1, 1 << 20))]
    pub(crate) random_output_len: usize,

    /// Random token ids are below this; every vocabulary has so many
    #[arg(long, value_name = "NUMBER", default_value = "256", value_parser = bounded(16, 1 << 24))]
    pub(crate) random_vocab: usize,

    /// Requests
    #[arg(long, value_name = "NUMBER", default_value = "100", value_parser = bounded(1, 1 << 20))]
    pub(crate) num_prompts: usize,

    /// Requests a second, arriving at random; inf sends all at once
    #[arg(long, value_name = "RATE", default_value = "inf", value_parser = rate)]
    pub(crate) request_rate: f64,

    /// Most requests that are open at once
    #[arg(long, value_name = "NUMBER", default_value = "256", value_parser = bounded(1, 4096))]
    pub(crate) max_concurrency: usize,

    /// Of prompts and arrivals
    #[arg(long, value_name = "NUMBER", default_value = "0")]
    pub(crate) seed: u64,

    /// Requests are good if they keep to these, in milliseconds: ttft:MS, tpot:MS or e2el:MS
    #[arg(long, value_name = "WHAT:MS", value_parser = goal, num_args = 1..)]
    pub(crate) goodput: Vec<Goal>,

    /// Let answers end where the model ends them
    #[arg(long, value_parser = BoolishValueParser::new(), num_args = 0..=1, default_missing_value = "true", default_value = "false")]
    pub(crate) no_ignore_eos: bool,

    /// Write the figures to a file
    #[arg(long, value_name = "FILE")]
    pub(crate) json: Option<PathBuf>,
}

/// What a good request keeps to.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Goal {
    pub(crate) figure: GoalFigure,
    pub(crate) milliseconds: f64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum GoalFigure {
    Ttft,
    Tpot,
    E2el,
}

fn rate(text: &str) -> Result<f64, String> {
    let rate = text.parse().unwrap_or(f64::NAN);
    if rate > 0.0 { Ok(rate) } else { Err("must be a number above 0, or inf".into()) }
}

fn goal(text: &str) -> Result<Goal, String> {
    let wanted = || "must be like ttft:300, with ttft, tpot or e2el and milliseconds above 0".to_owned();
    let (figure, milliseconds) = text.split_once(':').ok_or_else(wanted)?;
    let figure = match figure {
        "ttft" => GoalFigure::Ttft,
        "tpot" => GoalFigure::Tpot,
        "e2el" => GoalFigure::E2el,
        _ => return Err(wanted()),
    };
    match milliseconds.parse() {
        Ok(milliseconds) if milliseconds > 0.0 => Ok(Goal { figure, milliseconds }),
        _ => Err(wanted()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn goals_and_rates_are_read() {
        assert_eq!(goal("tpot:40"), Ok(Goal { figure: GoalFigure::Tpot, milliseconds: 40.0 }));
        assert!(goal("tpot").is_err() && goal("itl:4").is_err() && goal("ttft:0").is_err());
        assert_eq!(rate("inf"), Ok(f64::INFINITY));
        assert!(rate("0").is_err() && rate("nan").is_err() && rate("fast").is_err());
    }
}
