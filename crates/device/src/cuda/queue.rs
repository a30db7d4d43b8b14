//! A lane of a GPU as an external transport sees it: a stream, and where buffers lie.

use super::Memory;
use super::driver::{Context, Copy2d, CudaError, End, Event, EventPool, Stream};
use crate::{Buffer, DeviceError, PeerQueue};
use std::sync::{Arc, Mutex, PoisonError};

/// A stream and the memory of the rank that it works for.
pub struct CudaQueue {
    pub(super) stream: Stream,
    events: Arc<EventPool>,
    memory: Arc<Mutex<Memory>>,
    context: Arc<Context>,
}

/// Rows in the memory of a rank on a GPU of this process.
pub struct CudaRows {
    start: u64,
    /// Bytes between the starts of two rows.
    pitch: usize,
}

impl CudaQueue {
    pub(super) fn new(
        context: &Arc<Context>,
        events: &Arc<EventPool>,
        memory: &Arc<Mutex<Memory>>,
    ) -> Result<Self, CudaError> {
        Ok(CudaQueue {
            stream: Stream::new(context)?,
            events: Arc::clone(events),
            memory: Arc::clone(memory),
            context: Arc::clone(context),
        })
    }

    /// Address of a buffer's first element.
    pub fn address(&self, buffer: &Buffer) -> Result<u64, DeviceError> {
        self.memory.lock().unwrap_or_else(PoisonError::into_inner).address(buffer)
    }
}

impl PeerQueue for CudaQueue {
    type PeerRows = CudaRows;
    type Mark = Arc<Event>;

    fn share(&self, rows: &Buffer) -> Result<CudaRows, DeviceError> {
        Ok(CudaRows { start: self.address(rows)?, pitch: rows.stride * rows.dtype.bytes() })
    }

    fn mark(&self) -> Result<Arc<Event>, DeviceError> {
        self.context.bind()?;
        Ok(Arc::new(self.events.record(&self.stream)?))
    }

    fn after(&self, mark: &Arc<Event>) -> Result<(), DeviceError> {
        self.context.bind()?;
        Ok(self.stream.wait(mark)?)
    }

    unsafe fn copy_from(&self, from: &CudaRows, to: &Buffer) -> Result<(), DeviceError> {
        self.context.bind()?;
        let size = to.dtype.bytes();
        let copy = Copy2d {
            from: End::Device(from.start),
            from_pitch: from.pitch,
            to: End::Device(self.address(to)?),
            to_pitch: to.stride * size,
            width: to.width * size,
            rows: to.rows,
        };
        // SAFETY: the caller's promise for both ends; the target lies inside its allocation, as `address` saw.
        Ok(unsafe { self.stream.copy(&copy) }?)
    }
}
