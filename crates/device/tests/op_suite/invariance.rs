//! Row invariance: the bits of a row depend on its numbers, the weight and the kernel, never on how many rows
//! there are, where it stands among them, or how a batch is split.

use crate::bench::{Bench, CacheParts, Heads, Placed, Sequences, Sheet};
use epsmoe_base::DType;
use epsmoe_device::op::*;
use epsmoe_device::{Backend, Buffer, Weight};
use std::ops::Range;
use std::slice::from_ref;

pub(crate) fn suite<B: Backend>(bench: Bench<B>) {
    products(&bench);
    maps_of_the_same_rows(&bench);
    row_operations(&bench);
    attentions(&bench);
    crate::recurrent::invariance(&bench);
}

/// Whether rows `rows` of the whole, computed as `got`, have the bits they have there.
fn same_bits<B: Backend>(
    bench: &Bench<B>,
    what: &str,
    rows: Range<usize>,
    got: &[f32],
    whole: &[f32],
    width: usize,
) {
    let want = &whole[rows.start * width..rows.end * width];
    let differs = got.iter().zip(want).position(|(got, want)| got.to_bits() != want.to_bits());
    assert_eq!(got.len(), want.len());
    if let Some(at) = differs {
        let (row, column, seed) = (rows.start + at / width, at % width, bench.seed);
        panic!(
            "{what}, {}, seed {seed}: row {row} of rows {rows:?} differs at {column}: {:e} and {:e}",
            bench.dtype, got[at], want[at]
        );
    }
}

fn products<B: Backend>(bench: &Bench<B>) {
    /// Every number of rows up to here, and some beyond.
    const FEW: usize = 52;
    for (all_rows, k, n, epilogue) in [
        (FEW, 7, 5, Epilogue::Store),
        (FEW, 64, 33, Epilogue::Store),
        (FEW, 65, 16, Epilogue::SwiGlu),
        (FEW, 200, 50, Epilogue::SwiGlu),
        (FEW, 331, 17, Epilogue::Store),
        (FEW, 4402, 3, Epilogue::Store),
        (170, 130, 40, Epilogue::SwiGlu),
        (170, 72, 140, Epilogue::Store),
        (300, 136, 264, Epilogue::Store),
        (300, 200, 88, Epilogue::SwiGlu),
    ] {
        let (first, up) = (bench.random(n, k, 1.0), bench.random(n, k, 1.0));
        let weight =
            if epilogue == Epilogue::SwiGlu { bench.gate_up(&first, &up) } else { bench.matrix(&first) };
        for format in [bench.dtype, DType::F32] {
            let what = format!("{epilogue:?}, k {k}, n {n}, into {format}");
            let x = bench.random(all_rows, k, 1.0);
            // The rows in `parts`, each a product of its own in one operation.
            let run = |parts: &[Range<usize>]| {
                let rows = parts[0].start..parts[parts.len() - 1].end;
                let (input, out) = (bench.put(&x.take(rows.clone())), bench.room(format, rows.len(), n));
                let part = |part: &Range<usize>| {
                    let part = part.start - rows.start..part.end - rows.start;
                    let view = |placed: &Placed| placed.view.rows(part.clone()).expect("inside");
                    GemmPart { x: view(&input), weight: weight.clone(), bias: None, out: view(&out) }
                };
                let parts = parts.iter().map(part).collect();
                bench.run(&what, Gemm { parts, epilogue });
                (rows, bench.get(&what, &out))
            };
            let whole = run(from_ref(&(0..all_rows))).1;
            let check = |parts: &[Range<usize>]| {
                let (rows, got) = run(parts);
                same_bits(bench, &format!("{what} as {parts:?}"), rows, &got, &whole, n);
            };
            // Every number of rows, at the start and at a random place; every row alone.
            for rows in (1..=FEW).chain([64, 65, 128, 129, 193, 257, 300]).filter(|&rows| rows <= all_rows) {
                let start = bench.below(all_rows - rows + 1);
                check(from_ref(&(0..rows)));
                check(from_ref(&(start..start + rows)));
                check(from_ref(&(rows - 1..rows)));
            }
            // Split at random into parts, some of them empty.
            for _ in 0..8 {
                let mut cuts: Vec<usize> =
                    (0..1 + bench.below(7)).map(|_| bench.below(all_rows + 1)).collect();
                cuts.extend([0, all_rows]);
                cuts.sort_unstable();
                check(&cuts.windows(2).map(|ends| ends[0]..ends[1]).collect::<Vec<_>>());
            }
        }
    }
}

/// An operation on the rows of `x`, from a buffer of one format into a buffer of another.
type RowOperation<'a> = (&'a str, [DType; 2], &'a dyn Fn(Range<usize>, Buffer, Buffer) -> Op);

/// Uneven maps, with biases and without, into both formats.
fn maps_of_the_same_rows<B: Backend>(bench: &Bench<B>) {
    for rows in [1, 2, 7, 8, 9, 16, 17, 32, 33, 64, 65, 129, 300] {
        let (k, unit) = ([32, 96, 576, 57, 288][bench.below(5)], [1, 8][bench.below(2)]);
        // Some of the same width.
        let widths = [1 + bench.below(150), 8 * (1 + bench.below(40))];
        let map = |_| {
            let n = widths[bench.below(2)];
            let bias = (bench.below(2) == 0).then(|| bench.vector(&bench.random_of(DType::F32, 1, n, 1.0)));
            let weight = bench.matrix(&bench.random(n, k, 1.0));
            Map { weight, bias, format: [bench.dtype, DType::F32][bench.below(2)] }
        };
        let maps: Vec<Map> = (0..2 + bench.below(4)).map(map).collect();
        let x = bench.put_on(unit, &bench.random(rows, k, 1.0));
        together_as_alone(bench, &format!("{rows} rows of {k} on {unit}"), &x.view, (&maps, unit));
    }
}

/// A map, what is added to what it gives, and the format of that.
pub(crate) struct Map {
    pub(crate) weight: Weight,
    pub(crate) bias: Option<Weight>,
    pub(crate) format: DType,
}

/// Several maps of the same rows in one operation give what each gives by itself, into rows on `unit` elements.
pub(crate) fn together_as_alone<B: Backend>(
    bench: &Bench<B>,
    what: &str,
    x: &Buffer,
    (maps, unit): (&[Map], usize),
) {
    let widths: Vec<usize> = maps.iter().map(|map| map.weight.shape.sources().1[0]).collect();
    let what = format!("{what} by maps of {widths:?}, seed {}", bench.seed);
    let rooms = || -> Vec<Placed> {
        let room = |(map, &n): (&Map, &usize)| bench.room_on(unit, map.format, x.rows, n);
        maps.iter().zip(&widths).map(room).collect()
    };
    let part = |(map, out): (&Map, &Placed)| {
        let (weight, bias) = (map.weight.clone(), map.bias.clone());
        GemmPart { x: x.clone(), weight, bias, out: out.view.clone() }
    };
    let (together, alone) = (rooms(), rooms());
    let (epilogue, parts) = (Epilogue::Store, maps.iter().zip(&together).map(part).collect());
    bench.run(&what, Gemm { parts, epilogue });
    for (map, (together, alone)) in maps.iter().zip(together.iter().zip(&alone)) {
        bench.run(&what, Gemm { parts: vec![part((map, alone))], epilogue });
        let [got, want] = [together, alone].map(|placed| bench.get(&what, placed));
        let n = want.len() / x.rows;
        same_bits(bench, &format!("{what}, map of {n}"), 0..x.rows, &got, &want, n);
    }
}

fn row_operations<B: Backend>(bench: &Bench<B>) {
    const ROWS: usize = 23;
    const WIDTH: usize = 37;
    let narrow = bench.dtype;
    let x = bench.random(ROWS, WIDTH, 2.0);
    let vector = bench.vector(&bench.random_of(DType::F32, 1, WIDTH, 1.0));
    let gates = bench.random_of(DType::F32, ROWS, 1, 2.0);
    let norm = |kind, x, out| {
        Norm {
            kind,
            x,
            weight: Weight::clone(&vector),
            bias: None,
            eps: 1e-5,
            out,
            codes: None,
            origin: None,
        }
        .into()
    };
    let rope_table = bench.random_of(DType::F32, ROWS, 36, 1.0);
    let terms: Vec<u32> = (0..3 * ROWS).map(|term| (term * 7 % 3) as u32).collect();
    let reduce = |rows: Range<usize>, x: Buffer, out: Buffer| -> Op {
        // Three times the row itself; the weights are the row's own.
        let index: Vec<u32> = (0..3 * rows.len() as u32).map(|term| term / 3).collect();
        let weights = terms[3 * rows.start..3 * rows.end].iter().map(|&term| term as f32 / 3.0).collect();
        let weights = Sheet { rows: rows.len(), width: 3, values: weights };
        Reduce {
            x,
            index: bench.put_words(&index, 3).view,
            weights: Some(bench.put_as(DType::F32, &weights).view),
            addend: None,
            out,
        }
        .into()
    };
    let operations: [RowOperation<'_>; 8] = [
        ("rms", [narrow; 2], &|_, x, out| norm(NormKind::Rms, x, out)),
        ("rms of float32", [DType::F32, narrow], &|_, x, out| norm(NormKind::Rms, x, out)),
        ("layer", [narrow; 2], &|_, x, out| norm(NormKind::Layer, x, out)),
        ("gate", [narrow; 2], &|rows, x, out| {
            bench.run("gate", Copy { x, out: out.clone() });
            GateRows { gate: bench.put_as(DType::F32, &gates.take(rows)).view, x: out }.into()
        }),
        ("rotate", [narrow; 2], &|rows, x, out| {
            bench.run("rotate", Copy { x, out: out.clone() });
            let rope_table = bench.put_as(DType::F32, &rope_table.take(rows)).view;
            Rotate { x: out, head_width: WIDTH, start: 1, style: RopeStyle::Interleaved, rope_table }.into()
        }),
        ("reduce", [narrow; 2], &reduce),
        ("reduce into float32", [narrow, DType::F32], &reduce),
        ("route", [narrow, DType::F32], &|rows, x, out| {
            let router =
                TopKRouter { top_k: WIDTH, score: Score::Softmax, groups: None, normalise: true, scale: 1.0 };
            let wide = bench.room(DType::F32, rows.len(), WIDTH).view;
            let logits = if x.dtype == DType::F32 { x } else { wide };
            bench.fill(&logits, &logits_of(&gates, rows.clone(), WIDTH));
            let experts = bench.room(DType::U32, rows.len(), WIDTH).view;
            Route { logits, router, bias: None, scales: None, experts, weights: out }.into()
        }),
    ];
    for (what, [from, to], operation) in operations {
        let run = |rows: Range<usize>| {
            let (input, out) = (bench.put_as(from, &x.take(rows.clone())), bench.room(to, rows.len(), WIDTH));
            bench.run(what, operation(rows, input.view, out.view.clone()));
            bench.get(what, &out)
        };
        let whole = run(0..ROWS);
        for _ in 0..24 {
            let start = bench.below(ROWS);
            let rows = start..start + 1 + bench.below(ROWS - start);
            same_bits(bench, what, rows.clone(), &run(rows), &whole, WIDTH);
        }
    }
}

/// Logits that depend on the row alone.
fn logits_of(gates: &Sheet, rows: Range<usize>, width: usize) -> Sheet {
    let logit = |row: usize, column: usize| gates.values[row] * (column as f32 * 0.7).sin();
    let values = rows.clone().flat_map(|row| (0..width).map(move |column| logit(row, column))).collect();
    Sheet { rows: rows.len(), width, values }
}

/// A token attends alike in a batch of sequences, in its sequence alone, and alone with everything before it
/// cached: decoding equals recomputation.
fn attentions<B: Backend>(bench: &Bench<B>) {
    let grouped = Heads {
        heads: 4,
        kv_heads: 2,
        key_width: 9,
        value_width: 7,
        latent: false,
        sight: Sight::All,
        sinks: false,
    };
    let latent = Heads { heads: 3, kv_heads: 1, key_width: 40, value_width: 32, latent: true, ..grouped };
    let wide = Heads { heads: 8, key_width: 128, value_width: 128, ..grouped };
    let wide_latent = Heads { heads: 5, key_width: 160, value_width: 128, ..latent };
    let apart = Heads { heads: 3, kv_heads: 3, key_width: 192, value_width: 128, ..grouped };
    let widest = Heads { heads: 6, key_width: 256, value_width: 256, ..grouped };
    let windowed = |heads, count| Heads { sight: Sight::Last(count), ..heads };
    let stretched = |heads, count| Heads { sight: Sight::Stretch(count), ..heads };
    // As wide as the heads of models, in blocks as large as theirs: another kernel on a GPU.
    let in_blocks = |heads| (heads, 64);
    let cases = [
        grouped,
        latent,
        windowed(grouped, 6),
        wide,
        wide_latent,
        windowed(wide, 66),
        stretched(wide, 66),
        stretched(wide_latent, 66),
        windowed(wide_latent, 66),
        Heads { sinks: true, ..grouped },
        Heads { sinks: true, ..windowed(wide, 66) },
    ];
    let cases = cases.map(|heads| (heads, 4)).into_iter().chain(
        [
            wide,
            windowed(wide, 66),
            Heads { sinks: true, key_width: 64, value_width: 64, ..wide },
            wide_latent,
            apart,
            widest,
            Heads { sinks: true, ..windowed(widest, 66) },
        ]
        .map(in_blocks),
    );
    for ((heads, block_size), coded) in cases.flat_map(|case| [(case, false), (case, true)]) {
        let lengths = [(0, 19), (33, 1), (70, 2), (5, 11), (0, 1), (120, 40)];
        attend_alike(bench, &heads, &Sequences::new(bench, &lengths, block_size), coded, 3);
    }
    // Contexts of several spans, which a GPU sums up apart.
    let pair = Heads { heads: 2, kv_heads: 1, key_width: 128, value_width: 128, ..grouped };
    let narrow = Heads { key_width: 64, value_width: 64, ..pair };
    let sinks = |heads| Heads { sinks: true, ..heads };
    for (heads, block_size) in [
        (pair, 64),
        (pair, 16),
        (narrow, 64),
        (sinks(windowed(narrow, 4000)), 64),
        (sinks(windowed(pair, 66)), 16),
        (windowed(pair, 4097), 64),
        (stretched(pair, 5000), 64),
        (sinks(narrow), 16),
        (Heads { heads: 3, ..wide_latent }, 64),
        (Heads { heads: 3, ..windowed(wide_latent, 4100) }, 16),
        (Heads { heads: 1, kv_heads: 1, ..apart }, 64),
        (sinks(Heads { heads: 2, kv_heads: 1, ..widest }), 64),
    ] {
        let lengths = [(4080, 24), (8185, 10), (4095, 1), (0, 2), (4096, 2)];
        let coded = bench.below(2) > 0;
        attend_alike(bench, &heads, &Sequences::new(bench, &lengths, block_size), coded, 3);
    }
    // One token of more sequences than a GPU has room for at a time; they share what is cached.
    let many = Heads { heads: 32, ..narrow };
    let one = Sequences::new(bench, &[(9000, 1)], 64);
    let lengths = (0..33).map(|sequence| (9000 - 257 * sequence, 1)).collect::<Vec<_>>();
    let blocks = vec![one.blocks[0].clone(); lengths.len()];
    attend_alike(bench, &many, &Sequences { lengths, blocks, ..one }, false, 4);
}

/// Each sequence alone, and every `every`-th token alone, against all together; keys and values are cached in codes or numbers.
fn attend_alike<B: Backend>(bench: &Bench<B>, heads: &Heads, whole: &Sequences, coded: bool, every: usize) {
    let (key_width, value_width) = (heads.kv_heads * heads.key_width, heads.kv_heads * heads.value_width);
    let out_width = heads.heads * heads.value_width;
    // Rows of a model begin on vectors, and its blocks hold whole steps. Heads of more than 128 that are no latents have another
    // kernel, with other bits, for rows that do not.
    let vectors = whole.block_size == 64 || heads.key_width > 128 && !heads.latent;
    let put = |sheet: &Sheet| if vectors { bench.put_on(8, sheet) } else { bench.put(sheet) };
    let q = bench.random(whole.tokens().len(), heads.heads * heads.key_width, 1.0);
    let put_cache = |width: usize| {
        let sheet = whole.cache(bench, width);
        let unit = if vectors || bench.below(2) > 0 { 8 } else { 1 };
        if coded { bench.put_codes(unit, &sheet, 0.01).0.view } else { put(&sheet).view }
    };
    let keys = put_cache(key_width);
    let values = match heads.latent {
        true => keys.columns(0..value_width).expect("inside"),
        false => put_cache(value_width),
    };
    let scales = if coded { (0.01, 0.01) } else { (1.0, 1.0) };
    let run = |sequences: &Sequences, rows: Range<usize>| {
        let q = put(&q.take(rows.clone()));
        let out = match vectors {
            true => bench.room_on(8, bench.dtype, rows.len(), out_width),
            false => bench.room(bench.dtype, rows.len(), out_width),
        };
        let (keys, values) = (keys.clone(), values.clone());
        let parts = CacheParts { q: q.view, keys, values, scales, out: out.view.clone() };
        bench.run("attention", sequences.attention(bench, heads, &parts));
        bench.get("attention", &out)
    };
    let tokens = whole.tokens();
    let together = run(whole, 0..tokens.len());
    let only = |sequence: usize, length: (usize, usize)| Sequences {
        lengths: vec![length],
        blocks: vec![whole.blocks[sequence].clone()],
        ..*whole
    };
    let mut start = 0;
    for (sequence, &length) in whole.lengths.iter().enumerate() {
        let rows = start..start + length.1;
        start = rows.end;
        let what = format!("{heads:?}, codes: {coded}, sequence {sequence} alone");
        let alone = run(&only(sequence, length), rows.clone());
        same_bits(bench, &what, rows, &alone, &together, out_width);
    }
    for (row, &(sequence, position)) in tokens.iter().enumerate().step_by(every) {
        let what = format!("{heads:?}, codes: {coded}, position {position} of sequence {sequence} decoded");
        let alone = run(&only(sequence, (position, 1)), row..row + 1);
        same_bits(bench, &what, row..row + 1, &alone, &together, out_width);
    }
}
