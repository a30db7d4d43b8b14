//! A server under many streams for minutes: no token is lost or told twice, whatever clients do in between, and memory
//! stays what it was. START HERE: [`run`].
//!
//! A few dozen requests, greedy and seeded, are asked alone first. Then every stream asks one of them after another, and
//! each token must be the one that came when it was alone; some clients go away in the middle. Meanwhile the server's
//! memory is looked at every second.

mod client;
mod server;

use anyhow::{Context, Result, ensure};
use client::{Asked, Client, Outcome};
use epsmoe_base::{Bytes, Mix};
use serde::Serialize;
use server::{Sample, Server};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// How long a server may take to be rid of what nobody waits for any more.
const TO_BECOME_IDLE: Duration = Duration::from_secs(5);

/// Memory may grow by this much, or by this share of what it was, after it has settled.
const GROWTH_BYTES: u64 = 8 << 20;
const GROWTH_PERCENT: u64 = 5;

/// How a server is soaked.
#[derive(clap::Args)]
pub(crate) struct SoakArgs {
    /// The program
    #[arg(long, default_value = "target/release/epsmoe")]
    program: PathBuf,
    /// The model that it serves
    #[arg(long, default_value = "fixtures/qwen3_moe")]
    model: String,
    /// Streams at once
    #[arg(long, default_value_t = 256)]
    streams: usize,
    /// How long
    #[arg(long, default_value_t = 600)]
    seconds: u64,
    /// After how long memory must stay
    #[arg(long, default_value_t = 60)]
    settled_after: u64,
    /// Different requests
    #[arg(long, default_value_t = 64)]
    requests: usize,
    /// One in so many clients goes away in the middle of its answer
    #[arg(long, default_value_t = 8)]
    one_goes_in: usize,
    /// Decides what is asked, and who goes when
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Where to write what happened: samples.csv and summary.json
    #[arg(long)]
    out: Option<PathBuf>,
    /// More flags for the server
    #[arg(last = true, default_values = ["--max-model-len=512", "--kv-cache-memory-bytes=48MiB"])]
    flags: Vec<String>,
}

/// What came of it.
#[derive(Debug, Default, Serialize)]
struct Summary {
    streams: usize,
    seconds: f64,
    /// Answers that were read to their end, and tokens in them.
    answered: u64,
    tokens: u64,
    /// Clients that went away, and tokens they had read.
    gone: u64,
    tokens_of_gone: u64,
    tokens_per_second: f64,
    preemptions: u64,
    prefix_hits: u64,
    /// Memory when it had settled, and the most afterwards.
    settled_bytes: u64,
    most_bytes: u64,
    /// Threads and open files of the server, the most of both.
    most_threads: u64,
    most_files: u64,
    /// From the last client to nothing running and no block in use.
    idle_after_seconds: f64,
}

pub(crate) fn run(args: &SoakArgs) -> Result<()> {
    let mut server = Server::start(args)?;
    let client = Client::new(server.address());
    let requests = (0..args.requests).map(|number| Asked::new(args.seed, number));
    let alone = requests.map(|asked| client.alone(asked)).collect::<Result<Vec<_>>>()?;
    println!("{} requests asked alone; now {} streams for {} s", alone.len(), args.streams, args.seconds);
    let begun = Instant::now();
    let (outcomes, samples) = under_load(args, &server, &client, &alone)?;
    let seconds = begun.elapsed().as_secs_f64();
    let idle_after = server.until_idle(&client, TO_BECOME_IDLE)?;
    let counts = client.metrics()?;
    let count = |name: &str| counts.value(name).map(|value| value as u64);
    let settled = samples.iter().filter(|sample| sample.seconds >= args.settled_after as f64);
    let most = |of: fn(&Sample) -> u64| samples.iter().map(of).max().unwrap_or(0);
    let summary = Summary {
        streams: args.streams,
        seconds,
        tokens_per_second: outcomes.tokens as f64 / seconds,
        answered: outcomes.answered,
        tokens: outcomes.tokens - outcomes.tokens_of_gone,
        gone: outcomes.gone,
        tokens_of_gone: outcomes.tokens_of_gone,
        preemptions: count("epsmoe_num_preemptions_total")?,
        prefix_hits: count("epsmoe_prefix_cache_hits_total")?,
        settled_bytes: settled.clone().next().map_or(0, |sample| sample.memory),
        most_bytes: settled.map(|sample| sample.memory).max().unwrap_or(0),
        most_threads: most(|sample| sample.threads),
        most_files: most(|sample| sample.files),
        idle_after_seconds: idle_after.as_secs_f64(),
    };
    server.stop()?;
    if let Some(folder) = &args.out {
        std::fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))?;
        std::fs::write(folder.join("samples.csv"), Sample::table(&samples))?;
        std::fs::write(folder.join("summary.json"), serde_json::to_string_pretty(&summary)?)?;
    }
    println!("{}", serde_json::to_string_pretty(&summary)?);
    ensure!(
        summary.answered > 0 && summary.gone > 0,
        "too short to say anything: nobody answered, or nobody gone"
    );
    let (settled, most) = (summary.settled_bytes, summary.most_bytes);
    let growth = GROWTH_BYTES.max(settled / 100 * GROWTH_PERCENT);
    ensure!(most <= settled + growth, "memory grew from {} to {}", Bytes(settled), Bytes(most));
    Ok(())
}

/// All streams until time is over, and what was seen of the server meanwhile. The first thing that is wrong ends all.
fn under_load(
    args: &SoakArgs,
    server: &Server,
    client: &Client,
    alone: &[Asked],
) -> Result<(Outcome, Vec<Sample>)> {
    let (begun, over) = (Instant::now(), AtomicBool::new(false));
    let (total, mut samples) = (Mutex::new(Outcome::default()), Vec::new());
    let stream = |number: usize| {
        let mut mix = Mix::keyed(args.seed, &[1, number as u64]);
        while !over.load(Ordering::Relaxed) {
            let asked = &alone[mix.below(alone.len())];
            let leave_after = (mix.below(args.one_goes_in) == 0).then(|| mix.below(asked.tokens()));
            let outcome = client.check(asked, leave_after);
            let outcome = outcome.inspect_err(|_| over.store(true, Ordering::Relaxed))?;
            total.lock().unwrap_or_else(PoisonError::into_inner).add(&outcome);
        }
        anyhow::Ok(())
    };
    std::thread::scope(|scope| {
        let stream = &stream;
        let streams: Vec<_> = (0..args.streams).map(|number| scope.spawn(move || stream(number))).collect();
        while begun.elapsed() < Duration::from_secs(args.seconds) && !over.load(Ordering::Relaxed) {
            samples.extend(server.sample(begun));
            std::thread::sleep(Duration::from_secs(1));
        }
        over.store(true, Ordering::Relaxed);
        let ended = streams
            .into_iter()
            .map(|stream| stream.join().unwrap_or_else(|_| anyhow::bail!("a stream panicked")));
        ended.fold(Ok(()), Result::and)
    })?;
    Ok((total.into_inner().unwrap_or_else(PoisonError::into_inner), samples))
}
