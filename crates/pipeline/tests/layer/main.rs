//! Whole layers on ranks that are threads, on the reference processor: the right sums (`sums`), the same bits
//! however they are scheduled (`bits`), what runs is what is priced (`interpreters`), one rank without the others (`emulated`), and every way to fail (`faults`). `EPSMOE_TEST_SEED` repeats a run.

mod bits;
mod emulated;
mod faults;
mod interpreters;
mod sums;
mod world;
