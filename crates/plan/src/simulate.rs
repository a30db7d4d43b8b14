//! Prices a [`StageTable`] without running it: the second interpreter of the plan.
//!
//! It walks what `pipeline` walks, in the same order, on the same two lanes of every rank, and writes the same
//! [`Timeline`] with the same names. The host is a third queue, which leaves no spans.
//!
//! ```text
//! host      (after route) pack   rendezvous  plan            maps
//! compute   gemm route     upload gather upload [shared]     │ upload │ after d0: gather gemm gemm reduce │ … │ after all: upload reduce
//! transfer  (after gather)                   metadata d0 d1 … │ c0 after reduce 0 …
//! ```
//!
//! - A lane does its work in order. Compute of stage s waits for the dispatches 0..=s, combine s for reduce s, the
//!   last sum for the last transfer, the index arrays for the metadata. Whoever waits for another queue goes on
//!   [`HostCost::wake_ns`](crate::HostCost::wake_ns) after it. Where handing work to a lane costs something, a lane
//!   also waits for the host that hands it the stage or the exchange.
//! - An exchange is two-sided: nothing moves before all ranks are there; then each rank is done after its own
//!   [`LinkCost::exchange_ns`](crate::LinkCost::exchange_ns).
//! - While a rank computes and transfers at once, both go slower, by the [`ShareCost`].
//! - Threads that share a processor ([`CostModel::concurrent`]): hosts, and transfer lanes while they copy, work in
//!   short bursts and take what they need; those of the compute lanes share the rest ([`CpuContention`]). There an exchange is
//!   work for the processor beside the time on the link, and nobody leaves it before all ranks have copied. Where
//!   computation fills it, a transfer lane or a host that would go on, or wakes up when a paced link is done, first waits
//!   for its turn: [`HostCost::queue_ns`](crate::HostCost::queue_ns), or until there is room.
//!
//! Time runs in whole nanoseconds and progress in whole millionths of one, so every rank finds the same times.

use crate::piecewise::scale;
use crate::{
    CostModel, GemmKind, LayerHistograms, LayerSizes, Payload, Placement, ShareCost, SharedExpert, Span,
    StageTable, Timeline, Traffic, Transfer, Work, record_words,
};
use epsmoe_base::{Lane, Phase, Rank, Stage};
use std::ops::Range;

/// Widths of a layer that decide what it costs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LayerShape {
    /// Hidden width H, inner width I, top k; rows and weights in `activation_bytes` an element.
    pub sizes: LayerSizes,
    /// Inner width of the shared expert; 0 without one.
    pub shared_inner: usize,
}

/// One layer with its tokens: what there is to do, whatever the plan.
#[derive(Clone, Copy, Debug)]
pub struct Workload<'a> {
    /// Where experts live.
    pub placement: &'a Placement,
    /// How many tokens go where.
    pub counts: &'a LayerHistograms,
    /// How wide they are.
    pub shape: &'a LayerShape,
}

/// What a layer will do and how long it will take.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Simulation {
    /// The two lanes of every rank, from the moment the layer's input is there.
    pub timeline: Timeline,
    /// When the last rank is done.
    pub layer_ns: u64,
    /// How long the transfer lane works, or waits for its peers, while the compute lane does not; on the rank with
    /// the most of it.
    pub exposed_transfer_ns: u64,
    /// From the first rank that is ready to rendezvous to the plan in every rank's hands.
    pub rendezvous_ns: u64,
    /// `[S]`
    pub stages: Vec<StageTimes>,
    /// `[R]`
    pub ranks: Vec<RankTimes>,
}

/// A stage on the rank that takes longest, work by work, as it went beside everything else.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StageTimes {
    /// Its rows travel, from the moment all ranks are there.
    pub dispatch_ns: u64,
    /// Expand, products, reduce.
    pub compute_ns: u64,
    /// Its sums travel.
    pub combine_ns: u64,
}

/// How one rank spends the layer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RankTimes {
    /// Compute lane at work.
    pub compute_ns: u64,
    /// Transfer lane at work, or waiting for its peers.
    pub transfer_ns: u64,
    /// Of which beside no computation.
    pub exposed_ns: u64,
    /// When it has its output.
    pub end_ns: u64,
}

/// Everything about a layer under a table, as every rank will live it.
pub fn simulate(table: &StageTable, share: usize, workload: &Workload<'_>, cost: &CostModel) -> Simulation {
    let program = Program::of(table, share, workload, cost);
    let times = run(&program, cost, &share_of(cost, share));
    report(&program, &times, table.stages())
}

/// Only how long it will take: [`Simulation::layer_ns`].
pub fn predict_ns(table: &StageTable, share: usize, workload: &Workload<'_>, cost: &CostModel) -> u64 {
    run(&Program::of(table, share, workload, cost), cost, &share_of(cost, share)).end()
}

/// A piece of a layer on one rank, before it is priced.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Planned {
    /// Who does it.
    pub rank: Rank,
    /// On which lane; the host if on none.
    pub lane: Option<Lane>,
    /// As its span is called.
    pub name: &'static str,
    /// The stage it belongs to, if any.
    pub stage: Option<Stage>,
    /// What it is: one operation after the other.
    pub work: Vec<Work>,
}

/// Everything that all ranks do in a layer under a table, rank by rank in the order in which the pipeline enqueues it:
/// what [`simulate`] prices. The spans of a run are these operations in the same order on every lane, so that a
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
        Planned { rank: Rank(at % ranks), lane, name: step.name, stage: step.stage, work }
    };
    program.described.into_iter().flatten().enumerate().map(of).collect()
}

/// A share by its number; beyond the last one, the undivided processor.
pub(crate) fn share_of(cost: &CostModel, share: usize) -> ShareCost {
    cost.shares.get(share).or(cost.shares.first()).copied().unwrap_or(ShareCost::FREE)
}

/// A queue of one rank.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Queue {
    Compute,
    Transfer,
    Host,
}

const QUEUES: usize = 3;

/// One piece of work, the same on every rank but for its size.
#[derive(Clone, Debug)]
struct Step {
    queue: Queue,
    name: &'static str,
    stage: Option<Stage>,
    /// Steps of other queues that come first.
    after: [Option<usize>; 2],
    /// It begins when all ranks are there.
    meets: bool,
}

/// What all ranks do, and for how long each.
struct Program {
    ranks: usize,
    steps: Vec<Step>,
    /// `[step · R + rank]` nanoseconds when nothing else runs; of an exchange on a shared processor, those on the
    /// links.
    work: Vec<u64>,
    /// Likewise, what an exchange takes of a shared processor.
    copies: Vec<u64>,
    /// Likewise, what it is, where somebody asks.
    described: Option<Vec<Vec<Work>>>,
}

impl Program {
    fn of(table: &StageTable, share: usize, workload: &Workload<'_>, cost: &CostModel) -> Self {
        Self::build(table, share, workload, cost, None)
    }

    fn described(table: &StageTable, workload: &Workload<'_>, cost: &CostModel) -> Self {
        Self::build(table, 0, workload, cost, Some(Vec::new()))
    }

    fn build(
        table: &StageTable,
        share: usize,
        workload: &Workload<'_>,
        cost: &CostModel,
        described: Option<Vec<Vec<Work>>>,
    ) -> Self {
        let ranks = workload.placement.ranks();
        let traffic = Traffic::of(workload.placement, workload.counts, table);
        let (steps, work, copies) = (Vec::new(), Vec::new(), Vec::new());
        let program = Program { ranks, steps, work, copies, described };
        let compute_permille = share_of(cost, share).compute;
        let mut builder = Builder { table, workload, cost, traffic, compute_permille, program };
        builder.layer();
        builder.program
    }
}

/// Writes the program of a layer, in the order in which the pipeline enqueues it.
struct Builder<'a> {
    table: &'a StageTable,
    workload: &'a Workload<'a>,
    cost: &'a CostModel,
    traffic: Traffic,
    compute_permille: u64,
    program: Program,
}

impl Builder<'_> {
    fn layer(&mut self) {
        let sizes = self.workload.shape.sizes;
        let (experts, ranks) = (self.workload.placement.experts() as u64, self.program.ranks as u64);
        let shared = self.table.shared;
        let routed = self.route();
        let packed = self.host("pack", false, [Some(routed), None], Work::Pack, |this, rank| {
            (this.traffic.tokens(rank) * sizes.top_k) as u64
        });
        let ready = self.pack(packed);
        self.shared_if(shared == SharedExpert::BesideRendezvous, None);
        let messages = ranks * (8 + 4 * (1 + 3 * experts));
        self.host("rendezvous", true, [None, None], Work::Rendezvous, |_, _| messages);
        let planned = self.host("plan", false, [None, None], Work::Plan, |_, _| experts * ranks);
        let (words, row_bytes) = (record_words(sizes.top_k) * 4, self.row_bytes());
        let metadata = self.exchange(
            "metadata",
            None,
            [Some(ready), Some(planned)],
            words,
            |traffic, rank, other| traffic.send_rows(rank, other).len(),
            |traffic, rank, other| traffic.record_rows(rank, other).len(),
        );
        let mut first = true;
        // [stage] its dispatch, and its reduction once it is enqueued.
        let mut dispatched: Vec<Option<usize>> = vec![None; self.table.stages()];
        let mut reduced: Vec<usize> = Vec::with_capacity(self.table.stages());
        let mut last_transfer = metadata;
        for &transfer in &self.table.order {
            match transfer {
                Transfer::Dispatch(stage) => {
                    let handed = if first { None } else { self.enqueue(Some(stage), |_, _| 1) };
                    last_transfer = self.exchange(
                        "dispatch",
                        Some(stage),
                        [handed, None],
                        row_bytes,
                        |traffic, rank, other| traffic.send_range(rank, other, stage).len(),
                        |traffic, rank, other| traffic.receive_range(rank, stage, other).len(),
                    );
                    dispatched[stage.0] = Some(last_transfer);
                    if first {
                        self.shared_if(shared == SharedExpert::BesideFirstDispatch, Some(planned));
                        self.receive_metadata(metadata);
                        first = false;
                    }
                    // A stage waits for all dispatches enqueued before it: the last one is enough.
                    while dispatched.get(reduced.len()).is_some_and(Option::is_some) {
                        reduced.push(self.stage(Stage(reduced.len()), last_transfer));
                    }
                }
                Transfer::Combine(stage) => {
                    let handed = self.enqueue(Some(stage), |_, _| 1);
                    last_transfer = self.exchange(
                        "combine",
                        Some(stage),
                        [Some(reduced[stage.0]), handed],
                        row_bytes,
                        |traffic, rank, other| traffic.combine_range(rank, stage, other).len(),
                        |traffic, rank, other| traffic.home_range(rank, other, stage).len(),
                    );
                }
            }
        }
        self.shared_if(shared == SharedExpert::BesideLastCombine, None);
        self.sum_at_home(last_transfer);
    }

    /// An operation on rows or index arrays, of so many bytes or logits.
    fn rows(
        &mut self,
        name: &'static str,
        stage: Option<Stage>,
        after: [Option<usize>; 2],
        work: fn(u64) -> Work,
        size: impl Fn(&Self, Rank) -> u64,
    ) -> usize {
        let step = Step { queue: Queue::Compute, name, stage, after, meets: false };
        let ns = |this: &Self, size| scale(this.cost.sized_ns(&work(size)), this.compute_permille);
        self.push(
            step,
            |this, rank| vec![work(size(this, rank))],
            |this, rank| (ns(this, size(this, rank)), 0),
        )
    }

    /// Index arrays on their way to the device: so many words.
    fn upload(&mut self, after: Option<usize>, words: impl Fn(&Self, Rank) -> usize) -> usize {
        self.rows("host_to_device", None, [after, None], Work::HostToDevice, |this, rank| {
            4 * words(this, rank) as u64
        })
    }

    fn host(
        &mut self,
        name: &'static str,
        meets: bool,
        after: [Option<usize>; 2],
        work: fn(u64) -> Work,
        size: impl Fn(&Self, Rank) -> u64,
    ) -> usize {
        let step = Step { queue: Queue::Host, name, stage: None, after, meets };
        let ns = |this: &Self, rank| this.cost.sized_ns(&work(size(this, rank)));
        self.push(step, |this, rank| vec![work(size(this, rank))], |this, rank| (ns(this, rank), 0))
    }

    /// The host hands operations, and products in them, to a lane; nothing where that is free.
    fn enqueue(&mut self, stage: Option<Stage>, size: impl Fn(&Self, Rank) -> u64) -> Option<usize> {
        let costs = self.cost.host.enqueue.extended(1 << 20) > 0 || self.program.described.is_some();
        let step = Step { queue: Queue::Host, name: "enqueue", stage, after: [None, None], meets: false };
        let ns = |this: &Self, rank| this.cost.sized_ns(&Work::Enqueue(size(this, rank)));
        costs.then(|| {
            self.push(
                step,
                |this, rank| vec![Work::Enqueue(size(this, rank))],
                |this, rank| (ns(this, rank), 0),
            )
        })
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
        name: &'static str,
        stage: Option<Stage>,
        after: [Option<usize>; 2],
        row_bytes: usize,
        out: impl Fn(&Traffic, Rank, Rank) -> usize,
        back: impl Fn(&Traffic, Rank, Rank) -> usize,
    ) -> usize {
        let step = Step { queue: Queue::Transfer, name, stage, after, meets: true };
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

    fn row_bytes(&self) -> usize {
        let LayerSizes { hidden, activation_bytes, .. } = self.workload.shape.sizes;
        hidden * activation_bytes
    }

    /// Router and choice of experts.
    fn route(&mut self) -> usize {
        let (hidden, experts) = (self.workload.shape.sizes.hidden, self.workload.placement.experts());
        self.linear(experts, hidden, None);
        let logits = |this: &Self, rank| (this.traffic.tokens(rank) * experts) as u64;
        self.rows("route", None, [None, None], Work::Route, logits)
    }

    /// One product of all of a rank's tokens with one matrix.
    fn linear(&mut self, columns: usize, depth: usize, after: Option<usize>) {
        let tokens = |this: &Self, rank| vec![this.traffic.tokens(rank) as u64];
        self.products(GemmKind::Dense, [columns, depth], None, after, tokens);
    }

    /// Products of `[columns, depth]` matrices with so many rows each.
    fn products(
        &mut self,
        kind: GemmKind,
        [columns, depth]: [usize; 2],
        stage: Option<Stage>,
        after: Option<usize>,
        rows: impl Fn(&Self, Rank) -> Vec<u64>,
    ) {
        let product =
            self.cost.gemm(kind).product(columns, depth, self.workload.shape.sizes.activation_bytes);
        let step = Step { queue: Queue::Compute, name: "gemm", stage, after: [after, None], meets: false };
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

    /// Rows and records in send order; the last step after which they may leave.
    fn pack(&mut self, packed: usize) -> usize {
        let (row_bytes, top_k) = (self.row_bytes(), self.workload.shape.sizes.top_k);
        self.upload(Some(packed), |this, rank| this.traffic.rows_sent(rank));
        self.rows("gather", None, [None, None], Work::Gather, |this, rank| {
            (this.traffic.rows_sent(rank) * row_bytes) as u64
        });
        self.upload(None, |this, rank| record_words(top_k) * this.traffic.rows_sent(rank))
    }

    fn shared_if(&mut self, now: bool, after: Option<usize>) {
        let (hidden, inner) = (self.workload.shape.sizes.hidden, self.workload.shape.shared_inner);
        if now && inner > 0 {
            self.linear(2 * inner, hidden, after);
            self.linear(hidden, inner, None);
        }
    }

    /// The host reads the records and uploads what it makes of them.
    fn receive_metadata(&mut self, metadata: usize) {
        let copies = |this: &Self, rank| this.traffic.copies(rank);
        let maps = self
            .host("maps", false, [Some(metadata), None], Work::Maps, |this, rank| copies(this, rank) as u64);
        self.upload(Some(maps), copies);
        self.upload(None, |this, rank| this.traffic.rows_received(rank) + 1);
        self.upload(None, copies);
        self.upload(None, copies);
    }

    /// Expand, two products and reduction of a stage; returns the last.
    fn stage(&mut self, stage: Stage, dispatched: usize) -> usize {
        let LayerSizes { hidden, inner, .. } = self.workload.shape.sizes;
        let (row_bytes, place, kind) = (self.row_bytes() as u64, Some(stage), self.table.gemm[stage.0]);
        let loaded = move |this: &Self, rank| -> Vec<u64> {
            let experts = this.table.experts_of(rank, stage);
            let copies = experts.map(|expert| this.traffic.expert_copies(rank, expert).len() as u64);
            copies.filter(|&copies| copies > 0).collect()
        };
        let handed = self.enqueue(place, |this, rank| {
            let products = 2 * loaded(this, rank).len() as u64;
            // Expand and reduce, and the products in two operations or in as many as there are.
            2 + products + if kind == GemmKind::Dense { products } else { 2 }
        });
        self.rows("gather", place, [Some(dispatched), handed], Work::Gather, |this, rank| {
            this.traffic.stage_copies(rank, stage).len() as u64 * row_bytes
        });
        for matrix in [[2 * inner, hidden], [hidden, inner]] {
            self.products(kind, matrix, place, None, loaded);
        }
        self.rows("reduce", place, [None, None], Work::Reduce, |this, rank| {
            // Which copies make which sum only the routing knows: every sum has its share of them.
            let (sums, all) =
                (this.traffic.combine_stage(rank, stage).len(), this.traffic.rows_received(rank));
            (this.traffic.copies(rank) * sums / all.max(1)) as u64 * row_bytes
        })
    }

    /// Sums that came home, added up, with the shared expert's output.
    fn sum_at_home(&mut self, last_transfer: usize) {
        let row_bytes = self.row_bytes() as u64;
        let alone = self.table.shared == SharedExpert::Alone && self.workload.shape.shared_inner > 0;
        self.shared_if(alone, Some(last_transfer));
        self.upload(Some(last_transfer), |this, rank| this.traffic.tokens(rank) + 1);
        self.upload(None, |this, rank| this.traffic.rows_sent(rank));
        let addends = u64::from(self.workload.shape.shared_inner > 0);
        self.rows("reduce", None, [None, None], Work::Reduce, |this, rank| {
            let summands = this.traffic.rows_sent(rank) as u64 + addends * this.traffic.tokens(rank) as u64;
            summands * row_bytes
        });
    }
}

/// When every step happened, `[rank · steps + step]`.
#[derive(Default)]
struct Times {
    /// Its lane came to it.
    start: Vec<u64>,
    /// Its work began: later than its start if other ranks were not there yet.
    begin: Vec<u64>,
    end: Vec<u64>,
}

impl Times {
    fn end(&self) -> u64 {
        self.end.iter().copied().max().unwrap_or(0)
    }
}

/// Full speed: millionths of a nanosecond of work done in a nanosecond.
const FULL: u64 = 1_000_000;

/// Runs the program. Ranks know each other's time only where they meet, so each runs by itself from one exchange to
/// the next; ranks that share a processor run together.
fn run(program: &Program, cost: &CostModel, share: &ShareCost) -> Times {
    let together = if cost.concurrent == 0 { 1 } else { program.ranks };
    let firsts = (0..program.ranks).step_by(together);
    let mut groups: Vec<Group<'_>> =
        firsts.map(|first| Group::new(program, first..first + together, cost, share)).collect();
    // The order in which ranks meet is the same for all: one queue of exchanges follows the other's rendezvous.
    for step in (0..program.steps.len()).filter(|&step| program.steps[step].meets) {
        let all_here = groups.iter_mut().map(|group| group.run_to(step)).max().unwrap_or(0);
        for group in &mut groups {
            group.release(step, all_here);
        }
    }
    let mut times = Times::default();
    for mut group in groups {
        while group.next_event(u64::MAX) {}
        times.start.append(&mut group.times.start);
        times.begin.append(&mut group.times.begin);
        times.end.append(&mut group.times.end);
    }
    times
}

/// One queue of one rank while the layer runs.
#[derive(Clone, Copy, Debug, Default)]
struct Head {
    /// Position in the queue.
    next: usize,
    /// The step there has been reached, and waits for its peers or works.
    reached: bool,
    /// It works, with so much to do in millionths of a nanosecond.
    working: bool,
    left: u64,
    /// Likewise, what an exchange has still to copy on a shared processor.
    copies: u64,
    /// Its turn on a crowded processor comes no later than this.
    turn: Option<u64>,
}

/// Ranks with one clock.
struct Group<'a> {
    program: &'a Program,
    ranks: Range<usize>,
    concurrent: u64,
    lane_threads: u64,
    wake_ns: u64,
    queue_ns: u64,
    /// Speed of computation beside a transfer, and of a transfer beside computation.
    beside: [u64; 2],
    /// `[queue]` the program's steps.
    queues: [Vec<usize>; QUEUES],
    /// `[rank][queue]`
    heads: Vec<[Head; QUEUES]>,
    /// `[step]` how many of the ranks have reached it, and whether all ranks of the world have.
    reached: Vec<usize>,
    released: Vec<bool>,
    /// `[step]` how many of the ranks have copied what they receive.
    copied: Vec<usize>,
    /// `[rank · steps + step]`
    done: Vec<bool>,
    times: Times,
    now: u64,
}

impl<'a> Group<'a> {
    fn new(program: &'a Program, ranks: Range<usize>, cost: &CostModel, share: &ShareCost) -> Self {
        let (steps, all) = (program.steps.len(), program.steps.len() * ranks.len());
        let queue = |queue: Queue| (0..steps).filter(|&step| program.steps[step].queue == queue).collect();
        Group {
            program,
            concurrent: u64::from(cost.concurrent),
            lane_threads: u64::from(cost.lane_threads),
            wake_ns: cost.host.wake_ns,
            queue_ns: cost.host.queue_ns,
            beside: [share.compute_beside, share.transfer_beside].map(|slower| FULL * 1000 / slower.max(1)),
            queues: [Queue::Compute, Queue::Transfer, Queue::Host].map(queue),
            heads: vec![[Head::default(); QUEUES]; ranks.len()],
            reached: vec![0; steps],
            released: vec![false; steps],
            copied: vec![0; steps],
            done: vec![false; all],
            times: Times { start: vec![0; all], begin: vec![0; all], end: vec![0; all] },
            now: 0,
            ranks,
        }
    }

    /// Runs until all ranks have reached a step; returns when.
    fn run_to(&mut self, step: usize) -> u64 {
        self.settle();
        while self.reached[step] < self.ranks.len() && self.next_event(u64::MAX) {}
        self.now
    }

    /// Runs until `time`, when a step may begin.
    fn release(&mut self, step: usize, time: u64) {
        while self.now < time {
            // Nothing left to do until then is no reason to stop the clock.
            if !self.next_event(time) {
                self.now = time;
            }
        }
        self.released[step] = true;
        self.settle();
    }

    /// Moves all queues as far as they go without time passing.
    fn settle(&mut self) {
        // A rank that has copied nothing may let others leave an exchange.
        while (0..self.ranks.len()).any(|rank| self.reach(rank)) {}
    }

    fn reach(&mut self, rank: usize) -> bool {
        let mut moved = false;
        // A compute lane goes from one step to the next before anybody else can take its place.
        while self.reach_next(rank, Queue::Compute) {
            moved = true;
        }
        moved |= self.reach_next(rank, Queue::Transfer);
        moved | self.reach_next(rank, Queue::Host)
    }

    fn reach_next(&mut self, rank: usize, queue: Queue) -> bool {
        let mut moved = false;
        let mut head = self.heads[rank][queue as usize];
        let Some(&step) = self.queues[queue as usize].get(head.next) else { return false };
        let at = rank * self.program.steps.len() + step;
        let ready = |this: &Self| this.ready_at(step, rank).is_some_and(|ready| ready <= this.now);
        if !head.reached && ready(self) && self.has_turn(&mut head, queue) {
            self.times.start[at] = self.now;
            self.reached[step] += 1;
            (head.reached, head.turn) = (true, None);
            moved = true;
        }
        if head.reached && !head.working && (self.released[step] || !self.program.steps[step].meets) {
            let number = step * self.program.ranks + self.ranks.start + rank;
            self.times.begin[at] = self.now;
            head.working = true;
            head.left = self.program.work[number] * FULL;
            head.copies = self.program.copies[number] * FULL;
            self.copied[step] += usize::from(head.copies == 0);
            moved = true;
        }
        let done = head.working && head.left == 0 && head.copies == 0 && self.may_leave(step);
        let leaves = done && (!self.slept(rank, step) || self.has_turn(&mut head, queue));
        self.heads[rank][queue as usize] = head;
        if leaves {
            self.finish(rank, queue as usize);
        }
        moved | leaves
    }

    /// Whether a lane slept through the exchange, until the link was done.
    fn slept(&self, rank: usize, step: usize) -> bool {
        let number = step * self.program.ranks + self.ranks.start + rank;
        self.program.steps[step].meets && self.program.work[number] > 0
    }

    /// Whether the processor has room for a queue that would go on, or it has waited for that long enough. A compute
    /// lane shares at once: it has much to do.
    fn has_turn(&self, head: &mut Head, queue: Queue) -> bool {
        if queue == Queue::Compute || self.queue_ns == 0 || !self.crowd().is_full() {
            return true;
        }
        *head.turn.get_or_insert(self.now + self.queue_ns) <= self.now
    }

    /// When a step that waits for nothing but its turn may start; nothing while it waits for other queues.
    fn ready_at(&self, step: usize, rank: usize) -> Option<u64> {
        let mut ready = 0;
        for &before in self.program.steps[step].after.iter().flatten() {
            let at = rank * self.program.steps.len() + before;
            if !self.done[at] {
                return None;
            }
            ready = ready.max(self.times.end[at] + self.wake_ns);
        }
        Some(ready)
    }

    /// Whether all ranks that share a processor have copied what an exchange brought them.
    fn may_leave(&self, step: usize) -> bool {
        !self.program.steps[step].meets || self.copied[step] == self.ranks.len()
    }

    fn finish(&mut self, rank: usize, queue: usize) {
        let next = self.heads[rank][queue].next;
        let at = rank * self.program.steps.len() + self.queues[queue][next];
        self.done[at] = true;
        self.times.end[at] = self.now;
        self.heads[rank][queue] = Head { next: next + 1, ..Head::default() };
    }

    /// Lets time pass until something is done or somebody wakes up, or until `limit`; false when nothing will.
    fn next_event(&mut self, limit: u64) -> bool {
        let crowd = self.crowd();
        let mut wait = u64::MAX;
        for (rank, heads) in self.heads.iter().enumerate() {
            let speeds = self.speeds(heads, &crowd);
            for (queue, head) in heads.iter().enumerate() {
                let turn = head.turn.filter(|&turn| turn > self.now);
                wait = wait.min(turn.map_or(u64::MAX, |turn| turn - self.now));
                if head.working {
                    for (left, speed) in [(head.left, speeds.of[queue]), (head.copies, speeds.copies)] {
                        wait = wait.min(if left > 0 { left.div_ceil(speed) } else { u64::MAX });
                    }
                } else if let Some(&step) = self.queues[queue].get(head.next).filter(|_| !head.reached) {
                    let ready = self.ready_at(step, rank).filter(|&ready| ready > self.now);
                    wait = wait.min(ready.map_or(u64::MAX, |ready| ready - self.now));
                }
            }
        }
        if wait == u64::MAX {
            return false;
        }
        let wait = wait.min(limit - self.now);
        self.now += wait;
        for rank in 0..self.ranks.len() {
            let speeds = self.speeds(&self.heads[rank], &crowd);
            for queue in 0..QUEUES {
                let head = &mut self.heads[rank][queue];
                if !head.working {
                    continue;
                }
                head.left = head.left.saturating_sub(speeds.of[queue].saturating_mul(wait));
                if head.copies > 0 {
                    head.copies = head.copies.saturating_sub(speeds.copies.saturating_mul(wait));
                    let copied = head.copies == 0;
                    self.copied[self.queues[queue][head.next]] += usize::from(copied);
                }
            }
        }
        self.settle();
        true
    }

    /// Who shares the processor.
    fn crowd(&self) -> CpuContention {
        let mut crowd = CpuContention { concurrent: self.concurrent, ..CpuContention::default() };
        for [compute, transfer, host] in &self.heads {
            crowd.lanes += if compute.working { self.lane_threads } else { 0 };
            crowd.bursts += u64::from(transfer.copies > 0) + u64::from(host.working);
        }
        crowd
    }

    /// How fast each queue of a rank works in such a crowd.
    fn speeds(&self, heads: &[Head; QUEUES], crowd: &CpuContention) -> Speeds {
        let both = heads[0].working && heads[1].working;
        let [compute, transfer] = if both { self.beside } else { [FULL; 2] };
        let slowed = |speed: u64, share: u64| (speed * share / FULL).max(1);
        let (lanes, bursts) = (crowd.lane_speed(), crowd.burst_speed());
        Speeds {
            of: [slowed(compute, lanes), transfer.max(1), slowed(FULL, bursts)],
            copies: slowed(transfer, bursts),
        }
    }
}

/// Threads at work on one processor.
///
/// Two ranks compute on two cores while one of them copies rows: the copy has a core, and both lanes share the other.
///
/// ```
/// # use epsmoe_plan::CpuContention;
/// let crowd = CpuContention { concurrent: 2, lanes: 2, bursts: 1 };
/// assert!(crowd.is_full());
/// assert_eq!((crowd.lane_speed(), crowd.burst_speed()), (CpuContention::FULL / 2, CpuContention::FULL));
/// // Ranks that have a processor each notice nothing.
/// let apart = CpuContention { concurrent: 0, ..crowd };
/// assert_eq!((apart.is_full(), apart.lane_speed()), (false, CpuContention::FULL));
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CpuContention {
    /// [`CostModel::concurrent`].
    pub concurrent: u64,
    /// Threads of compute lanes.
    pub lanes: u64,
    /// Hosts, and transfer lanes that copy.
    pub bursts: u64,
}

impl CpuContention {
    /// Full speed.
    pub const FULL: u64 = FULL;

    /// Whether nobody else can start at once.
    pub fn is_full(&self) -> bool {
        self.concurrent > 0 && self.lanes + self.bursts >= self.concurrent
    }

    /// How fast hosts and copies work, in millionths: at full speed, unless they alone are too many.
    pub fn burst_speed(&self) -> u64 {
        match self.concurrent {
            0 => FULL,
            concurrent => (FULL * concurrent / self.bursts.max(1)).min(FULL),
        }
    }

    /// How fast the threads of compute lanes work: they share what the others leave, a quarter at the least.
    pub fn lane_speed(&self) -> u64 {
        let left = (4 * self.concurrent).saturating_sub(4 * self.bursts).max(self.concurrent);
        match self.concurrent {
            0 => FULL,
            _ => (FULL * left / (4 * self.lanes.max(1))).min(FULL),
        }
    }
}

/// Millionths of a nanosecond of work done in a nanosecond.
struct Speeds {
    /// By each queue; by the transfer lane, on its links.
    of: [u64; QUEUES],
    /// By the transfer lane while it copies.
    copies: u64,
}

fn report(program: &Program, times: &Times, stages: usize) -> Simulation {
    let steps = program.steps.len();
    let of = |step: usize| (0..program.ranks).map(move |rank| rank * steps + step);
    let mut timeline = Timeline::default();
    let mut stage_times = vec![StageTimes::default(); stages];
    let mut rendezvous_ns = 0;
    for (number, step) in program.steps.iter().enumerate() {
        let lane = match step.queue {
            Queue::Compute => Lane::Compute,
            Queue::Transfer => Lane::Transfer,
            Queue::Host => continue,
        };
        timeline.spans.extend(of(number).enumerate().map(|(rank, at)| Span {
            rank: Rank(rank),
            layer: None,
            stage: step.stage,
            lane,
            phase: Phase::Other,
            name: step.name.into(),
            start_ns: times.start[at],
            end_ns: times.end[at],
        }));
    }
    for (stage, times_of) in stage_times.iter_mut().enumerate() {
        *times_of = stage_report(program, times, Stage(stage));
    }
    let host = |name| program.steps.iter().position(|step| step.name == name);
    if let (Some(met), Some(planned)) = (host("rendezvous"), host("plan")) {
        let first = of(met).map(|at| times.start[at]).min().unwrap_or(0);
        rendezvous_ns = of(planned).map(|at| times.end[at]).max().unwrap_or(0) - first;
    }
    let of_rank = |rank| RankTimes {
        compute_ns: timeline.busy(rank, Lane::Compute),
        transfer_ns: timeline.busy(rank, Lane::Transfer),
        exposed_ns: timeline.exposed_transfer(rank),
        end_ns: times.end[rank.0 * steps..(rank.0 + 1) * steps].iter().copied().max().unwrap_or(0),
    };
    let ranks: Vec<RankTimes> = (0..program.ranks).map(|rank| of_rank(Rank(rank))).collect();
    let exposed_transfer_ns = ranks.iter().map(|rank| rank.exposed_ns).max().unwrap_or(0);
    Simulation {
        layer_ns: times.end(),
        exposed_transfer_ns,
        rendezvous_ns,
        stages: stage_times,
        ranks,
        timeline,
    }
}

fn stage_report(program: &Program, times: &Times, stage: Stage) -> StageTimes {
    let worked = |at: usize| times.end[at] - times.begin[at];
    let slowest = |wanted: &dyn Fn(&Step) -> bool| {
        let steps = || (0..program.steps.len()).filter(|&step| wanted(&program.steps[step]));
        let of_rank = |rank| steps().map(|step| worked(rank * program.steps.len() + step)).sum();
        let ranks: Range<usize> = 0..program.ranks;
        ranks.map(of_rank).max().unwrap_or(0)
    };
    let here = |step: &Step| step.stage == Some(stage);
    StageTimes {
        dispatch_ns: slowest(&|step| here(step) && step.name == "dispatch"),
        compute_ns: slowest(&|step| here(step) && step.queue == Queue::Compute),
        combine_ns: slowest(&|step| here(step) && step.name == "combine"),
    }
}
