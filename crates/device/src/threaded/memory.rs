//! The memory of a host processor, and typed views of it for the work that runs on its lanes.

use super::element::Plain;
use super::pages::{Piece, Slabs};
use crate::{AllocationId, Buffer, DeviceError, Holds, HostQueue, PeerQueue};
use epsmoe_base::{Bytes, DType};
use half::bf16;
use std::borrow::Cow;
use std::marker::PhantomData;
use std::ops::Range;
use std::ptr::NonNull;
use std::sync::{Arc, PoisonError, RwLock};

/// What fresh memory holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fill {
    /// Zeros, which the operating system gives for free.
    Zero,
    /// All bits set: NaN as a number, out of range as an index, so that a read before a write shows.
    Poison,
}

/// Every allocation of one rank.
///
/// Views are handed out only to work that passed [`Hazards`](crate::hazard::Hazards): lane order or an event
/// puts every conflicting access wholly before or after it. So while work runs, nobody else writes what it
/// reads nor touches what it writes, although no borrow says so.
#[derive(Clone)]
pub struct Memory {
    regions: Arc<RwLock<Vec<Piece>>>,
    /// Where they lie: side by side in huge pages, since each operation touches several of them, most of them small.
    slabs: Arc<Slabs>,
    fill: Fill,
}

impl Memory {
    pub(super) fn new(fill: Fill) -> Self {
        Memory { regions: Arc::default(), slabs: Arc::default(), fill }
    }

    fn fresh(&self, bytes: usize) -> Option<Piece> {
        let mut piece = self.slabs.cut(bytes)?;
        if self.fill == Fill::Poison {
            piece.fill(0xff);
        }
        Some(piece)
    }

    pub(super) fn allocate(
        &self,
        name: &'static str,
        dtype: DType,
        rows: usize,
        width: usize,
    ) -> Result<Buffer, DeviceError> {
        let bytes = rows.checked_mul(width).and_then(|elements| elements.checked_mul(dtype.bytes()));
        let region = bytes.and_then(|bytes| self.fresh(bytes)).ok_or_else(|| DeviceError::OutOfMemory {
            owner: "this machine",
            name: format!("{name} [{rows}, {width}] {dtype}"),
            needed: Bytes(bytes.unwrap_or(usize::MAX) as u64),
            mend: "lower --max-num-batched-tokens or --max-model-len",
        })?;
        let mut regions = self.regions.write().unwrap_or_else(PoisonError::into_inner);
        regions.push(region);
        let allocation = AllocationId((regions.len() - 1) as u32);
        Ok(Buffer { allocation, name, dtype, offset: 0, rows, width, stride: width })
    }

    pub(super) fn allocated_bytes(&self) -> u64 {
        let regions = self.regions.read().unwrap_or_else(PoisonError::into_inner);
        regions.iter().map(|region| region.len() as u64).sum()
    }

    /// The numbers of a buffer, to read.
    ///
    /// # Safety
    /// The caller is work that declared this read and passed the hazard check, and drops the view before the
    /// work ends.
    pub unsafe fn view<T: Plain>(&self, buffer: &Buffer) -> View<'_, T> {
        View {
            start: self.locate::<T>(buffer),
            rows: buffer.rows,
            width: buffer.width,
            stride: buffer.stride,
            memory: PhantomData,
        }
    }

    /// The numbers of a buffer, to write.
    ///
    /// # Safety
    /// As [`view`](Memory::view), for a declared write; no other view of the same elements is alive in the work.
    pub unsafe fn view_mut<T: Plain>(&self, buffer: &Buffer) -> ViewMut<'_, T> {
        ViewMut {
            start: self.locate::<T>(buffer).cast_mut(),
            rows: buffer.rows,
            width: buffer.width,
            stride: buffer.stride,
            memory: PhantomData,
        }
    }

    /// Address of a buffer's first element. Panics, inside the lane that runs the work, if the handle is not of
    /// this memory: handles are made by `allocate` and narrowed by checked methods, so that is a bug.
    fn locate<T: Plain>(&self, buffer: &Buffer) -> *const T {
        assert_eq!(buffer.dtype, T::DTYPE, "{buffer:?} seen as {}. This is a bug.", T::DTYPE);
        let regions = self.regions.read().unwrap_or_else(PoisonError::into_inner);
        let region = &regions[buffer.allocation.0 as usize];
        let end = buffer.byte_range().end;
        assert!(end <= region.len(), "{buffer:?} ends past its allocation. This is a bug.");
        if buffer.rows == 0 || buffer.width == 0 {
            return NonNull::dangling().as_ptr();
        }
        // SAFETY: the offset is inside the region, checked just above. Regions are freed only with the memory,
        // which the view's lifetime borrows.
        unsafe { region.start().as_ptr().cast::<T>().add(buffer.offset).cast_const() }
    }
}

impl PeerQueue for Memory {
    type PeerRows = (Memory, Buffer);
    /// Work runs on the lane itself: what came before is done.
    type Mark = ();

    fn share(&self, rows: &Buffer) -> Result<(Memory, Buffer), DeviceError> {
        Ok((self.clone(), rows.clone()))
    }

    fn mark(&self) -> Result<(), DeviceError> {
        Ok(())
    }

    fn after(&self, (): &()) -> Result<(), DeviceError> {
        Ok(())
    }

    unsafe fn copy(&self, copies: &[(&(Memory, Buffer), &Buffer)]) -> Result<(), DeviceError> {
        for ((source, from), to) in copies {
            match to.dtype.bytes() {
                // SAFETY: the caller's promise.
                2 => unsafe { copy::<bf16>(self, to, source, from) },
                // SAFETY: the caller's promise.
                _ if to.dtype == DType::U32 => unsafe { copy::<u32>(self, to, source, from) },
                // SAFETY: the caller's promise.
                _ => unsafe { copy::<f32>(self, to, source, from) },
            }
        }
        Ok(())
    }

    fn holds(&self) -> Option<&dyn Holds> {
        None
    }
}

impl HostQueue for Memory {
    unsafe fn bytes(&self, rows: &Buffer) -> Cow<'_, [u8]> {
        match rows.dtype.bytes() {
            // SAFETY: the caller's promise.
            2 => unsafe { bytes::<bf16>(self, rows) },
            // SAFETY: the caller's promise.
            _ if rows.dtype == DType::U32 => unsafe { bytes::<u32>(self, rows) },
            // SAFETY: the caller's promise.
            _ => unsafe { bytes::<f32>(self, rows) },
        }
    }

    unsafe fn fill(&self, rows: &Buffer, from: &[u8]) {
        match rows.dtype.bytes() {
            // SAFETY: the caller's promise.
            2 => unsafe { fill::<bf16>(self, rows, from) },
            // SAFETY: the caller's promise.
            _ if rows.dtype == DType::U32 => unsafe { fill::<u32>(self, rows, from) },
            // SAFETY: the caller's promise.
            _ => unsafe { fill::<f32>(self, rows, from) },
        }
    }
}

/// See [`HostQueue::bytes`], whose promises are handed on.
unsafe fn bytes<'a, T: Plain>(memory: &'a Memory, rows: &Buffer) -> Cow<'a, [u8]> {
    // Rows without gaps are one.
    let whole = rows.reshape((rows.rows * rows.width).max(1));
    // SAFETY: the caller's promise, of the same elements.
    let view = unsafe { memory.view::<T>(whole.as_ref().unwrap_or(rows)) };
    match view.rows {
        1 => Cow::Borrowed(bytemuck::cast_slice(view.row(0))),
        _ => Cow::Owned(view.iter().flat_map(bytemuck::cast_slice::<T, u8>).copied().collect()),
    }
}

/// See [`HostQueue::fill`], whose promises are handed on.
unsafe fn fill<T: Plain>(memory: &Memory, rows: &Buffer, from: &[u8]) {
    assert_eq!(from.len(), rows.rows * rows.width * size_of::<T>(), "bytes for {rows:?}. This is a bug.");
    // SAFETY: the caller's promise.
    let mut view = unsafe { memory.view_mut::<T>(rows) };
    for (row, from) in from.chunks_exact((rows.width * size_of::<T>()).max(1)).enumerate() {
        bytemuck::cast_slice_mut(view.row(row)).copy_from_slice(from);
    }
}

/// See [`PeerQueue::copy`], whose promises are handed on.
unsafe fn copy<T: Plain>(memory: &Memory, to: &Buffer, source: &Memory, from: &Buffer) {
    // SAFETY: the caller's promise.
    let (mut to, from) = unsafe { (memory.view_mut::<T>(to), source.view::<T>(from)) };
    for (row, from) in from.iter().enumerate() {
        to.row(row).copy_from_slice(from);
    }
}

/// Rows of numbers to read.
#[derive(Clone, Copy)]
pub struct View<'a, T> {
    start: *const T,
    /// Number of rows.
    pub rows: usize,
    /// Elements of a row.
    pub width: usize,
    /// Elements between the starts of two rows.
    pub stride: usize,
    memory: PhantomData<&'a [T]>,
}

// SAFETY: a view only reads, and what it reads is not written while it lives (see `Memory`).
unsafe impl<T: Sync> Send for View<'_, T> {}
// SAFETY: as above.
unsafe impl<T: Sync> Sync for View<'_, T> {}

impl<'a, T: Plain> View<'a, T> {
    /// One row.
    pub fn row(&self, row: usize) -> &'a [T] {
        assert!(row < self.rows, "row {row} of {}", self.rows);
        // SAFETY: `Memory::locate` checked that all rows lie inside the region, which outlives 'a.
        unsafe { std::slice::from_raw_parts(self.start.add(row * self.stride), self.width) }
    }

    /// Every row in order.
    pub fn iter(&self) -> impl Iterator<Item = &'a [T]> + use<'a, T> {
        let view = *self;
        (0..view.rows).map(move |row| view.row(row))
    }

    /// The element of a single-column view.
    pub fn at(&self, row: usize) -> T {
        self.row(row)[0]
    }
}

/// Rows of numbers to write.
pub struct ViewMut<'a, T> {
    start: *mut T,
    /// Number of rows.
    pub rows: usize,
    /// Elements of a row.
    pub width: usize,
    /// Elements between the starts of two rows.
    pub stride: usize,
    memory: PhantomData<&'a mut [T]>,
}

// SAFETY: while the view lives nobody else touches its elements (see `Memory`), so it may move to a thread.
unsafe impl<T: Send> Send for ViewMut<'_, T> {}
// SAFETY: the only shared access is `row_shared`, whose caller promises distinct rows.
unsafe impl<T: Send> Sync for ViewMut<'_, T> {}

impl<T: Plain> ViewMut<'_, T> {
    /// One row.
    pub fn row(&mut self, row: usize) -> &mut [T] {
        // SAFETY: `&mut self` keeps every other row borrow away.
        unsafe { self.row_shared(row) }
    }

    /// One row, while other threads write other rows.
    ///
    /// # Safety
    /// No two borrows of the same row are alive at once.
    #[expect(clippy::mut_from_ref, reason = "rows are disjoint, and the caller promises distinct ones")]
    pub unsafe fn row_shared(&self, row: usize) -> &mut [T] {
        // SAFETY: the caller's promise.
        unsafe { self.columns_shared(row, 0..self.width) }
    }

    /// Some columns of one row, while other threads write other elements.
    ///
    /// # Safety
    /// No two borrows of the same element are alive at once.
    #[expect(clippy::mut_from_ref, reason = "pieces are disjoint, by the caller's promise")]
    pub unsafe fn columns_shared(&self, row: usize, columns: Range<usize>) -> &mut [T] {
        assert!(row < self.rows && columns.start <= columns.end && columns.end <= self.width);
        // SAFETY: inside the row, checked above; `Memory::locate` checked that all rows lie inside the region.
        unsafe {
            let start = self.start.add(row * self.stride + columns.start);
            std::slice::from_raw_parts_mut(start, columns.len())
        }
    }

    /// Where some columns of some rows begin, for code that writes a block row by row: from one row to the next it is
    /// `stride` elements, and as long as no two write the same element, all of the block may be written.
    pub fn block_shared(&self, rows: Range<usize>, columns: Range<usize>) -> *mut T {
        assert!(rows.start <= rows.end && rows.end <= self.rows, "rows {rows:?} of {}", self.rows);
        assert!(
            columns.start <= columns.end && columns.end <= self.width,
            "columns {columns:?} of {}",
            self.width
        );
        self.start.wrapping_add(rows.start * self.stride + columns.start)
    }
}
