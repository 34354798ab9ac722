//! The answer of a call, as lines or as a JSON document.

use std::time::{Duration, Instant};

use anyhow::Result;
use serde::Serialize;

use super::drive::{Call, POLL, Reporter, client_status, drive, drive_to_end, failed};
use super::say;
use super::show::recorded;
use crate::agent::StateDir;
use crate::bus::Client;
use crate::report::{self, Outcome, State, Status};

/// Time for a cancelled call to end.
const END: Duration = Duration::from_secs(10);

/// The answer of a call as a JSON document.
#[derive(Debug, Serialize)]
struct Answer {
    /// Version of this document: 1.
    schema: u32,
    /// State of the pivot after the call.
    state: State,
    /// Lines that the command prints without `--json`.
    lines: Vec<String>,
}

impl Answer {
    fn new(status: &Status, lines: &[String]) -> Self {
        Self { schema: 1, state: status.state, lines: lines.iter().map(|line| report::one_line(line)).collect() }
    }
}

/// Makes `call` and waits for its end. Shows its progress, or writes only the answer to stdout, for programs.
pub(super) async fn answer(paths: &StateDir, call: Call, json: bool) -> Result<Outcome> {
    if !json {
        return drive(paths, call).await;
    }
    let mut reporter = Reporter::silent();
    Ok(match drive_to_end(paths, call, &mut reporter).await {
        Ok((status, lines)) => {
            say::out(serde_json::to_string(&Answer::new(&status, &lines))?);
            Outcome::Done
        }
        Err(error) => failed(&error),
    })
}

/// Cancels a running or waiting pull. Does not start a daemon that is not running: it has no pull.
pub(super) async fn cancel(paths: &StateDir, json: bool) -> Result<Outcome> {
    let outcome = match Client::running(&paths.socket()).await {
        Ok(Some(client)) => client.call("Cancel").await,
        Ok(None) => Ok(Vec::new()),
        Err(error) => Err(error),
    };
    match outcome {
        Ok(lines) if json => {
            let status =
                if lines.is_empty() { client_status(paths).await } else { ended(|| client_status(paths)).await };
            let status = status.or_else(|| recorded(paths)).unwrap_or_default();
            say::out(serde_json::to_string(&Answer::new(&status, &lines))?);
        }
        Ok(lines) if lines.is_empty() => say::out("nothing was running"),
        Ok(lines) => lines.iter().for_each(|line| say::out(report::one_line(line))),
        Err(error) => return Ok(failed(&error)),
    }
    Ok(Outcome::Done)
}

/// Reads the status until the cancelled call has ended, at most for [`END`]. A deployment and the completion of the store do
/// not hold the record, so that the status names no call. Returns `None` if no daemon answers.
async fn ended(read: impl AsyncFn() -> Option<Status>) -> Option<Status> {
    let begin = Instant::now();
    loop {
        let status = read().await?;
        let runs = status.call.is_some() || matches!(status.state, State::Running | State::Waiting);
        if !runs || begin.elapsed() > END {
            return Some(status);
        }
        tokio::time::sleep(POLL).await;
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use std::sync::Mutex;

    #[test]
    fn the_answer_of_a_call_is_a_document() {
        let status = Status { state: State::Pulled, ..Status::default() };
        let answer = serde_json::to_value(Answer::new(&status, &["kept\n/etc/x".into()])).unwrap();
        assert_eq!(answer, serde_json::json!({"schema": 1, "state": "pulled", "lines": ["kept; /etc/x"]}));
    }

    #[tokio::test]
    async fn a_cancel_answers_with_the_state_after_the_call() {
        let status = |state, call: Option<&str>| Status { state, call: call.map(str::to_owned), ..Status::default() };
        let states = [status(State::Failed, None), status(State::Waiting, None), status(State::Running, Some("pull"))];
        let states = Mutex::new(Vec::from(states));
        let read = async || states.lock().unwrap().pop();
        assert_eq!(ended(read).await.map(|status| status.state), Some(State::Failed));
        assert_eq!(ended(read).await, None, "no daemon answers");
    }
}
