//! The contract of `epsmoe_fabric::contract` over MPI. Every rank is a process of its own, which goes through the same
//! checks at the same time: this program starts itself by `mpirun` (`EPSMOE_TEST_MPIRUN` is another, with its flags).

use epsmoe_base::{DType, FaultCell, Rank, env};
use epsmoe_device::reference::{self, PlainKernels, Reference};
use epsmoe_device::threaded::ThreadedOptions;
use epsmoe_fabric::contract::{self, Lanes, Node, PATIENT, Start, World};
use epsmoe_fabric::process::{Lobby, Mpi, Secret, WorldOptions, join};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

/// What is asked of a world.
type Check = fn(&World<'_, Reference>);

/// The most ranks that a check wants.
const RANKS: usize = 4;

fn main() -> ExitCode {
    match env::text("EPSMOE_TEST_FOLDER") {
        None => start_ranks(),
        Some(folder) => {
            be_a_rank(Path::new(&folder));
            ExitCode::SUCCESS
        }
    }
}

/// Runs this program on all ranks.
fn start_ranks() -> ExitCode {
    let by_default = if Mpi::library().starts_with("Open MPI") {
        "mpirun --allow-run-as-root --oversubscribe --bind-to none"
    } else {
        "mpirun"
    };
    let typed = env::text("EPSMOE_TEST_MPIRUN").unwrap_or(by_default.into());
    let mut words = typed.split_whitespace();
    let program = words.next().expect("a program that starts ranks");
    let folder = std::env::temp_dir().join(format!("epsmoe-mpi-{}", std::process::id()));
    std::fs::create_dir_all(&folder).expect("a folder for the ranks");
    let own = std::env::current_exe().expect("this program");
    let mut command = Command::new(program);
    command.args(words).args(["-np", &RANKS.to_string()]).arg(own);
    // The scripts of all ranks follow from one seed.
    command.env("EPSMOE_TEST_FOLDER", &folder).env("EPSMOE_TEST_SEED", env::test_seed().to_string());
    let status = command.status().unwrap_or_else(|error| panic!("cannot run {program}: {error}"));
    // Nobody needs it any more.
    let _ = std::fs::remove_dir_all(&folder);
    if status.success() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn be_a_rank(folder: &Path) {
    let mpi = Mpi::start().expect("MPI");
    let (me, size) = mpi.place();
    assert_eq!(size, RANKS, "EPSMOE_TEST_MPIRUN must start {RANKS} ranks");
    let worlds = AtomicUsize::new(0);
    let start = |start: Start| {
        // Every rank starts the same worlds; those with fewer ranks have nothing for the others to do.
        let number = worlds.fetch_add(1, Ordering::Relaxed);
        if me < start.size { vec![node(&mpi, folder, number, start)] } else { Vec::new() }
    };
    let world = World { most: RANKS, start: &start };
    let checks: [(&str, Check); 9] = [
        ("rows arrive where they are due", |world| contract::exchanges(world, Lanes::Transfer)),
        ("exchanges on several lanes keep apart", |world| contract::exchanges(world, Lanes::Any)),
        ("groups exchange among themselves", contract::subgroups),
        ("what was sent may be overwritten", contract::overwriting),
        ("parts for all ranks or a refusal", contract::refusals),
        ("everybody hears everybody", contract::messages),
        ("a rank that never comes is named", contract::late_ranks),
        ("ranks at different exchanges are seen", contract::differing_exchanges),
        ("ranks at different messages are seen", contract::differing_messages),
    ];
    if me == 0 {
        eprintln!("{}, {RANKS} processes, seed {}", Mpi::library(), env::test_seed());
    }
    for (name, check) in checks {
        check(&world);
        if me == 0 {
            eprintln!("test {name} ... ok");
        }
    }
    // MPI ends with all ranks at once: those that sat checks out wait here for the others.
    drop(start(Start { size: RANKS, seed: 0, timeout: PATIENT }));
}

/// This process's rank in a world, whose rank 0 leaves its address in a file.
fn node(mpi: &Mpi, folder: &Path, number: usize, start: Start) -> Node<Reference> {
    let (me, _) = mpi.place();
    let options = WorldOptions {
        patience: PATIENT,
        timeout: start.timeout,
        faults: FaultCell::default(),
        secret: Secret::chosen(&format!("the secret of world {number}")).expect("long enough"),
        version: "1".into(),
        flags: None,
    };
    let file = folder.join(number.to_string());
    let processes = if me == 0 {
        let lobby = Lobby::open(("127.0.0.1", 0), start.size, options).expect("a free port");
        leave(&file, &lobby.address().port().to_string());
        lobby.wait("", || Ok(())).expect("all come")
    } else {
        let port = found(&file).parse().expect("a port");
        join(("127.0.0.1", port), Rank(me), Some(start.size), &options).expect("all come").0
    };
    let host =
        ThreadedOptions { faults: processes.faults().clone(), ..reference::options(DType::BF16, start.seed) };
    let device = Reference::new(Rank(me), PlainKernels, Default::default(), host).expect("lane threads");
    Node { device, fabric: processes.mpi_fabric(mpi, None).expect("MPI knows these ranks") }
}

/// Writes a file that is whole when it is there.
fn leave(file: &PathBuf, text: &str) {
    let unfinished = file.with_extension("new");
    std::fs::write(&unfinished, text)
        .and_then(|()| std::fs::rename(&unfinished, file))
        .expect("room for a file");
}

fn found(file: &Path) -> String {
    let begun = Instant::now();
    loop {
        match std::fs::read_to_string(file) {
            Ok(text) => return text,
            Err(_) => assert!(begun.elapsed() < PATIENT, "rank 0 did not come"),
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}
