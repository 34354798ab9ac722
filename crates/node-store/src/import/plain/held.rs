//! Reads the tree of a plain layer from the commit that the booted repo has of it. Blocks.
//!
//! Format source: ostree-ext's commits of plain layers. Whiteouts are files, as in the archive.

use std::collections::HashMap;

use crate::image::Layer;
use crate::store::{DirMeta, Dirtree, ObjectId, ObjectType};

use super::facts::BaseFacts;
use super::layertree::{BadEntry, LayerFile, LayerTree};
use super::path::Place;
use super::system::remove_left_by_build;
use crate::import::base::Base;
use crate::import::state::Import;
use crate::import::tree::{Lookup, TreeError, commit_root, load, read_dirmeta};

/// Reasons why the commit cannot replace the layer.
#[derive(Debug, thiserror::Error)]
enum Unusable {
    #[error(transparent)]
    Tree(#[from] TreeError),
    #[error(transparent)]
    Entry(#[from] BadEntry),
    #[error("/{0} has another place in this image")]
    Place(String),
    #[error("the booted repo lacks {0}.file")]
    Missing(ObjectId),
}

/// Returns the tree of a layer that the booted repo holds, or `None` if the layer must be fetched.
///
/// # Errors
/// If the tree exceeds the budget.
pub(in crate::import) fn held_tree(
    import: &Import,
    facts: &BaseFacts,
    layer: &Layer,
) -> Result<Option<LayerTree>, BadEntry> {
    let Some(held) = import.held.find(&layer.digest(), &layer.diff_id) else { return Ok(None) };
    let Some(commit) = held.tree else { return Ok(None) };
    // Its importer may have left out content that this import has.
    if facts.placement.any_top_level && !held.any_top_level {
        return Ok(None);
    }
    match tree_of_layer(import, facts, &commit) {
        Ok(tree) => Ok(Some(tree)),
        Err(Unusable::Entry(error @ BadEntry::TooMany(_))) => Err(error),
        Err(reason) => {
            tracing::debug!(layer = layer.index, "cannot use the booted system's copy of the layer: {reason}");
            Ok(None)
        }
    }
}

fn tree_of_layer(import: &Import, facts: &BaseFacts, commit: &ObjectId) -> Result<LayerTree, Unusable> {
    let lookup: &mut Lookup<'_> =
        &mut |id, kind| import.booted.as_ref().map_or(Ok(None), |booted| booted.read_metadata(id, kind));
    let mut tree = LayerTree::new(&import.budget);
    let (root, root_meta) = commit_root(commit, lookup)?;
    let mut queue = vec![(Vec::new(), root, root_meta)];
    // Most directories have one of a few dirmetas.
    let mut metas = HashMap::new();
    while let Some((path, dirtree, dirmeta)) = queue.pop() {
        let meta = match metas.get(&dirmeta) {
            Some(meta) => DirMeta::clone(meta),
            None => metas.entry(dirmeta).or_insert(read_dirmeta(&dirmeta, lookup)?).clone(),
        };
        let (uid, gid, named) = (meta.uid, meta.gid, !meta.is_made());
        tree.directory(&path, meta)?;
        if let Some(dir) = tree.existing(&path) {
            dir.named = named;
        }
        let bytes = load(&dirtree, ObjectType::DirTree, lookup)?;
        let listing = Dirtree::parse(&bytes).map_err(|what| TreeError::Malformed(dirtree, "dirtree", what))?;
        let at = |name: &str| path.iter().cloned().chain([name.to_owned()]).collect::<Vec<String>>();
        for (name, id) in &listing.files {
            let path = at(name);
            check_place(facts, &path)?;
            if tree.whiteout(&path, uid, gid)? {
                continue;
            }
            import.booted_file(id).ok_or(Unusable::Missing(*id))?;
            tree.file(&path, LayerFile::Object(*id), uid, gid)?;
        }
        for (name, dirtree, dirmeta) in &listing.dirs {
            let path = at(name);
            check_place(facts, &path)?;
            queue.push((path, *dirtree, *dirmeta));
        }
    }
    if import.base == Base::Empty {
        let stat = |id: &ObjectId| import.booted_file(id).and_then(|object| object.symlink_metadata().ok());
        remove_left_by_build(&mut tree, &|id| stat(id).is_some_and(|stat| stat.is_file() && stat.len() == 0));
    }
    Ok(tree)
}

/// Refuses a path of the commit to which this import would not move an entry. The importer of the commit may have had
/// other rules for `/var` and for top-level directories.
fn check_place(facts: &BaseFacts, path: &[String]) -> Result<(), Unusable> {
    let shown = path.join("/");
    let is_moved_var = facts.placement.keep_var && shown == "usr/share/factory/var";
    match facts.placement.place(shown.as_bytes()) {
        Ok(Place::At(place)) if place == path && !is_moved_var => Ok(()),
        _ => Err(Unusable::Place(shown)),
    }
}
