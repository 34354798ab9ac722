//! Content of one plain layer: a tree of directories, files (as object names) and whiteouts. Pure. The reader builds it
//! entry by entry, [`super::kept`] serialises it, [`super::merge`] lays it over the tree below.
//!
//! Format source: the OCI image layer specification (whiteouts), and libostree's import of tar archives, which
//! ostree-ext uses for plain layers. A parent directory without an entry gets the owner of the entry below it, and mode
//! 0755.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::store::{DirMeta, ObjectId, S_IFDIR, label_of, set_label};

use super::children::Children;
use super::path::{foreign, shown};
use crate::import::budget::{Budget, OverBudget, Share};

/// A regular file or symlink.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum LayerFile {
    /// Content object.
    Object(ObjectId),
    /// Hardlink to a path that this layer does not have: the file that the layers below have at that path.
    Below(Vec<String>),
    /// Hardlink to an object of the base commit.
    OfBase(ObjectId),
}

/// A directory of the layer.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct LayerDir {
    /// Metadata to use if the layers below do not have the directory.
    pub meta: Arc<DirMeta>,
    /// True if the metadata are those of an entry of the archive.
    pub named: bool,
    /// True if the content that the layers below have in this directory is hidden.
    pub opaque: bool,
    /// Names of entries of the layers below that are removed.
    pub whiteouts: Children<()>,
    pub files: Children<LayerFile>,
    pub dirs: Children<LayerDir>,
}

/// Content of a layer.
#[derive(Debug, Default)]
pub(in crate::import) struct LayerTree {
    pub(super) root: LayerDir,
    /// Number of entries that were left out, by top-level directory, device or fifo.
    pub(super) left_out: BTreeMap<String, u32>,
    /// Escaped targets, by object name, of symlinks whose target is not UTF-8. libostree cannot represent them, so these
    /// objects are not stored.
    pub(super) unstorable: BTreeMap<ObjectId, String>,
    /// Paths of hardlinks that are resolved at the end of the layer.
    links: Vec<Vec<String>>,
    /// Entries of the layer in the repo's object directory, by path; `None` for an entry that is not a file.
    repo_objects: HashMap<String, Option<LayerFile>>,
    /// Distinct metadata, so that equal ones share memory.
    metas: HashSet<Arc<DirMeta>>,
    share: Share,
    /// Share of the entries in the merged tree and in the sets of objects, which outlives this tree.
    pub(super) merged: Share,
}

/// Approximate memory of an entry in bytes.
#[derive(Debug, Clone, Copy)]
struct Cost {
    /// In this tree.
    here: usize,
    /// In the merged tree and in the sets of objects.
    merged: usize,
}

const DIR: Cost = Cost { here: 165, merged: 165 };
const FILE: Cost = Cost { here: 160, merged: 550 };

/// Reasons why an entry cannot be part of a tree.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(in crate::import) enum BadEntry {
    #[error("is a whiteout without a name")]
    EmptyWhiteout,
    #[error("would replace the root directory")]
    Root,
    #[error("is below /{0}, which is not a directory in this layer")]
    BelowFile(String),
    #[error(transparent)]
    TooMany(#[from] OverBudget),
    #[error("is a hardlink to the directory /{0}")]
    LinkToDirectory(String),
    #[error("is a hardlink to /{0}, which is part of a circle of hardlinks")]
    LinkCircle(String),
}

pub(super) const WHITEOUT: &str = ".wh.";
pub(super) const OPAQUE: &str = ".wh..wh..opq";

impl LayerTree {
    pub(in crate::import) fn new(budget: &Budget) -> Self {
        // The root of an archive without an entry for it.
        let root = LayerDir { meta: Arc::new(DirMeta { mode: 0o755, ..DirMeta::default() }), ..LayerDir::default() };
        Self { root, share: budget.share(), merged: budget.share(), ..Self::default() }
    }

    /// Returns an empty tree for the entries of a layer whose share in the merged tree is counted already.
    pub(super) fn counted(budget: &Budget) -> Self {
        Self { merged: Share::default(), ..Self::new(budget) }
    }

    /// Counts the memory of `entries` entries, with `bytes` for each of the two places beside their cost.
    fn take(&mut self, cost: Cost, entries: usize, bytes: usize) -> Result<(), OverBudget> {
        self.share.take(cost.here * entries + bytes, 0)?;
        self.merged.take(cost.merged * entries + bytes, entries)
    }

    /// Adds a directory, or replaces its metadata.
    pub(super) fn directory(&mut self, path: &[String], meta: DirMeta) -> Result<(), BadEntry> {
        let (uid, gid) = (meta.uid, meta.gid);
        let meta = self.meta(meta)?;
        let Some((name, parents)) = path.split_last() else {
            (self.root.meta, self.root.named) = (meta, true);
            return Ok(());
        };
        self.take(DIR, 1, name.len())?;
        let parent = self.parent(parents, uid, gid)?;
        parent.files.remove(name);
        let dir = parent.dirs.or_insert_with(name, LayerDir::default);
        (dir.meta, dir.named) = (meta, true);
        Ok(())
    }

    /// Adds a file or symlink. Replaces an earlier entry of the layer at this path.
    pub(super) fn file(&mut self, path: &[String], file: LayerFile, uid: u32, gid: u32) -> Result<(), BadEntry> {
        let (name, parents) = path.split_last().ok_or(BadEntry::Root)?;
        self.take(FILE, 1, name.len())?;
        if let LayerFile::Below(target) = &file {
            // A hardlink from a file to itself has no effect.
            if target == path && matches!(self.lookup(path), Some(Found::File(_))) {
                return Ok(());
            }
            self.share.take([path, target].into_iter().flatten().map(|part| 56 + part.len()).sum(), 0)?;
            self.links.push(path.to_vec());
        }
        let parent = self.parent(parents, uid, gid)?;
        parent.dirs.remove(name);
        parent.files.insert(name, file);
        Ok(())
    }

    /// Records an entry in the repo's object directory. `file` is the target of hardlinks to it, or `None` if it cannot be
    /// one.
    pub(super) fn repo_object(&mut self, path: String, file: Option<LayerFile>) -> Result<(), BadEntry> {
        self.take(FILE, 1, path.len())?;
        self.repo_objects.insert(path, file);
        Ok(())
    }

    /// Returns the entry of the layer at a path in the repo's object directory, or `None` if it has none.
    pub(super) fn in_repo(&self, path: &str) -> Option<Option<&LayerFile>> {
        self.repo_objects.get(path).map(Option::as_ref)
    }

    /// Records a symlink whose target is not UTF-8. `target` is its escaped form, `id` the name of its object.
    pub(super) fn unstorable(&mut self, id: ObjectId, target: String) -> Result<(), BadEntry> {
        self.share.take(FILE.here + target.len(), 0)?;
        self.unstorable.insert(id, target);
        Ok(())
    }

    /// Adds a whiteout. Returns false if the name of `path` is not that of a whiteout.
    pub(super) fn whiteout(&mut self, path: &[String], uid: u32, gid: u32) -> Result<bool, BadEntry> {
        let Some((name, parents)) = path.split_last() else { return Ok(false) };
        let Some(hidden) = foreign(name).unwrap_or(name).strip_prefix(WHITEOUT) else { return Ok(false) };
        if matches!(hidden, "" | "." | "..") {
            return Err(BadEntry::EmptyWhiteout);
        }
        self.take(FILE, 1, name.len())?;
        let parent = self.parent(parents, uid, gid)?;
        if name == OPAQUE {
            parent.opaque = true;
        } else if !hidden.starts_with(WHITEOUT) {
            // Removes only the infix, so that an escaped name keeps its prefix.
            parent.whiteouts.insert(&name.replacen(WHITEOUT, "", 1), ());
        }
        // Storage drivers use other names of the form .wh..wh.* for their own data.
        Ok(true)
    }

    /// Counts an entry that cannot be part of the tree.
    pub(super) fn leave_out(&mut self, what: String) {
        // Limits the memory that a hostile layer can use.
        const MAX_NAMES: usize = 1000;
        if self.left_out.len() < MAX_NAMES || self.left_out.contains_key(&what) {
            *self.left_out.entry(what).or_default() += 1;
        }
    }

    /// Resolves hardlinks within the layer, after its last entry. An error has the path of the invalid hardlink.
    pub(super) fn resolve_links(&mut self) -> Result<(), (String, BadEntry)> {
        self.repo_objects = HashMap::new();
        for path in std::mem::take(&mut self.links) {
            let mut target = path.clone();
            let mut steps = 0;
            let found = loop {
                match self.lookup(&target) {
                    // A hardlink to itself: the file that the layers below have at this path.
                    Some(Found::File(LayerFile::Below(next))) if *next == target => break LayerFile::Below(target),
                    Some(Found::File(LayerFile::Below(next))) if steps < 64 => {
                        steps += 1;
                        target = next.clone();
                    }
                    Some(Found::File(LayerFile::Below(_))) => {
                        return Err((shown(&path), BadEntry::LinkCircle(shown(&target))));
                    }
                    Some(Found::File(file)) => break file.clone(),
                    Some(Found::Directory) if steps > 0 => {
                        return Err((shown(&path), BadEntry::LinkToDirectory(shown(&target))));
                    }
                    _ => break LayerFile::Below(target),
                }
            };
            // A later entry may have replaced the hardlink.
            if let Some((name, parents)) = path.split_last()
                && let Some(file) = self.existing(parents).and_then(|dir| dir.files.get_mut(name))
                && matches!(file, LayerFile::Below(_))
            {
                *file = found;
            }
        }
        Ok(())
    }

    /// Labels directories without a label: parents that have no entry in the archive.
    pub(super) fn label_parents<E: From<BadEntry>>(&mut self, label: &FindLabel<'_, E>) -> Result<(), E> {
        let mut root = std::mem::take(&mut self.root);
        self.label_below(&mut root, "", label)?;
        self.root = root;
        Ok(())
    }

    fn label_below<E: From<BadEntry>>(
        &mut self,
        dir: &mut LayerDir,
        path: &str,
        label: &FindLabel<'_, E>,
    ) -> Result<(), E> {
        let shown = if path.is_empty() { "/" } else { path };
        if label_of(&dir.meta.xattrs).is_none()
            && let Some(label) = label(shown, S_IFDIR | dir.meta.mode)?
        {
            let mut meta = DirMeta::clone(&dir.meta);
            set_label(&mut meta.xattrs, label);
            dir.meta = self.meta(meta)?;
        }
        for (name, child) in dir.dirs.iter_mut() {
            self.label_below(child, &format!("{path}/{}", foreign(name).unwrap_or(name)), label)?;
        }
        Ok(())
    }

    /// Adds a deserialised directory at its path. Returns false if its parent is missing.
    pub(super) fn restore(&mut self, path: &[String], dir: LayerDir) -> Result<bool, BadEntry> {
        let entries = dir.files.len() + dir.whiteouts.len();
        let names: usize = dir.files.iter().map(|(name, _)| name.len()).sum();
        self.take(DIR, 1, 0)?;
        self.take(FILE, entries, names)?;
        match path.split_last() {
            None => self.root = dir,
            Some((name, parents)) => match self.existing(parents) {
                Some(parent) => parent.dirs.insert(name, dir),
                None => return Ok(false),
            },
        }
        Ok(true)
    }

    /// Returns true if the layer has an entry at the path.
    pub(super) fn has(&self, path: &[String]) -> bool {
        self.lookup(path).is_some()
    }

    /// Returns true if the layer has a storable object for which `is_one` returns true.
    pub(in crate::import) fn has_object(&self, is_one: &dyn Fn(&ObjectId) -> bool) -> bool {
        let mut queue = vec![&self.root];
        while let Some(dir) = queue.pop() {
            let is_one = |id: &ObjectId| is_one(id) && !self.unstorable.contains_key(id);
            if dir.files.values().any(|file| matches!(file, LayerFile::Object(id) if is_one(id))) {
                return true;
            }
            queue.extend(dir.dirs.values());
        }
        false
    }

    fn lookup(&self, path: &[String]) -> Option<Found<'_>> {
        let Some((name, parents)) = path.split_last() else { return Some(Found::Directory) };
        let dir = parents.iter().try_fold(&self.root, |dir, part| dir.dirs.get(part))?;
        dir.files.get(name).map(Found::File).or_else(|| dir.dirs.get(name).map(|_| Found::Directory))
    }

    /// Returns the directory of the layer at the path.
    pub(super) fn existing(&mut self, path: &[String]) -> Option<&mut LayerDir> {
        path.iter().try_fold(&mut self.root, |dir, part| dir.dirs.get_mut(part))
    }

    /// Returns the parent directory of an entry. If a directory on the path is missing, the root and all directories on the
    /// path get the owner of the entry and mode 0755, as in libostree.
    ///
    /// # Errors
    /// If the path leads through a symlink or file of the same layer. libostree refuses such paths too: a reader that
    /// follows the symlink reaches another directory than a reader that replaces it.
    fn parent(&mut self, path: &[String], uid: u32, gid: u32) -> Result<&mut LayerDir, BadEntry> {
        let mut dir = &self.root;
        let mut there = 0;
        for part in path {
            if dir.files.contains(part) {
                return Err(BadEntry::BelowFile(shown(&path[..=there])));
            }
            let Some(next) = dir.dirs.get(part) else { break };
            (dir, there) = (next, there + 1);
        }
        let missing = &path[there..];
        let meta = match missing {
            [] => None,
            _ => Some(self.meta(DirMeta { uid, gid, mode: 0o755, xattrs: Vec::new() })?),
        };
        self.take(DIR, missing.len(), missing.iter().map(String::len).sum())?;
        let made = |dir: &mut LayerDir| {
            if let Some(meta) = &meta {
                (dir.meta, dir.named) = (meta.clone(), false);
            }
        };
        let mut dir = &mut self.root;
        made(dir);
        for part in path {
            dir = dir.dirs.or_insert_with(part, LayerDir::default);
            made(dir);
        }
        Ok(dir)
    }

    /// Returns a shared copy of the metadata.
    pub(super) fn meta(&mut self, meta: DirMeta) -> Result<Arc<DirMeta>, BadEntry> {
        if let Some(known) = self.metas.get(&meta) {
            return Ok(known.clone());
        }
        let xattrs: usize = meta.xattrs.iter().map(|(name, value)| 96 + name.len() + value.len()).sum();
        self.merged.take(DIR.here + DIR.merged + xattrs, 0)?;
        let meta = Arc::new(meta);
        self.metas.insert(meta.clone());
        Ok(meta)
    }
}

/// Function that looks up the label of an absolute path and a mode.
type FindLabel<'a, E> = dyn Fn(&str, u32) -> Result<Option<Vec<u8>>, E> + 'a;

enum Found<'a> {
    File(&'a LayerFile),
    Directory,
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests;
