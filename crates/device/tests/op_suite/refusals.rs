//! Arguments that do not fit are refused at the door; indices that point outside stop the world. Both say what
//! disagrees with what.

use crate::assignments;
use crate::bench::{Bench, Sheet};
use crate::recurrent;
use epsmoe_base::{DType, FaultKind, Layer, Place};
use epsmoe_device::op::*;
use epsmoe_device::{Backend, Buffer, TensorBytes, Weight, WeightShape};

/// `fresh` makes a new processor for float32 each time.
pub(crate) fn suite<B: Backend>(fresh: impl Fn() -> Bench<B>) {
    at_the_door(&fresh());
    weights(&fresh());
    while_running(&fresh);
    assignments::hostile(&fresh);
    recurrent::refusals(&fresh);
    not_finite(fresh);
}

fn f32s<B: Backend>(bench: &Bench<B>, name: &'static str, rows: usize, width: usize) -> Buffer {
    bench.device.allocate(name, DType::F32, rows, width).expect("memory")
}

fn u32s<B: Backend>(bench: &Bench<B>, name: &'static str, rows: usize, width: usize) -> Buffer {
    bench.device.allocate(name, DType::U32, rows, width).expect("memory")
}

fn weight<B: Backend>(bench: &Bench<B>, name: &str, shape: WeightShape) -> Weight {
    let (count, dimensions) = shape.sources();
    let bytes = vec![0; 4 * dimensions.iter().product::<usize>()];
    let tensors = vec![TensorBytes { dtype: DType::F32, bytes: &bytes }; count];
    bench.device.load(name, shape, &tensors).expect("a weight")
}

fn at_the_door<B: Backend>(bench: &Bench<B>) {
    let (x, y, narrow) = (f32s(bench, "x", 3, 4), f32s(bench, "y", 3, 4), f32s(bench, "narrow", 3, 2));
    let (more, half) = (f32s(bench, "more", 5, 4), bench.device.allocate("half", DType::BF16, 3, 4));
    let (half, ids, column) = (half.expect("memory"), u32s(bench, "ids", 3, 1), f32s(bench, "column", 3, 1));
    let one = |name, shape| weight(bench, name, shape);
    let (map, pair) =
        (one("map", WeightShape::Matrix { n: 4, k: 4 }), one("pair", WeightShape::GateUp { inner: 4, k: 4 }));
    let (scale, long) =
        (one("scale", WeightShape::Vector { n: 4 }), one("long", WeightShape::Vector { n: 5 }));
    let table = one("table", WeightShape::Table { rows: 9, width: 4 });
    let part = |weight: &Weight, bias: Option<&Weight>, rows: std::ops::Range<usize>| GemmPart {
        x: x.rows(rows.clone()).expect("inside"),
        weight: weight.clone(),
        bias: bias.cloned(),
        out: y.rows(rows).expect("inside"),
    };
    let parts = |parts: Vec<GemmPart>, epilogue| Gemm { parts, epilogue };
    let elsewhere = GemmPart { out: f32s(bench, "elsewhere", 3, 4), ..part(&map, None, 0..3) };
    let router = TopKRouter { top_k: 2, score: Score::Softmax, groups: None, normalise: false, scale: 1.0 };
    let route = |router, bias: Option<&Weight>| Route {
        logits: x.clone(),
        router,
        bias: bias.cloned(),
        scales: None,
        experts: u32s(bench, "experts", 3, 2),
        weights: f32s(bench, "weights", 3, 2),
    };
    let groups = |groups, kept| Some(GroupLimit { groups, kept, by: GroupScore::Max });
    let (starts, index) = (u32s(bench, "starts", 4, 1), u32s(bench, "index", 3, 2));
    let assign = |slots: &Buffer| AssignSlots {
        experts: index.clone(),
        weights: narrow.clone(),
        slot_of: ids.clone(),
        slots: slots.clone(),
        slot_weights: narrow.clone(),
        slotless: None,
    };
    let receive = |local| ReceiveOrder {
        slots: index.clone(),
        bins: u32s(bench, "bins", 3, ReceiveOrder::BIN),
        local,
        order: ids.clone(),
        sums: ids.clone(),
    };
    let sort = |rows: &Buffer| SortBySlot {
        slots: index.clone(),
        travelled: None,
        starts: starts.clone(),
        rows: rows.clone(),
        terms: index.clone(),
    };
    let expert_gemm = |starts: &Buffer, weights| ExpertGemm {
        x: x.clone(),
        starts: starts.clone(),
        weights,
        epilogue: Epilogue::Store,
        out: y.clone(),
    };
    let reduce = |index: &Buffer, addend: Option<&Buffer>, weights: Option<&Buffer>| Reduce {
        x: x.clone(),
        index: index.clone(),
        weights: weights.cloned(),
        addend: addend.cloned(),
        out: y.clone(),
    };
    let codes = bench.device.allocate("codes", DType::E4M3, 8, 4).expect("memory");
    let attention = Attention {
        q: x.clone(),
        keys: f32s(bench, "keys", 8, 2),
        values: f32s(bench, "values", 8, 2),
        sequence_starts: u32s(bench, "starts", 3, 1),
        positions: ids.clone(),
        blocks: u32s(bench, "blocks", 2, 2),
        block_size: 2,
        longest: 4,
        heads: 2,
        kv_heads: 1,
        scale: 1.0,
        value_scale: 1.0,
        sight: Sight::All,
        sinks: None,
        out: y.clone(),
    };
    let rms = |x: &Buffer, weight: &Weight, out: &Buffer| Norm {
        kind: NormKind::Rms,
        x: x.clone(),
        weight: weight.clone(),
        bias: None,
        eps: 1e-5,
        out: out.clone(),
        codes: None,
        origin: None,
    };
    let rotate = |head_width, start, rope_table: &Buffer| Rotate {
        x: x.clone(),
        head_width,
        start,
        style: RopeStyle::HalfSplit,
        rope_table: rope_table.clone(),
    };
    let rope_table = |frequencies: &Weight| RopeTable {
        positions: ids.clone(),
        frequencies: frequencies.clone(),
        scale: 1.0,
        growth: None,
        out: narrow.clone(),
    };
    let store = Epilogue::Store;
    let cases: Vec<(Op, &str)> = vec![
        (
            HostToDevice { words: [1, 2].into(), out: ids.clone() }.into(),
            "host_to_device: 2 words into ids[3, 1] uint32",
        ),
        (
            HostToDevice { words: [0; 12].into(), out: half.clone() }.into(),
            "host_to_device: 12 words into half[3, 4] bfloat16",
        ),
        (
            Embed { ids: ids.clone(), table: table.clone(), out: more.clone() }.into(),
            "embed: ids[3, 1] uint32 and more[5, 4] float32 must have equally many rows",
        ),
        (
            Embed { ids: column.clone(), table: table.clone(), out: y.clone() }.into(),
            "embed: ids is column[3, 1] float32, but must be uint32 of width 1",
        ),
        (
            Embed { ids: ids.clone(), table: map.clone(), out: y.clone() }.into(),
            "embed: map is a Matrix { n: 4, k: 4 }, the output y[3, 4] float32",
        ),
        (rms(&x, &scale, &narrow).into(), "norm: input is x[3, 4] float32, but must be float32 of width 2"),
        (rms(&half, &scale, &y).into(), "norm: input is half[3, 4] bfloat16, but must be float32 of width 4"),
        (rms(&x, &long, &y).into(), "norm: long is Vector { n: 5 }, the input x[3, 4] float32"),
        (
            AddNorm { add: Add { x: x.clone(), out: y.clone() }, norm: rms(&x, &scale, &y) }.into(),
            "add_norm: the norm of x[3, 4] float32 is not of the sum y[3, 4] float32",
        ),
        (
            NormRotate {
                parts: vec![TurnedNorm { norm: rms(&x, &scale, &y), rotate: rotate(4, 0, &narrow) }],
            }
            .into(),
            "norm_rotate: heads of 4 of x[3, 4] float32 are not the normed rows y[3, 4] float32",
        ),
        (
            Gemm::linear(x.clone(), &map, more.clone()).into(),
            "gemm: x[3, 4] float32 and more[5, 4] float32 must have equally many rows",
        ),
        (
            Gemm::linear(x.clone(), &map, narrow.clone()).into(),
            "gemm: x[3, 4] float32 · map [4, 4]ᵀ does not give narrow[3, 2] float32",
        ),
        (
            Gemm::linear(x.clone(), &map, half.clone()).into(),
            "gemm: x[3, 4] float32 · map [4, 4]ᵀ does not give half[3, 4] bfloat16",
        ),
        (
            Gemm::gated(x.clone(), &map, y.clone()).into(),
            "gemm: map is a Matrix { n: 4, k: 4 }, which does not go with SwiGlu",
        ),
        (
            Gemm::linear(x.clone(), &table, y.clone()).into(),
            "gemm: table is a Table { rows: 9, width: 4 }, which does not go with Store",
        ),
        (
            parts(vec![part(&map, None, 0..2), part(&map, None, 1..3)], store).into(),
            "gemm: outputs of the parts must ascend without overlap",
        ),
        (
            parts(vec![part(&map, None, 0..2), elsewhere, part(&map, None, 1..3)], store).into(),
            "gemm: outputs of the parts must ascend without overlap",
        ),
        (
            parts(vec![part(&pair, Some(&scale), 0..3)], Epilogue::SwiGlu).into(),
            "gemm: bias scale is Vector { n: 4 }, which does not go with SwiGlu of 4 columns",
        ),
        (
            parts(vec![part(&map, Some(&long), 0..3)], store).into(),
            "gemm: bias long is Vector { n: 5 }, which does not go with Store of 4 columns",
        ),
        (rope_table(&map).into(), "rope_table: map is no vector"),
        (
            rope_table(&scale).into(),
            "rope_table: output is narrow[3, 2] float32, but must be float32 of width 8",
        ),
        (rotate(4, 3, &narrow).into(), "rotate: x[3, 4] float32 in heads of 4 cannot turn elements 3..5"),
        (rotate(3, 0, &narrow).into(), "rotate: x[3, 4] float32 in heads of 3 cannot turn elements 0..2"),
        (rotate(0, 0, &narrow).into(), "rotate: x[3, 4] float32 in heads of 0 cannot turn elements 0..2"),
        (
            KvWrite::of(x.clone(), ids.clone(), narrow.clone(), 1.0).into(),
            "kv_write: cache is narrow[3, 2] float32, but must be float32 of width 4",
        ),
        (
            KvWrite::of(x.clone(), ids.clone(), y.clone(), 2.0).into(),
            "kv_write: a scale of 2 for y[3, 4] float32",
        ),
        (
            KvWrite::of(x.clone(), ids.clone(), codes.clone(), 0.0).into(),
            "kv_write: a scale of 0 for codes[8, 4] float8_e4m3",
        ),
        (
            Attention { keys: codes.columns(0..2).expect("inside"), ..attention.clone() }.into(),
            "attention: values is values[8, 2] float32, but must be float8_e4m3 of width 2",
        ),
        (
            Attention { kv_heads: 0, ..attention.clone() }.into(),
            "attention: 2 heads over 0 key heads, blocks of 2",
        ),
        (
            Attention { heads: 0, ..attention.clone() }.into(),
            "attention: 0 heads over 1 key heads, blocks of 2",
        ),
        (
            Attention { block_size: 0, ..attention.clone() }.into(),
            "attention: 2 heads over 1 key heads, blocks of 0",
        ),
        (
            Attention { heads: 4, ..attention.clone() }.into(),
            "attention: keys is keys[8, 2] float32, but must be float32 of width 1",
        ),
        (
            Attention { q: f32s(bench, "odd", 3, 5), ..attention.clone() }.into(),
            "attention: queries is odd[3, 5] float32, but must be float32 of width 4",
        ),
        (
            Attention { values: f32s(bench, "few", 7, 2), ..attention.clone() }.into(),
            "attention: keys[8, 2] float32 and few[7, 2] float32 must have equally many rows",
        ),
        (
            Attention { sequence_starts: u32s(bench, "starts", 2, 1), ..attention }.into(),
            "attention: starts[2, 1] uint32 does not delimit the sequences of blocks[2, 2] uint32",
        ),
        (route(TopKRouter { top_k: 0, ..router }, None).into(), "route: top_k is 0, but there are 4 experts"),
        (route(TopKRouter { top_k: 5, ..router }, None).into(), "route: top_k is 5, but there are 4 experts"),
        (
            route(TopKRouter { top_k: 1, ..router }, None).into(),
            "route: top_k is 1, but outputs are experts[3, 2] uint32 and weights[3, 2] float32",
        ),
        (
            route(TopKRouter { groups: groups(3, 1), ..router }, None).into(),
            "route: 4 experts and top 2 do not fit GroupLimit { groups: 3, kept: 1, by: Max }",
        ),
        (
            route(TopKRouter { groups: groups(4, 1), ..router }, None).into(),
            "route: 4 experts and top 2 do not fit GroupLimit { groups: 4, kept: 1, by: Max }",
        ),
        (route(router, Some(&long)).into(), "route: bias long is Vector { n: 5 }, but there are 4 experts"),
        (
            Gather { x: x.clone(), index: ids.clone(), out: narrow.clone() }.into(),
            "gather: output is narrow[3, 2] float32, but must be float32 of width 4",
        ),
        (
            GatherFp8 { x: x.clone(), index: Some(ids.clone()), out: narrow.clone(), how: Fp8::Encode }
                .into(),
            "gather_fp8: output is narrow[3, 2] float32, but must be uint32 of width 2",
        ),
        (
            GatherFp8 { x: x.clone(), index: Some(ids.clone()), out: y.clone(), how: Fp8::Decode }.into(),
            "gather_fp8: source is x[3, 4] float32, but must be uint32 of width 2",
        ),
        (
            GatherFp8 { x: x.clone(), index: Some(ids.clone()), out: half.clone(), how: Fp8::Through }.into(),
            "gather_fp8: output is half[3, 4] bfloat16, but must be float32 of width 4",
        ),
        (
            Reduce { out: half.clone(), ..reduce(&index, None, None) }.into(),
            "reduce: output is half[3, 4] bfloat16, but must be float32 of width 4",
        ),
        (
            Copy { x: half.clone(), out: y.clone() }.into(),
            "copy: source is half[3, 4] bfloat16, but must be float32 of width 4",
        ),
        (
            reduce(&starts, None, None).into(),
            "reduce: y[3, 4] float32 and starts[4, 1] uint32 must have equally many rows",
        ),
        (
            reduce(&index, Some(&more), None).into(),
            "reduce: y[3, 4] float32 and more[5, 4] float32 must have equally many rows",
        ),
        (
            reduce(&index, None, Some(&column)).into(),
            "reduce: weights is column[3, 1] float32, but must be float32 of width 2",
        ),
        (assign(&ids).into(), "assign_slots: slots is ids[3, 1] uint32, but must be uint32 of width 2"),
        (
            CountSlots {
                slots: index.clone(),
                block_starts: ids.clone(),
                counts: u32s(bench, "counts", 2, 3),
            }
            .into(),
            "count_slots: counts[2, 3] uint32 has not the rows of three histograms",
        ),
        (receive(2).into(), "receive_order: bins[3, 5] uint32 does not hold 2 slots of every source"),
        (
            sort(&u32s(bench, "many", 7, 1)).into(),
            "sort_by_slot: index[3, 2] uint32 does not make the assignments many[7, 1] uint32 of the slots that starts[4, 1] \
             uint32 delimits",
        ),
        (expert_gemm(&starts, vec![]).into(), "gemm: weights None with Store"),
        (
            expert_gemm(&starts, vec![map.clone(), pair.clone()]).into(),
            "gemm: weights differ: map is Matrix { n: 4, k: 4 }, pair is GateUp { inner: 4, k: 4 }",
        ),
        (
            expert_gemm(&ids, vec![map.clone()]).into(),
            "gemm: ids[3, 1] uint32 does not delimit the rows of 1 experts",
        ),
        (
            Add { x: half.clone(), out: y.clone() }.into(),
            "add: output is y[3, 4] float32, but must be bfloat16 of width 4",
        ),
        (
            Copy { x: more.clone(), out: y.clone() }.into(),
            "copy: more[5, 4] float32 and y[3, 4] float32 must have equally many rows",
        ),
        (Clamp { x: x.clone(), limit: -1.0 }.into(), "clamp: the limit -1 is not a magnitude"),
        (Clamp { x: x.clone(), limit: f32::NAN }.into(), "clamp: the limit NaN is not a magnitude"),
        (
            GateRows { gate: narrow.clone(), x: x.clone() }.into(),
            "gate_rows: gate is narrow[3, 2] float32, but must be float32 of width 1",
        ),
    ];
    for (op, want) in cases {
        let shown = format!("{op:?}");
        let refusal = bench.try_run(op).expect_err(&shown);
        assert_eq!(refusal.to_string(), want, "{shown}");
    }
    let lost =
        bench.device.allocate("a great deal", DType::F32, 1 << 30, 1 << 24).expect_err("no such memory");
    let lost = lost.to_string();
    assert!(
        lost.contains("a great deal [1073741824, 16777216] float32") && lost.contains("65536.0 TiB"),
        "{lost}"
    );
    assert!(lost.contains("--max-"), "no flag is named: {lost}");
    // Nothing refused has reached a lane.
    bench.run("after the refusals", Copy { x: y.clone(), out: x });
}

fn weights<B: Backend>(bench: &Bench<B>) {
    let bytes = [0; 24];
    let tensor = TensorBytes { dtype: DType::BF16, bytes: &bytes };
    let cases: &[(WeightShape, &[TensorBytes<'_>], &str)] = &[
        (
            WeightShape::Matrix { n: 3, k: 5 },
            &[tensor],
            "w: Matrix { n: 3, k: 5 } needs 1 × [3, 5], given bytes [24]",
        ),
        (
            WeightShape::GateUp { inner: 3, k: 4 },
            &[tensor],
            "w: GateUp { inner: 3, k: 4 } needs 2 × [3, 4], given bytes [24]",
        ),
        (WeightShape::Vector { n: 12 }, &[], "w: Vector { n: 12 } needs 1 × [12], given bytes []"),
    ];
    for (shape, tensors, want) in cases {
        assert_eq!(bench.device.load("w", *shape, tensors).expect_err(want).to_string(), *want);
    }
    assert!(bench.device.find("w").is_none());
    let held = bench.device.load("w", WeightShape::Vector { n: 12 }, &[tensor]).expect("24 bytes");
    assert_eq!(bench.device.find("w").map(|weight| weight.slot), Some(held.slot));
}

/// One number of a row makes the world stop, wherever it stands, in the words of who made the row.
fn not_finite<B: Backend>(fresh: impl Fn() -> Bench<B>) {
    const WIDTH: usize = 700;
    let place = |layer| Place::layer(Layer(layer));
    let run =
        |bench: &Bench<B>, op: Op| bench.try_run(op).expect("it fits").map_err(|fault| fault.to_string());
    let norm = |bench: &Bench<B>, kind, x: &Sheet, origin| {
        let weight = bench.vector(&bench.random_of(DType::F32, 1, WIDTH, 1.0));
        let (x, out) = (bench.put(x).view, f32s(bench, "out", x.rows, WIDTH));
        Op::from(Norm { kind, x, weight, bias: None, eps: 1e-5, out, codes: None, origin })
    };
    let argmax = |bench: &Bench<B>, logits: &Sheet| {
        let tokens = u32s(bench, "tokens", logits.rows, 1);
        Op::from(ArgMax { logits: bench.put(logits).view, tokens })
    };
    let mend = "is not finite (a NaN, an infinity, or numbers whose squares are): the weights are damaged, or too \
                large for the format they are computed in (--dtype)";
    for number in [f32::NAN, -f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 2e19] {
        for at in [0, 255, WIDTH - 1] {
            let spoiled = |bench: &Bench<B>| {
                let mut sheet = bench.random(3, WIDTH, 1.0);
                sheet.values[WIDTH + at] = number;
                sheet
            };
            for kind in [NormKind::Rms, NormKind::Layer] {
                let (by_itself, named) = (fresh(), fresh());
                let origin = Origin { place: place(6), part: "attention" };
                let op = norm(&by_itself, kind, &spoiled(&by_itself), None);
                assert_eq!(run(&by_itself, op), Err(format!("rank 0, layer 7: norm: row 1 of room {mend}")));
                let op = norm(&named, kind, &spoiled(&named), Some(origin));
                let want = format!("rank 0, layer 6: norm: row 1 of room, made by attention, {mend}");
                assert_eq!(run(&named, op), Err(want));
            }
            let bench = fresh();
            let op = argmax(&bench, &spoiled(&bench));
            let want = format!("rank 0, layer 7: argmax: row 1 of room {mend}");
            let fine = number == f32::NEG_INFINITY || number.is_finite();
            assert_eq!(run(&bench, op), if fine { Ok(()) } else { Err(want) }, "{number} at {at}");
        }
    }
    let (bench, lowest) = (fresh(), f32::NEG_INFINITY);
    let op = argmax(&bench, &Sheet { rows: 1, width: 3, values: vec![lowest; 3] });
    assert_eq!(run(&bench, op), Err(format!("rank 0, layer 7: argmax: row 0 of room {mend}")));
}

/// What only the numbers show, each on a processor of its own: the first fault is the last.
fn while_running<B: Backend>(fresh: impl Fn() -> Bench<B>) {
    fn sequences<B: Backend>(bench: &Bench<B>, starts: &[u32], positions: &[u32], blocks: &[u32]) -> Op {
        let tokens = positions.len();
        Attention {
            q: bench.put(&bench.random(tokens, 4, 1.0)).view,
            keys: bench.put(&bench.random(8, 4, 1.0)).view,
            values: bench.put(&bench.random(8, 4, 1.0)).view,
            sequence_starts: bench.put_words(starts, 1).view,
            positions: bench.put_words(positions, 1).view,
            blocks: bench.put_words(blocks, 2).view,
            block_size: 2,
            longest: 3,
            heads: 1,
            kv_heads: 1,
            scale: 1.0,
            value_scale: 1.0,
            sight: Sight::All,
            sinks: None,
            out: f32s(bench, "out", tokens, 4),
        }
        .into()
    }
    fn gather<B: Backend>(bench: &Bench<B>, index: &[u32]) -> Op {
        let out = f32s(bench, "out", index.len(), 4);
        let x = bench.put(&bench.random(4, 4, 1.0)).view;
        Gather { x, index: bench.put_words(index, 1).view, out }.into()
    }
    fn gather_fp8<B: Backend>(bench: &Bench<B>, index: &[u32], how: Fp8) -> Op {
        let (x, words) = (bench.put(&bench.random(4, 4, 1.0)).view, u32s(bench, "coded", 4, 2));
        let out = f32s(bench, "out", index.len(), 4);
        let index = bench.put_words(index, 1).view;
        match how {
            Fp8::Encode => {
                GatherFp8 { out: u32s(bench, "out", index.rows, 2), x, index: Some(index), how }.into()
            }
            Fp8::Decode => GatherFp8 { x: words, index: Some(index), out, how }.into(),
            Fp8::Through => GatherFp8 { x, index: Some(index), out, how }.into(),
        }
    }
    fn reduce<B: Backend>(bench: &Bench<B>, index: &[u32]) -> Op {
        Reduce {
            x: bench.put(&bench.random(4, 4, 1.0)).view,
            index: bench.put_words(index, 2).view,
            weights: None,
            addend: None,
            out: f32s(bench, "out", index.len() / 2, 4),
        }
        .into()
    }
    fn assign<B: Backend>(bench: &Bench<B>, experts: &[u32]) -> Op {
        AssignSlots {
            experts: bench.put_words(experts, 2).view,
            weights: bench.put(&bench.random(experts.len() / 2, 2, 1.0)).view,
            slot_of: bench.put_words(&[2, 0, 1], 1).view,
            slots: u32s(bench, "slots", experts.len() / 2, 2),
            slot_weights: f32s(bench, "slot_weights", experts.len() / 2, 2),
            slotless: None,
        }
        .into()
    }
    fn count<B: Backend>(bench: &Bench<B>, slots: &[u32]) -> Op {
        let block_starts = bench.put_words(&[0, 0, 2], 1).view;
        let slots = bench.put_words(slots, 2).view;
        CountSlots { slots, block_starts, counts: u32s(bench, "counts", 3, 3) }.into()
    }
    /// Rows to three slots: {0, 1, 2}, {0} and {1} from one source, {2} from another; but row `spoiled` is to `slots`.
    fn receive<B: Backend>(bench: &Bench<B>, spoiled: usize, slots: [u32; 3]) -> Op {
        const NO: u32 = NONE;
        let mut rows = [[0, 1, 2], [0, NO, NO], [1, NO, NO], [2, NO, NO]];
        rows[spoiled] = slots;
        let bins: [[u32; ReceiveOrder::BIN]; 6] = [
            [0, 0, 0, 1, 2],
            [2, 2, 1, 1, 2],
            [3, 3, 2, 1, 1],
            [3, 3, 3, 0, 0],
            [3, 3, 3, 0, 0],
            [3, 3, 3, 1, 1],
        ];
        ReceiveOrder {
            slots: bench.put_words(rows.as_flattened(), 3).view,
            bins: bench.put_words(bins.as_flattened(), ReceiveOrder::BIN).view,
            local: 3,
            order: u32s(bench, "order", 4, 1),
            sums: u32s(bench, "sums", 4, 1),
        }
        .into()
    }
    fn sort<B: Backend>(bench: &Bench<B>, slots: &[u32], assignments: usize) -> Op {
        SortBySlot {
            slots: bench.put_words(slots, 2).view,
            travelled: None,
            starts: u32s(bench, "starts", 4, 1),
            rows: u32s(bench, "rows", assignments, 1),
            terms: u32s(bench, "terms", slots.len() / 2, 2),
        }
        .into()
    }
    fn expert_gemm<B: Backend>(bench: &Bench<B>, starts: &[u32]) -> Op {
        let weight = weight(bench, "expert", WeightShape::Matrix { n: 4, k: 4 });
        ExpertGemm {
            x: bench.put(&bench.random(3, 4, 1.0)).view,
            starts: bench.put_words(starts, 1).view,
            weights: vec![weight; starts.len() - 1],
            epilogue: Epilogue::Store,
            out: f32s(bench, "out", 3, 4),
        }
        .into()
    }
    type Case<'a, B> = (&'a str, &'a dyn Fn(&Bench<B>) -> Op);
    let cases: [Case<'_, B>; 28] = [
        ("assign_slots: expert 3 is not below 3", &|bench| assign(bench, &[0, 1, 0, 3])),
        ("assign_slots: token 1 is sent to expert 2 twice", &|bench| assign(bench, &[0, 1, 2, 2])),
        ("count_slots: slot 9 is not below 3", &|bench| count(bench, &[0, 1, 1, 9])),
        ("sort_by_slot: slot 3 is not below 3", &|bench| sort(bench, &[0, 1, 1, 3], 4)),
        ("sort_by_slot: there are 4 assignments, expected 3", &|bench| sort(bench, &[0, 1, 1, 2], 3)),
        ("receive_order: row 2, from source 0: its first slot is 2, expected 1", &|bench| {
            receive(bench, 2, [2, NONE, NONE])
        }),
        ("receive_order: row 0, from source 0: a slot is 7, expected less than 3", &|bench| {
            receive(bench, 0, [0, 1, 7])
        }),
        ("receive_order: row 0, from source 0: a slot is 1, expected more than 1", &|bench| {
            receive(bench, 0, [0, 1, 1])
        }),
        ("receive_order: row 3, from source 1: its number of slots is 0, expected at least 1", &|bench| {
            receive(bench, 3, [NONE; 3])
        }),
        ("receive_order: row 3, from source 1: the place behind its slots is 1, expected none", &|bench| {
            receive(bench, 3, [2, NONE, 1])
        }),
        (
            "receive_order: row 2, from source 0: it has slot 1, expected 2 such rows or receive_order: row 2, from \
             source 0: it has last slot 1, expected at most 1 such rows",
            &|bench| receive(bench, 1, [0, 1, NONE]),
        ),
        ("receive_order: 1 rows have slot 1, expected 2", &|bench| receive(bench, 0, [0, 2, NONE])),
        ("gemm: rows of expert 1 end at 1, but start at 2", &|bench| expert_gemm(bench, &[0, 2, 1])),
        ("gemm: end of an expert's rows 4 is not below 4", &|bench| expert_gemm(bench, &[0, 4])),
        ("embed: token id 9 is not below 9", &|bench| {
            let table = weight(bench, "table", WeightShape::Table { rows: 9, width: 4 });
            Embed { ids: bench.put_words(&[8, 9], 1).view, table, out: f32s(bench, "out", 2, 4) }.into()
        }),
        ("kv_write: cache slot 8 is not below 8", &|bench| {
            let (x, cache) = (bench.put(&bench.random(2, 4, 1.0)).view, f32s(bench, "cache", 8, 4));
            KvWrite::of(x, bench.put_words(&[7, 8], 1).view, cache, 1.0).into()
        }),
        (
            "kv_write: row 1 of room is not finite (a NaN, an infinity, or numbers whose squares are): the weights are damaged, \
             or too large for the format they are computed in (--dtype)",
            &|bench| {
                let values = [[1.0; 4], [0.0, f32::INFINITY, 2.0, 1.0]].concat();
                let x = bench.put(&Sheet { rows: 2, width: 4, values }).view;
                let cache = bench.device.allocate("codes", DType::E4M3, 8, 4).expect("memory");
                let fine = bench.put(&bench.random(2, 4, 1.0)).view;
                let other = bench.device.allocate("other codes", DType::E4M3, 8, 4).expect("memory");
                // The second of two parts is the one to be named.
                let first = KvRows { x: fine, cache: other, scale: 0.5 };
                let parts = vec![first, KvRows { x, cache, scale: 0.5 }];
                KvWrite { parts, slots: bench.put_words(&[7, 0], 1).view }.into()
            },
        ),
        ("gather: row 4 is not below 4", &|bench| gather(bench, &[0, 4])),
        ("gather: row 4294967294 is not below 4", &|bench| gather(bench, &[u32::MAX - 1])),
        ("gather: row 4 is not below 4", &|bench| gather_fp8(bench, &[0, 4], Fp8::Encode)),
        ("gather: row 5 is not below 4", &|bench| gather_fp8(bench, &[5], Fp8::Decode)),
        ("gather: row 6 is not below 4", &|bench| gather_fp8(bench, &[6, 1], Fp8::Through)),
        ("reduce: row 9 is not below 4", &|bench| reduce(bench, &[0, NONE, 1, 9])),
        ("attention: sequences hold 1 of 2 tokens", &|bench| sequences(bench, &[0, 1], &[0, 1], &[0, 1])),
        ("attention: sequence 0 spans tokens 1..2", &|bench| sequences(bench, &[1, 2], &[0, 1], &[0, 1])),
        ("attention: cache block 2 is not below 2", &|bench| sequences(bench, &[0, 1], &[4], &[0, 1])),
        ("attention: position 3 is not below 3", &|bench| sequences(bench, &[0, 1], &[3], &[0, 1])),
        ("attention: cache block 1 of sequence 0 is outside room[8, 4] float32", &|bench| {
            sequences(bench, &[0, 1], &[2], &[0, 4])
        }),
    ];
    for (want, op) in cases {
        let bench = fresh();
        let fault = bench.try_run(op(&bench)).expect("it fits").expect_err(want);
        let text = fault.to_string();
        // What threads find at the same time is told in any order.
        let mut wanted = std::iter::once(want).chain(want.split(" or "));
        let told = wanted.any(|want| text == format!("rank 0, layer 7: {want}"));
        assert!(told, "{text}, not {want}");
        assert_eq!(fault.kind, FaultKind::Invalid);
        assert_eq!(bench.try_run(gather(&fresh(), &[])).expect("it fits"), Err(fault));
    }
}
