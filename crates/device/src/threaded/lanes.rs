//! Lanes as threads: each runs what it is given in order, waits for the other where an event says so, and
//! stops working once the world has failed.

use super::Memory;
use crate::Record;
use epsmoe_base::{Deadline, Fault, FaultCell, FaultKind, Lane, Mix, Place, Rank, panic_text};
use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Work for a lane. What it touches was checked when it was enqueued.
pub(super) type Work = Box<dyn FnOnce(&Memory) -> Result<(), Fault> + Send>;

enum Item {
    Run { place: Place, name: &'static str, work: Work },
    Wait { lane: Lane, until: u64 },
}

#[derive(Default)]
struct Queue {
    items: VecDeque<Item>,
    closed: bool,
}

struct Progress {
    completed: [u64; Lane::ALL.len()],
    /// How many pieces each lane must have completed before a sleeper has anything to see: waking one for each of
    /// the short operations on its way would cost more than they do.
    awaited: [u64; Lane::ALL.len()],
    running: [Option<(&'static str, Place)>; Lane::ALL.len()],
    /// The lane that each lane waits for.
    waits_for: [Option<Lane>; Lane::ALL.len()],
    records: Vec<Record>,
}

impl Default for Progress {
    fn default() -> Self {
        Progress {
            completed: [0; Lane::ALL.len()],
            awaited: [u64::MAX; Lane::ALL.len()],
            running: [None; Lane::ALL.len()],
            waits_for: [None; Lane::ALL.len()],
            records: Vec::new(),
        }
    }
}

impl Progress {
    /// What keeps a lane that is late, perhaps through another that it waits for.
    fn describe(&self, late: Lane, allowed: Duration) -> (Place, String) {
        let mut lane = late;
        for _ in Lane::ALL {
            lane = self.waits_for[lane.index()].unwrap_or(lane);
        }
        match self.running[lane.index()] {
            Some((name, place)) => (place, format!("{name} on the {lane} did not end within {allowed:?}")),
            None => (Place::default(), format!("the {lane} did not go on within {allowed:?}")),
        }
    }
}

/// What the lanes of a rank and the host share.
struct Shared {
    rank: Rank,
    memory: Memory,
    faults: FaultCell,
    epoch: Instant,
    recording: AtomicBool,
    queues: [(Mutex<Queue>, Condvar); Lane::ALL.len()],
    progress: Mutex<Progress>,
    moved: Condvar,
}

/// The lane threads of one rank; dropping them lets each finish what it was given.
pub(super) struct Lanes {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

impl Lanes {
    /// Starts the threads. With `jitter`, a lane sometimes pauses before a piece of work, so that tests meet
    /// many interleavings.
    pub(super) fn start(
        rank: Rank,
        memory: Memory,
        faults: FaultCell,
        epoch: Instant,
        jitter: Option<u64>,
    ) -> std::io::Result<Self> {
        let shared = Arc::new(Shared {
            rank,
            memory,
            faults,
            epoch,
            recording: AtomicBool::new(false),
            queues: Default::default(),
            progress: Mutex::default(),
            moved: Condvar::new(),
        });
        let mut lanes = Lanes { shared, threads: Vec::new() };
        for lane in Lane::ALL {
            let shared = Arc::clone(&lanes.shared);
            let jitter = jitter.map(|seed| Mix::keyed(seed, &[rank.0 as u64, lane.index() as u64]));
            let name = format!("rank{}-{lane:?}", rank.0).to_lowercase();
            lanes
                .threads
                .push(std::thread::Builder::new().name(name).spawn(move || shared.run(lane, jitter))?);
        }
        Ok(lanes)
    }

    pub(super) fn push(&self, lane: Lane, place: Place, name: &'static str, work: Work) {
        self.shared.push(lane, Item::Run { place, name, work });
    }

    /// Lets `lane` go on only when `other` has completed `until` pieces of work.
    pub(super) fn push_wait(&self, lane: Lane, other: Lane, until: u64) {
        self.shared.push(lane, Item::Wait { lane: other, until });
    }

    /// Blocks until each lane has completed that many pieces of work. The deadline is for each of them.
    pub(super) fn wait(&self, until: impl Fn(Lane) -> u64, mut deadline: Deadline) -> Result<(), Fault> {
        let mut progress = lock(&self.shared.progress);
        let mut completed = progress.completed;
        loop {
            self.shared.faults.check()?;
            let Some(late) =
                Lane::ALL.into_iter().find(|&lane| progress.completed[lane.index()] < until(lane))
            else {
                return Ok(());
            };
            if progress.completed != completed {
                completed = progress.completed;
                deadline.restart();
            }
            if deadline.passed() {
                let (place, message) = progress.describe(late, deadline.allowed());
                return Err(self.shared.raise(FaultKind::Deadline, place, message));
            }
            progress = self.shared.sleep(progress, late, until(late));
        }
    }

    pub(super) fn set_recording(&self, on: bool) {
        self.shared.recording.store(on, Ordering::Relaxed);
    }

    pub(super) fn take_records(&self) -> Vec<Record> {
        std::mem::take(&mut lock(&self.shared.progress).records)
    }
}

impl Drop for Lanes {
    fn drop(&mut self) {
        for (queue, filled) in &self.shared.queues {
            lock(queue).closed = true;
            filled.notify_one();
        }
        for thread in self.threads.drain(..) {
            // A lane that panicked outside its work has nothing left to say.
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn push(&self, lane: Lane, item: Item) {
        let (queue, filled) = &self.queues[lane.index()];
        lock(queue).items.push_back(item);
        filled.notify_one();
    }

    fn run(&self, lane: Lane, mut jitter: Option<Mix>) {
        while let Some(item) = self.next(lane) {
            match item {
                Item::Wait { lane: other, until } => self.await_lane(lane, other, until),
                Item::Run { place, name, work } => {
                    if let Some(mix) = &mut jitter {
                        pause(mix);
                    }
                    self.work(lane, place, name, work);
                }
            }
        }
    }

    fn next(&self, lane: Lane) -> Option<Item> {
        let (queue, filled) = &self.queues[lane.index()];
        let mut queue = lock(queue);
        loop {
            if let Some(item) = queue.items.pop_front() {
                return Some(item);
            }
            if queue.closed {
                return None;
            }
            queue = filled.wait(queue).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Ends when the other lane has come so far or the world has failed; the other lane's own waits have
    /// deadlines, so one of the two happens.
    fn await_lane(&self, lane: Lane, other: Lane, until: u64) {
        let mut progress = lock(&self.progress);
        while progress.completed[other.index()] < until && self.faults.get().is_none() {
            progress.waits_for[lane.index()] = Some(other);
            progress = self.sleep(progress, other, until);
        }
        progress.waits_for[lane.index()] = None;
    }

    fn work(&self, lane: Lane, place: Place, name: &'static str, work: Work) {
        lock(&self.progress).running[lane.index()] = Some((name, place));
        let start_ns = self.recording.load(Ordering::Relaxed).then(|| self.now());
        if self.faults.get().is_none() {
            match catch_unwind(AssertUnwindSafe(|| work(&self.memory))) {
                Ok(Ok(())) => {}
                Ok(Err(fault)) => {
                    self.faults.raise(fault);
                }
                Err(panic) => {
                    let message = format!("{name} panicked: {}", panic_text(panic.as_ref()));
                    self.raise(FaultKind::Panic, place, message);
                }
            }
        }
        let end_ns = start_ns.map(|_| self.now());
        let mut progress = lock(&self.progress);
        progress.completed[lane.index()] += 1;
        progress.running[lane.index()] = None;
        if let (Some(start_ns), Some(end_ns)) = (start_ns, end_ns) {
            progress.records.push(Record { lane, place, name, start_ns, end_ns });
        }
        let awaited = progress.completed[lane.index()] >= progress.awaited[lane.index()];
        if awaited {
            // All sleepers look again, and say anew what they wait for.
            progress.awaited = [u64::MAX; Lane::ALL.len()];
        }
        drop(progress);
        if awaited {
            self.moved.notify_all();
        }
    }

    fn raise(&self, kind: FaultKind, place: Place, message: String) -> Fault {
        self.faults.raise(Fault { kind, rank: self.rank, place, message })
    }

    /// Sleeps until `lane` may have completed `until` pieces of work; wakes now and then to look for faults.
    fn sleep<'a>(
        &self,
        mut progress: MutexGuard<'a, Progress>,
        lane: Lane,
        until: u64,
    ) -> MutexGuard<'a, Progress> {
        let awaited = &mut progress.awaited[lane.index()];
        *awaited = until.min(*awaited);
        self.moved.wait_timeout(progress, FaultCell::POLL).unwrap_or_else(PoisonError::into_inner).0
    }

    fn now(&self) -> u64 {
        self.epoch.elapsed().as_nanos() as u64
    }
}

fn pause(mix: &mut Mix) {
    match mix.below(8) {
        0 => std::thread::sleep(Duration::from_micros(mix.below(300) as u64)),
        1 | 2 => std::thread::yield_now(),
        _ => {}
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::super::Fill;
    use super::*;
    use epsmoe_base::{Layer, Stage};

    fn lanes(faults: &FaultCell) -> Lanes {
        Lanes::start(Rank(3), Memory::new(Fill::Zero), faults.clone(), Instant::now(), None).expect("threads")
    }

    /// Work that ends with the world.
    fn endless(faults: &FaultCell) -> Work {
        let faults = faults.clone();
        Box::new(move |_| {
            loop {
                faults.check()?;
                std::thread::sleep(FaultCell::POLL);
            }
        })
    }

    #[test]
    fn a_late_lane_is_reported_by_the_work_that_keeps_it() {
        let faults = FaultCell::default();
        let lanes = lanes(&faults);
        let place = Place::layer(Layer(5)).stage(Stage(2));
        lanes.push(Lane::Transfer, place, "dispatch", endless(&faults));
        lanes.push_wait(Lane::Compute, Lane::Transfer, 1);
        lanes.push(Lane::Compute, Place::default(), "gather", Box::new(|_| Ok(())));
        let waited =
            lanes.wait(|lane| u64::from(lane == Lane::Compute), Deadline::behind(Duration::from_millis(100)));
        assert_eq!(
            waited.unwrap_err().to_string(),
            "rank 3, layer 5, stage 2: dispatch on the transfer lane did not end within 100ms"
        );
    }

    #[test]
    fn a_deadline_is_for_each_piece_of_work() {
        let faults = FaultCell::default();
        let lanes = lanes(&faults);
        let slow = || -> Work {
            Box::new(|_| {
                std::thread::sleep(Duration::from_millis(100));
                Ok(())
            })
        };
        (0..5).for_each(|_| lanes.push(Lane::Compute, Place::default(), "gemm", slow()));
        let all = |lane| if lane == Lane::Compute { 5 } else { 0 };
        assert_eq!(lanes.wait(all, Deadline::after(Duration::from_millis(400))), Ok(()));
    }
}
