//! Messages between processes: a connection from every rank to rank 0, which hands on what the others say.
//!
//! Rank 0 also decides which fault is the world's first, and hears by heartbeats that a process is alive, which no
//! transport can tell.

use super::{Control, Message, agreed};
use crate::process::Member;
use crate::process::frames::{self, LONGEST};
use crate::signal::{Signal, lock};
use epsmoe_base::{Deadline, Fault, FaultCell, FaultKind, Jury, Place, Rank};
use serde::{Deserialize, Serialize};
use std::borrow::Cow;
use std::collections::{HashMap, VecDeque};
use std::io::{self, Read};
use std::net::{Shutdown, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// Kinds of frames.
const BEAT: u8 = 10;
const SAID: u8 = 11;
const LETTER: u8 = 12;
const FAULT: u8 = 13;
const BYE: u8 = 14;

/// How often a process says that it is alive, and how often it looks whether others did.
const BEAT_EVERY: Duration = Duration::from_millis(500);
const LOOK_EVERY: Duration = Duration::from_millis(50);

/// What a loaded machine may add to the deadline before a process counts as silent: a wait that it kept others in names it
/// first, and says what they waited for.
const SLACK: Duration = Duration::from_secs(1);

/// How long a fault waits for rank 0 to say whether another came before it.
const VERDICT: Duration = Duration::from_secs(1);

/// How long the others have to say goodbye after rank 0 has, in peace or not.
const GOODBYE: Duration = Duration::from_secs(2);
const STOPPED: Duration = Duration::from_millis(200);

/// A message of an exchange on its way.
#[derive(Serialize, Deserialize)]
struct Said<'a> {
    round: u64,
    rank: Rank,
    what: Cow<'a, str>,
    place: Place,
}

/// One rank's end.
pub(crate) struct TcpControl {
    party: Arc<Party>,
    round: AtomicU64,
}

/// What this process knows of the world.
struct Party {
    me: Rank,
    members: Vec<Member>,
    timeout: Duration,
    faults: FaultCell,
    /// Connections by rank: of rank 0 to all others, of the others to rank 0.
    lines: Vec<Option<Line>>,
    /// What the ranks have said so far, by the number of the exchange.
    rounds: Mutex<HashMap<u64, Vec<Option<Message>>>>,
    complete: Signal,
    /// Letters that nobody has taken yet, by sender.
    letters: Mutex<Vec<VecDeque<Vec<u8>>>>,
    delivered: Signal,
    /// The world's first fault, as rank 0 has said.
    first: Mutex<Option<Fault>>,
    decided: Signal,
    /// Rank 0 knows of it.
    told: AtomicBool,
    closing: AtomicBool,
}

/// A connection to another process.
struct Line {
    stream: TcpStream,
    writer: Mutex<TcpStream>,
    /// Times that something was heard.
    heard: AtomicU64,
    /// The other side has said goodbye, or nothing can come from it any more.
    over: AtomicBool,
}

impl Line {
    fn new(stream: TcpStream, timeout: Duration) -> io::Result<Self> {
        stream.set_nodelay(true)?;
        stream.set_read_timeout(None)?;
        // Whoever reads nothing for so long is stopped, or gone.
        stream.set_write_timeout(Some(timeout))?;
        let writer = Mutex::new(stream.try_clone()?);
        Ok(Line { stream, writer, heard: AtomicU64::new(0), over: AtomicBool::new(false) })
    }

    fn send(&self, kind: u8, parts: &[&[u8]]) -> io::Result<()> {
        let mut writer = lock(&self.writer);
        let sent = frames::write(&mut *writer, kind, parts);
        if sent.is_err() {
            // Half a frame may have left: nothing can follow it.
            let _ = self.stream.shutdown(Shutdown::Write);
        }
        sent
    }

    fn is_over(&self) -> bool {
        self.over.load(Ordering::Acquire)
    }
}

/// Everything that is read is a sign of life.
struct Ear<'a>(&'a Line);

impl Read for Ear<'_> {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        let read = (&self.0.stream).read(bytes);
        self.0.heard.fetch_add(1, Ordering::Relaxed);
        read
    }
}

impl TcpControl {
    /// The end of `me`, which is connected to those ranks whose stream is there.
    pub(crate) fn start(
        me: Rank,
        members: Vec<Member>,
        streams: Vec<Option<TcpStream>>,
        timeout: Duration,
        faults: FaultCell,
    ) -> io::Result<Self> {
        let line = |stream: Option<TcpStream>| stream.map(|stream| Line::new(stream, timeout)).transpose();
        let party = Arc::new(Party {
            me,
            timeout,
            faults: faults.clone(),
            lines: streams.into_iter().map(line).collect::<io::Result<_>>()?,
            rounds: Mutex::default(),
            complete: Signal::default(),
            letters: Mutex::new(members.iter().map(|_| VecDeque::new()).collect()),
            members,
            delivered: Signal::default(),
            first: Mutex::default(),
            decided: Signal::default(),
            told: AtomicBool::new(me == Rank(0)),
            closing: AtomicBool::new(false),
        });
        faults.asks(Arc::clone(&party) as Arc<dyn Jury>);
        for (rank, _) in party.lines() {
            let listening = Arc::clone(&party);
            std::thread::Builder::new()
                .name(format!("from-{}", rank.0))
                .spawn(move || listening.listen(rank))?;
        }
        let beating = Arc::clone(&party);
        std::thread::Builder::new().name("heartbeat".into()).spawn(move || beating.beat())?;
        Ok(TcpControl { party, round: AtomicU64::new(0) })
    }

    /// The processes, by rank.
    pub(crate) fn members(&self) -> &[Member] {
        &self.party.members
    }

    /// Whether rank 0 knows what stopped the world.
    pub(crate) fn is_told(&self) -> bool {
        self.party.told.load(Ordering::Acquire)
    }

    /// Sends a letter; rank 0 writes to all others, they write to rank 0.
    pub(crate) fn send(&self, to: Rank, letter: &[u8]) -> Result<(), Fault> {
        self.party.faults.check()?;
        self.party.tell(to, LETTER, &[letter])
    }

    /// The next letter of a rank, once it is there; nothing when the rank has said goodbye and there will be none.
    pub(crate) fn receive(&self, from: Rank) -> Result<Option<Vec<u8>>, Fault> {
        let party = &*self.party;
        let mut letters = lock(&party.letters);
        loop {
            if let Some(letter) = letters[from.0].pop_front() {
                return Ok(Some(letter));
            }
            party.faults.check()?;
            if party.lines[from.0].as_ref().is_none_or(Line::is_over) {
                return Ok(None);
            }
            // There may be nothing to do for hours.
            letters = party.delivered.idle(&party.letters, letters);
        }
    }
}

impl Control for TcpControl {
    fn rank(&self) -> Rank {
        self.party.me
    }

    fn size(&self) -> usize {
        self.party.members.len()
    }

    fn exchange(&self, what: &'static str, place: Place, bytes: Vec<u8>) -> Result<Vec<Vec<u8>>, Fault> {
        let party = &*self.party;
        let round = self.round.fetch_add(1, Ordering::Relaxed);
        party.faults.check()?;
        let said = Said { round, rank: party.me, what: what.into(), place };
        party.hand_on(&said, &bytes, None)?;
        party.take_in(said, bytes);
        let mut deadline = Deadline::after(party.timeout);
        let mut rounds = lock(&party.rounds);
        loop {
            party.faults.check()?;
            if rounds.get(&round).is_some_and(|all| all.iter().all(Option::is_some)) {
                let all: Vec<Message> = rounds.remove(&round).into_iter().flatten().flatten().collect();
                drop(rounds);
                agreed(&all, what, place)
                    .map_err(|problem| party.raise(FaultKind::Mismatch, place, problem))?;
                return Ok(all.into_iter().map(|message| message.bytes).collect());
            }
            if deadline.passed() {
                let silent = rounds.get(&round).and_then(|all| all.iter().position(Option::is_none));
                drop(rounds);
                let silent = &party.members[silent.unwrap_or(party.me.0)];
                let message = format!("{silent} did not come to {what} within {:?}", deadline.allowed());
                return Err(party.raise(FaultKind::Deadline, place, message));
            }
            rounds = party.complete.wait(&party.rounds, rounds);
        }
    }

    fn faults(&self) -> &FaultCell {
        &self.party.faults
    }

    fn say_goodbye(&self) {
        self.party.say_goodbye();
    }

    fn name(&self, rank: Rank) -> String {
        self.party.members.get(rank.0).map_or_else(|| rank.to_string(), Member::to_string)
    }
}

impl Drop for TcpControl {
    fn drop(&mut self) {
        self.party.leave();
    }
}

/// Rank 0 decides, and tells everybody; the others ask it.
impl Jury for Party {
    fn first(&self, seen: Fault) -> Fault {
        let mut first = lock(&self.first);
        if let Some(first) = &*first {
            return first.clone();
        }
        let Ok(words) = postcard::to_stdvec(&seen) else { return seen };
        // Who cannot be told hears nothing any more, and ends by itself.
        let tell_all = || self.lines().for_each(|(_, line)| drop(line.send(FAULT, &[&words])));
        if self.me == Rank(0) {
            tell_all();
            return first.insert(seen).clone();
        }
        drop(first);
        tell_all();
        let asked = Instant::now();
        let mut first = lock(&self.first);
        loop {
            if let Some(first) = &*first {
                return first.clone();
            }
            if asked.elapsed() > VERDICT || self.lines().all(|(_, line)| line.is_over()) {
                return first.insert(seen).clone();
            }
            first = self.decided.wait(&self.first, first);
        }
    }
}

/// What an error of its connection says about a process.
fn why_lost(member: &Member, error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::InvalidData => format!("{member} sent what is no message ({error})"),
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => format!("{member} takes no more messages"),
        io::ErrorKind::InvalidInput => format!("{member} cannot be told: {error}"),
        _ => has_ended(member),
    }
}

/// What everybody says of a process whose connection is closed, whether they waited for it or sent to it.
pub(crate) fn has_ended(name: impl std::fmt::Display) -> String {
    format!("{name} has ended: its connection is closed")
}

impl Party {
    fn lines(&self) -> impl Iterator<Item = (Rank, &Line)> {
        self.lines.iter().enumerate().filter_map(|(rank, line)| Some((Rank(rank), line.as_ref()?)))
    }

    fn raise(&self, kind: FaultKind, place: Place, message: String) -> Fault {
        self.faults.raise(Fault { kind, rank: self.me, place, message })
    }

    /// A rank that cannot be talked to stops the world.
    fn lost(&self, rank: Rank, why: impl FnOnce(&Member) -> String) -> Fault {
        let line = self.lines[rank.0].as_ref();
        if let Some(line) = line {
            line.over.store(true, Ordering::Release);
        }
        self.raise(FaultKind::Lost, Place::default(), why(&self.members[rank.0]))
    }

    fn tell(&self, to: Rank, kind: u8, parts: &[&[u8]]) -> Result<(), Fault> {
        let Some(line) = &self.lines[to.0] else {
            let message = format!("{} cannot write to {to}. This is a bug.", self.me);
            return Err(self.raise(FaultKind::Invalid, Place::default(), message));
        };
        line.send(kind, parts).map_err(|error| match self.faults.get() {
            Some(fault) => fault.clone(),
            None => self.lost(to, |member| why_lost(member, &error)),
        })
    }

    /// Tells what a rank said to all others that hear it from this one.
    fn hand_on(&self, said: &Said<'_>, bytes: &[u8], except: Option<Rank>) -> Result<(), Fault> {
        let head = match postcard::to_stdvec(said) {
            Ok(head) => head,
            Err(error) => return Err(self.raise(FaultKind::Invalid, said.place, error.to_string())),
        };
        let length = (head.len() as u32).to_le_bytes();
        for (rank, _) in self.lines().filter(|(rank, _)| Some(*rank) != except) {
            self.tell(rank, SAID, &[&length, &head, bytes])?;
        }
        Ok(())
    }

    fn take_in(&self, said: Said<'_>, bytes: Vec<u8>) {
        let Said { round, rank, what, place } = said;
        let mut rounds = lock(&self.rounds);
        let all = rounds.entry(round).or_insert_with(|| self.members.iter().map(|_| None).collect());
        all[rank.0] = Some(Message { what: what.into_owned().into(), place, bytes });
        if all.iter().all(Option::is_some) {
            self.complete.notify();
        }
    }

    /// Hears one connection until it ends.
    fn listen(&self, from: Rank) {
        let Some(line) = &self.lines[from.0] else { return };
        let ended = loop {
            match frames::read(&mut Ear(line), LONGEST)
                .and_then(|frame| self.heed(from, frame.kind, frame.body))
            {
                Ok(true) => {}
                Ok(false) => break None,
                Err(error) => break Some(error),
            }
        };
        let at_its_end = self.closing.load(Ordering::Acquire) || line.is_over();
        line.over.store(true, Ordering::Release);
        if let Some(error) = ended.filter(|_| !at_its_end && self.faults.get().is_none()) {
            self.lost(from, |member| why_lost(member, &error));
        }
        [&self.complete, &self.delivered, &self.decided].into_iter().for_each(Signal::notify);
        // Until the other side closes too, so that nothing on its way is lost.
        let _ = line.stream.shutdown(Shutdown::Write);
        let _ = line.stream.set_read_timeout(Some(GOODBYE));
        while (&line.stream).read(&mut [0; 512]).is_ok_and(|read| read > 0) {}
        let _ = line.stream.shutdown(Shutdown::Both);
    }

    /// Does what a message asks for; says whether more may come.
    fn heed(&self, from: Rank, kind: u8, body: Vec<u8>) -> io::Result<bool> {
        let garbage = |what: &str| io::Error::new(io::ErrorKind::InvalidData, what.to_owned());
        match kind {
            BEAT => {}
            SAID => {
                let parts = body
                    .split_first_chunk::<4>()
                    .and_then(|(length, rest)| rest.split_at_checked(u32::from_le_bytes(*length) as usize));
                let (head, bytes) =
                    parts.ok_or_else(|| garbage("a message of an exchange without its head"))?;
                let said: Said<'_> = postcard::from_bytes(head)
                    .map_err(|_| garbage("a message of an exchange with another head"))?;
                // The others' messages come by way of rank 0.
                if said.rank.0 >= self.members.len() || (self.me == Rank(0) && said.rank != from) {
                    return Err(garbage("a message of another rank"));
                }
                if self.me == Rank(0) {
                    // The fault of one that cannot be told is raised.
                    let _ = self.hand_on(&said, bytes, Some(from));
                }
                self.take_in(said, bytes.to_vec());
            }
            LETTER => {
                lock(&self.letters)[from.0].push_back(body);
                self.delivered.notify();
            }
            FAULT => {
                let fault: Fault =
                    postcard::from_bytes(&body).map_err(|_| garbage("a fault that is none"))?;
                if self.me != Rank(0) {
                    self.told.store(true, Ordering::Release);
                    lock(&self.first).get_or_insert_with(|| fault.clone());
                    self.decided.notify();
                }
                self.faults.raise(fault);
                [&self.complete, &self.delivered].into_iter().for_each(Signal::notify);
            }
            BYE => return Ok(false),
            _ => return Err(garbage("a message of no known kind")),
        }
        Ok(true)
    }

    /// Says now and then that this process is alive, and looks whether the others say so.
    fn beat(&self) {
        let allowed = self.timeout.saturating_add(SLACK);
        let watch = |_: (Rank, &Line)| (0, Deadline::after(allowed));
        let mut watches: Vec<(u64, Deadline)> = self.lines().map(watch).collect();
        let mut beaten = None::<Instant>;
        while !self.closing.load(Ordering::Acquire) && !self.lines().all(|(_, line)| line.is_over()) {
            let due = beaten.is_none_or(|beaten| beaten.elapsed() >= BEAT_EVERY);
            for ((rank, line), (heard, deadline)) in self.lines().zip(&mut watches) {
                if line.is_over() {
                    continue;
                }
                let now = line.heard.load(Ordering::Relaxed);
                if now != *heard {
                    (*heard, _) = (now, deadline.restart());
                } else if deadline.passed() {
                    self.lost(rank, |member| format!("nothing was heard of {member} for {allowed:?}"));
                }
                // Whoever is writing to it is a sign of life already. Who cannot be told has ended, which is heard.
                if due && let Ok(mut writer) = line.writer.try_lock() {
                    let _ = frames::write(&mut *writer, BEAT, &[&[]]);
                }
            }
            if due {
                beaten = Some(Instant::now());
            }
            std::thread::sleep(LOOK_EVERY);
        }
    }

    /// Says that nothing more will come from here, once.
    fn say_goodbye(&self) {
        if !self.closing.swap(true, Ordering::AcqRel) {
            // Who has left needs no goodbye.
            self.lines().for_each(|(_, line)| drop(line.send(BYE, &[&[]])));
        }
    }

    /// Says goodbye. Rank 0 gives the others a moment to do so too, and whoever waits for them finds them gone.
    fn leave(&self) {
        self.say_goodbye();
        let patience = if self.faults.get().is_some() { STOPPED } else { GOODBYE };
        let begun = Instant::now();
        while self.me == Rank(0)
            && !self.lines().all(|(_, line)| line.is_over())
            && begun.elapsed() < patience
        {
            std::thread::sleep(FaultCell::POLL);
        }
    }
}
