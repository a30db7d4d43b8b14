//! Measures a machine: what the work of an MoE layer costs here, in a file that the plan's simulator reads.
//!
//! In reading order: `lab` (ranks that run one layer of given sizes by a given table), `samples` (what its spans say
//! about the cost of each kind of work), `measure` (which layers to run for a whole cost model, in bounded time),
//! `file` (where the model is kept, and for which hardware it is good), `cases` (layers that it never saw), `verify`
//! (how well it predicts them), `contest` (how good the plans are that follow from it).
//!
//! This room has the clock that `plan` must not have. It decides nothing about schedules.

mod cases;
mod file;
mod layer_rig;
mod measure;
mod regret;
mod samples;
mod verify;

pub use cases::{Case, Model, Models, cases};
pub use file::{Fingerprint, ProfileError, default_path, load, store, with_link};
pub use layer_rig::{LayerRig, LayerRun, RankHost, RigOptions, RigShape};
pub use measure::{Effort, MeasureError, Progress, measure};
pub use regret::{LAYERS, Ratio, Recovery, Regret, Uneven, WRONG, recovery, regret, uneven};
pub use samples::samples;
pub use verify::{Outcome, Parts, Spread, verify};
