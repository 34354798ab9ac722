//! What one plain layer holds: a tree of directories, files that are objects already, and whiteouts.
//! Pure. Built entry by entry, kept between runs, laid over the tree below by [`super::merge`].
//!
//! Format source: the OCI image layer specification (whiteouts), and libostree's import of tar
//! archives, which ostree-ext reads plain layers with: parents that have no entry of their own belong
//! to the owner of the entry that needs them, with mode 0755.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use crate::store::ObjectId;

use super::path::{foreign, shown};

/// Everything about a directory but its content. Mode is 07777 only.
#[derive(Debug, Clone, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub(super) struct DirMeta {
    pub uid: u32,
    pub gid: u32,
    pub mode: u32,
    /// Names without NUL, and values.
    pub xattrs: Vec<(Vec<u8>, Vec<u8>)>,
}

/// A regular file or symlink.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum LayerFile {
    /// This object.
    Object(ObjectId),
    /// A hardlink to a path that this layer does not have: the file that the layers below have there.
    Below(Vec<String>),
    /// A hardlink to an object of the commit at the bottom.
    OfBase(ObjectId),
}

/// A directory of the layer.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct LayerDir {
    /// What it gets when nothing below has it.
    pub meta: DirMeta,
    /// Whether all that is below is hidden.
    pub opaque: bool,
    /// Names that are removed from what is below.
    pub whiteouts: BTreeSet<String>,
    pub files: BTreeMap<String, LayerFile>,
    pub dirs: BTreeMap<String, LayerDir>,
}

/// A layer's content, and what of it was left out.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct LayerTree {
    pub root: LayerDir,
    /// How many entries were left out, by where they are or (`device`, `fifo`) what they are.
    pub left_out: BTreeMap<String, u32>,
    /// Symlinks that libostree has no form for, as their target is not UTF-8: what they would be called,
    /// and the target, escaped. Such an object is stored nowhere.
    pub unstorable: BTreeMap<ObjectId, String>,
    links: Vec<Vec<String>>,
    /// Bytes of memory that all this takes, roughly, while it is built.
    cost: usize,
}

/// How much memory one layer's tree may take. A system's 20,000 directories with 200,000 files take a
/// third of it; some kilobytes of a compressed archive can ask for any amount.
const MOST: usize = 256 << 20;
/// A directory with one file in it: the first node of each map has room for eleven.
const DIR_COST: usize = 2400;
const FILE_COST: usize = 160;

/// Why an entry cannot be part of a tree.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(super) enum BadEntry {
    #[error("is a whiteout of nothing")]
    EmptyWhiteout,
    #[error("would replace the root directory")]
    Root,
    #[error("is below /{0}, which is no directory in this layer")]
    BelowFile(String),
    #[error("is one too many: the list of the layer's entries takes {} MiB", MOST >> 20)]
    TooMany,
    #[error("is a hardlink to the directory /{0}")]
    LinkToDirectory(String),
    #[error("is a hardlink to /{0}, which is itself a hardlink to nothing in this layer")]
    LinkCircle(String),
}

const WHITEOUT: &str = ".wh.";
const OPAQUE: &str = ".wh..wh..opq";

impl LayerTree {
    /// A directory entry. Its content so far stays.
    pub(super) fn directory(&mut self, path: &[String], meta: DirMeta) -> Result<(), BadEntry> {
        let Some((name, parents)) = path.split_last() else {
            self.root.meta = meta;
            return Ok(());
        };
        self.spend(name.len() + meta.xattrs.iter().map(|(name, value)| 64 + name.len() + value.len()).sum::<usize>())?;
        let parent = self.parent(parents, meta.uid, meta.gid)?;
        parent.files.remove(name);
        parent.dirs.entry(name.clone()).or_default().meta = meta;
        Ok(())
    }

    /// A file or symlink. Whatever the layer had there before is replaced.
    pub(super) fn file(&mut self, path: &[String], file: LayerFile, uid: u32, gid: u32) -> Result<(), BadEntry> {
        let (name, parents) = path.split_last().ok_or(BadEntry::Root)?;
        self.spend(FILE_COST + name.len())?;
        if let LayerFile::Below(target) = &file {
            self.spend([path, target].into_iter().flatten().map(|part| 32 + part.len()).sum())?;
            self.links.push(path.to_vec());
        }
        let parent = self.parent(parents, uid, gid)?;
        parent.dirs.remove(name);
        parent.files.insert(name.clone(), file);
        Ok(())
    }

    /// A symlink whose target, escaped, is not UTF-8. `id` is what libostree would call it.
    pub(super) fn unstorable(&mut self, id: ObjectId, target: String) -> Result<(), BadEntry> {
        self.spend(FILE_COST + target.len())?;
        self.unstorable.insert(id, target);
        Ok(())
    }

    /// Takes a whiteout, when the path's name is one.
    pub(super) fn whiteout(&mut self, path: &[String], uid: u32, gid: u32) -> Result<bool, BadEntry> {
        let Some((name, parents)) = path.split_last() else { return Ok(false) };
        let Some(hidden) = foreign(name).unwrap_or(name).strip_prefix(WHITEOUT) else { return Ok(false) };
        if matches!(hidden, "" | "." | "..") {
            return Err(BadEntry::EmptyWhiteout);
        }
        self.spend(FILE_COST + name.len())?;
        if name == OPAQUE {
            self.parent(parents, uid, gid)?.opaque = true;
        } else if !hidden.starts_with(WHITEOUT) {
            // What is hidden is named as it would be itself.
            let hidden = name.replacen(WHITEOUT, "", 1);
            self.parent(parents, uid, gid)?.whiteouts.insert(hidden);
        }
        // Other names of the form .wh..wh.* are a storage driver's own notes.
        Ok(true)
    }

    /// Notes something that cannot be part of the tree.
    pub(super) fn leave_out(&mut self, what: String) {
        // A hostile layer has no end of names; an operator wants a few.
        const MOST: usize = 1000;
        if self.left_out.len() < MOST || self.left_out.contains_key(&what) {
            *self.left_out.entry(what).or_default() += 1;
        }
    }

    /// Follows hardlinks within the layer, once all of it was read. The path of one that leads nowhere
    /// good comes with the error.
    pub(super) fn resolve_links(&mut self) -> Result<(), (String, BadEntry)> {
        self.cost = 0;
        for path in std::mem::take(&mut self.links) {
            let mut target = path.clone();
            let mut steps = 0;
            let found = loop {
                match self.lookup(&target) {
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
            // A later entry may have replaced the link by something else.
            if let Some((name, parents)) = path.split_last()
                && let Some(file) = self.existing(parents).and_then(|dir| dir.files.get_mut(name))
                && matches!(file, LayerFile::Below(_))
            {
                *file = found;
            }
        }
        Ok(())
    }

    /// Whether the layer has something at the path.
    pub(super) fn has(&self, path: &[String]) -> bool {
        self.lookup(path).is_some()
    }

    fn lookup(&self, path: &[String]) -> Option<Found<'_>> {
        let Some((name, parents)) = path.split_last() else { return Some(Found::Directory) };
        let dir = parents.iter().try_fold(&self.root, |dir, part| dir.dirs.get(part))?;
        dir.files.get(name).map(Found::File).or_else(|| dir.dirs.get(name).map(|_| Found::Directory))
    }

    fn existing(&mut self, path: &[String]) -> Option<&mut LayerDir> {
        path.iter().try_fold(&mut self.root, |dir, part| dir.dirs.get_mut(part))
    }

    /// The directory that an entry belongs into. When part of the way has no entry, all of the way gets
    /// the entry's owner and mode 0755, as libostree has it.
    ///
    /// A way through a symlink or file of the same layer is refused, by libostree too: readers that follow it end
    /// elsewhere than those that replace it.
    fn parent(&mut self, path: &[String], uid: u32, gid: u32) -> Result<&mut LayerDir, BadEntry> {
        let mut dir = &self.root;
        let mut there = 0;
        for part in path {
            if dir.files.contains_key(part) {
                return Err(BadEntry::BelowFile(shown(&path[..=there])));
            }
            let Some(next) = dir.dirs.get(part) else { break };
            (dir, there) = (next, there + 1);
        }
        let missing = &path[there..];
        self.spend(missing.iter().map(|part| DIR_COST + part.len()).sum())?;
        let meta = DirMeta { uid, gid, mode: 0o755, xattrs: Vec::new() };
        let mut dir = &mut self.root;
        if !missing.is_empty() {
            dir.meta = meta.clone();
        }
        for part in path {
            dir = dir.dirs.entry(part.clone()).or_default();
            if !missing.is_empty() {
                dir.meta = meta.clone();
            }
        }
        Ok(dir)
    }

    fn spend(&mut self, bytes: usize) -> Result<(), BadEntry> {
        self.cost = self.cost.saturating_add(bytes);
        if self.cost > MOST { Err(BadEntry::TooMany) } else { Ok(()) }
    }
}

enum Found<'a> {
    File(&'a LayerFile),
    Directory,
}

/// A layer's tree in the form that is kept: flat, parents before children.
#[derive(Serialize, Deserialize)]
struct Kept {
    dirs: Vec<KeptDir>,
    left_out: BTreeMap<String, u32>,
    unstorable: BTreeMap<ObjectId, String>,
}

#[derive(Serialize, Deserialize)]
struct KeptDir {
    path: Vec<String>,
    meta: DirMeta,
    opaque: bool,
    whiteouts: BTreeSet<String>,
    files: BTreeMap<String, LayerFile>,
}

impl LayerTree {
    /// For keeping between runs.
    pub(super) fn to_bytes(&self) -> std::io::Result<Vec<u8>> {
        let mut dirs = Vec::new();
        let mut queue = vec![(Vec::new(), &self.root)];
        while let Some((path, dir)) = queue.pop() {
            for (name, child) in &dir.dirs {
                queue.push((path.iter().chain([name]).cloned().collect(), child));
            }
            let LayerDir { meta, opaque, whiteouts, files, .. } = dir.clone();
            dirs.push(KeptDir { path, meta, opaque, whiteouts, files });
        }
        let (left_out, unstorable) = (self.left_out.clone(), self.unstorable.clone());
        let json = serde_json::to_vec(&Kept { dirs, left_out, unstorable })?;
        zstd::encode_all(json.as_slice(), 1)
    }

    /// What [`LayerTree::to_bytes`] kept; `None` for what this version cannot read.
    pub(super) fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let kept: Kept = serde_json::from_slice(&zstd::decode_all(bytes).ok()?).ok()?;
        let mut tree = Self { left_out: kept.left_out, unstorable: kept.unstorable, ..Self::default() };
        for KeptDir { path, meta, opaque, whiteouts, files } in kept.dirs {
            let dir = match path.split_last() {
                None => &mut tree.root,
                Some((name, parents)) => tree.existing(parents)?.dirs.entry(name.clone()).or_default(),
            };
            (dir.meta, dir.opaque, dir.whiteouts, dir.files) = (meta, opaque, whiteouts, files);
        }
        Some(tree)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn path(text: &str) -> Vec<String> {
        text.split('/').filter(|part| !part.is_empty()).map(str::to_owned).collect()
    }

    fn object(byte: u8) -> LayerFile {
        LayerFile::Object(ObjectId([byte; 32]))
    }

    fn below(text: &str) -> LayerFile {
        LayerFile::Below(path(text))
    }

    fn sample() -> LayerTree {
        let mut tree = LayerTree::default();
        let meta = DirMeta { uid: 1, gid: 2, mode: 0o700, xattrs: vec![(b"user.a".to_vec(), vec![0, 255])] };
        tree.directory(&path("usr"), meta.clone()).unwrap();
        tree.directory(&path("usr/a"), meta).unwrap();
        tree.file(&path("usr/a/file"), object(1), 0, 0).unwrap();
        tree.file(&path("usr/a/link"), below("usr/a/file"), 0, 0).unwrap();
        tree.file(&path("usr/a/link2"), below("usr/a/link"), 0, 0).unwrap();
        tree.file(&path("usr/a/early"), below("usr/z"), 0, 0).unwrap();
        tree.file(&path("usr/a/lower"), below("usr/bin/bash"), 0, 0).unwrap();
        tree.file(&path("usr/z"), object(2), 0, 0).unwrap();
        assert!(tree.whiteout(&path("usr/a/.wh.gone"), 0, 0).unwrap());
        assert!(tree.whiteout(&path("usr/.wh..wh..opq"), 0, 0).unwrap());
        assert!(tree.whiteout(&path("usr/.wh..wh.plnk"), 0, 0).unwrap());
        assert!(
            tree.whiteout(&path("usr/a").into_iter().chain(["/.wh.\\xff".into()]).collect::<Vec<_>>(), 0, 0).unwrap()
        );
        tree.unstorable(ObjectId([7; 32]), "\\xff".into()).unwrap();
        tree.leave_out("/opt".into());
        tree.leave_out("/opt".into());
        tree.resolve_links().unwrap();
        tree
    }

    #[test]
    fn built_and_kept() {
        let tree = sample();
        let usr = &tree.root.dirs["usr"];
        let a = &usr.dirs["a"];
        assert!(usr.opaque && usr.whiteouts.is_empty());
        assert_eq!(a.whiteouts, BTreeSet::from(["gone".into(), "/\\xff".into()]));
        assert_eq!((&a.files["link"], &a.files["link2"], &a.files["early"]), (&object(1), &object(1), &object(2)));
        assert_eq!(a.files["lower"], below("usr/bin/bash"));
        assert_eq!((usr.meta.mode, a.meta.mode), (0o700, 0o700));
        assert_eq!(tree.left_out["/opt"], 2);
        assert_eq!(LayerTree::from_bytes(&tree.to_bytes().unwrap()), Some(tree));
        assert_eq!(LayerTree::from_bytes(b"torn"), None);
    }

    #[test]
    fn missing_parents_are_the_entrys() {
        let mut tree = sample();
        tree.file(&path("usr/a/b/c"), object(3), 5, 6).unwrap();
        let a = &tree.root.dirs["usr"].dirs["a"];
        let meta = DirMeta { uid: 5, gid: 6, mode: 0o755, xattrs: Vec::new() };
        assert_eq!((&a.meta, &a.dirs["b"].meta), (&meta, &meta), "as libostree has it");
    }

    #[test]
    fn replaced_within_a_layer_and_refused() {
        let mut tree = sample();
        tree.file(&path("usr/a"), object(9), 0, 0).unwrap();
        tree.directory(&path("usr/z"), DirMeta::default()).unwrap();
        assert!(tree.root.dirs["usr"].dirs.contains_key("z") && tree.root.dirs["usr"].files.contains_key("a"));
        for name in [".wh.", ".wh..", ".wh..."] {
            assert_eq!(tree.whiteout(&path(&format!("usr/{name}")), 0, 0), Err(BadEntry::EmptyWhiteout), "{name}");
        }
        assert_eq!(tree.file(&[], object(1), 0, 0), Err(BadEntry::Root));
        let below_file = Err(BadEntry::BelowFile("usr/a".into()));
        assert_eq!(tree.file(&path("usr/a/b/c"), object(1), 0, 0), below_file);
        assert_eq!(tree.directory(&path("usr/a/b"), DirMeta::default()), below_file);
        assert_eq!(tree.whiteout(&path("usr/a/.wh.x"), 0, 0).map(drop), below_file);
        tree.file(&path("usr/l"), below("usr/z"), 0, 0).unwrap();
        assert!(matches!(tree.resolve_links(), Err((_, BadEntry::LinkToDirectory(_)))));
        let mut tree = LayerTree::default();
        tree.file(&path("usr/l"), below("usr/m"), 0, 0).unwrap();
        tree.file(&path("usr/m"), below("usr/l"), 0, 0).unwrap();
        assert!(matches!(tree.resolve_links(), Err((_, BadEntry::LinkCircle(_)))));
    }
    #[test]
    fn endless_layers_end() {
        let mut tree = LayerTree::default();
        let deep = vec!["d".to_owned(); 250];
        let result = (0..10_000).try_for_each(|at| {
            let own = [path(&format!("usr/{at}")), deep.clone()].concat();
            tree.file(&own, object(1), 0, 0)
        });
        assert_eq!(result, Err(BadEntry::TooMany));
        assert!(tree.cost <= MOST + 1000 * DIR_COST);
    }
}
