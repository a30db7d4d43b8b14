//! Parts of a model become weights of a device: read once, each rank only what it holds.

use crate::checkpoint::{FP8_BITS, held_format, may_take_fp8_rows};
use crate::names::Located;
use crate::parallel::{Layout, Share};
use crate::{LayerPart, Map, MlaSpec, ModelError, ModelSpec, Part, Source, Tensor, WeightSource, Window};
use epsmoe_base::{DType, Expert, Layer, by_threads, cores};
use epsmoe_device::{Backend, DeviceError, Drawn, Weight, WeightFormat, WeightShape};
use epsmoe_pipeline::Mlp;
use epsmoe_plan::WeightCost;
use epsmoe_quant::Codes;
use std::ops::Range;

/// A norm of the residual stream.
#[derive(Clone)]
pub(crate) struct NormWeights {
    pub(crate) weight: Weight,
    pub(crate) bias: Option<Weight>,
}

impl From<Weight> for NormWeights {
    fn from(weight: Weight) -> Self {
        NormWeights { weight, bias: None }
    }
}

/// Threads that read, each of which has the bytes of one weight at hand: from here on the memory of a host that feeds a GPU
/// is the limit.
const READERS: usize = 16;

/// Does the pieces of loading `0..pieces` on as many threads as read.
pub(crate) fn by_readers<T: Send>(
    pieces: usize,
    read: impl Fn(usize) -> Result<T, ModelError> + Sync,
) -> Result<Vec<T>, ModelError> {
    by_threads(cores().min(READERS), pieces, read)
}

/// Reads the parts of one model into one device.
pub(crate) struct Loader<'a, B> {
    pub(crate) spec: &'a ModelSpec,
    pub(crate) source: &'a dyn WeightSource,
    pub(crate) device: &'a B,
    /// What this rank holds.
    pub(crate) layout: Layout,
}

impl<B: Backend> Loader<'_, B> {
    /// A part as it is.
    pub(crate) fn part(&self, part: Part) -> Result<Weight, ModelError> {
        self.window(part, &Window::whole())
    }

    /// A part of a layer as it is.
    pub(crate) fn layer(&self, layer: Layer, part: LayerPart) -> Result<Weight, ModelError> {
        self.part(part.of(layer))
    }

    /// Some rows or columns of a part; named after where they are stored, so that ranks that hold the same ones share them.
    pub(crate) fn window(&self, part: Part, window: &Window) -> Result<Weight, ModelError> {
        self.window_for(part, window, false)
    }

    /// The same; with `fp8` its rows may be wanted as codes.
    pub(crate) fn window_for(&self, part: Part, window: &Window, fp8: bool) -> Result<Weight, ModelError> {
        let name = self.name(part, window);
        // With tied embeddings one stored tensor serves as a table and as a map.
        let key = if part == Part::LmHead { format!("{name} as output") } else { name };
        self.map(&key, self.shape(part, window), &[part], window, fp8)
    }

    /// A share of the inner width of a gated MLP: rows of its gate and up maps, which lie side by side, and
    /// columns of its down map.
    pub(crate) fn mlp(
        &self,
        layer: Layer,
        share: Share,
        map: impl Fn(Map) -> LayerPart,
    ) -> Result<Mlp, ModelError> {
        self.mlp_with(layer, share, map, |[gate, up], rows, [inner, k]| {
            let shape = WeightShape::GateUp { inner, k };
            let fp8 = !self.scales_inputs(layer);
            self.map(&format!("{} and up", self.name(gate, rows)), shape, &[gate, up], rows, fp8)
        })
    }

    /// The same of an MLP whose activation is an operation of its own: gate rows over up rows, one matrix.
    pub(crate) fn open_mlp(
        &self,
        layer: Layer,
        share: Share,
        map: impl Fn(Map) -> LayerPart,
    ) -> Result<Mlp, ModelError> {
        self.mlp_with(layer, share, map, |[gate, up], rows, [inner, k]| {
            let shape = WeightShape::Matrix { n: 2 * inner, k };
            let name = format!("{} over up", self.name(gate, rows));
            if let Some(weight) = self.device.find(&name) {
                return Ok(weight);
            }
            if let Some(codes) = self.codes(shape, &[gate, up], rows)? {
                return Ok(self.device.load_codes(&name, shape, &[Codes::stacked(codes)])?);
            }
            self.held(&name, shape, || {
                self.joined([(gate, rows.clone()), (up, rows.clone())], vec![2 * inner, k])
            })
        })
    }

    /// The same of an MLP without a gate.
    pub(crate) fn ungated_mlp(
        &self,
        layer: Layer,
        share: Share,
        map: impl Fn(Map) -> LayerPart,
    ) -> Result<Mlp, ModelError> {
        let [up, down] = [Map::UpProj, Map::DownProj].map(|of| map(of).of(layer));
        let inner = share.of(self.matrix(up).0);
        Ok(Mlp {
            gate_up: self.window(up, &Window::rows(inner.clone()))?,
            down: self.window(down, &Window::columns(inner))?,
        })
    }

    /// The share of an MLP; `join` makes one weight of these rows of the gate and up maps, each `[inner, k]`.
    fn mlp_with(
        &self,
        layer: Layer,
        share: Share,
        map: impl Fn(Map) -> LayerPart,
        join: impl FnOnce([Part; 2], &Window, [usize; 2]) -> Result<Weight, ModelError>,
    ) -> Result<Mlp, ModelError> {
        let [gate, up, down] = [Map::GateProj, Map::UpProj, Map::DownProj].map(|of| map(of).of(layer));
        let (inner, k) = self.matrix(gate);
        let inner = share.of(inner);
        let gate_up = join([gate, up], &Window::rows(inner.clone()), [inner.len(), k])?;
        let fp8 = gate_up.format == WeightFormat::Fp8;
        Ok(Mlp { gate_up, down: self.window_for(down, &Window::columns(inner), fp8)? })
    }

    /// Whether experts of a layer read what weights are already put on.
    fn scales_inputs(&self, layer: Layer) -> bool {
        self.spec.layers[layer.0].mlp.moe().is_some_and(|moe| moe.scaled_inputs)
    }

    /// Maps of one input, rows after rows, as one, which is held decoded.
    pub(crate) fn rows(&self, parts: &[Part]) -> Result<Weight, ModelError> {
        let (whole, k) = (Window::whole(), self.matrix(parts[0]).1);
        let n = parts.iter().map(|&part| self.matrix(part).0).sum();
        let name =
            format!("{} to {}", self.name(parts[0], &whole), self.name(parts[parts.len() - 1], &whole));
        self.held(&name, WeightShape::Matrix { n, k }, || {
            self.joined(parts.iter().map(|&part| (part, whole.clone())), vec![n, k])
        })
    }

    /// Vectors one after the other, as one.
    pub(crate) fn vectors(&self, parts: &[(Part, Window)]) -> Result<Weight, ModelError> {
        let n = parts.iter().map(|(part, window)| self.shape(*part, window).parameters()).sum();
        let [Some((first, rows)), Some((last, _))] = [parts.first(), parts.last()] else {
            unreachable!("no vectors are joined. This is a bug.")
        };
        let name = format!("{} to {}", self.name(*first, rows), self.name(*last, rows));
        self.held(&name, WeightShape::Vector { n }, || self.joined(parts.iter().cloned(), vec![n]))
    }

    /// Parts of one format, one after the other.
    fn joined(
        &self,
        parts: impl IntoIterator<Item = (Part, Window)>,
        shape: Vec<usize>,
    ) -> Result<Vec<Tensor>, ModelError> {
        let mut whole = Tensor { dtype: DType::F32, shape, bytes: Vec::new() };
        for (part, window) in parts {
            let tensor = self.read(part, &window)?;
            if !whole.bytes.is_empty() && whole.dtype != tensor.dtype {
                let names = self.spec.locate(part).sources;
                return Err(ModelError::Weights {
                    file: self.source.place(&names[0].name),
                    problem: format!(
                        "tensor `{}` is {}, but those beside it are {}; fetch the weights again",
                        names[0].name, tensor.dtype, whole.dtype
                    ),
                });
            }
            whole.dtype = tensor.dtype;
            whole.bytes.extend(tensor.bytes);
        }
        Ok(vec![whole])
    }

    /// A norm of the residual stream, with its bias, if the model's norms have one.
    pub(crate) fn norm(&self, weight: Part, bias: Part) -> Result<NormWeights, ModelError> {
        let bias = self.spec.norm.bias.then(|| self.part(bias));
        Ok(NormWeights { weight: self.part(weight)?, bias: bias.transpose()? })
    }

    /// A vector with a factor on it.
    pub(crate) fn scaled(&self, part: Part, factor: f32) -> Result<Weight, ModelError> {
        if factor == 1.0 {
            return self.part(part);
        }
        let whole = Window::whole();
        self.held(&format!("{} times {factor}", self.name(part, &whole)), self.shape(part, &whole), || {
            let tensor = self.read(part, &whole)?;
            let scaled = tensor.floats().into_iter().map(|value| factor * value);
            Ok(vec![Tensor::of_floats(tensor.shape, scaled)])
        })
    }

    /// A part that is one number.
    pub(crate) fn number(&self, part: Part) -> Result<f32, ModelError> {
        Ok(self.read(part, &Window::whole())?.floats()[0])
    }

    /// A router that reads rows under weights of its own, as a map of rows under those of the norm that experts read.
    pub(crate) fn scaled_router(&self, layer: Layer) -> Result<Weight, ModelError> {
        let floats = |part: LayerPart| -> Result<Vec<f32>, ModelError> {
            Ok(self.read(part.of(layer), &Window::whole())?.floats())
        };
        let router = LayerPart::Router.of(layer);
        let (n, k) = self.matrix(router);
        let name = format!("{} under weights of its own", self.name(router, &Window::whole()));
        self.held(&name, WeightShape::Matrix { n, k }, || {
            let (own, norm) = (floats(LayerPart::RouterScale)?, floats(LayerPart::PostAttentionNorm)?);
            if let Some(at) = norm.iter().position(|&weight| weight == 0.0) {
                let source = &self.spec.locate(LayerPart::PostAttentionNorm.of(layer)).sources[0].name;
                let problem = format!(
                    "element {at} of `{source}` is 0, but the router reads what experts do not: this is not supported"
                );
                return Err(ModelError::Weights { file: self.source.place(source), problem });
            }
            let root = (k as f32).sqrt();
            let factors: Vec<f32> = own.iter().zip(&norm).map(|(own, norm)| own / (norm * root)).collect();
            let rows = floats(LayerPart::Router)?;
            let scaled = rows.iter().zip(factors.iter().cycle()).map(|(weight, factor)| weight * factor);
            Ok(vec![Tensor::of_floats(vec![n, k], scaled)])
        })
    }

    /// Numbers computed from the configuration rather than stored.
    pub(crate) fn vector(&self, name: &str, values: &[f32]) -> Result<Weight, ModelError> {
        let tensor = Tensor::of_floats(vec![values.len()], values.iter().copied());
        self.held(name, WeightShape::Vector { n: values.len() }, || Ok(vec![tensor]))
    }

    /// The number under the first of some names that there is, which cached codes are multiplied with.
    pub(crate) fn scale_of_cache(
        &self,
        names: impl IntoIterator<Item = String>,
    ) -> Result<Option<f32>, ModelError> {
        for name in names {
            let Some(stored) = self.source.find(&name)? else { continue };
            let refused = |problem: String| {
                let problem = format!("`{name}` {problem}; leave --kv-cache-dtype out");
                ModelError::Weights { file: self.source.place(&name), problem }
            };
            let (dtype, count) = (stored.dtype.plain(), stored.shape.iter().product::<usize>());
            let Some(dtype) = dtype.filter(|_| count == 1) else {
                let found = format!("is {} of shape {:?}", stored.dtype, stored.shape);
                return Err(refused(format!(
                    "{found}, but a layer's keys or values have one scale in a plain format"
                )));
            };
            let mut bytes = vec![0; dtype.bytes()];
            self.source.fill(&name, 0, &mut bytes)?;
            let scale = Tensor { dtype, shape: vec![1], bytes }.floats()[0];
            if !(scale > 0.0 && scale.is_finite()) {
                return Err(refused(format!("is {scale}, which no keys or values can be divided by")));
            }
            return Ok(Some(scale));
        }
        Ok(None)
    }

    /// A matrix that is not held in codes, but as what they mean.
    pub(crate) fn decoded(&self, part: Part) -> Result<Weight, ModelError> {
        let (whole, (n, k)) = (Window::whole(), self.matrix(part));
        let (shape, name) = (WeightShape::Matrix { n, k }, format!("{} decoded", self.name(part, &whole)));
        if let Some(weight) = self.device.find(&name) {
            return Ok(weight);
        }
        let Some(codes) = self.codes(shape, &[part], &whole)? else { return self.part(part) };
        self.held(&name, shape, || {
            let mut numbers = vec![0.0f32; n * k];
            for (row, numbers) in numbers.chunks_exact_mut(k.max(1)).enumerate() {
                codes[0].decode(row, numbers);
            }
            Ok(vec![Tensor::of_floats(vec![n, k], numbers)])
        })
    }

    /// A matrix whose rows become its columns.
    pub(crate) fn transposed(&self, part: Part) -> Result<Weight, ModelError> {
        let (n, k) = self.matrix(part);
        let window = Window::whole();
        let name = format!("{} transposed", self.name(part, &window));
        self.held(&name, WeightShape::Matrix { n: k, k: n }, || {
            Ok(vec![self.read(part, &window)?.transposed()])
        })
    }

    /// The map from cached rows of latent attention, `[c, k_r]`, to the keys of some heads, one after the other: each is
    /// `KeyUp·c`, then `k_r` as it is. `[heads · (nope + rope), kv_lora + rope]`
    pub(crate) fn keys_of_rows(
        &self,
        layer: Layer,
        spec: &MlaSpec,
        heads: &Range<usize>,
    ) -> Result<Weight, ModelError> {
        let MlaSpec { kv_lora, nope, rope, .. } = *spec;
        let (n, k) = (heads.len() * (nope + rope), kv_lora + rope);
        let name = format!("keys of rows {layer:?} {heads:?}");
        self.held(&name, WeightShape::Matrix { n, k }, || {
            let mut rows = vec![0.0f32; n * k];
            for (head, rows) in heads.clone().zip(rows.chunks_exact_mut((nope + rope) * k)) {
                let up = self.read(LayerPart::KeyUp(head).of(layer), &Window::whole())?.floats();
                for (row, up) in rows.chunks_exact_mut(k).zip(up.chunks_exact(kv_lora)) {
                    row[..kv_lora].copy_from_slice(up);
                }
                for turned in 0..rope {
                    rows[(nope + turned) * k + kv_lora + turned] = 1.0;
                }
            }
            Ok(vec![Tensor::of_floats(vec![n, k], rows)])
        })
    }

    /// The map from latents to the values of some heads, one after the other `[heads · value, kv_lora]`.
    pub(crate) fn values_of_latents(
        &self,
        layer: Layer,
        spec: &MlaSpec,
        heads: &Range<usize>,
    ) -> Result<Weight, ModelError> {
        let (n, k) = (heads.len() * spec.value, spec.kv_lora);
        let name = format!("values of latents {layer:?} {heads:?}");
        let parts = heads.clone().map(|head| (LayerPart::ValueUp(head).of(layer), Window::whole()));
        self.held(&name, WeightShape::Matrix { n, k }, || self.joined(parts, vec![n, k]))
    }

    /// Windows of parts that make one weight: in the codes that they are kept in, if they all have one format and the device
    /// holds it, else decoded. With `fp8` its rows may be wanted as codes too.
    fn map(
        &self,
        name: &str,
        shape: WeightShape,
        parts: &[Part],
        window: &Window,
        fp8: bool,
    ) -> Result<Weight, ModelError> {
        if let Some(weight) = self.device.find(name) {
            return Ok(weight);
        }
        if let Some(weight) = self.drawn_codes(name, shape, parts, window, fp8)? {
            return Ok(weight);
        }
        if let Some(codes) = self.codes(shape, parts, window)? {
            if fp8 && let Some(weight) = self.device.load_fp8(name, shape, &codes)? {
                return Ok(weight);
            }
            return Ok(self.device.load_codes(name, shape, &codes)?);
        }
        if let Some(drawn) = self.drawn(parts, window)?
            && let Some(weight) = self.device.draw(name, shape, &drawn)?
        {
            return Ok(weight);
        }
        self.held(name, shape, || parts.iter().map(|&part| self.read(part, window)).collect())
    }

    /// Parts that are made rather than stored and quantised, if the device does both.
    fn drawn_codes(
        &self,
        name: &str,
        shape: WeightShape,
        parts: &[Part],
        window: &Window,
        fp8: bool,
    ) -> Result<Option<Weight>, ModelError> {
        let Some(target) = self.source.quantises() else { return Ok(None) };
        for &part in parts {
            if held_format(self.spec, self.source, part, window)?.is_none() {
                return Ok(None);
            }
        }
        let Some(drawn) = self.drawn(parts, window)? else { return Ok(None) };
        if fp8 && let Some(weight) = self.device.draw_fp8(name, shape, target, &drawn)? {
            return Ok(Some(weight));
        }
        Ok(self.device.draw_codes(name, shape, target, &drawn)?)
    }

    /// Parts that are made rather than stored; nothing unless all of them are.
    fn drawn(&self, parts: &[Part], window: &Window) -> Result<Option<Vec<Drawn>>, ModelError> {
        if parts.iter().any(|&part| self.spec.is_less_one(part)) {
            return Ok(None);
        }
        parts.iter().map(|&part| self.source.drawn(&self.spec.locate(part), window)).collect()
    }

    /// The codes of parts that can be held in them.
    fn codes(
        &self,
        shape: WeightShape,
        parts: &[Part],
        window: &Window,
    ) -> Result<Option<Vec<Codes>>, ModelError> {
        if !shape.is_map() {
            return Ok(None);
        }
        let formats = parts.iter().map(|&part| held_format(self.spec, self.source, part, window));
        let formats = formats.collect::<Result<Vec<_>, _>>()?;
        let alike = formats.iter().all(|format| format.is_some() && format == &formats[0]);
        let Some(format) = formats[0].filter(|_| alike) else { return Ok(None) };
        if !self.device.holds(&format) {
            return match self.source.quantises() {
                None => Ok(None),
                Some(target) => Err(ModelError::Device(DeviceError::Unsupported(format!(
                    "this processor holds no weights as {format}: leave out --quantization {target}"
                )))),
            };
        }
        parts.iter().map(|&part| self.codes_of(part, window)).collect()
    }

    /// How the model's first expert is held if it is in codes, by which all experts are priced: ranks that plan together must
    /// find the same.
    pub(crate) fn coded_experts(&self) -> Result<Option<WeightCost>, ModelError> {
        let mut layers = self.spec.layers.iter().enumerate();
        let Some((layer, _)) = layers.find_map(|(layer, of)| Some((layer, of.mlp.moe()?))) else {
            return Ok(None);
        };
        let part = LayerPart::Expert(Expert(0), Map::UpProj).of(Layer(layer));
        let format = held_format(self.spec, self.source, part, &Window::whole())?;
        let held = format.filter(|format| self.device.holds(format));
        Ok(held.map(|format| {
            let fp8_rows = self.device.fp8_rows() && may_take_fp8_rows(self.spec, part, &format);
            let bits = if fp8_rows { FP8_BITS } else { format.bits() };
            WeightCost { millibits: (1000.0 * bits) as u64, fp8_rows }
        }))
    }

    /// The codes of a part, as they are kept or as it is quantised.
    fn codes_of(&self, part: Part, window: &Window) -> Result<Option<Codes>, ModelError> {
        let located = self.spec.locate(part);
        let Some(target) = self.source.quantises() else { return self.source.codes(&located, window) };
        let tensor = self.read(part, window)?;
        let mut weights = vec![0.0; tensor.shape.iter().product()];
        tensor.as_bytes().convert(0, &mut weights);
        let name = &located.sources[0].name;
        target.codes(name, &weights, tensor.shape[1]).map_err(|error| ModelError::Weights {
            file: self.source.place(name),
            problem: error.to_string(),
        })
    }

    /// The weight of that name, loaded now unless another rank of the process already has.
    fn held(
        &self,
        name: &str,
        shape: WeightShape,
        read: impl FnOnce() -> Result<Vec<Tensor>, ModelError>,
    ) -> Result<Weight, ModelError> {
        if let Some(weight) = self.device.find(name) {
            return Ok(weight);
        }
        let tensors = read()?;
        let bytes: Vec<_> = tensors.iter().map(Tensor::as_bytes).collect();
        Ok(self.device.load(name, shape, &bytes)?)
    }

    /// Reads a part, all of whose numbers are finite. A router's correction bias alone may hold infinities: they put experts out
    /// of reach.
    fn read(&self, part: Part, window: &Window) -> Result<Tensor, ModelError> {
        let located = self.spec.locate(part);
        let mut tensor = self.source.read(&located, window)?;
        if self.spec.is_less_one(part) {
            tensor = tensor.plus_one();
        }
        let infinite = matches!(part, Part::Layer(_, LayerPart::CorrectionBias));
        let Some(at) = first_not_finite(&tensor, infinite) else { return Ok(tensor) };
        let source = self.stored(&located);
        let first = |range: &Option<Range<usize>>| range.as_ref().map_or(0, |range| range.start);
        let width = tensor.shape.get(1).copied().unwrap_or(1);
        let (row, column) = (first(&window.rows) + at / width, first(&window.columns) + at % width);
        let (row, column) = if source.transposed { (column, row) } else { (row, column) };
        Err(ModelError::Weights {
            file: self.source.place(&source.name),
            problem: format!(
                "tensor `{}` holds a NaN or an infinity, in row {}, column {column}: the file is damaged, or its \
                 training had failed; fetch it again, or use another checkpoint",
                source.name,
                source.first_row + row * source.turn.of + source.turn.at
            ),
        })
    }

    /// The place of a part that the source has; the published one where parts of it are stored one by one.
    fn stored<'l>(&self, located: &'l Located) -> &'l Source {
        let there = |source: &&Source| self.source.find(&source.name).is_ok_and(|found| found.is_some());
        located.sources.iter().find(there).unwrap_or(&located.sources[0])
    }

    /// Rows and columns of a matrix.
    fn matrix(&self, part: Part) -> (usize, usize) {
        let WeightShape::Matrix { n, k } = self.spec.shape(part) else {
            unreachable!("{part:?} is no matrix. This is a bug.")
        };
        (n, k)
    }

    fn shape(&self, part: Part, window: &Window) -> WeightShape {
        let length = |range: &Option<Range<usize>>, whole| range.as_ref().map_or(whole, |range| range.len());
        let (rows, columns) = (&window.rows, &window.columns);
        match self.spec.shape(part) {
            WeightShape::Matrix { n, k } => WeightShape::Matrix { n: length(rows, n), k: length(columns, k) },
            WeightShape::Vector { n } => WeightShape::Vector { n: length(rows, n) },
            whole => whole,
        }
    }

    fn name(&self, part: Part, window: &Window) -> String {
        let range = |what, range: &Option<Range<usize>>| {
            range.as_ref().map_or_else(String::new, |range| format!(" {what} {range:?}"))
        };
        let located = self.spec.locate(part);
        let place = self.stored(&located).place();
        format!("{place}{}{}", range("rows", &window.rows), range("columns", &window.columns))
    }
}

/// Where the first NaN, or the first infinity unless they are allowed, is among a tensor's elements.
fn first_not_finite(tensor: &Tensor, infinite: bool) -> Option<usize> {
    /// Elements looked at together: few enough to stay in the caches that reading left them in.
    const PIECE: usize = 4096;
    fn first<T: Copy, const SIZE: usize>(
        bytes: &[u8],
        number: impl Fn([u8; SIZE]) -> T,
        refused: impl Fn(T) -> bool,
    ) -> Option<usize> {
        let (elements, _) = bytes.as_chunks::<SIZE>();
        let any = |piece: &[[u8; SIZE]]| piece.iter().fold(false, |any, &x| any | refused(number(x)));
        let piece = elements.chunks(PIECE).position(any)?;
        let within = elements[piece * PIECE..].iter().position(|&x| refused(number(x)))?;
        Some(piece * PIECE + within)
    }
    // Without its sign, what is above the largest finite number is infinite, and what is above that is a NaN.
    let short = |infinity: u16| move |bits: u16| bits & 0x7fff >= infinity + u16::from(infinite);
    let long = |bits: u32| bits & 0x7fff_ffff >= f32::INFINITY.to_bits() + u32::from(infinite);
    match tensor.dtype {
        DType::BF16 => first(&tensor.bytes, u16::from_le_bytes, short(0x7f80)),
        DType::F16 => first(&tensor.bytes, u16::from_le_bytes, short(0x7c00)),
        DType::F32 => first(&tensor.bytes, u32::from_le_bytes, long),
        DType::U32 | DType::E4M3 => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use half::{bf16, f16};

    #[test]
    fn the_first_number_that_is_none() {
        let bytes = |values: &[f32], dtype| -> Vec<u8> {
            let of = |&value: &f32| match dtype {
                DType::BF16 => bf16::from_f32(value).to_le_bytes().to_vec(),
                DType::F16 => f16::from_f32(value).to_le_bytes().to_vec(),
                _ => value.to_le_bytes().to_vec(),
            };
            values.iter().flat_map(of).collect()
        };
        for dtype in [DType::F32, DType::BF16, DType::F16] {
            let tensor =
                |values: &[f32]| Tensor { dtype, shape: vec![values.len()], bytes: bytes(values, dtype) };
            let largest = if dtype == DType::F16 { 65504.0 } else { 3.3e38 };
            let mut values = vec![-largest; 10_000];
            assert_eq!(first_not_finite(&tensor(&values), false), None);
            for infinity in [f32::INFINITY, f32::NEG_INFINITY] {
                values[9_000] = infinity;
                assert_eq!(first_not_finite(&tensor(&values), false), Some(9_000), "{dtype}");
                assert_eq!(first_not_finite(&tensor(&values), true), None, "{dtype}");
            }
            for (at, nan) in [(9_999, f32::NAN), (4_097, -f32::NAN), (0, f32::NAN)] {
                values[at] = nan;
                assert_eq!(first_not_finite(&tensor(&values), true), Some(at), "{dtype}");
            }
        }
    }
}
