//! `status` and `report`: show the status document of the daemon, or of the record if no daemon answers on the socket or the
//! system bus.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};

use super::drive::unix_now;
use super::say;
use crate::agent::{Agent, StateDir};
use crate::bus::Client;
use crate::report::{self, Outcome, Report, State, Status};

/// Interval at which a watch reads the status.
const LOOK: Duration = Duration::from_secs(1);
/// Time to wait for a daemon that does not answer.
const ABSENT: Duration = Duration::from_secs(60);

async fn current(paths: &StateDir) -> Result<Status> {
    match asked(paths).await {
        Ok(status) => Ok(status),
        // Only root can read the record; other users get the daemon's error.
        Err(error) => recorded(paths).ok_or(error),
    }
}

/// Asks the daemon for its status.
async fn asked(paths: &StateDir) -> Result<Status> {
    Client::connect(&paths.socket()).await?.status().await
}

fn recorded(paths: &StateDir) -> Option<Status> {
    is_root().then(|| Agent::recorded_status(paths))
}

fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

pub(super) async fn status(paths: &StateDir, json: bool) -> Result<Outcome> {
    print(&current(paths).await?, json)?;
    Ok(Outcome::Done)
}

pub(super) async fn report(paths: &StateDir, json: bool, svg: Option<&Path>) -> Result<Outcome> {
    let text = match reported(paths).await {
        Ok(text) => text,
        Err(error) if !is_root() => return Err(error),
        Err(_) => serde_json::to_string(&Agent::recorded_report(paths))?,
    };
    if json {
        // A field of a newer agent is printed, too.
        say::out(text);
        return Ok(Outcome::Done);
    }
    let report: Report = serde_json::from_str(&text).context("cannot read the agent's report")?;
    match svg {
        Some(file) if file == Path::new("-") => say::raw(report::plot(&report).as_bytes()),
        Some(file) => {
            std::fs::write(file, report::plot(&report)).with_context(|| format!("cannot write {}", file.display()))?;
        }
        None => say::raw(report::summary(&report).as_bytes()),
    }
    Ok(Outcome::Done)
}

/// Asks the daemon for its report.
async fn reported(paths: &StateDir) -> Result<String> {
    Client::connect(&paths.socket()).await?.report().await
}

pub(super) async fn watch(paths: &StateDir, json: bool) -> Result<Outcome> {
    let mut last = None;
    let mut absent_since = None;
    loop {
        let status = match asked(paths).await {
            Ok(status) => {
                absent_since = None;
                status
            }
            // The unit restarts a daemon that died. After ABSENT, no further change is expected.
            Err(error) if absent_since.get_or_insert_with(Instant::now).elapsed() >= ABSENT => return Err(error),
            Err(error) => recorded(paths).ok_or(error)?,
        };
        if last.as_ref() != Some(&status) {
            print(&status, json)?;
        }
        if let Some(exit) = exit_of(&status) {
            return Ok(exit);
        }
        last = Some(status);
        tokio::time::sleep(LOOK).await;
    }
}

/// Returns the outcome that ends a watch, or `None` while the status may still change.
fn exit_of(status: &Status) -> Option<Outcome> {
    match status.state {
        // While a phase after the switch runs, the state is `running`.
        State::Done | State::NothingToDo | State::Switched => Some(Outcome::Done),
        State::Failed => Some(status.error.as_ref().map(|error| error.outcome).unwrap_or_default()),
        State::Idle | State::Running | State::Waiting | State::Pulled => None,
    }
}

fn print(status: &Status, json: bool) -> Result<()> {
    if json {
        say::out(serde_json::to_string(status)?);
    } else {
        say::out(report::state_line(status, unix_now()));
        status.deviations.iter().for_each(|line| say::out(format_args!("but: {}", report::one_line(line))));
        report::old_lines(status).for_each(say::out);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::LastError;

    #[test]
    fn a_watch_ends_in_a_final_state() {
        let of = |state, outcome: Option<Outcome>| {
            let error = outcome.map(|outcome| LastError { outcome, ..LastError::default() });
            exit_of(&Status { state, error, ..Status::default() })
        };
        for state in [State::Done, State::NothingToDo, State::Switched] {
            assert_eq!(of(state, None), Some(Outcome::Done), "{state:?}");
        }
        // A failure stays in the document while the next attempt runs.
        for state in [State::Idle, State::Running, State::Waiting, State::Pulled] {
            assert_eq!(of(state, Some(Outcome::GaveUp)), None, "{state:?}");
        }
        for outcome in [Outcome::Refused, Outcome::Permanent, Outcome::GaveUp, Outcome::Cancelled, Outcome::Internal] {
            assert_eq!(of(State::Failed, Some(outcome)), Some(outcome), "{outcome:?}");
        }
        assert_eq!(of(State::Failed, None), Some(Outcome::Internal));
    }
}
