//! What the user asked for, and which table that means for the tokens at hand.

use crate::{GemmKind, LayerCounts, Placement, PlanError, SharedExpert, StageTable, Transfer, order_text};
use epsmoe_base::hash_bytes;
use std::fmt;
use std::str::FromStr;

/// Whether stages run beside each other.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Schedule {
    /// One stage, and nothing beside anything.
    Serial,
    /// One stage computes while others travel.
    #[default]
    Staged,
}

impl fmt::Display for Schedule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Schedule::Serial => "serial",
            Schedule::Staged => "staged",
        })
    }
}

impl FromStr for Schedule {
    type Err = PlanError;

    fn from_str(text: &str) -> Result<Self, PlanError> {
        match text {
            "serial" => Ok(Schedule::Serial),
            "staged" => Ok(Schedule::Staged),
            _ => {
                let (what, expected) = ("a schedule", "serial or staged");
                Err(PlanError::Unreadable { text: text.into(), what, expected })
            }
        }
    }
}

/// How many stages, or how many experts in each: `4`, or `3,5,6,6`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Stages {
    /// That many stages, cut by load.
    Count(usize),
    /// Experts per stage, for the rank that holds the most.
    Sizes(Vec<usize>),
}

impl fmt::Display for Stages {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Stages::Count(count) => write!(f, "{count}"),
            Stages::Sizes(sizes) => {
                f.write_str(&sizes.iter().map(usize::to_string).collect::<Vec<_>>().join(","))
            }
        }
    }
}

impl FromStr for Stages {
    type Err = PlanError;

    fn from_str(text: &str) -> Result<Self, PlanError> {
        let numbers: Result<Vec<usize>, _> = text.split(',').map(|number| number.trim().parse()).collect();
        match numbers.as_deref() {
            Ok(&[count]) if count > 0 => Ok(Stages::Count(count)),
            Ok(sizes) if sizes.len() > 1 => Ok(Stages::Sizes(sizes.to_vec())),
            _ => Err(PlanError::Unreadable {
                text: text.into(),
                what: "a number of stages",
                expected: "how many stages, like 4, or experts per stage, like 3,5,6,6",
            }),
        }
    }
}

/// What a user decides about every MoE layer; what is left open follows from the layer.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Policy {
    /// Serial or staged.
    pub schedule: Schedule,
    /// Stages; by default [`Policy::DEFAULT_STAGES`], or fewer where no rank has that many experts.
    pub stages: Option<Stages>,
    /// How every stage is multiplied.
    pub gemm: GemmKind,
    /// Where the shared expert computes; by default beside the rendezvous, or alone in the serial schedule.
    pub shared: Option<SharedExpert>,
    /// What the transfer lane does; by default [`StageTable::default_order`].
    pub order: Option<Vec<Transfer>>,
}

impl Policy {
    /// Stages of a staged layer when nobody says how many.
    pub const DEFAULT_STAGES: usize = 4;

    /// The table for one layer's tokens: the same on every rank that has the same policy.
    pub fn table(&self, placement: &Placement, counts: &LayerCounts) -> Result<StageTable, PlanError> {
        let table = match self.schedule {
            Schedule::Serial => self.serial(placement)?,
            Schedule::Staged => self.staged(placement, counts)?,
        };
        match &self.order {
            Some(order) => table.with_order(order.clone()),
            None => Ok(table),
        }
    }

    /// Where the shared expert computes: known before the layer's counts are, as it may compute beside the
    /// rendezvous that gathers them.
    pub fn shared_expert(&self) -> SharedExpert {
        match (self.shared, self.schedule) {
            (Some(shared), _) => shared,
            (None, Schedule::Serial) => SharedExpert::Alone,
            (None, Schedule::Staged) => SharedExpert::BesideRendezvous,
        }
    }

    fn serial(&self, placement: &Placement) -> Result<StageTable, PlanError> {
        if let Some(stages) = self.stages.as_ref().filter(|&stages| *stages != Stages::Count(1)) {
            let asked = format!("stages {stages}");
            return Err(PlanError::SerialWith { serial: "one stage", asked });
        }
        if let Some(shared) = self.shared.filter(|&shared| shared != SharedExpert::Alone) {
            let asked = format!("the shared expert {shared}");
            return Err(PlanError::SerialWith { serial: "nothing beside anything", asked });
        }
        Ok(StageTable::serial(placement, self.gemm))
    }

    fn staged(&self, placement: &Placement, counts: &LayerCounts) -> Result<StageTable, PlanError> {
        let balanced = |stages| StageTable::balanced(placement, counts, stages, self.gemm);
        let table = match &self.stages {
            None => balanced(Self::DEFAULT_STAGES.min(placement.max_local()))?,
            Some(Stages::Count(stages)) => balanced(*stages)?,
            Some(Stages::Sizes(sizes)) => StageTable::sized(placement, sizes, self.gemm)?,
        };
        Ok(StageTable { shared: self.shared_expert(), ..table })
    }

    /// A hash of everything the user decided, stable over runs and releases. Ranks compare it before they
    /// trust each other's tables.
    pub fn digest(&self) -> u64 {
        hash_bytes(self.to_string().as_bytes())
    }
}

impl fmt::Display for Policy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let open = || "by default".to_string();
        let stages = self.stages.as_ref().map_or_else(open, Stages::to_string);
        let shared = self.shared.map_or_else(open, |shared| shared.to_string());
        let order = self.order.as_deref().map_or_else(open, order_text);
        let (schedule, gemm) = (self.schedule, self.gemm);
        write!(f, "{schedule}, stages {stages}, gemm {gemm}, shared expert {shared}, order {order}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{RankCounts, Routing, parse_order};

    /// Six experts on one rank; expert 0 has three tokens, the others one each.
    fn layer() -> (Placement, LayerCounts) {
        let placement = Placement::new(6, 1).unwrap();
        let routing = Routing::new(6, 1, vec![0, 0, 0, 1, 2, 3, 4, 5], vec![1.0; 8]).unwrap();
        let counts = LayerCounts::new(&placement, 1, vec![RankCounts::of(&placement, &routing)]).unwrap();
        (placement, counts)
    }

    fn table(policy: &Policy) -> Result<StageTable, String> {
        let (placement, counts) = layer();
        policy.table(&placement, &counts).map_err(|error| error.to_string())
    }

    #[test]
    fn words_of_the_command_line() {
        assert_eq!("4".parse(), Ok(Stages::Count(4)));
        assert_eq!("3,5, 6,0".parse(), Ok(Stages::Sizes(vec![3, 5, 6, 0])));
        for bad in ["", "0", "x", "3,", "-1"] {
            assert!(bad.parse::<Stages>().is_err(), "{bad}");
        }
        assert_eq!(
            "fast".parse::<Schedule>().unwrap_err().to_string(),
            "`fast` is not a schedule: write serial or staged"
        );
        for schedule in [Schedule::Serial, Schedule::Staged] {
            assert_eq!(schedule.to_string().parse(), Ok(schedule));
        }
        for gemm in [GemmKind::Grouped, GemmKind::Dense] {
            assert_eq!(gemm.to_string().parse(), Ok(gemm));
        }
        for stages in ["4", "3,5,6"] {
            assert_eq!(stages.parse::<Stages>().unwrap().to_string(), stages);
        }
    }

    #[test]
    fn the_default_is_four_stages_cut_by_load() {
        let table = table(&Policy::default()).unwrap();
        assert_eq!(
            table.to_string(),
            "rank 0: 0..1 1..3 3..5 5..6\n\
             order: d0 d1 c0 d2 c1 d3 c2 c3\n\
             gemm: grouped grouped grouped grouped\n\
             shared expert: beside the rendezvous\n"
        );
    }

    #[test]
    fn what_the_user_says_holds() {
        let policy = Policy {
            stages: Some(Stages::Sizes(vec![2, 4])),
            gemm: GemmKind::Dense,
            shared: Some(SharedExpert::BesideLastCombine),
            order: Some(parse_order("d0 c0 d1 c1").unwrap()),
            ..Policy::default()
        };
        assert_eq!(
            table(&policy).unwrap().to_string(),
            "rank 0: 0..2 2..6\n\
             order: d0 c0 d1 c1\n\
             gemm: dense dense\n\
             shared expert: beside the last combine\n"
        );
        let serial = Policy { schedule: Schedule::Serial, ..Policy::default() };
        assert!(table(&serial).unwrap().is_serial());
        assert_ne!(serial.digest(), policy.digest());
        assert_eq!(
            serial.to_string(),
            "serial, stages by default, gemm grouped, shared expert by default, order by default"
        );
    }

    #[test]
    fn the_impossible_is_refused() {
        let refused = |policy: Policy| table(&policy).unwrap_err();
        let staged = |stages| Policy { stages: Some(stages), ..Policy::default() };
        assert_eq!(refused(staged(Stages::Count(7))), "7 stages for 6 experts on a rank: use 1 to 6 stages");
        assert!(refused(staged(Stages::Sizes(vec![3, 2]))).contains("add up to 5"));
        let serial = Policy { schedule: Schedule::Serial, ..Policy::default() };
        assert_eq!(
            refused(Policy { stages: Some(Stages::Count(2)), ..serial.clone() }),
            "the serial schedule has one stage, but stages 2 was asked for: use the staged schedule, or \
             leave it out"
        );
        assert!(
            refused(Policy { shared: Some(SharedExpert::BesideRendezvous), ..serial })
                .contains("nothing beside anything")
        );
        let order = Some(parse_order("d0 c0").unwrap());
        assert!(refused(Policy { order, ..Policy::default() }).contains("d1 0 times"));
    }
}
