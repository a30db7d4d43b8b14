//! What can be checked without a clock: which cases a seed draws, what spans say about costs, how figures are summed up,
//! and which files are refused.

use epsmoe_base::{DType, Rank, Stage};
use epsmoe_device::cpu::gemm::Isa;
use epsmoe_plan::{
    CostModel, GemmKind, HostCost, LayerHistograms, Piecewise, Placement, Sample, ShareCost, StageTable,
    TokenHistograms, Work, Workload, planned, simulate,
};
use epsmoe_profile::{
    Case, Fingerprint, LayerRun, Outcome, Parts, RankHost, Ratio, Regret, Spread, cases, load, samples, store,
};

/// Never the seed that the recorded figures come from.
const SEED: u64 = 11;

#[test]
fn cells_follow_from_the_seed_alone() {
    let words = |cases: Vec<Case>| -> Vec<String> { cases.into_iter().map(|case| case.what).collect() };
    let (all, some) = (cases(SEED, 60).unwrap(), cases(SEED, 20).unwrap());
    for (case, again) in all.iter().zip(&some) {
        assert_eq!(case.what, again.what, "a case does not depend on how many there are");
        assert_eq!((&case.table, &case.routings), (&again.table, &again.routings));
    }
    assert_ne!(words(cases(SEED + 1, 20).unwrap()), words(some));
    for case in &all {
        let placement = Placement::new(case.shape.experts, case.ranks).unwrap();
        case.table.validate(&placement).unwrap();
        assert_eq!(case.routings.len(), case.ranks);
        assert!(case.ranks > 1 || case.link.is_none(), "one rank has no link: {}", case.what);
        let hot = case.what.contains("hot expert");
        let counts = counts(case, &placement);
        let busiest = (0..case.shape.experts).map(|expert| counts.copies_of(expert)).max().unwrap();
        let tokens: usize = case.routings.iter().map(|routing| routing.tokens()).sum();
        assert!(!hot || busiest == tokens, "every token visits the hot expert: {}", case.what);
    }
    for (what, wanted) in [("1 rank(s)", 5), ("2 rank(s)", 10), ("4 rank(s)", 5), ("hot", 5), ("zipf", 10)] {
        let number = all.iter().filter(|case| case.what.contains(what)).count();
        assert!(number >= wanted, "{number} cases with {what}");
    }
}

fn counts(case: &Case, placement: &Placement) -> LayerHistograms {
    let ranks = case.routings.iter().map(|routing| TokenHistograms::of(placement, routing)).collect();
    LayerHistograms::new(placement, case.shape.top_k, ranks).expect("counts of this placement")
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
    let placement = Placement::new(case.shape.experts, case.ranks).expect("ranks that hold experts");
    let counts = counts(case, &placement);
    let shape = case.shape.layer(&placement, DType::F32);
    let workload = Workload { placement: &placement, counts: &counts, shape: &shape };
    let simulation = simulate(&case.table, 0, &workload, cost);
    let mut timeline = simulation.timeline;
    // A dense stage is one span of the simulation, and one for each expert of a run.
    if case.table.gemm.contains(&GemmKind::Dense) {
        let steps = planned(&case.table, &workload, cost);
        let mut spans = Vec::new();
        for rank in placement.all_ranks() {
            for lane in epsmoe_base::Lane::ALL {
                let on_lane = timeline.spans.iter().filter(|span| (span.rank, span.lane) == (rank, lane));
                let works = steps.iter().filter(|step| (step.rank, step.lane) == (rank, Some(lane)));
                for (span, step) in on_lane.zip(works) {
                    let mut start = span.start_ns;
                    for work in &step.work {
                        let ns = match work {
                            Work::Gemm { rows, columns, depth, .. } => {
                                cost.dense.product(*columns, *depth, 4).op_ns(rows.iter().copied())
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
    let cases = cases(SEED, 40).unwrap();
    for case in cases.iter().filter(|case| case.link.is_none()) {
        let (_, samples) = simulated(case, &cost);
        assert!(!samples.is_empty(), "{}", case.what);
        for Sample { work, ns } in &samples {
            let Work::Gemm { kind, rows, columns, depth } = work else { continue };
            let price = cost.gemm(*kind).product(*columns, *depth, 4).op_ns(rows.iter().copied());
            // What a lane needs between two operations belongs to the second.
            assert!(ns.abs_diff(price) <= 8_000, "{ns} ns for {work:?}, {price} expected: {}", case.what);
        }
    }
}

#[test]
fn what_others_take_of_the_processor_is_no_part_of_a_price() {
    // Two ranks of one thread on one processor: everything takes longer, and costs the same.
    let (free, crowded) = (model(64), model(1));
    let cases = cases(SEED, 300).unwrap();
    let case = cases
        .iter()
        .find(|case| case.ranks == 2 && case.link.is_none() && !case.table.gemm.contains(&GemmKind::Dense));
    let case = case.expect("such a case");
    let (quick, all) = simulated(case, &free);
    let (slow, samples) = simulated(case, &crowded);
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
        let price = crowded.gemm(*kind).product(*columns, *depth, 4).op_ns(rows.iter().copied());
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
    let cases = cases(SEED, 60).unwrap();
    let case = cases.iter().find(|case| case.ranks == 2 && case.table.stages() > 1).expect("such a case");
    let (run, _) = simulated(case, &cost);
    let placement = Placement::new(case.shape.experts, case.ranks).unwrap();
    let counts = counts(case, &placement);
    let shape = case.shape.layer(&placement, DType::F32);
    let workload = Workload { placement: &placement, counts: &counts, shape: &shape };
    let other = StageTable::serial(&placement, GemmKind::Grouped);
    assert_eq!(samples(&run, &other, &workload, &cost), []);
    assert_eq!(run.timeline.spans.iter().filter(|span| span.rank == Rank(2)).count(), 0);
    assert!(run.timeline.spans.iter().any(|span| span.stage == Some(Stage(1))));
}

#[test]
fn ratios_are_of_pairs() {
    let others: Vec<u64> = (1..=20).map(|round| round * 1000).collect();
    let times: Vec<u64> = others.iter().map(|time| time * 11 / 10).collect();
    let ratio = Ratio::of(&times, &others);
    assert_eq!(
        (ratio.median, ratio.interval),
        (1100, (1100, 1100)),
        "what slows both of a pair changes nothing"
    );
    // Of twenty pairs the median lies between the sixth and the fifteenth.
    let rising: Vec<u64> = (0..20).map(|round| 1000 + round).collect();
    let ratio = Ratio::of(&rising, &[1000; 20]);
    assert_eq!((ratio.median, ratio.interval), (1009, (1005, 1014)));
    assert_eq!(Ratio::of(&[3], &[2]), Ratio { median: 1500, interval: (1500, 1500) });
    assert_eq!(Ratio::of(&[], &[]).median, 1000);
    let over_one_stage = ratio;
    let regret = |against_best| Regret { what: String::new(), against_best, stages: 1, over_one_stage };
    assert_eq!([regret(1000).regret(), regret(1042).regret()], [0, 42]);
}

#[test]
fn errors_are_summed_up_by_rank() {
    let spread = Spread::of((1..=10).rev().map(|error| error * 10));
    assert_eq!((spread.cases, spread.median, spread.p90, spread.worst), (10, 60, 100, 100));
    assert_eq!(Spread::of([]).cases, 0);
    let outcome = |predicted_ns, spread| Outcome {
        what: String::new(),
        predicted_ns,
        measured_ns: 1000,
        low_ns: 990,
        spread,
        repeats: 15,
        predicted: Parts::default(),
        measured: Parts::default(),
    };
    assert_eq!([outcome(900, 0).error(), outcome(1300, 0).error()], [100, 300]);
    assert!(outcome(0, 40).is_steady() && !outcome(0, 41).is_steady());
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
