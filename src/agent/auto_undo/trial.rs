//! The trial period of a switch: at its end the agent undoes the switch, unless an administrator has kept it.
//!
//! The deadline is a time of the boot-time clock, which cannot be set and which runs while the machine is suspended. Like
//! the record, it ends with the boot.

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tracing::{info, warn};

use crate::agent::{Agent, Error};
use support::clock::boottime_ms;

/// The longest sleep, because tokio's clock stops while the machine is suspended.
const LOOK: Duration = Duration::from_secs(5);
/// Pause after the first attempt of an undo that cannot begin or is not complete; doubled after each further one.
const FIRST_PAUSE: Duration = Duration::from_secs(30);
/// The longest such pause.
const LONGEST_PAUSE: Duration = Duration::from_secs(300);

/// A deadline, and the decision of an administrator about it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct TrialPeriod {
    /// Milliseconds of the boot-time clock.
    pub until_boottime_ms: u64,
    /// True once an administrator has kept the switch.
    pub kept: bool,
}

impl TrialPeriod {
    /// Returns a trial period that begins now.
    pub fn begin(length: Duration) -> Self {
        let length = u64::try_from(length.as_millis()).unwrap_or(u64::MAX);
        Self { until_boottime_ms: boottime_ms().saturating_add(length), kept: false }
    }

    /// Returns the time until the undo, or `None` once the switch is kept.
    pub fn left(self) -> Option<Duration> {
        let left = Duration::from_millis(self.until_boottime_ms.saturating_sub(boottime_ms()));
        (!self.kept).then_some(left)
    }
}

/// Undoes the switch at the end of its trial period. Returns when the agent ends.
pub(in crate::agent) async fn watch(agent: Arc<Agent>) {
    let mut changes = agent.standing.subscribe();
    loop {
        let trial = changes.borrow_and_update().trial;
        let Some(left) = trial.and_then(TrialPeriod::left) else {
            if changes.changed().await.is_err() {
                return;
            }
            continue;
        };
        if left.is_zero() {
            info!("the trial period is over: undoing the switch");
            let report = |error: &Error| {
                warn!("cannot undo the switch whose trial period is over, trying again: {error}");
                agent.show_failure(error);
            };
            until_done(|| agent.undo_expired(), report, pause_after).await;
            continue;
        }
        tokio::select! {
            () = tokio::time::sleep(left.min(LOOK)) => {}
            changed = changes.changed() => if changed.is_err() { return },
        }
    }
}

/// Calls `attempt` until it succeeds, with a pause after each failure. Passes a failure to `report` unless the attempt
/// before failed in the same way.
async fn until_done<F: Future<Output = Result<(), Error>>>(
    mut attempt: impl FnMut() -> F,
    report: impl Fn(&Error),
    pause_after: impl Fn(u32) -> Duration,
) {
    let mut reported = None;
    let mut failed = 0;
    while let Err(error) = attempt().await {
        let text = error.to_string();
        if reported.as_ref() != Some(&text) {
            report(&error);
            reported = Some(text);
        }
        tokio::time::sleep(pause_after(failed)).await;
        failed += 1;
    }
}

/// Returns the pause after a failed attempt, which `failed` others came before.
fn pause_after(failed: u32) -> Duration {
    FIRST_PAUSE.saturating_mul(2_u32.saturating_pow(failed)).min(LONGEST_PAUSE)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::cell::RefCell;

    use super::*;
    use crate::report::RefusalId;

    #[test]
    fn pauses_between_attempts_grow_to_a_limit() {
        let pauses: Vec<_> = [0, 1, 2, 3, 4, 40, u32::MAX].map(|failed| pause_after(failed).as_secs()).into();
        assert_eq!(pauses, [30, 60, 120, 240, 300, 300, 300]);
    }

    #[tokio::test]
    async fn attempts_go_on_until_one_succeeds_and_the_same_failure_is_reported_once() {
        let mut failures = ["a", "a", "b", "b", "b", "a"].into_iter();
        let (reported, pauses) = (RefCell::new(Vec::new()), RefCell::new(Vec::new()));
        let attempt =
            || std::future::ready(failures.next().map_or(Ok(()), |text| Err(Error::refused(RefusalId::WayBack, text))));
        let report = |error: &Error| reported.borrow_mut().push(error.to_string());
        let pause = |failed| {
            pauses.borrow_mut().push(failed);
            Duration::ZERO
        };
        until_done(attempt, report, pause).await;
        let [a, b] = ["a", "b"].map(|text| Error::refused(RefusalId::WayBack, text).to_string());
        assert_eq!(*reported.borrow(), [a.clone(), b, a]);
        assert_eq!(*pauses.borrow(), [0, 1, 2, 3, 4, 5]);
    }

    #[test]
    fn time_runs_out_unless_it_is_kept() {
        let long = TrialPeriod::begin(Duration::from_secs(600));
        let left = long.left().unwrap();
        assert!(left > Duration::from_secs(300) && left <= Duration::from_secs(600), "{left:?}");
        assert_eq!(TrialPeriod { kept: true, ..long }.left(), None);
        let over = TrialPeriod { until_boottime_ms: 1, kept: false };
        assert_eq!(over.left(), Some(Duration::ZERO));
        assert_eq!(TrialPeriod { kept: true, ..over }.left(), None);
        assert_eq!(TrialPeriod::begin(Duration::MAX).until_boottime_ms, u64::MAX);
    }
}
