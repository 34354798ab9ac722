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
    /// Somebody asked to stop. The running system is untouched.
    #[error("cancelled; what was fetched is kept for the next pull")]
    Cancelled,
    /// Anything of this machine's own; the message says how far it came.
    #[error("{0:#}")]
    Internal(#[from] anyhow::Error),
}

impl Error {
    /// The stable word for `error.class` in the status document.
    pub fn class(&self) -> &'static str {
        match self {
            Error::Refused(_) => "refused",
            Error::Permanent(failure) => failure.kind.as_str(),
            Error::Cancelled => "cancelled",
            Error::Internal(_) => Kind::Local.as_str(),
        }
    }
}
