//! What `plan` takes the weights of a model to be: it reads how they are coded, and none of them.

use super::{codes_rows, on_line, quantised};
use crate::args::{ActivationScheme, PlanArgs, Quantisation};
use crate::locate::{Place, locate};
use crate::output;
use anyhow::{Result, bail};
use epsmoe_advise::{DTYPE, HeldAs};
use epsmoe_device::{WeightFormat, cuda};
use epsmoe_model::checkpoint;
use epsmoe_model::{Checkpoint, HeldWeights, LayerPart, ModelSpec, Part, Synthetic, WeightSource};
use epsmoe_plan::{Machine, WeightCost};

/// How the weights of a model are held on the GPUs of a machine, and multiplied. Where only the configuration is here, they count
/// in bfloat16, or as they are to be quantised.
pub(crate) fn planned_weights(args: &PlanArgs, spec: &ModelSpec, machine: &Machine) -> Result<HeldAs> {
    let name = &args.model.model;
    if args.activation_scheme == ActivationScheme::Dynamic && !machine.gpu.multiplies_fp8 {
        bail!(
            "--activation-scheme dynamic multiplies FP8 codes, which the GPUs of {} cannot: leave it out",
            machine.name
        );
    }
    let source = source(args, spec)?;
    let codes_rows = codes_rows(args.activation_scheme, name, spec, &*source)?;
    let fp8_rows = codes_rows && machine.gpu.multiplies_fp8;
    let bits = |format: &_| cuda::held_bits(format, DTYPE);
    let of = |kind: fn(Part) -> bool| -> Result<HeldWeights> {
        let parts = spec.parts().filter(|&part| kind(part));
        Ok(HeldWeights::of_parts(spec, &*source, (DTYPE, fp8_rows), bits, parts)?)
    };
    let experts = of(|part| matches!(part, Part::Layer(_, LayerPart::Expert(..))))?;
    let layers = of(|part| matches!(part, Part::Layer(_, of) if !matches!(of, LayerPart::Expert(..))))?;
    let tables = of(|part| !matches!(part, Part::Layer(..)))?;
    let plain = HeldAs::default();
    let cost = |held: &HeldWeights, plain: WeightCost| WeightCost {
        millibits: held.millibits().unwrap_or(plain.millibits),
        fp8_rows: held.formats.iter().any(|(format, _)| *format == WeightFormat::Fp8),
    };
    Ok(HeldAs {
        experts: cost(&experts, plain.experts),
        layers: cost(&layers, plain.layers),
        tables: tables.millibits().unwrap_or(plain.tables),
    })
}

/// The weights that are there, or random ones, as they are coded when they are loaded.
fn source(args: &PlanArgs, spec: &ModelSpec) -> Result<Box<dyn WeightSource>> {
    let (name, typed) = (&args.model.model, args.quantization);
    let random = || Box::new(Synthetic::new(spec, args.seed));
    let Place::Folder(folder) = locate(name, &args.model.revision)? else {
        return Ok(quantised(random(), on_line(typed, name, None)?));
    };
    let found = checkpoint::method(&folder)?;
    match Checkpoint::open(&folder) {
        Ok(weights) => {
            let target = on_line(typed, name, found)?;
            Ok(match typed {
                Quantisation::None => Box::new(weights.decoded()),
                _ => quantised(Box::new(weights), target),
            })
        }
        Err(error) => {
            if let (Some(method), Quantisation::Auto | Quantisation::Method(_)) = (found, typed) {
                output::remark(format_args!(
                    "its weights are quantised ({method}), but they are not here ({error}): they are counted and computed with in \
                     bfloat16; --quantization fp8_per_block, mxfp4, int4 or q8_0 takes them to be coded so"
                ));
            }
            let target = match typed {
                Quantisation::OnLine(target) => Some(target),
                _ => None,
            };
            Ok(quantised(random(), target))
        }
    }
}
