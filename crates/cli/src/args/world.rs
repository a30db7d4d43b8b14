//! Whether ranks are processes, and where rank 0 waits for them.

use super::values::bounded;
use super::values::seconds;
use clap::{Args, ValueEnum};
use serde::{Deserialize, Serialize};

const RANKS: &str = "Processes";

/// What every command that runs a model takes about processes.
#[derive(Args, Clone, Debug)]
pub(crate) struct WorldArgs {
    /// Ranks are threads of this process, or each is a process, which this one starts [default: process where torchrun,
    /// mpirun, srun or --nnodes start them, else thread]
    #[arg(long, env = "EPSMOE_DISTRIBUTED_EXECUTOR_BACKEND", value_enum, value_name = "KIND", help_heading = RANKS)]
    pub(crate) distributed_executor_backend: Option<ExecutorBackend>,

    /// Machines that the ranks are on; the same command is started on each, with the number of the machine
    #[arg(
        long,
        env = "EPSMOE_NNODES",
        value_name = "MACHINES",
        default_value = "1",
        value_parser = bounded(1, 1024),
        help_heading = RANKS
    )]
    pub(crate) nnodes: usize,

    /// Which of them this is; the first, 0, has rank 0
    #[arg(
        long,
        env = "EPSMOE_NODE_RANK",
        value_name = "NUMBER",
        default_value = "0",
        value_parser = bounded(0, 1023),
        help_heading = RANKS
    )]
    pub(crate) node_rank: usize,

    /// What rows travel between processes by; mpi where the program was built with it and mpirun starts the ranks
    #[arg(
        long,
        env = "EPSMOE_FABRIC",
        value_enum,
        value_name = "KIND",
        default_value_t = FabricKind::Tcp,
        help_heading = RANKS
    )]
    pub(crate) fabric: FabricKind,

    /// Address that rank 0 waits for the others at [default: what the launcher says, or this machine alone]
    #[arg(long, env = "EPSMOE_MASTER_ADDR", value_name = "HOST", help_heading = RANKS)]
    pub(crate) master_addr: Option<String>,

    /// Port of it [default: what the launcher says, or 29500]
    #[arg(long, env = "EPSMOE_MASTER_PORT", value_name = "PORT", help_heading = RANKS)]
    pub(crate) master_port: Option<u16>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum ExecutorBackend {
    Thread,
    #[value(alias = "mp")]
    Process,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
pub(crate) enum FabricKind {
    Tcp,
    Mpi,
}

#[derive(Args, Debug)]
#[command(after_help = "\
A worker has no flags of its own for the model: it takes them from rank 0, which is `epsmoe serve`, `generate`, `bench` or
any other command that runs a model. All ranks must know the same secret, EPSMOE_SECRET.

Examples:
  EPSMOE_SECRET=… mpirun -x EPSMOE_SECRET -np 1 epsmoe serve ./model -dp 4 -ep : -np 3 epsmoe worker
  EPSMOE_SECRET=… epsmoe worker --nnodes 2 --node-rank 1 --nproc-per-node 2 --master-addr 10.0.0.1")]
pub(crate) struct WorkerArgs {
    #[command(flatten)]
    pub(crate) world: WorldArgs,

    /// Ranks of this machine, with --nnodes
    #[arg(long, value_name = "RANKS", default_value = "1", value_parser = bounded(1, 1024), help_heading = RANKS)]
    pub(crate) nproc_per_node: usize,

    /// Where the model is on this machine [default: where rank 0 says]
    #[arg(long, value_name = "MODEL")]
    pub(crate) model: Option<String>,

    /// Longest wait for the other ranks to come, in seconds
    #[arg(long, env = "EPSMOE_TIMEOUT", value_name = "SECONDS", default_value = "300", value_parser = seconds)]
    pub(crate) timeout: f64,

    /// The process that started this one, and that it ends with
    #[arg(long, hide = true)]
    pub(crate) child_of: Option<u32>,
}
