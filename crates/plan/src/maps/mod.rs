//! Which token is in which row: the index arrays that pack, expand, reduce and add kernels follow.
//!
//! Each side makes its own arrays from what it knows, and no index ever travels: the source knows its routing,
//! the expert rank learns it from one record per row, and both sort the same rows in the same stable way.
//! All sorts are counting sorts, by the histograms that the ranks have exchanged.
//!
//! # Worked example
//!
//! The layer of the example in [`traffic`](crate::traffic): experts 0, 1, 2 on rank 0 and 3, 4 on rank 1, cut as `0..1 1..3`
//! and `0..1 1..2`; rank 0 has tokens a {0, 2}, b {1, 3}, c {0, 4}; rank 1 has tokens x {2, 3}, y {3, 4}.
//!
//! ```text
//! SendMap on rank 0            send order      a c b | b c
//!   tokens                     [0 2 1 1 2]
//!   destination_start          [0 3 5]
//!   records to rank 0          a: ids 0 2, weights a0 a2    c: ids 0 –, weights c0 0    b: ids 1 –, weights b1 0
//!
//! HomeMap on rank 0            home order      c b a | b c
//!   offsets, index             [0 1 3 5], [2  1 3  0 4]      a is at 2, b at 1 and 3, c at 0 and 4
//!
//! ArrivalMaps on rank 0        receive order   a c | b x     combine order   c | b a x
//!   expert_start, expand       [0 2 3 5], [0 1  2  0 3]      expert 0: a c, expert 1: b, expert 2: a x
//!   reduce_offsets             [0 1 2 4 5]
//!   reduce_index               [1  2  0 3  4]                c is copy 1, b copy 2, a copies 0 and 3, x copy 4
//!   reduce_weights             [c0  b1  a0 a2  x2]
//! ```

mod arrival;
mod home;
mod record;
mod send;

pub use arrival::ArrivalMaps;
pub use home::HomeMap;
pub use record::record_words;
pub use send::SendMap;

/// Turns a histogram into the position where each of its bins starts, from `start` on.
fn starts(histogram: &[u32], start: u32) -> impl Iterator<Item = u32> {
    histogram.iter().scan(start, |next, &count| {
        let start = *next;
        *next += count;
        Some(start)
    })
}

#[cfg(test)]
pub(crate) mod example {
    use crate::*;

    /// The worked example, as both ranks see it.
    pub(crate) struct Layer {
        pub(crate) placement: Placement,
        pub(crate) routings: [Routing; 2],
        pub(crate) counts: LayerHistograms,
        pub(crate) table: StageTable,
        pub(crate) traffic: Traffic,
    }

    /// Weights say where they belong: token (a..c, x, y) · 10 + expert.
    pub(crate) fn layer() -> Layer {
        let placement = Placement::new(5, 2).unwrap();
        let routings = [
            Routing::new(5, 2, vec![2, 0, 1, 3, 0, 4], vec![2., 0., 11., 13., 20., 24.]).unwrap(),
            Routing::new(5, 2, vec![2, 3, 4, 3], vec![92., 93., 104., 103.]).unwrap(),
        ];
        let ranks = routings.iter().map(|routing| TokenHistograms::of(&placement, routing)).collect();
        let counts = LayerHistograms::new(&placement, 2, ranks).unwrap();
        let table = StageTable::sized(&placement, &[1, 2], GemmKind::Grouped).unwrap();
        let traffic = Traffic::of(&placement, &counts, &table);
        Layer { placement, routings, counts, table, traffic }
    }
}
