//! What can go wrong between a folder and a model.

use epsmoe_base::Fault;
use epsmoe_device::DeviceError;
use epsmoe_pipeline::PipelineError;
use epsmoe_plan::PlanError;
use std::io;
use std::path::PathBuf;

/// Why a model could not be read. Every message names what is wrong, where, and what would mend it.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    /// A configuration that is damaged, impossible or not supported.
    #[error("{file}: {problem}")]
    Config {
        /// The configuration's file, or the name it is known by.
        file: String,
        /// What is wrong and how to mend it.
        problem: String,
    },
    /// Weights that are damaged, missing or not those of the configuration.
    #[error("{file}: {problem}")]
    Weights {
        /// The file or folder.
        file: String,
        /// What is wrong and how to mend it.
        problem: String,
    },
    /// The operating system refused.
    #[error("cannot read {}: {source}", file.display())]
    Read {
        /// The file or folder.
        file: PathBuf,
        /// Its reason.
        source: io::Error,
    },
    /// A preset that does not exist.
    #[error("there is no preset `{name}`; there are: {known}")]
    UnknownPreset {
        /// What was asked for.
        name: String,
        /// Every preset's name.
        known: String,
    },
    /// A way to spread the model over ranks that leaves some rank without work, or does not fit their number.
    #[error("{0}")]
    Parallel(String),
    /// The device refused a weight, a buffer or an operation.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// The world stopped, or a layer has no plan.
    #[error(transparent)]
    Pipeline(#[from] PipelineError),
}

impl From<Fault> for ModelError {
    fn from(fault: Fault) -> Self {
        ModelError::Device(DeviceError::Fault(fault))
    }
}

impl From<PlanError> for ModelError {
    fn from(error: PlanError) -> Self {
        ModelError::Pipeline(PipelineError::Plan(error))
    }
}
