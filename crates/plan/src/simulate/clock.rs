//! Runs the program of a layer: queues that wait for each other, ranks that meet, threads that share a processor.

use super::program::{Program, QUEUES, Queue};
use crate::{CostModel, MOST_NS, ShareCost};
use std::ops::Range;

/// When every step happened, `[rank · steps + step]`.
#[derive(Default)]
pub(super) struct Times {
    /// Its lane came to it.
    pub(super) start: Vec<u64>,
    /// Its work began: later than its start if other ranks were not there yet.
    pub(super) begin: Vec<u64>,
    pub(super) end: Vec<u64>,
}

impl Times {
    pub(super) fn end(&self) -> u64 {
        self.end.iter().copied().max().unwrap_or(0)
    }
}

/// Full speed: millionths of a nanosecond of work done in a nanosecond.
const FULL: u64 = 1_000_000;

/// Runs the program. Ranks know each other's time only where they meet, so each runs by itself from one exchange to
/// the next; ranks that share a processor run together.
pub(super) fn run(program: &Program, cost: &CostModel, share: &ShareCost) -> Times {
    let together = if cost.concurrent == 0 { 1 } else { program.ranks };
    let firsts = (0..program.ranks).step_by(together);
    let mut groups: Vec<Group<'_>> =
        firsts.map(|first| Group::new(program, first..first + together, cost, share)).collect();
    // The order in which ranks meet is the same for all: the transfer lanes' exchanges follow the hosts' count exchange.
    for step in (0..program.steps.len()).filter(|&step| program.steps[step].meets) {
        let all_here = groups.iter_mut().map(|group| group.run_to(step)).max().unwrap_or(0);
        for group in &mut groups {
            group.release(step, all_here);
        }
    }
    let mut times = Times::default();
    for mut group in groups {
        // Where nobody meets anybody nothing has begun yet.
        group.settle();
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
    /// Its turn on a full processor comes no later than this.
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
            // A longer time would not fit into its millionths.
            head.left = self.program.work[number].min(MOST_NS) * FULL;
            head.copies = self.program.copies[number].min(MOST_NS) * FULL;
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
        if queue == Queue::Compute || self.queue_ns == 0 || !self.contention().is_full() {
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
        let contention = self.contention();
        let mut wait = u64::MAX;
        for (rank, heads) in self.heads.iter().enumerate() {
            let speeds = self.speeds(heads, &contention);
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
            let speeds = self.speeds(&self.heads[rank], &contention);
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
    fn contention(&self) -> CpuContention {
        let mut contention = CpuContention { concurrent: self.concurrent, ..CpuContention::default() };
        for [compute, transfer, host] in &self.heads {
            contention.lanes += if compute.working { self.lane_threads } else { 0 };
            contention.bursts += u64::from(transfer.copies > 0) + u64::from(host.working);
        }
        contention
    }

    /// How fast each queue of a rank works then.
    fn speeds(&self, heads: &[Head; QUEUES], contention: &CpuContention) -> Speeds {
        let both = heads[0].working && heads[1].working;
        let [compute, transfer] = if both { self.beside } else { [FULL; 2] };
        let slowed = |speed: u64, share: u64| (speed * share / FULL).max(1);
        let (lanes, bursts) = (contention.lane_speed(), contention.burst_speed());
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
/// let contention = CpuContention { concurrent: 2, lanes: 2, bursts: 1 };
/// assert!(contention.is_full());
/// assert_eq!((contention.lane_speed(), contention.burst_speed()), (CpuContention::FULL / 2, CpuContention::FULL));
/// // Ranks that have a processor each notice nothing.
/// let apart = CpuContention { concurrent: 0, ..contention };
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
