//! The properties that `PropertiesChanged` announces, with their D-Bus types. Pure.

use std::collections::{BTreeMap, HashMap};

use zbus::Variant;

use crate::report::Status;
use node_store::ProgressSnapshot;

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
    /// Pull spec and digest.
    pub(super) image: (String, String),
    pub(super) progress: BTreeMap<String, u64>,
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
            image: (status.image.clone().unwrap_or_default(), status.digest.clone().unwrap_or_default()),
            progress: counters(&status.progress),
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
        add("Image", self.image != before.image, self.image.clone().into());
        add("Progress", self.progress != before.progress, self.progress.clone().into());
        add("Timeline", self.timeline != before.timeline, self.timeline.clone().into());
        changes
    }
}

/// Returns the counters of a pull by name, and `seconds_left` if the rate is known.
fn counters(progress: &ProgressSnapshot) -> BTreeMap<String, u64> {
    let mut counters: BTreeMap<_, _> = match serde_json::to_value(progress) {
        Ok(serde_json::Value::Object(map)) => {
            map.into_iter().filter_map(|(name, value)| Some((name, value.as_u64()?))).collect()
        }
        _ => BTreeMap::new(),
    };
    let left = progress.bytes_total.saturating_sub(progress.bytes_fetched);
    counters.extend(left.checked_div(progress.bytes_per_second).map(|seconds| ("seconds_left".to_owned(), seconds)));
    counters
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
    fn every_counter_is_announced_with_the_remaining_time() {
        let mut progress = ProgressSnapshot { bytes_total: 700, bytes_fetched: 100, ..Default::default() };
        let document = serde_json::to_value(progress).expect("a document");
        assert_eq!(counters(&progress).len(), document.as_object().map_or(0, serde_json::Map::len));
        progress.bytes_per_second = 100;
        assert_eq!(counters(&progress)["seconds_left"], 6);
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
