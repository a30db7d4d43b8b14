//! What happened when, on which lane of which rank.

use epsmoe_base::{Lane, Layer, Phase, Rank, Stage};
use serde::{Deserialize, Serialize};
use std::borrow::Cow;
use std::collections::BTreeSet;
use std::io::{self, Write};
use std::ops::Range;

/// One piece of work on one lane.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Span {
    /// The rank that did it.
    pub rank: Rank,
    /// The layer it belongs to, if any.
    pub layer: Option<Layer>,
    /// The stage it belongs to, if any.
    pub stage: Option<Stage>,
    /// The lane it ran on.
    pub lane: Lane,
    /// What it was for.
    pub phase: Phase,
    /// The operation, for people: `gemm`, `dispatch`, …
    pub name: Cow<'static, str>,
    /// When it began, in nanoseconds from a start that all ranks share.
    pub start_ns: u64,
    /// When it ended, no earlier than it began.
    pub end_ns: u64,
}

impl Span {
    /// How long it took, in nanoseconds.
    pub fn duration_ns(&self) -> u64 {
        self.end_ns.saturating_sub(self.start_ns)
    }
}

/// When a rank was at one MoE layer: from the choice of experts to the last sum of its tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LayerWindow {
    /// Which layer, where spans say it.
    pub layer: Option<Layer>,
    /// When the choice of experts began ([`Phase::Route`]), in nanoseconds.
    pub start_ns: u64,
    /// When the last of the sums ended ([`Phase::Sum`]), likewise. A layer has one for every chunk or micro-batch.
    pub end_ns: u64,
}

impl LayerWindow {
    /// The windows in the spans of one rank, in order. A layer that chose no experts, as its routing was replayed, has
    /// none.
    pub(crate) fn of<'a>(spans: impl IntoIterator<Item = &'a Span>) -> Vec<Self> {
        let marks = |span: &&Span| matches!(span.phase, Phase::Route | Phase::Sum);
        let mut spans: Vec<&Span> = spans.into_iter().filter(marks).collect();
        spans.sort_by_key(|span| span.start_ns);
        let mut windows: Vec<Self> = Vec::new();
        for span in spans {
            let &Span { layer, start_ns, end_ns, .. } = span;
            match windows.last_mut() {
                Some(last) if span.phase == Phase::Sum && last.layer == layer => last.end_ns = end_ns,
                _ if span.phase == Phase::Sum => {}
                _ => windows.push(LayerWindow { layer, start_ns, end_ns: start_ns }),
            }
        }
        windows.retain(|window| window.end_ns > window.start_ns);
        windows
    }

    /// How long it took, in nanoseconds.
    pub fn duration_ns(&self) -> u64 {
        self.end_ns - self.start_ns
    }
}

/// The spans of a run.
///
/// ```text
/// ns           0 1 2 3 4 5 6 7 8 9
/// compute        ████████    ████      busy 6
/// transfer     ████  ██████            busy 5, of which 2 beside no computation: exposed
/// ```
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Timeline {
    /// In any order.
    pub spans: Vec<Span>,
}

impl Timeline {
    /// How long a lane of `rank` did something, in nanoseconds; what overlaps on one lane counts once.
    pub fn busy(&self, rank: Rank, lane: Lane) -> u64 {
        length(&self.intervals(rank, lane))
    }

    /// How long the transfer lane of `rank` did something while its compute lane did not, in nanoseconds: the
    /// time that transfers cost.
    pub fn exposed_transfer(&self, rank: Rank) -> u64 {
        let transfer = self.intervals(rank, Lane::Transfer);
        let compute = self.intervals(rank, Lane::Compute);
        self.busy(rank, Lane::Transfer) - length(&common(&transfer, &compute))
    }

    /// The MoE layers of `rank`, in order.
    pub fn moe_layers(&self, rank: Rank) -> Vec<LayerWindow> {
        LayerWindow::of(self.spans.iter().filter(|span| span.rank == rank))
    }

    /// From the first start to the last end of any span; nothing without spans.
    pub fn extent(&self) -> Option<Range<u64>> {
        let start = self.spans.iter().map(|span| span.start_ns).min()?;
        let end = self.spans.iter().map(|span| span.end_ns).max()?;
        Some(start..end.max(start))
    }

    /// When a lane was busy: (start, end), ascending, apart from each other.
    pub(crate) fn intervals(&self, rank: Rank, lane: Lane) -> Vec<(u64, u64)> {
        let here = self.spans.iter().filter(|span| span.rank == rank && span.lane == lane);
        let mut all: Vec<_> = here.map(|span| (span.start_ns, span.end_ns.max(span.start_ns))).collect();
        all.sort_unstable();
        let mut apart: Vec<(u64, u64)> = Vec::new();
        for (start, end) in all {
            match apart.last_mut() {
                Some(last) if start <= last.1 => last.1 = last.1.max(end),
                _ => apart.push((start, end)),
            }
        }
        apart
    }

    /// Writes the spans as Chrome trace events, which Perfetto and `chrome://tracing` show: a process per rank, a
    /// thread per lane.
    pub fn to_chrome_json(&self, writer: impl Write) -> io::Result<()> {
        let ranks: BTreeSet<Rank> = self.spans.iter().map(|span| span.rank).collect();
        let names = ranks.into_iter().flat_map(|rank| {
            let process = Event::naming("process_name", rank, 0, rank.to_string());
            let thread = move |lane: Lane| Event::naming("thread_name", rank, lane.index(), lane.to_string());
            std::iter::once(process).chain(Lane::ALL.map(thread))
        });
        let trace_events = names.chain(self.spans.iter().map(Event::of)).collect();
        serde_json::to_writer(writer, &Trace { display_time_unit: "ns", trace_events })
            .map_err(io::Error::from)
    }
}

/// What two sets of intervals share; each set is ascending and apart, and so is what they share.
pub(crate) fn common(left: &[(u64, u64)], right: &[(u64, u64)]) -> Vec<(u64, u64)> {
    let (mut l, mut r, mut shared) = (0, 0, Vec::new());
    while let (Some(a), Some(b)) = (left.get(l), right.get(r)) {
        let (start, end) = (a.0.max(b.0), a.1.min(b.1));
        if start < end {
            shared.push((start, end));
        }
        if a.1 <= b.1 { l += 1 } else { r += 1 }
    }
    shared
}

/// The length of a set of intervals that are apart.
pub(crate) fn length(intervals: &[(u64, u64)]) -> u64 {
    intervals.iter().map(|(start, end)| end - start).sum()
}

/// The JSON object format of Chrome's trace viewer.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Trace<'a> {
    display_time_unit: &'static str,
    trace_events: Vec<Event<'a>>,
}

/// A complete event (`X`), or metadata (`M`) that names a process or thread.
#[derive(Serialize)]
struct Event<'a> {
    ph: &'static str,
    name: &'a str,
    pid: usize,
    tid: usize,
    /// Microseconds, as the format wants.
    #[serde(skip_serializing_if = "Option::is_none")]
    ts: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    dur: Option<f64>,
    args: Arguments,
}

#[derive(Default, Serialize)]
struct Arguments {
    #[serde(skip_serializing_if = "Option::is_none")]
    name: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    layer: Option<Layer>,
    #[serde(skip_serializing_if = "Option::is_none")]
    stage: Option<Stage>,
}

impl<'a> Event<'a> {
    fn of(span: &'a Span) -> Self {
        let microseconds = |ns: u64| Some(ns as f64 / 1000.0);
        Event {
            ph: "X",
            name: &span.name,
            pid: span.rank.0,
            tid: span.lane.index(),
            ts: microseconds(span.start_ns),
            dur: microseconds(span.duration_ns()),
            args: Arguments { name: None, layer: span.layer, stage: span.stage },
        }
    }

    fn naming(kind: &'static str, rank: Rank, tid: usize, name: String) -> Self {
        let args = Arguments { name: Some(name), ..Arguments::default() };
        Event { ph: "M", name: kind, pid: rank.0, tid, ts: None, dur: None, args }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use epsmoe_base::{Mix, env::test_seed};

    fn span(lane: Lane, name: &'static str, start_ns: u64, end_ns: u64) -> Span {
        let (layer, stage) = (Some(Layer(1)), (lane == Lane::Transfer).then_some(Stage(0)));
        let (rank, phase) = (Rank(2), Phase::Other);
        Span { rank, layer, stage, lane, phase, name: name.into(), start_ns, end_ns }
    }

    /// The picture in the docs.
    fn example() -> Timeline {
        let spans = vec![
            span(Lane::Compute, "gate/up", 1, 4),
            span(Lane::Compute, "down", 3, 5),
            span(Lane::Transfer, "dispatch", 0, 2),
            span(Lane::Compute, "down", 7, 9),
            span(Lane::Transfer, "combine", 3, 6),
        ];
        Timeline { spans }
    }

    #[test]
    fn exposed_is_what_nothing_hides() {
        let timeline = example();
        assert_eq!(timeline.busy(Rank(2), Lane::Compute), 6);
        assert_eq!(timeline.busy(Rank(2), Lane::Transfer), 5);
        assert_eq!(timeline.exposed_transfer(Rank(2)), 2);
        assert_eq!(timeline.exposed_transfer(Rank(0)), 0);
    }

    #[test]
    fn a_layer_lasts_from_its_choice_of_experts_to_its_last_sum() {
        let at = |layer, phase, start_ns, end_ns| Span {
            layer: Some(Layer(layer)),
            phase,
            ..span(Lane::Compute, "x", start_ns, end_ns)
        };
        let spans = vec![
            at(0, Phase::RouterLogits, 0, 1),
            at(0, Phase::Route, 1, 2),
            // Two micro-batches.
            at(0, Phase::Sum, 5, 6),
            at(0, Phase::Sum, 7, 9),
            at(1, Phase::Attention, 9, 10),
            // Replayed: nobody chose.
            at(1, Phase::Sum, 11, 12),
            at(2, Phase::Route, 13, 14),
            at(2, Phase::Sum, 14, 15),
            // The next step.
            at(0, Phase::Route, 20, 21),
            at(0, Phase::Sum, 22, 23),
            // Cut off.
            at(1, Phase::Route, 24, 25),
        ];
        let windows = Timeline { spans }.moe_layers(Rank(2));
        let window = |layer, start_ns, end_ns| LayerWindow { layer: Some(Layer(layer)), start_ns, end_ns };
        assert_eq!(windows, [window(0, 1, 9), window(2, 13, 15), window(0, 20, 23)]);
    }

    #[test]
    fn exposed_agrees_with_counting_every_nanosecond() {
        let seed = test_seed();
        let mut mix = Mix::new(seed);
        for _ in 0..200 {
            let random = |_| {
                let start = mix.below(60) as u64;
                let end = start + mix.below(12) as u64;
                span(Lane::ALL[mix.below(2)], "work", start, end)
            };
            let timeline = Timeline { spans: (0..12).map(random).collect() };
            let at = |lane: Lane, now: u64| {
                timeline
                    .spans
                    .iter()
                    .any(|span| span.lane == lane && (span.start_ns..span.end_ns).contains(&now))
            };
            let count = |wanted: &dyn Fn(u64) -> bool| (0..100).filter(|&now| wanted(now)).count() as u64;
            let exposed = count(&|now| at(Lane::Transfer, now) && !at(Lane::Compute, now));
            assert_eq!(timeline.exposed_transfer(Rank(2)), exposed, "seed {seed}");
            for lane in Lane::ALL {
                assert_eq!(timeline.busy(Rank(2), lane), count(&|now| at(lane, now)), "seed {seed}");
            }
        }
    }

    #[test]
    fn a_trace_that_viewers_read() {
        let timeline = Timeline { spans: vec![span(Lane::Transfer, "dispatch", 1500, 4000)] };
        let mut json = Vec::new();
        timeline.to_chrome_json(&mut json).unwrap();
        assert_eq!(
            String::from_utf8(json).unwrap(),
            concat!(
                r#"{"displayTimeUnit":"ns","traceEvents":["#,
                r#"{"ph":"M","name":"process_name","pid":2,"tid":0,"args":{"name":"rank 2"}},"#,
                r#"{"ph":"M","name":"thread_name","pid":2,"tid":0,"args":{"name":"compute lane"}},"#,
                r#"{"ph":"M","name":"thread_name","pid":2,"tid":1,"args":{"name":"transfer lane"}},"#,
                r#"{"ph":"X","name":"dispatch","pid":2,"tid":1,"ts":1.5,"dur":2.5,"args":{"layer":1,"stage":0}}]}"#
            )
        );
    }
}
