//! `cargo xtask eval`: how good the cost model and the auto schedule are, on layers that no profile was fitted to.
//!
//! `cases` draws the layers, `verify` predicts them and runs them, `regret` holds plans of the same layer against each
//! other. All of it needs profiles of this machine, which `epsmoe profile` measures.

mod cases;
mod regret;
mod report;
mod verify;

use anyhow::{Context, Result, bail, ensure};
use cases::{Case, Model, Models, cases};
use clap::{Args, Subcommand};
use epsmoe_base::{DType, cores};
use epsmoe_device::cpu::gemm::Isa;
use epsmoe_device::cuda::{self, CudaDevice};
use epsmoe_profile::{Fingerprint, RigOptions, default_path, load};
use indicatif::ProgressBar;
use serde_json::{Value, json};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Rounds of plans that are compared.
const PAIRS: usize = 20;

/// A question about predictions.
#[derive(Subcommand)]
pub(crate) enum Question {
    /// Predict layers, run them, and say how far off the predictions were.
    Verify(Options),
    /// Run the auto schedule's plan of each layer against the best of many others.
    Regret(Options),
    /// Run cuts that follow the loads against as many experts in every stage.
    UnevenCuts(Options),
    /// Let the auto schedule begin with links four times and products half as fast as the profile says.
    WrongProfile(Options),
    /// Measure what the first GPU does with copies, signals and kernels at the same time, as tables.
    Probe,
}

/// Which layers, and how they are run.
#[derive(Args)]
pub(crate) struct Options {
    /// Layers to draw.
    #[arg(long, default_value_t = 100)]
    cases: usize,

    /// Which layers.
    #[arg(long, default_value_t = 707)]
    seed: u64,

    /// Ranks of the layers to keep.
    #[arg(long, value_name = "RANKS", default_value = "1,2,4", value_delimiter = ',')]
    ranks: Vec<usize>,

    /// The profile to check, for one number of ranks [default: those in the cache].
    #[arg(long, value_name = "FILE")]
    profile: Option<PathBuf>,

    /// Activations in bfloat16 instead of float32.
    #[arg(long)]
    bfloat16: bool,

    /// Vector instructions [default: the best there are].
    #[arg(long)]
    isa: Option<Isa>,

    /// Threads of each rank [default: cores divided by ranks].
    #[arg(long)]
    threads: Option<usize>,

    /// No new case begins after this many seconds.
    #[arg(long, default_value_t = 900)]
    max_seconds: u64,

    /// Write the figures to a file too.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

/// Answers a question.
pub(crate) fn run(question: &Question) -> Result<()> {
    match question {
        Question::Verify(options) => ask(options, |asked| {
            let bar = ProgressBar::new(1);
            let outcomes = verify::verify(&asked.cases, &asked.models, asked.most, &mut |done, of| {
                bar.set_length(of as u64);
                bar.set_position(done as u64);
            });
            bar.finish_and_clear();
            Ok(report::outcomes(outcomes?))
        }),
        Question::Regret(options) => ask(options, |asked| {
            let found = asked.each(|case, model| Ok(Some(regret::regret(case, model, PAIRS)?)))?;
            Ok(report::regrets(&found, asked.cases.len()))
        }),
        Question::UnevenCuts(options) => ask(options, |asked| {
            let found = asked.each(|case, model| Ok(regret::uneven(case, model, PAIRS)?))?;
            Ok(report::uneven(&found))
        }),
        Question::WrongProfile(options) => ask(options, |asked| {
            let found = asked.each(|case, model| Ok(Some(regret::recovery(case, model, PAIRS)?)))?;
            Ok(report::recoveries(&found))
        }),
        Question::Probe => {
            report::probes(&cuda::probe(&CudaDevice::open(0)?)?);
            Ok(())
        }
    }
}

/// Cases with the models to predict them by.
struct Asked<'a> {
    cases: Vec<&'a Case>,
    models: Models,
    most: Duration,
}

fn ask(options: &Options, answer: impl FnOnce(&Asked<'_>) -> Result<Value>) -> Result<()> {
    ensure!(
        options.profile.is_none() || options.ranks.len() == 1,
        "a profile is good for one number of ranks: give --ranks N with --profile"
    );
    let drawn = cases(options.seed, options.cases)?;
    let cases: Vec<&Case> = drawn.iter().filter(|case| options.ranks.contains(&case.ranks)).collect();
    ensure!(!cases.is_empty(), "none of {} cases has {:?} ranks: ask for more", options.cases, options.ranks);
    let models = models(options, &cases)?;
    let load_before = load_average();
    let most = Duration::from_secs(options.max_seconds);
    let figures = answer(&Asked { cases, models, most })?;
    let Some(file) = &options.json else { return Ok(()) };
    let mut written = json!({
        "command": std::env::args().collect::<Vec<_>>().join(" "),
        "date": jiff::Timestamp::now().strftime("%Y-%m-%d %H:%M UTC").to_string(),
        "seed": options.seed,
        "cases_asked": options.cases,
        "load": { "before": load_before, "after": load_average() },
    });
    if let (Some(written), Value::Object(figures)) = (written.as_object_mut(), figures) {
        written.extend(figures);
    }
    let text = serde_json::to_string_pretty(&written)? + "\n";
    std::fs::write(file, text).with_context(|| format!("cannot write {}", file.display()))
}

/// The profiles of all the cases' numbers of ranks: the given file, or the cached ones.
fn models(options: &Options, cases: &[&Case]) -> Result<Models> {
    let mut ranks: Vec<usize> = cases.iter().map(|case| case.ranks).collect();
    ranks.sort_unstable();
    ranks.dedup();
    let path = |ranks| options.profile.clone().unwrap_or_else(|| default_path(&settle(options, ranks).0));
    let missing: Vec<String> =
        ranks.iter().filter(|&&ranks| !path(ranks).exists()).map(usize::to_string).collect();
    if options.profile.is_none() && !missing.is_empty() {
        let missing = missing.join(",");
        bail!(
            "there is no profile of {missing} ranks: `epsmoe profile -dp {missing}` measures what is missing"
        );
    }
    let model = |ranks: usize| -> Result<(usize, Model)> {
        let (fingerprint, rig) = settle(options, ranks);
        Ok((ranks, Model { cost: load(&path(ranks), &fingerprint)?, options: rig }))
    };
    ranks.into_iter().map(model).collect()
}

fn settle(options: &Options, ranks: usize) -> (Fingerprint, RigOptions) {
    let dtype = if options.bfloat16 { DType::BF16 } else { DType::F32 };
    let isa = options.isa.unwrap_or_else(Isa::detect);
    let threads = options.threads.unwrap_or((cores() / ranks).max(1));
    let timeout = Duration::from_secs(60);
    let rig = RigOptions { ranks, threads, isa, dtype, link: None, timeout, weights: Arc::default() };
    (Fingerprint::of_cpu(ranks, threads, isa, dtype), rig)
}

fn load_average() -> String {
    std::fs::read_to_string("/proc/loadavg").map_or("unknown".into(), |text| text.trim_end().to_owned())
}

impl Asked<'_> {
    /// What case after case tells; none begins when the time is over.
    fn each<T>(&self, tell: impl Fn(&Case, &Model) -> Result<Option<T>>) -> Result<Vec<T>> {
        let (begun, bar) = (Instant::now(), ProgressBar::new(self.cases.len() as u64));
        let mut told = Vec::new();
        for case in &self.cases {
            if begun.elapsed() > self.most {
                break;
            }
            let mut model = self.models[&case.ranks].clone();
            // Weights go with the case.
            model.options.weights = Arc::default();
            told.extend(tell(case, &model)?);
            bar.inc(1);
        }
        let done = bar.position();
        bar.finish_and_clear();
        if done < self.cases.len() as u64 {
            eprintln!("{done} of {} cases: the time was over", self.cases.len());
        }
        Ok(told)
    }
}
