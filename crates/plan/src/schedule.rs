//! What the user asked for, and which table that means for the tokens at hand.

use crate::{
    AutoPlanner, CostModel, FixedPlanner, GemmKind, LayerHistograms, LayerSizes, PlanError, Planner,
    SearchOptions, SharedExpert, SlotMap, StageTable, Transfer, TwoBatchPlanner, order_text,
};
use epsmoe_base::{DType, hash_bytes};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

/// Whether stages run beside each other.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Schedule {
    /// One stage, and nothing beside anything.
    Serial,
    /// One stage computes while others travel.
    #[default]
    Staged,
    /// Whatever a cost model predicts to be fastest; see [`AutoPlanner`].
    Auto,
    /// Two micro-batches of one stage each: one computes while the other travels. To compare with: no cost model
    /// predicts it, so auto never takes it.
    TwoBatch,
}

impl fmt::Display for Schedule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Schedule::Serial => "serial",
            Schedule::Staged => "staged",
            Schedule::Auto => "auto",
            Schedule::TwoBatch => "two-batch",
        })
    }
}

impl FromStr for Schedule {
    type Err = PlanError;

    fn from_str(text: &str) -> Result<Self, PlanError> {
        match text {
            "serial" => Ok(Schedule::Serial),
            "staged" => Ok(Schedule::Staged),
            "auto" => Ok(Schedule::Auto),
            "two-batch" => Ok(Schedule::TwoBatch),
            _ => {
                let (what, expected) = ("a schedule", "serial, staged, auto or two-batch");
                Err(PlanError::Unreadable { text: text.into(), what, expected })
            }
        }
    }
}

/// How many stages, or how many experts in each: `4`, or `3,5,6,6`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
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
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Policy {
    /// Serial, staged, auto or two-batch.
    pub schedule: Schedule,
    /// Stages; by default [`Policy::DEFAULT_STAGES`], or fewer where no rank has that many experts. Auto decides.
    pub stages: Option<Stages>,
    /// How every stage is multiplied; by default grouped. Auto decides, unless it is told.
    pub gemm: Option<GemmKind>,
    /// Where the shared expert computes; by default beside the count exchange, or alone in the serial schedule. Auto
    /// decides, unless it is told.
    pub shared: Option<SharedExpert>,
    /// What the transfer lane does; by default [`StageTable::default_order`]. Auto decides.
    pub order: Option<Vec<Transfer>>,
    /// What auto predicts with; by default [`CostModel::unmeasured`].
    #[serde(with = "cost_as_text")]
    pub cost: Option<Arc<CostModel>>,
}

/// A cost model leaves out what it does not have, which only text can.
mod cost_as_text {
    use super::CostModel;
    use serde::de::Error as _;
    use serde::ser::Error as _;
    use serde::{Deserialize, Deserializer, Serialize, Serializer};
    use std::sync::Arc;

    pub(super) fn serialize<S: Serializer>(cost: &Option<Arc<CostModel>>, to: S) -> Result<S::Ok, S::Error> {
        let text = cost.as_deref().map(serde_json::to_string).transpose();
        text.map_err(S::Error::custom)?.serialize(to)
    }

    pub(super) fn deserialize<'a, D: Deserializer<'a>>(from: D) -> Result<Option<Arc<CostModel>>, D::Error> {
        let text = Option::<String>::deserialize(from)?;
        let cost = text.map(|text| serde_json::from_str(&text)).transpose();
        Ok(cost.map_err(D::Error::custom)?.map(Arc::new))
    }
}

impl Policy {
    /// Stages of a staged layer when nobody says how many.
    pub const DEFAULT_STAGES: usize = 4;

    /// Most stages that auto considers: beyond them a run shows no gain, and a search takes long.
    pub const AUTO_STAGES: usize = 8;

    /// Permille that more stages must be predicted to gain over fewer before auto takes them.
    pub const AUTO_MARGIN: u64 = 20;

    /// Whether a layer of which nobody knows the counts runs as one stage of one grouped product: every layer of a rank that is
    /// alone then, in place.
    pub fn stays_in_place(&self) -> bool {
        matches!(self.schedule, Schedule::Serial | Schedule::Auto) && self.gemm != Some(GemmKind::Dense)
    }

    /// The table for one layer's tokens: the same on every rank that has the same policy.
    /// For auto that is the staged one: where its decisions come from, only an [`AutoPlanner`] knows. For two-batch it is
    /// the first micro-batch's; [`Policy::micro_batches`] has both.
    pub fn table(&self, map: &SlotMap, counts: &LayerHistograms) -> Result<StageTable, PlanError> {
        let table = match self.schedule {
            Schedule::Serial => return self.serial(map),
            Schedule::Staged | Schedule::Auto => self.staged(map, counts)?,
            Schedule::TwoBatch => return self.micro_batches(map).map(|[first, _]| first),
        };
        match &self.order {
            Some(order) => table.with_order(order.clone()),
            None => Ok(table),
        }
    }

    /// Where the shared expert computes: known before the layer's counts are, as it may compute beside the
    /// exchange that gathers them.
    pub fn shared_expert(&self) -> SharedExpert {
        match (self.shared, self.schedule) {
            (Some(shared), _) => shared,
            (None, Schedule::Serial) => SharedExpert::Serial,
            (None, Schedule::Staged | Schedule::Auto | Schedule::TwoBatch) => {
                SharedExpert::BesideCountExchange
            }
        }
    }

    /// The tables of two micro-batches; see [`StageTable::micro_batches`].
    ///
    /// # Errors
    /// Stages or a transfer order: there is one way to alternate.
    pub fn micro_batches(&self, map: &SlotMap) -> Result<[StageTable; 2], PlanError> {
        self.check()?;
        let tables = StageTable::micro_batches(map, self.gemm());
        Ok(tables.map(|table| StageTable { shared: self.shared_expert(), ..table }))
    }

    pub(crate) fn serial(&self, map: &SlotMap) -> Result<StageTable, PlanError> {
        self.check_serial()?;
        let table = StageTable::serial(map, self.gemm());
        match &self.order {
            Some(order) => table.with_order(order.clone()),
            None => Ok(table),
        }
    }

    fn staged(&self, map: &SlotMap, counts: &LayerHistograms) -> Result<StageTable, PlanError> {
        let balanced = |stages| StageTable::balanced(map, counts, stages, self.gemm());
        let table = match &self.stages {
            None => balanced(Self::DEFAULT_STAGES.min(map.max_local()))?,
            Some(Stages::Count(stages)) => balanced(*stages)?,
            Some(Stages::Sizes(sizes)) => StageTable::sized(map, sizes, self.gemm())?,
        };
        Ok(StageTable { shared: self.shared_expert(), ..table })
    }

    /// What decides layer after layer, for layers of these sizes in this number format.
    ///
    /// # Errors
    /// Things asked for together that do not go together.
    pub fn planner(&self, sizes: LayerSizes, dtype: DType) -> Result<Box<dyn Planner>, PlanError> {
        self.check()?;
        Ok(match self.schedule {
            Schedule::Serial | Schedule::Staged => Box::new(FixedPlanner::new(self.clone())),
            Schedule::TwoBatch => Box::new(TwoBatchPlanner::new(self.clone())),
            Schedule::Auto => Box::new(self.auto(sizes, dtype)),
        })
    }

    /// The planner of an auto schedule.
    fn auto(&self, sizes: LayerSizes, dtype: DType) -> AutoPlanner {
        let defaults = SearchOptions::default();
        let kernels = self.gemm.map_or(defaults.kernels.clone(), |kind| vec![kind]);
        let (max_stages, margin) = (Self::AUTO_STAGES, Self::AUTO_MARGIN);
        let options = SearchOptions { max_stages, margin, kernels, shared: self.shared, ..defaults };
        let cost = self.cost.clone().unwrap_or_else(|| Arc::new(CostModel::unmeasured(dtype, 1, 0)));
        AutoPlanner::new(sizes, cost, options)
    }

    /// Refuses a schedule that was told what it does not do, or what it decides itself.
    pub fn check(&self) -> Result<(), PlanError> {
        let asked = self.asked_cut();
        match (self.schedule, asked) {
            (Schedule::Auto, Some(asked)) => Err(PlanError::AutoWith { asked }),
            (Schedule::TwoBatch, Some(asked)) => {
                let has = "one stage in each of its micro-batches";
                Err(PlanError::FixedWith { schedule: Schedule::TwoBatch, has, asked })
            }
            (Schedule::Serial, _) => self.check_serial(),
            _ => Ok(()),
        }
    }

    fn check_serial(&self) -> Result<(), PlanError> {
        let refuse = |has, asked| Err(PlanError::FixedWith { schedule: Schedule::Serial, has, asked });
        if let Some(stages) = self.stages.as_ref().filter(|&stages| *stages != Stages::Count(1)) {
            return refuse("one stage", format!("stages {stages}"));
        }
        match self.shared.filter(|&shared| shared != SharedExpert::Serial) {
            Some(shared) => refuse("nothing beside anything", format!("the shared expert {shared}")),
            None => Ok(()),
        }
    }

    /// Stages or a transfer order, if the user gave them.
    fn asked_cut(&self) -> Option<String> {
        let stages = self.stages.as_ref().map(|stages| format!("stages {stages}"));
        let order = self.order.as_deref().map(|order| format!("the order {}", order_text(order)));
        stages.or(order)
    }

    fn gemm(&self) -> GemmKind {
        self.gemm.unwrap_or_default()
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
        let (schedule, gemm) = (self.schedule, self.gemm.map_or_else(open, |gemm| gemm.to_string()));
        write!(f, "{schedule}, stages {stages}, gemm {gemm}, shared expert {shared}, order {order}")?;
        match &self.cost {
            Some(cost) => write!(f, ", cost model {:016x}", cost.digest()),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Routing, parse_order};

    /// Six experts on one rank; expert 0 has three tokens, the others one each.
    fn layer() -> (SlotMap, LayerHistograms) {
        let map = SlotMap::contiguous(6, 1).unwrap();
        let routing = Routing::new(6, 1, vec![0, 0, 0, 1, 2, 3, 4, 5], vec![1.0; 8]).unwrap();
        let counts = LayerHistograms::of_routings(&map, 1, &[routing]).unwrap();
        (map, counts)
    }

    fn table(policy: &Policy) -> Result<StageTable, String> {
        let (map, counts) = layer();
        policy.table(&map, &counts).map_err(|error| error.to_string())
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
            "`fast` is not a schedule: write serial, staged, auto or two-batch"
        );
        for schedule in [Schedule::Serial, Schedule::Staged, Schedule::Auto, Schedule::TwoBatch] {
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
             shared expert: beside the count exchange\n"
        );
    }

    #[test]
    fn what_the_user_says_holds() {
        let policy = Policy {
            stages: Some(Stages::Sizes(vec![2, 4])),
            gemm: Some(GemmKind::Dense),
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
            "serial, stages by default, gemm by default, shared expert by default, order by default"
        );
    }

    #[test]
    fn the_impossible_is_refused() {
        let refused = |policy: Policy| table(&policy).unwrap_err();
        let staged = |stages| Policy { stages: Some(stages), ..Policy::default() };
        assert_eq!(refused(staged(Stages::Count(7))), "7 stages for 6 experts on a rank: use 1 to 6 stages");
        assert!(refused(staged(Stages::Sizes(vec![3, 2]))).contains("add up to 5"));
        let auto = Policy { schedule: Schedule::Auto, ..staged(Stages::Count(2)) };
        assert_eq!(
            auto.check().unwrap_err().to_string(),
            "the auto schedule decides this itself, but stages 2 was asked for: use the staged schedule, or leave it out"
        );
        let serial = Policy { schedule: Schedule::Serial, ..Policy::default() };
        assert_eq!(
            refused(Policy { stages: Some(Stages::Count(2)), ..serial.clone() }),
            "the serial schedule has one stage, but stages 2 was asked for: use the staged schedule, or \
             leave it out"
        );
        assert!(
            refused(Policy { shared: Some(SharedExpert::BesideCountExchange), ..serial })
                .contains("nothing beside anything")
        );
        let two_batch = Policy { schedule: Schedule::TwoBatch, ..staged(Stages::Count(2)) };
        assert_eq!(
            refused(two_batch),
            "the two-batch schedule has one stage in each of its micro-batches, but stages 2 was asked for: use the \
             staged schedule, or leave it out"
        );
        let order = Some(parse_order("d0 c0").unwrap());
        assert!(refused(Policy { order, ..Policy::default() }).contains("d1 0 times"));
    }
}
