//! What is remembered between phases, in `/run/node-image-pivot/state.json`.

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

use super::Paths;
use crate::dirfd::Directory;
use crate::image::ResolvedImage;
use crate::import::PulledImage;
use crate::report::{State, Status, human_bytes};
use crate::stage::Delta;
use crate::units::{Action, Flow};

/// Version of the record's format. A record of another version is refused, not guessed at.
const SCHEMA: u32 = 1;
const FILE: &str = "state.json";

/// Everything that the switch needs, decided and checked.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct StagedRoot {
    /// What was pulled.
    pub pulled: PulledImage,
    /// The delta tree.
    pub delta: Delta,
    /// One line per class of the `/etc` plan, conflicts by name.
    pub etc: Vec<String>,
}

impl StagedRoot {
    /// The plan for a person.
    pub fn plan_lines(&self) -> Vec<String> {
        let mut lines = vec![
            format!("node image {} (commit {})", self.pulled.image.pinned, self.pulled.commit),
            format!(
                "/usr: {} added, {} changed, {} removed; {} differ",
                self.delta.counts.added,
                self.delta.counts.changed,
                self.delta.counts.removed,
                human_bytes(self.delta.counts.bytes)
            ),
        ];
        lines.extend(self.etc.iter().map(|line| format!("/etc: {line}")));
        lines.extend(self.pulled.warnings.iter().map(|line| format!("warning: {line}")));
        lines
    }
}

/// What was switched, and what was decided about the units that ran then.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Switched {
    /// What was staged.
    pub staged: StagedRoot,
    /// Decisions about running units; filled by refresh.
    #[serde(default)]
    pub units: Vec<Action>,
}

/// Where the pivot stands. The value of each step is what the next phase takes.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Step {
    /// Nothing done.
    #[default]
    Idle,
    /// The system already is what it should become.
    NothingToDo {
        /// What told us.
        reason: String,
    },
    /// The digest is known.
    Resolved(ResolvedImage),
    /// The objects are stored.
    Pulled(PulledImage),
    /// The delta tree and the plans are made; the running system is untouched.
    Staged(StagedRoot),
    /// The switch has begun and may be half done.
    Switching(StagedRoot),
    /// `/usr` and `/etc` are the node image's.
    Switched(Switched),
    /// What runs is, too.
    Refreshed(Switched),
    /// Isolated.
    Finished(Switched),
}

impl Step {
    /// For the journal.
    pub fn name(&self) -> &'static str {
        match self {
            Step::Idle => "idle",
            Step::NothingToDo { .. } => "nothing-to-do",
            Step::Resolved(_) => "resolved",
            Step::Pulled(_) => "pulled",
            Step::Staged(_) => "staged",
            Step::Switching(_) => "switching",
            Step::Switched(_) => "switched",
            Step::Refreshed(_) => "refreshed",
            Step::Finished(_) => "finished",
        }
    }

    /// The state that a daemon shows which was just started and finds this step.
    fn resting_state(&self) -> State {
        match self {
            Step::Idle | Step::Resolved(_) | Step::Pulled(_) => State::Idle,
            Step::NothingToDo { .. } => State::NothingToDo,
            Step::Staged(_) => State::Pulled,
            Step::Switching(_) => State::Running,
            Step::Switched(_) | Step::Refreshed(_) => State::Switched,
            Step::Finished(_) => State::Done,
        }
    }
}

/// The record.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Record {
    schema: u32,
    /// How far the pivot is.
    pub step: Step,
    /// Whether the generator redirected this boot.
    #[serde(default)]
    pub bootstrap: bool,
    /// The status document as it was last saved.
    pub status: Status,
}

impl Default for Record {
    fn default() -> Self {
        Self { schema: SCHEMA, step: Step::Idle, bootstrap: false, status: Status::default() }
    }
}

impl Record {
    /// The record under `paths`; a fresh one when there is none.
    pub fn load(paths: &Paths) -> Result<Self> {
        let dir = Directory::ensure(paths.run()).with_context(|| format!("cannot use {}", paths.run().display()))?;
        let shown = paths.run().join(FILE);
        let Some(text) = dir.read_optional(FILE).with_context(|| format!("cannot read {}", shown.display()))? else {
            return Ok(Self::default());
        };
        let mut record: Self = serde_json::from_slice(&text)
            .with_context(|| format!("{} is damaged; nothing was touched; reboot to begin anew", shown.display()))?;
        if record.schema != SCHEMA {
            bail!(
                "{} has format {}, this agent knows {SCHEMA}; go on with the agent that wrote it, or reboot to begin anew",
                shown.display(),
                record.schema
            );
        }
        record.status.state = record.step.resting_state();
        Ok(record)
    }

    /// Replaces the file in one step.
    pub fn save(&self, paths: &Paths) -> Result<()> {
        let text = serde_json::to_vec_pretty(self).context("cannot write the record")?;
        Directory::ensure(paths.run())
            .and_then(|dir| dir.write_atomic(FILE, 0o600, &text))
            .with_context(|| format!("cannot write {}", paths.run().join(FILE).display()))
    }

    /// In which flow the pivot runs.
    pub fn flow(&self) -> Flow {
        if self.bootstrap { Flow::Bootstrap } else { Flow::Live }
    }
}
