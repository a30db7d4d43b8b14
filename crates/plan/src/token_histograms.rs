//! What a rank tells the others about its tokens before a layer runs. Everything every rank decides about
//! the layer follows from these numbers.

use crate::{PlanError, Routing, SlotMap, SlotRouting};
use epsmoe_base::Rank;
use std::ops::RangeInclusive;

/// One rank's tokens as histograms over all slots of the layer.
///
/// A token with several slots on one rank is one row to that rank; `first` and `last` count rows, by the
/// lowest and by the highest of these slots.
///
/// Five slots on two ranks (0, 1, 2 | 3, 4); three tokens, to slots {0, 2}, {1, 3} and {0, 4}:
///
/// ```
/// # use epsmoe_plan::*;
/// # fn main() -> Result<(), PlanError> {
/// let map = SlotMap::contiguous(5, 2)?;
/// let routing = Routing::new(5, 2, vec![2, 0, 1, 3, 4, 0], vec![0.5; 6])?;
/// let counts = TokenHistograms::of(&routing.assign(&map)?);
/// assert_eq!(counts.tokens, 3);
/// assert_eq!(counts.assignments, [2, 1, 1, 1, 1]);
/// assert_eq!(counts.first, [2, 1, 0, 1, 1]); // {0, 2} is one row to rank 0, first there at 0 …
/// assert_eq!(counts.last, [1, 1, 1, 1, 1]); //  … and last at 2
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct TokenHistograms {
    /// Tokens on the rank, T.
    pub tokens: u32,
    /// `[S]` (token, slot) pairs of each slot.
    pub assignments: Vec<u32>,
    /// `[S]` rows by their first slot on its rank.
    pub first: Vec<u32>,
    /// `[S]` rows by their last slot on its rank.
    pub last: Vec<u32>,
}

impl TokenHistograms {
    /// Counts a rank's own tokens.
    pub fn of(routing: &SlotRouting<'_>) -> Self {
        let slots = routing.map().slots();
        let mut counts = TokenHistograms {
            tokens: routing.tokens() as u32,
            assignments: vec![0; slots],
            first: vec![0; slots],
            last: vec![0; slots],
        };
        for &slot in routing.slots() {
            counts.assignments[slot as usize] += 1;
        }
        for (_, slots) in (0..routing.tokens()).flat_map(|token| routing.rows(token)) {
            counts.first[slots[0] as usize] += 1;
            counts.last[slots[slots.len() - 1] as usize] += 1;
        }
        counts
    }

    /// From the host's view of a device's counts `[3, S]`: assignments, first, last.
    ///
    /// # Errors
    /// As many numbers as do not make three histograms over `slots` (S).
    pub fn of_counts(tokens: usize, counts: &[u32], slots: usize) -> Result<Self, PlanError> {
        let (got, want) = (4 * counts.len(), 4 * 3 * slots);
        if got != want || slots == 0 {
            return Err(PlanError::CountsLength { got, want, slots });
        }
        let mut histograms = counts.chunks_exact(slots).map(<[u32]>::to_vec);
        let mut take = || histograms.next().unwrap_or_default();
        Ok(TokenHistograms { tokens: tokens as u32, assignments: take(), first: take(), last: take() })
    }

    /// Bytes of the message for a layer of `slots` (S): the token count and three histograms of 32-bit numbers.
    pub fn encoded_len(slots: usize) -> usize {
        4 * (1 + 3 * slots)
    }

    /// The message to the other ranks: tokens, assignments, first, last, little-endian.
    pub fn encode(&self) -> Vec<u8> {
        let histograms = self.assignments.iter().chain(&self.first).chain(&self.last);
        std::iter::once(&self.tokens).chain(histograms).flat_map(|number| number.to_le_bytes()).collect()
    }

    /// Reads another rank's message for a layer of `slots` (S).
    pub fn decode(bytes: &[u8], slots: usize) -> Result<Self, PlanError> {
        let want = Self::encoded_len(slots);
        if bytes.len() != want {
            return Err(PlanError::CountsLength { got: bytes.len(), want, slots });
        }
        let (words, _) = bytes.as_chunks::<4>();
        let numbers: Vec<u32> = words.iter().map(|&word| u32::from_le_bytes(word)).collect();
        Self::of_counts(numbers[0] as usize, &numbers[1..], slots)
    }

    /// Refuses counts that no routing can have.
    fn check(&self, rank: Rank, map: &SlotMap, fanout: &RangeInclusive<usize>) -> Result<(), PlanError> {
        let slots = map.slots();
        for histogram in [&self.assignments, &self.first, &self.last] {
            if histogram.len() != slots {
                let (got, want) = (4 * histogram.len(), 4 * slots);
                return Err(PlanError::CountsLength { got, want, slots });
            }
        }
        let contradiction = |left_name: String, left: u64, right_name: String, right: u64| {
            Err(PlanError::Counts { rank, left_name, left, right_name, right })
        };
        let assignments = sum(&self.assignments);
        let pairs = |slots: &usize| u64::from(self.tokens) * *slots as u64;
        let bounds = pairs(fanout.start())..=pairs(fanout.end());
        if !bounds.contains(&assignments) {
            let name = "the sum of its assignments".into();
            let bound = if assignments < *bounds.start() { bounds.start() } else { bounds.end() };
            return contradiction(name, assignments, "tokens × k".into(), *bound);
        }
        for destination in map.all_ranks() {
            let block = map.slots_of_rank(destination);
            let (first, last) = (sum(&self.first[block.clone()]), sum(&self.last[block.clone()]));
            let rows = format!("rows to {destination} by first slot");
            if first != last {
                return contradiction(rows, first, "the same by last slot".into(), last);
            }
            if first > u64::from(self.tokens) {
                return contradiction(rows, first, "its number of tokens".into(), self.tokens.into());
            }
            for slot in block {
                let assignments = self.assignments[slot];
                let name = || format!("assignments of slot {slot}");
                if u64::from(assignments) > first {
                    return contradiction(name(), assignments.into(), rows, first);
                }
                for (which, rows) in [("first", self.first[slot]), ("last", self.last[slot])] {
                    if rows > assignments {
                        let rows_name = format!("rows with {which} slot {slot}");
                        return contradiction(rows_name, rows.into(), name(), assignments.into());
                    }
                }
            }
        }
        Ok(())
    }
}

fn sum(histogram: &[u32]) -> u64 {
    histogram.iter().map(|&count| u64::from(count)).sum()
}

/// The counts of all ranks, as the count exchange gathered them, checked for contradictions.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct LayerHistograms {
    ranks: Vec<TokenHistograms>,
}

impl LayerHistograms {
    /// Checks what the ranks announced: `ranks[r]` came from rank r; every token is sent to `top_k` slots.
    pub fn new(map: &SlotMap, top_k: usize, ranks: Vec<TokenHistograms>) -> Result<Self, PlanError> {
        Self::of_fanout(map, top_k..=top_k, ranks)
    }

    /// The same where tokens are sent to so many slots, not all to as many.
    pub fn of_fanout(
        map: &SlotMap,
        fanout: RangeInclusive<usize>,
        ranks: Vec<TokenHistograms>,
    ) -> Result<Self, PlanError> {
        if ranks.len() != map.ranks() {
            return Err(PlanError::CountsRanks { got: ranks.len(), want: map.ranks() });
        }
        for (rank, counts) in map.all_ranks().zip(&ranks) {
            counts.check(rank, map, &fanout)?;
        }
        let assignments = ranks.iter().map(|counts| sum(&counts.assignments)).sum();
        if assignments > u64::from(u32::MAX) {
            return Err(PlanError::TooManyAssignments { assignments });
        }
        Ok(LayerHistograms { ranks })
    }

    /// The counts of routings at hand, by rank: what the ranks would announce.
    pub fn of_routings(map: &SlotMap, top_k: usize, routings: &[Routing]) -> Result<Self, PlanError> {
        let of_rank = |routing: &Routing| Ok(TokenHistograms::of(&routing.assign(map)?));
        let ranks = routings.iter().map(of_rank).collect::<Result<_, PlanError>>()?;
        Self::new(map, top_k, ranks)
    }

    /// What `rank` announced.
    pub fn of(&self, rank: Rank) -> &TokenHistograms {
        &self.ranks[rank.0]
    }

    /// Assignments of one slot, from all ranks.
    pub fn assignments_of(&self, slot: usize) -> usize {
        self.ranks.iter().map(|counts| counts.assignments[slot] as usize).sum()
    }

    /// Assignments of all slots of a rank, from all ranks.
    pub fn assignments_on(&self, map: &SlotMap, rank: Rank) -> usize {
        map.slots_of_rank(rank).map(|slot| self.assignments_of(slot)).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn example() -> (SlotMap, TokenHistograms) {
        let map = SlotMap::contiguous(5, 2).unwrap();
        let routing = Routing::new(5, 2, vec![2, 0, 1, 3, 4, 0], vec![0.5; 6]).unwrap();
        let counts = TokenHistograms::of(&routing.assign(&map).unwrap());
        (map, counts)
    }

    #[test]
    fn messages_come_back() {
        let (_, counts) = example();
        let bytes = counts.encode();
        assert_eq!(bytes.len(), TokenHistograms::encoded_len(5));
        assert_eq!(bytes[..8], [3, 0, 0, 0, 2, 0, 0, 0]);
        assert_eq!(TokenHistograms::decode(&bytes, 5).unwrap(), counts);
        assert_eq!(
            TokenHistograms::decode(&bytes[1..], 5).unwrap_err().to_string(),
            "a rank's counts are 63 bytes, but 5 slots need 64: the ranks run different models"
        );
    }

    #[test]
    fn contradictions_name_the_rank_and_both_numbers() {
        let (map, good) = example();
        let refused = |spoil: fn(&mut TokenHistograms)| {
            let mut bad = good.clone();
            spoil(&mut bad);
            LayerHistograms::new(&map, 2, vec![good.clone(), bad]).unwrap_err().to_string()
        };
        assert_eq!(
            refused(|counts| counts.first[0] = 1),
            "rank 1 announced counts that cannot be true: rows to rank 0 by first slot is 2, the same by \
             last slot is 3; its routing or its message is corrupt"
        );
        assert!(refused(|counts| counts.tokens = 4).contains("assignments is 6, tokens × k is 8"));
        assert!(
            refused(|counts| (counts.first[3], counts.last[4]) = (2, 2))
                .contains("rows with first slot 3 is 2, assignments of slot 3 is 1")
        );
        assert!(
            refused(|counts| counts.assignments = vec![6, 0, 0, 0, 0])
                .contains("assignments of slot 0 is 6, rows to rank 0 by first slot is 3")
        );
        assert!(refused(|counts| counts.first.clear()).contains("0 bytes"));
        assert!(LayerHistograms::new(&map, 2, vec![good.clone()]).is_err());
        assert!(LayerHistograms::new(&map, 2, vec![good.clone(), good]).is_ok());
    }

    /// Two tokens, three rows to a rank: everything else agrees, and buffers for two rows would overflow.
    #[test]
    fn more_rows_to_a_rank_than_tokens_are_refused() {
        let map = SlotMap::contiguous(3, 1).unwrap();
        let counts = TokenHistograms {
            tokens: 2,
            assignments: vec![2, 1, 1],
            first: vec![2, 1, 0],
            last: vec![1, 1, 1],
        };
        assert_eq!(
            LayerHistograms::new(&map, 2, vec![counts]).unwrap_err().to_string(),
            "rank 0 announced counts that cannot be true: rows to rank 0 by first slot is 3, its number of tokens \
             is 2; its routing or its message is corrupt"
        );
    }

    #[test]
    fn more_assignments_than_indices_are_refused() {
        let map = SlotMap::contiguous(2, 2).unwrap();
        let full = vec![u32::MAX, 0];
        let counts =
            TokenHistograms { tokens: u32::MAX, assignments: full.clone(), first: full.clone(), last: full };
        let error = LayerHistograms::new(&map, 1, vec![counts.clone(), counts]).unwrap_err();
        assert_eq!(error, PlanError::TooManyAssignments { assignments: 2 * u64::from(u32::MAX) });
    }
}
