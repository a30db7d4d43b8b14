//! How long it takes to signal between host and streams, how many streams there may be, how well a host paces.

use super::bench::{Bench, Held, NEVER, Polled, Word, quantile, time_until};
use super::beside::{Work, wait_for};
use super::{Figure, Table};
use crate::cuda::driver::{CudaError, Partition, Stream};
use std::sync::Arc;
use std::time::{Duration, Instant};

const REPEATS: u32 = 200;

/// Streams that are tried for a queue of their own.
const MOST_STREAMS: usize = 160;

/// What a stream is given to get to its wait.
const SETTLE: Duration = Duration::from_micros(15);

/// Two streams, a word that the host raises, words on the way, and the word that the host looks at.
struct Ends<'a> {
    a: Stream,
    b: Stream,
    raised: Word<'a>,
    between: Word<'a>,
    between_on_device: u64,
    done: Word<'a>,
}

/// How a signal goes; the last argument is what the words are to become.
type Way = fn(&Bench, &Ends<'_>, u32) -> Result<(), CudaError>;

const ASKED: [(&str, Way); 2] = [
    ("asked to write, the stream writes", |bench, ends, turn| bench.write(&ends.a, ends.done.address, turn)),
    ("asked to write, a kernel writes", |bench, ends, turn| bench.mark(&ends.a, ends.done, turn)),
];

const RAISED: [(&str, Way); 5] = [
    ("word raised, its stream writes", |bench, ends, turn| {
        bench.wait(&ends.a, ends.raised.address, turn)?;
        bench.write(&ends.a, ends.done.address, turn)
    }),
    ("word raised, a kernel behind writes", |bench, ends, turn| {
        bench.wait(&ends.a, ends.raised.address, turn)?;
        bench.mark(&ends.a, ends.done, turn)
    }),
    ("word raised, a second stream writes; between them a host word", |bench, ends, turn| {
        over(bench, ends, ends.between.address, turn)
    }),
    ("word raised, a second stream writes; between them a device word", |bench, ends, turn| {
        over(bench, ends, ends.between_on_device, turn)
    }),
    ("word raised, a second stream writes; between them an event", |bench, ends, turn| {
        bench.wait(&ends.a, ends.raised.address, turn)?;
        ends.b.wait(&bench.record(&ends.a)?)?;
        bench.write(&ends.b, ends.done.address, turn)
    }),
];

fn over(bench: &Bench, ends: &Ends<'_>, between: u64, turn: u32) -> Result<(), CudaError> {
    bench.wait(&ends.a, ends.raised.address, turn)?;
    bench.write(&ends.a, between, turn)?;
    bench.wait(&ends.b, between, turn)?;
    bench.write(&ends.b, ends.done.address, turn)
}

/// Median and 95th percentile of each way on plain streams, and on streams of a partition where there is one.
pub(super) fn latencies(bench: &Bench, partition: Option<&Arc<Partition>>) -> Result<Table, CudaError> {
    let mut columns = vec!["plain".to_owned(), "plain, 95 %".to_owned()];
    if partition.is_some() {
        columns.extend(["partition".to_owned(), "partition, 95 %".to_owned()]);
    }
    let homes = [None].into_iter().chain(partition.map(Some));
    let homes: Vec<Option<&Arc<Partition>>> = homes.collect();
    let ways = ASKED.iter().map(|way| (way, false)).chain(RAISED.iter().map(|way| (way, true)));
    let mut rows = Vec::new();
    for (index, (&(name, way), raised)) in ways.enumerate() {
        let mut figures = Vec::new();
        for (home, partition) in homes.iter().enumerate() {
            let stream = || match partition {
                Some(partition) => partition.stream(),
                None => bench.stream(),
            };
            let ends = Ends {
                a: stream()?,
                b: stream()?,
                raised: bench.word(),
                between: bench.word(),
                between_on_device: bench.flag(2 * index + home),
                done: bench.word(),
            };
            figures.extend(latency(bench, &ends, way, raised)?);
        }
        rows.push((name.to_owned(), figures));
    }
    let title = "Signals, until the host sees the written word".into();
    Ok(Table { title, unit: "µs", columns, rows })
}

fn latency(bench: &Bench, ends: &Ends<'_>, way: Way, raised: bool) -> Result<[Figure; 2], CudaError> {
    let mut times = Vec::new();
    for turn in 1..=REPEATS {
        let mut began = Instant::now();
        way(bench, ends, turn)?;
        if raised {
            time_until(SETTLE, || Ok(false))?;
            began = Instant::now();
            ends.raised.set(turn);
        }
        if time_until(NEVER, || Ok(ends.done.get() == turn))?.is_none() {
            return Ok([Figure::Never, Figure::Never]);
        }
        times.push(began.elapsed());
    }
    Ok([0.5, 0.95].map(|part| Figure::Measured(quantile(&times, part))))
}

/// Blocks one stream, gives work to others made after it, and counts up to the first that does not get done: it shares
/// the queue of the blocked one.
pub(super) fn queues(bench: &Bench) -> Result<Table, CudaError> {
    type Block = for<'a> fn(&'a Bench, &Stream) -> Result<Held<'a>, CudaError>;
    let blocks: [(&str, Block); 2] = [
        ("a kernel waits for a kernel of its stream", |bench, stream| {
            let held = bench.spin(stream, 1, Polled::Device)?;
            bench.mark(stream, bench.word(), 1)?;
            Ok(held)
        }),
        ("a stream waits for a word", Bench::hold),
    ];
    let works = [Work::Kernel, Work::ToDevice(4096), Work::Within(4096)];
    let mut rows = Vec::new();
    for (name, block) in blocks {
        let mut figures = Vec::new();
        for work in works {
            let blocked = bench.stream()?;
            let streams = (0..MOST_STREAMS).map(|_| bench.stream()).collect::<Result<Vec<_>, _>>()?;
            let held = block(bench, &blocked)?;
            let mut events = Vec::new();
            for stream in &streams {
                work.enqueue(bench, stream)?;
                events.push(bench.record(stream)?);
            }
            time_until(NEVER, || Ok(false))?;
            let mut stuck = None;
            for (index, event) in events.iter().enumerate() {
                if !event.is_complete()? {
                    stuck = Some(index);
                    break;
                }
            }
            figures.push(stuck.map_or(Figure::Never, |index| Figure::Measured((index + 1) as f64)));
            drop(held);
            wait_for(bench, &blocked)?;
        }
        rows.push((name.to_owned(), figures));
    }
    let setting = epsmoe_base::env::text("CUDA_DEVICE_MAX_CONNECTIONS").unwrap_or_else(|| "not set".into());
    Ok(Table {
        title: format!(
            "Streams until one shares a queue (CUDA_DEVICE_MAX_CONNECTIONS {setting}; up to {MOST_STREAMS})"
        ),
        unit: "streams",
        columns: works.map(Work::name).into(),
        rows,
    })
}

/// A host thread releases copies at set times by raising a word that their stream waits for: how late each ends,
/// against the set time and what the copy takes among others.
pub(super) fn pacing(bench: &Bench) -> Result<Table, CudaError> {
    let works =
        [Work::ToDevice(256 << 10), Work::ToDevice(4 << 20), Work::Within(256 << 10), Work::Within(4 << 20)];
    let mut rows = Vec::new();
    for work in works {
        let copy = time_among_others(bench, work)?;
        let mut figures = vec![Figure::Measured(copy.as_secs_f64() * 1e6)];
        for busy in [false, true] {
            let spinning = bench.stream()?;
            let blocks = bench.multiprocessors().saturating_sub(4).max(1);
            let held = match busy {
                true => Some(bench.spin(&spinning, blocks, Polled::Device)?),
                false => None,
            };
            figures.extend(match paced(bench, work, copy)? {
                Some(late) => [0.5, 0.95, 1.0].map(|part| Figure::Measured(quantile(&late, part))),
                None => [Figure::Never, Figure::Never, Figure::Never],
            });
            drop(held);
            wait_for(bench, &spinning)?;
        }
        rows.push((work.name(), figures));
    }
    let columns = ["the copy", "late, median", "95 %", "most"].into_iter();
    let busy = ["beside a spinning kernel, 4 free: median", "95 %", "most"];
    Ok(Table {
        title: "Copies released by the host at set times: how late they end".into(),
        unit: "µs",
        columns: columns.chain(busy).map(str::to_owned).collect(),
        rows,
    })
}

/// What one more of many copies takes.
fn time_among_others(bench: &Bench, work: Work) -> Result<Duration, CudaError> {
    const MORE: u32 = 32;
    let stream = bench.stream()?;
    let run = |count: u32| {
        let began = Instant::now();
        (0..count).try_for_each(|_| work.enqueue(bench, &stream))?;
        wait_for(bench, &stream)?;
        Ok(began.elapsed())
    };
    run(1)?;
    Ok(run(1 + MORE)?.saturating_sub(run(1)?) / MORE)
}

/// How late the copies end that are released one by one; absent if one does not end.
fn paced(bench: &Bench, work: Work, copy: Duration) -> Result<Option<Vec<Duration>>, CudaError> {
    /// Copies enqueued at once: a stream takes in about a thousand pieces of work.
    const COPIES: u32 = 128;
    const ROUNDS: usize = 3;
    let interval = (2 * copy).max(Duration::from_micros(50));
    let (stream, released, done) = (bench.stream()?, bench.word(), bench.word());
    let mut late = Vec::new();
    for _ in 0..ROUNDS {
        released.set(0);
        done.set(0);
        for turn in 1..=COPIES {
            bench.wait(&stream, released.address, turn)?;
            work.enqueue(bench, &stream)?;
            bench.write(&stream, done.address, turn)?;
        }
        let began = Instant::now() + Duration::from_micros(200);
        let due = |turn: u32| began + interval * turn;
        let (mut given, mut seen) = (0, 0);
        while seen < COPIES {
            let now = Instant::now();
            if given < COPIES && now >= due(given + 1) {
                given += 1;
                released.set(given);
            }
            while seen < done.get().min(COPIES) {
                seen += 1;
                late.push(now.saturating_duration_since(due(seen) + copy));
            }
            if now > due(COPIES) + NEVER {
                released.set(COPIES);
                return Ok(None);
            }
        }
    }
    Ok(Some(late))
}

/// Microseconds of a raised word on the streams of a column.
pub(super) fn raised(table: &Table, column: usize) -> Option<f64> {
    table.rows.get(ASKED.len())?.1.get(column)?.measured()
}

/// The least distance of two streams that share a queue; as many as were tried if none did.
pub(super) fn fewest_queues(table: &Table) -> Option<u32> {
    let figures = table.rows.iter().flat_map(|row| &row.1);
    figures.map(|figure| figure.measured().map_or(MOST_STREAMS as u32, |streams| streams as u32)).min()
}

/// The largest 95th percentile, with the GPU idle or not.
pub(super) fn worst_pacing(table: &Table) -> Option<f64> {
    let late = |row: &(String, Vec<Figure>)| Some(row.1.get(2)?.measured()?.max(row.1.get(5)?.measured()?));
    let late: Option<Vec<f64>> = table.rows.iter().map(late).collect();
    late?.into_iter().reduce(f64::max)
}
