//! Where a rank's time went, without a rest: every nanosecond of a run is in exactly one part.

use crate::Timeline;
use crate::timeline::{common, length};
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
        let gaps = gaps(&timeline.intervals(rank, Lane::Compute), wall);
        let in_layers = common(&gaps, &layers);
        breakdown.exposed_transfer = length(&common(&gaps, &transfers));
        breakdown.count_exchange = length(&in_layers) - length(&common(&in_layers, &transfers));
        breakdown.idle = length(&gaps) - breakdown.exposed_transfer - breakdown.count_exchange;
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
fn gaps(busy: &[(u64, u64)], wall: Range<u64>) -> Vec<(u64, u64)> {
    let starts = std::iter::once(wall.start).chain(busy.iter().map(|&(_, end)| end));
    let ends = busy.iter().map(|&(start, _)| start).chain([wall.end]);
    starts.zip(ends).filter(|(start, end)| start < end).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Span;
    use epsmoe_base::{Layer, Mix, Stage};

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

    #[test]
    fn accounts_are_those_of_a_look_at_every_nanosecond() {
        let seed = 20_261_130;
        println!("seed {seed}");
        let mut random = Mix::new(seed);
        for _ in 0..50 {
            // Lanes that work and pause by turns: attention, then a layer from its route to its sum.
            let mut spans = Vec::new();
            for lane in Lane::ALL {
                let mut at = random.below(9) as u64;
                for number in 0..24 {
                    let end = at + random.below(9) as u64;
                    let phase = match (lane, number % 4) {
                        (Lane::Transfer, _) => Phase::Combine,
                        (Lane::Compute, 0) => Phase::Attention,
                        (Lane::Compute, 1) => Phase::Route,
                        (Lane::Compute, 2) => Phase::GateUp,
                        (Lane::Compute, _) => Phase::Sum,
                    };
                    spans.push(Span { layer: Some(Layer(number / 4)), ..span(lane, phase, None, at..end) });
                    at = end + random.below(5) as u64;
                }
            }
            let timeline = Timeline { spans };
            let layers = timeline.moe_layers(Rank(0));
            assert!(layers.len() > 2);
            let mut expected = TimeBreakdown::default();
            for at in timeline.extent().unwrap() {
                let work = |lane| {
                    let now = |span: &&Span| span.lane == lane && (span.start_ns..span.end_ns).contains(&at);
                    timeline.spans.iter().find(now).map(|span| span.phase)
                };
                let in_layer = layers.iter().any(|layer| (layer.start_ns..layer.end_ns).contains(&at));
                *match (work(Lane::Compute), work(Lane::Transfer), in_layer) {
                    (Some(Phase::GateUp), ..) => &mut expected.gemm,
                    (Some(Phase::Attention), ..) => &mut expected.attention,
                    (Some(_), ..) => &mut expected.other,
                    (None, Some(_), _) => &mut expected.exposed_transfer,
                    (None, None, true) => &mut expected.count_exchange,
                    (None, None, false) => &mut expected.idle,
                } += 1;
                expected.wall += 1;
            }
            assert_eq!(TimeBreakdown::of(&timeline, Rank(0)), expected);
        }
    }
}
