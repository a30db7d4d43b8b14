//! What a piece of work is to a model, whatever operation does it.

use serde::{Deserialize, Serialize};
use std::fmt;

macro_rules! phases {
    ($($(#[$doc:meta])* $name:ident => $word:literal),* $(,)?) => {
        /// What a piece of work is to a model. A name says which operation ran (`gemm`), a phase what for
        /// ([`GateUp`](Phase::GateUp)); decisions look at phases, people at names.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(rename_all = "snake_case")]
        pub enum Phase {
            $($(#[$doc])* $name,)*
        }

        impl Phase {
            /// Every phase, in the order in which a step comes to them.
            pub const ALL: &[Phase] = &[$(Phase::$name),*];
        }

        impl fmt::Display for Phase {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(match self { $(Phase::$name => $word,)* })
            }
        }
    };
}

phases! {
    /// What the host brings to the device: the batch, a slot map, a routing that was recorded.
    Input => "input",
    /// Embeddings of the step's tokens.
    Embed => "embed",
    /// A norm.
    Norm => "norm",
    /// A linear map of attention: queries, keys, values, output.
    Projection => "projection",
    /// Rotary embeddings: their angles, and applying them.
    Rope => "rope",
    /// Keys and values into the cache.
    KvWrite => "kv write",
    /// Attention over the cache.
    Attention => "attention",
    /// A dense MLP.
    Mlp => "mlp",
    /// What a part of a layer adds to the residual stream.
    Residual => "residual",
    /// Tokens of the ranks that split work, to all of them.
    AllGather => "all-gather",
    /// Partial sums of split work to the rank that keeps the token, and adding them.
    ReduceScatter => "reduce-scatter",
    /// Router logits of an MoE layer.
    RouterLogits => "router logits",
    /// Every token's experts and their weights: a layer's beginning in time breakdowns and windows.
    Route => "route",
    /// Histograms of the tokens' assignments over slots.
    Count => "count",
    /// Rows and their metadata into the send buffers.
    Pack => "pack",
    /// The metadata of all rows, to the ranks of their experts.
    Metadata => "metadata",
    /// Index maps of the rows that arrive.
    Maps => "maps",
    /// Rows of a stage, to the ranks of their experts.
    Dispatch => "dispatch",
    /// A row for each token-expert assignment of a stage.
    Expand => "expand",
    /// Gate and up maps of a stage's experts, and the activation.
    GateUp => "gate/up",
    /// Down maps of a stage's experts.
    Down => "down",
    /// A stage's outputs, weighted and folded into one partial sum for each row.
    Reduce => "reduce",
    /// Partial sums of a stage, back to the ranks of their tokens.
    Combine => "combine",
    /// Partial sums of all ranks, added where their token is, and the shared expert's output: a layer's end.
    Sum => "sum",
    /// The maps of the shared expert.
    Shared => "shared expert",
    /// What the shared expert's output is scaled by, and scaling it.
    SharedGate => "shared gate",
    /// Logits of the next tokens.
    LmHead => "lm head",
    /// The next tokens, out of logits.
    Sample => "sample",
    /// Anything else.
    Other => "other",
}

impl Phase {
    /// Whether its time goes to matrix products.
    pub fn is_product(self) -> bool {
        matches!(
            self,
            Phase::Projection
                | Phase::Mlp
                | Phase::RouterLogits
                | Phase::GateUp
                | Phase::Down
                | Phase::Shared
                | Phase::LmHead
        )
    }

    /// Whether it is one of an MoE layer, from the router to the sums of the tokens.
    pub fn is_of_experts(self) -> bool {
        (Phase::RouterLogits..=Phase::SharedGate).contains(&self)
    }
}
