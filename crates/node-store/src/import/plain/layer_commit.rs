//! Writes the commit of one plain layer, from which other importers take the layer instead of fetching it. Blocks.
//!
//! Format source: ostree-ext's commits of plain layers. Whiteouts are empty files, as in the archive.

use std::collections::BTreeMap;

use crate::image::Failure;
use crate::store::{DirMeta, Dirtree, FileMeta, ObjectId, ObjectType, SELINUX, Xattrs, label_of};

use super::commit::{CommitInfo, put, store_commit};
use super::layertree::{LayerDir, LayerFile, LayerTree, OPAQUE, WHITEOUT};
use super::path::foreign;
use crate::import::state::Import;

/// Stores the commit of a layer and returns its name. A file of which only a relabelled copy is left has the label of
/// that copy: the importer of another image labels the merged tree again. Entries that cannot be part of a commit, such
/// as those below `/run`, are left out, as by ostree-ext. Returns `None` if the commit would lack something of the layer:
/// a content object for which `stays` returns false, a hardlink to a layer below, or a name or symlink target that is not
/// UTF-8.
pub(in crate::import) fn store_layer(
    import: &Import,
    layer: &LayerTree,
    stays: &dyn Fn(&ObjectId) -> bool,
) -> Result<Option<ObjectId>, Failure> {
    if !layer.unstorable.is_empty() {
        return Ok(None);
    }
    let Some((tree, meta)) = store_dir(import, &layer.root, stays)? else { return Ok(None) };
    store_commit(import, &CommitInfo { tree, meta, ..CommitInfo::default() }).map(Some)
}

/// Stores the dirtree and the dirmeta of a directory, children first.
fn store_dir(
    import: &Import,
    dir: &LayerDir,
    stays: &dyn Fn(&ObjectId) -> bool,
) -> Result<Option<(ObjectId, ObjectId)>, Failure> {
    let mut files = BTreeMap::new();
    for (name, file) in dir.files.iter() {
        let (LayerFile::Object(id) | LayerFile::OfBase(id)) = file else { return Ok(None) };
        let id = import.replacement(id).map_or(*id, |replacement| replacement.copy);
        if foreign(name).is_some() || !stays(&id) {
            return Ok(None);
        }
        files.insert(name.to_owned(), id);
    }
    for (name, ()) in dir.whiteouts.iter() {
        if foreign(name).is_some() {
            return Ok(None);
        }
        files.insert(format!("{WHITEOUT}{name}"), store_empty_file(import, &dir.meta)?);
    }
    if dir.opaque {
        files.insert(OPAQUE.to_owned(), store_empty_file(import, &dir.meta)?);
    }
    let mut dirs = BTreeMap::new();
    for (name, child) in dir.dirs.iter() {
        let stored = if foreign(name).is_some() { None } else { store_dir(import, child, stays)? };
        let Some(stored) = stored else { return Ok(None) };
        dirs.insert(name, stored);
    }
    let tree = Dirtree {
        files: files.iter().map(|(name, id)| (name.as_str(), *id)).collect(),
        dirs: dirs.into_iter().map(|(name, (tree, meta))| (name, tree, meta)).collect(),
    };
    let tree = put(import, ObjectType::DirTree, &tree.to_bytes())?;
    Ok(Some((tree, put(import, ObjectType::DirMeta, &dir.meta.to_bytes())?)))
}

/// Stores an empty file with the label of its directory: without a label, the kernel would add one.
fn store_empty_file(import: &Import, dir: &DirMeta) -> Result<ObjectId, Failure> {
    let xattrs = Xattrs::from_pairs(label_of(&dir.xattrs).map(|label| (SELINUX, label)));
    let file = FileMeta { uid: 0, gid: 0, mode: 0o644, target: None, xattrs };
    let written = import.writer.begin(None, file).finish(|id| !import.has_content(id));
    written.map(|(id, _)| id).map_err(|error| import.write_failure("a whiteout", &error))
}
