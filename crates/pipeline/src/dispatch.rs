//! Rows on their way to their experts.

use crate::buffers::LayerBuffers;
use crate::rendezvous::Plan;
use crate::run::MoeLayer;
use crate::{ExpertPipeline, PipelineError};
use epsmoe_base::{Lane, Phase, Place, Rank, Stage};
use epsmoe_device::op::{Gather, HostToDevice};
use epsmoe_device::{Backend, Buffer, DeviceError};
use epsmoe_fabric::Exchange;
use epsmoe_plan::{HomeMap, Routing, SendMap, TokenHistograms};

/// What a rank sends, known before the rendezvous: the send order does not depend on the cuts.
pub(crate) struct Outgoing {
    pub(crate) counts: TokenHistograms,
    pub(crate) home: HomeMap,
}

impl<B: Backend> ExpertPipeline<B> {
    /// Gathers the rows of all destinations, in send order, and their metadata records. Nothing may leave before it is
    /// packed: the transfer lane has to wait.
    pub(crate) fn pack(
        &self,
        layer: &MoeLayer,
        buffers: &LayerBuffers,
        routing: &Routing,
        x: &Buffer,
    ) -> Result<Outgoing, PipelineError> {
        let place = Place::layer(layer.layer).phase(Phase::Pack);
        let counts = TokenHistograms::of(&self.options.placement, routing);
        let send = SendMap::of(&self.options.placement, routing, &counts);
        let home = HomeMap::of(&send, &counts);
        let rows = 0..send.tokens.len();
        if rows.end > buffers.send_rows.rows {
            // Everybody will see it in the counts, and halve their tokens.
            return Ok(Outgoing { counts, home });
        }
        let (index, records) =
            (buffers.send_index.rows(rows.clone())?, buffers.send_records.rows(rows.clone())?);
        self.compute(place, HostToDevice { words: send.tokens.into(), out: index.clone() })?;
        self.compute(place, Gather { x: x.clone(), index, out: buffers.send_rows.rows(rows)? })?;
        self.compute(place, HostToDevice { words: send.records.into(), out: records })?;
        Ok(Outgoing { counts, home })
    }

    /// All metadata records in one exchange, ahead of the rows; the event says when they have arrived.
    pub(crate) fn exchange_metadata(
        &self,
        layer: &MoeLayer,
        buffers: &LayerBuffers,
        plan: &Plan,
    ) -> Result<B::Event, PipelineError> {
        let me = self.fabric.rank();
        self.exchange(
            Place::layer(layer.layer).phase(Phase::Metadata),
            "metadata",
            |rank| buffers.send_records.rows(plan.traffic.send_rows(me, rank)),
            |rank| buffers.received_records.rows(plan.traffic.record_rows(me, rank)),
        )?;
        Ok(self.device.record(Lane::Transfer))
    }

    /// The rows of one stage, from every rank to every rank.
    pub(crate) fn dispatch(
        &self,
        layer: &MoeLayer,
        buffers: &LayerBuffers,
        plan: &Plan,
        stage: Stage,
    ) -> Result<(), PipelineError> {
        let me = self.fabric.rank();
        self.exchange(
            Place::layer(layer.layer).stage(stage).phase(Phase::Dispatch),
            "dispatch",
            |rank| buffers.send_rows.rows(plan.traffic.send_range(me, rank, stage)),
            |rank| buffers.received_rows.rows(plan.traffic.receive_range(me, stage, rank)),
        )
    }

    /// One exchange on the transfer lane, from and to one view per rank.
    pub(crate) fn exchange(
        &self,
        place: Place,
        name: &'static str,
        send: impl Fn(Rank) -> Result<Buffer, DeviceError>,
        receive: impl Fn(Rank) -> Result<Buffer, DeviceError>,
    ) -> Result<(), PipelineError> {
        let ranks = || self.options.placement.all_ranks();
        let (send, receive) =
            (ranks().map(send).collect::<Result<_, _>>()?, ranks().map(receive).collect::<Result<_, _>>()?);
        let exchange = Exchange { name, send, receive };
        Ok(self.fabric.transport.all_to_all_v(&self.device, Lane::Transfer, place, exchange)?)
    }
}
