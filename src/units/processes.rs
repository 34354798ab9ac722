//! What processes execute and map, from `/proc`.

use std::collections::BTreeSet;
use std::fs::Metadata;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// Which paths below a directory, relative to it, are of interest.
pub(super) type Differs<'a> = &'a (dyn Fn(&Path) -> bool + Sync);

/// Which of the files that processes map are of interest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Version {
    /// Those that are no longer what stands at their path: after a switch, the bootimage's.
    Replaced,
    /// Those that are what stands at their path now: before an undo, the node image's. (After it they
    /// cannot be found any more: the kernel shows paths on a detached mount without `/usr`.)
    Current,
}

/// The processes below a cgroup, in the unified hierarchy or in systemd's own.
pub(super) fn processes(cgroup: &str) -> Vec<u32> {
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

/// The files under `/usr`, relative to it, that a process executes or maps and that are not the files
/// which stand at these paths now.
pub fn mapped_files(pid: u32) -> BTreeSet<String> {
    mapped_below(pid, Path::new("/usr"), Version::Replaced, &|_| true)
}

/// The files below `root` that `differs`, mapped in the `version` asked for.
pub(super) fn mapped_below(pid: u32, root: &Path, version: Version, differs: Differs<'_>) -> BTreeSet<String> {
    let process = PathBuf::from(format!("/proc/{pid}"));
    if !is_rooted_here(&process) {
        return BTreeSet::new();
    }
    let maps = std::fs::read(process.join("maps")).unwrap_or_default();
    let maps = String::from_utf8_lossy(&maps);
    let mut seen = BTreeSet::new();
    let mut old = BTreeSet::new();
    for mapping in mappings(&maps) {
        let Ok(path) = Path::new(mapping.path).strip_prefix(root) else { continue };
        // A file is mapped in several pieces, and one path may stand for an old and a new file.
        if !seen.insert((mapping.path, mapping.file)) || !differs(path) {
            continue;
        }
        // Through the link the kernel answers in terms of the filesystem that the file was opened on.
        // The device and inode in the text may be those of a layer below an overlay.
        let mapped = std::fs::metadata(process.join("map_files").join(mapping.range));
        if is_old(&mapped, &std::fs::metadata(mapping.path)) == (version == Version::Replaced) {
            old.insert(path.to_string_lossy().into_owned());
        }
    }
    // A process that ended in the meantime runs nothing; its links were gone, not incomparable.
    if process.exists() { old } else { BTreeSet::new() }
}

/// Whether a process has our root directory. One that has another, in a container, runs nothing of our `/usr`, whatever
/// its paths are called. A service's own mount namespace has a root of its own, too, but of the same directory.
fn is_rooted_here(process: &Path) -> bool {
    let place = |path: &Path| std::fs::metadata(path).map(|root| (root.dev(), root.ino())).ok();
    let theirs = place(&process.join("root"));
    theirs.is_none() || theirs == place(Path::new("/"))
}

/// Whether what is mapped is another file than the one at its path now. What cannot be compared is:
/// a needless restart is the smaller mistake.
fn is_old(mapped: &io::Result<Metadata>, now: &io::Result<Metadata>) -> bool {
    match (mapped, now) {
        (Ok(mapped), Ok(now)) => (mapped.dev(), mapped.ino()) != (now.dev(), now.ino()),
        _ => true,
    }
}

/// One line of `/proc/PID/maps` (proc(5)) that maps a file.
#[derive(Debug, PartialEq, Eq)]
struct Mapping<'a> {
    /// The first column, as `/proc/PID/map_files` has it.
    range: String,
    /// Device and inode; they tell files apart, but not what is at the path.
    file: (&'a str, &'a str),
    /// The sixth column, without the kernel's `(deleted)` mark.
    path: &'a str,
}

/// The file mappings in the text of `/proc/PID/maps`, executable ones and data alike.
fn mappings(maps: &str) -> impl Iterator<Item = Mapping<'_>> {
    maps.lines().filter_map(|line| {
        let mut columns = line.split_whitespace();
        let range = range_name(columns.next()?)?;
        let file = (columns.nth(2)?, columns.next()?);
        let path = &line[line.find('/')?..];
        Some(Mapping { range, file, path: path.strip_suffix(" (deleted)").unwrap_or(path) })
    })
}

/// The name in `map_files`: without the zeros that `maps` pads addresses with.
fn range_name(range: &str) -> Option<String> {
    let (start, end) = range.split_once('-')?;
    let number = |text| u64::from_str_radix(text, 16).ok();
    Some(format!("{:x}-{:x}", number(start)?, number(end)?))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn maps() {
        let text = "\
00400000-00402000 r--p 00000000 fe:00 1234  /usr/bin/cat
7f0000000000-7f0000001000 r-xp 00000000 fe:00 77    /usr/lib/x86_64-linux-gnu/libc.so.6 (deleted)
7f0000002000-7f0000003000 rw-p 00000000 00:00 0
7ffe00000000-7ffe00001000 rw-p 00000000 00:00 0     [stack]
7f0000005000-7f0000006000 r--p 00000000 fe:00 9     /usr/lib/with space.so
nonsense
";
        let found: Vec<_> = mappings(text).collect();
        assert_eq!(found[0], Mapping { range: "400000-402000".into(), file: ("fe:00", "1234"), path: "/usr/bin/cat" });
        assert_eq!(found[1].path, "/usr/lib/x86_64-linux-gnu/libc.so.6");
        assert_eq!(found[2].path, "/usr/lib/with space.so");
        assert_eq!(found.len(), 3);
    }

    #[test]
    fn what_cannot_be_compared_is_old() {
        let here = || std::fs::metadata("/");
        let nowhere = || std::fs::metadata("/nonexistent");
        assert!(!is_old(&here(), &here()));
        assert!(is_old(&here(), &std::fs::metadata("/proc/self/maps")));
        assert!(is_old(&here(), &nowhere()) && is_old(&nowhere(), &here()));
    }

    /// A program that is replaced while it runs, as a package manager does it, then started again.
    #[test]
    fn a_program_is_old_once_its_file_is_replaced() {
        if std::fs::read_dir("/proc/self/map_files")
            .and_then(|mut files| files.next().ok_or(io::ErrorKind::NotFound)?)
            .and_then(|file| std::fs::metadata(file.path()))
            .is_err()
        {
            eprintln!("skipped: needs root's /proc/self/map_files");
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().canonicalize().unwrap();
        let program = root.join("sleep");
        let start = || {
            let child = std::process::Command::new(&program).arg("60").spawn().unwrap();
            // spawn() returns before the kernel has mapped the program.
            let maps = format!("/proc/{}/maps", child.id());
            while !std::fs::read_to_string(&maps).unwrap().contains("/sleep") {
                std::thread::sleep(std::time::Duration::from_millis(5));
            }
            (mapped_below(child.id(), &root, Version::Replaced, &|_| true), child)
        };
        std::fs::copy("/bin/sleep", &program).unwrap();
        let (old, mut first) = start();
        assert_eq!(old, BTreeSet::new(), "what was just started is current");
        std::fs::copy("/bin/sleep", root.join("new")).unwrap();
        std::fs::rename(root.join("new"), &program).unwrap();
        let of = |version, differs: bool| mapped_below(first.id(), &root, version, &move |_| differs);
        assert_eq!(of(Version::Replaced, true), BTreeSet::from(["sleep".to_owned()]));
        assert_eq!(of(Version::Replaced, false), BTreeSet::new(), "the node image has the same");
        assert_eq!(of(Version::Current, true), BTreeSet::new(), "it is one or the other");
        let (old, mut second) = start();
        assert_eq!(old, BTreeSet::new(), "restarted once, not again");
        let current = mapped_below(second.id(), &root, Version::Current, &|_| true);
        assert_eq!(current, BTreeSet::from(["sleep".to_owned()]));
        for child in [&mut first, &mut second] {
            child.kill().unwrap();
            child.wait().unwrap();
        }
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
