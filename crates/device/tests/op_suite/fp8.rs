//! Products of FP8 rows and FP8 weights, on a GPU that has them: against the sums in float64 of what the codes mean, and against
//! themselves with other rows around, other tiles, and outputs in other formats.

use crate::bench::{Bench, Placed};
use crate::drawn::{random as random_places, sheet};
use crate::invariance::{Map, together_as_alone};
use epsmoe_base::float8::{E4M3, RowScales, encode_row, scaled_words};
use epsmoe_base::{DType, Mix, RowFormat};
use epsmoe_device::op::*;
use epsmoe_device::{Backend, Buffer, Drawn, Weight, WeightFormat, WeightShape};
use epsmoe_quant::{Code, Codes, Format, Scale, Target};
use half::bf16;
use std::ops::Range;

const BLOCK: usize = 128;

/// Codes with a scale for every 128 × 128; of one sign, the sums' worst case, or of both.
fn random<B: Backend>(bench: &Bench<B>, [rows, columns]: [usize; 2], signed: bool) -> Codes {
    let format = Format { code: Code::E4M3, scale: Scale::F32, group: BLOCK, part: BLOCK, zeros: false };
    let code = || bench.below(127) as u8 | if signed { (bench.below(2) as u8) << 7 } else { 0 };
    let codes = (0..rows * columns).map(|_| code()).collect();
    let across = columns.div_ceil(BLOCK);
    let scale = || (0.25 + bench.below(1 << 20) as f32 / (1 << 20) as f32) / 4096.0;
    let scales: Vec<[u8; 4]> = (0..rows.div_ceil(BLOCK) * across).map(|_| scale().to_le_bytes()).collect();
    let records = (0..rows).flat_map(|row| scales[row / BLOCK * across..][..across].concat()).collect();
    Codes { format, rows, columns, codes, records }
}

/// Numbers as rows of codes, each group of another size.
fn rows_of<B: Backend>(bench: &Bench<B>, [rows, k]: [usize; 2], signed: bool) -> Vec<Vec<u32>> {
    let row = |_| {
        let numbers: Vec<f32> = (0..k.div_ceil(BLOCK))
            .flat_map(|_| {
                let size = 2f32.powi(bench.below(6) as i32 - 3);
                let random = bench.random_of(DType::BF16, 1, BLOCK, size).values;
                random.into_iter().map(|number| if signed { number } else { number.abs() })
            })
            .take(k)
            .collect();
        codes_of(&numbers, RowScales::Exact)
    };
    (0..rows).map(row).collect()
}

fn codes_of(numbers: &[f32], scales: RowScales) -> Vec<u32> {
    let mut words = vec![0; scaled_words(numbers.len())];
    encode_row(numbers, |number| number, scales, &mut words);
    words
}

/// What the codes of a row mean.
fn meant(words: &[u32], k: usize) -> Vec<f64> {
    let (codes, scales) = words.split_at(k.div_ceil(4));
    let code = |column: usize| E4M3[codes[column / 4].to_le_bytes()[column % 4] as usize];
    (0..k).map(|column| f64::from(code(column)) * f64::from(f32::from_bits(scales[column / BLOCK]))).collect()
}

fn meant_weights(codes: &Codes) -> Vec<Vec<f64>> {
    let weight = |row: usize, column: usize| {
        let scale = codes.format.affine(codes.record(row, column / BLOCK), 0).scale;
        f64::from(E4M3[codes.row(row)[column] as usize]) * f64::from(scale)
    };
    (0..codes.rows).map(|row| (0..codes.columns).map(|column| weight(row, column)).collect()).collect()
}

/// A sum, and the sum of its terms' magnitudes.
fn sum(x: &[f64], w: &[f64]) -> (f64, f64) {
    x.iter().zip(w).fold((0.0, 0.0), |(sum, size), (x, w)| (sum + x * w, size + (x * w).abs()))
}

/// Rows on 16 bytes somewhere in a larger allocation, as models have them.
fn put<B: Backend>(bench: &Bench<B>, rows: &[Vec<u32>]) -> Placed {
    let placed = bench.room_on(4, DType::U32, rows.len(), rows[0].len());
    let words = rows.concat();
    bench.run("filling", HostToDevice { words: words.into(), out: placed.view.clone() });
    placed
}

/// What a weight gives of some rows, as bits: `parts` are rows of each product.
fn run<B: Backend>(
    bench: &Bench<B>,
    what: &str,
    weights: &[Weight],
    (x, parts): (&Buffer, &[Range<usize>]),
    epilogue: Epilogue,
    out: &Buffer,
) {
    let part = |(rows, weight): (&Range<usize>, &Weight)| GemmPart {
        x: x.rows(rows.clone()).expect("inside"),
        weight: weight.clone(),
        bias: None,
        out: out.rows(rows.clone()).expect("inside"),
    };
    bench.run(what, Gemm { parts: parts.iter().zip(weights).map(part).collect(), epilogue });
}

pub(crate) fn suite<B: Backend>(bench: Bench<B>) {
    for (n, k) in [(8, 8), (72, 64), (264, 136), (200, 576), (768, 1408), (512, 4096)] {
        for (epilogue, signed) in
            [(Epilogue::Store, true), (Epilogue::SwiGlu, true), (Epilogue::Store, false)]
        {
            products(&bench, [n, k], epilogue, signed);
        }
    }
    for size in [[8, 128], [72, 136], [264, 200], [136, 1408], [512, 4096]] {
        drawn(&bench, size, Target::Fp8PerBlock);
    }
    for size in [[8, 32], [72, 160], [264, 224], [512, 4096]] {
        drawn(&bench, size, Target::Mxfp4);
        folded(&bench, size);
    }
    for rows in [1, 3, 8, 9, 16, 33, 64, 65, 200] {
        maps_of_the_same_rows(&bench, rows);
    }
    refused(&bench);
}

/// Uneven maps, with biases and without, into both formats.
fn maps_of_the_same_rows<B: Backend>(bench: &Bench<B>, rows: usize) {
    let k = 8 * (1 + bench.below(200));
    // Some of the same width.
    let widths = [8 * (1 + bench.below(60)), 8 * (1 + bench.below(60))];
    let map = |_| {
        let n = widths[bench.below(2)];
        let bias = (bench.below(2) == 0).then(|| bench.vector(&bench.random_of(DType::F32, 1, n, 1.0)));
        let (name, codes) = (format!("weight {}", bench.below(usize::MAX)), [random(bench, [n, k], true)]);
        let weight = bench.device.load_fp8(&name, WeightShape::Matrix { n, k }, &codes);
        let weight = weight.expect("memory").expect("a kernel");
        Map { weight, bias, format: [DType::BF16, DType::F32][bench.below(2)] }
    };
    let maps: Vec<Map> = (0..2 + bench.below(4)).map(map).collect();
    let x = put(bench, &rows_of(bench, [rows, k], true));
    together_as_alone(bench, &format!("{rows} rows of {k} as codes"), &x.view, (&maps, 8));
}

/// Weights that are made where they will be have the codes that a host would have made, or what those fold into.
fn drawn<B: Backend>(bench: &Bench<B>, [n, k]: [usize; 2], target: Target) {
    for shape in [WeightShape::Matrix { n, k }, WeightShape::GateUp { inner: n, k }] {
        let what = format!("drawn as {target}, {shape:?}, seed {}", bench.seed);
        let tensors: Vec<Drawn> = (0..shape.sources().0).map(|_| random_places(bench, [n, k])).collect();
        let codes: Vec<Codes> = tensors.iter().map(|tensor| made(target, tensor, [n, k])).collect();
        let brought = bench.device.load_fp8(&what, shape, &codes).expect("memory").expect("a kernel");
        let drawn = bench.device.draw_fp8(&format!("{what} there"), shape, target, &tensors);
        let drawn = drawn.expect("memory").expect("a kernel");
        let [brought, drawn] = [brought, drawn].map(|weight| outcome(bench, &what, shape, &weight));
        assert!(brought == drawn, "{what}");
    }
}

/// The codes that a host makes of what is drawn.
fn made(target: Target, tensor: &Drawn, [n, k]: [usize; 2]) -> Codes {
    target.codes("drawn", &sheet(tensor, [n, k]).values, k).expect("finite").expect("codes")
}

/// Bits of a product with 70 rows that are alike for all weights of a shape.
fn outcome<B: Backend>(bench: &Bench<B>, what: &str, shape: WeightShape, weight: &Weight) -> Vec<u32> {
    let (count, dimensions) = shape.sources();
    let mut mix = Mix::new(dimensions[1] as u64);
    let row = |_| codes_of(&(0..dimensions[1]).map(|_| mix.signed()).collect::<Vec<_>>(), RowScales::Exact);
    let words: Vec<Vec<u32>> = (0..70).map(row).collect();
    let epilogue = if count == 2 { Epilogue::SwiGlu } else { Epilogue::Store };
    let (x, out) = (put(bench, &words), bench.room_on(8, DType::BF16, words.len(), dimensions[0]));
    let all = 0..words.len();
    run(
        bench,
        what,
        std::slice::from_ref(weight),
        (&x.view, std::slice::from_ref(&all)),
        epilogue,
        &out.view,
    );
    bits(&bench.get(what, &out))
}

/// MXFP4 is multiplied as the FP8 blocks with the same weights, and left to others where blocks have none.
fn folded<B: Backend>(bench: &Bench<B>, [n, k]: [usize; 2]) {
    let format = Format { code: Code::E2M1, scale: Scale::E8M0, group: 32, part: 32, zeros: false };
    for shape in [WeightShape::Matrix { n, k }, WeightShape::GateUp { inner: n, k }] {
        let what = format!("folded, {shape:?}, seed {}", bench.seed);
        let random = |_| Codes {
            format,
            rows: n,
            columns: k,
            codes: (0..n * k / 2).map(|_| bench.below(256) as u8).collect(),
            records: (0..n * k.div_ceil(32)).map(|_| 112 + bench.below(15) as u8).collect(),
        };
        let mut codes: Vec<Codes> = (0..shape.sources().0).map(random).collect();
        let load = |name: &str, codes: &[Codes]| bench.device.load_fp8(name, shape, codes).expect("memory");
        let weight = load(&what, &codes).expect("14 powers of two are few enough");
        assert_eq!(weight.format, WeightFormat::Fp8);
        let blocks: Vec<Codes> = codes.iter().map(|codes| codes.folded().expect("blocks")).collect();
        let given = load(&format!("{what}, given"), &blocks).expect("blocks");
        assert!(outcome(bench, &what, shape, &weight) == outcome(bench, &what, shape, &given), "{what}");
        // The largest weight of the last matrix is too large for its block.
        let last = codes.last_mut().expect("a matrix");
        *last.codes.last_mut().expect("codes") = 0x77;
        *last.records.last_mut().expect("scales") = 140;
        assert!(load(&format!("{what}, too far apart"), &codes).is_none(), "{what}");
    }
}

/// Experts with uneven rows, some without any.
fn products<B: Backend>(bench: &Bench<B>, [n, k]: [usize; 2], epilogue: Epilogue, signed: bool) {
    let counts = [1 + bench.below(64), 0, 64, 65, 1, 128 + bench.below(100), 2, 0];
    let what = format!("{epilogue:?}, n {n}, k {k}, rows {counts:?}, signed {signed}, seed {}", bench.seed);
    let (shape, matrices) = match epilogue {
        Epilogue::Store => (WeightShape::Matrix { n, k }, 1),
        Epilogue::SwiGlu => (WeightShape::GateUp { inner: n, k }, 2),
    };
    let codes: Vec<Vec<Codes>> =
        counts.iter().map(|_| (0..matrices).map(|_| random(bench, [n, k], signed)).collect()).collect();
    let load = |matrices: &Vec<Codes>| {
        let name = format!("weight {}", bench.below(usize::MAX));
        bench.device.load_fp8(&name, shape, matrices).expect("memory").expect("a kernel")
    };
    let weights: Vec<Weight> = codes.iter().map(load).collect();
    assert!(weights.iter().all(|weight| weight.format == WeightFormat::Fp8));
    let mut starts = vec![0];
    counts.iter().for_each(|count| starts.push(starts[starts.len() - 1] + count));
    let parts: Vec<Range<usize>> = starts.windows(2).map(|pair| pair[0]..pair[1]).collect();
    let rows = starts[counts.len()];
    let words = rows_of(bench, [rows, k], signed);
    let x = put(bench, &words);
    let out = bench.room_on(8, DType::BF16, rows, n);
    run(bench, &what, &weights, (&x.view, &parts), epilogue, &out.view);
    let got = bench.get(&what, &out);
    for (expert, part) in parts.iter().enumerate() {
        let meant_by: Vec<_> = codes[expert].iter().map(meant_weights).collect();
        for m in part.clone() {
            let x = meant(&words[m], k);
            for column in 0..n {
                // A bfloat16 has eight bits. Tensor cores keep thirteen of a sum of 32 products, and cut off what is below: of
                // codes of one sign and all sizes as much as a five-hundredth.
                let (value, slack) = match &meant_by[..] {
                    [gate, up] => {
                        let ((gate, gates), (up, ups)) = (sum(&x, &gate[column]), sum(&x, &up[column]));
                        let sigmoid = 1.0 / (1.0 + (-gate).exp());
                        (gate * sigmoid * up, gates * 1.1 * up.abs() + (gate * sigmoid).abs() * ups)
                    }
                    of => sum(&x, &of[0][column]),
                };
                let (found, error) = (f64::from(got[m * n + column]), 2f64.powi(-8) * value.abs());
                let most = error + 2f64.powi(-8) * slack + 1e-30;
                assert!(
                    (found - value).abs() <= most,
                    "{what}: row {m}, column {column}: {found:e}, not {value:e} within {most:e}"
                );
            }
        }
    }
    same_from_the_gpus_list(bench, &what, &weights, &x.view, &starts, epilogue, &got);
    let done =
        Products { what: &what, weights: &weights, words: &words, parts: &parts, epilogue, want: &got };
    same_alone(bench, &done);
    same_of_few(bench, &done);
    match epilogue {
        Epilogue::Store => same_in_float32(bench, &what, &weights, (&x.view, &parts), &got),
        Epilogue::SwiGlu => same_as_codes(bench, &what, &weights, (&x.view, &parts), RowScales::Exact, &got),
    }
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

/// Where the GPU itself finds out which rows each expert has.
fn same_from_the_gpus_list<B: Backend>(
    bench: &Bench<B>,
    what: &str,
    weights: &[Weight],
    x: &Buffer,
    starts: &[usize],
    epilogue: Epilogue,
    want: &[f32],
) {
    let out = bench.room_on(8, DType::BF16, x.rows, want.len() / x.rows);
    let starts: Vec<u32> = starts.iter().map(|&start| start as u32).collect();
    let op = ExpertGemm {
        x: x.clone(),
        starts: bench.put_words(&starts, 1).view,
        weights: weights.to_vec(),
        epilogue,
        out: out.view.clone(),
    };
    bench.run(what, op);
    assert!(bits(&bench.get(what, &out)) == bits(want), "{what}: other bits from the GPU's own list");
}

/// What products of experts' rows, each some codes, gave.
struct Products<'a> {
    what: &'a str,
    weights: &'a [Weight],
    words: &'a [Vec<u32>],
    /// The rows of each expert.
    parts: &'a [Range<usize>],
    epilogue: Epilogue,
    want: &'a [f32],
}

/// A row by itself, and among some of its neighbours.
fn same_alone<B: Backend>(bench: &Bench<B>, done: &Products<'_>) {
    let &Products { what, weights, words, parts, epilogue, want } = done;
    let n = want.len() / words.len();
    for (weight, part) in weights.iter().zip(parts).filter(|(_, part)| !part.is_empty()) {
        for most in [1, 8, 17, 32, 63, 90] {
            let first = part.start + bench.below(part.len());
            let rows = first..part.end.min(first + most);
            let x = put(bench, &words[rows.clone()]);
            let out = bench.room_on(8, DType::BF16, rows.len(), n);
            let (weight, all) = (std::slice::from_ref(weight), 0..rows.len());
            run(bench, what, weight, (&x.view, std::slice::from_ref(&all)), epilogue, &out.view);
            let got = bench.get(what, &out);
            assert!(bits(&got) == bits(&want[rows.start * n..rows.end * n]), "{what}: rows {rows:?} alone");
        }
    }
}

/// A few rows of each expert, of some none: products that are made for few.
fn same_of_few<B: Backend>(bench: &Bench<B>, done: &Products<'_>) {
    let &Products { what, weights, words, parts, epilogue, want } = done;
    let n = want.len() / words.len();
    let most = [[1, 0, 2, 8, 1, 3, 2, 0], [9, 0, 16, 8, 1, 31, 2, 0], [17, 0, 64, 33, 1, 64, 2, 0]];
    for most in most {
        let of = |(part, most): (&Range<usize>, &usize)| part.start..part.end.min(part.start + most);
        let chosen: Vec<Range<usize>> = parts.iter().zip(&most).map(of).collect();
        let mut starts = vec![0];
        chosen.iter().for_each(|part| starts.push(starts[starts.len() - 1] + part.len()));
        let few: Vec<Range<usize>> = starts.windows(2).map(|pair| pair[0]..pair[1]).collect();
        let x = put(bench, &chosen.iter().flat_map(|part| words[part.clone()].to_vec()).collect::<Vec<_>>());
        let want: Vec<f32> =
            chosen.iter().flat_map(|part| want[part.start * n..part.end * n].to_vec()).collect();
        let out = bench.room_on(8, DType::BF16, x.view.rows, n);
        run(bench, what, weights, (&x.view, &few), epilogue, &out.view);
        assert!(bits(&bench.get(what, &out)) == bits(&want), "{what}: {few:?} alone");
        same_from_the_gpus_list(bench, what, weights, &x.view, &starts, epilogue, &want);
        if epilogue == Epilogue::SwiGlu {
            same_as_codes(bench, what, weights, (&x.view, &few), RowScales::Exact, &want);
        }
    }
}

/// Sums in float32, which round to the bfloat16; and with a bias, which is added before.
fn same_in_float32<B: Backend>(
    bench: &Bench<B>,
    what: &str,
    weights: &[Weight],
    (x, parts): (&Buffer, &[Range<usize>]),
    want: &[f32],
) {
    let n = want.len() / x.rows;
    let out = bench.room_on(8, DType::F32, x.rows, n);
    run(bench, what, weights, (x, parts), Epilogue::Store, &out.view);
    let wide = bench.get(what, &out);
    let rounded =
        |values: &[f32]| values.iter().map(|&value| bf16::from_f32(value).to_f32()).collect::<Vec<_>>();
    assert!(bits(&rounded(&wide)) == bits(want), "{what}: float32 does not round to the bfloat16");
    let sheet = bench.random_of(DType::F32, 1, n, 1.0);
    let bias = bench.load(WeightShape::Vector { n }, DType::F32, &[&sheet]);
    let (rows, biased) = (parts[5].clone(), bench.room_on(8, DType::BF16, parts[5].len(), n));
    let some = x.rows(rows.clone()).expect("inside");
    bench.run(what, Gemm::biased(some, &weights[5], Some(&bias), biased.view.clone()));
    let sums = wide[rows.start * n..rows.end * n].iter().zip(sheet.values.iter().cycle());
    let sums: Vec<f32> = sums.map(|(sum, bias)| sum + bias).collect();
    assert!(bits(&bench.get(what, &biased)) == bits(&rounded(&sums)), "{what}: a bias");
}

/// Activations as codes are the codes of activations in bfloat16, where numbers would lie too.
fn same_as_codes<B: Backend>(
    bench: &Bench<B>,
    what: &str,
    weights: &[Weight],
    (x, parts): (&Buffer, &[Range<usize>]),
    scales: RowScales,
    want: &[f32],
) {
    let n = want.len() / x.rows;
    let (_, words) = RowFormat::Fp8.elements(n);
    let out = bench.room_on(4, DType::U32, x.rows, words);
    run(bench, what, weights, (x, parts), Epilogue::SwiGlu, &out.view);
    for (m, got) in bench.get_words(what, &out).chunks(words).enumerate() {
        assert!(
            got == codes_of(&want[m * n..(m + 1) * n], scales),
            "{what}: codes of row {m} are not those of its numbers"
        );
    }
}

/// Where scales of rows are powers of two: of rows that become codes, and of gated products of few rows and many that leave as such.
pub(crate) fn power_scales<B: Backend>(bench: Bench<B>) {
    for rows in [1, 7, 64, 200] {
        let (n, k) = (8 * (1 + bench.below(60)), 8 * (1 + bench.below(60)));
        let what = format!("powers of two, {rows} rows, n {n}, k {k}, seed {}", bench.seed);
        let numbers = bench.random_of(DType::BF16, rows, k, 100.0);
        let coded = bench.room_on(4, DType::U32, rows, scaled_words(k));
        let x = bench.put(&numbers);
        bench.run(&what, GatherFp8::encode(x.view.clone(), coded.view.clone()));
        let want: Vec<u32> =
            numbers.values.chunks(k).flat_map(|row| codes_of(row, RowScales::Powers)).collect();
        assert!(bench.get_words(&what, &coded) == want, "{what}: rows");
        let matrices = [(); 2].map(|()| random(&bench, [n, k], true));
        let weight = bench.device.load_fp8(&what, WeightShape::GateUp { inner: n, k }, &matrices);
        let weights = [weight.expect("memory").expect("a kernel")];
        let (out, all) = (bench.room_on(8, DType::BF16, rows, n), 0..rows);
        let all = std::slice::from_ref(&all);
        run(&bench, &what, &weights, (&coded.view, all), Epilogue::SwiGlu, &out.view);
        let outputs = bench.get(&what, &out);
        same_as_codes(&bench, &what, &weights, (&coded.view, all), RowScales::Powers, &outputs);
    }
}

/// What is not codes in blocks is left to others; rows that are not codes are refused.
fn refused<B: Backend>(bench: &Bench<B>) {
    let (n, k) = (16, 256);
    let mut codes = random(bench, [n, k], true);
    let shape = WeightShape::Matrix { n, k };
    let held = bench.device.load_fp8("blocks", shape, std::slice::from_ref(&codes)).expect("memory");
    let product = Gemm::linear(
        bench.room_on(8, DType::BF16, 3, k).view,
        &held.expect("a kernel"),
        bench.room_on(8, DType::BF16, 3, n).view,
    );
    let message = bench.try_run(product.into()).expect_err("rows are numbers").to_string();
    assert!(message.contains("multiplied with rows in fp8"), "{message}");
    codes.records[..4].copy_from_slice(&9f32.to_le_bytes());
    assert!(bench.device.load_fp8("rows", shape, &[codes]).expect("memory").is_none(), "a scale for a row");
}
