//! Random machines and layers of realistic proportions.

use epsmoe_base::{DType, Mix};
use epsmoe_plan::*;

/// A machine on which anything may be the bottleneck.
pub(crate) fn random_cost(mix: &mut Mix) -> CostModel {
    let gemm = |mix: &mut Mix| GemmCost {
        flops_per_second: 1_000_000_000_000 << mix.below(6),
        rows: Piecewise::of([
            (1, 100 + mix.below(200) as u64),
            (64, 600),
            (512, 700 + mix.below(300) as u64),
        ]),
        depth: Piecewise::flat(500 + mix.below(500) as u64),
        weight_bytes_per_second: 100_000_000_000 << mix.below(4),
        op_ns: mix.below(20_000) as u64,
        least_columns: mix.below(80) as u64,
        tiles: None,
    };
    let line = |mix: &mut Mix, start: usize, rate: u64| {
        Piecewise::line(mix.below(start) as u64, rate << mix.below(6))
    };
    CostModel {
        version: CostModel::VERSION,
        machine: "random".into(),
        kernels: "random".into(),
        dtype: DType::BF16,
        concurrent: 0,
        lane_threads: 1,
        grouped: gemm(mix),
        dense: gemm(mix),
        link: LinkCost {
            exchange_ns: mix.below(3_000) as u64,
            node_ranks: [0, 0, 2, 3][mix.below(4)],
            near: line(mix, 50_000, 1_000_000_000),
            far: line(mix, 90_000, 500_000_000),
            copy: line(mix, 1_000, 50_000_000_000),
        },
        rows: RowsCost {
            gather: line(mix, 5_000, 20_000_000_000),
            reduce: line(mix, 5_000, 20_000_000_000),
            host_to_device: line(mix, 5_000, 20_000_000_000),
            route: line(mix, 5_000, 5_000_000_000),
            index: line(mix, 5_000, 5_000_000_000),
        },
        host: HostCost {
            read: line(mix, 5_000, 1_000_000_000),
            exchange: line(mix, 30_000, 1_000_000_000),
            plan: line(mix, 5_000, 1_000_000_000),
            enqueue: line(mix, 5_000, 1_000_000_000),
            wake_ns: mix.below(2) as u64 * mix.below(20_000) as u64,
            sleep_ns: 0,
            queue_ns: mix.below(2) as u64 * mix.below(50_000) as u64,
        },
        shares: vec![
            ShareCost {
                reserved: 0,
                compute: 1000,
                compute_beside: 1000 + mix.below(400) as u64,
                transfer_beside: 1000 + mix.below(800) as u64,
            },
            ShareCost { reserved: 100, compute: 1050, compute_beside: 1020, transfer_beside: 1050 },
        ],
    }
}

/// A layer's map, counts and widths.
pub(crate) struct Layer {
    pub(crate) map: SlotMap,
    pub(crate) counts: LayerHistograms,
    pub(crate) shape: LayerSizes,
    /// Where the counts come from.
    pub(crate) law: SyntheticRouting,
}

impl Layer {
    pub(crate) fn random(mix: &mut Mix, most_ranks: usize, most_local: usize) -> Self {
        let ranks = 1 + mix.below(most_ranks);
        let experts = ranks * (1 + mix.below(most_local));
        let map = SlotMap::contiguous(experts, ranks).expect("ranks ≤ experts");
        let law = SyntheticRouting {
            top_k: 1 + mix.below(experts.min(6)),
            groups: None,
            zipf_permille: [0, 0, 800, 1500][mix.below(4)],
            seed: mix.next_u64(),
        };
        let size = [16, 256, 2048][mix.below(3)];
        let tokens: Vec<usize> = (0..ranks).map(|_| mix.below(2) * size + mix.below(size)).collect();
        let counts = law.counts(&map, &tokens).expect("a real routing");
        let sizes = LayerSizes {
            hidden: 256 << mix.below(4),
            inner: 128 << mix.below(5),
            top_k: law.top_k,
            ..LayerSizes::of(&map, DType::BF16)
        };
        let shape = LayerSizes { shared_inner: mix.below(2) * 512, ..sizes };
        Layer { map, counts, shape, law }
    }

    pub(crate) fn workload(&self) -> Workload<'_> {
        Workload { map: &self.map, counts: &self.counts, shape: &self.shape }
    }
}

/// Any cut, kernels, legal order and place of the shared expert.
pub(crate) fn random_table(map: &SlotMap, mix: &mut Mix) -> StageTable {
    let stages = 1 + mix.below(5);
    let mut cut = |local: usize| {
        let mut cut: Vec<usize> = (1..stages).map(|_| mix.below(local + 1)).chain([0, local]).collect();
        cut.sort_unstable();
        cut
    };
    let cuts = map.all_ranks().map(|rank| cut(map.local_count(rank))).collect();
    let orders = sensible_orders(stages);
    let shared = [
        SharedExpert::BesideCountExchange,
        SharedExpert::BesideFirstDispatch,
        SharedExpert::BesideLastCombine,
        SharedExpert::Serial,
    ];
    StageTable {
        cuts,
        order: orders[mix.below(orders.len())].clone(),
        gemm: (0..stages).map(|_| [GemmKind::Grouped, GemmKind::Dense][mix.below(2)]).collect(),
        shared: shared[mix.below(4)],
        reserved: 0,
    }
}

/// Runs `check` on many seeds; the one to repeat a failure with is printed before it.
pub(crate) fn for_random_cases(number: u64, check: impl Fn(&mut Mix)) {
    let seed = epsmoe_base::env::test_seed();
    eprintln!("EPSMOE_TEST_SEED={seed}");
    for index in 0..number {
        eprintln!("case {index}");
        check(&mut Mix::keyed(seed, &[index]));
    }
}
