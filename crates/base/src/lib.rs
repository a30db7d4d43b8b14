//! The words every room of epsmoe shares, and how files and texts that nobody has to trust are read and shown. No
//! device, no decisions.
//!
//! # The alphabet
//!
//! | letter | meaning |
//! |---|---|
//! | T | tokens on one rank |
//! | H | hidden width of the model |
//! | E | routed experts of a layer, over all ranks |
//! | k | experts a token is sent to |
//! | R | expert-parallel ranks |
//! | L | experts that live on one rank |
//! | S | stages an MoE layer is cut into |
//! | I | inner width of an expert |
//! | N | rows of a matrix |
//! | V | vocabulary |
//!
//! A *row* is one token's hidden vector as sent to a rank. A *copy* is one (token, expert) pair. A *lane*
//! is an ordered queue of work on a device.

mod dtype;
pub mod env;
mod fault;
pub mod files;
pub mod float8;
mod ids;
pub mod json;
mod phase;
mod random;
pub mod text;
mod threads;
mod units;
mod wire;

pub use dtype::{CacheDType, DType, Tolerance};
pub use fault::{Deadline, Fault, FaultCell, FaultKind, Jury, Place, panic_text};
pub use ids::{Expert, Lane, Layer, Rank, Stage};
pub use phase::Phase;
pub use random::{Mix, hash_bytes};
pub use threads::{by_threads, cores};
pub use units::{Bytes, count};
pub use wire::{RowFormat, WireDType, WireFormat};
