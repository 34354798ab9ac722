//! The plan of a merge, as data. It is stored before the first change.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use support::BlockSize;

use super::defaults::Defaults;
use super::name::Bytes;
use super::snapshot::{Content, Leaf};

/// Outcome of the merge for one entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, strum::Display)]
#[serde(rename_all = "kebab-case")]
#[strum(serialize_all = "kebab-case")]
pub enum Class {
    /// The node image's version is taken, or those parts of it that have no local change.
    Updated,
    /// The local version stays, and the node image did not change the entry.
    Local,
    /// The local version already equals the node image's.
    Converged,
    /// Both sides changed the entry in different ways. The local version stays.
    Conflict,
}

impl Class {
    /// All classes, in the order of reports.
    pub const ALL: [Class; 4] = [Class::Updated, Class::Converged, Class::Local, Class::Conflict];
}

/// The decision on one path. Paths that are equal on all three sides have none.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Decision {
    /// Relative to `/etc`; empty for `/etc` itself.
    pub path: Bytes,
    /// The outcome.
    pub class: Class,
    /// The reason, as a phrase for users.
    pub reason: String,
}

/// Source of a changed file's content.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Origin {
    /// The new tree's `etc`.
    New,
    /// The current file: only owner, mode or attributes change.
    Current,
}

/// The change of one entry.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Change {
    /// Relative to `/etc`; empty for `/etc` itself.
    pub path: Bytes,
    /// The entry that must exist for the change to happen; `None` if it must not exist.
    pub before: Option<Leaf>,
    /// The entry after the change; `None` if it is removed.
    pub after: Option<Leaf>,
    /// Source of the content.
    pub content: Origin,
    /// SELinux label to set, with the NUL byte at its end. `None`: the label of the file in the new tree.
    pub label: Option<Bytes>,
}

/// The plan of a merge.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Plan {
    /// The changes in the order of their execution: removals from the bottom up, then all others from the top down.
    pub changes: Vec<Change>,
    /// Decisions on all paths that are not equal on the three sides, in order of path.
    pub decisions: Vec<Decision>,
    /// Conflicts for which the node image has a file or link, with its size in bytes. [`apply`](super::apply()) saves
    /// these versions beside the undo journal.
    pub aside: BTreeMap<Bytes, u64>,
    /// Defaults that this merge takes from the node image.
    pub taken: Defaults,
    /// Defaults that earlier merges took.
    pub earlier: Defaults,
}

impl Plan {
    /// Returns the number of bytes that the merge writes: new content, content saved for an undo, and saved versions of
    /// the node image. Each file occupies whole units of `unit`.
    pub fn bytes(&self, unit: BlockSize) -> u64 {
        let size = |leaf: &Option<Leaf>| match leaf.as_ref().map(|leaf| &leaf.content) {
            Some(Content::File { size, .. }) => unit.allocated(*size),
            _ => 0,
        };
        let aside = self.aside.values().fold(0, |sum: u64, size| sum.saturating_add(unit.allocated(*size)));
        self.changes
            .iter()
            .fold(aside, |sum, change| sum.saturating_add(size(&change.before)).saturating_add(size(&change.after)))
    }

    /// Returns the list of defaults for the next merge: that of earlier merges, updated by this one.
    pub fn later(&self) -> Defaults {
        self.earlier.followed_by(&self.taken)
    }

    /// Returns the decisions of one class.
    pub fn of(&self, class: Class) -> impl Iterator<Item = &Decision> {
        self.decisions.iter().filter(move |decision| decision.class == class)
    }

    /// Returns the number of decisions of one class.
    pub fn count(&self, class: Class) -> usize {
        self.of(class).count()
    }
}
