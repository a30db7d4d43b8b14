//! The ranks that are not there when one rank of a world is [emulated](epsmoe_fabric::Fabric::emulated): where their
//! tokens go is known layer by layer, so that counts, traffic and metadata are those of a whole world.

use crate::count_message::CountMessage;
use epsmoe_base::{Layer, Place, Rank};
use epsmoe_device::op::NONE;
use epsmoe_fabric::Peers;
use epsmoe_plan::{Routing, SlotMap, TokenHistograms};
use std::collections::{BTreeMap, VecDeque};
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Peers with tokens of their own. A layer that nothing was told about has mirrored ones: they send what this rank sends
/// to itself.
pub struct RoutedPeers {
    /// The rank that is there.
    rank: Rank,
    layers: Mutex<BTreeMap<Layer, PeerLayer>>,
}

/// The tokens of all ranks in one layer.
struct PeerLayer {
    map: Arc<SlotMap>,
    /// `[R]`; that of the rank that is there is not looked at.
    routings: Vec<Routing>,
    /// What ranges of the tokens are as messages and metadata: made once.
    made: BTreeMap<(usize, usize), Arc<Made>>,
    /// Batches of the last count exchange whose metadata has not travelled yet.
    coming: VecDeque<Arc<Made>>,
}

/// Some tokens of all ranks.
struct Made {
    /// `[R]` their counts, as the others hear them.
    counts: Vec<Vec<u8>>,
    /// `[R]` metadata of the rows that each sends to the rank that is there.
    metadata: Vec<Arc<[u32]>>,
}

impl RoutedPeers {
    /// Peers of `rank` about whom nothing is known yet.
    pub fn new(rank: Rank) -> Self {
        RoutedPeers { rank, layers: Mutex::default() }
    }

    /// Where the tokens of all ranks go in a layer, by rank. However many tokens the rank that is there has in a step, each
    /// of the others has as many: its first ones, from the beginning again where they are too few.
    pub fn learn(&self, layer: Layer, map: &Arc<SlotMap>, routings: Vec<Routing>) {
        let (made, coming) = (BTreeMap::new(), VecDeque::new());
        let known = PeerLayer { map: Arc::clone(map), routings, made, coming };
        self.layers().insert(layer, known);
    }

    fn layers(&self) -> MutexGuard<'_, BTreeMap<Layer, PeerLayer>> {
        self.layers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl PeerLayer {
    /// The tokens of `range` on all ranks.
    fn make(&mut self, rank: Rank, range: Range<usize>) -> Result<Arc<Made>, String> {
        let key = (range.start, range.len());
        if let Some(made) = self.made.get(&key) {
            return Ok(Arc::clone(made));
        }
        let mut made = Made { counts: Vec::new(), metadata: Vec::new() };
        for routing in &self.routings {
            let routing = repeated(&self.map, routing, range.clone())?;
            let assigned = routing.assign(&self.map).map_err(|error| error.to_string())?;
            made.counts.push(TokenHistograms::of(&assigned).encode());
            made.metadata.push(metadata(&self.map, &routing, rank)?);
        }
        let made = Arc::new(made);
        self.made.insert(key, Arc::clone(&made));
        Ok(made)
    }
}

/// The tokens of `range`, counted round and round.
fn repeated(map: &SlotMap, routing: &Routing, range: Range<usize>) -> Result<Routing, String> {
    let (tokens, top_k) = (routing.tokens(), routing.top_k());
    if tokens == 0 {
        return Ok(routing.clone());
    }
    let (mut experts, mut weights) = (Vec::new(), Vec::new());
    for token in range {
        let pairs = token % tokens * top_k..(token % tokens + 1) * top_k;
        experts.extend_from_slice(&routing.experts()[pairs.clone()]);
        weights.extend_from_slice(&routing.weights()[pairs]);
    }
    Routing::new(map.experts(), top_k, experts, weights).map_err(|error| error.to_string())
}

/// What [`SendOrder`](epsmoe_device::op::SendOrder) writes for the rows to `rank`: by first slot, then token, k slots
/// counted on the rank, then the bits of their weights.
fn metadata(map: &SlotMap, routing: &Routing, rank: Rank) -> Result<Arc<[u32]>, String> {
    let (slots, top_k) = (map.slots_of_rank(rank), routing.top_k());
    let assigned = routing.assign(map).map_err(|error| error.to_string())?;
    // [local slot] the rows that have it first.
    let mut by_first: Vec<Vec<u32>> = vec![Vec::new(); slots.len()];
    let pairs = assigned.slots().chunks_exact(top_k).zip(assigned.weights().chunks_exact(top_k));
    for (of_token, weights) in pairs {
        let here = |slot: &u32| slots.contains(&(*slot as usize));
        let mut row = vec![NONE; top_k];
        row.resize(2 * top_k, 0);
        let on_rank = of_token.iter().zip(weights).filter(|(slot, _)| here(slot));
        for (place, (slot, weight)) in on_rank.enumerate() {
            row[place] = slot - slots.start as u32;
            row[top_k + place] = weight.to_bits();
        }
        if row[0] != NONE {
            by_first[row[0] as usize].extend(row);
        }
    }
    Ok(by_first.concat().into())
}

impl Peers for RoutedPeers {
    fn messages(
        &self,
        what: &'static str,
        place: Place,
        own: &[u8],
        size: usize,
    ) -> Result<Vec<Vec<u8>>, String> {
        let mut layers = self.layers();
        let known = place.layer.and_then(|layer| layers.get_mut(&layer)).filter(|_| what == "count exchange");
        let Some(known) = known else { return Ok(vec![own.to_vec(); size]) };
        let message = CountMessage::decode(own, known.map.slots()).map_err(|error| error.to_string())?;
        known.coming.clear();
        let mut start = 0;
        for batch in &message.counts {
            let end = start + batch.tokens as usize;
            let made = known.make(self.rank, start..end)?;
            known.coming.push_back(made);
            start = end;
        }
        // All but the counts is what this rank says.
        let (head, tail) = message.around_counts(own, known.map.slots());
        let of_rank = |rank: usize| {
            let counts = known.coming.iter().map(|made| made.counts[rank].as_slice());
            let parts = std::iter::once(head).chain(counts).chain([tail]);
            if rank == self.rank.0 { own.to_vec() } else { parts.collect::<Vec<_>>().concat() }
        };
        Ok((0..known.routings.len()).map(of_rank).collect())
    }

    fn rows(&self, name: &'static str, place: Place) -> Option<Vec<Arc<[u32]>>> {
        if name != "metadata" {
            return None;
        }
        let made = self.layers().get_mut(&place.layer?)?.coming.pop_front()?;
        Some(made.metadata.clone())
    }
}
