//! What travels with a row: which experts it is for, and how much of each. Fixed width, so that the records of
//! two ranks are rows × words.

use std::ops::Range;

/// A place without an expert.
pub(super) const NONE: u16 = 0xFFFF;

/// 32-bit words of one row's record: ⌈k / 2⌉ words of two 16-bit ids each, then k words of f32 weight bits.
///
/// Ids are local to the rank the row is sent to, ascending, the earlier one in the lower half; `0xFFFF` fills
/// up, and its weight is 0. For k = 3, ids 1 and 7 with weights 0.5 and 0.25 are
/// `[0x0007_0001, 0xFFFF_FFFF, 0x3F00_0000, 0x3E80_0000, 0]`: 5 words.
pub fn record_words(top_k: usize) -> usize {
    top_k.div_ceil(2) + top_k
}

/// Writes the record of a row whose global `experts` all live in the block starting at `first_expert`.
pub(super) fn write(record: &mut [u32], top_k: usize, first_expert: u32, experts: &[u32], weights: &[f32]) {
    let (ids, bits) = record.split_at_mut(top_k.div_ceil(2));
    ids.fill(u32::from(NONE) << 16 | u32::from(NONE));
    for (place, expert) in experts.iter().enumerate() {
        let shift = 16 * (place % 2);
        // Clears the half word, then sets it.
        ids[place / 2] &= !(u32::from(NONE) << shift);
        ids[place / 2] |= (expert - first_expert) << shift;
    }
    bits.fill(0);
    for (bits, weight) in bits.iter_mut().zip(weights) {
        *bits = weight.to_bits();
    }
}

/// One row's record, as it came from another rank.
#[derive(Clone, Copy)]
pub(super) struct Record<'a> {
    ids: &'a [u32],
    weights: &'a [u32],
    top_k: usize,
}

impl<'a> Record<'a> {
    /// The record of `row` among many.
    pub(super) fn at(records: &'a [u32], row: usize, top_k: usize) -> Self {
        let words = record_words(top_k);
        let (ids, weights) = records[row * words..(row + 1) * words].split_at(top_k.div_ceil(2));
        Record { ids, weights, top_k }
    }

    fn id(&self, place: usize) -> u16 {
        (self.ids[place / 2] >> (16 * (place % 2))) as u16
    }

    /// Local expert ids up to the first empty place.
    pub(super) fn experts(self) -> impl Iterator<Item = usize> {
        (0..self.top_k).map(move |place| self.id(place)).take_while(|&id| id != NONE).map(usize::from)
    }

    /// Local expert ids with their weights.
    pub(super) fn pairs(self) -> impl Iterator<Item = (usize, f32)> {
        self.experts().zip(self.weights.iter().map(|&bits| f32::from_bits(bits)))
    }

    /// An id behind an empty place, where none may be.
    pub(super) fn stray(self, filled: usize) -> Option<u16> {
        let places: Range<usize> = filled..2 * self.ids.len();
        places.map(|place| self.id(place)).find(|&id| id != NONE)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn three_places_two_experts() {
        assert_eq!(record_words(3), 5);
        let mut record = [0xAAAA_AAAA; 5];
        write(&mut record, 3, 10, &[11, 17], &[0.5, 0.25]);
        assert_eq!(record, [0x0007_0001, 0xFFFF_FFFF, 0x3F00_0000, 0x3E80_0000, 0]);
        let read = Record::at(&record, 0, 3);
        assert_eq!(read.pairs().collect::<Vec<_>>(), [(1, 0.5), (7, 0.25)]);
        assert_eq!(read.stray(2), None);
        record[1] = 0x0003_FFFF;
        assert_eq!(Record::at(&record, 0, 3).stray(2), Some(3));
    }
}
