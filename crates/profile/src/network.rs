//! What the network between ranks carries, as they measure it together before they begin: no profile of one machine says it.

use epsmoe_base::{DType, Deadline, Fault, FaultKind, Lane, Place};
use epsmoe_device::{Backend, Buffer, DeviceError};
use epsmoe_fabric::{Exchange, Fabric, Link};
use epsmoe_plan::{CostModel, LinkCost, Piecewise};
use std::ops::Range;
use std::time::{Duration, Instant};

/// Bytes of a row.
const ROW: usize = 1 << 10;

/// An exchange that takes so long is one whose rate can be told …
const LONG: Duration = Duration::from_millis(10);

/// … and so many rows for each of the others are enough, however short.
const MOST_ROWS: usize = 8 << 10;

/// How fast rows travel when every rank sends as much to every other: in exchanges of a row for each, and of so many that they
/// take a while. All ranks ask at the same time, each with a processor that has nothing else to do, and hear the same.
///
/// # Errors
/// The world has stopped.
pub fn network<B: Backend>(fabric: &Fabric<B>, device: &B, timeout: Duration) -> Result<Link, Fault> {
    let measure = |rows| shortest(fabric, device, rows, timeout);
    let start = measure(1)?;
    let mut rows = 64;
    let mut took = measure(rows)?;
    while took < LONG && rows < MOST_ROWS {
        rows *= 2;
        took = measure(rows)?;
    }
    let others = fabric.size().saturating_sub(1);
    let bytes = ((rows - 1) * others * ROW) as f64;
    let rate = bytes / took.saturating_sub(start).as_secs_f64().max(1e-9);
    Ok(Link { bytes_per_second: (rate as u64).max(1), latency: start })
}

/// The same costs where rows travel over a network.
pub fn with_network(cost: &CostModel, network: Link) -> CostModel {
    let near = Piecewise::line(network.latency.as_nanos() as u64, network.bytes_per_second);
    CostModel { link: LinkCost { near, ..cost.link.clone() }, ..cost.clone() }
}

/// The shortest of some exchanges of `rows` for each of the others, on the rank that it takes longest.
fn shortest<B: Backend>(
    fabric: &Fabric<B>,
    device: &B,
    rows: usize,
    timeout: Duration,
) -> Result<Duration, Fault> {
    const TIMES: usize = 3;
    let (size, me) = (fabric.size(), fabric.rank().0);
    let refused = |error: DeviceError| match error {
        DeviceError::Fault(fault) => fault,
        error => {
            let (kind, place, message) = (FaultKind::Invalid, Place::default(), error.to_string());
            fabric.control.raise(Fault { kind, rank: fabric.rank(), place, message })
        }
    };
    let all = || device.allocate("network", DType::F32, size * rows, ROW / DType::F32.bytes());
    let (send, receive) = (all().map_err(refused)?, all().map_err(refused)?);
    // A rank's own rows do not travel.
    let part = |rank: usize| -> Range<usize> { rank * rows..rank * rows + if rank == me { 0 } else { rows } };
    let mut shortest = Duration::MAX;
    for _ in 0..TIMES {
        let parts = |of: &Buffer| -> Result<Vec<Buffer>, Fault> {
            (0..size).map(|rank| of.rows(part(rank)).map_err(refused)).collect()
        };
        let exchange = Exchange { name: "network", send: parts(&send)?, receive: parts(&receive)? };
        fabric.control.barrier(Place::default())?;
        let begun = Instant::now();
        let lane = Lane::Transfer;
        fabric.transport.all_to_all_v(device, lane, Place::default(), exchange).map_err(refused)?;
        device.wait(&device.record(lane), Deadline::behind(timeout))?;
        let mine = (begun.elapsed().as_nanos() as u64).to_le_bytes().to_vec();
        let all = fabric.control.exchange("network", Place::default(), mine)?;
        let longest =
            all.iter().filter_map(|took| Some(u64::from_le_bytes(took.as_slice().try_into().ok()?)));
        shortest = shortest.min(Duration::from_nanos(longest.max().unwrap_or(0)));
    }
    Ok(shortest)
}

#[cfg(test)]
mod tests {
    use super::*;
    use epsmoe_base::FaultCell;
    use epsmoe_device::reference::{self, PlainKernels, Reference};
    use epsmoe_fabric::ThreadsOptions;

    /// A link whose speed is known.
    #[test]
    fn what_a_paced_link_carries() {
        let link: Link = "50MB/s,2ms".parse().unwrap();
        let (timeout, faults) = (Duration::from_secs(30), FaultCell::default());
        let options = ThreadsOptions { link: Some(link), ..ThreadsOptions::new(timeout, faults) };
        let ranks = Fabric::threads(3, options).into_iter().map(|fabric: Fabric<Reference>| {
            std::thread::spawn(move || {
                let host = reference::options(DType::F32, 0);
                let device = Reference::new(fabric.rank(), PlainKernels, Default::default(), host).unwrap();
                network(&fabric, &device, timeout).unwrap()
            })
        });
        let heard: Vec<Link> =
            ranks.collect::<Vec<_>>().into_iter().map(|rank| rank.join().unwrap()).collect();
        assert!(heard.iter().all(|told| *told == heard[0]), "{heard:?}");
        let rate = heard[0].bytes_per_second as f64 / link.bytes_per_second as f64;
        assert!((0.4..1.3).contains(&rate), "{heard:?}");
        assert!((2..40).contains(&heard[0].latency.as_millis()), "{heard:?}");
    }
}
