//! `epsmoe serve` as a process: it starts, answers, and ends when it is told to.

use super::common::{Folder, command, fixture, refused};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

const PATIENCE: Duration = Duration::from_secs(60);

struct Server {
    child: Child,
    /// What it says when it listens, and where that is.
    greeting: String,
    address: String,
}

impl Server {
    fn start(words: &str) -> Self {
        Server::spawn(command(&format!("serve {words} --max-model-len 256 --threads 1")))
    }

    fn spawn(mut command: Command) -> Self {
        let mut child = command.stderr(Stdio::piped()).stdout(Stdio::null()).spawn().unwrap();
        let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
        let greeting = lines.by_ref().map(Result::unwrap).find(|line| line.contains(" on ")).unwrap();
        let (_, rest) = greeting.split_once(" on ").unwrap();
        let address = rest.split(' ').next().unwrap().to_owned();
        // Somebody has to read what else it says.
        std::thread::spawn(move || lines.for_each(drop));
        Server { child, greeting, address }
    }

    fn signal(&self, name: &str) {
        let id = self.child.id().to_string();
        assert!(Command::new("kill").args([&format!("-{name}"), &id]).status().unwrap().success());
    }

    fn exit_code(&mut self) -> Option<i32> {
        let begun = Instant::now();
        while begun.elapsed() < PATIENCE {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status.code();
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        panic!("it does not end");
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn ask(mut stream: impl Read + Write, path: &str) -> String {
    stream.write_all(format!("GET {path} HTTP/1.0\r\n\r\n").as_bytes()).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    answer
}

fn connect(server: &Server) -> TcpStream {
    let stream = TcpStream::connect(server.address.strip_prefix("http://").unwrap()).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream
}

#[test]
fn it_answers_until_it_is_told_to_end() {
    let mut server = Server::start(&format!("{} --port 0 --served-model-name tiny", fixture("mixtral")));
    assert!(ask(connect(&server), "/health").starts_with("HTTP/1.0 200"));
    assert!(ask(connect(&server), "/v1/models").contains("\"id\":\"tiny\""));
    let port = server.address.rsplit(':').next().unwrap();
    let second = refused(&mut command(&format!("serve {} --port {port}", fixture("mixtral"))));
    assert!(second.contains("cannot listen on 127.0.0.1"), "{second}");
    let mut stream = connect(&server);
    let body = r#"{"prompt": "a", "max_tokens": 200, "ignore_eos": true, "stream": true}"#;
    let head = format!("POST /v1/completions HTTP/1.0\r\ncontent-length: {}\r\n\r\n", body.len());
    stream.write_all((head + body).as_bytes()).unwrap();
    let mut first = [0; 64];
    stream.read_exact(&mut first).unwrap();
    server.signal("TERM");
    let mut rest = String::new();
    stream.read_to_string(&mut rest).unwrap();
    assert!(rest.contains("[DONE]"), "{rest}");
    assert_eq!(server.exit_code(), Some(0));
}

#[test]
fn a_file_has_its_flags_and_a_socket_its_path() {
    let folder = Folder::new();
    let (socket, config) = (folder.text("epsmoe.sock"), folder.text("serve.yaml"));
    std::fs::write(
        &config,
        format!("model: {}\nuds: {socket}\nserved_model_name: [a, b]\n", fixture("mixtral")),
    )
    .unwrap();
    let mut server = Server::start(&format!("--config {config} --served-model-name c"));
    let stream = UnixStream::connect(&socket).unwrap();
    let models = ask(stream, "/v1/models");
    assert!(models.contains("\"id\":\"c\"") && !models.contains("\"id\":\"a\""), "{models}");
    server.signal("INT");
    assert_eq!(server.exit_code(), Some(0));
    assert!(!folder.path("epsmoe.sock").exists());
    std::fs::write(&config, "colour: red\n").unwrap();
    assert!(
        refused(&mut command(&format!("serve --config {config}"))).contains("`colour` is no flag of serve")
    );
}

/// A token takes 384 bytes of this model's cache, a block of 64 tokens 24 KiB.
#[test]
fn the_cache_is_as_large_as_the_user_says_or_memory_allows() {
    let model = fixture("mixtral");
    let asked = Server::start(&format!("{model} --port 0 --kv-cache-memory-bytes 1MiB"));
    let told = "KV cache of 2688 tokens (1008.0 KiB a rank): 10.5 sequences of 256 at once";
    assert!(asked.greeting.contains(told), "{}", asked.greeting);
    let needed = Server::start(&format!("{model} --port 0 --max-num-seqs 3"));
    assert!(needed.greeting.contains("KV cache of 768 tokens"), "{}", needed.greeting);
    let small = refused(&mut command(&format!("serve {model} --port 0 --kv-cache-memory-bytes 30KiB")));
    let told = "the KV cache would hold 64 tokens (--kv-cache-memory-bytes), but one sequence may have 4096: lower \
                --max-model-len, or raise --kv-cache-memory-bytes";
    assert_eq!(small, told);
    // The most sequences would need 100 GB; half of what this process may use is 2 GB.
    let program = env!("CARGO_BIN_EXE_epsmoe");
    let words = format!(
        "ulimit -v 4000000; exec {program} serve {model} --port 0 --max-num-seqs 65536 --gpu-memory-utilization 0.5 --threads 1"
    );
    let mut shell = Command::new("sh");
    shell.args(["-c", &words]);
    let bounded = Server::spawn(shell);
    let (_, rest) = bounded.greeting.split_once("KV cache of ").unwrap();
    let tokens: u64 = rest.split(' ').next().unwrap().parse().unwrap();
    assert!((1_000_000_000..2_048_000_000).contains(&(tokens * 384)), "{}", bounded.greeting);
    assert!(ask(connect(&bounded), "/health").starts_with("HTTP/1.0 200"));
}

#[test]
fn a_second_signal_ends_it_at_once() {
    let mut server = Server::start(&format!("{} --port 0", fixture("qwen3_moe_merged")));
    let body = r#"{"prompt": "a", "max_tokens": 250, "n": 64, "ignore_eos": true, "stream": true}"#;
    let mut streams = Vec::new();
    for _ in 0..40 {
        let mut stream = connect(&server);
        let head = format!("POST /v1/completions HTTP/1.0\r\ncontent-length: {}\r\n\r\n", body.len());
        stream.write_all((head + body).as_bytes()).unwrap();
        streams.push(stream);
    }
    streams[0].read_exact(&mut [0; 64]).unwrap();
    server.signal("TERM");
    let begun = Instant::now();
    std::thread::sleep(Duration::from_millis(100));
    assert!(server.child.try_wait().unwrap().is_none(), "it waits for its answers");
    server.signal("TERM");
    assert_eq!(server.exit_code(), Some(1));
    assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
}

/// Nobody is the worse for it when the log has no room.
#[test]
fn a_full_disk_loses_log_lines_and_nothing_else() {
    let folder = Folder::new();
    let socket = folder.text("epsmoe.sock");
    let full = || std::fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
    let mut command = command(&format!("serve {} --uds {socket} --max-model-len 256", fixture("mixtral")));
    let child = command.stdout(full()).stderr(full()).spawn().unwrap();
    let mut server = Server { child, greeting: String::new(), address: socket.clone() };
    let begun = Instant::now();
    let mut answered = 0;
    while answered < 50 {
        assert!(begun.elapsed() < PATIENCE && server.child.try_wait().unwrap().is_none());
        match UnixStream::connect(&socket) {
            Ok(stream) => {
                assert!(ask(stream, "/health").starts_with("HTTP/1.0 200"));
                answered += 1;
            }
            Err(_) => std::thread::sleep(Duration::from_millis(10)),
        }
    }
    server.signal("TERM");
    assert_eq!(server.exit_code(), Some(0));
}
