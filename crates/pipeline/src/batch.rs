//! Tokens that go through the layer together: all of them, a chunk, or a micro-batch.

use crate::buffers::LayerBuffers;
use epsmoe_base::{Rank, Stage};
use epsmoe_device::Buffer;
use epsmoe_plan::{Capacity, LayerHistograms, LayerSizes, StageTable, TokenHistograms, Traffic};
use std::ops::Range;

/// A batch whose plan is known.
pub(crate) struct Batch {
    /// Which tokens.
    pub(crate) tokens: Range<usize>,
    /// Their rows of the layer's input and output.
    pub(crate) x: Buffer,
    pub(crate) y: Buffer,
    /// Its part of the layer's memory.
    pub(crate) buffers: LayerBuffers,
    pub(crate) table: StageTable,
    pub(crate) rows: Rows,
}

/// Where the rows of a batch are while its experts compute.
pub(crate) enum Rows {
    /// With their rank, the only one: the tokens themselves. How many assignments a slot has only the device knows.
    InPlace,
    /// Every rank has those of all. How many tokens each has everybody knew; how many assignments a slot has only the
    /// devices know.
    Gathered(Gathered),
    /// They travel, and everybody knows how many of them where.
    Travel(Box<Travel>),
}

impl Rows {
    /// Which rows of metadata rank `me` sends to `rank`, and to which of its own those of `rank` come.
    pub(crate) fn of_metadata(&self, me: Rank, rank: Rank) -> [Range<usize>; 2] {
        match self {
            Rows::InPlace => [0..0, 0..0],
            Rows::Gathered(gathered) => [gathered.block(me, rank), gathered.of(rank)],
            Rows::Travel(travel) => {
                [travel.traffic.dispatch_send_all(me, rank), travel.traffic.metadata_receive(me, rank)]
            }
        }
    }

    /// The same of the rows of a stage.
    pub(crate) fn of_dispatch(&self, me: Rank, rank: Rank, stage: Stage) -> [Range<usize>; 2] {
        match self {
            Rows::InPlace => [0..0, 0..0],
            Rows::Gathered(gathered) => [0..gathered.of(me).len(), gathered.of(rank)],
            Rows::Travel(travel) => [
                travel.traffic.dispatch_send(me, rank, stage),
                travel.traffic.dispatch_receive(me, stage, rank),
            ],
        }
    }

    /// The same of the sums that a stage completes.
    pub(crate) fn of_combine(&self, me: Rank, rank: Rank, stage: Stage) -> [Range<usize>; 2] {
        match self {
            Rows::InPlace => [0..0, 0..0],
            Rows::Gathered(gathered) => [gathered.of(rank), gathered.block(me, rank)],
            Rows::Travel(travel) => [
                travel.traffic.combine_send(me, stage, rank),
                travel.traffic.combine_receive(me, rank, stage),
            ],
        }
    }

    /// How many sums come back to rank `me`.
    pub(crate) fn sums(&self, me: Rank) -> usize {
        match self {
            Rows::InPlace => 0,
            Rows::Gathered(gathered) => gathered.ranks() * gathered.of(me).len(),
            Rows::Travel(travel) => travel.traffic.rows_sent(me),
        }
    }
}

/// Where the tokens of every rank are among those of all.
pub(crate) struct Gathered {
    /// `[R + 1]`
    starts: Vec<usize>,
}

impl Gathered {
    pub(crate) fn new(tokens: &[usize]) -> Self {
        let mut end = 0;
        let ends = tokens.iter().map(|tokens| {
            end += tokens;
            end
        });
        Gathered { starts: std::iter::once(0).chain(ends).collect() }
    }

    pub(crate) fn of(&self, rank: Rank) -> Range<usize> {
        self.starts[rank.0]..self.starts[rank.0 + 1]
    }

    pub(crate) fn all(&self) -> Range<usize> {
        0..self.starts[self.starts.len() - 1]
    }

    /// Where the tokens of `me` are among what it tells every rank of them and gets back from it.
    fn block(&self, me: Rank, rank: Rank) -> Range<usize> {
        let tokens = self.of(me).len();
        rank.0 * tokens..(rank.0 + 1) * tokens
    }

    fn ranks(&self) -> usize {
        self.starts.len() - 1
    }
}

/// Rows that travel: what all ranks know about them.
pub(crate) struct Travel {
    pub(crate) counts: LayerHistograms,
    pub(crate) traffic: Traffic,
}

/// A batch that is packed, before anybody else's counts are known.
pub(crate) struct Packed {
    pub(crate) tokens: Range<usize>,
    pub(crate) buffers: LayerBuffers,
    pub(crate) counts: TokenHistograms,
}

impl Packed {
    /// What it takes up on the rank that sends it.
    pub(crate) fn sent(&self) -> Capacity {
        let rows_sent = rows_sent(&self.counts);
        Capacity { tokens: self.tokens.len(), rows_sent, ..Capacity::default() }
    }
}

/// Rows that a rank with such counts sends.
pub(crate) fn rows_sent(counts: &TokenHistograms) -> usize {
    counts.first.iter().map(|&rows| rows as usize).sum()
}

impl Batch {
    /// How many of its rows go where, if they travel.
    pub(crate) fn traffic(&self) -> Option<&Traffic> {
        match &self.rows {
            Rows::Travel(travel) => Some(&travel.traffic),
            Rows::InPlace | Rows::Gathered(_) => None,
        }
    }

    /// What it takes up on `rank`.
    pub(crate) fn needed(&self, rank: Rank, sizes: &LayerSizes) -> Capacity {
        match &self.rows {
            Rows::Travel(travel) => Capacity::needed(&travel.traffic, rank),
            Rows::Gathered(gathered) => {
                let (tokens, rows_received) = (self.tokens.len(), gathered.all().end);
                let assignments = rows_received * sizes.slots_of_row();
                let gathered = Capacity::gathered(tokens, sizes);
                Capacity { rows_received, assignments, stage_assignments: assignments, ..gathered }
            }
            Rows::InPlace => Capacity::in_place(self.tokens.len(), sizes.top_k),
        }
    }
}

/// The number of the batch that a stage belongs to: its own if there are several, and the only one if not.
pub(crate) fn batch_of(batches: &[Batch], stage: Stage) -> usize {
    stage.0.min(batches.len() - 1)
}
