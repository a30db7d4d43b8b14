//! Rows between GPUs of different processes, by NCCL. The library is loaded when the first communicator is made.
//!
//! Communicators never block their caller: every call that may take time is looked after until it is done, and gives up when
//! `carry_on` says so. What a call put into a stream runs there like any other work.

mod library;

pub use library::UNIQUE_ID_BYTES;

use super::driver::{Copy2d, CudaError, DeviceMemory, End, Stream};
use super::{CudaDevice, CudaQueue};
use crate::{Buffer, DeviceError};
use epsmoe_base::Fault;
use library::{BYTES, Code, Comm, Config, Nccl, SUCCESS, UniqueId};
use std::collections::HashMap;
use std::ffi::{c_int, c_void};
use std::ptr::null_mut;
use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// A call that NCCL refused, or that was given up.
#[derive(Debug, thiserror::Error)]
pub enum NcclError {
    /// The library said no.
    #[error("NCCL failed at {call}: {reason}")]
    Failed {
        /// Its function.
        call: &'static str,
        /// What it says.
        reason: String,
    },
    /// The world has stopped, or the deadline has passed.
    #[error(transparent)]
    GivenUp(#[from] Fault),
    /// The GPU said no.
    #[error(transparent)]
    Device(#[from] DeviceError),
}

impl From<CudaError> for NcclError {
    fn from(error: CudaError) -> Self {
        NcclError::Device(error.into())
    }
}

/// Whether it is worth waiting on; asked again and again.
pub type CarryOn<'a> = &'a mut dyn FnMut() -> Result<(), Fault>;

/// Version of the library, as 10 000 · major + 100 · minor + patch.
///
/// # Errors
/// It is not installed.
pub fn nccl_version() -> Result<i32, NcclError> {
    let nccl = Nccl::loaded()?;
    let mut version = 0;
    // SAFETY: `version` outlives the call.
    nccl.check("ncclGetVersion", unsafe { (nccl.get_version)(&mut version) }, null_mut())?;
    Ok(version)
}

/// Makes what ranks must know to find each other.
///
/// # Errors
/// There is no NCCL, or it finds no network interface.
pub fn nccl_unique_id() -> Result<[u8; UNIQUE_ID_BYTES], NcclError> {
    let nccl = Nccl::loaded()?;
    let mut id = UniqueId([0; UNIQUE_ID_BYTES]);
    // SAFETY: `id` outlives the call.
    nccl.check("ncclGetUniqueId", unsafe { (nccl.get_unique_id)(&mut id) }, null_mut())?;
    Ok(id.0)
}

/// One rank's end of the exchanges among some ranks.
pub struct Communicator {
    nccl: &'static Nccl,
    handle: Mutex<Handle>,
    device: Arc<CudaDevice>,
    /// Memory for rows with gaps between them, which are packed before they leave and unpacked when they came.
    packed: Mutex<HashMap<Packed, Vec<DeviceMemory>>>,
}

/// Whose packed rows: those that a stream sends to a rank, or gets from it. Exchanges of a stream follow each other, so
/// the next one may use the same memory.
#[derive(PartialEq, Eq, Hash)]
struct Packed {
    stream: usize,
    sends: bool,
    position: usize,
}

/// Null once the communicator was given up.
struct Handle(Comm);

// SAFETY: a communicator may be used from any thread, one at a time, which the mutex around it sees to.
unsafe impl Send for Handle {}

/// Rows for one rank, or of one.
#[derive(Clone, Copy)]
pub struct Part<'a> {
    /// The rank's position in the communicator.
    pub position: usize,
    /// The rows.
    pub rows: &'a Buffer,
}

impl Communicator {
    /// Meets the others of a world of `size` that know `id`, as number `rank`; rows will be those of `device`.
    ///
    /// # Errors
    /// There is no NCCL, the others did not come, or they cannot be reached.
    pub fn meet(
        device: &Arc<CudaDevice>,
        id: &[u8; UNIQUE_ID_BYTES],
        rank: usize,
        size: usize,
        carry_on: CarryOn<'_>,
    ) -> Result<Self, NcclError> {
        let nccl = Nccl::loaded()?;
        Self::make("ncclCommInitRankConfig", nccl, device, None, carry_on, |comm, config| {
            // SAFETY: the GPU's context is current; both results outlive the call.
            unsafe { (nccl.init_rank)(comm, size as c_int, UniqueId(*id), rank as c_int, config) }
        })
    }

    /// The communicator of those who call with the same `group`, ordered by `position`. All ranks of this one call it.
    ///
    /// # Errors
    /// The others did not come.
    pub fn split(&self, group: usize, position: usize, carry_on: CarryOn<'_>) -> Result<Self, NcclError> {
        let parent = self.handle()?;
        Self::make("ncclCommSplit", self.nccl, &self.device, Some(&parent), carry_on, |comm, config| {
            // SAFETY: the parent lives while its lock is held; both results outlive the call.
            unsafe { (self.nccl.split)(parent.0, group as c_int, position as c_int, comm, config) }
        })
    }

    /// What `call` made; a communicator that is split is there only once its `parent` is done with that.
    fn make(
        name: &'static str,
        nccl: &'static Nccl,
        device: &Arc<CudaDevice>,
        parent: Option<&Handle>,
        carry_on: CarryOn<'_>,
        call: impl FnOnce(&mut Comm, &mut Config) -> Code,
    ) -> Result<Self, NcclError> {
        device.context.bind()?;
        let mut handle = Handle(null_mut());
        let code = call(&mut handle.0, &mut Config::non_blocking());
        let made = nccl
            .check(name, code, parent.map_or(handle.0, |parent| parent.0))
            .and_then(|()| parent.map_or(Ok(()), |parent| settle(nccl, name, parent, carry_on)))
            .and_then(|()| settle(nccl, name, &handle, carry_on));
        // What was half made is given up when it is dropped.
        let communicator = Communicator {
            nccl,
            handle: Mutex::new(handle),
            device: Arc::clone(device),
            packed: Mutex::default(),
        };
        made.map(|()| communicator)
    }

    fn handle(&self) -> Result<MutexGuard<'_, Handle>, NcclError> {
        let handle = self.handle.lock().unwrap_or_else(PoisonError::into_inner);
        match handle.0.is_null() {
            false => Ok(handle),
            true => Err(NcclError::Failed { call: "a call", reason: "the communicator was given up".into() }),
        }
    }

    /// Puts an exchange into a queue: each part of `send` leaves for its rank, each of `receive` comes from one. Parts
    /// without rows do not travel.
    ///
    /// # Safety
    /// All sent rows are declared reads and all received rows declared writes of the work that the queue was given to, which
    /// has passed the hazard check.
    ///
    /// # Errors
    /// The others did not come, or NCCL or the GPU failed.
    pub unsafe fn exchange(
        &self,
        queue: &CudaQueue,
        send: &[Part<'_>],
        receive: &[Part<'_>],
        carry_on: CarryOn<'_>,
    ) -> Result<(), NcclError> {
        self.device.context.bind()?;
        let (leaves, comes) = (self.spans(queue, send, true)?, self.spans(queue, receive, false)?);
        for span in leaves.iter().filter(|span| span.packed) {
            // SAFETY: the caller's promise; the packed memory is this exchange's own.
            unsafe { span.copy(&queue.stream, true) }?;
        }
        let handle = self.handle()?;
        let nccl = self.nccl;
        // SAFETY: the group ends below, whatever happens in it.
        nccl.check("ncclGroupStart", unsafe { (nccl.group_start)() }, handle.0)?;
        let stream = queue.stream.raw().cast();
        let sent = leaves.iter().try_for_each(|span| {
            let (start, peer) = (span.start as *const c_void, span.position as c_int);
            // SAFETY: the span is memory of this rank's GPU that nothing unordered writes.
            let code = unsafe { (nccl.send)(start, span.bytes(), BYTES, peer, handle.0, stream) };
            nccl.check("ncclSend", code, handle.0)
        });
        let received = comes.iter().try_for_each(|span| {
            let (start, peer) = (span.start as *mut c_void, span.position as c_int);
            // SAFETY: the span is memory of this rank's GPU that nothing unordered uses.
            let code = unsafe { (nccl.receive)(start, span.bytes(), BYTES, peer, handle.0, stream) };
            nccl.check("ncclRecv", code, handle.0)
        });
        // SAFETY: the group was begun above.
        let ended = nccl.check("ncclGroupEnd", unsafe { (nccl.group_end)() }, handle.0);
        sent.and(received).and(ended)?;
        settle(nccl, "ncclGroupEnd", &handle, carry_on)?;
        drop(handle);
        for span in comes.iter().filter(|span| span.packed) {
            // SAFETY: as above.
            unsafe { span.copy(&queue.stream, false) }?;
        }
        Ok(())
    }

    /// Where the bytes of parts leave from or come to: their own memory, or packed memory if their rows have gaps.
    fn spans(&self, queue: &CudaQueue, parts: &[Part<'_>], sends: bool) -> Result<Vec<Span>, NcclError> {
        let stream = queue.stream.raw() as usize;
        let mut spans = Vec::with_capacity(parts.len());
        for part in parts.iter().filter(|part| part.rows.rows > 0 && part.rows.width > 0) {
            let (rows, size) = (part.rows, part.rows.dtype.bytes());
            let (width, pitch) = (rows.width * size, rows.stride * size);
            let start = queue.address(rows)?;
            let packed = rows.rows > 1 && pitch != width;
            let mut span =
                Span { position: part.position, start, width, rows: rows.rows, packed, from: start, pitch };
            if packed {
                span.start = self.packed(Packed { stream, sends, position: part.position }, span.bytes())?;
            }
            spans.push(span);
        }
        Ok(spans)
    }

    /// Where packed rows lie. Memory that became too small stays until the end: the stream may still be at work on it.
    fn packed(&self, whose: Packed, bytes: usize) -> Result<u64, CudaError> {
        let mut packed = self.packed.lock().unwrap_or_else(PoisonError::into_inner);
        let all = packed.entry(whose).or_default();
        match all.last().filter(|memory| memory.bytes >= bytes) {
            Some(memory) => Ok(memory.start),
            None => {
                let memory = DeviceMemory::new(&self.device.context, bytes.next_power_of_two())?;
                let start = memory.start;
                all.push(memory);
                Ok(start)
            }
        }
    }

    /// What went wrong behind the caller's back, if something did.
    pub fn trouble(&self) -> Option<String> {
        let handle = self.handle().ok()?;
        match state(self.nccl, &handle) {
            Ok(_) => None,
            Err(error) => Some(error.to_string()),
        }
    }

    /// Waits until the others have all they need, and ends the communicator in peace.
    ///
    /// # Errors
    /// They did not come so far.
    pub fn finish(&self, carry_on: CarryOn<'_>) -> Result<(), NcclError> {
        let mut handle = self.handle()?;
        self.device.context.bind()?;
        let nccl = self.nccl;
        // SAFETY: the handle is alive, and null from here on.
        nccl.check("ncclCommFinalize", unsafe { (nccl.finalize)(handle.0) }, handle.0)?;
        settle(nccl, "ncclCommFinalize", &handle, carry_on)?;
        let raw = std::mem::replace(&mut handle.0, null_mut());
        // SAFETY: as above; it was finalised.
        nccl.check("ncclCommDestroy", unsafe { (nccl.destroy)(raw) }, null_mut())
    }

    /// Gives up whatever is under way, so that the streams that wait for it go on. NCCL may wait for other ranks before it
    /// returns, which is why it does so on a thread of its own, and nobody waits for that for long.
    pub fn abort(&self) {
        const PATIENCE: Duration = Duration::from_secs(1);
        let mut handle = self.handle.lock().unwrap_or_else(PoisonError::into_inner);
        let given_up = std::mem::replace(&mut *handle, Handle(null_mut()));
        drop(handle);
        if given_up.0.is_null() {
            return;
        }
        let (nccl, device) = (self.nccl, Arc::clone(&self.device));
        let (done, is_done) = channel();
        let call = move || {
            let Handle(raw) = { given_up };
            if device.context.bind().is_ok() {
                // SAFETY: alive until now, and never used again.
                let _ = unsafe { (nccl.abort)(raw) };
            }
            // Who waited may have gone.
            let _ = done.send(());
        };
        if std::thread::Builder::new().name("nccl-abort".into()).spawn(call).is_ok() {
            let _ = is_done.recv_timeout(PATIENCE);
        }
    }
}

impl Drop for Communicator {
    fn drop(&mut self) {
        self.abort();
    }
}

/// A part's bytes in one piece.
struct Span {
    position: usize,
    /// Where the piece begins.
    start: u64,
    /// Bytes of a row.
    width: usize,
    rows: usize,
    /// Whether the piece is not where the rows are.
    packed: bool,
    /// Where the rows begin, and the bytes from one to the next.
    from: u64,
    pitch: usize,
}

impl Span {
    fn bytes(&self) -> usize {
        self.width * self.rows
    }

    /// Copies the rows to the piece, or back.
    ///
    /// # Safety
    /// As [`Stream::copy`].
    unsafe fn copy(&self, stream: &Stream, pack: bool) -> Result<(), CudaError> {
        let (rows, piece) = ((End::Device(self.from), self.pitch), (End::Device(self.start), self.width));
        let ((from, from_pitch), (to, to_pitch)) = if pack { (rows, piece) } else { (piece, rows) };
        // SAFETY: the caller's promise.
        unsafe { stream.copy(&Copy2d { from, from_pitch, to, to_pitch, width: self.width, rows: self.rows }) }
    }
}

/// Looks after a call until it is done.
fn settle(nccl: &Nccl, call: &'static str, handle: &Handle, carry_on: CarryOn<'_>) -> Result<(), NcclError> {
    /// So many looks without a pause; a call that only launches is done by then.
    const EAGER: usize = 1000;
    const PAUSE: Duration = Duration::from_micros(50);
    for look in 0.. {
        match state(nccl, handle) {
            Ok(true) => return Ok(()),
            Ok(false) => carry_on()?,
            Err(NcclError::Failed { reason, .. }) => return Err(NcclError::Failed { call, reason }),
            Err(error) => return Err(error),
        }
        if look > EAGER {
            std::thread::sleep(PAUSE);
        }
    }
    Ok(())
}

/// Whether the communicator is done with what it was called for.
fn state(nccl: &Nccl, handle: &Handle) -> Result<bool, NcclError> {
    let mut code = SUCCESS;
    // SAFETY: the handle is alive; `code` outlives the call.
    let asked = unsafe { (nccl.async_error)(handle.0, &mut code) };
    nccl.check("ncclCommGetAsyncError", asked, handle.0)?;
    nccl.check("a call", code, handle.0)?;
    Ok(code == SUCCESS)
}
