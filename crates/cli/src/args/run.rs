//! What every command that runs a model takes.

use super::run_args;
use super::values::{
    ActivationScheme, DeviceKind, Dtype, Gemm, JsonObject, KvCacheDtype, LinkSpeed, Quantisation,
    ScheduleKind, SharedExpertPlace, TransferOrder, WireDtype,
};
use super::values::{bounded, seconds, share};
use super::world::WorldArgs;
use clap::Args;
use clap::builder::BoolishValueParser;
use epsmoe_device::cpu::gemm::Isa;
use epsmoe_plan::Stages;
use std::path::PathBuf;

const WHERE_MODELS_ARE: &str = "\
A folder with config.json and safetensors weights, a GGUF file (of a split one, any part), preset:NAME for random weights of a known configuration, or \
org/name for a model in the Hugging Face cache, which is never downloaded";

const PROCESSOR: &str = "Processor";
const PARALLELISM: &str = "Parallelism";
const PIPELINE: &str = "Expert pipeline";
const LIMITS: &str = "Limits";

/// What every command that runs a model takes.
#[derive(Args, Debug)]
pub(crate) struct RunArgs {
    #[command(flatten)]
    pub(crate) model: ModelArgs,

    /// Seed of everything random: sampling, and the weights of presets
    #[arg(long, env = "EPSMOE_SEED", value_name = "NUMBER", default_value_t = 0)]
    pub(crate) seed: u64,

    /// What the ranks compute on: `cpu`; `cuda`, a GPU for each rank, from the first on; `cuda:N`, the GPU of that
    /// number for all of them; `auto`, GPUs if there is one for each rank; or `reference`, slow and plain code that is
    /// the judge of the others
    #[arg(long, env = "EPSMOE_DEVICE", value_name = "DEVICE", default_value = "cpu", help_heading = PROCESSOR)]
    pub(crate) device: DeviceKind,

    /// Number format of activations; auto is float32 on a CPU, and on a GPU bfloat16 unless the weights are float32
    #[arg(long, env = "EPSMOE_DTYPE", value_enum, default_value_t = Dtype::Auto, help_heading = PROCESSOR)]
    pub(crate) dtype: Dtype,

    /// Number format that keys and values are cached in; auto is that of activations. fp8 (or `fp8_e4m3`) takes a byte for each:
    /// twice the tokens in the same memory, and no longer exact. Scales are those of the checkpoint, or 1
    #[arg(long, env = "EPSMOE_KV_CACHE_DTYPE", value_enum, value_name = "FORMAT", default_value_t = KvCacheDtype::Auto, help_heading = PROCESSOR)]
    pub(crate) kv_cache_dtype: KvCacheDtype,

    /// Holds against the checkpoint that its weights are quantised so: fp8, compressed-tensors, mxfp4, awq, gptq, modelopt,
    /// quark or gguf; with `none` (or `dequantise`) they are decoded to bfloat16 when they are loaded: the same bits, in more
    /// memory. fp8_per_block, mxfp4, int4 and q8_0 quantise plain weights while they are loaded [default: what the checkpoint
    /// says]
    #[arg(
        short,
        long,
        env = "EPSMOE_QUANTIZATION",
        value_name = "METHOD",
        default_value = "auto",
        hide_default_value = true,
        help_heading = PROCESSOR
    )]
    pub(crate) quantization: Quantisation,

    /// With dynamic, activations become FP8 codes too where weights are FP8 in blocks of 128, or MXFP4, which is held as such blocks
    /// then: a Hopper GPU multiplies them faster. Each row is coded by itself, with a scale for every 128. With auto they do where the
    /// checkpoint says so and the GPU can; with none they stay as they are, as on every other processor. With int8, on a CPU,
    /// activations become int8 where weights are held in four bits or as int8, each row by itself with a scale for every 32: new
    /// tokens come faster, and their numbers are others
    #[arg(long, env = "EPSMOE_ACTIVATION_SCHEME", value_enum, value_name = "SCHEME", default_value_t = ActivationScheme::Auto, help_heading = PROCESSOR)]
    pub(crate) activation_scheme: ActivationScheme,

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

    /// What rows travel to their experts in; auto is what activations are in. fp8 sends half the bytes and is no longer
    /// exact: e4m3 with a scale for every 128, whether a rank has others or not; sums come back as activations are
    #[arg(long, env = "EPSMOE_WIRE_DTYPE", value_enum, value_name = "FORMAT", default_value_t = WireDtype::Auto, help_heading = PARALLELISM)]
    pub(crate) wire_dtype: WireDtype,

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

    /// Layers of at most so many tokens on all ranks together are gathered: every rank gets the rows of all, so that no host
    /// waits for others' counts; 0 never. Not where stages were asked for [default: 256 on GPUs, else 0]
    #[arg(
        long,
        env = "EPSMOE_GATHER_TOKENS",
        value_name = "TOKENS",
        value_parser = bounded(0, 1 << 20),
        help_heading = PIPELINE
    )]
    pub(crate) gather_tokens: Option<usize>,

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

    /// Most of a GPU's memory that weights, buffers and the KV cache take together; on a CPU, of the memory that this
    /// process may use, where a server sizes its KV cache
    #[arg(
        long,
        env = "EPSMOE_GPU_MEMORY_UTILIZATION",
        value_name = "SHARE",
        default_value = "0.9",
        value_parser = share,
        help_heading = LIMITS
    )]
    pub(crate) gpu_memory_utilization: f64,

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

    #[command(flatten)]
    pub(crate) world: WorldArgs,

    /// All of the others, for ranks that are other processes.
    #[arg(skip)]
    pub(crate) flags: Vec<String>,
}

impl RunArgs {
    /// The same with another model, of which nothing else is said.
    pub(crate) fn with_model(&self, model: &str) -> anyhow::Result<Self> {
        let of_model =
            ["--model=", "--revision=", "--hf-overrides=", "--quantization=", "--activation-scheme="];
        let of_others = |flag: &&String| !of_model.iter().any(|begin| flag.starts_with(begin));
        let others = self.flags.iter().filter(of_others).cloned();
        let flags: Vec<String> = others.chain([format!("--model={model}")]).collect();
        Ok(RunArgs { world: self.world.clone(), ..run_args(&flags)? })
    }
}

/// Which model.
#[derive(Args, Debug)]
pub(crate) struct ModelArgs {
    /// Folder, GGUF file, preset:NAME, or org/name
    #[arg(long, env = "EPSMOE_MODEL", long_help = WHERE_MODELS_ARE)]
    pub(crate) model: String,

    /// Branch, tag or commit of a model in the Hugging Face cache
    #[arg(long, env = "EPSMOE_REVISION", default_value = "main")]
    pub(crate) revision: String,

    /// Other values for some keys of the model's config.json, like {"num_hidden_layers": 4}
    #[arg(long, env = "EPSMOE_HF_OVERRIDES", value_name = "JSON", default_value = "{}")]
    pub(crate) hf_overrides: JsonObject,
}

impl ModelArgs {
    /// A model as nothing else says.
    pub(crate) fn of(model: &str) -> Self {
        ModelArgs { model: model.into(), revision: "main".into(), hf_overrides: JsonObject::default() }
    }
}
