//! The CUDA driver's calls that this room needs, each checked, with owners for what must be given back.

use super::layout::{Field, Layout};
use cudarc::driver::sys;
use std::ffi::{CStr, CString, c_int, c_uint, c_void};
use std::ptr::null_mut;
use std::sync::{Arc, Mutex, PoisonError};

/// A call that the driver refused, or an earlier one whose execution failed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the GPU driver failed at {call}: {reason}")]
pub(super) struct CudaError {
    pub(super) call: &'static str,
    pub(super) code: sys::CUresult,
    reason: String,
}

impl CudaError {
    /// The driver has nothing to give of what was asked of `call`.
    fn nothing(call: &'static str) -> Self {
        CudaError { call, code: sys::CUresult::CUDA_ERROR_NOT_SUPPORTED, reason: "nothing is left".into() }
    }
}

/// `Ok` if the driver returned success.
fn check(call: &'static str, code: sys::CUresult) -> Result<(), CudaError> {
    if code == sys::CUresult::CUDA_SUCCESS {
        return Ok(());
    }
    let mut text = std::ptr::null();
    // SAFETY: `text` outlives the call, which points it at a string that lives as long as the driver.
    let known = unsafe { sys::cuGetErrorString(code, &mut text) } == sys::CUresult::CUDA_SUCCESS;
    let reason = match known && !text.is_null() {
        // SAFETY: the driver gave a string that ends in zero.
        true => unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned(),
        false => format!("error {code:?}"),
    };
    Err(CudaError { call, code, reason })
}

/// Calls the driver: `call!(cuFunction(arguments))`. The unsafe block around it says why it is sound.
macro_rules! call {
    ($function:ident($($argument:expr),* $(,)?)) => {
        check(
            stringify!($function),
            $crate::cuda::driver::account::counted(stringify!($function), || sys::$function($($argument),*)),
        )
    };
}

mod account;
mod copies;
mod graph;
mod partition;

pub use account::{DriverCalls, count_driver_calls, take_driver_calls};
pub(super) use copies::{CopyGraph, Piece};
pub(super) use graph::Graph;
pub(super) use partition::Partition;

/// The version of CUDA that the driver speaks, as 1000 · major + 10 · minor; absent without a driver.
pub(super) fn driver_version() -> Option<i32> {
    let mut version = 0;
    // SAFETY: loading the library and asking its version touch nothing of ours; the call is made only if the
    // library is there.
    let answer = unsafe { sys::is_culib_present().then(|| call!(cuDriverGetVersion(&mut version))) };
    answer?.ok()?;
    Some(version)
}

/// Starts the driver and counts the GPUs. Only once [`driver_version`] has found it.
pub(super) fn count_devices() -> Result<usize, CudaError> {
    let mut count = 0;
    // SAFETY: the driver is present; `count` outlives the call.
    let counted = unsafe { call!(cuInit(0)).and_then(|()| call!(cuDeviceGetCount(&mut count))) };
    match counted {
        Err(error) if error.code == sys::CUresult::CUDA_ERROR_NO_DEVICE => Ok(0),
        counted => counted.map(|()| count.max(0) as usize),
    }
}

/// The memory and kernels of a process on one GPU (its primary context).
pub(super) struct Context {
    device: sys::CUdevice,
    handle: sys::CUcontext,
}

// SAFETY: a context may be used from any thread; every use makes it current on its own thread first.
unsafe impl Send for Context {}
// SAFETY: as above; the driver locks inside.
unsafe impl Sync for Context {}

impl Context {
    /// The context of GPU number `ordinal`, below [`count_devices`].
    pub(super) fn retain(ordinal: usize) -> Result<Self, CudaError> {
        let (mut device, mut handle) = (0, null_mut());
        // SAFETY: the driver was started; both results outlive the calls. `Drop` releases what is retained.
        unsafe {
            call!(cuDeviceGet(&mut device, ordinal as i32))?;
            call!(cuDevicePrimaryCtxRetain(&mut handle, device))?;
        }
        let context = Context { device, handle };
        context.bind()?;
        Ok(context)
    }

    /// Makes this the context that the calling thread's driver calls mean.
    pub(super) fn bind(&self) -> Result<(), CudaError> {
        // SAFETY: the handle is retained until `Drop`.
        unsafe { call!(cuCtxSetCurrent(self.handle)) }
    }

    pub(super) fn attribute(&self, attribute: sys::CUdevice_attribute) -> Result<i32, CudaError> {
        let mut value = 0;
        // SAFETY: `value` outlives the call.
        unsafe { call!(cuDeviceGetAttribute(&mut value, attribute, self.device)) }?;
        Ok(value)
    }

    pub(super) fn name(&self) -> Result<String, CudaError> {
        let mut name = [0; 128];
        // SAFETY: the driver writes at most as many bytes as it is told there are, the last of them zero.
        let name = unsafe {
            call!(cuDeviceGetName(name.as_mut_ptr(), name.len() as i32, self.device))?;
            CStr::from_ptr(name.as_ptr())
        };
        Ok(name.to_string_lossy().into_owned())
    }

    /// Lets copies of this GPU reach the memory of another one without a detour; whether they can.
    pub(super) fn reach(&self, peer: &Context) -> Result<bool, CudaError> {
        let mut can = 0;
        // SAFETY: `can` outlives the call.
        unsafe { call!(cuDeviceCanAccessPeer(&mut can, self.device, peer.device)) }?;
        if can == 0 {
            return Ok(false);
        }
        self.bind()?;
        // SAFETY: both contexts are retained.
        match unsafe { call!(cuCtxEnablePeerAccess(peer.handle, 0)) } {
            Err(error) if error.code == sys::CUresult::CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED => Ok(true),
            enabled => enabled.map(|()| true),
        }
    }

    /// Free and total bytes of the GPU's memory.
    pub(super) fn memory(&self) -> Result<(u64, u64), CudaError> {
        self.bind()?;
        let (mut free, mut total) = (0, 0);
        // SAFETY: both results outlive the call.
        unsafe { call!(cuMemGetInfo_v2(&mut free, &mut total)) }?;
        Ok((free as u64, total as u64))
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: retained once in `retain`; everything made in it holds the context alive.
        // What it returns is of no use: the process is giving the GPU up.
        let _ = unsafe { sys::cuDevicePrimaryCtxRelease_v2(self.device) };
    }
}

/// An ordered queue of GPU work.
pub(super) struct Stream {
    handle: sys::CUstream,
    context: Arc<Context>,
    /// Where its kernels run, if not anywhere.
    _partition: Option<Arc<Partition>>,
}

// SAFETY: streams may be used from any thread; the driver locks inside.
unsafe impl Send for Stream {}
// SAFETY: as above.
unsafe impl Sync for Stream {}

impl Stream {
    pub(super) fn new(context: &Arc<Context>) -> Result<Self, CudaError> {
        Self::of_priority(context, 0)
    }

    /// A stream whose kernels are given the multiprocessors that become free before those of [others](Self::new).
    pub(super) fn urgent(context: &Arc<Context>) -> Result<Self, CudaError> {
        context.bind()?;
        let (mut least, mut greatest) = (0, 0);
        // SAFETY: the context is current; both words are written.
        unsafe { call!(cuCtxGetStreamPriorityRange(&mut least, &mut greatest)) }?;
        Self::of_priority(context, greatest)
    }

    fn of_priority(context: &Arc<Context>, priority: c_int) -> Result<Self, CudaError> {
        context.bind()?;
        let mut handle = null_mut();
        let flags = sys::CUstream_flags::CU_STREAM_NON_BLOCKING as c_uint;
        // SAFETY: the context is current; `Drop` destroys what is made.
        unsafe { call!(cuStreamCreateWithPriority(&mut handle, flags, priority)) }?;
        Ok(Stream { handle, context: Arc::clone(context), _partition: None })
    }

    /// Lets nothing enqueued from now on start before the word at `address` is `value` or at most half of its range
    /// past it.
    ///
    /// # Safety
    /// The word is aligned memory that the GPU can read and that stays allocated until the stream has come so far.
    pub(super) unsafe fn wait_value(&self, address: u64, value: u32) -> Result<(), CudaError> {
        let flags = sys::CUstreamWaitValue_flags::CU_STREAM_WAIT_VALUE_GEQ as c_uint;
        // SAFETY: the caller's promise.
        unsafe { call!(cuStreamWaitValue32_v2(self.handle, address, value, flags)) }
    }

    /// Writes a word once everything enqueued before is done.
    ///
    /// # Safety
    /// As [`wait_value`](Stream::wait_value), and nothing unordered writes the word meanwhile.
    pub(super) unsafe fn write_value(&self, address: u64, value: u32) -> Result<(), CudaError> {
        let flags = sys::CUstreamWriteValue_flags::CU_STREAM_WRITE_VALUE_DEFAULT as c_uint;
        // SAFETY: the caller's promise.
        unsafe { call!(cuStreamWriteValue32_v2(self.handle, address, value, flags)) }
    }

    /// Copies bytes in one piece, between any two memories that the GPU sees.
    ///
    /// # Safety
    /// As [`fill`](Stream::fill), for both ends of the copy.
    pub(super) unsafe fn copy_bytes(&self, from: u64, to: u64, bytes: usize) -> Result<(), CudaError> {
        // SAFETY: the caller's promise.
        unsafe { call!(cuMemcpyAsync(to, from, bytes, self.handle)) }
    }

    /// What other libraries of CUDA know it by.
    pub(super) fn raw(&self) -> sys::CUstream {
        self.handle
    }

    /// Blocks until all its work is done.
    pub(super) fn synchronize(&self) -> Result<(), CudaError> {
        // SAFETY: the handle lives until `Drop`.
        unsafe { call!(cuStreamSynchronize(self.handle)) }
    }

    /// Whether all its work is done.
    pub(super) fn is_idle(&self) -> Result<bool, CudaError> {
        // SAFETY: the handle lives until `Drop`.
        match unsafe { sys::cuStreamQuery(self.handle) } {
            sys::CUresult::CUDA_ERROR_NOT_READY => Ok(false),
            code => check("cuStreamQuery", code).map(|()| true),
        }
    }

    /// Lets nothing enqueued from now on start before what `event` was last recorded after.
    pub(super) fn wait(&self, event: &Event) -> Result<(), CudaError> {
        // SAFETY: both handles are alive; the driver takes the event's record when called.
        unsafe { call!(cuStreamWaitEvent(self.handle, event.handle, 0)) }
    }

    /// Sets `bytes` bytes from `start` on.
    ///
    /// # Safety
    /// The range is device memory that stays allocated until the stream has come so far, and that nothing
    /// unordered uses meanwhile.
    pub(super) unsafe fn fill(&self, start: u64, byte: u8, bytes: usize) -> Result<(), CudaError> {
        if bytes == 0 {
            return Ok(());
        }
        // SAFETY: the caller's promise.
        unsafe { call!(cuMemsetD8Async(start, byte, bytes, self.handle)) }
    }

    /// Copies rows of bytes.
    ///
    /// # Safety
    /// As [`fill`](Stream::fill), for both ends of the copy; host memory lives until the stream has come so far.
    pub(super) unsafe fn copy(&self, copy: &Copy2d) -> Result<(), CudaError> {
        if copy.width == 0 || copy.rows == 0 {
            return Ok(());
        }
        if copy.rows == 1 {
            let address = |end: End| match end {
                End::Host(pointer) => pointer as u64,
                End::Device(pointer) => pointer,
            };
            // A single row may be longer than pitches can be. SAFETY: the caller's promise; addresses of host and GPUs
            // are of one space, in which the driver tells them apart.
            return unsafe { self.copy_bytes(address(copy.from), address(copy.to), copy.width) };
        }
        let place = |end: End| match end {
            End::Host(pointer) => (sys::CUmemorytype::CU_MEMORYTYPE_HOST, pointer, 0),
            End::Device(pointer) => (sys::CUmemorytype::CU_MEMORYTYPE_DEVICE, null_mut(), pointer),
        };
        let (from_type, from_host, from_device) = place(copy.from);
        let (to_type, to_host, to_device) = place(copy.to);
        let described = sys::CUDA_MEMCPY2D {
            srcXInBytes: 0,
            srcY: 0,
            srcMemoryType: from_type,
            srcHost: from_host,
            srcDevice: from_device,
            srcArray: null_mut(),
            srcPitch: copy.from_pitch,
            dstXInBytes: 0,
            dstY: 0,
            dstMemoryType: to_type,
            dstHost: to_host,
            dstDevice: to_device,
            dstArray: null_mut(),
            dstPitch: copy.to_pitch,
            WidthInBytes: copy.width,
            Height: copy.rows,
        };
        // SAFETY: the caller's promise.
        unsafe { call!(cuMemcpy2DAsync_v2(&described, self.handle)) }
    }

    /// Copies rows of bytes from the memory of another GPU, directly or by way of the host, as the two can.
    ///
    /// # Safety
    /// As [`copy`](Stream::copy); the source is memory of `peer`, the target of this stream's GPU.
    pub(super) unsafe fn copy_from_peer(&self, copy: &Copy2d, peer: &Context) -> Result<(), CudaError> {
        let (End::Device(from), End::Device(to)) = (copy.from, copy.to) else {
            // SAFETY: the caller's promise; host memory is everybody's.
            return unsafe { self.copy(copy) };
        };
        if copy.rows == 1 {
            // SAFETY: the caller's promise.
            return unsafe {
                call!(cuMemcpyPeerAsync(to, self.context.handle, from, peer.handle, copy.width, self.handle))
            };
        }
        let device = sys::CUmemorytype::CU_MEMORYTYPE_DEVICE;
        let described = sys::CUDA_MEMCPY3D_PEER {
            srcXInBytes: 0,
            srcY: 0,
            srcZ: 0,
            srcLOD: 0,
            srcMemoryType: device,
            srcHost: null_mut(),
            srcDevice: from,
            srcArray: null_mut(),
            srcContext: peer.handle,
            srcPitch: copy.from_pitch,
            srcHeight: copy.rows,
            dstXInBytes: 0,
            dstY: 0,
            dstZ: 0,
            dstLOD: 0,
            dstMemoryType: device,
            dstHost: null_mut(),
            dstDevice: to,
            dstArray: null_mut(),
            dstContext: self.context.handle,
            dstPitch: copy.to_pitch,
            dstHeight: copy.rows,
            WidthInBytes: copy.width,
            Height: copy.rows,
            Depth: 1,
        };
        // SAFETY: the caller's promise.
        unsafe { call!(cuMemcpy3DPeerAsync(&described, self.handle)) }
    }

    /// Starts a kernel of `blocks` blocks.
    ///
    /// # Safety
    /// `arguments` is the struct that the kernel takes, and what it points to is as for [`fill`](Stream::fill).
    pub(super) unsafe fn launch<A: Copy>(
        &self,
        function: &Function,
        blocks: (u32, u32),
        shared_bytes: u32,
        arguments: &A,
    ) -> Result<(), CudaError> {
        let mut pointers = [std::ptr::from_ref(arguments).cast_mut().cast::<c_void>()];
        let mut early_start = sys::CUlaunchAttribute {
            id: sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
            pad: [0; 4],
            value: sys::CUlaunchAttributeValue { programmaticStreamSerializationAllowed: 1 },
        };
        let config = sys::CUlaunchConfig {
            gridDimX: blocks.0,
            gridDimY: blocks.1,
            gridDimZ: 1,
            blockDimX: function.threads,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: shared_bytes,
            hStream: self.handle,
            attrs: &raw mut early_start,
            numAttrs: u32::from(function.early),
        };
        // SAFETY: the caller's promise; the driver copies the arguments and the attribute before it returns.
        unsafe { call!(cuLaunchKernelEx(&config, function.handle, pointers.as_mut_ptr(), null_mut())) }
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        if self.context.bind().is_ok() {
            // SAFETY: made in `new`, destroyed once; the driver lets its work finish first.
            let _ = unsafe { sys::cuStreamDestroy_v2(self.handle) };
        }
    }
}

/// One end of a copy.
#[derive(Clone, Copy)]
pub(super) enum End {
    Host(*mut c_void),
    Device(u64),
}

/// A copy of `rows` rows of `width` bytes; pitches are the bytes between the starts of two rows.
pub(super) struct Copy2d {
    pub(super) from: End,
    pub(super) from_pitch: usize,
    pub(super) to: End,
    pub(super) to_pitch: usize,
    pub(super) width: usize,
    pub(super) rows: usize,
}

impl Copy2d {
    /// The copy as one piece of a GPU's memory, if it is one that a graph can hold.
    pub(super) fn piece(&self) -> Option<Piece> {
        let (End::Device(from), End::Device(to)) = (self.from, self.to) else { return None };
        let bytes = self.width;
        (self.rows == 1 && (1..=Piece::LONGEST).contains(&bytes)).then_some(Piece { from, to, bytes })
    }

    /// The same; rows without gaps are one long row.
    pub(super) fn without_gaps(self) -> Self {
        if self.rows <= 1 || (self.from_pitch == self.width && self.to_pitch == self.width) {
            let bytes = self.width * self.rows;
            return Copy2d { from_pitch: bytes, to_pitch: bytes, width: bytes, rows: 1, ..self };
        }
        self
    }
}

/// Events that were made and are free to be recorded again.
pub(super) struct EventPool {
    context: Arc<Context>,
    timed: bool,
    free: Mutex<Vec<RawEvent>>,
}

struct RawEvent(sys::CUevent);

// SAFETY: events may be used from any thread; the driver locks inside.
unsafe impl Send for RawEvent {}

impl EventPool {
    pub(super) fn new(context: &Arc<Context>, timed: bool) -> Arc<Self> {
        Arc::new(EventPool { context: Arc::clone(context), timed, free: Mutex::default() })
    }

    /// An event recorded after everything enqueued on `stream` so far.
    pub(super) fn record(self: &Arc<Self>, stream: &Stream) -> Result<Event, CudaError> {
        let free = self.free.lock().unwrap_or_else(PoisonError::into_inner).pop();
        let handle = match free {
            Some(RawEvent(handle)) => handle,
            None => {
                let mut handle = null_mut();
                let flags = if self.timed {
                    sys::CUevent_flags::CU_EVENT_DEFAULT
                } else {
                    sys::CUevent_flags::CU_EVENT_DISABLE_TIMING
                };
                // SAFETY: a context is current, by the caller's stream; `EventPool::drop` destroys the event.
                unsafe { call!(cuEventCreate(&mut handle, flags as c_uint)) }?;
                handle
            }
        };
        let event = Event { handle, pool: Arc::clone(self) };
        // SAFETY: both handles are alive.
        unsafe { call!(cuEventRecord(handle, stream.handle)) }?;
        Ok(event)
    }
}

impl Drop for EventPool {
    fn drop(&mut self) {
        if self.context.bind().is_ok() {
            for RawEvent(handle) in self.free.get_mut().unwrap_or_else(PoisonError::into_inner).drain(..) {
                // SAFETY: made in `record`, free, and destroyed once.
                let _ = unsafe { sys::cuEventDestroy_v2(handle) };
            }
        }
    }
}

/// A recorded point of a stream; goes back to its pool when dropped.
pub struct Event {
    handle: sys::CUevent,
    pool: Arc<EventPool>,
}

// SAFETY: events may be used from any thread; the driver locks inside.
unsafe impl Send for Event {}
// SAFETY: as above.
unsafe impl Sync for Event {}

impl Event {
    /// Whether everything before the point is done.
    pub(super) fn is_complete(&self) -> Result<bool, CudaError> {
        // SAFETY: the handle is alive.
        match unsafe { sys::cuEventQuery(self.handle) } {
            sys::CUresult::CUDA_ERROR_NOT_READY => Ok(false),
            code => check("cuEventQuery", code).map(|()| true),
        }
    }

    /// Milliseconds from this point to a later one; both are complete and timed.
    pub(super) fn elapsed_ms(&self, later: &Event) -> Result<f32, CudaError> {
        let mut milliseconds = 0.0;
        // SAFETY: both handles are alive, `milliseconds` outlives the call.
        unsafe { call!(cuEventElapsedTime_v2(&mut milliseconds, self.handle, later.handle)) }?;
        Ok(milliseconds)
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        self.pool.free.lock().unwrap_or_else(PoisonError::into_inner).push(RawEvent(self.handle));
    }
}

/// How TMA finds the numbers of a bf16 matrix. The twin of `TensorMap` in `gemm_hopper.cuh`.
#[repr(C, align(128))]
#[derive(Clone, Copy)]
pub(super) struct TensorMap {
    opaque: [u64; 16],
}

/// What the sources are held against.
pub(super) const LAYOUTS: &[&Layout] = &[&Layout {
    file: "gemm_hopper.cuh",
    twin: "TensorMap",
    size: size_of::<TensorMap>(),
    fields: &[Field("opaque", 0, size_of::<[u64; 16]>())],
}];

// SAFETY: all its bits may be zero.
unsafe impl bytemuck::Zeroable for TensorMap {}
// SAFETY: plain integers; its size is a multiple of its alignment.
unsafe impl bytemuck::Pod for TensorMap {}

/// What a [`TensorMap`] is made of.
pub(super) struct Matrix {
    /// Address of the first row, on 16 bytes.
    pub(super) start: u64,
    pub(super) rows: usize,
    pub(super) width: usize,
    /// Elements between two rows, whole 16 bytes.
    pub(super) stride: usize,
    pub(super) element: Element,
    /// Rows and columns that one copy moves; columns are 64 or 128 bytes and lie in shared memory swizzled over as much.
    pub(super) piece: (u32, u32),
}

/// What a [`Matrix`] is of.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Element {
    Bf16,
    Byte,
}

impl TensorMap {
    pub(super) fn new(matrix: &Matrix) -> Result<Self, CudaError> {
        use sys::CUtensorMapDataType_enum::{
            CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, CU_TENSOR_MAP_DATA_TYPE_UINT8,
        };
        use sys::CUtensorMapSwizzle_enum::{CU_TENSOR_MAP_SWIZZLE_64B, CU_TENSOR_MAP_SWIZZLE_128B};
        let (rows, columns) = matrix.piece;
        let (element, bytes) = match matrix.element {
            Element::Bf16 => (CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2),
            Element::Byte => (CU_TENSOR_MAP_DATA_TYPE_UINT8, 1),
        };
        let swizzle =
            if bytes * columns == 64 { CU_TENSOR_MAP_SWIZZLE_64B } else { CU_TENSOR_MAP_SWIZZLE_128B };
        let mut map = TensorMap { opaque: [0; 16] };
        // SAFETY: the map has the size and alignment that the driver asks for; all arrays outlive the call, two
        // entries for two dimensions, one stride fewer. The driver refuses what TMA cannot do.
        unsafe {
            call!(cuTensorMapEncodeTiled(
                (&raw mut map).cast(),
                element,
                2,
                matrix.start as *mut c_void,
                [matrix.width as u64, matrix.rows as u64].as_ptr(),
                [u64::from(bytes) * matrix.stride as u64].as_ptr(),
                [columns, rows].as_ptr(),
                [1, 1].as_ptr(),
                sys::CUtensorMapInterleave_enum::CU_TENSOR_MAP_INTERLEAVE_NONE,
                swizzle,
                sys::CUtensorMapL2promotion_enum::CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                sys::CUtensorMapFloatOOBfill_enum::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
            ))
        }?;
        Ok(map)
    }
}

/// Device memory that is freed with its owner.
pub(super) struct DeviceMemory {
    pub(super) start: u64,
    pub(super) bytes: usize,
    context: Arc<Context>,
}

impl DeviceMemory {
    /// `bytes` bytes, at least one; what they hold is undefined.
    pub(super) fn new(context: &Arc<Context>, bytes: usize) -> Result<Self, CudaError> {
        context.bind()?;
        let mut start = 0;
        // SAFETY: `start` outlives the call; `Drop` frees what is allocated.
        unsafe { call!(cuMemAlloc_v2(&mut start, bytes.max(1))) }?;
        Ok(DeviceMemory { start, bytes, context: Arc::clone(context) })
    }
}

impl Drop for DeviceMemory {
    fn drop(&mut self) {
        if self.context.bind().is_ok() {
            // SAFETY: allocated in `new`, freed once; the driver waits for work that uses it.
            let _ = unsafe { sys::cuMemFree_v2(self.start) };
        }
    }
}

/// Host memory that the GPU can read and write.
pub(super) struct PinnedMemory {
    pub(super) start: *mut u8,
    context: Arc<Context>,
}

// SAFETY: plain bytes; those who use them say who may touch which when.
unsafe impl Send for PinnedMemory {}
// SAFETY: as above.
unsafe impl Sync for PinnedMemory {}

impl PinnedMemory {
    /// `bytes` bytes of zeros.
    pub(super) fn new(context: &Arc<Context>, bytes: usize) -> Result<Self, CudaError> {
        context.bind()?;
        let mut start = null_mut();
        // SAFETY: `start` outlives the call; `Drop` frees what is allocated.
        unsafe { call!(cuMemHostAlloc(&mut start, bytes, sys::CU_MEMHOSTALLOC_DEVICEMAP)) }?;
        // SAFETY: just allocated with that size, and nobody else has it.
        unsafe { start.cast::<u8>().write_bytes(0, bytes) };
        Ok(PinnedMemory { start: start.cast(), context: Arc::clone(context) })
    }

    /// Where the GPU sees it.
    pub(super) fn device_address(&self) -> Result<u64, CudaError> {
        let mut address = 0;
        // SAFETY: the memory was allocated with a mapping and is alive.
        unsafe { call!(cuMemHostGetDevicePointer_v2(&mut address, self.start.cast(), 0)) }?;
        Ok(address)
    }
}

impl Drop for PinnedMemory {
    fn drop(&mut self) {
        if self.context.bind().is_ok() {
            // SAFETY: allocated in `new`, freed once; its users have drained their streams.
            let _ = unsafe { sys::cuMemFreeHost(self.start.cast()) };
        }
    }
}

/// Compiled kernels on the GPU.
pub(super) struct Module {
    handle: sys::CUmodule,
    context: Arc<Context>,
}

// SAFETY: modules may be used from any thread; the driver locks inside.
unsafe impl Send for Module {}
// SAFETY: as above.
unsafe impl Sync for Module {}

impl Module {
    /// Loads a cubin made for this GPU.
    pub(super) fn load(context: &Arc<Context>, cubin: &[u8]) -> Result<Self, CudaError> {
        context.bind()?;
        let mut handle = null_mut();
        // SAFETY: the image is whole (an ELF file that says its own length) and is read during the call only.
        unsafe { call!(cuModuleLoadData(&mut handle, cubin.as_ptr().cast())) }?;
        Ok(Module { handle, context: Arc::clone(context) })
    }

    /// A kernel of the module, to be started with blocks of `threads` threads; nothing if there is none of that name.
    pub(super) fn function(&self, name: &str, threads: u32) -> Result<Option<Function>, CudaError> {
        let name = CString::new(name).unwrap_or_default();
        let mut handle = null_mut();
        // SAFETY: the module is loaded; the name ends in zero.
        match unsafe { call!(cuModuleGetFunction(&mut handle, self.handle, name.as_ptr())) } {
            Ok(()) => Ok(Some(Function { handle, threads, early: false })),
            Err(error) if error.code == sys::CUresult::CUDA_ERROR_NOT_FOUND => Ok(None),
            Err(error) => Err(error),
        }
    }
}

impl Drop for Module {
    fn drop(&mut self) {
        if self.context.bind().is_ok() {
            // SAFETY: loaded in `load`, unloaded once, after its functions' last use.
            let _ = unsafe { sys::cuModuleUnload(self.handle) };
        }
    }
}

/// A kernel; its module must outlive it.
#[derive(Clone, Copy)]
pub(super) struct Function {
    handle: sys::CUfunction,
    threads: u32,
    early: bool,
}

// SAFETY: functions may be used from any thread.
unsafe impl Send for Function {}
// SAFETY: as above.
unsafe impl Sync for Function {}

impl Function {
    /// The same, but it starts as soon as every block of the kernel before it has let it in or is done.
    ///
    /// # Safety
    /// The kernel itself waits for what was enqueued before it (`take_turn` in `common.cuh`), on a GPU since sm_90.
    pub(super) unsafe fn early(self) -> Self {
        Function { early: true, ..self }
    }

    /// Lets its blocks ask for up to `bytes` of shared memory at launch.
    pub(super) fn allow_shared(&self, bytes: u32) -> Result<(), CudaError> {
        let attribute = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        // SAFETY: the module is loaded.
        unsafe { call!(cuFuncSetAttribute(self.handle, attribute, bytes as i32)) }
    }

    /// Shared memory that its blocks have without asking.
    pub(super) fn static_shared(&self) -> Result<u32, CudaError> {
        let mut bytes = 0;
        let attribute = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES;
        // SAFETY: the module is loaded; `bytes` outlives the call.
        unsafe { call!(cuFuncGetAttribute(&mut bytes, attribute, self.handle)) }?;
        Ok(bytes as u32)
    }

    /// How many of its blocks one multiprocessor holds at once.
    pub(super) fn resident_blocks(&self, shared_bytes: u32) -> Result<u32, CudaError> {
        let mut blocks = 0;
        // SAFETY: the module is loaded; `blocks` outlives the call.
        unsafe {
            call!(cuOccupancyMaxActiveBlocksPerMultiprocessor(
                &mut blocks,
                self.handle,
                self.threads as i32,
                shared_bytes as usize,
            ))
        }?;
        Ok(blocks.max(0) as u32)
    }
}
