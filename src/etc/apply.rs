//! Carries out a plan, act by act, and takes it back.

use std::collections::BTreeSet;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use rustix::fs::CWD;
use rustix::io::Errno;

use super::name::Bytes;
use super::place::{Outcome, Place, Source, copy};
use super::plan::{Change, Class, Origin, Plan};
use super::record::{Prior, Record, sweep};
use super::report::{NotDone, Report, UndoReport};
use super::snapshot::{Content, Leaf};
use crate::failpoint::{self, Point};
use crate::report::human_bytes;

/// The security label for a path (absolute, in `/etc`) and its file type and mode, by the new policy.
pub type Labeler<'a> = dyn Fn(&Path, u32) -> Option<Vec<u8>> + 'a;

/// Carries out `plan` on `etc_dir`, taking content from `new_dir` (the new tree's `usr/etc`), with an undo
/// record in `undo_dir`. Conflicting versions of the node image are saved in `etc-new` beside it.
///
/// What it writes is labelled by `label`, or, without one, as the plan says, or as the new tree's file is: an
/// image's `usr/etc` carries the labels of its own policy. A label that the kernel refuses is counted, not fatal.
///
/// Each entry changes in one step and only if it is still what the plan says; one that somebody changed
/// meanwhile is left alone and reported. Calling it again with the same plan finishes a call that was
/// killed or failed; calling it once more does nothing.
///
/// # Errors
/// When there is no room, or a file system fails: what was done so far stands and is in the record, so
/// the same call can be repeated, or [`undo`] called. A record of another plan is refused, with nothing
/// changed.
pub fn apply(
    plan: &Plan,
    new_dir: BorrowedFd<'_>,
    etc_dir: BorrowedFd<'_>,
    undo_dir: &Path,
    label: Option<&Labeler<'_>>,
) -> Result<Report> {
    let aside_dir = aside_dir(undo_dir);
    let mut record = Record::create(undo_dir, plan)?;
    let mut report = Report::new(plan, &aside_dir);
    save_aside(plan, new_dir, &aside_dir)?;
    for (number, change) in plan.changes.iter().enumerate() {
        let outcome = act(&mut record, number, change, new_dir, etc_dir, label).with_context(|| {
            format!(
                "/etc/{} ({} of {} acts done; repeat to finish, or undo)",
                change.path,
                report.applied,
                plan.changes.len()
            )
        })?;
        match outcome {
            Outcome::Done { labelled } => {
                report.applied += 1;
                report.unlabelled += usize::from(!labelled);
            }
            Outcome::Skipped(reason) => {
                report.skipped.push(NotDone { path: change.path.clone(), reason: reason.to_owned() });
            }
        }
    }
    Ok(report)
}

pub(super) fn act(
    record: &mut Record,
    number: usize,
    change: &Change,
    new_dir: BorrowedFd<'_>,
    etc_dir: BorrowedFd<'_>,
    label: Option<&Labeler<'_>>,
) -> Result<Outcome> {
    let Some(place) = Place::find(etc_dir, &change.path)? else {
        let gone = change.after.is_none();
        return Ok(if gone { Outcome::Done { labelled: true } } else { Outcome::Skipped("its directory is gone") });
    };
    let begun = record.begun.contains_key(&number);
    if begun {
        place.clear_temporary(number)?;
    }
    let current = place.look()?;
    if current == change.after {
        return Ok(Outcome::Done { labelled: true });
    }
    if current != change.before && !(begun && is_between(change, current.as_ref())) {
        return Ok(Outcome::Skipped("changed since the plan was made"));
    }
    if !begun {
        let mut prior = Prior { change: number, label: None, mtime: None };
        if let Some(before) = &change.before {
            let (label, mtime) = place.label_and_mtime()?;
            (prior.label, prior.mtime) = (label, Some(mtime));
            if let Content::File { sha256, .. } = &before.content {
                let saved = copy(&mut place.open()?, &mut record.save(number)?)?;
                if saved != *sha256 {
                    return Ok(Outcome::Skipped("changed since the plan was made"));
                }
            }
        }
        record.begin(prior)?;
    }
    let Some(after) = &change.after else {
        return place.remove(change.before.as_ref().is_some_and(Leaf::is_directory));
    };
    let from = Place::find(new_dir, &change.path)?;
    let mut source = Source::default();
    if matches!(after.content, Content::File { .. }) {
        source.content = Some(match change.content {
            Origin::New => from.as_ref().context("the new tree does not have it any more; plan again")?.open()?,
            Origin::Current => record.saved(number)?,
        });
    }
    let chosen = choose_label(record, number, change, after, from.as_ref(), label)?;
    source.label = chosen.as_deref();
    // In an act that was begun before, the entry may be gone already.
    place.put(current.as_ref(), after, &mut source, number)
}

fn choose_label(
    record: &Record,
    number: usize,
    change: &Change,
    after: &Leaf,
    from: Option<&Place>,
    label: Option<&Labeler<'_>>,
) -> Result<Option<Vec<u8>>> {
    if let Some(label) = label {
        return Ok(label(&Path::new("/etc").join(change.path.as_path()), after.raw_mode()));
    }
    if let Some(label) = &change.label {
        return Ok(Some(label.0.clone()));
    }
    match (change.content, from) {
        (Origin::New, Some(from)) => Ok(from.label_and_mtime()?.0.map(|label| label.0)),
        _ => Ok(record.begun.get(&number).and_then(|prior| prior.label.clone()).map(|label| label.0)),
    }
}

/// Whether `current` is what a killed act of this change can have left, between before and after.
fn is_between(change: &Change, current: Option<&Leaf>) -> bool {
    let (Some(before), Some(after)) = (&change.before, &change.after) else { return false };
    match current {
        // A directory and something else were changing places.
        None => before.is_directory() != after.is_directory(),
        // Owner, mode and attributes of a directory are set one by one.
        Some(now) if before.is_directory() && after.is_directory() && now.is_directory() => {
            let either = |get: fn(&Leaf) -> u32| [get(before), get(after)].contains(&get(now));
            either(|leaf| leaf.meta.uid) && either(|leaf| leaf.meta.gid) && either(|leaf| leaf.meta.mode)
        }
        Some(_) => false,
    }
}

fn save_aside(plan: &Plan, new_dir: BorrowedFd<'_>, aside_dir: &Path) -> Result<()> {
    if plan.aside.is_empty() {
        return Ok(());
    }
    let directories = |path: &Path| std::fs::DirBuilder::new().recursive(true).mode(0o700).create(path);
    directories(aside_dir).with_context(|| format!("making {}", aside_dir.display()))?;
    for path in &plan.aside {
        let target = aside_dir.join(path.as_path());
        save_one_aside(path, new_dir, &target, &directories).with_context(|| {
            format!("saving the node image's /etc/{path} as {}; /etc is untouched", target.display())
        })?;
    }
    Ok(())
}

fn save_one_aside(
    path: &Bytes,
    new_dir: BorrowedFd<'_>,
    target: &Path,
    directories: &dyn Fn(&Path) -> std::io::Result<()>,
) -> Result<()> {
    failpoint::hit(Point::EtcAside, "")?;
    let Some(from) = Place::find(new_dir, path)? else { return Ok(()) };
    directories(target.parent().context("it has no directory")?)?;
    match std::fs::remove_file(target) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error.into()),
        _ => {}
    }
    match from.look()?.map(|leaf| leaf.content) {
        Some(Content::File { .. }) => {
            let mut file = std::fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(target)?;
            copy(&mut from.open()?, &mut file).map(drop)
        }
        Some(Content::Symlink(to)) => Ok(rustix::fs::symlinkat(&to.0, CWD, target)?),
        _ => Ok(()),
    }
}

/// Takes back what the record in `undo_dir` says was done to `etc_dir`, last act first: content, owner,
/// mode, attributes, labels and times of files are those from before. An entry that somebody changed
/// since is kept and reported. It goes on after a failure, so that as much as possible is undone.
///
/// The record, and what was saved aside, are removed when everything that can be undone is. Without a record nothing is done.
///
/// # Errors
/// Only when the record itself cannot be read or removed; failures of single entries are in the report,
/// and the record then stays, for another attempt.
pub fn undo(undo_dir: &Path, etc_dir: BorrowedFd<'_>) -> Result<UndoReport> {
    let mut report = UndoReport::default();
    let Some(record) = Record::load(undo_dir)? else {
        sweep(undo_dir)?;
        return Ok(report);
    };
    for (number, prior) in record.begun.iter().rev() {
        let change = record.plan.changes.get(*number).context("the undo record names an act that the plan lacks")?;
        match take_back(&record, *number, change, prior, etc_dir) {
            Ok(Outcome::Done { labelled }) => {
                report.restored += 1;
                report.unlabelled += usize::from(!labelled);
            }
            // Nobody's change, but what failed below or above it: told already.
            Ok(Outcome::Skipped(_)) if report.failed.iter().any(|entry| is_kin(&entry.path, &change.path)) => {}
            Ok(Outcome::Skipped(reason)) => {
                report.kept.push(NotDone { path: change.path.clone(), reason: reason.to_owned() });
            }
            Err(error) => report.failed.push(NotDone { path: change.path.clone(), reason: format!("{error:#}") }),
        }
    }
    if report.failed.is_empty() {
        // While there still is a record: without one, nobody would come back for it.
        let aside = aside_dir(undo_dir);
        match std::fs::remove_dir_all(&aside) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(error)
                    .with_context(|| format!("/etc is as it was, but removing {} failed", aside.display()));
            }
            _ => {}
        }
        record.forget()?;
    }
    Ok(report)
}

/// Whether one is the other's directory, at whatever depth.
fn is_kin(one: &Bytes, other: &Bytes) -> bool {
    one.as_path().starts_with(other.as_path()) || other.as_path().starts_with(one.as_path())
}

fn take_back(
    record: &Record,
    number: usize,
    change: &Change,
    prior: &Prior,
    etc_dir: BorrowedFd<'_>,
) -> Result<Outcome> {
    failpoint::hit(Point::EtcTakeBack, "").context("taking it back")?;
    let gone = "its directory is gone";
    let Some(place) = Place::find(etc_dir, &change.path)? else {
        let absent = change.before.is_none();
        return Ok(if absent { Outcome::Done { labelled: true } } else { Outcome::Skipped(gone) });
    };
    place.clear_temporary(number)?;
    let current = place.look()?;
    if current == change.before {
        return Ok(Outcome::Done { labelled: true });
    }
    if current != change.after && !is_between(change, current.as_ref()) {
        return Ok(Outcome::Skipped("changed since the switch"));
    }
    let Some(before) = &change.before else {
        return place.remove(current.is_some_and(|leaf| leaf.is_directory()));
    };
    let mut source = Source { content: None, label: prior.label.as_ref().map(|label| label.0.as_slice()), mtime: None };
    if !before.is_directory() {
        source.mtime = prior.mtime;
    }
    if matches!(before.content, Content::File { .. }) {
        source.content = Some(record.saved(number)?);
    }
    place.put(current.as_ref(), before, &mut source, number)
}

/// What is missing, a line each, when the file systems of `etc` and of the undo record (below `run`) lack the
/// room to carry out `plan` and to take it back. An upper bound: every file counts as whole pages.
///
/// # Errors
/// When a file system does not tell its room.
pub fn check_room(plan: &Plan, etc: &Path, run: &Path) -> Result<Vec<String>> {
    const PAGE: u64 = 4096;
    // The plan once more, a line of the journal for each act, and the agent's own record.
    const RECORD: u64 = 256 * 1024;
    const LINE: u64 = 512;
    let pages = |leaf: &Option<Leaf>| match leaf {
        Some(Leaf { content: Content::File { size, .. }, .. }) => size.next_multiple_of(PAGE) + PAGE,
        Some(_) => PAGE,
        None => 0,
    };
    let changes = plan.changes.len() as u64;
    let needs = [
        (etc, plan.changes.iter().map(|change| pages(&change.after)).sum::<u64>(), changes),
        (run, RECORD + plan.changes.iter().map(|change| LINE + pages(&change.before)).sum::<u64>(), changes + 8),
    ];
    let mut missing = Vec::new();
    for (place, bytes, files) in needs {
        let stat =
            rustix::fs::statvfs(place).with_context(|| format!("cannot tell the room on {}", place.display()))?;
        let free = stat.f_bavail.saturating_mul(stat.f_frsize);
        // Without a limit, a file system counts no blocks or no inodes at all.
        if stat.f_blocks > 0 && free < bytes {
            missing.push(format!(
                "the switch needs up to {} on the file system of {}, which has {} free; make room there",
                human_bytes(bytes),
                place.display(),
                human_bytes(free)
            ));
        }
        if stat.f_files > 0 && stat.f_favail < files {
            missing.push(format!(
                "the switch makes up to {files} files on the file system of {}, which has room for {}; make room there",
                place.display(),
                stat.f_favail
            ));
        }
    }
    Ok(missing)
}

/// Refuses, before anything is changed, a plan with conflicts: for `strategy = "fail"`.
pub fn refuse_conflicts(plan: &Plan) -> Result<()> {
    let paths: BTreeSet<String> = plan.of(Class::Conflict).map(|decision| format!("/etc/{}", decision.path)).collect();
    ensure!(
        paths.is_empty(),
        "the node image and local changes conflict in {}; nothing was changed; resolve them, or set strategy = \"keep\"",
        paths.into_iter().collect::<Vec<_>>().join(", ")
    );
    Ok(())
}

/// Scans the three trees, each on a thread of its own, and decides.
pub fn plan(base: BorrowedFd<'_>, new: BorrowedFd<'_>, current: BorrowedFd<'_>) -> Result<Plan> {
    let [base, new, current] = std::thread::scope(|scope| {
        let scans = [(base, "the booted /usr/etc"), (new, "the node image's /usr/etc"), (current, "/etc")]
            .map(|(dir, name)| scope.spawn(move || super::scan(dir).with_context(|| format!("reading {name}"))));
        scans.map(|scan| scan.join().unwrap_or_else(|_| Err(anyhow::anyhow!("a scan panicked"))))
    });
    Ok(super::decide(&base?, &new?, &current?))
}

/// Opens a directory to scan or to apply to.
pub fn open_dir(path: &Path) -> Result<std::os::fd::OwnedFd> {
    let flags = rustix::fs::OFlags::RDONLY | rustix::fs::OFlags::DIRECTORY | rustix::fs::OFlags::CLOEXEC;
    rustix::fs::open(path, flags, rustix::fs::Mode::empty()).with_context(|| format!("opening {}", path.display()))
}

/// Opens the `etc` directory of a tree, such as a detached new `/usr`; `None` when it has none.
pub fn open_defaults(usr: BorrowedFd<'_>) -> Result<Option<std::os::fd::OwnedFd>> {
    let flags = rustix::fs::OFlags::RDONLY | rustix::fs::OFlags::DIRECTORY | rustix::fs::OFlags::CLOEXEC;
    match rustix::fs::openat2(usr.as_fd(), "etc", flags, rustix::fs::Mode::empty(), super::scan::resolve()) {
        Ok(dir) => Ok(Some(dir)),
        Err(Errno::NOENT) => Ok(None),
        Err(error) => Err(error).context("opening etc in the new /usr"),
    }
}

/// Where conflicting versions of the node image are saved for a record in `undo_dir`.
pub fn aside_dir(undo_dir: &Path) -> PathBuf {
    undo_dir.with_file_name("etc-new")
}
