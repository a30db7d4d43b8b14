//! Tokens of a prompt and generated ones, which attention to latents computes in forms of their own; and in which rounds the
//! contexts of prompts are decompressed, so that they need room for some positions and heads at a time only.

use crate::BLOCK_SIZE;
use epsmoe_device::Buffer;
use std::ops::Range;

/// Queries that attend together: those of some sequences, one after the other.
pub(crate) struct Span {
    /// Which of the step's.
    pub(crate) rows: Range<usize>,
    /// `[Q, 1]`.
    pub(crate) positions: Buffer,
    /// `[B + 1, 1]`.
    pub(crate) sequence_starts: Buffer,
    /// `[B, most blocks]`.
    pub(crate) blocks: Buffer,
}

/// The queries of a step, by how they attend to latents.
pub(crate) struct Origins {
    /// Those of generated tokens; all, where prompts are not decompressed.
    pub(crate) absorbed: Option<Span>,
    /// Those of prompts.
    pub(crate) rounds: Vec<Round>,
}

/// Queries of prompts whose contexts are decompressed together.
pub(crate) struct Round {
    /// Its blocks are those of the decompressed rows, one context after the other.
    pub(crate) span: Span,
    /// The cached blocks of the contexts `[N, 1]`.
    pub(crate) cached: Buffer,
}

/// Room for the contexts of a round.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct RoundRoom {
    /// Positions of all contexts.
    pub(crate) positions: usize,
    /// Keys and values: a position's of one head.
    pub(crate) pairs: usize,
    /// Heads whose keys and values are decompressed by one product, at most.
    pub(crate) together: usize,
}

impl RoundRoom {
    /// Where nothing is decompressed.
    pub(crate) const NONE: RoundRoom = RoundRoom { positions: 0, pairs: 0, together: 0 };

    /// For a model with so many heads and sequences of so many blocks.
    pub(crate) fn of(heads: usize, sequences: usize, most_blocks: usize) -> Self {
        /// Enough to keep a GPU busy, and little beside a model.
        const POSITIONS: usize = 16 << 10;
        const PAIRS: usize = 256 << 10;
        /// More fill a GPU no better, and fewer of long contexts leave it idle.
        const FEWEST: usize = 8;
        const MOST: usize = 16;
        let longest = most_blocks.saturating_mul(BLOCK_SIZE);
        let positions = longest.saturating_mul(sequences).min(longest.max(POSITIONS));
        let together = if positions.saturating_mul(MOST) <= PAIRS { MOST } else { FEWEST };
        let least = longest.saturating_mul(heads.min(together));
        RoundRoom { positions, pairs: heads.saturating_mul(positions).min(PAIRS).max(least), together }
    }

    /// How many such products there is room for at a time, of so many positions.
    pub(crate) fn products(&self, positions: usize) -> usize {
        (self.pairs / positions.max(1) / self.together).max(1)
    }
}

/// Sequences that take a round each, given the blocks of their contexts: as many as there is room for, and at least one.
pub(crate) fn rounds(contexts: &[usize], room: usize) -> Vec<Range<usize>> {
    let mut rounds: Vec<Range<usize>> = Vec::new();
    let mut blocks = 0;
    for (sequence, context) in contexts.iter().enumerate() {
        match rounds.last_mut() {
            Some(round) if blocks + context <= room => {
                round.end = sequence + 1;
                blocks += context;
            }
            _ => {
                rounds.push(sequence..sequence + 1);
                blocks = *context;
            }
        }
    }
    rounds
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounds_hold_what_there_is_room_for() {
        assert_eq!(rounds(&[], 4), []);
        assert_eq!(rounds(&[1, 2, 1, 9, 1, 3, 1], 4), [0..3, 3..4, 4..6, 6..7]);
    }

    #[test]
    fn room_is_bounded_and_holds_some_heads_of_the_longest() {
        let room = |positions, pairs, together| RoundRoom { positions, pairs, together };
        assert_eq!(RoundRoom::of(4, 2, 3), room(384, 4 * 384, 16));
        assert_eq!(RoundRoom::of(16, 256, 256), room(16_384, 262_144, 16));
        assert_eq!(RoundRoom::of(16, 256, 512), room(32_768, 262_144, 8));
        assert_eq!(RoundRoom::of(16, 256, 2560), room(163_840, 1_310_720, 8));
        assert_eq!(RoundRoom::of(128, 256, 16).products(8192), 2);
        assert_eq!(RoundRoom::of(128, 256, 512).products(32_768), 1);
        assert_eq!(RoundRoom::of(128, 256, 512).products(8192), 4);
        assert_eq!(RoundRoom::of(4, 2, 3).products(384), 1);
    }
}
