//! The source's view of combine.

use super::{SendMap, starts};
use crate::TokenHistograms;

/// Where in the home buffer the partial sums of each token are.
///
/// Sums come home by rank, then last expert there, then in the order in which their rows were sent. That is a
/// stable sort of the send rows by last expert over the whole layer; it does not depend on the stages.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HomeMap {
    /// `[T + 1]` where each token's positions start in `index`.
    pub offsets: Vec<u32>,
    /// `[rows]` positions in the home buffer, token by token, in rank order: the order in which they are added.
    pub index: Vec<u32>,
}

impl HomeMap {
    /// Maps what comes home for the rows of `send`; `counts` are those of the same routing.
    pub fn of(send: &SendMap, counts: &TokenHistograms) -> Self {
        let mut rows_of = vec![0; counts.tokens as usize];
        for &token in &send.tokens {
            rows_of[token as usize] += 1;
        }
        let mut next: Vec<u32> = starts(&rows_of, 0).collect();
        let offsets = next.iter().copied().chain([send.tokens.len() as u32]).collect();
        // next_home[e]: where the next sum with last expert e lies.
        let mut next_home: Vec<u32> = starts(&counts.last, 0).collect();
        let mut index = vec![0; send.tokens.len()];
        // Rows are sent in rank order, so each token's sums are found in rank order too.
        for (&token, &last) in send.tokens.iter().zip(&send.last) {
            index[next[token as usize] as usize] = next_home[last as usize];
            next[token as usize] += 1;
            next_home[last as usize] += 1;
        }
        HomeMap { offsets, index }
    }
}

#[cfg(test)]
mod tests {
    use super::super::example;
    use super::*;
    use epsmoe_base::Rank;

    #[test]
    fn worked_example() {
        let layer = example::layer();
        let of = |rank: usize| {
            let counts = layer.counts.of(Rank(rank));
            HomeMap::of(&SendMap::of(&layer.placement, &layer.routings[rank], counts), counts)
        };
        assert_eq!(of(0), HomeMap { offsets: vec![0, 1, 3, 5], index: vec![2, 1, 3, 0, 4] });
        assert_eq!(of(1), HomeMap { offsets: vec![0, 2, 3], index: vec![0, 1, 2] });
    }
}
