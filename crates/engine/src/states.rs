//! Who has which slot for a state, and which states are kept.
//!
//! A model that carries states needs a sequence's state beside its cached blocks to go on behind them. The state of a
//! sequence that runs lies in a slot of its own. Others hold states as they were behind full blocks, known by the keys
//! of those blocks: a sequence that begins alike reads one and goes on in its own. A step reads and writes states all at
//! once, so that what it keeps is there from the next one on, and what it reads is not written.

use crate::kv_blocks::BlockKey;
use std::collections::HashMap;

/// The slots of one group of ranks.
pub(crate) struct States {
    /// Slots that no sequence has.
    free: Vec<u32>,
    /// Slots in which nothing is kept.
    empty: Vec<u32>,
    kept: HashMap<BlockKey, Kept>,
    /// The number of the step that is being made.
    step: u64,
}

#[derive(Clone, Copy)]
struct Kept {
    slot: u32,
    /// The steps in which it was written, and read or written last.
    written: u64,
    used: u64,
    /// Sequences that were let in to go on from it, and have not yet.
    readers: u32,
}

impl States {
    /// Slots for so many sequences, then so many for what is kept.
    pub(crate) fn new(sequences: usize, kept: usize) -> Self {
        let (sequences, all) = (sequences as u32, (sequences + kept) as u32);
        States {
            free: (0..sequences).rev().collect(),
            empty: (sequences..all).rev().collect(),
            kept: HashMap::new(),
            step: 0,
        }
    }

    /// From now on another step is made.
    pub(crate) fn begin_step(&mut self) {
        self.step += 1;
    }

    /// A slot for a sequence.
    pub(crate) fn take(&mut self) -> Option<u32> {
        self.free.pop()
    }

    /// Takes it back.
    pub(crate) fn give(&mut self, slot: u32) {
        self.free.push(slot);
    }

    /// Whether the state behind a block is kept, or will be when this step has run.
    pub(crate) fn has(&self, key: BlockKey) -> bool {
        self.kept.contains_key(&key)
    }

    /// How many of these blocks, which follow each other, a sequence can go on behind: now, and from the next step on.
    pub(crate) fn find(&self, keys: &[BlockKey]) -> [usize; 2] {
        let last = |ready: &dyn Fn(&Kept) -> bool| {
            let found = keys.iter().rposition(|key| self.kept.get(key).is_some_and(ready));
            found.map_or(0, |at| at + 1)
        };
        [last(&|kept| kept.written < self.step), last(&|_| true)]
    }

    /// Holds what is kept behind a block until somebody has gone on from it.
    pub(crate) fn hold(&mut self, key: BlockKey) {
        if let Some(kept) = self.kept.get_mut(&key) {
            kept.readers += 1;
        }
    }

    /// The slot of what was held, which is read in this step or, by who does not come to it, not at all.
    pub(crate) fn read(&mut self, key: BlockKey) -> Option<u32> {
        let kept = self.kept.get_mut(&key)?;
        kept.readers -= 1;
        kept.used = self.step;
        Some(kept.slot)
    }

    /// A slot for the state behind a block, written in this step: an empty one, or else that of the state which was not used
    /// for longest. None where all are needed.
    pub(crate) fn keep(&mut self, key: BlockKey) -> Option<u32> {
        let idle = || {
            let idle = self.kept.iter().filter(|(_, kept)| kept.readers == 0 && kept.used < self.step);
            idle.min_by_key(|(_, kept)| (kept.used, kept.slot)).map(|(key, _)| *key)
        };
        let slot = match self.empty.pop() {
            Some(slot) => slot,
            None => idle().and_then(|key| self.kept.remove(&key))?.slot,
        };
        self.kept.insert(key, Kept { slot, written: self.step, used: self.step, readers: 0 });
        Some(slot)
    }

    /// Gives up what is kept behind a block, unless somebody went on from it.
    pub(crate) fn forget_unread(&mut self, key: BlockKey) {
        let unread = |kept: &Kept| kept.readers == 0 && kept.used == kept.written && kept.used < self.step;
        if self.kept.get(&key).is_some_and(unread) {
            self.empty.extend(self.kept.remove(&key).map(|kept| kept.slot));
        }
    }

    /// Whether every slot is somewhere, given those of all sequences and what they hold.
    #[cfg(test)]
    pub(crate) fn check(
        &self,
        own: impl Iterator<Item = u32>,
        held: impl Iterator<Item = BlockKey>,
        all: usize,
    ) {
        let kept = self.kept.values().map(|kept| kept.slot);
        let mut slots: Vec<u32> =
            own.chain(self.free.iter().copied()).chain(self.empty.iter().copied()).chain(kept).collect();
        slots.sort_unstable();
        assert!(slots.into_iter().eq(0..all as u32), "slots of states");
        let mut readers: HashMap<BlockKey, u32> = HashMap::new();
        held.for_each(|key| *readers.entry(key).or_default() += 1);
        for (key, kept) in &self.kept {
            assert_eq!(kept.readers, readers.remove(key).unwrap_or(0), "readers of slot {}", kept.slot);
        }
        assert!(readers.is_empty(), "somebody holds what is not kept");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kv_blocks::BlockKeys;

    fn keys(count: u32) -> Vec<BlockKey> {
        let keys = BlockKeys::default();
        (0..count).map(|at| keys.next(keys.root(None), &[at], 1)).collect()
    }

    #[test]
    fn what_is_kept_is_there_from_the_next_step_on() {
        let (mut states, keys) = (States::new(2, 2), keys(4));
        states.begin_step();
        assert_eq!(states.keep(keys[1]), Some(2));
        assert_eq!(states.find(&keys), [0, 2]);
        states.begin_step();
        assert_eq!(states.find(&keys), [2, 2]);
        assert_eq!(states.find(&keys[..1]), [0, 0]);
        states.check(std::iter::empty(), std::iter::empty(), 4);
    }

    #[test]
    fn the_one_that_was_not_used_for_longest_makes_room() {
        let (mut states, keys) = (States::new(1, 2), keys(5));
        for key in &keys[..2] {
            states.begin_step();
            states.keep(*key);
        }
        states.begin_step();
        states.hold(keys[0]);
        assert_eq!(states.read(keys[0]), Some(1));
        // What is read in this step is not written in it.
        assert_eq!(states.keep(keys[2]), Some(2));
        assert_eq!(states.keep(keys[3]), None);
        assert!(states.has(keys[0]) && !states.has(keys[1]));
        states.begin_step();
        states.hold(keys[0]);
        states.begin_step();
        // What is held stays.
        assert_eq!(states.keep(keys[3]), Some(2));
        assert_eq!(states.keep(keys[4]), None);
        states.check(std::iter::empty(), [keys[0]].into_iter(), 3);
    }

    #[test]
    fn what_nobody_went_on_from_can_be_given_up() {
        let (mut states, keys) = (States::new(0, 2), keys(2));
        states.begin_step();
        states.keep(keys[0]);
        states.keep(keys[1]);
        states.forget_unread(keys[0]);
        assert!(states.has(keys[0]), "it is being written");
        states.begin_step();
        states.hold(keys[0]);
        states.read(keys[0]);
        states.begin_step();
        keys.iter().for_each(|key| states.forget_unread(*key));
        assert!(states.has(keys[0]) && !states.has(keys[1]));
    }
}
