//! Watches what a side takes while it runs: its tmpfs and its processes' memory.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result};

/// Interval of the samples.
const EVERY: Duration = Duration::from_millis(20);
/// Every so many looks, it searches for new skopeo processes.
const SEARCH: u32 = 5;

/// The highest that was seen, in bytes.
#[derive(Debug, Clone, Copy, Default)]
pub struct Peaks {
    /// Blocks in use on the tmpfs.
    pub tmpfs: u64,
    /// Resident memory (`VmHWM`) of the largest of the programs that were started.
    pub rss: u64,
    /// The same of skopeo.
    pub skopeo_rss: u64,
}

/// A thread that looks until it is stopped.
pub struct Watch {
    stop: Arc<AtomicBool>,
    program: Arc<AtomicU32>,
    peaks: Arc<Mutex<Peaks>>,
    thread: JoinHandle<()>,
}

impl Watch {
    /// Starts to watch a tmpfs, and the descendants of this process.
    pub fn start(tmpfs: &Path) -> Self {
        let (stop, program) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU32::new(0)));
        let peaks = Arc::new(Mutex::new(Peaks::default()));
        let looker = Looker { tmpfs: tmpfs.to_owned(), program: program.clone(), peaks: peaks.clone() };
        let stopped = stop.clone();
        let thread = std::thread::spawn(move || {
            let mut skopeo = BTreeMap::new();
            let mut count = 0_u32;
            while !stopped.load(Ordering::Relaxed) {
                looker.look(&mut skopeo, count.is_multiple_of(SEARCH));
                count = count.wrapping_add(1);
                std::thread::sleep(EVERY);
            }
            looker.look(&mut skopeo, false);
        });
        Self { stop, program, peaks, thread }
    }

    /// The program that runs now, by process id.
    pub fn program(&self, pid: u32) {
        self.program.store(pid, Ordering::Relaxed);
    }

    /// Ends watching.
    pub fn finish(self) -> Result<Peaks> {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().ok().context("the watching thread panicked")?;
        Ok(*self.peaks.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

struct Looker {
    tmpfs: PathBuf,
    program: Arc<AtomicU32>,
    peaks: Arc<Mutex<Peaks>>,
}

impl Looker {
    fn look(&self, skopeo: &mut BTreeMap<u32, ()>, search: bool) {
        if search {
            find_skopeo(skopeo);
        }
        let program = self.program.load(Ordering::Relaxed);
        let rss = if program == 0 { None } else { high_water_mark(program) };
        let skopeo_rss = skopeo.keys().filter_map(|pid| high_water_mark(*pid)).max();
        let used = used(&self.tmpfs).unwrap_or(0);
        let mut peaks = self.peaks.lock().unwrap_or_else(PoisonError::into_inner);
        peaks.tmpfs = peaks.tmpfs.max(used);
        peaks.rss = peaks.rss.max(rss.unwrap_or(0));
        peaks.skopeo_rss = peaks.skopeo_rss.max(skopeo_rss.unwrap_or(0));
    }
}

/// Bytes in use on a file system.
pub fn used(path: &Path) -> Result<u64> {
    let stat = rustix::fs::statvfs(path).with_context(|| format!("asking how full {} is", path.display()))?;
    Ok((stat.f_blocks - stat.f_bfree) * stat.f_frsize)
}

/// `VmHWM` of proc_pid_status(5) in bytes; `None` when the process is gone.
pub fn high_water_mark(pid: u32) -> Option<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status.lines().find(|line| line.starts_with("VmHWM:"))?;
    Some(line.split_whitespace().nth(1)?.parse::<u64>().ok()? * 1024)
}

/// Adds the skopeo processes below this one.
fn find_skopeo(found: &mut BTreeMap<u32, ()>) {
    let me = std::process::id();
    let mut parents: BTreeMap<u32, u32> = BTreeMap::new();
    let mut named = Vec::new();
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else { continue };
        // PID (NAME) STATE PPID …, where NAME may hold anything.
        let Ok(stat) = fs::read_to_string(entry.path().join("stat")) else { continue };
        let Some((head, rest)) = stat.rsplit_once(')') else { continue };
        let Some(parent) = rest.split_whitespace().nth(1).and_then(|word| word.parse().ok()) else { continue };
        parents.insert(pid, parent);
        if head.ends_with("(skopeo") {
            named.push(pid);
        }
    }
    let below = |pid: &u32| std::iter::successors(Some(*pid), |pid| parents.get(pid).copied()).any(|pid| pid == me);
    found.extend(named.into_iter().filter(below).map(|pid| (pid, ())));
}
