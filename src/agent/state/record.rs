//! The record that is kept between phases, in `/run/node-image-pivot/state.json`.

use std::collections::BTreeMap;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use super::{Checksum, StateDir, StateFile, SwitchStep, Unusable};
use crate::agent::Goal;
use crate::agent::auto_undo::TrialPeriod;
use crate::agent::boot::Boot;
use crate::config::{EtcStrategy, ImageSource, Mode, OsMismatch, Settings};
use crate::report::{LastError, Standing, State, Status, if_known};
use node_store::image::{PullSpec, ResolvedImage};
use node_store::import::PulledImage;
use node_store::store::Wish;
use overlay_root::delta::Delta;
use support::failpoint::{self, Point};
use support::human_bytes;
use unit_refresh::{Action, Flow};

/// Image that the configuration names.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Source {
    /// The node image itself.
    Image(PullSpec),
    /// A release payload, and the names under which it may list the node image.
    Release(PullSpec, Vec<String>),
}

impl Source {
    /// Returns the pull spec as configured.
    pub fn spec(&self) -> &PullSpec {
        match self {
            Source::Image(spec) | Source::Release(spec, _) => spec,
        }
    }

    /// Returns true if the spec names a digest, which always stands for the same image.
    pub fn is_pinned(&self) -> bool {
        self.spec().digest().is_some()
    }
}

/// Request of the configuration. If it changes, the results of the phases before the switch are invalid.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Asked {
    /// Image; `None` when the configuration names none.
    pub source: Option<Source>,
    /// All other settings that decide how the image is staged.
    how: String,
}

impl Asked {
    /// Returns the request of `settings`.
    pub fn by(settings: &Settings) -> Self {
        let source = settings.image.clone().map(|source| match source {
            ImageSource::Image(spec) => Source::Image(spec),
            ImageSource::Release(spec) => Source::Release(spec, settings.image_tags.clone().unwrap_or_default()),
        });
        Self { source, how: how(settings) }
    }
}

/// Returns the other settings in the spelling of older records.
fn how(settings: &Settings) -> String {
    let mode = match settings.mode {
        Mode::Auto => "Auto",
        Mode::Off => "Off",
        Mode::Force => "Force",
    };
    let etc = match settings.etc_strategy {
        EtcStrategy::Keep => "Keep",
        EtcStrategy::Fail => "Fail",
    };
    let mismatch = match settings.os_mismatch {
        OsMismatch::Refuse => "Refuse",
        OsMismatch::Warn => "Warn",
    };
    let store = match settings.store.place {
        Wish::Auto => "Auto",
        Wish::Ram => "Ram",
        Wish::Disk => "Disk",
    };
    format!("({mode}, {etc}, {mismatch}, {store}, {})", settings.complete)
}

/// The image that the status document shows as asked for.
pub(in crate::agent) fn shown(settings: &Settings) -> Option<String> {
    settings.image.as_ref().map(|source| source.spec().to_string())
}

/// The input of the switch, after all decisions and checks.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct StagedRoot {
    /// The pulled image.
    pub pulled: PulledImage,
    /// The delta tree.
    pub delta: Delta,
    /// One line per class of the `/etc` plan, conflicts by name.
    pub etc: Vec<String>,
    /// Checksums of the plans by file name. Records of older agents have none.
    #[serde(default)]
    pub plans: BTreeMap<String, Checksum>,
}

impl StagedRoot {
    /// Loads a state file that belongs to this tree: of the same image and, for a plan, unchanged since it was staged.
    ///
    /// # Errors
    /// The file cannot be used.
    pub fn load<T: StateFile>(&self, dir: &StateDir) -> Result<T, Unusable> {
        dir.load_of(Some(&self.pulled.image), self.plans.get(T::NAME))
    }

    /// Saves a state file that belongs to this tree.
    ///
    /// # Errors
    /// The old file is unchanged.
    pub fn save<T: StateFile>(&self, content: &T, dir: &StateDir) -> Result<Checksum> {
        dir.save(content, Some(&self.pulled.image))
    }

    /// Returns the plan as lines of text.
    pub fn plan_lines(&self) -> Vec<String> {
        let mut lines = vec![
            format!("node image {} (commit {})", self.pulled.image.pinned, self.pulled.commit),
            format!(
                "/usr: {} added, {} changed, {} removed; {} differ",
                self.delta.counts.added,
                self.delta.counts.changed,
                self.delta.counts.removed,
                human_bytes(self.delta.counts.added_bytes + self.delta.counts.changed_bytes)
            ),
        ];
        lines.push(format!("/usr: {}", self.delta.base));
        lines.extend(self.etc.iter().map(|line| format!("/etc: {line}")));
        lines
    }
}

/// The result of the phase switch.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Switched {
    /// The tree in place.
    pub staged: StagedRoot,
}

/// The result of the phase refresh.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Refreshed {
    /// The tree in place.
    pub staged: StagedRoot,
    /// Decisions about the units that ran during the switch.
    #[serde(default)]
    pub units: Vec<Action>,
}

/// The result of the phase finish.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Finished(pub Refreshed);

/// The tree of a switch, as an undo needs it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct UndoTree {
    /// The pulled image; unknown if the record and the plan of the switch are lost.
    #[serde(deserialize_with = "if_known")]
    pub pulled: Option<PulledImage>,
    /// The delta tree.
    pub delta: Delta,
    /// As in [`StagedRoot`].
    pub etc: Vec<String>,
    /// As in [`StagedRoot`].
    #[serde(default)]
    pub plans: BTreeMap<String, Checksum>,
}

impl From<StagedRoot> for UndoTree {
    fn from(StagedRoot { pulled, delta, etc, plans }: StagedRoot) -> Self {
        Self { pulled: Some(pulled), delta, etc, plans }
    }
}

impl UndoTree {
    /// Loads a state file that belongs to this tree, like [`StagedRoot::load`].
    ///
    /// # Errors
    /// The file cannot be used.
    pub fn load<T: StateFile>(&self, dir: &StateDir) -> Result<T, Unusable> {
        dir.load_of(self.pulled.as_ref().map(|pulled| &pulled.image), self.plans.get(T::NAME))
    }

    /// Returns the staged tree, if the image is known.
    pub fn staged(self) -> Option<StagedRoot> {
        let Self { pulled, delta, etc, plans } = self;
        pulled.map(|pulled| StagedRoot { pulled, delta, etc, plans })
    }
}

/// An undo that has begun. Its actions are recorded before the first one, because afterwards the units that ran the node
/// image's code cannot be found.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Undo {
    /// The tree that was switched to.
    #[serde(rename = "staged")]
    pub tree: UndoTree,
    /// Decisions about running units; absent if a failed switch is rolled back before the refresh of units.
    pub units: Option<Vec<Action>>,
    /// Parts of the plan that could not be made, a line each.
    #[serde(default)]
    pub troubles: Vec<String>,
    /// True if `tree` was pieced together after the record was lost: nothing can be switched to it again.
    #[serde(default)]
    pub salvaged: bool,
}

/// The progress of the pivot. Each step holds the value that the next phase needs.
#[derive(Debug, Clone, Default, Serialize, Deserialize, strum::IntoStaticStr)]
#[serde(rename_all = "kebab-case")]
#[strum(serialize_all = "kebab-case")]
pub enum Step {
    /// Nothing done.
    #[default]
    Idle,
    /// The system already has the node image's content.
    NothingToDo {
        /// The reason, such as a probe path that exists.
        reason: String,
        /// True once the agent has isolated to the default target.
        isolated: bool,
    },
    /// The digest is known.
    Resolved(ResolvedImage),
    /// The objects are stored.
    Pulled(PulledImage),
    /// The delta tree and the plans are made; the running system is unchanged.
    Staged(StagedRoot),
    /// The switch has begun and may be half done.
    Switching(StagedRoot),
    /// An undo has begun and may be half done.
    Undoing(Undo),
    /// The record of a switch is lost. Only an undo is possible.
    Lost {
        /// The parts of it that are known.
        #[serde(rename = "staged")]
        tree: UndoTree,
        /// Message for a person: what was lost, what is left, the way out.
        message: String,
    },
    /// `/usr` and `/etc` are the node image's.
    Switched(Switched),
    /// The running units use the node image's files.
    Refreshed(Refreshed),
    /// The machine is isolated to its default target.
    Finished(Finished),
}

impl Step {
    /// Returns the name for the journal.
    pub fn name(&self) -> &'static str {
        self.into()
    }

    /// Returns the image, if it is known.
    pub(in crate::agent) fn image(&self) -> Option<&ResolvedImage> {
        let pulled = match self {
            Step::Idle | Step::NothingToDo { .. } => None,
            Step::Resolved(image) => return Some(image),
            Step::Pulled(pulled) => Some(pulled),
            Step::Staged(staged) | Step::Switching(staged) | Step::Switched(Switched { staged }) => {
                Some(&staged.pulled)
            }
            Step::Refreshed(refreshed) | Step::Finished(Finished(refreshed)) => Some(&refreshed.staged.pulled),
            Step::Undoing(Undo { tree, .. }) | Step::Lost { tree, .. } => tree.pulled.as_ref(),
        };
        pulled.map(|pulled| &pulled.image)
    }

    /// Returns the input of an undo, or `None` if the running system is unchanged.
    pub(in crate::agent) fn undo_tree(&self) -> Option<UndoTree> {
        match self {
            Step::Switching(staged) | Step::Switched(Switched { staged }) => Some(staged.clone().into()),
            Step::Refreshed(refreshed) | Step::Finished(Finished(refreshed)) => Some(refreshed.staged.clone().into()),
            Step::Undoing(Undo { tree, .. }) | Step::Lost { tree, .. } => Some(tree.clone()),
            _ => None,
        }
    }

    /// Returns true if the running system is unchanged.
    pub fn is_before_switch(&self) -> bool {
        matches!(self, Step::Idle | Step::NothingToDo { .. } | Step::Resolved(_) | Step::Pulled(_) | Step::Staged(_))
    }

    /// Returns the state of the running system at this step.
    pub(in crate::agent) fn standing(&self) -> Standing {
        match self {
            Step::Switching(_) | Step::Undoing(_) => Standing::HalfDone,
            _ if self.is_before_switch() => Standing::Unchanged,
            _ => Standing::Switched,
        }
    }

    /// Returns true if the agent has isolated to the default target.
    fn is_arrival(&self) -> bool {
        matches!(self, Step::Finished(_) | Step::NothingToDo { isolated: true, .. })
    }

    /// Returns the state of the status document while no phase runs.
    fn resting_state(&self) -> State {
        match self {
            Step::Idle | Step::Resolved(_) | Step::Pulled(_) => State::Idle,
            Step::NothingToDo { .. } => State::NothingToDo,
            Step::Staged(_) => State::Pulled,
            Step::Switching(_) | Step::Undoing(_) | Step::Lost { .. } => State::Failed,
            Step::Switched(_) | Step::Refreshed(_) => State::Switched,
            Step::Finished(_) => State::Done,
        }
    }
}

/// The record.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Record {
    /// The last completed step.
    pub step: Step,
    /// Steps of the switch, or of the undo, that have begun, in their order. Older agents did not list them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(in crate::agent) begun: Vec<SwitchStep>,
    /// True if the generator redirected this boot.
    #[serde(default)]
    pub bootstrap: bool,
    /// True once the agent has isolated to the default target. The machine is in use from then on, also after an undo.
    #[serde(default)]
    arrived: bool,
    /// The request of the configuration when the step was reached.
    #[serde(default, deserialize_with = "if_known")]
    pub asked: Option<Asked>,
    /// The trial period after which the switch is undone unless an administrator keeps it.
    #[serde(default, rename = "probation")]
    pub trial: Option<TrialPeriod>,
    /// Entries that the last undo kept deliberately, for a caller that asks again before the next switch.
    #[serde(default)]
    pub undone: Option<Vec<String>>,
    /// The status document as it was last saved.
    pub status: Status,
}

impl StateFile for Record {
    const NAME: &'static str = "state.json";
    const SUBJECT: &'static str = "the record";
    const REMEDY: &'static str = "nothing is switched, and the agent begins without it";
}

impl Record {
    /// Returns a record at `step` without further facts.
    pub(in crate::agent) fn at(step: Step) -> Self {
        Self { step, ..Self::default() }
    }

    /// Sets the trial period.
    pub(in crate::agent) fn with(self, trial: Option<TrialPeriod>) -> Self {
        Self { trial, ..self }
    }

    /// Loads the record.
    ///
    /// # Errors
    /// It is missing or cannot be used. The file is left unchanged.
    pub fn load(dir: &StateDir) -> Result<Self, Unusable> {
        let mut record: Self = dir.load()?;
        // Older agents did not record this.
        record.arrived |= record.step.is_arrival();
        Ok(record)
    }

    /// Replaces the file atomically.
    pub fn save(&self, dir: &StateDir) -> Result<()> {
        failpoint::hit(Point::Record, self.step.name())
            .with_context(|| format!("cannot write {}", dir.run().join(Self::NAME).display()))?;
        dir.save(self, self.step.image()).map(drop)
    }

    /// Replaces the file with a record that says that the running system is unchanged. If the disk is full, removes the old
    /// file first: without a record an agent begins again, with the old one it would not.
    pub fn save_over(&self, dir: &StateDir) -> Result<()> {
        self.save(dir).or_else(|_| {
            dir.remove(Self::NAME)?;
            self.save(dir)
        })
    }

    /// Lists a step of the switch or the undo before its first act.
    ///
    /// # Errors
    /// The file is unchanged.
    pub(in crate::agent) fn begin(&mut self, step: SwitchStep, dir: &StateDir) -> Result<()> {
        self.begun.retain(|begun| *begun != step);
        self.begun.push(step);
        self.save(dir)
    }

    /// Sets the status of a daemon that has just started and runs no phase.
    pub fn rest(&mut self) {
        // A failure stays until the next attempt. A planned attempt ended with the daemon.
        let failed = self.status.error.as_ref().is_some_and(|error| error.next_retry_unix.is_none());
        let at = self.begun.last().map_or_else(String::new, |step| format!(" at {}", step.describe()));
        let interrupted = match &self.step {
            Step::Switching(_) => Some(format!(
                "the switch was interrupted{at}: start node-image-overlay.service again to finish it, or run undo"
            )),
            Step::Undoing(_) => Some(format!("undo was interrupted{at}: run it again")),
            Step::Lost { message, .. } => Some(message.clone()),
            _ => None,
        };
        if let Some(message) = interrupted {
            self.status.error.get_or_insert_with(|| LastError {
                class: "interrupted".into(),
                message,
                attempt: 1,
                standing: Some(Standing::HalfDone),
                ..LastError::default()
            });
        } else if !failed {
            self.status.error = None;
        }
        self.status.state = if failed { State::Failed } else { self.step.resting_state() };
    }

    /// Takes note of the kind of this boot. Returns false if systemd must be asked again.
    pub fn learn(&mut self, boot: Boot) -> bool {
        self.bootstrap |= boot == Boot::Bootstrap;
        self.bootstrap || boot != Boot::Unknown
    }

    /// Sets the step.
    pub fn reach(&mut self, step: Step) {
        self.arrived |= step.is_arrival();
        self.step = step;
    }

    /// Returns the flow of the pivot. The bootstrap flow ends with the isolation to the default target.
    pub fn flow(&self) -> Flow {
        if self.bootstrap && !self.arrived { Flow::Bootstrap } else { Flow::Live }
    }

    /// Returns the goal of a run. Only the bootstrap flow isolates, because running units of a system in use must not be
    /// stopped.
    pub fn last_goal(&self) -> Goal {
        match self.flow() {
            Flow::Bootstrap => Goal::Finished,
            Flow::Live => Goal::Switched,
        }
    }
}

#[cfg(test)]
#[path = "record_tests.rs"]
pub(in crate::agent) mod tests;
