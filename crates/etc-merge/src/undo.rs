//! Takes a merge back from its record.

use std::os::fd::BorrowedFd;
use std::path::Path;

use anyhow::{Context, Result};

use super::apply::{aside_dir, is_between};
use super::name::Bytes;
use super::place::{Outcome, Place, Source};
use super::plan::Change;
use super::record::{Prior, Record, sweep};
use super::report::{NotDone, UndoReport};
use super::snapshot::{Content, Leaf};
use super::staging::Staging;
use support::failpoint::{self, Point};

/// Takes back what the record in `undo_dir` says was done to `etc_dir`, last act first: content, owner,
/// mode, attributes, labels and times of files are those from before. An entry that another process changed
/// since is kept and reported. It goes on after a failure, so that as much as possible is undone. A power cut at any
/// time leaves each file with its old content or its new one; after the return, all is on the disk.
///
/// The record, and what was saved aside, are removed when everything that can be undone is. Without a record nothing is
/// done.
///
/// # Errors
/// When the record cannot be read or removed, or the file system of `/etc` fails as a whole; failures of single entries
/// are in the report. The record then stays, for another attempt.
pub fn undo(undo_dir: &Path, etc_dir: BorrowedFd<'_>) -> Result<UndoReport> {
    let mut report = UndoReport::default();
    let Some(mut record) = Record::load(undo_dir)? else {
        sweep(undo_dir)?;
        return Ok(report);
    };
    record.complete();
    report.damaged = record.damaged;
    if !record.begun.is_empty() || Staging::is_left(etc_dir) {
        take_all_back(&record, etc_dir, &mut report)?;
    }
    if report.failed.is_empty() {
        // While there still is a record: without one, nothing would lead back to it.
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

fn take_all_back(record: &Record, etc_dir: BorrowedFd<'_>, report: &mut UndoReport) -> Result<()> {
    let staging = Staging::open(etc_dir)?;
    let mut staged = Vec::new();
    for (number, prior) in record.begun.iter().rev() {
        let change = record.plan.changes.get(*number).context("the undo record names an act that the plan lacks")?;
        match prepare(&staging, record, *number, change, prior, etc_dir) {
            Ok(labelled) => staged.push((*number, change, prior, labelled)),
            Err(error) => report.failed.push(NotDone { path: change.path.clone(), reason: format!("{error:#}") }),
        }
    }
    staging.sync()?;
    for (number, change, prior, labelled) in staged {
        match take_back(&staging, number, change, prior, etc_dir, labelled) {
            Ok(Outcome::Done { labelled }) => {
                report.restored += 1;
                report.unlabelled += usize::from(!labelled);
            }
            // No other process changed it: what failed below or above it is reported already.
            Ok(Outcome::Skipped(_)) if report.failed.iter().any(|entry| is_kin(&entry.path, &change.path)) => {}
            Ok(Outcome::Skipped(reason)) => {
                report.kept.push(NotDone { path: change.path.clone(), reason: reason.to_owned() });
            }
            Err(error) => report.failed.push(NotDone { path: change.path.clone(), reason: format!("{error:#}") }),
        }
    }
    staging.close()
}

/// Makes the version of an entry from before act `number`. Returns true if its label could be set, or `None` if no
/// version is needed.
fn prepare(
    staging: &Staging,
    record: &Record,
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
        source.content = Some(record.saved(number)?);
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

/// Returns true if one is the other's directory, at whatever depth.
pub(super) fn is_kin(one: &Bytes, other: &Bytes) -> bool {
    one.as_path().starts_with(other.as_path()) || other.as_path().starts_with(one.as_path())
}

fn take_back(
    staging: &Staging,
    number: usize,
    change: &Change,
    prior: &Prior,
    etc_dir: BorrowedFd<'_>,
    staged: Option<bool>,
) -> Result<Outcome> {
    failpoint::hit(Point::EtcRevert, "").context("taking it back")?;
    let done = Outcome::Done { labelled: true };
    let Some(place) = Place::find(etc_dir, &change.path)? else {
        return Ok(if change.before.is_none() { done } else { Outcome::Skipped("its directory is gone") });
    };
    let current = place.look()?;
    if current == change.before {
        return Ok(done);
    }
    let changed = Outcome::Skipped("changed since the switch");
    if current != change.after && !is_between(change, current.as_ref()) {
        return Ok(changed);
    }
    match (&change.before, staged, &current) {
        (None, _, None) => Ok(done),
        (None, _, Some(current)) => place.remove(staging, number, current),
        (Some(_), Some(labelled), _) => Ok(match staging.put(number, &place, current.as_ref())? {
            Outcome::Done { .. } => Outcome::Done { labelled },
            skipped @ Outcome::Skipped(_) => skipped,
        }),
        (Some(before), None, Some(current)) if before.is_directory() && current.is_directory() => {
            place.dress(before, &source(prior, before))
        }
        (Some(_), None, _) => Ok(changed),
    }
}
