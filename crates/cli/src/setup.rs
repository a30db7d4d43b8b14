//! What the flags of a command that runs a model mean: a model, a world of ranks, and engines over it. Everything
//! that cannot work is refused here, before weights are read.

mod budget;
mod planned;
mod rows;
mod world;

pub(crate) use planned::planned_weights;
pub(crate) use world::Worker;

use crate::args::{
    ActivationScheme, DeviceKind, Dtype, FabricKind, Gemm, ModelArgs, OneOf, Quantisation, RunArgs,
    ScheduleKind, SharedExpertPlace, TextArgs,
};
use crate::launch::Launch;
use crate::locate::{Place, locate};
use crate::output;
use crate::prompt::encode;
use crate::watch::LayerSample;
use anyhow::{Context, Result, anyhow, bail};
use epsmoe_base::files::open_plain;
use epsmoe_base::{
    Bytes, CacheDType, DType, FaultCell, Rank, WireDType, WireFormat, cores, count, hash_bytes,
};
use epsmoe_device::cpu::gemm::Isa;
use epsmoe_device::cpu::{self, CpuKernels};
use epsmoe_device::cuda::{self, CudaBackend, CudaDevice, CudaOptions, CudaWeights};
use epsmoe_device::reference::{self, PlainKernels};
use epsmoe_device::threaded::{Kernels, ThreadedBackend, ThreadedOptions, WeightStore};
use epsmoe_device::{Backend, PeerQueue, WeightFormat};
use epsmoe_engine::{Engine, EngineError, EngineOptions, Experts, Parallel, RoutingLog, RoutingMode, work};
use epsmoe_fabric::process::Processes;
use epsmoe_fabric::{EmulatedOptions, Fabric, Link, PacedLink, Peers, ThreadsOptions};
use epsmoe_model::config::Config;
use epsmoe_model::{
    Activations, Checkpoint, HeldWeights, Method, Model, ModelOptions, ModelSpec, Quantising, Synthetic,
    Target, WeightSource, gguf_file, preset_text,
};
use epsmoe_pipeline::RoutedPeers;
use epsmoe_plan::{
    Capacity, CostError, CostModel, GemmKind, LayerHistograms, LayerSizes, Machine, Policy, Schedule,
    SharedExpert, SlotMap, TokenHistograms,
};
use epsmoe_profile::{Fingerprint, default_path, load, network, with_link, with_network};
use epsmoe_text::{ChatTemplate, GenerationConfig, SpecialTokens, Tokenizer};
use rows::Rows;
use std::fs::{self, File};
use std::io::{BufReader, Read, Seek, SeekFrom};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};
use world::{World, begin};

/// Tokens of a rank in one step when nobody says how many: on a CPU, and on a GPU, which only many rows keep busy.
const BATCHED_TOKENS: usize = 2048;
const GPU_BATCHED_TOKENS: usize = 8192;

/// Layers of at most so many tokens are gathered between GPUs: waiting for counts takes their hosts longer than the rows take to
/// travel that nobody there needs.
const GATHERED_ON_GPUS: usize = 256;

/// Ranks of one process: each has threads of its own, and a queue to each of the others.
const MOST_RANKS: usize = 1024;

/// A model whose files, if it has any, are open.
pub(crate) struct OpenModel {
    /// As it was typed.
    pub(crate) name: String,
    pub(crate) spec: Arc<ModelSpec>,
    pub(crate) generation: GenerationConfig,
    /// What says how the model reads and writes text: its folder, or its GGUF file.
    text: Option<PathBuf>,
    weights: Box<dyn WeightSource>,
}

impl OpenModel {
    fn open(args: &ModelArgs, seed: u64, quantisation: Quantisation) -> Result<Self> {
        let name = args.model.clone();
        match locate(&name, &args.revision)? {
            Place::Preset(preset_name) => {
                let target = on_line(quantisation, &name, None)?;
                let Config { spec, .. } = preset_config(&preset_name, args)?;
                let weights = quantised(Box::new(Synthetic::new(&spec, seed)), target);
                let generation = GenerationConfig::default();
                Ok(OpenModel { name, spec: Arc::new(spec), generation, text: None, weights })
            }
            Place::Folder(folder) => {
                let Config { mut spec, says_dtype, remarks } =
                    Config::read_with(&folder, &args.hf_overrides.0)?;
                let generation = GenerationConfig::open(&folder)?;
                let weights = Box::new(Checkpoint::open(&folder)?);
                let target = on_line(quantisation, &name, weights.method()?)?;
                let weights = match quantisation {
                    Quantisation::None => Box::new(weights.decoded()),
                    _ => weights,
                };
                let unused = weights.check(&spec)?;
                let remarks = remarks.iter().chain(&generation.remarks).chain(&unused);
                remarks.for_each(output::warn);
                let eos = generation.eos().iter().filter(|&&id| (id as usize) < spec.vocab);
                spec.eos.extend(eos);
                if !says_dtype {
                    spec.dtype = weights.dtype(&spec).unwrap_or(spec.dtype);
                }
                let weights = quantised(weights, target);
                let text = Some(text_place(folder)?);
                Ok(OpenModel { name, spec: Arc::new(spec), generation, text, weights })
            }
        }
    }

    /// The model's tokenizer, whose end of a text is one of the model's from now on; nothing where there is none.
    pub(crate) fn tokenizer(&mut self) -> Result<Option<Tokenizer>> {
        let tokenizer = self.text.as_deref().map(Tokenizer::open).transpose()?.flatten();
        let eos = tokenizer.as_ref().and_then(Tokenizer::eos);
        if let Some(eos) = eos.filter(|&id| (id as usize) < self.spec.vocab && !self.spec.eos.contains(&id)) {
            Arc::make_mut(&mut self.spec).eos.push(eos);
        }
        Ok(tokenizer)
    }

    /// The model's special tokens; none where there are none.
    pub(crate) fn special_tokens(&self) -> Result<SpecialTokens> {
        Ok(self.text.as_deref().map(SpecialTokens::open).transpose()?.unwrap_or_default())
    }

    /// The model's chat template; nothing where there is none.
    pub(crate) fn template(&self) -> Result<Option<ChatTemplate>> {
        Ok(self.text.as_deref().map(ChatTemplate::open).transpose()?.flatten())
    }

    /// A number that differs for another model, or other weights, as far as some of every file tells.
    fn digest(&self) -> Result<u64> {
        let mut words = format!("{:?}", self.spec).into_bytes();
        let folder = self.text.as_deref();
        let mut files: Vec<PathBuf> = match folder {
            Some(folder) if folder.is_dir() => {
                fs::read_dir(folder)?.map(|entry| Ok(entry?.path())).collect::<Result<_>>()?
            }
            file => file.into_iter().map(Path::to_owned).collect(),
        };
        files.retain(|file| {
            file.extension().is_some_and(|ending| ending == "safetensors" || ending == "gguf")
        });
        files.sort();
        for file in files {
            let samples = samples(&file).with_context(|| format!("cannot read {}", file.display()))?;
            words.extend(file.file_name().unwrap_or_default().as_encoded_bytes());
            words.extend(samples);
        }
        Ok(hash_bytes(&words))
    }

    /// Token ids of what was typed.
    pub(crate) fn encode(&self, tokenizer: Option<&Tokenizer>, text: &TextArgs) -> Result<Vec<u32>> {
        encode(self.text.as_deref(), &self.name, tokenizer, text)
    }
}

/// How long a file is, and some of its bytes from beginning to end.
fn samples(file: &Path) -> Result<Vec<u8>> {
    const PLACES: u64 = 16;
    const BYTES: u64 = 4096;
    let mut file = File::open(file)?;
    let length = file.metadata()?.len();
    let mut samples = length.to_le_bytes().to_vec();
    for place in 0..PLACES {
        file.seek(SeekFrom::Start(length / PLACES * place))?;
        (&file).take(BYTES).read_to_end(&mut samples)?;
    }
    Ok(samples)
}

/// Holds what was typed against what a checkpoint says of its weights; the coding that plain ones are brought into when they are
/// loaded, if any.
fn on_line(typed: Quantisation, model: &str, found: Option<Method>) -> Result<Option<Target>> {
    let typed = match (typed, found) {
        (Quantisation::OnLine(target), None) => return Ok(Some(target)),
        // mxfp4 is a coding, and what checkpoints say that are in it.
        (Quantisation::OnLine(target), Some(found)) => match Method::named(&target.to_string()) {
            Some(method) => method,
            None => bail!(
                "--quantization {target} is for plain weights, but {model} is quantised with {found}: leave it out"
            ),
        },
        (Quantisation::Method(typed), _) => typed,
        _ => return Ok(None),
    };
    match found {
        None => {
            bail!("--quantization says {typed}, but the weights of {model} are not quantised: leave it out")
        }
        Some(found) if typed != found => {
            bail!("--quantization says {typed}, but {model} is quantised with {found}: leave it out")
        }
        Some(_) => Ok(None),
    }
}

/// Whether rows become FP8 codes for the weights of a model, where processors can multiply those.
fn codes_rows(
    typed: ActivationScheme,
    name: &str,
    spec: &ModelSpec,
    weights: &dyn WeightSource,
) -> Result<bool> {
    let in_blocks = || HeldWeights::may_take_fp8_rows(spec, weights);
    match typed {
        ActivationScheme::None => Ok(false),
        ActivationScheme::Auto => {
            Ok(matches!(weights.activations()?, Activations::Dynamic { .. }) && in_blocks()?)
        }
        ActivationScheme::Dynamic if !in_blocks()? => bail!(
            "--activation-scheme dynamic multiplies FP8 codes, but no weights of {name} that take them are FP8 in blocks of 128, or \
             MXFP4, which folds into such: leave it out, or add --quantization fp8_per_block for plain weights"
        ),
        ActivationScheme::Dynamic => Ok(true),
        ActivationScheme::Int8 => {
            bail!(
                "--activation-scheme int8 multiplies integers, which is for CPUs (--device cpu): leave it out"
            )
        }
    }
}

/// Holds against a model that some of its weights are multiplied as integers.
fn check_integers(name: &str, held: &HeldWeights) -> Result<()> {
    let integers = |format: &_| matches!(format, WeightFormat::Coded(format) if cpu::multiplies_int8(format));
    if !held.formats.iter().any(|(format, _)| integers(format)) {
        bail!(
            "--activation-scheme int8 multiplies integers, but no weights of {name} are held in four bits or as int8: \
             leave it out, or add --quantization int4 or q8_0 for plain weights"
        );
    }
    Ok(())
}

/// The same weights, quantised while they are loaded if that is wanted.
fn quantised(weights: Box<dyn WeightSource>, target: Option<Target>) -> Box<dyn WeightSource> {
    match target {
        Some(target) => Box::new(Quantising::new(weights, target)),
        None => weights,
    }
}

/// The configuration of a preset, with what was typed instead.
fn preset_config(name: &str, args: &ModelArgs) -> Result<Config> {
    let text = preset_text(name)?.as_bytes();
    Ok(Config::parse_with(text, &format!("preset {name}"), &args.hf_overrides.0)?)
}

/// What a model is, without its weights.
pub(crate) fn spec(args: &ModelArgs) -> Result<ModelSpec> {
    Ok(match locate(&args.model, &args.revision)? {
        Place::Preset(name) => preset_config(&name, args)?.spec,
        Place::Folder(folder) => {
            let config = Config::read_with(&folder, &args.hf_overrides.0)?;
            config.remarks.iter().for_each(output::warn);
            config.spec
        }
    })
}

/// The folder or GGUF file with the tokenizer of a model whose weights are not wanted.
pub(crate) fn text(args: &ModelArgs) -> Result<Option<PathBuf>> {
    Ok(match locate(&args.model, &args.revision)? {
        Place::Preset(_) => None,
        Place::Folder(folder) => Some(text_place(folder)?),
    })
}

/// Where a model's tokenizer is: in its folder, or in its GGUF file where the folder has none.
fn text_place(model: PathBuf) -> Result<PathBuf> {
    if model.join("tokenizer.json").exists() {
        return Ok(model);
    }
    Ok(gguf_file(&model)?.unwrap_or(model))
}

/// What a command is going to ask of an engine.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Demand {
    /// Sequences at once of the busiest group of ranks.
    pub(crate) sequences: usize,
    /// Longest sequence, prompt and new tokens.
    pub(crate) tokens: usize,
    /// Its tokens that could be computed in one step.
    pub(crate) step: usize,
}

/// What the ranks compute on.
enum Processor {
    Cpu,
    Reference,
    /// The GPU of each rank of this process; all of them may be one, which several processes may share too.
    Cuda(Vec<Arc<CudaDevice>>),
}

impl Processor {
    /// Opens what was typed; `auto` is GPUs only where that works, and for ranks that are processes only if it is said.
    fn open(kind: DeviceKind, ranks: usize, launch: Option<&Launch>) -> Result<Self> {
        match kind {
            DeviceKind::Auto if launch.is_some() => {
                output::remark(
                    "--device auto: the CPU, as ranks that are processes get GPUs only by --device cuda",
                );
                Ok(Processor::Cpu)
            }
            DeviceKind::Cpu => Ok(Processor::Cpu),
            DeviceKind::Reference => Ok(Processor::Reference),
            DeviceKind::CudaAt(number) => Ok(Processor::Cuda(vec![CudaDevice::open(number)?; ranks])),
            DeviceKind::Cuda => match launch {
                Some(launch) => Ok(Processor::Cuda(vec![CudaDevice::open(launch.local)?])),
                None => Self::on_gpus(ranks),
            },
            DeviceKind::Auto => Ok(Self::on_gpus(ranks).map_or_else(
                |missing| {
                    output::remark(format_args!(
                        "--device auto: the CPU, because {}",
                        output::flattened(&missing)
                    ));
                    Processor::Cpu
                },
                |gpus| {
                    output::remark(format_args!("--device auto: {}", count(ranks, "GPU")));
                    gpus
                },
            )),
        }
    }

    /// A GPU for each rank, which reach each other's memory where they can.
    fn on_gpus(ranks: usize) -> Result<Self> {
        let count = CudaDevice::count()?;
        if (1..ranks).contains(&count) {
            bail!(
                "--device cuda gives each of {ranks} ranks a GPU of its own, but the driver shows {}: use fewer ranks, \
                 or --device cuda:0 to let all of them share one",
                epsmoe_base::count(count, "GPU")
            );
        }
        let devices = (0..ranks).map(CudaDevice::open).collect::<Result<Vec<_>, _>>()?;
        for (number, device) in devices.iter().enumerate() {
            devices[..number].iter().try_for_each(|other| device.connect(other).map(|_| ()))?;
        }
        Ok(Processor::Cuda(devices))
    }

    /// What rows become for a model's weights: nothing else, or what multiplies with them.
    fn activations(
        &self,
        typed: ActivationScheme,
        model: &OpenModel,
        dtype: DType,
    ) -> Result<ActivationScheme> {
        let multiplies_fp8 = match self {
            Processor::Cuda(devices) => {
                dtype == DType::BF16 && devices.iter().all(|device| device.multiplies_fp8())
            }
            _ => false,
        };
        match typed {
            ActivationScheme::Int8 if matches!(self, Processor::Cpu) => Ok(ActivationScheme::Int8),
            ActivationScheme::Dynamic if !multiplies_fp8 => bail!(
                "--activation-scheme dynamic multiplies FP8 codes, which takes --device cuda with a Hopper GPU and bfloat16 \
                 activations: leave it out"
            ),
            ActivationScheme::Auto | ActivationScheme::None if !multiplies_fp8 => Ok(ActivationScheme::None),
            _ if codes_rows(typed, &model.name, &model.spec, &*model.weights)? => {
                Ok(ActivationScheme::Dynamic)
            }
            _ => Ok(ActivationScheme::None),
        }
    }

    /// How many ranks share the first GPU, if more than one do.
    fn sharing(&self) -> Option<usize> {
        let Processor::Cuda(devices) = self else { return None };
        let sharing = devices.iter().filter(|device| Arc::ptr_eq(device, &devices[0])).count();
        Some(sharing).filter(|&ranks| ranks > 1)
    }

    /// The format that `--dtype auto` means.
    fn dtype(&self, weights: DType) -> DType {
        match self {
            Processor::Cuda(_) if weights != DType::F32 => DType::BF16,
            _ => DType::F32,
        }
    }
}

/// A running engine.
pub(crate) struct Started {
    pub(crate) engine: Engine,
    /// What paces the rows of its ranks.
    pub(crate) links: Vec<Arc<PacedLink>>,
}

/// Settled settings.
pub(crate) struct Setup {
    pub(crate) model: OpenModel,
    /// What its weights are held in.
    held: HeldWeights,
    /// Ranks of the world.
    pub(crate) ranks: usize,
    /// The one of them that is here, if the others are emulated, and what they do.
    pub(crate) emulated: Option<OneOf>,
    /// Which process this is, if the ranks are several, and all of them once they have come.
    launch: Option<Launch>,
    world: OnceLock<World>,
    /// What rows travel between them by; ends after the world.
    rows: Rows,
    /// How fast, once that is measured.
    measured: OnceLock<Link>,
    /// What was typed, for the others.
    flags: Vec<String>,
    pub(crate) peers: Arc<RoutedPeers>,
    /// Threads of each rank.
    pub(crate) threads: usize,
    pub(crate) policy: Policy,
    pub(crate) parallel: Parallel,
    pub(crate) seed: u64,
    /// How fast rows travel between ranks.
    pub(crate) link: Option<Link>,
    routing: RoutingMode,
    record: Option<PathBuf>,
    explain: bool,
    processor: Processor,
    gpu_weights: OnceLock<Vec<CudaWeights>>,
    dtype: DType,
    /// What rows become for weights in codes; settled, so not auto.
    activations: ActivationScheme,
    /// Whether scales of rows in FP8 are powers of two, as the checkpoint asks.
    power_scales: bool,
    wire: WireDType,
    cache: CacheDType,
    /// Most tokens of layers that are gathered.
    gather_tokens: usize,
    isa: Isa,
    batched_tokens: Option<usize>,
    sequences: Option<usize>,
    model_len: Option<usize>,
    timeout: Duration,
    /// Share of a GPU's memory that may be taken.
    utilization: f64,
}

impl Setup {
    /// Settles what flags mean and opens the model.
    pub(crate) fn new(args: &RunArgs) -> Result<Self> {
        Self::of(args, None)
    }

    /// The same with another model in the place of this one.
    pub(crate) fn with_model(args: &RunArgs, model: &str) -> Result<Self> {
        let args = args.with_model(model)?;
        let launch = Launch::find(&args)?.map(Launch::beside).transpose()?;
        Self::settled(&args, None, OpenModel::open(&args.model, args.seed, args.quantization)?, launch)
    }

    /// The same for one rank of a world whose other ranks are emulated: attention whole, experts spread.
    pub(crate) fn of(args: &RunArgs, emulated: Option<OneOf>) -> Result<Self> {
        let launch = if emulated.is_some() { None } else { Launch::find(args)? };
        Self::settled(args, emulated, OpenModel::open(&args.model, args.seed, args.quantization)?, launch)
    }

    /// The same in another process than rank 0.
    fn of_worker(args: &RunArgs, launch: Launch) -> Result<Self> {
        Self::settled(args, None, OpenModel::open(&args.model, args.seed, args.quantization)?, Some(launch))
    }

    fn settled(
        args: &RunArgs,
        emulated: Option<OneOf>,
        model: OpenModel,
        launch: Option<Launch>,
    ) -> Result<Self> {
        let parallel = match emulated {
            Some(_) => Parallel { tensor: 1, data: None, experts: Experts::Ep },
            None => parallel(args),
        };
        let (data, tensor) = (args.data_parallel_size, parallel.tensor);
        let ranks = emulated.map_or(data * tensor, |one| one.size);
        if ranks > MOST_RANKS {
            bail!(
                "--data-parallel-size {data} times --tensor-parallel-size {tensor} are {ranks} ranks: at most {MOST_RANKS} can be \
                 threads of one process"
            );
        }
        parallel.check(&model.spec, ranks)?;
        let here = match &launch {
            _ if emulated.is_some() => 1,
            Some(launch) => launch.neighbours,
            None => ranks,
        };
        let processor = Processor::open(args.device, here, launch.as_ref())?;
        if let (Processor::Cuda(_), Some(_), Some(link)) = (&processor, &launch, args.link.0) {
            bail!(
                "--link {link} paces rows between threads, but those of GPUs in several processes travel by NCCL, as fast as \
                 it can: say --link none, or leave out --distributed-executor-backend"
            );
        }
        if matches!(processor, Processor::Cuda(_)) && args.world.fabric == FabricKind::Mpi {
            bail!("--fabric mpi carries the rows of CPUs, those of GPUs travel by NCCL: leave it out");
        }
        let threads = args.threads.unwrap_or((cores() / here).max(1));
        let dtype = match args.dtype {
            Dtype::Auto => processor.dtype(model.spec.dtype),
            Dtype::Float32 => DType::F32,
            Dtype::Bfloat16 => DType::BF16,
        };
        let wire = args.wire_dtype.of(dtype)?;
        let cache = args.kv_cache_dtype.of(dtype)?;
        let isa = args.isa.unwrap_or_else(Isa::detect);
        let mut policy = policy(args);
        // Rank 0 tells the others what it predicts with.
        if policy.schedule == Schedule::Auto && launch.as_ref().is_none_or(|launch| launch.rank == 0) {
            let machine = match &processor {
                Processor::Cuda(devices) => Fingerprint::of_gpu(devices[0].describe(), ranks, dtype),
                _ => Fingerprint::of_cpu(ranks, threads, isa, dtype),
            };
            policy.cost = Some(Arc::new(cost_model(args.profile.as_deref(), &machine, args.link.0)?));
        }
        let activations = processor.activations(args.activation_scheme, &model, dtype)?;
        let (fp8, int8) = (activations == ActivationScheme::Dynamic, activations == ActivationScheme::Int8);
        let held = HeldWeights::of(&model.spec, &*model.weights, (dtype, fp8), |format| match &processor {
            Processor::Cpu => (int8 && cpu::multiplies_int8(format) || cpu::holds(isa, format, dtype))
                .then(|| format.bits()),
            Processor::Reference => Some(format.bits()),
            Processor::Cuda(_) => cuda::held_bits(format, dtype),
        })?;
        if int8 {
            check_integers(&model.name, &held)?;
        }
        let gather_tokens = match (&emulated, &processor) {
            // Of emulated ranks nobody knows what they would send.
            (Some(_), _) => 0,
            (None, Processor::Cuda(_)) => args.gather_tokens.unwrap_or(GATHERED_ON_GPUS),
            (None, _) => args.gather_tokens.unwrap_or(0),
        };
        let power_scales = model.weights.activations()? == Activations::Dynamic { powers: true };
        let setup = Setup {
            held,
            ranks,
            emulated,
            launch,
            world: OnceLock::new(),
            rows: Rows::by(args.world.fabric)?,
            measured: OnceLock::new(),
            flags: args.flags.clone(),
            peers: Arc::new(RoutedPeers::new(Rank(emulated.map_or(0, |one| one.rank)))),
            parallel,
            threads,
            policy,
            explain: args.explain,
            routing: routing(args)?,
            record: args.routing_record.clone(),
            link: args.link.0,
            seed: args.seed,
            processor,
            gpu_weights: OnceLock::new(),
            dtype,
            activations,
            power_scales,
            wire,
            cache,
            gather_tokens,
            isa,
            batched_tokens: args.max_num_batched_tokens,
            sequences: args.max_num_seqs,
            model_len: args.max_model_len,
            timeout: Duration::from_secs_f64(args.timeout),
            utilization: args.gpu_memory_utilization,
            model,
        };
        setup.check_policy(&setup.parallel, &setup.policy)?;
        Ok(setup)
    }

    /// Experts that the busiest rank holds; none in a model without.
    pub(crate) fn most_local_experts(&self, parallel: &Parallel) -> Result<Option<usize>> {
        Ok(self.slot_map(parallel)?.map(|map| map.max_local()))
    }

    /// Where experts are; nothing where every rank has a part of each.
    fn slot_map(&self, parallel: &Parallel) -> Result<Option<SlotMap>> {
        if parallel.experts == Experts::Tp {
            return Ok(None);
        }
        let moe = self.model.spec.layers.iter().find_map(|layer| layer.mlp.moe());
        Ok(moe.map(|moe| SlotMap::contiguous(moe.experts, self.ranks)).transpose()?)
    }

    /// A policy that cannot be followed cannot be followed for no tokens either.
    fn check_policy(&self, parallel: &Parallel, policy: &Policy) -> Result<()> {
        let Some(map) = self.slot_map(parallel)? else { return Ok(()) };
        let zeros = || vec![0; map.slots()];
        let none = TokenHistograms { tokens: 0, assignments: zeros(), first: zeros(), last: zeros() };
        let counts = LayerHistograms::new(&map, 1, vec![none; self.ranks])?;
        policy.table(&map, &counts)?;
        policy.check()?;
        Ok(())
    }

    /// Longest sequence that can be asked for.
    pub(crate) fn context(&self) -> usize {
        self.model_len.unwrap_or(self.model.spec.max_positions)
    }

    /// What an engine is told, given what it will be asked.
    pub(crate) fn engine_options(
        &self,
        demand: Demand,
        parallel: Parallel,
        policy: &Policy,
    ) -> Result<EngineOptions> {
        parallel.check(&self.model.spec, self.ranks)?;
        self.check_policy(&parallel, policy)?;
        let most = self.model.spec.max_positions;
        if let Some(longer) = self.model_len.filter(|&length| length > most) {
            bail!("--max-model-len is {longer}, but this model was made for {most} positions: lower it");
        }
        let max_model_len = self.model_len.unwrap_or(demand.tokens.min(most)).max(1);
        let max_sequences = self.sequences.unwrap_or(demand.sequences).max(1);
        let most = match &self.processor {
            Processor::Cuda(_) => GPU_BATCHED_TOKENS,
            _ => BATCHED_TOKENS,
        };
        let step = demand.step.clamp(1, most);
        let tokens = self.batched_tokens.unwrap_or(step);
        Ok(EngineOptions {
            max_batched_tokens: tokens,
            capacity: self.emulated_capacity(tokens)?,
            max_sequences,
            max_model_len,
            kv_blocks: None,
            prefix_caching: false,
            kept_states: 0,
            policy: policy.clone(),
            cache_dtype: self.cache,
            wire: self.wire,
            gather_tokens: self.gather_tokens,
            parallel,
            routing: self.routing.clone(),
            // On a CPU a few tokens behind a long context would take most of their time to decompress it.
            decompress_prompts: matches!(self.processor, Processor::Cuda(_)),
            timeout: self.timeout,
            record_spans: false,
        })
    }

    /// An engine, and how long it took to load.
    pub(crate) fn start(&self, options: EngineOptions) -> Result<(Engine, Duration)> {
        let begun = Instant::now();
        let started = self.start_all(&[options])?.pop().context("no engine was started. This is a bug")?;
        Ok((started.engine, begun.elapsed()))
    }

    /// An engine for each set of options; they share their weights.
    pub(crate) fn start_all(&self, options: &[EngineOptions]) -> Result<Vec<Started>> {
        self.check_memory(options)?;
        if let Some(ranks) = self.processor.sharing() {
            output::remark(format_args!(
                "{ranks} ranks share one GPU: what they take is no measure of {ranks} GPUs"
            ));
        }
        match &self.processor {
            Processor::Cpu => self.engines_on_host(options, ThreadedOptions::new, || self.cpu()),
            Processor::Reference => {
                let host = |dtype| reference::options(dtype, self.seed);
                self.engines_on_host(options, host, || Ok(PlainKernels))
            }
            Processor::Cuda(devices) => self.engines_on_gpus(options, devices),
        }
    }

    /// Kernels of a rank on the CPU.
    fn cpu(&self) -> Result<CpuKernels, String> {
        let kernels = CpuKernels::new(self.threads, self.isa)?;
        Ok(if self.activations == ActivationScheme::Int8 { kernels.with_int8_rows() } else { kernels })
    }

    /// Whether rows become FP8 codes where weights are.
    fn fp8_rows(&self) -> bool {
        self.activations == ActivationScheme::Dynamic
    }

    /// How long the threads of ranks look for each other before they sleep. What computes on a host needs its cores; a GPU
    /// leaves its rank a core, if there are enough for all of them and one that paces.
    fn spin(&self) -> Duration {
        match self.processor {
            Processor::Cuda(_) if cores() > self.ranks => Duration::from_micros(200),
            _ => Duration::ZERO,
        }
    }

    fn engines_on_host<K: Kernels>(
        &self,
        options: &[EngineOptions],
        host: impl Fn(DType) -> ThreadedOptions,
        kernels: impl Fn() -> Result<K, String>,
    ) -> Result<Vec<Started>> {
        let store = Arc::new(WeightStore::default());
        if let Some(world) = self.world()? {
            let processes = world.workers.processes();
            let fabric = self.rows.fabric(processes, self.link)?;
            let host = ThreadedOptions { epoch: begin(processes)?, ..host(self.dtype) };
            let device = |faults: &FaultCell| self.on_host(0, &store, faults, &host, &kernels);
            let network = self.network(&fabric, || device(processes.faults()))?;
            let options: Vec<_> = options.iter().map(|options| over_network(options, network)).collect();
            return self.engines_with_workers(&options, world, fabric, device);
        }
        let host = host(self.dtype);
        self.engines(options, |faults| {
            self.here().map(|rank| self.on_host(rank, &store, faults, &host, &kernels)).collect()
        })
    }

    /// Engines whose rank 0 is here, and the others elsewhere.
    fn engines_with_workers<B: Backend>(
        &self,
        options: &[EngineOptions],
        world: &World,
        fabric: Fabric<B>,
        device: impl Fn(&FaultCell) -> Result<B>,
    ) -> Result<Vec<Started>> {
        self.loading(|weights| {
            let start = |options: &EngineOptions| {
                let rank = (Arc::new(device(fabric.control.faults())?), fabric.clone());
                let spec = Arc::clone(&self.model.spec);
                let engine =
                    Engine::start_with_workers(spec, weights, rank, &world.workers, options.clone())?;
                Ok(Started { engine, links: fabric.link.iter().cloned().collect() })
            };
            options.iter().map(start).collect()
        })
    }

    /// What the network between processes carries, which all of them measure together; a paced link says so itself.
    fn network<B: Backend>(
        &self,
        fabric: &Fabric<B>,
        device: impl FnOnce() -> Result<B>,
    ) -> Result<Option<Link>> {
        if self.link.is_some() {
            return Ok(None);
        }
        let link = network(fabric, &device()?, self.timeout)?;
        Ok(Some(*self.measured.get_or_init(|| link)))
    }

    /// The processor of a rank.
    fn on_host<K: Kernels>(
        &self,
        rank: usize,
        store: &Arc<WeightStore<K::Matrix>>,
        faults: &FaultCell,
        host: &ThreadedOptions,
        kernels: impl Fn() -> Result<K, String>,
    ) -> Result<ThreadedBackend<K>> {
        let kernels = kernels().map_err(|problem| anyhow!(problem))?;
        let host = ThreadedOptions { faults: faults.clone(), dtype: self.dtype, ..host.clone() };
        Ok(ThreadedBackend::new(Rank(rank), kernels, Arc::clone(store), host)?)
    }

    /// What a worker has to do with engines.
    fn work(&self, processes: &Processes) -> Result<()> {
        match &self.processor {
            Processor::Cpu => self.work_on_host(processes, ThreadedOptions::new, || self.cpu()),
            Processor::Reference => {
                let host = |dtype| reference::options(dtype, self.seed);
                self.work_on_host(processes, host, || Ok(PlainKernels))
            }
            Processor::Cuda(devices) => {
                let (fabric, gpu) = self.over_nccl(processes, &devices[0])?;
                let weights = CudaWeights::new(&devices[0])?;
                self.work_as(processes, fabric, || {
                    Ok(CudaBackend::new(processes.rank(), &devices[0], &weights, gpu.clone())?)
                })
            }
        }
    }

    fn work_on_host<K: Kernels>(
        &self,
        processes: &Processes,
        host: impl Fn(DType) -> ThreadedOptions,
        kernels: impl Fn() -> Result<K, String>,
    ) -> Result<()> {
        let store = Arc::new(WeightStore::default());
        let fabric = self.rows.fabric(processes, self.link)?;
        let host = ThreadedOptions { epoch: begin(processes)?, ..host(self.dtype) };
        let device = || self.on_host(processes.rank().0, &store, processes.faults(), &host, &kernels);
        // Rank 0 is the one to make something of it.
        self.network(&fabric, device)?;
        self.work_as(processes, fabric, device)
    }

    /// Takes orders from rank 0, with that processor for each engine; engines share their weights.
    fn work_as<B: Backend>(
        &self,
        processes: &Processes,
        fabric: Fabric<B>,
        device: impl Fn() -> Result<B>,
    ) -> Result<()> {
        let mut held = false;
        let check = |options: &ModelOptions| {
            let checked =
                self.check_room_for(std::slice::from_ref(options), std::mem::replace(&mut held, true));
            checked.map_err(|error| {
                let me = &processes.members()[processes.rank().0];
                EngineError::Request(format!("{me}: {}", output::flattened(&error)))
            })
        };
        Ok(work(processes, check, |options| {
            let device = device().map_err(|error| EngineError::Request(output::flattened(&error)))?;
            let spec = Arc::clone(&self.model.spec);
            Ok(Model::load(spec, &*self.model.weights, Arc::new(device), fabric.clone(), options)?)
        })?)
    }

    /// How a rank that is a process with a GPU talks to the others, and what its processor is told.
    fn over_nccl(
        &self,
        processes: &Processes,
        device: &Arc<CudaDevice>,
    ) -> Result<(Fabric<CudaBackend>, CudaOptions)> {
        let fabric = processes.nccl_fabric(device)?;
        let faults = processes.faults().clone();
        Ok((fabric, CudaOptions { faults, epoch: begin(processes)?, ..self.cuda_options() }))
    }

    /// What the processors of GPUs are told, but for the world that they are in.
    fn cuda_options(&self) -> CudaOptions {
        let (fp8_rows, power_scales) = (self.fp8_rows(), self.fp8_rows() && self.power_scales);
        CudaOptions { fp8_rows, power_scales, ..CudaOptions::new(self.dtype) }
    }

    /// Where the weights of each rank are. Ranks of one GPU share them there, and so do engines started one after another.
    fn weights_on_gpus(&self, devices: &[Arc<CudaDevice>]) -> Result<Vec<CudaWeights>> {
        if let Some(stores) = self.gpu_weights.get() {
            return Ok(stores.clone());
        }
        let mut stores: Vec<CudaWeights> = Vec::with_capacity(devices.len());
        for (rank, device) in devices.iter().enumerate() {
            let shared = devices[..rank].iter().position(|other| Arc::ptr_eq(other, device));
            stores.push(match shared {
                Some(other) => stores[other].clone(),
                None => CudaWeights::new(device)?,
            });
        }
        Ok(self.gpu_weights.get_or_init(|| stores).clone())
    }

    fn engines_on_gpus(
        &self,
        options: &[EngineOptions],
        devices: &[Arc<CudaDevice>],
    ) -> Result<Vec<Started>> {
        let stores = self.weights_on_gpus(devices)?;
        if let Some(world) = self.world()? {
            let (fabric, gpu) = self.over_nccl(world.workers.processes(), &devices[0])?;
            return self.engines_with_workers(options, world, fabric, |_| {
                Ok(CudaBackend::new(Rank(0), &devices[0], &stores[0], gpu.clone())?)
            });
        }
        self.engines(options, |faults| {
            let gpu = CudaOptions { faults: faults.clone(), ..self.cuda_options() };
            let ranks = self.here().zip(devices.iter().zip(&stores));
            let rank = |(rank, (device, weights)): (usize, (&Arc<CudaDevice>, &CudaWeights))| {
                Ok(CudaBackend::new(Rank(rank), device, weights, gpu.clone())?)
            };
            ranks.map(rank).collect()
        })
    }

    /// Engines over the processors that `ranks` makes for a world with that fault cell.
    fn engines<B: Backend<Queue: PeerQueue>>(
        &self,
        options: &[EngineOptions],
        ranks: impl Fn(&FaultCell) -> Result<Vec<B>>,
    ) -> Result<Vec<Started>> {
        let spec = &self.model.spec;
        let engine = |options: &EngineOptions, weights: &dyn WeightSource| {
            let faults = FaultCell::default();
            let fabric = ThreadsOptions {
                link: self.link,
                spin: self.spin(),
                ..ThreadsOptions::new(self.timeout, faults.clone())
            };
            let fabrics = match self.emulated {
                Some(one) => vec![self.among_peers(one, fabric)],
                None => Fabric::threads(self.ranks, fabric),
            };
            let links = fabrics.iter().filter_map(|fabric| fabric.link.clone()).collect();
            let ranks = ranks(&faults)?.into_iter().map(Arc::new).zip(fabrics).collect();
            let engine = Engine::start(Arc::clone(spec), weights, ranks, faults, options.clone(), |_| {})?;
            Ok(Started { engine, links })
        };
        self.loading(|weights| options.iter().map(|options| engine(options, weights)).collect())
    }

    /// Shows how far whoever reads the weights is.
    fn loading<T>(&self, read: impl FnOnce(&dyn WeightSource) -> Result<T>) -> Result<T> {
        let bytes = self.held.stored_of(self.numbers_here());
        let bar = output::byte_bar(format!("loading {}", self.model.name), bytes);
        let read = read(&LayerSample { source: &*self.model.weights, bar: &bar });
        bar.finish_and_clear();
        read
    }

    /// The fabric of the rank whose others are emulated.
    fn among_peers<B: Backend<Queue: PeerQueue>>(&self, one: OneOf, options: ThreadsOptions) -> Fabric<B> {
        let ThreadsOptions { timeout, faults, link, .. } = options;
        let (rank, size) = (Rank(one.rank), one.size);
        let peers = Arc::clone(&self.peers) as Arc<dyn Peers>;
        Fabric::emulated(EmulatedOptions { rank, size, link, timeout, faults, peers })
    }

    /// The ranks that are in this process.
    fn here(&self) -> Range<usize> {
        let one = self.emulated.map(|one| one.rank).or(self.launch.as_ref().map(|launch| launch.rank));
        one.map_or(0..self.ranks, |rank| rank..rank + 1)
    }

    /// What the auto schedule did, if that was asked for.
    pub(crate) fn explain(&self, engine: &Engine) {
        if !self.explain {
            return;
        }
        match engine.schedule().filter(|report| report.layers > 0) {
            Some(report) => output::remark(report),
            None if self.ranks == 1 => output::remark(
                "every MoE layer ran in one stage: its rank is alone, nothing travels, and stages have nothing to hide",
            ),
            None => {
                output::remark("no MoE layer was planned by the auto schedule: there is nothing to explain")
            }
        }
    }

    /// Writes down where tokens went, if that was asked for.
    pub(crate) fn write_routing(&self, engine: &Engine) -> Result<()> {
        let Some(file) = &self.record else { return Ok(()) };
        output::write_file(file, |out| engine.routing().write(out))
    }

    /// Room for the rows of an emulated world: those of ranks whose tokens are spread about evenly. Layers whose rows are
    /// more run in chunks.
    fn emulated_capacity(&self, tokens: usize) -> Result<Option<Capacity>> {
        let moe = self.model.spec.layers.iter().find_map(|layer| layer.mlp.moe());
        let (Some(moe), Some(one)) = (moe, self.emulated) else { return Ok(None) };
        let map = SlotMap::contiguous(moe.experts, one.size)?;
        let sizes = LayerSizes { top_k: moe.router.top_k, ..LayerSizes::of(&map, self.dtype) };
        let least = Capacity::worst_case(1, &sizes);
        let rows = tokens.saturating_mul(sizes.ranks_of_token());
        let assignments = (tokens.saturating_mul(sizes.top_k) / 4 * 5).max(least.assignments);
        Ok(Some(Capacity {
            tokens,
            rows_sent: rows.max(least.rows_sent),
            rows_received: rows.max(least.rows_received),
            assignments,
            stage_assignments: assignments,
        }))
    }

    /// The processor, what is computed on it, and what weights are held in if that is not the same, in a few words.
    pub(crate) fn processor(&self) -> String {
        let mut processor = self.processor_alone();
        if self.launch.is_some() {
            let fabric = match (&self.processor, self.rows.kind) {
                (Processor::Cuda(_), _) => "NCCL",
                (_, FabricKind::Tcp) => "TCP",
                (_, FabricKind::Mpi) => "MPI",
            };
            processor += &format!(", {} processes over {fabric}", self.ranks);
            if let Some(Link { bytes_per_second, latency }) = self.measured.get() {
                let (rate, start) = (bytes_per_second / 1_000_000, latency.as_micros());
                processor += &format!(" ({rate} MB/s a rank, {start} us an exchange)");
            }
        }
        match self.activations {
            ActivationScheme::Dynamic => processor += ", activations in fp8 where weights are",
            ActivationScheme::Int8 => {
                processor += ", activations in int8 where weights are four bits or int8"
            }
            ActivationScheme::Auto | ActivationScheme::None => (),
        }
        if self.cache == CacheDType::Fp8 {
            processor += ", KV cache in fp8";
        }
        if self.wire == WireDType::Fp8 {
            processor += &format!(", {}", WireFormat::of(self.wire, self.dtype));
        }
        match WeightFormat::plain(self.dtype) {
            Some(plain) if self.held.formats.iter().all(|(format, _)| *format == plain) => processor,
            _ => format!("{processor}, weights held as {} ({})", self.held, Bytes(self.held.bytes)),
        }
    }

    fn processor_alone(&self) -> String {
        match &self.processor {
            Processor::Cpu => {
                format!("cpu ({}), {} thread(s) a rank, {}", self.isa, self.threads, self.dtype)
            }
            Processor::Reference => format!("reference, {}", self.dtype),
            Processor::Cuda(devices) => {
                let (first, dtype) = (devices[0].describe(), self.dtype);
                match (self.processor.sharing(), devices.len()) {
                    (Some(ranks), _) => format!("{ranks} ranks that share one {first}, {dtype}"),
                    (None, 1) => format!("{first}, {dtype}"),
                    (None, count) => format!("{count} GPUs, the first {first}, {dtype}"),
                }
            }
        }
    }
}

/// What work costs here: as the given profile says, or the one that `epsmoe profile` left for this machine if that can be
/// used, or as nobody measured. What a paced link carries follows from the link.
pub(crate) fn cost_model(
    profile: Option<&Path>,
    machine: &Fingerprint,
    link: Option<Link>,
) -> Result<CostModel> {
    let by_default = default_path(machine);
    let unmeasured = || match machine.gpu {
        // What the catalog of machines says of a GPU.
        Some(_) => Ok(CostModel { dtype: machine.dtype, ..Machine::built_in("8xH200")?.cost() }),
        None => {
            Ok::<_, CostError>(CostModel::unmeasured(machine.dtype, machine.threads, machine.cores as u32))
        }
    };
    let cost = match profile {
        Some(file) => load(file, machine)?,
        None if by_default.exists() => match load(&by_default, machine) {
            Ok(cost) => cost,
            Err(error) => {
                output::warn(format_args!(
                    "{error}; it is ignored, and the auto schedule begins with round figures"
                ));
                unmeasured()?
            }
        },
        None => unmeasured()?,
    };
    Ok(match link {
        Some(link) => with_link(&cost, link),
        None => cost,
    })
}

/// The same options for ranks between which rows travel so fast.
fn over_network(options: &EngineOptions, network: Option<Link>) -> EngineOptions {
    let mut options = options.clone();
    if let (Some(cost), Some(network)) = (&mut options.policy.cost, network) {
        *cost = Arc::new(with_network(cost, network));
    }
    options
}

/// How the model is spread over ranks.
fn parallel(args: &RunArgs) -> Parallel {
    let (tensor, data) = (args.tensor_parallel_size, args.data_parallel_size);
    let whole = args.enable_expert_parallel || tensor * data == 1;
    Parallel { tensor, data: Some(data), experts: if whole { Experts::Ep } else { Experts::Tp } }
}

/// Whether routing is written down, or read.
fn routing(args: &RunArgs) -> Result<RoutingMode> {
    if let Some(file) = &args.routing_record {
        output::check_place(file)?;
        return Ok(RoutingMode::Record);
    }
    let Some(file) = &args.routing_replay else { return Ok(RoutingMode::FromRouter) };
    let cannot = || format!("cannot replay {}", file.display());
    let (text, _) = open_plain(file).with_context(cannot)?;
    let text = BufReader::new(text);
    Ok(RoutingMode::Replay(Arc::new(RoutingLog::read(text).with_context(cannot)?)))
}

fn policy(args: &RunArgs) -> Policy {
    let cut = args.stages.is_some() || args.transfer_order.is_some();
    Policy {
        schedule: match args.schedule {
            Some(ScheduleKind::Serial) => Schedule::Serial,
            Some(ScheduleKind::Staged) => Schedule::Staged,
            Some(ScheduleKind::Auto) => Schedule::Auto,
            Some(ScheduleKind::TwoBatch) => Schedule::TwoBatch,
            None if cut => Schedule::Staged,
            None => Schedule::Auto,
        },
        stages: args.stages.clone(),
        gemm: args.gemm.map(|gemm| match gemm {
            Gemm::Grouped => GemmKind::Grouped,
            Gemm::Dense => GemmKind::Dense,
        }),
        shared: args.shared_expert.map(|place| match place {
            SharedExpertPlace::BesideCountExchange => SharedExpert::BesideCountExchange,
            SharedExpertPlace::BesideFirstDispatch => SharedExpert::BesideFirstDispatch,
            SharedExpertPlace::BesideLastCombine => SharedExpert::BesideLastCombine,
            SharedExpertPlace::Alone => SharedExpert::Serial,
        }),
        order: args.transfer_order.as_ref().map(|order| order.0.clone()),
        cost: None,
    }
}
