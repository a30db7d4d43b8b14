//! What can be told in whole nanoseconds and bytes. Every bound is far beyond any machine and any batch.

use crate::{AdviseError, Load};
use epsmoe_model::{MlpSpec, ModelSpec, MoeSpec};
use epsmoe_plan::{KernelFigures, MOST_NS, Machine, Piecewise};
use std::ops::RangeInclusive;

/// Tokens of a batch.
const TOKENS: usize = 1 << 28;
/// GPUs of a machine.
const RANKS: usize = 4096;
/// What a processor, a memory or a link does in a second.
const RATES: RangeInclusive<u64> = 1_000_000..=1_000_000_000_000_000_000;
/// What an operation or an exchange costs besides its work, in nanoseconds.
const TIMES: RangeInclusive<u64> = 0..=1_000_000_000_000;
/// Nanoseconds that one product may take: what is priced is no longer.
const LONGEST_NS: f64 = MOST_NS as f64;

/// Refuses what would not fit into the numbers of a plan.
pub(crate) fn check(
    model: &ModelSpec,
    moe: &MoeSpec,
    machine: &Machine,
    load: &Load,
) -> Result<(), AdviseError> {
    let limit = |problem: String| Err(AdviseError::Limit(problem));
    let (batch, sequence) = (load.batch, load.sequence);
    if batch == 0 || sequence == 0 || batch.checked_mul(sequence).is_none_or(|tokens| tokens > TOKENS) {
        return limit(format!(
            "a batch of {batch} sequences of {sequence} tokens cannot be planned: plans are made for 1 to {TOKENS} \
             tokens in all; ask for fewer"
        ));
    }
    if machine.ranks > RANKS {
        return limit(format!(
            "machine {} has {} ranks, but plans are made for at most {RANKS}",
            machine.name, machine.ranks
        ));
    }
    let (gpu, kernels) = (&machine.gpu, &machine.kernels);
    let mut figures = vec![
        ("gpu flops_per_second", gpu.flops_per_second.value, RATES),
        ("gpu memory_bytes_per_second", gpu.memory_bytes_per_second.value, RATES),
        ("op_ns of grouped kernels", kernels.grouped.op_ns, TIMES),
        ("op_ns of dense kernels", kernels.dense.op_ns, TIMES),
        ("bytes_per_second of the near link", machine.near.bytes_per_second.value, RATES),
        ("start_ns of the near link", machine.near.start_ns.value, TIMES),
    ];
    if let Some(far) = &machine.far {
        figures.push(("bytes_per_second of the far link", far.bytes_per_second.value, RATES));
        figures.push(("start_ns of the far link", far.start_ns.value, TIMES));
    }
    for (name, value, allowed) in figures {
        if !allowed.contains(&value) {
            let (machine, least, most) = (&machine.name, allowed.start(), allowed.end());
            return limit(format!(
                "machine {machine}: {name} is {value}, but must be from {least} to {most}"
            ));
        }
    }
    let ns = longest_product_ns(model, moe, machine, load);
    if ns > LONGEST_NS {
        return limit(format!(
            "one product of this model could take {:.0e} s for {} tokens on machine {}: ask for fewer tokens, or \
             correct the machine's figures",
            ns / 1e9,
            load.tokens(),
            machine.name
        ));
    }
    Ok(())
}

/// About how long the largest product could take at its worst efficiency, as far as products are priced: a whole batch
/// on one GPU.
fn longest_product_ns(model: &ModelSpec, moe: &MoeSpec, machine: &Machine, load: &Load) -> f64 {
    let dense = model.layers.iter().filter_map(|layer| match &layer.mlp {
        MlpSpec::Absent => None,
        MlpSpec::Dense { inner, .. } => Some(*inner),
        MlpSpec::Moe(_) => layer.residual_mlp,
    });
    let shared = moe.shared.map_or(0, |shared| shared.inner);
    let attention =
        model.layers.iter().map(|layer| layer.attention.query_width().max(layer.attention.context_width()));
    let widest = dense.chain(attention).chain([moe.inner, shared]).max().unwrap_or(0);
    let product = |rows: usize, columns: usize| {
        let elements = columns as f64 * model.hidden as f64;
        let rate = |per_second: u64| 1e9 / per_second as f64;
        // Efficiencies go down to a thousandth, for rows and for depth.
        let compute = 2e6 * rows as f64 * elements * rate(machine.gpu.flops_per_second.value);
        compute.max(2.0 * elements * rate(machine.gpu.memory_bytes_per_second.value))
    };
    // The output projection sees one row of each sequence.
    let worst = product(load.tokens() * moe.router.top_k, 3 * widest).max(product(load.batch, model.vocab));
    // As efficient as its curves say, at the least.
    let least = |kernel: &KernelFigures| {
        let lowest =
            |curve: &Piecewise| curve.points().iter().map(|point| point.1.max(1)).min().unwrap_or(1) as f64;
        lowest(&kernel.rows) * lowest(&kernel.depth)
    };
    worst / least(&machine.kernels.grouped).min(least(&machine.kernels.dense))
}

/// Something did not fit all the same.
pub(crate) fn beyond() -> AdviseError {
    AdviseError::Limit(
        "the times or sizes of this plan are beyond all numbers: ask for fewer tokens, or correct the machine's \
         figures"
            .into(),
    )
}
