//! When to try again: exponential backoff with jitter, a pure function.

use std::time::Duration;

/// The delays between attempts. In seconds in the configuration, durations here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RetryPolicy {
    /// The delay after the first failure.
    pub initial: Duration,
    /// No delay is longer, except when the registry asks for it.
    pub maximum: Duration,
    /// How many attempts in all; 0 is without end, because nobody can log in to press a button.
    pub attempts: u32,
}

impl RetryPolicy {
    /// The delay before the next attempt after `failed` attempts, or `None` when there is none.
    ///
    /// `jitter` in 0..=1 spreads machines that fail together over half of the delay. A `Retry-After`
    /// of the registry is a lower bound, even over `maximum`.
    pub fn delay(&self, failed: u32, retry_after: Option<Duration>, jitter: f64) -> Option<Duration> {
        if self.attempts != 0 && failed >= self.attempts {
            return None;
        }
        let doublings = failed.saturating_sub(1).min(31);
        let backoff = self.initial.saturating_mul(1 << doublings).min(self.maximum);
        let spread = backoff.mul_f64(0.5 + 0.5 * jitter.clamp(0.0, 1.0));
        Some(spread.max(retry_after.unwrap_or_default()))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const POLICY: RetryPolicy =
        RetryPolicy { initial: Duration::from_secs(2), maximum: Duration::from_secs(60), attempts: 0 };

    #[test]
    fn doubles_up_to_the_maximum() {
        let seconds: Vec<_> = (1..=8).map(|n| POLICY.delay(n, None, 1.0).unwrap().as_secs()).collect();
        assert_eq!(seconds, [2, 4, 8, 16, 32, 60, 60, 60]);
        assert_eq!(POLICY.delay(1, None, 0.0).unwrap(), Duration::from_secs(1));
    }

    #[test]
    fn the_registry_is_obeyed() {
        let asked = Some(Duration::from_secs(120));
        assert_eq!(POLICY.delay(1, asked, 0.5).unwrap(), Duration::from_secs(120));
    }

    #[test]
    fn ends_when_told_to() {
        let policy = RetryPolicy { attempts: 3, ..POLICY };
        assert!(policy.delay(2, None, 0.5).is_some());
        assert!(policy.delay(3, None, 0.5).is_none());
    }

    proptest! {
        #[test]
        fn bounded_and_total(failed: u32, jitter in -1.0f64..2.0) {
            let delay = POLICY.delay(failed, None, jitter).unwrap();
            prop_assert!(delay >= POLICY.initial / 2 && delay <= POLICY.maximum);
        }
    }
}
