//! The expert pipeline: one MoE layer, over all ranks, on two lanes of each.
//!
//! Start at [`ExpertPipeline::run`]: it reads as the layer happens. Then, in the order of the data:
//! `rendezvous` (what the ranks tell each other before anything moves), `dispatch` (rows to their
//! experts), `experts` (a stage of experts, from received rows to partial sums), `combine` (partial sums
//! back home), and `buffers` (all the memory of it, reserved once). `two_batch` walks them with two micro-batches. Beside it, `routing_log`: what routers chose,
//! recorded and replayed.
//!
//! This room executes the plan's [`StageTable`](epsmoe_plan::StageTable); it decides nothing itself, and knows
//! no model by name.

mod alone;
mod buffers;
mod combine;
mod dispatch;
mod experts;
mod rendezvous;
mod routing_log;
mod run;
mod two_batch;

pub use buffers::PipelineSizes;
pub use rendezvous::disagreement;
pub use routing_log::{Flips, RoutingLog, RoutingLogError, TokenId};
pub use run::{ExpertPipeline, HostTimes, LayerReport, Mlp, MoeLayer, PipelineOptions, SharedMlp};

use epsmoe_base::Fault;
use epsmoe_device::DeviceError;
use epsmoe_plan::PlanError;

/// Why a layer could not run.
#[derive(Clone, Debug, thiserror::Error)]
pub enum PipelineError {
    /// The world stopped.
    #[error(transparent)]
    Fault(#[from] Fault),
    /// The device refused an operation.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// No plan fits what was asked.
    #[error(transparent)]
    Plan(#[from] PlanError),
    /// A recorded routing cannot be followed.
    #[error(transparent)]
    Routing(#[from] RoutingLogError),
}
