//! Commands that run no model of the user's.

use super::values::ByteSize;
use clap::builder::BoolishValueParser;
use clap::{Args, Subcommand};
use epsmoe_quant::Target;
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
#[command(after_help = "\
fp8_per_block is FP8 with a scale for 128 × 128 weights; mxfp4, int4 and q8_0 have a scale for 32 weights of a row and are \
written as compressed-tensors has them. Routers, norms, embeddings and the output projection stay as they are. A command \
that was interrupted goes on where it was.

Examples:
  epsmoe convert --quantization int4 ./Qwen3-30B-A3B ./Qwen3-30B-A3B-int4
  epsmoe eval perplexity text.txt --model ./Qwen3-30B-A3B-int4 --reference ./Qwen3-30B-A3B")]
pub(crate) struct ConvertArgs {
    /// fp8_per_block, mxfp4, int4 or q8_0
    #[arg(short, long, value_name = "CODING", value_parser = coding)]
    pub(crate) quantization: Target,

    /// A folder with config.json and safetensors weights, or org/name of a model in the Hugging Face cache
    #[arg(value_name = "IN")]
    pub(crate) input: String,

    /// A new or empty folder
    #[arg(value_name = "OUT")]
    pub(crate) out: PathBuf,

    /// Branch, tag or commit of a model in the Hugging Face cache
    #[arg(long, env = "EPSMOE_REVISION", default_value = "main")]
    pub(crate) revision: String,

    /// Largest weights file, like 500MB or 5GB
    #[arg(long, value_name = "SIZE", default_value = "5GB")]
    pub(crate) max_shard_size: ByteSize,
}

fn coding(name: &str) -> Result<Target, String> {
    Target::named(name).ok_or_else(|| {
        let known = Target::ALL.map(|target| target.to_string()).join(", ");
        format!("`{name}` is not known: write one of {known}")
    })
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
