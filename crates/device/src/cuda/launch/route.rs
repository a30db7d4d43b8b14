//! The choice of experts by the router's logits.

use super::{Launch, Refusal, Rows, is_empty, within};
use crate::Weight;
use crate::cuda::layout::twin;
use crate::op::{GroupScore, Route, Score, TopKRouter};
use epsmoe_base::DType;

twin! {
    pub(super) struct RouteArgs = "Args" in "route.cu" {
        logits: Rows,
        experts: Rows,
        weights: Rows,
        bias: u64,
        scales: u64,
        scale: f32,
        top_k: u32,
        score: u32,
        normalise: u32,
        groups: u32,
        kept: u32,
        two_best: u32,
        epsilon: f32,
        jitter: f32,
        padding: u32,
    }
}

impl Launch<'_> {
    pub(super) fn route(&mut self, op: &Route) -> Result<(), Refusal> {
        if is_empty(&op.logits) {
            return Ok(());
        }
        let groups = op.router.groups;
        let vector =
            |of: &Option<Weight>| of.as_ref().map_or(Ok(0), |of| self.weights.get(of).map(|held| held.start));
        let (score, jitter) = match op.router.score {
            Score::Softmax => (0, 0.0),
            Score::Sigmoid => (1, 0.0),
            Score::SigmoidOfLogit => (2, 0.0),
            Score::SparseMixer { jitter } => (3, jitter),
        };
        let arguments = RouteArgs {
            logits: self.rows(&op.logits)?,
            experts: self.rows(&op.experts)?,
            weights: self.rows(&op.weights)?,
            bias: vector(&op.bias)?,
            scales: vector(&op.scales)?,
            scale: op.router.scale,
            top_k: op.router.top_k as u32,
            score,
            normalise: u32::from(op.router.normalise),
            groups: groups.map_or(0, |limit| limit.groups as u32),
            kept: groups.map_or(0, |limit| limit.kept as u32),
            two_best: u32::from(groups.is_some_and(|limit| limit.by == GroupScore::TopTwoSum)),
            epsilon: TopKRouter::EPSILON,
            jitter,
            padding: 0,
        };
        // A rank of eight bytes for every expert and group, a score and a preference for every expert.
        let shared = 16 * op.logits.width + 8 * arguments.groups as usize;
        let kernel = self.kernels.get("route", DType::F32, DType::F32)?;
        let shared = within("route: experts", shared, kernel.shared_limit)?;
        self.start(&kernel.function, (op.logits.rows as u32, 1), shared, arguments)
    }
}
