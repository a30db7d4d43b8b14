//! What a timeline says about its MoE layers.

use epsmoe_base::{Lane, Layer, Phase, Rank};
use epsmoe_engine::StepReport;
use epsmoe_plan::{LayerWindow, Span, TimeBreakdown, Timeline};
use serde::Serialize;
use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

/// One MoE layer of one step.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct LayerTime {
    /// On the rank that takes longest.
    pub(super) ms: f64,
    /// There, transfers beside no computation.
    pub(super) exposed_ms: f64,
    /// On the rank that computes most: no schedule of this routing is faster.
    pub(super) compute_ms: f64,
    /// Of that, the experts: expand, products, reduce.
    pub(super) experts_ms: f64,
    /// Dispatch and combine, on the rank that waits least for the others in them.
    pub(super) transfer_ms: f64,
}

/// What steps of one round took.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct StepTime {
    pub(super) first_ms: f64,
    /// The median of those that only continue prompts.
    pub(super) decode_ms: Option<f64>,
}

impl StepTime {
    /// From when each step was over; nothing of no steps. Whatever the prompts took, the last half of the new tokens came when
    /// all of them were done.
    pub(super) fn of(ends: &[Duration], output_len: usize) -> Option<Self> {
        let millis = |time: Duration| time.as_secs_f64() * 1e3;
        let decodes = &ends[ends.len().saturating_sub(output_len / 2 + 1)..];
        let steps = decodes.windows(2).map(|pair| millis(pair[1] - pair[0]));
        Some(StepTime { first_ms: millis(*ends.first()?), decode_ms: quantile(steps, 0.5) })
    }
}

/// What the hosts of the ranks took for one MoE layer, in microseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub(super) struct HostTime {
    /// Reading the histograms and enqueueing the packing, on the rank that took longest.
    pub(super) packing_us: f64,
    /// The count exchange, on the rank that came last.
    pub(super) rendezvous_us: f64,
    /// From everybody's counts to a plan, on the rank that took longest.
    pub(super) planning_us: f64,
    /// From the plan to the last operation enqueued, likewise.
    pub(super) enqueueing_us: f64,
}

/// Every MoE layer of a step whose ranks met, but for the last of several, as of [`layer_times`].
pub(super) fn host_times(step: &StepReport) -> Vec<HostTime> {
    let layers = step.outputs.iter().map(|output| output.layers.len()).min().unwrap_or(0);
    let between = |from: Option<Instant>, to: Option<Instant>| {
        Some(to?.saturating_duration_since(from?).as_secs_f64() * 1e6)
    };
    let of_layer = |layer: usize| {
        let mut time = HostTime { rendezvous_us: f64::INFINITY, ..HostTime::default() };
        for output in &step.outputs {
            let host = &output.layers[layer].host;
            let longest = |time: &mut f64, us: f64| *time = time.max(us);
            longest(&mut time.packing_us, between(host.counted, host.packed)?);
            time.rendezvous_us = time.rendezvous_us.min(between(host.packed, host.exchanged)?);
            longest(&mut time.planning_us, between(host.exchanged, host.planned)?);
            longest(&mut time.enqueueing_us, between(host.planned, host.enqueued)?);
        }
        Some(time)
    };
    (0..layers.max(2) - 1).take(layers).filter_map(of_layer).collect()
}

/// The MoE layer of a timeline whose time is the median, on all ranks, with what other layers do meanwhile: where experts' sums are
/// added behind the next layer, that one computes beside their transfers.
pub(super) fn median_layer(timeline: &Timeline) -> Option<Timeline> {
    let mut windows: BTreeMap<Layer, (u64, u64)> = BTreeMap::new();
    for (layer, _, LayerWindow { start_ns, end_ns, .. }) in moe_layers(timeline) {
        let window = windows.entry(layer).or_insert((start_ns, end_ns));
        *window = (window.0.min(start_ns), window.1.max(end_ns));
    }
    let mut layers: Vec<_> = windows.into_iter().collect();
    layers.sort_by_key(|(_, (start, end))| end - start);
    let (_, (start, end)) = *layers.get(layers.len() / 2)?;
    let meanwhile = |span: &&Span| span.end_ns > start && span.start_ns < end;
    let spans: Vec<&Span> = timeline.spans.iter().filter(meanwhile).collect();
    Some(inside(&spans, start, end))
}

/// Every MoE layer of a step, but for the last of several: of that only the tokens are computed whose logits are wanted.
pub(super) fn layer_times(timeline: &Timeline) -> Vec<LayerTime> {
    let mut layers: BTreeMap<Layer, LayerTime> = BTreeMap::new();
    for (layer, rank, window) in moe_layers(timeline) {
        let of_layer = |span: &&Span| (span.layer, span.rank) == (Some(layer), rank);
        let spans: Vec<&Span> = timeline.spans.iter().filter(of_layer).collect();
        let inside = inside(&spans, window.start_ns, window.end_ns);
        let time = layers.entry(layer).or_default();
        let took = ms(window.duration_ns());
        if took > time.ms {
            (time.ms, time.exposed_ms) = (took, ms(inside.exposed_transfer(rank)));
        }
        let compute_ms = ms(inside.busy(rank, Lane::Compute));
        if compute_ms > time.compute_ms {
            let of_a_stage = |span: &Span| span.lane == Lane::Compute && span.stage.is_some();
            (time.compute_ms, time.experts_ms) = (compute_ms, ms(total(&inside, of_a_stage)));
        }
        let transfer_ms = ms(total(&inside, is_transfer));
        if transfer_ms > 0.0 && (time.transfer_ms == 0.0 || transfer_ms < time.transfer_ms) {
            time.transfer_ms = transfer_ms;
        }
    }
    if layers.len() > 1 {
        layers.pop_last();
    }
    layers.into_values().collect()
}

/// Rows or sums of a stage on their way.
fn is_transfer(span: &Span) -> bool {
    matches!(span.phase, Phase::Dispatch | Phase::Combine)
}

fn total(timeline: &Timeline, which: impl Fn(&Span) -> bool) -> u64 {
    timeline.spans.iter().filter(|&span| which(span)).map(Span::duration_ns).sum()
}

/// The shortest dispatch or combine of a stage, in milliseconds.
pub(super) fn smallest_transfer(timeline: &Timeline) -> Option<f64> {
    timeline.spans.iter().filter(|span| is_transfer(span)).map(|span| ms(span.duration_ns())).reduce(f64::min)
}

/// Every MoE layer of every rank, and when it ran there.
fn moe_layers(timeline: &Timeline) -> impl Iterator<Item = (Layer, Rank, LayerWindow)> {
    let ranks: BTreeSet<Rank> = timeline.spans.iter().map(|span| span.rank).collect();
    let of_rank = |rank: Rank| timeline.moe_layers(rank).into_iter().map(move |window| (rank, window));
    ranks.into_iter().flat_map(of_rank).filter_map(|(rank, window)| Some((window.layer?, rank, window)))
}

/// Spans cut to a window.
fn inside(spans: &[&Span], start: u64, end: u64) -> Timeline {
    let cut = spans.iter().map(|&span| Span {
        start_ns: span.start_ns.clamp(start, end),
        end_ns: span.end_ns.clamp(start, end),
        ..span.clone()
    });
    Timeline { spans: cut.collect() }
}

/// The breakdown of the rank that had the least time to spare.
pub(super) fn busiest(timeline: &Timeline) -> TimeBreakdown {
    let ranks: BTreeSet<Rank> = timeline.spans.iter().map(|span| span.rank).collect();
    let breakdown = ranks.into_iter().map(|rank| TimeBreakdown::of(timeline, rank));
    breakdown.min_by_key(|breakdown| breakdown.count_exchange + breakdown.idle).unwrap_or_default()
}

fn ms(ns: u64) -> f64 {
    ns as f64 / 1e6
}

/// The value below which a share of the values lies, between the nearest two; nothing of nothing.
pub(crate) fn quantile(values: impl Iterator<Item = f64>, share: f64) -> Option<f64> {
    let mut values: Vec<f64> = values.collect();
    values.sort_unstable_by(f64::total_cmp);
    let at = share * values.len().checked_sub(1)? as f64;
    let (below, above) = (values[at.floor() as usize], values[at.ceil() as usize]);
    Some(below + (above - below) * at.fract())
}

#[cfg(test)]
mod tests {
    use super::*;
    use epsmoe_base::Stage;

    fn span(rank: usize, lane: Lane, phase: Phase, stage: Option<usize>, start: u64, end: u64) -> Span {
        Span {
            rank: Rank(rank),
            layer: Some(Layer(1)),
            stage: stage.map(Stage),
            lane,
            phase,
            name: "whatever".into(),
            start_ns: start * 1_000_000,
            end_ns: end * 1_000_000,
        }
    }

    /// ```text
    /// ms               0 1 2 3 4 5 6 7 8 9 10
    /// rank 0 compute   a ███     ███     s
    /// rank 0 transfer      █████   ███
    /// rank 1 compute       █     ███████ s
    /// rank 1 transfer        ███   ███
    /// ```
    #[test]
    fn a_layer_is_timed_from_its_route_to_its_sum() {
        let timeline = Timeline {
            spans: vec![
                span(0, Lane::Compute, Phase::Attention, None, 0, 1),
                span(0, Lane::Compute, Phase::Route, None, 1, 3),
                span(0, Lane::Transfer, Phase::Dispatch, Some(0), 2, 5),
                span(0, Lane::Compute, Phase::Reduce, Some(0), 5, 7),
                span(0, Lane::Transfer, Phase::Combine, Some(0), 6, 8),
                span(0, Lane::Compute, Phase::Sum, None, 9, 10),
                span(1, Lane::Compute, Phase::Route, None, 2, 3),
                span(1, Lane::Transfer, Phase::Dispatch, Some(0), 3, 5),
                span(1, Lane::Compute, Phase::GateUp, Some(0), 5, 9),
                span(1, Lane::Transfer, Phase::Combine, Some(0), 6, 8),
                span(1, Lane::Compute, Phase::Sum, None, 9, 10),
            ],
        };
        // Rank 0 takes longest, rank 1 computes most and waits least.
        let expected =
            LayerTime { ms: 9.0, exposed_ms: 3.0, compute_ms: 6.0, experts_ms: 4.0, transfer_ms: 4.0 };
        assert_eq!(layer_times(&timeline), [expected]);
        assert_eq!(layer_times(&Timeline::default()), []);
        assert_eq!(
            (smallest_transfer(&timeline), smallest_transfer(&Timeline::default())),
            (Some(2.0), None)
        );
    }

    #[test]
    fn what_another_layer_computes_meanwhile_is_seen() {
        let of_next = |phase, start, end| Span {
            layer: Some(Layer(2)),
            ..span(0, Lane::Compute, phase, None, start, end)
        };
        let timeline = Timeline {
            spans: vec![
                span(0, Lane::Compute, Phase::Route, None, 1, 2),
                span(0, Lane::Transfer, Phase::Combine, Some(0), 3, 7),
                of_next(Phase::Attention, 4, 6),
                span(0, Lane::Compute, Phase::Sum, None, 8, 9),
                of_next(Phase::Mlp, 9, 12),
            ],
        };
        let seen = median_layer(&timeline).unwrap();
        assert_eq!(
            seen.spans.iter().map(|span| span.phase).collect::<Vec<_>>(),
            [Phase::Route, Phase::Combine, Phase::Attention, Phase::Sum]
        );
    }

    #[test]
    fn steps_are_timed_from_their_ends() {
        let ends = [10, 17, 19, 20, 23].map(Duration::from_millis);
        assert_eq!(StepTime::of(&ends, 5), Some(StepTime { first_ms: 10.0, decode_ms: Some(2.0) }));
        assert_eq!(StepTime::of(&ends[..1], 1), Some(StepTime { first_ms: 10.0, decode_ms: None }));
        assert_eq!(StepTime::of(&[], 1), None);
    }

    #[test]
    fn quantiles_lie_between_values() {
        let quantile = |share| quantile([4.0, 1.0, 2.0].into_iter(), share);
        assert_eq!((quantile(0.0), quantile(0.5), quantile(0.75)), (Some(1.0), Some(2.0), Some(3.0)));
        assert_eq!(super::quantile(std::iter::empty(), 0.5), None);
    }
}
