//! Parcels over TCP: a connection for every pair of ranks. A thread for each of them reads what comes, whatever the lanes
//! do; what leaves is written by the lane that sends it.

use super::parcels::{Carrier, Head, Inbox, Unsent};
use crate::process::Member;
use crate::process::door::Door;
use crate::process::frames::{Hurried, read_into};
use crate::process::secret::{PATIENCE, Secret, knock};
use crate::signal::lock;
use epsmoe_base::{Deadline, Fault, FaultCell, Rank};
use std::io::{self, ErrorKind, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// Longest head and most rows of a parcel, in bytes.
const LONGEST_HEAD: usize = 1 << 12;
const LONGEST: usize = 1 << 38;

/// Connections to the other ranks.
pub(crate) struct TcpCarrier {
    inbox: Arc<Inbox>,
    /// By rank; none to this one. Whoever holds the lock writes one parcel.
    streams: Vec<Option<Mutex<TcpStream>>>,
}

impl TcpCarrier {
    /// Connects every pair of ranks: each goes to those before it, and is visited by those after it.
    pub(crate) fn connect(
        me: Rank,
        members: &[Member],
        listener: TcpListener,
        secret: &Secret,
        timeout: Duration,
        faults: &FaultCell,
    ) -> Result<Self, String> {
        let (visit, visitors) = channel();
        let admit = move |stream: TcpStream| {
            let mut rank = [0; 4];
            let read = Hurried { stream: &stream, until: Instant::now() + PATIENCE }.read_exact(&mut rank);
            if read.is_ok() {
                // Nobody waits any more.
                let _ = visit.send((u32::from_le_bytes(rank) as usize, stream));
            }
        };
        let door = Door::open(listener, secret.clone(), admit)
            .map_err(|error| format!("{me} cannot be reached by other ranks ({error})"))?;
        let mut streams: Vec<Option<TcpStream>> = members.iter().map(|_| None).collect();
        for member in &members[..me.0] {
            let stream = reach(me, member, secret).map_err(|problem| {
                format!(
                    "{me} cannot reach {member} at {} ({problem}): see that no firewall is between the two",
                    member.rows
                )
            })?;
            streams[member.rank.0] = Some(stream);
        }
        let mut deadline = Deadline::after(timeout);
        while let Some(missing) = (me.0 + 1..members.len()).find(|&rank| streams[rank].is_none()) {
            faults.check().map_err(|fault| fault.message)?;
            match visitors.recv_timeout(FaultCell::POLL) {
                Ok((rank, stream)) if rank > me.0 && rank < streams.len() => streams[rank] = Some(stream),
                Ok(_) => {}
                Err(RecvTimeoutError::Timeout) if !deadline.passed() => {}
                Err(_) => {
                    return Err(format!(
                        "{} did not come to {} within {:?}: see that no firewall is between the two",
                        members[missing],
                        door.address(),
                        deadline.allowed()
                    ));
                }
            }
        }
        let inbox = Arc::<Inbox>::default();
        let start = |(rank, stream): (usize, Option<TcpStream>)| -> io::Result<Option<Mutex<TcpStream>>> {
            let Some(stream) = stream else { return Ok(None) };
            stream.set_nodelay(true)?;
            stream.set_read_timeout(None)?;
            // A sender looks so often whether the world has stopped.
            stream.set_write_timeout(Some(FaultCell::POLL.saturating_mul(10)))?;
            let (inbox, reader) = (Arc::clone(&inbox), stream.try_clone()?);
            let read = move || unload(Rank(rank), reader, &inbox);
            std::thread::Builder::new().name(format!("rows-from-{rank}")).spawn(read)?;
            Ok(Some(Mutex::new(stream)))
        };
        let streams = streams.into_iter().enumerate().map(start).collect::<io::Result<_>>();
        let streams = streams.map_err(|error| format!("{me} cannot use its connections ({error})"))?;
        Ok(TcpCarrier { inbox, streams })
    }
}

impl Carrier for TcpCarrier {
    fn inbox(&self) -> &Inbox {
        &self.inbox
    }

    fn send(
        &self,
        to: Rank,
        head: &Head<'_>,
        bytes: &[u8],
        waiting: &mut dyn FnMut(bool) -> Result<(), Fault>,
    ) -> Result<(), Unsent> {
        let Some(stream) = &self.streams[to.0] else {
            return Err(Unsent::Broken(io::Error::other("there is none. This is a bug.")));
        };
        let head = head.encoded()?;
        let mut first = Vec::with_capacity(12 + head.len());
        first.extend((head.len() as u32).to_le_bytes());
        first.extend((bytes.len() as u64).to_le_bytes());
        first.extend(head);
        let mut stream = lock(stream);
        let sent =
            write_all(&mut stream, &first, waiting).and_then(|()| write_all(&mut stream, bytes, waiting));
        if sent.is_err() {
            // A part of a parcel may have left: nothing can follow it.
            let _ = stream.shutdown(Shutdown::Both);
        }
        sent
    }
}

impl Drop for TcpCarrier {
    fn drop(&mut self) {
        // What was sent arrives; readers end when the other side closes too.
        for stream in self.streams.iter().flatten() {
            let _ = lock(stream).shutdown(Shutdown::Write);
        }
    }
}

/// A connection to a rank that waits for one.
fn reach(me: Rank, member: &Member, secret: &Secret) -> Result<TcpStream, String> {
    let stream = TcpStream::connect_timeout(&member.rows, PATIENCE).map_err(|error| error.to_string())?;
    knock(&stream, secret).map_err(|error| error.to_string())?;
    let mut hurried = Hurried { stream: &stream, until: Instant::now() + PATIENCE };
    hurried.write_all(&(me.0 as u32).to_le_bytes()).map_err(|error| error.to_string())?;
    Ok(stream)
}

/// Reads parcels until the connection ends or makes no sense: whoever misses one says so, at its deadline, and that a
/// process has ended is heard elsewhere.
fn unload(from: Rank, stream: TcpStream, inbox: &Inbox) {
    while let Ok((head, bytes)) = next_parcel(from, &mut &stream, inbox) {
        inbox.put(head, bytes, 0);
    }
    let _ = stream.shutdown(Shutdown::Read);
}

fn next_parcel(from: Rank, stream: &mut impl Read, inbox: &Inbox) -> io::Result<(Head<'static>, Vec<u8>)> {
    let garbage = |what: &str| io::Error::new(ErrorKind::InvalidData, what.to_owned());
    let mut lengths = [0; 12];
    stream.read_exact(&mut lengths)?;
    let (of_head, of_rows) = lengths.split_at(4);
    let of_head = of_head.try_into().map_or(u64::MAX, |bytes| u64::from(u32::from_le_bytes(bytes)));
    let of_rows = of_rows.try_into().map_or(u64::MAX, u64::from_le_bytes);
    let mut words = Vec::new();
    read_into(stream, of_head, LONGEST_HEAD, &mut words)?;
    let head: Head<'_> = postcard::from_bytes(&words).map_err(|_| garbage("a parcel without a head"))?;
    if head.route.source != from || head.bytes().is_none_or(|bytes| bytes as u64 != of_rows) {
        return Err(garbage("a parcel whose head is of another"));
    }
    let head = head.into_owned();
    let mut bytes = inbox.memory();
    read_into(stream, of_rows, LONGEST, &mut bytes)?;
    Ok((head, bytes))
}

fn write_all(
    stream: &mut TcpStream,
    mut bytes: &[u8],
    waiting: &mut dyn FnMut(bool) -> Result<(), Fault>,
) -> Result<(), Unsent> {
    while !bytes.is_empty() {
        match stream.write(bytes) {
            Ok(written) => {
                bytes = &bytes[written..];
                if !bytes.is_empty() {
                    waiting(written > 0).map_err(Unsent::Fault)?;
                }
            }
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                waiting(false).map_err(Unsent::Fault)?;
            }
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(Unsent::Broken(error)),
        }
    }
    Ok(())
}
