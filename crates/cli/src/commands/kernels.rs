//! `epsmoe kernels`.

use crate::args::{KernelsArgs, KernelsCommand, WarmArgs};
use crate::output;
use anyhow::Result;
use epsmoe_base::count;
use epsmoe_device::cuda::{CudaDevice, Warmed, warm_kernels};

/// Runs a subcommand.
pub(crate) fn run(args: &KernelsArgs) -> Result<()> {
    match &args.command {
        KernelsCommand::Warm(args) => warm(args),
    }
}

fn warm(args: &WarmArgs) -> Result<()> {
    let architecture = args.arch.clone().map_or_else(|| CudaDevice::architecture(0), Ok)?;
    let bar = output::step_bar("compiling", 1);
    let warmed = warm_kernels(&architecture, |done, files| {
        bar.set_length(files as u64);
        bar.set_position(done as u64);
    });
    bar.finish_and_clear();
    let Warmed { folder, kept, compiled } = warmed?;
    output::show_line(format_args!(
        "{} compiled for {architecture}, {kept} there already: {}",
        count(compiled, "file"),
        folder.display()
    ))
}
