//! Which process of which world this is: as the variables of a launcher say, or as flags do. And the processes that one
//! starts itself.

use crate::args::{ExecutorBackend, RunArgs, WorkerArgs, WorldArgs};
use anyhow::{Context, Result, anyhow, bail};
use epsmoe_base::{FaultCell, count, env};
use epsmoe_fabric::process::Secret;
use std::net::SocketAddr;
use std::ops::Range;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// The port that the field's launchers have rank 0 wait at.
const PORT: u16 = 29500;

const HERE: &str = "127.0.0.1";

/// Variables that say which process of how many this is.
struct Launcher {
    name: &'static str,
    rank: &'static str,
    size: &'static str,
    /// Processes on this machine, and which of them this is.
    neighbours: &'static str,
    local: &'static str,
}

/// By how much they promise that the process was started by them.
const LAUNCHERS: [Launcher; 4] = [
    Launcher {
        name: "torchrun",
        rank: "RANK",
        size: "WORLD_SIZE",
        neighbours: "LOCAL_WORLD_SIZE",
        local: "LOCAL_RANK",
    },
    Launcher {
        name: "Open MPI",
        rank: "OMPI_COMM_WORLD_RANK",
        size: "OMPI_COMM_WORLD_SIZE",
        neighbours: "OMPI_COMM_WORLD_LOCAL_SIZE",
        local: "OMPI_COMM_WORLD_LOCAL_RANK",
    },
    Launcher {
        name: "MPICH",
        rank: "PMI_RANK",
        size: "PMI_SIZE",
        neighbours: "MPI_LOCALNRANKS",
        local: "MPI_LOCALRANKID",
    },
    Launcher {
        name: "Slurm",
        rank: "SLURM_PROCID",
        size: "SLURM_STEP_NUM_TASKS",
        neighbours: "SLURM_STEP_TASKS_PER_NODE",
        local: "SLURM_LOCALID",
    },
];

/// A process of a world of several.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Launch {
    pub(crate) rank: usize,
    pub(crate) size: usize,
    /// Ranks on this machine, and the position of this one among them: the number of its GPU.
    pub(crate) neighbours: usize,
    pub(crate) local: usize,
    /// Where rank 0 waits; port 0 is any.
    pub(crate) master: (String, u16),
    /// Ranks that this process starts.
    pub(crate) children: Range<usize>,
    /// Who says so.
    by: &'static str,
}

impl Launch {
    /// What the flags of a command and the environment say; nothing if the ranks are threads of this process.
    pub(crate) fn find(args: &RunArgs) -> Result<Option<Self>> {
        let ranks = args.data_parallel_size.saturating_mul(args.tensor_parallel_size);
        let launch = Self::read(&args.world, ranks, ranks.div_ceil(args.world.nnodes), env::text)?;
        if let Some(Launch { size, by, .. }) = launch.as_ref().filter(|launch| launch.size != ranks) {
            bail!(
                "{by} started {size} processes, but --data-parallel-size {} times --tensor-parallel-size {} are {}: \
                 make the two equal, or add --distributed-executor-backend thread to run in each process alone",
                args.data_parallel_size,
                args.tensor_parallel_size,
                count(ranks, "rank")
            );
        }
        Ok(launch)
    }

    /// The same for a worker.
    pub(crate) fn of_worker(args: &WorkerArgs) -> Result<Self> {
        let ranks = args.nproc_per_node.saturating_mul(args.world.nnodes);
        let launch = Self::read(&args.world, ranks, args.nproc_per_node, env::text)?;
        let launch = launch.context(
            "a worker is one rank of several: start it by torchrun, mpirun or srun, or say which machine of how many \
             this is (--nnodes, --node-rank, --master-addr)",
        )?;
        if launch.rank == 0 {
            bail!("a worker cannot be rank 0: start a command that runs a model there, like `epsmoe serve`");
        }
        Ok(launch)
    }

    fn read(
        args: &WorldArgs,
        ranks: usize,
        of_node: usize,
        variable: impl Fn(&str) -> Option<String>,
    ) -> Result<Option<Self>> {
        if args.distributed_executor_backend == Some(ExecutorBackend::Thread) {
            if args.nnodes > 1 {
                bail!(
                    "--nnodes {} needs processes, but --distributed-executor-backend says thread: leave one out",
                    args.nnodes
                );
            }
            return Ok(None);
        }
        for launcher in &LAUNCHERS {
            if let Some(launch) = launcher.read(args, &variable)? {
                return Ok(Some(launch));
            }
        }
        if args.nnodes > 1 {
            return Self::of_node(args, ranks, of_node).map(Some);
        }
        let wanted = args.distributed_executor_backend == Some(ExecutorBackend::Process) && ranks > 1;
        Ok(wanted.then(|| Launch {
            rank: 0,
            size: ranks,
            neighbours: ranks,
            local: 0,
            master: (args.master_addr.clone().unwrap_or(HERE.into()), args.master_port.unwrap_or(0)),
            children: 1..ranks,
            by: "--distributed-executor-backend",
        }))
    }

    fn of_node(args: &WorldArgs, ranks: usize, of_node: usize) -> Result<Self> {
        let (nodes, node) = (args.nnodes, args.node_rank);
        if node >= nodes {
            bail!("--node-rank {node} is none of --nnodes {nodes}: they are numbered from 0");
        }
        if of_node * nodes != ranks {
            bail!("{} cannot be dealt out evenly to --nnodes {nodes}: change either", count(ranks, "rank"));
        }
        let Some(host) = args.master_addr.clone() else {
            bail!("--nnodes {nodes} needs the address of the first machine: add --master-addr");
        };
        let rank = node * of_node;
        Ok(Launch {
            rank,
            size: ranks,
            neighbours: of_node,
            local: 0,
            master: (host, args.master_port.unwrap_or(PORT)),
            children: rank + 1..rank + of_node,
            by: "--nnodes",
        })
    }

    /// The same for a second world beside this one, with processes and a port of its own.
    pub(crate) fn beside(self) -> Result<Self> {
        if self.children != (1..self.size) {
            bail!(
                "processes that {} starts have one model: compare two on one machine, where --distributed-executor-backend \
                 process starts some for each, or thread needs none",
                self.by
            );
        }
        Ok(Launch { master: (self.master.0, 0), ..self })
    }

    /// What all ranks must know.
    pub(crate) fn secret(&self) -> Result<Secret> {
        match env::text("EPSMOE_SECRET") {
            Some(text) => Secret::chosen(&text).map_err(|problem| anyhow!("EPSMOE_SECRET: {problem}")),
            // All others are children of this process.
            None if self.children == (1..self.size) => Secret::random().context("cannot make a secret"),
            None => bail!(
                "ranks that {} starts must know a secret, or anybody could join them: export \
                 EPSMOE_SECRET=$(openssl rand -hex 16) to all of them",
                self.by
            ),
        }
    }
}

impl Launcher {
    fn read(&self, args: &WorldArgs, variable: impl Fn(&str) -> Option<String>) -> Result<Option<Launch>> {
        let number = |name: &str| -> Result<Option<usize>> {
            let Some(text) = variable(name) else { return Ok(None) };
            // Slurm writes `2(x3)` for two on each of three machines.
            let digits = text.split(|c: char| !c.is_ascii_digit()).next().unwrap_or_default();
            let number = digits.parse().ok();
            number.map(Some).with_context(|| format!("{name} is `{text}`, which is no number: unset it"))
        };
        let Some((rank, size)) = number(self.rank)?.zip(number(self.size)?) else { return Ok(None) };
        if size <= 1 {
            return Ok(None);
        }
        if rank >= size {
            bail!("{} is {rank}, but {} is {size}: ranks are numbered from 0", self.rank, self.size);
        }
        let neighbours = number(self.neighbours)?.unwrap_or(1).clamp(1, size);
        let local = number(self.local)?.unwrap_or(rank % neighbours);
        let first_node = || variable("SLURM_STEP_NODELIST").map(|nodes| first_of(&nodes));
        let alone = (neighbours == size).then(|| HERE.to_owned());
        let host = args.master_addr.clone().or_else(|| variable("MASTER_ADDR")).or_else(first_node).or(alone);
        let Some(host) = host else {
            bail!(
                "{} started ranks on several machines: say where rank 0 is (--master-addr, or MASTER_ADDR)",
                self.name
            );
        };
        let said = match variable("MASTER_PORT") {
            // torchrun itself may wait there.
            Some(text) => {
                let port: u16 =
                    text.parse().ok().with_context(|| format!("MASTER_PORT is `{text}`: unset it"))?;
                let taken = variable("TORCHELASTIC_USE_AGENT_STORE").is_some_and(|it| it == "True");
                port.saturating_add(u16::from(taken))
            }
            None => PORT,
        };
        let master = (host, args.master_port.unwrap_or(said));
        Ok(Some(Launch { rank, size, neighbours, local, master, children: 0..0, by: self.name }))
    }
}

/// The first machine of a list as Slurm writes it: `n[03-07,9],m` begins with `n03`.
fn first_of(nodes: &str) -> String {
    let end = |text: &str, stops: &[char]| text.find(stops).unwrap_or(text.len());
    match nodes.split_once('[') {
        Some((name, numbers)) if !name.contains(',') => {
            let (number, rest) = (&numbers[..end(numbers, &['-', ',', ']'])], numbers.split_once(']'));
            let after = rest.map_or("", |(_, after)| &after[..end(after, &[','])]);
            format!("{name}{number}{after}")
        }
        _ => nodes[..end(nodes, &[','])].to_owned(),
    }
}

/// Workers that this process started. They end with it, and are gone when it is dropped.
pub(crate) struct Crew {
    children: Vec<(usize, Child)>,
    faults: FaultCell,
}

impl Crew {
    /// How long workers may take to end when their world has, in peace or not.
    const PATIENCE: Duration = Duration::from_secs(5);
    const STOPPED: Duration = Duration::from_millis(500);

    /// Starts the children of a launch; rank 0 waits at `master`, and `faults` says when their world has stopped. If all
    /// share one GPU, NCCL has to be told that they are machines of their own, or it would refuse them.
    pub(crate) fn start(
        launch: &Launch,
        master: SocketAddr,
        secret: &Secret,
        faults: &FaultCell,
        one_gpu: bool,
    ) -> Result<Self> {
        let program = std::env::current_exe().context("cannot find this program to start it again")?;
        let mut crew = Crew { children: Vec::new(), faults: faults.clone() };
        for rank in launch.children.clone() {
            let mut command = Command::new(&program);
            // Flags come from rank 0; variables would overrule them.
            for (name, _) in
                std::env::vars_os().filter(|(name, _)| name.as_encoded_bytes().starts_with(b"EPSMOE_"))
            {
                command.env_remove(name);
            }
            command
                .arg("worker")
                .arg("--master-addr")
                .arg(master.ip().to_string())
                .arg("--master-port")
                .arg(master.port().to_string())
                .arg("--child-of")
                .arg(std::process::id().to_string())
                .env("RANK", rank.to_string())
                .env("WORLD_SIZE", launch.size.to_string())
                .env("LOCAL_WORLD_SIZE", launch.neighbours.to_string())
                .env("LOCAL_RANK", (rank - launch.rank + launch.local).to_string())
                // The secret never stands where other users see it.
                .env("EPSMOE_SECRET", secret.reveal())
                .stdin(Stdio::null());
            if one_gpu {
                command.env("NCCL_HOSTID", format!("epsmoe-{rank}"));
            }
            let child = command.spawn().with_context(|| format!("cannot start a process for rank {rank}"))?;
            crew.children.push((rank, child));
        }
        Ok(crew)
    }

    /// Finds one that has ended.
    pub(crate) fn check(&mut self) -> Result<(), String> {
        for (rank, child) in &mut self.children {
            if let Ok(Some(status)) = child.try_wait() {
                return Err(format!(
                    "rank {rank} (process {}) ended before the world was there: {status}",
                    child.id()
                ));
            }
        }
        Ok(())
    }
}

impl Drop for Crew {
    fn drop(&mut self) {
        let patience = if self.faults.get().is_some() { Self::STOPPED } else { Self::PATIENCE };
        let begun = Instant::now();
        for (_, child) in &mut self.children {
            while matches!(child.try_wait(), Ok(None)) && begun.elapsed() < patience {
                std::thread::sleep(Duration::from_millis(5));
            }
            // Those that have ended do not mind.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Typed {
        #[command(flatten)]
        world: WorldArgs,
    }

    fn launch(words: &str, ranks: usize, variables: &str) -> Result<Option<Launch>> {
        let typed = Typed::parse_from(std::iter::once("epsmoe").chain(words.split_whitespace())).world;
        let variable = |name: &str| {
            let pairs = variables.split_whitespace().filter_map(|pair| pair.split_once('='));
            pairs.into_iter().find(|(key, _)| *key == name).map(|(_, value)| value.to_owned())
        };
        Launch::read(&typed, ranks, ranks.div_ceil(typed.nnodes), variable)
    }

    fn found(words: &str, ranks: usize, variables: &str) -> (usize, usize, usize, String, Range<usize>) {
        let Launch { rank, size, neighbours, master, children, .. } =
            launch(words, ranks, variables).unwrap().expect("processes");
        (rank, size, neighbours, format!("{}:{}", master.0, master.1), children)
    }

    fn refused(words: &str, ranks: usize, variables: &str) -> String {
        launch(words, ranks, variables).unwrap_err().to_string()
    }

    #[test]
    fn launchers_are_known_by_their_variables() {
        let torchrun = "RANK=3 WORLD_SIZE=4 LOCAL_RANK=1 LOCAL_WORLD_SIZE=2 MASTER_ADDR=a MASTER_PORT=123";
        assert_eq!(found("", 4, torchrun), (3, 4, 2, "a:123".into(), 0..0));
        let agent = format!("{torchrun} TORCHELASTIC_USE_AGENT_STORE=True");
        assert_eq!(found("", 4, &agent).3, "a:124");
        assert_eq!(found("--master-addr b --master-port 5", 4, &agent).3, "b:5");
        let mpi = "OMPI_COMM_WORLD_RANK=1 OMPI_COMM_WORLD_SIZE=2 OMPI_COMM_WORLD_LOCAL_SIZE=2";
        assert_eq!(found("", 2, mpi), (1, 2, 2, "127.0.0.1:29500".into(), 0..0));
        assert_eq!(
            found("", 2, "PMI_RANK=0 PMI_SIZE=2 MPI_LOCALNRANKS=2"),
            (0, 2, 2, "127.0.0.1:29500".into(), 0..0)
        );
        let slurm = "SLURM_PROCID=2 SLURM_STEP_NUM_TASKS=6 SLURM_STEP_TASKS_PER_NODE=2(x3) SLURM_STEP_NODELIST=n[03-05]";
        assert_eq!(found("", 6, slurm), (2, 6, 2, "n03:29500".into(), 0..0));
    }

    #[test]
    fn each_process_knows_its_place_on_its_machine() {
        let local =
            |words: &str, ranks, variables: &str| launch(words, ranks, variables).unwrap().unwrap().local;
        assert_eq!(local("", 4, "RANK=3 WORLD_SIZE=4 LOCAL_WORLD_SIZE=2 LOCAL_RANK=0 MASTER_ADDR=a"), 0);
        assert_eq!(local("", 4, "RANK=3 WORLD_SIZE=4 LOCAL_WORLD_SIZE=2 MASTER_ADDR=a"), 1);
        assert_eq!(local("", 4, "PMI_RANK=3 PMI_SIZE=4 MPI_LOCALNRANKS=4 MPI_LOCALRANKID=3"), 3);
        assert_eq!(local("--nnodes 2 --node-rank 1 --master-addr a", 6, ""), 0);
    }

    #[test]
    fn flags_make_processes_too() {
        assert_eq!(
            found("--distributed-executor-backend process", 4, ""),
            (0, 4, 4, "127.0.0.1:0".into(), 1..4)
        );
        let node = "--nnodes 2 --node-rank 1 --master-addr a";
        assert_eq!(found(node, 6, ""), (3, 6, 3, "a:29500".into(), 4..6));
        for (words, ranks, variables) in [
            ("", 4, ""),
            ("--distributed-executor-backend process", 1, ""),
            ("", 4, "RANK=0 WORLD_SIZE=1"),
            // A batch script of Slurm is no step.
            ("", 4, "SLURM_PROCID=0 SLURM_NTASKS=4"),
            ("--distributed-executor-backend thread", 4, "RANK=0 WORLD_SIZE=4 MASTER_ADDR=a"),
        ] {
            assert_eq!(launch(words, ranks, variables).unwrap(), None, "{words} {variables}");
        }
    }

    #[test]
    fn what_makes_no_world_is_refused() {
        assert!(refused("", 4, "RANK=x WORLD_SIZE=4").starts_with("RANK is `x`"));
        assert!(refused("", 4, "RANK=4 WORLD_SIZE=4").starts_with("RANK is 4, but WORLD_SIZE is 4"));
        assert!(refused("", 4, "PMI_RANK=0 PMI_SIZE=4").contains("--master-addr"));
        assert!(refused("--nnodes 2", 4, "").contains("--master-addr"));
        assert!(refused("--nnodes 2 --master-addr a --node-rank 2", 4, "").contains("--node-rank 2 is none"));
        assert!(refused("--nnodes 3 --master-addr a", 4, "").contains("evenly"));
        assert!(refused("--nnodes 2 --distributed-executor-backend thread", 4, "").contains("leave one out"));
    }

    #[test]
    fn lists_of_machines() {
        for (list, first) in [
            ("a", "a"),
            ("a,b", "a"),
            ("n[1-4]", "n1"),
            ("n[03,7]-ib,m", "n03-ib"),
            ("a,n[1-4]", "a"),
            ("n[", "n"),
        ] {
            assert_eq!(first_of(list), first, "{list}");
        }
    }
}
