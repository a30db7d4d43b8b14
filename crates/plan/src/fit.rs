//! From measured times to a cost model: medians and rising curves, so that a few disturbed samples change nothing.

use crate::piecewise::medians;
use crate::{CostModel, GemmCost, GemmKind, Payload, Piecewise, ShareCost};

/// What was measured.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Work {
    /// One operation over experts with so many rows each, by matrices of `columns` N and `depth` K.
    Gemm {
        /// How.
        kind: GemmKind,
        /// Rows of each expert.
        rows: Vec<u64>,
        /// N.
        columns: usize,
        /// K.
        depth: usize,
    },
    /// An exchange in which nobody sends anything.
    EmptyExchange,
    /// An exchange inside a node: bytes of the larger direction.
    Near(u64),
    /// An exchange between nodes, likewise.
    Far(u64),
    /// An exchange of a rank with itself: bytes.
    Copy(u64),
    /// Rows picked by index: bytes written.
    Gather(u64),
    /// Weighted sums: bytes read.
    Reduce(u64),
    /// Index arrays from the host: bytes.
    HostToDevice(u64),
    /// Choosing experts: tokens × experts.
    Route(u64),
    /// Index arrays made on the device: (row, slot) pairs.
    Index(u64),
    /// Host: slots whose histograms it reads.
    ReadCounts(u64),
    /// Host: bytes of all messages.
    CountExchange(u64),
    /// Host: slots × ranks.
    Plan(u64),
    /// Host: calls that hand operations to a lane.
    Enqueue(u64),
    /// An exchange as a whole: what `Near`, `Far` and `Copy` are parts of.
    Exchange(Payload),
    /// A lane, or the host, going on after an event of another.
    Wake,
    /// How much too late a lane wakes up that slept until a paced link was done.
    Sleep,
    /// A transfer lane waiting for its turn on a full processor.
    Queue,
    /// Computation alone under a share that takes `free_ns` on the undivided processor.
    Capped {
        /// Position in [`CostModel::shares`].
        share: usize,
        /// Its time on the undivided processor.
        free_ns: u64,
    },
    /// Computation, all of it beside a transfer, that takes `alone_ns` alone under the share.
    ComputeBeside {
        /// Position in [`CostModel::shares`].
        share: usize,
        /// Its time alone.
        alone_ns: u64,
    },
    /// A transfer, all of it beside computation, that takes `alone_ns` alone.
    TransferBeside {
        /// Position in [`CostModel::shares`].
        share: usize,
        /// Its time alone.
        alone_ns: u64,
    },
}

impl Work {
    /// Whether it is work of a compute lane, at the speed of its processor.
    pub fn is_computed(&self) -> bool {
        matches!(
            self,
            Work::Gemm { .. }
                | Work::Gather(_)
                | Work::Reduce(_)
                | Work::HostToDevice(_)
                | Work::Route(_)
                | Work::Index(_)
        )
    }
}

/// One measurement.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sample {
    /// What.
    pub work: Work,
    /// How long it took.
    pub ns: u64,
}

impl CostModel {
    /// This model with every table that the samples speak of measured anew. Shares are those of this model.
    #[must_use]
    pub fn fitted(&self, samples: &[Sample]) -> Self {
        let element_bytes = self.dtype.bytes() as u64;
        let mut model = CostModel {
            grouped: fit_gemm(&self.grouped, GemmKind::Grouped, samples, element_bytes),
            dense: fit_gemm(&self.dense, GemmKind::Dense, samples, element_bytes),
            shares: fit_shares(&self.shares, samples),
            ..self.clone()
        };
        let link = &mut model.link;
        link.exchange_ns = median(samples, |work| *work == Work::EmptyExchange).unwrap_or(link.exchange_ns);
        let start = link.exchange_ns;
        let pick = |curve: &mut Piecewise, start: u64, size: fn(&Work) -> Option<u64>| {
            let sized = samples.iter().filter_map(|sample| Some((size(&sample.work)?, sample.ns)));
            let fitted = Piecewise::fit(sized.map(|(size, ns)| (size, ns.saturating_sub(start))));
            if !fitted.points().is_empty() {
                *curve = fitted;
            }
        };
        macro_rules! curves {
            ($($curve:expr, $start:expr, $work:ident;)*) => {
                $(pick($curve, $start, |work| match work {
                    Work::$work(size) => Some(*size),
                    _ => None,
                });)*
            };
        }
        curves! {
            &mut model.link.near, start, Near;
            &mut model.link.far, start, Far;
            &mut model.link.copy, start, Copy;
            &mut model.rows.gather, 0, Gather;
            &mut model.rows.reduce, 0, Reduce;
            &mut model.rows.host_to_device, 0, HostToDevice;
            &mut model.rows.route, 0, Route;
            &mut model.rows.index, 0, Index;
            &mut model.host.read, 0, ReadCounts;
            &mut model.host.exchange, 0, CountExchange;
            &mut model.host.plan, 0, Plan;
            &mut model.host.enqueue, 0, Enqueue;
        }
        let host = &mut model.host;
        host.wake_ns = median(samples, |work| *work == Work::Wake).unwrap_or(host.wake_ns);
        host.sleep_ns = median(samples, |work| *work == Work::Sleep).unwrap_or(host.sleep_ns);
        host.queue_ns = mean(samples, |work| *work == Work::Queue).unwrap_or(host.queue_ns);
        model
    }
}

fn median(samples: &[Sample], wanted: impl Fn(&Work) -> bool) -> Option<u64> {
    let of = samples.iter().filter(|sample| wanted(&sample.work)).map(|sample| (0, sample.ns));
    medians(of).first().map(|&(_, ns)| ns)
}

/// Of the nine tenths that are shortest: waits that are mostly short and sometimes long add up to their mean.
fn mean(samples: &[Sample], wanted: impl Fn(&Work) -> bool) -> Option<u64> {
    let mut times: Vec<u64> =
        samples.iter().filter(|sample| wanted(&sample.work)).map(|sample| sample.ns).collect();
    times.sort_unstable();
    times.truncate((times.len() * 9).div_ceil(10));
    times.iter().sum::<u64>().checked_div(times.len() as u64)
}

fn fit_shares(shares: &[ShareCost], samples: &[Sample]) -> Vec<ShareCost> {
    let ratio = |wanted: &dyn Fn(&Work) -> Option<u64>| {
        let ratios = samples.iter().filter_map(|sample| Some((wanted(&sample.work)?, sample.ns)));
        medians(ratios.filter(|&(alone, _)| alone > 0).map(|(alone, ns)| (0, ns * 1000 / alone)))
            .first()
            .map(|&(_, permille)| permille)
    };
    let fit = |(number, share): (usize, &ShareCost)| {
        let capped = ratio(&|work| match *work {
            Work::Capped { share, free_ns } if share == number => Some(free_ns),
            _ => None,
        });
        let compute = ratio(&|work| match *work {
            Work::ComputeBeside { share, alone_ns } if share == number => Some(alone_ns),
            _ => None,
        });
        let transfer = ratio(&|work| match *work {
            Work::TransferBeside { share, alone_ns } if share == number => Some(alone_ns),
            _ => None,
        });
        ShareCost {
            reserved: share.reserved,
            compute: capped.unwrap_or(share.compute).max(1),
            compute_beside: compute.unwrap_or(share.compute_beside).max(1000),
            transfer_beside: transfer.unwrap_or(share.transfer_beside).max(1000),
        }
    };
    shares.iter().enumerate().map(fit).collect()
}

/// One GEMM sample: its arithmetic, its weights, its time.
#[derive(Clone)]
struct Point {
    /// Rows of each expert.
    experts: Vec<u64>,
    columns: usize,
    /// Rows per expert.
    rows: u64,
    depth: u64,
    flops: u64,
    weight_bytes: u64,
    ns: u64,
}

/// Best rates first, then what an operation costs besides, then how far each number of rows and each depth stays
/// below the best rate: two factors, each the median of what the other leaves.
fn fit_gemm(before: &GemmCost, kind: GemmKind, samples: &[Sample], element_bytes: u64) -> GemmCost {
    let mut points: Vec<Point> =
        samples.iter().filter_map(|sample| point(sample, kind, element_bytes)).collect();
    if points.is_empty() {
        return before.clone();
    }
    points.sort_by_key(|point| (point.flops, point.weight_bytes, point.rows, point.ns));
    // The median of every shape.
    let same = |left: &Point, right: &Point| {
        (left.flops, left.weight_bytes, left.rows) == (right.flops, right.weight_bytes, right.rows)
    };
    let mut points: Vec<Point> = points.chunk_by(same).map(|equal| equal[equal.len() / 2].clone()).collect();
    if before.tiles.is_some() {
        return fit_tiles(before, &points);
    }
    let per_second =
        |amount: u64, ns: u64| (u128::from(amount) * 1_000_000_000 / u128::from(ns.max(1))) as u64;
    let best = |points: &[Point], amount: fn(&Point) -> u64| {
        points.iter().map(|point| per_second(amount(point), point.ns)).max().unwrap_or(1).max(1)
    };
    let ideal = |point: &Point, flops: u64, bytes: u64| {
        let seconds = |amount: u64, rate: u64| (u128::from(amount) * 1_000_000_000 / u128::from(rate)) as u64;
        (seconds(point.flops, flops), seconds(point.weight_bytes, bytes))
    };
    let (flops, bytes) = (best(&points, |point| point.flops), best(&points, |point| point.weight_bytes));
    let smallest = &points[0];
    let (compute, read) = ideal(smallest, flops, bytes);
    let op_ns = smallest.ns.saturating_sub(compute.max(read)).min(smallest.ns * 9 / 10);
    // What is left of operations that hardly take longer than that is noise.
    if points.iter().any(|point| 2 * point.ns > 3 * op_ns) {
        points.retain(|point| 2 * point.ns > 3 * op_ns);
    }
    for point in &mut points {
        point.ns = point.ns.saturating_sub(op_ns).max(1);
    }
    let (flops, bytes) = (best(&points, |point| point.flops), best(&points, |point| point.weight_bytes));
    // Where reading the weights takes all the time, arithmetic shows at least some efficiency, but not how much.
    let reads = |point: &Point| ideal(point, flops, bytes).1 > point.ns / 10 * 9;
    let most = points.iter().filter(|point| reads(point)).map(|point| point.rows).max().unwrap_or(0);
    let efficiency = |point: &Point| (ideal(point, flops, bytes).0 * 1000 / point.ns).clamp(1, 1000);
    let with_efficiency = |wanted: &dyn Fn(&Point) -> bool| -> Vec<(Point, u64)> {
        points.iter().filter(|point| wanted(point)).map(|point| (point.clone(), efficiency(point))).collect()
    };
    let hidden = with_efficiency(&|point| point.rows == most);
    let (rows, depth) = match with_efficiency(&|point| point.rows > most) {
        shown if shown.is_empty() => two_factors(&hidden),
        shown => {
            let (rows, depth) = two_factors(&shown);
            (starting_below(rows, &hidden), depth)
        }
    };
    let fitted = GemmCost {
        flops_per_second: flops,
        rows,
        depth,
        weight_bytes_per_second: bytes,
        op_ns,
        least_columns: 0,
        tiles: None,
    };
    let least_columns = least_columns(&fitted, kind, samples, element_bytes);
    GemmCost { least_columns, ..fitted }
}

/// What an operation of tiles costs besides them, and their efficiencies: how much sooner than said they are done, by rows of
/// an expert (in powers of two, as finely as they can be told from their neighbours) and by depth, where reading the
/// weights does not take all the time. Narrow products, a router's, are done by other kernels: they tell how many columns
/// they take the time of.
fn fit_tiles(before: &GemmCost, points: &[Point]) -> GemmCost {
    /// Products of fewer columns are narrow.
    const WIDE: usize = 512;
    let flat = || Piecewise::flat(1000);
    let plain = GemmCost { rows: flat(), depth: flat(), op_ns: 0, least_columns: 0, ..before.clone() };
    let told = |point: &Point| {
        let product = plain.product(point.columns, point.depth as usize, 0);
        product.op_ns(point.experts.iter().copied())
    };
    let (wide, narrow): (Vec<&Point>, Vec<&Point>) = points.iter().partition(|point| point.columns >= WIDE);
    let rate = |point: &&Point| {
        (u128::from(point.weight_bytes) * 1_000_000_000 / u128::from(point.ns.max(1))) as u64
    };
    let bytes = wide.iter().map(rate).max().unwrap_or(0).max(before.weight_bytes_per_second.min(1));
    let read_ns =
        |point: &Point| (u128::from(point.weight_bytes) * 1_000_000_000 / u128::from(bytes.max(1))) as u64;
    // The shortest tell what is not of tiles.
    let mut by_length = wide.clone();
    by_length.sort_by_key(|point| (told(point), point.ns));
    let short = by_length.iter().take(by_length.len().div_ceil(5));
    let besides = short.map(|point| (0, point.ns.saturating_sub(told(point).max(read_ns(point)))));
    let op_ns = medians(besides).first().map_or(before.op_ns, |&(_, ns)| ns);
    let shown = wide.iter().filter_map(|&point| {
        let ns = point.ns.saturating_sub(op_ns).max(1);
        let (told, rows) = (told(point), point.rows.next_power_of_two());
        let long = told > 2 * op_ns && 10 * ns > 12 * read_ns(point);
        long.then(|| (Point { rows, ..point.clone() }, (told * 1000 / ns).clamp(200, 5000)))
    });
    let shown: Vec<(Point, u64)> = shown.collect();
    let (rows, depth) = if shown.is_empty() { (flat(), flat()) } else { two_factors(&shown) };
    let fitted = GemmCost {
        rows,
        depth,
        op_ns,
        weight_bytes_per_second: if wide.is_empty() { before.weight_bytes_per_second } else { bytes },
        ..plain
    };
    let columns = plain.tiles.map_or(1, |tiles| tiles.columns);
    let as_many = narrow.iter().map(|point| {
        let ns = point.ns.saturating_sub(op_ns);
        (0, columns * ns / told(point).max(1))
    });
    let least_columns = medians(as_many).first().map_or(0, |&(_, columns)| columns.min(1 << 16));
    GemmCost { least_columns, ..fitted }
}

/// How many columns the narrow products, a router's, take the time of.
fn least_columns(fitted: &GemmCost, kind: GemmKind, samples: &[Sample], element_bytes: u64) -> u64 {
    let as_many = |sample: &Sample| {
        let Work::Gemm { kind: of, rows, columns, depth } = &sample.work else { return None };
        let (&[rows], true) = (rows.as_slice(), *of == kind && *columns < NARROW) else { return None };
        let wide = fitted.product(NARROW, *depth, 8000 * element_bytes);
        let (ns, of_wide) = (sample.ns.saturating_sub(fitted.op_ns), wide.expert_ns(rows));
        // Short ones say more about the clock.
        (ns > 4 * fitted.op_ns).then(|| (0, (NARROW as u64 * ns / of_wide.max(1)).min(NARROW as u64)))
    };
    medians(samples.iter().filter_map(as_many)).first().map_or(0, |&(_, columns)| columns)
}

/// Fewest columns of a product that tells how fast products are.
const NARROW: usize = 64;

fn point(sample: &Sample, wanted: GemmKind, element_bytes: u64) -> Option<Point> {
    let Work::Gemm { kind, rows, columns, depth } = &sample.work else { return None };
    let all: u64 = rows.iter().sum();
    let experts = rows.iter().filter(|&&rows| rows > 0).count() as u64;
    // A router's few columns fill no kernel: they say nothing about experts of the same depth.
    if *kind != wanted || experts == 0 || sample.ns == 0 || *columns < NARROW {
        return None;
    }
    let elements = (columns * depth) as u64;
    Some(Point {
        experts: rows.clone(),
        columns: *columns,
        rows: all / experts,
        depth: *depth as u64,
        flops: 2 * all * elements,
        weight_bytes: experts * elements * element_bytes,
        ns: sample.ns,
    })
}

/// The curve with a point before its first one, where the efficiency is between what `hidden` shows at the least and
/// the first one's: half way.
fn starting_below(rows: Piecewise, hidden: &[(Point, u64)]) -> Piecewise {
    let least = medians(hidden.iter().map(|(point, permille)| (point.rows, *permille)));
    let first = rows.points().first().map_or(0, |point| point.1);
    let start = least.into_iter().map(|(x, permille)| (x, permille.max(first.midpoint(permille))));
    Piecewise::of(start.chain(rows.points().iter().copied()))
}

/// (rows → permille, depth → permille) whose product is closest to the efficiencies, by medians; the deepest
/// factor is 1000.
fn two_factors(efficiencies: &[(Point, u64)]) -> (Piecewise, Piecewise) {
    let mut depth = Piecewise::flat(1000);
    let mut rows = Piecewise::flat(1000);
    for _ in 0..4 {
        let without = |curve: &Piecewise, x: u64, permille: u64| permille * 1000 / curve.clamped(x).max(1);
        let by_rows = efficiencies
            .iter()
            .map(|(point, permille)| (point.rows, without(&depth, point.depth, *permille).max(1)));
        rows = Piecewise::of(medians(by_rows));
        let by_depth = efficiencies
            .iter()
            .map(|(point, permille)| (point.depth, without(&rows, point.rows, *permille).max(1)));
        let by_depth = medians(by_depth);
        let largest = by_depth.iter().map(|&(_, permille)| permille).max().unwrap_or(1000);
        depth =
            Piecewise::of(by_depth.into_iter().map(|(x, permille)| (x, (permille * 1000 / largest).max(1))));
    }
    (rows, depth)
}
