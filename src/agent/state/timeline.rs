//! The timeline as a state file. It is only for people, so a failure to read or write it is logged and changes nothing.

use tracing::warn;

use super::{StateDir, StateFile, if_present};
use crate::report::{Timeline, Tracker};

impl StateFile for Timeline {
    const NAME: &'static str = "timeline.json";
    const SUBJECT: &'static str = "the timeline";
    const REMEDY: &'static str = "it begins again";
}

/// Loads the timeline of the last agent, or begins without one.
pub(in crate::agent) fn load_timeline(dir: &StateDir) -> Timeline {
    let loaded = if_present(dir.load()).inspect_err(|error| warn!("{error}"));
    loaded.ok().flatten().unwrap_or_default()
}

/// Saves the timeline up to now.
pub(in crate::agent) fn save_timeline(dir: &StateDir, tracker: &Tracker) {
    if let Err(error) = dir.save(&tracker.timeline(), None) {
        warn!("{error:#}");
    }
}

#[cfg(test)]
mod tests {
    use super::super::survives_every_damage;
    use super::*;
    use crate::report::{Status, Subject};

    #[test]
    fn the_timeline_survives_the_file_and_ends_with_its_agent() {
        let tracker = Tracker::new(Status::default());
        let span = tracker.span(Subject::Hook, "50-drain");
        survives_every_damage(&tracker.timeline());
        let loaded = Tracker::new(Status::default()).with_timeline(tracker.timeline()).timeline();
        assert!(loaded.spans.iter().all(|span| span.end_ms.is_some()), "{loaded:?}");
        drop(span);
    }
}
