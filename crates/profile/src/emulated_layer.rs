//! MoE layers of one rank of a world whose other ranks are not there: whole schedules on one processor, with the counts
//! and the traffic of all ranks, paced to a link.

use crate::RigShape;
use crate::layer_rig::{RankHost, capacity};
use crate::rig_rank::RigRank;
use epsmoe_base::{DType, Deadline, FaultCell, Lane, Layer, Rank, WireDType, WireFormat};
use epsmoe_device::op::TopKRouter;
use epsmoe_device::{Backend, Buffer, PeerQueue};
use epsmoe_fabric::{EmulatedOptions, Fabric, Link, Pacing};
use epsmoe_pipeline::{
    ExpertPipeline, MoeLayer, PipelineError, PipelineOptions, PipelineSizes, RoutedPeers, take_spans,
};
use epsmoe_plan::{
    Capacity, GemmKind, LayerHistograms, LayerSizes, Policy, Routing, Schedule, ScheduleReport, SlotMap,
    StageTable, Timeline, Traffic,
};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// What is emulated.
#[derive(Clone)]
pub struct EmulatedShape {
    /// Widths.
    pub shape: RigShape,
    /// How router logits become experts.
    pub router: TopKRouter,
    /// The rank that is there.
    pub rank: Rank,
    /// Ranks of the world.
    pub size: usize,
    /// Tokens of every rank.
    pub tokens: usize,
    /// What rows travel to their experts in.
    pub wire: WireDType,
    /// The longest wait.
    pub timeout: Duration,
    /// The world's birth, which the processor's times count from.
    pub epoch: Instant,
}

impl EmulatedShape {
    /// What prices its layers, with experts where `map` has them, in numbers of `dtype`.
    pub fn layer(&self, map: &SlotMap, dtype: DType) -> LayerSizes {
        LayerSizes { wire: WireFormat::of(self.wire, dtype), ..self.shape.layer(map, dtype) }
    }

    /// Bytes of the weights that are made up: the rank's experts, router and shared expert, of as many layers as no cache
    /// holds.
    pub fn weight_bytes(&self, dtype: DType) -> u64 {
        let RigShape { hidden, experts, shared_inner, .. } = self.shape;
        let experts_and_router =
            self.shape.bytes(dtype).div_ceil(self.size) + hidden * experts * dtype.bytes();
        let layer = experts_and_router + 3 * hidden * shared_inner * dtype.bytes();
        (layer * self.weight_sets(dtype)) as u64
    }

    /// Layers with weights of their own.
    fn weight_sets(&self, dtype: DType) -> usize {
        let bytes = self.shape.bytes(dtype) / self.size;
        WEIGHT_BYTES.div_ceil(bytes.max(1)).clamp(1, LAYERS)
    }
}

/// The layers of the rank: its weights, its tokens, and where those of all ranks go.
pub struct EmulatedLayers<B: Backend> {
    what: EmulatedShape,
    rank: RigRank<B>,
    layers: Vec<MoeLayer>,
    x: Buffer,
    y: Buffer,
    /// `[layer][rank]`
    routings: Vec<Vec<Routing>>,
    /// Whose buffers all schedules share.
    pipeline: ExpertPipeline<B>,
}

/// Layers that follow each other in a round that is recorded.
const LAYERS: usize = 4;

/// Weights that layers walk through come to this many bytes, so that no cache holds them.
const WEIGHT_BYTES: usize = 512 << 20;

/// Some layers, one after the other.
#[derive(Clone, Debug, Default)]
pub struct EmulatedRound {
    /// From the first operation's enqueueing to the last one's end, by the host's clock.
    pub time: Duration,
    /// Layers that ran.
    pub layers: usize,
    /// What ran when, if that was recorded.
    pub timeline: Timeline,
    /// The last layer's tables.
    pub tables: Vec<StageTable>,
    /// The last layer's host.
    pub host: RankHost,
}

impl<B: Backend<Queue: PeerQueue>> EmulatedLayers<B> {
    /// Makes up weights and the tokens of all ranks, and routes them by the layers' routers.
    pub fn new(what: EmulatedShape, device: Arc<B>) -> Result<Self, PipelineError> {
        let EmulatedShape { shape, router, size, tokens, .. } = what.clone();
        let map = Arc::new(SlotMap::contiguous(shape.experts, size)?);
        let rank = RigRank { shape, router, map: Arc::clone(&map), device };
        let sets = what.weight_sets(rank.device.dtype());
        let sets = (0..sets).map(|set| rank.load(set)).collect::<Result<Vec<_>, _>>()?;
        let layers = sets.iter().cycle().zip(0..LAYERS);
        let layers: Vec<MoeLayer> =
            layers.map(|(set, layer)| MoeLayer { layer: Layer(layer), ..set.clone() }).collect();
        let rows = || rank.device.allocate("x", rank.device.dtype(), tokens, shape.hidden);
        let (x, y) = (rows()?, rows()?);
        let routings = route(&what, &rank, &layers, &x)?;
        let room = capacity(&map, shape.top_k, &routings)?;
        let pipeline = pipeline(&what, &rank, room)?;
        Ok(EmulatedLayers { what, rank, layers, x, y, routings, pipeline })
    }

    /// Where experts live.
    pub fn slot_map(&self) -> &Arc<SlotMap> {
        &self.rank.map
    }

    /// What prices their work.
    pub fn sizes(&self) -> LayerSizes {
        self.what.layer(self.slot_map(), self.rank.device.dtype())
    }

    /// How many tokens of every rank go where, in the first layer.
    pub fn counts(&self) -> Result<LayerHistograms, PipelineError> {
        Ok(LayerHistograms::of_routings(self.slot_map(), self.what.shape.top_k, &self.routings[0])?)
    }

    /// Rows that the rank sends to others in the first layer, and rows that come from them.
    pub fn traffic(&self) -> Result<(usize, usize), PipelineError> {
        let (map, me) = (self.slot_map(), self.what.rank);
        let traffic = Traffic::of(map, &self.counts()?, &StageTable::serial(map, GemmKind::default()));
        let own = traffic.dispatch_send_all(me, me).len();
        Ok((traffic.rows_sent(me) - own, traffic.rows_received(me) - own))
    }

    /// The rank among its peers, over a link.
    pub fn fabric(&self, link: Option<Link>, faults: &FaultCell) -> Fabric<B> {
        let EmulatedShape { rank, size, timeout, .. } = self.what;
        let peers = RoutedPeers::new(rank);
        for (layer, routings) in self.layers.iter().zip(&self.routings) {
            peers.learn(layer.layer, &self.rank.map, routings.clone());
        }
        let (faults, peers) = (faults.clone(), Arc::new(peers));
        Fabric::emulated(EmulatedOptions { rank, size, link, timeout, faults, peers })
    }

    /// A way to run the layers, over a fabric that [`fabric`](Self::fabric) made.
    pub fn schedule(
        &self,
        policy: Policy,
        fabric: &Fabric<B>,
    ) -> Result<EmulatedSchedule<'_, B>, PipelineError> {
        let pipeline = self.pipeline.sharing(policy, fabric.clone())?;
        Ok(EmulatedSchedule { layers: self, pipeline, fabric: fabric.clone() })
    }
}

/// `[layer][rank]` where the tokens of all ranks go; this rank's come last, and stay in `x`.
fn route<B: Backend>(
    what: &EmulatedShape,
    rank: &RigRank<B>,
    layers: &[MoeLayer],
    x: &Buffer,
) -> Result<Vec<Vec<Routing>>, PipelineError> {
    let one = LayerSizes { top_k: what.shape.top_k, ..LayerSizes::of(&rank.map, rank.device.dtype()) };
    let room = Capacity { tokens: what.tokens, ..Capacity::worst_case(1, &one) };
    let pipeline = pipeline(what, rank, room)?;
    let mut all = vec![vec![None; what.size]; layers.len()];
    let others = (0..what.size).filter(|&number| number != what.rank.0);
    for number in others.chain([what.rank.0]) {
        rank.fill(x, &format!("of rank {number}"), what.tokens)?;
        for (layer, routings) in layers.iter().zip(&mut all) {
            routings[number] = Some(pipeline.route(layer, x)?);
        }
    }
    Ok(all.into_iter().map(|routings| routings.into_iter().flatten().collect()).collect())
}

/// Buffers of the rank's layers, with room for what there is.
fn pipeline<B: Backend>(
    what: &EmulatedShape,
    rank: &RigRank<B>,
    capacity: Capacity,
) -> Result<ExpertPipeline<B>, PipelineError> {
    let layer = what.layer(&rank.map, rank.device.dtype());
    let policy = Policy { schedule: Schedule::TwoBatch, ..Policy::default() };
    let sizes = PipelineSizes { layer, capacity };
    let options = PipelineOptions { policy, sizes, gather_tokens: 0, identity: 0, timeout: what.timeout };
    ExpertPipeline::new(Arc::clone(&rank.device), Fabric::single_rank(), options)
}

/// One way to run the layers.
pub struct EmulatedSchedule<'a, B: Backend> {
    layers: &'a EmulatedLayers<B>,
    pipeline: ExpertPipeline<B>,
    fabric: Fabric<B>,
}

impl<B: Backend> EmulatedSchedule<'_, B> {
    /// Runs so many layers, one after the other, as a model does. Of a recorded round, which has each layer once, an auto
    /// schedule learns.
    pub fn run(
        &self,
        layers: usize,
        table: Option<&StageTable>,
        recorded: bool,
    ) -> Result<EmulatedRound, PipelineError> {
        let EmulatedLayers { what, rank, layers: all, x, y, .. } = self.layers;
        let layers = if recorded { layers.min(all.len()) } else { layers };
        rank.device.set_recording(recorded);
        self.pipeline.set_recorded(recorded);
        take_spans(&*rank.device);
        let mut round = EmulatedRound { layers, ..EmulatedRound::default() };
        let begun = Instant::now();
        for layer in all.iter().cycle().take(layers) {
            let report = match table {
                Some(table) => self.pipeline.run_table(layer, None, table, x, y)?,
                None => self.pipeline.run(layer, None, x, y)?,
            };
            (round.tables, round.host) = (report.tables, RankHost::since(what.epoch, report.host));
        }
        rank.device.wait(&rank.device.record(Lane::Compute), Deadline::behind(what.timeout))?;
        round.time = begun.elapsed();
        if recorded {
            round.timeline.spans = take_spans(&*rank.device);
            self.pipeline.observe(&round.timeline.spans);
        }
        Ok(round)
    }

    /// How well the link's times were kept since this was last asked.
    pub fn take_pacing(&self) -> Pacing {
        self.fabric.link.as_ref().map(|link| link.take_pacing()).unwrap_or_default()
    }

    /// How layers were planned, if the schedule is auto.
    pub fn report(&self) -> Option<ScheduleReport> {
        self.pipeline.report()
    }
}
