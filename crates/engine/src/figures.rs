//! What MoE layers do, as steps show it that somebody wants to see.
//!
//! Watching costs: the spans of a step have to be gathered, and counting the tokens of every expert makes the host wait
//! in every layer. So nothing is watched until somebody asks, and then two steps are, one for the times and the next
//! for the experts, which would disturb the times.

use crate::StepReport;
use epsmoe_base::{Layer, Phase, Rank};
use epsmoe_plan::{ScheduleReport, Span, StageTable, TimeBreakdown, Timeline};
use std::collections::BTreeMap;
use std::time::{Duration, Instant};

/// Nobody gets steps to be watched more often.
const BETWEEN: Duration = Duration::from_secs(1);

/// What the MoE layers of an engine did in the steps that were watched.
#[derive(Clone, Debug, Default)]
pub struct LayerFigures {
    /// Steps that were watched.
    pub watched: u64,
    /// By layer; none in a model without experts.
    pub layers: Vec<MoeLayerFigures>,
    /// The spans of the last layer in which experts computed, of the step whose times were watched last.
    pub last_layer: Vec<Span>,
    /// How the layers were planned so far, and what was predicted of those that were compared with the clock; nothing
    /// if the schedule is not auto.
    pub schedule: Option<ScheduleReport>,
}

/// One MoE layer.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct MoeLayerFigures {
    /// Which.
    pub layer: usize,
    /// Stages of its plan in the last step that was watched, the most if its tokens went in chunks.
    pub stages: usize,
    /// `[ranks]` its time in that step.
    pub ranks: Vec<LayerTimes>,
    /// `[E]` tokens that went to each expert, over all ranks and all steps that were watched.
    pub expert_tokens: Vec<u64>,
}

/// Where the time of one rank went in one MoE layer, from its router to its sums, in nanoseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LayerTimes {
    /// All of it.
    pub wall_ns: u64,
    /// Rows travelled, and nothing computed.
    pub exposed_transfer_ns: u64,
    /// Nothing travelled, and nothing computed: ranks met, or the host was late.
    pub idle_ns: u64,
}

/// Which steps are watched, and for what.
#[derive(Debug, Default)]
pub(crate) struct Watch {
    pub(crate) figures: LayerFigures,
    next: Next,
    last: Option<Instant>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Next {
    #[default]
    Nothing,
    Times,
    Experts,
}

impl Watch {
    /// Somebody wants to see newer figures.
    pub(crate) fn want(&mut self) {
        let due = self.last.is_none_or(|last| last.elapsed() >= BETWEEN);
        if due && self.next == Next::Nothing {
            self.next = Next::Times;
        }
    }

    /// Whether the times of the next step are wanted.
    pub(crate) fn times(&self) -> bool {
        self.next == Next::Times
    }

    /// Whether the tokens of experts are to be counted in the next step.
    pub(crate) fn experts(&self) -> bool {
        self.next == Next::Experts
    }

    /// Takes in a step that was watched; true when the figures are complete.
    pub(crate) fn take_in(
        &mut self,
        report: &StepReport,
        schedule: impl FnOnce() -> Option<ScheduleReport>,
    ) -> bool {
        match self.next {
            Next::Nothing => return false,
            Next::Times => {
                self.figures.take_times(report);
                self.figures.last_layer = last_layer(&report.timeline);
                self.next = Next::Experts;
                return false;
            }
            Next::Experts => self.figures.take_experts(report),
        }
        self.figures.schedule = schedule();
        self.figures.watched += 1;
        (self.next, self.last) = (Next::Nothing, Some(Instant::now()));
        true
    }
}

impl LayerFigures {
    fn layer(&mut self, layer: usize) -> &mut MoeLayerFigures {
        let at = self.layers.binary_search_by_key(&layer, |figures| figures.layer).unwrap_or_else(|at| {
            self.layers.insert(at, MoeLayerFigures { layer, ..MoeLayerFigures::default() });
            at
        });
        &mut self.layers[at]
    }

    fn take_times(&mut self, report: &StepReport) {
        let ranks = report.outputs.len();
        let times = layer_times(&report.timeline);
        for ((Layer(layer), Rank(rank)), times) in times {
            let figures = self.layer(layer);
            figures.ranks.resize(ranks, LayerTimes::default());
            if let Some(of_rank) = figures.ranks.get_mut(rank) {
                *of_rank = times;
            }
        }
    }

    fn take_experts(&mut self, report: &StepReport) {
        for layer in report.outputs.iter().flat_map(|output| &output.expert_tokens) {
            let figures = self.layer(layer.layer.0);
            figures.expert_tokens.resize(layer.tokens.len(), 0);
            for (sum, &tokens) in figures.expert_tokens.iter_mut().zip(&layer.tokens) {
                *sum += u64::from(tokens);
            }
        }
        let Some(first) = report.outputs.first() else { return };
        for (counted, ran) in first.expert_tokens.iter().zip(&first.layers) {
            let stages = ran.tables.iter().map(StageTable::stages).max();
            self.layer(counted.layer.0).stages = stages.unwrap_or(0);
        }
    }
}

/// The times of every rank in every MoE layer.
fn layer_times(timeline: &Timeline) -> BTreeMap<(Layer, Rank), LayerTimes> {
    let mut of_layer: BTreeMap<(Layer, Rank), Vec<Span>> = BTreeMap::new();
    for span in timeline.spans.iter().filter(|span| span.phase.is_of_experts()) {
        if let Some(layer) = span.layer {
            of_layer.entry((layer, span.rank)).or_default().push(span.clone());
        }
    }
    let times = of_layer.into_iter().map(|((layer, rank), spans)| {
        let time = TimeBreakdown::of(&Timeline { spans }, rank);
        let times = LayerTimes {
            wall_ns: time.wall,
            exposed_transfer_ns: time.exposed_transfer,
            idle_ns: time.count_exchange + time.idle,
        };
        ((layer, rank), times)
    });
    times.collect()
}

/// The spans of the last layer in which experts computed.
fn last_layer(timeline: &Timeline) -> Vec<Span> {
    let of_experts = timeline.spans.iter().filter(|span| span.phase == Phase::GateUp);
    let Some(last) = of_experts.filter_map(|span| span.layer).max_by_key(|layer| layer.0) else {
        return Vec::new();
    };
    let in_layer = |span: &&Span| span.layer == Some(last) && span.phase.is_of_experts();
    timeline.spans.iter().filter(in_layer).cloned().collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use epsmoe_base::Lane;
    use epsmoe_model::{ExpertTokens, StepOutput};

    fn span(layer: usize, rank: usize, lane: Lane, phase: Phase, times: std::ops::Range<u64>) -> Span {
        Span {
            rank: Rank(rank),
            layer: Some(Layer(layer)),
            stage: None,
            lane,
            phase,
            name: phase.to_string().into(),
            start_ns: times.start,
            end_ns: times.end,
        }
    }

    #[test]
    fn nothing_is_watched_until_somebody_asks_and_not_too_often() {
        let mut watch = Watch::default();
        assert!(!watch.times() && !watch.experts());
        assert!(!watch.take_in(&StepReport::default(), || None));
        watch.want();
        assert!(watch.times() && !watch.experts());
        assert!(!watch.take_in(&StepReport::default(), || None));
        assert!(!watch.times() && watch.experts());
        watch.want();
        assert!(watch.take_in(&StepReport::default(), || None));
        watch.want();
        assert!(!watch.times() && watch.figures.watched == 1);
        watch.last = watch.last.and_then(|last| last.checked_sub(BETWEEN));
        watch.want();
        assert!(watch.times());
    }

    #[test]
    fn figures_are_those_of_their_layer_and_rank() {
        let (compute, transfer) = (Lane::Compute, Lane::Transfer);
        let spans = vec![
            span(1, 0, compute, Phase::Attention, 0..50),
            span(1, 0, compute, Phase::Route, 50..60),
            span(1, 0, transfer, Phase::Dispatch, 65..80),
            span(1, 0, compute, Phase::GateUp, 75..100),
            span(3, 0, compute, Phase::Route, 200..210),
            span(1, 1, compute, Phase::Route, 40..60),
        ];
        let output = |tokens: &[u32]| StepOutput {
            expert_tokens: vec![ExpertTokens { layer: Layer(1), tokens: tokens.to_vec() }],
            ..StepOutput::default()
        };
        let outputs = vec![output(&[1, 0, 5]), output(&[2, 2, 0])];
        let report = StepReport { outputs, timeline: Timeline { spans } };
        let mut watch = Watch::default();
        for _ in 0..2 {
            watch.want();
            watch.take_in(&report, || None);
            watch.take_in(&report, || None);
            watch.last = None;
        }
        let [first, third] = &*watch.figures.layers else { panic!("{:?}", watch.figures) };
        assert_eq!((first.layer, third.layer, watch.figures.watched), (1, 3, 2));
        assert_eq!(first.ranks[0], LayerTimes { wall_ns: 50, exposed_transfer_ns: 10, idle_ns: 5 });
        assert_eq!(first.ranks[1], LayerTimes { wall_ns: 20, exposed_transfer_ns: 0, idle_ns: 0 });
        assert_eq!(first.expert_tokens, [6, 4, 10]);
        assert_eq!(third.ranks[0].wall_ns, 10);
        let phases: Vec<Phase> = watch.figures.last_layer.iter().map(|span| span.phase).collect();
        assert_eq!(
            phases,
            [Phase::Route, Phase::Dispatch, Phase::GateUp, Phase::Route],
            "all ranks' of the last layer with experts"
        );
    }
}
