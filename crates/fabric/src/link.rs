//! A link with a chosen speed, so that the pipeline can be watched at work on a machine whose ranks share
//! memory.
//!
//! Each rank has one link. An exchange occupies it from the moment everything it needs is there until
//! `start + latency + bytes / rate`, where `bytes` is the larger of what leaves for and what comes from
//! *other* ranks; the next exchange starts after that. Finish times are absolute and virtual: a lane that wakes up
//! late and goes on at once with its next exchange begins that when the link was free, so the delay does not add up.
//! Nobody spins: the lane sleeps, and how late it woke up is reported.

use epsmoe_base::{Deadline, Fault, FaultCell};
use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// A link's speed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Link {
    /// Bytes a second, each way.
    pub bytes_per_second: u64,
    /// Paid once by every exchange.
    pub latency: Duration,
}

impl Link {
    /// How long an exchange of `bytes` occupies the link.
    pub fn time(&self, bytes: u64) -> Duration {
        let nanoseconds = u128::from(bytes) * 1_000_000_000 / u128::from(self.bytes_per_second);
        self.latency + Duration::from_nanos(u64::try_from(nanoseconds).unwrap_or(u64::MAX))
    }
}

impl fmt::Display for Link {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (rate, microseconds) = (self.bytes_per_second, self.latency.as_micros());
        let (rate, unit) = match rate {
            _ if rate.is_multiple_of(1_000_000_000) => (rate / 1_000_000_000, "GB/s"),
            _ if rate.is_multiple_of(1_000_000) => (rate / 1_000_000, "MB/s"),
            _ => (rate, "B/s"),
        };
        write!(f, "{rate}{unit},{microseconds}us")
    }
}

impl FromStr for Link {
    type Err = String;

    /// `10GB/s,50us`: a rate in B/s, kB/s, MB/s or GB/s, and a latency in ns, us or ms, which may be left out.
    fn from_str(text: &str) -> Result<Self, String> {
        let refuse = || format!("`{text}` is no link: write a rate and a latency, like 10GB/s,50us");
        let (rate, latency) = text.split_once(',').unwrap_or((text, "0us"));
        let rates = [("GB/s", 1e9), ("MB/s", 1e6), ("kB/s", 1e3), ("B/s", 1.0)];
        let times = [("ns", 1.0), ("us", 1e3), ("ms", 1e6)];
        let rate = scaled(rate.trim(), &rates).filter(|rate| *rate >= 1.0).ok_or_else(refuse)?;
        let latency = scaled(latency.trim(), &times).ok_or_else(refuse)?;
        Ok(Link { bytes_per_second: rate as u64, latency: Duration::from_nanos(latency as u64) })
    }
}

/// A number with one of some units; nothing if it is not one of at most 10¹⁵.
fn scaled(text: &str, units: &[(&str, f64)]) -> Option<f64> {
    let (number, factor) =
        units.iter().find_map(|(unit, factor)| Some((text.strip_suffix(unit)?, factor)))?;
    let value = number.trim().parse::<f64>().ok()? * factor;
    (0.0..=1e15).contains(&value).then_some(value)
}

/// How well sleeping kept to a link's times.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Pacing {
    /// Exchanges that took time on the link.
    pub exchanges: u64,
    /// Those whose rows took longer to copy than the link would: the machine cannot show them.
    pub unresolved: u64,
    /// How long after the link's time the others were over.
    pub late: Lateness,
}

impl Pacing {
    /// Adds what another link, or the same one later, did.
    pub fn add(&mut self, other: &Pacing) {
        self.exchanges += other.exchanges;
        self.unresolved += other.unresolved;
        self.late.add(&other.late);
    }
}

/// How late things were: counts of durations of about the same length, so that it stays small however many there are.
///
/// 100 ns is in the bin of 96 to 104 ns: each power of two is cut into eight.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Lateness {
    /// By the number of a bin.
    counts: BTreeMap<u64, u64>,
    worst: Duration,
}

impl Lateness {
    /// Bins in a power of two.
    const FINE: u64 = 8;

    fn note(&mut self, late: Duration) {
        let ns = late.as_nanos() as u64;
        // Of a number, its power of two and the three bits after the first.
        let shift = (ns | Self::FINE).ilog2() - Self::FINE.ilog2();
        let bin = u64::from(shift) * Self::FINE + (ns >> shift);
        *self.counts.entry(bin).or_default() += 1;
        self.worst = self.worst.max(late);
    }

    fn add(&mut self, other: &Lateness) {
        for (&bin, count) in &other.counts {
            *self.counts.entry(bin).or_default() += count;
        }
        self.worst = self.worst.max(other.worst);
    }

    /// What a share of the durations is no longer than, to a sixteenth of it; zero of nothing.
    pub fn quantile(&self, share: f64) -> Duration {
        let total: u64 = self.counts.values().sum();
        let wanted = (share * total as f64).ceil().max(1.0) as u64;
        let mut seen = 0;
        let bin = self.counts.iter().find(|(_, count)| {
            seen += *count;
            seen >= wanted
        });
        let Some((&bin, _)) = bin else { return Duration::ZERO };
        let shift = (bin / Self::FINE).saturating_sub(1);
        let start = (bin - shift * Self::FINE) << shift;
        Duration::from_nanos(start + (1 << shift) / 2).min(self.worst)
    }

    /// The longest.
    pub fn worst(&self) -> Duration {
        self.worst
    }
}

/// One rank's link while it runs.
#[derive(Debug)]
pub struct PacedLink {
    link: Link,
    state: Mutex<LinkState>,
}

#[derive(Debug)]
struct LinkState {
    free_at: Instant,
    /// When the lane last woke up from an exchange that the link was slower with than the machine.
    woke: Instant,
    pacing: Pacing,
}

impl PacedLink {
    pub(crate) fn new(link: Link) -> Self {
        let now = Instant::now();
        PacedLink {
            link,
            state: Mutex::new(LinkState { free_at: now, woke: now, pacing: Pacing::default() }),
        }
    }

    /// How well this rank kept to its link's times since this was last asked.
    pub fn take_pacing(&self) -> Pacing {
        std::mem::take(&mut self.state().pacing)
    }

    /// Sleeps until the link would have carried `bytes` that could start at `ready`, or the deadline has passed: then it is
    /// false. No sleep is longer than [`FaultCell::POLL`]: a link may be so slow that the world stops first.
    pub(crate) fn carry(
        &self,
        ready: Instant,
        bytes: u64,
        faults: &FaultCell,
        deadline: &mut Deadline,
    ) -> Result<bool, Fault> {
        let (due, copied) = (self.book(ready, bytes), Instant::now());
        let mut now = copied;
        while now < due {
            faults.check()?;
            if deadline.passed() {
                return Ok(false);
            }
            std::thread::sleep(due.saturating_duration_since(now).min(FaultCell::POLL));
            now = Instant::now();
        }
        self.note(due, copied, now);
        Ok(true)
    }

    /// When an exchange that the lane comes to at `now` could have begun: when the link was free, if only waking up kept
    /// the lane from it. Where rows were copied late, the lane may have come to the next exchange late for other reasons too.
    pub(crate) fn begin(&self, now: Instant) -> Instant {
        /// From waking up to the next exchange, if nothing is waited for in between.
        const AT_ONCE: Duration = Duration::from_micros(20);
        let state = self.state();
        if now.saturating_duration_since(state.woke) < AT_ONCE { state.free_at.min(now) } else { now }
    }

    /// When an exchange of `bytes` that could start at `ready` is over; books the link until then.
    pub(crate) fn book(&self, ready: Instant, bytes: u64) -> Instant {
        let mut state = self.state();
        state.free_at = ready.max(state.free_at) + self.link.time(bytes);
        state.free_at
    }

    /// Notes an exchange whose rows were there at `copied`, which should have been over at `due` and was at
    /// `now`.
    pub(crate) fn note(&self, due: Instant, copied: Instant, now: Instant) {
        let mut state = self.state();
        state.pacing.exchanges += 1;
        if copied > due {
            state.pacing.unresolved += 1;
            return;
        }
        state.woke = now;
        state.pacing.late.note(now.saturating_duration_since(due));
    }

    fn state(&self) -> MutexGuard<'_, LinkState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn links_are_written_as_people_write_them() {
        let link: Link = "10GB/s,50us".parse().unwrap();
        assert_eq!(link, Link { bytes_per_second: 10_000_000_000, latency: Duration::from_micros(50) });
        assert_eq!(link.to_string(), "10GB/s,50us");
        assert_eq!("1.5 MB/s".parse::<Link>().unwrap().to_string(), "1500000B/s,0us");
        for wrong in ["", "10", "0GB/s", "-1GB/s", "10GB/s,5", "NaNGB/s", "1e30GB/s"] {
            assert!(wrong.parse::<Link>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn lateness_is_counted_to_a_sixteenth() {
        let mut late = Lateness::default();
        assert_eq!((late.quantile(0.5), late.worst()), (Duration::ZERO, Duration::ZERO));
        for exact in (0..100_000_u64).step_by(7) {
            let mut one = Lateness::default();
            one.note(Duration::from_nanos(exact));
            let found = one.quantile(0.5).as_nanos() as u64;
            assert!(found.abs_diff(exact) * 16 <= exact, "{found} of {exact}");
            late.add(&one);
        }
        let near = |share, exact: u64| {
            late.quantile(share).as_nanos().abs_diff(u128::from(exact)) * 15 < u128::from(exact)
        };
        assert!(near(0.5, 50_000) && near(0.95, 95_000), "{late:?}");
        assert_eq!(late.worst(), Duration::from_nanos(99_995));
    }

    #[test]
    fn waking_up_late_delays_nothing_that_follows_at_once() {
        let link = PacedLink::new("1GB/s,0us".parse().unwrap());
        let start = link.state().free_at;
        let after = |microseconds| start + Duration::from_micros(microseconds);
        let due = link.book(start, 100_000);
        assert_eq!(due, after(100));
        link.note(due, start, after(190));
        assert_eq!(link.begin(after(195)), due, "90 us late, 5 us before the next");
        assert_eq!(link.begin(after(250)), after(250), "something else was waited for");
        assert_eq!(link.book(link.begin(after(195)), 50_000), after(150));
    }

    /// A copy that products kept waiting is over when they are: what follows at once may have waited for them too.
    #[test]
    fn rows_that_were_copied_late_give_what_follows_no_start() {
        let link = PacedLink::new("1GB/s,0us".parse().unwrap());
        let start = link.state().free_at;
        let after = |microseconds| start + Duration::from_micros(microseconds);
        let due = link.book(start, 100_000);
        link.note(due, after(900), after(900));
        assert_eq!(link.begin(after(905)), after(905));
        assert_eq!(link.book(after(905), 50_000), after(955));
    }

    #[test]
    fn what_cannot_be_shown_is_counted_apart() {
        let link = PacedLink::new("1GB/s,10us".parse().unwrap());
        let due = link.state().free_at;
        let after = |microseconds| due + Duration::from_micros(microseconds);
        link.note(due, due, after(3));
        link.note(due, after(1), after(2));
        let pacing = link.take_pacing();
        assert_eq!(
            (pacing.exchanges, pacing.unresolved, pacing.late.worst()),
            (2, 1, Duration::from_micros(3))
        );
        assert_eq!(link.take_pacing(), Pacing::default());
    }

    #[test]
    fn exchanges_queue_on_a_busy_link() {
        let link = PacedLink::new("1GB/s,10us".parse().unwrap());
        let start = link.state().free_at;
        let first = link.book(start, 1_000_000);
        assert_eq!(first - start, Duration::from_micros(1010));
        let second = link.book(start + Duration::from_micros(100), 1_000_000);
        assert_eq!(second - start, Duration::from_micros(2020), "it waits for the first");
        let third = link.book(start + Duration::from_millis(5), 0);
        assert_eq!(third - start, Duration::from_micros(5010), "the link was free before it was ready");
    }
}
