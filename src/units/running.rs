//! What is active, from systemd and `/proc`: what the processes of each service execute and map, and how its
//! definition differs.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::Metadata;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use super::definition::{Definition, UnitFiles, is_true};
use super::difference::{Difference, KEY, compare};
use super::files::release_of;
use super::manager::Unit;
use super::plan::LOGIND;
use super::policy::Wish;
use super::{Manager, Refusal, UnitState};

/// Definitions by the name of the unit.
pub type Definitions = BTreeMap<String, Definition>;

/// Which paths below a directory, relative to it, are of interest.
type Differs<'a> = &'a (dyn Fn(&Path) -> bool + Sync);

/// Which of the files that processes map are of interest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Version {
    /// Those that are no longer what stands at their path: after a switch, the bootimage's.
    Replaced,
    /// Those that are what stands at their path now: before an undo, the node image's. (After it they
    /// cannot be found any more: the kernel shows paths on a detached mount without `/usr`.)
    Current,
}

/// The two sides that a survey compares.
pub struct Sides<'a> {
    /// Which of the files that processes map are old.
    pub version: Version,
    /// Which files differ.
    pub differs: Differs<'a>,
    /// What units are, or were when the switch began. A unit that is not in here is not compared.
    pub old: &'a Definitions,
    /// What they will be, or are by now.
    pub new: &'a UnitFiles,
    /// What the final target pulls in of the new side, and did not of the old one.
    pub arriving: &'a BTreeSet<String>,
    /// The release of the new side's systemd, where that is known.
    pub systemd: Option<u32>,
}

/// All active units that run or are something else than the other side has it. A process that ends while it is looked
/// at counts as running nothing. One unit that cannot be looked at does not hide the others: it is left out, and a
/// line of the second list names it.
pub async fn survey(manager: &Manager, sides: &Sides<'_>) -> Result<(Vec<UnitState>, Vec<String>)> {
    let mut states = Vec::new();
    let mut troubles = Vec::new();
    let units = manager.list().await?;
    let names =
        |wanted: fn(&Unit) -> bool| units.iter().filter(move |unit| wanted(unit)).map(|unit| unit.name.as_str());
    let active: BTreeSet<&str> = names(Unit::is_active).collect();
    // Of any kind, and on its way up or down, too: what would be stopped with another unit.
    let there: BTreeSet<&str> = names(|unit| !matches!(unit.active.as_str(), "inactive" | "failed")).collect();
    for unit in units.iter().filter(|unit| unit.is_active()) {
        let looked = look(manager, unit, sides, (&active, &there), &mut troubles).await;
        match looked.with_context(|| format!("{}: cannot tell what it runs", unit.name)) {
            Ok(state) => states.extend(state),
            // Then nothing can be told of the others either.
            Err(error) if Manager::is_lost(&error) => return Err(error),
            Err(error) => troubles.push(format!("{error:#}")),
        }
    }
    for (socket, service) in new_sockets(sides, &active) {
        match new_socket(manager, sides, &there, &socket, service).await {
            Ok(state) => states.push(state),
            Err(error) if Manager::is_lost(&error) => return Err(error),
            Err(error) => troubles.push(format!("{socket}: cannot tell what its service is: {error:#}")),
        }
    }
    Ok((states, troubles))
}

/// The sockets that arrive, with their services, where those run already.
fn new_sockets(sides: &Sides<'_>, active: &BTreeSet<&str>) -> Vec<(String, String)> {
    let sockets = sides.arriving.iter().filter(|name| name.ends_with(".socket") && !active.contains(name.as_str()));
    let with_service = |socket: &String| {
        let service = sides.new.definition(socket).filter(|socket| !socket.masked)?.service_of(socket)?;
        active.contains(service.as_str()).then(|| (socket.clone(), service))
    };
    sockets.filter_map(with_service).collect()
}

async fn new_socket(
    manager: &Manager,
    sides: &Sides<'_>,
    there: &BTreeSet<&str>,
    socket: &str,
    service: String,
) -> Result<UnitState> {
    let links = manager.links_of(&service).await?;
    let others: Vec<_> = links.triggered_by.into_iter().filter(|unit| unit.ends_with(".socket")).collect();
    let others: Vec<_> = others.into_iter().filter(|unit| there.contains(unit.as_str())).collect();
    let definition = sides.new.definition(socket).unwrap_or_default();
    Ok(UnitState {
        name: socket.to_owned(),
        arrives: true,
        wanted: !links.wanted_by.is_empty(),
        wish: definition.value("Unit", KEY).and_then(|word| word.parse().ok()),
        netlink: others.iter().any(|socket| is_netlink(sides, socket)),
        others,
        along: along(manager, [service.as_str()], there).await?,
        refuses: sides.new.definition(&service).and_then(refusal),
        serves: Some(service),
        ..UnitState::default()
    })
}

/// The active units that are stopped and restarted with these, themselves left out.
async fn along<'a>(
    manager: &Manager,
    units: impl IntoIterator<Item = &'a str>,
    there: &BTreeSet<&str>,
) -> Result<Vec<String>> {
    let mut pending: Vec<String> = units.into_iter().map(str::to_owned).collect();
    let own = pending.clone();
    let mut seen = BTreeSet::new();
    while let Some(name) = pending.pop() {
        if seen.insert(name.clone()) {
            let links = manager.links_of(&name).await?;
            pending.extend(links.along.into_iter().filter(|name| there.contains(name.as_str())));
        }
    }
    Ok(seen.into_iter().filter(|name| !own.contains(name)).collect())
}

/// What the unit file says about jobs by hand.
fn refusal(definition: Definition) -> Option<Refusal> {
    let has = |key| definition.value("Unit", key).is_some_and(is_true);
    if has("RefuseManualStop") { Some(Refusal::Stop) } else { has("RefuseManualStart").then_some(Refusal::Start) }
}

/// The definitions of all active units.
pub async fn definitions(manager: &Manager, files: &UnitFiles) -> Result<Definitions> {
    let units = manager.list().await?;
    let define = |unit: Unit| files.definition(&unit.name).map(|definition| (unit.name, definition));
    Ok(units.into_iter().filter(|unit| unit.is_active()).filter_map(define).collect())
}

/// The names of all active units.
pub async fn active(manager: &Manager) -> Result<BTreeSet<String>> {
    Ok(manager.list().await?.into_iter().filter(|unit| unit.active == "active").map(|unit| unit.name).collect())
}

/// `None` for a unit that is the same on both sides.
async fn look(
    manager: &Manager,
    unit: &Unit,
    sides: &Sides<'_>,
    (active, there): (&BTreeSet<&str>, &BTreeSet<&str>),
    troubles: &mut Vec<String>,
) -> Result<Option<UnitState>> {
    let name = unit.name.as_str();
    let is_service = name.ends_with(".service");
    let mut changed = BTreeSet::new();
    if is_service {
        for pid in processes(&manager.control_group(unit).await?) {
            changed.extend(mapped_below(pid, Path::new("/usr"), sides.version, sides.differs));
        }
    }
    let old = sides.old.get(name);
    let new = sides.new.definition(name);
    let difference = old.map_or(Difference::Same, |old| compare(Some(old), new.as_ref()));
    if changed.is_empty() && difference == Difference::Same {
        return Ok(None);
    }
    let links = manager.links(unit).await?;
    let of = |section: &str, key: &str| new.as_ref().or(old).and_then(|definition| definition.value(section, key));
    let wish = of("Unit", KEY).and_then(|word| {
        word.parse::<Wish>().inspect_err(|error| troubles.push(format!("{name}: {KEY}={error}"))).ok()
    });
    let running = |unit: &&String| active.contains(unit.as_str());
    let serves = links.triggers.iter().find(|unit| unit.ends_with(".service")).filter(running);
    let serves = serves.filter(|_| name.ends_with(".socket")).cloned();
    // Who wants the service decides whether it is started at once, also where it is asked for its socket. A target that
    // is reached only later counts: what it wants is no business of the socket alone.
    let of_service = match &serves {
        Some(service) => Some(manager.links_of(service).await?),
        None => None,
    };
    let (wanted_by, triggered_by) = match &of_service {
        Some(service) => (&service.wanted_by, &service.triggered_by),
        None => (&links.wanted_by, &links.triggered_by),
    };
    let sockets: Vec<_> =
        triggered_by.iter().filter(|unit| unit.ends_with(".socket")).filter(running).cloned().collect();
    let others = if serves.is_some() { without(&sockets, name) } else { Vec::new() };
    let mut connection = false;
    for socket in sockets.iter().filter(|_| is_service) {
        connection |= manager.accepts(socket).await?;
    }
    let along = along(manager, [name].into_iter().chain(serves.as_deref()), there).await?;
    let other_release = name == LOGIND && is_other_release(&changed, sides.systemd);
    let both = [Some(name), serves.as_deref()].into_iter().flatten();
    let refuses = both.filter_map(|name| refusal(sides.new.definition(name)?)).next();
    Ok(Some(UnitState {
        name: name.to_owned(),
        changed: changed.into_iter().collect(),
        difference,
        wish,
        oneshot: of("Service", "Type") == Some("oneshot"),
        reloadable: of("Service", "ExecReload").is_some() || of("Service", "Type") == Some("notify-reload"),
        connection,
        netlink: of("Socket", "ListenNetlink").is_some() || others.iter().any(|socket| is_netlink(sides, socket)),
        refuses,
        sockets: if is_service { sockets } else { Vec::new() },
        serves,
        others,
        wanted: !wanted_by.is_empty(),
        arrives: false,
        along,
        other_release,
    }))
}

fn without(names: &[String], name: &str) -> Vec<String> {
    names.iter().filter(|one| *one != name).cloned().collect()
}

/// A socket of the kernel's, by its unit file.
fn is_netlink(sides: &Sides<'_>, socket: &str) -> bool {
    let definition = sides.new.definition(socket).or_else(|| sides.old.get(socket).cloned());
    definition.is_some_and(|socket| socket.value("Socket", "ListenNetlink").is_some())
}

/// Whether what it maps of systemd is of another release than `new`. Of the same one its library may differ, too.
fn is_other_release(changed: &BTreeSet<String>, new: Option<u32>) -> bool {
    changed.iter().filter_map(|path| release_of(Path::new(path))).any(|old| Some(old) != new)
}

/// Units that run something or wait for something, or failed at it, with their unit files. Not mounts: one that
/// has a unit file now may have been mounted without one before.
pub async fn active_fragments(manager: &Manager) -> Result<Vec<(String, PathBuf)>> {
    const KINDS: [&str; 4] = [".service", ".socket", ".timer", ".path"];
    let mut fragments = Vec::new();
    for unit in manager.list().await? {
        let concerned = matches!(unit.active.as_str(), "active" | "reloading" | "activating" | "failed");
        if concerned && KINDS.iter().any(|suffix| unit.name.ends_with(suffix)) {
            let fragment = manager.fragment(&unit).await?;
            if fragment.is_absolute() {
                fragments.push((unit.name, fragment));
            }
        }
    }
    Ok(fragments)
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

/// The files under `/usr`, relative to it, that a process executes or maps and that are not the files
/// which stand at these paths now.
pub fn mapped_files(pid: u32) -> BTreeSet<String> {
    mapped_below(pid, Path::new("/usr"), Version::Replaced, &|_| true)
}

/// The files below `root` that `differs`, mapped in the `version` asked for.
fn mapped_below(pid: u32, root: &Path, version: Version, differs: Differs<'_>) -> BTreeSet<String> {
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
    fn words_for_true() {
        for (word, expected) in [
            ("1", true),
            ("Yes", true),
            ("y", true),
            ("true", true),
            ("t", true),
            ("ON", true),
            ("no", false),
            ("", false),
        ] {
            assert_eq!(is_true(word), expected, "{word}");
        }
    }

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
    fn another_release_of_systemd() {
        let of = |changed: &[&str], new| is_other_release(&changed.iter().map(|&path| path.into()).collect(), new);
        let library = "lib/x86_64-linux-gnu/systemd/libsystemd-shared-252.so";
        assert!(of(&["lib/systemd/systemd-logind", library], Some(257)));
        assert!(of(&[library], None), "nobody knows");
        assert!(!of(&[library], Some(252)), "another build");
        assert!(!of(&["lib/systemd/systemd-logind"], Some(257)), "the library is the same file");
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
