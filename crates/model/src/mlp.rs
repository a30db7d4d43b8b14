//! The MLP of a layer: dense, a mixture of experts, or both.

use crate::load::Loader;
use crate::{LayerPart, MlpSpec, ModelError};
use epsmoe_base::{Expert, Layer, Rank};
use epsmoe_device::{Backend, Weight};
use epsmoe_pipeline::{Mlp, MoeLayer, SharedMlp};
use epsmoe_plan::Placement;

/// The MLP weights of one layer on one rank.
pub(crate) enum MlpWeights {
    /// One MLP for every token.
    Dense(Mlp),
    /// This rank's experts.
    Moe(MoeLayer),
}

/// A dense MLP beside a mixture of experts.
pub(crate) struct ResidualWeights {
    pub(crate) norm: Weight,
    pub(crate) mlp: Mlp,
}

impl MlpWeights {
    pub(crate) fn load<B: Backend>(
        loader: &Loader<'_, B>,
        layer: Layer,
        placement: Option<&Placement>,
        rank: Rank,
    ) -> Result<Self, ModelError> {
        let spec = match (&loader.spec.layers[layer.0].mlp, placement) {
            (MlpSpec::Moe(spec), Some(placement)) => (spec, placement),
            _ => return Ok(MlpWeights::Dense(loader.mlp(layer, LayerPart::Dense)?)),
        };
        let (spec, placement) = spec;
        let expert = |expert| loader.mlp(layer, |map| LayerPart::Expert(Expert(expert), map));
        let shared = |shared: &crate::SharedSpec| -> Result<SharedMlp, ModelError> {
            let gate = shared.gated.then(|| loader.layer(layer, LayerPart::SharedExpertGate)).transpose()?;
            Ok(SharedMlp { mlp: loader.mlp(layer, LayerPart::Shared)?, gate })
        };
        let bias = spec.correction_bias.then(|| loader.layer(layer, LayerPart::RouterBias));
        Ok(MlpWeights::Moe(MoeLayer {
            layer,
            router: loader.layer(layer, LayerPart::Router)?,
            bias: bias.transpose()?,
            gate: spec.gate,
            experts: placement.experts_of(rank).map(expert).collect::<Result<_, _>>()?,
            shared: spec.shared.as_ref().map(shared).transpose()?,
        }))
    }
}

impl ResidualWeights {
    pub(crate) fn load<B: Backend>(
        loader: &Loader<'_, B>,
        layer: Layer,
    ) -> Result<Option<Self>, ModelError> {
        let load = |_| -> Result<Self, ModelError> {
            let norm = loader.layer(layer, LayerPart::ResidualNorm)?;
            Ok(ResidualWeights { norm, mlp: loader.mlp(layer, LayerPart::Residual)? })
        };
        loader.spec.layers[layer.0].residual_mlp.map(load).transpose()
    }
}
