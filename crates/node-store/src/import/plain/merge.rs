//! Merges plain layers into the tree of the base. Pure, except that it reads metadata objects. A directory that no
//! layer touches is not read and stays the name of its object.
//!
//! Format source: the OCI image layer specification, and libostree's union checkout with whiteouts, which ostree-ext uses
//! to merge layers: an existing directory keeps its metadata.

use std::collections::HashMap;
use std::sync::Arc;

use crate::store::{DirMeta, Dirtree, ObjectId, ObjectType};

use super::children::Children;
use super::layertree::{LayerDir, LayerFile, LayerTree};
use super::path::{MOVED, Moved, foreign, shown};
use super::shortened::Shortened;
use crate::import::tree::{Lookup, TreeError, commit_root, load, read_dirmeta};

/// A directory of the merged tree.
#[derive(Debug)]
pub(super) struct Dir {
    pub meta: Meta,
    pub content: Content,
}

/// Metadata of a directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Meta {
    /// Those of this dirmeta object.
    Stored(ObjectId),
    /// Those of a directory that the base does not have.
    New(Arc<DirMeta>),
}

/// Content of a directory.
#[derive(Debug)]
pub(super) enum Content {
    /// That of this dirtree object.
    Stored(ObjectId),
    /// Read from a dirtree object, and possibly changed.
    Open { files: Children<ObjectId>, dirs: Children<Dir> },
}

/// Reasons why layers cannot be laid over a tree.
#[derive(Debug, thiserror::Error)]
pub(super) enum MergeError {
    #[error(transparent)]
    Tree(#[from] TreeError),
    #[error("/{0} is a hardlink to /{1}, which is not a file in this layer or the layers below")]
    NoLinkTarget(String, String),
    #[error("/{0} is a hardlink to the object {1}.file, which is not in the image")]
    NoLinkObject(String, ObjectId),
}

/// Files and directories of a dirtree object.
pub(super) type Listing = (Children<ObjectId>, Children<Dir>);

/// Returns the unchanged tree of a commit.
pub(super) fn tree_of(commit: &ObjectId, lookup: &mut Lookup<'_>) -> Result<Dir, TreeError> {
    let (tree, meta) = commit_root(commit, lookup)?;
    Ok(Dir { meta: Meta::Stored(meta), content: Content::Stored(tree) })
}

/// Reads a dirtree object.
pub(super) fn read_dirtree(tree: &ObjectId, lookup: &mut Lookup<'_>) -> Result<Listing, TreeError> {
    let bytes = load(tree, ObjectType::DirTree, lookup)?;
    let parsed = Dirtree::parse(&bytes).map_err(|what| TreeError::Malformed(*tree, "dirtree", what))?;
    let dir = |tree, meta| Dir { meta: Meta::Stored(meta), content: Content::Stored(tree) };
    let dirs = parsed.dirs.into_iter().map(|(name, tree, meta)| (name, dir(tree, meta)));
    Ok((parsed.files.into_iter().collect(), dirs.collect()))
}

impl Dir {
    /// Returns an empty directory.
    pub(super) fn empty(meta: Arc<DirMeta>) -> Self {
        Self { meta: Meta::New(meta), content: Content::empty() }
    }

    /// Returns the content. Reads it from the dirtree object on first use.
    pub(super) fn open(&mut self, lookup: &mut Lookup<'_>) -> Result<OpenDir<'_>, TreeError> {
        if let Content::Stored(tree) = &self.content {
            let (files, dirs) = read_dirtree(tree, lookup)?;
            self.content = Content::Open { files, dirs };
        }
        match &mut self.content {
            Content::Open { files, dirs } => Ok((files, dirs)),
            // Not reachable: replaced above.
            Content::Stored(tree) => Err(TreeError::Missing(*tree, "dirtree")),
        }
    }

    /// Returns the file or symlink at a path, or `None` if the tree has none there.
    pub(super) fn file(&mut self, path: &[String], lookup: &mut Lookup<'_>) -> Result<Option<ObjectId>, TreeError> {
        let Some((name, parents)) = path.split_last() else { return Ok(None) };
        let Some(dir) = self.directory(parents, lookup)? else { return Ok(None) };
        Ok(dir.open(lookup)?.0.get(name).copied())
    }

    /// Returns the directory at a path, or `None` if the tree has none there.
    pub(super) fn directory(
        &mut self,
        path: &[impl AsRef<str>],
        lookup: &mut Lookup<'_>,
    ) -> Result<Option<&mut Dir>, TreeError> {
        let mut dir = self;
        for part in path {
            match dir.open(lookup)?.1.get_mut(part.as_ref()) {
                Some(next) => dir = next,
                None => return Ok(None),
            }
        }
        Ok(Some(dir))
    }

    /// Returns the sorted paths that a commit cannot have: those with a name that is not UTF-8, and symlinks for which
    /// `is_unstorable` returns true.
    pub(super) fn uncommittable(&self, is_unstorable: &dyn Fn(&ObjectId) -> bool) -> Vec<Vec<String>> {
        let mut found = Vec::new();
        let mut queue = vec![(Vec::new(), self)];
        while let Some((path, dir)) = queue.pop() {
            let Content::Open { files, dirs } = &dir.content else { continue };
            let at = |name: &str| path.iter().cloned().chain([name.to_owned()]).collect::<Vec<String>>();
            let bad = files.iter().filter(|(name, id)| foreign(name).is_some() || is_unstorable(id));
            found.extend(bad.map(|(name, _)| at(name)));
            for (name, dir) in dirs.iter() {
                match foreign(name) {
                    Some(_) => found.push(at(name)),
                    None => queue.push((at(name), dir)),
                }
            }
        }
        found.sort();
        found
    }

    /// Lays a layer over the tree. `in_base` returns true for objects of the base.
    pub(super) fn lay(
        &mut self,
        layer: &LayerTree,
        in_base: &dyn Fn(&ObjectId) -> bool,
        lookup: &mut Lookup<'_>,
    ) -> Result<Hidden, MergeError> {
        // Hardlinks to files of the layers below are resolved before the layer hides these files.
        let mut below = HashMap::new();
        let mut queue = vec![&layer.root];
        while let Some(dir) = queue.pop() {
            queue.extend(dir.dirs.values());
            for target in dir.files.values() {
                if let LayerFile::Below(target) = target
                    && let Some(id) = self.file(target, lookup)?
                {
                    below.insert(target, id);
                }
            }
        }
        let object = |path: &str, file: &LayerFile| match file {
            LayerFile::Object(id) => Ok(*id),
            LayerFile::OfBase(id) if in_base(id) => Ok(*id),
            LayerFile::OfBase(id) => Err(MergeError::NoLinkObject(path.to_owned(), *id)),
            LayerFile::Below(target) => {
                below.get(target).copied().ok_or_else(|| MergeError::NoLinkTarget(path.to_owned(), shown(target)))
            }
        };
        if layer.root.opaque {
            self.content = Content::empty();
        }
        let mut hidden = Hidden::default();
        lay(self, &layer.root, "", &object, &mut hidden, lookup)?;
        Ok(hidden)
    }
}

impl Content {
    fn empty() -> Self {
        Content::Open { files: Children::default(), dirs: Children::default() }
    }
}

/// Content of the layers below that a layer hides in a way that its author may not expect.
#[derive(Debug, Default)]
pub(super) struct Hidden {
    /// Files and symlinks that a directory of the layer replaced, by path.
    pub replaced: Vec<(String, ObjectId)>,
    /// Directories of [`MOVED`] that disappeared because the layer removed a directory above their place in the tree, and
    /// that directory.
    pub moved: Vec<(Moved, String)>,
    /// Directories of the layers below whose mode or owner the layer would change.
    pub metadata: Shortened,
}

impl Hidden {
    /// Removes a directory of the layers below.
    fn remove(
        &mut self,
        dirs: &mut Children<Dir>,
        name: &str,
        path: &str,
        lookup: &mut Lookup<'_>,
    ) -> Result<(), TreeError> {
        let Some(mut dir) = dirs.remove(name) else { return Ok(()) };
        for moved in MOVED {
            let below = moved.place.strip_prefix(path).and_then(|below| below.strip_prefix('/'));
            let below: Vec<&str> = below.into_iter().flat_map(|below| below.split('/')).collect();
            if !below.is_empty() && dir.directory(&below, lookup)?.is_some() {
                self.moved.push((moved, path.to_owned()));
            }
        }
        Ok(())
    }

    /// Compares the mode and the owner of a directory with those in the layer.
    fn note_metadata(
        &mut self,
        below: &Meta,
        layer: &LayerDir,
        path: &str,
        lookup: &mut Lookup<'_>,
    ) -> Result<(), TreeError> {
        let ignored = layer.meta.rights();
        let kept = match below {
            _ if !layer.named => return Ok(()),
            // An encapsulated image has no parent directories. Container engines make them, and the layers upon it have them.
            Meta::Stored(_) if layer.meta.is_made() => return Ok(()),
            Meta::Stored(id) => read_dirmeta(id, lookup)?.rights(),
            Meta::New(kept) => kept.rights(),
        };
        if kept != ignored {
            let shown = |(mode, uid, gid): (u32, u32, u32)| format!("mode {mode:04o} and owner {uid}:{gid}");
            let (kept, ignored) = (shown(kept), shown(ignored));
            self.metadata.push(format!(
                "its {ignored} for the directory /{path} are ignored: the directory keeps {kept} of the layers below"
            ));
        }
        Ok(())
    }
}

/// Files and directories of an open directory.
pub(super) type OpenDir<'a> = (&'a mut Children<ObjectId>, &'a mut Children<Dir>);

type Object<'a> = dyn Fn(&str, &LayerFile) -> Result<ObjectId, MergeError> + 'a;

fn lay(
    below: &mut Dir,
    layer: &LayerDir,
    path: &str,
    object: &Object<'_>,
    hidden: &mut Hidden,
    lookup: &mut Lookup<'_>,
) -> Result<(), MergeError> {
    hidden.note_metadata(&below.meta, layer, path, lookup)?;
    if layer.whiteouts.is_empty() && layer.files.is_empty() && layer.dirs.is_empty() {
        return Ok(());
    }
    let (files, dirs) = below.open(lookup)?;
    let at = |name: &str| {
        let name = foreign(name).unwrap_or(name);
        if path.is_empty() { name.to_owned() } else { format!("{path}/{name}") }
    };
    for (name, ()) in layer.whiteouts.iter() {
        files.remove(name);
        hidden.remove(dirs, name, &at(name), lookup)?;
    }
    for (name, file) in layer.files.iter() {
        dirs.remove(name);
        files.insert(name, object(&at(name), file)?);
    }
    for (name, layer) in layer.dirs.iter() {
        if let Some(id) = files.remove(name) {
            hidden.replaced.push((at(name), id));
        }
        if layer.opaque {
            hidden.remove(dirs, name, &at(name), lookup)?;
        }
        let new = || Dir::empty(layer.meta.clone());
        lay(dirs.or_insert_with(name, new), layer, &at(name), object, hidden, lookup)?;
    }
    Ok(())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use sha2::{Digest, Sha256};
    use std::collections::HashMap;

    fn path(text: &str) -> Vec<String> {
        text.split('/').map(str::to_owned).collect()
    }

    fn id(byte: u8) -> ObjectId {
        ObjectId([byte; 32])
    }

    /// Returns a base in memory with /usr/{a,b} and /usr/d/{c,e}.
    fn base() -> (HashMap<ObjectId, Vec<u8>>, Dir) {
        let mut objects = HashMap::new();
        let mut put = |bytes: Vec<u8>| {
            let id = ObjectId(Sha256::digest(&bytes).into());
            objects.insert(id, bytes);
            id
        };
        let meta = put(DirMeta { mode: 0o750, ..DirMeta::default() }.to_bytes());
        let bytes = |files: &[(&'static str, u8)], dirs| {
            let files = files.iter().map(|(name, byte)| (*name, id(*byte))).collect();
            Dirtree { files, dirs }.to_bytes()
        };
        let d = put(bytes(&[("c", 3), ("e", 4)], vec![]));
        let usr = put(bytes(&[("a", 1), ("b", 2)], vec![("d", d, meta)]));
        let root = put(bytes(&[], vec![("usr", usr, meta)]));
        (objects, Dir { meta: Meta::Stored(meta), content: Content::Stored(root) })
    }

    fn laid(entries: &[(&str, u8)]) -> Result<(Dir, HashMap<ObjectId, Vec<u8>>), MergeError> {
        let (objects, mut tree) = base();
        let mut layer = LayerTree::default();
        for (name, byte) in entries {
            let at = path(name.trim_end_matches('/'));
            match byte {
                0 if name.ends_with('/') => layer.directory(&at, DirMeta::default()).unwrap(),
                0 if layer.whiteout(&at, 0, 0).unwrap() => {}
                byte => layer.file(&at, LayerFile::Object(id(*byte)), 0, 0).unwrap(),
            }
        }
        layer.file(&path("usr/link"), LayerFile::Below(path("usr/a")), 0, 0).unwrap();
        let hidden = tree.lay(&layer, &|_| true, &mut |id, _| Ok(objects.get(id).cloned()))?;
        assert_eq!(hidden.moved, []);
        Ok((tree, objects))
    }

    #[test]
    fn layers_remove_replace_and_link_files() {
        for (entries, removed, present) in [
            (&[("usr/.wh.a", 0)][..], &["usr/a"][..], &[("usr/b", 2), ("usr/link", 1)][..]),
            (&[("usr/.wh.d", 0)], &["usr/d/c"], &[("usr/a", 1)]),
            (&[("usr/d", 9)], &["usr/d/c"], &[("usr/d", 9)]),
            (&[("usr/a/", 0), ("usr/a/x", 8)], &["usr/a"], &[("usr/a/x", 8), ("usr/link", 1)]),
            (&[("usr/d/.wh..wh..opq", 0), ("usr/d/new", 7)], &["usr/d/c", "usr/d/e"], &[("usr/d/new", 7)]),
            (&[("usr/.wh.a", 0), ("usr/a", 5)], &[], &[("usr/a", 5), ("usr/link", 1)]),
            (&[("usr/d/.wh.nothing", 0)], &[], &[("usr/d/c", 3)]),
        ] {
            let (mut tree, objects) = laid(entries).unwrap();
            let lookup: &mut Lookup<'_> = &mut |id, _| Ok(objects.get(id).cloned());
            for name in removed {
                assert_eq!(tree.file(&path(name), lookup).unwrap(), None, "{entries:?} {name}");
            }
            for (name, byte) in present {
                assert_eq!(tree.file(&path(name), lookup).unwrap(), Some(id(*byte)), "{entries:?} {name}");
            }
        }
    }

    #[test]
    fn directories_that_a_whiteout_above_removes_are_named() {
        for (entries, moved) in [
            (&["usr/.wh..wh..opq"][..], &["etc"][..]),
            (&[".wh.usr"], &["etc"]),
            (&["usr/.wh.etc"], &[]),
            (&["usr/etc/.wh..wh..opq"], &[]),
            (&["usr/d/.wh..wh..opq"], &[]),
        ] {
            let (objects, mut tree) = base();
            let lookup: &mut Lookup<'_> = &mut |id, _| Ok(objects.get(id).cloned());
            let mut below = LayerTree::default();
            below.file(&path("usr/etc/app"), LayerFile::Object(id(6)), 0, 0).unwrap();
            tree.lay(&below, &|_| true, lookup).unwrap();
            let mut layer = LayerTree::default();
            entries.iter().for_each(|entry| assert!(layer.whiteout(&path(entry), 0, 0).unwrap()));
            let hidden = tree.lay(&layer, &|_| true, lookup).unwrap();
            assert_eq!(hidden.moved.iter().map(|(moved, _)| moved.archive).collect::<Vec<_>>(), moved, "{entries:?}");
        }
    }

    #[test]
    fn directories_that_exist_keep_their_metadata() {
        let (mut tree, objects) = laid(&[("usr/d/", 0), ("usr/n/", 0)]).unwrap();
        let lookup: &mut Lookup<'_> = &mut |id, _| Ok(objects.get(id).cloned());
        let meta = |tree: &mut Dir, name: &str, lookup: &mut Lookup<'_>| {
            tree.directory(&path(name), lookup).unwrap().unwrap().meta.clone()
        };
        let Meta::Stored(stored) = meta(&mut tree, "usr/d", lookup) else { panic!("changed") };
        assert_eq!(read_dirmeta(&stored, lookup).unwrap().mode, 0o750);
        assert_eq!(meta(&mut tree, "usr/n", lookup), Meta::New(Arc::default()));
        let untouched = tree.directory(&path("usr/d"), lookup).unwrap().unwrap();
        assert!(matches!(untouched.content, Content::Stored(_)), "an unchanged directory was read");
    }

    #[test]
    fn ignored_metadata_are_named() {
        let meta = |mode, uid| DirMeta { mode, uid, ..DirMeta::default() };
        let entry = |name: &str, meta: DirMeta| {
            let mut layer = LayerTree::default();
            layer.directory(&path(name), meta).unwrap();
            layer
        };
        let mut parents = entry("usr/d", meta(0o700, 0));
        parents.file(&path("usr/d/new/x"), LayerFile::Object(id(8)), 5, 0).unwrap();
        for (layer, ignored) in [
            (entry("usr/d", meta(0o700, 0)), Some("mode 0700 and owner 0:0")),
            (entry("usr/d", meta(0o755, 7)), Some("mode 0755 and owner 7:0")),
            // A container engine makes such a parent of a file in the base.
            (entry("usr/d", meta(0o755, 0)), None),
            (entry("usr/d", meta(0o750, 0)), None),
            (entry("usr/own", meta(0o700, 0)), Some("mode 0700 and owner 0:0")),
            (entry("usr/own", meta(0o755, 0)), None),
            // Without an entry that counts.
            (parents, None),
        ] {
            let (objects, mut tree) = base();
            let lookup: &mut Lookup<'_> = &mut |id, _| Ok(objects.get(id).cloned());
            tree.lay(&entry("usr/own", meta(0o755, 0)), &|_| true, lookup).unwrap();
            let lines = tree.lay(&layer, &|_| true, lookup).unwrap().metadata.lines();
            assert_eq!(lines.len(), usize::from(ignored.is_some()), "{lines:?}");
            assert!(lines.iter().all(|line| ignored.is_some_and(|words| line.contains(words))), "{lines:?}");
        }
    }

    #[test]
    fn hardlinks_to_missing_files_are_errors() {
        let (objects, mut tree) = base();
        for (file, words) in
            [(LayerFile::Below(path("usr/none")), "/usr/none"), (LayerFile::OfBase(id(9)), "not in the image")]
        {
            let mut layer = LayerTree::default();
            layer.file(&path("usr/x"), file, 0, 0).unwrap();
            let lookup: &mut Lookup<'_> = &mut |id, _| Ok(objects.get(id).cloned());
            let error = tree.lay(&layer, &|_| false, lookup).unwrap_err().to_string();
            assert!(error.contains("/usr/x") && error.contains(words), "{error}");
        }
    }
}
