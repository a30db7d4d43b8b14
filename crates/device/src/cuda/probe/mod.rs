//! Probes: what a GPU does where nothing promises it, measured before anything is built upon it.
//!
//! Each file asks some questions and answers with tables; [`Capabilities`] is what later code decides by. A kernel that
//! holds multiprocessors here ends by itself after a second, and every wait of the host has an end. What the driver
//! refuses is an answer too.

mod bench;
mod beside;
mod partitions;
mod signals;
mod slowdown;

use super::CudaDevice;
use super::driver::Partition;
use super::layout::Layout;
use crate::DeviceError;
use bench::Bench;
use beside::{FREE, WORKS, Work};
use serde::Serialize;
use std::fmt;
use std::sync::Arc;

/// What the sources are held against.
pub(super) const LAYOUTS: &[&Layout] = &[bench::Spin::LAYOUT, bench::Mark::LAYOUT];

/// What was found out about a GPU.
#[derive(Clone, Debug, Serialize)]
pub struct Probes {
    /// The figures.
    pub tables: Vec<Table>,
    /// What follows from them.
    pub capabilities: Capabilities,
}

/// Figures that belong together.
#[derive(Clone, Debug, Serialize)]
pub struct Table {
    /// What they say.
    pub title: String,
    /// What they count.
    pub unit: &'static str,
    /// Names of the columns.
    pub columns: Vec<String>,
    /// Name and figures of each row; no more figures than columns.
    pub rows: Vec<(String, Vec<Figure>)>,
}

/// An entry of a table.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub enum Figure {
    /// In the unit of its table.
    Measured(f64),
    /// It was not done while it was waited for.
    Never,
    /// It could not be tried, for this reason.
    Missing(String),
}

impl Figure {
    /// What was measured.
    pub fn measured(&self) -> Option<f64> {
        if let Figure::Measured(figure) = self { Some(*figure) } else { None }
    }
}

impl fmt::Display for Figure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Figure::Measured(figure) if *figure < 10.0 => write!(f, "{figure:.2}"),
            Figure::Measured(figure) if *figure < 100.0 => write!(f, "{figure:.1}"),
            Figure::Measured(figure) => write!(f, "{figure:.0}"),
            Figure::Never => f.write_str("never"),
            Figure::Missing(_) => f.write_str("not available"),
        }
    }
}

/// Something that was measured, or could not be.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub enum Known<T> {
    /// As measured.
    Measured(T),
    /// Not available on this machine, for this reason.
    NotAvailable(String),
}

impl<T> Known<T> {
    /// What was measured.
    pub fn measured(&self) -> Option<&T> {
        match self {
            Known::Measured(value) => Some(value),
            Known::NotAvailable(_) => None,
        }
    }
}

/// What a GPU of this machine can be relied on for.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Capabilities {
    /// Multiprocessors that a waiting kernel must leave free for copies in one piece to progress, in any direction.
    pub free_for_copies: Known<u32>,
    /// The same for copies of rows.
    pub free_for_row_copies: Known<u32>,
    /// The same for small kernels.
    pub free_for_kernels: Known<u32>,
    /// Microseconds from a raised word, over a stream that waits for it, to the host's seeing what the stream wrote.
    pub signal_us: Known<f64>,
    /// The same on a stream of a partition.
    pub partition_signal_us: Known<f64>,
    /// Multiprocessors of the smaller and of the larger part, if a GPU can be parted.
    pub partitions: Known<[u32; 2]>,
    /// Whether a kernel in one part progresses while another part is filled by waiting kernels.
    pub partitions_run_together: Known<bool>,
    /// Streams after which one shares a queue with a blocked one.
    pub queues: Known<u32>,
    /// How many times as long a product takes beside copies on the device of a mebibyte and more, at worst.
    pub device_copy_slowdown: Known<f64>,
    /// Microseconds by which copies end late that a host thread releases at set times: the 95th percentile of the
    /// worst kind.
    pub pacing_error_us: Known<f64>,
}

impl<T: fmt::Display> fmt::Display for Known<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Known::Measured(value) => match f.precision() {
                Some(precision) => write!(f, "{value:.precision$}"),
                None => write!(f, "{value}"),
            },
            Known::NotAvailable(reason) => write!(f, "not available: {reason}"),
        }
    }
}

impl Capabilities {
    /// Every entry, in words.
    pub fn entries(&self) -> [(&'static str, String); 10] {
        let parts = match &self.partitions {
            Known::Measured([small, large]) => format!("{small} and {large}"),
            Known::NotAvailable(reason) => format!("not available: {reason}"),
        };
        [
            ("multiprocessors to leave free for copies", self.free_for_copies.to_string()),
            ("for copies of rows", self.free_for_row_copies.to_string()),
            ("for small kernels", self.free_for_kernels.to_string()),
            ("signal over a stream, µs", format!("{:.1}", self.signal_us)),
            ("in a partition, µs", format!("{:.1}", self.partition_signal_us)),
            ("partitions of multiprocessors", parts),
            ("partitions run together", self.partitions_run_together.to_string()),
            ("streams until one shares a queue", self.queues.to_string()),
            ("products beside device copies, times as long", format!("{:.2}", self.device_copy_slowdown)),
            ("copies released by the host end late by, µs", format!("{:.1}", self.pacing_error_us)),
        ]
    }
}

/// Measures; takes some seconds, in which the GPU should have nothing else to do.
pub fn probe(device: &Arc<CudaDevice>) -> Result<Probes, DeviceError> {
    device.finish_kernels()?;
    let bench = Bench::new(device)?;
    let parts = Partition::pair(bench.context(), 16);
    let beside = beside::spinning_kernel(&bench).map_err(DeviceError::from);
    let latencies = signals::latencies(&bench, parts.as_ref().ok().map(|parts| &parts[0]));
    let together = match &parts {
        Ok(parts) => partitions::together(&bench, parts).map_err(DeviceError::from),
        Err(error) => Err(error.clone().into()),
    };
    let queues = signals::queues(&bench).map_err(DeviceError::from);
    let pacing = signals::pacing(&bench).map_err(DeviceError::from);
    let slowdown = slowdown::of_products(&bench);
    let latencies = latencies.map_err(DeviceError::from);

    let capabilities = Capabilities {
        free_for_copies: known(&beside, |table| {
            least_free(table, |work| matches!(work, Work::ToDevice(_) | Work::ToHost(_) | Work::Within(_)))
        }),
        free_for_row_copies: known(&beside, |table| {
            least_free(table, |work| matches!(work, Work::RowsWithin(_) | Work::RowsToDevice(_)))
        }),
        free_for_kernels: known(&beside, |table| least_free(table, |work| work == Work::Kernel)),
        signal_us: known(&latencies, |table| signals::raised(table, 0)),
        partition_signal_us: known(&latencies, |table| signals::raised(table, 2)),
        partitions: match &parts {
            Ok(parts) => Known::Measured([parts[0].multiprocessors(), parts[1].multiprocessors()]),
            Err(error) => Known::NotAvailable(error.to_string()),
        },
        partitions_run_together: known(&together, partitions::run_together),
        queues: known(&queues, signals::fewest_queues),
        device_copy_slowdown: known(&slowdown, slowdown::of_large_copies),
        pacing_error_us: known(&pacing, signals::worst_pacing),
    };
    let tables = [beside, latencies, Ok(partitions::granted(&bench)), together, queues, pacing, slowdown];
    Ok(Probes { tables: tables.into_iter().filter_map(Result::ok).collect(), capabilities })
}

/// What a table says, if there is one and it says it.
fn known<T>(table: &Result<Table, DeviceError>, read: impl FnOnce(&Table) -> Option<T>) -> Known<T> {
    match table {
        Err(error) => Known::NotAvailable(error.to_string()),
        Ok(table) => match read(table) {
            Some(value) => Known::Measured(value),
            None => Known::NotAvailable("it never happened while it was waited for".into()),
        },
    }
}

/// The fewest free multiprocessors beside which all such work was done.
fn least_free(table: &Table, wanted: impl Fn(Work) -> bool) -> Option<u32> {
    let rows = WORKS.iter().zip(&table.rows).filter(|(work, _)| wanted(**work));
    let rows: Vec<&Vec<Figure>> = rows.map(|(_, row)| &row.1).collect();
    let done = |column: usize| rows.iter().all(|row| matches!(row.get(column), Some(Figure::Measured(_))));
    (0..FREE.len()).find(|&index| (index..FREE.len()).all(|index| done(1 + index))).map(|index| FREE[index])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn beside(figures: [[Figure; 5]; WORKS.len()]) -> Table {
        let rows = figures.into_iter().zip(WORKS).map(|(row, work)| (work.name(), row.into())).collect();
        Table { title: String::new(), unit: "µs", columns: Vec::new(), rows }
    }

    #[test]
    fn the_fewest_free_multiprocessors_are_those_from_which_on_all_is_done() {
        let done = || Figure::Measured(1.0);
        let table = |stuck: &[usize]| {
            beside(std::array::from_fn(|work| {
                std::array::from_fn(|column| match stuck.contains(&column) && WORKS[work] == Work::Kernel {
                    true => Figure::Never,
                    false => done(),
                })
            }))
        };
        let kernels = |stuck: &[usize]| least_free(&table(stuck), |work| work == Work::Kernel);
        assert_eq!(kernels(&[]), Some(0));
        assert_eq!(kernels(&[1]), Some(4));
        assert_eq!(kernels(&[1, 3]), Some(16));
        assert_eq!(kernels(&[4]), None);
        assert_eq!(least_free(&table(&[1, 2, 3, 4]), |work| work == Work::Fill(1 << 20)), Some(0));
    }
}
