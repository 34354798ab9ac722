//! Holds the live [`Status`]: phases change it, all other code watches it.

use node_store::{ProgressSnapshot, PullProgress};
use std::collections::BTreeMap;
use std::fmt::Display;
use std::sync::{Arc, Mutex};

use tokio::sync::watch;
use tracing::{info, warn};

use super::usage::Usage;
use super::{LastError, Phase, SpanResult, State, Status, Subject, Timeline, TimelineEntry, one_line};
use support::clock::{boottime_ms, unix_ms};
use support::lock;

/// Largest number of letters of a message in the timeline.
const DETAIL: usize = 300;

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
    /// Trackers of work beside the pivot. The newest is shown while no phase of the pivot is running.
    beside: Arc<Mutex<Vec<Tracker>>>,
    /// For a tracker of work beside the pivot: the pivot's status, whose watchers are notified too.
    main: Option<watch::Sender<Status>>,
    live: Arc<Mutex<Live>>,
}

/// The timeline, and the measurements of the phases that are under way.
#[derive(Debug, Default)]
struct Live {
    timeline: Timeline,
    usage: BTreeMap<Phase, Usage>,
}

impl Live {
    /// Ends a phase that is under way and has not succeeded, if there is one.
    fn end_unsuccessful(&mut self, phase: Phase, result: SpanResult, detail: Option<String>) {
        let usage = self.usage.remove(&phase).map(Usage::end);
        if let Some(span) = self.timeline.open(Subject::Phase, Some(phase.as_str())) {
            span.end(boottime_ms(), result);
            span.detail = detail;
            (span.cpu_ms, span.peak_memory_bytes) = (usage.map(|usage| usage.0), usage.and_then(|usage| usage.1));
        }
    }
}

/// A span that is under way. If it is dropped without an end, it was interrupted.
pub struct OpenSpan<'a> {
    tracker: &'a Tracker,
    subject: Subject,
    name: String,
    result: SpanResult,
    detail: Option<String>,
}

impl OpenSpan<'_> {
    /// Ends the span, as failed if there is an error.
    pub fn end(mut self, error: Option<&dyn Display>) {
        self.result = if error.is_some() { SpanResult::Failed } else { SpanResult::Done };
        self.detail = error.map(|error| short(&format!("{error:#}")));
    }
}

impl Drop for OpenSpan<'_> {
    fn drop(&mut self) {
        let mut live = lock(&self.tracker.live);
        if let Some(span) = live.timeline.open(self.subject, Some(&self.name)) {
            span.detail = self.detail.take();
        }
        live.timeline.end(self.subject, Some(&self.name), boottime_ms(), self.result);
    }
}

/// Returns the begin of a message as one line.
fn short(message: &str) -> String {
    one_line(message).chars().take(DETAIL).collect()
}

/// A phase beside the pivot. When this value is dropped, it disappears from the document and ends in the timeline.
pub struct Beside<'a> {
    phase: Phase,
    main: &'a Tracker,
    own: Tracker,
}

impl Beside<'_> {
    /// Returns the tracker for this work.
    pub fn tracker(&self) -> &Tracker {
        &self.own
    }

    /// Ends the phase, as failed if there is an error.
    pub fn end(self, error: Option<&dyn Display>) {
        // Before the phase ends, so that the document does not show a state between the two.
        self.main.remove_beside(&self.own);
        match error {
            None => self.own.end_span(self.phase),
            Some(error) => self.own.end_early(self.phase, SpanResult::Failed, Some(short(&format!("{error:#}")))),
        }
    }
}

impl Drop for Beside<'_> {
    fn drop(&mut self) {
        self.main.remove_beside(&self.own);
        self.own.end_early(self.phase, SpanResult::Interrupted, None);
    }
}

impl Tracker {
    /// Creates a tracker with this document, normally the one that the last run recorded.
    pub fn new(status: Status) -> Self {
        let (progress, beside, live) = (Arc::default(), Arc::default(), Arc::default());
        Self { status: watch::Sender::new(status), progress, beside, main: None, live }
    }

    /// Continues the timeline of the last run, whose spans have ended by now.
    pub fn with_timeline(self, mut timeline: Timeline) -> Self {
        timeline.interrupt(boottime_ms());
        lock(&self.live).timeline = timeline;
        self
    }

    /// Returns the timeline up to now.
    pub fn timeline(&self) -> Timeline {
        let mut timeline = lock(&self.live).timeline.clone();
        timeline.add_layers(self.progress.reads());
        timeline
    }

    /// Begins a span of the timeline.
    pub fn span(&self, subject: Subject, name: impl Into<String>) -> OpenSpan<'_> {
        let name = name.into();
        lock(&self.live).timeline.begin(subject, name.clone(), boottime_ms());
        OpenSpan { tracker: self, subject, name, result: SpanResult::Interrupted, detail: None }
    }

    /// Does `work` as a span of the timeline.
    pub async fn timed<T, E: Display>(
        &self,
        subject: Subject,
        name: impl Into<String>,
        work: impl Future<Output = Result<T, E>>,
    ) -> Result<T, E> {
        let span = self.span(subject, name);
        let outcome = work.await;
        span.end(outcome.as_ref().err().map(|error| error as &dyn Display));
        outcome
    }

    /// Begins a phase beside the pivot: a pull that completes the node store after staging, or a deployment. Until the
    /// returned value is dropped, the document shows it with its progress and its failures, unless a phase of the pivot runs.
    pub fn beside(&self, phase: Phase) -> Beside<'_> {
        let (main, live) = (Some(self.status.clone()), self.live.clone());
        let own = Self { main, live, ..Self::new(Status::default()) };
        self.change_beside(|beside| beside.push(own.clone()));
        Beside { phase, main: self, own }
    }

    fn remove_beside(&self, own: &Tracker) {
        self.change_beside(|beside| beside.retain(|tracker| !tracker.status.same_channel(&own.status)));
    }

    fn change_beside(&self, change: impl FnOnce(&mut Vec<Tracker>)) {
        change(&mut lock(&self.beside));
        self.status.send_modify(|_| {});
    }

    /// Returns the current document.
    pub fn status(&self) -> Status {
        let status = self.pivot_status();
        let beside = lock(&self.beside).last().cloned();
        match beside {
            Some(beside) if !matches!(status.state, State::Running | State::Waiting) => {
                let Status { state, phase, percent, progress, waiting_for, error, .. } = beside.pivot_status();
                if state == State::Idle {
                    status
                } else {
                    Status { state, phase, percent, progress, waiting_for, error, ..status }
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
        self.begin_span(phase);
        let now = unix_ms();
        self.update(|status| {
            status.state = State::Running;
            (status.phase, status.percent) = (Some(phase), None);
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

    /// Sets the share of the running phase that is done. `done` of `total` parts are a share of what `from` percent leave.
    pub fn share(&self, from: u8, done: usize, total: usize) {
        let rest = 100 - usize::from(from.min(100));
        let percent = 100 - rest + (rest * done).checked_div(total).unwrap_or(rest);
        self.update(|status| status.percent = u8::try_from(percent).ok());
    }

    /// Ends a phase that succeeded and left the system in `state`.
    pub fn end(&self, phase: Phase, state: State) {
        self.end_span(phase);
        let now = unix_ms();
        self.update(|status| {
            status.state = state;
            (status.error, status.percent) = (None, None);
            if phase == Phase::Pull {
                // Nothing is fetched any more.
                status.progress = ProgressSnapshot { bytes_per_second: 0, ..self.progress.snapshot() };
            }
            if let Some(entry) = status.timeline.iter_mut().find(|entry| entry.phase == phase) {
                entry.duration_ms = Some(now.saturating_sub(entry.start_unix_ms));
            }
        });
    }

    /// Records a failure, by default as the first one now. The state becomes `Waiting` if another attempt is scheduled, `Failed` otherwise.
    pub fn fail(&self, mut error: LastError) {
        error.since_unix.get_or_insert(unix_ms() / 1000);
        self.fail_span(&error);
        self.update(|status| {
            status.state = if error.next_retry_unix.is_some() { State::Waiting } else { State::Failed };
            (status.error, status.percent) = (Some(error), None);
        });
    }

    /// Resets the document for a pivot to `image`. Only the target stays, because it belongs to the machine and is set
    /// once.
    pub fn restart(&self, image: Option<String>) {
        self.progress.reset();
        self.progress.take_reads();
        let mut live = lock(&self.live);
        live.timeline.restart();
        live.usage.clear();
        drop(live);
        self.update(|status| {
            *status = Status {
                schema: status.schema,
                target: status.target.take(),
                flow: status.flow,
                image,
                ..Status::default()
            };
        });
    }

    /// A phase that is under way continues: another attempt of it begins.
    fn begin_span(&self, phase: Phase) {
        let (mut live, now) = (lock(&self.live), boottime_ms());
        live.timeline.end(Subject::Wait, None, now, SpanResult::Done);
        if live.timeline.open(Subject::Phase, Some(phase.as_str())).is_none() {
            live.timeline.begin(Subject::Phase, phase.as_str(), now);
            live.usage.insert(phase, Usage::begin());
        }
    }

    fn end_span(&self, phase: Phase) {
        let mut live = lock(&self.live);
        live.timeline.add_layers(self.progress.take_reads());
        let usage = live.usage.remove(&phase);
        let ended = live.timeline.extend(Subject::Phase, phase.as_str(), boottime_ms(), SpanResult::Done);
        let Some(span) = ended else { return };
        if let Some(usage) = usage {
            let (cpu_ms, peak) = usage.end();
            (span.cpu_ms, span.peak_memory_bytes) = (Some(cpu_ms), peak);
        }
        if phase == Phase::Pull {
            span.bytes = Some(self.progress.snapshot().bytes_fetched);
        }
    }

    fn fail_span(&self, error: &LastError) {
        let phase = self.status.borrow().phase;
        let (mut live, now) = (lock(&self.live), boottime_ms());
        live.timeline.add_layers(self.progress.take_reads());
        live.timeline.end(Subject::Wait, None, now, SpanResult::Interrupted);
        let detail = Some(short(&error.message));
        if error.next_retry_unix.is_some() {
            live.timeline.begin(Subject::Wait, error.class.clone(), now);
            if let Some(wait) = live.timeline.open(Subject::Wait, None) {
                wait.detail = detail;
            }
            return;
        }
        if let Some(phase) = phase {
            live.end_unsuccessful(phase, SpanResult::Failed, detail);
        }
    }

    /// Ends a phase that has not succeeded and its wait, if it is under way.
    fn end_early(&self, phase: Phase, result: SpanResult, detail: Option<String>) {
        let mut live = lock(&self.live);
        live.timeline.add_layers(self.progress.take_reads());
        if live.timeline.open(Subject::Phase, Some(phase.as_str())).is_some() {
            live.timeline.end(Subject::Wait, None, boottime_ms(), SpanResult::Interrupted);
            live.end_unsuccessful(phase, result, detail);
        }
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

    /// Adds each line as a warning.
    pub fn warn_all(&self, lines: impl IntoIterator<Item: Into<String>>) {
        lines.into_iter().for_each(|line| self.warn(line));
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

#[cfg(test)]
#[path = "tracker_tests.rs"]
mod tests;
