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
    /// Where it listens, as it says.
    address: String,
}

impl Server {
    fn start(words: &str) -> Self {
        let mut command = command(&format!("serve {words} --max-model-len 256 --threads 1"));
        let mut child = command.stderr(Stdio::piped()).stdout(Stdio::null()).spawn().unwrap();
        let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
        let address = lines.by_ref().map(Result::unwrap).find_map(|line| {
            let (_, rest) = line.split_once(" on ")?;
            Some(rest.split(' ').next()?.to_owned())
        });
        // Somebody has to read what else it says.
        std::thread::spawn(move || lines.for_each(drop));
        Server { child, address: address.unwrap() }
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
