//! Same request, same seed, same answer, whatever else is being served: requests alone, one after the other, against the
//! same requests all at once by a server whose cache is too small for them, so that prompts go in chunks, begin with
//! what others left in the cache, and are computed again when their blocks were taken.

use super::support::{Processor, Running, Setup, gpu};
use epsmoe_base::env::{self, test_seed};
use epsmoe_base::{DType, Mix};
use serde_json::{Value, json};

const REQUESTS: usize = 50;

/// Clients that go away in the middle of their answers.
const GOERS: usize = 6;

/// One choice: its text, its token ids, their log-probabilities as they were written, and why it ended.
#[derive(Debug, Default, PartialEq)]
struct Told {
    text: String,
    ids: Vec<u64>,
    logprobs: Vec<Value>,
    finish_reason: Value,
}

/// A request of its own, from its number. Prompts are of three families, which share their first block or two.
fn request(seed: u64, number: usize, vocab: usize) -> Value {
    let mut mix = Mix::keyed(seed, &[number as u64]);
    let token = |key: &[u64]| Mix::keyed(seed, key).below(vocab) as u64;
    let (family, shared, own) = (mix.below(3) as u64, 40 + mix.below(100), 1 + mix.below(60));
    let prompt: Vec<u64> = (0..shared as u64)
        .map(|at| token(&[1, family, at]))
        .chain((0..own as u64).map(|at| token(&[2, number as u64, at])))
        .collect();
    let greedy = number.is_multiple_of(2);
    json!({
        "prompt": prompt,
        "max_tokens": 5 + mix.below(60),
        "n": if number % 10 == 3 { 3 } else { 1 },
        "temperature": if greedy { 0.0 } else { 0.9 },
        "seed": if greedy { Value::Null } else { json!(number) },
        "top_p": if number % 4 == 1 { 0.9 } else { 1.0 },
        "presence_penalty": if number % 5 == 1 { 0.6 } else { 0.0 },
        "logprobs": if number.is_multiple_of(3) { json!(2) } else { Value::Null },
        "ignore_eos": !number.is_multiple_of(7),
        "stream": number % 4 >= 2,
        "return_token_ids": true,
    })
}

/// What the server says, whether at once or in pieces.
fn ask(server: &Running, body: &Value) -> Vec<Told> {
    let pieces = match body["stream"] == true {
        true => server.events("/v1/completions", body.clone()),
        false => vec![server.completions(body.clone())],
    };
    let mut told = Vec::new();
    told.resize_with(body["n"].as_u64().unwrap() as usize, Told::default);
    for choice in pieces.iter().flat_map(|piece| piece["choices"].as_array().unwrap()) {
        let told = &mut told[choice["index"].as_u64().unwrap() as usize];
        told.text += choice["text"].as_str().unwrap();
        told.ids.extend(choice["token_ids"].as_array().into_iter().flatten().map(|id| id.as_u64().unwrap()));
        told.logprobs.extend(choice["logprobs"]["token_logprobs"].as_array().into_iter().flatten().cloned());
        if !choice["finish_reason"].is_null() {
            told.finish_reason = choice["finish_reason"].clone();
        }
    }
    told
}

#[expect(clippy::print_stdout, reason = "a run that fails can be repeated")]
fn check(setup: &Setup) {
    let seed = test_seed();
    println!("EPSMOE_TEST_SEED={seed}, {} in {} on {:?}", setup.checkpoint, setup.dtype, setup.processor);
    let quiet = Setup { max_model_len: 320, ..setup.clone() }.serve();
    let requests: Vec<Value> = (0..REQUESTS).map(|number| request(seed, number, quiet.vocab)).collect();
    let alone: Vec<Vec<Told>> = requests.iter().map(|body| ask(&quiet, body)).collect();
    drop(quiet);
    // The longest request takes five blocks of its group's seven.
    let busy = Setup {
        max_model_len: 320,
        max_sequences: 6,
        max_batched_tokens: 48,
        kv_blocks: Some(7),
        ..setup.clone()
    };
    let busy = busy.serve();
    std::thread::scope(|scope| {
        for (number, (body, alone)) in requests.iter().zip(&alone).enumerate() {
            let busy = &busy;
            scope.spawn(move || assert_eq!(ask(busy, body), *alone, "request {number}: {body}"));
        }
        for _ in 0..GOERS {
            scope.spawn(|| drop(busy.begin_stream(200)));
        }
    });
    busy.wait_until_idle();
    let stats = busy.engine.stats();
    assert!(stats.preemptions > 0 && stats.prefix_hits > 0, "{stats:?}");
    assert_eq!((stats.kv_blocks_used, stats.running, stats.waiting), (0, 0, 0), "{stats:?}");
    let metrics = busy.get("/metrics").text;
    for line in
        ["kv_cache_usage_perc{model_name=\"tiny\"} 0.0", "num_requests_running{model_name=\"tiny\"} 0.0"]
    {
        assert!(metrics.contains(line), "{line}: {metrics}");
    }
}

macro_rules! fixtures {
    ($($name:ident),* $(,)?) => {
        mod cpu {
            use super::*;

            $(#[test]
            fn $name() {
                for (dtype, ranks) in [(DType::F32, 1), (DType::BF16, 2)] {
                    check(&Setup { checkpoint: stringify!($name), dtype, ranks, ..Setup::default() });
                }
            })*
        }

        /// Skipped where there is no GPU, unless `EPSMOE_TEST_ALL` says that nothing may be.
        mod gpu {
            use super::*;

            $(#[test]
            fn $name() {
                match super::gpu() {
                    Ok(_) => for dtype in [DType::F32, DType::BF16] {
                        let checkpoint = stringify!($name);
                        check(&Setup { checkpoint, dtype, processor: Processor::Gpu, ..Setup::default() });
                    },
                    Err(missing) if env::text("EPSMOE_TEST_ALL").is_some() => panic!("{missing}"),
                    Err(missing) => eprintln!("skipped: {missing}"),
                }
            })*
        }
    };
}

fixtures!(
    mixtral,
    mixtral_f16,
    mixtral_int4,
    deepseek_v2,
    deepseek_v2_lite,
    deepseek_v2_yarn,
    deepseek_v3,
    deepseek_v3_fp8,
    dbrx,
    dbrx_clip,
    qwen2_moe,
    qwen2_moe_windows,
    qwen3_moe,
    qwen3_moe_sparse,
    qwen3_moe_merged,
    qwen3_moe_mxfp4,
    olmoe,
    arctic,
    glm4_moe,
    glm4_moe_lite,
    dots1,
    minimax_m2,
    bailing_moe_v2,
    ernie4_5_moe,
    hunyuan_v1_moe,
    gpt_oss,
    granitemoeshared,
    granitemoehybrid,
    nemotron_h,
);
