//! What kernels say is wrong with the numbers they were given: one page of host memory, written by the first
//! thread that finds something and read while waiting.

use super::Subject;
use super::driver::{Context, CudaError, DeviceMemory, PinnedMemory, Stream};
use crate::op::not_finite;
use std::sync::Arc;

const WORDS: usize = 7;

/// The twin of `Report` in `common.cuh`: where a kernel complains, and as which operation.
#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct Report {
    claim: u64,
    page: u64,
    serial: u32,
    padding: u32,
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
            1 => below("token id"),
            2 => below("cache slot"),
            3 => below("row"),
            6 => format!("sequences hold {first} of {second} tokens"),
            7 => format!("sequence {first} spans tokens {second}..{third}"),
            8 => below("cache block"),
            9 => {
                let cache =
                    subject.map_or_else(|| "the cache".into(), |subject| format!("{:?}", subject.buffer));
                format!("cache block {first} of sequence {second} is outside {cache}")
            }
            10 => below("expert"),
            11 => format!("rows of expert {first} end at {second}, but start at {third}"),
            12 => below("end of an expert's rows"),
            13 => subject.map_or_else(
                || format!("row {first} holds a NaN or an infinity"),
                |subject| not_finite(first as usize, &subject.buffer, subject.origin),
            ),
            20 => format!("token {first} is sent to expert {second} twice"),
            21 => below("slot"),
            22 => format!("{first} rows are counted, expected {second}"),
            23 => {
                format!("token {first} is sent to more than {second} ranks, which is all there is room for")
            }
            24 => row("the place behind its slots", "none"),
            25 => row("a slot", &format!("more than {fourth}")),
            26 => row("its number of slots", "at least 1"),
            27 => row("a slot", &format!("less than {fourth}")),
            28 => row("its first slot", &fourth.to_string()),
            29 => format!(
                "row {first}, from source {second}: it has last slot {third}, expected at most {fourth} such rows"
            ),
            30 => {
                format!("row {first}, from source {second}: it has slot {third}, expected {fourth} such rows")
            }
            31 => format!("{second} rows have slot {first}, expected {third}"),
            32 => format!("there are {first} assignments, expected {second}"),
            cause => format!("cause {cause} with {first}, {second} and {third}. This is a bug."),
        }
    }
}
