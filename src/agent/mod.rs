//! The phase machine: the only module that knows the order of the phases, the record between them, and the retries.
//!
//! Each phase is a function from the previous phase's value to its own, so a wrong order does not compile. The agent writes
//! the record after each phase, so a daemon that was killed continues from the last completed one. This module may use all
//! others except `bus` and `cli`.

mod accounts;
mod auto_undo;
mod boot;
mod cancel;
mod check;
mod deploy;
mod deviations;
mod error;
mod handover;
mod held_units;
mod holder;
mod hooks;
mod new_usr;
mod phases;
mod policy;
mod reexec;
mod retry;
mod staging;
mod state;
mod storage;
mod undo;
mod unit_jobs;
mod unit_survey;
mod views;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::anyhow;
use tokio::sync::{Mutex, MutexGuard, watch};
use tracing::{error, info, warn};

use crate::config::Settings;
use crate::report::{AgentState, LastError, RefusalId, Report, Status, Timeline, Tracker};
use deviations::Standing;
use holder::{Held, Holder};
use node_store::store::{LockError, StoreLock};
use phases::{Below, next};
use state::Asked;
use support::clock::boottime_ms;
use unit_refresh::Guard;

pub use auto_undo::TrialPeriod;
pub use boot::Boot;
pub use cancel::{CancelHandle, CancelHandles};
pub use check::{Checks, checks};
pub use error::Error;
pub use handover::{Program, check_record};
pub use state::{
    Finished, PlanDocument, Record, Refreshed, StagedRoot, StateDir, Step, SwitchPlan, Switched, Undo, UndoTree,
};

/// The end of a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Goal {
    /// Resolve, pull, stage: everything that leaves the running system unchanged.
    Staged,
    /// Switch and refresh.
    Switched,
    /// Isolate to the original default target.
    Finished,
}

/// The extent of a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Extent {
    /// All phases up to a goal.
    Until(Goal),
    /// The phases that leave the running system unchanged, with all content of the image.
    Complete,
    /// All phases of the flow, with a trial period of this length.
    Flow { trial: Option<Duration> },
}

impl Extent {
    /// Returns the goal, or `None` for the last one of the flow.
    fn goal(self) -> Option<Goal> {
        match self {
            Self::Until(goal) => Some(goal),
            Self::Complete => Some(Goal::Staged),
            Self::Flow { .. } => None,
        }
    }

    fn trial(self) -> Option<Duration> {
        match self {
            Self::Flow { trial } => trial,
            Self::Until(_) | Self::Complete => None,
        }
    }
}

/// A call that runs phases.
struct Call<'a> {
    settings: Settings,
    tracker: &'a Tracker,
    dir: &'a StateDir,
    goal: Goal,
    cancel: &'a CancelHandle,
    /// True once this call has staged, so that the switch does not repeat the checks.
    staged_now: bool,
    /// Watches over the agent while PID 1 has the files of another `/usr` than the one in place.
    guard: Option<Guard>,
}

/// The agent. A lock in its directory ensures that a machine has only one.
pub struct Agent {
    tracker: Tracker,
    paths: StateDir,
    record: Mutex<Record>,
    holder: Holder,
    /// True while the call that holds the record undoes the switch.
    undoing: AtomicBool,
    /// Copy of the record's main facts, for readers that do not wait for its lock.
    standing: watch::Sender<Standing>,
    /// False as long as the kind of this boot is unknown; see [`Boot::Unknown`].
    boot_known: AtomicBool,
    cancel_handles: CancelHandles,
    /// Held by a download beside the pivot, which does not hold the record.
    download: Mutex<()>,
    /// Handles of that download, which an undo cancels.
    download_cancel: CancelHandles,
    _lock: StoreLock,
}

impl Agent {
    /// Loads the record that an earlier agent left under `paths`, or begins without one.
    ///
    /// # Errors
    /// Another agent runs, or the agent's directory cannot be used. An unusable record is not an error: the agent reports the
    /// traces of the switch and allows an undo.
    pub fn open(paths: StateDir, boot: Boot) -> anyhow::Result<Arc<Self>> {
        paths.open()?;
        let lock = StoreLock::try_acquire(&paths.lock()).map_err(|error| match error {
            LockError::Held { path, holder } => anyhow!("another agent runs, {holder}; it holds {path}"),
            other => other.into(),
        })?;
        let mut record = state::open(&paths);
        if record.step.is_before_switch() {
            record.status.notes.extend(state::set_aside(&paths));
        }
        // The first reload after the switch removes the generator's drop-in, so the record keeps its content.
        let boot_known = record.learn(boot);
        record.rest();
        (record.status.undo_unix, record.status.flow) = (record.trial.and_then(undo_unix), Some(record.flow()));
        let timeline = state::load_timeline(&paths);
        restore_failure(&mut record, &timeline);
        // Only for the status document. Each call reads the configuration again and reports its errors.
        if let Ok(settings) = Settings::load() {
            record.status.target.get_or_insert_with(|| settings.target.clone());
            if matches!(record.step, Step::Idle) {
                record.status.image = state::shown(&settings);
            }
        }
        Ok(Arc::new(Self {
            tracker: Tracker::new(record.status.clone()).with_timeline(timeline),
            paths,
            undoing: AtomicBool::new(false),
            standing: watch::Sender::new(Standing::of(&record)),
            boot_known: AtomicBool::new(boot_known),
            record: Mutex::new(record),
            holder: Holder::default(),
            cancel_handles: CancelHandles::default(),
            download: Mutex::default(),
            download_cancel: CancelHandles::default(),
            _lock: lock,
        }))
    }

    /// Returns the tracker of the live status document.
    pub fn tracker(&self) -> &Tracker {
        &self.tracker
    }

    /// Returns the status document with the present deviations from a finished switch, which it finds in the mount table
    /// and the configuration.
    pub fn status(&self) -> Status {
        let deviations = self.standing.borrow().deviations();
        let status = self.tracker.status();
        let (diagnosis, agent) = (status.diagnose(), Some(AgentState { running: true, ..AgentState::default() }));
        Status { deviations, diagnosis, agent, call: self.holder.call(), ..status }
    }

    /// Returns the report.
    pub fn report(&self) -> Report {
        Report::new(self.status(), self.tracker.timeline())
    }

    /// Returns the report of the record under `paths`, for when no daemon runs.
    pub fn recorded_report(paths: &StateDir) -> Report {
        let mut timeline = state::load_timeline(paths);
        timeline.interrupt(boottime_ms());
        Report::new(Self::recorded_status(paths), timeline)
    }

    /// Returns the status document of the record under `paths`, for when no daemon runs.
    pub fn recorded_status(paths: &StateDir) -> Status {
        let mut record = state::open(paths);
        let mut deviations = Standing::of(&record).deviations();
        if record.step.is_before_switch() {
            deviations.extend(state::unused(paths));
        } else {
            record.rest();
        }
        restore_failure(&mut record, &state::load_timeline(paths));
        Status { deviations, diagnosis: record.status.diagnose(), ..record.status }
    }

    /// Returns a handle that makes `call` cancellable.
    pub fn cancel_handle(&self, call: &'static str) -> CancelHandle {
        self.cancel_handles.register(call)
    }

    /// Runs the remaining phases up to `goal`. Calls run one after the other. A cancel ends the call as long as the
    /// running system is unchanged; a switch that has begun is finished.
    ///
    /// # Errors
    /// See [`Error`], which also names the state of the running system.
    pub async fn advance(&self, goal: Goal, cancel: &CancelHandle) -> Result<(), Error> {
        self.advance_by(Extent::Until(goal), cancel).await
    }

    /// Runs the remaining phases of `extent`.
    async fn advance_by(&self, extent: Extent, cancel: &CancelHandle) -> Result<(), Error> {
        let mut record = self.lock_for_phases(cancel).await?;
        let outcome = self.advance_locked(&mut record, extent, cancel).await;
        let outcome = outcome.map_err(|error| error.at(record.step.standing()));
        if let Err(error) = &outcome {
            self.report_failure(error);
            if record.step.is_before_switch() {
                // The next call resolves again: the image itself, or a tag that moved, may be the cause. Stored layers
                // are not fetched again.
                record.step = Step::Idle;
            }
            if let Err(error) = self.save(&mut record) {
                warn!("{error}");
            }
        }
        outcome?;
        // Not a failure of the pivot, so the status stays unchanged.
        let configured = Settings::load().ok().map(|settings| Asked::by(&settings));
        let other = deviations::other_image(record.asked.as_ref(), configured.as_ref());
        match other.filter(|_| !record.step.is_before_switch()) {
            Some(line) => Err(Error::refused(RefusalId::OtherImage, line)),
            None => Ok(()),
        }
    }

    /// Waits for the record. Before the switch, also waits for a download, because the phases need its store.
    async fn lock_for_phases(&self, cancel: &CancelHandle) -> Result<Held<'_>, Error> {
        loop {
            let record = self.lock(cancel).await?;
            if !record.step.is_before_switch() || self.download.try_lock().is_ok() {
                return Ok(record);
            }
            drop(record);
            tokio::select! {
                _ = self.download.lock() => {}
                () = cancel.cancelled() => return Err(Error::cancelled()),
            }
        }
    }

    /// Waits for the record.
    async fn lock(&self, cancel: &CancelHandle) -> Result<Held<'_>, Error> {
        tokio::select! {
            record = self.record.lock() => Ok(self.holder.hold(record, cancel.call())),
            () = cancel.cancelled() => Err(Error::cancelled()),
        }
    }

    async fn advance_locked(&self, record: &mut Record, extent: Extent, cancel: &CancelHandle) -> Result<(), Error> {
        if let Step::Undoing(_) = record.step {
            self.undo_locked(record, Below::Unmount, "undo that was interrupted").await?;
        }
        if let Step::Lost { message, .. } = &record.step {
            return Err(Error::refused(RefusalId::LostRecord, message.clone()));
        }
        if !self.boot_known.load(Ordering::Acquire) {
            self.boot_known.store(record.learn(Boot::look().await), Ordering::Release);
        }
        let length = extent.trial();
        if length.is_some() && !record.step.is_before_switch() && record.trial.is_none_or(|until| until.kept) {
            return Err(Error::refused(RefusalId::Switched, "this system is switched already; run undo before a try"));
        }
        // Read at each call, so that a corrected configuration needs no restart.
        let mut settings =
            Settings::load().map_err(|error| Error::refused(RefusalId::Configuration, format!("{error:#}")))?;
        let asked = Asked::by(&settings);
        settings.complete |= extent == Extent::Complete;
        if record.step.is_before_switch() && record.asked.as_ref() != Some(&asked) {
            record.step = Step::Idle;
            record.asked = Some(asked);
            self.tracker.restart(state::shown(&settings));
        }
        let goal = extent.goal().unwrap_or_else(|| record.last_goal());
        let (tracker, dir) = (&self.tracker, &self.paths);
        let mut call = Call { settings, tracker, dir, goal, cancel, staged_now: false, guard: None };
        loop {
            let touches_nothing_yet = record.step.is_before_switch() || matches!(record.step, Step::Refreshed(_));
            if touches_nothing_yet && cancel.is_cancelled() {
                return Err(Error::cancelled());
            }
            match self.step(record, length, &mut call).await {
                Ok(true) => info!("step reached: {}", record.step.name()),
                Ok(false) => return Ok(()),
                Err(error) => {
                    return Err(match record.step.clone() {
                        Step::Switching(staged) => self.roll_back(record, staged, error).await,
                        _ => error,
                    });
                }
            }
        }
    }

    /// Runs the next step and writes it to the record. Returns false if the goal is reached.
    async fn step(&self, record: &mut Record, length: Option<Duration>, call: &mut Call<'_>) -> Result<bool, Error> {
        let Some(next) = next(record, call).await? else { return Ok(false) };
        let before = record.clone();
        if let (Step::Staged(_), Step::Switching(_)) = (&record.step, &next) {
            record.undone = None;
            record.begun.clear();
            // Armed before the first act, because the switch itself may cut the network.
            record.trial = length.map(TrialPeriod::begin);
            if let Some(trial) = record.trial
                && let Err(error) = auto_undo::arm(trial).await
            {
                *record = before;
                return Err(error.into());
            }
        }
        record.reach(next);
        if let Err(error) = self.save(record) {
            *record = before;
            if record.trial.is_none() {
                auto_undo::disarm().await;
            }
            return Err(match record.step {
                Step::Refreshed(_) => {
                    error.context("the isolation is already requested; start node-image-finish.service again")
                }
                _ => error,
            });
        }
        Ok(true)
    }

    /// Runs all phases of the flow; see [`Record::last_goal`].
    ///
    /// # Errors
    /// As [`Agent::advance`].
    pub async fn run(&self, cancel: &CancelHandle) -> Result<(), Error> {
        self.advance_by(Extent::Flow { trial: None }, cancel).await
    }

    /// Runs all phases of the flow with a trial period: the switch is undone `length` after it began, unless
    /// [`Agent::keep`] is called in time.
    ///
    /// # Errors
    /// As [`Agent::advance`]; refused on a system that is switched permanently.
    pub async fn run_for(&self, length: Duration, cancel: &CancelHandle) -> Result<(), Error> {
        self.advance_by(Extent::Flow { trial: Some(length) }, cancel).await
    }

    /// Cancels every call that has not begun to switch, running or waiting. Stored content stays for the next call.
    /// Returns true if there was such a call.
    pub fn cancel(&self) -> bool {
        self.cancel_handles.cancel_all()
    }

    /// Cancels all cancellable calls and waits for a running switch or undo. No call begins as long as the returned value
    /// lives.
    pub async fn stop(&self) -> Stopped<'_> {
        self.cancel_handles.cancel_all();
        Stopped(self.record.lock().await)
    }

    /// Logs a failure and shows it in the status document.
    fn report_failure(&self, error: &Error) {
        self.show_failure(error);
        let diagnosis = self.tracker.pivot_status().diagnose();
        let (class, outcome) = (error.class(), error.outcome().as_str());
        let command = diagnosis.map(|diagnosis| diagnosis.command).unwrap_or_default();
        error!(class, outcome, command, "{error}");
    }

    /// Shows a failure in the status document, with the attempts of a phase that counted them.
    fn show_failure(&self, error: &Error) {
        self.tracker.fail(error.last_error());
    }

    fn save(&self, record: &mut Record) -> Result<(), Error> {
        self.show(record);
        record.save(&self.paths)?;
        state::save_timeline(&self.paths, &self.tracker);
        self.standing.send_replace(Standing::of(record));
        Ok(())
    }

    /// Copies the end of the trial period to the status document, and the document to the record.
    fn show(&self, record: &mut Record) {
        let undo_unix = record.trial.and_then(undo_unix);
        let flow = Some(record.flow());
        self.tracker.update(|status| (status.undo_unix, status.flow) = (undo_unix, flow));
        record.status = self.tracker.pivot_status();
    }
}

/// An agent that begins no more calls.
pub struct Stopped<'a>(MutexGuard<'a, Record>);

impl Stopped<'_> {
    /// Returns true if a switch or an undo is unfinished; the next daemon continues it.
    pub fn is_unfinished(&self) -> bool {
        matches!(self.0.step, Step::Switching(_) | Step::Undoing(_) | Step::Switched(_))
    }
}

/// Shows the failure of an attempt after which the agent died while it waited for the next one. The record is not written
/// between attempts.
fn restore_failure(record: &mut Record, timeline: &Timeline) {
    if record.status.error.is_none()
        && record.step.is_before_switch()
        && let Some(wait) = timeline.last_wait()
    {
        record.status.error = Some(LastError {
            class: wait.name.clone(),
            message: wait.detail.clone().unwrap_or_default(),
            attempt: timeline.waits(),
            ..LastError::default()
        });
    }
}

/// Returns the end of the trial period in seconds since the epoch, or `None` for a switch that is kept.
fn undo_unix(trial: TrialPeriod) -> Option<u64> {
    let at = std::time::SystemTime::now() + trial.left()?;
    at.duration_since(std::time::UNIX_EPOCH).ok().map(|since| since.as_secs())
}
