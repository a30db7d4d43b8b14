//! Ranks as threads of one process. Rows are copied once, from the sender's memory to the receiver's, by the
//! receiver's lane.
//!
//! An exchange as it runs on a host's lane: every part to send is posted under the number of the exchange; then, for each
//! source in rank order, the posted part is awaited and copied; then the exchange waits until every receiver has taken
//! what was posted, and until the link would have carried it.
//!
//! A queue that runs apart from its host, such as a GPU's stream, is only filled, by the rank's own thread, which goes on
//! as soon as the others have filled theirs as far. The marks that travel with parts say from when on the queue may read
//! them, and from when on they may be overwritten; and where the link is emulated, it is the queue that stands still.

use super::{check_part, check_parts, check_subgroup, position};
use crate::signal::{Signal, lock};
use crate::{Exchange, Link, PacedLink, Transport};
use epsmoe_base::{Deadline, Fault, FaultCell, FaultKind, Lane, Mix, Place, Rank};
use epsmoe_device::{Backend, Buffer, DeviceError, Holds, Pace, PeerQueue};
use std::collections::HashMap;
use std::marker::PhantomData;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
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
    /// How long a rank looks again and again for another before it sleeps: worth it where the threads that wait have cores
    /// of their own, as those of ranks on GPUs do.
    pub spin: Duration,
}

impl ThreadsOptions {
    /// A world at memory speed in which nothing goes wrong on purpose.
    pub fn new(timeout: Duration, faults: FaultCell) -> Self {
        let spin = Duration::ZERO;
        ThreadsOptions { timeout, faults, link: None, delay: None, injection: None, spin }
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

/// A part on its way: which exchange, from which position of the group to which.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
struct Route {
    exchange: u64,
    source: usize,
    destination: usize,
}

/// A posted part: the receiver copies it from where it lies.
struct PostedSend<Q: PeerQueue> {
    name: &'static str,
    place: Place,
    rows: Buffer,
    peer_rows: Q::PeerRows,
    /// Everything that the rows depend on.
    ready: Q::Mark,
    posted: Instant,
    /// Set once the receiver's copy is enqueued: the end of the copy.
    taken: Arc<OnceLock<Q::Mark>>,
}

/// By their ranks, and how many groups of the same ranks came before.
type Subgroups<Q> = HashMap<(Vec<Rank>, usize), Arc<Group<Q>>>;

/// What the ranks of one transport share.
struct Group<Q: PeerQueue> {
    ranks: Vec<Rank>,
    options: Arc<ThreadsOptions>,
    posted: Mutex<HashMap<Route, PostedSend<Q>>>,
    /// Something was posted or taken.
    changed: Signal,
    subgroups: Mutex<Subgroups<Q>>,
}

impl<Q: PeerQueue> Group<Q> {
    fn new(ranks: Vec<Rank>, options: Arc<ThreadsOptions>) -> Arc<Self> {
        let (posted, subgroups) = (Mutex::default(), Mutex::default());
        let changed = Signal::new(options.spin);
        Arc::new(Group { ranks, options, posted, changed, subgroups })
    }
}

/// What all transports of one rank share.
struct End {
    rank: Rank,
    link: Option<Arc<PacedLink>>,
    /// Exchanges so far, which fault injection counts by.
    exchanges: AtomicU64,
}

/// One rank's end.
pub(crate) struct ThreadTransport<B: Backend<Queue: PeerQueue>> {
    end: Arc<End>,
    group: Arc<Group<B::Queue>>,
    /// Exchanges of this transport so far.
    exchanges: AtomicU64,
    /// Sub-groups so far.
    subgroups: Mutex<HashMap<Vec<Rank>, usize>>,
    device: PhantomData<fn(&B)>,
}

impl<B: Backend<Queue: PeerQueue>> ThreadTransport<B> {
    /// The ends of a world of `size` ranks, in rank order.
    pub(crate) fn world(size: usize, options: ThreadsOptions) -> Vec<Self> {
        let link = options.link;
        let group = Group::new((0..size).map(Rank).collect(), Arc::new(options));
        let end = |rank| {
            let link = link.map(|link| Arc::new(PacedLink::new(link)));
            let end = End { rank: Rank(rank), link, exchanges: AtomicU64::new(0) };
            Self::new(Arc::new(end), Arc::clone(&group))
        };
        (0..size).map(end).collect()
    }

    fn new(end: Arc<End>, group: Arc<Group<B::Queue>>) -> Self {
        let (exchanges, subgroups) = (AtomicU64::new(0), Mutex::default());
        ThreadTransport { end, group, exchanges, subgroups, device: PhantomData }
    }

    pub(crate) fn link(&self) -> Option<Arc<PacedLink>> {
        self.end.link.clone()
    }
}

impl<B: Backend<Queue: PeerQueue>> Transport<B> for ThreadTransport<B> {
    fn ranks(&self) -> &[Rank] {
        &self.group.ranks
    }

    fn all_to_all_v(
        &self,
        device: &B,
        lane: Lane,
        place: Place,
        mut exchange: Exchange,
    ) -> Result<(), DeviceError> {
        let (group, rank) = (&self.group, self.end.rank);
        check_parts(&exchange, group.ranks.len())?;
        let count = self.end.exchanges.fetch_add(1, Ordering::Relaxed);
        let number = self.exchanges.fetch_add(1, Ordering::Relaxed);
        let injection = group.options.injection;
        let injection = injection.filter(|injection| (injection.rank, injection.exchange) == (rank, count));
        if injection.is_some_and(|injection| injection.act == InjectedFault::SendOneRowLess) {
            shorten(&mut exchange.send)?;
        }
        let name = exchange.name;
        let accesses = exchange.accesses();
        let running = RunningExchange {
            me: position(&group.ranks, rank),
            end: Arc::clone(&self.end),
            group: Arc::clone(group),
            number,
            place,
            exchange,
        };
        let delay = group.options.delay.map(|seed| Mix::keyed(seed, &[rank.0 as u64, count]));
        let act = injection.map(|injection| injection.act);
        device.enqueue_external(lane, place, name, &accesses, move |queue| {
            running.misbehave(delay, act)?;
            running.run(queue)
        })
    }

    fn subgroup(&self, ranks: &[Rank]) -> Result<Arc<dyn Transport<B>>, DeviceError> {
        check_subgroup(&self.group.ranks, self.end.rank, ranks)?;
        let mut mine = lock(&self.subgroups);
        let earlier = mine.entry(ranks.to_vec()).or_default();
        let mut all = lock(&self.group.subgroups);
        let group = all
            .entry((ranks.to_vec(), *earlier))
            .or_insert_with(|| Group::new(ranks.to_vec(), Arc::clone(&self.group.options)));
        *earlier += 1;
        Ok(Arc::new(Self::new(Arc::clone(&self.end), Arc::clone(group))))
    }
}

/// One exchange as it runs on a lane.
struct RunningExchange<Q: PeerQueue> {
    /// Position of this rank in the group.
    me: usize,
    end: Arc<End>,
    group: Arc<Group<Q>>,
    number: u64,
    place: Place,
    exchange: Exchange,
}

impl<Q: PeerQueue> RunningExchange<Q> {
    /// What tests ask for.
    fn misbehave(&self, delay: Option<Mix>, act: Option<InjectedFault>) -> Result<(), Fault> {
        if let Some(mut delay) = delay {
            std::thread::sleep(Duration::from_micros(delay.below(1000) as u64));
        }
        match act {
            Some(InjectedFault::Stall) => loop {
                self.group.options.faults.check()?;
                std::thread::sleep(FaultCell::POLL);
            },
            Some(InjectedFault::Panic) => {
                panic!("{} panics on purpose at {}", self.end.rank, self.exchange.name)
            }
            Some(InjectedFault::SendOneRowLess) | None => Ok(()),
        }
    }

    fn run(&self, queue: &Q) -> Result<(), Fault> {
        let mut deadline = Deadline::after(self.group.options.timeout);
        match queue.holds() {
            None => self.run_on_lane(queue, &mut deadline),
            Some(holds) => self.fill(queue, holds, &mut deadline),
        }
    }

    /// The caller is the lane: what is called happens, and the lane waits here.
    fn run_on_lane(&self, queue: &Q, deadline: &mut Deadline) -> Result<(), Fault> {
        let now = Instant::now();
        let mut ready = self.end.link.as_ref().map_or(now, |link| link.begin(now));
        let taken = self.send(queue, ready)?;
        for source in 0..self.group.ranks.len() {
            let part = self.receive(source, deadline)?;
            ready = ready.max(part.posted);
            self.copy(queue, &[(source, part)])?;
        }
        self.await_taken(queue, &taken, deadline)?;
        self.pace(ready, deadline)
    }

    /// The queue runs later: everything is put into it, in few calls, and the caller waits only until the other ranks have
    /// put in as much. Parts without rows order nothing.
    fn fill(&self, queue: &Q, holds: &dyn Holds, deadline: &mut Deadline) -> Result<(), Fault> {
        let taken = self.send(queue, Instant::now())?;
        let sources = 0..self.group.ranks.len();
        let parts = sources.map(|source| Ok((source, self.receive(source, deadline)?)));
        let parts = parts.collect::<Result<Vec<_>, Fault>>()?;
        let bytes = self.exchange.link_bytes(self.me);
        let pace = self.end.link.as_ref().filter(|_| bytes > 0);
        let travels = |(source, part): &&(usize, PostedSend<Q>)| *source != self.me && part.rows.rows > 0;
        parts.iter().filter(travels).try_for_each(|(_, part)| self.of_queue(queue.after(&part.ready)))?;
        if pace.is_some() {
            self.of_queue(holds.begin())?;
        }
        self.copy(queue, &parts)?;
        self.await_taken(queue, &taken, deadline)?;
        let Some(link) = pace else { return Ok(()) };
        let pace = LinkPace {
            link: Arc::clone(link),
            bytes,
            due: None,
            deadline: Deadline::after(self.group.options.timeout),
            faults: self.group.options.faults.clone(),
            late: Fault {
                kind: FaultKind::Deadline,
                rank: self.end.rank,
                place: self.place,
                message: format!("{} did not cross the link", self.exchange.name),
            },
        };
        self.of_queue(holds.hold(Box::new(pace)))
    }

    /// Sleeps until the link would have carried the exchange that could start at `ready`.
    fn pace(&self, ready: Instant, deadline: &mut Deadline) -> Result<(), Fault> {
        let Some(link) = &self.end.link else { return Ok(()) };
        let bytes = self.exchange.link_bytes(self.me);
        if bytes == 0 || link.carry(ready, bytes, &self.group.options.faults, deadline)? {
            return Ok(());
        }
        Err(self.late(format!("{} did not cross the link", self.exchange.name), deadline))
    }

    /// Posts every part; gives what tells when each is taken.
    fn send(&self, queue: &Q, posted: Instant) -> Result<Vec<Arc<OnceLock<Q::Mark>>>, Fault> {
        let ready = self.of_queue(queue.mark())?;
        let mut taken = Vec::with_capacity(self.exchange.send.len());
        let mut all = lock(&self.group.posted);
        for (destination, rows) in self.exchange.send.iter().enumerate() {
            let part = PostedSend {
                name: self.exchange.name,
                place: self.place,
                rows: rows.clone(),
                peer_rows: self.of_queue(queue.share(rows))?,
                ready: ready.clone(),
                posted,
                taken: Arc::default(),
            };
            taken.push(Arc::clone(&part.taken));
            all.insert(Route { exchange: self.number, source: self.me, destination }, part);
        }
        self.group.changed.notify();
        Ok(taken)
    }

    /// Awaits what `source` sends; refuses what is not what was announced.
    fn receive(&self, source: usize, deadline: &mut Deadline) -> Result<PostedSend<Q>, Fault> {
        let (name, sender) = (self.exchange.name, self.group.ranks[source]);
        let route = Route { exchange: self.number, source, destination: self.me };
        let part =
            self.until(deadline, |posted| posted.remove(&route), || format!("{sender} did not send {name}"))?;
        let (room, rows) = (&self.exchange.receive[source], &part.rows);
        let found = (part.name, part.place, [rows.rows, rows.width], rows.dtype);
        check_part(sender, (name, self.place, room), found).map_err(|problem| self.mismatch(problem))?;
        Ok(part)
    }

    /// Copies parts of some sources to their rooms, and tells those who sent them.
    fn copy(&self, queue: &Q, parts: &[(usize, PostedSend<Q>)]) -> Result<(), Fault> {
        let room = |source: usize| &self.exchange.receive[source];
        let copies: Vec<_> = parts.iter().map(|(source, part)| (&part.peer_rows, room(*source))).collect();
        // SAFETY: each room is a declared write of this exchange, and as large as its part. The rows are a declared read of
        // the sender's exchange, which is not complete before `taken` says so, below.
        self.of_queue(unsafe { queue.copy(&copies) })?;
        let end = self.of_queue(queue.mark())?;
        for (_, part) in parts {
            // Each part is taken by one receiver, once.
            let _ = part.taken.set(end.clone());
        }
        // Taking the lock orders the notice after a sender's look at the mark.
        drop(lock(&self.group.posted));
        self.group.changed.notify();
        Ok(())
    }

    /// What was sent may be overwritten once everybody has taken it; what stays with this rank follows in its own queue.
    fn await_taken(
        &self,
        queue: &Q,
        taken: &[Arc<OnceLock<Q::Mark>>],
        deadline: &mut Deadline,
    ) -> Result<(), Fault> {
        for (destination, taken) in taken.iter().enumerate() {
            if destination == self.me || self.exchange.send[destination].rows == 0 {
                continue;
            }
            let end = self.until(
                deadline,
                |_| taken.get(),
                || {
                    let (receiver, name) = (self.group.ranks[destination], self.exchange.name);
                    format!("{receiver} did not take {name}")
                },
            )?;
            self.of_queue(queue.after(end))?;
        }
        Ok(())
    }

    /// Waits until `ready` gives something, the world has failed, or the deadline has passed.
    fn until<T>(
        &self,
        deadline: &mut Deadline,
        mut ready: impl FnMut(&mut HashMap<Route, PostedSend<Q>>) -> Option<T>,
        late: impl Fn() -> String,
    ) -> Result<T, Fault> {
        let mut posted = lock(&self.group.posted);
        loop {
            if let Some(value) = ready(&mut posted) {
                return Ok(value);
            }
            self.group.options.faults.check()?;
            if deadline.passed() {
                return Err(self.late(late(), deadline));
            }
            posted = self.group.changed.wait(&self.group.posted, posted);
        }
    }

    /// What the queue refused stops the world.
    fn of_queue<T>(&self, result: Result<T, DeviceError>) -> Result<T, Fault> {
        result.map_err(|error| match error {
            DeviceError::Fault(fault) => fault,
            error => self.raise(FaultKind::Invalid, format!("{}: {error}", self.exchange.name)),
        })
    }

    fn late(&self, what: String, deadline: &Deadline) -> Fault {
        self.raise(FaultKind::Deadline, format!("{what} within {:?}", deadline.allowed()))
    }

    fn mismatch(&self, message: String) -> Fault {
        self.raise(FaultKind::Mismatch, message)
    }

    fn raise(&self, kind: FaultKind, message: String) -> Fault {
        self.group.options.faults.raise(Fault { kind, rank: self.end.rank, place: self.place, message })
    }
}

/// Holds a queue until the link would have carried an exchange.
pub(crate) struct LinkPace {
    pub(crate) link: Arc<PacedLink>,
    pub(crate) bytes: u64,
    /// When the exchange is over; not known before it begins.
    pub(crate) due: Option<Instant>,
    pub(crate) deadline: Deadline,
    pub(crate) faults: FaultCell,
    /// What is raised if it takes too long.
    pub(crate) late: Fault,
}

impl Pace for LinkPace {
    fn due(&mut self, begun: Instant) -> Instant {
        self.deadline.restart();
        let due = self.link.book(self.link.begin(begun), self.bytes);
        *self.due.insert(due)
    }

    fn is_over(&mut self) -> bool {
        if self.due.is_some() && self.deadline.passed() {
            let message = format!("{} within {:?}", self.late.message, self.deadline.allowed());
            self.faults.raise(Fault { message, ..self.late.clone() });
        }
        self.faults.get().is_some()
    }

    fn passed(&mut self, arrived: Instant, now: Instant) {
        let due = self.due.unwrap_or(now);
        self.link.note(due, arrived, now);
    }
}

fn shorten(send: &mut [Buffer]) -> Result<(), DeviceError> {
    if let Some(part) = send.iter_mut().find(|part| part.rows > 0) {
        *part = part.rows(0..part.rows - 1)?;
    }
    Ok(())
}
