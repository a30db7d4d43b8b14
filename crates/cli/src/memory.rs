//! How much memory this process may use: the machine's, within the limits of its control groups and of its own.

use std::fs::read_to_string;
use std::path::{Path, PathBuf};

/// Memory in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Memory {
    /// What the process may use, if nobody else used any.
    pub(crate) total: u64,
    /// What it can have more without swapping.
    pub(crate) available: u64,
    /// What bounds it, for messages.
    pub(crate) bound: Bound,
}

/// What bounds the memory of a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Bound {
    /// There is no more in the machine.
    Machine,
    /// A control group, as containers have.
    Group,
    /// A limit of the process, as `ulimit -v` sets.
    Process,
}

impl Bound {
    /// Who has so much memory left.
    pub(crate) fn owner(self) -> &'static str {
        match self {
            Bound::Machine => "this machine",
            Bound::Group => "the control group of this process",
            Bound::Process => "the limit of this process (ulimit)",
        }
    }
}

/// Memory that this process may use, where the system tells.
pub(crate) fn look() -> Option<Memory> {
    of(Path::new("/proc"))
}

fn of(proc: &Path) -> Option<Memory> {
    let info = read_to_string(proc.join("meminfo")).ok()?;
    let kibibytes = |text: &str, key: &str| Some(number(text, key)?.saturating_mul(1024));
    let machine = Memory {
        total: kibibytes(&info, "MemTotal:")?,
        available: kibibytes(&info, "MemAvailable:")?,
        bound: Bound::Machine,
    };
    let status = read_to_string(proc.join("self/status")).unwrap_or_default();
    let limits = read_to_string(proc.join("self/limits")).unwrap_or_default();
    let own = [("Max address space", "VmSize:"), ("Max data size", "VmData:")].into_iter().filter_map(|it| {
        let total = number(&limits, it.0)?;
        let used = kibibytes(&status, it.1)?;
        Some(Memory { total, available: total.saturating_sub(used), bound: Bound::Process })
    });
    let bounds = groups(proc).into_iter().chain(own);
    Some(bounds.fold(machine, |all, bound| Memory {
        total: all.total.min(bound.total),
        available: all.available.min(bound.available),
        bound: if bound.available < all.available { bound.bound } else { all.bound },
    }))
}

/// The number after a word at the beginning of a line; none where it is `unlimited`.
fn number(text: &str, key: &str) -> Option<u64> {
    text.lines().find_map(|line| line.strip_prefix(key)?.split_whitespace().next()?.parse().ok())
}

/// What the control groups of this process leave it, and all groups above them.
fn groups(proc: &Path) -> Vec<Memory> {
    let own = read_to_string(proc.join("self/cgroup")).unwrap_or_default();
    let mounts = read_to_string(proc.join("self/mountinfo")).unwrap_or_default();
    let mut found = Vec::new();
    for version in [&V2, &V1] {
        let Some(path) = own.lines().find_map(|line| version.path(line)) else { continue };
        for (root, mount) in mounts.lines().filter_map(|line| version.mount(line)) {
            // In a container the path may begin above what is mounted.
            let below = Path::new(path).strip_prefix(root).unwrap_or(Path::new("")).to_owned();
            let folder = mount.join(below.strip_prefix("/").unwrap_or(&below));
            let folders = folder.ancestors().take_while(|folder| folder.starts_with(&mount));
            found.extend(folders.filter_map(|folder| version.memory(folder)));
        }
    }
    found
}

/// How a version of control groups says what memory there is.
struct Version {
    limit: &'static str,
    used: &'static str,
    /// Caches of files, which make way.
    reclaimable: [&'static str; 2],
    is_second: bool,
}

const V2: Version = Version {
    limit: "memory.max",
    used: "memory.current",
    reclaimable: ["inactive_file ", "active_file "],
    is_second: true,
};

const V1: Version = Version {
    limit: "memory.limit_in_bytes",
    used: "memory.usage_in_bytes",
    reclaimable: ["total_inactive_file ", "total_active_file "],
    is_second: false,
};

impl Version {
    /// The group's path, from a line `ID:CONTROLLERS:PATH` of `/proc/self/cgroup`.
    fn path<'a>(&self, line: &'a str) -> Option<&'a str> {
        let mut parts = line.splitn(3, ':');
        let (_, controllers, path) = (parts.next()?, parts.next()?, parts.next()?);
        let ours = match self.is_second {
            true => controllers.is_empty(),
            false => controllers.split(',').any(|name| name == "memory"),
        };
        ours.then_some(path)
    }

    /// What is mounted and where, from a line `… ROOT PLACE … - TYPE SOURCE OPTIONS` of `/proc/self/mountinfo`.
    fn mount<'a>(&self, line: &'a str) -> Option<(&'a str, PathBuf)> {
        let (before, after) = line.split_once(" - ")?;
        let mut after = after.split_whitespace();
        let (kind, options) = (after.next()?, after.nth(1).unwrap_or_default());
        let ours = match self.is_second {
            true => kind == "cgroup2",
            false => kind == "cgroup" && options.split(',').any(|name| name == "memory"),
        };
        let mut before = before.split_whitespace().skip(3);
        let (root, place) = (before.next()?, before.next()?);
        // A space in a path is written as \040, which no system's groups have.
        ours.then(|| (root, PathBuf::from(place)))
    }

    /// A group's memory; nothing where it has no limit.
    fn memory(&self, folder: &Path) -> Option<Memory> {
        let read = |name: &str| read_to_string(folder.join(name)).ok();
        let total: u64 = read(self.limit)?.trim().parse().ok()?;
        let used: u64 = read(self.used)?.trim().parse().ok()?;
        let stat = read("memory.stat").unwrap_or_default();
        let caches: u64 = self.reclaimable.iter().filter_map(|key| number(&stat, key)).sum();
        Some(Memory {
            total,
            available: total.saturating_sub(used.saturating_sub(caches)),
            bound: Bound::Group,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::{create_dir_all, write};

    /// A `/proc` and groups of text.
    struct System(tempfile::TempDir);

    impl System {
        fn new() -> Self {
            let system = System(tempfile::tempdir().unwrap());
            system.file("proc/meminfo", "MemTotal:  1000 kB\nMemFree: 1 kB\nMemAvailable:    600 kB\n");
            system
        }

        fn file(&self, name: &str, text: &str) {
            let path = self.0.path().join(name);
            create_dir_all(path.parent().unwrap()).unwrap();
            write(path, text).unwrap();
        }

        fn memory(&self) -> Memory {
            of(&self.0.path().join("proc")).unwrap()
        }

        fn mounted(&self, root: &str, kind: &str, options: &str) {
            let place = self.0.path().join("groups");
            let line =
                format!("31 23 0:28 {root} {} rw,relatime - {kind} {kind} rw,{options}\n", place.display());
            self.file("proc/self/mountinfo", &format!("30 23 0:1 / /proc rw - proc proc rw\n{line}"));
        }
    }

    #[test]
    fn a_machine_without_limits() {
        let system = System::new();
        let all = Memory { total: 1000 << 10, available: 600 << 10, bound: Bound::Machine };
        assert_eq!(system.memory(), all);
        system.file(
            "proc/self/limits",
            "Max address space         unlimited            unlimited            bytes\n",
        );
        system.file("proc/self/cgroup", "0::/\n");
        assert_eq!(system.memory(), all);
        assert!(look().is_some_and(|memory| memory.available <= memory.total));
    }

    #[test]
    fn groups_of_the_second_version() {
        let system = System::new();
        system.mounted("/", "cgroup2", "nsdelegate");
        system.file("proc/self/cgroup", "0::/outer/inner\n");
        system.file("groups/outer/inner/memory.max", "max\n");
        system.file("groups/outer/inner/memory.current", "100\n");
        system.file("groups/outer/memory.max", "400000\n");
        system.file("groups/outer/memory.current", "300000\n");
        system
            .file("groups/outer/memory.stat", "anon 5\nactive_file 10000\ninactive_file 20000\nfile 90000\n");
        assert_eq!(system.memory(), Memory { total: 400_000, available: 130_000, bound: Bound::Group });
        system.file("groups/outer/inner/memory.max", "50000\n");
        assert_eq!(system.memory(), Memory { total: 50_000, available: 49_900, bound: Bound::Group });
        // Seen from within a container: the mount is the group.
        system.mounted("/outer/inner", "cgroup2", "");
        system.file("groups/memory.max", "70000\n");
        system.file("groups/memory.current", "80000\n");
        assert_eq!(system.memory().available, 0);
    }

    #[test]
    fn groups_of_the_first_version() {
        let system = System::new();
        system.mounted("/", "cgroup", "memory");
        system.file("proc/self/cgroup", "9:name=systemd:/\n5:cpu,memory:/box\n0::/\n");
        system.file("groups/box/memory.limit_in_bytes", "157286400\n");
        system.file("groups/box/memory.usage_in_bytes", "57286400\n");
        assert_eq!(system.memory().bound, Bound::Machine, "the machine has less");
        system.file("proc/meminfo", "MemTotal: 99999999 kB\nMemAvailable: 99999999 kB\n");
        let group = Memory { total: 157_286_400, available: 100_000_000, bound: Bound::Group };
        assert_eq!(system.memory(), group);
        // No limit is a very large one.
        system.file("groups/box/memory.limit_in_bytes", "9223372036854771712\n");
        assert_eq!(system.memory().bound, Bound::Machine);
    }

    #[test]
    fn limits_of_the_process() {
        let system = System::new();
        system.file(
            "proc/self/limits",
            "Max cpu time  1 1 seconds\nMax address space         500000               600000     bytes\n",
        );
        system.file("proc/self/status", "Name:\tepsmoe\nVmPeak:\t     400 kB\nVmSize:\t     100 kB\n");
        assert_eq!(
            system.memory(),
            Memory { total: 500_000, available: 500_000 - 102_400, bound: Bound::Process }
        );
    }
}
