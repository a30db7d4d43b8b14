//! Predictions, and the profiles that they are made from.

use super::ModelArgs;
use super::values::{
    ActivationScheme, DeviceKind, Dtype, KvCacheDtype, Quantisation, WireDtype, bounded, exponent, seconds,
};
use clap::Args;
use clap::builder::BoolishValueParser;
use epsmoe_device::cpu::gemm::Isa;
use std::path::PathBuf;

#[derive(Args, Debug)]
#[command(after_help = "\
Every figure of a built-in machine has its source in crates/plan/machines/machines.toml; a file in that format \
describes another machine. Predictions are estimates, not measurements.

Examples:
  epsmoe plan --model preset:deepseek-v2 --machine 8xH800 --batch 64 --seq 1024
  epsmoe plan --model preset:deepseek-v3 --machine 8xH200 --quantization fp8_per_block
  epsmoe plan --model ./Qwen3-30B-A3B --machine my-machine.toml --json")]
pub(crate) struct PlanArgs {
    #[command(flatten)]
    pub(crate) model: ModelArgs,

    /// A built-in machine, like 8xH100, 8xH200, 8xH800, 4xH800 or 8xA100; or a file that describes one
    #[arg(long, value_name = "NAME|FILE")]
    pub(crate) machine: String,

    /// Sequences
    #[arg(long, value_name = "NUMBER", default_value = "64", value_parser = bounded(1, 1 << 20))]
    pub(crate) batch: usize,

    /// Tokens of each
    #[arg(long, value_name = "TOKENS", default_value = "1024", value_parser = bounded(1, 1 << 24))]
    pub(crate) seq: usize,

    /// What rows travel to their experts in: bfloat16, which auto is too, or fp8 with a scale for every 128
    #[arg(long, env = "EPSMOE_WIRE_DTYPE", value_enum, value_name = "FORMAT", default_value_t = WireDtype::Auto)]
    pub(crate) wire_dtype: WireDtype,

    /// What keys and values are cached in: bfloat16, which auto is too, or fp8, which takes half the memory
    #[arg(long, env = "EPSMOE_KV_CACHE_DTYPE", value_enum, value_name = "FORMAT", default_value_t = KvCacheDtype::Auto)]
    pub(crate) kv_cache_dtype: KvCacheDtype,

    /// What the checkpoint must be quantised with; fp8_per_block, mxfp4, int4 and q8_0 take plain weights, or those of a model of which
    /// only the configuration is here, to be quantised so; none (or dequantise) takes all to be decoded to bfloat16 [default: what
    /// the checkpoint says]
    #[arg(
        short,
        long,
        env = "EPSMOE_QUANTIZATION",
        value_name = "METHOD",
        default_value = "auto",
        hide_default_value = true
    )]
    pub(crate) quantization: Quantisation,

    /// With dynamic, activations become FP8 codes where weights are FP8 in blocks of 128, or MXFP4, which is held as such then; with auto where the checkpoint says so and
    /// the machine's GPUs multiply them
    #[arg(long, env = "EPSMOE_ACTIVATION_SCHEME", value_enum, value_name = "SCHEME", default_value_t = ActivationScheme::Auto)]
    pub(crate) activation_scheme: ActivationScheme,

    /// How unevenly experts are chosen: the exponent of a Zipf law; 0 is even
    #[arg(long, value_name = "EXPONENT", default_value = "0", value_parser = exponent)]
    pub(crate) zipf: f64,

    /// Seed of the routing
    #[arg(long, env = "EPSMOE_SEED", value_name = "NUMBER", default_value_t = 0)]
    pub(crate) seed: u64,

    /// Print one line of JSON
    #[arg(long, value_parser = BoolishValueParser::new())]
    pub(crate) json: bool,
}

#[derive(Args, Debug)]
#[command(after_help = "\
The cost model goes to a file under $XDG_CACHE_HOME/epsmoe/profiles, named after the machine, the kernels and the \
number format, or to --out; none is written where --max-seconds is too short to measure everything once, but what was \
measured is kept beside it, and the same command goes on from there.

Examples:
  epsmoe profile -dp 2
  epsmoe profile -dp 1,2,4 --json")]
pub(crate) struct ProfileArgs {
    /// Where to write the profile [default: a file in the cache]
    #[arg(long, value_name = "FILE")]
    pub(crate) out: Option<PathBuf>,

    /// What to measure: `cpu`, or `cuda` or `cuda:N`, the GPU of that number as one of the ranks, the others emulated
    #[arg(long, env = "EPSMOE_DEVICE", value_name = "DEVICE", default_value = "cpu")]
    pub(crate) device: DeviceKind,

    /// Number format of activations; auto is float32, and on a GPU bfloat16
    #[arg(long, env = "EPSMOE_DTYPE", value_enum, default_value_t = Dtype::Auto)]
    pub(crate) dtype: Dtype,

    /// Vector instructions: scalar, avx2, avx512 or amx [default: the best there are]. With amx float32 products are made
    /// of bfloat16 pieces: as exact, faster for prompts, 3 % slower for single tokens
    #[arg(long, env = "EPSMOE_ISA", value_name = "SET")]
    pub(crate) isa: Option<Isa>,

    /// Threads of each rank [default: cores divided by ranks]
    #[arg(long, env = "EPSMOE_THREADS", value_name = "NUMBER", value_parser = bounded(1, 1024))]
    pub(crate) threads: Option<usize>,

    /// Ranks; several numbers make as many profiles; short: -dp
    #[arg(
        long,
        alias = "dp",
        env = "EPSMOE_DATA_PARALLEL_SIZE",
        value_name = "RANKS",
        default_value = "2",
        value_delimiter = ',',
        value_parser = bounded(1, 8)
    )]
    pub(crate) data_parallel_size: Vec<usize>,

    /// Longest time to measure each profile, in seconds
    #[arg(long, value_name = "SECONDS", default_value = "120", value_parser = seconds)]
    pub(crate) max_seconds: f64,

    /// Write the figures to a file; without one, print them as one line
    #[arg(long, value_name = "FILE", num_args = 0..=1, default_missing_value = "-")]
    pub(crate) json: Option<PathBuf>,
}
