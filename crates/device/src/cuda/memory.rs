//! Memory of one GPU in pieces that never move: cut from larger slabs, given back together at the end.

use super::driver::{Context, CudaError, DeviceMemory, Stream};
use crate::threaded::Fill;
use cudarc::driver::sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY;
use std::sync::Arc;

/// Every piece starts on so many bytes: what the widest copies and TMA ask for.
const ALIGNMENT: usize = 256;

/// Pieces smaller than this share slabs of this size.
const SLAB: usize = 16 << 20;

/// Slabs, the last of which still has room.
pub(super) struct Pool {
    context: Arc<Context>,
    slabs: Vec<DeviceMemory>,
    /// Bytes used of the last shared slab, and its place among the slabs.
    shared: Option<(usize, usize)>,
    fill: Option<Fill>,
}

impl Pool {
    /// A pool whose pieces hold `fill`, or nothing defined.
    pub(super) fn new(context: &Arc<Context>, fill: Option<Fill>) -> Self {
        Pool { context: Arc::clone(context), slabs: Vec::new(), shared: None, fill }
    }

    /// Address of a fresh piece; `None` if the GPU has not so much. `stream` fills it and is waited for.
    pub(super) fn take(&mut self, bytes: usize, stream: &Stream) -> Result<Option<u64>, CudaError> {
        let Some(bytes) = bytes.max(1).checked_next_multiple_of(ALIGNMENT) else { return Ok(None) };
        if bytes >= SLAB {
            return Ok(self.slab(bytes, stream)?.map(|index| self.slabs[index].start));
        }
        let (index, used) = match self.shared {
            Some((index, used)) if used + bytes <= SLAB => (index, used),
            _ => match self.slab(SLAB, stream)? {
                Some(index) => (index, 0),
                None => return Ok(None),
            },
        };
        self.shared = Some((index, used + bytes));
        Ok(Some(self.slabs[index].start + used as u64))
    }

    fn slab(&mut self, bytes: usize, stream: &Stream) -> Result<Option<usize>, CudaError> {
        let slab = match DeviceMemory::new(&self.context, bytes) {
            Ok(slab) => slab,
            Err(error) if error.code == CUDA_ERROR_OUT_OF_MEMORY => return Ok(None),
            Err(error) => return Err(error),
        };
        if let Some(fill) = self.fill {
            let byte = if fill == Fill::Poison { 0xff } else { 0 };
            // SAFETY: the slab was just allocated with that size, and nobody else has it yet.
            unsafe { stream.fill(slab.start, byte, slab.bytes) }?;
            stream.synchronize()?;
        }
        self.slabs.push(slab);
        Ok(Some(self.slabs.len() - 1))
    }
}
