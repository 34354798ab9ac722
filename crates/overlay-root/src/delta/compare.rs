//! Compares the booted `/usr` with the target's, and lists the steps that build the delta. Pure.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use anyhow::{Result, bail};
use node_store::store::ObjectId;

use super::keep::{Keep, Verdict};

/// An ostree checksum, or another name that is equal exactly if the named content is equal.
pub type Checksum = ObjectId;

/// A directory by the checksums of its listing and its metadata.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Directory {
    /// Checksum of the listing, including the directories below.
    pub tree: Checksum,
    /// Checksum of owner, mode and extended attributes.
    pub meta: Checksum,
}

/// The entries of one directory. Symbolic links are files, as in ostree.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Listing {
    /// Content objects by file name.
    pub files: BTreeMap<String, Checksum>,
    /// Directories by name.
    pub directories: BTreeMap<String, Directory>,
}

/// A source of listings.
pub trait Tree {
    /// Returns the entries of a directory by the checksum of its listing.
    fn list(&self, tree: &Checksum) -> Result<Listing>;
    /// Returns the size of a file in bytes. For a link, this is the length of its target.
    fn size(&self, file: &Checksum) -> Result<u64>;
}

/// One step of building the delta directory. The first step enters the root. Names are relative to the directory that was
/// entered last.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DeltaOp {
    /// Create a directory and enter it.
    Enter {
        /// Name of the directory, empty for the root.
        name: String,
        /// Checksum of the metadata.
        meta: Checksum,
        /// True if `meta` is of the booted tree: the directory exists only because of kept content.
        booted: bool,
    },
    /// Return to the parent.
    Leave,
    /// Link or copy a content object.
    File {
        /// Name of the file.
        name: String,
        /// Content object of the target.
        object: Checksum,
        /// Content of the booted tree that the file hides, if any.
        replaces: Option<Hidden>,
    },
    /// Hide an entry of the booted tree.
    Whiteout {
        /// Name of the entry.
        name: String,
        /// Content of the booted tree that is hidden.
        hides: Hidden,
    },
    /// Copy an entry of the booted tree, with the entries below it. Only in a [`Shape::Complete`] tree.
    Kept {
        /// Name of the entry.
        name: String,
        /// True if the entry is a directory whose content [`Keep`] freezes. A mount shows the booted content there.
        frozen: bool,
        /// Content of the entry.
        content: Hidden,
    },
}

/// The content of the tree that the steps build.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Shape {
    /// The differences, for an overlay.
    Delta,
    /// All files, for use without an overlay. Requires a booted tree without equal content, as a plain directory is.
    Complete,
}

/// Files of the booted tree that the delta hides.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Hidden {
    /// Number of files.
    pub files: u64,
    /// Size of the files in bytes.
    pub bytes: u64,
}

/// Returns the steps of a delta that shows `new` over `old`, except for the paths that `keep` selects. Equal subtrees are
/// not read.
///
/// # Errors
/// A listing cannot be read, or the target has a file at the path of a directory with frozen content.
pub fn diff(
    old: (&dyn Tree, Directory),
    new: (&dyn Tree, Directory),
    keep: &Keep,
    shape: Shape,
) -> Result<Vec<DeltaOp>> {
    let (ops, pending, path) = Default::default();
    let mut walk = Walk { old: old.0, new: new.0, keep, shape, ops, pending, path };
    // The root is always in the delta, because an overlay's root has the metadata of the top layer.
    walk.push(DeltaOp::Enter { name: String::new(), meta: new.1.meta, booted: false });
    if old.1.tree != new.1.tree {
        walk.compare(&old.0.list(&old.1.tree)?, &new.0.list(&new.1.tree)?)?;
    }
    walk.leave();
    Ok(walk.ops)
}

struct Walk<'a> {
    old: &'a dyn Tree,
    new: &'a dyn Tree,
    keep: &'a Keep,
    shape: Shape,
    ops: Vec<DeltaOp>,
    /// Steps into directories that have no reason yet to be in the delta.
    pending: Vec<DeltaOp>,
    path: PathBuf,
}

impl Walk<'_> {
    fn leave(&mut self) {
        if self.pending.pop().is_none() {
            self.ops.push(DeltaOp::Leave);
        }
    }

    fn push(&mut self, op: DeltaOp) {
        self.ops.append(&mut self.pending);
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
            return self.keep(name, old, true);
        }
        if let Some(object) = new.files.get(name) {
            if old.files.get(name) == Some(object) {
                return Ok(());
            }
            if old.directories.contains_key(name) {
                self.refuse_over_frozen()?;
            }
            let replaces = self.content(name, old)?;
            self.push(DeltaOp::File { name: name.to_owned(), object: *object, replaces });
            return Ok(());
        }
        let was = old.directories.get(name);
        if let Some(directory) = new.directories.get(name) {
            if was == Some(directory) {
                return Ok(());
            }
            let enter = DeltaOp::Enter { name: name.to_owned(), meta: directory.meta, booted: false };
            match was.is_some_and(|was| was.meta == directory.meta) {
                true => self.pending.push(enter),
                false => self.push(enter),
            }
            if was.is_none_or(|was| was.tree != directory.tree) {
                let before = was.map(|was| self.old.list(&was.tree)).transpose()?.unwrap_or_default();
                self.compare(&before, &self.new.list(&directory.tree)?)?;
            }
            self.leave();
            return Ok(());
        }
        self.remove(name, old)
    }

    /// Keeps the entry `name` of the booted tree. An overlay shows it without a step.
    fn keep(&mut self, name: &str, old: &Listing, frozen: bool) -> Result<()> {
        if self.shape == Shape::Delta {
            return Ok(());
        }
        let frozen = frozen && old.directories.contains_key(name);
        let content = if frozen { Some(Hidden::default()) } else { self.content(name, old)? };
        if let Some(content) = content {
            self.push(DeltaOp::Kept { name: name.to_owned(), frozen, content });
        }
        Ok(())
    }

    /// Hides the entry `name`, which only the booted tree has, except for kept content.
    fn remove(&mut self, name: &str, old: &Listing) -> Result<()> {
        let verdict = self.keep.verdict(&self.path);
        if verdict == Verdict::Kept {
            return self.keep(name, old, false);
        }
        if let Some(directory) = old.directories.get(name)
            && verdict == Verdict::Above
            && self.holds_kept(directory, &self.path)?
        {
            self.pending.push(DeltaOp::Enter { name: name.to_owned(), meta: directory.meta, booted: true });
            self.compare(&self.old.list(&directory.tree)?, &Listing::default())?;
            self.leave();
            return Ok(());
        }
        if let Some(hides) = self.content(name, old)? {
            self.hide(name, hides);
        }
        Ok(())
    }

    fn hide(&mut self, name: &str, hides: Hidden) {
        if self.shape == Shape::Delta {
            self.push(DeltaOp::Whiteout { name: name.to_owned(), hides });
        }
    }

    /// Returns true if an entry below `path` in the booted tree is kept.
    fn holds_kept(&self, directory: &Directory, path: &Path) -> Result<bool> {
        let listing = self.old.list(&directory.tree)?;
        for name in listing.files.keys() {
            if self.keep.is_kept(&path.join(name)) {
                return Ok(true);
            }
        }
        for (name, child) in &listing.directories {
            let path = path.join(name);
            match self.keep.verdict(&path) {
                Verdict::Kept => return Ok(true),
                Verdict::Above if self.holds_kept(child, &path)? => return Ok(true),
                Verdict::Above | Verdict::Free => {}
            }
        }
        Ok(false)
    }

    /// Returns the files of the booted tree at `name`.
    fn content(&self, name: &str, old: &Listing) -> Result<Option<Hidden>> {
        Ok(match (old.files.get(name), old.directories.get(name)) {
            (Some(file), _) => Some(Hidden { files: 1, bytes: self.old.size(file)? }),
            (None, Some(directory)) => Some(self.count(directory)?),
            (None, None) => None,
        })
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
                "cannot use this node image: /usr/{} is a file, but must be a directory, because content below it must \
                 stay the booted system's",
                self.path.display()
            );
        }
        Ok(())
    }
}
