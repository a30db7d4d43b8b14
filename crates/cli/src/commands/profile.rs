//! `epsmoe profile`: what the work of an MoE layer costs on this machine.

use crate::args::{Dtype, ProfileArgs};
use crate::{machine, output};
use anyhow::{Result, bail};
use epsmoe_base::DType;
use epsmoe_device::cpu::gemm::Isa;
use epsmoe_profile::{Effort, Fingerprint, Kept, RigOptions, default_path, measure, prepare, store};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Measures this machine: one profile for every number of ranks.
pub(crate) fn run(args: &ProfileArgs) -> Result<()> {
    let mut written = args.json.iter().filter(|file| file.as_os_str() != "-");
    written.try_for_each(|file| output::check_place(file))?;
    if args.out.is_some() && args.data_parallel_size.len() > 1 {
        bail!("--out names one file, but there would be a profile for each of several numbers of ranks");
    }
    for &ranks in &args.data_parallel_size {
        prepare(&place(args, &settle(args, ranks).0))?;
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

/// Where a profile goes.
fn place(args: &ProfileArgs, fingerprint: &Fingerprint) -> PathBuf {
    args.out.clone().unwrap_or_else(|| default_path(fingerprint))
}

fn profile(args: &ProfileArgs, ranks: usize) -> Result<Value> {
    let (fingerprint, options) = settle(args, ranks);
    let path = place(args, &fingerprint);
    let (begun, load_before) = (Instant::now(), load_text());
    let bar = output::step_bar(format!("profiling {}", epsmoe_base::count(ranks, "rank")), 1);
    let effort = Effort::full(Duration::from_secs_f64(args.max_seconds));
    let (dtype, Effort { shapes, rows, .. }) = (options.dtype, &effort);
    let mut kept = Kept::beside(&path, &fingerprint, &format!("{dtype}, {shapes:?}, {rows:?}"));
    let cost = measure(&fingerprint, &options, &effort, &mut kept, &mut |done, of| {
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
