//! Tokens that go through the layer together: all of them, a chunk, or a micro-batch.

use crate::buffers::LayerBuffers;
use epsmoe_base::{Rank, Stage};
use epsmoe_device::Buffer;
use epsmoe_plan::{Capacity, LayerHistograms, StageTable, TokenHistograms, Traffic};
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
    /// They travel, and everybody knows how many of them where.
    Travel(Box<Travel>),
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
            Rows::InPlace => None,
        }
    }

    /// What it takes up on `rank`, for layers of `top_k` experts a token.
    pub(crate) fn needed(&self, rank: Rank, top_k: usize) -> Capacity {
        match &self.rows {
            Rows::Travel(travel) => Capacity::needed(&travel.traffic, rank),
            Rows::InPlace => Capacity::in_place(self.tokens.len(), top_k),
        }
    }
}

/// The number of the batch that a stage belongs to: its own if there are several, and the only one if not.
pub(crate) fn batch_of(batches: &[Batch], stage: Stage) -> usize {
    stage.0.min(batches.len() - 1)
}
