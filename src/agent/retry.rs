//! Retries of resolve and pull. The schedule is pure: times come from the caller.

use std::time::{Duration, Instant};

use tracing::warn;

use super::error::{Cause, Error};
use super::state::save_timeline;
use super::{CancelHandle, StateDir};
use crate::config::Retry;
use crate::report::{Attempt, LastError, Phase, Tracker};
use node_store::image::{Class, Failure};
use support::clock::unix_ms;

/// Largest number of attempts that the status document lists.
const LISTED: usize = 16;
/// Pauses before further attempts after an answer that is usually final, as shares of `retry.denied`.
const DENIED_DELAYS: [f64; 2] = [0.25, 0.75];

/// Runs `attempt` until it succeeds, ends or is cancelled. The status document shows each failure with its class, its
/// number and the time of the next attempt.
pub(super) async fn with_retry<T, F>(
    tracker: &Tracker,
    dir: &StateDir,
    retry: Retry,
    phase: Phase,
    cancel: &CancelHandle,
    attempt: impl Fn() -> F,
) -> Result<T, Error>
where
    F: Future<Output = Result<T, Failure>>,
{
    let mut retries = Retries::new(retry);
    loop {
        let outcome = tokio::select! {
            outcome = attempt() => outcome,
            () = cancel.cancelled() => return Err(Error::cancelled()),
        };
        let failure = match outcome {
            Ok(value) => return Ok(value),
            Err(_) if cancel.is_cancelled() => return Err(Error::cancelled()),
            Err(failure) => failure,
        };
        let jitter = getrandom::u64().map_or(0.5, |bits| bits as f64 / u64::MAX as f64);
        let next = retries.after(&failure, Instant::now(), jitter);
        let error = retries.record(&failure, unix_ms() / 1000, next);
        let delay = match next {
            Next::Wait { delay, .. } => delay,
            Next::End(limit) => return Err(retries.end(failure, limit)),
        };
        warn!(
            phase = phase.as_str(),
            class = failure.kind.as_str(),
            attempt = error.attempt,
            next_in_seconds = delay.as_secs(),
            "{failure}"
        );
        tracker.fail(error);
        save_timeline(dir, tracker);
        tokio::select! {
            () = tokio::time::sleep(delay) => tracker.begin(phase),
            () = cancel.cancelled() => return Err(Error::cancelled()),
        }
    }
}

/// The failed attempts of one phase.
pub(super) struct Retries {
    policy: Retry,
    failed: u32,
    first: Option<Instant>,
    /// Failures of one class in a row: the class, the time of the first, their number.
    streak: Option<(Class, Instant, u32)>,
    latest: Option<Instant>,
    attempts: Vec<Attempt>,
}

/// The decision after a failure.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Next {
    /// Another attempt.
    Wait {
        /// Time until it.
        delay: Duration,
        /// Time until attempts of this class end; `None` for no limit.
        left: Option<Duration>,
    },
    /// No other attempt; the key of `[retry]` whose limit is reached.
    End(&'static str),
}

impl Retries {
    pub(super) fn new(policy: Retry) -> Self {
        Self { policy, failed: 0, first: None, streak: None, latest: None, attempts: Vec::new() }
    }

    /// Decides what follows `failure`. `jitter` is from 0 to 1, see [`Retry::delay_after`].
    pub(super) fn after(&mut self, failure: &Failure, now: Instant, jitter: f64) -> Next {
        self.failed += 1;
        self.first.get_or_insert(now);
        self.latest = Some(now);
        let (since, in_a_row) = match self.streak {
            Some((class, since, count)) if class == failure.class => (since, count + 1),
            _ => (now, 1),
        };
        self.streak = Some((failure.class, since, in_a_row));
        let Some(delay) = self.policy.delay_after(self.failed, jitter) else { return Next::End("attempts") };
        // The time that a registry asks for is a lower bound, even above the configured maximum.
        let delay = delay.max(failure.retry_after.unwrap_or_default());
        match failure.class {
            Class::Transient => Next::Wait { delay, left: None },
            Class::Unknown => {
                let left = (since + self.policy.unknown).saturating_duration_since(now);
                if left.is_zero() {
                    return Next::End("unknown");
                }
                Next::Wait { delay: delay.min(left), left: Some(left) }
            }
            Class::Denied => {
                let shares = DENIED_DELAYS.get(in_a_row as usize - 1..).unwrap_or_default();
                let [share, ..] = shares else { return Next::End("denied") };
                if self.policy.denied.is_zero() {
                    return Next::End("denied");
                }
                let left = self.policy.denied.mul_f64(shares.iter().sum());
                Next::Wait { delay: self.policy.denied.mul_f64(*share).max(delay), left: Some(left) }
            }
            Class::Permanent => Next::End("attempts"),
        }
    }

    /// Adds the attempt to the list, and returns the entry for the status document.
    pub(super) fn record(&mut self, failure: &Failure, unix: u64, next: Next) -> LastError {
        let class = failure.kind.as_str().to_owned();
        self.attempts.push(Attempt { unix, class: class.clone(), message: failure.message.clone() });
        let excess = self.attempts.len().saturating_sub(LISTED);
        self.attempts.drain(..excess);
        let (delay, left) = match next {
            Next::Wait { delay, left } => (Some(delay), left),
            Next::End(_) => (None, None),
        };
        LastError {
            class,
            message: failure.to_string(),
            attempt: self.failed,
            since_unix: self
                .first
                .zip(self.latest)
                .map(|(first, latest)| unix.saturating_sub((latest - first).as_secs())),
            next_retry_unix: delay.map(|delay| unix + delay.as_secs()),
            give_up_unix: left.map(|left| unix + left.as_secs()),
            attempts: self.attempts.clone(),
            ..LastError::default()
        }
    }

    /// Returns the error of a phase that ends with `failure`.
    pub(super) fn end(self, failure: Failure, limit: &'static str) -> Error {
        let after = self.first.zip(self.latest).map_or(Duration::ZERO, |(first, latest)| latest - first);
        let (class, failure) = (failure.class, Box::new(failure));
        let cause = match class {
            Class::Transient | Class::Unknown => Cause::GaveUp { failure, attempts: self.failed, after, limit },
            Class::Denied | Class::Permanent => Cause::Permanent(failure),
        };
        Error::from(cause).with_attempts(self.failed, self.attempts)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::report::Outcome;
    use node_store::image::Kind;

    fn policy() -> Retry {
        let seconds = Duration::from_secs;
        Retry { initial: seconds(2), maximum: seconds(60), attempts: 0, denied: seconds(120), unknown: seconds(1800) }
    }

    /// Fails with `kind` at each attempt; returns the seconds of the attempts and the outcome.
    fn run(policy: Retry, kind: Kind, limit: usize) -> (Vec<u64>, Option<Outcome>) {
        let mut retries = Retries::new(policy);
        let start = Instant::now();
        let (mut now, mut times) = (start, Vec::new());
        while times.len() < limit {
            let failure = Failure::new(kind, "m");
            times.push((now - start).as_secs());
            match retries.after(&failure, now, 0.0) {
                Next::Wait { delay, .. } => now += delay,
                Next::End(key) => return (times, Some(retries.end(failure, key).outcome())),
            }
        }
        (times, None)
    }

    #[test]
    fn every_class_has_its_schedule() {
        assert_eq!(run(policy(), Kind::Network, 5), (vec![0, 2, 6, 14, 30], None));
        let (times, outcome) = run(policy(), Kind::Unknown, 100);
        assert_eq!((times.last().copied(), outcome), (Some(1800), Some(Outcome::GaveUp)));
        for kind in [Kind::Unauthorized, Kind::NotFound] {
            assert_eq!(run(policy(), kind, 100), (vec![0, 30, 120], Some(Outcome::Permanent)), "{kind:?}");
        }
        assert_eq!(run(policy(), Kind::Policy, 100), (vec![0], Some(Outcome::Permanent)));
        let once = Retry { denied: Duration::ZERO, ..policy() };
        assert_eq!(run(once, Kind::NotFound, 100), (vec![0], Some(Outcome::Permanent)));
        let two = Retry { attempts: 2, ..policy() };
        assert_eq!(run(two, Kind::Unknown, 100), (vec![0, 2], Some(Outcome::GaveUp)));
        assert_eq!(run(two, Kind::NotFound, 100), (vec![0, 30], Some(Outcome::Permanent)));
    }

    #[test]
    fn a_failure_of_another_class_restarts_the_schedule() {
        let mut retries = Retries::new(policy());
        let now = Instant::now();
        for kind in [Kind::NotFound, Kind::NotFound, Kind::Network, Kind::NotFound, Kind::NotFound] {
            let next = retries.after(&Failure::new(kind, "m"), now, 0.0);
            assert!(matches!(next, Next::Wait { .. }), "{kind:?}");
        }
        assert_eq!(retries.after(&Failure::new(Kind::NotFound, "m"), now, 0.0), Next::End("denied"));
    }

    #[test]
    fn the_delay_that_a_registry_asks_for_is_a_lower_bound() {
        let failure = Failure { retry_after: Some(Duration::from_secs(300)), ..Failure::new(Kind::Network, "m") };
        let next = Retries::new(policy()).after(&failure, Instant::now(), 0.0);
        assert_eq!(next, Next::Wait { delay: Duration::from_secs(300), left: None });
    }

    #[test]
    fn the_status_document_lists_the_latest_attempts_and_the_end() {
        let mut retries = Retries::new(policy());
        let failure = Failure::new(Kind::Unknown, "an odd page");
        let now = Instant::now();
        let mut entry = LastError::default();
        for unix in 0..20 {
            let next = retries.after(&failure, now, 0.0);
            entry = retries.record(&failure, unix, next);
        }
        assert_eq!((entry.attempt, entry.attempts.len(), entry.attempts[0].unix), (20, LISTED, 4));
        assert_eq!((entry.next_retry_unix, entry.give_up_unix), (Some(19 + 60), Some(19 + 1800)));
        let ended = retries.end(failure, "unknown").last_error();
        assert_eq!((ended.attempt, ended.attempts.len(), ended.outcome), (20, LISTED, Outcome::GaveUp));
        assert!(ended.message.contains("gave up after 20 attempts in 0 s (retry.unknown)"), "{}", ended.message);
    }
}
