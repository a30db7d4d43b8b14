//! Rows on their way to their experts.

use crate::batch::{Batch, Packed, Rows, rows_sent};
use crate::buffers::LayerBuffers;
use crate::run::Call;
use crate::{ExpertPipeline, PipelineError};
use epsmoe_base::{Lane, Phase, Place, Rank, Stage};
use epsmoe_device::op::{CountSlots, Fp8, SendOrder};
use epsmoe_device::{Backend, Buffer, DeviceError};
use epsmoe_fabric::Exchange;
use epsmoe_plan::TokenHistograms;
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
        let x = call.x.rows(tokens.clone())?;
        let packed = [x, index, buffers.send_rows.rows(rows)?];
        self.gather_rows(place.phase(Phase::Pack), Fp8::Encode, packed)?;
        Ok(Packed { tokens, buffers, counts })
    }

    /// The metadata of all rows of a batch in one exchange, ahead of the rows; the event says when it has arrived.
    /// Nothing travels in place.
    pub(crate) fn exchange_metadata(
        &self,
        call: &Call<'_>,
        batch: &Batch,
    ) -> Result<Option<B::Event>, PipelineError> {
        let Rows::Travel(travel) = &batch.rows else { return Ok(None) };
        let (me, traffic, buffers) = (self.fabric.rank(), &travel.traffic, &batch.buffers);
        self.exchange(
            Place::layer(call.layer.layer).phase(Phase::Metadata),
            "metadata",
            |rank| buffers.send_metadata.rows(traffic.dispatch_send_all(me, rank)),
            |rank| buffers.received_metadata.rows(traffic.metadata_receive(me, rank)),
        )?;
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
        let Rows::Travel(travel) = &batch.rows else { return Ok(None) };
        let (me, traffic, buffers) = (self.fabric.rank(), &travel.traffic, &batch.buffers);
        self.exchange(
            Place::layer(call.layer.layer).stage(stage).phase(Phase::Dispatch),
            "dispatch",
            |rank| buffers.send_rows.rows(traffic.dispatch_send(me, rank, stage)),
            |rank| buffers.received_rows.rows(traffic.dispatch_receive(me, stage, rank)),
        )?;
        Ok(Some(self.device.record(Lane::Transfer)))
    }

    /// One exchange on the transfer lane, from and to one view per rank.
    pub(crate) fn exchange(
        &self,
        place: Place,
        name: &'static str,
        send: impl Fn(Rank) -> Result<Buffer, DeviceError>,
        receive: impl Fn(Rank) -> Result<Buffer, DeviceError>,
    ) -> Result<(), PipelineError> {
        let ranks = || (0..self.fabric.size()).map(Rank);
        let (send, receive) =
            (ranks().map(send).collect::<Result<_, _>>()?, ranks().map(receive).collect::<Result<_, _>>()?);
        let exchange = Exchange { name, send, receive };
        Ok(self.fabric.transport.all_to_all_v(&self.device, Lane::Transfer, place, exchange)?)
    }
}
