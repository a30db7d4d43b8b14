//! `epsmoe bench`.

use super::values::{ContenderSpec, bounded, seconds};
use super::{BenchServeArgs, RunArgs};
use clap::builder::BoolishValueParser;
use clap::{Args, Subcommand};
use std::path::PathBuf;

/// What `epsmoe bench` measures besides schedules.
#[derive(Debug, Subcommand)]
pub(crate) enum BenchCommand {
    /// Measure how a server answers a load: throughput, and times to tokens
    Serve(Box<BenchServeArgs>),
}

#[derive(Args, Debug)]
#[command(
    args_conflicts_with_subcommands = true,
    after_help = "\
Without --schedule and --stages, the serial schedule is compared with 2, 4, 8, … stages; either flag narrows that.
The schedules take turns, so that a busy machine is fair to all; figures are medians.

Examples:
  epsmoe bench
  epsmoe bench --ablation --max-seconds 60
  epsmoe bench --stages 4 --json bench.json --trace trace.json
  epsmoe bench --model preset:qwen3-moe-mini -dp 4 --batch-size 16 --input-len 256"
)]
pub(crate) struct BenchArgs {
    #[command(subcommand)]
    pub(crate) command: Option<BenchCommand>,

    /// Prompts in a round, over all ranks
    #[arg(long, value_name = "NUMBER", default_value = "8", value_parser = bounded(1, 1 << 16))]
    pub(crate) batch_size: usize,

    /// Tokens of each prompt
    #[arg(long, value_name = "TOKENS", default_value = "128", value_parser = bounded(1, 1 << 20))]
    pub(crate) input_len: usize,

    /// New tokens of each prompt
    #[arg(long, value_name = "TOKENS", default_value = "1", value_parser = bounded(1, 1 << 20))]
    pub(crate) output_len: usize,

    /// Most rounds, after one to warm up
    #[arg(long, value_name = "NUMBER", default_value = "20", value_parser = bounded(1, 1 << 20))]
    pub(crate) num_iters: usize,

    /// No new round begins after this many seconds
    #[arg(long, value_name = "SECONDS", default_value = "60", value_parser = seconds)]
    pub(crate) max_seconds: f64,

    /// Compare all strategies over as many ranks: experts split or whole, with either kernel, then in stages
    #[arg(long, value_parser = BoolishValueParser::new(), conflicts_with = "schedule")]
    pub(crate) ablation: bool,

    /// Compare these instead: serial, two-batch, auto, or staged with its stages and maybe its transfer order, like
    /// staged:4, staged:3,5,6,6 or "staged:2:d0 d1 c0 c1"; can be given several times
    #[arg(long, value_name = "SCHEDULE", conflicts_with_all = ["ablation", "schedule", "stages", "transfer_order"])]
    pub(crate) contender: Vec<ContenderSpec>,

    /// Write the figures to a file
    #[arg(long, value_name = "FILE")]
    pub(crate) json: Option<PathBuf>,

    /// Write what ran when in the last round, for Perfetto or chrome://tracing
    #[arg(long, value_name = "FILE")]
    pub(crate) trace: Option<PathBuf>,

    /// Write the figures and one layer's lanes as a picture, one HTML page
    #[arg(long, value_name = "FILE")]
    pub(crate) report: Option<PathBuf>,

    #[command(flatten)]
    pub(crate) run: RunArgs,
}
