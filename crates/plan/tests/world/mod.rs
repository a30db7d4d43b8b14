//! Random layers.

use epsmoe_base::{Mix, Rank, Stage};
use epsmoe_plan::*;

/// One layer's routing on every rank.
#[derive(Debug)]
pub(crate) struct Case {
    pub(crate) map: SlotMap,
    pub(crate) top_k: usize,
    pub(crate) routings: Vec<Routing>,
}

impl Case {
    /// Any E, any R ≤ E, any k; ranks without tokens; experts that nobody wants, and ones that everybody does.
    pub(crate) fn random(mix: &mut Mix) -> Case {
        let ranks = 1 + mix.below(8);
        let experts = ranks + mix.below(24);
        let map = random_map(experts, ranks, mix);
        let top_k = 1 + mix.below(experts.min(8));
        // Tokens choose from a shuffled list: all of it, or only its beginning.
        let mut wanted: Vec<usize> = (0..experts).collect();
        for place in 0..experts {
            wanted.swap(place, place + mix.below(experts - place));
        }
        if mix.below(3) == 0 {
            wanted.truncate(top_k + mix.below(experts - top_k + 1));
        }
        let hot = (mix.below(3) == 0).then(|| wanted[0]);
        let most_tokens = [0, 3, 40][mix.below(3)];
        let routings = (0..ranks).map(|_| {
            let tokens = if mix.below(4) == 0 { 0 } else { mix.below(most_tokens + 1) };
            let mut ids = Vec::new();
            for _ in 0..tokens {
                let mut choice = wanted.clone();
                // The hot expert, if there is one, is in place 0 and stays there.
                for place in usize::from(hot.is_some())..top_k {
                    let other = place + mix.below(choice.len() - place);
                    choice.swap(place, other);
                }
                // Routers answer by weight, not by number.
                choice.truncate(top_k);
                choice.swap(0, mix.below(top_k));
                ids.extend(choice.iter().map(|&expert| expert as u32));
            }
            let weights = ids.iter().map(|_| (1 + mix.below(1000)) as f32).collect();
            Routing::new(experts, top_k, ids, weights).expect("distinct experts")
        });
        let routings = routings.collect();
        Case { map, top_k, routings }
    }

    /// Any cut, different on every rank, with empty stages, and any legal order.
    pub(crate) fn random_table(&self, mix: &mut Mix) -> StageTable {
        let stages = 1 + mix.below(6);
        let cut = |rank| {
            let local = self.map.local_count(rank);
            let mut cut: Vec<usize> = (1..stages).map(|_| mix.below(local + 1)).chain([0, local]).collect();
            cut.sort_unstable();
            cut
        };
        let cuts = self.map.all_ranks().map(cut).collect();
        let table = StageTable {
            cuts,
            order: random_order(stages, mix),
            gemm: vec![GemmKind::Grouped; stages],
            shared: SharedExpert::Serial,
            reserved: 0,
        };
        table.validate(&self.map).expect("a legal table");
        table
    }

    /// The counts after they met, by way of bytes.
    pub(crate) fn counts(&self) -> LayerHistograms {
        let map = &self.map;
        let send = |routing: &Routing| {
            TokenHistograms::of(&routing.assign(map).expect("experts of the map")).encode()
        };
        let receive =
            |bytes: Vec<u8>| TokenHistograms::decode(&bytes, map.slots()).expect("the right length");
        let ranks = self.routings.iter().map(send).map(receive).collect();
        LayerHistograms::new(map, self.top_k, ranks).expect("true counts")
    }

    /// Tokens of `source` with slots on `rank`, of which the chosen one is in `stage`.
    pub(crate) fn rows_by(
        &self,
        table: &StageTable,
        source: Rank,
        rank: Rank,
        stage: Stage,
        choose: fn(&[u32]) -> Option<&u32>,
    ) -> usize {
        let slots = self.routings[source.0].assign(&self.map).expect("experts of the map");
        let start = self.map.slots_of_rank(rank).start;
        let rows = (0..slots.tokens()).flat_map(|token| slots.rows(token)).filter(|row| row.0 == rank);
        let in_stage = |slots: &[u32]| {
            choose(slots).is_some_and(|&slot| table.slots_of(rank, stage).contains(&(slot as usize - start)))
        };
        rows.filter(|row| in_stage(row.1)).count()
    }
}

/// Contiguous blocks, or any experts on any rank.
fn random_map(experts: usize, ranks: usize, mix: &mut Mix) -> SlotMap {
    if mix.below(2) == 0 {
        return SlotMap::contiguous(experts, ranks).expect("ranks ≤ experts");
    }
    let mut order: Vec<u32> = (0..experts as u32).collect();
    (1..experts).for_each(|last| order.swap(last, mix.below(last + 1)));
    // Every rank has one, and the others are anywhere.
    let mut by_rank: Vec<Vec<u32>> = order[..ranks].iter().map(|&expert| vec![expert]).collect();
    order[ranks..].iter().for_each(|&expert| by_rank[mix.below(ranks)].push(expert));
    // Some are on other ranks too.
    for _ in 0..mix.below(2) * (1 + mix.below(experts)) {
        let (expert, held) = (mix.below(experts) as u32, &mut by_rank[mix.below(ranks)]);
        if !held.contains(&expert) {
            held.insert(mix.below(held.len() + 1), expert);
        }
    }
    SlotMap::new(experts, &by_rank, mix.next_u64()).expect("every expert once")
}

/// Any order in which no combine comes before what it needs.
pub(crate) fn random_order(stages: usize, mix: &mut Mix) -> Vec<Transfer> {
    let mut left: Vec<Transfer> = (0..stages).map(|stage| Transfer::Dispatch(Stage(stage))).collect();
    left.extend((0..stages).map(|stage| Transfer::Combine(Stage(stage))));
    let mut order = Vec::new();
    while !left.is_empty() {
        let step = left[mix.below(left.len())];
        let blocked = match step {
            Transfer::Dispatch(_) => false,
            Transfer::Combine(stage) => {
                left.iter().any(|other| matches!(other, Transfer::Dispatch(needed) if *needed <= stage))
            }
        };
        if !blocked {
            order.push(step);
            left.retain(|other| *other != step);
        }
    }
    order
}
