//! Measures a machine: what the work of an MoE layer costs here, in a file that the plan's simulator reads.
//!
//! In reading order: `layer_rig` (ranks that run one layer of given sizes by a given table), `samples` (what its spans
//! say about the cost of each kind of work), `measure` (which layers to run for a whole cost model, in bounded time),
//! `file` (where the model is kept, and for which hardware it is good), `kept` (runs of an attempt whose time was over). `emulated_layer` runs
//! layers of one rank of a world whose other ranks are not there, and `measure_emulated` makes a GPU's cost model of such; `network` is what ranks that are processes measure before they begin. How well it predicts layers that it never saw
//! is a question for `cargo xtask eval`.
//!
//! This room has the clock that `plan` must not have. It decides nothing about schedules.

mod emulated_layer;
mod file;
mod kept;
mod layer_rig;
mod measure;
mod measure_emulated;
mod network;
mod rig_rank;
mod samples;

pub use emulated_layer::{EmulatedLayers, EmulatedRound, EmulatedSchedule, EmulatedShape};
pub use file::{Fingerprint, ProfileError, default_path, load, prepare, store, with_link};
pub use kept::Kept;
pub use layer_rig::{LayerRig, LayerRun, RankHost, RigOptions};
pub use measure::{Effort, MeasureError, Progress, measure};
pub use measure_emulated::{EmulatedEffort, measure_emulated};
pub use network::{network, with_network};
pub use rig_rank::RigShape;
pub use samples::samples;
