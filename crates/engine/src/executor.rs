//! The ranks of a world and their threads. All ranks take every step together.

use crate::EngineError;
use epsmoe_base::{Fault, FaultCell, FaultKind, Phase, Place, Rank, panic_text};
use epsmoe_device::{Backend, DeviceError};
use epsmoe_model::{Batch, Model, ModelError, StepOutput};
use epsmoe_pipeline::PipelineError;
use epsmoe_plan::{Span, Timeline};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;

/// What one step of all ranks gave.
#[derive(Clone, Debug, Default)]
pub struct StepReport {
    /// By rank.
    pub outputs: Vec<StepOutput>,
    /// What ran when, on every rank.
    pub timeline: Timeline,
}

type Answer = Result<(StepOutput, Vec<Span>), Fault>;

struct Worker {
    orders: Sender<Batch>,
    answers: Receiver<Answer>,
}

/// Running ranks; dropping it lets them finish and joins them.
pub struct Executor {
    faults: FaultCell,
    workers: Vec<Worker>,
    threads: Vec<JoinHandle<()>>,
}

impl Executor {
    /// Starts a thread for each rank's model.
    pub fn start<B: Backend>(models: Vec<Model<B>>, faults: FaultCell) -> Result<Self, EngineError> {
        let mut world = Executor { faults, workers: Vec::new(), threads: Vec::new() };
        for (rank, model) in models.into_iter().enumerate() {
            let (orders, inbox) = channel();
            let (outbox, answers) = channel();
            let faults = world.faults.clone();
            let work = move || serve(Rank(rank), &model, &faults, &inbox, &outbox);
            let thread =
                std::thread::Builder::new().name(format!("rank{rank}")).spawn(work).map_err(|error| {
                    EngineError::Request(format!("cannot start the thread of {}: {error}", Rank(rank)))
                })?;
            world.workers.push(Worker { orders, answers });
            world.threads.push(thread);
        }
        Ok(world)
    }

    /// Number of ranks.
    pub fn size(&self) -> usize {
        self.workers.len()
    }

    /// Runs one batch per rank. After a fault, every further step fails with it.
    pub fn step(&self, batches: Vec<Batch>) -> Result<StepReport, Fault> {
        self.faults.check()?;
        for (worker, batch) in self.workers.iter().zip(batches) {
            // A rank that is gone is noticed when its answer is missing.
            let _ = worker.orders.send(batch);
        }
        let mut report = StepReport::default();
        let mut failed = false;
        for (rank, worker) in self.workers.iter().enumerate() {
            match self.answer(Rank(rank), worker) {
                Ok((output, spans)) => {
                    report.outputs.push(output);
                    report.timeline.spans.extend(spans);
                }
                Err(_) => failed = true,
            }
        }
        if failed { Err(self.first_fault()) } else { Ok(report) }
    }

    /// A rank's answer always comes: each of its waits has a deadline, and its panics are caught.
    fn answer(&self, rank: Rank, worker: &Worker) -> Answer {
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

impl Drop for Executor {
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
    inbox: &Receiver<Batch>,
    outbox: &Sender<Answer>,
) {
    while let Ok(batch) = inbox.recv() {
        let raise = |kind, message| {
            let place = Place::default();
            Err(faults.raise(Fault { kind, rank, place, message }))
        };
        let answer = match catch_unwind(AssertUnwindSafe(|| model.forward(&batch))) {
            Ok(Ok(mut output)) => {
                let spans = spans(rank, model);
                output.schedule = model.observe(&spans);
                Ok((output, spans))
            }
            Ok(Err(ModelError::Pipeline(PipelineError::Fault(fault)))) => Err(faults.raise(fault)),
            Ok(Err(ModelError::Device(DeviceError::Fault(fault)))) => Err(faults.raise(fault)),
            Ok(Err(error)) => raise(FaultKind::Invalid, error.to_string()),
            Err(panic) => raise(FaultKind::Panic, format!("panicked: {}", panic_text(panic.as_ref()))),
        };
        if outbox.send(answer).is_err() {
            return;
        }
    }
}

fn spans<B: Backend>(rank: Rank, model: &Model<B>) -> Vec<Span> {
    let span = |record: epsmoe_device::Record| Span {
        rank,
        layer: record.place.layer,
        stage: record.place.stage,
        lane: record.lane,
        phase: record.place.phase.unwrap_or(Phase::Other),
        name: record.name.into(),
        start_ns: record.start_ns,
        end_ns: record.end_ns,
    };
    model.device().take_records().into_iter().map(span).collect()
}
