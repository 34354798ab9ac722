//! How much memory, or room on a disk, the rest of the way takes, against what there is.

use std::os::fd::AsFd;
use std::path::Path;

use anyhow::{Context, Result};

use super::preflight::Refusal;
use crate::report::human_bytes;

/// What reloading PID 1, the tools and restarted services may take for a while, in bytes. A guess on the safe
/// side: a systemd that re-executes itself serialises some MiB, ldconfig and restorecon take some tens.
pub const RESERVE: u64 = 64 << 20;

/// What is needed and what is free, in bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Need {
    /// Of what: `memory`, or room on a file system.
    pub what: String,
    /// Named parts of what is needed.
    pub parts: Vec<(&'static str, u64)>,
    /// What is free.
    pub free: u64,
}

impl Need {
    /// All parts together.
    pub fn sum(&self) -> u64 {
        self.parts.iter().fold(0, |sum, (_, bytes)| sum.saturating_add(*bytes))
    }

    pub(super) fn parts(&self) -> String {
        let part = |(name, bytes): &(&str, u64)| format!("{} {name}", human_bytes(*bytes));
        self.parts.iter().map(part).collect::<Vec<_>>().join(", ")
    }

    /// The refusal, if it is too little.
    pub fn check(self) -> Option<Refusal> {
        (self.sum() > self.free).then_some(Refusal::TooLittle { need: self })
    }
}

/// What the machine and the file system at `path` have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Free {
    /// Memory that is free or can be freed, in bytes.
    pub memory: u64,
    /// What may still be written at `path`, in bytes.
    pub room: u64,
    /// Whether what is written there takes memory.
    pub in_memory: bool,
}

impl Free {
    /// Asks the kernel.
    ///
    /// # Errors
    /// When /proc or the file system cannot be asked.
    pub fn at(path: &Path) -> Result<Self> {
        const TMPFS_MAGIC: rustix::fs::FsWord = 0x0102_1994;
        let text = std::fs::read_to_string("/proc/meminfo").context("reading /proc/meminfo")?;
        let memory = available(&text).context("/proc/meminfo has no MemAvailable")?;
        let asking = || format!("asking how much room {} has", path.display());
        let place = std::fs::File::open(path).with_context(asking)?;
        let stat = rustix::fs::fstatfs(place.as_fd()).with_context(asking)?;
        let block = u64::try_from(stat.f_bsize).unwrap_or_default();
        Ok(Self { memory, room: stat.f_bavail.saturating_mul(block), in_memory: stat.f_type == TMPFS_MAGIC })
    }

    /// What to compare before `copies` bytes are written to the store, `etc` bytes to `/etc` and its undo record,
    /// and what runs is refreshed.
    pub fn needs(&self, store: &Path, copies: u64, etc: u64) -> Vec<Need> {
        let mut memory = vec![("for /etc and its undo record", etc), ("to refresh what runs", RESERVE)];
        if self.in_memory {
            memory.insert(0, ("of content that is copied from the booted system", copies));
        }
        vec![
            Need { what: "memory".into(), parts: memory, free: self.memory },
            Need {
                what: format!("room in the node store {}", store.display()),
                parts: vec![("of content that is copied from the booted system", copies)],
                free: self.room,
            },
        ]
    }
}

/// `MemAvailable:` of proc_meminfo(5), which is in KiB, in bytes.
fn available(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    line.split_whitespace().next()?.parse::<u64>().ok()?.checked_mul(1024)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn meminfo() {
        assert_eq!(available("MemTotal: 9 kB\nMemAvailable:   2048 kB\n"), Some(2 << 20));
        assert_eq!(available("MemTotal: 9 kB\n"), None);
        let here = Free::at(Path::new("/proc/self")).unwrap();
        assert!(here.memory > 0 && !here.in_memory);
    }

    #[test]
    fn too_little_is_said_with_numbers() {
        let store = Path::new("/run/store");
        let refusals = |free: Free, copies, etc| -> Vec<String> {
            free.needs(store, copies, etc).into_iter().filter_map(Need::check).map(|no| no.to_string()).collect()
        };
        let ram = Free { memory: 100 << 20, room: 1 << 30, in_memory: true };
        assert_eq!(refusals(ram, 20 << 20, 16 << 20), [""; 0], "exactly enough");
        assert_eq!(
            refusals(ram, 21 << 20, 16 << 20),
            ["too little memory: 101.0 MiB are needed (21.0 MiB of content that is copied from the booted system, \
              16.0 MiB for /etc and its undo record, 64.0 MiB to refresh what runs) and 100.0 MiB are free; \
              add some, or stop something that uses it"]
        );
        let disk = Free { in_memory: false, ..ram };
        assert_eq!(refusals(disk, 500 << 20, 0), [""; 0], "copies on a disk take no memory");
        let full = refusals(Free { room: 1 << 20, ..disk }, 2 << 20, 0);
        assert!(full[0].starts_with("too little room in the node store /run/store: 2.0 MiB are needed"), "{full:?}");
        // A tmpfs with a limit of its own.
        assert_eq!(refusals(Free { room: 1 << 20, ..ram }, 2 << 20, 0).len(), 1);
        assert_eq!(refusals(ram, u64::MAX, u64::MAX).len(), 2, "no overflow");
    }
}
