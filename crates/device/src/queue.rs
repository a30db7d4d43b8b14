//! A lane as a transport between ranks of one process sees it.

use crate::{Buffer, DeviceError};
use std::borrow::Cow;
use std::time::Instant;

/// A queue of a lane that can copy rows out of another rank's memory in the same process.
///
/// What is called here happens in the order of the lane: at once where the caller runs on the lane itself (a host
/// processor), when the queue gets there where the caller only fills it (a GPU's stream). Marks carry that order from
/// one rank's queue to another's.
pub trait PeerQueue: Send + Sync + 'static {
    /// Rows of this rank's memory as another rank's queue can read them.
    type PeerRows: Send + 'static;
    /// A point in a queue: reached once everything before it is done.
    type Mark: Clone + Send + Sync + 'static;

    /// Names rows of this rank's memory to others.
    fn share(&self, rows: &Buffer) -> Result<Self::PeerRows, DeviceError>;

    /// The point that the queue has been filled to.
    fn mark(&self) -> Result<Self::Mark, DeviceError>;

    /// Lets nothing that follows in this queue start before `mark`, of any rank's queue, is reached.
    fn after(&self, mark: &Self::Mark) -> Result<(), DeviceError>;

    /// Copies rows of any rank's memory to as many rows of the same width and format in this one's, in any order. The
    /// memory they come from stays until that is done, even if the rank that owns it is gone.
    ///
    /// # Safety
    /// Each target is a declared write of the work that this queue was given to, which has passed the hazard check. The
    /// rank that owns the rows declared reading them, and its work does not end before the copy does.
    unsafe fn copy(&self, copies: &[(&Self::PeerRows, &Buffer)]) -> Result<(), DeviceError>;

    /// How the queue is held up at set times; nothing if the caller runs on the lane itself, and can sleep there.
    fn holds(&self) -> Option<&dyn Holds>;
}

/// A queue whose caller runs on the lane, and sees the rank's memory as bytes: what a transport between processes needs.
pub trait HostQueue: PeerQueue {
    /// The bytes of rows, one after the other.
    ///
    /// # Safety
    /// The rows are a declared read of the work that this queue was given to, which has passed the hazard check and ends
    /// after the bytes are dropped.
    unsafe fn bytes(&self, rows: &Buffer) -> Cow<'_, [u8]>;

    /// Puts bytes into rows that have as many.
    ///
    /// # Safety
    /// The rows are a declared write of that work.
    unsafe fn fill(&self, rows: &Buffer, bytes: &[u8]);
}

/// A queue that the caller fills ahead of time, and that can stand still in between.
pub trait Holds {
    /// Marks the point from which a hold counts.
    fn begin(&self) -> Result<(), DeviceError>;

    /// Lets nothing that follows start before `pace` says so.
    fn hold(&self, pace: Box<dyn Pace>) -> Result<(), DeviceError>;
}

/// Decides how long a queue stands still, once it is there. Called on a thread of the device.
pub trait Pace: Send {
    /// The queue came to [`Holds::begin`] at `begun`: gives when it may go on behind [`Holds::hold`].
    fn due(&mut self, begun: Instant) -> Instant;

    /// Whether nothing is worth waiting for any more; asked again and again from then on.
    fn is_over(&mut self) -> bool;

    /// The queue came to the hold at `arrived`, and went on at `now`.
    fn passed(&mut self, arrived: Instant, now: Instant);
}
