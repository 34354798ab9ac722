//! CPU time and peak memory of the agent, from the kernel.

use std::fs;
use std::path::Path;

use super::unit_of;

/// Control group file system of version 2; systemd.resource-control(5).
const CGROUPS: &str = "/sys/fs/cgroup";

/// The CPU time that was used when a phase began.
#[derive(Debug, Clone, Copy)]
pub(super) struct Usage {
    cpu_ms: u64,
    /// True if the kernel began a new peak of the resident memory.
    has_peak: bool,
}

impl Usage {
    /// Begins a measurement. The peak of the resident memory begins again.
    pub(super) fn begin() -> Self {
        // proc_pid_clear_refs(5): 5 resets only the peak.
        Self { cpu_ms: cpu_ms(), has_peak: fs::write("/proc/self/clear_refs", "5").is_ok() }
    }

    /// Returns the CPU time in milliseconds and the peak in bytes since the begin, each if it is known.
    pub(super) fn end(self) -> (u64, Option<u64>) {
        let status = self.has_peak.then(|| fs::read_to_string("/proc/self/status").ok()).flatten();
        (cpu_ms().saturating_sub(self.cpu_ms), status.as_deref().and_then(peak))
    }
}

/// Returns the CPU time of the agent's unit, which includes skopeo. Outside a unit, returns the time of this process.
fn cpu_ms() -> u64 {
    let of_unit = || {
        let groups = fs::read_to_string("/proc/self/cgroup").ok()?;
        unit_of(&groups).filter(|unit| unit.starts_with("node-image-"))?;
        let group = groups.lines().find_map(|line| line.strip_prefix("0::/"))?;
        cpu_of(&fs::read_to_string(Path::new(CGROUPS).join(group).join("cpu.stat")).ok()?)
    };
    of_unit().unwrap_or_else(support::clock::process_cpu_ms)
}

fn cpu_of(stat: &str) -> Option<u64> {
    let microseconds: u64 = stat.lines().find_map(|line| line.strip_prefix("usage_usec "))?.parse().ok()?;
    Some(microseconds / 1000)
}

/// Returns the peak of the resident memory in the text of `/proc/PID/status`.
fn peak(status: &str) -> Option<u64> {
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    line.trim().strip_suffix(" kB")?.parse::<u64>().ok().map(|kibibytes| kibibytes * 1024)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_numbers_are_read() {
        assert_eq!(cpu_of("usage_usec 1234567\nuser_usec 1\n"), Some(1234));
        assert_eq!(cpu_of("nr_periods 0\n"), None);
        assert_eq!(peak("Name:\tx\nVmHWM:\t    5120 kB\nVmRSS:\t 1 kB\n"), Some(5 << 20));
        assert_eq!(peak("Name:\tx\n"), None);
    }

    #[test]
    fn each_measurement_has_its_own_peak() {
        let peak_of = |bytes: usize| {
            let usage = Usage::begin();
            drop(std::hint::black_box(vec![1_u8; bytes]));
            usage.end().1
        };
        // Other tests use memory at the same time, but less than half of this.
        let (large, small) = (peak_of(128 << 20), peak_of(1));
        assert!(large.unwrap() > small.unwrap() + (64 << 20), "{large:?} {small:?}");
    }
}
