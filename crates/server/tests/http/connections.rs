//! Connections: polite, old, slow, rude.

use super::support::{PATIENCE, Setup, read_to_end, request, serve};
use serde_json::json;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::Shutdown;
use std::time::{Duration, Instant};

#[test]
fn pipelined_requests_are_answered_in_order() {
    let server = serve();
    let mut stream = server.connect();
    let ask = |length: usize| {
        let body = json!({ "prompt": "a", "max_tokens": length, "ignore_eos": true });
        request("POST", "/v1/completions", &body.to_string())
    };
    let last = ask(1).replace("host:", "connection: close\r\nhost:");
    stream.write_all([ask(3), ask(2), last].concat().as_bytes()).unwrap();
    let answers = read_to_end(&mut stream);
    let counts = answers.split("\"completion_tokens\":").skip(1).map(|rest| rest[..1].to_owned());
    assert_eq!(counts.collect::<Vec<_>>(), ["3", "2", "1"], "{answers}");
}

#[test]
fn old_clients_get_a_plain_body_and_the_end() {
    let server = serve();
    for stream_wanted in [false, true] {
        let body = json!({ "prompt": "a", "max_tokens": 3, "stream": stream_wanted }).to_string();
        let head = format!("POST /v1/completions HTTP/1.0\r\ncontent-length: {}\r\n\r\n{body}", body.len());
        let mut stream = server.connect();
        stream.write_all(head.as_bytes()).unwrap();
        let answer = read_to_end(&mut stream);
        assert!(answer.starts_with("HTTP/1.0 200") && !answer.contains("transfer-encoding"), "{answer}");
    }
}

#[test]
fn requests_have_an_id() {
    let server = serve();
    let ask = |id: &str, path: &str| {
        let mut stream = server.connect();
        let head = format!("GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n{id}\r\n");
        stream.write_all(head.as_bytes()).unwrap();
        let answer = read_to_end(&mut stream);
        answer.lines().find_map(|line| line.strip_prefix("x-request-id: ")).unwrap().to_owned()
    };
    assert_eq!(ask("x-request-id: mine\r\n", "/v1/models"), "mine");
    assert_eq!(ask("x-request-id: mine\r\n", "/nowhere"), "mine");
    assert_ne!(ask("", "/version"), ask("", "/version"));
}

#[test]
fn heads_are_bounded() {
    let server = serve();
    let big = "x".repeat(1 << 20);
    for head in [
        format!("GET /health HTTP/1.1\r\nhost: x\r\nbig: {big}\r\n\r\n"),
        format!("GET /{} HTTP/1.1\r\nhost: x\r\n\r\n", &big[..100_000]),
        format!("GET /health HTTP/1.1\r\nhost: x\r\n{}\r\n", "a: b\r\n".repeat(5000)),
    ] {
        let mut stream = server.connect();
        // The server may close before all is written.
        let _ = stream.write_all(head.as_bytes());
        let answer = read_to_end(&mut stream);
        let status = answer.split(' ').nth(1).unwrap_or("closed");
        assert!(["400", "413", "414", "431", "closed"].contains(&status), "{answer:.100}");
    }
    assert_eq!(server.get("/health").status, 200);
}

#[test]
fn noise_is_no_request() {
    let server = serve();
    let hello = [0x16, 3, 1, 2, 0, 1, 0, 1, 0xfc, 3, 3, 7, 7];
    for noise in [&hello[..], b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"\0\0\0\0\r\n\r\n", b"hello\r\n\r\n"] {
        let mut stream = server.connect();
        stream.write_all(noise).unwrap();
        stream.shutdown(Shutdown::Write).unwrap();
        let answer = read_to_end(&mut stream);
        assert!(answer.is_empty() || answer.starts_with("HTTP/1.1 4"), "{answer}");
    }
    assert_eq!(server.get("/health").status, 200);
}

#[test]
fn bodies_are_bounded_before_they_are_read() {
    let mut setup = Setup::default();
    setup.options.limits.body_bytes = 1000;
    let server = setup.serve();
    let mut stream = server.connect();
    stream
        .write_all(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 99999999999\r\n\r\n{")
        .unwrap();
    let mut first = String::new();
    BufReader::new(stream.try_clone().unwrap()).read_line(&mut first).unwrap();
    assert!(first.starts_with("HTTP/1.1 413"), "{first}");
    // Who sends on regardless is cut off.
    let sent = (0..100_000).take_while(|_| stream.write_all(&[b'x'; 4096]).is_ok()).count();
    assert!(sent < 100_000);
    let long = json!({ "prompt": "x".repeat(2000) });
    assert_eq!(server.post("/v1/completions", &long).error().0, 413);
    let mut chunked = server.connect();
    chunked
        .write_all(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n")
        .unwrap();
    let chunk = format!("400\r\n{}\r\n", "x".repeat(0x400));
    let _ = (0..8).try_for_each(|_| chunked.write_all(chunk.as_bytes()));
    let mut answer = [0; 12];
    chunked.read_exact(&mut answer).unwrap();
    assert_eq!(&answer, b"HTTP/1.1 413");
}

#[test]
fn slow_heads_and_bodies_are_given_up() {
    let mut setup = Setup::default();
    setup.options.limits.header_timeout = Duration::from_millis(300);
    setup.options.limits.body_timeout = Duration::from_millis(300);
    let server = setup.serve();
    let mut head = server.connect();
    head.write_all(b"GET /health HTTP/1.1\r\nhost: x\r\n").unwrap();
    let mut body = server.connect();
    body.write_all(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{").unwrap();
    let mut idle = server.connect();
    let begun = Instant::now();
    read_to_end(&mut head);
    read_to_end(&mut idle);
    let answer = read_to_end(&mut body);
    assert!(answer.starts_with("HTTP/1.1 408") && answer.contains("\"error\""), "{answer}");
    assert!(begun.elapsed() < Duration::from_secs(10), "{:?}", begun.elapsed());
}

#[test]
fn idle_and_trickling_connections_hold_up_nobody() {
    let server = serve();
    let open_files = || std::fs::read_dir("/proc/self/fd").unwrap().count();
    let before = open_files();
    let idle: Vec<_> = (0..1000).map(|_| server.connect()).collect();
    let mut trickling: Vec<_> = (0..100).map(|_| server.connect()).collect();
    for _ in 0..3 {
        trickling.iter_mut().for_each(|stream| stream.write_all(b"a").unwrap());
        let begun = Instant::now();
        server.completions(json!({ "prompt": "a", "max_tokens": 3 }));
        assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
    }
    drop((idle, trickling));
    // Both ends of each connection were of this process; other tests have some of their own.
    let begun = Instant::now();
    while open_files() > before + 1000 {
        assert!(begun.elapsed() < PATIENCE, "{} descriptors, {before} before", open_files());
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn who_never_reads_is_cut_off() {
    let mut setup = Setup { checkpoint: "qwen3_moe_merged", max_model_len: 20_000, ..Setup::default() };
    setup.options.limits.write_timeout = Duration::from_millis(300);
    let server = setup.serve();
    // More than fits into the buffers between the two.
    let body =
        json!({ "prompt": "Once", "max_tokens": 19_000, "ignore_eos": true, "stream": true, "logprobs": 5 });
    let mut stream = server.connect();
    stream.write_all(request("POST", "/v1/completions", &body.to_string()).as_bytes()).unwrap();
    let begun = Instant::now();
    while server.engine.stats().running == 0 {
        assert!(begun.elapsed() < PATIENCE);
        std::thread::sleep(Duration::from_millis(2));
    }
    server.wait_until_idle();
    let told = read_to_end(&mut stream);
    assert!(told.starts_with("HTTP/1.1 200") && !told.contains("[DONE]"), "{}", told.len());
    assert!(server.engine.stats().generation_tokens < 19_000);
    assert_eq!(server.engine.stats().kv_blocks_used, 0);
}

#[test]
fn half_closed_clients_do_not_hang() {
    let server = serve();
    for stream_wanted in [false, true] {
        let body = json!({ "prompt": "a", "max_tokens": 50, "ignore_eos": true, "stream": stream_wanted })
            .to_string();
        let mut stream = server.connect();
        stream.write_all(request("POST", "/v1/completions", &body).as_bytes()).unwrap();
        stream.shutdown(Shutdown::Write).unwrap();
        let answer = read_to_end(&mut stream);
        assert!(answer.is_empty() || answer.starts_with("HTTP/1.1 200"), "{answer}");
    }
    server.wait_until_idle();
}
