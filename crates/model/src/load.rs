//! Parts of a model become weights of a device: read once, each rank only what it holds.

use crate::parallel::{Layout, Share};
use crate::{LayerPart, Map, ModelError, ModelSpec, Part, Tensor, WeightSource, Window};
use epsmoe_base::Layer;
use epsmoe_device::{Backend, Weight, WeightShape};
use epsmoe_pipeline::Mlp;
use std::ops::Range;

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

    /// Some rows or columns of a part; named after them, so that ranks that hold the same ones share them.
    pub(crate) fn window(&self, part: Part, window: &Window) -> Result<Weight, ModelError> {
        let name = self.name(part, window);
        // With tied embeddings one stored tensor serves as a table and as a map.
        let key = if part == Part::LmHead { format!("{name} as output") } else { name };
        self.held(&key, self.shape(part, window), || Ok(vec![self.read(part, window)?]))
    }

    /// A share of the inner width of a gated MLP: rows of its gate and up maps, which lie side by side, and
    /// columns of its down map.
    pub(crate) fn mlp(
        &self,
        layer: Layer,
        share: Share,
        map: impl Fn(Map) -> LayerPart,
    ) -> Result<Mlp, ModelError> {
        let (gate, up, down) =
            (map(Map::GateProj).of(layer), map(Map::UpProj).of(layer), map(Map::DownProj).of(layer));
        let (inner, k) = self.matrix(gate);
        let inner = share.of(inner);
        let rows = Window::rows(inner.clone());
        let shape = WeightShape::GateUp { inner: inner.len(), k };
        let gate_up = self.held(&format!("{} and up", self.name(gate, &rows)), shape, || {
            Ok(vec![self.read(gate, &rows)?, self.read(up, &rows)?])
        })?;
        Ok(Mlp { gate_up, down: self.window(down, &Window::columns(inner))? })
    }

    /// Numbers computed from the configuration rather than stored.
    pub(crate) fn vector(&self, name: &str, values: &[f32]) -> Result<Weight, ModelError> {
        let bytes = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        let tensor = Tensor { dtype: epsmoe_base::DType::F32, shape: vec![values.len()], bytes };
        self.held(name, WeightShape::Vector { n: values.len() }, || Ok(vec![tensor]))
    }

    /// Some rows of a matrix, which become its columns.
    pub(crate) fn transposed(&self, part: Part, rows: Range<usize>) -> Result<Weight, ModelError> {
        let (_, k) = self.matrix(part);
        let (shape, window) = (WeightShape::Matrix { n: k, k: rows.len() }, Window::rows(rows));
        self.held(&format!("{} transposed", self.name(part, &window)), shape, || {
            Ok(vec![self.read(part, &window)?.transposed()])
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
        format!("{part:?}{}{}", range("rows", &window.rows), range("columns", &window.columns))
    }
}
