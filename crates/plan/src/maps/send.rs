//! The source's view of dispatch.

use super::{record, record_words, starts};
use crate::{Placement, Routing, TokenHistograms};

/// Which token is in which row of the send buffer, and the record that travels with each row.
///
/// Rows are ordered by destination, then first expert there, then token: which is by first expert over the whole
/// layer, then token, since ranks hold contiguous blocks. It does not depend on the stages.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SendMap {
    /// `[rows]` token of each row.
    pub tokens: Vec<u32>,
    /// `[R + 1]` where the rows to each destination start.
    pub destination_start: Vec<u32>,
    /// `[rows × record_words(k)]` the records, row by row.
    pub records: Vec<u32>,
    /// `[rows]` each row's last expert, over the whole layer: the order in which its sum comes home.
    pub(super) last: Vec<u32>,
}

impl SendMap {
    /// Maps a rank's own tokens; `counts` are those of the same `routing`.
    pub fn of(placement: &Placement, routing: &Routing, counts: &TokenHistograms) -> Self {
        let (experts, weights) = (routing.experts(), routing.weights());
        let (top_k, words) = (routing.top_k(), record_words(routing.top_k()));
        // next[e]: where the next row with first expert e goes.
        let mut next: Vec<u32> = starts(&counts.first, 0).collect();
        let rows = counts.first.iter().sum::<u32>();
        let destinations = placement.all_ranks().map(|rank| next[placement.experts_of(rank).start]);
        let mut map = SendMap {
            destination_start: destinations.chain([rows]).collect(),
            tokens: vec![0; rows as usize],
            last: vec![0; rows as usize],
            records: vec![0; rows as usize * words],
        };
        for token in 0..routing.tokens() {
            for (rank, pairs) in routing.rows(placement, token) {
                let (first, last) = (experts[pairs.start], experts[pairs.end - 1]);
                let row = next[first as usize] as usize;
                next[first as usize] += 1;
                map.tokens[row] = token as u32;
                map.last[row] = last;
                let record = &mut map.records[row * words..(row + 1) * words];
                let first_expert = placement.experts_of(rank).start as u32;
                record::write(record, top_k, first_expert, &experts[pairs.clone()], &weights[pairs]);
            }
        }
        map
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
        let of =
            |rank: usize| SendMap::of(&layer.placement, &layer.routings[rank], layer.counts.of(Rank(rank)));
        let map = of(0);
        assert_eq!(map.tokens, [0, 2, 1, 1, 2]);
        assert_eq!(map.destination_start, [0, 3, 5]);
        let (a0, a2, b1, b3, c0, c4) = (0f32, 2f32, 11f32, 13f32, 20f32, 24f32);
        let bits = f32::to_bits;
        assert_eq!(map.records[..3], [0x0002_0000, bits(a0), bits(a2)]);
        assert_eq!(map.records[3..6], [0xFFFF_0000, bits(c0), 0]);
        assert_eq!(map.records[6..9], [0xFFFF_0001, bits(b1), 0]);
        assert_eq!(map.records[9..], [0xFFFF_0000, bits(b3), 0, 0xFFFF_0001, bits(c4), 0]);
        let map = of(1);
        assert_eq!(map.tokens, [0, 0, 1]);
        assert_eq!(map.destination_start, [0, 1, 3]);
    }
}
