//! How a run can end, and what each end means to a caller: exit codes and D-Bus errors come from it.

use crate::image::{Failure, Kind};

/// The end of a run that did not reach its goal.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Preflight refused before anything changed.
    #[error("refused: {0}")]
    Refused(String),
    /// Another attempt gives the same result. The running system is untouched.
    #[error("{0}")]
    Permanent(Failure),
    /// A failure that might have passed, but the configured number of attempts was made. The running
    /// system is untouched.
    #[error("{}; gave up after {attempts} attempts (retry.attempts); the running system is untouched", failure.message)]
    GaveUp {
        /// The last failure.
        failure: Failure,
        /// How many attempts were made.
        attempts: u32,
    },
    /// Somebody asked to stop. The running system is untouched.
    #[error("cancelled; the running system is as it was, and what was fetched is kept for the next pull")]
    Cancelled,
    /// Anything of this machine's own; the message says how far it came.
    #[error("{0:#}")]
    Internal(#[from] anyhow::Error),
}

impl Error {
    /// Says how the system stands, where the error itself cannot know.
    pub(super) fn context(self, standing: &'static str) -> Self {
        match self {
            Error::Internal(error) => Error::Internal(anyhow::anyhow!("{error:#}; {standing}")),
            other => other,
        }
    }

    /// The stable word for `error.class` in the status document.
    pub fn class(&self) -> &'static str {
        match self {
            Error::Refused(_) => "refused",
            Error::Permanent(failure) => failure.kind.as_str(),
            Error::GaveUp { failure, .. } => failure.kind.as_str(),
            Error::Cancelled => "cancelled",
            Error::Internal(_) => Kind::Local.as_str(),
        }
    }
}
