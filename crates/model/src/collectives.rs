//! Work that several ranks split: each computes a part of every token of all of them, and the parts are added.
//!
//! A fabric only moves rows. A sum over ranks is an exchange, after which each rank has all parts of the tokens
//! of its shard, and one [`Reduce`] on its device, in float32 and in rank order: no bit depends on the fabric.
//!
//! Worked example: ranks 0 and 1 have tokens a, b and c in their shards, and split a map f into f₀ + f₁.
//!
//! ```text
//!                     rank 0                      rank 1
//! shard               a b                         c
//! all-gather          a b c                       a b c
//! computed            f₀(a) f₀(b) f₀(c)           f₁(a) f₁(b) f₁(c)
//! reduce-scatter:
//!   received          f₀(a) f₀(b) | f₁(a) f₁(b)   f₀(c) | f₁(c)
//!   index             [[0 2] [1 3]]               [[0 1]]
//!   shard             f₀(a)+f₁(a) f₀(b)+f₁(b)     f₀(c)+f₁(c)
//! ```
//!
//! An all-reduce is the same two exchanges the other way round: what follows a reduce-scatter (residual, norm)
//! works row by row, so it happens before the next all-gather, once for every token instead of once a rank.

use epsmoe_base::{DType, Lane, Phase, Place, Rank};
use epsmoe_device::op::{HostToDevice, Reduce};
use epsmoe_device::{Backend, Buffer, DeviceError, Reserve};
use epsmoe_fabric::{Exchange, Fabric, Transport};
use std::ops::Range;
use std::sync::Arc;

/// Consecutive ranks that split work, as one of them sees it. A group of one rank exchanges nothing.
pub(crate) struct Group<B: Backend> {
    device: Arc<B>,
    transport: Arc<dyn Transport<B>>,
    rank: Rank,
    ranks: Range<usize>,
    buffers: GroupBuffers,
}

/// What the exchanges of a group need; nothing in a group of one.
pub(crate) struct GroupBuffers {
    /// Tokens of all ranks of the group, and this rank's parts of them `[tokens, H]`.
    gathered: Buffer,
    computed: Buffer,
    /// Parts of the tokens of this rank's shard, from each rank of the group `[ranks · shard, H]`.
    received: Buffer,
    /// Which of them make each sum `[shard, ranks]`.
    index: Buffer,
}

/// How the tokens of a group lie one after the other: the rows of each rank of the world; none of the ranks
/// outside.
#[derive(Clone, Debug)]
pub(crate) struct Shares(Vec<Range<usize>>);

impl Shares {
    /// The rows of a rank.
    pub(crate) fn of(&self, rank: usize) -> Range<usize> {
        self.0[rank].clone()
    }

    fn total(&self) -> usize {
        self.0.iter().map(|rows| rows.len()).sum()
    }
}

impl GroupBuffers {
    /// For so many ranks that have at most `together` tokens, each at most `shard` of them.
    pub(crate) fn allocate(
        device: &impl Reserve,
        ranks: usize,
        hidden: usize,
        [together, shard]: [usize; 2],
    ) -> Result<Self, DeviceError> {
        let (together, shard) = if ranks == 1 { (0, 0) } else { (together, shard) };
        let values = |name, rows| device.allocate(name, device.dtype(), rows, hidden);
        Ok(GroupBuffers {
            gathered: values("gathered", together)?,
            computed: values("computed", together)?,
            received: values("received_parts", ranks * shard)?,
            index: device.allocate("part_index", DType::U32, shard, ranks)?,
        })
    }
}

impl<B: Backend> Group<B> {
    /// Some ranks of the world, this one among them.
    pub(crate) fn new(
        device: Arc<B>,
        fabric: &Fabric<B>,
        ranks: Range<usize>,
        buffers: GroupBuffers,
    ) -> Result<Self, DeviceError> {
        let members: Vec<Rank> = ranks.clone().map(Rank).collect();
        Ok(Group {
            buffers,
            rank: fabric.rank(),
            transport: fabric.transport.subgroup(&members)?,
            ranks,
            device,
        })
    }

    /// The ranks.
    pub(crate) fn ranks(&self) -> Range<usize> {
        self.ranks.clone()
    }

    /// Where tokens lie when each rank of the world has as many as `shards` says.
    pub(crate) fn shares(&self, shards: &[usize]) -> Shares {
        let mut end = 0;
        let rows = shards.iter().enumerate().map(|(rank, &shard)| {
            let start = end;
            end += if self.ranks.contains(&rank) { shard } else { 0 };
            start..end
        });
        Shares(rows.collect())
    }

    /// Brings the order of the sums to the device, for the exchanges that follow.
    pub(crate) fn begin(&self, shares: &Shares) -> Result<(), DeviceError> {
        let (size, shard) = (self.ranks.len(), shares.of(self.rank.0).len());
        if size == 1 {
            return Ok(());
        }
        let parts = |token| (0..size).map(move |member| (member * shard + token) as u32);
        let words = (0..shard).flat_map(parts).collect();
        let out = self.buffers.index.rows(0..shard)?;
        self.device.enqueue(Lane::Compute, Place::default(), HostToDevice { words, out })?;
        Ok(())
    }

    /// `out = Σ over the group's ranks of their part(x)`, for the rows `x` and `out` of this rank's shard. `part` reads
    /// the rows of the whole group, which lie as the first of `shares` says, and writes rows that lie as the second
    /// says: those that [`begin`](Group::begin) was told of last. Ranks add in rank order.
    pub(crate) fn gather_compute_scatter<T, E: From<DeviceError>>(
        &self,
        place: Place,
        [read, written]: [&Shares; 2],
        x: &Buffer,
        out: &Buffer,
        part: impl FnOnce(&Buffer, &Buffer) -> Result<T, E>,
    ) -> Result<T, E> {
        if self.ranks.len() == 1 {
            return part(x, out);
        }
        let gathered = self.all_gather(place, read, x)?;
        let computed = self.buffers.computed.rows(0..written.total())?;
        let value = part(&gathered, &computed)?;
        self.reduce_scatter(place, written, &computed, out)?;
        Ok(value)
    }

    /// The same of two sums of the same rows; `spare` has room for this rank's parts of the second.
    pub(crate) fn gather_compute_scatter_both<T, E: From<DeviceError>>(
        &self,
        place: Place,
        [read, written]: [&Shares; 2],
        (x, spare): (&Buffer, &Buffer),
        [first, second]: [&Buffer; 2],
        parts: impl FnOnce(&Buffer, [&Buffer; 2]) -> Result<T, E>,
    ) -> Result<T, E> {
        if self.ranks.len() == 1 {
            return parts(x, [first, second]);
        }
        let gathered = self.all_gather(place, read, x)?;
        let rows = 0..written.total();
        let computed = [self.buffers.computed.rows(rows.clone())?, spare.rows(rows)?];
        let value = parts(&gathered, [&computed[0], &computed[1]])?;
        self.reduce_scatter(place, written, &computed[0], first)?;
        self.reduce_scatter(place, written, &computed[1], second)?;
        Ok(value)
    }

    /// The rows `x` of every rank of the group, in rank order.
    pub(crate) fn all_gather(
        &self,
        place: Place,
        shares: &Shares,
        x: &Buffer,
    ) -> Result<Buffer, DeviceError> {
        if self.ranks.len() == 1 {
            return Ok(x.clone());
        }
        let gathered = self.buffers.gathered.rows(0..shares.total())?;
        self.exchange(
            place.phase(Phase::AllGather),
            "all-gather",
            |_| Ok(x.clone()),
            |rank| gathered.rows(shares.of(rank)),
        )?;
        Ok(gathered)
    }

    /// `out = Σ over the group's ranks of their computed rows`, of this rank's shard.
    fn reduce_scatter(
        &self,
        place: Place,
        shares: &Shares,
        computed: &Buffer,
        out: &Buffer,
    ) -> Result<(), DeviceError> {
        let (shard, parts) = (out.rows, self.ranks.len() * out.rows);
        let place = place.phase(Phase::ReduceScatter);
        self.exchange(
            place,
            "reduce-scatter",
            |rank| computed.rows(shares.of(rank)),
            |rank| {
                let member = rank - self.ranks.start;
                self.buffers.received.rows(member * shard..(member + 1) * shard)
            },
        )?;
        let (x, index) = (self.buffers.received.rows(0..parts)?, self.buffers.index.rows(0..shard)?);
        let sum = Reduce { x, index, weights: None, addend: None, out: out.clone() };
        self.device.enqueue(Lane::Compute, place, sum)
    }

    /// One exchange of the group on the transfer lane, after everything on the compute lane and before what follows
    /// there.
    fn exchange(
        &self,
        place: Place,
        name: &'static str,
        send: impl Fn(usize) -> Result<Buffer, DeviceError>,
        receive: impl Fn(usize) -> Result<Buffer, DeviceError>,
    ) -> Result<(), DeviceError> {
        let send = self.ranks().map(send).collect::<Result<_, _>>()?;
        let receive = self.ranks().map(receive).collect::<Result<_, _>>()?;
        let exchange = Exchange { name, send, receive };
        self.device.lane_wait(Lane::Transfer, &self.device.record(Lane::Compute));
        self.transport.all_to_all_v(&self.device, Lane::Transfer, place, exchange)?;
        self.device.lane_wait(Lane::Compute, &self.device.record(Lane::Transfer));
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use epsmoe_base::{Deadline, FaultCell};
    use epsmoe_device::op::Add;
    use epsmoe_device::reference::{PlainKernels, Reference, options};
    use epsmoe_device::threaded::{ThreadedBackend, WeightStore};
    use epsmoe_fabric::ThreadsOptions;
    use std::time::Duration;

    const TIMEOUT: Duration = Duration::from_secs(20);
    const HIDDEN: usize = 2;

    /// What four ranks, in groups of `size`, get for the map `x + part` of each rank: rank r has `shard[r]` rows
    /// and adds `parts[r]`.
    fn sums(size: usize, shard: [usize; 4], parts: [f32; 4]) -> Vec<Vec<f32>> {
        let store = Arc::new(WeightStore::default());
        let faults = FaultCell::default();
        let ends = Fabric::threads(4, ThreadsOptions::new(TIMEOUT, faults.clone()));
        std::thread::scope(|scope| {
            let ranks = ends.into_iter().enumerate().map(|(rank, fabric)| {
                let mut options = options(DType::F32, rank as u64);
                options.faults = faults.clone();
                let device =
                    ThreadedBackend::new(Rank(rank), PlainKernels, Arc::clone(&store), options).unwrap();
                let part = parts[rank];
                scope.spawn(move || rank_sums(Arc::new(device), &fabric, size, &shard, part))
            });
            let ranks: Vec<_> = ranks.collect();
            ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
        })
    }

    fn rank_sums(
        device: Arc<Reference>,
        fabric: &Fabric<Reference>,
        size: usize,
        shard: &[usize],
        part: f32,
    ) -> Vec<f32> {
        let rank = device.rank().0;
        let (first, mine) = (rank / size * size, shard[rank]);
        let buffers = GroupBuffers::allocate(&*device, size, HIDDEN, [8, 4]).unwrap();
        let group = Group::new(Arc::clone(&device), fabric, first..first + size, buffers).unwrap();
        let shares = group.shares(shard);
        group.begin(&shares).unwrap();
        let values = |name, rows| device.allocate(name, DType::F32, rows, HIDDEN).unwrap();
        let (x, out) = (values("x", mine), values("out", mine));
        let upload = |out: &Buffer, value: &dyn Fn(usize) -> f32| {
            let words = (0..out.rows * HIDDEN).map(|at| value(at).to_bits()).collect();
            device
                .enqueue(Lane::Compute, Place::default(), HostToDevice { words, out: out.clone() })
                .unwrap();
        };
        upload(&x, &|at| (100 * rank + at) as f32);
        group
            .gather_compute_scatter(
                Place::default(),
                [&shares; 2],
                &x,
                &out,
                |x, out| -> Result<(), DeviceError> {
                    upload(out, &|_| part);
                    device.enqueue(Lane::Compute, Place::default(), Add { x: x.clone(), out: out.clone() })
                },
            )
            .unwrap();
        device.wait(&device.record(Lane::Compute), Deadline::after(TIMEOUT)).unwrap();
        device.read_f32(&out).unwrap()
    }

    #[test]
    fn uneven_and_empty_shares_come_back_to_their_ranks() {
        let got = sums(2, [2, 1, 0, 3], [0.25, 0.5, 1.0, 2.0]);
        let want = |rank: usize, shard: usize, parts: f32| -> Vec<f32> {
            (0..shard * HIDDEN).map(|at| 2.0 * (100 * rank + at) as f32 + parts).collect()
        };
        assert_eq!(got, [want(0, 2, 0.75), want(1, 1, 0.75), want(2, 0, 3.0), want(3, 3, 3.0)]);
    }

    #[test]
    fn ranks_add_in_rank_order() {
        // ((2²⁴ + 1) − 2²⁴) + 1 is 1 in float32, where 2²⁴ + 1 is 2²⁴; other orders give 0 or 2.
        let got = sums(4, [1, 0, 0, 0], [16_777_216.0, 1.0, -16_777_216.0, 1.0]);
        assert_eq!(got[0][0], 1.0);
    }
}
