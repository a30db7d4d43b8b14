//! Gated DeltaNet (arXiv 2412.06464): a layer that carries a state along instead of looking back. What it carries lies in slots
//! that the engine hands out, beside the paged cache of the other layers.
//!
//! Ranks take whole key heads, each with the value heads that share it, with all that belongs to them.

use super::{Context, Linear, blocks};
use crate::load::Loader;
use crate::names::DeltaRows;
use crate::{DeltaNetSpec, LayerPart, ModelError, Part, Window};
use epsmoe_base::{DType, Layer};
use epsmoe_device::op::{DeltaRule, Gate, Gating, Gemm, ShortConv};
use epsmoe_device::{Backend, Buffer, DeviceError, Reserve, Weight};
use std::ops::Range;

pub(crate) struct DeltaNet {
    /// With the heads of this rank.
    spec: DeltaNetSpec,
    /// To queries, keys and values.
    mixed: Weight,
    convolution: Weight,
    gate: Weight,
    /// To what weighs the updates of the state, and its decay.
    weights: Weight,
    decay: Weight,
    bias: Weight,
    norm: Weight,
    output: Linear,
    /// `[slots · (taps − 1), mixed]`.
    kept: Buffer,
    /// `[slots · value_heads, key_width · value_width]`, float32.
    states: Buffer,
    workspace: Workspace,
}

/// What is computed in between, for all tokens of a step.
#[derive(Clone)]
pub(super) struct Workspace {
    /// Rows of the input whose gates are computed.
    input: Buffer,
    mixed: Buffer,
    /// From here on nothing is rounded until it meets the output projection: float32.
    convolved: Buffer,
    weights: Buffer,
    context: Buffer,
    wanted_context: Buffer,
    normed: Buffer,
    gate: Buffer,
    gated: Buffer,
}

impl Workspace {
    pub(super) fn allocate(
        device: &impl Reserve,
        spec: &DeltaNetSpec,
        hidden: usize,
        tokens: usize,
    ) -> Result<Self, DeviceError> {
        let reserve = |name, width| device.allocate(name, device.dtype(), tokens, width);
        let floats = |name, width| device.allocate(name, DType::F32, tokens, width);
        let context = spec.context_width();
        Ok(Workspace {
            input: reserve("gate_input", hidden)?,
            mixed: reserve("mixed", spec.mixed_width())?,
            convolved: floats("convolved", spec.mixed_width())?,
            weights: floats("delta_weights", 2 * spec.value_heads)?,
            context: floats("delta_context", context)?,
            wanted_context: floats("wanted_delta_context", context)?,
            normed: floats("normed_context", context)?,
            gate: reserve("gate", context)?,
            gated: reserve("gated_context", context)?,
        })
    }
}

impl DeltaNetSpec {
    /// The last rows, and the states, of so many sequences.
    pub(super) fn states(&self, device: &impl Reserve, slots: usize) -> Result<[Buffer; 2], DeviceError> {
        let (rows, of_head) = (slots * (self.taps - 1), self.key_width * self.value_width);
        Ok([
            device.allocate("kept_rows", device.dtype(), rows, self.mixed_width())?,
            device.allocate("delta_states", DType::F32, slots * self.value_heads, of_head)?,
        ])
    }
}

impl DeltaNet {
    pub(super) fn load<B: Backend>(
        loader: &Loader<'_, B>,
        layer: Layer,
        (whole, heads): (&DeltaNetSpec, Range<usize>),
        workspace: &Workspace,
        [kept, states]: [Buffer; 2],
    ) -> Result<Self, ModelError> {
        let spec = whole.of_heads(heads.len());
        let of_heads = |kinds: &[DeltaRows], part: fn(usize, DeltaRows) -> LayerPart| -> Vec<Part> {
            let of_kind = |&kind: &DeltaRows| heads.clone().map(move |head| part(head, kind).of(layer));
            kinds.iter().flat_map(of_kind).collect()
        };
        let matrix = |kinds: &[DeltaRows]| loader.rows(&of_heads(kinds, LayerPart::Delta));
        let taps: Vec<(Part, Window)> = of_heads(&DeltaRows::MIXED, LayerPart::DeltaConv)
            .into_iter()
            .map(|part| (part, Window::whole()))
            .collect();
        let values = blocks(&heads, whole.group());
        let of_values = |part: LayerPart| loader.window(part.of(layer), &Window::rows(values.clone()));
        Ok(DeltaNet {
            mixed: matrix(&DeltaRows::MIXED)?,
            convolution: loader.vectors(&taps)?,
            gate: matrix(&[DeltaRows::Gate])?,
            weights: matrix(&[DeltaRows::Beta, DeltaRows::Decay])?,
            decay: of_values(LayerPart::DeltaDecay)?,
            bias: of_values(LayerPart::DeltaBias)?,
            norm: loader.layer(layer, LayerPart::DeltaNorm)?,
            output: Linear {
                weight: loader.window(
                    LayerPart::DeltaOutput.of(layer),
                    &Window::columns(blocks(&values, spec.value_width)),
                )?,
                bias: None,
            },
            kept,
            states,
            workspace: workspace.clone(),
            spec,
        })
    }

    pub(super) fn run<B: Backend>(
        &self,
        cx: &Context<'_, B>,
        x: &Buffer,
        out: &Buffer,
    ) -> Result<(), DeviceError> {
        let (spec, tokens, queries) = (&self.spec, 0..x.rows, 0..out.rows);
        let mixed = self.workspace.mixed.rows(tokens.clone())?;
        let convolved = self.workspace.convolved.rows(tokens.clone())?;
        let weights = self.workspace.weights.rows(tokens.clone())?;
        let context = self.workspace.context.rows(tokens)?;
        cx.compute(Gemm::linear(x.clone(), &self.mixed, mixed.clone()))?;
        cx.compute(Gemm::linear(x.clone(), &self.weights, weights.clone()))?;
        cx.compute(ShortConv {
            x: mixed,
            weight: self.convolution.clone(),
            carried: cx.carried(),
            states: self.kept.clone(),
            out: convolved.clone(),
        })?;
        cx.compute(DeltaRule {
            x: convolved,
            gates: weights,
            decay: self.decay.clone(),
            bias: self.bias.clone(),
            key_heads: spec.key_heads,
            key_width: spec.key_width,
            carried: cx.carried(),
            states: self.states.clone(),
            out: context.clone(),
        })?;
        // All tokens go into the state; what comes of them is wanted of some.
        let context = cx.queries_of(&context, &self.workspace.wanted_context)?;
        let input = cx.queries_of(x, &self.workspace.input)?;
        let Workspace { normed, gate, gated, .. } = &self.workspace;
        let (normed, gate) = (normed.rows(queries.clone())?, gate.rows(queries.clone())?);
        let gated = gated.rows(queries)?;
        let heads = normed.reshape(spec.value_width)?;
        cx.norm(&context.reshape(spec.value_width)?, &self.norm, cx.eps, &heads)?;
        cx.compute(Gemm::linear(input, &self.gate, gate.clone()))?;
        cx.compute(Gate { gate, gating: Gating::Silu, x: normed, out: gated.clone() })?;
        cx.linear(&gated, &self.output, out)
    }
}
