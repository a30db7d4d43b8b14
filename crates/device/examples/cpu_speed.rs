//! How fast the CPU's expert products run beside what the machine can do at most, as tables:
//!
//! ```text
//! cargo run --release -p epsmoe-device --example cpu_speed [THREADS] [scalar|avx2|avx512|amx] [float32|bfloat16] \
//!     [mxfp4|int4|q4_0|q4_k|q6_k|q8_0|fp8] [int8]
//! ```
//!
//! Without arguments: as many threads as cores, the best instructions, both formats, weights in the format of activations. With `int8` rows become
//! int8 for weights in codes that are integers.
//!
//! A line is the product of all experts of a layer, each with as many rows: gate and up, then down, FLOP-weighted, the
//! median of rounds in which the grouped form, the dense form and a loop on registers only take turns. That loop's median
//! is the peak that a line is held against: a processor's clock depends on what it has just done, so both must be measured
//! alike. The best that short runs of the loop reach and the bytes read from memory are measured before, between and after
//! the lines; of the two figures around a line the smaller counts.

#![expect(clippy::print_stdout, reason = "a table for people")]

use epsmoe_base::{DType, Deadline, Lane, Mix, Place, Rank, cores};
use epsmoe_device::cpu::gemm::Isa;
use epsmoe_device::cpu::{Cpu, CpuKernels, Peaks};
use epsmoe_device::op::{Embed, Epilogue, Gemm, GemmPart, HostToDevice};
use epsmoe_device::threaded::ThreadedOptions;
use epsmoe_device::{Backend, Buffer, Reserve, TensorBytes, Weight, WeightShape};
use epsmoe_quant::{Code, Codes, Format, Scale};
use std::sync::Arc;
use std::time::Duration;

/// Name, hidden and inner width, experts: enough that their weights are far more than any cache holds.
const SHAPES: [(&str, usize, usize, usize); 2] =
    [("DeepSeek-V2-Lite", 2048, 1408, 12), ("mini", 1024, 704, 48)];
const ROWS: [usize; 8] = [1, 2, 4, 8, 32, 128, 256, 512];

/// Rounds of a line.
const ROUNDS: usize = 7;

/// What was asked for.
struct Asked {
    threads: usize,
    isa: Isa,
    dtypes: Vec<DType>,
    /// What weights are held in, if not in the format of activations.
    coded: Option<Format>,
    int8_rows: bool,
}

/// Codings that weights can be held in, by the names of their files.
const CODED: [(&str, Format); 7] = [
    ("mxfp4", format(Code::E2M1, Scale::E8M0, [32, 32])),
    ("int4", format(Code::U4, Scale::BF16, [32, 32])),
    ("q4_0", format(Code::U4, Scale::F16, [32, 32])),
    ("q4_k", format(Code::U4, Scale::NestedWithMinima, [256, 32])),
    ("q6_k", format(Code::I8, Scale::Nested, [256, 16])),
    ("q8_0", format(Code::I8, Scale::F16, [32, 32])),
    ("fp8", format(Code::E4M3, Scale::F32, [128, 128])),
];

const fn format(code: Code, scale: Scale, [group, part]: [usize; 2]) -> Format {
    Format { code, scale, group, part, zeros: false }
}

impl Asked {
    fn parse(words: impl Iterator<Item = String>) -> Result<Self, String> {
        let mut asked = Asked {
            threads: cores(),
            isa: Isa::detect(),
            dtypes: vec![DType::F32, DType::BF16],
            coded: None,
            int8_rows: false,
        };
        for word in words {
            if let Ok(threads) = word.parse() {
                asked.threads = threads;
            } else if let Ok(isa) = word.parse() {
                asked.isa = isa;
            } else if let Some(dtype) = asked.dtypes.iter().find(|dtype| dtype.to_string() == word) {
                asked.dtypes = vec![*dtype];
            } else if let Some((_, format)) = CODED.iter().find(|(name, _)| *name == word) {
                asked.coded = Some(*format);
            } else if word == "int8" {
                asked.int8_rows = true;
            } else {
                return Err(format!(
                    "{word:?} is no number of threads, no instruction set, no format and no coding"
                ));
            }
        }
        Ok(asked)
    }

    fn kernels(&self) -> Result<CpuKernels, String> {
        let kernels = CpuKernels::new(self.threads, self.isa)?;
        Ok(if self.int8_rows { kernels.with_int8_rows() } else { kernels })
    }
}

fn main() -> Result<(), String> {
    let asked = Asked::parse(std::env::args().skip(1))?;
    println!("{}, {} threads", asked.isa, asked.threads);
    if let Some(format) = asked.coded {
        let rows = if asked.int8_rows { ", rows in int8" } else { "" };
        println!("weights held as {format}, {:.2} bits each{rows}", format.bits());
    }
    for &dtype in &asked.dtypes {
        for shape in SHAPES {
            table(&asked, dtype, shape)?;
        }
    }
    Ok(())
}

/// What the threads can do at most; the pool that measures it ends with the call, so that it disturbs nothing.
fn peaks(asked: &Asked) -> Result<Peaks, String> {
    Ok(asked.kernels()?.peaks())
}

fn table(
    asked: &Asked,
    dtype: DType,
    (name, hidden, inner, experts): (&str, usize, usize, usize),
) -> Result<(), String> {
    println!("\n{name}, hidden {hidden}, inner {inner}, {experts} experts, {dtype}");
    println!(
        "rows each  gate/up      down  GFLOP/s together  of peak  of bound  grouped/dense   peak   best  read GB/s"
    );
    let layer = Layer::new(asked, dtype, hidden, inner, experts)?;
    let mut before = peaks(asked)?;
    for rows in ROWS {
        let times = layer.measure(asked, rows)?;
        let after = peaks(asked)?;
        let least = |of: fn(&Peaks) -> f64| of(&before).min(of(&after));
        let best = match dtype {
            DType::BF16 => least(|peaks| peaks.bfloat16),
            _ => least(|peaks| peaks.float32),
        };
        let (compute, memory) = (times.peak, least(|peaks| peaks.memory));
        let map = 2.0 * (rows * experts * hidden * inner) as f64;
        let bits = asked.coded.map_or(8.0 * dtype.bytes() as f64, |format| format.bits());
        let bytes = (3 * experts * hidden * inner) as f64 * bits / 8.0;
        let total = times.grouped[0] + times.grouped[1];
        let bound = (3.0 * map / compute).max(bytes / memory);
        println!(
            "{rows:9}  {:7.1}  {:8.1}  {:16.1}  {:7.3}  {:8.3}  {:13.3}  {:5.0}  {:5.0}  {:9.1}",
            2.0 * map / times.grouped[0] / 1e9,
            map / times.grouped[1] / 1e9,
            3.0 * map / total / 1e9,
            3.0 * map / total / compute,
            bound / total,
            total / (times.dense[0] + times.dense[1]),
            compute / 1e9,
            best / 1e9,
            memory / 1e9,
        );
        before = after;
    }
    Ok(())
}

/// The experts of a layer on a processor.
struct Layer {
    device: Cpu,
    gates: Vec<Weight>,
    downs: Vec<Weight>,
    hidden: Buffer,
    inner: Buffer,
    out: Buffer,
}

/// Medians: seconds of gate/up and of down, and floating-point operations a second on registers only.
struct Times {
    peak: f64,
    grouped: [f64; 2],
    dense: [f64; 2],
}

impl Layer {
    fn new(asked: &Asked, dtype: DType, hidden: usize, inner: usize, experts: usize) -> Result<Self, String> {
        let device =
            Cpu::new(Rank(0), asked.kernels()?, Arc::default(), ThreadedOptions::new(dtype)).map_err(text)?;
        let mut mix = Mix::new(1);
        let numbers: Vec<u8> = (0..hidden * inner).flat_map(|_| (0.1 * mix.signed()).to_le_bytes()).collect();
        let tensor = TensorBytes { dtype: DType::F32, bytes: &numbers };
        let load = |name: String, shape: WeightShape| {
            if let Some(format) = asked.coded {
                let (count, dimensions) = shape.sources();
                let codes = codes(format, dimensions[0], dimensions[1]);
                return device.load_codes(&name, shape, &vec![codes; count]).map_err(text);
            }
            device.load(&name, shape, &vec![tensor; shape.sources().0]).map_err(text)
        };
        let gates = (0..experts)
            .map(|expert| load(format!("gate {expert}"), WeightShape::GateUp { inner, k: hidden }))
            .collect::<Result<_, _>>()?;
        let downs = (0..experts)
            .map(|expert| load(format!("down {expert}"), WeightShape::Matrix { n: hidden, k: inner }))
            .collect::<Result<_, _>>()?;
        let rows = experts * ROWS[ROWS.len() - 1];
        let room = |name, width| device.allocate(name, dtype, rows, width).map_err(text);
        let (x, inner_rows, out) = (room("hidden", hidden)?, room("inner", inner)?, room("out", hidden)?);
        let (lane, place) = (Lane::Compute, Place::default());
        for (name, x) in [("hidden", &x), ("inner", &inner_rows)] {
            let shape = WeightShape::Table { rows: 64, width: x.width };
            let tensor = TensorBytes { dtype: DType::F32, bytes: &numbers[..4 * 64 * x.width] };
            let table = device.load(name, shape, &[tensor]).map_err(text)?;
            let ids = device.allocate("ids", DType::U32, rows, 1).map_err(text)?;
            let words = (0..rows as u32).map(|row| row % 64).collect();
            device.enqueue(lane, place, HostToDevice { words, out: ids.clone() }).map_err(text)?;
            device.enqueue(lane, place, Embed { ids, table, out: x.clone() }).map_err(text)?;
        }
        device.wait(&device.record(lane), Deadline::after(Duration::from_secs(60))).map_err(text)?;
        device.set_recording(true);
        Ok(Layer { gates, downs, hidden: x, inner: inner_rows, out, device })
    }

    fn measure(&self, asked: &Asked, rows: usize) -> Result<Times, String> {
        let mut seconds: [[Vec<f64>; 2]; 2] = Default::default();
        let mut peaks = Vec::new();
        // The first round brings everything into place.
        for round in 0..=ROUNDS {
            for (form, seconds) in seconds.iter_mut().enumerate() {
                for (product, seconds) in seconds.iter_mut().enumerate() {
                    let time = self.time(rows, form == 1, product == 1)?;
                    if round > 0 {
                        seconds.push(time);
                        peaks.push(asked.kernels()?.peak_now(self.out.dtype));
                    }
                }
            }
        }
        let [grouped, dense] = seconds.map(|form| form.map(median));
        Ok(Times { grouped, dense, peak: median(peaks) })
    }

    /// Seconds of one product over all experts, in one operation or in one for each.
    fn time(&self, rows: usize, dense: bool, down: bool) -> Result<f64, String> {
        let (x, weights, out, epilogue) = match down {
            false => (&self.hidden, &self.gates, &self.inner, Epilogue::SwiGlu),
            true => (&self.inner, &self.downs, &self.out, Epilogue::Store),
        };
        let part = |(expert, weight): (usize, &Weight)| {
            let rows = expert * rows..(expert + 1) * rows;
            let (x, out) = (x.rows(rows.clone()).map_err(text)?, out.rows(rows).map_err(text)?);
            Ok(GemmPart { x, weight: weight.clone(), bias: None, out })
        };
        let parts = weights.iter().enumerate().map(part).collect::<Result<Vec<_>, String>>()?;
        for parts in parts.chunks(if dense { 1 } else { parts.len() }) {
            let gemm = Gemm { parts: parts.to_vec(), epilogue };
            self.device.enqueue(Lane::Compute, Place::default(), gemm).map_err(text)?;
        }
        let event = self.device.record(Lane::Compute);
        self.device.wait(&event, Deadline::after(Duration::from_secs(600))).map_err(text)?;
        let records = self.device.take_records();
        Ok(records.iter().map(|record| (record.end_ns - record.start_ns) as f64 * 1e-9).sum())
    }
}

/// Random codes; records of scales that mean small numbers, whatever their format is.
fn codes(format: Format, rows: usize, columns: usize) -> Codes {
    let mut mix = Mix::new(2);
    let codes = (0..rows * format.row_bytes(columns)).map(|_| mix.below(127) as u8).collect();
    let record: Vec<u8> = match format.scale {
        Scale::E8M0 => vec![121],
        Scale::F32 => 0.01f32.to_le_bytes().into(),
        // 0x20 above is 2⁻⁷ as a half, 0x3c above about 0.01 as a bfloat16.
        Scale::F16 => vec![0, 0x20],
        Scale::BF16 => vec![0, 0x3c],
        _ => {
            (0..format.record_bytes()).map(|byte| if byte < 4 && byte % 2 == 1 { 0x10 } else { 32 }).collect()
        }
    };
    let records = record.repeat(rows * format.groups(columns));
    Codes { format, rows, columns, codes, records }
}

fn text(error: impl std::fmt::Display) -> String {
    error.to_string()
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}
