//! Holds the live [`Status`]: phases change it, all other code watches it.

use node_store::PullProgress;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use tokio::sync::watch;
use tracing::{info, warn};

use super::{LastError, Phase, State, Status, TimelineEntry};

/// A line for the log and the status document.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Remark {
    /// A completed action.
    Done(String),
    /// A condition that needs attention.
    Warning(String),
}

impl Remark {
    /// Logs the line at its level, after `prefix`.
    pub fn log(&self, prefix: &str) {
        match self {
            Self::Done(line) => info!("{prefix}{line}"),
            Self::Warning(line) => warn!("{prefix}{line}"),
        }
    }
}

/// Holds the status document and notifies watchers of changes. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Tracker {
    status: watch::Sender<Status>,
    /// Counters of the running pull, which [`Tracker::status`] copies into the document.
    pub progress: Arc<PullProgress>,
    /// Tracker of work beside the pivot, shown while no phase of the pivot is running.
    beside: Arc<Mutex<Option<Tracker>>>,
    /// For a tracker of work beside the pivot: the pivot's status, whose watchers are notified too.
    main: Option<watch::Sender<Status>>,
}

/// Work beside the pivot. When this value is dropped, the work disappears from the document.
pub struct Beside<'a> {
    main: &'a Tracker,
    own: Tracker,
}

impl Beside<'_> {
    /// Returns the tracker for this work.
    pub fn tracker(&self) -> &Tracker {
        &self.own
    }
}

impl Drop for Beside<'_> {
    fn drop(&mut self) {
        self.main.set_beside(None);
    }
}

impl Tracker {
    /// Creates a tracker with this document, normally the one that the last run recorded.
    pub fn new(status: Status) -> Self {
        Self { status: watch::Sender::new(status), progress: Arc::default(), beside: Arc::default(), main: None }
    }

    /// Begins work beside the pivot, such as a download after the switch. Until the returned value is dropped, the
    /// document shows its phase, its counters and its failures, unless a phase of the pivot runs.
    pub fn beside(&self) -> Beside<'_> {
        let own = Self { main: Some(self.status.clone()), ..Self::new(Status::default()) };
        self.set_beside(Some(own.clone()));
        Beside { main: self, own }
    }

    fn set_beside(&self, tracker: Option<Tracker>) {
        // A poisoned lock means a panic while one value replaced another.
        *self.beside.lock().unwrap_or_else(PoisonError::into_inner) = tracker;
        self.status.send_modify(|_| {});
    }

    /// Returns the current document.
    pub fn status(&self) -> Status {
        let status = self.pivot_status();
        let beside = self.beside.lock().unwrap_or_else(PoisonError::into_inner).clone();
        match beside {
            Some(beside) if !matches!(status.state, State::Running | State::Waiting) => {
                let Status { state, phase, progress, waiting_for, error, .. } = beside.pivot_status();
                if state == State::Idle {
                    status
                } else {
                    Status { state, phase, progress, waiting_for, error, ..status }
                }
            }
            _ => status,
        }
    }

    /// Returns the current document without work beside the pivot.
    pub fn pivot_status(&self) -> Status {
        let mut status = self.status.borrow().clone();
        if status.phase == Some(Phase::Pull) && status.state == State::Running {
            status.progress = self.progress.snapshot();
            status.waiting_for = self.progress.waiting_for();
        }
        status
    }

    /// Returns a receiver that wakes up on each change of the document, but not of the counters.
    pub fn watch(&self) -> watch::Receiver<Status> {
        self.status.subscribe()
    }

    /// Changes the document.
    pub fn update(&self, change: impl FnOnce(&mut Status)) {
        self.status.send_modify(change);
        if let Some(main) = &self.main {
            main.send_modify(|_| {});
        }
    }

    /// Begins a phase and its time. The last failure stays in the document until a phase succeeds, so that a reader can
    /// see why a retry is in progress. A phase that has not ended (a retry, a restart of the daemon) keeps its first
    /// start, so that the timeline shows the whole wait. A phase that has ended gets a new start.
    pub fn begin(&self, phase: Phase) {
        let now = unix_ms();
        self.update(|status| {
            status.state = State::Running;
            status.phase = Some(phase);
            match status.timeline.iter_mut().find(|entry| entry.phase == phase) {
                // The time since its end does not belong to the phase.
                Some(entry) if entry.duration_ms.is_some() => {
                    entry.start_unix_ms = now;
                    entry.duration_ms = None;
                }
                Some(_) => {}
                None => status.timeline.push(TimelineEntry { phase, start_unix_ms: now, duration_ms: None }),
            }
        });
    }

    /// Ends a phase that succeeded and left the system in `state`.
    pub fn end(&self, phase: Phase, state: State) {
        let now = unix_ms();
        self.update(|status| {
            status.state = state;
            status.error = None;
            if phase == Phase::Pull {
                status.progress = self.progress.snapshot();
            }
            if let Some(entry) = status.timeline.iter_mut().find(|entry| entry.phase == phase) {
                entry.duration_ms = Some(now.saturating_sub(entry.start_unix_ms));
            }
        });
    }

    /// Records a failure. The state becomes `Waiting` if another attempt is scheduled, `Failed` otherwise.
    pub fn fail(&self, error: LastError) {
        self.update(|status| {
            status.state = if error.next_retry_unix.is_some() { State::Waiting } else { State::Failed };
            status.error = Some(error);
        });
    }

    /// Resets the document for a pivot to `image`. Only the target stays, because it belongs to the machine and is set
    /// once.
    pub fn restart(&self, image: Option<String>) {
        self.progress.reset();
        self.update(|status| {
            *status = Status { schema: status.schema, target: status.target.take(), image, ..Status::default() };
        });
    }

    /// Logs a line and adds it to the notes. Notes have no levels, so a warning gets a prefix there.
    pub fn remark(&self, remark: &Remark) {
        remark.log("");
        match remark {
            Remark::Done(line) => self.note(line),
            Remark::Warning(line) => self.note(format!("warning: {line}")),
        }
    }

    /// Logs a warning and adds it to the notes.
    pub fn warn(&self, line: impl Into<String>) {
        self.remark(&Remark::Warning(line.into()));
    }

    /// Adds a line to the notes unless they have it.
    pub fn note(&self, line: impl Into<String>) {
        let line = line.into();
        self.update(|status| {
            if !status.notes.contains(&line) {
                status.notes.push(line);
            }
        });
    }
}

/// Returns the time in milliseconds since the epoch.
fn unix_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |elapsed| elapsed.as_millis() as u64)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_retried_phase_keeps_its_first_start() {
        let tracker = Tracker::new(Status::default());
        tracker.begin(Phase::Resolve);
        let start = tracker.status().timeline[0].start_unix_ms;
        tracker.fail(LastError {
            class: "network".into(),
            message: "refused".into(),
            attempt: 1,
            next_retry_unix: Some(1),
            ..LastError::default()
        });
        assert_eq!(tracker.status().state, State::Waiting);
        std::thread::sleep(std::time::Duration::from_millis(5));
        tracker.begin(Phase::Resolve);
        tracker.end(Phase::Resolve, State::Running);
        let status = tracker.status();
        assert_eq!(status.timeline.len(), 1);
        assert_eq!(status.timeline[0].start_unix_ms, start);
        assert!(status.timeline[0].duration_ms.unwrap() >= 5);
        assert_eq!(status.error, None, "a success clears the failure");
    }

    #[test]
    fn a_phase_that_runs_again_gets_a_new_start_and_the_failure_stays() {
        let tracker = Tracker::new(Status::default());
        tracker.begin(Phase::Switch);
        tracker.end(Phase::Switch, State::Running);
        let first = tracker.status().timeline[0].start_unix_ms;
        tracker.fail(LastError { class: "local".into(), ..LastError::default() });
        std::thread::sleep(std::time::Duration::from_millis(5));
        tracker.begin(Phase::Switch);
        let status = tracker.status();
        assert!(status.timeline[0].start_unix_ms > first);
        assert_eq!(status.timeline[0].duration_ms, None);
        assert!(status.error.is_some(), "the failure stays until a success");
    }

    #[test]
    fn a_restart_keeps_the_target_only() {
        let tracker = Tracker::new(Status { target: Some("multi-user.target".into()), ..Status::default() });
        tracker.begin(Phase::Pull);
        PullProgress::add(&tracker.progress.bytes_fetched, 7);
        tracker.note("a note");
        tracker.update(|status| {
            status.digest = Some("sha256:0".into());
            status.commit = Some("0".into());
            status.cost.bytes_fetched = 7;
        });
        tracker.end(Phase::Pull, State::Pulled);
        tracker.restart(Some("quay.io/x/y".into()));
        let expected =
            Status { target: Some("multi-user.target".into()), image: Some("quay.io/x/y".into()), ..Status::default() };
        assert_eq!(tracker.status(), expected);
        assert_eq!(tracker.progress.snapshot().bytes_fetched, 0);
    }

    #[test]
    fn work_beside_the_pivot_is_shown_and_leaves_nothing() {
        let tracker = Tracker::new(Status { state: State::Switched, phase: Some(Phase::Refresh), ..Status::default() });
        let before = tracker.status();
        let mut watch = tracker.watch();
        let beside = tracker.beside();
        beside.tracker().begin(Phase::Pull);
        PullProgress::add(&beside.tracker().progress.bytes_fetched, 7);
        let shown = tracker.status();
        assert_eq!((shown.state, shown.phase, shown.progress.bytes_fetched), (State::Running, Some(Phase::Pull), 7));
        assert!(watch.has_changed().unwrap(), "watchers of the document wake up");
        watch.mark_unchanged();
        assert_eq!(tracker.pivot_status(), before, "the recorded document is unchanged");
        tracker.begin(Phase::Finish);
        assert_eq!(tracker.status().phase, Some(Phase::Finish), "a running phase of the pivot hides other work");
        tracker.end(Phase::Finish, State::Done);
        drop(beside);
        assert_eq!((tracker.status().state, tracker.status().progress.bytes_fetched), (State::Done, 0));
    }

    #[test]
    fn without_another_attempt_the_state_is_failed() {
        let tracker = Tracker::new(Status::default());
        tracker.begin(Phase::Pull);
        tracker.fail(LastError { class: "not-found".into(), message: "no such tag".into(), ..LastError::default() });
        assert_eq!(tracker.status().state, State::Failed);
        assert_eq!(tracker.status().phase, Some(Phase::Pull), "the failed phase stays in the document");
    }
}
