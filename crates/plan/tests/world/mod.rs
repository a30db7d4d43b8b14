//! Random layers, and ranks simulated with integers for hidden states.

use epsmoe_base::{Expert, Mix, Rank, Stage};
use epsmoe_plan::*;
use std::collections::{BTreeMap, HashMap};

/// One layer's routing on every rank.
#[derive(Debug)]
pub(crate) struct Case {
    pub(crate) placement: Placement,
    pub(crate) top_k: usize,
    pub(crate) routings: Vec<Routing>,
}

/// (source rank, token, expert, bits of the weight).
pub(crate) type Pair = (usize, usize, usize, u32);

impl Case {
    /// Any E, any R ≤ E, any k; ranks without tokens; experts that nobody wants, and ones that everybody does.
    pub(crate) fn random(mix: &mut Mix) -> Case {
        let ranks = 1 + mix.below(8);
        let experts = ranks + mix.below(24);
        let placement = Placement::new(experts, ranks).expect("ranks ≤ experts");
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
        Case { placement, top_k, routings }
    }

    /// Any cut, different on every rank, with empty stages, and any legal order.
    pub(crate) fn random_table(&self, mix: &mut Mix) -> StageTable {
        let stages = 1 + mix.below(6);
        let cut = |rank| {
            let local = self.placement.local_count(rank);
            let mut cut: Vec<usize> = (1..stages).map(|_| mix.below(local + 1)).chain([0, local]).collect();
            cut.sort_unstable();
            cut
        };
        let cuts = self.placement.all_ranks().map(cut).collect();
        let table = StageTable {
            cuts,
            order: random_order(stages, mix),
            gemm: vec![GemmKind::Grouped; stages],
            shared: SharedExpert::Alone,
        };
        table.validate(&self.placement).expect("a legal table");
        table
    }

    /// What every rank announces.
    pub(crate) fn rank_counts(&self) -> Vec<TokenHistograms> {
        self.routings.iter().map(|routing| TokenHistograms::of(&self.placement, routing)).collect()
    }

    /// The counts after a rendezvous, by way of bytes.
    pub(crate) fn counts(&self) -> LayerHistograms {
        gather(&self.placement, &self.routings)
    }

    /// Every (token, expert) pair, sorted.
    pub(crate) fn pairs(&self) -> Vec<Pair> {
        let mut pairs = Vec::new();
        for (source, routing) in self.routings.iter().enumerate() {
            for (pair, (&expert, weight)) in routing.experts().iter().zip(routing.weights()).enumerate() {
                pairs.push((source, pair / self.top_k, expert as usize, weight.to_bits()));
            }
        }
        pairs.sort_unstable();
        pairs
    }

    /// Tokens of `source` with experts on `rank`, of which the chosen one is in `stage`.
    pub(crate) fn rows_by(
        &self,
        table: &StageTable,
        source: Rank,
        rank: Rank,
        stage: Stage,
        choose: fn(&[usize]) -> Option<&usize>,
    ) -> usize {
        let mut experts_of_token: HashMap<usize, Vec<usize>> = HashMap::new();
        for (from, token, expert, _) in self.pairs() {
            if from == source.0 && self.placement.rank_of(Expert(expert)) == rank {
                experts_of_token.entry(token).or_default().push(self.placement.local_index(Expert(expert)));
            }
        }
        let in_stage = |experts: &Vec<usize>| {
            choose(experts).is_some_and(|expert| table.experts_of(rank, stage).contains(expert))
        };
        experts_of_token.values().filter(|experts| in_stage(experts)).count()
    }
}

fn gather(placement: &Placement, routings: &[Routing]) -> LayerHistograms {
    let send = |routing| TokenHistograms::of(placement, routing).encode();
    let receive =
        |bytes: Vec<u8>| TokenHistograms::decode(&bytes, placement.experts()).expect("the right length");
    let ranks = routings.iter().map(send).map(receive).collect();
    LayerHistograms::new(placement, routings[0].top_k(), ranks).expect("true counts")
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

/// An expert: different for every expert, and never the same on two inputs.
fn expert_output(expert: usize, hidden: i64) -> i64 {
    hidden.wrapping_mul(2 * expert as i64 + 3).wrapping_add(expert as i64)
}

/// Adds in a way that shows the order of what is added.
fn fold(sum: i64, weight: f32, output: i64) -> i64 {
    sum.wrapping_mul(31).wrapping_add(output.wrapping_mul(weight as i64))
}

/// The hidden state of a token says which one it is.
fn hidden(source: usize, token: usize) -> i64 {
    (source as i64) << 32 | token as i64
}

/// `[R][T]` the layer's answer by its definition: per token, over ranks, over the experts there, ascending.
pub(crate) fn plain_sums(case: &Case) -> Vec<Vec<i64>> {
    // (source, token) → rank → partial sum; the pairs are sorted by expert.
    let mut partial: HashMap<(usize, usize), BTreeMap<Rank, i64>> = HashMap::new();
    for (source, token, expert, weight) in case.pairs() {
        let rank = case.placement.rank_of(Expert(expert));
        let sum = partial.entry((source, token)).or_default().entry(rank).or_default();
        *sum = fold(*sum, f32::from_bits(weight), expert_output(expert, hidden(source, token)));
    }
    let sum_of =
        |source, token| partial[&(source, token)].values().fold(0, |sum, &more| fold(sum, 1.0, more));
    let tokens = case.routings.iter().map(Routing::tokens).enumerate();
    tokens.map(|(source, tokens)| (0..tokens).map(|token| sum_of(source, token)).collect()).collect()
}

/// A layer on simulated ranks, with everything that a real one would make before it runs.
pub(crate) struct Run {
    placement: Placement,
    top_k: usize,
    table: StageTable,
    counts: LayerHistograms,
    pub(crate) traffic: Traffic,
    pub(crate) send: Vec<SendMap>,
    pub(crate) home: Vec<HomeMap>,
    pub(crate) arrival: Vec<ArrivalMaps>,
}

impl Run {
    pub(crate) fn new(
        placement: &Placement,
        routings: &[Routing],
        table: &StageTable,
    ) -> Result<Run, PlanError> {
        let counts = gather(placement, routings);
        let own = || routings.iter().enumerate().map(|(rank, routing)| (counts.of(Rank(rank)), routing));
        let send: Vec<_> = own().map(|(counts, routing)| SendMap::of(placement, routing, counts)).collect();
        let home = own().zip(&send).map(|((counts, _), send)| HomeMap::of(send, counts)).collect();
        let mut run = Run {
            placement: *placement,
            top_k: routings[0].top_k(),
            table: table.clone(),
            traffic: Traffic::of(placement, &counts, table),
            counts,
            send,
            home,
            arrival: Vec::new(),
        };
        let maps = |rank| run.arrival_maps(rank, &run.records_of(rank));
        run.arrival = placement.all_ranks().map(maps).collect::<Result<_, _>>()?;
        Ok(run)
    }

    /// The records that reach `rank`.
    pub(crate) fn records_of(&self, rank: Rank) -> Vec<u32> {
        let words = record_words(self.top_k);
        let mut records = vec![0; self.traffic.rows_received(rank) * words];
        for source in self.placement.all_ranks() {
            let (from, to) = (self.traffic.send_rows(source, rank), self.traffic.record_rows(rank, source));
            let sent = &self.send[source.0].records[from.start * words..from.end * words];
            records[to.start * words..to.end * words].copy_from_slice(sent);
        }
        records
    }

    pub(crate) fn arrival_maps(&self, rank: Rank, records: &[u32]) -> Result<ArrivalMaps, PlanError> {
        let (counts, table, traffic) = (&self.counts, &self.table, &self.traffic);
        ArrivalMaps::of(&self.placement, rank, counts, table, traffic, self.top_k, records)
    }

    /// `[R][T]` sums, and every (token, expert) pair that was added into one.
    pub(crate) fn execute(&self) -> (Vec<Vec<i64>>, Vec<Pair>) {
        self.execute_from(&vec![0; self.placement.ranks()])
    }

    /// The same for a chunk: `first_token[r]` is the number of rank r's first token in the whole layer.
    pub(crate) fn execute_from(&self, first_token: &[usize]) -> (Vec<Vec<i64>>, Vec<Pair>) {
        let traffic = &self.traffic;
        let ranks = || self.placement.all_ranks();
        let send: Vec<Vec<i64>> = ranks()
            .map(|rank| {
                let tokens = self.send[rank.0].tokens.iter();
                tokens.map(|&token| hidden(rank.0, first_token[rank.0] + token as usize)).collect()
            })
            .collect();
        // Nothing may be read before it has come.
        let empty = |rows: fn(&Traffic, Rank) -> usize| -> Vec<Vec<Option<i64>>> {
            ranks().map(|rank| vec![None; rows(traffic, rank)]).collect()
        };
        let mut receive = empty(Traffic::rows_received);
        let mut outputs = empty(Traffic::copies);
        let mut combine = empty(Traffic::rows_received);
        let mut home = empty(Traffic::rows_sent);
        let mut met = Vec::new();

        let mut computed = 0;
        let mut arrived = vec![false; self.table.stages()];
        for &step in &self.table.order {
            match step {
                Transfer::Dispatch(stage) => {
                    for (source, rank) in ranks().flat_map(|source| ranks().map(move |rank| (source, rank))) {
                        let from = traffic.send_range(source, rank, stage);
                        for (to, row) in traffic.receive_range(rank, stage, source).zip(from) {
                            receive[rank.0][to] = Some(send[source.0][row]);
                        }
                    }
                    arrived[stage.0] = true;
                }
                Transfer::Combine(stage) => {
                    assert!(stage.0 < computed, "{step} waits for itself");
                    for (home_rank, rank) in ranks().flat_map(|home| ranks().map(move |rank| (home, rank))) {
                        let from = traffic.combine_range(rank, stage, home_rank);
                        for (to, row) in traffic.home_range(home_rank, rank, stage).zip(from) {
                            home[home_rank.0][to] = combine[rank.0][row];
                        }
                    }
                }
            }
            while computed < arrived.len() && arrived[computed] {
                for rank in ranks() {
                    let (receive, outputs) = (&receive[rank.0], &mut outputs[rank.0]);
                    self.compute(rank, Stage(computed), receive, outputs, &mut combine[rank.0], &mut met);
                }
                computed += 1;
            }
        }
        let sums = ranks().map(|rank| {
            let HomeMap { offsets, index } = &self.home[rank.0];
            let positions = |ends: &[u32]| index[ends[0] as usize..ends[1] as usize].iter();
            let sum = |ends: &[u32]| {
                positions(ends)
                    .fold(0, |sum, &at| fold(sum, 1.0, home[rank.0][at as usize].expect("came home")))
            };
            offsets.windows(2).map(sum).collect()
        });
        (sums.collect(), met)
    }

    /// Expand, experts and reduce of one stage on one rank.
    fn compute(
        &self,
        rank: Rank,
        stage: Stage,
        receive: &[Option<i64>],
        outputs: &mut [Option<i64>],
        combine: &mut [Option<i64>],
        met: &mut Vec<Pair>,
    ) {
        let maps = &self.arrival[rank.0];
        let first_expert = self.placement.experts_of(rank).start;
        let input = |copy: usize| receive[maps.expand[copy] as usize].expect("a row that has arrived");
        for local in self.table.experts_of(rank, stage) {
            for copy in maps.expert_start[local]..maps.expert_start[local + 1] {
                let copy = copy as usize;
                outputs[copy] = Some(expert_output(first_expert + local, input(copy)));
            }
        }
        for row in self.traffic.combine_stage(rank, stage) {
            let mut sum = 0;
            for place in maps.reduce_offsets[row] as usize..maps.reduce_offsets[row + 1] as usize {
                let (copy, weight) = (maps.reduce_index[place] as usize, maps.reduce_weights[place]);
                sum = fold(sum, weight, outputs[copy].expect("an expert that has computed"));
                let local = maps.expert_start.partition_point(|&start| start as usize <= copy) - 1;
                let (source, token) = ((input(copy) >> 32) as usize, input(copy) as u32 as usize);
                met.push((source, token, first_expert + local, weight.to_bits()));
            }
            combine[row] = Some(sum);
        }
    }
}
