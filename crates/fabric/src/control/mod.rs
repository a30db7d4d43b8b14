//! Messages between the hosts of ranks.

mod tcp;
mod threads;

pub(crate) use tcp::{TcpControl, has_ended};
pub(crate) use threads::ThreadControl;

use epsmoe_base::{Fault, FaultCell, Place, Rank};
use std::borrow::Cow;

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

    /// Tells the others that nothing more will come from this rank, so that they need not wait for it when they end. Dropping
    /// the control does so too; who has something else to end together with them says it before.
    fn say_goodbye(&self) {}

    /// What people call a rank: where it is, if that can be somewhere else.
    fn name(&self, rank: Rank) -> String {
        rank.to_string()
    }
}

/// What a rank said in an exchange.
#[derive(Clone)]
struct Message {
    what: Cow<'static, str>,
    place: Place,
    bytes: Vec<u8>,
}

/// Finds the first rank whose message, of those of all ranks, is not for this exchange.
fn agreed(all: &[Message], what: &str, place: Place) -> Result<(), String> {
    match all.iter().position(|message| (&*message.what, message.place) != (what, place)) {
        None => Ok(()),
        Some(rank) => {
            let Message { what: other, place: there, .. } = &all[rank];
            Err(format!("{} came to {other} ({there}) where {what} was due", Rank(rank)))
        }
    }
}
