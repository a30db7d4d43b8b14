//! Chores of this workspace: `cargo xtask <task>`.

#![expect(clippy::print_stdout, reason = "a program for people")]

mod eval;
mod gpu_bundle;
mod soak;

use clap::Parser;
use std::path::PathBuf;

/// Chores of this workspace.
#[derive(Parser)]
enum Task {
    /// Compile every GPU kernel with NVRTC (no GPU needed), tell what each uses, fail on spills in products.
    CheckKernels {
        /// Architectures to compile for.
        #[arg(default_values = ["sm_90a", "sm_80"])]
        architectures: Vec<String>,
    },
    /// Make a folder with the op suite, the models, the benches and scripts that run them on a GPU host without Rust.
    GpuBundle {
        /// The folder; its files are replaced.
        #[arg(default_value = "target/gpu-bundle")]
        out: PathBuf,
    },
    /// Hold the cost model and the auto schedule against layers that no profile was fitted to.
    #[command(subcommand)]
    Eval(eval::Question),
    /// Serve many streams for minutes: every token must come once and be the right one, and memory stay what it was.
    Soak(soak::SoakArgs),
}

fn main() -> anyhow::Result<()> {
    match Task::parse() {
        Task::CheckKernels { architectures } => check_kernels(&architectures),
        Task::GpuBundle { out } => gpu_bundle::make(&out),
        Task::Eval(question) => eval::run(&question),
        Task::Soak(args) => soak::run(&args),
    }
}

fn check_kernels(architectures: &[String]) -> anyhow::Result<()> {
    let mut spilling = Vec::new();
    for architecture in architectures {
        for used in epsmoe_device::cuda::check_kernels(architecture)? {
            println!(
                "{architecture:7} {:24} {:3} registers, {:3} bytes spilled",
                used.kernel, used.registers, used.spilled
            );
            if used.file.starts_with("gemm") && used.spilled > 0 {
                spilling.push(format!("{} for {architecture}", used.kernel));
            }
        }
    }
    anyhow::ensure!(spilling.is_empty(), "products must not spill: {}", spilling.join(", "));
    Ok(())
}
