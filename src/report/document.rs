//! The report: `report --json`, from which the table and the picture are made.

use serde::{Deserialize, Serialize};

use super::timeline::Span;
use super::words::timestamp;
use super::{SpanResult, Status, Subject, Timeline};
use support::clock::{boottime_ms, unix_ms};

/// The state of the pivot and all that the agent did. `docs/schema/report.json` is its schema.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(default)]
pub struct Report {
    /// Version of this document: 1. It changes only if a field changes its meaning or is removed.
    pub schema: u32,
    /// Version of the agent.
    pub version: String,
    /// Wall-clock time at which the clock of the timeline was 0, in milliseconds since the epoch.
    pub boot_unix_ms: u64,
    /// Time of this document, on the clock of the timeline.
    pub now_ms: u64,
    /// The status document.
    pub status: Status,
    /// The timeline.
    pub timeline: Timeline,
}

impl Report {
    /// Returns the report of this moment.
    pub fn new(status: Status, timeline: Timeline) -> Self {
        let now_ms = boottime_ms();
        let version = env!("CARGO_PKG_VERSION").to_owned();
        Self { schema: 1, version, boot_unix_ms: unix_ms().saturating_sub(now_ms), now_ms, status, timeline }
    }

    /// Returns a line for each switch and undo, in their order: its time, its result and its failure.
    pub fn events(&self) -> Vec<String> {
        let line = |span: &Span| {
            let what = match span.subject {
                Subject::Mount => "switch",
                Subject::Undo => span.name.as_str(),
                _ => return None,
            };
            let failure = match span.result {
                Some(SpanResult::Done) => String::new(),
                Some(SpanResult::Other) => " ended".to_owned(),
                Some(_) => format!(" failed: {}", span.detail.as_deref().unwrap_or("interrupted")),
                None => " is under way".to_owned(),
            };
            Some(format!("{} {what}{failure}", timestamp(self.boot_unix_ms + span.start_ms)))
        };
        self.timeline.spans.iter().filter_map(line).collect()
    }

    /// Returns the wall-clock time of the document, in seconds since the epoch.
    pub fn now_unix(&self) -> u64 {
        (self.boot_unix_ms + self.now_ms) / 1000
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::report::Phase;
    use crate::report::timeline::tests::pivot;

    /// `UPDATE_SCHEMA=1` writes the file again.
    #[test]
    fn the_schema_is_that_of_the_types() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/schema/report.json");
        let schema = serde_json::to_string_pretty(&schemars::schema_for!(Report)).unwrap() + "\n";
        if std::env::var_os("UPDATE_SCHEMA").is_some() {
            std::fs::write(path, &schema).unwrap();
        }
        assert_eq!(std::fs::read_to_string(path).unwrap(), schema, "run this test with UPDATE_SCHEMA=1");
    }

    #[test]
    fn a_report_of_another_version_is_read() {
        let report = Report::new(Status::default(), pivot(3));
        let mut value = serde_json::to_value(&report).unwrap();
        assert_eq!(serde_json::from_value::<Report>(value.clone()).unwrap(), report);
        value["added"] = true.into();
        value["timeline"]["layers"][0]["added"] = true.into();
        assert_eq!(serde_json::from_value::<Report>(value.clone()).unwrap(), report);
        for word in ["subject", "result"] {
            value["timeline"]["spans"][0][word] = "added".into();
        }
        value["timeline"].as_object_mut().unwrap().remove("dropped");
        value["timeline"]["layers"][0]["result"] = "added".into();
        for word in ["state", "phase", "flow", "image_choice"] {
            value["status"][word] = "added".into();
        }
        value["status"]["error"] =
            serde_json::json!({"class": "x", "message": "m", "attempt": 1, "standing": "added", "outcome": "added"});
        let read: Report = serde_json::from_value(value).unwrap();
        let span = &read.timeline.spans[0];
        assert_eq!((span.subject, span.result), (Subject::Other, Some(SpanResult::Other)));
        assert_eq!((read.status.phase, read.status.flow), (Some(Phase::Other), None));
        assert_eq!(read.status.error.unwrap().standing, None);
        assert_eq!(read.timeline.spans[1..], report.timeline.spans[1..]);
    }

    /// The state directory is in RAM.
    #[test]
    fn the_timeline_of_many_layers_is_small() {
        let bytes = |layers| serde_json::to_vec_pretty(&pivot(layers)).unwrap().len();
        assert!(bytes(500) < 320 << 10, "{} bytes", bytes(500));
        println!("{} bytes with 10 layers, {} with 500", bytes(10), bytes(500));
    }
}
