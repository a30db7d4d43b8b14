//! What a user sees when an event is missing, a rank stalls, panics, sends a wrong number of rows, or was
//! started otherwise: the first cause, on every rank, in time.

use crate::world::{Case, Got, Odd, PATIENT, Setup, run};
use epsmoe_base::{DType, Fault, FaultKind, Rank, RowFormat, WireFormat};
use epsmoe_fabric::{FaultInjection, InjectedFault};
use epsmoe_plan::{Capacity, GemmKind, LayerBytes, Policy, StageTable, Stages};
use std::time::{Duration, Instant};

/// Four stages of one expert, in the order `d0 d1 c0 d2 c1 d3 c2 c3`.
fn four_stages() -> Policy {
    Policy { stages: Some(Stages::Sizes(vec![1; 4])), ..Policy::default() }
}

/// Lane waits of one layer of four stages: one before anything leaves, one for the metadata, one for each dispatch and
/// each combine, and one for the sums that came back.
const WAITS: [&str; 11] = [
    "{layer}: metadata on the transfer lane reads send_metadata while send_order ({layer}) on the compute lane writes \
     it, and no event orders them",
    "{layer}: receive_order on the compute lane reads received_metadata while metadata ({layer}) on the transfer lane \
     writes it, and no event orders them",
    "{layer}, stage 0: gather on the compute lane reads received_rows while dispatch ({layer}, stage 0) on the \
     transfer lane writes it, and no event orders them",
    "{layer}, stage 1: gather on the compute lane reads received_rows while dispatch ({layer}, stage 1) on the \
     transfer lane writes it, and no event orders them",
    "{layer}, stage 0: combine on the transfer lane reads sums while reduce ({layer}, stage 0) on the compute lane \
     writes it, and no event orders them",
    "{layer}, stage 2: gather on the compute lane reads received_rows while dispatch ({layer}, stage 2) on the \
     transfer lane writes it, and no event orders them",
    "{layer}, stage 1: combine on the transfer lane reads sums while reduce ({layer}, stage 1) on the compute lane \
     writes it, and no event orders them",
    "{layer}, stage 3: gather on the compute lane reads received_rows while dispatch ({layer}, stage 3) on the \
     transfer lane writes it, and no event orders them",
    "{layer}, stage 2: combine on the transfer lane reads sums while reduce ({layer}, stage 2) on the compute lane \
     writes it, and no event orders them",
    "{layer}, stage 3: combine on the transfer lane reads sums while reduce ({layer}, stage 3) on the compute lane \
     writes it, and no event orders them",
    "{layer}: reduce on the compute lane reads combined_rows while combine ({layer}, stage 2) on the transfer lane \
     writes it, and no event orders them",
];

/// Those of one layer of two micro-batches: before anything leaves, the metadata and the rows of each half, the sums of
/// each half, and both when they have come back.
const WAITS_OF_HALVES: [&str; 9] = [
    WAITS[0],
    WAITS[1],
    WAITS[2],
    WAITS[1],
    WAITS[3],
    WAITS[4],
    WAITS[6],
    "{layer}: reduce on the compute lane reads combined_rows while combine ({layer}, stage 0) on the transfer lane \
     writes it, and no event orders them",
    "{layer}: reduce on the compute lane reads combined_rows while combine ({layer}, stage 1) on the transfer lane \
     writes it, and no event orders them",
];

#[test]
fn every_event_of_the_stages_is_needed() {
    every_event_is_needed(&Setup::new(four_stages()), &WAITS);
}

#[test]
fn every_event_of_micro_batches_is_needed() {
    every_event_is_needed(&Setup::two_batch(), &WAITS_OF_HALVES);
}

fn every_event_is_needed(setup: &Setup, waits: &[&str]) {
    let case = Case::fixed();
    for got in run(&case, setup) {
        assert_eq!(got.expect("no fault").waits, case.layers * waits.len());
    }
    for (rank, wait) in (0..2).flat_map(|rank| (0..case.layers * waits.len()).map(move |wait| (rank, wait))) {
        let setup = Setup { skipped: Some((rank, wait)), ..setup.clone() };
        let answers = run(&case, &setup);
        let context = format!("rank {rank} without its wait {wait}");
        let fault = answers[rank].as_ref().map(|_| ()).expect_err(&context);
        let layer = format!("layer {}", wait / waits.len());
        let want = format!("rank {rank}, {}", waits[wait % waits.len()].replace("{layer}", &layer));
        assert_eq!(fault.to_string(), want, "{context}");
        assert_eq!(fault.kind, FaultKind::Race, "{fault}");
        // The other rank has heard of it, unless it was done before.
        let other = answers[1 - rank].as_ref();
        assert!(other.is_ok() || other.is_err_and(|other| other == fault), "{other:?}");
    }
}

/// How long ranks wait for each other in these tests, and what a loaded machine may add.
const SHORT: Duration = Duration::from_millis(400);
const SLACK: Duration = Duration::from_secs(5);

/// Every rank must report the same fault, one of `texts`: which one depends on who saw it first.
fn fails(case: &Case, setup: Setup, kind: FaultKind, texts: &[&str]) {
    let begin = Instant::now();
    // Only a deadline needs to pass; what else goes wrong is to be seen before any deadline, on a loaded machine too.
    let timeout = if kind == FaultKind::Deadline { SHORT } else { PATIENT };
    let answers = run(case, &Setup { timeout, ..setup });
    let took = begin.elapsed();
    let faults: Vec<Fault> =
        answers.into_iter().map(|answer: Result<Got, _>| answer.expect_err(texts[0])).collect();
    assert!(faults.iter().all(|fault| *fault == faults[0]), "not one cause: {faults:#?}");
    let text = faults[0].to_string();
    assert!(texts.contains(&text.as_str()), "{text}\nis none of {texts:#?}");
    assert_eq!(faults[0].kind, kind, "{text}");
    assert!(took < SHORT + SLACK, "{took:?} until {text}");
}

/// The exchanges of a layer of four stages: metadata, then the transfer order.
fn at(rank: usize, exchange: u64, act: InjectedFault) -> Setup {
    Setup { injection: Some(FaultInjection { rank: Rank(rank), exchange, act }), ..Setup::new(four_stages()) }
}

#[test]
fn a_stalled_rank_is_named_with_layer_and_stage() {
    let (case, kind) = (Case::fixed(), FaultKind::Deadline);
    for (setup, text) in [
        (at(1, 0, InjectedFault::Stall), "rank 0, layer 0: rank 1 did not send metadata within 400ms"),
        (
            at(1, 2, InjectedFault::Stall),
            "rank 0, layer 0, stage 1: rank 1 did not send dispatch within 400ms",
        ),
        (
            at(0, 8, InjectedFault::Stall),
            "rank 1, layer 0, stage 3: rank 0 did not send combine within 400ms",
        ),
        (
            at(1, 9 + 3, InjectedFault::Stall),
            "rank 0, layer 1, stage 0: rank 1 did not send combine within 400ms",
        ),
    ] {
        fails(&case, setup, kind, &[text]);
    }
    let three = Case { tokens: vec![9, 0, 5], map: epsmoe_plan::SlotMap::contiguous(12, 3).unwrap(), ..case };
    fails(
        &three,
        at(1, 5, InjectedFault::Stall),
        kind,
        &[
            "rank 0, layer 0, stage 1: rank 1 did not send combine within 400ms",
            "rank 2, layer 0, stage 1: rank 1 did not send combine within 400ms",
        ],
    );
}

#[test]
fn a_rank_that_does_not_come_to_the_layer_is_named() {
    let setup = Setup { absent: Some(1), ..Setup::new(four_stages()) };
    fails(
        &Case::fixed(),
        setup,
        FaultKind::Deadline,
        &["rank 0, layer 0: rank 1 did not come to count exchange within 400ms"],
    );
}

#[test]
fn a_panicking_rank_is_named_with_layer_and_stage() {
    for (setup, text) in [
        (
            at(1, 0, InjectedFault::Panic),
            "rank 1, layer 0: metadata panicked: rank 1 panics on purpose at metadata",
        ),
        (
            at(1, 4, InjectedFault::Panic),
            "rank 1, layer 0, stage 2: dispatch panicked: rank 1 panics on purpose at dispatch",
        ),
        (
            at(0, 17, InjectedFault::Panic),
            "rank 0, layer 1, stage 3: combine panicked: rank 0 panics on purpose at combine",
        ),
    ] {
        fails(&Case::fixed(), setup, FaultKind::Panic, &[text]);
    }
}

#[test]
fn a_wrong_number_of_rows_is_named_with_layer_and_stage() {
    let (case, kind) = (Case::fixed(), FaultKind::Mismatch);
    for (setup, text) in [
        (
            at(1, 0, InjectedFault::SendOneRowLess),
            "rank 0, layer 0: rank 1 sent 19 rows of metadata (6 wide, uint32) where 20 rows (6 wide, uint32) were announced",
        ),
        (
            at(1, 2, InjectedFault::SendOneRowLess),
            "rank 0, layer 0, stage 1: rank 1 sent 8 rows of dispatch (16 wide, float32) where 9 rows (16 wide, float32) were announced",
        ),
        (
            at(1, 7, InjectedFault::SendOneRowLess),
            "rank 0, layer 0, stage 2: rank 1 sent 6 rows of combine (16 wide, float32) where 7 rows (16 wide, float32) were announced",
        ),
    ] {
        fails(&case, setup, kind, &[text]);
    }
}

#[test]
fn ranks_that_were_started_otherwise_are_named_when_counts_meet() {
    let texts = [
        "rank 0, layer 0: rank 0 and rank 1 were started with different settings or models; give every rank the same \
         checkpoint and the same flags",
        "rank 1, layer 0: rank 1 and rank 0 were started with different settings or models; give every rank the same \
         checkpoint and the same flags",
    ];
    let same = Setup::new(four_stages());
    let serial = StageTable::serial(&Case::fixed().map, GemmKind::Grouped);
    let dense = Policy { gemm: Some(GemmKind::Dense), ..four_stages() };
    for setup in [
        Setup { policies: vec![four_stages(), dense], ..same.clone() },
        Setup { policies: vec![four_stages(), Policy::default()], ..same.clone() },
        Setup { identities: vec![1, 2], ..same.clone() },
        Setup { odd: Some(Odd::Router), ..same.clone() },
        Setup { odd: Some(Odd::Sizes), ..same.clone() },
        Setup { odd: Some(Odd::Map), ..same.clone() },
        Setup { odd: Some(Odd::Table), table: Some(serial), ..same },
    ] {
        fails(&Case::fixed(), setup, FaultKind::Mismatch, &texts);
    }
}

/// A wire format that no operation packs rows into is refused before a layer runs.
#[test]
fn rows_travel_in_a_format_that_can_be_packed() {
    let wire = WireFormat { combine: RowFormat::Plain(DType::BF16), ..WireFormat::plain(DType::F32) };
    let case = Case { wire: Some(wire), ..Case::fixed() };
    let text = "the wire format (rows in float32, partial sums in bfloat16) does not go with activations in float32: \
                use rows in float32, partial sums in float32, or rows in fp8, partial sums in float32";
    let got = run(&case, &Setup::serial());
    for fault in got.into_iter().map(|got| got.unwrap_err()) {
        assert!(fault.message.ends_with(text), "{fault}");
    }
}

/// What a layer is said to need is what its buffers take.
#[test]
fn every_buffer_is_accounted_for() {
    for ranks in [1, 2] {
        let map = epsmoe_plan::SlotMap::contiguous(8, ranks).unwrap();
        let case = Case { map, tokens: vec![24; ranks], dtype: DType::BF16, ..Case::fixed() };
        let capacity = Capacity::worst_case(24, &case.sizes());
        for got in run(&case, &Setup::serial()) {
            let bytes = LayerBytes::of(&case.sizes(), &capacity).total();
            assert_eq!(got.expect("no fault").pipeline_bytes, bytes, "{ranks} ranks");
        }
    }
}

#[test]
fn room_for_less_than_a_token_of_every_rank_is_refused() {
    let case = Case { dtype: DType::BF16, ..Case::fixed() };
    let short = Capacity { rows_received: 1, ..Capacity::worst_case(24, &case.sizes()) };
    let setup = Setup { capacity: Some(short), ..Setup::new(four_stages()) };
    fails(
        &case,
        setup,
        FaultKind::Invalid,
        &[
            "rank 0, outside any layer: one token of every rank needs Capacity { tokens: 1, rows_sent: 2, rows_received: 2, \
         assignments: 6, stage_assignments: 6 }, but there is Capacity { tokens: 24, rows_sent: 48, rows_received: 1, \
         assignments: 144, stage_assignments: 144 }",
            "rank 1, outside any layer: one token of every rank needs Capacity { tokens: 1, rows_sent: 2, rows_received: 2, \
         assignments: 6, stage_assignments: 6 }, but there is Capacity { tokens: 24, rows_sent: 48, rows_received: 1, \
         assignments: 144, stage_assignments: 144 }",
        ],
    );
}
