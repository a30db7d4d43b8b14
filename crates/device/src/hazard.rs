//! Finds the missing event: two pieces of work that touch the same memory, one of them writing, must be
//! ordered by lane order, by events, or by the host.
//!
//! Order is known when work is *enqueued*, so it is checked there, with a vector clock per agent (Fidge 1988,
//! Mattern 1989): the agents are the host and the lanes. Each piece of work is a tick of its agent; an event
//! carries the clock of its lane; waiting for it merges that clock. An earlier access is ordered before a new
//! one exactly if the new one's clock has reached its tick.
//!
//! Worked example: compute writes `y` (tick 1), transfer reads `y` with nothing between: transfer's clock
//! says compute 0 < 1, a race. With `event = record(compute)` (clock compute 1) and `lane_wait(transfer,
//! event)`, transfer's clock says compute 1: ordered.

use crate::AllocationId;
use crate::op::{Access, Accesses};
use epsmoe_base::{Lane, Place};
use std::collections::HashMap;
use std::fmt;

/// Who does work: the thread that drives the device, or one of its lanes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Agent {
    /// The driving thread.
    Host,
    /// A lane.
    Lane(Lane),
}

const AGENTS: usize = 1 + Lane::ALL.len();

impl Agent {
    fn index(self) -> usize {
        match self {
            Agent::Host => 0,
            Agent::Lane(lane) => 1 + lane.index(),
        }
    }

    fn from_index(index: usize) -> Self {
        if index == 0 { Agent::Host } else { Agent::Lane(Lane::ALL[index - 1]) }
    }
}

impl fmt::Display for Agent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Agent::Host => f.write_str("host"),
            Agent::Lane(lane) => lane.fmt(f),
        }
    }
}

/// How much of every agent's work is known to have happened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Clock([u64; AGENTS]);

impl Clock {
    /// How many pieces of work of `lane` this point comes after.
    pub fn of(&self, lane: Lane) -> u64 {
        self.0[Agent::Lane(lane).index()]
    }

    fn merge(&mut self, other: &Clock) {
        for (mine, theirs) in self.0.iter_mut().zip(other.0) {
            *mine = (*mine).max(theirs);
        }
    }
}

/// Two accesses that nothing orders.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{name} on the {agent} {verb} {buffer} while {other_name} ({other_place}) on the {other_agent} \
     {other_verb} it, and no event orders them"
)]
pub struct Race {
    name: &'static str,
    agent: Agent,
    verb: &'static str,
    buffer: &'static str,
    other_name: &'static str,
    other_place: Place,
    other_agent: Agent,
    other_verb: &'static str,
}

struct Past {
    access: Access,
    agent: usize,
    tick: u64,
    name: &'static str,
    place: Place,
}

/// The accesses of one device that later work could still race with.
#[derive(Default)]
pub struct Hazards {
    clocks: [Clock; AGENTS],
    past: HashMap<AllocationId, Vec<Past>>,
}

impl Hazards {
    /// Past accesses of one allocation beyond which settled ones are dropped.
    const PRUNE: usize = 24;

    /// Takes in one piece of work of `agent`.
    pub fn advance(
        &mut self,
        agent: Agent,
        name: &'static str,
        place: Place,
        accesses: &Accesses,
    ) -> Result<(), Box<Race>> {
        let me = agent.index();
        // Enqueueing orders everything the host knows before the work.
        let host = self.clocks[Agent::Host.index()];
        self.clocks[me].merge(&host);
        self.clocks[me].0[me] += 1;
        let clock = self.clocks[me];
        for access in accesses.iter() {
            let past = self.past.entry(access.allocation).or_default();
            if let Some(other) = past.iter().find(|other| conflicts(other, access, me, &clock)) {
                return Err(Box::new(race(other, access, agent, name)));
            }
            past.retain(|other| !(other.agent == me && covers(access, &other.access)));
            past.push(Past { access: access.clone(), agent: me, tick: clock.0[me], name, place });
            if past.len() > Self::PRUNE {
                prune(past, &self.clocks);
            }
        }
        Ok(())
    }

    /// The point that `lane` has been filled to.
    pub fn record(&mut self, lane: Lane) -> Clock {
        self.clocks[Agent::Lane(lane).index()]
    }

    /// Orders everything before `event` before what `agent` does next.
    pub fn wait(&mut self, agent: Agent, event: &Clock) {
        self.clocks[agent.index()].merge(event);
    }
}

fn conflicts(other: &Past, access: &Access, me: usize, clock: &Clock) -> bool {
    let overlap = other.access.bytes.start < access.bytes.end && access.bytes.start < other.access.bytes.end;
    overlap && (other.access.write || access.write) && other.agent != me && other.tick > clock.0[other.agent]
}

/// Whether whatever races with `old` of the same agent would race with `new` too.
fn covers(new: &Access, old: &Access) -> bool {
    new.bytes.start <= old.bytes.start && old.bytes.end <= new.bytes.end && (new.write || !old.write)
}

/// Drops what every agent already comes after: nothing can race with it any more.
fn prune(past: &mut Vec<Past>, clocks: &[Clock; AGENTS]) {
    let host = clocks[Agent::Host.index()];
    past.retain(|other| {
        (0..AGENTS).any(|agent| {
            agent != other.agent && clocks[agent].0[other.agent].max(host.0[other.agent]) < other.tick
        })
    });
}

fn race(other: &Past, access: &Access, agent: Agent, name: &'static str) -> Race {
    let verb = |write| if write { "writes" } else { "reads" };
    Race {
        name,
        agent,
        verb: verb(access.write),
        buffer: access.name,
        other_name: other.name,
        other_place: other.place,
        other_agent: Agent::from_index(other.agent),
        other_verb: verb(other.access.write),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Buffer;
    use epsmoe_base::DType;

    const COMPUTE: Agent = Agent::Lane(Lane::Compute);
    const TRANSFER: Agent = Agent::Lane(Lane::Transfer);

    fn rows(range: std::ops::Range<usize>) -> Buffer {
        let allocation = AllocationId(0);
        Buffer { allocation, name: "y", dtype: DType::F32, offset: 0, rows: 8, width: 4, stride: 4 }
            .rows(range)
            .unwrap()
    }

    fn touch(hazards: &mut Hazards, agent: Agent, accesses: Accesses) -> Result<(), Box<Race>> {
        hazards.advance(agent, "op", Place::default(), &accesses)
    }

    #[test]
    fn the_worked_example() {
        let mut hazards = Hazards::default();
        touch(&mut hazards, COMPUTE, Accesses::new().write(&rows(0..4))).unwrap();
        let race = touch(&mut hazards, TRANSFER, Accesses::new().read(&rows(0..4))).unwrap_err();
        assert_eq!(
            race.to_string(),
            "op on the transfer lane reads y while op (outside any layer) on the compute lane writes it, \
             and no event orders them"
        );

        let mut hazards = Hazards::default();
        touch(&mut hazards, COMPUTE, Accesses::new().write(&rows(0..4))).unwrap();
        let event = hazards.record(Lane::Compute);
        hazards.wait(TRANSFER, &event);
        touch(&mut hazards, TRANSFER, Accesses::new().read(&rows(0..4))).unwrap();
    }

    #[test]
    fn order_is_transitive_through_another_agent() {
        let mut hazards = Hazards::default();
        touch(&mut hazards, COMPUTE, Accesses::new().write(&rows(0..4))).unwrap();
        let event = hazards.record(Lane::Compute);
        hazards.wait(Agent::Host, &event);
        // The host comes after compute, and enqueues on transfer: transfer comes after compute.
        touch(&mut hazards, TRANSFER, Accesses::new().write(&rows(0..4))).unwrap();
    }

    #[test]
    fn readers_and_disjoint_rows_do_not_race() {
        let mut hazards = Hazards::default();
        touch(&mut hazards, COMPUTE, Accesses::new().read(&rows(0..4))).unwrap();
        touch(&mut hazards, TRANSFER, Accesses::new().read(&rows(0..4))).unwrap();
        touch(&mut hazards, TRANSFER, Accesses::new().write(&rows(4..8))).unwrap();
        assert!(touch(&mut hazards, TRANSFER, Accesses::new().write(&rows(3..5))).is_err());
    }

    #[test]
    fn an_old_write_is_found_behind_a_later_read() {
        let mut hazards = Hazards::default();
        touch(&mut hazards, COMPUTE, Accesses::new().write(&rows(0..8))).unwrap();
        touch(&mut hazards, COMPUTE, Accesses::new().read(&rows(0..8))).unwrap();
        assert!(touch(&mut hazards, TRANSFER, Accesses::new().read(&rows(0..1))).is_err());
    }

    #[test]
    fn settled_accesses_are_dropped_and_unsettled_kept() {
        let mut hazards = Hazards::default();
        for round in 0..200 {
            let start = round % 7;
            touch(&mut hazards, COMPUTE, Accesses::new().write(&rows(start..start + 1))).unwrap();
            let event = hazards.record(Lane::Compute);
            hazards.wait(Agent::Host, &event);
        }
        assert!(hazards.past[&AllocationId(0)].len() <= Hazards::PRUNE + 1);
        touch(&mut hazards, COMPUTE, Accesses::new().write(&rows(7..8))).unwrap();
        assert!(touch(&mut hazards, TRANSFER, Accesses::new().read(&rows(7..8))).is_err());
    }
}
