//! Streams that stand still until set times: a thread of the host watches how far they are, and releases them.
//!
//! A stream says where it is by writing numbers to host memory, and waits for one that the thread writes: front-end
//! work, which needs no multiprocessor and no call of the driver while it goes on. So an emulated link costs what
//! computes beside it nothing.

use super::driver::{Context, CudaError, PinnedMemory, Stream};
use crate::Pace;
use std::collections::VecDeque;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Instant;

/// Numbers stand on cache lines of their own.
const LINE: usize = 64;

/// What a stream and the thread tell each other, each the number of a hold.
#[derive(Clone, Copy)]
enum Word {
    /// The stream came to where the hold counts from …
    Begun,
    /// … and to the hold itself.
    Arrived,
    /// The thread lets it go on.
    Released,
    /// It did.
    Passed,
}

const WORDS: usize = 4;

/// What one stream and the thread share.
pub(super) struct Gate {
    words: PinnedMemory,
    on_device: u64,
    /// Holds so far.
    count: AtomicU32,
}

impl Gate {
    pub(super) fn new(context: &Arc<Context>) -> Result<Arc<Self>, CudaError> {
        let words = PinnedMemory::new(context, WORDS * LINE)?;
        let on_device = words.device_address()?;
        Ok(Arc::new(Gate { words, on_device, count: AtomicU32::new(0) }))
    }

    fn word(&self, word: Word) -> &AtomicU32 {
        // SAFETY: inside the allocation, aligned, zero at first, and only ever used as this atomic.
        unsafe { &*self.words.start.add(word as usize * LINE).cast::<AtomicU32>() }
    }

    fn address(&self, word: Word) -> u64 {
        self.on_device + (word as usize * LINE) as u64
    }

    /// Whether a word has come to a number; numbers start again behind the last one.
    fn is_at(&self, word: Word, number: u32) -> bool {
        self.word(word).load(Ordering::Acquire).wrapping_sub(number) as i32 >= 0
    }

    /// Marks the point from which the next hold counts.
    pub(super) fn begin(&self, stream: &Stream) -> Result<(), CudaError> {
        let number = self.count.load(Ordering::Relaxed).wrapping_add(1);
        // SAFETY: the words live as long as the gate, which outlives its stream's work; the thread only reads this one.
        unsafe { stream.write_value(self.address(Word::Begun), number) }
    }

    /// Lets the stream stand still until `pace` says so. The lane's owner holds the lock on enqueueing.
    pub(super) fn hold(
        self: &Arc<Self>,
        stream: &Stream,
        pacer: &Pacer,
        pace: Box<dyn Pace>,
    ) -> Result<(), CudaError> {
        let number = self.count.load(Ordering::Relaxed).wrapping_add(1);
        self.count.store(number, Ordering::Relaxed);
        // SAFETY: as in `begin`; the word that is waited for is written by the thread alone, which has the hold from
        // now on and releases it whatever happens.
        unsafe {
            stream.write_value(self.address(Word::Arrived), number)?;
            pacer.add(self, Hold { number, pace, state: State::Ahead });
            stream.wait_value(self.address(Word::Released), number)?;
            stream.write_value(self.address(Word::Passed), number)
        }
    }
}

struct Hold {
    number: u32,
    pace: Box<dyn Pace>,
    state: State,
}

/// How far a stream is with a hold.
enum State {
    Ahead,
    Counting { due: Instant, arrived: Option<Instant> },
    Released { arrived: Option<Instant> },
}

impl Hold {
    /// Looks how far the stream is; whether it is past this hold.
    fn advance(&mut self, gate: &Gate) -> bool {
        if self.pace.is_over() {
            gate.word(Word::Released).store(self.number, Ordering::Release);
            return true;
        }
        let at = |word| gate.is_at(word, self.number).then(Instant::now);
        match &mut self.state {
            State::Ahead => {
                if let Some(now) = at(Word::Begun) {
                    self.state = State::Counting { due: self.pace.due(now), arrived: None };
                }
            }
            State::Counting { due, arrived } => {
                *arrived = arrived.or_else(|| at(Word::Arrived));
                if Instant::now() >= *due {
                    gate.word(Word::Released).store(self.number, Ordering::Release);
                    self.state = State::Released { arrived: *arrived };
                }
            }
            State::Released { arrived } => {
                *arrived = arrived.or_else(|| at(Word::Arrived));
                if let Some((now, arrived)) = at(Word::Passed).zip(*arrived) {
                    self.pace.passed(arrived, now);
                    return true;
                }
            }
        }
        false
    }
}

/// The holds of each stream, in its order.
type Queues = Vec<(Arc<Gate>, VecDeque<Hold>)>;

#[derive(Default)]
struct Inbox {
    holds: Vec<(Arc<Gate>, Hold)>,
    closed: bool,
}

#[derive(Default)]
struct Shared {
    inbox: Mutex<Inbox>,
    /// How many holds were ever added: tells the thread that it has something to fetch.
    added: AtomicU32,
    woken: Condvar,
}

impl Shared {
    fn inbox(&self) -> MutexGuard<'_, Inbox> {
        self.inbox.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The thread that releases the streams of one GPU. It starts with the first hold, looks without a pause while there
/// are any, and sleeps otherwise.
#[derive(Default)]
pub(super) struct Pacer {
    shared: Arc<Shared>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl Pacer {
    fn add(&self, gate: &Arc<Gate>, hold: Hold) {
        self.shared.inbox().holds.push((Arc::clone(gate), hold));
        self.shared.added.fetch_add(1, Ordering::Release);
        self.shared.woken.notify_one();
        let mut thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner);
        if thread.is_none() {
            let shared = Arc::clone(&self.shared);
            let run = move || watch(&shared);
            match std::thread::Builder::new().name("link".into()).spawn(run) {
                Ok(started) => *thread = Some(started),
                // Without a thread nothing may be held.
                Err(_) => {
                    for (gate, hold) in self.shared.inbox().holds.drain(..) {
                        gate.word(Word::Released).store(hold.number, Ordering::Release);
                    }
                }
            }
        }
    }
}

impl Drop for Pacer {
    /// Streams keep their GPU, so by now there are none that could be held.
    fn drop(&mut self) {
        self.shared.inbox().closed = true;
        self.shared.woken.notify_one();
        if let Some(thread) = self.thread.get_mut().unwrap_or_else(PoisonError::into_inner).take() {
            // It has nothing to say.
            let _ = thread.join();
        }
    }
}

fn watch(shared: &Shared) {
    let (mut queues, mut fetched) = (Queues::new(), 0);
    loop {
        if queues.is_empty() || shared.added.load(Ordering::Acquire) != fetched {
            let mut inbox = shared.inbox();
            while queues.is_empty() && inbox.holds.is_empty() {
                if inbox.closed {
                    return;
                }
                inbox = shared.woken.wait(inbox).unwrap_or_else(PoisonError::into_inner);
            }
            fetched = shared.added.load(Ordering::Acquire);
            for (gate, hold) in inbox.holds.drain(..) {
                match queues.iter_mut().find(|(other, _)| Arc::ptr_eq(other, &gate)) {
                    Some((_, holds)) => holds.push_back(hold),
                    None => queues.push((gate, [hold].into())),
                }
            }
        }
        queues.retain_mut(|(gate, holds)| {
            while holds.front_mut().is_some_and(|hold| hold.advance(gate)) {
                holds.pop_front();
            }
            !holds.is_empty()
        });
        std::hint::spin_loop();
    }
}
