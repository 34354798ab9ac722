//! Writes the metadata objects of a merged tree: the dirmetas and dirtrees that layers changed, and the commit.
//!
//! Format source: libostree's `OSTREE_COMMIT_GVARIANT_FORMAT`, and the metadata of ostree-ext's merge commits
//! (`ostree.manifest-digest`, `ostree.manifest`, `ostree.container.image-config`). Like bootc since 1.6, it does not record
//! entries that were left out: the commit must not depend on whether a layer was read or its tree held.

use std::collections::BTreeMap;

use ostree::glib::variant::ToVariant;
use ostree::glib::{self, Variant};
use sha2::{Digest, Sha256};

use crate::image::{Failure, ImageDescription, ResolvedImage};
use crate::store::{Dirtree, ObjectId, ObjectType};

use super::merge::{Content, Dir, Listing, Meta, read_dirtree};
use super::relabel::Relabeller;
use crate::import::state::Import;
use crate::import::tree::Lookup;

/// Metadata key of the base commit.
const DERIVED_FROM: &str = "node-image-pivot.base-commit";
/// Metadata key of the image's pull spec by digest.
const IMAGE: &str = "node-image-pivot.image";

/// Content of a commit object.
#[derive(Debug, Default)]
pub(in crate::import) struct CommitInfo {
    /// Metadata with string values.
    pub strings: BTreeMap<&'static str, String>,
    /// The base commit, if there is one.
    pub parent: Option<ObjectId>,
    /// Seconds since 1970. `None` becomes 0, so that an image always results in the same commit.
    pub timestamp: Option<u64>,
    pub tree: ObjectId,
    pub meta: ObjectId,
}

/// Returns the bytes of the commit object.
pub(in crate::import) fn commit_bytes(info: &CommitInfo) -> Vec<u8> {
    let metadata: BTreeMap<String, Variant> =
        info.strings.iter().map(|(name, text)| (name.to_string(), text.to_variant())).collect();
    let related: Vec<(String, Vec<u8>)> = Vec::new();
    let subject = info.strings.get(IMAGE).map_or("", String::as_str);
    Variant::tuple_from_iter([
        metadata.to_variant(),
        info.parent.map_or(Vec::new(), |parent| parent.0.to_vec()).to_variant(),
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

/// Stores a commit object and returns its name.
pub(in crate::import) fn store_commit(import: &Import, info: &CommitInfo) -> Result<ObjectId, Failure> {
    put(import, ObjectType::Commit, &commit_bytes(info))
}

/// Stores the commit of an image with this tree, and returns its name. ostree-ext and bootc read the manifest and the
/// config from it.
pub(in crate::import) fn store_image(
    import: &Import,
    image: &ResolvedImage,
    description: &ImageDescription,
    (tree, meta): (ObjectId, ObjectId),
) -> Result<ObjectId, Failure> {
    // `Value` sorts its keys, so that the same image always results in the same commit.
    let json = |value: serde_json::Result<serde_json::Value>| {
        value.map(|value| value.to_string()).map_err(|error| import.local(error))
    };
    let parent = import.base.commit();
    let strings = [
        ("ostree.manifest-digest", image.digest.to_string()),
        ("ostree.manifest", json(serde_json::to_value(&description.manifest))?),
        ("ostree.container.image-config", json(serde_json::to_value(&description.config))?),
        (IMAGE, image.pinned.to_string()),
    ];
    let strings = strings.into_iter().chain(parent.map(|base| (DERIVED_FROM, base.to_string()))).collect();
    store_commit(import, &CommitInfo { strings, parent, timestamp: created(description), tree, meta })
}

/// Returns the creation time of the image in seconds since 1970, or `None` if it has none.
fn created(description: &ImageDescription) -> Option<u64> {
    let annotation = description.manifest.annotations().as_ref();
    let text = annotation
        .and_then(|all| all.get("org.opencontainers.image.created"))
        .or(description.config.created().as_ref())?;
    let time = glib::DateTime::from_iso8601(text, None).ok()?;
    u64::try_from(time.to_unix()).ok()
}

/// Labels a tree if `labels` is set, and stores its new metadata objects, children first. Returns the names of its dirtree
/// and dirmeta. Only the directories from `dir` to the current one are in memory.
pub(super) fn store_tree(
    import: &Import,
    dir: &Dir,
    path: &str,
    labels: &mut Option<Relabeller<'_>>,
) -> Result<(ObjectId, ObjectId), Failure> {
    let labelled = labels.as_mut().map(|labels| labels.meta(&dir.meta, path)).transpose()?.flatten();
    let meta = match (&labelled, &dir.meta) {
        (Some(meta), _) => put(import, ObjectType::DirMeta, &meta.to_bytes())?,
        (None, Meta::New(meta)) => put(import, ObjectType::DirMeta, &meta.to_bytes())?,
        (None, Meta::Stored(id)) => *id,
    };
    let read: Listing;
    let (files, dirs, stored) = match &dir.content {
        Content::Stored(tree) if labels.is_none() => return Ok((*tree, meta)),
        Content::Stored(tree) => {
            let lookup: &mut Lookup<'_> = &mut |id, kind| import.read_metadata(id, kind);
            read = read_dirtree(tree, lookup).map_err(|error| import.tree_failure(&error))?;
            (&read.0, &read.1, Some(*tree))
        }
        Content::Open { files, dirs } => (files, dirs, None),
    };
    let at = |name: &str| if path == "/" { format!("/{name}") } else { format!("{path}/{name}") };
    let mut changed = false;
    let mut tree = Dirtree::default();
    for (name, id) in files.iter() {
        let new = labels.as_mut().map_or(Ok(*id), |labels| labels.file(id, &at(name)))?;
        changed |= new != *id;
        tree.files.push((name, new));
    }
    for (name, child) in dirs.iter() {
        let (content, meta) = store_tree(import, child, &at(name), labels)?;
        changed |= !matches!(child.content, Content::Stored(id) if id == content);
        changed |= !matches!(child.meta, Meta::Stored(id) if id == meta);
        tree.dirs.push((name, content, meta));
    }
    match stored {
        Some(id) if !changed => Ok((id, meta)),
        _ => Ok((put(import, ObjectType::DirTree, &tree.to_bytes())?, meta)),
    }
}

/// Stores a metadata object, unless a repo has it, and returns its name.
pub(in crate::import) fn put(import: &Import, kind: ObjectType, bytes: &[u8]) -> Result<ObjectId, Failure> {
    let id = ObjectId(Sha256::digest(bytes).into());
    if import.wants_metadata(&id, kind) {
        let stored = import.writer.metadata(&id, kind, bytes);
        stored.map_err(|error| import.write_failure("the merged tree", &error))?;
    }
    Ok(id)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn commits_have_libostrees_type_and_are_reproducible() {
        let info = CommitInfo {
            strings: BTreeMap::from([(IMAGE, "q.io/a@sha256:1".to_owned()), (DERIVED_FROM, "ab".to_owned())]),
            parent: Some(ObjectId([1; 32])),
            timestamp: Some(1_700_000_000),
            tree: ObjectId([2; 32]),
            meta: ObjectId([3; 32]),
        };
        let bytes = commit_bytes(&info);
        assert_eq!(bytes, commit_bytes(&info));
        let variant = Variant::from_data_with_type(bytes, glib::VariantTy::new("(a{sv}aya(say)sstayay)").unwrap());
        assert!(variant.is_normal_form());
        ostree::validate_structureof_commit(&variant).unwrap();
        assert_eq!(ostree::commit_get_parent(&variant).unwrap(), "01".repeat(32));
        assert_eq!(ostree::commit_get_timestamp(&variant), 1_700_000_000);
        let metadata = glib::VariantDict::new(Some(&variant.child_value(0)));
        assert_eq!(metadata.lookup::<String>(IMAGE).unwrap().unwrap(), "q.io/a@sha256:1");
    }
}
