//! `epsmoe worker`: a rank other than 0, which takes its orders from there.

use crate::args::{RunArgs, WorkerArgs};
use crate::launch::Launch;
use crate::output::Told;
use crate::setup::Worker;
use anyhow::{Context, Result, bail};
use rustix::process::{Pid, Signal, getppid, set_parent_process_death_signal};
use std::time::Duration;
use tokio::signal::unix::{SignalKind, signal};

/// Works until rank 0 says goodbye.
pub(crate) fn run(args: &WorkerArgs) -> Result<()> {
    if let Some(parent) = args.child_of {
        stay_with(parent)?;
    }
    let launch = Launch::of_worker(args)?;
    let patience = Duration::from_secs_f64(args.timeout);
    ended(&Worker { launch: &launch, args: None, model: args.model.clone(), patience })
}

/// A process that was started like rank 0, and is another.
pub(crate) fn instead_of(args: &RunArgs, launch: &Launch) -> Result<()> {
    let patience = Duration::from_secs_f64(args.timeout);
    ended(&Worker { launch, args: Some(args), model: None, patience })
}

/// What stopped the world is told by rank 0, if there still is one.
fn ended(worker: &Worker<'_>) -> Result<()> {
    worker.run()?.map_err(|stopped| if stopped.told { Told.into() } else { stopped.fault.into() })
}

/// Ends with the process that started this one, and leaves it to that one what an interrupt means.
fn stay_with(parent: u32) -> Result<()> {
    set_parent_process_death_signal(Some(Signal::KILL)).context("cannot ask to end with rank 0")?;
    if getppid().map(Pid::as_raw_pid) != i32::try_from(parent).ok() {
        bail!("rank 0 (process {parent}) has ended");
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let _inside = runtime.enter();
    // Whoever has asked for a signal once does not die of it any more.
    let _asked = signal(SignalKind::interrupt()).context("cannot leave interrupts to rank 0")?;
    Ok(())
}
