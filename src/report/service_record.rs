//! Writes a unit's service record, which a cluster installer's log gathering collects from a bootstrap machine.
//!
//! `/var/log/openshift/UNIT.json` is an array of entries, each an object of strings: `timestamp` (UTC,
//! `2026-11-21T20:00:00Z`), `phase` (`service start`, `service end`, `stage start`, `stage end`),
//! `result` (`success`, `failure`; only at an end), and optionally `stage` and `errorMessage`. The OpenShift installer
//! defines the format (its `docs/dev/bootstrap_services.md`). Its analyser shows the last message of a failed service.
//!
//! Stages are the agent's phases. The agent keeps a record if `/var/log/openshift` or the installer's library for records
//! exists. A record that cannot be written is only a warning.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde::Serialize;
use serde_json::Value;

use super::words::{short_digests, timestamp};
use super::{Phase, State, Status};
use support::clock::unix_ms;
use support::directory::Directory;

const DIRECTORY: &str = "var/log/openshift";
const LIBRARY: &str = "usr/local/bin/bootstrap-service-record.sh";

#[derive(Debug, Default, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
struct Entry {
    timestamp: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    stage: Option<&'static str>,
    phase: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    result: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    error_message: Option<String>,
}

/// The record of one run of one unit.
#[derive(Debug)]
pub struct ServiceRecord {
    directory: PathBuf,
    file: String,
    stages: Stages,
}

impl ServiceRecord {
    /// Begins the record of `unit` (`node-image-pull.service`) on the system below `root`. Returns `None` if the system
    /// does not collect records.
    ///
    /// # Errors
    /// The file cannot be read, parsed or written. Its content is unchanged.
    pub fn begin(root: &Path, unit: &str) -> Result<Option<Self>> {
        let directory = root.join(DIRECTORY);
        if !directory.is_dir() && !root.join(LIBRARY).exists() {
            return Ok(None);
        }
        let name = unit.strip_suffix(".service").unwrap_or(unit);
        let record = Self { directory, file: format!("{name}.json"), stages: Stages::default() };
        record.append(&[Entry { timestamp: timestamp(unix_ms()), phase: "service start", ..Entry::default() }])?;
        Ok(Some(record))
    }

    /// Appends the changes since the previous call. Phases that the first `status` has as completed are not recorded.
    ///
    /// # Errors
    /// As for [`ServiceRecord::begin`].
    pub fn update(&mut self, status: &Status) -> Result<()> {
        let entries = self.stages.update(status, unix_ms());
        if entries.is_empty() { Ok(()) } else { self.append(&entries) }
    }

    /// Ends the record; `failure` is the message of a failed call.
    ///
    /// # Errors
    /// As for [`ServiceRecord::begin`].
    pub fn end(mut self, failure: Option<&str>) -> Result<()> {
        let entries = self.stages.end(failure, unix_ms());
        self.append(&entries)
    }

    fn append(&self, entries: &[Entry]) -> Result<()> {
        let shown = self.directory.join(&self.file);
        let directory =
            Directory::ensure(&self.directory).with_context(|| format!("cannot use {}", shown.display()))?;
        let text = directory.read_optional(&self.file).with_context(|| format!("cannot read {}", shown.display()))?;
        let mut all: Vec<Value> = match text {
            Some(text) => serde_json::from_slice(&text)
                .with_context(|| format!("cannot parse the service record {}; it is unchanged", shown.display()))?,
            None => Vec::new(),
        };
        for entry in entries {
            all.push(serde_json::to_value(entry).context("cannot serialize a service record")?);
        }
        let text = serde_json::to_vec_pretty(&all).context("cannot serialize a service record")?;
        directory.write_atomic(&self.file, 0o644, &text).with_context(|| format!("cannot write {}", shown.display()))
    }
}

/// The stages that are recorded already.
#[derive(Debug, Default)]
struct Stages {
    /// True after the first status document.
    began: bool,
    /// Stages that ended, by phase and start.
    ended: Vec<(Phase, u64)>,
    /// The running stage.
    open: Option<(Phase, u64)>,
    /// The last recorded failure of the running stage.
    failure: Option<String>,
}

impl Stages {
    fn update(&mut self, status: &Status, now: u64) -> Vec<Entry> {
        let mut entries = Vec::new();
        if !self.began {
            self.began = true;
            let completed = status.timeline.iter().filter(|entry| entry.duration_ms.is_some());
            self.ended.extend(completed.map(|entry| (entry.phase, entry.start_unix_ms)));
            // An earlier call failed in the phase that has not ended.
            if status.state == State::Failed {
                return entries;
            }
        }
        for entry in &status.timeline {
            let key = (entry.phase, entry.start_unix_ms);
            if self.ended.contains(&key) {
                continue;
            }
            if self.open != Some(key) {
                entries.push(stage(entry.phase, "stage start", entry.start_unix_ms));
                self.open = Some(key);
                self.failure = None;
            }
            if let Some(duration) = entry.duration_ms {
                let end = entry.start_unix_ms.saturating_add(duration);
                if self.failure.take().is_some() {
                    entries.push(stage(entry.phase, "stage start", end));
                }
                entries.push(Entry { result: Some("success"), ..stage(entry.phase, "stage end", end) });
                self.ended.push(key);
                self.open = None;
            }
        }
        // A failed attempt that will be retried is recorded once per message, so that the file does not grow with each one.
        if let (Some(error), Some((phase, _))) = (&status.error, self.open)
            && error.next_retry_unix.is_some()
            && self.failure.as_ref() != Some(&error.message)
        {
            let cause = short_digests(&error.message);
            if self.failure.is_some() {
                entries.push(stage(phase, "stage start", now));
            }
            entries.push(failed(stage(phase, "stage end", now), &cause));
            self.failure = Some(error.message.clone());
        }
        entries
    }

    fn end(&mut self, failure: Option<&str>, now: u64) -> Vec<Entry> {
        let mut entries = Vec::new();
        let end = |entry, failure: Option<&str>| match failure {
            Some(message) => failed(entry, message),
            None => Entry { result: Some("success"), ..entry },
        };
        if let Some((phase, _)) = self.open.take() {
            if self.failure.is_some() {
                entries.push(stage(phase, "stage start", now));
            }
            entries.push(end(stage(phase, "stage end", now), failure));
        }
        let service = Entry { timestamp: timestamp(now), phase: "service end", ..Entry::default() };
        entries.push(end(service, failure));
        entries
    }
}

fn stage(stage: Phase, phase: &'static str, at_ms: u64) -> Entry {
    Entry { timestamp: timestamp(at_ms), stage: Some(stage.as_str()), phase, ..Entry::default() }
}

fn failed(entry: Entry, message: &str) -> Entry {
    Entry { result: Some("failure"), error_message: Some(message.to_owned()), ..entry }
}

/// Returns the service unit of a process with this text of `/proc/PID/cgroup`.
pub fn unit_of(cgroup: &str) -> Option<&str> {
    // systemd's hierarchy has the number 0 if it is the only one, and otherwise the name `systemd`.
    let line = cgroup.lines().find(|line| line.starts_with("0::/") && line.len() > 4);
    let line = line.or_else(|| cgroup.lines().find(|line| line.contains(":name=systemd:")))?;
    line.rsplit('/').find(|part| part.ends_with(".service"))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::super::{LastError, TimelineEntry};
    use super::*;

    #[test]
    fn the_unit_is_read_from_the_cgroup() {
        for (text, unit) in [
            ("0::/system.slice/node-image-pull.service\n", Some("node-image-pull.service")),
            ("5:cpu:/\n1:name=systemd:/system.slice/a.service\n0::/\n", Some("a.service")),
            ("0::/system.slice/a.service/child\n", Some("a.service")),
            ("0::/user.slice/user-0.slice/session-1.scope\n", None),
            ("", None),
        ] {
            assert_eq!(unit_of(text), unit, "{text}");
        }
    }

    fn timeline(entries: &[(Phase, u64, Option<u64>)]) -> Status {
        let timeline = entries
            .iter()
            .map(|&(phase, start_unix_ms, duration_ms)| TimelineEntry { phase, start_unix_ms, duration_ms })
            .collect();
        Status { timeline, ..Status::default() }
    }

    fn shown(entries: &[Entry]) -> Vec<String> {
        let result = |entry: &Entry| entry.result.unwrap_or("-");
        entries.iter().map(|e| format!("{} {} {}", e.stage.unwrap_or("-"), e.phase, result(e))).collect()
    }

    #[test]
    fn only_stages_of_this_run_are_recorded_and_only_once() {
        let mut stages = Stages::default();
        let before = (Phase::Resolve, 1000, Some(5));
        assert!(stages.update(&timeline(&[before]), 9).is_empty());
        let running = timeline(&[before, (Phase::Pull, 2000, None)]);
        assert_eq!(shown(&stages.update(&running, 9)), ["pull stage start -"]);
        assert!(stages.update(&running, 9).is_empty());
        let on = timeline(&[before, (Phase::Pull, 2000, Some(3000)), (Phase::Stage, 5000, Some(1000))]);
        let entries = stages.update(&on, 9);
        assert_eq!(shown(&entries), ["pull stage end success", "stage stage start -", "stage stage end success"]);
        assert_eq!(Vec::from_iter(entries.iter().map(|e| e.timestamp.clone())), [5000, 5000, 6000].map(timestamp));
        let entries = stages.end(None, 7000);
        assert_eq!(shown(&entries), ["- service end success"]);
        assert_eq!(entries[0].timestamp, timestamp(7000));
    }

    #[test]
    fn a_repeated_failure_is_recorded_once() {
        let mut stages = Stages::default();
        let mut status = timeline(&[(Phase::Resolve, 2000, None)]);
        let error = |message: &str| LastError {
            class: "network".into(),
            message: message.into(),
            attempt: 1,
            next_retry_unix: Some(1),
            ..LastError::default()
        };
        status.error = Some(error("refused"));
        assert_eq!(shown(&stages.update(&status, 9)), ["resolve stage start -", "resolve stage end failure"]);
        assert!(stages.update(&status, 9).is_empty());
        status.error = Some(error("no such host"));
        assert_eq!(shown(&stages.update(&status, 9)), ["resolve stage start -", "resolve stage end failure"]);
        status.error = None;
        status.timeline[0].duration_ms = Some(1);
        assert_eq!(shown(&stages.update(&status, 9)), ["resolve stage start -", "resolve stage end success"]);
    }

    #[test]
    fn the_phase_in_which_an_earlier_call_failed_is_not_recorded_again() {
        let before = timeline(&[(Phase::Resolve, 1000, Some(5)), (Phase::Stage, 2000, None)]);
        let before = Status { state: State::Failed, ..before };
        let mut stages = Stages::default();
        assert!(stages.update(&before, 9).is_empty());
        let again = timeline(&[(Phase::Resolve, 3000, None)]);
        assert_eq!(shown(&stages.update(&again, 9)), ["resolve stage start -"]);
        // The call fails in the same phase before the next status.
        let mut stages = Stages::default();
        assert!(stages.update(&before, 9).is_empty());
        assert_eq!(shown(&stages.update(&before, 9)), ["stage stage start -"]);
    }

    #[test]
    fn a_failure_names_its_stage_last() {
        let mut stages = Stages::default();
        stages.update(&timeline(&[(Phase::Stage, 2000, None)]), 9);
        let entries = stages.end(Some("too little RAM"), 9);
        assert_eq!(shown(&entries), ["stage stage end failure", "- service end failure"]);
        assert!(entries.iter().all(|entry| entry.error_message.as_deref() == Some("too little RAM")));
    }

    #[test]
    fn a_record_is_appended_to_only_if_the_system_collects_records() {
        let temp = tempfile::tempdir().unwrap();
        assert!(ServiceRecord::begin(temp.path(), "a.service").unwrap().is_none());
        std::fs::create_dir_all(temp.path().join("usr/local/bin")).unwrap();
        std::fs::write(temp.path().join(LIBRARY), "").unwrap();
        let start = unix_ms();
        for _ in 0..2 {
            let mut record = ServiceRecord::begin(temp.path(), "a.service").unwrap().unwrap();
            record.update(&timeline(&[(Phase::Pull, start, None)])).unwrap();
            record.end(None).unwrap();
        }
        let file = temp.path().join(DIRECTORY).join("a.json");
        let all: Vec<Value> = serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap();
        assert_eq!(
            all.iter().map(|e| e["phase"].as_str().unwrap()).collect::<Vec<_>>(),
            ["service start", "stage start", "stage end", "service end"].repeat(2)
        );
        assert!(all[0]["timestamp"].as_str().unwrap() >= timestamp(start).as_str());
        assert_eq!(all[3].as_object().unwrap().keys().collect::<Vec<_>>(), ["phase", "result", "timestamp"]);
        std::fs::write(&file, "{").unwrap();
        assert!(ServiceRecord::begin(temp.path(), "a.service").unwrap_err().to_string().contains("it is unchanged"));
        assert_eq!(std::fs::read(&file).unwrap(), b"{");
    }
}
