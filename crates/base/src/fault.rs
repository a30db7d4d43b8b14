//! How a world of ranks fails: the first cause wins, everyone stops, and every wait ends.

use crate::{Layer, Phase, Rank, Stage};
use serde::{Deserialize, Serialize};
use std::any::Any;
use std::fmt;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

/// Where in a model a piece of work belongs; unset parts are not about one layer or stage, or not said.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Place {
    /// The transformer layer.
    pub layer: Option<Layer>,
    /// The stage of the layer's expert pipeline.
    pub stage: Option<Stage>,
    /// What the work is for. An operation whose place does not say has a phase of its own.
    pub phase: Option<Phase>,
}

impl Place {
    /// Work of one layer.
    pub fn layer(layer: Layer) -> Self {
        Place { layer: Some(layer), ..Place::default() }
    }

    /// The same layer, one stage of it.
    pub fn stage(self, stage: Stage) -> Self {
        Place { stage: Some(stage), ..self }
    }

    /// The same layer and stage, one phase of them.
    pub fn phase(self, phase: Phase) -> Self {
        Place { phase: Some(phase), ..self }
    }

    /// The same place, of this phase unless it has one.
    pub fn or_phase(self, phase: Phase) -> Self {
        Place { phase: self.phase.or(Some(phase)), ..self }
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.layer, self.stage) {
            (Some(layer), Some(stage)) => write!(f, "{layer}, {stage}"),
            (Some(layer), None) => write!(f, "{layer}"),
            (None, Some(stage)) => write!(f, "{stage}"),
            (None, None) => write!(f, "outside any layer"),
        }
    }
}

/// What kind of thing went wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum FaultKind {
    /// A wait passed its deadline.
    Deadline,
    /// A rank or one of its lanes panicked.
    Panic,
    /// A rank's process has ended, or nothing is heard of it any more.
    Lost,
    /// Two ranks disagree about what they exchange.
    Mismatch,
    /// Two pieces of work touch the same memory and no event orders them.
    Race,
    /// The program asked for something impossible; a bug or bad input found late.
    Invalid,
}

/// Why a world stopped: which rank saw it, where, and what happened.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{rank}, {place}: {message}")]
pub struct Fault {
    /// The kind, for programs.
    pub kind: FaultKind,
    /// The rank that saw it.
    pub rank: Rank,
    /// Where in the model it was seen.
    pub place: Place,
    /// What happened, for people.
    pub message: String,
}

/// The one place where the ranks of a world learn that one of them failed. Set once: the first cause wins,
/// and is what the user sees; later ones are consequences.
#[derive(Clone, Debug, Default)]
pub struct FaultCell(Arc<Cell>);

#[derive(Default)]
struct Cell {
    first: OnceLock<Fault>,
    jury: OnceLock<Arc<dyn Jury>>,
}

impl fmt::Debug for Cell {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.first.fmt(f)
    }
}

/// Decides which fault was the first, where the ranks of a world are in several processes, each with a cell.
pub trait Jury: Send + Sync {
    /// The world's first fault, given what was seen here. Takes a bounded time, and tells the other processes.
    fn first(&self, seen: Fault) -> Fault;
}

impl FaultCell {
    /// How long a wait may sleep before it looks at the cell again.
    pub const POLL: Duration = Duration::from_millis(5);

    /// Reports a fault and returns the world's first one, which may be another.
    pub fn raise(&self, fault: Fault) -> Fault {
        let first = || self.0.jury.get().map_or_else(|| fault.clone(), |jury| jury.first(fault.clone()));
        self.0.first.get_or_init(first).clone()
    }

    /// From now on `jury` decides which fault is the first. A cell has one at most.
    pub fn asks(&self, jury: Arc<dyn Jury>) {
        let set = self.0.jury.set(jury);
        debug_assert!(set.is_ok(), "a second jury. This is a bug.");
    }

    /// The fault that stopped the world, if any.
    pub fn get(&self) -> Option<&Fault> {
        self.0.first.get()
    }

    /// `Err` with the first fault once the world has stopped.
    pub fn check(&self) -> Result<(), Fault> {
        self.get().map_or(Ok(()), |fault| Err(fault.clone()))
    }
}

/// How long a wait may take, in time that the process was able to run: whoever waits looks now and then whether it has
/// [`passed`](Deadline::passed), and only so much of the time between two looks counts as a running process may let go
/// by. While a process is stopped (Ctrl-Z), or its machine sleeps, no deadline comes nearer.
#[derive(Clone, Debug)]
pub struct Deadline {
    allowed: Duration,
    /// When to give up, in time that counts.
    limit: Duration,
    counted: Duration,
    looked: Instant,
}

impl Deadline {
    /// The most that counts of the time between two looks.
    const LONGEST_LOOK: Duration = FaultCell::POLL.saturating_mul(20);

    /// A deadline `allowed` from now.
    pub fn after(allowed: Duration) -> Self {
        Deadline { allowed, limit: allowed, counted: Duration::ZERO, looked: Instant::now() }
    }

    /// For a wait on work that keeps deadlines of its own, `allowed` each: twice as long, so that the work gives up
    /// first and says what it was waiting for.
    pub fn behind(allowed: Duration) -> Self {
        Deadline { limit: allowed.saturating_mul(2), ..Deadline::after(allowed) }
    }

    /// Whether the wait must give up. Asked every [`FaultCell::POLL`] or so.
    pub fn passed(&mut self) -> bool {
        self.passed_at(Instant::now())
    }

    fn passed_at(&mut self, now: Instant) -> bool {
        self.counted += now.saturating_duration_since(self.looked).min(Self::LONGEST_LOOK);
        self.looked = now;
        self.counted >= self.limit
    }

    /// Begins anew: what is waited for has come nearer.
    pub fn restart(&mut self) {
        (self.counted, self.looked) = (Duration::ZERO, Instant::now());
    }

    /// How long was allowed, for messages.
    pub fn allowed(&self) -> Duration {
        self.allowed
    }
}

/// What a panic said.
pub fn panic_text(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("no message")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fault(rank: usize) -> Fault {
        Fault {
            kind: FaultKind::Panic,
            rank: Rank(rank),
            place: Place::layer(Layer(3)).stage(Stage(1)),
            message: "the compute lane panicked".into(),
        }
    }

    #[test]
    fn the_first_cause_wins() {
        let cell = FaultCell::default();
        assert!(cell.check().is_ok());
        cell.raise(fault(1));
        assert_eq!(cell.raise(fault(0)).rank, Rank(1));
        assert_eq!(
            cell.check().unwrap_err().to_string(),
            "rank 1, layer 3, stage 1: the compute lane panicked"
        );
    }

    /// Says that another fault came before all that it hears of.
    struct Elsewhere;

    impl Jury for Elsewhere {
        fn first(&self, seen: Fault) -> Fault {
            Fault { rank: Rank(seen.rank.0 + 10), ..seen }
        }
    }

    #[test]
    fn a_jury_knows_of_earlier_faults() {
        let cell = FaultCell::default();
        cell.clone().asks(Arc::new(Elsewhere));
        assert_eq!(cell.raise(fault(1)).rank, Rank(11));
        assert_eq!(cell.raise(fault(2)).rank, Rank(11));
        assert_eq!(cell.get().map(|fault| fault.rank), Some(Rank(11)));
    }

    #[test]
    fn deadlines_pass() {
        assert!(Deadline::after(Duration::ZERO).passed());
        assert!(!Deadline::after(Duration::from_secs(60)).passed());
    }

    #[test]
    fn only_time_that_the_process_ran_counts() {
        let (mut deadline, begun) = (Deadline::after(Duration::from_secs(1)), Instant::now());
        let mut now = begun;
        let mut look = |after| {
            now += after;
            deadline.passed_at(now)
        };
        assert!((0..150).all(|_| !look(FaultCell::POLL)), "750 ms of polling");
        assert!(!look(Duration::from_secs(3600)), "the process was stopped for an hour");
        let polls = (0..).take_while(|_| !look(FaultCell::POLL)).count();
        assert!(
            (25..=50).contains(&polls),
            "250 ms were left, and at most 100 ms of the hour count: {polls}"
        );
    }

    #[test]
    fn a_wait_behind_others_gives_them_time_to_say_what_is_late() {
        let allowed = Duration::from_secs(1);
        let mut deadline = Deadline::behind(allowed);
        let mut look = |ms| deadline.passed_at(deadline.looked + Duration::from_millis(ms));
        assert!((0..19).all(|_| !look(100)));
        assert!(look(100));
        assert_eq!(deadline.allowed(), allowed);
        deadline.restart();
        assert!(!deadline.passed());
    }
}
