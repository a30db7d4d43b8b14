//! The expert pipeline: one MoE layer, over all ranks, on two lanes of each.
//!
//! Start at [`ExpertPipeline::run`]: it reads as the layer happens. Then, in the order of the data: `route` (which
//! experts, and in which slots they are), `count_exchange` (what the ranks tell each other before anything moves),
//! `dispatch` (rows to their experts), `experts` (a stage of experts, from received rows to partial sums), `combine`
//! (partial sums back to their tokens), and `buffers` (all the memory of it, reserved once). Beside it, `routing_log`:
//! what routers chose, recorded and replayed, and `routed_peers`: the ranks that are not there when one is emulated.
//!
//! # One path
//!
//! Which row goes where is found on the device ([`epsmoe_device::op::AssignSlots`] and its neighbours), so the host
//! needs nothing but counts, and only where rows travel:
//!
//! ```text
//!                  a world of ranks                               one rank, one grouped stage
//! compute lane     router, route, assign, count                   router, route, assign
//! host             waits for the histograms [S], tells the ranks,
//!                  plans from everybody's
//! compute lane     send order, pack │ receive order, sort         sort
//! transfer lane    metadata, d0, d1, …                            nothing travels: received rows are the tokens
//! compute lane     stage by stage: expand, products, reduce       expand, products, reduce
//! transfer lane    …, c0, c1                                      nothing
//! compute lane     sums in rank order, the shared expert's last   the same
//! ```
//!
//! The host waits once a layer for its device, for the histograms, and once for the other ranks; in place it runs ahead
//! through all layers. Chunks and micro-batches are *batches*: the same walk over some of the tokens each.
//!
//! This room executes the [`LayerPlan`](epsmoe_plan::LayerPlan) that a [`Planner`](epsmoe_plan::Planner) made; it
//! decides nothing itself, and knows no model by name.

mod batch;
mod buffers;
mod combine;
mod count_exchange;
mod count_message;
mod dispatch;
mod experts;
mod route;
mod routed_peers;
mod routing_log;
mod run;
mod spans;

pub use buffers::PipelineSizes;
pub use count_exchange::disagreement;
pub use routed_peers::RoutedPeers;
pub use routing_log::{Flips, RoutingLog, RoutingLogError, TokenId};
pub use run::{
    ExpertActivation, ExpertPipeline, HostTimes, Identities, Input, LayerReport, Mlp, MoeLayer, Pending,
    PipelineOptions, SharedMlp,
};
pub use spans::take_spans;

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
