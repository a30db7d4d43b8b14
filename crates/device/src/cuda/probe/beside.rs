//! Does other work progress beside a kernel that holds multiprocessors and waits?

use super::bench::{Bench, LARGEST, NEVER, Polled, quantile, time_until};
use super::{Figure, Table};
use crate::cuda::driver::{Copy2d, CudaError, End, Stream};
use std::time::Duration;

/// Multiprocessors that the spinning kernel leaves free.
pub(super) const FREE: [u32; 4] = [0, 4, 8, 16];

/// Where it looks meanwhile, besides: the columns behind those of device memory.
const POLLING_HOST: [u32; 2] = [0, 4];

const REPEATS: usize = 9;
const MIB: usize = 1 << 20;

/// What is tried beside the spinning kernel.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Work {
    ToDevice(usize),
    ToHost(usize),
    Within(usize),
    /// Rows of 4 KiB out of rows of 8 KiB, on the device.
    RowsWithin(usize),
    /// The same from the host.
    RowsToDevice(usize),
    Fill(usize),
    Kernel,
}

pub(super) const WORKS: [Work; 10] = [
    Work::ToDevice(MIB),
    Work::ToDevice(LARGEST),
    Work::ToHost(MIB),
    Work::ToHost(LARGEST),
    Work::Within(MIB),
    Work::Within(LARGEST),
    Work::RowsWithin(MIB),
    Work::RowsToDevice(MIB),
    Work::Fill(MIB),
    Work::Kernel,
];

impl Work {
    pub(super) fn name(self) -> String {
        let sized = |what: &str, bytes: usize| match bytes / MIB {
            0 => format!("{what}, {} KiB", bytes >> 10),
            whole => format!("{what}, {whole} MiB"),
        };
        match self {
            Work::ToDevice(bytes) => sized("copy host to device", bytes),
            Work::ToHost(bytes) => sized("copy device to host", bytes),
            Work::Within(bytes) => sized("copy on the device", bytes),
            Work::RowsWithin(bytes) => sized("copy of rows on the device", bytes),
            Work::RowsToDevice(bytes) => sized("copy of rows host to device", bytes),
            Work::Fill(bytes) => sized("fill", bytes),
            Work::Kernel => "kernel of one small block".into(),
        }
    }

    pub(super) fn bytes(self) -> usize {
        match self {
            Work::ToDevice(bytes) | Work::ToHost(bytes) | Work::Within(bytes) => bytes,
            Work::RowsWithin(bytes) | Work::RowsToDevice(bytes) | Work::Fill(bytes) => bytes,
            Work::Kernel => 0,
        }
    }

    pub(super) fn enqueue(self, bench: &Bench, stream: &Stream) -> Result<(), CudaError> {
        let (from, to, host) = (bench.source.start, bench.target.start, bench.host_on_device);
        let rows = |from, bytes| Copy2d {
            from,
            from_pitch: 8192,
            to: End::Device(to),
            to_pitch: 4096,
            width: 4096,
            rows: bytes / 4096,
        };
        // SAFETY: all sizes are at most that of the memories, which the bench keeps; their bytes mean nothing.
        unsafe {
            match self {
                Work::ToDevice(bytes) => stream.copy_bytes(host, to, bytes),
                Work::ToHost(bytes) => stream.copy_bytes(from, host, bytes),
                Work::Within(bytes) => stream.copy_bytes(from, to, bytes),
                Work::RowsWithin(bytes) => stream.copy(&rows(End::Device(from), bytes)),
                Work::RowsToDevice(bytes) => stream.copy(&rows(End::Host(bench.host_start()), bytes)),
                Work::Fill(bytes) => stream.fill(to, 1, bytes),
                Work::Kernel => bench.mark(stream, bench.word(), 1),
            }
        }
    }

    /// The time from asking to the end, in microseconds; never, if it does not end soon.
    pub(super) fn time(self, bench: &Bench) -> Result<Figure, CudaError> {
        // What gets stuck takes its stream with it.
        self.time_on(bench, &bench.stream()?)
    }

    /// The same on a stream at hand.
    pub(super) fn time_on(self, bench: &Bench, stream: &Stream) -> Result<Figure, CudaError> {
        let mut times = Vec::new();
        for _ in 0..REPEATS {
            let mut event = None;
            let time = time_until(NEVER, || match &event {
                None => {
                    self.enqueue(bench, stream)?;
                    event = Some(bench.record(stream)?);
                    Ok(false)
                }
                Some(event) => event.is_complete(),
            })?;
            match time {
                Some(time) => times.push(time),
                None => return Ok(Figure::Never),
            }
        }
        Ok(Figure::Measured(quantile(&times, 0.5)))
    }
}

/// Times alone, then beside a kernel that spins on all but so many multiprocessors.
pub(super) fn spinning_kernel(bench: &Bench) -> Result<Table, CudaError> {
    let mut rows: Vec<_> = WORKS.map(|work| (work.name(), Vec::new())).into();
    for (work, row) in WORKS.iter().zip(&mut rows) {
        row.1.push(work.time(bench)?);
    }
    let ways = FREE.map(|free| (free, Polled::Device)).into_iter();
    let ways: Vec<_> = ways.chain(POLLING_HOST.map(|free| (free, Polled::Host))).collect();
    for &(free, polled) in &ways {
        for (work, row) in WORKS.iter().zip(&mut rows) {
            let stream = bench.stream()?;
            let held = bench.spin(&stream, bench.multiprocessors().saturating_sub(free).max(1), polled)?;
            row.1.push(match held.runs() {
                true => work.time(bench)?,
                false => Figure::Missing("the spinning kernel did not start".into()),
            });
            drop(held);
            wait_for(bench, &stream)?;
        }
    }
    let named = ways.iter().map(|(free, polled)| match polled {
        Polled::Device => format!("{free} free"),
        Polled::Host => format!("{free} free, polling host memory"),
    });
    Ok(Table {
        title: "Work beside a kernel that spins on all multiprocessors but some".into(),
        unit: "µs",
        columns: ["alone".into()].into_iter().chain(named).collect(),
        rows,
    })
}

/// Waits until a stream is done, which a spinning kernel's own end guarantees.
pub(super) fn wait_for(bench: &Bench, stream: &Stream) -> Result<(), CudaError> {
    let event = bench.record(stream)?;
    time_until(Duration::from_secs(5), || event.is_complete()).map(|_| ())
}
