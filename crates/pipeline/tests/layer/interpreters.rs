//! One plan, two interpreters: what the lanes did, in order, is what the simulator priced, for random tables, maps,
//! counts and places of the shared expert, in a world of one rank too.

use crate::world::{Case, Got, Setup, random_table, run};
use epsmoe_base::{DType, Lane, Mix, Phase, Rank, Stage, env::test_seed};
use epsmoe_plan::*;
use std::collections::BTreeSet;
use std::time::Duration;

/// An operation of one lane: its name, what it is for, and its stage.
type Step = (String, Option<Phase>, Option<Stage>);

fn ran(got: &Got, lane: Lane) -> Vec<Step> {
    let here = got.records.iter().filter(|record| record.lane == lane && record.place.layer.is_some());
    here.map(|record| (record.name.to_string(), record.place.phase, record.place.stage)).collect()
}

/// What was priced: one step for every operation.
fn priced(steps: &[Planned], rank: Rank, lane: Lane) -> Vec<Step> {
    let here = steps.iter().filter(|step| (step.rank, step.lane) == (rank, Some(lane)));
    here.flat_map(|step| step.work.iter().map(|_| (step.name.to_string(), step.phase, step.stage))).collect()
}

#[test]
fn what_ran_is_what_was_priced() {
    let seed = test_seed();
    let mut places = BTreeSet::new();
    let (mut scattered, mut without_tokens, mut without_rows) = (0, 0, 0);
    for index in 0..60 {
        let mut mix = Mix::keyed(seed, &[index]);
        // No gate on the shared expert, and experts that multiply: nothing prices the rest.
        let of = Case::random(mix.next_u64(), DType::F32, 1);
        let case = Case { shared_gate: false, identities: 0, scaled_inputs: false, ..of };
        let map = &case.map;
        let table = random_table(map, &mut mix);
        let shown = format!("seed {seed}, case {index}, {case:?}\n{table}");
        let setup = Setup { table: Some(table.clone()), ..Setup::serial() };
        let gots: Vec<Got> = run(&case, &setup)
            .into_iter()
            .map(|got| got.unwrap_or_else(|fault| panic!("{fault}: {shown}")))
            .collect();
        let routings: Vec<Routing> = gots.iter().map(|got| got.routing.clone()).collect();
        let counts = LayerHistograms::of_routings(map, case.router.top_k, &routings).expect("true counts");
        let sizes = case.sizes();
        let workload = Workload { map, counts: &counts, shape: &sizes };
        let steps = planned(&table, &workload, &CostModel::unmeasured(DType::F32, 1, 0));
        for (rank, got) in map.all_ranks().zip(&gots) {
            for lane in Lane::ALL {
                assert_eq!(ran(got, lane), priced(&steps, rank, lane), "{rank}, {lane}: {shown}");
            }
            assert_eq!(last_sum(&steps, rank), sum_bytes(&case, &routings[rank.0]), "{rank}: {shown}");
        }
        let contiguous = SlotMap::contiguous(map.experts(), map.ranks()).expect("at least an expert a rank");
        scattered += usize::from(map.slot_table() != contiguous.slot_table());
        without_tokens += usize::from(map.ranks() > 1 && case.tokens.contains(&0));
        let traffic = Traffic::of(map, &counts, &table);
        without_rows += usize::from(map.all_ranks().any(|rank| traffic.rows_received(rank) == 0));
        if case.shared.is_some() {
            places.insert((map.ranks() == 1, format!("{}", table.shared)));
        }
    }
    // Every place was there, and most of them in a world of one rank too; so were maps in any order, ranks that send
    // nothing and ranks that get nothing.
    assert!(places.len() >= 6, "seed {seed}: {places:?}");
    let seen = [scattered, without_tokens, without_rows];
    assert!(seen.iter().all(|&cases| cases > 0), "seed {seed}: {seen:?}");
}

/// Bytes that the last sum of a rank was priced for.
fn last_sum(steps: &[Planned], rank: Rank) -> u64 {
    let of_rank = steps.iter().rfind(|step| step.rank == rank && step.phase == Some(Phase::Sum));
    match of_rank.map(|step| step.work.as_slice()) {
        Some([Work::Reduce(bytes)]) => *bytes,
        other => panic!("{other:?} is no sum"),
    }
}

/// Bytes that it reads: a row from every rank that a token goes to, and the shared expert's.
fn sum_bytes(case: &Case, routing: &Routing) -> u64 {
    let slots = routing.assign(&case.map).expect("experts of the map");
    let rows: usize = (0..slots.tokens()).map(|token| slots.rows(token).count()).sum();
    let shared = if case.shared.is_some() { slots.tokens() } else { 0 };
    ((rows + shared) * case.hidden * case.dtype.bytes()) as u64
}

/// Beside the count exchange means while others are waited for: a rank whose counts are there computes its shared expert
/// before the last rank has come at all.
#[test]
fn the_shared_expert_does_not_wait_for_other_ranks() {
    const LATE: Duration = Duration::from_millis(300);
    let case = Case { layers: 1, ..Case::fixed() };
    let shared = Some(SharedExpert::BesideCountExchange);
    let policy = Policy { shared, schedule: Schedule::Staged, ..Policy::default() };
    let gots = run(&case, &Setup { late: Some((1, LATE)), ..Setup::new(policy) });
    let [early, late] = [0, 1].map(|rank| gots[rank].as_ref().expect("no fault"));
    let of_shared = early.records.iter().filter(|record| record.place.phase == Some(Phase::Shared));
    let ends: Vec<u64> = of_shared.map(|record| record.end_ns).collect();
    let came = late.records.iter().map(|record| record.start_ns).min();
    assert_eq!(ends.len(), 2, "up and down");
    assert!(ends.iter().all(|&end| Some(end) < came), "{ends:?}, but rank 1 came at {came:?}");
}
