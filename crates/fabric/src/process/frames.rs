//! Frames on a connection between two processes: a length, a kind, and so many bytes.

use std::io::{self, ErrorKind, Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

/// Longest body of a frame. What is longer is no frame of ours.
pub(crate) const LONGEST: usize = 1 << 30;

/// What is reserved for a body before any of it is there: lengths may be wrong.
const RESERVED: usize = 64 << 20;

/// A frame as it came.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Frame {
    pub(crate) kind: u8,
    pub(crate) body: Vec<u8>,
}

/// Writes a frame whose body is these parts one after the other.
pub(crate) fn write(to: &mut impl Write, kind: u8, parts: &[&[u8]]) -> io::Result<()> {
    let length = parts.iter().map(|part| part.len()).sum::<usize>();
    if length > LONGEST {
        let problem = format!("a message of {length} bytes is longer than {LONGEST}");
        return Err(io::Error::new(ErrorKind::InvalidInput, problem));
    }
    let mut head = Vec::with_capacity(5 + if parts.len() == 1 { parts[0].len().min(SMALL) } else { 0 });
    head.extend((length as u32).to_le_bytes());
    head.push(kind);
    // Small frames leave in one piece.
    if let [part] = parts
        && part.len() <= SMALL
    {
        head.extend(*part);
        return to.write_all(&head);
    }
    to.write_all(&head)?;
    parts.iter().try_for_each(|part| to.write_all(part))
}

/// What is copied rather than written by a call of its own.
const SMALL: usize = 64 << 10;

/// Reads a frame of at most `longest` bytes.
pub(crate) fn read(from: &mut impl Read, longest: usize) -> io::Result<Frame> {
    let mut head = [0; 5];
    from.read_exact(&mut head)?;
    let [a, b, c, d, kind] = head;
    let mut body = Vec::new();
    read_into(from, u64::from(u32::from_le_bytes([a, b, c, d])), longest, &mut body)?;
    Ok(Frame { kind, body })
}

/// Reads `length` bytes, which must be no more than `longest`, into `body` in the place of what it holds.
pub(crate) fn read_into(
    from: &mut impl Read,
    length: u64,
    longest: usize,
    body: &mut Vec<u8>,
) -> io::Result<()> {
    if length > longest as u64 {
        let problem = format!("{length} bytes were announced where at most {longest} can come");
        return Err(io::Error::new(ErrorKind::InvalidData, problem));
    }
    body.clear();
    body.reserve((length as usize).min(RESERVED));
    let read = from.take(length).read_to_end(body)?;
    if (read as u64) < length { Err(ErrorKind::UnexpectedEof.into()) } else { Ok(()) }
}

/// A connection on which everything must be over by a certain time, however slowly the other side goes about it.
pub(crate) struct Hurried<'a> {
    pub(crate) stream: &'a TcpStream,
    pub(crate) until: Instant,
}

impl Hurried<'_> {
    fn left(&self) -> io::Result<Duration> {
        let left = self.until.saturating_duration_since(Instant::now());
        if left.is_zero() { Err(ErrorKind::TimedOut.into()) } else { Ok(left) }
    }
}

impl Read for Hurried<'_> {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        self.stream.set_read_timeout(Some(self.left()?))?;
        (&mut &*self.stream).read(bytes)
    }
}

impl Write for Hurried<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.stream.set_write_timeout(Some(self.left()?))?;
        (&mut &*self.stream).write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use epsmoe_base::{Mix, env::test_seed};

    #[test]
    fn frames_come_back() {
        let seed = test_seed();
        let mut mix = Mix::keyed(seed, &[1]);
        for _ in 0..50 {
            let parts: Vec<Vec<u8>> = (0..mix.below(4))
                .map(|_| {
                    let length = [3, 100, 2 * SMALL][mix.below(3)];
                    (0..mix.below(length)).map(|_| mix.below(256) as u8).collect()
                })
                .collect();
            let parts: Vec<&[u8]> = parts.iter().map(Vec::as_slice).collect();
            let mut written = Vec::new();
            write(&mut written, 7, &parts).unwrap();
            let frame = read(&mut written.as_slice(), LONGEST).unwrap();
            assert_eq!(frame, Frame { kind: 7, body: parts.concat() }, "seed {seed}");
        }
    }

    #[test]
    fn wrong_lengths_take_no_memory() {
        let announced = [0xff, 0xff, 0xff, 0xff, 1, 2, 3];
        assert_eq!(read(&mut announced.as_slice(), LONGEST).unwrap_err().kind(), ErrorKind::InvalidData);
        let short = [0, 0, 0, 0x3f, 1, 2, 3];
        assert_eq!(read(&mut short.as_slice(), LONGEST).unwrap_err().kind(), ErrorKind::UnexpectedEof);
        assert_eq!(read(&mut [9u8, 0].as_slice(), LONGEST).unwrap_err().kind(), ErrorKind::UnexpectedEof);
    }
}
