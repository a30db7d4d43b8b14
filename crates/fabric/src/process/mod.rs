//! A world whose ranks are processes, on one machine or on several.
//!
//! Rank 0 opens a [`Lobby`], the others [`join`] it; everybody who comes must know the world's [`Secret`]. What comes out
//! is [`Processes`]: a [`Control`] over the connections that are there, letters between rank 0 and the others, and a
//! fabric whose rows travel over connections of their own.

pub(crate) mod door;
pub(crate) mod frames;
mod rendezvous;
pub(crate) mod secret;

pub use rendezvous::{Lobby, RendezvousError, WorldOptions, join};
pub use secret::Secret;

#[cfg(feature = "mpi")]
pub use crate::transport::Mpi;

use crate::control::TcpControl;
use crate::signal::lock;
use crate::transport::{Carrier, ParcelTransport, TcpCarrier};
use crate::{Control, Fabric, Link};
use door::Door;
use epsmoe_base::{Fault, FaultCell, FaultKind, Place, Rank};
use epsmoe_device::cuda::{CudaBackend, CudaDevice};
use epsmoe_device::{Backend, HostQueue};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex};

/// One process of a world.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Member {
    /// Its rank.
    pub rank: Rank,
    /// The name of its machine.
    pub host: String,
    /// Its number there.
    pub process: u32,
    /// Where rows are brought to it.
    pub(crate) rows: SocketAddr,
}

impl fmt::Display for Member {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} (process {} on {})", self.rank, self.process, self.host)
    }
}

/// A world of processes, as one of them sees it. The world ends when rank 0 drops it.
pub struct Processes {
    control: Arc<TcpControl>,
    rows: Mutex<Option<TcpListener>>,
    options: WorldOptions,
    /// Who comes too late is told so.
    _door: Option<Door>,
}

impl Processes {
    /// The world of those who have come.
    pub(crate) fn gather(
        me: Rank,
        members: Vec<Member>,
        lines: Vec<Option<TcpStream>>,
        rows: TcpListener,
        door: Option<Door>,
        options: &WorldOptions,
    ) -> Result<Self, String> {
        let control = TcpControl::start(me, members, lines, options.timeout, options.faults.clone())
            .map_err(|error| format!("{me} cannot talk to the other ranks: {error}"))?;
        Ok(Processes {
            control: Arc::new(control),
            rows: Mutex::new(Some(rows)),
            options: options.clone(),
            _door: door,
        })
    }

    /// This process's rank.
    pub fn rank(&self) -> Rank {
        self.control.rank()
    }

    /// The processes, by rank.
    pub fn members(&self) -> &[Member] {
        self.control.members()
    }

    /// Whether rank 0 knows what stopped the world, so that it can tell.
    pub fn is_told(&self) -> bool {
        self.control.is_told()
    }

    /// Messages between the hosts.
    pub fn control(&self) -> &dyn Control {
        &*self.control
    }

    /// Sends a letter; rank 0 writes to the others, and they to rank 0.
    ///
    /// # Errors
    /// The world has stopped, or the rank takes no letters any more.
    pub fn send(&self, to: Rank, letter: &[u8]) -> Result<(), Fault> {
        self.control.send(to, letter)
    }

    /// The next letter of a rank, once it is there; nothing when the rank has left the world in peace.
    ///
    /// # Errors
    /// The world has stopped.
    pub fn receive(&self, from: Rank) -> Result<Option<Vec<u8>>, Fault> {
        self.control.receive(from)
    }

    /// The fabric whose rows travel over TCP; all ranks ask for it, once, at the same time. A `link` paces them as if they
    /// travelled no faster.
    ///
    /// # Errors
    /// A rank cannot be reached.
    pub fn tcp_fabric<B: Backend<Queue: HostQueue>>(&self, link: Option<Link>) -> Result<Fabric<B>, Fault> {
        let Some(listener) = lock(&self.rows).take() else {
            return Err(self.lost("a second fabric was asked for. This is a bug.".into()));
        };
        let WorldOptions { secret, patience, .. } = &self.options;
        let carrier =
            TcpCarrier::connect(self.rank(), self.members(), listener, secret, *patience, self.faults());
        Ok(self.fabric_over(carrier.map_err(|problem| self.lost(problem))?, link))
    }

    /// The same whose rows travel over MPI, which must have started all ranks.
    ///
    /// # Errors
    /// MPI does not know these ranks.
    #[cfg(feature = "mpi")]
    pub fn mpi_fabric<B: Backend<Queue: HostQueue>>(
        &self,
        mpi: &Mpi,
        link: Option<Link>,
    ) -> Result<Fabric<B>, Fault> {
        let number = epsmoe_base::hash_bytes(self.options.secret.reveal().as_bytes());
        let size = self.members().len();
        let carrier = crate::transport::MpiCarrier::open(mpi, self.rank(), size, number, self.faults());
        Ok(self.fabric_over(carrier.map_err(|problem| self.lost(problem))?, link))
    }

    fn fabric_over<B: Backend<Queue: HostQueue>>(
        &self,
        carrier: impl Carrier,
        link: Option<Link>,
    ) -> Fabric<B> {
        let control = Arc::clone(&self.control);
        let transport =
            ParcelTransport::<B, _>::new(Arc::clone(&control), carrier, self.options.timeout, link);
        Fabric { link: transport.link(), control, transport: Arc::new(transport) }
    }

    fn lost(&self, message: String) -> Fault {
        let fault = Fault { kind: FaultKind::Lost, rank: self.rank(), place: Place::default(), message };
        self.faults().raise(fault)
    }

    /// The fabric whose rows travel by NCCL, from GPU to GPU; all ranks ask for it at the same time.
    ///
    /// # Errors
    /// There is no NCCL, or a rank cannot be reached.
    pub fn nccl_fabric(&self, device: &Arc<CudaDevice>) -> Result<Fabric<CudaBackend>, Fault> {
        Fabric::nccl(Arc::clone(&self.control) as _, device, self.options.timeout)
    }

    /// Where this process learns that the world has stopped.
    pub fn faults(&self) -> &FaultCell {
        self.control.faults()
    }
}
