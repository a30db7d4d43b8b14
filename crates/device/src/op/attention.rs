//! Attention over a paged cache.

use super::{Accesses, expect, same_rows};
use crate::{Buffer, DeviceError, Weight, WeightShape};
use epsmoe_base::DType;

/// `cache[slots[t]] = x[t] / scale`: rows into the paged cache, of keys and of values. A slot is `block · block_size + offset`.
///
/// A cache in the format of the rows holds them as they are, with a scale of 1. One in e4m3 holds the nearest codes, ties to even; what
/// is beyond ±448 becomes ±448, and what is not finite stops the world.
#[derive(Clone, Debug)]
pub struct KvWrite {
    /// Rows with their caches, at most two, all of the same formats.
    pub parts: Vec<KvRows>,
    /// Slot of each row `[T, 1]`, uint32, all different.
    pub slots: Buffer,
}

/// Rows that are cached.
#[derive(Clone, Debug)]
pub struct KvRows {
    /// New rows `[T, W]`.
    pub x: Buffer,
    /// The cache `[slots, W]`, in the format of `x` or in e4m3.
    pub cache: Buffer,
    /// What the numbers of the cache are multiplied with to be those of `x`.
    pub scale: f32,
}

impl KvWrite {
    /// Most parts.
    pub(crate) const PARTS: usize = 2;

    /// Rows of one cache.
    pub fn of(x: Buffer, slots: Buffer, cache: Buffer, scale: f32) -> Self {
        KvWrite { parts: vec![KvRows { x, cache, scale }], slots }
    }

    pub(super) fn check(&self) -> Result<(), DeviceError> {
        expect("kv_write", "slots", &self.slots, DType::U32, 1)?;
        let formats = |part: &KvRows| (part.x.dtype, part.cache.dtype);
        let alike = self.parts.iter().all(|part| formats(part) == formats(&self.parts[0]));
        if !alike || self.parts.len() > Self::PARTS {
            return Err(DeviceError::Shape(format!("kv_write: {:?} are not two alike", self.parts)));
        }
        self.parts.iter().try_for_each(|KvRows { x, cache, scale }| {
            same_rows("kv_write", &[x, &self.slots])?;
            let dtype = cached(cache, x.dtype);
            expect("kv_write", "cache", cache, dtype, x.width)?;
            let fits = if dtype == DType::E4M3 { *scale > 0.0 && scale.is_finite() } else { *scale == 1.0 };
            match fits {
                true => Ok(()),
                false => Err(DeviceError::Shape(format!("kv_write: a scale of {scale} for {cache:?}"))),
            }
        })
    }

    pub(super) fn accesses(&self) -> Accesses {
        let reads = self.parts.iter().fold(Accesses::new().read(&self.slots), |all, part| all.read(&part.x));
        self.parts.iter().fold(reads, |all, part| all.write(&part.cache))
    }
}

/// The format that a cache of rows in `dtype` has: theirs, or codes.
fn cached(cache: &Buffer, dtype: DType) -> DType {
    if cache.dtype == DType::E4M3 { DType::E4M3 } else { dtype }
}

/// Which of the cached positions up to its own a token sees.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Sight {
    /// All.
    #[default]
    All,
    /// The last so many, its own among them.
    Last(usize),
    /// Those of its own stretch: positions are cut into stretches of so many, from 0 on.
    Stretch(usize),
}

impl Sight {
    /// The first position that the token at `position` sees.
    pub fn first(self, position: usize) -> usize {
        match self {
            Sight::All => 0,
            Sight::Last(count) => (position + 1).saturating_sub(count),
            Sight::Stretch(count) => position - position % count,
        }
    }

    /// How many positions a token sees at most, if not all of any text.
    pub fn most(self) -> Option<usize> {
        match self {
            Sight::All => None,
            Sight::Last(count) | Sight::Stretch(count) => Some(count),
        }
    }
}

/// Causal attention of packed new tokens over their sequences' cached keys and values, which hold the new
/// tokens too. Token `t` of sequence `b` sees the cached positions up to `positions[t]` of `b`, as far back as its sight:
///
/// `out[t, h] = value_scale · Σ_j softmax_j(scale · q[t, h]·keys[j, h / (heads/kv_heads)]) · values[j, h / (heads/kv_heads)]`
///
/// computed in float32. A cache in e4m3 counts as the numbers of its codes, which are exact in the format of the queries; the factors
/// that its codes are short of belong to the two scales. A sink is one more score of its head in the softmax, whose value is zero. Position `j` of sequence `b` lies in slot
/// `blocks[b, j / block_size] · block_size + j % block_size`. Multi-head latent attention is the case of one
/// key head whose values are the leading columns of the same cache rows.
#[derive(Clone, Debug)]
pub struct Attention {
    /// Queries `[T, heads · key_width]`.
    pub q: Buffer,
    /// Key cache `[slots, kv_heads · key_width]`, in the format of the queries or in e4m3.
    pub keys: Buffer,
    /// Value cache `[slots, kv_heads · value_width]`, in the format of the keys.
    pub values: Buffer,
    /// First new token of each sequence, and the total, `[B + 1, 1]`, uint32.
    pub sequence_starts: Buffer,
    /// Position of each new token in its sequence `[T, 1]`, uint32.
    pub positions: Buffer,
    /// Cache blocks of each sequence `[B, most blocks]`, uint32.
    pub blocks: Buffer,
    /// Tokens in a cache block.
    pub block_size: usize,
    /// All positions are below.
    pub longest: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads.
    pub kv_heads: usize,
    /// Factor on the scores.
    pub scale: f32,
    /// Factor on the sums.
    pub value_scale: f32,
    /// How far back tokens see.
    pub sight: Sight,
    /// One score of each head that belongs to no key, `heads` elements, if the model has them.
    pub sinks: Option<Weight>,
    /// Output `[T, heads · value_width]`.
    pub out: Buffer,
}

impl Attention {
    /// Elements of one key.
    pub fn key_width(&self) -> usize {
        self.keys.width / self.kv_heads
    }

    /// Elements of one value.
    pub fn value_width(&self) -> usize {
        self.values.width / self.kv_heads
    }

    pub(super) fn check(&self) -> Result<(), DeviceError> {
        same_rows("attention", &[&self.q, &self.out, &self.positions])?;
        same_rows("attention", &[&self.keys, &self.values])?;
        let (heads, kv_heads) = (self.heads, self.kv_heads);
        if self.sight.most() == Some(0) {
            return Err(DeviceError::Shape(format!("attention: nothing is seen by {:?}", self.sight)));
        }
        if heads == 0 || kv_heads == 0 || !heads.is_multiple_of(kv_heads) || self.block_size == 0 {
            return Err(DeviceError::Shape(format!(
                "attention: {heads} heads over {kv_heads} key heads, blocks of {}",
                self.block_size
            )));
        }
        let dtype = self.q.dtype;
        let cached = cached(&self.keys, dtype);
        expect("attention", "keys", &self.keys, cached, self.q.width / heads * kv_heads)?;
        expect("attention", "queries", &self.q, dtype, self.key_width() * heads)?;
        expect("attention", "values", &self.values, cached, self.out.width / heads * kv_heads)?;
        expect("attention", "output", &self.out, dtype, self.value_width() * heads)?;
        expect("attention", "positions", &self.positions, DType::U32, 1)?;
        expect("attention", "sequence starts", &self.sequence_starts, DType::U32, 1)?;
        expect("attention", "blocks", &self.blocks, DType::U32, self.blocks.width)?;
        if let Some(sinks) =
            self.sinks.as_ref().filter(|sinks| sinks.shape != WeightShape::Vector { n: heads })
        {
            return Err(DeviceError::Shape(format!(
                "attention: sinks {} are {:?}, but there are {heads} heads",
                sinks.name, sinks.shape
            )));
        }
        if self.sequence_starts.rows != self.blocks.rows + 1 {
            return Err(DeviceError::Shape(format!(
                "attention: {:?} does not delimit the sequences of {:?}",
                self.sequence_starts, self.blocks
            )));
        }
        Ok(())
    }

    pub(super) fn accesses(&self) -> Accesses {
        [&self.q, &self.keys, &self.values, &self.sequence_starts, &self.positions, &self.blocks]
            .into_iter()
            .fold(Accesses::new(), Accesses::read)
            .read_weights(&self.sinks)
            .write(&self.out)
    }
}
