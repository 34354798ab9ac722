//! Lists the content objects of a commit. Pure, except that it reads metadata objects through a function of the caller.

use std::collections::{HashMap, HashSet};

use crate::store::{self, DirMeta, Dirtree, ObjectId, ObjectType};

/// Reasons why a tree cannot be listed.
#[derive(Debug, thiserror::Error)]
pub(super) enum TreeError {
    /// A metadata object is missing.
    #[error("the object {0}.{1} is missing")]
    Missing(ObjectId, &'static str),
    /// The bytes of a metadata object do not have its type.
    #[error("the object {0}.{1} is malformed: {2}")]
    Malformed(ObjectId, &'static str, &'static str),
    /// A metadata object could not be read.
    #[error("cannot read the object {0}.{1}: {2}")]
    Read(ObjectId, &'static str, std::io::Error),
}

/// Part of the tree in which a content object occurs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Place {
    /// Only under `/usr/lib/modules`. The running kernel does not need these objects: it keeps its own modules.
    ModulesOnly,
    /// Also, or only, in other directories.
    Anywhere,
}

/// The content objects of one commit.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Target {
    /// Every content object, and the part of the tree in which it occurs.
    pub content: HashMap<ObjectId, Place>,
}

impl Target {
    /// Records that a directory at `depth` has the object.
    pub(super) fn add(&mut self, id: ObjectId, depth: Depth) {
        let place = self.content.entry(id).or_insert(Place::ModulesOnly);
        if depth != Depth::Modules {
            *place = Place::Anywhere;
        }
    }
}

/// Position of a directory relative to `/usr/lib/modules`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Depth {
    Root,
    Usr,
    UsrLib,
    Modules,
    Elsewhere,
}

impl Depth {
    pub(super) fn enter(self, name: &str) -> Self {
        match (self, name) {
            (Depth::Root, "usr") => Depth::Usr,
            (Depth::Usr, "lib") => Depth::UsrLib,
            (Depth::UsrLib, "modules") | (Depth::Modules, _) => Depth::Modules,
            _ => Depth::Elsewhere,
        }
    }
}

/// Maximum depth of a tree: libostree's own limit (`OSTREE_MAX_RECURSION`).
const MAX_DEPTH: u32 = 256;
const TOO_DEEP: &str = "the tree is deeper than 256 directories";
/// Maximum number of paths in a tree. A few dirtrees that contain each other can have any number of paths; a system has
/// about 200,000.
const MAX_PATHS: u64 = 10_000_000;

/// Function that reads a metadata object. Returns `Ok(None)` if the object does not exist.
pub(super) type Lookup<'a> = dyn FnMut(&ObjectId, ObjectType) -> std::io::Result<Option<Vec<u8>>> + 'a;

/// Lists all content objects of `commit`. Equal directories are read once.
///
/// # Errors
/// If a dirtree or dirmeta is missing or malformed, or if the tree is too deep or has too many paths.
pub(super) fn walk(commit: &ObjectId, lookup: &mut Lookup<'_>) -> Result<Target, TreeError> {
    let (root, root_meta) = commit_root(commit, lookup)?;
    let mut walk = Walk { lookup, target: Target::default(), metas: HashSet::new(), known: HashMap::new() };
    walk.check_meta(root_meta)?;
    walk.directory(root, Depth::Root, 0)?;
    Ok(walk.target)
}

/// A walk over the directories of a commit.
struct Walk<'a, 'b> {
    lookup: &'a mut Lookup<'b>,
    target: Target,
    metas: HashSet<ObjectId>,
    /// Height of each directory and number of paths below it; `None` while it is being visited.
    known: HashMap<(ObjectId, Depth), Option<(u32, u64)>>,
}

impl Walk<'_, '_> {
    fn check_meta(&mut self, meta: ObjectId) -> Result<(), TreeError> {
        match self.metas.insert(meta) {
            true => load(&meta, ObjectType::DirMeta, self.lookup).map(drop),
            false => Ok(()),
        }
    }

    /// Lists a directory that is `level` levels below the root, and returns its height and the number of paths below it.
    /// Refuses one that is too deep, has too many paths, or contains itself, so that a walk over all paths ends.
    fn directory(&mut self, tree: ObjectId, depth: Depth, level: u32) -> Result<(u32, u64), TreeError> {
        let bad = |what| TreeError::Malformed(tree, "dirtree", what);
        if let Some(known) = self.known.get(&(tree, depth)) {
            return known.ok_or_else(|| bad("part of a directory that is inside itself"));
        }
        self.known.insert((tree, depth), None);
        let bytes = load(&tree, ObjectType::DirTree, self.lookup)?;
        let listing = Dirtree::parse(&bytes).map_err(bad)?;
        listing.files.iter().for_each(|(_, id)| self.target.add(*id, depth));
        let (mut height, mut paths) = (0, listing.files.len() as u64);
        for (name, child, meta) in &listing.dirs {
            self.check_meta(*meta)?;
            if level == MAX_DEPTH {
                return Err(bad(TOO_DEEP));
            }
            let (below, more) = self.directory(*child, depth.enter(name), level + 1)?;
            height = height.max(below + 1);
            paths = paths.saturating_add(more).saturating_add(1);
        }
        if height > MAX_DEPTH {
            return Err(bad(TOO_DEEP));
        }
        if paths > MAX_PATHS {
            return Err(bad("its tree has more than ten million paths"));
        }
        self.known.insert((tree, depth), Some((height, paths)));
        Ok((height, paths))
    }
}

/// Returns the path at which a commit has a content object, a dirtree or a dirmeta. For messages: missing and malformed
/// parts of the tree are skipped.
pub(super) fn path_of(commit: &ObjectId, wanted: &ObjectId, lookup: &mut Lookup<'_>) -> Option<String> {
    let (root, root_meta) = commit_root(commit, lookup).ok()?;
    if [root, root_meta].contains(wanted) {
        return Some("/".to_owned());
    }
    let mut seen = HashSet::from([root]);
    let mut queue = vec![(root, String::new())];
    while let Some((tree, path)) = queue.pop() {
        let Ok(bytes) = load(&tree, ObjectType::DirTree, lookup) else { continue };
        let Ok(listing) = Dirtree::parse(&bytes) else { continue };
        if let Some((name, _)) = listing.files.iter().find(|(_, id)| id == wanted) {
            return Some(format!("{path}/{name}"));
        }
        for (name, child, meta) in &listing.dirs {
            let path = format!("{path}/{name}");
            if [child, meta].contains(&wanted) {
                return Some(path);
            }
            if seen.insert(*child) {
                queue.push((*child, path));
            }
        }
    }
    None
}

/// Returns the root dirtree and dirmeta of a commit.
pub(super) fn commit_root(commit: &ObjectId, lookup: &mut Lookup<'_>) -> Result<(ObjectId, ObjectId), TreeError> {
    let bytes = load(commit, ObjectType::Commit, lookup)?;
    store::commit_root(bytes).map_err(|what| TreeError::Malformed(*commit, "commit", what))
}

/// Reads a dirmeta object.
pub(super) fn read_dirmeta(meta: &ObjectId, lookup: &mut Lookup<'_>) -> Result<DirMeta, TreeError> {
    let bytes = load(meta, ObjectType::DirMeta, lookup)?;
    DirMeta::parse(bytes).map_err(|what| TreeError::Malformed(*meta, "dirmeta", what))
}

/// Reads a metadata object. A missing object is an error.
pub(super) fn load(id: &ObjectId, kind: ObjectType, lookup: &mut Lookup<'_>) -> Result<Vec<u8>, TreeError> {
    match lookup(id, kind) {
        Ok(Some(bytes)) => Ok(bytes),
        Ok(None) => Err(TreeError::Missing(*id, kind.extension())),
        Err(error) => Err(TreeError::Read(*id, kind.extension(), error)),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use ostree::glib::Variant;
    use ostree::glib::variant::ToVariant;
    use sha2::{Digest, Sha256};

    #[derive(Default)]
    struct Repo(HashMap<(ObjectId, &'static str), Vec<u8>>);

    type Dir<'a> = (&'a str, ObjectId, ObjectId);

    impl Repo {
        fn put(&mut self, kind: ObjectType, variant: &Variant) -> ObjectId {
            let bytes = variant.data_as_bytes().to_vec();
            let id = ObjectId(Sha256::digest(&bytes).into());
            self.0.insert((id, kind.extension()), bytes);
            id
        }

        fn meta(&mut self) -> ObjectId {
            let empty: Vec<(Vec<u8>, Vec<u8>)> = Vec::new();
            self.put(ObjectType::DirMeta, &(0_u32, 0_u32, 0o40755_u32.to_be(), empty).to_variant())
        }

        fn tree(&mut self, files: &[(&str, u8)], dirs: &[Dir<'_>]) -> ObjectId {
            let files: Vec<_> = files.iter().map(|(name, id)| (name.to_string(), vec![*id; 32])).collect();
            let dirs: Vec<_> =
                dirs.iter().map(|(name, tree, meta)| (name.to_string(), tree.0.to_vec(), meta.0.to_vec())).collect();
            self.put(ObjectType::DirTree, &(files, dirs).to_variant())
        }

        fn commit(&mut self, tree: ObjectId, meta: ObjectId) -> ObjectId {
            let none: Vec<(String, Vec<u8>)> = Vec::new();
            let dict = ostree::glib::VariantDict::new(None).end();
            let variant = Variant::tuple_from_iter([
                dict,
                Vec::<u8>::new().to_variant(),
                none.to_variant(),
                "".to_variant(),
                "".to_variant(),
                0_u64.to_variant(),
                tree.0.to_vec().to_variant(),
                meta.0.to_vec().to_variant(),
            ]);
            self.put(ObjectType::Commit, &variant)
        }

        fn walk(&self, commit: &ObjectId) -> Result<Target, TreeError> {
            walk(commit, &mut |id, kind| Ok(self.0.get(&(*id, kind.extension())).cloned()))
        }
    }

    fn sample() -> (Repo, ObjectId, ObjectId) {
        let mut repo = Repo::default();
        let meta = repo.meta();
        let version = repo.tree(&[("vmlinuz", 1), ("shared", 2)], &[]);
        let modules = repo.tree(&[], &[("6.1", version, meta)]);
        let lib = repo.tree(&[("libc", 3)], &[("modules", modules, meta)]);
        let other = repo.tree(&[("modules", 5)], &[("lib", lib, meta)]);
        let usr = repo.tree(&[("x", 2)], &[("lib", lib, meta), ("other", other, meta)]);
        let usr_only = repo.tree(&[("x", 2)], &[("lib", lib, meta)]);
        let root = repo.tree(&[], &[("usr", usr, meta)]);
        let plain = repo.tree(&[], &[("usr", usr_only, meta)]);
        let (with_other, plain) = (repo.commit(root, meta), repo.commit(plain, meta));
        (repo, with_other, plain)
    }

    #[test]
    fn modules_only_objects_occur_only_in_usr_lib_modules() {
        let (repo, with_other, plain) = sample();
        let place = |target: &Target, id: u8| target.content[&ObjectId([id; 32])];
        let target = repo.walk(&plain).unwrap();
        assert_eq!(place(&target, 1), Place::ModulesOnly);
        assert_eq!(place(&target, 2), Place::Anywhere, "also at /usr/x");
        assert_eq!(place(&target, 3), Place::Anywhere);
        let target = repo.walk(&with_other).unwrap();
        assert_eq!(place(&target, 1), Place::Anywhere, "the same directory is also at /usr/other/lib/modules");
        assert_eq!(target.content.len(), 4);
    }

    #[test]
    fn objects_are_found_by_their_path() {
        let (mut repo, commit, _) = sample();
        let find = |repo: &Repo, wanted: ObjectId| {
            path_of(&commit, &wanted, &mut |id, kind| Ok(repo.0.get(&(*id, kind.extension())).cloned()))
        };
        assert_eq!(find(&repo, ObjectId([5; 32])).as_deref(), Some("/usr/other/modules"));
        let modules = repo.tree(&[("vmlinuz", 1), ("shared", 2)], &[]);
        assert!(find(&repo, modules).unwrap().ends_with("lib/modules/6.1"));
        assert_eq!(find(&repo, ObjectId([77; 32])), None);
        let empty = Repo::default();
        assert_eq!(find(&empty, ObjectId([5; 32])), None);
    }

    #[test]
    fn missing_and_malformed_metadata_are_named() {
        let (repo, commit, _) = sample();
        for key in repo.0.keys() {
            let mut less = Repo(repo.0.clone());
            less.0.remove(key);
            if let Err(error) = less.walk(&commit) {
                assert!(matches!(error, TreeError::Missing(id, kind) if (id, kind) == *key), "{error}");
            }
        }
        for bytes in [vec![], vec![0xff; 40]] {
            let mut broken = Repo(repo.0.clone());
            broken.0.insert((commit, "commit"), bytes);
            assert!(matches!(broken.walk(&commit), Err(TreeError::Malformed(..))));
        }
        let mut repo = Repo::default();
        let meta = repo.meta();
        for name in ["", ".", "..", "a/b"] {
            let tree = repo.tree(&[(name, 1)], &[]);
            let commit = repo.commit(tree, meta);
            assert!(matches!(repo.walk(&commit), Err(TreeError::Malformed(..))), "{name:?}");
        }
    }

    #[test]
    fn trees_that_are_too_deep_too_large_or_circular_are_refused() {
        let mut repo = Repo::default();
        let meta = repo.meta();
        // A chain of directories; then a tree in which each directory is twice in its parent, so that paths double.
        for (names, most, words) in [(&["d"][..], 256, "deeper"), (&["a", "b"], 22, "million")] {
            let mut tree = repo.tree(&[], &[]);
            for level in 1..=most + 1 {
                let dirs: Vec<_> = names.iter().map(|name| (*name, tree, meta)).collect();
                tree = repo.tree(&[], &dirs);
                let commit = repo.commit(tree, meta);
                match repo.walk(&commit) {
                    Ok(_) => assert!(level <= most, "{names:?} {level}"),
                    Err(error) => assert!(level > most && error.to_string().contains(words), "{level}: {error}"),
                }
            }
        }
        // Names are not checksums in this repo, so it can have a circle, which a real repo cannot.
        let inner = ObjectId([9; 32]);
        let outer = repo.tree(&[], &[("inner", inner, meta)]);
        let circle = repo.tree(&[], &[("outer", outer, meta)]);
        let bytes = repo.0[&(circle, "dirtree")].clone();
        repo.0.insert((inner, "dirtree"), bytes);
        let commit = repo.commit(outer, meta);
        assert!(repo.walk(&commit).unwrap_err().to_string().contains("inside itself"));
    }
}
