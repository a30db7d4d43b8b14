//! Where the router sends the tokens of one rank.

use crate::{PlanError, SlotMap};
use epsmoe_base::Rank;
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

    /// The same answer in slots: where each token's experts are, in ascending slot order. This is the one place where a
    /// map is applied to a routing on the host; a device does the same in `AssignSlots`.
    ///
    /// # Errors
    /// An expert that the map does not have.
    pub fn assign<'a>(&self, map: &'a SlotMap) -> Result<SlotRouting<'a>, PlanError> {
        let (slot_of, replicas) = (map.slot_table(), map.most_replicas());
        let (mut slots, mut weights) = (self.experts.clone(), self.weights.clone());
        let tokens = slots.chunks_exact_mut(self.top_k).zip(weights.chunks_exact_mut(self.top_k));
        for (token, (slots, weights)) in tokens.enumerate() {
            let replica = slots.iter().copied().fold(0, u32::wrapping_add) as usize % replicas;
            for slot in slots.iter_mut() {
                let (expert, experts) = (*slot, map.experts());
                let at = expert as usize * replicas + replica;
                *slot = *slot_of.get(at).ok_or(PlanError::UnknownExpert { token, expert, experts })?;
            }
            sort_together(slots, weights);
        }
        Ok(SlotRouting { map, top_k: self.top_k, slots, weights })
    }
}

/// A rank's routing in slots; see [`Routing::assign`].
#[derive(Clone, Debug, PartialEq)]
pub struct SlotRouting<'a> {
    map: &'a SlotMap,
    top_k: usize,
    slots: Vec<u32>,
    weights: Vec<f32>,
}

impl SlotRouting<'_> {
    /// The map it follows.
    pub fn map(&self) -> &SlotMap {
        self.map
    }

    /// Experts a token is sent to, k.
    pub fn top_k(&self) -> usize {
        self.top_k
    }

    /// Tokens on this rank, T.
    pub fn tokens(&self) -> usize {
        self.slots.len() / self.top_k
    }

    /// `[T, k]` slots, ascending within a token.
    pub fn slots(&self) -> &[u32] {
        &self.slots
    }

    /// `[T, k]` weights, in the order of [`SlotRouting::slots`].
    pub fn weights(&self) -> &[f32] {
        &self.weights
    }

    /// The rows that `token` becomes, one per rank it is sent to: the rank, and its slots there.
    pub fn rows(&self, token: usize) -> impl Iterator<Item = (Rank, &[u32])> {
        let slots = &self.slots[token * self.top_k..(token + 1) * self.top_k];
        let rank = |slot: u32| self.map.rank_of(slot as usize);
        slots.chunk_by(move |&left, &right| rank(left) == rank(right)).map(move |run| (rank(run[0]), run))
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
        let map = SlotMap::contiguous(5, 2).unwrap();
        let slots = routing.assign(&map).unwrap();
        assert_eq!((slots.slots(), slots.weights()), (routing.experts(), routing.weights()));
        let rows = |token| slots.rows(token).collect::<Vec<_>>();
        assert_eq!(rows(0), [(Rank(0), [0, 2].as_slice()), (Rank(1), &[4])]);
        assert_eq!(rows(1), [(Rank(0), [1, 2].as_slice()), (Rank(1), &[3])]);
        assert_eq!(routing.slice(1..2).experts(), [1, 2, 3]);
        assert_eq!(routing.slice(2..2).tokens(), 0);
    }

    #[test]
    fn slots_follow_the_map() {
        let routing = Routing::new(5, 3, vec![4, 0, 2, 1, 2, 3], vec![0.4, 0.1, 0.2, 1.0, 2.0, 3.0]).unwrap();
        let map = SlotMap::new(5, &[vec![4, 2], vec![3, 0, 1]], 0).unwrap();
        let slots = routing.assign(&map).unwrap();
        assert_eq!(slots.slots(), [0, 1, 3, 1, 2, 4]);
        assert_eq!(slots.weights(), [0.4, 0.2, 0.1, 2.0, 3.0, 1.0]);
        assert_eq!(slots.rows(1).collect::<Vec<_>>(), [(Rank(0), [1].as_slice()), (Rank(1), &[2, 4])]);
        let fewer = SlotMap::contiguous(4, 2).unwrap();
        assert!(routing.assign(&fewer).unwrap_err().to_string().contains("expert 4, but the layer has 4"));
        let replicas = SlotMap::new(5, &[vec![0, 1, 2], vec![2, 3, 4]], 0).unwrap();
        // Both tokens' experts add up to 6: the first of two slots.
        assert_eq!(routing.assign(&replicas).unwrap().slots(), [0, 2, 5, 1, 2, 4]);
        let odd = Routing::new(5, 3, vec![0, 2, 3], vec![1.0; 3]).unwrap();
        assert_eq!(odd.assign(&replicas).unwrap().slots(), [0, 3, 4]);
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
