//! Servers over tiny checkpoints, and clients without manners.

use epsmoe_base::{CacheDType, DType, FaultCell, Rank, WireDType, env};
use epsmoe_device::Backend;
use epsmoe_device::cpu::{CpuKernels, gemm::Isa};
use epsmoe_device::cuda::{CudaBackend, CudaDevice, CudaOptions, CudaWeights};
use epsmoe_device::threaded::{ThreadedBackend, ThreadedOptions, WeightStore};
use epsmoe_engine::{
    Engine, EngineHandle, EngineOptions, EngineService, Parallel, RoutingMode, ServiceOptions,
};
use epsmoe_fabric::{Fabric, ThreadsOptions};
use epsmoe_model::{Checkpoint, ModelSpec, config};
use epsmoe_plan::Policy;
use epsmoe_server::{
    Address, Ended, Limits, MetricNames, ServedModel, Server, ServerOptions, Stop, StopHandle,
};
use epsmoe_text::{ChatTemplate, GenerationConfig, Tokenizer};
use safetensors::SafeTensors;
use serde_json::{Value, json};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::sync::mpsc::channel;
use std::sync::{Arc, OnceLock};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Longer than anything here may take.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

pub(crate) const MODEL: &str = "tiny";

/// What a test's server computes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Processor {
    Cpu,
    /// The first GPU, for a world of one rank.
    Gpu,
}

/// How a test's server is set up.
#[derive(Clone)]
pub(crate) struct Setup {
    pub(crate) checkpoint: &'static str,
    pub(crate) processor: Processor,
    pub(crate) dtype: DType,
    pub(crate) ranks: usize,
    pub(crate) max_batched_tokens: usize,
    pub(crate) kv_blocks: Option<usize>,
    pub(crate) max_sequences: usize,
    pub(crate) max_queued_requests: usize,
    pub(crate) max_model_len: usize,
    pub(crate) template: Option<&'static str>,
    pub(crate) options: ServerOptions,
}

impl Default for Setup {
    fn default() -> Self {
        Setup {
            checkpoint: "mixtral",
            processor: Processor::Cpu,
            dtype: DType::F32,
            ranks: 1,
            max_batched_tokens: 256,
            kv_blocks: None,
            max_sequences: 16,
            max_queued_requests: 512,
            max_model_len: 512,
            template: None,
            options: ServerOptions {
                served_names: vec![MODEL.into(), "org/tiny".into()],
                api_keys: Vec::new(),
                allowed_origins: Vec::new(),
                limits: Limits::default(),
                shutdown_timeout: PATIENCE,
                metric_names: MetricNames::Own,
                tool_parser: None,
                reasoning: None,
            },
        }
    }
}

/// A running server. Dropping it ends it.
pub(crate) struct Running {
    pub(crate) address: String,
    pub(crate) engine: EngineHandle,
    pub(crate) vocab: usize,
    pub(crate) faults: FaultCell,
    stop: StopHandle,
    thread: Option<JoinHandle<Ended>>,
}

/// `EPSMOE_TEST_FIXTURES` says where the checkpoints are on a machine without the sources.
pub(crate) fn folder(checkpoint: &str) -> PathBuf {
    let here = || Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures");
    env::text("EPSMOE_TEST_FIXTURES").map_or_else(here, PathBuf::from).join(checkpoint)
}

/// The first GPU; the same for all tests.
pub(crate) fn gpu() -> Result<Arc<CudaDevice>, String> {
    static DEVICE: OnceLock<Result<Arc<CudaDevice>, String>> = OnceLock::new();
    DEVICE.get_or_init(|| CudaDevice::open(0).map_err(|error| error.to_string())).clone()
}

/// A server of the first checkpoint with nothing special.
pub(crate) fn serve() -> Running {
    Setup::default().serve()
}

impl Setup {
    pub(crate) fn serve(&self) -> Running {
        let folder = folder(self.checkpoint);
        let mut spec = config::read(&folder).unwrap();
        let generation = GenerationConfig::open(&folder).unwrap();
        spec.eos.extend(generation.eos());
        let (vocab, eos) = (spec.vocab, spec.eos.clone());
        let (engine, faults) = match self.processor {
            Processor::Cpu => self.engine_on_cpu(spec),
            Processor::Gpu => self.engine_on_gpu(spec),
        };
        let service = ServiceOptions { max_queued_requests: self.max_queued_requests };
        let engine = EngineService::start(engine, service).unwrap();
        let template = match self.template {
            Some(text) => ChatTemplate::parse((b"{}", &folder), Some((text.to_owned(), &folder))).unwrap(),
            None => ChatTemplate::open(&folder).unwrap(),
        };
        let model = ServedModel {
            engine: engine.clone(),
            tokenizer: Tokenizer::open(&folder).unwrap(),
            template,
            generation,
            eos,
            vocab,
            max_model_len: self.max_model_len,
            root: folder.display().to_string(),
            ranks: vec!["cpu".into(); self.ranks],
        };
        let server = Server::bind(&Address::Tcp { host: "127.0.0.1".into(), port: 0 }).unwrap();
        let address = server.name().strip_prefix("http://").unwrap().to_owned();
        let (stop, asked) = Stop::channel();
        let (listening, ready) = channel();
        let options = self.options.clone();
        let thread = std::thread::spawn(move || {
            server.run(model, options, asked, move || listening.send(()).unwrap()).unwrap()
        });
        ready.recv_timeout(PATIENCE).unwrap();
        Running { address, engine, vocab, faults, stop, thread: Some(thread) }
    }
}

impl Setup {
    fn engine_on_cpu(&self, spec: ModelSpec) -> (Engine, FaultCell) {
        let options = ThreadedOptions::new(self.dtype);
        let faults = options.faults.clone();
        let store = Arc::new(WeightStore::default());
        let ends = Fabric::threads(self.ranks, ThreadsOptions::new(PATIENCE, faults.clone()));
        let ranks = ends.into_iter().enumerate().map(|(rank, fabric)| {
            let kernels = CpuKernels::new(1, Isa::detect()).unwrap();
            let device = ThreadedBackend::new(Rank(rank), kernels, Arc::clone(&store), options.clone());
            (Arc::new(device.unwrap()), fabric)
        });
        (self.engine(spec, ranks.collect(), faults.clone()), faults)
    }

    fn engine_on_gpu(&self, spec: ModelSpec) -> (Engine, FaultCell) {
        assert_eq!(self.ranks, 1);
        let device = gpu().unwrap();
        let options = CudaOptions::new(self.dtype);
        let faults = options.faults.clone();
        let weights = CudaWeights::new(&device).unwrap();
        let backend = CudaBackend::new(Rank(0), &device, &weights, options).unwrap();
        let ranks = vec![(Arc::new(backend), Fabric::single_rank())];
        (self.engine(spec, ranks, faults.clone()), faults)
    }

    fn engine<B: Backend>(
        &self,
        spec: ModelSpec,
        ranks: Vec<(Arc<B>, Fabric<B>)>,
        faults: FaultCell,
    ) -> Engine {
        let options = EngineOptions {
            max_batched_tokens: self.max_batched_tokens,
            max_sequences: self.max_sequences,
            max_model_len: self.max_model_len,
            kv_blocks: self.kv_blocks,
            capacity: None,
            prefix_caching: true,
            kept_states: 8,
            policy: Policy::default(),
            cache_dtype: CacheDType::Auto,
            wire: WireDType::Auto,
            gather_tokens: 64,
            parallel: Parallel { data: Some(self.ranks), ..Parallel::default() },
            routing: RoutingMode::FromRouter,
            timeout: PATIENCE,
            decompress_prompts: true,
            record_spans: false,
        };
        let checkpoint = Checkpoint::open(&folder(self.checkpoint)).unwrap();
        Engine::start(Arc::new(spec), &checkpoint, ranks, faults, options, |_| {}).unwrap()
    }
}

/// An answer.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) headers: ureq::http::HeaderMap,
    pub(crate) text: String,
}

impl Answer {
    pub(crate) fn json(&self) -> Value {
        serde_json::from_str(&self.text).unwrap_or_else(|error| panic!("{error}: {}", self.text))
    }

    /// The body of an answer that must be one.
    pub(crate) fn ok(&self) -> Value {
        assert_eq!(self.status, 200, "{}", self.text);
        self.json()
    }

    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).map(|value| value.to_str().unwrap())
    }

    /// Status and error object of an answer that is none; all four keys must be there.
    pub(crate) fn error(&self) -> (u16, Value) {
        let error = self.json()["error"].clone();
        let keys: Vec<&str> = error.as_object().unwrap().keys().map(String::as_str).collect();
        assert_eq!(keys, ["message", "type", "param", "code"], "{}", self.text);
        (self.status, error)
    }
}

impl Running {
    fn agent() -> ureq::Agent {
        ureq::Agent::config_builder()
            .http_status_as_error(false)
            .timeout_global(Some(PATIENCE))
            .build()
            .into()
    }

    pub(crate) fn get(&self, path: &str) -> Answer {
        answer(Self::agent().get(format!("http://{}{path}", self.address)).call().unwrap())
    }

    pub(crate) fn post(&self, path: &str, body: &Value) -> Answer {
        self.post_text(path, &body.to_string())
    }

    pub(crate) fn post_text(&self, path: &str, body: &str) -> Answer {
        let request = Self::agent().post(format!("http://{}{path}", self.address));
        answer(request.header("content-type", "application/json").send(body).unwrap())
    }

    pub(crate) fn completions(&self, body: Value) -> Value {
        self.post("/v1/completions", &body).ok()
    }

    /// The data of a stream's events, which must end with `[DONE]`.
    pub(crate) fn events(&self, path: &str, mut body: Value) -> Vec<Value> {
        body["stream"] = true.into();
        let answer = self.post(path, &body);
        assert_eq!(answer.header("content-type"), Some("text/event-stream"), "{}", answer.text);
        let lines = answer.text.split("\n\n").filter(|event| !event.is_empty());
        let mut data: Vec<&str> = lines.filter_map(|event| event.strip_prefix("data: ")).collect();
        assert_eq!(data.pop(), Some("[DONE]"), "{}", answer.text);
        data.into_iter().map(|data| serde_json::from_str(data).unwrap()).collect()
    }

    /// A connection that speaks for itself.
    pub(crate) fn connect(&self) -> TcpStream {
        let stream = TcpStream::connect(&self.address).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.set_write_timeout(Some(PATIENCE)).unwrap();
        stream
    }

    /// A connection on which a stream of many tokens has begun.
    pub(crate) fn begin_stream(&self, max_tokens: usize) -> TcpStream {
        let body = json!({ "prompt": "Once", "max_tokens": max_tokens, "ignore_eos": true, "stream": true,
            "return_token_ids": true });
        let mut stream = self.connect();
        let request = request("POST", "/v1/completions", &body.to_string());
        stream.write_all(request.replace("host:", "connection: close\r\nhost:").as_bytes()).unwrap();
        let mut lines = BufReader::new(stream.try_clone().unwrap()).lines();
        assert!(lines.next().unwrap().unwrap().contains("200"));
        assert!(lines.any(|line| line.unwrap().starts_with("data: ")));
        stream
    }

    /// Waits until nothing runs or waits; returns how long that took.
    pub(crate) fn wait_until_idle(&self) -> Duration {
        let begun = Instant::now();
        loop {
            let stats = self.engine.stats();
            if stats.running == 0 && stats.waiting == 0 {
                return begun.elapsed();
            }
            assert!(begun.elapsed() < PATIENCE, "{stats:?}");
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// Asks the server to end.
    pub(crate) fn stop(&self) {
        self.stop.stop();
    }

    /// How it ended.
    pub(crate) fn join(mut self) -> Ended {
        self.thread.take().unwrap().join().unwrap()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.stop.stop();
        self.stop.stop();
        if let Some(thread) = self.thread.take() {
            let ended = thread.join();
            assert!(std::thread::panicking() || ended.is_ok());
        }
    }
}

fn answer(response: ureq::http::Response<ureq::Body>) -> Answer {
    let (parts, mut body) = response.into_parts();
    let text = body.with_config().limit(1 << 28).read_to_string().unwrap();
    Answer { status: parts.status.as_u16(), headers: parts.headers, text }
}

/// A request as bytes.
pub(crate) fn request(method: &str, path: &str, body: &str) -> String {
    let length = body.len();
    format!(
        "{method} {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n\
         content-length: {length}\r\n\r\n{body}"
    )
}

/// Everything until the other side closes.
pub(crate) fn read_to_end(stream: &mut TcpStream) -> String {
    let mut bytes = Vec::new();
    let _ = stream.read_to_end(&mut bytes);
    String::from_utf8_lossy(&bytes).into_owned()
}

/// A prompt of a checkpoint, and what transformers made of it in float32.
pub(crate) struct Expected {
    pub(crate) ids: Vec<u32>,
    /// Of every token `[prompt, V]`.
    pub(crate) logits: Vec<Vec<f32>>,
    /// The continuation of the most likely tokens.
    pub(crate) greedy: Vec<u32>,
}

pub(crate) fn expected(checkpoint: &str, index: usize) -> Expected {
    let bytes = std::fs::read(folder(checkpoint).join("expected.safetensors")).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let ids = |name: &str| -> Vec<u32> {
        let tensor = tensors.tensor(&format!("{name}_{index}")).unwrap();
        let words = tensor.data().chunks_exact(8);
        words.map(|word| i64::from_le_bytes(word.try_into().unwrap()) as u32).collect()
    };
    let (ids, greedy) = (ids("input_ids"), ids("greedy"));
    let logits = tensors.tensor(&format!("logits_{index}")).unwrap();
    let logits = logits.data().chunks_exact(4).map(|word| f32::from_le_bytes(word.try_into().unwrap()));
    let logits: Vec<f32> = logits.collect();
    let rows = logits.chunks_exact(logits.len() / ids.len()).map(<[f32]>::to_vec).collect();
    Expected { ids, logits: rows, greedy }
}

/// The natural logarithms of the probabilities of all tokens.
pub(crate) fn log_softmax(logits: &[f32]) -> Vec<f64> {
    let most = logits.iter().copied().fold(f32::MIN, f32::max);
    let sum: f64 = logits.iter().map(|logit| f64::from(logit - most).exp()).sum();
    logits.iter().map(|logit| f64::from(logit - most) - sum.ln()).collect()
}
