//! Random schedules over ranks that only remember: whatever is taken in, called off, preempted or shared, every request
//! gives what it gives alone. `EPSMOE_TEST_SEED` repeats a run.

use crate::{
    Completion, Engine, EngineOptions, Executor, Finish, Parallel, Request, RequestId, RoutingMode, Sampling,
    StepReport,
};
use epsmoe_base::env::test_seed;
use epsmoe_base::{CacheDType, Fault, Mix, WireDType};
use epsmoe_model::{BLOCK_SIZE, Batch, ModelSpec, StateSlots, StepOutput, preset};
use epsmoe_plan::{Policy, ScheduleReport};
use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

const VOCAB: usize = 50;
const RUNS: u64 = 200;

/// Ranks without a model. A slot of their cache holds a hash of all tokens up to its position, made of the one before it
/// in the sequence's blocks, and so does a slot for states; logits are numbers that follow from both. So a block or a state
/// that is not, or no longer, what a sequence takes it for changes its tokens.
struct Memory {
    caches: Vec<Cache>,
    started: VecDeque<Vec<Arc<Batch>>>,
    limits: EngineOptions,
}

#[derive(Clone)]
struct Cache {
    slots: Vec<u64>,
    states: Vec<u64>,
    /// Whether what comes depends on states.
    carries: bool,
}

impl Memory {
    fn new(carries: bool, ranks: usize, options: &EngineOptions) -> Self {
        let slots = options.model().cache_blocks * BLOCK_SIZE;
        let cache = Cache { slots: vec![0; slots], states: vec![0; options.model().states], carries };
        Memory { caches: vec![cache; ranks], started: VecDeque::new(), limits: options.clone() }
    }

    fn run(Cache { slots: cache, states, carries }: &mut Cache, batch: &Batch) -> StepOutput {
        let mut hashes = Vec::new();
        let before = states.clone();
        let written = |of: &StateSlots| std::iter::once(of.to).chain(of.kept.map(|(slot, _)| slot));
        for (one, of) in batch.states.iter().enumerate() {
            assert!(of.kept.is_none_or(|(slot, _)| slot != of.from && slot != of.to), "{of:?}");
            for other in batch.states[..one].iter().chain(&batch.states[one + 1..]) {
                assert!(
                    written(of)
                        .all(|slot| slot != other.from && !written(other).any(|theirs| theirs == slot))
                );
            }
        }
        for (sequence, span) in batch.sequence_starts.windows(2).enumerate() {
            let of = batch.states[sequence];
            let begins = batch.positions[span[0] as usize] == 0;
            let mut state = if begins { 7 } else { before[of.from as usize] };
            for token in span[0] as usize..span[1] as usize {
                let (id, position) = (batch.ids[token], batch.positions[token] as usize);
                let slot = |position: usize| {
                    batch.blocks[sequence][position / BLOCK_SIZE] as usize * BLOCK_SIZE
                        + position % BLOCK_SIZE
                };
                assert_eq!(slot(position), batch.slots[token] as usize);
                let before = position.checked_sub(1).map_or(7, |before| cache[slot(before)]);
                cache[slot(position)] = Mix::keyed(before, &[u64::from(id)]).next_u64();
                state = Mix::keyed(state, &[u64::from(id)]).next_u64();
                // Both are the same hash, if they are right.
                let hash = cache[slot(position)];
                let wrong = if *carries { hash ^ state } else { 0 };
                hashes.push(hash ^ wrong.rotate_left(9));
                for (slot, _) in of.kept.into_iter().filter(|(_, after)| token as u32 + 1 == span[0] + after)
                {
                    states[slot as usize] = state;
                }
            }
            states[of.to as usize] = state;
        }
        let mut output = StepOutput::default();
        for (&token, &whole) in batch.logits.iter().zip(&batch.whole) {
            let mut mix = Mix::new(hashes[token as usize]);
            let logits: Vec<f32> = (0..VOCAB).map(|_| mix.signed() * 4.0).collect();
            let best = (0..VOCAB).reduce(|best, id| if logits[id] > logits[best] { id } else { best });
            output.tokens.extend(best.map(|best| best as u32));
            if whole {
                output.logits.extend(logits);
            }
        }
        output
    }

    fn check(&self, batch: &Batch) {
        assert!(batch.ids.len() <= self.limits.max_batched_tokens, "{} tokens", batch.ids.len());
        assert!(batch.blocks.len() <= self.limits.max_sequences, "{} sequences", batch.blocks.len());
        assert!(batch.logits.is_sorted() && batch.logits.len() == batch.whole.len());
    }
}

impl Executor for Memory {
    fn ranks(&self) -> usize {
        self.caches.len()
    }

    fn launch(&mut self, batches: Vec<Arc<Batch>>, _: bool) -> Result<(), Fault> {
        batches.iter().for_each(|batch| self.check(batch));
        self.started.push_back(batches);
        Ok(())
    }

    fn finish(&mut self) -> Result<StepReport, Fault> {
        let batches = self.started.pop_front().unwrap();
        let outputs = self.caches.iter_mut().zip(&batches).map(|(cache, batch)| Memory::run(cache, batch));
        Ok(StepReport { outputs: outputs.collect(), ..StepReport::default() })
    }

    fn schedule(&self) -> Option<ScheduleReport> {
        None
    }
}

/// Ranks that say how long they took: the rest of a step is the engine's own.
struct Timed {
    vocab: usize,
    started: VecDeque<Arc<Batch>>,
    took: Arc<Mutex<Duration>>,
}

impl Executor for Timed {
    fn ranks(&self) -> usize {
        1
    }

    fn launch(&mut self, batches: Vec<Arc<Batch>>, _: bool) -> Result<(), Fault> {
        self.started.extend(batches);
        Ok(())
    }

    fn finish(&mut self) -> Result<StepReport, Fault> {
        let begun = Instant::now();
        let batch = self.started.pop_front().unwrap();
        let whole = batch.whole.iter().filter(|&&whole| whole).count();
        // A few likely tokens and a long tail, as models have them.
        let likely = |at: usize| -2.0 * (1.0 + (at * 7919 % self.vocab) as f32).ln();
        let row: Vec<f32> = (0..if whole > 0 { self.vocab } else { 0 }).map(likely).collect();
        let logits = row.repeat(whole);
        let output = StepOutput { tokens: vec![7; batch.logits.len()], logits, ..StepOutput::default() };
        *self.took.lock().unwrap() += begun.elapsed();
        Ok(StepReport { outputs: vec![output], ..StepReport::default() })
    }

    fn schedule(&self) -> Option<ScheduleReport> {
        None
    }
}

fn spec(carries: bool) -> Arc<ModelSpec> {
    let spec = preset(if carries { "qwen3.5-35b-a3b" } else { "qwen3-moe-mini" }).unwrap();
    assert_eq!(spec.has_states(), carries);
    Arc::new(ModelSpec { vocab: VOCAB, eos: vec![3], ..spec })
}

fn options() -> EngineOptions {
    EngineOptions {
        max_batched_tokens: 4096,
        max_sequences: 1,
        max_model_len: 4096,
        kv_blocks: None,
        capacity: None,
        prefix_caching: false,
        kept_states: 0,
        policy: Policy::default(),
        cache_dtype: CacheDType::Auto,
        wire: WireDType::Auto,
        gather_tokens: 0,
        parallel: Parallel::default(),
        routing: RoutingMode::FromRouter,
        timeout: Duration::from_secs(10),
        decompress_prompts: true,
        record_spans: false,
    }
}

fn engine(ranks: usize, options: EngineOptions) -> Engine {
    engine_of(false, ranks, options)
}

/// An engine of a model whose sequences carry states, or none.
fn engine_of(carries: bool, ranks: usize, options: EngineOptions) -> Engine {
    Engine::over(spec(carries), Box::new(Memory::new(carries, ranks, &options)), options).unwrap()
}

/// What a request asks for: made anew for every engine, from the same seed.
fn request(seed: u64, longest: usize) -> Request {
    let mut mix = Mix::keyed(seed, &[1]);
    // Few different beginnings, some of which share a few blocks.
    let (family, shared) = (mix.below(3) as u64, mix.below(longest));
    // Every other block is the same in all of them.
    let token = |key: u64, position: usize| {
        let key = if position / BLOCK_SIZE % 2 == 1 { 0 } else { key };
        Mix::keyed(key, &[position as u64]).below(VOCAB) as u32
    };
    let own = 1 + mix.below((longest - shared).clamp(1, 40));
    let prompt: Vec<u32> =
        (0..shared).map(|at| token(family, at)).chain((0..own).map(|at| token(seed, at))).collect();
    let max_tokens = mix.below(longest + 1 - prompt.len().min(longest)).min(150);
    let one_in = |mix: &mut Mix, chances| mix.below(chances) == 0;
    let sampling = Sampling {
        temperature: if one_in(&mut mix, 2) { 0.0 } else { 0.5 + mix.unit() },
        top_k: if one_in(&mut mix, 3) { 1 + mix.below(20) } else { 0 },
        top_p: if one_in(&mut mix, 3) { 0.5 } else { 1.0 },
        min_p: if one_in(&mut mix, 4) { 0.1 } else { 0.0 },
        repetition_penalty: if one_in(&mut mix, 4) { 1.2 } else { 1.0 },
        presence_penalty: if one_in(&mut mix, 4) { 0.7 } else { 0.0 },
        frequency_penalty: if one_in(&mut mix, 4) { 0.3 } else { 0.0 },
        logit_bias: if one_in(&mut mix, 4) { vec![(5, 3.0)] } else { Vec::new() },
        seed: mix.next_u64(),
    };
    Request {
        max_tokens,
        min_tokens: if one_in(&mut mix, 3) { mix.below(max_tokens + 1) } else { 0 },
        ignore_eos: one_in(&mut mix, 2),
        stop_token_ids: if one_in(&mut mix, 4) { vec![9] } else { Vec::new() },
        sampling,
        logprobs: one_in(&mut mix, 4).then(|| mix.below(5)),
        prompt_logprobs: one_in(&mut mix, 6).then(|| mix.below(5)),
        prompt_logits: one_in(&mut mix, 8),
        constraint: None,
        cache_salt: one_in(&mut mix, 4).then_some(1),
        prompt,
    }
}

/// What does not depend on when it was computed.
fn told(completion: &Completion) -> String {
    let timeless = Completion {
        time_to_first_token: Duration::ZERO,
        total_time: Duration::ZERO,
        cached_tokens: 0,
        ..completion.clone()
    };
    format!("{timeless:?}")
}

fn alone(request: Request) -> Completion {
    engine(1, options()).run(vec![request], |_| {}).unwrap().remove(0)
}

#[test]
fn random_schedules_give_what_requests_give_alone() {
    let (mut preemptions, mut hits, mut aborted) = (0, [0; 2], 0);
    let seed = test_seed();
    for run in 0..RUNS {
        println!("EPSMOE_TEST_SEED={seed}, run {run}");
        let mut mix = Mix::keyed(seed, &[run]);
        let (tensor, data) = (1 + mix.below(2), 1 + mix.below(3));
        let longest = 65 + mix.below(600);
        let kv_blocks = longest.div_ceil(BLOCK_SIZE) + mix.below(8);
        let carries = mix.below(2) > 0;
        let mut engine = engine_of(
            carries,
            tensor * data,
            EngineOptions {
                max_batched_tokens: [1 + mix.below(20), 100, 1000][mix.below(3)],
                max_sequences: 1 + mix.below(12),
                max_model_len: longest,
                kv_blocks: Some(kv_blocks),
                prefix_caching: mix.below(4) > 0,
                kept_states: mix.below(10),
                parallel: Parallel { tensor, data: Some(data), ..Parallel::default() },
                ..options()
            },
        );
        let mut answers: HashMap<RequestId, (u64, Completion)> = HashMap::new();
        let mut to_come = 5 + mix.below(30);
        while to_come > 0 || !engine.is_idle() {
            for _ in 0..mix.below(4).min(to_come) {
                to_come -= 1;
                let seed = mix.next_u64();
                let id = engine.submit(request(seed, longest)).unwrap();
                answers.insert(id, (seed, Completion::default()));
            }
            assert!(engine.stats().steps < 100_000, "{:?}", engine.stats());
            engine.launch().unwrap();
            if mix.below(100) == 0 {
                let mut open: Vec<_> = answers
                    .iter()
                    .filter(|(_, (_, answer))| answer.finish.is_none())
                    .map(|(id, _)| *id)
                    .collect();
                open.sort_unstable();
                if let Some(&id) = open.get(mix.below(open.len())) {
                    engine.abort(id);
                }
            }
            engine.finish().unwrap();
            engine.check();
            for (id, event) in engine.take_events() {
                answers.get_mut(&id).unwrap().1.hear(event, Duration::ZERO).unwrap();
            }
        }
        let stats = engine.stats();
        assert_eq!((stats.kv_blocks_used, stats.running, stats.waiting), (0, 0, 0), "{stats:?}");
        preemptions += stats.preemptions;
        hits[usize::from(carries)] += stats.prefix_hits;
        for (id, (seed, answer)) in answers {
            let want = alone(request(seed, longest));
            if answer.finish == Some(Finish::Abort) {
                aborted += 1;
                assert_eq!(answer.ids, want.ids[..answer.ids.len()], "{id}, which was called off");
            } else {
                assert_eq!(told(&answer), told(&want), "{id}");
            }
        }
    }
    println!("{preemptions} preemptions, {hits:?} tokens found in the cache, {aborted} requests called off");
    assert!(preemptions > 100 && hits[0] > 10_000 && hits[1] > 5_000 && aborted > 20);
}

/// As many answers to one prompt as there are seeds: they share what was computed of it.
#[test]
fn seeds_make_the_difference() {
    let prompt: Vec<u32> = (0..200).map(|at| at % VOCAB as u32).collect();
    let request = |seed| Request {
        prompt: prompt.clone(),
        max_tokens: 20,
        ignore_eos: true,
        sampling: Sampling { temperature: 1.0, seed, ..Sampling::default() },
        ..Request::default()
    };
    let company = EngineOptions { max_sequences: 8, prefix_caching: true, kept_states: 2, ..options() };
    // Those who could have the state of the first wait for it.
    let mut carrying = engine_of(true, 1, company.clone());
    let answers = carrying.run((0..8).map(request).collect(), |_| {}).unwrap();
    assert_eq!(answers.iter().map(|answer| answer.cached_tokens).sum::<usize>(), 7 * 192);
    let mut together = engine(1, company.clone());
    let answers = together.run((0..8).map(request).collect(), |_| {}).unwrap();
    assert_eq!(answers.iter().map(|answer| answer.cached_tokens).sum::<usize>(), 7 * 192);
    for (seed, answer) in (0..8).zip(&answers) {
        assert_eq!(answer.ids, alone(request(seed)).ids, "seed {seed}");
        assert!(answers[..seed as usize].iter().all(|other| other.ids != answer.ids), "seed {seed}");
    }
    // The same request again, whatever was submitted before it.
    let again = together.run(vec![request(5), request(5)], |_| {}).unwrap();
    assert_eq!((&again[0].ids, &again[1].ids), (&answers[5].ids, &answers[5].ids));
}

/// What a step of decoding costs beside the ranks: `cargo test --release -p epsmoe-engine -- --ignored --nocapture speed`.
#[test]
#[ignore = "measures"]
fn speed_of_steps() {
    const STEPS: u32 = 300;
    for (sequences, vocab, sampled) in [(1, 50, 0), (64, 50, 0), (256, 50, 0), (64, 151_936, 64)] {
        let options = EngineOptions { max_sequences: sequences, prefix_caching: true, ..options() };
        let took = Arc::new(Mutex::new(Duration::ZERO));
        let executor = Box::new(Timed { vocab, started: VecDeque::new(), took: Arc::clone(&took) });
        let spec = Arc::new(ModelSpec { vocab, ..(*spec(false)).clone() });
        let mut engine = Engine::over(spec, executor, options).unwrap();
        for number in 0..sequences {
            let sampling = Sampling {
                temperature: if number < sampled { 0.8 } else { 0.0 },
                top_p: 0.95,
                seed: number as u64,
                ..Sampling::default()
            };
            let prompt = (0..100).map(|at| (number as u32 * 7 + at) % 50).collect();
            let request =
                Request { prompt, max_tokens: 1000, ignore_eos: true, sampling, ..Request::default() };
            engine.submit(request).unwrap();
        }
        while engine.stats().running < sequences as u64
            || engine.stats().generation_tokens < 2 * sequences as u64
        {
            engine.step().unwrap();
        }
        let steps = if sampled > 0 { STEPS / 10 } else { STEPS };
        let (mut ahead, before, begun) = (Duration::ZERO, *took.lock().unwrap(), Instant::now());
        for _ in 0..steps {
            let scheduling = Instant::now();
            engine.launch().unwrap();
            ahead += scheduling.elapsed();
            engine.finish().unwrap();
            engine.take_events();
        }
        let own = begun.elapsed() - (*took.lock().unwrap() - before);
        println!(
            "{sequences} sequences, {sampled} of them sampled from {vocab} tokens: {:?} a step, {:?} of it scheduling",
            own / steps,
            ahead / steps
        );
    }
}
