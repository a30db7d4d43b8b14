//! The same bits for every number of stages, cut, transfer order, place of the shared expert, kind of GEMM,
//! chunk and run, however slow the lanes and the fabric are.

use crate::world::{Case, Got, Setup, random_policy, random_table, run};
use epsmoe_base::{DType, Mix, Phase, env::test_seed};
use epsmoe_plan::{Capacity, Policy, Schedule, SlotMap};

fn bits(gots: &[Got]) -> Vec<Vec<u32>> {
    gots.iter().map(|got| got.y.iter().map(|value| value.to_bits()).collect()).collect()
}

fn runs(case: &Case, setup: &Setup, shown: &str) -> Vec<Got> {
    let all = run(case, setup).into_iter();
    all.map(|got| got.unwrap_or_else(|fault| panic!("{fault}: {shown}"))).collect()
}

/// Runs random cases serially, then `variants` times as `vary` says, and compares all bits.
fn check(cases: u64, layers: usize, variants: u64, vary: impl Fn(&Case, &mut Mix, &mut Setup)) -> Vec<Got> {
    let seed = test_seed();
    let mut gots = Vec::new();
    for index in 0..cases {
        let mut mix = Mix::keyed(seed, &[index]);
        let dtype = [DType::F32, DType::BF16][mix.below(2)];
        let case = Case::random(mix.next_u64(), dtype, layers);
        let want =
            bits(&runs(&case, &Setup::serial(), &format!("serial, seed {seed}, case {index}, {case:?}")));
        for _ in 0..variants {
            let policy = random_policy(&case.map, &mut mix);
            let mut setup = Setup { jitter: mix.next_u64(), ..Setup::new(policy.clone()) };
            vary(&case, &mut mix, &mut setup);
            let shown = format!("{policy}, seed {seed}, case {index}, {case:?}");
            let got = runs(&case, &setup, &shown);
            assert!(bits(&got) == want, "other bits under {shown}");
            for other in &got {
                let tables =
                    |got: &Got| got.reports.iter().map(|report| report.tables.clone()).collect::<Vec<_>>();
                assert_eq!(tables(other), tables(&got[0]), "{shown}");
            }
            gots.extend(got);
        }
    }
    gots
}

#[test]
fn schedules_do_not_change_bits() {
    check(16, 1, 10, |_, mix, setup| setup.delay = (mix.below(2) == 0).then(|| mix.next_u64()));
}

#[test]
fn tables_with_cuts_and_kernels_for_each_rank_and_stage_do_not_change_bits() {
    let gots = check(12, 2, 6, |case, mix, setup| setup.table = Some(random_table(&case.map, mix)));
    assert!(gots.iter().any(|got| got.reports[0].tables[0].gemm.windows(2).any(|pair| pair[0] != pair[1])));
}

/// What stands between the two parts computes while sums travel.
#[test]
fn a_layer_in_two_parts_has_the_bits_of_one() {
    let seed = test_seed();
    let mut beside = 0;
    for index in 0..20 {
        let mut mix = Mix::keyed(seed, &[index]);
        // In float32 without identities: then nothing is rounded between the sums and the shared expert's output.
        let case = Case { identities: 0, ..Case::random(mix.next_u64(), DType::F32, 1) };
        let policy = random_policy(&case.map, &mut mix);
        let setup = Setup { delay: Some(mix.next_u64()), ..Setup::new(policy.clone()) };
        let shown = format!("{policy}, seed {seed}, case {index}, {case:?}");
        let want = bits(&runs(&case, &setup, &shown));
        let got = runs(&case, &Setup { in_two: true, ..setup }, &shown);
        assert!(bits(&got) == want, "other bits in two parts: {shown}");
        beside += got.iter().filter(|got| overlaps(got)).count();
    }
    assert!(beside > 0, "nothing ever computed while sums travelled, seed {seed}");
}

/// Whether work between the parts of a layer began before its last sums had come back.
fn overlaps(got: &Got) -> bool {
    let of = |phase| got.records.iter().filter(move |record| record.place.phase == Some(phase));
    let back = of(Phase::Combine).map(|record| record.end_ns).max();
    let between = of(Phase::Residual).map(|record| record.start_ns).min();
    back.zip(between).is_some_and(|(back, between)| between < back)
}

/// Layers whose counts nobody asks for: the same bits, and the same waits whatever the routing.
#[test]
fn gathered_layers_have_the_bits_of_counted_ones() {
    let seed = test_seed();
    let (mut gathered, mut without_tokens) = (0, 0);
    for index in 0..40 {
        let mut mix = Mix::keyed(seed, &[index]);
        let dtype = [DType::F32, DType::BF16][mix.below(2)];
        let case = Case::random(mix.next_u64(), dtype, 3);
        let want = bits(&runs(&case, &Setup::serial(), &format!("seed {seed}, case {index}, {case:?}")));
        let schedule = [Schedule::Serial, Schedule::Auto][mix.below(2)];
        let setup = Setup {
            jitter: mix.next_u64(),
            delay: (mix.below(2) == 0).then(|| mix.next_u64()),
            gather_tokens: 96,
            // Every rank's rows for every rank are more than those that experts ask for.
            capacity: Some(Capacity::worst_case(96, &case.sizes())),
            ..Setup::new(Policy { schedule, ..Policy::default() })
        };
        let shown = format!("{schedule}, gathered, seed {seed}, case {index}, {case:?}");
        let got = runs(&case, &setup, &shown);
        assert!(bits(&got) == want, "other bits: {shown}");
        let counts = |got: &Got| got.records.iter().filter(|record| record.name == "count_slots").count();
        if case.map.ranks() > 1 && got.iter().all(|got| counts(got) == 0) {
            gathered += 1;
            without_tokens += usize::from(case.tokens.contains(&0));
        }
    }
    assert!(
        gathered > 20 && without_tokens > 5,
        "{gathered} gathered, {without_tokens} with a rank without tokens"
    );
}

#[test]
fn layers_in_a_row_do_not_disturb_each_other() {
    check(5, 6, 4, |_, mix, setup| setup.delay = Some(mix.next_u64()));
}

#[test]
fn chunks_do_not_change_bits() {
    let gots = check(12, 2, 4, |case, mix, setup| {
        // Room for the routing of all tokens, and for everything else of a few.
        let tokens = case.tokens.iter().copied().max().unwrap_or(0).max(1);
        let few = 1 + mix.below(tokens.div_ceil(3));
        setup.capacity = Some(Capacity { tokens, ..Capacity::worst_case(few, &case.sizes()) });
    });
    let chunked = gots.iter().filter(|got| got.reports.iter().any(|report| report.tables.len() > 1)).count();
    assert!(3 * chunked > gots.len(), "only {chunked} of {} were split", gots.len());
    assert!(gots.iter().all(|got| got.reports.iter().all(|report| report.peak_bytes > 0)));
}

#[test]
fn each_room_alone_splits_a_layer() {
    let case = Case::fixed();
    let whole = Capacity::worst_case(24, &case.sizes());
    let want = bits(&runs(&case, &Setup::serial(), "serial"));
    for (what, capacity) in [
        ("rows sent", Capacity { rows_sent: 20, ..whole }),
        ("rows received", Capacity { rows_received: 20, ..whole }),
        ("assignments", Capacity { assignments: 40, ..whole }),
        ("assignments of a stage", Capacity { stage_assignments: 12, ..whole }),
    ] {
        let setup = Setup { capacity: Some(capacity), ..Setup::new(Policy::default()) };
        let got = runs(&case, &setup, what);
        assert!(got[0].reports[0].tables.len() > 1, "{what} did not split the layer");
        assert!(bits(&got) == want, "other bits with little room for {what}");
    }
}

#[test]
fn micro_batches_of_any_size_do_not_change_bits() {
    for ranks in 1..=3 {
        let map = SlotMap::contiguous(7, ranks).unwrap();
        for tokens in
            [vec![0, 0, 0], vec![1, 0, 0], vec![0, 1, 2], vec![1, 1, 1], vec![0, 23, 1], vec![5, 0, 8]]
        {
            for hot in [None, Some(6)] {
                let case = Case {
                    map: map.clone(),
                    hot,
                    tokens: tokens[..ranks].to_vec(),
                    seed: test_seed(),
                    ..Case::fixed()
                };
                let shown = format!("{case:?}");
                let want = runs(&case, &Setup::serial(), &shown);
                let setup = Setup { delay: Some(case.seed), ..Setup::two_batch() };
                let got = runs(&case, &setup, &shown);
                assert!(bits(&got) == bits(&want), "other bits under {shown}");
                assert!(
                    got.iter().all(|got| got.reports.iter().all(|report| report.tables.len() == 2)),
                    "{shown}"
                );
            }
        }
    }
}

#[test]
fn micro_batches_need_room_for_both() {
    let case = Case::fixed();
    let whole = Capacity::worst_case(24, &case.sizes());
    let serial = runs(&case, &Setup::serial(), "serial");
    let halves = runs(&case, &Setup::two_batch(), "two-batch");
    for (serial, halves) in serial.iter().zip(&halves) {
        let (serial, halves) = (serial.reports[0].peak_bytes, halves.reports[0].peak_bytes);
        // The same rows and copies, but only half of the copies at the experts at once.
        assert!(
            serial / 2 < halves && halves < serial,
            "{halves} bytes, and {serial} in the serial schedule"
        );
    }
    for (what, capacity) in [
        ("rows sent", Capacity { rows_sent: 20, ..whole }),
        ("rows received", Capacity { rows_received: 20, ..whole }),
        ("assignments", Capacity { assignments: 40, ..whole }),
        ("assignments of a stage", Capacity { stage_assignments: 12, ..whole }),
    ] {
        let got = runs(&case, &Setup { capacity: Some(capacity), ..Setup::two_batch() }, what);
        assert!(got[0].reports[0].tables.len() > 2, "{what} did not split the layer");
        assert!(bits(&got) == bits(&serial), "other bits with little room for {what}");
    }
}
