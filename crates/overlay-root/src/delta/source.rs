//! Sources of the trees to compare: a commit in an ostree repo, or a plain directory.

use std::cell::RefCell;
use std::collections::{BTreeMap, HashMap};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow};
use ostree::ObjectType;
use rustix::fs::AtFlags;
use sha2::{Digest, Sha256};

use node_store::store::{Dirtree, ObjectId};

use super::compare::{Checksum, Directory, Listing, Tree};

/// Owner, mode and extended attributes of an entry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct DirMeta {
    pub uid: u32,
    pub gid: u32,
    /// Mode, with or without the bits of the file type.
    pub mode: u32,
    /// Names without the final NUL, and values.
    pub xattrs: Vec<(Vec<u8>, Vec<u8>)>,
}

impl DirMeta {
    /// Iterates over the attributes for the delta, without those that overlayfs would interpret.
    pub(super) fn settable(&self) -> impl Iterator<Item = &(Vec<u8>, Vec<u8>)> {
        self.xattrs.iter().filter(|(name, _)| !super::overlay_marks::is_attribute(name))
    }
}

/// Removes the final NUL of the names of extended attributes, which ostree stores as `a(ayay)`.
pub(super) fn xattrs_of(pairs: Vec<(Vec<u8>, Vec<u8>)>) -> Vec<(Vec<u8>, Vec<u8>)> {
    let strip = |mut name: Vec<u8>| {
        name.truncate(name.iter().position(|byte| *byte == 0).unwrap_or(name.len()));
        name
    };
    pairs.into_iter().map(|(name, value)| (strip(name), value)).collect()
}

/// The trees in a repo and its parents.
pub(super) struct RepoTree<'a> {
    repo: &'a ostree::Repo,
}

impl<'a> RepoTree<'a> {
    pub fn new(repo: &'a ostree::Repo) -> Self {
        Self { repo }
    }

    /// Returns the `/usr` directory of a commit.
    pub fn usr_of(&self, commit: ObjectId) -> Result<Directory> {
        let listing = self.root_of(commit)?;
        listing.directories.get("usr").copied().with_context(|| format!("the commit {commit} has no /usr directory"))
    }

    /// Returns the entries of a commit's root directory.
    pub fn root_of(&self, commit: ObjectId) -> Result<Listing> {
        let (variant, _) =
            self.repo.load_commit(&commit.to_string()).with_context(|| format!("cannot read the commit {commit}"))?;
        let broken = || anyhow!("the commit object {commit} is malformed");
        let root: Vec<u8> = variant.try_child_get(6).ok().flatten().ok_or_else(broken)?;
        let root = checksum(&root).ok_or_else(broken)?;
        self.list(&root)
    }

    pub fn meta(&self, name: &Checksum) -> Result<DirMeta> {
        let hex = hex::encode(name);
        let parsed =
            self.repo.read_dirmeta(&hex).with_context(|| format!("cannot read the directory metadata {hex}"))?;
        Ok(DirMeta { uid: parsed.uid, gid: parsed.gid, mode: parsed.mode, xattrs: xattrs_of(parsed.xattrs) })
    }
}

impl Tree for RepoTree<'_> {
    fn list(&self, tree: &Checksum) -> Result<Listing> {
        let hex = hex::encode(tree);
        let variant = self
            .repo
            .load_variant(ObjectType::DirTree, &hex)
            .with_context(|| format!("cannot read the directory object {hex}"))?;
        listing(variant.data()).with_context(|| format!("the directory object {hex} is malformed"))
    }

    fn size(&self, file: &Checksum) -> Result<u64> {
        let hex = hex::encode(file);
        let loose = PathBuf::from(format!("objects/{}/{}.file", &hex[..2], &hex[2..]));
        let mut repo = Some(self.repo.clone());
        while let Some(here) = repo {
            // If objects are plain files, stat(2) is much faster than opening them with libostree.
            if matches!(here.mode(), ostree::RepoMode::Bare | ostree::RepoMode::BareUserOnly)
                && let Ok(stat) = rustix::fs::statat(here.dfd_borrow(), &loose, AtFlags::SYMLINK_NOFOLLOW)
            {
                return Ok(u64::try_from(stat.st_size).unwrap_or_default());
            }
            repo = here.parent();
        }
        let (_, info, _) = self
            .repo
            .load_file(&hex, ostree::gio::Cancellable::NONE)
            .with_context(|| format!("cannot find the content object {hex} in the node store and the booted repo"))?;
        Ok(info
            .symlink_target()
            .map_or_else(|| u64::try_from(info.size()).unwrap_or_default(), |target| target.as_os_str().len() as u64))
    }
}

/// Parses a dirtree.
///
/// # Errors
/// The dirtree is invalid, or a name is both a file and a directory.
fn listing(bytes: &[u8]) -> Result<Listing> {
    let parsed = Dirtree::parse(bytes).map_err(anyhow::Error::msg)?;
    let mut listing = Listing::default();
    for (name, object) in parsed.files {
        listing.files.insert(name.to_owned(), object.0);
    }
    for (name, tree, meta) in parsed.dirs {
        anyhow::ensure!(!listing.files.contains_key(name), "{name} is both a file and a directory");
        listing.directories.insert(name.to_owned(), Directory { tree: tree.0, meta: meta.0 });
    }
    Ok(listing)
}

fn checksum(bytes: &[u8]) -> Option<Checksum> {
    bytes.try_into().ok()
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
        let name: Checksum =
            Sha256::new().chain_update(b"plain:").chain_update(path.as_os_str().as_bytes()).finalize().into();
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
    Ok(DirMeta { uid: stat.uid(), gid: stat.gid(), mode: stat.mode(), xattrs: xattrs.into_iter().collect() })
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
