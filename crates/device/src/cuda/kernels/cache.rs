//! Compiled kernels on disk.

use super::parts::{Part, checked, options};
use super::{CACHE_VARIABLE, HEADERS};
use crate::DeviceError;
use epsmoe_base::files::{read_plain, write_whole};
use epsmoe_base::{env, hash_bytes};
use std::path::{Path, PathBuf};

/// Bytes of a file of machine code: some ten times what the largest has.
const MOST_BYTES: u64 = 64 << 20;

/// Compiled kernels on disk, named by what they were made of. A cache that cannot be written is only slow.
pub(super) struct Cache {
    folder: Option<PathBuf>,
    architecture: String,
    /// Hash of all that files have in common.
    common: u64,
}

impl Cache {
    pub(super) fn open(architecture: &str, version: (i32, i32)) -> Self {
        let inside = |variable, path: &str| env::text(variable).map(|folder| Path::new(&folder).join(path));
        let folder = env::text(CACHE_VARIABLE)
            .map(PathBuf::from)
            .or_else(|| inside("XDG_CACHE_HOME", "epsmoe/kernels"))
            .or_else(|| inside("HOME", ".cache/epsmoe/kernels"));
        let mut common = format!("{version:?} {:?}\n", options(architecture));
        HEADERS.iter().for_each(|(file, text)| common.push_str(&checked(file, text)));
        Cache { folder, architecture: architecture.to_owned(), common: hash_bytes(common.as_bytes()) }
    }

    pub(super) fn cubin(&self, part: &Part) -> Result<Vec<u8>, DeviceError> {
        self.kept(part).map_or_else(|| self.renew(part), Ok)
    }

    /// Where compiled kernels are kept; nothing if nobody can write there.
    pub(super) fn folder(&self) -> Option<&Path> {
        let folder = self.folder.as_deref()?;
        let probe = folder.join(format!(".{}", std::process::id()));
        let is_writable = std::fs::create_dir_all(folder).and_then(|()| std::fs::write(&probe, ""));
        // Left behind it would do no harm.
        let _ = std::fs::remove_file(&probe);
        is_writable.ok().map(|()| folder)
    }

    /// What lies on disk, if it is what was put there.
    pub(super) fn kept(&self, part: &Part) -> Option<Vec<u8>> {
        unsealed(read_plain(&self.path(part)?, MOST_BYTES).ok()?)
    }

    /// Compiles, and keeps what came of it: whole files only, so that programs that start at the same time never read
    /// each other's halves.
    pub(super) fn renew(&self, part: &Part) -> Result<Vec<u8>, DeviceError> {
        let cubin = part.compile(&options(&self.architecture))?.cubin;
        if let Some(path) = self.path(part) {
            let made = path.parent().map_or(Ok(()), std::fs::create_dir_all);
            // If that fails nothing is lost: the next start compiles again.
            let sealed = [&cubin[..], &seal(&cubin)].concat();
            let _ = made.and_then(|()| write_whole(&path, |out| out.write_all(&sealed)));
        }
        Ok(cubin)
    }

    fn path(&self, part: &Part) -> Option<PathBuf> {
        let hash = hash_bytes(format!("{:x}\n{}", self.common, part.text()).as_bytes());
        let name = format!("{}-{}-{hash:016x}.cubin", part.stem(), self.architecture);
        Some(self.folder.as_ref()?.join(name))
    }
}

/// What stands behind machine code on disk: its length and its hash. A driver given damaged code may crash.
fn seal(cubin: &[u8]) -> [u8; 16] {
    let words = [cubin.len() as u64, hash_bytes(cubin)].map(u64::to_le_bytes);
    words.as_flattened().try_into().unwrap_or_else(|_| unreachable!("two words of eight bytes"))
}

/// The machine code of a file, unless it was damaged.
fn unsealed(mut file: Vec<u8>) -> Option<Vec<u8>> {
    let cubin = file.len().checked_sub(seal(&[]).len())?;
    let whole = file[cubin..] == seal(&file[..cubin]);
    file.truncate(cubin);
    whole.then_some(file)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn damaged_machine_code_is_noticed() {
        let cubin = b"\x7fELF and more".to_vec();
        let file = [&cubin[..], &seal(&cubin)].concat();
        assert_eq!(unsealed(file.clone()), Some(cubin.clone()));
        let flipped = |at: usize| {
            let mut file = file.clone();
            file[at] ^= 1;
            file
        };
        assert!((0..file.len()).all(|at| unsealed(flipped(at)).is_none()));
        assert!((0..file.len()).all(|length| unsealed(file[..length].to_vec()).is_none()));
        assert_eq!(unsealed(cubin), None, "without a seal");
    }
}
