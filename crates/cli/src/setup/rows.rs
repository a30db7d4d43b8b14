//! What rows travel between processes by.

use crate::args::FabricKind;
use anyhow::{Result, bail};
use epsmoe_device::{Backend, HostQueue};
#[cfg(feature = "mpi")]
use epsmoe_fabric::process::Mpi;
use epsmoe_fabric::process::Processes;
use epsmoe_fabric::{Fabric, Link};
#[cfg(feature = "mpi")]
use std::sync::{Arc, Mutex, PoisonError};

/// What was asked for. Clones are the same: MPI ends with the last one, after the world's goodbye.
#[derive(Clone)]
pub(crate) struct Rows {
    pub(crate) kind: FabricKind,
    #[cfg(feature = "mpi")]
    mpi: Arc<Mutex<Option<Mpi>>>,
}

impl Rows {
    /// # Errors
    /// The program was built without it.
    pub(crate) fn by(kind: FabricKind) -> Result<Self> {
        if kind == FabricKind::Mpi && !cfg!(feature = "mpi") {
            bail!(
                "this program was built without MPI: build it with `--features mpi`, for which an MPI (libopenmpi-dev or \
                 libmpich-dev) and libclang are needed, or leave out --fabric mpi"
            );
        }
        Ok(Rows {
            kind,
            #[cfg(feature = "mpi")]
            mpi: Arc::default(),
        })
    }

    /// The fabric of these processes.
    pub(crate) fn fabric<B: Backend<Queue: HostQueue>>(
        &self,
        processes: &Processes,
        link: Option<Link>,
    ) -> Result<Fabric<B>> {
        #[cfg(feature = "mpi")]
        if self.kind == FabricKind::Mpi {
            let mut mpi = self.mpi.lock().unwrap_or_else(PoisonError::into_inner);
            let started = match mpi.take() {
                Some(started) => started,
                None => Mpi::start().map_err(anyhow::Error::msg)?,
            };
            return Ok(processes.mpi_fabric(mpi.insert(started), link)?);
        }
        Ok(processes.tcp_fabric(link)?)
    }
}
