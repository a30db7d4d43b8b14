//! `epsmoe plan`: which strategy and schedule a model should run with on a machine that need not be here.

use crate::args::PlanArgs;
use crate::{output, setup};
use anyhow::{Context, Result, bail};
use epsmoe_advise::{DTYPE, Load, advise};
use epsmoe_base::files::read_plain_text;
use epsmoe_plan::Machine;
use std::path::Path;

/// Stages of the rows with a fixed number of them.
const STAGES: usize = 4;

/// Bytes of a machine's description: some hundred times what one has.
const MOST_BYTES: u64 = 1 << 20;

/// Predicts every strategy and schedule, and says which is best and why.
pub(crate) fn run(args: &PlanArgs) -> Result<()> {
    let spec = setup::spec(&args.model)?;
    let machine = machine(&args.machine)?;
    if args.seq > spec.max_positions {
        bail!(
            "--seq is {}, but this model was made for {} positions: lower it",
            args.seq,
            spec.max_positions
        );
    }
    let load = Load {
        batch: args.batch,
        sequence: args.seq,
        zipf_permille: (args.zipf * 1000.0).round() as u32,
        seed: args.seed,
        stages: STAGES,
        wire: args.wire_dtype.of(DTYPE)?,
        cache: args.kv_cache_dtype.of(DTYPE)?,
        weights: setup::planned_weights(args, &spec, &machine)?,
    };
    let advice = advise(&args.model.model, &spec, &machine, &load)?;
    if args.json { output::show_json(&advice) } else { output::show(&advice.to_string()) }
}

/// A built-in machine, or the one that a file describes.
fn machine(name: &str) -> Result<Machine> {
    if !Path::new(name).exists() {
        if name.contains('/') || name.ends_with(".toml") {
            bail!(
                "there is no file {name}: say where the machine is described, or one of {}",
                Machine::names().join(", ")
            );
        }
        return Ok(Machine::built_in(name)?);
    }
    let text = read_plain_text(Path::new(name), MOST_BYTES).with_context(|| format!("cannot read {name}"))?;
    Machine::parse(&text).with_context(|| format!("{name} describes no machine"))
}
