//! What all ranks do in a layer, in the order in which the pipeline enqueues it: the twin of `pipeline`'s loop.

use super::Workload;
use crate::piecewise::scale;
use crate::{CostModel, GemmKind, LayerSizes, Payload, SharedExpert, StageTable, Traffic, Transfer, Work};
use epsmoe_base::{Lane, Phase, Rank, Stage};
use std::ops::Range;

/// A piece of a layer on one rank, before it is priced.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Planned {
    /// Who does it.
    pub rank: Rank,
    /// On which lane; the host if on none.
    pub lane: Option<Lane>,
    /// What its span is for; nothing of the host, which leaves none.
    pub phase: Option<Phase>,
    /// What its span is called.
    pub name: &'static str,
    /// The stage it belongs to, if any.
    pub stage: Option<Stage>,
    /// What it is: one operation after the other.
    pub work: Vec<Work>,
}

/// Everything that all ranks do in a layer under a table, rank by rank in the order in which the pipeline enqueues it:
/// what [`simulate`](crate::simulate()) prices. The spans of a run are these operations in the same order on every lane, so that a
/// measured time finds its work.
pub fn planned(table: &StageTable, workload: &Workload<'_>, cost: &CostModel) -> Vec<Planned> {
    let program = Program::described(table, workload, cost);
    let ranks = program.ranks;
    let of = |(at, work): (usize, Vec<Work>)| {
        let step = &program.steps[at / ranks];
        let lane = match step.queue {
            Queue::Compute => Some(Lane::Compute),
            Queue::Transfer => Some(Lane::Transfer),
            Queue::Host => None,
        };
        let Label { name, phase, stage } = step.label;
        Planned { rank: Rank(at % ranks), lane, phase, name, stage, work }
    };
    program.described.into_iter().flatten().enumerate().map(of).collect()
}

/// A queue of one rank.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Queue {
    Compute,
    Transfer,
    Host,
}

pub(super) const QUEUES: usize = 3;

/// What a step is called and what it is for, as in the spans of a run.
#[derive(Clone, Copy, Debug)]
pub(super) struct Label {
    pub(super) name: &'static str,
    /// Nothing of the host.
    pub(super) phase: Option<Phase>,
    pub(super) stage: Option<Stage>,
}

impl Label {
    /// An operation of a lane.
    fn lane(name: &'static str, phase: Phase) -> Self {
        Label { name, phase: Some(phase), stage: None }
    }

    /// A piece of work of the host.
    fn host(name: &'static str) -> Self {
        Label { name, phase: None, stage: None }
    }

    fn of(self, stage: Option<Stage>) -> Self {
        Label { stage, ..self }
    }
}

/// One piece of work, the same on every rank but for its size.
#[derive(Clone, Debug)]
pub(super) struct Step {
    pub(super) queue: Queue,
    pub(super) label: Label,
    /// Steps of other queues that come first.
    pub(super) after: [Option<usize>; 2],
    /// It begins when all ranks are there.
    pub(super) meets: bool,
}

/// What all ranks do, and for how long each.
pub(super) struct Program {
    pub(super) ranks: usize,
    pub(super) steps: Vec<Step>,
    /// Steps of the host in which ranks tell each other their counts and plan; none in place.
    pub(super) exchanged_and_planned: Option<[usize; 2]>,
    /// `[step · R + rank]` nanoseconds when nothing else runs; of an exchange on a shared processor, those on the
    /// links.
    pub(super) work: Vec<u64>,
    /// Likewise, what an exchange takes of a shared processor.
    pub(super) copies: Vec<u64>,
    /// Likewise, what it is, where somebody asks.
    described: Option<Vec<Vec<Work>>>,
}

impl Program {
    pub(super) fn of(table: &StageTable, workload: &Workload<'_>, cost: &CostModel) -> Self {
        Self::build(table, workload, cost, None)
    }

    fn described(table: &StageTable, workload: &Workload<'_>, cost: &CostModel) -> Self {
        Self::build(table, workload, cost, Some(Vec::new()))
    }

    fn build(
        table: &StageTable,
        workload: &Workload<'_>,
        cost: &CostModel,
        described: Option<Vec<Vec<Work>>>,
    ) -> Self {
        let ranks = workload.map.ranks();
        let traffic = Traffic::of(workload.map, workload.counts, table);
        let (steps, work, copies) = (Vec::new(), Vec::new(), Vec::new());
        let program = Program { ranks, steps, exchanged_and_planned: None, work, copies, described };
        let compute_permille = cost.share(table.reserved).compute;
        let handed = vec![0; ranks];
        let mut builder = Builder { table, workload, cost, traffic, compute_permille, handed, program };
        if table.runs_in_place(workload.map) {
            builder.in_place()
        } else {
            builder.layer()
        }
        builder.program
    }
}

/// Calls of an operation, with its marks and its share of what the host does besides.
const CALLS: u64 = 2;

/// Writes the program of a layer, in the order in which the pipeline enqueues it.
struct Builder<'a> {
    table: &'a StageTable,
    workload: &'a Workload<'a>,
    cost: &'a CostModel,
    traffic: Traffic,
    compute_permille: u64,
    /// `[rank]` calls that the host has made so far to hand over operations.
    handed: Vec<u64>,
    program: Program,
}

impl Builder<'_> {
    /// A layer whose rows travel.
    fn layer(&mut self) {
        let sizes = *self.workload.shape;
        let (slots, ranks) = (self.workload.map.slots() as u64, self.program.ranks as u64);
        let shared = self.table.shared;
        self.route();
        let counted = self.index("count_slots", Phase::Count, [None, None], Self::pairs_sent);
        let read = self.host("read", false, [Some(counted), None], Work::ReadCounts, |_, _| slots);
        let ready = self.pack(read);
        self.shared_if(shared == SharedExpert::BesideCountExchange, None);
        let messages = ranks * (8 + 4 * (1 + 3 * slots));
        let exchanged = self.host("count exchange", true, [None, None], Work::CountExchange, |_, _| messages);
        let planned = self.host("plan", false, [None, None], Work::Plan, |_, _| slots * ranks);
        self.program.exchanged_and_planned = Some([exchanged, planned]);
        let handed = self.enqueue(None, Self::calls_of_exchange);
        let metadata = self.exchange(
            Label::lane("metadata", Phase::Metadata),
            [Some(ready), Some(handed.unwrap_or(planned))],
            8 * sizes.top_k,
            |traffic, rank, other| traffic.dispatch_send_all(rank, other).len(),
            |traffic, rank, other| traffic.metadata_receive(rank, other).len(),
        );
        let mut first = true;
        // [stage] its dispatch, and its reduction once it is enqueued.
        let mut dispatched: Vec<Option<usize>> = vec![None; self.table.stages()];
        let mut reduced: Vec<usize> = Vec::with_capacity(self.table.stages());
        let mut last_transfer = metadata;
        for &transfer in &self.table.order {
            match transfer {
                Transfer::Dispatch(stage) => {
                    let handed = self.enqueue(Some(stage), Self::calls_of_exchange);
                    last_transfer = self.exchange(
                        Label::lane("dispatch", Phase::Dispatch).of(Some(stage)),
                        [handed, None],
                        sizes.wire.dispatch.bytes(sizes.hidden),
                        |traffic, rank, other| traffic.dispatch_send(rank, other, stage).len(),
                        |traffic, rank, other| traffic.dispatch_receive(rank, stage, other).len(),
                    );
                    dispatched[stage.0] = Some(last_transfer);
                    if first {
                        if shared == SharedExpert::BesideFirstDispatch && sizes.shared_inner > 0 {
                            let handed = self.enqueue(None, |_, _| 2 * CALLS);
                            self.shared_if(true, Some(handed.unwrap_or(planned)));
                        }
                        self.receive(planned, metadata);
                        first = false;
                    }
                    // A stage waits for all dispatches enqueued before it: the last one is enough.
                    while dispatched.get(reduced.len()).is_some_and(Option::is_some) {
                        reduced.push(self.stage(Stage(reduced.len()), Some(last_transfer)));
                    }
                }
                Transfer::Combine(stage) => {
                    let handed = self.enqueue(Some(stage), Self::calls_of_exchange);
                    last_transfer = self.exchange(
                        Label::lane("combine", Phase::Combine).of(Some(stage)),
                        [Some(reduced[stage.0]), handed],
                        sizes.wire.combine.bytes(sizes.hidden),
                        |traffic, rank, other| traffic.combine_send(rank, stage, other).len(),
                        |traffic, rank, other| traffic.combine_receive(rank, other, stage).len(),
                    );
                }
            }
        }
        self.shared_if(shared == SharedExpert::BesideLastCombine, None);
        self.shared_if(shared == SharedExpert::Serial, Some(last_transfer));
        self.sum(Some(last_transfer));
    }

    /// A layer of one rank and one grouped stage: nothing travels, and only the processor knows the counts.
    fn in_place(&mut self) {
        let shared = self.table.shared;
        let first = matches!(shared, SharedExpert::BesideCountExchange | SharedExpert::BesideFirstDispatch);
        self.route();
        self.shared_if(first, None);
        self.index("sort_by_slot", Phase::Maps, [None, None], Self::pairs_sent);
        self.stage(Stage(0), None);
        self.shared_if(!first, None);
        self.sum(None);
    }

    /// An operation on rows or index arrays, of so many bytes or logits.
    fn rows(
        &mut self,
        label: Label,
        after: [Option<usize>; 2],
        work: fn(u64) -> Work,
        size: impl Fn(&Self, Rank) -> u64,
    ) -> usize {
        let step = Step { queue: Queue::Compute, label, after, meets: false };
        let ns = |this: &Self, size| scale(this.cost.sized_ns(&work(size)), this.compute_permille);
        self.push(
            step,
            |this, rank| vec![work(size(this, rank))],
            |this, rank| (ns(this, size(this, rank)), 0),
        )
    }

    /// Index arrays made of so many (row, slot) pairs.
    fn index(
        &mut self,
        name: &'static str,
        phase: Phase,
        after: [Option<usize>; 2],
        pairs: impl Fn(&Self, Rank) -> u64,
    ) -> usize {
        self.rows(Label::lane(name, phase), after, Work::Index, pairs)
    }

    /// Of a rank's own tokens.
    fn pairs_sent(&self, rank: Rank) -> u64 {
        (self.traffic.tokens(rank) * self.workload.shape.top_k) as u64
    }

    /// Of the rows that a rank receives.
    fn pairs_received(&self, rank: Rank) -> u64 {
        (self.traffic.rows_received(rank) * self.workload.shape.top_k) as u64
    }

    /// Index arrays on their way to the device: so many words.
    fn host_to_device(&mut self, after: Option<usize>, words: impl Fn(&Self, Rank) -> usize) -> usize {
        let label = Label::lane("host_to_device", Phase::Maps);
        self.rows(label, [after, None], Work::HostToDevice, |this, rank| 4 * words(this, rank) as u64)
    }

    fn host(
        &mut self,
        name: &'static str,
        meets: bool,
        after: [Option<usize>; 2],
        work: fn(u64) -> Work,
        size: impl Fn(&Self, Rank) -> u64,
    ) -> usize {
        let step = Step { queue: Queue::Host, label: Label::host(name), after, meets };
        let ns = |this: &Self, rank| this.cost.sized_ns(&work(size(this, rank)));
        self.push(step, |this, rank| vec![work(size(this, rank))], |this, rank| (ns(this, rank), 0))
    }

    /// The host hands something to a lane in so many calls; nothing where that is free. The curve was measured over whole
    /// layers, so what a layer's calls cost together is what it says of them all.
    fn enqueue(&mut self, stage: Option<Stage>, calls: impl Fn(&Self, Rank) -> u64) -> Option<usize> {
        if self.cost.host.enqueue.extended(1 << 20) == 0 && self.program.described.is_none() {
            return None;
        }
        let label = Label::host("enqueue").of(stage);
        let step = Step { queue: Queue::Host, label, after: [None, None], meets: false };
        let calls: Vec<u64> = (0..self.program.ranks).map(|rank| calls(self, Rank(rank))).collect();
        let until = |calls: u64| if calls == 0 { 0 } else { self.cost.sized_ns(&Work::Enqueue(calls)) };
        let ns = |(&before, &calls): (&u64, &u64)| until(before + calls).saturating_sub(until(before));
        let ns: Vec<u64> = self.handed.iter().zip(&calls).map(ns).collect();
        self.handed.iter_mut().zip(&calls).for_each(|(handed, calls)| *handed += calls);
        Some(self.push(step, |_, rank| vec![Work::Enqueue(calls[rank.0])], |_, rank| (ns[rank.0], 0)))
    }

    /// Marks, and copies from all ranks, of which several are one call.
    fn calls_of_exchange(&self, _: Rank) -> u64 {
        2 * CALLS + self.program.ranks as u64 / 4
    }

    /// Adds a step: what it is on every rank, and how long it takes there, on its lane and of the processor besides.
    fn push(
        &mut self,
        step: Step,
        work: impl Fn(&Self, Rank) -> Vec<Work>,
        ns: impl Fn(&Self, Rank) -> (u64, u64),
    ) -> usize {
        for rank in (0..self.program.ranks).map(Rank) {
            let (lane, processor) = ns(self, rank);
            self.program.work.push(lane);
            self.program.copies.push(processor);
            if self.program.described.is_some() {
                let work = work(self, rank);
                self.program.described.iter_mut().for_each(|all| all.push(work.clone()));
            }
        }
        self.program.steps.push(step);
        self.program.steps.len() - 1
    }

    /// An exchange of rows of `row_bytes`: how many a rank sends to another, and how many come back.
    fn exchange(
        &mut self,
        label: Label,
        after: [Option<usize>; 2],
        row_bytes: usize,
        out: impl Fn(&Traffic, Rank, Rank) -> usize,
        back: impl Fn(&Traffic, Rank, Rank) -> usize,
    ) -> usize {
        let step = Step { queue: Queue::Transfer, label, after, meets: true };
        let payload = |this: &Self, rank| {
            let out = this.sides(rank, |other| out(&this.traffic, rank, other));
            let back = this.sides(rank, |other| back(&this.traffic, rank, other));
            let larger = |side: usize| (out[side].max(back[side]) * row_bytes) as u64;
            let received = (back.iter().sum::<usize>() * row_bytes) as u64;
            Payload { near: larger(1), far: larger(2), received }
        };
        let (link, shared) = (&self.cost.link, self.cost.concurrent > 0);
        self.push(
            step,
            |this, rank| vec![Work::Exchange(payload(this, rank))],
            |this, rank| match payload(this, rank) {
                payload if shared => (link.carry_ns(payload), link.copy_ns(payload)),
                payload => (link.exchange_ns(payload), 0),
            },
        )
    }

    /// Rows between a rank and itself, the rest of its node, and other nodes.
    fn sides(&self, rank: Rank, rows: impl Fn(Rank) -> usize) -> [usize; 3] {
        let node = self.cost.link.node_of(rank.0, self.program.ranks);
        let sum = |ranks: Range<usize>| ranks.map(|other| rows(Rank(other))).sum::<usize>();
        let own = rows(rank);
        let far = sum(0..node.start) + sum(node.end..self.program.ranks);
        [own, sum(node) - own, far]
    }

    /// Router, choice of experts, and their slots.
    fn route(&mut self) {
        let (hidden, experts) = (self.workload.shape.hidden, self.workload.map.experts());
        self.linear(Phase::RouterLogits, [experts, hidden], None);
        let logits = |this: &Self, rank| (this.traffic.tokens(rank) * experts) as u64;
        self.rows(Label::lane("route", Phase::Route), [None, None], Work::Route, logits);
        self.index("assign_slots", Phase::Maps, [None, None], Self::pairs_sent);
    }

    /// One product of all of a rank's tokens with one matrix.
    fn linear(&mut self, phase: Phase, matrix: [usize; 2], after: Option<usize>) {
        let tokens = |this: &Self, rank| vec![this.traffic.tokens(rank) as u64];
        self.products(GemmKind::Dense, matrix, Label::lane("gemm", phase), after, tokens);
    }

    /// Products of `[columns, depth]` matrices with so many rows each.
    fn products(
        &mut self,
        kind: GemmKind,
        [columns, depth]: [usize; 2],
        label: Label,
        after: Option<usize>,
        rows: impl Fn(&Self, Rank) -> Vec<u64>,
    ) {
        let product = self.cost.gemm(kind).product(columns, depth, self.workload.shape.weights);
        let step = Step { queue: Queue::Compute, label, after: [after, None], meets: false };
        let gemm = |rows| Work::Gemm { kind, rows, columns, depth };
        self.push(
            step,
            |this, rank| match kind {
                GemmKind::Grouped => vec![gemm(rows(this, rank))],
                GemmKind::Dense => rows(this, rank).into_iter().map(|rows| gemm(vec![rows])).collect(),
            },
            |this, rank| {
                let rows = rows(this, rank).into_iter();
                let ns = match kind {
                    GemmKind::Grouped => product.op_ns(rows),
                    GemmKind::Dense => rows.map(|rows| product.op_ns([rows])).sum(),
                };
                (scale(ns, this.compute_permille), 0)
            },
        );
    }

    /// Rows and metadata in send order; the last step after which they may leave.
    fn pack(&mut self, read: usize) -> usize {
        let LayerSizes { hidden, wire, .. } = *self.workload.shape;
        self.index("send_order", Phase::Pack, [Some(read), None], Self::pairs_sent);
        self.rows(Label::lane("gather", Phase::Pack), [None, None], Work::Gather, |this, rank| {
            (this.traffic.rows_sent(rank) * wire.dispatch.bytes(hidden)) as u64
        })
    }

    fn shared_if(&mut self, now: bool, after: Option<usize>) {
        let LayerSizes { hidden, maps, shared_inner: inner, .. } = *self.workload.shape;
        if now && inner > 0 {
            self.linear(Phase::Shared, [maps * inner, hidden], after);
            self.linear(Phase::Shared, [hidden, inner], None);
        }
    }

    /// What was announced, and the index arrays of the stages, which follow from it and from the metadata.
    fn receive(&mut self, planned: usize, metadata: usize) {
        let ranks = self.program.ranks;
        let handed = self.enqueue(None, |_, _| 3 * CALLS);
        self.host_to_device(Some(handed.unwrap_or(planned)), |this, rank| {
            5 * ranks * this.workload.map.local_count(rank)
        });
        self.index("receive_order", Phase::Maps, [Some(metadata), None], Self::pairs_received);
        self.index("sort_by_slot", Phase::Maps, [None, None], Self::pairs_received);
    }

    /// Expand, two products and reduction of a stage; returns the last.
    fn stage(&mut self, stage: Stage, dispatched: Option<usize>) -> usize {
        let LayerSizes { hidden, inner, maps, .. } = *self.workload.shape;
        let row_bytes = self.workload.shape.row_bytes() as u64;
        let (place, kind) = (Some(stage), self.table.gemm[stage.0]);
        let loaded = move |this: &Self, rank| -> Vec<u64> {
            let slots = this.table.slots_of(rank, stage);
            let rows = slots.map(|slot| this.traffic.slot_assignments(rank, slot).len() as u64);
            rows.filter(|&rows| rows > 0).collect()
        };
        let handed = dispatched.and_then(|_| {
            self.enqueue(place, |this, rank| {
                // Expand and reduce, and the products in two operations or in as many as there are.
                CALLS * if kind == GemmKind::Dense { 2 + 2 * loaded(this, rank).len() as u64 } else { 4 }
            })
        });
        let of_stage = |name, phase| Label::lane(name, phase).of(place);
        let expand = of_stage("gather", Phase::Expand);
        self.rows(expand, [dispatched, handed], Work::Gather, |this, rank| {
            this.traffic.stage_assignments(rank, stage).len() as u64 * row_bytes
        });
        for (phase, matrix) in [(Phase::GateUp, [maps * inner, hidden]), (Phase::Down, [hidden, inner])] {
            self.products(kind, matrix, of_stage("gemm", phase), None, loaded);
        }
        self.rows(of_stage("reduce", Phase::Reduce), [None, None], Work::Reduce, |this, rank| {
            // Which assignments make which sum only the routing knows: every sum has its share of them.
            let (sums, all) =
                (this.traffic.combine_send_stage(rank, stage).len(), this.traffic.rows_received(rank));
            (this.traffic.assignments(rank) * sums / all.max(1)) as u64 * row_bytes
        })
    }

    /// Each token's sums, added up, with the shared expert's output.
    fn sum(&mut self, last_transfer: Option<usize>) {
        let sizes = *self.workload.shape;
        let sum_bytes = sizes.wire.combine.bytes(sizes.hidden);
        let addend_bytes = if sizes.shared_inner > 0 { sizes.row_bytes() } else { 0 };
        self.rows(Label::lane("reduce", Phase::Sum), [last_transfer, None], Work::Reduce, |this, rank| {
            (this.traffic.rows_sent(rank) * sum_bytes + this.traffic.tokens(rank) * addend_bytes) as u64
        });
    }
}
