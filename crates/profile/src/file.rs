//! Where a machine's cost model is kept, and for which hardware it is good.

use epsmoe_base::files::{check_place, read_plain_text, write_whole};
use epsmoe_base::{DType, cores, env};
use epsmoe_device::cpu::gemm::Isa;
use epsmoe_fabric::Link;
use epsmoe_plan::{CostError, CostModel, HostCost, LinkCost, Piecewise};
use std::io;
use std::path::{Path, PathBuf};

/// Raised whenever kernels or the pipeline change what anything costs: older profiles are refused.
const KERNEL_REVISION: u32 = 6;

/// The same for those of a GPU.
const GPU_KERNEL_REVISION: u32 = 1;

/// Bytes of a profile that is read: some hundred times what one has.
const MOST_BYTES: u64 = 1 << 20;

/// What a profile depends on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fingerprint {
    /// The GPU of each rank, in words; without one ranks compute on this machine's processor.
    pub gpu: Option<String>,
    /// The processor's name.
    pub cpu: String,
    /// Hardware threads that this process may use.
    pub cores: usize,
    /// Ranks R: they share caches and memory.
    pub ranks: usize,
    /// Threads of each.
    pub threads: usize,
    /// Vector instructions.
    pub isa: Isa,
    /// Format of activations.
    pub dtype: DType,
}

impl Default for Fingerprint {
    /// One rank of one thread on this machine.
    fn default() -> Self {
        Fingerprint::of_cpu(1, 1, Isa::detect(), DType::F32)
    }
}

/// A profile that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ProfileError {
    /// It is not there, or cannot be read.
    #[error("cannot read the profile {}: {error}; `epsmoe profile` measures one", path.display())]
    Read {
        /// Where.
        path: PathBuf,
        /// Why.
        error: io::Error,
    },
    /// It cannot be written.
    #[error("cannot write the profile {}: {error}", path.display())]
    Write {
        /// Where.
        path: PathBuf,
        /// Why.
        error: io::Error,
    },
    /// Its text is no cost model.
    #[error("the profile {}: {error}", path.display())]
    Model {
        /// Where.
        path: PathBuf,
        /// Why.
        error: CostError,
    },
    /// It was measured with something else.
    #[error("the profile {} was measured on {got}, but this is {want}: measure again with `epsmoe profile`", path.display())]
    Other {
        /// Where.
        path: PathBuf,
        /// What it was measured on.
        got: String,
        /// What was wanted.
        want: String,
    },
}

impl Fingerprint {
    /// This machine with so many ranks of so many threads.
    pub fn of_cpu(ranks: usize, threads: usize, isa: Isa, dtype: DType) -> Self {
        let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let fields = info.lines().filter_map(|line| line.split_once(':'));
        let name = fields.filter(|(key, _)| key.trim() == "model name").map(|(_, name)| name.trim()).next();
        Fingerprint {
            gpu: None,
            cpu: name.unwrap_or("unknown processor").to_owned(),
            cores: cores(),
            ranks,
            threads,
            isa,
            dtype,
        }
    }

    /// A GPU, described in words, for each of so many ranks.
    pub fn of_gpu(description: &str, ranks: usize, dtype: DType) -> Self {
        // Which driver it has changes little.
        let gpu = description.split(", driver").next().unwrap_or_default().to_owned();
        Fingerprint { gpu: Some(gpu), ..Fingerprint::of_cpu(ranks, 1, Isa::Scalar, dtype) }
    }

    /// The hardware, in words.
    pub fn machine(&self) -> String {
        if let Some(gpu) = &self.gpu {
            return gpu.clone();
        }
        format!("{}, {}", self.cpu, epsmoe_base::count(self.cores, "core"))
    }

    /// The kernels and who runs them, in words.
    pub fn kernels(&self) -> String {
        let (ranks, threads) =
            (epsmoe_base::count(self.ranks, "rank"), epsmoe_base::count(self.threads, "thread"));
        if self.gpu.is_some() {
            return format!("cuda revision {GPU_KERNEL_REVISION}, {ranks}");
        }
        format!("cpu {} revision {KERNEL_REVISION}, {ranks} of {threads}", self.isa)
    }
}

/// `$XDG_CACHE_HOME/epsmoe/profiles/…toml`, named after the machine, the kernels and the format.
pub fn default_path(fingerprint: &Fingerprint) -> PathBuf {
    let home = || env::text("HOME").map(|home| Path::new(&home).join(".cache"));
    let cache = env::text("XDG_CACHE_HOME").map(PathBuf::from).or_else(home).unwrap_or_default();
    let words = format!("{} {} {}", fingerprint.machine(), fingerprint.kernels(), fingerprint.dtype);
    let name: Vec<&str> =
        words.split(|c: char| !c.is_ascii_alphanumeric()).filter(|word| !word.is_empty()).collect();
    cache.join("epsmoe").join("profiles").join(format!("{}.toml", name.join("-").to_lowercase()))
}

/// Reads a profile, which must be of this hardware and these kernels.
pub fn load(path: &Path, wanted: &Fingerprint) -> Result<CostModel, ProfileError> {
    let text = read_plain_text(path, MOST_BYTES)
        .map_err(|error| ProfileError::Read { path: path.to_owned(), error })?;
    let cost =
        CostModel::parse(&text).map_err(|error| ProfileError::Model { path: path.to_owned(), error })?;
    let (machine, kernels, dtype) = (wanted.machine(), wanted.kernels(), wanted.dtype.to_string());
    let pairs =
        [(cost.machine.clone(), machine), (cost.kernels.clone(), kernels), (cost.dtype.to_string(), dtype)];
    match pairs.into_iter().find(|(got, want)| got != want) {
        Some((got, want)) => Err(ProfileError::Other { path: path.to_owned(), got, want }),
        None => Ok(cost),
    }
}

/// Writes a profile, led by lines of remarks.
pub fn store(path: &Path, cost: &CostModel, remarks: &[String]) -> Result<(), ProfileError> {
    let header: String = remarks.iter().map(|line| format!("# {line}\n")).collect();
    let text = header + &cost.to_text();
    let written = make_folder(path).and_then(|()| write_whole(path, |out| out.write_all(text.as_bytes())));
    written.map_err(|error| ProfileError::Write { path: path.to_owned(), error })
}

/// Makes the folder of a profile, and refuses a place where the profile could not be written: measuring takes a minute.
pub fn prepare(path: &Path) -> Result<(), ProfileError> {
    let prepared = make_folder(path).and_then(|()| check_place(path));
    prepared.map_err(|error| ProfileError::Write { path: path.to_owned(), error })
}

/// Makes the folder of a file, if it is not there yet.
pub(crate) fn make_folder(path: &Path) -> io::Result<()> {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
    folder.map_or(Ok(()), std::fs::create_dir_all)
}

/// The same machine with rows between ranks paced by a link: what the link carries follows from its own figures, and a
/// lane that sleeps until then wakes up a little late.
pub fn with_link(cost: &CostModel, link: Link) -> CostModel {
    let start = link.latency.as_nanos() as u64 + cost.host.sleep_ns;
    // Woken by the clock, at a time that includes it.
    CostModel {
        link: LinkCost { near: Piecewise::line(start, link.bytes_per_second), ..cost.link.clone() },
        host: HostCost { ..cost.host.clone() },
        ..cost.clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Effort, Kept, RigOptions, RigShape, measure};
    use std::sync::Arc;
    use std::time::Duration;

    /// A whole profile of next to nothing: it is written, read, and refused for other hardware.
    #[test]
    fn a_small_profile_comes_back() {
        let fingerprint = Fingerprint::of_cpu(2, 1, Isa::Scalar, DType::F32);
        let options = RigOptions {
            ranks: 2,
            threads: 1,
            isa: Isa::Scalar,
            dtype: DType::F32,
            link: None,
            timeout: Duration::from_secs(30),
            weights: Arc::default(),
        };
        let shape = RigShape { hidden: 64, inner: 64, experts: 4, top_k: 2, shared_inner: 64 };
        let effort =
            Effort { most: Duration::from_secs(30), shapes: vec![shape], rows: vec![1, 8], repeats: 1 };
        let cost = measure(&fingerprint, &options, &effort, &mut Kept::default(), &mut |_, _| {}).unwrap();
        assert!(cost.grouped.flops_per_second != 1_000_000_000, "nothing was measured");
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("new/profile.toml");
        store(&path, &cost, &["a remark".into()]).unwrap();
        assert_eq!(load(&path, &fingerprint).unwrap(), cost);
        let other = Fingerprint { threads: 2, ..fingerprint };
        let refused = load(&path, &other).unwrap_err().to_string();
        assert!(
            refused.contains("2 ranks of 1 thread,") && refused.contains("2 ranks of 2 threads:"),
            "{refused}"
        );
        let missing = load(&folder.path().join("none"), &other).unwrap_err().to_string();
        assert!(missing.contains("`epsmoe profile` measures one"), "{missing}");
        let paced = with_link(&cost, "1GB/s,50us".parse().unwrap());
        assert_eq!(paced.link.near.extended(1000), 51_000 + cost.host.sleep_ns);
    }
}
