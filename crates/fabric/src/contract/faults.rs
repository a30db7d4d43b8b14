//! Ranks that are late or disagree.

use super::{Node, PATIENT, SHORT, SLACK, Start, World, on_all_ranks};
use crate::{Exchange, Transport};
use epsmoe_base::{DType, Fault, FaultCell, FaultKind, Lane, Layer, Place, Rank, Stage};
use epsmoe_device::Backend;
use std::time::Instant;

/// What a rank does in a world where something goes wrong.
type Script<B> = fn(&Node<B>) -> Result<(), Fault>;

/// Runs `script` on every rank. All must end in time, with one fault of that kind that says all `words`, at `place`.
fn fails<B: Backend>(
    world: &World<'_, B>,
    size: usize,
    script: Script<B>,
    kind: FaultKind,
    place: Place,
    words: &[&str],
) {
    if world.most < size {
        return;
    }
    // Only a deadline needs to pass; what else goes wrong is to be seen before any deadline, on a loaded machine too.
    let timeout = if kind == FaultKind::Deadline { SHORT } else { PATIENT };
    for seed in 0..3 {
        let nodes = (world.start)(Start { size, seed, timeout });
        // None of the ranks may be in this process.
        let Some(faults) = nodes.first().map(|node| node.fabric.control.faults().clone()) else { continue };
        let begin = Instant::now();
        let answers = on_all_ranks(nodes, script);
        let took = begin.elapsed();
        let fault = faults.get().unwrap_or_else(|| panic!("nobody noticed; expected {words:?}"));
        assert!(answers.iter().all(|answer| answer.as_ref() == Err(fault)), "{answers:?} is not all {fault}");
        assert!(
            words.iter().all(|word| fault.message.contains(word)),
            "{fault} does not say all of {words:?}"
        );
        let said = Place { phase: None, ..fault.place };
        assert_eq!((fault.kind, said), (kind, place), "{fault}");
        assert!(took < SHORT + SLACK, "{took:?} until {fault}");
    }
}

fn place(stage: usize) -> Place {
    Place::layer(Layer(4)).stage(Stage(stage))
}

/// One exchange of a row to every rank of `transport`, two rows to the next one.
fn turn<B: Backend>(
    node: &Node<B>,
    transport: &dyn Transport<B>,
    name: &'static str,
    place: Place,
    width: usize,
    dtype: DType,
) -> Result<(), Fault> {
    let size = transport.ranks().len();
    let me = transport.ranks().iter().position(|rank| rank.0 == node.rank()).expect("its own group");
    let rows = |source: usize, destination: usize| 1 + usize::from((source + 1) % size == destination);
    let part = |rows| node.rows(dtype, rows, width);
    let exchange = Exchange {
        name,
        send: (0..size).map(|rank| part(rows(me, rank))).collect(),
        receive: (0..size).map(|rank| part(rows(rank, me))).collect(),
    };
    match transport.all_to_all_v(&node.device, Lane::Transfer, place, exchange) {
        Err(epsmoe_device::DeviceError::Fault(fault)) => return Err(fault),
        enqueued => enqueued.expect("a part for each rank"),
    }
    node.finish()
}

/// Asks the device, which has nothing to do, until it says why the world stopped.
fn until_stopped<B: Backend>(node: &Node<B>) -> Fault {
    loop {
        if let Err(fault) = node.finish() {
            return fault;
        }
        std::thread::sleep(FaultCell::POLL);
    }
}

/// A rank that never comes is named, to an exchange, in a sub-group, and to a message; what it was awaited for is said,
/// and the deadline as it was asked for.
pub fn late_ranks<B: Backend>(world: &World<'_, B>) {
    let exchange: Script<B> = |node| match node.rank() {
        1 => Err(until_stopped(node)),
        _ => turn(node, &*node.fabric.transport, "combine", place(1), 3, DType::F32),
    };
    fails(world, 3, exchange, FaultKind::Deadline, place(1), &["rank 1 ", "combine", "within 400ms"]);
    let group: Script<B> = |node| {
        let ranks = if node.rank() < 2 { 0..2 } else { 2..4 };
        let group = node.fabric.transport.subgroup(&ranks.map(Rank).collect::<Vec<_>>()).expect("a group");
        match node.rank() {
            3 => Err(until_stopped(node)),
            2 => turn(node, &*group, "all-gather", place(2), 3, DType::F32),
            _ => turn(node, &*group, "all-gather", place(0), 3, DType::F32)
                .and_then(|()| Err(until_stopped(node))),
        }
    };
    fails(world, 4, group, FaultKind::Deadline, place(2), &["rank 3 ", "all-gather", "within 400ms"]);
    let message: Script<B> = |node| match node.rank() {
        1 => Err(until_stopped(node)),
        _ => node.fabric.control.exchange("count exchange", Place::layer(Layer(2)), vec![1]).map(|_| ()),
    };
    let words = ["rank 1 ", "count exchange", "within 400ms"];
    fails(world, 3, message, FaultKind::Deadline, Place::layer(Layer(2)), &words);
}

/// Ranks at different exchanges, or at one with different rows, are seen before any deadline; then every call gives the
/// same fault.
pub fn differing_exchanges<B: Backend>(world: &World<'_, B>) {
    let kind = FaultKind::Mismatch;
    let name: Script<B> = |node| {
        let name = ["dispatch", "combine"][node.rank()];
        let first =
            turn(node, &*node.fabric.transport, name, place(1), 3, DType::F32).expect_err("they differ");
        assert_eq!(node.fabric.control.barrier(Place::default()), Err(first.clone()));
        let again = turn(node, &*node.fabric.transport, "combine", place(1), 3, DType::F32);
        assert_eq!(again, Err(first.clone()));
        Err(first)
    };
    fails(world, 2, name, kind, place(1), &["dispatch", "combine"]);
    let width: Script<B> =
        |node| turn(node, &*node.fabric.transport, "dispatch", place(0), 3 + node.rank(), DType::F32);
    fails(world, 2, width, kind, place(0), &["dispatch", "3 wide", "4 wide"]);
    let dtype: Script<B> = |node| {
        let dtype = [DType::F32, DType::BF16][node.rank()];
        turn(node, &*node.fabric.transport, "dispatch", place(0), 3, dtype)
    };
    fails(world, 2, dtype, kind, place(0), &["dispatch", "float32", "bfloat16"]);
}

/// Ranks at different messages are seen.
pub fn differing_messages<B: Backend>(world: &World<'_, B>) {
    let name: Script<B> = |node| {
        let name = ["count exchange", "barrier"][node.rank()];
        node.fabric.control.exchange(name, Place::layer(Layer(1)), vec![]).map(|_| ())
    };
    fails(world, 2, name, FaultKind::Mismatch, Place::layer(Layer(1)), &["count exchange", "barrier"]);
}
