//! Where the router sends the tokens of one rank.

use crate::{Placement, PlanError};
use epsmoe_base::{Expert, Rank};
use std::ops::Range;

/// The experts and weights of every token of one rank, each token's experts in ascending order.
///
/// Ascending order is the one in which a token's partial sums are added, whatever order the router found
/// them in; sorting them once, here, makes everything after it a single walk.
#[derive(Clone, Debug, PartialEq)]
pub struct Routing {
    top_k: usize,
    experts: Vec<u32>,
    weights: Vec<f32>,
}

impl Routing {
    /// Checks and sorts a router's answer: `expert_ids` and `weights` are both `[T, k]`, ids below `experts` (E),
    /// and no token names an expert twice.
    pub fn new(
        experts: usize,
        top_k: usize,
        mut expert_ids: Vec<u32>,
        mut weights: Vec<f32>,
    ) -> Result<Self, PlanError> {
        if top_k == 0 || top_k > experts {
            return Err(PlanError::TopK { top_k, experts });
        }
        if expert_ids.len() != weights.len() || !expert_ids.len().is_multiple_of(top_k) {
            let (experts, weights) = (expert_ids.len(), weights.len());
            return Err(PlanError::RoutingShape { experts, weights, top_k });
        }
        let tokens = expert_ids.chunks_exact_mut(top_k).zip(weights.chunks_exact_mut(top_k));
        for (token, (ids, weights)) in tokens.enumerate() {
            sort_together(ids, weights);
            if let Some(pair) = ids.windows(2).find(|pair| pair[0] == pair[1]) {
                return Err(PlanError::ExpertTwice { token, expert: pair[0] });
            }
            let largest = ids[top_k - 1];
            if largest as usize >= experts {
                return Err(PlanError::UnknownExpert { token, expert: largest, experts });
            }
        }
        Ok(Routing { top_k, experts: expert_ids, weights })
    }

    /// Experts a token is sent to, k.
    pub fn top_k(&self) -> usize {
        self.top_k
    }

    /// Tokens on this rank, T.
    pub fn tokens(&self) -> usize {
        self.experts.len() / self.top_k
    }

    /// `[T, k]` expert ids over the whole layer, ascending within a token.
    pub fn experts(&self) -> &[u32] {
        &self.experts
    }

    /// `[T, k]` weights, in the order of [`Routing::experts`].
    pub fn weights(&self) -> &[f32] {
        &self.weights
    }

    /// The same answer for some of the tokens: a chunk of the layer.
    pub fn slice(&self, tokens: Range<usize>) -> Routing {
        let pairs = tokens.start * self.top_k..tokens.end * self.top_k;
        Routing {
            top_k: self.top_k,
            experts: self.experts[pairs.clone()].to_vec(),
            weights: self.weights[pairs].to_vec(),
        }
    }

    /// The rows that `token` becomes, one per rank it is sent to: the rank, and where that rank's experts
    /// are in [`Routing::experts`]. Ranks ascend, because experts do and blocks are contiguous.
    pub(crate) fn rows(
        &self,
        placement: &Placement,
        token: usize,
    ) -> impl Iterator<Item = (Rank, Range<usize>)> {
        let end = (token + 1) * self.top_k;
        let mut next = token * self.top_k;
        std::iter::from_fn(move || {
            let start = next;
            let rank = placement.rank_of(Expert(*self.experts[..end].get(start)? as usize));
            let beyond = placement.experts_of(rank).end;
            while next < end && (self.experts[next] as usize) < beyond {
                next += 1;
            }
            Some((rank, start..next))
        })
    }
}

/// Insertion sort by id: k is small, and routers often answer in order.
fn sort_together(ids: &mut [u32], weights: &mut [f32]) {
    for sorted in 1..ids.len() {
        let mut at = sorted;
        while at > 0 && ids[at - 1] > ids[at] {
            ids.swap(at - 1, at);
            weights.swap(at - 1, at);
            at -= 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn experts_are_sorted_with_their_weights() {
        let routing = Routing::new(5, 3, vec![4, 0, 2, 1, 2, 3], vec![0.4, 0.1, 0.2, 1.0, 2.0, 3.0]).unwrap();
        assert_eq!(routing.experts(), [0, 2, 4, 1, 2, 3]);
        assert_eq!(routing.weights(), [0.1, 0.2, 0.4, 1.0, 2.0, 3.0]);
        let placement = Placement::new(5, 2).unwrap();
        assert_eq!(routing.rows(&placement, 0).collect::<Vec<_>>(), [(Rank(0), 0..2), (Rank(1), 2..3)]);
        assert_eq!(routing.rows(&placement, 1).collect::<Vec<_>>(), [(Rank(0), 3..5), (Rank(1), 5..6)]);
        assert_eq!(routing.slice(1..2).experts(), [1, 2, 3]);
        assert_eq!(routing.slice(2..2).tokens(), 0);
    }

    #[test]
    fn impossible_routings_are_refused() {
        let message = |top_k, ids: &[u32], weights| {
            Routing::new(4, top_k, ids.to_vec(), vec![0.5; weights]).unwrap_err().to_string()
        };
        assert_eq!(
            message(2, &[0, 1, 3, 9], 4),
            "token 1 is routed to expert 9, but the layer has 4 experts"
        );
        assert_eq!(
            message(2, &[1, 1], 2),
            "token 0 is routed to expert 1 twice: add the two weights and route it once"
        );
        assert_eq!(message(2, &[1, 2], 3), "routing has 2 expert ids and 3 weights: both must be tokens × 2");
        assert!(message(2, &[1], 1).contains("tokens × 2"));
        assert!(message(5, &[], 0).contains("top-5 routing over 4 experts"));
        assert!(message(0, &[], 0).contains("top-0"));
    }
}
