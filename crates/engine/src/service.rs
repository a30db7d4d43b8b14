//! An engine with a thread of its own: requests come in and are called off at any time, from any thread.
//! START HERE: [`EngineService::start`]; what the thread does is in [`Service::run`].

use crate::engine::Limits;
use crate::figures::Watch;
use crate::{Engine, EngineError, Event, Failure, LayerFigures, Request, RequestId, StepReport};
use epsmoe_base::{Fault, FaultCell, FaultKind, Place, Rank, panic_text};
use std::collections::HashMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How requests are taken in.
#[derive(Clone, Copy, Debug)]
pub struct ServiceOptions {
    /// Most requests that wait for those that run.
    pub max_queued_requests: usize,
}

/// What an engine has done so far, and what there is now.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct EngineStats {
    /// Requests that take part in steps.
    pub running: u64,
    /// Requests that wait.
    pub waiting: u64,
    /// Cache blocks that requests have, over all groups of ranks.
    pub kv_blocks_used: u64,
    /// Cache blocks there are.
    pub kv_blocks_total: u64,
    /// Prompt tokens that were looked for in the cache …
    pub prefix_queries: u64,
    /// … and found.
    pub prefix_hits: u64,
    /// Times that a request lost its blocks to an older one.
    pub preemptions: u64,
    /// Steps of the ranks.
    pub steps: u64,
    /// Tokens of the prompts that were computed.
    pub prompt_tokens: u64,
    /// New tokens.
    pub generation_tokens: u64,
}

/// Why a request was not taken in.
#[derive(Debug, thiserror::Error)]
pub enum Rejected {
    /// As many wait as may.
    #[error("{open} requests are open, and no more than {most} may be: try again when some have ended")]
    QueueFull {
        /// Requests that run or wait.
        open: usize,
        /// Most of them.
        most: usize,
    },
    /// Never will so many be taken in at once.
    #[error("{wanted} answers at once are more than the {most} that may run or wait here: ask for fewer")]
    TooMany {
        /// Answers that are wanted.
        wanted: usize,
        /// Most requests that run or wait.
        most: usize,
    },
    /// The request asks for something impossible.
    #[error(transparent)]
    Invalid(#[from] EngineError),
    /// The ranks have stopped.
    #[error(transparent)]
    Stopped(Fault),
    /// The engine goes to its end.
    #[error("the engine is shutting down")]
    Draining,
}

/// Starts engines.
pub struct EngineService;

impl EngineService {
    /// Gives the engine a thread that steps it while there is work.
    pub fn start(engine: Engine, options: ServiceOptions) -> Result<EngineHandle, EngineError> {
        let (commands, inbox) = channel();
        let shared = Arc::new(Shared {
            limits: engine.limits(),
            most_open: engine.max_running().saturating_add(options.max_queued_requests),
            open: AtomicUsize::new(0),
            next: AtomicU64::new(0),
            door: RwLock::new(Door::Open),
            faults: engine.faults(),
            stats: Mutex::new(engine.stats()),
            figures: Mutex::default(),
            figures_wanted: AtomicBool::new(false),
            thread: Mutex::new(None),
        });
        let service = Service {
            engine,
            shared: Arc::clone(&shared),
            sinks: HashMap::new(),
            watch: Watch::default(),
            closing: None,
        };
        let thread = std::thread::Builder::new().name("engine".into()).spawn(move || service.run(&inbox));
        let thread = thread
            .map_err(|error| EngineError::Request(format!("cannot start the engine's thread: {error}")))?;
        *lock(&shared.thread) = Some(thread);
        Ok(EngineHandle { shared, commands })
    }
}

/// The way to an engine that runs on its own thread; clones are ways to the same one.
#[derive(Clone)]
pub struct EngineHandle {
    shared: Arc<Shared>,
    commands: Sender<Command>,
}

/// What handles and the engine's thread both see.
struct Shared {
    limits: Limits,
    /// Requests that have not ended, and how many there may be.
    open: AtomicUsize,
    most_open: usize,
    next: AtomicU64,
    door: RwLock<Door>,
    /// Ranks that are processes can stop while nobody asks anything of them.
    faults: FaultCell,
    stats: Mutex<EngineStats>,
    /// The last ones, and whether somebody has asked since.
    figures: Mutex<Option<Arc<LayerFigures>>>,
    figures_wanted: AtomicBool,
    thread: Mutex<Option<JoinHandle<()>>>,
}

/// Whether requests are let in. Whoever sends one holds the lock for reading, so that none can slip in behind
/// whoever shuts the door.
enum Door {
    Open,
    Draining,
    Stopped(Fault),
}

type Sink = Box<dyn FnMut(Event) + Send>;

enum Command {
    Submit {
        id: RequestId,
        request: Box<Request>,
        submitted: Instant,
        sink: Sink,
    },
    Abort(RequestId),
    /// Requests that are open at that time are aborted, and the thread ends.
    Close(Instant),
}

impl EngineHandle {
    /// Takes a request in. `events` is called on the engine's thread for whatever happens to it, and must not block.
    pub fn submit(
        &self,
        request: Request,
        events: impl FnMut(Event) + Send + 'static,
    ) -> Result<RequestId, Rejected> {
        let shared = &*self.shared;
        shared.limits.check(&request)?;
        let door = shared.door.read().unwrap_or_else(PoisonError::into_inner);
        match &*door {
            Door::Open => {}
            Door::Draining => return Err(Rejected::Draining),
            Door::Stopped(fault) => return Err(Rejected::Stopped(fault.clone())),
        }
        let one_more = |open| (open < shared.most_open).then_some(open + 1);
        shared
            .open
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, one_more)
            .map_err(|open| Rejected::QueueFull { open, most: shared.most_open })?;
        let id = RequestId(shared.next.fetch_add(1, Ordering::Relaxed));
        let (request, sink) = (Box::new(request), Box::new(events));
        let _ = self.commands.send(Command::Submit { id, request, submitted: Instant::now(), sink });
        Ok(id)
    }

    /// Whether so many requests would be taken in now; so that who brings several does not bring some of them in vain.
    pub fn room_for(&self, wanted: usize) -> Result<(), Rejected> {
        let (open, most) = (self.shared.open.load(Ordering::Relaxed), self.shared.most_open);
        match () {
            () if wanted > most => Err(Rejected::TooMany { wanted, most }),
            () if open.saturating_add(wanted) > most => Err(Rejected::QueueFull { open, most }),
            () => Ok(()),
        }
    }

    /// Ends a request where it is. Its place and its cache blocks are free within one step; it is told
    /// `Finished(Abort)`, unless it had ended by itself.
    pub fn abort(&self, id: RequestId) {
        let _ = self.commands.send(Command::Abort(id));
    }

    /// Counts so far, and what there is now.
    pub fn stats(&self) -> EngineStats {
        *lock(&self.shared.stats)
    }

    /// What the MoE layers did in the steps that were watched last; nothing before the first of them. Asking has the
    /// next two steps watched, unless that was done less than a second ago: whoever asks regularly sees what was so
    /// when it asked before, and costs two steps some time. Never waits.
    pub fn layer_figures(&self) -> Option<Arc<LayerFigures>> {
        self.shared.figures_wanted.store(true, Ordering::Relaxed);
        lock(&self.shared.figures).clone()
    }

    /// Why the ranks have stopped, if they have.
    pub fn fault(&self) -> Option<Fault> {
        match &*self.shared.door.read().unwrap_or_else(PoisonError::into_inner) {
            Door::Stopped(fault) => Some(fault.clone()),
            Door::Open | Door::Draining => self.shared.faults.get().cloned(),
        }
    }

    /// Lets no more requests in, gives those that are open `patience` to end and aborts the rest. Returns when the
    /// engine's thread has ended and the ranks with it.
    pub fn drain(&self, patience: Duration) {
        {
            let mut door = self.shared.door.write().unwrap_or_else(PoisonError::into_inner);
            if matches!(*door, Door::Open) {
                *door = Door::Draining;
            }
        }
        let now = Instant::now();
        let _ = self.commands.send(Command::Close(now.checked_add(patience).unwrap_or(now)));
        if let Some(thread) = lock(&self.shared.thread).take() {
            // Its panics were caught where they happened.
            let _ = thread.join();
        }
    }

    /// Aborts every request and ends the engine.
    pub fn shutdown(&self) {
        self.drain(Duration::ZERO);
    }
}

/// What the engine's thread has.
struct Service {
    engine: Engine,
    shared: Arc<Shared>,
    sinks: HashMap<RequestId, Sink>,
    watch: Watch,
    /// When requests that are still open are aborted.
    closing: Option<Instant>,
}

impl Service {
    /// Steps while there is work and sleeps otherwise, until it is to end or the ranks have stopped. What a step gave
    /// is handed out while the next one runs.
    fn run(mut self, inbox: &Receiver<Command>) {
        loop {
            if self.engine.is_idle() {
                self.tell();
                if self.closing.is_some() {
                    return;
                }
                match inbox.recv() {
                    Ok(command) => self.obey(command),
                    Err(_) => return,
                }
            }
            while let Ok(command) = inbox.try_recv() {
                self.obey(command);
            }
            if self.closing.is_some_and(|at| Instant::now() >= at) {
                self.sinks
                    .keys()
                    .copied()
                    .collect::<Vec<_>>()
                    .into_iter()
                    .for_each(|id| self.engine.abort(id));
            }
            if self.engine.is_idle() {
                continue;
            }
            if self.shared.figures_wanted.swap(false, Ordering::Relaxed) {
                self.watch.want();
            }
            self.engine.watch(self.watch.times(), self.watch.experts());
            let step = self.guarded(Engine::launch).and_then(|()| {
                self.tell();
                self.guarded(Engine::finish)
            });
            match step {
                Ok(report) => self.show(&report),
                Err(fault) => return self.stop(fault, inbox),
            }
        }
    }

    /// Takes in a step for those who want to see what layers do.
    fn show(&mut self, report: &StepReport) {
        if self.watch.take_in(report, || self.engine.schedule()) {
            *lock(&self.shared.figures) = Some(Arc::new(self.watch.figures.clone()));
        }
    }

    fn obey(&mut self, command: Command) {
        match command {
            Command::Submit { id, request, submitted, sink } => {
                self.sinks.insert(id, sink);
                self.engine.enqueue(id, *request, submitted);
            }
            Command::Abort(id) => self.engine.abort(id),
            Command::Close(at) => self.closing = Some(self.closing.map_or(at, |earlier| earlier.min(at))),
        }
    }

    /// Calls the engine; whatever goes wrong becomes a fault.
    fn guarded<T>(&mut self, call: impl FnOnce(&mut Engine) -> Result<T, EngineError>) -> Result<T, Fault> {
        let fault = |kind, message| Fault { kind, rank: Rank(0), place: Place::default(), message };
        match catch_unwind(AssertUnwindSafe(|| call(&mut self.engine))) {
            Ok(Ok(result)) => Ok(result),
            Ok(Err(EngineError::Fault(fault))) => Err(fault),
            Ok(Err(error)) => Err(fault(FaultKind::Invalid, error.to_string())),
            Err(panic) => {
                let message = format!("the engine panicked: {}", panic_text(panic.as_ref()));
                Err(fault(FaultKind::Panic, message))
            }
        }
    }

    /// Hands out what happened. Whoever hears of an end finds it in the counts.
    fn tell(&mut self) {
        loop {
            *lock(&self.shared.stats) = self.engine.stats();
            let events = self.engine.take_events();
            if events.is_empty() {
                return;
            }
            events.into_iter().for_each(|(id, event)| self.tell_one(id, event));
        }
    }

    fn tell_one(&mut self, id: RequestId, event: Event) {
        let last = matches!(event, Event::Finished(_) | Event::Failed(_));
        let Some(sink) = self.sinks.get_mut(&id) else { return };
        // A listener that panics hears no more, and disturbs nobody else.
        let heard = catch_unwind(AssertUnwindSafe(|| sink(event))).is_ok();
        if last {
            self.sinks.remove(&id);
            self.shared.open.fetch_sub(1, Ordering::Relaxed);
        } else if !heard {
            self.sinks.insert(id, Box::new(|_| {}));
            self.engine.abort(id);
        }
    }

    /// The ranks have stopped: every open request learns why, also those that came in meanwhile.
    fn stop(mut self, fault: Fault, inbox: &Receiver<Command>) {
        self.tell();
        *self.shared.door.write().unwrap_or_else(PoisonError::into_inner) = Door::Stopped(fault.clone());
        while let Ok(command) = inbox.try_recv() {
            if let Command::Submit { id, sink, .. } = command {
                self.sinks.insert(id, sink);
            }
        }
        for (_, mut sink) in self.sinks.drain() {
            let failed = Event::Failed(Failure::Stopped(fault.clone()));
            let _ = catch_unwind(AssertUnwindSafe(|| sink(failed)));
            self.shared.open.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
