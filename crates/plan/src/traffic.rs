//! How many rows go where in which stage, and which rows of which buffer they are.
//!
//! A layer has four row buffers on a rank. A *part* is a run of consecutive rows in one of them:
//!
//! | buffer | holds | parts, in order | rows inside a part |
//! |---|---|---|---|
//! | dispatch send    | rows of own tokens to every rank   | destination, then stage of the first slot | first slot, then token |
//! | dispatch receive | rows of all ranks for own slots    | stage of the first slot, then source      | as they were sent |
//! | combine send     | partial sums of these rows         | stage of the last slot, then source       | last slot, then as they were sent |
//! | combine receive  | partial sums of own tokens         | rank they come from, then stage of the last slot | last slot, then as they were sent |
//!
//! "Slot" is always one on the rank that the row is sent to. Two things follow:
//!
//! - Stages are consecutive slots, so the order of the rows in *dispatch send* and *combine receive* does not depend on
//!   the cuts: rows are packed before anyone knows the stages, and the cuts only say where one stage ends in there.
//! - The rows that have arrived after stages 0..=s are one prefix of *dispatch receive*, and what reduce(s) writes is
//!   one run of *combine send*. Every transfer reads and writes one run per pair of ranks.
//!
//! # Worked example
//!
//! Slots 0, 1, 2 on rank 0 and 3, 4 on rank 1, cut as `0..1 1..3` and `0..1 1..2`. Rank 0 has tokens
//! a {0, 2}, b {1, 3}, c {0, 4}; rank 1 has tokens x {2, 3}, y {3, 4}.
//!
//! ```text
//!                            to rank 0          to rank 1
//! dispatch send on rank 0    a c | b            b | c            parts: (0, d0) (0, d1) (1, d0) (1, d1)
//! dispatch send on rank 1      | x              x y |
//!                            stage 0            stage 1
//! dispatch receive on rank 0 a c |              b | x            parts: (d0, 0) (d0, 1) (d1, 0) (d1, 1)
//! dispatch receive on rank 1 b | x y            c |
//! combine send on rank 0     c |                b a | x          parts: (c0, 0) (c0, 1) (c1, 0) (c1, 1)
//! combine send on rank 1     b | x              c | y
//!                            from rank 0        from rank 1
//! combine receive on rank 0  c | b a            b | c            parts: (0, c0) (0, c1) (1, c0) (1, c1)
//! combine receive on rank 1    | x              x | y
//! ```
//!
//! Token a travels to rank 0 in stage 0, for its slot 0, and its sum comes back in stage 1, after its slot 2.

use crate::{LayerHistograms, SlotMap, StageTable};
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
    dispatch_send: Parts,
    /// `[stage][source]`
    dispatch_receive: Parts,
    /// `[stage][source]`
    combine_send: Parts,
    /// `[rank][stage]`
    combine_receive: Parts,
    /// `[source]`: metadata arrives all at once, so it is not sorted by stage.
    metadata: Parts,
    /// `[local slot]`
    assignments: Parts,
    /// `[stage]`
    stage_assignments: Parts,
}

/// Row counts and buffer layouts of one layer on every rank; the same answer on every rank.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Traffic {
    stages: usize,
    ranks: Vec<RankTraffic>,
}

impl Traffic {
    /// Lays out a layer; `table` has passed [`StageTable::validate`] for `map`.
    pub fn of(map: &SlotMap, counts: &LayerHistograms, table: &StageTable) -> Self {
        let (ranks, stages) = (map.ranks(), table.stages());
        // Rows between two ranks in a stage, by a histogram over first or last slots.
        let rows = |histogram: &[u32], rank: usize, stage: usize| -> usize {
            let first = map.slots_of_rank(Rank(rank)).start;
            let local = table.slots_of(Rank(rank), Stage(stage));
            histogram[first + local.start..first + local.end].iter().map(|&rows| rows as usize).sum()
        };
        // [source][other rank][stage]: what the source's buffers look like.
        let sides = |histogram: fn(&LayerHistograms, Rank) -> &[u32]| -> Vec<Parts> {
            let side =
                |rank| Parts::new(ranks, stages, |other, stage| rows(histogram(counts, rank), other, stage));
            map.all_ranks().map(side).collect()
        };
        let send = sides(|counts, rank| &counts.of(rank).first);
        let back = sides(|counts, rank| &counts.of(rank).last);
        let of_rank = |rank: Rank| {
            let slots = map.slots_of_rank(rank);
            let assignments =
                Parts::new(slots.len(), 1, |local, _| counts.assignments_of(slots.start + local));
            RankTraffic {
                tokens: counts.of(rank).tokens as usize,
                dispatch_receive: Parts::new(stages, ranks, |stage, source| {
                    send[source].part(rank.0, stage).len()
                }),
                combine_send: Parts::new(stages, ranks, |stage, source| {
                    back[source].part(rank.0, stage).len()
                }),
                metadata: Parts::new(ranks, 1, |source, _| send[source].whole(rank.0).len()),
                stage_assignments: Parts::new(stages, 1, |stage, _| {
                    table.slots_of(rank, Stage(stage)).map(|local| assignments.part(local, 0).len()).sum()
                }),
                assignments,
                dispatch_send: send[rank.0].clone(),
                combine_receive: back[rank.0].clone(),
            }
        };
        Traffic { stages, ranks: map.all_ranks().map(of_rank).collect() }
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

    /// Rows that `rank` sends, and sums that come back to it.
    pub fn rows_sent(&self, rank: Rank) -> usize {
        self.ranks[rank.0].dispatch_send.len()
    }

    /// Rows that `rank` receives, and sums that it sends back.
    pub fn rows_received(&self, rank: Rank) -> usize {
        self.ranks[rank.0].dispatch_receive.len()
    }

    /// Rows that `source` dispatches to `destination` in `stage`.
    pub fn dispatched(&self, stage: Stage, source: Rank, destination: Rank) -> usize {
        self.dispatch_send(source, destination, stage).len()
    }

    /// Partial sums that `rank` sends back to `source` in `stage`.
    pub fn combined(&self, stage: Stage, rank: Rank, source: Rank) -> usize {
        self.combine_receive(source, rank, stage).len()
    }

    /// Where `source` keeps the rows it dispatches to `destination` in `stage`.
    pub fn dispatch_send(&self, source: Rank, destination: Rank, stage: Stage) -> Range<usize> {
        self.ranks[source.0].dispatch_send.part(destination.0, stage.0)
    }

    /// The same over all stages: also the rows whose metadata `source` sends to `destination`.
    pub fn dispatch_send_all(&self, source: Rank, destination: Rank) -> Range<usize> {
        self.ranks[source.0].dispatch_send.whole(destination.0)
    }

    /// Where `rank` puts the rows of `source` in `stage`.
    pub fn dispatch_receive(&self, rank: Rank, stage: Stage, source: Rank) -> Range<usize> {
        self.ranks[rank.0].dispatch_receive.part(stage.0, source.0)
    }

    /// The rows that arrive at `rank` in `stage`, from all sources.
    pub fn dispatch_receive_stage(&self, rank: Rank, stage: Stage) -> Range<usize> {
        self.ranks[rank.0].dispatch_receive.whole(stage.0)
    }

    /// Where `rank` puts the metadata of the rows of `source`: source by source, each in its own send order, all stages
    /// at once.
    pub fn metadata_receive(&self, rank: Rank, source: Rank) -> Range<usize> {
        self.ranks[rank.0].metadata.whole(source.0)
    }

    /// Where `rank` keeps the partial sums it sends back to `source` in `stage`.
    pub fn combine_send(&self, rank: Rank, stage: Stage, source: Rank) -> Range<usize> {
        self.ranks[rank.0].combine_send.part(stage.0, source.0)
    }

    /// The partial sums of `rank` that the reduction of `stage` writes.
    pub fn combine_send_stage(&self, rank: Rank, stage: Stage) -> Range<usize> {
        self.ranks[rank.0].combine_send.whole(stage.0)
    }

    /// Where `source` puts the partial sums of `rank` in `stage`.
    pub fn combine_receive(&self, source: Rank, rank: Rank, stage: Stage) -> Range<usize> {
        self.ranks[source.0].combine_receive.part(rank.0, stage.0)
    }

    /// The assignments of one of `rank`'s slots, among all of the rank in slot order.
    pub fn slot_assignments(&self, rank: Rank, local: usize) -> Range<usize> {
        self.ranks[rank.0].assignments.whole(local)
    }

    /// The assignments of `rank`'s slots in `stage`, likewise.
    pub fn stage_assignments(&self, rank: Rank, stage: Stage) -> Range<usize> {
        self.ranks[rank.0].stage_assignments.whole(stage.0)
    }

    /// All assignments of `rank`'s slots.
    pub fn assignments(&self, rank: Rank) -> usize {
        self.ranks[rank.0].assignments.len()
    }

    /// What the metadata that arrives at `rank` must say and where its rows are, for every (source, local slot): the
    /// metadata row at which rows with this first slot start, the receive row of the first of them, the row of the first
    /// sum with this last slot, how many sums have it, and how many assignments the slot has.
    pub fn receive_bins(
        &self,
        map: &SlotMap,
        counts: &LayerHistograms,
        table: &StageTable,
        rank: Rank,
    ) -> Vec<[u32; 5]> {
        let block = map.slots_of_rank(rank);
        let mut bins = Vec::with_capacity(self.ranks() * block.len());
        for source in map.all_ranks() {
            let announced = counts.of(source);
            let mut metadata = self.metadata_receive(rank, source).start as u32;
            for stage in (0..self.stages).map(Stage) {
                let mut received = self.dispatch_receive(rank, stage, source).start as u32;
                let mut sum = self.combine_send(rank, stage, source).start as u32;
                for slot in table.slots_of(rank, stage).map(|local| block.start + local) {
                    let (first, last) = (announced.first[slot], announced.last[slot]);
                    bins.push([metadata, received, sum, last, announced.assignments[slot]]);
                    metadata += first;
                    received += first;
                    sum += last;
                }
            }
        }
        bins
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::example;

    #[test]
    fn parts_of_the_worked_example() {
        let example = example::layer();
        let traffic = &example.traffic;
        let (zero, one) = (Rank(0), Rank(1));
        let both = [Stage(0), Stage(1)];
        assert_eq!(both.map(|stage| traffic.dispatch_send(zero, zero, stage)), [0..2, 2..3]);
        assert_eq!(both.map(|stage| traffic.dispatch_send(zero, one, stage)), [3..4, 4..5]);
        assert_eq!(both.map(|stage| traffic.dispatch_send(one, zero, stage)), [0..0, 0..1]);
        assert_eq!(both.map(|stage| traffic.dispatch_send(one, one, stage)), [1..3, 3..3]);
        assert_eq!(traffic.dispatch_send_all(zero, one), 3..5);
        assert_eq!(both.map(|stage| traffic.dispatch_receive(zero, stage, zero)), [0..2, 2..3]);
        assert_eq!(both.map(|stage| traffic.dispatch_receive(zero, stage, one)), [2..2, 3..4]);
        assert_eq!(both.map(|stage| traffic.dispatch_receive_stage(one, stage)), [0..3, 3..4]);
        assert_eq!([zero, one].map(|source| traffic.metadata_receive(one, source)), [0..2, 2..4]);
        assert_eq!(both.map(|stage| traffic.combine_send(zero, stage, zero)), [0..1, 1..3]);
        assert_eq!(both.map(|stage| traffic.combine_send(zero, stage, one)), [1..1, 3..4]);
        assert_eq!(both.map(|stage| traffic.combine_send_stage(one, stage)), [0..2, 2..4]);
        assert_eq!(both.map(|stage| traffic.combine_receive(zero, zero, stage)), [0..1, 1..3]);
        assert_eq!(both.map(|stage| traffic.combine_receive(one, one, stage)), [1..2, 2..3]);
        assert_eq!(both.map(|stage| traffic.stage_assignments(zero, stage)), [0..2, 2..5]);
        assert_eq!(traffic.slot_assignments(zero, 2), 3..5);
        let example::Layer { map, counts, table, .. } = &example;
        assert_eq!(
            traffic.receive_bins(map, counts, table, zero),
            [
                [0, 0, 0, 1, 2], // a c have first slot 0, c has last slot 0
                [2, 2, 1, 1, 1], // b
                [3, 3, 2, 1, 1], // a has last slot 2
                [3, 2, 1, 0, 0],
                [3, 3, 3, 0, 0],
                [3, 3, 3, 1, 1], // x
            ]
        );
        assert_eq!(traffic.dispatched(Stage(0), one, one), 2);
        assert_eq!(traffic.combined(Stage(1), zero, zero), 2);
        assert_eq!([traffic.rows_sent(zero), traffic.rows_sent(one)], [5, 3]);
        assert_eq!([traffic.rows_received(zero), traffic.rows_received(one)], [4, 4]);
        assert_eq!([traffic.assignments(zero), traffic.assignments(one)], [5, 5]);
        assert_eq!([traffic.tokens(zero), traffic.tokens(one)], [3, 2]);
    }
}
