//! A lane as a transport between ranks of one process sees it.

use crate::{Buffer, DeviceError};

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

    /// Copies `from`, of any rank's memory, to as many rows of the same width and format in this one's.
    ///
    /// # Safety
    /// `to` is a declared write of the work that this queue was given to, which has passed the hazard check. The rank
    /// that owns `from` declared reading it, and its work does not end before the copy does.
    unsafe fn copy_from(&self, from: &Self::PeerRows, to: &Buffer) -> Result<(), DeviceError>;
}
