//! Plain weights that are quantised while they are loaded.

use super::{Stored, WeightSource};
use crate::ModelError;
use epsmoe_base::Mix;
use epsmoe_quant::{Activations, Hints, Target};

/// A source whose plain maps become codes when they are loaded.
pub struct Quantising {
    source: Box<dyn WeightSource>,
    target: Target,
}

impl Quantising {
    /// The weights of `source`, coded as `target`.
    pub fn new(source: Box<dyn WeightSource>, target: Target) -> Self {
        Quantising { source, target }
    }
}

impl WeightSource for Quantising {
    fn find(&self, name: &str) -> Result<Option<Stored<'_>>, ModelError> {
        self.source.find(name)
    }

    fn fill(&self, name: &str, first: usize, into: &mut [u8]) -> Result<(), ModelError> {
        self.source.fill(name, first, into)
    }

    fn hints(&self) -> Result<Hints, ModelError> {
        self.source.hints()
    }

    /// Those of a checkpoint that was quantised so beforehand.
    fn activations(&self) -> Result<Activations, ModelError> {
        Ok(match self.target {
            Target::Fp8PerBlock => Activations::Dynamic { powers: false },
            Target::Mxfp4 | Target::Int4 | Target::Q8_0 => Activations::Plain,
        })
    }

    fn decodes(&self) -> bool {
        self.source.decodes()
    }

    fn quantises(&self) -> Option<Target> {
        Some(self.target)
    }

    fn numbers(&self, name: &str) -> Option<(Mix, f32)> {
        self.source.numbers(name)
    }

    fn place(&self, name: &str) -> String {
        self.source.place(name)
    }
}
