//! The operations that carry a state from token to token: plain loops over the tokens of each sequence.

use super::Kernels;
use super::element::Element;
use super::rows::{Rows, in_range};
use crate::op::{Carried, Gate, Gating, Recurrence, Rule, ShortConv};
use std::ops::Range;

/// One token as a value head of [`Recurrence`] sees it.
pub struct RecurrentToken<'a> {
    /// `q̂`, or the query as it is.
    pub query: &'a [f32],
    /// `k̂`, or the key as it is.
    pub key: &'a [f32],
    /// `v`.
    pub value: &'a [f32],
    /// Factor on the state.
    pub decay: f32,
    /// Factor on what is added: `sigmoid(b)`, or `s`.
    pub beta: f32,
    /// Whether what the state holds under the key is taken off the value.
    pub corrects: bool,
    /// Factor on the value that is added to the output.
    pub skip: f32,
}

/// The new tokens of a sequence, and its slots.
struct Piece {
    tokens: Range<usize>,
    /// Position of the first of them.
    position: usize,
    from: usize,
    to: usize,
    /// Where its state is left as well, behind which of the tokens.
    kept: Option<Kept>,
}

/// A state in the middle of a piece.
#[derive(Clone, Copy)]
struct Kept {
    slot: usize,
    /// The token behind it.
    end: usize,
}

impl Piece {
    /// The slots that are written.
    fn written(&self) -> impl Iterator<Item = usize> {
        [Some(self.to), self.kept.map(|kept| kept.slot)].into_iter().flatten()
    }

    /// Whether it writes what the other reads or writes.
    fn disturbs(&self, other: &Piece) -> bool {
        self.written().any(|slot| slot == other.from || other.written().any(|theirs| theirs == slot))
    }

    /// Slots of states, and the token behind which each lies in its.
    fn ends(&self) -> impl Iterator<Item = Kept> {
        self.kept.into_iter().chain([Kept { slot: self.to, end: self.tokens.end }])
    }

    /// Where the input of token `t` lies that came `back` tokens before it.
    fn input(&self, t: usize, back: usize) -> Input {
        let within = t - self.tokens.start;
        match back.checked_sub(within) {
            None | Some(0) => Input::New(t - back),
            Some(before) if before <= self.position => Input::Kept(before),
            Some(_) => Input::Zero,
        }
    }
}

/// Where a row is.
enum Input {
    /// A new token.
    New(usize),
    /// In the state, so many rows before its end.
    Kept(usize),
    /// Before the sequence.
    Zero,
}

impl<K: Kernels> Rows<'_, K> {
    /// The sequences that have new tokens, once their spans and slots are known to be inside, and their slots their own.
    fn pieces(&self, carried: &Carried, slots: usize) -> Result<Vec<Piece>, String> {
        let starts: Vec<u32> = self.view::<u32>(&carried.sequence_starts).iter().map(|row| row[0]).collect();
        let (positions, places) = (self.view::<u32>(&carried.positions), self.view::<u32>(&carried.slots));
        let mut pieces: Vec<Piece> = Vec::new();
        let mut end = 0;
        for (b, range) in starts.windows(2).enumerate() {
            let tokens = range[0] as usize..range[1] as usize;
            if tokens.start != end || tokens.end < tokens.start || tokens.end > positions.rows {
                return Err(format!("sequence {b} spans tokens {}..{}", range[0], range[1]));
            }
            end = tokens.end;
            if tokens.is_empty() {
                continue;
            }
            let slot = |which: usize| in_range("slot", places.row(b)[which], slots);
            let (position, from, to) = (positions.at(tokens.start) as usize, slot(0)?, slot(1)?);
            let kept = match places.row(b)[3] as usize {
                0 => None,
                after if after <= tokens.len() => Some(Kept { slot: slot(2)?, end: tokens.start + after }),
                after => {
                    return Err(format!(
                        "sequence {b} leaves a state behind {after} of {} tokens",
                        tokens.len()
                    ));
                }
            };
            let piece = Piece { tokens, position, from, to, kept };
            let twice = kept.is_some_and(|kept| kept.slot == from || kept.slot == to);
            if twice || pieces.iter().any(|other| piece.disturbs(other) || other.disturbs(&piece)) {
                let all: Vec<usize> = std::iter::once(from).chain(piece.written()).collect();
                return Err(format!("of the slots {all:?} of sequence {b} one is taken twice"));
            }
            pieces.push(piece);
        }
        if end != positions.rows {
            return Err(format!("sequences hold {end} of {} tokens", positions.rows));
        }
        Ok(pieces)
    }

    pub(super) fn short_conv<T: Element, Y: Element>(&self, op: &ShortConv) -> Result<(), String> {
        let (taps, kept) = (op.taps(), op.taps() - 1);
        let pieces = self.pieces(&op.carried, op.states.rows / kept)?;
        let weight = self.weights.vector(&op.weight)?;
        let bias = op.bias.as_ref().map(|bias| self.weights.vector(bias)).transpose()?;
        let (x, out, before) =
            (self.view::<T>(&op.x), self.view_mut::<Y>(&op.out), self.view::<T>(&op.states));
        let row = |piece: &Piece, t: usize, back: usize| match piece.input(t, back) {
            Input::New(token) => Some(x.row(token)),
            Input::Kept(before_end) => Some(before.row((piece.from + 1) * kept - before_end)),
            Input::Zero => None,
        };
        self.for_rows_from(&out, taps * out.width * size_of::<T>(), |t, out| {
            let piece = &pieces[pieces.partition_point(|piece| piece.tokens.end <= t)];
            let inputs: Vec<Option<&[T]>> = (0..taps).map(|tap| row(piece, t, kept - tap)).collect();
            for (c, (out, weights)) in out.iter_mut().zip(weight.chunks_exact(taps)).enumerate() {
                let mut sum = bias.as_ref().map_or(0.0, |bias| bias[c]);
                for (input, weight) in inputs.iter().zip(weights) {
                    sum += weight * input.map_or(0.0, |input| input[c].to_f32());
                }
                *out = Y::from_f32(silu(sum));
            }
        });
        let mut states = self.view_mut::<T>(&op.states);
        for piece in &pieces {
            // What a sequence reads is overwritten last.
            for Kept { slot, end } in piece.ends() {
                let of = |at: usize| row(piece, end - 1, kept - 1 - at);
                let zeros = || vec![T::from_f32(0.0); x.width];
                let rows: Vec<Vec<T>> =
                    (0..kept).map(|at| of(at).map_or_else(zeros, <[T]>::to_vec)).collect();
                for (at, row) in rows.iter().enumerate() {
                    states.row(slot * kept + at).copy_from_slice(row);
                }
            }
        }
        Ok(())
    }

    pub(super) fn recurrence<T: Element>(&self, op: &Recurrence) -> Result<(), String> {
        let heads = op.value_heads();
        let pieces = self.pieces(&op.carried, op.states.rows / heads)?;
        let (decay, bias) = (self.weights.vector(&op.decay)?, self.weights.vector(&op.bias)?);
        let (skip, floor) = match &op.rule {
            Rule::Delta => (None, None),
            Rule::StateSpace { skip, floor } => (Some(self.weights.vector(skip)?), Some(*floor)),
        };
        let (x, gates) = (self.view::<T>(&op.x), self.view::<f32>(&op.gates));
        let (before, states, out) =
            (self.view::<f32>(&op.states), self.view_mut::<f32>(&op.states), self.view_mut::<f32>(&op.out));
        let (width, columns) = (op.key_width, op.value_width());
        self.kernels.parallel(pieces.len() * heads, &|task| {
            let (piece, head) = (&pieces[task / heads], task % heads);
            // SAFETY: no two pieces have a slot in common, and each head of a piece is one task.
            let state = unsafe { states.row_shared(piece.to * heads + head) };
            match piece.position {
                0 => state.fill(0.0),
                _ if piece.from != piece.to => state.copy_from_slice(before.row(piece.from * heads + head)),
                _ => {}
            }
            let (mut query, mut key, mut value) = (vec![0.0; width], vec![0.0; width], vec![0.0; columns]);
            let key_head = head / (heads / op.key_heads);
            for t in piece.tokens.clone() {
                let (queries, rest) = x.row(t).split_at(op.key_heads * width);
                let (keys, values) = rest.split_at(op.key_heads * width);
                let (queries, keys) =
                    (&queries[key_head * width..][..width], &keys[key_head * width..][..width]);
                widened(&values[head * columns..], &mut value);
                let step = |a: f32| softplus(a + bias[head]);
                let (step, beta) = match floor {
                    None => {
                        normed(queries, (width as f32).sqrt(), &mut query);
                        normed(keys, 1.0, &mut key);
                        (step(gates.row(t)[heads + head]), sigmoid(gates.row(t)[head]))
                    }
                    Some(floor) => {
                        widened(queries, &mut query);
                        widened(keys, &mut key);
                        let step = step(gates.row(t)[head]).max(floor);
                        (step, step)
                    }
                };
                let token = RecurrentToken {
                    query: &query,
                    key: &key,
                    value: &value,
                    decay: (-decay[head].exp() * step).exp(),
                    beta,
                    corrects: floor.is_none(),
                    skip: skip.as_ref().map_or(0.0, |skip| skip[head]),
                };
                // SAFETY: each head of a token belongs to one task, which takes one view of it at a time.
                let out = unsafe { out.columns_shared(t, head * columns..(head + 1) * columns) };
                self.kernels.recurrence(state, &token, out);
                if let Some(kept) = piece.kept.filter(|kept| kept.end == t + 1) {
                    // SAFETY: as above, and it is another slot than those of this piece's own state.
                    unsafe { states.row_shared(kept.slot * heads + head) }.copy_from_slice(state);
                }
            }
        });
        Ok(())
    }

    pub(super) fn gate<X: Element, Y: Element>(&self, op: &Gate) -> Result<(), String> {
        let (gate, x, out) = (self.view::<Y>(&op.gate), self.view::<X>(&op.x), self.view_mut::<Y>(&op.out));
        self.for_rows(&out, |m, out| {
            for ((out, x), gate) in out.iter_mut().zip(x.row(m)).zip(gate.row(m)) {
                let gate = gate.to_f32();
                let factor = match op.gating {
                    Gating::Sigmoid => sigmoid(gate),
                    Gating::Silu => silu(gate),
                };
                *out = Y::from_f32(x.to_f32() * factor);
            }
        });
        Ok(())
    }
}

/// As many numbers as there is room for.
fn widened<T: Element>(x: &[T], out: &mut [f32]) {
    out.iter_mut().zip(x).for_each(|(out, x)| *out = x.to_f32());
}

/// `x / (√(|x|² + ε) · divisor)`.
fn normed<T: Element>(x: &[T], divisor: f32, out: &mut [f32]) {
    let squares: f32 = x.iter().map(|x| x.to_f32() * x.to_f32()).sum();
    let factor = 1.0 / ((squares + Recurrence::EPSILON).sqrt() * divisor);
    out.iter_mut().zip(x).for_each(|(out, x)| *out = x.to_f32() * factor);
}

fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + (-x).exp())
}

fn silu(x: f32) -> f32 {
    x / (1.0 + (-x).exp())
}

/// `ln(1 + eˣ)`, which is x to all digits where x is large.
fn softplus(x: f32) -> f32 {
    if x > 20.0 { x } else { x.exp().ln_1p() }
}
