//! Memory as the system gives it: zeroed pages, huge ones where it grants them.
//!
//! With pages of 4 KiB every 64 cache lines cost a miss of the address cache, and where a hypervisor stands below,
//! each miss is a walk through two tables: a loop that reads memory from end to end then gets half of what it could.
//! A huge page is 2 MiB, and only whole ones count, so large memory begins on one, and small pieces that are read one
//! after the other should be cut from one slab.

use memmap2::MmapMut;
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;
use std::sync::{Arc, Mutex, PoisonError};

/// Bytes of a huge page.
const HUGE: usize = 2 << 20;

/// Bytes that are given a huge page although they leave most of it unused: many enough that a pass over them would
/// otherwise push other addresses out of the address cache.
const WORTH_A_HUGE_PAGE: usize = HUGE / 16;

/// Zeroed bytes of the process's own from their first use on: room for the worst case costs only what is used.
pub(crate) struct Pages {
    start: NonNull<u8>,
    len: usize,
    /// Unmaps them in the end.
    _mapping: MmapMut,
}

// SAFETY: pages are plain bytes that belong to whoever holds them.
unsafe impl Send for Pages {}
// SAFETY: as above.
unsafe impl Sync for Pages {}

impl Pages {
    /// `len` bytes, or `None` if the system has no room for them. From [`WORTH_A_HUGE_PAGE`] on they have huge pages to
    /// themselves.
    pub(crate) fn new(len: usize) -> Option<Self> {
        let huge = len >= WORTH_A_HUGE_PAGE;
        // A mapping begins anywhere: one huge page more than needed has the needed ones in it whole.
        let mapped = if huge { len.checked_next_multiple_of(HUGE)?.checked_add(HUGE)? } else { len.max(1) };
        let mut mapping = MmapMut::map_anon(mapped).ok()?;
        let address = mapping.as_ptr().addr();
        let skipped = if huge { address.next_multiple_of(HUGE) - address } else { 0 };
        #[cfg(target_os = "linux")]
        if huge {
            // Only a hint: without huge pages everything works, more slowly.
            let _ = mapping.advise(memmap2::Advice::HugePage);
        }
        let start = NonNull::new(mapping[skipped..].as_mut_ptr())?;
        Some(Pages { start, len, _mapping: mapping })
    }

    /// Address of the first byte, for those who share the bytes by rules of their own.
    pub(crate) fn start(&self) -> NonNull<u8> {
        self.start
    }
}

/// Bytes in a cache line, on which every piece begins.
pub(crate) const LINE_BYTES: usize = 64;

/// What a [`Slabs`] asks the system for at a time.
const SLAB: usize = 32 * HUGE;

/// Cuts pieces from slabs of huge pages, side by side in the order they are asked for. A slab is given back when its
/// last piece is.
#[derive(Default)]
pub(crate) struct Slabs(Mutex<Option<Slab>>);

struct Slab {
    pages: Arc<Pages>,
    used: usize,
}

/// Zeroed bytes inside a slab, which nobody else has.
pub(crate) struct Piece {
    start: NonNull<u8>,
    len: usize,
    /// Keeps the slab.
    _pages: Arc<Pages>,
}

// SAFETY: a piece is plain bytes that belong to it alone.
unsafe impl Send for Piece {}
// SAFETY: as above.
unsafe impl Sync for Piece {}

impl Piece {
    /// See [`Pages::start`].
    pub(crate) fn start(&self) -> NonNull<u8> {
        self.start
    }
}

impl Slabs {
    /// `len` zeroed bytes, or `None` if the system has no room for them.
    pub(crate) fn cut(&self, len: usize) -> Option<Piece> {
        let mut current = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let room = len.checked_next_multiple_of(LINE_BYTES)?;
        let fits = |slab: &Slab| slab.pages.len() - slab.used >= room;
        if !current.as_ref().is_some_and(fits) {
            let pages = Arc::new(Pages::new(room.max(SLAB))?);
            *current = Some(Slab { pages, used: 0 });
        }
        let slab = current.as_mut()?;
        // SAFETY: `room` bytes from `used` on lie inside the pages, as was just made sure.
        let start = unsafe { slab.pages.start().add(slab.used) };
        slab.used += room;
        Some(Piece { start, len, _pages: Arc::clone(&slab.pages) })
    }
}

/// Both are slices of bytes.
macro_rules! bytes {
    ($($owner:ty),*) => {$(
        impl Deref for $owner {
            type Target = [u8];

            fn deref(&self) -> &[u8] {
                // SAFETY: these bytes are mapped as long as the owner lives, began as zeros, and belong to it alone.
                unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.len) }
            }
        }

        impl DerefMut for $owner {
            fn deref_mut(&mut self) -> &mut [u8] {
                // SAFETY: as above.
                unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.len) }
            }
        }
    )*};
}
bytes!(Pages, Piece);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn large_memory_begins_on_a_huge_page() {
        for len in [WORTH_A_HUGE_PAGE, HUGE, HUGE + 1, 5 * HUGE - 3] {
            let pages = Pages::new(len).expect("some megabytes");
            assert_eq!(pages.start().addr().get() % HUGE, 0);
            assert_eq!(pages.len(), len);
        }
        assert!(Pages::new(0).is_some());
        assert!(Pages::new(usize::MAX).is_none());
    }

    #[test]
    fn pieces_are_zero_lie_side_by_side_and_outlive_their_slabs() {
        let slabs = Slabs::default();
        let mut pieces: Vec<Piece> =
            [100, 0, 64, SLAB - 300, 1000, 3 * SLAB].map(|len| slabs.cut(len).expect("room")).into();
        drop(slabs);
        // 100 bytes take two lines; the fifth piece does not fit behind the fourth.
        assert_eq!(pieces[2].as_ptr().addr() - pieces[0].as_ptr().addr(), 128);
        assert_eq!(pieces[3].as_ptr().addr() - pieces[0].as_ptr().addr(), 192);
        for (number, piece) in pieces.iter_mut().enumerate() {
            assert_eq!(piece.as_ptr().addr() % LINE_BYTES, 0);
            assert!(piece.iter().step_by(61).all(|&byte| byte == 0), "piece {number} is not fresh");
            piece.iter_mut().step_by(61).for_each(|byte| *byte = number as u8 + 1);
        }
        pieces.remove(4);
        for (piece, number) in pieces.iter().zip([1, 2, 3, 4, 6]) {
            assert!(piece.iter().step_by(61).all(|&byte| byte == number), "piece {number} was overwritten");
        }
    }
}
