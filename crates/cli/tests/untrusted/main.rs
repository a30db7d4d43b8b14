//! The readers of a checkpoint's files against files that somebody spoiled: for a second each here, for as long as
//! one likes under `fuzz/`. `EPSMOE_TEST_SEED` repeats a run.

// `cfg(test)` tells clippy that everything here is a test.
#[cfg(test)]
#[path = "../../../../fuzz/src/lib.rs"]
#[expect(unreachable_pub, reason = "public for the fuzz targets")]
mod readers;
#[cfg(test)]
mod spoil;
