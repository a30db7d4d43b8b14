//! Small data on its way to the GPU: a ring of host memory that it can read, with a twin on the GPU.
//!
//! Data is copied into the ring when work is enqueued, so the caller's memory is free at once and nothing waits,
//! unless the ring is full of what the GPU has not consumed yet.

use super::driver::{Context, Copy2d, CudaError, DeviceMemory, End, Event, PinnedMemory, Stream};
use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

pub(super) const CAPACITY: u64 = 8 << 20;
const ALIGNMENT: u64 = 256;

/// How long the GPU may take to consume a ring's worth of data.
const PATIENCE: Duration = Duration::from_secs(60);

pub(super) struct Staging {
    host: PinnedMemory,
    device: DeviceMemory,
    /// Bytes ever handed out, padding included; the place in the ring is this modulo its capacity.
    next: u64,
    /// Where each piece in flight starts, and the event after its last use.
    in_flight: VecDeque<(u64, Event)>,
}

/// A filled piece of the ring: [`Staging::sent`] must follow once the work that uses it is enqueued.
pub(super) struct Staged {
    start: u64,
    pub(super) host: *mut u8,
    pub(super) device: u64,
}

impl Staging {
    /// The longest piece there may be.
    pub(super) const LONGEST: usize = (CAPACITY / 4) as usize;

    pub(super) fn new(context: &Arc<Context>) -> Result<Self, CudaError> {
        Ok(Staging {
            host: PinnedMemory::new(context, CAPACITY as usize)?,
            device: DeviceMemory::new(context, CAPACITY as usize)?,
            next: 0,
            in_flight: VecDeque::new(),
        })
    }

    /// Takes in up to [`LONGEST`](Staging::LONGEST) bytes; `None` if the GPU does not consume the ring.
    pub(super) fn fill(&mut self, bytes: &[u8]) -> Result<Option<Staged>, CudaError> {
        let length = (bytes.len() as u64).next_multiple_of(ALIGNMENT);
        let left = CAPACITY - self.next % CAPACITY;
        let start = if length <= left { self.next } else { self.next + left };
        let asked = Instant::now();
        while let Some((first, event)) = self.in_flight.front()
            && first + CAPACITY < start + length
        {
            if event.is_complete()? {
                self.in_flight.pop_front();
            } else if asked.elapsed() > PATIENCE {
                return Ok(None);
            } else {
                std::thread::yield_now();
            }
        }
        self.next = start + length;
        let place = (start % CAPACITY) as usize;
        // SAFETY: the piece lies inside the ring, and whatever used it before is complete, as just seen.
        let host = unsafe {
            let host = self.host.start.add(place);
            host.copy_from_nonoverlapping(bytes.as_ptr(), bytes.len());
            host
        };
        Ok(Some(Staged { start, host, device: self.device.start + place as u64 }))
    }

    /// Enqueues the copy of a piece of `bytes` bytes to its twin, whose address it returns.
    pub(super) fn to_device(&self, staged: &Staged, bytes: usize, stream: &Stream) -> Result<u64, CudaError> {
        let (from, to) = (End::Host(staged.host.cast()), End::Device(staged.device));
        // SAFETY: both ends lie inside the two rings, and nobody else uses the piece until `sent`'s event.
        unsafe {
            stream.copy(&Copy2d { from, from_pitch: bytes, to, to_pitch: bytes, width: bytes, rows: 1 })
        }?;
        Ok(staged.device)
    }

    /// The piece is free again after `event`.
    pub(super) fn sent(&mut self, staged: &Staged, event: Event) {
        self.in_flight.push_back((staged.start, event));
    }
}
