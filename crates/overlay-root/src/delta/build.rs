//! Builds the delta directory, or a complete tree, from the steps of a diff.

use std::collections::{HashMap, HashSet};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::rc::Rc;

use anyhow::{Context, Result};
use rustix::fs::{AtFlags, CWD, FileType, Mode, OFlags, RenameFlags};
use rustix::io::Errno;

use super::compare::{self, Checksum, DeltaOp, Directory, Shape, Tree as _};
use super::keep::Keep;
use super::lookup::{Delta, DeltaCounts};
use super::overlay_marks::{self, Marks};
use node_store::store::{DirMeta, NodeStore, ObjectId, ObjectType};
use support::BlockSize;
use support::failpoint::{self, Point};

use super::source::{PlainTree, StoreTree};
use super::write::{copy_entry, set_metadata};

/// The booted tree, with which the target is compared.
#[derive(Debug, Clone, Copy)]
pub enum Booted<'a> {
    /// A commit in the node store or its parent repo.
    Commit(ObjectId),
    /// A directory, usually `/usr`, whose commit is unknown. The delta then contains all files of the target.
    Directory(&'a Path),
}

/// The differences between the target commit's `/usr` and the booted one, or all of the new `/usr`.
pub struct Difference<'a> {
    target: StoreTree<'a>,
    /// The booted tree, if it is a directory.
    plain: Option<PlainTree>,
    /// The booted `/usr` for the kept content of a complete tree.
    kept: Option<&'a Path>,
    steps: Vec<DeltaOp>,
}

/// Compares the commit's `/usr` with the booted one, without writing. The commits are in the node store or its parent repo.
///
/// # Errors
/// A tree cannot be read, or the target has a file at the path of a directory with frozen content.
pub fn compare<'a>(store: &'a NodeStore, booted: Booted<'_>, commit: ObjectId, keep: &Keep) -> Result<Difference<'a>> {
    let target = StoreTree(store);
    let new = target.usr_of(commit)?;
    let (plain, steps) = match booted {
        Booted::Commit(booted) => {
            let old = (&target as _, target.usr_of(booted)?);
            (None, compare::diff(old, (&target, new), keep, Shape::Delta)?)
        }
        Booted::Directory(path) => {
            let plain = PlainTree::new();
            let old: Directory = plain.root(path);
            let steps = compare::diff((&plain, old), (&target, new), keep, Shape::Delta)?;
            (Some(plain), steps)
        }
    };
    Ok(Difference { target, plain, kept: None, steps })
}

/// Lists all files of the commit's `/usr`, and those of the booted `usr` that `keep` selects, for a tree that is used without
/// an overlay. The frozen directories are empty in it.
///
/// # Errors
/// Those of [`compare`].
pub fn complete<'a>(store: &'a NodeStore, usr: &'a Path, commit: ObjectId, keep: &Keep) -> Result<Difference<'a>> {
    let (target, plain) = (StoreTree(store), PlainTree::new());
    let steps = compare::diff((&plain, plain.root(usr)), (&target, target.usr_of(commit)?), keep, Shape::Complete)?;
    Ok(Difference { target, plain: Some(plain), kept: Some(usr), steps })
}

/// Memory of a tmpfs inode and of its name in the kernel, in bytes. A hard link needs less.
const ENTRY_MEMORY: u64 = 1024;

impl Difference<'_> {
    /// Returns the space that the copies of [`Difference::build`] will need, in whole units of `unit`: the content that only
    /// the booted repo holds and, for a complete tree, its directories and kept content. All other files are hard links.
    ///
    /// # Errors
    /// An object is in neither repo; the message names it.
    pub fn bytes_to_copy(&self, unit: BlockSize) -> Result<u64> {
        let mut seen = HashSet::new();
        let mut sum = 0_u64;
        for step in &self.steps {
            if let DeltaOp::File { object, .. } = step
                && seen.insert(object)
                && self.target.0.own_object(object, ObjectType::File).is_none()
            {
                sum = sum.saturating_add(unit.allocated(self.target.size(object)?));
            }
            // An upper bound: a unit for each kept file, and one for each directory of a complete tree.
            let (bytes, units) = match step {
                DeltaOp::Kept { content, .. } => (content.bytes, content.files),
                DeltaOp::Enter { .. } if self.kept.is_some() => (0, 1),
                _ => (0, 0),
            };
            sum = sum.saturating_add(bytes).saturating_add(unit.allocated(1).saturating_mul(units));
        }
        Ok(sum)
    }

    /// Returns an upper bound of the kernel's memory for the inodes and names of a complete tree on a tmpfs, which is not part
    /// of the space of the files. The number for a delta is small, and 0 here.
    pub fn kernel_memory(&self) -> u64 {
        let entries = self.steps.iter().map(|step| match step {
            DeltaOp::Kept { content, .. } => content.files.saturating_add(1),
            _ => 1,
        });
        let of_all = entries.fold(0_u64, u64::saturating_add).saturating_mul(ENTRY_MEMORY);
        if self.kept.is_some() { of_all } else { 0 }
    }

    /// Builds the delta directory at `out`. An overlay of it on the booted `/usr` shows the target commit's `/usr`.
    ///
    /// Files are hard links to the store's objects, so `out` should be on the store's file system. Objects that only a
    /// parent repo has are copied. The directory is built beside `out` and then renamed. An existing `out` is replaced
    /// atomically; after an error it is unchanged. The caller makes sure that no mount uses `out`.
    ///
    /// # Errors
    /// An object is missing (the message names it), a label or attribute cannot be set, or the file system is full.
    pub fn build(&self, out: &Path) -> Result<Delta> {
        let building = beside(out, "building")?;
        remove_tree(&building)?;
        let mut builder = Builder::new(self.target.0, self.kept, &building)?;
        let booted_meta = |name: &Checksum| match &self.plain {
            None => self.target.meta(name),
            Some(plain) => plain.meta(name),
        };
        for step in &self.steps {
            builder
                .step(step, &|name| self.target.meta(name), &booted_meta)
                .with_context(|| format!("cannot build the delta tree at /usr/{}", builder.path.display()))?;
        }
        let (counts, warnings) = (builder.counts, builder.marks.warnings());
        publish(&building, out)?;
        Ok(Delta { directory: out.to_owned(), counts, warnings, ..Delta::default() })
    }
}

fn beside(out: &Path, word: &str) -> Result<PathBuf> {
    let name = out.file_name().with_context(|| format!("internal error: {} has no file name", out.display()))?;
    let mut hidden = std::ffi::OsString::from(".");
    hidden.push(name);
    hidden.push(format!(".{word}"));
    Ok(out.with_file_name(hidden))
}

fn remove_tree(path: &Path) -> Result<()> {
    let removed = support::ignore_missing(std::fs::remove_dir_all(path));
    removed.with_context(|| format!("cannot remove the unfinished {}", path.display()))
}

/// Renames the finished directory to `out`, atomically.
fn publish(building: &Path, out: &Path) -> Result<()> {
    let failed = || format!("cannot rename {} to {}", building.display(), out.display());
    failpoint::hit(Point::DeltaPublish, "").with_context(failed)?;
    match rustix::fs::renameat_with(CWD, building, CWD, out, RenameFlags::NOREPLACE) {
        Err(Errno::EXIST) => {
            rustix::fs::renameat_with(CWD, building, CWD, out, RenameFlags::EXCHANGE).with_context(failed)?;
            remove_tree(building)
        }
        other => other.with_context(failed),
    }
}

struct Builder<'a> {
    store: &'a NodeStore,
    kept: Option<&'a Path>,
    root: PathBuf,
    /// Open directories from the root to the current one, with the metadata that they get at [`DeltaOp::Leave`].
    stack: Vec<(OwnedFd, Rc<DirMeta>)>,
    path: PathBuf,
    metas: HashMap<Checksum, Rc<DirMeta>>,
    /// Copied objects and the paths of the copies, relative to the root.
    copies: HashMap<Checksum, PathBuf>,
    counts: DeltaCounts,
    marks: Marks,
}

impl<'a> Builder<'a> {
    fn new(store: &'a NodeStore, kept: Option<&'a Path>, root: &Path) -> Result<Self> {
        if let Some(parent) = root.parent() {
            std::fs::create_dir_all(parent).with_context(|| format!("cannot create {}", parent.display()))?;
        }
        Ok(Self {
            store,
            kept,
            root: root.to_owned(),
            stack: Vec::new(),
            path: PathBuf::new(),
            metas: HashMap::new(),
            copies: HashMap::new(),
            counts: DeltaCounts::default(),
            marks: Marks::default(),
        })
    }

    /// Carries out one step. After an error, `path` is that of the entry.
    fn step(
        &mut self,
        step: &DeltaOp,
        new_meta: &dyn Fn(&Checksum) -> Result<DirMeta>,
        booted_meta: &dyn Fn(&Checksum) -> Result<DirMeta>,
    ) -> Result<()> {
        failpoint::hit(Point::Delta, "")?;
        match step {
            DeltaOp::Enter { name, meta, booted } => {
                self.path.push(name);
                let meta = match self.metas.get(meta) {
                    Some(known) => known.clone(),
                    None => {
                        let loaded = Rc::new(if *booted { booted_meta(meta)? } else { new_meta(meta)? });
                        self.metas.insert(*meta, loaded.clone());
                        loaded
                    }
                };
                if meta.xattrs.iter().any(|(name, _)| overlay_marks::is_attribute(name)) {
                    self.marks.add_attributes(&self.path);
                }
                let (parent, name) = match self.stack.last() {
                    Some((parent, _)) => (parent.as_fd(), Path::new(name)),
                    None => (CWD, self.root.as_path()),
                };
                rustix::fs::mkdirat(parent, name, Mode::RWXU).context("cannot create the directory")?;
                let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                let directory =
                    rustix::fs::openat(parent, name, flags, Mode::empty()).context("cannot open the directory")?;
                self.stack.push((directory, meta));
                self.counts.directories += 1;
            }
            DeltaOp::Leave => {
                let (directory, meta) =
                    self.stack.pop().context("internal error: left more directories than entered")?;
                // Last, because a default ACL would apply to entries that are created later.
                set_metadata(directory.as_fd(), &meta)?;
                self.path.pop();
            }
            DeltaOp::File { name, .. } if overlay_marks::is_whiteout(name) => {
                self.marks.add_whiteout(&self.path.join(name));
            }
            DeltaOp::File { name, object, replaces } => {
                self.path.push(name);
                let size = self.file(name, object)?;
                self.path.pop();
                match replaces {
                    None => {
                        self.counts.added += 1;
                        self.counts.added_bytes += size;
                    }
                    Some(hidden) => {
                        self.counts.changed += 1;
                        self.counts.changed_bytes += size;
                        self.counts.replaced_bytes += hidden.bytes;
                    }
                }
            }
            DeltaOp::Whiteout { name, hides } => {
                self.path.push(name);
                rustix::fs::mknodat(self.current()?, name, FileType::CharacterDevice, Mode::empty(), 0)
                    .context("cannot create a whiteout")?;
                self.path.pop();
                self.counts.removed += hides.files;
                self.counts.removed_bytes += hides.bytes;
            }
            DeltaOp::Kept { name, frozen, content } => {
                self.path.push(name);
                let kept = self.kept.context("internal error: kept content in a delta")?.join(&self.path);
                copy_entry(&kept, self.current()?, name, !frozen)?;
                self.path.pop();
                self.counts.copied += content.files;
                self.counts.copied_bytes += content.bytes;
            }
        }
        Ok(())
    }

    fn current(&self) -> Result<BorrowedFd<'_>> {
        Ok(self.stack.last().context("internal error: a step outside of the root")?.0.as_fd())
    }

    /// Links or copies an object to `name` and returns its size in bytes.
    fn file(&mut self, name: &str, object: &Checksum) -> Result<u64> {
        let copy_before = self.copies.get(object).map(|copy| self.root.join(copy));
        let mut stored = copy_before.or_else(|| self.store.own_object(object, ObjectType::File));
        if let Some(path) = &stored
            && overlay_marks::has_attribute(path)?
        {
            self.marks.add_attributes(&self.path);
            stored = None;
        }
        let directory = self.current()?;
        let linked = match &stored {
            None => false,
            Some(stored) => match rustix::fs::linkat(CWD, stored, directory, name, AtFlags::empty()) {
                Ok(()) => true,
                // The object has too many links, or the store is on another file system: copy it.
                Err(Errno::MLINK | Errno::XDEV) => false,
                Err(error) => {
                    return Err(error).with_context(|| format!("cannot link the object {}", stored.display()));
                }
            },
        };
        if !linked {
            copy_entry(&self.store.find_content(object)?, directory, name, false)?;
        }
        let stat = rustix::fs::statat(directory, name, AtFlags::SYMLINK_NOFOLLOW).context("cannot read its size")?;
        let size = u64::try_from(stat.st_size).unwrap_or_default();
        if !linked {
            self.counts.copied += 1;
            self.counts.copied_bytes += size;
            self.copies.insert(*object, self.path.clone());
        }
        Ok(size)
    }
}
