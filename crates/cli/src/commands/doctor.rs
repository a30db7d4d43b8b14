//! `epsmoe doctor`: what this machine is, and what works on it. One plain sentence each.

use crate::args::{self, Cli, Command, DoctorArgs, RunArgs};
use crate::machine::{self, Machine};
use crate::memory::{self, Bound};
use crate::output;
use crate::setup::{Demand, Setup, Started};
use anyhow::{Context, Result, bail};
use clap::FromArgMatches;
use epsmoe_base::{Bytes, env};
use epsmoe_device::DeviceError;
use epsmoe_device::cpu::gemm::Isa;
use epsmoe_device::cuda::{self, CACHE_VARIABLE, CudaDevice, Probes};
use epsmoe_engine::Request;
use epsmoe_plan::{Policy, Schedule};
use serde::Serialize;
use std::net::UdpSocket;
use std::sync::Arc;

#[derive(Serialize)]
struct Diagnosis {
    version: &'static str,
    machine: Machine,
    load_average: Option<[f64; 3]>,
    findings: Vec<Finding>,
    #[serde(skip_serializing_if = "Option::is_none")]
    probes: Option<Probes>,
}

/// One thing that was looked at.
#[derive(Serialize)]
struct Finding {
    works: bool,
    sentence: String,
}

/// Looks, tries, and says.
pub(crate) fn run(args: &DoctorArgs) -> Result<()> {
    let machine = Machine::look();
    let load_average = machine::load_average();
    let gpu = open_gpu(0);
    let mut findings = vec![
        cores(&machine, load_average),
        memory(),
        instructions(),
        pipeline("cpu"),
        processes(),
        fabrics(),
        cache(),
        first_gpu(&gpu),
    ];
    if let Ok(device) = &gpu {
        findings.push(kernels(device));
        findings.push(pipeline("cuda:0"));
        findings.extend(other_gpus(device));
        findings.push(nccl());
    }
    let probes = match &gpu {
        Ok(device) if args.probe => cuda::probe(device)
            .map_err(|error| findings.push(lacking(format!("The GPU could not be probed: {error}."))))
            .ok(),
        _ => None,
    };
    let diagnosis = Diagnosis { version: env!("CARGO_PKG_VERSION"), machine, load_average, findings, probes };
    if args.json {
        return output::show_json(&diagnosis);
    }
    output::show_line(format_args!("epsmoe {}", diagnosis.version))?;
    for Finding { works, sentence } in &diagnosis.findings {
        output::show_line(format_args!("{} {sentence}", if *works { "[ok]" } else { "[--]" }))?;
    }
    diagnosis.probes.as_ref().map_or(Ok(()), show_probes)
}

/// What was measured, in one table.
fn show_probes(probes: &Probes) -> Result<()> {
    output::show_line("\nWhat this GPU can be relied on for\n\n| | |\n|---|---|")?;
    for (name, value) in probes.capabilities.entries() {
        output::show_line(format_args!("| {name} | {value} |"))?;
    }
    Ok(())
}

fn fine(sentence: String) -> Finding {
    Finding { works: true, sentence }
}

fn lacking(sentence: String) -> Finding {
    Finding { works: false, sentence }
}

fn cores(machine: &Machine, load: Option<[f64; 3]>) -> Finding {
    let Machine { cpu, cores, .. } = machine;
    match load {
        Some([load, ..]) if load > *cores as f64 => lacking(format!(
            "The processor ({cpu}, {cores} threads usable) is busier than it has threads, load {load:.1}: measure \
             when it is not."
        )),
        Some([load, ..]) => fine(format!("The processor is {cpu}, {cores} threads usable, load {load:.1}.")),
        None => fine(format!("The processor is {cpu}, {cores} threads usable.")),
    }
}

fn memory() -> Finding {
    let Some(memory) = memory::look() else {
        return lacking(
            "The system does not say how much memory it has, so models too large are not refused.".into(),
        );
    };
    // Two bytes a parameter, and as much again for everything else.
    let billions = memory.available as f64 / 4e9;
    let bound = match memory.bound {
        Bound::Machine => String::new(),
        bound => format!(", which {} sets", bound.owner()),
    };
    fine(format!(
        "Memory that this process may use is {}{bound}, {} of it free: enough for about {billions:.1} billion \
         parameters.",
        Bytes(memory.total),
        Bytes(memory.available)
    ))
}

fn instructions() -> Finding {
    match Isa::detect() {
        Isa::Scalar => {
            lacking("There are no vector instructions that the kernels know: expect it to be slow.".into())
        }
        isa => fine(format!("Kernels use {isa}.")),
    }
}

/// What GPUs in several processes need.
fn nccl() -> Finding {
    match cuda::nccl_version() {
        Ok(version) => fine(format!(
            "Ranks on GPUs can be processes: NCCL {}.{}.{} is here.",
            version / 10_000,
            version / 100 % 100,
            version % 100
        )),
        Err(error) => lacking(format!("Ranks on GPUs can only be threads of one process: {error}.")),
    }
}

/// Runs a small model on two ranks of a device, serial and staged, and compares every bit.
fn pipeline(device: &str) -> Finding {
    match staged_equals_serial(device) {
        Ok(()) => fine(format!("A model on two ranks of {device} gives the same bits, serial and staged.")),
        Err(error) => {
            lacking(format!("A model on two ranks of {device} does not work: {}.", output::flattened(&error)))
        }
    }
}

fn staged_equals_serial(device: &str) -> Result<()> {
    let serial = Policy { schedule: Schedule::Serial, ..Policy::default() };
    let bits = trial(device, "thread", &[serial, Policy::default()])?;
    if bits[0] != bits[1] {
        bail!("the staged schedule gave other bits than the serial one; please report this");
    }
    Ok(())
}

/// Runs the same model on two processes, and says where others would be found.
fn processes() -> Finding {
    // Nothing is sent: the system only says from where it would be.
    let socket = UdpSocket::bind("0.0.0.0:0").and_then(|socket| {
        socket.connect("192.0.2.1:9")?;
        socket.local_addr()
    });
    let reached = socket.map_or("no other machine can be reached".into(), |address| {
        format!("other machines of a world would find this one at {} (--master-addr)", address.ip())
    });
    match processes_equal_threads() {
        Ok(()) => fine(format!("A model on two processes gives the bits of two threads; {reached}.")),
        Err(error) => lacking(format!(
            "A model on two processes does not work: {}; {reached}.",
            output::flattened(&error)
        )),
    }
}

fn processes_equal_threads() -> Result<()> {
    let policy = [Policy::default()];
    if trial("cpu", "process", &policy)? != trial("cpu", "thread", &policy)? {
        bail!("two processes gave other bits than two threads; please report this");
    }
    Ok(())
}

/// What rows can travel between processes by.
fn fabrics() -> Finding {
    #[cfg(feature = "mpi")]
    return fine(format!(
        "Rows travel between processes over TCP, or over {} (--fabric mpi, started by mpirun).",
        epsmoe_fabric::process::Mpi::library()
    ));
    #[cfg(not(feature = "mpi"))]
    fine(
        "Rows travel between processes over TCP; for MPI build this program with `--features mpi`, where an MPI \
         (libopenmpi-dev or libmpich-dev) and libclang are."
            .into(),
    )
}

/// Bits of the logits of a small model on two ranks, for each policy.
fn trial(device: &str, backend: &str, policies: &[Policy]) -> Result<Vec<Vec<u32>>> {
    let setup = Setup::new(&typed(device, backend)?)?;
    let demand = Demand { sequences: 1, tokens: 16, step: 16 };
    let options = policies.iter().map(|policy| setup.engine_options(demand, setup.parallel, policy));
    let mut bits = Vec::new();
    for Started { mut engine, .. } in setup.start_all(&options.collect::<Result<Vec<_>>>()?)? {
        let request = Request { prompt: (0..16).collect(), prompt_logits: true, ..Request::default() };
        let logits = engine.run(vec![request], |_| {})?.remove(0).prompt_logits;
        bits.push(logits.into_iter().map(f32::to_bits).collect());
    }
    Ok(bits)
}

/// The flags of the trial, as if they were typed.
fn typed(device: &str, backend: &str) -> Result<RunArgs> {
    let typed = ["epsmoe", "logits", "--model", "preset:mixtral-mini", "--ids", "0", "--out", "none"];
    let ranks = ["--data-parallel-size", "2", "--enable-expert-parallel", "--device", device];
    let typed = typed.into_iter().chain(ranks).chain(["--distributed-executor-backend", backend]);
    let matches = args::command().try_get_matches_from(typed)?;
    match Cli::from_arg_matches(&matches)?.command {
        Command::Logits(args) => Ok(RunArgs { flags: args::flags_of(&matches), ..args.run }),
        _ => None.context("another command was parsed. This is a bug"),
    }
}

fn cache() -> Finding {
    let set =
        ["HF_HUB_CACHE", "HF_HOME"].into_iter().find_map(|name| Some(format!("{name} {}", env::text(name)?)));
    let place = set.unwrap_or_else(|| "its usual place".into());
    fine(format!(
        "Models by org/name come from the Hugging Face cache ({place}); nothing is ever downloaded."
    ))
}

/// A GPU all of whose kernels are there.
fn open_gpu(number: usize) -> Result<Arc<CudaDevice>, DeviceError> {
    let device = CudaDevice::open(number)?;
    device.finish_kernels()?;
    Ok(device)
}

/// Where a GPU's kernels are kept.
fn kernels(device: &CudaDevice) -> Finding {
    match device.kernel_folder() {
        Some(folder) => fine(format!("Its kernels are compiled, and kept in {}.", folder.display())),
        None => lacking(format!(
            "Its kernels are compiled anew at every start, because there is no folder to keep them in: set {CACHE_VARIABLE}."
        )),
    }
}

fn first_gpu(gpu: &Result<Arc<CudaDevice>, DeviceError>) -> Finding {
    match gpu {
        Ok(device) => fine(format!("A GPU can be used: {}.", device.describe())),
        Err(missing) => lacking(format!("No GPU can be used: {missing}.")),
    }
}

/// What other GPUs there are, and how rows travel between each two of them.
fn other_gpus(first: &Arc<CudaDevice>) -> Vec<Finding> {
    let (mut findings, mut devices) = (Vec::new(), vec![Arc::clone(first)]);
    for number in 1..CudaDevice::count().unwrap_or(0) {
        match open_gpu(number) {
            Ok(device) => {
                findings.push(fine(format!("GPU {number} can be used: {}.", device.describe())));
                devices.push(device);
            }
            Err(missing) => findings.push(lacking(format!("GPU {number} cannot be used: {missing}."))),
        }
    }
    for (index, device) in devices.iter().enumerate() {
        for other in &devices[..index] {
            let pair = format!("between GPU {} and GPU {}", other.ordinal(), device.ordinal());
            findings.push(match device.connect(other) {
                Ok(true) => fine(format!("Rows travel {pair} directly.")),
                Ok(false) => lacking(format!(
                    "Rows travel {pair} by way of the host's memory, because neither reaches the other's: expect that to \
                     be slow."
                )),
                Err(error) => lacking(format!("Rows cannot travel {pair}: {error}.")),
            });
        }
    }
    findings
}
