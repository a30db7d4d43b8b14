//! The CPU: our own kernels over packed weights, on threads that belong to the rank's compute lane.
//!
//! [`gemm`] has the matrix products, `attention` the attention, `recurrence` the states that go on by a token, `pool` the threads; everything else is the shared
//! plain code of [`host`](crate::threaded), spread over the same threads.

mod attention;
pub mod gemm;
mod pool;
mod recurrence;

use crate::TensorBytes;
use crate::op::Epilogue;
use crate::threaded::{
    AttentionViews, Cached, Element, GemmViews, Kernels, LINE_BYTES, Pack, RecurrentToken, Slabs,
    ThreadedBackend,
};
use epsmoe_base::DType;
use epsmoe_quant::{Codes, Format};
use gemm::{ElementType, Isa, PackedMatrix, SourceRow};
use pool::ComputePool;
use std::ptr;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// The CPU as a host processor.
pub type Cpu = ThreadedBackend<CpuKernels>;

/// Kernels for one instruction set on a fixed number of threads.
pub struct CpuKernels {
    isa: Isa,
    int8_rows: bool,
    /// Only the compute lane runs on it, so the lock is never waited for.
    pool: Mutex<ComputePool>,
    /// Where packed weights lie.
    slabs: Slabs,
}

impl CpuKernels {
    /// Kernels on `threads` threads, the lane's own included.
    pub fn new(threads: usize, isa: Isa) -> Result<Self, String> {
        if threads == 0 {
            return Err("0 threads can compute nothing: give at least 1".into());
        }
        if !isa.is_supported() {
            let best = Isa::detect();
            return Err(format!(
                "this processor has no {isa}: use {best} or leave the choice to the program"
            ));
        }
        let pool = ComputePool::new(threads).map_err(|error| {
            format!(
                "the system gave this process no {threads} threads for a rank ({error}): use fewer --threads or ranks, or \
                 raise the limit (`ulimit -u`, or that of the control group)"
            )
        })?;
        Ok(CpuKernels { isa, int8_rows: false, pool: Mutex::new(pool), slabs: Slabs::default() })
    }

    /// The same kernels, which multiply weights whose codes are integers ([`multiplies_int8`]) with rows that become int8 for them.
    pub fn with_int8_rows(self) -> Self {
        CpuKernels { int8_rows: true, ..self }
    }

    /// What the threads can do at most: floating-point operations a second in float32 and bfloat16 on registers
    /// only, and bytes a second read from memory.
    pub fn peaks(&self) -> Peaks {
        let mut pool = self.pool();
        Peaks {
            float32: gemm::peak::compute(&mut pool, self.isa, ElementType::F32),
            bfloat16: gemm::peak::compute(&mut pool, self.isa, ElementType::Bf16),
            memory: gemm::peak::memory_read(&mut pool),
        }
    }

    /// Floating-point operations a second of products of `dtype` on registers only, in the next 5 ms: at the clock that
    /// the processor has just now.
    pub fn peak_now(&self, dtype: DType) -> f64 {
        gemm::peak::compute_now(&mut self.pool(), self.isa, ElementType::of(dtype))
    }

    fn pool(&self) -> MutexGuard<'_, ComputePool> {
        self.pool.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Whether weights stay in codes of this format, for activations of `dtype`.
pub fn holds(isa: Isa, _: &Format, dtype: DType) -> bool {
    // Codes are decoded as they lie, and AMX wants float32 weights in another order.
    dtype == DType::BF16 || isa != Isa::Amx
}

/// Whether rows become int8 for weights in codes of this format, where that is asked for ([`CpuKernels::with_int8_rows`]).
pub fn multiplies_int8(format: &Format) -> bool {
    gemm::int8::multiplies(format)
}

/// The most that some threads can do.
#[derive(Clone, Copy, Debug)]
pub struct Peaks {
    /// Floating-point operations a second in float32, a multiply-add counted as two.
    pub float32: f64,
    /// The same for bfloat16 products summed in float32.
    pub bfloat16: f64,
    /// Bytes a second read from memory.
    pub memory: f64,
}

impl Kernels for CpuKernels {
    type Matrix = PackedMatrix;

    fn describe(&self) -> String {
        let int8 = if self.int8_rows { ", rows in int8" } else { "" };
        format!("cpu {}, {}{int8}", self.isa, epsmoe_base::count(self.pool().threads(), "thread"))
    }

    fn pack(&self, pack: &Pack<'_>) -> Option<PackedMatrix> {
        let (mut pool, element, shape) = (self.pool(), ElementType::of(pack.dtype), [pack.n, pack.k]);
        let row = |tensor: usize| move |row: usize| source_row(&pack.tensors[tensor], row, pack.k);
        match pack.tensors.len() {
            1 => PackedMatrix::pack(&mut pool, &self.slabs, self.isa, element, shape, row(0)),
            _ => PackedMatrix::pack_gated(&mut pool, &self.slabs, self.isa, element, shape, row(0), row(1)),
        }
    }

    fn holds(&self, format: &Format, dtype: DType) -> bool {
        self.int8_rows && multiplies_int8(format) || holds(self.isa, format, dtype)
    }

    fn pack_codes(&self, matrices: &[Codes], dtype: DType) -> Option<PackedMatrix> {
        let mut pool = self.pool();
        let element = ElementType::of(dtype);
        PackedMatrix::pack_codes(&mut pool, &self.slabs, self.isa, element, self.int8_rows, matrices)
    }

    fn parallel(&self, tasks: usize, task: &(dyn Fn(usize) + Sync)) {
        self.pool().run(tasks, task);
    }

    fn gemm<X: Element, Y: Element>(
        &self,
        parts: &mut [GemmViews<'_, X, Y, PackedMatrix>],
        _: Epilogue,
        bias: Option<&[f32]>,
    ) {
        // Whether a matrix is gated was decided when it was packed, and checked with the operation.
        gemm::multiply(&mut self.pool(), parts, bias);
    }

    fn attention<T: Element, C: Cached<T>>(&self, views: AttentionViews<'_, T, C>) {
        attention::run(&mut self.pool(), self.isa, &views);
    }

    fn recurrence(&self, state: &mut [f32], token: &RecurrentToken<'_>, out: &mut [f32]) {
        recurrence::step(state, token, out);
    }
}

/// Asks for the cache line at `address`, which may be any address.
#[inline(always)]
fn prefetch(address: *const u8) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a prefetch may take any address and is in the x86-64 baseline.
    unsafe {
        std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T1 }>(address.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = address;
}

/// Asks for the cache lines of `values`.
#[inline(always)]
fn prefetch_all<T>(values: &[T]) {
    values
        .iter()
        .step_by(LINE_BYTES / size_of::<T>())
        .for_each(|value| prefetch(ptr::from_ref(value).cast()));
}

fn source_row<'a>(tensor: &TensorBytes<'a>, row: usize, k: usize) -> SourceRow<'a> {
    let width = k * tensor.dtype.bytes();
    let bytes = &tensor.bytes[row * width..][..width];
    match tensor.dtype {
        DType::BF16 => SourceRow::Bf16(bytes),
        DType::F16 => SourceRow::F16(bytes),
        // Tensors in other formats are refused before.
        DType::F32 | DType::U32 | DType::E4M3 => SourceRow::F32(bytes),
    }
}
