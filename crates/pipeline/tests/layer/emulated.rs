//! One rank without the others computes what it computes among them, if it is told what they say and send; and its counts
//! are those of the whole world where only their routing is known.

use crate::world::{Case, Got, Setup, random_policy, run, run_rank_of};
use epsmoe_base::{DType, Deadline, Fault, FaultCell, Lane, Mix, Place, Rank, env::test_seed};
use epsmoe_device::reference::Reference;
use epsmoe_device::{Backend, DeviceError};
use epsmoe_fabric::{Control, EmulatedOptions, Exchange, Fabric, Mirrored, Peers, Transport};
use epsmoe_pipeline::RoutedPeers;
use epsmoe_plan::{Routing, SlotMap};
use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

const LONG: Duration = Duration::from_secs(60);

/// Rows of all ranks in one exchange, as words.
type Rows = Vec<Arc<[u32]>>;

/// What the other ranks said and sent to one rank, in order.
#[derive(Default)]
pub(crate) struct Heard {
    messages: Mutex<VecDeque<Vec<Vec<u8>>>>,
    rows: Mutex<VecDeque<(&'static str, Place, Rows)>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Heard {
    /// The same fabric, listened to.
    pub(crate) fn listen(self: &Arc<Self>, fabric: Fabric<Reference>) -> Fabric<Reference> {
        let (heard, of_rows) = (Arc::clone(self), Arc::clone(self));
        Fabric {
            control: Arc::new(Listening { inner: Arc::clone(&fabric.control), heard }),
            transport: Arc::new(Listening { inner: Arc::clone(&fabric.transport), heard: of_rows }),
            link: fabric.link,
        }
    }
}

struct Listening<T: ?Sized> {
    heard: Arc<Heard>,
    inner: Arc<T>,
}

impl Control for Listening<dyn Control> {
    fn rank(&self) -> Rank {
        self.inner.rank()
    }

    fn size(&self) -> usize {
        self.inner.size()
    }

    fn exchange(&self, what: &'static str, place: Place, message: Vec<u8>) -> Result<Vec<Vec<u8>>, Fault> {
        let messages = self.inner.exchange(what, place, message)?;
        lock(&self.heard.messages).push_back(messages.clone());
        Ok(messages)
    }

    fn faults(&self) -> &FaultCell {
        self.inner.faults()
    }
}

impl Transport<Reference> for Listening<dyn Transport<Reference>> {
    fn ranks(&self) -> &[Rank] {
        self.inner.ranks()
    }

    fn all_to_all_v(
        &self,
        device: &Reference,
        lane: Lane,
        place: Place,
        exchange: Exchange,
    ) -> Result<(), DeviceError> {
        let (name, received) = (exchange.name, exchange.receive.clone());
        self.inner.all_to_all_v(device, lane, place, exchange)?;
        device.wait(&device.record(lane), Deadline::after(LONG))?;
        let words = received.iter().map(|rows| -> Result<Arc<[u32]>, Fault> {
            if rows.dtype == DType::U32 {
                return Ok(device.read_u32(rows)?.into());
            }
            Ok(device.read_f32(rows)?.into_iter().map(f32::to_bits).collect())
        });
        let words = words.collect::<Result<_, _>>()?;
        lock(&self.heard.rows).push_back((name, place, words));
        Ok(())
    }

    fn subgroup(&self, ranks: &[Rank]) -> Result<Arc<dyn Transport<Reference>>, DeviceError> {
        self.inner.subgroup(ranks)
    }
}

impl Peers for Heard {
    fn messages(
        &self,
        what: &'static str,
        _place: Place,
        own: &[u8],
        size: usize,
    ) -> Result<Vec<Vec<u8>>, String> {
        let said = lock(&self.messages).pop_front().ok_or("nothing more was said")?;
        assert_eq!(what, "count exchange");
        assert!(said.len() == size && said.iter().any(|message| message == own), "it says the same again");
        Ok(said)
    }

    fn rows(&self, name: &'static str, place: Place) -> Option<Vec<Arc<[u32]>>> {
        let (of, there, words) = lock(&self.rows).pop_front()?;
        assert_eq!((of, there), (name, place));
        Some(words)
    }
}

/// One rank of the case by itself.
fn alone(case: &Case, setup: &Setup, rank: usize, peers: Arc<dyn Peers>) -> Got {
    let faults = FaultCell::default();
    let options = EmulatedOptions {
        rank: Rank(rank),
        size: case.map.ranks(),
        link: None,
        timeout: LONG,
        faults: faults.clone(),
        peers,
    };
    run_rank_of(case, setup, rank, Fabric::emulated(options), &faults, &Arc::default())
        .unwrap_or_else(|error| panic!("{error}: rank {rank} of {case:?}"))
}

fn bits(got: &Got) -> Vec<u32> {
    got.y.iter().map(|value| value.to_bits()).collect()
}

fn of_world(case: &Case, setup: &Setup) -> Vec<Got> {
    run(case, setup).into_iter().map(|got| got.unwrap_or_else(|fault| panic!("{fault}: {case:?}"))).collect()
}

fn tables(got: &Got) -> Vec<String> {
    let all = got.reports.iter().flat_map(|report| &report.tables);
    all.map(ToString::to_string)
        .chain(got.reports.iter().map(|report| report.peak_bytes.to_string()))
        .collect()
}

#[test]
fn a_rank_that_is_told_what_the_others_sent_gives_the_same_bits() {
    let seed = test_seed();
    for index in 0..24 {
        let mut mix = Mix::keyed(seed, &[index]);
        let case = Case { identities: 0, ..Case::random(mix.next_u64(), DType::F32, 2) };
        let policy = random_policy(&case.map, &mut mix);
        let rank = mix.below(case.map.ranks());
        let heard = Arc::<Heard>::default();
        let setup = Setup::new(policy.clone());
        let listened = Setup { heard: Some((rank, Arc::clone(&heard))), ..setup.clone() };
        let want = &of_world(&case, &listened)[rank];
        let got = alone(&case, &setup, rank, Arc::clone(&heard) as Arc<dyn Peers>);
        let shown = format!("rank {rank}, {policy}, seed {seed}, case {index}, {case:?}");
        assert_eq!(bits(&got), bits(want), "{shown}");
        assert_eq!(tables(&got), tables(want), "{shown}");
        assert!(lock(&heard.messages).is_empty() && lock(&heard.rows).is_empty(), "{shown}");
    }
}

/// Tokens whose experts are all on the rank.
fn stay_at_home(routing: &Routing, map: &SlotMap, rank: usize) -> Vec<usize> {
    let assigned = routing.assign(map).expect("a map of these experts");
    let here = |token: &usize| assigned.rows(*token).all(|(on, _)| on == Rank(rank));
    (0..routing.tokens()).filter(here).collect()
}

#[test]
fn a_rank_that_knows_the_others_routing_has_the_counts_of_their_world() {
    let seed = test_seed();
    let mut stayed = 0;
    for index in 0..24 {
        let mut mix = Mix::keyed(seed, &[100 + index]);
        let dtype = [DType::F32, DType::BF16][mix.below(2)];
        let random = Case::random(mix.next_u64(), dtype, 1);
        let tokens = vec![1 + mix.below(24); random.map.ranks()];
        let case = Case { tokens, identities: 0, ..random };
        let policy = random_policy(&case.map, &mut mix);
        let setup = Setup::new(policy.clone());
        let rank = mix.below(case.map.ranks());
        let world = of_world(&case, &setup);
        let peers = RoutedPeers::new(Rank(rank));
        let routings = world.iter().map(|got| got.routing.clone()).collect();
        peers.learn(epsmoe_base::Layer(0), &Arc::new(case.map.clone()), routings);
        let got = alone(&case, &setup, rank, Arc::new(peers));
        let shown = format!("rank {rank}, {policy}, seed {seed}, case {index}, {case:?}");
        assert_eq!(tables(&got), tables(&world[rank]), "{shown}");
        for token in stay_at_home(&got.routing, &case.map, rank) {
            let row = token * case.hidden..(token + 1) * case.hidden;
            assert_eq!(bits(&got)[row.clone()], bits(&world[rank])[row], "token {token}: {shown}");
            stayed += 1;
        }
    }
    assert!(stayed > 20, "only {stayed} tokens have all their experts on one rank");
}

#[test]
fn mirrored_ranks_have_this_ranks_tokens() {
    let seed = test_seed();
    for index in 0..8 {
        let mut mix = Mix::keyed(seed, &[200 + index]);
        let random = Case::random(mix.next_u64(), DType::BF16, 2);
        let tokens = vec![1 + mix.below(24); random.map.ranks()];
        let case = Case { tokens, identities: 0, ..random };
        let policy = random_policy(&case.map, &mut mix);
        let rank = mix.below(case.map.ranks());
        let setup = Setup::new(policy.clone());
        let mirrored = alone(&case, &setup, rank, Arc::new(Mirrored));
        let peers = RoutedPeers::new(Rank(rank));
        let map = Arc::new(case.map.clone());
        let routings = vec![mirrored.routing.clone(); case.map.ranks()];
        peers.learn(epsmoe_base::Layer(0), &map, routings);
        // The second layer, of which the peers know nothing, follows the first.
        let told = alone(&case, &setup, rank, Arc::new(peers));
        let shown = format!("rank {rank}, {policy}, seed {seed}, case {index}, {case:?}");
        assert_eq!(tables(&told), tables(&mirrored), "{shown}");
        assert_eq!(bits(&told), bits(&mirrored), "{shown}");
    }
}
