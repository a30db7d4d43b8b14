//! Index arrays of an MoE layer: which row goes where, found by the processor from what the router chose, so that no
//! host has to wait for the choice to look at it.
//!
//! A *slot* is a place for an expert on a rank; slots are numbered rank by rank, and a slot map says which expert is
//! in which. An *assignment* is one (token, slot) pair. In a world of one rank [`AssignSlots`] and [`SortBySlot`] are
//! all that happens; over ranks, in the order of the data:
//!
//! ```text
//! source rank   AssignSlots    experts [T, k]           → slots, ascending in a token
//!               CountSlots     slots                    → token histograms, which the host exchanges
//!               SendOrder      slots, histograms        → which token is in which send row, the metadata that travels
//!                                                         with it, and where each token's sums come back
//! slot's rank   ReceiveOrder   metadata, announced bins → which metadata is whose row, and where each row's sum goes
//!               SortBySlot     metadata, both orders    → the row of each assignment, slot by slot, and the assignments
//!                                                         of each sum
//! ```
//!
//! Where every rank is given the rows of all, how many rows go where is known from the start, and nobody counts:
//!
//! ```text
//! source rank   AssignSlots    experts [T, k]           → slots, ascending in a token
//!               SpreadSlots    slots                    → for every rank the metadata of all tokens, and where each token's
//!                                                         sums come back
//! slot's rank   SortBySlot     metadata                 → the row of each assignment, slot by slot, and the assignments
//!                                                         of each sum
//! ```
//!
//! All sorts are stable counting sorts. Metadata comes from other ranks: [`ReceiveOrder`] refuses whatever contradicts
//! what was announced, and no operation follows an index that it has not checked.

use super::{Accesses, expect, same_rows};
use crate::{Buffer, DeviceError};
use epsmoe_base::DType;

/// Fills rows of indices up that have fewer than there is room for.
pub const NONE: u32 = u32::MAX;

/// Each token's experts as slots, in ascending order, with their weights: the order in which sums are folded.
///
/// An expert may be in several slots. A token whose experts' numbers add up to s takes those in column s modulo m: its
/// choice alone decides, not its row or rank. Some models have experts without a slot, which give a token's row back as it
/// is: its slots are then filled up by [`NONE`].
///
/// ```text
/// slot_of       [[2, 2], [0, 3], [1, 1]]    expert 0 is in slot 2, expert 1 in slots 0 and 3, expert 2 in slot 1
/// experts       [[2, 0], [0, 1]]            weights       [[0.7, 0.3], [0.6, 0.4]]
/// slots         [[1, 2], [2, 3]]            slot_weights  [[0.7, 0.3], [0.6, 0.4]]
/// ```
#[derive(Clone, Debug)]
pub struct AssignSlots {
    /// Experts of each token `[T, k]`, uint32, no expert twice.
    pub experts: Buffer,
    /// Their weights `[T, k]`, float32.
    pub weights: Buffer,
    /// Slots of each expert `[E, m]`, uint32, different from those of others.
    pub slot_of: Buffer,
    /// Slots of each token, ascending, filled up by [`NONE`] `[T, k]`, uint32.
    pub slots: Buffer,
    /// Their weights, filled up by zeros `[T, k]`, float32.
    pub slot_weights: Buffer,
    /// The experts that have none, numbered after the others, if there are any.
    pub slotless: Option<Slotless>,
}

/// Experts that give rows back as they are.
#[derive(Clone, Debug)]
pub struct Slotless {
    /// How many.
    pub experts: usize,
    /// The sum of their weights, of each token `[T, 1]`, float32.
    pub weights: Buffer,
}

impl AssignSlots {
    pub(super) fn check(&self) -> Result<(), DeviceError> {
        let AssignSlots { experts, weights, slot_of, slots, slot_weights, slotless } = self;
        same_rows("assign_slots", &[experts, weights, slots, slot_weights])?;
        if let Some(Slotless { weights, .. }) = slotless {
            same_rows("assign_slots", &[experts, weights])?;
            expect("assign_slots", "weights of experts without slots", weights, DType::F32, 1)?;
        }
        expect("assign_slots", "experts", experts, DType::U32, experts.width)?;
        expect("assign_slots", "weights", weights, DType::F32, experts.width)?;
        expect("assign_slots", "slot_of", slot_of, DType::U32, slot_of.width.max(1))?;
        expect("assign_slots", "slots", slots, DType::U32, experts.width)?;
        expect("assign_slots", "slot_weights", slot_weights, DType::F32, experts.width)
    }

    pub(super) fn accesses(&self) -> Accesses {
        let reads = Accesses::new().read(&self.experts).read(&self.weights).read(&self.slot_of);
        let writes = reads.write(&self.slots).write(&self.slot_weights);
        self.slotless.iter().fold(writes, |writes, slotless| writes.write(&slotless.weights))
    }
}

/// Token histograms: how many assignments every slot has, and how many rows, which are a token's assignments on one
/// rank, by their first and by their last slot.
///
/// Slots 0, 1, 2 on one rank and 3, 4 on another; tokens to {0, 2}, {1, 3} and {0, 4}:
///
/// ```text
/// block_starts  [0, 0, 0, 3, 3]
/// counts        [[2, 1, 1, 1, 1],    assignments
///                [2, 1, 0, 1, 1],    rows by first slot: {0, 2} is one row
///                [1, 1, 1, 1, 1]]    rows by last slot
/// ```
#[derive(Clone, Debug)]
pub struct CountSlots {
    /// Slots of each token, ascending, filled up by [`NONE`] `[T, k]`, uint32.
    pub slots: Buffer,
    /// The first slot on the rank of each slot `[S, 1]`, uint32.
    pub block_starts: Buffer,
    /// Assignments, rows by first slot, rows by last slot `[3, S]`, uint32.
    pub counts: Buffer,
}

impl CountSlots {
    pub(super) fn check(&self) -> Result<(), DeviceError> {
        let CountSlots { slots, block_starts, counts } = self;
        expect("count_slots", "slots", slots, DType::U32, slots.width)?;
        expect("count_slots", "block_starts", block_starts, DType::U32, 1)?;
        expect("count_slots", "counts", counts, DType::U32, block_starts.rows)?;
        match counts.rows {
            3 => Ok(()),
            _ => Err(DeviceError::Shape(format!(
                "count_slots: {counts:?} has not the rows of three histograms"
            ))),
        }
    }

    pub(super) fn accesses(&self) -> Accesses {
        Accesses::new().read(&self.slots).read(&self.block_starts).write(&self.counts)
    }
}

/// The source rank's orders: rows leave by first slot, then token; their sums come back by last slot, then as the rows
/// left. With the slots of [`CountSlots`]' example, tokens a {0, 2}, b {1, 3}, c {0, 4}:
///
/// ```text
/// send order      a c b | b c
/// tokens          [0, 2, 1, 1, 2]
/// last            [2, 0, 1, 3, 4]
/// metadata        a: 0 2 a0 a2    c: 0 – c0 0    b: 1 – b1 0  |  b: 0 – b3 0    c: 1 – c4 0     (slots counted on the
///                                                                                                row's rank)
/// sums come back  c b a | b c
/// sums            [[2, –], [1, 3], [0, 4]]       a is at 2, b at 1 and 3, c at 0 and 4
/// ```
#[derive(Clone, Debug)]
pub struct SendOrder {
    /// Slots of each token, ascending, filled up by [`NONE`] `[T, k]`, uint32.
    pub slots: Buffer,
    /// Their weights `[T, k]`, float32.
    pub weights: Buffer,
    /// The first slot on the rank of each slot `[S, 1]`, uint32.
    pub block_starts: Buffer,
    /// The histograms of these slots, as [`CountSlots`] makes them `[3, S]`, uint32.
    pub counts: Buffer,
    /// Token of each row sent `[N, 1]`, uint32.
    pub tokens: Buffer,
    /// The last slot of each row sent `[N, 1]`, uint32.
    pub last: Buffer,
    /// What travels with each row `[N, 2k]`, uint32: k slots counted on its rank, filled up by [`NONE`], then the bits
    /// of k weights, filled up by zeros.
    pub metadata: Buffer,
    /// Where each token's sums come back, in rank order, filled up by [`NONE`] `[T, m]`, uint32, for at most m ranks a
    /// token.
    pub sums: Buffer,
}

impl SendOrder {
    pub(super) fn check(&self) -> Result<(), DeviceError> {
        let SendOrder { slots, weights, block_starts, counts, tokens, last, metadata, sums } = self;
        same_rows("send_order", &[slots, weights, sums])?;
        same_rows("send_order", &[tokens, last, metadata])?;
        expect("send_order", "slots", slots, DType::U32, slots.width)?;
        expect("send_order", "weights", weights, DType::F32, slots.width)?;
        CountSlots { slots: slots.clone(), block_starts: block_starts.clone(), counts: counts.clone() }
            .check()?;
        expect("send_order", "tokens", tokens, DType::U32, 1)?;
        expect("send_order", "last", last, DType::U32, 1)?;
        expect("send_order", "metadata", metadata, DType::U32, 2 * slots.width)?;
        expect("send_order", "sums", sums, DType::U32, sums.width)
    }

    pub(super) fn accesses(&self) -> Accesses {
        let SendOrder { slots, weights, block_starts, counts, tokens, last, metadata, sums } = self;
        let reads = [slots, weights, block_starts, counts].into_iter().fold(Accesses::new(), Accesses::read);
        [tokens, last, metadata, sums].into_iter().fold(reads, Accesses::write)
    }
}

/// The source rank's tokens as every rank is told of them: a row for each rank and token, of the token's slots there, if it has
/// any. Sums come back as the rows left. With the slots of [`CountSlots`]' example, tokens a {0, 2}, b {1, 3}, c {0, 4}:
///
/// ```text
/// rank_starts   [0, 3, 5]
/// metadata      a: 0 2 a0 a2    b: 1 – b1 0    c: 0 – c0 0  |  a: – – 0 0    b: 0 – b3 0    c: 1 – c4 0     (slots counted
///                                                                                                       on the row's rank)
/// sums          [[0, –], [1, 4], [2, 5]]       a has one on the first rank, b and c have one on either
/// ```
#[derive(Clone, Debug)]
pub struct SpreadSlots {
    /// Slots of each token, ascending, filled up by [`NONE`] `[T, k]`, uint32.
    pub slots: Buffer,
    /// Their weights `[T, k]`, float32.
    pub weights: Buffer,
    /// The first slot of each rank, and the end `[R + 1, 1]`, uint32.
    pub rank_starts: Buffer,
    /// What travels with each row `[R · T, 2k]`, uint32, as [`SendOrder`] has it; of a token without a slot on the rank only
    /// [`NONE`] and zeros.
    pub metadata: Buffer,
    /// The rows of each token that have slots, in rank order, filled up by [`NONE`] `[T, m]`, uint32, for at most m ranks a
    /// token.
    pub sums: Buffer,
}

impl SpreadSlots {
    pub(super) fn check(&self) -> Result<(), DeviceError> {
        let SpreadSlots { slots, weights, rank_starts, metadata, sums } = self;
        same_rows("spread_slots", &[slots, weights, sums])?;
        expect("spread_slots", "slots", slots, DType::U32, slots.width)?;
        expect("spread_slots", "weights", weights, DType::F32, slots.width)?;
        expect("spread_slots", "rank_starts", rank_starts, DType::U32, 1)?;
        expect("spread_slots", "metadata", metadata, DType::U32, 2 * slots.width)?;
        expect("spread_slots", "sums", sums, DType::U32, sums.width)?;
        if rank_starts.rows == 0 || metadata.rows != (rank_starts.rows - 1) * slots.rows {
            return Err(DeviceError::Shape(format!(
                "spread_slots: {metadata:?} has not a row for every token of {slots:?} on the ranks that {rank_starts:?} delimits"
            )));
        }
        Ok(())
    }

    pub(super) fn accesses(&self) -> Accesses {
        let SpreadSlots { slots, weights, rank_starts, metadata, sums } = self;
        Accesses::new().read(slots).read(weights).read(rank_starts).write(metadata).write(sums)
    }
}

/// The slots' rank's view: where the rows of every source are, and where their sums go.
///
/// Metadata lies source by source, each in its own send order. A *bin* is (source, first slot): its rows are
/// consecutive in there, and so they are where rows are received. The sums of (source, last slot) are consecutive too.
/// What each bin has to be was announced before; metadata that says otherwise stops the world.
#[derive(Clone, Debug)]
pub struct ReceiveOrder {
    /// Slots of every row, counted on this rank `[N, k]`, uint32, ascending, filled up by [`NONE`].
    pub slots: Buffer,
    /// What was announced `[sources · L, 5]`, uint32, source by source, in ascending order of the first column:
    ///
    /// | column | of (source, slot) |
    /// |---|---|
    /// | 0 | the metadata row at which rows with this first slot start |
    /// | 1 | the receive row of the first of them |
    /// | 2 | the row of the first sum of those with this last slot |
    /// | 3 | how many rows have this last slot |
    /// | 4 | how many rows have this slot |
    pub bins: Buffer,
    /// Slots of this rank, L.
    pub local: usize,
    /// The metadata row of each receive row `[N, 1]`, uint32.
    pub order: Buffer,
    /// The row of the sum of each metadata row `[N, 1]`, uint32.
    pub sums: Buffer,
}

impl ReceiveOrder {
    /// Columns of a bin.
    pub const BIN: usize = 5;

    pub(super) fn check(&self) -> Result<(), DeviceError> {
        let ReceiveOrder { slots, bins, local, order, sums } = self;
        same_rows("receive_order", &[slots, order, sums])?;
        expect("receive_order", "slots", slots, DType::U32, slots.width)?;
        expect("receive_order", "bins", bins, DType::U32, Self::BIN)?;
        expect("receive_order", "order", order, DType::U32, 1)?;
        expect("receive_order", "sums", sums, DType::U32, 1)?;
        if *local == 0 || !bins.rows.is_multiple_of(*local) {
            return Err(DeviceError::Shape(format!(
                "receive_order: {bins:?} does not hold {local} slots of every source"
            )));
        }
        Ok(())
    }

    pub(super) fn accesses(&self) -> Accesses {
        Accesses::new().read(&self.slots).read(&self.bins).write(&self.order).write(&self.sums)
    }
}

/// The assignments of all rows, slot by slot and in the order of the rows; and those of each sum.
///
/// Two rows to slots {0, 2} and {0, 1} of three, in place:
///
/// ```text
/// slots    [[0, 2], [0, 1]]
/// starts   [0, 2, 3, 4]        assignments 0..2 are slot 0's, 2..3 slot 1's, 3..4 slot 2's
/// rows     [0, 1, 1, 0]        the row of each assignment
/// terms    [[0, 3], [1, 2]]    the assignments of row 0's sum, then of row 1's, in ascending slot order
/// ```
#[derive(Clone, Debug)]
pub struct SortBySlot {
    /// Slots of every row, ascending, filled up by [`NONE`] `[N, k]`, uint32.
    pub slots: Buffer,
    /// Where rows and sums are in another order than `slots`.
    pub travelled: Option<Travelled>,
    /// Where the assignments of each slot start, and the end `[L + 1, 1]`, uint32.
    pub starts: Buffer,
    /// Row of each assignment `[A, 1]`, uint32: all there are. In place there may be fewer; the rest is [`NONE`].
    pub rows: Buffer,
    /// Assignments of each sum in ascending slot order, filled up by [`NONE`] `[N, k]`, uint32.
    pub terms: Buffer,
}

/// The orders that [`ReceiveOrder`] found, and the weights that follow them.
#[derive(Clone, Debug)]
pub struct Travelled {
    /// The row of `slots` that each row has `[N, 1]`, uint32.
    pub order: Buffer,
    /// The sum of each row of `slots` `[N, 1]`, uint32.
    pub sums: Buffer,
    /// Weights of `slots` `[N, k]`, float32.
    pub weights: Buffer,
    /// Weights of each sum's assignments `[N, k]`, float32.
    pub factors: Buffer,
}

impl SortBySlot {
    pub(super) fn check(&self) -> Result<(), DeviceError> {
        let SortBySlot { slots, travelled, starts, rows, terms } = self;
        same_rows("sort_by_slot", &[slots, terms])?;
        expect("sort_by_slot", "slots", slots, DType::U32, slots.width)?;
        expect("sort_by_slot", "starts", starts, DType::U32, 1)?;
        expect("sort_by_slot", "rows", rows, DType::U32, 1)?;
        expect("sort_by_slot", "terms", terms, DType::U32, slots.width)?;
        if let Some(Travelled { order, sums, weights, factors }) = travelled {
            same_rows("sort_by_slot", &[slots, order, sums, weights, factors])?;
            expect("sort_by_slot", "order", order, DType::U32, 1)?;
            expect("sort_by_slot", "sums", sums, DType::U32, 1)?;
            expect("sort_by_slot", "weights", weights, DType::F32, slots.width)?;
            expect("sort_by_slot", "factors", factors, DType::F32, slots.width)?;
        }
        if starts.rows < 2 || rows.rows > slots.rows * slots.width {
            return Err(DeviceError::Shape(format!(
                "sort_by_slot: {slots:?} does not make the assignments {rows:?} of the slots that {starts:?} delimits"
            )));
        }
        Ok(())
    }

    pub(super) fn accesses(&self) -> Accesses {
        let mut accesses = Accesses::new().read(&self.slots);
        if let Some(Travelled { order, sums, weights, factors }) = &self.travelled {
            accesses = accesses.read(order).read(sums).read(weights).write(factors);
        }
        accesses.write(&self.starts).write(&self.rows).write(&self.terms)
    }
}
