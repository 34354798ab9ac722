//! The one failure type of the agent, from the cause to the exit code: what failed, and the state of the running system.
//!
//! Class word, outcome (exit code, D-Bus error) and the entry in the status document derive from it here.

use std::fmt;
use std::time::Duration;

use super::state::Unusable;
use crate::preflight::Refusals;
use crate::report::{Attempt, LastError, Outcome, Reason, RefusalId, Standing};
use node_store::image::{Failure, Kind};

/// The end of a call that did not reach its goal.
#[derive(Debug)]
pub struct Error {
    cause: Cause,
    standing: Option<Standing>,
    failed: u32,
    attempts: Vec<Attempt>,
}

/// The cause of an [`Error`].
#[derive(Debug, thiserror::Error)]
pub enum Cause {
    /// Checks refused before anything changed.
    #[error("{}", lines(.0))]
    Refused(Vec<Reason>),
    /// Another attempt would give the same result.
    #[error("{0}")]
    Permanent(Box<Failure>),
    /// Another attempt might help, but a limit of `[retry]` is reached.
    #[error("{}; gave up after {attempts} attempts in {} s (retry.{limit})", failure.message, after.as_secs())]
    GaveUp {
        /// The last failure.
        failure: Box<Failure>,
        /// Attempts made.
        attempts: u32,
        /// Time since the first failure.
        after: Duration,
        /// The key of `[retry]` whose limit is reached.
        limit: &'static str,
    },
    /// A caller asked to stop.
    #[error("cancelled; what was fetched is kept for the next pull")]
    Cancelled,
    /// Any other failure, caused by this machine.
    #[error("{0:#}")]
    Internal(anyhow::Error),
}

impl Error {
    /// Returns a refusal for one reason; `id` is stable and shown as `error.refusals[].id`.
    pub fn refused(id: RefusalId, message: impl Into<String>) -> Self {
        Cause::Refused(vec![Reason { id: id.as_str().to_owned(), message: message.into() }]).into()
    }

    /// Returns the error of a call that was cancelled.
    pub fn cancelled() -> Self {
        Cause::Cancelled.into()
    }

    /// Adds the state of the running system, unless the error says it already.
    pub(super) fn at(mut self, standing: Standing) -> Self {
        self.standing.get_or_insert(standing);
        self
    }

    /// Adds a context to an internal error.
    pub(super) fn context(self, context: &'static str) -> Self {
        match self.cause {
            Cause::Internal(error) => Self { cause: Cause::Internal(error.context(context)), ..self },
            _ => self,
        }
    }

    /// Adds the number of attempts that failed, and the latest of them.
    pub(super) fn with_attempts(self, failed: u32, attempts: Vec<Attempt>) -> Self {
        Self { failed, attempts, ..self }
    }

    /// Returns how the call ended, which decides the exit code and the D-Bus error.
    pub fn outcome(&self) -> Outcome {
        match &self.cause {
            Cause::Refused(_) => Outcome::Refused,
            Cause::Permanent(_) => Outcome::Permanent,
            Cause::GaveUp { .. } => Outcome::GaveUp,
            Cause::Cancelled => Outcome::Cancelled,
            Cause::Internal(_) => Outcome::Internal,
        }
    }

    /// Returns the stable word for `error.class` in the status document.
    pub fn class(&self) -> &'static str {
        match &self.cause {
            Cause::Refused(_) => "refused",
            Cause::Permanent(failure) | Cause::GaveUp { failure, .. } => failure.kind.as_str(),
            Cause::Cancelled => Kind::Cancelled.as_str(),
            Cause::Internal(_) => Kind::Local.as_str(),
        }
    }

    /// Returns the checks that refused.
    pub(super) fn reasons(&self) -> &[Reason] {
        match &self.cause {
            Cause::Refused(reasons) => reasons,
            _ => &[],
        }
    }

    /// Returns the entry for the status document.
    pub(super) fn last_error(&self) -> LastError {
        LastError {
            class: self.class().into(),
            message: self.to_string(),
            attempt: self.failed,
            outcome: self.outcome(),
            standing: self.standing,
            refusals: self.reasons().to_vec(),
            attempts: self.attempts.clone(),
            ..LastError::default()
        }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.cause)?;
        match (&self.cause, self.standing) {
            (Cause::Refused(_), Some(Standing::Switched | Standing::HalfDone)) => f.write_str("; nothing was changed"),
            (_, Some(standing)) => write!(f, "; {}", standing.sentence()),
            (_, None) => Ok(()),
        }
    }
}

fn lines(reasons: &[Reason]) -> String {
    let lines: Vec<&str> = reasons.iter().map(|reason| reason.message.as_str()).collect();
    lines.join("\n")
}

impl std::error::Error for Error {}

impl From<Cause> for Error {
    fn from(cause: Cause) -> Self {
        Self { cause, standing: None, failed: 1, attempts: Vec::new() }
    }
}

impl From<anyhow::Error> for Error {
    fn from(error: anyhow::Error) -> Self {
        Cause::Internal(error).into()
    }
}

impl From<Unusable> for Error {
    fn from(unusable: Unusable) -> Self {
        Self::refused(RefusalId::StateFile, unusable.to_string())
    }
}

impl From<Refusals> for Error {
    fn from(refusals: Refusals) -> Self {
        let reason = |refusal: &crate::preflight::Refusal| Reason {
            id: refusal.id().as_str().into(),
            message: refusal.to_string(),
        };
        Cause::Refused(refusals.0.iter().map(reason).collect()).into()
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::preflight::Refusal;

    fn errors() -> [(Error, Outcome, &'static str, &'static str); 6] {
        let failure = |kind| Box::new(Failure::new(kind, "q.io/x: it fails"));
        let (after, limit) = (Duration::from_secs(90), "attempts");
        let gave_up = Cause::GaveUp { failure: failure(Kind::Clock), attempts: 7, after, limit };
        [
            (
                Error::refused(RefusalId::ModeOff, "no"),
                Outcome::Refused,
                "refused",
                "no; the running system is unchanged",
            ),
            (
                Refusals(vec![Refusal::EtcReadOnly, Refusal::NoOverlay]).into(),
                Outcome::Refused,
                "refused",
                "/etc is mounted read-only",
            ),
            (Cause::Permanent(failure(Kind::Local)).into(), Outcome::Permanent, "local", "q.io/x: it fails; "),
            (gave_up.into(), Outcome::GaveUp, "clock", "gave up after 7 attempts in 90 s (retry.attempts)"),
            (Error::cancelled(), Outcome::Cancelled, "cancelled", "is kept for the next pull; the running system"),
            (anyhow::anyhow!("cannot").into(), Outcome::Internal, "local", "cannot; the running system is unchanged"),
        ]
    }

    #[test]
    fn every_cause_has_its_outcome_class_and_words() {
        for (error, outcome, class, words) in errors() {
            let error = error.at(Standing::Unchanged);
            assert_eq!((error.outcome(), error.class()), (outcome, class));
            assert!(error.to_string().contains(words), "{error}");
            let entry = error.last_error();
            assert_eq!(
                (entry.outcome, entry.class.as_str(), entry.standing),
                (outcome, class, Some(Standing::Unchanged))
            );
        }
    }

    #[test]
    fn refusals_keep_the_names_of_their_checks() {
        let entry = Error::from(Refusals(vec![Refusal::EtcReadOnly, Refusal::NoOverlay])).last_error();
        let ids: Vec<&str> = entry.refusals.iter().map(|reason| reason.id.as_str()).collect();
        assert_eq!(ids, ["etc-read-only", "no-overlay"]);
    }

    #[test]
    fn the_first_state_of_the_running_system_is_kept() {
        let error = Error::from(anyhow::anyhow!("x")).at(Standing::RolledBack).at(Standing::Unchanged);
        assert_eq!(error.to_string(), "x; rolled back: /usr and /etc are unchanged");
        let refused = Error::refused(RefusalId::NoSwitch, "nothing was switched").at(Standing::Switched);
        assert_eq!(refused.to_string(), "nothing was switched; nothing was changed");
    }
}
