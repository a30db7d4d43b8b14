//! Where the tokens of ranks that are not here go: their prompts, run by the rank that is.

use crate::args::OneOf;
use crate::output;
use crate::setup::Setup;
use anyhow::{Context, Result, ensure};
use epsmoe_base::Layer;
use epsmoe_engine::{EngineOptions, RoutingMode};
use epsmoe_model::ModelSpec;
use epsmoe_pipeline::TokenId;
use epsmoe_plan::{Policy, Routing, Schedule, SlotMap};
use std::sync::Arc;

/// Deals the prompts out to the ranks, tells the peers where those of each rank go, and gives those of the rank that is
/// here.
///
/// Each rank's prompts go through the model once, on the rank that is here: its attention and its routers are everybody's,
/// and what would come from experts elsewhere is stood in for. All peers route as they do meanwhile.
pub(super) fn learn(
    setup: &Setup,
    one: OneOf,
    options: &[EngineOptions],
    prompts: &[Vec<u32>],
    output_len: usize,
) -> Result<Vec<Vec<u32>>> {
    let identities =
        setup.model.spec.layers.iter().filter_map(|layer| layer.mlp.moe()).any(|moe| moe.identities > 0);
    ensure!(
        !identities,
        "--emulate-rank knows no experts that give rows back as they are, which this model has: leave it out, or use `bench layer`"
    );
    let each = prompts.len().div_ceil(one.size);
    let of_rank = |rank: usize| {
        // Ranks have as many each: the first prompts again where they do not come out even.
        prompts.iter().cycle().skip(rank * each).take(each).cloned().collect::<Vec<_>>()
    };
    let first = options.first().context("there is nothing to compare. This is a bug")?;
    let options = EngineOptions {
        policy: Policy { schedule: Schedule::Serial, ..Policy::default() },
        routing: RoutingMode::Record,
        record_spans: false,
        ..first.clone()
    };
    let (mut engine, _) = setup.start(options)?;
    let bar = output::step_bar("routing the tokens of all ranks", one.size);
    // By rank, its tokens in the order in which it has them.
    let mut tokens: Vec<Vec<TokenId>> = Vec::with_capacity(one.size);
    for rank in 0..one.size {
        let prompts = of_rank(rank);
        let first = (rank * each) as u64;
        engine.run(prompts.iter().map(|prompt| super::request(prompt, output_len)).collect(), |_| {})?;
        let ids = prompts.iter().enumerate().flat_map(|(sequence, prompt)| {
            prompt.iter().enumerate().map(move |(position, &token)| TokenId {
                sequence: first + sequence as u64,
                position: position as u32,
                token,
            })
        });
        tokens.push(ids.collect());
        bar.inc(1);
    }
    bar.finish_and_clear();
    let spec = &setup.model.spec;
    for (number, layer) in spec.layers.iter().enumerate() {
        let Some(moe) = layer.mlp.moe() else { continue };
        let map = Arc::new(SlotMap::contiguous(moe.experts, one.size)?);
        let routing = |tokens: &Vec<TokenId>| -> Result<Routing> {
            let tokens = computed(spec, Layer(number), tokens);
            Ok(engine.routing().routing(Layer(number), &tokens, moe.experts, moe.router.top_k)?)
        };
        setup.peers.learn(Layer(number), &map, tokens.iter().map(routing).collect::<Result<_>>()?);
    }
    Ok(of_rank(one.rank))
}

/// The tokens that a layer routes: in the last layer those whose logits are wanted, of a prompt the last.
fn computed(spec: &ModelSpec, layer: Layer, tokens: &[TokenId]) -> Vec<TokenId> {
    if layer.0 + 1 < spec.layers.len() {
        return tokens.to_vec();
    }
    let next = tokens.iter().skip(1).map(Some).chain([None]);
    let is_last =
        |(id, next): &(&TokenId, Option<&TokenId>)| next.is_none_or(|next| next.sequence != id.sequence);
    tokens.iter().zip(next).filter(is_last).map(|(id, _)| *id).collect()
}
