//! Ranks talking to each other: what every fabric promises, and the fabric of ranks that are threads of one
//! process.
//!
//! A fabric moves rows and bytes; it never computes. Sums over ranks are an exchange plus a fixed-order sum on
//! the device, so that no bit depends on the fabric. It knows nothing of experts or layers: a
//! [`Place`] is only a label for messages.

mod link;
mod single_rank;
mod threads;

pub use link::{Lateness, Link, Pacing};
pub use single_rank::SingleRank;
pub use threads::{FaultInjection, InjectedFault, Threads, ThreadsOptions};

use epsmoe_base::{Fault, Lane, Place, Rank};
use epsmoe_device::{Backend, Buffer, DeviceError};

/// One all-to-all of rows, with counts known on both sides.
#[derive(Clone, Debug)]
pub struct Exchange {
    /// What travels, for messages and timelines.
    pub name: &'static str,
    /// Rows for each rank, this one included `[R]`.
    pub send: Vec<Buffer>,
    /// Where the rows of each rank go `[R]`.
    pub receive: Vec<Buffer>,
}

/// One rank's end of a fabric.
///
/// All ranks issue the same exchanges in the same order; each wait has a deadline, and a rank that is late,
/// disagrees or died is named in the fault that stops the world.
pub trait Fabric<B: Backend>: Send + Sync + 'static {
    /// This rank.
    fn rank(&self) -> Rank;

    /// Number of ranks.
    fn size(&self) -> usize;

    /// Enqueues an exchange of rows on a lane. It is complete when everything has arrived here *and* what was
    /// sent may be overwritten.
    fn all_to_all_v(
        &self,
        device: &B,
        lane: Lane,
        place: Place,
        exchange: Exchange,
    ) -> Result<(), DeviceError>;

    /// Gives `message` to every rank and returns everybody's, in rank order. Blocks the caller.
    fn all_gather(&self, name: &'static str, place: Place, message: Vec<u8>) -> Result<Vec<Vec<u8>>, Fault>;

    /// Returns once every rank has come here.
    fn barrier(&self, place: Place) -> Result<(), Fault> {
        self.all_gather("barrier", place, Vec::new()).map(|_| ())
    }
}
