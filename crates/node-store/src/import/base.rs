//! The tree on which the plain layers of an image are laid.

use crate::image::Layout;
use crate::store::{ObjectId, ObjectType};

use super::tree::{Lookup, Target, TreeError, path_of, walk};

/// The tree below the plain layers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, strum::Display)]
pub(super) enum Base {
    /// The commit that the label of an encapsulated image names.
    #[strum(to_string = "commit {0}")]
    Commit(ObjectId),
    /// The empty tree, below the layers of a plain image.
    #[strum(to_string = "the tree of the plain layers")]
    Empty,
}

impl Base {
    /// Returns the base of an image.
    pub(super) fn of(layout: &Layout) -> Self {
        layout.encapsulated.as_ref().map_or(Self::Empty, |base| Self::Commit(base.commit))
    }

    /// Returns the commit, or `None` for the empty tree.
    pub(super) fn commit(self) -> Option<ObjectId> {
        match self {
            Self::Commit(commit) => Some(commit),
            Self::Empty => None,
        }
    }

    /// Lists all content objects.
    pub(super) fn target(self, lookup: &mut Lookup<'_>) -> Result<Target, TreeError> {
        self.commit().map_or_else(|| Ok(Target::default()), |commit| walk(&commit, lookup))
    }

    /// Returns the bytes of the commit object, or `None` if it is missing or there is none.
    pub(super) fn commit_bytes(self, lookup: &mut Lookup<'_>) -> Option<Vec<u8>> {
        lookup(&self.commit()?, ObjectType::Commit).ok().flatten()
    }

    /// Returns the path at which the base has an object, for messages.
    pub(super) fn path_of(self, id: &ObjectId, lookup: &mut Lookup<'_>) -> Option<String> {
        path_of(&self.commit()?, id, lookup)
    }
}
