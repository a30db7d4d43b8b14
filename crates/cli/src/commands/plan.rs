//! `epsmoe plan`: which strategy and schedule a model should run with on a machine that need not be here.

use crate::args::PlanArgs;
use crate::{output, setup};
use anyhow::{Context, Result};
use epsmoe_model::{AttentionSpec, MlpSpec, ModelSpec};
use epsmoe_plan::{AttentionSizes, Load, Machine, ModelSizes, advise};
use std::path::Path;

/// Stages of the rows with a fixed number of them.
const STAGES: usize = 4;

/// Predicts every strategy and schedule, and says which is best and why.
pub(crate) fn run(args: &PlanArgs) -> Result<()> {
    let spec = setup::spec(&args.model)?;
    let model = sizes(&args.model.model, &spec)?;
    let machine = machine(&args.machine)?;
    let load = Load {
        batch: args.batch,
        sequence: args.seq,
        zipf_permille: (args.zipf * 1000.0).round() as u32,
        seed: args.seed,
        stages: STAGES,
    };
    let advice = advise(&model, &machine, &load)?;
    if args.json {
        output::show_line(serde_json::to_string(&advice)?)
    } else {
        output::show(&advice.to_string())
    }
}

/// A built-in machine, or the one that a file describes.
fn machine(name: &str) -> Result<Machine> {
    if !Path::new(name).is_file() {
        return Ok(Machine::built_in(name)?);
    }
    let text = std::fs::read_to_string(name).with_context(|| format!("cannot read {name}"))?;
    Machine::parse(&text).with_context(|| format!("{name} describes no machine"))
}

/// The sizes of a model with experts.
fn sizes(name: &str, spec: &ModelSpec) -> Result<ModelSizes> {
    let moe = spec.layers.iter().find_map(|layer| layer.mlp.moe());
    let moe = moe.with_context(|| format!("{name} has no experts, so there is nothing to plan"))?;
    let dense = spec.layers.iter().filter_map(|layer| match layer.mlp {
        MlpSpec::Dense { inner } => Some(inner),
        MlpSpec::Moe(_) => None,
    });
    let attention = match spec.attention {
        AttentionSpec::Gqa(it) => {
            AttentionSizes::Gqa { heads: it.heads, kv_heads: it.kv_heads, head: it.head_dim }
        }
        AttentionSpec::Mla(it) => AttentionSizes::Mla {
            heads: it.heads,
            query_rank: it.q_lora.unwrap_or(0),
            latent: it.kv_lora,
            nope: it.nope,
            rope: it.rope,
            value: it.value,
        },
    };
    Ok(ModelSizes {
        name: name.into(),
        layers: spec.layers.len(),
        dense_layers: dense.clone().count(),
        hidden: spec.hidden,
        vocab: spec.vocab,
        tied: spec.tie_embeddings,
        attention,
        experts: moe.experts,
        top_k: moe.gate.top_k,
        groups: moe.gate.groups.map(|limit| (limit.groups, limit.kept)),
        inner: moe.inner,
        shared_inner: moe.shared.map_or(0, |shared| shared.inner),
        dense_inner: dense.max().unwrap_or(0),
        residual_inner: spec.layers.iter().filter_map(|layer| layer.residual_mlp).max().unwrap_or(0),
    })
}
