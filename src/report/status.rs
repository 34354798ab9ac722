//! The status document, which `status --json` prints and the D-Bus properties are read from.

use node_store::ProgressSnapshot;
use node_store::image::ImageChoice;
use serde::{Deserialize, Serialize};

use super::diagnosis::Diagnosis;
use super::words::{if_known, one_line, short_digests};
use super::{Outcome, Phase, Reason, Standing};
use unit_refresh::Flow;

/// State of the whole pivot.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "kebab-case")]
pub enum State {
    /// No pivot was requested yet.
    #[default]
    Idle,
    /// A phase is running.
    Running,
    /// An attempt failed; another one is scheduled.
    Waiting,
    /// The node image is pulled and staged; the running system is unchanged.
    Pulled,
    /// `/usr` and `/etc` are the node image's.
    Switched,
    /// Isolated to the original default target.
    Done,
    /// A failure without another scheduled attempt.
    Failed,
    /// The system already has the cluster's programs.
    NothingToDo,
    /// A state of another version of the agent.
    #[serde(other)]
    Other,
}

/// The last failure, kept until the next success.
#[derive(Debug, Default, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct LastError {
    /// Class of the failure, a stable word (`network`, `unauthorized`, …).
    pub class: String,
    /// Cause and remedy, for a person.
    pub message: String,
    /// Number of failed attempts.
    pub attempt: u32,
    /// Start of the next attempt, in seconds since the epoch; absent if none is scheduled.
    pub next_retry_unix: Option<u64>,
    /// Time of the first failure, in seconds since the epoch; absent if unknown.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub since_unix: Option<u64>,
    /// End of the retries, in seconds since the epoch; absent if they have no time limit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub give_up_unix: Option<u64>,
    /// The latest failed attempts, oldest first.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub attempts: Vec<Attempt>,
    /// Outcome of the call; the default while another attempt is scheduled.
    #[serde(default)]
    pub outcome: Outcome,
    /// State of the running system, if known.
    #[serde(default, deserialize_with = "if_known", skip_serializing_if = "Option::is_none")]
    pub standing: Option<Standing>,
    /// All checks that refused.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub refusals: Vec<Reason>,
}

/// A failed attempt.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct Attempt {
    /// Time of the failure, in seconds since the epoch.
    pub unix: u64,
    /// As [`LastError::class`].
    pub class: String,
    /// Cause of the failure.
    pub message: String,
}

/// A phase in the timeline.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct TimelineEntry {
    /// The phase.
    pub phase: Phase,
    /// Its start, in milliseconds since the epoch.
    pub start_unix_ms: u64,
    /// Its duration in milliseconds; absent while it runs.
    pub duration_ms: Option<u64>,
}

/// Cost of the pivot for this machine.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct Cost {
    /// Compressed bytes fetched from the registry.
    pub bytes_fetched: u64,
    /// Bytes of RAM that the node store's tmpfs holds.
    pub ram_store_bytes: u64,
}

/// A unit whose processes run files that the node image has replaced.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct StaleUnit {
    /// Name of the unit.
    pub unit: String,
    /// The replaced files, relative to `/usr`.
    pub files: Vec<String>,
}

/// The agent's process.
#[derive(Debug, Default, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct AgentState {
    /// True if it answers.
    pub running: bool,
    /// `ActiveState` of its unit, if systemd answers; absent for a running agent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub unit: Option<String>,
    /// `Result` of its unit, such as `start-limit-hit`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub result: Option<String>,
}

impl AgentState {
    /// Returns the state as one line.
    pub fn line(&self) -> String {
        const UNIT: &str = "node-image-pivotd.service";
        match (self.running, self.unit.as_deref(), self.result.as_deref()) {
            (true, ..) => "running".to_owned(),
            (_, Some("failed"), result) => format!(
                "not running: {UNIT} failed ({}); see journalctl -b -u {UNIT}, then run systemctl reset-failed {UNIT}",
                result.unwrap_or("unknown")
            ),
            (_, Some(state), _) => format!("not running: {UNIT} is {state}; the next command starts it"),
            (_, None, _) => "not running, and systemd does not answer".to_owned(),
        }
    }
}

/// Version of the status document.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Schema(u32);

impl Default for Schema {
    fn default() -> Self {
        Self(1)
    }
}

/// The status document. `schema` changes only if a field changes its meaning or is removed.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(default)]
pub struct Status {
    /// Version of this document: 1.
    #[cfg_attr(test, schemars(with = "u32"))]
    pub schema: Schema,
    /// State of the pivot.
    pub state: State,
    /// The running phase, or the last one.
    pub phase: Option<Phase>,
    /// The requested pull spec.
    pub image: Option<String>,
    /// Image that was chosen from the release payload, if one is configured.
    #[cfg_attr(test, schemars(with = "Option<serde_json::Value>"))]
    #[serde(default, deserialize_with = "if_known", skip_serializing_if = "Option::is_none")]
    pub image_choice: Option<ImageChoice>,
    /// The manifest's digest, after resolve.
    pub digest: Option<String>,
    /// The ostree commit, after pull.
    pub commit: Option<String>,
    /// The target to isolate to in finish.
    pub target: Option<String>,
    /// The flow of this machine; absent until the agent knows it.
    #[cfg_attr(test, schemars(with = "Option<String>"))]
    #[serde(default, deserialize_with = "if_known", skip_serializing_if = "Option::is_none")]
    pub flow: Option<Flow>,
    /// Counters of the pull.
    #[cfg_attr(test, schemars(with = "std::collections::BTreeMap<String, u64>"))]
    pub progress: ProgressSnapshot,
    /// Share of the running phase that is done, in percent; absent if it is unknown, and for a pull, which has counters.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub percent: Option<u8>,
    /// The object that the running phase waits for, such as a lock and its holder.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub waiting_for: Option<String>,
    /// The running call; another call waits for its end.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub call: Option<String>,
    /// The diagnosis of a pivot that waits or has failed. Determined when the document is read.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub diagnosis: Option<Diagnosis>,
    /// The agent itself; absent in documents of older agents. Determined when the document is read.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub agent: Option<AgentState>,
    /// The last failure.
    pub error: Option<LastError>,
    /// The phases that have begun.
    pub timeline: Vec<TimelineEntry>,
    /// Cost of the pivot.
    pub cost: Cost,
    /// End of the trial period, in seconds since the epoch: the switch is undone then unless an administrator keeps it.
    /// Absent without a trial period.
    #[serde(default)]
    pub undo_unix: Option<u64>,
    /// Units that still ran the bootimage's code when the last phase ended.
    #[serde(default)]
    pub still_old: Vec<StaleUnit>,
    /// Changes and warnings for the summary, a line each.
    pub notes: Vec<String>,
    /// Differences from the state that the switch left, a line each: a mount covers `/usr`, or another image is
    /// configured. Determined when the document is read.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub deviations: Vec<String>,
}

impl Status {
    /// Returns the diagnosis of a pivot that waits or has failed.
    pub fn diagnose(&self) -> Option<Diagnosis> {
        let error = self.error.as_ref()?;
        let ended = match self.state {
            State::Waiting => false,
            State::Failed => true,
            _ => return None,
        };
        let command = match (ended, error.standing, self.flow) {
            (false, ..) => "node-image-pivot status --watch",
            (_, Some(Standing::HalfDone), _) => "node-image-pivot undo",
            (_, _, Some(Flow::Bootstrap)) => "systemctl start node-image-finish.service",
            (_, _, Some(Flow::Live)) => "systemctl start node-image-overlay.service",
            (_, _, None) => "node-image-pivot run",
        };
        Some(Diagnosis {
            class: error.class.clone(),
            phase: self.phase,
            cause: short_digests(&one_line(&error.message)),
            since_unix: error.since_unix,
            attempts: error.attempt,
            next_unix: error.next_retry_unix,
            outcome: ended.then_some(error.outcome),
            standing: error.standing,
            command: command.to_owned(),
        })
    }

    /// Returns the command that explains the refusals of the last failure, or else its class.
    pub fn explain_command(&self) -> Option<String> {
        let error = self.error.as_ref()?;
        let mut names = Vec::new();
        for refusal in &error.refusals {
            if !names.contains(&refusal.id.as_str()) {
                names.push(&refusal.id);
            }
        }
        if names.is_empty() {
            names.push(&error.class);
        }
        Some(format!("node-image-pivot explain {}", names.join(" ")))
    }
}
