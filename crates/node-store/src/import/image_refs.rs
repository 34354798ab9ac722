//! Makes an image and its layers known to ostree-ext and bootc, which then fetch neither. Blocks.
//!
//! Format source: ostree-ext's `container/store.rs`. An image has a ref to a commit with its manifest and config. A layer
//! has a ref to a commit with all of its content, which keeps that content from being pruned. The commit of an
//! encapsulated layer has its content objects in one directory, each under its own checksum.

use std::collections::{BTreeSet, HashMap};
use std::io;

use crate::image::{Failure, ImageDescription, Layer, Layout, ResolvedImage};
use crate::store::{DirMeta, Dirtree, NodeStore, ObjectId, ObjectType, image_ref, layer_ref};

use super::plain::{CommitInfo, put, store_commit, store_image};
use super::state::Import;
use super::tree::{Lookup, commit_root, walk};

/// Refs of an image and its layers.
#[derive(Debug, Default)]
pub(super) struct ImageRefs {
    /// Refs in the order in which they are set: those of the image are last.
    pub refs: Vec<(String, ObjectId)>,
    /// Commits that were stored for the refs.
    pub commits: BTreeSet<ObjectId>,
}

/// Keeps the list of a chunk's content objects, for the commit of the layer.
pub(super) fn keep_content(store: &NodeStore, layer: &Layer, content: &[ObjectId]) -> io::Result<()> {
    store.write_layer_list(&list_name(layer), content.iter().flat_map(|id| id.0).collect())
}

fn list_name(layer: &Layer) -> String {
    format!("content-{}", layer.digest().replace(':', "-"))
}

/// Returns the content objects of a chunk that was read to its end.
fn content(import: &Import, layer: &Layer) -> io::Result<Option<BTreeSet<ObjectId>>> {
    let list = import.store.read_layer_list(&list_name(layer))?;
    Ok(list.map(|list| list.chunks(32).filter_map(ObjectId::from_bytes).collect()))
}

/// Returns true if it is known that no object of the chunk is wanted.
pub(super) fn has_nothing_wanted(import: &Import, layer: &Layer) -> bool {
    let content = content(import, layer).ok().flatten();
    content.is_some_and(|content| !content.iter().any(|id| import.wants_content(id)))
}

/// Stores the commits of the layers of which all content exists, and returns their refs. `base` is the encapsulated commit
/// if all of its content exists. `plain` has the commits of plain layers by digest.
pub(super) fn layer_refs(
    import: &Import,
    layout: &Layout,
    base: Option<ObjectId>,
    plain: &HashMap<String, ObjectId>,
) -> Result<ImageRefs, Failure> {
    let mut found = ImageRefs::default();
    for layer in layout.layers() {
        let digest = layer.digest();
        let is_plain = layout.plain.iter().any(|plain| plain.index == layer.index);
        let commit = match held_commit(import, &digest) {
            Some(held) => Some(held),
            None if is_plain => {
                let commit = plain.get(&digest).copied();
                found.commits.extend(commit);
                commit
            }
            None if layer.index == 0 => base,
            None => {
                let chunk = chunk_commit(import, layer)?;
                found.commits.extend(chunk);
                // The content of a layer that was not fetched is not known. All of it is part of the base.
                chunk.or(base)
            }
        };
        found.refs.extend(commit.map(|commit| (layer_ref(&digest), commit)));
    }
    Ok(found)
}

/// Stores the commits of a complete image and of its layers, and returns their refs. `commit` is the image's commit, or
/// the encapsulated commit of an image without plain layers. `plain` has the commits of plain layers by digest. `again` is
/// true if an earlier pull resolved the pull spec.
pub(super) fn image_refs(
    import: &Import,
    image: &ResolvedImage,
    description: &ImageDescription,
    commit: ObjectId,
    plain: &HashMap<String, ObjectId>,
    again: bool,
) -> Result<ImageRefs, Failure> {
    let layout = &description.layout;
    let mut found = layer_refs(import, layout, import.base.commit(), plain)?;
    // Without the ref of the first layer, ostree-ext does not accept the image.
    let first = layout.layers().find(|layer| layer.index == 0).map(|layer| layer_ref(&layer.digest()));
    if !found.refs.iter().any(|(name, _)| Some(name) == first.as_ref()) {
        return Ok(found);
    }
    let merged = match layout.plain.is_empty() {
        false => commit,
        true => {
            let lookup: &mut Lookup<'_> = &mut |id, kind| import.read_metadata(id, kind);
            let root = commit_root(&commit, lookup).map_err(|error| import.tree_failure(&error))?;
            store_image(import, image, description, root)?
        }
    };
    found.commits.insert(merged);
    for name in image_ref_names(image) {
        // Another program may have moved the ref of a tag since the first pull.
        let is_new = || import.store.resolve(&name).map(|commit| commit.is_none());
        if name == image_ref(&image.pinned.reference()) || !again || is_new().map_err(|error| import.local(error))? {
            found.refs.push((name, merged));
        }
    }
    Ok(found)
}

/// Returns true if the store has the refs with which ostree-ext finds the image, and all content of the image.
///
/// Reads the metadata of the image, which takes some tenths of a second.
pub fn has_image(store: &NodeStore, image: &ResolvedImage) -> io::Result<bool> {
    for name in image_ref_names(image) {
        if store.resolve(&name)?.is_none() {
            return Ok(false);
        }
    }
    // Another program may have moved the ref of a tag to another image.
    let Some(commit) = store.resolve(&image_ref(&image.pinned.reference()))? else { return Ok(false) };
    let lookup: &mut Lookup<'_> = &mut |id, kind| store.read_metadata(id, kind);
    let has = |id: &ObjectId| store.find_object(id, ObjectType::File).is_some();
    // A commit that cannot be read is a missing one: the next pull writes it.
    Ok(walk(&commit, lookup).is_ok_and(|tree| tree.content.keys().all(has)))
}

/// Sets a missing ref of the image again if the other one names this image: ostree-ext removes the refs that no deployment
/// names.
pub(super) fn restore_image_refs(store: &NodeStore, image: &ResolvedImage) -> io::Result<()> {
    let (mut missing, mut known) = (Vec::new(), None);
    for name in image_ref_names(image) {
        match store.resolve(&name)? {
            Some(commit) => known = known.or(Some(commit)),
            None => missing.push(name),
        }
    }
    let digest = image.digest.to_string();
    match known.filter(|commit| store.manifest_digest(commit).as_deref() == Some(&digest)) {
        Some(commit) => store.set_refs(missing.iter().map(|name| (name.as_str(), &commit))),
        None => Ok(()),
    }
}

/// Returns the refs of the image: by the pull spec that was asked for, and by digest.
pub(super) fn image_ref_names(image: &ResolvedImage) -> BTreeSet<String> {
    [&image.requested, &image.pinned].into_iter().map(|spec| image_ref(&spec.reference())).collect()
}

/// Returns the commit that a ref of the store or of the booted repo has for the layer, if all of its objects exist.
fn held_commit(import: &Import, digest: &str) -> Option<ObjectId> {
    let own = import.store.resolve(&layer_ref(digest)).ok().flatten();
    let booted = || import.booted.as_ref().and_then(|booted| booted.layer_commit(digest));
    own.into_iter().chain(booted()).find(|commit| !import.store.is_partial(commit) && is_whole(import, commit))
}

/// Returns true if all objects of the commit exist.
fn is_whole(import: &Import, commit: &ObjectId) -> bool {
    let lookup: &mut Lookup<'_> = &mut |id, kind| import.read_metadata(id, kind);
    walk(commit, lookup).is_ok_and(|tree| tree.content.keys().all(|id| import.has_content(id)))
}

/// Stores the commit of a chunk whose content is known and exists.
fn chunk_commit(import: &Import, layer: &Layer) -> Result<Option<ObjectId>, Failure> {
    let Some(content) = content(import, layer).map_err(|error| import.local(error))? else { return Ok(None) };
    // An image may have content in a layer that is not part of its commit. It was not stored.
    let names: Vec<(String, ObjectId)> =
        content.into_iter().filter(|id| import.base_has(id)).map(|id| (id.to_string(), id)).collect();
    if !names.iter().all(|(_, id)| import.has_content(id)) {
        return Ok(None);
    }
    let tree = Dirtree { files: names.iter().map(|(name, id)| (name.as_str(), *id)).collect(), dirs: Vec::new() };
    let tree = put(import, ObjectType::DirTree, &tree.to_bytes())?;
    let meta = DirMeta { mode: 0o755, ..DirMeta::default() }.to_bytes();
    let meta = put(import, ObjectType::DirMeta, &meta)?;
    store_commit(import, &CommitInfo { tree, meta, ..CommitInfo::default() }).map(Some)
}
