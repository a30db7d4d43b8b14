//! Counts to plan with when no router has spoken yet: what a popularity of experts leads to.

use crate::{LayerHistograms, PlanError, Routing, SlotMap, TokenHistograms};
use epsmoe_base::{Mix, Rank};

/// How a router chooses, as far as counts are concerned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SyntheticRouting {
    /// Experts of a token, k.
    pub top_k: usize,
    /// Expert groups and how many of them a token may use, as in DeepSeek-V2 and V3.
    pub groups: Option<(usize, usize)>,
    /// Exponent of Zipf's law over a shuffled list of experts, in thousandths; 0 is uniform, 800 is mild, 1200 is
    /// strong.
    pub zipf_permille: u32,
    /// Seed of the shuffle and of all draws.
    pub seed: u64,
}

/// Tokens drawn over all ranks at most; more tokens repeat them, which keeps the counts those of real routings.
const DRAWN: usize = 32_768;

impl SyntheticRouting {
    /// The counts of `tokens[r]` tokens on rank r.
    ///
    /// ```
    /// # use epsmoe_plan::*;
    /// # use epsmoe_base::Rank;
    /// let map = SlotMap::contiguous(8, 2).unwrap();
    /// let law = SyntheticRouting { top_k: 2, groups: None, zipf_permille: 0, seed: 7 };
    /// let counts = law.counts(&map, &[100_000, 0]).unwrap();
    /// assert_eq!(counts.of(Rank(0)).assignments.iter().sum::<u32>(), 200_000);
    /// assert!((22_000..28_000).contains(&counts.assignments_of(3)));
    /// ```
    pub fn counts(&self, map: &SlotMap, tokens: &[usize]) -> Result<LayerHistograms, PlanError> {
        let most = (DRAWN / map.ranks()).max(64);
        let weights = self.popularity(map.experts());
        let of_rank = |(rank, &tokens): (usize, &usize)| -> Result<TokenHistograms, PlanError> {
            let drawn = self.draw(map, &weights, rank, tokens.min(most))?;
            repeated(map, &drawn, tokens)
        };
        let ranks = tokens.iter().enumerate().map(of_rank).collect::<Result<_, _>>()?;
        LayerHistograms::new(map, self.top_k, ranks)
    }

    /// What the router says for `tokens` tokens of a rank, all of them drawn; weights are equal.
    pub fn routing(&self, map: &SlotMap, rank: Rank, tokens: usize) -> Result<Routing, PlanError> {
        self.draw(map, &self.popularity(map.experts()), rank.0, tokens)
    }

    /// `[E]` weights of all experts.
    fn popularity(&self, experts: usize) -> Vec<u64> {
        let exponent = f64::from(self.zipf_permille) / 1000.0;
        let weight = |place: usize| (1e9 / ((place + 1) as f64).powf(exponent)).max(1.0) as u64;
        let mut weights: Vec<u64> = (0..experts).map(weight).collect();
        let mut mix = Mix::keyed(self.seed, &[u64::MAX]);
        for place in 0..experts {
            weights.swap(place, place + mix.below(experts - place));
        }
        weights
    }

    fn draw(&self, map: &SlotMap, weights: &[u64], rank: usize, tokens: usize) -> Result<Routing, PlanError> {
        let (experts, mut ids) = (weights.len(), Vec::with_capacity(tokens * self.top_k));
        let mut mix = Mix::keyed(self.seed, &[rank as u64]);
        for _ in 0..tokens {
            let allowed = self.allowed(weights, &mut mix);
            ids.extend(distinct(&allowed, self.top_k.min(experts), &mut mix).map(|expert| expert as u32));
        }
        let pairs = ids.len();
        Routing::new(map.experts(), self.top_k, ids, vec![1.0; pairs])
    }

    /// The weights of the experts that one token may use: those of its groups.
    fn allowed(&self, weights: &[u64], mix: &mut Mix) -> Vec<u64> {
        let Some((groups, kept)) =
            self.groups.filter(|&(groups, kept)| kept < groups && weights.len() >= groups)
        else {
            return weights.to_vec();
        };
        let size = weights.len() / groups;
        let of_group: Vec<u64> = weights.chunks(size).take(groups).map(|group| group.iter().sum()).collect();
        let mut allowed = vec![0; weights.len()];
        for group in distinct(&of_group, kept, mix) {
            let block = group * size..(group + 1) * size;
            allowed[block.clone()].copy_from_slice(&weights[block]);
        }
        allowed
    }
}

/// `number` different positions, one after the other, each with a chance proportional to its weight; ascending
/// positions without weight once the others are used up.
fn distinct(weights: &[u64], number: usize, mix: &mut Mix) -> impl Iterator<Item = usize> + use<> {
    let mut left = weights.to_vec();
    let mut total: u64 = left.iter().sum();
    let mut chosen = Vec::with_capacity(number);
    while chosen.len() < number.min(weights.len()) {
        if total == 0 {
            chosen.extend((0..weights.len()).find(|position| !chosen.contains(position)));
            continue;
        }
        let mut ticket = ((u128::from(mix.next_u64()) * u128::from(total)) >> 64) as u64;
        let position = left.iter().position(|&weight| {
            let here = ticket < weight;
            ticket = ticket.saturating_sub(weight);
            here
        });
        if let Some(position) = position {
            total -= left[position];
            left[position] = 0;
            chosen.push(position);
        }
    }
    chosen.into_iter()
}

/// The counts of `tokens` tokens that repeat those drawn.
fn repeated(map: &SlotMap, drawn: &Routing, tokens: usize) -> Result<TokenHistograms, PlanError> {
    let all = TokenHistograms::of(&drawn.assign(map)?);
    let (times, rest) = (tokens / drawn.tokens().max(1), tokens % drawn.tokens().max(1));
    let rest = drawn.slice(0..rest.min(drawn.tokens()));
    let rest = TokenHistograms::of(&rest.assign(map)?);
    let assignments = (tokens as u64).saturating_mul(drawn.top_k() as u64);
    let number = u32::try_from(tokens).ok().filter(|_| assignments <= u64::from(u32::MAX));
    let number = number.ok_or(PlanError::TooManyAssignments { assignments })?;
    let sum = |all: &[u32], rest: &[u32]| {
        all.iter().zip(rest).map(|(&all, &rest)| all * times as u32 + rest).collect()
    };
    Ok(TokenHistograms {
        tokens: number,
        assignments: sum(&all.assignments, &rest.assignments),
        first: sum(&all.first, &rest.first),
        last: sum(&all.last, &rest.last),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn laws_hold() {
        let map = SlotMap::contiguous(64, 8).unwrap();
        let law = SyntheticRouting { top_k: 6, groups: Some((8, 3)), zipf_permille: 0, seed: 1 };
        let counts = law.counts(&map, &[10_001; 8]).unwrap();
        let rows: u32 = counts.of(Rank(0)).first.iter().sum();
        assert!((2 * 10_001..=3 * 10_001).contains(&rows), "{rows} rows: a token uses at most three ranks");
        let skewed = SyntheticRouting { zipf_permille: 1200, groups: None, ..law };
        let counts = skewed.counts(&map, &[4096; 8]).unwrap();
        let most = (0..64).map(|expert| counts.assignments_of(expert)).max().unwrap();
        assert!(most > 5 * 8 * 4096 * 6 / 64, "{most} assignments of the most popular expert");
        assert_eq!(skewed.counts(&map, &[4096; 8]).unwrap(), counts);
        // More experts than have any weight left.
        let all = SyntheticRouting { top_k: 64, groups: Some((8, 1)), ..law };
        assert_eq!(all.counts(&map, &[2; 8]).unwrap().assignments_of(9), 16);
    }
}
