//! Where to cut a rank's experts, by predicted time: a dynamic programme small enough to run in every layer.
//!
//! Under the row rule the first dispatch and the last combine are the big ones, and nothing hides them, so equal
//! stages are rarely best. For every rank on its own, the programme places stage after stage and follows both lanes
//! in the default transfer order:
//!
//! ```text
//! transfer   d0   d1   c0   d2   c1  …      t: free after c(s-2) and d(s)
//! compute         s0   s1   s2       …      k: free after stage s
//! ```
//!
//! A partial plan that ends at expert b is worth the larger of two bounds on its end: compute time still to come
//! after k, and transfer time still to come after t. Of all partial plans with as many stages and the same end, the
//! best by that bound survives.

use crate::{CostModel, GemmKind, LayerSizes, MOST_NS, Payload, Product, TileCost, Transfer, Workload};
use epsmoe_base::Rank;

/// Predicted times of one rank's experts as running sums, so that a stage's time is a subtraction.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Loads {
    /// `[L + 1]` ns of the dispatches, of the combines, without their start cost.
    dispatch: Vec<u64>,
    combine: Vec<u64>,
    /// Start cost of an exchange.
    start: u64,
    /// `[L + 1]` ns of expand, products and reduce, by kernel, without the cost per operation.
    grouped: Vec<u64>,
    dense: Vec<u64>,
    /// Of a grouped stage besides its experts.
    stage: u64,
    /// Of a dense stage besides its experts.
    dense_stage: u64,
}

impl Loads {
    /// Of every rank, where so many permille of the processor are left to transfers.
    pub(crate) fn of(workload: &Workload<'_>, cost: &CostModel, reserved: u64) -> Vec<Loads> {
        let (sums, mut prices) = (Sums::of(workload, cost), ExpertPrices::new(workload.shape, cost));
        let of_rank = |rank| Self::of_rank(workload, cost, reserved, (&sums, &mut prices), rank);
        workload.map.all_ranks().map(of_rank).collect()
    }

    fn of_rank(
        workload: &Workload<'_>,
        cost: &CostModel,
        reserved: u64,
        (sums, prices): (&Sums, &mut ExpertPrices<'_>),
        rank: Rank,
    ) -> Loads {
        let LayerSizes { hidden, wire, .. } = *workload.shape;
        let row_bytes = workload.shape.row_bytes() as u64;
        let block = workload.map.slots_of_rank(rank);
        let share = cost.share(reserved);
        // Curves as straight lines around what the rank has in all: of a sum of parts, the sum.
        let line = |curve: &crate::Piecewise, all: u64| {
            let (empty, full) = (curve.extended(0), curve.extended(all));
            (empty, full.saturating_sub(empty) * 1024 / all.max(1))
        };
        let experts = block.len();
        let assignments: u64 =
            sums.assignments[block.clone()].iter().map(|&assignments| u64::from(assignments)).sum();
        let (gather, gather_slope) = line(&cost.rows.gather, assignments * row_bytes);
        let (reduce, reduce_slope) = line(&cost.rows.reduce, assignments * row_bytes);
        let copy_ns = |assignments: u64| assignments * row_bytes * (gather_slope + reduce_slope) / 1024;
        let [overhead, dense_overhead] = prices.overheads;
        let mut computed = |kind: usize| {
            running_sums(experts, |local| {
                let assignments = u64::from(sums.assignments[block.start + local]);
                let per_op = if kind == 1 && assignments > 0 { dense_overhead } else { 0 };
                (prices.expert_ns(kind, assignments) + per_op + copy_ns(assignments)) * share.compute / 1000
            })
        };
        let (grouped, dense) = (computed(0), computed(1));
        let [dispatch, combine] = [(&sums.first, wire.dispatch), (&sums.last, wire.combine)]
            .map(|(side, format)| side.link_sums(block.clone(), cost, format.bytes(hidden) as u64));
        Loads {
            dispatch,
            combine,
            start: cost.link.exchange_ns + cost.link.near.extended(0),
            grouped,
            dense,
            stage: (overhead + gather + reduce) * share.compute / 1000,
            dense_stage: (gather + reduce) * share.compute / 1000,
        }
    }

    /// Local experts L.
    pub(crate) fn experts(&self) -> usize {
        self.dispatch.len() - 1
    }

    /// Compute time of a stage.
    pub(crate) fn compute_ns(&self, kind: GemmKind, from: usize, to: usize) -> u64 {
        match kind {
            GemmKind::Grouped => self.stage + self.grouped[to] - self.grouped[from],
            GemmKind::Dense => self.dense_stage + self.dense[to] - self.dense[from],
        }
    }

    fn exchange_ns(&self, side: &[u64], from: usize, to: usize) -> u64 {
        let carried = side[to] - side[from];
        if carried == 0 { 0 } else { self.start + carried }
    }

    /// The boundary up to which `permille` of the compute time lies, rounded to the nearer expert.
    fn boundary(&self, permille: u64) -> usize {
        let experts = self.experts();
        let target = self.grouped[experts] * permille / 1000;
        let after = self.grouped.partition_point(|&sum| sum < target).min(experts);
        let before = after.saturating_sub(1);
        if self.grouped[after].abs_diff(target) < target.abs_diff(self.grouped[before]) {
            after
        } else {
            before
        }
    }

    /// How much of the compute time lies before a boundary.
    pub(crate) fn permille(&self, boundary: usize) -> u64 {
        self.grouped[boundary] * 1000 / self.grouped[self.experts()].max(1)
    }

    /// The best boundaries `[S + 1]` for stages multiplied by `kinds`. With `targets`, each inner boundary stays
    /// within `radius` experts of where [`Loads::boundary`] finds its target.
    pub(crate) fn cut(&self, kinds: &[GemmKind], targets: Option<&[u64]>, radius: usize) -> Vec<usize> {
        let (stages, experts) = (kinds.len(), self.experts());
        // A programme over all experts is quadratic in them; beyond some hundreds only every so many may begin a stage.
        let step = experts.div_ceil(MOST_BOUNDARIES).max(1);
        let ends = |stage: usize| -> Vec<usize> {
            match targets.and_then(|targets| targets.get(stage)) {
                _ if stage + 1 == stages => vec![experts],
                Some(&target) => {
                    let middle = self.boundary(target);
                    (middle.saturating_sub(radius)..=(middle + radius).min(experts)).collect()
                }
                None => (0..experts).step_by(step).chain([experts]).collect(),
            }
        };
        // plans[s]: where stages 0..s may end, and for each the best plan that does.
        let mut plans: Vec<(Vec<usize>, Vec<Option<Partial>>)> =
            vec![(vec![0], vec![Some(Partial::default())])];
        for (stage, &kind) in kinds.iter().enumerate() {
            let ends = ends(stage);
            let best = ends.iter().map(|&end| self.best(&plans[stage], stage, kind, end)).collect();
            plans.push((ends, best));
        }
        let mut cut = vec![experts; stages + 1];
        for stage in (0..stages).rev() {
            let (ends, best) = &plans[stage + 1];
            let at = ends.binary_search(&cut[stage + 1]).ok();
            cut[stage] = at.and_then(|at| best[at]).map_or(cut[stage + 1], |plan| plan.from);
        }
        cut
    }

    /// The best way to add a stage that ends at `end`.
    fn best(
        &self,
        (ends, before): &(Vec<usize>, Vec<Option<Partial>>),
        stage: usize,
        kind: GemmKind,
        end: usize,
    ) -> Option<Partial> {
        let mut best: Option<Partial> = None;
        for (&from, plan) in ends.iter().zip(before).take_while(|(from, _)| **from <= end) {
            let Some(plan) = plan else { continue };
            let dispatched = plan.transfer + self.exchange_ns(&self.dispatch, from, end);
            let compute = plan.compute.max(dispatched) + self.compute_ns(kind, from, end);
            // c(s-1) follows d(s) and the computation of stage s-1.
            let transfer = if stage == 0 { dispatched } else { dispatched.max(plan.compute) + plan.pending };
            let pending = self.exchange_ns(&self.combine, from, end);
            let last = self.experts();
            let to_compute = self.compute_rest(kind, end, last);
            let to_transfer =
                self.dispatch[last] - self.dispatch[end] + self.combine[last] - self.combine[end];
            let bound = if end == last {
                compute.max(transfer) + pending
            } else {
                (compute + to_compute).max(transfer + pending + to_transfer)
            };
            if best.is_none_or(|best| bound < best.bound) {
                best = Some(Partial { from, transfer, compute, pending, bound });
            }
        }
        best
    }

    fn compute_rest(&self, kind: GemmKind, from: usize, to: usize) -> u64 {
        match kind {
            GemmKind::Grouped => self.grouped[to] - self.grouped[from],
            GemmKind::Dense => self.dense[to] - self.dense[from],
        }
    }
}

/// How long the experts of all ranks take under these cuts, where an exchange begins when the last rank is there and
/// ends with the slowest: what the programme, which looks at one rank, does not see.
pub(crate) fn together_ns(
    loads: &[Loads],
    cuts: &[Vec<usize>],
    kinds: &[GemmKind],
    order: &[Transfer],
) -> u64 {
    let ranks = || loads.iter().zip(cuts);
    let longest = |side: fn(&Loads) -> &Vec<u64>, stage: usize| {
        let of_rank =
            |(loads, cut): (&Loads, &Vec<usize>)| loads.exchange_ns(side(loads), cut[stage], cut[stage + 1]);
        ranks().map(of_rank).max().unwrap_or(0)
    };
    // When the transfer lanes are free, each rank's compute lane is, and each stage is computed on all ranks.
    let (mut transfer, mut compute) = (0, vec![0; loads.len()]);
    let mut computed: Vec<u64> = Vec::with_capacity(kinds.len());
    let mut dispatched = vec![false; kinds.len()];
    for step in order {
        match step {
            Transfer::Dispatch(stage) => {
                transfer += longest(|loads| &loads.dispatch, stage.0);
                dispatched[stage.0] = true;
                while dispatched.get(computed.len()) == Some(&true) {
                    let stage = computed.len();
                    for ((loads, cut), compute) in ranks().zip(&mut compute) {
                        let work = loads.compute_ns(kinds[stage], cut[stage], cut[stage + 1]);
                        *compute = transfer.max(*compute) + work;
                    }
                    computed.push(compute.iter().copied().max().unwrap_or(0));
                }
            }
            Transfer::Combine(stage) => {
                let ready = computed.get(stage.0).copied().unwrap_or(0);
                transfer = transfer.max(ready) + longest(|loads| &loads.combine, stage.0);
            }
        }
    }
    compute.into_iter().max().unwrap_or(0).max(transfer)
}

/// Some first stages, placed.
#[derive(Clone, Copy, Debug, Default)]
struct Partial {
    /// Where the last of them starts.
    from: usize,
    /// When the lanes are free.
    transfer: u64,
    compute: u64,
    /// The last stage's combine, not yet on the transfer lane.
    pending: u64,
    /// No full plan that begins like this ends earlier.
    bound: u64,
}

/// What both products of an expert cost by its rows, asked again and again in every layer. Where tiles are priced that takes
/// a while, and changes with every so many rows only: then it is found once for each of these steps.
struct ExpertPrices<'a> {
    /// `[kind]` gate and up, down.
    products: [[Product<'a>; 2]; 2],
    /// `[kind]` what an operation costs besides its experts.
    overheads: [u64; 2],
    /// `[kind]` by steps of rows, of those that were asked for.
    known: [Vec<Option<u64>>; 2],
}

impl<'a> ExpertPrices<'a> {
    /// Steps that are kept: more rows than anybody has.
    const MOST_STEPS: usize = 4096;

    fn new(shape: &LayerSizes, cost: &'a CostModel) -> Self {
        let LayerSizes { hidden, inner, maps, weights, .. } = *shape;
        let products = [GemmKind::Grouped, GemmKind::Dense].map(|kind| {
            [(maps * inner, hidden), (hidden, inner)]
                .map(|(columns, depth)| cost.gemm(kind).product(columns, depth, weights))
        });
        let overheads = products.each_ref().map(|[up, down]| up.overhead_ns() + down.overhead_ns());
        ExpertPrices { products, overheads, known: Default::default() }
    }

    fn expert_ns(&mut self, kind: usize, rows: u64) -> u64 {
        let products = self.products[kind];
        let exact = |rows| products.iter().map(|product| product.expert_ns(rows)).sum::<u64>();
        let step = rows.div_ceil(TileCost::ROWS) as usize;
        if step >= Self::MOST_STEPS || products.iter().any(|product| !product.has_tiles()) {
            return exact(rows);
        }
        let known = &mut self.known[kind];
        if known.len() <= step {
            known.resize(step + 1, None);
        }
        *known[step].get_or_insert_with(|| exact(step as u64 * TileCost::ROWS))
    }
}

/// The longest time of a rank's experts, so that what is multiplied by a permille fits.
const MOST_SUM_NS: u64 = 1000 * MOST_NS;

/// Places where a stage may begin, where nobody says about where: the largest published models have 512 experts, on more
/// than one rank.
const MOST_BOUNDARIES: usize = 512;

fn running_sums(number: usize, mut of: impl FnMut(usize) -> u64) -> Vec<u64> {
    let mut sums = Vec::with_capacity(number + 1);
    let mut sum = 0;
    sums.push(0);
    for index in 0..number {
        sum = (sum + of(index).min(MOST_NS)).min(MOST_SUM_NS);
        sums.push(sum);
    }
    sums
}

/// Rows of every expert, `[E]`, from everywhere else.
struct Side {
    /// From or to other ranks of the expert's node, and of other nodes.
    near: Vec<u32>,
    far: Vec<u32>,
}

/// What all ranks announced, added up.
struct Sums {
    assignments: Vec<u32>,
    first: Side,
    last: Side,
}

impl Sums {
    fn of(workload: &Workload<'_>, cost: &CostModel) -> Self {
        let mut assignments = vec![0; workload.map.slots()];
        for rank in workload.map.all_ranks() {
            add(&mut assignments, &workload.counts.of(rank).assignments);
        }
        Sums {
            assignments,
            first: Side::of(workload, cost, |rank| &workload.counts.of(rank).first),
            last: Side::of(workload, cost, |rank| &workload.counts.of(rank).last),
        }
    }
}

impl Side {
    fn of<'a>(workload: &Workload<'_>, cost: &CostModel, histogram: impl Fn(Rank) -> &'a [u32]) -> Self {
        let map = workload.map;
        let (experts, ranks) = (map.slots(), map.ranks());
        let node = match cost.link.node_ranks as usize {
            0 => ranks,
            node => node,
        };
        let (mut near, mut far) = (vec![0; experts], vec![0; experts]);
        let by_node: Vec<Vec<u32>> = (0..ranks.div_ceil(node))
            .map(|number| {
                let mut sum = vec![0; experts];
                for rank in number * node..((number + 1) * node).min(ranks) {
                    add(&mut sum, histogram(Rank(rank)));
                }
                sum
            })
            .collect();
        for rank in map.all_ranks() {
            let block = map.slots_of_rank(rank);
            near[block.clone()].copy_from_slice(&by_node[rank.0 / node][block.clone()]);
            for (near, own) in near[block.clone()].iter_mut().zip(&histogram(rank)[block.clone()]) {
                *near -= own;
            }
            for (_, other) in by_node.iter().enumerate().filter(|(number, _)| *number != rank.0 / node) {
                add(&mut far[block.clone()], &other[block.clone()]);
            }
        }
        Side { near, far }
    }

    /// `[L + 1]` running ns of a block of experts on the link, without its start cost.
    fn link_sums(&self, block: std::ops::Range<usize>, cost: &CostModel, row_bytes: u64) -> Vec<u64> {
        let bytes = |rows: &[u32]| rows.iter().map(|&rows| u64::from(rows)).sum::<u64>() * row_bytes;
        let (near, far) = (bytes(&self.near[block.clone()]), bytes(&self.far[block.clone()]));
        let link = &cost.link;
        let full = link.exchange_ns(Payload { near, far, received: near + far });
        let carried = full.saturating_sub(link.exchange_ns + link.near.extended(0));
        let rows = (near + far) / row_bytes.max(1);
        let slope = carried * 1024 / rows.max(1);
        running_sums(block.len(), |local| {
            let expert = block.start + local;
            (u64::from(self.near[expert]) + u64::from(self.far[expert])) * slope / 1024
        })
    }
}

fn add(sums: &mut [u32], more: &[u32]) {
    for (sum, more) in sums.iter_mut().zip(more) {
        *sum += more;
    }
}
