//! What a rank tells the others about its tokens before a layer runs. Everything every rank decides about
//! the layer follows from these numbers.

use crate::{Placement, PlanError, Routing};
use epsmoe_base::Rank;

/// One rank's tokens as histograms over all experts of the layer.
///
/// A token with several experts on one rank is one row to that rank; `first` and `last` count rows, by the
/// lowest and by the highest of these experts.
///
/// Five experts on two ranks (0, 1, 2 | 3, 4); three tokens, to experts {0, 2}, {1, 3} and {0, 4}:
///
/// ```
/// # use epsmoe_plan::*;
/// # fn main() -> Result<(), PlanError> {
/// let placement = Placement::new(5, 2)?;
/// let routing = Routing::new(5, 2, vec![2, 0, 1, 3, 4, 0], vec![0.5; 6])?;
/// let counts = TokenHistograms::of(&placement, &routing);
/// assert_eq!(counts.tokens, 3);
/// assert_eq!(counts.copies, [2, 1, 1, 1, 1]);
/// assert_eq!(counts.first, [2, 1, 0, 1, 1]); // {0, 2} is one row to rank 0, first there at 0 …
/// assert_eq!(counts.last, [1, 1, 1, 1, 1]); //  … and last at 2
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct TokenHistograms {
    /// Tokens on the rank, T.
    pub tokens: u32,
    /// `[E]` (token, expert) pairs of each expert.
    pub copies: Vec<u32>,
    /// `[E]` rows by their first expert on the expert's rank.
    pub first: Vec<u32>,
    /// `[E]` rows by their last expert on the expert's rank.
    pub last: Vec<u32>,
}

impl TokenHistograms {
    /// Counts a rank's own tokens.
    pub fn of(placement: &Placement, routing: &Routing) -> Self {
        let experts = placement.experts();
        let mut counts = TokenHistograms {
            tokens: routing.tokens() as u32,
            copies: vec![0; experts],
            first: vec![0; experts],
            last: vec![0; experts],
        };
        for &expert in routing.experts() {
            counts.copies[expert as usize] += 1;
        }
        for token in 0..routing.tokens() {
            for (_, pairs) in routing.rows(placement, token) {
                counts.first[routing.experts()[pairs.start] as usize] += 1;
                counts.last[routing.experts()[pairs.end - 1] as usize] += 1;
            }
        }
        counts
    }

    /// Bytes of the message for a layer of `experts` (E): the token count and three histograms of 32-bit numbers.
    pub fn encoded_len(experts: usize) -> usize {
        4 * (1 + 3 * experts)
    }

    /// The message to the other ranks: tokens, copies, first, last, little-endian.
    pub fn encode(&self) -> Vec<u8> {
        let histograms = self.copies.iter().chain(&self.first).chain(&self.last);
        std::iter::once(&self.tokens).chain(histograms).flat_map(|number| number.to_le_bytes()).collect()
    }

    /// Reads another rank's message for a layer of `experts` (E).
    pub fn decode(bytes: &[u8], experts: usize) -> Result<Self, PlanError> {
        let want = Self::encoded_len(experts);
        if bytes.len() != want {
            return Err(PlanError::CountsLength { got: bytes.len(), want, experts });
        }
        let (words, _) = bytes.as_chunks::<4>();
        let mut numbers = words.iter().map(|&word| u32::from_le_bytes(word));
        let mut take = |count| numbers.by_ref().take(count).collect::<Vec<u32>>();
        let tokens = take(1)[0];
        Ok(TokenHistograms { tokens, copies: take(experts), first: take(experts), last: take(experts) })
    }

    /// Refuses counts that no routing can have.
    fn check(&self, rank: Rank, placement: &Placement, top_k: usize) -> Result<(), PlanError> {
        let experts = placement.experts();
        for histogram in [&self.copies, &self.first, &self.last] {
            if histogram.len() != experts {
                let (got, want) = (4 * histogram.len(), 4 * experts);
                return Err(PlanError::CountsLength { got, want, experts });
            }
        }
        let contradiction = |left_name: String, left: u64, right_name: &str, right: u64| {
            Err(PlanError::Counts { rank, left_name, left, right_name: right_name.into(), right })
        };
        let (copies, pairs) = (sum(&self.copies), u64::from(self.tokens) * top_k as u64);
        if copies != pairs {
            return contradiction("the sum of its copies".into(), copies, "tokens × k", pairs);
        }
        for expert in 0..experts {
            let copies = self.copies[expert];
            if copies > self.tokens {
                let name = format!("copies of expert {expert}");
                return contradiction(name, copies.into(), "its number of tokens", self.tokens.into());
            }
            for (name, rows) in [("first", self.first[expert]), ("last", self.last[expert])] {
                if rows > copies {
                    let name = format!("rows with {name} expert {expert}");
                    return contradiction(name, rows.into(), "copies of that expert", copies.into());
                }
            }
        }
        for destination in placement.all_ranks() {
            let block = placement.experts_of(destination);
            let (first, last) = (sum(&self.first[block.clone()]), sum(&self.last[block]));
            let name = format!("rows to {destination} by first expert");
            if first != last {
                return contradiction(name, first, "the same by last expert", last);
            }
            if first > u64::from(self.tokens) {
                return contradiction(name, first, "its number of tokens", self.tokens.into());
            }
        }
        Ok(())
    }
}

fn sum(histogram: &[u32]) -> u64 {
    histogram.iter().map(|&count| u64::from(count)).sum()
}

/// The counts of all ranks, as the rendezvous gathered them, checked for contradictions.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct LayerHistograms {
    ranks: Vec<TokenHistograms>,
}

impl LayerHistograms {
    /// Checks what the ranks announced: `ranks[r]` came from rank r; every rank routes to `top_k` experts.
    pub fn new(placement: &Placement, top_k: usize, ranks: Vec<TokenHistograms>) -> Result<Self, PlanError> {
        if ranks.len() != placement.ranks() {
            return Err(PlanError::CountsRanks { got: ranks.len(), want: placement.ranks() });
        }
        for (rank, counts) in placement.all_ranks().zip(&ranks) {
            counts.check(rank, placement, top_k)?;
        }
        let copies = ranks.iter().map(|counts| sum(&counts.copies)).sum();
        if copies > u64::from(u32::MAX) {
            return Err(PlanError::TooManyCopies { copies });
        }
        Ok(LayerHistograms { ranks })
    }

    /// What `rank` announced.
    pub fn of(&self, rank: Rank) -> &TokenHistograms {
        &self.ranks[rank.0]
    }

    /// Copies of one expert, from all ranks.
    pub fn copies_of(&self, expert: usize) -> usize {
        self.ranks.iter().map(|counts| counts.copies[expert] as usize).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn example() -> (Placement, TokenHistograms) {
        let placement = Placement::new(5, 2).unwrap();
        let routing = Routing::new(5, 2, vec![2, 0, 1, 3, 4, 0], vec![0.5; 6]).unwrap();
        (placement, TokenHistograms::of(&placement, &routing))
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
            "a rank's counts are 63 bytes, but 5 experts need 64: the ranks run different models"
        );
    }

    #[test]
    fn contradictions_name_the_rank_and_both_numbers() {
        let (placement, good) = example();
        let refused = |spoil: fn(&mut TokenHistograms)| {
            let mut bad = good.clone();
            spoil(&mut bad);
            LayerHistograms::new(&placement, 2, vec![good.clone(), bad]).unwrap_err().to_string()
        };
        assert_eq!(
            refused(|counts| counts.first[0] = 1),
            "rank 1 announced counts that cannot be true: rows to rank 0 by first expert is 2, the same by \
             last expert is 3; its routing or its message is corrupt"
        );
        assert!(refused(|counts| counts.tokens = 4).contains("copies is 6, tokens × k is 8"));
        assert!(
            refused(|counts| counts.last[4] = 2).contains("last expert 4 is 2, copies of that expert is 1")
        );
        assert!(refused(|counts| counts.copies = vec![6, 0, 0, 0, 0]).contains("copies of expert 0 is 6"));
        assert!(refused(|counts| counts.first.clear()).contains("0 bytes"));
        assert!(LayerHistograms::new(&placement, 2, vec![good.clone()]).is_err());
        assert!(LayerHistograms::new(&placement, 2, vec![good.clone(), good]).is_ok());
    }

    #[test]
    fn more_copies_than_indices_are_refused() {
        let placement = Placement::new(2, 2).unwrap();
        let full = vec![u32::MAX, 0];
        let counts =
            TokenHistograms { tokens: u32::MAX, copies: full.clone(), first: full.clone(), last: full };
        let error = LayerHistograms::new(&placement, 1, vec![counts.clone(), counts]).unwrap_err();
        assert_eq!(error, PlanError::TooManyCopies { copies: 2 * u64::from(u32::MAX) });
    }
}
