//! Ranks that are processes. Rank 0 has the engine and a model of its own, and writes orders to the others by the control
//! channel; [`work`] is their life.

use crate::executor::{Answer, raise, take_step};
use crate::{EngineError, Executor, StepReport, ThreadExecutor};
use epsmoe_base::{Fault, FaultCell, FaultKind, Place, Rank, panic_text};
use epsmoe_device::Backend;
use epsmoe_fabric::process::Processes;
use epsmoe_model::{Batch, Model, ModelError, ModelOptions};
use epsmoe_plan::ScheduleReport;
use serde::{Deserialize, Serialize};
use std::borrow::Cow;
use std::collections::HashMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// What rank 0 tells a worker. There may be several engines, each with a model on every rank, which never run at once.
#[derive(Serialize, Deserialize)]
enum Order<'a> {
    /// Load the model for a new engine; answered by [`Loaded`].
    Load { engine: u64, options: Cow<'a, ModelOptions> },
    /// Take a step; answered by [`Answer`].
    Step { engine: u64, batch: Cow<'a, Batch>, recorded: bool },
    /// The engine is gone.
    Unload { engine: u64 },
}

/// A worker has its model. One that could not load it has stopped the world instead.
#[derive(Serialize, Deserialize)]
struct Loaded {
    engine: u64,
}

/// The other ranks, as rank 0 commands them.
pub struct Workers {
    processes: Processes,
    engines: AtomicU64,
}

impl Workers {
    /// Those of a world whose rank 0 is here.
    pub fn new(processes: Processes) -> Arc<Self> {
        Arc::new(Workers { processes, engines: AtomicU64::new(0) })
    }

    /// The world.
    pub fn processes(&self) -> &Processes {
        &self.processes
    }

    /// Has all of them load the model, once each has found that it can.
    pub(crate) fn load(self: &Arc<Self>, options: &ModelOptions) -> Result<Loading, EngineError> {
        let engine = self.engines.fetch_add(1, Ordering::Relaxed);
        let order = encoded(&Order::Load { engine, options: Cow::Borrowed(options) })?;
        self.ranks().try_for_each(|rank| self.processes.send(rank, &order))?;
        self.processes.control().barrier(Place::default())?;
        Ok(Loading { workers: Arc::clone(self), engine })
    }

    /// Rank 0 cannot load the model: the world is at its end. What stopped it before is the reason, if something did.
    pub(crate) fn give_up(&self, error: ModelError) -> EngineError {
        let stopped = self.processes.faults().get().is_some();
        let fault = raise(Rank(0), self.processes.faults(), FaultKind::Invalid, error.to_string());
        if stopped { EngineError::Fault(fault) } else { EngineError::Model(error) }
    }

    fn ranks(&self) -> impl Iterator<Item = Rank> + use<> {
        (1..self.processes.members().len()).map(Rank)
    }

    fn hear<T: for<'a> Deserialize<'a>>(&self, rank: Rank) -> Result<T, Fault> {
        let letter = self.processes.receive(rank)?;
        let said = letter.as_deref().map(postcard::from_bytes);
        said.and_then(Result::ok).ok_or_else(|| {
            let who = &self.processes.members()[rank.0];
            let problem = if letter.is_none() { "has left" } else { "gave an answer to another question" };
            raise(Rank(0), self.processes.faults(), FaultKind::Lost, format!("{who} {problem}"))
        })
    }
}

/// Workers on their way to a model.
pub(crate) struct Loading {
    workers: Arc<Workers>,
    engine: u64,
}

impl Loading {
    /// Waits until all of them have it. `local` is rank 0.
    pub(crate) fn executor(self, local: ThreadExecutor) -> Result<ProcessExecutor, Fault> {
        let Loading { workers, engine } = self;
        for rank in workers.ranks() {
            let loaded: Loaded = workers.hear(rank)?;
            debug_assert_eq!(loaded.engine, engine);
        }
        Ok(ProcessExecutor { workers, engine, local })
    }
}

/// Rank 0 as a thread of this process, and the others as they are told.
pub(crate) struct ProcessExecutor {
    workers: Arc<Workers>,
    engine: u64,
    local: ThreadExecutor,
}

impl Executor for ProcessExecutor {
    fn ranks(&self) -> usize {
        self.workers.processes.members().len()
    }

    fn launch(&mut self, batches: Vec<Arc<Batch>>, recorded: bool) -> Result<(), Fault> {
        self.faults().check()?;
        let mut batches = batches.into_iter();
        let first = batches.next();
        for (rank, batch) in self.workers.ranks().zip(batches) {
            let order = Order::Step { engine: self.engine, batch: Cow::Borrowed(&*batch), recorded };
            let order = encoded(&order)
                .map_err(|error| raise(Rank(0), &self.faults(), FaultKind::Invalid, error.to_string()))?;
            self.workers.processes.send(rank, &order)?;
        }
        self.local.launch(first.into_iter().collect(), recorded)
    }

    fn finish(&mut self) -> Result<StepReport, Fault> {
        let mut report = self.local.finish()?;
        for rank in self.workers.ranks() {
            let Answer { output, spans } = self.workers.hear(rank)?;
            report.outputs.push(output);
            report.timeline.spans.extend(spans);
        }
        Ok(report)
    }

    fn schedule(&self) -> Option<ScheduleReport> {
        self.local.schedule()
    }

    fn faults(&self) -> FaultCell {
        self.workers.processes.faults().clone()
    }
}

impl Drop for ProcessExecutor {
    fn drop(&mut self) {
        if let Ok(order) = encoded(&Order::Unload { engine: self.engine }) {
            // Of a world that has stopped nobody is left to hear it.
            self.workers.ranks().for_each(|rank| drop(self.workers.processes.send(rank, &order)));
        }
    }
}

/// A worker's life: does what rank 0 orders until rank 0 says goodbye. `check` refuses what this machine has no room for,
/// which it looks at while no rank loads; then `load` makes the model of an engine.
///
/// # Errors
/// The world has stopped.
pub fn work<B: Backend>(
    processes: &Processes,
    mut check: impl FnMut(&ModelOptions) -> Result<(), EngineError>,
    mut load: impl FnMut(ModelOptions) -> Result<Model<B>, EngineError>,
) -> Result<(), Fault> {
    let (rank, faults) = (processes.rank(), processes.faults());
    let invalid = |message: String| raise(rank, faults, FaultKind::Invalid, message);
    let mut models: HashMap<u64, Model<B>> = HashMap::new();
    while let Some(letter) = processes.receive(Rank(0))? {
        match postcard::from_bytes(&letter)
            .map_err(|_| invalid("an order that is none came from rank 0".into()))?
        {
            Order::Load { engine, options } => {
                check(&options).map_err(|error| invalid(error.to_string()))?;
                processes.control().barrier(Place::default())?;
                let loaded = catch_unwind(AssertUnwindSafe(|| load(options.into_owned())));
                let model = match loaded {
                    Ok(loaded) => loaded.map_err(|error| match error {
                        EngineError::Fault(fault) => faults.raise(fault),
                        error => invalid(error.to_string()),
                    })?,
                    Err(panic) => {
                        let message = format!("panicked: {}", panic_text(panic.as_ref()));
                        return Err(raise(rank, faults, FaultKind::Panic, message));
                    }
                };
                models.insert(engine, model);
                tell(processes, &Loaded { engine })?;
            }
            Order::Step { engine, batch, recorded } => {
                let model =
                    models.get(&engine).ok_or_else(|| invalid("a step of no engine was ordered".into()))?;
                let mut told = Ok(());
                take_step(rank, model, faults, &batch, recorded, |answer| {
                    told = answer.and_then(|answer| tell(processes, &answer));
                });
                told?;
            }
            Order::Unload { engine } => drop(models.remove(&engine)),
        }
    }
    Ok(())
}

fn tell(processes: &Processes, what: &impl Serialize) -> Result<(), Fault> {
    let invalid = |error: EngineError| {
        let fault = Fault {
            kind: FaultKind::Invalid,
            rank: processes.rank(),
            place: Place::default(),
            message: error.to_string(),
        };
        processes.faults().raise(fault)
    };
    processes.send(Rank(0), &encoded(what).map_err(invalid)?)
}

fn encoded(what: &impl Serialize) -> Result<Vec<u8>, EngineError> {
    postcard::to_stdvec(what)
        .map_err(|error| EngineError::Request(format!("cannot write to a worker: {error}")))
}
