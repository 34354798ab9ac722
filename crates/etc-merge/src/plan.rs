//! What is to be done to `/etc`, as data: written down before the first act.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Deserializer, Serialize};

use super::defaults::Defaults;
use super::name::Bytes;
use super::snapshot::{Content, Leaf};

/// How an entry fared in the merge.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Class {
    /// The node image's version is taken, or the part of it that nobody changed here.
    Updated,
    /// The local version stays, and the node image has nothing to say against it.
    Local,
    /// Both sides came to the same.
    Converged,
    /// Both sides changed it in different ways: the local version stays.
    Conflict,
}

impl Class {
    /// All of them, in the order of reports.
    pub const ALL: [Class; 4] = [Class::Updated, Class::Converged, Class::Local, Class::Conflict];

    /// The word in reports.
    pub fn as_str(self) -> &'static str {
        match self {
            Class::Updated => "updated",
            Class::Local => "local",
            Class::Converged => "converged",
            Class::Conflict => "conflict",
        }
    }
}

impl fmt::Display for Class {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(self.as_str())
    }
}

/// The decision on one path. Paths that all three sides agree on have none.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Decision {
    /// Relative to `/etc`; empty for `/etc` itself.
    pub path: Bytes,
    /// How it fared.
    pub class: Class,
    /// Why, in a few words.
    pub reason: String,
}

/// Where the content of a changed file comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Origin {
    /// The new tree's `etc`.
    New,
    /// It stays; only owner, mode or attributes change.
    Current,
}

/// One act on one path.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Change {
    /// Relative to `/etc`; empty for `/etc` itself.
    pub path: Bytes,
    /// What must be there for the act to be done; `None`: nothing.
    pub before: Option<Leaf>,
    /// What is there afterwards; `None`: nothing.
    pub after: Option<Leaf>,
    /// Where content comes from.
    pub content: Origin,
    /// The security label that it gets, as in its attribute; without one, that of the file it is taken from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub label: Option<Bytes>,
}

/// A whole merge. The acts are in the order in which they must be done: removals from the bottom up,
/// then everything else from the top down.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Plan {
    /// The acts.
    pub changes: Vec<Change>,
    /// Every path on which the three sides do not agree, in order of path.
    pub decisions: Vec<Decision>,
    /// Conflicts of which the node image has a version, which is saved aside, and its size in bytes.
    #[serde(deserialize_with = "aside")]
    pub aside: BTreeMap<Bytes, u64>,
    /// The defaults that this merge takes from the node image.
    #[serde(default)]
    pub taken: Defaults,
    /// Those that earlier merges took.
    #[serde(default)]
    pub earlier: Defaults,
}

/// Reads the conflicts. Older agents wrote a list of paths, and their merges must be undone, too.
fn aside<'de, D: Deserializer<'de>>(deserializer: D) -> Result<BTreeMap<Bytes, u64>, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Aside {
        Sizes(BTreeMap<Bytes, u64>),
        Paths(Vec<Bytes>),
    }
    Ok(match Aside::deserialize(deserializer)? {
        Aside::Sizes(sizes) => sizes,
        Aside::Paths(paths) => paths.into_iter().map(|path| (path, 0)).collect(),
    })
}

impl Plan {
    /// Whether nothing is to be done.
    pub fn is_empty(&self) -> bool {
        self.changes.is_empty()
    }

    /// The bytes that carrying it out writes: new content, what is saved for an undo, and what is put aside.
    pub fn bytes(&self) -> u64 {
        let size = |leaf: &Option<Leaf>| match leaf.as_ref().map(|leaf| &leaf.content) {
            Some(Content::File { size, .. }) => *size,
            _ => 0,
        };
        let aside = self.aside.values().fold(0, |sum: u64, size| sum.saturating_add(*size));
        self.changes
            .iter()
            .fold(aside, |sum, change| sum.saturating_add(size(&change.before)).saturating_add(size(&change.after)))
    }

    /// The list of defaults for the next merge, after this one.
    pub fn later(&self) -> Defaults {
        self.earlier.followed_by(&self.taken)
    }

    /// The decisions of one class.
    pub fn of(&self, class: Class) -> impl Iterator<Item = &Decision> {
        self.decisions.iter().filter(move |decision| decision.class == class)
    }

    /// How many decisions there are of a class.
    pub fn count(&self, class: Class) -> usize {
        self.of(class).count()
    }
}
