//! How many rows go where in which stage, and which rows of which buffer they are.
//!
//! A layer has four row buffers on a rank. A *part* is a run of consecutive rows in one of them:
//!
//! | buffer | holds | parts, in order | rows inside a part |
//! |---|---|---|---|
//! | send    | rows of own tokens to every rank   | destination, then stage of the first expert | first expert, then token |
//! | receive | rows of all ranks for own experts  | stage of the first expert, then source      | as they were sent |
//! | combine | partial sums of these rows         | stage of the last expert, then home         | last expert, then as they were sent |
//! | home    | partial sums of own tokens         | rank they come from, then stage of the last expert | last expert, then as they were sent |
//!
//! "Expert" is always one on the rank that the row is sent to. Two things follow:
//!
//! - Stages are consecutive experts, so the order of the rows in *send* and *home* does not depend on the cuts:
//!   rows are packed before anyone knows the stages, and the cuts only say where one stage ends in there.
//! - The rows that have arrived after stages 0..=s are one prefix of *receive*, and what reduce(s) writes is
//!   one run of *combine*. Every transfer reads and writes one run per pair of ranks.
//!
//! # Worked example
//!
//! Experts 0, 1, 2 on rank 0 and 3, 4 on rank 1, cut as `0..1 1..3` and `0..1 1..2`. Rank 0 has tokens
//! a {0, 2}, b {1, 3}, c {0, 4}; rank 1 has tokens x {2, 3}, y {3, 4}.
//!
//! ```text
//!                   to rank 0          to rank 1
//! send on rank 0    a c | b            b | c            parts: (0, d0) (0, d1) (1, d0) (1, d1)
//! send on rank 1      | x              x y |
//!                   stage 0            stage 1
//! receive on rank 0 a c |              b | x            parts: (d0, 0) (d0, 1) (d1, 0) (d1, 1)
//! receive on rank 1 b | x y            c |
//! combine on rank 0 c |                b a | x          parts: (c0, 0) (c0, 1) (c1, 0) (c1, 1)
//! combine on rank 1 b | x              c | y
//!                   from rank 0        from rank 1
//! home on rank 0    c | b a            b | c            parts: (0, c0) (0, c1) (1, c0) (1, c1)
//! home on rank 1      | x              x | y
//! ```
//!
//! Token a travels to rank 0 in stage 0, for its expert 0, and comes home in stage 1, after its expert 2.

use crate::{LayerHistograms, Placement, StageTable};
use epsmoe_base::{Rank, Stage};
use std::ops::Range;

/// Consecutive parts of one buffer, numbered `[outer][inner]`.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Parts {
    inner: usize,
    /// `[outer × inner + 1]` where each part starts; the last is the buffer's length.
    start: Vec<usize>,
}

impl Parts {
    fn new(outer: usize, inner: usize, rows: impl Fn(usize, usize) -> usize) -> Self {
        let mut start = Vec::with_capacity(outer * inner + 1);
        start.push(0);
        let mut end = 0;
        for part in 0..outer * inner {
            end += rows(part / inner, part % inner);
            start.push(end);
        }
        Parts { inner, start }
    }

    fn part(&self, outer: usize, inner: usize) -> Range<usize> {
        let part = outer * self.inner + inner;
        self.start[part]..self.start[part + 1]
    }

    fn whole(&self, outer: usize) -> Range<usize> {
        self.start[outer * self.inner]..self.start[(outer + 1) * self.inner]
    }

    fn len(&self) -> usize {
        self.start[self.start.len() - 1]
    }
}

/// What one rank's buffers look like.
#[derive(Clone, Debug, PartialEq, Eq)]
struct RankTraffic {
    tokens: usize,
    /// `[destination][stage]`
    send: Parts,
    /// `[stage][source]`
    receive: Parts,
    /// `[stage][home]`
    combine: Parts,
    /// `[rank][stage]`
    home: Parts,
    /// `[source]`: records arrive all at once, so they are not sorted by stage.
    records: Parts,
    /// `[local expert]`
    copies: Parts,
    /// `[stage]`
    stage_copies: Parts,
}

/// Row counts and buffer layouts of one layer on every rank; the same answer on every rank.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Traffic {
    stages: usize,
    ranks: Vec<RankTraffic>,
}

impl Traffic {
    /// Lays out a layer; `table` has passed [`StageTable::validate`] for `placement`.
    pub fn of(placement: &Placement, counts: &LayerHistograms, table: &StageTable) -> Self {
        let (ranks, stages) = (placement.ranks(), table.stages());
        // Rows between two ranks in a stage, by a histogram over first or last experts.
        let rows = |histogram: &[u32], rank: usize, stage: usize| -> usize {
            let first = placement.experts_of(Rank(rank)).start;
            let local = table.experts_of(Rank(rank), Stage(stage));
            histogram[first + local.start..first + local.end].iter().map(|&rows| rows as usize).sum()
        };
        // [source][destination][stage] and [home][rank][stage]: what the source's buffers look like.
        let sides = |histogram: fn(&LayerHistograms, Rank) -> &[u32]| -> Vec<Parts> {
            let side =
                |rank| Parts::new(ranks, stages, |other, stage| rows(histogram(counts, rank), other, stage));
            placement.all_ranks().map(side).collect()
        };
        let send = sides(|counts, rank| &counts.of(rank).first);
        let home = sides(|counts, rank| &counts.of(rank).last);
        let of_rank = |rank: Rank| {
            let experts = placement.experts_of(rank);
            let copies = Parts::new(experts.len(), 1, |local, _| counts.copies_of(experts.start + local));
            RankTraffic {
                tokens: counts.of(rank).tokens as usize,
                receive: Parts::new(stages, ranks, |stage, source| send[source].part(rank.0, stage).len()),
                combine: Parts::new(stages, ranks, |stage, other| home[other].part(rank.0, stage).len()),
                records: Parts::new(ranks, 1, |source, _| send[source].whole(rank.0).len()),
                stage_copies: Parts::new(stages, 1, |stage, _| {
                    table.experts_of(rank, Stage(stage)).map(|local| copies.part(local, 0).len()).sum()
                }),
                copies,
                send: send[rank.0].clone(),
                home: home[rank.0].clone(),
            }
        };
        Traffic { stages, ranks: placement.all_ranks().map(of_rank).collect() }
    }

    /// Ranks, R.
    pub fn ranks(&self) -> usize {
        self.ranks.len()
    }

    /// Stages, S.
    pub fn stages(&self) -> usize {
        self.stages
    }

    /// Tokens on `rank`, T.
    pub fn tokens(&self, rank: Rank) -> usize {
        self.ranks[rank.0].tokens
    }

    /// Rows of `rank`'s send buffer, and of its home buffer.
    pub fn rows_sent(&self, rank: Rank) -> usize {
        self.ranks[rank.0].send.len()
    }

    /// Rows of `rank`'s receive buffer, and of its combine buffer.
    pub fn rows_received(&self, rank: Rank) -> usize {
        self.ranks[rank.0].receive.len()
    }

    /// Rows that `source` dispatches to `destination` in `stage`.
    pub fn dispatched(&self, stage: Stage, source: Rank, destination: Rank) -> usize {
        self.send_range(source, destination, stage).len()
    }

    /// Partial sums that `rank` sends home to `home` in `stage`.
    pub fn combined(&self, stage: Stage, rank: Rank, home: Rank) -> usize {
        self.home_range(home, rank, stage).len()
    }

    /// Where `source` keeps the rows it dispatches to `destination` in `stage`: rows of its send buffer.
    pub fn send_range(&self, source: Rank, destination: Rank, stage: Stage) -> Range<usize> {
        self.ranks[source.0].send.part(destination.0, stage.0)
    }

    /// The same over all stages: also the rows whose metadata records `source` sends to `destination`.
    pub fn send_rows(&self, source: Rank, destination: Rank) -> Range<usize> {
        self.ranks[source.0].send.whole(destination.0)
    }

    /// Where `rank` puts the rows of `source` in `stage`: rows of its receive buffer.
    pub fn receive_range(&self, rank: Rank, stage: Stage, source: Rank) -> Range<usize> {
        self.ranks[rank.0].receive.part(stage.0, source.0)
    }

    /// The rows of `rank`'s receive buffer that arrive in `stage`, from all sources.
    pub fn receive_stage(&self, rank: Rank, stage: Stage) -> Range<usize> {
        self.ranks[rank.0].receive.whole(stage.0)
    }

    /// Where `rank` puts the metadata records of `source`, counted in rows: source by source, each in its own
    /// send order, all stages at once.
    pub fn record_rows(&self, rank: Rank, source: Rank) -> Range<usize> {
        self.ranks[rank.0].records.whole(source.0)
    }

    /// Where `rank` keeps the partial sums it sends to `home` in `stage`: rows of its combine buffer.
    pub fn combine_range(&self, rank: Rank, stage: Stage, home: Rank) -> Range<usize> {
        self.ranks[rank.0].combine.part(stage.0, home.0)
    }

    /// The rows of `rank`'s combine buffer that the reduction of `stage` writes.
    pub fn combine_stage(&self, rank: Rank, stage: Stage) -> Range<usize> {
        self.ranks[rank.0].combine.whole(stage.0)
    }

    /// Where `home` puts the partial sums of `rank` in `stage`: rows of its home buffer.
    pub fn home_range(&self, home: Rank, rank: Rank, stage: Stage) -> Range<usize> {
        self.ranks[home.0].home.part(rank.0, stage.0)
    }

    /// The copies of one of `rank`'s experts, among all copies of the rank in expert order.
    pub fn expert_copies(&self, rank: Rank, local_expert: usize) -> Range<usize> {
        self.ranks[rank.0].copies.whole(local_expert)
    }

    /// The copies of `rank`'s experts in `stage`, among all copies of the rank in expert order.
    pub fn stage_copies(&self, rank: Rank, stage: Stage) -> Range<usize> {
        self.ranks[rank.0].stage_copies.whole(stage.0)
    }

    /// All copies on `rank`.
    pub fn copies(&self, rank: Rank) -> usize {
        self.ranks[rank.0].copies.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::maps::example;

    #[test]
    fn parts_of_the_worked_example() {
        let example = example::layer();
        let traffic = &example.traffic;
        let (zero, one) = (Rank(0), Rank(1));
        let both = [Stage(0), Stage(1)];
        assert_eq!(both.map(|stage| traffic.send_range(zero, zero, stage)), [0..2, 2..3]);
        assert_eq!(both.map(|stage| traffic.send_range(zero, one, stage)), [3..4, 4..5]);
        assert_eq!(both.map(|stage| traffic.send_range(one, zero, stage)), [0..0, 0..1]);
        assert_eq!(both.map(|stage| traffic.send_range(one, one, stage)), [1..3, 3..3]);
        assert_eq!(traffic.send_rows(zero, one), 3..5);
        assert_eq!(both.map(|stage| traffic.receive_range(zero, stage, zero)), [0..2, 2..3]);
        assert_eq!(both.map(|stage| traffic.receive_range(zero, stage, one)), [2..2, 3..4]);
        assert_eq!(both.map(|stage| traffic.receive_stage(one, stage)), [0..3, 3..4]);
        assert_eq!([zero, one].map(|source| traffic.record_rows(one, source)), [0..2, 2..4]);
        assert_eq!(both.map(|stage| traffic.combine_range(zero, stage, zero)), [0..1, 1..3]);
        assert_eq!(both.map(|stage| traffic.combine_range(zero, stage, one)), [1..1, 3..4]);
        assert_eq!(both.map(|stage| traffic.combine_stage(one, stage)), [0..2, 2..4]);
        assert_eq!(both.map(|stage| traffic.home_range(zero, zero, stage)), [0..1, 1..3]);
        assert_eq!(both.map(|stage| traffic.home_range(one, one, stage)), [1..2, 2..3]);
        assert_eq!(both.map(|stage| traffic.stage_copies(zero, stage)), [0..2, 2..5]);
        assert_eq!(traffic.expert_copies(zero, 2), 3..5);
        assert_eq!(traffic.dispatched(Stage(0), one, one), 2);
        assert_eq!(traffic.combined(Stage(1), zero, zero), 2);
        assert_eq!([traffic.rows_sent(zero), traffic.rows_sent(one)], [5, 3]);
        assert_eq!([traffic.rows_received(zero), traffic.rows_received(one)], [4, 4]);
        assert_eq!([traffic.copies(zero), traffic.copies(one)], [5, 5]);
        assert_eq!([traffic.tokens(zero), traffic.tokens(one)], [3, 2]);
    }
}
