//! Prices a [`StageTable`] without running it: the second interpreter of the plan.
//!
//! It walks what `pipeline` walks, in the same order, on the same two lanes of every rank, and writes the same
//! [`Timeline`] with the same names. The host is a third queue, which leaves no spans.
//!
//! ```text
//! host      (after count) read   exchange  plan
//! compute   gemm route assign count   send gather [shared]      host_to_device (after metadata) receive sort │ after d0: gather gemm gemm reduce │ … │ after all: reduce
//! transfer  (after gather)                        metadata d0 d1 … │ c0 after reduce 0 …
//! ```
//!
//! A world of one rank in one grouped stage runs in place: `gemm route assign sort gather gemm gemm reduce [shared]
//! reduce`, and its host waits for nothing.
//!
//! - A lane does its work in order. Compute of stage s waits for the dispatches 0..=s, combine s for reduce s, the
//!   last sum for the last transfer, the index arrays for the metadata. Whoever waits for another queue goes on
//!   [`HostCost::wake_ns`](crate::HostCost::wake_ns) after it. Where handing work to a lane costs something, a lane
//!   also waits for the host that hands it the stage or the exchange.
//! - An exchange is two-sided: nothing moves before all ranks are there; then each rank is done after its own
//!   [`LinkCost::exchange_ns`](crate::LinkCost::exchange_ns).
//! - While a rank computes and transfers at once, both go slower, by the [`ShareCost`](crate::ShareCost).
//! - Threads that share a processor ([`CostModel::concurrent`]): hosts, and transfer lanes while they copy, work in
//!   short bursts and take what they need; those of the compute lanes share the rest ([`CpuContention`]). There an exchange is
//!   work for the processor beside the time on the link, and nobody leaves it before all ranks have copied. Where
//!   computation fills it, a transfer lane or a host that would go on, or wakes up when a paced link is done, first waits
//!   for its turn: [`HostCost::queue_ns`](crate::HostCost::queue_ns), or until there is room.
//!
//! Time runs in whole nanoseconds and progress in whole millionths of one, so every rank finds the same times.

mod clock;
mod program;
mod report;

pub use clock::CpuContention;
pub use program::{Planned, planned};
pub use report::{RankTimes, Simulation, StageTimes};

use crate::{CostModel, LayerHistograms, LayerSizes, SlotMap, StageTable};
use program::Program;

/// One layer with its tokens: what there is to do, whatever the plan.
#[derive(Clone, Copy, Debug)]
pub struct Workload<'a> {
    /// Where experts live.
    pub map: &'a SlotMap,
    /// How many tokens go where.
    pub counts: &'a LayerHistograms,
    /// How wide they are.
    pub shape: &'a LayerSizes,
}

/// Everything about a layer under a table, as every rank will live it.
pub fn simulate(table: &StageTable, workload: &Workload<'_>, cost: &CostModel) -> Simulation {
    let program = Program::of(table, workload, cost);
    let times = clock::run(&program, cost, &cost.share(table.reserved));
    report::report(&program, &times, table.stages())
}

/// Only how long it will take: [`Simulation::layer_ns`].
pub fn predict_ns(table: &StageTable, workload: &Workload<'_>, cost: &CostModel) -> u64 {
    clock::run(&Program::of(table, workload, cost), cost, &cost.share(table.reserved)).end()
}
