//! Ranks as threads of one process. Rows are copied once, from the sender's memory to the receiver's, by the
//! receiver.

use crate::link::PacedLink;
use crate::{Exchange, Fabric, Link, Pacing};
use epsmoe_base::{Deadline, Fault, FaultCell, FaultKind, Lane, Mix, Place, Rank, count};
use epsmoe_device::op::Accesses;
use epsmoe_device::threaded::{Kernels, Memory, ThreadedBackend};
use epsmoe_device::{Buffer, DeviceError};
use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// How a world of threads behaves.
#[derive(Clone, Debug)]
pub struct ThreadsOptions {
    /// How long a rank waits for another.
    pub timeout: Duration,
    /// The world's fault cell.
    pub faults: FaultCell,
    /// How fast rows travel; as fast as memory when absent.
    pub link: Option<Link>,
    /// Seed of random delays before each exchange, for tests.
    pub delay: Option<u64>,
    /// One thing that goes wrong, for tests.
    pub injection: Option<FaultInjection>,
}

impl ThreadsOptions {
    /// A world at memory speed in which nothing goes wrong on purpose.
    pub fn new(timeout: Duration, faults: FaultCell) -> Self {
        ThreadsOptions { timeout, faults, link: None, delay: None, injection: None }
    }
}

/// A rank that misbehaves at one of its exchanges, counted from zero.
#[derive(Clone, Copy, Debug)]
pub struct FaultInjection {
    /// Who.
    pub rank: Rank,
    /// At which exchange.
    pub exchange: u64,
    /// What it does.
    pub act: InjectedFault,
}

/// What a misbehaving rank does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InjectedFault {
    /// Never gets to the exchange.
    Stall,
    /// Panics.
    Panic,
    /// Sends one row less than announced to the first rank that it owes one.
    SendOneRowLess,
}

/// Rows on their way: the receiver copies them from where they lie.
struct Parcel {
    /// Which exchange of its sender: two lanes may have exchanges on their way at once.
    number: u64,
    name: &'static str,
    place: Place,
    memory: Memory,
    rows: Buffer,
    posted: Instant,
    taken: Arc<AtomicUsize>,
}

#[derive(Default)]
struct Letters {
    /// By round: what each rank has said so far.
    rounds: HashMap<u64, Round>,
}

#[derive(Clone)]
struct Letter {
    name: &'static str,
    place: Place,
    message: Vec<u8>,
}

#[derive(Default)]
struct Round {
    letters: Vec<Option<Letter>>,
    readers: usize,
}

struct World {
    size: usize,
    options: ThreadsOptions,
    /// Parcels from each source to each destination, `[source · R + destination]`.
    parcels: Mutex<Vec<VecDeque<Parcel>>>,
    letters: Mutex<Letters>,
    moved: Condvar,
    written: Condvar,
}

/// One rank's end.
pub struct Threads {
    rank: Rank,
    world: Arc<World>,
    link: Option<Arc<Mutex<PacedLink>>>,
    exchanges: AtomicU64,
    rounds: AtomicU64,
}

impl Threads {
    /// The ends of a world of `size` ranks, in rank order.
    pub fn world(size: usize, options: ThreadsOptions) -> Vec<Threads> {
        let world = Arc::new(World {
            size,
            options,
            parcels: Mutex::new((0..size * size).map(|_| VecDeque::new()).collect()),
            letters: Mutex::default(),
            moved: Condvar::new(),
            written: Condvar::new(),
        });
        let end = |rank| Threads {
            rank: Rank(rank),
            world: Arc::clone(&world),
            link: world.options.link.map(|link| Arc::new(Mutex::new(PacedLink::new(link)))),
            exchanges: AtomicU64::new(0),
            rounds: AtomicU64::new(0),
        };
        (0..size).map(end).collect()
    }

    /// How well this rank kept to its link's times since this was last asked; nothing at memory speed.
    pub fn take_pacing(&self) -> Option<Pacing> {
        self.link.as_ref().map(|link| lock(link).take_pacing())
    }
}

impl<K: Kernels> Fabric<ThreadedBackend<K>> for Threads {
    fn rank(&self) -> Rank {
        self.rank
    }

    fn size(&self) -> usize {
        self.world.size
    }

    fn all_to_all_v(
        &self,
        device: &ThreadedBackend<K>,
        lane: Lane,
        place: Place,
        mut exchange: Exchange,
    ) -> Result<(), DeviceError> {
        check(&exchange, self.world.size)?;
        let number = self.exchanges.fetch_add(1, Ordering::Relaxed);
        let options = &self.world.options;
        let injection =
            options.injection.filter(|injection| (injection.rank, injection.exchange) == (self.rank, number));
        if injection.is_some_and(|injection| injection.act == InjectedFault::SendOneRowLess) {
            shorten(&mut exchange.send)?;
        }
        let trip = Trip {
            rank: self.rank,
            world: Arc::clone(&self.world),
            number,
            place,
            link: self.link.clone(),
            delay: options.delay.map(|seed| Mix::keyed(seed, &[self.rank.0 as u64, number])),
            act: injection.map(|injection| injection.act),
        };
        let reads = exchange.send.iter().fold(Accesses::new(), Accesses::read);
        let accesses = exchange.receive.iter().fold(reads, Accesses::write);
        device.enqueue_work(lane, place, exchange.name, &accesses, move |memory| trip.run(memory, &exchange));
        Ok(())
    }

    fn all_gather(&self, name: &'static str, place: Place, message: Vec<u8>) -> Result<Vec<Vec<u8>>, Fault> {
        let world = &*self.world;
        let round = self.rounds.fetch_add(1, Ordering::Relaxed);
        let deadline = Deadline::after(world.options.timeout);
        let mut letters = lock(&world.letters);
        letters.round(round, world.size).letters[self.rank.0] = Some(Letter { name, place, message });
        world.written.notify_all();
        loop {
            world.options.faults.check()?;
            let entry = letters.round(round, world.size);
            let Some(silent) = entry.letters.iter().position(Option::is_none) else {
                let all: Vec<Letter> = entry.letters.iter().flatten().cloned().collect();
                entry.readers += 1;
                if entry.readers == world.size {
                    letters.rounds.remove(&round);
                }
                let due = |letter: &Letter| (letter.name, letter.place) == (name, place);
                if let Some(rank) = all.iter().position(|letter| !due(letter)) {
                    let Letter { name: other, place: there, .. } = &all[rank];
                    let message = format!("{} came to {other} ({there}) where {name} was due", Rank(rank));
                    return Err(world.raise(FaultKind::Mismatch, self.rank, place, message));
                }
                return Ok(all.into_iter().map(|letter| letter.message).collect());
            };
            if deadline.passed() {
                let message =
                    format!("{} did not come to {name} within {:?}", Rank(silent), deadline.allowed());
                return Err(world.raise(FaultKind::Deadline, self.rank, place, message));
            }
            letters = sleep(&world.written, letters);
        }
    }
}

impl Letters {
    fn round(&mut self, round: u64, size: usize) -> &mut Round {
        self.rounds.entry(round).or_insert_with(|| Round { letters: vec![None; size], readers: 0 })
    }
}

impl World {
    fn raise(&self, kind: FaultKind, rank: Rank, place: Place, message: String) -> Fault {
        self.options.faults.raise(Fault { kind, rank, place, message })
    }
}

/// One exchange as it runs on a lane.
struct Trip {
    rank: Rank,
    world: Arc<World>,
    number: u64,
    place: Place,
    link: Option<Arc<Mutex<PacedLink>>>,
    delay: Option<Mix>,
    act: Option<InjectedFault>,
}

impl Trip {
    fn run(mut self, memory: &Memory, exchange: &Exchange) -> Result<(), Fault> {
        if let Some(delay) = &mut self.delay {
            std::thread::sleep(Duration::from_micros(delay.below(1000) as u64));
        }
        match self.act {
            Some(InjectedFault::Stall) => return self.stall(),
            Some(InjectedFault::Panic) => panic!("{} panics on purpose at {}", self.rank, exchange.name),
            Some(InjectedFault::SendOneRowLess) | None => {}
        }
        let deadline = Deadline::after(self.world.options.timeout);
        let now = Instant::now();
        let mut ready = self.link.as_ref().map_or(now, |link| lock(link).begin(now));
        let taken = self.send(memory, exchange, ready);
        for source in 0..self.world.size {
            ready = ready.max(self.receive(memory, exchange, source, deadline)?);
        }
        self.await_taken(exchange, &taken, deadline)?;
        self.pace(exchange, ready);
        Ok(())
    }

    /// Sleeps until the link would have carried the exchange that could start at `ready`.
    fn pace(&self, exchange: &Exchange, ready: Instant) {
        let Some(link) = &self.link else { return };
        let others = |parts: &[Buffer]| -> u64 {
            let others = parts.iter().enumerate().filter(|(rank, _)| *rank != self.rank.0);
            others.map(|(_, part)| (part.rows * part.width * part.dtype.bytes()) as u64).sum()
        };
        let bytes = others(&exchange.send).max(others(&exchange.receive));
        if bytes == 0 {
            return;
        }
        let (due, copied) = (lock(link).book(ready, bytes), Instant::now());
        std::thread::sleep(due.saturating_duration_since(copied));
        lock(link).note(due, copied, Instant::now());
    }

    /// Does nothing until the others notice.
    fn stall(&self) -> Result<(), Fault> {
        loop {
            self.world.options.faults.check()?;
            std::thread::sleep(FaultCell::POLL);
        }
    }

    fn send(&self, memory: &Memory, exchange: &Exchange, posted: Instant) -> Vec<Arc<AtomicUsize>> {
        let mut parcels = lock(&self.world.parcels);
        let taken = exchange.send.iter().enumerate().map(|(destination, rows)| {
            let taken = Arc::new(AtomicUsize::new(0));
            parcels[self.rank.0 * self.world.size + destination].push_back(Parcel {
                number: self.number,
                name: exchange.name,
                place: self.place,
                memory: memory.clone(),
                rows: rows.clone(),
                posted,
                taken: Arc::clone(&taken),
            });
            taken
        });
        let taken = taken.collect();
        self.world.moved.notify_all();
        taken
    }

    /// Copies what `source` sent; returns when it was sent.
    fn receive(
        &self,
        memory: &Memory,
        exchange: &Exchange,
        source: usize,
        deadline: Deadline,
    ) -> Result<Instant, Fault> {
        let lane = source * self.world.size + self.rank.0;
        let parcel = self.until(
            deadline,
            |parcels| {
                let at = parcels[lane].iter().position(|parcel| parcel.number == self.number)?;
                parcels[lane].remove(at)
            },
            || format!("{} did not send {} within {:?}", Rank(source), exchange.name, deadline.allowed()),
        )?;
        let room = &exchange.receive[source];
        if (parcel.name, parcel.place) != (exchange.name, self.place) {
            let message = format!(
                "{} sent {} ({}) where {} was due",
                Rank(source),
                parcel.name,
                parcel.place,
                exchange.name
            );
            return Err(self.world.raise(FaultKind::Mismatch, self.rank, self.place, message));
        }
        let rows = &parcel.rows;
        if (rows.rows, rows.width, rows.dtype) != (room.rows, room.width, room.dtype) {
            let message = format!(
                "{} sent {} of {} ({} wide, {}) where {} ({} wide, {}) were announced",
                Rank(source),
                count(rows.rows, "row"),
                exchange.name,
                rows.width,
                rows.dtype,
                count(room.rows, "row"),
                room.width,
                room.dtype
            );
            return Err(self.world.raise(FaultKind::Mismatch, self.rank, self.place, message));
        }
        // SAFETY: the room is a declared write of this exchange. The rows are a declared read of the sender's,
        // which is not complete before `taken` says so, below.
        unsafe { memory.copy_from(room, &parcel.memory, rows) };
        parcel.taken.store(1, Ordering::Release);
        // Taking the lock orders the notice after a sender's look at the flag.
        drop(lock(&self.world.parcels));
        self.world.moved.notify_all();
        Ok(parcel.posted)
    }

    /// What was sent may be overwritten once everybody has taken it.
    fn await_taken(
        &self,
        exchange: &Exchange,
        taken: &[Arc<AtomicUsize>],
        deadline: Deadline,
    ) -> Result<(), Fault> {
        for (destination, taken) in taken.iter().enumerate() {
            let done = || (taken.load(Ordering::Acquire) == 1).then_some(());
            self.until(
                deadline,
                |_| done(),
                || {
                    format!(
                        "{} did not take {} within {:?}",
                        Rank(destination),
                        exchange.name,
                        deadline.allowed()
                    )
                },
            )?;
        }
        Ok(())
    }

    /// Waits until `ready` gives something, the world has failed, or the deadline has passed.
    fn until<T>(
        &self,
        deadline: Deadline,
        mut ready: impl FnMut(&mut Vec<VecDeque<Parcel>>) -> Option<T>,
        late: impl Fn() -> String,
    ) -> Result<T, Fault> {
        let mut parcels = lock(&self.world.parcels);
        loop {
            if let Some(value) = ready(&mut parcels) {
                return Ok(value);
            }
            self.world.options.faults.check()?;
            if deadline.passed() {
                return Err(self.world.raise(FaultKind::Deadline, self.rank, self.place, late()));
            }
            parcels = sleep(&self.world.moved, parcels);
        }
    }
}

fn check(exchange: &Exchange, size: usize) -> Result<(), DeviceError> {
    if exchange.send.len() == size && exchange.receive.len() == size {
        return Ok(());
    }
    Err(DeviceError::Shape(format!(
        "{}: {} parts sent and {} received in a world of {size} ranks",
        exchange.name,
        exchange.send.len(),
        exchange.receive.len()
    )))
}

fn shorten(send: &mut [Buffer]) -> Result<(), DeviceError> {
    if let Some(part) = send.iter_mut().find(|part| part.rows > 0) {
        *part = part.rows(0..part.rows - 1)?;
    }
    Ok(())
}

fn sleep<'a, T>(signal: &Condvar, guard: MutexGuard<'a, T>) -> MutexGuard<'a, T> {
    signal.wait_timeout(guard, FaultCell::POLL).unwrap_or_else(PoisonError::into_inner).0
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
