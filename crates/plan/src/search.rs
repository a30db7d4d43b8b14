//! Which plan is best, by the plan's own simulator, and why.
//!
//! [`search`] tries numbers of stages, cuts, kernels, shares, transfer orders and places for the shared expert
//! together, prices each table with [`simulate`], and keeps the cheapest. Everything is decided in whole numbers and in a
//! fixed order, so every rank that searches with the same model and counts finds the same plan.
//!
//! A search takes milliseconds. A [`Decision`] is what is worth keeping of it for all layers of the same [`Bucket`]:
//! then only the cuts follow each layer's own counts ([`cuts_for`], tens of microseconds).

use crate::cuts::{Loads, together_ns};
use crate::piecewise::scale;
use crate::{
    CostModel, GemmKind, Schedule, SharedExpert, Simulation, SlotMap, StageTable, Transfer, Workload,
    order_text, predict_ns, simulate,
};
use epsmoe_base::{Rank, Stage, count};
use std::fmt;

/// What a search may choose from.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct SearchOptions {
    /// Fewest stages; more than one forbids the answer "one stage".
    pub min_stages: usize,
    /// Most stages.
    pub max_stages: usize,
    /// Kernels; one of them, for runs whose bits must not depend on the choice.
    pub kernels: Vec<GemmKind>,
    /// Where the shared expert computes, if that is decided already.
    pub shared: Option<SharedExpert>,
    /// Permille that more stages must gain over fewer: less than that a model cannot tell.
    pub margin: u64,
}

impl Default for SearchOptions {
    fn default() -> Self {
        SearchOptions {
            min_stages: 1,
            max_stages: 16,
            kernels: vec![GemmKind::Grouped, GemmKind::Dense],
            shared: None,
            margin: 10,
        }
    }
}

/// The part of a choice that holds for all layers of a [`Bucket`].
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Decision {
    /// `[S]` kernels.
    pub gemm: Vec<GemmKind>,
    /// What the transfer lane does.
    pub order: Vec<Transfer>,
    /// Where the shared expert computes.
    pub shared: SharedExpert,
    /// Permille of the processor that is left to transfers.
    pub reserved: u64,
    /// `[R][S]` permille of a rank's predicted compute time that lies in stages 0..=s.
    pub targets: Vec<Vec<u64>>,
}

/// Layers that share a decision: similar numbers of tokens, similarly uneven.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Bucket {
    /// Quarter octaves of the most tokens on a rank.
    pub tokens: u32,
    /// Quarter octaves of (assignments on the fullest rank, over the mean).
    pub skew: u32,
}

impl Bucket {
    /// The bucket of a layer: equal on all ranks, as it follows from the gathered counts.
    pub fn of(workload: &Workload<'_>) -> Self {
        let Workload { map, counts, .. } = *workload;
        let tokens = map.all_ranks().map(|rank| counts.of(rank).tokens).max().unwrap_or(0);
        let on_rank = |rank: Rank| -> u64 {
            map.slots_of_rank(rank).map(|expert| counts.assignments_of(expert) as u64).sum()
        };
        let assignments: Vec<u64> = map.all_ranks().map(on_rank).collect();
        let (fullest, all) =
            (assignments.iter().max().copied().unwrap_or(0), assignments.iter().sum::<u64>());
        let skew = fullest * 16 * assignments.len() as u64 / all.max(1);
        Bucket { tokens: quarter_octaves(tokens.into()), skew: quarter_octaves(skew) }
    }
}

impl fmt::Display for Bucket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let skew = least_of(self.skew) * 100 / 16;
        write!(
            f,
            "layers of {} tokens or a few more on a rank, {}.{:02} times the mean on the fullest",
            least_of(self.tokens),
            skew / 100,
            skew % 100
        )
    }
}

/// The least value whose [`quarter_octaves`] these are.
fn least_of(quarters: u32) -> u64 {
    match quarters {
        0..8 => quarters.into(),
        _ => u64::from(quarters % 4 + 4) << (quarters / 4 - 2),
    }
}

/// Four steps for every doubling: 0, 1, 2, 3, then 4 → 8, 5 → 9, 6 → 10, 7 → 11, 8 and 9 → 12, …
fn quarter_octaves(value: u64) -> u32 {
    match value.checked_ilog2() {
        None => 0,
        Some(octave @ 0..2) => octave * 2 + (value as u32 & octave),
        Some(octave) => 4 * octave + (value >> (octave - 2)) as u32 - 4,
    }
}

/// The cheapest plan found, and what it was compared with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Choice {
    /// The plan.
    pub table: StageTable,
    /// What it is predicted to do.
    pub predicted: Simulation,
    /// Other plans, cheapest first: the best of every number of stages, and landmarks like the serial schedule.
    pub considered: Vec<Considered>,
    /// How many plans were priced.
    pub priced: usize,
    /// What is worth keeping for similar layers.
    pub decision: Decision,
    /// What is worth keeping of plans that are predicted to be little slower, cheapest first: a model may be wrong by as much.
    pub rivals: Vec<Decision>,
}

/// A plan that was not chosen, or the chosen one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Considered {
    /// In words.
    pub what: String,
    /// Stages.
    pub stages: usize,
    /// Its layer time.
    pub layer_ns: u64,
}

/// The plan of one layer, from its decision and its counts. The same on every rank; the transfer order, kernels,
/// share and shared expert are the decision's.
pub fn cuts_for(decision: &Decision, workload: &Workload<'_>, cost: &CostModel) -> StageTable {
    let map = workload.map;
    let Decision { gemm, order, shared, reserved, targets } = decision;
    let cuts = if gemm.len() == 1 {
        map.all_ranks().map(|rank| vec![0, map.local_count(rank)]).collect()
    } else {
        best_cuts(&Loads::of(workload, cost, *reserved), targets, gemm, order)
    };
    StageTable { cuts, order: order.clone(), gemm: gemm.clone(), shared: *shared, reserved: *reserved }
}

/// Cuts that put every rank's boundaries where the decision has them; where it has them on average, moved a little
/// for each rank's own lanes; or for these lanes alone. Which are best shows where the ranks wait for each other.
fn best_cuts(
    loads: &[Loads],
    targets: &[Vec<u64>],
    gemm: &[GemmKind],
    order: &[Transfer],
) -> Vec<Vec<usize>> {
    let ranks = targets.len().max(1) as u64;
    let mean = |stage: usize| targets.iter().map(|rank| rank[stage]).sum::<u64>() / ranks;
    let mean: Vec<u64> = (0..gemm.len()).map(mean).collect();
    let all = |cut: &dyn Fn(usize, &Loads) -> Vec<usize>| -> Vec<Vec<usize>> {
        loads.iter().enumerate().map(|(rank, loads)| cut(rank, loads)).collect()
    };
    let own = |rank: usize| targets.get(rank).map_or(mean.as_slice(), Vec::as_slice);
    let mut candidates = vec![
        all(&|rank, loads| loads.cut(gemm, Some(own(rank)), 0)),
        all(&|_, loads| loads.cut(gemm, Some(&mean), RADIUS)),
    ];
    let experts = loads.iter().map(Loads::experts).max().unwrap_or(0);
    if loads.len() * gemm.len() * experts * experts <= FREE_STEPS {
        candidates.push(all(&|_, loads| loads.cut(gemm, None, 0)));
    }
    let best = candidates.into_iter().min_by_key(|cuts| together_ns(loads, cuts, gemm, order));
    best.unwrap_or_default()
}

/// Steps of the dynamic programme that are always affordable.
const FREE_STEPS: usize = 4096;

/// How many experts a boundary may move from where its decision puts it.
const RADIUS: usize = 2;

/// The cheapest plan for a layer.
pub fn search(workload: &Workload<'_>, cost: &CostModel, options: &SearchOptions) -> Choice {
    let mut search = Search { workload, cost, options, priced: 0 };
    let most = workload.map.max_local().min(options.max_stages).max(1);
    let stages = options.min_stages.clamp(1, most)..=most;
    let mut best_of: Vec<Plan> = Vec::new();
    for stages in stages {
        best_of.push(search.best_with(stages));
        let best = best_of.iter().map(|plan| plan.layer_ns).min().unwrap_or(0);
        let hopeless = |plan: &Plan| plan.layer_ns > best + best / 10;
        if best_of.len() > 3 && best_of[best_of.len() - 3..].iter().all(hopeless) {
            break;
        }
    }
    let mut order: Vec<usize> = (0..best_of.len()).collect();
    order.sort_by_key(|&index| (best_of[index].layer_ns, index));
    for &index in order.iter().take(CLIMBED) {
        search.improve(&mut best_of[index]);
    }
    let landmarks = search.landmarks();
    search.choose(best_of, landmarks)
}

/// How many of the best numbers of stages have their cuts refined.
const CLIMBED: usize = 3;

/// Most cuts that are all tried.
const MOST_CUTS: usize = 256;

/// The transfer orders worth trying: each stage arrives one stage ahead, two ahead, all ahead, or none.
pub fn sensible_orders(stages: usize) -> Vec<Vec<Transfer>> {
    let ahead = |ahead: usize| -> Vec<Transfer> {
        let dispatches = (0..stages).map(|stage| (stage, Transfer::Dispatch(Stage(stage))));
        let combines = (0..stages).map(|stage| (stage + ahead, Transfer::Combine(Stage(stage))));
        let mut order: Vec<(usize, Transfer)> = dispatches.chain(combines).collect();
        // Stable: of equal places the dispatch comes first.
        order.sort_by_key(|&(place, _)| place);
        order.into_iter().map(|(_, transfer)| transfer).collect()
    };
    let mut orders: Vec<Vec<Transfer>> = Vec::new();
    for order in [1, 2, stages, 0].map(ahead) {
        if !orders.contains(&order) {
            orders.push(order);
        }
    }
    orders
}

/// A table with its price.
#[derive(Clone, Debug)]
struct Plan {
    table: StageTable,
    layer_ns: u64,
}

struct Search<'a> {
    workload: &'a Workload<'a>,
    cost: &'a CostModel,
    options: &'a SearchOptions,
    priced: usize,
}

impl Search<'_> {
    fn price(&mut self, table: StageTable) -> Plan {
        self.priced += 1;
        let layer_ns = predict_ns(&table, self.workload, self.cost);
        Plan { table, layer_ns }
    }

    /// Puts the plan in place of `best` if it is cheaper.
    fn try_plan(&mut self, best: &mut Plan, table: StageTable) -> bool {
        let plan = self.price(table);
        let better = plan.layer_ns < best.layer_ns;
        if better {
            *best = plan;
        }
        better
    }

    /// The best plan of so many stages: cuts and kernels first, then order and shared expert for the best of them.
    fn best_with(&mut self, stages: usize) -> Plan {
        let (cost, undivided) = (self.cost, self.best_cuts(stages, 0));
        let divided = cost.shares.iter().map(|share| share.reserved).filter(|&reserved| reserved > 0);
        let divided: Vec<Plan> = divided.map(|reserved| self.best_cuts(stages, reserved)).collect();
        let plans = std::iter::once(undivided).chain(divided).map(|mut plan| {
            self.refine(&mut plan);
            plan
        });
        let cheapest = plans.min_by_key(|plan| plan.layer_ns);
        cheapest.unwrap_or_else(|| unreachable!("there is always the undivided processor"))
    }

    fn best_cuts(&mut self, stages: usize, reserved: u64) -> Plan {
        let Workload { map, counts, .. } = *self.workload;
        let loads = Loads::of(self.workload, self.cost, reserved);
        let shared = self.options.shared.unwrap_or(SharedExpert::BesideCountExchange);
        let kinds = self.options.kernels.clone();
        let uniform = |kind| (kind, StageTable::equal(map, stages, kind));
        let mut best: Option<Plan> = None;
        for (kind, equal) in kinds.into_iter().map(uniform) {
            let Ok(equal) = equal else { continue };
            let equal = StageTable { shared, reserved, ..equal };
            let timed = StageTable { cuts: cut_all(&loads, &equal.gemm), ..equal.clone() };
            let mut tables = vec![timed, equal];
            tables.extend(StageTable::balanced(map, counts, stages, kind).map(|table| StageTable {
                shared,
                reserved,
                ..table
            }));
            tables.dedup();
            for table in tables {
                let mixed = StageTable { gemm: self.kernels(&table, &loads), ..table.clone() };
                for table in if mixed == table { vec![table] } else { vec![table, mixed] } {
                    let plan = self.price(table);
                    if best.as_ref().is_none_or(|best| plan.layer_ns < best.layer_ns) {
                        best = Some(plan);
                    }
                }
                if stages == 1 {
                    break;
                }
            }
        }
        best.unwrap_or_else(|| {
            let table = StageTable { shared, reserved, ..StageTable::serial(map, GemmKind::default()) };
            self.price(table)
        })
    }

    /// The kernel of every stage that is cheaper on the rank that takes longest.
    fn kernels(&self, table: &StageTable, loads: &[Loads]) -> Vec<GemmKind> {
        let slowest = |stage: usize, kind: GemmKind| {
            let of_rank =
                |(loads, cut): (&Loads, &Vec<usize>)| loads.compute_ns(kind, cut[stage], cut[stage + 1]);
            loads.iter().zip(&table.cuts).map(of_rank).max().unwrap_or(0)
        };
        let kernels = &self.options.kernels;
        let cheaper = |stage: usize| kernels.iter().copied().min_by_key(|&kind| slowest(stage, kind));
        (0..table.stages()).map(|stage| cheaper(stage).unwrap_or(table.gemm[stage])).collect()
    }

    /// Transfer orders and places for the shared expert, all with all.
    fn refine(&mut self, plan: &mut Plan) {
        let start = plan.table.clone();
        for order in sensible_orders(start.stages()) {
            for shared in self.shared_places() {
                if (&order, shared) != (&start.order, start.shared) {
                    self.try_plan(plan, StageTable { order: order.clone(), shared, ..start.clone() });
                }
            }
        }
    }

    fn shared_places(&self) -> Vec<SharedExpert> {
        match self.options.shared {
            Some(shared) => vec![shared],
            None if self.workload.shape.shared_inner == 0 => vec![SharedExpert::BesideCountExchange],
            None => vec![
                SharedExpert::BesideCountExchange,
                SharedExpert::BesideFirstDispatch,
                SharedExpert::BesideLastCombine,
                SharedExpert::Serial,
            ],
        }
    }

    /// Tries all cuts where they are few, and neighbours of good ones where not; then looks at kernels, orders and the
    /// shared expert again.
    fn improve(&mut self, plan: &mut Plan) {
        let loads = Loads::of(self.workload, self.cost, plan.table.reserved);
        match all_cuts(self.workload.map, plan.table.stages()) {
            Some(all) => {
                for cuts in all {
                    let table = StageTable { cuts, ..plan.table.clone() };
                    let gemm = self.kernels(&table, &loads);
                    if gemm != table.gemm {
                        self.try_plan(plan, StageTable { gemm, ..table.clone() });
                    }
                    self.try_plan(plan, table);
                }
            }
            None => self.climb(plan),
        }
        let gemm = self.kernels(&plan.table, &loads);
        if gemm != plan.table.gemm {
            self.try_plan(plan, StageTable { gemm, ..plan.table.clone() });
        }
        self.refine(plan);
    }

    /// Moves boundaries by one expert, on all ranks together or (where there are few) on one, while that helps.
    fn climb(&mut self, plan: &mut Plan) {
        let (ranks, stages) = (plan.table.cuts.len(), plan.table.stages());
        let mut budget = 40 * stages;
        let mut moved = stages > 1;
        while moved && budget > 0 {
            moved = false;
            for boundary in 1..stages {
                for who in std::iter::once(None).chain((0..ranks).filter(|_| ranks <= 4).map(Some)) {
                    for step in [1, -1] {
                        budget = budget.saturating_sub(1);
                        let Some(cuts) = shifted(&plan.table.cuts, boundary, who, step) else { continue };
                        let table = StageTable { cuts, ..plan.table.clone() };
                        moved |= budget > 0 && self.try_plan(plan, table);
                    }
                }
            }
        }
    }

    /// Plans that people know, to compare with.
    fn landmarks(&mut self) -> Vec<(String, Plan)> {
        let Workload { map, counts, .. } = *self.workload;
        let mut plans = Vec::new();
        for kind in self.options.kernels.clone() {
            let serial = StageTable::serial(map, kind);
            plans.push((format!("{} schedule, {kind} GEMM", Schedule::Serial), self.price(serial)));
            let stages = map.max_local().min(crate::Policy::DEFAULT_STAGES);
            let name = format!("{}, balanced by assignments, {kind} GEMM", count(stages, "stage"));
            let balanced = StageTable::balanced(map, counts, stages, kind);
            plans.extend(balanced.map(|table| (name, self.price(table))));
        }
        plans
    }

    fn allows(&self, plan: &Plan) -> bool {
        let stages = plan.table.stages();
        let fewest = self.options.min_stages.min(self.workload.map.max_local());
        (fewest..=self.options.max_stages).contains(&stages)
            && self.options.shared.is_none_or(|shared| plan.table.shared == shared)
    }

    /// The plan with the fewest stages among those that the cheapest one does not beat by the margin.
    fn choose(self, best_of: Vec<Plan>, landmarks: Vec<(String, Plan)>) -> Choice {
        let all =
            || best_of.iter().chain(landmarks.iter().map(|(_, plan)| plan)).filter(|plan| self.allows(plan));
        let cheapest = all().map(|plan| plan.layer_ns).min().unwrap_or(0);
        let tolerated = scale(cheapest, 1000 + self.options.margin);
        let good = all().filter(|plan| plan.layer_ns <= tolerated);
        let Some(best) = good.min_by_key(|plan| (plan.table.stages(), plan.layer_ns)).cloned() else {
            unreachable!("one stage is always priced")
        };
        let searched = best_of.iter().map(|plan| {
            let stages = plan.table.stages();
            (format!("best with {}: {}", count(stages, "stage"), in_words(&plan.table)), plan)
        });
        let known = landmarks.iter().map(|(name, plan)| (name.clone(), plan));
        let mut considered: Vec<Considered> = searched
            .chain(known)
            .map(|(what, plan)| Considered { what, stages: plan.table.stages(), layer_ns: plan.layer_ns })
            .collect();
        considered.sort_by_key(|considered| considered.layer_ns);
        let predicted = simulate(&best.table, self.workload, self.cost);
        let decision = decision_of(&best, self.workload, self.cost);
        let rivals = rivals(&best, best_of.iter().filter(|plan| self.allows(plan)).collect());
        let rivals = rivals.into_iter().map(|plan| decision_of(plan, self.workload, self.cost)).collect();
        Choice { table: best.table, predicted, considered, priced: self.priced, decision, rivals }
    }
}

/// Plans that may be better than `best` where the model is wrong: the cheapest of one stage, and of two, up to four, up to eight
/// and so on the cheapest each, if it is predicted to take at most [`RIVALRY`] more.
fn rivals<'a>(best: &Plan, mut plans: Vec<&'a Plan>) -> Vec<&'a Plan> {
    let doublings = |plan: &Plan| plan.table.stages().next_power_of_two();
    plans.sort_by_key(|plan| plan.layer_ns);
    let mut taken = vec![doublings(best)];
    plans.retain(|plan| {
        let is_near = plan.layer_ns <= scale(best.layer_ns, 1000 + RIVALRY);
        let is_rival = (is_near || plan.table.stages() == 1) && !taken.contains(&doublings(plan));
        if is_rival {
            taken.push(doublings(plan));
        }
        is_rival
    });
    plans
}

/// Permille.
const RIVALRY: u64 = 150;

/// What to keep of a plan.
fn decision_of(plan: &Plan, workload: &Workload<'_>, cost: &CostModel) -> Decision {
    let loads = Loads::of(workload, cost, plan.table.reserved);
    let of_rank = |(loads, cut): (&Loads, &Vec<usize>)| {
        cut[1..].iter().map(|&boundary| loads.permille(boundary)).collect()
    };
    Decision {
        gemm: plan.table.gemm.clone(),
        order: plan.table.order.clone(),
        shared: plan.table.shared,
        reserved: plan.table.reserved,
        targets: loads.iter().zip(&plan.table.cuts).map(of_rank).collect(),
    }
}

fn cut_all(loads: &[Loads], gemm: &[GemmKind]) -> Vec<Vec<usize>> {
    loads.iter().map(|loads| loads.cut(gemm, None, 0)).collect()
}

/// Every cut of every rank with every other's, unless these are more than [`MOST_CUTS`].
fn all_cuts(map: &SlotMap, stages: usize) -> Option<Vec<Vec<Vec<usize>>>> {
    let mut all: Vec<Vec<Vec<usize>>> = vec![Vec::new()];
    for rank in map.all_ranks() {
        let of_rank = rank_cuts(map.local_count(rank), stages)?;
        if all.len() * of_rank.len() > MOST_CUTS {
            return None;
        }
        let with =
            |cuts: &Vec<Vec<usize>>, cut: &Vec<usize>| [cuts.as_slice(), std::slice::from_ref(cut)].concat();
        all = all.iter().flat_map(|cuts| of_rank.iter().map(move |cut| with(cuts, cut))).collect();
    }
    Some(all)
}

/// Every way to put `local` experts into stages, empty ones too, unless there are more than [`MOST_CUTS`].
fn rank_cuts(local: usize, stages: usize) -> Option<Vec<Vec<usize>>> {
    let mut cuts = vec![vec![0]];
    for stage in 1..=stages {
        let ends = |last: usize| if stage == stages { local..=local } else { last..=local };
        let longer = |cut: &Vec<usize>| {
            let cut = cut.clone();
            ends(cut[stage - 1]).map(move |end| [cut.as_slice(), &[end]].concat())
        };
        cuts = cuts.iter().flat_map(longer).collect();
        if cuts.len() > MOST_CUTS {
            return None;
        }
    }
    Some(cuts)
}

/// The cuts with one boundary moved, if it stays between its neighbours somewhere.
fn shifted(cuts: &[Vec<usize>], boundary: usize, who: Option<usize>, step: isize) -> Option<Vec<Vec<usize>>> {
    let mut cuts = cuts.to_vec();
    let mut moved = false;
    for (rank, cut) in cuts.iter_mut().enumerate() {
        let Some(to) = cut[boundary].checked_add_signed(step) else { continue };
        if who.is_none_or(|who| who == rank) && (cut[boundary - 1]..=cut[boundary + 1]).contains(&to) {
            cut[boundary] = to;
            moved = true;
        }
    }
    moved.then_some(cuts)
}

fn in_words(table: &StageTable) -> String {
    let StageTable { gemm, shared, order, reserved, .. } = table;
    let kernels = match gemm.as_slice() {
        [one, rest @ ..] if rest.iter().all(|kind| kind == one) => format!("{one} GEMM"),
        mixed => mixed.iter().map(GemmKind::to_string).collect::<Vec<_>>().join(" "),
    };
    let order = if *order == StageTable::default_order(gemm.len()) {
        String::new()
    } else {
        format!(", order {}", order_text(order))
    };
    let reserved =
        if *reserved == 0 { String::new() } else { format!(", {reserved} ‰ kept for transfers") };
    format!("{kernels}, shared expert {shared}{order}{reserved}")
}

impl Choice {
    /// What was chosen, what it beat and what is expected of every stage, in words.
    pub fn explain(&self) -> String {
        self.to_string()
    }

    /// The cheapest plan of one stage that was priced.
    pub fn one_stage_ns(&self) -> u64 {
        let one = self.considered.iter().filter(|considered| considered.stages == 1);
        one.map(|considered| considered.layer_ns).min().unwrap_or(self.predicted.layer_ns)
    }

    fn reason(&self) -> String {
        let (chosen, one) = (self.predicted.layer_ns, self.one_stage_ns());
        let (stages, exposed) = (self.table.stages(), self.predicted.exposed_transfer_ns);
        if stages == 1 {
            let rival = self.considered.iter().find(|considered| considered.stages > 1);
            return match rival {
                None => "one stage: a rank has one expert, or more stages were not allowed".into(),
                Some(rival) => format!(
                    "one stage: more would cost {} % (overheads and slower work outweigh what they hide)",
                    percent(rival.layer_ns.saturating_sub(chosen), chosen)
                ),
            };
        }
        format!(
            "{stages} stages: {} % less time than the best single stage; {} of transfer remain exposed",
            percent(one.saturating_sub(chosen), one),
            Micros(exposed)
        )
    }
}

/// Tenths of a percent, as text.
fn percent(part: u64, whole: u64) -> String {
    let tenths = part * 1000 / whole.max(1);
    format!("{}.{}", tenths / 10, tenths % 10)
}

/// Plans beside the chosen one that an explanation shows.
const SHOWN: usize = 8;

/// Nanoseconds, shown as µs with a decimal.
struct Micros(u64);

impl fmt::Display for Micros {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{} µs", self.0 / 1000, self.0 % 1000 / 100)
    }
}

/// The cuts, a line for neighbouring ranks that have the same.
fn write_cuts(f: &mut fmt::Formatter<'_>, table: &StageTable) -> fmt::Result {
    let mut first = 0;
    for equal in table.cuts.chunk_by(|left, right| left == right) {
        let last = first + equal.len() - 1;
        let ranks = if first == last { Rank(first).to_string() } else { format!("ranks {first} to {last}") };
        let stages: Vec<String> =
            equal[0].windows(2).map(|ends| format!("{}..{}", ends[0], ends[1])).collect();
        writeln!(f, "{ranks}: {}", stages.join(" "))?;
        first = last + 1;
    }
    Ok(())
}

impl fmt::Display for Choice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Simulation { layer_ns, count_exchange_ns, exposed_transfer_ns, stages, .. } = &self.predicted;
        writeln!(f, "{}", self.reason())?;
        write_cuts(f, &self.table)?;
        writeln!(f, "order: {}", order_text(&self.table.order))?;
        writeln!(f, "{}", in_words(&self.table))?;
        writeln!(
            f,
            "predicted: {} a layer, count exchange {}, exposed transfer {}",
            Micros(*layer_ns),
            Micros(*count_exchange_ns),
            Micros(*exposed_transfer_ns)
        )?;
        for (stage, times) in stages.iter().enumerate() {
            let (dispatch, compute, combine) =
                (Micros(times.dispatch_ns), Micros(times.compute_ns), Micros(times.combine_ns));
            writeln!(f, "  {}: dispatch {dispatch}, compute {compute}, combine {combine}", Stage(stage))?;
        }
        writeln!(f, "{} priced; the best of each kind:", count(self.priced, "plan"))?;
        for considered in self.considered.iter().take(SHOWN) {
            writeln!(f, "  {}: {}", Micros(considered.layer_ns), considered.what)?;
        }
        Ok(())
    }
}
