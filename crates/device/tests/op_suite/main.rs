//! Every operation on every host processor: against its definition in float64 (`definitions`), against itself
//! with other rows around (`invariance`), and with arguments that do not fit (`refusals`).
//!
//! A new processor is one line in `processors!`. A new operation does not compile until `Bench::run` knows it,
//! and fails `definitions` until it is checked there. `EPSMOE_TEST_SEED` repeats a run.

mod bench;
mod definitions;
mod invariance;
mod refusals;

use epsmoe_base::DType;
use epsmoe_device::cpu::{CpuKernels, gemm::Isa};
use epsmoe_device::host::Kernels;
use epsmoe_device::reference::PlainKernels;

/// Kernels, unless this machine has no such processor.
fn present<K: Kernels>(kernels: Result<K, String>) -> bool {
    kernels.inspect_err(|missing| eprintln!("skipped: {missing}")).is_ok()
}

macro_rules! processors {
    ($($name:ident: $kernels:expr),* $(,)?) => {$(
        mod $name {
            use super::*;

            #[test]
            fn operations_match_their_definitions_in_float32() {
                if present($kernels) {
                    definitions::suite(|| $kernels.unwrap(), DType::F32);
                }
            }

            #[test]
            fn operations_match_their_definitions_in_bfloat16() {
                if present($kernels) {
                    definitions::suite(|| $kernels.unwrap(), DType::BF16);
                }
            }

            #[test]
            fn rows_do_not_depend_on_their_neighbours_in_float32() {
                if present($kernels) {
                    invariance::suite(|| $kernels.unwrap(), DType::F32);
                }
            }

            #[test]
            fn rows_do_not_depend_on_their_neighbours_in_bfloat16() {
                if present($kernels) {
                    invariance::suite(|| $kernels.unwrap(), DType::BF16);
                }
            }

            #[test]
            fn what_does_not_fit_is_refused() {
                if present($kernels) {
                    refusals::suite(|| $kernels.unwrap());
                }
            }
        }
    )*};
}

processors! {
    plain: Ok::<_, String>(PlainKernels),
    cpu_scalar: CpuKernels::new(2, Isa::Scalar),
    cpu_avx2: CpuKernels::new(1, Isa::Avx2),
    cpu_avx512: CpuKernels::new(3, Isa::Avx512),
}
