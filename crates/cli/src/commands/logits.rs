//! `epsmoe logits`: every token's logits, for comparison with other implementations.

use crate::args::LogitsArgs;
use crate::output;
use crate::setup::{Demand, Setup};
use crate::tensors::{TensorPlan, write_header};
use anyhow::Result;
use epsmoe_base::{Bytes, count};
use epsmoe_engine::Request;
use epsmoe_quant::StoredType;

/// Runs the prompt and writes `logits` [T, V].
pub(crate) fn run(args: &LogitsArgs) -> Result<()> {
    output::check_place(&args.out)?;
    let setup = Setup::new(&args.run)?;
    let request = Request { prompt: args.ids.0.clone(), prompt_logits: true, ..Request::default() };
    let (tokens, vocabulary) = (request.prompt.len(), setup.model.spec.vocab);
    let options =
        setup.engine_options(Demand { sequences: 1, tokens, step: tokens }, setup.parallel, &setup.policy)?;
    request.check(vocabulary, options.max_model_len)?;
    let tensor =
        TensorPlan { name: "logits".into(), dtype: StoredType::F32, shape: vec![tokens, vocabulary] };
    // The engine collects them before they are written.
    setup
        .check_room(format_args!("logits of {}", count(tokens, "token")), tensor.bytes().saturating_mul(2))?;
    let (mut engine, _) = setup.start(options)?;
    let progress = output::spinner("computing logits");
    let completions = engine.run(vec![request], |_| {})?;
    progress.finish_and_clear();
    setup.write_routing(&engine)?;
    setup.explain(&engine);
    let size = Bytes(tensor.bytes());
    output::write_file(&args.out, |out| {
        write_header(out, &[tensor])?;
        let mut logits = completions.iter().flat_map(|completion| &completion.prompt_logits);
        logits.try_for_each(|logit| out.write_all(&logit.to_le_bytes()))
    })?;
    let file = args.out.display();
    output::remark(format_args!("wrote logits [{tokens}, {vocabulary}] float32, {size}, to {file}"));
    Ok(())
}
