//! A switch on probation: it is undone at its deadline unless an administrator keeps it before.
//!
//! The deadline is a time of the boot-time clock, which cannot be set and which goes on while the
//! machine sleeps; like the record, it ends with the boot.

use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tracing::{info, warn};

use crate::agent::Agent;

/// The longest sleep: tokio's clock stands still while the machine sleeps.
const LOOK: Duration = Duration::from_secs(5);
/// Pause after the first attempt of an undo that cannot begin or is not complete; doubled after each further one.
const FIRST_PAUSE: Duration = Duration::from_secs(30);
/// The longest such pause.
const LONGEST_PAUSE: Duration = Duration::from_secs(300);

/// Until when, and whether it still counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Probation {
    /// Milliseconds of the boot-time clock.
    pub until_boottime_ms: u64,
    /// True once an administrator has kept the switch.
    pub kept: bool,
}

impl Probation {
    /// One that begins now.
    pub fn begin(length: Duration) -> Self {
        let length = u64::try_from(length.as_millis()).unwrap_or(u64::MAX);
        Self { until_boottime_ms: boottime_ms().saturating_add(length), kept: false }
    }

    /// The time that the switch still has; `None` once it is kept.
    pub fn left(self) -> Option<Duration> {
        let left = Duration::from_millis(self.until_boottime_ms.saturating_sub(boottime_ms()));
        (!self.kept).then_some(left)
    }
}

/// Undoes the switch when its time is over, for as long as the daemon lives.
pub(in crate::agent) async fn watch(agent: Arc<Agent>) {
    let mut changes = agent.standing.subscribe();
    loop {
        let probation = changes.borrow_and_update().probation;
        let Some(left) = probation.and_then(Probation::left) else {
            if changes.changed().await.is_err() {
                return;
            }
            continue;
        };
        if left.is_zero() {
            info!("the trial period is over: undoing the switch");
            undo_until_done(&agent).await;
            continue;
        }
        tokio::select! {
            () = tokio::time::sleep(left.min(LOOK)) => {}
            changed = changes.changed() => if changed.is_err() { return },
        }
    }
}

/// Tries to undo the switch until that succeeds. The same failure is reported once.
async fn undo_until_done(agent: &Agent) {
    let mut reported = None;
    let mut failed = 0;
    while let Err(error) = agent.undo_expired().await {
        let text = error.to_string();
        if reported.as_ref() != Some(&text) {
            warn!("cannot undo the switch whose trial period is over, trying again: {text}");
            agent.show_failure(&error);
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

fn boottime_ms() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    // Neither part is negative: the clock starts at 0.
    now.tv_sec.unsigned_abs() * 1000 + now.tv_nsec.unsigned_abs() / 1_000_000
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn pauses_between_attempts_grow_to_a_limit() {
        let pauses: Vec<_> = [0, 1, 2, 3, 4, 40, u32::MAX].map(|failed| pause_after(failed).as_secs()).into();
        assert_eq!(pauses, [30, 60, 120, 240, 300, 300, 300]);
    }

    #[test]
    fn time_runs_out_unless_it_is_kept() {
        let long = Probation::begin(Duration::from_secs(600));
        let left = long.left().unwrap();
        assert!(left > Duration::from_secs(590) && left <= Duration::from_secs(600), "{left:?}");
        assert_eq!(Probation { kept: true, ..long }.left(), None);
        let over = Probation { until_boottime_ms: 1, kept: false };
        assert_eq!(over.left(), Some(Duration::ZERO));
        assert_eq!(Probation { kept: true, ..over }.left(), None);
        assert_eq!(Probation::begin(Duration::MAX).until_boottime_ms, u64::MAX);
    }
}
