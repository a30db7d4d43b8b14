//! Layers that carry a state along instead of looking back: Gated DeltaNet (arXiv 2412.06464) and Mamba-2 (arXiv 2405.21060). What
//! they carry lies in slots that the engine hands out, beside the paged cache of the other layers.
//!
//! Ranks take whole key heads, each with the value heads that share it, with all that belongs to them. Where there are more ranks
//! than key heads, which are normed as a whole, every rank computes all of them, and the first one's outputs count.

use super::{Context, Linear, blocks};
use crate::load::Loader;
use crate::names::StateRows;
use crate::parallel::Share;
use crate::{LayerPart, ModelError, Part, RecurrentRule, RecurrentSpec, Window};
use epsmoe_base::{DType, Layer};
use epsmoe_device::op::{Gate, Gating, Recurrence, Rule, Scale, ShortConv};
use epsmoe_device::{Backend, Buffer, DeviceError, Reserve, Weight};
use std::ops::Range;

pub(crate) struct Recurrent {
    /// With the heads of this rank.
    spec: RecurrentSpec,
    /// To queries, keys and values.
    mixed: Linear,
    convolution: Weight,
    convolution_bias: Option<Weight>,
    gate: Linear,
    /// To what weighs the updates of the state, and its decay.
    weights: Linear,
    decay: Weight,
    bias: Weight,
    /// Of a state space.
    skip: Option<Weight>,
    norm: Weight,
    output: Linear,
    /// Whether what this rank computes is not what another does too.
    counts: bool,
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
    /// Normed and then gated, or gated and then normed.
    normed: Buffer,
    gate: Buffer,
    gated: Buffer,
}

impl Workspace {
    pub(super) fn allocate(
        device: &impl Reserve,
        spec: &RecurrentSpec,
        hidden: usize,
        tokens: usize,
    ) -> Result<Self, DeviceError> {
        let reserve = |name, width| device.allocate(name, device.dtype(), tokens, width);
        let floats = |name, width| device.allocate(name, DType::F32, tokens, width);
        let context = spec.context_width();
        // Where gating comes first, nothing is rounded before it.
        let rounded = |name, width| match spec.rule {
            RecurrentRule::Delta => reserve(name, width),
            RecurrentRule::StateSpace { .. } => floats(name, width),
        };
        Ok(Workspace {
            input: reserve("gate_input", hidden)?,
            mixed: reserve("mixed", spec.mixed_width())?,
            convolved: floats("convolved", spec.mixed_width())?,
            weights: floats("state_weights", StateRows::weights(spec).len() * spec.value_heads)?,
            context: floats("state_context", context)?,
            wanted_context: floats("wanted_state_context", context)?,
            normed: floats("normed_context", context)?,
            gate: rounded("gate", context)?,
            gated: reserve("gated_context", context)?,
        })
    }
}

/// The key heads of a rank.
pub(super) fn heads_of(spec: &RecurrentSpec, share: Share) -> Range<usize> {
    let share = if share.count > spec.key_heads { Share::WHOLE } else { share };
    share.of(spec.key_heads)
}

impl RecurrentSpec {
    /// The last rows, and the states, of so many sequences.
    pub(super) fn states(&self, device: &impl Reserve, slots: usize) -> Result<[Buffer; 2], DeviceError> {
        let (rows, of_head) = (slots * (self.taps - 1), self.key_width * self.value_width);
        Ok([
            device.allocate("kept_rows", device.dtype(), rows, self.mixed_width())?,
            device.allocate("states", DType::F32, slots * self.value_heads, of_head)?,
        ])
    }
}

impl Recurrent {
    pub(super) fn load<B: Backend>(
        loader: &Loader<'_, B>,
        layer: Layer,
        whole: &RecurrentSpec,
        workspace: &Workspace,
        [kept, states]: [Buffer; 2],
    ) -> Result<Self, ModelError> {
        let share = loader.layout.in_group();
        let heads = heads_of(whole, share);
        let spec = whole.of_heads(heads.len());
        let of_heads = |kinds: &[StateRows], part: fn(usize, StateRows) -> LayerPart| -> Vec<Part> {
            let of_kind = |&kind: &StateRows| heads.clone().map(move |head| part(head, kind).of(layer));
            kinds.iter().flat_map(of_kind).collect()
        };
        let matrix = |kinds: &[StateRows]| -> Result<Linear, ModelError> {
            Ok(Linear { weight: loader.rows(&of_heads(kinds, LayerPart::State))?, bias: None })
        };
        let whole_parts = |part: fn(usize, StateRows) -> LayerPart| -> Vec<(Part, Window)> {
            of_heads(&StateRows::MIXED, part).into_iter().map(|part| (part, Window::whole())).collect()
        };
        let bias = whole.conv_bias.then(|| loader.vectors(&whole_parts(LayerPart::StateConvBias)));
        let values = blocks(&heads, whole.group());
        let of_values = |part: LayerPart| loader.window(part.of(layer), &Window::rows(values.clone()));
        Ok(Recurrent {
            mixed: matrix(&StateRows::MIXED)?,
            convolution: loader.vectors(&whole_parts(LayerPart::StateConv))?,
            convolution_bias: bias.transpose()?,
            gate: matrix(&[StateRows::Gate])?,
            weights: matrix(StateRows::weights(whole))?,
            decay: of_values(LayerPart::StateDecay)?,
            bias: of_values(LayerPart::StateBias)?,
            skip: match whole.rule {
                RecurrentRule::Delta => None,
                RecurrentRule::StateSpace { .. } => Some(of_values(LayerPart::StateSkip)?),
            },
            norm: match whole.rule {
                RecurrentRule::Delta => loader.layer(layer, LayerPart::StateNorm)?,
                RecurrentRule::StateSpace { .. } => {
                    let own = Window::rows(blocks(&values, spec.value_width));
                    loader.window(LayerPart::StateNorm.of(layer), &own)?
                }
            },
            output: Linear {
                weight: loader.window(
                    LayerPart::StateOutput.of(layer),
                    &Window::columns(blocks(&values, spec.value_width)),
                )?,
                bias: None,
            },
            counts: share.index == 0 || share.count <= whole.key_heads,
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
        let Workspace { input, normed, gate, gated, .. } = &self.workspace;
        let (normed, gate) = (normed.rows(queries.clone())?, gate.rows(queries.clone())?);
        let gated = gated.rows(queries)?;
        // All tokens go into the state; what comes of them is wanted of some.
        let others = [(&self.mixed, &mixed), (&self.weights, &weights)];
        cx.linears_of_queries(x, input, (&self.gate, &gate), &others)?;
        cx.compute(ShortConv {
            x: mixed,
            weight: self.convolution.clone(),
            bias: self.convolution_bias.clone(),
            carried: cx.carried(),
            states: self.kept.clone(),
            out: convolved.clone(),
        })?;
        let rule = match (spec.rule, &self.skip) {
            (RecurrentRule::StateSpace { floor }, Some(skip)) => {
                Rule::StateSpace { skip: skip.clone(), floor }
            }
            _ => Rule::Delta,
        };
        cx.compute(Recurrence {
            rule,
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
        let context = cx.queries_of(&context, &self.workspace.wanted_context)?;
        let gating = Gating::Silu;
        match spec.rule {
            RecurrentRule::Delta => {
                let heads = |rows: &Buffer| rows.reshape(spec.value_width);
                cx.norm(&heads(&context)?, &self.norm, cx.eps, &heads(&normed)?)?;
                cx.compute(Gate { gate, gating, x: normed, out: gated.clone() })?;
            }
            RecurrentRule::StateSpace { .. } => {
                let groups = |rows: &Buffer| rows.reshape(spec.group() * spec.value_width);
                cx.compute(Gate { gate, gating, x: context, out: normed.clone() })?;
                cx.norm(&groups(&normed)?, &self.norm, cx.eps, &groups(&gated)?)?;
            }
        }
        cx.linear(&gated, &self.output, out)?;
        if self.counts { Ok(()) } else { cx.compute(Scale { x: out.clone(), factor: 0.0 }) }
    }
}
