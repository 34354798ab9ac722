//! The one live [`Status`]: phases write it, everybody else watches it.

use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use tokio::sync::watch;

use super::{LastError, Phase, PullProgress, State, Status, TimelineEntry};

/// Holds the status document and tells watchers when it changes. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Tracker {
    status: watch::Sender<Status>,
    /// Counters of the running pull; folded into the document by [`Tracker::status`].
    pub progress: Arc<PullProgress>,
}

impl Tracker {
    /// Starts from a document, normally the one that the last run persisted.
    pub fn new(status: Status) -> Self {
        Self { status: watch::Sender::new(status), progress: Arc::default() }
    }

    /// The document now.
    pub fn status(&self) -> Status {
        let mut status = self.status.borrow().clone();
        if status.phase == Some(Phase::Pull) && status.state == State::Running {
            status.progress = self.progress.snapshot();
        }
        status
    }

    /// Wakes up on every change of the document (not on every counter).
    pub fn watch(&self) -> watch::Receiver<Status> {
        self.status.subscribe()
    }

    /// Changes the document.
    pub fn update(&self, change: impl FnOnce(&mut Status)) {
        self.status.send_modify(change);
    }

    /// A phase begins: the last failure is over, the clock of this phase runs. A phase that begins
    /// again (a retry, a restart of the daemon) keeps its first start, so that the timeline shows
    /// what the machine really waited.
    pub fn begin(&self, phase: Phase) {
        let now = unix_ms();
        self.update(|status| {
            status.state = State::Running;
            status.phase = Some(phase);
            match status.timeline.iter_mut().find(|entry| entry.phase == phase) {
                Some(entry) => entry.duration_ms = None,
                None => status.timeline.push(TimelineEntry { phase, start_unix_ms: now, duration_ms: None }),
            }
        });
    }

    /// A phase ended well and left the system in `state`.
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

    /// A phase failed: `Waiting` when another attempt is scheduled, `Failed` otherwise.
    pub fn fail(&self, error: LastError) {
        self.update(|status| {
            status.state = if error.next_retry_unix.is_some() { State::Waiting } else { State::Failed };
            status.error = Some(error);
        });
    }

    /// Another image is asked for: what was said about the last one goes.
    pub fn restart(&self, image: Option<String>) {
        self.update(|status| {
            let target = status.target.take();
            *status = Status { image, target, ..Status::default() };
        });
    }

    /// Adds a line for the summary, once.
    pub fn note(&self, line: impl Into<String>) {
        let line = line.into();
        self.update(|status| {
            if !status.notes.contains(&line) {
                status.notes.push(line);
            }
        });
    }
}

/// Milliseconds since the epoch.
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
        });
        assert_eq!(tracker.status().state, State::Waiting);
        std::thread::sleep(std::time::Duration::from_millis(5));
        tracker.begin(Phase::Resolve);
        tracker.end(Phase::Resolve, State::Running);
        let status = tracker.status();
        assert_eq!(status.timeline.len(), 1);
        assert_eq!(status.timeline[0].start_unix_ms, start);
        assert!(status.timeline[0].duration_ms.unwrap() >= 5);
        assert_eq!(status.error, None, "a success ends the failure");
    }

    #[test]
    fn without_another_attempt_the_state_is_failed() {
        let tracker = Tracker::new(Status::default());
        tracker.begin(Phase::Pull);
        tracker.fail(LastError {
            class: "not-found".into(),
            message: "no such tag".into(),
            attempt: 1,
            next_retry_unix: None,
        });
        assert_eq!(tracker.status().state, State::Failed);
        assert_eq!(tracker.status().phase, Some(Phase::Pull), "the phase that failed stays named");
    }
}
