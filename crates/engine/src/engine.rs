//! START HERE: [`Engine::step`].

use crate::kv_blocks::blocks_for;
use crate::scheduler::{ScheduledChunk, Scheduler, Sequence};
use crate::{Completion, EngineError, EngineStats, Event, Executor, Finish, Request, RequestId, StepReport};
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
    /// Whether what ran when is recorded, for [`StepReport::timeline`]; the auto schedule over several ranks records
    /// anyway.
    pub record_spans: bool,
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
    finished: BTreeMap<RequestId, Completion>,
    /// What happened to requests since somebody last asked.
    events: Vec<(RequestId, Event)>,
    stats: EngineStats,
    routing: RoutingLog,
    schedule: Option<ScheduleReport>,
}

impl Engine {
    /// Loads the model on every rank, one after the other so that shared weights are read once, and starts
    /// them.
    pub fn start<B: Backend>(
        spec: Arc<ModelSpec>,
        source: &dyn WeightSource,
        ranks: Vec<(Arc<B>, Fabric<B>)>,
        faults: FaultCell,
        options: EngineOptions,
        mut loaded: impl FnMut(Rank),
    ) -> Result<Self, EngineError> {
        let model_options = options.model();
        let groups = options.parallel.groups(ranks.len())?;
        let mut models = Vec::with_capacity(ranks.len());
        for (device, fabric) in ranks {
            let rank = fabric.rank();
            device.set_recording(options.record_spans);
            models.push(Model::load(Arc::clone(&spec), source, device, fabric, model_options.clone())?);
            loaded(rank);
        }
        let queues = (0..groups).map(|_| Scheduler::new(model_options.cache_blocks)).collect();
        let executor = Executor::start(models, faults)?;
        let capacity = model_options.cache_blocks as u64 * groups as u64;
        Ok(Engine {
            spec,
            options,
            executor,
            queues,
            submitted: 0,
            finished: BTreeMap::new(),
            events: Vec::new(),
            stats: EngineStats { kv_blocks_total: capacity, ..EngineStats::default() },
            routing: RoutingLog::default(),
            schedule: None,
        })
    }

    /// Puts a request in the queue of the group with the least to do; returns its number.
    pub fn submit(&mut self, request: Request) -> Result<RequestId, EngineError> {
        self.limits().check(&request)?;
        let id = RequestId(self.submitted);
        self.enqueue(id, request, Instant::now());
        Ok(id)
    }

    /// What a request must fit into.
    pub(crate) fn limits(&self) -> Limits {
        Limits { vocab: self.spec.vocab, max_model_len: self.options.max_model_len }
    }

    /// Most requests that run at once.
    pub(crate) fn seats(&self) -> usize {
        self.options.max_sequences * self.queues.len()
    }

    /// Puts a request that was checked in the queue of the group with the least to do. Numbers must be new.
    pub(crate) fn enqueue(&mut self, id: RequestId, request: Request, submitted: Instant) {
        self.submitted = self.submitted.max(id.0 + 1);
        let sequence = Sequence {
            number: id,
            tokens: request.prompt.clone(),
            request,
            cached: 0,
            blocks: Vec::new(),
            completion: Completion::default(),
            submitted,
            started: None,
        };
        let idlest = self.queues.iter_mut().min_by_key(|queue| queue.load());
        if let Some(queue) = idlest {
            queue.waiting.push_back(sequence);
        }
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
        self.stats.steps += 1;
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
                let sequence = &mut queue.running[piece.sequence];
                let rows = rows.by_ref().take(piece.logits);
                sequence.advance(piece, rows, &self.spec.eos, &mut self.events, &mut self.stats);
            }
            for sequence in queue.running.extract_if(.., |sequence| sequence.completion.finish.is_some()) {
                self.events.extend(
                    sequence.completion.finish.map(|finish| (sequence.number, Event::Finished(finish))),
                );
                queue.blocks.give_back(sequence.blocks);
                self.finished.insert(sequence.number, sequence.completion);
            }
        }
        Ok(report)
    }

    /// New tokens of a request so far.
    pub fn tokens(&self, number: RequestId) -> &[u32] {
        let mut running = self.queues.iter().flat_map(|queue| &queue.running);
        let running = running.find(|sequence| sequence.number == number).map(|sequence| &sequence.completion);
        running.or_else(|| self.finished.get(&number)).map_or(&[], |completion| &completion.ids)
    }

    /// Ends a request where it is: its text has come to a stop, or nobody wants it any more.
    pub fn abort(&mut self, number: RequestId) {
        for queue in &mut self.queues {
            if let Some(mut sequence) = queue.remove(number) {
                sequence.completion.finish = Some(Finish::Abort);
                self.finished.insert(number, sequence.completion);
                self.events.push((number, Event::Finished(Finish::Abort)));
            }
        }
    }

    /// What happened to requests since the last call, in order.
    pub(crate) fn take_events(&mut self) -> Vec<(RequestId, Event)> {
        self.finished.clear();
        std::mem::take(&mut self.events)
    }

    /// Counts so far, and what there is now.
    pub fn stats(&self) -> EngineStats {
        let sum = |of: fn(&Scheduler) -> usize| self.queues.iter().map(of).sum::<usize>() as u64;
        EngineStats {
            running: sum(|queue| queue.running.len()),
            waiting: sum(|queue| queue.waiting.len()),
            kv_blocks_used: self.stats.kv_blocks_total - sum(|queue| queue.blocks.free()),
            ..self.stats
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
    pub fn take(&mut self, number: RequestId) -> Option<Completion> {
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
            self.events.clear();
        }
        Ok(numbers.into_iter().filter_map(|number| self.take(number)).collect())
    }
}

/// What a request must fit into.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    pub(crate) vocab: usize,
    pub(crate) max_model_len: usize,
}

impl Limits {
    /// Refuses what cannot be run, by name.
    pub(crate) fn check(&self, request: &Request) -> Result<(), EngineError> {
        request.check(self.vocab, self.max_model_len)?;
        let Request { sampling, .. } = request;
        let refused = [
            ("min_tokens", request.min_tokens > 0),
            ("logprobs", request.logprobs.is_some()),
            ("prompt_logprobs", request.prompt_logprobs.is_some()),
            ("constraint", request.constraint.is_some()),
            ("presence_penalty", sampling.presence_penalty != 0.0),
            ("frequency_penalty", sampling.frequency_penalty != 0.0),
            ("logit_bias", !sampling.logit_bias.is_empty()),
        ];
        match refused.into_iter().find(|(_, asked)| *asked) {
            Some((field, _)) => {
                Err(EngineError::Parameter { field, problem: "is not supported yet: leave it out".into() })
            }
            None => Ok(()),
        }
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
    fn advance<'a>(
        &mut self,
        piece: &ScheduledChunk,
        rows: impl Iterator<Item = Row<'a>>,
        eos: &[u32],
        events: &mut Vec<(RequestId, Event)>,
        stats: &mut EngineStats,
    ) {
        let started = *self.started.get_or_insert_with(Instant::now);
        self.cached = piece.positions.end;
        let mut last = None;
        for row in rows {
            if let Row::Logits(logits) = row
                && self.request.prompt_logits
                && self.completion.ids.is_empty()
            {
                self.completion.prompt_logits.extend_from_slice(logits);
                events.push((self.number, Event::PromptLogits(logits.to_vec())));
            }
            last = Some(row);
        }
        if self.cached < self.tokens.len() {
            return;
        }
        if self.completion.ids.is_empty() {
            stats.prompt_tokens += self.request.prompt.len() as u64;
            let queued = started - self.submitted;
            events.push((self.number, Event::Prompt { cached_tokens: 0, queued, logprobs: None }));
        }
        if let Some(row) = last.filter(|_| self.request.max_tokens > 0) {
            let id = match row {
                Row::Logits(logits) => self.request.sampling.choose(logits, &self.tokens),
                Row::MostLikely(id) => id,
            };
            self.tokens.push(id);
            self.completion.ids.push(id);
            stats.generation_tokens += 1;
            events.push((self.number, Event::Token { id, logprobs: None }));
            if self.completion.ids.len() == 1 {
                self.completion.time_to_first_token = self.submitted.elapsed();
            }
            if eos.contains(&id) && !self.request.ignore_eos {
                self.completion.finish = Some(Finish::Stop);
            }
            if self.request.stop_token_ids.contains(&id) {
                self.completion.finish.get_or_insert(Finish::StopToken(id));
            }
        }
        if self.completion.ids.len() == self.request.max_tokens {
            self.completion.finish.get_or_insert(Finish::Length);
        }
        self.completion.total_time = self.submitted.elapsed();
    }
}
