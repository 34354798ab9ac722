//! Trees as plain data, and a specification of the delta. `model` tests it with a model of overlayfs, `real` with the real
//! one.

#![allow(clippy::unwrap_used)]

mod model;
mod real;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use super::keep::Keep;

/// An entry of a tree. The numbers represent content and metadata.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Node {
    File(u8),
    Dir(u8, Entries),
}

pub(super) type Entries = BTreeMap<String, Node>;

pub(super) const NAMES: [&str; 6] = ["a", "b", "lib", "modules", "keep-1", "keep-2"];

pub(super) fn keep() -> Keep {
    Keep::new(["lib/modules"], ["keep-1", "a/keep-*", "b/*/keep-2", "lib/a"])
}

/// Specifies the entries that `/usr` must show. Returns `None` if the target has a new file at the path of a directory
/// with frozen content.
pub(super) fn expected(old: &Entries, new: &Entries, keep: &Keep, path: &Path) -> Option<Entries> {
    let mut result = Entries::new();
    let empty = Entries::new();
    for name in old.keys().chain(new.keys()) {
        let path: PathBuf = path.join(name);
        let (was, is) = (old.get(name), new.get(name));
        let below = match was {
            Some(Node::Dir(_, entries)) => entries,
            _ => &empty,
        };
        let shown = match (was, is) {
            (was, _) if keep.is_frozen(&path) => was.cloned(),
            (was, Some(Node::File(content))) => {
                if matches!(was, Some(Node::Dir(..))) && keep.above_frozen(&path) {
                    return None;
                }
                Some(Node::File(*content))
            }
            (_, Some(Node::Dir(meta, entries))) => Some(Node::Dir(*meta, expected(below, entries, keep, &path)?)),
            (Some(node), None) if keep.is_kept(&path) => Some(node.clone()),
            (Some(Node::Dir(meta, entries)), None) => {
                let kept = expected(entries, &empty, keep, &path)?;
                (!kept.is_empty()).then_some(Node::Dir(*meta, kept))
            }
            (_, None) => None,
        };
        if let Some(shown) = shown {
            result.insert(name.clone(), shown);
        }
    }
    Some(result)
}
