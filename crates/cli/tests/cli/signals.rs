//! Signals: what a command does when it is told to end, or to wait.

use crate::common::{Folder, command, fixture};
use std::io::Read;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// Starts a command whose caches and temporary files are in a folder of their own.
fn started(typed: &str, folder: &Folder) -> Child {
    let mut command = command(typed);
    for name in ["HOME", "XDG_CACHE_HOME", "TMPDIR"] {
        command.env(name, folder.0.path());
    }
    command.current_dir(folder.0.path()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command.spawn().unwrap()
}

fn send(signal: &str, child: &Child) {
    let sent = Command::new("kill").args([signal, &child.id().to_string()]).status().unwrap();
    assert!(sent.success(), "kill {signal}");
}

/// Waits until the command has shown some bytes.
fn shown(child: &mut Child) {
    child.stdout.as_mut().unwrap().read_exact(&mut [0; 8]).unwrap();
}

/// Files in a folder and below.
fn files(folder: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    let each =
        entries.flat_map(|path| if path.is_dir() { files(&path) } else { vec![path.display().to_string()] });
    each.collect()
}

/// How a command ends on a signal, and what it leaves behind: nothing.
fn ends(typed: &str, signal: &str, number: i32, begun: impl FnOnce(&mut Child)) {
    let folder = Folder::new();
    let mut child = started(typed, &folder);
    begun(&mut child);
    send(signal, &child);
    let asked = Instant::now();
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.signal(), Some(number), "{typed}: {output:?}");
    assert!(asked.elapsed() < Duration::from_secs(5), "{typed}: {:?}", asked.elapsed());
    assert_eq!(files(folder.0.path()), Vec::<String>::new(), "{typed}");
}

/// Time for a command to be in the middle of its work.
fn a_moment(child: &mut Child) {
    std::thread::sleep(Duration::from_millis(700));
    assert!(child.try_wait().unwrap().is_none(), "it ended by itself");
}

#[test]
fn commands_end_at_once() {
    let generate = format!(
        "generate --model {} --prompt Hi --ignore-eos --max-tokens -1 -dp 2 -ep --link 1MB/s,5ms",
        fixture("mixtral")
    );
    ends(&generate, "-INT", 2, shown);
    ends(&generate, "-TERM", 15, shown);
    let bench = "bench --model preset:mixtral-mini --num-iters 10000 --json out.json --report out.html";
    ends(bench, "-INT", 2, a_moment);
    ends(bench, "-TERM", 15, a_moment);
    ends("profile --threads 1 --json out.json", "-INT", 2, a_moment);
    ends("profile --threads 1 --out profile.toml", "-TERM", 15, a_moment);
}

/// Longer stopped than ranks may wait for each other.
#[test]
fn a_stopped_command_goes_on() {
    let folder = Folder::new();
    let typed = format!(
        "generate --model {} --prompt Hi --ignore-eos --max-tokens 60 -dp 2 -ep --link 1GB/s,5ms --timeout 5",
        fixture("mixtral")
    );
    let mut child = started(&typed, &folder);
    shown(&mut child);
    send("-STOP", &child);
    std::thread::sleep(Duration::from_secs(7));
    send("-CONT", &child);
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{output:?}");
}
