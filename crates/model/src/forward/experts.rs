//! The mixture-of-experts layers of one rank.

use super::{ExpertTokens, Model, ModelOptions, RoutingMode, StepOutput};
use crate::parallel::Layout;
use crate::step::{LayerTokens, Step};
use crate::{Experts, ModelError, ModelSpec};
use epsmoe_base::{DType, Phase, Place, WireDType, WireFormat};
use epsmoe_device::op::Gather;
use epsmoe_device::{Backend, Buffer, Reserve};
use epsmoe_fabric::Fabric;
use epsmoe_pipeline::{
    ExpertPipeline, Input, MoeLayer, Pending, PipelineError, PipelineOptions, PipelineSizes,
};
use epsmoe_plan::{Capacity, LayerSizes, Policy, Routing, Schedule, WeightCost};
use std::sync::Arc;

/// What runs the MoE layers of one rank, if the model has any: whole experts over all ranks, or a part of every
/// expert on this rank for itself.
pub(super) fn pipeline<B: Backend>(
    spec: &ModelSpec,
    layout: &Layout,
    options: &ModelOptions,
    identity: u64,
    device: &Arc<B>,
    fabric: &Fabric<B>,
    coded: Option<WeightCost>,
) -> Result<Option<ExpertPipeline<B>>, ModelError> {
    let Some(told) = pipeline_options(spec, layout, options, device.dtype())? else { return Ok(None) };
    let mut told = PipelineOptions { identity, ..told };
    if let Some(coded) = coded {
        told.sizes.layer.weights = coded;
    }
    let fabric = match layout.experts() {
        Experts::Ep => fabric.clone(),
        Experts::Tp => Fabric::single_rank(),
    };
    Ok(Some(ExpertPipeline::new(Arc::clone(device), fabric, told)?))
}

/// Reserves what [`pipeline`] does.
pub(super) fn reserve(
    device: &impl Reserve,
    spec: &ModelSpec,
    layout: &Layout,
    options: &ModelOptions,
) -> Result<(), ModelError> {
    if let Some(options) = pipeline_options(spec, layout, options, device.dtype())? {
        options.reserve(device)?;
    }
    Ok(())
}

/// What the pipeline of one rank is told; nothing in a model without experts.
fn pipeline_options(
    spec: &ModelSpec,
    layout: &Layout,
    options: &ModelOptions,
    dtype: DType,
) -> Result<Option<PipelineOptions>, ModelError> {
    let Some(layer) = layer_sizes(spec, layout, options.wire, dtype)? else { return Ok(None) };
    let policy = match layer.ranks {
        // Where nothing travels stages have nothing to hide.
        1 => Policy { gemm: options.policy.gemm, schedule: Schedule::Serial, ..Policy::default() },
        _ => options.policy.clone(),
    };
    let tokens = layout.most_in_mlp(options.max_tokens);
    let capacity = options.capacity.unwrap_or_else(|| Capacity::for_policy(tokens, &layer, &policy));
    let sizes = PipelineSizes { layer, capacity };
    let &ModelOptions { gather_tokens, timeout, .. } = options;
    Ok(Some(PipelineOptions { policy, sizes, gather_tokens, identity: 0, timeout }))
}

/// The sizes of the model's MoE layers on one rank; nothing without any.
fn layer_sizes(
    spec: &ModelSpec,
    layout: &Layout,
    wire: WireDType,
    dtype: DType,
) -> Result<Option<LayerSizes>, ModelError> {
    let Some(moe) = spec.layers.iter().find_map(|layer| layer.mlp.moe()) else { return Ok(None) };
    let (map, _) = layout.slot_map(moe.experts)?;
    let inner = layout.inner();
    Ok(Some(LayerSizes {
        hidden: spec.hidden,
        inner: inner.of(moe.inner).len(),
        maps: moe.activation.map_or(2, |activation| activation.factors()),
        kept_products: moe.activation.is_some(),
        shared_inner: moe.shared.map_or(0, |shared| inner.of(shared.inner).len()),
        top_k: moe.router.top_k,
        identities: moe.identities,
        wire: WireFormat::of(wire, dtype),
        ..LayerSizes::of(&map, dtype)
    }))
}

/// Experts whose outputs are added behind the next layer.
pub(super) struct LateExperts<B: Backend> {
    /// What they give, for this rank's shard `[N, H]`, once `pending` is finished.
    out: Buffer,
    /// Nothing, if it is already.
    pending: Option<Pending<B>>,
}

impl<B: Backend> Model<B> {
    /// An MoE layer whose routing is made, counted, recorded or replayed.
    pub(super) fn mixture(
        &self,
        moe: &MoeLayer,
        (step, tokens): (&Step, &LayerTokens),
        (input, y): (Input<'_>, &Buffer),
        output: &mut StepOutput,
    ) -> Result<(), ModelError> {
        let (pipeline, routing) = (self.pipeline(), self.routing(moe, step, input.x, output)?);
        let known = tokens.known.as_deref();
        output.layers.push(match routing {
            Some(routing) => pipeline.run_routed(moe, (known, &routing), input, y)?,
            None => pipeline.run(moe, known, input, y)?,
        });
        Ok(())
    }

    /// The same where the shared expert's output goes to `shared`, and what the others give is not waited for.
    pub(super) fn begin_late(
        &self,
        place: Place,
        moe: &MoeLayer,
        (step, tokens): (&Step, &LayerTokens),
        (Input { x, codes }, shared): (Input<'_>, &Buffer),
        output: &mut StepOutput,
    ) -> Result<LateExperts<B>, ModelError> {
        let (pipeline, out) = (self.pipeline(), self.buffers.late.rows(0..x.rows)?);
        let alone = self.mlp.ranks().len() == 1;
        let pending = self.mlp.gather_compute_scatter_both(
            place,
            [&tokens.mlp; 2],
            (x, &self.buffers.late_parts),
            [shared, &out],
            |x, outs| -> Result<_, ModelError> {
                let routing = self.routing(moe, step, x, output)?;
                let known = (tokens.known.as_deref(), routing.as_ref());
                let pending = pipeline.begin(moe, known, Input { x, codes }, outs)?;
                if alone {
                    return Ok(Some(pending));
                }
                output.layers.push(pipeline.finish(place.phase(Phase::Sum), pending)?);
                Ok(None)
            },
        )?;
        Ok(LateExperts { out, pending })
    }

    /// What experts of the layer before gave to the tokens that are left.
    pub(super) fn finish_late(
        &self,
        place: Place,
        tokens: &LayerTokens,
        late: LateExperts<B>,
        output: &mut StepOutput,
    ) -> Result<Buffer, ModelError> {
        let LateExperts { mut out, pending } = late;
        if let Some(pending) = pending {
            output.layers.push(self.pipeline().finish(place.phase(Phase::Residual), pending)?);
        }
        if let Some(index) = &tokens.index {
            let wanted = self.buffers.wanted_late.rows(0..index.rows)?;
            self.compute(place, Gather { x: out, index: index.clone(), out: wanted.clone() })?;
            out = wanted;
        }
        Ok(out)
    }

    fn pipeline(&self) -> &ExpertPipeline<B> {
        let Some(pipeline) = &self.experts else {
            unreachable!("a model with experts has a pipeline. This is a bug.")
        };
        pipeline
    }

    /// The routing of a layer that is counted, recorded or replayed.
    fn routing(
        &self,
        moe: &MoeLayer,
        step: &Step,
        x: &Buffer,
        output: &mut StepOutput,
    ) -> Result<Option<Routing>, ModelError> {
        let pipeline = self.pipeline();
        let routing = match &self.options.routing {
            RoutingMode::FromRouter if step.count_experts => Some(pipeline.route(moe, x)?),
            RoutingMode::FromRouter => None,
            RoutingMode::Record => {
                let routing = pipeline.route(moe, x)?;
                output.routing.record(moe.layer, &step.routed, &routing);
                Some(routing)
            }
            RoutingMode::Replay(log) => {
                let (_, router) = moe.router_weight.shape.sources();
                let routing = log.routing(moe.layer, &step.routed, router[0], moe.router.top_k);
                Some(routing.map_err(PipelineError::from)?)
            }
        };
        if let Some(routing) = routing.as_ref().filter(|_| step.count_experts) {
            let mut tokens = vec![0; moe.choices()];
            routing.experts().iter().for_each(|&expert| tokens[expert as usize] += 1);
            output.expert_tokens.push(ExpertTokens { layer: moe.layer, tokens });
        }
        Ok(routing)
    }
}
