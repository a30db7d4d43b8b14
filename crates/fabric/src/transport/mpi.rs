//! Parcels over MPI, which moves data only while it is called: a thread owns all of it, sends what lanes give it, and takes
//! in what comes. It calls MPI again and again while a lane is inside an exchange or something is on its way, and sleeps
//! otherwise, so that nothing is taken from those who compute when nothing travels.
//!
//! No request is ever cancelled: buffers belong to the thread, and what is still on its way when the world stops stays
//! with it until the process ends.

use super::parcels::{Attention, Carrier, Head, Inbox, Unsent};
use crate::signal::lock;
use epsmoe_base::{Fault, FaultCell, Rank};
use mpi::Threading;
use mpi::point_to_point::Status;
use mpi::request::{Request, StaticScope};
use mpi::topology::SimpleCommunicator;
use mpi::traits::{Communicator, Destination, Equivalence, Source};
use std::collections::HashMap;
use std::io::{self, ErrorKind};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, TryRecvError, channel};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How long the thread lets others compute when it was told to watch, and nothing moved.
const PAUSE: Duration = Duration::from_micros(20);

/// How often it looks when nobody told it to: for what others sent ahead.
const IDLE: Duration = Duration::from_millis(20);

/// How long what is on its way may take when the world ends.
const GOODBYE: Duration = Duration::from_secs(2);

/// Most bytes of a message: a count of MPI is an `int`.
const LONGEST: usize = i32::MAX as usize;

/// What the thread is asked for.
enum Errand {
    /// To send a parcel of a world.
    Send { to: i32, world: i32, words: Vec<u8> },
    /// To look, as somebody waits.
    Look,
}

/// Where what comes of each world goes. Others may be there first, and send.
type Inboxes = Arc<Mutex<HashMap<i32, Arc<Inbox>>>>;

/// MPI in this process. It can be started once, by a launcher of MPI, and ends with this handle; meanwhile it carries the
/// rows of any number of worlds.
pub struct Mpi {
    errands: Option<Sender<Errand>>,
    inboxes: Inboxes,
    /// Lanes that are inside an exchange.
    waiting: Arc<AtomicUsize>,
    /// This process, and how many there are.
    rank: usize,
    size: usize,
    thread: Option<JoinHandle<()>>,
}

impl Mpi {
    /// Starts MPI, on a thread that it then belongs to.
    ///
    /// # Errors
    /// It was started before, or cannot be.
    pub fn start() -> Result<Self, String> {
        let (inboxes, waiting) = (Inboxes::default(), Arc::<AtomicUsize>::default());
        let (errands, asked) = channel();
        let (ready, started) = channel();
        let (of_thread, watched) = (Arc::clone(&inboxes), Arc::clone(&waiting));
        let life = move || {
            let Some((universe, _)) = mpi::initialize_with_threading(Threading::Funneled) else { return };
            let world = universe.world();
            // Whoever waits for it is there.
            let _ = ready.send((world.rank() as usize, world.size() as usize));
            let in_peace = Office::new(&world, of_thread).run(&asked, &watched);
            // MPI ends together or not at all: where somebody is missing it would wait for ever.
            if in_peace { drop(universe) } else { std::mem::forget(universe) }
        };
        let thread = std::thread::Builder::new().name("mpi".into()).spawn(life);
        let thread = Some(thread.map_err(|error| format!("cannot start the thread of MPI ({error})"))?);
        let (rank, size) = started.recv().map_err(|_| "MPI was started before in this process".to_owned())?;
        Ok(Mpi { errands: Some(errands), inboxes, waiting, rank, size, thread })
    }

    /// What MPI this is, in a line.
    pub fn library() -> String {
        let text = mpi::environment::library_version().unwrap_or_default();
        text.lines().next().unwrap_or_default().trim_matches('\0').trim().to_owned()
    }

    /// This process's number, and how many there are.
    pub fn place(&self) -> (usize, usize) {
        (self.rank, self.size)
    }
}

impl Drop for Mpi {
    fn drop(&mut self) {
        drop(self.errands.take());
        let begun = Instant::now();
        while self.thread.as_ref().is_some_and(|thread| !thread.is_finished())
            && begun.elapsed() < 2 * GOODBYE
        {
            std::thread::sleep(FaultCell::POLL);
        }
    }
}

/// The way of one world's rows.
pub(crate) struct MpiCarrier {
    world: i32,
    inbox: Arc<Inbox>,
    errands: Sender<Errand>,
    inboxes: Inboxes,
    waiting: Arc<AtomicUsize>,
    faults: FaultCell,
}

impl MpiCarrier {
    /// The carrier of a world whose first ranks are those of MPI. `number` is equal on all of them, and another for every
    /// world.
    pub(crate) fn open(
        mpi: &Mpi,
        me: Rank,
        size: usize,
        number: u64,
        faults: &FaultCell,
    ) -> Result<Self, String> {
        let Some(errands) = mpi.errands.clone().filter(|_| mpi.rank == me.0 && size <= mpi.size) else {
            return Err(format!(
                "MPI calls this process rank {} of {}, but it is {me} of {size}: start all ranks by mpirun, or leave \
                 out --fabric mpi",
                mpi.rank, mpi.size
            ));
        };
        // Every MPI has so many tags.
        let world = (number % (1 << 15)) as i32;
        let inbox = Arc::clone(lock(&mpi.inboxes).entry(world).or_default());
        let (inboxes, waiting) = (Arc::clone(&mpi.inboxes), Arc::clone(&mpi.waiting));
        Ok(MpiCarrier { world, inbox, errands, inboxes, waiting, faults: faults.clone() })
    }
}

impl Carrier for MpiCarrier {
    fn inbox(&self) -> &Inbox {
        &self.inbox
    }

    /// The thread keeps a copy, so nobody waits here.
    fn send(
        &self,
        to: Rank,
        head: &Head<'_>,
        bytes: &[u8],
        _: &mut dyn FnMut(bool) -> Result<(), Fault>,
    ) -> Result<(), Unsent> {
        self.faults.check().map_err(Unsent::Fault)?;
        let head = head.encoded()?;
        let length = 4 + head.len() + bytes.len();
        if length > LONGEST {
            let problem = format!(
                "MPI carries {LONGEST} bytes at once, not {length}: use more stages, or --fabric tcp"
            );
            return Err(Unsent::Broken(io::Error::new(ErrorKind::InvalidInput, problem)));
        }
        let mut words = self.inbox.memory();
        words.clear();
        words.reserve(length);
        words.extend((head.len() as u32).to_le_bytes());
        words.extend(head);
        words.extend(bytes);
        let sent = self.errands.send(Errand::Send { to: to.0 as i32, world: self.world, words });
        sent.map_err(|_| Unsent::Broken(io::Error::other("the thread of MPI has ended")))
    }

    fn attend(&self) -> Option<Attention> {
        let attention = Attention::new(&self.waiting);
        // That it has ended is seen by whoever sends.
        let _ = self.errands.send(Errand::Look);
        Some(attention)
    }
}

impl Drop for MpiCarrier {
    fn drop(&mut self) {
        lock(&self.inboxes).remove(&self.world);
    }
}

/// Memory that MPI reads or writes until a request is complete.
struct Moving {
    request: Option<Request<'static, [u8], StaticScope>>,
    memory: *mut [u8],
}

impl Moving {
    /// Lends the memory to `start` until the request that it makes is complete.
    fn start(
        words: Vec<u8>,
        start: impl FnOnce(&'static mut [u8]) -> Request<'static, [u8], StaticScope>,
    ) -> Self {
        let memory = Box::into_raw(words.into_boxed_slice());
        // SAFETY: just made from a box, which is taken back only when the request is complete.
        let request = Some(start(unsafe { &mut *memory }));
        Moving { request, memory }
    }

    /// The memory, if the request is complete.
    fn end(&mut self) -> Option<Vec<u8>> {
        match self.request.take()?.test() {
            Ok(Status { .. }) => {
                // SAFETY: made by `Box::into_raw`, and MPI is done with it. The request that borrowed it is gone, and so
                // this happens once.
                Some(unsafe { Box::from_raw(self.memory) }.into_vec())
            }
            Err(request) => {
                self.request = Some(request);
                None
            }
        }
    }
}

impl Drop for Moving {
    fn drop(&mut self) {
        // MPI may still use the memory: it stays.
        std::mem::forget(self.request.take());
    }
}

/// What the thread does.
struct Office<'a> {
    world: &'a SimpleCommunicator,
    inboxes: Inboxes,
    leaving: Vec<Moving>,
    /// With the inbox that it is for.
    coming: Vec<(Arc<Inbox>, Moving)>,
}

impl<'a> Office<'a> {
    fn new(world: &'a SimpleCommunicator, inboxes: Inboxes) -> Self {
        Office { world, inboxes, leaving: Vec::new(), coming: Vec::new() }
    }

    /// Works until nobody can ask for anything any more; says whether all that was sent has left.
    fn run(&mut self, errands: &Receiver<Errand>, waiting: &AtomicUsize) -> bool {
        let mut last_words = None;
        loop {
            let on_its_way = !self.leaving.is_empty() || !self.coming.is_empty();
            let busy = on_its_way || last_words.is_some() || waiting.load(Ordering::Acquire) > 0;
            let errand = if busy {
                errands.try_recv().map_err(|error| error == TryRecvError::Disconnected)
            } else {
                errands.recv_timeout(IDLE).map_err(|error| error == RecvTimeoutError::Disconnected)
            };
            let asked = errand.is_ok();
            match errand {
                Ok(errand) => self.run_errand(errand),
                Err(false) => {}
                Err(true) => {
                    let begun = *last_words.get_or_insert_with(Instant::now);
                    if self.leaving.is_empty() || begun.elapsed() > GOODBYE {
                        return self.leaving.is_empty();
                    }
                }
            }
            let moved = self.take_in() | self.complete();
            if busy && !moved && !asked {
                std::thread::sleep(PAUSE);
            }
        }
    }

    fn run_errand(&mut self, errand: Errand) {
        match errand {
            Errand::Send { to, world, words } => {
                let process = self.world.process_at_rank(to);
                let send =
                    |words: &'static mut [u8]| process.immediate_send_with_tag(StaticScope, &*words, world);
                self.leaving.push(Moving::start(words, send));
            }
            Errand::Look => {}
        }
    }

    /// Makes room for what comes.
    fn take_in(&mut self) -> bool {
        let mut found = false;
        while let Some((message, status)) = self.world.any_process().immediate_matched_probe() {
            found = true;
            let inbox = Arc::clone(lock(&self.inboxes).entry(status.tag()).or_default());
            let mut words = inbox.memory();
            words.resize(status.count(u8::equivalent_datatype()) as usize, 0);
            let receive = |words| message.immediate_matched_receive_into(StaticScope, words);
            self.coming.push((inbox, Moving::start(words, receive)));
        }
        found
    }

    /// Finds what has left, and what has come.
    fn complete(&mut self) -> bool {
        let before = self.leaving.len() + self.coming.len();
        self.leaving.retain_mut(|moving| moving.end().is_none());
        self.coming.retain_mut(|(inbox, moving)| {
            let Some(words) = moving.end() else { return true };
            // What is no parcel will be missing where one is due.
            if let Some((head, from)) = opened(&words) {
                inbox.put(head, words, from);
            }
            false
        });
        self.leaving.len() + self.coming.len() < before
    }
}

/// The head of a parcel, and where its rows begin.
fn opened(words: &[u8]) -> Option<(Head<'static>, usize)> {
    let (length, rest) = words.split_first_chunk::<4>()?;
    let (head, rows) = rest.split_at_checked(u32::from_le_bytes(*length) as usize)?;
    let head: Head<'_> = postcard::from_bytes(head).ok()?;
    (head.bytes() == Some(rows.len())).then(|| (head.into_owned(), words.len() - rows.len()))
}
