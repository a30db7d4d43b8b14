//! What is computed next: which requests run, how far each gets in a step, and who gives way when the cache is full.
//! No clock, no device, no logits: the same calls give the same schedule. START HERE: [`Scheduler::schedule`].
//!
//! The rules, for every group of ranks that compute the same tokens:
//!
//! 1. Sequences that only lack their newest token (decode) go first, oldest first. One that needs a block when none is
//!    free takes it from the youngest of its group: that one waits again, and is computed anew.
//! 2. Then prompts that have been begun (prefill), oldest first, in chunks as large as the step has room for.
//! 3. Then those that wait are let in, oldest first and none before its turn, by the group with the least left to
//!    compute, if its cache has room for all tokens that they have so far.
//!
//! Where it matters whether a token is of a prompt or was generated (latent attention: `docs/bits.md`), no chunk has both
//! kinds, a step has chunks of generated tokens first, and blocks of different kinds are different blocks.
//!
//! Where sequences carry states, one can begin behind cached blocks only where the state behind the last of them is kept
//! (`states.rs`). Of a chunk one state is kept: behind the last of the blocks that another sequence has too but could not
//! go on from; else behind the last whole block of the prompt, for whoever asks the same or goes on with the conversation;
//! else behind the chunk's own last whole block, until the sequence leaves the next. A sequence that could save most of
//! its work by what this step keeps waits for the next.
//!
//! The oldest sequence can always go on, because no request may need more blocks than a group has.

use crate::RequestId;
use crate::kv_blocks::{BlockKey, BlockKeys, KvBlocks};
use crate::states::States;
use epsmoe_model::{BLOCK_SIZE, StateSlots};
use std::collections::BTreeMap;
use std::ops::Range;

/// What a scheduler has to keep to.
#[derive(Clone, Copy, Debug)]
pub(crate) struct SchedulerLimits {
    /// Groups of ranks.
    pub(crate) groups: usize,
    /// Most tokens of a group in one step.
    pub(crate) max_batched_tokens: usize,
    /// Most sequences that run in a group.
    pub(crate) max_sequences: usize,
    /// Most rows of prompt logits of a group in one step.
    pub(crate) max_prompt_rows: usize,
    /// Cache blocks of a group.
    pub(crate) kv_blocks: usize,
    /// Whether sequences that begin alike share blocks.
    pub(crate) prefix_caching: bool,
    /// Whether sequences carry states along, and slots for such as are kept.
    pub(crate) states: Option<usize>,
    /// Whether generated tokens have other bits than the same tokens of a prompt.
    pub(crate) by_origin: bool,
}

/// What is to be scheduled.
#[derive(Clone, Debug, Default)]
pub(crate) struct Job {
    pub(crate) prompt: Vec<u32>,
    /// Most new tokens.
    pub(crate) max_tokens: usize,
    /// Whether the logits of every prompt token are wanted.
    pub(crate) prompt_rows: bool,
    /// Only sequences of the same salt share blocks.
    pub(crate) salt: Option<u64>,
}

/// A request on its way, as far as scheduling goes.
pub(crate) struct Sequence {
    id: RequestId,
    /// The prompt, then what was generated.
    tokens: Vec<u32>,
    /// Tokens of the prompt.
    prompt: usize,
    /// The first token that has other bits than it would have in a prompt; `usize::MAX` if none does.
    origin: usize,
    /// New tokens that may still come.
    remaining: usize,
    /// First position of the prompt whose logits are still wanted; the prompt's length if none are.
    wanted: usize,
    /// How many tokens are in the cache, or will be after the step that is running.
    computed: usize,
    /// How many were found there when it was let in for the first time.
    cached: Option<usize>,
    blocks: Vec<u32>,
    /// The slot of its state, while it runs.
    state: u32,
    /// The block behind which it goes on from a kept state, until it has.
    behind: Option<BlockKey>,
    /// So many of its first blocks others have had too, but it could not go on behind them.
    shared: usize,
    /// The block behind which a state of its own is kept until it leaves the next.
    latest: Option<BlockKey>,
    /// What lies in its first blocks, as far as anybody asked, and what stands before the first one.
    keys: Vec<BlockKey>,
    root: BlockKey,
}

/// A piece of a sequence in a step.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ScheduledChunk {
    pub(crate) id: RequestId,
    /// Positions computed.
    pub(crate) positions: Range<usize>,
    /// Those of them whose logits are wanted because they belong to the prompt.
    pub(crate) prompt_rows: Range<usize>,
    /// Whether a new token follows the last of them.
    pub(crate) next_token: bool,
    /// Whether they were all generated, where that matters; else none was.
    pub(crate) generated: bool,
    /// Where its state is, and where it is left.
    pub(crate) states: StateSlots,
}

/// What a scheduler did so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct SchedulerCounts {
    /// Times that a sequence had to give way.
    pub(crate) preemptions: u64,
    /// Prompt tokens that were looked for in the cache, and those that were found.
    pub(crate) prefix_queries: u64,
    pub(crate) prefix_hits: u64,
}

/// The requests of an engine.
pub(crate) struct Scheduler {
    limits: SchedulerLimits,
    keys: BlockKeys,
    /// By age: numbers ascend.
    waiting: BTreeMap<RequestId, Sequence>,
    groups: Vec<Group>,
    counts: SchedulerCounts,
}

/// The sequences that one group of ranks runs.
struct Group {
    running: BTreeMap<RequestId, Sequence>,
    kv: KvBlocks,
    states: States,
    /// Whether a state must be kept where a sequence is to go on.
    carries: bool,
    /// If sequences share blocks.
    keys: Option<BlockKeys>,
}

/// What a group is going to compute, and what else it could.
struct Step {
    chunks: Vec<ScheduledChunk>,
    tokens_left: usize,
    prompt_rows_left: usize,
}

impl Scheduler {
    pub(crate) fn new(limits: SchedulerLimits) -> Self {
        let keys = BlockKeys::default();
        let group = |_| Group {
            running: BTreeMap::new(),
            kv: KvBlocks::new(limits.kv_blocks),
            states: States::new(limits.max_sequences, limits.states.unwrap_or(0)),
            carries: limits.states.is_some(),
            keys: limits.prefix_caching.then(|| keys.clone()),
        };
        let groups = (0..limits.groups).map(group).collect();
        Scheduler { groups, limits, keys, waiting: BTreeMap::new(), counts: SchedulerCounts::default() }
    }

    /// Lets a request wait for its turn. It must fit into the blocks of a group.
    pub(crate) fn add(&mut self, id: RequestId, job: Job) {
        let prompt = job.prompt.len();
        let sequence = Sequence {
            id,
            tokens: job.prompt,
            prompt,
            origin: if self.limits.by_origin { prompt } else { usize::MAX },
            remaining: job.max_tokens,
            wanted: if job.prompt_rows { 0 } else { prompt },
            computed: 0,
            cached: None,
            blocks: Vec::new(),
            state: 0,
            behind: None,
            shared: 0,
            latest: None,
            keys: Vec::new(),
            root: self.keys.root(job.salt),
        };
        self.waiting.insert(id, sequence);
    }

    /// Forgets a request, wherever it is; its blocks are free at once.
    pub(crate) fn remove(&mut self, id: RequestId) {
        self.waiting.remove(&id);
        for group in &mut self.groups {
            if let Some(mut sequence) = group.running.remove(&id) {
                group.release(&mut sequence);
            }
        }
    }

    /// Takes in the token that follows those that a running sequence has.
    pub(crate) fn push(&mut self, group: usize, id: RequestId, token: u32) {
        if let Some(sequence) = self.groups[group].running.get_mut(&id) {
            sequence.tokens.push(token);
            sequence.remaining = sequence.remaining.saturating_sub(1);
        }
    }

    /// A sequence that a group runs.
    pub(crate) fn running(&self, group: usize, id: RequestId) -> Option<&Sequence> {
        self.groups[group].running.get(&id)
    }

    /// Whether nobody runs or waits.
    pub(crate) fn is_idle(&self) -> bool {
        self.waiting.is_empty() && self.groups.iter().all(|group| group.running.is_empty())
    }

    /// Sequences that run, and those that wait for the first time or again.
    pub(crate) fn sequences(&self) -> (usize, usize) {
        (self.groups.iter().map(|group| group.running.len()).sum(), self.waiting.len())
    }

    /// Blocks that sequences have, and all there are.
    pub(crate) fn blocks(&self) -> (usize, usize) {
        let sum = |of: fn(&KvBlocks) -> usize| self.groups.iter().map(|group| of(&group.kv)).sum::<usize>();
        (sum(KvBlocks::total) - sum(KvBlocks::free), sum(KvBlocks::total))
    }

    pub(crate) fn counts(&self) -> SchedulerCounts {
        self.counts
    }

    /// The next step: what each group computes, one chunk after the other. It counts as computed from now on.
    pub(crate) fn schedule(&mut self) -> Vec<Vec<ScheduledChunk>> {
        let limits = self.limits;
        let mut steps = Vec::with_capacity(self.groups.len());
        for group in &mut self.groups {
            group.states.begin_step();
            let mut step = Step {
                chunks: Vec::new(),
                tokens_left: limits.max_batched_tokens,
                prompt_rows_left: limits.max_prompt_rows,
            };
            for sequence in group.decode(&mut step) {
                self.counts.preemptions += 1;
                self.waiting.insert(sequence.id, sequence);
            }
            group.prefill(&mut step);
            steps.push(step);
        }
        while let Some(mut next) = self.waiting.first_entry() {
            let Some((group, found)) = place(limits, &self.groups, &steps, next.get_mut(), &self.keys) else {
                break;
            };
            let sequence = next.remove();
            if sequence.cached.is_none() && limits.prefix_caching {
                self.counts.prefix_queries += sequence.prompt as u64;
                self.counts.prefix_hits += (found.blocks.len() * BLOCK_SIZE) as u64;
            }
            self.groups[group].admit(sequence, &found, &mut steps[group]);
        }
        let chunks = steps.into_iter().map(|mut step| {
            step.chunks.sort_by_key(|chunk| !chunk.generated);
            step.chunks
        });
        chunks.collect()
    }

    /// Whether every block belongs to whoever has it.
    #[cfg(test)]
    pub(crate) fn check(&self) {
        for group in &self.groups {
            group.kv.check(group.running.values().map(|sequence| &sequence.blocks));
            let own = group.running.values().map(|sequence| sequence.state);
            let held = group.running.values().filter_map(|sequence| sequence.behind);
            group.states.check(own, held, self.limits.max_sequences + self.limits.states.unwrap_or(0));
        }
        assert!(self.waiting.values().all(|sequence| sequence.blocks.is_empty()));
        if let ([group], Some(first)) = (&*self.groups, self.waiting.keys().next()) {
            assert!(group.running.keys().all(|id| id < first), "somebody was overtaken");
        }
    }
}

/// What a sequence finds in a group's cache.
struct Found {
    /// The blocks that it begins with.
    blocks: Vec<u32>,
    /// How many it could begin with, were the states behind them kept.
    shared: usize,
}

/// Where a waiting sequence is let in, and the cached blocks that it begins with there: the group with the least to
/// compute, of those that can take it.
fn place(
    limits: SchedulerLimits,
    groups: &[Group],
    steps: &[Step],
    sequence: &mut Sequence,
    keys: &BlockKeys,
) -> Option<(usize, Found)> {
    let reusable = if limits.prefix_caching { sequence.reusable() } else { 0 };
    sequence.extend_keys(keys, reusable);
    let places = groups.iter().zip(steps).enumerate().filter_map(|(index, (group, step))| {
        let (found, later) = group.find(&sequence.keys[..reusable]);
        let begin = found.blocks.len();
        let left = sequence.tokens.len() - begin * BLOCK_SIZE;
        let worth_waiting = 2 * (later - begin) * BLOCK_SIZE > left;
        let open = group.running.len() < limits.max_sequences && step.tokens_left > 0 && !worth_waiting;
        // Those that run will soon need more: what would be taken back at once is not given away.
        let spare = group.running.len().min(limits.kv_blocks / 100);
        let fits = open && group.kv.fits(&found.blocks, sequence.tokens.len(), spare);
        let in_step = limits.max_batched_tokens - step.tokens_left;
        let load = in_step + group.load() + left;
        fits.then_some((load, index, found))
    });
    let (_, group, found) = places.min_by_key(|(load, index, _)| (*load, *index))?;
    Some((group, found))
}

impl Group {
    /// Tokens that it has still to compute after this step, as far as that is known.
    fn load(&self) -> usize {
        self.running.values().map(|sequence| sequence.pending() + sequence.remaining).sum()
    }

    /// What a sequence with these blocks can begin with, and behind how many blocks it could go on from the next step on.
    fn find(&self, keys: &[BlockKey]) -> (Found, usize) {
        let mut blocks = self.kv.find(keys);
        let shared = blocks.len();
        let [now, later] = if self.carries { self.states.find(&keys[..shared]) } else { [shared; 2] };
        blocks.truncate(now);
        (Found { blocks, shared }, later)
    }

    /// Numbers of the running sequences that lack their newest token only, or that lack more.
    fn lacking(&self, more: bool) -> Vec<RequestId> {
        let lacking = self.running.values().filter(|sequence| match sequence.pending() {
            0 => false,
            pending => (pending > 1) == more,
        });
        lacking.map(|sequence| sequence.id).collect()
    }

    /// Gives every sequence its newest token; returns those that had to give way.
    fn decode(&mut self, step: &mut Step) -> Vec<Sequence> {
        let mut preempted = Vec::new();
        for id in self.lacking(false) {
            while let Some(sequence) = self.running.get_mut(&id) {
                if self.kv.grow(&mut sequence.blocks, sequence.tokens.len()).is_ok() {
                    self.take(id, step);
                    break;
                }
                let youngest = self.running.pop_last();
                preempted.extend(youngest.map(|(_, mut sequence)| {
                    self.release(&mut sequence);
                    sequence
                }));
            }
        }
        preempted
    }

    /// Goes on with prompts that have been begun.
    fn prefill(&mut self, step: &mut Step) {
        self.lacking(true).into_iter().for_each(|id| self.take(id, step));
    }

    /// Takes back what a sequence has.
    fn release(&mut self, sequence: &mut Sequence) {
        self.kv.release(&mut sequence.blocks);
        self.states.give(sequence.state);
        sequence.behind.take().and_then(|key| self.states.read(key));
    }

    /// Lets a sequence in, with blocks for all tokens that it has.
    fn admit(&mut self, mut sequence: Sequence, found: &Found, step: &mut Step) {
        let (id, begin) = (sequence.id, found.blocks.len());
        self.kv.share(&mut sequence.blocks, &found.blocks);
        sequence.computed = begin * BLOCK_SIZE;
        sequence.shared = found.shared;
        sequence.behind = if self.carries { sequence.keys[..begin].last().copied() } else { None };
        sequence.behind.into_iter().for_each(|key| self.states.hold(key));
        sequence.cached.get_or_insert(sequence.computed);
        let grown = self.kv.grow(&mut sequence.blocks, sequence.tokens.len());
        debug_assert!(grown.is_ok(), "{id} was let in without room");
        let state = self.states.take();
        debug_assert!(state.is_some(), "{id} was let in without a place for its state");
        sequence.state = state.unwrap_or(0);
        self.running.insert(id, sequence);
        self.take(id, step);
    }

    /// Puts as much of a sequence into the step as there is room for. Blocks that are full then are there for others
    /// at once: also in this step, keys and values are written before they are read.
    fn take(&mut self, id: RequestId, step: &mut Step) {
        let Some(sequence) = self.running.get_mut(&id) else { return };
        let start = sequence.computed;
        let mut end = start + sequence.pending().min(step.tokens_left);
        let generated = start >= sequence.origin;
        if !generated {
            end = end.min(sequence.origin);
        }
        let first_row = sequence.wanted.max(start);
        let rows_end = end.min(sequence.prompt).max(first_row);
        if rows_end - first_row > step.prompt_rows_left {
            end = first_row + step.prompt_rows_left;
        }
        if end <= start {
            return;
        }
        let prompt_rows = first_row..rows_end.min(end).max(first_row);
        step.tokens_left -= end - start;
        step.prompt_rows_left -= prompt_rows.len();
        sequence.computed = end;
        sequence.wanted = prompt_rows.end;
        let next_token = end == sequence.tokens.len() && sequence.remaining > 0;
        if let Some(keys) = &self.keys {
            sequence.extend_keys(keys, end / BLOCK_SIZE);
            for block in start / BLOCK_SIZE..end / BLOCK_SIZE {
                self.kv.publish(sequence.blocks[block], sequence.keys[block]);
            }
        }
        let states = sequence.states(&mut self.states, self.carries && self.keys.is_some(), start..end);
        step.chunks.push(ScheduledChunk {
            id,
            positions: start..end,
            prompt_rows,
            next_token,
            generated,
            states,
        });
    }
}

impl Sequence {
    /// The prompt, then what was generated.
    pub(crate) fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    /// Its cache blocks, in order.
    pub(crate) fn blocks(&self) -> &[u32] {
        &self.blocks
    }

    /// Tokens that were found in the cache when it was let in for the first time.
    pub(crate) fn cached(&self) -> usize {
        self.cached.unwrap_or(0)
    }

    /// Tokens that are not computed yet.
    fn pending(&self) -> usize {
        self.tokens.len() - self.computed
    }

    /// Full blocks that need not be computed if they are in the cache. The last token must be, for its logits.
    fn reusable(&self) -> usize {
        let wanted = if self.wanted < self.prompt { self.wanted } else { usize::MAX };
        wanted.min(self.tokens.len() - 1) / BLOCK_SIZE
    }

    /// Where its state is read and left by a chunk of these positions, and which is kept on the way.
    fn states(&mut self, states: &mut States, keeps: bool, chunk: Range<usize>) -> StateSlots {
        let to = self.state;
        let from = self.behind.take().and_then(|key| states.read(key)).unwrap_or(to);
        let own = StateSlots { from, to, kept: None };
        let behind = |blocks: &usize| (chunk.start + 1..=chunk.end).contains(&(blocks * BLOCK_SIZE));
        if !keeps {
            return own;
        }
        let (prompt, last) = (self.prompt.saturating_sub(1) / BLOCK_SIZE, chunk.end / BLOCK_SIZE);
        let wanted = [self.shared, prompt, last].into_iter().filter(behind);
        let mut wanted = wanted.map(|blocks| (blocks, self.keys[blocks - 1]));
        let Some((blocks, key)) = wanted.find(|(_, key)| !states.has(*key)) else { return own };
        if let Some(latest) = self.latest.take() {
            states.forget_unread(latest);
        }
        let Some(slot) = states.keep(key) else { return own };
        self.latest = (blocks != self.shared && blocks != prompt).then_some(key);
        let after = blocks * BLOCK_SIZE - chunk.start;
        StateSlots { kept: Some((slot, after as u32)), ..own }
    }

    /// Makes sure that the keys of its first `blocks` blocks are there.
    fn extend_keys(&mut self, keys: &BlockKeys, blocks: usize) {
        while self.keys.len() < blocks {
            let start = self.keys.len() * BLOCK_SIZE;
            let before = self.keys.last().copied().unwrap_or(self.root);
            let prompt = self.origin.saturating_sub(start).min(BLOCK_SIZE);
            self.keys.push(keys.next(before, &self.tokens[start..start + BLOCK_SIZE], prompt));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fmt::Write;

    const LIMITS: SchedulerLimits = SchedulerLimits {
        groups: 1,
        max_batched_tokens: 100,
        max_sequences: 4,
        max_prompt_rows: 1000,
        kv_blocks: 8,
        prefix_caching: true,
        states: None,
        by_origin: false,
    };

    /// Plays a script: `add ID prompt NEW`, where the prompt is runs of a token like `7x100,8x5`, then maybe `rows` or
    /// `salt=N`; `remove ID`; `step`, which every sequence answers with a token if it wants one. Each step becomes a
    /// line: the chunks of each group, those that wait, and the blocks in use.
    fn play(limits: SchedulerLimits, script: &str) -> String {
        let mut scheduler = Scheduler::new(limits);
        let mut told = String::new();
        for line in script.lines().map(str::trim).filter(|line| !line.is_empty()) {
            let words: Vec<&str> = line.split(' ').collect();
            let id = || RequestId(words[1].parse().unwrap());
            match words[0] {
                "add" => {
                    let runs = words[2].split(',').map(|run| run.split_once('x').unwrap());
                    let prompt = runs.flat_map(|(token, count)| {
                        std::iter::repeat_n(token.parse().unwrap(), count.parse().unwrap())
                    });
                    let job = Job {
                        prompt: prompt.collect(),
                        max_tokens: words[3].parse().unwrap(),
                        prompt_rows: words[4..].contains(&"rows"),
                        salt: words[4..].iter().find_map(|word| word.strip_prefix("salt=")?.parse().ok()),
                    };
                    scheduler.add(id(), job);
                }
                "remove" => scheduler.remove(id()),
                _ => step(&mut scheduler, &mut told),
            }
            scheduler.check();
        }
        told
    }

    fn step(scheduler: &mut Scheduler, told: &mut String) {
        for (group, chunks) in scheduler.schedule().into_iter().enumerate() {
            let separator = if group == 0 { "" } else { " | " };
            told.push_str(separator);
            for (index, chunk) in chunks.iter().enumerate() {
                let (id, positions) = (chunk.id.0, &chunk.positions);
                let separator = if index == 0 { "" } else { " " };
                write!(told, "{separator}{id}:{}..{}", positions.start, positions.end).unwrap();
                if !chunk.prompt_rows.is_empty() {
                    write!(told, " rows {}..{}", chunk.prompt_rows.start, chunk.prompt_rows.end).unwrap();
                }
                if let Some((slot, after)) = chunk.states.kept {
                    write!(told, " keeps {} in {slot}", chunk.positions.start + after as usize).unwrap();
                }
                if chunk.states.from != chunk.states.to {
                    write!(told, " from {}", chunk.states.from).unwrap();
                }
                if chunk.next_token {
                    scheduler.push(group, chunk.id, 1000 + id as u32);
                }
                let ended = scheduler.running(group, chunk.id).unwrap();
                if ended.remaining == 0 && ended.pending() <= 1 {
                    scheduler.remove(chunk.id);
                }
            }
        }
        let waiting: Vec<u64> = scheduler.waiting.keys().map(|id| id.0).collect();
        writeln!(told, "; {waiting:?} wait, {} blocks", scheduler.blocks().0).unwrap();
    }

    #[track_caller]
    fn check(limits: SchedulerLimits, script: &str, want: &str) {
        let want: String = want.lines().skip(1).map(|line| format!("{}\n", line.trim())).collect();
        let got = play(limits, script);
        assert!(
            got == want.trim_end_matches('\n').to_owned() + "\n" || got == want,
            "got:\n{got}\nwant:\n{want}"
        );
    }

    #[test]
    fn newest_tokens_come_before_prompts() {
        check(
            LIMITS,
            "add 0 1x5 9
             step
             add 1 2x150 9
             step
             step
             step",
            "
            0:0..5; [] wait, 1 blocks
            0:5..6 1:0..99; [] wait, 4 blocks
            0:6..7 1:99..150; [] wait, 4 blocks
            0:7..8 1:150..151; [] wait, 4 blocks",
        );
    }

    #[test]
    fn a_prompt_in_work_comes_before_a_new_one_but_after_newest_tokens_of_younger_ones() {
        check(
            LIMITS,
            "add 0 1x150 9
             add 1 2x3 9
             step
             step
             step",
            "
            0:0..100; [1] wait, 3 blocks
            0:100..150 1:0..3; [] wait, 4 blocks
            0:150..151 1:3..4; [] wait, 4 blocks",
        );
    }

    #[test]
    fn groups_share_the_work() {
        check(
            SchedulerLimits { groups: 2, ..LIMITS },
            "add 0 1x50 2
             add 1 2x30 2
             add 2 3x30 2
             add 3 4x50 2
             step",
            "
            0:0..50 3:0..50 | 1:0..30 2:0..30; [] wait, 4 blocks",
        );
    }

    #[test]
    fn no_more_run_than_may_and_nobody_is_overtaken() {
        check(
            SchedulerLimits { max_sequences: 2, ..LIMITS },
            "add 0 1x5 2
             add 1 1x5 1
             add 2 1x5 1
             step
             step
             step",
            "
            0:0..5 1:0..5; [2] wait, 1 blocks
            0:5..6 2:0..5; [] wait, 0 blocks
            ; [] wait, 0 blocks",
        );
        check(
            LIMITS,
            "add 0 1x300 2
             add 1 2x300 2
             add 2 3x5 2
             step",
            "
            0:0..100; [1, 2] wait, 5 blocks",
        );
    }

    #[test]
    fn the_youngest_gives_way_and_comes_back() {
        check(
            SchedulerLimits { kv_blocks: 4, prefix_caching: false, max_batched_tokens: 200, ..LIMITS },
            "add 0 1x63 70
             add 1 2x63 70
             add 2 3x10 2
             step
             step
             add 3 4x1 1
             step
             step",
            "
            0:0..63 1:0..63 2:0..10; [] wait, 3 blocks
            0:63..64 1:63..64 2:10..11; [] wait, 2 blocks
            0:64..65 1:64..65; [3] wait, 4 blocks
            0:65..66 1:65..66; [3] wait, 4 blocks",
        );
        check(
            SchedulerLimits { kv_blocks: 3, prefix_caching: false, max_batched_tokens: 200, ..LIMITS },
            "add 0 1x64 70
             add 1 2x64 70
             step
             step
             remove 0
             step",
            "
            0:0..64 1:0..64; [] wait, 2 blocks
            0:64..65; [1] wait, 2 blocks
            1:0..65; [] wait, 2 blocks",
        );
    }

    #[test]
    fn one_that_gives_way_finds_its_own_blocks_again() {
        check(
            SchedulerLimits { kv_blocks: 4, max_batched_tokens: 200, ..LIMITS },
            "add 0 1x64 70
             add 1 2x127 70
             step
             step
             remove 0
             step
             step",
            "
            0:0..64 1:0..127; [] wait, 3 blocks
            0:64..65 1:127..128; [] wait, 4 blocks
            1:128..129; [] wait, 3 blocks
            1:129..130; [] wait, 3 blocks",
        );
        check(
            SchedulerLimits { kv_blocks: 4, max_batched_tokens: 200, ..LIMITS },
            "add 0 1x128 70
             add 1 2x128 70
             step
             step
             remove 0
             step",
            "
            0:0..128 1:0..72; [] wait, 4 blocks
            0:128..129; [1] wait, 3 blocks
            1:64..128; [] wait, 2 blocks",
        );
    }

    #[test]
    fn what_begins_alike_is_computed_once() {
        check(
            LIMITS,
            "add 0 1x70,2x10 2
             add 1 1x70,3x10 2
             add 2 1x64 2
             add 3 1x65 2 salt=5
             step",
            "
            0:0..80 1:64..80 2:0..4; [3] wait, 4 blocks",
        );
        check(
            SchedulerLimits { max_batched_tokens: 1000, ..LIMITS },
            "add 0 1x70,2x10 2
             add 1 1x70,3x10 2
             add 2 1x64 2
             add 3 1x65 2 salt=5
             step",
            "
            0:0..80 1:64..80 2:0..64 3:0..65; [] wait, 6 blocks",
        );
    }

    #[test]
    fn generated_tokens_are_told_from_those_of_prompts() {
        let limits = SchedulerLimits { by_origin: true, max_batched_tokens: 200, kv_blocks: 4, ..LIMITS };
        // The one that gave way has its prompt computed, then what it had generated, before others' prompts.
        check(
            SchedulerLimits { prefix_caching: false, ..limits },
            "add 0 1x64 70
             add 1 2x63 70
             add 2 3x63 70
             step
             step
             step
             remove 0
             step
             add 3 4x5 9
             step",
            "
            0:0..64 1:0..63 2:0..63; [] wait, 3 blocks
            0:64..65 1:63..64 2:63..64; [] wait, 4 blocks
            0:65..66 1:64..65; [2] wait, 4 blocks
            1:65..66 2:0..63; [] wait, 4 blocks
            1:66..67 2:63..65; [3] wait, 4 blocks",
        );
        // A prompt does not begin with what another has generated, though the tokens are the same.
        let script = "add 0 1x60 9
             step
             step
             step
             step
             step
             step
             add 1 1x60,1000x6 9
             step";
        let same = "
            0:0..60; [] wait, 1 blocks
            0:60..61; [] wait, 1 blocks
            0:61..62; [] wait, 1 blocks
            0:62..63; [] wait, 1 blocks
            0:63..64; [] wait, 1 blocks
            0:64..65; [] wait, 2 blocks
            0:65..66";
        check(limits, script, &format!("{same} 1:0..66; [] wait, 4 blocks"));
        check(
            SchedulerLimits { by_origin: false, ..limits },
            script,
            &format!("{same} 1:64..66; [] wait, 3 blocks"),
        );
    }

    #[test]
    fn sequences_go_on_from_states_that_were_kept() {
        let limits = SchedulerLimits {
            max_batched_tokens: 300,
            max_sequences: 2,
            states: Some(3),
            kv_blocks: 40,
            ..LIMITS
        };
        // The end of a prompt is kept, then the end of what was generated, which moves. The next turn finds both.
        check(
            limits,
            "add 0 1x130 66
             step
             step
             add 1 1x130,9x20 2
             step
             step",
            "
            0:0..130 keeps 128 in 2; [] wait, 3 blocks
            0:130..131; [] wait, 3 blocks
            0:131..132 1:128..150 from 2; [] wait, 4 blocks
            0:132..133 1:150..151; [] wait, 3 blocks",
        );
        // Of two that begin alike the second keeps the state behind what they share; whoever would save most of its work
        // by that waits for the step to end.
        check(
            SchedulerLimits { max_sequences: 4, max_batched_tokens: 1000, ..limits },
            "add 0 1x140,2x60 1
             add 1 1x140,3x60 1
             add 2 1x140,4x60 1
             step
             step",
            "
            0:0..200 keeps 192 in 4 1:0..200 keeps 128 in 5; [2] wait, 0 blocks
            2:128..200 keeps 192 in 6 from 5; [] wait, 0 blocks",
        );
        // A long prompt keeps one state on its way, and makes room for the next by the one that was not used for longest.
        check(
            SchedulerLimits { states: Some(2), ..limits },
            "add 0 1x700 1
             step
             step
             step
             add 1 2x70 1
             step
             add 2 3x70 1
             step
             add 3 2x70 1
             step",
            "
            0:0..300 keeps 256 in 2; [] wait, 11 blocks
            0:300..600 keeps 576 in 2; [] wait, 11 blocks
            0:600..700 keeps 640 in 2; [] wait, 0 blocks
            1:0..70 keeps 64 in 3; [] wait, 0 blocks
            2:0..70 keeps 64 in 2; [] wait, 0 blocks
            3:64..70 from 3; [] wait, 0 blocks",
        );
    }

    #[test]
    fn rows_of_a_prompt_are_computed_once_and_never_skipped() {
        check(
            SchedulerLimits { max_prompt_rows: 40, ..LIMITS },
            "add 0 1x70 2
             step
             add 1 1x70 2 rows
             step
             step
             step",
            "
            0:0..70; [] wait, 2 blocks
            0:70..71 1:0..40 rows 0..40; [] wait, 2 blocks
            1:40..70 rows 40..70; [] wait, 2 blocks
            1:70..71; [] wait, 0 blocks",
        );
    }
}
