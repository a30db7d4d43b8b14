//! Rows on their way to their experts.

use crate::batch::{Batch, Gathered, Packed, Rows, rows_sent};
use crate::buffers::LayerBuffers;
use crate::run::Call;
use crate::{ExpertPipeline, PipelineError};
use epsmoe_base::{Lane, Phase, Place, Rank, RowFormat, Stage};
use epsmoe_device::op::{CountSlots, Fp8, SendOrder, SpreadSlots};
use epsmoe_device::{Backend, Buffer};
use epsmoe_fabric::Exchange;
use epsmoe_plan::{SharedExpert, StageTable, TokenHistograms};
use std::ops::Range;

impl<B: Backend> ExpertPipeline<B> {
    /// Counts the assignments of some tokens, in histograms that the host may read after the event.
    pub(crate) fn count(
        &self,
        call: &Call<'_>,
        buffers: &LayerBuffers,
        tokens: &Range<usize>,
    ) -> Result<(), PipelineError> {
        let slots = call.layer.slots.slots();
        let count = CountSlots {
            slots: buffers.slots.rows(tokens.clone())?,
            block_starts: buffers.block_starts.rows(0..slots)?,
            counts: buffers.histograms(slots)?,
        };
        self.compute(Place::layer(call.layer.layer), count)
    }

    /// Reads what [`count`](Self::count) counted, and gathers the rows of all destinations with their metadata, in send
    /// order. Nothing may leave before it is packed: the transfer lane has to wait.
    pub(crate) fn pack(
        &self,
        call: &Call<'_>,
        buffers: LayerBuffers,
        tokens: Range<usize>,
    ) -> Result<Packed, PipelineError> {
        let (place, slots) = (Place::layer(call.layer.layer), call.layer.slots.slots());
        let counted = buffers.histograms(slots)?;
        let counts = TokenHistograms::of_counts(tokens.len(), &self.device.read_u32(&counted)?, slots)?;
        let rows = 0..rows_sent(&counts);
        if rows.end > buffers.send_rows.rows {
            // Everybody will see it in the counts, and halve their tokens.
            return Ok(Packed { tokens, buffers, counts });
        }
        let index = buffers.send_tokens.rows(rows.clone())?;
        let order = SendOrder {
            slots: buffers.slots.rows(tokens.clone())?,
            weights: buffers.slot_weights.rows(tokens.clone())?,
            block_starts: buffers.block_starts.rows(0..slots)?,
            counts: counted,
            tokens: index.clone(),
            last: buffers.send_last.rows(rows.clone())?,
            metadata: buffers.send_metadata.rows(rows.clone())?,
            sums: buffers.combine_index.rows(tokens.clone())?,
        };
        self.compute(place, order)?;
        let out = buffers.send_rows.rows(rows)?;
        let packed = [call.rows_for(&tokens, &out)?, index, out];
        self.gather_rows(place.phase(Phase::Pack), Fp8::Encode, packed)?;
        Ok(Packed { tokens, buffers, counts })
    }

    /// A batch that every rank is given all rows of, with what it needs to know of them.
    pub(crate) fn spread(
        &self,
        call: &Call<'_>,
        tokens: &Range<usize>,
        table: StageTable,
        gathered: Gathered,
    ) -> Result<Batch, PipelineError> {
        let (buffers, place) = (&self.buffers, Place::layer(call.layer.layer));
        let (x, y) = (call.x.rows(tokens.clone())?, call.y.rows(tokens.clone())?);
        let spread = SpreadSlots {
            slots: buffers.slots.rows(tokens.clone())?,
            weights: buffers.slot_weights.rows(tokens.clone())?,
            rank_starts: buffers.rank_starts.clone(),
            metadata: buffers.send_metadata.rows(0..self.fabric.size() * tokens.len())?,
            sums: buffers.combine_index.rows(tokens.clone())?,
        };
        self.compute(place, spread)?;
        if self.options.sizes.layer.wire.dispatch == RowFormat::Fp8 {
            let index = buffers.every_token.rows(0..tokens.len())?;
            let out = buffers.send_rows.rows(0..tokens.len())?;
            self.gather_rows(
                place.phase(Phase::Pack),
                Fp8::Encode,
                [call.rows_for(tokens, &out)?, index, out],
            )?;
        }
        self.device.lane_wait(Lane::Transfer, &self.device.record(Lane::Compute));
        self.run_shared_if(table.shared == SharedExpert::BesideCountExchange, call, tokens)?;
        let (tokens, buffers, rows) = (tokens.clone(), buffers.clone(), Rows::Gathered(gathered));
        Ok(Batch { tokens, x, y, buffers, table, rows })
    }

    /// The metadata of all rows of a batch in one exchange, ahead of the rows; the event says when it has arrived.
    /// Nothing travels in place.
    pub(crate) fn exchange_metadata(
        &self,
        call: &Call<'_>,
        batch: &Batch,
    ) -> Result<Option<B::Event>, PipelineError> {
        if matches!(batch.rows, Rows::InPlace) {
            return Ok(None);
        }
        let (me, place) = (self.fabric.rank(), Place::layer(call.layer.layer).phase(Phase::Metadata));
        let ends = [&batch.buffers.send_metadata, &batch.buffers.received_metadata];
        self.exchange(place, "metadata", ends, |rank| batch.rows.of_metadata(me, rank))?;
        Ok(Some(self.device.record(Lane::Transfer)))
    }

    /// The rows of one stage, from every rank to every rank; the event says when they have arrived. Nothing travels in
    /// place.
    pub(crate) fn dispatch(
        &self,
        call: &Call<'_>,
        batch: &Batch,
        stage: Stage,
    ) -> Result<Option<B::Event>, PipelineError> {
        let from = match (&batch.rows, self.options.sizes.layer.wire.dispatch) {
            (Rows::InPlace, _) => return Ok(None),
            // Every rank gets them as they are: nothing is packed.
            (Rows::Gathered(_), RowFormat::Plain(_)) => &batch.x,
            _ => &batch.buffers.send_rows,
        };
        let place = Place::layer(call.layer.layer).stage(stage).phase(Phase::Dispatch);
        let (me, ends) = (self.fabric.rank(), [from, &batch.buffers.received_rows]);
        self.exchange(place, "dispatch", ends, |rank| batch.rows.of_dispatch(me, rank, stage))?;
        Ok(Some(self.device.record(Lane::Transfer)))
    }

    /// One exchange on the transfer lane between the ranks' buffers of one kind: `rows` says which of the first leave for a
    /// rank, and to which of the second its own come.
    pub(crate) fn exchange(
        &self,
        place: Place,
        name: &'static str,
        [from, to]: [&Buffer; 2],
        rows: impl Fn(Rank) -> [Range<usize>; 2],
    ) -> Result<(), PipelineError> {
        let (mut send, mut receive) = (Vec::new(), Vec::new());
        for rank in (0..self.fabric.size()).map(Rank) {
            let [leaving, coming] = rows(rank);
            send.push(from.rows(leaving)?);
            receive.push(to.rows(coming)?);
        }
        let exchange = Exchange { name, send, receive };
        Ok(self.fabric.transport.all_to_all_v(&self.device, Lane::Transfer, place, exchange)?)
    }
}
