//! What every fabric promises, on random exchanges: the right rows in the right places, whoever is slow; and,
//! when a rank is late, dies or disagrees, one fault that names it, the same on every rank, in time.
//! `EPSMOE_TEST_SEED` repeats a run.

use epsmoe_base::{
    DType, Deadline, Fault, FaultCell, FaultKind, Lane, Layer, Mix, Place, Rank, Stage, env::test_seed,
};
use epsmoe_device::op::{Embed, HostToDevice};
use epsmoe_device::reference::{self, PlainKernels, Reference};
use epsmoe_device::threaded::{ThreadedOptions, WeightStore};
use epsmoe_device::{Backend, Buffer, DeviceError, TensorBytes, WeightShape};
use epsmoe_fabric::{Exchange, Fabric, FaultInjection, InjectedFault, ThreadsOptions};
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

/// Long enough for any machine that works.
const PATIENT: Duration = Duration::from_secs(30);
/// Short enough to wait for.
const SHORT: Duration = Duration::from_millis(400);
/// What a loaded machine may add to a deadline.
const SLACK: Duration = Duration::from_secs(5);

/// One rank of a world.
struct Node {
    device: Reference,
    fabric: Fabric<Reference>,
}

impl Node {
    fn rank(&self) -> usize {
        self.fabric.rank().0
    }

    /// Waits for both lanes.
    fn finish(&self) -> Result<(), Fault> {
        let wait = |lane| self.device.wait(&self.device.record(lane), Deadline::after(2 * PATIENT));
        Lane::ALL.into_iter().try_for_each(wait)
    }

    fn size(&self) -> usize {
        self.fabric.size()
    }

    /// A message about a layer to everybody, and everybody's.
    fn gather(&self, name: &'static str, layer: usize, message: Vec<u8>) -> Result<Vec<Vec<u8>>, Fault> {
        self.fabric.control.exchange(name, Place::layer(Layer(layer)), message)
    }

    fn barrier(&self) -> Result<(), Fault> {
        self.fabric.control.barrier(Place::default())
    }

    /// Puts one number in each element of a buffer of any format.
    fn fill(&self, out: &Buffer, numbers: &[u32]) {
        let enqueue = |op: epsmoe_device::op::Op| self.device.enqueue(Lane::Compute, Place::default(), op);
        if out.dtype == DType::U32 {
            enqueue(HostToDevice { words: numbers.into(), out: out.clone() }.into()).expect("it fits");
        } else if !numbers.is_empty() {
            let (rows, width) = (out.rows, out.width);
            let bytes: Vec<u8> = numbers.iter().flat_map(|&number| (number as f32).to_le_bytes()).collect();
            let tensors = [TensorBytes { dtype: DType::F32, bytes: &bytes }];
            let table =
                self.device.load("numbers", WeightShape::Table { rows, width }, &tensors).expect("a table");
            let ids = self.device.allocate("ids", DType::U32, rows, 1).expect("memory");
            let words = (0..rows as u32).collect();
            enqueue(HostToDevice { words, out: ids.clone() }.into()).expect("it fits");
            enqueue(Embed { ids, table, out: out.clone() }.into()).expect("it fits");
        }
    }

    /// The numbers in a buffer; poison is no number.
    fn numbers(&self, buffer: &Buffer) -> Vec<Option<u32>> {
        if buffer.dtype == DType::U32 {
            let words = self.device.read_u32(buffer).expect("ordered");
            return words.into_iter().map(|word| (word != u32::MAX).then_some(word)).collect();
        }
        let floats = self.device.read_f32(buffer).expect("ordered");
        floats.into_iter().map(|value| (!value.is_nan()).then_some(value as u32)).collect()
    }
}

fn options(timeout: Duration) -> ThreadsOptions {
    ThreadsOptions::new(timeout, FaultCell::default())
}

/// A world of threads, with lanes that pause at random.
fn threads(size: usize, seed: u64, options: ThreadsOptions) -> Vec<Node> {
    let weights = Arc::<WeightStore<_>>::default();
    let faults = options.faults.clone();
    let node = |fabric: Fabric<Reference>| {
        let rank = fabric.rank();
        let host = ThreadedOptions { faults: faults.clone(), ..reference::options(DType::BF16, seed) };
        let device = Reference::new(rank, PlainKernels, Arc::clone(&weights), host).expect("lane threads");
        Node { device, fabric }
    };
    Fabric::threads(size, options).into_iter().map(node).collect()
}

/// Runs `body` on a thread per rank and gives the answers in rank order; fails the test rather than hang.
fn on_all_ranks<T, B>(world: Vec<Node>, body: B) -> Vec<T>
where
    T: Send + 'static,
    B: Fn(&Node) -> T + Send + Sync + 'static,
{
    let (done, answers) = mpsc::channel();
    let (body, size) = (Arc::new(body), world.len());
    for node in world {
        let (done, body) = (done.clone(), Arc::clone(&body));
        std::thread::spawn(move || {
            let answer = body(&node);
            // Both lanes end with the node: a lane that hangs is an answer that never comes.
            let rank = node.rank();
            drop(node);
            done.send((rank, answer))
        });
    }
    drop(done);
    let mut all: Vec<(usize, T)> = Vec::new();
    while all.len() < size {
        match answers.recv_timeout(2 * PATIENT) {
            Ok(answer) => all.push(answer),
            Err(error) => panic!("{} of {size} ranks answered, then {error}", all.len()),
        }
    }
    all.sort_by_key(|&(rank, _)| rank);
    all.into_iter().map(|(_, answer)| answer).collect()
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
    /// Rows from each rank to each rank, `[source · R + destination]`.
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

    fn rows(&self, source: usize, destination: usize) -> usize {
        let size = self.rows.len().isqrt();
        self.rows[source * size + destination]
    }

    /// Consecutive parts of a buffer with margins, one for each rank.
    fn parts(&self, node: &Node, rows: impl Fn(usize) -> usize) -> (Buffer, Vec<Buffer>) {
        let ends: Vec<Range<usize>> = (0..node.size())
            .scan(0, |end, rank| {
                let start = *end;
                *end += rows(rank);
                Some(start..*end)
            })
            .collect();
        let (left, right) = self.margin;
        let total = ends.last().map_or(0, |rows| rows.end);
        let all = node.device.allocate("rows", self.dtype, total, left + self.width + right).expect("memory");
        let columns = all.columns(left..left + self.width).expect("inside");
        let parts = ends.into_iter().map(|rows| columns.rows(rows).expect("inside")).collect();
        (all, parts)
    }

    /// A number that says whence, whither, which row and column; small enough for every format.
    fn number(&self, source: usize, destination: usize, row: usize, column: usize) -> u32 {
        ((source * 7 + destination * 31 + row * 5 + column * 3 + self.width) % 251) as u32
    }

    fn part(&self, source: usize, destination: usize) -> Vec<u32> {
        let rows = self.rows(source, destination);
        let at = |at: usize| self.number(source, destination, at / self.width, at % self.width);
        (0..rows * self.width).map(at).collect()
    }

    /// Fills the send parts and enqueues the exchange; what arrives is checked once the lanes are done.
    fn start(&self, node: &Node) -> Buffer {
        let me = node.rank();
        let (_, send) = self.parts(node, |rank| self.rows(me, rank));
        let (all, receive) = self.parts(node, |rank| self.rows(rank, me));
        for (rank, part) in send.iter().enumerate() {
            node.fill(part, &self.part(me, rank));
        }
        node.device.lane_wait(self.lane, &node.device.record(Lane::Compute));
        let exchange = Exchange { name: self.name, send, receive };
        node.fabric
            .transport
            .all_to_all_v(&node.device, self.lane, self.place, exchange)
            .expect("parts for all ranks");
        all
    }

    fn check(&self, node: &Node, all: &Buffer, context: &str) {
        let (me, (left, right)) = (node.rank(), self.margin);
        let mut want = Vec::new();
        for source in 0..node.size() {
            for row in self.part(source, me).chunks(self.width) {
                want.extend(std::iter::repeat_n(None, left));
                want.extend(row.iter().map(|&number| Some(number)));
                want.extend(std::iter::repeat_n(None, right));
            }
        }
        assert_eq!(node.numbers(all), want, "rank {me}, {self:?}, {context}");
    }
}

/// Random scripts of exchanges in worlds of up to `most` ranks, all in flight at once, on the lanes that `lane`
/// draws.
fn exchanges(most: usize, world: impl Fn(usize, u64) -> Vec<Node>, lane: fn(&mut Mix) -> Lane) {
    let seed = test_seed();
    for case in 0..36 {
        let mut mix = Mix::keyed(seed, &[case]);
        let size = 1 + case as usize % most;
        let script: Vec<Planned> = (0..1 + mix.below(12))
            .map(|_| {
                let lane = lane(&mut mix);
                Planned::random(&mut mix, size, lane)
            })
            .collect();
        let context = format!("case {case}, {size} ranks, seed {seed}");
        on_all_ranks(world(size, mix.next_u64()), move |node| {
            let arrived: Vec<Buffer> = script.iter().map(|exchange| exchange.start(node)).collect();
            node.finish().unwrap_or_else(|fault| panic!("{context}: {fault}"));
            script.iter().zip(&arrived).for_each(|(exchange, all)| exchange.check(node, all, &context));
        });
    }
}

fn slow_threads(size: usize, seed: u64) -> Vec<Node> {
    threads(size, seed, ThreadsOptions { delay: Some(seed), ..options(PATIENT) })
}

#[test]
fn rows_arrive_where_they_are_due() {
    exchanges(6, slow_threads, |_| Lane::Transfer);
}

#[test]
fn a_paced_link_carries_the_same_rows() {
    let link = Some("1GB/s,200us".parse().expect("a link"));
    exchanges(
        4,
        |size, seed| threads(size, seed, ThreadsOptions { link, ..options(PATIENT) }),
        |_| Lane::Transfer,
    );
}

#[test]
fn a_rank_alone_gets_its_own_rows() {
    let alone = |_, seed| {
        let device =
            Reference::new(Rank(0), PlainKernels, Arc::default(), reference::options(DType::BF16, seed));
        vec![Node { device: device.expect("lane threads"), fabric: Fabric::single_rank() }]
    };
    exchanges(1, alone, |mix| Lane::ALL[mix.below(2)]);
}

#[test]
fn exchanges_on_both_lanes_keep_apart() {
    exchanges(6, slow_threads, |mix| Lane::ALL[mix.below(2)]);
}

#[test]
fn everybody_hears_everybody_in_rank_order() {
    let seed = test_seed();
    for size in 1..=6 {
        let message = move |rank: usize, round: u64| -> Vec<u8> {
            let mut mix = Mix::keyed(seed, &[rank as u64, round]);
            (0..mix.below(50)).map(|_| mix.below(256) as u8).collect()
        };
        on_all_ranks(threads(size, seed, options(PATIENT)), move |node| {
            let mut delay = Mix::keyed(seed, &[99, node.rank() as u64]);
            for round in 0..30 {
                std::thread::sleep(Duration::from_micros(delay.below(300) as u64));
                let heard = node.gather("news", 0, message(node.rank(), round));
                let want: Vec<_> = (0..size).map(|rank| message(rank, round)).collect();
                assert_eq!(heard, Ok(want), "round {round}, {size} ranks, seed {seed}");
            }
        });
    }
}

#[test]
fn nobody_passes_a_barrier_before_all_have_come() {
    let seed = test_seed();
    for size in 1..=6 {
        let come = Arc::new(AtomicUsize::new(0));
        on_all_ranks(threads(size, seed, options(PATIENT)), move |node| {
            let mut delay = Mix::keyed(seed, &[node.rank() as u64]);
            for round in 1..=20 {
                std::thread::sleep(Duration::from_micros(delay.below(300) as u64));
                come.fetch_add(1, Ordering::SeqCst);
                node.barrier().unwrap();
                let come = come.load(Ordering::SeqCst);
                assert!(come >= round * size, "{come} of {size} ranks in round {round}, seed {seed}");
            }
        });
    }
}

#[test]
fn what_was_sent_may_be_overwritten_once_the_exchange_is_complete() {
    on_all_ranks(slow_threads(3, test_seed()), |node| {
        let device = &node.device;
        let send = device.allocate("send", DType::U32, 3, 4).expect("memory");
        let rounds: Vec<Buffer> = (0..20)
            .map(|round| {
                let numbers: Vec<u32> =
                    (0..12).map(|at| 1000 * round + 100 * node.rank() as u32 + at / 4).collect();
                device.lane_wait(Lane::Compute, &device.record(Lane::Transfer));
                node.fill(&send, &numbers);
                device.lane_wait(Lane::Transfer, &device.record(Lane::Compute));
                let receive = device.allocate("receive", DType::U32, 3, 4).expect("memory");
                let row = |buffer: &Buffer| {
                    (0..3).map(|rank| buffer.rows(rank..rank + 1).expect("inside")).collect()
                };
                let exchange = Exchange { name: "turn", send: row(&send), receive: row(&receive) };
                node.fabric
                    .transport
                    .all_to_all_v(device, Lane::Transfer, Place::default(), exchange)
                    .expect("three parts");
                receive
            })
            .collect();
        node.finish().unwrap();
        for (round, received) in rounds.iter().enumerate() {
            let from = |source: usize| vec![Some((1000 * round + 100 * source + node.rank()) as u32); 4];
            assert_eq!(node.numbers(received), (0..3).flat_map(from).collect::<Vec<_>>(), "round {round}");
        }
    });
}

#[test]
fn parts_for_all_ranks_or_a_refusal() {
    on_all_ranks(threads(2, 0, options(SHORT)), |node| {
        let part = node.device.allocate("rows", DType::F32, 1, 1).expect("memory");
        let exchange =
            Exchange { name: "dispatch", send: vec![part.clone()], receive: vec![part.clone(), part] };
        let refusal =
            node.fabric.transport.all_to_all_v(&node.device, Lane::Transfer, Place::default(), exchange);
        let want = "dispatch: 1 parts sent and 2 received among 2 ranks";
        assert!(matches!(refusal, Err(DeviceError::Shape(message)) if message == want));
    });
}

/// What a rank does in a world where something goes wrong.
type Script = fn(&Node) -> Result<(), Fault>;

/// Runs `script` on every rank of a world with `injection`. All must end in time, with one fault: that of
/// `texts` which belongs to the rank that saw it first, whoever that was.
fn fails(size: usize, injection: Option<FaultInjection>, script: Script, kind: FaultKind, texts: &[&str]) {
    // Only a deadline needs to pass; what else goes wrong is to be seen before any deadline, on a loaded machine too.
    let timeout = if kind == FaultKind::Deadline { SHORT } else { PATIENT };
    for round in 0..3 {
        let options = ThreadsOptions { injection, delay: (round > 0).then_some(round), ..options(timeout) };
        let faults = options.faults.clone();
        let begin = Instant::now();
        let answers = on_all_ranks(threads(size, round, options), script);
        let took = begin.elapsed();
        let fault = faults.get().unwrap_or_else(|| panic!("nobody noticed; expected {texts:?}"));
        assert!(answers.iter().all(|answer| answer.as_ref() == Err(fault)), "{answers:?} is not all {fault}");
        assert!(texts.contains(&fault.to_string().as_str()), "{fault}\nis none of {texts:#?}");
        assert_eq!(fault.kind, kind, "{fault}");
        assert!(took < SHORT + SLACK, "{took:?} until {fault}");
    }
}

/// One exchange of a row to every rank, two rows to the next one.
fn turn(node: &Node, name: &'static str, stage: usize, width: usize, dtype: DType) -> Result<(), Fault> {
    let (size, me) = (node.size(), node.rank());
    let rows = |source: usize, destination: usize| 1 + usize::from((source + 1) % size == destination);
    let part = |rows| node.device.allocate("rows", dtype, rows, width).expect("memory");
    let exchange = Exchange {
        name,
        send: (0..size).map(|rank| part(rows(me, rank))).collect(),
        receive: (0..size).map(|rank| part(rows(rank, me))).collect(),
    };
    let place = Place::layer(Layer(4)).stage(Stage(stage));
    node.fabric.transport.all_to_all_v(&node.device, Lane::Transfer, place, exchange).expect("parts for all");
    node.finish()
}

/// Five exchanges, one a stage.
fn five_turns(node: &Node) -> Result<(), Fault> {
    (0..5).try_for_each(|stage| turn(node, "dispatch", stage, 3, DType::F32))
}

fn injection(rank: usize, exchange: u64, act: InjectedFault) -> Option<FaultInjection> {
    Some(FaultInjection { rank: Rank(rank), exchange, act })
}

#[test]
fn a_stalled_rank_is_named() {
    fails(
        2,
        injection(1, 3, InjectedFault::Stall),
        five_turns,
        FaultKind::Deadline,
        &["rank 0, layer 4, stage 3: rank 1 did not send dispatch within 400ms"],
    );
    fails(
        4,
        injection(2, 0, InjectedFault::Stall),
        five_turns,
        FaultKind::Deadline,
        &[
            "rank 0, layer 4, stage 0: rank 2 did not send dispatch within 400ms",
            "rank 1, layer 4, stage 0: rank 2 did not send dispatch within 400ms",
            "rank 3, layer 4, stage 0: rank 2 did not send dispatch within 400ms",
        ],
    );
}

#[test]
fn a_panicking_rank_is_named() {
    fails(
        1,
        injection(0, 0, InjectedFault::Panic),
        five_turns,
        FaultKind::Panic,
        &["rank 0, layer 4, stage 0: dispatch panicked: rank 0 panics on purpose at dispatch"],
    );
    fails(
        5,
        injection(3, 2, InjectedFault::Panic),
        five_turns,
        FaultKind::Panic,
        &["rank 3, layer 4, stage 2: dispatch panicked: rank 3 panics on purpose at dispatch"],
    );
}

#[test]
fn a_row_less_than_announced_is_seen() {
    fails(
        2,
        injection(1, 4, InjectedFault::SendOneRowLess),
        five_turns,
        FaultKind::Mismatch,
        &[
            "rank 0, layer 4, stage 4: rank 1 sent 1 row of dispatch (3 wide, float32) where 2 rows (3 wide, float32) \
         were announced",
        ],
    );
    fails(
        3,
        injection(2, 0, InjectedFault::SendOneRowLess),
        five_turns,
        FaultKind::Mismatch,
        &[
            "rank 0, layer 4, stage 0: rank 2 sent 1 row of dispatch (3 wide, float32) where 2 rows (3 wide, float32) \
         were announced",
        ],
    );
}

#[test]
fn ranks_at_different_exchanges_are_seen() {
    let kind = FaultKind::Mismatch;
    let name: Script = |node| turn(node, ["dispatch", "combine"][node.rank()], 1, 3, DType::F32);
    fails(
        2,
        None,
        name,
        kind,
        &[
            "rank 0, layer 4, stage 1: rank 1 sent combine (layer 4, stage 1) where dispatch was due",
            "rank 1, layer 4, stage 1: rank 0 sent dispatch (layer 4, stage 1) where combine was due",
        ],
    );
    let place: Script = |node| turn(node, "dispatch", node.rank(), 3, DType::F32);
    fails(
        2,
        None,
        place,
        kind,
        &[
            "rank 0, layer 4, stage 0: rank 1 sent dispatch (layer 4, stage 1) where dispatch was due",
            "rank 1, layer 4, stage 1: rank 0 sent dispatch (layer 4, stage 0) where dispatch was due",
        ],
    );
    let width: Script = |node| turn(node, "dispatch", 0, 3 + node.rank(), DType::F32);
    fails(
        2,
        None,
        width,
        kind,
        &[
            "rank 0, layer 4, stage 0: rank 1 sent 2 rows of dispatch (4 wide, float32) where 2 rows (3 wide, float32) \
         were announced",
            "rank 1, layer 4, stage 0: rank 0 sent 2 rows of dispatch (3 wide, float32) where 2 rows (4 wide, float32) \
         were announced",
        ],
    );
    let dtype: Script = |node| turn(node, "dispatch", 0, 3, [DType::F32, DType::BF16][node.rank()]);
    fails(
        2,
        None,
        dtype,
        kind,
        &[
            "rank 0, layer 4, stage 0: rank 1 sent 2 rows of dispatch (3 wide, bfloat16) where 2 rows (3 wide, float32) \
         were announced",
            "rank 1, layer 4, stage 0: rank 0 sent 2 rows of dispatch (3 wide, float32) where 2 rows (3 wide, bfloat16) \
         were announced",
        ],
    );
}

#[test]
fn ranks_at_different_gatherings_are_seen() {
    let name: Script = |node| {
        let name = ["rendezvous", "barrier"][node.rank()];
        node.gather(name, 1, vec![]).map(|_| ())
    };
    fails(
        2,
        None,
        name,
        FaultKind::Mismatch,
        &[
            "rank 0, layer 1: rank 1 came to barrier (layer 1) where rendezvous was due",
            "rank 1, layer 1: rank 0 came to rendezvous (layer 1) where barrier was due",
        ],
    );
    let place: Script = |node| node.gather("rendezvous", node.rank(), vec![]).map(|_| ());
    fails(
        2,
        None,
        place,
        FaultKind::Mismatch,
        &[
            "rank 0, layer 0: rank 1 came to rendezvous (layer 1) where rendezvous was due",
            "rank 1, layer 1: rank 0 came to rendezvous (layer 0) where rendezvous was due",
        ],
    );
}

#[test]
fn a_rank_that_never_comes_is_named() {
    // Rank 1 is elsewhere until the world has stopped.
    let gathering: Script = |node| match node.rank() {
        1 => Err(until_stopped(node)),
        _ => node.gather("rendezvous", 2, vec![1]).map(|_| ()),
    };
    fails(
        3,
        None,
        gathering,
        FaultKind::Deadline,
        &[
            "rank 0, layer 2: rank 1 did not come to rendezvous within 400ms",
            "rank 2, layer 2: rank 1 did not come to rendezvous within 400ms",
        ],
    );
    let exchange: Script = |node| match node.rank() {
        1 => Err(until_stopped(node)),
        _ => turn(node, "combine", 1, 3, DType::F32),
    };
    fails(
        3,
        None,
        exchange,
        FaultKind::Deadline,
        &[
            "rank 0, layer 4, stage 1: rank 1 did not send combine within 400ms",
            "rank 2, layer 4, stage 1: rank 1 did not send combine within 400ms",
        ],
    );
}

#[test]
fn a_link_that_is_too_slow_is_a_deadline_not_a_hang() {
    // Eleven days for an exchange.
    let link = Some("1GB/s,1000000000ms".parse().expect("a link"));
    let options = ThreadsOptions { link, ..options(SHORT) };
    let begin = Instant::now();
    let answers = on_all_ranks(threads(2, 0, options), |node| turn(node, "dispatch", 1, 3, DType::F32));
    assert!(begin.elapsed() < SHORT + SLACK, "{:?}", begin.elapsed());
    let fault = answers[0].clone().expect_err("no exchange can end in time");
    assert_eq!(answers[1], Err(fault.clone()));
    let want = |rank| format!("rank {rank}, layer 4, stage 1: dispatch did not cross the link within 400ms");
    assert!([want(0), want(1)].contains(&fault.to_string()), "{fault}");
    assert_eq!(fault.kind, FaultKind::Deadline);
}

/// What leaves and what comes travels at once, and a rank's own rows do not travel: they do not add up.
#[test]
fn a_paced_exchange_takes_as_long_as_its_larger_direction() {
    const ROW: usize = 250;
    let link = Some("100kB/s".parse().expect("a link"));
    let attempt = || {
        let begin = Instant::now();
        on_all_ranks(threads(2, 0, ThreadsOptions { link, ..options(PATIENT) }), |node| {
            let part = |rows| node.device.allocate("rows", DType::F32, rows, ROW).expect("memory");
            // 10 rows to the other, 10 rows from it, 20 of one's own.
            let parts = || [10, 20].map(part).to_vec();
            let ordered = |mut parts: Vec<Buffer>| {
                parts.rotate_left(1 - node.rank());
                parts
            };
            let exchange = Exchange { name: "turn", send: ordered(parts()), receive: ordered(parts()) };
            let place = Place::default();
            node.fabric.transport.all_to_all_v(&node.device, Lane::Transfer, place, exchange).expect("parts");
            node.finish().unwrap();
        });
        begin.elapsed()
    };
    // A loaded machine may take longer at times, never shorter.
    let took = (0..5).map(|_| attempt()).min().unwrap_or_default();
    assert!((100..180).contains(&took.as_millis()), "10 rows of 1000 bytes at 100 kB/s took {took:?}");
}

/// Asks the device, which has nothing to do, until it says why the world stopped.
fn until_stopped(node: &Node) -> Fault {
    loop {
        if let Err(fault) = node.finish() {
            return fault;
        }
        std::thread::sleep(FaultCell::POLL);
    }
}

#[test]
fn after_a_fault_every_call_gives_it() {
    let script: Script = |node| {
        let first = five_turns(node).unwrap_err();
        assert_eq!(node.barrier(), Err(first.clone()));
        assert_eq!(turn(node, "combine", 1, 3, DType::F32), Err(first.clone()));
        Err(first)
    };
    fails(
        3,
        injection(0, 1, InjectedFault::Panic),
        script,
        FaultKind::Panic,
        &["rank 0, layer 4, stage 1: dispatch panicked: rank 0 panics on purpose at dispatch"],
    );
}
