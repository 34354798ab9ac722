//! Pauses between messages about the same failure. They grow, because the messages are written over a login prompt.

/// The first pause in seconds; doubled after each message.
const FIRST: u64 = 30;
/// The longest pause in seconds.
const LONGEST: u64 = 30 * 60;
/// Shortest time between messages about progress, in seconds.
const PROGRESS: u64 = 5;

/// The messages so far.
#[derive(Debug, Default)]
pub(super) struct Pauses {
    class: Option<String>,
    next: u64,
    pause: u64,
    progress: u64,
}

impl Pauses {
    /// Returns true if a message about a failure of this class is due. The first one of a class always is.
    pub(super) fn failure_is_due(&mut self, class: &str, now: u64) -> bool {
        if self.class.as_deref() != Some(class) {
            (self.class, self.pause) = (Some(class.to_owned()), FIRST);
        } else if now < self.next {
            return false;
        } else {
            self.pause = (self.pause * 2).min(LONGEST);
        }
        self.next = now + self.pause;
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
    fn pauses_between_messages_grow_and_begin_again_with_another_cause() {
        let mut pauses = Pauses::default();
        let shown: Vec<u64> = (0..10_000).filter(|second| pauses.failure_is_due("network", *second)).collect();
        assert_eq!(shown, [0, 30, 90, 210, 450, 930, 1890, 3690, 5490, 7290, 9090]);
        assert!(pauses.failure_is_due("unauthorized", 10_000));
        assert!(!pauses.failure_is_due("unauthorized", 10_029));
        assert!(pauses.failure_is_due("unauthorized", 10_030));
        let progress: Vec<u64> = (0..12).filter(|second| pauses.progress_is_due(*second)).collect();
        assert_eq!(progress, [0, 5, 10]);
    }
}
