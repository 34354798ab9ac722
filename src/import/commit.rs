//! Metadata objects of a derived image: dirmetas and dirtrees of what layers changed, and the commit.
//!
//! Format source: libostree's `OSTREE_COMMIT_GVARIANT_FORMAT`, and the metadata that ostree-ext gives
//! its merge commits (`ostree.manifest-digest`, `ostree.manifest`, `ostree.container.image-config`,
//! `ostree.tar-filtered`).

use std::collections::BTreeMap;

use ostree::glib::Variant;
use ostree::glib::variant::ToVariant;
use sha2::{Digest, Sha256};

use crate::image::Failure;
use crate::store::{ObjectId, ObjectType};

use super::merge::{Content, Dir, Meta, dirmeta_bytes, dirtree_bytes};
use super::state::Import;
use super::tree::Lookup;

/// The commit that layers were laid over.
pub(super) const DERIVED_FROM: &str = "node-image-pivot.base-commit";
/// The image's pull spec by digest.
pub(super) const IMAGE: &str = "node-image-pivot.image";

/// What a commit object says.
#[derive(Debug)]
pub(super) struct CommitInfo {
    /// Metadata that are strings.
    pub strings: BTreeMap<&'static str, String>,
    /// By layer: what was left out, and how often.
    pub left_out: BTreeMap<String, BTreeMap<String, u32>>,
    pub parent: ObjectId,
    /// Seconds since 1970; without it 0, so that the same image is always the same commit.
    pub timestamp: Option<u64>,
    pub tree: ObjectId,
    pub meta: ObjectId,
}

/// A commit object's bytes.
pub(super) fn commit_bytes(info: &CommitInfo) -> Vec<u8> {
    let mut metadata: BTreeMap<String, Variant> =
        info.strings.iter().map(|(name, text)| (name.to_string(), text.to_variant())).collect();
    metadata.insert("ostree.tar-filtered".to_owned(), info.left_out.to_variant());
    let related: Vec<(String, Vec<u8>)> = Vec::new();
    let subject = info.strings.get(IMAGE).map_or("", String::as_str);
    Variant::tuple_from_iter([
        metadata.to_variant(),
        info.parent.0.to_vec().to_variant(),
        related.to_variant(),
        subject.to_variant(),
        "".to_variant(),
        info.timestamp.unwrap_or(0).to_be().to_variant(),
        info.tree.0.to_vec().to_variant(),
        info.meta.0.to_vec().to_variant(),
    ])
    .data()
    .to_vec()
}

/// Stores a commit object; its name.
pub(super) fn store_commit(import: &Import, bytes: &[u8]) -> Result<ObjectId, Failure> {
    put(import, ObjectType::Commit, bytes)
}

/// Stores what is new of a tree, children first; the names of its dirtree and dirmeta.
pub(super) fn store_tree(import: &Import, dir: &Dir, lookup: &mut Lookup<'_>) -> Result<(ObjectId, ObjectId), Failure> {
    let meta = match &dir.meta {
        Meta::Stored(id) => *id,
        Meta::New(meta) => put(import, ObjectType::DirMeta, &dirmeta_bytes(meta))?,
    };
    let tree = match &dir.content {
        Content::Stored(id) => *id,
        Content::Open { files, dirs } => {
            let mut stored = BTreeMap::new();
            for (name, dir) in dirs {
                stored.insert(name.clone(), store_tree(import, dir, lookup)?);
            }
            put(import, ObjectType::DirTree, &dirtree_bytes(files, &stored))?
        }
    };
    for (id, kind) in [(meta, ObjectType::DirMeta), (tree, ObjectType::DirTree)] {
        let found = lookup(&id, kind).map_err(|error| import.local(error))?;
        if found.is_none() {
            return Err(import.tree_failure(&super::tree::TreeError::Missing(id, kind.extension())));
        }
    }
    Ok((tree, meta))
}

fn put(import: &Import, kind: ObjectType, bytes: &[u8]) -> Result<ObjectId, Failure> {
    let id = ObjectId(Sha256::digest(bytes).into());
    if import.wants_metadata(&id, kind) {
        let stored = import.writer.metadata(&id, kind, bytes);
        stored.map_err(|error| import.write_failure("the derived tree", &error))?;
    }
    Ok(id)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn commits_are_of_libostrees_type_and_repeatable() {
        let info = CommitInfo {
            strings: BTreeMap::from([(IMAGE, "q.io/a@sha256:1".to_owned()), (DERIVED_FROM, "ab".to_owned())]),
            left_out: BTreeMap::from([("sha256:2".into(), BTreeMap::from([("/opt".into(), 3)]))]),
            parent: ObjectId([1; 32]),
            timestamp: Some(1_700_000_000),
            tree: ObjectId([2; 32]),
            meta: ObjectId([3; 32]),
        };
        let bytes = commit_bytes(&info);
        assert_eq!(bytes, commit_bytes(&info));
        let variant =
            Variant::from_data_with_type(bytes, ostree::glib::VariantTy::new("(a{sv}aya(say)sstayay)").unwrap());
        assert!(variant.is_normal_form());
        ostree::validate_structureof_commit(&variant).unwrap();
        assert_eq!(ostree::commit_get_parent(&variant).unwrap(), "01".repeat(32));
        assert_eq!(ostree::commit_get_timestamp(&variant), 1_700_000_000);
        let metadata = ostree::glib::VariantDict::new(Some(&variant.child_value(0)));
        assert_eq!(metadata.lookup::<String>(IMAGE).unwrap().unwrap(), "q.io/a@sha256:1");
        let filtered = metadata.lookup_value("ostree.tar-filtered", None).unwrap();
        assert_eq!(filtered.type_().as_str(), "a{sa{su}}");
    }
}
