//! A folder that runs the op suite, the models and the benches on a GPU host without Rust.

use anyhow::{Context, bail, ensure};
use epsmoe_base::Bytes;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

/// What a bundle may weigh.
const LARGEST: u64 = 60_000_000;

/// The programs of a bundle.
const PROGRAMS: [Program; 6] = [
    Program { package: "epsmoe-device", target: Target::Test("op_suite"), name: "op_suite" },
    Program { package: "epsmoe-device", target: Target::Units, name: "device_units" },
    Program { package: "epsmoe-fabric", target: Target::Test("contract"), name: "fabric_suite" },
    Program { package: "epsmoe-engine", target: Target::Test("fixtures"), name: "model_suite" },
    Program { package: "epsmoe-server", target: Target::Test("http"), name: "server_suite" },
    Program { package: "epsmoe-cli", target: Target::Binary("epsmoe"), name: "epsmoe" },
];

/// The scripts that run them, and what these read: file name and text.
const SCRIPTS: [(&str, &str); 10] = [
    ("run-ops.sh", include_str!("run-ops.sh")),
    ("run-ranks.sh", include_str!("run-ranks.sh")),
    ("ranks.py", include_str!("ranks.py")),
    ("run-overlap.sh", include_str!("run-overlap.sh")),
    ("run-emulated.sh", include_str!("run-emulated.sh")),
    ("emulated.py", include_str!("emulated.py")),
    ("run-models.sh", include_str!("run-models.sh")),
    ("run-bench.sh", include_str!("run-bench.sh")),
    ("libraries.sh", include_str!("libraries.sh")),
    ("peers.py", include_str!("peers.py")),
];

struct Program {
    package: &'static str,
    target: Target,
    /// Its name in the bundle.
    name: &'static str,
}

/// What cargo calls it.
enum Target {
    Test(&'static str),
    /// The tests in the package's own source.
    Units,
    Binary(&'static str),
}

pub(crate) fn make(out: &Path) -> anyhow::Result<()> {
    if out.exists() {
        std::fs::remove_dir_all(out).with_context(|| format!("cannot clear {}", out.display()))?;
    }
    std::fs::create_dir_all(out).with_context(|| format!("cannot make {}", out.display()))?;
    for program in &PROGRAMS {
        let to = out.join(program.name);
        std::fs::copy(built(program)?, &to).with_context(|| format!("cannot write {}", to.display()))?;
        // Debug information is most of its size; without `strip` the bundle is only larger.
        let _ = Command::new("strip").arg("--strip-debug").arg(&to).status();
    }
    for script in SCRIPTS {
        write_script(out, script)?;
    }
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fixtures");
    copy_folder(&fixtures, &out.join("fixtures"))?;
    let size = size_of(out)?;
    ensure!(size <= LARGEST, "the bundle has {}, more than {}", Bytes(size), Bytes(LARGEST));
    println!(
        "{}: {}; run its run-ops.sh, run-ranks.sh, run-models.sh, run-bench.sh, run-overlap.sh and run-emulated.sh on a GPU host",
        out.display(),
        Bytes(size)
    );
    Ok(())
}

fn write_script(out: &Path, (name, text): (&str, &str)) -> anyhow::Result<()> {
    let path = out.join(name);
    std::fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))?;
    Ok(std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755))?)
}

/// Builds a program and says where it is.
fn built(program: &Program) -> anyhow::Result<PathBuf> {
    let library = program.package.replace('-', "_");
    let (what, name) = match program.target {
        Target::Test(name) => (vec!["test", "--no-run", "--test", name], name),
        Target::Units => (vec!["test", "--no-run", "--lib"], library.as_str()),
        Target::Binary(name) => (vec!["build", "--quiet", "--bin", name], name),
    };
    let cargo = Command::new("cargo")
        .args(what)
        .args(["--release", "--package", program.package, "--message-format", "json"])
        .stderr(std::process::Stdio::inherit())
        .output()
        .context("cannot start cargo")?;
    ensure!(cargo.status.success(), "{} does not build", program.name);
    for line in String::from_utf8_lossy(&cargo.stdout).lines() {
        let message: serde_json::Value = serde_json::from_str(line)?;
        if message["target"]["name"] == name
            && let Some(path) = message["executable"].as_str()
        {
            return Ok(path.into());
        }
    }
    bail!("cargo did not say where {} is", program.name)
}

fn copy_folder(from: &Path, to: &Path) -> anyhow::Result<()> {
    std::fs::create_dir_all(to)?;
    for entry in std::fs::read_dir(from).with_context(|| format!("cannot read {}", from.display()))? {
        let entry = entry?;
        let target = to.join(entry.file_name());
        if entry.file_type()?.is_dir() {
            copy_folder(&entry.path(), &target)?;
        } else {
            std::fs::copy(entry.path(), &target)
                .with_context(|| format!("cannot write {}", target.display()))?;
        }
    }
    Ok(())
}

/// Bytes of all files in a folder.
fn size_of(folder: &Path) -> anyhow::Result<u64> {
    let mut size = 0;
    for entry in std::fs::read_dir(folder)? {
        let entry = entry?;
        let metadata = entry.metadata()?;
        size += if metadata.is_dir() { size_of(&entry.path())? } else { metadata.len() };
    }
    Ok(size)
}
