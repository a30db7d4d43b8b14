//! Which rank holds which part of a model.
//!
//! R ranks are `data` groups of `tensor` ranks each; rank = group · tensor + place in the group. A group has
//! tokens of its own, and its ranks split the attention heads. Between attention and MLPs every token lives on
//! one rank of its group: a rank's *token shard* is a consecutive share of the group's tokens, with their residual
//! stream, norms and routing.
//!
//! | name  | attention                  | MLPs and experts                          |
//! |-------|----------------------------|-------------------------------------------|
//! | DP+EP | whole on every rank        | experts spread over all ranks             |
//! | TP+EP | heads split over the group | experts spread over all ranks             |
//! | DP+TP | whole on every rank        | every inner width split over all ranks    |
//! | TP+TP | heads split over the group | every inner width split over all ranks    |
//!
//! Where experts are spread, dense MLPs and shared experts are whole on every rank and compute the tokens of its
//! shard. Where inner widths are split, theirs are too. Whatever is split is computed for the tokens of
//! all ranks that split it, and the partial sums are added in rank order ([`collectives`](crate::collectives)):
//! so a token's bits depend on the strategy and the sizes, never on the batch or the schedule.

use crate::{LayerPart, MlpSpec, ModelError, ModelSpec, Part};
use epsmoe_base::Rank;
use epsmoe_plan::{PlanError, SlotMap};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::ops::Range;

/// How a model is spread over ranks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Parallel {
    /// Ranks of a group, which split the attention heads of the same tokens.
    pub tensor: usize,
    /// Groups, each with tokens of its own; when absent, as many as the ranks make.
    pub data: Option<usize>,
    /// What the ranks have of the experts.
    pub experts: Experts,
}

/// What a rank has of the experts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Experts {
    /// Some of them, whole: expert parallel, over all ranks.
    #[default]
    Ep,
    /// A part of the inner width of each: tensor parallel, over all ranks.
    Tp,
}

/// Every rank has its own tokens, whole attention, and some of the experts.
impl Default for Parallel {
    fn default() -> Self {
        Parallel { tensor: 1, data: None, experts: Experts::Ep }
    }
}

impl fmt::Display for Parallel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let attention = if self.tensor > 1 { "TP" } else { "DP" };
        let experts = match self.experts {
            Experts::Ep => "EP",
            Experts::Tp => "TP",
        };
        write!(f, "{attention}+{experts}")
    }
}

impl Parallel {
    /// Groups that `ranks` make.
    pub fn groups(&self, ranks: usize) -> Result<usize, ModelError> {
        let tensor = self.tensor;
        if tensor == 0 || self.data == Some(0) {
            return refuse("--tensor-parallel-size and --data-parallel-size must be at least 1".into());
        }
        let groups = ranks / tensor;
        match self.data {
            Some(data) if data.checked_mul(tensor) != Some(ranks) => refuse(format!(
                "--tensor-parallel-size {tensor} times --data-parallel-size {data} must be the number of \
                 ranks, which is {ranks}"
            )),
            None if groups * tensor != ranks => refuse(format!(
                "{ranks} ranks cannot be cut into groups of --tensor-parallel-size {tensor}: use a size that \
                 divides the number of ranks"
            )),
            _ => Ok(groups),
        }
    }

    /// Refuses to spread a model over ranks of which some would hold nothing.
    pub fn check(&self, spec: &ModelSpec, ranks: usize) -> Result<(), ModelError> {
        self.groups(ranks)?;
        let fewest = spec.layers.iter().filter_map(|layer| layer.attention.heads()).min();
        let (tensor, heads) = (self.tensor, fewest.unwrap_or(1));
        if tensor > heads {
            return refuse(format!(
                "--tensor-parallel-size {tensor} is more than the {heads} attention heads of this model: use at most \
                 {heads}, and --data-parallel-size for the other ranks"
            ));
        }
        let narrowest = inner_widths(spec).min().unwrap_or(ranks);
        if self.experts == Experts::Tp && ranks > narrowest {
            return refuse(format!(
                "the narrowest MLP of this model has an inner width of {narrowest}, which cannot be split \
                 over {ranks} ranks: use at most {narrowest} ranks, or --enable-expert-parallel"
            ));
        }
        Ok(())
    }

    /// What `rank` of `ranks` holds; refused if some rank would hold nothing.
    pub(crate) fn layout(&self, spec: &ModelSpec, rank: Rank, ranks: usize) -> Result<Layout, ModelError> {
        self.check(spec, ranks)?;
        Ok(Layout { tensor: self.tensor, experts: self.experts, rank, ranks })
    }
}

impl ModelSpec {
    /// Numbers that a rank holds at most of the model's weights, if it shares them with no other: its share of what is
    /// split, its experts, and all of the rest. What groups of ranks hold of attention is rounded up.
    pub fn parameters_of_rank(&self, parallel: &Parallel, ranks: usize) -> u64 {
        use LayerPart::*;
        let of_part = |part: Part| {
            let numbers = self.shape(part).parameters() as u64;
            let split_by = |count: usize| numbers.div_ceil(count.max(1) as u64);
            let Part::Layer(layer, of_layer) = part else { return numbers };
            match (of_layer, parallel.experts) {
                (Expert(expert, _), Experts::Ep) => {
                    // Experts are equal: the first stand for those of the rank that holds most.
                    let experts = self.layers[layer.0].mlp.moe().map_or(0, |moe| moe.experts);
                    if expert.0 < experts.div_ceil(ranks) { numbers } else { 0 }
                }
                (Expert(..) | Shared(_) | Dense(_) | Residual(_), Experts::Tp) => split_by(ranks),
                (Query | Key | Value | Output | QueryUp, _) => split_by(parallel.tensor),
                (StateOutput, _) => {
                    let attention = &self.layers[layer.0].attention;
                    let (own, all) = (attention.heads_of_rank(parallel.tensor), attention.heads_of_rank(1));
                    numbers.div_ceil(all.max(1) as u64) * own as u64
                }
                (
                    KeyUp(head)
                    | ValueUp(head)
                    | State(head, _)
                    | StateConv(head, _)
                    | StateConvBias(head, _),
                    _,
                ) => {
                    let heads = self.layers[layer.0].attention.heads_of_rank(parallel.tensor);
                    if head < heads { numbers } else { 0 }
                }
                _ => numbers,
            }
        };
        self.parts().map(of_part).fold(0, u64::saturating_add)
    }
}

fn refuse<T>(problem: String) -> Result<T, ModelError> {
    Err(ModelError::Parallel(problem))
}

/// Inner widths of all MLPs and experts.
fn inner_widths(spec: &ModelSpec) -> impl Iterator<Item = usize> {
    spec.layers.iter().flat_map(|layer| {
        let (inner, shared) = match &layer.mlp {
            MlpSpec::Absent => (None, None),
            MlpSpec::Dense { inner, .. } => (Some(*inner), None),
            MlpSpec::Moe(moe) => (Some(moe.inner), moe.shared.map(|shared| shared.inner)),
        };
        [inner, shared, layer.residual_mlp].into_iter().flatten()
    })
}

/// What one rank holds: decided once, at load.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Layout {
    tensor: usize,
    experts: Experts,
    rank: Rank,
    ranks: usize,
}

impl Layout {
    /// The rank's share of the attention heads, and of the group's tokens.
    pub(crate) fn in_group(&self) -> Share {
        self.in_group_of(self.rank.0)
    }

    /// The share of another rank, in its own group.
    pub(crate) fn in_group_of(&self, rank: usize) -> Share {
        Share { index: rank % self.tensor, count: self.tensor }
    }

    /// The rank's share of every inner width.
    pub(crate) fn inner(&self) -> Share {
        match self.experts {
            Experts::Ep => Share::WHOLE,
            Experts::Tp => Share { index: self.rank.0, count: self.ranks },
        }
    }

    /// Ranks that split the attention of this rank's tokens.
    pub(crate) fn attention_ranks(&self) -> Range<usize> {
        let first = self.rank.0 - self.in_group().index;
        first..first + self.tensor
    }

    /// Ranks that split the inner widths of this rank's MLPs.
    pub(crate) fn mlp_ranks(&self) -> Range<usize> {
        match self.experts {
            Experts::Ep => self.rank.0..self.rank.0 + 1,
            Experts::Tp => 0..self.ranks,
        }
    }

    /// Most tokens of a shard of a group's `tokens`.
    pub(crate) fn most_in_shard(&self, tokens: usize) -> usize {
        self.in_group().most(tokens)
    }

    /// Most tokens that the rank's MLPs see when every group has at most `tokens`.
    pub(crate) fn most_in_mlp(&self, tokens: usize) -> usize {
        match self.experts {
            Experts::Ep => self.most_in_shard(tokens),
            Experts::Tp => self.ranks / self.tensor * tokens,
        }
    }

    /// Whether ranks compute parts of each other's tokens, and so must know how many there are.
    pub(crate) fn shares_tokens(&self) -> bool {
        self.attention_ranks().len() > 1 || self.mlp_ranks().len() > 1
    }

    /// Which of the experts are here, and which rank of their slot map this one is.
    pub(crate) fn slot_map(&self, experts: usize) -> Result<(SlotMap, Rank), PlanError> {
        match self.experts {
            Experts::Ep => Ok((SlotMap::contiguous(experts, self.ranks)?, self.rank)),
            Experts::Tp => Ok((SlotMap::contiguous(experts, 1)?, Rank(0))),
        }
    }

    /// The experts' rule.
    pub(crate) fn experts(&self) -> Experts {
        self.experts
    }
}

/// One of `count` consecutive shares, as equal as can be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Share {
    pub(crate) index: usize,
    pub(crate) count: usize,
}

impl Share {
    /// Everything.
    pub(crate) const WHOLE: Share = Share { index: 0, count: 1 };

    /// The share of `total` things: 7 things in 3 shares are `0..2`, `2..4` and `4..7`.
    pub(crate) fn of(self, total: usize) -> Range<usize> {
        total * self.index / self.count..total * (self.index + 1) / self.count
    }

    /// The most things that any of the shares has.
    pub(crate) fn most(self, total: usize) -> usize {
        total.div_ceil(self.count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::preset;

    fn refused(parallel: Parallel, model: &str, ranks: usize) -> String {
        parallel.layout(&preset(model).unwrap(), Rank(0), ranks).unwrap_err().to_string()
    }

    #[test]
    fn shares_cover_everything_once() {
        let shares = |total| [0, 1, 2].map(|index| Share { index, count: 3 }.of(total));
        assert_eq!(shares(7), [0..2, 2..4, 4..7]);
        assert_eq!(shares(2), [0..0, 0..1, 1..2]);
        assert_eq!(Share { index: 0, count: 3 }.most(7), 3);
    }

    #[test]
    fn rank_three_of_two_groups_of_two() {
        let parallel = Parallel { tensor: 2, data: Some(2), experts: Experts::Tp };
        let layout = parallel.layout(&preset("mixtral-mini").unwrap(), Rank(3), 4).unwrap();
        assert_eq!(layout.in_group(), Share { index: 1, count: 2 });
        assert_eq!((layout.attention_ranks(), layout.mlp_ranks()), (2..4, 0..4));
        let layout = Layout { experts: Experts::Ep, ..layout };
        assert_eq!((layout.attention_ranks(), layout.mlp_ranks()), (2..4, 3..4));
        assert_eq!(layout.slot_map(8).unwrap().1, Rank(3));
    }

    #[test]
    fn what_cannot_be_split_is_refused_with_both_numbers() {
        let parallel = |tensor, data| Parallel { tensor, data, experts: Experts::Ep };
        assert_eq!(
            refused(parallel(2, Some(3)), "mixtral-8x7b", 4),
            "--tensor-parallel-size 2 times --data-parallel-size 3 must be the number of ranks, which is 4"
        );
        assert_eq!(
            refused(parallel(3, None), "mixtral-8x7b", 4),
            "4 ranks cannot be cut into groups of --tensor-parallel-size 3: use a size that divides the \
             number of ranks"
        );
        assert_eq!(
            refused(parallel(0, None), "mixtral-8x7b", 4),
            "--tensor-parallel-size and --data-parallel-size must be at least 1"
        );
        assert_eq!(
            refused(parallel(64, None), "mixtral-8x7b", 64),
            "--tensor-parallel-size 64 is more than the 32 attention heads of this model: use at most 32, \
             and --data-parallel-size for the other ranks"
        );
        let split = Parallel { experts: Experts::Tp, ..Parallel::default() };
        assert_eq!(
            refused(split, "olmoe-1b-7b", 2048),
            "the narrowest MLP of this model has an inner width of 1024, which cannot be split over 2048 \
             ranks: use at most 1024 ranks, or --enable-expert-parallel"
        );
    }

    #[test]
    fn a_rank_holds_its_share_of_what_is_split_and_all_of_the_rest() {
        let spec = preset("deepseek-v2").unwrap();
        let (total, moe) = (spec.parameters().total, spec.layers[1].mlp.moe().unwrap());
        let parallel = |tensor, experts| Parallel { tensor, data: None, experts };
        let of = |parallel, ranks| spec.parameters_of_rank(&parallel, ranks);
        assert_eq!(of(parallel(1, Experts::Ep), 1), total);
        let layers = spec.layers.iter().filter(|layer| layer.mlp.moe().is_some()).count();
        let expert = (3 * moe.inner * spec.hidden) as u64;
        let elsewhere = |ranks: usize| (moe.experts - moe.experts / ranks) as u64 * expert * layers as u64;
        assert_eq!(of(parallel(1, Experts::Ep), 8), total - elsewhere(8));
        let split = of(parallel(8, Experts::Ep), 8);
        assert!(split < total - elsewhere(8) && split * 8 > total, "{split}");
        assert!(
            (total / 8..total / 7).contains(&of(parallel(8, Experts::Tp), 8)),
            "all but norms and tables"
        );
    }

    #[test]
    fn strategies_have_names() {
        let name = |tensor, experts| Parallel { tensor, data: None, experts }.to_string();
        assert_eq!(name(1, Experts::Ep), "DP+EP");
        assert_eq!(name(4, Experts::Tp), "TP+TP");
    }
}
