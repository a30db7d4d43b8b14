//! The experts of one MoE layer under every schedule.

use crate::{AdviseError, Advisor, DTYPE, Experts, MARGIN, Running, Strategy, text};
use epsmoe_base::Rank;
use epsmoe_plan::{
    Capacity, Choice, CostModel, GemmKind, HostCost, LayerBytes, LayerHistograms, LayerSizes, LinkCost,
    Piecewise, SearchOptions, SharedExpert, SlotMap, StageTable, SyntheticRouting, Traffic, Workload,
    predict_ns, search,
};

impl Advisor<'_> {
    /// Inner width of all shared experts together; 0 without.
    fn shared_inner(&self) -> usize {
        self.moe.shared.map_or(0, |shared| shared.inner)
    }

    fn law(&self) -> SyntheticRouting {
        let (router, load) = (&self.moe.router, self.load);
        SyntheticRouting {
            top_k: self.moe.computed(),
            groups: router.groups.map(|limit| (limit.groups, limit.kept)),
            zipf_permille: load.zipf_permille,
            seed: load.seed,
        }
    }

    fn sizes(&self, map: &SlotMap, inner: usize, shared_inner: usize) -> LayerSizes {
        let load = self.load;
        let (hidden, top_k, wire) = (self.model.hidden, self.moe.computed(), load.wire());
        let weights = load.weights.experts;
        LayerSizes { hidden, inner, shared_inner, top_k, wire, weights, ..LayerSizes::of(map, DTYPE) }
    }

    /// Every expert on one GPU: one search or table for each schedule.
    pub(crate) fn parallel(&self, strategy: Strategy) -> Result<Vec<(Running, Experts)>, AdviseError> {
        let (moe, load, ranks) = (self.moe, self.load, self.machine.ranks);
        let map = SlotMap::contiguous(moe.experts, ranks)?;
        let share = |all: usize, rank: usize| all / ranks + usize::from(rank < all % ranks);
        let of_rank = |rank| match strategy.attention_split() {
            // Tokens are scattered, wherever their sequences end.
            true => share(load.tokens(), rank),
            false => share(load.batch, rank) * load.sequence,
        };
        let tokens: Vec<usize> = (0..ranks).map(of_rank).collect();
        let counts = self.law().counts(&map, &tokens)?;
        let shape = self.sizes(&map, moe.inner, self.shared_inner());
        let workload = Workload { map: &map, counts: &counts, shape: &shape };
        let serial = StageTable::serial(&map, GemmKind::Grouped);
        let serial_ns = predict_ns(&serial, &workload, &self.cost);
        let mut all = vec![(Running::Serial, self.measured(&workload, &serial, serial_ns, None))];
        let most = SearchOptions::default().max_stages;
        for (running, min_stages, max_stages) in
            [(Running::Kernel, 1, 1), (Running::Staged, load.stages, load.stages), (Running::Auto, 1, most)]
        {
            let options =
                SearchOptions { min_stages, max_stages, margin: MARGIN, ..SearchOptions::default() };
            let Choice { table, predicted, .. } = &search(&workload, &self.cost, &options);
            let text = (running == Running::Auto).then(|| text::short(table, ranks));
            all.push((running, self.measured(&workload, table, predicted.layer_ns, text)));
        }
        Ok(all)
    }

    fn measured(
        &self,
        workload: &Workload<'_>,
        table: &StageTable,
        ns: u64,
        explanation: Option<String>,
    ) -> Experts {
        let traffic = Traffic::of(workload.map, workload.counts, table);
        let ranks = || workload.map.all_ranks();
        let LayerSizes { hidden, wire, .. } = *workload.shape;
        let row_bytes = (wire.dispatch.bytes(hidden) + wire.combine.bytes(hidden)) as u64;
        let rows = |from: Rank, to: Rank| {
            if from == to { 0 } else { traffic.dispatch_send_all(from, to).len() as u64 }
        };
        let moved = |rank: Rank| {
            let (out, back): (u64, u64) =
                (ranks().map(|other| rows(rank, other)).sum(), ranks().map(|other| rows(other, rank)).sum());
            out.max(back) * row_bytes
        };
        let buffers = |rank| LayerBytes::of(workload.shape, &Capacity::needed(&traffic, rank)).total();
        Experts {
            stages: table.stages(),
            ns,
            moved: ranks().map(moved).max().unwrap_or(0),
            buffers: ranks().map(buffers).max().unwrap_or(0),
            explanation,
        }
    }

    /// Every expert split over all GPUs: each sees all tokens, and nobody waits for anybody inside the layer.
    pub(crate) fn split(&self) -> Result<Vec<(Running, Experts)>, AdviseError> {
        let (moe, load, ranks) = (self.moe, self.load, self.machine.ranks);
        let map = SlotMap::contiguous(moe.experts, 1)?;
        let counts: LayerHistograms = self.law().counts(&map, &[load.tokens()])?;
        let shape = self.sizes(&map, moe.inner.div_ceil(ranks), self.shared_inner().div_ceil(ranks));
        let workload = Workload { map: &map, counts: &counts, shape: &shape };
        let none = || Piecewise::flat(0);
        let cost = CostModel {
            link: LinkCost { exchange_ns: 0, node_ranks: 0, near: none(), far: none(), copy: none() },
            host: HostCost::default(),
            ..self.cost.clone()
        };
        let of = |kind| {
            let table = StageTable { shared: SharedExpert::Serial, ..StageTable::serial(&map, kind) };
            let ns = predict_ns(&table, &workload, &cost);
            self.measured(&workload, &table, ns, None)
        };
        let (grouped, dense) = (of(GemmKind::Grouped), of(GemmKind::Dense));
        let better = if dense.ns < grouped.ns { dense } else { of(GemmKind::Grouped) };
        Ok(vec![(Running::Serial, grouped), (Running::Kernel, better)])
    }
}
