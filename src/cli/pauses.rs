//! Pauses between messages about failures. They grow, because the messages are written over a login prompt.

use std::collections::BTreeMap;

/// The first pause in seconds; doubled after each message.
const FIRST: u64 = 30;
/// The longest pause in seconds.
const LONGEST: u64 = 30 * 60;
/// Shortest time between messages about progress, in seconds.
const PROGRESS: u64 = 5;

/// The messages so far.
#[derive(Debug, Default)]
pub(super) struct Pauses {
    /// For each class, the time of the next message and the pause before it.
    failures: BTreeMap<String, (u64, u64)>,
    progress: u64,
}

impl Pauses {
    /// Returns true if a message about a failure of this class is due. The first one of a class always is.
    pub(super) fn failure_is_due(&mut self, class: &str, now: u64) -> bool {
        let pause = match self.failures.get(class) {
            Some((next, _)) if now < *next => return false,
            Some((_, pause)) => (pause * 2).min(LONGEST),
            None => FIRST,
        };
        self.failures.insert(class.to_owned(), (now + pause, pause));
        true
    }

    /// Returns true if a message about progress is due.
    pub(super) fn progress_is_due(&mut self, now: u64) -> bool {
        let due = now >= self.progress;
        if due {
            self.progress = now + PROGRESS;
        }
        due
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_between_messages_grow_for_each_cause() {
        let mut pauses = Pauses::default();
        let shown: Vec<u64> = (0..10_000).filter(|second| pauses.failure_is_due("network", *second)).collect();
        assert_eq!(shown, [0, 30, 90, 210, 450, 930, 1890, 3690, 5490, 7290, 9090]);
        assert!(pauses.failure_is_due("unauthorized", 10_000));
        assert!(!pauses.failure_is_due("unauthorized", 10_029));
        assert!(pauses.failure_is_due("unauthorized", 10_030));
        let mut pauses = Pauses::default();
        let class = |second| ["network", "truncated"][second as usize / 5 % 2];
        let shown = (0..10_000).filter(|second| pauses.failure_is_due(class(*second), *second)).count();
        assert!(shown <= 22, "two causes in turn: {shown} messages");
        let progress: Vec<u64> = (0..12).filter(|second| pauses.progress_is_due(*second)).collect();
        assert_eq!(progress, [0, 5, 10]);
    }
}
