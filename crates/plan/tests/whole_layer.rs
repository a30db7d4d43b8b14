//! Whole layers on simulated ranks: what the maps and ranges do end to end is what a slow and plain reading of
//! the routing says, on fresh random inputs. `EPSMOE_TEST_SEED` repeats a run.

mod world;

use epsmoe_base::{Mix, Rank, Stage, env::test_seed};
use epsmoe_plan::*;
use std::ops::Range;
use world::{Case, Run, plain_sums};

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
fn every_token_meets_each_of_its_experts_once_and_the_sums_come_home() {
    for_random_cases(600, |case, mix| {
        let table = case.random_table(mix);
        let run = Run::new(&case.placement, &case.routings, &table).unwrap();
        let (sums, mut met) = run.execute();
        assert_eq!(sums, plain_sums(case), "under\n{table}");
        met.sort_unstable();
        assert_eq!(met, case.pairs());
    });
}

#[test]
fn cuts_and_orders_change_neither_sums_nor_packed_rows() {
    for_random_cases(150, |case, mix| {
        let run = |table: &StageTable| Run::new(&case.placement, &case.routings, table).unwrap();
        let serial = run(&StageTable::serial(&case.placement, GemmKind::Grouped));
        for _ in 0..4 {
            let table = case.random_table(mix);
            let staged = run(&table);
            assert_eq!(staged.execute().0, serial.execute().0, "under\n{table}");
            for rank in case.placement.all_ranks() {
                for other in case.placement.all_ranks() {
                    assert_eq!(staged.traffic.send_rows(rank, other), serial.traffic.send_rows(rank, other));
                    assert_eq!(
                        staged.traffic.record_rows(rank, other),
                        serial.traffic.record_rows(rank, other)
                    );
                }
            }
        }
    });
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
        let Run { traffic, .. } = Run::new(&case.placement, &case.routings, &table).unwrap();
        let ranks = || case.placement.all_ranks();
        let stages = || (0..table.stages()).map(Stage);
        for rank in ranks() {
            let (sent, received) = (traffic.rows_sent(rank), traffic.rows_received(rank));
            let (by_rank, by_stage) = (
                || ranks().flat_map(|other| stages().map(move |stage| (other, stage))),
                || stages().flat_map(|stage| ranks().map(move |other| (stage, other))),
            );
            tile(by_rank().map(|(other, stage)| traffic.send_range(rank, other, stage)), sent);
            tile(by_rank().map(|(other, stage)| traffic.home_range(rank, other, stage)), sent);
            tile(by_stage().map(|(stage, other)| traffic.receive_range(rank, stage, other)), received);
            tile(by_stage().map(|(stage, other)| traffic.combine_range(rank, stage, other)), received);
            tile(stages().map(|stage| traffic.receive_stage(rank, stage)), received);
            tile(stages().map(|stage| traffic.combine_stage(rank, stage)), received);
            tile(ranks().map(|source| traffic.record_rows(rank, source)), received);
            tile(stages().map(|stage| traffic.stage_copies(rank, stage)), traffic.copies(rank));
            let local = 0..case.placement.local_count(rank);
            tile(local.clone().map(|expert| traffic.expert_copies(rank, expert)), traffic.copies(rank));
            for expert in local {
                let stage = table.stage_of(rank, expert);
                assert!(table.experts_of(rank, stage).contains(&expert));
            }
            for other in ranks() {
                let mut to_other = 0;
                for stage in stages() {
                    let dispatched = case.rows_by(&table, rank, other, stage, |experts| experts.first());
                    assert_eq!(traffic.dispatched(stage, rank, other), dispatched);
                    assert_eq!(traffic.receive_range(other, stage, rank).len(), dispatched);
                    let combined = case.rows_by(&table, rank, other, stage, |experts| experts.last());
                    assert_eq!(traffic.combined(stage, other, rank), combined);
                    assert_eq!(traffic.combine_range(other, stage, rank).len(), combined);
                    to_other += dispatched;
                }
                assert_eq!(traffic.send_rows(rank, other).len(), to_other);
                assert_eq!(traffic.record_rows(other, rank).len(), to_other);
            }
        }
    });
}

#[test]
fn tables_from_every_constructor_are_legal_and_equal_on_all_ranks() {
    for_random_cases(300, |case, mix| {
        let most = case.placement.max_local();
        let counts = case.counts();
        let stages = 1 + mix.below(most);
        let mut ends: Vec<usize> = (1..stages).map(|_| mix.below(most + 1)).chain([0, most]).collect();
        ends.sort_unstable();
        let sizes: Vec<usize> = ends.windows(2).map(|ends| ends[1] - ends[0]).collect();
        let tables = [
            Ok(StageTable::serial(&case.placement, GemmKind::Dense)),
            StageTable::equal(&case.placement, stages, GemmKind::Grouped),
            StageTable::sized(&case.placement, &sizes, GemmKind::Grouped),
            StageTable::balanced(&case.placement, &counts, stages, GemmKind::Grouped),
            Policy::default().table(&case.placement, &counts),
            Policy { stages: Some(Stages::Sizes(sizes)), ..Policy::default() }
                .table(&case.placement, &counts),
        ];
        for table in tables {
            let table = table.unwrap();
            table.validate(&case.placement).unwrap();
            assert_eq!(parse_order(&order_text(&table.order)).unwrap(), table.order);
            let order = world::random_order(table.stages(), mix);
            table.with_order(order).unwrap().validate(&case.placement).unwrap();
        }
        assert!(StageTable::equal(&case.placement, most + 1, GemmKind::Grouped).is_err());
        // Another rank works from the same bytes.
        let other = case.counts();
        let digest = |counts| Policy::default().table(&case.placement, counts).unwrap().digest();
        assert_eq!(digest(&counts), digest(&other));
    });
}

#[test]
fn what_a_layer_needs_is_known_before_it_runs() {
    for_random_cases(200, |case, mix| {
        let table = case.random_table(mix);
        let run = Run::new(&case.placement, &case.routings, &table).unwrap();
        let tokens = case.routings.iter().map(Routing::tokens).max().unwrap_or(0);
        let worst = Capacity::worst_case(tokens, &case.placement, case.top_k);
        assert!(worst.fits(&run.traffic));
        for rank in case.placement.all_ranks() {
            let sizes = LayerSizes {
                hidden: 8,
                inner: 4,
                top_k: case.top_k,
                local_experts: case.placement.local_count(rank),
                activation_bytes: 2,
            };
            let bytes = LayerBytes::of(&sizes, &Capacity::needed(&run.traffic, rank));
            let (send, home, arrival) = (&run.send[rank.0], &run.home[rank.0], &run.arrival[rank.0]);
            let words = [
                send.tokens.len(),
                home.offsets.len(),
                home.index.len(),
                arrival.expand.len(),
                arrival.expert_start.len(),
                arrival.reduce_offsets.len(),
                arrival.reduce_index.len(),
                arrival.reduce_weights.len(),
            ];
            assert_eq!(bytes.maps, 4 * words.iter().sum::<usize>() as u64);
            let received = run.traffic.rows_received(rank) * record_words(case.top_k);
            assert_eq!(bytes.metadata, 4 * (send.records.len() + received) as u64);
        }
    });
}

#[test]
fn a_layer_in_chunks_that_fit_gives_the_same_sums() {
    /// All ranks halve their tokens until what is left fits.
    fn run_chunks(case: &Case, chunk: Vec<Range<usize>>, pool: &Capacity, sums: &mut [Vec<i64>]) {
        let pairs = case.routings.iter().zip(&chunk);
        let routings: Vec<Routing> = pairs.map(|(routing, tokens)| routing.slice(tokens.clone())).collect();
        let table = StageTable::equal(&case.placement, 1, GemmKind::Grouped).unwrap();
        let run = Run::new(&case.placement, &routings, &table).unwrap();
        if pool.fits(&run.traffic) {
            let starts: Vec<usize> = chunk.iter().map(|tokens| tokens.start).collect();
            for (sums, more) in sums.iter_mut().zip(run.execute_from(&starts).0) {
                sums.extend(more);
            }
        } else {
            let (first, second) = chunk.into_iter().map(halves).unzip();
            run_chunks(case, first, pool, sums);
            run_chunks(case, second, pool, sums);
        }
    }
    for_random_cases(200, |case, mix| {
        let pool = Capacity::worst_case(1 + mix.below(6), &case.placement, case.top_k);
        let mut sums = vec![Vec::new(); case.placement.ranks()];
        let all = case.routings.iter().map(|routing| 0..routing.tokens()).collect();
        run_chunks(case, all, &pool, &mut sums);
        assert_eq!(sums, plain_sums(case));
    });
}

#[test]
fn one_wrong_id_in_a_record_is_refused() {
    for_random_cases(300, |case, mix| {
        let table = case.random_table(mix);
        let run = Run::new(&case.placement, &case.routings, &table).unwrap();
        let rank = Rank(mix.below(case.placement.ranks()));
        let mut records = run.records_of(rank);
        let rows = run.traffic.rows_received(rank);
        if rows == 0 {
            return;
        }
        let id_words = case.top_k.div_ceil(2);
        let word = mix.below(rows) * record_words(case.top_k) + mix.below(id_words);
        let experts = case.placement.local_count(rank) as u32;
        let id = if mix.below(4) == 0 { 0xFFFF } else { mix.below(experts as usize + 1) as u32 };
        let before = records[word];
        records[word] =
            if mix.below(2) == 0 { before & 0xFFFF_0000 | id } else { before & 0xFFFF | id << 16 };
        let maps = run.arrival_maps(rank, &records);
        assert_eq!(maps.is_ok(), records[word] == before, "{before:08x} became {:08x}", records[word]);
    });
}

#[test]
fn wrong_counts_are_refused_at_the_rendezvous_or_at_the_records() {
    for_random_cases(400, |case, mix| {
        let table = case.random_table(mix);
        let run = Run::new(&case.placement, &case.routings, &table).unwrap();
        let liar = mix.below(case.placement.ranks());
        let mut ranks = case.rank_counts();
        let counts = &mut ranks[liar];
        let histogram =
            [&mut counts.copies, &mut counts.first, &mut counts.last].into_iter().nth(mix.below(3)).unwrap();
        // Moves one from an expert to another, mostly such that all sums stay right.
        let experts = case.placement.experts();
        let (from, to) = (mix.below(experts), mix.below(experts));
        if histogram[from] == 0 || from == to {
            return;
        }
        histogram[from] -= 1;
        histogram[to] += 1;
        let Ok(counts) = LayerHistograms::new(&case.placement, case.top_k, ranks) else { return };
        let traffic = Traffic::of(&case.placement, &counts, &table);
        let refused = case.placement.all_ranks().any(|rank| {
            let records = run.records_of(rank);
            ArrivalMaps::of(&case.placement, rank, &counts, &table, &traffic, case.top_k, &records).is_err()
        });
        assert!(refused, "rank {liar} moved a count from expert {from} to {to}");
    });
}
