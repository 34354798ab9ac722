//! The defaults that earlier merges took from node images.
//!
//! On a disk, `/etc` persists across a reboot, but the booted system's defaults are the old ones again. Without this
//! list, the next merge would treat everything that the last one wrote as a local change.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::name::Bytes;
use super::snapshot::{Entry, Leaf, Snapshot};

/// Defaults by path; `None` if the merge removed the entry.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Defaults(pub(super) BTreeMap<Bytes, Option<Leaf>>);

impl Defaults {
    /// Returns true if the list has no entry.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Returns the paths in the list.
    pub fn paths(&self) -> impl Iterator<Item = &Bytes> {
        self.0.keys()
    }

    /// Replaces defaults in `base` by those of this list.
    ///
    /// An entry that a merge wrote and an administrator edited since is a local change of the listed default. An entry
    /// that is absent or still the booted system's counts as not merged: a power cut may have ended the merge before
    /// it.
    pub(super) fn rebase(&self, base: &mut Snapshot, current: &Snapshot) {
        for (path, default) in &self.0 {
            let now = find(&current.root, path).map(|entry| &entry.leaf);
            let is_booted = |now: &Leaf| find(&base.root, path).is_some_and(|old| old.leaf.content == now.content);
            match (default, now) {
                (None, None) => remove(&mut base.root, path),
                (Some(default), Some(now)) if default.content == now.content || !is_booted(now) => {
                    put(&mut base.root, path, default);
                }
                _ => {}
            }
        }
    }

    /// Returns this list, updated by the defaults that the next merge took.
    pub(super) fn followed_by(&self, taken: &Self) -> Self {
        Self(self.0.iter().chain(&taken.0).map(|(path, leaf)| (path.clone(), leaf.clone())).collect())
    }
}

fn parts(path: &Bytes) -> impl Iterator<Item = &[u8]> {
    path.0.split(|byte| *byte == b'/').filter(|part| !part.is_empty())
}

fn find<'a>(root: &'a Entry, path: &Bytes) -> Option<&'a Entry> {
    parts(path).try_fold(root, |entry, part| entry.children.get(part))
}

/// Returns the directory that contains `path`, and the last component of `path`.
fn parent<'a, 'b>(root: &'a mut Entry, path: &'b Bytes) -> Option<(&'a mut Entry, &'b [u8])> {
    let parts: Vec<&[u8]> = parts(path).collect();
    let (name, above) = parts.split_last()?;
    let parent = above.iter().try_fold(root, |entry, part| entry.children.get_mut(*part))?;
    parent.leaf.is_directory().then_some((parent, *name))
}

fn remove(root: &mut Entry, path: &Bytes) {
    if let Some((parent, name)) = parent(root, path) {
        parent.children.remove(name);
    }
}

fn put(root: &mut Entry, path: &Bytes, leaf: &Leaf) {
    let entry = match parent(root, path) {
        Some((parent, name)) => {
            parent.children.entry(name.to_vec()).or_insert_with(|| Entry::new(leaf.content.clone(), leaf.meta.clone()))
        }
        None if path.0.is_empty() => root,
        None => return,
    };
    entry.leaf = leaf.clone();
    if !leaf.is_directory() {
        entry.children.clear();
    }
}
