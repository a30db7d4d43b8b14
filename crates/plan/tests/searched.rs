//! What the search promises: never worse than one stage, as good as trying everything, the same on every rank, in
//! time. `EPSMOE_TEST_SEED` repeats a run.

#[allow(dead_code, reason = "each test uses a part of it")]
mod costs;

use costs::{Layer, for_random_cases, random_cost};
use epsmoe_base::{DType, Stage};
use epsmoe_plan::*;
use std::time::Instant;

fn exact() -> SearchOptions {
    SearchOptions { margin: 0, ..SearchOptions::default() }
}

#[test]
fn never_worse_than_one_stage_and_always_legal() {
    for_random_cases(60, |mix| {
        let (layer, cost) = (Layer::random(mix, 5, 6), random_cost(mix));
        let workload = layer.workload();
        for options in [exact(), SearchOptions::default()] {
            let choice = search(&workload, &cost, &options);
            choice.table.validate(&layer.map).unwrap();
            let predicted = predict_ns(&choice.table, &workload, &cost);
            assert_eq!(predicted, choice.predicted.layer_ns);
            for kind in [GemmKind::Grouped, GemmKind::Dense] {
                for ShareCost { reserved, .. } in cost.shares.iter().copied() {
                    let one = StageTable::equal(&layer.map, 1, kind).unwrap();
                    for shared in [
                        SharedExpert::BesideCountExchange,
                        SharedExpert::BesideFirstDispatch,
                        SharedExpert::Serial,
                    ] {
                        let one = StageTable { shared, reserved, ..one.clone() };
                        let one_ns = predict_ns(&one, &workload, &cost);
                        let fewest = choice.table.stages() == 1;
                        let allowed =
                            if fewest { one_ns + one_ns * options.margin / 1000 + 1 } else { one_ns };
                        assert!(predicted <= allowed, "{predicted} against {one_ns}:\n{choice}");
                    }
                }
            }
            // Another rank, from the same counts.
            assert_eq!(search(&workload, &cost, &options), choice);
            let again = cuts_for(&choice.decision, &workload, &cost);
            again.validate(&layer.map).unwrap();
            assert_eq!(again, cuts_for(&choice.decision, &workload, &cost));
        }
    });
}

/// Every way to cut `local` experts into stages, with empty ones.
fn all_cuts(local: usize, stages: usize) -> Vec<Vec<usize>> {
    let mut cuts = vec![vec![0]];
    for _ in 1..stages {
        let longer = cuts.iter().flat_map(|cut| {
            let last = cut[cut.len() - 1];
            (last..=local).map(move |next| [cut.as_slice(), &[next]].concat())
        });
        cuts = longer.collect();
    }
    cuts.into_iter().map(|cut| [cut, vec![local]].concat()).collect()
}

/// Every order in which dispatches and combines ascend.
fn all_orders(stages: usize) -> Vec<Vec<Transfer>> {
    fn extend(order: Vec<Transfer>, sent: usize, back: usize, stages: usize, all: &mut Vec<Vec<Transfer>>) {
        if back == stages {
            return all.push(order);
        }
        let with = |step| [order.as_slice(), &[step]].concat();
        if sent < stages {
            extend(with(Transfer::Dispatch(Stage(sent))), sent + 1, back, stages, all);
        }
        if back < sent {
            extend(with(Transfer::Combine(Stage(back))), sent, back + 1, stages, all);
        }
    }
    let mut all = Vec::new();
    extend(Vec::new(), 0, 0, stages, &mut all);
    all
}

fn all_kernels(stages: usize) -> Vec<Vec<GemmKind>> {
    let kinds = [GemmKind::Grouped, GemmKind::Dense];
    (0..1 << stages).map(|bits: usize| (0..stages).map(|stage| kinds[bits >> stage & 1]).collect()).collect()
}

/// The cheapest of all plans of at most three stages.
fn exhaustive(layer: &Layer, cost: &CostModel) -> u64 {
    let (workload, map) = (layer.workload(), &layer.map);
    let mut best = u64::MAX;
    for stages in 1..=map.max_local().min(3) {
        let mut cuts: Vec<Vec<Vec<usize>>> = vec![vec![]];
        for rank in map.all_ranks() {
            let of_rank = all_cuts(map.local_count(rank), stages);
            let longer = cuts.iter().flat_map(|cuts| {
                of_rank.iter().map(move |cut| [cuts.as_slice(), std::slice::from_ref(cut)].concat())
            });
            cuts = longer.collect();
        }
        for cuts in cuts {
            for order in all_orders(stages) {
                for gemm in all_kernels(stages) {
                    for ShareCost { reserved, .. } in cost.shares.iter().copied() {
                        let shared = SharedExpert::BesideCountExchange;
                        let table = StageTable {
                            cuts: cuts.clone(),
                            order: order.clone(),
                            gemm: gemm.clone(),
                            shared,
                            reserved,
                        };
                        best = best.min(predict_ns(&table, &workload, cost));
                    }
                }
            }
        }
    }
    best
}

#[test]
fn as_good_as_trying_everything_on_small_layers() {
    let regrets = std::sync::Mutex::new(Vec::new());
    for_random_cases(40, |mix| {
        let (layer, cost) = (Layer::random(mix, 2, 4), random_cost(mix));
        let options =
            SearchOptions { max_stages: 3, shared: Some(SharedExpert::BesideCountExchange), ..exact() };
        let choice = search(&layer.workload(), &cost, &options);
        let best = exhaustive(&layer, &cost);
        assert!(choice.predicted.layer_ns >= best);
        let regret = (choice.predicted.layer_ns - best) as f64 * 100.0 / best as f64;
        assert!(regret <= 5.0, "{regret:.2} % worse than the best of all plans:\n{choice}");
        regrets.lock().unwrap().push(regret);
    });
    let mut regrets = regrets.into_inner().unwrap();
    regrets.sort_by(f64::total_cmp);
    let mean = regrets.iter().sum::<f64>() / regrets.len() as f64;
    println!("regret against all plans: mean {mean:.2} %, worst {:.2} %", regrets[regrets.len() - 1]);
    assert!(mean <= 0.5);
}

/// DeepSeek-V2 widths on a machine without contention, one expert a token, so that rows divide evenly.
fn ideal(transfer_ns: u64, overhead_ns: u64) -> (Layer, CostModel) {
    let map = SlotMap::contiguous(256, 8).expect("a legal layer");
    // Every rank sends one token to every expert, times 64: perfectly even.
    let histogram = vec![64; 256];
    let counts = TokenHistograms {
        tokens: 64 * 256,
        assignments: histogram.clone(),
        first: histogram.clone(),
        last: histogram,
    };
    let counts = LayerHistograms::new(&map, 1, vec![counts; 8]).expect("a legal layer");
    let law = SyntheticRouting { top_k: 1, groups: None, zipf_permille: 0, seed: 0 };
    let sizes = LayerSizes { hidden: 1024, inner: 1024, top_k: 1, ..LayerSizes::of(&map, DType::BF16) };
    let bytes = 7 * 32 * 64 * 1024 * 2;
    let gemm = GemmCost {
        // 16384 copies · 6 · 2²⁰ FLOP in 10 ms.
        flops_per_second: 16384 * 6 * (1 << 20) * 100,
        rows: Piecewise::flat(1000),
        depth: Piecewise::flat(1000),
        weight_bytes_per_second: 1_000_000_000_000_000,
        op_ns: overhead_ns / 2,
        least_columns: 0,
        tiles: None,
    };
    let cost = CostModel {
        version: CostModel::VERSION,
        machine: String::new(),
        kernels: String::new(),
        dtype: DType::BF16,
        concurrent: 0,
        lane_threads: 1,
        dense: GemmCost { op_ns: 10_000_000, ..gemm.clone() },
        grouped: gemm,
        link: LinkCost::uniform(0, bytes * 1_000_000_000 / transfer_ns),
        rows: RowsCost::default(),
        host: HostCost::default(),
        shares: vec![ShareCost::FREE],
    };
    (Layer { map, counts, shape: LayerSizes { shared_inner: 0, ..sizes }, law }, cost)
}

#[test]
fn the_closed_form_agrees() {
    // Both directions together are C, each stage costs κ: the best number of stages is √(C/κ), the gain at S is
    // C − (C/S + κS), up to the κ that one stage costs too.
    for (each_way, overhead) in
        [(2_000_000, 40_000), (2_000_000, 250_000), (1_000_000, 20_000), (100_000, 60_000)]
    {
        let (layer, cost) = ideal(each_way, overhead);
        let options = SearchOptions { max_stages: 32, ..exact() };
        let choice = search(&layer.workload(), &cost, &options);
        let (c, kappa) = (2.0 * each_way as f64, overhead as f64);
        let best = (c / kappa).sqrt();
        let stages = choice.table.stages() as f64;
        let gain = choice.one_stage_ns() as f64 - choice.predicted.layer_ns as f64;
        let formula = |stages: f64| c + kappa - (c / stages + kappa * stages);
        println!(
            "C {c} κ {kappa}: S* {best:.1}, searched {stages}; gain {gain}, formula {:.0} at S*, {:.0} at S",
            formula(best),
            formula(stages)
        );
        // Equal stages follow the formula, where the stages are long enough to hide what they should.
        for equal in [1, 2, 4, 8, 16] {
            let table = StageTable::equal(&layer.map, equal, GemmKind::Grouped).unwrap();
            let ns = predict_ns(&table, &layer.workload(), &cost) as f64;
            let gain = choice.one_stage_ns() as f64 - ns;
            assert!((gain - formula(equal as f64)).abs() <= 0.03 * c, "S {equal}: {gain}");
        }
        // The search cuts unevenly, which is better.
        assert!(gain >= formula(best.round()) * 0.97);
        assert!(gain <= c);
        if stages == 1.0 {
            assert!(c <= 4.5 * kappa);
        }
    }
}

#[test]
fn uneven_cuts_beat_equal_ones_under_the_row_rule() {
    let machine = Machine::built_in("8xH800").unwrap();
    let map = SlotMap::contiguous(256, 8).unwrap();
    let law = SyntheticRouting { top_k: 8, groups: None, zipf_permille: 0, seed: 1 };
    let counts = law.counts(&map, &[8192; 8]).unwrap();
    let sizes = LayerSizes { hidden: 7168, inner: 2048, top_k: 8, ..LayerSizes::of(&map, DType::BF16) };
    let shape = LayerSizes { shared_inner: 0, ..sizes };
    let workload = Workload { map: &map, counts: &counts, shape: &shape };
    let cost = machine.cost();
    for stages in [2, 4, 8] {
        let options = SearchOptions { max_stages: stages, kernels: vec![GemmKind::Grouped], ..exact() };
        let equal = StageTable::equal(&map, stages, GemmKind::Grouped).unwrap();
        let divided = |share: &ShareCost| StageTable { reserved: share.reserved, ..equal.clone() };
        let priced = cost.shares.iter().map(|share| predict_ns(&divided(share), &workload, &cost));
        let equal_ns = priced.min().unwrap();
        let choice = search(&workload, &cost, &options);
        let gain = 100.0 - 100.0 * choice.predicted.layer_ns as f64 / equal_ns as f64;
        println!(
            "S={stages}: equal {equal_ns} ns, searched {} ns: {gain:.1} % less",
            choice.predicted.layer_ns
        );
        assert!(choice.predicted.layer_ns <= equal_ns);
    }
}

#[test]
fn cached_cuts_are_nearly_as_good_as_a_search_per_layer() {
    let regrets = std::sync::Mutex::new(Vec::new());
    for_random_cases(80, |mix| {
        let (layer, cost) = (Layer::random(mix, 6, 8), random_cost(mix));
        let decision = search(&layer.workload(), &cost, &SearchOptions::default()).decision;
        // The next layer: other popular experts, about as many tokens.
        let tokens: Vec<usize> =
            layer.map.all_ranks().map(|rank| layer.counts.of(rank).tokens as usize).collect();
        let law = SyntheticRouting { seed: mix.next_u64(), ..layer.law };
        let counts = law.counts(&layer.map, &tokens).unwrap();
        let bucket = Bucket::of(&layer.workload());
        let next = Layer { counts, ..layer };
        if Bucket::of(&next.workload()) != bucket {
            return;
        }
        let table = cuts_for(&decision, &next.workload(), &cost);
        table.validate(&next.map).unwrap();
        let cached = predict_ns(&table, &next.workload(), &cost);
        let searched = search(&next.workload(), &cost, &SearchOptions::default()).predicted.layer_ns;
        let regret = cached as f64 * 100.0 / searched as f64 - 100.0;
        regrets.lock().unwrap().push(regret);
    });
    let mut regrets = regrets.into_inner().unwrap();
    regrets.sort_by(f64::total_cmp);
    let mean = regrets.iter().sum::<f64>() / regrets.len() as f64;
    println!("cached cuts against a search: mean {mean:.1} %, worst {:.1} %", regrets[regrets.len() - 1]);
    assert!(mean < 4.0);
}

#[test]
fn buckets_are_quarter_octaves() {
    let map = SlotMap::contiguous(8, 2).unwrap();
    let sizes = LayerSizes { hidden: 8, inner: 8, top_k: 1, ..LayerSizes::of(&map, DType::BF16) };
    let shape = LayerSizes { shared_inner: 0, ..sizes };
    let bucket = |tokens: usize| {
        let histogram: Vec<u32> = (0..8).map(|_| tokens as u32 / 8).collect();
        let of = TokenHistograms {
            tokens: tokens as u32,
            assignments: histogram.clone(),
            first: histogram.clone(),
            last: histogram,
        };
        let counts = LayerHistograms::new(&map, 1, vec![of.clone(), of]).unwrap();
        Bucket::of(&Workload { map: &map, counts: &counts, shape: &shape })
    };
    assert_eq!(bucket(1024).tokens + 4, bucket(2048).tokens);
    assert_eq!(bucket(1024), bucket(1024 + 248));
    assert_ne!(bucket(1024), bucket(1024 + 256));
    assert_eq!(bucket(0).tokens, 0);
    let all: Vec<u32> = (0..4096).map(|eighth| bucket(8 * eighth).tokens).collect();
    assert!(all.windows(2).all(|pair| pair[0] <= pair[1]));
}

/// 64 ranks with 512 experts.
fn large() -> (Layer, CostModel) {
    let map = SlotMap::contiguous(512, 64).expect("a legal layer");
    let law = SyntheticRouting { top_k: 8, groups: None, zipf_permille: 500, seed: 3 };
    let counts = law.counts(&map, &[4096; 64]).expect("a legal layer");
    let sizes = LayerSizes { hidden: 7168, inner: 2048, top_k: 8, ..LayerSizes::of(&map, DType::BF16) };
    let layer = Layer { map, counts, shape: LayerSizes { shared_inner: 2048, ..sizes }, law };
    (layer, Machine::built_in("8x8xH100").expect("a legal layer").cost())
}

#[test]
fn a_large_search_is_bounded() {
    let (layer, cost) = large();
    let start = Instant::now();
    let choice = search(&layer.workload(), &cost, &SearchOptions::default());
    println!(
        "64 ranks × 512 experts: {:?}, {} plans priced\n{}",
        start.elapsed(),
        choice.priced,
        choice.explain()
    );
    assert!(choice.priced < 2000);
}

/// Run with `--release --ignored --nocapture` on a quiet machine.
#[test]
#[ignore = "a benchmark: it prints times, which depend on the machine, and asserts nothing"]
fn cuts_for_takes_microseconds() {
    let time = |layer: &Layer, cost: &CostModel, name: &str| {
        let start = Instant::now();
        let choice = search(&layer.workload(), cost, &SearchOptions::default());
        let searched = start.elapsed();
        let mut times: Vec<_> = (0..200)
            .map(|_| {
                let start = Instant::now();
                let table = cuts_for(&choice.decision, &layer.workload(), cost);
                let time = start.elapsed();
                assert_eq!(table.stages(), choice.table.stages());
                time
            })
            .collect();
        times.sort();
        println!(
            "{name}: search {searched:?} ({} plans), {} stages, cuts_for {:?}",
            choice.priced,
            choice.table.stages(),
            times[100]
        );
    };
    let (layer, cost) = large();
    time(&layer, &cost, "64 x 512");
    let built_in = Machine::built_in("8xH800").unwrap().cost();
    // One whose products are priced by tiles.
    let measured = include_str!("../../../bench/runs/2026-11-30-h200-ranks/profile.toml");
    let measured = CostModel::parse(measured).unwrap();
    for (name, experts, top_k, hidden, inner) in
        [("dsv2", 160, 6, 5120, 1536), ("dsv3", 256, 8, 7168, 2048), ("qwen3-30b", 128, 8, 2048, 768)]
    {
        let map = SlotMap::contiguous(experts, 8).unwrap();
        let law = SyntheticRouting { top_k, groups: None, zipf_permille: 500, seed: 3 };
        let counts = law.counts(&map, &[8192; 8]).unwrap();
        let sizes = LayerSizes { hidden, inner, top_k, ..LayerSizes::of(&map, DType::BF16) };
        let layer = Layer { map, counts, shape: LayerSizes { shared_inner: 0, ..sizes }, law };
        time(&layer, &built_in, name);
        time(&layer, &measured, &format!("{name}, H200"));
    }
}
