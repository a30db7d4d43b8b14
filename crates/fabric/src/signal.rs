//! How threads learn that something behind a lock has changed.

use epsmoe_base::FaultCell;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Tells whoever waits for what a lock guards to look again.
#[derive(Default)]
pub(crate) struct Signal {
    changes: AtomicU64,
    sleepers: Condvar,
    /// How long a waiter looks again and again before it sleeps: waking up takes longer than most waits of threads that
    /// have a core of their own.
    spin: Duration,
}

impl Signal {
    pub(crate) fn new(spin: Duration) -> Self {
        Signal { spin, ..Signal::default() }
    }

    /// Something has changed. The caller changed it under the lock, which it may have given back since.
    pub(crate) fn notify(&self) {
        self.changes.fetch_add(1, Ordering::Release);
        self.sleepers.notify_all();
    }

    /// Gives the lock back until something may have changed, or for [`FaultCell::POLL`].
    pub(crate) fn wait<'a, T>(&self, mutex: &'a Mutex<T>, guard: MutexGuard<'a, T>) -> MutexGuard<'a, T> {
        self.wait_for(FaultCell::POLL, mutex, guard)
    }

    /// The same where nobody minds if a fault is noticed later than by whoever waits for work under way.
    pub(crate) fn idle<'a, T>(&self, mutex: &'a Mutex<T>, guard: MutexGuard<'a, T>) -> MutexGuard<'a, T> {
        const LONG: Duration = Duration::from_millis(200);
        self.wait_for(LONG, mutex, guard)
    }

    fn wait_for<'a, T>(
        &self,
        longest: Duration,
        mutex: &'a Mutex<T>,
        guard: MutexGuard<'a, T>,
    ) -> MutexGuard<'a, T> {
        let seen = self.changes.load(Ordering::Acquire);
        let guard = if self.spin.is_zero() {
            guard
        } else {
            drop(guard);
            let begun = Instant::now();
            while self.changes.load(Ordering::Acquire) == seen && begun.elapsed() < self.spin {
                std::hint::spin_loop();
            }
            let guard = lock(mutex);
            if self.changes.load(Ordering::Acquire) != seen {
                return guard;
            }
            guard
        };
        self.sleepers.wait_timeout(guard, longest).unwrap_or_else(PoisonError::into_inner).0
    }
}

pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
