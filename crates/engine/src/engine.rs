//! START HERE: [`Engine::step`].

use crate::kv_blocks::blocks_for;
use crate::scheduler::{ScheduledChunk, Scheduler, Sequence};
use crate::{Completion, EngineError, Executor, Finish, Request, StepReport};
use epsmoe_base::{FaultCell, Rank};
use epsmoe_device::Backend;
use epsmoe_fabric::Fabric;
use epsmoe_model::{Model, ModelOptions, ModelSpec, Parallel, RoutingMode, WeightSource};
use epsmoe_pipeline::RoutingLog;
use epsmoe_plan::{Policy, ScheduleReport};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How an engine is set up.
#[derive(Clone, Debug)]
pub struct EngineOptions {
    /// Most tokens of one group of ranks in one step.
    pub max_batched_tokens: usize,
    /// Most sequences of one group at once.
    pub max_sequences: usize,
    /// Longest sequence, prompt and new tokens together.
    pub max_model_len: usize,
    /// How MoE layers are scheduled.
    pub policy: Policy,
    /// How the model is spread over ranks.
    pub parallel: Parallel,
    /// What decides where tokens go, and whether that is recorded.
    pub routing: RoutingMode,
    /// How long any wait may take.
    pub timeout: Duration,
}

impl EngineOptions {
    /// What each rank's model is told.
    pub fn model(&self) -> ModelOptions {
        let max_blocks = blocks_for(self.max_model_len).max(1);
        ModelOptions {
            max_tokens: self.max_batched_tokens,
            max_sequences: self.max_sequences,
            cache_blocks: max_blocks * self.max_sequences,
            max_blocks,
            policy: self.policy.clone(),
            capacity: None,
            parallel: self.parallel,
            routing: self.routing.clone(),
            timeout: self.timeout,
        }
    }
}

/// Requests in, completions out.
pub struct Engine {
    spec: Arc<ModelSpec>,
    options: EngineOptions,
    executor: Executor,
    /// Of each group of ranks that compute the same tokens.
    queues: Vec<Scheduler>,
    submitted: u64,
    finished: BTreeMap<u64, Completion>,
    routing: RoutingLog,
    schedule: Option<ScheduleReport>,
}

impl Engine {
    /// Loads the model on every rank, one after the other so that shared weights are read once, and starts
    /// them.
    pub fn start<B: Backend, F: Fabric<B>>(
        spec: Arc<ModelSpec>,
        source: &dyn WeightSource,
        ranks: Vec<(Arc<B>, Arc<F>)>,
        faults: FaultCell,
        options: EngineOptions,
        mut loaded: impl FnMut(Rank),
    ) -> Result<Self, EngineError> {
        let model_options = options.model();
        let groups = options.parallel.groups(ranks.len())?;
        let mut models = Vec::with_capacity(ranks.len());
        for (device, fabric) in ranks {
            let rank = fabric.rank();
            models.push(Model::load(Arc::clone(&spec), source, device, fabric, model_options.clone())?);
            loaded(rank);
        }
        let queues = (0..groups).map(|_| Scheduler::new(model_options.cache_blocks)).collect();
        let executor = Executor::start(models, faults)?;
        let (finished, routing) = (BTreeMap::new(), RoutingLog::default());
        Ok(Engine { spec, options, executor, queues, submitted: 0, finished, routing, schedule: None })
    }

    /// Puts a request in the queue of the group with the least to do; returns its number.
    pub fn submit(&mut self, request: Request) -> Result<u64, EngineError> {
        request.check(self.spec.vocab, self.options.max_model_len)?;
        let number = self.submitted;
        self.submitted += 1;
        let sequence = Sequence {
            number,
            tokens: request.prompt.clone(),
            request,
            cached: 0,
            blocks: Vec::new(),
            completion: Completion::default(),
            submitted: Instant::now(),
        };
        let idlest = self.queues.iter_mut().min_by_key(|queue| queue.load());
        if let Some(queue) = idlest {
            queue.waiting.push_back(sequence);
        }
        Ok(number)
    }

    /// Whether there is nothing left to do.
    pub fn is_idle(&self) -> bool {
        self.queues.iter().all(Scheduler::is_idle)
    }

    /// One step of every rank: a batch for each group, the model, a token for every sequence that has come to
    /// its end, from the logits of its group's first rank. Groups without work take part, for their experts.
    pub fn step(&mut self) -> Result<StepReport, EngineError> {
        let group_size = self.executor.size() / self.queues.len();
        let mut batches = Vec::with_capacity(self.executor.size());
        let mut pieces = Vec::with_capacity(self.queues.len());
        for queue in &mut self.queues {
            queue.admit(self.options.max_sequences);
            let (batch, of_group) = queue.next_batch(self.options.max_batched_tokens);
            batches.extend(std::iter::repeat_n(batch, group_size));
            pieces.push(of_group);
        }
        let mut report = self.executor.step(batches)?;
        for output in &mut report.outputs {
            self.routing.merge(std::mem::take(&mut output.routing));
        }
        if let Some(output) = report.outputs.first_mut() {
            self.schedule = output.schedule.take();
        }
        let first_ranks = report.outputs.iter().step_by(group_size);
        for ((queue, output), pieces) in self.queues.iter_mut().zip(first_ranks).zip(&pieces) {
            // A step gives one or the other.
            let logits = output.logits.chunks_exact(self.spec.vocab).map(Row::Logits);
            let mut rows = logits.chain(output.tokens.iter().copied().map(Row::MostLikely));
            for piece in pieces {
                queue.running[piece.sequence].advance(
                    piece,
                    rows.by_ref().take(piece.logits),
                    &self.spec.eos,
                );
            }
            for sequence in queue.running.extract_if(.., |sequence| sequence.completion.finish.is_some()) {
                queue.blocks.give_back(sequence.blocks);
                self.finished.insert(sequence.number, sequence.completion);
            }
        }
        Ok(report)
    }

    /// New tokens of a request so far.
    pub fn tokens(&self, number: u64) -> &[u32] {
        let mut running = self.queues.iter().flat_map(|queue| &queue.running);
        let running = running.find(|sequence| sequence.number == number).map(|sequence| &sequence.completion);
        running.or_else(|| self.finished.get(&number)).map_or(&[], |completion| &completion.ids)
    }

    /// Ends a request where it is: its text has come to a stop, or nobody wants it any more.
    pub fn stop(&mut self, number: u64) {
        for queue in &mut self.queues {
            if let Some(mut sequence) = queue.remove(number) {
                sequence.completion.finish = Some(Finish::Stop);
                self.finished.insert(number, sequence.completion);
            }
        }
    }

    /// Where tokens went so far, if [`RoutingMode::Record`] was asked for; sequences are numbered by
    /// [`submit`](Engine::submit).
    pub fn routing(&self) -> &RoutingLog {
        &self.routing
    }

    /// How the auto schedule planned the MoE layers so far, as the first rank saw it.
    pub fn schedule(&self) -> Option<&ScheduleReport> {
        self.schedule.as_ref()
    }

    /// The answer of a request that has ended.
    pub fn take(&mut self, number: u64) -> Option<Completion> {
        self.finished.remove(&number)
    }

    /// Runs requests to their ends; answers come in the order of the requests. `each` sees every step.
    pub fn run(
        &mut self,
        requests: Vec<Request>,
        mut each: impl FnMut(&StepReport),
    ) -> Result<Vec<Completion>, EngineError> {
        let numbers = requests.into_iter().map(|request| self.submit(request));
        let numbers = numbers.collect::<Result<Vec<_>, _>>()?;
        while !self.is_idle() {
            each(&self.step()?);
        }
        Ok(numbers.into_iter().filter_map(|number| self.take(number)).collect())
    }
}

/// What a step computed of a token that may be followed by a new one.
enum Row<'a> {
    /// Logits `[V]`.
    Logits(&'a [f32]),
    /// The token of the largest of them.
    MostLikely(u32),
}

impl Sequence {
    /// Takes in what a step computed of it: cached positions, prompt logits, and maybe a new token.
    fn advance<'a>(&mut self, piece: &ScheduledChunk, rows: impl Iterator<Item = Row<'a>>, eos: &[u32]) {
        self.cached = piece.positions.end;
        let mut last = None;
        for row in rows {
            if let Row::Logits(logits) = row
                && self.request.prompt_logits
                && self.completion.ids.is_empty()
            {
                self.completion.prompt_logits.extend_from_slice(logits);
            }
            last = Some(row);
        }
        if self.cached < self.tokens.len() {
            return;
        }
        if let Some(row) = last.filter(|_| self.request.max_tokens > 0) {
            let id = match row {
                Row::Logits(logits) => self.request.sampling.choose(logits, &self.tokens, self.number),
                Row::MostLikely(id) => id,
            };
            self.tokens.push(id);
            self.completion.ids.push(id);
            if self.completion.ids.len() == 1 {
                self.completion.time_to_first_token = self.submitted.elapsed();
            }
            if eos.contains(&id) && !self.request.ignore_eos {
                self.completion.finish = Some(Finish::Stop);
            }
        }
        if self.completion.ids.len() == self.request.max_tokens {
            self.completion.finish.get_or_insert(Finish::Length);
        }
        self.completion.total_time = self.submitted.elapsed();
    }
}
