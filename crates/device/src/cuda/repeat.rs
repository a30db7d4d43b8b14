//! Work that is the same every time, such as a step that gives each sequence one token: what it enqueued is kept as a
//! graph, and enqueued again in one call. The host then takes microseconds for what took it milliseconds, and the GPU
//! goes from kernel to kernel without it.

use super::driver::Graph;
use super::{CudaBackend, Pending, Refusal};
use crate::DeviceError;
use crate::op::Accesses;
use epsmoe_base::{Lane, Place};
use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::PoisonError;
use std::sync::atomic::Ordering;

/// Work of one key.
pub(super) enum Repeat {
    /// It has run once, as it came: whatever is only done the first time is done.
    Once,
    /// What it enqueues, and all that this touches.
    Kept(Graph, Accesses),
    /// It cannot be kept.
    Never,
}

/// So many are kept; more keys than that are no repetition.
const MOST: usize = 128;

/// What is enqueued while work is being kept.
#[derive(Default)]
pub(super) struct Keeping {
    pub(super) accesses: Accesses,
    pub(super) operations: Vec<Pending>,
}

impl CudaBackend {
    pub(super) fn run_repeated<E: From<DeviceError>>(
        &self,
        key: u64,
        work: impl FnOnce() -> Result<(), E>,
    ) -> Result<bool, E> {
        // Whoever wants to know when each operation ran gets them one by one.
        if self.recording.load(Ordering::Relaxed) {
            return work().map(|()| false);
        }
        let mut repeats = self.repeats.lock().unwrap_or_else(PoisonError::into_inner);
        let known = repeats.len();
        match repeats.entry(key) {
            Entry::Vacant(unknown) => {
                if known < MOST {
                    unknown.insert(Repeat::Once);
                }
                work().map(|()| false)
            }
            Entry::Occupied(mut known) => match known.get() {
                Repeat::Kept(graph, accesses) => {
                    self.enqueue_kept(graph, accesses)?;
                    Ok(true)
                }
                Repeat::Never => work().map(|()| false),
                Repeat::Once => {
                    known.insert(Repeat::Never);
                    let (graph, accesses) = self.keep(work)?;
                    // Nothing has run yet. The hazard check has seen each operation already.
                    self.start_kept(&graph)?;
                    known.insert(Repeat::Kept(graph, accesses));
                    Ok(false)
                }
            },
        }
    }

    /// Keeps what `work` enqueues, which does not run.
    fn keep<E: From<DeviceError>>(
        &self,
        work: impl FnOnce() -> Result<(), E>,
    ) -> Result<(Graph, Accesses), E> {
        let stream = self.stream(Lane::Compute);
        {
            let mut order = self.order();
            let begun = self.device.context.bind().and_then(|()| stream.keep());
            begun.map_err(|error| DeviceError::from(self.gpu_failed(&error)))?;
            order.keeping = Some(Keeping::default());
        }
        let done = work();
        let mut order = self.order();
        let Keeping { accesses, operations } = order.keeping.take().unwrap_or_default();
        let graph = stream.kept();
        done?;
        let graph = graph.map_err(|error| DeviceError::from(self.gpu_failed(&error)))?;
        self.underway().kept.extend(operations);
        Ok((graph, accesses))
    }

    fn enqueue_kept(&self, graph: &Graph, accesses: &Accesses) -> Result<(), DeviceError> {
        let fill = |_: &mut _| self.start_kept(graph).map_err(Refusal::Arguments);
        self.append(Lane::Compute, Place::default(), "a step that was kept", accesses, None, fill)
    }

    fn start_kept(&self, graph: &Graph) -> Result<(), DeviceError> {
        // SAFETY: its memory is this processor's, which never moves; order was checked, operation by operation when it
        // was kept, or all together now.
        let started =
            self.device.context.bind().and_then(|()| unsafe { self.stream(Lane::Compute).enqueue(graph) });
        started.map_err(|error| self.gpu_failed(&error).into())
    }
}

/// Kept work by its keys.
pub(super) type Repeats = HashMap<u64, Repeat>;
