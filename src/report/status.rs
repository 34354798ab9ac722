//! The status document: what `status --json` prints and the D-Bus properties are taken from.

use node_store::ProgressSnapshot;
use node_store::image::ImageChoice;
use serde::{Deserialize, Serialize};

use super::{Outcome, Reason, Standing};

/// The six phases, in order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Phase {
    /// Pull spec to digest.
    Resolve,
    /// Layers to ostree objects.
    Pull,
    /// Delta tree, `/etc` plan, preflight.
    Stage,
    /// One `move_mount`, then `/etc`.
    Switch,
    /// Users, files, caches, PID 1, units.
    Refresh,
    /// Isolate to the original default target.
    Finish,
}

impl Phase {
    /// The name used everywhere: status document, journal, console.
    pub fn as_str(self) -> &'static str {
        match self {
            Phase::Resolve => "resolve",
            Phase::Pull => "pull",
            Phase::Stage => "stage",
            Phase::Switch => "switch",
            Phase::Refresh => "refresh",
            Phase::Finish => "finish",
        }
    }
}

/// State of the whole pivot.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum State {
    /// Nothing asked for yet.
    #[default]
    Idle,
    /// A phase is running.
    Running,
    /// A transient failure; another attempt is scheduled.
    Waiting,
    /// Everything is staged; the running system is untouched.
    Pulled,
    /// `/usr` and `/etc` are the node image's.
    Switched,
    /// Isolated to the original default target.
    Done,
    /// A permanent failure.
    Failed,
    /// The system already has the cluster's binaries.
    NothingToDo,
}

/// The last failure, kept until the next success.
#[derive(Debug, Default, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LastError {
    /// A stable word for what went wrong (`network`, `unauthorized`, …).
    pub class: String,
    /// For a person: what, and what to do.
    pub message: String,
    /// How many attempts have failed.
    pub attempt: u32,
    /// When the next attempt starts, in seconds since the epoch; absent when there is none.
    pub next_retry_unix: Option<u64>,
    /// When retries end, in seconds since the epoch; absent where they have no limit in time.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub give_up_unix: Option<u64>,
    /// The latest attempts that failed, oldest first.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub attempts: Vec<Attempt>,
    /// End of the call; as long as another attempt is scheduled, this is the default.
    #[serde(default)]
    pub outcome: Outcome,
    /// State of the running system, where the failure says it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub standing: Option<Standing>,
    /// Every check that refused.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub refusals: Vec<Reason>,
}

/// One attempt that failed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attempt {
    /// When it failed, in seconds since the epoch.
    pub unix: u64,
    /// The same word as [`LastError::class`].
    pub class: String,
    /// What failed.
    pub message: String,
}

/// One phase that ran.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TimelineEntry {
    /// Which phase.
    pub phase: Phase,
    /// When it began, in milliseconds since the epoch.
    pub start_unix_ms: u64,
    /// How long it took; absent while it runs.
    pub duration_ms: Option<u64>,
}

/// Cost of the pivot for this machine.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cost {
    /// Compressed bytes fetched from the registry.
    pub bytes_fetched: u64,
    /// Bytes of RAM that the node store's tmpfs holds.
    pub ram_store_bytes: u64,
}

/// A unit whose processes run files that the node image has replaced.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StillOld {
    /// Which.
    pub unit: String,
    /// The files, relative to `/usr`.
    pub files: Vec<String>,
}

/// The status document. `schema` changes only when a field changes its meaning or goes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// Version of this document: 1.
    pub schema: u32,
    /// State of the pivot.
    pub state: State,
    /// The phase that runs or failed.
    pub phase: Option<Phase>,
    /// The pull spec asked for.
    pub image: Option<String>,
    /// Image of the release payload, where one is asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image_choice: Option<ImageChoice>,
    /// The manifest's digest, once resolved.
    pub digest: Option<String>,
    /// The ostree commit, once pulled.
    pub commit: Option<String>,
    /// The target to isolate to in the end.
    pub target: Option<String>,
    /// Counters of the pull.
    pub progress: ProgressSnapshot,
    /// What the running phase waits for, such as a lock and who holds it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub waiting_for: Option<String>,
    /// Call that is under way; another one waits for its end.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub call: Option<String>,
    /// The last failure.
    pub error: Option<LastError>,
    /// Phases so far.
    pub timeline: Vec<TimelineEntry>,
    /// Its cost.
    pub cost: Cost,
    /// The time at which the switch is undone unless an administrator keeps it, in seconds since the epoch; absent for one
    /// that stays.
    #[serde(default)]
    pub undo_unix: Option<u64>,
    /// What still ran the bootimage's code when the last phase ended.
    #[serde(default)]
    pub still_old: Vec<StillOld>,
    /// Changes, one line each; for the summary.
    pub notes: Vec<String>,
    /// Differences by now from what the switch left, one line each: `/usr` is covered, another image is configured.
    /// Looked for when the document is read.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub deviations: Vec<String>,
}

impl Default for Status {
    fn default() -> Self {
        Self {
            schema: 1,
            state: State::Idle,
            phase: None,
            image: None,
            image_choice: None,
            digest: None,
            commit: None,
            target: None,
            progress: ProgressSnapshot::default(),
            waiting_for: None,
            call: None,
            error: None,
            timeline: Vec::new(),
            cost: Cost::default(),
            undo_unix: None,
            still_old: Vec::new(),
            notes: Vec::new(),
            deviations: Vec::new(),
        }
    }
}
