//! What copies cost the products that run beside them, and what products cost the copies.

use super::bench::{Bench, LARGEST, time_until};
use super::beside::Work;
use super::{Figure, Table};
use crate::cuda::{CudaBackend, CudaOptions, CudaWeights};
use crate::op::{Embed, Gemm, HostToDevice};
use crate::{Backend, Buffer, DeviceError, Reserve, TensorBytes, Weight, WeightShape};
use epsmoe_base::{DType, Deadline, Lane, Mix, Place, Rank};
use half::bf16;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

const SIZES: [usize; 6] = [64 << 10, 256 << 10, 1 << 20, 4 << 20, 16 << 20, LARGEST];
/// Rows, columns and depth of the product.
const SHAPE: [usize; 3] = [8192, 8192, 5120];
const PRODUCTS: usize = 8;
/// Copies in flight.
const AHEAD: usize = 8;

/// A product of random numbers to be timed again and again.
struct Product {
    backend: CudaBackend,
    x: Buffer,
    weight: Weight,
    out: Buffer,
}

impl Product {
    fn new(bench: &Bench) -> Result<Self, DeviceError> {
        let [m, n, k] = SHAPE;
        let weights = CudaWeights::new(&bench.device)?;
        let backend = CudaBackend::new(Rank(0), &bench.device, &weights, CudaOptions::new(DType::BF16))?;
        backend.set_recording(true);
        let mut mix = Mix::new(1);
        let numbers: Vec<u8> = (0..n * k).flat_map(|_| bf16::from_f32(mix.signed()).to_le_bytes()).collect();
        let tensors = [TensorBytes { dtype: DType::BF16, bytes: &numbers }];
        let weight = backend.load("probe weight", WeightShape::Matrix { n, k }, &tensors)?;
        let table = backend.load("probe rows", WeightShape::Table { rows: n, width: k }, &tensors)?;
        let ids = backend.allocate("ids", DType::U32, m, 1)?;
        let x = backend.allocate("x", DType::BF16, m, k)?;
        let out = backend.allocate("out", DType::BF16, m, n)?;
        let (lane, place) = (Lane::Compute, Place::default());
        let words = (0..m).map(|row| (row % n) as u32).collect();
        backend.enqueue(lane, place, HostToDevice { words, out: ids.clone() })?;
        backend.enqueue(lane, place, Embed { ids, table, out: x.clone() })?;
        Ok(Product { backend, x, weight, out })
    }

    /// The median time of some products, in nanoseconds.
    fn time(&self) -> Result<f64, DeviceError> {
        let (lane, place) = (Lane::Compute, Place::default());
        for _ in 0..PRODUCTS {
            let op = Gemm::linear(self.x.clone(), &self.weight, self.out.clone());
            self.backend.enqueue(lane, place, op)?;
        }
        let deadline = Deadline::after(Duration::from_secs(10));
        self.backend.wait(&self.backend.record(lane), deadline)?;
        let records = self.backend.take_records();
        let products = records.iter().filter(|record| record.name == "gemm");
        let mut times: Vec<u64> = products.map(|record| record.end_ns - record.start_ns).collect();
        times.sort_unstable();
        Ok(times.get(times.len() / 2).map_or(f64::NAN, |&time| time as f64))
    }
}

/// For each kind and size of copies that run all the time: how many times as long a product takes, and the copies'
/// GB/s alone and beside products.
pub(super) fn of_products(bench: &Bench) -> Result<Table, DeviceError> {
    let product = Product::new(bench)?;
    product.time()?;
    let mut rows = Vec::new();
    for kind in [Work::Within, Work::RowsWithin, Work::ToDevice, Work::ToHost] {
        for size in SIZES {
            let work = kind(size);
            let nap = || {
                std::thread::sleep(Duration::from_millis(5));
                Ok(f64::NAN)
            };
            let (_, rate_alone) = beside_copies(bench, work, nap)?;
            let before = product.time()?;
            let (beside, rate_beside) = beside_copies(bench, work, || product.time())?;
            let after = product.time()?;
            let figures = [2.0 * beside / (before + after), rate_alone, rate_beside];
            rows.push((work.name(), figures.map(Figure::Measured).into()));
        }
    }
    let [m, n, k] = SHAPE;
    Ok(Table {
        title: format!("Copies all the time beside products [{m}, {k}] x [{n}, {k}]"),
        unit: "times as long; GB/s copied",
        columns: ["product's time", "copies alone", "copies beside"].map(str::to_owned).into(),
        rows,
    })
}

/// Runs something while a thread keeps copies in flight; what it gave, and the copies' GB/s.
fn beside_copies(
    bench: &Bench,
    work: Work,
    mut run: impl FnMut() -> Result<f64, DeviceError>,
) -> Result<(f64, f64), DeviceError> {
    let (stop, copied) = (AtomicBool::new(false), AtomicUsize::new(0));
    std::thread::scope(|scope| {
        let copies = scope.spawn(|| -> Result<(), DeviceError> {
            let stream = bench.stream()?;
            let mut flying = std::collections::VecDeque::new();
            while !stop.load(Ordering::Relaxed) {
                if flying.len() < AHEAD {
                    work.enqueue(bench, &stream)?;
                    flying.push_back(bench.record(&stream)?);
                }
                while let Some(first) = flying.front()
                    && first.is_complete()?
                {
                    flying.pop_front();
                    copied.fetch_add(1, Ordering::Relaxed);
                }
            }
            let last = bench.record(&stream)?;
            time_until(Duration::from_secs(5), || last.is_complete())?;
            Ok(())
        });
        // The first copies are under way.
        std::thread::sleep(Duration::from_millis(1));
        let (began, before) = (Instant::now(), copied.load(Ordering::Relaxed));
        let outcome = run();
        let (time, after) = (began.elapsed(), copied.load(Ordering::Relaxed));
        stop.store(true, Ordering::Relaxed);
        match copies.join() {
            Ok(ended) => ended?,
            Err(_) => return Err(DeviceError::Unsupported("the copying thread crashed".into())),
        }
        let bytes = (work.bytes() * (after - before)) as f64;
        Ok((outcome?, bytes / time.as_secs_f64() / 1e9))
    })
}

/// The worst slowdown beside copies on the device of a mebibyte and more.
pub(super) fn of_large_copies(table: &Table) -> Option<f64> {
    let large = table.rows.iter().take(SIZES.len()).zip(SIZES).filter(|(_, size)| *size >= 1 << 20);
    large.filter_map(|(row, _)| row.1.first()?.measured()).reduce(f64::max)
}
