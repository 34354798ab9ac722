//! Carries out the steps of a diff: makes the delta directory.

use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::io::Read;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::rc::Rc;

use anyhow::{Context, Result, bail};
use ostree::gio;
use ostree::prelude::InputStreamExtManual;
use rustix::fs::{AtFlags, CWD, FileType, Gid, Mode, OFlags, RenameFlags, Timespec, Timestamps, Uid, XattrFlags};
use rustix::io::Errno;

use super::compare::{self, Checksum, DeltaOp, Directory, Tree as _};
use super::keep::Keep;
use super::lookup::{Delta, DeltaCounts};
use super::overlay_marks::{self, Marks};
use support::failpoint::{self, Point};

use super::source::{DirMeta, PlainTree, RepoTree, xattrs_of};

/// Where the loose content object of a checksum is stored, if the node store has it.
pub type ObjectPath<'a> = dyn Fn(&str) -> Option<PathBuf> + 'a;

/// What the target is compared with.
#[derive(Debug, Clone, Copy)]
pub enum Booted<'a> {
    /// The booted commit, in the node store or its parent repo.
    Commit(&'a str),
    /// No commit is known: the directory itself, usually `/usr`. Everything the target has is in the
    /// delta then.
    Directory(&'a Path),
}

/// What the target commit's `/usr` has otherwise than the booted one. Nothing is written yet.
pub struct Difference<'a> {
    repo: &'a ostree::Repo,
    object_path: &'a ObjectPath<'a>,
    target: RepoTree<'a>,
    /// Where the booted tree is a directory, its metadata.
    plain: Option<PlainTree>,
    steps: Vec<DeltaOp>,
}

/// Compares the commit's `/usr` with the booted one. `object_path` says what the node store itself holds.
///
/// # Errors
/// When a tree cannot be read, or the target has a file where something that is kept needs a
/// directory. Nothing is written in any case.
pub fn compare<'a>(
    repo: &'a ostree::Repo,
    booted: Booted<'_>,
    commit: &str,
    object_path: &'a ObjectPath<'a>,
    keep: &Keep,
) -> Result<Difference<'a>> {
    let target = RepoTree::new(repo);
    let new = target.usr_of(commit)?;
    let (plain, steps) = match booted {
        Booted::Commit(booted) => (None, compare::diff((&target, target.usr_of(booted)?), (&target, new), keep)?),
        Booted::Directory(path) => {
            let plain = PlainTree::new();
            let old: Directory = plain.root(path);
            let steps = compare::diff((&plain, old), (&target, new), keep)?;
            (Some(plain), steps)
        }
    };
    Ok(Difference { repo, object_path, target, plain, steps })
}

impl Difference<'_> {
    /// The bytes that building the delta will write: content that the node store does not hold is copied
    /// from the booted repo. Everything else is linked.
    ///
    /// # Errors
    /// When an object is nowhere; it is named.
    pub fn bytes_to_copy(&self) -> Result<u64> {
        let mut seen = HashSet::new();
        let mut sum = 0;
        for step in &self.steps {
            if let DeltaOp::File { object, .. } = step
                && seen.insert(object)
                && (self.object_path)(&hex::encode(object)).is_none()
            {
                sum += self.target.size(object)?;
            }
        }
        Ok(sum)
    }

    /// Builds at `out` the directory that, laid over the booted `/usr`, shows the target commit's `/usr`.
    ///
    /// It holds hard links to the store's objects, so it must be on the store's file system to cost
    /// nothing; an object that only a parent repo has is copied. It is built beside `out` and renamed: a
    /// failure leaves no `out` that was not there before, and an `out` from before is replaced. It must
    /// not be called while a mount uses `out`.
    ///
    /// # Errors
    /// When an object is missing (named), a label or attribute cannot be set, or there is no room.
    /// The running system is untouched in every case.
    pub fn build(&self, out: &Path) -> Result<Delta> {
        let building = beside(out, "building")?;
        remove_tree(&building)?;
        let mut builder = Builder::new(self.repo, self.object_path, &building)?;
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
        Ok(Delta { directory: out.to_owned(), counts, warnings })
    }
}

/// Both in one: [`compare`], then [`Difference::build`].
pub fn build_delta(
    repo: &ostree::Repo,
    booted: Booted<'_>,
    commit: &str,
    object_path: &ObjectPath<'_>,
    out: &Path,
    keep: &Keep,
) -> Result<Delta> {
    compare(repo, booted, commit, object_path, keep)?.build(out)
}

fn beside(out: &Path, word: &str) -> Result<PathBuf> {
    let name = out.file_name().with_context(|| format!("{} has no name", out.display()))?;
    let mut hidden = std::ffi::OsString::from(".");
    hidden.push(name);
    hidden.push(format!(".{word}"));
    Ok(out.with_file_name(hidden))
}

fn remove_tree(path: &Path) -> Result<()> {
    match std::fs::remove_dir_all(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("removing the leftover {}", path.display()))
        }
        _ => Ok(()),
    }
}

/// Puts the finished directory in its place, in one step.
fn publish(building: &Path, out: &Path) -> Result<()> {
    let into_place = || format!("renaming {} to {}", building.display(), out.display());
    failpoint::hit(Point::DeltaPublish, "").with_context(into_place)?;
    match rustix::fs::renameat_with(CWD, building, CWD, out, RenameFlags::NOREPLACE) {
        Err(Errno::EXIST) => {
            rustix::fs::renameat_with(CWD, building, CWD, out, RenameFlags::EXCHANGE).with_context(into_place)?;
            remove_tree(building)
        }
        other => other.with_context(into_place),
    }
}

struct Builder<'a> {
    repo: &'a ostree::Repo,
    object_path: &'a ObjectPath<'a>,
    root: PathBuf,
    /// Directories from the root to where we are, with the metadata they get when we leave.
    stack: Vec<(OwnedFd, Rc<DirMeta>)>,
    path: PathBuf,
    metas: HashMap<Checksum, Rc<DirMeta>>,
    /// Objects that were copied, and where to, relative to the root.
    copies: HashMap<Checksum, PathBuf>,
    counts: DeltaCounts,
    marks: Marks,
}

impl<'a> Builder<'a> {
    fn new(repo: &'a ostree::Repo, object_path: &'a ObjectPath<'a>, root: &Path) -> Result<Self> {
        if let Some(parent) = root.parent() {
            std::fs::create_dir_all(parent).with_context(|| format!("creating {}", parent.display()))?;
        }
        Ok(Self {
            repo,
            object_path,
            root: root.to_owned(),
            stack: Vec::new(),
            path: PathBuf::new(),
            metas: HashMap::new(),
            copies: HashMap::new(),
            counts: DeltaCounts::default(),
            marks: Marks::default(),
        })
    }

    /// The path is that of the entry at fault when this fails.
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
                    self.marks.note_attributes(&self.path);
                }
                let (parent, name) = match self.stack.last() {
                    Some((parent, _)) => (parent.as_fd(), Path::new(name)),
                    None => (CWD, self.root.as_path()),
                };
                rustix::fs::mkdirat(parent, name, Mode::RWXU).context("making a directory")?;
                let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                let directory = rustix::fs::openat(parent, name, flags, Mode::empty()).context("opening it")?;
                self.stack.push((directory, meta));
                self.counts.directories += 1;
            }
            DeltaOp::Leave => {
                let (directory, meta) = self.stack.pop().context("left more often than entered")?;
                // Only now: a default ACL must not spread to what was made inside.
                set_metadata(directory.as_fd(), &meta)?;
                self.path.pop();
            }
            DeltaOp::File { name, .. } if overlay_marks::is_whiteout(name) => {
                self.marks.note_whiteout(&self.path.join(name));
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
                // Overlayfs takes a character device 0:0 for "nothing here".
                rustix::fs::mknodat(self.here()?, name, FileType::CharacterDevice, Mode::empty(), 0)
                    .context("making a whiteout")?;
                self.path.pop();
                self.counts.removed += hides.files;
                self.counts.removed_bytes += hides.bytes;
            }
        }
        Ok(())
    }

    fn here(&self) -> Result<BorrowedFd<'_>> {
        Ok(self.stack.last().context("a step outside of the root")?.0.as_fd())
    }

    /// Puts the object there and returns its size in bytes.
    fn file(&mut self, name: &str, object: &Checksum) -> Result<u64> {
        let hex = hex::encode(object);
        let copy_before = self.copies.get(object).map(|copy| self.root.join(copy));
        let mut stored = copy_before.or_else(|| (self.object_path)(&hex));
        if let Some(path) = &stored
            && overlay_marks::has_attribute(path)?
        {
            self.marks.note_attributes(&self.path);
            stored = None;
        }
        let here = self.here()?;
        let linked = match &stored {
            None => false,
            Some(stored) => match rustix::fs::linkat(CWD, stored, here, name, AtFlags::empty()) {
                Ok(()) => true,
                // Too many links, or a store on another file system: a copy is as good.
                Err(Errno::MLINK | Errno::XDEV) => false,
                Err(error) => {
                    return Err(error).with_context(|| format!("linking the object {}", stored.display()));
                }
            },
        };
        if !linked {
            copy(self.repo, &hex, here, name)?;
        }
        let stat = rustix::fs::statat(here, name, AtFlags::SYMLINK_NOFOLLOW).context("looking at it")?;
        let size = u64::try_from(stat.st_size).unwrap_or_default();
        if !linked {
            self.counts.copied += 1;
            self.counts.copied_bytes += size;
            self.copies.insert(*object, self.path.clone());
        }
        Ok(size)
    }
}

/// Writes a content object, wherever the repo or its parents have it, as `name`.
fn copy(repo: &ostree::Repo, hex: &str, here: BorrowedFd<'_>, name: &str) -> Result<()> {
    let (content, info, xattrs) = repo
        .load_file(hex, gio::Cancellable::NONE)
        .with_context(|| format!("the content object {hex} is neither in the node store nor in the booted repo"))?;
    let number = |attribute| info.attribute_uint32(attribute);
    let (uid, gid, mode) = (number("unix::uid"), number("unix::gid"), number("unix::mode"));
    let meta = DirMeta { uid, gid, mode, xattrs: xattrs_of(xattrs.get().context("its attributes are malformed")?) };
    let Some(content) = content else {
        let target = info.symlink_target().context("it is neither a file nor a link")?;
        rustix::fs::symlinkat(target.as_path(), here, name).context("making a link")?;
        rustix::fs::chownat(here, name, Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)), AtFlags::SYMLINK_NOFOLLOW)
            .context("setting its owner")?;
        // There is no call for a link's attributes by handle; the directory's own is as good.
        let place = PathBuf::from(format!("/proc/self/fd/{}", here.as_raw_fd())).join(name);
        for (name, value) in meta.settable() {
            rustix::fs::lsetxattr(&place, name.as_slice(), value, XattrFlags::empty())
                .with_context(|| attribute(name))?;
        }
        return Ok(());
    };
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
    let mut file = File::from(rustix::fs::openat(here, name, flags, Mode::RUSR).context("making a file")?);
    let mut reader = content.into_read();
    let mut buffer = vec![0; 128 * 1024];
    loop {
        match reader.read(&mut buffer).context("reading it from the booted repo")? {
            0 => break,
            length => std::io::Write::write_all(&mut file, &buffer[..length]).context("writing it")?,
        }
    }
    set_metadata(file.as_fd(), &meta)
}

fn attribute(name: &[u8]) -> String {
    let name = String::from_utf8_lossy(name);
    let hint = match &*name {
        selinux_labels::ATTRIBUTE if selinux_labels::mode() != selinux_labels::Mode::Disabled => {
            format!(
                " (if the loaded policy does not know its label: {})",
                selinux_labels::advice(selinux_labels::context().as_deref())
            )
        }
        _ => String::new(),
    };
    format!("setting {name}{hint}")
}

/// Owner first: a change of owner takes setuid bits and capabilities away. The time is ostree's.
fn set_metadata(fd: BorrowedFd<'_>, meta: &DirMeta) -> Result<()> {
    rustix::fs::fchown(fd, Some(Uid::from_raw(meta.uid)), Some(Gid::from_raw(meta.gid)))
        .context("setting its owner")?;
    rustix::fs::fchmod(fd, Mode::from_raw_mode(meta.mode & 0o7777)).context("setting its mode")?;
    for (name, value) in meta.settable() {
        if let Err(error) = rustix::fs::fsetxattr(fd, name.as_slice(), value, XattrFlags::empty()) {
            bail!("{}: {error}", attribute(name));
        }
    }
    let zero = Timespec { tv_sec: 0, tv_nsec: 0 };
    rustix::fs::futimens(fd, &Timestamps { last_access: zero, last_modification: zero }).context("setting its time")
}
