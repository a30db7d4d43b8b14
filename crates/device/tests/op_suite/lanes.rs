//! Two lanes: events order them, a missing event stops the world, and what ran is told with its times.

use crate::bench::Bench;
use epsmoe_base::{DType, Deadline, FaultKind, Lane, Phase, Place};
use epsmoe_device::Backend;
use epsmoe_device::op::{Accesses, Copy, Gemm, HostToDevice};
use std::time::Duration;

pub(crate) fn suite<B: Backend>(fresh: impl Fn() -> Bench<B>) {
    events_order(&fresh());
    a_missing_event_is_found(&fresh());
    a_weight_that_is_overwritten_too_early_is_found(&fresh());
}

fn soon() -> Deadline {
    Deadline::after(Duration::from_secs(60))
}

/// Numbers go to and fro between the lanes through two buffers, each time overwritten at once.
fn events_order<B: Backend>(bench: &Bench<B>) {
    const ROWS: usize = 300;
    const WIDTH: usize = 700;
    const ROUNDS: usize = 20;
    let floats = |name| bench.device.allocate(name, DType::F32, ROWS, WIDTH).expect("memory");
    let (source, kept) = (floats("source"), floats("kept"));
    let enqueue = |lane, place, op: epsmoe_device::op::Op| {
        bench.device.enqueue(lane, place, op).expect("it fits");
    };
    assert!(bench.device.take_records().is_empty(), "nobody has asked for records yet");
    bench.device.set_recording(true);
    let mut copied = bench.device.record(Lane::Transfer);
    for round in 0..ROUNDS {
        bench.device.lane_wait(Lane::Compute, &copied);
        let words = vec![(round as f32).to_bits(); ROWS * WIDTH].into();
        let fill = HostToDevice { words, out: source.clone() };
        enqueue(Lane::Compute, Place::default(), fill.into());
        let filled = bench.device.record(Lane::Compute);
        bench.device.lane_wait(Lane::Transfer, &filled);
        let copy = Copy { x: source.clone(), out: kept.clone() };
        enqueue(Lane::Transfer, Place::default().phase(Phase::Dispatch), copy.into());
        copied = bench.device.record(Lane::Transfer);
        if round % 7 == 6 {
            bench.device.wait(&copied, soon()).expect("no fault");
            let got = bench.device.read_f32(&kept).expect("ordered by the host");
            assert!(got.iter().all(|&value| value == round as f32), "round {round}, seed {}", bench.seed);
        }
    }
    bench.device.wait(&copied, soon()).expect("no fault");
    let records = bench.device.take_records();
    let of = |lane, name| records.iter().filter(move |record| (record.lane, record.name) == (lane, name));
    assert_eq!(of(Lane::Compute, "host_to_device").count(), ROUNDS);
    assert_eq!(of(Lane::Transfer, "copy").count(), ROUNDS);
    assert!(records.iter().all(|record| record.start_ns <= record.end_ns), "{records:?}");
    let phases =
        |lane, phase| records.iter().filter(move |at| (at.lane, at.place.phase) == (lane, Some(phase)));
    assert_eq!(phases(Lane::Compute, Phase::Input).count(), ROUNDS, "the operation's own");
    assert_eq!(phases(Lane::Transfer, Phase::Dispatch).count(), ROUNDS, "the caller's");
    // Times of two lanes are told to about a microsecond.
    for (upload, copy) in of(Lane::Compute, "host_to_device").zip(of(Lane::Transfer, "copy")) {
        assert!(upload.end_ns <= copy.start_ns + 2_000, "{upload:?} before {copy:?}");
    }
}

fn a_missing_event_is_found<B: Backend>(bench: &Bench<B>) {
    let x = bench.put(&bench.random(4, 4, 1.0)).view;
    let (y, z) = (bench.room(bench.dtype, 4, 4).view, bench.room(bench.dtype, 4, 4).view);
    let enqueue = |lane, x: &epsmoe_device::Buffer, out: &epsmoe_device::Buffer| {
        bench
            .device
            .enqueue(lane, Place::default(), Copy { x: x.clone(), out: out.clone() })
            .expect("it fits");
    };
    enqueue(Lane::Compute, &x, &y);
    enqueue(Lane::Transfer, &y, &z);
    let fault = bench.device.wait(&bench.device.record(Lane::Transfer), soon()).expect_err("a race");
    assert_eq!(fault.kind, FaultKind::Race, "{fault}");
}

/// Somebody brings another weight into a slot while a product may still read it.
fn a_weight_that_is_overwritten_too_early_is_found<B: Backend>(bench: &Bench<B>) {
    let weight = bench.matrix(&bench.random(8, 8, 1.0));
    let x = bench.put(&bench.random(3, 8, 1.0)).view;
    let out = bench.device.allocate("out", x.dtype, 3, 8).expect("memory");
    let place = Place::default();
    let product = || Gemm::linear(x.clone(), &weight, out.clone());
    let fetch = || {
        bench.device.enqueue_external(
            Lane::Transfer,
            place,
            "fetch",
            &Accesses::new().write_weight(&weight),
            |_| Ok(()),
        )
    };
    bench.device.enqueue(Lane::Compute, place, product()).expect("it fits");
    bench.device.lane_wait(Lane::Transfer, &bench.device.record(Lane::Compute));
    fetch().expect("ordered");
    bench.device.lane_wait(Lane::Compute, &bench.device.record(Lane::Transfer));
    bench.device.enqueue(Lane::Compute, place, product()).expect("it fits");
    bench.device.wait(&bench.device.record(Lane::Compute), soon()).expect("everything is ordered");
    bench.device.enqueue(Lane::Compute, place, product()).expect("it fits");
    let event = bench.device.record(Lane::Compute);
    fetch().expect("the world stops instead");
    let fault = bench.device.wait(&event, soon()).expect_err("nothing orders the fetch behind the product");
    assert_eq!(fault.kind, FaultKind::Race);
    let message = fault.message;
    assert!(message.contains(&format!("({})", weight.name)) && message.contains("fetch"), "{message}");
}
