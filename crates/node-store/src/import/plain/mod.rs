//! Reads plain layers, archives of paths, merges them with the tree of the base and commits the result.

mod children;
mod commit;
mod derive;
mod dirmeta;
mod facts;
mod held;
mod kept;
mod label;
mod layertree;
mod merge;
mod path;
mod reader;
mod relabel;
mod system;

#[cfg(any(test, fuzzing))]
pub(super) use commit::{CommitInfo, commit_bytes};
pub(super) use derive::{Committed, Derived, Merged};
pub(super) use facts::BaseFacts;
pub(super) use held::held_tree;
pub(super) use layertree::{BadEntry, LayerTree};
#[cfg(any(test, fuzzing))]
pub(super) use path::Placement;
pub(super) use reader::read_plain;
