//! `plan --json` and `diff-etc`: write only the answer to stdout, for programs.

use std::io::IsTerminal;

use anyhow::Result;

use super::drive::{failed, unix_now, watched};
use super::say;
use crate::agent::StateDir;
use crate::bus::{CallError, Client};
use crate::report::{self, Outcome, Phase, State, Status};

pub(super) async fn json(paths: &StateDir) -> Result<Outcome> {
    Ok(match ask(paths, "plan", async |client| client.plan_document().await).await {
        Ok(document) => {
            say::out(document);
            Outcome::Done
        }
        Err(error) => failed(&error),
    })
}

pub(super) async fn diff_etc(paths: &StateDir, secrets: bool) -> Result<Outcome> {
    Ok(match ask(paths, "diff-etc", async |client| client.diff_etc(secrets).await).await {
        Ok(diff) if std::io::stdout().is_terminal() => {
            // Files may contain control sequences of terminals.
            String::from_utf8_lossy(&diff).lines().for_each(|line| say::out(printable(line)));
            Outcome::Done
        }
        Ok(diff) => {
            say::raw(&diff);
            Outcome::Done
        }
        Err(error) => failed(&error),
    })
}

/// Makes one call and shows on stderr which other call it waits for. Returns an error if the daemon dies; the call can be
/// repeated once the unit has restarted it.
async fn ask<T>(
    paths: &StateDir,
    own: &str,
    call: impl AsyncFnOnce(Client) -> Result<T, CallError>,
) -> Result<T, CallError> {
    let client = Client::connect_or_start(&paths.socket()).await?;
    let mut waiting = Waiting::default();
    if let Ok(status) = client.status().await {
        waiting.first(&status).iter().for_each(|line| say::error(line));
    }
    let look = |status: &Status| waiting.next(status, own).iter().for_each(|line| say::error(line));
    watched(&client, call(client.clone()), look).await
}

/// The part of the status that decides if a line is shown: call, state, phase and wait.
type Shown = (Option<String>, State, Option<Phase>, Option<String>);

/// Selects the lines about other calls, each once.
#[derive(Default)]
struct Waiting(Option<Shown>);

impl Waiting {
    /// Returns the line about the call that was running before this one.
    fn first(&mut self, status: &Status) -> Option<String> {
        let key = Some((status.call.clone(), status.state, status.phase, status.waiting_for.clone()));
        let shown = std::mem::replace(&mut self.0, key);
        if shown == self.0 { None } else { report::waiting_line(status, unix_now()) }
    }

    /// Returns the next such line. A call named `own` counts as this one.
    fn next(&mut self, status: &Status, own: &str) -> Option<String> {
        if status.call.as_deref() == Some(own) { None } else { self.first(status) }
    }
}

/// Returns a line of a file without control characters, with its indentation.
fn printable(line: &str) -> String {
    let indent = line.len() - line.trim_start().len();
    let (blank, rest) = line.split_at(indent);
    format!("{}{}", blank.replace(|letter: char| letter.is_control() && letter != '\t', " "), report::one_line(rest))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_other_calls_are_shown_and_only_once() {
        let running = |call: Option<&str>, phase| Status {
            call: call.map(str::to_owned),
            state: State::Running,
            phase: Some(phase),
            ..Status::default()
        };
        let mut waiting = Waiting::default();
        let line = waiting.first(&running(Some("run"), Phase::Pull));
        assert_eq!(line.as_deref(), Some("waiting for `run`, which is under way: pull is running"));
        assert_eq!(waiting.next(&running(Some("run"), Phase::Pull), "plan"), None);
        assert!(waiting.next(&running(Some("run"), Phase::Stage), "plan").is_some());
        assert_eq!(waiting.next(&running(Some("plan"), Phase::Stage), "plan"), None);
        assert_eq!(Waiting::default().first(&running(None, Phase::Stage)), None);
    }

    #[test]
    fn control_sequences_do_not_reach_the_terminal() {
        assert_eq!(printable("+\tindented"), "+ indented");
        assert_eq!(printable(" \tcontext"), " \tcontext");
        assert_eq!(printable("-\x1b[2Jgone\r"), "- [2Jgone");
    }
}
