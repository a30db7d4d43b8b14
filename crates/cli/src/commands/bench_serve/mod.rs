//! `epsmoe bench serve`: how a server answers a load. `prompts` (what is asked, and when), `request` (one request and
//! its times), `figures` (what they come to).

mod figures;
mod prompts;
mod request;

use crate::args::BenchServeArgs;
use crate::client::Client;
use crate::output;
use anyhow::{Result, bail};
use epsmoe_base::count;
use figures::Figures;
use prompts::Prompt;
use request::Outcome;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

/// A thread's stack: it only reads a stream.
const STACK: usize = 256 << 10;

/// Sends every request at its time, and says how they went.
pub(crate) fn run(args: &BenchServeArgs) -> Result<()> {
    if let Some(file) = &args.json {
        output::check_place(file)?;
    }
    let client = Client::connect(&args.server)?;
    let prompts = prompts::prompts(args, &client)?;
    let (outcomes, wall) = send_all(args, &client, &prompts);
    let failed = outcomes.iter().filter_map(|outcome| outcome.as_ref().err()).next();
    if let Some(problem) = failed.filter(|_| outcomes.iter().all(Result::is_err)) {
        bail!("no request was answered: {}", output::flattened(problem));
    }
    if let Some(problem) = failed {
        let failures = outcomes.iter().filter(|outcome| outcome.is_err()).count();
        output::warn(format_args!(
            "{failures} of {} failed, of which the figures say nothing; the first of them: {}",
            count(outcomes.len(), "request"),
            output::flattened(problem)
        ));
    }
    let figures = Figures::of(&outcomes, wall, args);
    if let Some(file) = &args.json {
        output::write_file(file, |out| serde_json::to_writer_pretty(out, &figures).map_err(Into::into))?;
    }
    output::show(&figures.table())
}

/// All requests, at most so many at once; in the order of the prompts.
fn send_all(args: &BenchServeArgs, client: &Client, prompts: &[Prompt]) -> (Vec<Result<Outcome>>, Duration) {
    let bar = output::step_bar("requests", prompts.len());
    let outcomes: Vec<_> = prompts.iter().map(|_| Mutex::new(None)).collect();
    let (next, start) = (AtomicUsize::new(0), Instant::now());
    std::thread::scope(|scope| {
        for _ in 0..args.max_concurrency.min(prompts.len()) {
            let worker = || {
                while let Some(index) = take(&next, prompts.len()) {
                    let due = start + prompts[index].arrival;
                    std::thread::sleep(due.saturating_duration_since(Instant::now()));
                    let outcome = request::send(client, &prompts[index], !args.no_ignore_eos);
                    *outcomes[index].lock().unwrap_or_else(std::sync::PoisonError::into_inner) =
                        Some(outcome);
                    bar.inc(1);
                }
            };
            // With fewer threads than asked for the rest take longer, which the figures show.
            let spawned = std::thread::Builder::new().stack_size(STACK).spawn_scoped(scope, worker);
            if spawned.is_err() {
                break;
            }
        }
    });
    let wall = start.elapsed();
    bar.finish_and_clear();
    let outcomes = outcomes.into_iter().map(|outcome| {
        let outcome = outcome.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner);
        outcome.unwrap_or_else(|| Err(anyhow::anyhow!("was never sent: no thread could be started")))
    });
    (outcomes.collect(), wall)
}

fn take(next: &AtomicUsize, most: usize) -> Option<usize> {
    Some(next.fetch_add(1, Ordering::Relaxed)).filter(|&index| index < most)
}
