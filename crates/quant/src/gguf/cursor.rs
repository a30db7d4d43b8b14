//! Walking over a header whose length nobody knows before it is read.

use super::damaged;
use crate::QuantError;

/// The longest header. Published ones have some 20 MB, most of it a vocabulary.
const LIMIT: u64 = 100_000_000;

/// Bytes read at once.
const PIECE: u64 = 1 << 20;

/// A place in a file, and the bytes that follow it.
pub(super) struct Cursor<F> {
    /// Length of the file.
    length: u64,
    read: F,
    /// What has been read from the file, from byte `start` on.
    buffer: Vec<u8>,
    start: u64,
    /// The next byte of the buffer.
    next: usize,
}

impl<E: From<QuantError>, F: Fn(&mut [u8], u64) -> Result<(), E>> Cursor<F> {
    pub(super) fn new(length: u64, read: F) -> Self {
        Cursor { length, read, buffer: Vec::new(), start: 0, next: 0 }
    }

    /// Bytes of the file up to here.
    pub(super) fn position(&self) -> u64 {
        self.start + self.next as u64
    }

    /// Length of the file.
    pub(super) fn length(&self) -> u64 {
        self.length
    }

    /// Bytes that a header may still have.
    pub(super) fn left(&self) -> u64 {
        self.length.min(LIMIT).saturating_sub(self.position())
    }

    /// The next `count` bytes, which are `what`.
    pub(super) fn bytes(&mut self, count: u64, what: &str) -> Result<&[u8], E> {
        if count > self.left() {
            let left = self.left();
            return Err(damaged(format!("{what} takes {count} bytes, but there are {left} left")).into());
        }
        let count = count as usize;
        if self.buffer.len() - self.next < count {
            self.refill(count)?;
        }
        let from = self.next;
        self.next += count;
        Ok(&self.buffer[from..self.next])
    }

    /// Drops what is behind and reads on, so that `count` bytes follow. The file is long enough.
    fn refill(&mut self, count: usize) -> Result<(), E> {
        self.start = self.position();
        self.buffer.drain(..self.next);
        self.next = 0;
        let have = self.buffer.len();
        let end = (self.start + (count as u64).max(PIECE)).min(self.length);
        self.buffer.resize((end - self.start) as usize, 0);
        (self.read)(&mut self.buffer[have..], self.start + have as u64)
    }

    pub(super) fn array<const N: usize>(&mut self, what: &str) -> Result<[u8; N], E> {
        let mut array = [0; N];
        array.copy_from_slice(self.bytes(N as u64, what)?);
        Ok(array)
    }

    pub(super) fn u32(&mut self, what: &str) -> Result<u32, E> {
        self.array(what).map(u32::from_le_bytes)
    }

    pub(super) fn u64(&mut self, what: &str) -> Result<u64, E> {
        self.array(what).map(u64::from_le_bytes)
    }

    /// A string: its length, then UTF-8.
    pub(super) fn text(&mut self, what: &str) -> Result<String, E> {
        let length = self.u64(what)?;
        let text = std::str::from_utf8(self.bytes(length, what)?).map(str::to_owned);
        text.map_err(|_| damaged(format!("{what} is not UTF-8")).into())
    }
}
