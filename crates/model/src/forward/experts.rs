//! The mixture-of-experts layers of one rank.

use super::{Model, ModelOptions, RoutingMode, StepOutput};
use crate::parallel::Layout;
use crate::step::Step;
use crate::{Experts, ModelError, ModelSpec};
use epsmoe_device::{Backend, Buffer};
use epsmoe_fabric::Fabric;
use epsmoe_pipeline::{ExpertPipeline, MoeLayer, PipelineError, PipelineOptions, PipelineSizes};
use epsmoe_plan::{Capacity, LayerSizes, Policy, Schedule};
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
) -> Result<Option<ExpertPipeline<B>>, ModelError> {
    let Some(moe) = spec.layers.iter().find_map(|layer| layer.mlp.moe()) else { return Ok(None) };
    let (placement, _) = layout.placement(moe.experts)?;
    let inner = layout.inner();
    let layer = LayerSizes {
        hidden: spec.hidden,
        inner: inner.of(moe.inner).len(),
        shared_inner: moe.shared.map_or(0, |shared| inner.of(shared.inner).len()),
        top_k: moe.gate.top_k,
        ..LayerSizes::of(&placement, device.dtype())
    };
    let worst = || Capacity::worst_case(layout.most_in_mlp(options.max_tokens), &layer);
    let capacity = options.capacity.unwrap_or_else(worst);
    let (policy, fabric) = match layout.experts() {
        Experts::Ep => (options.policy.clone(), fabric.clone()),
        // Experts that never travel leave stages nothing to run beside.
        Experts::Tp => {
            let policy =
                Policy { gemm: options.policy.gemm, schedule: Schedule::Serial, ..Policy::default() };
            (policy, Fabric::single_rank())
        }
    };
    let options = PipelineOptions {
        sizes: PipelineSizes { layer, capacity },
        policy,
        identity,
        timeout: options.timeout,
    };
    Ok(Some(ExpertPipeline::new(Arc::clone(device), fabric, options)?))
}

impl<B: Backend> Model<B> {
    /// An MoE layer whose routing is made, recorded or replayed.
    pub(super) fn mixture(
        &self,
        moe: &MoeLayer,
        step: &Step,
        x: &Buffer,
        y: &Buffer,
        output: &mut StepOutput,
    ) -> Result<(), ModelError> {
        let Some(pipeline) = &self.experts else {
            unreachable!("a model with experts has a pipeline. This is a bug.")
        };
        let report = match &self.options.routing {
            RoutingMode::FromRouter => pipeline.run(moe, x, y)?,
            RoutingMode::Record => {
                let routing = pipeline.route(moe, x)?;
                output.routing.record(moe.layer, &step.routed, &routing);
                pipeline.run_routed(moe, &routing, x, y)?
            }
            RoutingMode::Replay(log) => {
                let (_, router) = moe.router.shape.sources();
                let routing = log.routing(moe.layer, &step.routed, router[0], moe.gate.top_k);
                pipeline.run_routed(moe, &routing.map_err(PipelineError::from)?, x, y)?
            }
        };
        output.layers.push(report);
        Ok(())
    }
}
