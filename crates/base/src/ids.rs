//! Newtypes for the numbers that must not be swapped.

use serde::{Deserialize, Serialize};
use std::fmt;

macro_rules! id {
    ($(#[$doc:meta])* $name:ident, $word:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        pub struct $name(pub usize);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!($word, " {}"), self.0)
            }
        }
    };
}

id!(
    /// One member of the world: a processor with its own memory, lanes and experts.
    Rank,
    "rank"
);
id!(
    /// A transformer layer, counted from the embedding.
    Layer,
    "layer"
);
id!(
    /// A stage of an MoE layer: a consecutive group of a rank's experts.
    Stage,
    "stage"
);
id!(
    /// A routed expert, numbered over the whole layer (not over one rank).
    Expert,
    "expert"
);

/// An ordered queue of work on a device: what one lane does runs in order, two lanes run beside each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Lane {
    /// GEMMs, attention and every other computation.
    Compute,
    /// Exchanges with other ranks.
    Transfer,
}

impl Lane {
    /// Every lane of a device, in index order.
    pub const ALL: [Lane; 2] = [Lane::Compute, Lane::Transfer];

    /// Position in per-lane arrays.
    pub fn index(self) -> usize {
        self as usize
    }
}

impl fmt::Display for Lane {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Lane::Compute => "compute lane",
            Lane::Transfer => "transfer lane",
        })
    }
}
