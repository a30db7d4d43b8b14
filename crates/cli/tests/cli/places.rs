//! Files that are written and kept: nothing half-made is left, what was begun can be gone on with, and a damaged cache
//! is only slow.

use crate::common::{Folder, command, fixture, printed, refused};
use epsmoe_base::DType;
use epsmoe_device::cpu::gemm::Isa;
use epsmoe_profile::{Fingerprint, default_path};
use std::path::Path;
use std::process::Command;

#[track_caller]
fn contains(message: &str, words: &str) {
    assert!(message.contains(words), "`{words}` is not in `{message}`");
}

/// Names in a folder, in order.
fn names(folder: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(folder).unwrap();
    let mut names: Vec<String> =
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn a_cached_profile_that_cannot_be_used_is_passed_over() {
    let cache = Folder::new();
    let file = default_path(&Fingerprint::of_cpu(2, 1, Isa::Scalar, DType::F32));
    let profiles = cache.path("epsmoe/profiles");
    let file = profiles.join(file.file_name().unwrap());
    std::fs::create_dir_all(&profiles).unwrap();
    let typed = format!(
        "generate --model {} --ids 5,6,7 --max-tokens 3 -dp 2 -ep --threads 1 --isa scalar",
        fixture("mixtral")
    );
    let run = || {
        let output = command(&typed).env("XDG_CACHE_HOME", cache.0.path()).output().unwrap();
        let told = String::from_utf8(output.stderr).unwrap();
        assert!(output.status.success(), "{told}");
        (
            output.stdout,
            told.lines().filter(|line| line.starts_with("warning: ")).collect::<Vec<_>>().join("\n"),
        )
    };
    let (plain, warned) = run();
    assert_eq!(warned, "");
    let check = |words: &str| {
        let (ids, warned) = run();
        assert_eq!(ids, plain);
        assert_eq!(warned.lines().count(), 1, "{warned}");
        contains(&warned, words);
        contains(&warned, "it is ignored, and the auto schedule begins with round figures");
        std::fs::remove_file(&file).unwrap();
    };
    std::fs::write(&file, "version = 1").unwrap();
    check("the cost model has version 1");
    std::fs::write(&file, [0xff; 100]).unwrap();
    check("this is not UTF-8 text");
    std::fs::write(&file, vec![b' '; 2 << 20]).unwrap();
    check("2097152 bytes are more than such a file may have");
    std::os::unix::fs::symlink("/dev/zero", &file).unwrap();
    check("this is not a plain file");
    assert!(Command::new("mkfifo").arg(&file).status().unwrap().success());
    check("this is not a plain file");
    // One that was asked for must be good.
    std::fs::write(&file, "version = 1").unwrap();
    let message = refused(&mut command(&format!("{typed} --profile {}", file.display())));
    contains(&message, "the cost model has version 1");
}

#[test]
fn places_are_looked_at_before_anything_is_computed() {
    let folder = Folder::new();
    let model = fixture("mixtral");
    let long = folder.text(&"n".repeat(256));
    let record = |file: &str| {
        refused(&mut command(&format!("generate --model {model} --ids 5 --routing-record {file}")))
    };
    contains(&record("/nowhere/x"), "cannot write /nowhere/x: No such file or directory");
    contains(&record(&long), "File name too long");
    contains(&record("/proc/x"), "cannot write /proc/x: ");
    contains(&record(&folder.text("")), "is a directory");
    let profile = |flags: &str| refused(&mut command(&format!("profile --threads 1 {flags}")));
    contains(&profile(&format!("--out {long}")), "File name too long");
    contains(&profile("--out /proc/x/y"), "cannot write the profile /proc/x/y: ");
    contains(&profile("--json /nowhere/x"), "cannot write /nowhere/x: ");
    let mut unwritable = command("profile --threads 1");
    unwritable.env("XDG_CACHE_HOME", "/proc/self");
    contains(&refused(&mut unwritable), "cannot write the profile /proc/self/epsmoe");
    let bench = refused(&mut command(&format!("bench --model {model} --report {long}")));
    contains(&bench, "File name too long");
    assert_eq!(names(folder.0.path()), Vec::<String>::new(), "nothing is left behind");
    // As long as a name may be.
    let longest = folder.text(&"n".repeat(255));
    printed(&mut command(&format!("logits --model {model} --ids 5 --out {longest}")));
    printed(&mut command(&format!(
        "generate --model {model} --ids 5 --max-tokens 1 --routing-record {longest}"
    )));
    assert_eq!(names(folder.0.path()), ["n".repeat(255)]);
}

#[test]
fn an_interrupted_synth_goes_on() {
    let folder = Folder::new();
    let typed = |out: &str| {
        format!("synth --preset mixtral-mini --seed 9 --max-shard-size 2MB --out {}", folder.text(out))
    };
    printed(&mut command(&typed("whole")));
    // The embedding is larger than files may be for this process.
    let mut limited = Command::new("sh");
    let program = env!("CARGO_BIN_EXE_epsmoe");
    limited.args(["-c", &format!("ulimit -f 4096; exec {program} {}", typed("begun"))]);
    assert!(!limited.output().unwrap().status.success());
    let begun = names(&folder.path("begun"));
    assert!(begun.contains(&".epsmoe-synth".to_owned()) && !begun.contains(&"config.json".to_owned()));
    std::fs::write(folder.path("begun/.epsmoe-1-0.part"), "half").unwrap();

    let other = refused(&mut command(&typed("begun").replace("--seed 9", "--seed 8")));
    contains(&other, "has the beginning of another checkpoint");
    let locked = std::fs::File::open(folder.path("begun/.epsmoe-synth")).unwrap();
    locked.try_lock().unwrap();
    contains(&refused(&mut command(&typed("begun"))), "another `epsmoe synth` is writing to");
    drop(locked);
    printed(&mut command(&typed("begun")));
    let whole = names(&folder.path("whole"));
    assert_eq!(names(&folder.path("begun")), whole);
    for name in whole {
        let [begun, whole] =
            ["begun", "whole"].map(|out| std::fs::read(folder.path(out).join(&name)).unwrap());
        assert!(begun == whole, "{name}");
    }
    contains(&refused(&mut command(&typed("begun"))), "is not empty: give a new folder");
}

/// Of those who begin at once one writes, and the others are told.
#[test]
fn a_checkpoint_has_one_writer() {
    let folder = Folder::new();
    let out = folder.text("model");
    let start = |_| {
        let mut command = command(&format!("synth --preset mixtral-mini --out {out}"));
        command.stderr(std::process::Stdio::piped()).spawn().unwrap()
    };
    let all: Vec<_> = (0..4).map(start).collect();
    let ended = all.into_iter().map(|child| child.wait_with_output().unwrap());
    let (wrote, refused): (Vec<_>, Vec<_>) = ended.partition(|output| output.status.success());
    assert_eq!(wrote.len(), 1);
    for output in refused {
        let message = String::from_utf8(output.stderr).unwrap();
        let told = ["another `epsmoe synth` is writing to", "is not empty: give a new folder"];
        assert!(told.iter().any(|words| message.contains(words)), "{message}");
    }
    assert_eq!(names(&folder.path("model")), ["config.json", "model.safetensors"]);
}
