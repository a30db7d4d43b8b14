//! The MLP of a layer: dense, a mixture of experts, or both.

use crate::load::{Loader, NormWeights};
use crate::{Branch, LayerPart, Map, MlpSpec, ModelError, MoeSpec, Part, Window};
use epsmoe_base::{Expert, Layer};
use epsmoe_device::op::Activation;
use epsmoe_device::{Backend, DeviceError, Weight, WeightFormat};
use epsmoe_pipeline::{ExpertActivation, Identities, Mlp, MoeLayer, SharedMlp};
use std::sync::Arc;

/// The MLP weights of one layer on one rank.
pub(crate) enum MlpWeights {
    /// None.
    Absent,
    /// One MLP for every token, and what it does between its maps, if that is not what gated products do.
    Dense(Mlp, Option<Activation>),
    /// This rank's experts, or its share of every expert.
    Moe(Box<MoeLayer>),
}

/// A dense MLP beside a mixture of experts.
pub(crate) struct ResidualWeights {
    pub(crate) norm: NormWeights,
    pub(crate) mlp: Mlp,
    /// If it is not that of gated products.
    pub(crate) activation: Option<Activation>,
}

impl MlpWeights {
    pub(crate) fn load<B: Backend>(loader: &Loader<'_, B>, layer: Layer) -> Result<Self, ModelError> {
        match &loader.spec.layers[layer.0].mlp {
            MlpSpec::Absent => Ok(MlpWeights::Absent),
            MlpSpec::Dense { activation, .. } => {
                let mlp = load_mlp(loader, layer, *activation, LayerPart::Dense)?;
                Ok(MlpWeights::Dense(mlp, *activation))
            }
            MlpSpec::Moe(spec) => Ok(MlpWeights::Moe(Box::new(load_moe(loader, layer, spec)?))),
        }
    }
}

impl MlpWeights {
    /// Whether the rows that it reads are wanted as codes.
    pub(crate) fn takes_codes(&self) -> bool {
        let codes = |mlp: &Mlp| mlp.gate_up.format == WeightFormat::Fp8;
        match self {
            MlpWeights::Absent => false,
            MlpWeights::Dense(mlp, _) => codes(mlp),
            MlpWeights::Moe(moe) => {
                moe.experts.iter().take(1).chain(moe.shared.iter().map(|shared| &shared.mlp)).any(codes)
            }
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
    let biases = |part: Map, window: &Window| -> Vec<(Part, Window)> {
        let of = |expert| (LayerPart::ExpertBias(expert, part).of(layer), window.clone());
        map.experts_on(rank).map(of).collect()
    };
    let own = Window::rows(inner.of(spec.inner));
    let gate_up_bias = || {
        let (gates, ups) = (biases(Map::GateProj, &own), biases(Map::UpProj, &own));
        let pairs: Vec<_> = gates.into_iter().zip(ups).flat_map(|(gate, up)| [gate, up]).collect();
        loader.vectors(&pairs)
    };
    let down_bias = || loader.vectors(&biases(Map::DownProj, &Window::whole()));
    let biased = spec.expert_bias && map.experts_on(rank).next().is_some();
    let activation = |activation| -> Result<ExpertActivation, ModelError> {
        Ok(ExpertActivation {
            activation,
            gate_up_bias: biased.then(gate_up_bias).transpose()?,
            // Of ranks that split the inner width, whose products are added, the first adds it.
            down_bias: (biased && inner.index == 0).then(down_bias).transpose()?,
        })
    };
    let activation = spec.activation.map(activation).transpose()?;
    let experts = map.experts_on(rank).map(|expert| load_expert(loader, layer, spec, expert));
    let experts = experts.collect::<Result<Vec<Mlp>, _>>()?;
    take_alike(&experts)?;
    let shared = |shared: &crate::SharedSpec| -> Result<SharedMlp, ModelError> {
        let gate = shared.gated.then(|| loader.layer(layer, LayerPart::SharedExpertGate)).transpose()?;
        Ok(SharedMlp { mlp: load_mlp(loader, layer, spec.activation, LayerPart::Shared)?, gate })
    };
    let router_bias = spec.router_bias.then(|| loader.layer(layer, LayerPart::RouterBias));
    let bias = spec.correction_bias.then(|| loader.layer(layer, LayerPart::CorrectionBias));
    let scales = spec.expert_scales.then(|| loader.layer(layer, LayerPart::ExpertScales));
    Ok(MoeLayer {
        layer,
        router_weight: match spec.router_scale {
            true => loader.scaled_router(layer)?,
            false => loader.layer(layer, LayerPart::Router)?,
        },
        scales: scales.transpose()?,
        router_bias: router_bias.transpose()?,
        bias: bias.transpose()?,
        activation,
        router: spec.router,
        experts,
        slots: Arc::new(map),
        shared: spec.shared.as_ref().map(shared).transpose()?,
        identities: (spec.identities > 0)
            .then_some(Identities { experts: spec.identities, added: inner.index == 0 }),
        scaled_inputs: spec.scaled_inputs,
    })
}

/// Refuses experts of which some take rows as codes and some as numbers: they read the same rows.
fn take_alike(experts: &[Mlp]) -> Result<(), ModelError> {
    let Some(first) = experts.first() else { return Ok(()) };
    let codes = |weight: &Weight| weight.format == WeightFormat::Fp8;
    let other = experts.iter().find_map(|mlp| {
        let pairs = [(&first.gate_up, &mlp.gate_up), (&first.down, &mlp.down)];
        pairs.into_iter().find(|(first, other)| codes(first) != codes(other))
    });
    let Some((first, other)) = other else { return Ok(()) };
    Err(ModelError::Device(DeviceError::Unsupported(format!(
        "{} is held as {}, but {} as {}: experts of a layer read the same rows; load them with --activation-scheme none",
        first.name, first.format, other.name, other.format
    ))))
}

/// This rank's share of an expert.
pub(crate) fn load_expert<B: Backend>(
    loader: &Loader<'_, B>,
    layer: Layer,
    spec: &MoeSpec,
    expert: Expert,
) -> Result<Mlp, ModelError> {
    load_mlp(loader, layer, spec.activation, |map| LayerPart::Expert(expert, map))
}

/// This rank's share of an MLP.
fn load_mlp<B: Backend>(
    loader: &Loader<'_, B>,
    layer: Layer,
    activation: Option<Activation>,
    part: impl Fn(Map) -> LayerPart,
) -> Result<Mlp, ModelError> {
    let inner = loader.layout.inner();
    match activation {
        None => loader.mlp(layer, inner, part),
        Some(Activation::Swish(_)) => loader.open_mlp(layer, inner, part),
        Some(Activation::SquaredRelu) => loader.ungated_mlp(layer, inner, part),
    }
}

/// This rank's experts of all layers.
pub(crate) fn experts_of<'a, B: Backend>(
    loader: &Loader<'a, B>,
) -> Result<Vec<(Layer, &'a MoeSpec, Expert)>, ModelError> {
    let mut experts = Vec::new();
    for (layer, spec) in loader.spec.layers.iter().enumerate() {
        let Some(moe) = spec.mlp.moe() else { continue };
        let (map, rank) = loader.layout.slot_map(moe.experts)?;
        experts.extend(map.experts_on(rank).map(|expert| (Layer(layer), moe, expert)));
    }
    Ok(experts)
}

impl ResidualWeights {
    pub(crate) fn load<B: Backend>(loader: &Loader<'_, B>, layer: Layer) -> Result<Option<Self>, ModelError> {
        let spec = &loader.spec.layers[layer.0];
        let load = |_| -> Result<Self, ModelError> {
            let norm = loader.layer(layer, LayerPart::ResidualNorm)?.into();
            let activation = spec.mlp.moe().and_then(|moe| moe.activation);
            let mlp = load_mlp(loader, layer, activation, LayerPart::Residual)?;
            Ok(ResidualWeights { norm, mlp, activation })
        };
        spec.residual_mlp.map(load).transpose()
    }
}

/// The norms of what the parts of a layer give, and the factor behind it.
pub(crate) struct Sandwich {
    pub(crate) attention: NormWeights,
    pub(crate) dense: NormWeights,
    pub(crate) experts: NormWeights,
    pub(crate) both: NormWeights,
    pub(crate) scale: f32,
}

impl Sandwich {
    pub(crate) fn load<B: Backend>(loader: &Loader<'_, B>, layer: Layer) -> Result<Option<Self>, ModelError> {
        let norm = |branch| loader.layer(layer, LayerPart::OutNorm(branch)).map(NormWeights::from);
        let load = || -> Result<Self, ModelError> {
            Ok(Sandwich {
                attention: norm(Branch::Attention)?,
                dense: norm(Branch::Dense)?,
                experts: norm(Branch::Experts)?,
                both: norm(Branch::Both)?,
                scale: loader.number(LayerPart::LayerScale.of(layer))?,
            })
        };
        loader.spec.layers[layer.0].sandwich.then(load).transpose()
    }
}
