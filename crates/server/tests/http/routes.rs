//! What there is besides answers.

use super::support::{MODEL, Setup, read_to_end, request, serve};
use epsmoe_server::MetricNames;
use serde_json::{Value, json};
use std::io::Write;

#[test]
fn the_model_has_all_its_names() {
    let server = serve();
    let list = server.get("/v1/models").ok();
    assert_eq!(list["object"], "list");
    let card = &list["data"][0];
    let keys: Vec<&String> = card.as_object().unwrap().keys().collect();
    assert_eq!(keys, ["id", "object", "created", "owned_by", "root", "parent", "max_model_len"]);
    assert_eq!((&card["id"], &card["max_model_len"]), (&json!(MODEL), &json!(512)));
    assert_eq!(server.get("/v1/models/tiny").ok(), *card);
    assert_eq!(server.get("/v1/models/org/tiny").ok()["id"], "org/tiny");
    assert_eq!(server.get("/v1/models/org%2Ftiny").ok()["id"], "org/tiny");
    let (status, error) = server.get("/v1/models/other").error();
    assert_eq!(status, 404);
    assert!(error["message"].as_str().unwrap().contains("`other`"), "{error}");
}

#[test]
fn the_server_tells_of_itself() {
    let server = serve();
    for route in ["/health", "/ready", "/ping"] {
        assert_eq!(server.get(route).ok()["status"], "ok");
    }
    assert_eq!(server.get("/version").ok()["version"], env!("CARGO_PKG_VERSION"));
    let description = server.get("/openapi.json").ok();
    assert!(description["openapi"].as_str().unwrap().starts_with("3."));
    for path in ["/v1/models", "/v1/models/{model}", "/v1/completions", "/v1/chat/completions", "/tokenize"] {
        assert!(description["paths"][path].is_object(), "{path}");
    }
    let page = server.get("/docs/");
    assert_eq!(page.status, 200);
    let elsewhere = |attribute: &str| page.text.contains(&format!("{attribute}=\"http"));
    assert!(!elsewhere("src") && !elsewhere("href"), "{}", page.text);
}

#[test]
fn what_is_not_there_is_an_error_object() {
    let server = serve();
    for path in ["/v1/nothing", "/v1/embeddings", "/v1/chat"] {
        assert_eq!(server.get(path).error().0, 404, "{path}");
    }
    let (get, post) = (server.get("/v1/completions"), server.post("/v1/models", &json!({})));
    assert_eq!((get.error().0, get.header("allow")), (405, Some("POST")));
    assert_eq!((post.error().0, post.header("allow")), (405, Some("GET,HEAD")));
}

#[test]
fn text_goes_to_tokens_and_back() {
    let server = serve();
    let text = "Hello, naïve 🙂";
    let tokens = server.post("/tokenize", &json!({ "prompt": text })).ok();
    assert_eq!(tokens["count"], tokens["tokens"].as_array().unwrap().len());
    assert_eq!(tokens["max_model_len"], 512);
    let back = server.post("/detokenize", &json!({ "model": MODEL, "tokens": tokens["tokens"] })).ok();
    assert_eq!(back["prompt"], text);
    let messages = json!([{ "role": "user", "content": [{ "type": "text", "text": "He" }, { "type": "text", "text": "y" }] }]);
    let chat = server.post("/tokenize", &json!({ "messages": messages, "return_token_strs": true })).ok();
    let written: String =
        chat["token_strs"].as_array().unwrap().iter().filter_map(|token| token.as_str()).collect();
    assert_eq!(written, "<s><|user|>Hey<|assistant|>");
    let open =
        server.post("/tokenize", &json!({ "messages": messages, "add_generation_prompt": false })).ok();
    assert_eq!(open["count"].as_u64().unwrap() + 1, chat["count"].as_u64().unwrap());
    for (path, body, param) in [
        ("/tokenize", json!({}), "prompt"),
        ("/tokenize", json!({ "prompt": "a", "messages": messages }), "messages"),
        ("/tokenize", json!({ "messages": [] }), "messages"),
        ("/detokenize", json!({ "tokens": [320] }), "tokens"),
        ("/detokenize", json!({ "tokens": [-1] }), "tokens"),
        ("/detokenize", json!({}), "tokens"),
    ] {
        let (status, error) = server.post(path, &body).error();
        assert_eq!((status, &error["param"]), (400, &json!(param)), "{path} {body}");
    }
}

#[test]
fn metrics_move_by_what_clients_are_told() {
    let setup = Setup::default();
    for (names, prefix) in [(MetricNames::Own, "epsmoe_"), (MetricNames::Vllm, "vllm:")] {
        let mut setup = setup.clone();
        setup.options.metric_names = names;
        let server = setup.serve();
        let value = |stem: &str, labels: &str| -> f64 {
            let text = server.get("/metrics").text;
            let name = format!("{prefix}{stem}{{model_name=\"tiny\"{labels}}} ");
            let line = text.lines().find_map(|line| line.strip_prefix(&name));
            line.unwrap_or_else(|| panic!("{name}: {text}")).parse().unwrap()
        };
        assert_eq!(value("request_success_total", ",finished_reason=\"stop\""), 0.0);
        let two = json!({ "prompt": ["Once", "Twice upon"], "n": 2, "max_tokens": 5, "ignore_eos": true });
        let usage = server.completions(two)["usage"].clone();
        assert_eq!(server.post("/v1/completions", &json!({ "prompt": [] })).status, 400);
        let stopped =
            json!({ "prompt": "Once", "max_tokens": 9, "stop_token_ids": (0..320).collect::<Vec<u32>>() });
        let more = server.completions(stopped)["usage"].clone();
        let sum = |field: &str| usage[field].as_f64().unwrap() + more[field].as_f64().unwrap();
        assert_eq!(value("prompt_tokens_total", ""), sum("prompt_tokens"));
        assert_eq!(value("generation_tokens_total", ""), sum("completion_tokens"));
        assert_eq!(value("request_success_total", ",finished_reason=\"length\""), 4.0);
        assert_eq!(value("request_success_total", ",finished_reason=\"stop\""), 1.0);
        assert_eq!(value("time_to_first_token_seconds_count", ""), 5.0);
        assert_eq!(value("request_prompt_tokens_count", ""), 3.0);
        assert_eq!(value("inter_token_latency_seconds_bucket", ",le=\"+Inf\""), 16.0);
        for gauge in ["num_requests_running", "num_requests_waiting"] {
            assert_eq!(value(gauge, ""), 0.0, "{gauge}");
        }
        for stem in [
            "kv_cache_usage_perc",
            "num_preemptions_total",
            "prefix_cache_queries_total",
            "prefix_cache_hits_total",
        ] {
            value(stem, "");
        }
    }
}

#[test]
fn keys_are_wanted_where_there_are_some() {
    let mut setup = Setup::default();
    setup.options.api_keys = vec!["first".into(), "second".into()];
    let server = setup.serve();
    let status = |header: &str, path: &str| {
        let mut stream = server.connect();
        let head = format!("GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n{header}\r\n");
        stream.write_all(head.as_bytes()).unwrap();
        let answer = read_to_end(&mut stream);
        assert!(answer.contains("200 OK") || answer.contains("\"AuthenticationError\""), "{answer}");
        answer.split(' ').nth(1).unwrap().to_owned()
    };
    for header in ["authorization: Bearer first\r\n", "authorization: Bearer second\r\n"] {
        assert_eq!(status(header, "/v1/models"), "200");
    }
    for header in [
        "",
        "authorization: Bearer firs\r\n",
        "authorization: Bearer first2\r\n",
        "authorization: first\r\n",
        "authorization: Basic first\r\n",
    ] {
        assert_eq!(status(header, "/v1/models"), "401", "{header}");
        assert_eq!(status(header, "/health"), "200", "{header}");
    }
}

#[test]
fn other_origins_ask_only_if_they_are_named() {
    let ask = |origins: &[&str], origin: &str| {
        let mut setup = Setup::default();
        setup.options.allowed_origins = origins.iter().map(|origin| (*origin).to_owned()).collect();
        setup.options.api_keys = vec!["key".into()];
        let server = setup.serve();
        let mut stream = server.connect();
        let preflight = request("OPTIONS", "/v1/chat/completions", "").replace(
            "\r\n\r\n",
            &format!(
                "\r\norigin: {origin}\r\naccess-control-request-method: POST\r\n\
                 access-control-request-headers: authorization,content-type,x-stainless-os\r\nconnection: close\r\n\r\n"
            ),
        );
        stream.write_all(preflight.as_bytes()).unwrap();
        read_to_end(&mut stream)
    };
    let named = ask(&["http://a.example"], "http://a.example");
    assert!(named.starts_with("HTTP/1.1 200"), "{named}");
    assert!(named.contains("access-control-allow-origin: http://a.example"), "{named}");
    assert!(named.contains("access-control-allow-methods: GET,POST"), "{named}");
    assert!(
        named.contains("access-control-allow-headers: authorization,content-type,x-stainless-os"),
        "{named}"
    );
    for (origins, origin) in [(&["http://a.example"][..], "http://b.example"), (&[], "http://a.example")] {
        assert!(!ask(origins, origin).contains("access-control-allow-origin"), "{origins:?} {origin}");
    }
}

/// What one key's holder asked cannot be guessed by another from how soon an answer comes.
#[test]
fn cached_prompts_are_those_of_one_key() {
    let mut setup = Setup::default();
    setup.options.api_keys = vec!["one".into(), "two".into()];
    let server = setup.serve();
    let prompt: Vec<usize> = (0..150).map(|at| 10 + at % 300).collect();
    let cached = |key: &str, salt: Option<&str>, n: usize| {
        let body = json!({ "prompt": prompt, "max_tokens": 2, "n": n, "cache_salt": salt }).to_string();
        let head = request("POST", "/v1/completions", &body);
        let head =
            head.replace("host:", &format!("connection: close\r\nauthorization: Bearer {key}\r\nhost:"));
        let mut stream = server.connect();
        stream.write_all(head.as_bytes()).unwrap();
        let answer = read_to_end(&mut stream);
        let (_, rest) = answer.split_once("\"cached_tokens\":").unwrap_or_else(|| panic!("{answer}"));
        rest[..rest.find('}').unwrap()].parse::<usize>().unwrap()
    };
    assert_eq!([cached("one", None, 1), cached("one", None, 1)], [0, 128]);
    assert_eq!([cached("two", None, 1), cached("two", None, 1)], [0, 128]);
    assert_eq!([cached("two", Some("x"), 1), cached("two", Some("x"), 1)], [0, 128]);
    // Choices of one request share what was computed of its prompt.
    let queries = server.engine.stats();
    cached("one", Some("y"), 3);
    assert_eq!(server.engine.stats().prefix_hits - queries.prefix_hits, 2 * 128);
}

#[test]
fn what_nobody_else_measures_is_told() {
    for names in [MetricNames::Own, MetricNames::Vllm] {
        let mut setup = Setup { ranks: 2, ..Setup::default() };
        setup.options.metric_names = names;
        let server = setup.serve();
        let answer = json!({ "prompt": "Once", "max_tokens": 30, "ignore_eos": true });
        // Looking has the next steps watched.
        let mut text = String::new();
        for _ in 0..4 {
            text = server.get("/metrics").text;
            server.completions(answer.clone());
        }
        for series in [
            "epsmoe_moe_stages{model_name=\"tiny\",layer=\"0\"} ",
            "epsmoe_moe_layer_seconds{model_name=\"tiny\",layer=\"0\",rank=\"1\"} ",
            "epsmoe_moe_exposed_transfer_seconds{model_name=\"tiny\",layer=\"1\",rank=\"0\"} ",
            "epsmoe_moe_idle_seconds{model_name=\"tiny\",layer=\"1\",rank=\"0\"} ",
            "epsmoe_moe_expert_tokens_total{model_name=\"tiny\",layer=\"0\",expert=\"0\"} ",
        ] {
            assert!(text.contains(series), "{series}: {text}");
        }
        let status = server.get("/status?experts=true").ok();
        let ranks = status["ranks"].as_array().unwrap();
        assert_eq!((ranks.len(), &ranks[1]["state"]), (2, &json!("ready")));
        assert!(ranks[0]["wall_us"].as_f64().unwrap() > 0.0, "{status}");
        let sum = |layer: &Value| {
            layer["tokens"].as_array().unwrap().iter().map(|it| it.as_u64().unwrap()).sum::<u64>()
        };
        let sums: Vec<u64> = status["experts"].as_array().unwrap().iter().map(sum).collect();
        // Every token goes to two experts of every layer.
        assert!(sums[0] > 0 && sums[0].is_multiple_of(2) && sums.iter().all(|&of| of == sums[0]), "{sums:?}");
    }
}
