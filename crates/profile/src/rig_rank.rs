//! One rank that runs MoE layers of given sizes: its weights and its input, made up.

use epsmoe_base::{DType, Fault, Lane, Layer, Mix, Place, hash_bytes};
use epsmoe_device::op::{Embed, HostToDevice, Score, TopKRouter};
use epsmoe_device::{Backend, Buffer, DeviceError, TensorBytes, Weight, WeightShape};
use epsmoe_pipeline::{Mlp, MoeLayer, SharedMlp};
use epsmoe_plan::{LayerSizes, SlotMap};
use std::sync::Arc;

/// The widths of a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct RigShape {
    /// Hidden width H.
    pub hidden: usize,
    /// Inner width of an expert, I.
    pub inner: usize,
    /// Experts over all ranks, E.
    pub experts: usize,
    /// Experts of a token, k.
    pub top_k: usize,
    /// Inner width of the shared expert; 0 without one.
    pub shared_inner: usize,
}

impl RigShape {
    /// In the order of the fields.
    pub(crate) fn of([hidden, inner, experts, top_k, shared_inner]: [usize; 5]) -> Self {
        RigShape { hidden, inner, experts, top_k, shared_inner }
    }

    /// What prices its work for these ranks and this format.
    pub fn layer(&self, map: &SlotMap, dtype: DType) -> LayerSizes {
        LayerSizes {
            hidden: self.hidden,
            inner: self.inner,
            shared_inner: self.shared_inner,
            top_k: self.top_k,
            ..LayerSizes::of(map, dtype)
        }
    }

    /// Bytes of a layer's experts.
    pub(crate) fn bytes(&self, dtype: DType) -> usize {
        3 * self.hidden * self.inner * self.experts * dtype.bytes()
    }

    /// A router that takes the best of all experts.
    pub(crate) fn plain_router(&self) -> TopKRouter {
        let top_k = self.top_k;
        TopKRouter { top_k, score: Score::Softmax, groups: None, normalise: true, scale: 1.0 }
    }
}

/// A rank of any processor.
pub(crate) struct RigRank<B> {
    pub(crate) shape: RigShape,
    pub(crate) router: TopKRouter,
    pub(crate) map: Arc<SlotMap>,
    pub(crate) device: Arc<B>,
}

impl<B: Backend> RigRank<B> {
    /// The weights of a layer, made up under its number, or found.
    pub(crate) fn load(&self, layer: usize) -> Result<MoeLayer, DeviceError> {
        let RigShape { hidden, inner, experts, shared_inner, .. } = self.shape;
        let take = |name: String, shape: WeightShape| -> Result<Weight, DeviceError> {
            let name = format!("{hidden}x{inner} {layer} {name}");
            match self.device.find(&name) {
                Some(weight) => Ok(weight),
                None => {
                    let (tensors, dimensions) = shape.sources();
                    let bytes = numbers(&name, dimensions.iter().product());
                    let tensors = vec![TensorBytes { dtype: DType::BF16, bytes: &bytes }; tensors];
                    self.device.load(&name, shape, &tensors)
                }
            }
        };
        let mlp = |name: String, inner: usize| -> Result<Mlp, DeviceError> {
            Ok(Mlp {
                gate_up: take(format!("{name} {inner} up"), WeightShape::GateUp { inner, k: hidden })?,
                down: take(format!("{name} {inner} down"), WeightShape::Matrix { n: hidden, k: inner })?,
            })
        };
        let shared = (shared_inner > 0).then(|| mlp("shared".into(), shared_inner)).transpose()?;
        Ok(MoeLayer {
            router_bias: None,
            activation: None,
            layer: Layer(layer),
            router_weight: take(format!("router {experts}"), WeightShape::Matrix { n: experts, k: hidden })?,
            bias: None,
            scales: None,
            router: self.router,
            experts: self
                .map
                .experts_on(self.device.rank())
                .map(|expert| mlp(format!("expert {}", expert.0), inner))
                .collect::<Result<_, _>>()?,
            slots: Arc::clone(&self.map),
            shared: shared.map(|mlp| SharedMlp { mlp, gate: None }),
            identities: None,
            scaled_inputs: false,
        })
    }

    /// Fills `x` with random rows, of which the first `different` are, called `name`.
    pub(crate) fn fill(&self, x: &Buffer, name: &str, different: usize) -> Result<(), DeviceError> {
        let (device, width, rows) = (&self.device, x.width, x.rows.min(different));
        let name = format!("input {name} {width} {}", x.rows);
        let bytes = numbers(&name, rows * width);
        let shape = WeightShape::Table { rows, width };
        let table = device.load(&name, shape, &[TensorBytes { dtype: DType::BF16, bytes: &bytes }])?;
        let ids = device.allocate("ids", DType::U32, x.rows, 1)?;
        let words: Vec<u32> = (0..x.rows as u32).map(|row| row % rows.max(1) as u32).collect();
        let (lane, place) = (Lane::Compute, Place::default());
        device.enqueue(lane, place, HostToDevice { words: words.into(), out: ids.clone() })?;
        device.enqueue(lane, place, Embed { ids, table, out: x.clone() })
    }

    /// A hash of what a buffer holds.
    pub(crate) fn bits(&self, y: &Buffer) -> Result<u64, Fault> {
        let numbers = self.device.read_f32(y)?;
        let bytes: Vec<u8> = numbers.iter().flat_map(|number| number.to_le_bytes()).collect();
        Ok(hash_bytes(&bytes))
    }
}

/// So many small numbers of both signs, in bfloat16.
fn numbers(name: &str, elements: usize) -> Vec<u8> {
    let mut mix = Mix::keyed(0, &[hash_bytes(name.as_bytes())]);
    let mut bytes = Vec::with_capacity(2 * elements + 8);
    while bytes.len() < 2 * elements {
        // Sign and fraction at random, and an exponent of 1/64.
        let word = mix.next_u64() & 0x807f_807f_807f_807f | 0x3c80_3c80_3c80_3c80;
        bytes.extend_from_slice(&word.to_le_bytes());
    }
    bytes.truncate(2 * elements);
    bytes
}
