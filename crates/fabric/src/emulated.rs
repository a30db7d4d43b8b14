//! One rank of a world whose other ranks are not there: what a rank of eight does can be run, and timed, on one device.
//!
//! What the others would *say* is known or made up by a [`Peers`]; so is what they would *send* where its contents
//! matter. Rows whose contents do not matter are stood in for by the rank's own, as many as announced. Everything is
//! copied where it is due, on the lane, and paced to the link: an exchange takes as long as the busier direction.
//!
//! ```text
//! control     own message ─► Peers::messages ─► everybody's
//! transport   own rows to itself ─► copied        a peer's rows ─► Peers::rows, or a stand-in ─► copied
//!             then the lane is held until the link would have carried them
//! ```
//!
//! Nobody waits for anybody: there is no skew between ranks, and what a rank computes is right only as far as the rows
//! of the others are.

use crate::signal::lock;
use crate::transport::{LinkPace, check_parts, check_subgroup, position};
use crate::{Control, Exchange, Link, PacedLink, Transport};
use epsmoe_base::{DType, Deadline, Fault, FaultCell, FaultKind, Lane, Place, Rank};
use epsmoe_device::op::HostToDevice;
use epsmoe_device::{Backend, Buffer, DeviceError, PeerQueue};
use std::collections::HashMap;
use std::marker::PhantomData;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// What the ranks that are not there would say and send.
pub trait Peers: Send + Sync + 'static {
    /// Everybody's messages, in rank order, where this rank says `own` in a world of `size`: by default the same.
    ///
    /// # Errors
    /// `own` is no message that the others could answer.
    fn messages(
        &self,
        what: &'static str,
        place: Place,
        own: &[u8],
        size: usize,
    ) -> Result<Vec<Vec<u8>>, String> {
        let _ = (what, place);
        Ok(vec![own.to_vec(); size])
    }

    /// The rows that every rank of the world sends in the next exchange of this name and place, as words of 32 bits, row
    /// by row; those of this rank are not looked at. Nothing where any rows will do.
    ///
    /// Words that are given again are on the device already: [`Arc`]s are told apart by their address.
    fn rows(&self, name: &'static str, place: Place) -> Option<Vec<Arc<[u32]>>> {
        let _ = (name, place);
        None
    }
}

/// Peers of whom nothing is known: they say what this rank says, and send what it sends to itself.
#[derive(Clone, Copy, Debug, Default)]
pub struct Mirrored;

impl Peers for Mirrored {}

/// How a rank without the others behaves.
#[derive(Clone)]
pub struct EmulatedOptions {
    /// Which rank it is.
    pub rank: Rank,
    /// Ranks of the world.
    pub size: usize,
    /// How fast rows travel; as fast as memory when absent.
    pub link: Option<Link>,
    /// The longest that an exchange may take.
    pub timeout: Duration,
    /// The world's fault cell.
    pub faults: FaultCell,
    /// The others.
    pub peers: Arc<dyn Peers>,
}

/// The rank's end of the messages.
pub(crate) struct EmulatedControl {
    options: EmulatedOptions,
}

impl EmulatedControl {
    pub(crate) fn new(options: EmulatedOptions) -> Self {
        EmulatedControl { options }
    }
}

impl Control for EmulatedControl {
    fn rank(&self) -> Rank {
        self.options.rank
    }

    fn size(&self) -> usize {
        self.options.size
    }

    fn exchange(&self, what: &'static str, place: Place, message: Vec<u8>) -> Result<Vec<Vec<u8>>, Fault> {
        let EmulatedOptions { rank, size, faults, peers, .. } = &self.options;
        faults.check()?;
        peers.messages(what, place, &message, *size).map_err(|problem| {
            let message = format!("the emulated ranks have no answer to {what}: {problem}");
            faults.raise(Fault { kind: FaultKind::Invalid, rank: *rank, place, message })
        })
    }

    fn faults(&self) -> &FaultCell {
        &self.options.faults
    }
}

/// What all transports of the rank share.
struct Shared {
    options: EmulatedOptions,
    link: Option<Arc<PacedLink>>,
    /// Words of peers that are on the device, by their address.
    held: Mutex<HashMap<usize, HeldWords>>,
}

/// Words and where they are on the device; kept, so that no others get their address.
struct HeldWords {
    _words: Arc<[u32]>,
    rows: Buffer,
}

/// The rank's end of the exchanges of rows.
pub(crate) struct EmulatedTransport<B> {
    ranks: Vec<Rank>,
    shared: Arc<Shared>,
    device: PhantomData<fn(&B)>,
}

impl<B> EmulatedTransport<B> {
    pub(crate) fn new(options: EmulatedOptions) -> Self {
        let ranks = (0..options.size).map(Rank).collect();
        let link = options.link.map(|link| Arc::new(PacedLink::new(link)));
        let shared = Arc::new(Shared { options, link, held: Mutex::default() });
        EmulatedTransport { ranks, shared, device: PhantomData }
    }

    pub(crate) fn link(&self) -> Option<Arc<PacedLink>> {
        self.shared.link.clone()
    }

    fn me(&self) -> usize {
        position(&self.ranks, self.shared.options.rank)
    }
}

impl<B: Backend<Queue: PeerQueue>> EmulatedTransport<B> {
    /// What is copied where in an exchange.
    fn copies(
        &self,
        device: &B,
        lane: Lane,
        place: Place,
        exchange: &Exchange,
    ) -> Result<Vec<Copied>, DeviceError> {
        let me = self.me();
        let known = self.shared.options.peers.rows(exchange.name, place);
        let mut copies = Vec::new();
        for (position, (rank, room)) in self.ranks.iter().zip(&exchange.receive).enumerate() {
            if position == me {
                let own = &exchange.send[me];
                check_rows(exchange.name, *rank, (own.rows, own.width), room)?;
                copies.push(Copied { from: own.clone(), to: room.clone() });
            } else if let Some(known) = &known {
                let words = known.get(rank.0).cloned().unwrap_or_default();
                let (width, rows) = (room.width, words.len() / room.width.max(1));
                check_rows(exchange.name, *rank, (rows, width), room)?;
                if words.is_empty() {
                    continue;
                }
                let from = self.on_device(device, lane, place, words, room)?;
                copies.push(Copied { from, to: room.clone() });
            } else {
                copies.extend(stand_ins(&exchange.send, me, room)?);
            }
        }
        copies.retain(|copy| copy.to.rows > 0 && copy.to.width > 0);
        Ok(copies)
    }

    /// The words as rows like those of `room`, brought to the device when they are seen first.
    fn on_device(
        &self,
        device: &B,
        lane: Lane,
        place: Place,
        words: Arc<[u32]>,
        room: &Buffer,
    ) -> Result<Buffer, DeviceError> {
        let mut held = lock(&self.shared.held);
        let address = words.as_ptr().addr();
        if let Some(held) = held.get(&address) {
            return Ok(held.rows.clone());
        }
        let rows = device.allocate("rows of a peer", DType::U32, room.rows, room.width)?;
        device.enqueue(lane, place, HostToDevice { words: Arc::clone(&words), out: rows.clone() })?;
        let rows = rows.bits_as(room.dtype)?;
        held.insert(address, HeldWords { _words: words, rows: rows.clone() });
        Ok(rows)
    }
}

/// Rows that are copied to as many others.
struct Copied {
    from: Buffer,
    to: Buffer,
}

/// Refuses rows that are not as many as were announced: the peers contradict themselves.
fn check_rows(
    name: &str,
    rank: Rank,
    (rows, width): (usize, usize),
    room: &Buffer,
) -> Result<(), DeviceError> {
    if (rows, width) == (room.rows, room.width) {
        return Ok(());
    }
    Err(DeviceError::Shape(format!(
        "the emulated {rank} sends {rows} rows of {name} ({width} wide) where {} ({} wide) were announced. This is a \
         bug.",
        room.rows, room.width
    )))
}

/// Rows in the place of a peer's: those that this rank sends to itself, or to whomever it sends some, again and again.
/// What lies there already if it sends none.
fn stand_ins(send: &[Buffer], me: usize, room: &Buffer) -> Result<Vec<Copied>, DeviceError> {
    let same = |part: &&Buffer| part.rows > 0 && (part.width, part.dtype) == (room.width, room.dtype);
    let own = send.iter().cycle().skip(me).take(send.len()).find(same);
    let mut copies = Vec::new();
    let mut filled = 0;
    while let Some(own) = own.filter(|_| filled < room.rows) {
        let rows = own.rows.min(room.rows - filled);
        copies.push(Copied { from: own.rows(0..rows)?, to: room.rows(filled..filled + rows)? });
        filled += rows;
    }
    Ok(copies)
}

impl<B: Backend<Queue: PeerQueue>> Transport<B> for EmulatedTransport<B> {
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
        let copies = self.copies(device, lane, place, &exchange)?;
        let accesses = copies.iter().fold(exchange.accesses(), |all, copy| all.read(&copy.from));
        let bytes = exchange.link_bytes(self.me());
        let running =
            RunningExchange { shared: Arc::clone(&self.shared), name: exchange.name, place, bytes, copies };
        device.enqueue_external(lane, place, exchange.name, &accesses, move |queue| running.run(queue))
    }

    fn subgroup(&self, ranks: &[Rank]) -> Result<Arc<dyn Transport<B>>, DeviceError> {
        check_subgroup(&self.ranks, self.shared.options.rank, ranks)?;
        let shared = Arc::clone(&self.shared);
        Ok(Arc::new(EmulatedTransport::<B> { ranks: ranks.to_vec(), shared, device: PhantomData }))
    }
}

/// One exchange as it runs on a lane.
struct RunningExchange {
    shared: Arc<Shared>,
    name: &'static str,
    place: Place,
    /// What the link is occupied with.
    bytes: u64,
    copies: Vec<Copied>,
}

impl RunningExchange {
    fn run(&self, queue: &impl PeerQueue) -> Result<(), Fault> {
        let EmulatedOptions { timeout, faults, .. } = &self.shared.options;
        let mut deadline = Deadline::after(*timeout);
        let Some(link) = self.shared.link.as_ref().filter(|_| self.bytes > 0) else {
            return self.of_queue(self.copy(queue));
        };
        let Some(holds) = queue.holds() else {
            let ready = link.begin(Instant::now());
            self.of_queue(self.copy(queue))?;
            return match link.carry(ready, self.bytes, faults, &mut deadline)? {
                true => Ok(()),
                false => Err(faults.raise(self.late(format!("{LATE} within {:?}", deadline.allowed())))),
            };
        };
        let (link, faults, late) = (Arc::clone(link), faults.clone(), self.late(LATE.into()));
        self.of_queue(holds.begin())?;
        self.of_queue(self.copy(queue))?;
        let pace = LinkPace { link, bytes: self.bytes, due: None, deadline, faults, late };
        self.of_queue(holds.hold(Box::new(pace)))
    }

    fn copy<Q: PeerQueue>(&self, queue: &Q) -> Result<(), DeviceError> {
        let from = self.copies.iter().map(|copy| queue.share(&copy.from)).collect::<Result<Vec<_>, _>>()?;
        let copies: Vec<_> = from.iter().zip(self.copies.iter().map(|copy| &copy.to)).collect();
        // SAFETY: all ends are declared reads and writes of this exchange, of this rank's own memory, in pairs of equal
        // shape.
        unsafe { queue.copy(&copies) }
    }

    fn of_queue<T>(&self, result: Result<T, DeviceError>) -> Result<T, Fault> {
        result.map_err(|error| match error {
            DeviceError::Fault(fault) => fault,
            error => self.raise(FaultKind::Invalid, format!("{}: {error}", self.name)),
        })
    }

    fn late(&self, message: String) -> Fault {
        let message = format!("{} {message}", self.name);
        Fault { kind: FaultKind::Deadline, rank: self.shared.options.rank, place: self.place, message }
    }

    fn raise(&self, kind: FaultKind, message: String) -> Fault {
        let EmulatedOptions { rank, faults, .. } = &self.shared.options;
        faults.raise(Fault { kind, rank: *rank, place: self.place, message })
    }
}

/// What is said of an exchange that takes too long.
const LATE: &str = "did not cross the link";
