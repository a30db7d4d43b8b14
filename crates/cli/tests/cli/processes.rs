//! Ranks that are processes: started by rank 0 or by a launcher, they give the bits of ranks that are threads; and
//! whatever becomes of one of them, rank 0 says it in a sentence, and nobody is left behind.

use crate::common::{Folder, command, fixture, json, refused};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

const PATIENCE: Duration = Duration::from_secs(60);

/// A port that is free now.
fn port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

/// A process as a launcher starts it.
fn launched(words: &str, rank: usize, size: usize, port: u16) -> Command {
    let mut command = command(words);
    let variables = [
        ("RANK", rank),
        ("WORLD_SIZE", size),
        ("LOCAL_WORLD_SIZE", size),
        ("MASTER_PORT", usize::from(port)),
    ];
    command.envs(variables.map(|(name, value)| (name, value.to_string())));
    command.env("MASTER_ADDR", "127.0.0.1").env("EPSMOE_SECRET", "the secret of this test");
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

fn ended(child: Child) -> (bool, String) {
    let Output { status, stderr, .. } = child.wait_with_output().unwrap();
    (status.success(), String::from_utf8(stderr).unwrap())
}

/// Processes that one has started and that are still there.
fn children(parent: u32) -> Vec<u32> {
    let all = std::fs::read_dir("/proc")
        .unwrap()
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
    let is_child = |process: &u32| {
        let Ok(stat) = std::fs::read_to_string(format!("/proc/{process}/stat")) else { return false };
        let mut fields = stat.rsplit(") ").next().unwrap().split(' ');
        let (state, of) = (fields.next().unwrap(), fields.next().unwrap());
        of == parent.to_string() && state != "Z"
    };
    all.filter(is_child).collect()
}

fn is_there(process: u32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{process}/stat"));
    stat.is_ok_and(|stat| !stat.contains(") Z "))
}

fn until(what: &str, mut done: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !done() {
        assert!(begun.elapsed() < PATIENCE, "{what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn send(signal: &str, process: u32) {
    let sent = Command::new("kill").args([signal, "--", &process.to_string()]).status().unwrap();
    assert!(sent.success(), "kill {signal}");
}

/// Logits of a fixture, as they are written to a file.
fn logits(folder: &Folder, words: &str) -> Vec<u8> {
    let out = folder.text("logits.safetensors");
    let _ = std::fs::remove_file(&out);
    let typed = format!("logits --ids 5,6,7,1,2,3,9,8,7,11 --out {out} --threads 1 {words}");
    let output = command(&typed).output().unwrap();
    assert!(output.status.success(), "{typed}: {}", String::from_utf8_lossy(&output.stderr));
    std::fs::read(out).unwrap()
}

#[test]
fn bits_are_those_of_threads() {
    let folder = Folder::new();
    for (name, flags) in [
        ("mixtral", "-dp 2 -ep --schedule serial"),
        ("deepseek_v3", "-dp 2 -ep --stages 2"),
        ("qwen3_moe", "-tp 2 --device reference"),
        ("deepseek_v2", "-dp 2 -tp 2 -ep --dtype bfloat16"),
        ("dbrx", "-dp 4 --schedule staged --dtype bfloat16"),
        ("gpt_oss", "-tp 2 -dp 2"),
    ] {
        let words = format!("--model {} {flags}", fixture(name));
        let threads = logits(&folder, &words);
        let processes = logits(&folder, &format!("{words} --distributed-executor-backend process"));
        assert!(threads == processes, "{words}: other bits");
    }
}

/// What is recorded on the others, too, comes back to rank 0.
#[test]
fn routing_is_recorded_on_all_ranks() {
    let folder = Folder::new();
    let log = |name: &str, more: &str| {
        let file = folder.text(name);
        let words = format!("--model {} -dp 2 -ep --routing-record {file} {more}", fixture("mixtral"));
        logits(&folder, &words);
        std::fs::read_to_string(file).unwrap()
    };
    let threads = log("threads", "");
    assert!(!threads.is_empty());
    assert_eq!(threads, log("processes", "--distributed-executor-backend process"));
}

#[test]
fn launchers_start_workers_or_the_same_command_everywhere() {
    let folder = Folder::new();
    let out = folder.text("out");
    let words =
        format!("logits --model {} --ids 5,6,7 --out {out} -dp 2 -ep --threads 1", fixture("mixtral"));
    let want = command(&words).output().map(|_| std::fs::read(&out).unwrap()).unwrap();
    for other in ["worker", &*words] {
        let port = port();
        std::fs::remove_file(&out).unwrap();
        let worker = launched(other, 1, 2, port).spawn().unwrap();
        let first = launched(&words, 0, 2, port).spawn().unwrap();
        let (first, worker) = (ended(first), ended(worker));
        assert!(first.0 && worker.0, "{first:?} {worker:?}");
        assert_eq!(worker.1, "");
        assert_eq!(std::fs::read(&out).unwrap(), want, "{other}");
    }
}

/// One that comes when the others have waited, beside one that is there already.
#[test]
fn ranks_that_start_late_or_twice() {
    let folder = Folder::new();
    let (out, port) = (folder.text("out"), port());
    let words =
        format!("logits --model {} --ids 5,6,7 --out {out} -dp 3 -ep --threads 1", fixture("mixtral"));
    let want = command(&words).output().map(|_| std::fs::read(&out).unwrap()).unwrap();
    std::fs::remove_file(&out).unwrap();
    let first = launched(&words, 0, 3, port).spawn().unwrap();
    let early = launched("worker", 1, 3, port).spawn().unwrap();
    std::thread::sleep(Duration::from_secs(2));
    let told = refused(&mut launched("worker", 1, 3, port));
    assert!(told.contains("rank 1 is there already: rank 1 (process "), "{told}");
    let late = launched("worker", 2, 3, port).spawn().unwrap();
    let all = [first, early, late].map(ended);
    assert!(all.iter().all(|(fine, _)| *fine), "{all:?}");
    assert_eq!(std::fs::read(&out).unwrap(), want);
}

/// Both models of a comparison, each over processes of its own.
#[test]
fn two_models_are_compared() {
    let folder = Folder::new();
    let text = folder.text("text");
    std::fs::write(&text, "What one model says of a text, and another. ".repeat(20)).unwrap();
    let words = format!(
        "eval perplexity {text} --model {} --reference {} --context 32 --chunks 3 --json -dp 2 -ep --threads 1",
        fixture("qwen3_moe_mxfp4"),
        fixture("qwen3_moe"),
    );
    let threads = json(&mut command(&words));
    assert!(threads["reference"]["kl_divergence"].as_f64() > Some(0.0), "{threads}");
    let processes = format!("{words} --distributed-executor-backend process");
    assert_eq!(json(&mut command(&processes)), threads);
    let told = refused(&mut launched(&words, 0, 2, port()));
    assert!(told.starts_with("processes that torchrun starts have one model"), "{told}");
}

/// A worker whose machine has no room for its part says so, with its name and both sizes, before anybody loads.
#[test]
fn a_machine_with_too_little_memory_is_named() {
    let words = "logits --model preset:mixtral-mini --ids 5,6,7 --out none -dp 2 -ep --threads 1 --hf-overrides \
                 {\"hidden_size\":2048,\"intermediate_size\":4096}";
    let port = port();
    let first = launched(words, 0, 2, port).spawn().unwrap();
    let mut worker = Command::new("sh");
    worker.args(["-c", "ulimit -v 1500000 && exec \"$0\" worker", env!("CARGO_BIN_EXE_epsmoe")]);
    for (name, value) in launched("worker", 1, 2, port).get_envs() {
        match value {
            Some(value) => worker.env(name, value),
            None => worker.env_remove(name),
        };
    }
    let worker = worker.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let process = worker.id();
    let ((first, told), (worker, heard)) = (ended(first), ended(worker));
    assert!(!first && !worker, "{told} {heard}");
    let name = format!("rank 1 (process {process} on ");
    assert!(told.contains(&name) && told.contains("needs ") && told.contains("GiB"), "{told}");
    assert!(told.contains("but the limit of this process (ulimit) has "), "{told}");
    assert_eq!(told.lines().count(), 1, "{told}");
}

#[test]
fn ranks_that_differ_are_refused() {
    let words =
        format!("logits --model {} --ids 5,6,7 --out none -dp 2 -ep --timeout 20", fixture("mixtral"));
    let start = |other: &str| {
        let port = port();
        let worker = launched(other, 1, 2, port).spawn().unwrap();
        let first = launched(&words, 0, 2, port).spawn().unwrap();
        let ((first, told), (worker, heard)) = (ended(first), ended(worker));
        assert!(!first && !worker, "{told} {heard}");
        assert_eq!(told.lines().count(), 1, "{told}");
        (told, heard)
    };
    let (told, heard) = start(&words.replace("5,6,7", "5").replace("-ep", "-ep --seed 4"));
    assert!(told.contains("rank 1 (process ") && told.contains("was started with other flags"), "{told}");
    assert_eq!(told, heard);
    let (told, heard) = start(&format!("worker --model {}", fixture("qwen3_moe")));
    assert!(told.contains("rank 1 (process ") && told.contains("has another checkpoint at"), "{told}");
    assert_eq!(heard, "");
    let (told, _) = start("worker --model ./nowhere");
    assert!(told.contains("rank 1") && told.contains("there is no folder ./nowhere"), "{told}");
    // Equal but for a few weights.
    let spoilt = Folder::copy_of("mixtral");
    let weights = spoilt.path("model-00003-of-00009.safetensors");
    let mut bytes = std::fs::read(&weights).unwrap();
    let end = bytes.len();
    bytes[end - end / 16..].iter_mut().for_each(|byte| *byte ^= 1);
    std::fs::write(&weights, bytes).unwrap();
    let (told, _) = start(&format!("worker --model {}", spoilt.0.path().display()));
    assert!(told.contains("has another checkpoint at"), "{told}");
}

#[test]
fn what_makes_no_world_is_refused() {
    let words = format!("logits --model {} --ids 5,6,7 --out none -dp 2 -ep", fixture("mixtral"));
    let told = refused(&mut launched(&words, 0, 4, 1));
    assert!(told.starts_with("torchrun started 4 processes, but --data-parallel-size 2"), "{told}");
    let told = refused(launched(&words, 0, 2, 1).env_remove("EPSMOE_SECRET"));
    assert!(told.contains("export EPSMOE_SECRET"), "{told}");
    let told = refused(launched(&words, 0, 2, 1).env("EPSMOE_SECRET", "x"));
    assert!(told.contains("fewer than 8 characters"), "{told}");
    let told = refused(&mut command("worker"));
    assert!(told.starts_with("a worker is one rank of several"), "{told}");
    let told = refused(&mut launched(&format!("{words} --timeout 0.3"), 0, 2, port()));
    assert!(told.contains("rank 1 did not come to 127.0.0.1"), "{told}");
    let told = refused(&mut launched("worker --timeout 0.3", 1, 2, port()));
    assert!(told.contains("rank 1 cannot join rank 0 at 127.0.0.1"), "{told}");
}

/// A long generation over three processes, and those that rank 0 has started.
fn generating(more: &str) -> (Child, Vec<u32>) {
    let words = format!(
        "generate --model {} --prompt Hi --ignore-eos --max-tokens -1 -dp 3 -ep --threads 1 --link 1MB/s,3ms \
         --distributed-executor-backend process {more}",
        fixture("mixtral")
    );
    let mut command = command(&words);
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    child.stdout.as_mut().unwrap().read_exact(&mut [0; 8]).unwrap();
    let workers = children(child.id());
    assert_eq!(workers.len(), 2);
    (child, workers)
}

/// All processes are gone, and rank 0 said why.
fn stopped(child: Child, workers: &[u32]) -> String {
    let (fine, told) = ended(child);
    assert!(!fine, "{told}");
    until("a worker is left behind", || !workers.iter().any(|&worker| is_there(worker)));
    told
}

#[test]
fn a_rank_that_is_killed_is_named() {
    let (child, workers) = generating("");
    let begun = Instant::now();
    send("-KILL", workers[1]);
    let told = stopped(child, &workers);
    let words = format!("(process {} on ", workers[1]);
    assert!(told.contains(&words) && told.contains("has ended: its connection is closed"), "{told}");
    assert_eq!(told.lines().count(), 1, "{told}");
    assert!(begun.elapsed() < Duration::from_secs(10), "{:?}", begun.elapsed());
}

#[test]
fn a_rank_that_is_stopped_is_named() {
    let (child, workers) = generating("--timeout 2");
    let begun = Instant::now();
    send("-STOP", workers[0]);
    let told = stopped(child, &workers);
    assert!(told.contains(&format!("(process {} on ", workers[0])) && told.contains("did not"), "{told}");
    assert_eq!(told.lines().count(), 1, "{told}");
    // Twice the deadline, and what this machine adds.
    assert!(begun.elapsed() < Duration::from_secs(2 * 2 + 4), "{:?}", begun.elapsed());
}

#[test]
fn signals_to_rank_0_end_all() {
    for signal in ["-TERM", "-INT", "-KILL"] {
        let (child, workers) = generating("");
        send(signal, child.id());
        stopped(child, &workers);
    }
}

/// What Ctrl-C and Ctrl-Z do reaches all processes of a terminal's job at once.
#[test]
fn a_stopped_job_goes_on() {
    use std::os::unix::process::CommandExt;
    let words = format!(
        "generate --model {} --prompt Hi --ignore-eos --max-tokens 60 -dp 2 -ep --link 1GB/s,5ms --timeout 3 \
         --distributed-executor-backend process --threads 1",
        fixture("mixtral")
    );
    let mut command = command(&words);
    let mut child = command.process_group(0).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    child.stdout.as_mut().unwrap().read_exact(&mut [0; 8]).unwrap();
    let job = |signal: &str| {
        let group = format!("-{}", child.id());
        assert!(Command::new("kill").args([signal, "--", &group]).status().unwrap().success());
    };
    job("-STOP");
    std::thread::sleep(Duration::from_secs(5));
    job("-CONT");
    let (fine, told) = ended(child);
    assert!(fine, "{told}");
}

fn ask(address: &str, path: &str) -> String {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.write_all(format!("GET {path} HTTP/1.0\r\n\r\n").as_bytes()).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    answer
}

/// A server over two processes: its address, and the other process.
fn serving(more: &str) -> (Child, String, u32) {
    let words = format!(
        "serve {} --port 0 --max-model-len 256 -dp 2 -ep --threads 1 --distributed-executor-backend process {more}",
        fixture("mixtral")
    );
    let mut child = command(&words).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
    let greeting = lines.by_ref().map(Result::unwrap).find(|line| line.contains(" on http")).unwrap();
    std::thread::spawn(move || lines.for_each(drop));
    let address = greeting.split_once("http://").unwrap().1.split(' ').next().unwrap().to_owned();
    assert!(greeting.contains("2 processes over TCP"), "{greeting}");
    let workers = children(child.id());
    (child, address, workers[0])
}

#[test]
fn a_server_says_that_a_rank_has_gone() {
    let (mut child, address, worker) = serving("");
    assert!(ask(&address, "/ready").starts_with("HTTP/1.0 200"));
    let mut stream = TcpStream::connect(&address).unwrap();
    let body = r#"{"prompt": "a", "max_tokens": 250, "ignore_eos": true, "stream": true, "n": 32}"#;
    let head = format!("POST /v1/completions HTTP/1.0\r\ncontent-length: {}\r\n\r\n", body.len());
    stream.write_all((head + body).as_bytes()).unwrap();
    stream.read_exact(&mut [0; 64]).unwrap();
    send("-KILL", worker);
    let mut rest = String::new();
    stream.read_to_string(&mut rest).unwrap();
    let name = format!("rank 1 (process {worker} on ");
    assert!(rest.contains("\"error\"") && rest.contains(&name), "{rest}");
    let ready = ask(&address, "/ready");
    assert!(ready.starts_with("HTTP/1.0 503") && ready.contains(&name), "{ready}");
    send("-TERM", child.id());
    assert_eq!(child.wait().unwrap().code(), Some(1));
}

/// Nobody asks for anything when it happens.
#[test]
fn an_idle_server_notices_too() {
    let (mut child, address, worker) = serving("--timeout 1");
    send("-STOP", worker);
    until("the server does not notice", || ask(&address, "/ready").starts_with("HTTP/1.0 503"));
    let ready = ask(&address, "/ready");
    assert!(ready.contains(&format!("nothing was heard of rank 1 (process {worker} on ")), "{ready}");
    send("-TERM", child.id());
    assert_eq!(child.wait().unwrap().code(), Some(1));
    until("the worker is left behind", || !is_there(worker));
}

/// Two machines that are namespaces of this one's network, as `bench/cluster.sh` makes them; nothing where that cannot be.
struct Machines;

impl Machines {
    fn two() -> Option<Self> {
        let up = Machines::script(&["up", "2"]).output().unwrap();
        if up.status.success() {
            return Some(Machines);
        }
        // Whoever has them now keeps them.
        eprintln!("skipped: {}", String::from_utf8_lossy(&up.stderr));
        None
    }

    fn script(words: &[&str]) -> Command {
        let mut script = Command::new(Path::new(env!("CARGO_MANIFEST_DIR")).join("../../bench/cluster.sh"));
        script.args(words);
        script
    }

    /// A process on one of them, as a launcher starts it.
    fn start(rank: usize, words: &str) -> Child {
        let mut script = Machines::script(&["on", &rank.to_string(), env!("CARGO_BIN_EXE_epsmoe")]);
        script.args(words.split_whitespace());
        script.envs([("RANK", &*rank.to_string()), ("WORLD_SIZE", "2"), ("LOCAL_WORLD_SIZE", "1")]);
        script.envs([("MASTER_ADDR", "10.77.0.1"), ("EPSMOE_SECRET", "the secret of this test")]);
        script.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
    }
}

impl Drop for Machines {
    fn drop(&mut self) {
        let _ = Machines::script(&["down", "2"]).output();
    }
}

/// Nothing closes, and nobody is dead: each side finds that the other is not to be heard, and ends.
#[test]
fn a_cut_link_is_noticed_on_both_sides() {
    let Some(_machines) = Machines::two() else { return };
    let worker = Machines::start(1, "worker");
    let words = format!(
        "generate --model {} --ids 5,6 --ignore-eos --max-tokens -1 -dp 2 -ep --threads 1 --link 1MB/s,3ms --timeout 2",
        fixture("mixtral")
    );
    let first = Machines::start(0, &words);
    std::thread::sleep(Duration::from_secs(1));
    let begun = Instant::now();
    assert!(Machines::script(&["cut", "1"]).status().unwrap().success());
    let ((first, told), (worker, heard)) = (ended(first), ended(worker));
    assert!(!first && !worker, "{told} {heard}");
    assert!(told.contains("rank 1 (process ") && told.contains(" on ep1)"), "{told}");
    assert!(heard.contains("rank 0 (process ") && heard.contains(" on ep0)"), "{heard}");
    assert!(begun.elapsed() < Duration::from_secs(2 * 2 + 6), "{:?}", begun.elapsed());
}

/// A file system that is full; nothing where none can be made.
struct FullDisk(Folder);

impl FullDisk {
    /// A copy of a model that its disk had no more room for is on it.
    fn with_copy_of(model: &str) -> Option<Self> {
        let disk = Folder::new();
        let mut mount = Command::new("mount");
        mount.args(["-t", "tmpfs", "-o", "size=512k", "none"]).arg(disk.0.path());
        if !mount.status().is_ok_and(|status| status.success()) {
            eprintln!("skipped: no file system can be mounted");
            return None;
        }
        let disk = FullDisk(disk);
        let copied =
            Command::new("cp").args(["-r", &fixture(model), &disk.0.text("model")]).output().unwrap();
        assert!(!copied.status.success(), "the disk was large enough");
        Some(disk)
    }
}

impl Drop for FullDisk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(self.0.0.path()).status();
    }
}

/// A worker writes nothing that it needs; a copy of the checkpoint that is not whole is named; and where rank 0 cannot write
/// its answer, everybody ends.
#[test]
fn a_disk_that_is_full() {
    let Some(disk) = FullDisk::with_copy_of("mixtral") else { return };
    let folder = Folder::new();
    let out = folder.text("out");
    let words = |out: &str| {
        format!(
            "logits --model {} --ids 5,6,7 --out {out} -dp 2 -ep --threads 1 --timeout 20",
            fixture("mixtral")
        )
    };
    let start = |words: &str, worker: &str| {
        let port = port();
        let log = std::fs::File::create(disk.0.path("log")).unwrap();
        let mut worker = launched(worker, 1, 2, port);
        worker.current_dir(disk.0.0.path()).stderr(log);
        worker.envs(["HOME", "TMPDIR", "XDG_CACHE_HOME"].map(|name| (name, disk.0.0.path())));
        let worker = worker.spawn().unwrap();
        let first = launched(words, 0, 2, port).spawn().unwrap();
        (ended(first), ended(worker).0)
    };
    let ((fine, told), worker) = start(&words(&out), "worker");
    assert!(fine && worker, "{told}");
    let ((fine, told), worker) = start(&words(&out), &format!("worker --model {}", disk.0.text("model")));
    assert!(!fine && !worker && told.contains("rank 1") && told.contains(&disk.0.text("model")), "{told}");
    // It looks for the place before it looks for others.
    let ((fine, told), _) = start(&words(&disk.0.text("out")), "worker --timeout 2");
    assert!(!fine && told.contains("cannot write ") && told.contains("No space left"), "{told}");
    assert_eq!(told.lines().count(), 1, "{told}");
}

/// The secret stands in no command line.
#[test]
fn nobody_sees_the_secret() {
    let (mut child, workers) = generating("");
    for worker in &workers {
        let read = |name| std::fs::read(Path::new("/proc").join(worker.to_string()).join(name)).unwrap();
        let environment = String::from_utf8(read("environ")).unwrap();
        let secret = environment.split('\0').find_map(|it| it.strip_prefix("EPSMOE_SECRET=")).unwrap();
        assert!(!String::from_utf8(read("cmdline")).unwrap().contains(secret));
    }
    child.kill().unwrap();
    stopped(child, &workers);
}

/// Every checkpoint over MPI: on two ranks and on four, with strategies and schedules in turn.
#[cfg(feature = "mpi")]
#[test]
fn mpi_gives_the_bits_of_threads() {
    let by_default = match command("doctor").output() {
        Ok(told) if String::from_utf8_lossy(&told.stdout).contains("Open MPI") => {
            "mpirun --allow-run-as-root --oversubscribe --bind-to none"
        }
        _ => "mpirun",
    };
    let typed = epsmoe_base::env::text("EPSMOE_TEST_MPIRUN").unwrap_or(by_default.into());
    let folder = Folder::new();
    let fixtures = std::fs::read_dir(fixture(".")).unwrap().map(|entry| entry.unwrap().path());
    let mut fixtures: Vec<_> = fixtures.filter(|path| path.join("config.json").exists()).collect();
    fixtures.sort();
    assert!(fixtures.len() > 20);
    let strategies =
        ["-dp 2 -ep", "-dp 4", "-tp 2 -ep", "-dp 2 -tp 2 -ep", "-tp 2", "-dp 4 -ep", "-dp 2", "-dp 2 -tp 2"];
    for (number, path) in fixtures.iter().enumerate() {
        for turn in [2 * number, 2 * number + 1] {
            let strategy = strategies[turn % strategies.len()];
            let schedule = ["serial", "staged", "auto"][turn % 3];
            let words =
                format!("--model {} {strategy} --schedule {schedule} --dtype bfloat16", path.display());
            let threads = logits(&folder, &words);
            let ranks = if strategy.contains('4') || strategy.matches('2').count() > 1 { "4" } else { "2" };
            let out = folder.text("logits.safetensors");
            std::fs::remove_file(&out).unwrap();
            let started = format!(
                "logits --ids 5,6,7,1,2,3,9,8,7,11 --out {out} --threads 1 --fabric mpi --master-port {} {words}",
                port()
            );
            let mut mpirun = typed.split_whitespace();
            let mut command = Command::new(mpirun.next().unwrap());
            command
                .args(mpirun)
                .args(["-np", ranks, env!("CARGO_BIN_EXE_epsmoe")])
                .args(started.split_whitespace());
            let output = command.env("EPSMOE_SECRET", "the secret of this test").output().unwrap();
            let told = String::from_utf8_lossy(&output.stderr).into_owned();
            assert!(output.status.success(), "{words}: {told}");
            assert!(threads == std::fs::read(&out).unwrap(), "{words}: other bits over MPI");
        }
    }
}
