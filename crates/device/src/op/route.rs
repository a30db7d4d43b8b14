//! Choices: which experts a token goes to, and with what weight; which token comes next.

use super::{Accesses, expect, same_rows};
use crate::{Buffer, DeviceError, Weight, WeightShape};
use epsmoe_base::DType;

/// How router logits become experts and weights.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct TopKRouter {
    /// Experts chosen per token.
    pub top_k: usize,
    /// How logits become scores.
    pub score: Score,
    /// Restriction to the best groups of experts, if any.
    pub groups: Option<GroupLimit>,
    /// Whether the chosen weights are divided by their sum (plus [`TopKRouter::EPSILON`] for sigmoid scores).
    pub normalise: bool,
    /// Factor on every weight, after normalisation.
    pub scale: f32,
}

impl TopKRouter {
    /// Keeps a sum of sigmoid scores from dividing by zero (DeepSeek-V3's published router).
    pub const EPSILON: f32 = 1e-20;
}

/// How logits become scores.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Score {
    /// Softmax over all experts.
    Softmax,
    /// Sigmoid of each logit; a correction bias may be added for the choice, never for the weight.
    Sigmoid,
    /// The same where logits are compared, of which sigmoids are the weights: those of large ones are all 1.
    SigmoidOfLogit,
    /// The best of all, then the best of the others, and so on, each under its softmax over those that are left and not far
    /// behind it: by no more than `2 · jitter` of their own size, or of the best one's, if that is larger (SparseMixer,
    /// arXiv 2409.12136). Knows no groups, no bias and no factors.
    SparseMixer {
        /// Of the noise that the router was trained with.
        jitter: f32,
    },
}

/// Group-limited routing (DeepSeek-V2, arXiv 2405.04434, section 2.2.2): experts in `groups` equal,
/// consecutive groups; only experts of the `kept` best groups may be chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GroupLimit {
    /// Number of groups.
    pub groups: usize,
    /// Groups that stay in play.
    pub kept: usize,
    /// How a group is judged.
    pub by: GroupScore,
}

/// How a group of experts is judged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GroupScore {
    /// By its best expert (DeepSeek-V2).
    Max,
    /// By the sum of its two best (DeepSeek-V3).
    TopTwoSum,
}

/// `tokens[m]` is the column of the largest of `logits[m]`, the lowest of equal ones. A row that holds a NaN, or
/// whose largest is infinite, stops the world.
#[derive(Clone, Debug)]
pub struct ArgMax {
    /// Logits `[M, V]`, float32.
    pub logits: Buffer,
    /// Columns `[M, 1]`, uint32.
    pub tokens: Buffer,
}

impl ArgMax {
    pub(super) fn check(&self) -> Result<(), DeviceError> {
        same_rows("argmax", &[&self.logits, &self.tokens])?;
        expect("argmax", "logits", &self.logits, DType::F32, self.logits.width.max(1))?;
        expect("argmax", "tokens", &self.tokens, DType::U32, 1)
    }

    pub(super) fn accesses(&self) -> Accesses {
        Accesses::new().read(&self.logits).write(&self.tokens)
    }
}

/// `experts[t], weights[t] = gate(logits[t])`: the `top_k` best experts, ties to the lower number, in order of
/// descending score.
#[derive(Clone, Debug)]
pub struct Route {
    /// Router logits `[T, E]`, float32.
    pub logits: Buffer,
    /// The rule.
    pub router: TopKRouter,
    /// Correction bias `[E]` added to the scores for the choice only.
    pub bias: Option<Weight>,
    /// Factor on the weight of each expert `[E]`, after everything else.
    pub scales: Option<Weight>,
    /// Chosen experts `[T, k]`, uint32.
    pub experts: Buffer,
    /// Their weights `[T, k]`, float32.
    pub weights: Buffer,
}

impl Route {
    pub(super) fn check(&self) -> Result<(), DeviceError> {
        let (e, k) = (self.logits.width, self.router.top_k);
        same_rows("route", &[&self.logits, &self.experts, &self.weights])?;
        let shape = |message: String| Err(DeviceError::Shape(format!("route: {message}")));
        if k == 0 || k > e {
            return shape(format!("top_k is {k}, but there are {e} experts"));
        }
        if self.experts.width != k || self.weights.width != k {
            return shape(format!("top_k is {k}, but outputs are {:?} and {:?}", self.experts, self.weights));
        }
        if (self.logits.dtype, self.experts.dtype, self.weights.dtype) != (DType::F32, DType::U32, DType::F32)
        {
            return shape(format!("{:?} → {:?}, {:?}", self.logits, self.experts, self.weights));
        }
        let mut vectors = [("bias", &self.bias), ("scales", &self.scales)].into_iter();
        let wrong = vectors.find_map(|(what, vector)| {
            Some(what).zip(vector.as_ref().filter(|vector| vector.shape != WeightShape::Vector { n: e }))
        });
        if let Some((what, vector)) = wrong {
            return shape(format!("{what} {} is {:?}, but there are {e} experts", vector.name, vector.shape));
        }
        let more = self.router.groups.is_some() || self.bias.is_some() || self.scales.is_some();
        if more && matches!(self.router.score, Score::SparseMixer { .. }) {
            return shape("a sparse mixer knows no groups, no bias and no factors".into());
        }
        if let Some(limit) = self.router.groups {
            let fits = limit.groups > 0 && e.is_multiple_of(limit.groups) && limit.kept <= limit.groups;
            if !fits || k > limit.kept * (e / limit.groups.max(1)) {
                return shape(format!("{e} experts and top {k} do not fit {limit:?}"));
            }
        }
        Ok(())
    }

    pub(super) fn accesses(&self) -> Accesses {
        let reads = Accesses::new().read(&self.logits).read_weights(self.bias.iter().chain(&self.scales));
        reads.write(&self.experts).write(&self.weights)
    }
}
