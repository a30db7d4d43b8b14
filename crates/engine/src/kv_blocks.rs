//! Who owns which block of the KV cache, and what lies in it.
//!
//! A block holds the keys and values of [`BLOCK_SIZE`] positions. Sequences have tables of blocks that grow as they
//! do. A full block has a *key*, which stands for its tokens and all tokens before them: a sequence that begins
//! alike takes the block as it is instead of computing it again. A block that nobody has any more keeps its key until
//! it is needed for something else, the one that lay unused for longest first.

use epsmoe_model::BLOCK_SIZE;
use std::collections::hash_map::Entry;
use std::collections::{BTreeSet, HashMap};
use std::hash::{BuildHasher, RandomState};

/// What lies in a full block: a hash of its tokens and of everything before them. 128 bits under a secret of this
/// process: two contents do not meet by accident, and nobody outside can make them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct BlockKey(u64, u64);

/// Makes keys.
#[derive(Clone, Default)]
pub(crate) struct BlockKeys(RandomState, RandomState);

impl BlockKeys {
    /// What stands before a sequence's first block. Sequences of different salts have no block in common.
    pub(crate) fn root(&self, salt: Option<u64>) -> BlockKey {
        BlockKey(self.0.hash_one(salt), self.1.hash_one(salt))
    }

    /// The block with these tokens, behind another; of tokens whose origin matters, the first `prompt` are of a prompt
    /// and the others were generated.
    pub(crate) fn next(&self, before: BlockKey, tokens: &[u32], prompt: usize) -> BlockKey {
        let content = (before, tokens, prompt);
        BlockKey(self.0.hash_one(content), self.1.hash_one(content))
    }
}

/// The cache blocks of one group of ranks.
#[derive(Debug)]
pub(crate) struct KvBlocks {
    blocks: Vec<Block>,
    /// Blocks that nobody has: empty ones first, then those that have been unused for longest.
    free: BTreeSet<Free>,
    /// Blocks by what lies in them.
    cached: HashMap<BlockKey, u32>,
    releases: u64,
}

#[derive(Clone, Copy, Debug, Default)]
struct Block {
    /// Sequences that have it.
    owners: u32,
    key: Option<BlockKey>,
    /// When it was released last.
    released: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Free {
    cached: bool,
    released: u64,
    block: u32,
}

/// There are not as many free blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Full;

impl KvBlocks {
    pub(crate) fn new(blocks: usize) -> Self {
        KvBlocks {
            blocks: vec![Block::default(); blocks],
            free: (0..blocks as u32).map(|block| Free { cached: false, released: 0, block }).collect(),
            cached: HashMap::new(),
            releases: 0,
        }
    }

    /// All blocks.
    pub(crate) fn total(&self) -> usize {
        self.blocks.len()
    }

    /// Blocks that nobody has.
    pub(crate) fn free(&self) -> usize {
        self.free.len()
    }

    /// The longest run of blocks, from the first key on, that lie in the cache.
    pub(crate) fn find(&self, keys: &[BlockKey]) -> Vec<u32> {
        keys.iter().map_while(|key| self.cached.get(key).copied()).collect()
    }

    /// Whether a table that begins with these cached blocks can grow to `tokens`, and leave `spare` blocks free.
    pub(crate) fn fits(&self, found: &[u32], tokens: usize, spare: usize) -> bool {
        let taken = found.iter().filter(|&&block| self.blocks[block as usize].owners == 0).count();
        blocks_for(tokens) - found.len() + taken + spare <= self.free.len()
    }

    /// Makes the sequence with this table an owner of cached blocks, which become its first ones.
    pub(crate) fn share(&mut self, table: &mut Vec<u32>, found: &[u32]) {
        for &block in found {
            let entry = &mut self.blocks[block as usize];
            if entry.owners == 0 {
                self.free.remove(&Free { cached: true, released: entry.released, block });
            }
            entry.owners += 1;
            table.push(block);
        }
    }

    /// Lets a table grow until it holds `tokens`; as it was if that is impossible.
    pub(crate) fn grow(&mut self, table: &mut Vec<u32>, tokens: usize) -> Result<(), Full> {
        let more = blocks_for(tokens).saturating_sub(table.len());
        if more > self.free.len() {
            return Err(Full);
        }
        for Free { block, .. } in (0..more).filter_map(|_| self.free.pop_first()).collect::<Vec<_>>() {
            let entry = &mut self.blocks[block as usize];
            if let Some(key) = entry.key.take() {
                self.cached.remove(&key);
            }
            entry.owners = 1;
            table.push(block);
        }
        Ok(())
    }

    /// Says what lies in a block, or will as soon as the next step has run. The first block of a key keeps it.
    pub(crate) fn publish(&mut self, block: u32, key: BlockKey) {
        if let Entry::Vacant(place) = self.cached.entry(key) {
            place.insert(block);
            self.blocks[block as usize].key = Some(key);
        }
    }

    /// Takes a sequence's blocks back. Its last ones are used for something else before its first ones, which more
    /// sequences may begin with.
    pub(crate) fn release(&mut self, table: &mut Vec<u32>) {
        for block in table.drain(..).rev() {
            let entry = &mut self.blocks[block as usize];
            entry.owners -= 1;
            if entry.owners == 0 {
                self.releases += 1;
                entry.released = self.releases;
                self.free.insert(Free { cached: entry.key.is_some(), released: entry.released, block });
            }
        }
    }

    /// Whether owners, keys and free blocks agree, given the tables of all sequences.
    #[cfg(test)]
    pub(crate) fn check<'a>(&self, tables: impl IntoIterator<Item = &'a Vec<u32>>) {
        let mut owners = vec![0; self.blocks.len()];
        tables.into_iter().flatten().for_each(|&block| owners[block as usize] += 1);
        for (number, (block, owners)) in (0..).zip(self.blocks.iter().zip(owners)) {
            assert_eq!(block.owners, owners, "owners of block {number}");
            let free = Free { cached: block.key.is_some(), released: block.released, block: number };
            assert_eq!(self.free.contains(&free), owners == 0, "block {number}");
            if let Some(key) = block.key {
                assert_eq!(self.cached[&key], number, "key of block {number}");
            }
        }
        assert_eq!(self.free.len(), self.blocks.iter().filter(|block| block.owners == 0).count());
        assert_eq!(self.cached.len(), self.blocks.iter().filter(|block| block.key.is_some()).count());
    }
}

/// Blocks that hold `tokens`.
pub(crate) fn blocks_for(tokens: usize) -> usize {
    tokens.div_ceil(BLOCK_SIZE)
}

/// The cache slot of a position in a sequence's blocks.
pub(crate) fn slot(blocks: &[u32], position: usize) -> u32 {
    blocks[position / BLOCK_SIZE] * BLOCK_SIZE as u32 + (position % BLOCK_SIZE) as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Keys of a sequence of so many blocks.
    fn keys(keys: &BlockKeys, salt: Option<u64>, blocks: u32) -> Vec<BlockKey> {
        let mut before = keys.root(salt);
        let next = |block| {
            before = keys.next(before, &[block; BLOCK_SIZE], BLOCK_SIZE);
            before
        };
        (0..blocks).map(next).collect()
    }

    #[test]
    fn tables_grow_and_go() {
        let mut kv = KvBlocks::new(3);
        let (mut one, mut two) = (Vec::new(), Vec::new());
        kv.grow(&mut one, 64).unwrap();
        kv.grow(&mut two, 65).unwrap();
        assert_eq!((one.len(), two.len()), (1, 2));
        kv.grow(&mut two, 128).unwrap();
        assert_eq!(kv.grow(&mut one, 65), Err(Full));
        kv.check([&one, &two]);
        kv.release(&mut two);
        kv.grow(&mut one, 192).unwrap();
        kv.check([&one]);
    }

    #[test]
    fn what_lies_there_is_found_until_its_block_is_needed() {
        let (mut kv, all) = (KvBlocks::new(4), BlockKeys::default());
        let [own, salted] = [None, Some(7)].map(|salt| keys(&all, salt, 3));
        let mut one = Vec::new();
        kv.grow(&mut one, 192).unwrap();
        one.iter().zip(&own).for_each(|(&block, &key)| kv.publish(block, key));
        assert_eq!(kv.find(&own), one);
        assert!(kv.find(&salted).is_empty());
        let mut two = Vec::new();
        kv.share(&mut two, &one[..2]);
        kv.check([&one, &two]);
        let first = one.clone();
        kv.release(&mut one);
        kv.check([&two]);
        // The empty block goes first, then the third, which nobody has any more.
        assert!(kv.fits(&[], 128, 0) && !kv.fits(&[], 128, 1) && kv.fits(&first, 192, 1));
        let mut three = Vec::new();
        kv.grow(&mut three, 64).unwrap();
        assert_eq!(kv.find(&own), first);
        kv.grow(&mut three, 128).unwrap();
        assert_eq!(kv.find(&own), first[..2]);
        kv.check([&two, &three]);
        kv.release(&mut two);
        kv.release(&mut three);
        assert_eq!(kv.free(), 4);
        // Of a sequence's blocks the last one is needed first.
        kv.grow(&mut three, 3 * 64).unwrap();
        assert_eq!(kv.find(&own), first[..1]);
        kv.check([&three]);
    }

    #[test]
    fn the_first_block_of_a_key_keeps_it() {
        let (mut kv, key) = (KvBlocks::new(2), keys(&BlockKeys::default(), None, 1)[0]);
        let (mut one, mut two) = (Vec::new(), Vec::new());
        kv.grow(&mut one, 64).unwrap();
        kv.grow(&mut two, 64).unwrap();
        kv.publish(one[0], key);
        kv.publish(two[0], key);
        assert_eq!(kv.find(&[key]), one);
        kv.check([&one, &two]);
    }

    #[test]
    fn slots_follow_the_blocks() {
        assert_eq!(slot(&[7, 2], 3), 7 * 64 + 3);
        assert_eq!(slot(&[7, 2], 64), 2 * 64);
    }
}
