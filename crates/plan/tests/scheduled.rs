//! The auto schedule: ranks decide alike, a wrong cost model is corrected, and no more than it should be.
//! `EPSMOE_TEST_SEED` repeats a run.

#[allow(dead_code, reason = "each test uses a part of it")]
mod costs;

use costs::{Layer as Case, for_random_cases, random_cost};
use epsmoe_base::{DType, Layer, Mix, Rank};
use epsmoe_plan::*;
use std::cell::RefCell;
use std::sync::Arc;

/// MoE layers of a step.
const LAYERS: usize = 5;

/// The ranks of a world whose machine costs `truth`, and what they believe.
struct World<'a> {
    case: &'a Case,
    truth: &'a CostModel,
    ranks: Vec<AutoPlanner>,
}

impl<'a> World<'a> {
    fn new(case: &'a Case, truth: &'a CostModel, believed: &CostModel) -> Self {
        let believed = Arc::new(believed.clone());
        let planner = |_| {
            let options = SearchOptions { max_stages: 6, ..SearchOptions::default() };
            AutoPlanner::new(case.shape, Arc::clone(&believed), options)
        };
        World { case, truth, ranks: case.map.all_ranks().map(planner).collect() }
    }

    /// A step of all ranks; returns the last layer's time on the true machine.
    fn step(&mut self) -> u64 {
        let (mut spans, mut time) = (vec![Vec::new(); self.ranks.len()], 0);
        for layer in (0..LAYERS).map(Layer) {
            let feedback: Vec<Feedback> = self.ranks.iter_mut().filter_map(Planner::take_feedback).collect();
            let messages = feedback
                .iter()
                .map(|feedback| Feedback::decode(&feedback.encode()).expect("a whole message"));
            assert_eq!(messages.collect::<Vec<_>>(), feedback);
            let (map, counts) = (&self.case.map, std::slice::from_ref(&self.case.counts));
            let next = |rank: &mut AutoPlanner| table(rank, layer, map, counts, &feedback);
            let tables: Vec<StageTable> = self.ranks.iter_mut().map(next).collect();
            assert!(tables.iter().all(|table| *table == tables[0]), "ranks plan alike");
            assert!(self.ranks.iter().all(|rank| rank.digest() == self.ranks[0].digest()), "and know it");
            tables[0].validate(&self.case.map).expect("a legal table");
            let real = simulate(&tables[0], &self.case.workload(), self.truth);
            time = real.layer_ns;
            for span in real.timeline.spans {
                spans[span.rank.0].push(Span { layer: Some(layer), ..span });
            }
        }
        for (rank, spans) in spans.iter().enumerate() {
            self.ranks[rank].observe(Rank(rank), spans);
        }
        time
    }
}

fn table(
    planner: &mut AutoPlanner,
    layer: Layer,
    map: &SlotMap,
    counts: &[LayerHistograms],
    feedback: &[Feedback],
) -> StageTable {
    let LayerPlan { tables } = planner.plan(layer, map, counts, feedback).expect("a plan");
    let [table] = tables.try_into().expect("one batch");
    table
}

fn report(planner: &AutoPlanner) -> ScheduleReport {
    planner.report().expect("auto has a report")
}

/// A layer on several ranks that is worth planning.
fn case(mix: &mut Mix) -> Case {
    loop {
        let case = Case::random(mix, 4, 8);
        let tokens = case.map.all_ranks().map(|rank| case.counts.of(rank).tokens).sum::<u32>();
        if case.map.ranks() > 1 && tokens > 200 {
            return case;
        }
    }
}

/// One share: the others are the search's business.
fn machine(mix: &mut Mix) -> CostModel {
    let mut cost = random_cost(mix);
    cost.shares.truncate(1);
    cost
}

#[test]
fn a_wrong_model_is_corrected_within_fifty_layers() {
    let behind = RefCell::new(Vec::new());
    for_random_cases(40, |mix| {
        let (case, truth) = (case(mix), machine(mix));
        // A link that is believed four times too fast, products twice too slow.
        let wrong = Correction { link: 250, grouped: 2000, dense: 2000, rows: 1000 };
        let mut world = World::new(&case, &truth, &truth.corrected(&wrong));
        let last = (0..50 / LAYERS).map(|_| world.step()).last().unwrap();
        let options = SearchOptions { max_stages: 6, ..SearchOptions::default() };
        let right = search(&case.workload(), &truth, &options).predicted.layer_ns;
        let percent = last.saturating_sub(right) * 100 / right;
        eprintln!("{percent} % behind; {:?}", report(&world.ranks[0]).correction);
        behind.borrow_mut().push(percent);
    });
    // Over a thousand cases 97 % were less than 5 % behind, and the worst 13 %: cuts that follow every layer's own
    // counts within microseconds are not always those of a whole search.
    let behind = behind.into_inner();
    let far = behind.iter().filter(|&&percent| percent >= 5).count();
    assert!(far * 6 <= behind.len() && behind.iter().all(|&percent| percent < 25), "{behind:?}");
}

#[test]
fn a_right_model_is_left_alone() {
    for_random_cases(40, |mix| {
        let (case, truth) = (case(mix), machine(mix));
        let mut world = World::new(&case, &truth, &truth);
        let times: Vec<u64> = (0..STEPS).map(|_| world.step()).collect();
        let settled = &times[STEPS - 4..];
        assert!(settled.windows(2).all(|pair| pair[0] == pair[1]), "{times:?}");
        let report = report(&world.ranks[0]);
        assert_eq!((report.correction, report.searches, report.mispredicted), (Correction::default(), 1, 0));
        assert!(report.sampled > 0 && report.layers == (STEPS * LAYERS) as u64);
    });
}

/// Until every plan that a search leaves has been tried on layers.
const STEPS: usize = 14;

/// Products that are slower beside transfers are no factor of anything, so corrections make all plans dearer alike: layers tell.
#[test]
fn layers_say_which_plan_is_best() {
    let behind = RefCell::new(Vec::new());
    for_random_cases(60, |mix| {
        let (case, believed) = (case(mix), machine(mix));
        let mut truth = believed.clone();
        truth.shares[0].compute_beside += 1500;
        let mut world = World::new(&case, &truth, &believed);
        let last = (0..3 * STEPS).map(|_| world.step()).last().unwrap();
        let options = SearchOptions { max_stages: 1, ..SearchOptions::default() };
        let one_stage = search(&case.workload(), &truth, &options).predicted.layer_ns;
        behind.borrow_mut().push(last.saturating_sub(one_stage) * 1000 / one_stage);
    });
    let mut behind = behind.into_inner();
    behind.sort_unstable();
    eprintln!("{behind:?} permille behind one stage");
    assert!(behind[behind.len() * 9 / 10] <= 10, "{behind:?}");
}

#[test]
fn new_buckets_are_decided_after_the_step() {
    let mix = &mut Mix::new(5);
    let truth = machine(mix);
    let map = SlotMap::contiguous(8, 2).unwrap();
    let law = SyntheticRouting { top_k: 2, groups: None, zipf_permille: 0, seed: 1 };
    let sizes = LayerSizes { hidden: 1024, inner: 512, top_k: 2, ..LayerSizes::of(&map, DType::BF16) };
    let shape = LayerSizes { shared_inner: 512, ..sizes };
    let mut planner = AutoPlanner::new(shape, Arc::new(truth), SearchOptions::default());
    let counts = |tokens| law.counts(&map, &[tokens, tokens]).unwrap();
    let (few, many) = (counts(16), counts(2048));
    table(&mut planner, Layer(0), &map, &[many], &[]);
    assert_eq!(report(&planner).searches, 1, "the first layer waits for its search");
    let shared = planner.ahead(&map).unwrap().shared;
    let next = table(&mut planner, Layer(1), &map, std::slice::from_ref(&few), &[]);
    assert_eq!((report(&planner).searches, next.shared), (1, shared), "the next follows it");
    planner.observe(Rank(0), &[]);
    assert_eq!(report(&planner).searches, 2);
    table(&mut planner, Layer(0), &map, std::slice::from_ref(&few), &[]);
    planner.observe(Rank(0), &[]);
    assert_eq!(report(&planner).searches, 2);
    let text = report(&planner).to_string();
    assert!(text.starts_with("3 MoE layers planned by 2 decisions; 0 of 0 predictions"), "{text}");
    assert!(text.contains("layers of 2048 tokens or a few more on a rank"), "{text}");
}

/// A link is as slow as the rank says that waited least, whoever that is; everything else is what all ranks say.
#[test]
fn every_rank_is_heard() {
    let mix = &mut Mix::new(3);
    let (case, truth) = (case(mix), machine(mix));
    let look = |measured_ns| PredictedMeasured { predicted_ns: 1_000_000, measured_ns };
    let rank = |link, product, rows| Feedback {
        link: look(link),
        grouped: look(product),
        dense: look(product),
        rows: look(rows),
        ..Feedback::default()
    };
    let (a, b, c) = (
        rank(2_600_000, 1_000_000, 1_000_000),
        rank(1_800_000, 2_500_000, 1_000_000),
        rank(2_200_000, 1_000_000, 2_800_000),
    );
    let learned = |feedback: &[Feedback]| {
        let mut planner = AutoPlanner::new(case.shape, Arc::new(truth.clone()), SearchOptions::default());
        table(&mut planner, Layer(0), &case.map, std::slice::from_ref(&case.counts), feedback);
        report(&planner).correction
    };
    // Half way from 1 to 1.8, to (1 + 2.5 + 1) / 3 = 1.5 and to (1 + 1 + 2.8) / 3 = 1.6: less than a step may be at most, so
    // that another rank's link would tell.
    let all = Correction { link: 1400, grouped: 1250, dense: 1250, rows: 1300 };
    for order in [[a, b, c], [a, c, b], [b, a, c], [b, c, a], [c, a, b], [c, b, a]] {
        assert_eq!(learned(&order), all);
    }
    assert_ne!(learned(&[a]), all);
}

#[test]
fn the_shared_expert_is_where_the_decision_puts_it() {
    let mut places = Vec::new();
    for seed in 0..60 {
        let mix = &mut Mix::new(seed);
        let (case, truth) = (case(mix), machine(mix));
        let shape = LayerSizes { shared_inner: 256 + mix.below(4000), ..case.shape };
        let workload = Workload { shape: &shape, ..case.workload() };
        let decided = search(&workload, &truth, &SearchOptions::default()).decision.shared;
        let mut planner = AutoPlanner::new(shape, Arc::new(truth), SearchOptions::default());
        let counts = std::slice::from_ref(&case.counts);
        let first = table(&mut planner, Layer(0), &case.map, counts, &[]);
        assert_eq!(first.shared, SharedExpert::BesideCountExchange, "before anything is decided");
        assert_eq!(planner.ahead(&case.map).unwrap().shared, decided, "seed {seed}");
        let next = table(&mut planner, Layer(1), &case.map, counts, &[]);
        assert_eq!(next.shared, decided, "seed {seed}");
        if !places.contains(&decided) {
            places.push(decided);
        }
    }
    assert!(places.len() > 1, "{places:?}");
}
