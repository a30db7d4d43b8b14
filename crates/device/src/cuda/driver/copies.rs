//! Several copies in one call: a graph whose nodes are copies, with other addresses every time.

use super::{Context, CudaError, Stream, check};
use cudarc::driver::sys;
use std::ptr::null_mut;
use std::sync::Arc;

/// Bytes in one piece, from one place of a GPU's memory to another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::cuda) struct Piece {
    pub(in crate::cuda) from: u64,
    pub(in crate::cuda) to: u64,
    pub(in crate::cuda) bytes: usize,
}

impl Piece {
    /// The longest piece that a graph copies.
    pub(in crate::cuda) const LONGEST: usize = 1 << 30;

    fn described(&self) -> sys::CUDA_MEMCPY3D {
        let device = sys::CUmemorytype::CU_MEMORYTYPE_DEVICE;
        sys::CUDA_MEMCPY3D {
            srcXInBytes: 0,
            srcY: 0,
            srcZ: 0,
            srcLOD: 0,
            srcMemoryType: device,
            srcHost: null_mut(),
            srcDevice: self.from,
            srcArray: null_mut(),
            reserved0: null_mut(),
            srcPitch: 0,
            srcHeight: 0,
            dstXInBytes: 0,
            dstY: 0,
            dstZ: 0,
            dstLOD: 0,
            dstMemoryType: device,
            dstHost: null_mut(),
            dstDevice: self.to,
            dstArray: null_mut(),
            reserved1: null_mut(),
            dstPitch: 0,
            dstHeight: 0,
            WidthInBytes: self.bytes,
            Height: 1,
            Depth: 1,
        }
    }
}

/// So many copies, one after the other, done by what copies of their own would be done by. To give them new addresses and
/// start them takes the host a fifth of what a call for each does.
pub(in crate::cuda) struct CopyGraph {
    graph: sys::CUgraph,
    runnable: sys::CUgraphExec,
    nodes: Vec<sys::CUgraphNode>,
    context: Arc<Context>,
}

// SAFETY: the handles may be used from any thread, by one at a time: whoever owns the graph.
unsafe impl Send for CopyGraph {}

impl CopyGraph {
    /// A graph for as many copies as there are pieces, at least one, each of at most [`Piece::LONGEST`] bytes and none empty.
    ///
    /// # Safety
    /// Both ends of every piece lie in device memory of the context.
    pub(in crate::cuda) unsafe fn new(context: &Arc<Context>, pieces: &[Piece]) -> Result<Self, CudaError> {
        let mut graph = null_mut();
        // SAFETY: the result outlives the call; `Drop` destroys what is made.
        unsafe { call!(cuGraphCreate(&mut graph, 0)) }?;
        let (nodes, runnable) = (Vec::with_capacity(pieces.len()), null_mut());
        let mut made = CopyGraph { graph, runnable, nodes, context: Arc::clone(context) };
        for piece in pieces {
            let (mut node, before) = (null_mut(), made.nodes.last().copied());
            let dependencies = before.as_ref().map_or(std::ptr::null(), std::ptr::from_ref);
            // SAFETY: the graph and the node before are alive; what is described is read during the call.
            unsafe {
                call!(cuGraphAddMemcpyNode(
                    &mut node,
                    graph,
                    dependencies,
                    usize::from(before.is_some()),
                    &piece.described(),
                    context.handle,
                ))
            }?;
            made.nodes.push(node);
        }
        // SAFETY: the graph is alive; the result outlives the call.
        unsafe { call!(cuGraphInstantiateWithFlags(&mut made.runnable, graph, 0)) }?;
        Ok(made)
    }

    /// Starts it with other pieces, as many as it was made for. What was started before keeps its own.
    ///
    /// # Safety
    /// As [`Stream::copy`], for both ends of every piece; and as [`new`](CopyGraph::new).
    pub(in crate::cuda) unsafe fn start(
        &mut self,
        pieces: &[Piece],
        stream: &Stream,
    ) -> Result<(), CudaError> {
        for (node, piece) in self.nodes.iter().zip(pieces) {
            // SAFETY: the graph is whole and the node is of it; the copy is one-dimensional, as it was made.
            unsafe {
                call!(cuGraphExecMemcpyNodeSetParams(
                    self.runnable,
                    *node,
                    &piece.described(),
                    self.context.handle,
                ))
            }?;
        }
        // SAFETY: the caller's promise.
        unsafe { call!(cuGraphLaunch(self.runnable, stream.handle)) }
    }
}

impl Drop for CopyGraph {
    fn drop(&mut self) {
        if self.context.bind().is_err() {
            return;
        }
        // SAFETY: made in `new`, destroyed once; the driver keeps what still runs.
        unsafe {
            if !self.runnable.is_null() {
                let _ = sys::cuGraphExecDestroy(self.runnable);
            }
            let _ = sys::cuGraphDestroy(self.graph);
        }
    }
}
