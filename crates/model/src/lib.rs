//! A checkpoint becomes a forward pass.

pub mod checkpoint;
pub mod config;
mod error;
pub mod names;
pub mod presets;
mod spec;
pub mod synthetic;

pub use checkpoint::{
    Checkpoint, HeldWeights, Kept, Quantising, Stored, Tensor, WeightSource, Window, gguf_file,
};
pub use epsmoe_quant::{Activations, Hints, Method, StoredType, Target};
pub use error::ModelError;
pub use names::{Branch, LayerPart, Located, Map, Part, Source, StateRows, Turn};
pub use presets::{PRESETS, preset, preset_text};
pub use spec::{
    Architecture, AttentionSpec, GqaSpec, Judge, LayerSpec, MlaSpec, MlpSpec, ModelSpec, MoeSpec, Nesting,
    NormSpec, Parameters, QkNorm, RecurrentRule, RecurrentSpec, RopeSpec, SharedSpec, TensorNames,
};
pub use synthetic::Synthetic;

mod attention;
mod collectives;
mod forward;
mod load;
mod mlp;
mod origins;
mod parallel;
mod step;

pub use attention::BLOCK_SIZE;
pub use forward::{Batch, ExpertTokens, Model, ModelOptions, RoutingMode, StateSlots, StepOutput};
pub use parallel::{Experts, Parallel};
