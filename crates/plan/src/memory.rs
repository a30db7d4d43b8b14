//! How much a layer needs before it runs, and whether it fits.

use crate::{Placement, Traffic, record_words};
use epsmoe_base::{Bytes, Rank, Stage};
use std::fmt;
use std::ops::Range;

/// How much of everything one rank's layer holds: needed by a layer at hand, or what the buffers were sized for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Capacity {
    /// Tokens, T.
    pub tokens: usize,
    /// Rows of the send and the home buffer.
    pub rows_sent: usize,
    /// Rows of the receive and the combine buffer.
    pub rows_received: usize,
    /// (token, expert) pairs on the rank's experts.
    pub copies: usize,
    /// The most of them in one stage.
    pub stage_copies: usize,
}

impl Capacity {
    /// Enough for `tokens` on every rank, wherever they are routed and whatever the stages are: t · min(k, R)
    /// rows leave a rank, R · t arrive, with R · t · min(k, L) copies.
    ///
    /// 10 tokens, top-2, five experts on two ranks: 20 rows out, 20 rows in, 40 copies, in one stage or in many.
    pub fn worst_case(tokens: usize, placement: &Placement, top_k: usize) -> Self {
        let rows_received = placement.ranks() * tokens;
        let copies = rows_received * top_k.min(placement.max_local());
        let rows_sent = tokens * top_k.min(placement.ranks());
        Capacity { tokens, rows_sent, rows_received, copies, stage_copies: copies }
    }

    /// What `rank` needs for the layer at hand.
    pub fn needed(traffic: &Traffic, rank: Rank) -> Self {
        let in_stage = |stage| traffic.stage_copies(rank, Stage(stage)).len();
        Capacity {
            tokens: traffic.tokens(rank),
            rows_sent: traffic.rows_sent(rank),
            rows_received: traffic.rows_received(rank),
            copies: traffic.copies(rank),
            stage_copies: (0..traffic.stages()).map(in_stage).max().unwrap_or(0),
        }
    }

    /// Whether this is at least `other`, in everything.
    pub fn holds(&self, other: &Capacity) -> bool {
        self.tokens >= other.tokens
            && self.rows_sent >= other.rows_sent
            && self.rows_received >= other.rows_received
            && self.copies >= other.copies
            && self.stage_copies >= other.stage_copies
    }

    /// What this and `other` need together, one behind the other; they take turns at the copies of a stage.
    pub fn and(&self, other: &Capacity) -> Capacity {
        Capacity {
            tokens: self.tokens + other.tokens,
            rows_sent: self.rows_sent + other.rows_sent,
            rows_received: self.rows_received + other.rows_received,
            copies: self.copies + other.copies,
            stage_copies: self.stage_copies.max(other.stage_copies),
        }
    }

    /// Whether a layer fits on *every* rank, each with this capacity. All ranks find the same answer, so that
    /// all of them halve their tokens ([`halves`]) or none does.
    ///
    /// A capacity of the worst case for one token or more ends this: a layer of one token per rank fits.
    pub fn fits(&self, traffic: &Traffic) -> bool {
        (0..traffic.ranks()).all(|rank| self.holds(&Capacity::needed(traffic, Rank(rank))))
    }

    /// [`fits`](Self::fits) for two micro-batches together.
    pub fn fits_both(&self, [first, second]: [&Traffic; 2]) -> bool {
        let needed = |rank| Capacity::needed(first, rank).and(&Capacity::needed(second, rank));
        (0..first.ranks()).all(|rank| self.holds(&needed(Rank(rank))))
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
    /// Experts a token is sent to, k.
    pub top_k: usize,
    /// The most experts that a rank holds, L.
    pub local_experts: usize,
    /// Bytes of one element of a row.
    pub activation_bytes: usize,
}

/// Bytes of every buffer of one rank's MoE layer; its input and its output belong to the caller.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LayerBytes {
    /// Rows to be sent, `[rows sent, H]`.
    pub send: u64,
    /// Rows received, `[rows received, H]`.
    pub receive: u64,
    /// Records of the rows sent and of the rows received.
    pub metadata: u64,
    /// Input of one stage's experts, `[stage copies, H]`.
    pub expanded: u64,
    /// Activations of one stage, `[stage copies, I]`: gate and up are not kept.
    pub activated: u64,
    /// Outputs of all experts, `[copies, H]`: kept over the stages, until the last copy of a row is there.
    pub outputs: u64,
    /// Partial sums to be sent home, `[rows received, H]`.
    pub combine: u64,
    /// Partial sums that came home, `[rows sent, H]`.
    pub home: u64,
    /// Index arrays and weights that the kernels read.
    pub maps: u64,
}

impl LayerBytes {
    /// What a layer of these sizes takes for a capacity: that of its pool, or what the layer at hand needs.
    pub fn of(sizes: &LayerSizes, capacity: &Capacity) -> Self {
        let Capacity { tokens, rows_sent, rows_received, copies, stage_copies } = *capacity;
        let matrix = |rows: usize, width: usize| (rows * width * sizes.activation_bytes) as u64;
        let words = |words: usize| 4 * words as u64;
        LayerBytes {
            send: matrix(rows_sent, sizes.hidden),
            receive: matrix(rows_received, sizes.hidden),
            metadata: words((rows_sent + rows_received) * record_words(sizes.top_k)),
            expanded: matrix(stage_copies, sizes.hidden),
            activated: matrix(stage_copies, sizes.inner),
            outputs: matrix(copies, sizes.hidden),
            combine: matrix(rows_received, sizes.hidden),
            home: matrix(rows_sent, sizes.hidden),
            // Send tokens; home offsets and index; expand and expert starts; reduce offsets, index, weights.
            maps: words(rows_sent)
                + words(tokens + 1 + rows_sent)
                + words(copies + sizes.local_experts + 1)
                + words(rows_received + 1 + 2 * copies),
        }
    }

    /// Every buffer with its name, in the order in which rows walk through them.
    pub fn parts(&self) -> [(&'static str, Bytes); 9] {
        [
            ("send rows", Bytes(self.send)),
            ("receive rows", Bytes(self.receive)),
            ("metadata", Bytes(self.metadata)),
            ("expanded rows of a stage", Bytes(self.expanded)),
            ("activations of a stage", Bytes(self.activated)),
            ("expert outputs", Bytes(self.outputs)),
            ("combine rows", Bytes(self.combine)),
            ("home rows", Bytes(self.home)),
            ("index arrays", Bytes(self.maps)),
        ]
    }

    /// All of them.
    pub fn total(&self) -> u64 {
        self.parts().iter().map(|(_, bytes)| bytes.0).sum()
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
    use crate::maps::example;

    #[test]
    fn the_worked_example_in_bytes() {
        let layer = example::layer();
        let needed = Capacity::needed(&layer.traffic, Rank(0));
        assert_eq!(
            needed,
            Capacity { tokens: 3, rows_sent: 5, rows_received: 4, copies: 5, stage_copies: 3 }
        );
        let sizes = LayerSizes { hidden: 100, inner: 10, top_k: 2, local_experts: 3, activation_bytes: 2 };
        let bytes = LayerBytes::of(&sizes, &needed);
        assert_eq!(
            bytes,
            LayerBytes {
                send: 1000,
                receive: 800,
                metadata: 9 * 3 * 4,
                expanded: 600,
                activated: 60,
                outputs: 1000,
                combine: 800,
                home: 1000,
                maps: 4 * (5 + (4 + 5) + (5 + 4) + (5 + 5 + 5)),
            }
        );
        assert_eq!(bytes.total(), 5520);
        assert!(bytes.to_string().ends_with("home rows: 1000 B\nindex arrays: 152 B\ntotal: 5.4 KiB\n"));
    }

    #[test]
    fn one_rank_too_full_is_too_full_for_all() {
        let layer = example::layer();
        let worst = Capacity::worst_case(3, &layer.placement, 2);
        assert_eq!(
            worst,
            Capacity { tokens: 3, rows_sent: 6, rows_received: 6, copies: 12, stage_copies: 12 }
        );
        assert!(worst.fits(&layer.traffic));
        assert!(!worst.fits_both([&layer.traffic; 2]));
        let double = worst.and(&worst);
        assert_eq!(double, Capacity { stage_copies: 12, ..Capacity::worst_case(6, &layer.placement, 2) });
        assert!(double.fits_both([&layer.traffic; 2]));
        assert_eq!(
            Capacity::worst_case(10, &layer.placement, 2),
            Capacity { tokens: 10, rows_sent: 20, rows_received: 20, copies: 40, stage_copies: 40 }
        );
        // Rank 0 has three tokens, rank 1 two.
        assert!(!Capacity { tokens: 2, ..worst }.fits(&layer.traffic));
        for short in [
            Capacity { rows_sent: 4, ..worst },
            Capacity { rows_received: 3, ..worst },
            Capacity { copies: 4, ..worst },
            Capacity { stage_copies: 2, ..worst },
        ] {
            assert!(!short.fits(&layer.traffic), "{short:?}");
        }
    }

    #[test]
    fn halving_ends_at_one_token() {
        assert_eq!(halves(0..5), (0..3, 3..5));
        assert_eq!(halves(3..4), (3..4, 4..4));
        assert_eq!(halves(4..4), (4..4, 4..4));
    }
}
