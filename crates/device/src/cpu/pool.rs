//! A fork-join pool owned by one rank's compute lane.
//!
//! A pool of `t` threads is the caller's own thread plus `t − 1` workers. A job's task numbers lie in *lots*:
//! [`ComputePool::run`] has one, from which all threads take in order, [`ComputePool::run_claims`] one for each
//! thread, so that a thread works on neighbours; who has finished his own takes the last of the fullest. The
//! caller never waits for a worker that has not started: it *closes* the job, after which nobody can enter.
//!
//! A step that decodes one token is a chain of a hundred operations of a few microseconds each, and
//! waking a parked thread takes longer than most of them. So an idle worker spins over the short
//! operations between two that it has a part in, and parks when none comes. Where the pools of a process
//! have more threads than there are cores (ranks that share a machine), it parks nearly at once: a
//! thread that spins would take the core of one that works.
//!
//! Everything the threads agree on is in one atomic word, the *gate*:
//!
//! ```text
//! bits 63..32  epoch: number of jobs ever opened
//! bit  31      STOP: the pool is being dropped
//! bit  30      OPEN: workers may enter the job of this epoch
//! bits 29..0   number of workers inside the job
//! ```

use epsmoe_base::cores;
use std::any::Any;
use std::hint::spin_loop;
use std::io;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::ptr;
use std::sync::atomic::{AtomicPtr, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, LazyLock, Mutex, PoisonError};
use std::thread::{self, JoinHandle, Thread};
use std::time::{Duration, Instant};

const EPOCH_ONE: u64 = 1 << 32;
const STOP: u64 = 1 << 31;
const OPEN: u64 = 1 << 30;
const INSIDE: u64 = OPEN - 1;

/// Pauses between two looks at the clock: about a microsecond on current cores.
const PAUSES: usize = 32;

/// How long a waiting thread spins before it parks, where each thread has a core and where not.
const SPIN_ALONE: Duration = Duration::from_micros(200);
const SPIN_CROWDED: Duration = Duration::from_micros(4);

/// Threads of all pools of the process.
static THREADS: AtomicUsize = AtomicUsize::new(0);

/// Fixed worker threads that split numbered tasks with the thread that calls [`ComputePool::run`].
pub struct ComputePool {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
}

struct Shared {
    gate: AtomicU64,
    /// The job of the current epoch; valid for a worker that is counted inside the gate.
    job: AtomicPtr<Job<'static>>,
}

struct Job<'a> {
    body: &'a (dyn Fn(Claims<'_>) + Sync),
    lots: &'a [Lot],
    threads: usize,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
    caller: Thread,
}

/// Task numbers nobody has claimed yet, `first` in the high half and `end` in the low half of one word; on a
/// cache line of its own, since each thread writes its own lot all the time.
#[repr(align(128))]
struct Lot(AtomicU64);

impl Lot {
    fn new(tasks: Range<usize>) -> Self {
        Lot(AtomicU64::new((tasks.start as u64) << 32 | tasks.end as u64))
    }

    fn tasks(word: u64) -> Range<u64> {
        word >> 32..word & u64::from(u32::MAX)
    }

    fn len(&self) -> usize {
        let tasks = Self::tasks(self.0.load(Ordering::Relaxed));
        tasks.end.saturating_sub(tasks.start) as usize
    }

    /// Claims the first task, or for another thread than the lot's own the last.
    fn claim(&self, own: bool) -> Option<usize> {
        let mut claimed = 0;
        let rest = |word| {
            let tasks = Self::tasks(word);
            claimed = if own { tasks.start } else { tasks.end.wrapping_sub(1) };
            (tasks.start < tasks.end).then(|| if own { word + (1 << 32) } else { word - 1 })
        };
        self.0.fetch_update(Ordering::Relaxed, Ordering::Relaxed, rest).ok().map(|_| claimed as usize)
    }

    fn empty(&self) {
        self.0.store(0, Ordering::Relaxed);
    }
}

/// The tasks one thread of a job gets: an iterator that claims the next unclaimed task number.
pub struct Claims<'a> {
    lots: &'a [Lot],
    own: usize,
    threads: usize,
    ahead: Option<usize>,
}

impl Claims<'_> {
    fn claim(&self) -> Option<usize> {
        self.lots[self.own].claim(true).or_else(|| {
            // A lot may be emptied between the look and the claim, so look until all are empty.
            while let Some(fullest) = self.lots.iter().filter(|lot| lot.len() > 0).max_by_key(|lot| lot.len())
            {
                if let Some(task) = fullest.claim(false) {
                    return Some(task);
                }
            }
            None
        })
    }

    /// The task that the next call of `next` will return, claimed ahead so that its data can be
    /// prefetched. Near the end it returns `None` instead: a task held back there would leave another
    /// thread idle.
    pub fn look_ahead(&mut self) -> Option<usize> {
        let unclaimed: usize = self.lots.iter().map(Lot::len).sum();
        if self.ahead.is_none() && unclaimed > self.threads {
            self.ahead = self.claim();
        }
        self.ahead
    }
}

impl Iterator for Claims<'_> {
    type Item = usize;

    fn next(&mut self) -> Option<usize> {
        self.ahead.take().or_else(|| self.claim())
    }
}

impl ComputePool {
    /// A pool of `threads` threads (at least one), the caller's included.
    ///
    /// # Errors
    /// If the system cannot start a thread.
    pub fn new(threads: usize) -> io::Result<Self> {
        let shared = Arc::new(Shared { gate: AtomicU64::new(0), job: AtomicPtr::new(ptr::null_mut()) });
        THREADS.fetch_add(1, Ordering::Relaxed);
        // Where one thread cannot be started, dropping the pool ends the others.
        let mut pool = Self { shared, workers: Vec::new() };
        for index in 1..threads {
            let shared = Arc::clone(&pool.shared);
            let worker = thread::Builder::new().name(format!("compute-{index}"));
            pool.workers.push(worker.spawn(move || shared.work(index))?);
            THREADS.fetch_add(1, Ordering::Relaxed);
        }
        Ok(pool)
    }

    /// Number of threads that share the tasks, the caller's included.
    pub fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Calls `body(task)` once for each task in `0..tasks`, begun in that order, and returns when all are done.
    ///
    /// # Panics
    /// With the payload of the first task that panicked; tasks not yet claimed are then skipped. If there are
    /// 2³² tasks or more.
    pub fn run(&mut self, tasks: usize, body: impl Fn(usize) + Sync) {
        self.run_lots(&[Lot::new(0..tasks)], tasks, &|claims| claims.for_each(&body));
    }

    /// Calls `body` at most once a thread, with an iterator over the tasks that the thread claims, so that a
    /// thread can keep state from one task to the next. Each begins with its own part of `0..tasks`.
    ///
    /// # Panics
    /// Like [`Self::run`].
    pub fn run_claims(&mut self, tasks: usize, body: impl Fn(Claims<'_>) + Sync) {
        let threads = self.threads();
        let cut = |thread| tasks * thread / threads;
        let lots: Vec<Lot> = (0..threads).map(|thread| Lot::new(cut(thread)..cut(thread + 1))).collect();
        self.run_lots(&lots, tasks, &body);
    }

    fn run_lots(&mut self, lots: &[Lot], tasks: usize, body: &(dyn Fn(Claims<'_>) + Sync)) {
        assert!(u32::try_from(tasks).is_ok(), "{tasks} tasks are too many for one job");
        let threads = self.threads();
        let job = Job { body, lots, threads, panic: Mutex::new(None), caller: thread::current() };
        let helpers = &self.workers[..(threads - 1).min(tasks.saturating_sub(1))];
        if !helpers.is_empty() {
            self.shared.open(&job);
            helpers.iter().for_each(|worker| worker.thread().unpark());
        }
        job.take_part(0);
        if !helpers.is_empty() {
            self.shared.close();
        }
        let panic = job.panic.into_inner().unwrap_or_else(PoisonError::into_inner);
        if let Some(payload) = panic {
            resume_unwind(payload);
        }
    }
}

impl Drop for ComputePool {
    fn drop(&mut self) {
        THREADS.fetch_sub(self.threads(), Ordering::Relaxed);
        self.shared.gate.fetch_or(STOP, Ordering::Release);
        for worker in self.workers.drain(..) {
            worker.thread().unpark();
            // Tasks' panics are caught where they run, so a worker ends normally.
            let _ = worker.join();
        }
    }
}

impl Job<'_> {
    /// Runs the body on thread number `thread`; keeps the first panic for the caller and stops further claims.
    fn take_part(&self, thread: usize) {
        let own = thread % self.lots.len();
        let claims = Claims { lots: self.lots, own, threads: self.threads, ahead: None };
        if let Err(payload) = catch_unwind(AssertUnwindSafe(|| (self.body)(claims))) {
            self.lots.iter().for_each(Lot::empty);
            self.panic.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(payload);
        }
    }
}

impl Shared {
    /// Publishes `job` to the workers. [`Self::close`] must follow before `job` goes away.
    fn open(&self, job: &Job<'_>) {
        self.job.store(ptr::from_ref(job).cast_mut().cast(), Ordering::Relaxed);
        let closed = self.gate.load(Ordering::Relaxed);
        self.gate.store(closed + EPOCH_ONE + OPEN, Ordering::Release);
    }

    /// Lets no more workers in and waits for those inside.
    fn close(&self) {
        self.gate.fetch_and(!OPEN, Ordering::Relaxed);
        wait_until(|| (self.gate.load(Ordering::Acquire) & INSIDE == 0).then_some(()));
    }

    /// The life of worker `index`: enter each job that is still open, until the pool stops.
    fn work(&self, index: usize) {
        let mut last_epoch = 0;
        loop {
            let gate = wait_until(|| {
                let gate = self.gate.load(Ordering::Acquire);
                let open = gate & OPEN != 0 && gate / EPOCH_ONE != last_epoch;
                (open || gate & STOP != 0).then_some(gate)
            });
            if gate & STOP != 0 {
                return;
            }
            let entered = self.gate.compare_exchange(gate, gate + 1, Ordering::Acquire, Ordering::Relaxed);
            if entered.is_ok() {
                last_epoch = gate / EPOCH_ONE;
                self.help(index);
            }
        }
    }

    /// Takes part in the current job and leaves it. The worker is counted inside the gate.
    fn help(&self, index: usize) {
        // SAFETY: this worker entered an open gate, so the pointer is the job of this epoch, and
        // `run_claims` keeps the job alive until `close` has seen this worker leave.
        let job = unsafe { &*self.job.load(Ordering::Relaxed) };
        let caller = job.caller.clone();
        job.take_part(index);
        if self.gate.fetch_sub(1, Ordering::Release) & (OPEN | INSIDE) == 1 {
            caller.unpark();
        }
    }
}

/// Polls `ready` for a while, then parks between polls; whoever makes it ready unparks.
fn wait_until<T>(ready: impl Fn() -> Option<T>) -> T {
    static CORES: LazyLock<usize> = LazyLock::new(cores);
    let begin = Instant::now();
    let limit = if THREADS.load(Ordering::Relaxed) > *CORES { SPIN_CROWDED } else { SPIN_ALONE };
    while begin.elapsed() < limit {
        for _ in 0..PAUSES {
            if let Some(value) = ready() {
                return value;
            }
            spin_loop();
        }
        // The thread that brings the next job may be waiting for this very core.
        thread::yield_now();
    }
    loop {
        if let Some(value) = ready() {
            return value;
        }
        thread::park();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicBool;
    use std::time::Duration;

    #[test]
    fn every_task_runs_once() {
        for threads in 1..=5 {
            let mut pool = ComputePool::new(threads).expect("threads");
            for tasks in [0, 1, 2, 3, 7, 100] {
                let counts: Vec<AtomicUsize> = (0..tasks).map(|_| AtomicUsize::new(0)).collect();
                pool.run(tasks, |task| {
                    counts[task].fetch_add(1, Ordering::Relaxed);
                });
                assert!(counts.iter().all(|count| count.load(Ordering::Relaxed) == 1));
            }
        }
    }

    #[test]
    fn a_thread_works_on_neighbours_and_helps_from_the_far_end() {
        let lots = [Lot::new(0..2), Lot::new(2..7), Lot::new(7..9)];
        let claims = Claims { lots: &lots, own: 0, threads: 3, ahead: None };
        assert_eq!(claims.collect::<Vec<_>>(), [0, 1, 6, 5, 4, 8, 3, 7, 2]);
        let claims = Claims { lots: &[Lot::new(3..3)], own: 0, threads: 3, ahead: None };
        assert_eq!(claims.count(), 0);
    }

    #[test]
    fn look_ahead_loses_no_task() {
        let mut pool = ComputePool::new(3).expect("threads");
        for tasks in 0..40 {
            let sum = AtomicUsize::new(0);
            pool.run_claims(tasks, |mut claims| {
                while let Some(task) = claims.next() {
                    let ahead = claims.look_ahead();
                    assert_ne!(ahead, Some(task));
                    sum.fetch_add(task + 1, Ordering::Relaxed);
                }
            });
            assert_eq!(sum.into_inner(), tasks * (tasks + 1) / 2);
        }
    }

    #[test]
    fn many_short_jobs_back_to_back() {
        let mut pool = ComputePool::new(4).expect("threads");
        let sum = AtomicUsize::new(0);
        for round in 0..20_000 {
            pool.run(4, |_| {
                sum.fetch_add(1, Ordering::Relaxed);
            });
            assert_eq!(sum.load(Ordering::Relaxed), 4 * (round + 1));
        }
    }

    #[test]
    fn a_panic_on_any_thread_reaches_the_caller_and_the_pool_lives_on() {
        let mut pool = ComputePool::new(3).expect("threads");
        for bad in 0..6 {
            let result = catch_unwind(AssertUnwindSafe(|| {
                pool.run(6, |task| {
                    thread::sleep(Duration::from_micros(200));
                    assert!(task != bad, "task {task} fails");
                });
            }));
            let payload = result.expect_err("the panic must reach the caller");
            let message = payload.downcast_ref::<String>().expect("a formatted message");
            assert!(message.contains(&format!("task {bad} fails")), "{message}");
        }
        let done = AtomicBool::new(false);
        pool.run(1, |_| done.store(true, Ordering::Relaxed));
        assert!(done.into_inner());
    }
}
