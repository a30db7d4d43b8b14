//! The server as a process: started, looked at, ended.

use super::SoakArgs;
use super::client::Client;
use anyhow::{Context, Result, bail, ensure};
use std::fmt::Write;
use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// How long it may take to load a model, or to end.
const PATIENCE: Duration = Duration::from_secs(120);

/// A server of our own.
pub(super) struct Server {
    child: Child,
    address: String,
}

/// How it was at a moment.
pub(super) struct Sample {
    pub(super) seconds: f64,
    /// Resident bytes.
    pub(super) memory: u64,
    pub(super) threads: u64,
    pub(super) files: u64,
}

impl Sample {
    /// Samples as CSV.
    pub(super) fn table(samples: &[Sample]) -> String {
        let mut table = "seconds,resident_bytes,threads,open_files\n".to_owned();
        for Sample { seconds, memory, threads, files } in samples {
            // Writing to a string cannot fail.
            let _ = writeln!(table, "{seconds:.1},{memory},{threads},{files}");
        }
        table
    }
}

impl Server {
    pub(super) fn start(args: &SoakArgs) -> Result<Self> {
        let mut child = Command::new(&args.program)
            .args(["serve", &args.model, "--port", "0", "--log-level", "warn"])
            .args(&args.flags)
            .stderr(Stdio::piped())
            .spawn()
            .with_context(|| {
                format!("cannot start {}: build it, or give --program", args.program.display())
            })?;
        let mut lines = BufReader::new(child.stderr.take().context("it has no standard error")?).lines();
        let mut told = Vec::new();
        for line in lines.by_ref() {
            let line = line?;
            println!("{line}");
            if let Some((_, rest)) = line.split_once(" on http://") {
                let address = rest.split(' ').next().unwrap_or(rest);
                let address = format!("http://{address}");
                // What else it says is passed on, so that it never waits for a reader.
                std::thread::spawn(move || lines.map_while(Result::ok).for_each(|line| println!("{line}")));
                return Ok(Server { child, address });
            }
            told.push(line);
        }
        bail!("the server did not start: {}", told.join("; "))
    }

    /// Where it listens.
    pub(super) fn address(&self) -> &str {
        &self.address
    }

    /// How it is now, where the system tells.
    pub(super) fn sample(&self, begun: Instant) -> Option<Sample> {
        let folder = format!("/proc/{}", self.child.id());
        let status = std::fs::read_to_string(format!("{folder}/status")).ok()?;
        let number = |key: &str| -> Option<u64> {
            status.lines().find_map(|line| line.strip_prefix(key)?.split_whitespace().next()?.parse().ok())
        };
        Some(Sample {
            seconds: begun.elapsed().as_secs_f64(),
            memory: number("VmRSS:")? * 1024,
            threads: number("Threads:")?,
            files: std::fs::read_dir(format!("{folder}/fd")).ok()?.count() as u64,
        })
    }

    /// Waits until nothing runs, nothing waits and no block of the cache is in use.
    pub(super) fn until_idle(&self, client: &Client, patience: Duration) -> Result<Duration> {
        let begun = Instant::now();
        loop {
            let metrics = client.metrics()?;
            let mut left = 0.0;
            for name in ["num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"] {
                left += metrics.value(&format!("epsmoe_{name}"))?;
            }
            if left == 0.0 {
                return Ok(begun.elapsed());
            }
            ensure!(begun.elapsed() < patience, "requests or blocks are left after {patience:?}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Ends it as a service manager does.
    pub(super) fn stop(&mut self) -> Result<()> {
        let id = self.child.id().to_string();
        ensure!(Command::new("kill").args(["-TERM", &id]).status()?.success(), "cannot send it a signal");
        let begun = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait()? {
                ensure!(status.success(), "it ended with {status}");
                return Ok(());
            }
            ensure!(begun.elapsed() < PATIENCE, "it does not end");
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // It has ended already, unless something went wrong.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
