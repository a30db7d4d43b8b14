//! A lane of a GPU as an external transport sees it: a stream, and where buffers lie.

use super::driver::{Copy2d, CopyGraph, CudaError, End, Event, EventPool, Piece, Stream};
use super::pacer::Gate;
use super::{CudaDevice, Memory};
use crate::{Buffer, DeviceError, Holds, Pace, PeerQueue};
use epsmoe_base::Lane;
use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::sync::{Arc, Mutex, PoisonError};

/// A stream and the memory of the rank that it works for.
pub struct CudaQueue {
    pub(super) stream: Stream,
    events: Arc<EventPool>,
    memory: Arc<Mutex<Memory>>,
    gate: Arc<Gate>,
    /// Memory of other ranks that the stream has read, which must stay until its work is done: a rank may fail and end
    /// while others still copy from it.
    lent: Mutex<Vec<Arc<Mutex<Memory>>>>,
    /// For so many copies at once.
    graphs: Mutex<BTreeMap<usize, CopyGraph>>,
    device: Arc<CudaDevice>,
}

/// Rows in the memory of a rank on a GPU of this process.
pub struct CudaRows {
    start: u64,
    /// Bytes between the starts of two rows.
    pitch: usize,
    memory: Arc<Mutex<Memory>>,
    device: Arc<CudaDevice>,
}

/// The most copies of a graph: an exchange of as many ranks.
const MOST_AT_ONCE: usize = 32;

impl CudaQueue {
    pub(super) fn new(
        lane: Lane,
        device: &Arc<CudaDevice>,
        events: &Arc<EventPool>,
        memory: &Arc<Mutex<Memory>>,
    ) -> Result<Self, CudaError> {
        let stream = match lane {
            Lane::Compute => Stream::new(&device.context)?,
            // Products fill the GPU, and the next one's blocks wait already: copies that are kernels of the driver's, and NCCL's
            // kernels, would come after all of them.
            Lane::Transfer => Stream::urgent(&device.context)?,
        };
        Ok(CudaQueue {
            stream,
            events: Arc::clone(events),
            memory: Arc::clone(memory),
            gate: Gate::new(&device.context)?,
            lent: Mutex::default(),
            graphs: Mutex::default(),
            device: Arc::clone(device),
        })
    }

    /// Address of a buffer's first element.
    pub fn address(&self, buffer: &Buffer) -> Result<u64, DeviceError> {
        self.memory.lock().unwrap_or_else(PoisonError::into_inner).address(buffer)
    }

    /// Copies pieces of the GPU's own memory, in one call where they are several.
    ///
    /// # Safety
    /// As [`Stream::copy`], for both ends of every piece.
    unsafe fn copy_pieces(&self, pieces: &[Piece]) -> Result<(), CudaError> {
        let mut graphs = self.graphs.lock().unwrap_or_else(PoisonError::into_inner);
        for pieces in pieces.chunks(MOST_AT_ONCE) {
            if let [Piece { from, to, bytes }] = *pieces {
                // SAFETY: the caller's promise.
                unsafe { self.stream.copy_bytes(from, to, bytes) }?;
                continue;
            }
            let graph = match graphs.entry(pieces.len()) {
                Entry::Occupied(made) => made.into_mut(),
                // SAFETY: the caller's promise.
                Entry::Vacant(none) => none.insert(unsafe { CopyGraph::new(&self.device.context, pieces) }?),
            };
            // SAFETY: the caller's promise.
            unsafe { graph.start(pieces, &self.stream) }?;
        }
        Ok(())
    }

    /// Keeps another rank's memory as long as this queue.
    fn keep(&self, memory: &Arc<Mutex<Memory>>) {
        let mut lent = self.lent.lock().unwrap_or_else(PoisonError::into_inner);
        let known = lent.iter().any(|known| Arc::ptr_eq(known, memory));
        if !known && !Arc::ptr_eq(memory, &self.memory) {
            lent.push(Arc::clone(memory));
        }
    }
}

impl PeerQueue for CudaQueue {
    type PeerRows = CudaRows;
    type Mark = Arc<Event>;

    fn share(&self, rows: &Buffer) -> Result<CudaRows, DeviceError> {
        Ok(CudaRows {
            start: self.address(rows)?,
            pitch: rows.stride * rows.dtype.bytes(),
            memory: Arc::clone(&self.memory),
            device: Arc::clone(&self.device),
        })
    }

    fn mark(&self) -> Result<Arc<Event>, DeviceError> {
        self.device.context.bind()?;
        Ok(Arc::new(self.events.record(&self.stream)?))
    }

    fn after(&self, mark: &Arc<Event>) -> Result<(), DeviceError> {
        self.device.context.bind()?;
        Ok(self.stream.wait(mark)?)
    }

    unsafe fn copy(&self, copies: &[(&CudaRows, &Buffer)]) -> Result<(), DeviceError> {
        let context = &self.device.context;
        context.bind()?;
        let mut pieces = Vec::with_capacity(copies.len());
        for (rows, buffer) in copies {
            self.keep(&rows.memory);
            let size = buffer.dtype.bytes();
            let copy = Copy2d {
                from: End::Device(rows.start),
                from_pitch: rows.pitch,
                to: End::Device(self.address(buffer)?),
                to_pitch: buffer.stride * size,
                width: buffer.width * size,
                rows: buffer.rows,
            }
            .without_gaps();
            let peer = &rows.device.context;
            let near = Arc::ptr_eq(peer, context);
            match copy.piece().filter(|_| near) {
                Some(piece) => pieces.push(piece),
                // SAFETY: the caller's promise for both ends, which `share` and `address` found inside their allocations; the
                // source is kept, above.
                None if near => unsafe { self.stream.copy(&copy) }?,
                // SAFETY: as above.
                None => unsafe { self.stream.copy_from_peer(&copy, peer) }?,
            }
        }
        // SAFETY: as above.
        Ok(unsafe { self.copy_pieces(&pieces) }?)
    }

    fn holds(&self) -> Option<&dyn Holds> {
        Some(self)
    }
}

impl Holds for CudaQueue {
    fn begin(&self) -> Result<(), DeviceError> {
        self.device.context.bind()?;
        Ok(self.gate.begin(&self.stream)?)
    }

    fn hold(&self, pace: Box<dyn Pace>) -> Result<(), DeviceError> {
        self.device.context.bind()?;
        Ok(self.gate.hold(&self.stream, &self.device.pacer, pace)?)
    }
}
