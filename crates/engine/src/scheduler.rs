//! What a group of ranks computes next.

use crate::kv_blocks::{BlockPool, slot};
use crate::{Completion, Request, RequestId};
use epsmoe_model::Batch;
use std::collections::VecDeque;
use std::ops::Range;
use std::time::Instant;

/// A request on its way.
pub(crate) struct Sequence {
    /// Its number, in order of submission.
    pub(crate) number: RequestId,
    pub(crate) request: Request,
    /// The prompt, then what was generated.
    pub(crate) tokens: Vec<u32>,
    /// How many of them are in the cache.
    pub(crate) cached: usize,
    pub(crate) blocks: Vec<u32>,
    pub(crate) completion: Completion,
    pub(crate) submitted: Instant,
    /// When its first step had ended.
    pub(crate) started: Option<Instant>,
}

/// The sequences of one group of ranks that compute the same tokens.
pub(crate) struct Scheduler {
    pub(crate) waiting: VecDeque<Sequence>,
    pub(crate) running: Vec<Sequence>,
    pub(crate) blocks: BlockPool,
}

/// A piece of a running sequence in a batch.
pub(crate) struct ScheduledChunk {
    /// Which of the running sequences.
    pub(crate) sequence: usize,
    /// Positions computed.
    pub(crate) positions: Range<usize>,
    /// Rows of logits, or tokens, that come back.
    pub(crate) logits: usize,
}

impl Scheduler {
    pub(crate) fn new(blocks: usize) -> Self {
        Scheduler { waiting: VecDeque::new(), running: Vec::new(), blocks: BlockPool::new(blocks) }
    }

    /// Tokens this group has still to compute, as far as they are known.
    pub(crate) fn load(&self) -> usize {
        let all = self.waiting.iter().chain(&self.running);
        all.map(|sequence| sequence.tokens.len() + sequence.request.max_tokens - sequence.cached).sum()
    }

    pub(crate) fn is_idle(&self) -> bool {
        self.waiting.is_empty() && self.running.is_empty()
    }

    /// Lets waiting sequences in while there is room for all they may grow to.
    pub(crate) fn admit(&mut self, max_sequences: usize) {
        while self.running.len() < max_sequences {
            let Some(next) = self.waiting.front() else { return };
            let Some(blocks) = self.blocks.take(next.tokens.len() + next.request.max_tokens) else { return };
            self.running.extend(self.waiting.pop_front().map(|sequence| Sequence { blocks, ..sequence }));
        }
    }

    /// Takes a sequence out, wherever it is, and its blocks back.
    pub(crate) fn remove(&mut self, number: RequestId) -> Option<Sequence> {
        let is_it = |sequence: &Sequence| sequence.number == number;
        if let Some(at) = self.waiting.iter().position(is_it) {
            return self.waiting.remove(at);
        }
        let at = self.running.iter().position(is_it)?;
        let mut sequence = self.running.remove(at);
        self.blocks.give_back(std::mem::take(&mut sequence.blocks));
        Some(sequence)
    }

    /// The next batch of at most `budget` tokens: every sequence that only has its newest token to compute, then
    /// as much of the prompts as fits.
    pub(crate) fn next_batch(&self, budget: usize) -> (Batch, Vec<ScheduledChunk>) {
        let mut order: Vec<usize> = (0..self.running.len()).collect();
        order.sort_by_key(|&index| self.running[index].pending().len() > 1);
        let greedy = self.running.iter().all(|sequence| sequence.request.wants_only_tokens());
        let (mut batch, mut pieces) =
            (Batch { sequence_starts: vec![0], greedy, ..Batch::default() }, Vec::new());
        for index in order {
            let sequence = &self.running[index];
            let pending = sequence.pending();
            let taken = pending.len().min(budget - batch.ids.len());
            if taken > 0 {
                let positions = pending.start..pending.start + taken;
                pieces.push(sequence.append_to(&mut batch, index, positions));
            }
        }
        (batch, pieces)
    }
}

impl Sequence {
    /// Positions that are not cached yet.
    fn pending(&self) -> Range<usize> {
        self.cached..self.tokens.len()
    }

    fn append_to(&self, batch: &mut Batch, sequence: usize, positions: Range<usize>) -> ScheduledChunk {
        let first = batch.ids.len();
        batch.ids.extend(&self.tokens[positions.clone()]);
        batch.positions.extend(positions.clone().map(|position| position as u32));
        batch.slots.extend(positions.clone().map(|position| slot(&self.blocks, position)));
        batch.sequence_starts.push(batch.ids.len() as u32);
        batch.blocks.push(self.blocks.clone());
        batch.sequences.push(self.number.0);
        let wanted = positions.clone().filter(|&position| self.wants_logits(position));
        let before = batch.logits.len();
        batch.logits.extend(wanted.map(|position| (first + position - positions.start) as u32));
        ScheduledChunk { sequence, logits: batch.logits.len() - before, positions }
    }

    fn wants_logits(&self, position: usize) -> bool {
        let next_token = position + 1 == self.tokens.len() && self.request.max_tokens > 0;
        next_token || (self.request.prompt_logits && position < self.request.prompt.len())
    }
}
