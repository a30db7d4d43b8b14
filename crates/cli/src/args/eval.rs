//! How well a model predicts.

use super::RunArgs;
use super::values::bounded;
use clap::builder::BoolishValueParser;
use clap::{Args, Subcommand};
use std::path::PathBuf;

#[derive(Args, Debug)]
pub(crate) struct EvalArgs {
    #[command(subcommand)]
    pub(crate) command: EvalCommand,
}

#[derive(Subcommand, Debug)]
pub(crate) enum EvalCommand {
    /// Perplexity of a text, and how far another model's predictions are away
    Perplexity(Box<PerplexityArgs>),
}

#[derive(Args, Debug)]
#[command(after_help = "\
The text is cut into pieces of --context tokens, each of which begins anew; every token of a piece but the first is \
predicted from those before it. With --reference, KL divergence is the mean over tokens of that of this model's \
predictions from the reference's, in nats.

Examples:
  epsmoe eval perplexity text.txt --model ./Qwen3-30B-A3B
  epsmoe eval perplexity text.txt --model ./Qwen3-30B-A3B-int4 --reference ./Qwen3-30B-A3B --json")]
pub(crate) struct PerplexityArgs {
    /// A text in UTF-8
    #[arg(value_name = "FILE")]
    pub(crate) file: PathBuf,

    /// Tokens of a piece
    #[arg(long, value_name = "TOKENS", default_value = "512", value_parser = bounded(2, 1 << 20))]
    pub(crate) context: usize,

    /// Most pieces [default: the whole text]
    #[arg(long, value_name = "NUMBER", value_parser = bounded(1, 1 << 30))]
    pub(crate) chunks: Option<usize>,

    /// Compare with the predictions of this model, which must have the same vocabulary
    #[arg(long, value_name = "MODEL")]
    pub(crate) reference: Option<String>,

    /// Print one line of JSON
    #[arg(long, value_parser = BoolishValueParser::new())]
    pub(crate) json: bool,

    #[command(flatten)]
    pub(crate) run: RunArgs,
}
