//! Carries out a plan: every new version is made and synced before the first one gets its place.

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
use super::record::{Prior, Record};
use super::report::{NotDone, Report};
use super::snapshot::{Content, Leaf};
use super::staging::Staging;
use support::failpoint::{self, Point};

/// The security label for a path (absolute, in `/etc`) and its file type and mode, by the new policy.
pub type Labeler<'a> = dyn Fn(&Path, u32) -> Option<Vec<u8>> + 'a;

/// Carries out `plan` on `etc_dir`, taking content from `new_dir` (the new tree's `usr/etc`), with an undo
/// record in `undo_dir`. Conflicting versions of the node image are saved in `etc-new` beside it.
///
/// What it writes is labelled by `label`, or, without one, as the plan says, or as the new tree's file is: an
/// image's `usr/etc` carries the labels of its own policy. A label that the kernel refuses is counted, not fatal.
///
/// Each entry changes in one step and only if it is still what the plan says; one that another process changed
/// meanwhile is left alone and reported. A power cut at any time leaves each file with its old content or its new one;
/// after the return, all is on the disk. Calling it again with the same plan finishes a call that was killed or failed;
/// calling it once more does nothing.
///
/// # Errors
/// When space is missing, or a file system fails: what was done so far stands and is in the record, so
/// the same call can be repeated, or [`undo`](super::undo()) called. A record of another plan is refused, with nothing
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
    Merge { new_dir, etc_dir, label }.carry_out(&mut record, plan.changes.len(), &mut report)?;
    Ok(report)
}

/// The directories that a merge works on.
pub(super) struct Merge<'a> {
    pub new_dir: BorrowedFd<'a>,
    pub etc_dir: BorrowedFd<'a>,
    pub label: Option<&'a Labeler<'a>>,
}

impl Merge<'_> {
    /// Carries out the first `count` acts of the plan that `record` holds.
    pub fn carry_out(&self, record: &mut Record, count: usize, report: &mut Report) -> Result<()> {
        let acts: Vec<Change> = record.plan.changes.iter().take(count).cloned().collect();
        if acts.is_empty() {
            return Ok(());
        }
        let resumed: BTreeSet<usize> = record.begun.keys().copied().collect();
        let staging = Staging::open(self.etc_dir)?;
        let mut staged = Vec::new();
        for (number, change) in acts.iter().enumerate() {
            let ready = self.prepare(&staging, record, number, change, resumed.contains(&number));
            staged.push(
                ready.with_context(|| format!("preparing /etc/{}; /etc is unchanged by this call", change.path))?,
            );
        }
        record.sync()?;
        staging.sync()?;
        for (number, (change, staged)) in acts.iter().zip(staged).enumerate() {
            let outcome = self.commit(&staging, record, number, change, staged, resumed.contains(&number));
            let outcome = outcome.with_context(|| {
                format!("/etc/{} ({} of {count} acts done; repeat to finish, or undo)", change.path, report.applied)
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

    /// Saves what act `number` will replace, and makes its new version. Changes no entry.
    fn prepare(
        &self,
        staging: &Staging,
        record: &mut Record,
        number: usize,
        change: &Change,
        resumed: bool,
    ) -> Result<Staged> {
        let place = Place::find(self.etc_dir, &change.path)?;
        let current = place.as_ref().map_or(Ok(None), Place::look)?;
        if !is_due(change, current.as_ref(), resumed) {
            return Ok(Staged::Nothing);
        }
        if !resumed {
            let mut prior = Prior { change: number, label: None, mtime: None };
            if let (Some(before), Some(place)) = (&change.before, &place) {
                let (label, mtime) = place.label_and_mtime()?;
                (prior.label, prior.mtime) = (label, Some(mtime));
                if let Content::File { sha256, .. } = &before.content
                    && copy(&mut place.open()?, &mut record.save(number)?)? != *sha256
                {
                    return Ok(Staged::Nothing);
                }
            }
            record.begin(prior)?;
        }
        let Some(after) = change.after.as_ref().filter(|after| !is_in_place(change, after)) else {
            return Ok(Staged::InPlace);
        };
        let from = Place::find(self.new_dir, &change.path)?;
        let mut source = Source::default();
        if matches!(after.content, Content::File { .. }) {
            source.content = Some(match change.content {
                Origin::New => from.as_ref().context("the new tree does not have it any more; plan again")?.open()?,
                Origin::Current => record.saved(number)?,
            });
        }
        let chosen = self.choose_label(record, number, change, after, from.as_ref())?;
        source.label = chosen.as_deref();
        Ok(Staged::Version { labelled: staging.make(number, after, &mut source)? })
    }

    fn commit(
        &self,
        staging: &Staging,
        record: &Record,
        number: usize,
        change: &Change,
        staged: Staged,
        resumed: bool,
    ) -> Result<Outcome> {
        let done = Outcome::Done { labelled: true };
        let Some(place) = Place::find(self.etc_dir, &change.path)? else {
            return Ok(if change.after.is_none() { done } else { Outcome::Skipped("its directory is gone") });
        };
        let current = place.look()?;
        if current == change.after {
            return Ok(done);
        }
        if !is_due(change, current.as_ref(), resumed) {
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
                let label = self.choose_label(record, number, change, after, from.as_ref())?;
                place.dress(after, &Source { label: label.as_deref(), ..Source::default() })
            }
            (Staged::InPlace, None, None) => Ok(done),
            (Staged::InPlace, None, Some(current)) => place.remove(staging, number, current),
        }
    }

    fn choose_label(
        &self,
        record: &Record,
        number: usize,
        change: &Change,
        after: &Leaf,
        from: Option<&Place>,
    ) -> Result<Option<Vec<u8>>> {
        if let Some(label) = self.label {
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
}

/// The new version of an entry, after [`Merge::prepare`].
enum Staged {
    /// It waits for its place.
    Version { labelled: bool },
    /// None is needed: the entry is removed, or it is a directory whose owner, mode and attributes change.
    InPlace,
    /// The act is done already, or cannot be done.
    Nothing,
}

const CHANGED: &str = "changed since the plan was made";

/// Returns true if the entry stays the directory that it is.
fn is_in_place(change: &Change, after: &Leaf) -> bool {
    after.is_directory() && change.before.as_ref().is_some_and(Leaf::is_directory)
}

/// Returns true if `current` is an entry that the act has to change.
fn is_due(change: &Change, current: Option<&Leaf>, resumed: bool) -> bool {
    current != change.after.as_ref() && (current == change.before.as_ref() || (resumed && is_between(change, current)))
}

/// Returns true if `current` is what a killed act of this change can have left, between before and after.
pub(super) fn is_between(change: &Change, current: Option<&Leaf>) -> bool {
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
    for path in plan.aside.keys() {
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
