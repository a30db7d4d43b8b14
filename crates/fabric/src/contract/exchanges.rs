//! Exchanges of rows that go well.

use super::{Node, SHORT, Start, World, on_all_ranks};
use crate::{Exchange, Transport};
use epsmoe_base::{DType, Lane, Layer, Mix, Place, Rank, Stage, env::test_seed};
use epsmoe_device::{Backend, Buffer, DeviceError};
use std::ops::Range;
use std::sync::Arc;

/// On which lanes the exchanges of a check run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lanes {
    /// The transfer lane.
    Transfer,
    /// Any, several at once.
    Any,
}

impl Lanes {
    fn draw(self, mix: &mut Mix) -> Lane {
        match self {
            Lanes::Transfer => Lane::Transfer,
            Lanes::Any => Lane::ALL[mix.below(Lane::ALL.len())],
        }
    }
}

/// One exchange of a random script: everything follows from the seed, so every rank knows all of it.
#[derive(Clone, Debug)]
struct Planned {
    name: &'static str,
    place: Place,
    lane: Lane,
    dtype: DType,
    width: usize,
    /// Columns left and right of the rows, which must not travel.
    margin: (usize, usize),
    /// Rows from each rank of the world to each, `[source · R + destination]`; those outside a group do not count.
    rows: Vec<usize>,
}

impl Planned {
    fn random(mix: &mut Mix, size: usize, lane: Lane) -> Self {
        let empty = mix.below(3);
        let most = [2, 5, 40][mix.below(3)];
        Planned {
            name: ["dispatch", "combine", "metadata"][mix.below(3)],
            place: Place::layer(Layer(mix.below(3))).stage(Stage(mix.below(3))),
            lane,
            dtype: [DType::F32, DType::BF16, DType::U32][mix.below(3)],
            width: 1 + mix.below(9),
            margin: (mix.below(2), mix.below(2)),
            rows: (0..size * size).map(|_| if mix.below(3) < empty { 0 } else { mix.below(most) }).collect(),
        }
    }

    fn rows(&self, source: Rank, destination: Rank) -> usize {
        self.rows[source.0 * self.rows.len().isqrt() + destination.0]
    }

    /// Consecutive parts of a buffer with margins, one for each of `ranks`.
    fn parts<B: Backend>(
        &self,
        node: &Node<B>,
        ranks: &[Rank],
        rows: impl Fn(Rank) -> usize,
    ) -> (Buffer, Vec<Buffer>) {
        let ends: Vec<Range<usize>> = ranks
            .iter()
            .scan(0, |end, &rank| {
                let start = *end;
                *end += rows(rank);
                Some(start..*end)
            })
            .collect();
        let (left, right) = self.margin;
        let total = ends.last().map_or(0, |rows| rows.end);
        let all = node.rows(self.dtype, total, left + self.width + right);
        let columns = all.columns(left..left + self.width).expect("inside");
        let parts = ends.into_iter().map(|rows| columns.rows(rows).expect("inside")).collect();
        (all, parts)
    }

    /// Numbers that say whence, whither, which row and column; small enough for every format.
    fn part(&self, source: Rank, destination: Rank) -> Vec<u32> {
        let number = |at: usize| {
            let (row, column) = (at / self.width, at % self.width);
            ((source.0 * 7 + destination.0 * 31 + row * 5 + column * 3 + self.width) % 251) as u32
        };
        (0..self.rows(source, destination) * self.width).map(number).collect()
    }

    /// Fills the send parts and enqueues the exchange; what arrives is checked once the lanes are done.
    fn start<B: Backend>(&self, node: &Node<B>, transport: &dyn Transport<B>) -> Buffer {
        let (me, ranks) = (Rank(node.rank()), transport.ranks());
        let (_, send) = self.parts(node, ranks, |rank| self.rows(me, rank));
        let (all, receive) = self.parts(node, ranks, |rank| self.rows(rank, me));
        for (&rank, part) in ranks.iter().zip(&send) {
            node.fill(part, &self.part(me, rank));
        }
        node.device.lane_wait(self.lane, &node.device.record(Lane::Compute));
        let exchange = Exchange { name: self.name, send, receive };
        transport.all_to_all_v(&node.device, self.lane, self.place, exchange).expect("a part for each rank");
        all
    }

    fn check<B: Backend>(&self, node: &Node<B>, ranks: &[Rank], all: &Buffer, context: &str) {
        let (me, (left, right)) = (Rank(node.rank()), self.margin);
        let mut want = Vec::new();
        for &source in ranks {
            for row in self.part(source, me).chunks(self.width) {
                want.extend(std::iter::repeat_n(None, left));
                want.extend(row.iter().map(|&number| Some(number)));
                want.extend(std::iter::repeat_n(None, right));
            }
        }
        assert_eq!(node.numbers(all), want, "{me} of {ranks:?}, {self:?}, {context}");
    }
}

/// Random scripts of exchanges, with uneven counts and none, all in flight at once.
pub fn exchanges<B: Backend>(world: &World<'_, B>, lanes: Lanes) {
    let seed = test_seed();
    for case in 0..36 {
        let mut mix = Mix::keyed(seed, &[case]);
        let size = 1 + case as usize % world.most;
        let script: Vec<Planned> = (0..1 + mix.below(12))
            .map(|_| {
                let lane = lanes.draw(&mut mix);
                Planned::random(&mut mix, size, lane)
            })
            .collect();
        let context = format!("case {case}, {size} ranks, seed {seed}");
        on_all_ranks(world.patient(size, mix.next_u64()), move |node| {
            let transport = &*node.fabric.transport;
            let arrived: Vec<Buffer> =
                script.iter().map(|exchange| exchange.start(node, transport)).collect();
            node.finish().unwrap_or_else(|fault| panic!("{context}: {fault}"));
            for (exchange, all) in script.iter().zip(&arrived) {
                exchange.check(node, transport.ranks(), all, &context);
            }
        });
    }
}

/// The same in sub-groups: the ranks are dealt out to groups in several ways, and every rank exchanges now in one of its
/// groups, now in another, now with all; groups do not wait for each other's ranks, nor mix up their rows.
pub fn subgroups<B: Backend>(world: &World<'_, B>) {
    let seed = test_seed();
    for case in 0..24 {
        let mut mix = Mix::keyed(seed, &[77, case]);
        let size = 1 + case as usize % world.most;
        // [way][rank] its group. The first two ways are equal, and are groups of their own all the same.
        let mut deal = || -> Vec<usize> { (0..size).map(|_| mix.below(3)).collect() };
        let (first, last) = (deal(), deal());
        let deals = [first.clone(), first, last];
        let script: Vec<(usize, Planned)> = (0..1 + mix.below(12))
            .map(|_| {
                let (way, lane) = (mix.below(4), Lanes::Any.draw(&mut mix));
                (way, Planned::random(&mut mix, size, lane))
            })
            .collect();
        let context = format!("case {case}, groups {deals:?}, seed {seed}");
        on_all_ranks(world.patient(size, mix.next_u64()), move |node| {
            let me = node.rank();
            let members = |deal: &Vec<usize>| -> Vec<Rank> {
                (0..size).filter(|&rank| deal[rank] == deal[me]).map(Rank).collect()
            };
            let group =
                |deal| node.fabric.transport.subgroup(&members(deal)).expect("a group with this rank");
            let mut transports: Vec<Arc<dyn Transport<B>>> = deals.iter().map(group).collect();
            transports.push(Arc::clone(&node.fabric.transport));
            let start = |(way, exchange): &(usize, Planned)| exchange.start(node, &*transports[*way]);
            let arrived: Vec<Buffer> = script.iter().map(start).collect();
            node.finish().unwrap_or_else(|fault| panic!("{context}: {fault}"));
            for ((way, exchange), all) in script.iter().zip(&arrived) {
                exchange.check(node, transports[*way].ranks(), all, &context);
            }
        });
    }
}

/// What was sent may be overwritten once the exchange is complete.
pub fn overwriting<B: Backend>(world: &World<'_, B>) {
    let size = world.most.min(3);
    on_all_ranks(world.patient(size, test_seed()), move |node| {
        let device = &node.device;
        let send = node.rows(DType::U32, size, 4);
        let rounds: Vec<Buffer> = (0..20)
            .map(|round| {
                let number = |at: usize| 1000 * round + 100 * node.rank() as u32 + (at / 4) as u32;
                let numbers: Vec<u32> = (0..4 * size).map(number).collect();
                device.lane_wait(Lane::Compute, &device.record(Lane::Transfer));
                node.fill(&send, &numbers);
                device.lane_wait(Lane::Transfer, &device.record(Lane::Compute));
                let receive = node.rows(DType::U32, size, 4);
                let row = |buffer: &Buffer| {
                    (0..size).map(|rank| buffer.rows(rank..rank + 1).expect("inside")).collect()
                };
                let exchange = Exchange { name: "turn", send: row(&send), receive: row(&receive) };
                let enqueued =
                    node.fabric.transport.all_to_all_v(device, Lane::Transfer, Place::default(), exchange);
                enqueued.expect("a part for each rank");
                receive
            })
            .collect();
        node.finish().expect("no fault");
        for (round, received) in rounds.iter().enumerate() {
            let from = |source: usize| vec![Some((1000 * round + 100 * source + node.rank()) as u32); 4];
            assert_eq!(node.numbers(received), (0..size).flat_map(from).collect::<Vec<_>>(), "round {round}");
        }
    });
}

/// Parts for all ranks, and groups that hold this rank, or a refusal.
pub fn refusals<B: Backend>(world: &World<'_, B>) {
    if world.most < 2 {
        return;
    }
    on_all_ranks((world.start)(Start { size: 2, seed: 0, timeout: SHORT }), |node| {
        let transport = &node.fabric.transport;
        let part = node.rows(DType::F32, 1, 1);
        let exchange =
            Exchange { name: "dispatch", send: vec![part.clone()], receive: vec![part.clone(), part] };
        let refusal = transport.all_to_all_v(&node.device, Lane::Transfer, Place::default(), exchange);
        let want = "dispatch: 1 parts sent and 2 received among 2 ranks";
        assert!(matches!(refusal, Err(DeviceError::Shape(message)) if message == want));
        let (me, other) = (Rank(node.rank()), Rank(1 - node.rank()));
        for wrong in [vec![], vec![other], vec![Rank(1), Rank(0)], vec![me, Rank(2)], vec![me, me]] {
            assert!(transport.subgroup(&wrong).is_err(), "{wrong:?} was taken for a group of {me}");
        }
    });
}
