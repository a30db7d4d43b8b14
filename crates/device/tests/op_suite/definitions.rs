//! Every operation against its definition, written here in float64, one number at a time.

use crate::assignments;
use crate::bench::{Bench, CacheParts, Heads, Placed, Sequences, Sheet};
use epsmoe_base::float8::E4M3;
use epsmoe_base::{DType, RowFormat};
use epsmoe_device::op::*;
use epsmoe_device::{Backend, Buffer, Weight, WeightShape};
use half::bf16;

/// `[rows, width]` that row operations are tried on: nothing, one, odd, more than a vector register, enough for several
/// threads.
const SIZES: [(usize, usize); 8] = [(0, 5), (1, 1), (3, 7), (5, 33), (17, 64), (2, 130), (70, 3), (90, 605)];

pub(crate) fn suite<B: Backend>(bench: Bench<B>) {
    for (rows, width) in SIZES {
        lookups(&bench, rows, width);
        norms(&bench, rows, width);
        elementwise(&bench, rows, width);
        gathers(&bench, rows, width);
        coded_rows(&bench, rows, width);
        reductions(&bench, rows, width);
    }
    coded_rows_that_are_not_finite(&bench);
    folding_order(&bench);
    stored_formats(&bench);
    rotations(&bench);
    sums_and_their_norms(&bench);
    turned_norms(&bench);
    products(&bench);
    activations(&bench);
    attentions(&bench);
    crate::recurrent::definitions(&bench);
    routes(&bench);
    scaled_terms(&bench);
    chosen_experts(&bench);
    largest(&bench);
    assignments::assignments(&bench);
    bench.check_complete();
}

fn wide(values: &[f32]) -> Vec<f64> {
    values.iter().map(|&value| f64::from(value)).collect()
}

fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

/// Calls `value(row, column)` for every element.
fn each(rows: usize, width: usize, value: impl Fn(usize, usize) -> f64) -> Vec<f64> {
    (0..rows * width).map(|at| value(at / width, at % width)).collect()
}

fn lookups<B: Backend>(bench: &Bench<B>, rows: usize, width: usize) {
    let what = format!("lookups [{rows}, {width}]");
    let words: Vec<u32> = (0..rows * width).map(|_| bench.below(1 << 30) as u32).collect();
    let out = bench.put_words(&words, width);
    assert_eq!(bench.get_words(&what, &out), words, "{what}, seed {}", bench.seed);
    // The bits of floats.
    let floats = bench.random_of(DType::F32, rows, width, 9.0);
    let out = bench.room(DType::F32, rows, width);
    let words = floats.values.iter().map(|value| value.to_bits()).collect();
    bench.run(&what, HostToDevice { words, out: out.view.clone() });
    bench.check_exactly(&what, &out, &floats.values);

    let sheet = bench.coarse(9, width);
    let ids: Vec<u32> = (0..rows).map(|_| bench.below(9) as u32).collect();
    let want: Vec<f32> = ids.iter().flat_map(|&id| sheet.row(id as usize).to_vec()).collect();
    for stored in [DType::F32, DType::BF16, DType::F16] {
        let table = bench.load(WeightShape::Table { rows: 9, width }, stored, &[&sheet]);
        let out = bench.room(bench.dtype, rows, width);
        let ids = bench.put_words(&ids, 1).view;
        bench.run(&what, Embed { ids, table, out: out.view.clone() });
        bench.check_exactly(&format!("{what} stored as {stored}"), &out, &want);
    }
}

fn norms<B: Backend>(bench: &Bench<B>, rows: usize, width: usize) {
    let kinds = [
        (NormKind::Rms, 1e-5, false, 1),
        (NormKind::Layer, 1e-2, false, 1),
        (NormKind::Layer, 1e-2, true, 1),
        (NormKind::Rms, 1e-5, true, 3),
    ];
    for ((kind, eps, biased, groups), format) in
        kinds.into_iter().flat_map(|kind| [(kind, bench.dtype), (kind, DType::F32)])
    {
        let what = format!("{kind:?} of {format} [{rows}, {width}], bias {biased}, {groups} weights");
        let scale = bench.random_of(DType::F32, 1, groups * width, 2.0);
        let added = bench.random_of(DType::F32, 1, groups * width, 2.0);
        let x = bench.random_of(format, rows, width, 3.0);
        let (input, out) = (bench.put_as(format, &x), bench.room(bench.dtype, rows, width));
        let (from, to) = (input.view.clone(), out.view.clone());
        let (weight, bias) = (bench.vector(&scale), biased.then(|| bench.vector(&added)));
        bench.run(&what, Norm { kind, x: from, weight, bias, eps, out: to, codes: None, origin: None });
        let want = (0..rows).flat_map(|row| {
            let own = row % groups * width;
            let row = wide(x.row(row));
            let mean = |values: &[f64]| values.iter().sum::<f64>() / width as f64;
            let centre = if kind == NormKind::Layer { mean(&row) } else { 0.0 };
            let squares: Vec<f64> = row.iter().map(|x| (x - centre) * (x - centre)).collect();
            let root = (mean(&squares) + f64::from(eps)).sqrt();
            let added = |n: usize| if biased { f64::from(added.values[own + n]) } else { 0.0 };
            let normed =
                |(n, x): (usize, &f64)| (x - centre) / root * f64::from(scale.values[own + n]) + added(n);
            row.iter().enumerate().map(normed).collect::<Vec<f64>>()
        });
        bench.check(&what, &out, &want.collect::<Vec<_>>());
        bench.check_exactly(&format!("input of {what}"), &input, &x.values);
    }
}

/// What is added, normed and left as codes too in one has the bits of all, one after the other: in rows of one run, of a block's registers, and
/// wider ones.
fn sums_and_their_norms<B: Backend>(bench: &Bench<B>) {
    for (rows, width) in [(0, 8), (3, 5), (40, 128), (5, 256), (7, 300), (3, 2048), (2, 5000), (2, 9001)] {
        let scale = bench.vector(&bench.random_of(DType::F32, 1, width, 2.0));
        for (kind, format) in [(NormKind::Rms, DType::F32), (NormKind::Layer, bench.dtype)] {
            let what = format!("{kind:?} of a sum [{rows}, {width}] in {format}");
            let sheet = || bench.random_of(format, rows, width, 3.0);
            let (stream, delta) = (sheet(), bench.put_as(format, &sheet()));
            let run = |together: bool| {
                let (x, out) = (bench.put_as(format, &stream), bench.room(bench.dtype, rows, width));
                let (dtype, words) = RowFormat::Fp8.elements(width);
                let codes = bench.room(dtype, rows, words);
                let add = Add { x: delta.view.clone(), out: x.view.clone() };
                let (weight, eps) = (scale.clone(), 1e-5);
                let norm = Norm {
                    kind,
                    x: x.view.clone(),
                    weight,
                    bias: None,
                    eps,
                    out: out.view.clone(),
                    codes: together.then(|| codes.view.clone()),
                    origin: None,
                };
                if together {
                    bench.run(&what, AddNorm { add, norm });
                } else {
                    bench.run(&what, add);
                    bench.run(&what, norm);
                    bench.run(&what, GatherFp8::encode(out.view.clone(), codes.view.clone()));
                }
                (bench.get(&what, &x), bench.get(&what, &out), bench.get_words(&what, &codes))
            };
            assert_eq!(run(true), run(false), "{what}, seed {}", bench.seed);
        }
    }
}

/// Heads that are normed and turned in one have the bits of both, one after the other.
fn turned_norms<B: Backend>(bench: &Bench<B>) {
    // Tokens, heads, elements of a head and how many of them are turned.
    for (tokens, heads, width, dims) in [
        (0, 2, 16, 16),
        (1, 1, 128, 128),
        (5, 3, 128, 64),
        (9, 2, 64, 64),
        (7, 5, 256, 256),
        (3, 2, 96, 48),
        (4, 3, 20, 12),
        (2, 2, 320, 64),
    ] {
        // Of queries and of more keys, say, with fewer heads.
        let inputs = [(tokens, heads), (tokens + 3, 1)].map(|(tokens, heads)| {
            let scale = bench.vector(&bench.random_of(DType::F32, 1, width, 2.0));
            let rope_table = bench.put_as(DType::F32, &bench.random_of(DType::F32, tokens, dims, 1.0)).view;
            (tokens, heads, scale, rope_table, bench.put(&bench.random(tokens * heads, width, 3.0)).view)
        });
        for style in [RopeStyle::HalfSplit, RopeStyle::Interleaved] {
            let what = format!("{style:?} of {dims} of {width} after a norm, {heads} heads, {tokens} tokens");
            let part = |(tokens, heads, scale, rope_table, x): &(usize, usize, Weight, Buffer, Buffer)| {
                let rows =
                    bench.device.allocate("normed", bench.dtype, tokens * heads, width).expect("memory");
                let turned = rows.reshape(heads * width).expect("no gaps");
                let norm = Norm {
                    kind: NormKind::Rms,
                    x: x.clone(),
                    weight: scale.clone(),
                    bias: None,
                    eps: 1e-5,
                    out: rows,
                    codes: None,
                    origin: None,
                };
                let (x, rope_table) = (turned, rope_table.clone());
                TurnedNorm { norm, rotate: Rotate { x, head_width: width, start: 0, style, rope_table } }
            };
            let run = |together: bool| -> Vec<Vec<f32>> {
                let parts: Vec<TurnedNorm> = inputs.iter().map(part).collect();
                if together {
                    bench.run(&what, NormRotate { parts: parts.clone() });
                } else {
                    for TurnedNorm { norm, rotate } in &parts {
                        bench.run(&what, norm.clone());
                        bench.run(&what, rotate.clone());
                    }
                }
                let got = |TurnedNorm { rotate, .. }: TurnedNorm| {
                    let out = bench.room(bench.dtype, rotate.x.rows, rotate.x.width);
                    bench.run(&what, Copy { x: rotate.x, out: out.view.clone() });
                    bench.get(&what, &out)
                };
                parts.into_iter().map(got).collect()
            };
            assert_eq!(run(true), run(false), "{what}, seed {}", bench.seed);
        }
    }
}

fn elementwise<B: Backend>(bench: &Bench<B>, rows: usize, width: usize) {
    let (a, b) = (bench.random(rows, width, 3.0), bench.random(rows, width, 3.0));
    let gate = bench.random_of(DType::F32, rows, 1, 4.0);
    let at = |sheet: &Sheet, row: usize, column: usize| f64::from(sheet.row(row)[column]);
    type InPlace<'a> = (&'a str, &'a dyn Fn(epsmoe_device::Buffer) -> Op, &'a dyn Fn(usize, usize) -> f64);
    let x = bench.put(&b);
    let gates = bench.put_as(DType::F32, &gate);
    let wide = bench.random_of(DType::F32, rows, width, 3.0);
    let floats = bench.put_as(DType::F32, &wide);
    let operations: [InPlace<'_>; 8] = [
        ("add", &|out| Add { x: x.view.clone(), out }.into(), &|m, n| at(&a, m, n) + at(&b, m, n)),
        ("copy", &|out| Copy { x: x.view.clone(), out }.into(), &|m, n| at(&b, m, n)),
        ("copy of float32", &|out| Copy { x: floats.view.clone(), out }.into(), &|m, n| at(&wide, m, n)),
        ("clamp", &|x| Clamp { x, limit: 1.5 }.into(), &|m, n| at(&a, m, n).clamp(-1.5, 1.5)),
        ("scale", &|x| Scale { x, factor: -0.3 }.into(), &|m, n| f64::from(-0.3f32) * at(&a, m, n)),
        ("soft cap", &|x| SoftCap { x, cap: 1.25 }.into(), &|m, n| 1.25 * (at(&a, m, n) / 1.25).tanh()),
        ("clamp to nothing", &|x| Clamp { x, limit: 0.0 }.into(), &|_, _| 0.0),
        ("gate", &|x| GateRows { gate: gates.view.clone(), x }.into(), &|m, n| {
            at(&a, m, n) * sigmoid(at(&gate, m, 0))
        }),
    ];
    for (name, op, want) in operations {
        let what = format!("{name} [{rows}, {width}]");
        let out = bench.put(&a);
        bench.run(&what, op(out.view.clone()));
        bench.check(&what, &out, &each(rows, width, want));
    }
    bench.check_exactly("what was added and copied", &x, &b.values);
}

fn gathers<B: Backend>(bench: &Bench<B>, rows: usize, width: usize) {
    let what = format!("gather [{rows}, {width}]");
    let x = bench.random(6, width, 3.0);
    // What an index names no row for stays.
    let any = |_| if bench.below(4) == 0 { NONE } else { bench.below(6) as u32 };
    let index: Vec<u32> = (0..rows).map(any).collect();
    let before = bench.random(rows, width, 3.0);
    let out = bench.put(&before);
    let places = bench.put_words(&index, 1).view;
    bench.run(&what, Gather { x: bench.put(&x).view, index: places, out: out.view.clone() });
    let row = |(m, &row): (usize, &u32)| if row == NONE { before.row(m) } else { x.row(row as usize) };
    let want: Vec<f32> = index.iter().enumerate().flat_map(|at| row(at).to_vec()).collect();
    bench.check_exactly(&what, &out, &want);

    let what = format!("store [{rows}, {width}]");
    let x = bench.random(rows, width, 3.0);
    let mut cache = bench.random(rows + 4, width, 3.0);
    let slots = bench.shuffled(rows + 4)[..rows].to_vec();
    // Beside rows of another width.
    let (other, others) =
        (bench.random(rows, 3 * width, 3.0), bench.put(&bench.random(rows + 4, 3 * width, 3.0)));
    let held = bench.put(&cache);
    let places = bench.put_words(&slots, 1).view;
    let part =
        |x: &Sheet, cache: &Placed| KvRows { x: bench.put(x).view, cache: cache.view.clone(), scale: 1.0 };
    let parts = vec![part(&x, &held), part(&other, &others)];
    bench.run(&what, KvWrite { parts, slots: places });
    let stored = bench.get(&what, &others);
    for (row, &slot) in slots.iter().enumerate() {
        cache.values[slot as usize * width..][..width].copy_from_slice(x.row(row));
        assert_eq!(stored[slot as usize * 3 * width..][..3 * width], *other.row(row), "{what}, row {row}");
    }
    bench.check_exactly(&what, &held, &cache.values);

    let what = format!("store in codes [{rows}, {width}]");
    let mut x = bench.random(rows + 2, width, 20.0);
    // The ends of what codes can say, and the way between two of them.
    let edges = [448.0, -449.0, 1e9, 0.001, -0.0, 17.0, 19.0];
    x.values.iter_mut().zip(edges).for_each(|(x, edge)| *x = bf16::from_f32(edge).to_f32());
    for scale in [1.0, 0.037] {
        let (placed, numbers) = bench.put_codes(1, &x, scale);
        let got = bench.get(&what, &placed);
        for (at, (&got, &want)) in got.iter().zip(&numbers.values).enumerate() {
            assert!(
                got.to_bits() == want.to_bits(),
                "{what}, scale {scale}, seed {}: {got} for {}, not {want}",
                bench.seed,
                x.values[at]
            );
        }
        let back = bench.room(bench.dtype, x.rows, width);
        let index = bench.put_words(&(0..x.rows as u32).rev().collect::<Vec<_>>(), 1).view;
        bench.run(&what, Gather { x: placed.view.clone(), index, out: back.view.clone() });
        let back = bench.get(&what, &back);
        let rows = got.chunks(width).rev().flatten();
        assert!(back.iter().eq(rows), "{what}: other numbers gathered, seed {}", bench.seed);
    }
}

/// Codes and scales of a row, and what they stand for, by the definition: the nearest of all values, the even code of
/// two that are as near, over the scale of its 128 neighbours.
fn fp8_of(row: &[f32]) -> (Vec<u32>, Vec<f32>) {
    let row: Vec<f32> = row.iter().map(|&x| bf16::from_f32(x).to_f32()).collect();
    let (mut bytes, mut scales, mut numbers) = (Vec::new(), Vec::new(), Vec::new());
    for group in row.chunks(128) {
        let scale = group.iter().fold(1e-4f32, |most, x| most.max(x.abs())) / 448.0;
        for x in group {
            let size = f64::from((x / scale).abs());
            let distance = |code: usize| (f64::from(E4M3[code]) - size).abs();
            let best =
                (0..0x7f).min_by(|&a, &b| distance(a).total_cmp(&distance(b)).then((a & 1).cmp(&(b & 1))));
            let code = best.expect("there are codes") + if x.is_sign_negative() { 128 } else { 0 };
            bytes.push(code as u8);
            numbers.push(E4M3[code] * scale);
        }
        scales.push(scale.to_bits());
    }
    bytes.resize(row.len().next_multiple_of(4), 0);
    let words = bytes.chunks(4).map(|four| u32::from_le_bytes([four[0], four[1], four[2], four[3]]));
    (words.chain(scales).collect(), numbers)
}

fn coded_rows<B: Backend>(bench: &Bench<B>, rows: usize, width: usize) {
    let what = format!("rows in fp8 [{rows}, {width}]");
    // Groups of very different sizes, one of them nothing but zeros.
    let mut x = bench.random(6, width, 3.0);
    let size = |at: usize| [1.0, 0.0, 256.0, 1.0 / 4096.0][at % width / 128 % 4];
    x.values.iter_mut().enumerate().for_each(|(at, x)| *x *= size(at));
    let index: Vec<u32> = (0..rows).map(|_| bench.below(6) as u32).collect();
    let (source, places) = (bench.put(&x).view, bench.put_words(&index, 1).view);
    let of_rows = || index.iter().map(|&row| fp8_of(x.row(row as usize)));
    let (words, numbers): (Vec<_>, Vec<_>) = of_rows().unzip();
    let (_, coded_width) = RowFormat::Fp8.elements(width);
    let gather = |x: &Buffer, out: &Placed, how| {
        let (x, index, out) = (x.clone(), places.clone(), out.view.clone());
        bench.run(&what, GatherFp8 { x, index: Some(index), out, how });
    };
    let coded = bench.room(DType::U32, rows, coded_width);
    gather(&source, &coded, Fp8::Encode);
    assert_eq!(bench.get_words(&what, &coded), words.concat(), "{what}, seed {}", bench.seed);
    let round =
        |number: f32| if bench.dtype == DType::BF16 { bf16::from_f32(number).to_f32() } else { number };
    let want: Vec<f32> = numbers.concat().into_iter().map(round).collect();
    let through = bench.room(bench.dtype, rows, width);
    gather(&source, &through, Fp8::Through);
    bench.check_exactly(&format!("{what}, there and back"), &through, &want);
    // Back from codes, in another order.
    let all: Vec<u32> = (0..6).flat_map(|row| fp8_of(x.row(row)).0).collect();
    let (codes, decoded) = (bench.put_words(&all, coded_width).view, bench.room(bench.dtype, rows, width));
    gather(&codes, &decoded, Fp8::Decode);
    bench.check_exactly(&format!("{what}, decoded"), &decoded, &want);
}

/// A number that is not finite spoils its group on the other side, and nothing else.
fn coded_rows_that_are_not_finite<B: Backend>(bench: &Bench<B>) {
    const WIDTH: usize = 300;
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let mut x = bench.random(1, WIDTH, 3.0);
        let at = bench.below(WIDTH);
        x.values[at] = bad;
        let (source, index) = (bench.put(&x).view, bench.put_words(&[0], 1).view);
        let (dtype, words) = RowFormat::Fp8.elements(WIDTH);
        let (coded, out) = (bench.room(dtype, 1, words).view, bench.room(bench.dtype, 1, WIDTH).view);
        let to =
            GatherFp8 { x: source.clone(), index: Some(index.clone()), out: coded.clone(), how: Fp8::Encode };
        bench.run("to fp8", to);
        for (x, how) in [(coded, Fp8::Decode), (source, Fp8::Through)] {
            bench.run("from fp8", GatherFp8 { x, index: Some(index.clone()), out: out.clone(), how });
            let got = bench.device.read_f32(&out).expect("ordered by the host");
            let spoilt = |column: usize| column / 128 == at / 128;
            for (column, value) in got.iter().enumerate() {
                assert_eq!(value.is_nan(), spoilt(column), "{bad} at {at}, seed {}: {column}", bench.seed);
            }
        }
    }
}

/// Sums of zero to four terms.
fn reductions<B: Backend>(bench: &Bench<B>, rows: usize, width: usize) {
    const TERMS: usize = 4;
    let x = bench.random(7, width, 1.0);
    let terms = |_| {
        let used = bench.below(TERMS + 1);
        let term = move |term| if term < used { bench.below(7) as u32 } else { NONE };
        (0..TERMS).map(term)
    };
    let index: Vec<u32> = (0..rows).flat_map(terms).collect();
    let weights = bench.random_of(DType::F32, rows, TERMS, 1.0);
    let addend = bench.random(rows, width, 1.0);
    let formats = [bench.dtype, DType::F32].into_iter();
    let ways = formats.flat_map(|format| {
        [(false, false), (true, false), (false, true), (true, true)].map(|way| (way, format))
    });
    for ((weighted, added), format) in ways {
        let what = format!("reduce [{rows}, {width}] into {format}, weights {weighted}, addend {added}");
        let out = bench.room(format, rows, width);
        bench.run(
            &what,
            Reduce {
                x: bench.put(&x).view,
                index: bench.put_words(&index, TERMS).view,
                weights: weighted.then(|| bench.put_as(DType::F32, &weights).view),
                addend: added.then(|| bench.put(&addend).view),
                out: out.view.clone(),
            },
        );
        let want = each(rows, width, |row, column| {
            let terms = (0..TERMS).filter(|term| index[row * TERMS + term] != NONE);
            let weight = |term: usize| if weighted { f64::from(weights.row(row)[term]) } else { 1.0 };
            let term = |term| weight(term) * f64::from(x.row(index[row * TERMS + term] as usize)[column]);
            let addend = if added { f64::from(addend.row(row)[column]) } else { 0.0 };
            terms.map(term).sum::<f64>() + addend
        });
        bench.check(&what, &out, &want);
    }
}

/// Terms are folded from left to right in float32, the addend last: next to a large number a one is lost.
fn folding_order<B: Backend>(bench: &Bench<B>) {
    let large = (1u32 << 27) as f32;
    let x = Sheet { rows: 3, width: 1, values: vec![1.0, large, -large] };
    for (order, addend, want) in [
        ([0, 1, 2], 0.0, 0.0),
        ([1, 0, 2], 0.0, 0.0),
        ([1, 2, 0], 0.0, 1.0),
        ([1, 2, 0], large, large),
        ([0, 0, 1], -large, 0.0),
    ] {
        let out = bench.room(bench.dtype, 1, 1);
        bench.run(
            "fold",
            Reduce {
                x: bench.put(&x).view,
                index: bench.put_words(&order, 3).view,
                weights: None,
                addend: Some(bench.put(&Sheet { rows: 1, width: 1, values: vec![addend] }).view),
                out: out.view.clone(),
            },
        );
        bench.check_exactly(&format!("fold {order:?} and {addend}"), &out, &[want]);
    }
}

/// A weight is the same number whatever the checkpoint stores it as.
fn stored_formats<B: Backend>(bench: &Bench<B>) {
    let (weight, x, bias) = (bench.coarse(5, 9), bench.coarse(3, 9), bench.coarse(1, 5));
    let want = each(3, 5, |m, n| Sheet::dot(x.row(m), weight.row(n)) + f64::from(bias.values[n]));
    for stored in [DType::F32, DType::BF16, DType::F16] {
        let out = bench.room(bench.dtype, 3, 5);
        let matrix = bench.load(WeightShape::Matrix { n: 5, k: 9 }, stored, &[&weight]);
        let bias = bench.load(WeightShape::Vector { n: 5 }, stored, &[&bias]);
        let product = Gemm::biased(bench.put(&x).view, &matrix, Some(&bias), out.view.clone());
        bench.run("a stored weight", product);
        bench.check(&format!("a weight stored as {stored}"), &out, &want);
    }
}

fn rotations<B: Backend>(bench: &Bench<B>) {
    // Heads, elements of a head, first turned element, turned elements, tokens.
    for (heads, head_width, start, dims, tokens) in
        [(1, 2, 0, 2, 3), (3, 10, 0, 10, 5), (2, 9, 3, 6, 4), (1, 8, 4, 4, 1), (2, 6, 0, 6, 0)]
    {
        let what = format!("{heads} heads of {head_width}, {start}..{}, {tokens} tokens", start + dims);
        let positions: Vec<u32> = (0..tokens).map(|_| bench.below(500) as u32).collect();
        let half = dims / 2;
        let frequencies: Vec<f32> = (0..half).map(|i| 0.0317_f32.powf(i as f32 / half as f32)).collect();
        let frequencies = Sheet { rows: 1, width: half, values: frequencies };
        let rope_table = bench.room(DType::F32, tokens, dims);
        let growth = (heads == 1).then_some(Growth { step: 16.0, rate: 0.3 });
        let factor = |t: usize| {
            let steps = |growth: Growth| ((f64::from(positions[t]) + 1.0) / f64::from(growth.step)).floor();
            1.25 * growth.map_or(1.0, |growth| 1.0 + f64::from(growth.rate) * steps(growth).ln_1p())
        };
        bench.run(
            &what,
            RopeTable {
                positions: bench.put_words(&positions, 1).view,
                frequencies: bench.vector(&frequencies),
                scale: 1.25,
                growth,
                out: rope_table.view.clone(),
            },
        );
        let angle = |t: usize, i: usize| f64::from(positions[t]) * f64::from(frequencies.values[i]);
        let (cos, sin) = (
            |t: usize, i: usize| factor(t) * angle(t, i).cos(),
            |t: usize, i: usize| factor(t) * angle(t, i).sin(),
        );
        let want = each(tokens, dims, |t, i| if i < half { cos(t, i) } else { sin(t, i - half) });
        bench.check(&format!("rope_table of {what}"), &rope_table, &want);

        let x = bench.random(tokens, heads * head_width, 2.0);
        for style in [RopeStyle::HalfSplit, RopeStyle::Interleaved] {
            let turned = bench.put(&x);
            let rotate = Rotate {
                x: turned.view.clone(),
                head_width,
                start,
                style,
                rope_table: rope_table.view.clone(),
            };
            bench.run(&what, rotate);
            let mut want = wide(&x.values);
            for (t, h, i) in
                (0..tokens * heads * half).map(|at| (at / half / heads, at / half % heads, at % half))
            {
                let (a, b) = match style {
                    RopeStyle::HalfSplit => (i, i + half),
                    RopeStyle::Interleaved => (2 * i, 2 * i + 1),
                };
                let base = (t * heads + h) * head_width + start;
                let (x, y) = (want[base + a], want[base + b]);
                want[base + a] = x * cos(t, i) - y * sin(t, i);
                want[base + b] = y * cos(t, i) + x * sin(t, i);
            }
            bench.check(&format!("{style:?} of {what}"), &turned, &want);
        }
    }
}

/// Where the parts of a product lie: below each other (experts) or beside each other (heads).
#[derive(Clone, Copy, Debug, PartialEq)]
enum Parts {
    Rows(&'static [usize]),
    Columns(usize, usize),
}

fn products<B: Backend>(bench: &Bench<B>) {
    use Parts::{Columns, Rows};
    let cases = [
        (Rows(&[]), 3, 2),
        (Rows(&[0]), 3, 2),
        (Rows(&[1]), 1, 1),
        (Rows(&[1]), 130, 67),
        (Rows(&[3]), 7, 5),
        (Rows(&[37]), 65, 33),
        (Rows(&[70]), 16, 48),
        (Rows(&[0, 3, 0, 0, 17, 1, 0]), 31, 19),
        (Rows(&[5, 1, 64, 2]), 33, 65),
        (Rows(&[1, 1, 1, 1]), 257, 3),
        (Rows(&[2]), 1000, 9),
        (Rows(&[4]), 8, 300),
        (Rows(&[150, 90]), 72, 70),
        (Rows(&[0, 40, 3, 0, 100, 33]), 96, 72),
        (Rows(&[290, 20]), 200, 136),
        (Rows(&[20, 2]), 4402, 3),
        (Columns(3, 5), 17, 9),
        (Columns(4, 1), 32, 16),
        (Columns(2, 0), 3, 4),
        (Columns(5, 33), 6, 7),
    ];
    for (parts, k, n) in cases {
        product(bench, parts, k, n, Epilogue::Store, false);
        product(bench, parts, k, n, Epilogue::SwiGlu, false);
        if matches!(parts, Rows(&[_])) {
            product(bench, parts, k, n, Epilogue::Store, true);
        }
    }
}

fn product<B: Backend>(bench: &Bench<B>, parts: Parts, k: usize, n: usize, epilogue: Epilogue, biased: bool) {
    let what = format!("{parts:?}, k {k}, n {n}, {epilogue:?}, bias {biased}");
    // Rows and column part of each product.
    let (rows, side): (Vec<std::ops::Range<usize>>, usize) = match parts {
        Parts::Rows(rows) => (
            rows.iter()
                .scan(0, |end, rows| {
                    Some(
                        *end..{
                            *end += rows;
                            *end
                        },
                    )
                })
                .collect(),
            1,
        ),
        Parts::Columns(heads, rows) => (vec![0..rows; heads], heads),
    };
    let column = |part: usize| if side == 1 { 0 } else { part };
    let total = rows.last().map_or(0, |rows| rows.end);
    let size = 1.7 / (k as f32).sqrt();
    let pairs: Vec<(Sheet, Sheet)> =
        rows.iter().map(|_| (bench.random(n, k, size), bench.random(n, k, size))).collect();
    let weights: Vec<_> = pairs
        .iter()
        .map(
            |(first, up)| {
                if epilogue == Epilogue::SwiGlu { bench.gate_up(first, up) } else { bench.matrix(first) }
            },
        )
        .collect();
    let bias = bench.random_of(DType::F32, 1, n, 1.0);
    let x = bench.random(total, side * k, 1.5);
    let value = |part: usize, m: usize, n: usize| {
        let x = &x.row(m)[column(part) * k..][..k];
        let (first, up) = &pairs[part];
        let product = Sheet::dot(x, first.row(n));
        let bias = if biased { f64::from(bias.values[n]) } else { 0.0 };
        match epilogue {
            Epilogue::Store => product + bias,
            Epilogue::SwiGlu => product * sigmoid(product) * Sheet::dot(x, up.row(n)),
        }
    };
    let mut want = vec![0.0; total * side * n];
    for (part, rows) in rows.iter().enumerate() {
        for (m, n_) in rows.clone().flat_map(|m| (0..n).map(move |n_| (m, n_))) {
            want[m * side * n + column(part) * n + n_] = value(part, m, n_);
        }
    }
    for format in [bench.dtype, DType::F32] {
        let (input, out) = (bench.put(&x), bench.room(format, total, side * n));
        let part = |part: usize| {
            let (rows, at) = (rows[part].clone(), column(part));
            let view = |buffer: &Placed, width: usize| {
                let rows = buffer.view.rows(rows.clone());
                rows.and_then(|rows| rows.columns(at * width..(at + 1) * width)).expect("inside")
            };
            let bias = biased.then(|| bench.vector(&bias));
            GemmPart { x: view(&input, k), weight: weights[part].clone(), bias, out: view(&out, n) }
        };
        bench.run(&what, Gemm { parts: (0..rows.len()).map(part).collect(), epilogue });
        bench.check(&format!("{what} into {format}"), &out, &want);
        if side == 1 && !biased && !rows.is_empty() {
            let starts: Vec<u32> = rows.iter().map(|rows| rows.start as u32).chain([total as u32]).collect();
            let sorted = bench.room(format, total, n);
            let op = ExpertGemm {
                x: input.view.clone(),
                starts: bench.put_words(&starts, 1).view,
                weights: weights.clone(),
                epilogue,
                out: sorted.view.clone(),
            };
            bench.run(&what, op);
            let bits = |placed| bench.get(&what, placed).into_iter().map(f32::to_bits).collect::<Vec<_>>();
            assert_eq!(bits(&sorted), bits(&out), "{what} as experts' rows, seed {}", bench.seed);
        }
    }
}

/// `softmax(scale · q·keys) · values` for every new token and head, over what the token sees.
fn attended(sequences: &Sequences, heads: &Heads, q: &Sheet, keys: &Sheet, values: &Sheet) -> Vec<f64> {
    let mut out = Vec::new();
    for (t, (sequence, position)) in sequences.tokens().into_iter().enumerate() {
        let first = match heads.sight {
            Sight::All => 0,
            Sight::Last(count) => (position + 1).saturating_sub(count),
            Sight::Stretch(count) => position / count * count,
        };
        for head in 0..heads.heads {
            let kv = head * heads.kv_heads / heads.heads;
            let q = &q.row(t)[head * heads.key_width..][..heads.key_width];
            let seen: Vec<(f64, &[f32])> = (first..=position)
                .map(|position| {
                    let slot = sequences.slot(sequence, position);
                    let key = &keys.row(slot)[kv * heads.key_width..][..heads.key_width];
                    let power = (f64::from(heads.scale()) * Sheet::dot(q, key)).exp();
                    (power, &values.row(slot)[kv * heads.value_width..][..heads.value_width])
                })
                .collect();
            let sink = if heads.sinks { f64::from(Heads::sink(head)).exp() } else { 0.0 };
            let total: f64 = seen.iter().map(|(power, _)| power).sum::<f64>() + sink;
            out.extend((0..heads.value_width).map(|column| {
                seen.iter().map(|(power, value)| power * f64::from(value[column])).sum::<f64>() / total
            }));
        }
    }
    out
}

/// Rows of three slots, of which one is empty, counted from a place inside the first.
fn activations<B: Backend>(bench: &Bench<B>) {
    for (rows, width) in [(0, 3), (1, 1), (9, 5), (33, 72)] {
        let first = 2;
        let borders = [0, first + rows / 3, first + rows / 3, first + rows];
        let starts: Vec<u32> = borders.iter().map(|&start| start as u32).collect();
        let slot = |m: usize| borders[1..].iter().filter(|&&start| start <= m + first).count();
        let added = bench.random_of(DType::F32, 3, 2 * width, 2.0);
        let bias = |of: &Sheet| SlotBias {
            bias: bench.vector(&Sheet { rows: 1, width: of.values.len(), values: of.values.clone() }),
            starts: bench.put_words(&starts, 1).view,
            first,
        };
        let clamped = Swish { alpha: 1.702, cubic: 0.1, limit: 2.5, shift: 1.0 };
        let plain = Swish { alpha: 1.0, cubic: 0.0, limit: f32::INFINITY, shift: 0.0 };
        for (swish, biased, format) in
            [(clamped, true, DType::F32), (plain, false, bench.dtype), (Swish::GELU_TANH, false, DType::F32)]
        {
            let what = format!("activate {swish:?}, bias {biased}, {format} [{rows}, {width}]");
            let x = bench.random_of(format, rows, 2 * width, 4.0);
            let out = bench.room(bench.dtype, rows, width);
            let input = bench.put_as(format, &x).view;
            let bias = biased.then(|| bias(&added));
            let activation = Activation::Swish(swish);
            bench.run(&what, Activate { x: input, bias, activation, out: out.view.clone() });
            let limit = f64::from(swish.limit);
            let want = each(rows, width, |m, n| {
                let number = |n: usize| {
                    let bias = if biased { added.row(slot(m))[n] } else { 0.0 };
                    f64::from(x.row(m)[n]) + f64::from(bias)
                };
                let (gate, up) = (number(n).min(limit), number(width + n).clamp(-limit, limit));
                if swish == Swish::GELU_TANH {
                    let inside = (2.0 / std::f64::consts::PI).sqrt() * (gate + 0.044715 * gate.powi(3));
                    return 0.5 * gate * (1.0 + inside.tanh()) * up;
                }
                let inside = f64::from(swish.alpha) * (gate + f64::from(swish.cubic) * gate.powi(3));
                gate * sigmoid(inside) * (up + f64::from(swish.shift))
            });
            bench.check(&what, &out, &want);
        }
        for (biased, format) in [(true, DType::F32), (false, bench.dtype)] {
            let what = format!("squares, bias {biased}, {format} [{rows}, {}]", 2 * width);
            let x = bench.random_of(format, rows, 2 * width, 4.0);
            let (input, out) = (bench.put_as(format, &x).view, bench.room(bench.dtype, rows, 2 * width));
            let (bias, activation) = (biased.then(|| bias(&added)), Activation::SquaredRelu);
            bench.run(&what, Activate { x: input, bias, activation, out: out.view.clone() });
            let want = each(rows, 2 * width, |m, n| {
                let bias = if biased { added.row(slot(m))[n] } else { 0.0 };
                (f64::from(x.row(m)[n]) + f64::from(bias)).max(0.0).powi(2)
            });
            bench.check(&what, &out, &want);
        }
        let what = format!("bias of slots [{rows}, {width}]");
        let x = bench.random(rows, 2 * width, 3.0);
        let out = bench.put(&x);
        bench.run(&what, AddSlotBias { x: out.view.clone(), bias: bias(&added) });
        let want = each(rows, 2 * width, |m, n| f64::from(x.row(m)[n]) + f64::from(added.row(slot(m))[n]));
        bench.check(&what, &out, &want);
    }
}

fn attentions<B: Backend>(bench: &Bench<B>) {
    /// Cached and new positions of each sequence.
    type Lengths<'a> = &'a [(usize, usize)];
    let plain = Heads {
        heads: 2,
        kv_heads: 2,
        key_width: 8,
        value_width: 8,
        latent: false,
        sight: Sight::All,
        sinks: false,
    };
    let grouped = Heads { heads: 6, kv_heads: 2, key_width: 5, value_width: 3, ..plain };
    let latent = Heads { heads: 5, kv_heads: 1, key_width: 24, value_width: 17, latent: true, ..plain };
    let window = |heads, count| Heads { sight: Sight::Last(count), ..heads };
    let stretch = |heads, count| Heads { sight: Sight::Stretch(count), ..heads };
    // As wide as the heads of models: other kernels on a GPU.
    let wide = Heads { heads: 8, key_width: 128, value_width: 128, ..grouped };
    let latents = Heads { heads: 16, key_width: 576, value_width: 512, ..latent };
    let few_latents = Heads { heads: 3, key_width: 160, value_width: 128, ..latent };
    // Latents decompressed, and heads wider than most.
    let apart = Heads { heads: 3, kv_heads: 3, key_width: 192, value_width: 128, ..plain };
    let widest = Heads { heads: 6, kv_heads: 2, key_width: 256, value_width: 256, ..plain };
    // Several steps of keys, tiles of queries and sequences that share neither.
    let long: Lengths<'_> = &[(0, 150), (200, 1), (61, 70), (0, 0), (127, 2)];
    let several_spans: Lengths<'_> = &[(8190, 4), (4094, 3), (12_300, 1)];
    let longest: Lengths<'_> = &[(32_766, 5), (32_767, 1)];
    let mixed: Lengths<'_> = &[(0, 7), (12, 1), (0, 0), (3, 4), (0, 1), (40, 1)];
    let cases: &[(Heads, Lengths<'_>, usize)] = &[
        (plain, &[(0, 1)], 4),
        (plain, mixed, 4),
        (plain, &[], 4),
        (plain, &[(5, 0)], 4),
        (grouped, mixed, 3),
        (grouped, &[(0, 33)], 16),
        (Heads { key_width: 64, value_width: 64, ..grouped }, mixed, 8),
        (latent, mixed, 5),
        (latent, &[(130, 1), (64, 1)], 64),
        (Heads { value_width: 24, ..latent }, mixed, 1),
        (window(plain, 1), mixed, 4),
        (window(grouped, 5), mixed, 4),
        (window(latent, 9), mixed, 2),
        (window(plain, 1000), mixed, 4),
        (stretch(plain, 1), mixed, 4),
        (stretch(grouped, 5), mixed, 4),
        (stretch(latent, 9), mixed, 2),
        (stretch(plain, 1000), mixed, 4),
        (stretch(wide, 70), long, 16),
        (stretch(wide, 64), long, 64),
        (stretch(few_latents, 70), long, 16),
        (plain, long, 64),
        (wide, long, 64),
        (wide, mixed, 7),
        (window(wide, 70), long, 16),
        (Heads { key_width: 96, value_width: 80, ..wide }, long, 64),
        (Heads { key_width: 67, value_width: 101, ..wide }, mixed, 64),
        (latents, mixed, 64),
        (few_latents, long, 64),
        (window(few_latents, 70), long, 16),
        (Heads { key_width: 293, value_width: 251, ..latents }, mixed, 5),
        (Heads { key_width: 200, value_width: 136, ..plain }, mixed, 64),
        (Heads { sinks: true, ..grouped }, mixed, 4),
        (Heads { sinks: true, ..window(wide, 70) }, long, 16),
        (Heads { sinks: true, key_width: 64, value_width: 64, ..wide }, long, 64),
        (Heads { sinks: true, ..few_latents }, mixed, 64),
        (apart, long, 64),
        (apart, mixed, 64),
        (apart, mixed, 5),
        (widest, long, 64),
        (Heads { sinks: true, ..window(widest, 70) }, long, 64),
        (window(widest, 9), mixed, 16),
        (Heads { heads: 2, kv_heads: 1, ..wide }, several_spans, 64),
        (Heads { heads: 2, kv_heads: 1, sinks: true, ..window(wide, 4500) }, several_spans, 16),
        (Heads { heads: 2, ..few_latents }, several_spans, 64),
        (Heads { heads: 1, kv_heads: 1, ..widest }, several_spans, 64),
        (Heads { heads: 2, kv_heads: 1, key_width: 64, value_width: 64, ..plain }, longest, 64),
    ];
    for (heads, lengths, block_size) in cases {
        let what = format!("{heads:?} over {lengths:?} in blocks of {block_size}");
        let sequences = Sequences::new(bench, lengths, *block_size);
        let tokens = sequences.tokens().len();
        let q = bench.random(tokens, heads.heads * heads.key_width, 1.5);
        let keys = sequences.cache(bench, heads.kv_heads * heads.key_width);
        let cache = bench.put(&keys);
        let (values, values_at) = if heads.latent {
            (keys.clone(), cache.view.columns(0..heads.value_width).expect("inside"))
        } else {
            let values = sequences.cache(bench, heads.kv_heads * heads.value_width);
            let at = bench.put(&values).view;
            (values, at)
        };
        let out = bench.room(bench.dtype, tokens, heads.heads * heads.value_width);
        let parts = CacheParts {
            q: bench.put(&q).view,
            keys: cache.view.clone(),
            values: values_at,
            scales: (1.0, 1.0),
            out: out.view.clone(),
        };
        bench.run(&what, sequences.attention(bench, heads, &parts));
        bench.check(&what, &out, &attended(&sequences, heads, &q, &keys, &values));
        attention_to_codes(bench, &what, &sequences, heads, &q, [&keys, &values]);
    }
}

/// Attention to codes is attention to their numbers, to the last bit.
fn attention_to_codes<B: Backend>(
    bench: &Bench<B>,
    what: &str,
    sequences: &Sequences,
    heads: &Heads,
    q: &Sheet,
    [keys, values]: [&Sheet; 2],
) {
    let what = format!("{what}, in codes");
    let scales = if heads.latent { (0.013, 0.013) } else { (0.013, 0.37) };
    // Another kernel takes wide heads off vectors, with other bits: see `invariance`.
    let unit = 8;
    let (codes, key_numbers) = bench.put_codes(unit, keys, scales.0);
    let (value_codes, value_numbers) = bench.put_codes(unit, values, scales.1);
    let numbers = bench.put_on(unit, &key_numbers);
    let (value_codes, plain_values) = match heads.latent {
        true => [&codes, &numbers].map(|of| of.view.columns(0..heads.value_width).expect("inside")).into(),
        false => (value_codes.view, bench.put_on(unit, &value_numbers).view),
    };
    let width = heads.heads * heads.value_width;
    let queries = bench.put_on(unit, q).view;
    let run = |keys: &Buffer, values: Buffer| {
        let out = bench.room_on(unit, bench.dtype, q.rows, width);
        let parts =
            CacheParts { q: queries.clone(), keys: keys.clone(), values, scales, out: out.view.clone() };
        bench.run(&what, sequences.attention(bench, heads, &parts));
        out
    };
    let out = run(&codes.view, value_codes);
    let scaled = |sheet: &Sheet, scale: f32| Sheet {
        values: sheet.values.iter().map(|number| number * scale).collect(),
        ..sheet.clone()
    };
    let (keys, values) = (scaled(&key_numbers, scales.0), scaled(&value_numbers, scales.1));
    bench.check(&what, &out, &attended(sequences, heads, q, &keys, &values));
    let got = bench.get(&what, &out);
    let plain = bench.get(&what, &run(&numbers.view, plain_values));
    let bits = |row: &[f32]| row.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
    assert!(bits(&got) == bits(&plain), "{what}: other bits than numbers have, seed {}", bench.seed);
}

/// Experts and weights of one token, by the definition: pick the best one, again and again.
fn routed(router: &TopKRouter, logits: &[f32], bias: Option<&[f32]>) -> (Vec<u32>, Vec<f64>) {
    if let Score::SparseMixer { jitter } = router.score {
        return mixed(router, jitter, logits);
    }
    let most = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let power = |&logit: &f32| (f64::from(logit) - f64::from(most)).exp();
    let total: f64 = logits.iter().map(power).sum();
    let score = |logit: &f32| match router.score {
        Score::Softmax | Score::SparseMixer { .. } => power(logit) / total,
        Score::Sigmoid | Score::SigmoidOfLogit => sigmoid(f64::from(*logit)),
    };
    let scores: Vec<f64> = logits.iter().map(score).collect();
    let preference: Vec<f64> = scores
        .iter()
        .enumerate()
        .map(|(e, score)| if router.score == Score::SigmoidOfLogit { f64::from(logits[e]) } else { *score })
        .enumerate()
        .map(|(e, score)| score + bias.map_or(0.0, |bias| f64::from(bias[e])))
        .collect();
    let experts = logits.len();
    let allowed: Vec<usize> = match router.groups {
        None => (0..experts).collect(),
        Some(limit) => {
            let size = experts / limit.groups;
            let group = |group: usize| (group * size..(group + 1) * size).collect::<Vec<usize>>();
            let judged: Vec<f64> = (0..limit.groups)
                .map(|index| match limit.by {
                    GroupScore::Max => first(&group(index), &preference, 1),
                    GroupScore::TopTwoSum => first(&group(index), &preference, 2),
                })
                .map(|best| best.iter().map(|&expert| preference[expert]).sum())
                .collect();
            first(&(0..limit.groups).collect::<Vec<_>>(), &judged, limit.kept)
                .into_iter()
                .flat_map(group)
                .collect()
        }
    };
    let chosen = first(&allowed, &preference, router.top_k);
    let sum: f64 = chosen.iter().map(|&expert| scores[expert]).sum();
    let divisor = if router.normalise { sum } else { 1.0 };
    let weights = chosen.iter().map(|&expert| scores[expert] / divisor * f64::from(router.scale)).collect();
    (chosen.iter().map(|&expert| expert as u32).collect(), weights)
}

/// The same for a sparse mixer: whoever is far behind the best of those that are left does not count.
fn mixed(router: &TopKRouter, jitter: f32, logits: &[f32]) -> (Vec<u32>, Vec<f64>) {
    let value: Vec<f64> = logits.iter().map(|&logit| f64::from(logit)).collect();
    let mut left: Vec<usize> = (0..logits.len()).collect();
    let (mut experts, mut weights) = (Vec::new(), Vec::new());
    for _ in 0..router.top_k {
        let best = first(&left, &value, 1)[0];
        let most = value[best];
        let near = |other: &f64| (most - other) <= 2.0 * f64::from(jitter) * other.abs().max(most);
        let beside = left.iter().map(|&other| value[other]).filter(near);
        weights.push(f64::from(router.scale) / beside.map(|other| (other - most).exp()).sum::<f64>());
        experts.push(best as u32);
        left.retain(|&other| other != best);
    }
    if router.normalise {
        let sum: f64 = weights.iter().sum();
        weights.iter_mut().for_each(|weight| *weight *= f64::from(router.scale) / sum);
    }
    (experts, weights)
}

/// The `count` best of `which`, best first, of equals the lower number.
fn first(which: &[usize], value: &[f64], count: usize) -> Vec<usize> {
    let mut left = which.to_vec();
    left.sort_unstable();
    let mut taken = Vec::new();
    while taken.len() < count && !left.is_empty() {
        let best = left.iter().copied().reduce(|a, b| if value[b] > value[a] { b } else { a });
        taken.extend(best);
        left.retain(|&other| Some(other) != best);
    }
    taken
}

fn routes<B: Backend>(bench: &Bench<B>) {
    let limit = |groups, kept, by| Some(GroupLimit { groups, kept, by });
    let no_limit: Option<GroupLimit> = None;
    // Tokens, experts, top k, groups.
    let cases = [
        (0, 4, 2, no_limit),
        (1, 1, 1, no_limit),
        (9, 5, 5, no_limit),
        (20, 64, 6, no_limit),
        (90, 257, 8, no_limit),
        (20, 16, 3, limit(4, 2, GroupScore::Max)),
        (20, 16, 4, limit(4, 1, GroupScore::Max)),
        (20, 24, 6, limit(8, 4, GroupScore::TopTwoSum)),
        (20, 6, 2, limit(6, 2, GroupScore::TopTwoSum)),
        (20, 6, 2, limit(1, 1, GroupScore::TopTwoSum)),
    ];
    for (tokens, experts, top_k, groups) in cases {
        for (score, normalise, biased) in [
            (Score::Softmax, false, false),
            (Score::Softmax, true, false),
            (Score::Sigmoid, true, true),
            (Score::Sigmoid, false, true),
            (Score::Sigmoid, true, false),
            (Score::SigmoidOfLogit, false, false),
            (Score::SparseMixer { jitter: 0.1 }, false, false),
            (Score::SparseMixer { jitter: 0.3 }, true, false),
        ] {
            if groups.is_some() && matches!(score, Score::SparseMixer { .. }) {
                continue;
            }
            let router = TopKRouter { top_k, score, groups, normalise, scale: 2.5 };
            // Logits that differ by 1/32 or more and are not symmetric about zero, biases that are whole: no two
            // experts or groups are so close that rounding decides.
            let whole = |_| 2.0 * bench.below(4) as f32;
            let bias: Option<Vec<f32>> = biased.then(|| (0..experts).map(whole).collect());
            let logits: Vec<f32> = (0..tokens)
                .flat_map(|_| bench.shuffled(experts.max(100)).into_iter().take(experts))
                .map(|word| word as f32 / 32.0 - 1.99)
                .collect();
            route(bench, &router, &Sheet { rows: tokens, width: experts, values: logits }, bias.as_deref());
        }
    }
}

fn route<B: Backend>(bench: &Bench<B>, router: &TopKRouter, logits: &Sheet, bias: Option<&[f32]>) {
    let what = format!("{router:?} of {} experts, bias {}", logits.width, bias.is_some());
    let experts = bench.room(DType::U32, logits.rows, router.top_k);
    let weights = bench.room(DType::F32, logits.rows, router.top_k);
    let vector = |bias: &[f32]| bench.vector(&Sheet { rows: 1, width: bias.len(), values: bias.to_vec() });
    let scales = bench.random_of(DType::F32, 1, logits.width, 2.0);
    let mixes = matches!(router.score, Score::SparseMixer { .. });
    let scaled = (router.normalise && !mixes).then_some(&scales);
    bench.run(
        &what,
        Route {
            logits: bench.put_as(DType::F32, logits).view,
            router: *router,
            bias: bias.map(vector),
            scales: scaled.map(|scales| vector(&scales.values)),
            experts: experts.view.clone(),
            weights: weights.view.clone(),
        },
    );
    let (mut want_experts, mut want_weights) = (Vec::new(), Vec::new());
    for token in 0..logits.rows {
        let (experts, weights) = routed(router, logits.row(token), bias);
        let scale = |expert: &u32| scaled.map_or(1.0, |scales| f64::from(scales.values[*expert as usize]));
        want_weights.extend(weights.iter().zip(&experts).map(|(weight, expert)| weight * scale(expert)));
        want_experts.extend(experts);
    }
    assert_eq!(bench.get_words(&what, &experts), want_experts, "{what}, seed {}", bench.seed);
    bench.check(&what, &weights, &want_weights);
}

/// Sums of some of the rows, in stages that begin in the middle of them.
fn scaled_terms<B: Backend>(bench: &Bench<B>) {
    for (rows, sums, top_k, width, first) in
        [(0, 0, 2, 3, 0), (1, 1, 1, 1, 0), (6, 5, 3, 9, 4), (40, 33, 2, 72, 11)]
    {
        let what = format!("{rows} rows of {width} from {first} on, {sums} sums of {top_k}");
        let mut index: Vec<u32> = bench.shuffled(sums * top_k);
        // Rows have fewer terms than there is room for.
        for row in index.chunks_mut(top_k).step_by(3) {
            row[top_k - 1] = NONE;
        }
        let factors = bench.random_of(DType::F32, sums, top_k, 2.0);
        let x = bench.random(rows, width, 2.0);
        let out = bench.put(&x);
        let scale = ScaleTerms {
            x: out.view.clone(),
            index: bench.put_words(&index, top_k).view,
            weights: bench.put_as(DType::F32, &factors).view,
            first,
        };
        bench.run(&what, scale);
        let factor = |m: usize| {
            let at = index.iter().position(|&term| term as usize == m + first);
            at.map_or(1.0, |at| f64::from(factors.values[at]))
        };
        let want = each(rows, width, |m, n| factor(m) * f64::from(x.row(m)[n]));
        bench.check(&what, &out, &want);
    }
}

/// Ties and limits, worked by hand.
fn chosen_experts<B: Backend>(bench: &Bench<B>) {
    let router = TopKRouter { top_k: 2, score: Score::Sigmoid, groups: None, normalise: false, scale: 1.0 };
    let by = |groups, kept, by| TopKRouter { groups: Some(GroupLimit { groups, kept, by }), ..router };
    /// What it shows, the rule, logits, biases and the experts chosen.
    type Choice<'a> = (&'a str, TopKRouter, &'a [f32], &'a [f32], &'a [u32]);
    let cases: &[Choice<'_>] = &[
        ("ties go to the lower number", router, &[1.0, 1.0, 1.0, 1.0], &[0.0; 4], &[0, 1]),
        ("the best comes first", router, &[0.0, 1.0, 2.0, 1.0], &[0.0; 4], &[2, 1]),
        ("a bias chooses", router, &[0.0, 1.0, 2.0, 1.0], &[5.0, 0.0, 0.0, 0.0], &[0, 2]),
        ("ties of groups too", by(2, 1, GroupScore::Max), &[0.0, 3.0, 3.0, 2.0], &[0.0; 4], &[1, 0]),
        ("by the best", by(2, 1, GroupScore::Max), &[3.0, -9.0, 2.0, 2.0], &[0.0; 4], &[0, 1]),
        ("by the two best", by(2, 1, GroupScore::TopTwoSum), &[3.0, -9.0, 2.0, 2.0], &[0.0; 4], &[2, 3]),
        ("negative preferences", by(2, 1, GroupScore::Max), &[0.0; 4], &[-3.0, -2.0, -4.0, -4.0], &[1, 0]),
    ];
    for (what, router, logits, bias, want) in cases {
        let logits = Sheet { rows: 1, width: 4, values: logits.to_vec() };
        assert_eq!(routed(router, &logits.values, Some(bias)).0, *want, "the definition: {what}");
        route(bench, router, &logits, Some(bias));
    }
}

/// Random rows; rows of few different numbers, so that many are the largest; and rows half of which are out of reach.
fn largest<B: Backend>(bench: &Bench<B>) {
    for (rows, width) in [(0, 3), (1, 1), (3, 7), (2, 1000), (70, 300)] {
        let mut few = bench.coarse(rows, width);
        few.values.iter_mut().for_each(|value| *value = value.floor());
        let mut low = bench.random_of(DType::F32, rows, width, 1.0);
        if width > 1 {
            low.values
                .chunks_mut(width)
                .flat_map(|row| row.iter_mut().skip(1).step_by(2))
                .for_each(|value| *value = f32::NEG_INFINITY);
        }
        for logits in [few, low, bench.random_of(DType::F32, rows, width, 1.0)] {
            let what = format!("the largest of {:?}", logits.values.get(..width.min(20)));
            let tokens = bench.room(DType::U32, rows, 1);
            let words: Vec<u32> = logits.values.iter().map(|value| value.to_bits()).collect();
            let view = bench.room(DType::F32, rows, width).view;
            bench.run(&what, HostToDevice { words: words.into(), out: view.clone() });
            bench.run(&what, ArgMax { logits: view, tokens: tokens.view.clone() });
            let largest = |row: &[f32]| {
                let mut best = 0;
                for (column, value) in row.iter().enumerate() {
                    if *value > row[best] {
                        best = column;
                    }
                }
                best as u32
            };
            let want: Vec<u32> = (0..rows).map(|row| largest(logits.row(row))).collect();
            assert_eq!(bench.get_words(&what, &tokens), want, "{what}, seed {}", bench.seed);
        }
    }
}
