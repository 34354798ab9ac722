//! Trees to compare: a commit in an ostree repo, or a plain directory.

use std::cell::RefCell;
use std::collections::{BTreeMap, HashMap};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow};
use ostree::ObjectType;
use rustix::fs::AtFlags;
use sha2::{Digest, Sha256};

use node_store::store::Dirtree;

use super::compare::{Checksum, Directory, Listing, Tree};

/// Owner, mode and extended attributes of a directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct DirMeta {
    pub uid: u32,
    pub gid: u32,
    /// With or without the file type bits.
    pub mode: u32,
    /// Names without their final NUL.
    pub xattrs: Vec<(Vec<u8>, Vec<u8>)>,
}

impl DirMeta {
    /// The attributes that the delta gets: without those that overlayfs would obey.
    pub(super) fn settable(&self) -> impl Iterator<Item = &(Vec<u8>, Vec<u8>)> {
        self.xattrs.iter().filter(|(name, _)| !super::overlay_marks::is_attribute(name))
    }
}

/// Extended attributes as ostree stores them, `a(ayay)`, with the names' final NUL taken off.
pub(super) fn xattrs_of(pairs: Vec<(Vec<u8>, Vec<u8>)>) -> Vec<(Vec<u8>, Vec<u8>)> {
    let strip = |mut name: Vec<u8>| {
        name.truncate(name.iter().position(|byte| *byte == 0).unwrap_or(name.len()));
        name
    };
    pairs.into_iter().map(|(name, value)| (strip(name), value)).collect()
}

/// Trees of a repo and its parents.
pub(super) struct RepoTree<'a> {
    repo: &'a ostree::Repo,
}

impl<'a> RepoTree<'a> {
    pub fn new(repo: &'a ostree::Repo) -> Self {
        Self { repo }
    }

    /// The `/usr` directory of a commit.
    pub fn usr_of(&self, commit: &str) -> Result<Directory> {
        let listing = self.root_of(commit)?;
        listing.directories.get("usr").copied().with_context(|| format!("the commit {commit} has no /usr directory"))
    }

    /// The entries of a commit's root directory.
    pub fn root_of(&self, commit: &str) -> Result<Listing> {
        let (variant, _) = self.repo.load_commit(commit).with_context(|| format!("reading the commit {commit}"))?;
        let broken = || anyhow!("the commit object {commit} is malformed");
        let root: Vec<u8> = variant.try_child_get(6).ok().flatten().ok_or_else(broken)?;
        let root = checksum(&root).ok_or_else(broken)?;
        self.list(&root)
    }

    pub fn meta(&self, name: &Checksum) -> Result<DirMeta> {
        let hex = hex::encode(name);
        let parsed = self.repo.read_dirmeta(&hex).with_context(|| format!("reading the directory metadata {hex}"))?;
        Ok(DirMeta { uid: parsed.uid, gid: parsed.gid, mode: parsed.mode, xattrs: xattrs_of(parsed.xattrs) })
    }
}

impl Tree for RepoTree<'_> {
    fn list(&self, tree: &Checksum) -> Result<Listing> {
        let hex = hex::encode(tree);
        let variant = self
            .repo
            .load_variant(ObjectType::DirTree, &hex)
            .with_context(|| format!("reading the directory {hex}"))?;
        listing(variant.data()).with_context(|| format!("the directory object {hex} is malformed"))
    }

    fn size(&self, file: &Checksum) -> Result<u64> {
        let hex = hex::encode(file);
        let loose = PathBuf::from(format!("objects/{}/{}.file", &hex[..2], &hex[2..]));
        let mut repo = Some(self.repo.clone());
        while let Some(here) = repo {
            // Where objects are plain files, looking is much faster than having libostree open them.
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
            .with_context(|| format!("the content object {hex} is neither in the node store nor in the booted repo"))?;
        Ok(info
            .symlink_target()
            .map_or_else(|| u64::try_from(info.size()).unwrap_or_default(), |target| target.as_os_str().len() as u64))
    }
}

/// Reads a dirtree. A name may not stand for a file and a directory.
fn listing(bytes: &[u8]) -> Result<Listing> {
    let parsed = Dirtree::parse(bytes).map_err(anyhow::Error::msg)?;
    let mut listing = Listing::default();
    for (name, object) in parsed.files {
        listing.files.insert(name.to_owned(), object.0);
    }
    for (name, tree, meta) in parsed.dirs {
        anyhow::ensure!(!listing.files.contains_key(name), "{name} is a file and a directory");
        listing.directories.insert(name.to_owned(), Directory { tree: tree.0, meta: meta.0 });
    }
    Ok(listing)
}

fn checksum(bytes: &[u8]) -> Option<Checksum> {
    bytes.try_into().ok()
}

/// A plain directory whose commit is not known: every entry counts as different from the target's.
pub(super) struct PlainTree {
    paths: RefCell<HashMap<Checksum, PathBuf>>,
}

impl PlainTree {
    pub fn new() -> Self {
        Self { paths: RefCell::default() }
    }

    /// The directory at `path`, as a tree.
    pub fn root(&self, path: &Path) -> Directory {
        let name: Checksum =
            Sha256::new().chain_update(b"plain:").chain_update(path.as_os_str().as_bytes()).finalize().into();
        self.paths.borrow_mut().insert(name, path.to_owned());
        Directory { tree: name, meta: name }
    }

    fn path(&self, name: &Checksum) -> Result<PathBuf> {
        self.paths.borrow().get(name).cloned().context("a directory that was never listed")
    }

    pub fn meta(&self, name: &Checksum) -> Result<DirMeta> {
        let path = self.path(name)?;
        let stat = std::fs::symlink_metadata(&path).with_context(|| format!("looking at {}", path.display()))?;
        let xattrs =
            support::xattr::read(&path).with_context(|| format!("reading attributes of {}", path.display()))?;
        Ok(DirMeta { uid: stat.uid(), gid: stat.gid(), mode: stat.mode(), xattrs: xattrs.into_iter().collect() })
    }
}

impl Tree for PlainTree {
    fn list(&self, tree: &Checksum) -> Result<Listing> {
        let path = self.path(tree)?;
        let (mut files, mut directories) = (BTreeMap::new(), BTreeMap::new());
        for entry in std::fs::read_dir(&path).with_context(|| format!("listing {}", path.display()))? {
            let entry = entry.with_context(|| format!("listing {}", path.display()))?;
            // ostree's names are UTF-8, so no other name can be in the target; such a file stays.
            let Ok(name) = entry.file_name().into_string() else { continue };
            let directory = self.root(&entry.path());
            if entry.file_type().with_context(|| format!("looking at {}", entry.path().display()))?.is_dir() {
                directories.insert(name, directory);
            } else {
                files.insert(name, directory.tree);
            }
        }
        Ok(Listing { files, directories })
    }

    fn size(&self, file: &Checksum) -> Result<u64> {
        let path = self.path(file)?;
        Ok(std::fs::symlink_metadata(&path).with_context(|| format!("looking at {}", path.display()))?.len())
    }
}
