use epsmoe_base::{Bytes, Fault};

/// Why a device refused to do something. Faults while running are a [`Fault`] of the world.
#[derive(Clone, Debug, thiserror::Error)]
pub enum DeviceError {
    /// An operation was given tensors that do not fit each other.
    #[error("{0}")]
    Shape(String),
    /// The device has not enough memory.
    #[error("{name} needs {needed}, which {owner} cannot give; {mend}")]
    OutOfMemory {
        /// Whose memory it is.
        owner: &'static str,
        /// What was to be allocated.
        name: String,
        /// Its size.
        needed: Bytes,
        /// What lowers the need.
        mend: &'static str,
    },
    /// The machine cannot do what was asked.
    #[error("{0}")]
    Unsupported(String),
    /// The world has stopped.
    #[error(transparent)]
    Fault(#[from] Fault),
}
