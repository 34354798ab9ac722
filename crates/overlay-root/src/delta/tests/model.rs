//! Compares `diff` with the specification, by a model of overlayfs.

use std::cell::RefCell;
use std::collections::HashMap;

use anyhow::{Context, Result};
use node_store::store::ObjectId;
use proptest::prelude::*;
use sha2::{Digest, Sha256};

use super::*;
use crate::delta::compare::{Checksum, DeltaOp, Directory, Hidden, Listing, Shape, Tree, diff};

#[derive(Default)]
struct Memory(RefCell<HashMap<Checksum, Listing>>);

impl Memory {
    fn add(&self, meta: u8, entries: &Entries) -> Directory {
        let mut listing = Listing::default();
        for (name, node) in entries {
            match node {
                Node::File(content) => drop(listing.files.insert(name.clone(), ObjectId([*content; 32]))),
                Node::Dir(meta, below) => drop(listing.directories.insert(name.clone(), self.add(*meta, below))),
            }
        }
        let tree: Checksum = ObjectId(Sha256::digest(format!("{listing:?}")).into());
        self.0.borrow_mut().insert(tree, listing);
        Directory { tree, meta: ObjectId([meta; 32]) }
    }
}

impl Tree for Memory {
    fn list(&self, tree: &Checksum) -> Result<Listing> {
        self.0.borrow().get(tree).cloned().context("unknown tree")
    }

    fn size(&self, file: &Checksum) -> Result<u64> {
        Ok(u64::from(file.0[0]) + 1)
    }
}

/// Returns the number and the size of the files in a node.
fn hidden(node: &Node) -> Hidden {
    match node {
        Node::File(content) => Hidden { files: 1, bytes: u64::from(*content) + 1 },
        Node::Dir(_, entries) => entries.values().map(hidden).fold(Hidden::default(), |sum, below| Hidden {
            files: sum.files + below.files,
            bytes: sum.bytes + below.bytes,
        }),
    }
}

/// Models the features of overlayfs that a delta uses.
fn overlay(ops: &mut std::slice::Iter<'_, DeltaOp>, below: &Entries) -> Entries {
    let mut shown = below.clone();
    loop {
        match ops.next().unwrap() {
            DeltaOp::Leave => return shown,
            DeltaOp::File { name, object, replaces } => {
                let before = shown.insert(name.clone(), Node::File(object.0[0]));
                assert_eq!(before.as_ref().map(hidden), *replaces);
                assert_ne!(before, Some(Node::File(object.0[0])), "an unchanged file is not in the delta");
            }
            DeltaOp::Whiteout { name, hides } => {
                let before = shown.remove(name);
                assert_eq!(before.as_ref().map(hidden), Some(*hides), "a whiteout counts what it hides");
            }
            DeltaOp::Kept { .. } => panic!("a delta shows kept content without a step"),
            DeltaOp::Enter { name, meta, .. } => {
                let below = match shown.get(name) {
                    Some(Node::Dir(_, entries)) => entries.clone(),
                    _ => Entries::new(),
                };
                let entered = overlay(ops, &below);
                shown.insert(name.clone(), Node::Dir(meta.0[0], entered));
            }
        }
    }
}

fn entries() -> impl Strategy<Value = Entries> {
    let name = || prop::sample::select(&NAMES[..]).prop_map(str::to_owned);
    let leaf = (0u8..3).prop_map(Node::File);
    let node = leaf.prop_recursive(4, 40, 5, move |inner| {
        (0u8..3, prop::collection::btree_map(name(), inner, 0..5)).prop_map(|(meta, entries)| Node::Dir(meta, entries))
    });
    prop::collection::btree_map(prop::sample::select(&NAMES[..]).prop_map(str::to_owned), node, 0..6)
}

/// Generates two similar trees: parts of one are copied to the other.
fn pairs() -> impl Strategy<Value = (Entries, Entries)> {
    (entries(), entries(), prop::collection::vec(any::<bool>(), NAMES.len())).prop_map(|(old, mut new, same)| {
        for (name, _) in NAMES.iter().zip(&same).filter(|(_, same)| **same) {
            match old.get(*name) {
                Some(node) => drop(new.insert((*name).to_owned(), node.clone())),
                None => drop(new.remove(*name)),
            }
        }
        (old, new)
    })
}

fn steps(old: &Entries, new: &Entries, keep: &Keep) -> Result<Vec<DeltaOp>> {
    let memory = Memory::default();
    let (old, new) = (memory.add(0, old), memory.add(1, new));
    diff((&memory, old), (&memory, new), keep, Shape::Delta)
}

fn shown(old: &Entries, ops: &[DeltaOp]) -> Entries {
    let mut ops = ops.iter();
    assert!(matches!(ops.next(), Some(DeltaOp::Enter { name, .. }) if name.is_empty()));
    let shown = overlay(&mut ops, old);
    assert_eq!(ops.next(), None);
    shown
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1500))]

    #[test]
    fn without_kept_paths_the_target_is_visible((old, new) in pairs()) {
        let ops = steps(&old, &new, &Keep::new([], [])).unwrap();
        prop_assert_eq!(shown(&old, &ops), new);
    }

    #[test]
    fn with_kept_paths_the_specified_tree_is_visible((old, new) in pairs()) {
        match expected(&old, &new, &keep(), Path::new("")) {
            Some(expected) => {
                let ops = steps(&old, &new, &keep()).unwrap();
                prop_assert_eq!(shown(&old, &ops), expected);
            }
            None => prop_assert!(steps(&old, &new, &keep()).is_err()),
        }
    }

    #[test]
    fn equal_trees_give_an_empty_delta(old in entries()) {
        prop_assert_eq!(steps(&old, &old, &keep()).unwrap().len(), 2);
    }
}
