//! A cost model measured with noise and outliers says what the machine does. `EPSMOE_TEST_SEED` repeats a run.

#[allow(dead_code, reason = "each test uses a part of it")]
mod costs;

use costs::{for_random_cases, random_cost};
use epsmoe_base::Mix;
use epsmoe_plan::*;

/// Nine measurements of one thing, with up to 2 % of noise; up to three of them disturbed.
fn measured(mix: &mut Mix, work: &Work, ns: u64) -> Vec<Sample> {
    let mut sample = |repeat: u64| {
        let noisy = ns * (990 + mix.below(20) as u64) / 1000;
        let disturbed = repeat < 3 && mix.below(3) == 0;
        Sample { work: work.clone(), ns: if disturbed { noisy * 3 } else { noisy } }
    };
    (0..9).map(&mut sample).collect()
}

fn gemm_ns(cost: &CostModel, kind: GemmKind, rows: &[u64], columns: usize, depth: usize) -> u64 {
    cost.gemm(kind).product(columns, depth, 2).op_ns(rows.iter().copied())
}

#[test]
fn samples_of_a_machine_give_the_machine_back() {
    for_random_cases(30, |mix| {
        let truth = random_cost(mix);
        let mut samples = Vec::new();
        let mut measure = |work: Work, ns: u64| samples.extend(measured(mix, &work, ns));
        let kinds = [GemmKind::Grouped, GemmKind::Dense];
        for kind in kinds {
            for rows in [1, 4, 16, 64, 128, 256, 512, 1024, 4096] {
                for (columns, depth) in [(64, 64), (3072, 1024), (1024, 1536)] {
                    for experts in [1, 4] {
                        let rows = vec![rows; experts];
                        let ns = gemm_ns(&truth, kind, &rows, columns, depth);
                        measure(Work::Gemm { kind, rows, columns, depth }, ns);
                    }
                }
            }
        }
        for bytes in (10..28).map(|power| 1 << power) {
            let near = truth.link.exchange_ns(Payload { near: bytes, far: 0, received: 0 });
            measure(Work::Near(bytes), near);
            measure(Work::Gather(bytes), truth.rows.gather.extended(bytes));
        }
        measure(Work::EmptyExchange, truth.link.exchange_ns);
        let slower = truth.shares[0].compute_beside;
        measure(Work::ComputeBeside { share: 0, alone_ns: 1_000_000 }, slower * 1000);
        let start = CostModel { machine: "fitted".into(), ..random_cost(mix) };
        let fitted = start.fitted(&samples);
        fitted.check().unwrap();
        assert_eq!(fitted, start.fitted(&samples), "the same samples give the same model");
        let mut errors = Vec::new();
        let mut compare = |fitted: u64, truth: u64| {
            errors.push((fitted as f64 / truth.max(1) as f64 - 1.0).abs());
        };
        for kind in kinds {
            for rows in [[2, 2, 2], [40, 40, 40], [300, 20, 700], [2048, 2048, 0]] {
                compare(gemm_ns(&fitted, kind, &rows, 2048, 1280), gemm_ns(&truth, kind, &rows, 2048, 1280));
            }
        }
        for bytes in [100_000, 3_000_000, 500_000_000] {
            let payload = Payload { near: bytes, far: 0, received: 0 };
            compare(fitted.link.exchange_ns(payload), truth.link.exchange_ns(payload));
            compare(fitted.rows.gather.extended(bytes), truth.rows.gather.extended(bytes));
        }
        errors.sort_by(f64::total_cmp);
        let (median, worst) = (errors[errors.len() / 2], errors[errors.len() - 1]);
        eprintln!("median {:.1} %, worst {:.1} %", median * 100.0, worst * 100.0);
        assert!(median < 0.02, "{errors:?}");
        // Between the last rows that only read weights and the first that compute, little is known.
        assert!(worst < 0.4, "{errors:?}");
        let shares = |cost: &CostModel| cost.shares[0].compute_beside as f64;
        assert!((shares(&fitted) / shares(&truth) - 1.0).abs() < 0.03);
        // What was not measured stays.
        assert_eq!((&fitted.host, &fitted.link.far), (&start.host, &start.link.far));
    });
}

#[test]
fn files_come_back_and_wrong_ones_are_refused() {
    let cost = random_cost(&mut Mix::new(1));
    let text = cost.to_text();
    assert_eq!(CostModel::parse(&text).unwrap(), cost);
    assert_eq!(CostModel::parse(&text).unwrap().digest(), cost.digest());
    let refused =
        |from: &str, to: &str| CostModel::parse(&text.replacen(from, to, 1)).unwrap_err().to_string();
    assert_eq!(
        refused("version = 5", "version = 7"),
        "the cost model has version 7, this program reads version 5: measure it again"
    );
    assert!(refused("version = 5", "").contains("version 0"));
    assert!(refused("machine =", "engine =").contains("engine"));
    assert!(
        refused("compute_beside = ", "compute_beside = 0 # ").contains("shares of the cost model has work")
    );
    let broken = CostModel { shares: vec![], ..cost.clone() };
    assert!(broken.check().unwrap_err().to_string().contains("is empty"));
    let falling = Piecewise::of([(0, 10), (5, 3)]);
    let broken = CostModel { link: LinkCost { near: falling, ..cost.link.clone() }, ..cost.clone() };
    assert!(broken.check().unwrap_err().to_string().starts_with("link.near of the cost model falls"));
    let broken = GemmCost { flops_per_second: 0, ..cost.dense.clone() };
    assert!(CostModel { dense: broken, ..cost }.check().unwrap_err().to_string().contains("rate of 0"));
}
