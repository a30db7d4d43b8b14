//! Weights that are held in codes: products with them have the bits of products with the bfloat16 numbers that the codes mean.

use crate::bench::{Bench, Sheet};
use crate::drawn::{random as random_places, sheet};
use epsmoe_device::op::*;
use epsmoe_device::{Backend, DeviceError, Drawn, Weight, WeightShape};
use epsmoe_quant::{Code, Codes, Format, Scale, Target};
use half::{bf16, f16};
use std::ops::Range;

pub(crate) fn format(code: Code, scale: Scale, [group, part]: [usize; 2], zeros: bool) -> Format {
    Format { code, scale, group, part, zeros }
}

/// One of every kind that checkpoints have.
pub(crate) fn formats() -> [Format; 18] {
    [
        format(Code::E2M1, Scale::E8M0, [32, 32], false),
        format(Code::U4, Scale::BF16, [32, 32], false),
        format(Code::U4, Scale::BF16, [16, 16], false),
        format(Code::U4, Scale::BF16, [128, 128], false),
        format(Code::U4, Scale::F16, [32, 32], false),
        format(Code::U4, Scale::F16, [128, 128], true),
        format(Code::U4, Scale::F32, [8, 8], false),
        format(Code::U4, Scale::NestedWithMinima, [256, 32], false),
        format(Code::I8, Scale::F16, [32, 32], false),
        format(Code::I8, Scale::BF16, [32, 32], false),
        format(Code::I8, Scale::BF16, [64, 64], true),
        format(Code::I8, Scale::BF16, [16, 16], true),
        format(Code::I8, Scale::Nested, [256, 16], false),
        format(Code::I8, Scale::NestedWithMinima, [64, 32], false),
        format(Code::E4M3, Scale::F32, [128, 128], false),
        format(Code::E4M3, Scale::BF16, [24, 24], false),
        format(Code::E4M3, Scale::BF16, [128, 128], false),
        // One group for a whole row.
        format(Code::E4M3, Scale::F32, [5000, 5000], false),
    ]
}

/// Codes at random, and scales such that weights are about one.
pub(crate) fn random<B: Backend>(bench: &Bench<B>, format: Format, rows: usize, columns: usize) -> Codes {
    let byte = || bench.below(256) as u8;
    let code = || match format.code {
        // Neither NaN.
        Code::E4M3 => bench.below(127) as u8 | (bench.below(2) as u8) << 7,
        // Of the other codes some bits are the codes themselves.
        _ => byte(),
    };
    let codes = (0..rows * format.row_bytes(columns)).map(|_| code()).collect();
    let size = match format.code {
        Code::E4M3 => 1.0 / 64.0,
        Code::I8 => 1.0 / 64.0,
        _ => 1.0 / 4.0,
    };
    let factor = |size: f32| size * (0.5 + bench.below(1 << 20) as f32 / (1 << 20) as f32);
    let sign = || if bench.below(4) == 0 { -1.0 } else { 1.0 };
    let mut records = Vec::new();
    // Blocks of FP8 have the same scale in neighbouring rows.
    let alike = format.code == Code::E4M3 && bench.below(2) == 0;
    for _ in 0..if alike { 1 } else { rows } * format.groups(columns) {
        let parts = format.group / format.part;
        match format.scale {
            Scale::E8M0 => records.push(120 + bench.below(10) as u8),
            Scale::F16 => records.extend(f16::from_f32(sign() * factor(size)).to_le_bytes()),
            Scale::BF16 => records.extend(bf16::from_f32(sign() * factor(size)).to_le_bytes()),
            Scale::F32 => records.extend((sign() * factor(size)).to_le_bytes()),
            Scale::Nested => {
                records.extend(f16::from_f32(factor(size / 64.0)).to_le_bytes());
                records.extend((0..parts).map(|_| byte()));
            }
            Scale::NestedWithMinima => {
                records.extend(f16::from_f32(factor(size / 32.0)).to_le_bytes());
                records.extend(f16::from_f32(factor(1.0 / 32.0)).to_le_bytes());
                records.extend((0..2 * parts).map(|_| byte() & 63));
            }
        }
        if format.zeros {
            records.push(if format.code == Code::U4 { byte() & 15 } else { byte() });
        }
    }
    if alike {
        records = records.repeat(rows);
    }
    Codes { format, rows, columns, codes, records }
}

fn decoded(codes: &Codes) -> Sheet {
    let mut values = vec![0.0; codes.rows * codes.columns];
    values.chunks_exact_mut(codes.columns).enumerate().for_each(|(row, out)| codes.decode(row, out));
    values.iter_mut().for_each(|value| *value = bf16::from_f32(*value).to_f32());
    Sheet { rows: codes.rows, width: codes.columns, values }
}

pub(crate) fn suite<B: Backend>(bench: Bench<B>) {
    for format in formats() {
        if !bench.device.holds(&format) {
            refused(&bench, format);
            continue;
        }
        for (n, k, epilogue) in [
            (5, 6, Epilogue::Store),
            (33, 64, Epilogue::Store),
            (16, 65, Epilogue::SwiGlu),
            (50, 200, Epilogue::SwiGlu),
            (17, 331, Epilogue::Store),
            (3, 4402, Epilogue::Store),
            (140, 130, Epilogue::SwiGlu),
            (88, 608, Epilogue::Store),
            (72, 576, Epilogue::SwiGlu),
            (150, 1088, Epilogue::Store),
        ] {
            product(&bench, format, [n, k], epilogue);
        }
    }
    mixed(&bench);
    for size in [[1, 32], [17, 96], [64, 64], [72, 352], [130, 2048]] {
        drawn(&bench, size);
    }
}

/// Weights that are made where they will be have the codes that a host would have made.
fn drawn<B: Backend>(bench: &Bench<B>, [n, k]: [usize; 2]) {
    for shape in [WeightShape::Matrix { n, k }, WeightShape::GateUp { inner: n, k }] {
        let what = format!("drawn as MXFP4, {shape:?}, seed {}", bench.seed);
        let tensors: Vec<Drawn> = (0..shape.sources().0).map(|_| random_places(bench, [n, k])).collect();
        let drawn = bench.device.draw_codes(&format!("{what} there"), shape, Target::Mxfp4, &tensors);
        let Some(drawn) = drawn.expect("memory") else { return };
        let codes = |tensor| Target::Mxfp4.codes(&what, &sheet(tensor, [n, k]).values, k);
        let codes: Vec<Codes> =
            tensors.iter().map(|tensor| codes(tensor).expect("finite").expect("codes")).collect();
        let brought = bench.device.load_codes(&what, shape, &codes).expect("memory");
        assert_eq!(drawn.format, brought.format);
        let epilogue = if tensors.len() == 2 { Epilogue::SwiGlu } else { Epilogue::Store };
        let x = bench.random(33, k, 1.0);
        let [got, want] = [drawn, brought].map(|weight| {
            let values = run(bench, &what, &weight, &x, std::slice::from_ref(&(0..33)), epilogue);
            values.into_iter().map(f32::to_bits).collect::<Vec<_>>()
        });
        assert!(got == want, "{what}");
    }
}

/// Experts held in different formats, some of them decoded, multiply in one operation as if all were.
fn mixed<B: Backend>(bench: &Bench<B>) {
    let held: Vec<Format> = formats().into_iter().filter(|format| bench.device.holds(format)).collect();
    if held.is_empty() {
        return;
    }
    let (n, k) = (40, 192);
    let shape = WeightShape::Matrix { n, k };
    let (mut starts, mut weights, mut plain) = (vec![0], Vec::new(), Vec::new());
    for expert in 0..12 {
        let mut format = held[bench.below(held.len())];
        if format.group > 4402 {
            format = Format { group: k, part: k, ..format };
        }
        let codes = random(bench, format, n, k);
        plain.push(bench.matrix(&decoded(&codes)));
        let name = format!("expert {expert} of {}", bench.below(usize::MAX));
        weights.push(match bench.below(3) {
            0 => plain[expert].clone(),
            _ => bench.device.load_codes(&name, shape, &[codes]).expect("memory"),
        });
        starts.push(starts[expert] + [0, 1, 3, 20, 70][bench.below(5)]);
    }
    let what = format!("formats side by side, seed {}", bench.seed);
    let rows = starts[12] as usize;
    let x = bench.put(&bench.random(rows, k, 1.0));
    let [grouped, experts] = [&weights, &plain].map(|weights| {
        let outs = [0; 2].map(|_| bench.room(bench.dtype, rows, n));
        let part = |(expert, weight): (usize, &Weight)| {
            let rows = starts[expert] as usize..starts[expert + 1] as usize;
            let view = |buffer: &epsmoe_device::Buffer| buffer.rows(rows.clone()).expect("inside");
            GemmPart { x: view(&x.view), weight: weight.clone(), bias: None, out: view(&outs[0].view) }
        };
        let parts = weights.iter().enumerate().map(part).collect();
        bench.run(&what, Gemm { parts, epilogue: Epilogue::Store });
        let op = ExpertGemm {
            x: x.view.clone(),
            starts: bench.put_words(&starts, 1).view,
            weights: weights.clone(),
            epilogue: Epilogue::Store,
            out: outs[1].view.clone(),
        };
        bench.run(&what, op);
        outs.map(|out| bench.get(&what, &out).into_iter().map(f32::to_bits).collect::<Vec<_>>())
    });
    assert!(
        grouped[0] == grouped[1] && experts[0] == experts[1],
        "{what}: grouped and experts' products differ"
    );
    assert!(grouped == experts, "{what}: other bits than with decoded weights");
}

/// A processor that does not hold a format says so.
fn refused<B: Backend>(bench: &Bench<B>, format: Format) {
    let codes = random(bench, format, 8, 64);
    let shape = WeightShape::Matrix { n: 8, k: 64 };
    match bench.device.load_codes("refused", shape, &[codes]) {
        Err(DeviceError::Unsupported(message)) => assert!(message.contains("dequantise"), "{message}"),
        other => panic!("{format}: {other:?}"),
    }
}

fn product<B: Backend>(bench: &Bench<B>, format: Format, [n, k]: [usize; 2], epilogue: Epilogue) {
    let (shape, count) = match epilogue {
        Epilogue::Store => (WeightShape::Matrix { n, k }, 1),
        Epilogue::SwiGlu => (WeightShape::GateUp { inner: n, k }, 2),
    };
    // A group is not longer than a row.
    let format = if format.group > 4402 {
        let group = k.next_multiple_of(8);
        Format { group, part: group, ..format }
    } else {
        format
    };
    let matrices: Vec<Codes> = (0..count).map(|_| random(bench, format, n, k)).collect();
    let sheets: Vec<Sheet> = matrices.iter().map(decoded).collect();
    let plain = match &sheets[..] {
        [gate, up] => bench.gate_up(gate, up),
        sheets => bench.matrix(&sheets[0]),
    };
    let name = format!("{format} {shape:?} {}", bench.below(usize::MAX));
    let held = bench.device.load_codes(&name, shape, &matrices).expect("memory");
    let most = 300;
    let x = bench.random(most, k, 1.0);
    for rows in [1, 2, 3, 5, 7, 14, 33, 150, most] {
        let what = format!("{format}, {epilogue:?}, n {n}, k {k}, {rows} rows, seed {}", bench.seed);
        let start = bench.below(most - rows + 1);
        let input = x.take(start..start + rows);
        // In one part, or in two.
        let cut = if bench.below(2) == 0 { rows } else { bench.below(rows + 1) };
        let [got, want] =
            [&held, &plain].map(|weight| run(bench, &what, weight, &input, &[0..cut, cut..rows], epilogue));
        let differs = got.iter().zip(&want).position(|(got, want)| got.to_bits() != want.to_bits());
        if let Some(at) = differs {
            panic!("{what}: row {}, column {}: {:e} and {:e}", at / n, at % n, got[at], want[at]);
        }
        assert!(want.iter().all(|value| value.is_finite()), "{what}");
    }
}

pub(crate) fn run<B: Backend>(
    bench: &Bench<B>,
    what: &str,
    weight: &Weight,
    x: &Sheet,
    parts: &[Range<usize>],
    epilogue: Epilogue,
) -> Vec<f32> {
    let n = match weight.shape {
        WeightShape::Matrix { n, .. } | WeightShape::GateUp { inner: n, .. } => n,
        other => panic!("{other:?}"),
    };
    let (input, out) = (bench.put(x), bench.room(bench.dtype, x.rows, n));
    let part = |part: &Range<usize>| GemmPart {
        x: input.view.rows(part.clone()).expect("inside"),
        weight: weight.clone(),
        bias: None,
        out: out.view.rows(part.clone()).expect("inside"),
    };
    bench.run(what, Gemm { parts: parts.iter().map(part).collect(), epilogue });
    bench.get(what, &out)
}
