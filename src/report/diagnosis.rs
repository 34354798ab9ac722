//! The one diagnosis of a pivot that waits or has failed. Console, `status`, `report` and `STATUS=` render it.

use serde::{Deserialize, Serialize};

use super::words::timestamp;
use super::{Outcome, Phase, Standing};

/// Letters of a message on a console: two rows of 80, less the time stamp and the name that journald writes before it.
const ROWS: usize = 122;
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
    /// Returns the words before the cause.
    fn verdict(&self) -> &'static str {
        match self.outcome {
            Some(Outcome::Permanent) => "failed permanently: ",
            Some(Outcome::Refused) => "refused: ",
            Some(Outcome::GaveUp) => "gave up: ",
            Some(Outcome::Cancelled) => "cancelled: ",
            Some(_) => "failed: ",
            None => "",
        }
    }

    /// Returns the words after the cause: the next attempt, or the command that continues.
    fn next(&self, now_unix: u64) -> String {
        match self.next_unix {
            Some(at) => format!("attempt {} failed, next in {} s", self.attempts, at.saturating_sub(now_unix)),
            None => format!("run {}", self.command),
        }
    }

    /// Returns the diagnosis as one line, for `STATUS=` and the service record.
    pub fn line(&self, now_unix: u64) -> String {
        format!("{}{}; {}", self.verdict(), self.cause, self.next(now_unix))
    }

    /// Returns the diagnosis as a message that needs at most two rows of a console. Of a long cause, the middle is left out:
    /// its begin names the image, its end the error of the system.
    pub fn rows(&self, now_unix: u64) -> String {
        let (verdict, next) = (self.verdict(), self.next(now_unix));
        let room = ROWS.saturating_sub(verdict.len() + next.len() + 2);
        let cause: Vec<char> = self.cause.split("; ").next().unwrap_or_default().chars().collect();
        if cause.len() <= room {
            return format!("{verdict}{}; {next}", cause.into_iter().collect::<String>());
        }
        let begin = room / 3;
        let end = cause.len() - room.saturating_sub(begin + 2);
        let (begin, end): (String, String) = (cause[..begin].iter().collect(), cause[end..].iter().collect());
        format!("{verdict}{begin}..{end}; {next}")
    }

    /// Returns the line of `status` below the cause.
    pub fn advice(&self) -> String {
        let since = self.since_unix.map(|since| format!("since {}, ", timestamp(since * 1000))).unwrap_or_default();
        let attempts = if self.attempts == 1 { "1 attempt" } else { &format!("{} attempts", self.attempts) };
        let next = match self.outcome {
            None => "the agent tries again by itself".to_owned(),
            Some(Outcome::Permanent) => format!("permanent: fix the cause, then run {}", self.command),
            Some(_) => format!("the agent does not try again: fix the cause, then run {}", self.command),
        };
        format!("{since}{attempts}; {next}")
    }

    /// Returns the text for login prompts and logins. It does not change from attempt to attempt.
    pub fn banner(&self) -> String {
        let waits = if self.outcome.is_none() { "waiting for another attempt: " } else { "" };
        let run = if self.outcome.is_none() { "See" } else { "Fix the cause, then run" };
        format!("Node image pivot: {waits}{}{}\n{run}: {}\n", self.verdict(), self.cause, self.command)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::report::{LastError, State, Status};
    use unit_refresh::Flow;

    fn diagnosis(message: &str, next_unix: Option<u64>, outcome: Outcome) -> Diagnosis {
        let error = LastError {
            message: message.into(),
            attempt: 3,
            next_retry_unix: next_unix,
            outcome,
            ..LastError::default()
        };
        let state = if next_unix.is_some() { State::Waiting } else { State::Failed };
        let (error, flow) = (Some(error), Some(Flow::Bootstrap));
        (Status { state, phase: Some(Phase::Pull), error, flow, ..Status::default() }).diagnose().unwrap()
    }

    #[test]
    fn a_message_needs_two_rows_and_has_cause_and_next_step() {
        let image = format!("registry.example.com:5000/openshift/node@sha256:{}", "0a".repeat(32));
        let long = format!(
            "{image}: pinging container registry registry.example.com:5000: Get \"https://registry.example.com:5000/v2/\": \
             dial tcp 192.0.2.1:5000: connect: connection refused; check name resolution, the proxy and the registry; the \
             pull is retried"
        );
        for (diagnosis, begin, end) in [
            (
                diagnosis(&long, Some(130), Outcome::Internal),
                "registry.example.com:5000/open..",
                "192.0.2.1:5000: connect: connection refused; attempt 3 failed, next in 30 s",
            ),
            (
                diagnosis(&format!("{image}: manifest unknown; check the tag"), None, Outcome::Permanent),
                "failed permanently: registry.example.c..",
                ": manifest unknown; run systemctl start node-image-finish.service",
            ),
            (
                diagnosis("too little RAM", None, Outcome::Refused),
                "refused: too little RAM; run systemctl",
                "finish.service",
            ),
        ] {
            let rows = diagnosis.rows(100);
            assert!(rows.len() <= ROWS && rows.starts_with(begin) && rows.ends_with(end), "{rows}");
            assert!(!diagnosis.line(100).contains(&"0a".repeat(7)));
        }
    }

    #[test]
    fn the_text_at_logins_is_the_same_for_each_attempt() {
        let waiting = diagnosis("x: refused", Some(130), Outcome::Internal).banner();
        let expected =
            "Node image pivot: waiting for another attempt: x: refused\nSee: node-image-pivot status --watch\n";
        assert_eq!(waiting, expected);
        let failed = diagnosis("x: denied", None, Outcome::Permanent).banner();
        assert!(failed.contains("failed permanently: x: denied\nFix the cause, then run: systemctl"), "{failed}");
    }

    proptest::proptest! {
        #[test]
        fn every_message_fits_two_rows(message in ".{0,400}", next in proptest::option::of(0u64..1 << 40)) {
            let rows = diagnosis(&message, next, Outcome::Permanent).rows(0);
            proptest::prop_assert!(rows.chars().count() <= ROWS, "{rows}");
        }
    }

    #[test]
    fn the_command_continues_in_the_flow_of_the_machine() {
        let of = |state, flow, standing| {
            let error = LastError { class: "network".into(), standing, ..LastError::default() };
            let status = Status { state, flow, error: Some(error), ..Status::default() };
            status.diagnose().map(|diagnosis| diagnosis.command)
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
