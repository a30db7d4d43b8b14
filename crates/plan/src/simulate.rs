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
//!   last sum for the last transfer, the index arrays for the metadata.
//! - An exchange is two-sided: nothing moves before all ranks are there; then each rank is done after its own
//!   [`LinkCost::exchange_ns`](crate::LinkCost::exchange_ns).
//! - While a rank computes and transfers at once, both go slower, by the [`ShareCost`]. Ranks that share a
//!   processor ([`CostModel::concurrent`]) divide it equally.
//!
//! Time runs in whole nanoseconds and progress in whole millionths of one, so every rank finds the same times.

use crate::curve::scale;
use crate::{
    CostModel, GemmKind, LayerCounts, LayerSizes, Payload, Placement, ShareCost, SharedExpert, Span,
    StageTable, Timeline, Traffic, Transfer, record_words,
};
use epsmoe_base::{Lane, Rank, Stage};
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
    pub counts: &'a LayerCounts,
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
    let times = run(&program, cost.concurrent, &share_of(cost, share));
    report(&program, &times, table.stages())
}

/// Only how long it will take: [`Simulation::layer_ns`].
pub fn predict_ns(table: &StageTable, share: usize, workload: &Workload<'_>, cost: &CostModel) -> u64 {
    run(&Program::of(table, share, workload, cost), cost.concurrent, &share_of(cost, share)).end()
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
    /// `[step · R + rank]` nanoseconds when nothing else runs.
    work: Vec<u64>,
}

impl Program {
    fn of(table: &StageTable, share: usize, workload: &Workload<'_>, cost: &CostModel) -> Self {
        let ranks = workload.placement.ranks();
        let traffic = Traffic::of(workload.placement, workload.counts, table);
        let program = Program { ranks, steps: Vec::new(), work: Vec::new() };
        let compute_permille = share_of(cost, share).compute;
        let mut builder = Builder { table, workload, cost, traffic, compute_permille, program };
        builder.layer();
        builder.program
    }

    fn push(&mut self, step: Step, work: impl Fn(Rank) -> u64) -> usize {
        self.work.extend((0..self.ranks).map(Rank).map(work));
        self.steps.push(step);
        self.steps.len() - 1
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
        let (sizes, host) = (self.workload.shape.sizes, &self.cost.host);
        let (experts, ranks) = (self.workload.placement.experts() as u64, self.program.ranks as u64);
        let shared = self.table.shared;
        let routed = self.route();
        let packed = self.host("pack", false, [Some(routed), None], |this, rank| {
            host.pack.extended((this.traffic.tokens(rank) * sizes.top_k) as u64)
        });
        let ready = self.pack(packed);
        self.shared_if(shared == SharedExpert::BesideRendezvous, None);
        let messages = ranks * (8 + 4 * (1 + 3 * experts));
        self.host("rendezvous", true, [None, None], |_, _| host.rendezvous.extended(messages));
        let planned = self.host("plan", false, [None, None], |_, _| host.plan.extended(experts * ranks));
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
                    last_transfer = self.exchange(
                        "dispatch",
                        Some(stage),
                        [None, None],
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
                    last_transfer = self.exchange(
                        "combine",
                        Some(stage),
                        [Some(reduced[stage.0]), None],
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

    fn compute(
        &mut self,
        name: &'static str,
        stage: Option<Stage>,
        after: Option<usize>,
        work: impl Fn(&Self, Rank) -> u64,
    ) -> usize {
        let step = Step { queue: Queue::Compute, name, stage, after: [after, None], meets: false };
        self.push(step, |this, rank| scale(work(this, rank), this.compute_permille))
    }

    fn host(
        &mut self,
        name: &'static str,
        meets: bool,
        after: [Option<usize>; 2],
        work: impl Fn(&Self, Rank) -> u64,
    ) -> usize {
        self.push(Step { queue: Queue::Host, name, stage: None, after, meets }, work)
    }

    fn push(&mut self, step: Step, work: impl Fn(&Self, Rank) -> u64) -> usize {
        let work: Vec<u64> = (0..self.program.ranks).map(|rank| work(self, Rank(rank))).collect();
        self.program.push(step, |rank| work[rank.0])
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
        self.push(step, |this, rank| {
            let out = this.sides(rank, |other| out(&this.traffic, rank, other));
            let back = this.sides(rank, |other| back(&this.traffic, rank, other));
            let larger = |side: usize| (out[side].max(back[side]) * row_bytes) as u64;
            let received = (back.iter().sum::<usize>() * row_bytes) as u64;
            this.cost.link.exchange_ns(Payload { near: larger(1), far: larger(2), received })
        })
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
        self.compute("route", None, None, |this, rank| {
            this.cost.rows.route.extended((this.traffic.tokens(rank) * experts) as u64)
        })
    }

    /// One product of all of a rank's tokens with one matrix.
    fn linear(&mut self, columns: usize, depth: usize, after: Option<usize>) {
        let element_bytes = self.workload.shape.sizes.activation_bytes;
        let product = self.cost.dense.product(columns, depth, element_bytes);
        self.compute("gemm", None, after, |this, rank| product.op_ns([this.traffic.tokens(rank) as u64]));
    }

    /// Rows and records in send order; the last step after which they may leave.
    fn pack(&mut self, packed: usize) -> usize {
        let (row_bytes, top_k) = (self.row_bytes(), self.workload.shape.sizes.top_k);
        let rows = &self.cost.rows;
        let sent = |this: &Self, rank| this.traffic.rows_sent(rank) as u64;
        self.compute("upload", None, Some(packed), |this, rank| rows.upload.extended(4 * sent(this, rank)));
        self.compute("gather", None, None, |this, rank| {
            rows.gather.extended(sent(this, rank) * row_bytes as u64)
        });
        let words = 4 * record_words(top_k) as u64;
        self.compute("upload", None, None, |this, rank| rows.upload.extended(words * sent(this, rank)))
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
        let host = &self.cost.host;
        let maps = self.host("maps", false, [Some(metadata), None], |this, rank| {
            host.maps.extended(this.traffic.copies(rank) as u64)
        });
        self.compute("upload", None, Some(maps), |this, rank| {
            let (copies, rows) = (this.traffic.copies(rank), this.traffic.rows_received(rank));
            let upload = |words: usize| this.cost.rows.upload.extended(4 * words as u64);
            3 * upload(copies) + upload(rows + 1)
        });
    }

    /// Expand, two products and reduction of a stage; returns the last.
    fn stage(&mut self, stage: Stage, dispatched: usize) -> usize {
        let LayerSizes { hidden, inner, activation_bytes, .. } = self.workload.shape.sizes;
        let (row_bytes, rows, place) = (self.row_bytes() as u64, &self.cost.rows, Some(stage));
        let stage_copies = move |this: &Self, rank| this.traffic.stage_copies(rank, stage).len() as u64;
        self.compute("gather", place, Some(dispatched), |this, rank| {
            rows.gather.extended(stage_copies(this, rank) * row_bytes)
        });
        let kind = self.table.gemm[stage.0];
        for (columns, depth) in [(2 * inner, hidden), (hidden, inner)] {
            let product = self.cost.gemm(kind).product(columns, depth, activation_bytes);
            self.compute("gemm", place, None, |this, rank| {
                let experts = this.table.experts_of(rank, stage);
                let copies = experts.map(|expert| this.traffic.expert_copies(rank, expert).len() as u64);
                match kind {
                    GemmKind::Grouped => product.op_ns(copies),
                    GemmKind::Dense => {
                        copies.filter(|&copies| copies > 0).map(|copies| product.op_ns([copies])).sum()
                    }
                }
            });
        }
        self.compute("reduce", place, None, |this, rank| {
            // Which copies make which sum only the routing knows: every sum has its share of them.
            let (sums, all) =
                (this.traffic.combine_stage(rank, stage).len(), this.traffic.rows_received(rank));
            let copies = this.traffic.copies(rank) * sums / all.max(1);
            rows.reduce.extended(copies as u64 * row_bytes)
        })
    }

    /// Sums that came home, added up, with the shared expert's output.
    fn sum_at_home(&mut self, last_transfer: usize) {
        let (row_bytes, rows) = (self.row_bytes() as u64, &self.cost.rows);
        let alone = self.table.shared == SharedExpert::Alone && self.workload.shape.shared_inner > 0;
        self.shared_if(alone, Some(last_transfer));
        self.compute("upload", None, Some(last_transfer), |this, rank| {
            let upload = |words: usize| rows.upload.extended(4 * words as u64);
            upload(this.traffic.tokens(rank) + 1) + upload(this.traffic.rows_sent(rank))
        });
        let addends = u64::from(self.workload.shape.shared_inner > 0);
        self.compute("reduce", None, None, |this, rank| {
            let summands = this.traffic.rows_sent(rank) as u64 + addends * this.traffic.tokens(rank) as u64;
            rows.reduce.extended(summands * row_bytes)
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
fn run(program: &Program, concurrent: u32, share: &ShareCost) -> Times {
    let together = if concurrent == 0 { 1 } else { program.ranks };
    let firsts = (0..program.ranks).step_by(together);
    let mut groups: Vec<Group<'_>> =
        firsts.map(|first| Group::new(program, first..first + together, concurrent, share)).collect();
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
}

/// Ranks with one clock.
struct Group<'a> {
    program: &'a Program,
    ranks: Range<usize>,
    concurrent: u64,
    /// Speed of computation beside a transfer, and of a transfer beside computation.
    beside: [u64; 2],
    /// `[queue]` the program's steps.
    queues: [Vec<usize>; QUEUES],
    /// `[rank][queue]`
    heads: Vec<[Head; QUEUES]>,
    /// `[step]` how many of the ranks have reached it, and whether all ranks of the world have.
    reached: Vec<usize>,
    released: Vec<bool>,
    /// `[rank · steps + step]`
    done: Vec<bool>,
    times: Times,
    now: u64,
}

impl<'a> Group<'a> {
    fn new(program: &'a Program, ranks: Range<usize>, concurrent: u32, share: &ShareCost) -> Self {
        let (steps, all) = (program.steps.len(), program.steps.len() * ranks.len());
        let queue = |queue: Queue| (0..steps).filter(|&step| program.steps[step].queue == queue).collect();
        Group {
            program,
            concurrent: u64::from(concurrent),
            beside: [share.compute_beside, share.transfer_beside].map(|slower| FULL * 1000 / slower.max(1)),
            queues: [Queue::Compute, Queue::Transfer, Queue::Host].map(queue),
            heads: vec![[Head::default(); QUEUES]; ranks.len()],
            reached: vec![0; steps],
            released: vec![false; steps],
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
        for rank in 0..self.ranks.len() {
            while self.reach(rank) {}
        }
    }

    fn reach(&mut self, rank: usize) -> bool {
        let mut moved = false;
        for queue in 0..QUEUES {
            let mut head = self.heads[rank][queue];
            let Some(&step) = self.queues[queue].get(head.next) else { continue };
            let at = rank * self.program.steps.len() + step;
            if !head.reached && self.may_start(step, rank) {
                self.times.start[at] = self.now;
                self.reached[step] += 1;
                head.reached = true;
                moved = true;
            }
            if head.reached && !head.working && (self.released[step] || !self.program.steps[step].meets) {
                self.times.begin[at] = self.now;
                head.working = true;
                head.left = self.program.work[step * self.program.ranks + self.ranks.start + rank] * FULL;
                moved = true;
            }
            self.heads[rank][queue] = head;
            if head.working && head.left == 0 {
                self.finish(rank, queue);
            }
        }
        moved
    }

    fn may_start(&self, step: usize, rank: usize) -> bool {
        let after = &self.program.steps[step].after;
        after.iter().flatten().all(|&before| self.done[rank * self.program.steps.len() + before])
    }

    fn finish(&mut self, rank: usize, queue: usize) {
        let next = self.heads[rank][queue].next;
        let at = rank * self.program.steps.len() + self.queues[queue][next];
        self.done[at] = true;
        self.times.end[at] = self.now;
        self.heads[rank][queue] = Head { next: next + 1, ..Head::default() };
    }

    /// Lets time pass until something is done, or until `limit`; false when nothing works.
    fn next_event(&mut self, limit: u64) -> bool {
        let computing = self.heads.iter().filter(|heads| heads[0].working).count() as u64;
        let of_rank = |heads: &[Head; QUEUES]| {
            let pairs = heads.iter().zip(self.speeds(heads, computing));
            pairs.filter(|(head, _)| head.working).map(|(head, speed)| head.left.div_ceil(speed)).min()
        };
        let Some(wait) = self.heads.iter().filter_map(of_rank).min() else { return false };
        let wait = wait.min(limit - self.now);
        self.now += wait;
        for rank in 0..self.ranks.len() {
            let speeds = self.speeds(&self.heads[rank], computing);
            for (queue, speed) in speeds.into_iter().enumerate() {
                let head = &mut self.heads[rank][queue];
                if !head.working {
                    continue;
                }
                head.left = head.left.saturating_sub(speed * wait);
                if head.left == 0 {
                    self.finish(rank, queue);
                }
            }
        }
        self.settle();
        true
    }

    /// How fast each queue of a rank works.
    fn speeds(&self, heads: &[Head; QUEUES], computing: u64) -> [u64; QUEUES] {
        let both = heads[0].working && heads[1].working;
        let [compute, transfer] = if both { self.beside } else { [FULL; 2] };
        let crowded = self.concurrent > 0 && computing > self.concurrent;
        let compute = if crowded { compute * self.concurrent / computing } else { compute };
        [compute.max(1), transfer.max(1), FULL]
    }
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
