//! Parts of a model become weights of a device: read once, each rank only what it holds.

use crate::{LayerPart, Map, ModelError, ModelSpec, Part, Tensor, WeightSource, Window};
use epsmoe_base::Layer;
use epsmoe_device::{Backend, Weight, WeightShape};
use epsmoe_pipeline::Mlp;

/// Reads the parts of one model into one device.
pub(crate) struct Loader<'a, B> {
    pub(crate) spec: &'a ModelSpec,
    pub(crate) source: &'a dyn WeightSource,
    pub(crate) device: &'a B,
}

impl<B: Backend> Loader<'_, B> {
    /// A part as it is.
    pub(crate) fn part(&self, part: Part) -> Result<Weight, ModelError> {
        let name = self.name(part);
        // With tied embeddings one stored tensor serves as a table and as a map.
        let key = if part == Part::LmHead { format!("{name} as output") } else { name };
        self.held(&key, self.spec.shape(part), || Ok(vec![self.read(part, &Window::whole())?]))
    }

    /// A part of a layer as it is.
    pub(crate) fn layer(&self, layer: Layer, part: LayerPart) -> Result<Weight, ModelError> {
        self.part(part.of(layer))
    }

    /// A gated MLP, its gate and up maps side by side.
    pub(crate) fn mlp(&self, layer: Layer, map: impl Fn(Map) -> LayerPart) -> Result<Mlp, ModelError> {
        let (gate, up, down) = (map(Map::Gate).of(layer), map(Map::Up).of(layer), map(Map::Down).of(layer));
        let WeightShape::Matrix { n: inner, k } = self.spec.shape(gate) else {
            unreachable!("the maps of an MLP are matrices. This is a bug.")
        };
        let gate_up = self.held(&format!("{} and up", self.name(gate)), WeightShape::GateUp { inner, k }, || {
            Ok(vec![self.read(gate, &Window::whole())?, self.read(up, &Window::whole())?])
        })?;
        Ok(Mlp { gate_up, down: self.part(down)? })
    }

    /// Numbers computed from the configuration rather than stored.
    pub(crate) fn vector(&self, name: &str, values: &[f32]) -> Result<Weight, ModelError> {
        let bytes = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        let tensor = Tensor { dtype: epsmoe_base::DType::F32, shape: vec![values.len()], bytes };
        self.held(name, WeightShape::Vector { n: values.len() }, || Ok(vec![tensor]))
    }

    /// Some rows of a part, transposed or not, under a name of its own.
    pub(crate) fn piece(
        &self,
        part: Part,
        name: &str,
        window: Window,
        transposed: bool,
    ) -> Result<Weight, ModelError> {
        let WeightShape::Matrix { n, k } = self.spec.shape(part) else {
            unreachable!("pieces are cut from matrices. This is a bug.")
        };
        let rows = window.rows.as_ref().map_or(n, |rows| rows.len());
        let shape = if transposed { WeightShape::Matrix { n: k, k: rows } } else { WeightShape::Matrix { n: rows, k } };
        self.held(&format!("{} {name}", self.name(part)), shape, || {
            let tensor = self.read(part, &window)?;
            Ok(vec![if transposed { tensor.transposed() } else { tensor }])
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

    fn read(&self, part: Part, window: &Window) -> Result<Tensor, ModelError> {
        self.source.read(&self.spec.locate(part), window)
    }

    fn name(&self, part: Part) -> String {
        format!("{part:?}")
    }
}
