//! Operations that carry a state from token to token.

use crate::bench::{Bench, Placed, Sheet};
use epsmoe_base::DType;
use epsmoe_device::op::*;
use epsmoe_device::{Backend, Buffer};
use std::ops::Range;

/// A new piece of a sequence: the tokens before it, its tokens, the slots that its state is read from and left in, and maybe
/// another that it is left in behind so many of the tokens.
#[derive(Clone, Copy, Debug)]
struct Piece {
    before: usize,
    new: usize,
    from: usize,
    to: usize,
    kept: Option<(usize, usize)>,
}

impl Piece {
    /// Slots that states are left in, and how many of the new tokens each has seen.
    fn left(&self) -> impl Iterator<Item = (usize, usize)> {
        self.kept.into_iter().chain([(self.to, self.new)])
    }
}

/// Pieces of sequences that begin, go on, and have nothing new; every other one leaves its state in another slot, and most
/// leave a state behind some of their tokens.
fn pieces<B: Backend>(bench: &Bench<B>) -> Vec<Piece> {
    let lengths = [(0, 5), (7, 3), (1, 1), (4, 0), (0, 1), (2, 40)];
    let slots = bench.shuffled(SLOTS);
    let piece = |(at, &(before, new)): (usize, &(usize, usize))| {
        let [from, other, third] = [0, 1, 2].map(|which| slots[3 * at + which] as usize);
        let kept = (new > 0 && at != 2).then(|| (third, 1 + bench.below(new)));
        Piece { before, new, from, to: if at % 2 == 0 { from } else { other }, kept }
    };
    lengths.iter().enumerate().map(piece).collect()
}

const SLOTS: usize = 18;

/// The tokens of each piece in a batch.
fn spans(pieces: &[Piece]) -> Vec<Range<usize>> {
    let mut end = 0;
    let next = |piece: &Piece| {
        end += piece.new;
        end - piece.new..end
    };
    pieces.iter().map(next).collect()
}

fn carried<B: Backend>(bench: &Bench<B>, pieces: &[Piece]) -> Carried {
    let starts = spans(pieces).iter().map(|span| span.start as u32).collect::<Vec<_>>();
    let total: usize = pieces.iter().map(|piece| piece.new).sum();
    let positions = pieces.iter().flat_map(|piece| piece.before..piece.before + piece.new);
    let slots = pieces.iter().flat_map(|piece| {
        let (kept, after) = piece.kept.unwrap_or((0, 0));
        [piece.from, piece.to, kept, after].map(|word| word as u32)
    });
    Carried {
        sequence_starts: bench.put_words(&[starts, vec![total as u32]].concat(), 1).view,
        positions: bench.put_words(&positions.map(|position| position as u32).collect::<Vec<_>>(), 1).view,
        slots: bench.put_words(&slots.collect::<Vec<_>>(), 4).view,
    }
}

pub(crate) fn definitions<B: Backend>(bench: &Bench<B>) {
    for (taps, width) in [(2, 1), (4, 9), (3, 70), (4, 264)] {
        convolutions(bench, taps, width);
    }
    for shape in [
        Shape { key_heads: 1, value_heads: 1, key_width: 1, value_width: 1 },
        Shape { key_heads: 2, value_heads: 4, key_width: 12, value_width: 8 },
        Shape { key_heads: 1, value_heads: 3, key_width: 5, value_width: 37 },
        Shape { key_heads: 2, value_heads: 2, key_width: 128, value_width: 128 },
        Shape { key_heads: 1, value_heads: 1, key_width: 200, value_width: 64 },
    ] {
        recurrences(bench, shape, None);
        recurrences(bench, shape, Some(0.3));
    }
    for (rows, width) in [(0, 4), (1, 1), (7, 33), (20, 256)] {
        gates(bench, rows, width);
    }
}

fn silu(x: f64) -> f64 {
    x / (1.0 + (-x).exp())
}

fn convolutions<B: Backend>(bench: &Bench<B>, taps: usize, width: usize) {
    let what = format!("convolution over {taps} tokens, {width} columns");
    let (pieces, kept) = (pieces(bench), taps - 1);
    let total = pieces.iter().map(|piece| piece.new).sum();
    let (x, weight) = (bench.random(total, width, 1.0), bench.random_of(DType::F32, width, taps, 1.0));
    let bias = taps.is_multiple_of(2).then(|| bench.random_of(DType::F32, 1, width, 1.0));
    let states = bench.random(SLOTS * kept, width, 1.0);
    let format = [bench.dtype, DType::F32][width % 2];
    let (held, out) = (bench.put(&states), bench.room(format, total, width));
    let flat = Sheet { rows: 1, width: width * taps, values: weight.values.clone() };
    bench.run(
        &what,
        ShortConv {
            x: bench.put(&x).view,
            weight: bench.vector(&flat),
            bias: bias.as_ref().map(|bias| bench.vector(bias)),
            carried: carried(bench, &pieces),
            states: held.view.clone(),
            out: out.view.clone(),
        },
    );
    let (mut want, mut after) = (Vec::new(), states.clone());
    for (piece, span) in pieces.iter().zip(spans(&pieces)) {
        // All of the sequence that matters: zeros, what was kept, what is new.
        let begun = piece.before.min(kept);
        let mut rows = vec![vec![0.0; width]; kept - begun];
        rows.extend((kept - begun..kept).map(|at| states.row(piece.from * kept + at).to_vec()));
        rows.extend(span.map(|t| x.row(t).to_vec()));
        for window in rows.windows(taps) {
            want.extend((0..width).map(|c| {
                let term = |k: usize| f64::from(weight.row(c)[k]) * f64::from(window[k][c]);
                let bias = bias.as_ref().map_or(0.0, |bias| f64::from(bias.values[c]));
                silu(bias + (0..taps).map(term).sum::<f64>())
            }));
        }
        if piece.new > 0 {
            for (slot, seen) in piece.left() {
                for (at, row) in rows[seen..][..kept].iter().enumerate() {
                    after.values[(slot * kept + at) * width..][..width].copy_from_slice(row);
                }
            }
        }
    }
    bench.check(&what, &out, &want);
    bench.check_exactly(&format!("states of {what}"), &held, &after.values);
}

#[derive(Clone, Copy, Debug)]
struct Shape {
    key_heads: usize,
    value_heads: usize,
    key_width: usize,
    value_width: usize,
}

impl Shape {
    fn values(&self) -> usize {
        self.value_heads * self.value_width
    }

    fn width(&self) -> usize {
        2 * self.key_heads * self.key_width + self.values()
    }

    fn state(&self) -> usize {
        self.key_width * self.value_width
    }
}

/// The numbers of a [`Recurrence`].
struct Numbers {
    x: Sheet,
    gates: Sheet,
    decay: Sheet,
    bias: Sheet,
    /// Factors on the values, and the least step, of a state space.
    space: Option<(Sheet, f32)>,
}

impl Numbers {
    fn random<B: Backend>(bench: &Bench<B>, shape: &Shape, tokens: usize, floor: Option<f32>) -> Self {
        let heads = shape.value_heads;
        let gates = if floor.is_some() { heads } else { 2 * heads };
        Numbers {
            x: bench.random(tokens, shape.width(), 1.0),
            gates: bench.random_of(DType::F32, tokens, gates, 4.0),
            decay: bench.random_of(DType::F32, 1, heads, 2.0),
            bias: bench.random_of(DType::F32, 1, heads, 1.0),
            space: floor.map(|floor| (bench.random_of(DType::F32, 1, heads, 1.0), floor)),
        }
    }

    /// Runs the operation on some of the tokens, which are those of `pieces`.
    fn run<B: Backend>(
        &self,
        (bench, what): (&Bench<B>, &str),
        shape: &Shape,
        tokens: &[usize],
        pieces: &[Piece],
        states: &Buffer,
    ) -> Placed {
        let some = |sheet: &Sheet| {
            let values = tokens.iter().flat_map(|&t| sheet.row(t).to_vec()).collect();
            Sheet { rows: tokens.len(), width: sheet.width, values }
        };
        let out = bench.room(DType::F32, tokens.len(), shape.values());
        let rule = match &self.space {
            None => Rule::Delta,
            Some((skip, floor)) => Rule::StateSpace { skip: bench.vector(skip), floor: *floor },
        };
        let op = Recurrence {
            rule,
            x: bench.put(&some(&self.x)).view,
            gates: bench.put_as(DType::F32, &some(&self.gates)).view,
            decay: bench.vector(&self.decay),
            bias: bench.vector(&self.bias),
            key_heads: shape.key_heads,
            key_width: shape.key_width,
            carried: carried(bench, pieces),
            states: states.clone(),
            out: out.view.clone(),
        };
        bench.run(what, op);
        out
    }

    /// One token of one head by the definition; returns the output.
    fn token(&self, shape: &Shape, t: usize, head: usize, state: &mut [f64]) -> Vec<f64> {
        let (width, columns) = (shape.key_width, shape.value_width);
        let of = |start: usize, length: usize| -> Vec<f64> {
            self.x.row(t)[start..start + length].iter().map(|&x| f64::from(x)).collect()
        };
        let key_head = head / (shape.value_heads / shape.key_heads);
        let unit = |x: Vec<f64>, divisor: f64| -> Vec<f64> {
            let root = (x.iter().map(|x| x * x).sum::<f64>() + f64::from(Recurrence::EPSILON)).sqrt();
            x.iter().map(|x| x / root / divisor).collect()
        };
        let (query, key) = (of(key_head * width, width), of((shape.key_heads + key_head) * width, width));
        let value = of(2 * shape.key_heads * width + head * columns, columns);
        let step = |a: f32| (f64::from(a) + f64::from(self.bias.values[head])).exp().ln_1p();
        let decayed = |step: f64| (-f64::from(self.decay.values[head]).exp() * step).exp();
        let gates = self.gates.row(t);
        if let Some((skip, floor)) = &self.space {
            let step = step(gates[head]).max(f64::from(*floor));
            for (row, key) in key.iter().enumerate() {
                for (column, value) in value.iter().enumerate() {
                    let at = &mut state[row * columns + column];
                    *at = *at * decayed(step) + key * step * value;
                }
            }
            let seen = |column: usize| -> f64 {
                (0..width).map(|row| query[row] * state[row * columns + column]).sum()
            };
            let skip = f64::from(skip.values[head]);
            return (0..columns).map(|column| seen(column) + skip * value[column]).collect();
        }
        let (query, key) = (unit(query, (width as f64).sqrt()), unit(key, 1.0));
        let decay = decayed(step(gates[shape.value_heads + head]));
        let beta = 1.0 / (1.0 + (-f64::from(gates[head])).exp());
        state.iter_mut().for_each(|x| *x *= decay);
        let looked = |state: &[f64], by: &[f64], column: usize| -> f64 {
            (0..width).map(|row| by[row] * state[row * columns + column]).sum()
        };
        for column in 0..columns {
            let delta = beta * (value[column] - looked(state, &key, column));
            (0..width).for_each(|row| state[row * columns + column] += key[row] * delta);
        }
        (0..columns).map(|column| looked(state, &query, column)).collect()
    }
}

fn recurrences<B: Backend>(bench: &Bench<B>, shape: Shape, floor: Option<f32>) {
    let rule = if floor.is_some() { "state space" } else { "delta rule" };
    let what = format!("{rule} of {shape:?}");
    let (pieces, heads) = (pieces(bench), shape.value_heads);
    let total = pieces.iter().map(|piece| piece.new).sum();
    let numbers = Numbers::random(bench, &shape, total, floor);
    let states = bench.random_of(DType::F32, SLOTS * heads, shape.state(), 1.0);
    let held = bench.put_as(DType::F32, &states);
    let tokens: Vec<usize> = (0..total).collect();
    let out = numbers.run((bench, &what), &shape, &tokens, &pieces, &held.view);
    let mut want = vec![0.0; total * shape.values()];
    let mut after: Vec<f64> = states.values.iter().map(|&x| f64::from(x)).collect();
    for (piece, span) in pieces.iter().zip(spans(&pieces)).filter(|(piece, _)| piece.new > 0) {
        for head in 0..heads {
            let mut state: Vec<f64> =
                states.row(piece.from * heads + head).iter().map(|&x| f64::from(x)).collect();
            if piece.before == 0 {
                state.fill(0.0);
            }
            for t in span.clone() {
                let row = numbers.token(&shape, t, head, &mut state);
                want[t * shape.values() + head * shape.value_width..][..shape.value_width]
                    .copy_from_slice(&row);
                for (slot, _) in piece.left().filter(|(_, seen)| span.start + seen == t + 1) {
                    after[(slot * heads + head) * shape.state()..][..shape.state()].copy_from_slice(&state);
                }
            }
        }
    }
    bench.check(&what, &out, &want);
    bench.check(&format!("states of {what}"), &held, &after);
}

fn gates<B: Backend>(bench: &Bench<B>, rows: usize, width: usize) {
    for gating in [Gating::Sigmoid, Gating::Silu] {
        let what = format!("{gating:?} gate [{rows}, {width}]");
        let (gate, x) = (bench.random(rows, width, 4.0), bench.random(rows, width, 3.0));
        let format = [bench.dtype, DType::F32][width % 2];
        let (input, out) = (bench.put_as(format, &x).view, bench.room(bench.dtype, rows, width));
        bench.run(&what, Gate { gate: bench.put(&gate).view, gating, x: input, out: out.view.clone() });
        let value = |(&gate, &x): (&f32, &f32)| {
            let (gate, x) = (f64::from(gate), f64::from(x));
            x * if gating == Gating::Silu { silu(gate) } else { silu(gate) / gate }
        };
        let want: Vec<f64> = gate.values.iter().zip(&x.values).map(value).collect();
        bench.check(&what, &out, &want);
    }
}

/// Sequences cut anywhere, beside each other or alone, their states in whatever slots, have the bits that they have whole.
pub(crate) fn invariance<B: Backend>(bench: &Bench<B>) {
    [None, Some(0.3)].into_iter().for_each(|floor| cut_anywhere(bench, floor));
}

fn cut_anywhere<B: Backend>(bench: &Bench<B>, floor: Option<f32>) {
    // Of all sequences together so many columns that a GPU gives each lane more than of one alone.
    let shape = Shape { key_heads: 2, value_heads: 48, key_width: 24, value_width: 70 };
    let lengths = [45, 7, 70];
    let starts: Vec<usize> =
        lengths.iter().scan(0, |end, length| Some(std::mem::replace(end, *end + length))).collect();
    let numbers = Numbers::random(bench, &shape, lengths.iter().sum(), floor);
    let weight = bench.vector(&bench.random_of(DType::F32, 1, 4 * shape.width(), 1.0));
    // Both operations, on the next tokens of some sequences at a time: rows by token.
    let run = |batches: &[Vec<(usize, usize)>]| -> Vec<Vec<u32>> {
        let heads = shape.value_heads;
        let states = bench.room(DType::F32, SLOTS * heads, shape.state());
        let kept = bench.room(bench.dtype, SLOTS * 3, shape.width());
        let (mut done, mut slot) = ([0; 3], [0, 1, 2]);
        let mut rows = vec![Vec::new(); numbers.x.rows];
        let mut compute = |of: &[(usize, Piece)]| {
            let tokens: Vec<usize> = of
                .iter()
                .flat_map(|&(sequence, Piece { before, new, .. })| {
                    starts[sequence] + before..starts[sequence] + before + new
                })
                .collect();
            let pieces: Vec<Piece> = of.iter().map(|(_, piece)| *piece).collect();
            let out = numbers.run((bench, "delta rule"), &shape, &tokens, &pieces, &states.view);
            let values = tokens.iter().flat_map(|&t| numbers.x.row(t).to_vec()).collect();
            let x = bench.put(&Sheet { rows: tokens.len(), width: shape.width(), values }).view;
            let convolved = bench.room(bench.dtype, tokens.len(), shape.width());
            let (states, carried) = (kept.view.clone(), carried(bench, &pieces));
            let out_view = convolved.view.clone();
            let weight = weight.clone();
            bench.run("convolution", ShortConv { x, weight, bias: None, carried, states, out: out_view });
            let (seen, convolved) = (bench.get("delta rule", &out), bench.get("convolution", &convolved));
            for (at, &t) in tokens.iter().enumerate() {
                let seen = &seen[at * shape.values()..][..shape.values()];
                let convolved = &convolved[at * shape.width()..][..shape.width()];
                rows[t] = seen.iter().chain(convolved).map(|x| x.to_bits()).collect();
            }
        };
        for batch in batches {
            let mut pieces = Vec::new();
            for &(sequence, new) in batch {
                let (before, from) = (done[sequence], slot[sequence]);
                let to = (from + 3 * bench.below(2)) % 6;
                let kept = (bench.below(2) > 0).then(|| (6 + sequence, 1 + bench.below(new)));
                pieces.push((sequence, Piece { before, new, from, to, kept }));
                (done[sequence], slot[sequence]) = (before + new, to);
            }
            compute(&pieces);
            // What follows a state that was left in the middle is computed again from there.
            let rest = pieces.iter().filter_map(|&(sequence, piece)| {
                let (from, after) = piece.kept.filter(|&(_, after)| after < piece.new)?;
                let (before, new) = (piece.before + after, piece.new - after);
                Some((sequence, Piece { before, new, from, to: piece.to, kept: None }))
            });
            let rest: Vec<_> = rest.collect();
            if !rest.is_empty() {
                compute(&rest);
            }
        }
        rows
    };
    let whole: Vec<(usize, usize)> = lengths.into_iter().enumerate().collect();
    let want = run(&[whole]);
    let alone: Vec<_> = (0..3).map(|sequence| vec![(sequence, lengths[sequence])]).collect();
    assert!(run(&alone) == want, "{}, seed {}: alone", bench.dtype, bench.seed);
    for most in [1, 3, 20] {
        let (mut left, mut batches) = (lengths, Vec::new());
        while left != [0; 3] {
            let mut batch = Vec::new();
            for (sequence, left) in left.iter_mut().enumerate().filter(|(_, left)| **left > 0) {
                let new = (1 + bench.below(most)).min(*left);
                *left -= new;
                batch.push((sequence, new));
            }
            batches.push(batch);
        }
        assert!(run(&batches) == want, "{}, seed {}: in pieces of up to {most}", bench.dtype, bench.seed);
    }
}

/// A slot that is none, and spans that do not follow each other.
pub(crate) fn refusals<B: Backend>(fresh: &impl Fn() -> Bench<B>) {
    let refused = |starts: [u32; 3], slots: [u32; 8], delta: bool| -> String {
        let bench = fresh();
        let of = |rows: usize, width: usize| {
            bench.put_as(DType::F32, &bench.random_of(DType::F32, rows, width, 1.0)).view
        };
        let carried = Carried {
            sequence_starts: bench.put_words(&starts, 1).view,
            positions: bench.put_words(&[0, 1, 0], 1).view,
            slots: bench.put_words(&slots, 4).view,
        };
        let vector = |n: usize| bench.vector(&bench.random_of(DType::F32, 1, n, 1.0));
        let op: Op = match delta {
            true => Recurrence {
                rule: Rule::Delta,
                x: of(3, 6),
                gates: of(3, 2),
                decay: vector(1),
                bias: vector(1),
                key_heads: 1,
                key_width: 2,
                carried,
                states: of(4, 4),
                out: of(3, 2),
            }
            .into(),
            false => {
                let (x, weight, states, out) = (of(3, 6), vector(12), of(4, 6), of(3, 6));
                ShortConv { x, weight, bias: None, carried, states, out }.into()
            }
        };
        let fault = bench.try_run(op).expect("its shapes fit").expect_err("it is wrong");
        fault.message
    };
    for (delta, name) in [(true, "recurrence"), (false, "short_conv")] {
        let said = refused([0, 2, 3], [0, 0, 0, 0, 1, 4, 0, 0], delta);
        assert_eq!(said, format!("{name}: slot 4 is not below 4"));
        let said = refused([0, 2, 3], [0, 0, 5, 1, 1, 1, 0, 0], delta);
        assert_eq!(said, format!("{name}: slot 5 is not below 4"));
        for (starts, slots) in [([0, 4, 3], [0, 0, 0, 0, 1, 1, 0, 0]), ([0, 2, 3], [0, 0, 2, 3, 1, 1, 0, 0])]
        {
            let said = refused(starts, slots, delta);
            assert!(said.starts_with(&format!("{name}: sequence ")), "{said}");
        }
    }
}
