//! A processor: memory, weights, and lanes that run operations in order.
//!
//! Read in this order: [`Backend`] (what a processor promises), [`op`] (what it computes), [`hazard`] (how a
//! missing event is found), [`threaded`] (lanes and memory of a CPU), then the two host processors:
//! [`reference`](mod@reference), slow and plain, the judge of every other, and [`cpu`], the fast one. [`cuda`] is a
//! GPU.
//!
//! This room knows neither ranks' partners nor models: it runs what it is told.

mod backend;
mod buffer;
pub mod cpu;
pub mod cuda;
mod error;
pub mod hazard;
pub mod op;
mod queue;
pub mod reference;
pub mod threaded;
mod weight;

pub use backend::{Backend, Record, Reserve, Tally};
pub use buffer::{AllocationId, Buffer};
pub use error::DeviceError;
pub use queue::{Holds, HostQueue, Pace, PeerQueue};
pub use weight::{Drawn, TensorBytes, Weight, WeightFormat, WeightShape, WeightSlot};
