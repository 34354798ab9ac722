//! What the processes of each service execute and map, from `/proc`.

use std::collections::BTreeSet;
use std::path::Path;

use anyhow::Result;

use super::{Manager, RunningUnit};

/// All active services with the files under `/usr` that they run and that `differs` in the node
/// image. A process that ends while it is looked at counts as running nothing.
pub async fn running_units(manager: &Manager, differs: &(dyn Fn(&Path) -> bool + Sync)) -> Result<Vec<RunningUnit>> {
    let mut running = Vec::new();
    for unit in manager.list().await? {
        if !unit.name.ends_with(".service") || !matches!(unit.active.as_str(), "active" | "reloading") {
            continue;
        }
        let cgroup = manager.control_group(&unit).await?;
        let mut changed = BTreeSet::new();
        for pid in processes(&cgroup) {
            changed.extend(mapped_files(pid).into_iter().filter(|path| differs(Path::new(path))));
        }
        running.push(RunningUnit { name: unit.name, changed: changed.into_iter().collect() });
    }
    Ok(running)
}

/// The processes below a cgroup, in the unified hierarchy or in systemd's own.
fn processes(cgroup: &str) -> Vec<u32> {
    // An empty ControlGroup is a service without processes, not the root cgroup.
    if cgroup.is_empty() || cgroup == "/" {
        return Vec::new();
    }
    let roots = ["/sys/fs/cgroup", "/sys/fs/cgroup/unified", "/sys/fs/cgroup/systemd"];
    let mut pids = Vec::new();
    for root in roots {
        collect(&Path::new(root).join(cgroup.trim_start_matches('/')), &mut pids);
        if !pids.is_empty() {
            break;
        }
    }
    pids
}

fn collect(dir: &Path, pids: &mut Vec<u32>) {
    if let Ok(text) = std::fs::read_to_string(dir.join("cgroup.procs")) {
        pids.extend(text.lines().filter_map(|line| line.parse::<u32>().ok()));
    }
    let Ok(entries) = std::fs::read_dir(dir) else { return };
    for entry in entries.flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            collect(&entry.path(), pids);
        }
    }
}

/// The files under `/usr` that a process executes or maps, relative to `/usr`.
pub fn mapped_files(pid: u32) -> BTreeSet<String> {
    std::fs::read_to_string(format!("/proc/{pid}/maps")).map(|maps| under_usr(&maps)).unwrap_or_default()
}

/// Paths under `/usr` in the text of `/proc/PID/maps` (proc(5)): the sixth column, executable
/// mappings and data alike, without the kernel's `(deleted)` mark.
fn under_usr(maps: &str) -> BTreeSet<String> {
    maps.lines()
        .filter_map(|line| line.find('/').map(|start| &line[start..]))
        .map(|path| path.strip_suffix(" (deleted)").unwrap_or(path))
        .filter_map(|path| path.strip_prefix("/usr/"))
        .map(str::to_owned)
        .collect()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn maps() {
        let text = "\
55d0c5a00000-55d0c5a02000 r--p 00000000 fe:00 1234  /usr/bin/cat
7f0000000000-7f0000001000 r-xp 00000000 fe:00 77    /usr/lib/x86_64-linux-gnu/libc.so.6 (deleted)
7f0000002000-7f0000003000 rw-p 00000000 00:00 0
7ffe00000000-7ffe00001000 rw-p 00000000 00:00 0     [stack]
7f0000004000-7f0000005000 r--s 00000000 00:01 5     /memfd:x (deleted)
7f0000005000-7f0000006000 r--p 00000000 fe:00 9     /usr/lib/with space.so
";
        let expected = ["bin/cat", "lib/with space.so", "lib/x86_64-linux-gnu/libc.so.6"];
        assert_eq!(under_usr(text).into_iter().collect::<Vec<_>>(), expected);
    }

    #[test]
    fn the_root_cgroup_is_nobodys() {
        assert!(processes("").is_empty());
        assert!(processes("/").is_empty());
    }

    #[test]
    fn a_process_that_is_gone_maps_nothing() {
        assert!(mapped_files(u32::MAX).is_empty());
    }
}
