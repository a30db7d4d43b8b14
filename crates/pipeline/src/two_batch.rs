//! Two micro-batches that alternate, the schedule that stages are compared with: the tokens of every rank are cut in
//! two, and while the experts of one half compute, the rows of the other travel. Each half is a layer of one stage with
//! its own part of the buffers.
//!
//! ```text
//! transfer  mA dA  mB dB        cA          cB
//! compute   pack    ·   experts A   experts B   sum A   sum B
//! ```
//!
//! - The metadata of A leaves first and alone, so that A computes as early as it can; that of B is hidden behind it.
//! - `dB` leaves before `cA`: the experts of B need it when those of A are done, and `cA` cannot be earlier anyway.
//! - The sums of A are added at home while those of B travel.
//! - One rendezvous tells both halves' counts, and each half is planned from its own.
//!
//! Every weight is read twice, and every expert sees half the rows at a time: what stages avoid. In times and messages,
//! stage 0 is A and stage 1 is B.

use crate::buffers::LayerBuffers;
use crate::dispatch::Outgoing;
use crate::rendezvous::Plan;
use crate::run::MoeLayer;
use crate::{ExpertPipeline, LayerReport, PipelineError};
use epsmoe_base::{Lane, Stage};
use epsmoe_device::{Backend, Buffer};
use epsmoe_plan::{Capacity, LayerBytes, LayerSizes, Routing, SharedExpert, halves};
use std::ops::Range;
use std::time::Instant;

const A: Stage = Stage(0);
const B: Stage = Stage(1);

impl<D: Backend> ExpertPipeline<D> {
    /// Runs the tokens in `range` as two micro-batches. If some rank could not hold both, all halve their tokens.
    pub(crate) fn run_micro_batches(
        &self,
        layer: &MoeLayer,
        routing: &Routing,
        range: Range<usize>,
        x: &Buffer,
        y: &Buffer,
        report: &mut LayerReport,
    ) -> Result<(), PipelineError> {
        let (rows, shared) = (x.rows(range.clone())?, self.options.policy.shared_expert());
        let (first, second) = halves(range);
        let pack = |buffers: &LayerBuffers, half: &Range<usize>| {
            self.pack(layer, buffers, &routing.slice(half.clone()), &x.rows(half.clone())?)
        };
        let buffers_a = &self.buffers;
        let out_a = pack(buffers_a, &first)?;
        let out_b = pack(&buffers_a.behind(&out_a.sent())?, &second)?;
        self.device.lane_wait(Lane::Transfer, &self.device.record(Lane::Compute));
        self.run_shared_if(shared == SharedExpert::BesideRendezvous, layer, &rows)?;
        report.host.packed = Some(Instant::now());
        let [plan_a, plan_b] = self.rendezvous_of_both(layer, [&out_a, &out_b], &mut report.host)?;
        if !self.options.sizes.capacity.fits_both([&plan_a.traffic, &plan_b.traffic]) {
            self.run_micro_batches(layer, routing, first, x, y, report)?;
            return self.run_micro_batches(layer, routing, second, x, y, report);
        }
        let needed = [&plan_a, &plan_b].map(|plan| Capacity::needed(&plan.traffic, self.fabric.rank()));
        let buffers_b = &buffers_a.behind(&needed[0])?;

        let metadata_a = self.exchange_metadata(layer, buffers_a, &plan_a)?;
        self.dispatch(layer, buffers_a, &plan_a, A)?;
        let arrived_a = self.device.record(Lane::Transfer);
        let metadata_b = self.exchange_metadata(layer, buffers_b, &plan_b)?;
        self.dispatch(layer, buffers_b, &plan_b, B)?;
        let arrived_b = self.device.record(Lane::Transfer);
        self.run_shared_if(shared == SharedExpert::BesideFirstDispatch, layer, &rows)?;
        let home_a = self.experts_and_back(layer, buffers_a, &plan_a, A, [&metadata_a, &arrived_a])?;
        let home_b = self.experts_and_back(layer, buffers_b, &plan_b, B, [&metadata_b, &arrived_b])?;
        self.run_shared_if(shared == SharedExpert::BesideLastCombine, layer, &rows)?;
        if shared == SharedExpert::Alone {
            self.device.lane_wait(Lane::Compute, &home_b);
            self.run_shared_if(true, layer, &rows)?;
        }
        self.device.lane_wait(Lane::Compute, &home_a);
        self.sum_at_home(layer, buffers_a, out_a.home, &y.rows(first)?)?;
        self.device.lane_wait(Lane::Compute, &home_b);
        self.sum_at_home(layer, buffers_b, out_b.home, &y.rows(second)?)?;
        report.host.enqueued = Some(Instant::now());
        let bytes = micro_batch_bytes(&self.options.sizes.layer, &needed);
        report.note(plan_a.table, bytes);
        report.note(plan_b.table, bytes);
        Ok(())
    }

    /// The experts of one half, once its records and its rows have arrived, and the way back of their sums; the event
    /// says when those are home.
    fn experts_and_back(
        &self,
        layer: &MoeLayer,
        buffers: &LayerBuffers,
        plan: &Plan,
        half: Stage,
        [metadata, arrived]: [&D::Event; 2],
    ) -> Result<D::Event, PipelineError> {
        self.receive_metadata(layer, buffers, plan, metadata)?;
        self.device.lane_wait(Lane::Compute, arrived);
        self.run_stage(layer, buffers, plan, half)?;
        self.device.lane_wait(Lane::Transfer, &self.device.record(Lane::Compute));
        self.combine(layer, buffers, plan, half)?;
        Ok(self.device.record(Lane::Transfer))
    }
}

/// What both halves need at once: everything of each, and the copies of a stage of the larger one.
fn micro_batch_bytes(sizes: &LayerSizes, [a, b]: &[Capacity; 2]) -> u64 {
    let beyond = Capacity { stage_copies: b.stage_copies.saturating_sub(a.stage_copies), ..*b };
    LayerBytes::of(sizes, a).total() + LayerBytes::of(sizes, &beyond).total()
}

impl Outgoing {
    /// What it takes up on the rank that sends it.
    fn sent(&self) -> Capacity {
        let (tokens, rows_sent) = (self.counts.tokens as usize, self.home.index.len());
        Capacity { tokens, rows_sent, ..Capacity::default() }
    }
}
