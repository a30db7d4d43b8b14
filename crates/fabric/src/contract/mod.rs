//! What every fabric promises, as checks that any backend, control and transport can be put through: the right rows in
//! the right places, whoever is slow, over all ranks and in sub-groups; and, when a rank is late or disagrees, one fault
//! that names it, the same on every rank, in time.
//!
//! A [`World`] makes ranks; every check makes its own. `EPSMOE_TEST_SEED` repeats a run.
//!
//! ```ignore
//! #[test]
//! fn rows_arrive_where_they_are_due() {
//!     contract::exchanges(&World { most: 6, start: &|start| my_world(start) }, Lanes::Any);
//! }
//! ```

mod control;
mod exchanges;
mod faults;

pub use control::{barriers, messages};
pub use exchanges::{Lanes, exchanges, overwriting, refusals, subgroups};
pub use faults::{differing_exchanges, differing_messages, late_ranks};

use crate::Fabric;
use epsmoe_base::{DType, Deadline, Fault, Lane, Place};
use epsmoe_device::op::{Embed, HostToDevice};
use epsmoe_device::{Backend, Buffer, TensorBytes, WeightShape};
use std::sync::{Arc, mpsc};
use std::time::Duration;

/// Long enough for any machine that works.
pub const PATIENT: Duration = Duration::from_secs(30);
/// Short enough to wait for.
pub const SHORT: Duration = Duration::from_millis(400);
/// What a loaded machine may add to a deadline.
pub const SLACK: Duration = Duration::from_secs(5);

/// What a world is to be like.
#[derive(Clone, Copy, Debug)]
pub struct Start {
    /// Number of ranks.
    pub size: usize,
    /// Seed of whatever is random in it.
    pub seed: u64,
    /// How long ranks wait for each other.
    pub timeout: Duration,
}

/// What makes ranks with fresh memory that share one fault cell.
#[derive(Clone, Copy)]
pub struct World<'a, B: Backend> {
    /// The most ranks that there may be.
    pub most: usize,
    /// Starts them, in rank order: all of them, or those that are in this process, where the others go through the same
    /// checks at the same time.
    pub start: &'a dyn Fn(Start) -> Vec<Node<B>>,
}

impl<B: Backend> World<'_, B> {
    /// A world that waits long.
    fn patient(&self, size: usize, seed: u64) -> Vec<Node<B>> {
        (self.start)(Start { size, seed, timeout: PATIENT })
    }
}

/// One rank of a world.
pub struct Node<B: Backend> {
    /// Its processor.
    pub device: B,
    /// Its end of the fabric.
    pub fabric: Fabric<B>,
}

impl<B: Backend> Node<B> {
    /// This rank.
    pub fn rank(&self) -> usize {
        self.fabric.rank().0
    }

    /// Number of ranks.
    pub fn size(&self) -> usize {
        self.fabric.size()
    }

    /// Waits for all lanes.
    pub fn finish(&self) -> Result<(), Fault> {
        let wait = |lane| self.device.wait(&self.device.record(lane), Deadline::after(2 * PATIENT));
        Lane::ALL.into_iter().try_for_each(wait)
    }

    /// A fresh buffer.
    pub fn rows(&self, dtype: DType, rows: usize, width: usize) -> Buffer {
        self.device.allocate("rows", dtype, rows, width).expect("memory")
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

/// Runs `body` on a thread per rank and gives the answers in rank order; panics rather than hang.
pub fn on_all_ranks<B, T, F>(world: Vec<Node<B>>, body: F) -> Vec<T>
where
    B: Backend,
    T: Send + 'static,
    F: Fn(&Node<B>) -> T + Send + Sync + 'static,
{
    let (done, answers) = mpsc::channel();
    let (body, size) = (Arc::new(body), world.len());
    for node in world {
        let (done, body) = (done.clone(), Arc::clone(&body));
        std::thread::spawn(move || {
            let answer = body(&node);
            // The lanes end with the node: a lane that hangs is an answer that never comes.
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
