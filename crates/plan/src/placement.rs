//! Which rank holds which expert: contiguous blocks, as equal as possible.

use crate::PlanError;
use epsmoe_base::{Expert, Rank};
use std::ops::Range;

/// Routed experts in contiguous blocks over ranks; the first `experts % ranks` ranks hold one more.
///
/// Five experts on two ranks: rank 0 holds experts 0, 1, 2 and rank 1 holds 3, 4.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Placement {
    experts: usize,
    ranks: usize,
}

impl Placement {
    /// Most routed experts of a layer: local ids travel in 16 bits, and one value means "none".
    pub const MOST_EXPERTS: usize = 32768;

    /// Places `experts` (E) on `ranks` (R), with 1 ≤ R ≤ E.
    pub fn new(experts: usize, ranks: usize) -> Result<Self, PlanError> {
        if experts > Self::MOST_EXPERTS {
            return Err(PlanError::Experts { experts });
        }
        if ranks == 0 || ranks > experts {
            return Err(PlanError::Ranks { experts, ranks });
        }
        Ok(Placement { experts, ranks })
    }

    /// Routed experts of the layer, E.
    pub fn experts(&self) -> usize {
        self.experts
    }

    /// Expert-parallel ranks, R.
    pub fn ranks(&self) -> usize {
        self.ranks
    }

    /// Every rank, in order.
    pub fn all_ranks(&self) -> impl Iterator<Item = Rank> + use<> {
        (0..self.ranks).map(Rank)
    }

    /// The rank that holds `expert`.
    pub fn rank_of(&self, expert: Expert) -> Rank {
        let (small, larger_ranks) = (self.experts / self.ranks, self.experts % self.ranks);
        let in_larger = larger_ranks * (small + 1);
        if expert.0 < in_larger {
            Rank(expert.0 / (small + 1))
        } else {
            Rank(larger_ranks + (expert.0 - in_larger) / small)
        }
    }

    /// Position of `expert` among the experts of its rank.
    pub fn local_index(&self, expert: Expert) -> usize {
        expert.0 - self.experts_of(self.rank_of(expert)).start
    }

    /// The experts of `rank`, by their numbers over the whole layer.
    pub fn experts_of(&self, rank: Rank) -> Range<usize> {
        let (small, larger_ranks) = (self.experts / self.ranks, self.experts % self.ranks);
        let start = rank.0 * small + rank.0.min(larger_ranks);
        start..start + small + usize::from(rank.0 < larger_ranks)
    }

    /// How many experts `rank` holds, L.
    pub fn local_count(&self, rank: Rank) -> usize {
        self.experts_of(rank).len()
    }

    /// The most experts that a rank holds.
    pub fn max_local(&self) -> usize {
        self.experts.div_ceil(self.ranks)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn five_experts_on_two_ranks() {
        let placement = Placement::new(5, 2).unwrap();
        assert_eq!(placement.experts_of(Rank(0)), 0..3);
        assert_eq!(placement.experts_of(Rank(1)), 3..5);
        assert_eq!((placement.rank_of(Expert(2)), placement.rank_of(Expert(3))), (Rank(0), Rank(1)));
        assert_eq!((placement.local_index(Expert(2)), placement.local_index(Expert(4))), (2, 1));
        assert_eq!(placement.max_local(), 3);
    }

    #[test]
    fn every_expert_lives_on_one_rank() {
        for experts in 1..=40 {
            for ranks in 1..=experts {
                let placement = Placement::new(experts, ranks).unwrap();
                let mut next = 0;
                for rank in placement.all_ranks() {
                    let block = placement.experts_of(rank);
                    assert_eq!(block.start, next, "{experts} experts, {ranks} ranks");
                    assert!(block.len() == placement.max_local() || block.len() + 1 == placement.max_local());
                    for expert in block.clone() {
                        assert_eq!(placement.rank_of(Expert(expert)), rank);
                        assert_eq!(placement.local_index(Expert(expert)), expert - block.start);
                    }
                    assert_eq!(placement.local_count(rank), block.len());
                    next = block.end;
                }
                assert_eq!(next, experts);
            }
        }
    }

    #[test]
    fn impossible_placements_are_refused() {
        let message = |experts, ranks| Placement::new(experts, ranks).unwrap_err().to_string();
        assert_eq!(
            message(4, 5),
            "5 expert-parallel ranks for 4 experts: use 1 to 4 ranks, so that each holds an expert"
        );
        assert!(Placement::new(4, 0).is_err());
        assert!(message(32769, 2).contains("at most 32768"));
        assert!(Placement::new(32768, 2).is_ok());
    }
}
