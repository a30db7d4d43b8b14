//! The batch on its way to the device.

use super::buffers::QueryBuffers;
use super::{Batch, Model, RoutingMode};
use crate::ModelError;
use crate::step::{LayerTokens, Queries, Step, StepLayout};
use epsmoe_base::{Phase, Place};
use epsmoe_device::op::{Embed, RopeTable};
use epsmoe_device::{Backend, Buffer, DeviceError};

impl<B: Backend> Model<B> {
    /// Brings the batch to the device and looks up the embeddings of this rank's shard.
    pub(super) fn begin(&self, batch: &Batch) -> Result<Step, ModelError> {
        let (buffers, rank) = (&self.buffers, self.fabric.rank().0);
        let labelled = !matches!(self.options.routing, RoutingMode::FromRouter);
        let layout = StepLayout::agree(&*self.fabric.control, &self.layout, self.identity, batch, labelled)?;
        let all = LayerTokens {
            index: None,
            queries: self.queries(batch, None, &buffers.queries)?,
            attention: self.attention.shares(&layout.shards),
            mlp: self.mlp.shares(&layout.shards),
        };
        let shard = all.attention.of(rank);
        let index: Vec<u32> =
            batch.wanted_in(&shard).iter().map(|&token| token - shard.start as u32).collect();
        // A log of routing holds every token of every layer.
        let last = (!labelled && layout.wanted != layout.shards).then(|| -> Result<_, DeviceError> {
            Ok(LayerTokens {
                index: Some(self.upload(&index, &buffers.wanted.rows(0..index.len())?)?),
                queries: self.queries(batch, Some(&batch.logits), &buffers.wanted_queries)?,
                attention: self.attention.shares(&layout.wanted),
                mlp: self.mlp.shares(&layout.wanted),
            })
        });
        let ids = self.upload(&batch.ids[shard.clone()], &buffers.ids.rows(0..shard.len())?)?;
        let (table, out) = (self.embedding.clone(), buffers.stream.rows(0..shard.len())?);
        self.compute(Place::default(), Embed { ids, table, out: out.clone() })?;
        self.scale(Place::default().phase(Phase::Embed), &out, self.spec.factors.embedding)?;
        Ok(Step {
            slots: self.upload(&batch.slots, &buffers.slots.rows(0..batch.ids.len())?)?,
            blocks: self.block_tables(batch)?,
            longest: batch.longest(),
            states: self.upload(&batch.states.concat(), &buffers.states.rows(0..batch.states.len())?)?,
            routed: layout.labels(self.mlp.ranks()),
            // Ranks that split every expert have the same tokens: one of them counts.
            count_experts: batch.count_experts && self.layout.mlp_ranks().start == rank,
            last: last.transpose()?,
            wanted: self.attention.shares(&layout.wanted),
            index,
            all,
        })
    }

    /// What attention needs to know of the tokens `which` of the batch, or of all.
    fn queries(
        &self,
        batch: &Batch,
        which: Option<&[u32]>,
        buffers: &QueryBuffers,
    ) -> Result<Queries, DeviceError> {
        let of = |which: &[u32]| -> (Vec<u32>, Vec<u32>) {
            let positions = which.iter().map(|&token| batch.positions[token as usize]);
            let before = |&start: &u32| which.partition_point(|&token| token < start) as u32;
            (positions.collect(), batch.sequence_starts.iter().map(before).collect())
        };
        let (positions, starts) =
            which.map_or_else(|| (batch.positions.clone(), batch.sequence_starts.clone()), of);
        let rows = 0..positions.len();
        let index = which.map(|which| self.upload(which, &buffers.index.rows(rows.clone())?)).transpose()?;
        let positions = self.upload(&positions, &buffers.positions.rows(rows.clone())?)?;
        let mut rope_tables = Vec::with_capacity(self.spec.ropes.len());
        for ((rope, frequencies), out) in
            self.spec.ropes.iter().zip(&self.frequencies).zip(&buffers.rope_tables)
        {
            let (out, scale) = (out.rows(rows.clone())?, rope.attention_factor);
            let (positions, frequencies) = (positions.clone(), frequencies.clone());
            self.compute(Place::default(), RopeTable { positions, frequencies, scale, out: out.clone() })?;
            rope_tables.push(out);
        }
        let sequence_starts = self.upload(&starts, &buffers.sequence_starts.rows(0..starts.len())?)?;
        Ok(Queries { index, positions, sequence_starts, rope_tables })
    }

    /// The cache blocks of each sequence, in rows of one length.
    fn block_tables(&self, batch: &Batch) -> Result<Buffer, DeviceError> {
        let (buffer, sequences) = (&self.buffers.blocks, batch.blocks.len());
        let mut blocks = vec![0; sequences * buffer.width];
        for (row, sequence) in blocks.chunks_exact_mut(buffer.width).zip(&batch.blocks) {
            row[..sequence.len()].copy_from_slice(sequence);
        }
        self.upload(&blocks, &buffer.rows(0..sequences)?)
    }
}
