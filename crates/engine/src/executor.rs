//! What runs steps: the ranks of a world, all of which take every step together. Here they are threads; `workers` has
//! those that are processes.

use crate::EngineError;
use epsmoe_base::{Fault, FaultCell, FaultKind, Place, Rank, panic_text};
use epsmoe_device::{Backend, DeviceError};
use epsmoe_model::{Batch, Model, ModelError, StepOutput};
use epsmoe_pipeline::{PipelineError, take_spans};
use epsmoe_plan::{ScheduleReport, Span, Timeline};
use serde::{Deserialize, Serialize};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;

/// What one step of all ranks gave.
#[derive(Clone, Debug, Default)]
pub struct StepReport {
    /// By rank.
    pub outputs: Vec<StepOutput>,
    /// What ran when, on every rank; empty unless the step was recorded.
    pub timeline: Timeline,
}

/// Runs steps. The next step may be prepared while one runs: starting one and waiting for it are apart.
pub trait Executor: Send {
    /// Number of ranks.
    fn ranks(&self) -> usize;

    /// Starts a step with a batch for each rank; `recorded` asks for its timeline.
    fn launch(&mut self, batches: Vec<Arc<Batch>>, recorded: bool) -> Result<(), Fault>;

    /// Waits for the step that was started first of those not waited for yet.
    fn finish(&mut self) -> Result<StepReport, Fault>;

    /// How the auto schedule planned the MoE layers so far, as the first rank sees it.
    fn schedule(&self) -> Option<ScheduleReport>;

    /// Where it is seen that the ranks have stopped, also between steps; never, where nothing can stop them.
    fn faults(&self) -> FaultCell {
        FaultCell::default()
    }
}

/// Ranks that are threads of this process, all of a world or some; dropping it lets them finish and joins them.
pub struct ThreadExecutor {
    faults: FaultCell,
    workers: Vec<Worker>,
    threads: Vec<JoinHandle<()>>,
}

struct Worker {
    rank: Rank,
    orders: Sender<Order>,
    answers: Receiver<Result<Answer, Fault>>,
}

/// What a rank is told to do.
enum Order {
    Step { batch: Arc<Batch>, recorded: bool },
    Schedule(Sender<Option<ScheduleReport>>),
}

/// What a rank says after a step.
#[derive(Serialize, Deserialize)]
pub(crate) struct Answer {
    pub(crate) output: StepOutput,
    /// What it did when, if that was to be recorded.
    pub(crate) spans: Vec<Span>,
}

impl ThreadExecutor {
    /// Starts a thread for each rank's model.
    pub fn start<B: Backend>(models: Vec<Model<B>>, faults: FaultCell) -> Result<Self, EngineError> {
        let mut executor = ThreadExecutor { faults, workers: Vec::new(), threads: Vec::new() };
        for model in models {
            let rank = model.device().rank();
            let (orders, inbox) = channel();
            let (outbox, answers) = channel();
            let faults = executor.faults.clone();
            let work = move || serve(rank, &model, &faults, &inbox, &outbox);
            let thread =
                std::thread::Builder::new().name(format!("rank{}", rank.0)).spawn(work).map_err(|error| {
                    EngineError::Request(format!("cannot start the thread of {rank}: {error}"))
                })?;
            executor.workers.push(Worker { rank, orders, answers });
            executor.threads.push(thread);
        }
        Ok(executor)
    }

    /// A rank's answer always comes: each of its waits has a deadline, and its panics are caught.
    fn answer(&self, worker: &Worker) -> Result<Answer, Fault> {
        let rank = worker.rank;
        loop {
            match worker.answers.recv_timeout(FaultCell::POLL) {
                Ok(answer) => return answer,
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => {
                    let message = "its thread ended without an answer".into();
                    let kind = FaultKind::Panic;
                    return Err(self.faults.raise(Fault { kind, rank, place: Place::default(), message }));
                }
            }
        }
    }

    fn first_fault(&self) -> Fault {
        let message = || "a rank failed without saying why. This is a bug.".to_owned();
        let unknown =
            || Fault { kind: FaultKind::Invalid, rank: Rank(0), place: Place::default(), message: message() };
        self.faults.get().cloned().unwrap_or_else(unknown)
    }
}

impl Executor for ThreadExecutor {
    fn ranks(&self) -> usize {
        self.workers.len()
    }

    /// After a fault, every further step fails with it.
    fn launch(&mut self, batches: Vec<Arc<Batch>>, recorded: bool) -> Result<(), Fault> {
        self.faults.check()?;
        for (worker, batch) in self.workers.iter().zip(batches) {
            // A rank that is gone is noticed when its answer is missing.
            let _ = worker.orders.send(Order::Step { batch, recorded });
        }
        Ok(())
    }

    fn finish(&mut self) -> Result<StepReport, Fault> {
        let mut report = StepReport::default();
        let mut failed = false;
        for worker in &self.workers {
            match self.answer(worker) {
                Ok(Answer { output, spans }) => {
                    report.outputs.push(output);
                    report.timeline.spans.extend(spans);
                }
                Err(_) => failed = true,
            }
        }
        if failed { Err(self.first_fault()) } else { Ok(report) }
    }

    fn schedule(&self) -> Option<ScheduleReport> {
        let (answer, inbox) = channel();
        self.workers.first()?.orders.send(Order::Schedule(answer)).ok()?;
        inbox.recv().ok()?
    }

    fn faults(&self) -> FaultCell {
        self.faults.clone()
    }
}

impl Drop for ThreadExecutor {
    fn drop(&mut self) {
        self.workers.clear();
        for thread in self.threads.drain(..) {
            // Panics were caught and reported where they happened.
            let _ = thread.join();
        }
    }
}

/// A rank's life: batches in, outputs out, until nobody sends any more.
fn serve<B: Backend>(
    rank: Rank,
    model: &Model<B>,
    faults: &FaultCell,
    inbox: &Receiver<Order>,
    outbox: &Sender<Result<Answer, Fault>>,
) {
    while let Ok(order) = inbox.recv() {
        match order {
            Order::Step { batch, recorded } => {
                // Whoever waits for the answer may have gone; the next order is missing then.
                take_step(rank, model, faults, &batch, recorded, |answer| drop(outbox.send(answer)));
            }
            Order::Schedule(asker) => {
                // Whoever asked may have gone.
                let _ = asker.send(model.schedule());
            }
        }
    }
}

/// One step of one rank, which learns from it after it has answered.
pub(crate) fn take_step<B: Backend>(
    rank: Rank,
    model: &Model<B>,
    faults: &FaultCell,
    batch: &Batch,
    recorded: bool,
    answer: impl FnOnce(Result<Answer, Fault>),
) {
    model.device().set_recording(recorded || model.wants_spans());
    let output = forward(rank, model, faults, batch);
    let spans = take_spans(model.device());
    let (failed, told) = (output.is_err(), if recorded { spans.clone() } else { Vec::new() });
    answer(output.map(|output| Answer { output, spans: told }));
    if failed {
        return;
    }
    let learned = catch_unwind(AssertUnwindSafe(|| model.observe(&spans)));
    if let Err(panic) = learned {
        raise(rank, faults, FaultKind::Panic, format!("panicked: {}", panic_text(panic.as_ref())));
    }
}

/// One step of one rank. Whatever goes wrong becomes the world's fault.
fn forward<B: Backend>(
    rank: Rank,
    model: &Model<B>,
    faults: &FaultCell,
    batch: &Batch,
) -> Result<StepOutput, Fault> {
    match catch_unwind(AssertUnwindSafe(|| model.forward(batch))) {
        Ok(Ok(output)) => Ok(output),
        Ok(Err(ModelError::Pipeline(PipelineError::Fault(fault)))) => Err(faults.raise(fault)),
        Ok(Err(ModelError::Device(DeviceError::Fault(fault)))) => Err(faults.raise(fault)),
        Ok(Err(error)) => Err(raise(rank, faults, FaultKind::Invalid, error.to_string())),
        Err(panic) => {
            let message = format!("panicked: {}", panic_text(panic.as_ref()));
            Err(raise(rank, faults, FaultKind::Panic, message))
        }
    }
}

pub(crate) fn raise(rank: Rank, faults: &FaultCell, kind: FaultKind, message: String) -> Fault {
    faults.raise(Fault { kind, rank, place: Place::default(), message })
}
