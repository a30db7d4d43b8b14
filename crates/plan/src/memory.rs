//! How much a layer needs before it runs, and whether it fits.

use crate::{Policy, SlotMap, Traffic, WeightCost};
use epsmoe_base::{Bytes, DType, Rank, RowFormat, Stage, WireFormat};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::ops::Range;

/// How much of everything one rank's layer holds: needed by a layer at hand, or what the buffers were sized for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Capacity {
    /// Tokens, T.
    pub tokens: usize,
    /// Rows sent, and sums that come back.
    pub rows_sent: usize,
    /// Rows received, and sums that are sent back.
    pub rows_received: usize,
    /// (token, slot) pairs of the rank's slots.
    pub assignments: usize,
    /// The most of them in one stage.
    pub stage_assignments: usize,
}

impl Capacity {
    /// Enough for `tokens` on every rank, wherever they are routed and whatever the stages are: t · min(k, R)
    /// rows leave a rank, R · t arrive, with R · t · min(k, L) assignments.
    ///
    /// 10 tokens, top-2, five experts on two ranks: 20 rows out, 20 rows in, 40 assignments, in one stage or in many.
    pub fn worst_case(tokens: usize, sizes: &LayerSizes) -> Self {
        let rows_received = tokens.saturating_mul(sizes.ranks);
        let assignments = rows_received.saturating_mul(sizes.slots_of_row());
        let rows_sent = tokens.saturating_mul(sizes.ranks_of_token());
        Capacity { tokens, rows_sent, rows_received, assignments, stage_assignments: assignments }
    }

    /// What tokens need whose rows stay with their rank, the only one.
    pub fn in_place(tokens: usize, top_k: usize) -> Self {
        let assignments = tokens.saturating_mul(top_k);
        Capacity { tokens, rows_sent: 0, rows_received: tokens, assignments, stage_assignments: assignments }
    }

    /// What layers need in which every rank has the rows of all: at most `tokens` on a rank, wherever they are routed.
    pub fn gathered(tokens: usize, sizes: &LayerSizes) -> Self {
        let rows = tokens.saturating_mul(sizes.ranks);
        Capacity { rows_sent: rows, ..Self::worst_case(tokens, sizes) }
    }

    /// The most that so many tokens of a rank can need under a policy.
    pub fn for_policy(tokens: usize, sizes: &LayerSizes, policy: &Policy) -> Self {
        match sizes.ranks {
            1 if policy.stays_in_place() => Self::in_place(tokens, sizes.top_k),
            _ => Self::worst_case(tokens, sizes),
        }
    }

    /// What `rank` needs for the layer at hand.
    pub fn needed(traffic: &Traffic, rank: Rank) -> Self {
        let in_stage = |stage| traffic.stage_assignments(rank, Stage(stage)).len();
        Capacity {
            tokens: traffic.tokens(rank),
            rows_sent: traffic.rows_sent(rank),
            rows_received: traffic.rows_received(rank),
            assignments: traffic.assignments(rank),
            stage_assignments: (0..traffic.stages()).map(in_stage).max().unwrap_or(0),
        }
    }

    /// Whether this is at least `other`, in everything.
    pub fn holds(&self, other: &Capacity) -> bool {
        self.tokens >= other.tokens
            && self.rows_sent >= other.rows_sent
            && self.rows_received >= other.rows_received
            && self.assignments >= other.assignments
            && self.stage_assignments >= other.stage_assignments
    }

    /// What this and `other` need together, one behind the other; they take turns at the assignments of a stage.
    pub fn and(&self, other: &Capacity) -> Capacity {
        Capacity {
            tokens: self.tokens + other.tokens,
            rows_sent: self.rows_sent + other.rows_sent,
            rows_received: self.rows_received + other.rows_received,
            assignments: self.assignments + other.assignments,
            stage_assignments: self.stage_assignments.max(other.stage_assignments),
        }
    }

    /// Whether a layer's batches fit together on *every* rank, each with this capacity. All ranks find the same answer,
    /// so that all of them halve their tokens ([`halves`]) or none does.
    ///
    /// A capacity of the worst case for one token or more ends this: a layer of one token per rank fits.
    pub fn fits(&self, batches: &[&Traffic]) -> bool {
        let needed = |rank| {
            let of_batches = batches.iter().map(|traffic| Capacity::needed(traffic, rank));
            of_batches.fold(Capacity::default(), |sum, needed| sum.and(&needed))
        };
        let ranks = batches.first().map_or(0, |traffic| traffic.ranks());
        (0..ranks).all(|rank| self.holds(&needed(Rank(rank))))
    }
}

/// The two halves of a rank's tokens, the first one larger by at most a token: what every rank does when a layer
/// does not fit. `0..5` becomes `0..3` and `3..5`.
pub fn halves(tokens: Range<usize>) -> (Range<usize>, Range<usize>) {
    let middle = tokens.start + tokens.len().div_ceil(2);
    (tokens.start..middle, middle..tokens.end)
}

/// The sizes of a layer that do not depend on its tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LayerSizes {
    /// Hidden width of the model, H.
    pub hidden: usize,
    /// Inner width of an expert, I.
    pub inner: usize,
    /// Maps into that width: gate and up, or one.
    pub maps: usize,
    /// Whether gate and up products are kept, in float32, for an activation that is an operation of its own.
    pub kept_products: bool,
    /// Inner width of the shared expert; 0 without one.
    pub shared_inner: usize,
    /// Experts a token is sent to, k.
    pub top_k: usize,
    /// Routed experts of the layer, E.
    pub experts: usize,
    /// Further experts that its router chooses from, which give rows back as they are.
    pub identities: usize,
    /// Ranks that hold them, R.
    pub ranks: usize,
    /// The most slots that a rank has, L.
    pub local_slots: usize,
    /// The most slots that an expert is in, m.
    pub replicas: usize,
    /// The format of activations.
    pub dtype: DType,
    /// How experts' weights are held: in `dtype`, or in codes.
    pub weights: WeightCost,
    /// The formats that rows and partial sums travel in.
    pub wire: WireFormat,
}

impl LayerSizes {
    /// What follows from where experts are and from the format of activations, in which rows travel too; widths and
    /// top-k are 0.
    pub fn of(map: &SlotMap, dtype: DType) -> Self {
        LayerSizes {
            hidden: 0,
            inner: 0,
            maps: 2,
            kept_products: false,
            shared_inner: 0,
            top_k: 0,
            experts: map.experts(),
            identities: 0,
            ranks: map.ranks(),
            local_slots: map.max_local(),
            replicas: map.most_replicas(),
            dtype,
            weights: millibits(dtype).into(),
            wire: WireFormat::plain(dtype),
        }
    }

    /// Bytes of a row of activations, `[H]`.
    pub fn row_bytes(&self) -> usize {
        self.hidden * self.dtype.bytes()
    }

    /// The most slots of the layer, over all ranks.
    pub fn slots(&self) -> usize {
        self.ranks * self.local_slots
    }

    /// The most slots of a rank that a token is sent to.
    pub fn slots_of_row(&self) -> usize {
        self.top_k.min(self.local_slots)
    }

    /// The most ranks that a token is sent to.
    pub fn ranks_of_token(&self) -> usize {
        self.top_k.min(self.ranks)
    }
}

/// Thousandths of a bit of a number in this format.
pub fn millibits(dtype: DType) -> u64 {
    8000 * dtype.bytes() as u64
}

/// Bytes of every buffer of one rank's MoE layer; its input and its output belong to the caller.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LayerBytes {
    /// Router logits of all experts, what was chosen, and the same in slots `[T, k]`.
    pub router: u64,
    /// Rows to be sent, `[rows sent, H]`, in the format that they travel in.
    pub dispatch_send: u64,
    /// Rows received, `[rows received, H]`, likewise.
    pub dispatch_receive: u64,
    /// What travels with the rows sent and the rows received, `[rows, 2k]`.
    pub metadata: u64,
    /// Input of one stage's experts, `[stage assignments, H]`.
    pub expanded: u64,
    /// Activations of one stage, `[stage assignments, I]`, and gate and up where they are kept.
    pub activated: u64,
    /// Outputs of all experts, `[assignments, H]`: kept over the stages, until the last assignment of a row is there.
    pub outputs: u64,
    /// Partial sums to be sent back, `[rows received, H]`, in the format that they travel in.
    pub combine_send: u64,
    /// Partial sums that came back, `[rows sent, H]`, likewise.
    pub combine_receive: u64,
    /// The shared expert's activations `[T, shared I]`, gate `[T, 1]` and output `[T, H]`; what experts give back as it is
    /// `[T, H]`, and their weight.
    pub shared: u64,
    /// Histograms, index arrays and weights that the kernels read.
    pub index: u64,
}

impl LayerBytes {
    /// What a layer of these sizes takes for a capacity: that of its pool, or what the layer at hand needs.
    pub fn of(sizes: &LayerSizes, capacity: &Capacity) -> Self {
        let Capacity { tokens, rows_sent, rows_received, assignments, stage_assignments } = *capacity;
        let LayerSizes { hidden, inner, shared_inner, top_k, experts, identities, .. } = *sizes;
        let product = |numbers: [usize; 3]| {
            numbers.iter().fold(1u64, |product, &number| product.saturating_mul(number as u64))
        };
        let matrix = |rows: usize, width: usize| product([rows, width, sizes.dtype.bytes()]);
        let travelling = |rows: usize, format: RowFormat| product([rows, format.bytes(hidden), 1]);
        let words = |rows: usize, width: usize| product([rows, width, 4]);
        let shared_tokens = if shared_inner > 0 { tokens } else { 0 };
        let kept_tokens = if identities > 0 { tokens } else { 0 };
        let arriving = if rows_sent > 0 { rows_received } else { 0 };
        let sum = |parts: &[u64]| parts.iter().fold(0u64, |sum, &part| sum.saturating_add(part));
        LayerBytes {
            router: sum(&[words(tokens, experts + identities), words(tokens, 4 * top_k)]),
            dispatch_send: travelling(rows_sent, sizes.wire.dispatch),
            dispatch_receive: travelling(arriving, sizes.wire.dispatch),
            metadata: sum(&[words(rows_sent, 2 * top_k), words(rows_received, 2 * top_k)]),
            expanded: matrix(stage_assignments, hidden),
            activated: sum(&[
                matrix(stage_assignments, inner),
                words(if sizes.kept_products { stage_assignments } else { 0 }, sizes.maps * inner),
            ]),
            outputs: matrix(assignments, hidden),
            combine_send: travelling(rows_received, sizes.wire.combine),
            combine_receive: travelling(rows_sent, sizes.wire.combine),
            shared: sum(&[
                matrix(shared_tokens, shared_inner),
                words(if sizes.kept_products { shared_tokens } else { 0 }, sizes.maps * shared_inner),
                words(shared_tokens, 1),
                matrix(shared_tokens, hidden),
                words(kept_tokens, 1),
                matrix(kept_tokens, hidden),
            ]),
            index: sum(&[
                // The map, and histograms over its slots.
                words(experts, sizes.replicas),
                words(sizes.slots(), 4),
                words(sizes.ranks + 1, 1),
                // Token and last slot of each row sent; where each token's sums are.
                words(rows_sent, 2),
                words(tokens, sizes.ranks_of_token()),
                // The tokens themselves, where they are looked up.
                words(tokens, 1),
                // What was announced, the orders of rows and of sums; starts of the slots.
                words(sizes.slots(), 5),
                words(rows_received, 2),
                words(sizes.local_slots + 1, 1),
                // Rows of the assignments; assignments and weights of the sums.
                words(assignments, 1),
                words(rows_received, 2 * top_k),
            ]),
        }
    }

    /// Every group of buffers with its name, in the order in which rows walk through them.
    pub fn parts(&self) -> [(&'static str, Bytes); 11] {
        [
            ("router", Bytes(self.router)),
            ("dispatch send", Bytes(self.dispatch_send)),
            ("dispatch receive", Bytes(self.dispatch_receive)),
            ("metadata", Bytes(self.metadata)),
            ("expanded rows of a stage", Bytes(self.expanded)),
            ("activations of a stage", Bytes(self.activated)),
            ("expert outputs", Bytes(self.outputs)),
            ("combine send", Bytes(self.combine_send)),
            ("combine receive", Bytes(self.combine_receive)),
            ("shared expert", Bytes(self.shared)),
            ("index arrays", Bytes(self.index)),
        ]
    }

    /// All of them.
    pub fn total(&self) -> u64 {
        self.parts().iter().fold(0, |sum, (_, bytes)| sum.saturating_add(bytes.0))
    }
}

impl fmt::Display for LayerBytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (name, bytes) in self.parts() {
            writeln!(f, "{name}: {bytes}")?;
        }
        writeln!(f, "total: {}", Bytes(self.total()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::example;

    #[test]
    fn the_worked_example_in_bytes() {
        let layer = example::layer();
        let needed = Capacity::needed(&layer.traffic, Rank(0));
        assert_eq!(
            needed,
            Capacity { tokens: 3, rows_sent: 5, rows_received: 4, assignments: 5, stage_assignments: 3 }
        );
        let sizes = LayerSizes {
            hidden: 100,
            inner: 10,
            maps: 2,
            kept_products: false,
            shared_inner: 20,
            top_k: 2,
            experts: 5,
            identities: 0,
            ranks: 2,
            local_slots: 3,
            replicas: 2,
            weights: 32_000.into(),
            dtype: DType::BF16,
            // The sums travel in another format than the rows.
            wire: WireFormat { combine: RowFormat::Plain(DType::F32), ..WireFormat::plain(DType::BF16) },
        };
        let bytes = LayerBytes::of(&sizes, &needed);
        assert_eq!(
            bytes,
            LayerBytes {
                router: 4 * (3 * 5 + 4 * 3 * 2),
                dispatch_send: 1000,
                dispatch_receive: 800,
                metadata: 9 * 4 * 4,
                expanded: 600,
                activated: 60,
                outputs: 1000,
                combine_send: 1600,
                combine_receive: 2000,
                shared: 3 * (2 * 20 + 4 + 2 * 100),
                index: 4 * (2 * 5 + 4 * 6 + 3 + 3 + 2 * 5 + 3 * 2 + 6 * 5 + 2 * 4 + 4 + 5 + 2 * 2 * 4),
            }
        );
        assert_eq!(bytes.total(), 8568);
        assert!(bytes.to_string().ends_with("shared expert: 732 B\nindex arrays: 476 B\ntotal: 8.4 KiB\n"));
    }

    #[test]
    fn one_rank_too_full_is_too_full_for_all() {
        let layer = example::layer();
        let sizes = LayerSizes { top_k: 2, ..LayerSizes::of(&layer.map, DType::F32) };
        let worst = Capacity::worst_case(3, &sizes);
        assert_eq!(
            worst,
            Capacity { tokens: 3, rows_sent: 6, rows_received: 6, assignments: 12, stage_assignments: 12 }
        );
        assert!(worst.fits(&[&layer.traffic]));
        assert!(!worst.fits(&[&layer.traffic; 2]));
        let double = worst.and(&worst);
        assert_eq!(double, Capacity { stage_assignments: 12, ..Capacity::worst_case(6, &sizes) });
        assert!(double.fits(&[&layer.traffic; 2]));
        assert_eq!(
            Capacity::worst_case(10, &sizes),
            Capacity { tokens: 10, rows_sent: 20, rows_received: 20, assignments: 40, stage_assignments: 40 }
        );
        // Rank 0 has three tokens, rank 1 two.
        assert!(!Capacity { tokens: 2, ..worst }.fits(&[&layer.traffic]));
        for short in [
            Capacity { rows_sent: 4, ..worst },
            Capacity { rows_received: 3, ..worst },
            Capacity { assignments: 4, ..worst },
            Capacity { stage_assignments: 2, ..worst },
        ] {
            assert!(!short.fits(&[&layer.traffic]), "{short:?}");
        }
    }

    #[test]
    fn halving_ends_at_one_token() {
        assert_eq!(halves(0..5), (0..3, 3..5));
        assert_eq!(halves(3..4), (3..4, 4..4));
        assert_eq!(halves(4..4), (4..4, 4..4));
    }
}
