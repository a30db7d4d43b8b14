//! Messages between threads of one process.

use super::{Control, Message, agreed};
use crate::ThreadsOptions;
use crate::signal::{Signal, lock};
use epsmoe_base::{Deadline, Fault, FaultCell, FaultKind, Place, Rank};
use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// One exchange while it is under way.
struct Round {
    /// What each rank has said so far …
    messages: Vec<Option<Message>>,
    /// … and all of it once everybody has: whoever reads it copies it without the lock.
    all: Option<Arc<[Message]>>,
    /// Ranks that have read all messages.
    readers: usize,
}

struct Shared {
    size: usize,
    timeout: Duration,
    faults: FaultCell,
    /// By their number.
    rounds: Mutex<HashMap<u64, Round>>,
    /// A round is complete.
    complete: Signal,
}

/// One rank's end.
pub(crate) struct ThreadControl {
    rank: Rank,
    shared: Arc<Shared>,
    round: AtomicU64,
}

impl ThreadControl {
    /// The ends of all ranks, in rank order.
    pub(crate) fn world(size: usize, options: &ThreadsOptions) -> Vec<Self> {
        let shared = Arc::new(Shared {
            size,
            timeout: options.timeout,
            faults: options.faults.clone(),
            rounds: Mutex::default(),
            complete: Signal::new(options.spin),
        });
        let end =
            |rank| ThreadControl { rank: Rank(rank), shared: Arc::clone(&shared), round: AtomicU64::new(0) };
        (0..size).map(end).collect()
    }
}

impl Control for ThreadControl {
    fn rank(&self) -> Rank {
        self.rank
    }

    fn size(&self) -> usize {
        self.shared.size
    }

    fn exchange(&self, what: &'static str, place: Place, message: Vec<u8>) -> Result<Vec<Vec<u8>>, Fault> {
        let shared = &*self.shared;
        let number = self.round.fetch_add(1, Ordering::Relaxed);
        let raise = |kind, message| Err(shared.faults.raise(Fault { kind, rank: self.rank, place, message }));
        let mut deadline = Deadline::after(shared.timeout);
        let mut rounds = lock(&shared.rounds);
        let round = || Round { messages: vec![None; shared.size], all: None, readers: 0 };
        let said = rounds.entry(number).or_insert_with(round);
        said.messages[self.rank.0] = Some(Message { what: what.into(), place, bytes: message });
        if said.messages.iter().all(Option::is_some) {
            said.all = Some(said.messages.drain(..).flatten().collect());
            shared.complete.notify();
        }
        loop {
            shared.faults.check()?;
            let round = rounds.entry(number).or_insert_with(round);
            if let Some(all) = round.all.clone() {
                round.readers += 1;
                if round.readers == shared.size {
                    rounds.remove(&number);
                }
                drop(rounds);
                if let Err(message) = agreed(&all, what, place) {
                    return raise(FaultKind::Mismatch, message);
                }
                return Ok(all.iter().map(|message| message.bytes.clone()).collect());
            }
            if deadline.passed() {
                let silent = round.messages.iter().position(Option::is_none).unwrap_or(self.rank.0);
                let message =
                    format!("{} did not come to {what} within {:?}", Rank(silent), deadline.allowed());
                return raise(FaultKind::Deadline, message);
            }
            rounds = shared.complete.wait(&shared.rounds, rounds);
        }
    }

    fn faults(&self) -> &FaultCell {
        &self.shared.faults
    }
}
