//! Rows that become int8 for weights whose codes are integers: products have the bits of their definition, on every processor of the
//! host, for every number of rows.

use crate::bench::{Bench, Sheet};
use crate::coded::{format, formats, random, run};
use epsmoe_device::cpu::{Cpu, multiplies_int8};
use epsmoe_device::op::*;
use epsmoe_device::{Backend, Buffer, Weight, WeightShape};
use epsmoe_quant::{Affine, Code, Codes, Format, Scale};
use half::bf16;

/// A block of a row: its scale and its integers.
struct Block {
    scale: f32,
    integers: Vec<i32>,
}

impl Block {
    fn new(x: &[f32]) -> Self {
        let scale = x.iter().fold(0.0, |most: f32, x| most.max(x.abs())) / 127.0;
        if !x.iter().all(|x| x.is_finite()) {
            return Block { scale: f32::NAN, integers: vec![0; x.len()] };
        }
        if scale < f32::MIN_POSITIVE {
            return Block { scale: 0.0, integers: vec![0; x.len()] };
        }
        Block { scale, integers: x.iter().map(|x| (x / scale).round_ties_even() as i32).collect() }
    }
}

/// `x · Wᵀ` of one row and one column, as it is defined.
fn product(codes: &Codes, column: usize, blocks: &[Block]) -> f32 {
    let Format { code, group, part, scale, .. } = codes.format;
    // FP4 counts in halves.
    let unit = if code == Code::E2M1 { 2.0 } else { 1.0 };
    let bytes = codes.row(column);
    let number = |k: usize| match code.bits() {
        4 => code.value(bytes[k / 2] >> (k % 2 * 4) & 15),
        _ => code.value(bytes[k]),
    };
    let mut sum = 0.0f32;
    for (index, block) in blocks.iter().enumerate() {
        let length = part.min(32);
        for (half, integers) in block.integers.chunks(length).enumerate() {
            let k = index * 32 + half * length;
            let Affine { scale: w, zero, minimum } =
                codes.format.affine(codes.record(column, k / group), k % group / part);
            let products = integers.iter().zip(k..).map(|(q, k)| (unit * (number(k) - zero)) as i32 * q);
            let (products, all) = (products.sum::<i32>(), integers.iter().sum::<i32>());
            sum = (block.scale * (w / unit)).mul_add(products as f32, sum);
            if scale == Scale::NestedWithMinima {
                sum = (-minimum).mul_add(block.scale * all as f32, sum);
            }
        }
    }
    sum
}

/// Rows of all kinds, of which some are as far from zero as integers go, and some are no numbers.
fn rows<B: Backend>(bench: &Bench<B>, count: usize, k: usize) -> Sheet {
    let mut x = bench.random(count, k, 1.0);
    for row in x.values.chunks_exact_mut(k) {
        match bench.below(8) {
            0 => row.iter_mut().for_each(|x| *x = 0.75 * x.signum()),
            1 => row.fill([0.75, -0.75, 0.0, 1e-38, -1e-45][bench.below(5)]),
            2 => row.iter_mut().for_each(|x| *x *= [0.0, 1e-30, 1.0][bench.below(3)]),
            3 if bench.below(4) == 0 => row[bench.below(k)] = [f32::NAN, f32::INFINITY][bench.below(2)],
            _ => (),
        }
        row.iter_mut().for_each(|x| {
            *x = if bench.dtype == epsmoe_base::DType::BF16 { bf16::from_f32(*x).to_f32() } else { *x };
        });
    }
    x
}

/// Codes of all kinds, and some columns of one code alone.
fn weights<B: Backend>(bench: &Bench<B>, format: Format, n: usize, k: usize) -> Codes {
    let mut codes = random(bench, format, n, k);
    let bytes = format.row_bytes(k);
    for row in codes.codes.chunks_exact_mut(bytes).filter(|_| bench.below(4) == 0) {
        row.fill([0x80, 0x7f, 0xff, 0][bench.below(4)]);
    }
    codes
}

pub(crate) fn suite(bench: Bench<Cpu>) {
    let row = 5000;
    let others = [
        format(Code::U4, Scale::BF16, [row, row], false),
        format(Code::U4, Scale::F16, [row, row], true),
        format(Code::I8, Scale::F32, [row, row], false),
        format(Code::I8, Scale::Nested, [64, 32], true),
    ];
    let integers =
        |format: &Format| multiplies_int8(format) || format.group == row && format.code != Code::E4M3;
    for format in formats().into_iter().chain(others).filter(integers) {
        for (n, k, epilogue) in [
            (5, 6_usize, Epilogue::Store),
            (33, 64, Epilogue::Store),
            (16, 65, Epilogue::SwiGlu),
            (50, 200, Epilogue::SwiGlu),
            (17, 331, Epilogue::Store),
            (3, 1402, Epilogue::Store),
            (88, 608, Epilogue::Store),
        ] {
            let group = k.next_multiple_of(8);
            let format = if format.group == row { Format { group, part: group, ..format } } else { format };
            if bench.device.holds(&format) {
                products(&bench, format, [n, k], epilogue);
            }
        }
    }
    side_by_side(&bench);
}

fn products(bench: &Bench<Cpu>, format: Format, [n, k]: [usize; 2], epilogue: Epilogue) {
    let (shape, count) = match epilogue {
        Epilogue::Store => (WeightShape::Matrix { n, k }, 1),
        Epilogue::SwiGlu => (WeightShape::GateUp { inner: n, k }, 2),
    };
    let matrices: Vec<Codes> = (0..count).map(|_| weights(bench, format, n, k)).collect();
    let name = format!("{format} {shape:?} {}", bench.below(usize::MAX));
    let held = bench.device.load_codes(&name, shape, &matrices).expect("memory");
    let most = 40;
    let x = rows(bench, most, k);
    let defined = |row: usize, column: usize| {
        let blocks: Vec<Block> = x.row(row).chunks(32).map(Block::new).collect();
        match &matrices[..] {
            [gate, up] => {
                let [gate, up] = [gate, up].map(|codes| f64::from(product(codes, column, &blocks)));
                gate / (1.0 + (-gate).exp()) * up
            }
            codes => f64::from(product(&codes[0], column, &blocks)),
        }
    };
    let what = format!("{format}, {epilogue:?}, n {n}, k {k}, seed {}", bench.seed);
    let whole = [0..most, most..most];
    let all = run(bench, &what, &held, &x, &whole, epilogue);
    for (row, got) in all.chunks_exact(n).enumerate() {
        for (column, &got) in got.iter().enumerate() {
            let want = defined(row, column);
            let as_stored = if bench.dtype == epsmoe_base::DType::BF16 {
                bf16::from_f32(want as f32).to_f32()
            } else {
                want as f32
            };
            let right = match epilogue {
                _ if want.is_nan() => got.is_nan(),
                Epilogue::Store => got.to_bits() == as_stored.to_bits(),
                Epilogue::SwiGlu => bench.dtype.tolerance().first_violation(&[got], &[want as f32]).is_none(),
            };
            assert!(right, "{what}: row {row}, column {column}: {got:e}, defined as {want:e}");
        }
    }
    for rows in [1, 2, 3, 5, 7, 14, 33] {
        let start = bench.below(most - rows + 1);
        let cut = bench.below(rows + 1);
        let some = run(bench, &what, &held, &x.take(start..start + rows), &[0..cut, cut..rows], epilogue);
        let same = some.iter().zip(&all[start * n..]).all(|(one, other)| one.to_bits() == other.to_bits());
        assert!(same, "{what}: {rows} rows have other bits than among {most}");
    }
}

/// Experts in several formats, of which not all are integers, in one operation: the bits of each alone.
fn side_by_side(bench: &Bench<Cpu>) {
    let (n, k) = (40, 192);
    let shape = WeightShape::Matrix { n, k };
    let held: Vec<Format> =
        formats().into_iter().filter(|format| bench.device.holds(format) && format.group < 5000).collect();
    let (mut starts, mut experts) = (vec![0], Vec::new());
    for expert in 0..12 {
        let format = held[bench.below(held.len())];
        let name = format!("expert {expert} of {}", bench.below(usize::MAX));
        let codes = random(bench, format, n, k);
        experts.push(bench.device.load_codes(&name, shape, &[codes]).expect("memory"));
        starts.push(starts[expert] + [0, 1, 3, 20, 70][bench.below(5)]);
    }
    let what = format!("formats side by side, seed {}", bench.seed);
    let x = bench.put(&bench.random(starts[12] as usize, k, 1.0));
    let outs = [0; 2].map(|_| bench.room(bench.dtype, starts[12] as usize, n));
    let op = ExpertGemm {
        x: x.view.clone(),
        starts: bench.put_words(&starts, 1).view,
        weights: experts.clone(),
        epilogue: Epilogue::Store,
        out: outs[0].view.clone(),
    };
    bench.run(&what, op);
    for (expert, weight) in experts.iter().enumerate() {
        let rows = starts[expert] as usize..starts[expert + 1] as usize;
        let view = |buffer: &Buffer| buffer.rows(rows.clone()).expect("inside");
        let part = |weight: &Weight| GemmPart {
            x: view(&x.view),
            weight: weight.clone(),
            bias: None,
            out: view(&outs[1].view),
        };
        bench.run(&what, Gemm { parts: vec![part(weight)], epilogue: Epilogue::Store });
    }
    let [grouped, alone] =
        outs.map(|out| bench.get(&what, &out).into_iter().map(f32::to_bits).collect::<Vec<_>>());
    assert!(grouped == alone, "{what}");
}
