//! Reads plain layers, archives of paths, merges them with the tree of the base and commits the result.

mod children;
mod commit;
mod derive;
mod facts;
mod held;
mod kept;
mod label;
mod layer_commit;
mod layertree;
mod merge;
mod path;
mod reader;
mod relabel;
mod shortened;
mod system;

#[cfg(any(test, fuzzing))]
pub(super) use commit::commit_bytes;
pub(super) use commit::{CommitInfo, put, store_commit, store_image};
pub(super) use derive::{Committed, Derived, Merged};
pub(super) use facts::BaseFacts;
pub(super) use held::held_tree;
pub(super) use kept::{KeptTree, over_budget};
pub(super) use label::remove_left_policies;
pub(super) use layer_commit::store_layer;
pub(super) use layertree::LayerTree;
#[cfg(any(test, fuzzing))]
pub(super) use path::Placement;
pub(super) use reader::read_plain;
pub(super) use relabel::restore;
