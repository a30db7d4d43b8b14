//! The expert rank's view of both: what to do with the rows that arrive.

use super::record::{NONE, Record, record_words};
use super::starts;
use crate::{LayerHistograms, Placement, PlanError, StageTable, Traffic};
use epsmoe_base::{Rank, Stage};

/// How a rank spreads the rows it received over its experts, and folds the experts' outputs into the sums it
/// sends home.
///
/// A *copy* is numbered by (local expert, receive row), so every expert's copies, and every stage's, are
/// consecutive. The copies of a stage read receive rows of that stage and of earlier ones only.
#[derive(Clone, Debug, PartialEq)]
pub struct ArrivalMaps {
    /// `[copies]` the receive row of each copy.
    pub expand: Vec<u32>,
    /// `[L + 1]` where each local expert's copies start.
    pub expert_start: Vec<u32>,
    /// `[rows + 1]` where each combine row's copies start in the two arrays below.
    pub reduce_offsets: Vec<u32>,
    /// `[copies]` copies of each combine row, in ascending expert order: the order in which they are added.
    pub reduce_index: Vec<u32>,
    /// `[copies]` the weight of each.
    pub reduce_weights: Vec<f32>,
}

impl ArrivalMaps {
    /// Maps what arrives at `rank`. `records` are laid out source by source ([`Traffic::record_rows`]), each
    /// [`record_words`] wide. They came from other ranks: whatever in them contradicts `counts` is refused.
    pub fn of(
        placement: &Placement,
        rank: Rank,
        counts: &LayerHistograms,
        table: &StageTable,
        traffic: &Traffic,
        top_k: usize,
        records: &[u32],
    ) -> Result<Self, PlanError> {
        let (rows, copies) = (traffic.rows_received(rank), traffic.copies(rank));
        let (got, want) = (records.len(), rows * record_words(top_k));
        if got != want {
            return Err(PlanError::RecordsLength { rank, got, want });
        }
        let arrival = Arrival { placement, rank, counts, table, traffic, top_k, records };
        let (combine_rows, reduce_offsets) = arrival.combine_rows()?;
        let local = placement.local_count(rank);
        // next[e]: the number of expert e's next copy.
        let mut next: Vec<u32> =
            (0..local).map(|expert| traffic.expert_copies(rank, expert).start as u32).collect();
        let mut maps = ArrivalMaps {
            expert_start: next.iter().copied().chain([copies as u32]).collect(),
            expand: vec![0; copies],
            reduce_offsets,
            reduce_index: vec![0; copies],
            reduce_weights: vec![0.0; copies],
        };
        // In receive order, so that each expert meets its copies in receive order.
        for (receive_row, record_row) in arrival.receive_order() {
            let start = maps.reduce_offsets[combine_rows[record_row] as usize] as usize;
            let pairs = Record::at(records, record_row, top_k).pairs();
            for (place, (expert, weight)) in (start..).zip(pairs) {
                let copy = next[expert];
                next[expert] += 1;
                maps.expand[copy as usize] = receive_row as u32;
                maps.reduce_index[place] = copy;
                maps.reduce_weights[place] = weight;
            }
        }
        Ok(maps)
    }
}

/// What arrives at one rank, and what was announced about it.
struct Arrival<'a> {
    placement: &'a Placement,
    rank: Rank,
    counts: &'a LayerHistograms,
    table: &'a StageTable,
    traffic: &'a Traffic,
    top_k: usize,
    records: &'a [u32],
}

impl Arrival<'_> {
    /// Checks every record; returns the combine row of each record row, and `[rows + 1]` where each combine row's
    /// copies start.
    fn combine_rows(&self) -> Result<(Vec<u32>, Vec<u32>), PlanError> {
        let rows = self.traffic.rows_received(self.rank);
        let mut combine_rows = Vec::with_capacity(rows);
        let mut copies_of_row = vec![0; rows];
        for source in self.placement.all_ranks() {
            let mut check = SourceCheck::new(self, source);
            // next[e]: the combine row of this source's next row with last expert e.
            let mut next = self.combine_starts(source);
            for (row, record_row) in self.traffic.record_rows(self.rank, source).enumerate() {
                let (last, copies) = check.row(row, Record::at(self.records, record_row, self.top_k))?;
                copies_of_row[next[last] as usize] = copies;
                combine_rows.push(next[last]);
                next[last] += 1;
            }
            check.finish()?;
        }
        let offsets = starts(&copies_of_row, 0).chain([self.traffic.copies(self.rank) as u32]).collect();
        Ok((combine_rows, offsets))
    }

    /// `[L]` the first combine row that goes to `home` and whose last expert is each local expert.
    fn combine_starts(&self, home: Rank) -> Vec<u32> {
        let last = &self.counts.of(home).last[self.placement.experts_of(self.rank)];
        let of_stage = |stage| {
            let start = self.traffic.combine_range(self.rank, stage, home).start;
            starts(&last[self.table.experts_of(self.rank, stage)], start as u32)
        };
        (0..self.table.stages()).map(Stage).flat_map(of_stage).collect()
    }

    /// (receive row, record row) of every row, in receive order: the records are by source, then stage.
    fn receive_order(&self) -> impl Iterator<Item = (usize, usize)> {
        let (rank, traffic) = (self.rank, self.traffic);
        let stages = (0..self.table.stages()).map(Stage);
        let parts = stages.flat_map(|stage| self.placement.all_ranks().map(move |source| (stage, source)));
        parts.flat_map(move |(stage, source)| {
            let before =
                traffic.send_range(source, rank, stage).start - traffic.send_rows(source, rank).start;
            let record = traffic.record_rows(rank, source).start + before;
            let part = traffic.receive_range(rank, stage, source);
            part.enumerate().map(move |(offset, receive_row)| (receive_row, record + offset))
        })
    }
}

/// Compares the records of one source with what it announced.
struct SourceCheck<'a> {
    source: Rank,
    announced_copies: &'a [u32],
    announced_last: &'a [u32],
    /// `[L]` copies seen.
    copies: Vec<u32>,
    /// `[L]` rows still to come, by first expert. They come in this order.
    first: Vec<u32>,
    /// The lowest first expert that has rows to come.
    next_first: usize,
    /// `[L]` rows still to come, by last expert.
    last: Vec<u32>,
}

impl<'a> SourceCheck<'a> {
    fn new(arrival: &Arrival<'a>, source: Rank) -> Self {
        let counts = arrival.counts.of(source);
        let block = arrival.placement.experts_of(arrival.rank);
        SourceCheck {
            source,
            copies: vec![0; block.len()],
            first: counts.first[block.clone()].to_vec(),
            next_first: 0,
            last: counts.last[block.clone()].to_vec(),
            announced_last: &counts.last[block.clone()],
            announced_copies: &counts.copies[block],
        }
    }

    /// Checks the source's next row; returns its last expert and its number of copies.
    fn row(&mut self, row: usize, record: Record<'_>) -> Result<(usize, u32), PlanError> {
        let refuse = |what: String, got: usize, want: String| {
            Err(PlanError::Record { from: self.source, row, what, got, want })
        };
        while self.first[self.next_first] == 0 {
            self.next_first += 1;
        }
        let (mut first, mut last, mut copies) = (None, None, 0);
        for expert in record.experts() {
            if expert >= self.copies.len() {
                return refuse("a local expert".into(), expert, format!("at most {}", self.copies.len() - 1));
            }
            if let Some(previous) = last.filter(|&previous| previous >= expert) {
                return refuse(
                    format!("the local expert after {previous}"),
                    expert,
                    format!("at least {}", previous + 1),
                );
            }
            self.copies[expert] += 1;
            first.get_or_insert(expert);
            last = Some(expert);
            copies += 1;
        }
        let (Some(first), Some(last)) = (first, last) else {
            return refuse("its number of experts".into(), 0, "at least 1".into());
        };
        if let Some(stray) = record.stray(copies) {
            return refuse(
                format!("the place behind its {copies} experts"),
                stray.into(),
                format!("{NONE} (none)"),
            );
        }
        if first != self.next_first {
            return refuse("its first local expert".into(), first, self.next_first.to_string());
        }
        if self.last[last] == 0 {
            let announced = self.announced_last[last];
            let what = format!("the number of rows so far with last local expert {last}");
            return refuse(what, announced as usize + 1, format!("at most {announced}"));
        }
        self.first[first] -= 1;
        self.last[last] -= 1;
        Ok((last, copies as u32))
    }

    /// Checks that all announced copies have come.
    fn finish(self) -> Result<(), PlanError> {
        let pairs = self.copies.iter().zip(self.announced_copies);
        match pairs.enumerate().find(|(_, (got, want))| got != want) {
            None => Ok(()),
            Some((expert, (&got, &want))) => {
                Err(PlanError::RecordCopies { from: self.source, expert, got, want })
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::{SendMap, example};
    use super::*;

    /// The records that reach `rank`, source by source.
    fn records(layer: &example::Layer, rank: usize) -> Vec<u32> {
        let of = |source: usize| {
            let send = SendMap::of(&layer.placement, &layer.routings[source], layer.counts.of(Rank(source)));
            let words = layer.traffic.send_rows(Rank(source), Rank(rank));
            send.records[words.start * 3..words.end * 3].to_vec()
        };
        [of(0), of(1)].concat()
    }

    fn maps(layer: &example::Layer, rank: usize, records: &[u32]) -> Result<ArrivalMaps, PlanError> {
        let example::Layer { placement, counts, table, traffic, .. } = layer;
        ArrivalMaps::of(placement, Rank(rank), counts, table, traffic, 2, records)
    }

    #[test]
    fn worked_example() {
        let layer = example::layer();
        assert_eq!(
            maps(&layer, 0, &records(&layer, 0)).unwrap(),
            ArrivalMaps {
                expand: vec![0, 1, 2, 0, 3],
                expert_start: vec![0, 2, 3, 5],
                reduce_offsets: vec![0, 1, 2, 4, 5],
                reduce_index: vec![1, 2, 0, 3, 4],
                reduce_weights: vec![20.0, 11.0, 0.0, 2.0, 92.0],
            }
        );
        assert_eq!(
            maps(&layer, 1, &records(&layer, 1)).unwrap(),
            ArrivalMaps {
                expand: vec![0, 1, 2, 2, 3], // expert 3: b x y, expert 4: y c
                expert_start: vec![0, 3, 5],
                reduce_offsets: vec![0, 1, 2, 3, 5], // b | x, then c | y
                reduce_index: vec![0, 1, 4, 2, 3],
                reduce_weights: vec![13.0, 93.0, 24.0, 103.0, 104.0],
            }
        );
    }

    #[test]
    fn records_that_contradict_the_counts_are_refused() {
        let layer = example::layer();
        let refused = |row: usize, ids: u32| {
            let mut bad = records(&layer, 0);
            bad[row * 3] = ids;
            maps(&layer, 0, &bad).unwrap_err().to_string()
        };
        assert_eq!(
            refused(2, 0xFFFF_0002),
            "metadata of row 2 from rank 0: its first local expert is 2, expected 1; it does not match what \
             rank 0 announced"
        );
        assert!(
            refused(0, 0x0007_0000).contains("row 0 from rank 0: a local expert is 7, expected at most 2")
        );
        assert!(refused(0, 0x0000_0000).contains("the local expert after 0 is 0, expected at least 1"));
        assert!(
            refused(3, 0xFFFF_FFFF)
                .contains("row 0 from rank 1: its number of experts is 0, expected at least 1")
        );
        assert!(refused(3, 0x0002_FFFF).contains("its number of experts is 0"));
        assert!(refused(0, 0xFFFF_0000).contains(
            "row 1 from rank 0: the number of rows so far with last local expert 0 is 2, expected at most 1"
        ));
        let short = records(&layer, 0)[1..].to_vec();
        assert_eq!(
            maps(&layer, 0, &short).unwrap_err().to_string(),
            "rank 0 has 11 metadata words, but the rows announced to it need 12: the ranks disagree about the \
             counts"
        );
    }
}
