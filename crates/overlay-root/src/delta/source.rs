//! Sources of the trees to compare: a commit in the node store or its parent repo, or a plain directory.

use std::cell::RefCell;
use std::collections::{BTreeMap, HashMap};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Error, Result};
use sha2::{Digest, Sha256};

use node_store::store::{DirMeta, Dirtree, NodeStore, ObjectId, ObjectType, commit_root};

use super::compare::{Checksum, Directory, Listing, Tree};

/// The trees of the commits in the node store and its parent repo.
pub(super) struct StoreTree<'a>(pub &'a NodeStore);

impl StoreTree<'_> {
    /// Returns the `/usr` directory of a commit.
    pub fn usr_of(&self, commit: ObjectId) -> Result<Directory> {
        let listing = self.root_of(commit)?;
        listing.directories.get("usr").copied().with_context(|| format!("the commit {commit} has no /usr directory"))
    }

    /// Returns the entries of a commit's root directory.
    pub fn root_of(&self, commit: ObjectId) -> Result<Listing> {
        self.list(&self.read(&commit, ObjectType::Commit, commit_root)?.0)
    }

    pub fn meta(&self, name: &Checksum) -> Result<DirMeta> {
        self.read(name, ObjectType::DirMeta, DirMeta::parse)
    }

    fn read<T>(
        &self,
        id: &ObjectId,
        kind: ObjectType,
        parse: impl FnOnce(Vec<u8>) -> Result<T, &'static str>,
    ) -> Result<T> {
        let parsed = parse(self.0.load_metadata(id, kind)?).map_err(Error::msg);
        parsed.with_context(|| format!("the object {id}.{} is malformed", kind.extension()))
    }
}

impl Tree for StoreTree<'_> {
    fn list(&self, tree: &Checksum) -> Result<Listing> {
        self.read(tree, ObjectType::DirTree, listing)
    }

    fn size(&self, file: &Checksum) -> Result<u64> {
        self.0.content_size(file)
    }
}

/// Parses a dirtree.
///
/// # Errors
/// The dirtree is invalid, or a name is both a file and a directory.
fn listing(bytes: Vec<u8>) -> Result<Listing, &'static str> {
    let parsed = Dirtree::parse(&bytes)?;
    let named = |(name, tree, meta): (&str, _, _)| (name.to_owned(), Directory { tree, meta });
    let files: BTreeMap<_, _> = parsed.files.into_iter().map(|(name, object)| (name.to_owned(), object)).collect();
    let directories: BTreeMap<_, _> = parsed.dirs.into_iter().map(named).collect();
    match directories.keys().any(|name| files.contains_key(name)) {
        true => Err("a name is both a file and a directory"),
        false => Ok(Listing { files, directories }),
    }
}

/// The tree of a plain directory without a known commit. All entries count as different from the target's.
pub(super) struct PlainTree {
    paths: RefCell<HashMap<Checksum, PathBuf>>,
}

impl PlainTree {
    pub fn new() -> Self {
        Self { paths: RefCell::default() }
    }

    /// Returns the directory at `path` as the root of a tree.
    pub fn root(&self, path: &Path) -> Directory {
        let name = Sha256::new().chain_update(b"plain:").chain_update(path.as_os_str().as_bytes());
        let name = ObjectId(name.finalize().into());
        self.paths.borrow_mut().insert(name, path.to_owned());
        Directory { tree: name, meta: name }
    }

    fn path(&self, name: &Checksum) -> Result<PathBuf> {
        self.paths.borrow().get(name).cloned().context("internal error: the directory was never listed")
    }

    pub fn meta(&self, name: &Checksum) -> Result<DirMeta> {
        meta_of(&self.path(name)?)
    }
}

/// Returns the metadata of the entry at `path`.
pub(super) fn meta_of(path: &Path) -> Result<DirMeta> {
    let failed = || format!("cannot read the metadata of {}", path.display());
    let stat = std::fs::symlink_metadata(path).with_context(failed)?;
    let xattrs = support::xattr::read(path).with_context(failed)?;
    Ok(DirMeta { uid: stat.uid(), gid: stat.gid(), mode: stat.mode() & 0o7777, xattrs: xattrs.into_iter().collect() })
}

impl Tree for PlainTree {
    fn list(&self, tree: &Checksum) -> Result<Listing> {
        let path = self.path(tree)?;
        let failed = || format!("cannot list {}", path.display());
        let (mut files, mut directories) = (BTreeMap::new(), BTreeMap::new());
        for entry in std::fs::read_dir(&path).with_context(failed)? {
            let entry = entry.with_context(failed)?;
            // ostree's names are UTF-8, so the target cannot have another name; such a file stays visible.
            let Ok(name) = entry.file_name().into_string() else { continue };
            let directory = self.root(&entry.path());
            if entry.file_type().with_context(failed)?.is_dir() {
                directories.insert(name, directory);
            } else {
                files.insert(name, directory.tree);
            }
        }
        Ok(Listing { files, directories })
    }

    fn size(&self, file: &Checksum) -> Result<u64> {
        let path = self.path(file)?;
        Ok(std::fs::symlink_metadata(&path)
            .with_context(|| format!("cannot read the size of {}", path.display()))?
            .len())
    }
}
