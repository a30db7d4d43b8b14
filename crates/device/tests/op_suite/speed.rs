//! How fast products and attention run on the first GPU: tables, asked for with `--ignored --nocapture`.

use epsmoe_base::{DType, Deadline, Lane, Mix, Place, Rank};
use epsmoe_device::cuda::{CudaBackend, CudaDevice, CudaOptions, CudaWeights};
use epsmoe_device::op::{Attention, Embed, Epilogue, Gemm, GemmPart, Upload};
use epsmoe_device::{Backend, Record, TensorBytes, Weight, WeightShape};
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
    let median = median_ns(&backend.take_records(), "gemm");
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

fn median_ns(records: &[Record], name: &str) -> f64 {
    let mut times: Vec<u64> = records
        .iter()
        .filter(|record| record.name == name)
        .map(|record| record.end_ns - record.start_ns)
        .collect();
    times.sort_unstable();
    times[times.len() / 2] as f64
}

/// Name, heads, key heads, width of keys and values; latents have the values in their keys.
const HEADS: [(&str, usize, usize, usize, usize); 3] = [
    ("DeepSeek-V2-Lite", 16, 1, 576, 512),
    ("Qwen3-30B-A3B", 32, 4, 128, 128),
    ("OLMoE-1B-7B", 16, 16, 128, 128),
];
/// Sequences, cached positions and new tokens of each.
const SEQUENCES: [(usize, usize, usize); 4] = [(8, 0, 1024), (1, 0, 4096), (8, 1023, 1), (128, 1023, 1)];

#[test]
#[ignore = "a measurement"]
fn attentions() {
    let device = match CudaDevice::open(0) {
        Ok(device) => device,
        Err(missing) => return eprintln!("skipped: {missing}"),
    };
    println!("attention         sequences  cached  new each  median µs   TFLOP/s");
    for heads in HEADS {
        for sequences in SEQUENCES {
            let weights = CudaWeights::new(&device).expect("a store");
            let backend = CudaBackend::new(Rank(0), &device, &weights, CudaOptions::new(DType::BF16));
            println!("{}", measure_attention(&backend.expect("a processor"), heads, sequences));
        }
    }
}

fn measure_attention(
    backend: &CudaBackend,
    (name, heads, kv_heads, key_width, value_width): (&str, usize, usize, usize, usize),
    (sequences, cached, new): (usize, usize, usize),
) -> String {
    const BLOCK: usize = 64;
    let (lane, place) = (Lane::Compute, Place::default());
    let (tokens, blocks) = (sequences * new, (cached + new).div_ceil(BLOCK));
    let words = |name, words: Vec<u32>, width: usize| {
        let out = backend.allocate(name, DType::U32, words.len() / width, width).expect("memory");
        backend.enqueue(lane, place, Upload { words: words.into(), out: out.clone() }).expect("it fits");
        out
    };
    let filled = |name: &'static str, rows: usize, width: usize| {
        let numbers = random(64 * width);
        let tensor = TensorBytes { dtype: DType::BF16, bytes: &numbers };
        let table = backend.load(name, WeightShape::Table { rows: 64, width }, &[tensor]).expect("memory");
        let ids = words("ids", (0..rows as u32).map(|row| row * 7 % 64).collect(), 1);
        let out = backend.allocate(name, DType::BF16, rows, width).expect("memory");
        backend.enqueue(lane, place, Embed { ids, table, out: out.clone() }).expect("it fits");
        out
    };
    let slots = sequences * blocks * BLOCK;
    let keys = filled("keys", slots, kv_heads * key_width);
    let values = match key_width == value_width {
        true => filled("values", slots, kv_heads * value_width),
        false => keys.columns(0..value_width).expect("inside"),
    };
    let attention = Attention {
        q: filled("q", tokens, heads * key_width),
        keys,
        values,
        sequence_starts: words("starts", (0..=sequences).map(|b| (b * new) as u32).collect(), 1),
        positions: words("positions", (0..tokens).map(|t| (cached + t % new) as u32).collect(), 1),
        blocks: words("blocks", (0..(sequences * blocks) as u32).collect(), blocks),
        block_size: BLOCK,
        heads,
        kv_heads,
        scale: 1.0 / (key_width as f32).sqrt(),
        window: None,
        out: backend.allocate("out", DType::BF16, tokens, heads * value_width).expect("memory"),
    };
    for _ in 0..REPEATS {
        backend.enqueue(lane, place, attention.clone()).expect("it fits");
    }
    backend.wait(&backend.record(lane), Deadline::after(Duration::from_secs(60))).expect("no fault");
    let median = median_ns(&backend.take_records(), "attention");
    let seen = sequences * (cached * new + new * (new + 1) / 2);
    let flops = 2.0 * (seen * heads * (key_width + value_width)) as f64;
    format!(
        "{name:16}  {sequences:9}  {cached:6}  {new:8}  {:9.1}  {:8.1}",
        median / 1e3,
        flops / median / 1e3
    )
}
