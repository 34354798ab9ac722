//! Merges plain layers with the base, labels the merged tree, stores it and commits it. Blocks.
//!
//! Format source: ostree-ext's import of derived images. It defines the metadata of the merge commit, and that the policy
//! of the merged tree labels all of it.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::io;
use std::sync::Arc;

use crate::image::{Failure, ImageDescription, Kind, ResolvedImage};
use crate::store::{ObjectId, ObjectType};

use super::commit::{store_image, store_tree};
use super::facts::BaseFacts;
use super::label::policy_objects;
use super::layertree::LayerTree;
use super::merge::{Content, Dir, MergeError, read_dirtree, tree_of};
use super::path::{foreign, shown};
use super::relabel::Relabeller;
use super::system::{missing_file, no_policy, not_a_system};
use crate::import::base::Base;
use crate::import::budget::{self, OverBudget, Share};
use crate::import::state::Import;
use crate::import::tree::{Depth, Lookup, Target, TreeError, walk};

/// Merged tree before it is labelled.
pub(in crate::import) struct Merged {
    root: Dir,
    warnings: Vec<String>,
    _share: Share,
}

/// Result of [`Merged::commit`].
pub(in crate::import) enum Committed {
    /// The tree was committed.
    Derived(Box<Derived>),
    /// The commit depends on the labels of these objects, which neither repo has.
    Needs(HashSet<ObjectId>),
}

/// Commit of a merged tree.
#[derive(Debug)]
pub(in crate::import) struct Derived {
    pub commit: ObjectId,
    /// Content objects of the commit.
    pub target: Target,
    /// Objects of which relabelled copies were made. A repeated import needs them to compute the same commit.
    pub sources: HashSet<ObjectId>,
    /// Warnings for the operator, one line each.
    pub warnings: Vec<String>,
    /// Commits of plain layers by the digest of the layer, if the import is complete.
    pub layers: HashMap<String, ObjectId>,
}

impl Merged {
    /// Lays `layers` over the base, in order. Each layer has a name for messages.
    pub(in crate::import) fn lay(import: &Import, layers: &[(String, Arc<LayerTree>)]) -> Result<Self, Failure> {
        let mut share = import.budget.share();
        // Every directory that a layer touches is read completely and needs about three times the size of its object.
        let lookup: &mut Lookup<'_> = &mut |id, kind| {
            let bytes = import.read_metadata(id, kind)?;
            let cost = if kind == ObjectType::DirTree { 3 * bytes.as_ref().map_or(0, Vec::len) } else { 0 };
            share.take(cost, 0).map_err(io::Error::other)?;
            Ok(bytes)
        };
        let mut root = match import.base {
            Base::Commit(commit) => tree_of(&commit, lookup).map_err(|error| import.tree_failure(&error))?,
            Base::Empty => Dir::empty(layers.first().map(|(_, layer)| layer.root.meta.clone()).unwrap_or_default()),
        };
        let mut warnings = left_out(layers);
        for (name, layer) in layers {
            let replaced = root.lay(layer, &|id| import.base_has(id), lookup).map_err(|error| match error {
                MergeError::Tree(TreeError::Read(_, _, error))
                    if error.get_ref().is_some_and(|error| error.is::<OverBudget>()) =>
                {
                    Failure {
                        advice: budget::ADVICE,
                        ..Failure::new(Kind::BadFormat, format!("{name}: merging the layer {error}"))
                    }
                }
                MergeError::Tree(error) => import.tree_failure(&error),
                error => Failure::new(Kind::BadFormat, format!("{name}: {error}")),
            })?;
            warnings.extend(replaced_links(import, name, &replaced));
        }
        let merged = Self { root, warnings, _share: share };
        merged.refuse_uncommittable(layers)?;
        Ok(merged)
    }

    /// Refuses names and symlink targets that are not UTF-8, unless a later layer removed them. libostree stores both as
    /// GVariant strings. It refuses such names itself, but its checksum ignores such targets, so that it would confuse
    /// symlinks.
    fn refuse_uncommittable(&self, layers: &[(String, Arc<LayerTree>)]) -> Result<(), Failure> {
        const ADVICE: &str =
            "rename or remove it where the image is built: ostree accepts only UTF-8 names and symlink targets";
        let target = |id: &ObjectId| layers.iter().find_map(|(_, layer)| layer.unstorable.get(id));
        let all = self.root.uncommittable(&|id| target(id).is_some());
        let Some(path) = all.first() else { return Ok(()) };
        let layer = layers.iter().rev().find(|(_, layer)| layer.has(path)).map_or("the image", |(name, _)| name);
        let what = if path.iter().any(|name| foreign(name).is_some()) {
            "a name that is not UTF-8"
        } else {
            "a target that is not UTF-8"
        };
        let more = if all.len() > 1 { format!(" (and {} more such paths)", all.len() - 1) } else { String::new() };
        let message = format!("{layer}: /{} has {what}{more}: it cannot be part of an ostree commit", shown(path));
        Err(Failure { advice: ADVICE, ..Failure::new(Kind::BadFormat, message) })
    }

    /// Returns the content objects of the tree before it is labelled.
    pub(in crate::import) fn target(&self, import: &Import) -> Result<Target, Failure> {
        let mut target = Target::default();
        let lookup: &mut Lookup<'_> = &mut |id, kind| import.read_metadata(id, kind);
        list(&self.root, Depth::Root, &mut HashSet::new(), &mut target, lookup)
            .map_err(|error| import.tree_failure(&error))?;
        Ok(target)
    }

    /// Labels the tree with its own policy, stores its metadata objects, and commits it.
    pub(in crate::import) fn commit(
        mut self,
        import: &Import,
        facts: &BaseFacts,
        image: &ResolvedImage,
        description: &ImageDescription,
    ) -> Result<Committed, Failure> {
        let fail = |error: TreeError| import.tree_failure(&error);
        let lookup: &mut Lookup<'_> = &mut |id, kind| import.read_metadata(id, kind);
        if import.base == Base::Empty
            && let Some(missing) = missing_file(&mut self.root, lookup).map_err(fail)?
        {
            return Err(not_a_system(&image.pinned, missing));
        }
        let policy = policy_objects(&mut self.root, &import.store, lookup).map_err(fail)?;
        let policy = match (policy, &facts.policy) {
            (None, _) => None,
            (Some(objects), Some(base)) if base.objects == objects => Some(base.clone()),
            (Some(objects), _) => {
                let shown = objects.show(&import.store).map_err(|error| import.local(error))?.map(Arc::new);
                Some(shown.ok_or_else(|| import.local("files of the SELinux policy disappeared during the pull"))?)
            }
        };
        // Without an active policy, the files keep the labels of the booted system.
        if import.base == Base::Empty && facts.policy.is_some() && policy.as_ref().is_none_or(|own| !own.is_active()) {
            return Err(no_policy(&image.pinned));
        }
        let mut labels = match &policy {
            Some(policy) => Some(Relabeller::new(import, policy, facts.policy.as_deref(), &image.pinned)?),
            None => None,
        };
        let (tree, meta) = store_tree(import, &self.root, "/", &mut labels)?;
        let unknown = labels.as_ref().map(Relabeller::unknown).unwrap_or_default();
        if !unknown.is_empty() {
            return Ok(Committed::Needs(unknown));
        }
        self.warnings.extend(labels.as_ref().and_then(Relabeller::warning));
        let sources = labels.as_ref().map(Relabeller::sources).unwrap_or_default();
        let commit = store_image(import, image, description, (tree, meta))?;
        drop((labels, self.root));
        let target = walk(&commit, lookup).map_err(|error| import.tree_failure(&error))?;
        Ok(Committed::Derived(Box::new(Derived {
            commit,
            target,
            sources,
            warnings: self.warnings,
            layers: HashMap::new(),
        })))
    }
}

/// Returns a warning for each symlink of the layers below that a directory of the layer `name` replaced.
fn replaced_links(import: &Import, name: &str, replaced: &[(String, ObjectId)]) -> Vec<String> {
    const SHOWN: usize = 12;
    let is_link = |id: &ObjectId| {
        let path = import.content_path(id);
        path.and_then(|path| path.symlink_metadata().ok()).is_some_and(|stat| stat.is_symlink())
    };
    let links = replaced.iter().filter(|(_, id)| is_link(id));
    let line = |(path, _): &(String, ObjectId)| {
        format!(
            "{name}: its directory /{path} replaces a symlink of the layers below: paths through that symlink now lead \
             to this directory"
        )
    };
    links.take(SHOWN).map(line).collect()
}

fn list(
    dir: &Dir,
    depth: Depth,
    seen: &mut HashSet<(ObjectId, Depth)>,
    target: &mut Target,
    lookup: &mut Lookup<'_>,
) -> Result<(), TreeError> {
    let read;
    let (files, dirs) = match &dir.content {
        Content::Open { files, dirs } => (files, dirs),
        Content::Stored(tree) if !seen.insert((*tree, depth)) => return Ok(()),
        Content::Stored(tree) => {
            read = read_dirtree(tree, lookup)?;
            (&read.0, &read.1)
        }
    };
    for id in files.values() {
        target.add(*id, depth);
    }
    for (name, dir) in dirs.iter() {
        list(dir, depth.enter(name), seen, target, lookup)?;
    }
    Ok(())
}

/// Returns a warning for each layer from which entries were left out.
fn left_out(layers: &[(String, Arc<LayerTree>)]) -> Vec<String> {
    const SHOWN: usize = 12;
    let mut lines = Vec::new();
    for (name, layer) in layers.iter().filter(|(_, layer)| !layer.left_out.is_empty()) {
        let total: u64 = layer.left_out.values().map(|count| u64::from(*count)).sum();
        let mut parts: Vec<String> =
            layer.left_out.iter().take(SHOWN).map(|(what, count)| format!("{what} ({count})")).collect();
        if layer.left_out.len() > SHOWN {
            parts.push(format!("and {} more places", layer.left_out.len() - SHOWN));
        }
        lines.push(format!("{name}: {total} entries cannot be part of an ostree commit: {}", parts.join(", ")));
    }
    // An image may have the same layer twice.
    let unique: BTreeSet<String> = lines.into_iter().collect();
    unique.into_iter().collect()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn warnings_name_places_and_counts() {
        let mut layer = LayerTree::default();
        for (place, times) in [("/opt", 3), ("/srv", 1)] {
            (0..times).for_each(|_| layer.leave_out(place.into()));
        }
        let complete = ("layer 2".to_owned(), Arc::new(LayerTree::default()));
        let lines = left_out(&[("layer 1".into(), Arc::new(layer)), complete]);
        assert_eq!(lines, ["layer 1: 4 entries cannot be part of an ostree commit: /opt (3), /srv (1)"]);
    }
}
