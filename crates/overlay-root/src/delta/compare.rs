//! What must lie over the booted `/usr` so that the target's shows: a pure comparison of two trees.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use anyhow::{Result, bail};

use super::keep::{Keep, Verdict};

/// An ostree checksum, or any other name that is equal exactly when the things named are.
pub type Checksum = [u8; 32];

/// A directory: the names of its listing and of its metadata.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Directory {
    /// Names the listing, with everything below.
    pub tree: Checksum,
    /// Names owner, mode and extended attributes.
    pub meta: Checksum,
}

/// The entries of one directory. Symbolic links are files, as in ostree.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Listing {
    /// Name to content object.
    pub files: BTreeMap<String, Checksum>,
    /// Name to directory.
    pub directories: BTreeMap<String, Directory>,
}

/// Where listings come from.
pub trait Tree {
    /// The entries of the directory whose listing is named `tree`.
    fn list(&self, tree: &Checksum) -> Result<Listing>;
    /// The size of a file that a listing names, in bytes; of a link, that of its target.
    fn size(&self, file: &Checksum) -> Result<u64>;
}

/// One step of building the delta directory. Steps are relative to the directory entered last, and
/// the first one enters the root.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DeltaOp {
    /// Make a directory and go into it.
    Enter {
        /// Its name; empty for the root.
        name: String,
        /// Its metadata.
        meta: Checksum,
        /// The metadata are the booted tree's: the directory stays only for what is kept in it.
        booted: bool,
    },
    /// Go back to the parent.
    Leave,
    /// Put a content object here.
    File {
        /// Its name.
        name: String,
        /// Its content object, of the target.
        object: Checksum,
        /// What of the booted tree it takes the place of, if anything is there.
        replaces: Option<Hidden>,
    },
    /// Hide what the booted tree has here.
    Whiteout {
        /// Its name.
        name: String,
        /// What that hides.
        hides: Hidden,
    },
}

/// Files of the booted tree that no longer show.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Hidden {
    /// How many.
    pub files: u64,
    /// Their size in bytes.
    pub bytes: u64,
}

/// The steps that turn `old` into `new` where nothing is kept, and leave alone what `keep` says.
/// Equal subtrees are not looked into.
///
/// # Errors
/// When a listing cannot be read, or when the target has a file where the booted tree has a directory
/// that a frozen path may be in.
pub fn diff(old: (&dyn Tree, Directory), new: (&dyn Tree, Directory), keep: &Keep) -> Result<Vec<DeltaOp>> {
    let mut walk = Walk { old: old.0, new: new.0, keep, ops: Vec::new(), pending: Vec::new(), path: PathBuf::new() };
    // The root always gets its metadata: an overlay's root is that of its top layer.
    walk.enter(Entering { name: String::new(), meta: new.1.meta, booted: false }, true);
    if old.1.tree != new.1.tree {
        walk.compare(&old.0.list(&old.1.tree)?, &new.0.list(&new.1.tree)?)?;
    }
    walk.leave();
    Ok(walk.ops)
}

struct Entering {
    name: String,
    meta: Checksum,
    booted: bool,
}

struct Walk<'a> {
    old: &'a dyn Tree,
    new: &'a dyn Tree,
    keep: &'a Keep,
    ops: Vec<DeltaOp>,
    /// Directories gone into for which there was no reason yet to be in the delta.
    pending: Vec<Entering>,
    path: PathBuf,
}

impl Walk<'_> {
    fn enter(&mut self, directory: Entering, needed: bool) {
        self.pending.push(directory);
        if needed {
            self.flush();
        }
    }

    fn flush(&mut self) {
        let entered = self.pending.drain(..);
        self.ops.extend(entered.map(|Entering { name, meta, booted }| DeltaOp::Enter { name, meta, booted }));
    }

    fn leave(&mut self) {
        if self.pending.pop().is_none() {
            self.ops.push(DeltaOp::Leave);
        }
    }

    fn push(&mut self, op: DeltaOp) {
        self.flush();
        self.ops.push(op);
    }

    fn compare(&mut self, old: &Listing, new: &Listing) -> Result<()> {
        let names: BTreeSet<&String> = [&old.files, &new.files]
            .into_iter()
            .flat_map(BTreeMap::keys)
            .chain([&old.directories, &new.directories].into_iter().flat_map(BTreeMap::keys))
            .collect();
        for name in names {
            self.path.push(name);
            let done = self.compare_entry(name, old, new);
            self.path.pop();
            done?;
        }
        Ok(())
    }

    fn compare_entry(&mut self, name: &str, old: &Listing, new: &Listing) -> Result<()> {
        if self.keep.is_frozen(&self.path) {
            return Ok(());
        }
        if let Some(object) = new.files.get(name) {
            if old.files.get(name) == Some(object) {
                return Ok(());
            }
            if old.directories.contains_key(name) {
                self.refuse_over_frozen()?;
            }
            let replaces = match (old.files.get(name), old.directories.get(name)) {
                (Some(file), _) => Some(Hidden { files: 1, bytes: self.old.size(file)? }),
                (None, Some(directory)) => Some(self.count(directory)?),
                (None, None) => None,
            };
            self.push(DeltaOp::File { name: name.to_owned(), object: *object, replaces });
            return Ok(());
        }
        let was = old.directories.get(name);
        if let Some(directory) = new.directories.get(name) {
            if was == Some(directory) {
                return Ok(());
            }
            let needed = was.is_none_or(|was| was.meta != directory.meta);
            self.enter(Entering { name: name.to_owned(), meta: directory.meta, booted: false }, needed);
            if was.is_none_or(|was| was.tree != directory.tree) {
                let before = was.map(|was| self.old.list(&was.tree)).transpose()?.unwrap_or_default();
                self.compare(&before, &self.new.list(&directory.tree)?)?;
            }
            self.leave();
            return Ok(());
        }
        self.remove(name, old.files.get(name), was)
    }

    /// `name` is only in the booted tree.
    fn remove(&mut self, name: &str, file: Option<&Checksum>, directory: Option<&Directory>) -> Result<()> {
        let verdict = self.keep.verdict(&self.path);
        if matches!(verdict, Verdict::Frozen | Verdict::Spared) {
            return Ok(());
        }
        let Some(directory) = directory else {
            let bytes = file.map_or(Ok(0), |file| self.old.size(file))?;
            self.push(DeltaOp::Whiteout { name: name.to_owned(), hides: Hidden { files: 1, bytes } });
            return Ok(());
        };
        if verdict == Verdict::Above && self.holds_kept(directory, &self.path.clone())? {
            self.enter(Entering { name: name.to_owned(), meta: directory.meta, booted: true }, false);
            self.compare(&self.old.list(&directory.tree)?, &Listing::default())?;
            self.leave();
            return Ok(());
        }
        let hides = self.count(directory)?;
        self.push(DeltaOp::Whiteout { name: name.to_owned(), hides });
        Ok(())
    }

    /// Whether something below `path` in the booted tree is kept.
    fn holds_kept(&self, directory: &Directory, path: &Path) -> Result<bool> {
        let listing = self.old.list(&directory.tree)?;
        for name in listing.files.keys() {
            if matches!(self.keep.verdict(&path.join(name)), Verdict::Frozen | Verdict::Spared) {
                return Ok(true);
            }
        }
        for (name, child) in &listing.directories {
            let path = path.join(name);
            match self.keep.verdict(&path) {
                Verdict::Frozen | Verdict::Spared => return Ok(true),
                Verdict::Above if self.holds_kept(child, &path)? => return Ok(true),
                Verdict::Above | Verdict::Free => {}
            }
        }
        Ok(false)
    }

    fn count(&self, directory: &Directory) -> Result<Hidden> {
        let listing = self.old.list(&directory.tree)?;
        let mut all = Hidden { files: listing.files.len() as u64, bytes: 0 };
        for file in listing.files.values() {
            all.bytes += self.old.size(file)?;
        }
        for child in listing.directories.values() {
            let below = self.count(child)?;
            all.files += below.files;
            all.bytes += below.bytes;
        }
        Ok(all)
    }

    fn refuse_over_frozen(&self) -> Result<()> {
        if self.keep.above_frozen(&self.path) {
            bail!(
                "the node image has a file at /usr/{}, above a directory that must stay the booted one; \
                 nothing was changed; this node image cannot be used here",
                self.path.display()
            );
        }
        Ok(())
    }
}
