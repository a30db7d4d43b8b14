//! `epsmoe profile`: what the work of an MoE layer costs on this machine, how well that predicts whole layers, and how
//! good the plans are that follow from it.

use crate::args::{Dtype, ProfileArgs};
use crate::{machine, output};
use anyhow::{Result, bail};
use epsmoe_base::DType;
use epsmoe_device::cpu::gemm::Isa;
use epsmoe_profile::{
    Case, Effort, Fingerprint, LAYERS, Model, Models, Outcome, Recovery, Regret, RigOptions, Spread, Uneven,
    cases, default_path, load, measure, recovery, regret, store, uneven, verify,
};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Rounds of plans that are compared.
const PAIRS: usize = 20;

/// Cells that a report without --json shows.
const SHOWN: usize = 10;

/// Measures this machine, or holds its profiles against layers that they never saw.
pub(crate) fn run(args: &ProfileArgs) -> Result<()> {
    let written = args.json.iter().filter(|file| file.as_os_str() != "-");
    written.chain(&args.out).try_for_each(|file| output::check_place(file))?;
    match args.verify {
        Some(number) => check(args, number),
        None => profiles(args),
    }
}

fn settle(args: &ProfileArgs, ranks: usize) -> (Fingerprint, RigOptions) {
    let dtype = match args.dtype {
        Dtype::Auto | Dtype::Float32 => DType::F32,
        Dtype::Bfloat16 => DType::BF16,
    };
    let isa = args.isa.unwrap_or_else(Isa::detect);
    let threads = args.threads.unwrap_or((machine::cores() / ranks).max(1));
    let options = RigOptions {
        ranks,
        threads,
        isa,
        dtype,
        link: None,
        timeout: Duration::from_secs(60),
        weights: Arc::default(),
    };
    (Fingerprint::of_cpu(ranks, threads, isa, dtype), options)
}

/// One profile for every number of ranks.
fn profiles(args: &ProfileArgs) -> Result<()> {
    if args.out.is_some() && args.data_parallel_size.len() > 1 {
        bail!("--out names one file, but there would be a profile for each of several numbers of ranks");
    }
    let mut made = Vec::new();
    for &ranks in &args.data_parallel_size {
        let profile = profile(args, ranks)?;
        if args.json.is_none() {
            output::show_line(profile["file"].as_str().unwrap_or_default())?;
        }
        made.push(profile);
    }
    // One profile stands for itself.
    let made = if made.len() == 1 { made.remove(0) } else { made.into() };
    args.json.as_deref().map_or(Ok(()), |file| write_json(file, &made))
}

fn profile(args: &ProfileArgs, ranks: usize) -> Result<Value> {
    let (fingerprint, options) = settle(args, ranks);
    let path = args.out.clone().unwrap_or_else(|| default_path(&fingerprint));
    let (begun, load_before) = (Instant::now(), load_text());
    let bar = output::step_bar(format!("profiling {}", epsmoe_base::count(ranks, "rank")), 1);
    let effort = Effort::full(Duration::from_secs_f64(args.max_seconds.unwrap_or(120.0)));
    let cost = measure(&fingerprint, &options, &effort, &mut |done, of| {
        bar.set_length(of as u64);
        bar.set_position(done as u64);
    });
    bar.finish_and_clear();
    let cost = cost?;
    let seconds = begun.elapsed().as_secs_f64();
    let remarks = [
        "What the work of an MoE layer costs on this machine; `epsmoe profile` wrote it.".into(),
        format!("machine: {}", cost.machine),
        format!("kernels: {}", cost.kernels),
        format!("date: {}", date()),
        format!("command: {}", command()),
        format!("load average before: {load_before}, after: {}", load_text()),
        format!("measured in {seconds:.0} s, epsmoe {}", env!("CARGO_PKG_VERSION")),
    ];
    store(&path, &cost, &remarks)?;
    Ok(json!({
        "file": path,
        "date": date(),
        "command": command(),
        "seconds": seconds,
        "cost": cost,
    }))
}

fn load_text() -> String {
    machine::load_average().map_or("unknown".into(), |[one, five, _]| format!("{one:.2} {five:.2}"))
}

/// Today, in Greenwich.
fn date() -> String {
    jiff::Timestamp::now().strftime("%Y-%m-%d %H:%M UTC").to_string()
}

/// What was typed.
fn command() -> String {
    std::env::args().collect::<Vec<_>>().join(" ")
}

/// To the file, or to standard output for `-`.
fn write_json(file: &Path, value: &Value) -> Result<()> {
    if file.as_os_str() == "-" {
        return output::show_line(value);
    }
    output::write_file(file, |out| {
        serde_json::to_writer_pretty(&mut *out, value)?;
        writeln!(out)
    })
}

/// The profiles of all these numbers of ranks: the given file, or the cached ones.
fn models(args: &ProfileArgs, cases: &[&Case]) -> Result<Models> {
    let mut ranks: Vec<usize> = cases.iter().map(|cell| cell.ranks).collect();
    ranks.sort_unstable();
    ranks.dedup();
    let path = |fingerprint: &Fingerprint| -> PathBuf {
        args.profile.clone().unwrap_or_else(|| default_path(fingerprint))
    };
    let missing = ranks.iter().filter(|&&ranks| !path(&settle(args, ranks).0).exists());
    let missing: Vec<String> = missing.map(usize::to_string).collect();
    if args.profile.is_none() && !missing.is_empty() {
        let missing = missing.join(",");
        bail!(
            "there is no profile of {missing} ranks: `epsmoe profile -dp {missing}` measures what is missing"
        );
    }
    let model = |ranks: usize| -> Result<(usize, Model)> {
        let (fingerprint, options) = settle(args, ranks);
        Ok((ranks, Model { cost: load(&path(&fingerprint), &fingerprint)?, options }))
    };
    ranks.into_iter().map(model).collect()
}

fn check(args: &ProfileArgs, number: usize) -> Result<()> {
    let cases: Vec<Case> = cases(args.seed, number)?;
    // A given profile is good for one number of ranks.
    let ours = |cell: &&Case| args.profile.is_none() || args.data_parallel_size.contains(&cell.ranks);
    let chosen: Vec<&Case> = cases.iter().filter(ours).collect();
    if chosen.is_empty() {
        bail!("none of {number} cases has {:?} ranks: ask for more", args.data_parallel_size);
    }
    let models = models(args, &chosen)?;
    let load_before = load_text();
    let most = Duration::from_secs_f64(args.max_seconds.unwrap_or(900.0));
    let figures = match (args.regret, args.uneven_cuts, args.wrong_profile) {
        (true, _, _) => {
            let found = each(&chosen, &models, most, |cell, model| Ok(Some(regret(cell, model, PAIRS)?)))?;
            show_regrets(&found, chosen.len(), args.json.is_some())?
        }
        (_, true, _) => {
            let found = each(&chosen, &models, most, |cell, model| Ok(uneven(cell, model, PAIRS)?))?;
            show_uneven(&found, args.json.is_some())?
        }
        (_, _, true) => {
            let found = each(&chosen, &models, most, |cell, model| Ok(Some(recovery(cell, model, PAIRS)?)))?;
            show_recoveries(&found, args.json.is_some())?
        }
        _ => {
            let bar = output::step_bar("verifying", 1);
            let outcomes = verify(&chosen, &models, most, &mut |done, of| {
                bar.set_length(of as u64);
                bar.set_position(done as u64);
            });
            bar.finish_and_clear();
            show_outcomes(outcomes?, args.json.is_some())?
        }
    };
    let Some(file) = &args.json else { return Ok(()) };
    let mut report = json!({
        "command": command(),
        "date": date(),
        "seed": args.seed,
        "cells_asked": number,
        "load": { "before": load_before, "after": load_text() },
    });
    if let (Some(report), Value::Object(figures)) = (report.as_object_mut(), figures) {
        report.extend(figures);
    }
    write_json(file, &report)
}

/// What cell after cell tells; no cell begins after `most`.
fn each<T>(
    cases: &[&Case],
    models: &Models,
    most: Duration,
    tell: impl Fn(&Case, &Model) -> Result<Option<T>>,
) -> Result<Vec<T>> {
    let (begun, bar) = (Instant::now(), output::step_bar("comparing", cases.len()));
    let mut told = Vec::new();
    for cell in cases {
        if begun.elapsed() > most {
            break;
        }
        let mut model = models[&cell.ranks].clone();
        // Weights go with the cell.
        model.options.weights = Arc::default();
        told.extend(tell(cell, &model)?);
        bar.inc(1);
    }
    let done = bar.position();
    bar.finish_and_clear();
    if done < cases.len() as u64 {
        output::remark(format_args!("{done} of {} cases: the time was over", cases.len()));
    }
    Ok(told)
}

fn percent(permille: u64) -> f64 {
    permille as f64 / 10.0
}

/// A line for every one, unless the figures go elsewhere.
fn lines<T>(all: &[T], quiet: bool, line: impl Fn(&T) -> String) -> Result<()> {
    all.iter().filter(|_| !quiet).try_for_each(|one| output::show_line(line(one)))
}

fn show_regrets(found: &[Regret], asked: usize, quiet: bool) -> Result<Value> {
    lines(found, quiet, |found| {
        let one = found.over_one_stage;
        format!(
            "regret {:4.1} %, {:5.1} % of one stage's speed ({:.1} to {:.1}), {}: {}",
            percent(found.regret()),
            percent(one.median),
            percent(one.interval.0),
            percent(one.interval.1),
            epsmoe_base::count(found.stages, "stage"),
            found.what
        )
    })?;
    let number = found.len().max(1) as u64;
    let mean = found.iter().map(Regret::regret).sum::<u64>() as f64 / number as f64;
    let worst = found.iter().map(Regret::regret).max().unwrap_or(0);
    let slower = found.iter().filter(|found| found.over_one_stage.interval.1 < 990).count();
    if !quiet {
        output::show_line(format_args!(
            "{} of {asked} cases: mean regret {:.1} %, worst {:.1} %; surely slower than 99 % of one stage: {slower}",
            found.len(),
            mean / 10.0,
            percent(worst)
        ))?;
    }
    Ok(json!({
        "regrets": found,
        "pairs": PAIRS,
        "mean_regret_permille": mean,
        "worst_regret_permille": worst,
        "surely_slower_than_one_stage": slower,
    }))
}

fn show_uneven(found: &[Uneven], quiet: bool) -> Result<Value> {
    lines(found, quiet, |found| {
        let gain = |ratio: u64| percent(ratio) - 100.0;
        let Uneven { what, predicted, measured, .. } = found;
        format!(
            "predicted {:+5.1} %, measured {:+5.1} % ({:+.1} to {:+.1}): {what}",
            gain(*predicted),
            gain(measured.median),
            gain(measured.interval.0),
            gain(measured.interval.1)
        )
    })?;
    let pays = |wanted: &dyn Fn(&Uneven) -> bool| found.iter().filter(|found| wanted(found)).count();
    let (faster, slower) =
        (pays(&|found| found.measured.interval.0 > 1000), pays(&|found| found.measured.interval.1 < 1000));
    if !quiet {
        output::show_line(format_args!(
            "of {} cases with a choice, uneven cuts are surely faster in {faster}, surely slower in {slower}",
            found.len()
        ))?;
    }
    Ok(json!({ "uneven": found, "pairs": PAIRS, "surely_faster": faster, "surely_slower": slower }))
}

fn show_recoveries(found: &[Recovery], quiet: bool) -> Result<Value> {
    lines(found, quiet, |found| {
        let Recovery { what, settled, before, after, same_bits, .. } = found;
        format!(
            "time over the right plan's: {:.1} % at first, {:.1} % ({:.1} to {:.1}) after {LAYERS} layers, settled after \
             {settled}, {} bits: {what}",
            percent(before.median),
            percent(after.median),
            percent(after.interval.0),
            percent(after.interval.1),
            if *same_bits { "the same" } else { "OTHER" }
        )
    })?;
    let within = found.iter().filter(|found| found.after.median <= 1050).count();
    let same = found.iter().all(|found| found.same_bits);
    if !quiet {
        output::show_line(format_args!(
            "{within} of {} cases come within 5 % of the right plan; {} bits changed",
            found.len(),
            if same { "no" } else { "SOME" }
        ))?;
    }
    Ok(json!({ "recoveries": found, "pairs": PAIRS, "within_5_percent": within, "same_bits": same }))
}

fn show_outcomes(mut outcomes: Vec<Outcome>, quiet: bool) -> Result<Value> {
    outcomes.sort_by_key(|outcome| std::cmp::Reverse(outcome.error()));
    lines(&outcomes[..outcomes.len().min(SHOWN)], quiet, |outcome| {
        let Outcome { what, predicted_ns, measured_ns, predicted, measured, .. } = outcome;
        format!(
            "predicted {:.2} ms, measured {:.2} ms: {what}\n  predicted {predicted:?}\n  measured  {measured:?}",
            *predicted_ns as f64 / 1e6,
            *measured_ns as f64 / 1e6
        )
    })?;
    let spread = |steady: bool| {
        Spread::of(outcomes.iter().filter(|outcome| outcome.is_steady() == steady).map(Outcome::error))
    };
    let (steady, varying) = (spread(true), spread(false));
    for (what, Spread { cases, median, p90, worst }) in [("steady", steady), ("varying over 4 %", varying)] {
        if !quiet {
            output::show_line(format_args!(
                "{cases} cases {what}: median {:.1} %, 90th percentile {:.1} %, worst {:.1} % off",
                percent(median),
                percent(p90),
                percent(worst)
            ))?;
        }
    }
    Ok(json!({ "cases": outcomes, "steady": steady, "varying": varying }))
}
