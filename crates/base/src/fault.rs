//! How a world of ranks fails: the first cause wins, everyone stops, and every wait ends.

use crate::{Layer, Phase, Rank, Stage};
use std::any::Any;
use std::fmt;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

/// Where in a model a piece of work belongs; unset parts are not about one layer or stage, or not said.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
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
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FaultKind {
    /// A wait passed its deadline.
    Deadline,
    /// A rank or one of its lanes panicked.
    Panic,
    /// Two ranks disagree about what they exchange.
    Mismatch,
    /// Two pieces of work touch the same memory and no event orders them.
    Race,
    /// The program asked for something impossible; a bug or bad input found late.
    Invalid,
}

/// Why a world stopped: which rank saw it, where, and what happened.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
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
pub struct FaultCell(Arc<OnceLock<Fault>>);

impl FaultCell {
    /// How long a wait may sleep before it looks at the cell again.
    pub const POLL: Duration = Duration::from_millis(5);

    /// Reports a fault and returns the world's first one, which may be another.
    pub fn raise(&self, fault: Fault) -> Fault {
        self.0.get_or_init(|| fault).clone()
    }

    /// The fault that stopped the world, if any.
    pub fn get(&self) -> Option<&Fault> {
        self.0.get()
    }

    /// `Err` with the first fault once the world has stopped.
    pub fn check(&self) -> Result<(), Fault> {
        self.get().map_or(Ok(()), |fault| Err(fault.clone()))
    }
}

/// A point in time after which a wait gives up.
#[derive(Clone, Copy, Debug)]
pub struct Deadline {
    start: Instant,
    allowed: Duration,
}

impl Deadline {
    /// A deadline `allowed` from now.
    pub fn after(allowed: Duration) -> Self {
        Deadline { start: Instant::now(), allowed }
    }

    /// Whether the wait must give up.
    pub fn passed(&self) -> bool {
        self.start.elapsed() >= self.allowed
    }

    /// How long the wait was allowed to take.
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

    #[test]
    fn deadlines_pass() {
        assert!(Deadline::after(Duration::ZERO).passed());
        assert!(!Deadline::after(Duration::from_secs(60)).passed());
    }
}
