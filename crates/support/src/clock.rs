//! Clocks of the kernel, in whole milliseconds.

use rustix::time::{ClockId, clock_gettime};

/// Returns the time since the boot. It cannot be set, and it runs while the machine is suspended.
pub fn boottime_ms() -> u64 {
    read(ClockId::Boottime)
}

/// Returns the time since the epoch. It can be set.
pub fn unix_ms() -> u64 {
    read(ClockId::Realtime)
}

/// Returns the CPU time of this thread.
pub fn thread_cpu_ms() -> u64 {
    read(ClockId::ThreadCPUTime)
}

/// Returns the CPU time of this process.
pub fn process_cpu_ms() -> u64 {
    read(ClockId::ProcessCPUTime)
}

fn read(clock: ClockId) -> u64 {
    let now = clock_gettime(clock);
    // Neither part is negative: these clocks start at 0, and the kernel refuses a time before the epoch.
    now.tv_sec.unsigned_abs() * 1000 + now.tv_nsec.unsigned_abs() / 1_000_000
}
