//! What brings weights to a GPU: each thread that loads has a carrier, whose memory the GPU reads by itself. While one
//! half of it travels the other is filled.

use super::driver::{Context, Copy2d, CudaError, End, PinnedMemory, Stream};
use std::sync::{Arc, Mutex, PoisonError};

/// Bytes that travel at once: long enough for the speed of the link, short enough to stay in caches.
const HALF: usize = 2 << 20;

/// Lines of bytes that follow one another in the host's memory, and lie `pitch` bytes apart on the GPU.
#[derive(Clone, Copy)]
pub(super) struct Lines {
    pub(super) width: usize,
    pub(super) count: usize,
    pub(super) pitch: usize,
}

/// Carriers that nobody uses at the moment. There are as many as threads that ever loaded at once.
pub(super) struct Carriers {
    context: Arc<Context>,
    idle: Mutex<Vec<Carrier>>,
}

impl Carriers {
    pub(super) fn new(context: &Arc<Context>) -> Self {
        Carriers { context: Arc::clone(context), idle: Mutex::default() }
    }

    /// Lends a carrier; what it was given is on the GPU afterwards.
    pub(super) fn with<T>(
        &self,
        work: impl FnOnce(&mut Carrier) -> Result<T, CudaError>,
    ) -> Result<T, CudaError> {
        let idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner).pop();
        let mut carrier = idle.map_or_else(|| Carrier::new(&self.context), Ok)?;
        let done = work(&mut carrier);
        carrier.finish()?;
        self.idle.lock().unwrap_or_else(PoisonError::into_inner).push(carrier);
        done
    }
}

pub(super) struct Carrier {
    halves: [Half; 2],
    /// The one to be filled next.
    next: usize,
}

/// Memory, and the stream that what lies there travels by.
struct Half {
    stream: Stream,
    memory: PinnedMemory,
}

impl Half {
    fn new(context: &Arc<Context>) -> Result<Self, CudaError> {
        Ok(Half { stream: Stream::new(context)?, memory: PinnedMemory::new(context, HALF)? })
    }
}

impl Drop for Half {
    fn drop(&mut self) {
        // The memory is about to be given back. A failed GPU reads nothing.
        let _ = self.stream.synchronize();
    }
}

impl Carrier {
    fn new(context: &Arc<Context>) -> Result<Self, CudaError> {
        Ok(Carrier { halves: [Half::new(context)?, Half::new(context)?], next: 0 })
    }

    /// Brings the first `width · count` bytes of `from` to the GPU, soon: they are read now.
    ///
    /// # Safety
    /// From `to` on there is memory of the GPU for these lines that nobody uses before this carrier has
    /// [finished](Carrier::finish).
    pub(super) unsafe fn bring(&mut self, from: &[u8], to: u64, lines: Lines) -> Result<(), CudaError> {
        let Lines { width, count, pitch } = lines;
        let from = &from[..width * count];
        if count <= 1 || width == pitch {
            for (piece, at) in from.chunks(HALF).zip((to..).step_by(HALF)) {
                self.send(piece, at, Lines { width: piece.len(), count: 1, pitch })?;
            }
        } else if width > HALF {
            for (line, at) in from.chunks(width).zip((to..).step_by(pitch)) {
                // SAFETY: the caller's promise, for one of the lines.
                unsafe { self.bring(line, at, Lines { count: 1, ..lines }) }?;
            }
        } else {
            let count = HALF / width.max(1);
            for (piece, at) in from.chunks(count * width).zip((to..).step_by(count * pitch)) {
                self.send(piece, at, Lines { count: piece.len() / width, ..lines })?;
            }
        }
        Ok(())
    }

    /// Lets lines that fit in a half travel.
    fn send(&mut self, bytes: &[u8], to: u64, lines: Lines) -> Result<(), CudaError> {
        let Half { stream, memory } = &self.halves[self.next];
        self.next = 1 - self.next;
        stream.synchronize()?;
        let copy = Copy2d {
            from: End::Host(memory.start.cast()),
            from_pitch: lines.width,
            to: End::Device(to),
            to_pitch: lines.pitch,
            width: lines.width,
            rows: lines.count,
        };
        // SAFETY: the bytes fit, as `bring` cuts them; what lay in the half has travelled, and the half stays as it is until
        // its stream is waited for. The other end is the caller's promise to `bring`.
        unsafe {
            memory.start.copy_from_nonoverlapping(bytes.as_ptr(), bytes.len());
            stream.copy(&copy)
        }
    }

    /// Waits until everything is where it was to be brought.
    fn finish(&self) -> Result<(), CudaError> {
        self.halves.iter().try_for_each(|half| half.stream.synchronize())
    }
}
