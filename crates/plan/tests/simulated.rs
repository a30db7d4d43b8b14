//! What the simulator promises of every table on every machine. `EPSMOE_TEST_SEED` repeats a run.

#[allow(dead_code, reason = "each test uses a part of it")]
mod costs;

use costs::{Layer, for_random_cases, random_cost, random_table};
use epsmoe_base::{DType, Lane, Phase, Rank, RowFormat, Stage, WireFormat};
use epsmoe_plan::*;

/// The spans of one rank and lane, in the order in which they are written.
fn lane(simulation: &Simulation, rank: Rank, lane: Lane) -> Vec<&Span> {
    simulation.timeline.spans.iter().filter(|span| span.rank == rank && span.lane == lane).collect()
}

fn find<'a>(spans: &[&'a Span], phase: Phase, stage: usize) -> &'a Span {
    spans.iter().find(|span| span.phase == phase && span.stage == Some(Stage(stage))).expect("is there")
}

#[test]
fn dependencies_and_lane_order_are_respected() {
    for_random_cases(300, |mix| {
        let (layer, cost) = (Layer::random(mix, 5, 5), random_cost(mix));
        let reserved = cost.shares[mix.below(2)].reserved;
        let table = StageTable { reserved, ..random_table(&layer.map, mix) };
        let simulation = simulate(&table, &layer.workload(), &cost);
        for rank in layer.map.all_ranks() {
            let (compute, transfer) =
                (lane(&simulation, rank, Lane::Compute), lane(&simulation, rank, Lane::Transfer));
            for spans in [&compute, &transfer] {
                for pair in spans.windows(2) {
                    assert!(pair[0].end_ns <= pair[1].start_ns, "a lane does one thing after the other");
                    assert!(pair[0].start_ns <= pair[0].end_ns);
                }
            }
            if table.runs_in_place(&layer.map) {
                assert!(transfer.is_empty(), "nothing travels");
                continue;
            }
            assert_eq!(transfer[0].phase, Phase::Metadata);
            let steps = transfer[1..].iter().map(|span| match (span.phase, span.stage) {
                (Phase::Dispatch, Some(stage)) => Transfer::Dispatch(stage),
                (Phase::Combine, Some(stage)) => Transfer::Combine(stage),
                other => panic!("{other:?} on the transfer lane"),
            });
            assert_eq!(steps.collect::<Vec<_>>(), table.order);
            for stage in 0..table.stages() {
                for earlier in 0..=stage {
                    let arrived = find(&transfer, Phase::Dispatch, earlier).end_ns;
                    assert!(find(&compute, Phase::Expand, stage).start_ns >= arrived);
                }
                let reduced = find(&compute, Phase::Reduce, stage);
                assert!(find(&transfer, Phase::Combine, stage).start_ns >= reduced.end_ns);
            }
            let last = compute.last().expect("the last sum");
            assert_eq!((last.phase, last.stage), (Phase::Sum, None));
            assert!(last.start_ns >= transfer.last().expect("a combine").end_ns);
            assert!(last.end_ns <= simulation.layer_ns);
            assert_eq!(TimeBreakdown::of(&simulation.timeline, rank).unexplained(), 0);
        }
        // Two-sided: nobody is done before everybody has come.
        let ranks: Vec<_> =
            layer.map.all_ranks().map(|rank| lane(&simulation, rank, Lane::Transfer)).collect();
        for exchange in 0..ranks[0].len() {
            let came = ranks.iter().map(|spans| spans[exchange].start_ns).max();
            assert!(ranks.iter().all(|spans| Some(spans[exchange].end_ns) >= came));
        }
        assert_eq!(predict_ns(&table, &layer.workload(), &cost), {
            simulate(&table, &layer.workload(), &cost).layer_ns
        });
    });
}

#[test]
fn rows_are_conserved_and_priced_by_the_link() {
    for_random_cases(100, |mix| {
        let (mut layer, mut cost) = (Layer::random(mix, 4, 4), random_cost(mix).without_contention());
        // Whatever rows travel in, activations stay as they are.
        layer.shape.wire.dispatch = RowFormat::Plain([DType::BF16, DType::F32][mix.below(2)]);
        layer.shape.wire.combine = RowFormat::Plain([DType::BF16, DType::F32][mix.below(2)]);
        let table = random_table(&layer.map, mix);
        // A nanosecond for every byte, and nothing for anything else.
        cost.link = LinkCost::uniform(0, 1_000_000_000);
        cost.host = HostCost::default();
        let simulation = simulate(&table, &layer.workload(), &cost);
        let traffic = Traffic::of(&layer.map, &layer.counts, &table);
        for (stage, times) in simulation.stages.iter().enumerate() {
            let moved = |format: RowFormat, rows: &dyn Fn(Rank, Rank) -> usize| -> u64 {
                let ranks = || layer.map.all_ranks();
                let of = |rank: Rank| {
                    let others = || ranks().filter(move |&other| other != rank);
                    let out: usize = others().map(|other| rows(rank, other)).sum();
                    let back: usize = others().map(|other| rows(other, rank)).sum();
                    out.max(back) as u64
                };
                ranks().map(of).max().unwrap_or(0) * format.bytes(layer.shape.hidden) as u64
            };
            let WireFormat { dispatch, combine } = layer.shape.wire;
            let dispatched = moved(dispatch, &|from, to| traffic.dispatched(Stage(stage), from, to));
            let combined = moved(combine, &|from, to| traffic.combined(Stage(stage), from, to));
            assert_eq!((times.dispatch_ns, times.combine_ns), (dispatched, combined));
        }
    });
}

#[test]
fn a_faster_machine_is_not_slower_without_contention() {
    for_random_cases(300, |mix| {
        let (layer, cost) = (Layer::random(mix, 5, 5), random_cost(mix).without_contention());
        let table = random_table(&layer.map, mix);
        let time = |cost: &CostModel| predict_ns(&table, &layer.workload(), cost);
        let before = time(&cost);
        let factor = |mix: &mut epsmoe_base::Mix| 1000 + mix.below(3000) as u64;
        let slower =
            Correction { link: factor(mix), grouped: factor(mix), dense: factor(mix), rows: factor(mix) };
        assert!(time(&cost.corrected(&slower)) >= before, "{slower:?}");
        let one = [
            Correction { link: slower.link, ..Correction::default() },
            Correction { grouped: slower.grouped, ..Correction::default() },
            Correction { dense: slower.dense, ..Correction::default() },
            Correction { rows: slower.rows, ..Correction::default() },
        ];
        for correction in one {
            let after = time(&cost.corrected(&correction));
            assert!(after >= before && time(&cost.corrected(&slower)) >= after, "{correction:?}");
        }
    });
}

#[test]
fn contention_costs_time_and_a_shared_processor_costs_more() {
    for_random_cases(200, |mix| {
        let (layer, cost) = (Layer::random(mix, 4, 4), random_cost(mix));
        let table = random_table(&layer.map, mix);
        let free = cost.without_contention();
        let price = |cost: &CostModel| predict_ns(&table, &layer.workload(), cost);
        assert!(price(&cost) >= price(&free));
        let shared = |threads| price(&CostModel { concurrent: threads, ..free.clone() });
        // Four ranks of two lanes and a host each never want more than twelve threads.
        assert!(shared(1) >= shared(4) && shared(4) >= shared(12));
        assert_eq!(shared(12), shared(100));
    });
}

/// Lanes wait for their turn only where computation fills the processor, and no longer than they must.
#[test]
fn a_full_processor_makes_transfers_wait() {
    let waited = std::cell::Cell::new(0);
    for_random_cases(200, |mix| {
        let layer = Layer::random(mix, 4, 4);
        let cost = random_cost(mix).without_contention();
        let table = random_table(&layer.map, mix);
        let price = |concurrent, queue_ns| {
            let host = HostCost { queue_ns, ..cost.host.clone() };
            predict_ns(&table, &layer.workload(), &CostModel { concurrent, host, ..cost.clone() })
        };
        assert_eq!([price(0, 50_000), price(100, 50_000)], [price(0, 0), price(100, 0)]);
        waited.set(waited.get() + usize::from(price(1, 50_000) > price(1, 0)));
    });
    assert!(waited.get() > 50, "{} of 200 layers took longer", waited.get());
}

/// One rank, one expert, two stages of which one is empty: every number can be checked by hand.
#[test]
fn a_layer_by_hand() {
    let map = SlotMap::contiguous(2, 2).unwrap();
    let law = SyntheticRouting { top_k: 2, groups: None, zipf_permille: 0, seed: 0 };
    let counts = law.counts(&map, &[100, 100]).unwrap();
    let sizes = LayerSizes { hidden: 1000, inner: 500, top_k: 2, ..LayerSizes::of(&map, DType::BF16) };
    let shape = LayerSizes { shared_inner: 0, ..sizes };
    let gemm = GemmCost {
        flops_per_second: 1_000_000_000_000_000,
        rows: Piecewise::flat(1000),
        depth: Piecewise::flat(1000),
        weight_bytes_per_second: 1_000_000_000_000_000_000,
        op_ns: 0,
        least_columns: 0,
        tiles: None,
    };
    let cost = CostModel {
        version: CostModel::VERSION,
        machine: String::new(),
        kernels: String::new(),
        dtype: epsmoe_base::DType::BF16,
        concurrent: 0,
        lane_threads: 1,
        grouped: gemm.clone(),
        dense: gemm,
        link: LinkCost::uniform(10, 1_000_000_000_000),
        rows: RowsCost::default(),
        host: HostCost { exchange: Piecewise::flat(7), ..HostCost::default() },
        shares: vec![ShareCost::FREE],
    };
    let workload = Workload { map: &map, counts: &counts, shape: &shape };
    let table = StageTable::serial(&map, GemmKind::Grouped);
    let simulation = simulate(&table, &workload, &cost);
    // Every token goes to both experts: 100 rows of 2000 bytes to the other rank, 200 assignments a rank.
    let rows = 10 + 100 * 2000 / 1000;
    let metadata = 10 + 100 * 16 / 1000;
    let products = 200 * 2 * (1000 * 1000 + 500 * 1000) / 1_000_000;
    let router = 100 * 2 * 2 * 1000 / 1_000_000;
    assert_eq!(simulation.layer_ns, router + 7 + metadata + rows + products + rows);
    assert_eq!(simulation.exposed_transfer_ns, metadata + 2 * rows);
    assert_eq!(simulation.count_exchange_ns, 7);
    assert_eq!(simulation.stages, [StageTimes { dispatch_ns: rows, compute_ns: products, combine_ns: rows }]);
}
