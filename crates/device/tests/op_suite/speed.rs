//! How fast products, experts and attention run on the first GPU. Asked for with `--ignored --nocapture`: `products`
//! and `attentions` print tables; `served` times what it reads from its input, line by line, so that a peer in another
//! process can take turns.

use epsmoe_base::{DType, Deadline, Lane, Mix, Place, Rank};
use epsmoe_device::cuda::{CudaBackend, CudaDevice, CudaOptions, CudaWeights};
use epsmoe_device::op::{
    Attention, Embed, Epilogue, Gather, GatherFp8, Gemm, GemmPart, HostToDevice, KvWrite, NONE, Op, Reduce,
    Sight,
};
use epsmoe_device::{Backend, Buffer, Record, Reserve, TensorBytes, Weight, WeightShape};
use epsmoe_quant::{Code, Codes, Format, Scale};
use half::bf16;
use std::io::BufRead;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

/// Hidden and inner width, experts: DeepSeek-V2 on eight ranks, a dense layer of the same size, and two thin ones.
const SHAPES: [(usize, usize, usize); 4] =
    [(5120, 1536, 20), (5120, 12288, 1), (5120, 1536, 1), (2048, 576, 1)];
const REPEATS: usize = 5;

/// Weights and rows that are used in turn come to so many bytes, several times what the GPU's cache holds.
const PAST_CACHE: usize = 250_000_000;

#[test]
#[ignore = "a measurement"]
fn products() {
    let device = match CudaDevice::open(0) {
        Ok(device) => device,
        Err(missing) => return eprintln!("skipped: {missing}"),
    };
    println!("{}", device.describe());
    println!("experts  rows each  product     median µs   TFLOP/s   weights GB/s");
    let mut stock = Stock::new(device);
    for (hidden, inner, experts) in SHAPES {
        for (name, k, n, epilogue, maps) in
            [("gate/up", hidden, inner, Epilogue::SwiGlu, 2), ("down", inner, hidden, Epilogue::Store, 1)]
        {
            for rows in [1, 16, 64, 256, 1024, 4096] {
                let trial = stock.products(k, n, epilogue, true, 0, &vec![rows; experts]);
                let mut times = trial.times(REPEATS);
                times.sort_unstable();
                let median = times[times.len() / 2] as f64;
                let weights = (experts * k * n * maps) as f64;
                println!(
                    "{experts:7}  {rows:9}  {name:8}  {:11.1}  {:8.1}  {:13.0}",
                    median / 1e3,
                    2.0 * rows as f64 * weights / median / 1e3,
                    2.0 * weights / median
                );
            }
        }
    }
}

/// Weights in codes beside the same product with weights in bfloat16.
#[test]
#[ignore = "a measurement"]
fn codes() {
    let device = match CudaDevice::open(0) {
        Ok(device) => device,
        Err(missing) => return eprintln!("skipped: {missing}"),
    };
    let format = |code, scale, part| Some(Format { code, scale, group: part, part, zeros: false });
    let formats = [
        None,
        format(Code::E2M1, Scale::E8M0, 32),
        format(Code::U4, Scale::BF16, 32),
        format(Code::E4M3, Scale::F32, 128),
        format(Code::I8, Scale::F16, 32),
        Some(Format { code: Code::U4, scale: Scale::NestedWithMinima, group: 256, part: 32, zeros: false }),
    ];
    println!("hidden experts product  rows each: median µs, TFLOP/s, and times bfloat16");
    let mut stock = Stock::new(device);
    for (hidden, inner, experts) in [(2048, 768, 8), (2048, 768, 64), (5120, 1536, 20), (4096, 14336, 2)] {
        for (name, k, n, epilogue, maps) in
            [("gate/up", hidden, inner, Epilogue::SwiGlu, 2), ("down", inner, hidden, Epilogue::Store, 1)]
        {
            let mut plain = Vec::new();
            for format in formats {
                stock.format = format;
                let mut line = format.map_or("bfloat16".to_owned(), |format| format.to_string());
                for (column, rows) in [1, 8, 16, 64, 256, 1024].into_iter().enumerate() {
                    let mut times =
                        stock.products(k, n, epilogue, true, 0, &vec![rows; experts]).times(REPEATS);
                    times.sort_unstable();
                    let median = times[times.len() / 2] as f64;
                    if format.is_none() {
                        plain.push(median);
                    }
                    let flops = 2.0 * (rows * experts * k * n * maps) as f64;
                    line += &format!(
                        " {rows}: {:.1} {:.0} {:.2}",
                        median / 1e3,
                        flops / median / 1e3,
                        plain[column] / median
                    );
                }
                println!("{hidden} {experts} {name} {line}");
            }
        }
    }
}

/// Rows and weights in FP8 beside both in bfloat16: hidden and inner width, and experts of a rank, of models at hand. Gated products
/// give codes, as in a model.
#[test]
#[ignore = "a measurement"]
fn fp8() {
    let device = match CudaDevice::open(0) {
        Ok(device) => device,
        Err(missing) => return eprintln!("skipped: {missing}"),
    };
    let blocks = Format { code: Code::E4M3, scale: Scale::F32, group: 128, part: 128, zeros: false };
    println!("hidden inner experts product  rows each: median µs, TFLOP/s, and times bfloat16");
    let mut stock = Stock::new(device);
    let shapes = [
        (5120, 1536, 20),
        (7168, 2048, 32),
        (4096, 14336, 2),
        (6144, 10752, 2),
        (2048, 768, 16),
        (2048, 1408, 8),
    ];
    for (hidden, inner, experts) in shapes {
        for (name, k, n, epilogue, maps) in
            [("gate/up", hidden, inner, Epilogue::SwiGlu, 2), ("down", inner, hidden, Epilogue::Store, 1)]
        {
            let mut line = String::new();
            for rows in [1, 16, 64, 256, 512, 1024, 2048, 4096] {
                let [plain, fp8] = [None, Some(blocks)].map(|format| {
                    (stock.format, stock.fp8_rows) = (format, format.is_some());
                    let mut times =
                        stock.products(k, n, epilogue, true, 0, &vec![rows; experts]).times(REPEATS);
                    times.sort_unstable();
                    times[times.len() / 2] as f64
                });
                let flops = 2.0 * (rows * experts * k * n * maps) as f64;
                line += &format!(" {rows}: {:.1} {:.0} {:.2}", fp8 / 1e3, flops / fp8 / 1e3, plain / fp8);
            }
            println!("{hidden} {inner} {experts} {name} {line}");
        }
    }
}

/// Lines in: `products K N store|swiglu grouped|dense RESERVED REPEATS ROWS,ROWS,...` (rows of each expert), or
/// `experts HIDDEN INNER EXPERTS ROWS REPEATS equal|routed`. Lines out: `each NAME NS NAME NS ...`, the median of each operation, and
/// `ns ROWS TIME TIME ...`, rows multiplied and nanoseconds.
#[test]
#[ignore = "a measurement"]
fn served() {
    let mut stock = Stock::new(CudaDevice::open(0).expect("a GPU"));
    let mut last: Option<(String, Trial)> = None;
    for line in std::io::stdin().lock().lines() {
        let line = line.expect("text");
        let words: Vec<&str> = line.split_whitespace().collect();
        let number = |at: usize| words[at].parse::<usize>().expect("a number");
        // The same line again is timed again, on the same memory.
        if last.as_ref().is_none_or(|(asked, _)| *asked != line) {
            drop(last.take());
            let trial = match words[0] {
                "products" => {
                    let counts: Vec<usize> =
                        words[7].split(',').map(|rows| rows.parse().expect("rows")).collect();
                    let epilogue = if words[3] == "swiglu" { Epilogue::SwiGlu } else { Epilogue::Store };
                    stock.products(number(1), number(2), epilogue, words[4] == "grouped", number(5), &counts)
                }
                "experts" => stock.experts(number(1), number(2), number(3), number(4), words[6] == "equal"),
                other => panic!("{other} is nothing to time"),
            };
            last = Some((line.clone(), trial));
        }
        let Some((_, trial)) = &last else { continue };
        let turns = trial.records(number(if words[0] == "products" { 6 } else { 5 }));
        let each = (0..turns[0].len()).map(|op| {
            let mut times: Vec<u64> = turns.iter().map(|turn| turn[op].end_ns - turn[op].start_ns).collect();
            times.sort_unstable();
            format!(" {} {}", turns[0][op].name, times[times.len() / 2])
        });
        println!("each{}", each.collect::<String>());
        let times = turns.iter().map(|turn| format!(" {}", length(turn)));
        println!("ns {}{}", trial.rows, times.collect::<String>());
    }
}

/// A GPU and the weights that were loaded last, which many trials share.
struct Stock {
    device: Arc<CudaDevice>,
    numbers: Vec<u8>,
    shape: Vec<usize>,
    /// What maps are held in, if not in bfloat16.
    format: Option<Format>,
    /// Whether rows are in FP8 then.
    fp8_rows: bool,
    weights: Option<CudaWeights>,
}

/// Sequences of operations to be timed, used in turn.
struct Trial {
    backend: CudaBackend,
    turns: Vec<Vec<Op>>,
    rows: usize,
}

impl Stock {
    fn new(device: Arc<CudaDevice>) -> Self {
        let mut mix = Mix::new(1);
        let numbers = (0..1 << 26).flat_map(|_| bf16::from_f32(mix.signed()).to_le_bytes()).collect();
        Stock { device, numbers, shape: Vec::new(), format: None, fp8_rows: false, weights: None }
    }

    /// A processor whose store holds weights of this shape and format only.
    fn backend(&mut self, shape: &[usize], reserved_multiprocessors: u32) -> CudaBackend {
        let bits = self.format.map_or(0, |format| format.code.bits() + format.record_bytes() * 100);
        let shape = [shape, &[bits, usize::from(self.fp8_rows)]].concat();
        if self.shape != shape {
            self.weights = None;
            self.shape = shape;
        }
        let device = &self.device;
        let weights = self.weights.get_or_insert_with(|| CudaWeights::new(device).expect("a store"));
        let fp8_rows = self.fp8_rows;
        let options = CudaOptions { reserved_multiprocessors, fp8_rows, ..CudaOptions::new(DType::BF16) };
        CudaBackend::new(Rank(0), device, weights, options).expect("a processor")
    }

    fn load(&self, backend: &CudaBackend, name: &str, shape: WeightShape, salt: usize) -> Weight {
        if let Some(format) = self.format.filter(|_| shape.is_map()) {
            return self.load_codes(backend, name, shape, format, salt);
        }
        backend.find(name).unwrap_or_else(|| {
            let (sources, bytes) = (shape.sources().0, 2 * shape.parameters() / shape.sources().0);
            let spare = self.numbers.len().checked_sub(bytes).expect("enough random numbers");
            let start = |source: usize| (salt * 2 + source) * 1_000_002 % (spare + 1) / 2 * 2;
            let tensor = |source: usize| TensorBytes {
                dtype: DType::BF16,
                bytes: &self.numbers[start(source)..][..bytes],
            };
            let tensors: Vec<_> = (0..sources).map(tensor).collect();
            backend.load(name, shape, &tensors).expect("memory")
        })
    }

    fn load_codes(
        &self,
        backend: &CudaBackend,
        name: &str,
        shape: WeightShape,
        format: Format,
        salt: usize,
    ) -> Weight {
        backend.find(name).unwrap_or_else(|| {
            let (count, dimensions) = shape.sources();
            let (rows, columns) = (dimensions[0], dimensions[1]);
            // Scales of one, nearly.
            let record: Vec<u8> = match format.scale {
                Scale::E8M0 => vec![121],
                Scale::F16 => vec![0, 0x20],
                Scale::BF16 => vec![0, 0x3c],
                Scale::F32 => 0.01f32.to_le_bytes().to_vec(),
                _ => [0, 0x20].repeat(2).into_iter().chain((0..16).map(|at| 7 + 3 * at)).collect(),
            };
            let codes = |index: usize| Codes {
                format,
                rows,
                columns,
                codes: self.numbers[(salt * 2 + index) * 1000..][..rows * format.row_bytes(columns)].to_vec(),
                records: record.repeat(rows * format.groups(columns)),
            };
            let matrices: Vec<Codes> = (0..count).map(codes).collect();
            match self.fp8_rows {
                true => backend.load_fp8(name, shape, &matrices).expect("memory").expect("blocks"),
                false => backend.load_codes(name, shape, &matrices).expect("memory"),
            }
        })
    }

    fn random_rows(&self, backend: &CudaBackend, rows: usize, width: usize) -> Buffer {
        let held = 4096;
        let table =
            self.load(backend, &format!("rows of {width}"), WeightShape::Table { rows: held, width }, 1);
        let out = backend.allocate("x", DType::BF16, rows, width).expect("memory");
        let ids = words(backend, &(0..rows).map(|row| (row % held) as u32).collect::<Vec<_>>());
        run(backend, Embed { ids, table, out: out.clone() });
        out
    }

    fn products(
        &mut self,
        k: usize,
        n: usize,
        epilogue: Epilogue,
        grouped: bool,
        reserved: usize,
        counts: &[usize],
    ) -> Trial {
        let gated = epilogue == Epilogue::SwiGlu;
        let backend = self.backend(&[k, n, counts.len(), usize::from(gated)], reserved as u32);
        let rows: usize = counts.iter().sum();
        let maps = if gated { 2 } else { 1 };
        let sets = PAST_CACHE.div_ceil(2 * k * (counts.len() * n * maps + rows));
        let turns = (0..sets).map(|set| {
            let mut x = self.random_rows(&backend, rows, k);
            let mut out = backend.allocate("out", DType::BF16, rows, n).expect("memory");
            if self.fp8_rows {
                let room = backend.allocate("codes", DType::BF16, rows, k).expect("memory");
                let codes = room.as_fp8().expect("room");
                run(&backend, GatherFp8::encode(x, codes.clone()));
                x = codes;
                out = if gated { out.as_fp8().expect("room") } else { out };
            }
            let parts = self.parts(&backend, set, counts, (&x, &out), [n, k], gated);
            let gemm = |parts| Op::from(Gemm { parts, epilogue });
            if grouped {
                return vec![gemm(parts)];
            }
            parts.into_iter().filter(|part| part.x.rows > 0).map(|part| gemm(vec![part])).collect()
        });
        let turns = turns.collect();
        Trial { backend, turns, rows }
    }

    /// One product for each expert, of as many rows as `counts` says.
    fn parts(
        &self,
        backend: &CudaBackend,
        set: usize,
        counts: &[usize],
        (x, out): (&Buffer, &Buffer),
        [n, k]: [usize; 2],
        gated: bool,
    ) -> Vec<GemmPart> {
        let mut end = 0;
        let part = |(expert, &rows): (usize, &usize)| {
            let rows: Range<usize> = end..end + rows;
            end = rows.end;
            let shape = match gated {
                true => WeightShape::GateUp { inner: n, k },
                false => WeightShape::Matrix { n, k },
            };
            let name = format!("{gated} {set} {expert}");
            GemmPart {
                x: x.rows(rows.clone()).expect("inside"),
                weight: self.load(backend, &name, shape, set * counts.len() + expert),
                bias: None,
                out: out.rows(rows).expect("inside"),
            }
        };
        counts.iter().enumerate().map(part).collect()
    }

    /// Experts of one of eight ranks, from the rows that arrived to the sums that go back: top 6 of 160 experts of
    /// random tokens, so many that each expert here has about `each` rows, or just as many if that is asked for.
    fn experts(&mut self, hidden: usize, inner: usize, experts: usize, each: usize, equal: bool) -> Trial {
        const RANKS: usize = 8;
        const TOP: usize = 6;
        let backend = self.backend(&[hidden, inner, experts, 2], 0);
        let mut mix = Mix::new(7);
        let mut of_expert: Vec<Vec<u32>> = vec![Vec::new(); experts];
        let (mut arrived, mut copies) = (0, 0);
        while copies < each * experts {
            let mut chosen = Vec::new();
            while chosen.len() < TOP {
                let expert = mix.below(RANKS * experts);
                if !chosen.contains(&expert) {
                    chosen.push(expert);
                }
            }
            chosen.retain(|&expert| expert < experts && (!equal || of_expert[expert].len() < each));
            chosen.iter().for_each(|&expert| of_expert[expert].push(arrived));
            copies += chosen.len();
            arrived += u32::from(!chosen.is_empty());
        }
        let counts: Vec<usize> = of_expert.iter().map(Vec::len).collect();
        let expand: Vec<u32> = of_expert.concat();
        let mut terms: Vec<Vec<u32>> = vec![Vec::new(); arrived as usize];
        expand.iter().enumerate().for_each(|(copy, &row)| terms[row as usize].push(copy as u32));
        let index: Vec<u32> = terms
            .iter()
            .flat_map(|terms| terms.iter().copied().chain(std::iter::repeat(NONE)).take(TOP))
            .collect();
        let index_out = backend.allocate("index", DType::U32, terms.len(), TOP).expect("memory");
        run(&backend, HostToDevice { words: index.into(), out: index_out.clone() });
        let weights: Vec<u32> = (0..terms.len() * TOP).map(|_| mix.signed().to_bits()).collect();

        let room = |rows, width| backend.allocate("room", DType::BF16, rows, width).expect("memory");
        let rows = self.random_rows(&backend, arrived as usize, hidden);
        let (expanded, middle, outputs, sums) =
            (room(copies, hidden), room(copies, inner), room(copies, hidden), room(arrived as usize, hidden));
        let factors = backend.allocate("factors", DType::F32, terms.len(), TOP).expect("memory");
        run(&backend, HostToDevice { words: weights.into(), out: factors.clone() });
        let gemm = |parts, epilogue| Op::from(Gemm { parts, epilogue });
        let turn = vec![
            Gather { x: rows, index: words(&backend, &expand), out: expanded.clone() }.into(),
            gemm(
                self.parts(&backend, 0, &counts, (&expanded, &middle), [inner, hidden], true),
                Epilogue::SwiGlu,
            ),
            gemm(
                self.parts(&backend, 0, &counts, (&middle, &outputs), [hidden, inner], false),
                Epilogue::Store,
            ),
            Reduce { x: outputs, index: index_out, weights: Some(factors), addend: None, out: sums }.into(),
        ];
        Trial { backend, turns: vec![turn], rows: copies }
    }
}

impl Trial {
    /// What ran in each of `repeats` turns; one more warms up.
    fn records(&self, repeats: usize) -> Vec<Vec<Record>> {
        self.backend.set_recording(true);
        self.backend.take_records();
        let turns: Vec<_> = self.turns.iter().cycle().take(repeats + 1).collect();
        turns.iter().copied().flatten().for_each(|op| enqueue(&self.backend, op.clone()));
        finish(&self.backend);
        let mut records = self.backend.take_records().into_iter();
        turns.iter().map(|turn| records.by_ref().take(turn.len()).collect()).skip(1).collect()
    }

    /// Nanoseconds of each of `repeats` turns.
    fn times(&self, repeats: usize) -> Vec<u64> {
        self.records(repeats).iter().map(|turn| length(turn)).collect()
    }
}

/// Nanoseconds from the start of the first operation to the end of the last.
fn length(turn: &[Record]) -> u64 {
    turn[turn.len() - 1].end_ns - turn[0].start_ns
}

fn enqueue(backend: &CudaBackend, op: impl Into<Op>) {
    backend.enqueue(Lane::Compute, Place::default(), op).expect("it fits");
}

fn finish(backend: &CudaBackend) {
    let event = backend.record(Lane::Compute);
    backend.wait(&event, Deadline::after(Duration::from_secs(60))).expect("no fault");
}

fn run(backend: &CudaBackend, op: impl Into<Op>) {
    enqueue(backend, op);
    finish(backend);
}

fn words(backend: &CudaBackend, words: &[u32]) -> Buffer {
    let out = backend.allocate("words", DType::U32, words.len(), 1).expect("memory");
    run(backend, HostToDevice { words: words.into(), out: out.clone() });
    out
}

fn random(elements: usize) -> Vec<u8> {
    let mut mix = Mix::new(1);
    (0..elements).flat_map(|_| bf16::from_f32(mix.signed()).to_le_bytes()).collect()
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

/// Name, heads, key heads, width of keys and values; of latents, which one key head has, values are in their keys.
const HEADS: [(&str, usize, usize, usize, usize); 6] = [
    ("V2-Lite, absorbed", 16, 1, 576, 512),
    ("V2-Lite, prompt", 16, 16, 192, 128),
    ("DeepSeek-V2, prompt", 128, 128, 192, 128),
    ("Qwen3.5-35B-A3B", 16, 2, 256, 256),
    ("Qwen3-30B-A3B", 32, 4, 128, 128),
    ("OLMoE-1B-7B", 16, 16, 128, 128),
];
/// Sequences, cached positions and new tokens of each.
const SEQUENCES: [(usize, usize, usize); 8] = [
    (8, 0, 1024),
    (1, 0, 4096),
    (1, 0, 16384),
    (1, 0, 32768),
    (1, 1023, 1),
    (1, 32767, 1),
    (8, 1023, 1),
    (128, 1023, 1),
];

#[test]
#[ignore = "a measurement"]
fn attentions() {
    let device = match CudaDevice::open(0) {
        Ok(device) => device,
        Err(missing) => return eprintln!("skipped: {missing}"),
    };
    println!("attention             sequences  cached  new each  median µs   TFLOP/s   in codes");
    for heads in HEADS {
        for sequences in SEQUENCES {
            let measured = [DType::BF16, DType::E4M3].map(|cached| {
                let weights = CudaWeights::new(&device).expect("a store");
                let backend = CudaBackend::new(Rank(0), &device, &weights, CudaOptions::new(DType::BF16));
                measure_attention(&backend.expect("a processor"), heads, sequences, cached)
            });
            let [(plain, rate), (coded, _)] = measured;
            let ((name, ..), (sequences, cached, new)) = (heads, sequences);
            println!("{name:20}  {sequences:9}  {cached:6}  {new:8}  {plain:9.1}  {rate:8.1}  {coded:9.1}");
        }
    }
}

/// Microseconds, and TFLOP/s, of keys and values cached in `dtype`.
fn measure_attention(
    backend: &CudaBackend,
    (_, heads, kv_heads, key_width, value_width): (&str, usize, usize, usize, usize),
    (sequences, cached, new): (usize, usize, usize),
    dtype: DType,
) -> (f64, f64) {
    const BLOCK: usize = 64;
    let (lane, place) = (Lane::Compute, Place::default());
    let (tokens, blocks) = (sequences * new, (cached + new).div_ceil(BLOCK));
    let words = |name, words: Vec<u32>, width: usize| {
        let out = backend.allocate(name, DType::U32, words.len() / width, width).expect("memory");
        backend
            .enqueue(lane, place, HostToDevice { words: words.into(), out: out.clone() })
            .expect("it fits");
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
    let cache = |name: &'static str, width: usize| {
        let x = filled(name, slots, width);
        if dtype == DType::BF16 {
            return x;
        }
        let cache = backend.allocate(name, dtype, slots, width).expect("memory");
        let places = words("slots", (0..slots as u32).collect(), 1);
        let write = KvWrite::of(x, places, cache.clone(), 1.0);
        backend.enqueue(lane, place, write).expect("it fits");
        cache
    };
    let keys = cache("keys", kv_heads * key_width);
    let values = match key_width == value_width || kv_heads > 1 {
        true => cache("values", kv_heads * value_width),
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
        longest: cached + new,
        heads,
        kv_heads,
        scale: 1.0 / (key_width as f32).sqrt(),
        value_scale: 1.0,
        sight: Sight::All,
        sinks: None,
        out: backend.allocate("out", DType::BF16, tokens, heads * value_width).expect("memory"),
    };
    backend.set_recording(true);
    for _ in 0..REPEATS {
        backend.enqueue(lane, place, attention.clone()).expect("it fits");
    }
    backend.wait(&backend.record(lane), Deadline::after(Duration::from_secs(60))).expect("no fault");
    let median = median_ns(&backend.take_records(), "attention");
    let seen = sequences * (cached * new + new * (new + 1) / 2);
    let flops = 2.0 * (seen * heads * (key_width + value_width)) as f64;
    (median / 1e3, flops / median / 1e3)
}
