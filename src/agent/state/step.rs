//! The steps of the pivot, and the value that each of them holds for the next phase.

use std::collections::BTreeMap;

use anyhow::Result;
use serde::{Deserialize, Serialize};

use super::{Checksum, StateDir, StateFile, Unusable};
use crate::report::{Standing, State};
use node_store::image::ResolvedImage;
use node_store::import::PulledImage;
use overlay_root::delta::Delta;
use unit_refresh::Action;

/// The input of the switch, after all decisions and checks.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct StagedRoot {
    /// The pulled image.
    pub pulled: PulledImage,
    /// The delta tree.
    pub delta: Delta,
    /// Checksums of the plans by file name.
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
    pub pulled: Option<PulledImage>,
    /// The delta tree.
    pub delta: Delta,
    /// As in [`StagedRoot`].
    pub plans: BTreeMap<String, Checksum>,
}

impl From<StagedRoot> for UndoTree {
    fn from(StagedRoot { pulled, delta, plans }: StagedRoot) -> Self {
        Self { pulled: Some(pulled), delta, plans }
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
        let Self { pulled, delta, plans } = self;
        pulled.map(|pulled| StagedRoot { pulled, delta, plans })
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
    pub troubles: Vec<String>,
    /// True if `tree` was pieced together after the record was lost: nothing can be switched to it again.
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
    pub(super) fn is_arrival(&self) -> bool {
        matches!(self, Step::Finished(_) | Step::NothingToDo { isolated: true, .. })
    }

    /// Returns the state of the status document while no phase runs.
    pub(super) fn resting_state(&self) -> State {
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
