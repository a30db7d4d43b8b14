//! Where a rank's time went, without a rest: every nanosecond of a run is in exactly one part.

use crate::Timeline;
use crate::timeline::overlap;
use epsmoe_base::{Lane, Phase, Rank};
use serde::Serialize;
use std::ops::Range;

/// Nanoseconds of one rank, from the first to the last span of a run.
///
/// The compute lane decides: while it works, time belongs to what it does; while it does not, to the transfers
/// that it waits for, or to the host that plans an MoE layer, or to nothing.
///
/// ```text
/// compute    route  ·  ·  gemm gemm  ·  ·  reduce | ·  attention
/// transfer          ·  d0  d0        c0
///                  plan └ exposed   └ exposed       idle
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct TimeBreakdown {
    /// All of it.
    pub wall: u64,
    /// Matrix products.
    pub gemm: u64,
    /// Attention over the cache.
    pub attention: u64,
    /// Every other operation.
    pub other: u64,
    /// Nothing computed, rows travelled.
    pub exposed_transfer: u64,
    /// Nothing computed and nothing travelled inside an MoE layer: ranks told their counts, the host planned.
    pub count_exchange: u64,
    /// The same outside MoE layers.
    pub idle: u64,
}

impl TimeBreakdown {
    /// Sorts the time of `rank`. Spans of one lane that overlap are counted twice: [`TimeBreakdown::unexplained`] shows it.
    pub fn of(timeline: &Timeline, rank: Rank) -> Self {
        let Some(wall) = timeline.extent() else { return TimeBreakdown::default() };
        let mut breakdown = TimeBreakdown { wall: wall.end - wall.start, ..TimeBreakdown::default() };
        let layers = timeline.moe_layers(rank);
        let layers: Vec<_> = layers.iter().map(|layer| (layer.start_ns, layer.end_ns)).collect();
        let transfers = timeline.intervals(rank, Lane::Transfer);
        let compute = timeline.spans.iter().filter(|span| span.rank == rank && span.lane == Lane::Compute);
        for span in compute {
            let account = match span.phase {
                phase if phase.is_product() => &mut breakdown.gemm,
                Phase::Attention => &mut breakdown.attention,
                _ => &mut breakdown.other,
            };
            *account += span.duration_ns();
        }
        for gap in gaps(&timeline.intervals(rank, Lane::Compute), wall) {
            let exposed = shared(&transfers, &gap);
            let in_layers =
                |&(start, end): &(u64, u64)| shared(&layers, &(start.max(gap.start)..end.min(gap.end)));
            let planning = shared(&layers, &gap) - transfers.iter().map(in_layers).sum::<u64>();
            breakdown.exposed_transfer += exposed;
            breakdown.count_exchange += planning;
            breakdown.idle += gap.end - gap.start - exposed - planning;
        }
        breakdown
    }

    /// What the breakdown miss of the wall time, or have too much of it.
    pub fn unexplained(&self) -> u64 {
        let explained =
            self.gemm + self.attention + self.other + self.exposed_transfer + self.count_exchange + self.idle;
        explained.abs_diff(self.wall)
    }
}

/// What `busy` leaves free of `wall`.
fn gaps(busy: &[(u64, u64)], wall: Range<u64>) -> Vec<Range<u64>> {
    let starts = std::iter::once(wall.start).chain(busy.iter().map(|&(_, end)| end));
    let ends = busy.iter().map(|&(start, _)| start).chain([wall.end]);
    starts.zip(ends).map(|(start, end)| start..end).filter(|gap| gap.start < gap.end).collect()
}

/// Nanoseconds that disjoint intervals have in common with one.
fn shared(intervals: &[(u64, u64)], with: &Range<u64>) -> u64 {
    overlap(intervals, &[(with.start, with.end)])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Span;
    use epsmoe_base::{Layer, Stage};

    fn span(lane: Lane, phase: Phase, stage: Option<usize>, times: Range<u64>) -> Span {
        Span {
            rank: Rank(0),
            layer: Some(Layer(0)),
            stage: stage.map(Stage),
            lane,
            phase,
            name: "whatever".into(),
            start_ns: times.start,
            end_ns: times.end,
        }
    }

    #[test]
    fn every_nanosecond_has_one_account() {
        let spans = vec![
            span(Lane::Compute, Phase::Route, None, 0..2),
            span(Lane::Transfer, Phase::Dispatch, Some(0), 3..6),
            span(Lane::Compute, Phase::GateUp, Some(0), 6..10),
            span(Lane::Transfer, Phase::Dispatch, Some(1), 6..8),
            span(Lane::Transfer, Phase::Combine, Some(0), 10..13),
            span(Lane::Compute, Phase::Sum, None, 14..15),
            span(Lane::Compute, Phase::Attention, None, 17..20),
        ];
        let breakdown = TimeBreakdown::of(&Timeline { spans }, Rank(0));
        let expected = TimeBreakdown {
            wall: 20,
            gemm: 4,
            attention: 3,
            other: 3,
            exposed_transfer: 6,
            count_exchange: 2,
            idle: 2,
        };
        assert_eq!(breakdown, expected);
        assert_eq!(breakdown.unexplained(), 0);
    }

    #[test]
    fn work_that_overlaps_on_one_lane_is_noticed() {
        let spans = vec![
            span(Lane::Compute, Phase::Mlp, None, 0..10),
            span(Lane::Compute, Phase::Residual, None, 5..10),
        ];
        assert_eq!(TimeBreakdown::of(&Timeline { spans }, Rank(0)).unexplained(), 5);
        assert_eq!(TimeBreakdown::of(&Timeline::default(), Rank(0)), TimeBreakdown::default());
    }
}
