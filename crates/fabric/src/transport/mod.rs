//! Rows between the memories of ranks.

#[cfg(feature = "mpi")]
mod mpi;
mod nccl;
mod parcels;
mod tcp;
mod threads;

#[cfg(feature = "mpi")]
pub use mpi::Mpi;
#[cfg(feature = "mpi")]
pub(crate) use mpi::MpiCarrier;
pub(crate) use nccl::NcclTransport;
pub(crate) use parcels::{Carrier, ParcelTransport};
pub(crate) use tcp::TcpCarrier;
pub use threads::{FaultInjection, InjectedFault, ThreadsOptions};
pub(crate) use threads::{LinkPace, ThreadTransport};

use epsmoe_base::{DType, Lane, Place, Rank, count};
use epsmoe_device::op::Accesses;
use epsmoe_device::{Backend, Buffer, DeviceError};
use std::sync::Arc;

/// One all-to-all of rows, with counts known on both sides.
#[derive(Clone, Debug)]
pub struct Exchange {
    /// What travels, for messages and timelines.
    pub name: &'static str,
    /// Rows for each rank of the transport, this one included, in the order of [`Transport::ranks`].
    pub send: Vec<Buffer>,
    /// Where the rows of each rank go, likewise.
    pub receive: Vec<Buffer>,
}

impl Exchange {
    /// What of this rank's memory it touches: it reads what is sent, and writes what is received.
    pub(crate) fn accesses(&self) -> Accesses {
        let reads = self.send.iter().fold(Accesses::new(), Accesses::read);
        self.receive.iter().fold(reads, Accesses::write)
    }

    /// What the link of the rank at position `me` is occupied with: the larger of what leaves for other ranks and what
    /// comes from them. A link carries both directions at once; rows of a rank's own do not take it.
    pub(crate) fn link_bytes(&self, me: usize) -> u64 {
        let others = |parts: &[Buffer]| -> u64 {
            let others = parts.iter().enumerate().filter(|(position, _)| *position != me);
            others.map(|(_, part)| (part.rows * part.width * part.dtype.bytes()) as u64).sum()
        };
        others(&self.send).max(others(&self.receive))
    }
}

/// One rank's end of the exchanges of rows among some ranks: all of the world, or a sub-group.
///
/// All its ranks enqueue the same exchanges in the same order; exchanges of different transports are ordered by their
/// lanes alone. Each wait has a deadline, and a rank that is late, disagrees or died is named, by its number in the
/// world, in the fault that stops the world.
pub trait Transport<B: Backend>: Send + Sync + 'static {
    /// The ranks, by their numbers in the world, ascending.
    fn ranks(&self) -> &[Rank];

    /// Enqueues an exchange of rows on a lane. It is complete when everything has arrived here *and* what was
    /// sent may be overwritten.
    fn all_to_all_v(
        &self,
        device: &B,
        lane: Lane,
        place: Place,
        exchange: Exchange,
    ) -> Result<(), DeviceError>;

    /// The transport of some of the ranks, in ascending order, this one among them. All ranks of this transport call it
    /// in the same order, each with the ranks of its own group.
    fn subgroup(&self, ranks: &[Rank]) -> Result<Arc<dyn Transport<B>>, DeviceError>;
}

/// Where a rank is among those of a transport.
pub(crate) fn position(ranks: &[Rank], me: Rank) -> usize {
    ranks.iter().position(|rank| *rank == me).unwrap_or(0)
}

/// Refuses a sub-group that `me` cannot be in.
pub(crate) fn check_subgroup(all: &[Rank], me: Rank, ranks: &[Rank]) -> Result<(), DeviceError> {
    let ascending = ranks.is_sorted_by(|first, second| first < second);
    if ascending && ranks.contains(&me) && ranks.iter().all(|rank| all.contains(rank)) {
        return Ok(());
    }
    Err(DeviceError::Shape(format!(
        "{ranks:?} is no group of {me} among {all:?}: its ranks must ascend and hold {me}. This is a bug."
    )))
}

/// Refuses an exchange without a part for each of `size` ranks.
pub(crate) fn check_parts(exchange: &Exchange, size: usize) -> Result<(), DeviceError> {
    if exchange.send.len() == size && exchange.receive.len() == size {
        return Ok(());
    }
    Err(DeviceError::Shape(format!(
        "{}: {} parts sent and {} received among {}",
        exchange.name,
        exchange.send.len(),
        exchange.receive.len(),
        count(size, "rank")
    )))
}

/// Refuses a part that came from `sender` and is not what is due: of another exchange, or of other rows `[N, width]`.
pub(crate) fn check_part(
    sender: Rank,
    (name, place, room): (&str, Place, &Buffer),
    (other, there, [rows, width], dtype): (&str, Place, [usize; 2], DType),
) -> Result<(), String> {
    if (other, there) != (name, place) {
        return Err(format!("{sender} sent {other} ({there}) where {name} was due"));
    }
    if (rows, width, dtype) == (room.rows, room.width, room.dtype) {
        return Ok(());
    }
    Err(format!(
        "{sender} sent {} of {name} ({width} wide, {dtype}) where {} ({} wide, {}) were announced",
        count(rows, "row"),
        count(room.rows, "row"),
        room.width,
        room.dtype
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use epsmoe_base::DType;
    use epsmoe_device::AllocationId;

    #[test]
    fn a_link_carries_the_larger_direction_and_none_of_a_ranks_own_rows() {
        let part = |rows| {
            let allocation = AllocationId(0);
            Buffer { allocation, name: "rows", dtype: DType::BF16, offset: 0, rows, width: 5, stride: 8 }
        };
        let parts = |rows: [usize; 3]| rows.map(part).to_vec();
        let exchange = Exchange { name: "dispatch", send: parts([3, 100, 4]), receive: parts([2, 100, 1]) };
        assert_eq!(exchange.link_bytes(1), (3 + 4) * 5 * 2, "more leaves than comes");
        let back = Exchange { send: exchange.receive, receive: exchange.send, ..exchange };
        assert_eq!(back.link_bytes(1), (3 + 4) * 5 * 2, "more comes than leaves");
        let own = Exchange { name: "dispatch", send: parts([0, 9, 0]), receive: parts([0, 9, 0]) };
        assert_eq!(own.link_bytes(1), 0);
    }
}
