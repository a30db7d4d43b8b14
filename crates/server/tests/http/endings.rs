//! How requests and servers end: clients that go, readers that dawdle, ranks that die, orders to stop.

use super::support::{PATIENCE, Setup, read_to_end, request, serve};
use epsmoe_base::{Fault, FaultKind, Layer, Place, Rank, Stage};
use epsmoe_server::Ended;
use serde_json::json;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

/// A model whose answers take long.
fn patient() -> Setup {
    Setup { checkpoint: "qwen3_moe_merged", max_model_len: 20_000, max_sequences: 4, ..Setup::default() }
}

#[test]
fn clients_that_go_leave_nothing_behind() {
    let server = patient().serve();
    let streams: Vec<TcpStream> = (0..3).map(|_| server.begin_stream(19_000)).collect();
    let body = json!({ "prompt": ["a", "b"], "n": 2, "max_tokens": 19_000, "ignore_eos": true });
    let mut plain = server.connect();
    plain.write_all(request("POST", "/v1/completions", &body.to_string()).as_bytes()).unwrap();
    let begun = Instant::now();
    while server.engine.stats().waiting < 3 {
        assert!(begun.elapsed() < PATIENCE, "{:?}", server.engine.stats());
        std::thread::sleep(Duration::from_millis(2));
    }
    drop((streams, plain));
    let took = server.wait_until_idle();
    assert!(took < Duration::from_secs(5), "{took:?}");
    let tokens = server.engine.stats().generation_tokens;
    std::thread::sleep(Duration::from_millis(50));
    assert_eq!(server.engine.stats().generation_tokens, tokens);
    let text = server.get("/metrics").text;
    assert!(
        text.contains("request_success_total{model_name=\"tiny\",finished_reason=\"abort\"} 7"),
        "{text}"
    );
}

#[test]
fn slow_readers_get_everything_and_hold_up_nobody() {
    let server = patient().serve();
    let mut slow = server.begin_stream(2000);
    // The others are answered while nobody reads.
    for _ in 0..3 {
        server.completions(json!({ "prompt": "a", "max_tokens": 5 }));
    }
    server.wait_until_idle();
    let mut read = String::new();
    let mut buffer = [0; 1 << 16];
    while !read.contains("[DONE]") {
        let bytes = slow.read(&mut buffer).unwrap();
        assert!(bytes > 0, "the end is missing");
        read.push_str(&String::from_utf8_lossy(&buffer[..bytes]));
    }
    assert!(read.matches("\"token_ids\":[").count() > 1900);
}

#[test]
fn a_dead_rank_is_told_to_everybody() {
    let server = Setup { ranks: 2, ..patient() }.serve();
    let mut stream = server.begin_stream(19_000);
    let place = Place::layer(Layer(1)).stage(Stage(2));
    let message = "its power went off".to_owned();
    let fault = Fault { kind: FaultKind::Panic, rank: Rank(1), place, message };
    server.faults.raise(fault);
    let told = read_to_end(&mut stream);
    let last = told.rsplit("data: ").nth(1).unwrap();
    assert!(last.contains("\"error\""), "{last}");
    for word in ["rank 1", "layer 1", "stage 2", "its power went off"] {
        assert!(last.contains(word), "{word}: {last}");
    }
    for path in ["/health", "/ready"] {
        assert_eq!(server.get(path).error().0, 503, "{path}");
    }
    let asked = json!({ "prompt": "a", "stream": true });
    let (status, error) = server.post("/v1/completions", &asked).error();
    assert!(status >= 500 && error["message"].as_str().unwrap().contains("rank 1"), "{error}");
    assert!(server.get("/v1/models").status == 200);
}

#[test]
fn what_has_begun_goes_to_its_end() {
    let server = patient().serve();
    let mut stream = server.begin_stream(1500);
    let mut idle = server.connect();
    server.stop();
    assert_eq!(read_to_end(&mut idle), "");
    let rest = read_to_end(&mut stream);
    assert!(rest.contains("\"finish_reason\":\"length\"") && rest.contains("data: [DONE]"), "{rest:.300}");
    let address = server.address.clone();
    assert_eq!(server.join(), Ended::Drained);
    assert!(TcpStream::connect(address).is_err());
}

#[test]
fn a_second_order_ends_at_once() {
    let server = patient().serve();
    let _stream = server.begin_stream(19_000);
    server.stop();
    std::thread::sleep(Duration::from_millis(20));
    server.stop();
    assert_eq!(server.join(), Ended::AtOnce);
}

#[test]
fn patience_has_an_end() {
    let mut setup = patient();
    setup.options.shutdown_timeout = Duration::from_millis(100);
    let server = setup.serve();
    let mut stream = server.begin_stream(19_000);
    server.stop();
    let rest = read_to_end(&mut stream);
    assert!(rest.contains("shutting down"), "{rest:.300}");
    assert_eq!(server.join(), Ended::Drained);
}

/// Whoever has sent half of a body holds up nobody.
#[test]
fn half_a_body_does_not_hold_up_the_end() {
    let server = patient().serve();
    let mut body = server.connect();
    body.write_all(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{").unwrap();
    // Until the server has begun to read it.
    std::thread::sleep(Duration::from_millis(200));
    let begun = Instant::now();
    server.stop();
    let answer = read_to_end(&mut body);
    assert!(answer.starts_with("HTTP/1.1 503") && answer.contains("shutting down"), "{answer}");
    assert_eq!(server.join(), Ended::Drained);
    assert!(begun.elapsed() < Duration::from_secs(20), "{:?}", begun.elapsed());
}

/// Many requests, plain and streamed, most of them waiting: whoever was let in is answered whole, or told why not.
#[test]
fn who_was_let_in_is_answered_or_told() {
    for patience in [PATIENCE, Duration::from_millis(200)] {
        let mut setup = patient();
        setup.options.shutdown_timeout = patience;
        let server = setup.serve();
        let ask = |number: usize| {
            let (length, streamed) = (400 + number, number.is_multiple_of(2));
            let body = json!({ "prompt": "a", "max_tokens": length, "ignore_eos": true, "stream": streamed,
                "stream_options": streamed.then(|| json!({ "include_usage": true })) });
            let request = request("POST", "/v1/completions", &body.to_string());
            let mut stream = server.connect();
            stream.write_all(request.replace("host:", "connection: close\r\nhost:").as_bytes()).unwrap();
            (length, streamed, stream)
        };
        let open: Vec<_> = (0..40).map(ask).collect();
        // The first may have ended before the last is let in.
        let ended = || {
            let metrics = server.get("/metrics").text;
            let counts = metrics.lines().filter(|line| line.starts_with("epsmoe_request_success_total"));
            counts.map(|line| line.rsplit(' ').next().unwrap().parse::<u64>().unwrap()).sum::<u64>()
        };
        let begun = Instant::now();
        while ended() + server.engine.stats().running + server.engine.stats().waiting < 40 {
            assert!(begun.elapsed() < PATIENCE, "{:?}", server.engine.stats());
        }
        server.stop();
        let (mut whole, mut told) = (0, 0);
        for (length, streamed, mut stream) in open {
            let answer = read_to_end(&mut stream);
            if answer.contains(&format!("\"completion_tokens\":{length}")) {
                assert!(!streamed || answer.contains("data: [DONE]"), "{answer:.300}");
                whole += 1;
            } else {
                assert!(answer.contains("the server is shutting down"), "{answer:.300}");
                assert!(streamed || answer.starts_with("HTTP/1.1 503"), "{answer:.300}");
                told += 1;
            }
        }
        assert_eq!(server.join(), Ended::Drained);
        println!("{whole} answered whole, {told} told why not");
        assert!(if patience == PATIENCE { told == 0 } else { told > 0 });
    }
}

#[test]
fn an_address_is_taken_once() {
    let server = serve();
    let (host, port) = server.address.rsplit_once(':').unwrap();
    let address = epsmoe_server::Address::Tcp { host: host.into(), port: port.parse().unwrap() };
    let Err(error) = epsmoe_server::Server::bind(&address) else { panic!("{host}:{port} was taken twice") };
    assert!(error.to_string().contains("cannot listen on"), "{error}");
}
