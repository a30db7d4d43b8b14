//! How fast products run on the first GPU: a table, asked for with `--ignored --nocapture`.

use epsmoe_base::{DType, Deadline, Lane, Mix, Place, Rank};
use epsmoe_device::cuda::{CudaBackend, CudaDevice, CudaOptions, CudaWeights};
use epsmoe_device::op::{Embed, Epilogue, Gemm, GemmPart, Upload};
use epsmoe_device::{Backend, TensorBytes, Weight, WeightShape};
use half::bf16;
use std::time::Duration;

/// Hidden and inner width, experts: DeepSeek-V2 on eight ranks, a dense layer of the same size, and two thin ones.
const SHAPES: [(usize, usize, usize); 4] =
    [(5120, 1536, 20), (5120, 12288, 1), (5120, 1536, 1), (2048, 576, 1)];
const REPEATS: usize = 5;

#[test]
#[ignore = "a measurement"]
fn products() {
    let device = match CudaDevice::open(0) {
        Ok(device) => device,
        Err(missing) => return eprintln!("skipped: {missing}"),
    };
    println!("{}", device.describe());
    println!("experts  rows each  product     median µs   TFLOP/s   weights GB/s");
    for (hidden, inner, experts) in SHAPES {
        let weights = CudaWeights::new(&device).expect("a store");
        let backend =
            CudaBackend::new(Rank(0), &device, &weights, CudaOptions::new(DType::BF16)).expect("a processor");
        let numbers = random(inner * hidden);
        let load = |name: &str, shape: WeightShape| {
            let tensor = TensorBytes { dtype: DType::BF16, bytes: &numbers };
            let tensors = vec![tensor; shape.sources().0];
            backend.load(name, shape, &tensors).expect("memory")
        };
        let gates: Vec<Weight> = (0..experts)
            .map(|expert| load(&format!("gate {expert}"), WeightShape::GateUp { inner, k: hidden }))
            .collect();
        let downs: Vec<Weight> = (0..experts)
            .map(|expert| load(&format!("down {expert}"), WeightShape::Matrix { n: hidden, k: inner }))
            .collect();
        for rows in [1, 16, 64, 256, 1024, 4096] {
            println!("{}", measure(&backend, rows, &gates, hidden, inner, Epilogue::SwiGlu));
            println!("{}", measure(&backend, rows, &downs, inner, hidden, Epilogue::Store));
        }
    }
}

fn random(elements: usize) -> Vec<u8> {
    let mut mix = Mix::new(1);
    (0..elements).flat_map(|_| bf16::from_f32(mix.signed()).to_le_bytes()).collect()
}

/// A line of the table.
fn measure(
    backend: &CudaBackend,
    rows: usize,
    weights: &[Weight],
    k: usize,
    n: usize,
    epilogue: Epilogue,
) -> String {
    let total = rows * weights.len();
    let (lane, place) = (Lane::Compute, Place::default());
    let x = backend.allocate("x", DType::BF16, total, k).expect("memory");
    let out = backend.allocate("out", DType::BF16, total, n).expect("memory");
    let ids = backend.allocate("ids", DType::U32, total, 1).expect("memory");
    let table = {
        let numbers = random(64 * k);
        let tensor = TensorBytes { dtype: DType::BF16, bytes: &numbers };
        let name = format!("x of {rows} {k} {n}");
        backend.load(&name, WeightShape::Table { rows: 64, width: k }, &[tensor]).expect("memory")
    };
    let words = (0..total as u32).map(|row| row % 64).collect();
    backend.enqueue(lane, place, Upload { words, out: ids.clone() }).expect("it fits");
    backend.enqueue(lane, place, Embed { ids, table, out: x.clone() }).expect("it fits");
    let wait =
        || backend.wait(&backend.record(lane), Deadline::after(Duration::from_secs(60))).expect("no fault");
    let part = |(index, weight): (usize, &Weight)| {
        let rows = index * rows..(index + 1) * rows;
        GemmPart {
            x: x.rows(rows.clone()).expect("inside"),
            weight: weight.clone(),
            out: out.rows(rows).expect("inside"),
        }
    };
    for _ in 0..REPEATS {
        let parts = weights.iter().enumerate().map(part).collect();
        backend.enqueue(lane, place, Gemm { parts, bias: None, epilogue }).expect("it fits");
    }
    wait();
    let records = backend.take_records();
    let mut times: Vec<u64> = records
        .iter()
        .filter(|record| record.name == "gemm")
        .map(|record| record.end_ns - record.start_ns)
        .collect();
    times.sort_unstable();
    let median = times[times.len() / 2] as f64;
    let maps = if epilogue == Epilogue::SwiGlu { 2 } else { 1 };
    let flops = 2.0 * (total * k * n * maps) as f64;
    let bytes = (2 * weights.len() * k * n * maps) as f64;
    let name = if epilogue == Epilogue::SwiGlu { "gate/up" } else { "down" };
    format!(
        "{:7}  {rows:9}  {name:8}  {:11.1}  {:8.1}  {:13.0}",
        weights.len(),
        median / 1e3,
        flops / median / 1e3,
        bytes / median
    )
}
