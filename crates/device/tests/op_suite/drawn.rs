//! Weights that a processor makes itself: the numbers of one and of another that was given them are the same, wherever they lie.

use crate::bench::{Bench, Sheet};
use epsmoe_base::Mix;
use epsmoe_device::op::*;
use epsmoe_device::{Backend, Drawn, Weight, WeightShape};
use half::bf16;

/// What the places of a tensor `[rows, columns]` mean.
pub(crate) fn sheet(drawn: &Drawn, [rows, columns]: [usize; 2]) -> Sheet {
    let number = |at: usize| {
        let [row, column] = [at / columns, at % columns].map(|at| at as u64);
        let index = drawn.first + row * drawn.row_step + column * drawn.column_step;
        let word = drawn.numbers.at(index / 4) >> (16 * (index % 4));
        bf16::from_f32(f32::from(word as i16) * drawn.step).to_f32()
    };
    Sheet { rows, width: columns, values: (0..rows * columns).map(number).collect() }
}

/// Steps as tensors have them: rows one after the other or some apart, or rows that are columns.
pub(crate) fn random<B: Backend>(bench: &Bench<B>, [rows, columns]: [usize; 2]) -> Drawn {
    let (apart, turn) = (1 + bench.below(3) as u64, 1 + bench.below(2) as u64);
    let (down, beside) = (columns as u64 * turn * apart, turn);
    let is_transposed = bench.below(3) == 0;
    let (row_step, column_step) = if is_transposed { (turn, rows as u64 * apart) } else { (down, beside) };
    let numbers = Mix::new(bench.below(1 << 30) as u64);
    Drawn { numbers, step: 1.0 / 32768.0, first: bench.below(1 << 20) as u64, row_step, column_step }
}

pub(crate) fn suite<B: Backend>(bench: Bench<B>) {
    let first = [random(&bench, [1, 1])];
    if bench.device.draw("probe", WeightShape::Vector { n: 1 }, &first).expect("an answer").is_none() {
        return;
    }
    let shapes = [[1, 8], [16, 64], [5, 6], [33, 65], [70, 200], [300, 331], [129, 1024]];
    for [n, k] in shapes {
        for shape in [WeightShape::Matrix { n, k }, WeightShape::GateUp { inner: n, k }] {
            product(&bench, shape, [n, k]);
        }
        table(&bench, [n, k]);
        vector(&bench, n * k);
    }
}

fn name(shape: WeightShape) -> String {
    format!("drawn {shape:?}")
}

fn draw<B: Backend>(bench: &Bench<B>, shape: WeightShape, tensors: &[Drawn]) -> Weight {
    let weight = bench.device.draw(&name(shape), shape, tensors).expect("an answer");
    weight.expect("what was drawn once can be drawn again")
}

/// Products with both, of few rows and of many.
fn product<B: Backend>(bench: &Bench<B>, shape: WeightShape, [n, k]: [usize; 2]) {
    let (count, _) = shape.sources();
    let tensors: Vec<Drawn> = (0..count).map(|_| random(bench, [n, k])).collect();
    let sheets: Vec<Sheet> = tensors.iter().map(|tensor| sheet(tensor, [n, k])).collect();
    let given = bench.load(shape, bench.dtype, &sheets.iter().collect::<Vec<_>>());
    let drawn = draw(bench, shape, &tensors);
    for rows in [1, 40] {
        let x = bench.put(&bench.random(rows, k, 1.0));
        let run = |weight: &Weight| {
            let out = bench.room(bench.dtype, rows, n);
            let product = Gemm::linear(x.view.clone(), weight, out.view.clone());
            let epilogue = if count == 2 { Epilogue::SwiGlu } else { Epilogue::Store };
            bench.run(&name(shape), Gemm { epilogue, ..product });
            bench.get(&name(shape), &out)
        };
        assert_eq!(run(&drawn), run(&given), "{shape:?}, {rows} rows");
    }
}

fn table<B: Backend>(bench: &Bench<B>, [rows, width]: [usize; 2]) {
    let shape = WeightShape::Table { rows, width };
    let tensor = random(bench, [rows, width]);
    let weight = draw(bench, shape, std::slice::from_ref(&tensor));
    let ids: Vec<u32> = bench.shuffled(rows);
    let (placed, out) = (bench.put_words(&ids, 1), bench.room(bench.dtype, rows, width));
    bench.run(&name(shape), Embed { ids: placed.view.clone(), table: weight, out: out.view.clone() });
    let numbers = sheet(&tensor, [rows, width]);
    let wanted: Vec<f32> = ids.iter().flat_map(|&id| numbers.row(id as usize).to_vec()).collect();
    bench.check_exactly(&name(shape), &out, &wanted);
}

/// As weights of a norm of ones, which leaves them as they are.
fn vector<B: Backend>(bench: &Bench<B>, n: usize) {
    let shape = WeightShape::Vector { n };
    let tensor = Drawn { column_step: 1, ..random(bench, [1, n]) };
    let weight = draw(bench, shape, std::slice::from_ref(&tensor));
    let given = bench.vector(&sheet(&tensor, [1, n]));
    let x = bench.put(&bench.random(3, n, 1.0));
    let run = |weight: &Weight| {
        let out = bench.room(bench.dtype, 3, n);
        let (x, weight, out_buffer) = (x.view.clone(), weight.clone(), out.view.clone());
        let norm = Norm {
            kind: NormKind::Rms,
            x,
            weight,
            eps: 1e-6,
            out: out_buffer,
            bias: None,
            codes: None,
            origin: None,
        };
        bench.run(&name(shape), norm);
        bench.get(&name(shape), &out)
    };
    assert_eq!(run(&weight), run(&given), "{shape:?}");
}
