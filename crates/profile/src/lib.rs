//! Measures a machine: what the work of an MoE layer costs here, in a file that the plan's simulator reads.
//!
//! In reading order: `lab` (ranks that run one layer of given sizes by a given table), `samples` (what its spans say
//! about the cost of each kind of work), `measure` (which layers to run for a whole cost model, in bounded time),
//! `file` (where the model is kept, and for which hardware it is good), `verify` (how well it predicts layers that it
//! never saw).
//!
//! This room has the clock that `plan` must not have. It decides nothing about schedules.

mod file;
mod lab;
mod measure;
mod samples;
mod verify;

pub use file::{Fingerprint, ProfileError, default_path, load, store, with_link};
pub use lab::{Lab, LabOptions, LabShape, LayerRun, RankHost};
pub use measure::{Effort, Progress, measure};
pub use samples::samples;
pub use verify::{Cell, Outcome, Regret, Spread, cells, regret, verify};
