//! Makes a call to the daemon and shows its progress: on the terminal or console, and in `systemctl status`.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::Result;
use libsystemd::daemon::{NotifyState, notify};
use tokio::signal::unix::{SignalKind, signal};

use super::pauses::Pauses;
use super::show::recorded;
use super::{case, say};
use crate::agent::StateDir;
use crate::bus::{CallError, Client};
use crate::report::{self, Outcome, Phase, Report, ServiceRecord, State, Status};
use node_store::ProgressSnapshot;
use support::clock::{boottime_ms, unix_ms};

/// Interval at which the status is read.
pub(super) const POLL: Duration = Duration::from_millis(500);
/// Time to wait for a daemon that disconnected; its unit restarts it.
const RECONNECT: Duration = Duration::from_secs(60);

/// Time that progress adds to a limit of the unit, so that a configured `TimeoutStartSec=` ends only a download that stands still.
const PROGRESS: Duration = Duration::from_secs(120);

/// A method of the daemon with its arguments.
#[derive(Debug, Clone)]
pub(super) enum Call {
    /// A method without arguments.
    Plain(&'static str),
    /// `Try` with the length of the trial period in seconds.
    Try(u64),
    /// `Deploy` with the sysroot, the stateroot, kernel arguments, and the image that updates follow or nothing.
    Deploy(String, String, Vec<String>, String),
}

impl Call {
    async fn make(&self, client: &Client) -> Result<Vec<String>, CallError> {
        match self {
            Self::Plain(method) => client.call(method).await,
            Self::Try(seconds) => client.call_with("Try", seconds).await,
            Self::Deploy(sysroot, stateroot, args, imgref) => {
                client.call_with("Deploy", &(sysroot, stateroot, args, imgref)).await
            }
        }
    }
}

/// Parses a duration of the command line to seconds: `90`, `90s`, `10m`, `2h`; not 0.
pub(super) fn seconds(text: &str) -> Result<u64, String> {
    let digits = text.find(|character: char| !character.is_ascii_digit()).unwrap_or(text.len());
    let factor = match &text[digits..] {
        "" | "s" => Some(1),
        "m" | "min" => Some(60),
        "h" => Some(3600),
        _ => None,
    };
    let number = text[..digits].parse::<u64>().ok().filter(|number| *number > 0);
    number.zip(factor).and_then(|(number, factor)| number.checked_mul(factor)).ok_or_else(|| {
        "invalid duration: expected seconds, or a number with the suffix s, m or h, for example 10m".to_owned()
    })
}

/// Makes `call` and waits for its end. If the daemon dies, its unit restarts it with its record, and the call is repeated.
///
/// In a unit of the agent, SIGTERM cancels the call.
pub(super) async fn drive(paths: &StateDir, call: Call) -> Result<Outcome> {
    let Some(unit) = own_unit() else { return Ok(drive_reported(paths, call, &mut Reporter::default()).await) };
    let mut reporter = Reporter { record: record(&unit), ..Reporter::default() };
    let mut stop = signal(SignalKind::terminate())?;
    let flow = client_status(paths).await.and_then(|status| status.flow);
    case::begin(&unit, flow).await;
    tokio::select! {
        outcome = drive_reported(paths, call, &mut reporter) => {
            case::end(&unit, outcome, client_report(paths).await.as_ref());
            Ok(outcome)
        }
        // The connection is closed, so the daemon cancels the call.
        _ = stop.recv() => {
            reporter.end_record(Some("the unit was stopped"));
            case::end(&unit, Outcome::Cancelled, None);
            Ok(Outcome::Cancelled)
        }
    }
}

async fn drive_reported(paths: &StateDir, call: Call, reporter: &mut Reporter) -> Outcome {
    let error = match drive_to_end(paths, call, reporter).await {
        Ok((status, lines)) => {
            reporter.end(&status, &lines);
            reporter.end_record(None);
            return Outcome::Done;
        }
        Err(error) => error,
    };
    let status = client_status(paths).await;
    // The status is about another call if this one was refused.
    let diagnosis = status.as_ref().and_then(Status::diagnose).filter(|known| known.outcome == Some(error.outcome()));
    let Some(diagnosis) = diagnosis else {
        reporter.end_record(Some(&error.to_string()));
        return failed(&error);
    };
    let line = diagnosis.line(unix_now());
    // A call may fail before its first status arrives.
    status.iter().for_each(|status| reporter.update_record(status));
    // Only stdout of a unit goes to the console. The journal also gets the whole message.
    if say::is_journal() {
        say::progress(&diagnosis.rows(unix_now()));
    }
    reporter.end_record(Some(&line));
    let outcome = failed(&error);
    say::error(&diagnosis.advice());
    let _ = notify(false, &[NotifyState::Status(line)]);
    outcome
}

/// Returns the status after the call, and the lines of its answer.
pub(super) async fn drive_to_end(
    paths: &StateDir,
    call: Call,
    reporter: &mut Reporter,
) -> Result<(Status, Vec<String>), CallError> {
    let socket = paths.socket();
    let mut broken_since = None;
    let mut client = Client::connect_or_start(&socket).await?;
    loop {
        match follow(&client, &call, reporter, &mut broken_since).await {
            // The daemon may have ended after its answer, to be replaced by another version.
            Ok(lines) => {
                let status = client.status().await.ok().or_else(|| recorded(paths));
                return Ok((status.unwrap_or_default(), lines));
            }
            // A daemon that accepts calls but never answers counts as disconnected, too.
            Err(error @ CallError::Disconnected(_))
                if broken_since.get_or_insert_with(Instant::now).elapsed() < RECONNECT =>
            {
                say::error(&format!("{error}; waiting for the daemon to restart"));
                client = Client::reconnect(&socket, RECONNECT).await?;
            }
            Err(error) => return Err(error),
        }
    }
}

/// Asks the daemon for its status after a call.
pub(super) async fn client_status(paths: &StateDir) -> Option<Status> {
    Client::running(&paths.socket()).await.ok()??.status().await.ok()
}

/// Asks the daemon for its report after a call.
async fn client_report(paths: &StateDir) -> Option<Report> {
    let text = Client::running(&paths.socket()).await.ok()??.report().await.ok()?;
    serde_json::from_str(&text).ok()
}

/// Returns the unit of the agent in which this process runs.
fn own_unit() -> Option<String> {
    let cgroup = std::fs::read_to_string("/proc/self/cgroup").ok()?;
    report::unit_of(&cgroup).filter(|unit| unit.starts_with("node-image-")).map(str::to_owned)
}

/// Begins the service record of a unit.
fn record(unit: &str) -> Option<ServiceRecord> {
    ServiceRecord::begin(Path::new("/"), unit).unwrap_or_else(|error| {
        say::error(&format!("cannot begin the service record: {error:#}"));
        None
    })
}

/// Makes one call and shows the status until it ends.
async fn follow(
    client: &Client,
    call: &Call,
    reporter: &mut Reporter,
    broken_since: &mut Option<Instant>,
) -> Result<Vec<String>, CallError> {
    if let Ok(status) = client.status().await {
        if let Some(line) = report::waiting_line(&status, unix_now()) {
            say::error(&line);
        }
        reporter.begin(&status);
    }
    let look = |status: &Status| {
        *broken_since = None;
        reporter.update(status);
    };
    watched(client, call.make(client), look).await
}

/// Waits for the end of a call, and meanwhile passes the status to `look`.
pub(super) async fn watched<T>(client: &Client, call: impl Future<Output = T>, mut look: impl FnMut(&Status)) -> T {
    tokio::pin!(call);
    loop {
        tokio::select! {
            outcome = &mut call => return outcome,
            () = tokio::time::sleep(POLL) => {
                if let Ok(status) = client.status().await {
                    look(&status);
                }
            }
        }
    }
}

/// Shows a failure in `systemctl status` and on stderr. Returns its outcome.
pub(super) fn failed(error: &CallError) -> Outcome {
    let message = error.to_string();
    let _ = notify(false, &[NotifyState::Status(report::one_line(&message))]);
    say::error(&message);
    error.outcome()
}

/// Shows each change of the status once.
#[derive(Default)]
pub(super) struct Reporter {
    /// The document before the call.
    before: Option<Status>,
    /// Phase, state and attempt of the last line.
    last: Option<(Option<Phase>, State, u32)>,
    /// Phase, state and counters of the last document.
    seen: Option<(Option<Phase>, State, ProgressSnapshot)>,
    /// Tenths of the pull in the last line.
    tenths: u64,
    pauses: Pauses,
    /// Service record for the installer's log gathering.
    record: Option<ServiceRecord>,
    /// Writes nothing to stdout.
    silent: bool,
}

impl Reporter {
    /// Returns a reporter that writes nothing to stdout.
    pub(super) fn silent() -> Self {
        Self { silent: true, ..Self::default() }
    }

    fn begin(&mut self, status: &Status) {
        self.before.get_or_insert_with(|| status.clone());
        self.update_record(status);
    }

    /// Updates the service record, and gives up on it after a failure.
    fn update_record(&mut self, status: &Status) {
        if let Some(record) = &mut self.record
            && let Err(error) = record.update(status)
        {
            say::error(&format!("cannot append to the service record, giving up on it: {error:#}"));
            self.record = None;
        }
    }

    fn end_record(&mut self, failure: Option<&str>) {
        if let Some(Err(error)) = self.record.take().map(|record| record.end(failure)) {
            say::error(&format!("cannot complete the service record: {error:#}"));
        }
    }

    fn update(&mut self, status: &Status) {
        // Until the call begins, the status is that of an earlier one. Its own failure is recorded after its end.
        if status.state != State::Failed {
            self.update_record(status);
        }
        let now = unix_now();
        // For `systemctl status`.
        let mut states = vec![NotifyState::Status(report::status_line(status, now))];
        if self.advances(status) {
            states.push(NotifyState::Other(format!("EXTEND_TIMEOUT_USEC={}", PROGRESS.as_micros())));
        }
        let _ = notify(false, &states);
        if let Some(line) = self.changed(status, now, uptime()).filter(|_| !self.silent) {
            say::progress(&line);
        }
    }

    /// Returns true if the phase or a counter of the pull has changed, or if a phase runs that needs no network: its parts
    /// have their own limits.
    fn advances(&mut self, status: &Status) -> bool {
        let seen = Some((status.phase, status.state, status.progress));
        let is_local = status.state == State::Running && !matches!(status.phase, Some(Phase::Resolve | Phase::Pull));
        std::mem::replace(&mut self.seen, seen) != seen || is_local
    }

    /// Returns the line to print if phase, state, attempt or a tenth of the pull changed, and no pause prevents it.
    /// `now` is for the text, `uptime` for the pauses.
    fn changed(&mut self, status: &Status, now: u64, uptime: u64) -> Option<String> {
        let line = report::state_line(status, now);
        let attempt = status.error.as_ref().map_or(0, |error| error.attempt);
        let key = (status.phase, status.state, attempt);
        if self.last != Some(key) {
            (self.last, self.tenths) = (Some(key), 0);
            return match status.diagnose() {
                Some(waits) => self.pauses.failure_is_due(&waits.class, uptime).then(|| waits.rows(now)),
                // Another attempt of a failure that was reported.
                None if attempt > 0 => None,
                None => Some(line),
            };
        }
        if (status.phase, status.state) == (Some(Phase::Pull), State::Running) && status.progress.bytes_total > 0 {
            let tenths = status.progress.bytes_fetched * 10 / status.progress.bytes_total;
            // The total may grow, so that the share becomes smaller.
            if tenths > self.tenths && self.pauses.progress_is_due(uptime) {
                self.tenths = tenths;
                return Some(line);
            }
        }
        None
    }

    fn end(&mut self, status: &Status, lines: &[String]) {
        self.update_record(status);
        for line in lines {
            say::out(report::one_line(line));
        }
        let line = self.last_line(status);
        let _ = notify(false, &[NotifyState::Status(line.clone())]);
        say::progress(&line);
    }

    /// Returns the last line, with `nothing to do` in front if the call changed nothing.
    fn last_line(&self, status: &Status) -> String {
        let line = report::state_line(status, unix_now());
        match &self.before {
            Some(before) if before == status && status.state != State::NothingToDo => format!("nothing to do: {line}"),
            _ => line,
        }
    }
}

/// Returns the time in seconds since the epoch.
pub(super) fn unix_now() -> u64 {
    unix_ms() / 1000
}

/// Returns the seconds since the boot: a clock that cannot be set, for pauses.
pub(super) fn uptime() -> u64 {
    boottime_ms() / 1000
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::report::LastError;

    #[test]
    fn a_call_that_changes_nothing_says_so() {
        let done = Status { state: State::Done, ..Status::default() };
        let mut reporter = Reporter::default();
        reporter.begin(&Status::default());
        assert_eq!(reporter.last_line(&done), "the pivot is done");
        let mut reporter = Reporter::default();
        reporter.begin(&done);
        assert_eq!(reporter.last_line(&done), "nothing to do: the pivot is done");
        let nothing = Status { state: State::NothingToDo, ..Status::default() };
        let mut reporter = Reporter::default();
        reporter.begin(&nothing);
        assert_eq!(reporter.last_line(&nothing).matches("nothing to do").count(), 1);
    }

    #[test]
    fn durations_are_parsed() {
        for (text, expected) in [("90", 90), ("90s", 90), ("10m", 600), ("10min", 600), ("2h", 7200)] {
            assert_eq!(seconds(text), Ok(expected), "{text}");
        }
        for text in ["", "0", "0m", "m", "-1", "10 m", "1d", "1m30s", "99999999999999999999", "18446744073709551615h"] {
            assert!(seconds(text).is_err(), "{text}");
        }
    }

    #[test]
    fn only_progress_extends_the_limit_of_the_unit() {
        let mut reporter = Reporter::default();
        let mut status = Status { state: State::Running, phase: Some(Phase::Pull), ..Status::default() };
        assert!(reporter.advances(&status));
        assert!(!reporter.advances(&status));
        status.progress.bytes_fetched = 1;
        assert!(reporter.advances(&status));
        status.notes.push("a note".into());
        assert!(!reporter.advances(&status));
        for (phase, state, expected) in [
            (Phase::Stage, State::Running, true),
            (Phase::Stage, State::Waiting, false),
            (Phase::Resolve, State::Running, false),
        ] {
            (status.phase, status.state) = (Some(phase), state);
            reporter.advances(&status);
            assert_eq!(reporter.advances(&status), expected, "{phase:?}");
        }
    }

    #[test]
    fn each_change_is_shown_once() {
        let mut reporter = Reporter::default();
        let mut status = Status { state: State::Running, phase: Some(Phase::Pull), ..Status::default() };
        assert!(reporter.changed(&status, 0, 0).is_some());
        assert!(reporter.changed(&status, 0, 0).is_none());
        status.progress.layers_done = 1;
        status.progress.bytes_total = 100;
        status.progress.bytes_fetched = 5;
        assert!(reporter.changed(&status, 0, 1).is_none(), "not yet a tenth");
        status.progress.bytes_fetched = 10;
        assert!(reporter.changed(&status, 0, 2).is_some());
        status.progress.bytes_fetched = 20;
        assert!(reporter.changed(&status, 0, 3).is_none(), "too early");
        // Each of 500 layers changes the total.
        for layer in 0..500 {
            status.progress.layers_done = layer;
            status.progress.bytes_total = 200 + 1_000 * (layer % 2);
            assert!(reporter.changed(&status, 0, 1_000 + 60 * layer).is_none(), "not a line for each layer");
        }
        status.state = State::Waiting;
        status.error =
            Some(LastError { class: "network".into(), attempt: 1, next_retry_unix: Some(1), ..LastError::default() });
        let line = reporter.changed(&status, 10, 10).unwrap();
        assert!(line.ends_with("attempt 1 failed, next in 0 s"), "{line}");
        assert!(reporter.changed(&status, 0, 11).is_none(), "a countdown is not a change");
        status.error.as_mut().unwrap().attempt = 2;
        assert!(reporter.changed(&status, 0, 12).is_none(), "the next failure comes within the pause");
        status.state = State::Running;
        assert!(reporter.changed(&status, 0, 40).is_none(), "another attempt begins");
        (status.state, status.error.as_mut().unwrap().attempt) = (State::Waiting, 3);
        assert!(reporter.changed(&status, 0, 41).is_some(), "the pause is over");
    }

    #[test]
    fn a_clock_that_is_set_back_does_not_make_pauses_longer() {
        let mut reporter = Reporter::default();
        let error = LastError { class: "network".into(), attempt: 1, ..LastError::default() };
        let mut status = Status { state: State::Waiting, error: Some(error), ..Status::default() };
        assert!(reporter.changed(&status, 9 * 3600, 100).is_some());
        status.error.as_mut().unwrap().attempt = 2;
        assert!(reporter.changed(&status, 60, 160).is_some());
    }
}
