//! Commands that run no model of the user's.

use super::values::ByteSize;
use clap::builder::BoolishValueParser;
use clap::{Args, Subcommand};
use std::path::PathBuf;

#[derive(Args, Debug)]
pub(crate) struct SynthArgs {
    /// A known configuration; --model preset:NAME makes the same weights in memory
    #[arg(long, value_name = "NAME", required_unless_present = "config", conflicts_with = "config")]
    pub(crate) preset: Option<String>,

    /// A config.json
    #[arg(long, value_name = "FILE")]
    pub(crate) config: Option<PathBuf>,

    /// A new or empty folder
    #[arg(long, value_name = "DIR")]
    pub(crate) out: PathBuf,

    /// Seed of the weights
    #[arg(long, env = "EPSMOE_SEED", value_name = "NUMBER", default_value_t = 0)]
    pub(crate) seed: u64,

    /// Largest weights file, like 500MB or 5GB
    #[arg(long, value_name = "SIZE", default_value = "5GB")]
    pub(crate) max_shard_size: ByteSize,
}

#[derive(Args, Debug)]
pub(crate) struct DoctorArgs {
    /// Measure what the first GPU does with copies, signals and kernels at the same time; it takes some seconds, and
    /// the GPU should have nothing else to do
    #[arg(long, value_parser = BoolishValueParser::new())]
    pub(crate) probe: bool,

    /// Print one line of JSON
    #[arg(long, value_parser = BoolishValueParser::new())]
    pub(crate) json: bool,
}

#[derive(Args, Debug)]
pub(crate) struct KernelsArgs {
    #[command(subcommand)]
    pub(crate) command: KernelsCommand,
}

#[derive(Subcommand, Debug)]
pub(crate) enum KernelsCommand {
    /// Compile every kernel and keep it on disk; needs NVRTC, but no GPU if the architecture is given
    Warm(WarmArgs),
}

#[derive(Args, Debug)]
pub(crate) struct WarmArgs {
    /// What to compile for, such as sm_90a or sm_80 [default: the first GPU of this machine]
    #[arg(long, value_name = "ARCHITECTURE")]
    pub(crate) arch: Option<String>,
}

#[derive(Args, Debug)]
pub(crate) struct CompletionsArgs {
    /// The shell
    pub(crate) shell: clap_complete::Shell,
}
