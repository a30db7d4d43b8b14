//! What is wrong is told, and by the name of the field.

use super::support::{Setup, serve};
use serde_json::{Value, json};

#[test]
fn bodies_that_are_no_objects() {
    let server = serve();
    for path in ["/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"] {
        for body in ["", " ", "[]", "3", "null", "\"x\"", "{", "{\"prompt\": NaN}", &"[".repeat(100_000)] {
            assert_eq!(server.post_text(path, body).error().0, 400, "{path} {body:.20}");
        }
    }
}

#[test]
fn fields_are_checked_by_name() {
    let server = serve();
    let params = [
        ("temperature", json!(-1)),
        ("temperature", json!("hot")),
        ("top_p", json!(0)),
        ("top_p", json!(1.5)),
        ("max_tokens", json!(-1)),
        ("max_tokens", json!("5")),
        ("max_tokens", json!(1.5)),
        ("min_tokens", json!(-1)),
        ("min_tokens", json!(2)),
        ("n", json!(0)),
        ("stop", json!(5)),
        ("stream", json!("yes")),
        ("seed", json!("x")),
        ("seed", json!(1.5)),
        ("logit_bias", json!([])),
        ("logit_bias", json!({ "320": 1 })),
        ("logit_bias", json!({ "-1": 1 })),
        ("logit_bias", json!({ "x": 1 })),
        ("presence_penalty", json!("x")),
        ("presence_penalty", json!(3)),
        ("frequency_penalty", json!(-3)),
        ("stop_token_ids", json!([320])),
        ("stream_options", json!({})),
        ("structured_outputs", json!([null])),
        ("response_format", json!({ "type": "xml" })),
        ("response_format", json!({ "type": "json_schema", "json_schema": {} })),
        (
            "response_format",
            json!({ "type": "json_schema", "json_schema": { "schema": { "type": "banana" } } }),
        ),
        ("suffix", json!("x")),
        ("echo", json!(3)),
    ];
    for (param, value) in &params {
        for path in ["/v1/completions", "/v1/chat/completions"] {
            let mut body =
                json!({ "prompt": "a", "messages": [{ "role": "user", "content": "a" }], "max_tokens": 1 });
            body[param] = value.clone();
            let (status, error) = server.post(path, &body).error();
            assert_eq!((status, &error["param"]), (400, &json!(param)), "{path} {body}: {error}");
        }
    }
    let of_chat: [(&str, Value); 5] = [
        ("messages", json!([])),
        ("messages", json!([{ "role": "user", "content": 3 }])),
        ("logprobs", json!(3)),
        ("top_logprobs", json!(-1)),
        ("max_completion_tokens", json!(-1)),
    ];
    for (param, value) in of_chat {
        let mut body = json!({ "messages": [{ "role": "user", "content": "a" }] });
        body[param] = value;
        let (status, error) = server.post("/v1/chat/completions", &body).error();
        assert_eq!((status, &error["param"]), (400, &json!(param)), "{body}: {error}");
    }
    for (param, value) in [
        ("prompt", json!(3)),
        ("prompt", json!([[]])),
        ("prompt", json!([320])),
        ("prompt", json!("")),
        ("logprobs", json!("x")),
    ] {
        let mut body = json!({ "prompt": "a" });
        body[param] = value;
        let (status, error) = server.post("/v1/completions", &body).error();
        assert_eq!((status, &error["param"]), (400, &json!(param)), "{body}: {error}");
    }
}

#[test]
fn null_is_absent_and_unknown_fields_are_ignored() {
    let server = serve();
    let mut body = json!({ "prompt": "a", "max_tokens": 1, "no such field": { "deep": [1] }, "user": "me" });
    for field in [
        "temperature",
        "top_p",
        "n",
        "stop",
        "seed",
        "logit_bias",
        "stream",
        "stream_options",
        "logprobs",
        "suffix",
        "echo",
        "best_of",
        "response_format",
    ] {
        body[field] = Value::Null;
    }
    server.completions(body);
}

#[test]
fn models_that_are_not_here() {
    let server = serve();
    for path in ["/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"] {
        let body = json!({ "model": "other", "prompt": "a", "messages": [{ "role": "user", "content": "a" }], "tokens": [] });
        let body = if path == "/tokenize" { json!({ "model": "other", "prompt": "a" }) } else { body };
        let (status, error) = server.post(path, &body).error();
        assert_eq!(status, 404, "{path}");
        assert!(error["message"].as_str().unwrap().contains("other"), "{error}");
    }
}

#[test]
fn the_context_is_the_limit() {
    let server = serve();
    let ask = |length: usize, max_tokens: Option<usize>| {
        let prompt: Vec<usize> = (0..length).map(|at| 10 + at % 300).collect();
        server.post(
            "/v1/completions",
            &json!({ "prompt": prompt, "max_tokens": max_tokens, "ignore_eos": true }),
        )
    };
    for length in [512, 513, 5000] {
        let (status, error) = ask(length, Some(1)).error();
        let message = error["message"].as_str().unwrap();
        assert_eq!((status, &error["param"]), (400, &json!("prompt")));
        assert!(message.contains("maximum context length is 512 tokens"), "{message}");
    }
    assert_eq!(ask(511, Some(1)).ok()["usage"]["completion_tokens"], 1);
    // What does not fit ends at the limit.
    assert_eq!(ask(500, Some(100)).ok()["usage"]["completion_tokens"], 12);
    let chat = json!({ "messages": [{ "role": "user", "content": "word ".repeat(600) }] });
    let (status, error) = server.post("/v1/chat/completions", &chat).error();
    assert!(
        status == 400 && error["message"].as_str().unwrap().contains("maximum context length is 512 tokens")
    );
    let huge = json!({ "prompt": "x".repeat(1 << 20) });
    assert!(
        server.post("/v1/completions", &huge).error().1["message"]
            .as_str()
            .unwrap()
            .contains("maximum context length is 512")
    );
}

#[test]
fn a_full_queue_asks_to_try_again() {
    let server = Setup { max_sequences: 1, max_queued_requests: 1, ..Setup::default() }.serve();
    let long = json!({ "prompt": "a", "max_tokens": 400, "ignore_eos": true });
    std::thread::scope(|scope| {
        let asked: Vec<_> = (0..8).map(|_| scope.spawn(|| server.post("/v1/completions", &long))).collect();
        let answers: Vec<_> = asked.into_iter().map(|asked| asked.join().unwrap()).collect();
        let (answered, refused): (Vec<_>, Vec<_>) = answers.iter().partition(|answer| answer.status == 200);
        assert!(!answered.is_empty() && !refused.is_empty());
        for answer in refused {
            assert_eq!(answer.error().0, 503);
            assert_eq!(answer.header("retry-after"), Some("1"));
        }
    });
    // More at once than there ever is room for: trying again would not help.
    let (status, error) = server.post("/v1/completions", &json!({ "prompt": "a", "n": 3 })).error();
    let message = error["message"].as_str().unwrap();
    assert!(
        status == 400 && message.contains("3 answers at once") && message.contains("2 that may"),
        "{error}"
    );
}

/// A cache that holds less than a context: what can never fit is refused, what fits runs, also when it has to give way.
#[test]
fn a_full_cache_refuses_only_what_never_fits() {
    let server = Setup { kv_blocks: Some(3), max_sequences: 4, ..Setup::default() }.serve();
    let ask = |length: usize, max_tokens: usize| {
        let prompt: Vec<usize> = (0..length).map(|at| 10 + at % 300).collect();
        server.post(
            "/v1/completions",
            &json!({ "prompt": prompt, "max_tokens": max_tokens, "ignore_eos": true }),
        )
    };
    let (status, error) = ask(150, 80).error();
    let message = error["message"].as_str().unwrap();
    assert!(status == 400 && message.contains("the KV cache, which holds 192"), "{error}");
    std::thread::scope(|scope| {
        let asked: Vec<_> = (0..6).map(|number| scope.spawn(move || ask(60 + number, 100))).collect();
        for asked in asked {
            assert_eq!(asked.join().unwrap().ok()["usage"]["completion_tokens"], 100);
        }
    });
    let stats = server.engine.stats();
    assert!(stats.preemptions > 0 && stats.kv_blocks_used == 0, "{stats:?}");
}
