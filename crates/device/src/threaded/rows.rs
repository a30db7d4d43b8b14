//! The operations that are the same plain loops on every host processor, row by row.

use super::element::{Cached, E4m3, Element, Plain};
use super::{Kernels, Memory, View, ViewMut, WeightStore, even_part};
use crate::op::{
    Activate, Activation, Add, AddSlotBias, ArgMax, Attention, Clamp, Copy, Embed, Fp8, GateRows, Gather,
    GatherFp8, GroupLimit, GroupScore, HostToDevice, KvRows, NONE, Norm, NormKind, Origin, Reduce, RopeStyle,
    RopeTable, Rotate, Route, Scale, ScaleTerms, Score, SlotBias, SoftCap, TopKRouter, not_finite,
};
use crate::{Buffer, Weight};
use epsmoe_base::float8::{RowScales, SCALE_GROUP, decode_row, encode_row, scaled_words, to_e4m3};
use half::bf16;
use std::cmp::Ordering;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering as AtomicOrdering};

/// Bytes of a task: few enough that it is short, enough that claiming it costs nothing beside it.
const BLOCK: usize = 32 << 10;

/// What an operation needs to run.
pub(super) struct Rows<'a, K: Kernels> {
    pub(super) kernels: &'a K,
    pub(super) weights: &'a WeightStore<K::Matrix>,
    pub(super) memory: &'a Memory,
}

/// An [`Attention`] with its numbers at hand; every index in it was checked.
pub struct AttentionViews<'a, T, C = T> {
    /// The operation.
    pub op: &'a Attention,
    /// Queries.
    pub q: View<'a, T>,
    /// Key cache.
    pub keys: View<'a, C>,
    /// Value cache.
    pub values: View<'a, C>,
    /// Sequence of each new token.
    pub sequences: Vec<u32>,
    /// Position of each new token.
    pub positions: Vec<u32>,
    /// Cache blocks of each sequence.
    pub blocks: View<'a, u32>,
    /// The score of each head that belongs to no key.
    pub sinks: Option<Arc<[f32]>>,
    /// Output.
    pub out: ViewMut<'a, T>,
}

impl<T: Plain, C: Plain> AttentionViews<'_, T, C> {
    /// The cached positions that new token `t` sees.
    pub fn visible(&self, t: usize) -> std::ops::Range<usize> {
        let position = self.positions[t] as usize;
        self.op.sight.first(position)..position + 1
    }

    /// The cache slot of a position of a sequence.
    pub fn slot(&self, sequence: usize, position: usize) -> usize {
        let size = self.op.block_size;
        self.blocks.row(sequence)[position / size] as usize * size + position % size
    }
}

// Every view below is of a buffer that the operation declares in its `accesses`, and the hazard check passed
// before the work was enqueued: that is the contract of `Memory::view` and `Memory::view_mut`.
impl<'a, K: Kernels> Rows<'a, K> {
    pub(super) fn view<T: Plain>(&self, buffer: &Buffer) -> View<'a, T> {
        // SAFETY: declared and checked, as said above; the view ends with the operation.
        unsafe { self.memory.view(buffer) }
    }

    pub(super) fn view_mut<T: Plain>(&self, buffer: &Buffer) -> ViewMut<'a, T> {
        // SAFETY: declared and checked, as said above; each operation takes one view of what it writes.
        unsafe { self.memory.view_mut(buffer) }
    }

    /// Calls `each(m, row m)` for every row of `out`, rows shared among the lane's threads.
    pub(super) fn for_rows<T: Plain>(&self, out: &ViewMut<'_, T>, each: impl Fn(usize, &mut [T]) + Sync) {
        self.for_rows_from(out, out.width * size_of::<T>(), each);
    }

    /// The same where a row is made from `bytes` that say better than its own how long it takes.
    pub(super) fn for_rows_from<T: Plain>(
        &self,
        out: &ViewMut<'_, T>,
        bytes: usize,
        each: impl Fn(usize, &mut [T]) + Sync,
    ) {
        let rows = (BLOCK / bytes.max(1)).max(1);
        self.kernels.parallel(out.rows.div_ceil(rows), &|block| {
            for m in block * rows..((block + 1) * rows).min(out.rows) {
                // SAFETY: each row belongs to one block, and each block is run once.
                each(m, unsafe { out.row_shared(m) });
            }
        });
    }

    pub(super) fn host_to_device(&self, op: &HostToDevice) -> Result<(), String> {
        let write = |mut out: ViewMut<'_, u32>| {
            for (m, words) in op.words.chunks_exact(out.width.max(1)).enumerate() {
                out.row(m).copy_from_slice(words);
            }
        };
        if op.out.dtype == u32::DTYPE {
            write(self.view_mut(&op.out));
        } else {
            let mut out = self.view_mut::<f32>(&op.out);
            for (m, words) in op.words.chunks_exact(out.width.max(1)).enumerate() {
                out.row(m).iter_mut().zip(words).for_each(|(out, &word)| *out = f32::from_bits(word));
            }
        }
        Ok(())
    }

    pub(super) fn embed<T: Element>(&self, op: &Embed) -> Result<(), String> {
        let table = self.weights.table(&op.table)?;
        let vocabulary = op.table.shape.sources().1[0];
        let (ids, out) = (self.view::<u32>(&op.ids), self.view_mut::<T>(&op.out));
        all_in_range("token id", &ids, vocabulary)?;
        self.for_rows(&out, |t, out| table.row(ids.at(t) as usize, out));
        Ok(())
    }

    pub(super) fn norm<X: Element, Y: Element>(&self, op: &Norm) -> Result<(), String> {
        let weight = self.weights.vector(&op.weight)?;
        let bias = op.bias.as_ref().map(|bias| self.weights.vector(bias)).transpose()?;
        let (x, out) = (self.view::<X>(&op.x), self.view_mut::<Y>(&op.out));
        let (refused, groups, width) = (FirstRow::default(), op.groups(), op.x.width);
        self.for_rows(&out, |m, out| {
            let x = x.row(m);
            let own = m % groups * width..(m % groups + 1) * width;
            let (weight, bias) = (&weight[own.clone()], bias.as_ref().map(|bias| &bias[own.clone()]));
            let mean = match op.kind {
                NormKind::Rms => 0.0,
                NormKind::Layer => sum(x, |value| value) / x.len() as f32,
            };
            let variance = sum(x, |value| (value - mean) * (value - mean)) / x.len() as f32;
            refused.note(m, !variance.is_finite());
            let factor = 1.0 / (variance + op.eps).sqrt();
            for (n, ((out, &x), &weight)) in out.iter_mut().zip(x).zip(weight).enumerate() {
                let normed = (x.to_f32() - mean) * factor * weight;
                *out = Y::from_f32(bias.map_or(normed, |bias| normed + bias[n]));
            }
        });
        refused.check(&op.x, op.origin)
    }

    pub(super) fn rope_table(&self, op: &RopeTable) -> Result<(), String> {
        let frequencies = self.weights.vector(&op.frequencies)?;
        let (positions, mut out) = (self.view::<u32>(&op.positions), self.view_mut::<f32>(&op.out));
        for t in 0..out.rows {
            let position = positions.at(t) as f32;
            let scale = op.growth.map_or(op.scale, |growth| op.scale * growth.at(position));
            let (cosines, sines) = out.row(t).split_at_mut(frequencies.len());
            for ((cos, sin), frequency) in cosines.iter_mut().zip(sines).zip(&*frequencies) {
                let angle = position * frequency;
                (*cos, *sin) = (angle.cos() * scale, angle.sin() * scale);
            }
        }
        Ok(())
    }

    pub(super) fn rotate<T: Element>(&self, op: &Rotate) -> Result<(), String> {
        let (x, rope_table) = (self.view_mut::<T>(&op.x), self.view::<f32>(&op.rope_table));
        let dims = op.rope_table.width;
        self.for_rows(&x, |t, row| {
            let (cosines, sines) = rope_table.row(t).split_at(dims / 2);
            for head in row.chunks_exact_mut(op.head_width) {
                let turned = &mut head[op.start..op.start + dims];
                for (i, (cos, sin)) in cosines.iter().zip(sines).enumerate() {
                    let (a, b) = match op.style {
                        RopeStyle::HalfSplit => (i, i + dims / 2),
                        RopeStyle::Interleaved => (2 * i, 2 * i + 1),
                    };
                    let (x, y) = (turned[a].to_f32(), turned[b].to_f32());
                    turned[a] = T::from_f32(x * cos - y * sin);
                    turned[b] = T::from_f32(y * cos + x * sin);
                }
            }
        });
        Ok(())
    }

    pub(super) fn kv_write<T: Element>(&self, op: &KvRows, slots: &Buffer) -> Result<(), String> {
        self.store_rows::<T, T>(op, slots, |_, x, stored| stored.copy_from_slice(x))
    }

    pub(super) fn kv_write_codes<T: Element>(&self, op: &KvRows, slots: &Buffer) -> Result<(), String> {
        let refused = FirstRow::default();
        self.store_rows::<T, E4m3>(op, slots, |t, x, stored| {
            refused.note(t, x.iter().any(|x| !x.to_f32().is_finite()));
            let codes = x.iter().map(|x| E4m3(to_e4m3(x.to_f32() / op.scale)));
            stored.iter_mut().zip(codes).for_each(|(stored, code)| *stored = code);
        })?;
        refused.check(&op.x, None)
    }

    /// Puts pieces of rows into their slots, each as `store` does.
    fn store_rows<T: Element, C: Cached<T>>(
        &self,
        op: &KvRows,
        slots: &Buffer,
        store: impl Fn(usize, &[T], &mut [C]) + Sync,
    ) -> Result<(), String> {
        let (x, slots, cache) =
            (self.view::<T>(&op.x), self.view::<u32>(slots), self.view_mut::<C>(&op.cache));
        all_in_range("cache slot", &slots, cache.rows)?;
        /// Bytes of a row that a thread stores at once, so that threads do not write to the same cache lines.
        const PIECE: usize = 256;
        // Threads share the columns, not the rows: no two write to one place, even if two tokens should name one slot.
        let row_bytes = x.width * size_of::<T>();
        let parts = (x.rows * row_bytes / BLOCK).min(row_bytes / PIECE).max(1);
        self.kernels.parallel(parts, &|part| {
            let columns = even_part(0..x.width, parts, part);
            for t in 0..x.rows {
                // SAFETY: each column belongs to one part, and each part is run once.
                let stored = unsafe { cache.columns_shared(slots.at(t) as usize, columns.clone()) };
                store(t, &x.row(t)[columns.clone()], stored);
            }
        });
        Ok(())
    }

    pub(super) fn attention<T: Element, C: Cached<T>>(&self, op: &Attention) -> Result<(), String> {
        let starts: Vec<u32> = self.view::<u32>(&op.sequence_starts).iter().map(|row| row[0]).collect();
        let positions: Vec<u32> = self.view::<u32>(&op.positions).iter().map(|row| row[0]).collect();
        let blocks = self.view::<u32>(&op.blocks);
        let sequences = check_sequences(op, &starts, &positions, &blocks)?;
        self.kernels.attention(AttentionViews {
            op,
            q: self.view::<T>(&op.q),
            keys: self.view::<C>(&op.keys),
            values: self.view(&op.values),
            sequences,
            positions,
            blocks,
            sinks: op.sinks.as_ref().map(|sinks| self.weights.vector(sinks)).transpose()?,
            out: self.view_mut(&op.out),
        });
        Ok(())
    }

    pub(super) fn route(&self, op: &Route) -> Result<(), String> {
        let logits = self.view::<f32>(&op.logits);
        let (experts, weights) = (self.view_mut::<u32>(&op.experts), self.view_mut::<f32>(&op.weights));
        let vector = |of: &Option<Weight>| of.as_ref().map(|of| self.weights.vector(of)).transpose();
        let (bias, scales) = (vector(&op.bias)?, vector(&op.scales)?);
        self.for_rows_from(&experts, logits.width * size_of::<f32>(), |t, experts| {
            // SAFETY: each row is asked for once.
            let weights = unsafe { weights.row_shared(t) };
            let vectors = [bias.as_deref(), scales.as_deref()];
            choose(&op.router, logits.row(t), vectors, experts, weights);
        });
        Ok(())
    }

    pub(super) fn argmax(&self, op: &ArgMax) -> Result<(), String> {
        let (logits, mut tokens) = (self.view::<f32>(&op.logits), self.view_mut::<u32>(&op.tokens));
        let refused = FirstRow::default();
        for m in 0..logits.rows {
            let row = logits.row(m);
            let ahead = |best: usize, (n, logit): (usize, &f32)| if *logit > row[best] { n } else { best };
            let best = row.iter().enumerate().fold(0, ahead);
            let nan = row.iter().fold(false, |nan, logit| nan | logit.is_nan());
            refused.note(m, nan || !row[best].is_finite());
            tokens.row(m)[0] = best as u32;
        }
        refused.check(&op.logits, None)
    }

    pub(super) fn gather<T: Element, C: Cached<T>>(&self, op: &Gather) -> Result<(), String> {
        let (x, index, out) =
            (self.view::<C>(&op.x), self.view::<u32>(&op.index), self.view_mut::<T>(&op.out));
        named_in_range("row", &index, x.rows)?;
        self.for_rows(&out, |m, out| {
            if let Some(source) = named(&index, m) {
                out.iter_mut().zip(x.row(source)).for_each(|(out, x)| *out = x.number());
            }
        });
        Ok(())
    }

    pub(super) fn gather_fp8<T: Element>(&self, op: &GatherFp8) -> Result<(), String> {
        let index = op.index.as_ref().map(|index| self.view::<u32>(index));
        if let Some(index) = &index {
            named_in_range("row", index, op.x.rows)?;
        }
        let source = |m: usize| index.as_ref().map_or(Some(m), |index| named(index, m));
        match op.how {
            Fp8::Encode => {
                let (x, out) = (self.view::<T>(&op.x), self.view_mut::<u32>(&op.out));
                self.for_rows_from(&out, x.width * size_of::<T>(), |m, out| {
                    if let Some(from) = source(m) {
                        encode(x.row(from), out);
                    }
                });
            }
            Fp8::Decode => {
                let (x, out) = (self.view::<u32>(&op.x), self.view_mut::<T>(&op.out));
                self.for_rows(&out, |m, out| {
                    if let Some(from) = source(m) {
                        decode_row(x.row(from), out, T::from_f32);
                    }
                });
            }
            Fp8::Through => {
                let (x, out) = (self.view::<T>(&op.x), self.view_mut::<T>(&op.out));
                self.for_rows(&out, |m, out| {
                    let Some(from) = source(m) else { return };
                    let x = x.row(from);
                    for (x, out) in x.chunks(SCALE_GROUP).zip(out.chunks_mut(SCALE_GROUP)) {
                        let mut words = [0; scaled_words(SCALE_GROUP)];
                        let words = &mut words[..scaled_words(x.len())];
                        encode(x, words);
                        decode_row(words, out, T::from_f32);
                    }
                });
            }
        }
        Ok(())
    }

    pub(super) fn reduce<X: Element, Y: Element>(&self, op: &Reduce) -> Result<(), String> {
        /// Columns that are summed at a time: the rows of a token's terms are read side by side, which memory serves faster
        /// than one after the other.
        const PIECE: usize = 128;
        let (x, out) = (self.view::<X>(&op.x), self.view_mut::<Y>(&op.out));
        let index = self.view::<u32>(&op.index);
        let weights = op.weights.as_ref().map(|weights| self.view::<f32>(weights));
        let addend = op.addend.as_ref().map(|addend| self.view::<X>(addend));
        let terms = |m: usize| index.row(m).iter().take_while(|&&row| row != NONE);
        (0..index.rows).flat_map(terms).try_for_each(|&row| in_range("row", row, x.rows).map(drop))?;
        self.for_rows(&out, |m, out| {
            for (piece, out) in out.chunks_mut(PIECE).enumerate() {
                let columns = piece * PIECE..piece * PIECE + out.len();
                let mut total = [0.0f32; PIECE];
                for (term, &row) in terms(m).enumerate() {
                    let weight = weights.map_or(1.0, |weights| weights.row(m)[term]);
                    let x = &x.row(row as usize)[columns.clone()];
                    total.iter_mut().zip(x).for_each(|(total, x)| *total += weight * x.to_f32());
                }
                if let Some(addend) = &addend {
                    let addend = &addend.row(m)[columns];
                    total.iter_mut().zip(addend).for_each(|(total, x)| *total += x.to_f32());
                }
                out.iter_mut().zip(total).for_each(|(out, total)| *out = Y::from_f32(total));
            }
        });
        Ok(())
    }

    pub(super) fn add<T: Element>(&self, op: &Add) -> Result<(), String> {
        let (x, out) = (self.view::<T>(&op.x), self.view_mut::<T>(&op.out));
        self.for_rows(&out, |m, out| {
            out.iter_mut().zip(x.row(m)).for_each(|(out, x)| *out = T::from_f32(out.to_f32() + x.to_f32()));
        });
        Ok(())
    }

    pub(super) fn copy<T: Element>(&self, op: &Copy) -> Result<(), String> {
        let (x, out) = (self.view::<T>(&op.x), self.view_mut::<T>(&op.out));
        self.for_rows(&out, |m, out| out.copy_from_slice(x.row(m)));
        Ok(())
    }

    pub(super) fn rounded_copy<X: Element, Y: Element>(&self, op: &Copy) -> Result<(), String> {
        let (x, out) = (self.view::<X>(&op.x), self.view_mut::<Y>(&op.out));
        self.for_rows(&out, |m, out| {
            out.iter_mut().zip(x.row(m)).for_each(|(out, x)| *out = Y::from_f32(x.to_f32()));
        });
        Ok(())
    }

    pub(super) fn clamp<T: Element>(&self, op: &Clamp) -> Result<(), String> {
        let x = self.view_mut::<T>(&op.x);
        self.for_rows(&x, |_, row| {
            row.iter_mut().for_each(|x| *x = T::from_f32(x.to_f32().clamp(-op.limit, op.limit)));
        });
        Ok(())
    }

    pub(super) fn scale<T: Element>(&self, op: &Scale) -> Result<(), String> {
        let x = self.view_mut::<T>(&op.x);
        self.for_rows(&x, |_, row| {
            row.iter_mut().for_each(|x| *x = T::from_f32(x.to_f32() * op.factor));
        });
        Ok(())
    }

    pub(super) fn scale_terms<T: Element>(&self, op: &ScaleTerms) -> Result<(), String> {
        let (x, index) = (self.view_mut::<T>(&op.x), self.view::<u32>(&op.index));
        let weights = self.view::<f32>(&op.weights);
        self.kernels.parallel(index.rows, &|n| {
            for (&term, weight) in
                index.row(n).iter().zip(weights.row(n)).take_while(|(term, _)| **term != NONE)
            {
                let Some(m) = (term as usize).checked_sub(op.first).filter(|&m| m < x.rows) else { continue };
                // SAFETY: no index comes twice.
                let row = unsafe { x.row_shared(m) };
                row.iter_mut().for_each(|x| *x = T::from_f32(x.to_f32() * weight));
            }
        });
        Ok(())
    }

    pub(super) fn soft_cap<T: Element>(&self, op: &SoftCap) -> Result<(), String> {
        let x = self.view_mut::<T>(&op.x);
        self.for_rows(&x, |_, row| {
            row.iter_mut().for_each(|x| *x = T::from_f32((x.to_f32() / op.cap).tanh() * op.cap));
        });
        Ok(())
    }

    pub(super) fn activate<X: Element, Y: Element>(&self, op: &Activate) -> Result<(), String> {
        let (x, out) = (self.view::<X>(&op.x), self.view_mut::<Y>(&op.out));
        let bias = op.bias.as_ref().map(|bias| self.slot_bias(bias, x.rows)).transpose()?;
        let width = out.width;
        self.for_rows_from(&out, x.width * size_of::<X>(), |m, out| {
            let bias = bias.as_ref().map(|bias| bias.row(m, x.width));
            let Activation::Swish(swish) = op.activation else {
                for (n, (out, x)) in out.iter_mut().zip(x.row(m)).enumerate() {
                    let x = x.to_f32() + bias.map_or(0.0, |bias| bias[n]);
                    let x = if x < 0.0 { 0.0 } else { x };
                    *out = Y::from_f32(x * x);
                }
                return;
            };
            let (gates, ups) = x.row(m).split_at(width);
            for (n, out) in out.iter_mut().enumerate() {
                let (added, also) = bias.map_or((0.0, 0.0), |bias| (bias[n], bias[width + n]));
                let (gate, up) = (gates[n].to_f32() + added, ups[n].to_f32() + also);
                // Comparisons, so that a NaN stays one.
                let gate = if gate > swish.limit { swish.limit } else { gate };
                let up = if up.abs() > swish.limit { swish.limit.copysign(up) } else { up };
                let inside = swish.alpha * (gate + swish.cubic * gate * gate * gate);
                let gate = gate / (1.0 + (-inside).exp());
                *out = Y::from_f32(gate * (up + swish.shift));
            }
        });
        Ok(())
    }

    pub(super) fn add_slot_bias<T: Element>(&self, op: &AddSlotBias) -> Result<(), String> {
        let x = self.view_mut::<T>(&op.x);
        let bias = self.slot_bias(&op.bias, x.rows)?;
        self.for_rows(&x, |m, row| {
            let bias = bias.row(m, row.len());
            row.iter_mut().zip(bias).for_each(|(x, bias)| *x = T::from_f32(x.to_f32() + bias));
        });
        Ok(())
    }

    /// The bias of each of some rows, once all are known to be in a slot.
    fn slot_bias(&self, op: &SlotBias, rows: usize) -> Result<RowBias, String> {
        let starts: Vec<u32> = self.view::<u32>(&op.starts).iter().map(|row| row[0]).collect();
        let end = starts.last().copied().unwrap_or(0);
        if let Some(last) = rows.checked_sub(1) {
            in_range("row", (op.first + last) as u32, end as usize)?;
        }
        Ok(RowBias { bias: self.weights.vector(&op.bias)?, starts, first: op.first as u32 })
    }

    pub(super) fn gate_rows<T: Element>(&self, op: &GateRows) -> Result<(), String> {
        let (gate, x) = (self.view::<f32>(&op.gate), self.view_mut::<T>(&op.x));
        self.for_rows(&x, |m, row| {
            let factor = 1.0 / (1.0 + (-gate.at(m)).exp());
            row.iter_mut().for_each(|x| *x = T::from_f32(x.to_f32() * factor));
        });
        Ok(())
    }
}

/// Writes a row in codes. What is encoded is bfloat16 everywhere: of float32 rows what they round to.
fn encode<T: Element>(row: &[T], words: &mut [u32]) {
    let rounded = |x: T| Element::to_f32(<bf16 as Element>::from_f32(x.to_f32()));
    encode_row(row, rounded, RowScales::Exact, words);
}

/// A [`SlotBias`] with its numbers at hand.
struct RowBias {
    bias: Arc<[f32]>,
    starts: Vec<u32>,
    first: u32,
}

impl RowBias {
    fn row(&self, m: usize, width: usize) -> &[f32] {
        let slot = self.starts.partition_point(|&start| start <= self.first + m as u32) - 1;
        &self.bias[slot * width..(slot + 1) * width]
    }
}

/// The first row of an operation's input that is not finite, found by all threads.
struct FirstRow(AtomicUsize);

impl Default for FirstRow {
    fn default() -> Self {
        FirstRow(AtomicUsize::new(usize::MAX))
    }
}

impl FirstRow {
    fn note(&self, row: usize, refused: bool) {
        if refused {
            self.0.fetch_min(row, AtomicOrdering::Relaxed);
        }
    }

    /// Threads are done by now.
    fn check(self, buffer: &Buffer, origin: Option<Origin>) -> Result<(), String> {
        match self.0.into_inner() {
            usize::MAX => Ok(()),
            row => Err(not_finite(row, buffer, origin)),
        }
    }
}

pub(super) fn in_range(what: &str, index: u32, limit: usize) -> Result<usize, String> {
    let index = index as usize;
    if index < limit { Ok(index) } else { Err(format!("{what} {index} is not below {limit}")) }
}

/// The same for every element of a single-column view.
/// The row that a column of indices names in its row m, if it names one.
fn named(index: &View<'_, u32>, m: usize) -> Option<usize> {
    Some(index.at(m)).filter(|&row| row != NONE).map(|row| row as usize)
}

/// Refuses indices of rows that are not there; some may name none.
fn named_in_range(what: &str, indices: &View<'_, u32>, limit: usize) -> Result<(), String> {
    let named = indices.iter().map(|row| row[0]).filter(|&row| row != NONE);
    named.into_iter().try_for_each(|row| in_range(what, row, limit).map(drop))
}

fn all_in_range(what: &str, indices: &View<'_, u32>, limit: usize) -> Result<(), String> {
    indices.iter().try_for_each(|row| in_range(what, row[0], limit).map(drop))
}

/// Sixteen running sums: fixed, whatever the row's position, and open to vector instructions of any width.
fn sum<T: Element>(x: &[T], f: impl Fn(f32) -> f32) -> f32 {
    let (chunks, rest) = x.as_chunks::<16>();
    let mut sums = [0.0f32; 16];
    for chunk in chunks {
        sums.iter_mut().zip(chunk).for_each(|(sum, x)| *sum += f(x.to_f32()));
    }
    sums.iter_mut().zip(rest).for_each(|(sum, x)| *sum += f(x.to_f32()));
    for half in [8, 4, 2, 1] {
        let (low, high) = sums.split_at_mut(half);
        low.iter_mut().zip(high).for_each(|(low, high)| *low += *high);
    }
    sums[0]
}

/// The sequence of every new token, once positions and blocks are known to be inside the cache.
fn check_sequences(
    op: &Attention,
    starts: &[u32],
    positions: &[u32],
    blocks: &View<'_, u32>,
) -> Result<Vec<u32>, String> {
    let mut sequences = Vec::with_capacity(positions.len());
    for (b, range) in starts.windows(2).enumerate() {
        if range[0] as usize != sequences.len() || range[1] < range[0] || range[1] as usize > positions.len()
        {
            return Err(format!("sequence {b} spans tokens {}..{}", range[0], range[1]));
        }
        sequences.resize(range[1] as usize, b as u32);
    }
    if sequences.len() != positions.len() {
        return Err(format!("sequences hold {} of {} tokens", sequences.len(), positions.len()));
    }
    for (&b, &position) in sequences.iter().zip(positions) {
        let block = in_range("cache block", position / op.block_size as u32, blocks.width)?;
        in_range("position", position, op.longest)?;
        let slots = (blocks.row(b as usize)[block] as usize).saturating_add(1).saturating_mul(op.block_size);
        if slots > op.keys.rows {
            return Err(format!("cache block {block} of sequence {b} is outside {:?}", op.keys));
        }
    }
    Ok(sequences)
}

/// Chooses the experts of one token; see [`TopKRouter`].
fn choose(
    router: &TopKRouter,
    logits: &[f32],
    [bias, scales]: [Option<&[f32]>; 2],
    experts: &mut [u32],
    weights: &mut [f32],
) {
    match router.score {
        Score::SparseMixer { jitter } => mix(jitter, logits, experts, weights),
        _ => pick(router, logits, bias, experts, weights),
    }
    let total: f32 = weights.iter().sum();
    let divisor = match (router.normalise, router.score) {
        (false, _) => 1.0,
        (true, Score::Softmax | Score::SparseMixer { .. }) => total,
        (true, Score::Sigmoid | Score::SigmoidOfLogit) => total + TopKRouter::EPSILON,
    };
    weights.iter_mut().for_each(|weight| *weight = *weight / divisor * router.scale);
    if let Some(scales) = scales {
        weights.iter_mut().zip(experts).for_each(|(weight, expert)| *weight *= scales[*expert as usize]);
    }
}

/// The best of the experts, each with its score.
fn pick(router: &TopKRouter, logits: &[f32], bias: Option<&[f32]>, experts: &mut [u32], weights: &mut [f32]) {
    let scores = scores(router.score, logits);
    let compared = if router.score == Score::SigmoidOfLogit { logits } else { &scores };
    let mut preference: Vec<f32> = match bias {
        Some(bias) => compared.iter().zip(bias).map(|(score, bias)| score + bias).collect(),
        None => compared.to_vec(),
    };
    if let Some(limit) = router.groups {
        keep_best_groups(limit, &mut preference);
    }
    for (slot, expert) in best(&preference, router.top_k).into_iter().enumerate() {
        experts[slot] = expert as u32;
        weights[slot] = scores[expert];
    }
}

fn scores(score: Score, logits: &[f32]) -> Vec<f32> {
    match score {
        Score::Sigmoid | Score::SigmoidOfLogit => {
            logits.iter().map(|logit| 1.0 / (1.0 + (-logit).exp())).collect()
        }
        Score::Softmax | Score::SparseMixer { .. } => {
            let most = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let powers: Vec<f32> = logits.iter().map(|logit| (logit - most).exp()).collect();
            let total: f32 = powers.iter().sum();
            powers.into_iter().map(|power| power / total).collect()
        }
    }
}

/// Chooses as a sparse mixer does; see [`Score::SparseMixer`].
fn mix(jitter: f32, logits: &[f32], experts: &mut [u32], weights: &mut [f32]) {
    let mut left: Vec<usize> = best(logits, logits.len());
    for (expert, weight) in experts.iter_mut().zip(weights) {
        let most = logits[left[0]];
        let near = |&&other: &&usize| {
            let behind = (most - logits[other]) / logits[other].abs().max(most);
            // Of equal logits of 0 it is a NaN.
            behind.is_nan() || behind <= 2.0 * jitter
        };
        // In the order of their numbers, as all sums over experts.
        let mut beside: Vec<usize> = left.iter().filter(near).copied().collect();
        beside.sort_unstable();
        let total: f32 = beside.into_iter().map(|other| (logits[other] - most).exp()).sum();
        (*expert, *weight) = (left.remove(0) as u32, 1.0 / total);
    }
}

/// Puts the experts of all but the best groups out of reach.
fn keep_best_groups(limit: GroupLimit, preference: &mut [f32]) {
    let size = preference.len() / limit.groups;
    let judged: Vec<f32> = preference
        .chunks_exact(size)
        .map(|group| match limit.by {
            GroupScore::Max => group[best(group, 1)[0]],
            GroupScore::TopTwoSum => best(group, 2).into_iter().map(|expert| group[expert]).sum(),
        })
        .collect();
    let kept = best(&judged, limit.kept);
    for (index, group) in preference.chunks_exact_mut(size).enumerate() {
        if !kept.contains(&index) {
            group.fill(f32::NEG_INFINITY);
        }
    }
}

/// Positions of the `count` largest values, largest first, ties to the lower position.
fn best(values: &[f32], count: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..values.len()).collect();
    let ahead = |a: &usize, b: &usize| match values[*b].total_cmp(&values[*a]) {
        Ordering::Equal => a.cmp(b),
        unequal => unequal,
    };
    let count = count.min(order.len());
    if count < order.len() {
        order.select_nth_unstable_by(count, ahead);
        order.truncate(count);
    }
    order.sort_unstable_by(ahead);
    order
}
