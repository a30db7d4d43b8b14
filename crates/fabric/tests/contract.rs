//! The contract of `epsmoe_fabric::contract`, over the fabrics that there are and the processors of this machine; and
//! what only ranks that are threads do: faults on purpose, and links with a speed. `EPSMOE_TEST_SEED` repeats a run.
//!
//! On GPUs all ranks share the first one, and where there are several, each has its own. What needs a GPU is skipped where
//! there is none, unless `EPSMOE_TEST_ALL` says that nothing may be.

use epsmoe_base::{DType, Fault, FaultCell, FaultKind, Lane, Layer, Place, Rank, Stage, env};
use epsmoe_device::cpu::{CpuKernels, gemm::Isa};
use epsmoe_device::cuda::{self, CudaBackend, CudaDevice, CudaOptions, CudaWeights};
use epsmoe_device::reference::{self, PlainKernels, Reference};
use epsmoe_device::threaded::{Fill, Kernels, ThreadedBackend, ThreadedOptions, WeightStore};
use epsmoe_device::{Backend, Buffer, DeviceError, Reserve};
use epsmoe_fabric::contract::{self, Lanes, PATIENT, SHORT, SLACK, Start, World, on_all_ranks};
use epsmoe_fabric::process::{Lobby, Processes, Secret, WorldOptions, join};
use epsmoe_fabric::{Exchange, Fabric, FaultInjection, InjectedFault, ThreadsOptions};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

type Node = contract::Node<Reference>;

fn options(timeout: Duration) -> ThreadsOptions {
    ThreadsOptions::new(timeout, FaultCell::default())
}

/// A world of threads, with lanes that pause at random.
fn world_of<K: Kernels>(
    size: usize,
    seed: u64,
    options: ThreadsOptions,
    kernels: impl Fn() -> K,
) -> Vec<contract::Node<ThreadedBackend<K>>> {
    let weights = Arc::<WeightStore<_>>::default();
    let faults = options.faults.clone();
    let node = |fabric: Fabric<ThreadedBackend<K>>| {
        let host = ThreadedOptions { faults: faults.clone(), ..reference::options(DType::BF16, seed) };
        let device = ThreadedBackend::new(fabric.rank(), kernels(), Arc::clone(&weights), host);
        contract::Node { device: device.expect("lane threads"), fabric }
    };
    Fabric::threads(size, options).into_iter().map(node).collect()
}

fn threads(size: usize, seed: u64, options: ThreadsOptions) -> Vec<Node> {
    world_of(size, seed, options, || PlainKernels)
}

/// Every GPU of this machine, opened once; none where there is none that works.
fn gpus() -> &'static [Arc<CudaDevice>] {
    static DEVICES: OnceLock<Vec<Arc<CudaDevice>>> = OnceLock::new();
    DEVICES.get_or_init(|| {
        let opened = CudaDevice::count().and_then(|count| (0..count).map(CudaDevice::open).collect());
        match opened {
            Ok(devices) if !Vec::is_empty(&devices) => {
                for device in &devices {
                    devices.iter().for_each(|other| drop(device.connect(other)));
                }
                devices
            }
            missing if env::text("EPSMOE_TEST_ALL").is_some() => panic!("{:?}", missing.map(|_| "no GPU")),
            missing => {
                eprintln!("skipped: {:?}", missing.map(|_| "no GPU"));
                Vec::new()
            }
        }
    })
}

/// A world of threads, rank 0 on the first of some GPUs, rank 1 on the second, and so on, round and round.
fn world_on(
    gpus: &[Arc<CudaDevice>],
    size: usize,
    options: ThreadsOptions,
) -> Vec<contract::Node<CudaBackend>> {
    let weights = gpus.iter().map(|gpu| CudaWeights::new(gpu).expect("a stream")).collect::<Vec<_>>();
    let gpu =
        CudaOptions { faults: options.faults.clone(), fill: Fill::Poison, ..CudaOptions::new(DType::BF16) };
    let node = |fabric: Fabric<CudaBackend>| {
        let at = fabric.rank().0 % gpus.len();
        let device = CudaBackend::new(fabric.rank(), &gpus[at], &weights[at], gpu.clone());
        contract::Node { device: device.expect("streams and memory"), fabric }
    };
    Fabric::threads(size, options).into_iter().map(node).collect()
}

/// The whole contract for one way to make a world, of up to so many ranks; nothing is asked of a world of none.
macro_rules! contract {
    ($name:ident, $most:expr, $start:expr) => {
        mod $name {
            use super::*;

            contract!(@ $most, $start,
                rows_arrive_where_they_are_due: |world| contract::exchanges(world, Lanes::Transfer);
                exchanges_on_several_lanes_keep_apart: |world| contract::exchanges(world, Lanes::Any);
                groups_exchange_among_themselves: contract::subgroups;
                what_was_sent_may_be_overwritten_once_the_exchange_is_complete: contract::overwriting;
                parts_for_all_ranks_or_a_refusal: contract::refusals;
                everybody_hears_everybody_in_rank_order: contract::messages;
                nobody_passes_a_barrier_before_all_have_come: contract::barriers;
                a_rank_that_never_comes_is_named: contract::late_ranks;
                ranks_at_different_exchanges_are_seen: contract::differing_exchanges;
                ranks_at_different_messages_are_seen: contract::differing_messages;
            );
        }
    };
    (@ $most:expr, $start:expr, $($test:ident: $check:expr;)*) => {
        $(#[test]
        fn $test() {
            let (check, most): (fn(&World<'_, _>), usize) = ($check, $most);
            if most > 0 {
                check(&World { most, start: &$start });
            }
        })*
    };
}

contract!(threads_of_the_reference, 6, |start: Start| {
    let delay = Some(start.seed).filter(|seed| seed % 3 > 0);
    threads(start.size, start.seed, ThreadsOptions { delay, ..options(start.timeout) })
});

contract!(threads_of_the_cpu, 4, |start: Start| {
    world_of(start.size, start.seed, options(start.timeout), || {
        CpuKernels::new(1, Isa::detect()).expect("one thread")
    })
});

contract!(single_rank, 1, |start: Start| {
    let host = reference::options(DType::BF16, start.seed);
    let device = Reference::new(Rank(0), PlainKernels, Arc::default(), host).expect("lane threads");
    vec![contract::Node { device, fabric: Fabric::single_rank() }]
});

contract!(processes_over_tcp, 5, over_tcp);

contract!(ranks_that_share_a_gpu, gpus().len().min(1) * 5, |start: Start| {
    let delay = Some(start.seed).filter(|seed| seed % 3 > 0);
    world_on(&gpus()[..1], start.size, ThreadsOptions { delay, ..options(start.timeout) })
});

contract!(ranks_on_gpus_of_their_own, if gpus().len() > 1 { 6 } else { 0 }, |start: Start| {
    world_on(gpus(), start.size, options(start.timeout))
});

/// What NCCL cannot see, it is not asked: who is late or disagrees.
mod ranks_over_nccl {
    use super::*;

    contract!(@ most(), start,
        rows_arrive_where_they_are_due: |world| contract::exchanges(world, Lanes::Transfer);
        exchanges_on_several_lanes_keep_apart: |world| contract::exchanges(world, Lanes::Any);
        groups_exchange_among_themselves: contract::subgroups;
        what_was_sent_may_be_overwritten_once_the_exchange_is_complete: contract::overwriting;
        parts_for_all_ranks_or_a_refusal: contract::refusals;
    );

    /// What the rows of two ranks take, both ways at once, by copies from GPU to GPU and by NCCL; one line for each.
    #[test]
    #[ignore = "a measurement"]
    fn speed() {
        if most() == 0 {
            return;
        }
        let begin = Start { size: 2, seed: 0, timeout: PATIENT };
        let worlds = [("copies", world_on(gpus(), 2, options(PATIENT))), ("nccl", start(begin))];
        for (name, world) in worlds {
            let times =
                on_all_ranks(world, |node| [1 << 14, 1 << 28].map(|bytes| exchange_takes(node, bytes)));
            let [small, large] = [0, 1].map(|at| times.iter().map(|times| times[at]).fold(0.0, f64::max));
            println!("{name}: {:.1} us for 16 KiB, {:.0} GB/s for 256 MiB", small * 1e6, 0.268435456 / large);
        }
    }

    /// The median time of exchanges of so many bytes to the next rank and back, in seconds.
    fn exchange_takes(node: &contract::Node<CudaBackend>, bytes: usize) -> f64 {
        let (size, me) = (node.size(), node.rank());
        let part = |other: usize| {
            let rows = if other == me { 0 } else { bytes >> 13 };
            node.device.allocate("rows", DType::BF16, rows, 1 << 12).expect("memory")
        };
        let parts = || (0..size).map(part).collect::<Vec<_>>();
        let exchange = Exchange { name: "dispatch", send: parts(), receive: parts() };
        let transport = &node.fabric.transport;
        let mut times: Vec<f64> = (0..21)
            .map(|_| {
                node.fabric.control.barrier(Place::default()).expect("all come");
                let begun = Instant::now();
                transport
                    .all_to_all_v(&node.device, Lane::Transfer, Place::default(), exchange.clone())
                    .expect("enqueued");
                node.finish().expect("no fault");
                begun.elapsed().as_secs_f64()
            })
            .collect();
        times.sort_unstable_by(f64::total_cmp);
        times[times.len() / 2]
    }

    /// NCCL wants a GPU for each rank.
    fn most() -> usize {
        let missing = (gpus().len() < 2).then(|| "fewer than two GPUs".to_owned());
        match missing.or_else(|| cuda::nccl_version().err().map(|error| error.to_string())) {
            None => gpus().len(),
            Some(missing) => {
                eprintln!("skipped: {missing}");
                0
            }
        }
    }

    /// Ranks that are threads, whose rows travel by NCCL all the same.
    fn start(start: Start) -> Vec<contract::Node<CudaBackend>> {
        let by_copies = world_on(gpus(), start.size, options(start.timeout));
        let meet = |node: contract::Node<CudaBackend>| {
            std::thread::spawn(move || {
                let gpu = &gpus()[node.rank() % gpus().len()];
                let fabric = Fabric::nccl(Arc::clone(&node.fabric.control), gpu, start.timeout);
                contract::Node { fabric: fabric.expect("all meet"), ..node }
            })
        };
        let meeting: Vec<_> = by_copies.into_iter().map(meet).collect();
        meeting.into_iter().map(|node| node.join().expect("a node")).collect()
    }
}

/// A world of ranks that talk over TCP as processes do, each with a fault cell of its own.
fn over_tcp(start: Start) -> Vec<Node> {
    let secret = Secret::random().expect("random bytes");
    let options = move || WorldOptions {
        patience: PATIENT,
        timeout: start.timeout,
        faults: FaultCell::default(),
        secret: secret.clone(),
        version: "1".into(),
        flags: None,
    };
    let node = move |processes: Processes| {
        let faults = processes.faults().clone();
        let host = ThreadedOptions { faults, ..reference::options(DType::BF16, start.seed) };
        let device = Reference::new(processes.rank(), PlainKernels, Arc::default(), host);
        let fabric = processes.tcp_fabric(None).expect("all are there");
        contract::Node { device: device.expect("lane threads"), fabric }
    };
    let lobby = Lobby::open(("127.0.0.1", 0), start.size, options()).expect("a free port");
    let port = lobby.address().port();
    let guest = |rank| {
        let options = options();
        std::thread::spawn(move || {
            node(join(("127.0.0.1", port), Rank(rank), Some(start.size), &options).expect("all come").0)
        })
    };
    let guests: Vec<_> = (1..start.size).map(guest).collect();
    let host = node(lobby.wait("", || Ok(())).expect("all come"));
    std::iter::once(host).chain(guests.into_iter().map(|guest| guest.join().expect("a node"))).collect()
}

/// What a rank does in a world where something goes wrong.
type Script<B> = fn(&contract::Node<B>) -> Result<(), Fault>;

/// What makes a world of so many ranks, with that seed.
type Make<B> = fn(usize, u64, ThreadsOptions) -> Vec<contract::Node<B>>;

/// Runs `script` on every rank of a world with `injection`. All must end in time, with one fault: that of
/// `texts` which belongs to the rank that saw it first, whoever that was.
fn fails<B: Backend>(
    make: Make<B>,
    size: usize,
    injection: Option<FaultInjection>,
    script: Script<B>,
    kind: FaultKind,
    texts: &[&str],
) {
    // Only a deadline needs to pass; what else goes wrong is to be seen before any deadline, on a loaded machine too.
    let timeout = if kind == FaultKind::Deadline { SHORT } else { PATIENT };
    for round in 0..3 {
        let options = ThreadsOptions { injection, delay: (round > 0).then_some(round), ..options(timeout) };
        let faults = options.faults.clone();
        let begin = Instant::now();
        let answers = on_all_ranks(make(size, round, options), script);
        let took = begin.elapsed();
        let fault = faults.get().unwrap_or_else(|| panic!("nobody noticed; expected {texts:?}"));
        assert!(answers.iter().all(|answer| answer.as_ref() == Err(fault)), "{answers:?} is not all {fault}");
        assert!(texts.contains(&fault.to_string().as_str()), "{fault}\nis none of {texts:#?}");
        assert_eq!(fault.kind, kind, "{fault}");
        assert!(took < SHORT + SLACK, "{took:?} until {fault}");
    }
}

/// One exchange of a row to every rank, two rows to the next one.
fn turn<B: Backend>(
    node: &contract::Node<B>,
    name: &'static str,
    stage: usize,
    width: usize,
    dtype: DType,
) -> Result<(), Fault> {
    let (size, me) = (node.size(), node.rank());
    let rows = |source: usize, destination: usize| 1 + usize::from((source + 1) % size == destination);
    let part = |rows| node.device.allocate("rows", dtype, rows, width).expect("memory");
    let exchange = Exchange {
        name,
        send: (0..size).map(|rank| part(rows(me, rank))).collect(),
        receive: (0..size).map(|rank| part(rows(rank, me))).collect(),
    };
    let place = Place::layer(Layer(4)).stage(Stage(stage));
    match node.fabric.transport.all_to_all_v(&node.device, Lane::Transfer, place, exchange) {
        Err(DeviceError::Fault(fault)) => return Err(fault),
        enqueued => enqueued.expect("parts for all"),
    }
    node.finish()
}

/// Five exchanges, one a stage.
fn five_turns<B: Backend>(node: &contract::Node<B>) -> Result<(), Fault> {
    (0..5).try_for_each(|stage| turn(node, "dispatch", stage, 3, DType::F32))
}

fn injection(rank: usize, exchange: u64, act: InjectedFault) -> Option<FaultInjection> {
    Some(FaultInjection { rank: Rank(rank), exchange, act })
}

/// What ranks that are threads do besides, for one way to make a world.
macro_rules! of_threads {
    ($name:ident, $present:expr, $make:expr) => {
        mod $name {
            use super::*;

            of_threads!(@ $present, $make,
                a_stalled_rank_is_named: stalled_ranks;
                a_panicking_rank_is_named: panicking_ranks;
                a_row_less_than_announced_is_seen: missing_rows;
                after_a_fault_every_call_gives_it: calls_after_a_fault;
                a_paced_link_carries_the_same_rows: paced_exchanges;
                a_link_that_is_too_slow_is_a_deadline_not_a_hang: slow_links;
                a_paced_exchange_takes_as_long_as_its_larger_direction: paced_directions;
            );
        }
    };
    (@ $present:expr, $make:expr, $($test:ident: $check:expr;)*) => {
        $(#[test]
        fn $test() {
            if $present {
                $check($make);
            }
        })*
    };
}

of_threads!(on_the_reference, true, threads);
of_threads!(on_one_gpu, !gpus().is_empty(), |size, _, options| world_on(&gpus()[..1], size, options));
of_threads!(on_several_gpus, gpus().len() > 1, |size, _, options| world_on(gpus(), size, options));

fn stalled_ranks<B: Backend>(make: Make<B>) {
    fails(
        make,
        2,
        injection(1, 3, InjectedFault::Stall),
        five_turns,
        FaultKind::Deadline,
        &["rank 0, layer 4, stage 3: rank 1 did not send dispatch within 400ms"],
    );
    fails(
        make,
        4,
        injection(2, 0, InjectedFault::Stall),
        five_turns,
        FaultKind::Deadline,
        &[
            "rank 0, layer 4, stage 0: rank 2 did not send dispatch within 400ms",
            "rank 1, layer 4, stage 0: rank 2 did not send dispatch within 400ms",
            "rank 3, layer 4, stage 0: rank 2 did not send dispatch within 400ms",
        ],
    );
}

fn panicking_ranks<B: Backend>(make: Make<B>) {
    fails(
        make,
        1,
        injection(0, 0, InjectedFault::Panic),
        five_turns,
        FaultKind::Panic,
        &["rank 0, layer 4, stage 0: dispatch panicked: rank 0 panics on purpose at dispatch"],
    );
    fails(
        make,
        5,
        injection(3, 2, InjectedFault::Panic),
        five_turns,
        FaultKind::Panic,
        &["rank 3, layer 4, stage 2: dispatch panicked: rank 3 panics on purpose at dispatch"],
    );
}

fn missing_rows<B: Backend>(make: Make<B>) {
    fails(
        make,
        2,
        injection(1, 4, InjectedFault::SendOneRowLess),
        five_turns,
        FaultKind::Mismatch,
        &[
            "rank 0, layer 4, stage 4: rank 1 sent 1 row of dispatch (3 wide, float32) where 2 rows (3 wide, float32) \
         were announced",
        ],
    );
    fails(
        make,
        3,
        injection(2, 0, InjectedFault::SendOneRowLess),
        five_turns,
        FaultKind::Mismatch,
        &[
            "rank 0, layer 4, stage 0: rank 2 sent 1 row of dispatch (3 wide, float32) where 2 rows (3 wide, float32) \
         were announced",
        ],
    );
}

fn calls_after_a_fault<B: Backend>(make: Make<B>) {
    let script: Script<B> = |node| {
        let first = five_turns(node).expect_err("a fault");
        assert_eq!(node.fabric.control.barrier(Place::default()), Err(first.clone()));
        assert_eq!(turn(node, "combine", 1, 3, DType::F32), Err(first.clone()));
        Err(first)
    };
    fails(
        make,
        3,
        injection(0, 1, InjectedFault::Panic),
        script,
        FaultKind::Panic,
        &["rank 0, layer 4, stage 1: dispatch panicked: rank 0 panics on purpose at dispatch"],
    );
}

fn paced_exchanges<B: Backend>(make: Make<B>) {
    let link = Some("1GB/s,200us".parse().expect("a link"));
    let start =
        |start: Start| make(start.size, start.seed, ThreadsOptions { link, ..options(start.timeout) });
    contract::exchanges(&World { most: 4, start: &start }, Lanes::Transfer);
}

fn slow_links<B: Backend>(make: Make<B>) {
    // Eleven days for an exchange.
    let link = Some("1GB/s,1000000000ms".parse().expect("a link"));
    let options = ThreadsOptions { link, ..options(SHORT) };
    let begin = Instant::now();
    let answers = on_all_ranks(make(2, 0, options), |node| turn(node, "dispatch", 1, 3, DType::F32));
    assert!(begin.elapsed() < SHORT + SLACK, "{:?}", begin.elapsed());
    let fault = answers[0].clone().expect_err("no exchange can end in time");
    assert_eq!(answers[1], Err(fault.clone()));
    let want = |rank| format!("rank {rank}, layer 4, stage 1: dispatch did not cross the link within 400ms");
    assert!([want(0), want(1)].contains(&fault.to_string()), "{fault}");
    assert_eq!(fault.kind, FaultKind::Deadline);
}

/// What leaves and what comes travels at once, and a rank's own rows do not travel: they do not add up.
fn paced_directions<B: Backend>(make: Make<B>) {
    const ROW: usize = 250;
    let link = Some("100kB/s".parse().expect("a link"));
    let attempt = || {
        let begin = Instant::now();
        let pacing = on_all_ranks(make(2, 0, ThreadsOptions { link, ..options(PATIENT) }), |node| {
            let part = |rows| node.device.allocate("rows", DType::F32, rows, ROW).expect("memory");
            // 10 rows to the other, 10 rows from it, 20 of one's own.
            let parts = || [10, 20].map(part).to_vec();
            let ordered = |mut parts: Vec<Buffer>| {
                parts.rotate_left(1 - node.rank());
                parts
            };
            let exchange = Exchange { name: "turn", send: ordered(parts()), receive: ordered(parts()) };
            let place = Place::default();
            node.fabric.transport.all_to_all_v(&node.device, Lane::Transfer, place, exchange).expect("parts");
            node.finish().expect("no fault");
            let link = node.fabric.link.as_ref().expect("a link");
            // Whoever paces a GPU may note it a moment later.
            let noted = || Some(link.take_pacing()).filter(|pacing| pacing.exchanges > 0);
            std::iter::repeat_with(noted).flatten().next().expect("an exchange")
        });
        assert!(pacing.iter().all(|pacing| (pacing.exchanges, pacing.unresolved) == (1, 0)), "{pacing:?}");
        begin.elapsed()
    };
    // A loaded machine may take longer at times, never shorter.
    let took = (0..5).map(|_| attempt()).min().unwrap_or_default();
    assert!((100..180).contains(&took.as_millis()), "10 rows of 1000 bytes at 100 kB/s took {took:?}");
}
