//! `plan --json` and `diff-etc`: an answer for programs on stdout, and nothing else there.

use std::io::IsTerminal;

use anyhow::Result;

use super::drive::failed;
use super::say;
use crate::agent::Paths;
use crate::bus::{CallError, Client};
use crate::report::{self, Outcome};

pub(super) async fn json(paths: &Paths) -> Result<Outcome> {
    Ok(match ask(paths, async |client| client.plan_document().await).await {
        Ok(document) => {
            say::out(document);
            Outcome::Done
        }
        Err(error) => failed(&error),
    })
}

pub(super) async fn diff_etc(paths: &Paths, secrets: bool) -> Result<Outcome> {
    Ok(match ask(paths, async |client| client.diff_etc(secrets).await).await {
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

/// One call; should the daemon die in the middle, its unit starts it again, and the person can, too.
async fn ask<T>(paths: &Paths, call: impl AsyncFnOnce(Client) -> Result<T, CallError>) -> Result<T, CallError> {
    call(Client::connect_or_start(&paths.socket()).await?).await
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
    fn a_terminal_gets_no_commands() {
        assert_eq!(printable("+\tindented"), "+ indented");
        assert_eq!(printable(" \tcontext"), " \tcontext");
        assert_eq!(printable("-\x1b[2Jgone\r"), "- [2Jgone");
    }
}
