//! Merges plain layers with the base, labels the merged tree, stores it and commits it. Blocks.
//!
//! Format source: ostree-ext's import of derived images. It defines the metadata of the merge commit, and that the policy
//! of the merged tree labels all of it.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::io;
use std::sync::Arc;

use crate::image::{Failure, ImageDescription, Kind, ResolvedImage};
use crate::store::{ObjectId, ObjectType};

use super::commit::{store_image, store_tree};
use super::facts::BaseFacts;
use super::kept::KeptTree;
use super::label::policy_objects;
use super::layertree::LayerTree;
use super::merge::{Content, Dir, Hidden, MergeError, read_dirtree, tree_of};
use super::path::{Moved, foreign, shown};
use super::relabel::Relabeller;
use super::shortened::{SHOWN, Shortened};
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
    pub(in crate::import) fn lay(import: &Import, layers: &[(String, Arc<KeptTree>)]) -> Result<Self, Failure> {
        let mut share = import.budget.share();
        // Every directory that a layer touches is read completely and needs about three times the size of its object.
        let lookup: &mut Lookup<'_> = &mut |id, kind| {
            let bytes = import.read_metadata(id, kind)?;
            let cost = if kind == ObjectType::DirTree { 3 * bytes.as_ref().map_or(0, Vec::len) } else { 0 };
            share.take(cost, 0).map_err(io::Error::other)?;
            Ok(bytes)
        };
        let mut root = match import.base {
            Base::Commit(commit) => Some(tree_of(&commit, lookup).map_err(|error| import.tree_failure(&error))?),
            Base::Empty => None,
        };
        let (mut left_outs, mut unstorable) = (BTreeSet::new(), BTreeMap::new());
        let (mut hidden, mut metadata) = (Shortened::default(), Shortened::default());
        for (name, kept) in layers {
            let layer = kept.tree(import)?;
            left_outs.extend(left_out(name, &layer));
            let root = root.get_or_insert_with(|| Dir::empty(layer.root.meta.clone()));
            let below = root.lay(&layer, &|id| import.base_has(id), lookup).map_err(|error| match error {
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
            hidden.extend(hidden_below(import, name, &below));
            metadata.append(name, below.metadata);
            unstorable.extend(layer.unstorable);
        }
        // An image may have the same layer twice.
        let mut left_out = Shortened::default();
        left_out.extend(left_outs);
        let warnings = [left_out, hidden, metadata].map(Shortened::lines).concat();
        let merged = Self { root: root.unwrap_or_else(|| Dir::empty(Arc::default())), warnings, _share: share };
        merged.refuse_uncommittable(import, layers, &unstorable)?;
        Ok(merged)
    }

    /// Refuses names and symlink targets that are not UTF-8, unless a later layer removed them. libostree stores both as
    /// GVariant strings. It refuses such names itself, but its checksum ignores such targets, so that it would confuse
    /// symlinks.
    fn refuse_uncommittable(
        &self,
        import: &Import,
        layers: &[(String, Arc<KeptTree>)],
        unstorable: &BTreeMap<ObjectId, String>,
    ) -> Result<(), Failure> {
        const ADVICE: &str =
            "rename or remove it where the image is built: ostree accepts only UTF-8 names and symlink targets";
        let all = self.root.uncommittable(&|id| unstorable.contains_key(id));
        let Some(path) = all.first() else { return Ok(()) };
        let has_path = |kept: &KeptTree| kept.tree(import).is_ok_and(|layer| layer.has(path));
        let layer = layers.iter().rev().find(|(_, kept)| has_path(kept)).map_or("the image", |(name, _)| name);
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
            Some(policy) => {
                let (base, several) = (facts.policy.as_deref(), with_several_names(&self.root));
                Some(Relabeller::new(import, policy, base, several, &image.pinned)?)
            }
            None => None,
        };
        let (tree, meta) = store_tree(import, &self.root, "/", &mut labels)?;
        let unknown = labels.as_ref().map(Relabeller::unknown).unwrap_or_default();
        if !unknown.is_empty() {
            return Ok(Committed::Needs(unknown));
        }
        labels.as_ref().map_or(Ok(()), Relabeller::finish)?;
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

/// Returns a warning for each symlink of the layers below that a directory of the layer `name` replaced, and for each
/// directory that it removed by a whiteout of another path.
fn hidden_below<'a>(import: &'a Import, name: &'a str, hidden: &'a Hidden) -> impl Iterator<Item = String> + 'a {
    let is_link = move |id: &ObjectId| {
        let path = import.content_path(id);
        path.and_then(|path| path.symlink_metadata().ok()).is_some_and(|stat| stat.is_symlink())
    };
    let links = hidden.replaced.iter().filter(move |(_, id)| is_link(id));
    let line = move |(path, _): &(String, ObjectId)| {
        format!(
            "{name}: its directory /{path} replaces a symlink of the layers below: paths through that symlink now lead \
             to this directory"
        )
    };
    let moved = hidden.moved.iter().map(move |(Moved { archive, place }, removed)| {
        format!(
            "{name}: it removes the /{removed} of the layers below, and with it /{place}, where ostree keeps /{archive}"
        )
    });
    links.map(line).chain(moved)
}

/// Returns the objects that the layers have at more than one path.
fn with_several_names(root: &Dir) -> HashSet<ObjectId> {
    let (mut seen, mut several, mut queue) = (HashSet::new(), HashSet::new(), vec![root]);
    while let Some(dir) = queue.pop() {
        // Directories that no layer changed have only objects of the base.
        let Content::Open { files, dirs } = &dir.content else { continue };
        several.extend(files.values().filter(|id| !seen.insert(**id)));
        queue.extend(dirs.values());
    }
    several
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

/// Returns a warning if entries of the layer were left out.
fn left_out(name: &str, layer: &LayerTree) -> Option<String> {
    let total: u64 = layer.left_out.values().map(|count| u64::from(*count)).sum();
    let mut parts: Vec<String> =
        layer.left_out.iter().take(SHOWN).map(|(what, count)| format!("{what} ({count})")).collect();
    if layer.left_out.len() > SHOWN {
        parts.push(format!("and {} more places", layer.left_out.len() - SHOWN));
    }
    let line = || format!("{name}: {total} entries cannot be part of an ostree commit: {}", parts.join(", "));
    (total > 0).then(line)
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
        assert_eq!(left_out("layer 2", &LayerTree::default()), None);
        let line = left_out("layer 1", &layer).unwrap();
        assert_eq!(line, "layer 1: 4 entries cannot be part of an ostree commit: /opt (3), /srv (1)");
    }
}
