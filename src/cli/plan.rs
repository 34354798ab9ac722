//! `plan --json` and `diff-etc`: an answer for programs on stdout, and nothing else there.

use std::io::IsTerminal;

use anyhow::Result;

use super::drive::{POLL, failed, unix_now};
use super::say;
use crate::agent::Paths;
use crate::bus::{CallError, Client};
use crate::report::{self, Outcome, Phase, State, Status};

pub(super) async fn json(paths: &Paths) -> Result<Outcome> {
    Ok(match ask(paths, "plan", async |client| client.plan_document().await).await {
        Ok(document) => {
            say::out(document);
            Outcome::Done
        }
        Err(error) => failed(&error),
    })
}

pub(super) async fn diff_etc(paths: &Paths, secrets: bool) -> Result<Outcome> {
    Ok(match ask(paths, "diff-etc", async |client| client.diff_etc(secrets).await).await {
        Ok(diff) if std::io::stdout().is_terminal() => {
            // Files may hold what a terminal would take for commands.
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

/// Makes one call and says on stderr for which other call it waits. Should the daemon die in the middle, its unit starts
/// it again, and the caller can ask again.
async fn ask<T>(
    paths: &Paths,
    own: &str,
    call: impl AsyncFnOnce(Client) -> Result<T, CallError>,
) -> Result<T, CallError> {
    let client = Client::connect_or_start(&paths.socket()).await?;
    let mut waiting = Waiting::default();
    if let Ok(status) = client.status().await {
        waiting.first(&status).iter().for_each(|line| say::error(line));
    }
    let call = call(client.clone());
    tokio::pin!(call);
    loop {
        tokio::select! {
            outcome = &mut call => return outcome,
            () = tokio::time::sleep(POLL) => {
                if let Ok(status) = client.status().await {
                    waiting.next(&status, own).iter().for_each(|line| say::error(line));
                }
            }
        }
    }
}

/// The part of the status that a line was shown for.
#[derive(Default, PartialEq)]
struct Shown {
    call: Option<String>,
    state: State,
    phase: Option<Phase>,
    waiting_for: Option<String>,
}

/// The lines about other calls, each once.
#[derive(Default)]
struct Waiting {
    shown: Shown,
}

impl Waiting {
    /// Returns the line about the call that was under way before ours.
    fn first(&mut self, status: &Status) -> Option<String> {
        let Status { call, state, phase, waiting_for, .. } = status.clone();
        let key = Shown { call, state, phase, waiting_for };
        if self.shown == key {
            return None;
        }
        self.shown = key;
        report::waiting_line(status, unix_now())
    }

    /// Returns the next such line. A call of our own name is taken for ours.
    fn next(&mut self, status: &Status, own: &str) -> Option<String> {
        if status.call.as_deref() == Some(own) { None } else { self.first(status) }
    }
}

/// A line of a file without control characters; its indentation stays.
fn printable(line: &str) -> String {
    let indent = line.len() - line.trim_start().len();
    let (blank, rest) = line.split_at(indent);
    format!("{}{}", blank.replace(|letter: char| letter.is_control() && letter != '\t', " "), report::one_line(rest))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn another_call_is_named_once_and_our_own_is_not() {
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
    fn a_terminal_gets_no_commands() {
        assert_eq!(printable("+\tindented"), "+ indented");
        assert_eq!(printable(" \tcontext"), " \tcontext");
        assert_eq!(printable("-\x1b[2Jgone\r"), "- [2Jgone");
    }
}
