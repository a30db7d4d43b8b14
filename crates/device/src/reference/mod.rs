//! The judge: every product and every score written as its definition, one number at a time, summed in
//! float64. Its lanes pause at random, its fresh memory is poisoned.

use crate::op::Epilogue;
use crate::threaded::{
    AttentionViews, Cached, Element, Fill, GemmViews, Kernels, Pack, RecurrentToken, ThreadedBackend,
    ThreadedOptions,
};
use epsmoe_base::DType;
use epsmoe_quant::{Codes, Format};
use half::bf16;

/// A plain host processor.
pub type Reference = ThreadedBackend<PlainKernels>;

/// Options under which a [`Reference`] is hardest to please.
pub fn options(dtype: DType, seed: u64) -> ThreadedOptions {
    ThreadedOptions { fill: Fill::Poison, jitter: Some(seed), ..ThreadedOptions::new(dtype) }
}

/// Definitions as code.
#[derive(Clone, Copy, Debug, Default)]
pub struct PlainKernels;

/// Rows `[n, k]`, or gate and up rows one after the other.
pub struct PlainMatrix {
    n: usize,
    k: usize,
    rows: Vec<f32>,
}

impl Kernels for PlainKernels {
    type Matrix = PlainMatrix;

    fn describe(&self) -> String {
        "reference".into()
    }

    fn pack(&self, pack: &Pack<'_>) -> Option<PlainMatrix> {
        let size = pack.n * pack.k;
        let mut rows = Vec::new();
        rows.try_reserve_exact(size * pack.tensors.len()).ok()?;
        rows.resize(size * pack.tensors.len(), 0.0);
        for (tensor, rows) in pack.tensors.iter().zip(rows.chunks_exact_mut(size.max(1))) {
            tensor.convert(0, rows);
        }
        if pack.dtype == DType::BF16 {
            rows.iter_mut().for_each(|value| *value = bf16::from_f32(*value).to_f32());
        }
        Some(PlainMatrix { n: pack.n, k: pack.k, rows })
    }

    fn holds(&self, _: &Format, _: DType) -> bool {
        true
    }

    fn pack_codes(&self, matrices: &[Codes], _: DType) -> Option<PlainMatrix> {
        let Codes { rows: n, columns: k, .. } = matrices[0];
        let mut rows = Vec::new();
        rows.try_reserve_exact(n * k * matrices.len()).ok()?;
        rows.resize(n * k * matrices.len(), 0.0);
        for (index, row) in rows.chunks_exact_mut(k.max(1)).enumerate() {
            matrices[index / n].decode(index % n, row);
            row.iter_mut().for_each(|value| *value = bf16::from_f32(*value).to_f32());
        }
        Some(PlainMatrix { n, k, rows })
    }

    fn parallel(&self, tasks: usize, task: &(dyn Fn(usize) + Sync)) {
        (0..tasks).for_each(task);
    }

    fn gemm<X: Element, Y: Element>(
        &self,
        parts: &mut [GemmViews<'_, X, Y, PlainMatrix>],
        epilogue: Epilogue,
        bias: Option<&[f32]>,
    ) {
        for part in parts {
            let GemmViews { x, matrix, out } = part;
            for m in 0..out.rows {
                for n in 0..matrix.n {
                    let value = match epilogue {
                        Epilogue::Store => matrix.dot(n, x.row(m)),
                        Epilogue::SwiGlu => {
                            silu(matrix.dot(n, x.row(m))) * matrix.dot(matrix.n + n, x.row(m))
                        }
                    };
                    out.row(m)[n] = Y::from_f32((value + bias.map_or(0.0, |bias| f64::from(bias[n]))) as f32);
                }
            }
        }
    }

    fn attention<T: Element, C: Cached<T>>(&self, mut views: AttentionViews<'_, T, C>) {
        let op = views.op;
        let (key_width, value_width) = (op.key_width(), op.value_width());
        for t in 0..views.q.rows {
            let sequence = views.sequences[t] as usize;
            let slots: Vec<usize> = views.visible(t).map(|position| views.slot(sequence, position)).collect();
            for head in 0..op.heads {
                let kv_head = head / (op.heads / op.kv_heads);
                let q = &views.q.row(t)[head * key_width..][..key_width];
                let scores: Vec<f64> = slots
                    .iter()
                    .map(|&slot| {
                        let key = &views.keys.row(slot)[kv_head * key_width..][..key_width];
                        f64::from(op.scale) * dot(q, key.iter().map(|key| key.number().to_f32()))
                    })
                    .collect();
                let sink = views.sinks.as_ref().map_or(f64::NEG_INFINITY, |sinks| f64::from(sinks[head]));
                let most = scores.iter().copied().fold(sink, f64::max);
                let powers: Vec<f64> = scores.iter().map(|score| (score - most).exp()).collect();
                let total: f64 = powers.iter().sum::<f64>() + (sink - most).exp();
                for column in 0..value_width {
                    let value = |slot: usize| {
                        f64::from(views.values.row(slot)[kv_head * value_width + column].number().to_f32())
                    };
                    let mean: f64 = slots.iter().zip(&powers).map(|(&slot, power)| power * value(slot)).sum();
                    let out = f64::from(op.value_scale) * mean / total;
                    views.out.row(t)[head * value_width + column] = T::from_f32(out as f32);
                }
            }
        }
    }

    fn recurrence(&self, state: &mut [f32], token: &RecurrentToken<'_>, out: &mut [f32]) {
        let width = out.len();
        for (column, (out, &value)) in out.iter_mut().zip(token.value).enumerate() {
            let decayed = |row: usize| f64::from(token.decay) * f64::from(state[row * width + column]);
            let keys = token.key.iter().map(|&key| f64::from(key)).enumerate();
            let held: f64 = keys.clone().map(|(row, key)| key * decayed(row)).sum();
            let missing = f64::from(value) - if token.corrects { held } else { 0.0 };
            let delta = f64::from(token.beta) * missing;
            let next: Vec<f64> = keys.map(|(row, key)| decayed(row) + key * delta).collect();
            let seen = next.iter().zip(token.query).map(|(state, &query)| state * f64::from(query));
            *out = (seen.sum::<f64>() + f64::from(token.skip) * f64::from(value)) as f32;
            for (row, next) in next.into_iter().enumerate() {
                state[row * width + column] = next as f32;
            }
        }
    }
}

impl PlainMatrix {
    fn dot<T: Element>(&self, row: usize, x: &[T]) -> f64 {
        dot(x, self.rows[row * self.k..][..self.k].iter().copied())
    }
}

fn dot<T: Element>(x: &[T], y: impl Iterator<Item = f32>) -> f64 {
    x.iter().zip(y).map(|(x, y)| f64::from(x.to_f32()) * f64::from(y)).sum()
}

fn silu(x: f64) -> f64 {
    x / (1.0 + (-x).exp())
}
