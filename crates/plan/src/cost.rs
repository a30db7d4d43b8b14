//! What work costs on a machine: a readable file of measured tables, read in whole numbers.
//!
//! Every time is in nanoseconds and every factor in thousandths (*permille*). All arithmetic is on integers, so the
//! same file gives bit-identical times on every rank, whatever its processor or compiler.

use crate::piecewise::{MOST_NS, saturated, scale};
use crate::{GemmKind, Piecewise, Work};
use epsmoe_base::{DType, hash_bytes};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::ops::{Range, RangeInclusive};

/// A cost model, or a machine's description, that cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CostError {
    /// The text is not one.
    #[error("{what} cannot be read: {why}")]
    Unreadable {
        /// What was expected.
        what: &'static str,
        /// What the parser says.
        why: String,
    },
    /// It was written by another release.
    #[error("the cost model has version {got}, this program reads version {want}: measure it again")]
    Version {
        /// The file's.
        got: u32,
        /// This program's.
        want: u32,
    },
    /// A figure that no machine can have.
    #[error("{table} of the cost model {problem}")]
    Table {
        /// Which one.
        table: String,
        /// What is wrong with it.
        problem: String,
    },
    /// A name that the catalog does not have.
    #[error("no {what} is called `{name}`: there are {known}")]
    Unknown {
        /// Machine, processor, link or kernels.
        what: &'static str,
        /// The name.
        name: String,
        /// Names that exist.
        known: String,
    },
}

/// What everything costs on one machine, with one set of kernels, in one number format.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CostModel {
    /// [`CostModel::VERSION`] of the program that wrote it.
    pub version: u32,
    /// The hardware it was measured on; elsewhere it is refused.
    pub machine: String,
    /// The kernels it was measured with, likewise.
    pub kernels: String,
    /// The number format of weights and rows.
    pub dtype: DType,
    /// Threads, over all ranks, that run at full speed at once: a compute lane has `lane_threads` of them, copying and
    /// the host one each, and more than these slow the compute lanes down ([`CpuContention`](crate::CpuContention)). 0: every rank has
    /// a processor of its own.
    pub concurrent: u32,
    /// Threads that a compute lane keeps busy.
    pub lane_threads: u32,
    /// One call over all experts of a stage.
    pub grouped: GemmCost,
    /// One call per expert.
    pub dense: GemmCost,
    /// Exchanges between ranks.
    pub link: LinkCost,
    /// Moving and adding rows.
    pub rows: RowsCost,
    /// What the host does between the lanes' work.
    pub host: HostCost,
    /// Ways to divide the processor between computation and transfers ([`StageTable::reserved`](crate::StageTable::reserved)).
    /// The first is no division at all.
    pub shares: Vec<ShareCost>,
}

/// Multiplying `rows` rows by an expert's `[K, N]` matrix takes the longer of
/// `2·rows·N·K / (flops_per_second · rows-efficiency · depth-efficiency)` and `bytes of the matrix /
/// weight_bytes_per_second`; an operation adds that up over its experts, and pays `op_ns` once.
///
/// One expert, 100 rows, N = K = 1000, 10¹² FLOP/s at 50 % efficiency: 2·10⁸ FLOP take 400 µs.
///
/// ```
/// # use epsmoe_plan::*;
/// let gemm = GemmCost {
///     flops_per_second: 1_000_000_000_000,
///     rows: Piecewise::flat(500),
///     depth: Piecewise::flat(1000),
///     weight_bytes_per_second: 10_000_000_000,
///     op_ns: 3_000,
///     least_columns: 0,
///     tiles: None,
/// };
/// let product = gemm.product(1000, 1000, 16_000);
/// assert_eq!(product.expert_ns(100), 400_000);
/// assert_eq!(product.expert_ns(1), 200_000); // reading 2 MB of weights at 10 GB/s
/// assert_eq!(product.op_ns([100, 0, 1]), 603_000); // an expert without rows costs nothing
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GemmCost {
    /// The best rate seen.
    pub flops_per_second: u64,
    /// Rows per expert → permille of it.
    pub rows: Piecewise,
    /// Depth K → permille of it.
    pub depth: Piecewise,
    /// Rate at which weights are read.
    pub weight_bytes_per_second: u64,
    /// Paid by every operation: launch, tail.
    pub op_ns: u64,
    /// A product of fewer columns computes as long as one of so many: kernels multiply whole panels.
    #[serde(default)]
    pub least_columns: u64,
    /// How a processor of many that work on tiles side by side multiplies. Where it is there, the tiles of an operation
    /// take the place of `flops_per_second`, and the two efficiencies are of them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tiles: Option<TileCost>,
}

/// An operation cut into tiles of some rows of one expert and `columns` columns, `at_once` of them computed at a time. As its
/// kernels choose the height that is done soonest, so does the price: with tiles of r rows of depth K, `K/64 ·
/// max(step + r · row, least) + end` each, the operation takes as long as all of them over `at_once` and half a tile, as
/// the last ones end at different times; and never less than one tile.
///
/// Two experts of 200 and 100 rows, 512 columns, K = 64, four tiles at a time: each expert is one tile high, of 224 and of
/// 128 rows, and two across. At 1 ns a row and 1 µs a tile they take 1224 and 1128 ns, all of them 4704 ns, a fourth of
/// that is 1176 ns, and with half of the longest it is 1788 ns. Lower tiles would be more, and take longer.
///
/// ```
/// # use epsmoe_plan::*;
/// let tiles = TileCost { columns: 256, at_once: 4, step_ps: 0, row_ps: 1000, least_ps: 0, end_ps: 1_000_000 };
/// let gemm = GemmCost { tiles: Some(tiles), ..CostModel::unmeasured(epsmoe_base::DType::BF16, 1, 1).grouped };
/// let gemm = GemmCost { op_ns: 0, rows: Piecewise::flat(1000), depth: Piecewise::flat(1000), ..gemm };
/// assert_eq!(gemm.product(512, 64, 0).op_ns([200, 100]), 1788);
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TileCost {
    /// Columns of a tile.
    pub columns: u64,
    /// Tiles that are computed at once.
    pub at_once: u64,
    /// Picoseconds of 64 steps of K, besides the rows …
    pub step_ps: u64,
    /// … of each row of them …
    pub row_ps: u64,
    /// … and at the least.
    pub least_ps: u64,
    /// Picoseconds of a tile that do not depend on K.
    pub end_ps: u64,
}

impl TileCost {
    /// Rows of the tallest tile, and of the steps in which heights differ.
    const MOST_ROWS: u64 = 256;
    pub(crate) const ROWS: u64 = 32;
    /// Heights that are tried.
    const LIMITS: [u64; 4] = [256, 192, 128, 64];

    /// What products on Hopper take at 1.55 GHz, which their own choice of tiles goes by too.
    pub fn hopper(multiprocessors: u32) -> Self {
        TileCost {
            columns: 256,
            at_once: u64::from(multiprocessors / 2).max(1),
            step_ps: 83_900,
            row_ps: 2_390,
            least_ps: 355_000,
            end_ps: 968_000,
        }
    }

    /// The same, `permille` / 1000 times as slow.
    fn slowed(self, permille: u64) -> Self {
        TileCost {
            step_ps: scale(self.step_ps, permille),
            row_ps: scale(self.row_ps, permille),
            least_ps: scale(self.least_ps, permille),
            end_ps: scale(self.end_ps, permille),
            ..self
        }
    }

    fn tile_ps(&self, rows: u64, steps: u64) -> u64 {
        let step = (self.step_ps + rows * self.row_ps).max(self.least_ps);
        (steps * step + self.end_ps).max(1)
    }

    fn check(&self, table: &str) -> Result<(), CostError> {
        let Self { columns, at_once, step_ps, row_ps, least_ps, end_ps } = *self;
        let times = [step_ps, row_ps, least_ps, end_ps];
        if (1..=MOST_COLUMNS).contains(&columns)
            && (1..=MOST_COLUMNS).contains(&at_once)
            && times.iter().all(|&ps| ps <= MOST_TILE_PS)
        {
            return Ok(());
        }
        let problem = format!("has tiles that no processor has: {self:?}");
        Err(CostError::Table { table: table.into(), problem })
    }
}

/// How the weights of experts, or of other maps, are held, and so how they are multiplied.
///
/// ```
/// # use epsmoe_plan::*;
/// let gemm = CostModel::unmeasured(epsmoe_base::DType::BF16, 1, 1).grouped;
/// let ns = |fp8_rows| gemm.product(4096, 4096, WeightCost { millibits: 8000, fp8_rows }).expert_ns(8192) as f64;
/// assert!((ns(true) / ns(false) - 0.75).abs() < 0.001);
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct WeightCost {
    /// Thousandths of a bit that a number takes up, with its share of scales.
    pub millibits: u64,
    /// Whether rows become FP8 codes for them, and codes are multiplied.
    pub fp8_rows: bool,
}

impl From<u64> for WeightCost {
    /// Numbers of so many thousandths of a bit, multiplied in the format of activations.
    fn from(millibits: u64) -> Self {
        WeightCost { millibits, fp8_rows: false }
    }
}

impl fmt::Display for WeightCost {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} bits", self.millibits as f64 / 1000.0)?;
        f.write_str(if self.fp8_rows { ", multiplied as FP8 codes" } else { "" })
    }
}

impl WeightCost {
    /// What products of FP8 codes take of the time of the same in bfloat16: 12 products of 6 models, 256 to 4096 rows each, on an
    /// H200 (`docs/gpu.md`).
    const FP8_PERMILLE: u64 = 750;

    /// What computing takes of the time of products in the format of activations.
    fn permille(self) -> u64 {
        if self.fp8_rows { Self::FP8_PERMILLE } else { 1000 }
    }
}

/// [`GemmCost`] for one matrix shape, ready to be asked many times.
#[derive(Clone, Copy, Debug)]
pub struct Product<'a> {
    rows: &'a Piecewise,
    /// Picoseconds of a row at the best rate.
    row_ps: u64,
    weight_ns: u64,
    op_ns: u64,
    tiles: Option<Tiles>,
}

/// Tiles of one matrix shape.
#[derive(Clone, Copy, Debug)]
struct Tiles {
    cost: TileCost,
    /// Tiles side by side, and 64-deep steps of each.
    across: u64,
    steps: u64,
    depth_permille: u64,
}

impl Tiles {
    /// How many tiles an expert is high, each of how many rows, where they may have up to `limit`.
    fn cut(rows: u64, limit: u64) -> (u64, u64) {
        let high = rows.div_ceil(limit).max(1);
        (high, rows.div_ceil(high).next_multiple_of(TileCost::ROWS))
    }

    /// Tiles of an expert that is so many high.
    fn all(&self, high: u64) -> u128 {
        u128::from(high) * u128::from(self.across)
    }

    /// Picoseconds of a tile of an expert with so many rows.
    fn tile_ps(&self, rows: u64, height: u64, efficiency: &Piecewise) -> u64 {
        let ps = self.cost.tile_ps(height, self.steps);
        let permille = u128::from(efficiency.clamped(rows).max(1)) * u128::from(self.depth_permille);
        saturated(u128::from(ps) * 1_000_000 / permille.max(1)).min(MOST_NS)
    }

    /// One expert's share of a long operation.
    fn expert_ns(&self, rows: u64, efficiency: &Piecewise) -> u64 {
        let of_limit = |limit| {
            let (high, height) = Self::cut(rows, limit);
            let all = self.all(high) * u128::from(self.tile_ps(rows, height, efficiency));
            saturated(all / u128::from(self.cost.at_once) / 1000)
        };
        TileCost::LIMITS.map(of_limit).into_iter().min().unwrap_or(0)
    }

    /// An operation over experts with so many rows each.
    fn op_ns(&self, experts: &[u64], efficiency: &Piecewise) -> u64 {
        let of_limit = |limit| {
            let (mut all, mut tallest) = (0u128, 0);
            for &rows in experts {
                let (high, height) = Self::cut(rows, limit);
                let tile = self.tile_ps(rows, height, efficiency);
                all += self.all(high) * u128::from(tile);
                tallest = tallest.max(tile);
            }
            let even = saturated(all / u128::from(self.cost.at_once));
            tallest.max(even.saturating_add(tallest / 2)) / 1000
        };
        TileCost::LIMITS.map(of_limit).into_iter().min().unwrap_or(0)
    }
}

impl GemmCost {
    /// For matrices of `columns` N by `depth` K, whose numbers are held so.
    pub fn product(&self, columns: usize, depth: usize, weights: impl Into<WeightCost>) -> Product<'_> {
        let weights = weights.into();
        let elements = columns as u128 * depth as u128;
        let computed = (columns as u128).max(self.least_columns.into()) * depth as u128;
        let row_ps = (2 * computed).saturating_mul(1_000_000_000_000 * 1000)
            / rate(self.flops_per_second)
            / self.depth_permille(depth)
            * u128::from(weights.permille())
            / 1000;
        // Thousandths of a bit a byte per second are 125 000 nanoseconds.
        let weight_ns = elements.saturating_mul(u128::from(weights.millibits) * 125_000)
            / rate(self.weight_bytes_per_second);
        let tiles = self.tiles.map(|cost| Tiles {
            cost: cost.slowed(weights.permille()),
            across: (columns as u64).max(self.least_columns).div_ceil(cost.columns).max(1),
            steps: (depth as u64).div_ceil(64).min(MOST_STEPS),
            depth_permille: self.depth_permille(depth) as u64,
        });
        Product {
            rows: &self.rows,
            row_ps: saturated(row_ps.max(1)),
            weight_ns: saturated(weight_ns),
            op_ns: self.op_ns,
            tiles,
        }
    }

    fn depth_permille(&self, depth: usize) -> u128 {
        u128::from(self.depth.clamped(depth as u64).max(1))
    }

    /// The same, `permille` / 1000 times as slow.
    fn slowed(&self, permille: u64) -> Self {
        GemmCost {
            flops_per_second: divided(self.flops_per_second, permille),
            weight_bytes_per_second: divided(self.weight_bytes_per_second, permille),
            op_ns: scale(self.op_ns, permille),
            tiles: self.tiles.map(|tiles| tiles.slowed(permille)),
            ..self.clone()
        }
    }

    fn check(&self, table: &str) -> Result<(), CostError> {
        let refuse = |problem: &str| Err(CostError::Table { table: table.into(), problem: problem.into() });
        for rate in [self.flops_per_second, self.weight_bytes_per_second] {
            if !RATES.contains(&rate) {
                return refuse(&format!(
                    "has a rate of {rate}, but a second holds from {} to {}",
                    RATES.start(),
                    RATES.end()
                ));
            }
        }
        if self.op_ns > LONGEST_NS {
            return refuse(&longer(self.op_ns));
        }
        self.tiles.map_or(Ok(()), |tiles| tiles.check(table))?;
        if self.least_columns > MOST_COLUMNS {
            return refuse(&format!(
                "has {} columns at the least, more than {MOST_COLUMNS}",
                self.least_columns
            ));
        }
        for curve in [&self.rows, &self.depth] {
            if !curve.is_sorted() {
                return refuse("has an efficiency whose points do not ascend");
            }
            if curve.points().iter().any(|&(_, permille)| !(1..=MOST_PERMILLE).contains(&permille)) {
                return refuse(&format!("has an efficiency that is not from 1 to {MOST_PERMILLE} permille"));
            }
        }
        Ok(())
    }
}

impl Product<'_> {
    /// One expert's part of an operation, at most [`MOST_NS`].
    pub fn expert_ns(&self, rows: u64) -> u64 {
        if rows == 0 {
            return 0;
        }
        if let Some(tiles) = &self.tiles {
            return tiles.expert_ns(rows, self.rows).max(self.weight_ns).min(MOST_NS);
        }
        // Picoseconds over permille are nanoseconds.
        let compute_ns = rows.saturating_mul(self.row_ps) / self.rows.clamped(rows).max(1);
        compute_ns.max(self.weight_ns).min(MOST_NS)
    }

    /// Whether it is priced by the tiles that it is cut into.
    pub(crate) fn has_tiles(&self) -> bool {
        self.tiles.is_some()
    }

    /// One operation over experts with so many rows each, at most [`MOST_NS`].
    pub fn op_ns(&self, rows: impl IntoIterator<Item = u64>) -> u64 {
        if let Some(tiles) = &self.tiles {
            let rows: Vec<u64> = rows.into_iter().filter(|&rows| rows > 0).collect();
            let read = self.weight_ns.saturating_mul(rows.len() as u64);
            return self.op_ns.saturating_add(tiles.op_ns(&rows, self.rows).max(read)).min(MOST_NS);
        }
        rows.into_iter().fold(self.op_ns, |sum, rows| sum.saturating_add(self.expert_ns(rows))).min(MOST_NS)
    }

    /// What an operation costs besides its experts.
    pub fn overhead_ns(&self) -> u64 {
        let last = self.tiles.map_or(0, |tiles| {
            let ps = tiles.tile_ps(TileCost::MOST_ROWS, TileCost::MOST_ROWS, self.rows);
            ps / 2000
        });
        self.op_ns + last
    }
}

/// What a rank sends and receives in one exchange, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Payload {
    /// To or from ranks of its own node, whichever is more; not itself.
    pub near: u64,
    /// To or from ranks of other nodes, whichever is more.
    pub far: u64,
    /// Everything it receives, from itself too.
    pub received: u64,
}

/// An exchange among ranks takes `exchange_ns` and then the longest of three: the link inside the node, the link
/// between nodes, and the copying of what arrives. They carry at the same time.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LinkCost {
    /// Paid by every exchange, even one without bytes.
    pub exchange_ns: u64,
    /// Ranks of one node; 0: all of them.
    pub node_ranks: u32,
    /// Larger direction inside the node → ns, with its start cost.
    pub near: Piecewise,
    /// Larger direction to other nodes → ns, likewise.
    pub far: Piecewise,
    /// Bytes received, from the rank itself too → ns.
    pub copy: Piecewise,
}

impl LinkCost {
    /// Ranks of one node that carry whatever they send at `bytes_per_second`, after `start_ns`; copies are free.
    pub fn uniform(start_ns: u64, bytes_per_second: u64) -> Self {
        LinkCost {
            exchange_ns: 0,
            node_ranks: 0,
            near: Piecewise::line(start_ns, bytes_per_second),
            far: Piecewise::flat(0),
            copy: Piecewise::flat(0),
        }
    }

    /// The ranks of a rank's node, in a world of `ranks`.
    pub fn node_of(&self, rank: usize, ranks: usize) -> Range<usize> {
        match self.node_ranks as usize {
            0 => 0..ranks,
            node => rank / node * node..(rank / node * node + node).min(ranks),
        }
    }

    /// One rank's time from the moment all ranks are there.
    pub fn exchange_ns(&self, payload: Payload) -> u64 {
        let copied = if payload.received == 0 { 0 } else { self.copy.extended(payload.received) };
        self.exchange_ns + self.carry_ns(payload).max(copied)
    }

    /// Time on the links alone.
    pub(crate) fn carry_ns(&self, payload: Payload) -> u64 {
        let carried = |curve: &Piecewise, bytes: u64| if bytes == 0 { 0 } else { curve.extended(bytes) };
        carried(&self.near, payload.near).max(carried(&self.far, payload.far))
    }

    /// Processor time of an exchange: starting it and copying what arrives.
    pub(crate) fn copy_ns(&self, payload: Payload) -> u64 {
        self.exchange_ns + if payload.received == 0 { 0 } else { self.copy.extended(payload.received) }
    }
}

/// Operations that move or add rows; each curve's value at 0 is what an operation costs without any.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RowsCost {
    /// Bytes written → ns: rows picked by index.
    pub gather: Piecewise,
    /// Bytes read → ns: weighted sums of rows.
    pub reduce: Piecewise,
    /// Bytes → ns: index arrays from the host.
    #[serde(alias = "upload")]
    pub host_to_device: Piecewise,
    /// Router logits (tokens × experts) → ns: choosing experts.
    pub route: Piecewise,
    /// (row, slot) pairs → ns: one index array, or a few that are made in one go.
    pub index: Piecewise,
}

/// Work of the host, which no lane does, and how fast host and lanes notice each other.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HostCost {
    /// Slots → ns: reading the rank's token histograms.
    pub read: Piecewise,
    /// Bytes of all ranks' messages → ns: the count exchange, from the moment the last rank is there.
    pub exchange: Piecewise,
    /// Slots × ranks → ns: checking the counts, cutting the stages, laying out the buffers.
    pub plan: Piecewise,
    /// Calls of a whole layer that hand its operations and copies to the lanes → ns. 0 where lanes never wait for that.
    #[serde(default)]
    pub enqueue: Piecewise,
    /// From an event to the moment at which a lane, or the host, that waited for it goes on.
    #[serde(default)]
    pub wake_ns: u64,
    /// How much too late a lane wakes up that slept until a paced link was done.
    #[serde(default)]
    pub sleep_ns: u64,
    /// How long a transfer lane or the host, ready to go on, waits for its turn on a shared processor
    /// ([`CostModel::concurrent`]) on which as many threads compute as it can hold; less if one of them is done first.
    #[serde(default)]
    pub queue_ns: u64,
}

/// One way to divide the processor between computation and transfers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ShareCost {
    /// Permille of the processor that computation leaves alone.
    pub reserved: u64,
    /// Computation takes this many permille of its time under [`GemmCost`] when nothing travels.
    pub compute: u64,
    /// … and this many permille of *that* while something travels.
    pub compute_beside: u64,
    /// A transfer takes this many permille of its time while something computes.
    pub transfer_beside: u64,
}

impl ShareCost {
    /// The whole processor, and neither side notices the other.
    pub const FREE: ShareCost =
        ShareCost { reserved: 0, compute: 1000, compute_beside: 1000, transfer_beside: 1000 };
}

/// How much slower than its model a machine proved to be, in permille of time: 1000 is as predicted. Agreed by all
/// ranks before it is used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Correction {
    /// Exchanges.
    pub link: u64,
    /// Grouped GEMM.
    pub grouped: u64,
    /// Dense GEMM.
    pub dense: u64,
    /// Moving and adding rows.
    pub rows: u64,
}

impl Default for Correction {
    fn default() -> Self {
        Correction { link: 1000, grouped: 1000, dense: 1000, rows: 1000 }
    }
}

impl Correction {
    /// The factor after one more look: half way to `measured / predicted`, in one step at most doubled or halved, and
    /// always between 1/16 and 16. `predicted` was made with `factor`.
    ///
    /// ```
    /// # use epsmoe_plan::Correction;
    /// // A link that takes four times as long as predicted.
    /// let mut factor = 1000;
    /// for expected in [2000, 3000, 3500] {
    ///     factor = Correction::step(factor, 100 * factor / 1000, 400);
    ///     assert_eq!(factor, expected);
    /// }
    /// ```
    pub fn step(factor: u64, predicted_ns: u64, measured_ns: u64) -> u64 {
        if predicted_ns == 0 || measured_ns == 0 {
            return factor;
        }
        let right = u128::from(factor) * u128::from(measured_ns) / u128::from(predicted_ns);
        let right = right.min(u128::from(u64::MAX)) as u64;
        let half_way = factor.midpoint(right.max(1));
        half_way.clamp(factor / 2, factor * 2).clamp(1000 / 16, 16_000)
    }
}

impl CostModel {
    /// What a division of the processor costs, by the permille that computation leaves alone; no division where it was
    /// not measured.
    pub fn share(&self, reserved: u64) -> ShareCost {
        let same = self.shares.iter().find(|share| share.reserved == reserved);
        same.or(self.shares.first()).copied().unwrap_or(ShareCost::FREE)
    }

    /// What this program writes and reads.
    pub const VERSION: u32 = 5;

    /// Round figures of a server's CPU, for a machine that nobody measured: ranks of `threads` threads, of which
    /// `concurrent` in all run at full speed at once (0: every rank has a processor of its own). Good enough to begin with; a [`AutoPlanner`](crate::AutoPlanner)
    /// corrects them while it runs.
    pub fn unmeasured(dtype: DType, threads: usize, concurrent: u32) -> Self {
        let lanes = threads.max(1) as u64;
        let gemm = |op_ns| GemmCost {
            flops_per_second: lanes * 80_000_000_000 * if dtype == DType::BF16 { 2 } else { 1 },
            rows: Piecewise::of([(1, 200), (4, 450), (16, 750), (64, 950), (256, 1000)]),
            depth: Piecewise::of([(64, 800), (512, 950), (2048, 1000)]),
            weight_bytes_per_second: 12_000_000_000 * lanes.min(2),
            op_ns,
            least_columns: 48,
            tiles: None,
        };
        let per_second = |start, rate| Piecewise::line(start, rate);
        CostModel {
            version: Self::VERSION,
            machine: "not measured".into(),
            kernels: "not measured".into(),
            dtype,
            concurrent,
            lane_threads: lanes as u32,
            grouped: gemm(8_000),
            dense: gemm(8_000),
            link: LinkCost {
                exchange_ns: 40_000,
                node_ranks: 0,
                near: per_second(20_000, 5_000_000_000),
                far: Piecewise::flat(0),
                copy: per_second(5_000, 8_000_000_000),
            },
            rows: RowsCost {
                gather: per_second(4_000, 5_000_000_000),
                reduce: per_second(4_000, 5_000_000_000),
                host_to_device: per_second(2_000, 5_000_000_000),
                route: per_second(4_000, 100_000_000),
                index: per_second(4_000, 200_000_000),
            },
            host: HostCost {
                read: per_second(20_000, 50_000_000),
                exchange: per_second(50_000, 1_000_000_000),
                plan: per_second(10_000, 50_000_000),
                enqueue: Piecewise::flat(0),
                wake_ns: 20_000,
                sleep_ns: 60_000,
                queue_ns: 100_000,
            },
            shares: vec![ShareCost { compute_beside: 1050, transfer_beside: 1100, ..ShareCost::FREE }],
        }
    }

    /// Reads a file's text.
    pub fn parse(text: &str) -> Result<Self, CostError> {
        let unreadable =
            |error: toml::de::Error| CostError::Unreadable { what: "a cost model", why: error.to_string() };
        // Another version may have other fields: say that first.
        let table: toml::Table = text.parse().map_err(unreadable)?;
        let version = table.get("version").and_then(toml::Value::as_integer).unwrap_or(0);
        if version != i64::from(Self::VERSION) {
            return Err(CostError::Version { got: version.unsigned_abs() as u32, want: Self::VERSION });
        }
        let model: Self = table.try_into().map_err(unreadable)?;
        model.check()?;
        Ok(model)
    }

    /// The text of its file, which [`CostModel::parse`] reads.
    pub fn to_text(&self) -> String {
        toml::to_string(self).unwrap_or_else(|error| unreachable!("a cost model is a plain table: {error}"))
    }

    /// Refuses figures that no machine can have.
    pub fn check(&self) -> Result<(), CostError> {
        self.grouped.check("grouped")?;
        self.dense.check("dense")?;
        let (link, rows, host) = (&self.link, &self.rows, &self.host);
        let times = [
            ("link.near", &link.near),
            ("link.far", &link.far),
            ("link.copy", &link.copy),
            ("rows.gather", &rows.gather),
            ("rows.reduce", &rows.reduce),
            ("rows.host_to_device", &rows.host_to_device),
            ("rows.route", &rows.route),
            ("rows.index", &rows.index),
            ("host.read", &host.read),
            ("host.exchange", &host.exchange),
            ("host.plan", &host.plan),
            ("host.enqueue", &host.enqueue),
        ];
        let refuse = |table: &str, problem: &str| {
            Err(CostError::Table { table: table.into(), problem: problem.into() })
        };
        for (table, curve) in times {
            if !curve.is_sorted() || curve.points().windows(2).any(|pair| pair[0].1 > pair[1].1) {
                return refuse(table, "falls, or its points do not ascend");
            }
            if let Some(&(_, ns)) = curve.points().iter().find(|point| point.1 > LONGEST_NS) {
                return refuse(table, &longer(ns));
            }
        }
        let times = [
            ("link.exchange_ns", link.exchange_ns),
            ("host.wake_ns", host.wake_ns),
            ("host.sleep_ns", host.sleep_ns),
            ("host.queue_ns", host.queue_ns),
        ];
        if let Some(&(name, ns)) = times.iter().find(|(_, ns)| *ns > LONGEST_NS) {
            return refuse(name, &longer(ns));
        }
        if self.shares.is_empty() {
            return refuse("shares", "is empty");
        }
        if self.shares.iter().any(|s| s.compute < 1 || s.compute_beside < 1000 || s.transfer_beside < 1000) {
            return refuse("shares", "has work that speeds up beside other work");
        }
        let factors = |s: &ShareCost| [s.reserved, s.compute, s.compute_beside, s.transfer_beside];
        if self.shares.iter().flat_map(factors).any(|permille| permille > MOST_PERMILLE) {
            return refuse("shares", &format!("has a factor of more than {MOST_PERMILLE} permille"));
        }
        Ok(())
    }

    /// The same for both kinds of GEMM.
    pub fn gemm(&self, kind: GemmKind) -> &GemmCost {
        match kind {
            GemmKind::Grouped => &self.grouped,
            GemmKind::Dense => &self.dense,
        }
    }

    /// The time of work that a curve prices; 0 for any other.
    pub(crate) fn sized_ns(&self, work: &Work) -> u64 {
        let (rows, host) = (&self.rows, &self.host);
        let (curve, size) = match *work {
            Work::Gather(bytes) => (&rows.gather, bytes),
            Work::Reduce(bytes) => (&rows.reduce, bytes),
            Work::HostToDevice(bytes) => (&rows.host_to_device, bytes),
            Work::Route(logits) => (&rows.route, logits),
            Work::Index(pairs) => (&rows.index, pairs),
            Work::ReadCounts(slots) => (&host.read, slots),
            Work::CountExchange(bytes) => (&host.exchange, bytes),
            Work::Plan(size) => (&host.plan, size),
            Work::Enqueue(operations) => (&host.enqueue, operations),
            _ => return 0,
        };
        curve.extended(size)
    }

    /// The model that a machine's own measurements made of this one.
    #[must_use]
    pub fn corrected(&self, correction: &Correction) -> Self {
        let Correction { link, grouped, dense, rows } = *correction;
        CostModel {
            grouped: self.grouped.slowed(grouped),
            dense: self.dense.slowed(dense),
            link: LinkCost {
                exchange_ns: scale(self.link.exchange_ns, link),
                near: self.link.near.scaled(link),
                far: self.link.far.scaled(link),
                copy: self.link.copy.scaled(link),
                ..self.link.clone()
            },
            rows: RowsCost {
                gather: self.rows.gather.scaled(rows),
                reduce: self.rows.reduce.scaled(rows),
                index: self.rows.index.scaled(rows),
                ..self.rows.clone()
            },
            ..self.clone()
        }
    }

    /// The same machine with transfers and computation that do not notice each other.
    #[must_use]
    pub fn without_contention(&self) -> Self {
        CostModel { shares: vec![ShareCost::FREE], concurrent: 0, ..self.clone() }
    }

    /// A hash of everything in it, stable over runs and releases: ranks compare it before they trust each other's
    /// plans.
    pub fn digest(&self) -> u64 {
        hash_bytes(self.to_text().as_bytes())
    }
}

/// What a processor does in a second, in operations or bytes.
const RATES: RangeInclusive<u64> = 1_000..=1_000_000_000_000_000_000;

/// The longest time in a file: a quarter of an hour. No figure is larger than that, so that prices, which are several of
/// them or a figure times a size, fit into their numbers.
const LONGEST_NS: u64 = 1_000_000_000_000;

/// The largest factor: a hundred times as slow, or as efficient.
const MOST_PERMILLE: u64 = 100_000;

/// A tenth of a millisecond: longer than any 64 steps of a tile.
const MOST_TILE_PS: u64 = 100_000_000;

/// 64-deep steps of the deepest product, by far.
const MOST_STEPS: u64 = 1 << 20;

/// Columns of the widest panel, by far.
const MOST_COLUMNS: u64 = 1 << 20;

fn longer(ns: u64) -> String {
    format!("has a time of {ns} ns, longer than any ({LONGEST_NS} ns)")
}

fn rate(per_second: u64) -> u128 {
    u128::from(per_second.max(1))
}

fn divided(value: u64, permille: u64) -> u64 {
    (u128::from(value) * 1000 / u128::from(permille.max(1))).max(1) as u64
}
