//! `epsmoe profile`: what the work of an MoE layer costs on this machine.

use crate::args::{DeviceKind, Dtype, ProfileArgs};
use crate::{machine, output};
use anyhow::{Result, bail};
use epsmoe_base::{DType, FaultCell, Rank, cores};
use epsmoe_device::cpu::gemm::Isa;
use epsmoe_device::cuda::{CudaBackend, CudaDevice, CudaOptions, CudaWeights};
use epsmoe_pipeline::PipelineError;
use epsmoe_plan::{CostModel, Machine, TileCost};
use epsmoe_profile::{
    Effort, EmulatedEffort, Fingerprint, Kept, RigOptions, default_path, measure, measure_emulated, prepare,
    store,
};
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
        // Where that of a GPU goes is known once the GPU is open.
        if args.device == DeviceKind::Cpu || args.out.is_some() {
            prepare(&place(args, &settle(args, ranks).0))?;
        }
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
    let threads = args.threads.unwrap_or((cores() / ranks).max(1));
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

/// What work costs on a GPU, as the first of some ranks.
fn on_gpu(args: &ProfileArgs, number: usize, ranks: usize) -> Result<(Fingerprint, CostModel)> {
    let dtype = match args.dtype {
        Dtype::Auto | Dtype::Bfloat16 => DType::BF16,
        Dtype::Float32 => DType::F32,
    };
    let gpu = CudaDevice::open(number)?;
    gpu.finish_kernels()?;
    let fingerprint = Fingerprint::of_gpu(gpu.describe(), ranks, dtype);
    let (machine, kernels) = (fingerprint.machine(), fingerprint.kernels());
    let mut start = CostModel { machine, kernels, dtype, ..Machine::built_in("8xH200")?.cost() };
    if gpu.multiplies_by_tiles(dtype) {
        let tiles = Some(TileCost::hopper(gpu.multiprocessors()));
        (start.grouped.tiles, start.dense.tiles) = (tiles, tiles);
    }
    let effort = EmulatedEffort::full(Duration::from_secs_f64(args.max_seconds));
    let bar = output::step_bar(format!("profiling one of {}", epsmoe_base::count(ranks, "rank")), 1);
    let processor = |faults: &FaultCell, epoch: Instant| -> Result<CudaBackend, PipelineError> {
        let weights = CudaWeights::new(&gpu)?;
        let options = CudaOptions { faults: faults.clone(), epoch, ..CudaOptions::new(dtype) };
        Ok(CudaBackend::new(Rank(0), &gpu, &weights, options)?)
    };
    let cost = measure_emulated(processor, &start, ranks, &effort, &mut |done, of| {
        bar.set_length(of as u64);
        bar.set_position(done as u64);
    });
    bar.finish_and_clear();
    Ok((fingerprint, cost?))
}

fn on_cpu(args: &ProfileArgs, ranks: usize) -> Result<(Fingerprint, CostModel)> {
    let (fingerprint, options) = settle(args, ranks);
    let path = place(args, &fingerprint);
    let bar = output::step_bar(format!("profiling {}", epsmoe_base::count(ranks, "rank")), 1);
    let effort = Effort::full(Duration::from_secs_f64(args.max_seconds));
    let (dtype, Effort { shapes, rows, .. }) = (options.dtype, &effort);
    let mut kept = Kept::beside(&path, &fingerprint, &format!("{dtype}, {shapes:?}, {rows:?}"));
    let cost = measure(&fingerprint, &options, &effort, &mut kept, &mut |done, of| {
        bar.set_length(of as u64);
        bar.set_position(done as u64);
    });
    bar.finish_and_clear();
    Ok((fingerprint, cost?))
}

fn profile(args: &ProfileArgs, ranks: usize) -> Result<Value> {
    let (begun, load_before) = (Instant::now(), load_text());
    let (fingerprint, cost) = match args.device {
        DeviceKind::Cpu => on_cpu(args, ranks)?,
        DeviceKind::Cuda => on_gpu(args, 0, ranks)?,
        DeviceKind::CudaAt(number) => on_gpu(args, number, ranks)?,
        DeviceKind::Auto | DeviceKind::Reference => bail!("profile measures --device cpu or cuda"),
    };
    let path = place(args, &fingerprint);
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
