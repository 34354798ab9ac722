//! Memory of a guest over time: that of its processes and of its tmpfs, without the page cache of files.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result};
use testbed::files::Files;
use testbed::guest::Guest;

/// Monotonic time in seconds, and bytes.
pub type Samples = Vec<(f64, u64)>;

/// Interval of the samples of a container.
const EVERY: Duration = Duration::from_millis(50);
/// Unit that samples inside a virtual machine, twice a second. It starts no process, and an isolate does not end it.
const UNIT: &str =
    "[Unit]\nDefaultDependencies=no\nIgnoreOnIsolate=yes\n[Service]\nExecStart=/bin/bash /etc/bench-memory.sh\n";
const SCRIPT: &str = "exec 3<> <(:)\nwhile :; do\n  read -r now _ </proc/uptime; sum=0\n  while read -r key value _; do\n    \
                      case $key in AnonPages: | Shmem:) sum=$((sum + value)) ;; esac\n  done </proc/meminfo\n  \
                      echo \"$now $sum\" >>/run/bench-memory\n  read -r -t 0.5 -u 3 _ || :\ndone\n";

/// Adds the sampler of a virtual machine.
pub fn sampler(files: &Files) -> Result<()> {
    files.put("/etc/bench-memory.sh", 0o755, SCRIPT)?;
    files.put("/etc/systemd/system/bench-memory.service", 0o644, UNIT)?;
    let wants = files.root().join("etc/systemd/system/sysinit.target.wants");
    fs::create_dir_all(&wants)?;
    Ok(std::os::unix::fs::symlink("../bench-memory.service", wants.join("bench-memory.service"))?)
}

/// Returns what the sampler of a virtual machine has written.
pub fn sampled(guest: &dyn Guest) -> Result<Samples> {
    let text = guest.ask("cat /run/bench-memory")?;
    let line = |line: &str| {
        let (time, kilobytes) = line.split_once(' ')?;
        Some((time.parse().ok()?, kilobytes.parse::<u64>().ok()? * 1024))
    };
    Ok(text.lines().filter_map(line).collect())
}

/// A control group of this machine that a container is started in, and the thread that reads its memory.
pub struct Group {
    place: PathBuf,
    stop: Arc<AtomicBool>,
    samples: Arc<Mutex<Samples>>,
    thread: Option<JoinHandle<()>>,
}

impl Group {
    /// Makes the group and moves this process into it, so that what it starts is in it too.
    pub fn enter() -> Result<Self> {
        let root = [Path::new("/sys/fs/cgroup/memory"), Path::new("/sys/fs/cgroup")];
        let root = root.into_iter().find(|root| root.join("cgroup.procs").exists()).context("no control groups")?;
        let place = root.join(format!("bench-boot-{}", std::process::id()));
        fs::create_dir_all(&place)?;
        // A parent without the controller would count as no memory.
        let stat = place.join("memory.stat");
        if let Err(error) = fs::read_to_string(&stat) {
            fs::remove_dir(&place)?;
            return Err(error).with_context(|| format!("cannot read {}", stat.display()));
        }
        fs::write(place.join("cgroup.procs"), std::process::id().to_string())?;
        let (stop, samples) = (Arc::new(AtomicBool::new(false)), Arc::new(Mutex::new(Samples::new())));
        let (stopped, filled) = (stop.clone(), samples.clone());
        let thread = std::thread::spawn(move || {
            while !stopped.load(Ordering::Relaxed) {
                let now = uptime();
                let text = fs::read_to_string(&stat).unwrap_or_default();
                filled.lock().unwrap_or_else(PoisonError::into_inner).push((now, used(&text)));
                std::thread::sleep(EVERY);
            }
        });
        Ok(Self { place, stop, samples, thread: Some(thread) })
    }

    /// Moves this process back. What it started stays.
    pub fn leave(&self) -> Result<()> {
        let parent = self.place.parent().context("no parent")?;
        Ok(fs::write(parent.join("cgroup.procs"), std::process::id().to_string())?)
    }

    /// Returns the samples so far.
    pub fn samples(&self) -> Samples {
        self.samples.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        let _ = self.thread.take().map(JoinHandle::join);
        let _ = self.leave();
        let _ = fs::remove_dir(&self.place);
    }
}

/// Seconds since the boot of this machine, which a container shares.
fn uptime() -> f64 {
    let text = fs::read_to_string("/proc/uptime").unwrap_or_default();
    text.split(' ').next().and_then(|word| word.parse().ok()).unwrap_or(0.0)
}

/// Anonymous and shared memory in a `memory.stat` of either version of control groups.
fn used(stat: &str) -> u64 {
    let value = |names: [&str; 2]| {
        let find =
            |name: &str| stat.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')?.parse::<u64>().ok());
        names.into_iter().find_map(find).unwrap_or(0)
    };
    value(["total_rss", "anon"]) + value(["total_shmem", "shmem"])
}

#[cfg(test)]
mod tests {
    #[test]
    fn both_versions_of_control_groups_are_read() {
        assert_eq!(super::used("cache 9\nrss 1\nshmem 2\ntotal_rss 30\ntotal_shmem 4\n"), 34);
        assert_eq!(super::used("anon 30\nfile 9\nshmem 4\n"), 34);
    }
}
