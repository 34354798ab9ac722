//! The one diagnosis of a pivot that waits or has failed. Console, `status`, `report` and `STATUS=` render it.

use serde::{Deserialize, Serialize};

use super::{Outcome, Phase, Standing, State, Status, one_line};
use unit_refresh::Flow;

/// Letters of a digest that people compare.
const DIGEST: usize = 12;

/// The cause, what the agent does about it, and what a person can do.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct Diagnosis {
    /// Class of the failure, as `error.class`.
    pub class: String,
    /// The phase that failed.
    pub phase: Option<Phase>,
    /// Cause and remedy on one line, with shortened digests.
    pub cause: String,
    /// Time of the first failure, in seconds since the epoch; absent if unknown.
    pub since_unix: Option<u64>,
    /// Number of failed attempts.
    pub attempts: u32,
    /// Start of the next attempt, in seconds since the epoch; absent if the agent makes none.
    pub next_unix: Option<u64>,
    /// The end of the call; absent while another attempt is scheduled.
    pub outcome: Option<Outcome>,
    /// State of the running system, if known.
    pub standing: Option<Standing>,
    /// The command that continues, after the cause is fixed; while another attempt is scheduled, the one that shows it.
    pub command: String,
}

impl Diagnosis {
    /// Returns the diagnosis of a pivot that waits or has failed.
    pub fn of(status: &Status) -> Option<Self> {
        let error = status.error.as_ref()?;
        let ended = match status.state {
            State::Waiting => false,
            State::Failed => true,
            _ => return None,
        };
        let command = match (ended, error.standing, status.flow) {
            (false, ..) => "node-image-pivot status --watch",
            (_, Some(Standing::HalfDone), _) => "node-image-pivot undo",
            (_, _, Some(Flow::Bootstrap)) => "systemctl start node-image-finish.service",
            (_, _, Some(Flow::Live)) => "systemctl start node-image-overlay.service",
            (_, _, None) => "node-image-pivot run",
        };
        Some(Self {
            class: error.class.clone(),
            phase: status.phase,
            cause: short_digests(&one_line(&error.message)),
            since_unix: error.since_unix,
            attempts: error.attempt,
            next_unix: error.next_retry_unix,
            outcome: ended.then_some(error.outcome),
            standing: error.standing,
            command: command.to_owned(),
        })
    }
}

/// Shortens digests, which take most of a line and of which people compare the begin.
pub(super) fn short_digests(text: &str) -> String {
    let mut short = String::with_capacity(text.len());
    let mut digits = 0;
    for letter in text.chars() {
        digits = if letter.is_ascii_hexdigit() { digits + 1 } else { 0 };
        // A digest is known only at its end, so the letters after the begin are removed then.
        short.push(letter);
        if digits == 64 {
            short.truncate(short.len() - (64 - DIGEST));
        }
    }
    short
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::report::LastError;

    #[test]
    fn digests_are_shortened_and_other_words_stay() {
        let digest = "0123456789abcdef".repeat(4);
        let text = format!("q.io/x@sha256:{digest}: cannot read {digest}; feed {}", "a".repeat(63));
        let expected = format!("q.io/x@sha256:0123456789ab: cannot read 0123456789ab; feed {}", "a".repeat(63));
        assert_eq!(short_digests(&text), expected);
    }

    #[test]
    fn the_command_continues_in_the_flow_of_the_machine() {
        let of = |state, flow, standing| {
            let error = LastError { class: "network".into(), standing, ..LastError::default() };
            let status = Status { state, flow, error: Some(error), ..Status::default() };
            Diagnosis::of(&status).map(|diagnosis| diagnosis.command)
        };
        for (state, flow, standing, command) in [
            (State::Waiting, Some(Flow::Live), None, "node-image-pivot status --watch"),
            (State::Failed, Some(Flow::Live), None, "systemctl start node-image-overlay.service"),
            (State::Failed, Some(Flow::Bootstrap), None, "systemctl start node-image-finish.service"),
            (State::Failed, None, None, "node-image-pivot run"),
            (State::Failed, Some(Flow::Live), Some(Standing::HalfDone), "node-image-pivot undo"),
        ] {
            assert_eq!(of(state, flow, standing).as_deref(), Some(command), "{state:?} {flow:?}");
        }
        assert_eq!(of(State::Running, None, None), None, "another attempt runs");
    }
}
