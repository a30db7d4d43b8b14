//! Kernels of one GPU, made ready by threads while the program goes on: whoever needs one waits for its file alone, and
//! makes it ready himself if nobody has begun to.

use super::cache::Cache;
use super::parts::{Part, parts_for};
use super::{HOPPER, Key, SCALED_THIN, SHORT_THIN, SOURCES, Source, THIN, TILES, short};
use crate::DeviceError;
use crate::cuda::driver::{Context, Function, Module};
use crate::cuda::nvrtc;
use cudarc::driver::sys::CUdevice_attribute::{
    CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN,
    CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR,
};
use epsmoe_base::{DType, cores, panic_text};
use std::collections::HashMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, RwLock};
use std::thread::{Builder, JoinHandle};

/// A kernel and what it may ask for.
#[derive(Clone, Copy)]
pub(in crate::cuda) struct Kernel {
    pub(in crate::cuda) function: Function,
    /// Bytes of shared memory that a block may ask for.
    pub(in crate::cuda) shared_limit: u32,
    /// For products: blocks that a multiprocessor holds at once, each with its tiles in shared memory, bricks not counted.
    pub(in crate::cuda) resident: u32,
}

/// Every kernel of one GPU, ready or on its way. Those for weights in codes take as long to compile as all others
/// together, so they wait until somebody [expects](Kernels::expect_codes) them; likewise those for a
/// [cache](Kernels::expect_cached_codes) in codes.
pub(in crate::cuda) struct Kernels {
    workshop: Arc<Workshop>,
    threads: Mutex<Vec<JoinHandle<()>>>,
    /// Bytes of shared memory that a multiprocessor has for all its blocks.
    shared_bytes: u32,
}

impl Kernels {
    /// Begins to compile what the cache does not hold, and to load everything.
    ///
    /// # Errors
    /// There is no NVRTC, or the GPU does not answer.
    pub(in crate::cuda) fn begin(context: &Arc<Context>, architecture: &str) -> Result<Self, DeviceError> {
        let parts = parts_for(architecture);
        let limit = context.attribute(CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?;
        let shared = context.attribute(CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR)?;
        let progress = Progress {
            states: parts.iter().map(|_| State::Idle).collect(),
            modules: Vec::new(),
            stopped: false,
        };
        let workshop = Workshop {
            cache: Cache::open(architecture, nvrtc::version()?),
            context: Arc::clone(context),
            is_hopper: architecture == HOPPER,
            shared_limit: limit.max(0) as u32,
            parts,
            functions: RwLock::default(),
            progress: Mutex::new(progress),
            advanced: Condvar::new(),
        };
        let (workshop, threads) = (Arc::new(workshop), Mutex::default());
        let kernels = Kernels { workshop, threads, shared_bytes: shared.max(0) as u32 };
        kernels.expect(|part| !is_coded(part) && !is_for_cached_codes(part));
        Ok(kernels)
    }

    /// Begins with the kernels for weights in codes.
    pub(in crate::cuda) fn expect_codes(&self) {
        self.expect(is_coded);
    }

    /// Begins with the kernels for keys and values in codes.
    pub(in crate::cuda) fn expect_cached_codes(&self) {
        self.expect(is_for_cached_codes);
    }

    /// Lets threads make parts ready that nobody has asked for yet.
    fn expect(&self, wanted: impl Fn(&Part) -> bool) {
        let mut count = 0;
        {
            let mut progress = self.workshop.progress();
            for (part, state) in self.workshop.parts.iter().zip(&mut progress.states) {
                if matches!(state, State::Idle) && wanted(part) {
                    *state = State::Wanted;
                    count += 1;
                }
            }
        }
        let mut threads = self.threads.lock().unwrap_or_else(PoisonError::into_inner);
        for _ in 0..count.min(cores()) {
            let workshop = Arc::clone(&self.workshop);
            // Where the system gives no more threads, those who need a kernel make it.
            threads.extend(Builder::new().spawn(move || workshop.work()).ok());
        }
    }

    /// Waits until everything that was asked for is ready.
    pub(in crate::cuda) fn finish(&self) -> Result<(), DeviceError> {
        let asked = |part: &usize| !matches!(self.workshop.progress().states[*part], State::Idle);
        (0..self.workshop.parts.len()).filter(asked).try_for_each(|part| self.workshop.ready(part))
    }

    /// Where they are kept; nothing if they are compiled at every start.
    pub(in crate::cuda) fn folder(&self) -> Option<&Path> {
        self.workshop.cache.folder()
    }

    /// Whether kernels may use wgmma and TMA.
    pub(in crate::cuda) fn has_hopper(&self) -> bool {
        self.workshop.is_hopper
    }

    /// Blocks of a product that a multiprocessor holds at once, each with so much shared memory.
    pub(in crate::cuda) fn resident(&self, kernel: &Kernel, shared: u32) -> u32 {
        /// What the system takes of every block's.
        const OF_SYSTEM: u32 = 1024;
        kernel.resident.min(self.shared_bytes / (shared + OF_SYSTEM)).max(1)
    }

    /// The kernel of an operation for these formats.
    pub(in crate::cuda) fn get(
        &self,
        operation: &'static str,
        from: DType,
        to: DType,
    ) -> Result<Kernel, DeviceError> {
        let key = (operation, from, to);
        if let Some(kernel) = self.workshop.function(&key) {
            return Ok(kernel);
        }
        self.workshop.ready_for(&key)?;
        self.workshop.function(&key).ok_or_else(|| {
            DeviceError::Unsupported(format!("{operation}: no kernel from {from} to {to} on a GPU"))
        })
    }
}

impl Drop for Kernels {
    fn drop(&mut self) {
        self.workshop.progress().stopped = true;
        for thread in self.threads.lock().unwrap_or_else(PoisonError::into_inner).drain(..) {
            // What a thread ends by is told to those who need its kernels.
            let _ = thread.join();
        }
    }
}

/// Whether weights in codes need it.
fn is_coded(part: &Part) -> bool {
    let file = part.source.file;
    let starts = ["gemm", "draw"].iter().any(|start| file.starts_with(start));
    starts && ["_coded.cu", "_fp8.cu"].iter().any(|end| file.ends_with(end))
}

/// Whether keys and values in codes need it.
fn is_for_cached_codes(part: &Part) -> bool {
    part.source.file.ends_with("_e4m3.cu")
}

/// Where parts are made ready.
struct Workshop {
    context: Arc<Context>,
    cache: Cache,
    is_hopper: bool,
    /// Bytes of shared memory that a block may ask for.
    shared_limit: u32,
    parts: Vec<Part>,
    functions: RwLock<HashMap<Key, Kernel>>,
    progress: Mutex<Progress>,
    /// Some part became ready, or never will.
    advanced: Condvar,
}

struct Progress {
    /// Of each part.
    states: Vec<State>,
    // Functions live as long as their modules.
    modules: Vec<Module>,
    /// Nothing new is begun.
    stopped: bool,
}

enum State {
    /// Nobody asked for it.
    Idle,
    Wanted,
    Begun,
    Ready,
    Failed(String),
}

impl Workshop {
    fn progress(&self) -> MutexGuard<'_, Progress> {
        self.progress.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn function(&self, key: &Key) -> Option<Kernel> {
        self.functions.read().unwrap_or_else(PoisonError::into_inner).get(key).copied()
    }

    /// A thread's life: whatever is wanted and not begun.
    fn work(&self) {
        let take = || {
            let mut progress = self.progress();
            let wanted = |state: &State| matches!(state, State::Wanted);
            let part = progress.states.iter().position(wanted).filter(|_| !progress.stopped)?;
            progress.states[part] = State::Begun;
            Some(part)
        };
        while let Some(part) = take() {
            self.make(part);
        }
    }

    /// Returns once the file of an operation for some formats is ready.
    fn ready_for(&self, &(operation, from, to): &Key) -> Result<(), DeviceError> {
        let makes = |it: &Source| it.operations.contains(&operation) && it.formats.contains(&(from, to));
        let has = |file| SOURCES.iter().any(|it| it.file == file && makes(it));
        let needed = (0..self.parts.len()).filter(|&part| has(self.parts[part].source.file));
        needed.into_iter().try_for_each(|part| self.ready(part))
    }

    /// Returns once a part is ready. Whoever has begun with it ends, by what the compiler says or a panic that is caught.
    fn ready(&self, part: usize) -> Result<(), DeviceError> {
        let mut progress = self.progress();
        loop {
            match &progress.states[part] {
                State::Ready => return Ok(()),
                State::Failed(problem) => return Err(DeviceError::Unsupported(problem.clone())),
                State::Begun => {
                    progress = self.advanced.wait(progress).unwrap_or_else(PoisonError::into_inner);
                }
                State::Idle | State::Wanted => {
                    progress.states[part] = State::Begun;
                    drop(progress);
                    self.make(part);
                    progress = self.progress();
                }
            }
        }
    }

    /// Makes a part ready that the caller has begun with.
    fn make(&self, part: usize) {
        let made = catch_unwind(AssertUnwindSafe(|| self.load(&self.parts[part])));
        let mut progress = self.progress();
        progress.states[part] = match made {
            Ok(Ok(module)) => {
                progress.modules.push(module);
                State::Ready
            }
            Ok(Err(error)) => State::Failed(error.to_string()),
            Err(panic) => State::Failed(format!(
                "{}: a kernel's compilation crashed: {}",
                self.parts[part].source.file,
                panic_text(panic.as_ref())
            )),
        };
        self.advanced.notify_all();
    }

    /// Compiles a part if the cache does not hold it, and finds its kernels.
    fn load(&self, part: &Part) -> Result<Module, DeviceError> {
        let module = Module::load(&self.context, &self.cache.cubin(part)?)?;
        let mut found = Vec::new();
        for source in SOURCES.iter().filter(|source| source.file == part.source.file) {
            let named = source
                .operations
                .iter()
                .flat_map(|&operation| source.formats.iter().map(move |&(from, to)| (operation, from, to)));
            for key @ (operation, from, to) in named {
                let name = format!("{operation}_{}_{}", short(from), short(to));
                // It may be in another part of the file.
                let Some(mut function) = module.function(&name, source.threads)? else { continue };
                if self.is_hopper && source.file != "probe.cu" {
                    // SAFETY: every kernel of an operation begins by taking its turn; a test looks.
                    function = unsafe { function.early() };
                }
                let shared_limit = self.shared_limit.saturating_sub(function.static_shared()?);
                function.allow_shared(shared_limit)?;
                let mut tiles = TILES.into_iter().chain(THIN).chain(SHORT_THIN).chain(SCALED_THIN);
                let tile = tiles.find(|tile| tile.operations.contains(&operation));
                let resident = match tile {
                    Some(tile) => function.resident_blocks(tile.shared_bytes)?.max(1),
                    None => 1,
                };
                found.push((key, Kernel { function, shared_limit, resident }));
            }
        }
        self.functions.write().unwrap_or_else(PoisonError::into_inner).extend(found);
        Ok(module)
    }
}
