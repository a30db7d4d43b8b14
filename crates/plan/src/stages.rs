//! How a layer's experts are cut into stages, and in which order the stages travel.

use crate::{LayerHistograms, PlanError, SlotMap};
use epsmoe_base::{Rank, Stage, hash_bytes};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::ops::Range;
use std::str::FromStr;

/// How the experts of a stage are multiplied.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum GemmKind {
    /// One call over all experts of the stage.
    #[default]
    Grouped,
    /// One call per expert.
    Dense,
}

impl fmt::Display for GemmKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            GemmKind::Grouped => "grouped",
            GemmKind::Dense => "dense",
        })
    }
}

impl FromStr for GemmKind {
    type Err = PlanError;

    fn from_str(text: &str) -> Result<Self, PlanError> {
        match text {
            "grouped" => Ok(GemmKind::Grouped),
            "dense" => Ok(GemmKind::Dense),
            _ => {
                let (what, expected) = ("a GEMM kind", "grouped or dense");
                Err(PlanError::Unreadable { text: text.into(), what, expected })
            }
        }
    }
}

/// One step of the transfer lane.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Transfer {
    /// Rows of a stage travel to their experts; written `d0`.
    Dispatch(Stage),
    /// Partial sums that a stage completed travel back; written `c0`.
    Combine(Stage),
}

impl fmt::Display for Transfer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Transfer::Dispatch(stage) => write!(f, "d{}", stage.0),
            Transfer::Combine(stage) => write!(f, "c{}", stage.0),
        }
    }
}

impl FromStr for Transfer {
    type Err = PlanError;

    fn from_str(text: &str) -> Result<Self, PlanError> {
        let stage = |digits: &str| digits.parse().ok().map(Stage);
        let dispatch = text.strip_prefix('d').and_then(stage).map(Transfer::Dispatch);
        let combine = text.strip_prefix('c').and_then(stage).map(Transfer::Combine);
        dispatch.or(combine).ok_or_else(|| PlanError::Unreadable {
            text: text.into(),
            what: "a transfer",
            expected: "d or c and a stage, like d0 d1 c0 c1",
        })
    }
}

/// Reads a transfer order: `d0 d1 c0 c1`.
pub fn parse_order(text: &str) -> Result<Vec<Transfer>, PlanError> {
    text.split_whitespace().map(str::parse).collect()
}

/// Writes a transfer order as [`parse_order`] reads it.
pub fn order_text(order: &[Transfer]) -> String {
    spaced(order.iter())
}

fn spaced(words: impl Iterator<Item = impl fmt::Display>) -> String {
    words.map(|word| word.to_string()).collect::<Vec<_>>().join(" ")
}

/// What the shared expert's computation, which needs no transfer, hides.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum SharedExpert {
    /// It computes while the ranks exchange their counts.
    BesideCountExchange,
    /// It computes while the first stage travels to its experts.
    BesideFirstDispatch,
    /// It computes while the last sums travel back.
    BesideLastCombine,
    /// It computes after everything else, beside nothing.
    Serial,
}

impl fmt::Display for SharedExpert {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            SharedExpert::BesideCountExchange => "beside the count exchange",
            SharedExpert::BesideFirstDispatch => "beside the first dispatch",
            SharedExpert::BesideLastCombine => "beside the last combine",
            SharedExpert::Serial => "beside nothing",
        })
    }
}

/// The plan of one layer's expert pipeline, equal on every rank.
///
/// Rows are split by expert, so every expert belongs to one stage. The compute lane walks the stages in
/// order; the transfer lane follows `order`. The constructors make legal tables; a table put together by
/// hand goes through [`StageTable::validate`] before anything else looks at it.
///
/// Five experts on two ranks, two stages; rank 0 takes one expert first, then two:
///
/// ```
/// # use epsmoe_plan::*;
/// # fn main() -> Result<(), PlanError> {
/// let map = SlotMap::contiguous(5, 2)?;
/// let table = StageTable::sized(&map, &[1, 2], GemmKind::Grouped)?;
/// assert_eq!(
///     table.to_string(),
///     "rank 0: 0..1 1..3\n\
///      rank 1: 0..1 1..2\n\
///      order: d0 d1 c0 c1\n\
///      gemm: grouped grouped\n\
///      shared expert: beside the count exchange\n"
/// );
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct StageTable {
    /// `[R][S + 1]` boundaries of each rank's stages over its local experts: from 0 to L. Equal neighbours are
    /// an empty stage.
    pub cuts: Vec<Vec<usize>>,
    /// What the transfer lane does, in this order, on every rank.
    pub order: Vec<Transfer>,
    /// `[S]` how each stage is multiplied.
    pub gemm: Vec<GemmKind>,
    /// Where the shared expert's computation goes, if the layer has one.
    pub shared: SharedExpert,
    /// Permille of the processor that the layer's computation leaves to transfers; 0: nothing.
    pub reserved: u64,
}

impl StageTable {
    /// One stage, and nothing beside anything: what every other table is compared with.
    pub fn serial(map: &SlotMap, gemm: GemmKind) -> Self {
        let cuts = map.all_ranks().map(|rank| vec![0, map.local_count(rank)]).collect();
        StageTable { shared: SharedExpert::Serial, ..Self::of_cuts(cuts, 1, gemm) }
    }

    /// As many experts in every stage as possible. Ranks with fewer experts than stages get empty stages.
    pub fn equal(map: &SlotMap, stages: usize, gemm: GemmKind) -> Result<Self, PlanError> {
        check_count(map, stages)?;
        let cut = |local: usize| (0..=stages).map(|stage| stage * local / stages).collect();
        let cuts = map.all_ranks().map(|rank| cut(map.local_count(rank))).collect();
        Ok(Self::of_cuts(cuts, stages, gemm))
    }

    /// `sizes[s]` experts in stage s; they add up to the most experts a rank holds. On ranks with one expert
    /// fewer, the last stage that has any is one smaller.
    pub fn sized(map: &SlotMap, sizes: &[usize], gemm: GemmKind) -> Result<Self, PlanError> {
        let experts = map.max_local();
        let sum = sizes.iter().fold(0, |sum: usize, &size| sum.saturating_add(size));
        if sum != experts {
            return Err(PlanError::StageSizes { sum, experts });
        }
        let cut = |local: usize| {
            let ends = sizes.iter().scan(0, |end, size| {
                *end += size;
                Some(local.min(*end))
            });
            std::iter::once(0).chain(ends).collect()
        };
        let cuts = map.all_ranks().map(|rank| cut(map.local_count(rank))).collect();
        Ok(Self::of_cuts(cuts, sizes.len(), gemm))
    }

    /// On every rank, the cut whose largest stage has the fewest assignments.
    pub fn balanced(
        map: &SlotMap,
        counts: &LayerHistograms,
        stages: usize,
        gemm: GemmKind,
    ) -> Result<Self, PlanError> {
        check_count(map, stages)?;
        let cut = |rank| {
            let loads: Vec<usize> =
                map.slots_of_rank(rank).map(|expert| counts.assignments_of(expert)).collect();
            balanced_cut(&loads, stages)
        };
        Ok(Self::of_cuts(map.all_ranks().map(cut).collect(), stages, gemm))
    }

    /// Two micro-batches, each with all experts in a stage of its own of the two: stage 0 is the first one's, stage 1
    /// the second one's, so that `d0 d1 c0 c1` is what the transfer lane does for both.
    ///
    /// ```
    /// # use epsmoe_plan::*;
    /// let map = SlotMap::contiguous(5, 2)?;
    /// let [first, second] = StageTable::micro_batches(&map, GemmKind::Grouped);
    /// assert_eq!(first.cuts, [vec![0, 3, 3], vec![0, 2, 2]]);
    /// assert_eq!(second.cuts, [vec![0, 0, 3], vec![0, 0, 2]]);
    /// # Ok::<(), PlanError>(())
    /// ```
    pub fn micro_batches(map: &SlotMap, gemm: GemmKind) -> [StageTable; 2] {
        let local = || map.all_ranks().map(|rank| map.local_count(rank));
        let first = local().map(|experts| vec![0, experts, experts]).collect();
        let second = local().map(|experts| vec![0, 0, experts]).collect();
        [first, second].map(|cuts| Self::of_cuts(cuts, 2, gemm))
    }

    fn of_cuts(cuts: Vec<Vec<usize>>, stages: usize, gemm: GemmKind) -> Self {
        StageTable {
            cuts,
            order: Self::default_order(stages),
            gemm: vec![gemm; stages],
            shared: SharedExpert::BesideCountExchange,
            reserved: 0,
        }
    }

    /// The order in which one stage arrives while the one before it computes: `d0 d1 c0 d2 c1 … c(S-1)`.
    pub fn default_order(stages: usize) -> Vec<Transfer> {
        let dispatches = (0..stages).map(|stage| Transfer::Dispatch(Stage(stage)));
        let combines = (0..stages).map(|stage| Transfer::Combine(Stage(stage)));
        let mut order: Vec<Transfer> = dispatches.collect();
        for (stage, combine) in combines.enumerate() {
            // c(s) goes after d(s + 1), which has moved back by the s combines put before it.
            order.insert((2 * stage + 2).min(order.len()), combine);
        }
        order
    }

    /// The same table with another transfer order, if that is a legal one.
    pub fn with_order(self, order: Vec<Transfer>) -> Result<Self, PlanError> {
        check_order(&order, self.stages())?;
        Ok(StageTable { order, ..self })
    }

    /// Stages of the layer, S; the same on every rank.
    pub fn stages(&self) -> usize {
        self.gemm.len()
    }

    /// Whether rows stay where they are: in a world of one rank whose experts are one grouped stage. Nobody needs to
    /// know the counts then but the processor.
    pub fn runs_in_place(&self, map: &SlotMap) -> bool {
        map.ranks() == 1 && self.runs_gathered()
    }

    /// Whether nobody needs to know the counts where every rank has the rows of all: as one grouped stage.
    pub fn runs_gathered(&self) -> bool {
        self.gemm == [GemmKind::Grouped]
    }

    /// Whether nothing runs beside anything.
    pub fn is_serial(&self) -> bool {
        self.stages() == 1 && self.shared == SharedExpert::Serial
    }

    /// The local slots of a stage on `rank`.
    pub fn slots_of(&self, rank: Rank, stage: Stage) -> Range<usize> {
        let cut = &self.cuts[rank.0];
        cut[stage.0]..cut[stage.0 + 1]
    }

    /// The stage of a local slot of `rank`.
    pub fn stage_of(&self, rank: Rank, local: usize) -> Stage {
        // The last boundary at or below the expert: with empty stages several may be equal.
        Stage(self.cuts[rank.0].partition_point(|&boundary| boundary <= local) - 1)
    }

    /// Refuses a table that misses an expert, or whose transfer lane would wait for itself.
    pub fn validate(&self, map: &SlotMap) -> Result<(), PlanError> {
        let stages = self.stages();
        check_length("GEMM kinds, one per stage", stages, stages.max(1))?;
        check_length("cuts, one per rank", self.cuts.len(), map.ranks())?;
        for (rank, cut) in map.all_ranks().zip(&self.cuts) {
            let what = || format!("boundaries on {rank}");
            check_length(what(), cut.len(), stages + 1)?;
            let wrong = |boundary: usize, expected: String| {
                Err(PlanError::Cut { rank, boundary, got: cut[boundary], expected })
            };
            if cut[0] != 0 {
                return wrong(0, "0".into());
            }
            if let Some(stage) = (0..stages).find(|&stage| cut[stage] > cut[stage + 1]) {
                return wrong(stage + 1, format!("at least {}", cut[stage]));
            }
            if cut[stages] != map.local_count(rank) {
                return wrong(stages, map.local_count(rank).to_string());
            }
        }
        if self.reserved >= 1000 {
            return Err(PlanError::Reserved { permille: self.reserved });
        }
        check_order(&self.order, stages)
    }

    /// A hash of everything in the table, stable over runs and releases: of its text, which says everything.
    pub fn digest(&self) -> u64 {
        hash_bytes(self.to_string().as_bytes())
    }
}

impl fmt::Display for StageTable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (rank, cut) in self.cuts.iter().enumerate() {
            let stages = cut.windows(2).map(|ends| format!("{}..{}", ends[0], ends[1]));
            writeln!(f, "{}: {}", Rank(rank), spaced(stages))?;
        }
        writeln!(f, "order: {}", order_text(&self.order))?;
        writeln!(f, "gemm: {}", spaced(self.gemm.iter()))?;
        writeln!(f, "shared expert: {}", self.shared)?;
        match self.reserved {
            0 => Ok(()),
            permille => writeln!(f, "left to transfers: {permille} ‰ of the processor"),
        }
    }
}

fn check_count(map: &SlotMap, stages: usize) -> Result<(), PlanError> {
    let experts = map.max_local();
    if (1..=experts).contains(&stages) { Ok(()) } else { Err(PlanError::StageCount { stages, experts }) }
}

fn check_length(what: impl Into<String>, got: usize, want: usize) -> Result<(), PlanError> {
    if got == want { Ok(()) } else { Err(PlanError::TableLength { what: what.into(), got, want }) }
}

/// Every dispatch and combine once, and every combine after the dispatches that its stage computes from.
fn check_order(order: &[Transfer], stages: usize) -> Result<(), PlanError> {
    let times = |step: Transfer| order.iter().filter(|&&other| other == step).count();
    let steps = |step: Transfer, want| match times(step) {
        got if got == want => Ok(()),
        got => Err(PlanError::OrderSteps { step: step.to_string(), got, want, stages }),
    };
    for stage in (0..stages).map(Stage) {
        steps(Transfer::Dispatch(stage), 1)?;
        steps(Transfer::Combine(stage), 1)?;
    }
    if let Some(&unknown) = order.iter().find(|step| match step {
        Transfer::Dispatch(stage) | Transfer::Combine(stage) => stage.0 >= stages,
    }) {
        return steps(unknown, 0);
    }
    for (position, &step) in order.iter().enumerate() {
        let Transfer::Combine(stage) = step else { continue };
        let late = order[position..].iter().find(|later| match later {
            Transfer::Dispatch(needed) => *needed <= stage,
            Transfer::Combine(_) => false,
        });
        if let Some(dispatch) = late {
            let (combine, dispatch) = (step.to_string(), dispatch.to_string());
            return Err(PlanError::OrderDeadlock { combine, dispatch, stage });
        }
    }
    Ok(())
}

/// Boundaries that cut `loads` into `stages` runs whose largest sum is as small as it can be.
///
/// That sum is found by bisection: under a limit, filling every run as far as it goes needs the fewest runs.
/// Many cuts share the smallest limit; among them each run in turn takes its fair part of what is left, so
/// that the later ones are not left empty.
///
/// Loads 100, then eight times 10, in three stages: no cut has less than 100 in its largest stage; the rest
/// is shared as 40 + 40, boundaries 0, 1, 5, 9.
fn balanced_cut(loads: &[usize], stages: usize) -> Vec<usize> {
    let total: usize = loads.iter().sum();
    let (mut low, mut high) = (loads.iter().copied().max().unwrap_or(0), total);
    while low < high {
        let middle = low.midpoint(high);
        if runs_needed(loads, middle)[0] <= stages { high = middle } else { low = middle + 1 }
    }
    let needed = runs_needed(loads, high);
    let mut cut = vec![0];
    let (mut end, mut left) = (0, total);
    for stage in 0..stages {
        let stages_after = stages - stage - 1;
        let fair = left.div_ceil(stages_after + 1);
        let mut load = 0;
        while end < loads.len() && (load == 0 || needed[end] > stages_after || load + loads[end] <= fair) {
            load += loads[end];
            end += 1;
        }
        left -= load;
        cut.push(end);
    }
    cut
}

/// `[L + 1]`: into how many runs of at most `limit` the loads from each position on can be cut. `limit` is no
/// smaller than any load.
fn runs_needed(loads: &[usize], limit: usize) -> Vec<usize> {
    let mut needed = vec![0; loads.len() + 1];
    let (mut end, mut load) = (loads.len(), 0);
    for start in (0..loads.len()).rev() {
        load += loads[start];
        while load > limit {
            end -= 1;
            load -= loads[end];
        }
        needed[start] = needed[end] + 1;
    }
    needed
}

#[cfg(test)]
mod tests {
    use super::*;
    use epsmoe_base::{Mix, env::test_seed};

    #[test]
    fn the_default_order_is_the_one_that_overlaps() {
        let text = |stages| order_text(&StageTable::default_order(stages));
        assert_eq!(text(1), "d0 c0");
        assert_eq!(text(2), "d0 d1 c0 c1");
        assert_eq!(text(4), "d0 d1 c0 d2 c1 d3 c2 c3");
        for stages in 1..20 {
            check_order(&StageTable::default_order(stages), stages).unwrap();
        }
    }

    #[test]
    fn cuts_by_count_and_by_size() {
        let map = SlotMap::contiguous(7, 4).unwrap(); // 2, 2, 2 and 1 experts
        let equal = StageTable::equal(&map, 2, GemmKind::Dense).unwrap();
        assert_eq!(equal.cuts, [vec![0, 1, 2], vec![0, 1, 2], vec![0, 1, 2], vec![0, 0, 1]]);
        let sized = StageTable::sized(&map, &[0, 2, 0], GemmKind::Dense).unwrap();
        assert_eq!(sized.cuts[0], [0, 0, 2, 2]);
        assert_eq!(sized.cuts[3], [0, 0, 1, 1]);
        assert_eq!((sized.stage_of(Rank(0), 1), sized.stage_of(Rank(3), 0)), (Stage(1), Stage(1)));
        assert_eq!(sized.slots_of(Rank(0), Stage(0)), 0..0);
        let serial = StageTable::serial(&map, GemmKind::Grouped);
        assert!(serial.is_serial() && !equal.is_serial());
        for table in [equal, sized, serial] {
            table.validate(&map).unwrap();
        }
    }

    #[test]
    fn impossible_cuts_are_refused() {
        let map = SlotMap::contiguous(7, 4).unwrap();
        let count = |stages| StageTable::equal(&map, stages, GemmKind::Grouped).unwrap_err().to_string();
        assert_eq!(count(3), "3 stages for 2 experts on a rank: use 1 to 2 stages");
        assert!(count(0).contains("0 stages"));
        assert_eq!(
            StageTable::sized(&map, &[1, 2], GemmKind::Grouped).unwrap_err().to_string(),
            "stage sizes add up to 3, but a rank holds 2 experts: the sizes must add up to 2"
        );
        assert!(StageTable::sized(&map, &[usize::MAX, 3], GemmKind::Grouped).is_err());

        let good = StageTable::equal(&map, 2, GemmKind::Grouped).unwrap();
        let refused = |spoil: fn(&mut StageTable)| {
            let mut bad = good.clone();
            spoil(&mut bad);
            assert_ne!(bad.digest(), good.digest());
            bad.validate(&map).unwrap_err().to_string()
        };
        assert!(
            refused(|table| table.cuts[1] = vec![0, 2, 1])
                .contains("boundary 2 of rank 1 is 1, expected at least 2")
        );
        assert!(
            refused(|table| table.cuts[3] = vec![0, 1, 2]).contains("boundary 2 of rank 3 is 2, expected 1")
        );
        assert!(refused(|table| table.cuts[0][0] = 1).contains("boundary 0 of rank 0 is 1, expected 0"));
        assert!(refused(|table| table.cuts[2] = vec![0, 2]).contains("2 boundaries on rank 2, expected 3"));
        assert!(refused(|table| drop(table.cuts.pop())).contains("3 cuts, one per rank, expected 4"));
        assert!(refused(|table| table.gemm.clear()).contains("0 GEMM kinds"));
    }

    #[test]
    fn orders_that_deadlock_are_refused() {
        let map = SlotMap::contiguous(4, 1).unwrap();
        let table = StageTable::equal(&map, 2, GemmKind::Grouped).unwrap();
        let order = |text| table.clone().with_order(parse_order(text)?);
        for legal in ["d0 d1 c0 c1", "d0 c0 d1 c1", "d1 d0 c1 c0"] {
            assert_eq!(order_text(&order(legal).unwrap().order), legal);
        }
        let message = |text| order(text).unwrap_err().to_string();
        assert_eq!(
            message("d1 c1 d0 c0"),
            "the transfer order has c1 before d0: stage 1 computes only after d0 has arrived, so the \
             transfer lane would wait for itself for ever; move d0 before c1"
        );
        assert!(message("c0 d0 d1 c1").contains("c0 before d0"));
        assert_eq!(
            message("d0 d1 c0"),
            "the transfer order has c1 0 times, expected 1: with 2 stages it has d0 to d1 and c0 to c1 once each"
        );
        assert!(message("d0 d1 d0 c0 c1").contains("d0 2 times"));
        assert!(message("d0 d1 d2 c0 c1").contains("d2 1 times, expected 0"));
        assert_eq!(message("d0 x1"), "`x1` is not a transfer: write d or c and a stage, like d0 d1 c0 c1");
    }

    #[test]
    fn the_digest_sees_everything() {
        let map = SlotMap::contiguous(6, 2).unwrap();
        let table = StageTable::sized(&map, &[1, 2], GemmKind::Grouped).unwrap();
        let digests = [
            table.clone(),
            StageTable::sized(&map, &[2, 1], GemmKind::Grouped).unwrap(),
            StageTable::sized(&map, &[1, 2], GemmKind::Dense).unwrap(),
            table.clone().with_order(parse_order("d0 c0 d1 c1").unwrap()).unwrap(),
            StageTable { shared: SharedExpert::Serial, ..table.clone() },
            StageTable { reserved: 121, ..table.clone() },
        ]
        .map(|table| table.digest());
        for (index, digest) in digests.iter().enumerate() {
            assert!(!digests[..index].contains(digest));
        }
        assert_eq!(table.digest(), table.clone().digest());
    }

    #[test]
    fn computation_keeps_some_of_the_processor() {
        let map = SlotMap::contiguous(6, 2).unwrap();
        let reserved = |reserved| StageTable { reserved, ..StageTable::serial(&map, GemmKind::Grouped) };
        assert_eq!(reserved(999).validate(&map), Ok(()));
        assert_eq!(
            reserved(1000).validate(&map).unwrap_err().to_string(),
            "1000 ‰ of the processor are left to transfers: leave computation some, 999 ‰ at the most"
        );
        assert!(reserved(121).to_string().ends_with("left to transfers: 121 ‰ of the processor\n"));
    }

    #[test]
    fn a_heavy_expert_gets_a_stage_and_the_rest_is_shared() {
        assert_eq!(balanced_cut(&[100, 10, 10, 10, 10, 10, 10, 10, 10], 3), [0, 1, 5, 9]);
        assert_eq!(balanced_cut(&[10, 10, 100, 10, 10], 3), [0, 2, 3, 5]);
        assert_eq!(balanced_cut(&[1; 8], 3), [0, 3, 6, 8]);
        assert_eq!(balanced_cut(&[0, 0], 2), [0, 2, 2]);
        assert_eq!(balanced_cut(&[7], 3), [0, 1, 1, 1]);
    }

    /// The smallest largest sum, by trying every end of the first run.
    fn slow_best(loads: &[usize], stages: usize) -> usize {
        if stages == 1 {
            return loads.iter().sum();
        }
        (0..=loads.len())
            .map(|end| loads[..end].iter().sum::<usize>().max(slow_best(&loads[end..], stages - 1)))
            .min()
            .unwrap()
    }

    #[test]
    fn balanced_cuts_are_as_good_as_any() {
        let seed = test_seed();
        let mut mix = Mix::new(seed);
        for _ in 0..500 {
            let experts = 1 + mix.below(8);
            let largest = [1, 3, 100][mix.below(3)];
            let mut loads: Vec<usize> = (0..experts).map(|_| mix.below(largest + 1)).collect();
            if mix.below(3) == 0 {
                loads[mix.below(experts)] = 1000;
            }
            let stages = 1 + mix.below(5);
            let cut = balanced_cut(&loads, stages);
            assert_eq!((cut.len(), cut[0], cut[stages]), (stages + 1, 0, experts), "seed {seed}: {loads:?}");
            let largest = cut.windows(2).map(|ends| loads[ends[0]..ends[1]].iter().sum::<usize>()).max();
            assert_eq!(largest, Some(slow_best(&loads, stages)), "seed {seed}: {loads:?} cut at {cut:?}");
        }
    }
}
