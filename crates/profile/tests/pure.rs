//! What can be checked without a clock: what spans say about costs, and which files are refused.

use epsmoe_base::{DType, Mix, Rank, Stage};
use epsmoe_device::cpu::gemm::Isa;
use epsmoe_plan::{
    CostModel, GemmKind, HostCost, LayerHistograms, Piecewise, Routing, Sample, ShareCost, SlotMap,
    StageTable, SyntheticRouting, TokenHistograms, Work, Workload, planned, simulate,
};
use epsmoe_profile::{Fingerprint, LayerRun, RankHost, RigShape, load, samples, store};

const SEED: u64 = 11;

/// A layer to simulate.
struct Case {
    what: String,
    shape: RigShape,
    ranks: usize,
    routings: Vec<Routing>,
    table: StageTable,
}

/// Layers of one and two ranks, even and skewed, in one to eight stages with either kernel.
fn cases(number: usize) -> Vec<Case> {
    (0..number).map(|index| case(&mut Mix::keyed(SEED, &[index as u64]))).collect()
}

fn case(mix: &mut Mix) -> Case {
    let shared_inner = [0, 512][mix.below(2)];
    let shape = RigShape { hidden: 512, inner: 256, experts: 16, top_k: 4, shared_inner };
    let ranks = 1 + mix.below(2);
    let map = SlotMap::contiguous(shape.experts, ranks).expect("ranks that hold experts");
    let zipf_permille = [0, 1200][mix.below(2)];
    let law = SyntheticRouting { top_k: shape.top_k, groups: None, zipf_permille, seed: mix.next_u64() };
    let tokens = 16 << mix.below(6);
    let routings: Vec<Routing> = map
        .all_ranks()
        .map(|rank| law.routing(&map, rank, tokens).expect("a law of these experts"))
        .collect();
    let (stages, kind) = (1 << mix.below(4), [GemmKind::Grouped, GemmKind::Dense][mix.below(2)]);
    let table = StageTable::equal(&map, stages, kind).expect("no more stages than experts");
    let what = format!("{ranks} ranks of {tokens} tokens, zipf {zipf_permille}, {stages} stages, {kind}");
    Case { what, shape, ranks, routings, table }
}

fn counts(case: &Case, map: &SlotMap) -> LayerHistograms {
    let ranks = case
        .routings
        .iter()
        .map(|routing| TokenHistograms::of(&routing.assign(map).expect("every expert has a slot")))
        .collect();
    LayerHistograms::new(map, case.shape.top_k, ranks).expect("counts of this map")
}

/// Figures in which every kind of work has a price of its own.
fn model(concurrent: u32) -> CostModel {
    let mut cost = CostModel::unmeasured(DType::F32, 1, concurrent);
    cost.host = HostCost::default();
    cost.shares = vec![ShareCost::FREE];
    cost.link.near = Piecewise::flat(0);
    cost
}

fn simulated(case: &Case, cost: &CostModel) -> (LayerRun, Vec<Sample>) {
    let map = SlotMap::contiguous(case.shape.experts, case.ranks).expect("ranks that hold experts");
    let counts = counts(case, &map);
    let shape = case.shape.layer(&map, DType::F32);
    let workload = Workload { map: &map, counts: &counts, shape: &shape };
    let simulation = simulate(&case.table, &workload, cost);
    let mut timeline = simulation.timeline;
    // A dense stage is one span of the simulation, and one for each expert of a run.
    if case.table.gemm.contains(&GemmKind::Dense) {
        let steps = planned(&case.table, &workload, cost);
        let mut spans = Vec::new();
        for rank in map.all_ranks() {
            for lane in epsmoe_base::Lane::ALL {
                let on_lane = timeline.spans.iter().filter(|span| (span.rank, span.lane) == (rank, lane));
                let works = steps.iter().filter(|step| (step.rank, step.lane) == (rank, Some(lane)));
                for (span, step) in on_lane.zip(works) {
                    let mut start = span.start_ns;
                    for work in &step.work {
                        let ns = match work {
                            Work::Gemm { rows, columns, depth, .. } => {
                                cost.dense.product(*columns, *depth, 32_000).op_ns(rows.iter().copied())
                            }
                            _ => span.duration_ns(),
                        };
                        spans.push(epsmoe_plan::Span { start_ns: start, end_ns: start + ns, ..span.clone() });
                        start += ns;
                    }
                }
            }
        }
        timeline.spans = spans;
    }
    let run = LayerRun {
        timeline,
        hosts: vec![RankHost::default(); case.ranks],
        layer_ns: simulation.layer_ns,
        weights: 0,
        bits: 0,
    };
    let samples = samples(&run, &case.table, &workload, cost);
    (run, samples)
}

#[test]
fn the_spans_of_a_simulated_layer_say_what_its_work_costs() {
    // With a processor for everybody, an operation's time is its price.
    let cost = model(64);
    let cases = cases(40);
    for case in &cases {
        let (_, samples) = simulated(case, &cost);
        assert!(!samples.is_empty(), "{}", case.what);
        for Sample { work, ns } in &samples {
            let Work::Gemm { kind, rows, columns, depth } = work else { continue };
            let price = cost.gemm(*kind).product(*columns, *depth, 32_000).op_ns(rows.iter().copied());
            // What a lane needs between two operations belongs to the second.
            assert!(ns.abs_diff(price) <= 8_000, "{ns} ns for {work:?}, {price} expected: {}", case.what);
        }
    }
}

#[test]
fn what_others_take_of_the_processor_is_no_part_of_a_price() {
    // Two ranks of one thread on one processor: everything takes longer, and costs the same.
    let (free, contended) = (model(64), model(1));
    let cases = cases(60);
    let case = cases.iter().find(|case| case.ranks == 2 && !case.table.gemm.contains(&GemmKind::Dense));
    let case = case.expect("such a case");
    let (quick, all) = simulated(case, &free);
    let (slow, samples) = simulated(case, &contended);
    assert!(slow.layer_ns > quick.layer_ns * 5 / 4, "{} ns on one processor", slow.layer_ns);
    let products = |samples: &[Sample]| -> Vec<Sample> {
        samples.iter().filter(|sample| matches!(sample.work, Work::Gemm { .. })).cloned().collect()
    };
    let (all, products) = (products(&all), products(&samples));
    // Those that hosts and copies disturbed say nothing.
    assert!((1..all.len()).contains(&products.len()), "{} of {} products", products.len(), all.len());
    let (mut shared, mut alone) = (0, 0);
    for Sample { work, ns } in &products {
        let Work::Gemm { kind, rows, columns, depth } = work else { continue };
        let price = contended.gemm(*kind).product(*columns, *depth, 32_000).op_ns(rows.iter().copied());
        // What bursts took is taken back as well; what a lane needs between two operations belongs to the second.
        assert!(
            ns.abs_diff(price) <= price / 20 + 8_000,
            "{ns} ns for {work:?}, {price} expected: {}",
            case.what
        );
        (shared, alone) = (shared + ns, alone + price);
    }
    assert!(shared.abs_diff(alone) < alone / 10, "products cost {shared} ns there, {alone} alone");
}

#[test]
fn spans_of_another_table_say_nothing() {
    let cost = model(64);
    let cases = cases(20);
    let case = cases.iter().find(|case| case.ranks == 2 && case.table.stages() > 1).expect("such a case");
    let (run, _) = simulated(case, &cost);
    let map = SlotMap::contiguous(case.shape.experts, case.ranks).unwrap();
    let counts = counts(case, &map);
    let shape = case.shape.layer(&map, DType::F32);
    let workload = Workload { map: &map, counts: &counts, shape: &shape };
    let other = StageTable::serial(&map, GemmKind::Grouped);
    assert_eq!(samples(&run, &other, &workload, &cost), []);
    assert_eq!(run.timeline.spans.iter().filter(|span| span.rank == Rank(2)).count(), 0);
    assert!(run.timeline.spans.iter().any(|span| span.stage == Some(Stage(1))));
}

#[test]
fn files_of_other_machines_versions_and_kinds_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("profile.toml");
    let fingerprint = Fingerprint::of_cpu(2, 1, Isa::Scalar, DType::F32);
    let cost = CostModel {
        machine: fingerprint.machine(),
        kernels: fingerprint.kernels(),
        ..CostModel::unmeasured(DType::F32, 1, 2)
    };
    store(&path, &cost, &["date: today".into(), "command: epsmoe profile".into()]).unwrap();
    let text = std::fs::read_to_string(&path).unwrap();
    assert!(text.starts_with("# date: today\n# command: epsmoe profile\n"), "{text}");
    assert_eq!(load(&path, &fingerprint).unwrap(), cost);
    let refused = |text: &str, wanted: &Fingerprint| {
        std::fs::write(&path, text).unwrap();
        load(&path, wanted).unwrap_err().to_string()
    };
    let elsewhere = Fingerprint { cpu: "abacus".into(), ..fingerprint.clone() };
    assert!(refused(&text, &elsewhere).contains("but this is abacus"));
    let narrow = Fingerprint { dtype: DType::BF16, ..fingerprint.clone() };
    assert!(refused(&text, &narrow).contains("measure again"));
    let old = text.replacen("version = ", "version = 9", 1);
    assert!(refused(&old, &fingerprint).contains("this program reads version"));
    for wrong in ["", "version = 2", "no table", &text.replacen("op_ns", "op_nanoseconds", 1)] {
        let message = refused(wrong, &fingerprint);
        assert!(message.contains("profile.toml"), "{message}");
    }
    let slow = text.replacen("flops_per_second = ", "flops_per_second = 0 # ", 1);
    assert!(refused(&slow, &fingerprint).contains("a rate of 0"));
}
