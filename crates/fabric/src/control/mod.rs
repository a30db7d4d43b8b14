//! Messages between the hosts of ranks.

mod threads;

pub(crate) use threads::ThreadControl;

use epsmoe_base::{Fault, FaultCell, Place, Rank};

/// One rank's end of the messages between hosts.
///
/// All ranks make the same exchanges in the same order; each wait has a deadline, and a rank that is late, disagrees or
/// died is named in the fault that stops the world.
pub trait Control: Send + Sync + 'static {
    /// This rank.
    fn rank(&self) -> Rank;

    /// Number of ranks.
    fn size(&self) -> usize;

    /// An all-gather: gives `message` to every rank and returns everybody's, in rank order. Blocks the caller. Ranks
    /// whose `what` or `place` differ are a mismatch.
    fn exchange(&self, what: &'static str, place: Place, message: Vec<u8>) -> Result<Vec<Vec<u8>>, Fault>;

    /// Returns once every rank has come here.
    fn barrier(&self, place: Place) -> Result<(), Fault> {
        self.exchange("barrier", place, Vec::new()).map(|_| ())
    }

    /// Where this rank learns that the world has stopped.
    fn faults(&self) -> &FaultCell;

    /// Stops the world and returns its first fault, which may be another.
    fn raise(&self, fault: Fault) -> Fault {
        self.faults().raise(fault)
    }
}
