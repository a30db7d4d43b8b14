//! Which parts of a GPU kernels can be confined to, and whether two parts work at the same time.

use super::bench::{Bench, Polled};
use super::beside::{Work, wait_for};
use super::{Figure, Table};
use crate::cuda::driver::{CudaError, Partition, Stream};
use std::sync::Arc;

/// Partitions asked for: how many, of how many multiprocessors at least.
const SPLITS: [(u32, u32); 5] = [(1, 8), (1, 16), (2, 64), (4, 32), (8, 16)];

/// What the driver grants.
pub(super) fn granted(bench: &Bench) -> Table {
    let rows = SPLITS.map(|(count, least)| {
        let figures = match Partition::split(bench.context(), count, least) {
            Err(error) => vec![Figure::Missing(error.to_string())],
            Ok(parts) => {
                parts.iter().map(|part| Figure::Measured(f64::from(part.multiprocessors()))).collect()
            }
        };
        (format!("{count} of {least}"), figures)
    });
    let most = rows.iter().map(|row| row.1.len()).max().unwrap_or(0);
    Table {
        title: "Partitions granted, the rest last".into(),
        unit: "multiprocessors",
        columns: (1..=most).map(|part| format!("part {part}")).collect(),
        rows: rows.into(),
    }
}

/// Times a kernel in one place while a spinning kernel holds another.
pub(super) fn together(bench: &Bench, parts: &[Arc<Partition>; 2]) -> Result<Table, CudaError> {
    let places = [("part 1", Some(&parts[0])), ("part 2", Some(&parts[1])), ("anywhere", None)];
    let stream = |place: Option<&Arc<Partition>>| -> Result<Stream, CudaError> {
        place.map_or_else(|| bench.stream(), Partition::stream)
    };
    let mut rows = Vec::new();
    for (name, place) in places {
        let size = place.map_or(bench.multiprocessors(), |part| part.multiprocessors());
        for (fill, times) in [("one block", 1), ("two blocks", 2)] {
            let mut figures = Vec::new();
            for (_, other) in places {
                let spinning = stream(place)?;
                // With twice the blocks, half of them wait for the others to end: `started` stays unset.
                let held = bench.spin(&spinning, size * times, Polled::Device)?;
                held.runs();
                figures.push(Work::Kernel.time_on(bench, &stream(other)?)?);
                drop(held);
                wait_for(bench, &spinning)?;
            }
            rows.push((format!("spinning in {name} ({size}), {fill} for each multiprocessor"), figures));
        }
    }
    Ok(Table {
        title: "A small kernel beside a spinning one, by where each runs".into(),
        unit: "µs",
        columns: places.map(|(name, _)| format!("kernel in {name}")).into(),
        rows,
    })
}

/// Whether a kernel in either part progressed beside waiting kernels in the other, however many.
pub(super) fn run_together(table: &Table) -> Option<bool> {
    // Two rows for each place: part 1, part 2.
    let figure = |row: usize, column: usize| Some(table.rows.get(row)?.1.get(column)? != &Figure::Never);
    Some(figure(0, 1)? && figure(1, 1)? && figure(2, 0)? && figure(3, 0)?)
}
