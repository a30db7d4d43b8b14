//! What lies where in a layer's buffers, on fresh random layers: as a slow and plain reading of the routing says.
//! `EPSMOE_TEST_SEED` repeats a run.

mod world;

use epsmoe_base::{DType, Mix, Stage, env::test_seed};
use epsmoe_plan::*;
use std::ops::Range;
use world::Case;

/// Runs `check` on many random layers; the seed to repeat a failure with is printed before it.
fn for_random_cases(number: u64, check: impl Fn(&Case, &mut Mix)) {
    let seed = test_seed();
    eprintln!("EPSMOE_TEST_SEED={seed}");
    for index in 0..number {
        let mut mix = Mix::keyed(seed, &[index]);
        let case = Case::random(&mut mix);
        eprintln!("case {index}: {case:?}");
        check(&case, &mut mix);
    }
}

#[test]
fn rows_are_conserved_and_parts_tile_their_buffers() {
    /// Every part starts where the one before it ended.
    fn tile(parts: impl Iterator<Item = Range<usize>>, rows: usize) {
        let end = parts.fold(0, |end, part| {
            assert_eq!(part.start, end);
            part.end
        });
        assert_eq!(end, rows);
    }
    for_random_cases(400, |case, mix| {
        let table = case.random_table(mix);
        let traffic = Traffic::of(&case.map, &case.counts(), &table);
        let ranks = || case.map.all_ranks();
        let stages = || (0..table.stages()).map(Stage);
        for rank in ranks() {
            let (sent, received) = (traffic.rows_sent(rank), traffic.rows_received(rank));
            let (by_rank, by_stage) = (
                || ranks().flat_map(|other| stages().map(move |stage| (other, stage))),
                || stages().flat_map(|stage| ranks().map(move |other| (stage, other))),
            );
            tile(by_rank().map(|(other, stage)| traffic.dispatch_send(rank, other, stage)), sent);
            tile(by_rank().map(|(other, stage)| traffic.combine_receive(rank, other, stage)), sent);
            tile(by_stage().map(|(stage, other)| traffic.dispatch_receive(rank, stage, other)), received);
            tile(by_stage().map(|(stage, other)| traffic.combine_send(rank, stage, other)), received);
            tile(stages().map(|stage| traffic.dispatch_receive_stage(rank, stage)), received);
            tile(stages().map(|stage| traffic.combine_send_stage(rank, stage)), received);
            tile(ranks().map(|source| traffic.metadata_receive(rank, source)), received);
            tile(stages().map(|stage| traffic.stage_assignments(rank, stage)), traffic.assignments(rank));
            let local = 0..case.map.local_count(rank);
            tile(
                local.clone().map(|expert| traffic.slot_assignments(rank, expert)),
                traffic.assignments(rank),
            );
            for expert in local {
                let stage = table.stage_of(rank, expert);
                assert!(table.slots_of(rank, stage).contains(&expert));
            }
            for other in ranks() {
                let mut to_other = 0;
                for stage in stages() {
                    let dispatched = case.rows_by(&table, rank, other, stage, <[u32]>::first);
                    assert_eq!(traffic.dispatched(stage, rank, other), dispatched);
                    assert_eq!(traffic.dispatch_receive(other, stage, rank).len(), dispatched);
                    let combined = case.rows_by(&table, rank, other, stage, <[u32]>::last);
                    assert_eq!(traffic.combined(stage, other, rank), combined);
                    assert_eq!(traffic.combine_send(other, stage, rank).len(), combined);
                    to_other += dispatched;
                }
                assert_eq!(traffic.dispatch_send_all(rank, other).len(), to_other);
                assert_eq!(traffic.metadata_receive(other, rank).len(), to_other);
            }
        }
    });
}

#[test]
fn tables_from_every_constructor_are_legal_and_equal_on_all_ranks() {
    for_random_cases(300, |case, mix| {
        let most = case.map.max_local();
        let counts = case.counts();
        let stages = 1 + mix.below(most);
        let mut ends: Vec<usize> = (1..stages).map(|_| mix.below(most + 1)).chain([0, most]).collect();
        ends.sort_unstable();
        let sizes: Vec<usize> = ends.windows(2).map(|ends| ends[1] - ends[0]).collect();
        let tables = [
            Ok(StageTable::serial(&case.map, GemmKind::Dense)),
            StageTable::equal(&case.map, stages, GemmKind::Grouped),
            StageTable::sized(&case.map, &sizes, GemmKind::Grouped),
            StageTable::balanced(&case.map, &counts, stages, GemmKind::Grouped),
            Policy::default().table(&case.map, &counts),
            Policy { stages: Some(Stages::Sizes(sizes)), ..Policy::default() }.table(&case.map, &counts),
        ];
        for table in tables {
            let table = table.unwrap();
            table.validate(&case.map).unwrap();
            assert_eq!(parse_order(&order_text(&table.order)).unwrap(), table.order);
            let order = world::random_order(table.stages(), mix);
            table.with_order(order).unwrap().validate(&case.map).unwrap();
        }
        assert!(StageTable::equal(&case.map, most + 1, GemmKind::Grouped).is_err());
        // Another rank works from the same bytes.
        let other = case.counts();
        let digest = |counts| Policy::default().table(&case.map, counts).unwrap().digest();
        assert_eq!(digest(&counts), digest(&other));
    });
}

#[test]
fn the_worst_case_holds_any_routing() {
    for_random_cases(200, |case, mix| {
        let table = case.random_table(mix);
        let traffic = Traffic::of(&case.map, &case.counts(), &table);
        let tokens = case.routings.iter().map(Routing::tokens).max().unwrap_or(0);
        let sizes = LayerSizes { top_k: case.top_k, ..LayerSizes::of(&case.map, DType::F32) };
        assert!(Capacity::worst_case(tokens, &sizes).fits(&[&traffic]));
    });
}
