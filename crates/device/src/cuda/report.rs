//! What kernels say is wrong with the numbers they were given: one page of host memory, written by the first
//! thread that finds something and read while waiting.

use super::Subject;
use super::driver::{Context, CudaError, DeviceMemory, PinnedMemory, Stream};
use super::layout::{Layout, twin};
use crate::op::not_finite;
use std::sync::Arc;

const WORDS: usize = 7;

twin! {
    pub(super) struct Report = "Report" in "common.cuh" {
        claim: u64,
        page: u64,
        serial: u32,
        padding: u32,
    }
}

/// What the sources are held against.
pub(super) const LAYOUTS: &[&Layout] = &[Report::LAYOUT];

macro_rules! causes {
    ($($name:ident = $number:literal,)*) => {
        /// What can be wrong, by the numbers that kernels write. The twin of `Cause` in `common.cuh`.
        mod cause {
            $(pub(super) const $name: u32 = $number;)*
        }

        /// Their names and numbers, for the sources to be held against.
        pub(super) const CAUSES: &[(&str, u32)] = &[$((stringify!($name), $number)),*];
    };
}

causes! {
    TOKEN_ID = 1,
    CACHE_SLOT = 2,
    SOURCE_ROW = 3,
    TOKENS_HELD = 6,
    SPAN = 7,
    CACHE_BLOCK = 8,
    BLOCK_OUTSIDE = 9,
    EXPERT = 10,
    ROWS_DESCEND = 11,
    ROWS_END = 12,
    NOT_FINITE = 13,
    POSITION = 14,
    EXPERT_TWICE = 20,
    SLOT = 21,
    ROWS_COUNTED = 22,
    RANKS_OF_TOKEN = 23,
    ROW_STRAY = 24,
    ROW_DESCENDS = 25,
    ROW_EMPTY = 26,
    ROW_SLOT = 27,
    ROW_FIRST = 28,
    ROW_LAST = 29,
    ROW_ASSIGNED = 30,
    ROWS_WITH_SLOT = 31,
    ASSIGNMENTS = 32,
}

/// The page of one rank.
pub(super) struct ReportPage {
    claim: DeviceMemory,
    page: PinnedMemory,
    page_on_device: u64,
}

/// A complaint: which operation found what.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Complaint {
    pub(super) serial: u32,
    cause: u32,
    numbers: [u32; 4],
}

impl ReportPage {
    pub(super) fn new(context: &Arc<Context>, stream: &Stream) -> Result<Self, CudaError> {
        let claim = DeviceMemory::new(context, size_of::<u32>())?;
        // SAFETY: just allocated with that size, and nobody else has it yet.
        unsafe { stream.fill(claim.start, 0, claim.bytes) }?;
        stream.synchronize()?;
        let page = PinnedMemory::new(context, WORDS * size_of::<u32>())?;
        let page_on_device = page.device_address()?;
        Ok(ReportPage { claim, page, page_on_device })
    }

    /// What operation `serial` is to be given.
    pub(super) fn for_operation(&self, serial: u32) -> Report {
        Report { claim: self.claim.start, page: self.page_on_device, serial, padding: 0 }
    }

    /// The complaint, once there is one.
    pub(super) fn read(&self) -> Option<Complaint> {
        // SAFETY: the page holds as many words as are asked for; the GPU may write them meanwhile, so they are
        // read as volatile, the first word first, which is written last.
        let word = |index: usize| unsafe { self.page.start.cast::<u32>().add(index).read_volatile() };
        if word(0) == 0 {
            return None;
        }
        std::sync::atomic::fence(std::sync::atomic::Ordering::Acquire);
        Some(Complaint { serial: word(1), cause: word(2), numbers: [word(3), word(4), word(5), word(6)] })
    }
}

impl Complaint {
    /// In words; `subject` is what the operation's complaints are about, if anything.
    pub(super) fn describe(&self, subject: Option<&Subject>) -> String {
        let [first, second, third, fourth] = self.numbers;
        let row = |what: &str, want: &str| {
            format!("row {first}, from source {second}: {what} is {third}, expected {want}")
        };
        let below = |what: &str| format!("{what} {first} is not below {second}");
        match self.cause {
            cause::TOKEN_ID => below("token id"),
            cause::CACHE_SLOT => below("cache slot"),
            cause::SOURCE_ROW => below("row"),
            cause::TOKENS_HELD => format!("sequences hold {first} of {second} tokens"),
            cause::SPAN => format!("sequence {first} spans tokens {second}..{third}"),
            cause::CACHE_BLOCK => below("cache block"),
            cause::BLOCK_OUTSIDE => {
                let cache =
                    subject.map_or_else(|| "the cache".into(), |subject| format!("{:?}", subject.buffer));
                format!("cache block {first} of sequence {second} is outside {cache}")
            }
            cause::EXPERT => below("expert"),
            cause::POSITION => below("position"),
            cause::ROWS_DESCEND => format!("rows of expert {first} end at {second}, but start at {third}"),
            cause::ROWS_END => below("end of an expert's rows"),
            cause::NOT_FINITE => subject.map_or_else(
                || format!("row {first} holds a NaN or an infinity"),
                |subject| not_finite(first as usize, subject.of_part(second), subject.origin),
            ),
            cause::EXPERT_TWICE => format!("token {first} is sent to expert {second} twice"),
            cause::SLOT => below("slot"),
            cause::ROWS_COUNTED => format!("{first} rows are counted, expected {second}"),
            cause::RANKS_OF_TOKEN => {
                format!("token {first} is sent to more than {second} ranks, which is all there is room for")
            }
            cause::ROW_STRAY => row("the place behind its slots", "none"),
            cause::ROW_DESCENDS => row("a slot", &format!("more than {fourth}")),
            cause::ROW_EMPTY => row("its number of slots", "at least 1"),
            cause::ROW_SLOT => row("a slot", &format!("less than {fourth}")),
            cause::ROW_FIRST => row("its first slot", &fourth.to_string()),
            cause::ROW_LAST => format!(
                "row {first}, from source {second}: it has last slot {third}, expected at most {fourth} such rows"
            ),
            cause::ROW_ASSIGNED => {
                format!("row {first}, from source {second}: it has slot {third}, expected {fourth} such rows")
            }
            cause::ROWS_WITH_SLOT => format!("{second} rows have slot {first}, expected {third}"),
            cause::ASSIGNMENTS => format!("there are {first} assignments, expected {second}"),
            cause => format!("cause {cause} with {first}, {second} and {third}. This is a bug."),
        }
    }
}
