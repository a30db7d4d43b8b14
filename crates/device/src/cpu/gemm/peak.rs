//! What this machine can do at most: the figures that kernel speeds are compared with.

use super::kernel::Functions;
use super::{AlignedWords, ElementType, Isa};
use crate::cpu::pool::ComputePool;
use std::hint::black_box;
use std::sync::{Barrier, Mutex, PoisonError};
use std::time::Instant;

/// Times that each figure is measured; the best counts, since disturbances only ever slow a loop down.
const ATTEMPTS: usize = 12;

/// Floating-point operations per second, a multiply-add counted as two, of all threads of `pool`
/// together, in a loop that touches registers only, with the instruction that the kernels of `isa`
/// and `element` use. Takes about 50 ms (longer for `Scalar`).
///
/// # Panics
/// If the processor does not support `isa`.
pub fn compute(pool: &mut ComputePool, isa: Isa, element: ElementType) -> f64 {
    /// Three to four milliseconds for 28 sums, one multiply-add a cycle.
    const ROUNDS: usize = 400_000;
    best_rate(pool, register_loop(isa, element, ROUNDS))
}

/// Like [`compute`], but in one run of some 5 ms. Right after other work it runs at the clock which that work has left the
/// processor, where the best of many runs has the clock of a rested one.
///
/// # Panics
/// If the processor does not support `isa`.
pub fn compute_now(pool: &mut ComputePool, isa: Isa, element: ElementType) -> f64 {
    const ROUNDS: usize = 1_000_000;
    rate(pool, register_loop(isa, element, ROUNDS))
}

/// A thread's work for [`rate`]: `rounds` rounds of products on registers.
fn register_loop(isa: Isa, element: ElementType, rounds: usize) -> impl Fn(usize) -> f64 + Sync {
    let functions = Functions::select(isa, element);
    let flops_per_lane = match element {
        ElementType::F32 => 2.0,
        ElementType::Bf16 => 4.0,
    };
    move |_| {
        // SAFETY: a table exists only where the processor supports its instructions.
        let multiply_adds = unsafe { (functions.spin)(rounds) };
        multiply_adds * flops_per_lane
    }
}

/// Bytes per second that all threads of `pool` together read from memory, each from its own 256 MiB of huge pages in two
/// streams, so that caches hold little of it from one pass to the next. Takes a few tenths of a second.
///
/// # Panics
/// If the system has no memory left.
pub fn memory_read(pool: &mut ComputePool) -> f64 {
    const WORDS: usize = (256 << 20) / size_of::<u32>();
    let buffers: Vec<_> = (0..pool.threads()).map(|_| Mutex::new(AlignedWords::zeros(WORDS))).collect();
    let lock = |thread: usize| buffers[thread].lock().unwrap_or_else(PoisonError::into_inner);
    pool.run(buffers.len(), |thread| lock(thread).fill(1));
    best_rate(pool, |thread| {
        let buffer = lock(thread);
        let (first, second) = buffer.split_at(WORDS / 2);
        black_box(first.iter().zip(second).fold(0, |sum, (a, b)| sum ^ a ^ b));
        size_of_val(&buffer[..]) as f64
    })
}

/// The best of some [`rate`]s.
fn best_rate(pool: &mut ComputePool, work: impl Fn(usize) -> f64 + Sync) -> f64 {
    (0..ATTEMPTS).map(|_| rate(pool, &work)).fold(0.0, f64::max)
}

/// Runs `work(thread)` on all threads at the same time; it returns the amount done. The sum of the threads' amounts per
/// second.
fn rate(pool: &mut ComputePool, work: impl Fn(usize) -> f64 + Sync) -> f64 {
    let together = Barrier::new(pool.threads());
    let rate = Mutex::new(0.0);
    pool.run(pool.threads(), |thread| {
        together.wait();
        let start = Instant::now();
        let amount = work(thread);
        let own_rate = amount / start.elapsed().as_secs_f64();
        *rate.lock().unwrap_or_else(PoisonError::into_inner) += own_rate;
    });
    rate.into_inner().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rate_counts_the_work_of_all_threads() {
        let mut pool = ComputePool::new(3).expect("threads");
        let rate = best_rate(&mut pool, |_| {
            std::thread::sleep(std::time::Duration::from_millis(2));
            1.0
        });
        assert!(rate > 100.0 && rate <= 1500.0, "{rate}");
    }
}
