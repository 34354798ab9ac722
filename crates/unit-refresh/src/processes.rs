//! Finds the code that processes run, from `/proc`.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, Metadata};
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::scripts;

/// Returns true for a path, relative to the searched directory, whose content differs between the two trees.
pub(super) type Differs<'a> = &'a (dyn Fn(&Path) -> bool + Sync);

/// The version of mapped files to look for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Version {
    /// Files that were replaced at their path: after a switch, the bootimage's.
    Replaced,
    /// Files that are still at their path: before an undo, the node image's. After the undo they could not be found,
    /// because the kernel shows paths on a detached mount without `/usr`.
    Current,
}

/// Returns the processes of a cgroup and its descendants, in the unified hierarchy or in systemd's own.
pub(super) fn processes(cgroup: &str) -> Vec<u32> {
    // An empty ControlGroup means a service without processes, not the root cgroup.
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
    if let Ok(text) = fs::read_to_string(dir.join("cgroup.procs")) {
        pids.extend(text.lines().filter_map(|line| line.parse::<u32>().ok()));
    }
    let Ok(entries) = fs::read_dir(dir) else { return };
    for entry in entries.flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            collect(&entry.path(), pids);
        }
    }
}

/// Returns the files, relative to `/usr`, that a process executes or maps as code and that were replaced at their paths.
/// Empty if the process has ended.
pub fn mapped_files(pid: u32) -> BTreeSet<String> {
    code_of(pid, Path::new("/usr"), Version::Replaced, &|_| true).files
}

/// The code of one process.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Code {
    /// Files of the requested version that differ, relative to the root.
    pub(super) files: BTreeSet<String>,
    /// True if the program itself is of that version, even if it does not differ.
    pub(super) of_version: bool,
}

/// Returns the code below `root` that a process runs: its program, its libraries, and the script that the program
/// interprets.
pub(super) fn code_of(pid: u32, root: &Path, version: Version, differs: Differs<'_>) -> Code {
    let process = PathBuf::from(format!("/proc/{pid}"));
    if !is_rooted_here(&process) {
        return Code::default();
    }
    let mut code = Code { files: mapped_below(&process, root, version, differs), of_version: false };
    // Scripts are read, not mapped. The open file of a script shows its version. Without one, the version of the program
    // is used.
    let program = fs::read_link(process.join("exe")).unwrap_or_default();
    let program = PathBuf::from(program.to_string_lossy().trim_end_matches(" (deleted)"));
    if program.starts_with(root) {
        let is_of = |file: &Path, path: &Path| {
            is_old(&fs::metadata(file), &fs::metadata(path)) == (version == Version::Replaced)
        };
        code.of_version = is_of(&process.join("exe"), &program);
        let arguments = fs::read(process.join("cmdline")).unwrap_or_default();
        if let Some(script) = scripts::of(&scripts::split(&arguments), &program) {
            let of_version = open_file(&process, &script).map_or(code.of_version, |file| is_of(&file, &script));
            if of_version {
                code.files.extend(scripts::below(&script, root).into_iter().filter(|path| differs(Path::new(path))));
            }
        }
    }
    // The links of a process that ended in the meantime are missing, which must not count as different.
    if process.exists() { code } else { Code::default() }
}

/// Returns the link in `/proc/PID/fd` to an open file.
fn open_file(process: &Path, path: &Path) -> Option<PathBuf> {
    let files = fs::read_dir(process.join("fd")).ok()?.flatten().map(|entry| entry.path());
    files.into_iter().find(|file| fs::read_link(file).is_ok_and(|to| to == path))
}

/// Returns the files below `root` that differ and that are mapped as code in the requested `version`.
fn mapped_below(process: &Path, root: &Path, version: Version, differs: Differs<'_>) -> BTreeSet<String> {
    let maps = fs::read(process.join("maps")).unwrap_or_default();
    let maps = String::from_utf8_lossy(&maps);
    // A file may have several mappings, and one path may belong to an old and a new file.
    let mut files: BTreeMap<_, Mapping<'_>> = BTreeMap::new();
    for mapping in mappings(&maps).filter(|mapping| Path::new(mapping.path).starts_with(root)) {
        let executable = mapping.executable;
        files.entry((mapping.path, mapping.file)).or_insert(mapping).executable |= executable;
    }
    let mut found = BTreeSet::new();
    for mapping in files.into_values() {
        let Ok(path) = Path::new(mapping.path).strip_prefix(root) else { continue };
        // The metadata of the link is that of the file as it was opened. The device and inode in the text of `maps` may
        // be those of a layer below an overlay.
        let link = process.join("map_files").join(&mapping.range);
        if !differs(path) || !(mapping.executable || is_elf(&link)) {
            continue;
        }
        if is_old(&fs::metadata(&link), &fs::metadata(mapping.path)) == (version == Version::Replaced) {
            found.insert(path.to_string_lossy().into_owned());
        }
    }
    found
}

/// Returns true for programs and libraries, and for unreadable files. Locales, caches and other data are not code: a
/// process may keep the old data, and new processes read the new file.
fn is_elf(file: &Path) -> bool {
    let mut magic = [0; 4];
    let read = fs::File::open(file).and_then(|mut file| file.read_exact(&mut magic));
    match read {
        Ok(()) => magic == *b"\x7fELF",
        Err(error) => error.kind() != io::ErrorKind::UnexpectedEof,
    }
}

/// Returns true if a process has the agent's root directory. A process with another root directory, as in a container, does
/// not run code of this `/usr`, even if its paths begin with `/usr`. A service with a private mount namespace has the same
/// root directory.
fn is_rooted_here(process: &Path) -> bool {
    let place = |path: &Path| fs::metadata(path).map(|root| (root.dev(), root.ino())).ok();
    let theirs = place(&process.join("root"));
    theirs.is_none() || theirs == place(Path::new("/"))
}

/// Returns true if `mapped` is not the file that is now at its path. Files that cannot be compared count as different,
/// because a needless restart does less harm than a missing one.
fn is_old(mapped: &io::Result<Metadata>, now: &io::Result<Metadata>) -> bool {
    match (mapped, now) {
        (Ok(mapped), Ok(now)) => (mapped.dev(), mapped.ino()) != (now.dev(), now.ino()),
        _ => true,
    }
}

/// A file mapping in `/proc/PID/maps` (proc(5)).
#[derive(Debug, PartialEq, Eq)]
struct Mapping<'a> {
    /// The first column, in the form that `/proc/PID/map_files` uses.
    range: String,
    /// Device and inode. They distinguish files of one process, but must not be compared with those of a path.
    file: (&'a str, &'a str),
    /// True if the mapping is executable, by the second column.
    executable: bool,
    /// The sixth column, without the kernel's `(deleted)` mark.
    path: &'a str,
}

/// Parses the file mappings in the text of `/proc/PID/maps`, including those of data.
fn mappings(maps: &str) -> impl Iterator<Item = Mapping<'_>> {
    maps.lines().filter_map(|line| {
        let mut columns = line.split_whitespace();
        let range = range_name(columns.next()?)?;
        let executable = columns.next()?.contains('x');
        let file = (columns.nth(1)?, columns.next()?);
        let path = &line[line.find('/')?..];
        Some(Mapping { range, file, executable, path: path.strip_suffix(" (deleted)").unwrap_or(path) })
    })
}

/// Returns the name in `map_files`, which lacks the zeros with which `maps` pads addresses.
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
    fn mappings_are_parsed() {
        let text = "\
00400000-00402000 r--p 00000000 fe:00 1234  /usr/bin/cat
7f0000000000-7f0000001000 r-xp 00000000 fe:00 77    /usr/lib/x86_64-linux-gnu/libc.so.6 (deleted)
7f0000002000-7f0000003000 rw-p 00000000 00:00 0
7ffe00000000-7ffe00001000 rw-p 00000000 00:00 0     [stack]
7f0000005000-7f0000006000 r--p 00000000 fe:00 9     /usr/lib/with space.so
nonsense
";
        let found: Vec<_> = mappings(text).collect();
        let cat = ("fe:00", "1234");
        let first = Mapping { range: "400000-402000".into(), file: cat, executable: false, path: "/usr/bin/cat" };
        assert_eq!(found[0], first);
        assert!(found[1].executable);
        assert_eq!(found[1].path, "/usr/lib/x86_64-linux-gnu/libc.so.6");
        assert_eq!(found[2].path, "/usr/lib/with space.so");
        assert_eq!(found.len(), 3);
    }

    #[test]
    fn files_that_cannot_be_compared_are_old() {
        let here = || fs::metadata("/");
        let nowhere = || fs::metadata("/nonexistent");
        assert!(!is_old(&here(), &here()));
        assert!(is_old(&here(), &fs::metadata("/proc/self/maps")));
        assert!(is_old(&here(), &nowhere()) && is_old(&nowhere(), &here()));
    }

    /// Returns false with a message if the kernel does not show mapped files to this user.
    fn sees_mapped_files() -> bool {
        let seen = fs::read_dir("/proc/self/map_files")
            .and_then(|mut files| files.next().ok_or(io::ErrorKind::NotFound)?)
            .and_then(|file| fs::metadata(file.path()));
        if seen.is_err() {
            eprintln!("skipped: needs root's /proc/self/map_files");
        }
        seen.is_ok()
    }

    fn replace(path: &Path, content: &[u8]) {
        use std::os::unix::fs::PermissionsExt;
        let new = path.with_extension("new");
        fs::write(&new, content).unwrap();
        fs::set_permissions(&new, fs::Permissions::from_mode(0o755)).unwrap();
        fs::rename(&new, path).unwrap();
    }

    /// Starts a program that was just written. A process that another test's thread forked may briefly have the file open
    /// for writing.
    fn spawn(command: &mut std::process::Command) -> std::process::Child {
        loop {
            match command.spawn() {
                Err(error) if error.kind() == io::ErrorKind::ExecutableFileBusy => std::thread::yield_now(),
                child => return child.unwrap(),
            }
        }
    }

    fn wait_for(mut condition: impl FnMut() -> bool) {
        while !condition() {
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
    }

    #[test]
    fn a_script_is_code_of_its_interpreter() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().canonicalize().unwrap();
        let (shell, script) = (root.join("sh"), root.join("run"));
        let install = |comment: &str| {
            replace(&shell, &fs::read("/bin/sh").unwrap());
            replace(&script, format!("#!{} -e\n# {comment}\nread line\n", shell.display()).as_bytes());
        };
        let start = || {
            let mut command = std::process::Command::new(&script);
            let child = spawn(command.arg("argument").stdin(std::process::Stdio::piped()));
            // The shell opens the script some time after the kernel started the shell.
            let process = PathBuf::from(format!("/proc/{}", child.id()));
            wait_for(|| open_file(&process, &script).is_some());
            child
        };
        // Only the script differs: the interpreter has the same content on both sides.
        let changed = |child: &std::process::Child, version| {
            code_of(child.id(), &root, version, &|path| path == Path::new("run")).files
        };
        let run = BTreeSet::from(["run".to_owned()]);
        install("one");
        let mut first = start();
        assert_eq!(changed(&first, Version::Current), run);
        assert_eq!(changed(&first, Version::Replaced), BTreeSet::new());
        install("two");
        let mut second = start();
        assert_eq!(changed(&first, Version::Replaced), run);
        assert_eq!(changed(&first, Version::Current), BTreeSet::new());
        assert_eq!(changed(&second, Version::Replaced), BTreeSet::new(), "a restarted process is current");
        for child in [&mut first, &mut second] {
            child.kill().unwrap();
            child.wait().unwrap();
        }
    }

    #[test]
    fn locales_are_not_code() {
        if !sees_mapped_files() {
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().canonicalize().unwrap();
        let program = root.join("sleep");
        fs::copy("/bin/sleep", &program).unwrap();
        let locale = root.join("locale/C.UTF-8");
        fs::create_dir_all(&locale).unwrap();
        for entry in fs::read_dir("/usr/lib/locale/C.utf8").unwrap().flatten() {
            if entry.path().is_file() {
                fs::copy(entry.path(), locale.join(entry.file_name())).unwrap();
            }
        }
        let mut command = std::process::Command::new(&program);
        let locales = [("LC_ALL", "C.UTF-8".as_ref()), ("LOCPATH", root.join("locale").as_os_str())]
            .map(|(k, v): (&str, &std::ffi::OsStr)| (k, v.to_owned()));
        let mut child = spawn(command.arg("120").envs(locales));
        let maps = format!("/proc/{}/maps", child.id());
        wait_for(|| fs::read_to_string(&maps).unwrap().contains("/LC_CTYPE"));
        let code = code_of(child.id(), &root, Version::Current, &|_| true);
        assert_eq!(code, Code { files: BTreeSet::from(["sleep".to_owned()]), of_version: true });
        child.kill().unwrap();
        child.wait().unwrap();
    }

    /// Replaces a program while it runs, as a package manager does, and starts it again.
    #[test]
    fn a_program_is_old_once_its_file_is_replaced() {
        if !sees_mapped_files() {
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().canonicalize().unwrap();
        let program = root.join("sleep");
        let start = || {
            let child = spawn(std::process::Command::new(&program).arg("120"));
            // spawn() returns before the kernel has mapped the program.
            let maps = format!("/proc/{}/maps", child.id());
            while !fs::read_to_string(&maps).unwrap().contains("/sleep") {
                std::thread::sleep(std::time::Duration::from_millis(5));
            }
            (code_of(child.id(), &root, Version::Replaced, &|_| true).files, child)
        };
        fs::copy("/bin/sleep", &program).unwrap();
        let (old, mut first) = start();
        assert_eq!(old, BTreeSet::new(), "a new process is current");
        fs::copy("/bin/sleep", root.join("new")).unwrap();
        fs::rename(root.join("new"), &program).unwrap();
        let of = |version, differs: bool| code_of(first.id(), &root, version, &move |_| differs).files;
        assert_eq!(of(Version::Replaced, true), BTreeSet::from(["sleep".to_owned()]));
        assert_eq!(of(Version::Replaced, false), BTreeSet::new(), "unchanged in the node image");
        assert_eq!(of(Version::Current, true), BTreeSet::new(), "a file has one version");
        let (old, mut second) = start();
        assert_eq!(old, BTreeSet::new(), "a restarted process is current");
        let current = code_of(second.id(), &root, Version::Current, &|_| true).files;
        assert_eq!(current, BTreeSet::from(["sleep".to_owned()]));
        for child in [&mut first, &mut second] {
            child.kill().unwrap();
            child.wait().unwrap();
        }
    }

    #[test]
    fn the_root_cgroup_belongs_to_no_service() {
        assert!(processes("").is_empty());
        assert!(processes("/").is_empty());
    }

    #[test]
    fn a_process_that_has_ended_maps_nothing() {
        assert!(mapped_files(u32::MAX).is_empty());
    }
}
