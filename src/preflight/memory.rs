//! Compares the memory and disk space that the remaining steps need with what is free.

use std::os::fd::AsFd;
use std::path::Path;

use anyhow::{Context, Result};

use super::refusal::{Need, Refusal};

/// Memory for the refresh, in bytes. A safe estimate: a systemd that re-executes itself serialises some MiB, and ldconfig
/// and restorecon use some tens of MiB.
const RESERVE: u64 = 64 << 20;

/// Returns the size limit of the RAM store in bytes: `limit`, but at most the `used` bytes plus the free memory beyond
/// the reserve for the refresh. Without the reserve, stage would refuse a full store, or the kernel would kill a process.
///
/// # Errors
/// [`Refusal::TooLittle`] if nothing is free beyond the reserve.
pub fn store_limit(limit: u64, used: u64, memory: Memory) -> Result<u64, Refusal> {
    // Free swap space lets the kernel free as much memory.
    let free = memory.available.saturating_add(memory.swap);
    let need = Need { what: "memory".into(), parts: vec![("for the refresh", RESERVE)], free };
    if free <= RESERVE {
        return Err(Refusal::TooLittle { need });
    }
    Ok(limit.min(used.saturating_add(free - RESERVE)))
}

/// The machine's memory as proc_meminfo(5) reports it, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Memory {
    /// Total memory.
    pub total: u64,
    /// Memory that is free or can be freed.
    pub available: u64,
    /// Free swap space.
    pub swap: u64,
}

impl Memory {
    /// Reads the current values.
    ///
    /// # Errors
    /// `/proc/meminfo` cannot be read or lacks a field.
    pub fn now() -> Result<Self> {
        let text = std::fs::read_to_string("/proc/meminfo").context("cannot read /proc/meminfo")?;
        Self::parse(&text)
    }

    fn parse(meminfo: &str) -> Result<Self> {
        let bytes = |key: &str| field(meminfo, key).with_context(|| format!("/proc/meminfo has no {key}"));
        Ok(Self {
            total: bytes("MemTotal")?,
            available: bytes("MemAvailable")?,
            swap: field(meminfo, "SwapFree").unwrap_or(0),
        })
    }
}

/// Free memory of the machine and free space of the file system that has the node store.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Free {
    /// Memory that is free or can be freed, in bytes.
    pub memory: u64,
    /// Free space of the file system, in bytes.
    pub space: u64,
    /// True if the file system stores its files in memory (tmpfs).
    pub in_memory: bool,
}

impl Free {
    /// Reads the current values for the file system at `path`.
    ///
    /// # Errors
    /// `/proc/meminfo` or the file system's statistics cannot be read.
    pub fn at(path: &Path) -> Result<Self> {
        const TMPFS_MAGIC: rustix::fs::FsWord = 0x0102_1994;
        let memory = Memory::now()?.available;
        let failed = || format!("cannot read the free space of {}", path.display());
        let directory = std::fs::File::open(path).with_context(failed)?;
        let stat = rustix::fs::fstatfs(directory.as_fd()).with_context(failed)?;
        let block = u64::try_from(stat.f_bsize).unwrap_or_default();
        Ok(Self { memory, space: stat.f_bavail.saturating_mul(block), in_memory: stat.f_type == TMPFS_MAGIC })
    }

    /// Returns the needs of the remaining steps: copying `copies` bytes of the booted system to `store`, writing `etc`
    /// bytes to `/etc` and its undo journal, and the refresh. The first need is memory, the second disk space.
    pub fn needs(&self, store: &Path, copies: u64, etc: u64) -> Vec<Need> {
        let mut memory = vec![("for /etc and its undo journal", etc), ("for the refresh", RESERVE)];
        if self.in_memory {
            memory.insert(0, ("for copies of the booted system's files", copies));
        }
        vec![
            Need { what: "memory".into(), parts: memory, free: self.memory },
            Need {
                what: format!("space in the node store {}", store.display()),
                parts: vec![("for copies of the booted system's files", copies)],
                free: self.space,
            },
        ]
    }
}

/// Returns a field of proc_meminfo(5), converted from KiB to bytes.
fn field(meminfo: &str, key: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':'))?;
    line.split_whitespace().next()?.parse::<u64>().ok()?.checked_mul(1024)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn meminfo_is_parsed() {
        let text = "MemTotal: 9 kB\nMemFree: 1 kB\nMemAvailable:   2048 kB\n";
        let memory = Memory::parse(text).unwrap();
        assert_eq!(memory, Memory { total: 9 << 10, available: 2 << 20, swap: 0 });
        assert_eq!(Memory::parse(&format!("{text}SwapFree: 3 kB\n")).unwrap().swap, 3 << 10);
        assert!(Memory::parse("MemTotal: 9 kB\n").unwrap_err().to_string().contains("MemAvailable"));
        assert!(Memory::parse("MemTotal: lots kB\nMemAvailable: 1 kB").is_err());
        let here = Free::at(Path::new("/proc/self")).unwrap();
        assert!(here.memory > 0 && !here.in_memory);
    }

    #[test]
    fn the_store_limit_leaves_memory_for_the_refresh() {
        let memory = |available, swap| Memory { total: 1 << 30, available, swap };
        assert_eq!(store_limit(600 << 20, 0, memory(900 << 20, 0)).unwrap(), 600 << 20, "the configured limit");
        assert_eq!(store_limit(600 << 20, 0, memory(264 << 20, 0)).unwrap(), 200 << 20, "the free memory");
        assert_eq!(store_limit(600 << 20, 0, memory(264 << 20, 100 << 20)).unwrap(), 300 << 20, "with swap");
        assert_eq!(
            store_limit(600 << 20, 150 << 20, memory(164 << 20, 0)).unwrap(),
            250 << 20,
            "a store that holds objects already"
        );
        assert_eq!(store_limit(600 << 20, 599 << 20, memory(164 << 20, 0)).unwrap(), 600 << 20);
        assert_eq!(store_limit(u64::MAX, u64::MAX, memory(u64::MAX, u64::MAX)).unwrap(), u64::MAX, "no overflow");
        let refused = store_limit(600 << 20, 0, memory(RESERVE, 0)).unwrap_err().to_string();
        assert!(refused.starts_with("too little memory: 64.0 MiB are needed (64.0 MiB for the refresh)"), "{refused}");
    }

    #[test]
    fn a_refusal_names_needed_and_free_bytes() {
        let store = Path::new("/run/store");
        let refusals = |free: Free, copies, etc| -> Vec<String> {
            free.needs(store, copies, etc).into_iter().filter_map(Need::check).map(|no| no.to_string()).collect()
        };
        let ram = Free { memory: 100 << 20, space: 1 << 30, in_memory: true };
        assert_eq!(refusals(ram, 20 << 20, 16 << 20), [""; 0], "exactly enough");
        assert_eq!(
            refusals(ram, 21 << 20, 16 << 20),
            ["too little memory: 101.0 MiB are needed (21.0 MiB for copies of the booted system's files, \
              16.0 MiB for /etc and its undo journal, 64.0 MiB for the refresh) and 100.0 MiB are free; \
              add some, or stop something that uses it"]
        );
        let disk = Free { in_memory: false, ..ram };
        assert_eq!(refusals(disk, 500 << 20, 0), [""; 0], "copies on a disk need no memory");
        let full = refusals(Free { space: 1 << 20, ..disk }, 2 << 20, 0);
        assert!(full[0].starts_with("too little space in the node store /run/store: 2.0 MiB are needed"), "{full:?}");
        // A tmpfs with a size limit.
        assert_eq!(refusals(Free { space: 1 << 20, ..ram }, 2 << 20, 0).len(), 1);
        assert_eq!(refusals(ram, u64::MAX, u64::MAX).len(), 2, "no overflow");
    }
}
