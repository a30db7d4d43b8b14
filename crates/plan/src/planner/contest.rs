//! Plans that a search cannot tell apart, because its model is not that exact, run on real layers until one is known to be
//! best. They differ in time alone: every plan gives the same bits.

use super::Trial;
use crate::search::{Choice, Decision};

/// The plans of one search, and what layers took that ran by them.
#[derive(Clone, Debug)]
pub(super) struct Contest {
    /// Cheapest by the model first.
    plans: Vec<Contender>,
}

#[derive(Clone, Debug)]
struct Contender {
    decision: Decision,
    /// Layers that were run to see what they take.
    attempts: usize,
    /// Of those that were seen, permille of what the model says of the first plan.
    took: Vec<u64>,
}

/// Layers that every plan is tried on.
const TRIALS: usize = 3;

/// Permille by which a plan must beat the one that is predicted to be cheapest: less is chance.
const LEAD: u64 = 5;

impl Contest {
    pub(super) fn new(choice: &Choice) -> Self {
        let decisions = std::iter::once(&choice.decision).chain(&choice.rivals).cloned();
        let contender = |decision| Contender { decision, attempts: 0, took: Vec::new() };
        Contest { plans: decisions.map(contender).collect() }
    }

    pub(super) fn decision(&self, plan: usize) -> &Decision {
        &self.plans[plan].decision
    }

    /// The plan that took least; until any has been tried, the one that is predicted to.
    pub(super) fn best(&self) -> usize {
        let first = self.plans[0].median().map(|permille| permille.saturating_sub(LEAD));
        let tried = self.plans.iter().enumerate().skip(1);
        let tried = tried.filter_map(|(index, plan)| Some((plan.median()?, index)));
        tried.chain(first.map(|permille| (permille, 0))).min().map_or(0, |(_, index)| index)
    }

    /// The plan to try next, if there is something to find out.
    pub(super) fn next_trial(&self) -> Option<usize> {
        let (index, fewest) =
            self.plans.iter().map(|plan| plan.attempts).enumerate().min_by_key(|&(_, attempts)| attempts)?;
        (self.plans.len() > 1 && fewest < TRIALS).then_some(index)
    }

    /// A layer runs by the plan, and will be looked at.
    pub(super) fn attempt(&mut self, plan: usize) {
        self.plans[plan].attempts += 1;
    }

    /// What it took on all ranks.
    pub(super) fn note(&mut self, trial: &Trial) {
        // Other ranks may say anything.
        if let Some(plan) = self.plans.get_mut(trial.plan as usize) {
            plan.took.push(trial.permille);
        }
    }

    /// `[plan]` stages, and what layers took.
    pub(super) fn standings(&self) -> Vec<(usize, Option<u64>)> {
        self.plans.iter().map(|plan| (plan.decision.gemm.len(), plan.median())).collect()
    }
}

impl Contender {
    fn median(&self) -> Option<u64> {
        let mut took = self.took.clone();
        took.sort_unstable();
        took.get(took.len() / 2).copied()
    }
}
