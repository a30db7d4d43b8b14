//! Before a step: who has which tokens.

use crate::collectives::Shares;
use crate::origins::Origins;
use crate::parallel::Layout;
use crate::{Batch, StateSlots};
use epsmoe_base::{Fault, FaultKind, Place, Rank, hash_bytes};
use epsmoe_device::Buffer;
use epsmoe_fabric::Control;
use epsmoe_pipeline::{TokenId, disagreement};
use std::ops::Range;

/// The views that every layer of one step shares. Attention sees all tokens of the group; between attention and
/// MLPs this rank has a shard of them.
pub(crate) struct Step {
    /// Cache slot of each token, and the cache blocks of each sequence.
    pub(crate) slots: Buffer,
    pub(crate) blocks: Buffer,
    /// All positions are below: a power of two, so that many steps have the same.
    pub(crate) longest: usize,
    /// Where each sequence's state is, and where it is to be left `[B, 4]`.
    pub(crate) states: Buffer,
    /// The tokens of every layer, and those of the last layer, if they are fewer.
    pub(crate) all: LayerTokens,
    pub(crate) last: Option<LayerTokens>,
    /// Where the tokens whose logits are wanted lie in the group, and which of the shard they are.
    pub(crate) wanted: Shares,
    pub(crate) index: Vec<u32>,
    /// The tokens that this rank's routers see, if routing is recorded or replayed.
    pub(crate) routed: Vec<TokenId>,
    /// Whether this rank counts the tokens of every expert.
    pub(crate) count_experts: bool,
}

/// The tokens that a layer computes, once it has stored the keys and values of all.
pub(crate) struct LayerTokens {
    /// Which of the shard; all, when absent.
    pub(crate) index: Option<Buffer>,
    pub(crate) queries: Queries,
    /// Where the tokens of the ranks that split attention, and MLPs, lie.
    pub(crate) attention: Shares,
    pub(crate) mlp: Shares,
    /// How many each rank of the world has, where that is known.
    pub(crate) known: Option<Vec<usize>>,
}

/// What attention needs to know of the tokens that look: Q of the group's tokens.
pub(crate) struct Queries {
    /// Which they are `[Q, 1]`; all, when absent.
    pub(crate) index: Option<Buffer>,
    /// `[Q, 1]`.
    pub(crate) positions: Buffer,
    /// `[B + 1, 1]`.
    pub(crate) sequence_starts: Buffer,
    /// `[Q, rope.dim]` of each rotary embedding.
    pub(crate) rope_tables: Vec<Buffer>,
    /// By the origins of their tokens, of a model with latents.
    pub(crate) origins: Option<Origins>,
}

/// How many tokens each rank of the world has in its shard, of how many of them logits are wanted, and, if routing is
/// recorded or replayed, which they are. Of ranks whose tokens do not matter here, none.
pub(crate) struct StepLayout {
    pub(crate) shards: Vec<usize>,
    pub(crate) wanted: Vec<usize>,
    labels: Vec<Vec<TokenId>>,
    /// Whether that is so of all ranks.
    met: bool,
}

impl StepLayout {
    /// What this rank knows by itself, or, where ranks work on each other's tokens or `meets` says so, what all ranks tell each
    /// other: the only blocking exchange besides the count exchange of expert pipelines. `identity` is a hash of
    /// everything ranks must have in common.
    pub(crate) fn agree(
        control: &dyn Control,
        layout: &Layout,
        identity: u64,
        batch: &Batch,
        [labelled, meets]: [bool; 2],
    ) -> Result<Self, Fault> {
        let mine = Announcement {
            identity,
            batch: batch.fingerprint(),
            tokens: batch.ids.len(),
            wanted: batch.wanted_in(&layout.in_group().of(batch.ids.len())).len(),
            labels: if labelled { batch.labels() } else { Vec::new() },
        };
        let (me, met) = (control.rank(), meets || layout.shares_tokens());
        let all = if met {
            gather(control, layout, me, mine)?
        } else {
            let others = Announcement { identity, ..Announcement::default() };
            let mut all = vec![others; control.size()];
            all[me.0] = mine;
            all
        };
        let shard = |(rank, of_rank): (usize, &Announcement)| layout.in_group_of(rank).of(of_rank.tokens);
        let shards: Vec<Range<usize>> = all.iter().enumerate().map(shard).collect();
        let labels = all
            .iter()
            .zip(&shards)
            .map(|(of_rank, shard)| of_rank.labels.get(shard.clone()).unwrap_or_default().to_vec());
        Ok(StepLayout {
            labels: labels.collect(),
            wanted: all.iter().map(|of_rank| of_rank.wanted).collect(),
            shards: shards.iter().map(|shard| shard.len()).collect(),
            met,
        })
    }

    /// What every rank has of the tokens that `of_ranks` counts, if everybody knows it.
    pub(crate) fn known(&self, of_ranks: &[usize]) -> Option<Vec<usize>> {
        self.met.then(|| of_ranks.to_vec())
    }

    /// The tokens in the shards of some ranks, one after the other.
    pub(crate) fn labels(&self, ranks: Range<usize>) -> Vec<TokenId> {
        self.labels[ranks].concat()
    }
}

/// What a rank tells the others before a step.
#[derive(Clone, Debug, Default, PartialEq)]
struct Announcement {
    identity: u64,
    /// A hash of the batch, equal on all ranks of a group.
    batch: u64,
    tokens: usize,
    /// Tokens of its shard whose logits are wanted.
    wanted: usize,
    labels: Vec<TokenId>,
}

/// Everybody's announcement, in rank order; ranks that contradict this one are named.
fn gather(
    control: &dyn Control,
    layout: &Layout,
    me: Rank,
    mine: Announcement,
) -> Result<Vec<Announcement>, Fault> {
    let place = Place::default();
    let messages = control.exchange("step", place, mine.encode())?;
    let mut all = Vec::with_capacity(messages.len());
    for (rank, message) in messages.iter().enumerate() {
        let theirs = Announcement::decode(message).filter(|theirs| theirs.identity == mine.identity);
        let theirs = theirs.ok_or_else(|| disagreement(me, place, Rank(rank)))?;
        if layout.attention_ranks().contains(&rank) && theirs.batch != mine.batch {
            let message =
                format!("{me} and {} split attention, but were given different batches", Rank(rank));
            return Err(Fault { kind: FaultKind::Mismatch, rank: me, place, message });
        }
        all.push(theirs);
    }
    Ok(all)
}

impl Announcement {
    /// Identity, batch, tokens, wanted, then sequence, and token over position, of each label: 64-bit words.
    fn encode(&self) -> Vec<u8> {
        let label = |id: &TokenId| [id.sequence, u64::from(id.token) << 32 | u64::from(id.position)];
        let words = [self.identity, self.batch, self.tokens as u64, self.wanted as u64];
        let words = words.into_iter().chain(self.labels.iter().flat_map(label));
        words.flat_map(u64::to_le_bytes).collect()
    }

    fn decode(bytes: &[u8]) -> Option<Self> {
        let (words, _) = bytes.as_chunks::<8>();
        let words: Vec<u64> = words.iter().map(|&word| u64::from_le_bytes(word)).collect();
        let (&[identity, batch, tokens, wanted], labels) = words.split_first_chunk()?;
        let (tokens, wanted) = (usize::try_from(tokens).ok()?, usize::try_from(wanted).ok()?);
        let (labels, _) = labels.as_chunks::<2>();
        let label = |&[sequence, token]: &[u64; 2]| TokenId {
            sequence,
            position: token as u32,
            token: (token >> 32) as u32,
        };
        let labels = labels.iter().map(label).collect();
        Some(Announcement { identity, batch, tokens, wanted, labels })
    }
}

impl Batch {
    /// A hash of everything that ranks which split attention must agree on.
    fn fingerprint(&self) -> u64 {
        let whole = self.whole.iter().map(|&whole| u32::from(whole)).collect();
        let parts = [&self.ids, &self.positions, &self.slots, &self.sequence_starts, &self.logits, &whole];
        let (states, generated) = (self.state_words(), vec![self.generated as u32]);
        let words = parts
            .into_iter()
            .chain([&states, &generated])
            .chain(&self.blocks)
            .flat_map(|part| [part.len() as u32].into_iter().chain(part.iter().copied()));
        hash_bytes(&words.flat_map(u32::to_le_bytes).collect::<Vec<u8>>())
    }

    /// Slots of all states, as operations read them.
    pub(crate) fn state_words(&self) -> Vec<u32> {
        self.states.iter().flat_map(StateSlots::words).collect()
    }

    /// A power of two that all positions are below.
    pub(crate) fn longest(&self) -> usize {
        /// Steps of shorter sequences are all alike.
        const LEAST: usize = 256;
        let last = self.positions.iter().max().copied().unwrap_or(0) as usize;
        (last + 1).next_power_of_two().max(LEAST)
    }

    /// The wanted tokens among `tokens`.
    pub(crate) fn wanted_in(&self, tokens: &Range<usize>) -> &[u32] {
        let before = |end: usize| self.logits.partition_point(|&token| (token as usize) < end);
        &self.logits[before(tokens.start)..before(tokens.end)]
    }

    /// Who the tokens are.
    fn labels(&self) -> Vec<TokenId> {
        let spans = self.sequence_starts.windows(2).zip(&self.sequences);
        let of_span = |(span, &sequence): (&[u32], &u64)| {
            (span[0] as usize..span[1] as usize).map(move |token| TokenId {
                sequence,
                position: self.positions[token],
                token: self.ids[token],
            })
        };
        spans.flat_map(of_span).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn announcements_come_back() {
        let id = |sequence, position, token| TokenId { sequence, position, token };
        let labels = vec![id(7, 3, u32::MAX), id(u64::MAX, u32::MAX, 1)];
        let announcement = Announcement { identity: 1, batch: 2, tokens: 3, wanted: 4, labels };
        assert_eq!(Announcement::decode(&announcement.encode()), Some(announcement));
        assert_eq!(Announcement::decode(&[0; 24]), None);
    }

    #[test]
    fn labels_follow_the_sequences() {
        let batch = Batch {
            ids: vec![10, 11, 12],
            positions: vec![4, 5, 0],
            sequence_starts: vec![0, 2, 3],
            sequences: vec![8, 9],
            ..Batch::default()
        };
        let id = |sequence, position, token| TokenId { sequence, position, token };
        assert_eq!(batch.labels(), [id(8, 4, 10), id(8, 5, 11), id(9, 0, 12)]);
    }
}
