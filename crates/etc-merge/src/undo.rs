//! Undoes a merge from its journal.

use std::os::fd::BorrowedFd;
use std::path::Path;

use anyhow::{Context, Result};

use super::apply::{aside_dir, is_intermediate};
use super::journal::{Prior, UndoJournal, remove_leftovers};
use super::name::Bytes;
use super::place::{Outcome, Place, Source};
use super::plan::Change;
use super::report::{NotDone, UndoReport};
use super::snapshot::{Content, Leaf};
use super::staging::Staging;
use support::failpoint::{self, Point};

/// Undoes the merge whose journal is in `undo_dir`, last change first. Restores content, owner, mode, attributes,
/// labels and modification times. Keeps and reports entries that another process has changed since. Continues after the
/// failure of an entry, so that as many entries as possible are restored. A power cut at any time leaves each file with
/// its old or its new content. When the function returns, all changes are on the disk.
///
/// Finally removes the journal and the saved versions of conflicting entries, unless an entry failed. Without a journal
/// the function changes nothing.
///
/// # Errors
/// The journal cannot be read or removed, or the file system of `/etc` fails as a whole. The journal stays for another
/// attempt. Failures of single entries are in the report.
pub fn undo(undo_dir: &Path, etc_dir: BorrowedFd<'_>) -> Result<UndoReport> {
    let mut report = UndoReport::default();
    let Some(mut journal) = UndoJournal::load(undo_dir)? else {
        remove_leftovers(undo_dir)?;
        return Ok(report);
    };
    journal.add_possibly_started();
    report.damaged = journal.damaged;
    if !journal.started.is_empty() || Staging::is_left(etc_dir) {
        revert_all(&journal, etc_dir, &mut report)?;
    }
    if report.failed.is_empty() {
        // Before the journal is removed: a repeated call without a journal would not remove this directory.
        let aside = aside_dir(undo_dir);
        let removed = support::ignore_missing(std::fs::remove_dir_all(&aside));
        removed.with_context(|| format!("cannot remove {} after the undo", aside.display()))?;
        journal.end()?;
    }
    Ok(report)
}

fn revert_all(journal: &UndoJournal, etc_dir: BorrowedFd<'_>, report: &mut UndoReport) -> Result<()> {
    let staging = Staging::open(etc_dir)?;
    let mut staged = Vec::new();
    for (number, prior) in journal.started.iter().rev() {
        let change = journal.plan.changes.get(*number).context("bug: a line of the undo journal is not in the plan")?;
        match prepare(&staging, journal, *number, change, prior, etc_dir) {
            Ok(labelled) => staged.push((*number, change, prior, labelled)),
            Err(error) => report.failed.push(NotDone { path: change.path.clone(), reason: format!("{error:#}") }),
        }
    }
    staging.sync()?;
    for (number, change, prior, labelled) in staged {
        match revert(&staging, number, change, prior, etc_dir, labelled) {
            Ok(Outcome::Done { labelled }) => {
                report.restored += 1;
                report.unlabelled += usize::from(!labelled);
            }
            // No other process changed this entry. The report already has the failure above or below it.
            Ok(Outcome::Skipped(_)) if report.failed.iter().any(|entry| is_nested(&entry.path, &change.path)) => {}
            Ok(Outcome::Skipped(reason)) => {
                report.kept.push(NotDone { path: change.path.clone(), reason: reason.to_owned() });
            }
            Err(error) => report.failed.push(NotDone { path: change.path.clone(), reason: format!("{error:#}") }),
        }
    }
    staging.close()
}

/// Creates the old version of the entry of change `number` in the staging directory. Returns true if its label could be
/// set, or `None` if the undo needs no version.
fn prepare(
    staging: &Staging,
    journal: &UndoJournal,
    number: usize,
    change: &Change,
    prior: &Prior,
    etc_dir: BorrowedFd<'_>,
) -> Result<Option<bool>> {
    let in_place = |before: &&Leaf| before.is_directory() && change.after.as_ref().is_some_and(Leaf::is_directory);
    let Some(before) = change.before.as_ref().filter(|before| !in_place(before)) else { return Ok(None) };
    let current = Place::find(etc_dir, &change.path)?.map_or(Ok(None), |place| place.look())?;
    if current.as_ref() == Some(before) {
        return Ok(None);
    }
    let mut source = source(prior, before);
    if matches!(before.content, Content::File { .. }) {
        source.content = Some(journal.saved(number)?);
    }
    staging.make(number, before, &mut source).map(Some)
}

fn source<'a>(prior: &'a Prior, before: &Leaf) -> Source<'a> {
    Source {
        content: None,
        label: prior.label.as_ref().map(|label| label.0.as_slice()),
        mtime: prior.mtime.filter(|_| !before.is_directory()),
    }
}

/// Returns true if the paths are equal or one is below the other.
pub(super) fn is_nested(one: &Bytes, other: &Bytes) -> bool {
    one.as_path().starts_with(other.as_path()) || other.as_path().starts_with(one.as_path())
}

/// Reverts change `number`, if the entry is still the one that the merge wrote. `staged` is the result of [`prepare`].
fn revert(
    staging: &Staging,
    number: usize,
    change: &Change,
    prior: &Prior,
    etc_dir: BorrowedFd<'_>,
    staged: Option<bool>,
) -> Result<Outcome> {
    failpoint::hit(Point::EtcRevert, "").context("cannot revert it")?;
    let done = Outcome::Done { labelled: true };
    let Some(place) = Place::find(etc_dir, &change.path)? else {
        return Ok(if change.before.is_none() { done } else { Outcome::Skipped("its directory is missing") });
    };
    let current = place.look()?;
    if current == change.before {
        return Ok(done);
    }
    let changed = Outcome::Skipped("changed since the switch");
    if current != change.after && !is_intermediate(change, current.as_ref()) {
        return Ok(changed);
    }
    match (&change.before, staged, &current) {
        (None, _, None) => Ok(done),
        (None, _, Some(current)) => staging.remove(number, &place, current),
        (Some(_), Some(labelled), _) => Ok(match staging.put(number, &place, current.as_ref())? {
            Outcome::Done { .. } => Outcome::Done { labelled },
            skipped @ Outcome::Skipped(_) => skipped,
        }),
        (Some(before), None, Some(current)) if before.is_directory() && current.is_directory() => {
            place.set_metadata(before, &source(prior, before))
        }
        (Some(_), None, _) => Ok(changed),
    }
}
