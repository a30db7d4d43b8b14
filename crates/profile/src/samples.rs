//! What the spans of a layer say about the cost of each kind of work.
//!
//! The plan says what every span is ([`planned`]); a span's time, less what other threads took of the processor in it,
//! is a sample of that. The share of the processor follows the simulator's own rule, so that it gives the time back.

use crate::LayerRun;
use epsmoe_base::{Lane, Phase, Rank};
use epsmoe_fabric::Link;
use epsmoe_plan::{
    CostModel, CpuContention, Payload, Planned, Sample, Span, StageTable, Work, Workload, planned,
};
use std::collections::BTreeMap;

/// The samples of one layer, run by `table` at memory speed. Nothing, if its spans are not those of the table.
pub fn samples(run: &LayerRun, table: &StageTable, workload: &Workload<'_>, cost: &CostModel) -> Vec<Sample> {
    let steps = planned(table, workload, cost);
    let Some(paired) = paired(run, &steps) else { return Vec::new() };
    let reading =
        Reading { run, paired, contention: Contention::of(run, cost, true), wake_ns: cost.host.wake_ns };
    let ranks = workload.map.ranks();
    let mut samples = reading.operations();
    samples.extend(reading.exchanges(ranks));
    samples.extend(reading.hosts(&steps, ranks));
    samples
}

/// How long lanes took to go on, in a layer whose rows a link carried: after they slept until it was done, and to
/// combine what was computed. Where other threads filled the processor they waited for their turn.
pub(crate) fn delays(
    run: &LayerRun,
    table: &StageTable,
    workload: &Workload<'_>,
    cost: &CostModel,
    link: Link,
) -> Vec<Sample> {
    let steps = planned(table, workload, cost);
    let Some(paired) = paired(run, &steps) else { return Vec::new() };
    // Lanes that sleep leave the processor to others.
    let contention = Contention::of(run, cost, false);
    let all_there: Vec<u64> = exchanges(run).into_iter().map(|exchange| exchange.0).collect();
    let mut samples = Vec::new();
    for rank in workload.map.all_ranks() {
        let on =
            |lane: Lane| paired.iter().filter(move |pair| (pair.span.rank, pair.span.lane) == (rank, lane));
        for (pair, &all_there) in on(Lane::Transfer).zip(&all_there) {
            let Work::Exchange(Payload { near, .. }) = *pair.work else { continue };
            let due = all_there + link.time(near).as_nanos() as u64;
            if near > 0 {
                let work = if contention.is_full(due) { Work::Queue } else { Work::Sleep };
                samples.push(Sample { work, ns: pair.span.end_ns.saturating_sub(due) });
            }
            let reduced = on(Lane::Compute)
                .find(|reduce| (reduce.span.phase, reduce.span.stage) == (Phase::Reduce, pair.span.stage));
            let (Some(reduced), Some(before)) = (reduced, pair.before) else { continue };
            let ready = before.max(reduced.span.end_ns) + cost.host.wake_ns;
            if pair.span.phase == Phase::Combine
                && ready > run.hosts[rank.0].enqueued
                && contention.is_full(ready)
            {
                samples.push(Sample { work: Work::Queue, ns: pair.span.start_ns.saturating_sub(ready) });
            }
        }
    }
    samples
}

/// A span, the work it did, and when its lane was free for it.
struct Pair<'a> {
    span: &'a Span,
    work: &'a Work,
    /// End of the span before it on its lane.
    before: Option<u64>,
}

/// Every operation with its span: the same order on every lane. What the host brought, a routing or a slot map, is no work of
/// a layer.
fn paired<'a>(run: &'a LayerRun, steps: &'a [Planned]) -> Option<Vec<Pair<'a>>> {
    let mut lanes: BTreeMap<(usize, usize), Vec<&Span>> = BTreeMap::new();
    for span in &run.timeline.spans {
        lanes.entry((span.rank.0, span.lane.index())).or_default().push(span);
    }
    type OfLane<'a> = Vec<(&'a Span, Option<u64>)>;
    let mut spans: BTreeMap<(usize, usize), OfLane<'_>> = BTreeMap::new();
    for (key, on_lane) in lanes {
        let before = std::iter::once(None).chain(on_lane.iter().map(|span| Some(span.end_ns)));
        let work = on_lane.iter().copied().zip(before);
        spans.insert(key, work.filter(|(span, _)| span.phase != Phase::Input).collect());
    }
    let all: usize = spans.values().map(Vec::len).sum();
    let mut next: BTreeMap<(usize, usize), usize> = BTreeMap::new();
    let mut pairs = Vec::new();
    // Emulated ranks left no spans.
    let is_there = |rank: Rank| spans.keys().any(|(there, _)| *there == rank.0);
    for step in steps.iter().filter(|step| is_there(step.rank)) {
        let Some(lane) = step.lane else { continue };
        let key = (step.rank.0, lane.index());
        for work in &step.work {
            let at = next.entry(key).or_default();
            let &(span, before) = spans.get(&key)?.get(*at)?;
            if Some(span.phase) != step.phase || span.stage != step.stage {
                return None;
            }
            pairs.push(Pair { span, work, before });
            *at += 1;
        }
    }
    (pairs.len() == all).then_some(pairs)
}

/// Who wanted the processor when: (from, who), ascending.
struct Contention(Vec<(u64, CpuContention)>);

impl Contention {
    /// Of lanes and hosts; of transfer lanes only if they copy all the time.
    fn of(run: &LayerRun, cost: &CostModel, copies: bool) -> Self {
        let mut changes: BTreeMap<u64, [i64; 2]> = BTreeMap::new();
        let mut busy = |from: u64, to: u64, kind: usize, threads: i64| {
            if from < to {
                changes.entry(from).or_default()[kind] += threads;
                changes.entry(to).or_default()[kind] -= threads;
            }
        };
        const LANE: usize = 0;
        const BURST: usize = 1;
        for span in run.timeline.spans.iter().filter(|span| span.lane == Lane::Compute) {
            busy(span.start_ns, span.end_ns, LANE, i64::from(cost.lane_threads));
        }
        for (all_there, spans) in exchanges(run).into_iter().filter(|_| copies) {
            spans.iter().for_each(|span| busy(all_there, span.end_ns, BURST, 1));
        }
        for (rank, host) in run.hosts.iter().enumerate() {
            busy(counted(run, rank), host.packed, BURST, 1);
            busy(host.exchanged, host.planned, BURST, 1);
            busy(host.planned, host.enqueued, BURST, 1);
        }
        let mut now = [0; 2];
        let count = |(at, change): (u64, [i64; 2])| {
            now = [now[LANE] + change[LANE], now[BURST] + change[BURST]];
            let [lanes, bursts] = now.map(|threads| threads.max(0) as u64);
            (at, CpuContention { concurrent: cost.concurrent.into(), lanes, bursts })
        };
        Contention(changes.into_iter().map(count).collect())
    }

    /// Whether as many threads are at work as the processor can hold.
    fn is_full(&self, at: u64) -> bool {
        let before = self.0.partition_point(|step| step.0 <= at).checked_sub(1);
        before.is_some_and(|step| self.0[step].1.is_full())
    }

    /// Nanoseconds that work of this speed from `from` to `to` would have taken alone.
    fn alone(&self, from: u64, to: u64, speed: impl Fn(&CpuContention) -> u64) -> u64 {
        let mut alone = 0;
        let first = self.0.partition_point(|step| step.0 <= from).saturating_sub(1);
        for (index, (start, now)) in self.0.iter().enumerate().skip(first) {
            let end = self.0.get(index + 1).map_or(u64::MAX, |next| next.0).min(to);
            let start = (*start).max(from);
            if start >= to {
                break;
            }
            alone += end.saturating_sub(start) * speed(now) / CpuContention::FULL;
        }
        alone
    }
}

/// When a rank's assignments were counted.
fn counted(run: &LayerRun, rank: usize) -> u64 {
    let mut spans =
        run.timeline.spans.iter().filter(|span| span.rank.0 == rank && span.phase == Phase::Count);
    spans.next().map_or(u64::MAX, |span| span.end_ns)
}

/// The exchanges of a layer: when the last rank came, and everybody's spans.
fn exchanges(run: &LayerRun) -> Vec<(u64, Vec<&Span>)> {
    let mut of_rank: BTreeMap<usize, Vec<&Span>> = BTreeMap::new();
    for span in run.timeline.spans.iter().filter(|span| span.lane == Lane::Transfer) {
        of_rank.entry(span.rank.0).or_default().push(span);
    }
    let number = of_rank.values().map(Vec::len).min().unwrap_or(0);
    let together = |index: usize| {
        let spans: Vec<&Span> = of_rank.values().map(|spans| spans[index]).collect();
        (spans.iter().map(|span| span.start_ns).max().unwrap_or(0), spans)
    };
    (0..number).map(together).collect()
}

struct Reading<'a> {
    run: &'a LayerRun,
    paired: Vec<Pair<'a>>,
    contention: Contention,
    wake_ns: u64,
}

impl Reading<'_> {
    fn sample(&self, work: &Work, from: u64, to: u64) -> Option<Sample> {
        let speed = if work.is_computed() { CpuContention::lane_speed } else { CpuContention::burst_speed };
        (from < to).then(|| Sample { work: work.clone(), ns: self.contention.alone(from, to, speed) })
    }

    /// What compute lanes did. What a lane needs between two operations belongs to the second.
    ///
    /// Operations that bursts of hosts and copies took over a tenth of the processor from are left out: such a burst
    /// works some part of its span and waits in the rest, so that what it took is a guess.
    fn operations(&self) -> Vec<Sample> {
        /// Longer than this, a lane has waited for something else.
        const BETWEEN_NS: u64 = 8_000;
        let computed = self.paired.iter().filter(|pair| pair.span.lane == Lane::Compute);
        let sample = |pair: &Pair<'_>| {
            let from = pair
                .before
                .filter(|&before| pair.span.start_ns - before.min(pair.span.start_ns) < BETWEEN_NS);
            let (from, to) = (from.unwrap_or(pair.span.start_ns), pair.span.end_ns);
            let without_bursts = |now: &CpuContention| CpuContention { bursts: 0, ..*now }.lane_speed();
            let calm = self.contention.alone(from, to, without_bursts);
            self.sample(pair.work, from, to).filter(|sample| 10 * sample.ns >= 9 * calm)
        };
        computed.filter_map(sample).collect()
    }

    /// What exchanges took once everybody was there, on the rank that received most; and how long stages slept on
    /// after their rows were there.
    fn exchanges(&self, ranks: usize) -> Vec<Sample> {
        let mut samples = Vec::new();
        let of_lane = |rank: usize| {
            let on_lane =
                move |pair: &&Pair<'_>| pair.span.lane == Lane::Transfer && pair.span.rank == Rank(rank);
            self.paired.iter().filter(on_lane)
        };
        for (index, (all_there, spans)) in exchanges(self.run).into_iter().enumerate() {
            let received = |rank: usize| match of_lane(rank).nth(index).map(|pair| pair.work) {
                Some(Work::Exchange(Payload { received, .. })) => *received,
                _ => 0,
            };
            let most = (0..ranks).map(received).max().unwrap_or(0);
            let end = spans.iter().map(|span| span.end_ns).max().unwrap_or(0);
            let work = if most == 0 { Work::EmptyExchange } else { Work::Copy(most) };
            samples.extend(self.sample(&work, all_there, end));
            for pair in self.paired.iter().filter(|pair| pair.span.phase == Phase::Expand) {
                let arrived = spans.iter().find(|span| {
                    (span.rank, span.stage, span.phase) == (pair.span.rank, pair.span.stage, Phase::Dispatch)
                });
                let Some(arrived) = arrived else { continue };
                let waited = pair.before.is_some_and(|before| before < arrived.end_ns);
                let enqueued = self.run.hosts[pair.span.rank.0].planned < arrived.end_ns;
                if waited && enqueued {
                    let ns = pair.span.start_ns.saturating_sub(arrived.end_ns);
                    samples.push(Sample { work: Work::Wake, ns });
                }
            }
        }
        samples
    }

    /// What hosts did between the lanes' work.
    fn hosts(&self, steps: &[Planned], ranks: usize) -> Vec<Sample> {
        let mut samples = Vec::new();
        let last_packed = self.run.hosts.iter().map(|host| host.packed).max().unwrap_or(0);
        for step in steps.iter().filter(|step| step.lane.is_none()) {
            let host = self.run.hosts[step.rank.0];
            for work in &step.work {
                let (from, to) = match work {
                    Work::ReadCounts(_) => {
                        (counted(self.run, step.rank.0).saturating_add(self.wake_ns), host.counted)
                    }
                    Work::CountExchange(_) => (last_packed, host.exchanged),
                    Work::Plan(_) => (host.exchanged, host.planned),
                    _ => continue,
                };
                samples.extend(self.sample(work, from, to));
            }
        }
        for rank in 0..ranks {
            let host = self.run.hosts[rank];
            let work = Work::Enqueue(calls(steps, Rank(rank)));
            samples.extend(self.sample(&work, host.planned, host.enqueued));
        }
        // The curve begins where nothing is handed over.
        samples.push(Sample { work: Work::Enqueue(0), ns: 0 });
        samples
    }
}

/// Calls in which a rank's host hands a layer to its lanes.
pub(crate) fn calls(steps: &[Planned], rank: Rank) -> u64 {
    let of_rank = steps.iter().filter(|step| step.rank == rank).flat_map(|step| &step.work);
    of_rank.map(|work| if let Work::Enqueue(calls) = work { *calls } else { 0 }).sum()
}
