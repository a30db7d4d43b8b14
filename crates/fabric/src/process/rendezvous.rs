//! How the processes of a world find each other: rank 0 waits at an address, the others come there.

use super::door::Door;
use super::frames::{self, Hurried};
use super::secret::{PATIENCE, Secret, Turned, knock};
use super::{Member, Processes};
use crate::signal::{Signal, lock};
use epsmoe_base::{Deadline, FaultCell, Rank, count};
use serde::{Deserialize, Serialize};
use std::io::{self, ErrorKind};
use std::net::{SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// Kinds of the frames that are exchanged here; what they hold is JSON, which any version can read.
const HELLO: u8 = 1;
const WELCOME: u8 = 2;
const REFUSED: u8 = 3;

/// Longest of these frames: what rank 0 tells everybody may be a page of flags.
const LONGEST: usize = 16 << 20;

/// Who waits for a process that is not there yet looks again so often.
const AGAIN: Duration = Duration::from_millis(50);

/// What the processes of a world have in common.
#[derive(Clone, Debug)]
pub struct WorldOptions {
    /// How long the ranks may take to come.
    pub patience: Duration,
    /// How long they wait for each other after; what rank 0 says holds for all.
    pub timeout: Duration,
    /// Where this process learns that the world has stopped.
    pub faults: FaultCell,
    /// What all of them know.
    pub secret: Secret,
    /// The version of the program.
    pub version: String,
    /// A digest of the flags that this process was started with; nothing if it takes them from rank 0.
    pub flags: Option<u64>,
}

/// Why processes did not become a world.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct RendezvousError(String);

/// What a process says of itself when it comes.
#[derive(Clone, Serialize, Deserialize)]
struct Hello {
    version: String,
    flags: Option<u64>,
    member: Member,
    /// Ranks of the world, if it knows.
    size: Option<usize>,
}

/// What it is told once all have come.
#[derive(Serialize, Deserialize)]
struct Welcome {
    members: Vec<Member>,
    timeout: Duration,
    charter: String,
}

/// Where rank 0 waits for the others.
pub struct Lobby {
    door: Door,
    seats: Arc<Seats>,
    options: WorldOptions,
    rows: TcpListener,
}

/// Who has come so far.
struct Seats {
    size: usize,
    version: String,
    flags: Option<u64>,
    taken: Mutex<Taken>,
    changed: Signal,
}

#[derive(Default)]
struct Taken {
    /// By rank; rank 0 is here.
    guests: Vec<Option<(Member, TcpStream)>>,
    /// Why these processes can never become a world.
    hopeless: Option<String>,
    /// Nobody is waited for any more: who has the seats now.
    settled: Option<Vec<Member>>,
}

impl Lobby {
    /// Opens it at an address of this machine; port 0 is any that is free.
    ///
    /// # Errors
    /// The address is not this machine's, or is in use.
    pub fn open(address: (&str, u16), size: usize, options: WorldOptions) -> Result<Self, RendezvousError> {
        let (host, port) = address;
        let cannot = |problem: &io::Error| {
            let mend = match problem.kind() {
                ErrorKind::AddrInUse => ": another program has that port; choose one with --master-port",
                ErrorKind::AddrNotAvailable => {
                    ": rank 0 must run on the machine that has this address (--master-addr)"
                }
                _ => "",
            };
            RendezvousError(format!(
                "rank 0 cannot wait for the other ranks at {host}:{port} ({problem}){mend}"
            ))
        };
        let listener = TcpListener::bind(address).map_err(|error| cannot(&error))?;
        let here = listener.local_addr().map_err(|error| cannot(&error))?;
        let rows = TcpListener::bind((here.ip(), 0)).map_err(|error| cannot(&error))?;
        let taken = Taken { guests: (0..size).map(|_| None).collect(), ..Taken::default() };
        let seats = Arc::new(Seats {
            size,
            version: options.version.clone(),
            flags: options.flags,
            taken: Mutex::new(taken),
            changed: Signal::default(),
        });
        let receptionist = Arc::clone(&seats);
        let admit = move |stream| receptionist.receive(stream);
        let door = Door::open(listener, options.secret.clone(), admit).map_err(|error| cannot(&error))?;
        Ok(Lobby { door, seats, options, rows })
    }

    /// Where it is.
    pub fn address(&self) -> SocketAddr {
        self.door.address()
    }

    /// Waits until every rank has come, and tells all of them `charter`. `check` is asked now and then whether there is
    /// still something to wait for.
    ///
    /// # Errors
    /// A rank did not come in time, or came with another version or other flags.
    pub fn wait(
        self,
        charter: &str,
        mut check: impl FnMut() -> Result<(), String>,
    ) -> Result<Processes, RendezvousError> {
        let (seats, mut deadline) = (&self.seats, Deadline::after(self.options.patience));
        let mut taken = lock(&seats.taken);
        loop {
            taken.forget_those_who_left();
            if let Some(problem) = taken.hopeless.clone() {
                taken.tell_all_refused(&problem);
                return Err(RendezvousError(problem));
            }
            if taken.guests.iter().skip(1).all(Option::is_some) {
                break;
            }
            if deadline.passed() {
                let problem = self.missing(&taken, deadline.allowed());
                taken.tell_all_refused(&problem);
                return Err(RendezvousError(problem));
            }
            if let Err(problem) = check() {
                taken.tell_all_refused(&problem);
                return Err(RendezvousError(problem));
            }
            taken = seats.changed.wait(&seats.taken, taken);
        }
        let rows = self.rows.local_addr().map_err(|error| RendezvousError(error.to_string()))?;
        let (others, streams): (Vec<Member>, Vec<TcpStream>) =
            taken.guests.iter_mut().skip(1).filter_map(Option::take).unzip();
        let members: Vec<Member> = [Member::here(Rank(0), rows)].into_iter().chain(others).collect();
        taken.settled = Some(members.clone());
        drop(taken);
        let timeout = self.options.timeout;
        let welcome = Welcome { members: members.clone(), timeout, charter: charter.to_owned() };
        for (member, stream) in members.iter().skip(1).zip(&streams) {
            say(stream, WELCOME, &welcome).map_err(|error| {
                RendezvousError(format!("{member} left before the others had come ({error})"))
            })?;
        }
        let lines = std::iter::once(None).chain(streams.into_iter().map(Some)).collect();
        let Lobby { door, options, rows, .. } = self;
        Processes::gather(Rank(0), members, lines, rows, Some(door), &options).map_err(RendezvousError)
    }

    /// Who did not come.
    fn missing(&self, taken: &Taken, allowed: Duration) -> String {
        let missing = taken.guests.iter().enumerate().skip(1).filter(|(_, guest)| guest.is_none());
        let missing: Vec<String> = missing.map(|(rank, _)| rank.to_string()).collect();
        let strangers = match self.door.strangers() {
            0 => String::new(),
            strangers => format!(
                "; {} without the secret of this world (EPSMOE_SECRET) turned away",
                if strangers == 1 { "one caller was".into() } else { format!("{strangers} callers were") }
            ),
        };
        format!(
            "{} {} did not come to {} within {allowed:?}{strangers}: start {} there with the address of rank 0 \
             (--master-addr, --master-port), and see that no firewall is in between",
            if missing.len() == 1 { "rank" } else { "ranks" },
            missing.join(", "),
            self.address(),
            if missing.len() == 1 { "it" } else { "them" },
        )
    }
}

impl Taken {
    /// Who has ended before all had come may come again.
    fn forget_those_who_left(&mut self) {
        for guest in self.guests.iter_mut() {
            let gone = |stream: &TcpStream| {
                let looked = stream.set_nonblocking(true).and_then(|()| stream.peek(&mut [0]));
                let restored = stream.set_nonblocking(false);
                restored.is_err() || !matches!(looked, Err(error) if error.kind() == ErrorKind::WouldBlock)
            };
            if guest.as_ref().is_some_and(|(_, stream)| gone(stream)) {
                *guest = None;
            }
        }
    }

    fn tell_all_refused(&self, problem: &str) {
        // Who does not hear it sees that the connection has ended.
        self.guests.iter().flatten().for_each(|(_, stream)| drop(say(stream, REFUSED, &problem)));
    }
}

impl Seats {
    /// Somebody who knows the secret is here.
    fn receive(&self, stream: TcpStream) {
        // Who leaves without a word is no rank.
        let Ok(hello) = hear::<Hello>(&stream, HELLO) else { return };
        let rank = hello.member.rank.0;
        let mut taken = lock(&self.taken);
        match self.admit(&mut taken, &hello) {
            Ok(()) => taken.guests[rank] = Some((hello.member, stream)),
            Err(problem) => {
                // As above.
                let _ = say(&stream, REFUSED, &problem);
            }
        }
        drop(taken);
        self.changed.notify();
    }

    fn admit(&self, taken: &mut Taken, hello: &Hello) -> Result<(), String> {
        let (member, size) = (&hello.member, self.size);
        let rank = member.rank;
        let mut hopeless = |problem: String| {
            taken.hopeless.get_or_insert_with(|| problem.clone());
            Err(problem)
        };
        if let Some(members) = &taken.settled {
            return Err(match members.get(rank.0) {
                Some(there) => format!("{rank} is there already: {there}; the world has all its ranks"),
                None => format!("there is no {rank}: the world has all its {size} ranks"),
            });
        }
        if hello.version != self.version {
            return hopeless(format!(
                "{member} runs epsmoe {}, rank 0 runs {}: install the same version everywhere",
                hello.version, self.version
            ));
        }
        if hello.flags.is_some_and(|flags| Some(flags) != self.flags) {
            return hopeless(format!(
                "{member} was started with other flags than rank 0: start all ranks with the same ones, or the others \
                 as `epsmoe worker`, which take them from rank 0"
            ));
        }
        if hello.size.is_some_and(|theirs| theirs != size) || !(1..size).contains(&rank.0) {
            let theirs = hello.size.map_or(String::new(), |size| format!(" of {size}"));
            return hopeless(format!(
                "{member} came as {rank}{theirs}, but the flags of rank 0 make a world of {}: start as many \
                 processes as --data-parallel-size times --tensor-parallel-size",
                count(size, "rank")
            ));
        }
        taken.forget_those_who_left();
        match &taken.guests[rank.0] {
            Some((there, _)) => Err(format!("{rank} is there already: {there}")),
            None => Ok(()),
        }
    }
}

/// Comes to rank 0 as one of the other ranks, and waits until all have come; gives what rank 0 tells everybody, too.
///
/// # Errors
/// Rank 0 is not there in time, knows another secret, or refuses this process.
pub fn join(
    address: (&str, u16),
    rank: Rank,
    size: Option<usize>,
    options: &WorldOptions,
) -> Result<(Processes, String), RendezvousError> {
    let mut deadline = Deadline::after(options.patience);
    let (host, port) = address;
    let at =
        |problem: String| RendezvousError(format!("{rank} cannot join rank 0 at {host}:{port}: {problem}"));
    let stream = loop {
        match reach(address).and_then(|stream| knock(&stream, &options.secret).map(|()| stream)) {
            Ok(stream) => break stream,
            Err(Turned::Secret) => {
                return Err(at("it has another secret: export the same EPSMOE_SECRET to all ranks".into()));
            }
            Err(Turned::Stranger) => {
                return Err(at(format!("{}: choose another --master-port", Turned::Stranger)));
            }
            Err(Turned::Broken(error)) => {
                if deadline.passed() {
                    return Err(at(format!("{error}, for {:?}", deadline.allowed())));
                }
                std::thread::sleep(AGAIN);
            }
        }
    };
    let broken = |error: io::Error| at(format!("the connection broke ({error})"));
    let here = stream.local_addr().map_err(broken)?;
    let rows = TcpListener::bind((here.ip(), 0)).map_err(broken)?;
    let member = Member::here(rank, rows.local_addr().map_err(broken)?);
    let hello = Hello { version: options.version.clone(), flags: options.flags, member, size };
    say(&stream, HELLO, &hello).map_err(broken)?;
    // Rank 0 gives up first, and says for whom it waited.
    let mut deadline = Deadline::behind(options.patience);
    let Welcome { members, timeout, charter } = loop {
        let looked = stream.set_read_timeout(Some(AGAIN)).and_then(|()| stream.peek(&mut [0]));
        match looked {
            Ok(_) => match hear(&stream, WELCOME) {
                Ok(welcome) => break welcome,
                Err(Heard::Refused(problem)) => return Err(RendezvousError(problem)),
                Err(Heard::Broken(error)) => return Err(broken(error)),
            },
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                if deadline.passed() {
                    return Err(at(format!("not all ranks have come within {:?}", deadline.allowed())));
                }
            }
            Err(error) => return Err(broken(error)),
        }
    };
    if members.len() <= rank.0 {
        return Err(at("it knows nothing of this rank. This is a bug".into()));
    }
    let lines =
        (0..members.len()).map(|other| if other == 0 { stream.try_clone().ok() } else { None }).collect();
    let options = WorldOptions { timeout, ..options.clone() };
    let processes = Processes::gather(rank, members, lines, rows, None, &options).map_err(RendezvousError)?;
    Ok((processes, charter))
}

/// A connection to the first address that answers.
fn reach(address: (&str, u16)) -> Result<TcpStream, Turned> {
    let mut problem = io::Error::new(ErrorKind::NotFound, "the name has no address");
    for address in address.to_socket_addrs()? {
        match TcpStream::connect_timeout(&address, PATIENCE) {
            Ok(stream) => return Ok(stream),
            Err(error) => problem = error,
        }
    }
    Err(problem.into())
}

enum Heard {
    Refused(String),
    Broken(io::Error),
}

impl From<io::Error> for Heard {
    fn from(error: io::Error) -> Self {
        Heard::Broken(error)
    }
}

fn say(stream: &TcpStream, kind: u8, what: &impl Serialize) -> io::Result<()> {
    let mut stream = Hurried { stream, until: Instant::now() + PATIENCE };
    frames::write(&mut stream, kind, &[&serde_json::to_vec(what)?])
}

fn hear<T: for<'a> Deserialize<'a>>(stream: &TcpStream, kind: u8) -> Result<T, Heard> {
    let frame = frames::read(&mut Hurried { stream, until: Instant::now() + PATIENCE }, LONGEST)?;
    let wrong = |error: serde_json::Error| Heard::Broken(io::Error::new(ErrorKind::InvalidData, error));
    match frame.kind {
        REFUSED => Err(Heard::Refused(serde_json::from_slice(&frame.body).map_err(wrong)?)),
        found if found == kind => serde_json::from_slice(&frame.body).map_err(wrong),
        found => {
            let problem = format!("a message of kind {found} came where one of kind {kind} was due");
            Err(Heard::Broken(io::Error::new(ErrorKind::InvalidData, problem)))
        }
    }
}

impl Member {
    /// This process.
    fn here(rank: Rank, rows: SocketAddr) -> Self {
        let host = std::fs::read_to_string("/proc/sys/kernel/hostname");
        let host = host.map_or_else(|_| rows.ip().to_string(), |name| name.trim().to_owned());
        Member { rank, host, process: std::process::id(), rows }
    }
}
