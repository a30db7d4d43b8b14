//! What a stream was given once, kept to be given again in one call.

use super::{Context, CudaError, Stream, check};
use cudarc::driver::sys;
use std::ptr::null_mut;
use std::sync::Arc;

/// Work of a stream in its order, ready to be enqueued.
pub(in crate::cuda) struct Graph {
    runnable: sys::CUgraphExec,
    context: Arc<Context>,
}

// SAFETY: the handle may be used from any thread, by one at a time: whoever owns the graph.
unsafe impl Send for Graph {}

impl Stream {
    /// From now on work is kept instead of being enqueued.
    pub(in crate::cuda) fn keep(&self) -> Result<(), CudaError> {
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED;
        // SAFETY: the handle lives until `Drop`; relaxed, because memory is taken meanwhile.
        unsafe { call!(cuStreamBeginCapture_v2(self.handle, mode)) }
    }

    /// What was kept since [`keep`](Stream::keep).
    pub(in crate::cuda) fn kept(&self) -> Result<Graph, CudaError> {
        let (mut graph, mut runnable) = (null_mut(), null_mut());
        // SAFETY: both results outlive the calls; what is made is destroyed here or by `Graph`.
        let made = unsafe {
            call!(cuStreamEndCapture(self.handle, &mut graph))?;
            let made = call!(cuGraphInstantiateWithFlags(&mut runnable, graph, 0));
            call!(cuGraphDestroy(graph))?;
            made
        };
        made.map(|()| Graph { runnable, context: Arc::clone(&self.context) })
    }

    /// Enqueues kept work once more.
    ///
    /// # Safety
    /// As if each piece of it was enqueued.
    pub(in crate::cuda) unsafe fn enqueue(&self, graph: &Graph) -> Result<(), CudaError> {
        // SAFETY: the caller's promise.
        unsafe { call!(cuGraphLaunch(graph.runnable, self.handle)) }
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        if self.context.bind().is_ok() {
            // SAFETY: made in `kept`, destroyed once; the driver keeps what still runs.
            let _ = unsafe { sys::cuGraphExecDestroy(self.runnable) };
        }
    }
}
