//! Asking the daemon for something and telling how it goes until it ends: on the terminal, on the
//! console through the unit, and in `systemctl status`.

use std::path::Path;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::Result;
use libsystemd::daemon::{NotifyState, notify};

use super::say;
use crate::agent::Paths;
use crate::bus::{CallError, Client};
use crate::report::{self, Outcome, Phase, ServiceRecord, State, Status};

/// How often the status is looked at.
pub(super) const POLL: Duration = Duration::from_millis(500);
/// A daemon that went away is waited for this long; its unit restarts it.
const RECONNECT: Duration = Duration::from_secs(60);

/// A method of the daemon, and its argument if it has one.
#[derive(Debug, Clone, Copy)]
pub(super) struct Call {
    pub(super) method: &'static str,
    pub(super) seconds: Option<u64>,
}

impl Call {
    pub(super) fn of(method: &'static str) -> Self {
        Self { method, seconds: None }
    }

    async fn make(self, client: &Client) -> Result<Vec<String>, CallError> {
        match self.seconds {
            Some(seconds) => client.call_with(self.method, &seconds).await,
            None => client.call(self.method).await,
        }
    }
}

/// A length of time from the command line, in seconds: `90`, `90s`, `10m`, `2h`; not 0.
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

/// Makes `call` and waits for its end. The daemon may die in the middle: its unit starts it again,
/// it takes up its record, and the same call goes on.
pub(super) async fn drive(paths: &Paths, call: Call) -> Result<Outcome> {
    let mut teller = Teller { record: record(), ..Teller::default() };
    let outcome = drive_to_end(paths, call, &mut teller).await;
    teller.end_record(outcome.as_ref().err());
    Ok(match outcome {
        Ok(()) => Outcome::Done,
        Err(error) => failed(&error),
    })
}

async fn drive_to_end(paths: &Paths, call: Call, teller: &mut Teller) -> Result<(), CallError> {
    let socket = paths.socket();
    let mut broken_since = None;
    let mut client = Client::connect_or_start(&socket).await?;
    loop {
        match follow(&client, call, teller, &mut broken_since).await {
            Ok(lines) => {
                let status = client.status().await.unwrap_or_default();
                teller.end(&status, &lines);
                return Ok(());
            }
            // A daemon that takes calls and never answers one is given up like one that is away.
            Err(error @ CallError::Disconnected(_))
                if broken_since.get_or_insert_with(Instant::now).elapsed() < RECONNECT =>
            {
                say::error(&format!("{error}; waiting for it to come back"));
                client = Client::reconnect(&socket, RECONNECT).await?;
            }
            Err(error) => return Err(error),
        }
    }
}

/// The service record of the unit that we run as; a person's call has none.
fn record() -> Option<ServiceRecord> {
    let cgroup = std::fs::read_to_string("/proc/self/cgroup").ok()?;
    let unit = report::unit_of(&cgroup).filter(|unit| unit.starts_with("node-image-"))?;
    ServiceRecord::begin(Path::new("/"), unit).unwrap_or_else(|error| {
        say::error(&format!("no service record: {error:#}"));
        None
    })
}

/// One call, with the status told while it lasts.
async fn follow(
    client: &Client,
    call: Call,
    teller: &mut Teller,
    broken_since: &mut Option<Instant>,
) -> Result<Vec<String>, CallError> {
    if let Ok(status) = client.status().await {
        if let Some(line) = report::waiting_line(&status, unix_now()) {
            say::error(&line);
        }
        teller.begin(&status);
    }
    let call = call.make(client);
    tokio::pin!(call);
    loop {
        tokio::select! {
            outcome = &mut call => return outcome,
            () = tokio::time::sleep(POLL) => {
                if let Ok(status) = client.status().await {
                    *broken_since = None;
                    teller.tell(&status);
                }
            }
        }
    }
}

/// Ends a pull that runs or waits. A daemon that does not run has none, and is not started to say so.
pub(super) async fn cancel(paths: &Paths) -> Result<Outcome> {
    let outcome = match Client::running(&paths.socket()).await {
        Ok(Some(client)) => client.call("Cancel").await,
        Ok(None) => Ok(Vec::new()),
        Err(error) => Err(error),
    };
    match outcome {
        Ok(lines) if lines.is_empty() => say::out("nothing was running"),
        Ok(lines) => lines.iter().for_each(|line| say::out(report::one_line(line))),
        Err(error) => return Ok(failed(&error)),
    }
    Ok(Outcome::Done)
}

/// Tells systemd and the person why, and says how to exit.
pub(super) fn failed(error: &CallError) -> Outcome {
    let message = error.to_string();
    let _ = notify(false, &[NotifyState::Status(report::one_line(&message))]);
    say::error(&message);
    error.outcome()
}

/// Says what is new, once.
#[derive(Default)]
struct Teller {
    /// The document before the call.
    before: Option<Status>,
    /// Told last, so that nothing is told twice.
    last: Option<(Option<Phase>, State, u32)>,
    /// Tenths of the pull that were told.
    tenths: u64,
    /// What a log gathering collects.
    record: Option<ServiceRecord>,
}

impl Teller {
    fn begin(&mut self, status: &Status) {
        self.before.get_or_insert_with(|| status.clone());
        self.put_on_record(status);
    }

    /// A record that cannot be written is given up.
    fn put_on_record(&mut self, status: &Status) {
        if let Some(record) = &mut self.record
            && let Err(error) = record.tell(status)
        {
            say::error(&format!("the service record ends here: {error:#}"));
            self.record = None;
        }
    }

    fn end_record(&mut self, failure: Option<&CallError>) {
        let failure = failure.map(ToString::to_string);
        if let Some(Err(error)) = self.record.take().map(|record| record.end(failure.as_deref())) {
            say::error(&format!("the service record is not complete: {error:#}"));
        }
    }

    fn tell(&mut self, status: &Status) {
        self.put_on_record(status);
        let line = report::state_line(status, unix_now());
        // `systemctl status` shows the last line that was sent.
        let _ = notify(false, &[NotifyState::Status(line.clone())]);
        if let Some(line) = self.news(status, &line) {
            say::news(&line);
        }
    }

    /// The line to print, if something changed that a person at the console wants to know.
    fn news(&mut self, status: &Status, line: &str) -> Option<String> {
        let attempt = status.error.as_ref().map_or(0, |error| error.attempt);
        let key = (status.phase, status.state, attempt);
        if self.last != Some(key) {
            self.last = Some(key);
            return Some(line.to_owned());
        }
        if status.phase == Some(Phase::Pull) && status.progress.bytes_total > 0 {
            let tenths = status.progress.bytes_fetched * 10 / status.progress.bytes_total;
            if tenths != self.tenths {
                self.tenths = tenths;
                return Some(line.to_owned());
            }
        }
        None
    }

    fn end(&mut self, status: &Status, lines: &[String]) {
        self.put_on_record(status);
        for line in lines {
            say::out(report::one_line(line));
        }
        let line = self.last_line(status);
        let _ = notify(false, &[NotifyState::Status(line.clone())]);
        say::news(&line);
    }

    /// A call that found everything done says so.
    fn last_line(&self, status: &Status) -> String {
        let line = report::state_line(status, unix_now());
        match &self.before {
            Some(before) if before == status && status.state != State::NothingToDo => format!("nothing to do: {line}"),
            _ => line,
        }
    }
}

/// Seconds since the epoch.
pub(super) fn unix_now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::report::LastError;

    #[test]
    fn a_call_that_changes_nothing_says_so() {
        let done = Status { state: State::Done, ..Status::default() };
        let mut teller = Teller::default();
        teller.begin(&Status::default());
        assert_eq!(teller.last_line(&done), "the pivot is done");
        let mut teller = Teller::default();
        teller.begin(&done);
        assert_eq!(teller.last_line(&done), "nothing to do: the pivot is done");
        let nothing = Status { state: State::NothingToDo, ..Status::default() };
        let mut teller = Teller::default();
        teller.begin(&nothing);
        assert_eq!(teller.last_line(&nothing).matches("nothing to do").count(), 1);
    }

    #[test]
    fn lengths_of_time() {
        for (text, expected) in [("90", 90), ("90s", 90), ("10m", 600), ("10min", 600), ("2h", 7200)] {
            assert_eq!(seconds(text), Ok(expected), "{text}");
        }
        for text in ["", "0", "0m", "m", "-1", "10 m", "1d", "1m30s", "99999999999999999999", "18446744073709551615h"] {
            assert!(seconds(text).is_err(), "{text}");
        }
    }

    #[test]
    fn news_are_told_once() {
        let mut teller = Teller::default();
        let mut status = Status { state: State::Running, phase: Some(Phase::Pull), ..Status::default() };
        assert!(teller.news(&status, "x").is_some());
        assert!(teller.news(&status, "x").is_none());
        status.progress.layers_done = 1;
        status.progress.bytes_total = 100;
        status.progress.bytes_fetched = 5;
        assert!(teller.news(&status, "x").is_none(), "not yet a tenth");
        status.progress.bytes_fetched = 10;
        assert!(teller.news(&status, "x").is_some());
        status.state = State::Waiting;
        status.error =
            Some(LastError { class: "network".into(), attempt: 1, next_retry_unix: Some(1), ..LastError::default() });
        assert!(teller.news(&status, "x").is_some());
        assert!(teller.news(&status, "x").is_none(), "a countdown is not news");
        status.error.as_mut().unwrap().attempt = 2;
        assert!(teller.news(&status, "x").is_some(), "the next failure is");
    }
}
