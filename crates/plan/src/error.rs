//! Why a plan was refused: the thing, the two values that disagree, and the mend.

use crate::{Schedule, SlotMap};
use epsmoe_base::{Rank, Stage};

/// A decision that cannot be made, or numbers that cannot be true.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PlanError {
    /// No rank, or a rank that would hold no expert.
    #[error(
        "{ranks} expert-parallel ranks for {experts} experts: use 1 to {experts} ranks, so that each holds an expert"
    )]
    Ranks {
        /// Routed experts of the layer.
        experts: usize,
        /// Ranks asked for.
        ranks: usize,
    },
    /// More experts than a layer can have.
    #[error(
        "{experts} routed experts: a layer has at most {}, whose histograms all ranks exchange",
        SlotMap::MOST_EXPERTS
    )]
    Experts {
        /// Routed experts of the layer.
        experts: usize,
    },
    /// A rank's slots that cannot be.
    #[error("{rank} {problem}")]
    Slots {
        /// The rank.
        rank: Rank,
        /// What is wrong with its slots, and the mend.
        problem: String,
    },
    /// An expert that nobody holds.
    #[error("expert {expert} is in no slot: give every expert one")]
    NoSlot {
        /// The expert.
        expert: usize,
    },
    /// More experts per token than experts, or none.
    #[error(
        "top-{top_k} routing over {experts} experts: a token is sent to 1 to {experts} different experts"
    )]
    TopK {
        /// Experts a token is sent to.
        top_k: usize,
        /// Routed experts of the layer.
        experts: usize,
    },
    /// The arrays of a routing are not `[T, k]`.
    #[error("routing has {experts} expert ids and {weights} weights: both must be tokens × {top_k}")]
    RoutingShape {
        /// Expert ids given.
        experts: usize,
        /// Weights given.
        weights: usize,
        /// Experts a token is sent to.
        top_k: usize,
    },
    /// A token is sent to an expert that does not exist.
    #[error("token {token} is routed to expert {expert}, but the layer has {experts} experts")]
    UnknownExpert {
        /// The token's position on its rank.
        token: usize,
        /// The expert named.
        expert: u32,
        /// Routed experts of the layer.
        experts: usize,
    },
    /// A token is sent to one expert twice.
    #[error("token {token} is routed to expert {expert} twice: add the two weights and route it once")]
    ExpertTwice {
        /// The token's position on its rank.
        token: usize,
        /// The expert named twice.
        expert: u32,
    },
    /// Announced counts have the wrong length.
    #[error("a rank's counts are {got} bytes, but {slots} slots need {want}: the ranks run different models")]
    CountsLength {
        /// Bytes received.
        got: usize,
        /// Bytes the number of slots demands.
        want: usize,
        /// Slots of the layer.
        slots: usize,
    },
    /// The count exchange gathered the counts of too few or too many ranks.
    #[error(
        "counts of {got} ranks gathered, but the experts are placed on {want}: gather from exactly those"
    )]
    CountsRanks {
        /// Ranks whose counts were gathered.
        got: usize,
        /// Ranks of the map.
        want: usize,
    },
    /// What a rank announced contradicts itself.
    #[error(
        "{rank} announced counts that cannot be true: {left_name} is {left}, {right_name} is {right}; its routing or its message is corrupt"
    )]
    Counts {
        /// The rank that announced them.
        rank: Rank,
        /// The first of two numbers.
        left_name: String,
        /// Its value.
        left: u64,
        /// The number it contradicts.
        right_name: String,
        /// Its value.
        right: u64,
    },
    /// A layer has more assignments than 32-bit indices can count.
    #[error(
        "{assignments} (token, expert) pairs in one layer: indices are 32 bits wide (at most {}); use fewer tokens at once",
        u32::MAX
    )]
    TooManyAssignments {
        /// Assignments over all ranks.
        assignments: u64,
    },
    /// A stage count that leaves a stage without experts on every rank, or none.
    #[error("{stages} stages for {experts} experts on a rank: use 1 to {experts} stages")]
    StageCount {
        /// Stages asked for.
        stages: usize,
        /// Most experts a rank holds.
        experts: usize,
    },
    /// Stage sizes that do not cover a rank's experts.
    #[error(
        "stage sizes add up to {sum}, but a rank holds {experts} experts: the sizes must add up to {experts}"
    )]
    StageSizes {
        /// Sum of the sizes given.
        sum: usize,
        /// Most experts a rank holds.
        experts: usize,
    },
    /// A stage table has the wrong number of something.
    #[error("stage table has {got} {what}, expected {want}")]
    TableLength {
        /// What is counted.
        what: String,
        /// How many there are.
        got: usize,
        /// How many there must be.
        want: usize,
    },
    /// The boundaries of a rank's stages go backwards or miss experts.
    #[error(
        "stage boundary {boundary} of {rank} is {got}, expected {expected}: boundaries start at 0, never fall and end at the rank's last expert"
    )]
    Cut {
        /// The rank whose cut it is.
        rank: Rank,
        /// Position in the list of boundaries.
        boundary: usize,
        /// The boundary.
        got: usize,
        /// What it must be.
        expected: String,
    },
    /// More of the processor is left to transfers than there is.
    #[error("{permille} ‰ of the processor are left to transfers: leave computation some, 999 ‰ at the most")]
    Reserved {
        /// What the table says.
        permille: u64,
    },
    /// A transfer is missing from the order, or there twice, or of a stage that does not exist.
    #[error("the transfer order has {step} {got} times, expected {want}: with {stages} stages it has d0 to d{last} and c0 to c{last} once each", last = stages.saturating_sub(1))]
    OrderSteps {
        /// The transfer, as in the order's text.
        step: String,
        /// How often it is there.
        got: usize,
        /// How often it must be.
        want: usize,
        /// Stages of the table, at least one.
        stages: usize,
    },
    /// A combine before a dispatch whose rows it waits for.
    #[error(
        "the transfer order has {combine} before {dispatch}: {stage} computes only after {dispatch} has arrived, so the transfer lane would wait for itself for ever; move {dispatch} before {combine}"
    )]
    OrderDeadlock {
        /// The combine, as in the order's text.
        combine: String,
        /// The dispatch it needs.
        dispatch: String,
        /// The stage that the combine sends back.
        stage: Stage,
    },
    /// A word that names nothing.
    #[error("`{text}` is not {what}: write {expected}")]
    Unreadable {
        /// What the user wrote.
        text: String,
        /// What it should have been.
        what: &'static str,
        /// How that is written.
        expected: &'static str,
    },
    /// The serial schedule together with something that only a staged one has.
    #[error(
        "the {schedule} schedule has {has}, but {asked} was asked for: use the staged schedule, or leave it out"
    )]
    FixedWith {
        /// Which.
        schedule: Schedule,
        /// What that means here.
        has: &'static str,
        /// What was asked for beside it.
        asked: String,
    },
    /// The auto schedule together with what it decides itself.
    #[error(
        "the auto schedule decides this itself, but {asked} was asked for: use the staged schedule, or leave it out"
    )]
    AutoWith {
        /// What was asked for beside it.
        asked: String,
    },
}
