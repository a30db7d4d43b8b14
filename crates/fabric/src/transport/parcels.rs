//! Rows between processes. What a rank has for another in an exchange is a parcel: a head that says what it is, and the
//! bytes of the rows. A [`Carrier`] brings parcels from process to process; everything else is the same for all of them.
//!
//! An exchange as it runs on a lane: the rank sends a parcel to every other one, beginning with the next, so that no rank
//! gets all of them at once; then it puts what each has sent into its place, as it comes. Empty parcels are sent too: so
//! ranks that are at different exchanges see it, and none is more than one exchange ahead of another.

use super::{Exchange, Transport, check_part, check_parts, check_subgroup, position};
use crate::control::{TcpControl, has_ended};
use crate::signal::{Signal, lock};
use crate::{Control, Link, PacedLink};
use epsmoe_base::{DType, Deadline, Fault, FaultKind, Lane, Place, Rank, hash_bytes};
use epsmoe_device::{Backend, DeviceError, HostQueue};
use serde::{Deserialize, Serialize};
use std::borrow::Cow;
use std::collections::HashMap;
use std::io::ErrorKind;
use std::marker::PhantomData;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// Where a parcel belongs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub(crate) struct Route {
    /// Which transport.
    pub(crate) group: u64,
    /// Which of its exchanges.
    pub(crate) exchange: u64,
    /// Who sends it.
    pub(crate) source: Rank,
}

/// What a parcel is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Head<'a> {
    pub(crate) route: Route,
    pub(crate) name: Cow<'a, str>,
    pub(crate) place: Place,
    pub(crate) rows: usize,
    pub(crate) width: usize,
    pub(crate) dtype: DType,
}

impl Head<'_> {
    /// Bytes of its rows; nothing if there cannot be so many.
    pub(crate) fn bytes(&self) -> Option<usize> {
        self.rows.checked_mul(self.width)?.checked_mul(self.dtype.bytes())
    }

    /// As it travels.
    pub(crate) fn encoded(&self) -> Result<Vec<u8>, Unsent> {
        postcard::to_stdvec(self).map_err(|error| Unsent::Broken(std::io::Error::other(error)))
    }

    /// The same, of words that may go.
    pub(crate) fn into_owned(self) -> Head<'static> {
        Head { name: self.name.into_owned().into(), ..self }
    }
}

/// A parcel that has arrived.
pub(crate) struct Parcel {
    head: Head<'static>,
    /// Its rows begin at `from`.
    bytes: Vec<u8>,
    from: usize,
    arrived: Instant,
}

/// What has arrived and was not awaited yet. At most one exchange of every lane lies here.
#[derive(Default)]
pub(crate) struct Inbox {
    parcels: Mutex<HashMap<Route, Parcel>>,
    arrived: Signal,
    /// Memory of parcels that were put into their places, for the next ones: fresh memory would cost as much as the copy.
    spare: Mutex<Vec<Vec<u8>>>,
}

impl Inbox {
    /// Memory for a parcel.
    pub(crate) fn memory(&self) -> Vec<u8> {
        lock(&self.spare).pop().unwrap_or_default()
    }

    /// Memory of a parcel that is not needed any more.
    pub(crate) fn spare(&self, bytes: Vec<u8>) {
        lock(&self.spare).push(bytes);
    }

    /// Takes in a parcel whose rows begin at `from` in these bytes.
    pub(crate) fn put(&self, head: Head<'static>, bytes: Vec<u8>, from: usize) {
        let (route, arrived) = (head.route, Instant::now());
        lock(&self.parcels).insert(route, Parcel { head, bytes, from, arrived });
        self.arrived.notify();
    }
}

/// Why a parcel was not sent.
pub(crate) enum Unsent {
    /// The world has stopped, or the receiver took too long.
    Fault(Fault),
    /// The connection broke.
    Broken(std::io::Error),
}

/// Brings parcels to other processes, and what comes from them to the inbox.
pub(crate) trait Carrier: Send + Sync + 'static {
    /// Where it puts what arrives.
    fn inbox(&self) -> &Inbox;

    /// Sends a parcel; its bytes may be overwritten after. `waiting` is called while the receiver takes nothing, and says
    /// when to give up; what it is told is whether something has left since the last time.
    fn send(
        &self,
        to: Rank,
        head: &Head<'_>,
        bytes: &[u8],
        waiting: &mut dyn FnMut(bool) -> Result<(), Fault>,
    ) -> Result<(), Unsent>;

    /// Asks to look for what comes until the answer is dropped, of a carrier that does not by itself.
    fn attend(&self) -> Option<Attention> {
        None
    }
}

/// A lane is inside an exchange.
pub(crate) struct Attention(Arc<AtomicUsize>);

#[cfg(feature = "mpi")]
impl Attention {
    pub(crate) fn new(lanes: &Arc<AtomicUsize>) -> Self {
        lanes.fetch_add(1, Ordering::AcqRel);
        Attention(Arc::clone(lanes))
    }
}

impl Drop for Attention {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}

/// What all transports of one process share.
struct End<C> {
    control: Arc<TcpControl>,
    carrier: C,
    timeout: Duration,
    link: Option<Arc<PacedLink>>,
}

/// One process's end of the exchanges among some ranks.
pub(crate) struct ParcelTransport<B, C> {
    end: Arc<End<C>>,
    ranks: Arc<[Rank]>,
    /// Its number, equal on all its ranks.
    group: u64,
    exchanges: AtomicU64,
    /// Sub-groups so far, by their ranks.
    subgroups: Mutex<HashMap<Vec<Rank>, u64>>,
    device: PhantomData<fn(&B)>,
}

impl<B: Backend<Queue: HostQueue>, C: Carrier> ParcelTransport<B, C> {
    /// The transport of all ranks.
    pub(crate) fn new(control: Arc<TcpControl>, carrier: C, timeout: Duration, link: Option<Link>) -> Self {
        let ranks = (0..control.size()).map(Rank).collect();
        let link = link.map(|link| Arc::new(PacedLink::new(link)));
        Self::of(Arc::new(End { control, carrier, timeout, link }), ranks, 0)
    }

    fn of(end: Arc<End<C>>, ranks: Arc<[Rank]>, group: u64) -> Self {
        let (exchanges, subgroups) = (AtomicU64::new(0), Mutex::default());
        ParcelTransport { end, ranks, group, exchanges, subgroups, device: PhantomData }
    }

    pub(crate) fn link(&self) -> Option<Arc<PacedLink>> {
        self.end.link.clone()
    }
}

impl<B: Backend<Queue: HostQueue>, C: Carrier> Transport<B> for ParcelTransport<B, C> {
    fn ranks(&self) -> &[Rank] {
        &self.ranks
    }

    fn all_to_all_v(
        &self,
        device: &B,
        lane: Lane,
        place: Place,
        exchange: Exchange,
    ) -> Result<(), DeviceError> {
        check_parts(&exchange, self.ranks.len())?;
        let name = exchange.name;
        let accesses = exchange.accesses();
        let running = RunningExchange {
            end: Arc::clone(&self.end),
            me: position(&self.ranks, self.end.control.rank()),
            ranks: Arc::clone(&self.ranks),
            group: self.group,
            number: self.exchanges.fetch_add(1, Ordering::Relaxed),
            place,
            exchange,
        };
        device.enqueue_external(lane, place, name, &accesses, move |queue| running.run(queue))
    }

    fn subgroup(&self, ranks: &[Rank]) -> Result<Arc<dyn Transport<B>>, DeviceError> {
        check_subgroup(&self.ranks, self.end.control.rank(), ranks)?;
        let mut subgroups = lock(&self.subgroups);
        let earlier = subgroups.entry(ranks.to_vec()).or_default();
        let words = [self.group, *earlier].into_iter().chain(ranks.iter().map(|rank| rank.0 as u64));
        let group = hash_bytes(&words.flat_map(u64::to_le_bytes).collect::<Vec<u8>>());
        *earlier += 1;
        Ok(Arc::new(Self::of(Arc::clone(&self.end), ranks.into(), group)))
    }
}

/// One exchange as it runs on a lane.
struct RunningExchange<C> {
    end: Arc<End<C>>,
    /// Position of this rank in the group.
    me: usize,
    ranks: Arc<[Rank]>,
    group: u64,
    number: u64,
    place: Place,
    exchange: Exchange,
}

impl<C: Carrier> RunningExchange<C> {
    fn run<Q: HostQueue>(&self, queue: &Q) -> Result<(), Fault> {
        let _attention = self.end.carrier.attend();
        let (size, now) = (self.ranks.len(), Instant::now());
        let mut ready = self.end.link.as_ref().map_or(now, |link| link.begin(now));
        let others = (1..size).map(|step| (self.me + step) % size);
        others.clone().try_for_each(|to| self.send(queue, to))?;
        self.keep(queue)?;
        // Those who began with this rank come first.
        for from in others.rev() {
            ready = ready.max(self.receive(queue, from)?);
        }
        self.pace(ready)
    }

    fn send<Q: HostQueue>(&self, queue: &Q, to: usize) -> Result<(), Fault> {
        let (rows, receiver) = (&self.exchange.send[to], self.ranks[to]);
        let head = Head {
            route: self.route(self.me),
            name: self.exchange.name.into(),
            place: self.place,
            rows: rows.rows,
            width: rows.width,
            dtype: rows.dtype,
        };
        // SAFETY: the part is a declared read of this exchange, which ends after the bytes are sent.
        let bytes = unsafe { queue.bytes(rows) };
        let mut deadline = Deadline::after(self.end.timeout);
        let waiting = &mut |moved| {
            self.end.control.faults().check()?;
            if moved {
                deadline.restart();
            }
            if deadline.passed() {
                let name = self.end.control.name(receiver);
                return Err(self.late(format!("{name} did not take {}", self.exchange.name), &deadline));
            }
            Ok(())
        };
        self.end.carrier.send(receiver, &head, &bytes, waiting).map_err(|unsent| match unsent {
            Unsent::Fault(fault) => fault,
            Unsent::Broken(error) => {
                let (name, what) = (self.end.control.name(receiver), self.exchange.name);
                let message = match error.kind() {
                    ErrorKind::BrokenPipe | ErrorKind::ConnectionReset => has_ended(name),
                    _ => format!("the connection to {name} broke while {what} was sent ({error})"),
                };
                self.raise(FaultKind::Lost, message)
            }
        })
    }

    /// A rank's own rows stay with it.
    fn keep<Q: HostQueue>(&self, queue: &Q) -> Result<(), Fault> {
        let (from, to) = (&self.exchange.send[self.me], &self.exchange.receive[self.me]);
        self.check(self.me, self.exchange.name, self.place, from.rows, from.width, from.dtype)?;
        let invalid =
            |error: DeviceError| self.raise(FaultKind::Invalid, format!("{}: {error}", self.exchange.name));
        let shared = queue.share(from).map_err(invalid)?;
        // SAFETY: both are declared, and the rows are this rank's own.
        unsafe { queue.copy(&[(&shared, to)]) }.map_err(invalid)
    }

    /// Puts what a rank sends into its place; says when it was there.
    fn receive<Q: HostQueue>(&self, queue: &Q, from: usize) -> Result<Instant, Fault> {
        let Parcel { head, bytes, from: start, arrived } = self.take(from)?;
        self.check(from, &head.name, head.place, head.rows, head.width, head.dtype)?;
        // SAFETY: a declared write of this exchange; the carrier has looked that the bytes are as many as the head says,
        // which is as many as there is room for.
        unsafe { queue.fill(&self.exchange.receive[from], &bytes[start..]) };
        self.end.carrier.inbox().spare(bytes);
        Ok(arrived)
    }

    fn take(&self, from: usize) -> Result<Parcel, Fault> {
        let (inbox, route) = (self.end.carrier.inbox(), self.route(from));
        let mut deadline = Deadline::after(self.end.timeout);
        let mut parcels = lock(&inbox.parcels);
        loop {
            if let Some(parcel) = parcels.remove(&route) {
                return Ok(parcel);
            }
            self.end.control.faults().check()?;
            if deadline.passed() {
                let (sender, name) = (self.end.control.name(self.ranks[from]), self.exchange.name);
                return Err(self.late(format!("{sender} did not send {name}"), &deadline));
            }
            parcels = inbox.arrived.wait(&inbox.parcels, parcels);
        }
    }

    /// Refuses what is not what was announced.
    fn check(
        &self,
        from: usize,
        name: &str,
        place: Place,
        rows: usize,
        width: usize,
        dtype: DType,
    ) -> Result<(), Fault> {
        let due = (self.exchange.name, self.place, &self.exchange.receive[from]);
        check_part(self.ranks[from], due, (name, place, [rows, width], dtype))
            .map_err(|problem| self.raise(FaultKind::Mismatch, problem))
    }

    fn pace(&self, ready: Instant) -> Result<(), Fault> {
        let Some(link) = &self.end.link else { return Ok(()) };
        let bytes = self.exchange.link_bytes(self.me);
        let mut deadline = Deadline::after(self.end.timeout);
        if bytes == 0 || link.carry(ready, bytes, self.end.control.faults(), &mut deadline)? {
            return Ok(());
        }
        Err(self.late(format!("{} did not cross the link", self.exchange.name), &deadline))
    }

    fn route(&self, source: usize) -> Route {
        Route { group: self.group, exchange: self.number, source: self.ranks[source] }
    }

    fn late(&self, what: String, deadline: &Deadline) -> Fault {
        self.raise(FaultKind::Deadline, format!("{what} within {:?}", deadline.allowed()))
    }

    fn raise(&self, kind: FaultKind, message: String) -> Fault {
        let rank = self.end.control.rank();
        self.end.control.raise(Fault { kind, rank, place: self.place, message })
    }
}
