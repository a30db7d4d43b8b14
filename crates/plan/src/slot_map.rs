//! Which rank holds which expert: a map of slots.

use crate::PlanError;
use epsmoe_base::{Expert, Rank, hash_bytes};
use std::ops::Range;

/// Places for the routed experts of one layer, numbered rank by rank, and what is in them.
///
/// Everything behind the router works in slots: rows travel, stages are cut and sums are folded in slot order, on a
/// rank and then over ranks. A layer's bits therefore depend on its map, and on nothing else about where experts are.
/// Layers may have different maps, and a map may give way to another with a higher version between two steps.
///
/// Five experts on two ranks, the second of which holds experts 4 and 0:
///
/// ```
/// # use epsmoe_plan::*;
/// # use epsmoe_base::{Expert, Rank};
/// let map = SlotMap::new(5, &[vec![1, 2, 3], vec![4, 0]], 7)?;
/// assert_eq!(map.slots_of_rank(Rank(1)), 3..5);
/// assert_eq!(map.expert_in(3), Expert(4));
/// assert_eq!(map.slots_of(Expert(0)), [4]);
/// assert_eq!(map.rank_of(4), Rank(1));
/// # Ok::<(), PlanError>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct SlotMap {
    /// `[R + 1]` the first slot of each rank, and the end.
    starts: Vec<usize>,
    /// `[S]` the expert in each slot.
    expert_of: Vec<u32>,
    /// `[E]` the slots of each expert, ascending.
    slots_of: Vec<Vec<u32>>,
    version: u64,
    digest: u64,
}

impl SlotMap {
    /// Most routed experts of a layer: all ranks exchange histograms over them in every layer.
    pub const MOST_EXPERTS: usize = 32768;

    /// Contiguous blocks of `experts` (E) on `ranks` (R), 1 ≤ R ≤ E, as equal as possible: the first `experts % ranks`
    /// ranks hold one more. Five experts on two ranks: 0, 1, 2 and 3, 4.
    pub fn contiguous(experts: usize, ranks: usize) -> Result<Self, PlanError> {
        if experts > Self::MOST_EXPERTS {
            return Err(PlanError::Experts { experts });
        }
        if ranks == 0 || ranks > experts {
            return Err(PlanError::Ranks { experts, ranks });
        }
        let (small, larger) = (experts / ranks, experts % ranks);
        let start = |rank: usize| (rank * small + rank.min(larger)) as u32;
        let by_rank: Vec<Vec<u32>> =
            (0..ranks).map(|rank| (start(rank)..start(rank + 1)).collect()).collect();
        Self::new(experts, &by_rank, 0)
    }

    /// `by_rank[r]` are the experts in the slots of rank r, in slot order.
    ///
    /// # Errors
    /// Too many experts, a rank without any, an expert that does not exist, that nobody holds, or that a rank holds
    /// twice.
    pub fn new(experts: usize, by_rank: &[Vec<u32>], version: u64) -> Result<Self, PlanError> {
        if experts > Self::MOST_EXPERTS {
            return Err(PlanError::Experts { experts });
        }
        let (mut starts, mut expert_of) = (vec![0], Vec::new());
        let mut slots_of: Vec<Vec<u32>> = vec![Vec::new(); experts];
        for (rank, held) in by_rank.iter().enumerate() {
            let rank = Rank(rank);
            let refuse = |problem: String| Err(PlanError::Slots { rank, problem });
            if held.is_empty() {
                return refuse("holds no expert: give every rank at least one".into());
            }
            let start = expert_of.len() as u32;
            for &expert in held {
                let Some(slots) = slots_of.get_mut(expert as usize) else {
                    return refuse(format!("holds expert {expert}, but the layer has {experts} experts"));
                };
                if slots.last().is_some_and(|&slot| slot >= start) {
                    return refuse(format!("holds expert {expert} twice: once is enough"));
                }
                slots.push(expert_of.len() as u32);
                expert_of.push(expert);
            }
            starts.push(expert_of.len());
        }
        if let Some(expert) = slots_of.iter().position(Vec::is_empty) {
            return Err(PlanError::NoSlot { expert });
        }
        let digest = hash_bytes(format!("{starts:?} {expert_of:?} {version}").as_bytes());
        Ok(SlotMap { starts, expert_of, slots_of, version, digest })
    }

    /// Routed experts of the layer, E.
    pub fn experts(&self) -> usize {
        self.slots_of.len()
    }

    /// Slots over all ranks, S: as many as experts, and more where experts have replicas.
    pub fn slots(&self) -> usize {
        self.expert_of.len()
    }

    /// Expert-parallel ranks, R.
    pub fn ranks(&self) -> usize {
        self.starts.len() - 1
    }

    /// Every rank, in order.
    pub fn all_ranks(&self) -> impl Iterator<Item = Rank> + use<> {
        (0..self.ranks()).map(Rank)
    }

    /// The slots of `rank`.
    pub fn slots_of_rank(&self, rank: Rank) -> Range<usize> {
        self.starts[rank.0]..self.starts[rank.0 + 1]
    }

    /// How many slots `rank` has, L.
    pub fn local_count(&self, rank: Rank) -> usize {
        self.slots_of_rank(rank).len()
    }

    /// The most slots that a rank has.
    pub fn max_local(&self) -> usize {
        self.all_ranks().map(|rank| self.local_count(rank)).max().unwrap_or(0)
    }

    /// The rank that has a slot.
    pub fn rank_of(&self, slot: usize) -> Rank {
        Rank(self.starts.partition_point(|&start| start <= slot) - 1)
    }

    /// The expert in a slot.
    pub fn expert_in(&self, slot: usize) -> Expert {
        Expert(self.expert_of[slot] as usize)
    }

    /// The experts of `rank`, in slot order.
    pub fn experts_on(&self, rank: Rank) -> impl Iterator<Item = Expert> {
        self.slots_of_rank(rank).map(|slot| self.expert_in(slot))
    }

    /// The slots of an expert, ascending.
    pub fn slots_of(&self, expert: Expert) -> &[u32] {
        &self.slots_of[expert.0]
    }

    /// The most slots that an expert is in, m.
    pub fn most_replicas(&self) -> usize {
        self.slots_of.iter().map(Vec::len).max().unwrap_or(1)
    }

    /// `[E, m]` the slots of every expert; one that is in fewer than m repeats them in turn. A token whose experts'
    /// numbers add up to s goes to those in column s modulo m: whatever rank and batch it is in, its choice alone decides
    /// which replicas compute it, so that its bits stay the same.
    ///
    /// ```
    /// # use epsmoe_plan::*;
    /// // Expert 2 is on both ranks.
    /// let map = SlotMap::new(3, &[vec![2, 0], vec![1, 2]], 0)?;
    /// assert_eq!(map.slot_table(), [1, 1, 2, 2, 0, 3]);
    /// # Ok::<(), PlanError>(())
    /// ```
    pub fn slot_table(&self) -> Vec<u32> {
        let most = self.most_replicas();
        self.slots_of.iter().flat_map(|slots| slots.iter().copied().cycle().take(most)).collect()
    }

    /// `[R + 1]` the first slot of every rank, and the end.
    pub fn rank_starts(&self) -> Vec<u32> {
        self.starts.iter().map(|&start| start as u32).collect()
    }

    /// `[S]` the first slot on the rank of every slot.
    pub fn block_starts(&self) -> Vec<u32> {
        let block = |rank: Rank| std::iter::repeat_n(self.starts[rank.0] as u32, self.local_count(rank));
        self.all_ranks().flat_map(block).collect()
    }

    /// Counts the changes of a layer's map.
    pub fn version(&self) -> u64 {
        self.version
    }

    /// A hash of everything in the map, its version included.
    pub fn digest(&self) -> u64 {
        self.digest
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn five_experts_on_two_ranks() {
        let map = SlotMap::contiguous(5, 2).unwrap();
        assert_eq!(map, SlotMap::new(5, &[vec![0, 1, 2], vec![3, 4]], 0).unwrap());
        assert_eq!((map.slots_of_rank(Rank(0)), map.slots_of_rank(Rank(1))), (0..3, 3..5));
        assert_eq!((map.rank_of(2), map.rank_of(3)), (Rank(0), Rank(1)));
        assert_eq!((map.max_local(), map.slots()), (3, 5));
        assert_eq!(map.slot_table(), [0, 1, 2, 3, 4]);
        assert_eq!(map.block_starts(), [0, 0, 0, 3, 3]);
    }

    #[test]
    fn contiguous_blocks_are_as_equal_as_can_be() {
        for experts in 1..=40 {
            for ranks in 1..=experts {
                let map = SlotMap::contiguous(experts, ranks).unwrap();
                for rank in map.all_ranks() {
                    let local = map.local_count(rank);
                    assert!(local == experts.div_ceil(ranks) || local == experts / ranks);
                    for slot in map.slots_of_rank(rank) {
                        assert_eq!((map.rank_of(slot), map.expert_in(slot)), (rank, Expert(slot)));
                        assert_eq!(map.slots_of(Expert(slot)), [slot as u32]);
                    }
                }
            }
        }
    }

    #[test]
    fn any_order_and_replicas() {
        let map = SlotMap::new(3, &[vec![2, 0], vec![1, 2]], 4).unwrap();
        assert_eq!(map.slots_of(Expert(2)), [0, 3]);
        assert_eq!(map.experts_on(Rank(1)).collect::<Vec<_>>(), [Expert(1), Expert(2)]);
        assert_eq!((map.slots(), map.most_replicas()), (4, 2));
        let later = SlotMap::new(3, &[vec![2, 0], vec![1, 2]], 5).unwrap();
        assert_ne!(map.digest(), later.digest());
    }

    #[test]
    fn impossible_maps_are_refused() {
        let message = |experts, ranks| SlotMap::contiguous(experts, ranks).unwrap_err().to_string();
        assert_eq!(
            message(4, 5),
            "5 expert-parallel ranks for 4 experts: use 1 to 4 ranks, so that each holds an expert"
        );
        assert!(SlotMap::contiguous(4, 0).is_err());
        assert!(message(32769, 2).contains("at most 32768"));
        assert!(SlotMap::contiguous(32768, 2).is_ok());
        let message = |by_rank: &[Vec<u32>]| SlotMap::new(2, by_rank, 0).unwrap_err().to_string();
        assert_eq!(message(&[vec![0, 1], vec![]]), "rank 1 holds no expert: give every rank at least one");
        assert_eq!(message(&[vec![0, 2]]), "rank 0 holds expert 2, but the layer has 2 experts");
        assert_eq!(message(&[vec![0, 1, 0]]), "rank 0 holds expert 0 twice: once is enough");
        assert_eq!(message(&[vec![1]]), "expert 0 is in no slot: give every expert one");
    }
}
