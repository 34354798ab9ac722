//! How much memory, or room on a disk, the rest of the way takes, against what there is.

use std::os::fd::AsFd;
use std::path::Path;

use anyhow::{Context, Result};

use super::refusal::{Need, Refusal};

/// What reloading PID 1, the tools and restarted services may take for a while, in bytes. A guess on the safe
/// side: a systemd that re-executes itself serialises some MiB, ldconfig and restorecon take some tens.
pub const RESERVE: u64 = 64 << 20;

/// How many bytes the RAM store may hold at most: `limit`, but no more than the `used` ones and what memory there is
/// beyond [`RESERVE`]. A store that took that, too, would end in a refusal when it is staged, or in the kernel's
/// killing somebody.
///
/// # Errors
/// [`Refusal::TooLittle`] where that leaves nothing, before anything is fetched.
pub fn store_limit(limit: u64, used: u64, memory: Memory) -> Result<u64, Refusal> {
    // What is swapped out makes room, too.
    let free = memory.available.saturating_add(memory.swap);
    let need = Need { what: "memory".into(), parts: vec![("to refresh what runs", RESERVE)], free };
    if free <= RESERVE {
        return Err(Refusal::TooLittle { need });
    }
    Ok(limit.min(used.saturating_add(free - RESERVE)))
}

/// What the kernel says of the machine's memory, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Memory {
    /// All of it.
    pub total: u64,
    /// What is free or can be freed.
    pub available: u64,
    /// What can still be swapped out.
    pub swap: u64,
}

impl Memory {
    /// Asks the kernel.
    ///
    /// # Errors
    /// When /proc/meminfo cannot be read, or does not say.
    pub fn now() -> Result<Self> {
        let text = std::fs::read_to_string("/proc/meminfo").context("reading /proc/meminfo")?;
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
        let memory = Memory::now()?.available;
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

/// A field of proc_meminfo(5), which is in KiB, in bytes.
fn field(meminfo: &str, key: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':'))?;
    line.split_whitespace().next()?.parse::<u64>().ok()?.checked_mul(1024)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn meminfo() {
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
    fn the_store_leaves_what_the_refresh_takes() {
        let memory = |available, swap| Memory { total: 1 << 30, available, swap };
        assert_eq!(store_limit(600 << 20, 0, memory(900 << 20, 0)).unwrap(), 600 << 20, "the configured limit");
        assert_eq!(store_limit(600 << 20, 0, memory(264 << 20, 0)).unwrap(), 200 << 20, "what there is");
        assert_eq!(store_limit(600 << 20, 0, memory(264 << 20, 100 << 20)).unwrap(), 300 << 20, "with swap");
        assert_eq!(store_limit(600 << 20, 150 << 20, memory(164 << 20, 0)).unwrap(), 250 << 20, "it holds some");
        assert_eq!(store_limit(600 << 20, 599 << 20, memory(164 << 20, 0)).unwrap(), 600 << 20);
        assert_eq!(store_limit(u64::MAX, u64::MAX, memory(u64::MAX, u64::MAX)).unwrap(), u64::MAX, "no overflow");
        let refused = store_limit(600 << 20, 0, memory(RESERVE, 0)).unwrap_err().to_string();
        assert!(
            refused.starts_with("too little memory: 64.0 MiB are needed (64.0 MiB to refresh what runs)"),
            "{refused}"
        );
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
