//! The index arrays of an MoE layer on a host processor: counting sorts, one walk each.

use super::Kernels;
use super::memory::View;
use super::rows::{Rows, in_range};
use crate::op::{AssignSlots, CountSlots, NONE, ReceiveOrder, SendOrder, SortBySlot, SpreadSlots};

impl<K: Kernels> Rows<'_, K> {
    pub(super) fn assign_slots(&self, op: &AssignSlots) -> Result<(), String> {
        let (experts, weights) = (self.view::<u32>(&op.experts), self.view::<f32>(&op.weights));
        let slot_of = self.view::<u32>(&op.slot_of);
        let (mut slots, mut slot_weights) =
            (self.view_mut::<u32>(&op.slots), self.view_mut::<f32>(&op.slot_weights));
        let with_slots = slot_of.rows;
        let all = with_slots + op.slotless.as_ref().map_or(0, |slotless| slotless.experts);
        let mut kept = op.slotless.as_ref().map(|slotless| self.view_mut::<f32>(&slotless.weights));
        for t in 0..experts.rows {
            let (experts, weights) = (experts.row(t), weights.row(t));
            let (slots, slot_weights) = (slots.row(t), slot_weights.row(t));
            let replica = experts.iter().copied().fold(0, u32::wrapping_add) as usize % slot_of.width;
            // Insertion sort: k is small, and routers often answer in order.
            let mut sorted = 0;
            for (&expert, &weight) in experts.iter().zip(weights) {
                let number = in_range("expert", expert, all)?;
                if number >= with_slots {
                    continue;
                }
                let slot = slot_of.row(number)[replica];
                let mut at = sorted;
                while at > 0 && slots[at - 1] > slot {
                    (slots[at], slot_weights[at]) = (slots[at - 1], slot_weights[at - 1]);
                    at -= 1;
                }
                if at > 0 && slots[at - 1] == slot {
                    return Err(format!("token {t} is sent to expert {expert} twice"));
                }
                (slots[at], slot_weights[at]) = (slot, weight);
                sorted += 1;
            }
            slots[sorted..].fill(NONE);
            slot_weights[sorted..].fill(0.0);
            if let Some(kept) = &mut kept {
                kept.row(t)[0] = weight_from(with_slots as u32, experts, weights);
            }
        }
        Ok(())
    }

    pub(super) fn count_slots(&self, op: &CountSlots) -> Result<(), String> {
        let (slots, block_starts) = (self.view::<u32>(&op.slots), self.view::<u32>(&op.block_starts));
        let mut counts = vec![[0u32; 3]; block_starts.rows];
        for t in 0..slots.rows {
            for run in runs(slots.row(t), &block_starts)? {
                run.iter().for_each(|&slot| counts[slot as usize][0] += 1);
                counts[run[0] as usize][1] += 1;
                counts[run[run.len() - 1] as usize][2] += 1;
            }
        }
        let mut out = self.view_mut::<u32>(&op.counts);
        for which in 0..3 {
            out.row(which).iter_mut().zip(&counts).for_each(|(out, counts)| *out = counts[which]);
        }
        Ok(())
    }

    pub(super) fn send_order(&self, op: &SendOrder) -> Result<(), String> {
        let (slots, weights) = (self.view::<u32>(&op.slots), self.view::<f32>(&op.weights));
        let (block_starts, counts) = (self.view::<u32>(&op.block_starts), self.view::<u32>(&op.counts));
        let (mut tokens, mut last) = (self.view_mut::<u32>(&op.tokens), self.view_mut::<u32>(&op.last));
        let (mut metadata, mut sums) = (self.view_mut::<u32>(&op.metadata), self.view_mut::<u32>(&op.sums));
        let (rows, top_k) = (tokens.rows, slots.width);
        // next[s]: where the next row with first slot s goes.
        let mut next = starts(counts.row(1), rows)?;
        for t in 0..slots.rows {
            let mut from = 0;
            for run in runs(slots.row(t), &block_starts)? {
                let row = taken(&mut next[run[0] as usize], rows)?;
                tokens.row(row)[0] = t as u32;
                last.row(row)[0] = run[run.len() - 1];
                let (ids, bits) = metadata.row(row).split_at_mut(top_k);
                let first = block_starts.at(run[0] as usize);
                let weights = &weights.row(t)[from..from + run.len()];
                ids.fill(NONE);
                bits.fill(0);
                ids.iter_mut().zip(run).for_each(|(id, slot)| *id = slot - first);
                bits.iter_mut().zip(weights).for_each(|(bits, weight)| *bits = weight.to_bits());
                from += run.len();
            }
            sums.row(t).fill(NONE);
        }
        // next[s]: where the next sum with last slot s comes back. Rows leave in rank order, so each token's sums are
        // found in rank order too.
        let mut next = starts(counts.row(2), rows)?;
        let mut found = vec![0; slots.rows];
        for row in 0..rows {
            let (token, slot) = (tokens.row(row)[0] as usize, last.row(row)[0] as usize);
            let place = found[token];
            found[token] += 1;
            let sum = taken(&mut next[slot], rows)? as u32;
            *sums.row(token).get_mut(place).ok_or_else(|| too_many_ranks(token, place))? = sum;
        }
        Ok(())
    }

    pub(super) fn spread_slots(&self, op: &SpreadSlots) -> Result<(), String> {
        let (slots, weights) = (self.view::<u32>(&op.slots), self.view::<f32>(&op.weights));
        let rank_starts = self.view::<u32>(&op.rank_starts);
        let (mut metadata, mut sums) = (self.view_mut::<u32>(&op.metadata), self.view_mut::<u32>(&op.sums));
        let (tokens, ranks, top_k) = (slots.rows, rank_starts.rows - 1, slots.width);
        for token in 0..tokens {
            let (slots, weights) = (used(slots.row(token)), weights.row(token));
            if let Some(&last) = slots.last() {
                in_range("slot", last, rank_starts.at(ranks) as usize)?;
            }
            let (mut from, mut found) = (0, 0);
            for rank in 0..ranks {
                let (start, end) = (rank_starts.at(rank), rank_starts.at(rank + 1));
                let here = from..slots.partition_point(|&slot| slot < end);
                let row = rank * tokens + token;
                let (ids, bits) = metadata.row(row).split_at_mut(top_k);
                ids.fill(NONE);
                bits.fill(0);
                ids.iter_mut().zip(&slots[here.clone()]).for_each(|(id, slot)| *id = slot - start);
                bits.iter_mut()
                    .zip(&weights[here.clone()])
                    .for_each(|(bits, weight)| *bits = weight.to_bits());
                from = here.end;
                if !here.is_empty() {
                    *sums.row(token).get_mut(found).ok_or_else(|| too_many_ranks(token, found))? = row as u32;
                    found += 1;
                }
            }
            sums.row(token)[found..].fill(NONE);
        }
        Ok(())
    }

    pub(super) fn receive_order(&self, op: &ReceiveOrder) -> Result<(), String> {
        let (slots, bins) = (self.view::<u32>(&op.slots), self.view::<u32>(&op.bins));
        let (mut order, mut sums) = (self.view_mut::<u32>(&op.order), self.view_mut::<u32>(&op.sums));
        let (rows, local) = (slots.rows, op.local);
        let ends = |bin: usize| if bin + 1 < bins.rows { bins.row(bin + 1)[0] as usize } else { rows };
        // [source, slot] rows seen with this last slot, and with this slot.
        let mut seen = vec![[0u32; 2]; bins.rows];
        let mut bin = 0;
        for m in 0..rows {
            while bin < bins.rows && ends(bin) <= m {
                bin += 1;
            }
            let (source, first) = (bin / local, bin % local);
            let refuse = |what: &str, got: u32, want: &str| {
                Err(format!("row {m}, from source {source}: {what} is {got}, expected {want}"))
            };
            let ids = slots.row(m);
            let used = ids.iter().position(|&slot| slot == NONE).unwrap_or(ids.len());
            if let Some(&stray) = ids[used..].iter().find(|&&slot| slot != NONE) {
                return refuse("the place behind its slots", stray, "none");
            }
            if let Some(pair) = ids[..used].windows(2).find(|pair| pair[0] >= pair[1]) {
                return refuse("a slot", pair[1], &format!("more than {}", pair[0]));
            }
            let Some(last) = used.checked_sub(1).map(|last| ids[last]) else {
                return refuse("its number of slots", 0, "at least 1");
            };
            if last as usize >= local {
                return refuse("a slot", last, &format!("less than {local}"));
            }
            if bin >= bins.rows || ids[0] as usize != first {
                return refuse("its first slot", ids[0], &first.to_string());
            }
            for &slot in &ids[..used] {
                let (with_slot, announced) = (
                    &mut seen[source * local + slot as usize][1],
                    bins.row(source * local + slot as usize)[4],
                );
                if *with_slot >= announced {
                    return Err(format!(
                        "row {m}, from source {source}: it has slot {slot}, expected {announced} such rows"
                    ));
                }
                *with_slot += 1;
            }
            let (start, of_last) = (bins.row(bin), source * local + last as usize);
            let announced = bins.row(of_last);
            let before = seen[of_last][0];
            if before >= announced[3] {
                return Err(format!(
                    "row {m}, from source {source}: it has last slot {last}, expected at most {} such rows",
                    announced[3]
                ));
            }
            seen[of_last][0] += 1;
            let received = start[1].wrapping_add(m as u32 - start[0]);
            order.row(in_range("receive row", received, rows)?)[0] = m as u32;
            sums.row(m)[0] = in_range("sum", announced[2].wrapping_add(before), rows)? as u32;
        }
        for slot in 0..local {
            let of_slot = || (slot..bins.rows).step_by(local);
            let got: u32 = of_slot().map(|bin| seen[bin][1]).sum();
            let want: u32 = of_slot().map(|bin| bins.row(bin)[4]).sum();
            if got != want {
                return Err(format!("{got} rows have slot {slot}, expected {want}"));
            }
        }
        Ok(())
    }

    pub(super) fn sort_by_slot(&self, op: &SortBySlot) -> Result<(), String> {
        let slots = self.view::<u32>(&op.slots);
        let (mut starts_out, mut rows) = (self.view_mut::<u32>(&op.starts), self.view_mut::<u32>(&op.rows));
        let mut terms = self.view_mut::<u32>(&op.terms);
        let local = starts_out.rows - 1;
        let mut counts = vec![0u32; local];
        for slot in slots.iter().flat_map(|ids| ids.iter().take_while(|&&slot| slot != NONE)) {
            counts[in_range("slot", *slot, local)?] += 1;
        }
        let total: u64 = counts.iter().map(|&count| u64::from(count)).sum();
        let fewer = op.travelled.is_none() && total < rows.rows as u64;
        if total != rows.rows as u64 && !fewer {
            return Err(format!("there are {total} assignments, expected {}", rows.rows));
        }
        // next[s]: the number of slot s's next assignment.
        let total = total as usize;
        let mut next = starts(&counts, total)?;
        (total..rows.rows).for_each(|unused| rows.row(unused)[0] = NONE);
        for (slot, &start) in next.iter().enumerate() {
            starts_out.row(slot)[0] = start;
        }
        starts_out.row(local)[0] = total as u32;
        let mut each = |row: usize, ids: &[u32], terms: &mut [u32]| -> Result<(), String> {
            terms.fill(NONE);
            for (term, &slot) in terms.iter_mut().zip(ids.iter().take_while(|&&slot| slot != NONE)) {
                *term = taken(&mut next[slot as usize], rows.rows)? as u32;
                rows.row(*term as usize)[0] = row as u32;
            }
            Ok(())
        };
        let Some(travelled) = &op.travelled else {
            return (0..slots.rows).try_for_each(|row| each(row, slots.row(row), terms.row(row)));
        };
        let (order, sums) = (self.view::<u32>(&travelled.order), self.view::<u32>(&travelled.sums));
        let (weights, mut factors) =
            (self.view::<f32>(&travelled.weights), self.view_mut::<f32>(&travelled.factors));
        for row in 0..slots.rows {
            let m = in_range("row", order.at(row), slots.rows)?;
            let sum = in_range("sum", sums.at(m), slots.rows)?;
            each(row, slots.row(m), terms.row(sum))?;
            factors.row(sum).copy_from_slice(weights.row(m));
        }
        Ok(())
    }
}

/// The weights of a token's experts from number `first` on, added in the order of their numbers.
fn weight_from(first: u32, experts: &[u32], weights: &[f32]) -> f32 {
    let pairs = experts.iter().zip(weights).filter(|(expert, _)| **expert >= first);
    let mut pairs: Vec<(u32, f32)> = pairs.map(|(&expert, &weight)| (expert, weight)).collect();
    pairs.sort_unstable_by_key(|&(expert, _)| expert);
    pairs.into_iter().map(|(_, weight)| weight).sum()
}

/// A token's slots, rank by rank; every slot is below the number of slots.
fn runs<'a>(
    slots: &'a [u32],
    block_starts: &View<'a, u32>,
) -> Result<impl Iterator<Item = &'a [u32]> + use<'a>, String> {
    let slots = used(slots);
    slots.iter().try_for_each(|&slot| in_range("slot", slot, block_starts.rows).map(drop))?;
    let block_starts = *block_starts;
    let block = move |slot: u32| block_starts.at(slot as usize);
    Ok(slots.chunk_by(move |&left, &right| block(left) == block(right)))
}

/// The slots of a row that NONE fills up.
fn used(slots: &[u32]) -> &[u32] {
    &slots[..slots.iter().position(|&slot| slot == NONE).unwrap_or(slots.len())]
}

fn too_many_ranks(token: usize, most: usize) -> String {
    format!("token {token} is sent to more than {most} ranks, which is all there is room for")
}

/// Where each bin of a histogram starts; all of them together are `total`.
fn starts(histogram: &[u32], total: usize) -> Result<Vec<u32>, String> {
    let mut end = 0u64;
    let starts = histogram.iter().map(|&count| {
        let start = end as u32;
        end += u64::from(count);
        start
    });
    let starts = starts.collect();
    if end == total as u64 { Ok(starts) } else { Err(format!("{end} rows are counted, expected {total}")) }
}

/// The next place of a bin.
fn taken(next: &mut u32, places: usize) -> Result<usize, String> {
    let place = in_range("row", *next, places)?;
    *next += 1;
    Ok(place)
}
