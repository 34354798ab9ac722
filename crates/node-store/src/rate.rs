//! The rate of a transfer over its last seconds. Pure.

use std::collections::VecDeque;

/// Time over which the rate is an average.
const WINDOW_MS: u64 = 10_000;
/// Shortest time between two recorded positions, however often the rate is read.
const STEP_MS: u64 = 250;

/// Positions of a transfer, as pairs of milliseconds and bytes, from the oldest to the newest.
#[derive(Debug, Default)]
pub(crate) struct Rate(VecDeque<(u64, u64)>);

impl Rate {
    /// Records a position, and returns the bytes per second since the oldest position of the last ten seconds.
    pub(crate) fn record(&mut self, now_ms: u64, bytes: u64) -> u64 {
        // The first of two positions stays while the second is too young to replace it.
        while self.0.get(1).is_some_and(|(time, _)| now_ms.saturating_sub(*time) >= WINDOW_MS) {
            self.0.pop_front();
        }
        if self.0.back().is_none_or(|(time, _)| now_ms.saturating_sub(*time) >= STEP_MS) {
            self.0.push_back((now_ms, bytes));
        }
        let Some((time, before)) = self.0.front() else { return 0 };
        (bytes.saturating_sub(*before) * 1000).checked_div(now_ms.saturating_sub(*time)).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rate_is_that_of_the_last_seconds() {
        let mut rate = Rate::default();
        assert_eq!(rate.record(1_000, 0), 0);
        assert_eq!(rate.record(1_000, 50), 0, "no time has passed");
        assert_eq!(rate.record(1_500, 500), 1_000);
        for second in 2..20 {
            rate.record(second * 1_000, 500);
        }
        assert_eq!(rate.record(20_000, 500), 0, "nothing arrived for more than ten seconds");
        assert_eq!(rate.record(21_000, 10_500), 1_000);
        assert!(rate.0.len() <= 12, "{rate:?}");
        for millisecond in 0..1_000 {
            rate.record(22_000 + millisecond, 10_500);
        }
        assert!(rate.0.len() <= 16, "{rate:?}");
    }
}
