//! A folder that runs the op suite on a GPU host without Rust.

use anyhow::{Context, bail, ensure};
use epsmoe_base::Bytes;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

/// What a bundle may weigh.
const LARGEST: u64 = 60_000_000;

const RUN_OPS: &str = include_str!("run-ops.sh");

pub(crate) fn make(out: &Path) -> anyhow::Result<()> {
    let binary = op_suite()?;
    std::fs::create_dir_all(out).with_context(|| format!("cannot make {}", out.display()))?;
    let (suite, script) = (out.join("op_suite"), out.join("run-ops.sh"));
    std::fs::copy(&binary, &suite).with_context(|| format!("cannot write {}", suite.display()))?;
    // Symbols are most of its size; without `strip` the bundle is only larger.
    let _ = Command::new("strip").arg("--strip-debug").arg(&suite).status();
    std::fs::write(&script, RUN_OPS).with_context(|| format!("cannot write {}", script.display()))?;
    std::fs::set_permissions(&script, std::fs::Permissions::from_mode(0o755))?;
    let size = std::fs::metadata(&suite)?.len() + RUN_OPS.len() as u64;
    ensure!(size <= LARGEST, "the bundle has {}, more than {}", Bytes(size), Bytes(LARGEST));
    println!("{}: {}; run its run-ops.sh on a GPU host", out.display(), Bytes(size));
    Ok(())
}

/// Builds the op suite and says where it is.
fn op_suite() -> anyhow::Result<PathBuf> {
    let cargo = Command::new("cargo")
        .args(["test", "--release", "--no-run", "--package", "epsmoe-device", "--test", "op_suite"])
        .args(["--message-format", "json"])
        .stderr(std::process::Stdio::inherit())
        .output()
        .context("cannot start cargo")?;
    ensure!(cargo.status.success(), "the op suite does not build");
    for line in String::from_utf8_lossy(&cargo.stdout).lines() {
        let message: serde_json::Value = serde_json::from_str(line)?;
        if message["target"]["name"] == "op_suite"
            && let Some(path) = message["executable"].as_str()
        {
            return Ok(path.into());
        }
    }
    bail!("cargo did not say where the op suite is")
}
