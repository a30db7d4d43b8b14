//! START HERE: [`Engine::step`].

use crate::kv_blocks::{blocks_for, slot};
use crate::sampler::{Sampler, Workspace, logprobs};
use crate::scheduler::{Job, ScheduledChunk, Scheduler, SchedulerLimits, Sequence};
use crate::{
    Completion, EngineError, EngineStats, Event, Executor, Failure, Finish, Request, RequestId, StepReport,
    ThreadExecutor, TokenLogprobs, Workers,
};
use epsmoe_base::{CacheDType, Fault, FaultCell, Rank, WireDType, cores};
use epsmoe_device::Backend;
use epsmoe_fabric::Fabric;
use epsmoe_model::{BLOCK_SIZE, Batch, Model, ModelOptions, ModelSpec, Parallel, RoutingMode, WeightSource};
use epsmoe_pipeline::RoutingLog;
use epsmoe_plan::{Capacity, Policy, ScheduleReport};
use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
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
    /// Cache blocks of each rank; when absent, as many as `max_sequences` of the longest sequences need.
    pub kv_blocks: Option<usize>,
    /// What keys and values are cached in.
    pub cache_dtype: CacheDType,
    /// Room for the rows of an MoE layer on a rank; the worst case when absent. Layers that do not fit run in chunks.
    pub capacity: Option<Capacity>,
    /// Whether sequences that begin alike share what was computed of them.
    pub prefix_caching: bool,
    /// Of a model whose sequences carry states, how many of them a group keeps, so that sequences which begin alike can go on
    /// from there.
    pub kept_states: usize,
    /// How MoE layers are scheduled.
    pub policy: Policy,
    /// What rows travel between ranks in.
    pub wire: WireDType,
    /// MoE layers of at most so many tokens on all ranks together are gathered; 0 for none.
    pub gather_tokens: usize,
    /// How the model is spread over ranks.
    pub parallel: Parallel,
    /// What decides where tokens go, and whether that is recorded.
    pub routing: RoutingMode,
    /// Whether prompts see latents decompressed, which pays where products are cheap: then generated tokens have other bits
    /// (docs/bits.md).
    pub decompress_prompts: bool,
    /// How long any wait may take.
    pub timeout: Duration,
    /// Whether what ran when is told, in [`StepReport::timeline`].
    pub record_spans: bool,
}

impl EngineOptions {
    /// What each rank's model is told.
    pub fn model(&self) -> ModelOptions {
        let max_blocks = blocks_for(self.max_model_len).max(1);
        ModelOptions {
            max_tokens: self.max_batched_tokens,
            max_sequences: self.max_sequences,
            cache_blocks: self.kv_blocks.unwrap_or(max_blocks.saturating_mul(self.max_sequences)),
            max_blocks,
            cache_dtype: self.cache_dtype,
            states: self.max_sequences + self.kept_states,
            policy: self.policy.clone(),
            capacity: self.capacity,
            wire: self.wire,
            gather_tokens: self.gather_tokens,
            parallel: self.parallel,
            routing: self.routing.clone(),
            decompress_prompts: self.decompress_prompts,
            timeout: self.timeout,
        }
    }
}

/// What a request must fit into.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    vocab: usize,
    max_model_len: usize,
    /// Tokens that the cache of a group holds.
    cache: usize,
}

impl Limits {
    /// Refuses what can never run.
    pub(crate) fn check(&self, request: &Request) -> Result<(), EngineError> {
        request.check(self.vocab, self.max_model_len)?;
        // The last new token is not computed.
        let tokens = request.prompt.len() + request.max_tokens.saturating_sub(1);
        if tokens > self.cache {
            return Err(EngineError::CacheTooSmall { tokens, cache: self.cache });
        }
        Ok(())
    }
}

/// Whole logits of the prompts in one step take at most these bytes, unless one row alone takes more.
const PROMPT_LOGITS_BYTES: usize = 256 << 20;

/// From this many logits on, tokens are chosen by several threads.
const PARALLEL_LOGITS: usize = 1 << 20;

/// Requests in, tokens out.
pub struct Engine {
    spec: Arc<ModelSpec>,
    options: EngineOptions,
    limits: Limits,
    executor: Box<dyn Executor>,
    /// Ranks that compute the same tokens.
    group_size: usize,
    scheduler: Scheduler,
    requests: HashMap<RequestId, Box<Live>>,
    /// What each group of ranks is computing.
    in_flight: Option<Vec<Launched>>,
    events: Vec<(RequestId, Event)>,
    next: u64,
    recorded: bool,
    count_experts: bool,
    counts: EngineStats,
    routing: RoutingLog,
    workspaces: Vec<Workspace>,
}

/// A batch, and the chunks that it is made of.
struct Launched {
    batch: Arc<Batch>,
    chunks: Vec<ScheduledChunk>,
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
        options.parallel.groups(ranks.len())?;
        let mut models = Vec::with_capacity(ranks.len());
        for (device, fabric) in ranks {
            let rank = fabric.rank();
            models.push(Model::load(Arc::clone(&spec), source, device, fabric, model_options.clone())?);
            loaded(rank);
        }
        let executor = ThreadExecutor::start(models, faults)?;
        Engine::over(spec, Box::new(executor), options)
    }

    /// The same where this process has rank 0 alone, and the others are workers that load it beside.
    pub fn start_with_workers<B: Backend>(
        spec: Arc<ModelSpec>,
        source: &dyn WeightSource,
        (device, fabric): (Arc<B>, Fabric<B>),
        workers: &Arc<Workers>,
        options: EngineOptions,
    ) -> Result<Self, EngineError> {
        let model_options = options.model();
        options.parallel.groups(fabric.size())?;
        let faults = fabric.control.faults().clone();
        let order = workers.load(&model_options)?;
        let model = Model::load(Arc::clone(&spec), source, device, fabric, model_options);
        // The others wait for this rank in vain.
        let model = model.map_err(|error| workers.give_up(error))?;
        let local = ThreadExecutor::start(vec![model], faults)?;
        Engine::over(spec, Box::new(order.executor(local)?), options)
    }

    /// An engine over ranks that are running, with caches as large as the options say.
    pub fn over(
        spec: Arc<ModelSpec>,
        executor: Box<dyn Executor>,
        options: EngineOptions,
    ) -> Result<Self, EngineError> {
        let groups = options.parallel.groups(executor.ranks())?;
        let kv_blocks = options.model().cache_blocks;
        let scheduler = Scheduler::new(SchedulerLimits {
            groups,
            max_batched_tokens: options.max_batched_tokens.max(1),
            max_sequences: options.max_sequences.max(1),
            max_prompt_rows: (PROMPT_LOGITS_BYTES / (spec.vocab.max(1) * size_of::<f32>())).max(1),
            kv_blocks,
            // A routing log has every token of every sequence.
            prefix_caching: options.prefix_caching && matches!(options.routing, RoutingMode::FromRouter),
            states: spec.has_states().then_some(options.kept_states),
            by_origin: options.decompress_prompts && spec.has_latents(),
        });
        let (vocab, max_model_len) = (spec.vocab, options.max_model_len);
        Ok(Engine {
            limits: Limits { vocab, max_model_len, cache: kv_blocks.saturating_mul(BLOCK_SIZE) },
            group_size: executor.ranks() / groups,
            recorded: options.record_spans,
            count_experts: false,
            spec,
            options,
            executor,
            scheduler,
            requests: HashMap::new(),
            in_flight: None,
            events: Vec::new(),
            next: 0,
            counts: EngineStats::default(),
            routing: RoutingLog::default(),
            workspaces: Vec::new(),
        })
    }

    /// Takes a request in; returns its number. What happens to it is told by [`take_events`](Self::take_events).
    pub fn submit(&mut self, request: Request) -> Result<RequestId, EngineError> {
        self.limits.check(&request)?;
        let id = RequestId(self.next);
        self.enqueue(id, request, Instant::now());
        Ok(id)
    }

    /// What a request must fit into.
    pub(crate) fn limits(&self) -> Limits {
        self.limits
    }

    /// Most requests that run at once.
    pub fn max_running(&self) -> usize {
        self.options.max_sequences * self.executor.ranks() / self.group_size
    }

    /// Takes in a request that was checked, under a number that is new.
    pub(crate) fn enqueue(&mut self, id: RequestId, mut request: Request, submitted: Instant) {
        self.next = self.next.max(id.0 + 1);
        let live = Box::new(Live::new(&mut request, &self.spec.eos, submitted));
        let job = Job {
            prompt_rows: live.prompt_logits || live.prompt_logprobs.is_some(),
            prompt: request.prompt,
            max_tokens: request.max_tokens,
            salt: request.cache_salt,
        };
        self.requests.insert(id, live);
        self.scheduler.add(id, job);
    }

    /// Whether there is nothing left to do.
    pub fn is_idle(&self) -> bool {
        self.scheduler.is_idle() && self.in_flight.is_none()
    }

    /// One step of every rank: a batch for each group, the model, a token for every sequence that has come to its
    /// end. Groups without work take part, for their experts.
    pub fn step(&mut self) -> Result<StepReport, EngineError> {
        self.launch()?;
        self.finish()
    }

    /// Starts a step. Until it is waited for, requests may be taken in and called off, and events be looked at.
    pub(crate) fn launch(&mut self) -> Result<(), EngineError> {
        let scheduled = self.scheduler.schedule();
        let launched: Vec<Launched> = scheduled
            .into_iter()
            .enumerate()
            .map(|(group, chunks)| Launched { batch: Arc::new(self.batch(group, &chunks)), chunks })
            .collect();
        let batches = launched
            .iter()
            .flat_map(|launched| std::iter::repeat_n(Arc::clone(&launched.batch), self.group_size));
        self.executor.launch(batches.collect(), self.recorded)?;
        self.counts.steps += 1;
        let now = Instant::now();
        for chunk in launched.iter().flat_map(|launched| &launched.chunks) {
            if let Some(live) = self.requests.get_mut(&chunk.id) {
                live.started.get_or_insert(now);
                if chunk.next_token {
                    live.problem = live.sampler.prepare().err();
                }
            }
        }
        self.in_flight = Some(launched);
        Ok(())
    }

    /// Waits for the step that was started, and takes in what it gave.
    pub(crate) fn finish(&mut self) -> Result<StepReport, EngineError> {
        let Some(launched) = self.in_flight.take() else { return Ok(StepReport::default()) };
        let step = self.counts.steps;
        let in_step = |fault: Fault| Fault { message: format!("{} (step {step})", fault.message), ..fault };
        let mut report = self.executor.finish().map_err(in_step)?;
        for output in &mut report.outputs {
            self.routing.merge(std::mem::take(&mut output.routing));
        }
        let mut parts = Vec::new();
        for (group, launched) in launched.iter().enumerate() {
            let Some(output) = report.outputs.get(group * self.group_size) else { continue };
            let (places, whole) = (&*launched.batch.logits, &*launched.batch.whole);
            let mut rows = Rows { places, whole, tokens: &output.tokens, logits: &output.logits };
            let ends = launched.batch.sequence_starts.iter().skip(1);
            for (chunk, &end) in launched.chunks.iter().zip(ends) {
                let rows = rows.split(end, self.spec.vocab);
                // A request that was called off meanwhile is not there any more.
                let found = self.scheduler.running(group, chunk.id).zip(self.requests.remove(&chunk.id));
                parts.extend(found.map(|(sequence, live)| Part {
                    group,
                    chunk,
                    sequence,
                    live,
                    rows,
                    outcome: Outcome::default(),
                }));
            }
        }
        advance(&mut parts, self.spec.vocab, &mut self.workspaces);
        let done: Vec<_> =
            parts.into_iter().map(|part| (part.group, part.chunk.id, part.live, part.outcome)).collect();
        for (group, id, live, outcome) in done {
            self.take_in(group, id, live, outcome);
        }
        Ok(report)
    }

    /// What became of a request in a step.
    fn take_in(&mut self, group: usize, id: RequestId, live: Box<Live>, outcome: Outcome) {
        let Outcome { events, token, end } = outcome;
        for event in events {
            match event {
                Event::Prompt { .. } => self.counts.prompt_tokens += live.prompt as u64,
                Event::Token { .. } => self.counts.generation_tokens += 1,
                _ => {}
            }
            self.events.push((id, event));
        }
        match end {
            Some(end) => {
                let problem = |problem| format!("step {}, {id}: {problem}", self.counts.steps);
                let event = match end {
                    Ok(finish) => Event::Finished(finish),
                    Err(why) => Event::Failed(Failure::Request(problem(why))),
                };
                self.events.push((id, event));
                self.scheduler.remove(id);
            }
            None => {
                self.requests.insert(id, live);
                if let Some(token) = token {
                    self.scheduler.push(group, id, token);
                }
            }
        }
    }

    /// Ends a request where it is; its place and its blocks are free at once.
    pub fn abort(&mut self, id: RequestId) {
        if self.requests.remove(&id).is_some() {
            self.scheduler.remove(id);
            self.events.push((id, Event::Finished(Finish::Abort)));
        }
    }

    /// What happened to requests since the last call, in order.
    pub fn take_events(&mut self) -> Vec<(RequestId, Event)> {
        std::mem::take(&mut self.events)
    }

    /// Whether steps from now on tell what ran when, as the options said until now.
    pub fn record_spans(&mut self, on: bool) {
        self.options.record_spans = on;
        self.recorded = on;
    }

    /// Whether the next steps tell what ran when, whatever the options say, and how many tokens went to each expert.
    pub(crate) fn watch(&mut self, times: bool, experts: bool) {
        self.recorded = times || self.options.record_spans;
        self.count_experts = experts;
    }

    /// Counts so far, and what there is now.
    pub fn stats(&self) -> EngineStats {
        let ((running, waiting), (used, total)) = (self.scheduler.sequences(), self.scheduler.blocks());
        let counts = self.scheduler.counts();
        EngineStats {
            running: running as u64,
            waiting: waiting as u64,
            kv_blocks_used: used as u64,
            kv_blocks_total: total as u64,
            prefix_queries: counts.prefix_queries,
            prefix_hits: counts.prefix_hits,
            preemptions: counts.preemptions,
            ..self.counts
        }
    }

    /// Where tokens went so far, if [`RoutingMode::Record`] was asked for; sequences are numbered by
    /// [`submit`](Engine::submit).
    pub fn routing(&self) -> &RoutingLog {
        &self.routing
    }

    /// Where it is seen that the ranks have stopped, also between steps.
    pub(crate) fn faults(&self) -> FaultCell {
        self.executor.faults()
    }

    /// How the auto schedule planned the MoE layers so far, as the first rank saw it.
    pub fn schedule(&self) -> Option<ScheduleReport> {
        self.executor.schedule()
    }

    /// Runs requests to their ends; answers come in the order of the requests. `each` sees every step.
    pub fn run(
        &mut self,
        requests: Vec<Request>,
        mut each: impl FnMut(&StepReport),
    ) -> Result<Vec<Completion>, EngineError> {
        let begun = Instant::now();
        let ids = requests.into_iter().map(|request| self.submit(request));
        let ids = ids.collect::<Result<Vec<_>, _>>()?;
        let mut answers: HashMap<RequestId, Completion> = HashMap::new();
        while !self.is_idle() {
            each(&self.step()?);
            for (id, event) in self.take_events() {
                answers.entry(id).or_default().hear(event, begun.elapsed())?;
            }
        }
        Ok(ids.into_iter().filter_map(|id| answers.remove(&id)).collect())
    }

    /// Whether every block belongs to whoever has it, and every request is scheduled.
    #[cfg(test)]
    pub(crate) fn check(&self) {
        self.scheduler.check();
        let (running, waiting) = self.scheduler.sequences();
        assert_eq!(running + waiting, self.requests.len());
    }

    /// The batch of a group of ranks.
    fn batch(&self, group: usize, chunks: &[ScheduledChunk]) -> Batch {
        let count_experts = self.count_experts;
        let mut batch = Batch { sequence_starts: vec![0], count_experts, ..Batch::default() };
        for chunk in chunks {
            let found = self.scheduler.running(group, chunk.id).zip(self.requests.get(&chunk.id));
            let Some((sequence, live)) = found else { continue };
            let (first, positions) = (batch.ids.len(), chunk.positions.clone());
            batch.ids.extend(&sequence.tokens()[positions.clone()]);
            batch.positions.extend(positions.clone().map(|position| position as u32));
            batch.slots.extend(positions.clone().map(|position| slot(sequence.blocks(), position)));
            batch.sequence_starts.push(batch.ids.len() as u32);
            batch.blocks.push(sequence.blocks().to_vec());
            batch.states.push(chunk.states);
            batch.sequences.push(chunk.id.0);
            batch.generated += usize::from(chunk.generated);
            let at = |position: usize| (first + position - positions.start) as u32;
            let last = positions.end - 1;
            let next = chunk.next_token && !chunk.prompt_rows.contains(&last);
            batch.logits.extend(chunk.prompt_rows.clone().map(at));
            batch.whole.extend(chunk.prompt_rows.clone().map(|_| true));
            if next {
                batch.logits.push(at(last));
                batch.whole.push(live.wants_logits());
            }
        }
        batch
    }
}

/// What came back of the tokens of a batch whose logits were computed, or of some of them.
#[derive(Clone, Copy)]
struct Rows<'a> {
    /// Their places in the batch.
    places: &'a [u32],
    /// Whether all logits of each came back.
    whole: &'a [bool],
    /// The most likely next token of each.
    tokens: &'a [u32],
    /// Logits of those that are whole `[…, V]`.
    logits: &'a [f32],
}

impl Rows<'_> {
    /// Takes the rows of tokens before place `end` of the batch off.
    fn split(&mut self, end: u32, vocab: usize) -> Self {
        let count = self.places.partition_point(|&place| place < end);
        let (places, places_left) = self.places.split_at(count);
        let (whole, whole_left) = self.whole.split_at(count);
        let (tokens, tokens_left) = self.tokens.split_at(count.min(self.tokens.len()));
        let logits = whole.iter().filter(|&&whole| whole).count() * vocab;
        let (logits, logits_left) = self.logits.split_at(logits.min(self.logits.len()));
        *self = Rows { places: places_left, whole: whole_left, tokens: tokens_left, logits: logits_left };
        Rows { places, whole, tokens, logits }
    }
}

/// A chunk that was computed, with everything that makes a token of it.
struct Part<'a> {
    group: usize,
    chunk: &'a ScheduledChunk,
    sequence: &'a Sequence,
    live: Box<Live>,
    rows: Rows<'a>,
    outcome: Outcome,
}

/// What a step made of a request.
#[derive(Default)]
struct Outcome {
    events: Vec<Event>,
    token: Option<u32>,
    /// How it ended, or what is wrong with it.
    end: Option<Result<Finish, String>>,
}

/// Chooses tokens and looks up logprobs; where that is much work, several threads share it.
fn advance(parts: &mut [Part<'_>], vocab: usize, workspaces: &mut Vec<Workspace>) {
    let run = |parts: &mut [Part<'_>], workspace: &mut Workspace| {
        for part in parts {
            part.outcome = part.live.advance(part.chunk, part.sequence, &part.rows, vocab, workspace);
        }
    };
    let logits: usize = parts.iter().map(|part| part.rows.logits.len()).sum();
    let threads = if logits < PARALLEL_LOGITS { 1 } else { cores().min(parts.len()) };
    workspaces.resize_with(threads.max(1), Workspace::default);
    if threads <= 1 {
        return run(parts, &mut workspaces[0]);
    }
    let share = parts.len().div_ceil(threads);
    let shares = Mutex::new(parts.chunks_mut(share).zip(workspaces).collect::<Vec<_>>());
    let next = || shares.lock().unwrap_or_else(PoisonError::into_inner).pop();
    let work = || {
        while let Some((parts, workspace)) = next() {
            run(parts, workspace);
        }
    };
    std::thread::scope(|scope| {
        for _ in 1..threads {
            // A thread that the system does not give leaves its share to the others.
            let _ = std::thread::Builder::new().spawn_scoped(scope, work);
        }
        work();
    });
}

/// What an engine knows of a request beside its schedule.
struct Live {
    sampler: Sampler,
    /// Tokens of the prompt.
    prompt: usize,
    max_tokens: usize,
    /// New tokens so far.
    made: usize,
    /// Tokens that end the text; none if the request goes on after them.
    eos: Vec<u32>,
    stop_token_ids: Vec<u32>,
    logprobs: Option<usize>,
    prompt_logprobs: Option<usize>,
    prompt_logits: bool,
    /// Of the prompt's tokens so far.
    of_prompt: Vec<Option<TokenLogprobs>>,
    /// Whether the end of the prompt was told.
    prompt_told: bool,
    /// What the constraint could not do.
    problem: Option<String>,
    submitted: Instant,
    started: Option<Instant>,
}

impl Live {
    fn new(request: &mut Request, eos: &[u32], submitted: Instant) -> Self {
        let eos = if request.ignore_eos { Vec::new() } else { eos.to_vec() };
        Live {
            sampler: Sampler::new(request, [eos.as_slice(), &request.stop_token_ids].concat()),
            prompt: request.prompt.len(),
            max_tokens: request.max_tokens,
            made: 0,
            eos,
            stop_token_ids: std::mem::take(&mut request.stop_token_ids),
            logprobs: request.logprobs,
            prompt_logprobs: request.prompt_logprobs,
            prompt_logits: request.prompt_logits,
            of_prompt: Vec::new(),
            prompt_told: false,
            problem: None,
            submitted,
            started: None,
        }
    }

    /// Whether its next token takes more than the most likely one.
    fn wants_logits(&self) -> bool {
        !self.sampler.is_greedy() || self.logprobs.is_some()
    }

    /// Takes in what a step computed of it: prompt logits, and maybe a new token.
    fn advance(
        &mut self,
        chunk: &ScheduledChunk,
        sequence: &Sequence,
        rows: &Rows<'_>,
        vocab: usize,
        workspace: &mut Workspace,
    ) -> Outcome {
        let mut outcome = Outcome::default();
        let of_prompt = &rows.logits[..chunk.prompt_rows.len() * vocab];
        if let Some(alternatives) = self.prompt_logprobs {
            if self.of_prompt.is_empty() {
                self.of_prompt.push(None);
            }
            for (position, logits) in chunk.prompt_rows.clone().zip(of_prompt.chunks_exact(vocab)) {
                if position + 1 < self.prompt {
                    let id = sequence.tokens()[position + 1];
                    self.of_prompt.push(Some(logprobs(logits, id, alternatives, workspace)));
                }
            }
        }
        if self.prompt_logits && !of_prompt.is_empty() {
            outcome.events.push(Event::PromptLogits(of_prompt.to_vec()));
        }
        if chunk.positions.end >= self.prompt && !self.prompt_told {
            self.prompt_told = true;
            outcome.events.push(Event::Prompt {
                cached_tokens: sequence.cached(),
                queued: self.started.map_or(Duration::ZERO, |started| started - self.submitted),
                logprobs: self.prompt_logprobs.map(|_| std::mem::take(&mut self.of_prompt)),
            });
        }
        if chunk.next_token {
            match self.next_token(chunk.positions.end, rows, vocab, workspace) {
                Ok((id, logprobs, finish)) => {
                    outcome.token = Some(id);
                    outcome.events.push(Event::Token { id, logprobs });
                    outcome.end = finish.map(Ok);
                }
                Err(problem) => outcome.end = Some(Err(problem)),
            }
        } else if self.max_tokens == 0 && chunk.positions.end == self.prompt {
            outcome.end = Some(Ok(Finish::Length));
        }
        outcome
    }

    /// The token at `position`, from the last of the rows, and whether it is the last one.
    fn next_token(
        &mut self,
        position: usize,
        rows: &Rows<'_>,
        vocab: usize,
        workspace: &mut Workspace,
    ) -> Result<(u32, Option<TokenLogprobs>, Option<Finish>), String> {
        if let Some(problem) = self.problem.take() {
            return Err(problem);
        }
        let (Some(&whole), Some(&most_likely)) = (rows.whole.last(), rows.tokens.last()) else {
            return Err("the ranks gave no token. This is a bug".into());
        };
        let logits = whole.then(|| &rows.logits[rows.logits.len() - vocab..]);
        let id = match logits {
            Some(logits) if !self.sampler.is_greedy() => self.sampler.choose(logits, position, workspace)?,
            _ => most_likely,
        };
        let wanted = logits.zip(self.logprobs);
        let logprobs = wanted.map(|(logits, alternatives)| logprobs(logits, id, alternatives, workspace));
        self.made += 1;
        Ok((id, logprobs, self.end_with(id)?))
    }

    /// Whether the answer ends with this token.
    fn end_with(&mut self, id: u32) -> Result<Option<Finish>, String> {
        if self.eos.contains(&id) {
            return Ok(Some(Finish::Stop));
        }
        if self.stop_token_ids.contains(&id) {
            return Ok(Some(Finish::StopToken(id)));
        }
        self.sampler.accept(id)?;
        if self.sampler.is_complete() {
            return Ok(Some(Finish::Stop));
        }
        Ok((self.made == self.max_tokens).then_some(Finish::Length))
    }
}
