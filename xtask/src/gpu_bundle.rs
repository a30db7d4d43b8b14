//! A folder that runs the op suite and the models on a GPU host without Rust.

use anyhow::{Context, bail, ensure};
use epsmoe_base::Bytes;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

/// What a bundle may weigh.
const LARGEST: u64 = 60_000_000;

/// The suites of a bundle: package, test, its name in the bundle, and the script that runs it.
const SUITES: [Suite; 2] = [
    Suite {
        package: "epsmoe-device",
        test: "op_suite",
        name: "op_suite",
        script: ("run-ops.sh", include_str!("run-ops.sh")),
    },
    Suite {
        package: "epsmoe-engine",
        test: "fixtures",
        name: "model_suite",
        script: ("run-models.sh", include_str!("run-models.sh")),
    },
];

const LIBRARIES: (&str, &str) = ("libraries.sh", include_str!("libraries.sh"));

struct Suite {
    package: &'static str,
    test: &'static str,
    name: &'static str,
    /// File name and text.
    script: (&'static str, &'static str),
}

pub(crate) fn make(out: &Path) -> anyhow::Result<()> {
    if out.exists() {
        std::fs::remove_dir_all(out).with_context(|| format!("cannot clear {}", out.display()))?;
    }
    std::fs::create_dir_all(out).with_context(|| format!("cannot make {}", out.display()))?;
    for suite in &SUITES {
        let to = out.join(suite.name);
        std::fs::copy(built(suite)?, &to).with_context(|| format!("cannot write {}", to.display()))?;
        // Debug information is most of its size; without `strip` the bundle is only larger.
        let _ = Command::new("strip").arg("--strip-debug").arg(&to).status();
        write_script(out, suite.script)?;
    }
    write_script(out, LIBRARIES)?;
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fixtures");
    copy_folder(&fixtures, &out.join("fixtures"))?;
    let size = size_of(out)?;
    ensure!(size <= LARGEST, "the bundle has {}, more than {}", Bytes(size), Bytes(LARGEST));
    println!("{}: {}; run its run-ops.sh and run-models.sh on a GPU host", out.display(), Bytes(size));
    Ok(())
}

fn write_script(out: &Path, (name, text): (&str, &str)) -> anyhow::Result<()> {
    let path = out.join(name);
    std::fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))?;
    Ok(std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755))?)
}

/// Builds a suite and says where it is.
fn built(suite: &Suite) -> anyhow::Result<PathBuf> {
    let cargo = Command::new("cargo")
        .args(["test", "--release", "--no-run", "--package", suite.package, "--test", suite.test])
        .args(["--message-format", "json"])
        .stderr(std::process::Stdio::inherit())
        .output()
        .context("cannot start cargo")?;
    ensure!(cargo.status.success(), "{} does not build", suite.name);
    for line in String::from_utf8_lossy(&cargo.stdout).lines() {
        let message: serde_json::Value = serde_json::from_str(line)?;
        if message["target"]["name"] == suite.test
            && let Some(path) = message["executable"].as_str()
        {
            return Ok(path.into());
        }
    }
    bail!("cargo did not say where {} is", suite.name)
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
