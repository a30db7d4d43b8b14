//! One rank whose others are not there: what it receives, how long that takes, and what is refused.

use epsmoe_base::{DType, Deadline, FaultCell, FaultKind, Lane, Layer, Place, Rank};
use epsmoe_device::op::HostToDevice;
use epsmoe_device::reference::{self, PlainKernels, Reference};
use epsmoe_device::threaded::ThreadedOptions;
use epsmoe_device::{Backend, Buffer, DeviceError, Reserve};
use epsmoe_fabric::{EmulatedOptions, Exchange, Fabric, Mirrored, Peers};
use std::sync::Arc;
use std::time::{Duration, Instant};

const LONG: Duration = Duration::from_secs(30);

struct One {
    device: Reference,
    fabric: Fabric<Reference>,
    faults: FaultCell,
}

/// Rank 1 of 3.
fn one(peers: Arc<dyn Peers>, link: Option<&str>, timeout: Duration) -> One {
    let faults = FaultCell::default();
    let host = ThreadedOptions { faults: faults.clone(), ..reference::options(DType::F32, 1) };
    let device = Reference::new(Rank(1), PlainKernels, Arc::default(), host).expect("lane threads");
    let link = link.map(|link| link.parse().expect("a link"));
    let options = EmulatedOptions { rank: Rank(1), size: 3, link, timeout, faults: faults.clone(), peers };
    One { device, fabric: Fabric::emulated(options), faults }
}

impl One {
    fn part(&self, words: &[u32]) -> Buffer {
        let rows = self.device.allocate("rows", DType::U32, words.len() / 2, 2).expect("memory");
        let op = HostToDevice { words: words.into(), out: rows.clone() };
        self.device.enqueue(Lane::Transfer, Place::default(), op).expect("it fits");
        rows
    }

    fn room(&self, rows: usize) -> Buffer {
        self.device.allocate("room", DType::U32, rows, 2).expect("memory")
    }

    fn exchange(&self, send: [&[u32]; 3], receive: [usize; 3]) -> Result<Vec<Vec<u32>>, DeviceError> {
        let send = send.map(|words| self.part(words)).to_vec();
        let receive = receive.map(|rows| self.room(rows)).to_vec();
        let exchange = Exchange { name: "rows", send, receive: receive.clone() };
        let place = Place::layer(Layer(2));
        self.fabric.transport.all_to_all_v(&self.device, Lane::Transfer, place, exchange)?;
        self.device.wait(&self.device.record(Lane::Transfer), Deadline::after(LONG))?;
        receive.iter().map(|room| Ok(self.device.read_u32(room)?)).collect()
    }
}

#[test]
fn rows_to_itself_arrive_and_those_of_others_are_stood_in_for() {
    let one = one(Arc::new(Mirrored), None, LONG);
    let got = one.exchange([&[1, 2], &[3, 4, 5, 6], &[]], [5, 2, 1]).unwrap();
    assert_eq!(got[1], [3, 4, 5, 6], "its own");
    assert_eq!(got[0], [3, 4, 5, 6, 3, 4, 5, 6, 3, 4], "its own, again and again");
    assert_eq!(got[2], [3, 4]);
    // Without any to itself, those to another.
    let got = one.exchange([&[1, 2], &[], &[]], [1, 0, 2]).unwrap();
    assert_eq!(got, [vec![1, 2], vec![], vec![1, 2, 1, 2]]);
    assert!(one.exchange([&[], &[3, 4], &[]], [0, 2, 0]).unwrap_err().to_string().contains("sends 1 rows"));
    let messages = one.fabric.control.exchange("hello", Place::default(), vec![7]).unwrap();
    assert_eq!(messages, vec![vec![7]; 3]);
    assert_eq!((one.fabric.rank(), one.fabric.size()), (Rank(1), 3));
}

struct Told(Vec<Arc<[u32]>>);

impl Peers for Told {
    fn rows(&self, name: &'static str, place: Place) -> Option<Vec<Arc<[u32]>>> {
        assert_eq!((name, place), ("rows", Place::layer(Layer(2))));
        Some(self.0.clone())
    }

    fn messages(
        &self,
        what: &'static str,
        _place: Place,
        _own: &[u8],
        _size: usize,
    ) -> Result<Vec<Vec<u8>>, String> {
        Err(format!("they do not know {what}"))
    }
}

#[test]
fn what_peers_send_arrives_and_is_kept_on_the_device() {
    let told: [&[u32]; 3] = [&[10, 11], &[], &[20, 21, 22, 23]];
    let one = one(Arc::new(Told(told.map(Arc::from).to_vec())), None, LONG);
    let mut bytes = Vec::new();
    for own in [3, 4, 5] {
        let got = one.exchange([&[], &[own, own], &[]], [1, 1, 2]).unwrap();
        assert_eq!(got, [vec![10, 11], vec![own, own], vec![20, 21, 22, 23]]);
        bytes.push(one.device.allocated_bytes());
    }
    assert_eq!(bytes[2] - bytes[1], 8 + 8 + 8 + 16, "only this exchange's own rows and rooms");
    assert!(
        one.exchange([&[], &[], &[]], [2, 0, 2]).unwrap_err().to_string().contains("rank 0 sends 1 rows")
    );
    let fault = one.fabric.control.exchange("hello", Place::default(), vec![]).unwrap_err();
    assert_eq!((fault.kind, fault.rank), (FaultKind::Invalid, Rank(1)));
    assert!(fault.message.contains("no answer to hello: they do not know hello"), "{fault}");
}

#[test]
fn the_busier_direction_paces() {
    // Two rows of 8 bytes out, three in, none of its own: 24 ms at 1 kB/s.
    let one = one(Arc::new(Mirrored), Some("1kB/s,0us"), LONG);
    let begun = Instant::now();
    one.exchange([&[1, 2, 3, 4], &[5, 6], &[]], [2, 1, 1]).unwrap();
    assert!(begun.elapsed() >= Duration::from_millis(24), "{:?}", begun.elapsed());
    let pacing = one.fabric.link.as_ref().expect("a link").take_pacing();
    assert_eq!((pacing.exchanges, pacing.unresolved), (1, 0));
    // Rows that stay take no time on it.
    one.exchange([&[], &[5, 6], &[]], [0, 1, 0]).unwrap();
    assert_eq!(one.fabric.link.as_ref().expect("a link").take_pacing().exchanges, 0);
}

#[test]
fn a_link_that_is_too_slow_stops_the_world() {
    let one = one(Arc::new(Mirrored), Some("1B/s,0us"), Duration::from_millis(200));
    let error = one.exchange([&[1, 2], &[5, 6], &[]], [0, 1, 0]).unwrap_err().to_string();
    assert_eq!(error, "rank 1, layer 2: rows did not cross the link within 200ms");
    assert_eq!(one.faults.get().map(|fault| fault.kind), Some(FaultKind::Deadline));
}

#[test]
fn groups_are_emulated_too() {
    let one = one(Arc::new(Mirrored), None, LONG);
    let group = one.fabric.transport.subgroup(&[Rank(1), Rank(2)]).unwrap();
    assert_eq!(group.ranks(), [Rank(1), Rank(2)]);
    assert!(one.fabric.transport.subgroup(&[Rank(0), Rank(2)]).is_err(), "it is in none");
    let (send, receive) = (vec![one.part(&[1, 2]), one.part(&[])], vec![one.room(1), one.room(2)]);
    let exchange = Exchange { name: "rows", send, receive: receive.clone() };
    group.all_to_all_v(&one.device, Lane::Transfer, Place::default(), exchange).unwrap();
    one.device.wait(&one.device.record(Lane::Transfer), Deadline::after(LONG)).unwrap();
    assert_eq!(one.device.read_u32(&receive[1]).unwrap(), [1, 2, 1, 2]);
}
