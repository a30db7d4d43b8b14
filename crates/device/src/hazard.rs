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

use crate::op::{Access, Accesses};
use crate::{AllocationId, WeightSlot};
use epsmoe_base::{Lane, Place};
use std::collections::HashMap;
use std::fmt;
use std::sync::Arc;

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

/// What two pieces of work touch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Touched {
    Buffer(&'static str),
    Slot(WeightSlot),
}

impl fmt::Display for Touched {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Touched::Buffer(name) => f.write_str(name),
            Touched::Slot(slot) => slot.fmt(f),
        }
    }
}

/// Two accesses that nothing orders.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{name} on the {agent} {verb} {touched} while {other_name} ({other_place}) on the {other_agent} \
     {other_verb} it, and no event orders them"
)]
pub struct Race {
    name: &'static str,
    agent: Agent,
    verb: &'static str,
    touched: Touched,
    other_name: &'static str,
    other_place: Place,
    other_agent: Agent,
    other_verb: &'static str,
}

impl Race {
    /// In words, with a weight called by its name.
    pub fn describe(&self, name_of: impl Fn(WeightSlot) -> Option<Arc<str>>) -> String {
        let name = if let Touched::Slot(slot) = self.touched { name_of(slot) } else { None };
        let named = name.map_or_else(String::new, |name| format!(" ({name})"));
        self.to_string().replacen(&self.touched.to_string(), &format!("{}{named}", self.touched), 1)
    }
}

/// One piece of work, and when.
#[derive(Clone, Copy)]
struct Tick {
    agent: usize,
    tick: u64,
    name: &'static str,
    place: Place,
}

impl Tick {
    /// Whether nothing orders it before what `me` does at `clock`.
    fn is_beside(&self, me: usize, clock: &Clock) -> bool {
        self.agent != me && self.tick > clock.0[self.agent]
    }

    /// Whether every agent comes after it: nothing can race with it any more.
    fn is_settled(&self, clocks: &[Clock; AGENTS]) -> bool {
        let host = clocks[Agent::Host.index()].0[self.agent];
        (0..AGENTS).all(|agent| agent == self.agent || clocks[agent].0[self.agent].max(host) >= self.tick)
    }
}

struct Past {
    access: Access,
    at: Tick,
}

/// Accesses of weights. Weights are read by nearly every piece of work and seldom written, so reads are only noted, by
/// the piece of work, and looked through when a slot is written.
#[derive(Default)]
struct SlotPast {
    reads: Vec<(Tick, Vec<WeightSlot>)>,
    /// How many reads there may be before settled ones are dropped.
    prune_at: usize,
    writes: HashMap<WeightSlot, Tick>,
}

impl SlotPast {
    /// An earlier access that is beside those of `me` at `clock`: the slot, the other work, whether it wrote, and
    /// whether `me` writes.
    fn conflict(
        &self,
        accesses: &Accesses,
        me: usize,
        clock: &Clock,
    ) -> Option<(WeightSlot, Tick, bool, bool)> {
        let (reads, writes) = (accesses.slots_read(), accesses.slots_written());
        if !self.writes.is_empty() {
            let touched =
                reads.iter().map(|slot| (slot, false)).chain(writes.iter().map(|slot| (slot, true)));
            let written =
                touched.filter_map(|(slot, write)| Some((*slot, *self.writes.get(slot)?, true, write)));
            if let Some(conflict) = written.into_iter().find(|(_, other, ..)| other.is_beside(me, clock)) {
                return Some(conflict);
            }
        }
        writes.iter().find_map(|slot| {
            let beside =
                |(tick, slots): &&(Tick, Vec<WeightSlot>)| tick.is_beside(me, clock) && slots.contains(slot);
            self.reads.iter().find(beside).map(|(tick, _)| (*slot, *tick, false, true))
        })
    }

    fn note(&mut self, accesses: &Accesses, at: Tick, clocks: &[Clock; AGENTS]) {
        /// So many reads are not worth looking through.
        const FEW: usize = 64;
        self.writes.extend(accesses.slots_written().iter().map(|slot| (*slot, at)));
        if accesses.slots_read().is_empty() {
            return;
        }
        self.reads.push((at, accesses.slots_read().to_vec()));
        if self.reads.len() > self.prune_at.max(FEW) {
            self.reads.retain(|(tick, _)| !tick.is_settled(clocks));
            self.writes.retain(|_, tick| !tick.is_settled(clocks));
            self.prune_at = 2 * self.reads.len();
        }
    }
}

/// The accesses of one device that later work could still race with.
#[derive(Default)]
pub struct Hazards {
    clocks: [Clock; AGENTS],
    past: HashMap<AllocationId, Vec<Past>>,
    slots: SlotPast,
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
        let at = Tick { agent: me, tick: clock.0[me], name, place };
        if let Some((slot, other, wrote, write)) = self.slots.conflict(accesses, me, &clock) {
            return Err(race(Touched::Slot(slot), (&other, wrote), (agent, name, write)));
        }
        for access in accesses.iter() {
            let past = self.past.entry(access.allocation).or_default();
            if let Some(other) = past.iter().find(|other| conflicts(other, access, me, &clock)) {
                let touched = Touched::Buffer(access.name);
                return Err(race(touched, (&other.at, other.access.write), (agent, name, access.write)));
            }
            past.retain(|other| !(other.at.agent == me && covers(access, &other.access)));
            past.push(Past { access: access.clone(), at });
            if past.len() > Self::PRUNE {
                past.retain(|other| !other.at.is_settled(&self.clocks));
            }
        }
        self.slots.note(accesses, at, &self.clocks);
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
    overlap && (other.access.write || access.write) && other.at.is_beside(me, clock)
}

/// Whether whatever races with `old` of the same agent would race with `new` too.
fn covers(new: &Access, old: &Access) -> bool {
    new.bytes.start <= old.bytes.start && old.bytes.end <= new.bytes.end && (new.write || !old.write)
}

fn race(
    touched: Touched,
    (other, other_writes): (&Tick, bool),
    (agent, name, writes): (Agent, &'static str, bool),
) -> Box<Race> {
    let verb = |write| if write { "writes" } else { "reads" };
    Box::new(Race {
        name,
        agent,
        verb: verb(writes),
        touched,
        other_name: other.name,
        other_place: other.place,
        other_agent: Agent::from_index(other.agent),
        other_verb: verb(other_writes),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Buffer, Weight, WeightFormat, WeightShape};
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

    fn weight(slot: u32) -> Weight {
        let (shape, format) = (WeightShape::Vector { n: 1 }, WeightFormat::F32);
        Weight { slot: WeightSlot(slot), shape, format, name: format!("w{slot}").into() }
    }

    #[test]
    fn a_slot_that_is_read_may_not_be_written_beside_it_nor_the_other_way_round() {
        let (reads, writes) = (
            |slot| Accesses::new().read_weights([&weight(slot)]),
            |slot| Accesses::new().write_weight(&weight(slot)),
        );
        let mut hazards = Hazards::default();
        touch(&mut hazards, COMPUTE, reads(3)).unwrap();
        touch(&mut hazards, TRANSFER, reads(3)).unwrap();
        touch(&mut hazards, TRANSFER, writes(4)).unwrap();
        let race = touch(&mut hazards, TRANSFER, writes(3)).unwrap_err();
        assert_eq!(
            race.describe(|slot| Some(format!("w{}", slot.0).into())),
            "op on the transfer lane writes weight slot 3 (w3) while op (outside any layer) on the compute lane reads \
             it, and no event orders them"
        );
        let mut hazards = Hazards::default();
        touch(&mut hazards, TRANSFER, writes(3)).unwrap();
        assert!(touch(&mut hazards, COMPUTE, reads(3)).is_err());
        let event = hazards.record(Lane::Transfer);
        hazards.wait(COMPUTE, &event);
        touch(&mut hazards, COMPUTE, reads(3)).unwrap();
    }

    #[test]
    fn reads_of_slots_that_are_settled_are_dropped_and_others_kept() {
        let mut hazards = Hazards::default();
        let reads = |slot| Accesses::new().read_weights([&weight(slot)]);
        for slot in 0..1000 {
            touch(&mut hazards, COMPUTE, reads(slot)).unwrap();
            let event = hazards.record(Lane::Compute);
            hazards.wait(Agent::Host, &event);
        }
        assert!(hazards.slots.reads.len() <= 65, "{}", hazards.slots.reads.len());
        touch(&mut hazards, COMPUTE, reads(1000)).unwrap();
        (0..200).for_each(|slot| touch(&mut hazards, COMPUTE, reads(slot)).unwrap());
        assert!(touch(&mut hazards, TRANSFER, Accesses::new().write_weight(&weight(1000))).is_err());
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
