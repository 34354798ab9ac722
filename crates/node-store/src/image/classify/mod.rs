//! Classifies skopeo's error messages. Pure.
//!
//! skopeo before 1.19 does not classify its errors, so only their texts are available. A failure is permanent only if all
//! endpoints that were tried gave a permanent cause of the lists in [`causes`]. All others are retried.

mod causes;
mod structure;
#[cfg(test)]
mod tests;

use std::time::Duration;

use super::{Class, Endpoint, Failure, Kind};
use causes::{Cause, cause};

/// The longest delay that a registry can ask for. An unattended machine must not wait for days.
const LONGEST_WAIT: Duration = Duration::from_secs(3600);

/// Returns the failure that a message of skopeo or of the proxy crate describes. `retryable` is the classification of newer
/// versions of skopeo; if true, it decides.
pub fn classify(text: &str, retryable: bool) -> Failure {
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
    Failure { class, advice, endpoints, retry_after: retry_after(text), ..Failure::new(kind, text) }
}

/// Combines the causes of all endpoints. The class is the one that is retried the most. A refusal by this machine's
/// configuration still decides about the kind, because only an operator can fix it.
fn decisive(answers: &[(&str, Cause)]) -> Cause {
    let causes = || answers.iter().map(|(_, cause)| *cause);
    let Some(best) = causes().rev().min_by_key(|cause| cause.class) else { return Cause::of(Kind::Unknown) };
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
