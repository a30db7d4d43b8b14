//! The index arrays of an MoE layer over ranks, whole: each rank's operations, one after the other on one processor,
//! against orders that are sorted by their keys here.

use crate::bench::{Bench, Placed};
use epsmoe_base::{DType, Fault, Mix};
use epsmoe_device::op::*;
use epsmoe_device::{Backend, Buffer};

/// A token's assignments on one rank: what becomes a row.
#[derive(Clone, Debug)]
struct Row {
    source: usize,
    token: usize,
    /// Slots counted on the rank, ascending, with their weights.
    slots: Vec<(u32, f32)>,
}

impl Row {
    fn first(&self) -> u32 {
        self.slots[0].0
    }

    fn last(&self) -> u32 {
        self.slots[self.slots.len() - 1].0
    }

    fn has(&self, slot: u32) -> bool {
        self.slots.iter().any(|&(own, _)| own == slot)
    }
}

/// Where slots are: the first one of each rank and the end, and the slots of each expert `[E, m]`.
struct Places {
    starts: Vec<usize>,
    slot_of: Vec<u32>,
    replicas: usize,
}

impl Places {
    fn random<B: Backend>(bench: &Bench<B>, ranks: usize, experts: usize) -> Self {
        let replicas = 1 + bench.below(3);
        let slots = replicas * experts;
        let mut starts: Vec<usize> = (1..ranks).map(|_| bench.below(slots + 1)).chain([0, slots]).collect();
        starts.sort_unstable();
        Places { starts, slot_of: bench.shuffled(slots), replicas }
    }

    /// Where a token finds its experts, those that have slots, with their weights.
    fn pairs_of(&self, experts: &[u32], weights: &[f32]) -> Vec<(u32, f32)> {
        let replica = experts.iter().sum::<u32>() as usize % self.replicas;
        let slot = |expert: u32| self.slot_of.get(expert as usize * self.replicas + replica).copied();
        let pairs = experts.iter().zip(weights);
        let mut pairs: Vec<_> =
            pairs.filter_map(|(&expert, &weight)| Some((slot(expert)?, weight))).collect();
        pairs.sort_by_key(|&(slot, _)| slot);
        pairs
    }

    fn rank_of(&self, slot: u32) -> usize {
        self.starts.partition_point(|&start| start <= slot as usize) - 1
    }

    fn block_starts(&self) -> Vec<u32> {
        (0..self.slot_of.len()).map(|slot| self.starts[self.rank_of(slot as u32)] as u32).collect()
    }
}

pub(crate) fn assignments<B: Backend>(bench: &Bench<B>) {
    for (ranks, experts, top_k, most) in [
        (1, 4, 2, 0),
        (1, 1, 1, 3),
        (1, 64, 6, 40),
        (2, 5, 3, 9),
        (3, 8, 2, 30),
        (4, 40, 6, 90),
        (2, 160, 8, 700),
    ] {
        for (crowded, slotless) in
            [(false, 0), (true, 0), (false, experts / 2), (true, top_k / 2), (true, top_k + 1)]
        {
            layer(bench, (ranks, experts, slotless), top_k, most, crowded);
        }
    }
}

fn layer<B: Backend>(
    bench: &Bench<B>,
    (ranks, experts, slotless): (usize, usize, usize),
    top_k: usize,
    most: usize,
    crowded: bool,
) {
    let places = Places::random(bench, ranks, experts);
    let mut to: Vec<Vec<Row>> = vec![Vec::new(); ranks];
    for source in 0..ranks {
        let tokens = if source == 1 { 0 } else { bench.below(most + 1) };
        let what = format!(
            "{tokens} tokens of rank {source} of {ranks} to {top_k} of {experts} experts and {slotless} without slots"
        );
        let all = experts + slotless;
        let chosen: Vec<u32> = (0..tokens).flat_map(|_| choice(bench, all, top_k, crowded)).collect();
        for row in sent(bench, &what, &places, source, (&chosen, slotless), top_k) {
            to[places.rank_of(row.0)].push(row.1);
        }
    }
    for (rank, rows) in to.iter().enumerate() {
        let local = places.starts[rank + 1] - places.starts[rank];
        if local > 0 {
            received(bench, &format!("rank {rank} of {ranks} with {local} slots"), rows, ranks, local, top_k);
        }
    }
}

/// Random experts; crowded ones are all among the last few.
fn choice<B: Backend>(bench: &Bench<B>, experts: usize, top_k: usize, crowded: bool) -> Vec<u32> {
    let mut chosen = bench.shuffled(experts);
    if crowded {
        chosen = (0..experts as u32).rev().take(top_k + 1).collect();
        let by = bench.below(chosen.len());
        chosen.rotate_left(by);
    }
    chosen.truncate(top_k);
    chosen
}

/// What the source's operations make of its tokens; returns its rows in send order with their first slot of all.
fn sent<B: Backend>(
    bench: &Bench<B>,
    what: &str,
    places: &Places,
    source: usize,
    (chosen, slotless): (&[u32], usize),
    top_k: usize,
) -> Vec<(u32, Row)> {
    let (tokens, total, seed) = (chosen.len() / top_k, places.slot_of.len(), bench.seed);
    let weights = bench.random_of(DType::F32, tokens, top_k, 1.0);
    let same =
        |name: &str, got: Vec<u32>, want: Vec<u32>| assert_eq!(got, want, "{name}: {what}, seed {seed}");
    let experts_of = |token: usize| &chosen[token * top_k..(token + 1) * top_k];
    let pairs = |token: usize| places.pairs_of(experts_of(token), weights.row(token));
    let kept = bench.room(DType::F32, tokens, 1);
    let slots = bench.room(DType::U32, tokens, top_k);
    let slot_weights = bench.room(DType::F32, tokens, top_k);
    bench.run(
        what,
        AssignSlots {
            experts: bench.put_words(chosen, top_k).view,
            weights: bench.put_as(DType::F32, &weights).view,
            slot_of: bench.put_words(&places.slot_of, places.replicas).view,
            slots: slots.view.clone(),
            slot_weights: slot_weights.view.clone(),
            slotless: (slotless > 0).then(|| Slotless { experts: slotless, weights: kept.view.clone() }),
        },
    );
    let all: Vec<(u32, f32)> = (0..tokens).flat_map(pairs).collect();
    let slots_of = |token: usize| filled(pairs(token).into_iter().map(|pair| pair.0), top_k);
    let weights_of = |token: usize| {
        let weights = pairs(token).into_iter().map(|pair| pair.1);
        weights.chain(std::iter::repeat(0.0)).take(top_k).collect::<Vec<f32>>()
    };
    same("slots", bench.get_words(what, &slots), (0..tokens).flat_map(slots_of).collect());
    bench.check_exactly(what, &slot_weights, &(0..tokens).flat_map(weights_of).collect::<Vec<_>>());
    if slotless > 0 {
        let with_slots = places.slot_of.len() / places.replicas;
        let kept_of = |token: usize| {
            let pairs = experts_of(token).iter().zip(weights.row(token));
            let mut kept: Vec<_> = pairs.filter(|(expert, _)| **expert as usize >= with_slots).collect();
            kept.sort_by_key(|(expert, _)| **expert);
            kept.into_iter().map(|(_, weight)| *weight).sum::<f32>()
        };
        bench.check_exactly(what, &kept, &(0..tokens).map(kept_of).collect::<Vec<_>>());
    }
    if places.starts.len() == 2 {
        // In place, where tokens may have no slot at all.
        let row = |token| Row { source, token, slots: pairs(token) };
        let rows: Vec<Row> = (0..tokens).map(row).collect();
        sorted(bench, &format!("{what}, in place"), &rows, &slots.view, None, total);
    }

    spread(
        bench,
        what,
        places,
        &(0..tokens).map(pairs).collect::<Vec<_>>(),
        [&slots.view, &slot_weights.view],
    );

    let mut rows: Vec<(u32, u32, Row)> = Vec::new();
    for token in 0..tokens {
        let pairs = pairs(token);
        for run in pairs.chunk_by(|left, right| places.rank_of(left.0) == places.rank_of(right.0)) {
            let start = places.starts[places.rank_of(run[0].0)] as u32;
            let slots = run.iter().map(|&(slot, weight)| (slot - start, weight)).collect();
            rows.push((run[0].0, run[run.len() - 1].0, Row { source, token, slots }));
        }
    }
    let count =
        |of: &dyn Fn(u32) -> usize| (0..total as u32).map(|slot| of(slot) as u32).collect::<Vec<u32>>();
    let histograms = [
        count(&|slot| all.iter().filter(|pair| pair.0 == slot).count()),
        count(&|slot| rows.iter().filter(|row| row.0 == slot).count()),
        count(&|slot| rows.iter().filter(|row| row.1 == slot).count()),
    ];
    let (block_starts, counts) =
        (bench.put_words(&places.block_starts(), 1), bench.room(DType::U32, 3, total));
    let (blocks, counted) = (block_starts.view.clone(), counts.view.clone());
    bench.run(
        what,
        CountSlots { slots: slots.view.clone(), block_starts: blocks.clone(), counts: counted.clone() },
    );
    same("counts", bench.get_words(what, &counts), histograms.concat());

    rows.sort_by_key(|row| (row.0, row.2.token));
    let words = |width| bench.room(DType::U32, rows.len(), width);
    let (tokens_out, last, metadata) = (words(1), words(1), words(2 * top_k));
    let most = top_k.min(places.starts.len() - 1);
    let sums = bench.room(DType::U32, tokens, most);
    bench.run(
        what,
        SendOrder {
            slots: slots.view.clone(),
            weights: slot_weights.view.clone(),
            block_starts: blocks,
            counts: counted,
            tokens: tokens_out.view.clone(),
            last: last.view.clone(),
            metadata: metadata.view.clone(),
            sums: sums.view.clone(),
        },
    );
    same("tokens", bench.get_words(what, &tokens_out), rows.iter().map(|row| row.2.token as u32).collect());
    same("last", bench.get_words(what, &last), rows.iter().map(|row| row.1).collect());
    let written = rows.iter().flat_map(|row| metadata_of(&row.2, top_k)).collect();
    same("metadata", bench.get_words(what, &metadata), written);
    // Sums come back by last slot, then as the rows left.
    let mut back: Vec<usize> = (0..rows.len()).collect();
    back.sort_by_key(|&row| (rows[row].1, row));
    let sums_of = |token: usize| {
        let mut of: Vec<(u32, u32)> = back
            .iter()
            .enumerate()
            .filter(|&(_, &row)| rows[row].2.token == token)
            .map(|(at, &row)| (rows[row].0, at as u32))
            .collect();
        of.sort_unstable();
        filled(of.into_iter().map(|sum| sum.1), most)
    };
    same("sums", bench.get_words(what, &sums), (0..tokens).flat_map(sums_of).collect());
    rows.into_iter().map(|(first, _, row)| (first, row)).collect()
}

/// What every rank is told of all tokens, whose slots and weights are `pairs`.
fn spread<B: Backend>(
    bench: &Bench<B>,
    what: &str,
    places: &Places,
    pairs: &[Vec<(u32, f32)>],
    [slots, weights]: [&Buffer; 2],
) {
    let (ranks, tokens, top_k, seed) = (places.starts.len() - 1, pairs.len(), slots.width, bench.seed);
    let rank_starts: Vec<u32> = places.starts.iter().map(|&start| start as u32).collect();
    let most = top_k.min(ranks);
    let (metadata, sums) =
        (bench.room(DType::U32, ranks * tokens, 2 * top_k), bench.room(DType::U32, tokens, most));
    bench.run(
        what,
        SpreadSlots {
            slots: slots.clone(),
            weights: weights.clone(),
            rank_starts: bench.put_words(&rank_starts, 1).view,
            metadata: metadata.view.clone(),
            sums: sums.view.clone(),
        },
    );
    let row = |rank: usize, token: usize| {
        let here = pairs[token].iter().filter(|pair| places.rank_of(pair.0) == rank);
        let slots = here.map(|&(slot, weight)| (slot - rank_starts[rank], weight)).collect();
        Row { source: 0, token, slots }
    };
    let of_rank = |rank| (0..tokens).flat_map(move |token| metadata_of(&row(rank, token), top_k));
    let want: Vec<u32> = (0..ranks).flat_map(of_rank).collect();
    assert_eq!(bench.get_words(what, &metadata), want, "metadata for all: {what}, seed {seed}");
    let sums_of = |token| {
        let with = (0..ranks).filter(|&rank| !row(rank, token).slots.is_empty());
        filled(with.map(|rank| (rank * tokens + token) as u32), most)
    };
    let want: Vec<u32> = (0..tokens).flat_map(sums_of).collect();
    assert_eq!(bench.get_words(what, &sums), want, "sums from all: {what}, seed {seed}");
}

fn filled(words: impl Iterator<Item = u32>, width: usize) -> Vec<u32> {
    words.chain(std::iter::repeat(NONE)).take(width).collect()
}

fn metadata_of(row: &Row, top_k: usize) -> Vec<u32> {
    let weights = row.slots.iter().map(|pair| pair.1.to_bits()).chain(std::iter::repeat(0)).take(top_k);
    filled(row.slots.iter().map(|pair| pair.0), top_k).into_iter().chain(weights).collect()
}

/// What the slots' rank makes of rows that came source by source, cut into random stages; and in place.
fn received<B: Backend>(
    bench: &Bench<B>,
    what: &str,
    rows: &[Row],
    sources: usize,
    local: usize,
    top_k: usize,
) {
    let words: Vec<u32> = rows.iter().flat_map(|row| metadata_of(row, top_k)).collect();
    let metadata = bench.put_words(&words, 2 * top_k).view;
    let slots = metadata.columns(0..top_k).expect("inside");
    let weights =
        metadata.columns(top_k..2 * top_k).and_then(|bits| bits.bits_as(DType::F32)).expect("inside");
    let mut cuts: Vec<u32> = (0..bench.below(3)).map(|_| bench.below(local + 1) as u32).collect();
    cuts.sort_unstable();
    let stage = |slot: u32| cuts.partition_point(|&cut| cut <= slot);
    let Orders { order, sums, bins } = Orders::of(rows, sources, local, stage);
    let column = || bench.room(DType::U32, rows.len(), 1);
    let (order_out, sums_out) = (column(), column());
    bench.run(
        what,
        ReceiveOrder {
            slots: slots.clone(),
            bins: bench.put_words(&bins, ReceiveOrder::BIN).view,
            local,
            order: order_out.view.clone(),
            sums: sums_out.view.clone(),
        },
    );
    let seed = bench.seed;
    let got = bench.get_words(what, &order_out);
    assert_eq!(got, order.iter().map(|&m| m as u32).collect::<Vec<_>>(), "order: {what}, seed {seed}");
    let place = |m: usize| sums.iter().position(|&other| other == m).expect("all are there") as u32;
    let got = bench.get_words(what, &sums_out);
    assert_eq!(got, (0..rows.len()).map(place).collect::<Vec<_>>(), "sums: {what}, seed {seed}");

    let travelled = Travelled {
        order: order_out.view.clone(),
        sums: sums_out.view.clone(),
        weights,
        factors: bench.room(DType::F32, rows.len(), top_k).view,
    };
    sorted(bench, what, rows, &slots, Some((travelled, &order, &sums)), local);
    sorted(bench, &format!("{what}, in place"), rows, &slots, None, local);
}

/// Where rows and sums are, and what of that the counts tell.
struct Orders {
    /// Rows as they are computed on, and as their sums leave.
    order: Vec<usize>,
    sums: Vec<usize>,
    bins: Vec<u32>,
}

impl Orders {
    fn of(rows: &[Row], sources: usize, local: usize, stage: impl Fn(u32) -> usize) -> Self {
        let mut order: Vec<usize> = (0..rows.len()).collect();
        order.sort_by_key(|&m| (stage(rows[m].first()), rows[m].source, m));
        let mut sums: Vec<usize> = (0..rows.len()).collect();
        sums.sort_by_key(|&m| (stage(rows[m].last()), rows[m].source, rows[m].last(), m));
        let mut bins = Vec::new();
        for source in 0..sources {
            for slot in 0..local as u32 {
                let of = |row: &Row, key: u32| (row.source, key) == (source, slot);
                let first = rows.iter().take_while(|row| (row.source, row.first()) < (source, slot)).count();
                let received = order.iter().position(|&m| of(&rows[m], rows[m].first()));
                let sum = sums.iter().position(|&m| of(&rows[m], rows[m].last()));
                let lasts = rows.iter().filter(|row| of(row, row.last())).count();
                let assigned = rows.iter().filter(|row| row.source == source && row.has(slot)).count();
                let bin = [first, received.unwrap_or(7), sum.unwrap_or(7), lasts, assigned];
                bins.extend(bin.map(|number| number as u32));
            }
        }
        Orders { order, sums, bins }
    }
}

/// Metadata that a rank may send instead of what it announced. Each on a processor of its own, as the first fault is
/// the last.
pub(crate) fn hostile<B: Backend>(fresh: &impl Fn() -> Bench<B>) {
    // One word alone never has the counts that were announced.
    for round in 0..40 {
        let spoiled = Spoiled::random(fresh(), round, 1);
        let (received, ..) = spoiled.receive();
        let fault = received.expect_err(&spoiled.what);
        assert!(fault.message.contains("row"), "{fault}: {}", spoiled.what);
    }
    // Several may, by chance; what is made of them then points nowhere else.
    for round in 40..60 {
        let spoiled = Spoiled::random(fresh(), round, 3);
        if let (Ok(()), order, sums) = spoiled.receive() {
            spoiled.is_harmless(&order, &sums);
        }
    }
}

/// Rows, what was announced of them, and metadata of which some words are others.
struct Spoiled<B: Backend> {
    bench: Bench<B>,
    rows: Vec<Row>,
    bins: Vec<u32>,
    local: usize,
    /// `[rows, k]`
    slots: Buffer,
    what: String,
}

impl<B: Backend> Spoiled<B> {
    fn random(bench: Bench<B>, round: u64, spoiled: usize) -> Self {
        let mix = &mut Mix::keyed(bench.seed, &[round]);
        let (sources, local, top_k) = (1 + mix.below(3), 1 + mix.below(5), 1 + mix.below(4));
        let rows = random_rows(mix, sources, local, top_k);
        let cut = mix.below(local + 1) as u32;
        let Orders { bins, .. } = Orders::of(&rows, sources, local, |slot| usize::from(slot >= cut));
        let mut words: Vec<u32> = rows.iter().flat_map(|row| metadata_of(row, top_k)).collect();
        for _ in 0..spoiled {
            let at = 2 * top_k * mix.below(rows.len()) + mix.below(top_k);
            let any = mix.next_u64() as u32;
            let mut odd = vec![0, 1, local as u32 - 1, local as u32, NONE, NONE - 1, 1 << 31, any];
            odd.retain(|&word| word != words[at]);
            words[at] = odd[mix.below(odd.len())];
        }
        let what = format!("seed {}, round {round}: {words:?} of {rows:?}", bench.seed);
        let slots = bench.put_words(&words, 2 * top_k).view.columns(0..top_k).expect("inside");
        Spoiled { bench, rows, bins, local, slots, what }
    }

    /// How it ends, and the order and the sums that it leaves behind.
    fn receive(&self) -> (Result<(), Fault>, Placed, Placed) {
        let Spoiled { bench, rows, local, .. } = self;
        let column = || bench.room(DType::U32, rows.len(), 1);
        let (order, sums) = (column(), column());
        let receive = ReceiveOrder {
            slots: self.slots.clone(),
            bins: bench.put_words(&self.bins, ReceiveOrder::BIN).view,
            local: *local,
            order: order.view.clone(),
            sums: sums.view.clone(),
        };
        (bench.try_run(receive.into()).expect("it fits"), order, sums)
    }

    /// What was accepted points at rows that are there, each once, and so does what is sorted by it.
    fn is_harmless(&self, order: &Placed, sums: &Placed) {
        let Spoiled { bench, rows, local, what, .. } = self;
        for placed in [order, sums] {
            let mut places = bench.get_words(what, placed);
            places.sort_unstable();
            assert!(places.iter().copied().eq(0..rows.len() as u32), "{places:?}: {what}");
        }
        let assigned: usize = rows.iter().map(|row| row.slots.len()).sum();
        let starts = bench.room(DType::U32, local + 1, 1);
        let (of_assignment, terms) =
            (bench.room(DType::U32, assigned, 1), bench.room(DType::U32, rows.len(), self.slots.width));
        let sort = SortBySlot {
            slots: self.slots.clone(),
            travelled: None,
            starts: starts.view.clone(),
            rows: of_assignment.view.clone(),
            terms: terms.view.clone(),
        };
        bench.try_run(sort.into()).expect("it fits").unwrap_or_else(|fault| panic!("{fault}: {what}"));
        let in_range = |placed, end: usize| {
            bench.get_words(what, placed).into_iter().all(|it| it == NONE || (it as usize) < end)
        };
        assert!(in_range(&terms, assigned) && in_range(&of_assignment, rows.len()), "{what}");
        assert!(in_range(&starts, assigned + 1), "{what}");
    }
}

/// Some rows from every source, in the order in which they come.
fn random_rows(mix: &mut Mix, sources: usize, local: usize, top_k: usize) -> Vec<Row> {
    let mut rows = Vec::new();
    for source in 0..sources {
        for token in 0..1 + mix.below(6) {
            let wanted = 1 + mix.below(top_k.min(local));
            let mut slots: Vec<u32> = (0..local as u32).collect();
            while slots.len() > wanted {
                slots.remove(mix.below(slots.len()));
            }
            rows.push(Row { source, token, slots: slots.into_iter().map(|slot| (slot, 0.5)).collect() });
        }
    }
    rows.sort_by_key(|row| (row.source, row.first(), row.token));
    rows
}

fn sorted<B: Backend>(
    bench: &Bench<B>,
    what: &str,
    rows: &[Row],
    slots: &Buffer,
    travelled: Option<(Travelled, &[usize], &[usize])>,
    local: usize,
) {
    let in_place: Vec<usize> = (0..rows.len()).collect();
    let (travelled, order, sums) = match travelled {
        Some((travelled, order, sums)) => (Some(travelled), order, sums),
        None => (None, in_place.as_slice(), in_place.as_slice()),
    };
    let (seed, top_k) = (bench.seed, slots.width);
    // (slot, row in order, metadata row): one of each assignment.
    let mut all: Vec<(u32, usize, usize)> = Vec::new();
    for (at, &m) in order.iter().enumerate() {
        all.extend(rows[m].slots.iter().map(|&(slot, _)| (slot, at, m)));
    }
    all.sort_unstable();
    let starts = bench.room(DType::U32, local + 1, 1);
    // In place there may be fewer than there is room for.
    let room = if travelled.is_some() { all.len() } else { rows.len() * top_k };
    let of_assignment = bench.room(DType::U32, room, 1);
    let terms = bench.room(DType::U32, rows.len(), top_k);
    bench.run(
        what,
        SortBySlot {
            slots: slots.clone(),
            travelled: travelled.clone(),
            starts: starts.view.clone(),
            rows: of_assignment.view.clone(),
            terms: terms.view.clone(),
        },
    );
    let before = |slot: usize| all.iter().filter(|of| (of.0 as usize) < slot).count() as u32;
    let got = bench.get_words(what, &starts);
    assert_eq!(got, (0..=local).map(before).collect::<Vec<_>>(), "starts: {what}, seed {seed}");
    let got = bench.get_words(what, &of_assignment);
    let rows_of = all.iter().map(|of| of.1 as u32).chain(std::iter::repeat(NONE)).take(room);
    assert_eq!(got, rows_of.collect::<Vec<_>>(), "rows: {what}, seed {seed}");
    let number = |m: usize, slot: u32| {
        all.iter().position(|of| (of.0, of.2) == (slot, m)).expect("every assignment is there") as u32
    };
    let of_sum = |&m: &usize| filled(rows[m].slots.iter().map(|&(slot, _)| number(m, slot)), top_k);
    let got = bench.get_words(what, &terms);
    assert_eq!(got, sums.iter().flat_map(of_sum).collect::<Vec<_>>(), "terms: {what}, seed {seed}");
    if let Some(Travelled { factors, .. }) = travelled {
        let weights = |&m: &usize| {
            let own = rows[m].slots.iter().map(|pair| pair.1);
            own.chain(std::iter::repeat(0.0)).take(top_k).collect::<Vec<_>>()
        };
        let got = bench.device.read_f32(&factors).expect("ordered by the host");
        assert_eq!(got, sums.iter().flat_map(weights).collect::<Vec<_>>(), "factors: {what}, seed {seed}");
    }
}
