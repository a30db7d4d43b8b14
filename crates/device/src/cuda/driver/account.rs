//! How often the driver is called and how long that takes the host, while somebody wants to know.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Calls of one function of the driver, by all threads of the process.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DriverCalls {
    /// How many.
    pub count: u64,
    /// How long they took their threads, together.
    pub time: Duration,
}

static COUNTING: AtomicBool = AtomicBool::new(false);
static CALLS: Mutex<BTreeMap<&'static str, DriverCalls>> = Mutex::new(BTreeMap::new());

fn calls() -> MutexGuard<'static, BTreeMap<&'static str, DriverCalls>> {
    CALLS.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Counts calls from now on, or no more. Counting one costs its thread some 50 ns.
pub fn count_driver_calls(on: bool) {
    COUNTING.store(on, Ordering::Relaxed);
}

/// What was counted since this was last asked, by function.
pub fn take_driver_calls() -> BTreeMap<&'static str, DriverCalls> {
    std::mem::take(&mut calls())
}

/// Makes a call.
pub(super) fn counted<T>(function: &'static str, call: impl FnOnce() -> T) -> T {
    if !COUNTING.load(Ordering::Relaxed) {
        return call();
    }
    let begun = Instant::now();
    let result = call();
    let time = begun.elapsed();
    let mut calls = calls();
    let all = calls.entry(function).or_default();
    *all = DriverCalls { count: all.count + 1, time: all.time + time };
    result
}
