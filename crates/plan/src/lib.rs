//! Decisions of an MoE layer, and nothing but decisions: who holds which expert, how a rank's experts are
//! cut into stages, in which order the stages travel, and which row lies where in every buffer.
//!
//! In reading order:
//!
//! | module | question it answers |
//! |---|---|
//! | `slot_map`  | which rank holds which expert? ([`SlotMap`]) |
//! | `routing`   | where does the router send each token? |
//! | `token_histograms` | what does a rank tell the others about its tokens, and can it be true? |
//! | `stages`    | how are the experts cut, and in which order do the stages travel? ([`StageTable`]) |
//! | `schedule`  | what did the user ask for, and which table is that? ([`Policy`]) |
//! | `traffic`   | how many rows go where in which stage, and which rows of which buffer are they? ([`traffic`] has a worked example) |
//! | `memory`    | how many bytes does that need, and does it fit? |
//! | `timeline`  | what happened when, on which lane? |
//! | `time_breakdown` | where did a rank's time go, without a rest? |
//! | `cost`      | what does work cost on a machine? ([`CostModel`]; `piecewise` reads its tables, `fit` measures them) |
//! | `machine`   | what would it cost on a machine that is not here? ([`Machine`]) |
//! | `simulate`  | how long will a table take, and what will its lanes do? ([`simulate()`]) |
//! | `search`    | which table is best, and why? ([`search()`]; `cuts` places its boundaries) |
//! | `planner`   | which table now, and was the prediction right? ([`Planner`]) |
//! | `synthetic_routing` | how many tokens go where before a router has spoken? ([`SyntheticRouting`]) |
//! | `error`     | why was something refused? |
//!
//! One MoE layer walks through them like this:
//!
//! ```
//! use epsmoe_plan::*;
//! # fn main() -> Result<(), PlanError> {
//! // Five experts on two ranks, top-2. This is rank 0 with three tokens; the other rank has none.
//! let map = SlotMap::contiguous(5, 2)?;
//! let routing = Routing::new(5, 2, vec![2, 0, 1, 3, 4, 0], vec![0.5; 6])?;
//! let own = TokenHistograms::of(&routing.assign(&map)?);
//! let bytes = own.encode(); // to every other rank, and theirs to us: the count exchange
//! let other = TokenHistograms { tokens: 0, assignments: vec![0; 5], first: vec![0; 5], last: vec![0; 5] };
//! let counts = LayerHistograms::new(&map, 2, vec![TokenHistograms::decode(&bytes, 5)?, other])?;
//! // From here on every rank computes the same answers from the same numbers.
//! let table = Policy::default().table(&map, &counts)?;
//! let traffic = Traffic::of(&map, &counts, &table);
//! assert_eq!(traffic.rows_sent(epsmoe_base::Rank(0)), 5);
//! # Ok(())
//! # }
//! ```
//!
//! # What this room must not know
//!
//! No I/O (it writes to a writer it is given, that is all), no clock, no device, no environment, no thread.
//! Whatever ranks must agree on is decided in integers, so that every rank computes the same answer from
//! the same numbers.

mod cost;
mod cuts;
mod error;
#[cfg(test)]
mod example;
mod fit;
mod machine;
mod memory;
mod piecewise;
mod planner;
mod routing;
mod schedule;
mod search;
mod simulate;
mod slot_map;
mod stages;
mod synthetic_routing;
mod time_breakdown;
mod timeline;
mod token_histograms;
pub mod traffic;

pub use cost::{
    Correction, CostError, CostModel, GemmCost, HostCost, LinkCost, Payload, Product, RowsCost, ShareCost,
    TileCost, WeightCost,
};
pub use error::PlanError;
pub use fit::{Sample, Work};
pub use machine::{Gpu, KernelFigures, Kernels, LinkFigures, Machine, Sourced};
pub use memory::{Capacity, LayerBytes, LayerSizes, halves, millibits};
pub use piecewise::{MOST_NS, Piecewise};
pub use planner::{
    Ahead, AutoPlanner, Feedback, FixedPlanner, LayerPlan, LayerSample, MOST_TRIALS, PlanReport, Planner,
    PredictedMeasured, ScheduleReport, Trial, TwoBatchPlanner,
};
pub use routing::{Routing, SlotRouting};
pub use schedule::{Policy, Schedule, Stages};
pub use search::{Bucket, Choice, Considered, Decision, SearchOptions, cuts_for, search, sensible_orders};
pub use simulate::{
    CpuContention, Planned, RankTimes, Simulation, StageTimes, Workload, planned, predict_ns, simulate,
};
pub use slot_map::SlotMap;
pub use stages::{GemmKind, SharedExpert, StageTable, Transfer, order_text, parse_order};
pub use synthetic_routing::SyntheticRouting;
pub use time_breakdown::TimeBreakdown;
pub use timeline::{LayerWindow, Span, Timeline};
pub use token_histograms::{LayerHistograms, TokenHistograms};
pub use traffic::Traffic;
