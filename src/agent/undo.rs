//! Undoes a switch on request, rolls back a failed one, resumes interrupted ones at start, and keeps a switch on trial.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::Context as _;
use tracing::{info, warn};

use super::deviations::Standing;
use super::phases::{self, Below};
use super::{Agent, Error, Goal, Record, StagedRoot, Step, TrialPeriod, Undo, UndoTree, auto_undo, storage, views};
use crate::report::{self, Phase, RefusalId, State, Subject};

/// Sets a flag as long as it lives.
struct Flag<'a>(&'a AtomicBool);

impl<'a> Flag<'a> {
    fn raise(flag: &'a AtomicBool) -> Self {
        flag.store(true, Ordering::Release);
        Self(flag)
    }
}

impl Drop for Flag<'_> {
    fn drop(&mut self) {
        self.0.store(false, Ordering::Release);
    }
}

impl Agent {
    /// Restores `/usr`, `/etc` and the ref. Stops the units that only the node image has first, and restarts those that run
    /// its code afterwards. Returns the deliberately kept entries, one per line, also when called again.
    ///
    /// # Errors
    /// A refusal if nothing was switched or another phase is running; an internal error with all entries that could not be
    /// restored. The caller can call undo again.
    pub async fn undo(&self) -> Result<Vec<String>, Error> {
        let record = match self.record.try_lock() {
            Ok(record) => record,
            // A caller repeats its call after the daemon was killed.
            Err(_) if self.undoing.load(Ordering::Acquire) => self.record.lock().await,
            Err(_) => {
                return Err(Error::refused(RefusalId::Busy, "a phase is under way: wait for it, or cancel it first"));
            }
        };
        let mut record = self.holder.hold(record, "undo");
        self.undo_locked(&mut record, Below::Refuse, "undo").await
    }

    /// Undoes a switch whose trial period is over, or continues that undo.
    pub(super) async fn undo_expired(&self) -> Result<(), Error> {
        let mut record = self.record.lock().await;
        let over = record.trial.and_then(TrialPeriod::left).is_some_and(|left| left.is_zero());
        if !record.step.is_before_switch() && (over || matches!(record.step, Step::Undoing(_))) {
            self.undo_locked(&mut record, Below::Unmount, "undo at the end of the trial period").await.map(drop)
        } else if over {
            record.trial = None;
            auto_undo::disarm().await;
            self.save(&mut record)
        } else {
            Ok(())
        }
    }

    /// `event` is the name of the undo in the timeline.
    pub(super) async fn undo_locked(
        &self,
        record: &mut Record,
        below: Below,
        event: &str,
    ) -> Result<Vec<String>, Error> {
        let _flag = Flag::raise(&self.undoing);
        let Some(tree) = record.step.undo_tree() else {
            let nothing = || Error::refused(RefusalId::NoSwitch, "nothing was switched, so there is nothing to undo");
            return record.undone.clone().ok_or_else(nothing);
        };
        // Mounts below /usr were checked when an undo began.
        let begun = if let Step::Undoing(undo) = &record.step { Some(undo.clone()) } else { None };
        let obstacles = phases::obstacles(if begun.is_some() { Below::Unmount } else { below });
        if !obstacles.is_empty() {
            let begun = if begun.is_some() { "goes no further" } else { "has not begun" };
            return Err(Error::refused(RefusalId::WayBack, format!("undo {begun}: {}", phases::message(&obstacles))));
        }
        self.end_download().await;
        let undo = match begun {
            Some(undo) => undo,
            None => self.begin_undo(tree, record).await?,
        };
        // The trial period ends here, because a begun undo must be finished and cannot be kept.
        let before = record.clone();
        record.begun.clear();
        record.step = Step::Undoing(undo.clone());
        record.trial = None;
        if let Err(error) = self.save(record) {
            *record = before;
            return Err(error.at(report::Standing::Switched));
        }
        let span = self.tracker.span(Subject::Undo, event);
        let mut undone = phases::undo(&self.paths, &self.tracker, record, &undo.tree, undo.units.as_deref()).await;
        undone.kept.splice(..0, undo.troubles);
        if !undone.failed.is_empty() {
            let error = anyhow::anyhow!("undo is not complete: {}", undone.failed.join("; "));
            let error = Error::from(error).at(report::Standing::HalfDone);
            span.end(Some(&error));
            self.report_failure(&error);
            if let Err(error) = self.save(record) {
                warn!("{error}");
            }
            return Err(error);
        }
        span.end(None);
        undone.kept.extend(disk_deploy::next_image().map(|image| {
            format!("the next boot is the deployed image {image}; to boot the old system, run ostree admin undeploy 0")
        }));
        record.undone = Some(undone.kept.clone());
        let discarded = self.discard_complete(&undo.tree).await;
        let staged = if undo.salvaged { None } else { undo.tree.staged() };
        let before = |staged: StagedRoot| if discarded { Step::Pulled(staged.pulled) } else { Step::Staged(staged) };
        self.untouched(record, staged.map_or(Step::Idle, before))?;
        auto_undo::disarm().await;
        info!("undone: /usr and /etc are the bootimage's");
        Ok(undone.kept)
    }

    /// Removes the complete tree, which has copies in RAM, if no process sees it. Returns true if it was removed: the next
    /// call must stage again.
    async fn discard_complete(&self, tree: &UndoTree) -> bool {
        let (paths, delta) = (self.paths.clone(), tree.delta.clone());
        if delta.complete.is_none() {
            return false;
        }
        let discard = move || {
            if views::shows_complete_tree() {
                return Ok(false);
            }
            storage::of(&paths, &delta)?.discard_complete()?;
            Ok::<_, anyhow::Error>(true)
        };
        match tokio::task::spawn_blocking(discard).await.context("the removal panicked").flatten() {
            Ok(discarded) => discarded,
            Err(error) => {
                warn!(
                    "cannot remove the complete tree of the undone switch: {error:#}; it keeps its memory until the next \
                     stage or boot"
                );
                // A part of the tree may be gone.
                true
            }
        }
    }

    /// Plans the undo of units for the flow of the switch, also on a machine that is in use by now: a unit that the switch
    /// restarted runs the node image's code and may be the reason for the undo, such as a lost network. If that flow is
    /// unknown, the flow of the record applies.
    ///
    /// # Errors
    /// The units cannot be inspected. Nothing has begun then, because after the first act the units that run the node
    /// image's code cannot be found.
    async fn begin_undo(&self, tree: UndoTree, record: &Record) -> Result<Undo, Error> {
        let planned = phases::plan_units(&self.paths, &tree, record.flow()).await;
        let (units, troubles) = planned.map_err(|error| {
            let error = error.context("cannot determine which units run the node image's code");
            Error::from(error).at(report::Standing::Switched)
        })?;
        Ok(Undo { tree, units: Some(units), troubles, salvaged: matches!(record.step, Step::Lost { .. }) })
    }

    /// Rolls back a switch that failed with `error`. Returns the error with the resulting state of the system.
    pub(super) async fn roll_back(&self, record: &mut Record, staged: StagedRoot, error: Error) -> Error {
        warn!("{error}; rolling back");
        let tree = UndoTree::from(staged.clone());
        let undo = Undo { tree: tree.clone(), units: None, troubles: Vec::new(), salvaged: false };
        record.step = Step::Undoing(undo);
        record.begun.clear();
        record.trial = None;
        // If this fails for lack of space, the old record stays, and the next agent finishes the switch first.
        if let Err(error) = self.save(record) {
            warn!("{error}");
        }
        let span = self.tracker.span(Subject::Undo, "rollback");
        let undone = phases::undo(&self.paths, &self.tracker, record, &tree, None).await;
        if !undone.failed.is_empty() {
            let error = anyhow::anyhow!("{error}; cannot roll back: {}", undone.failed.join("; "));
            span.end(Some(&error));
            return Error::from(error).at(report::Standing::HalfDone);
        }
        span.end(None);
        match self.untouched(record, Step::Staged(staged)) {
            Ok(()) => auto_undo::disarm().await,
            Err(trouble) => warn!("{trouble}"),
        }
        error.at(report::Standing::RolledBack)
    }

    /// Records that the running system is as before the switch, at a `step` before it.
    fn untouched(&self, record: &mut Record, step: Step) -> Result<(), Error> {
        let staged = matches!(step, Step::Staged(_));
        record.step = step;
        record.begun.clear();
        self.tracker.update(|status| {
            (status.state, status.phase) =
                if staged { (State::Pulled, Some(Phase::Stage)) } else { (State::Idle, None) };
            status.error = None;
            status.still_old.clear();
            // They are about the switch, which is not in place any more.
            status.notes.clear();
            status.timeline.retain(|entry| entry.phase <= Phase::Stage);
        });
        self.show(record);
        record.save_over(&self.paths)?;
        super::state::save_timeline(&self.paths, &self.tracker);
        self.standing.send_replace(Standing::of(record));
        Ok(())
    }

    /// Ends the trial period: the switch stays. Returns one line. Another call changes nothing.
    ///
    /// # Errors
    /// A refusal if no switch is on trial, the period is over, or a phase is running.
    pub async fn keep(&self) -> Result<Vec<String>, Error> {
        let Ok(mut record) = self.record.try_lock() else {
            return Err(Error::refused(RefusalId::Busy, "a phase is under way: keep the switch when it has ended"));
        };
        let switched = matches!(record.step, Step::Switched(_) | Step::Refreshed(_) | Step::Finished(_));
        match record.trial {
            Some(trial) if switched && trial.kept => {
                auto_undo::disarm().await;
                Ok(vec!["kept already".into()])
            }
            Some(trial) if switched && trial.left().is_some_and(|left| left.is_zero()) => {
                Err(Error::refused(RefusalId::Expired, "the trial period is over: the switch is being undone"))
            }
            Some(trial) if switched => {
                let before = record.clone();
                record.trial = Some(TrialPeriod { kept: true, ..trial });
                if let Err(error) = self.save(&mut record) {
                    *record = before;
                    return Err(error);
                }
                auto_undo::disarm().await;
                info!("the switch is kept");
                Ok(vec!["kept: the switch stays".into()])
            }
            _ => Err(Error::refused(RefusalId::NoTrial, "there is nothing to keep: no switch is on trial (run --try)")),
        }
    }

    /// Starts the daemon's background work: finishes an interrupted switch or undo, then watches over a trial period.
    /// Meanwhile removes the trees of earlier boots.
    pub fn attend(self: &Arc<Self>) {
        let agent = self.clone();
        tokio::spawn(Self::remove_earlier_boots());
        tokio::spawn(async move {
            if let Err(error) = agent.resume().await {
                warn!("cannot finish the interrupted switch or undo: {error}");
            }
            agent.disarm_if_over().await;
            auto_undo::watch(agent).await;
        });
    }

    /// Removes the trees of earlier boots. No phase of this boot uses them, so that a call need not wait for this.
    async fn remove_earlier_boots() {
        let removed = tokio::task::spawn_blocking(storage::remove_earlier_boots).await.context("the removal panicked");
        if let Err(error) = removed.flatten() {
            warn!(
                "cannot remove the trees of earlier boots from the ostree repo: {error:#}; they keep their disk space until \
                 the agent starts again"
            );
        }
    }

    /// Removes a left-over timer. During an undo it stays, because it restarts an agent that dies.
    async fn disarm_if_over(&self) {
        let record = self.record.lock().await;
        let kept = record.trial.is_none_or(|trial| trial.kept);
        if kept && !matches!(record.step, Step::Undoing(_)) {
            auto_undo::disarm().await;
        }
    }

    async fn resume(&self) -> Result<(), Error> {
        let step = self.record.lock().await.step.clone();
        match step {
            Step::Undoing(_) => self.undo().await.map(drop),
            // Only an administrator may start this undo.
            Step::Lost { message, .. } => Err(Error::refused(RefusalId::LostRecord, message)),
            Step::Switching(_) | Step::Switched(_) => {
                info!("the switch was interrupted: finishing it");
                self.advance(Goal::Switched, &self.cancel_handle("resume")).await
            }
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::path::Path;

    use super::super::Finished;
    use super::super::state::{self, refreshed};
    use super::super::{Boot, Record, StateDir};
    use super::*;
    use crate::report::{LastError, Status, Tracker};

    #[test]
    fn a_failure_survives_an_agent_that_dies_while_it_waits() {
        let temp = tempfile::tempdir().unwrap();
        let paths = StateDir::below(temp.path());
        Record::default().save(&paths).unwrap();
        let tracker = Tracker::new(Status::default());
        tracker.begin(Phase::Resolve);
        for _ in 0..3 {
            let (class, message) = ("network".to_owned(), "connection refused".to_owned());
            tracker.fail(LastError { class, message, next_retry_unix: Some(1), ..LastError::default() });
        }
        state::save_timeline(&paths, &tracker);
        let read = || [Agent::recorded_status(&paths), Agent::open(paths.clone(), Boot::Live).unwrap().status()];
        for status in read() {
            let error = status.error.unwrap();
            assert_eq!((error.message.as_str(), error.attempt, error.next_retry_unix), ("connection refused", 3, None));
        }
        tracker.begin(Phase::Resolve);
        tracker.end(Phase::Resolve, State::Running);
        state::save_timeline(&paths, &tracker);
        assert!(read().into_iter().all(|status| status.error.is_none()), "the attempt after it succeeded");
    }

    /// Runs only without systemd, where the units cannot be inspected.
    #[tokio::test]
    async fn an_undo_does_not_begin_before_the_units_are_known() {
        if Path::new("/run/systemd/system").exists() {
            eprintln!("skipped: this machine's systemd answers");
            return;
        }
        let temp = tempfile::tempdir().unwrap();
        let paths = StateDir::below(temp.path());
        Record::at(Step::Finished(Finished(refreshed()))).save(&paths).unwrap();
        let agent = Agent::open(paths.clone(), Boot::Live).unwrap();
        for _ in 0..2 {
            let error = agent.undo().await.unwrap_err().to_string();
            assert!(error.contains("which units run the node image's code"), "{error}");
            assert_eq!(Record::load(&paths).unwrap().step.name(), "finished", "it can be asked again");
        }
    }
}
