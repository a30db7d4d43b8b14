//! What was typed. No flag means anything here; `setup` and the commands say what it means.

use clap::builder::BoolishValueParser;
use clap::{Args, CommandFactory, Parser, Subcommand, ValueEnum};
use epsmoe_device::cpu::gemm::Isa;
use epsmoe_fabric::Link;
use epsmoe_plan::{Schedule, Stages, Transfer, parse_order};
use std::ffi::OsString;
use std::path::PathBuf;
use std::str::FromStr;

const EXAMPLES: &str = "\
Examples:
  epsmoe bench                                       schedules side by side, no download needed
  epsmoe generate --model ./Qwen3-30B-A3B --chat --prompt 'Why is the sky blue?'
  epsmoe generate --model preset:mixtral-mini --ids 5,6,7 --max-tokens 8 --json
  epsmoe logits --model ./model --ids 5,6,7 --out logits.safetensors -dp 2 -ep --stages 4
  epsmoe doctor                                      what works on this machine

Every flag can also be set by the environment variable that its help names; the flag wins.";

const WHERE_MODELS_ARE: &str = "\
A folder with config.json and safetensors weights, preset:NAME for random weights of a known configuration, or \
org/name for a model in the Hugging Face cache, which is never downloaded";

/// Mixture-of-Experts inference with an expert pipeline.
///
/// The experts of a rank are cut into stages; while one stage computes, the rows of the next travel in and the
/// results of the last travel home. Ranks are groups of threads of this process.
#[derive(Debug, Parser)]
#[command(name = "epsmoe", version, after_help = EXAMPLES, max_term_width = 110)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Continue a prompt
    Generate(Box<GenerateArgs>),
    /// Write the logits of every token of a prompt to a file
    Logits(Box<LogitsArgs>),
    /// Show the tokens of a text
    Tokenize(TokenizeArgs),
    /// Compare schedules: serial, two micro-batches, stages, and what the cost model chooses
    #[command(mut_arg("model", |model| model.required(false).default_value("preset:deepseek-v2-mini")))]
    #[command(mut_arg("data_parallel_size", |size| size.default_value("2")))]
    #[command(mut_arg("enable_expert_parallel", |enable| enable.default_value("true")))]
    #[command(mut_arg("link", |link| link.default_value("100MB/s,50us")))]
    Bench(Box<BenchArgs>),
    /// Predict strategies and schedules on a machine that need not be here
    Plan(PlanArgs),
    /// Measure what MoE layers cost on this machine, or check such figures
    Profile(ProfileArgs),
    /// Write a checkpoint of random weights
    Synth(SynthArgs),
    /// Say what this machine is and what works on it
    Doctor(DoctorArgs),
    /// Compile GPU kernels ahead of their first use
    Kernels(KernelsArgs),
    /// Print a completion script for a shell
    Completions(CompletionsArgs),
}

/// What every command that runs a model takes.
#[derive(Args, Debug)]
pub(crate) struct RunArgs {
    #[command(flatten)]
    pub(crate) model: ModelArgs,

    /// Seed of everything random: sampling, and the weights of presets
    #[arg(long, env = "EPSMOE_SEED", value_name = "NUMBER", default_value_t = 0)]
    pub(crate) seed: u64,

    /// What the ranks compute on: `cpu`; `cuda` or `cuda:N`, the GPU of that number, for one rank; `auto`, a GPU if
    /// there is one that fits; or `reference`, slow and plain code that is the judge of the others
    #[arg(long, env = "EPSMOE_DEVICE", value_name = "DEVICE", default_value = "cpu", help_heading = PROCESSOR)]
    pub(crate) device: DeviceKind,

    /// Number format of activations; auto is float32 on a CPU, and on a GPU bfloat16 unless the weights are float32
    #[arg(long, env = "EPSMOE_DTYPE", value_enum, default_value_t = Dtype::Auto, help_heading = PROCESSOR)]
    pub(crate) dtype: Dtype,

    /// Vector instructions: scalar, avx2, avx512 or amx [default: the best there are]. With amx float32 products are made
    /// of bfloat16 pieces: as exact, faster for prompts, 3 % slower for single tokens
    #[arg(long, env = "EPSMOE_ISA", value_name = "SET", help_heading = PROCESSOR)]
    pub(crate) isa: Option<Isa>,

    /// Threads of each rank [default: cores divided by ranks]
    #[arg(long, env = "EPSMOE_THREADS", value_name = "NUMBER", value_parser = bounded(1, 1024), help_heading = PROCESSOR)]
    pub(crate) threads: Option<usize>,

    /// Ranks, each with sequences of its own; short: -dp
    #[arg(
        long,
        alias = "dp",
        env = "EPSMOE_DATA_PARALLEL_SIZE",
        value_name = "RANKS",
        default_value = "1",
        value_parser = bounded(1, 1024),
        help_heading = PARALLELISM
    )]
    pub(crate) data_parallel_size: usize,

    /// Ranks of a group that split the attention heads of the same tokens; short: -tp
    #[arg(
        long,
        alias = "tp",
        env = "EPSMOE_TENSOR_PARALLEL_SIZE",
        value_name = "RANKS",
        default_value = "1",
        value_parser = bounded(1, 1024),
        help_heading = PARALLELISM
    )]
    pub(crate) tensor_parallel_size: usize,

    /// Spread whole experts over all ranks, instead of splitting every expert over them; short: -ep
    #[arg(
        long,
        alias = "ep",
        env = "EPSMOE_ENABLE_EXPERT_PARALLEL",
        value_parser = BoolishValueParser::new(),
        help_heading = PARALLELISM
    )]
    pub(crate) enable_expert_parallel: bool,

    /// Pace transfers between ranks as this link would, like 10GB/s,50us; none is as fast as memory
    #[arg(
        long,
        env = "EPSMOE_LINK",
        value_name = "RATE,LATENCY",
        default_value = "none",
        help_heading = PARALLELISM
    )]
    pub(crate) link: LinkSpeed,

    /// One stage with nothing beside anything; stages that compute while others travel; what a cost model predicts to
    /// be fastest; or, to compare with, two halves of the tokens that alternate [default: auto, or staged with --stages
    /// or --transfer-order]
    #[arg(long, env = "EPSMOE_SCHEDULE", value_enum, help_heading = PIPELINE)]
    pub(crate) schedule: Option<ScheduleKind>,

    /// What the auto schedule predicts with [default: what `epsmoe profile` left for this machine, or round figures]
    #[arg(long, env = "EPSMOE_PROFILE", value_name = "FILE", help_heading = PIPELINE)]
    pub(crate) profile: Option<PathBuf>,

    /// At the end, say what the auto schedule chose, what that beat, and how long it was predicted to take and took
    #[arg(long, env = "EPSMOE_EXPLAIN", value_parser = BoolishValueParser::new(), help_heading = PIPELINE)]
    pub(crate) explain: bool,

    /// How many stages, cut by load, like 4; or the experts of each, like 3,5,6,6
    #[arg(long, env = "EPSMOE_STAGES", help_heading = PIPELINE)]
    pub(crate) stages: Option<Stages>,

    /// What the transfer lane does: dispatches and combines of stages, like "d0 d1 c0 c1"
    #[arg(long, env = "EPSMOE_TRANSFER_ORDER", value_name = "ORDER", help_heading = PIPELINE)]
    pub(crate) transfer_order: Option<TransferOrder>,

    /// What the shared expert's computation hides
    #[arg(long, env = "EPSMOE_SHARED_EXPERT", value_enum, value_name = "PLACE", help_heading = PIPELINE)]
    pub(crate) shared_expert: Option<SharedExpertPlace>,

    /// One product over all experts of a stage, or one per expert [default: the auto schedule decides; else grouped]
    #[arg(long, env = "EPSMOE_GEMM", value_enum, help_heading = PIPELINE)]
    pub(crate) gemm: Option<Gemm>,

    /// Write the experts and weights of every token in every layer to a file
    #[arg(long, env = "EPSMOE_ROUTING_RECORD", value_name = "FILE", conflicts_with = "routing_replay", help_heading = PIPELINE)]
    pub(crate) routing_record: Option<PathBuf>,

    /// Take experts and weights from such a file instead of the router
    #[arg(long, env = "EPSMOE_ROUTING_REPLAY", value_name = "FILE", help_heading = PIPELINE)]
    pub(crate) routing_replay: Option<PathBuf>,

    /// Most tokens of a rank in one step [default: what is asked for, at most 2048, on a GPU 8192]
    #[arg(
        long,
        env = "EPSMOE_MAX_NUM_BATCHED_TOKENS",
        value_name = "TOKENS",
        value_parser = bounded(1, 1 << 20),
        help_heading = LIMITS
    )]
    pub(crate) max_num_batched_tokens: Option<usize>,

    /// Most sequences of a rank at once [default: what is asked for]
    #[arg(
        long,
        env = "EPSMOE_MAX_NUM_SEQS",
        value_name = "SEQUENCES",
        value_parser = bounded(1, 1 << 16),
        help_heading = LIMITS
    )]
    pub(crate) max_num_seqs: Option<usize>,

    /// Longest sequence, prompt and new tokens together [default: what is asked for]
    #[arg(
        long,
        env = "EPSMOE_MAX_MODEL_LEN",
        value_name = "TOKENS",
        value_parser = bounded(1, 1 << 30),
        help_heading = LIMITS
    )]
    pub(crate) max_model_len: Option<usize>,

    /// Longest wait for a rank or a lane, in seconds
    #[arg(
        long,
        env = "EPSMOE_TIMEOUT",
        value_name = "SECONDS",
        default_value = "300",
        value_parser = seconds,
        help_heading = LIMITS
    )]
    pub(crate) timeout: f64,
}

const PROCESSOR: &str = "Processor";
const PARALLELISM: &str = "Parallelism";
const PIPELINE: &str = "Expert pipeline";
const LIMITS: &str = "Limits";
const SAMPLING: &str = "Sampling";

/// Which model.
#[derive(Args, Debug)]
pub(crate) struct ModelArgs {
    /// Folder, preset:NAME, or org/name
    #[arg(long, env = "EPSMOE_MODEL", long_help = WHERE_MODELS_ARE)]
    pub(crate) model: String,

    /// Branch, tag or commit of a model in the Hugging Face cache
    #[arg(long, env = "EPSMOE_REVISION", default_value = "main")]
    pub(crate) revision: String,
}

/// A prompt: token ids, a text, or a conversation.
#[derive(Args, Debug)]
pub(crate) struct PromptArgs {
    /// The prompt as token ids, like 5,6,7
    #[arg(long, required_unless_present = "prompt", conflicts_with_all = ["prompt", "chat", "system"])]
    pub(crate) ids: Option<TokenIds>,

    /// The prompt as text
    #[arg(long, value_name = "TEXT")]
    pub(crate) prompt: Option<String>,

    /// Make the prompt a message to the assistant, through the checkpoint's chat template
    #[arg(long, requires = "prompt", value_parser = BoolishValueParser::new())]
    pub(crate) chat: bool,

    /// A system message before it
    #[arg(long, value_name = "TEXT", requires = "chat")]
    pub(crate) system: Option<String>,
}

#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  epsmoe generate --model ./Qwen3-30B-A3B --prompt 'Once upon a time' --max-tokens 100
  epsmoe generate --model Qwen/Qwen3-30B-A3B --chat --prompt Hello --temperature 0.7 --top-p 0.9 --seed 3
  epsmoe generate --model ./model --ids 5,6,7 --max-tokens 16 --temperature 0 --ignore-eos --json")]
pub(crate) struct GenerateArgs {
    #[command(flatten)]
    pub(crate) prompt: PromptArgs,

    /// Most new tokens [default: generation_config.json's, or 128]
    #[arg(long, value_name = "NUMBER")]
    pub(crate) max_tokens: Option<usize>,

    /// Print one line of JSON instead of the text as it comes
    #[arg(long, value_parser = BoolishValueParser::new())]
    pub(crate) json: bool,

    #[command(flatten)]
    pub(crate) sampling: SamplingArgs,

    #[command(flatten)]
    pub(crate) run: RunArgs,
}

/// How tokens are chosen; generation_config.json says what is left out.
#[derive(Args, Debug)]
#[command(next_help_heading = SAMPLING)]
pub(crate) struct SamplingArgs {
    /// 0 takes the most likely token [default: generation_config.json's, or 0, or 1 with a flag below that draws]
    #[arg(long, env = "EPSMOE_TEMPERATURE", value_name = "NUMBER", allow_negative_numbers = true)]
    pub(crate) temperature: Option<f32>,

    /// Draw from this many of the most likely tokens only; 0 for all
    #[arg(long, env = "EPSMOE_TOP_K", value_name = "NUMBER")]
    pub(crate) top_k: Option<usize>,

    /// Draw from the most likely tokens that together have this probability
    #[arg(long, env = "EPSMOE_TOP_P", value_name = "NUMBER", allow_negative_numbers = true)]
    pub(crate) top_p: Option<f32>,

    /// Draw from tokens that have at least this share of the most likely one's probability
    #[arg(long, env = "EPSMOE_MIN_P", value_name = "NUMBER", allow_negative_numbers = true)]
    pub(crate) min_p: Option<f32>,

    /// Damp tokens that are there already; 1 leaves them
    #[arg(long, env = "EPSMOE_REPETITION_PENALTY", value_name = "NUMBER", allow_negative_numbers = true)]
    pub(crate) repetition_penalty: Option<f32>,

    /// End before this text; can be given several times
    #[arg(long, env = "EPSMOE_STOP", value_name = "TEXT")]
    pub(crate) stop: Vec<String>,

    /// Go on after a token that ends a text
    #[arg(long, env = "EPSMOE_IGNORE_EOS", value_parser = BoolishValueParser::new())]
    pub(crate) ignore_eos: bool,
}

#[derive(Args, Debug)]
pub(crate) struct LogitsArgs {
    /// The prompt as token ids, like 5,6,7
    #[arg(long)]
    pub(crate) ids: TokenIds,

    /// Where to write the tensor `logits` [tokens, vocabulary] in float32
    #[arg(long, value_name = "FILE.safetensors")]
    pub(crate) out: PathBuf,

    #[command(flatten)]
    pub(crate) run: RunArgs,
}

#[derive(Args, Debug)]
pub(crate) struct TokenizeArgs {
    #[command(flatten)]
    pub(crate) model: ModelArgs,

    /// The text
    #[arg(long, value_name = "TEXT")]
    pub(crate) prompt: String,

    /// Make it a message to the assistant, through the checkpoint's chat template
    #[arg(long, value_parser = BoolishValueParser::new())]
    pub(crate) chat: bool,

    /// A system message before it
    #[arg(long, value_name = "TEXT", requires = "chat")]
    pub(crate) system: Option<String>,

    /// Print one line of JSON
    #[arg(long, value_parser = BoolishValueParser::new())]
    pub(crate) json: bool,
}

#[derive(Args, Debug)]
#[command(after_help = "\
Without --schedule and --stages, the serial schedule is compared with 2, 4, 8, … stages; either flag narrows that.
The schedules take turns, so that a busy machine is fair to all; figures are medians.

Examples:
  epsmoe bench
  epsmoe bench --ablation --max-seconds 60
  epsmoe bench --stages 4 --json bench.json --trace trace.json
  epsmoe bench --model preset:qwen3-moe-mini -dp 4 --batch-size 16 --input-len 256")]
pub(crate) struct BenchArgs {
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

#[derive(Args, Debug)]
#[command(after_help = "\
Every figure of a built-in machine has its source in crates/plan/machines/machines.toml; a file in that format \
describes another machine. Predictions are estimates, not measurements.

Examples:
  epsmoe plan --model preset:deepseek-v2 --machine 8xH800 --batch 64 --seq 1024
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
Without --verify, the cost model goes to a file under $XDG_CACHE_HOME/epsmoe/profiles, named after the machine, the \
kernels and the number format, or to --out; none is written where --max-seconds is too short to measure everything \
once. With --verify, layers that the profile never saw are predicted and run.

Examples:
  epsmoe profile -dp 2
  epsmoe profile -dp 1,2,4                            what --verify needs
  epsmoe profile --verify 100 --json verify.json
  epsmoe profile --verify 20 --regret
  epsmoe profile --verify 20 --uneven-cuts
  epsmoe profile --verify 20 --wrong-profile")]
pub(crate) struct ProfileArgs {
    /// Where to write the profile [default: a file in the cache]
    #[arg(long, value_name = "FILE")]
    pub(crate) out: Option<PathBuf>,

    /// Number format of activations; auto is float32
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

    /// Longest time to measure each profile, or to verify, in seconds [default: 120, or 900 with --verify]
    #[arg(long, value_name = "SECONDS", value_parser = seconds)]
    pub(crate) max_seconds: Option<f64>,

    /// Predict and run so many layers instead, drawn by --seed
    #[arg(long, value_name = "CELLS", value_parser = bounded(1, 10_000))]
    pub(crate) verify: Option<usize>,

    /// Run the auto schedule's plan of each of these layers against the best of many others
    #[arg(long, requires = "verify", group = "contest", value_parser = BoolishValueParser::new())]
    pub(crate) regret: bool,

    /// Run cuts that follow the loads against as many experts in every stage
    #[arg(long, requires = "verify", group = "contest", value_parser = BoolishValueParser::new())]
    pub(crate) uneven_cuts: bool,

    /// Let the auto schedule begin with links four times and products half as fast as the profile says
    #[arg(long, requires = "verify", group = "contest", value_parser = BoolishValueParser::new())]
    pub(crate) wrong_profile: bool,

    /// Which layers
    #[arg(long, env = "EPSMOE_SEED", value_name = "NUMBER", default_value_t = 707)]
    pub(crate) seed: u64,

    /// The profile to check, on the layers with its number of ranks [default: those in the cache]
    #[arg(long, value_name = "FILE", requires = "verify")]
    pub(crate) profile: Option<PathBuf>,

    /// Write the figures to a file; without one, print them as one line
    #[arg(long, value_name = "FILE", num_args = 0..=1, default_missing_value = "-")]
    pub(crate) json: Option<PathBuf>,
}

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
    pub(crate) max_shard_size: ShardSize,
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

/// What was typed after `--device`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum DeviceKind {
    /// This machine's processor.
    Cpu,
    /// Slow and plain code that checks the order of all work: the judge of the others.
    Reference,
    /// The GPU of that number.
    Cuda(usize),
    /// The first GPU if it works and there is one rank, else the processor.
    Auto,
}

impl FromStr for DeviceKind {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once(':') {
            None if text == "cpu" => Ok(DeviceKind::Cpu),
            None if text == "reference" => Ok(DeviceKind::Reference),
            None if text == "cuda" => Ok(DeviceKind::Cuda(0)),
            None if text == "auto" => Ok(DeviceKind::Auto),
            Some(("cuda", number)) => number
                .parse()
                .map(DeviceKind::Cuda)
                .map_err(|_| format!("`{number}` is no number of a GPU: write cuda or cuda:0")),
            _ => Err(format!("`{text}` is no device: write cpu, cuda, cuda:N, auto or reference")),
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Dtype {
    Auto,
    #[value(alias = "float")]
    Float32,
    Bfloat16,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum ScheduleKind {
    Serial,
    Staged,
    Auto,
    TwoBatch,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Gemm {
    Grouped,
    Dense,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum SharedExpertPlace {
    BesideRendezvous,
    BesideFirstDispatch,
    BesideLastCombine,
    Alone,
}

/// A schedule to compare: `serial`, `two-batch`, `auto`, `staged:4` or `staged:4:ORDER`.
#[derive(Clone, Debug)]
pub(crate) struct ContenderSpec {
    pub(crate) schedule: Schedule,
    pub(crate) stages: Option<Stages>,
    pub(crate) order: Option<Vec<Transfer>>,
}

impl FromStr for ContenderSpec {
    type Err = epsmoe_plan::PlanError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let mut words = text.splitn(3, ':');
        let schedule = words.next().unwrap_or_default().parse()?;
        let stages = words.next().map(str::parse).transpose()?;
        let order = words.next().map(parse_order).transpose()?;
        Ok(ContenderSpec { schedule, stages, order })
    }
}

/// `d0 d1 c0 c1`.
#[derive(Clone, Debug)]
pub(crate) struct TransferOrder(pub(crate) Vec<Transfer>);

impl FromStr for TransferOrder {
    type Err = epsmoe_plan::PlanError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        parse_order(text).map(TransferOrder)
    }
}

/// `10GB/s,50us`, or `none`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct LinkSpeed(pub(crate) Option<Link>);

impl FromStr for LinkSpeed {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == "none" { Ok(LinkSpeed(None)) } else { text.parse().map(|link| LinkSpeed(Some(link))) }
    }
}

/// `5,6,7` or `5 6 7`.
#[derive(Clone, Debug)]
pub(crate) struct TokenIds(pub(crate) Vec<u32>);

impl FromStr for TokenIds {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let words = text.split(|c: char| c == ',' || c.is_whitespace()).filter(|word| !word.is_empty());
        let id = |word: &str| {
            word.parse().map_err(|_| format!("`{word}` is not a token id: write ids like 5,6,7"))
        };
        words.map(id).collect::<Result<_, _>>().map(TokenIds)
    }
}

/// `500MB`, `5GB`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ShardSize(pub(crate) u64);

impl FromStr for ShardSize {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let units = [("GB", 1_000_000_000), ("MB", 1_000_000), ("KB", 1000)];
        let upper = text.to_uppercase();
        let found = units.iter().find_map(|(unit, bytes)| Some((upper.strip_suffix(unit)?, *bytes)));
        let (digits, bytes) = found.unwrap_or((upper.as_str(), 1));
        let size = digits.trim().parse::<u64>().ok().and_then(|number| number.checked_mul(bytes));
        size.filter(|size| *size > 0)
            .map(ShardSize)
            .ok_or_else(|| format!("`{text}` is not a size: write it like 5GB"))
    }
}

fn bounded(least: usize, most: usize) -> impl Fn(&str) -> Result<usize, String> + Clone {
    move |text| {
        let number = text.parse().ok().filter(|number| (least..=most).contains(number));
        number.ok_or_else(|| format!("must be a whole number from {least} to {most}"))
    }
}

fn seconds(text: &str) -> Result<f64, String> {
    let number = text.parse::<f64>().ok().filter(|number| *number > 0.0 && *number <= 1e6);
    number.ok_or_else(|| "must be a number of seconds, above 0 and at most 1000000".into())
}

fn exponent(text: &str) -> Result<f64, String> {
    let number = text.parse::<f64>().ok().filter(|number| (0.0..=5.0).contains(number));
    number.ok_or_else(|| "must be a number from 0 to 5".into())
}

/// The command line, where every flag has an environment variable: `EPSMOE_` and its name, with the command's name
/// between the two where only one command has it.
pub(crate) fn command() -> clap::Command {
    Cli::command().mut_subcommands(|subcommand| {
        let command = subcommand.get_name().to_uppercase();
        subcommand.mut_args(|arg| match (arg.get_long(), arg.get_env()) {
            (Some(long), None) => {
                let flag = long.replace('-', "_").to_uppercase();
                arg.env(format!("EPSMOE_{command}_{flag}"))
            }
            _ => arg,
        })
    })
}

/// Other engines have flags of two letters behind one dash.
pub(crate) fn spelled_out(args: impl Iterator<Item = OsString>) -> impl Iterator<Item = OsString> {
    args.map(|arg| match arg.to_str() {
        Some("-dp") => "--dp".into(),
        Some("-tp") => "--tp".into(),
        Some("-ep") => "--ep".into(),
        _ => arg,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        command().debug_assert();
    }

    #[test]
    fn every_flag_has_a_variable_of_its_own() {
        for subcommand in command().get_subcommands() {
            let mut variables = std::collections::BTreeSet::new();
            for arg in subcommand.get_arguments().filter(|arg| arg.get_long().is_some()) {
                let variable = arg.get_env().unwrap_or_else(|| panic!("{arg} has none"));
                assert!(variables.insert(variable), "{arg} shares its variable");
            }
        }
    }

    #[test]
    fn words_of_the_command_line() {
        assert_eq!("5, 6 7".parse::<TokenIds>().unwrap().0, [5, 6, 7]);
        assert!("5,x".parse::<TokenIds>().is_err());
        assert_eq!("500mb".parse::<ShardSize>().unwrap().0, 500_000_000);
        assert!("0".parse::<ShardSize>().is_err());
        assert_eq!("cuda".parse(), Ok(DeviceKind::Cuda(0)));
        assert_eq!("cuda:3".parse(), Ok(DeviceKind::Cuda(3)));
        assert!("cuda:x".parse::<DeviceKind>().is_err() && "gpu".parse::<DeviceKind>().is_err());
        assert!(seconds("0").is_err() && seconds("nan").is_err() && seconds("2.5").is_ok());
    }
}
