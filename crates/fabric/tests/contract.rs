//! The contract of `epsmoe_fabric::contract`, over the fabrics that there are and the processors of this machine; and
//! what only ranks that are threads do: faults on purpose, and links with a speed. `EPSMOE_TEST_SEED` repeats a run.

use epsmoe_base::{DType, Fault, FaultCell, FaultKind, Lane, Layer, Place, Rank, Stage};
use epsmoe_device::cpu::{CpuKernels, gemm::Isa};
use epsmoe_device::reference::{self, PlainKernels, Reference};
use epsmoe_device::threaded::{Kernels, ThreadedBackend, ThreadedOptions, WeightStore};
use epsmoe_device::{Backend, Buffer};
use epsmoe_fabric::contract::{self, Lanes, PATIENT, SHORT, SLACK, Start, World, on_all_ranks};
use epsmoe_fabric::{Exchange, Fabric, FaultInjection, InjectedFault, ThreadsOptions};
use std::sync::Arc;
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

/// The whole contract for one way to make a world.
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
            let check: fn(&World<'_, _>) = $check;
            check(&World { most: $most, start: &$start });
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

#[test]
fn a_paced_link_carries_the_same_rows() {
    let link = Some("1GB/s,200us".parse().expect("a link"));
    let start =
        |start: Start| threads(start.size, start.seed, ThreadsOptions { link, ..options(start.timeout) });
    contract::exchanges(&World { most: 4, start: &start }, Lanes::Transfer);
}

/// What a rank does in a world where something goes wrong.
type Script = fn(&Node) -> Result<(), Fault>;

/// Runs `script` on every rank of a world with `injection`. All must end in time, with one fault: that of
/// `texts` which belongs to the rank that saw it first, whoever that was.
fn fails(size: usize, injection: Option<FaultInjection>, script: Script, kind: FaultKind, texts: &[&str]) {
    // Only a deadline needs to pass; what else goes wrong is to be seen before any deadline, on a loaded machine too.
    let timeout = if kind == FaultKind::Deadline { SHORT } else { PATIENT };
    for round in 0..3 {
        let options = ThreadsOptions { injection, delay: (round > 0).then_some(round), ..options(timeout) };
        let faults = options.faults.clone();
        let begin = Instant::now();
        let answers = on_all_ranks(threads(size, round, options), script);
        let took = begin.elapsed();
        let fault = faults.get().unwrap_or_else(|| panic!("nobody noticed; expected {texts:?}"));
        assert!(answers.iter().all(|answer| answer.as_ref() == Err(fault)), "{answers:?} is not all {fault}");
        assert!(texts.contains(&fault.to_string().as_str()), "{fault}\nis none of {texts:#?}");
        assert_eq!(fault.kind, kind, "{fault}");
        assert!(took < SHORT + SLACK, "{took:?} until {fault}");
    }
}

/// One exchange of a row to every rank, two rows to the next one.
fn turn(node: &Node, name: &'static str, stage: usize, width: usize, dtype: DType) -> Result<(), Fault> {
    let (size, me) = (node.size(), node.rank());
    let rows = |source: usize, destination: usize| 1 + usize::from((source + 1) % size == destination);
    let part = |rows| node.device.allocate("rows", dtype, rows, width).expect("memory");
    let exchange = Exchange {
        name,
        send: (0..size).map(|rank| part(rows(me, rank))).collect(),
        receive: (0..size).map(|rank| part(rows(rank, me))).collect(),
    };
    let place = Place::layer(Layer(4)).stage(Stage(stage));
    node.fabric.transport.all_to_all_v(&node.device, Lane::Transfer, place, exchange).expect("parts for all");
    node.finish()
}

/// Five exchanges, one a stage.
fn five_turns(node: &Node) -> Result<(), Fault> {
    (0..5).try_for_each(|stage| turn(node, "dispatch", stage, 3, DType::F32))
}

fn injection(rank: usize, exchange: u64, act: InjectedFault) -> Option<FaultInjection> {
    Some(FaultInjection { rank: Rank(rank), exchange, act })
}

#[test]
fn a_stalled_rank_is_named() {
    fails(
        2,
        injection(1, 3, InjectedFault::Stall),
        five_turns,
        FaultKind::Deadline,
        &["rank 0, layer 4, stage 3: rank 1 did not send dispatch within 400ms"],
    );
    fails(
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

#[test]
fn a_panicking_rank_is_named() {
    fails(
        1,
        injection(0, 0, InjectedFault::Panic),
        five_turns,
        FaultKind::Panic,
        &["rank 0, layer 4, stage 0: dispatch panicked: rank 0 panics on purpose at dispatch"],
    );
    fails(
        5,
        injection(3, 2, InjectedFault::Panic),
        five_turns,
        FaultKind::Panic,
        &["rank 3, layer 4, stage 2: dispatch panicked: rank 3 panics on purpose at dispatch"],
    );
}

#[test]
fn a_row_less_than_announced_is_seen() {
    fails(
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

#[test]
fn a_link_that_is_too_slow_is_a_deadline_not_a_hang() {
    // Eleven days for an exchange.
    let link = Some("1GB/s,1000000000ms".parse().expect("a link"));
    let options = ThreadsOptions { link, ..options(SHORT) };
    let begin = Instant::now();
    let answers = on_all_ranks(threads(2, 0, options), |node| turn(node, "dispatch", 1, 3, DType::F32));
    assert!(begin.elapsed() < SHORT + SLACK, "{:?}", begin.elapsed());
    let fault = answers[0].clone().expect_err("no exchange can end in time");
    assert_eq!(answers[1], Err(fault.clone()));
    let want = |rank| format!("rank {rank}, layer 4, stage 1: dispatch did not cross the link within 400ms");
    assert!([want(0), want(1)].contains(&fault.to_string()), "{fault}");
    assert_eq!(fault.kind, FaultKind::Deadline);
}

/// What leaves and what comes travels at once, and a rank's own rows do not travel: they do not add up.
#[test]
fn a_paced_exchange_takes_as_long_as_its_larger_direction() {
    const ROW: usize = 250;
    let link = Some("100kB/s".parse().expect("a link"));
    let attempt = || {
        let begin = Instant::now();
        on_all_ranks(threads(2, 0, ThreadsOptions { link, ..options(PATIENT) }), |node| {
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
            node.finish().unwrap();
        });
        begin.elapsed()
    };
    // A loaded machine may take longer at times, never shorter.
    let took = (0..5).map(|_| attempt()).min().unwrap_or_default();
    assert!((100..180).contains(&took.as_millis()), "10 rows of 1000 bytes at 100 kB/s took {took:?}");
}

#[test]
fn after_a_fault_every_call_gives_it() {
    let script: Script = |node| {
        let first = five_turns(node).unwrap_err();
        assert_eq!(node.fabric.control.barrier(Place::default()), Err(first.clone()));
        assert_eq!(turn(node, "combine", 1, 3, DType::F32), Err(first.clone()));
        Err(first)
    };
    fails(
        3,
        injection(0, 1, InjectedFault::Panic),
        script,
        FaultKind::Panic,
        &["rank 0, layer 4, stage 1: dispatch panicked: rank 0 panics on purpose at dispatch"],
    );
}
