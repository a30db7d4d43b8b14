//! Rows between GPUs of different processes, by NCCL: each exchange is one group of sends and receives on the lane's
//! stream.
//!
//! NCCL names nobody and waits for ever; so hosts wait with a deadline for whatever it does on their threads, the backend
//! for its streams, and who is to blame is known to [`Control`], which hears of processes that end or stall. Once the world
//! has stopped all communicators are given up, so that no stream waits for a rank that is gone. Two ranks that disagree
//! about an exchange would wait for each other in vain: nobody tells them before the deadline, and nothing has to, as both
//! make it from one plan, whose digest they have compared.

use super::{Exchange, Transport, check_parts, check_subgroup, position};
use crate::Control;
use crate::signal::lock;
use epsmoe_base::{Deadline, Fault, FaultCell, FaultKind, Lane, Place, Rank};
use epsmoe_device::cuda::{
    Communicator, CudaBackend, CudaDevice, CudaQueue, NcclError, Part, UNIQUE_ID_BYTES, nccl_unique_id,
};
use epsmoe_device::{Backend, Buffer, DeviceError, PeerQueue};
use std::sync::{Arc, Mutex, Weak};
use std::time::Duration;

/// One rank's end of the exchanges among some ranks.
pub(crate) struct NcclTransport {
    end: Arc<End>,
    ranks: Arc<[Rank]>,
    communicator: Arc<Communicator>,
    /// The one that the others were split from, and the last to go.
    is_first: bool,
}

/// What all transports of a rank share.
struct End {
    control: Arc<dyn Control>,
    timeout: Duration,
    communicators: Mutex<Vec<Weak<Communicator>>>,
}

impl NcclTransport {
    /// The transport of all ranks of `control`, each with a GPU; all make it at the same time.
    pub(crate) fn meet(
        control: Arc<dyn Control>,
        device: &Arc<CudaDevice>,
        timeout: Duration,
    ) -> Result<Self, Fault> {
        let (rank, size) = (control.rank(), control.size());
        let end = Arc::new(End { control, timeout, communicators: Mutex::default() });
        let place = Place::default();
        let own = match rank {
            Rank(0) => end.settled("NCCL", place, nccl_unique_id())?.to_vec(),
            _ => Vec::new(),
        };
        let ids = end.control.exchange("NCCL's unique id", place, own)?;
        let id: &[u8; UNIQUE_ID_BYTES] = ids[0].as_slice().try_into().map_err(|_| {
            end.raise(FaultKind::Mismatch, place, format!("{} sent no unique id of NCCL", Rank(0)))
        })?;
        let what = "NCCL, meeting the other ranks";
        let met =
            end.within(what, place, |carry_on| Communicator::meet(device, id, rank.0, size, carry_on))?;
        let transport = Self::new(end, (0..size).map(Rank).collect(), met, true);
        transport.end.watch()?;
        Ok(transport)
    }

    fn new(end: Arc<End>, ranks: Arc<[Rank]>, communicator: Communicator, is_first: bool) -> Self {
        let communicator = Arc::new(communicator);
        lock(&end.communicators).push(Arc::downgrade(&communicator));
        NcclTransport { end, ranks, communicator, is_first }
    }
}

impl Transport<CudaBackend> for NcclTransport {
    fn ranks(&self) -> &[Rank] {
        &self.ranks
    }

    fn all_to_all_v(
        &self,
        device: &CudaBackend,
        lane: Lane,
        place: Place,
        exchange: Exchange,
    ) -> Result<(), DeviceError> {
        check_parts(&exchange, self.ranks.len())?;
        let accesses = exchange.accesses();
        let name = exchange.name;
        let (end, communicator) = (Arc::clone(&self.end), Arc::clone(&self.communicator));
        let me = position(&self.ranks, end.control.rank());
        device.enqueue_external(lane, place, name, &accesses, move |queue| {
            end.within(name, place, |carry_on| fill(queue, &communicator, me, &exchange, carry_on))
        })
    }

    fn subgroup(&self, ranks: &[Rank]) -> Result<Arc<dyn Transport<CudaBackend>>, DeviceError> {
        let me = self.end.control.rank();
        check_subgroup(&self.ranks, me, ranks)?;
        let place = position(ranks, me);
        let what = "NCCL, meeting the ranks of a group";
        // Groups share no rank, so the first one's number is theirs.
        let split = self
            .end
            .within(what, Place::default(), |carry_on| self.communicator.split(ranks[0].0, place, carry_on));
        let split = split.map_err(DeviceError::Fault)?;
        Ok(Arc::new(Self::new(Arc::clone(&self.end), ranks.into(), split, false)))
    }
}

impl Drop for NcclTransport {
    /// Ranks leave together, as some may still fetch what others sent; so whoever ends the first transport tells the others
    /// that they can go too. If they do not come within a moment they have nothing to fetch any more, and the communicator is
    /// given up.
    fn drop(&mut self) {
        const MOMENT: Duration = Duration::from_secs(2);
        if self.end.faults().get().is_some() {
            return;
        }
        if self.is_first {
            self.end.control.say_goodbye();
        }
        let mut deadline = Deadline::after(MOMENT);
        let mut carry_on = || match deadline.passed() {
            false => self.end.faults().check(),
            true => Err(Fault {
                kind: FaultKind::Deadline,
                rank: self.end.control.rank(),
                place: Place::default(),
                message: "the others are not leaving yet".into(),
            }),
        };
        let _ = self.communicator.finish(&mut carry_on);
    }
}

/// Puts an exchange into a lane's stream; what stays with this rank, at position `me`, is copied there.
fn fill(
    queue: &CudaQueue,
    communicator: &Communicator,
    me: usize,
    exchange: &Exchange,
    carry_on: &mut dyn FnMut() -> Result<(), Fault>,
) -> Result<(), NcclError> {
    let own = queue.share(&exchange.send[me])?;
    // SAFETY: what is sent and received was declared as read and written when this was enqueued; a rank's own rows are as
    // many here as there.
    unsafe {
        queue.copy(&[(&own, &exchange.receive[me])])?;
        communicator.exchange(queue, &parts(&exchange.send, me), &parts(&exchange.receive, me), carry_on)
    }
}

/// The parts of the other ranks.
fn parts(all: &[Buffer], me: usize) -> Vec<Part<'_>> {
    let of_others = all.iter().enumerate().filter(|(position, _)| *position != me);
    of_others.map(|(position, rows)| Part { position, rows }).collect()
}

impl End {
    fn faults(&self) -> &FaultCell {
        self.control.faults()
    }

    fn raise(&self, kind: FaultKind, place: Place, message: String) -> Fault {
        self.control.raise(Fault { kind, rank: self.control.rank(), place, message })
    }

    /// Calls what may take until the deadline.
    fn within<T>(
        &self,
        what: &'static str,
        place: Place,
        call: impl FnOnce(&mut dyn FnMut() -> Result<(), Fault>) -> Result<T, NcclError>,
    ) -> Result<T, Fault> {
        let mut deadline = Deadline::after(self.timeout);
        let called = call(&mut || self.may_wait(what, place, &mut deadline));
        self.settled(what, place, called)
    }

    /// Refuses to wait once the world has stopped or the deadline has passed.
    fn may_wait(&self, what: &str, place: Place, deadline: &mut Deadline) -> Result<(), Fault> {
        self.faults().check()?;
        match deadline.passed() {
            false => Ok(()),
            true => {
                let message = format!("{what}: the other ranks did not come within {:?}", deadline.allowed());
                Err(self.raise(FaultKind::Deadline, place, message))
            }
        }
    }

    /// What failed stops the world.
    fn settled<T>(&self, what: &str, place: Place, result: Result<T, NcclError>) -> Result<T, Fault> {
        result.map_err(|error| match error {
            NcclError::GivenUp(fault) | NcclError::Device(DeviceError::Fault(fault)) => fault,
            error => self.raise(FaultKind::Lost, place, format!("{what}: {error}")),
        })
    }

    /// Gives all communicators up once the world has stopped, and stops it when NCCL says that a connection broke. Ends with
    /// the last transport.
    fn watch(self: &Arc<Self>) -> Result<(), Fault> {
        const BETWEEN: Duration = Duration::from_millis(50);
        let end = Arc::downgrade(self);
        let watch = move || {
            while let Some(end) = end.upgrade() {
                let communicators: Vec<_> =
                    lock(&end.communicators).iter().filter_map(Weak::upgrade).collect();
                if end.faults().get().is_some() {
                    communicators.iter().for_each(|communicator| communicator.abort());
                    return;
                }
                if let Some(trouble) = communicators.iter().find_map(|communicator| communicator.trouble()) {
                    end.raise(FaultKind::Lost, Place::default(), trouble);
                }
                drop((communicators, end));
                std::thread::sleep(BETWEEN);
            }
        };
        let started = std::thread::Builder::new().name("nccl-watch".into()).spawn(watch);
        started.map(drop).map_err(|error| {
            self.raise(FaultKind::Lost, Place::default(), format!("no thread to watch over NCCL: {error}"))
        })
    }
}
