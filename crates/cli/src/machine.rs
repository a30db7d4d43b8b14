//! What this computer is, for figures that are to be compared and for `doctor`.

use crate::memory;
use epsmoe_base::cores;
use serde::Serialize;
use std::fs::read_to_string;

/// A computer.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Machine {
    /// The processor's name.
    pub(crate) cpu: String,
    /// Hardware threads that this process may use.
    pub(crate) cores: usize,
    /// The vector instructions that matter, in ascending order.
    pub(crate) isa: Vec<&'static str>,
    /// Memory that this process may use; 0 where the system does not tell.
    pub(crate) memory_bytes: u64,
    /// What is left of it.
    pub(crate) memory_available_bytes: u64,
    pub(crate) os: &'static str,
    pub(crate) arch: &'static str,
}

impl Machine {
    pub(crate) fn look() -> Self {
        let info = read_to_string("/proc/cpuinfo").unwrap_or_default();
        let memory = memory::look();
        Machine {
            cpu: field(&info, "model name").unwrap_or("unknown").to_owned(),
            cores: cores(),
            isa: isa(&info),
            memory_bytes: memory.map_or(0, |memory| memory.total),
            memory_available_bytes: memory.map_or(0, |memory| memory.available),
            os: std::env::consts::OS,
            arch: std::env::consts::ARCH,
        }
    }
}

/// Programs that wanted to run, averaged over the last 1, 5 and 15 minutes, where the system tells.
pub(crate) fn load_average() -> Option<[f64; 3]> {
    let text = read_to_string("/proc/loadavg").ok()?;
    let mut numbers = text.split_whitespace().map(str::parse);
    let mut next = || numbers.next()?.ok();
    Some([next()?, next()?, next()?])
}

fn isa(info: &str) -> Vec<&'static str> {
    const NOTABLE: [&str; 8] =
        ["avx2", "fma", "avx512f", "avx512_bf16", "amx_tile", "amx_bf16", "asimd", "bf16"];
    let flags = field(info, "flags").or_else(|| field(info, "Features")).unwrap_or_default();
    NOTABLE.into_iter().filter(|name| flags.split_whitespace().any(|flag| flag == *name)).collect()
}

/// The first `key : value` of such a file.
fn field<'a>(text: &'a str, key: &str) -> Option<&'a str> {
    let mut lines = text.lines().filter_map(|line| line.split_once(':'));
    lines.find(|(name, _)| name.trim() == key).map(|(_, value)| value.trim())
}
