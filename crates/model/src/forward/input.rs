//! The batch on its way to the device.

use super::buffers::QueryBuffers;
use super::{Batch, Model, RoutingMode};
use crate::ModelError;
use crate::attention::BLOCK_SIZE;
use crate::origins::{Origins, Round, RoundRoom, Span, rounds};
use crate::step::{LayerTokens, Queries, Step, StepLayout};
use epsmoe_base::{Phase, Place};
use epsmoe_device::op::{Embed, RopeTable};
use epsmoe_device::{Backend, Buffer, DeviceError};
use epsmoe_pipeline::ExpertPipeline;
use std::ops::Range;

impl<B: Backend> Model<B> {
    /// Brings the batch to the device and looks up the embeddings of this rank's shard.
    pub(super) fn begin(&self, batch: &Batch) -> Result<Step, ModelError> {
        let (buffers, rank) = (&self.buffers, self.fabric.rank().0);
        let labelled = !matches!(self.options.routing, RoutingMode::FromRouter);
        let meets = self.experts.as_ref().is_some_and(ExpertPipeline::gathers);
        let flags = [labelled, meets];
        let layout = StepLayout::agree(&*self.fabric.control, &self.layout, self.identity, batch, flags)?;
        let blocks = self.block_tables(batch)?;
        let all = LayerTokens {
            index: None,
            queries: self.queries(batch, None, &blocks, &buffers.queries)?,
            attention: self.attention.shares(&layout.shards),
            mlp: self.mlp.shares(&layout.shards),
            known: layout.known(&layout.shards),
        };
        let shard = all.attention.of(rank);
        let index: Vec<u32> =
            batch.wanted_in(&shard).iter().map(|&token| token - shard.start as u32).collect();
        // A log of routing holds every token of every layer.
        let last = (!labelled && layout.wanted != layout.shards).then(|| -> Result<_, DeviceError> {
            Ok(LayerTokens {
                index: Some(self.upload(&index, &buffers.wanted.rows(0..index.len())?)?),
                queries: self.queries(batch, Some(&batch.logits), &blocks, &buffers.wanted_queries)?,
                attention: self.attention.shares(&layout.wanted),
                mlp: self.mlp.shares(&layout.wanted),
                known: layout.known(&layout.wanted),
            })
        });
        let ids = self.upload(&batch.ids[shard.clone()], &buffers.ids.rows(0..shard.len())?)?;
        let (table, out) = (self.embedding.clone(), buffers.stream.rows(0..shard.len())?);
        self.compute(Place::default(), Embed { ids, table, out: out.clone() })?;
        self.scale(Place::default().phase(Phase::Embed), &out, self.spec.factors.embedding)?;
        Ok(Step {
            slots: self.upload(&batch.slots, &buffers.slots.rows(0..batch.ids.len())?)?,
            blocks,
            longest: batch.longest(),
            states: self.upload(&batch.state_words(), &buffers.states.rows(0..batch.states.len())?)?,
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
        blocks: &Buffer,
        buffers: &QueryBuffers,
    ) -> Result<Queries, DeviceError> {
        let of = |which: &[u32]| -> (Vec<u32>, Vec<u32>) {
            let positions = which.iter().map(|&token| batch.positions[token as usize]);
            let before = |&start: &u32| which.partition_point(|&token| token < start) as u32;
            (positions.collect(), batch.sequence_starts.iter().map(before).collect())
        };
        let (at, starts) = which.map_or_else(|| (batch.positions.clone(), batch.sequence_starts.clone()), of);
        let rows = 0..at.len();
        let index = which.map(|which| self.upload(which, &buffers.index.rows(rows.clone())?)).transpose()?;
        let positions = self.upload(&at, &buffers.positions.rows(rows.clone())?)?;
        let mut rope_tables = Vec::with_capacity(self.spec.ropes.len());
        for ((rope, frequencies), out) in
            self.spec.ropes.iter().zip(&self.frequencies).zip(&buffers.rope_tables)
        {
            let (out, scale, growth) = (out.rows(rows.clone())?, rope.attention_factor, rope.growth);
            let (positions, frequencies) = (positions.clone(), frequencies.clone());
            let table = RopeTable { positions, frequencies, scale, growth, out: out.clone() };
            self.compute(Place::default(), table)?;
            rope_tables.push(out);
        }
        let sequence_starts = self.upload(&starts, &buffers.sequence_starts.rows(0..starts.len())?)?;
        let mut queries = Queries { index, positions, sequence_starts, rope_tables, origins: None };
        if self.spec.has_latents() {
            let starts: Vec<usize> = starts.iter().map(|&start| start as usize).collect();
            let told = self.options.tells_origins(&self.spec);
            let absorbed = if told { batch.generated } else { batch.blocks.len() };
            queries.origins = Some(Origins {
                absorbed: first_sequences(absorbed, &starts, &queries, blocks)?,
                rounds: self.rounds(batch, absorbed, &at, &starts, &queries.positions, buffers)?,
            });
        }
        Ok(queries)
    }

    /// The rounds in which queries of sequences from the `first` on attend: `at` are the positions, `starts` the first queries of
    /// each sequence.
    fn rounds(
        &self,
        batch: &Batch,
        first: usize,
        at: &[u32],
        starts: &[usize],
        positions: &Buffer,
        buffers: &QueryBuffers,
    ) -> Result<Vec<Round>, DeviceError> {
        let looking = (first..batch.blocks.len()).filter(|&b| starts[b] < starts[b + 1]);
        // Of each sequence that looks, the blocks up to the last position that is seen.
        let contexts: Vec<(usize, &[u32])> = looking
            .map(|b| (b, &batch.blocks[b][..(at[starts[b + 1] - 1] as usize + 1).div_ceil(BLOCK_SIZE)]))
            .collect();
        let lengths: Vec<usize> = contexts.iter().map(|(_, blocks)| blocks.len()).collect();
        let room = RoundRoom::of(1, self.options.max_sequences, self.options.max_blocks);
        let [mut starts_left, mut cached_left, mut blocks_left] =
            [&buffers.round_starts, &buffers.round_cached, &buffers.round_blocks].map(Buffer::clone);
        let upload = |words: &[u32], left: &mut Buffer| {
            let (taken, rest) = (left.rows(0..words.len())?, left.rows(words.len()..left.rows)?);
            *left = rest;
            self.upload(words, &taken)
        };
        let round = |round: Range<usize>| {
            let (of_round, widest) = (&contexts[round.clone()], lengths[round].iter().max());
            let (first, widest) = (starts[of_round[0].0], widest.copied().unwrap_or(0));
            let (mut own_starts, mut cached, mut blocks) = (vec![0], Vec::new(), Vec::new());
            for (b, context) in of_round {
                own_starts.push((starts[b + 1] - first) as u32);
                let own = cached.len() as u32..(cached.len() + context.len()) as u32;
                blocks.extend(own.chain(std::iter::repeat_n(0, widest - context.len())));
                cached.extend_from_slice(context);
            }
            let rows = first..first + own_starts[of_round.len()] as usize;
            let span = Span {
                positions: positions.rows(rows.clone())?,
                sequence_starts: upload(&own_starts, &mut starts_left)?,
                blocks: upload(&blocks, &mut blocks_left)?.reshape(widest)?,
                rows,
            };
            Ok(Round { span, cached: upload(&cached, &mut cached_left)? })
        };
        rounds(&lengths, room.positions / BLOCK_SIZE).into_iter().map(round).collect()
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

/// The queries of the first sequences.
fn first_sequences(
    sequences: usize,
    starts: &[usize],
    queries: &Queries,
    blocks: &Buffer,
) -> Result<Option<Span>, DeviceError> {
    let rows = 0..starts[sequences];
    let span = |rows: Range<usize>| {
        Ok(Span {
            positions: queries.positions.rows(rows.clone())?,
            sequence_starts: queries.sequence_starts.rows(0..sequences + 1)?,
            blocks: blocks.rows(0..sequences)?,
            rows,
        })
    };
    (!rows.is_empty()).then(|| span(rows)).transpose()
}
