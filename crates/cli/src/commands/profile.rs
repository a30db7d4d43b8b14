//! `epsmoe profile`: what the work of an MoE layer costs on this machine, and how well that predicts whole layers.

use crate::args::{Dtype, ProfileArgs};
use crate::{machine, output};
use anyhow::{Result, bail};
use epsmoe_base::DType;
use epsmoe_device::cpu::gemm::Isa;
use epsmoe_plan::CostModel;
use epsmoe_profile::{
    Cell, Effort, Fingerprint, LabOptions, Outcome, Spread, cells, default_path, load, measure, regret,
    store, verify,
};
use serde_json::json;
use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Runs of a cell that is compared with its prediction.
const REPEATS: usize = 7;

/// Pairs of a cell whose plan is compared with others.
const PAIRS: usize = 20;

/// Measures this machine, or holds a profile against layers that it never saw.
pub(crate) fn run(args: &ProfileArgs) -> Result<()> {
    match args.verify {
        Some(number) => check(args, number),
        None => profile(args),
    }
}

fn settle(args: &ProfileArgs, ranks: usize) -> (Fingerprint, LabOptions) {
    let dtype = match args.dtype {
        Dtype::Auto | Dtype::Float32 => DType::F32,
        Dtype::Bfloat16 => DType::BF16,
    };
    let isa = args.isa.unwrap_or_else(Isa::detect);
    let threads = args.threads.unwrap_or((machine::cores() / ranks).max(1));
    let options = LabOptions {
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

fn profile(args: &ProfileArgs) -> Result<()> {
    let (fingerprint, options) = settle(args, args.data_parallel_size);
    let path = args.out.clone().unwrap_or_else(|| default_path(&fingerprint));
    let (begun, load_before) = (Instant::now(), load_text());
    let bar = output::step_bar("profiling", 1);
    let effort = Effort::full(Duration::from_secs_f64(args.max_seconds * 0.9));
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
        format!("load average before: {load_before}, after: {}", load_text()),
        format!("measured in {seconds:.0} s, epsmoe {}", env!("CARGO_PKG_VERSION")),
    ];
    store(&path, &cost, &remarks)?;
    if args.json {
        return output::show_line(json!({ "file": path, "seconds": seconds, "cost": cost }));
    }
    output::show_line(path.display())
}

fn load_text() -> String {
    machine::load_average().map_or("unknown".into(), |[one, five, _]| format!("{one:.2} {five:.2}"))
}

/// The profile of so many ranks: the given file, or the cached one.
fn model(args: &ProfileArgs, ranks: usize) -> Result<(CostModel, LabOptions)> {
    let (fingerprint, options) = settle(args, ranks);
    let path: PathBuf = args.profile.clone().unwrap_or_else(|| default_path(&fingerprint));
    Ok((load(&path, &fingerprint)?, options))
}

fn check(args: &ProfileArgs, number: usize) -> Result<()> {
    let cells: Vec<Cell> = cells(args.seed, number)?;
    let chosen = cells.iter().filter(|cell| args.profile.is_none() || cell.ranks == args.data_parallel_size);
    let chosen: Vec<&Cell> = chosen.collect();
    if chosen.is_empty() {
        bail!("none of {number} cells has {} ranks: ask for more", args.data_parallel_size);
    }
    let mut models: BTreeMap<usize, (CostModel, LabOptions)> = BTreeMap::new();
    for cell in &chosen {
        if let Entry::Vacant(vacant) = models.entry(cell.ranks) {
            vacant.insert(model(args, cell.ranks)?);
        }
    }
    let bar = output::step_bar("verifying", chosen.len());
    let (mut outcomes, mut regrets) = (Vec::new(), Vec::new());
    for cell in chosen {
        let (cost, options) = &models[&cell.ranks];
        if args.regret {
            regrets.push(regret(cell, cost, options, PAIRS)?);
        } else {
            outcomes.push(verify(cell, cost, options, REPEATS)?);
        }
        bar.inc(1);
    }
    bar.finish_and_clear();
    if args.json {
        return output::show_line(json!({
            "seed": args.seed,
            "load": load_text(),
            "cells": outcomes,
            "regrets": regrets,
        }));
    }
    let percent = |permille: u64| permille as f64 / 10.0;
    for regret in &regrets {
        let (low, high) = regret.interval;
        output::show_line(format_args!(
            "{:6.1} % of the best, {:6.1} % of one stage ({:.1} to {:.1}): {}",
            percent(regret.against_best),
            percent(regret.against_one_stage),
            percent(low),
            percent(high),
            regret.what
        ))?;
    }
    if args.regret {
        return Ok(());
    }
    outcomes.sort_by_key(|outcome| std::cmp::Reverse(outcome.error()));
    for Outcome { what, predicted_ns, measured_ns, predicted, measured, .. } in outcomes.iter().take(10) {
        output::show_line(format_args!(
            "predicted {:.2} ms, measured {:.2} ms: {what}\n  predicted {predicted:?}\n  measured  {measured:?}",
            *predicted_ns as f64 / 1e6,
            *measured_ns as f64 / 1e6
        ))?;
    }
    let spread = |steady: bool| {
        Spread::of(outcomes.iter().filter(|outcome| outcome.is_steady() == steady).map(Outcome::error))
    };
    for (what, steady) in [("steady", true), ("varying over 4 %", false)] {
        let Spread { cells, median, p90, worst } = spread(steady);
        output::show_line(format_args!(
            "{cells} cells {what}: median {:.1} %, 90th percentile {:.1} %, worst {:.1} % off",
            percent(median),
            percent(p90),
            percent(worst)
        ))?;
    }
    Ok(())
}
