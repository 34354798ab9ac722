//! From what skopeo says to what it means. Pure: text in, verdict out.
//!
//! skopeo before 1.19 does not classify its errors, and its texts are all there is. A failure is permanent only if
//! every endpoint that was tried gave a cause of the list in [`causes`]; all others are retried.

mod causes;
mod structure;
#[cfg(test)]
mod tests;

use std::time::Duration;

use super::{Class, Endpoint, Failure, Kind};
use causes::{Cause, cause};

/// The longest delay that a registry can ask for. An unattended machine must not wait for days.
const LONGEST_WAIT: Duration = Duration::from_secs(3600);

/// The meaning of a message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Verdict {
    /// Kind, for the status document.
    pub kind: Kind,
    /// Class, which decides about another attempt.
    pub class: Class,
    /// Remedy for the operator.
    pub advice: &'static str,
    /// Each endpoint's own answer, where more than one was tried.
    pub endpoints: Vec<Endpoint>,
    /// Time that a registry asked to wait.
    pub retry_after: Option<Duration>,
}

impl Verdict {
    /// Makes the failure that `message` describes.
    pub(super) fn failure(self, message: String) -> Failure {
        let Self { kind, class, advice, endpoints, retry_after } = self;
        Failure { kind, class, message, advice, endpoints, retry_after }
    }
}

/// Returns what a message of skopeo, or of the proxy crate, stands for. `retryable` is skopeo's own word, which newer
/// versions give: it decides where it is given.
pub fn classify(text: &str, retryable: bool) -> Verdict {
    let attempts = structure::attempts(text);
    let answers: Vec<(&str, Cause)> =
        attempts.iter().map(|attempt| (attempt.endpoint, cause(attempt.message))).collect();
    let mut decisive = decisive(&answers);
    if retryable && decisive.class != Class::Transient {
        decisive = Cause {
            class: Class::Transient,
            ..if decisive.kind == Kind::Policy { decisive } else { Cause::of(Kind::Network) }
        };
    }
    let endpoint = |(name, cause): &(&str, Cause)| Endpoint {
        name: structure::repository(name).to_owned(),
        kind: cause.kind,
        advice: cause.advice,
    };
    let endpoints = if answers.len() > 1 { answers.iter().map(endpoint).collect() } else { Vec::new() };
    let Cause { kind, class, advice } = decisive;
    Verdict { kind, class, advice, endpoints, retry_after: retry_after(text) }
}

/// Returns the cause that stands for all endpoints: the class is the most hopeful one. A refusal by this machine's own
/// configuration gives the kind even then, because only an operator can end it.
fn decisive(answers: &[(&str, Cause)]) -> Cause {
    let hope = |cause: &Cause| match cause.class {
        Class::Transient => 0,
        Class::Unknown => 1,
        Class::Denied => 2,
        Class::Permanent => 3,
    };
    let causes = || answers.iter().map(|(_, cause)| *cause);
    let Some(best) = causes().rev().min_by_key(hope) else { return Cause::of(Kind::Unknown) };
    let own = causes().find(|cause| cause.kind == Kind::Policy).unwrap_or(best);
    Cause { class: best.class, ..own }
}

/// Returns the delay that a header `Retry-After: 30` asks for, at most [`LONGEST_WAIT`]. Its form with a date is ignored.
fn retry_after(text: &str) -> Option<Duration> {
    let text = text.to_ascii_lowercase();
    let (_, rest) = text.split_once("retry-after: ")?;
    let end = rest.find(|c: char| !c.is_ascii_digit()).unwrap_or(rest.len());
    let digits = rest.get(..end).filter(|digits| !digits.is_empty())?;
    Some(digits.parse().map_or(LONGEST_WAIT, Duration::from_secs).min(LONGEST_WAIT))
}
