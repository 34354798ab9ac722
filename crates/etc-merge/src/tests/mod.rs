//! Builders of small trees, and the expected result of a plan.

#![allow(clippy::unwrap_used)]

mod diff;
mod durable;
mod failing;
mod kept;
mod ostree;
mod properties;
mod race;
mod real;
mod table;

use std::collections::BTreeMap;

use sha2::{Digest, Sha256};

use super::*;
use crate::decide::decide;
use crate::scan::scan;
use crate::snapshot::{Entry, Obstacle, Snapshot};

/// Returns the content of file number `content`.
pub(super) fn text(content: u8) -> String {
    format!("content {content}\n").repeat(usize::from(content))
}

pub(super) fn meta(number: u8) -> Meta {
    let mode = [0o644, 0o4711, 0o600][usize::from(number % 3)];
    let xattrs = match number {
        2 => BTreeMap::from([(Bytes::from("trusted.nip"), Bytes(vec![0, 255, number]))]),
        _ => BTreeMap::new(),
    };
    Meta { mode, uid: number.into(), gid: 5, xattrs }
}

pub(super) fn file(content: u8, number: u8) -> Entry {
    let text = text(content);
    let content = Content::File { size: text.len() as u64, sha256: hex::encode(Sha256::digest(text)) };
    Entry::new(content, meta(number))
}

pub(super) fn link(target: u8) -> Entry {
    let meta = Meta { mode: 0o777, uid: 0, gid: 5, xattrs: BTreeMap::new() };
    Entry::new(Content::Symlink(Bytes(format!("to/{target}").into_bytes())), meta)
}

pub(super) fn other() -> Entry {
    Entry::new(Content::Other, Meta { xattrs: BTreeMap::new(), ..meta(0) })
}

pub(super) fn dir(number: u8, children: impl IntoIterator<Item = (&'static str, Entry)>) -> Entry {
    let children = children.into_iter().map(|(name, entry)| (name.as_bytes().to_vec(), entry)).collect();
    Entry { children, ..Entry::new(Content::Directory, meta(number)) }
}

pub(super) fn etc(children: impl IntoIterator<Item = (&'static str, Entry)>) -> Snapshot {
    Snapshot { root: dir(0, children) }
}

/// Returns `etc` with the changes of `plan`. Asserts that each change finds its `before`, and that no directory with
/// entries is removed.
pub(super) fn outcome(plan: &Plan, etc: &Snapshot) -> Snapshot {
    let mut etc = etc.clone();
    for change in &plan.changes {
        let mut parts: Vec<&[u8]> = change.path.0.split(|byte| *byte == b'/').collect();
        let name = parts.pop().unwrap();
        if change.path.0.is_empty() {
            assert_eq!(Some(&etc.root.leaf), change.before.as_ref());
            etc.root.leaf = change.after.clone().unwrap();
            continue;
        }
        let parent = parts.iter().fold(&mut etc.root, |dir, part| dir.children.get_mut(*part).unwrap());
        assert!(parent.leaf.is_directory(), "{}", change.path);
        let entry = parent.children.remove(name);
        assert_eq!(entry.as_ref().map(|entry| &entry.leaf), change.before.as_ref(), "{}", change.path);
        let children = entry.map(|entry| entry.children).unwrap_or_default();
        match &change.after {
            Some(leaf) if leaf.is_directory() => {
                drop(parent.children.insert(name.to_vec(), Entry { leaf: leaf.clone(), obstacle: None, children }));
            }
            after => {
                assert!(children.is_empty(), "{} is not empty", change.path);
                if let Some(leaf) = after {
                    parent.children.insert(name.to_vec(), Entry { leaf: leaf.clone(), obstacle: None, children });
                }
            }
        }
    }
    etc
}

/// Returns all entries by path.
pub(super) fn flat(etc: &Snapshot) -> BTreeMap<Bytes, Leaf> {
    fn walk(path: &Bytes, entry: &Entry, all: &mut BTreeMap<Bytes, Leaf>) {
        all.insert(path.clone(), entry.leaf.clone());
        entry.children.iter().for_each(|(name, child)| walk(&path.join(name), child, all));
    }
    let mut all = BTreeMap::new();
    walk(&Bytes::default(), &etc.root, &mut all);
    all
}
