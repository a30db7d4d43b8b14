//! The MLP of a layer: dense, a mixture of experts, or both.

use crate::load::Loader;
use crate::{LayerPart, MlpSpec, ModelError, MoeSpec};
use epsmoe_base::Layer;
use epsmoe_device::{Backend, Weight};
use epsmoe_pipeline::{Mlp, MoeLayer, SharedMlp};
use std::sync::Arc;

/// The MLP weights of one layer on one rank.
pub(crate) enum MlpWeights {
    /// One MLP for every token.
    Dense(Mlp),
    /// This rank's experts, or its share of every expert.
    Moe(Box<MoeLayer>),
}

/// A dense MLP beside a mixture of experts.
pub(crate) struct ResidualWeights {
    pub(crate) norm: Weight,
    pub(crate) mlp: Mlp,
}

impl MlpWeights {
    pub(crate) fn load<B: Backend>(loader: &Loader<'_, B>, layer: Layer) -> Result<Self, ModelError> {
        match &loader.spec.layers[layer.0].mlp {
            MlpSpec::Dense { .. } => {
                Ok(MlpWeights::Dense(loader.mlp(layer, loader.layout.inner(), LayerPart::Dense)?))
            }
            MlpSpec::Moe(spec) => Ok(MlpWeights::Moe(Box::new(load_moe(loader, layer, spec)?))),
        }
    }
}

fn load_moe<B: Backend>(
    loader: &Loader<'_, B>,
    layer: Layer,
    spec: &MoeSpec,
) -> Result<MoeLayer, ModelError> {
    let inner = loader.layout.inner();
    let (map, rank) = loader.layout.slot_map(spec.experts)?;
    let expert = |expert| loader.mlp(layer, inner, |map| LayerPart::Expert(expert, map));
    let shared = |shared: &crate::SharedSpec| -> Result<SharedMlp, ModelError> {
        let gate = shared.gated.then(|| loader.layer(layer, LayerPart::SharedExpertGate)).transpose()?;
        Ok(SharedMlp { mlp: loader.mlp(layer, inner, LayerPart::Shared)?, gate })
    };
    let bias = spec.correction_bias.then(|| loader.layer(layer, LayerPart::RouterBias));
    Ok(MoeLayer {
        layer,
        router_weight: loader.layer(layer, LayerPart::Router)?,
        bias: bias.transpose()?,
        router: spec.router,
        experts: map.experts_on(rank).map(expert).collect::<Result<_, _>>()?,
        slots: Arc::new(map),
        shared: spec.shared.as_ref().map(shared).transpose()?,
    })
}

impl ResidualWeights {
    pub(crate) fn load<B: Backend>(loader: &Loader<'_, B>, layer: Layer) -> Result<Option<Self>, ModelError> {
        let load = |_| -> Result<Self, ModelError> {
            let norm = loader.layer(layer, LayerPart::ResidualNorm)?;
            Ok(ResidualWeights { norm, mlp: loader.mlp(layer, loader.layout.inner(), LayerPart::Residual)? })
        };
        loader.spec.layers[layer.0].residual_mlp.map(load).transpose()
    }
}
