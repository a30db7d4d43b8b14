//! Who owns which block of the cache.

use epsmoe_model::BLOCK_SIZE;

/// The free cache blocks of one rank.
#[derive(Clone, Debug)]
pub(crate) struct BlockPool {
    free: Vec<u32>,
}

impl BlockPool {
    pub(crate) fn new(blocks: usize) -> Self {
        BlockPool { free: (0..blocks as u32).rev().collect() }
    }

    /// Blocks for a sequence of at most `tokens`, or nothing if there are not enough.
    pub(crate) fn take(&mut self, tokens: usize) -> Option<Vec<u32>> {
        let rest = self.free.len().checked_sub(blocks_for(tokens))?;
        Some(self.free.split_off(rest))
    }

    /// Blocks that nobody has.
    pub(crate) fn free(&self) -> usize {
        self.free.len()
    }

    pub(crate) fn give_back(&mut self, blocks: Vec<u32>) {
        self.free.extend(blocks);
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

    #[test]
    fn blocks_come_and_go() {
        let mut pool = BlockPool::new(3);
        let one = pool.take(64).unwrap();
        let two = pool.take(65).unwrap();
        assert_eq!((one.len(), two.len()), (1, 2));
        assert!(pool.take(1).is_none());
        pool.give_back(two);
        assert_eq!(pool.take(128).unwrap().len(), 2);
    }

    #[test]
    fn slots_follow_the_blocks() {
        assert_eq!(slot(&[7, 2], 3), 7 * 64 + 3);
        assert_eq!(slot(&[7, 2], 64), 2 * 64);
    }
}
