//! Carries out a plan. Creates and syncs all new versions before the first entry changes.

use std::collections::BTreeSet;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use rustix::fs::CWD;
use rustix::io::Errno;

use super::journal::{Prior, UndoJournal};
use super::name::Bytes;
use super::place::{Outcome, Place, Source, copy};
use super::plan::{Change, Class, Origin, Plan};
use super::report::{NotDone, Report};
use super::snapshot::{Content, Leaf};
use super::staging::{CHANGED, Staging};
use support::failpoint::{self, Point};

/// Carries out `plan` on `etc_dir` with content from `new_dir` (the new tree's `usr/etc`). Keeps an undo journal in the
/// directory `undo_dir`, and saves the node image's versions of conflicting entries in `etc-new` beside it.
///
/// The function changes each entry in one step, and only if it still equals the plan's `before`. It skips and reports
/// entries that another process has changed. A power cut at any time leaves each file with its old or its new content.
/// When the function returns, all changes are on the disk. A repeated call with the same plan completes a call that was
/// killed or failed; after a complete call it changes nothing.
///
/// A written entry gets the label in the plan, or the label of the file in `new_dir`. Labels that the kernel refuses
/// are counted in the report, see [`relabel`](super::relabel()).
///
/// # Errors
/// A file system is full or fails. The changes so far are in the journal: the caller repeats the call or calls
/// [`undo`](super::undo()). If `undo_dir` has the journal of another plan, the function changes nothing.
pub fn apply(plan: &Plan, new_dir: BorrowedFd<'_>, etc_dir: BorrowedFd<'_>, undo_dir: &Path) -> Result<Report> {
    let aside_dir = aside_dir(undo_dir);
    let mut journal = UndoJournal::create(undo_dir, plan)?;
    let mut report = Report::new(plan, &aside_dir);
    save_aside(plan, new_dir, &aside_dir)?;
    Merge { new_dir, etc_dir }.carry_out(&mut journal, plan.changes.len(), &mut report)?;
    Ok(report)
}

/// The directories of a merge.
pub(super) struct Merge<'a> {
    pub new_dir: BorrowedFd<'a>,
    pub etc_dir: BorrowedFd<'a>,
}

impl Merge<'_> {
    /// Carries out the first `count` changes of the plan in `journal`.
    pub fn carry_out(&self, journal: &mut UndoJournal, count: usize, report: &mut Report) -> Result<()> {
        let changes: Vec<Change> = journal.plan.changes.iter().take(count).cloned().collect();
        if changes.is_empty() {
            return Ok(());
        }
        let resumed: BTreeSet<usize> = journal.started.keys().copied().collect();
        let staging = Staging::open(self.etc_dir)?;
        let mut staged = Vec::new();
        for (number, change) in changes.iter().enumerate() {
            let ready = self.prepare(&staging, journal, number, change, resumed.contains(&number));
            staged.push(ready.with_context(|| format!("cannot prepare the new version of /etc/{}", change.path))?);
        }
        journal.sync()?;
        staging.sync()?;
        for (number, (change, staged)) in changes.iter().zip(staged).enumerate() {
            let outcome = self.commit(&staging, journal, number, change, staged, resumed.contains(&number));
            let outcome = outcome.with_context(|| {
                format!("cannot change /etc/{} ({} of {count} changes are complete)", change.path, report.applied)
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
        staging.close()
    }

    /// Saves the content that change `number` replaces, and creates the new version in the staging directory.
    fn prepare(
        &self,
        staging: &Staging,
        journal: &mut UndoJournal,
        number: usize,
        change: &Change,
        resumed: bool,
    ) -> Result<Staged> {
        let place = Place::find(self.etc_dir, &change.path)?;
        let current = place.as_ref().map_or(Ok(None), Place::look)?;
        if !is_pending(change, current.as_ref(), resumed) {
            return Ok(Staged::Nothing);
        }
        if !resumed {
            let mut prior = Prior { change: number, label: None, mtime: None };
            if let (Some(before), Some(place)) = (&change.before, &place) {
                let (label, mtime) = place.label_and_mtime()?;
                (prior.label, prior.mtime) = (label, Some(mtime));
                if let Content::File { sha256, .. } = &before.content
                    && copy(&mut place.open()?, &mut journal.save(number)?)? != *sha256
                {
                    return Ok(Staged::Nothing);
                }
            }
            journal.start(prior)?;
        }
        let Some(after) = change.after.as_ref().filter(|after| !is_in_place(change, after)) else {
            return Ok(Staged::InPlace);
        };
        let from = Place::find(self.new_dir, &change.path)?;
        let mut source = Source::default();
        if matches!(after.content, Content::File { .. }) {
            source.content = Some(match change.content {
                Origin::New => from.as_ref().context("it is missing in the new tree; make a new plan")?.open()?,
                Origin::Current => journal.saved(number)?,
            });
        }
        let chosen = self.choose_label(journal, number, change, from.as_ref())?;
        source.label = chosen.as_deref();
        Ok(Staged::Version { labelled: staging.make(number, after, &mut source)? })
    }

    /// Makes change `number`, if the entry is still the old one.
    fn commit(
        &self,
        staging: &Staging,
        journal: &UndoJournal,
        number: usize,
        change: &Change,
        staged: Staged,
        resumed: bool,
    ) -> Result<Outcome> {
        let done = Outcome::Done { labelled: true };
        let Some(place) = Place::find(self.etc_dir, &change.path)? else {
            return Ok(if change.after.is_none() { done } else { Outcome::Skipped("its directory is missing") });
        };
        let current = place.look()?;
        if current == change.after {
            return Ok(done);
        }
        if !is_pending(change, current.as_ref(), resumed) {
            return Ok(Outcome::Skipped(CHANGED));
        }
        match (staged, &change.after, &current) {
            (Staged::Nothing, ..) => Ok(Outcome::Skipped(CHANGED)),
            (Staged::Version { labelled }, ..) => Ok(match staging.put(number, &place, current.as_ref())? {
                Outcome::Done { .. } => Outcome::Done { labelled },
                skipped @ Outcome::Skipped(_) => skipped,
            }),
            (Staged::InPlace, Some(after), _) => {
                let from = Place::find(self.new_dir, &change.path)?;
                let label = self.choose_label(journal, number, change, from.as_ref())?;
                place.set_metadata(after, &Source { label: label.as_deref(), ..Source::default() })
            }
            (Staged::InPlace, None, None) => Ok(done),
            (Staged::InPlace, None, Some(current)) => staging.remove(number, &place, current),
        }
    }

    /// Returns the label for the new version: that of the plan, or that of the file with its content.
    fn choose_label(
        &self,
        journal: &UndoJournal,
        number: usize,
        change: &Change,
        from: Option<&Place>,
    ) -> Result<Option<Vec<u8>>> {
        if let Some(label) = &change.label {
            return Ok(Some(label.0.clone()));
        }
        match (change.content, from) {
            (Origin::New, Some(from)) => Ok(from.label_and_mtime()?.0.map(|label| label.0)),
            _ => Ok(journal.started.get(&number).and_then(|prior| prior.label.clone()).map(|label| label.0)),
        }
    }
}

/// The new version of an entry, after [`Merge::prepare`].
enum Staged {
    /// The staging directory has it.
    Version { labelled: bool },
    /// The change needs none: it removes the entry, or sets owner, mode and attributes of a directory.
    InPlace,
    /// The change is complete, or the entry is not the old one.
    Nothing,
}

/// Returns true if the entry is a directory before and after the change.
fn is_in_place(change: &Change, after: &Leaf) -> bool {
    after.is_directory() && change.before.as_ref().is_some_and(Leaf::is_directory)
}

/// Returns true if the change is still to be made to `current`. `resumed` is true if an earlier call started it.
fn is_pending(change: &Change, current: Option<&Leaf>, resumed: bool) -> bool {
    current != change.after.as_ref()
        && (current == change.before.as_ref() || (resumed && is_intermediate(change, current)))
}

/// Returns true if a call that was killed during this change can have left `current`.
pub(super) fn is_intermediate(change: &Change, current: Option<&Leaf>) -> bool {
    let (Some(before), Some(after)) = (&change.before, &change.after) else { return false };
    match current {
        // A directory was replaced by another type of entry, or the reverse.
        None => before.is_directory() != after.is_directory(),
        // Owner, mode and attributes of a directory are set one after the other.
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
    directories(aside_dir).with_context(|| format!("cannot create {}", aside_dir.display()))?;
    for path in plan.aside.keys() {
        let target = aside_dir.join(path.as_path());
        save_one_aside(path, new_dir, &target, &directories)
            .with_context(|| format!("cannot save the node image's /etc/{path} as {}", target.display()))?;
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
    directories(target.parent().context("bug: the path has no parent")?)?;
    support::ignore_missing(std::fs::remove_file(target))?;
    match from.look()?.map(|leaf| leaf.content) {
        Some(Content::File { .. }) => {
            let mut file = std::fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(target)?;
            copy(&mut from.open()?, &mut file).map(drop)
        }
        Some(Content::Symlink(to)) => Ok(rustix::fs::symlinkat(&to.0, CWD, target)?),
        _ => Ok(()),
    }
}

/// Refuses a plan with conflicts, for `etc.strategy = "fail"`.
///
/// # Errors
/// The plan has conflicts; the message has all their paths.
pub fn refuse_conflicts(plan: &Plan) -> Result<()> {
    let paths: BTreeSet<String> = plan.of(Class::Conflict).map(|decision| format!("/etc/{}", decision.path)).collect();
    ensure!(
        paths.is_empty(),
        "the node image and local changes conflict in {}; resolve the conflicts, or set etc.strategy = \"keep\"",
        paths.into_iter().collect::<Vec<_>>().join(", ")
    );
    Ok(())
}

/// Opens a directory for the other functions of this crate.
///
/// # Errors
/// The directory cannot be opened; the message has the path.
pub fn open_dir(path: &Path) -> Result<std::os::fd::OwnedFd> {
    let flags = rustix::fs::OFlags::RDONLY | rustix::fs::OFlags::DIRECTORY | rustix::fs::OFlags::CLOEXEC;
    rustix::fs::open(path, flags, rustix::fs::Mode::empty()).with_context(|| format!("cannot open {}", path.display()))
}

/// Opens the directory `etc` in `usr`, which can be a detached tree. Returns `None` if it is missing.
///
/// # Errors
/// `etc` is not a directory, or cannot be opened.
pub fn open_defaults(usr: BorrowedFd<'_>) -> Result<Option<std::os::fd::OwnedFd>> {
    let flags = rustix::fs::OFlags::RDONLY | rustix::fs::OFlags::DIRECTORY | rustix::fs::OFlags::CLOEXEC;
    match rustix::fs::openat2(usr.as_fd(), "etc", flags, rustix::fs::Mode::empty(), super::scan::resolve()) {
        Ok(dir) => Ok(Some(dir)),
        Err(Errno::NOENT) => Ok(None),
        Err(error) => Err(error).context("cannot open etc in the new /usr"),
    }
}

/// Returns the directory for the node image's versions of conflicting entries.
pub(super) fn aside_dir(undo_dir: &Path) -> PathBuf {
    undo_dir.with_file_name("etc-new")
}
