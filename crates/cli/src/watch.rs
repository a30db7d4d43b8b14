//! Weights that tell how much of them has been read.

use epsmoe_base::Mix;
use epsmoe_model::{Activations, Hints, ModelError, Stored, Target, WeightSource};
use indicatif::ProgressBar;

/// A source whose bytes move a bar.
pub(crate) struct LayerSample<'a> {
    pub(crate) source: &'a dyn WeightSource,
    pub(crate) bar: &'a ProgressBar,
}

impl WeightSource for LayerSample<'_> {
    fn find(&self, name: &str) -> Result<Option<Stored<'_>>, ModelError> {
        self.source.find(name)
    }

    fn fill(&self, name: &str, first: usize, into: &mut [u8]) -> Result<(), ModelError> {
        self.source.fill(name, first, into)?;
        self.bar.inc(into.len() as u64);
        Ok(())
    }

    fn hints(&self) -> Result<Hints, ModelError> {
        self.source.hints()
    }

    fn activations(&self) -> Result<Activations, ModelError> {
        self.source.activations()
    }

    fn decodes(&self) -> bool {
        self.source.decodes()
    }

    fn quantises(&self) -> Option<Target> {
        self.source.quantises()
    }

    fn numbers(&self, name: &str) -> Option<(Mix, f32)> {
        self.source.numbers(name)
    }

    fn place(&self, name: &str) -> String {
        self.source.place(name)
    }
}
