//! Every operation on every processor: against its definition in float64 (`definitions`), against itself
//! with other rows around (`invariance`), with weights in codes (`coded`), in codes on both sides (`fp8`, `int8`) or made on the spot (`drawn`), with arguments that do not fit (`refusals`), and on two lanes (`lanes`).
//!
//! A new processor is one line in `processors!`. A new operation does not compile until `Bench::run` knows it,
//! and fails `definitions` until it is checked there. `EPSMOE_TEST_SEED` repeats a run;
//! with `EPSMOE_TEST_ALL` a processor that is missing is a failure.

mod assignments;
mod bench;
mod coded;
mod definitions;
mod drawn;
mod fp8;
mod int8;
mod invariance;
mod lanes;
mod recurrent;
mod refusals;
mod speed;

use bench::Bench;
use epsmoe_base::{DType, Rank, env};
use epsmoe_device::Backend;
use epsmoe_device::cpu::{CpuKernels, gemm::Isa};
use epsmoe_device::cuda::{CudaBackend, CudaDevice, CudaOptions, CudaWeights};
use epsmoe_device::reference::{self, PlainKernels};
use epsmoe_device::threaded::{Fill, Kernels, ThreadedBackend, WeightStore};
use std::sync::{Arc, OnceLock};

/// A bench on a host processor.
fn host<K: Kernels>(kernels: Result<K, String>, dtype: DType) -> Result<Bench<ThreadedBackend<K>>, String> {
    let seed = env::test_seed();
    let weights = Arc::<WeightStore<_>>::default();
    let device = ThreadedBackend::new(Rank(0), kernels?, weights, reference::options(dtype, seed));
    device.map(|device| Bench::new(device, seed)).map_err(|error| error.to_string())
}

/// A bench on the first GPU.
fn cuda(dtype: DType) -> Result<Bench<CudaBackend>, String> {
    cuda_with(CudaOptions::new(dtype))
}

/// A bench on the first GPU, which is opened once.
fn cuda_with(options: CudaOptions) -> Result<Bench<CudaBackend>, String> {
    static DEVICE: OnceLock<Result<Arc<CudaDevice>, String>> = OnceLock::new();
    let device = DEVICE.get_or_init(|| CudaDevice::open(0).map_err(|error| error.to_string())).clone()?;
    let options = CudaOptions { fill: Fill::Poison, ..options };
    let backend = CudaWeights::new(&device)
        .and_then(|weights| CudaBackend::new(Rank(0), &device, &weights, options))
        .map_err(|error| error.to_string())?;
    Ok(Bench::new(backend, env::test_seed()))
}

/// Runs a suite, unless this machine has no such processor.
fn on<B: Backend>(bench: Result<Bench<B>, String>, suite: impl FnOnce(Bench<B>)) {
    match bench {
        Ok(bench) => suite(bench),
        Err(missing) if env::text("EPSMOE_TEST_ALL").is_some() => panic!("{missing}"),
        Err(missing) => eprintln!("skipped: {missing}"),
    }
}

macro_rules! processors {
    ($($name:ident: $bench:expr),* $(,)?) => {$(
        mod $name {
            use super::*;

            #[test]
            fn operations_match_their_definitions_in_float32() {
                on($bench(DType::F32), definitions::suite);
            }

            #[test]
            fn operations_match_their_definitions_in_bfloat16() {
                on($bench(DType::BF16), definitions::suite);
            }

            #[test]
            fn rows_do_not_depend_on_their_neighbours_in_float32() {
                on($bench(DType::F32), invariance::suite);
            }

            #[test]
            fn rows_do_not_depend_on_their_neighbours_in_bfloat16() {
                on($bench(DType::BF16), invariance::suite);
            }

            #[test]
            fn codes_give_the_bits_of_what_they_mean_in_float32() {
                on($bench(DType::F32), coded::suite);
            }

            #[test]
            fn codes_give_the_bits_of_what_they_mean_in_bfloat16() {
                on($bench(DType::BF16), coded::suite);
            }

            #[test]
            fn drawn_weights_are_those_that_are_brought() {
                on($bench(DType::BF16), drawn::suite);
                on($bench(DType::F32), drawn::suite);
            }

            #[test]
            fn what_does_not_fit_is_refused() {
                on($bench(DType::F32), |_| {
                    refusals::suite(|| $bench(DType::F32).expect("present a moment ago"));
                });
            }

            #[test]
            fn events_order_two_lanes() {
                on($bench(DType::F32), |_| {
                    lanes::suite(|| $bench(DType::F32).expect("present a moment ago"));
                });
            }
        }
    )*};
}

#[test]
fn products_of_fp8_codes_match_their_definition() {
    let options = CudaOptions { fp8_rows: true, ..CudaOptions::new(DType::BF16) };
    on(cuda_with(options.clone()), fp8::suite);
    on(cuda_with(CudaOptions { power_scales: true, ..options }), fp8::power_scales);
}

#[test]
fn products_of_rows_in_int8_match_their_definition() {
    for (isa, dtype) in
        Isa::ALL.into_iter().flat_map(|isa| [DType::F32, DType::BF16].map(|dtype| (isa, dtype)))
    {
        on(host(CpuKernels::new(2, isa).map(CpuKernels::with_int8_rows), dtype), int8::suite);
    }
}

processors! {
    plain: |dtype| host(Ok(PlainKernels), dtype),
    cpu_scalar: |dtype| host(CpuKernels::new(2, Isa::Scalar), dtype),
    cpu_avx2: |dtype| host(CpuKernels::new(1, Isa::Avx2), dtype),
    cpu_avx512: |dtype| host(CpuKernels::new(3, Isa::Avx512), dtype),
    cpu_amx: |dtype| host(CpuKernels::new(2, Isa::Amx), dtype),
    first_gpu: cuda,
}
