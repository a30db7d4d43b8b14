//! Tiny published-style checkpoints against logits and greedy continuations that Hugging Face transformers
//! computed from them (`fixtures/make.py`), over ranks and schedules.

use epsmoe_base::{DType, Rank};
use epsmoe_device::host::{HostBackend, HostOptions, Kernels, WeightStore};
use epsmoe_device::reference::PlainKernels;
use epsmoe_engine::{Completion, Engine, EngineOptions, Request};
use epsmoe_fabric::{Threads, ThreadsOptions};
use epsmoe_model::{Checkpoint, ModelSpec, config};
use epsmoe_plan::{Policy, Schedule};
use safetensors::SafeTensors;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

/// How far float32 logits may be from the reference.
const LOGITS: f32 = 1e-3;

/// A smaller gap between the two best logits of the reference does not decide the next token.
const UNDECIDED: f32 = 2e-3;

const TIMEOUT: Duration = Duration::from_secs(60);

struct Prompt {
    ids: Vec<u32>,
    logits: Vec<f32>,
    greedy: Vec<u32>,
}

fn folder(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures").join(name)
}

fn prompts(folder: &Path) -> Vec<Prompt> {
    let bytes = std::fs::read(folder.join("expected.safetensors")).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let ids = |name: String| -> Vec<u32> {
        let tensor = tensors.tensor(&name).unwrap();
        let words = tensor.data().chunks_exact(8);
        words.map(|word| i64::from_le_bytes(word.try_into().unwrap()) as u32).collect()
    };
    let prompt = |index| Prompt {
        ids: ids(format!("input_ids_{index}")),
        greedy: ids(format!("greedy_{index}")),
        logits: tensors
            .tensor(&format!("logits_{index}"))
            .unwrap()
            .data()
            .chunks_exact(4)
            .map(|word| f32::from_le_bytes(word.try_into().unwrap()))
            .collect(),
    };
    (0..3).map(prompt).collect()
}

fn engine<K: Kernels>(folder: &Path, kernels: impl Fn() -> K, ranks: usize, policy: Policy) -> (Arc<ModelSpec>, Engine) {
    let spec = Arc::new(config::read(folder).unwrap());
    let source = Checkpoint::open(folder).unwrap();
    let options = HostOptions::new(DType::F32);
    let store = Arc::new(WeightStore::default());
    let faults = options.faults.clone();
    let fabric = ThreadsOptions::new(TIMEOUT, faults.clone());
    let ranks = Threads::world(ranks, fabric).into_iter().enumerate().map(|(rank, fabric)| {
        let device = HostBackend::new(Rank(rank), kernels(), Arc::clone(&store), options.clone()).unwrap();
        (Arc::new(device), Arc::new(fabric))
    });
    let engine_options = EngineOptions {
        max_batched_tokens: 200,
        max_sequences: 4,
        max_model_len: 192,
        policy,
        timeout: TIMEOUT,
    };
    let engine =
        Engine::start(Arc::clone(&spec), &source, ranks.collect(), faults, engine_options, |_| {}).unwrap();
    (spec, engine)
}

/// All prompts at once, so that sequences share batches; every continuation token is compared with the
/// reference's, unless its two best logits were too close to call: then the continuation is left there.
fn check<K: Kernels>(name: &str, kernels: impl Fn() -> K, ranks: usize, schedule: Schedule) {
    let folder = folder(name);
    let prompts = prompts(&folder);
    let policy = Policy { schedule, ..Policy::default() };
    let (spec, mut engine) = engine(&folder, kernels, ranks, policy);
    let requests = prompts.iter().map(|prompt| Request {
        prompt: prompt.ids.clone(),
        max_tokens: prompt.greedy.len(),
        ignore_eos: true,
        prompt_logits: true,
        ..Request::default()
    });
    let answers = engine.run(requests.collect(), |_| {}).unwrap();
    for (prompt, answer) in prompts.iter().zip(&answers) {
        let what = format!("{name}, {ranks} ranks, {schedule}, prompt of {}", prompt.ids.len());
        assert_eq!(answer.prompt_logits.len(), prompt.logits.len(), "{what}");
        for (at, (got, want)) in answer.prompt_logits.iter().zip(&prompt.logits).enumerate() {
            let (token, id) = (at / spec.vocab, at % spec.vocab);
            assert!((got - want).abs() <= LOGITS, "{what}: token {token}, logit {id}: {got} for {want}");
        }
        check_greedy(&what, &spec, &mut engine, prompt, answer);
    }
}

/// Where a continuation leaves the reference's, teacher forcing tells whether that token was a toss-up.
fn check_greedy(what: &str, spec: &ModelSpec, engine: &mut Engine, prompt: &Prompt, answer: &Completion) {
    if answer.ids == prompt.greedy {
        return;
    }
    let forced = [prompt.ids.as_slice(), &prompt.greedy].concat();
    let request = Request { prompt: forced, prompt_logits: true, ..Request::default() };
    let logits = engine.run(vec![request], |_| {}).unwrap().remove(0).prompt_logits;
    let rows = logits.chunks_exact(spec.vocab).skip(prompt.ids.len() - 1);
    for (at, (row, &want)) in rows.zip(&prompt.greedy).enumerate() {
        let best = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        assert!(best - row[want as usize] <= UNDECIDED, "{what}: new token {at} should be {want}");
    }
}

fn check_all(name: &str) {
    for ranks in [1, 2, 4] {
        for schedule in [Schedule::Serial, Schedule::Staged] {
            check(name, || PlainKernels, ranks, schedule);
        }
    }
}

macro_rules! fixtures {
    ($($name:ident),* $(,)?) => {
        $(#[test]
        fn $name() {
            check_all(stringify!($name));
        })*
    };
}

fixtures!(
    mixtral,
    mixtral_f16,
    deepseek_v2,
    deepseek_v2_lite,
    deepseek_v2_yarn,
    deepseek_v3,
    dbrx,
    dbrx_clip,
    qwen2_moe,
    qwen3_moe,
    qwen3_moe_sparse,
    qwen3_moe_merged,
    olmoe,
    arctic,
);
