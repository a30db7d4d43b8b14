//! Parts of a GPU's multiprocessors that kernels can be confined to ("green contexts").

use super::{Context, CudaError, Stream, check};
use cudarc::driver::sys;
use std::ffi::c_uint;
use std::mem::MaybeUninit;
use std::ptr::null_mut;
use std::sync::Arc;

/// Some multiprocessors of a GPU.
pub(in crate::cuda) struct Partition {
    handle: sys::CUgreenCtx,
    multiprocessors: u32,
    context: Arc<Context>,
}

// SAFETY: green contexts may be used from any thread; the driver locks inside.
unsafe impl Send for Partition {}
// SAFETY: as above.
unsafe impl Sync for Partition {}

impl Partition {
    /// Cuts the GPU into up to `count` partitions of at least `least` multiprocessors each, and one more of what is
    /// left, if anything is: last in the list.
    pub(in crate::cuda) fn split(
        context: &Arc<Context>,
        count: u32,
        least: u32,
    ) -> Result<Vec<Arc<Partition>>, CudaError> {
        context.bind()?;
        let kind = sys::CUdevResourceType::CU_DEV_RESOURCE_TYPE_SM;
        // SAFETY: a plain C struct of integers and bytes; all its bits may be zero.
        let empty: sys::CUdevResource = unsafe { MaybeUninit::zeroed().assume_init() };
        let (mut whole, mut left, mut parts, mut granted) =
            (empty, empty, vec![empty; count as usize], count as c_uint);
        // SAFETY: all results outlive the calls; `parts` has room for as many as are asked for.
        unsafe {
            call!(cuDeviceGetDevResource(context.device, &mut whole, kind))?;
            call!(cuDevSmResourceSplitByCount(
                parts.as_mut_ptr(),
                &mut granted,
                &whole,
                &mut left,
                0,
                least as c_uint
            ))?;
        }
        parts.truncate(granted as usize);
        if left.type_ == kind {
            parts.push(left);
        }
        parts.into_iter().map(|part| Partition::new(context, part).map(Arc::new)).collect()
    }

    /// A partition of at least `least` multiprocessors, and one of the rest.
    pub(in crate::cuda) fn pair(
        context: &Arc<Context>,
        least: u32,
    ) -> Result<[Arc<Partition>; 2], CudaError> {
        let parts = Partition::split(context, 1, least)?;
        parts.try_into().map_err(|_| CudaError::nothing("cuDevSmResourceSplitByCount"))
    }

    fn new(context: &Arc<Context>, mut resource: sys::CUdevResource) -> Result<Self, CudaError> {
        let (mut description, mut handle) = (null_mut(), null_mut());
        let flags = sys::CUgreenCtxCreate_flags::CU_GREEN_CTX_DEFAULT_STREAM as c_uint;
        // SAFETY: the resource came from a split and is read during the calls; `Drop` destroys what is made.
        unsafe {
            call!(cuDevResourceGenerateDesc(&mut description, &mut resource, 1))?;
            call!(cuGreenCtxCreate(&mut handle, description, context.device, flags))?;
        }
        // SAFETY: a resource of multiprocessors holds this member of the union.
        let multiprocessors = unsafe { resource.__bindgen_anon_1.sm.smCount };
        Ok(Partition { handle, multiprocessors, context: Arc::clone(context) })
    }

    /// Multiprocessors that it was granted.
    pub(in crate::cuda) fn multiprocessors(&self) -> u32 {
        self.multiprocessors
    }

    /// A stream whose kernels run here.
    pub(in crate::cuda) fn stream(self: &Arc<Self>) -> Result<Stream, CudaError> {
        self.context.bind()?;
        let mut handle = null_mut();
        let flags = sys::CUstream_flags::CU_STREAM_NON_BLOCKING as c_uint;
        // SAFETY: the partition is alive; the stream's `Drop` destroys what is made.
        unsafe { call!(cuGreenCtxStreamCreate(&mut handle, self.handle, flags, 0)) }?;
        Ok(Stream { handle, context: Arc::clone(&self.context), _partition: Some(Arc::clone(self)) })
    }
}

impl Drop for Partition {
    fn drop(&mut self) {
        // SAFETY: made in `new`, destroyed once, after the last stream in it.
        let _ = unsafe { sys::cuGreenCtxDestroy(self.handle) };
    }
}
