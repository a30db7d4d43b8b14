//! Weights out of nothing: every number is a hash of its tensor's name and its index, the same on every
//! rank, device and run, and the same as in a checkpoint written from them.

use crate::checkpoint::{Stored, WeightSource};
use crate::names::{LayerPart, Part};
use crate::{ModelError, ModelSpec};
use epsmoe_base::{Mix, hash_bytes};
use epsmoe_device::WeightShape;
use epsmoe_quant::StoredType;
use half::bf16;
use std::collections::HashMap;

/// A model's tensors as its checkpoint would have them, in bfloat16.
#[derive(Debug)]
pub struct Synthetic {
    seed: u64,
    tensors: Vec<Virtual>,
    by_name: HashMap<String, usize>,
}

#[derive(Debug)]
struct Virtual {
    name: String,
    shape: Vec<usize>,
    values: Values,
}

#[derive(Clone, Copy, Debug)]
enum Values {
    /// Ones.
    One,
    /// Uniform around zero; the factor on a signed 16-bit number.
    Uniform(f32),
}

impl Synthetic {
    /// The weights of a model under a seed.
    pub fn new(spec: &ModelSpec, seed: u64) -> Self {
        let mut synthetic = Synthetic { seed, tensors: Vec::new(), by_name: HashMap::new() };
        for part in spec.parts() {
            let located = spec.locate(part);
            let published = &located.sources[0];
            if synthetic.by_name.contains_key(&published.name) {
                continue; // One tensor holds several parts.
            }
            synthetic.by_name.insert(published.name.clone(), synthetic.tensors.len());
            synthetic.tensors.push(Virtual {
                name: published.name.clone(),
                shape: published.shape.clone(),
                values: values(spec, part),
            });
        }
        synthetic
    }

    /// Where the numbers of a tensor come from.
    fn mix(&self, name: &str) -> Mix {
        Mix::keyed(self.seed, &[hash_bytes(name.as_bytes())])
    }

    /// Names and shapes of all tensors, in the order of the forward pass.
    pub fn tensors(&self) -> impl Iterator<Item = (&str, &[usize])> {
        self.tensors.iter().map(|tensor| (tensor.name.as_str(), tensor.shape.as_slice()))
    }
}

impl WeightSource for Synthetic {
    fn find(&self, name: &str) -> Result<Option<Stored<'_>>, ModelError> {
        let tensor = self.by_name.get(name).map(|&index| &self.tensors[index]);
        Ok(tensor.map(|tensor| Stored { dtype: StoredType::BF16, shape: &tensor.shape }))
    }

    fn fill(&self, name: &str, first: usize, into: &mut [u8]) -> Result<(), ModelError> {
        match self.tensors[self.by_name[name]].values {
            Values::One => {
                into.chunks_exact_mut(2).for_each(|out| out.copy_from_slice(&bf16::ONE.to_le_bytes()))
            }
            Values::Uniform(step) => fill_uniform(&self.mix(name), step, first, into),
        }
        Ok(())
    }

    fn numbers(&self, name: &str) -> Option<(Mix, f32)> {
        match self.tensors[*self.by_name.get(name)?].values {
            Values::One => None,
            Values::Uniform(step) => Some((self.mix(name), step)),
        }
    }

    fn place(&self, _name: &str) -> String {
        "synthetic weights".to_owned()
    }
}

/// Such that activations neither vanish nor grow over many layers: outputs of linear maps vary as much as
/// their inputs.
fn values(spec: &ModelSpec, part: Part) -> Values {
    use LayerPart::{ExpertScales, LayerScale, OutNorm, RouterScale};
    use LayerPart::{InputNorm, KeyNorm, PostAttentionNorm, QueryNorm, ResidualNorm};
    use LayerPart::{KvDownNorm, QueryDownNorm, StateNorm};
    let norms = [
        InputNorm,
        PostAttentionNorm,
        ResidualNorm,
        QueryNorm,
        KeyNorm,
        QueryDownNorm,
        KvDownNorm,
        StateNorm,
    ];
    if spec.is_less_one(part) {
        return Values::Uniform(0.0);
    }
    let deviation = match (part, spec.shape(part)) {
        (Part::FinalNorm, _) => return Values::One,
        (Part::Layer(_, inside), _) if norms.contains(&inside) => return Values::One,
        (Part::Layer(_, OutNorm(_) | LayerScale | RouterScale | ExpertScales), _) => return Values::One,
        (_, WeightShape::Vector { .. }) => BIAS_DEVIATION,
        // A table that is also the output projection must be scaled as one.
        (_, WeightShape::Table { width, .. }) if spec.tie_embeddings => 1.0 / (width as f32).sqrt(),
        (_, WeightShape::Table { .. }) => 1.0,
        (_, WeightShape::Matrix { k, .. } | WeightShape::GateUp { k, .. }) => 1.0 / (k as f32).sqrt(),
    };
    // A uniform number in [-w, w) deviates by w/√3.
    Values::Uniform(deviation * 3f32.sqrt() / 32768.0)
}

/// Enough to be seen, not enough to drown what it is added to.
const BIAS_DEVIATION: f32 = 0.1;

/// Numbers to a word of the hash.
const LANES: usize = 4;

/// Elements from number `first` on; words are cut where the range cuts them, so ranges agree where they meet.
fn fill_uniform(numbers: &Mix, step: f32, first: usize, into: &mut [u8]) {
    let word = |index: usize| {
        let hash = numbers.at(index as u64);
        let lane = |lane: usize| u64::from(rounded(f32::from((hash >> (16 * lane)) as i16) * step));
        (lane(0) | lane(1) << 16 | lane(2) << 32 | lane(3) << 48).to_le_bytes()
    };
    let lead = into.len().min(2 * (first.next_multiple_of(LANES) - first));
    let (head, body) = into.split_at_mut(lead);
    let skipped = 2 * (first % LANES);
    head.copy_from_slice(&word(first / LANES)[skipped..][..lead]);
    let start = first.div_ceil(LANES);
    let whole = body.len() / (2 * LANES);
    let mut words = body.chunks_exact_mut(2 * LANES);
    for (index, out) in (start..start + whole).zip(&mut words) {
        out.copy_from_slice(&word(index));
    }
    let tail = words.into_remainder();
    let length = tail.len();
    tail.copy_from_slice(&word(start + whole)[..length]);
}

/// The bits of the nearest bfloat16, ties to even, of a number that is finite.
fn rounded(number: f32) -> u16 {
    let bits = number.to_bits();
    // No sum wraps; without a check for it the compiler makes vectors of them.
    (bits.wrapping_add(0x7fff).wrapping_add(bits >> 16 & 1) >> 16) as u16
}
