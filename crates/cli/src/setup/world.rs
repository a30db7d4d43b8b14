//! Engines over ranks that are processes: rank 0 finds the others and starts those that are its own, and says what they
//! are to run; the others do as they are told.

use super::Setup;
use super::rows::Rows;
use crate::args::{ActivationScheme, FabricKind, RunArgs, run_args};
use crate::launch::{Crew, Launch};
use crate::output::flattened;
use anyhow::{Context, Result, anyhow};
use epsmoe_base::{Fault, FaultCell, FaultKind, Place, Rank, hash_bytes};
use epsmoe_engine::Workers;
use epsmoe_fabric::process::{Lobby, Processes, WorldOptions, join};
use serde::{Deserialize, Serialize};
use std::net::ToSocketAddrs;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// What rank 0 tells everybody who has come.
#[derive(Serialize, Deserialize)]
struct Charter {
    /// The flags of the model, as if they were typed.
    flags: Vec<String>,
    /// The vector instructions that rank 0 computes with: others could give other bits.
    isa: String,
    /// What rows travel by.
    fabric: FabricKind,
    /// What rows become for weights in codes where rank 0 computes, and so everywhere.
    activations: ActivationScheme,
}

/// A world whose rank 0 is here. The others end when it is dropped, and then those that it started are gone.
pub(crate) struct World {
    pub(crate) workers: Arc<Workers>,
    _crew: Crew,
}

impl Setup {
    /// The processes of the world, if it is made of such: all come now, if they have not yet.
    pub(super) fn world(&self) -> Result<Option<&World>> {
        let Some(launch) = &self.launch else { return Ok(None) };
        if let Some(world) = self.world.get() {
            return Ok(Some(world));
        }
        let options = options(launch, self.timeout, self.timeout, Some(digest(&self.flags)))?;
        let (secret, faults) = (options.secret.clone(), options.faults.clone());
        let (host, port) = &launch.master;
        let lobby = Lobby::open((host, *port), launch.size, options)?;
        let one_gpu = self.processor.sharing().is_some();
        let mut crew = Crew::start(launch, lobby.address(), &secret, &faults, one_gpu)?;
        let charter = Charter {
            flags: self.flags.clone(),
            isa: self.isa.to_string(),
            fabric: self.rows.kind,
            activations: self.activations,
        };
        let processes = lobby.wait(&serde_json::to_string(&charter)?, || crew.check())?;
        self.agree(&processes)?;
        let world = World { workers: Workers::new(processes), _crew: crew };
        Ok(Some(self.world.get_or_init(|| world)))
    }

    /// Finds a rank that would load another model than rank 0.
    fn agree(&self, processes: &Processes) -> Result<()> {
        let mine = self.model.digest()?.to_le_bytes().to_vec();
        let all = processes.control().exchange("model", Place::default(), mine)?;
        let Some(other) = all.iter().position(|theirs| *theirs != all[0]) else { return Ok(()) };
        let (members, model) = (processes.members(), &self.model.name);
        let message = format!(
            "{} has another checkpoint at {model} than {}: copy it from there, or say where the right one is (`epsmoe \
             worker --model`)",
            members[other], members[0]
        );
        Err(raise(processes, message).into())
    }
}

/// What the processes of a launch have in common.
fn options(
    launch: &Launch,
    patience: Duration,
    timeout: Duration,
    flags: Option<u64>,
) -> Result<WorldOptions> {
    Ok(WorldOptions {
        patience,
        timeout,
        faults: FaultCell::default(),
        secret: launch.secret()?,
        version: env!("CARGO_PKG_VERSION").into(),
        flags,
    })
}

fn digest(flags: &[String]) -> u64 {
    hash_bytes(flags.join("\n").as_bytes())
}

fn raise(processes: &Processes, message: String) -> Fault {
    let fault = Fault { kind: FaultKind::Invalid, rank: processes.rank(), place: Place::default(), message };
    processes.faults().raise(fault)
}

/// Why a worker ended.
pub(crate) struct Stopped {
    pub(crate) fault: Fault,
    /// Whether rank 0 knows.
    pub(crate) told: bool,
}

/// How a rank other than 0 takes part.
pub(crate) struct Worker<'a> {
    pub(crate) launch: &'a Launch,
    /// The flags that it was started with, if it was started like rank 0.
    pub(crate) args: Option<&'a RunArgs>,
    /// Where its model is, if not where rank 0 says.
    pub(crate) model: Option<String>,
    /// How long it waits for the others to come.
    pub(crate) patience: Duration,
}

impl Worker<'_> {
    /// Does what rank 0 orders, until it says goodbye. The inner error is that of the world.
    pub(crate) fn run(&self) -> Result<Result<(), Stopped>> {
        let launch = self.launch;
        let flags = self.args.map(|args| digest(&args.flags));
        let options = options(launch, self.patience, self.patience, flags)?;
        let (host, port) = &launch.master;
        let address = (host.as_str(), *port);
        let _siblings = if launch.children.is_empty() {
            None
        } else {
            let master = address.to_socket_addrs().ok().and_then(|mut addresses| addresses.next());
            let master = master.with_context(|| format!("--master-addr {host} has no address"))?;
            Some(Crew::start(launch, master, &options.secret, &options.faults, false)?)
        };
        let (processes, charter) = join(address, Rank(launch.rank), Some(launch.size), &options)?;
        let mut rows = Rows::by(FabricKind::Tcp)?;
        let ended = self.take_part(&processes, &charter, &mut rows).map_err(|error| {
            let fault = match error.downcast::<Fault>() {
                Ok(fault) => processes.faults().raise(fault),
                Err(error) => raise(&processes, flattened(&error)),
            };
            Stopped { fault, told: processes.is_told() }
        });
        // Goodbye first: what rows travelled by ends when everybody has said it.
        drop(processes);
        Ok(ended)
    }

    fn take_part(&self, processes: &Processes, charter: &str, rows: &mut Rows) -> Result<()> {
        let charter: Charter = serde_json::from_str(charter).context("rank 0 said what is no charter")?;
        let mut args = run_args(&charter.flags)?;
        if let Some(model) = &self.model {
            args.model.model.clone_from(model);
        }
        if args.isa.is_none() {
            args.isa = Some(charter.isa.parse().map_err(|problem| anyhow!("{problem}"))?);
        }
        args.activation_scheme = charter.activations;
        *rows = Rows::by(charter.fabric)?;
        let setup = Setup { rows: rows.clone(), ..Setup::of_worker(&args, self.launch.clone())? };
        setup.agree(processes)?;
        setup.work(processes)
    }
}

/// The time that all ranks count from.
pub(super) fn begin(processes: &Processes) -> Result<Instant, Fault> {
    processes.control().barrier(Place::default())?;
    Ok(Instant::now())
}
