//! What the probes try things with: words that host and GPU share, a kernel that holds multiprocessors, memory to copy.

use crate::DeviceError;
use crate::cuda::CudaDevice;
use crate::cuda::driver::{
    Context, CudaError, DeviceMemory, Event, EventPool, Function, PinnedMemory, Stream,
};
use crate::cuda::layout::twin;
use epsmoe_base::DType;
use std::ffi::c_void;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

/// Longest that a spinning kernel stays, in cycles: about a second.
const SPIN_CYCLES: u64 = 2_000_000_000;

/// How long something may take before it counts as never.
pub(super) const NEVER: Duration = Duration::from_millis(20);

/// Largest copy.
pub(super) const LARGEST: usize = 64 << 20;

/// Room for twice that, so that rows can be taken from rows twice as wide.
const ROOM: usize = 2 * LARGEST;

/// Words stand on cache lines of their own.
const LINE: usize = 64;
const WORDS: usize = 8192;

/// A value past every other, which ends every wait for a word.
const RELEASED: u32 = i32::MAX as u32;

/// A GPU to try things on.
pub(super) struct Bench {
    pub(super) device: Arc<CudaDevice>,
    events: Arc<EventPool>,
    spin: Function,
    mark: Function,
    /// A whole multiprocessor's.
    spin_shared: u32,
    words: PinnedMemory,
    words_on_device: u64,
    used: AtomicUsize,
    /// Zeroed; its first line counts blocks, the second lets spinning kernels go, the others are for flags.
    flags: DeviceMemory,
    /// Spinning kernels so far, and the stream that lets them go.
    spun: AtomicU32,
    releases: Stream,
    pub(super) source: DeviceMemory,
    pub(super) target: DeviceMemory,
    host: PinnedMemory,
    /// Host memory to copy, as the GPU sees it.
    pub(super) host_on_device: u64,
}

/// A word of host memory that the GPU reads and writes; zero at first.
#[derive(Clone, Copy)]
pub(super) struct Word<'a> {
    value: &'a AtomicU32,
    pub(super) address: u64,
}

twin! {
    pub(super) struct Spin = "Spin" in "probe.cu" {
        flag: u64,
        arrived: u64,
        started: u64,
        cycles: u64,
        number: u32,
        padding: u32,
    }
}

twin! {
    pub(super) struct Mark = "Mark" in "probe.cu" {
        at: u64,
        value: u32,
        padding: u32,
    }
}

impl Word<'_> {
    pub(super) fn set(&self, value: u32) {
        self.value.store(value, Ordering::Release);
    }

    pub(super) fn get(&self) -> u32 {
        self.value.load(Ordering::Acquire)
    }
}

impl Bench {
    pub(super) fn new(device: &Arc<CudaDevice>) -> Result<Self, DeviceError> {
        let context = &device.context;
        let kernel = |name| device.kernels.get(name, DType::U32, DType::U32);
        let spin = kernel("spin")?;
        let words = PinnedMemory::new(context, WORDS * LINE)?;
        let host = PinnedMemory::new(context, ROOM)?;
        let stream = Stream::new(context)?;
        let [flags, source, target] = [64 * LINE, ROOM, ROOM].map(|bytes| DeviceMemory::new(context, bytes));
        let (flags, source, target) = (flags?, source?, target?);
        for memory in [&flags, &source, &target] {
            // SAFETY: just allocated with that size; nobody else has it.
            unsafe { stream.fill(memory.start, 0, memory.bytes) }?;
        }
        stream.synchronize()?;
        Ok(Bench {
            events: EventPool::new(context, false),
            spin: spin.function,
            mark: kernel("mark")?.function,
            spin_shared: spin.shared_limit,
            words_on_device: words.device_address()?,
            words,
            used: AtomicUsize::new(0),
            flags,
            spun: AtomicU32::new(0),
            releases: stream,
            source,
            target,
            host_on_device: host.device_address()?,
            host,
            device: Arc::clone(device),
        })
    }

    pub(super) fn context(&self) -> &Arc<Context> {
        &self.device.context
    }

    pub(super) fn multiprocessors(&self) -> u32 {
        self.device.multiprocessors
    }

    pub(super) fn stream(&self) -> Result<Stream, CudaError> {
        Stream::new(self.context())
    }

    /// Host memory to copy, as the host sees it.
    pub(super) fn host_start(&self) -> *mut c_void {
        self.host.start.cast()
    }

    /// A word that nobody has used yet.
    pub(super) fn word(&self) -> Word<'_> {
        let index = self.used.fetch_add(1, Ordering::Relaxed);
        assert!(index < WORDS, "the probes use more words than there are. This is a bug.");
        // SAFETY: inside the allocation, aligned, zero at first, and only ever used as this atomic.
        let value = unsafe { &*self.words.start.add(index * LINE).cast::<AtomicU32>() };
        Word { value, address: self.words_on_device + (index * LINE) as u64 }
    }

    /// The address of a word of device memory, zero until written; `index` is below 62.
    pub(super) fn flag(&self, index: usize) -> u64 {
        self.flags.start + ((2 + index) * LINE) as u64
    }

    pub(super) fn record(&self, stream: &Stream) -> Result<Event, CudaError> {
        self.events.record(stream)
    }

    /// Starts a kernel of `blocks` blocks that each take a whole multiprocessor, until what is returned is dropped. Meanwhile it
    /// looks at a word of this memory.
    pub(super) fn spin(&self, stream: &Stream, blocks: u32, polled: Polled) -> Result<Held<'_>, CudaError> {
        let started = self.word();
        let release = match polled {
            Polled::Host => Release::Word(self.word()),
            Polled::Device => {
                let number = self.spun.fetch_add(1, Ordering::Relaxed) + 1;
                Release::Flag { bench: self, address: self.flags.start + LINE as u64, number }
            }
        };
        let (flag, number) = match &release {
            Release::Word(word) => (word.address, 1),
            Release::Flag { address, number, .. } => (*address, *number),
        };
        let (arrived, cycles) = (self.flags.start, SPIN_CYCLES);
        let arguments = Spin { flag, arrived, started: started.address, cycles, number, padding: 0 };
        // SAFETY: the twin of the kernel's arguments; its words live as long as the bench.
        unsafe { stream.launch(&self.spin, (blocks, 1), self.spin_shared, &arguments) }?;
        Ok(Held { release, started })
    }

    /// Lets a stream wait until what is returned is dropped.
    pub(super) fn hold(&self, stream: &Stream) -> Result<Held<'_>, CudaError> {
        let (flag, started) = (self.word(), self.word());
        self.write(stream, started.address, 1)?;
        self.wait(stream, flag.address, 1)?;
        Ok(Held { release: Release::Word(flag), started })
    }

    /// Enqueues a kernel of one small block that sets `word`.
    pub(super) fn mark(&self, stream: &Stream, word: Word<'_>, value: u32) -> Result<(), CudaError> {
        let arguments = Mark { at: word.address, value, padding: 0 };
        // SAFETY: the twin of the kernel's arguments; the word lives as long as the bench.
        unsafe { stream.launch(&self.mark, (1, 1), 0, &arguments) }
    }

    /// Enqueues a wait for a word.
    pub(super) fn wait(&self, stream: &Stream, address: u64, value: u32) -> Result<(), CudaError> {
        // SAFETY: probes wait for words and flags of the bench only, which live as long as it does.
        unsafe { stream.wait_value(address, value) }
    }

    /// Enqueues the writing of a word.
    pub(super) fn write(&self, stream: &Stream, address: u64, value: u32) -> Result<(), CudaError> {
        // SAFETY: as in `wait`.
        unsafe { stream.write_value(address, value) }
    }
}

impl Drop for Bench {
    /// Nothing may wait any longer once the words' memory goes.
    fn drop(&mut self) {
        for index in 0..self.used.load(Ordering::Relaxed) {
            // SAFETY: as in `word`.
            let word = unsafe { &*self.words.start.add(index * LINE).cast::<AtomicU32>() };
            word.store(RELEASED, Ordering::Release);
        }
    }
}

/// Where the word lies that a spinning kernel looks at.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Polled {
    /// In the GPU's memory.
    Device,
    /// In the host's.
    Host,
}

/// A spinning kernel or a waiting stream; it goes on when this is dropped.
pub(super) struct Held<'a> {
    release: Release<'a>,
    started: Word<'a>,
}

/// What lets it go on.
enum Release<'a> {
    Word(Word<'a>),
    /// A word of device memory that a stream writes.
    Flag {
        bench: &'a Bench,
        address: u64,
        number: u32,
    },
}

impl Held<'_> {
    /// Whether it has begun, with all its blocks, after waiting for that a while.
    pub(super) fn runs(&self) -> bool {
        time_until(NEVER, || Ok(self.started.get() != 0)).is_ok_and(|time| time.is_some())
    }
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        match &self.release {
            Release::Word(word) => word.set(1),
            Release::Flag { bench, address, number } => {
                // If the GPU refuses that, the kernel still ends by itself.
                let _ = bench.write(&bench.releases, *address, *number);
            }
        }
    }
}

/// How long it takes until `done`; absent if longer than `limit`.
pub(super) fn time_until(
    limit: Duration,
    mut done: impl FnMut() -> Result<bool, CudaError>,
) -> Result<Option<Duration>, CudaError> {
    let began = Instant::now();
    loop {
        if done()? {
            return Ok(Some(began.elapsed()));
        }
        if began.elapsed() > limit {
            return Ok(None);
        }
        std::hint::spin_loop();
    }
}

/// A quantile of some times, in microseconds.
pub(super) fn quantile(times: &[Duration], part: f64) -> f64 {
    let mut sorted = times.to_vec();
    sorted.sort_unstable();
    let at = (sorted.len().saturating_sub(1) as f64 * part).round() as usize;
    sorted.get(at).map_or(f64::NAN, |time| time.as_secs_f64() * 1e6)
}
