//! `epsmoe bench`.

use super::values::{ContenderSpec, DeviceKind, Dtype, LinkSpeed, OneOf, WireDtype, bounded, seconds};
use super::{BenchServeArgs, RunArgs};
use clap::builder::BoolishValueParser;
use clap::{Args, Subcommand};
use std::path::PathBuf;

/// What `epsmoe bench` measures besides schedules.
#[derive(Debug, Subcommand)]
pub(crate) enum BenchCommand {
    /// Measure how a server answers a load: throughput, and times to tokens
    Serve(Box<BenchServeArgs>),
    /// Compare schedules of one MoE layer on one rank of several, the others emulated
    Layer(Box<BenchLayerArgs>),
}

#[derive(Args, Debug)]
#[command(after_help = "\
One rank has its share of the experts, made of random weights, and its own tokens. The tokens of all ranks go through the
router, so that what it would send and receive is counted; rows of the others are stood in for, and transfers are paced by
the busier direction. Every figure is emulated.

Examples:
  epsmoe bench layer --device cuda
  epsmoe bench layer --device cuda --model preset:deepseek-v3 --tokens 8192 --link 50GB/s --link 155GB/s
  epsmoe bench layer --model preset:deepseek-v2-mini --emulate-rank 0/4 --tokens 256 --link 1GB/s --contender staged:2")]
pub(crate) struct BenchLayerArgs {
    /// Models whose MoE layers are run: folders, preset:NAME, or org/name
    #[arg(long, value_delimiter = ',', default_value = "preset:deepseek-v2")]
    pub(crate) model: Vec<String>,

    /// Which rank of how many
    #[arg(long, value_name = "RANK/RANKS", default_value = "0/8")]
    pub(crate) emulate_rank: OneOf,

    /// Tokens of every rank
    #[arg(long, value_name = "TOKENS", value_delimiter = ',', default_value = "2048,8192", value_parser = bounded(1, 1 << 20))]
    pub(crate) tokens: Vec<usize>,

    /// Links that transfers are paced to, like 155GB/s,2us; can be given several times
    #[arg(long, value_name = "RATE,LATENCY", default_value = "155GB/s")]
    pub(crate) link: Vec<LinkSpeed>,

    /// What rows travel to their experts in; auto is what activations are in. fp8 sends half the bytes and is no longer
    /// exact: e4m3 with a scale for every 128, whether a rank has others or not; sums come back as activations are
    #[arg(long, env = "EPSMOE_WIRE_DTYPE", value_enum, value_name = "FORMAT", default_value_t = WireDtype::Auto)]
    pub(crate) wire_dtype: WireDtype,

    /// Schedules, as bench takes them [default: serial, two-batch, staged in 1, 2, 4, 8 and 16 stages, auto]
    #[arg(long, value_name = "SCHEDULE")]
    pub(crate) contender: Vec<ContenderSpec>,

    /// Also run so many schedules drawn at random in every cell, to hold predictions against
    #[arg(long, value_name = "NUMBER", default_value = "0", value_parser = bounded(0, 1 << 10))]
    pub(crate) draw: usize,

    /// Seed that schedules are drawn by
    #[arg(long, env = "EPSMOE_SEED", value_name = "NUMBER", default_value_t = 0)]
    pub(crate) seed: u64,

    /// `cpu`, or `cuda` or `cuda:N`, the GPU of that number
    #[arg(long, env = "EPSMOE_DEVICE", value_name = "DEVICE", default_value = "cpu")]
    pub(crate) device: DeviceKind,

    /// Number format of activations and weights; auto is float32 on a CPU and bfloat16 on a GPU
    #[arg(long, env = "EPSMOE_DTYPE", value_enum, default_value_t = Dtype::Auto)]
    pub(crate) dtype: Dtype,

    /// Threads on a CPU [default: its cores]
    #[arg(long, env = "EPSMOE_THREADS", value_name = "NUMBER", value_parser = bounded(1, 1024))]
    pub(crate) threads: Option<usize>,

    /// Multiprocessors of a GPU that products leave to others
    #[arg(long, value_name = "NUMBER", default_value = "0", value_parser = bounded(0, 64))]
    pub(crate) reserve: usize,

    /// What the auto schedule predicts with [default: what `epsmoe profile` left for this machine, or round figures]
    #[arg(long, env = "EPSMOE_PROFILE", value_name = "FILE")]
    pub(crate) profile: Option<PathBuf>,

    /// Rounds in which the schedules take turns
    #[arg(long, value_name = "NUMBER", default_value = "7", value_parser = bounded(1, 1 << 20))]
    pub(crate) num_iters: usize,

    /// Also say which calls of a GPU's driver a layer makes, and how long they take the host
    #[arg(long, value_parser = BoolishValueParser::new())]
    pub(crate) driver_calls: bool,

    /// Longest wait for a lane, in seconds
    #[arg(long, env = "EPSMOE_TIMEOUT", value_name = "SECONDS", default_value = "60", value_parser = seconds)]
    pub(crate) timeout: f64,

    /// Write the figures to a file
    #[arg(long, value_name = "FILE")]
    pub(crate) json: Option<PathBuf>,
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

    /// Run this rank of so many alone, the others emulated: its share of the experts, the routing of all ranks' tokens, and
    /// transfers of the right size, paced by --link. Prompts are those of all ranks
    #[arg(long, value_name = "RANK/RANKS", conflicts_with_all = ["ablation", "data_parallel_size", "tensor_parallel_size", "routing_record", "routing_replay"])]
    pub(crate) emulate_rank: Option<OneOf>,

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
