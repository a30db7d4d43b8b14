//! Ranks talking to each other, in two ways that a [`Fabric`] bundles:
//!
//! * [`Control`]: small messages between hosts: between threads of one process, or over TCP.
//! * [`Transport`]: rows between the memories of devices, on a lane, with sub-groups: copies inside one process, or parcels
//!   between processes.
//!
//! Both move bytes and never compute. Sums over ranks are an exchange plus a fixed-order sum on the device, so that no
//! bit depends on the fabric. Ranks that are processes find each other in [`process`]; a rank whose others are not there has both [emulated](Fabric::emulated). Neither knows experts or layers: a [`Place`](epsmoe_base::Place) is only a label for
//! messages.

#[cfg(feature = "contract")]
pub mod contract;
mod control;
mod emulated;
mod link;
pub mod process;
mod signal;
mod single_rank;
mod transport;

pub use control::Control;
pub use emulated::{EmulatedOptions, Mirrored, Peers};
pub use link::{Lateness, Link, PacedLink, Pacing};
pub use single_rank::SingleRank;
pub use transport::{Exchange, FaultInjection, InjectedFault, ThreadsOptions, Transport};

use control::ThreadControl;
use emulated::{EmulatedControl, EmulatedTransport};
use epsmoe_base::{Fault, Rank};
use epsmoe_device::cuda::{CudaBackend, CudaDevice};
use epsmoe_device::{Backend, PeerQueue};
use std::sync::Arc;
use std::time::Duration;
use transport::{NcclTransport, ThreadTransport};

/// One rank's end of a world: how it talks to the others. A cheap handle.
pub struct Fabric<B: Backend> {
    /// Messages between hosts.
    pub control: Arc<dyn Control>,
    /// Rows between devices, over all ranks.
    pub transport: Arc<dyn Transport<B>>,
    /// The link that the rank's rows are paced by, if their speed is emulated.
    pub link: Option<Arc<PacedLink>>,
}

impl<B: Backend> Fabric<B> {
    /// The fabric of a world of one rank.
    pub fn single_rank() -> Self {
        Fabric {
            control: Arc::new(SingleRank::default()),
            transport: Arc::new(SingleRank::default()),
            link: None,
        }
    }

    /// The ends of a world of `size` ranks that are threads of this process, in rank order.
    pub fn threads(size: usize, options: ThreadsOptions) -> Vec<Self>
    where
        B::Queue: PeerQueue,
    {
        let controls = ThreadControl::world(size, &options);
        let transports = ThreadTransport::<B>::world(size, options);
        let end = |(control, transport): (ThreadControl, ThreadTransport<B>)| Fabric {
            link: transport.link(),
            control: Arc::new(control),
            transport: Arc::new(transport),
        };
        controls.into_iter().zip(transports).map(end).collect()
    }

    /// The end of one rank of a world whose other ranks are not there.
    pub fn emulated(options: EmulatedOptions) -> Self
    where
        B::Queue: PeerQueue,
    {
        let transport = EmulatedTransport::<B>::new(options.clone());
        Fabric {
            link: transport.link(),
            control: Arc::new(EmulatedControl::new(options)),
            transport: Arc::new(transport),
        }
    }

    /// This rank.
    pub fn rank(&self) -> Rank {
        self.control.rank()
    }

    /// Number of ranks.
    pub fn size(&self) -> usize {
        self.control.size()
    }
}

impl Fabric<CudaBackend> {
    /// The fabric of a rank whose rows travel by NCCL from GPU to GPU; all ranks of `control`, which are processes, ask for it
    /// at the same time. Waits up to `timeout` for the others, here and later.
    ///
    /// # Errors
    /// There is no NCCL, or a rank did not come or cannot be reached.
    pub fn nccl(
        control: Arc<dyn Control>,
        device: &Arc<CudaDevice>,
        timeout: Duration,
    ) -> Result<Self, Fault> {
        let transport = NcclTransport::meet(Arc::clone(&control), device, timeout)?;
        Ok(Fabric { control, transport: Arc::new(transport), link: None })
    }
}

impl<B: Backend> Clone for Fabric<B> {
    fn clone(&self) -> Self {
        Fabric {
            control: Arc::clone(&self.control),
            transport: Arc::clone(&self.transport),
            link: self.link.clone(),
        }
    }
}
