//! The properties that `PropertiesChanged` announces, with their D-Bus types. Pure.

use std::collections::HashMap;

use zbus::Variant;

use crate::report::Status;

/// The last failure: class, message, attempt, next retry (seconds since the epoch, 0 for none).
pub(super) type LastErrorTuple = (String, String, u32, u64);

/// A phase: name, start in milliseconds since the epoch, duration in milliseconds (0 while it runs).
pub(super) type TimelineTuple = (String, u64, u64);

/// Values of the announced properties.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Announced {
    pub(super) state: String,
    pub(super) phase: String,
    pub(super) last_error: LastErrorTuple,
    pub(super) undo_at: u64,
    pub(super) timeline: Vec<TimelineTuple>,
}

impl From<&Status> for Announced {
    fn from(status: &Status) -> Self {
        let error = status.error.clone();
        let timeline = status.timeline.iter();
        Self {
            state: word(&status.state),
            phase: status.phase.map(|phase| phase.as_str().to_owned()).unwrap_or_default(),
            last_error: error
                .map(|error| (error.class, error.message, error.attempt, error.next_retry_unix.unwrap_or(0)))
                .unwrap_or_default(),
            undo_at: status.undo_unix.unwrap_or(0),
            timeline: timeline
                .map(|entry| (entry.phase.as_str().to_owned(), entry.start_unix_ms, entry.duration_ms.unwrap_or(0)))
                .collect(),
        }
    }
}

impl Announced {
    /// Returns the properties whose values differ from `before`, by name.
    pub(super) fn changes(&self, before: &Self) -> HashMap<&'static str, Variant<'_>> {
        let mut changes = HashMap::new();
        let mut add = |name, differs, value: Variant<'static>| {
            if differs {
                changes.insert(name, value);
            }
        };
        add("State", self.state != before.state, self.state.clone().into());
        add("Phase", self.phase != before.phase, self.phase.clone().into());
        add("LastError", self.last_error != before.last_error, self.last_error.clone().into());
        add("UndoAt", self.undo_at != before.undo_at, self.undo_at.into());
        add("Timeline", self.timeline != before.timeline, self.timeline.clone().into());
        changes
    }
}

/// The serialised word of a unit variant.
fn word(value: &impl serde::Serialize) -> String {
    match serde_json::to_value(value) {
        Ok(serde_json::Value::String(word)) => word,
        _ => String::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::{LastError, State};

    #[test]
    fn a_state_is_its_word() {
        assert_eq!(word(&State::NothingToDo), "nothing-to-do");
    }

    #[test]
    fn only_what_changed_is_announced() {
        let before = Announced::from(&Status::default());
        assert!(before.changes(&before).is_empty());
        let error = LastError { message: "m".into(), ..LastError::default() };
        let status = Status { state: State::Failed, error: Some(error), ..Status::default() };
        let now = Announced::from(&status);
        let mut names: Vec<_> = now.changes(&before).into_keys().collect();
        names.sort_unstable();
        assert_eq!(names, ["LastError", "State"]);
        assert_eq!(Announced { undo_at: 7, ..now.clone() }.changes(&now), HashMap::from([("UndoAt", 7u64.into())]));
    }
}
